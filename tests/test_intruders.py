"""Intruder dimensions, on weights whose singular vectors are known."""

import pytest
import torch

import minilora as ml
from minilora.evidence.intruders import count_intruders, intruders


def turned(out, into, seed=0):
    """U (out, k), s (k), V (into, k) of a weight with well separated singular values."""
    dice = torch.Generator().manual_seed(seed)
    k = min(out, into)
    U, V = (torch.linalg.qr(torch.randn(n, n, generator=dice, dtype=torch.float64)).Q for n in (out, into))
    return U, torch.linspace(5, 1, k, dtype=torch.float64), V


@pytest.mark.parametrize("out, into", [(30, 12), (40, 16)])
def test_a_direction_that_w_has_not_is_an_intruder_once_it_is_among_the_first(out, into):
    U, s, V = turned(out, into)
    k = into - 1
    W = U[:, :k] @ torch.diag(s[:k]) @ V[:, :k].T                     # its last input direction is free, and its last outputs
    for strength, expected in ((100.0, 1), (4.5, 1), (0.5, 0)):      # the greatest, among the first five, after them
        assert count_intruders(W, strength * U[:, -1:] @ V[:, -1:].T, top=5) == expected
    assert count_intruders(W, 0 * W) == 0 and count_intruders(W, 3 * W) == 0


def test_directions_that_change_places_or_turn_a_little_are_none():
    U, s, V = turned(20, 20)
    W = U @ torch.diag(s) @ V.T
    assert count_intruders(W, U @ torch.diag(s.flip(0) - s) @ V.T) == 0
    assert count_intruders(W, 0.01 * torch.randn(20, 20, generator=torch.Generator().manual_seed(1), dtype=torch.float64)) == 0


def test_the_line_is_where_it_says():
    """With a spike so great that it is the first direction, the cosine is what was put in."""
    U, s, V = turned(30, 12)
    W = U[:, :12] @ torch.diag(s) @ V[:, :12].T
    for cosine, expected in ((0.45, 1), (0.55, 0)):
        spike = cosine * U[:, :1] + (1 - cosine**2) ** 0.5 * U[:, 20:21]
        assert count_intruders(W, 1e6 * spike @ V[:, :1].T, top=1, below=0.5) == expected


def test_of_a_model_the_mean_over_its_layers_whether_adapted_or_not():
    before, model = ml.load_base(), ml.load_base()
    assert intruders(model, before) == 0.0
    ml.adapt(model, ml.LoRA(4, alpha=400.0), ["blocks.0.attention.q_proj", "blocks.1.mlp.up_proj"])
    for _, layer in ml.adapters(model):
        torch.nn.init.normal_(layer.B)
    alone = [count_intruders(layer.base.weight, layer.delta_weight()) for _, layer in ml.adapters(model)]
    assert max(alone) > 0 and intruders(model, before) == sum(alone) / 24
    ml.merge(model)
    assert intruders(model, before) == sum(alone) / 24
