"""Small things that several test files need, and one thread for torch: here, and in every process and notebook that a test starts."""

import os

os.environ["OMP_NUM_THREADS"] = "1"       # before torch is imported

import pytest
import torch

import minilora as ml

torch.set_num_threads(1)


@pytest.fixture
def tiny():
    """A small TinyGPT: non-square layers (16 -> 64 -> 16), biases that are not zero."""
    torch.manual_seed(0)
    model = ml.TinyGPT(ml.GPTConfig(context=32, width=16, layers=2, heads=2))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.1)
    return model


@pytest.fixture
def ids():
    return torch.randint(256, (3, 20), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def wake():
    """wake(model): give every adapter parameter random values, so that nothing hides behind B = 0."""

    def wake(model, seed=2):
        dice = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for _, adapter in ml.adapters(model):
                for name, parameter in adapter.named_parameters():
                    if not name.startswith("base."):
                        parameter.copy_(0.3 * torch.randn(parameter.shape, generator=dice, dtype=torch.float64))
        return model

    return wake
