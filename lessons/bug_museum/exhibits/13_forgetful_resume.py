"""13 · A fresh start, unasked

The piece: a training run with Adam that can be stopped and gone on with. Its batches are a function of the step.
The promise: run.train(n), then another run.load(first.save()).train(m), ends where one run.train(n + m) ends, up to rounding.
"""

import copy

import torch
from torch import nn


class Healthy:
    """Fits y = x Wᵀ, W (1, width), to a target by Adam."""

    def __init__(self, width=6, lr=0.05):
        self.W = nn.Parameter(torch.zeros(1, width))
        self.optimizer, self.step = torch.optim.Adam([self.W], lr=lr), 0

    def batch(self):
        x = torch.randn(8, self.W.numel(), generator=torch.Generator().manual_seed(self.step))
        return x, x.sum(-1, keepdim=True)

    def train(self, steps):
        for _ in range(steps):
            x, y = self.batch()
            self.optimizer.zero_grad()
            (x @ self.W.T - y).square().mean().backward()
            self.optimizer.step()
            self.step += 1
        return self

    def save(self):
        return {"step": self.step, "W": self.W.detach().clone(), "optimizer": copy.deepcopy(self.optimizer.state_dict())}

    def load(self, saved):
        self.step, self.W.data = saved["step"], saved["W"].clone()
        self.optimizer.load_state_dict(copy.deepcopy(saved["optimizer"]))
        return self


class Sick(Healthy):
    """The weights are there, the step is there, the loss goes down."""

    def load(self, saved):
        self.step, self.W.data = saved["step"], saved["W"].clone()
        return self


def cost():
    first = Sick().train(60)
    saved = first.save()
    there = saved["W"]
    step = [(run.train(1).W - there).norm().item() for run in (Sick().load(saved), first)]
    return f"the first step after the break is {step[0] / step[1]:.0f} times as long as the one it stands for"
