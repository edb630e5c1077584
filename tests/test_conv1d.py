"""Conv1D, whose weight is (in, out), gets adapters through a view; here a stand-in for the class, in tests/peers transformers' own."""

import ast
import copy
import sys
import types
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import minilora as ml
from minilora.quant.nf4 import quantize_nf4
from minilora.safety.configuration import layers_meant
from minilora.safety.conv1d import LinearView, conv1d, linear_layers, original
from minilora.safety.targets import PLAIN_FORWARDS, find_targets
from minilora.storage import base_fingerprint


class Conv1D(nn.Module):
    def __init__(self, nf, nx):
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight, self.bias = nn.Parameter(torch.randn(nx, nf) / 3), nn.Parameter(torch.randn(nf))

    def forward(self, x):
        return torch.addmm(self.bias, x.reshape(-1, self.nx), self.weight).view(*x.shape[:-1], self.nf)


class Doubled(Conv1D):
    def forward(self, x):
        return 2 * super().forward(x)


@pytest.fixture(autouse=True)
def known(monkeypatch):
    """transformers is there, and this is its class."""
    monkeypatch.setitem(sys.modules, "transformers.pytorch_utils", types.SimpleNamespace(Conv1D=Conv1D))


class Net(nn.Module):
    """6 -> 10 -> 6 twice, each block with a Conv1D, a layer of `kind`, and an nn.Linear."""

    def __init__(self, kind=Conv1D):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(nn.ModuleDict({"up": Conv1D(10, 6), "mid": kind(8, 10), "down": nn.Linear(8, 6)}) for _ in range(2))
        self.head = nn.Linear(6, 3)
        self.double().eval()

    def forward(self, x):
        for block in self.blocks:
            x = x + block["down"](torch.tanh(block["mid"](torch.tanh(block["up"](x)))))
        return self.head(x)


