"""How often does W hold dW already, and what of it arrived?

    t = ⟨W, dW⟩ / ‖dW‖²        of W = W₀ + k · dW it is k + ⟨W₀, dW⟩ / ‖dW‖²

With the original W₀ at hand, ask it of W − W₀: then t is k, but for what rounding lost. Without it, what W₀ adds must be small, in one layer
as in another. Measured on the tiny GPT after LoRA, LoRA+, LoRA-FA, VeRA and PiSSA: of 24 layers at most 21 % had t within 0.25 of 1 by chance
before a merge, whatever the rate; after one, 88 % and more where dW is long enough to be seen, and fewer where it is not. So: three
layers in four, of eight at least; and where they do not agree, nothing is said. (DoRA shortens rows, so its dW looks along W; it is not judged so.)
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

NEAR, AGREE, ENOUGH = 0.25, 0.75, 8


@dataclass(frozen=True)
class Held:
    """times: how often W holds dW; agree: the share of layers that say so; layers: how many were looked at."""

    times: int
    agree: float
    layers: int


def projection(W: Tensor, A: Tensor, B: Tensor) -> float | None:
    """⟨W, B A⟩ / ‖B A‖², without forming B A; None where it is zero. W: (out, in), A: (rank, in), B: (out, rank)."""
    length = ((B.T @ B) * (A @ A.T)).sum()
    return ((B.T @ W.to(B)) * A).sum().div(length).item() if length > 0 else None


def held(found: Iterable[float | None], enough: int = ENOUGH) -> Held | None:
    """From each layer's t; None where too few layers agree on a number. enough: of layers; 1, where t was asked of W − W₀."""
    t = torch.tensor([value for value in found if value is not None], dtype=torch.float64)
    if len(t) < enough:
        return None
    times = round(t.median().item())
    agree = ((t - times).abs() < NEAR).double().mean().item()
    return Held(times, agree, len(t)) if agree >= AGREE else None


def unmoved(before: Tensor, after: Tensor) -> tuple[int, int]:
    """(how many weights are stored as the same number as before, of how many)."""
    return int((before.to(after.dtype) == after).sum()), after.numel()
