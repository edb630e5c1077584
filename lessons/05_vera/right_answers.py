"""Right answers in another style, each of which the tests must accept."""

import math

import torch
from torch import Tensor, nn


def vera_count__loop(shapes: list[tuple[int, int]], rank: int) -> int:
    total = len(shapes) * rank
    for shape in shapes:
        total += shape[0]
    return total


def vera_forward__einsum(x: Tensor, W: Tensor, A: Tensor, B: Tensor, b: Tensor, d: Tensor) -> Tensor:
    z = torch.einsum("...i,ri->...r", x, d[:, None] * A)                     # d goes into A's rows, b into B's: neither is (out, in)
    return torch.addcmul(x @ W.T, torch.ones_like(b), z @ (b[:, None] * B).T)


def slice_shared__narrow(A: Tensor, B: Tensor, into: int, out: int) -> tuple[Tensor, Tensor]:
    for have, want, what in ((A.size(1), into, "columns of A"), (B.size(0), out, "rows of B")):
        if have < want:
            raise ValueError(f"{want} {what} are asked for, there are {have}")
    return A.narrow(1, 0, into), B.narrow(0, 0, out)


def draw_projections__kaiming(rank: int, widest: int, tallest: int, seed: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator("cpu")
    g.manual_seed(seed)
    return tuple(nn.init.kaiming_uniform_(torch.zeros(shape), generator=g) for shape in ((rank, widest), (tallest, rank)))


def draw_projections__fork(rank: int, widest: int, tallest: int, seed: int) -> tuple[Tensor, Tensor]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        A = nn.init.uniform_(torch.empty(rank, widest), -math.sqrt(6 / widest), math.sqrt(6 / widest))
        return A, nn.init.uniform_(torch.empty(tallest, rank), -math.sqrt(6 / rank), math.sqrt(6 / rank))


def vera_gradients__einsum(x: Tensor, g: Tensor, A: Tensor, B: Tensor, b: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
    z = torch.einsum("...i,ri->...r", x, A)
    return torch.einsum("...o,or,r,...r->o", g, B, d, z), torch.einsum("...o,o,or,...r->r", g, b, B, z)


def vera_bytes__from_shapes(shapes: list[tuple[int, int]], rank: int, projections: bool) -> int:
    outs, intos = zip(*shapes)
    tensors = [(rank,)] * len(shapes) + [(out,) for out in outs] + [(rank, max(intos)), (max(outs), rank)] * bool(projections)
    return sum(math.prod(tensor) * torch.float32.itemsize for tensor in tensors)


def vera_reach__autograd(A: Tensor, B: Tensor, b: Tensor, d: Tensor) -> tuple[int, int]:
    def change(b, d):
        return torch.diag(b) @ B @ torch.diag(d) @ A

    J_b, J_d = torch.autograd.functional.jacobian(change, (b, d))
    J = torch.cat([J_b.flatten(0, 1), J_d.flatten(0, 1)], dim=1)

    def rank(M):
        values = torch.linalg.svdvals(M)
        return int((values > 1e-10 * values.max()).sum())

    return rank(change(b, d)), rank(J)
