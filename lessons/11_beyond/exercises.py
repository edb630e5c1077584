"""Lesson 11: what else can one change? Replace each `raise NotImplementedError` and run `pytest lessons/11_beyond`.

W (out, in) frozen, A (rank, in), B (out, rank), s = scale. A row of W makes one output: y_o = ⟨row o, x⟩. Four roads lead away from LoRA:
another s (rsLoRA), a length for each row (DoRA), another start (PiSSA), another town to start from (LoftQ: Q in the place of W).
"""

from collections.abc import Callable

import torch
from torch import Tensor


def rslora_scale(alpha: float, rank: int, rslora: bool) -> float:
    """s, the factor before B A: alpha / rank as in LoRA, or with `rslora` alpha / √rank."""
    raise NotImplementedError


def dora_forward(x: Tensor, W: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, magnitude: Tensor, scale: float) -> Tensor:
    """x W'ᵀ + bias with W' = m ⊙ V / n, where V = W + s · B A and n is the length of each row of V: one number for each output.

    m, the magnitude, is trained. n is computed anew at each call, and in backward it is a constant: no gradient goes through it. The bias is
    not scaled; it may be None. V may be made, and no row of it is zero.

    x: (..., in)   W: (out, in)   bias: (out) or None   A: (rank, in)   B: (out, rank)   magnitude: (out)   ->   (..., out)
    """
    raise NotImplementedError


@torch.no_grad()
def dora_gradient(G: Tensor, W: Tensor, A: Tensor, B: Tensor, magnitude: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """(dL/dm, dL/dA, dL/dB) of DoRA from G = dL/dW', with the norm n held: a constant, as in dora_forward. By hand: autograd records nothing.

    G: (out, in)   W: (out, in)   A: (rank, in)   B: (out, rank)   magnitude: (out)   ->   (out), (rank, in), (out, rank)
    """
    raise NotImplementedError


@torch.no_grad()
def pissa_split(W: Tensor, rank: int, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """(A, B, rest): s · B A is the best approximation of W by a matrix of this rank, in Frobenius norm, and rest is W minus that.

    From W = U diag(S) Vᵀ: A = √(S_r / s) Vᵀ_r and B = U_r √(S_r / s), the r largest of S, largest first. W may be of any floating type,
    bfloat16 too: compute in float64, and round to W's type at the end, each of the three once. (So rest is that of A and B before they are rounded.)

    W: (out, in)   scale: above 0   ->   (rank, in), (out, rank), (out, in)
    """
    raise NotImplementedError


@torch.no_grad()
def loftq_alternate(W: Tensor, rank: int, iterations: int, scale: float, quantize: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """(Q, A, B) with Q + s · B A near W. Begin with B A = 0, and repeat these two lines, `iterations` times:

        Q        <-  quantize(W - s · B A)
        s · B A  <-  the best approximation of W - Q by a matrix of this rank, √(S_r / s) on each side, as in pissa_split

    Q, A and B are those of the last round, even where an earlier one was nearer to W. quantize takes an (out, in) tensor and gives the rounded one back, dense again. W is in float64.
    Raises ValueError where iterations is below 1.

    W: (out, in)   scale: above 0   ->   (out, in), (rank, in), (out, rank)
    """
    raise NotImplementedError


def intruders(W: Tensor, dW: Tensor, top: int, threshold: float) -> int:
    """How many of the first `top` left singular vectors of W + dW are strangers to W: the largest |cosine| of such a vector with any left singular
    vector of W is below `threshold`. Left: the columns of U, directions of the output. U of (out, in) has min(out, in) columns and no more;
    where `top` is above that, all of W + dW's are asked.

    W: (out, in)   dW: (out, in)   ->   a whole number from 0 to top
    """
    raise NotImplementedError
