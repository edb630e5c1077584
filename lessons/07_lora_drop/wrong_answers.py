"""Plausible mistakes in lesson 07, each of which the tests must reject with the message named here."""

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from lessons import provokes


@provokes("this is a norm")
def output_importance__norm(x: Tensor, A: Tensor, B: Tensor, scale: float) -> float:
    return (scale * (x @ A.T @ B.T)).norm().item()


@provokes("never looks at x")
def output_importance__of_the_weight(x: Tensor, A: Tensor, B: Tensor, scale: float) -> float:
    return (scale * B @ A).square().sum().item()


@provokes("the scale is not squared")
def output_importance__scale_outside(x: Tensor, A: Tensor, B: Tensor, scale: float) -> float:
    return scale * (x @ A.T @ B.T).square().sum().item()


@provokes("dW was formed")
def output_importance__forms_dw(x: Tensor, A: Tensor, B: Tensor, scale: float) -> float:
    return (x @ (scale * B @ A).T).square().sum().item()


@provokes("the sum over all rows is wanted")
def output_importance__mean_over_rows(x: Tensor, A: Tensor, B: Tensor, scale: float) -> float:
    return (scale * (x @ A.T @ B.T)).square().sum(-1).mean().item()


@provokes("not by the largest")
def importance_shares__of_the_largest(g: dict[str, float]) -> dict[str, float]:
    if not any(g.values()):
        raise ValueError("no warm-up")
    return {name: value / max(g.values()) for name, value in g.items()}


@provokes("0 / 0")
def importance_shares__not_refused(g: dict[str, float]) -> dict[str, float]:
    return {name: value / sum(g.values()) for name, value in g.items()}


@provokes("no eps in the sum")
def importance_shares__with_eps(g: dict[str, float]) -> dict[str, float]:
    if not any(g.values()):
        raise ValueError("no warm-up")
    return {name: value / (sum(g.values()) + 1e-12) for name, value in g.items()}


@provokes("in the order given")
def importance_shares__sorted(g: dict[str, float]) -> dict[str, float]:
    if not any(g.values()):
        raise ValueError("no warm-up")
    return {name: g[name] / sum(g.values()) for name in sorted(g, key=g.get, reverse=True)}


@provokes("reach 0.75 exactly")
def share_until__one_too_many(shares: list[float], threshold: float) -> list[int]:
    kept, reached = [], 0.0
    for i in sorted(range(len(shares)), key=lambda i: -shares[i]):
        if reached > threshold:
            break
        kept.append(i)
        reached += shares[i]
    return sorted(kept)


@provokes("at least one layer is needed")
def share_until__stops_before_it_is_reached(shares: list[float], threshold: float) -> list[int]:
    if threshold == 1:
        return list(range(len(shares)))
    kept, reached = [], 0.0
    for i in sorted(range(len(shares)), key=lambda i: -shares[i]):
        reached += shares[i]
        if reached > threshold:
            break
        kept.append(i)
    return sorted(kept)


@provokes("the earlier one goes first")
def share_until__ties_the_wrong_way(shares: list[float], threshold: float) -> list[int]:
    if threshold == 1:
        return list(range(len(shares)))
    kept, reached = [], 0.0
    for i in sorted(range(len(shares)), key=lambda i: shares[i])[::-1]:
        if reached >= threshold:
            break
        kept.append(i)
        reached += shares[i]
    return sorted(kept)


@provokes("at threshold 1 all layers keep theirs")
def share_until__silent_layers_lose_at_one(shares: list[float], threshold: float) -> list[int]:
    kept, reached = [], 0.0
    for i in sorted(range(len(shares)), key=lambda i: -shares[i]):
        if reached >= threshold:
            break
        kept.append(i)
        reached += shares[i]
    return sorted(kept)


@provokes("the largest shares first")
def share_until__by_place(shares: list[float], threshold: float) -> list[int]:
    kept, reached = [], 0.0
    for i, share in enumerate(shares):
        if reached >= threshold:
            break
        kept.append(i)
        reached += share
    return kept


@provokes("these are copies")
def share_pair__copies(layers: list[nn.Module], kept: list[int]) -> None:
    rest = [layer for i, layer in enumerate(layers) if i not in kept]
    for layer in rest[1:]:
        layer.A, layer.B = copy.deepcopy(rest[0].A), copy.deepcopy(rest[0].B)


