"""DoRA: the direction of W is adapted by LoRA, its length is trained by itself (Liu et al. 2024, arXiv:2402.09353, eq. 5).

    W' = m ⊙ (W + s · B A) / n          n = ‖W + s · B A‖, one norm for each output (row)        m: (out), starts as ‖W‖

so it starts as the base. The norm is recomputed in every forward pass and is a constant in backward (section 4.3). The bias is
not scaled. The paper's eq. 5 has no s; the reference code has, and so have we.

No (out, in) tensor is ever formed, because n² comes from the factors. With w a row of W and β the same row of B:

    n² = ‖w + s·βA‖² = ‖w‖² + 2s · ⟨w Aᵀ, β⟩ + s² · β (A Aᵀ) βᵀ

With dropout the norm sees the factors as they are, and only the update's input is dropped, as in LoRA. (PEFT drops the input of
the base's part too, at the price of a second pass through W.)

Trainable parameters: rank · (in + out) + out for each adapted layer.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minilora.adapter import add_product
from minilora.methods.lora import LoRA, LoRALinear


@dataclass(frozen=True)
class DoRA(LoRA):
    """LoRA's fields; alpha is usually twice the rank."""

    def layer(self, linear: nn.Linear) -> "DoRALinear":
        return DoRALinear(linear, self)


class DoRALinear(LoRALinear):
    """A frozen linear layer whose rows are turned by a low-rank update and stretched by a trained magnitude."""

    def __init__(self, base: nn.Linear, method: DoRA):
        super().__init__(base, method)
        self.magnitude = self.empty(base.out_features)
        with torch.no_grad():
            self.magnitude.copy_(self.row_norms())

    @torch.no_grad()
    def row_norms(self) -> Tensor:
        """(out): n, without forming W + s · B A."""
        A, s, gram = self.A, self.scale, self.A @ self.A.T                            # (rank, in), number, (rank, rank)
        weight = self.base.weight                                                     # once: a 4-bit base makes it anew at each look
        rows = self.out_features if weight.dtype == A.dtype else -(-self.out_features // 8)
        norms = []
        for W, B in zip(weight.split(rows), self.B.split(rows)):                 # all at once, unless W must be cast
            W = W.to(A.dtype)
            w = torch.linalg.vector_norm(W, dim=1)                                    # (rows)
            n2 = w * w + 2 * s * (F.linear(A, W).T * B).sum(1) + s * s * (B @ gram * B).sum(1)
            norms.append(n2.clamp_min(torch.finfo(n2.dtype).tiny).sqrt())             # a row of zeros stays one; nothing is divided by 0
        return torch.cat(norms)

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)                                                              # (..., in) -> (..., out), bias and all
        g = self.stretch().to(y.dtype)                                                # (out)
        z = F.linear(self.dropout(x), self.A.to(x.dtype))                             # (..., in) -> (..., rank)
        v = add_product(y, z, self.B, self.scale)                                     # x (W + s · B A)ᵀ + bias
        return g * v if self.bias is None else torch.addcmul((1 - g) * self.bias.to(y.dtype), g, v)

    def stretch(self) -> Tensor:
        """(out): g = m / n."""
        return self.magnitude / self.row_norms()

    def factors(self) -> tuple[Tensor, Tensor]:
        """Of s · B A alone; g then stretches the rows of W + s · B A."""
        return super().factors()

    def delta_weight(self) -> Tensor:
        """(out, in): what merging adds to W."""
        g = self.stretch()[:, None]
        return (g - 1) * self.base.weight + g * super().delta_weight()
