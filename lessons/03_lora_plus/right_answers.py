"""Unusual answers to lesson 03 that are right all the same. The tests must take each one."""

import math
import statistics
from dataclasses import asdict

import torch
from torch import Tensor, nn

from minilora import LoRA, LoRAPlus, adapters


def three_terms__einsum(x: Tensor, A: Tensor, B: Tensor, dA: Tensor, dB: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    inner = {"old": torch.einsum("...i,ri->...r", x, A), "new": torch.einsum("...i,ri->...r", x, dA)}
    return tuple(torch.einsum("...r,or->...o", inner[which] * scale, out) for which, out in (("old", dB), ("new", B), ("new", dB)))


def three_terms__by_differences(x: Tensor, A: Tensor, B: Tensor, dA: Tensor, dB: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    def branch(A: Tensor, B: Tensor) -> Tensor:
        return torch.nn.functional.linear(torch.nn.functional.linear(x, A), scale * B)

    first, second = branch(A, B + dB) - branch(A, B), branch(A + dA, B) - branch(A, B)
    return first, second, branch(A + dA, B + dB) - branch(A, B) - first - second


def growth_exponent__regression(widths: list[int], sizes: list[float]) -> float:
    return statistics.linear_regression([math.log2(width) for width in widths], [math.log2(size) for size in sizes]).slope


def growth_exponent__normal_equations(widths: list[int], sizes: list[float]) -> float:
    line = torch.tensor([[math.log(width), 1.0] for width in widths], dtype=torch.float64)
    up = torch.tensor([math.log(size) for size in sizes], dtype=torch.float64)
    return torch.linalg.solve(line.T @ line, line.T @ up)[0].item()


def widest_useful_rate__halving(from_B: float, from_A: float, limit: float) -> float:
    """No formula: the left side grows with η, so halve the interval."""
    if from_B == from_A == 0:
        return math.inf
    low, high = 0.0, 1.0
    while from_B * high + from_A * high**2 <= limit:
        high *= 2
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if from_B * middle + from_A * middle**2 <= limit else (low, middle)
    return low


def widest_useful_rate__hypot(from_B: float, from_A: float, limit: float) -> float:
    root = math.hypot(from_B, 2 * math.sqrt(from_A * limit))
    return limit / ((from_B + root) / 2) if root else math.inf


def balanced_rates__B_first(from_B: float, from_A: float, limit: float) -> tuple[float, float]:
    lr_B = limit / from_B / 2
    return limit / (2 * from_A * lr_B), lr_B


def lora_plus_groups__a_group_for_each(model: nn.Module, lr: float, ratio: float, weight_decay: float = 0.0) -> list[dict]:
    """One group a parameter: many, and right."""
    fast = {id(layer.B) for _, layer in adapters(model)}
    return [{"params": [p], "lr": lr * ratio if id(p) in fast else lr, "weight_decay": 0.0 if p.dim() < 2 else weight_decay}
            for p in model.parameters() if p.requires_grad]


def ratio_as_alpha__from_the_fields(plus: LoRAPlus, optimizer: str) -> LoRA:
    power = {"adam": 1.0, "sgd": 0.5}
    if optimizer not in power:
        raise ValueError(f"no exponent is known for {optimizer!r}")
    fields = asdict(plus)
    return LoRA(**fields | {"alpha": fields["alpha"] * fields.pop("ratio") ** power[optimizer]})


def decay_where__a_group_for_each(model: nn.Module, lr: float, ratio: float, weight_decay: float) -> list[dict]:
    fast = {id(layer.B) for _, layer in adapters(model)}
    factor = {True: ratio, False: 1.0}
    return [{"params": [p], "lr": lr * factor[id(p) in fast], "weight_decay": weight_decay / factor[id(p) in fast]} for p in model.parameters() if p.requires_grad]
