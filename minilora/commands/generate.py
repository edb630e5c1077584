"""generate and merge: let a model speak, and make one of base and adapter."""

import argparse
from pathlib import Path

import minilora as ml
from minilora import storage
from minilora.commands.arguments import not_negative, whole
from minilora.commands.models import base_argument, load, on_best_device


def add(commands) -> None:
    generate = commands.add_parser("generate", help="continue a prompt")
    generate.add_argument("--prompt", default="", help="how the text begins (default: a new document)")
    generate.add_argument("--adapter", type=Path, metavar="DIR", help="what finetune wrote")
    generate.add_argument("--max-new", type=whole(1), default=200, metavar="BYTES")
    generate.add_argument("--temperature", type=not_negative, default=0.7)
    generate.add_argument("--seed", type=whole(0), default=None)
    generate.set_defaults(run=run_generate)
    base_argument(generate)

    merge = commands.add_parser("merge", help="fold an adapter into a model file of its own")
    merge.add_argument("--adapter", type=Path, required=True, metavar="DIR")
    merge.add_argument("--out", type=Path, required=True, metavar="FILE")
    merge.add_argument("--force", action="store_true", help="replace FILE")
    merge.set_defaults(run=run_merge)
    base_argument(merge)


def run_generate(args: argparse.Namespace) -> int:
    model = on_best_device(load(args))
    print(model.generate(args.prompt, args.max_new, args.temperature, args.seed))
    return 0


def run_merge(args: argparse.Namespace) -> int:
    if args.out.exists() and not args.force:
        raise ValueError(f"{args.out} exists already; --force replaces it")
    storage.save_model(ml.merge(ml.load_adapter(ml.load_base(args.base), args.adapter)), args.out)
    print(f"{args.out}: a model of its own; speak with it by `generate --base {args.out}`")
    return 0
