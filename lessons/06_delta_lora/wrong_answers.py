"""Plausible mistakes in lesson 06, each of which the tests must reject with the message named here."""

import torch
import torch.nn.functional as F
from torch import Tensor

from lessons import provokes


@provokes("product of the deltas")
def literal_update__product_of_deltas(W: Tensor, A: Tensor, B: Tensor, A_next: Tensor, B_next: Tensor, scale: float, delta_ratio: float) -> Tensor:
    return W + delta_ratio * scale * (B_next - B) @ (A_next - A)


@provokes("λ is missing")
def literal_update__no_ratio(W: Tensor, A: Tensor, B: Tensor, A_next: Tensor, B_next: Tensor, scale: float, delta_ratio: float) -> Tensor:
    return W + scale * (B_next @ A_next - B @ A)


@provokes("the scale s is missing")
def literal_update__no_scale(W: Tensor, A: Tensor, B: Tensor, A_next: Tensor, B_next: Tensor, scale: float, delta_ratio: float) -> Tensor:
    return W + delta_ratio * (B_next @ A_next - B @ A)


@provokes("only the new product is added")
def literal_update__old_product_stays(W: Tensor, A: Tensor, B: Tensor, A_next: Tensor, B_next: Tensor, scale: float, delta_ratio: float) -> Tensor:
    return W + delta_ratio * scale * B_next @ A_next


@provokes("W")
def literal_update__in_place(W: Tensor, A: Tensor, B: Tensor, A_next: Tensor, B_next: Tensor, scale: float, delta_ratio: float) -> Tensor:
    W += delta_ratio * scale * (B_next @ A_next - B @ A)
    return W


@provokes("the start (A_K, B_K) is not taken away")
def telescope__from_zero(W_0: Tensor, A_K: Tensor, B_K: Tensor, A: Tensor, B: Tensor, scale: float, delta_ratio: float) -> Tensor:
    return W_0 + (1 + delta_ratio) * scale * B @ A


@provokes("LoRA's branch is still there")
def telescope__w_alone(W_0: Tensor, A_K: Tensor, B_K: Tensor, A: Tensor, B: Tensor, scale: float, delta_ratio: float) -> Tensor:
    return W_0 + delta_ratio * scale * (B @ A - B_K @ A_K)


@provokes("it went only into W's part")
def telescope__start_from_everything(W_0: Tensor, A_K: Tensor, B_K: Tensor, A: Tensor, B: Tensor, scale: float, delta_ratio: float) -> Tensor:
    return W_0 + (1 + delta_ratio) * scale * (B @ A - B_K @ A_K)


@provokes("λ is missing")
def telescope__no_ratio(W_0: Tensor, A_K: Tensor, B_K: Tensor, A: Tensor, B: Tensor, scale: float, delta_ratio: float) -> Tensor:
    return W_0 + scale * (B @ A - B_K @ A_K) + scale * B @ A


@provokes("a finer copy is kept")
def swallowed__exact_copy(weight: float, update: float, times: int, dtype: torch.dtype) -> int:
    return sum((weight + (i + 1) * update) == (weight + i * update) for i in range(times))


@provokes("it never grows")
def swallowed__weight_never_replaced(weight: float, update: float, times: int, dtype: torch.dtype) -> int:
    w, step = torch.tensor(weight, dtype=dtype), torch.tensor(update, dtype=dtype)
    return sum(int(w + step == w) for _ in range(times))


@provokes("not with the first number")
def swallowed__compared_with_the_first(weight: float, update: float, times: int, dtype: torch.dtype) -> int:
    first = w = torch.tensor(weight, dtype=dtype)
    step = torch.tensor(update, dtype=dtype)
    lost = 0
    for _ in range(times):
        w = w + step
        lost += int(w == first) or int(w >= 1)
    return lost


@provokes("λ alone is what W has")
def lora_in_disguise__ratio_alone(alpha: float, delta_ratio: float) -> tuple[float, float]:
    return delta_ratio * alpha, 1 / delta_ratio


@provokes("under SGD")
def lora_in_disguise__same_rate(alpha: float, delta_ratio: float) -> tuple[float, float]:
    return (1 + delta_ratio) * alpha, 1.0


@provokes("under SGD")
def lora_in_disguise__rate_squared(alpha: float, delta_ratio: float) -> tuple[float, float]:
    return (1 + delta_ratio) * alpha, 1 / (1 + delta_ratio) ** 2


@provokes("under Adam")
def lora_in_disguise__same_alpha(alpha: float, delta_ratio: float) -> tuple[float, float]:
    return alpha, 1 + delta_ratio


