"""Lesson 08: where should rank go? Replace each `raise NotImplementedError` and run `pytest lessons/08_adalora`.

W (out, in) is frozen. dW = s · P Λ Q with P (out, r), lam (r), the diagonal of Λ, and Q (r, in). A triplet is lam_k with column k of P and row k of Q.
"""

from collections.abc import Callable

from torch import Tensor, nn


def svd_forward(x: Tensor, W: Tensor, P: Tensor, lam: Tensor, Q: Tensor, scale: float) -> Tensor:
    """x Wᵀ + s · (lam ⊙ (x Qᵀ)) Pᵀ, which is x (W + s · P Λ Q)ᵀ; no (out, in) matrix is made, for W is there already.

    x: (..., in)   W: (out, in)   P: (out, r)   lam: (r)   Q: (r, in)   ->   (..., out)
    """
    raise NotImplementedError


def orthogonality(Ps: list[Tensor], Qs: list[Tensor]) -> Tensor:
    """How far all P and Q are from orthonormal: the mean of ‖PᵀP − 1‖ over every P and of ‖QQᵀ − 1‖ over every Q, together one mean.

    Frobenius norms, not squared, as in the authors' code. Ps: each (out, r)   Qs: each (r, in), as many; the sizes may differ from layer to layer,
    r too   ->   one number, (), of their dtype. A P or Q that is orthonormal already adds 0 to it, and its gradient is 0, not NaN.
    """
    raise NotImplementedError


def smoothed(w: Tensor, gradient: Tensor, sensitivity: Tensor, uncertainty: Tensor, beta1: float, beta2: float) -> tuple[Tensor, Tensor]:
    """One step's news of every weight taken into its two running means: the new (Ī, U). All of one shape, any.

        I = |w · dL/dw|       Ī <- β₁ Ī + (1 − β₁) I       U <- β₂ U + (1 − β₂) |I − Ī|, with the new Ī

    There is no gradient through them, also where w is a Parameter: otherwise each step's graph would hang on the last one's, and none could be freed.
    """
    raise NotImplementedError


def triplet_importance(sensitivity: dict[str, Tensor], uncertainty: dict[str, Tensor]) -> Tensor:
    """Of each triplet: (Ī U) of its lam + the mean of (Ī U) over its column of P + the mean of (Ī U) over its row of Q.

    Both dicts: "P": (out, r), "lam": (r), "Q": (r, in)   ->   (r)
    """
    raise NotImplementedError


def budget(step: int, total: int, warmup: int, final: int, first: int, last: int) -> int:
    """How many triplets all layers together may keep after this step, counted from 0 to total − 1:

        last + (first − last) · (1 − (step − warmup) / (total − final − warmup))³, rounded down

    up to step `warmup`, and including it, it is `first`; from step total − final on it is `last`. The last step of all, total − 1, is always at `last`:
    also where final is 0, and even where warmup is total − 1. warmup + final < total.
    """
    raise NotImplementedError


def keep_best(importance: Tensor, budget: int) -> Tensor:
    """Who stays in: True for the `budget` most important triplets of all layers together, exactly so many, also where importances tie.

    Of equals the lower k is kept first, and of equal k the earlier layer. 0 <= budget <= r · layers.
    importance: (r, layers), row k has the k-th triplet of each layer   ->   (r, layers), bool: there is no gradient through a choice.
    """
    raise NotImplementedError


def revive(lams: list[nn.Parameter], train_step: Callable[[int], None], choose: Callable[[int], Tensor | None], steps: int) -> list[list[int]]:
    """AdaLoRA's loop, in place, and its film. For each step from 0 to steps − 1:

    train_step(step) makes the step: forward, backward, optimizer.step(). Then choose(step) gives None, and nothing is cut; or a mask (r, layers), and
    each lam (r) of its layer is set to zero where the mask is False. Nothing else is touched: the same Parameters (a new
    .data in them will do), still trained, their gradients as they were. So the next step may bring back what was cut.

    Returns the film: for each step, the number of lam that are not zero in each layer, at the end of the step.
    """
    raise NotImplementedError
