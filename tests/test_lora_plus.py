"""LoRA+: who is in which group, at which rate, and that the decay it is given has an effect."""

import pytest
import torch

import minilora as ml


@pytest.fixture
def model(tiny, wake):
    """Adapted, and more unfrozen beside it: a head, an embedding, a bias, a norm."""
    wake(ml.adapt(tiny, ml.LoRAPlus(rank=3, alpha=5, ratio=4)))
    for name in ("head.weight", "token_embedding.weight", "blocks.0.attention.q_proj.base.bias", "norm.weight", "norm.bias"):
        tiny.get_parameter(name).requires_grad_(True)
    return tiny


def test_b_is_ratio_times_faster_and_nothing_else_is(model):
    names = {id(p): name for name, p in model.named_parameters()}
    groups = ml.LoRAPlus(rank=3, ratio=4).parameter_groups(model, lr=0.01, weight_decay=0.3)
    said = {names[id(p)]: (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}
    assert sum(len(group["params"]) for group in groups) == len(said) == sum(p.requires_grad for p in model.parameters())
    for name, rates in said.items():
        if name.endswith(".B"):
            assert rates == (0.04, 0.3), name
        elif name.endswith((".A", "head.weight", "token_embedding.weight")):
            assert rates == (0.01, 0.3), name
        else:
            assert name.endswith((".bias", "norm.weight")) and rates == (0.01, 0.0), name
    assert {rates for rates in said.values()} == {(0.04, 0.3), (0.01, 0.3), (0.01, 0.0)}


def test_one_step_of_training_moves_a_by_lr_and_b_by_ratio_lr(tiny, ids):
    """Adam's first step is lr · sign(g), for each tensor its own lr; but A has no gradient while B is zero."""
    ml.adapt(tiny, ml.LoRAPlus(rank=3, ratio=4), ["v_proj", "down_proj"])
    with torch.no_grad():
        for _, layer in ml.adapters(tiny):
            layer.B.normal_()
    before = {name: (layer.A.detach().clone(), layer.B.detach().clone()) for name, layer in ml.adapters(tiny)}
    ml.finetune(tiny, ml.LoRAPlus(rank=3, ratio=4), lambda step: (ids[:, :-1], ids[:, 1:]), 1, 1e-3, progress=False,
                loss_fn=lambda *given: 1e4 * ml.next_byte_loss(*given))                  # or Adam's eps shows
    for name, layer in ml.adapters(tiny):
        assert (layer.A - before[name][0]).abs().median().item() == pytest.approx(1e-3, rel=0.01)
        assert (layer.B - before[name][1]).abs().median().item() == pytest.approx(4e-3, rel=0.01)


def test_weight_decay_decays(tiny):
    """Decoupled: without a gradient a step multiplies by 1 − rate · decay, so B's share is ratio times A's."""
    ml.adapt(tiny, ml.LoRAPlus(rank=3, ratio=4), ["q_proj"])
    _, layer = next(ml.adapters(tiny))
    with torch.no_grad():
        layer.A.fill_(1.0), layer.B.fill_(1.0)
    optimizer = torch.optim.AdamW(ml.LoRAPlus(rank=3, ratio=4).parameter_groups(tiny, 0.1, 0.5))
    for p in tiny.parameters():
        p.grad = torch.zeros_like(p) if p.requires_grad else None
    optimizer.step()
    assert torch.allclose(layer.A, torch.tensor(1 - 0.1 * 0.5)) and torch.allclose(layer.B, torch.tensor(1 - 0.4 * 0.5))


def test_the_papers_default():
    assert ml.LoRAPlus(rank=3).ratio == 16
