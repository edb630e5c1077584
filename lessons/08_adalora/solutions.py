"""Lesson 08, worked. The same names and signatures as in exercises.py."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def svd_forward(x: Tensor, W: Tensor, P: Tensor, lam: Tensor, Q: Tensor, scale: float) -> Tensor:
    """Λ is diagonal: it only makes each of the r numbers louder or softer."""
    z = lam * F.linear(x, Q)                                                  # (..., in) -> (..., r)
    return F.linear(x, W) + scale * F.linear(z, P)                            # (..., r) -> (..., out)


def orthogonality(Ps: list[Tensor], Qs: list[Tensor]) -> Tensor:
    """P has its directions in columns, Q in rows: either way the r × r products of each with each should be 1."""
    grams = [P.T @ P for P in Ps] + [Q @ Q.T for Q in Qs]
    norms = [(gram - torch.eye(len(gram)).to(gram)).norm() for gram in grams]
    return torch.stack(norms).mean()


@torch.no_grad()
def smoothed(w: Tensor, gradient: Tensor, sensitivity: Tensor, uncertainty: Tensor, beta1: float, beta2: float) -> tuple[Tensor, Tensor]:
    """First the mean, and then how far today is from it: two notes, no part of the loss."""
    I = (w * gradient).abs()
    sensitivity = beta1 * sensitivity + (1 - beta1) * I
    uncertainty = beta2 * uncertainty + (1 - beta2) * (I - sensitivity).abs()
    return sensitivity, uncertainty


def triplet_importance(sensitivity: dict[str, Tensor], uncertainty: dict[str, Tensor]) -> Tensor:
    """The product for each weight first, the mean over a triplet's weights afterwards."""
    P, lam, Q = (sensitivity[name] * uncertainty[name] for name in ("P", "lam", "Q"))
    return lam + P.mean(dim=0) + Q.mean(dim=1)


def budget(step: int, total: int, warmup: int, final: int, first: int, last: int) -> int:
    """Fast at first, while there is much to cut, and slow where every cut hurts."""
    if step >= total - max(final, 1):
        return last
    gone = max(step - warmup, 0) / (total - final - warmup)
    return int(last + (first - last) * (1 - gone) ** 3)


@torch.no_grad()
def keep_best(importance: Tensor, budget: int) -> Tensor:
    """A stable sort leaves equals in their order, and the order of (r, layers) laid flat is just the one that is asked for."""
    best = importance.flatten().argsort(descending=True, stable=True)[:budget]
    mask = torch.zeros(importance.numel(), dtype=torch.bool, device=importance.device)
    mask[best] = True
    return mask.view(importance.shape)


def revive(lams: list[nn.Parameter], train_step: Callable[[int], None], choose: Callable[[int], Tensor | None], steps: int) -> list[list[int]]:
    """In place: a cut is one zero written once. Whoever is still trained may grow again."""
    film = []
    for step in range(steps):
        train_step(step)
        mask = choose(step)
        if mask is not None:
            with torch.no_grad():
                for lam, kept in zip(lams, mask.unbind(dim=1)):
                    lam.masked_fill_(~kept, 0.0)
        film.append([int(lam.count_nonzero()) for lam in lams])
    return film
