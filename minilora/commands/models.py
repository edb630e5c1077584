"""Which model a command works on, on the fastest device there is: a base that reads bytes, or a real one that reads its own tokens."""

import argparse
from pathlib import Path

import torch
from torch import nn

import minilora as ml
from minilora import storage
from minilora.commands.arguments import not_empty

MODEL = "model.safetensors"                              # in a run's folder: the whole model that full fine-tuning left; of a real one a folder
REAL = "model"


def base_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--base", type=Path, metavar="FILE", help="another base than the shipped one")


def base_or_model(parser: argparse.ArgumentParser) -> None:
    either = parser.add_mutually_exclusive_group()
    base_argument(either)
    either.add_argument("--model", type=not_empty, metavar="FOLDER|NAME", help="a transformers model instead: its folder, or its name on the hub")


def load(args: argparse.Namespace):
    """What speaks: the model, with the adapter if one is named; or the whole model that full fine-tuning left in that folder."""
    if args.model:
        return real_model(args)
    if args.adapter and (args.adapter / MODEL).exists():
        return on_best_device(byte_base(args.adapter / MODEL))
    if args.adapter and (args.adapter / REAL).is_dir():
        raise ValueError(f"{args.adapter} holds a real model, fully fine-tuned: `--model {args.adapter / REAL}`")
    model = byte_base(args.base)
    return on_best_device(ml.load_adapter(model, args.adapter) if args.adapter else model)


def real_model(args: argparse.Namespace, device: torch.device | str | None = None):
    """A Speaker: the model in four bits where its adapter was trained beside four bits, and its tokenizer."""
    from minilora.scale.loading import load_model, load_tokenizer
    from minilora.scale.text import Speaker

    source, adapter = args.model, args.adapter
    if adapter and (adapter / REAL).is_dir():
        source, adapter = adapter / REAL, None
    tokenizer = load_tokenizer(source)
    model = load_model(source, four_bits=bool(adapter) and storage.method_name(adapter) == "QLoRA", device=device or best_device())
    return Speaker(ml.load_adapter(model, adapter) if adapter else model, tokenizer)


def byte_base(path: Path | None) -> ml.TinyGPT:
    if path and path.is_dir():
        raise ValueError(f"{path} is a folder, and a TinyGPT is a file; a transformers model is named by --model")
    model = ml.load_base(path)
    if model.config.vocab_size != 256:
        raise ValueError(f"{path}: a base of {model.config.vocab_size} symbols, and texts are read here as bytes, of which there are 256")
    return model


def best_device() -> str:
    return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"


def on_best_device(model: nn.Module) -> nn.Module:
    return model.to(best_device())
