"""Adapters on disk: what is written, that it comes back bit for bit, and that nothing broken or foreign gets in."""

import copy
import json
import os
import pickle
import subprocess
import sys
from dataclasses import dataclass

import pytest
import safetensors.torch
import torch
from torch import nn

import minilora as ml
from minilora import formats
from minilora.storage import base_fingerprint, load_checkpoint, save_checkpoint, write_atomically

METHOD = ml.LoRA(rank=3, alpha=5, dropout=0.25)
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
KEY = "base_model.model.blocks.0.attention.q_proj.lora_A.weight"


def small(seed=0):
    torch.manual_seed(seed)
    return ml.TinyGPT(ml.GPTConfig(context=32, width=16, layers=2, heads=2))


@pytest.fixture
def saved(tmp_path, wake):
    """A folder with an adapter on q_proj and down_proj of small(), and the model it came from."""
    model = wake(ml.adapt(small(), METHOD, ["q_proj", "down_proj"])).eval()
    return ml.save_adapter(model, tmp_path / "adapter"), model


def edit_config(folder, **fields):
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | fields))


def edit_tensors(folder, change, keep_metadata=True):
    with safetensors.safe_open(folder / WEIGHTS, "pt") as file:
        metadata, tensors = file.metadata(), {key: file.get_tensor(key) for key in file.keys()}
    change(tensors)
    safetensors.torch.save_file(tensors, folder / WEIGHTS, metadata if keep_metadata else {"format": "pt"})


def refused(folder, match, model=None):
    """Loading says so in one line, and the model is as it was."""
    model = model or small()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    random = torch.get_rng_state()
    with pytest.raises(ValueError, match=match) as error:
        ml.load_adapter(model, folder)
    assert not list(ml.adapters(model)) and all(p.requires_grad for p in model.parameters())
    assert list(model.state_dict()) == list(before) and all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)
    return str(error.value)


def test_the_folder_is_pefts(saved):
    folder, model = saved
    assert sorted(os.listdir(folder)) == [CONFIG, WEIGHTS]
    config = json.loads((folder / CONFIG).read_text())
    assert {k: config[k] for k in ("peft_type", "r", "lora_alpha", "lora_dropout", "use_rslora", "bias", "fan_in_fan_out")} == {
        "peft_type": "LORA", "r": 3, "lora_alpha": 5, "lora_dropout": 0.25, "use_rslora": False, "bias": "none", "fan_in_fan_out": False}
    tensors = safetensors.torch.load_file(folder / WEIGHTS)
    assert len(tensors) == 8
    assert torch.equal(tensors[KEY], model.blocks[0].attention.q_proj.A)
    assert torch.equal(tensors["base_model.model.blocks.1.mlp.down_proj.lora_B.weight"], model.blocks[1].mlp.down_proj.B)


def test_what_is_loaded_is_what_was_saved_bit_for_bit(saved, ids):
    folder, model = saved
    loaded = ml.load_adapter(small(), folder).eval()
    assert torch.equal(loaded(ids), model(ids))
    assert all(torch.equal(a, b) for a, b in zip(loaded.state_dict().values(), model.state_dict().values(), strict=True))
    assert [layer.method for _, layer in ml.adapters(loaded)] == [METHOD] * 4


def test_saving_twice_gives_the_same_bytes(saved, tmp_path):
    folder, model = saved
    again = ml.save_adapter(model, tmp_path / "again")
    assert all((folder / name).read_bytes() == (again / name).read_bytes() for name in (CONFIG, WEIGHTS))


def test_a_loaded_adapter_is_frozen_unless_it_is_to_be_trained_on(saved):
    folder, _ = saved
    assert ml.trainable_parameters(ml.load_adapter(small(), folder)) == 0
    loaded = ml.load_adapter(small(), folder, trainable=True)
    assert ml.trainable_parameters(loaded) == 2 * 3 * (32 + 80)
    before = loaded.blocks[0].mlp.down_proj.B.clone()
    ml.finetune(loaded, METHOD, ml.data.world().batches(2, 31), 2, 1e-3, progress=False)
    assert 0 < (loaded.blocks[0].mlp.down_proj.B - before).abs().max() < 0.0025


