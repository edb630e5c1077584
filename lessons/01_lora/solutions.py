"""Lesson 01, worked. The same names and signatures as in exercises.py."""

import math

import torch
from torch import Tensor, nn

from minilora import LoRA, LoRALinear


def lora_branch(x: Tensor, A: Tensor, B: Tensor, alpha: float, rank: int) -> Tensor:
    """Two thin products: (..., in) -> (..., rank) -> (..., out). The (out, in) matrix B A is never built."""
    return alpha / rank * (x @ A.T @ B.T)          # @ groups from the left: (x Aᵀ) first


class LoRALayer(nn.Module):
    """Composed, not inherited: the given layer stays a layer, and something is added to what it says."""

    def __init__(self, linear: nn.Linear, rank: int, alpha: float):
        super().__init__()
        self.base = linear.requires_grad_(False)   # weight and bias
        self.scale = alpha / rank
        self.A = nn.Parameter(torch.empty(rank, linear.in_features))
        self.B = nn.Parameter(torch.zeros(linear.out_features, rank))
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.scale * (x @ self.A.T @ self.B.T)   # the bias is in base(x), once


@torch.no_grad()
def lora_gradients(G: Tensor, A: Tensor, B: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """The shapes leave no other choice: (rank, out)(out, in) and (out, in)(in, rank)."""
    return scale * B.T @ G, scale * G @ A.T


@torch.no_grad()
def merge_lora(W: Tensor, A: Tensor, B: Tensor, alpha: float, rank: int) -> Tensor:
    """`+`, not `+=`: W must survive, or there is nothing to go back to. Factors are often float32 where W is bfloat16."""
    return W + (alpha / rank * B @ A).to(W.dtype)


def inject_lora(model: nn.Module, targets: list[str], rank: int, alpha: float) -> nn.Module:
    """In place. Freeze first, so that the new parameters stay trainable; list the names first, because the tree changes as we go."""
    model.requires_grad_(False)
    for name, linear in list(model.named_modules()):
        parent, _, last = name.rpartition(".")
        if isinstance(linear, nn.Linear) and last in targets:
            setattr(model.get_submodule(parent), last, LoRALinear(linear, LoRA(rank=rank, alpha=alpha)))
    return model


def lora_parameter_count(shapes: list[tuple[int, int]], rank: int) -> int:
    """A has a column for each input, B a row for each output."""
    return sum(rank * (out + into) for out, into in shapes)


@torch.no_grad()
def best_rank(W: Tensor, rank: int) -> tuple[Tensor, float]:
    """The singular values come sorted: keep the first, drop the rest."""
    U, sigma, Vt = torch.linalg.svd(W, full_matrices=False)
    energy = sigma**2
    return U[:, :rank] * sigma[:rank] @ Vt[:rank], (energy[:rank].sum() / energy.sum()).item()
