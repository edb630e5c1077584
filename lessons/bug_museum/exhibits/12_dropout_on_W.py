"""12 · Dropout on the main road

The piece: LoRA with dropout, which is for the branch: y = x Wᵀ + s · dropout(x) Aᵀ Bᵀ.
The promise: in training as in eval the path through W sees x itself; at the start, where B = 0, the layer computes x Wᵀ, up to rounding.
"""

import torch
import torch.nn.functional as F
from torch import nn


class Healthy(nn.Module):
    """W (out, in) frozen   A (rank, in)   B (out, rank), zero at the start   s = alpha / rank"""

    def __init__(self, out, into, rank, alpha, dropout):
        super().__init__()
        self.W = nn.Parameter(torch.randn(out, into), requires_grad=False)
        self.A, self.B = nn.Parameter(torch.randn(rank, into)), nn.Parameter(torch.zeros(out, rank))
        self.s, self.dropout = alpha / rank, dropout

    def drop(self, x):
        return F.dropout(x, self.dropout, self.training)

    def forward(self, x):                                                    # (..., in) -> (..., out)
        return x @ self.W.T + self.s * (self.drop(x) @ self.A.T) @ self.B.T


class Sick(Healthy):
    """One line shorter to read."""

    def forward(self, x):
        x = self.drop(x)
        return x @ self.W.T + self.s * (x @ self.A.T) @ self.B.T


def cost():
    torch.manual_seed(0)
    layer, x = Sick(64, 64, 4, alpha=8, dropout=0.1), torch.randn(1000, 64)
    y = x @ layer.W.T
    return f"before the first step, at dropout 0.1, the frozen layer is off by {(layer(x) - y).norm() / y.norm():.0%} of its output"
