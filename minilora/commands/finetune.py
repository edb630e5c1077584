"""finetune: adapt the base to a text or a built-in task, and go on where an earlier call was stopped."""

import argparse
import copy
import dataclasses
import io
import json
import math
import sys
from pathlib import Path

import torch

import minilora as ml
from minilora import data, plots, storage
from minilora.commands.arguments import layer_names, method_name, positive, whole
from minilora.commands.folders import refuse_file, room
from minilora.commands.models import MODEL, base_argument, byte_base, on_best_device
from minilora.methods import METHODS, RATES, make_method

CHECKPOINT, HISTORY, PICTURE = "checkpoint.pt", "history.json", "loss.png"
WRITTEN = (CHECKPOINT, MODEL, HISTORY, PICTURE, storage.CONFIG, storage.WEIGHTS)


def add(commands) -> None:
    parser = commands.add_parser("finetune", help="adapt the base to a text or a built-in task")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--text", type=Path, metavar="FILE", help="any UTF-8 file; its last tenth is held out")
    source.add_argument("--task", choices=data.TASKS, help="a task with known answers")
    parser.add_argument("--method", type=method_name, default="lora", help=", ".join(METHODS))
    parser.add_argument("--rank", type=whole(1, 2**16), help="rank of the update (default: 8, VeRA 64); AdaLoRA's target, from half as much again")
    parser.add_argument("--alpha", type=positive, help="strength of the update (default: the method's)")
    parser.add_argument("--steps", type=whole(1), default=200)
    parser.add_argument("--lr", type=positive, help="peak learning rate (default: one that suits the method)")
    parser.add_argument("--seed", type=whole(0), default=0)
    parser.add_argument("--targets", type=layer_names, help="comma-separated names of layers (default: all linear layers of the blocks)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where the adapter goes (default: runs/NAME-METHOD)")
    parser.add_argument("--force", action="store_true", help="replace what an earlier run left in DIR")
    parser.set_defaults(run=run)
    base_argument(parser)


def run(args: argparse.Namespace) -> int:
    task = data.text(args.text) if args.text else data.TASKS[args.task]()
    method = make_method(args.method, args.rank, args.alpha, args.steps)
    targets = args.targets
    model = on_best_device(byte_base(args.base))
    ml.adapt(copy.deepcopy(model), method, targets)       # whatever the method or the targets refuse, it is refused here
    context, lr = model.config.context, args.lr or RATES[args.method]
    windows = task.held_out(context + 1)

    out = args.out or Path("runs") / f"{args.text.stem if args.text else args.task}-{args.method}"
    made = claim(out, args.force)
    try:
        seen = f", {data.overlap(task, args.text.read_bytes()):.0%} of them seen in training" if args.text else ""
        print(f"{task.name}: {windows.numel():,} bytes held out{seen}\n\nbefore:\n{sample(model, task)}\n")
        before = scores(model, task, windows)
        try:
            history = ml.finetune(
                model, method, task.batches(16, context, args.seed), args.steps, lr, args.seed, out / CHECKPOINT, targets=targets,
                warmup=min(20, args.steps // 10), schedule="linear", evaluate=lambda model: ml.held_out_loss(model, windows))
        except KeyboardInterrupt:
            print(f"\nstopped; a checkpoint is in {out}. The same command goes on from there.", file=sys.stderr)
            return 130
        after = scores(model, task, windows)
        print(f"\nafter:\n{sample(model, task)}\n")
        report(model, args.method, before, after)
        settings = {"task": task.name, "method": args.method, "hyperparameters": dataclasses.asdict(method), "targets": targets,
                    "steps": args.steps, "lr": lr, "seed": args.seed, "trainable_parameters": ml.trainable_parameters(model)}
        write_results(out, model, settings | {"before": before, "after": after} | history, task.floor and task.floor(windows))
        print(f"\nin {out}: {', '.join(sorted(file.name for file in out.iterdir()))}")
        return 0
    finally:
        for folder in made:                               # a folder that nothing was written to is not left behind
            if folder.exists() and not any(folder.iterdir()):
                folder.rmdir()


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


def claim(out: Path, force: bool) -> list[Path]:
    """Make sure that the folder is there, ours to write in, and no finished run's. Returns the folders that had to be made."""
    refuse_file(out)
    unfinished = {f".{name}.tmp" for name in WRITTEN}     # what a kill in the middle of writing leaves
    there = {file.name for file in out.iterdir()} - unfinished if out.exists() else set()
    if not force and HISTORY in there:
        raise ValueError(f"{out} holds a finished run; take another --out, or --force to replace it")
    if not force and there and CHECKPOINT not in there:
        raise ValueError(f"{out} is not empty and holds no run to go on with; take another --out, or --force to write there")
    made = room(out)
    if force:
        for name in {*WRITTEN, *unfinished}:
            (out / name).unlink(missing_ok=True)
    return made


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


def report(model: ml.TinyGPT, method: str, before: dict, after: dict) -> None:
    everything = sum(parameter.numel() for parameter in model.parameters())
    print(f"{method}: {ml.trainable_parameters(model):,} of {everything:,} parameters trained")
    print(f"held out:  {before['bits_per_byte']:.3f} -> {after['bits_per_byte']:.3f} bits per byte")
    if "exact_match" in after:
        print(f"answered:  {before['exact_match']:.1%} -> {after['exact_match']:.1%} of unseen questions, byte for byte")
    world, now = before["world_bits_per_byte"], after["world_bits_per_byte"]
    print(f"forgotten: {now - world:+.3f} bits per byte on the tiny world ({world:.3f} -> {now:.3f})")
