"""LoRA: W stays as it is; a low-rank update is trained beside it (Hu et al. 2021, arXiv:2106.09685, section 4.1).

    y = x Wᵀ + b + s · (x Aᵀ) Bᵀ        s = alpha / rank        A: (rank, in)   B: (out, rank)

B starts at zero, so dW = s · B A starts at zero and the adapted model starts as the original one. A starts random:
were it zero too, neither factor would ever receive a gradient.

rsLoRA (Kalajdzievski 2023, arXiv:2312.03732) changes one thing: s = alpha / √rank.

Trainable parameters: rank · (in + out) for each adapted layer.
"""

import math
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from minilora import checks
from minilora.adapter import Adapter, Method, add_product


@dataclass(frozen=True)
class LoRA(Method):
    """rank: width of the update; alpha: its strength; dropout: on the update's input only; rslora: s = alpha / √rank."""

    rank: int
    alpha: float = 8.0
    dropout: float = 0.0
    rslora: bool = False

    def __post_init__(self):
        checks.whole("rank", self.rank, 1)
        checks.number("alpha", self.alpha)
        checks.share("dropout", self.dropout)

    @property
    def scale(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    def unfit(self, linear: nn.Linear) -> str:
        return too_thin(self.rank, linear)

    def layer(self, linear: nn.Linear) -> "LoRALinear":
        return LoRALinear(linear, self)


class LoRALinear(Adapter):
    """A frozen linear layer with a trainable low-rank update beside it."""

    def __init__(self, base: nn.Linear, method: LoRA):
        check_rank(method.rank, base)
        super().__init__(base, method)
        self.scale = method.scale
        self.dropout = nn.Dropout(method.dropout)
        self.A = self.empty(method.rank, base.in_features)
        self.B = self.empty(base.out_features, method.rank)
        self.start()

    def start(self) -> None:
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))  # U(±1/√in), nn.Linear's own; the paper says Gaussian
        nn.init.zeros_(self.B)

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)                                              # (..., in) -> (..., out)
        z = F.linear(self.dropout(x), self.A.to(x.dtype))             # (..., in) -> (..., rank)
        return add_product(y, z, self.B, self.scale)                  # y + s · z Bᵀ

    def factors(self) -> tuple[Tensor, Tensor]:
        """(out, rank) and (rank, in): merging adds their product to W."""
        return self.scale * self.B, self.A


def too_thin(rank: int, linear: nn.Linear) -> str:
    """Why a pair of this rank is too wide for the layer, or ""."""
    if rank <= min(linear.in_features, linear.out_features):
        return ""
    return (f"rank {rank} is above min(in, out) of a {linear.in_features} -> {linear.out_features} layer: "
            "no update of W has a higher rank than that")


def check_rank(rank: int, linear: nn.Linear) -> None:
    if reason := too_thin(rank, linear):
        raise ValueError(reason)
