"""finetune: adapt the base to a text or a built-in task, and go on where an earlier call was stopped."""

import argparse
import copy
import dataclasses
import io
import json
import math
import sys
from contextlib import nullcontext
from pathlib import Path

import torch

import minilora as ml
from minilora import data, plots, storage
from minilora.commands.arguments import layer_names, method_name, positive, whole
from minilora.commands.folders import room
from minilora.commands.models import MODEL, base_argument, byte_base, on_best_device
from minilora.methods import METHODS, RATES, make_method
from minilora.scale import parallel
from minilora.safety.runs import lock_of
from minilora.training import OneProcess

CHECKPOINT, HISTORY, PICTURE = "checkpoint.pt", "history.json", "loss.png"
WRITTEN = (CHECKPOINT, MODEL, HISTORY, PICTURE, storage.CONFIG, storage.WEIGHTS)


def add(commands) -> None:
    parser = commands.add_parser("finetune", help="adapt the base to a text or a built-in task")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--text", type=Path, metavar="FILE", help="any UTF-8 file or pipe; its last tenth is held out")
    source.add_argument("--task", choices=data.TASKS, help="a task with known answers")
    parser.add_argument("--method", type=method_name, default="lora", help=", ".join(METHODS))
    parser.add_argument("--rank", type=whole(1, 2**16), help="rank of the update (default: 8, VeRA 64); AdaLoRA's target, from half as much again")
    parser.add_argument("--alpha", type=positive, help="strength of the update (default: the method's)")
    parser.add_argument("--steps", type=whole(1), default=200)
    parser.add_argument("--lr", type=positive, help="peak learning rate (default: one that suits the method)")
    parser.add_argument("--accumulate", type=whole(1), default=1, metavar="N", help="batches of 16 windows that a step reads, one after the other (default: 1)")
    parser.add_argument("--clip", type=positive, metavar="LENGTH", help="largest length of the gradient (default: any)")
    parser.add_argument("--seed", type=whole(0), default=0)
    parser.add_argument("--targets", type=layer_names, help="comma-separated names of layers (default: all linear layers of the blocks)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where the adapter goes (default: runs/NAME-METHOD)")
    parser.add_argument("--shard", action="store_true", help="cut the frozen base over the processes that torchrun has started")
    parser.add_argument("--force", action="store_true", help="replace what an earlier run left in DIR")
    parser.set_defaults(run=run)
    base_argument(parser)


def run(args: argparse.Namespace) -> int:
    with parallel.several(args.shard) as processes:                   # one, unless torchrun has started more; then only the first writes
        return together(args, processes)


def together(args: argparse.Namespace, processes: OneProcess) -> int:
    content = processes.told(data.read, args.text) if args.text else b""             # once: a pipe has nothing to say twice
    task = data.split_text(content, data.printed(args.text)) if args.text else data.TASKS[args.task]()
    method = make_method(args.method, args.rank, args.alpha, args.steps)
    model = processes.placed(byte_base(args.base)) if processes.count > 1 else on_best_device(byte_base(args.base))
    ml.adapt(copy.deepcopy(model), method, args.targets)              # whatever the method or the targets refuse, it is refused here
    windows = task.held_out(model.config.context + 1)
    out = args.out or Path("runs") / f"{args.text.stem if args.text else args.task}-{args.method}"
    with room(out) if processes.first else nullcontext():
        processes.told(claim, out, args.force)
        seen = f", {data.overlap(task, content):.0%} of them seen in training" if args.text else ""
        print(f"{task.name}: {windows.numel():,} bytes held out{seen}\n\nbefore:\n{sample(model, task)}\n")
        before = scores(model, task, windows)
        try:
            summary = train(args, model, method, task, windows, out / CHECKPOINT, processes)
        except (KeyboardInterrupt, SystemExit) as stop:
            print(f"\nstopped; a checkpoint is in {out}. The same command goes on from there.", file=sys.stderr)
            return 130 if isinstance(stop, KeyboardInterrupt) else stop.code
        except ConnectionError as error:
            raise ConnectionError(f"{error}. {parallel.stands(out / CHECKPOINT)}") from None
        except FloatingPointError as error:
            raise FloatingPointError(f"{error}. In {out} is the checkpoint of this run; --force starts another one there") from None
        after = scores(model, task, windows)
        print(f"\nafter:\n{sample(model, task)}\n")
        report(model, args.method, before, after, processes)
        with parallel.whole(model):
            if processes.first:
                write_results(out, model, summary | {"before": before, "after": after}, task.floor and task.floor(windows))
                print(f"\nin {out}: {', '.join(sorted(file.name for file in out.iterdir() if not file.name.startswith('.')))}")
    return 0


