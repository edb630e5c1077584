"""Lesson 04: what does backward keep?

Replace each `raise NotImplementedError` and run `pytest lessons/04_lora_fa`. Stuck? See hints.md.

Shapes as PyTorch stores them: W (out, in), A (rank, in), B (out, rank), y = x Wᵀ + s · (x Aᵀ) Bᵀ. In LoRA-FA the A stands still.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor


def bytes_formula(tokens: int, into: int, rank: int, size: int, frozen_A: bool, dropout: bool) -> int:
    """The bill of one adapted layer: bytes that its forward pass puts aside for backward. Parameters are there anyway and do not count.

    It keeps x Aᵀ (tokens, rank), for the gradient of B; unless A stands still also x (tokens, into), for the gradient of A; and with
    dropout the mask, as large as x. size: bytes a number.
    """
    raise NotImplementedError


def saved_bytes(run: Callable[[], Tensor], parameters: Iterable[Tensor]) -> int:
    """The same bill, measured: bytes of the tensors that autograd puts aside while `run()`, a forward pass, is at work. Call it once.

    A storage counts once, however many tensors look at it, and whole, even where they look at a part. Those of `parameters` do not count.
    Use torch.autograd.graph.saved_tensors_hooks, and .untyped_storage(), which has .data_ptr() and .nbytes().
    """
    raise NotImplementedError


class LoRAFAFunction(torch.autograd.Function):
    """LoRA-FA's branch, scale · (x Aᵀ) Bᵀ, that keeps x Aᵀ for backward and not x. LoRAFAFunction.apply(x, A, B, scale) calls it."""

    @staticmethod
    def forward(ctx, x: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
        """x: (..., in), and ... may be empty: one vector   A: (rank, in)   B: (out, rank)   ->   (..., out)

        What backward needs goes into one call of ctx.save_for_backward; numbers that are no tensors may be written on ctx.
        """
        raise NotImplementedError

    @staticmethod
    def backward(ctx, g: Tensor) -> tuple[Tensor, None, Tensor, None]:
        """g = dL/d(result): (..., out)   ->   dL/dx: (..., in), None for A, dL/dB: (out, rank), None for scale. B A is never formed."""
        raise NotImplementedError


def bytes_freed(reads: dict[str, str], sizes: dict[str, int], frozen: set[str], elsewhere: set[str], dropout: bool) -> int:
    """The audit: how many bytes a model need not keep once the A of the layers in `frozen` stand still. Of inputs only, not of x Aᵀ or masks.

    reads: adapted layer -> the input it reads; q, k and v read one.   sizes: input -> its bytes (an input that no adapted layer reads does not count).
    elsewhere: inputs that the model keeps for another reason. Attention keeps its own output, which o_proj reads.
    An input is freed, once, when nobody keeps it any more. With dropout each layer makes a dropped x of its own, as large
    as its input, which only that layer holds, so `elsewhere` plays no part; it is freed when this layer's A stands still.
    """
    raise NotImplementedError


def project_gradient(g: Tensor, A: Tensor, scale: float) -> Tensor:
    """ĝ = g (A Aᵀ)⁺ / scale²: with it a step of B moves W_eff as a step along the full gradient would, as far as A can follow.

    g = dL/dB: (out, rank)   A: (rank, in)   ->   (out, rank)
    ⁺ is the pseudo-inverse, for the rows of A may depend on each other. It is used between steps: no gradient has to pass through it.
    """
    raise NotImplementedError


def row_space(G: Tensor, A: Tensor) -> tuple[Tensor, float]:
    """What a frozen A can see of G = dL/dW: (G P, ‖G P‖² / ‖G‖²), where P = Aᵀ (A Aᵀ)⁻¹ A projects on the row space of A.

    G: (out, in), not zero   A: (rank, in), its rows independent   ->   (out, in), and a share between 0 and 1
    """
    raise NotImplementedError


class SeededDropoutFunction(torch.autograd.Function):
    """LoRA-FA's branch behind dropout, scale · (dropped(x) Aᵀ) Bᵀ, that keeps a seed in place of the mask.

    dropped(x) = x · mask / (1 - p); the mask is 0 with probability p, else 1, drawn anew from `seed` in forward and in backward. Draw with a
    generator of your own, torch.Generator(x.device).manual_seed(seed): torch's common one is not touched. x need not be contiguous.
    """

    @staticmethod
    def forward(ctx, x: Tensor, A: Tensor, B: Tensor, scale: float, p: float, seed: int) -> Tensor:
        """x: (..., in), also one vector   A: (rank, in)   B: (out, rank)   0 <= p < 1   ->   (..., out). Of tensors it keeps A, B and dropped(x) Aᵀ, nothing else."""
        raise NotImplementedError

    @staticmethod
    def backward(ctx, g: Tensor) -> tuple[Tensor, None, Tensor, None, None, None]:
        """g = dL/d(result): (..., out)   ->   dL/dx: (..., in) and dL/dB: (out, rank), at the places of x and B; None for the rest."""
        raise NotImplementedError
