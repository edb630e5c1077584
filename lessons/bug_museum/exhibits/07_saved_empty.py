"""07 · The empty file

The piece: a layer with an adapter, and what goes to disk of it: what training may change.
The promise: code(out, into, rank) has the same W each time. load() of what save() gave makes a fresh one compute what the saved did.
"""

import torch
from torch import nn


class Healthy(nn.Module):
    """y = x Wᵀ + (x Aᵀ) Bᵀ       W (out, in) frozen, of the base that everybody has   A (rank, in)   B (out, rank)"""

    def __init__(self, out, into, rank):
        super().__init__()
        W = torch.randn(out, into, generator=torch.Generator().manual_seed(0))
        self.W = nn.Parameter(W, requires_grad=False)
        self.A, self.B = nn.Parameter(torch.randn(rank, into)), nn.Parameter(torch.zeros(out, rank))

    def forward(self, x):
        return x @ self.W.T + x @ self.A.T @ self.B.T

    def save(self):
        """{name: tensor}"""
        return {name: p.detach().clone() for name, p in self.named_parameters() if p.requires_grad}

    def load(self, saved):
        self.load_state_dict(saved, strict=False)                            # W is not in it
        return self


class Sick(Healthy):
    """state_dict() gives tensors that are detached: requires_grad is False for all of them."""

    def save(self):
        return {name: tensor.clone() for name, tensor in self.state_dict().items() if tensor.requires_grad}


def cost():
    torch.manual_seed(0)
    x, trained = torch.randn(100, 6), Sick(8, 6, rank=2)
    y = x @ (trained.W + torch.randn(8, 2) @ torch.randn(2, 6)).T
    optimizer = torch.optim.Adam([trained.A, trained.B], lr=0.1)
    for _ in range(150):
        (trained(x) - y).square().mean().backward()
        optimizer.step(), optimizer.zero_grad()
    saved = trained.save()
    loss = [(model(x) - y).square().mean().item() for model in (trained, Sick(8, 6, rank=2).load(saved))]
    trainable = sum(p.numel() for p in (trained.A, trained.B))
    return (f"150 steps trained {trainable} numbers, and the file keeps {sum(tensor.numel() for tensor in saved.values())} of them: "
            f"the loss is {loss[0]:.2f} when saved and {loss[1]:.2f} when loaded")
