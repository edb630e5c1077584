"""One batch whose rows use different adapters: each row is what load_adapter alone gives, for every additive method and DoRA; what cannot be served."""

import copy
import pickle
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import minilora as ml
from minilora import formats
from minilora.methods.lora_drop import share_pairs
from minilora.scale.serving import ServedLinear, add, remove, rows, serve

METHODS = {
    "LoRA": ml.LoRA(3, alpha=5, dropout=0.5),
    "rsLoRA": ml.LoRA(5, alpha=3, rslora=True),
    "LoRA+": ml.LoRAPlus(2, alpha=5),
    "LoRA-FA": ml.LoRAFA(3, alpha=7),
    "VeRA": ml.VeRA(20, seed=7),
    "Delta-LoRA": ml.DeltaLoRA(3, alpha=5, delta_ratio=1.7),
    "Delta-LoRA, before step K": ml.DeltaLoRA(3, alpha=5, delta_ratio=1.7, start_step=9),
    "LoRA-drop": ml.LoRADrop(3, alpha=5),
    "AdaLoRA": ml.AdaLoRA(5, 2, alpha=5),
    "DoRA": ml.DoRA(3, alpha=5),
    "PiSSA": ml.PiSSA(3, alpha=5),
}
TARGETS = {"rsLoRA": ["up_proj"], "VeRA": ["q_proj", "up_proj", "down_proj"], "LoRA-FA": ["blocks.1.attention.q_proj"]}     # the others:
USUAL = ["q_proj", "down_proj"]


def gpt(dtype=torch.float64, seed=0):
    """Layers of 24 -> 24, 96 -> 24 and 24 -> 96, weights of size 1/√in, biases that are not zero."""
    torch.manual_seed(seed)
    model = ml.TinyGPT(ml.GPTConfig(context=16, width=24, layers=2, heads=2))
    with torch.no_grad():
        for linear in model.modules():
            if isinstance(linear, nn.Linear):
                linear.weight.normal_(std=linear.in_features ** -0.5)
                if linear.bias is not None:
                    linear.bias.normal_(std=0.1)
    return model.to(dtype).eval()


def awake(model, name, seed=0):
    """Every adapter away from its start; some triplets cut, W moving, pairs shared, as the method has it."""
    layers, dice = dict(ml.adapters(model)), torch.Generator().manual_seed(seed)
    if name == "LoRA-drop":
        share_pairs(layers, {"blocks.0.attention.q_proj"})
    with torch.no_grad():
        for layer in layers.values():
            tensors = dict(layer.named_parameters())
            if name == "Delta-LoRA":
                tensors |= {"A_K": layer.A_K, "B_K": layer.B_K}
                layer.started.fill_(True)
            for key, tensor in tensors.items():
                if not key.startswith("base.") and not (name == "VeRA" and key in "AB"):
                    tensor.add_(0.3 * torch.randn(tensor.shape, generator=dice, dtype=torch.float64))
            if name == "AdaLoRA":
                layer.mask[[0, 3]] = False
                layer.lam[[0, 3]] = 0
    return model


def save(folder, base, method, targets=USUAL, name="", seed=0):
    return ml.save_adapter(awake(ml.adapt(copy.deepcopy(base), method, targets), name, seed), folder)


def alone(base, folder):
    return base if folder is None else ml.load_adapter(copy.deepcopy(base), folder)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """base dtype -> {method: its folder on gpt(dtype)}, and None under the name "base"."""
    root, made = tmp_path_factory.mktemp("adapters"), {}

    def folders(dtype=torch.float64):
        if dtype not in made:
            made[dtype] = {name: save(root / f"{dtype} {name}", gpt(dtype), method, TARGETS.get(name, USUAL), name, seed)
                           for seed, (name, method) in enumerate(METHODS.items())} | {"base": None}
        return made[dtype]

    return folders


@pytest.fixture
def pair(tmp_path):
    """gpt(), and two folders on it: of rank 2 on q_proj and of rank 3 on q_proj and up_proj."""
    base = gpt()
    return base, {"fr": save(tmp_path / "fr", base, ml.LoRA(2, alpha=3), ["q_proj"]),
                  "de": save(tmp_path / "de", base, ml.LoRA(3), ["q_proj", "up_proj"], seed=1)}