@provokes("1 + λ times too much")
def delta_lora_forward__nothing_detached(x: Tensor, W_0: Tensor, A_K: Tensor, B_K: Tensor, A: Tensor, B: Tensor, scale: float, delta_ratio: float) -> Tensor:
    moved = x @ A.T @ B.T - x @ A_K.detach().T @ B_K.detach().T
    return F.linear(x, W_0.detach()) + scale * x @ A.T @ B.T + delta_ratio * scale * moved


@provokes("W_0 receives a gradient")
def delta_lora_forward__w_trains(x: Tensor, W_0: Tensor, A_K: Tensor, B_K: Tensor, A: Tensor, B: Tensor, scale: float, delta_ratio: float) -> Tensor:
    moved = x @ A.detach().T @ B.detach().T - x @ A_K.detach().T @ B_K.detach().T
    return F.linear(x, W_0) + scale * x @ A.T @ B.T + delta_ratio * scale * moved


@provokes("x is cut off")
def delta_lora_forward__product_detached(x: Tensor, W_0: Tensor, A_K: Tensor, B_K: Tensor, A: Tensor, B: Tensor, scale: float, delta_ratio: float) -> Tensor:
    moved = (x @ A.T @ B.T - x @ A_K.T @ B_K.T).detach()
    return F.linear(x, W_0.detach()) + scale * x @ A.T @ B.T + delta_ratio * scale * moved


@provokes("an (out, in) matrix was made")
def delta_lora_forward__through_w_eff(x: Tensor, W_0: Tensor, A_K: Tensor, B_K: Tensor, A: Tensor, B: Tensor, scale: float, delta_ratio: float) -> Tensor:
    W = (W_0 + delta_ratio * scale * (B @ A - B_K @ A_K)).detach()
    return F.linear(x, W) + scale * x @ A.T @ B.T


@provokes("is LoRA's rank")
def rank_of_the_change__of_lora(A_K: Tensor, B_K: Tensor, A: Tensor, B: Tensor) -> int:
    return A.shape[0]


@provokes("nothing moved: the rank")
def rank_of_the_change__counted_only(A_K: Tensor, B_K: Tensor, A: Tensor, B: Tensor) -> int:
    return min(2 * A.shape[0], A.shape[1], B.shape[0])


@provokes("an (out, in) matrix was made")
def rank_of_the_change__dense(A_K: Tensor, B_K: Tensor, A: Tensor, B: Tensor) -> int:
    return int(torch.linalg.matrix_rank(B @ A - B_K @ A_K))


@provokes("nothing moved")
def rank_of_the_change__of_its_own_rounding(A_K: Tensor, B_K: Tensor, A: Tensor, B: Tensor) -> int:
    R, S = torch.linalg.qr(torch.cat([B, B_K], dim=1)).R, torch.linalg.qr(torch.cat([A, -A_K]).T).R
    values = torch.linalg.svdvals(R @ S.T)
    return int((values > 1e-10 * values[0]).sum())


@provokes("all is small")
def rank_of_the_change__absolute_threshold(A_K: Tensor, B_K: Tensor, A: Tensor, B: Tensor) -> int:
    R, S = torch.linalg.qr(torch.cat([B, B_K], dim=1)).R, torch.linalg.qr(torch.cat([A, -A_K]).T).R
    return int((torch.linalg.svdvals(R @ S.T) > 1e-10).sum())


@provokes("of twice the rank, so alpha₂ doubles too")
def as_plain_lora__alpha_not_doubled(A_K: Tensor, B_K: Tensor, A: Tensor, B: Tensor, alpha: float, delta_ratio: float) -> tuple[Tensor, Tensor, float]:
    return torch.cat([A, A_K]), torch.cat([B, -delta_ratio / (1 + delta_ratio) * B_K], dim=1), (1 + delta_ratio) * alpha


@provokes("has to be taken away")
def as_plain_lora__sign_lost(A_K: Tensor, B_K: Tensor, A: Tensor, B: Tensor, alpha: float, delta_ratio: float) -> tuple[Tensor, Tensor, float]:
    return torch.cat([A, A_K]), torch.cat([B, delta_ratio / (1 + delta_ratio) * B_K], dim=1), 2 * (1 + delta_ratio) * alpha


@provokes("needs the factor λ / (1 + λ)")
def as_plain_lora__start_taken_whole(A_K: Tensor, B_K: Tensor, A: Tensor, B: Tensor, alpha: float, delta_ratio: float) -> tuple[Tensor, Tensor, float]:
    return torch.cat([A, A_K]), torch.cat([B, -B_K], dim=1), 2 * (1 + delta_ratio) * alpha


@provokes("B₂ begins with B itself")
def as_plain_lora__factors_in_B(A_K: Tensor, B_K: Tensor, A: Tensor, B: Tensor, alpha: float, delta_ratio: float) -> tuple[Tensor, Tensor, float]:
    return torch.cat([A, A_K]), torch.cat([(1 + delta_ratio) * B, -delta_ratio * B_K], dim=1), 2 * alpha
