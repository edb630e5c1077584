"""Plausible mistakes in lesson 13, each of which the tests must reject with the message named here."""

import math
import random
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from lessons import provokes


def _base(x, W, bias):
    return x @ W if bias is None else x @ W + bias


@provokes("x Wᵀ is nn.Linear's")
def conv1d_adapter__as_a_linear(x: Tensor, W: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    return F.linear(x, W, bias) + scale * (x @ A.T) @ B.T, W + scale * (B @ A).T


@provokes("turn the update before it is added")
def conv1d_adapter__update_not_turned(x: Tensor, W: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    return _base(x, W, bias) + scale * (x @ A.T) @ B.T, W + scale * B @ A


@provokes("A and B lie as ever, only W is turned")
def conv1d_adapter__everything_turned(x: Tensor, W: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    return _base(x, W, bias) + scale * (x @ A) @ B, W + scale * (B @ A).T


@provokes("this is (A B)ᵀ")
def conv1d_adapter__factors_swapped(x: Tensor, W: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    return _base(x, W, bias) + scale * (x @ A.T) @ B.T, W + scale * B.T @ A.T


@provokes("merged lies (out, in), as in nn.Linear")
def conv1d_adapter__merged_as_a_linear(x: Tensor, W: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    return _base(x, W, bias) + scale * (x @ A.T) @ B.T, W.T + scale * B @ A


@provokes("the scale is missing in merged")
def conv1d_adapter__scale_in_y_only(x: Tensor, W: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    return _base(x, W, bias) + scale * (x @ A.T) @ B.T, W + (B @ A).T


@provokes("changed its argument W")
def conv1d_adapter__in_place(x: Tensor, W: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    y = _base(x, W, bias) + scale * (x @ A.T) @ B.T
    W += scale * (B @ A).T
    return y, W


@provokes("NoneType")
def conv1d_adapter__needs_a_bias(x: Tensor, W: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    return x @ W + bias + scale * (x @ A.T) @ B.T, W + scale * (B @ A).T


@provokes("the bias is scaled too")
def conv1d_adapter__bias_scaled(x: Tensor, W: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    branch = (x @ A.T) @ B.T
    return x @ W + scale * (branch if bias is None else branch + bias), W + scale * (B @ A).T


@provokes("but the gradient that reaches")
def conv1d_adapter__merged_cut(x: Tensor, W: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        merged = W + scale * (B @ A).T
    return _base(x, W, bias) + scale * (x @ A.T) @ B.T, merged


def _share(batches, part):
    """A share that checks, then takes part(rows) of x and of y."""
    def share(step):
        x, y = batches(step)
        return part(x), part(y)

    return share


def _even(rows, processes):
    if rows % processes:
        raise ValueError("uneven")


@provokes("every process got the whole batch")
def shard_batches__all_the_same(batches: Callable[[int], tuple[Tensor, Tensor]], process: int, processes: int) -> Callable[[int], tuple[Tensor, Tensor]]:
    return batches


@provokes("ValueError is wanted")
def shard_batches__rest_left_out(batches: Callable[[int], tuple[Tensor, Tensor]], process: int, processes: int) -> Callable[[int], tuple[Tensor, Tensor]]:
    def part(rows):
        size = len(rows) // processes
        return rows[process * size:(process + 1) * size]

    return _share(batches, part)


@provokes("ValueError is wanted")
def shard_batches__uneven(batches: Callable[[int], tuple[Tensor, Tensor]], process: int, processes: int) -> Callable[[int], tuple[Tensor, Tensor]]:
    return _share(batches, lambda rows: rows[process::processes])


@provokes("look at each batch, not only at the first")
def shard_batches__looks_once(batches: Callable[[int], tuple[Tensor, Tensor]], process: int, processes: int) -> Callable[[int], tuple[Tensor, Tensor]]:
    _even(len(batches(0)[0]), processes)
    return _share(batches, lambda rows: rows[process::processes])


@provokes("a share of the same batch, at the step asked for")
def shard_batches__other_steps(batches: Callable[[int], tuple[Tensor, Tensor]], process: int, processes: int) -> Callable[[int], tuple[Tensor, Tensor]]:
    def share(step):
        x, y = batches(step * processes + process)
        _even(len(x), processes)
        return x[process::processes], y[process::processes]

    return share


@provokes("went to more than one process")
def shard_batches__from_its_number_on(batches: Callable[[int], tuple[Tensor, Tensor]], process: int, processes: int) -> Callable[[int], tuple[Tensor, Tensor]]:
    def part(rows):
        _even(len(rows), processes)
        return rows[process:process + len(rows) // processes]

    return _share(batches, part)


@provokes("across its columns")
def shard_batches__columns(batches: Callable[[int], tuple[Tensor, Tensor]], process: int, processes: int) -> Callable[[int], tuple[Tensor, Tensor]]:
    def share(step):
        x, y = batches(step)
        _even(len(x), processes)
        return x[:, process::processes], y[process::processes]

    return share


@provokes("deal both")
def shard_batches__y_whole(batches: Callable[[int], tuple[Tensor, Tensor]], process: int, processes: int) -> Callable[[int], tuple[Tensor, Tensor]]:
    def share(step):
        x, y = batches(step)
        _even(len(x), processes)
        return x[process::processes], y

    return share


@provokes("do not belong to its rows of x")
def shard_batches__two_ways(batches: Callable[[int], tuple[Tensor, Tensor]], process: int, processes: int) -> Callable[[int], tuple[Tensor, Tensor]]:
    def share(step):
        x, y = batches(step)
        _even(len(x), processes)
        return x[process::processes], y.chunk(processes)[process]

    return share


@provokes("no dice and no counter")
def shard_batches__dice(batches: Callable[[int], tuple[Tensor, Tensor]], process: int, processes: int) -> Callable[[int], tuple[Tensor, Tensor]]:
    def share(step):
        x, y = batches(step)
        _even(len(x), processes)
        rows = random.sample(range(len(x)), len(x) // processes)
        return x[rows], y[rows]

    return share


@provokes("gives rows of step 3")
def shard_batches__first_kept(batches: Callable[[int], tuple[Tensor, Tensor]], process: int, processes: int) -> Callable[[int], tuple[Tensor, Tensor]]:
    kept = []

    def share(step):
        if not kept:
            kept.append(batches(step))
        _even(len(kept[0][0]), processes)
        return kept[0][0][process::processes], kept[0][1][process::processes]

    return share


@provokes("a share of the same batch, at the step asked for")
def shard_batches__a_step_each(batches: Callable[[int], tuple[Tensor, Tensor]], process: int, processes: int) -> Callable[[int], tuple[Tensor, Tensor]]:
    return lambda step: batches(step * processes + process)


@provokes("it wrote into the batch")
def shard_batches__in_the_callers_batch(batches: Callable[[int], tuple[Tensor, Tensor]], process: int, processes: int) -> Callable[[int], tuple[Tensor, Tensor]]:
    def share(step):
        x, y = batches(step)
        _even(len(x), processes)
        size = len(x) // processes
        x[:size], y[:size] = x[process::processes].clone(), y[process::processes].clone()
        return x[:size], y[:size]

    return share


@provokes("torch's global generator was seeded anew")
def shard_batches__seeds_for_all(batches: Callable[[int], tuple[Tensor, Tensor]], process: int, processes: int) -> Callable[[int], tuple[Tensor, Tensor]]:
    def share(step):
        x, y = batches(step)
        _even(len(x), processes)
        torch.manual_seed(step)
        rows = torch.randperm(len(x))[process::processes]
        return x[rows], y[rows]

    return share


def _numbers(shapes, rank):
    return sum(out * into if rank is None else rank * (out + into) for out, into in shapes)


@provokes("the sums have to travel too")
def allreduce_bytes__once_round(shapes: list[tuple[int, int]], rank: int | None, processes: int, element_size: int = 4) -> float:
    return (processes - 1) / processes * _numbers(shapes, rank) * element_size


@provokes("everybody sends everything to everybody")
def allreduce_bytes__to_everybody(shapes: list[tuple[int, int]], rank: int | None, processes: int, element_size: int = 4) -> float:
    return (processes - 1) * _numbers(shapes, rank) * element_size


@provokes("the limit for many processes")
def allreduce_bytes__limit(shapes: list[tuple[int, int]], rank: int | None, processes: int, element_size: int = 4) -> float:
    return 2 * _numbers(shapes, rank) * element_size if processes > 1 else 0


@provokes("W is frozen: A and B travel")
def allreduce_bytes__w_travels(shapes: list[tuple[int, int]], rank: int | None, processes: int, element_size: int = 4) -> float:
    return 2 * (processes - 1) / processes * _numbers(shapes, None) * element_size


@provokes("what all processes send together")
def allreduce_bytes__all_of_them(shapes: list[tuple[int, int]], rank: int | None, processes: int, element_size: int = 4) -> float:
    return 2 * (processes - 1) * _numbers(shapes, rank) * element_size


@provokes("these are numbers")
def allreduce_bytes__numbers(shapes: list[tuple[int, int]], rank: int | None, processes: int, element_size: int = 4) -> float:
    return 2 * (processes - 1) / processes * _numbers(shapes, rank)


@provokes("element_size says how many")
def allreduce_bytes__always_four(shapes: list[tuple[int, int]], rank: int | None, processes: int, element_size: int = 4) -> float:
    return 2 * (processes - 1) / processes * _numbers(shapes, rank) * 4


@provokes("multiplies the rank with out · in")
def allreduce_bytes__rank_times_w(shapes: list[tuple[int, int]], rank: int | None, processes: int, element_size: int = 4) -> float:
    return 2 * (processes - 1) / processes * sum(out * into * (rank or 1) for out, into in shapes) * element_size


@provokes("bytes are wanted, got")
def allreduce_bytes__floored(shapes: list[tuple[int, int]], rank: int | None, processes: int, element_size: int = 4) -> float:
    return 2 * (processes - 1) * (_numbers(shapes, rank) // processes) * element_size


@provokes("its first packed layer lies beside it")
def peak_of_loading__only_dense(dense: list[int], packed: list[int | None], layer_by_layer: bool) -> int:
    if not layer_by_layer:
        return sum(dense)
    there = peak = 0
    for whole, small in zip(dense, packed):
        peak = max(peak, there + whole + (small or 0))
        there += whole if small is None else small
    return peak


@provokes("what is there at the end")
def peak_of_loading__at_the_end(dense: list[int], packed: list[int | None], layer_by_layer: bool) -> int:
    return sum(whole if small is None else small for whole, small in zip(dense, packed))


@provokes("the largest may have gone before the last came")
def peak_of_loading__sum_and_largest(dense: list[int], packed: list[int | None], layer_by_layer: bool) -> int:
    if layer_by_layer:
        return peak_of_loading__at_the_end(dense, packed, True) + max(dense, default=0)
    return peak_of_loading__only_dense(dense, packed, False)


def _diary(dense, packed, layer_by_layer, copy=lambda whole, small: small, keep=lambda whole: whole, look=True):
    """What the wrong diaries share: `copy` and `keep` say what a layer that stays dense costs; look: while both are there."""
    there = peak = 0 if layer_by_layer else sum(dense)
    for whole, small in zip(dense, packed):
        beside = copy(whole, small) or 0
        there += whole * layer_by_layer
        peak = max(peak, there + beside * look)
        there += beside - whole if small is not None else keep(whole) - whole
    return peak


@provokes("dense and packed lie side by side for a moment")
def peak_of_loading__never_both(dense: list[int], packed: list[int | None], layer_by_layer: bool) -> int:
    return _diary(dense, packed, layer_by_layer, look=False)


@provokes("a layer that stays dense is not copied")
def peak_of_loading__all_copied(dense: list[int], packed: list[int | None], layer_by_layer: bool) -> int:
    return _diary(dense, packed, layer_by_layer, copy=lambda whole, small: whole if small is None else small)


@provokes("a layer that stays dense stays")
def peak_of_loading__given_back(dense: list[int], packed: list[int | None], layer_by_layer: bool) -> int:
    return _diary(dense, packed, layer_by_layer, keep=lambda whole: 0)


@provokes("here one layer comes at a time")
def peak_of_loading__always_whole(dense: list[int], packed: list[int | None], layer_by_layer: bool) -> int:
    return _diary(dense, packed, False)


@provokes("here the whole model comes first")
def peak_of_loading__always_by_layer(dense: list[int], packed: list[int | None], layer_by_layer: bool) -> int:
    return _diary(dense, packed, True)


@provokes("all at once")
def peak_of_loading__everything_twice(dense: list[int], packed: list[int | None], layer_by_layer: bool) -> int:
    return _diary(dense, packed, True) if layer_by_layer else sum(dense) + sum(small or 0 for small in packed)


@provokes("only if it comes first")
def peak_of_loading__largest_packed(dense: list[int], packed: list[int | None], layer_by_layer: bool) -> int:
    return _diary(dense, packed, True) if layer_by_layer else sum(dense) + max((small or 0 for small in packed), default=0)


def _branches(x, A, B, which):
    return (x @ A[which].mT) @ B[which].mT


@provokes("in Python it also means the last one")
def many_adapters__minus_one_is_the_last(x: Tensor, W: Tensor, A: Tensor, B: Tensor, scales: Tensor, which: Tensor) -> Tensor:
    return x @ W.T + scales[which][:, None, None] * _branches(x, A, B, which)


@provokes("such a row got adapter 0")
def many_adapters__minus_one_is_the_first(x: Tensor, W: Tensor, A: Tensor, B: Tensor, scales: Tensor, which: Tensor) -> Tensor:
    which = which.clamp_min(0)
    return x @ W.T + scales[which][:, None, None] * _branches(x, A, B, which)


@provokes("still has the base's answer")
def many_adapters__minus_one_is_nothing(x: Tensor, W: Tensor, A: Tensor, B: Tensor, scales: Tensor, which: Tensor) -> Tensor:
    return (which >= 0)[:, None, None] * (x @ W.T + scales[which][:, None, None] * _branches(x, A, B, which))


@provokes("scales are missing")
def many_adapters__no_scale(x: Tensor, W: Tensor, A: Tensor, B: Tensor, scales: Tensor, which: Tensor) -> Tensor:
    return x @ W.T + (which >= 0)[:, None, None] * _branches(x, A, B, which)


@provokes("the scale of adapter 0")
def many_adapters__one_scale(x: Tensor, W: Tensor, A: Tensor, B: Tensor, scales: Tensor, which: Tensor) -> Tensor:
    return x @ W.T + scales[0] * (which >= 0)[:, None, None] * _branches(x, A, B, which)


@provokes("a loop over rows")
def many_adapters__loop_over_rows(x: Tensor, W: Tensor, A: Tensor, B: Tensor, scales: Tensor, which: Tensor) -> Tensor:
    return torch.stack([row @ W.T + (scales[i] * row @ A[i].T @ B[i].T if i >= 0 else 0) for row, i in zip(x, which)])


@provokes("a loop over adapters")
def many_adapters__loop_over_adapters(x: Tensor, W: Tensor, A: Tensor, B: Tensor, scales: Tensor, which: Tensor) -> Tensor:
    y = x @ W.T
    for i in range(len(A)):
        y = y + (which == i)[:, None, None] * scales[i] * (x @ A[i].T) @ B[i].T
    return y


@provokes("grows with the number of adapters")
def many_adapters__all_of_them(x: Tensor, W: Tensor, A: Tensor, B: Tensor, scales: Tensor, which: Tensor) -> Tensor:
    chosen = F.one_hot(which + 1, len(A) + 1)[:, 1:].to(x) * scales                              # (batch, n)
    return x @ W.T + torch.einsum("bti,nri,bn,nor->bto", x, A, chosen, B)


@provokes("B A was formed")
def many_adapters__forms_the_products(x: Tensor, W: Tensor, A: Tensor, B: Tensor, scales: Tensor, which: Tensor) -> Tensor:
    scale = (scales[which] * (which >= 0))[:, None, None]
    return x @ (W + scale * B[which] @ A[which]).mT


@provokes("only the first token of each row")
def many_adapters__first_token(x: Tensor, W: Tensor, A: Tensor, B: Tensor, scales: Tensor, which: Tensor) -> Tensor:
    scale = (scales[which] * (which >= 0))[:, None, None]
    return torch.cat([x[:, :1] @ W.T + scale * _branches(x[:, :1], A, B, which), x[:, 1:] @ W.T], 1)


@provokes("the base's x Wᵀ is missing")
def many_adapters__no_base(x: Tensor, W: Tensor, A: Tensor, B: Tensor, scales: Tensor, which: Tensor) -> Tensor:
    return (scales[which] * (which >= 0))[:, None, None] * _branches(x, A, B, which)


def _judged(layers, order=("base trains", "frozen", "no gradient", "both zero", "not in the optimizer", "stands still", "odd scale"), all_of_them=False, **instead):
    """The right judge, but for another order of the chain, or for the links in `instead`, each a test of (layer, A, B)."""
    tests = {
        "base trains": lambda layer, A, B: layer["W"]["trainable"],
        "frozen": lambda layer, A, B: not (A["trainable"] and B["trainable"]),
        "no gradient": lambda layer, A, B: A["gradient"] is None or B["gradient"] is None,
        "both zero": lambda layer, A, B: not A["gradient"] and not B["gradient"],
        "not in the optimizer": lambda layer, A, B: not (A["in_optimizer"] and B["in_optimizer"]),
        "stands still": lambda layer, A, B: any(t["gradient"] and not t["moved"] for t in (A, B)),
        "odd scale": lambda layer, A, B: not any(math.isclose(layer["scale"], layer["alpha"] / r) for r in (layer["rank"], math.sqrt(layer["rank"]))),
    } | {link.replace("_", " "): test for link, test in instead.items()}
    for link in order:
        sick = [layer["name"] for layer in layers if tests[link](layer, layer["A"], layer["B"])]
        if len(sick) == len(layers) if all_of_them else sick:
            return link, sick
    return "healthy", []


@provokes("in every healthy first step A's gradient is 0")
def diagnose__a_silent(layers: list[dict]) -> tuple[str, list[str]]:
    return _judged(layers, both_zero=lambda layer, A, B: not A["gradient"] or not B["gradient"])


@provokes("in every healthy first step A's gradient is 0")
def diagnose__a_still(layers: list[dict]) -> tuple[str, list[str]]:
    return _judged(layers, stands_still=lambda layer, A, B: not A["moved"] or not B["moved"])


@provokes("in every healthy first step A's gradient is 0")
def diagnose__b_zero(layers: list[dict]) -> tuple[str, list[str]]:
    return _judged(layers, both_zero=lambda layer, A, B: not A["before"] or not B["before"])


@provokes("the first of the chain is the cause")
def diagnose__symptom_first(layers: list[dict]) -> tuple[str, list[str]]:
    return _judged(layers, ("stands still", "base trains", "odd scale", "not in the optimizer", "both zero", "no gradient", "frozen"))


@provokes("the first of the chain is the cause")
def diagnose__layer_by_layer(layers: list[dict]) -> tuple[str, list[str]]:
    for layer in layers:
        link, names = _judged([layer])
        if link != "healthy":
            return link, [other["name"] for other in layers if _judged([other])[0] == link]
    return "healthy", []


@provokes("it went past a broken link")
def diagnose__only_if_everywhere(layers: list[dict]) -> tuple[str, list[str]]:
    return _judged(layers, all_of_them=True)


@provokes("broken in ['a', 'z']")
def diagnose__first_name(layers: list[dict]) -> tuple[str, list[str]]:
    link, names = _judged(layers)
    return link, names[:1]


@provokes("all layers were named")
def diagnose__every_name(layers: list[dict]) -> tuple[str, list[str]]:
    link, names = _judged(layers)
    return link, [layer["name"] for layer in layers] if names else []


@provokes("both are healthy")
def diagnose__no_rslora(layers: list[dict]) -> tuple[str, list[str]]:
    return _judged(layers, odd_scale=lambda layer, A, B: not math.isclose(layer["scale"], layer["alpha"] / layer["rank"]))


@provokes("the last digit may be rounded")
def diagnose__to_the_bit(layers: list[dict]) -> tuple[str, list[str]]:
    return _judged(layers, odd_scale=lambda layer, A, B: layer["scale"] not in (layer["alpha"] / layer["rank"], layer["alpha"] / math.sqrt(layer["rank"])))


@provokes("A and B are what it lacks")
def diagnose__w_in_the_optimizer(layers: list[dict]) -> tuple[str, list[str]]:
    return _judged(layers, not_in_the_optimizer=lambda layer, A, B: not any(layer[key]["in_optimizer"] for key in "WAB"))


@provokes("nothing moves it, and no link is broken")
def diagnose__base_in_the_optimizer(layers: list[dict]) -> tuple[str, list[str]]:
    return _judged(layers, base_trains=lambda layer, A, B: layer["W"]["trainable"] or layer["W"]["in_optimizer"])


@provokes("one of A and B has no gradient at all")
def diagnose__none_is_zero(layers: list[dict]) -> tuple[str, list[str]]:
    return _judged(layers, no_gradient=lambda layer, A, B: A["gradient"] is None and B["gradient"] is None)


@provokes("in another order")
def diagnose__sorted(layers: list[dict]) -> tuple[str, list[str]]:
    link, names = _judged(layers)
    return link, sorted(names)


@provokes("'not at all' is 0.0")
def diagnose__hardly_moved(layers: list[dict]) -> tuple[str, list[str]]:
    return _judged(layers, stands_still=lambda layer, A, B: any(t["gradient"] and t["moved"] < 1e-6 for t in (A, B)))


@provokes("a gradient of 1e-9 is a gradient")
def diagnose__hardly_a_gradient(layers: list[dict]) -> tuple[str, list[str]]:
    return _judged(layers, both_zero=lambda layer, A, B: A["gradient"] < 1e-6 and B["gradient"] < 1e-6)


@provokes("of W only one thing is asked")
def diagnose__w_moved(layers: list[dict]) -> tuple[str, list[str]]:
    return _judged(layers, base_trains=lambda layer, A, B: layer["W"]["trainable"] or layer["W"]["moved"] > 0)


@provokes("the scale is neither alpha / rank nor alpha / √rank")
def diagnose__half_is_usual(layers: list[dict]) -> tuple[str, list[str]]:
    return _judged(layers, odd_scale=lambda layer, A, B: not any(
        math.isclose(layer["scale"], layer["alpha"] / r) for r in (layer["rank"], math.sqrt(layer["rank"]), 2 * layer["rank"])))


@provokes("a relative error of 3e-09 is not rounding")
def diagnose__eight_digits(layers: list[dict]) -> tuple[str, list[str]]:
    return _judged(layers, odd_scale=lambda layer, A, B: not any(
        math.isclose(layer["scale"], layer["alpha"] / r, rel_tol=1e-8) for r in (layer["rank"], math.sqrt(layer["rank"]))))


@provokes("whether the scale is small or large")
def diagnose__nine_places(layers: list[dict]) -> tuple[str, list[str]]:
    return _judged(layers, odd_scale=lambda layer, A, B: round(layer["scale"], 9) not in (
        round(layer["alpha"] / layer["rank"], 9), round(layer["alpha"] / math.sqrt(layer["rank"]), 9)))
