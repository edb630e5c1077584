"""generate and merge: let a model speak, and make one of base and adapter."""

import argparse
from pathlib import Path

import torch

import minilora as ml
from minilora import storage
from minilora.commands.arguments import not_negative, whole
from minilora.commands.models import REAL, base_or_model, load, real_model


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def add(commands) -> None:
    generate = commands.add_parser("generate", help="continue a prompt")
    generate.add_argument("--prompt", default="", help="how the text begins (default: a new document)")
    generate.add_argument("--adapter", type=Path, metavar="DIR", help="what finetune wrote")
    generate.add_argument("--max-new", type=whole(1), default=200, metavar="N", help="bytes, with --model tokens (default: 200)")
    generate.add_argument("--temperature", type=not_negative, default=0.7)
    generate.add_argument("--seed", type=whole(0), default=None)
    generate.set_defaults(run=run_generate)
    base_or_model(generate)

    merge = commands.add_parser("merge", help="fold an adapter into a model of its own")
    merge.add_argument("--adapter", type=Path, required=True, metavar="DIR")
    merge.add_argument("--out", type=Path, required=True, metavar="FILE", help="of a --model a folder, as transformers reads it")
    merge.add_argument("--dtype", choices=DTYPES, help="of a --model: what is written (default: its own; in 16 bits a small update may be rounded away)")
    merge.add_argument("--force", action="store_true", help="replace what is there")
    merge.set_defaults(run=run_merge)
    base_or_model(merge)


def run_generate(args: argparse.Namespace) -> int:
    print(load(args).generate(args.prompt, args.max_new, args.temperature, args.seed))
    return 0


def run_merge(args: argparse.Namespace) -> int:
    if args.out.exists() and not args.force:
        raise ValueError(f"{args.out} exists already; --force replaces it")
    if args.model:
        return merge_real(args)
    if args.dtype:
        raise ValueError(f"--dtype {args.dtype} is for a --model; a TinyGPT is merged in its own type, float32 as a rule")
    storage.save_model(ml.merge(ml.load_adapter(ml.load_base(args.base), args.adapter)), args.out)
    print(f"{args.out}: a model of its own; speak with it by `generate --base {args.out}`")
    return 0


def merge_real(args: argparse.Namespace) -> int:
    from minilora.scale.saving import densify, refuse_other_things, save_folder

    refuse_other_things(args.out)
    if (args.adapter / REAL).is_dir():
        raise ValueError(f"{args.adapter} holds a whole model, fully fine-tuned, and no adapter: `generate --model {args.adapter / REAL}` speaks with it")
    speaker, dtype = real_model(args, device="cpu"), DTYPES.get(args.dtype)
    model = ml.merge(speaker.model, dtype)
    save_folder(densify(model).to(dtype) if dtype else model, speaker.tokenizer, args.out)       # some layers may be in four bits and not adapted
    print(f"{args.out}: a model of its own; speak with it by `generate --model {args.out}`")
    return 0
