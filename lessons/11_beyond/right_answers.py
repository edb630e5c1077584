"""Right answers in another style, each of which the tests must accept."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor


def rslora_scale__power(alpha: float, rank: int, rslora: bool) -> float:
    exponent = -0.5 if rslora else -1
    return alpha * rank**exponent


def dora_forward__by_parts(x: Tensor, W: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, magnitude: Tensor, scale: float) -> Tensor:
    with torch.no_grad():
        n2 = W.square().sum(1) + 2 * scale * torch.einsum("oi,ri,or->o", W, A, B) + scale**2 * torch.einsum("or,ri,qi,oq->o", B, A, A, B)
    y = (x @ W.T + scale * (x @ A.T) @ B.T) * (magnitude * n2.rsqrt())
    return y if bias is None else y + bias


def dora_forward__normalize(x: Tensor, W: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, magnitude: Tensor, scale: float) -> Tensor:
    V = torch.addmm(W, B, A, alpha=scale)
    lengths = torch.stack([row.norm() for row in V.detach()])
    rows = torch.diag(magnitude) @ torch.diag(1 / lengths) @ V
    out = torch.einsum("...i,oi->...o", x, rows)
    return out if bias is None else bias + out


def dora_gradient__row_by_row(G: Tensor, W: Tensor, A: Tensor, B: Tensor, magnitude: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    dm, dA, dB = torch.empty_like(magnitude), torch.zeros_like(A), torch.empty_like(B)
    for o, (g, w, b, m) in enumerate(zip(G, W, B, magnitude)):
        v = w + scale * b @ A                                                # (in)
        n = v.dot(v).sqrt()
        dm[o] = g.dot(v) / n
        dA += scale * m / n * torch.outer(b, g)
        dB[o] = scale * m / n * A @ g
    return dm, dA, dB


def dora_gradient__einsum(G: Tensor, W: Tensor, A: Tensor, B: Tensor, magnitude: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    V = W + scale * torch.einsum("or,ri->oi", B, A)
    n = V.pow(2).sum(-1).sqrt()
    g = magnitude / n * scale
    return torch.einsum("oi,oi,o->o", G, V, 1 / n), torch.einsum("o,or,oi->ri", g, B, G), torch.einsum("o,oi,ri->or", g, G, A)


def pissa_split__numpy(W: Tensor, rank: int, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    M = W.to(torch.float64).numpy()
    U, S, Vt = np.linalg.svd(M, full_matrices=False)
    root = np.diag(np.sqrt(S[:rank] / scale))
    A, B = root @ Vt[:rank], U[:, :rank] @ root
    return tuple(torch.from_numpy(np.ascontiguousarray(part)).to(W.dtype) for part in (A, B, M - scale * B @ A))


def pissa_split__gram(W: Tensor, rank: int, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """Through the eigenvectors of Wᵀ W: the right singular vectors."""
    M = W.double()
    values, vectors = torch.linalg.eigh(M.T @ M)
    S, V = values.flip(0)[:rank].clamp_min(0).sqrt(), vectors.flip(1)[:, :rank]
    U = M @ V / S
    A, B = (V * (S / scale).sqrt()).T, U * (S / scale).sqrt()
    return A.to(W.dtype), B.to(W.dtype), (M - M @ V @ V.T).to(W.dtype)


def loftq_alternate__residual(W: Tensor, rank: int, iterations: int, scale: float, quantize: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    if not iterations >= 1:
        raise ValueError("iterations must be at least 1")
    A, B = W.new_zeros(rank, W.shape[1]), W.new_zeros(W.shape[0], rank)
    while iterations:
        Q = quantize(torch.addmm(W, B, A, alpha=-scale))
        U, S, V = torch.svd(W - Q)
        A, B = ((S / scale).sqrt() * V)[:, :rank].T, ((S / scale).sqrt() * U)[:, :rank]
        iterations -= 1
    return Q, A, B


def intruders__loop(W: Tensor, dW: Tensor, top: int, threshold: float) -> int:
    old = np.linalg.svd(W.numpy(), full_matrices=False)[0]
    new = np.linalg.svd((W + dW).numpy(), full_matrices=False)[0]
    count = 0
    for j in range(min(top, new.shape[1])):
        count += max(abs(float(new[:, j] @ old[:, i])) for i in range(old.shape[1])) < threshold
    return int(count)


def intruders__eigh(W: Tensor, dW: Tensor, top: int, threshold: float) -> int:
    def left(M):
        return torch.linalg.eigh(M @ M.T).eigenvectors.flip(1)[:, :min(M.shape)]

    return sum(1 for column in left(W + dW)[:, :top].T if (left(W).T @ column).abs().max() < threshold)
