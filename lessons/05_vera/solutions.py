"""Lesson 05, worked. The same names and signatures as in exercises.py."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def vera_count(shapes: list[tuple[int, int]], rank: int) -> int:
    """The width of the input does not appear: A is not trained."""
    return sum(rank + out for out, _ in shapes)


def vera_forward(x: Tensor, W: Tensor, A: Tensor, B: Tensor, b: Tensor, d: Tensor) -> Tensor:
    """diag(d) times a vector is d ⊙ that vector: no diagonal matrix is needed."""
    z = d * (x @ A.T)                                                        # (..., in) -> (..., rank)
    return F.linear(x, W) + b * (z @ B.T)                                    # (..., rank) -> (..., out)


def slice_shared(A: Tensor, B: Tensor, into: int, out: int) -> tuple[Tensor, Tensor]:
    """Basic slicing gives views, so all layers look at the same storage."""
    if into > A.shape[1] or out > B.shape[0]:
        raise ValueError(f"a layer of shape ({out}, {into}) has no place in B of {B.shape[0]} rows and A of {A.shape[1]} columns")
    return A[:, :into], B[:out]


def draw_projections(rank: int, widest: int, tallest: int, seed: int) -> tuple[Tensor, Tensor]:
    """One pair of dice, thrown for A first and then, without a new seed, for B."""
    dice = torch.Generator().manual_seed(seed)
    c_A, c_B = math.sqrt(6 / widest), math.sqrt(6 / rank)
    A = torch.empty(rank, widest).uniform_(-c_A, c_A, generator=dice)
    B = torch.empty(tallest, rank).uniform_(-c_B, c_B, generator=dice)
    return A, B


def vera_gradients(x: Tensor, g: Tensor, A: Tensor, B: Tensor, b: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
    """An elementwise product in the forward is one in the backward: what stands beside b is b's gradient, times g."""
    z = x @ A.T                                                              # (..., rank)
    db = g * ((d * z) @ B.T)                                                 # (..., out)
    dd = ((g * b) @ B) * z                                                   # (..., rank)
    return db.reshape(-1, len(b)).sum(0), dd.reshape(-1, len(d)).sum(0)


def vera_bytes(shapes: list[tuple[int, int]], rank: int, projections: bool) -> int:
    """The vectors grow with the layers; the projections do not, but they are large."""
    numbers = sum(rank + out for out, _ in shapes)
    if projections:
        numbers += rank * (max(into for _, into in shapes) + max(out for out, _ in shapes))
    return 4 * numbers


def vera_reach(A: Tensor, B: Tensor, b: Tensor, d: Tensor) -> tuple[int, int]:
    """dW is linear in b and linear in d, so each derivative is dW's own formula with a unit vector in the place of one of them."""
    rows = (B * d) @ A                                                       # (out, in): dW = diag(b) · rows
    by_b = torch.diag(torch.ones_like(b))[:, :, None] * rows                 # (out, out, in): entry i moves row i
    by_d = (b[:, None] * B).T[:, :, None] * A[:, None]                       # (rank, out, in): entry k moves a matrix of rank 1
    jacobian = torch.cat([by_b, by_d]).flatten(1)                            # (out + rank, out · in)
    return tuple(int(torch.linalg.matrix_rank(M, rtol=1e-10)) for M in (b[:, None] * rows, jacobian))