def test_rslora_and_fractional_alpha_survive(tmp_path, wake, ids):
    model = wake(ml.adapt(small(), ml.LoRA(rank=2, alpha=2.5, rslora=True)))
    loaded = ml.load_adapter(small(), ml.save_adapter(model, tmp_path))
    assert torch.equal(loaded(ids), model(ids)) and next(ml.adapters(loaded))[1].method.alpha == 2.5


def test_there_must_be_an_adapter_to_save(tmp_path):
    with pytest.raises(ValueError, match="nothing to save"):
        ml.save_adapter(small(), tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_another_base_is_refused_unless_that_is_meant(saved):
    folder, _ = saved
    refused(folder, f"{WEIGHTS}: made for another base", small(seed=1))
    assert list(ml.adapters(ml.load_adapter(small(seed=1), folder, any_base=True)))


@pytest.mark.parametrize("part", ["norm.bias", "token_embedding.weight", "blocks.0.attention.q_proj.weight"])
def test_one_changed_number_makes_another_base(saved, part):
    model = small()
    with torch.no_grad():
        model.get_parameter(part).view(-1)[3] += 1e-6
    refused(saved[0], "another base", model)


def test_the_fingerprint_does_not_see_the_adapter(saved):
    assert base_fingerprint(saved[1]) == base_fingerprint(small()) != base_fingerprint(small(seed=1))


def test_loading_onto_an_adapted_model_is_refused(saved):
    folder, model = saved
    with pytest.raises(ValueError, match="takes a plain model"):
        ml.load_adapter(model, folder)
    assert len(list(ml.adapters(model))) == 4


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_a_missing_file_is_named(saved, name):
    (saved[0] / name).unlink()
    refused(saved[0], name)


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda b: b[:-1], lambda b: b"", lambda b: b"\xff" * len(b), lambda b: b"[]" + b" " * 30],
                         ids=["half", "cut by one", "empty", "garbled", "other"])
def test_a_truncated_or_garbled_file_is_named(saved, name, damage):
    path = saved[0] / name
    content = damage(path.read_bytes().rstrip() if name == CONFIG else path.read_bytes())
    path.write_bytes(content)
    refused(saved[0], name)


