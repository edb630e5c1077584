"""LoRA-FA: A stays at its random start; only B is trained (Zhang et al. 2023, arXiv:2308.03303).

    y = x Wᵀ + b + s · (x Aᵀ) Bᵀ        A: (rank, in), frozen     B: (out, rank), from zero

The gradient of B needs x Aᵀ only, rank numbers a token; the gradient of A would have needed x itself, in numbers a token.
Freezing A by requires_grad=False is all that it takes: autograd then does not keep x. (A dropout mask is as large as x, and
is kept. And dW = s · B A can only ever read the rank directions of the input that A happened to be born with.)

projection=True is the step that PEFT's LoRA-FA optimizer adds: before Adam, B's gradient g becomes

    ĝ = g (A Aᵀ)⁻¹ / s²                                  so that  s · ĝ A = G Aᵀ (A Aᵀ)⁻¹ A,      G = dL/dW: (out, in)

the full gradient, projected on the row space of A. PEFT computes the product in bfloat16; here it has full precision.

Trainable parameters: rank · out for each adapted layer.
"""

from dataclasses import dataclass

import torch
from torch import nn

from minilora.adapter import adapters
from minilora.methods.lora import LoRA, LoRALinear


@dataclass(frozen=True)
class LoRAFA(LoRA):
    """LoRA's fields, and projection: train on the projected full gradient instead of B's own."""

    projection: bool = False

    def __post_init__(self):
        super().__post_init__()
        if self.projection and self.alpha == 0:
            raise ValueError("alpha must not be 0 with projection=True, which divides by its square")

    @property
    def lines(self) -> tuple[str, ...]:
        return ("before_step",) if self.projection else ()

    def layer(self, linear: nn.Linear) -> LoRALinear:
        layer = LoRALinear(linear, self)
        layer.A.requires_grad_(False)
        return layer

    @torch.no_grad()
    def before_step(self, model: nn.Module, step: int) -> None:
        super().before_step(model, step)
        for _, layer in adapters(model) if self.projection else ():
            layer.met("before_step")
            if layer.B.grad is not None:
                gram = layer.A @ layer.A.T                                                # (rank, rank)
                layer.B.grad.copy_(layer.B.grad @ torch.linalg.pinv(gram, hermitian=True) / layer.scale**2)