def ids(count, seed=1):
    return torch.randint(256, (count, 12), generator=torch.Generator().manual_seed(seed))


def bits(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(model, before):
    return list(model.state_dict()) == list(before) and all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


# Each row alone.

# In float32 alone: s is multiplied into B beforehand, and one product for all rows adds up in another order than one for each row.
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 2e-5)])
def test_each_row_is_what_its_adapter_alone_gives(folders, dtype, tolerance):
    base, there = gpt(dtype), folders(dtype)
    names = [*there, None, "", *reversed(there)]
    model, x = serve(copy.deepcopy(base), there), ids(len(names))
    plain = base(x)
    with rows(model, names) as same_model:
        said = model(x)
    assert same_model is model
    for at, name in enumerate(names):
        wanted = alone(base, there[name] if name else None)(x)[at]
        assert said.dtype == dtype and torch.allclose(said[at], wanted, rtol=0, atol=tolerance), name
        if name in METHODS:
            assert (wanted - plain[at]).abs().max() > 1e-2, name
        else:
            assert torch.equal(said[at], plain[at])


def test_no_row_depends_on_the_others_adapters_in_one_bit(folders):
    there = folders(torch.float32)
    model, names = serve(gpt(torch.float32), there), list(there)
    x = ids(len(names))
    with rows(model, names):
        mixed = model(x)
    for at, name in enumerate(names):
        with rows(model, [name] * len(names)):
            assert torch.equal(model(x)[at], mixed[at])


@pytest.mark.parametrize("double", [True, False])
def test_on_a_base_in_four_bits(tmp_path, double):
    """QLoRA puts the dense model in those four bits by itself; any other method sits on the quantized model."""
    dense = gpt(torch.float32)
    base = ml.quantize(copy.deepcopy(dense), USUAL, double=double)
    there = {"QLoRA": save(tmp_path / "q", dense, ml.QLoRA(3, double=double)), "base": None}
    for seed, name in enumerate(("LoRA", "VeRA", "AdaLoRA", "DoRA", "PiSSA")):
        there[name] = save(tmp_path / name, base, METHODS[name], USUAL, name, seed)
    model, x = serve(copy.deepcopy(base), there), ids(len(there))
    with rows(model, list(there)):
        said = model(x)
    for at, name in enumerate(there):
        assert torch.allclose(said[at], alone(base, there[name])(x)[at], rtol=0, atol=2e-5), name
    assert same(ml.unload(model), bits(base))


def test_beside_a_16_bit_base_the_factors_are_float32(folders):
    base, there = gpt(torch.bfloat16), folders(torch.bfloat16)
    model, x = serve(copy.deepcopy(base), there), ids(len(there))
    assert {tensor.dtype for _, layer in ml.adapters(model) for tensor in (layer.A, layer.B, layer.g) if tensor is not None} == {torch.float32}
    with rows(model, list(there)):
        said = model(x)
    for at, name in enumerate(there):
        wanted, plain = alone(base, there[name])(x)[at], base(x)[at]
        error = (said[at] - wanted).float().norm() / (wanted - plain).float().norm() if name != "base" else 0.0
        assert said.dtype == torch.bfloat16 and error < 0.1, (name, error)            # 8 bits, through two blocks, of what the adapter does


def test_a_folder_in_fewer_bits_than_the_base(tmp_path):
    """Beside float64 the scale is multiplied in in float64, too."""
    base = gpt()
    model = awake(ml.adapt(copy.deepcopy(base), ml.LoRA(3, alpha=5), USUAL), "")
    for _, layer in ml.adapters(model):
        layer.A.data, layer.B.data = layer.A.data.float(), layer.B.data.float()
    folder = ml.save_adapter(model, tmp_path)
    x, wanted = ids(2), alone(base, folder)(ids(2))
    with rows(serve(base, {"it": folder}), ["it", "it"]) as served:
        assert torch.allclose(served(x), wanted, rtol=0, atol=1e-12)


def test_under_autocast(folders):
    base, there = gpt(torch.float32), folders(torch.float32)
    model, x = serve(copy.deepcopy(base), there), ids(2)
    with torch.autocast("cpu", torch.bfloat16), rows(model, ["DoRA", "LoRA"]):
        said = model(x)
    for at, name in enumerate(("DoRA", "LoRA")):
        with torch.autocast("cpu", torch.bfloat16):
            wanted, plain = alone(base, there[name])(x)[at].float(), base(x)[at].float()
        assert (said[at].float() - wanted).norm() < 0.1 * (wanted - plain).norm()


