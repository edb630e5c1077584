"""05 · Sixteen levels and no zero

The piece: NF4, four bits a weight, or nearly (its offset is 0.9677, and here 31/32). The largest |w| of each block is its scale; w / scale goes
to the nearest of 16 quantiles of the normal law.
The promise: code(w, block) is w rebuilt, of w's shape; a weight that is zero comes back as zero, exactly.
"""

from statistics import NormalDist

import torch


def quantiles(start, stop, count):
    """`count` quantiles of the normal law, from `start` to `stop`, equal steps of probability."""
    return torch.tensor([NormalDist().inv_cdf(p) for p in torch.linspace(start, stop, count, dtype=torch.float64).tolist()])


def rebuild(w, block, levels):
    blocks = w.reshape(-1, block)                                            # block divides w.numel()
    scales = blocks.abs().amax(1, keepdim=True).clamp(min=1e-30)
    codes = (blocks[..., None] / scales[..., None] - levels).abs().argmin(-1)
    return (levels[codes] * scales).view_as(w)


def healthy(w, block=64):
    negative = quantiles(1 / 32, 0.5, 8)                                     # seven below zero, and zero itself
    positive = quantiles(0.5, 31 / 32, 9)[1:]                                # eight above it
    levels = torch.cat([negative / -negative[0], positive / positive[-1]])
    levels[7] = 0.0
    return rebuild(w, block, levels)


def sick(w, block=64):
    levels = quantiles(1 / 32, 31 / 32, 16)                                  # even, symmetric, tidy: and zero falls between two levels
    return rebuild(w, block, levels / levels[-1])


def cost():
    torch.manual_seed(0)
    w = torch.randn(64, 64) * (torch.rand(64, 64) < 0.5)                     # half of it pruned
    pruned = w == 0
    back = sick(w)[pruned]
    times = (sick(w) - w).norm() / (healthy(w) - w).norm()
    return f"{(back == 0).sum()} of {pruned.sum():,} pruned weights come back as zero, and the error is {times:.1f} times what it is with a zero"
