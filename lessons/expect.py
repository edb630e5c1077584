"""What the lessons' tests are written with: draws from a seed, and a comparison that names the likely mistake before it shows numbers."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


@dataclass(frozen=True)
class Size:
    """Of one layer and its update. No two numbers are equal, and the scale is no whole number."""

    out: int
    into: int
    rank: int
    alpha: float

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    def factors(self, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        """W (out, in), A (rank, in), B (out, rank), all random: at B = 0 almost any answer passes."""
        return draw(self.out, self.into, seed=seed), draw(self.rank, self.into, seed=seed + 101), draw(self.out, self.rank, seed=seed + 202)

    def __str__(self) -> str:
        return f"{self.out}x{self.into}, rank {self.rank}, alpha {self.alpha:g}"


SIZES = (Size(out=7, into=5, rank=2, alpha=9.0), Size(out=4, into=6, rank=3, alpha=2.0))      # s = 9/2 and 2/3
each_size = pytest.mark.parametrize("size", SIZES, ids=str)


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Normal numbers, the same for the same seed; float64, in which rounding cannot hide a mistake."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def must_equal(got, want: Tensor, mistakes: dict[str, Tensor], what: str, rtol: float = 1e-9, atol: float = 1e-12) -> None:
    """Type, known mistakes, shape, then value. Where a known mistake gives exactly `got`, its name is the message."""
    assert isinstance(got, Tensor), f"{what}: a tensor is wanted, got {type(got).__name__}"
    for name, wrong in mistakes.items():
        right = wrong.shape == want.shape and torch.allclose(want.double(), wrong.double(), rtol=rtol, atol=atol)      # here the mistake makes no difference
        same = got.shape == wrong.shape and torch.allclose(got.double(), wrong.double(), rtol=rtol, atol=atol)
        assert right or not same, f"{name} ({what})"
    assert got.shape == want.shape, f"{what}: shape {tuple(want.shape)} is wanted, got {tuple(got.shape)}"
    worst = (got.double() - want.double()).abs().max().item() if got.numel() else 0.0
    assert torch.allclose(got.double(), want.double(), rtol=rtol, atol=atol), f"{what}: off by up to {worst:.3g}"


class Sizes(TorchDispatchMode):
    """Inside the block it notes how many numbers the largest tensor has that is made there. A view of what was there is not made."""

    def __init__(self):
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        there = {t.untyped_storage().data_ptr() for t in args if isinstance(t, torch.Tensor)}
        for t in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(t, torch.Tensor) and t.untyped_storage().data_ptr() not in there:
                self.largest = max(self.largest, t.numel())
        return result
