"""Lesson 06, worked. The same names and signatures as in exercises.py."""

import torch
import torch.nn.functional as F
from torch import Tensor


def literal_update(W: Tensor, A: Tensor, B: Tensor, A_next: Tensor, B_next: Tensor, scale: float, delta_ratio: float) -> Tensor:
    """The difference of the products. The product of the differences is another thing, and a far smaller one."""
    return W + delta_ratio * scale * (B_next @ A_next - B @ A)


def telescope(W_0: Tensor, A_K: Tensor, B_K: Tensor, A: Tensor, B: Tensor, scale: float, delta_ratio: float) -> Tensor:
    """Every product in between is added once and taken away once."""
    W = W_0 + delta_ratio * scale * (B @ A - B_K @ A_K)
    return W + scale * B @ A


def swallowed(weight: float, update: float, times: int, dtype: torch.dtype) -> int:
    """A sum that is nearer to the old number than to the next one is stored as the old number."""
    w, step = torch.tensor(weight, dtype=dtype), torch.tensor(update, dtype=dtype)
    lost = 0
    for _ in range(times):
        moved = w + step
        lost += int(moved == w)
        w = moved
    return lost


def lora_in_disguise(alpha: float, delta_ratio: float) -> tuple[float, float]:
    """W_eff = W_0 + (1 + λ) s B A, but the gradient comes through s B A alone: it is 1 + λ times smaller than that LoRA's, and Adam divides it out."""
    return (1 + delta_ratio) * alpha, 1 / (1 + delta_ratio)


def delta_lora_forward(x: Tensor, W_0: Tensor, A_K: Tensor, B_K: Tensor, A: Tensor, B: Tensor, scale: float, delta_ratio: float) -> Tensor:
    """`detach` is where the paper's "no gradient for W" stands in the code."""
    lora = x @ A.T @ B.T                                                     # (..., in) -> (..., rank) -> (..., out)
    moved = x @ A.detach().T @ B.detach().T - x @ A_K.detach().T @ B_K.detach().T
    return F.linear(x, W_0.detach()) + scale * lora + delta_ratio * scale * moved


def rank_of_the_change(A_K: Tensor, B_K: Tensor, A: Tensor, B: Tensor) -> int:
    """B A - B_K A_K = [B, B_K] [A; -A_K] = Q (R Sᵀ) Pᵀ with Q and P orthonormal: the small R Sᵀ has the same singular values."""
    R = torch.linalg.qr(torch.cat([B, B_K], dim=1)).R                        # (2 rank, 2 rank)
    S = torch.linalg.qr(torch.cat([A, -A_K]).T).R
    values = torch.linalg.svdvals(R @ S.T)
    return int((values > 1e-10 * R.norm() * S.norm()).sum())                 # ‖R‖ = ‖[B, B_K]‖, ‖S‖ = ‖[A; A_K]‖


def as_plain_lora(A_K: Tensor, B_K: Tensor, A: Tensor, B: Tensor, alpha: float, delta_ratio: float) -> tuple[Tensor, Tensor, float]:
    """W_eff - W_0 = (1 + λ) s (B A - λ / (1 + λ) · B_K A_K), and alpha₂ is over 2 rank."""
    share = delta_ratio / (1 + delta_ratio)
    return torch.cat([A, A_K]), torch.cat([B, -share * B_K], dim=1), 2 * (1 + delta_ratio) * alpha