class Bomb:
    """Unpickled, it makes a folder."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_pickle_in_place_of_safetensors_is_not_run(saved, tmp_path):
    (saved[0] / WEIGHTS).write_bytes(pickle.dumps(Bomb(tmp_path / "exploded")))
    refused(saved[0], WEIGHTS)
    assert not (tmp_path / "exploded").exists()


def test_code_in_a_checkpoint_is_not_run(tmp_path):
    """With its digest right, so that it is torch that refuses it."""
    save_checkpoint(tmp_path / "c.pt", {}, Bomb(tmp_path / "exploded"))
    with pytest.raises(ValueError, match="c.pt: not a whole checkpoint .UnpicklingError"):
        load_checkpoint(tmp_path / "c.pt", {})
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("metadata", [True, False], ids=["ours", "PEFT's"])
@pytest.mark.parametrize("change, says", [
    (lambda t: t.pop(KEY), f"{KEY} is missing"),
    (lambda t: t.update({"base_model.model.head.lora_A.weight": torch.zeros(3, 16)}), "head.lora_A.weight is unexpected"),
    (lambda t: t.update({KEY: torch.zeros(16, 3)}), rf"{KEY} has shape \(16, 3\).*need \(3, 16\)"),
    (lambda t: t.update({KEY: torch.zeros(4, 16)}), r"has shape \(4, 16\)"),
    (lambda t: t[KEY].view(-1)[7].fill_(float("nan")), f"{KEY} holds values that are not finite"),
    (lambda t: t[KEY].view(-1)[7].fill_(float("-inf")), f"{KEY} holds values that are not finite"),
    (lambda t: t.update({KEY: torch.zeros(3, 16, dtype=torch.int32)}), f"{KEY} holds values that are not finite numbers"),
], ids=["missing", "unexpected", "transposed", "wrong rank", "nan", "inf", "integers"])
def test_wrong_tensors_are_named(saved, change, says, metadata):
    edit_tensors(saved[0], change, metadata)
    assert WEIGHTS in refused(saved[0], says)


@pytest.mark.parametrize("field, value", [
    ("alpha_pattern", {"q_proj": 16}), ("rank_pattern", {"q_proj": 4}), ("modules_to_save", ["head"]), ("bias", "lora_only"), ("bias", "all"),
    ("layers_pattern", ["blocks"]), ("layers_to_transform", [0]), ("exclude_modules", ["k_proj"]), ("use_dora", True), ("fan_in_fan_out", True),
    ("lora_bias", True), ("layer_replication", [[0, 1]]), ("target_parameters", ["w"]), ("trainable_token_indices", [1]), ("loftq_config", {"loftq_bits": 4}),
    ("init_lora_weights", "pissa"), ("init_lora_weights", "pissa_niter_4"), ("init_lora_weights", "olora"), ("init_lora_weights", "loftq"),
    ("init_lora_weights", "corda"), ("init_lora_weights", "lora_ga"), ("use_qalora", True), ("alora_invocation_tokens", [1, 2]), ("a_field_of_the_future", 1),
])
def test_a_field_that_changes_the_meaning_is_refused_by_name(saved, field, value):
    edit_config(saved[0], **{field: value})
    assert CONFIG in refused(saved[0], field)


@pytest.mark.parametrize("fields, says", [
    ({"peft_type": "IA3"}, "peft_type is 'IA3'"), ({"r": 0}, "rank"), ({"r": "3"}, "rank"), ({"lora_alpha": None}, "float"), ({"lora_dropout": 2}, "dropout"),
    ({"lora_alpha": 10}, "does not belong to"), ({"use_rslora": True}, "does not belong to"), ({"target_modules": ["query"]}, "no Linear matches 'query'"),
    ({"target_modules": ["q_proj"]}, "does not belong to"), ({"target_modules": None}, "names no layer"),
])
def test_an_edited_configuration_is_refused(saved, fields, says):
    edit_config(saved[0], **fields)
    assert CONFIG in refused(saved[0], says)


@pytest.mark.parametrize("field", ["r", "lora_alpha", "peft_type", "target_modules"])
def test_a_missing_field_is_named(saved, field):
    config = json.loads((saved[0] / CONFIG).read_text())
    del config[field]
    (saved[0] / CONFIG).write_text(json.dumps(config))
    refused(saved[0], field)


def not_saved(model, match, folder):
    with pytest.raises(ValueError, match=match):
        ml.save_adapter(model, folder)
    assert not folder.exists()


def in_parts(*methods):
    """Each block of small() with a method of its own; awake."""
    model, dice = small(), torch.Generator().manual_seed(4)
    for method, block in zip(methods, model.blocks):
        ml.adapt(block, method, ["q_proj", "down_proj"])
    model.requires_grad_(False)
    with torch.no_grad():
        for _, layer in ml.adapters(model):
            for name, parameter in layer.named_parameters():
                if not name.startswith("base."):
                    parameter.copy_(0.3 * torch.randn(parameter.shape, generator=dice))
    return model.eval()


@pytest.mark.parametrize("methods", [
    (ml.LoRA(2, alpha=3), ml.LoRA(4, alpha=32)), (ml.LoRA(3, alpha=2.5), ml.LoRA(3, alpha=2.5, rslora=True)), (ml.DoRA(2), ml.DoRA(3)),
    (ml.PiSSA(2), ml.LoRAPlus(3, ratio=4)), (ml.LoRAFA(2), ml.DeltaLoRA(2)), (ml.QLoRA(2), ml.LoRA(2, dropout=0.5)),
], ids=lambda methods: " ".join(type(method).__name__ for method in methods))
def test_layers_with_methods_of_their_own_come_back(methods, tmp_path, ids):
    model = in_parts(*methods)
    first = ml.save_adapter(model, tmp_path / "first")
    loaded = ml.load_adapter(small(), first)
    assert torch.equal(loaded(ids), model(ids))
    assert [layer.method for _, layer in ml.adapters(loaded)] == [method for method in methods for _ in range(2)]
    second = ml.save_adapter(loaded, tmp_path / "second")
    assert all((first / name).read_bytes() == (second / name).read_bytes() for name in (CONFIG, WEIGHTS))


@pytest.mark.parametrize("methods, says", [
    ((ml.LoRA(2), ml.DoRA(2)), "blocks.1.attention.q_proj has a DoRA and blocks.0.attention.q_proj none"),
    ((ml.AdaLoRA(3, 3), ml.AdaLoRA(2, 2)), "blocks.1.attention.q_proj has AdaLoRA.initial_rank=2.*cannot share a folder"),
    ((ml.VeRA(3), ml.LoRA(3)), "cannot share a folder"), ((ml.LoRA(2), ml.LoRADrop(2)), "cannot share a folder"),
])
def test_methods_that_one_folder_cannot_hold_are_refused_by_name(methods, says, tmp_path, ids):
    model = in_parts(*methods)
    not_saved(model, says, tmp_path / "together")
    apart = small()
    for i, block in enumerate(model.blocks):                          # what the message says to do
        ml.load_adapter(apart.blocks[i], ml.save_adapter(block, tmp_path / str(i)))
    assert torch.equal(apart.eval()(ids), model(ids))


def test_projections_drawn_in_parts_are_refused(tmp_path, wake):
    model = small()
    ml.adapt(model.blocks[0], ml.VeRA(4), ["q_proj"])
    ml.adapt(model.blocks[1], ml.VeRA(4), ["up_proj"])
    not_saved(model, "hold different projections", tmp_path / "a")


@pytest.mark.parametrize("change, says", [
    (lambda layer: setattr(layer, "scale", 0.1), "blocks.0.attention.q_proj: its scale is 0.1"),
    (lambda layer: setattr(layer, "gate", nn.Parameter(torch.ones(1))), "blocks.0.attention.q_proj: it has gate"),
    (lambda layer: setattr(layer, "A", nn.Parameter(torch.ones(2, 16))), "has rank 2, and its method says 3"),
    (lambda layer: layer.B.data[0].fill_(float("nan")), "blocks.0.attention.q_proj.lora_B.weight holds values that are not finite"),
], ids=["scale", "a tensor more", "rank", "nan"])
def test_a_layer_that_would_come_back_as_another_is_refused(saved, tmp_path, change, says):
    change(next(layer for _, layer in ml.adapters(saved[1])))
    not_saved(saved[1], says, tmp_path / "again")


@dataclass(frozen=True)
class Mine(ml.LoRA):
    pass


class MyLinear(ml.LoRALinear):
    pass


@dataclass(frozen=True)
class Layered(ml.LoRA):
    def layer(self, linear):
        return MyLinear(linear, self)


def test_a_method_of_ones_own_is_told_what_to_do_and_that_works(tmp_path, wake, ids, monkeypatch):
    model = wake(ml.adapt(small(), Mine(3)))
    not_saved(model, r"q_proj: Mine has no form on disk.*FORMATS\[Mine\] = LoRAFormat\(\)", tmp_path / "a")
    monkeypatch.setitem(formats.FORMATS, Mine, formats.LoRAFormat())
    loaded = ml.load_adapter(small(), ml.save_adapter(model, tmp_path / "a"))
    assert torch.equal(loaded(ids), model.eval()(ids)) and type(next(ml.adapters(loaded))[1].method) is Mine
    monkeypatch.setitem(formats.FORMATS, Layered, formats.LoRAFormat())
    not_saved(ml.adapt(small(), Layered(3)), "it is a MyLinear, and Layered makes a LoRALinear", tmp_path / "b")


def with_head(model, wake):
    """small() adapted, awake, whose head and first norm are trained too."""
    model = wake(ml.adapt(model, METHOD, ["q_proj"]))
    with torch.no_grad():
        for parameter in (model.head.weight, model.blocks[0].mlp_norm.bias):
            parameter.requires_grad_(True).add_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(6)))
    return model


@pytest.mark.parametrize("frozen", [False, True])
def test_what_is_trained_beside_the_adapters_comes_back(tmp_path, wake, ids, frozen):
    model = with_head(small(), wake).eval()
    if frozen:
        model.requires_grad_(False)
    first = ml.save_adapter(model, tmp_path / "first")
    assert json.loads((first / CONFIG).read_text())["modules_to_save"] == ["blocks.0.mlp_norm", "head"]
    loaded = ml.load_adapter(small(), first)
    assert torch.equal(loaded(ids), model(ids)) and ml.trainable_parameters(loaded) == 0
    second = ml.save_adapter(loaded, tmp_path / "second")
    assert all((first / name).read_bytes() == (second / name).read_bytes() for name in (CONFIG, WEIGHTS))
    again = ml.load_adapter(small(), second, trainable=True)
    assert ml.trainable_parameters(again) == (2 * 3 * 32 if frozen else ml.trainable_parameters(model))
    assert again.training                                             # to be trained on: the mode stays


def test_a_loaded_head_that_never_moved_is_saved_again(tmp_path):
    model = ml.adapt(small(), METHOD)
    model.head.requires_grad_(True)
    first = ml.save_adapter(model, tmp_path / "first")
    second = ml.save_adapter(ml.load_adapter(small(), first), tmp_path / "second")
    assert all((first / name).read_bytes() == (second / name).read_bytes() for name in (CONFIG, WEIGHTS))


def test_the_base_speaks_and_comes_back_also_where_a_head_was_loaded(tmp_path, wake, ids):
    folder, base = ml.save_adapter(with_head(small(), wake), tmp_path), small().eval()
    loaded = ml.load_adapter(small(), folder)
    adapted, copied = loaded(ids), copy.deepcopy(loaded)
    for model in (loaded, copied):
        with ml.disabled(model):
            assert torch.equal(model(ids), base(ids))
        assert torch.equal(model(ids), adapted)
        ml.unload(model)
        assert list(model.state_dict()) == list(base.state_dict()) and all(torch.equal(t, base.state_dict()[n]) for n, t in model.state_dict().items())
    merged = ml.merge(ml.load_adapter(small(), folder))
    assert torch.allclose(merged(ids), adapted, atol=1e-5) and not torch.equal(merged.head.weight, base.head.weight)


def test_the_fingerprint_does_not_see_what_is_saved_beside(tmp_path, wake):
    folder, other = ml.save_adapter(with_head(small(), wake), tmp_path), small()
    nn.init.zeros_(other.head.weight)
    assert list(ml.adapters(ml.load_adapter(other, folder)))          # its own head is not needed
    other = small()
    nn.init.zeros_(other.norm.weight)
    refused(folder, "made for another base", other)


def test_a_tied_head_stays_tied(tmp_path, wake, ids):
    def tied():
        model = small()
        model.head.weight = model.token_embedding.weight
        return model

    model = with_head(tied(), wake).eval()
    loaded = ml.load_adapter(tied(), ml.save_adapter(model, tmp_path), trainable=True).eval()
    assert torch.equal(loaded(ids), model(ids)) and loaded.head.weight is loaded.token_embedding.weight
    assert ml.unload(loaded).head.weight is loaded.token_embedding.weight and torch.equal(loaded(ids), tied().eval()(ids))


def test_a_trained_tensor_that_pefts_format_has_no_place_for_is_named(tmp_path):
    class Shifted(nn.Module):
        def __init__(self):
            super().__init__()
            self.shift, self.body = nn.Parameter(torch.zeros(8)), nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))

    model = ml.adapt(Shifted(), ml.LoRA(2), ["body.0"])
    model.shift.requires_grad_(True)
    not_saved(model, "shift is trained, or has moved, and belongs to the model itself", tmp_path / "a")


class Centred(nn.Module):
    """Keeps a running mean and a count, as a BatchNorm does; neither is a parameter."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(8))
        self.register_buffer("seen", torch.tensor(0))

    def forward(self, x):
        if self.training:
            self.mean.mul_(0.9).add_(x.detach().mean(0), alpha=0.1)
            self.seen += 1
        return x - self.mean


