"""PiSSA: LoRA that starts at the principal part of W instead of at zero (Meng et al. 2024, arXiv:2404.02948).

    W = U S Vᵀ      A₀ = √(S_r / s) V_rᵀ      B₀ = U_r √(S_r / s)          so that  s · B₀ A₀  is the best rank-r part of W
    y = x Wᵀ + b + s · (x Aᵀ) Bᵀ − s · (x A₀ᵀ) B₀ᵀ                          A and B are trained, from A₀ and B₀

The paper stores the residual W − s · B₀ A₀ in place of W and adds s · B A. The sum is the same; but W stays here, so that taking
the adapter away gives the model back, and several adapters can share one base. What is learned is dW = s · (B A − B₀ A₀), an
update of rank 2r at most (the paper's appendix C), and as a LoRA of rank 2r it is saved.

Trainable parameters: rank · (in + out) for each adapted layer; A₀ and B₀ are kept beside them, frozen.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minilora.adapter import add_product
from minilora.methods.lora import LoRA, LoRALinear


@dataclass(frozen=True)
class PiSSA(LoRA):
    """LoRA's fields; alpha is the rank where none is given, so that s = 1 as in the paper (with rslora, √rank)."""

    alpha: float | None = None

    def __post_init__(self):
        if self.alpha is None:
            object.__setattr__(self, "alpha", float(self.rank) if isinstance(self.rank, int) else 1.0)
        super().__post_init__()
        if self.alpha <= 0:
            raise ValueError(f"alpha must be positive, got {self.alpha!r}: PiSSA starts from a part of W divided by alpha / rank")

    def layer(self, linear: nn.Linear) -> "PiSSALinear":
        return PiSSALinear(linear, self)


class PiSSALinear(LoRALinear):
    """A frozen linear layer beside which its own principal part is trained, less what that part was at the start."""

    @torch.no_grad()
    def start(self) -> None:
        rank = len(self.A)
        U, S, Vt = torch.linalg.svd(self.base.weight.to(self.A.dtype), full_matrices=False)
        root = (S[:rank] / self.scale).sqrt()                                         # (rank)
        self.A.copy_(root[:, None] * Vt[:rank])
        self.B.copy_(U[:, :rank] * root)
        self.register_buffer("A_0", self.A.detach().clone())
        self.register_buffer("B_0", self.B.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        A = torch.cat([self.A - self.A_0, self.A_0]).to(x.dtype)      # (2 rank, in)
        B = torch.cat([self.B, self.B - self.B_0], dim=1)             # (out, 2 rank)
        y, z = self.base(x), F.linear(self.dropout(x), A)             # (..., in) -> (..., out) and (..., 2 rank)
        return add_product(y, z, B, self.scale)                       # y + s · z Bᵀ

    def delta_weight(self) -> Tensor:
        """(out, in): what merging adds to W."""
        return self.scale * (self.B @ (self.A - self.A_0) + (self.B - self.B_0) @ self.A_0)
