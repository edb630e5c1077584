"""01 · Merged twice

The piece: a LoRA layer whose eval() folds s B A into W, so that sampling costs one product, and whose train() takes it out again.
The promise: train() and eval() may be called in any order and any number of times; the layer's function stays the same, up to rounding.
"""

import torch
from torch import nn


class Healthy(nn.Module):
    """y = x Wᵀ + s (x Aᵀ) Bᵀ       W (out, in) frozen   A (rank, in)   B (out, rank), zero at the start   s = alpha / rank"""

    def __init__(self, out, into, rank, alpha):
        super().__init__()
        self.W = nn.Parameter(torch.randn(out, into), requires_grad=False)
        self.A, self.B = nn.Parameter(torch.randn(rank, into)), nn.Parameter(torch.zeros(out, rank))
        self.s, self.merged = alpha / rank, False

    def fold(self, sign):
        self.W.data += sign * self.s * self.B.data @ self.A.data
        self.merged = sign > 0

    def train(self, mode=True):                        # eval() is train(False)
        super().train(mode)
        if mode and self.merged:
            self.fold(-1)
        if not mode and not self.merged:
            self.fold(+1)
        return self

    def forward(self, x):                              # (..., in) -> (..., out)
        y = x @ self.W.T
        return y if self.merged else y + self.s * (x @ self.A.T) @ self.B.T


class Sick(Healthy):
    """The trainer calls eval(), and so does the function that samples."""

    def train(self, mode=True):
        nn.Module.train(self, mode)
        if mode and self.merged:
            self.fold(-1)
        if not mode:
            self.fold(+1)
        return self


def cost():
    torch.manual_seed(0)
    layer = Sick(6, 5, 2, alpha=4)
    nn.init.normal_(layer.B)
    W, dW = layer.W.data.clone(), layer.s * layer.B.data @ layer.A.data
    layer.eval(), layer.eval(), layer.eval()
    return f"after three eval() the update counts {((layer.W - W) * dW).sum() / (dW * dW).sum():.0f} times"