class Wide(nn.Module):
    """One layer to look at, 7 -> 5, in a list as blocks are."""

    def __init__(self, bias=True):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([nn.Linear(7, 5, bias=bias, dtype=torch.float64)])

    def forward(self, x):
        return self.layers[0](x)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(4, 7), (4, 3, 7), (4, 3, 2, 7), (4, 0, 7)])
def test_it_is_the_equation_in_every_shape(tmp_path, bias, shape):
    model, deltas = Wide(bias), {}
    for seed, (name, method) in enumerate({"fr": ml.LoRA(2, alpha=3), "de": ml.DoRA(3, alpha=5), "it": ml.VeRA(9)}.items()):
        adapted = awake(ml.adapt(copy.deepcopy(model), method), name, seed)
        ml.save_adapter(adapted, tmp_path / name)
        deltas[name] = adapted.layers[0].delta_weight().detach()
    W, b = model.layers[0].weight.detach(), model.layers[0].bias
    serve(model, {name: tmp_path / name for name in deltas})
    x, names = torch.randn(shape, dtype=torch.float64), ["it", None, "de", "fr"]
    with rows(model, names):
        said = model(x)
    assert said.shape == (*shape[:-1], 5)
    for at, name in enumerate(names):
        assert torch.allclose(said[at], F.linear(x[at], W + deltas.get(name, torch.zeros(5, 7)), b), rtol=0, atol=1e-12)
    with rows(model, []):
        assert model(torch.zeros(0, 3, 7, dtype=torch.float64)).shape == (0, 3, 5)


@pytest.mark.parametrize("name", METHODS)
def test_the_factors_are_what_merging_adds(folders, name):
    """And of DoRA what it adds before the rows are stretched."""
    for _, layer in ml.adapters(alone(gpt(), folders()[name])):
        left, right = layer.factors()
        delta = left @ right
        if name == "DoRA":
            delta = layer.stretch()[:, None] * (layer.base.weight + delta) - layer.base.weight
        assert left.shape[0] == layer.out_features and right.shape[1] == layer.in_features
        assert torch.allclose(delta, layer.delta_weight(), rtol=0, atol=1e-12) and delta.abs().max() > 1e-2


def test_the_whole_batch_meets_W_once(pair):
    base, there = pair
    model, calls = serve(base, there), []
    for _, layer in ml.adapters(model):
        layer.base.register_forward_hook(lambda module, inputs, output: calls.append(len(output)))
    with rows(model, ["de", None, "fr", "de"]):
        model(ids(4))
    assert calls == [4] * 4                                               # q_proj and up_proj of two blocks


def test_layers_hold_only_the_adapters_that_have_some_for_them(pair):
    base, there = pair
    layers = dict(ml.adapters(serve(base, there | {"base": None})))
    assert list(layers) == [f"blocks.{i}.{name}" for i in range(2) for name in ("attention.q_proj", "mlp.up_proj")]
    assert layers["blocks.0.attention.q_proj"].A.shape == (3, 3, 24) and layers["blocks.0.attention.q_proj"].B.shape == (3, 24, 3)
    assert layers["blocks.0.mlp.up_proj"].A.shape == (2, 3, 24) and layers["blocks.0.mlp.up_proj"].B.shape == (2, 96, 3)
    assert all(layer.g is None and not layer.A[0].any() and not layer.B[0].any() for layer in layers.values())


def test_what_is_cut_or_zero_takes_no_place(tmp_path, folders):
    model = serve(gpt(), {"it": folders()["AdaLoRA"], "before": folders()["Delta-LoRA, before step K"]})
    assert {layer.A.shape[1] for _, layer in ml.adapters(model)} == {3}              # 5 triplets, 2 of them cut; 6, of which 3 wait for step K
    still = ml.save_adapter(ml.adapt(gpt(), ml.LoRA(4), USUAL), tmp_path)             # B = 0
    with rows(serve(gpt(), {"still": still}), ["still"]) as model:
        assert {layer.A.shape[1] for _, layer in ml.adapters(model)} == {1} and torch.equal(model(ids(1)), gpt()(ids(1)))


