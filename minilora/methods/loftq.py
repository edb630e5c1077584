"""LoftQ and QPiSSA: a 4-bit Q and factors that start where the two together are near W (Li et al. 2023, arXiv:2310.08659; Meng et al.
2024, arXiv:2404.02948).

    y = x Qᵀ + b + s · (x Aᵀ) Bᵀ                        QLoRA starts with B A = 0, and so with all that quantizing W has lost

    LoftQ      B A <- 0     repeat:   Q <- nf4(W − s · B A)                     s · B A <- best rank-r part of W − Q
    QPiSSA     Q <- 0       repeat:   s · B A <- best rank-r part of W − Q      Q <- nf4(W − s · B A)

The same two lines, begun at the other end. LoftQ gives the factors what four bits miss; QPiSSA gives them W's largest part, so that four
bits have a smaller rest to hold. After that both are LoRA on Q. The factors are divided by √s, so that any alpha will do: the
reference code of LoftQ does not, and needs alpha = r.

Trainable parameters: rank · (in + out) for each adapted layer.
"""

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from minilora import checks
from minilora.methods.lora import LoRA, LoRALinear, check_rank
from minilora.quant.linear import NF4Linear
from minilora.quant.nf4 import NF4Tensor, check_block_size, quantize_nf4


@dataclass(frozen=True)
class LoftQ(LoRA):
    """LoRA's fields (alpha above 0); iterations: of the two lines above; block_size, double: of the 4-bit base."""

    iterations: int = 1
    block_size: int = 64
    double: bool = False
    four_bits: ClassVar[bool] = True

    def __post_init__(self):
        super().__post_init__()
        checks.number("alpha", self.alpha, "above 0", lambda alpha: alpha > 0)        # the factors start divided by √s
        checks.whole("iterations", self.iterations, 1)
        check_block_size(self.block_size)
        checks.flag("double", self.double)

    def layer(self, linear: nn.Linear) -> "LoftQLinear":
        return LoftQLinear(linear, self)

    def split(self, W: Tensor) -> tuple[NF4Tensor, Tensor, Tensor]:
        """W: (out, in) float64 -> Q, and A: (rank, in), B: (out, rank) with Q + s · B A near W."""
        BA = torch.zeros_like(W)                                                      # s · B A
        for _ in range(self.iterations):
            Q = self.quantized(W - BA)
            A, B = self.best_factors(W - Q.dequantize(torch.float64))
            BA = self.scale * (B @ A)
        return Q, A, B

    def quantized(self, W: Tensor) -> NF4Tensor:
        return quantize_nf4(W, self.block_size, self.double)

    def best_factors(self, W: Tensor) -> tuple[Tensor, Tensor]:
        """A and B for which s · B A is the best rank-r approximation of W (Eckart and Young 1936)."""
        U, S, Vt = torch.linalg.svd(W, full_matrices=False)
        root = (S[:self.rank] / self.scale).sqrt()                                    # (rank)
        return root[:, None] * Vt[:self.rank], U[:, :self.rank] * root


@dataclass(frozen=True)
class QPiSSA(LoftQ):
    """LoftQ's fields; alpha is the rank where none is given, so that s = 1 as in the paper (with rslora, √rank)."""

    alpha: float | None = None

    def __post_init__(self):
        if self.alpha is None:
            object.__setattr__(self, "alpha", float(self.rank) if isinstance(self.rank, int) else 1.0)
        super().__post_init__()

    def split(self, W: Tensor) -> tuple[NF4Tensor, Tensor, Tensor]:
        rest = W
        for _ in range(self.iterations):
            A, B = self.best_factors(rest)
            Q = self.quantized(W - self.scale * (B @ A))
            rest = W - Q.dequantize(torch.float64)
        return Q, A, B


class LoftQLinear(LoRALinear):
    """A 4-bit layer and a trainable low-rank part that together start near the dense layer that was there."""

    no_way_back = "its 4-bit base was made to be used with the adapter, and the dense W is gone; load the model again"

    @torch.no_grad()
    def __init__(self, base: nn.Linear, method: LoftQ):
        check_rank(method.rank, base)
        if isinstance(base, NF4Linear):
            raise ValueError(f"{type(method).__name__} chooses the 4-bit base itself and needs the dense weight; this layer is in four bits already")
        Q, A, B = method.split(base.weight.double())      # float64, so that every machine finds the same Q
        super().__init__(NF4Linear.standing_for(base, dataclasses.replace(Q, dtype=base.weight.dtype)), method)
        self.A.copy_(A)
        self.B.copy_(B)

    def start(self) -> None:
        """The factors come from `split`, not from chance."""
