"""Double quantization: the scales are quantized too (Dettmers et al. 2023, arXiv:2305.14314, section 3).

    offset = mean of all scales        d = scale − offset        in blocks of 256:  absmax = max |d|      code = nearest of MAP to d / absmax
    scale ≈ MAP[code] · absmax + offset                          32 / 64 bits a weight become 8 / 64 + 32 / (64 · 256): 4.5 in all become 4.127

The paper says FP8; its code, bitsandbytes, uses the dynamic 8-bit type, which is MAP. A scale is never negative, and its rebuilt value
is not let below 0 either: in bitsandbytes a small block beside large ones can come back with its signs turned around.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK = 256
SMALLEST = 1e-38


def dynamic_map() -> Tensor:
    """(256) float32, ascending: 0, 1, and ± the midpoints of 2^(6−e) equal steps from 0.1 to 1, times 10^-e, for e = 0 … 6."""
    positive = []
    for e in range(7):
        steps = torch.linspace(0.1, 1, 2 ** (6 - e) + 1)
        positive += (10**-e * ((steps[:-1] + steps[1:]) / 2)).tolist()
    return torch.tensor(sorted([*positive, *(-value for value in positive), 0.0, 1.0]))


MAP = dynamic_map()
MIDDLES = (MAP[:-1] + MAP[1:]) / 2


@dataclass(frozen=True)
class DoubleQuantized:
    """m scales in 8 bits. codes: (m) uint8; absmax: (⌈m / 256⌉) float32; offset: () float32. Raises ValueError where a part is missing."""

    codes: Tensor
    absmax: Tensor
    offset: Tensor

    def __post_init__(self):
        for name in ("codes", "absmax", "offset"):
            if not isinstance(getattr(self, name), Tensor):
                raise ValueError(f"double-quantized scales need codes, absmax and offset; {name} is {getattr(self, name)!r}")
        m, blocks = len(self.codes), -(-len(self.codes) // BLOCK)
        if self.codes.dtype != torch.uint8 or self.absmax.shape != (blocks,) or self.offset.shape != ():
            raise ValueError(f"{m} scales in blocks of {BLOCK} need uint8 codes, {blocks} absmax and one offset, got codes of {self.codes.dtype}, "
                             f"absmax {tuple(self.absmax.shape)} and offset {tuple(self.offset.shape)}")

    @property
    def shape(self) -> torch.Size:
        return self.codes.shape

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.absmax.nbytes + self.offset.nbytes

    def dequantize(self) -> Tensor:
        """(m) float32."""
        d = MAP.to(self.codes.device).index_select(0, self.codes.int()) * self.absmax.repeat_interleave(BLOCK)[:len(self.codes)]
        return (d + self.offset).clamp_min(0)


def double_quantize(scales: Tensor) -> DoubleQuantized:
    """scales: (m) float32, finite."""
    offset = scales.double().mean().float()        # in float64 it is the same number on every machine, however many threads add it up
    d = scales - offset
    blocks = torch.nn.functional.pad(d, (0, -len(d) % BLOCK)).view(-1, BLOCK)
    absmax = blocks.abs().amax(dim=1)
    v = blocks / absmax.clamp_min(SMALLEST)[:, None]
    codes = torch.bucketize(v, MIDDLES.to(v.device), out_int32=True).to(torch.uint8)
    return DoubleQuantized(codes.view(-1)[:len(d)].clone(), absmax, offset)