# The life of a served model.

def test_W_is_never_touched_and_unload_gives_the_base_back(pair):
    base, there = pair
    model, before = serve(copy.deepcopy(base).train(), there), bits(base)
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    with rows(model, ["fr", "de"]):
        model(ids(2))
        with ml.disabled(model):
            assert same(model, before) and torch.equal(model(ids(2)), base(ids(2)))
    with ml.disabled(model):                                                          # the base asks no one for rows
        assert torch.equal(model(ids(3)), base(ids(3)))
    assert same(ml.unload(model), before) and type(model.blocks[0].attention.q_proj) is nn.Linear
    assert torch.equal(model(ids(2)), base(ids(2)))


def test_add_and_remove_while_it_serves(pair, tmp_path):
    base, there = pair
    there["it"] = save(tmp_path / "it", base, ml.DoRA(5, alpha=2), ["up_proj", "down_proj"], seed=2)
    names, x = ["it", "fr", None, "de"], ids(4)
    with rows(serve(copy.deepcopy(base), there), names) as model:
        wanted, layers = model(x), list(dict(ml.adapters(model)))
    model = serve(copy.deepcopy(base), {"fr": there["fr"]})
    seen = []
    model.blocks[1].attention.q_proj.register_forward_hook(lambda *_: seen.append(1))
    assert add(add(model, "it", there["it"]), "de", there["de"]) is model
    assert list(dict(ml.adapters(model))) == layers
    assert not any(p.requires_grad for p in model.parameters()) and not any(module.training for module in model.modules())
    with rows(model, names):
        assert torch.allclose(model(x), wanted, rtol=0, atol=1e-12)
    assert seen == [1]                                                                # a hook belongs to the place
    assert remove(model, "it") is model
    assert type(model.blocks[0].mlp.down_proj) is nn.Linear and model.blocks[0].mlp.up_proj.g is None
    assert model.blocks[0].mlp.up_proj.A.shape == (2, 3, 24)                          # as narrow as before
    with rows(model, ["de", "fr", None, "de"]):
        assert torch.allclose(model(x)[1:], wanted[1:], rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match="no adapter 'it' is served; there are fr, de, and None"), rows(model, ["it"]):
        pass
    remove(model, "fr")
    with rows(model, [None, "de"]):
        assert torch.allclose(model(x[2:]), wanted[2:], rtol=0, atol=1e-12)
    assert same(ml.unload(model), bits(base))


def test_a_name_for_the_base_can_be_added_and_removed(pair):
    base, there = pair
    model = add(serve(copy.deepcopy(base), there), "plain", None)
    with rows(model, ["plain", "fr"]):
        assert torch.equal(model(ids(2))[0], base(ids(2))[0])
    with pytest.raises(ValueError, match="no adapter 'plain'"), rows(remove(model, "plain"), ["plain"]):
        pass


def test_copies_and_pickles_are_independent(pair):
    model = serve(*pair)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with rows(twin, ["fr", "de"]), rows(model, ["de", "fr"]):
            assert torch.equal(twin(ids(2).flip(0)).flip(0), model(ids(2)))
        remove(twin, "fr")
        assert "fr" in model.blocks[0].attention.q_proj.slots


def test_a_compiled_model(tmp_path):
    base, compilations = Wide(), []
    there = {name: save(tmp_path / name, base, ml.LoRA(2), None, seed=seed) for seed, name in enumerate(("fr", "de"))}
    torch._dynamo.reset()
    model = serve(torch.compile(base, fullgraph=True, backend=lambda graph, inputs: compilations.append(1) or graph.forward), there)
    x = torch.randn(2, 3, 7, dtype=torch.float64)
    for names in (["fr", "de"], ["de", None], ["de", "fr"]):
        with rows(model, names), torch.no_grad():
            assert torch.equal(model(x), base(x))
    assert len(compilations) == 1 and list(dict(ml.adapters(base))) == ["layers.0"]


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_the_short_cut_of_a_transformer_encoder_does_not_pass_it_by(tmp_path):
    def encoder():
        torch.manual_seed(0)
        return nn.TransformerEncoder(nn.TransformerEncoderLayer(24, 2, 40, batch_first=True, dropout=0.0), 2).eval()

    folder = save(tmp_path, encoder(), ml.LoRA(3), ["linear1", "linear2"])
    model, x = serve(encoder(), {"it": folder}), torch.randn(2, 6, 24)
    with rows(model, ["it", None]), torch.no_grad():
        said = model(x)
        assert torch.allclose(said[0], alone(encoder(), folder)(x)[0], atol=1e-5) and (said[0] - encoder()(x)[0]).abs().max() > 0.1
        with pytest.raises(ValueError, match="no single update of W"):                # rows packed without their borders
            model(x, src_key_padding_mask=torch.tensor([[False] * 6, [False] * 3 + [True] * 3]))


