"""Which model a command works on: a base that reads bytes, with an adapter or without, on the fastest device there is."""

import argparse
from pathlib import Path

import torch

import minilora as ml

MODEL = "model.safetensors"                              # in a run's folder: the whole model that full fine-tuning left


def load(args: argparse.Namespace) -> ml.TinyGPT:
    """The base, with the adapter if one is named; or the whole model that full fine-tuning left in that folder."""
    if args.adapter and (args.adapter / MODEL).exists():
        return byte_base(args.adapter / MODEL)
    model = byte_base(args.base)
    return ml.load_adapter(model, args.adapter) if args.adapter else model


def byte_base(path: Path | None) -> ml.TinyGPT:
    model = ml.load_base(path)
    if model.config.vocab_size != 256:
        raise ValueError(f"{path}: a base of {model.config.vocab_size} symbols, and texts are read here as bytes, of which there are 256")
    return model


def on_best_device(model: ml.TinyGPT) -> ml.TinyGPT:
    best = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    return model.to(best)


def base_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--base", type=Path, metavar="FILE", help="another base than the shipped one")
