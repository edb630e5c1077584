"""Right answers in another style, each of which the tests must accept."""

from collections.abc import Callable

import torch
from torch import Tensor, nn


def output_importance__einsum(x: Tensor, A: Tensor, B: Tensor, scale: float) -> float:
    z = torch.einsum("...i,ri->...r", x, A)
    return float(scale**2 * torch.einsum("...r,or->...o", z, B).pow(2).sum())


def output_importance__gram(x: Tensor, A: Tensor, B: Tensor, scale: float) -> float:
    z = (x @ A.T).reshape(-1, len(A))
    return scale**2 * torch.trace(z @ (B.T @ B) @ z.T).item()


def share_until__through_torch(shares: list[float], threshold: float) -> list[int]:
    largest, order = torch.tensor(shares, dtype=torch.float64).sort(descending=True, stable=True)
    count = len(shares) if threshold == 1 else int((largest.cumsum(0) < threshold).sum()) + 1
    return sorted(order[:count].tolist())


def share_pair__set_attributes(layers: list[nn.Module], kept: list[int]) -> None:
    first = None
    for i in range(len(layers)):
        if i in kept:
            continue
        first = layers[i] if first is None else first
        for name in ("A", "B"):
            setattr(layers[i], name, getattr(first, name))


def shared_gradient__stacked(Gs: list[Tensor], A: Tensor, B: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    stacked = torch.stack(Gs)
    return scale * torch.einsum("loi,or->ri", stacked, B), scale * torch.einsum("loi,ri->or", stacked, A)


def price_of_taking_out__silent_scale(model: nn.Module, names: list[str], evaluate: Callable[[nn.Module], float]) -> dict[str, float]:
    whole, prices = evaluate(model), dict.fromkeys(names, 0.0)
    for name in reversed(names):
        *path, last = name.split(".")
        parent = model
        for part in path:
            parent = getattr(parent, part)
        adapter = parent._modules[last]
        try:
            parent._modules[last] = adapter.base
            prices[name] = -(whole - evaluate(model))
        finally:
            parent._modules[last] = adapter
    return prices
