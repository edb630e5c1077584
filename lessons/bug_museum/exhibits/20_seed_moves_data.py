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
    def lead(kind):
        """Of rank 8 over rank 4 at five seeds, before the first step: B = 0, no adapter has a say, and the loss is the data's."""
        loss = {rank: torch.stack([torch.cat(kind(6, rank, seed)[1]).square().mean() for seed in range(5)]) for rank in (4, 8)}
        return (loss[4] / loss[8] - 1).tolist()

    best, worst, fixed = max(lead(sick)), min(lead(sick)), max(map(abs, lead(healthy)))
    return f"before the first step rank 8 is {best:.0%} ahead of rank 4 at one seed and {-worst:.0%} behind at another; with fixed data {fixed:.0%}"
