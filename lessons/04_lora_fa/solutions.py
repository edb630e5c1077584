"""Lesson 04, worked. The same names and signatures as in exercises.py."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor


def bytes_formula(tokens: int, into: int, rank: int, size: int, frozen_A: bool, dropout: bool) -> int:
    x = tokens * into * size
    return (not frozen_A) * x + dropout * x + tokens * rank * size         # x, the mask, x Aᵀ


def saved_bytes(run: Callable[[], Tensor], parameters: Iterable[Tensor]) -> int:
    kept = {}                                                              # where a storage lies -> its bytes: each once

    def put_aside(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(put_aside, lambda tensor: tensor):
        run()
    there = {parameter.untyped_storage().data_ptr() for parameter in parameters}
    return sum(size for place, size in kept.items() if place not in there)


class LoRAFAFunction(torch.autograd.Function):
    """The two gradients, read off y = s · z Bᵀ with z = x Aᵀ: dB = s · gᵀ z wants z, dx = s · g B A wants the parameters. Nobody asks for x."""

    @staticmethod
    def forward(ctx, x: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
        z = x @ A.T                                                        # (..., in) -> (..., rank)
        ctx.save_for_backward(z, A, B)
        ctx.scale = scale
        return scale * (z @ B.T)

    @staticmethod
    def backward(ctx, g: Tensor) -> tuple[Tensor, None, Tensor, None]:
        z, A, B = ctx.saved_tensors
        dB = g.reshape(-1, B.shape[0]).T @ z.reshape(-1, B.shape[1])       # all tokens in one row each; (out, tokens)(tokens, rank)
        return ctx.scale * (g @ B @ A), None, ctx.scale * dB, None         # g B first: rank numbers a token


def bytes_freed(reads: dict[str, str], sizes: dict[str, int], frozen: set[str], elsewhere: set[str], dropout: bool) -> int:
    if dropout:                                                            # an x of its own for each layer
        return sum(sizes[x] for layer, x in reads.items() if layer in frozen)
    still_read = {x for layer, x in reads.items() if layer not in frozen}
    return sum(sizes[x] for x in set(reads.values()) - still_read - elsewhere)


def project_gradient(g: Tensor, A: Tensor, scale: float) -> Tensor:
    """No gradient has to pass: it is used between steps. g = s · G Aᵀ, so s · ĝ A = G Aᵀ (A Aᵀ)⁺ A: one s from g and one from s · B A, which is why it is divided by s²."""
    return g @ torch.linalg.pinv(A @ A.T) / scale**2


def row_space(G: Tensor, A: Tensor) -> tuple[Tensor, float]:
    seen = G @ A.T @ torch.linalg.inv(A @ A.T) @ A                         # from the left: P itself, (in, in), is never needed
    return seen, (seen.square().sum() / G.square().sum()).item()


class SeededDropoutFunction(torch.autograd.Function):
    """A mask is as long as x, the seed it comes from is one number: draw it twice."""

    @staticmethod
    def forward(ctx, x: Tensor, A: Tensor, B: Tensor, scale: float, p: float, seed: int) -> Tensor:
        z = x * _mask(x, p, seed) @ A.T
        ctx.save_for_backward(z, A, B)
        ctx.scale, ctx.p, ctx.seed = scale, p, seed
        return scale * (z @ B.T)

    @staticmethod
    def backward(ctx, g: Tensor) -> tuple[Tensor, None, Tensor, None, None, None]:
        z, A, B = ctx.saved_tensors
        dropped = ctx.scale * (g @ B @ A)                                  # dL/d dropped(x)
        dB = g.reshape(-1, B.shape[0]).T @ z.reshape(-1, B.shape[1])
        return dropped * _mask(dropped, ctx.p, ctx.seed), None, ctx.scale * dB, None, None, None


def _mask(like: Tensor, p: float, seed: int) -> Tensor:
    """0 or 1 / (1 - p). From the shape alone: empty_like would lie in memory as a transposed x does, and be filled in another order."""
    mask = torch.empty(like.shape, dtype=like.dtype, device=like.device)
    return mask.bernoulli_(1 - p, generator=torch.Generator(like.device).manual_seed(seed)) / (1 - p)