@pytest.mark.parametrize("norm", [Centred, lambda: nn.BatchNorm1d(8), lambda: nn.Sequential(nn.BatchNorm1d(8), Centred())])
def test_buffers_that_move_in_training(norm, tmp_path, wake):
    def build():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 8), norm(), nn.Linear(8, 5))

    model, x = wake(ml.adapt(build(), ml.LoRA(2), ["0", "2"])).train(), torch.randn(7, 6, generator=torch.Generator().manual_seed(1)) + 2
    untouched = ml.save_adapter(model, tmp_path / "untouched")
    assert json.loads((untouched / CONFIG).read_text())["modules_to_save"] is None
    for _ in range(3):
        model(x)
    model.eval()
    loaded = ml.load_adapter(build(), ml.save_adapter(model, tmp_path / "a"))
    assert torch.equal(loaded(x), model(x))
    for one in (model, loaded):
        with ml.disabled(one):
            assert torch.equal(one(x), build().eval()(x))
        assert all(torch.equal(tensor, build().state_dict()[name]) for name, tensor in ml.unload(one).state_dict().items())


WRAPS = {"compiled": lambda model: torch.compile(model, backend="eager"), "DataParallel": nn.DataParallel, "averaged": torch.optim.swa_utils.AveragedModel,
         "both": lambda model: torch.compile(nn.DataParallel(model), backend="eager")}


