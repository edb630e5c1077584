"""A whole model as a transformers folder: config.json, safetensors, tokenizer. Written beside its place, then renamed: never half of it."""

import os
import shutil
from pathlib import Path

import torch
from torch import nn

from minilora.adapter import adapters, put
from minilora.quant.linear import NF4Linear
from minilora.safety.conv1d import dense_conv1d, stands_for_conv1d
from minilora.scale.loading import CONFIG, first_line, quiet

ENDINGS = (".safetensors", ".json", ".txt", ".model", ".jinja")     # of what a model's folder holds


def save_folder(model: nn.Module, tokenizer, folder: str | Path) -> Path:
    """Write what from_pretrained reads, here and in transformers; what was in `folder` is gone. Layers in four bits are written densely, as they compute.

    Raises ValueError, nothing written, on an adapted model (merge() it first), and where `folder` holds something else than a model.
    """
    folder = Path(folder)
    if any(True for _ in adapters(model)):
        raise ValueError("this model has adapters: save_adapter() writes those, merge() folds them in")
    refuse_other_things(folder)
    beside, before = (folder.with_name(f".{folder.name}.{state}") for state in ("tmp", "old"))
    shutil.rmtree(beside, ignore_errors=True)                        # of a call that was killed
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        densify(model)
        try:
            with quiet():
                model.save_pretrained(beside)
                tokenizer.save_pretrained(beside)
        except Exception as error:                                   # a full disk; safetensors and tokenizers have errors of their own for it
            raise OSError(f"{folder}: cannot be written ({first_line(error)})") from None
        for file in beside.iterdir():
            with open(file, "rb") as opened:
                os.fsync(opened.fileno())
        if folder.exists():
            shutil.rmtree(before, ignore_errors=True)
            os.replace(folder, before)
        os.replace(beside, folder)
        shutil.rmtree(before, ignore_errors=True)
    except BaseException:
        if before.exists() and not folder.exists():
            os.replace(before, folder)
        raise
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return folder


def refuse_other_things(folder: Path) -> None:
    """What is to be replaced must be a model's folder, and nothing else may be lost with it."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file; a real model is written as a folder")
    there = {file.name: file for file in folder.iterdir()} if folder.exists() else {}
    others = sorted(name for name, file in there.items() if file.is_dir() or not name.endswith(ENDINGS))
    if others or there and CONFIG not in there:
        raise ValueError(f"{folder} holds other things than a model ({(others or sorted(there))[0]}), and they would be lost; take another folder")


@torch.no_grad()
def densify(model: nn.Module) -> nn.Module:
    """Each layer in four bits becomes a dense one with the weight that it computes with, in place. Returns the model."""
    for name, layer in list(model.named_modules()):
        if isinstance(layer, NF4Linear):
            W, bias = layer.dequantize(), layer.bias
            if stands_for_conv1d(layer):
                dense = dense_conv1d(W, bias)
            else:
                with torch.device("meta"):                           # a random start would be overwritten
                    dense = nn.Linear(layer.in_features, layer.out_features, bias=False)
                dense.weight, dense.bias = nn.Parameter(W), bias
            put(model, name, dense.requires_grad_(False).train(layer.training))
    return model
