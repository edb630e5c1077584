"""Right answers in another style, each of which the tests must accept."""

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn


def svd_forward__einsum(x: Tensor, W: Tensor, P: Tensor, lam: Tensor, Q: Tensor, scale: float) -> Tensor:
    return torch.einsum("...i,oi->...o", x, W) + torch.einsum("...i,ri,r,or->...o", x, Q, lam * scale, P)


def svd_forward__a_triplet_at_a_time(x: Tensor, W: Tensor, P: Tensor, lam: Tensor, Q: Tensor, scale: float) -> Tensor:
    y = x @ W.T
    for k in range(len(lam)):
        y = y + scale * lam[k] * (x @ Q[k])[..., None] * P[:, k]
    return y


def orthogonality__loop(Ps: list[Tensor], Qs: list[Tensor]) -> Tensor:
    total = torch.zeros((), dtype=Ps[0].dtype)
    for M in [*(P.mT for P in Ps), *Qs]:
        total = total + torch.dist(torch.einsum("ri,si->rs", M, M), torch.eye(M.size(0), dtype=M.dtype))
    return total / (len(Ps) + len(Qs))


def orthogonality__by_the_identity(Ps: list[Tensor], Qs: list[Tensor]) -> Tensor:
    squares = [((M @ M.T) ** 2).sum() - 2 * (M**2).sum() + len(M) for M in [P.T for P in Ps] + Qs]      # ‖G − 1‖² = ‖G‖² − 2 tr G + r
    return sum(square.clamp(min=torch.finfo(square.dtype).tiny).sqrt() for square in squares) / len(squares)      # at 0 a root has no slope


def smoothed__lerp(w: Tensor, gradient: Tensor, sensitivity: Tensor, uncertainty: Tensor, beta1: float, beta2: float) -> tuple[Tensor, Tensor]:
    I = torch.abs(w.detach()) * torch.abs(gradient)
    new = I.lerp(sensitivity, beta1)
    return new, torch.lerp((new - I).abs(), uncertainty, beta2)


def smoothed__numpy(w: Tensor, gradient: Tensor, sensitivity: Tensor, uncertainty: Tensor, beta1: float, beta2: float) -> tuple[Tensor, Tensor]:
    w, gradient, mean, spread = (t.detach().numpy() for t in (w, gradient, sensitivity, uncertainty))
    I = np.abs(w * gradient)
    mean = mean + (1 - beta1) * (I - mean)
    return torch.from_numpy(mean), torch.from_numpy(spread + (1 - beta2) * (np.abs(I - mean) - spread))


def triplet_importance__einsum(sensitivity: dict[str, Tensor], uncertainty: dict[str, Tensor]) -> Tensor:
    of_P = torch.einsum("or,or->r", sensitivity["P"], uncertainty["P"]) / sensitivity["P"].size(0)
    of_Q = torch.einsum("ri,ri->r", sensitivity["Q"], uncertainty["Q"]) / sensitivity["Q"].size(1)
    return of_P + of_Q + sensitivity["lam"].mul(uncertainty["lam"])


def triplet_importance__loop(sensitivity: dict[str, Tensor], uncertainty: dict[str, Tensor]) -> Tensor:
    score = {name: sensitivity[name] * uncertainty[name] for name in sensitivity}
    return torch.stack([score["lam"][k] + score["P"][:, k].mean() + score["Q"][k].mean() for k in range(len(score["lam"]))])


def budget__clamped(step: int, total: int, warmup: int, final: int, first: int, last: int) -> int:
    begin, end = warmup, total - final
    gone = min(max((step - begin) / (end - begin), 0.0), 1.0)
    return last if step == total - 1 else last + math.floor((first - last) * (1.0 - gone) ** 3)


def budget__whole_numbers(step: int, total: int, warmup: int, final: int, first: int, last: int) -> int:
    span = total - final - warmup
    to_go = min(max(span - (step - warmup), 0), span)
    return last if step + 1 >= total else last + (first - last) * to_go**3 // span**3


def keep_best__sorted(importance: Tensor, budget: int) -> Tensor:
    values = importance.tolist()
    places = sorted(((-value, k, layer) for k, row in enumerate(values) for layer, value in enumerate(row)))
    mask = torch.zeros_like(importance, dtype=torch.bool)
    for _, k, layer in places[:budget]:
        mask[k, layer] = True
    return mask


def keep_best__places(importance: Tensor, budget: int) -> Tensor:
    order = torch.argsort(-importance.reshape(-1), stable=True)
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order))
    return (place < budget).reshape(*importance.shape)


def revive__multiplied(lams: list[nn.Parameter], train_step: Callable[[int], None], choose: Callable[[int], Tensor | None], steps: int) -> list[list[int]]:
    film = []
    for step in range(steps):
        train_step(step)
        kept = choose(step)
        with torch.no_grad():
            for i in range(len(lams) if kept is not None else 0):
                lams[i].mul_(kept[:, i])
        film += [[sum(value != 0 for value in lam.tolist()) for lam in lams]]
    return film


def revive__new_data(lams: list[nn.Parameter], train_step: Callable[[int], None], choose: Callable[[int], Tensor | None], steps: int) -> list[list[int]]:
    film = []
    for step in range(steps):
        train_step(step)
        if (mask := choose(step)) is not None:
            for lam, kept in zip(lams, mask.T):
                lam.data = lam.data * kept
        film.append([int((lam != 0).sum()) for lam in lams])
    return film


def revive__one_by_one(lams: list[nn.Parameter], train_step: Callable[[int], None], choose: Callable[[int], Tensor | None], steps: int) -> list[list[int]]:
    def frame(step):
        train_step(step)
        mask = choose(step)
        for layer, lam in enumerate(lams):
            for k in range(len(lam)):
                if mask is not None and not mask[k][layer]:
                    lam.data[k] = 0.0
        return [torch.count_nonzero(lam.detach()).item() for lam in lams]

    return [frame(step) for step in range(steps)]
