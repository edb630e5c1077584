"""06 · DoRA, measured across

The piece: DoRA, W' = m · V / ‖V‖ with V = W + B A. The length of each of W's rows, one an output, is kept in m; A and B move only the direction.
The promise: row i of weight() is magnitude[i] long, whatever A and B are. At the start B = 0, and weight() is W.
"""

import torch
from torch import nn


class Healthy(nn.Module):
    def __init__(self, W, rank):                                             # W (out, in)
        super().__init__()
        self.register_buffer("W", W)
        self.A, self.B = nn.Parameter(torch.randn(rank, W.shape[1])), nn.Parameter(torch.zeros(W.shape[0], rank))
        self.magnitude = nn.Parameter(self.length(W).flatten())

    def length(self, V):
        return V.norm(dim=1, keepdim=True)                                   # (out, 1)

    def weight(self):                                                        # (out, in)
        V = self.W + self.B @ self.A
        length = self.length(V)
        return self.magnitude.view_as(length) * V / length

    def forward(self, x):
        return x @ self.weight().T


class Sick(Healthy):
    """"Column-wise", says the paper, and the columns of an (out, in) matrix are the inputs."""

    def length(self, V):
        return V.norm(dim=0, keepdim=True)                                   # (1, in)


def cost():
    torch.manual_seed(0)
    layer = Sick(torch.randn(12, 8), rank=2)
    nn.init.normal_(layer.B)
    change = (layer.weight().norm(dim=1) / layer.W.norm(dim=1) - 1).abs()
    return f"m stays as it was, and the rows come out up to {change.max():.0%} off it"