# Rows.

def test_generating(pair):
    base, there = pair
    model, said = serve(copy.deepcopy(base), there), {}
    for name in ("fr", "de", None):
        with rows(model, [name]):
            said[name] = model.generate("Anna", 8)
        assert said[name] == alone(base, there.get(name)).generate("Anna", 8)
    assert len(set(said.values())) == 3
    with rows(model, "fr"):                                                           # one name is a list of one
        assert model.generate("Anna", 8) == said["fr"]


def test_beams_are_copies_of_their_row(pair):
    model, x = serve(*pair), ids(3)
    with rows(model, ["fr", None, "de"], beams=2):
        twice, once = model(x.repeat_interleave(2, dim=0)), model(x)                   # an encoder sees each row once
    with rows(model, ["fr", "fr", None, None, "de", "de"]):
        assert torch.equal(twice, model(x.repeat_interleave(2, dim=0)))
    assert torch.allclose(twice[::2], once, rtol=0, atol=1e-12) and torch.allclose(twice[1::2], once, rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match="beams must be a whole number of at least 1"), rows(model, ["fr"], beams=0):
        pass
    with rows(model, ["fr", None], beams=3), pytest.raises(ValueError, match="names the adapters of 2 or 6 rows, and a layer is given 3"):
        model(x)


def test_an_inner_block_counts_until_it_ends(pair):
    model, x = serve(*pair), ids(2)
    with rows(model, ["fr", "de"]):
        outer = model(x)
        with pytest.raises(RuntimeError, match="in between"), rows(model, ["de", "de"]):
            assert torch.equal(model(x)[1], outer[1]) and not torch.allclose(model(x)[0], outer[0])
            raise RuntimeError("in between")
        assert torch.equal(model(x), outer)
    with pytest.raises(ValueError, match=r"serves fr, de: say which for each row, with rows\(model"):
        model(x)


@pytest.mark.parametrize("names, count, match", [
    (["fr", "es"], 2, "no adapter 'es' is served; there are fr, de, and None for the base"),
    (["fr", 0], 2, "no adapter 0 is served"),
    (["fr", "de"], 3, "names the adapters of 2 rows, and a layer is given 3: name one for each row of the batch, and say beams"),
    (["fr", "de"], 1, "of 2 rows, and a layer is given 1"),
    ([None, None], 4, "of 2 rows, and a layer is given 4"),
    ([], 2, "of 0 rows, and a layer is given 2"),
])
def test_wrong_rows_are_refused(pair, names, count, match):
    model = serve(*pair)
    before = bits(model)
    with pytest.raises(ValueError, match=match) as error:
        with rows(model, names):
            model(ids(count))
    assert same(model, before) and "\n" not in str(error.value)
    with rows(model, ["fr", "de"]):
        model(ids(2))


# What cannot be served: one line, the model as it was.

def refused(model, folders, match, verb=serve):
    model.train().requires_grad_(True)
    before, types = bits(model), [type(module) for module in model.modules()]
    with pytest.raises(ValueError, match=match) as error:
        verb(model, folders)
    assert "\n" not in str(error.value)
    assert same(model, before) and [type(module) for module in model.modules()] == types
    assert all(p.requires_grad for p in model.parameters()) and all(module.training for module in model.modules())


def test_another_base_is_refused_with_the_whole_batch(pair, tmp_path):
    base, there = pair
    there["it"] = save(tmp_path / "it", gpt(seed=5), ml.LoRA(2))
    refused(base, there, "made for another base")


@pytest.mark.parametrize("method, match", [
    (ml.LoftQ(2), "LoftQ puts blocks.0.attention.q_proj in four bits of its own, .* a model of its own"),
    (ml.QPiSSA(2), "QPiSSA puts .* a model of its own"), (ml.QLoRA(2), r"QLoRA puts .*this model's; quantize\(model\) gives")])
