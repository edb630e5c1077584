"""Lesson 01: LoRA, written by hand. Replace each `raise NotImplementedError` and run `pytest lessons/01_lora`.

Shapes as PyTorch stores them: W (out, in), A (rank, in), B (out, rank). The update is dW = alpha / rank · B A, and W stays.
"""

from torch import Tensor, nn


def lora_branch(x: Tensor, A: Tensor, B: Tensor, alpha: float, rank: int) -> Tensor:
    """What LoRA adds to a layer's output: s · (x Aᵀ) Bᵀ with s = alpha / rank, without ever forming B A.

    x: (..., in)   A: (rank, in)   B: (out, rank)   ->   (..., out)
    """
    raise NotImplementedError


class LoRALayer(nn.Module):
    """A frozen linear layer with a trainable update beside it: y = base(x) + s · (x Aᵀ) Bᵀ, s = alpha / rank.

    self.base: the given layer itself, its weight and bias frozen.
    self.A: (rank, in), a parameter drawn by nn.init.kaiming_uniform_(…, a=√5).   self.B: (out, rank), a parameter of zeros.
    """

    def __init__(self, linear: nn.Linear, rank: int, alpha: float):
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., in)   ->   (..., out)"""
        raise NotImplementedError


def lora_gradients(G: Tensor, A: Tensor, B: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """(dL/dA, dL/dB), from G = dL/dW_eff where W_eff = W + scale · B A. No autograd: two matrix products.

    G: (out, in)   A: (rank, in)   B: (out, rank)   ->   (rank, in), (out, rank)
    """
    raise NotImplementedError


def merge_lora(W: Tensor, A: Tensor, B: Tensor, alpha: float, rank: int) -> Tensor:
    """The one matrix that does the work of both: W + alpha / rank · B A, a new tensor. W is left as it was.

    W: (out, in)   A: (rank, in)   B: (out, rank)   ->   (out, in), of W's dtype
    """
    raise NotImplementedError


def inject_lora(model: nn.Module, targets: list[str], rank: int, alpha: float) -> nn.Module:
    """Freeze the whole model, then put a LoRA layer in the place of each target nn.Linear. In place; returns the model.

    A target is the last part of a dotted name: "q_proj" means blocks.0.attention.q_proj and its sisters, not my_q_proj.
    Only the new A and B may be trainable: embeddings, norms, heads and biases are frozen too.
    Use `from minilora import LoRA, LoRALinear`: LoRALinear(linear, LoRA(rank=rank, alpha=alpha)) is your LoRALayer.
    """
    raise NotImplementedError


def lora_parameter_count(shapes: list[tuple[int, int]], rank: int) -> int:
    """How many numbers LoRA trains on weights of these (out, in) shapes: the sum of rank · (in + out)."""
    raise NotImplementedError


def best_rank(W: Tensor, rank: int) -> tuple[Tensor, float]:
    """The best approximation of W by a matrix of this rank, and the share of W's energy that it keeps.

    W = U diag(σ) Vᵀ with σ falling  ->  Σ_{i ≤ rank} σ_i u_i v_iᵀ: (out, in), and Σ_{i ≤ rank} σ_i² / Σ σ_i²   (Eckart and Young)
    """
    raise NotImplementedError