X = torch.randn(4, 5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
NAMES = [f"blocks.{i}.{part}" for i in range(2) for part in ("up", "mid", "down")]


def layers(model):
    return [model.get_submodule(name) for name in NAMES]


def test_a_view_says_w_and_copies_nothing():
    layer = Conv1D(10, 6)
    view = LinearView(layer.eval())
    assert view.weight.shape == (10, 6) == (view.out_features, view.in_features) and torch.equal(view.weight, layer.weight.T)
    assert view.weight.data_ptr() == layer.weight.data_ptr() and view.bias is layer.bias and not view.training and original(view) is layer
    assert torch.equal(view(X.float()), layer(X.float())) and torch.allclose(view(X.float()), F.linear(X.float(), view.weight, view.bias), atol=1e-6)
    assert {id(p) for p in view.parameters()} == {id(p) for p in layer.parameters()}
    other = copy.deepcopy(view)
    other.conv1d.weight.data.zero_()
    assert not other.weight.any() and view.weight.any()


def test_it_is_known_by_its_class_and_without_transformers_there_is_none(monkeypatch):
    model = Net()
    assert conv1d() is Conv1D and list(linear_layers(model)) == [*NAMES, "head"]
    monkeypatch.delitem(sys.modules, "transformers.pytorch_utils")
    assert conv1d() is None and list(linear_layers(model)) == ["blocks.0.down", "blocks.1.down", "head"]
    with pytest.raises(ValueError, match="no Linear matches 'up'; this model has down, head; up is a Conv1D"):
        ml.adapt(model, ml.LoRA(2), ["up"])
    said = r"74% of the blocks' weights lie outside nn.Linear and stay as they are: blocks.\*.mid.weight, blocks.\*.up.weight"
    with pytest.warns(UserWarning, match=said):
        ml.adapt(model, ml.LoRA(2))


def test_no_file_imports_transformers_as_it_is_imported_itself():
    for file in Path(ml.__file__).parent.rglob("*.py"):
        imports = [node for node in ast.parse(file.read_text(encoding="utf-8")).body if isinstance(node, (ast.Import, ast.ImportFrom))]
        assert not [node for node in imports if "transformers" in ast.unparse(node)], file


def test_adapters_add_to_the_conv1ds_own_product_and_it_comes_back(wake):
    model, plain = Net(), Net()
    there, before, print_ = layers(model), plain(X), base_fingerprint(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ml.adapt(model, ml.LoRA(2, alpha=6))
    assert [name for name, _ in ml.adapters(model)] == NAMES and torch.equal(model(X), before)
    wake(model)
    layer, x = model.blocks[1]["mid"], torch.randn(2, 5, 10, dtype=torch.float64)
    assert torch.allclose(layer(x), x @ there[4].weight + there[4].bias + 3 * (x @ layer.A.T) @ layer.B.T, rtol=0, atol=1e-13)
    assert layer.weight.shape == (8, 10) and layer.bias is there[4].bias and (layer.out_features, layer.in_features) == (8, 10)
    assert (model(X) - before).abs().max() > 0.01 and base_fingerprint(model) == print_
    with ml.disabled(model):
        assert layers(model) == there and torch.equal(model(X), before)
    assert layers(ml.unload(model)) == there and torch.equal(model(X), before)
    assert list(model.state_dict()) == list(plain.state_dict()) and all(torch.equal(model.state_dict()[key], t) for key, t in plain.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_merging_makes_a_conv1d_again(dtype, wake):
    model = wake(ml.adapt(Net().to(dtype), ml.LoRA(2)))
    model.train().blocks[0].eval()
    sums = {name: (layer.weight.to(torch.promote_types(dtype, torch.float32)) + layer.delta_weight()).to(dtype) for name, layer in ml.adapters(model)}
    said, old = model(X.to(dtype)), model.blocks[0]["up"].base.conv1d
    ml.merge(model)
    assert [type(layer) for layer in layers(model)] == 2 * [Conv1D, Conv1D, nn.Linear]
    for name, W in sums.items():
        layer = model.get_submodule(name)
        assert torch.equal(layer.weight, W.T if isinstance(layer, Conv1D) else W) and layer.weight.is_contiguous() and layer.weight.dtype == dtype
        assert not layer.weight.requires_grad and layer.training == name.startswith("blocks.1")
    assert model.blocks[0]["up"] is not old and torch.equal(model.blocks[0]["up"].bias, old.bias) and model.blocks[0]["up"].bias is not old.bias
    assert torch.allclose(model(X.to(dtype)), said, atol=1e-12 if dtype == torch.float64 else 0.1)


def test_four_bits_hold_w_row_by_row_and_remember(wake):
    model, plain = ml.quantize(Net()), Net()
    for name, layer in zip(NAMES, layers(model)):
        there = plain.get_submodule(name)
        W = there.weight.T.contiguous() if isinstance(there, Conv1D) else there.weight
        assert torch.equal(layer.codes, quantize_nf4(W).codes) and layer.weight.shape == W.shape and torch.equal(layer.bias, there.bias)
        assert layer.stands_for_conv1d == isinstance(there, Conv1D)
    wake(ml.adapt(model, ml.LoRA(2)))
    said = model(X)
    merged = copy.deepcopy(ml.merge(model))
    assert [type(layer) for layer in layers(merged)] == 2 * [Conv1D, Conv1D, nn.Linear] and torch.allclose(merged(X), said, atol=1e-12)
    assert all(layer.weight.is_contiguous() for layer in layers(merged))


@pytest.mark.parametrize("verb", [lambda model, targets=None: ml.adapt(model, ml.LoRA(2), targets), ml.quantize], ids=["adapt", "quantize"])
def test_a_forward_of_its_own_is_refused_by_name_and_left_out_otherwise(verb):
    replaced = Net()
    for block in replaced.blocks:
        block["mid"].forward = lambda x, layer=block["mid"]: x @ layer.weight.abs()
    for model, said in ((Net(Doubled), "Doubled is a Conv1D with a forward of its own, which need not be x Wᵀ . b. If it is, put a Conv1D with"),
                        (replaced, "its forward has been replaced on this very layer")):
        there = layers(model)
        with pytest.raises(ValueError, match=f"blocks.0.mid: {said}"):
            verb(model, ["up", "mid"])
        assert layers(model) == there
        with pytest.warns(UserWarning, match=rf"left out is blocks.\*.mid: {said}"):
            verb(model)
        assert [one is other for one, other in zip(layers(model), there)] == 2 * [False, True, False]


def test_a_subclass_may_be_said_to_be_plain_and_its_own_forward_runs(wake):
    class Timed(Conv1D):
        calls = 0

        def forward(self, x):
            Timed.calls += 1
            return super().forward(x)

    PLAIN_FORWARDS.add(Timed.forward)
    try:
        model = wake(ml.adapt(Net(Timed), ml.LoRA(2)))
    finally:
        PLAIN_FORWARDS.remove(Timed.forward)
    said = model(X)
    assert len(dict(ml.adapters(model))) == 6 and Timed.calls == 2
    assert torch.allclose(ml.merge(model)(X), said, atol=1e-12) and type(model.blocks[0]["mid"]) is Conv1D


def test_what_is_tied_broken_or_too_thin_is_refused():
    tied, broken, whole = Net(), Net(), Net()
    tied.blocks[1]["up"].weight = tied.blocks[0]["up"].weight
    broken.blocks[1]["up"].weight.data[0, 1] = torch.nan
    whole.blocks[1]["up"].weight = nn.Parameter(whole.blocks[1]["up"].weight.to(torch.int8), requires_grad=False)
    for model, said in ((tied, "blocks.0.up: its weight is tied .blocks.0.up.weight = blocks.1.up.weight."),
                        (broken, "blocks.1.up: its weight holds values"), (whole, "blocks.1.up: its weight is stored as torch.int8")):
        with pytest.raises(ValueError, match=said):
            ml.adapt(model, ml.LoRA(2))
    with pytest.raises(ValueError, match="blocks.0.mid: rank 9 is above min.in, out. of a 10 -> 8 layer"):
        ml.adapt(Net(), ml.LoRA(9), ["mid"])


def test_the_last_conv1d_of_a_plain_model_is_its_head():
    assert list(find_targets(nn.Sequential(Conv1D(10, 6), nn.Tanh(), Conv1D(8, 10)))) == ["0"]

    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.body = Conv1D(6, 6), Conv1D(6, 6)

        def get_output_embeddings(self):
            return self.first

    assert list(find_targets(Named())) == ["body"] == list(layers_meant(Named(), {"target_modules": "all-linear"}, Path("folder"), peft_made=True))


def test_what_lies_outside_is_said_beside_both_kinds():
    model = nn.ModuleList(nn.ModuleDict({"in": Conv1D(10, 6), "experts": nn.ParameterDict({"up": torch.randn(3, 10, 6)})}) for _ in range(2))
    with pytest.warns(UserWarning, match=r"75% of the blocks' weights lie outside nn.Linear and Conv1D and stay as they are: blocks.\*.experts.up"):
        ml.adapt(nn.ModuleDict({"blocks": model}), ml.LoRA(2))


@pytest.mark.parametrize("norm", [nn.utils.weight_norm, nn.utils.parametrizations.weight_norm], ids=["old", "new"])
@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
def test_a_weight_that_is_made_anew_at_each_call_is_still_w(norm, wake):
    model = Net()
    for block in model.blocks:
        norm(block["mid"])
    before, kept, there = model(X), list(model.state_dict()), layers(model)
    adapted = wake(ml.adapt(model, ml.LoRA(2)))(X)
    assert len(dict(ml.adapters(model))) == 6
    assert layers(ml.unload(model)) == there and torch.equal(model(X), before) and list(model.state_dict()) == kept
    assert torch.allclose(ml.merge(wake(ml.adapt(model, ml.LoRA(2))))(X), adapted, atol=1e-12) and (adapted - before).abs().max() > 1e-3


def test_hooks_stay_in_their_place_and_can_be_removed(wake):
    model, seen = Net(), []
    handle = model.blocks[1]["up"].register_forward_hook(lambda layer, x, y: seen.append(type(layer).__name__) or 2 * y)
    before = model(X)
    adapted = wake(ml.adapt(model, ml.LoRA(2)))(X)
    with ml.disabled(model):
        assert torch.equal(model(X), before)
    assert torch.allclose(ml.merge(copy.deepcopy(model))(X), adapted, atol=1e-12)
    assert torch.equal(ml.unload(model)(X), before) and seen == ["Conv1D", "LoRALinear", "Conv1D", "Conv1D", "Conv1D"]
    handle.remove()
    assert not torch.equal(model(X), before) and len(seen) == 5


class Failing(ml.LoRA):
    def prepare(self, model, batches, loss_fn, lr):
        raise ValueError("no luck")


def test_a_run_that_fails_before_its_first_step_leaves_the_conv1d():
    model = Net()
    there = layers(model)
    with pytest.raises(ValueError, match="no luck"):
        ml.finetune(model, Failing(2), lambda step: (X, X), 2, 0.01, progress=False)
    assert layers(model) == there and all(p.requires_grad for p in model.parameters())


def test_it_compiles_whole(wake):
    model = wake(ml.adapt(Net(), ml.DoRA(2)))
    assert torch.allclose(torch.compile(model, backend="eager", fullgraph=True)(X), model(X), atol=1e-12)
