"""09 · The wrapper's name tag

The piece: saving the adapter of a model that stands in a wrapper (for several devices, or compiled), whose names all begin with "module.".
The promise: what code.save() makes of code.wrap(model), wrapped once or more, code.load() puts into a plain fresh model, which then computes the same.
"""

import torch
from torch import nn


class Wrapper(nn.Module):
    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, x):
        return self.module(x)


class Healthy(nn.Module):
    """y = x Wᵀ + up(down(x))       W (width, width) frozen, of the base that everybody has   down (rank, width)   up (width, rank)"""

    wrap = Wrapper

    def __init__(self, width, rank):
        super().__init__()
        self.register_buffer("W", torch.randn(width, width, generator=torch.Generator().manual_seed(0)), persistent=False)
        self.down, self.up = nn.Linear(width, rank, bias=False), nn.Linear(rank, width, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x):
        return x @ self.W.T + self.up(self.down(x))

    @staticmethod
    def save(model):
        """{name: tensor}"""
        while isinstance(model, Wrapper):
            model = model.module
        return {name: tensor.clone() for name, tensor in model.state_dict().items()}

    @staticmethod
    def load(model, saved):
        model.load_state_dict(saved, strict=False)
        return model


class Sick(Healthy):
    @staticmethod
    def save(model):
        return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def cost():
    torch.manual_seed(0)
    trained, x = Sick(6, rank=2), torch.randn(1000, 6)
    nn.init.normal_(trained.up.weight)
    loaded = Sick.load(Sick(6, rank=2), Sick.save(Sick.wrap(trained)))
    (as_the_base, as_trained) = (((loaded(x) == y).all(1)).sum().item() for y in (x @ trained.W.T, trained(x)))
    return f"of 1,000 inputs the loaded model answers {as_trained} as it was trained to, and {as_the_base:,} as the base does, to the last bit"
