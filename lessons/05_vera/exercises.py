"""Lesson 05: can random matrices be shared by all layers? Replace each `raise NotImplementedError` and run `pytest lessons/05_vera`.

W (out, in), A (rank, in), B (out, rank); A and B are thrown once and frozen. What trains is d (rank) and b (out), in every layer its own.
"""

from torch import Tensor


def vera_count(shapes: list[tuple[int, int]], rank: int) -> int:
    """How many numbers VeRA trains on weights of these (out, in) shapes: the sum of rank + out."""
    raise NotImplementedError


def vera_forward(x: Tensor, W: Tensor, A: Tensor, B: Tensor, b: Tensor, d: Tensor) -> Tensor:
    """x Wᵀ + b ⊙ ((d ⊙ (x Aᵀ)) Bᵀ), which is x (W + diag(b) B diag(d) A)ᵀ; no (out, in) matrix is made, for W is there already.

    x: (..., in)   W: (out, in)   A: (rank, in)   B: (out, rank)   b: (out)   d: (rank)   ->   (..., out)
    """
    raise NotImplementedError


def slice_shared(A: Tensor, B: Tensor, into: int, out: int) -> tuple[Tensor, Tensor]:
    """A layer's part of the shared matrices: the first `into` columns of A and the first `out` rows of B. Views: no number is copied.

    A: (rank, widest)   B: (tallest, rank)   ->   (rank, into), (out, rank)
    Raises ValueError where the layer is wider than A or taller than B: a slice of Python's would only be too short, and say nothing.
    """
    raise NotImplementedError


def draw_projections(rank: int, widest: int, tallest: int, seed: int) -> tuple[Tensor, Tensor]:
    """The throw: A (rank, widest) and then B (tallest, rank), in float32, from one generator of their own with this seed.

    Kaiming uniform: every entry from U(-c, c) with c = √(6 / fan_in), fan_in the number of columns. The same seed gives the same numbers
    as ml.VeRA and PEFT, and torch's global random state is left as it was.
    """
    raise NotImplementedError


def vera_gradients(x: Tensor, g: Tensor, A: Tensor, B: Tensor, b: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
    """(dL/db, dL/dd) from g = dL/dy, for y = x Wᵀ + b ⊙ ((d ⊙ (x Aᵀ)) Bᵀ). No autograd, and no (out, in) matrix.

    x: (..., in)   g: (..., out), the same leading sizes, which may be none   ->   (out), (rank): summed over them
    """
    raise NotImplementedError


def vera_bytes(shapes: list[tuple[int, int]], rank: int, projections: bool) -> int:
    """Bytes of the tensors in VeRA's file, all in float32, for layers of these (out, in) shapes, at least one.

    Each layer has its b and d. With `projections` there are A and B too, once for all layers, as wide as the widest input and as tall as the
    tallest output. Without, the seed in adapter_config.json stands for them: it is no tensor and is not counted.
    """
    raise NotImplementedError


def vera_reach(A: Tensor, B: Tensor, b: Tensor, d: Tensor) -> tuple[int, int]:
    """(the rank of dW = diag(b) B diag(d) A, the number of independent directions in which small steps of b and d can move dW).

    The second is the rank of the Jacobian: one row, an (out, in) matrix laid flat, for each entry of b and of d. Singular values up to
    1e-10 of the largest count as zero; a matrix of zeros has rank 0. This is about what is possible: here (out, in) matrices may be made.
    """
    raise NotImplementedError
