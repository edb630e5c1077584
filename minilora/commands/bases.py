"""The two kinds of base that finetune works on. Each reads the text in its own units, says how good a model is, and shows what it writes.

    ByteBase    the shipped base or one like it: bytes, and a tiny world to forget
    RealBase    a transformers model: the tokens of its own tokenizer
"""

import argparse
import copy
import math
from pathlib import Path

import torch

import minilora as ml
from minilora import data, storage
from minilora.commands.models import MODEL, REAL, best_device, byte_base, on_best_device
from minilora.methods import RATES
from minilora.safety.targets import find_targets
from minilora.training import OneProcess


class ByteBase:
    """rows: windows in a batch.     tokens_per_byte: training's nats are per token.     about: what goes on record beside the settings."""

    rows, tokens_per_byte = 16, 1.0

    def __init__(self, args: argparse.Namespace, processes: OneProcess):
        self.about: dict = {}
        content = processes.told(data.read, args.text) if args.text else b""             # once: a pipe has nothing to say twice
        self.task = data.split_text(content, data.printed(args.text)) if args.text else data.TASKS[args.task]()
        self.model = processes.placed(byte_base(args.base)) if processes.count > 1 else on_best_device(byte_base(args.base))
        self.context = context_of(args, self.model.config.context, self.model.config.context)
        self.windows = self.task.held_out(self.context + 1)
        seen = f", {data.overlap(content):.0%} of them seen in training" if args.text else ""
        self.name, self.opening = self.task.name, f"{self.task.name}: {self.windows.numel():,} bytes held out{seen}"

    def refuse(self, method: ml.Method, targets: list[str] | None) -> None:
        """Whatever adapt will refuse, before anything is written."""
        ml.adapt(copy.deepcopy(self.model), method, targets)

    def rate(self, method: str) -> float:
        return RATES[method]

    def batches(self, rows: int, seed: int) -> data.Batches:
        return self.task.batches(rows, self.context, seed)

    def nats_per_byte(self, model: ml.TinyGPT) -> float:
        return ml.held_out_loss(model, self.windows)

    def scores(self) -> dict[str, float]:
        """Bits per byte on the task's held-out part and on the tiny world's, and the share of its questions answered exactly."""
        home = data.world().held_out(self.model.config.context + 1)
        found = {"bits_per_byte": self.nats_per_byte(self.model) / math.log(2), "world_bits_per_byte": ml.held_out_loss(self.model, home) / math.log(2)}
        if self.task.questions:
            found["exact_match"] = ml.exact_match(self.model, self.task.questions)
        return found

    def floor(self) -> float | None:
        return self.task.floor and self.task.floor(self.windows)

    def sample(self) -> str:
        return self.model.generate(self.task.prompt, 160, temperature=0.7, seed=0)

    def save_whole(self, out: Path) -> None:
        storage.save_model(self.model, out / MODEL)


class RealBase:
    """The same of a transformers model. qlora's is put in four bits while it is read; loftq and qpissa choose their four bits by the dense W."""

    rows = 4                                                          # of 256 tokens each, and their logits are as wide as the vocabulary

    def __init__(self, args: argparse.Namespace, processes: OneProcess):
        from minilora.scale.loading import load_model, load_tokenizer
        from minilora.scale.text import Speaker, longest, token_text

        if args.task:
            raise ValueError(f"--task {args.task} is made for the shipped base, which reads bytes; with --model give --text FILE")
        content, tokenizer = processes.told(data.read, args.text), load_tokenizer(args.model)
        self.text = token_text(content, data.printed(args.text), tokenizer)
        wide = torch.float32 if args.method == "full" else None       # in 16 bits most of Adam's steps would be lost
        self.model = load_model(args.model, four_bits=args.method == "qlora", dtype=wide, device=best_device() if processes.count == 1 else "cpu")
        self.model = processes.placed(self.model) if processes.count > 1 else self.model
        self.speaker = Speaker(self.model, tokenizer)
        symbols, most = self.model.get_input_embeddings().num_embeddings, max(int(part.max()) for part in (self.text.train, self.text.rest))
        if most >= symbols:
            raise ValueError(f"{args.model}: its tokenizer gives the token {most}, and the model knows {symbols}: they do not belong together")
        self.context = context_of(args, min(256, longest(self.model)), longest(self.model))
        self.windows, self.at_once = self.text.held_out(self.context), min(8, args.rows or 8)      # fewer --rows need less memory here too
        self.text.batches(1, self.context)                            # a text that is too short is refused here
        self.name, self.tokens_per_byte = self.text.name, len(self.text.rest) / self.text.size
        self.opening = (f"{self.name}: {self.text.size:,} bytes held out, which are {len(self.text.rest):,} tokens, "
                        f"{data.overlap(content):.0%} of them seen in training")
        self.about = {"model": args.model, "context": self.context, "tokens_per_byte": self.tokens_per_byte}

    def refuse(self, method: ml.Method, targets: list[str] | None) -> None:
        """The same, as far as it can be told without a second model."""
        if method.trains_base:
            if targets:
                raise ValueError(f"{type(method).__name__} trains every weight of the model: it takes no targets")
        else:
            find_targets(self.model, targets, method.unfit)

    def rate(self, method: str) -> float:
        return RATES[method] / 50                                     # 2e-4 for LoRA, as QLoRA's paper has it for models of 7B; not measured here

    def batches(self, rows: int, seed: int):
        return self.text.batches(rows, self.context, seed)

    def nats_per_byte(self, model: torch.nn.Module) -> float:
        return self.text.nats_per_byte(model, self.windows, self.at_once)

    def scores(self) -> dict[str, float]:
        return {"bits_per_byte": self.nats_per_byte(self.model) / math.log(2)}

    def floor(self) -> None:
        return None

    def sample(self) -> str:
        return self.speaker.generate(self.text.prompt, 48, temperature=0.7, seed=0)

    def save_whole(self, out: Path) -> None:
        from minilora.scale.saving import save_folder

        save_folder(self.model, self.speaker.tokenizer, out / REAL)


def context_of(args: argparse.Namespace, usual: int, most: float) -> int:
    if args.context and args.context > most:
        raise ValueError(f"--context {args.context}: this model reads at most {most}")
    return args.context or usual
