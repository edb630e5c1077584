"""PiSSA: LoRA that starts at the principal part of W instead of at zero (Meng et al. 2024, arXiv:2404.02948).

    W = U S Vᵀ      A₀ = √(S_r / s) V_rᵀ      B₀ = U_r √(S_r / s)          so that  s · B₀ A₀  is the best rank-r part of W
    y = x Wᵀ + b + s · (x Aᵀ) Bᵀ − s · (x A₀ᵀ) B₀ᵀ                          A and B are trained, from A₀ and B₀

The paper stores the residual W − s · B₀ A₀ in place of W and adds s · B A. The sum is the same; but W stays here, so that taking
the adapter away gives the model back, and several adapters can share one base. What is learned is

    dW = s · (B A − B₀ A₀) = s · (B (A − A₀) + (B − B₀) A₀) = s · [B, B − B₀] [A − A₀; A₀]

an update of rank 2r at most (the paper's appendix C), and as a LoRA of rank 2r it is saved. The last form is what the layer computes:
its parts are zero at the start, where in the first two large ones would have to cancel, and 16 bits would not let them.

Dropout is on the update's input, as in LoRA: the layer starts as W with dropout too. (In PEFT it falls on s · B A alone, and not on what
was taken from W for it, so that there the start is noisy.)

Trainable parameters: rank · (in + out) for each adapted layer; A₀ and B₀ are kept beside them, frozen.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

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
        return AddUpdate.apply(self.base(x), self.dropout(x), self.A, self.B, self.A_0, self.B_0, self.scale)

    def factors(self) -> tuple[Tensor, Tensor]:
        """(out, 2 rank) and (2 rank, in): merging adds their product to W."""
        return self.scale * torch.cat([self.B, self.B - self.B_0], dim=1), torch.cat([self.A - self.A_0, self.A_0])


class AddUpdate(torch.autograd.Function):
    """y + s · (x [A − A₀; A₀]ᵀ) [B, B − B₀]ᵀ. Autograd by itself would keep these factors beside A, A₀, B, B₀, and differentiate to all four.

    y: (..., out)   x: (..., in)   A, A₀: (rank, in)   B, B₀: (out, rank)
    """

    @staticmethod
    def forward(ctx, y: Tensor, x: Tensor, A: Tensor, B: Tensor, A_0: Tensor, B_0: Tensor, scale: float) -> Tensor:
        z = F.linear(x, torch.cat([A - A_0, A_0]).to(x.dtype))                        # (..., in) -> (..., 2 rank)
        new, old = z.chunk(2, dim=-1)
        ctx.save_for_backward(x, new + old, A, B, A_0, B_0)                           # their sum is x Aᵀ
        ctx.scale = scale
        return add_product(y, z, torch.cat([B, B - B_0], dim=1), scale)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        x, z, A, B, A_0, B_0 = ctx.saved_tensors
        g, z = grad.reshape(-1, grad.shape[-1]), z.reshape(-1, len(A)).to(grad.dtype)                    # (n, out), (n, rank)
        to_z = ctx.scale * (g @ torch.cat([B, B - B_0], dim=1).to(g.dtype))           # (n, 2 rank)
        to_x = (to_z @ torch.cat([A - A_0, A_0]).to(g.dtype)).view(x.shape).to(x.dtype) if ctx.needs_input_grad[1] else None
        to_A = to_z[:, :len(A)].T @ x.reshape(-1, x.shape[-1]).to(g.dtype)            # s · Bᵀ gᵀ x
        to_B = ctx.scale * (g.T @ z)                                                  # s · gᵀ x Aᵀ
        return grad, to_x, to_A.to(A.dtype), to_B.to(B.dtype), None, None, None
