"""What the capstone shows and keeps: its command line, its printed lines, its folder. All or nothing: a run that is stopped leaves no file."""

import argparse
import contextlib
import importlib.util
import io
import json
import math
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import fmean

import torch
from torch import Tensor, nn

import minilora as ml
from lessons import LESSONS, say
from lessons.capstone.answers import REPORT, RUNS, NotReady, blamed, own_answers
from lessons.capstone.card import card, written
from minilora.commands.folders import room
from minilora.safety.runs import stoppable, uninterrupted
from minilora.storage import CONFIG, WEIGHTS, base_fingerprint, save_model

PICTURE, MERGED = "capstone.png", "model.safetensors"
NEW = ".new"                                       # the folder in --out that holds everything until the end
CLOSE = 1e-5                                       # of the largest logit; float32 has steps of 1.2e-7


def perform(finetune: Callable, words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Your answers to the lessons, put together, fine-tune the tiny GPT on a text of yours.")
    parser.add_argument("text", nargs="?", type=Path, default=Path(ml.__file__).with_name("gpt.py"), help="any UTF-8 file (default: the tiny GPT's own source)")
    parser.add_argument("--out", type=Path, default=RUNS / "capstone", metavar="DIR", help="where the adapter goes (default: runs/capstone)")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--answers", choices=["exercises", "solutions"], default="exercises", help="yours, or the worked ones")
    args = parser.parse_args(words)
    script = Path(finetune.__code__.co_filename).resolve()
    if not script.is_relative_to(LESSONS):                         # of two copies Python takes the installed one
        sys.exit(f"{script} would run on the answers in {LESSONS}, another copy. Set PYTHONPATH to this one: {script.parents[2]}")
    if args.steps < 1:
        parser.error("--steps: at least 1")
    if args.out.is_relative_to(Path.cwd()):
        args.out = args.out.relative_to(Path.cwd())                # shorter, and it can be shown to others
    try:
        with stoppable(), room(args.out):
            if {file.name for file in args.out.iterdir() if file.name[0] != "."} and not (args.out / REPORT).exists():
                raise ValueError(f"{args.out} holds other things; take another --out")
            shutil.rmtree(args.out / NEW, ignore_errors=True)          # of a run that was killed
            task = ml.data.text(args.text)
            my = own_answers(args.answers)
            if (args.out / REPORT).exists():
                say(f"replaces the run in {args.out}, once this one is through\n")
            show = Show(args, task)
            try:
                show.folder.mkdir()
                torch.manual_seed(0)
                with blamed(args.answers):
                    finetune(my, task, args.steps, show)
                sys.stdout.flush()
            finally:
                shutil.rmtree(show.folder, ignore_errors=True)
    except KeyboardInterrupt:
        say("\nstopped; nothing was written")
        sys.exit(130)
    except BrokenPipeError:                                        # `| head` has seen enough: no word of it, here or when Python ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + 13)                                         # what a shell reports of a program whose reader has gone
    except (NotReady, ValueError, OSError) as reason:
        sys.exit(str(reason))


class Show:
    """Prints what the script tells it, and keeps the numbers for the report."""

    def __init__(self, args: argparse.Namespace, task: ml.data.Task):
        self.args, self.task, self.folder = args, task, args.out / NEW
        self.report = {"answers": args.answers, "text": task.name, "steps": args.steps, "losses": []}

    def before(self, model: nn.Module, parameters: int, training: int, bits: float) -> None:
        say(f"{self.task.name}: {len(self.task.held_out(128)) * 128:,} bytes at its end are held out\n")
        say(f"the base       {parameters:>9,} numbers; to train them all, training keeps {training:,} bytes from step to step")
        self.report |= {"bits_before": bits, "sample_before": self.sample(model)}

    def adapter(self, layers: int, parameters: int, training: int, parts: dict[str, int]) -> None:
        self.size = sum(parts.values())
        say(f"your A and B   {parameters:>9,} numbers beside {layers} frozen W; to train these, {training:,} bytes")
        say(f"their file     {self.size:>9,} bytes, foretold: {parts['length']} + {parts['header']:,} of header + {self.size - parts['length'] - parts['header']:,} of numbers")
        self.quote("before", self.report["bits_before"], self.report["sample_before"])

    def step(self, step: int, nats: float) -> None:
        """Ten lines in all, each the mean since the line before."""
        losses = self.report["losses"]
        losses.append(nats)
        tenth = max(1, self.args.steps // 10)
        if (step + 1) % tenth == 0:
            mean = [fmean(part) / math.log(2) for part in (losses[:tenth], losses[-tenth:])]
            say(f"steps {step + 2 - tenth:>4} to {step + 1:>4}   {mean[1]:.2f} bits   {'█' * round(24 * mean[1] / mean[0])}")

    def after(self, model: nn.Module, bits: float) -> None:
        self.report |= {"bits_after": bits, "sample_after": self.sample(model)}
        self.quote("after", bits, self.report["sample_after"])

    @torch.no_grad()
    def ways(self, ids: Tensor, models: dict[str, nn.Module], file: bytes, config: dict) -> None:
        """Write the file, load it too, and compare the logits of all with those of the first."""
        (self.folder / WEIGHTS).write_bytes(file)
        (self.folder / CONFIG).write_text(json.dumps({"peft_type": "LORA", "bias": "none", "inference_mode": True} | config, indent=1) + "\n")
        models = models | {"ml.load_adapter": ml.load_adapter(ml.load_base(), self.folder)} | peft_reads(self.folder)
        first, *others = ((name, model.eval()(ids)) for name, model in models.items())
        apart = self.report["apart"] = {name: (logits - first[1]).abs().max().item() for name, logits in others}
        largest = first[1].abs().max().item()
        say(f"one function, {len(models)} ways: how far the logits (up to {largest:.1f}) are from those of the first, at most")
        say(f"    {first[0]:<16} {'your layers, as they were trained':<48} the first")
        for name, how in HOW.items():
            if name in apart:
                say(f"    {name:<16} {how:<48} {f'{apart[name]:.0e}' if apart[name] else 'equal, bit for bit'}")
        if "PEFT" not in apart:
            say(f"    PEFT             is not installed here; PeftModel.from_pretrained(ml.load_base(), {str(self.args.out)!r}) reads the folder")
        if off := [name for name in apart if not apart[name] <= CLOSE * largest]:
            raise NotReady(f"These are not the same function: {', '.join(off)}. Nothing was written.")

    def the_end(self, taken_out: nn.Module, merged: nn.Module) -> None:
        base = base_fingerprint(ml.load_base())
        if base_fingerprint(taken_out) != base:
            raise NotReady("W has changed. LoRA never does that: look where your answers write to a weight. Nothing was written.")
        size = (self.folder / WEIGHTS).stat().st_size
        if size != self.size:
            raise NotReady(f"The file has {size:,} bytes, and adapter_bytes foretold {self.size:,}. Nothing was written.")
        say(f"\nW is as it was, bit for bit (SHA-256 {base[:12]}…); the file has {size:,} bytes, as foretold")
        self.report |= {"bytes": size, "base": base}
        save_model(merged, self.folder / MERGED)
        card(self.report).savefig(self.folder / PICTURE, dpi=150)
        (self.folder / REPORT).write_text(json.dumps(self.report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        with uninterrupted():
            for name in (WEIGHTS, CONFIG, MERGED, PICTURE, REPORT):
                os.replace(self.folder / name, self.args.out / name)
        say(f"in {self.args.out}: {WEIGHTS}, {CONFIG}, {MERGED}, {PICTURE}, {REPORT}\n\nIt all holds together.")

    def sample(self, model: nn.Module) -> str:
        return model.generate("", 200, temperature=0.7, seed=0)

    def quote(self, when: str, bits: float, text: str) -> None:
        say("\n".join(["", f"{when}: {bits:.2f} bits for each byte held out; it writes", *(f"    | {line.rstrip()}" for line in written(text)), ""]))


HOW = {"lora_branch": "the base, and beside it what the file says", "merge_lora": "one matrix for W and its update",
       "ml.load_adapter": "the file, read by the package", "PEFT": "the file, read by PEFT"}


def peft_reads(folder: Path) -> dict[str, nn.Module]:
    """PEFT's model of the folder, where PEFT is installed."""
    if importlib.util.find_spec("peft") is None:
        return {}
    with contextlib.redirect_stderr(io.StringIO()):    # of libraries that it looks for and does not find
        from peft import PeftModel
    return {"PEFT": PeftModel.from_pretrained(ml.load_base(), folder)}
