"""Lesson 06: does W really learn in Delta-LoRA? Replace each `raise NotImplementedError` and run `pytest lessons/06_delta_lora`.

W (out, in), A (rank, in), B (out, rank), s = alpha / rank. λ is `delta_ratio`; (A_K, B_K) are the factors when W begins to move.
"""

import torch
from torch import Tensor


def literal_update(W: Tensor, A: Tensor, B: Tensor, A_next: Tensor, B_next: Tensor, scale: float, delta_ratio: float) -> Tensor:
    """What the paper does to W after an optimizer step that took (A, B) to (A_next, B_next): W moves by λ · s times what the step changed in B A.

    A new tensor; W is left as it was.

    W: (out, in)   A, A_next: (rank, in)   B, B_next: (out, rank)   ->   (out, in)
    """
    raise NotImplementedError


def telescope(W_0: Tensor, A_K: Tensor, B_K: Tensor, A: Tensor, B: Tensor, scale: float, delta_ratio: float) -> Tensor:
    """W_eff, the matrix that the layer multiplies by, any number of steps later. No loop: it needs the factors of step K and of now.

    It is the W that all updates since step K have made of W_0, plus LoRA's own s · B A.   Shapes as above   ->   (out, in)
    """
    raise NotImplementedError


def swallowed(weight: float, update: float, times: int, dtype: torch.dtype) -> int:
    """Add `update` to `weight` again and again, `times` times, each time storing the sum in `dtype`. How many of the additions changed nothing?

    Both numbers are stored in `dtype` first.
    """
    raise NotImplementedError


def lora_in_disguise(alpha: float, delta_ratio: float) -> tuple[float, float]:
    """Delta-LoRA that moves W from the first step on (K = 0, so B_K = 0) is plain LoRA. Of which alpha, and at which learning rate?

    Returns (that LoRA's alpha, the number to multiply Delta-LoRA's SGD learning rate by, so that the plain LoRA takes the same steps).
    Under Adam the rates are equal. No weight decay, the rank is the same.
    """
    raise NotImplementedError


def delta_lora_forward(x: Tensor, W_0: Tensor, A_K: Tensor, B_K: Tensor, A: Tensor, B: Tensor, scale: float, delta_ratio: float) -> Tensor:
    """x W_effᵀ, with the gradients that Delta-LoRA has. While a step is made, W is a constant: no gradient reaches W_0, A_K or B_K, though they may
    ask for one; A and B get theirs through s · B A alone; x gets its own through all of W_eff.

    No (out, in) matrix is made: W_0 is there already, everything else is thin.   x: (..., in)   ->   (..., out)
    """
    raise NotImplementedError


def rank_of_the_change(A_K: Tensor, B_K: Tensor, A: Tensor, B: Tensor) -> int:
    """The rank of B A - B_K A_K, at most twice `rank`. (W's change is this matrix times λ · s.) All in float64.

    No (out, in) matrix is made. A singular value counts if it is above 1e-10 · ‖[B, B_K]‖ · ‖[A; A_K]‖ (Frobenius): what is smaller may be the rounding
    of two products that cancel. So where nothing has moved, the rank is 0.
    """
    raise NotImplementedError


def as_plain_lora(A_K: Tensor, B_K: Tensor, A: Tensor, B: Tensor, alpha: float, delta_ratio: float) -> tuple[Tensor, Tensor, float]:
    """(A₂, B₂, alpha₂) of a plain LoRA of twice the rank on the untouched W_0, which says what the whole Delta-LoRA layer says.

    A₂: (2 rank, in), the rows of A first   B₂: (out, 2 rank)   alpha₂ / (2 rank) · B₂ A₂ = W_eff - W_0.
    B₂ begins with B itself, as it is: all factors go into alpha₂ and into B₂'s second half.
    """
    raise NotImplementedError