def train(args: argparse.Namespace, model: ml.TinyGPT, method: ml.Method, task: data.Task, windows: torch.Tensor, checkpoint: Path,
          processes: OneProcess) -> dict:
    """Fine-tune the model. Returns the settings and the history."""
    lr = args.lr or RATES[args.method]
    history = ml.finetune(
        model, method, task.batches(16, model.config.context, args.seed), args.steps, lr, args.seed, checkpoint, targets=args.targets,
        accumulate=args.accumulate, clip=args.clip, warmup=min(20, args.steps // 10), schedule="linear",
        evaluate=lambda model: ml.held_out_loss(model, windows), processes=processes)
    at_the_end = history["evaluated"][-1][1]
    if not math.isfinite(at_the_end):
        raise FloatingPointError(f"after the last step the held-out loss is {at_the_end}: a lower learning rate than {lr:g} may help")
    return {"task": task.name, "method": args.method, "hyperparameters": dataclasses.asdict(method), "targets": args.targets, "steps": args.steps,
            "lr": lr, "seed": args.seed, "accumulate": args.accumulate, "clip": args.clip, "trainable_parameters": ml.trainable_parameters(model)} | history


def write_results(out: Path, model: ml.TinyGPT, summary: dict, floor: float | None) -> None:
    """The adapter (or the model, fully fine-tuned), the picture, and last the history, which marks the run as finished."""
    if any(True for _ in ml.adapters(model)):
        ml.save_adapter(model, out)
    else:
        storage.save_model(model, out / MODEL)
    title = f"{plots.printable(summary['task'])}: {summary['method']}, {summary['trainable_parameters']:,} trainable parameters"
    picture = io.BytesIO()
    plots.loss_curve(summary, title, floor).savefig(picture, dpi=150)
    storage.write_atomically(out / PICTURE, picture.getvalue())
    storage.write_atomically(out / HISTORY, (json.dumps(summary, indent=1) + "\n").encode())
    (out / CHECKPOINT).unlink(missing_ok=True)


def claim(out: Path, force: bool) -> None:
    """Refuse a folder that holds a finished run, or other things and no run to go on with; with `force`, clear what a run writes there."""
    leftovers = {lock_of(out).name, lock_of(out / CHECKPOINT).name, *(f".{name}.tmp" for name in WRITTEN)}      # of this run, and of one that was killed
    there = {file.name for file in out.iterdir()} - leftovers
    if not force and HISTORY in there:
        raise ValueError(f"{out} holds a finished run; take another --out, or --force to replace it")
    if not force and there and CHECKPOINT not in there:
        raise ValueError(f"{out} is not empty and holds no run to go on with; take another --out, or --force to write there")
    for name in (*WRITTEN, *leftovers) if force else ():
        if name != lock_of(out).name:
            (out / name).unlink(missing_ok=True)


def scores(model: ml.TinyGPT, task: data.Task, windows: torch.Tensor) -> dict[str, float]:
    """Bits per byte on the task's held-out part and on the tiny world's, and the share of its questions answered exactly."""
    home = data.world().held_out(model.config.context + 1)
    found = {"bits_per_byte": ml.held_out_loss(model, windows) / math.log(2),
             "world_bits_per_byte": ml.held_out_loss(model, home) / math.log(2)}
    if task.questions:
        found["exact_match"] = ml.exact_match(model, task.questions)
    return found


def sample(model: ml.TinyGPT, task: data.Task) -> str:
    lines = model.generate(task.prompt, 160, temperature=0.7, seed=0).strip("\n").splitlines()
    return "\n".join(f"    {line}" for line in lines)


def report(model: ml.TinyGPT, method: str, before: dict, after: dict, processes: OneProcess) -> None:
    in_four_bits = sum(layer.in_features * layer.out_features for layer in model.modules() if isinstance(layer, ml.NF4Linear))
    everything = in_four_bits + sum(parameter.numel() for parameter in model.parameters())
    print(f"{method}: {ml.trainable_parameters(model):,} of {everything:,} parameters trained")
    if processes.count > 1:
        print(f"all-reduced: {processes.bytes:,} bytes a step by each of {processes.count} processes; full fine-tuning {4 * everything:,}")
    print(f"held out:  {before['bits_per_byte']:.3f} -> {after['bits_per_byte']:.3f} bits per byte")
    if "exact_match" in after:
        print(f"answered:  {before['exact_match']:.1%} -> {after['exact_match']:.1%} of unseen questions, byte for byte")
    world, now = before["world_bits_per_byte"], after["world_bits_per_byte"]
    print(f"forgotten: {now - world:+.3f} bits per byte on the tiny world ({world:.3f} -> {now:.3f})")
