"""Lesson 11, worked. The same names and signatures as in exercises.py."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def rslora_scale(alpha: float, rank: int, rslora: bool) -> float:
    """At rank 1 the two are one; at rank 64 they are a factor of 8 apart."""
    return alpha / (math.sqrt(rank) if rslora else rank)


def dora_forward(x: Tensor, W: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, magnitude: Tensor, scale: float) -> Tensor:
    """A row of W' has the direction of V's row, and the length that m says. Through n no gradient goes."""
    V = W + scale * B @ A                                                    # (out, in)
    n = torch.linalg.vector_norm(V, dim=1).detach()                          # (out)
    return F.linear(x, (magnitude / n)[:, None] * V, bias)                   # (..., out)


@torch.no_grad()
def dora_gradient(G: Tensor, W: Tensor, A: Tensor, B: Tensor, magnitude: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """W' = (m / n) ⊙ V is linear in m, and linear in V as long as n is held. From V on it is LoRA."""
    V = W + scale * B @ A                                                    # (out, in)
    n = torch.linalg.vector_norm(V, dim=1)                                   # (out)
    to_V = (magnitude / n)[:, None] * G                                      # (out, in)
    return (G * V).sum(1) / n, scale * B.T @ to_V, scale * to_V @ A.T


@torch.no_grad()
def pissa_split(W: Tensor, rank: int, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """Eckart and Young (1936): to cut the SVD is the best that a matrix of this rank can do."""
    U, S, Vt = torch.linalg.svd(W.double(), full_matrices=False)
    root = (S[:rank] / scale).sqrt()                                         # (rank)
    A, B = root[:, None] * Vt[:rank], U[:, :rank] * root
    return A.to(W), B.to(W), (W - scale * B @ A).to(W)


@torch.no_grad()
def loftq_alternate(W: Tensor, rank: int, iterations: int, scale: float, quantize: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Each line takes the other's result as given and does its own best."""
    if iterations < 1:
        raise ValueError(f"at least one iteration is needed to have a Q, got {iterations}")
    BA = torch.zeros_like(W)                                                 # s · B A
    for _ in range(iterations):
        Q = quantize(W - BA)
        U, S, Vt = torch.linalg.svd(W - Q, full_matrices=False)
        root = (S[:rank] / scale).sqrt()                                     # (rank)
        A, B = root[:, None] * Vt[:rank], U[:, :rank] * root
        BA = scale * B @ A
    return Q, A, B


def intruders(W: Tensor, dW: Tensor, top: int, threshold: float) -> int:
    """The columns of U have length 1, so a product of two of them is a cosine; an SVD leaves their signs open."""
    U, new = (torch.linalg.svd(M, full_matrices=False).U for M in (W, W + dW))
    cosines = (U.T @ new[:, :top]).abs()                                     # (old, new)
    return int((cosines.amax(0) < threshold).sum())
