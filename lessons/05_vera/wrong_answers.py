"""Plausible mistakes in lesson 05, each of which the tests must reject with the message named here."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lessons import provokes


@provokes("this is LoRA's count")
def vera_count__lora(shapes: list[tuple[int, int]], rank: int) -> int:
    return sum(rank * (out + into) for out, into in shapes)


@provokes("this adds the input's width")
def vera_count__input(shapes: list[tuple[int, int]], rank: int) -> int:
    return sum(rank + into for _, into in shapes)


@provokes("d is counted once")
def vera_count__one_d(shapes: list[tuple[int, int]], rank: int) -> int:
    return rank + sum(out for out, _ in shapes)


@provokes("the shared A and B are counted")
def vera_count__projections(shapes: list[tuple[int, int]], rank: int) -> int:
    return sum(rank + out for out, _ in shapes) + rank * sum(max(side) for side in zip(*shapes))


@provokes("b scales W's output too")
def vera_forward__b_on_everything(x: Tensor, W: Tensor, A: Tensor, B: Tensor, b: Tensor, d: Tensor) -> Tensor:
    return b * (F.linear(x, W) + (d * (x @ A.T)) @ B.T)


@provokes("d is missing")
def vera_forward__no_d(x: Tensor, W: Tensor, A: Tensor, B: Tensor, b: Tensor, d: Tensor) -> Tensor:
    return F.linear(x, W) + b * (x @ A.T @ B.T)


@provokes("b is added; it scales")
def vera_forward__b_as_bias(x: Tensor, W: Tensor, A: Tensor, B: Tensor, b: Tensor, d: Tensor) -> Tensor:
    return F.linear(x, W) + (d * (x @ A.T)) @ B.T + b


@provokes("an (out, in) matrix was made")
def vera_forward__dense(x: Tensor, W: Tensor, A: Tensor, B: Tensor, b: Tensor, d: Tensor) -> Tensor:
    return F.linear(x, W + torch.diag(b) @ B @ torch.diag(d) @ A)


@provokes("the branch is divided by the rank")
def vera_forward__divided_by_rank(x: Tensor, W: Tensor, A: Tensor, B: Tensor, b: Tensor, d: Tensor) -> Tensor:
    return F.linear(x, W) + b * ((d * (x @ A.T)) @ B.T) / len(d)


@provokes("no gradient reaches d")
def vera_forward__d_detached(x: Tensor, W: Tensor, A: Tensor, B: Tensor, b: Tensor, d: Tensor) -> Tensor:
    return F.linear(x, W) + b * ((d.detach() * (x @ A.T)) @ B.T)


@provokes("silently too short")
def slice_shared__silent(A: Tensor, B: Tensor, into: int, out: int) -> tuple[Tensor, Tensor]:
    return A[:, :into], B[:out]


@provokes("A's part is a copy")
def slice_shared__copies(A: Tensor, B: Tensor, into: int, out: int) -> tuple[Tensor, Tensor]:
    if into > A.shape[1] or out > B.shape[0]:
        raise ValueError("too large")
    return A[:, :into].clone(), B[:out].clone()


@provokes("these are the last columns")
def slice_shared__last(A: Tensor, B: Tensor, into: int, out: int) -> tuple[Tensor, Tensor]:
    if into > A.shape[1] or out > B.shape[0]:
        raise ValueError("too large")
    return A[:, -into:], B[-out:]


@provokes("too large")
def slice_shared__refuses_the_largest(A: Tensor, B: Tensor, into: int, out: int) -> tuple[Tensor, Tensor]:
    if into >= A.shape[1] or out >= B.shape[0]:
        raise ValueError("too large")
    return A[:, :into], B[:out]


def _thrown(rank, widest, tallest, seed, bound):
    """What the wrong throws share; bound(rows, columns)."""
    dice = torch.Generator().manual_seed(seed)
    return tuple(torch.empty(*shape).uniform_(-bound(*shape), bound(*shape), generator=dice) for shape in ((rank, widest), (tallest, rank)))


@provokes("that is a = √5")
def draw_projections__as_loras(rank: int, widest: int, tallest: int, seed: int) -> tuple[Tensor, Tensor]:
    return _thrown(rank, widest, tallest, seed, lambda rows, columns: columns**-0.5)


@provokes("which is the standard deviation wanted")
def draw_projections__deviation_as_bound(rank: int, widest: int, tallest: int, seed: int) -> tuple[Tensor, Tensor]:
    return _thrown(rank, widest, tallest, seed, lambda rows, columns: math.sqrt(2 / columns))


@provokes("and not of rows")
def draw_projections__fan_out(rank: int, widest: int, tallest: int, seed: int) -> tuple[Tensor, Tensor]:
    return _thrown(rank, widest, tallest, seed, lambda rows, columns: math.sqrt(6 / rows))


@provokes("Xavier's")
def draw_projections__xavier(rank: int, widest: int, tallest: int, seed: int) -> tuple[Tensor, Tensor]:
    return _thrown(rank, widest, tallest, seed, lambda rows, columns: math.sqrt(6 / (rows + columns)))


@provokes("A has other numbers than ml.VeRA's")
def draw_projections__B_first(rank: int, widest: int, tallest: int, seed: int) -> tuple[Tensor, Tensor]:
    dice = torch.Generator().manual_seed(seed)
    B = nn.init.kaiming_uniform_(torch.empty(tallest, rank), generator=dice)
    return nn.init.kaiming_uniform_(torch.empty(rank, widest), generator=dice), B


@provokes("B has other numbers than ml.VeRA's")
def draw_projections__seeded_twice(rank: int, widest: int, tallest: int, seed: int) -> tuple[Tensor, Tensor]:
    shapes = (rank, widest), (tallest, rank)
    return tuple(nn.init.kaiming_uniform_(torch.empty(*shape), generator=torch.Generator().manual_seed(seed)) for shape in shapes)


@provokes("global random state has moved")
def draw_projections__global_state(rank: int, widest: int, tallest: int, seed: int) -> tuple[Tensor, Tensor]:
    torch.manual_seed(seed)
    return nn.init.kaiming_uniform_(torch.empty(rank, widest)), nn.init.kaiming_uniform_(torch.empty(tallest, rank))


@provokes("uniform, not normal")
def draw_projections__normal(rank: int, widest: int, tallest: int, seed: int) -> tuple[Tensor, Tensor]:
    dice = torch.Generator().manual_seed(seed)
    return nn.init.kaiming_normal_(torch.empty(rank, widest), generator=dice), nn.init.kaiming_normal_(torch.empty(tallest, rank), generator=dice)


@provokes("b is missing in dL/dd")
def vera_gradients__b_forgotten(x: Tensor, g: Tensor, A: Tensor, B: Tensor, b: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
    z = x @ A.T
    return (g * ((d * z) @ B.T)).reshape(-1, len(b)).sum(0), ((g @ B) * z).reshape(-1, len(d)).sum(0)


@provokes("d is missing in dL/db")
def vera_gradients__d_forgotten(x: Tensor, g: Tensor, A: Tensor, B: Tensor, b: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
    z = x @ A.T
    return (g * (z @ B.T)).reshape(-1, len(b)).sum(0), (((g * b) @ B) * z).reshape(-1, len(d)).sum(0)


@provokes("is the mean over the rows")
def vera_gradients__mean(x: Tensor, g: Tensor, A: Tensor, B: Tensor, b: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
    z = x @ A.T
    return (g * ((d * z) @ B.T)).reshape(-1, len(b)).mean(0), (((g * b) @ B) * z).reshape(-1, len(d)).mean(0)


@provokes("shape (7,) is wanted, got (6, 7)")
def vera_gradients__one_leading_size(x: Tensor, g: Tensor, A: Tensor, B: Tensor, b: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
    z = x @ A.T
    db, dd = g * ((d * z) @ B.T), ((g * b) @ B) * z
    return (db, dd) if db.dim() == 1 else (db.sum(0), dd.sum(0))


@provokes("an (out, in) matrix was made")
def vera_gradients__through_the_full_gradient(x: Tensor, g: Tensor, A: Tensor, B: Tensor, b: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
    G = g.reshape(-1, len(b)).T @ x.reshape(-1, A.shape[1])
    return ((G @ A.T) * B * d).sum(1), ((G @ A.T) * B * b[:, None]).sum(0)


@provokes("A and B are counted for every layer")
def vera_bytes__not_shared(shapes: list[tuple[int, int]], rank: int, projections: bool) -> int:
    return 4 * sum(rank + out + projections * rank * (out + into) for out, into in shapes)


@provokes("A and B are missing")
def vera_bytes__tiny_always(shapes: list[tuple[int, int]], rank: int, projections: bool) -> int:
    return 4 * sum(rank + out for out, _ in shapes)


@provokes("a seed stands for them")
def vera_bytes__always_with_projections(shapes: list[tuple[int, int]], rank: int, projections: bool) -> int:
    return 4 * (sum(rank + out for out, _ in shapes) + rank * sum(max(side) for side in zip(*shapes)))


@provokes("numbers are counted, not bytes")
def vera_bytes__numbers(shapes: list[tuple[int, int]], rank: int, projections: bool) -> int:
    return sum(rank + out for out, _ in shapes) + projections * rank * sum(max(side) for side in zip(*shapes))


@provokes("you count")
def vera_bytes__of_the_first_layer(shapes: list[tuple[int, int]], rank: int, projections: bool) -> int:
    return 4 * (sum(rank + out for out, _ in shapes) + projections * rank * sum(shapes[0]))


@provokes("is how many numbers are trained")
def vera_reach__counted(A: Tensor, B: Tensor, b: Tensor, d: Tensor) -> tuple[int, int]:
    return min(len(d), len(b), A.shape[1]), len(b) + len(d)


@provokes("measure, do not count")
def vera_reach__counted_well(A: Tensor, B: Tensor, b: Tensor, d: Tensor) -> tuple[int, int]:
    m, n = int(b.count_nonzero()), int(d.count_nonzero())
    rank = int(torch.linalg.matrix_rank(b[:, None] * (B * d) @ A, rtol=1e-10)) if A.shape[0] != 2 else min(m, n)
    return rank, min(len(b) + (len(d) - 1) * bool(m), len(b) * A.shape[1])


@provokes("compare with the largest singular value")
def vera_reach__fixed_threshold(A: Tensor, B: Tensor, b: Tensor, d: Tensor) -> tuple[int, int]:
    rows = (B * d) @ A
    jacobian = torch.cat([torch.eye(len(b), dtype=b.dtype)[:, :, None] * rows, (b[:, None] * B).T[:, :, None] * A[:, None]]).flatten(1)
    return tuple(int((torch.linalg.svdvals(M) > 1e-10).sum()) for M in (b[:, None] * rows, jacobian))


@provokes("one row of the Jacobian for each entry of b and of d")
def vera_reach__b_alone(A: Tensor, B: Tensor, b: Tensor, d: Tensor) -> tuple[int, int]:
    rows = (B * d) @ A
    jacobian = (torch.eye(len(b), dtype=b.dtype)[:, :, None] * rows).flatten(1)
    return int(torch.linalg.matrix_rank(b[:, None] * rows, rtol=1e-10)), int(torch.linalg.matrix_rank(jacobian, rtol=1e-10))
