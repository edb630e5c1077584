"""Lesson 03, worked. The same names and signatures as in exercises.py."""

import math

from torch import Tensor, nn

from minilora import LoRA, LoRAPlus, adapters


def three_terms(x: Tensor, A: Tensor, B: Tensor, dA: Tensor, dB: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """(B + δB)(A + δA) - B A, multiplied out. @ groups from the left, so x meets the thin A first."""
    z, dz = x @ A.T, x @ dA.T                                          # (..., in) -> (..., rank)
    return scale * (z @ dB.T), scale * (dz @ B.T), scale * (dz @ dB.T)


def growth_exponent(widths: list[int], sizes: list[float]) -> float:
    """log size = log c + p · log width is a line: covariance over variance is its slope. (Only one side needs its mean taken off.)"""
    across = [math.log(width) for width in widths]
    middle = sum(across) / len(across)
    return sum((u - middle) * math.log(size) for u, size in zip(across, sizes)) / sum((u - middle) ** 2 for u in across)


def widest_useful_rate(from_B: float, from_A: float, limit: float) -> float:
    """The positive root of from_A · η² + from_B · η - limit, written so that nothing cancels and from_A = 0 is no special case."""
    if from_B == 0 and from_A == 0:
        return math.inf
    return 2 * limit / (from_B + math.sqrt(from_B**2 + 4 * from_A * limit))


def balanced_rates(from_B: float, from_A: float, limit: float) -> tuple[float, float]:
    """The first equation gives lr_B. The two left sides are equal, so from_B = from_A · lr_A: the limit has no part in A's rate."""
    return from_B / from_A, limit / (2 * from_B)


def lora_plus_groups(model: nn.Module, lr: float, ratio: float, weight_decay: float = 0.0) -> list[dict]:
    """A set of the B's, found as objects; parameters() gives each tensor once, also one that layers share."""
    fast = {layer.B for _, layer in adapters(model)}
    trainable = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trainable if p in fast], "lr": ratio * lr, "weight_decay": weight_decay},
        {"params": [p for p in trainable if p not in fast and p.dim() >= 2], "lr": lr, "weight_decay": weight_decay},
        {"params": [p for p in trainable if p not in fast and p.dim() < 2], "lr": lr, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def ratio_as_alpha(plus: LoRAPlus, optimizer: str) -> LoRA:
    """With alpha · k the same dW has B / k, and B's gradient is k times as long.

    Adam does not see that: B / k must move k times less than B, so B at rate lr is B of old at k · lr. SGD sees it: lr · k² of old.
    """
    if optimizer == "adam":
        factor = plus.ratio
    elif optimizer == "sgd":
        factor = math.sqrt(plus.ratio)
    else:
        raise ValueError(f"optimizer must be 'adam' or 'sgd', got {optimizer!r}")
    return LoRA(rank=plus.rank, alpha=plus.alpha * factor, dropout=plus.dropout, rslora=plus.rslora)


def decay_where(model: nn.Module, lr: float, ratio: float, weight_decay: float) -> list[dict]:
    """Rate times decay is what shrinks: B's rate is ratio times as high, so its decay is ratio times as low."""
    fast = {layer.B for _, layer in adapters(model)}
    trainable = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trainable if p in fast], "lr": ratio * lr, "weight_decay": weight_decay / ratio},
        {"params": [p for p in trainable if p not in fast], "lr": lr, "weight_decay": weight_decay},
    ]
    return [group for group in groups if group["params"]]
