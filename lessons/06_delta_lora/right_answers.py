"""Right answers in another style, each of which the tests must accept."""

import torch
from torch import Tensor


def literal_update__in_place_on_a_copy(W: Tensor, A: Tensor, B: Tensor, A_next: Tensor, B_next: Tensor, scale: float, delta_ratio: float) -> Tensor:
    moved = W.clone()
    moved += scale * delta_ratio * torch.einsum("or,ri->oi", B_next, A_next)
    moved -= scale * delta_ratio * torch.einsum("or,ri->oi", B, A)
    return moved


def telescope__collected(W_0: Tensor, A_K: Tensor, B_K: Tensor, A: Tensor, B: Tensor, scale: float, delta_ratio: float) -> Tensor:
    return torch.cat([(1 + delta_ratio) * B, -delta_ratio * B_K], dim=1) @ torch.cat([A, A_K]) * scale + W_0


def swallowed__through_to(weight: float, update: float, times: int, dtype: torch.dtype) -> int:
    stored, step, count = torch.tensor([weight]).to(dtype), torch.tensor([update]).to(dtype), 0
    for _ in range(times):
        before = stored.clone()
        stored += step
        count += 1 if torch.equal(before, stored) else 0
    return count


def delta_lora_forward__fused(x: Tensor, W_0: Tensor, A_K: Tensor, B_K: Tensor, A: Tensor, B: Tensor, scale: float, delta_ratio: float) -> Tensor:
    with torch.no_grad():
        A_2, B_2 = torch.cat([A, A_K]), torch.cat([B, -B_K], dim=1)
    return x @ W_0.detach().T + (scale * x) @ A.T @ B.T + (delta_ratio * scale) * (x @ A_2.T @ B_2.T)


def rank_of_the_change__gram(A_K: Tensor, B_K: Tensor, A: Tensor, B: Tensor) -> int:
    left, right = torch.cat([B, B_K], dim=1), torch.cat([A, -A_K], dim=0)
    U, S, Vt = torch.linalg.svd(left, full_matrices=False)
    values, least = torch.linalg.svdvals((S[:, None] * Vt) @ right), 1e-10 * left.norm().item() * right.norm().item()
    return sum(1 for value in values.tolist() if value > least)
