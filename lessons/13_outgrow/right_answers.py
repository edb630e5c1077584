"""Right answers in another style, each of which the tests must accept."""

import math
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


def conv1d_adapter__through_linear(x: Tensor, W: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    return F.linear(x, W.T, bias) + F.linear(F.linear(x, A), B) * scale, torch.addmm(W, A.T, B.T, alpha=scale)


def conv1d_adapter__einsum(x: Tensor, W: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    y = torch.einsum("...i,io->...o", x, W) + scale * torch.einsum("...i,ri,or->...o", x, A, B)
    return y if bias is None else bias + y, W + torch.einsum("or,ri->io", B * scale, A)


def shard_batches__in_pieces(batches: Callable[[int], tuple[Tensor, Tensor]], process: int, processes: int) -> Callable[[int], tuple[Tensor, Tensor]]:
    def part(rows):
        if len(rows) / processes != len(rows) // processes:
            raise ValueError("uneven")
        return rows.tensor_split(processes)[process]

    return lambda step: tuple(part(rows) for rows in batches(step))


class _Share:
    def __init__(self, batches, process, processes):
        self.batches, self.process, self.processes = batches, process, processes

    def __call__(self, step):
        x, y = self.batches(step)
        size, rest = divmod(x.shape[0], self.processes)
        if rest:
            raise ValueError(f"{rest} rows too many")
        mine = torch.arange(x.shape[0]) // size == self.process
        return x[mine], y[mine]


def shard_batches__object(batches: Callable[[int], tuple[Tensor, Tensor]], process: int, processes: int) -> Callable[[int], tuple[Tensor, Tensor]]:
    return _Share(batches, process, processes)


def allreduce_bytes__round_by_round(shapes: list[tuple[int, int]], rank: int | None, processes: int, element_size: int = 4) -> float:
    sent = 0.0
    for out, into in shapes:
        count = out * into if rank is None else rank * into + out * rank
        for _ in range(2 * (processes - 1)):
            sent += count / processes * element_size
    return sent


def allreduce_bytes__numpy(shapes: list[tuple[int, int]], rank: int | None, processes: int, element_size: int = 4) -> float:
    table = np.array(shapes, dtype=np.int64).reshape(-1, 2)
    count = table.prod(1).sum() if rank is None else rank * table.sum()
    return (2 - 2 / processes) * count * element_size


def peak_of_loading__moments(dense: list[int], packed: list[int | None], layer_by_layer: bool) -> int:
    moments = [0 if layer_by_layer else sum(dense)]
    for i in range(len(dense)):
        behind = sum(d if p is None else p for d, p in zip(dense[:i], packed[:i]))
        ahead = 0 if layer_by_layer else sum(dense[i + 1:])
        moments.append(behind + dense[i] + (packed[i] or 0) + ahead)
    return max(moments)


def peak_of_loading__recursive(dense: list[int], packed: list[int | None], layer_by_layer: bool) -> int:
    def peak(i, there):
        if i == len(dense):
            return there
        now = there + (dense[i] if layer_by_layer else 0) + (packed[i] or 0)
        return max(now, peak(i + 1, now - (0 if packed[i] is None else dense[i])))

    return peak(0, 0 if layer_by_layer else sum(dense))


def many_adapters__einsum(x: Tensor, W: Tensor, A: Tensor, B: Tensor, scales: Tensor, which: Tensor) -> Tensor:
    own = torch.where(which < 0, torch.zeros_like(scales[which]), scales[which])
    z = torch.einsum("bti,bri->btr", x, A[which])
    return torch.einsum("bti,oi->bto", x, W) + torch.einsum("b,btr,bor->bto", own, z, B[which])


def many_adapters__a_silent_one_more(x: Tensor, W: Tensor, A: Tensor, B: Tensor, scales: Tensor, which: Tensor) -> Tensor:
    """A pair of zeros at the end, which -1 then means by itself. (A copy of all scales, and of no A or B.)"""
    scale = torch.cat([scales, scales.new_zeros(1)]).index_select(0, torch.where(which == -1, len(scales), which))
    pick = which.clamp(min=0)
    branch = F.linear(x, W).baddbmm((x @ A.index_select(0, pick).transpose(1, 2)) * scale.view(-1, 1, 1), B.index_select(0, pick).transpose(1, 2))
    return branch


def many_adapters__vmap(x: Tensor, W: Tensor, A: Tensor, B: Tensor, scales: Tensor, which: Tensor) -> Tensor:
    def row(x_b, A_b, B_b, s_b):
        return x_b @ W.T + s_b * (x_b @ A_b.T) @ B_b.T

    return torch.vmap(row)(x, A[which], B[which], scales[which] * (which != -1))


def many_adapters__only_those_who_have_one(x: Tensor, W: Tensor, A: Tensor, B: Tensor, scales: Tensor, which: Tensor) -> Tensor:
    rows = torch.nonzero(which >= 0).flatten()
    mine = which[rows]
    branch = scales[mine].unsqueeze(-1).unsqueeze(-1) * (x[rows] @ A[mine].mT @ B[mine].mT)
    return (x @ W.T).index_add(0, rows, branch)


def diagnose__link_by_link(layers: list[dict]) -> tuple[str, list[str]]:
    both = [(layer["name"], layer["A"], layer["B"]) for layer in layers]
    broken = {
        "base trains": [layer["name"] for layer in layers if layer["W"]["trainable"]],
        "frozen": [name for name, A, B in both if False in (A["trainable"], B["trainable"])],
        "no gradient": [name for name, A, B in both if None in (A["gradient"], B["gradient"])],
        "both zero": [name for name, A, B in both if A["gradient"] == B["gradient"] == 0],
        "not in the optimizer": [name for name, A, B in both if not A["in_optimizer"] or not B["in_optimizer"]],
        "stands still": [name for name, *factors in both if any((t["gradient"] or 0) > 0 == t["moved"] for t in factors)],
        "odd scale": [layer["name"] for layer in layers
                      if min(abs(layer["scale"] - layer["alpha"] * layer["rank"] ** power) for power in (-1, -0.5)) > 1e-9 * abs(layer["scale"])],
    }
    return next(((link, names) for link, names in broken.items() if names), ("healthy", []))


def diagnose__squares(layers: list[dict]) -> tuple[str, list[str]]:
    """alpha / rank or its root: scale · rank / alpha is 1 or √rank."""
    questions = {
        "base trains": lambda s: s["W"]["trainable"],
        "frozen": lambda s: s["A"]["trainable"] + s["B"]["trainable"] < 2,
        "no gradient": lambda s: any(s[key]["gradient"] is None for key in "AB"),
        "both zero": lambda s: max(s["A"]["gradient"], s["B"]["gradient"]) == 0,
        "not in the optimizer": lambda s: not all(s[key]["in_optimizer"] for key in "AB"),
        "stands still": lambda s: any(s[key]["moved"] == 0 < s[key]["gradient"] for key in "AB"),
        "odd scale": lambda s: not np.isclose(s["scale"] * s["rank"] / s["alpha"], [1, math.sqrt(s["rank"])], rtol=1e-9, atol=0).any(),
    }
    for link, asked in questions.items():
        names = [layer["name"] for layer in layers if asked(layer)]
        if names:
            return link, names
    return "healthy", []
