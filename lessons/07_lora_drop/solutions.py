"""Lesson 07, worked. The same names and signatures as in exercises.py."""

from collections.abc import Callable

from torch import Tensor, nn


def output_importance(x: Tensor, A: Tensor, B: Tensor, scale: float) -> float:
    """The branch of lesson 01, squared and summed."""
    return (scale * (x @ A.T @ B.T)).square().sum().item()


def importance_shares(g: dict[str, float]) -> dict[str, float]:
    """0 / 0 is no importance: it has to be refused before it becomes a nan that sorts anywhere."""
    total = sum(g.values())
    if total == 0:
        raise ValueError("every update is still 0, so no layer can be compared with another: a warm-up of a few steps comes first")
    return {name: value / total for name, value in g.items()}


def share_until(shares: list[float], threshold: float) -> list[int]:
    """sorted() is stable, so equal shares stay in the order of the layers."""
    if threshold == 1:
        return list(range(len(shares)))
    kept, reached = [], 0.0
    for i in sorted(range(len(shares)), key=lambda i: -shares[i]):
        if reached >= threshold:
            break
        kept.append(i)
        reached += shares[i]
    return sorted(kept)


def share_pair(layers: list[nn.Module], kept: list[int]) -> None:
    """In place: assigning a Parameter to an attribute registers that very object: one tensor, many names."""
    rest = [layer for i, layer in enumerate(layers) if i not in kept]
    for layer in rest:
        layer.A, layer.B = rest[0].A, rest[0].B


def shared_gradient(Gs: list[Tensor], A: Tensor, B: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """A small step of the pair moves every W that it is added to, and the loss by the sum of all of that."""
    G = sum(Gs)                                    # (out, in)
    return scale * B.T @ G, scale * G @ A.T


def drop_count(kinds: list[tuple[int, int, int, int]], rank: int) -> int:
    """kept pairs and one for the rest: kept + 1, or all of them."""
    return sum(rank * (out + into) * min(kept + 1, layers) for out, into, layers, kept in kinds)


def price_of_taking_out(model: nn.Module, names: list[str], evaluate: Callable[[nn.Module], float]) -> dict[str, float]:
    """In place, and try … finally: whatever happens to the measurement, the patient wakes up whole."""
    before, prices = evaluate(model), {}
    for name in names:
        parent, _, last = name.rpartition(".")
        adapter = model.get_submodule(name)
        setattr(model.get_submodule(parent), last, adapter.base)
        try:
            prices[name] = evaluate(model) - before
        finally:
            setattr(model.get_submodule(parent), last, adapter)
    return prices
