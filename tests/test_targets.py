"""Which layers get an adapter: what is not x Wᵀ + b is refused by name and left out by default, what lies outside nn.Linear is said."""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import prune

import minilora as ml
from minilora.safety.targets import PLAIN_FORWARDS


class Masked(nn.Linear):
    def forward(self, x):
        return F.linear(x, self.weight.tril(), self.bias)


class Shifted(nn.Linear):
    def forward(self, x):
        return super().forward(x) + 0.1


class Router(nn.Linear):
    def forward(self, x):
        return super().forward(x), None


class Named(nn.Linear):
    """A subclass that computes what nn.Linear does."""


class Block(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.odd, self.even = kind(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        y = self.odd(x)
        return self.even(torch.tanh(y[0] if isinstance(y, tuple) else y))


class Net(nn.Module):
    def __init__(self, kind=nn.Linear):
        super().__init__()
        torch.manual_seed(0)
        self.blocks, self.head = nn.ModuleList(Block(kind) for _ in range(2)), nn.Linear(8, 3)
        self.double().eval()

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def patched():
    model = Net()
    for block in model.blocks:
        block.odd.forward = lambda x, layer=block.odd: F.linear(x, layer.weight.abs(), layer.bias)
    return model


def made_by_qat():
    from torch.ao.nn.qat import Linear
    from torch.ao.quantization import get_default_qat_qconfig
    return Net(lambda into, out: Linear(into, out, qconfig=get_default_qat_qconfig()))


ODD = {"masked": lambda: Net(Masked), "shifted": lambda: Net(Shifted), "a router": lambda: Net(Router), "patched": patched, "qat": made_by_qat}
X = torch.randn(4, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def names(model):
    return [name for name, _ in ml.adapters(model)]


@pytest.mark.parametrize("verb", [lambda model, targets=None: ml.adapt(model, ml.LoRA(2), targets), ml.quantize], ids=["adapt", "quantize"])
@pytest.mark.parametrize("build", ODD.values(), ids=ODD)
@pytest.mark.filterwarnings("ignore:.*reduce_range")
def test_a_layer_with_a_forward_of_its_own_is_refused_by_name_and_left_out_otherwise(build, verb):
    model = build()
    kinds = [type(m) for m in model.modules()]
    with pytest.raises(ValueError, match="blocks.0.odd: .*need not be x Wᵀ"):
        verb(model, ["even", "odd"])
    assert [type(m) for m in model.modules()] == kinds and all(p.requires_grad for p in model.parameters())
    odd = [block.odd for block in model.blocks]
    with pytest.warns(UserWarning, match=r"left out is blocks.\*.odd: .*need not be x Wᵀ"):
        verb(model)
    assert [block.odd for block in model.blocks] == odd and type(model.blocks[0].even) is not nn.Linear


@pytest.mark.parametrize("build", [Net, lambda: Net(Named), lambda: Net(Masked), lambda: Net(Router)], ids=["plain", "subclass", "masked", "router"])
@pytest.mark.filterwarnings("ignore:left out")
def test_whatever_could_be_adapted_merges_to_the_same(build, wake):
    model = build()
    before = model(X)
    assert torch.equal(ml.adapt(model, ml.LoRA(2))(X), before)
    adapted = wake(model)(X)
    assert torch.allclose(ml.merge(model)(X), adapted, atol=1e-12) and (adapted - before).abs().max() > 1e-3


@pytest.mark.parametrize("norm", [nn.utils.weight_norm, nn.utils.parametrizations.weight_norm, nn.utils.parametrizations.spectral_norm,
                                  lambda layer: prune.random_unstructured(layer, "weight", 0.5)],
                         ids=["weight_norm, old", "weight_norm", "spectral_norm", "prune"])
@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
def test_a_weight_that_is_made_anew_at_each_call_is_still_w(norm, wake):
    model = Net()
    for block in model.blocks:
        norm(block.odd)
    before, kept = model(X), list(model.state_dict())
    wake(ml.adapt(model, ml.LoRA(2)))
    assert len(names(model)) == 4
    adapted = model(X)
    with ml.disabled(model):
        assert torch.equal(model(X), before)
    ml.unload(model)
    assert torch.equal(model(X), before) and list(model.state_dict()) == kept
    wake(ml.adapt(model, ml.LoRA(2)))
    assert torch.allclose(ml.merge(model)(X), adapted, atol=1e-12) and (adapted - before).abs().max() > 1e-3


def test_a_class_of_ones_own_may_be_said_to_be_plain():
    class Timed(nn.Linear):
        def forward(self, x):
            return F.linear(x, self.weight, self.bias)

    with pytest.raises(ValueError, match=r"PLAIN_FORWARDS.add\(Timed.forward\)"):
        ml.adapt(Net(Timed), ml.LoRA(2), ["odd"])
    PLAIN_FORWARDS.add(Timed.forward)
    try:
        assert len(names(ml.adapt(Net(Timed), ml.LoRA(2)))) == 4
    finally:
        PLAIN_FORWARDS.remove(Timed.forward)


def test_where_nothing_is_left_the_first_reason_is_given():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks, self.head = nn.ModuleList(Masked(8, 8) for _ in range(2)), nn.Linear(8, 3)

    with pytest.raises(ValueError, match="blocks.0: Masked is an nn.Linear with a forward of its own"):
        ml.adapt(Both(), ml.LoRA(2))


# The head is never taken for want of others.

class Conv1D(nn.Module):
    """A weight (in, out) as GPT-2's, and not transformers' class (test_conv1d.py): what else it does, nobody knows."""

    def __init__(self, into, out):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(into, out))


class Packed(nn.Module):
    def __init__(self, into, out):
        super().__init__()
        self.register_buffer("qweight", torch.zeros(into // 8, out, dtype=torch.int32))


@pytest.mark.parametrize("kind", [Conv1D, Packed, lambda into, out: nn.Conv1d(into, out, 1)], ids=["Conv1D", "packed codes", "Conv1d"])
def test_blocks_without_a_linear_are_refused_and_the_head_is_not_adapted(kind):
    model = nn.ModuleDict({"blocks": nn.ModuleList(kind(8, 8) for _ in range(2)), "norm": nn.LayerNorm(8), "score": nn.Linear(8, 2)})
    for verb in (lambda: ml.adapt(model, ml.LoRA(1)), lambda: ml.quantize(model)):
        with pytest.raises(ValueError, match=r"not in nn.Linear but in (Conv1D|Packed|Conv1d) \(blocks.\*, …\).*there is score"):
            verb()
    assert not names(model) and all(p.requires_grad for p in model.parameters())
    assert names(ml.adapt(model, ml.LoRA(1), ["score"])) == ["score"]                 # asked for, it may be


def test_a_network_of_convolutions_keeps_its_head():
    with pytest.raises(ValueError, match="not in nn.Linear but in Conv2d"):
        ml.adapt(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8, 4)), ml.LoRA(2))


def test_a_list_that_holds_no_weights_is_no_block():
    model = nn.ModuleDict({"acts": nn.ModuleList([nn.ReLU()]), "one": nn.Linear(8, 8), "two": nn.Linear(8, 8), "head": nn.Linear(8, 2)})
    assert names(ml.adapt(model, ml.LoRA(2))) == ["one", "two"]


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Parameter(torch.randn(4, 8, 8))
        self.gate = nn.Linear(8, 1)
        self.attention = nn.Linear(8, 16)


def test_the_share_outside_of_nn_linear_is_said_with_names_and_a_thin_layer_is_left_out():
    model = nn.ModuleDict({"layers": nn.ModuleList(Experts() for _ in range(3)), "head": nn.Linear(8, 30)})
    with pytest.warns(UserWarning) as caught:
        ml.adapt(model, ml.LoRA(4))
    assert names(model) == [f"layers.{i}.attention" for i in range(3)] and len(caught) == 1 and caught[0].filename == __file__
    share = 4 * 8 * 8 / (4 * 8 * 8 + 8 + 8 * 16)
    assert str(caught[0].message) == (f"{share:.0%} of the blocks' weights lie outside nn.Linear and stay as they are: layers.*.up; left out is layers.*.gate: "
                                      "rank 4 is above min(in, out) of a 8 -> 1 layer: no update of W has a higher rank than that")
    for method in (ml.LoRA(4), ml.AdaLoRA(4, 2), ml.DoRA(2)):
        with pytest.raises(ValueError, match="layers.0.gate: rank . is above"):
            ml.adapt(ml.unload(model) if names(model) else model, method, ["gate"])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert len(names(ml.adapt(model, ml.VeRA(40)))) == 6                          # VeRA's rank may exceed that
    assert "gate" not in str(caught[0].message)


def test_where_all_is_in_linears_nothing_is_said(tiny):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ml.adapt(ml.quantize(tiny), ml.LoRA(2))


def test_a_target_that_is_no_linear_is_told_what_it_is():
    model = nn.ModuleDict({"layers": nn.ModuleList(Experts() for _ in range(2)), "norm": nn.LayerNorm(8)})
    for target, what in (("up", r"up is a Parameter \(4, 8, 8\)"), ("norm", "norm is a LayerNorm"), ("nowhere", "attention$")):
        with pytest.raises(ValueError, match=f"no Linear matches '{target}'; this model has gate, attention.*{what}|{what}"):
            ml.adapt(model, ml.LoRA(1), [target])


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8])
def test_weights_that_nothing_computes_in_are_refused(dtype):
    model = Net()
    model.blocks[1].odd.weight = nn.Parameter(model.blocks[1].odd.weight.data.to(dtype), requires_grad=False)
    for verb in (lambda: ml.adapt(model, ml.LoRA(2)), lambda: ml.quantize(model), lambda: ml.adapt(model, ml.VeRA(2), ["odd"])):
        with pytest.raises(ValueError, match=f"blocks.1.odd: its weight is stored as {dtype}, quantized by another library"):
            verb()


