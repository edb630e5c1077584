"""Lesson 09, worked. The same names and signatures as in exercises.py."""

import torch
import torch.nn.functional as F
from torch import Tensor


def bits_per_weight(block_size: int, second: int | None) -> float:
    """The scale is one for many, so it weighs little; its own scale weighs next to nothing."""
    scale = 32 if second is None else 8 + 32 / second
    return 4 + scale / block_size


def normal_levels(p: float, bits: int) -> Tensor:
    """One level is spent on 0. An odd number is left, so one side gets one more than the other."""
    half = 2 ** (bits - 1)
    above = torch.special.ndtri(torch.linspace(0.5, p, half + 1, dtype=torch.float64))                 # (half + 1): the first is Q(0.5) = 0
    below = -torch.special.ndtri(torch.linspace(0.5, p, half, dtype=torch.float64)).flip(0)[:-1]       # (half - 1): that 0 left out
    return torch.cat([below, above]) / above[-1]


@torch.no_grad()
def quantize_block(w: Tensor, levels: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest level is found by counting the middles between levels that lie below."""
    scales = w.abs().amax(dim=-1)                                            # (..., size) -> (...)
    v = w / (scales + (scales == 0))[..., None]                              # a block of zeros is divided by 1
    codes = torch.bucketize(v, (levels[:-1] + levels[1:]) / 2)               # v on a middle counts those below it: it goes down
    return codes.to(torch.uint8), scales


@torch.no_grad()
def pack(codes: Tensor) -> Tensor:
    """A shift by four bits is a product with 16."""
    even = torch.cat([codes, codes.new_full((len(codes) % 2,), 7)])          # (n) -> (n or n + 1)
    return even[::2] << 4 | even[1::2]


@torch.no_grad()
def unpack(packed: Tensor, n: int) -> Tensor:
    """15 is 00001111: it lets the low half through."""
    return torch.stack([packed >> 4, packed & 15], dim=1).flatten()[:n]      # (⌈n / 2⌉) -> (⌈n / 2⌉, 2) -> (n)


@torch.no_grad()
def dequantize(codes: Tensor, scales: Tensor, levels: Tensor, block_size: int) -> Tensor:
    """A uint8 tensor as an index would be taken for a mask."""
    return levels[codes.long()] * scales.repeat_interleave(block_size)[:len(codes)]


@torch.no_grad()
def double_quantize(scales: Tensor, table: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """quantize_block once more, with another table, on what the mean leaves of the scales."""
    offset = scales.double().mean().float()
    d = scales - offset
    blocks = F.pad(d, (0, -len(d) % size)).view(-1, size)                    # (m) -> (⌈m / size⌉, size); the zeros added are never the largest
    absmax = blocks.abs().amax(dim=1)
    v = blocks / (absmax + (absmax == 0))[:, None]
    codes = torch.bucketize(v, (table[:-1] + table[1:]) / 2).to(torch.uint8)
    return codes.flatten()[:len(d)], absmax, offset
