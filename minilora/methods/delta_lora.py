"""Delta-LoRA: after every optimizer step W moves too, by what B A has just moved (Zi et al. 2023, arXiv:2309.02411).

    W <- W + λ · s · (B₊A₊ − B A)     after each step t >= K        s = alpha / rank, λ = delta_ratio, K = start_step

W receives no gradient and no optimizer state. The increments telescope, so the sum of all of them is known without W ever being
written to: with (A_K, B_K) the factors when the updates began,

    W_eff = W + s · B A + λ · s · (B A − B_K A_K)

is that W at every step, and it is what this file computes: W stays, and so does the way back. The formula also says what the
method is. Its change of W has rank 2 · rank at most; and with K = 0, where B_K = 0, it is LoRA of scale (1 + λ)s whose gradient
is smaller by 1 + λ, a factor that Adam divides out. Backward takes W as a constant, so the λ terms pass no gradient to A and B.

No dropout: the update rests on dL/dW = dL/d(BA), which holds where both see the same input. The defaults are ours.

Trainable parameters: rank · (in + out) for each adapted layer; the snapshot keeps as many again.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minilora import checks
from minilora.adapter import adapters, add_product
from minilora.methods.lora import LoRA, LoRALinear
from minilora.quant.linear import NF4Linear


@dataclass(frozen=True)
class DeltaLoRA(LoRA):
    """LoRA's fields (dropout must stay 0), and delta_ratio: λ; start_step: K, the first step after which W moves."""

    delta_ratio: float = 2.0
    start_step: int = 0

    def __post_init__(self):
        super().__post_init__()
        if self.dropout:
            raise ValueError(f"dropout must be 0, got {self.dropout!r}: Delta-LoRA needs W and B A to see the same input")
        checks.number("delta_ratio", self.delta_ratio, "of at least 0", lambda ratio: ratio >= 0)
        checks.whole("start_step", self.start_step, 0)

    def scheduled(self, steps: int) -> "DeltaLoRA":
        if self.start_step >= steps:
            raise ValueError(f"start_step {self.start_step} is beyond training, whose last step is {steps - 1}: W would never move")
        return self

    @property
    def lines(self) -> tuple[str, ...]:
        return ("before_step",)

    def layer(self, linear: nn.Linear) -> "DeltaLoRALinear":
        if isinstance(linear, NF4Linear):
            raise ValueError("Delta-LoRA lets W follow B A, and a W in four bits cannot: its steps are too wide")
        return DeltaLoRALinear(linear, self)

    @torch.no_grad()
    def before_step(self, model: nn.Module, step: int) -> None:
        super().before_step(model, step)
        for _, layer in adapters(model):
            layer.met("before_step")
            if step >= self.start_step:                               # where, for a branch on a tensor would wait for the GPU
                torch.where(layer.started, layer.A_K, layer.A, out=layer.A_K)
                torch.where(layer.started, layer.B_K, layer.B, out=layer.B_K)
                layer.started.fill_(True)


class DeltaLoRALinear(LoRALinear):
    """LoRA's layer, and the sum of all updates of W so far beside it."""

    def __init__(self, base: nn.Linear, method: DeltaLoRA):
        super().__init__(base, method)
        self.register_buffer("A_K", torch.zeros_like(self.A))
        self.register_buffer("B_K", torch.zeros_like(self.B))
        self.register_buffer("started", torch.tensor(False, device=self.A.device))

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)                                                        # base(x) + s · (x Aᵀ) Bᵀ
        A = torch.cat([self.A.detach(), self.A_K]).to(x.dtype)                        # (2 rank, in)
        B = torch.cat([self.B.detach(), -self.B_K], dim=1) * self.started             # (out, 2 rank), zero before step K
        return add_product(y, F.linear(x, A), B, self.method.delta_ratio * self.scale)

    def factors(self) -> tuple[Tensor, Tensor]:
        """(out, 2 rank) and (2 rank, in): merging adds their product to W, s · [(1 + λ) B, −λ B_K] [A; A_K]."""
        ratio = self.method.delta_ratio * self.started.to(self.B.dtype)               # 0 before step K
        return self.scale * torch.cat([(1 + ratio) * self.B, -ratio * self.B_K], dim=1), torch.cat([self.A, self.A_K])
