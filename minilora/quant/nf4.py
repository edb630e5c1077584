"""NF4: sixteen levels at quantiles of the normal distribution, and one scale a block (Dettmers et al. 2023, arXiv:2305.14314, section 3).

    a block of w, 64 numbers in a row:    scale = max |w|        code = where w / scale lies among the levels        w ≈ level[code] · scale

Trained weights are nearly normal, so levels at quantiles are used more evenly than equal steps would be. One level is exactly 0, one is
-1 and one is 1, so that zeros and the largest weight of each block come back as they were, up to sign. Half a byte for the code and
32 / 64 bit for the scale: 4.5 bits a weight; double.py makes 4.127 of it. spec.py says the same slowly.

Codes and scales are bit for bit what bitsandbytes stores on a CPU, but for scales below 1e-38.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from minilora.quant.double import DoubleQuantized, double_quantize

# As published, in float32. derived_levels() says where they come from.
LEVELS = torch.tensor([
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0])
THRESHOLDS = (LEVELS[:-1] + LEVELS[1:]) / 2
PAIRS = torch.stack([LEVELS.repeat_interleave(16), LEVELS.repeat(16)], dim=1)    # (256, 2): what each byte stands for
TWO_LEVELS = PAIRS.view(torch.int64).flatten()                                   # the two floats as one number of 8 bytes: half the lookups

BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
SMALLEST = 1e-38        # a smaller scale is taken as this one, so that 1 / scale is a number
CHUNK = 2**17           # so many weights at a time: a copy of all of them never exists


def derived_levels(offset: float = 1 - (1 / 30 + 1 / 32) / 2) -> Tensor:
    """(16): the levels from the quantile function of N(0, 1), eight above 0, seven below, and 0; the largest scaled to 1.

    The outermost quantile lies between those that 15 and 16 equal shares would have, 1 − 1/30 and 1 − 1/32. This agrees with the
    published levels to 5e-7; offset=0.9677083, as their authors rounded it, gives them bit for bit.
    """
    above = torch.special.ndtri(torch.linspace(offset, 0.5, 9)[:-1].double())
    below = -torch.special.ndtri(torch.linspace(offset, 0.5, 8)[:-1].double())
    levels = torch.cat([below, torch.zeros(1, dtype=torch.float64), above]).sort().values.float()
    return levels / levels.max()


@dataclass(frozen=True)
class NF4Tensor:
    """A tensor in four bits. codes: (⌈n / 2⌉) uint8, two to a byte, the first in the high half; stored_scales: (⌈n / block_size⌉) float32,
    or those in 8 bits again; shape and dtype of what it stands for. Raises ValueError where the parts do not fit together."""

    codes: Tensor
    stored_scales: Tensor | DoubleQuantized
    shape: torch.Size
    dtype: torch.dtype
    block_size: int

    def __post_init__(self):
        check_block_size(self.block_size)
        n, scales = self.shape.numel(), self.stored_scales
        blocks = -(-n // self.block_size)
        found = (self.codes.dtype, tuple(self.codes.shape), tuple(scales.shape))
        if found != (torch.uint8, (-(-n // 2),), (blocks,)):
            raise ValueError(f"{n} weights in blocks of {self.block_size} need {-(-n // 2)} bytes of codes and {blocks} scales, "
                             f"got codes {found[1]} of {found[0]} and scales {found[2]}")

    @property
    def scales(self) -> Tensor:
        """(⌈n / block_size⌉) float32: the largest |w| of each block, or what double quantization has left of it."""
        return self.stored_scales.dequantize() if isinstance(self.stored_scales, DoubleQuantized) else self.stored_scales

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.stored_scales.nbytes

    @property
    def bits_per_parameter(self) -> float:
        return 8 * self.nbytes / self.shape.numel()

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """`shape`: level[code] · scale, computed in float32, in `dtype` or else in the dtype that was quantized."""
        n, size = self.shape.numel(), self.block_size
        w = torch.empty(2 * len(self.codes), dtype=dtype or self.dtype, device=self.codes.device)
        two_levels, scales = TWO_LEVELS.to(w.device), self.scales[:, None]
        pairs = torch.empty(min(CHUNK, len(w)) // 2, dtype=torch.int64, device=w.device)      # each chunk writes over it: new memory costs time
        for start in range(0, n, CHUNK):                                              # a multiple of every block size
            stop = min(start + CHUNK, len(w))
            codes = self.codes[start // 2:stop // 2]
            levels = torch.index_select(two_levels, 0, codes.int(), out=pairs[:len(codes)]).view(torch.float32)
            full = len(levels) // size * size
            first, blocks = start // size, full // size
            torch.mul(levels[:full].view(-1, size), scales[first:first + blocks], out=w[start:start + full].view(-1, size))
            if full < len(levels):
                w[start + full:stop] = levels[full:] * scales[first + blocks]
        return w[:n].view(self.shape)


@torch.no_grad()
def quantize_nf4(w: Tensor, block_size: int = 64, double: bool = False) -> NF4Tensor:
    """w: any shape, row by row in blocks; the last block may be shorter. double: the scales in 8 bits too.

    Raises ValueError where w is not a tensor of real floating-point numbers with something in it, all of them finite.
    """
    check_block_size(block_size)
    if not isinstance(w, Tensor) or not w.is_floating_point():
        raise ValueError(f"NF4 holds floating-point numbers, got {w.dtype if isinstance(w, Tensor) else type(w).__name__}")
    if w.is_meta:
        raise ValueError("a tensor on the meta device has a shape and no numbers: load its weights first")
    if not w.numel():
        raise ValueError(f"a tensor of shape {tuple(w.shape)} has nothing to quantize")
    flat = w.reshape(-1)
    codes = torch.empty(-(-len(flat) // 2), dtype=torch.uint8, device=w.device)
    scales = torch.empty(-(-len(flat) // block_size), device=w.device)
    thresholds = THRESHOLDS.to(w.device)
    for start in range(0, len(flat), CHUNK):
        part = flat[start:start + CHUNK].float()
        full = len(part) // block_size * block_size
        blocks, tail = part[:full].view(-1, block_size), part[full:]
        absmax = blocks.abs().amax(dim=1) if full else blocks.new_empty(0)
        v = (blocks * (1 / absmax.clamp_min(SMALLEST))[:, None]).view(-1)
        if len(tail):
            absmax = torch.cat([absmax, tail.abs().amax()[None]])
            v = torch.cat([v, tail / absmax[-1].clamp_min(SMALLEST), tail.new_zeros(len(tail) % 2)])
        if not absmax.isfinite().all():
            _refuse_not_finite(w, start + int((~part.isfinite()).nonzero()[0]))
        code = torch.bucketize(v, thresholds, out_int32=True).to(torch.uint8)          # a tie goes down
        codes[start // 2:start // 2 + len(code) // 2] = code[::2] << 4 | code[1::2]
        scales[start // block_size:start // block_size + len(absmax)] = absmax
    return NF4Tensor(codes, double_quantize(scales) if double else scales, w.shape, w.dtype, block_size)


def unpack(codes: Tensor, n: int) -> Tensor:
    """(⌈n / 2⌉) bytes -> (n) codes from 0 to 15."""
    return torch.stack([codes >> 4, codes & 15], dim=1).flatten()[:n]


def check_block_size(block_size: int) -> None:
    if block_size not in BLOCK_SIZES or isinstance(block_size, bool):
        raise ValueError(f"block_size must be one of {', '.join(map(str, BLOCK_SIZES))}, got {block_size!r}")


def _refuse_not_finite(w: Tensor, position: int) -> None:
    index = tuple(int(i) for i in torch.unravel_index(torch.tensor(position), w.shape))
    raise ValueError(f"the value at {index} is {w[index].item()}: one such number would spoil its whole block, and with double "
                     "quantization the whole tensor")
