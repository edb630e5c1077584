"""finetune: adapt a base to a text or a built-in task, and go on where an earlier call was stopped. The two kinds of base are in bases.py."""

import argparse
import dataclasses
import io
import json
import math
import shutil
import sys
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import nn

import minilora as ml
from minilora import data, plots, storage
from minilora.commands.arguments import layer_names, method_name, positive, rate, whole
from minilora.commands.bases import ByteBase, RealBase
from minilora.commands.folders import room
from minilora.commands.models import MODEL, REAL, base_or_model
from minilora.methods import METHODS, make_method
from minilora.safety import memory
from minilora.safety.recompute import KINDS
from minilora.safety.runs import lock_of
from minilora.scale import parallel
from minilora.training import OneProcess

AUTOCAST = {None: None, "bf16": torch.bfloat16}
CHECKPOINT, HISTORY, PICTURE = "checkpoint.pt", "history.json", "loss.png"
WRITTEN = (CHECKPOINT, MODEL, HISTORY, PICTURE, storage.CONFIG, storage.WEIGHTS)
FOLDERS = (REAL, f".{REAL}.tmp", f".{REAL}.old")


def add(commands) -> None:
    parser = commands.add_parser("finetune", help="adapt a base to a text or a built-in task")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--text", type=Path, metavar="FILE", help="any UTF-8 file or pipe; its last tenth is held out")
    source.add_argument("--task", choices=data.TASKS, help="a task with known answers")
    parser.add_argument("--method", type=method_name, default="lora", help=", ".join(METHODS))
    parser.add_argument("--rank", type=whole(1, 2**16), help="rank of the update (default: 8, VeRA 64); AdaLoRA's target, from half as much again")
    parser.add_argument("--alpha", type=positive, help="strength of the update (default: the method's)")
    parser.add_argument("--steps", type=whole(1), default=200)
    parser.add_argument("--lr", type=rate, help="peak learning rate (default: one that suits the method)")
    parser.add_argument("--context", type=whole(2), metavar="N",
                        help="bytes of a window (default: what the base reads); with --model tokens (default: 256 at most)")
    parser.add_argument("--rows", type=whole(1), metavar="N", help="windows in a batch (default: 16, with --model 4)")
    parser.add_argument("--accumulate", type=whole(1), default=1, metavar="N", help="batches that a step reads, one after the other (default: 1)")
    parser.add_argument("--clip", type=positive, metavar="LENGTH", help="largest length of the gradient (default: any)")
    parser.add_argument("--autocast", choices=[name for name in AUTOCAST if name], help="compute the loss in this type")
    parser.add_argument("--checkpointing", choices=KINDS, help="keep only the blocks' inputs for backward, and compute the rest again")
    parser.add_argument("--seed", type=whole(0), default=0)
    parser.add_argument("--targets", type=layer_names, help="comma-separated names of layers (default: all linear layers of the blocks)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where the adapter goes (default: runs/NAME-METHOD)")
    parser.add_argument("--shard", action="store_true", help="cut the frozen base over the processes that torchrun has started")
    parser.add_argument("--force", action="store_true", help="replace what an earlier run left in DIR")
    parser.set_defaults(run=run)
    base_or_model(parser)


def run(args: argparse.Namespace) -> int:
    with parallel.several(args.shard) as processes, memory.told(needs_less(args)):   # one, unless torchrun has started more; then only the first writes
        return together(args, processes)


def together(args: argparse.Namespace, processes: OneProcess) -> int:
    method = make_method(args.method, args.rank, args.alpha, args.steps)
    out = args.out or Path("runs") / f"{args.text.stem if args.text else args.task}-{args.method}"
    with room(out) if processes.first else nullcontext():
        processes.told(refuse, out, args.force)
        base = (RealBase if args.model else ByteBase)(args, processes)
        base.refuse(method, args.targets)
        processes.refuse(method, args.rows or base.rows, args.checkpointing)
        if args.force:
            processes.told(clear, out)
        print(f"{base.opening}\n\nbefore:\n{sample(base)}\n")
        before = base.scores()
        try:
            summary = train(args, base, method, out / CHECKPOINT, processes)
        except (KeyboardInterrupt, SystemExit) as stop:
            there = (out / CHECKPOINT).exists()            # not in a method's warm-up
            print(f"\nstopped; {f'a checkpoint is in {out}. The same command goes on from there' if there else parallel.NOTHING_YET}.", file=sys.stderr)
            return 130 if isinstance(stop, KeyboardInterrupt) else stop.code
        except ConnectionError as error:
            raise ConnectionError(f"{error}. {parallel.stands(out / CHECKPOINT)}") from None
        except FloatingPointError as error:
            raise FloatingPointError(f"{error}. In {out} is the checkpoint of this run; --force starts another one there") from None
        after = base.scores()
        print(f"\nafter:\n{sample(base)}\n")
        report(base.model, args.method, before, after, processes)
        with parallel.whole(base.model):
            if processes.first:
                write_results(out, base, summary | {"before": before, "after": after})
                print(f"\nin {out}: {', '.join(sorted(file.name for file in out.iterdir() if not file.name.startswith('.')))}")
    return 0


