"""LoRA-drop: what is judged, who keeps a pair of their own, what the others share, and that training starts anew."""

import copy

import pytest
import torch
from torch import nn

import minilora as ml
from minilora.methods.lora_drop import kinds, share_pairs

TARGETS = ["q_proj", "v_proj", "down_proj"]


@pytest.fixture
def deep():
    torch.manual_seed(0)
    model = ml.TinyGPT(ml.GPTConfig(context=16, width=16, layers=4, heads=2)).double()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.25)
    return model


def batches(step):
    ids = torch.randint(256, (2, 13), generator=torch.Generator().manual_seed(step))
    return ids[:, :-1], ids[:, 1:]


def test_importance_is_the_squared_output_of_the_update_over_the_sample(deep, wake):
    method = ml.LoRADrop(rank=3, alpha=5, warmup_steps=3, dropout=0.4)
    wake(ml.adapt(deep, method, TARGETS)).train()
    found = method.judge(deep, batches, ml.next_byte_loss)
    wanted, inputs = dict.fromkeys(found, 0.0), {}
    hooks = [layer.base.register_forward_pre_hook(lambda _, x, name=name: inputs.__setitem__(name, x[0])) for name, layer in ml.adapters(deep)]
    deep.eval()
    for step in range(3):
        deep(batches(step)[0])
        for name, layer in ml.adapters(deep):
            wanted[name] += (inputs[name] @ layer.delta_weight().T).norm(dim=-1).square().sum().item()
    [hook.remove() for hook in hooks]
    assert len(found) == 12 and all(found[name] == pytest.approx(wanted[name], rel=1e-10) and found[name] > 0 for name in wanted)


@pytest.mark.parametrize("threshold, kept", [(0.01, {0}), (0.5, {0}), (0.51, {0, 2}), (0.8, {0, 2}), (0.81, {0, 1, 2}), (0.95, {0, 1, 2}), (0.96, {0, 1, 2, 3}), (1, {0, 1, 2, 3})])
def test_the_smallest_set_that_reaches_the_threshold_is_kept(deep, threshold, kept):
    layers = dict(ml.adapters(ml.adapt(deep, ml.LoRADrop(rank=3), ["q_proj"])))
    g = dict(zip(layers, (5.0, 1.5, 3.0, 0.5)))                                         # shares 0.5, 0.15, 0.3, 0.05
    assert ml.LoRADrop(rank=3, threshold=threshold).kept(g, layers) == {f"blocks.{i}.attention.q_proj" for i in kept}


def test_ties_are_settled_by_order_and_a_layer_that_adds_nothing_goes(deep):
    layers = dict(ml.adapters(ml.adapt(deep, ml.LoRADrop(rank=3), ["q_proj"])))
    assert ml.LoRADrop(rank=3, threshold=0.4).kept(dict.fromkeys(layers, 2.0), layers) == {f"blocks.{i}.attention.q_proj" for i in (0, 1)}
    g = dict(zip(layers, (1.0, 0.0, 1.0, 0.0)))
    assert len(ml.LoRADrop(rank=3, threshold=0.999).kept(g, layers)) == 2 and len(ml.LoRADrop(rank=3, threshold=1.0).kept(g, layers)) == 4


def test_kinds_are_equal_names_but_for_numbers_and_equal_shapes():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder = nn.ModuleList(nn.ModuleDict({"q": nn.Linear(8, 8), "v": nn.Linear(8, 8)}) for _ in range(2))
            self.decoder = nn.ModuleList([nn.ModuleDict({"q": nn.Linear(8, 8)}), nn.ModuleDict({"q": nn.Linear(8, 6)})])

    layers = dict(ml.adapters(ml.adapt(Two(), ml.LoRADrop(rank=2))))
    assert kinds(layers) == [["encoder.0.q", "encoder.1.q"], ["encoder.0.v", "encoder.1.v"], ["decoder.0.q"], ["decoder.1.q"]]
    plain = dict(ml.adapters(ml.adapt(nn.Sequential(*(nn.Linear(8, 8) for _ in range(4))), ml.LoRADrop(rank=2))))
    assert kinds(plain) == [["0", "1", "2"]]                                            # the last one is the output head