# Hooks belong to the place.

@pytest.mark.parametrize("there, back", [(ml.quantize, lambda model: model), (lambda model: ml.adapt(model, ml.LoRA(2)), ml.unload),
                                         (lambda model: ml.adapt(model, ml.LoRA(2)), ml.merge), (lambda model: ml.adapt(model, ml.QLoRA(2, dropout=0.0)), ml.unload)],
                         ids=["quantize", "unload", "merge", "unload to four bits"])
def test_hooks_of_a_layer_stay_in_its_place_and_can_be_removed(there, back, wake):
    model, seen = Net(), []
    layer = model.blocks[1].even
    handles = [layer.register_forward_hook(lambda layer, x, y: seen.append("after") or 2 * y),
               layer.register_forward_pre_hook(lambda layer, x: seen.append("before")),
               layer.register_full_backward_hook(lambda layer, into, out: seen.append("back"))]
    once = ["before", "after", "back"]
    model(X).sum().backward()
    wake(there(model))
    x = X.clone().requires_grad_()
    adapted = model(x)
    adapted.sum().backward()
    assert seen == once + once
    back(model)
    said = model(x)
    said.sum().backward()
    assert seen == once * 3
    if back is ml.merge:
        assert torch.allclose(said, adapted, atol=1e-12)                              # the hook doubles both W's part and the update's
    for handle in handles:
        handle.remove()
    assert (model(X) - said).abs().max() > 1e-3 and seen == once * 3


def test_disabled_and_a_failed_run_give_the_hooks_back():
    model, seen = Net(), []
    model.blocks[0].odd.register_forward_hook(lambda *_: seen.append(1))
    ml.adapt(model, ml.LoRA(2))
    with ml.disabled(model):
        model(X)
    model(X)
    assert len(seen) == 2 and len(model.blocks[0].odd._forward_hooks) == 1 and not model.blocks[0].odd.base._forward_hooks
    copy.deepcopy(model)(X)
    assert len(seen) == 3
