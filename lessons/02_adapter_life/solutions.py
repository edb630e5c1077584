"""Lesson 02, worked. The same names and signatures as in exercises.py."""

import copy
import json
import math
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn


def adapter_bytes(content: bytes) -> dict[str, int]:
    """The tensors' names and places are in clear text: no library is needed to see what a file holds."""
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8:8 + size])
    parts = {"length": 8, "header": size}
    for name, about in header.items():
        if name != "__metadata__":
            begin, end = about["data_offsets"]
            parts[name] = end - begin
    return parts


def concatenate(pairs: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Block by block: [B₁, B₂] [A₁; A₂] = B₁A₁ + B₂A₂. No B meets another's A."""
    return torch.cat([A for A, _ in pairs]), torch.cat([B for _, B in pairs], dim=1)


def cross_terms(pairs: list[tuple[Tensor, Tensor]]) -> Tensor:
    """The product of the sums, less the sum of the products."""
    return sum(B for _, B in pairs) @ sum(A for A, _ in pairs) - sum(B @ A for A, B in pairs)


@torch.no_grad()
def merge_in_float32(W: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """Widen first, add, round last: a product that was rounded to 16 bits before it is added is rounded twice."""
    wide = torch.float64 if W.dtype == torch.float64 else torch.float32
    return (W.to(wide) + scale * B.to(wide) @ A.to(wide)).to(W.dtype)


@torch.no_grad()
def survivors(W: Tensor, dW: Tensor, dtype: torch.dtype) -> float:
    """Compare what is stored before with what is stored after, number by number."""
    base = W.to(dtype)
    merged = (base.double() + dW.double()).to(dtype)
    return (merged != base)[dW != 0].double().mean().item()


def what_resume_needs(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> dict:
    """Copies of all: every step changes the parameters where they lie, and a state_dict() holds the living tensors, not pictures of them."""
    return {
        "trained": {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad},
        "optimizer": copy.deepcopy(optimizer.state_dict()),
        "random": torch.get_rng_state(),                             # a copy already
        "step": step,
    }


def scaled_mixture(folders: list[Path], weights: list[float], into: Path) -> None:
    """Concatenation, with weight and scale folded into B once, so that the new scale is 1."""
    loaded, factors, rank = [], [], 0
    for folder, weight in zip(folders, weights):
        config = json.loads((folder / "adapter_config.json").read_text())
        scale = config["lora_alpha"] / (math.sqrt(config["r"]) if config.get("use_rslora") else config["r"])
        loaded.append(load_file(folder / "adapter_model.safetensors"))
        factors.append(weight * scale)
        rank += config["r"]
    mixed = {}
    for name in loaded[0]:
        if name.endswith("lora_A.weight"):
            mixed[name] = torch.cat([tensors[name] for tensors in loaded])
        else:
            mixed[name] = torch.cat([factor * tensors[name] for factor, tensors in zip(factors, loaded)], dim=1)
    into.mkdir(parents=True, exist_ok=True)
    save_file(mixed, into / "adapter_model.safetensors")
    config |= {"r": rank, "lora_alpha": rank, "use_rslora": False}
    (into / "adapter_config.json").write_text(json.dumps(config))
