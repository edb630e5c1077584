"""20 · The seed that moved the data

The piece: the start of a run in a comparison: LoRA's A for this rank and this seed, and the batches to train on.
The promise: code(into, rank, seed) gives A (rank, in) and four batches (8, in). Rank and seed are A's business: the batches are always
the same.
"""

import torch


def draw(rank, into, dice=None):
    return torch.randn(rank, into, generator=dice) / into**0.5


def batches(into, dice=None):
    return [torch.randn(8, into, generator=dice) for _ in range(4)]


def healthy(into, rank, seed):
    A = draw(rank, into, torch.Generator().manual_seed(seed))
    return A, batches(into, torch.Generator().manual_seed(0))               # dice of their own


def sick(into, rank, seed):
    torch.manual_seed(seed)
    A = draw(rank, into)                                                     # takes rank · in numbers off the common dice,
    return A, batches(into)                                                  # and the batches come from what is left


def cost():
    def spread(kind):
        """Of the loss before the first step, where B = 0 and no adapter has a say."""
        loss = [torch.cat(kind(6, 4, seed)[1]).square().mean() for seed in range(5)]
        return torch.stack(loss).std() / torch.stack(loss).mean()

    return f"five seeds of one model differ by {spread(sick):.0%} (standard deviation) before the first step; with fixed data by {spread(healthy):.0%}"