def test_the_rest_of_each_kind_share_one_pair_counted_and_trained_once(deep):
    method = ml.LoRADrop(rank=3, alpha=5)
    layers = dict(ml.adapters(ml.adapt(deep, method, TARGETS)))
    own = {"blocks.0.attention.q_proj", "blocks.1.mlp.down_proj", "blocks.3.mlp.down_proj", *(name for name in layers if "v_proj" in name)}
    share_pairs(layers, own)
    q, down = 3 * (16 + 16), 3 * (64 + 16)
    assert ml.trainable_parameters(deep) == (1 + 1) * q + 4 * q + (2 + 1) * down          # rank · (in + out) · (k + 1), or · L
    rest = [layer for name, layer in layers.items() if "q_proj" in name and name not in own]
    assert len(rest) == 3 and all(layer.A is rest[0].A and layer.B is rest[0].B for layer in rest)
    assert layers["blocks.0.mlp.down_proj"].A is layers["blocks.2.mlp.down_proj"].A is not rest[0].A
    assert [bool(layer.own) for name, layer in layers.items() if "q_proj" in name] == [True, False, False, False]
    groups = method.parameter_groups(deep, 0.1)
    assert len({id(p) for p in groups[0]["params"]}) == len(groups[0]["params"]) == 2 * (2 + 4 + 3)

    nn.init.normal_(rest[0].B)
    ml.next_byte_loss(deep, *batches(0)).backward()
    together, parts = rest[0].B.grad.clone(), []
    for layer in rest:                                                                  # the gradient of one pair is the sum over its layers
        layer.A, layer.B = nn.Parameter(layer.A.detach().clone()), nn.Parameter(layer.B.detach().clone())
    ml.next_byte_loss(deep, *batches(0)).backward()
    parts = [layer.B.grad for layer in rest]
    assert torch.allclose(sum(parts), together, atol=1e-12) and (parts[0] - together).abs().max() > 1e-6


def test_after_the_warm_up_everything_is_at_its_start_again(deep):
    method = ml.LoRADrop(rank=3, alpha=5, threshold=0.5, warmup_steps=4, dropout=0.1)
    ml.adapt(deep, method, TARGETS).eval()
    before, state = {name: layer.A.detach().clone() for name, layer in ml.adapters(deep)}, torch.get_rng_state()
    warmed = []
    count = lambda step: warmed.append(step) or batches(step)
    method.prepare(deep, count, ml.next_byte_loss, 0.05)
    assert warmed == [0, 1, 2, 3] * 2                                                    # once to learn, once to judge
    assert torch.equal(torch.get_rng_state(), state) and not deep.training
    for name, layer in ml.adapters(deep):
        assert layer.decided and not layer.B.any() and layer.B.grad is None
        assert any(torch.equal(layer.A, A) for A in before.values()) and (not layer.own or torch.equal(layer.A, before[name]))
    assert 0 < sum(bool(layer.own) for _, layer in ml.adapters(deep)) < 12
    method.prepare(deep, count, ml.next_byte_loss, 0.05)
    assert len(warmed) == 8                                                              # it is asked only once


def test_it_keeps_those_that_say_most(deep):
    """One layer's input is made a hundred times larger; it must be among the kept."""
    with torch.no_grad():
        deep.blocks[2].mlp_norm.weight.mul_(1e-4), deep.blocks[2].mlp_norm.bias.mul_(1e-4)
    method = ml.LoRADrop(rank=3, alpha=5, threshold=0.9, warmup_steps=4)
    ml.adapt(deep, method, ["up_proj"])
    method.prepare(deep, batches, ml.next_byte_loss, 0.02)
    assert not dict(ml.adapters(deep))["blocks.2.mlp.up_proj"].own and any(layer.own for _, layer in ml.adapters(deep))


@pytest.mark.parametrize("loss_fn, lr, error", [(lambda model, x, y: 0 * ml.next_byte_loss(model, x, y), 0.05, ValueError),
                                                (ml.next_byte_loss, 1e200, FloatingPointError)])
@pytest.mark.parametrize("adapted", [True, False])
def test_a_warm_up_that_says_nothing_is_refused_and_undone(deep, loss_fn, lr, error, adapted):
    method = ml.LoRADrop(rank=3, warmup_steps=3)
    if adapted:
        ml.adapt(deep, method, TARGETS)
    before = copy.deepcopy(deep.state_dict())
    with pytest.raises(error, match="LoRA-drop cannot judge .*q_proj.*another learning rate or more warmup_steps"):
        ml.finetune(deep, method, batches, 5, lr, targets=TARGETS, loss_fn=loss_fn, progress=False)
    assert bool(list(ml.adapters(deep))) == adapted
    assert deep.state_dict().keys() == before.keys() and all(torch.equal(tensor, before[name]) for name, tensor in deep.state_dict().items())
