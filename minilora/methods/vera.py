"""VeRA: one random A and B for all layers, frozen; each layer trains two vectors (Kopiczko et al. 2023, arXiv:2310.11454, eq. 2).

    y = x Wᵀ + bias + b ⊙ ((d ⊙ (x Aᵀ)) Bᵀ)        A: (rank, in)   B: (out, rank)   d: (rank)   b: (out)

A and B are drawn from a seed, Kaiming uniform, and never change. Layers of different shapes share them by slicing: A is as
wide as the widest input, B as tall as the tallest output. b starts at zero, d at d_initial. There is no alpha.

Trainable parameters: rank + out for each adapted layer.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minilora import checks
from minilora.adapter import Adapter, Method


@dataclass(frozen=True)
class VeRA(Method):
    """rank: columns of the shared B, usually far more than LoRA's; d_initial: start of d; seed: of A and B; dropout: on the branch."""

    rank: int
    d_initial: float = 0.1
    seed: int = 0
    dropout: float = 0.0

    def __post_init__(self):
        checks.whole("rank", self.rank, 1)               # it may exceed min(in, out): B diag(d) A is no low-rank factorization
        checks.number("d_initial", self.d_initial)
        checks.whole("seed", self.seed, 0)
        if self.seed >= 2**64:
            raise ValueError(f"seed must be below 2**64, got {self.seed}")
        checks.share("dropout", self.dropout)

    def wrap(self, linears: dict[str, nn.Linear]) -> dict[str, "VeRALinear"]:
        devices = {linear.weight.device for linear in linears.values()}
        if len(devices) > 1:
            raise ValueError(f"VeRA's layers share one A and B, and these lie on {len(devices)} devices: {', '.join(map(str, devices))}")
        A, B = self.projections(max(linear.in_features for linear in linears.values()),
                                max(linear.out_features for linear in linears.values()))
        wide = any(linear.weight.dtype == torch.float64 for linear in linears.values())
        A, B = (nn.Parameter(M.to(devices.copy().pop(), torch.float64 if wide else torch.float32), requires_grad=False) for M in (A, B))
        return {name: VeRALinear(linear, self, A, B) for name, linear in linears.items()}

    def projections(self, widest: int, tallest: int) -> tuple[Tensor, Tensor]:
        """A (rank, widest) and B (tallest, rank) of this seed: the same numbers as PEFT's, drawn on the CPU in float32."""
        dice = torch.Generator("cpu").manual_seed(self.seed)
        def kaiming_uniform(rows, columns):                                               # std = √(2 / columns)
            return torch.empty(rows, columns).uniform_(-math.sqrt(6 / columns), math.sqrt(6 / columns), generator=dice)
        return kaiming_uniform(self.rank, widest), kaiming_uniform(tallest, self.rank)


class VeRALinear(Adapter):
    """A frozen linear layer with a frozen random update beside it, scaled by two trained vectors."""

    def __init__(self, base: nn.Linear, method: VeRA, A: nn.Parameter, B: nn.Parameter):
        super().__init__(base, method)
        self.dropout = nn.Dropout(method.dropout)
        self.A, self.B = A, B                                         # the same two Parameters in every layer
        self.d = self.empty(method.rank)
        self.b = self.empty(base.out_features)
        nn.init.constant_(self.d, method.d_initial)
        nn.init.zeros_(self.b)

    def forward(self, x: Tensor) -> Tensor:
        A, B = self.A[:, : self.in_features].to(x.dtype), self.B[: self.out_features].to(x.dtype)
        z = self.d.to(x.dtype) * F.linear(self.dropout(x), A)         # (..., in) -> (..., rank)
        v, y = F.linear(z, B), self.base(x)                           # (..., rank) -> (..., out)
        return torch.addcmul(y, self.b.to(y.dtype), v)                # base(x) + b ⊙ v in one pass

    def factors(self) -> tuple[Tensor, Tensor]:
        """(out, rank) and (rank, in): merging adds their product to W, diag(b) B diag(d) A."""
        A, B = self.A[:, : self.in_features], self.B[: self.out_features]
        return self.b[:, None] * B, self.d[:, None] * A