def test_a_base_of_its_own_is_refused(tmp_path, method, match):
    base = gpt(torch.float32)
    refused(base, {"it": save(tmp_path / "it", base, method)}, match)


@pytest.mark.parametrize("beside", ["head.weight", "norm.bias", "blocks.0.attention.q_proj.base.bias"])
def test_what_is_trained_beside_is_refused(tmp_path, beside):
    base = gpt()
    model = awake(ml.adapt(copy.deepcopy(base), ml.LoRA(2), ["q_proj"]), "")
    model.get_parameter(beside).requires_grad_(True)
    with torch.no_grad():
        model.get_parameter(beside).add_(1)
    refused(base, {"it": ml.save_adapter(model, tmp_path / "it")}, f"brings .*{beside.replace('.base', '')}.* with it")


@pytest.mark.parametrize("folders, match", [
    ({}, "no adapter to serve but the base itself: "), ({"base": None, "too": ""}, r"but the base itself \(base, too\)"),
    ({"": None}, "must be a text that is not empty, got ''"), ({None: None}, "must be a text .* got None"), ({"fr": "nowhere"}, "nowhere"),
])
def test_no_adapter_is_no_serving(folders, match):
    refused(gpt(), folders, match)


def test_an_adapted_and_a_served_model(pair):
    base, there = pair
    refused(ml.adapt(copy.deepcopy(base), ml.LoRA(2)), there, "adapted already: unload")
    model = serve(copy.deepcopy(base), there)
    for verb, match in [
        (lambda: serve(model, there), r"serves adapters already: add\(\)"), (lambda: add(model, "fr", there["fr"]), r"'fr' is served already: remove"),
        (lambda: add(model, "", None), "not empty"), (lambda: add(model, "it", "nowhere"), "nowhere"),
        (lambda: remove(model, "it"), "no adapter 'it' is served; there are fr, de"),
        (lambda: remove(remove(copy.deepcopy(model), "fr"), "de"), r"no adapter to serve but the base itself: .*unload\(\)"),
        (lambda: ml.merge(model), "fr, de are served here together"), (lambda: ml.save_adapter(model, "never"), "Serving has no form on disk"),
        (lambda: ml.adapt(model, ml.LoRA(2)), "adapted already"), (lambda: ml.load_adapter(model, there["fr"]), "adapted already"),
        (lambda: ml.quantize(model), "adapted already"),
    ]:
        before = bits(model)
        with pytest.raises(ValueError, match=match):
            verb()
        assert same(model, before)
    for verb in (lambda: add(base, "fr", there["fr"]), lambda: remove(base, "fr"), lambda: rows(base, ["fr"]).__enter__()):
        with pytest.raises(ValueError, match="serves no adapters"):
            verb()


def test_experts_are_refused(tmp_path):
    class Mixture(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.layers = nn.ModuleList([nn.ModuleDict({"experts": nn.ModuleList([nn.Linear(6, 4), nn.Linear(6, 4)])})])

    refused(Mixture(), {"it": save(tmp_path / "it", Mixture(), ml.LoRA(2), None)}, "layers.0.experts.0 is one of several experts")


@dataclass(frozen=True)
class Doubled(ml.LoRA):
    def layer(self, linear):
        return DoubledLinear(linear, self)


class DoubledLinear(ml.LoRALinear):
    def forward(self, x):
        return 2 * super().forward(x)


def test_a_forward_that_its_factors_do_not_speak_for(tmp_path, monkeypatch):
    class Format(formats.LoRAFormat):
        layer = DoubledLinear

    monkeypatch.setitem(formats.FORMATS, Doubled, Format())
    base = gpt()
    refused(base, {"it": save(tmp_path / "it", base, Doubled(2))}, "q_proj is a DoubledLinear, whose forward pass need not be")


def test_training_a_served_model_is_refused(pair):
    model = serve(*pair)
    before = bits(model)
    with pytest.raises(ValueError):
        ml.finetune(model, ml.LoRA(2), lambda step: (ids(2)[:, :-1], ids(2)[:, 1:]), 2, 0.1, progress=False)
    assert same(model, before) and all(isinstance(layer, ServedLinear) for _, layer in ml.adapters(model))
