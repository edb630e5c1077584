"""04 · The frozen head, wrapped

The piece: a trained body and a head that is new, drawn at random for this task. Adapters are to go on the body.
The promise: in `head` every number is trainable, width · classes + classes of them and no others; of the body only the adapters' A and B are.
"""

import torch
import torch.nn.functional as F
from torch import nn


class Adapter(nn.Module):
    """base(x) + (x Aᵀ) Bᵀ, the base frozen       A (rank, in)   B (out, rank)"""

    def __init__(self, linear, rank):
        super().__init__()
        self.base = linear.requires_grad_(False)
        self.A = nn.Parameter(torch.randn(rank, linear.in_features))
        self.B = nn.Parameter(torch.zeros(linear.out_features, rank))

    def forward(self, x):
        return self.base(x) + x @ self.A.T @ self.B.T


class Healthy(nn.Module):
    def __init__(self, into, width, classes, rank):
        super().__init__()
        self.body, self.head = nn.Linear(into, width), nn.Linear(width, classes)
        self.adapt(rank)

    def adapt(self, rank):
        self.body = Adapter(self.body, rank)

    def forward(self, x):                              # (..., in) -> (..., classes)
        return self.head(torch.tanh(self.body(x)))


class Sick(Healthy):
    """"On all linear layers", says the option, and the head is one."""

    def adapt(self, rank):
        self.body, self.head = Adapter(self.body, rank), Adapter(self.head, rank)


def cost():
    def accuracy(kind):
        torch.manual_seed(0)
        x, net = torch.randn(300, 20).double(), kind(20, 40, classes=10, rank=1).double()
        y = (x @ torch.randn(20, 10).double()).argmax(-1)
        optimizer = torch.optim.Adam([p for p in net.parameters() if p.requires_grad], lr=0.03)
        for _ in range(100):
            F.cross_entropy(net(x), y).backward()
            optimizer.step(), optimizer.zero_grad()
        return f"{(net(x).argmax(-1) == y).double().mean():.0%}"

    return f"{accuracy(Sick)} right after 100 steps, where a head trained whole has {accuracy(Healthy)}"
