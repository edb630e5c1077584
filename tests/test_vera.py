"""VeRA: one A and B for layers of every shape, drawn from a seed, never moved."""

import math

import pytest
import torch
from torch import nn

import minilora as ml


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 24), nn.Tanh(), nn.Linear(24, 17), nn.Tanh(), nn.Linear(17, 40))


def adapted(method, plain=None):
    return ml.adapt(plain or model(), method, ["0", "2", "4"])


def test_layers_of_different_shapes_slice_the_same_two_parameters():
    made = adapted(ml.VeRA(rank=5, seed=3))
    layers = [layer for _, layer in ml.adapters(made)]
    assert all(layer.A is layers[0].A and layer.B is layers[0].B for layer in layers)
    assert layers[0].A.shape == (5, 24) and layers[0].B.shape == (40, 5)                # the widest input, the tallest output
    for layer in layers:
        torch.nn.init.normal_(layer.b)
        A, B = layer.A[:, : layer.in_features], layer.B[: layer.out_features]
        assert torch.allclose(layer.delta_weight(), torch.diag(layer.b) @ B @ torch.diag(layer.d) @ A, atol=1e-6)
    assert len([name for name, _ in made.named_parameters() if name.endswith((".A", ".B"))]) == 2


def test_the_seed_decides_whatever_the_random_state():
    torch.manual_seed(1)
    one = adapted(ml.VeRA(rank=5, seed=3))[0]
    torch.manual_seed(2)
    state = torch.get_rng_state()
    again, other = adapted(ml.VeRA(rank=5, seed=3), model())[0], adapted(ml.VeRA(rank=5, seed=4))[0]
    assert torch.equal(one.A, again.A) and torch.equal(one.B, again.B)
    assert not torch.equal(one.A, other.A) and not torch.equal(one.B, other.B)
    torch.set_rng_state(state)
    ml.VeRA(rank=5).wrap({"it": nn.Linear(3, 4, device="meta").to_empty(device="cpu")})
    assert torch.equal(torch.get_rng_state(), state)                                   # it spends nobody's random numbers


def test_a_and_b_are_kaiming_uniform_of_the_largest_layer():
    A, B = ml.VeRA(rank=256).projections(512, 1000)
    for M, fan_in in ((A, 512), (B, 256)):
        assert M.abs().max() <= math.sqrt(6 / fan_in) and M.std().item() == pytest.approx(math.sqrt(2 / fan_in), rel=0.01)


def test_at_the_start_only_b_has_a_gradient_and_a_and_b_never_do():
    made = adapted(ml.VeRA(rank=5, d_initial=0.3))
    layer = made[0]
    assert not layer.b.any() and torch.equal(layer.d, torch.full((5,), 0.3))
    made(torch.randn(8, 6)).square().sum().backward()
    assert layer.b.grad.any() and not layer.d.grad.any() and layer.A.grad is None and layer.B.grad is None


def test_training_moves_the_vectors_and_nothing_else():
    made, x, y = model(), torch.randn(32, 6), torch.randn(32, 40)
    method = ml.VeRA(rank=50)                                                          # more than min(in, out): that is no error here
    adapted(method, made)
    before = {name: p.clone() for name, p in made.named_parameters()}
    ml.finetune(made, method, lambda step: (x, y), 4, 0.05, loss_fn=lambda m, x, y: (m(x) - y).square().mean(), weight_decay=0.1, progress=False)
    moved = {name for name, p in made.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {f"{i}.{vector}" for i in (0, 2, 4) for vector in "bd"}


def test_the_papers_defaults():
    assert (ml.VeRA(4).d_initial, ml.VeRA(4).seed) == (0.1, 0)


def test_layers_on_two_devices_are_refused():
    with pytest.raises(ValueError, match="share one A and B, and these lie on 2 devices"):
        ml.VeRA(4).wrap({"a": nn.Linear(3, 4), "b": nn.Linear(3, 4, device="meta")})