@pytest.mark.parametrize("wrap", WRAPS.values(), ids=WRAPS)
def test_a_wrapped_model_is_saved_as_the_plain_one_and_loaded_onto(wrap, tmp_path, wake, ids):
    model = with_head(small(), wake).eval()
    plain, wrapped = ml.save_adapter(model, tmp_path / "plain"), ml.save_adapter(wrap(model), tmp_path / "wrapped")
    assert all((plain / name).read_bytes() == (wrapped / name).read_bytes() for name in (CONFIG, WEIGHTS))
    assert base_fingerprint(wrap(model)) == base_fingerprint(model)
    onto = wrap(small())
    assert ml.load_adapter(onto, plain) is onto and torch.equal(onto(ids), model(ids)) and not onto.training
    again = wake(ml.adapt(wrap(small()), METHOD, ["q_proj"])).eval()       # adapted while it is wrapped
    assert torch.equal(ml.load_adapter(small(), ml.save_adapter(again, tmp_path / "again"))(ids), again(ids))


def test_a_part_that_is_wrapped(saved, tmp_path, ids):
    folder, model = saved
    model.blocks[1] = torch.compile(model.blocks[1], backend="eager")
    model.blocks[0].mlp = nn.DataParallel(model.blocks[0].mlp)
    part, mlp = model.blocks[1], model.blocks[0].mlp
    again = ml.save_adapter(model, tmp_path / "again")
    assert (again / WEIGHTS).read_bytes() == (folder / WEIGHTS).read_bytes() and model.blocks[1] is part and model.blocks[0].mlp is mlp