@provokes("its own pair must stay")
def share_pair__the_kept_share(layers: list[nn.Module], kept: list[int]) -> None:
    for i in kept:
        layers[i].A, layers[i].B = layers[kept[0]].A, layers[kept[0]].B
    rest = [i for i in range(len(layers)) if i not in kept]
    for i in rest:
        layers[i].A, layers[i].B = layers[kept[0]].A, layers[kept[0]].B


@provokes("share both A and B")
def share_pair__only_A(layers: list[nn.Module], kept: list[int]) -> None:
    rest = [layer for i, layer in enumerate(layers) if i not in kept]
    for layer in rest:
        layer.A = rest[0].A


@provokes("of the first layer that is not kept")
def share_pair__of_the_last(layers: list[nn.Module], kept: list[int]) -> None:
    rest = [layer for i, layer in enumerate(layers) if i not in kept]
    for layer in rest:
        layer.A, layer.B = rest[-1].A, rest[-1].B


@provokes("this is the mean")
def shared_gradient__mean(Gs: list[Tensor], A: Tensor, B: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    G = torch.stack(Gs).mean(0)
    return scale * B.T @ G, scale * G @ A.T


@provokes("only the first layer is heard")
def shared_gradient__first_only(Gs: list[Tensor], A: Tensor, B: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    return scale * B.T @ Gs[0], scale * Gs[0] @ A.T


@provokes("the scale is missing")
def shared_gradient__no_scale(Gs: list[Tensor], A: Tensor, B: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    return B.T @ sum(Gs), sum(Gs) @ A.T


@provokes("in the wrong order")
def shared_gradient__swapped(Gs: list[Tensor], A: Tensor, B: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    return scale * sum(Gs) @ A.T, scale * B.T @ sum(Gs)


@provokes("the shared pair is missing")
def drop_count__no_shared_pair(kinds: list[tuple[int, int, int, int]], rank: int) -> int:
    return sum(rank * (out + into) * kept for out, into, layers, kept in kinds)


@provokes("no shared pair is left over")
def drop_count__always_one_more(kinds: list[tuple[int, int, int, int]], rank: int) -> int:
    return sum(rank * (out + into) * (kept + 1) for out, into, layers, kept in kinds)


@provokes("two pairs of their own")
def drop_count__all_layers(kinds: list[tuple[int, int, int, int]], rank: int) -> int:
    return sum(rank * (out + into) * layers for out, into, layers, kept in kinds)


@provokes("the price is what that is more than before")
def price_of_taking_out__loss_without(model: nn.Module, names: list[str], evaluate: Callable[[nn.Module], float]) -> dict[str, float]:
    prices = {}
    for name in names:
        parent, _, last = name.rpartition(".")
        adapter = model.get_submodule(name)
        setattr(model.get_submodule(parent), last, adapter.base)
        try:
            prices[name] = evaluate(model)
        finally:
            setattr(model.get_submodule(parent), last, adapter)
    return prices


@provokes("put each back before the next is taken out")
def price_of_taking_out__all_stay_out(model: nn.Module, names: list[str], evaluate: Callable[[nn.Module], float]) -> dict[str, float]:
    before, prices = evaluate(model), {}
    for name in names:
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, model.get_submodule(name).base)
        prices[name] = evaluate(model) - before
    return prices


@provokes("evaluate was given a copy")
def price_of_taking_out__in_copies(model: nn.Module, names: list[str], evaluate: Callable[[nn.Module], float]) -> dict[str, float]:
    before, prices = evaluate(model), {}
    for name in names:
        without = copy.deepcopy(model)
        parent, _, last = name.rpartition(".")
        setattr(without.get_submodule(parent), last, without.get_submodule(name).base)
        prices[name] = evaluate(without) - before
    return prices


@provokes("try … finally")
def price_of_taking_out__no_finally(model: nn.Module, names: list[str], evaluate: Callable[[nn.Module], float]) -> dict[str, float]:
    before, prices = evaluate(model), {}
    for name in names:
        parent, _, last = name.rpartition(".")
        adapter = model.get_submodule(name)
        setattr(model.get_submodule(parent), last, adapter.base)
        prices[name] = evaluate(model) - before
        setattr(model.get_submodule(parent), last, adapter)
    return prices


@provokes("the sign")
def price_of_taking_out__sign(model: nn.Module, names: list[str], evaluate: Callable[[nn.Module], float]) -> dict[str, float]:
    before, prices = evaluate(model), {}
    for name in names:
        parent, _, last = name.rpartition(".")
        adapter = model.get_submodule(name)
        setattr(model.get_submodule(parent), last, adapter.base)
        try:
            prices[name] = before - evaluate(model)
        finally:
            setattr(model.get_submodule(parent), last, adapter)
    return prices
