"""Lesson 13, worked. The same names and signatures as in exercises.py."""

import math
from collections.abc import Callable

import torch
from torch import Tensor


def conv1d_adapter(x: Tensor, W: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Two transpositions go, where W is read and where dW is laid on it. The branch does not know how W lies."""
    base = x @ W if bias is None else x @ W + bias
    return base + scale * (x @ A.T) @ B.T, W + scale * (B @ A).T


def shard_batches(batches: Callable[[int], tuple[Tensor, Tensor]], process: int, processes: int) -> Callable[[int], tuple[Tensor, Tensor]]:
    """Every processes-th row, beginning at its own number. No state: what it gives follows from the step alone."""

    def share(step: int) -> tuple[Tensor, Tensor]:
        x, y = batches(step)
        if len(x) % processes:
            raise ValueError(f"{len(x)} rows cannot be dealt evenly to {processes} processes")
        return x[process::processes], y[process::processes]

    return share


def allreduce_bytes(shapes: list[tuple[int, int]], rank: int | None, processes: int, element_size: int = 4) -> float:
    """What does not train is not sent: the frozen W of a LoRA costs nothing on the wire."""
    numbers = sum(out * into if rank is None else rank * (out + into) for out, into in shapes)
    return 2 * (processes - 1) / processes * numbers * element_size


def peak_of_loading(dense: list[int], packed: list[int | None], layer_by_layer: bool) -> int:
    """A diary of the bytes. Only the moment in which a layer is there twice can be a peak."""
    there = peak = 0 if layer_by_layer else sum(dense)
    for whole, small in zip(dense, packed):
        if layer_by_layer:
            there += whole
        if small is not None:
            there += small
        peak = max(peak, there)
        if small is not None:
            there -= whole
    return peak


def many_adapters(x: Tensor, W: Tensor, A: Tensor, B: Tensor, scales: Tensor, which: Tensor) -> Tensor:
    """Gather, then two batched products. -1 gathers the last adapter, and its scale is made 0: enough for finite numbers (0 · inf is nan)."""
    scale = scales[which] * (which >= 0)                                     # (batch)
    z = torch.bmm(x, A[which].mT)                                            # (batch, T, in) (batch, in, rank) -> (batch, T, rank)
    return x @ W.T + scale[:, None, None] * torch.bmm(z, B[which].mT)        # (batch, T, rank) (batch, rank, out) -> (batch, T, out)


LINKS = ("base trains", "frozen", "no gradient", "both zero", "not in the optimizer", "stands still", "odd scale", "healthy")


def diagnose(layers: list[dict]) -> tuple[str, list[str]]:
    """Later links often break by themselves once an earlier one has: what is frozen has no gradient and does not move. So the order is the art."""
    found = [_first_broken(layer) for layer in layers]
    link = min(found, key=LINKS.index)
    return link, [layer["name"] for layer, first in zip(layers, found) if first == link != "healthy"]


def _first_broken(layer: dict) -> str:
    W, A, B = layer["W"], layer["A"], layer["B"]
    if W["trainable"]:
        return "base trains"
    if not (A["trainable"] and B["trainable"]):
        return "frozen"
    if A["gradient"] is None or B["gradient"] is None:
        return "no gradient"
    if not (A["gradient"] or B["gradient"]):
        return "both zero"
    if not (A["in_optimizer"] and B["in_optimizer"]):
        return "not in the optimizer"
    if A["gradient"] and not A["moved"] or B["gradient"] and not B["moved"]:
        return "stands still"
    usual = layer["alpha"] / layer["rank"], layer["alpha"] / math.sqrt(layer["rank"])
    return "healthy" if any(math.isclose(layer["scale"], value) for value in usual) else "odd scale"