@pytest.mark.parametrize("layer", ["0", "1.0"])
def test_a_name_that_is_the_end_of_another(layer, tmp_path, wake):
    def build():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 3)))

    model = build()
    part = model if layer == "0" else model[1]
    ml.adapter.install(part, METHOD.wrap({"0": part[0]}))
    model.requires_grad_(False)
    loaded = ml.load_adapter(build(), ml.save_adapter(wake(model), tmp_path))
    x = torch.randn(2, 8)
    assert [name for name, _ in ml.adapters(loaded)] == [layer] and torch.equal(loaded(x), model.eval()(x))


@pytest.mark.parametrize("method", [ml.VeRA(20), ml.LoRA(3), ml.DoRA(3), ml.PiSSA(3), ml.AdaLoRA(3, 3)], ids=lambda method: type(method).__name__)
def test_an_adapter_cast_to_16_bits_with_its_model(method, tmp_path, wake, ids):
    model = wake(ml.adapt(small(), method)).to(torch.bfloat16).eval()
    loaded = ml.load_adapter(small().to(torch.bfloat16), ml.save_adapter(model, tmp_path))
    assert torch.equal(loaded(ids), model(ids))
    assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(loaded.state_dict().values(), model.state_dict().values(), strict=True))


def test_projections_that_the_seed_does_not_draw(tmp_path, wake, ids):
    """Rounded once, and widened again: the file can hold them, the seed alone cannot."""
    def build():
        return small().to(torch.bfloat16).float()

    model = wake(ml.adapt(small(), ml.VeRA(20))).to(torch.bfloat16).float().eval()
    assert torch.equal(ml.load_adapter(build(), ml.save_adapter(model, tmp_path / "a"))(ids), model(ids))
    with pytest.raises(ValueError, match="save with projection=True"):
        ml.save_adapter(model, tmp_path / "b", projection=False)


def test_loaded_means_ready_to_be_used(saved, ids):
    loaded = ml.load_adapter(small().train(), saved[0])
    assert torch.equal(loaded(ids), loaded(ids)) and not any(module.training for module in loaded.modules())


def test_one_number_edited_in_our_file_is_noticed(saved):
    edit_tensors(saved[0], lambda tensors: tensors[KEY].view(-1)[3].add_(1e-3))
    assert WEIGHTS in refused(saved[0], "not as it was written")


