"""Right answers in another style, each of which the tests must accept."""

from statistics import NormalDist

import numpy as np
import torch
from torch import Tensor


def bits_per_weight__of_a_large_tensor(block_size: int, second: int | None) -> float:
    weights = block_size * (second or 1)
    bits = 4 * weights
    if second is None:
        bits += 32
    else:
        bits += 8 * second
        bits += 32
    return bits / weights


def normal_levels__statistics(p: float, bits: int) -> Tensor:
    Q, half = NormalDist().inv_cdf, 2**bits // 2
    found = {0.0}
    for side, steps in ((1, half), (-1, half - 1)):
        for i in range(steps):
            found.add(side * Q(p - (p - 0.5) * i / steps) / Q(p))
    return torch.tensor(sorted(found), dtype=torch.float64)


def quantize_block__every_distance(w: Tensor, levels: Tensor) -> tuple[Tensor, Tensor]:
    scales = w.abs().max(-1).values
    v = torch.where(scales[..., None] > 0, w / scales[..., None], torch.zeros_like(w))
    return (v[..., None] - levels).abs().argmin(-1).byte(), scales


def quantize_block__numpy(w: Tensor, levels: Tensor) -> tuple[Tensor, Tensor]:
    rows = w.numpy().reshape(-1, w.shape[-1])
    middles, codes, scales = (levels[:-1] + levels[1:]).numpy() / 2, [], []
    for row in rows:
        scale = np.abs(row).max()
        scales.append(scale)
        codes.append([sum(value > middle * scale for middle in middles) if scale else levels.tolist().index(0) for value in row])
    return torch.from_numpy(np.array(codes, dtype=np.uint8)).view(w.shape), torch.from_numpy(np.array(scales)).view(w.shape[:-1])


def quantize_block__product(w: Tensor, levels: Tensor) -> tuple[Tensor, Tensor]:
    scales = torch.linalg.vector_norm(w, float("inf"), dim=-1)
    v = w * (1 / scales.clamp_min(1e-38)).unsqueeze(-1)
    return torch.searchsorted((levels[1:] + levels[:-1]) * 0.5, v.contiguous()).type(torch.uint8), scales


def pack__loop(codes: Tensor) -> Tensor:
    numbers = codes.tolist() + [7] * (len(codes) % 2)
    return torch.tensor([16 * numbers[i] + numbers[i + 1] for i in range(0, len(numbers), 2)], dtype=torch.uint8)


def pack__matrix(codes: Tensor) -> Tensor:
    even = torch.full((len(codes) + len(codes) % 2,), 7)
    even[:len(codes)] = codes
    return (even.view(-1, 2) @ torch.tensor([16, 1])).to(torch.uint8)


def unpack__loop(packed: Tensor, n: int) -> Tensor:
    return torch.tensor([byte // 16 if first else byte % 16 for byte in packed.tolist() for first in (True, False)][:n], dtype=torch.uint8)


def unpack__strided(packed: Tensor, n: int) -> Tensor:
    codes = torch.empty(2 * len(packed), dtype=torch.uint8)
    codes[::2], codes[1::2] = packed // 16, packed % 16
    return codes[:n]


def dequantize__loop(codes: Tensor, scales: Tensor, levels: Tensor, block_size: int) -> Tensor:
    return torch.stack([levels[int(code)] * scales[i // block_size] for i, code in enumerate(codes)])


def dequantize__numpy(codes: Tensor, scales: Tensor, levels: Tensor, block_size: int) -> Tensor:
    each = np.repeat(scales.numpy(), block_size)[:len(codes)]
    return torch.from_numpy(np.take(levels.numpy(), codes.numpy()) * each)


def double_quantize__blocks(scales: Tensor, table: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
    offset = scales.mean(dtype=torch.float64).to(torch.float32)
    codes, absmax = [], []
    for block in (scales - offset).split(size):
        largest = block.abs().max()
        absmax.append(largest)
        v = block / largest if largest > 0 else block
        codes.append(torch.bucketize(v, (table[1:] + table[:-1]) / 2))
    return torch.cat(codes).to(torch.uint8), torch.stack(absmax), offset


def double_quantize__distances(scales: Tensor, table: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
    offset = torch.tensor(np.float32(scales.double().numpy().mean()))
    d = scales - offset
    absmax = torch.zeros(-(-len(d) // size)).scatter_reduce(0, torch.arange(len(d)) // size, d.abs(), "amax")
    v = d / absmax.clamp_min(1e-38).repeat_interleave(size)[:len(d)]
    return (v[:, None] - table).abs().min(dim=1).indices.to(torch.uint8), absmax, offset
