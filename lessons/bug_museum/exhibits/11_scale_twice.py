"""11 · alpha / r, twice

The piece: a LoRA layer, s = alpha / rank, and its merge.
The promise: y = x Wᵀ + s (x Aᵀ) Bᵀ before merge() as after it, up to rounding, for any alpha and rank.
"""

import torch
from torch import nn


class Healthy(nn.Module):
    """W (out, in) frozen   A (rank, in)   B (out, rank), zero at the start"""

    def __init__(self, out, into, rank, alpha):
        super().__init__()
        self.W = nn.Parameter(torch.randn(out, into), requires_grad=False)
        self.A, self.B = nn.Parameter(torch.randn(rank, into)), nn.Parameter(torch.zeros(out, rank))
        self.s = alpha / rank

    def delta(self):                                                         # (out, in), the scale in it
        return self.s * self.B @ self.A

    def forward(self, x):
        return x @ self.W.T + self.s * (x @ self.A.T) @ self.B.T

    @torch.no_grad()
    def merge(self):
        self.W += self.delta()
        self.B.zero_()


class Sick(Healthy):
    """Two people were careful about the scale."""

    @torch.no_grad()
    def merge(self):
        self.W += self.s * self.delta()
        self.B.zero_()


def cost():
    torch.manual_seed(0)

    def counted(rank, alpha):
        layer = Sick(6, 5, rank, alpha)
        nn.init.normal_(layer.B)
        W, dW = layer.W.data.clone(), layer.delta().detach()
        layer.merge()
        return f"{((layer.W - W) * dW).sum() / (dW * dW).sum():.0f}"

    return f"merged, the update counts {counted(8, 32)} times at rank 8 and alpha 32; at alpha 8, as in the first trial, {counted(8, 8)} time"
