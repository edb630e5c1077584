"""03 · Adapters without a gradient

The piece: a frozen net with adapters. Its blocks are checkpointed: what they compute is thrown away, and computed again in the backward pass.
The promise: after y.sum().backward() every trainable parameter has a gradient, for data x that ask for none themselves.
"""

import torch
from torch import nn


class Block(nn.Module):
    """x + tanh(x Wᵀ + (x Aᵀ) Bᵀ)       W (width, width) frozen   A (rank, width)   B (width, rank)"""

    def __init__(self, width, rank):
        super().__init__()
        self.W = nn.Parameter(torch.randn(width, width) / width, requires_grad=False)
        self.A, self.B = nn.Parameter(torch.randn(rank, width)), nn.Parameter(torch.zeros(width, rank))

    def forward(self, x):
        return x + torch.tanh(x @ self.W.T + x @ self.A.T @ self.B.T)


class Again(torch.autograd.Function):
    """block(x), computed again for the backward pass, as torch's checkpoint does with use_reentrant=True."""

    @staticmethod
    def forward(ctx, block, x, *parameters):           # autograd calls backward only if x or one of the parameters asks for a gradient
        ctx.block, ctx.x, ctx.count = block, x.detach().requires_grad_(), len(parameters)
        return block(x)                                # nothing is recorded in here

    @staticmethod
    def backward(ctx, gradient):
        with torch.enable_grad():                      # again, and recorded now; .backward fills the .grad of A, of B and of ctx.x
            ctx.block(ctx.x).backward(gradient)
        return None, ctx.x.grad, *[None] * ctx.count   # one for each argument of forward: block, x, parameters


class Healthy(nn.Module):
    def __init__(self, blocks, width, rank):
        super().__init__()
        self.blocks, self.last = nn.ModuleList(Block(width, rank) for _ in range(blocks)), Block(width, rank)

    def forward(self, x):                              # (..., width) -> (..., width)
        for block in self.blocks:
            x = self.checkpoint(block, x)
        return self.last(x)                            # outside, as an ordinary layer: its adapter learns in any case

    def checkpoint(self, block, x):
        return Again.apply(block, x, *block.parameters())


class Sick(Healthy):
    def checkpoint(self, block, x):
        return Again.apply(block, x)                   # a block and some data: nothing here asks for a gradient


def cost():
    net = Sick(blocks=5, width=8, rank=2)
    net(torch.randn(4, 8)).sum().backward()
    return f"{sum(block.B.grad is None for block in [*net.blocks, net.last])} of 6 adapters never move; the last block is not checkpointed"
