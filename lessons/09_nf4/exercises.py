"""Lesson 09: what are sixteen good levels? Replace each `raise NotImplementedError` and run `pytest lessons/09_nf4`.

levels (k): c_0 = -1 < … < c_(k-1) = 1, one of them 0; NF4 has k = 16.     a block: weights in a row that share one scale, the largest |w| among them
code: the index of a level, a uint8 from 0 to k - 1.                        w ≈ levels[code] · scale
The base is frozen: no gradient has to pass through any of these.
"""

import torch
from torch import Tensor


def bits_per_weight(block_size: int, second: int | None) -> float:
    """Bits that a weight takes: 4 for its code, and its share of the block's scale.

    second None: a scale is a float32.   second = 256, say: double quantization. A scale is a code of 8 bits, and every 256 scales share
    one more float32. (The one offset of a whole tensor is too little to count.)
    """
    raise NotImplementedError


def normal_levels(p: float, bits: int) -> Tensor:
    """(2**bits) float64, ascending: quantiles of N(0, 1), divided by the largest of them, which is above 0. bits at least 2, p between 0.5 and 1.

    half = 2**(bits - 1).   Above 0: Q at `half` equal steps from 0.5, left out, to p.   Below 0: the same with half - 1 steps, mirrored.
    And 0 itself. Q, the inverse of the normal distribution function, is torch.special.ndtri (or statistics.NormalDist().inv_cdf).
    """
    raise NotImplementedError


def quantize_block(w: Tensor, levels: Tensor) -> tuple[Tensor, Tensor]:
    """(codes, scales): each weight as the nearest level to w / scale. Every last dimension of w is a block.

    w: (..., size), and ... may be empty: one block   levels: (k) ascending, in w's dtype   ->   (..., size) uint8, (...)
    Half-way between two levels the lower one is taken. A block of zeros has scale 0 and the code of the level 0, wherever `levels` has it.
    """
    raise NotImplementedError


def pack(codes: Tensor) -> Tensor:
    """Two codes of four bits in each byte, the first in the high half: 16 · first + second. An odd one out is joined by 7, NF4's code of 0.

    (n) uint8, each from 0 to 15   ->   (⌈n / 2⌉) uint8; of no codes, n = 0, no bytes
    """
    raise NotImplementedError


def unpack(packed: Tensor, n: int) -> Tensor:
    """The way back: (⌈n / 2⌉) bytes -> the n codes, each from 0 to 15, uint8. Where n is odd the last half byte is left out."""
    raise NotImplementedError


def dequantize(codes: Tensor, scales: Tensor, levels: Tensor, block_size: int) -> Tensor:
    """levels[code] · scale of its block, a number a weight. The last block may be shorter.

    codes: (n) uint8   scales: (⌈n / block_size⌉)   levels: (k), in the scales' dtype   ->   (n), in that dtype
    """
    raise NotImplementedError


def double_quantize(scales: Tensor, table: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """(codes, absmax, offset): the scales in 8 bits. They are all above 0, so their mean is taken off first.

    offset = mean of all scales, added up in float64 and rounded to float32     d = scales − offset
    in blocks of `size`, the last may be shorter:     absmax = max |d|     code = index of the value in `table` nearest to d / absmax, half-way the lower one

    scales: (m) float32   table: (k) float32, k ≤ 256, ascending from about -1 to 1, one of them 0   ->   (m) uint8, (⌈m / size⌉) float32, () float32
    Where all d of a block are 0, absmax is 0 and the code that of the 0, wherever `table` has it.
    The way back is dequantize's: table[code] · absmax, and the offset on top.
    """
    raise NotImplementedError
