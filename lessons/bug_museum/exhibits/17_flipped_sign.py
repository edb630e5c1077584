"""17 · A scale below zero

The piece: four bits a weight, one scale a block, and the scales in eight bits too (double quantization): mean + step · (−127 … 127).
The promise: code(w, block) is w rebuilt, of w's shape. A weight may come back a little off, or as zero, but never with the opposite sign.
"""

import torch


def in_four_bits(w, block):
    """Whole numbers −7 … 7 (blocks, block), and the scales (blocks, 1)."""
    blocks = w.reshape(-1, block)                                            # block divides w.numel()
    scales = blocks.abs().amax(1, keepdim=True).clamp(min=1e-30) / 7
    return (blocks / scales).round(), scales


def through_eight_bits(scales):
    mean = scales.mean()
    step = (scales - mean).abs().max().clamp(min=1e-30) / 127
    return mean + step * ((scales - mean) / step).round()                    # off by half a step at most, and a scale may be smaller than that


def healthy(w, block):
    codes, scales = in_four_bits(w, block)
    return (codes * through_eight_bits(scales).clamp(min=0)).view_as(w)


def sick(w, block):
    codes, scales = in_four_bits(w, block)
    return (codes * through_eight_bits(scales)).view_as(w)


def cost():
    flipped = []
    for seed in range(20):
        torch.manual_seed(seed)
        w = torch.randn(64, 64) * torch.logspace(-3, 3, 64)[:, None]         # small rows and a few huge ones
        flipped.append((sick(w, 64) * w < 0).double().mean().item())
    hit = [share for share in flipped if share > 0]
    return f"of 20 matrices with a few huge rows {20 - len(hit)} are spared; in the others {sum(hit) / len(hit):.0%} of the weights change sign"
