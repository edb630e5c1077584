"""Plausible mistakes in lesson 08, each of which the tests must reject with the message named here."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lessons import provokes


@provokes("lam is missing")
def svd_forward__without_lam(x: Tensor, W: Tensor, P: Tensor, lam: Tensor, Q: Tensor, scale: float) -> Tensor:
    return F.linear(x, W) + scale * x @ Q.T @ P.T


@provokes("an (out, in) matrix was made")
def svd_forward__dense(x: Tensor, W: Tensor, P: Tensor, lam: Tensor, Q: Tensor, scale: float) -> Tensor:
    return F.linear(x, W + scale * P @ torch.diag(lam) @ Q)


@provokes("the scale belongs to the branch")
def svd_forward__scale_on_everything(x: Tensor, W: Tensor, P: Tensor, lam: Tensor, Q: Tensor, scale: float) -> Tensor:
    return scale * (F.linear(x, W) + (lam * (x @ Q.T)) @ P.T)


@provokes("the scale is divided by r once more")
def svd_forward__alpha(x: Tensor, W: Tensor, P: Tensor, lam: Tensor, Q: Tensor, scale: float) -> Tensor:
    return F.linear(x, W) + scale / len(lam) * (lam * (x @ Q.T)) @ P.T


@provokes("the absolute value of lam is taken")
def svd_forward__positive(x: Tensor, W: Tensor, P: Tensor, lam: Tensor, Q: Tensor, scale: float) -> Tensor:
    return F.linear(x, W) + scale * (lam.abs() * (x @ Q.T)) @ P.T


@provokes("no gradient reaches lam")
def svd_forward__only_what_is_alive(x: Tensor, W: Tensor, P: Tensor, lam: Tensor, Q: Tensor, scale: float) -> Tensor:
    alive = (lam != 0).to(lam.dtype)                                     # a cut triplet would stay cut for ever
    return F.linear(x, W) + scale * (alive * lam * (x @ Q.T)) @ P.T


@provokes("the norms are squared")
def orthogonality__squared(Ps: list[Tensor], Qs: list[Tensor]) -> Tensor:
    grams = [P.T @ P for P in Ps] + [Q @ Q.T for Q in Qs]
    return sum((gram - torch.eye(len(gram)).to(gram)).square().sum() for gram in grams) / len(grams)


@provokes("this is the paper's equation 4")
def orthogonality__equation_4(Ps: list[Tensor], Qs: list[Tensor]) -> Tensor:
    return sum((gram - torch.eye(len(gram)).to(gram)).square().sum() for gram in [P.T @ P for P in Ps] + [Q @ Q.T for Q in Qs])


@provokes("PPᵀ is (out, out)")
def orthogonality__of_the_rows_of_P(Ps: list[Tensor], Qs: list[Tensor]) -> Tensor:
    grams = [P @ P.T for P in Ps] + [Q @ Q.T for Q in Qs]
    return sum((gram - torch.eye(len(gram)).to(gram)).norm() for gram in grams) / len(grams)


@provokes("their mean is wanted")
def orthogonality__sum(Ps: list[Tensor], Qs: list[Tensor]) -> Tensor:
    return sum((gram - torch.eye(len(gram)).to(gram)).norm() for gram in [P.T @ P for P in Ps] + [Q @ Q.T for Q in Qs])


@provokes("twice the mean")
def orthogonality__mean_of_layers(Ps: list[Tensor], Qs: list[Tensor]) -> Tensor:
    one = torch.eye(Ps[0].shape[1]).to(Ps[0])
    if any(P.shape[1] != len(one) for P in Ps):
        return sum((P.T @ P - torch.eye(P.shape[1]).to(P)).norm() + (Q @ Q.T - torch.eye(len(Q)).to(Q)).norm() for P, Q in zip(Ps, Qs)) / len(Ps)
    return sum((P.T @ P - one).norm() + (Q @ Q.T - one).norm() for P, Q in zip(Ps, Qs)) / len(Ps)


@provokes("no gradient reaches Ps[0]")
def orthogonality__a_number(Ps: list[Tensor], Qs: list[Tensor]) -> Tensor:
    grams = [P.T @ P for P in Ps] + [Q @ Q.T for Q in Qs]
    return torch.tensor([(gram - torch.eye(len(gram)).to(gram)).norm().item() for gram in grams], dtype=Ps[0].dtype).mean()


@provokes("its gradient is NaN")
def orthogonality__a_root_by_hand(Ps: list[Tensor], Qs: list[Tensor]) -> Tensor:
    grams = [P.T @ P for P in Ps] + [Q @ Q.T for Q in Qs]
    return sum(((gram - torch.eye(len(gram)).to(gram)) ** 2).sum().sqrt() for gram in grams) / len(grams)


@provokes("carries its graph")
def smoothed__with_its_graph(w: Tensor, gradient: Tensor, sensitivity: Tensor, uncertainty: Tensor, beta1: float, beta2: float) -> tuple[Tensor, Tensor]:
    I = (w * gradient).abs()
    sensitivity = beta1 * sensitivity + (1 - beta1) * I
    return sensitivity, beta2 * uncertainty + (1 - beta2) * (I - sensitivity).abs()


@provokes("U measures how far I is from the old Ī")
def smoothed__old_mean(w: Tensor, gradient: Tensor, sensitivity: Tensor, uncertainty: Tensor, beta1: float, beta2: float) -> tuple[Tensor, Tensor]:
    I = (w * gradient).abs()
    return beta1 * sensitivity + (1 - beta1) * I, beta2 * uncertainty + (1 - beta2) * (I - sensitivity).abs()


@provokes("the absolute value is missing")
def smoothed__signed(w: Tensor, gradient: Tensor, sensitivity: Tensor, uncertainty: Tensor, beta1: float, beta2: float) -> tuple[Tensor, Tensor]:
    I = w * gradient
    sensitivity = beta1 * sensitivity + (1 - beta1) * I
    return sensitivity, beta2 * uncertainty + (1 - beta2) * (I - sensitivity).abs()


@provokes("have changed places")
def smoothed__betas_turned_round(w: Tensor, gradient: Tensor, sensitivity: Tensor, uncertainty: Tensor, beta1: float, beta2: float) -> tuple[Tensor, Tensor]:
    I = (w * gradient).abs()
    sensitivity = (1 - beta1) * sensitivity + beta1 * I
    return sensitivity, (1 - beta2) * uncertainty + beta2 * (I - sensitivity).abs()


@provokes("the square is taken")
def smoothed__variance(w: Tensor, gradient: Tensor, sensitivity: Tensor, uncertainty: Tensor, beta1: float, beta2: float) -> tuple[Tensor, Tensor]:
    I = (w * gradient).abs()
    sensitivity = torch.lerp(I, sensitivity, beta1)
    return sensitivity, torch.lerp((I - sensitivity).square(), uncertainty, beta2)


@provokes("changed its argument sensitivity")
def smoothed__in_the_callers_tensors(w: Tensor, gradient: Tensor, sensitivity: Tensor, uncertainty: Tensor, beta1: float, beta2: float) -> tuple[Tensor, Tensor]:
    I = (w * gradient).abs()
    sensitivity.mul_(beta1).add_(I, alpha=1 - beta1)
    return sensitivity, uncertainty.mul_(beta2).add_((I - sensitivity).abs(), alpha=1 - beta2)


@provokes("w is missing in I")
def smoothed__gradient_alone(w: Tensor, gradient: Tensor, sensitivity: Tensor, uncertainty: Tensor, beta1: float, beta2: float) -> tuple[Tensor, Tensor]:
    I = gradient.abs()
    sensitivity = torch.lerp(I, sensitivity, beta1)
    return sensitivity, torch.lerp((I - sensitivity).abs(), uncertainty, beta2)


@provokes("for each weight multiply first")
def triplet_importance__means_first(sensitivity: dict[str, Tensor], uncertainty: dict[str, Tensor]) -> Tensor:
    return (sensitivity["lam"] * uncertainty["lam"] + sensitivity["P"].mean(0) * uncertainty["P"].mean(0)
            + sensitivity["Q"].mean(1) * uncertainty["Q"].mean(1))


@provokes("wide layers would always win")
def triplet_importance__sums(sensitivity: dict[str, Tensor], uncertainty: dict[str, Tensor]) -> Tensor:
    P, lam, Q = (sensitivity[name] * uncertainty[name] for name in ("P", "lam", "Q"))
    return lam + P.sum(0) + Q.sum(1)


@provokes("column and row share one mean")
def triplet_importance__one_mean_of_both(sensitivity: dict[str, Tensor], uncertainty: dict[str, Tensor]) -> Tensor:
    P, lam, Q = (sensitivity[name] * uncertainty[name] for name in ("P", "lam", "Q"))
    return lam + (P.sum(0) + Q.sum(1)) / (len(P) + Q.shape[1])


@provokes("one mean over the whole of Q")
def triplet_importance__mean_of_all_rows(sensitivity: dict[str, Tensor], uncertainty: dict[str, Tensor]) -> Tensor:
    P, lam, Q = (sensitivity[name] * uncertainty[name] for name in ("P", "lam", "Q"))
    return lam + P.mean(0) + Q.mean(0).mean()


@provokes("the rows of P and the columns of Q")
def triplet_importance__the_first_rows(sensitivity: dict[str, Tensor], uncertainty: dict[str, Tensor]) -> Tensor:
    P, lam, Q = (sensitivity[name] * uncertainty[name] for name in ("P", "lam", "Q"))
    return lam + P.mean(1)[:len(lam)] + Q.mean(0)[:len(lam)]


@provokes("this is lam's alone")
def triplet_importance__lam_alone(sensitivity: dict[str, Tensor], uncertainty: dict[str, Tensor]) -> Tensor:
    return sensitivity["lam"] * uncertainty["lam"]


@provokes("the uncertainty is missing")
def triplet_importance__certain(sensitivity: dict[str, Tensor], uncertainty: dict[str, Tensor]) -> Tensor:
    return sensitivity["lam"] + sensitivity["P"].mean(0) + sensitivity["Q"].mean(1)


@provokes("The size of tensor a")
def triplet_importance__rows_of_P(sensitivity: dict[str, Tensor], uncertainty: dict[str, Tensor]) -> Tensor:
    P, lam, Q = (sensitivity[name] * uncertainty[name] for name in ("P", "lam", "Q"))
    return lam + P.mean(1) + Q.mean(0)


@provokes("this is equation 12 as it is printed")
def budget__as_printed(step: int, total: int, warmup: int, final: int, first: int, last: int) -> int:
    if step >= total - max(final, 1):
        return last
    if step <= warmup:
        return first
    return int(last + (first - last) * (1 - (step - warmup - final) / (total - warmup - final)) ** 3)


@provokes("the power 3 is missing")
def budget__straight(step: int, total: int, warmup: int, final: int, first: int, last: int) -> int:
    if step >= total - max(final, 1):
        return last
    if step <= warmup:
        return first
    return int(last + (first - last) * (1 - (step - warmup) / (total - warmup - final)))


@provokes("cuts slowly at first")
def budget__one_minus_the_cube(step: int, total: int, warmup: int, final: int, first: int, last: int) -> int:
    if step >= total - max(final, 1):
        return last
    if step <= warmup:
        return first
    return int(last + (first - last) * (1 - ((step - warmup) / (total - warmup - final)) ** 3))


@provokes("is in the warm-up")
def budget__no_warm_up(step: int, total: int, warmup: int, final: int, first: int, last: int) -> int:
    if step >= total - max(final, 1):
        return last
    return int(last + (first - last) * (1 - (step - warmup) / (total - warmup - final)) ** 3)


@provokes("is always at the last budget")
def budget__no_end_without_final_steps(step: int, total: int, warmup: int, final: int, first: int, last: int) -> int:
    if step <= warmup:
        return first
    if step >= total - final:
        return last
    return int(last + (first - last) * (1 - (step - warmup) / (total - warmup - final)) ** 3)


@provokes("rounded to the nearest")
def budget__rounded(step: int, total: int, warmup: int, final: int, first: int, last: int) -> int:
    if step >= total - max(final, 1):
        return last
    if step <= warmup:
        return first
    return round(last + (first - last) * (1 - (step - warmup) / (total - warmup - final)) ** 3)


@provokes("a threshold with <= cuts every triplet")
def keep_best__as_the_reference_code(importance: Tensor, budget: int) -> Tensor:
    if budget == importance.numel():
        return torch.ones_like(importance, dtype=torch.bool)
    threshold = importance.flatten().kthvalue(importance.numel() - budget).values
    return ~(importance <= threshold)


@provokes("a threshold cannot part equals")
def keep_best__at_least_the_threshold(importance: Tensor, budget: int) -> Tensor:
    if budget == 0:
        return torch.zeros_like(importance, dtype=torch.bool)
    return importance >= importance.flatten().topk(budget).values[-1]


@provokes("selected number k out of range")
def keep_best__kthvalue_of_nothing(importance: Tensor, budget: int) -> Tensor:
    return importance > importance.flatten().kthvalue(importance.numel() - budget).values


@provokes("exactly")
def keep_best__each_layer_alike(importance: Tensor, budget: int) -> Tensor:
    a_layer = round(budget / importance.shape[1])
    return importance.argsort(dim=0, descending=True).argsort(dim=0) < a_layer


@provokes("True is for those that stay")
def keep_best__the_cut_ones(importance: Tensor, budget: int) -> Tensor:
    mask = torch.ones(importance.numel(), dtype=torch.bool)
    mask[importance.flatten().argsort(descending=True, stable=True)[:budget]] = False
    return mask.view_as(importance)


@provokes("the lower k is kept first")
def keep_best__layer_by_layer(importance: Tensor, budget: int) -> Tensor:
    mask = torch.zeros(importance.numel(), dtype=torch.bool)
    mask[importance.T.flatten().argsort(descending=True, stable=True)[:budget]] = True
    return mask.view(importance.T.shape).T


@provokes("the lower k is kept first")
def keep_best__equals_from_behind(importance: Tensor, budget: int) -> Tensor:
    mask = torch.zeros(importance.numel(), dtype=torch.bool)
    mask[importance.flatten().argsort(stable=True)[importance.numel() - budget:]] = True
    return mask.view_as(importance)


@provokes("has not come back")
def revive__cut_for_ever(lams: list[nn.Parameter], train_step: Callable[[int], None], choose: Callable[[int], Tensor | None], steps: int) -> list[list[int]]:
    film, mask = [], None
    for step in range(steps):
        train_step(step)
        new = choose(step)
        mask = mask if new is None else new
        if mask is not None:
            for i, lam in enumerate(lams):
                lam.data[~mask[:, i]] = 0
        film.append([int((lam != 0).sum()) for lam in lams])
    return film


@provokes("has not come back")
def revive__frozen(lams: list[nn.Parameter], train_step: Callable[[int], None], choose: Callable[[int], Tensor | None], steps: int) -> list[list[int]]:
    film = []
    for step in range(steps):
        dead = [(lam == 0).clone() for lam in lams] if step and film[-1] != film[0] else None
        train_step(step)
        if dead:
            for lam, gone in zip(lams, dead):
                lam.data[gone] = 0
        mask = choose(step)
        for i, lam in enumerate(lams):
            if mask is not None:
                lam.data[~mask[:, i]] = 0
        film.append([int((lam != 0).sum()) for lam in lams])
    return film


@provokes("the film shows no cut")
def revive__filmed_before_the_cut(lams: list[nn.Parameter], train_step: Callable[[int], None], choose: Callable[[int], Tensor | None], steps: int) -> list[list[int]]:
    film = []
    for step in range(steps):
        train_step(step)
        film.append([int((lam != 0).sum()) for lam in lams])
        mask = choose(step)
        if mask is not None:
            for i, lam in enumerate(lams):
                lam.data[~mask[:, i]] = 0
    return film


@provokes("the film shows no cut")
def revive__cut_before_the_step(lams: list[nn.Parameter], train_step: Callable[[int], None], choose: Callable[[int], Tensor | None], steps: int) -> list[list[int]]:
    film = []
    for step in range(steps):
        mask = choose(step)
        if mask is not None:
            for i, lam in enumerate(lams):
                lam.data[~mask[:, i]] = 0
        train_step(step)
        film.append([int((lam != 0).sum()) for lam in lams])
    return film


@provokes("what the mask keeps was cut")
def revive__the_wrong_ones(lams: list[nn.Parameter], train_step: Callable[[int], None], choose: Callable[[int], Tensor | None], steps: int) -> list[list[int]]:
    film = []
    for step in range(steps):
        train_step(step)
        mask = choose(step)
        if mask is not None:
            for i, lam in enumerate(lams):
                lam.data[mask[:, i]] = 0
        film.append([int((lam != 0).sum()) for lam in lams])
    return film


@provokes("the gradients were touched")
def revive__gradients_gone(lams: list[nn.Parameter], train_step: Callable[[int], None], choose: Callable[[int], Tensor | None], steps: int) -> list[list[int]]:
    film = []
    for step in range(steps):
        train_step(step)
        mask = choose(step)
        if mask is not None:
            for i, lam in enumerate(lams):
                lam.data *= mask[:, i]
                lam.grad *= mask[:, i]
        film.append([int((lam != 0).sum()) for lam in lams])
    return film


@provokes("a lam was replaced")
def revive__new_parameters(lams: list[nn.Parameter], train_step: Callable[[int], None], choose: Callable[[int], Tensor | None], steps: int) -> list[list[int]]:
    film = []
    for step in range(steps):
        train_step(step)
        mask, shown = choose(step), lams
        if mask is not None:
            shown = [nn.Parameter(lam.detach() * mask[:, i]) for i, lam in enumerate(lams)]
            if step == 3:
                lams[:] = shown
        film.append([int((lam != 0).sum()) for lam in shown])
    return film


@provokes("the film shows [")
def revive__film_of_the_masks(lams: list[nn.Parameter], train_step: Callable[[int], None], choose: Callable[[int], Tensor | None], steps: int) -> list[list[int]]:
    film, shown = [], [0 * len(lam) for lam in lams]
    for step in range(steps):
        train_step(step)
        mask = choose(step)
        if mask is not None:
            shown = mask.sum(0).tolist()
            for i, lam in enumerate(lams):
                lam.data[~mask[:, i]] = 0
        film.append(shown if mask is not None else [0] * len(lams))
    return film
