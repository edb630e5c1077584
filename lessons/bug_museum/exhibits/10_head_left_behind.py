"""10 · The head that stayed behind

The piece: a classifier: a frozen body with an adapter, and a new head that is trained whole. To disk goes what was trained.
The promise: code(into, classes, rank) has the same W each time, and a head newly drawn. load() of what save() gave makes a fresh one compute
what the saved one did.
"""

import torch
import torch.nn.functional as F
from torch import nn


class Healthy(nn.Module):
    """head(tanh(x Wᵀ + (x Aᵀ) Bᵀ))       W (in, in) frozen   A (rank, in)   B (in, rank)   head: in -> classes, with a bias"""

    def __init__(self, into, classes, rank):
        super().__init__()
        W = torch.randn(into, into, generator=torch.Generator().manual_seed(0)) / into**0.5
        self.W = nn.Parameter(W, requires_grad=False)
        self.A, self.B = nn.Parameter(torch.randn(rank, into)), nn.Parameter(torch.zeros(into, rank))
        self.head = nn.Linear(into, classes)

    def forward(self, x):
        return self.head(torch.tanh(x @ self.W.T + x @ self.A.T @ self.B.T))

    def save(self):
        """{name: tensor}"""
        return {name: p.detach().clone() for name, p in self.named_parameters() if p.requires_grad}

    def load(self, saved):
        self.load_state_dict(saved, strict=False)                            # W is not in it
        return self


class Sick(Healthy):
    """The adapter is saved. That was the task, word for word."""

    def save(self):
        return {name: tensor for name, tensor in super().save().items() if name in ("A", "B")}


def cost():
    torch.manual_seed(0)
    x, model = torch.randn(300, 12).double(), Sick(12, classes=4, rank=2).double()
    y = (x @ torch.randn(12, 4).double()).argmax(-1)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.08)
    for _ in range(100):
        F.cross_entropy(model(x), y).backward()
        optimizer.step(), optimizer.zero_grad()
    right = [(each(x).argmax(-1) == y).double().mean() for each in (model, Sick(12, classes=4, rank=2).double().load(model.save()))]
    return f"{right[0]:.0%} right when saved, {right[1]:.0%} when loaded, with four classes to choose from"