def test_a_pickle_beside_the_configuration_is_told_from_nothing(saved):
    (saved[0] / WEIGHTS).rename(saved[0] / "adapter_model.bin")
    refused(saved[0], r"holds adapter_model.bin, a pickle.*save_file\(torch.load")


def test_folders_in_the_folder_are_named(saved, tmp_path):
    (tmp_path / "run").mkdir()
    for name in ("checkpoint-100", "checkpoint-200"):
        ml.save_adapter(saved[1], tmp_path / "run" / name)
    refused(tmp_path / "run", "load one of them: checkpoint-100, checkpoint-200")
    refused(saved[0] / WEIGHTS, "is a file; load_adapter takes the folder")


@pytest.mark.parametrize("make, says", [
    (lambda: ml.quantize(small()), "codes: a layer is in four bits"), (lambda: ml.quantize(small(), ["head"]), "head.codes: a layer is in four bits"),
    (lambda: ml.adapt(small(), METHOD), "it has adapters"),
])
def test_a_whole_model_that_could_not_be_read_back_is_not_saved(make, says, tmp_path):
    with pytest.raises(ValueError, match=says):
        ml.storage.save_model(make(), tmp_path / "model.safetensors")
    assert not (tmp_path / "model.safetensors").exists()


def test_a_compiled_whole_model_is_saved_as_the_plain_one(tmp_path, ids):
    ml.storage.save_model(torch.compile(small(), backend="eager"), tmp_path / "model.safetensors")
    assert torch.equal(ml.load_base(tmp_path / "model.safetensors")(ids), small()(ids))


def test_a_save_killed_at_any_moment_leaves_the_old_file_or_the_new(tmp_path):
    """A process that rewrites one file over and over is killed: what is there is always one whole content."""
    script = ("import sys; from minilora.storage import write_atomically\n"
              "print('ready', flush=True)\n"
              "while True:\n    for byte in b'ab': write_atomically(sys.argv[1], bytes([byte]) * 300_000)")
    path = tmp_path / "file"
    for pause in (0.0, 0.02, 0.05):
        process = subprocess.Popen([sys.executable, "-c", script, path], stdout=subprocess.PIPE)
        process.stdout.readline()
        while not path.exists():
            pass
        try:
            process.wait(pause or 0.001)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        content = path.read_bytes()
        assert len(content) == 300_000 and len(set(content)) == 1


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_atomically(path, b"old")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"


def test_a_checkpoint_keeps_numbers_and_knows_its_run(tmp_path):
    save_checkpoint(tmp_path / "c", {"lr": 0.1}, {"step": 3, "t": torch.arange(3)})
    state = load_checkpoint(tmp_path / "c", {"lr": 0.1})
    assert state["step"] == 3 and torch.equal(state["t"], torch.arange(3))
    with pytest.raises(ValueError, match="whose lr was 0.1 and now is 0.2"):
        load_checkpoint(tmp_path / "c", {"lr": 0.2})


def test_a_checkpoint_with_one_bit_changed_anywhere_is_refused(tmp_path):
    """Of a number too: torch loads that without a word."""
    save_checkpoint(tmp_path / "c", {"lr": 0.1}, {"step": 3, "t": torch.arange(40.0)})
    whole = (tmp_path / "c").read_bytes()
    torch.load(tmp_path / "c", weights_only=True)                    # the digest at the end is in nobody's way
    place = whole.index(torch.arange(40.0).numpy().tobytes()) + 77
    for at in (place, 0, len(whole) // 2, len(whole) - 40, len(whole) - 1):
        (tmp_path / "c").write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1:])
        with pytest.raises(ValueError, match="c: not a whole checkpoint .*; remove it to start over"):
            load_checkpoint(tmp_path / "c", {"lr": 0.1})
    (tmp_path / "c").write_bytes(whole)
    assert load_checkpoint(tmp_path / "c", {"lr": 0.1})["t"][39] == 39


def test_a_16_bit_base_keeps_float32_factors_on_disk(tmp_path, wake, ids):
    model = wake(ml.adapt(small().bfloat16(), METHOD)).eval()
    loaded = ml.load_adapter(small().bfloat16(), ml.save_adapter(model, tmp_path)).eval()
    assert torch.equal(loaded(ids), model(ids))
    assert {t.dtype for t in safetensors.torch.load_file(tmp_path / WEIGHTS).values()} == {torch.float32}
