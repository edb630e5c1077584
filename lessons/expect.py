"""What the lessons' tests are written with: draws from a seed, and a comparison that names the likely mistake before it shows numbers."""

import torch
from torch import Tensor


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Normal numbers, the same for the same seed; float64, in which rounding cannot hide a mistake."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def must_equal(got, want: Tensor, mistakes: dict[str, Tensor], what: str, rtol: float = 1e-9, atol: float = 1e-12) -> None:
    """Type, known mistakes, shape, then value. Where a known mistake gives exactly `got`, its name is the message."""
    assert isinstance(got, Tensor), f"{what}: a tensor is wanted, got {type(got).__name__}"
    for name, wrong in mistakes.items():
        same = got.shape == wrong.shape and torch.allclose(got.double(), wrong.double(), rtol=rtol, atol=atol)
        assert not same, f"{name} ({what})"
    assert got.shape == want.shape, f"{what}: shape {tuple(want.shape)} is wanted, got {tuple(got.shape)}"
    worst = (got.double() - want.double()).abs().max().item() if got.numel() else 0.0
    assert torch.allclose(got.double(), want.double(), rtol=rtol, atol=atol), f"{what}: off by up to {worst:.3g}"
