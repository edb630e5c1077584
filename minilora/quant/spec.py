"""What four bits mean, in numpy and in the slow obvious way: one weight at a time. nf4.py and double.py must say the same, fast.

    levels   c_0 = -1 < c_1 < … < c_15 = 1          thresholds   t_k = (c_k + c_k+1) / 2
    code(v)  = the number of thresholds below v     so a tie, v = t_k, goes down
    a block of w:   scale = max |w|     code_i = code(w_i / scale)     w_i ≈ c[code_i] · scale
    a byte          first code · 16 + second code

Source: Dettmers et al. 2023 (arXiv:2305.14314, section 3), and where it is silent the authors' bitsandbytes.
"""

from statistics import NormalDist

import numpy as np

SMALLEST = np.float32(1e-38)    # below this a scale is taken as this one, so that 1 / scale is a number


def paper_levels() -> list[float]:
    """The paper's equation 4 as printed, q_i = (Q(i/17) + Q((i+1)/17)) / 2 for i = 1 … 15, over its maximum: 15 levels, symmetric. Not NF4."""
    Q = NormalDist().inv_cdf
    q = [(Q(i / 17) + Q((i + 1) / 17)) / 2 for i in range(1, 16)]
    return [value / max(q) for value in q]


def quantize(w: np.ndarray, levels: np.ndarray, block_size: int) -> tuple[np.ndarray, np.ndarray]:
    """w: any shape -> one code a weight (n) uint8, one scale a block (⌈n / block_size⌉) float32. A last block may be short."""
    w = np.asarray(w, np.float32).reshape(-1)
    thresholds = (levels[:-1] + levels[1:]) / np.float32(2)
    codes, scales = [], []
    for start in range(0, len(w), block_size):
        block = w[start:start + block_size]
        scale = max(abs(value) for value in block)
        scales.append(scale)
        divisor = max(scale, SMALLEST)
        for value in block:     # bitsandbytes multiplies full blocks by 1 / scale, and divides a short one; the last bit may differ
            v = value * (np.float32(1) / divisor) if len(block) == block_size else value / divisor
            codes.append(sum(v > t for t in thresholds))
    return np.array(codes, np.uint8), np.array(scales, np.float32)


def pack(codes: np.ndarray, filler: int = 7) -> np.ndarray:
    """(n) codes -> (⌈n / 2⌉) bytes, the first of two in the high half; an odd one out is joined by `filler`, the code of 0."""
    even = [*codes, filler] if len(codes) % 2 else [*codes]
    return np.array([16 * int(first) + int(second) for first, second in zip(even[::2], even[1::2])], np.uint8)


def unpack(packed: np.ndarray, n: int) -> np.ndarray:
    """(⌈n / 2⌉) bytes -> (n) codes."""
    return np.array([half for byte in packed for half in (byte // 16, byte % 16)][:n], np.uint8)


def dequantize(codes: np.ndarray, scales: np.ndarray, levels: np.ndarray, block_size: int) -> np.ndarray:
    """(n) codes -> (n) float32."""
    return np.array([levels[code] * scales[i // block_size] for i, code in enumerate(codes)], np.float32)


def dynamic_map() -> np.ndarray:
    """The 256 values of bitsandbytes' 8-bit type: 1, 0, and ± 10^-e · m for e = 0 … 6, where the fewer the leading zeros, the finer m."""
    values = [0.0, 1.0]
    for e in range(7):
        edges = np.linspace(0.1, 1.0, 2 ** (6 - e) + 1)               # decade e has 2^(6 - e) values: the midpoints of as many steps
        for low, high in zip(edges[:-1], edges[1:]):
            values += [10.0**-e * (low + high) / 2, -(10.0**-e) * (low + high) / 2]
    return np.array(sorted(values), np.float32)


def quantize_scales(scales: np.ndarray, block_size: int = 256) -> tuple[np.ndarray, np.ndarray, np.float32]:
    """(m) scales -> (m) codes of dynamic_map, (⌈m / 256⌉) scales of the scales, and the mean that was taken off first."""
    levels, offset = dynamic_map(), np.float32(np.mean(scales, dtype=np.float64))
    codes, absmax = [], []
    for start in range(0, len(scales), block_size):
        block = scales[start:start + block_size] - offset
        absmax.append(max(abs(value) for value in block))
        divisor = max(absmax[-1], SMALLEST)
        codes += [int(np.argmin(np.abs(levels - value / divisor))) for value in block]
    return np.array(codes, np.uint8), np.array(absmax, np.float32), offset


def dequantize_scales(codes: np.ndarray, absmax: np.ndarray, offset: np.float32, block_size: int = 256) -> np.ndarray:
    """(m) codes -> (m) scales, none below 0: a scale is a largest |w|, and a negative one would turn its block's signs around."""
    levels = dynamic_map()
    return np.array([max(levels[code] * absmax[i // block_size] + offset, 0) for i, code in enumerate(codes)], np.float32)