def train(args: argparse.Namespace, base: ByteBase | RealBase, method: ml.Method, checkpoint: Path, processes: OneProcess) -> dict:
    """Fine-tune the base. Returns the settings and the history."""
    lr = args.lr or base.rate(args.method)
    history = ml.finetune(
        base.model, method, base.batches(args.rows or base.rows, args.seed), args.steps, lr, args.seed, checkpoint, targets=args.targets,
        accumulate=args.accumulate, clip=args.clip, warmup=min(20, args.steps // 10), schedule="linear", evaluate=base.nats_per_byte,
        autocast=AUTOCAST[args.autocast], checkpointing=args.checkpointing, processes=processes)
    at_the_end = history["evaluated"][-1][1]
    if not math.isfinite(at_the_end):
        raise FloatingPointError(f"after the last step the held-out loss is {at_the_end}: a lower learning rate than {lr:g} may help")
    return {"task": base.name, "method": args.method, "hyperparameters": dataclasses.asdict(method), "targets": args.targets, "steps": args.steps,
            "lr": lr, "seed": args.seed, "accumulate": args.accumulate, "clip": args.clip, "autocast": args.autocast, "checkpointing": args.checkpointing,
            "trainable_parameters": ml.trainable_parameters(base.model)} | base.about | history


def needs_less(args: argparse.Namespace) -> str:
    """Where memory has run out: the flags that are left."""
    same = "" if args.checkpointing else "The same command with --checkpointing non-reentrant needs less and goes on. "
    other = "A smaller --rows or --context" + (", or --method qlora," if args.method != "qlora" and not args.shard else "")
    return f". {same}{other} is another run, with another --out or --force"


def write_results(out: Path, base: ByteBase | RealBase, summary: dict) -> None:
    """The adapter (or the model, fully fine-tuned), the picture, and last the history, which marks the run as finished."""
    if any(True for _ in ml.adapters(base.model)):
        ml.save_adapter(base.model, out)
    else:
        base.save_whole(out)
    title = f"{plots.printable(summary['task'])}: {summary['method']}, {summary['trainable_parameters']:,} trainable parameters"
    curve = summary | {"loss": [loss * base.tokens_per_byte for loss in summary["loss"]]}       # training counts in tokens, the picture in bytes
    picture = io.BytesIO()
    plots.loss_curve(curve, title, base.floor()).savefig(picture, dpi=150)
    storage.write_atomically(out / PICTURE, picture.getvalue())
    storage.write_atomically(out / HISTORY, (json.dumps(summary, indent=1) + "\n").encode())
    (out / CHECKPOINT).unlink(missing_ok=True)


def refuse(out: Path, force: bool) -> None:
    """A folder that holds a finished run, or other things and no run to go on with, is refused without `force`."""
    there = {file.name for file in out.iterdir()} - leftovers(out)
    if not force and HISTORY in there:
        raise ValueError(f"{out} holds a finished run; take another --out, or --force to replace it")
    if not force and there and CHECKPOINT not in there:
        raise ValueError(f"{out} is not empty and holds no run to go on with; take another --out, or --force to write there")


def clear(out: Path) -> None:
    """Remove what a run writes there."""
    for name in {*WRITTEN, *leftovers(out)} - {lock_of(out).name, *FOLDERS}:
        (out / name).unlink(missing_ok=True)
    for name in FOLDERS:
        shutil.rmtree(out / name, ignore_errors=True)


def leftovers(out: Path) -> set[str]:
    """Names of what this run needs meanwhile, and one that was killed has left."""
    return {lock_of(out).name, lock_of(out / CHECKPOINT).name, *(f".{name}.tmp" for name in WRITTEN), *FOLDERS[1:]}


def sample(base: ByteBase | RealBase) -> str:
    return "\n".join(f"    {line}" for line in base.sample().strip("\n").splitlines())


def report(model: nn.Module, method: str, before: dict, after: dict, processes: OneProcess) -> None:
    in_four_bits = sum(layer.in_features * layer.out_features for layer in model.modules() if isinstance(layer, ml.NF4Linear))
    everything = in_four_bits + sum(parameter.numel() for parameter in model.parameters())
    print(f"{method}: {ml.trainable_parameters(model):,} of {everything:,} parameters trained")
    if processes.count > 1:
        print(f"all-reduced: {processes.bytes:,} bytes a step by each of {processes.count} processes; full fine-tuning {4 * everything:,}")
    print(f"held out:  {before['bits_per_byte']:.3f} -> {after['bits_per_byte']:.3f} bits per byte")
    if "exact_match" in after:
        print(f"answered:  {before['exact_match']:.1%} -> {after['exact_match']:.1%} of unseen questions, byte for byte")
    if "world_bits_per_byte" in after:
        world, now = before["world_bits_per_byte"], after["world_bits_per_byte"]
        print(f"forgotten: {now - world:+.3f} bits per byte on the tiny world ({world:.3f} -> {now:.3f})")
