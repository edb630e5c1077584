"""Each method on disk: it comes back as itself and bit for bit, and an edited file is named. What PEFT makes of it: tests/peers."""

import dataclasses
import json

import pytest
import safetensors.torch
import torch

import minilora as ml

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
METHODS = {
    "LoRA": ml.LoRA(rank=3, alpha=5, dropout=0.25),
    "rsLoRA": ml.LoRA(rank=3, alpha=5, rslora=True),
    "LoRA+": ml.LoRAPlus(rank=3, alpha=5, ratio=4),
    "LoRA-FA": ml.LoRAFA(rank=3, alpha=5, projection=True),
    "VeRA": ml.VeRA(rank=20, d_initial=0.3, seed=7),
    "Delta-LoRA": ml.DeltaLoRA(rank=3, alpha=5, delta_ratio=1.7, start_step=2),
    "Delta-LoRA, rsLoRA": ml.DeltaLoRA(rank=3, alpha=5, delta_ratio=0.7, rslora=True),
    "LoRA-drop": ml.LoRADrop(rank=3, alpha=5, threshold=0.4, warmup_steps=2),
    "AdaLoRA": ml.AdaLoRA(initial_rank=4, target_rank=2, alpha=5, warmup_steps=1, final_steps=1, interval=2),
    "DoRA": ml.DoRA(rank=3, alpha=5, dropout=0.25),
    "PiSSA": ml.PiSSA(rank=3, alpha=5),
    "PiSSA, rsLoRA": ml.PiSSA(rank=3, alpha=5, rslora=True, dropout=0.25),
}
EVERY = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)


def small(dtype=torch.float32):
    torch.manual_seed(0)
    return ml.TinyGPT(ml.GPTConfig(context=32, width=16, layers=3, heads=2)).to(dtype)


def trained(method, steps=6, dtype=torch.float32):
    """small() after a few steps at a high rate, so that every tensor has moved."""
    model = small(dtype)
    ml.finetune(model, method, ml.data.world().batches(2, 31), steps, 0.05, targets=["q_proj", "down_proj"], progress=False)
    return model.eval()


@pytest.fixture(scope="module")
def models():
    return {name: trained(method) for name, method in METHODS.items()}


def own(model):
    """The adapters' tensors by name, shared ones under each of their names."""
    return {f"{name}.{key}": tensor for name, layer in ml.adapters(model) for key, tensor in layer.state_dict().items() if not key.startswith("base.")}


def edit(folder, change, about=lambda about: about):
    """Change the tensors; and the metadata, or drop it where `about` returns None."""
    with safetensors.safe_open(folder / WEIGHTS, "pt") as file:
        metadata, tensors = file.metadata(), {key: file.get_tensor(key) for key in file.keys()}
    change(tensors)
    said = about(json.loads(metadata["minilora"]))
    safetensors.torch.save_file(tensors, folder / WEIGHTS, {"format": "pt"} | ({} if said is None else {"minilora": json.dumps(said)}))


def edit_config(folder, **fields):
    (folder / CONFIG).write_text(json.dumps(json.loads((folder / CONFIG).read_text()) | fields))


def refused(folder, match):
    model = small()
    before, kinds = {name: tensor.clone() for name, tensor in model.state_dict().items()}, [type(module) for module in model.modules()]
    with pytest.raises(ValueError, match=match):
        ml.load_adapter(model, folder)
    assert [type(module) for module in model.modules()] == kinds and all(p.requires_grad for p in model.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("name", METHODS)
def test_what_is_loaded_is_what_was_saved(name, models, tmp_path, ids):
    model, base = models[name], small().eval()
    loaded = ml.load_adapter(small(), ml.save_adapter(model, tmp_path)).eval()
    assert (model(ids) - base(ids)).abs().max() > 1e-3
    assert torch.equal(loaded(ids), model(ids))
    before, after = own(model), own(loaded)
    lost = {key for key in before if not torch.equal(before[key], after[key])}
    running = {f"{layer}.{kind}_{w}" for layer, _ in ml.adapters(model) for kind in ("sensitivity", "uncertainty") for w in ("P", "lam", "Q")}
    cut = {f"{layer}.{w}" for layer, _ in ml.adapters(model) for w in ("P", "Q")}
    assert before.keys() == after.keys() and lost <= (running | cut if name == "AdaLoRA" else set())      # zeros where they were cut
    (_, ours), (_, theirs) = next(ml.adapters(model)), next(ml.adapters(loaded))
    assert dataclasses.asdict(theirs.method) == dataclasses.asdict(ours.method) and type(theirs.method) is type(METHODS[name])


@pytest.mark.parametrize("name", METHODS)
def test_saving_what_was_loaded_gives_the_same_bytes(name, models, tmp_path):
    first = ml.save_adapter(models[name], tmp_path / "first")
    second = ml.save_adapter(ml.load_adapter(small(), first), tmp_path / "second")
    assert all((first / file).read_bytes() == (second / file).read_bytes() for file in (CONFIG, WEIGHTS))


@pytest.mark.parametrize("name", METHODS)
def test_loaded_frozen_or_to_be_trained_on(name, models, tmp_path):
    folder = ml.save_adapter(models[name], tmp_path)
    assert ml.trainable_parameters(ml.load_adapter(small(), folder)) == 0
    loaded = ml.load_adapter(small(), folder, trainable=True)
    assert ml.trainable_parameters(loaded) == ml.trainable_parameters(models[name])
    before = {key: tensor.clone() for key, tensor in own(loaded).items()}
    history = ml.finetune(loaded, METHODS[name], ml.data.world().batches(2, 31), 6, 1e-3, progress=False)
    assert len(history["loss"]) == 6 and any(not torch.equal(tensor, before[key]) for key, tensor in own(loaded).items())


@EVERY
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_bases_of_other_precision(method, dtype, tmp_path, ids):
    model = trained(method, dtype=dtype)
    loaded = ml.load_adapter(small(dtype), ml.save_adapter(model, tmp_path)).eval()
    assert torch.equal(loaded(ids), model(ids))
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert {tensor.dtype for tensor in safetensors.torch.load_file(tmp_path / WEIGHTS).values()} == {wide}


@EVERY
def test_an_adapter_that_was_never_trained(method, tmp_path, ids):
    model = ml.adapt(small(), method).eval()
    loaded = ml.load_adapter(small(), ml.save_adapter(model, tmp_path), trainable=True).eval()
    assert torch.equal(loaded(ids), model(ids)) and ml.trainable_parameters(loaded) == ml.trainable_parameters(model)
    ml.finetune(loaded, method, ml.data.world().batches(2, 31), 4, 1e-2, progress=False)       # LoRA-drop still has to choose


def test_loras_kin_is_lora_to_a_reader_that_knows_no_more(models, tmp_path, ids):
    """Without our metadata (PEFT drops it) the file still says the same function."""
    for name in ("LoRA+", "LoRA-FA", "LoRA-drop", "PiSSA", "PiSSA, rsLoRA"):
        folder = ml.save_adapter(models[name], tmp_path / name)
        edit(folder, lambda tensors: None, lambda about: None)
        loaded = ml.load_adapter(small(), folder).eval()
        assert {type(layer.method) for _, layer in ml.adapters(loaded)} == {ml.LoRA}
        assert torch.allclose(loaded(ids), models[name](ids), rtol=0, atol=1e-5)


def test_pissa_and_delta_lora_are_written_with_rank_2r(models, tmp_path):
    for name in ("PiSSA", "Delta-LoRA"):
        method, folder = METHODS[name], ml.save_adapter(models[name], tmp_path / name)
        config, tensors = json.loads((folder / CONFIG).read_text()), safetensors.torch.load_file(folder / WEIGHTS)
        strength = 1 + getattr(method, "delta_ratio", 0)
        assert config["r"] == 6 and config["lora_alpha"] == pytest.approx(2 * 5 * strength, rel=1e-15) and not config["use_rslora"]
        for layer_name, layer in ml.adapters(models[name]):
            A, B = (tensors[f"base_model.model.{layer_name}.lora_{f}.weight"].double() for f in "AB")
            assert torch.allclose(config["lora_alpha"] / 6 * B @ A, layer.delta_weight().double(), rtol=0, atol=1e-6)


def test_delta_lora_before_its_start_is_plain_lora(tmp_path, ids):
    model = trained(ml.DeltaLoRA(rank=3, alpha=5, start_step=5), steps=6)
    for _, layer in ml.adapters(model):
        layer.started.fill_(False)
    folder = ml.save_adapter(model, tmp_path)
    assert json.loads((folder / CONFIG).read_text())["r"] == 3
    loaded = ml.load_adapter(small(), folder).eval()
    assert torch.equal(loaded(ids), model(ids)) and not any(layer.started for _, layer in ml.adapters(loaded))


def test_a_shared_pair_is_one_again_after_loading(models, tmp_path):
    model = models["LoRA-drop"]
    loaded = ml.load_adapter(small(), ml.save_adapter(model, tmp_path))

    def sharing(model):
        layers = dict(ml.adapters(model))
        return {(a, b) for a in layers for b in layers if layers[a].A is layers[b].A and layers[a].B is layers[b].B and a < b}

    assert sharing(loaded) == sharing(model) != set()
    assert len(safetensors.torch.load_file(tmp_path / WEIGHTS)) == 2 * 6                       # written out for every layer


def test_what_adalora_cut_is_not_written(models, tmp_path):
    model, folder = models["AdaLoRA"], ml.save_adapter(models["AdaLoRA"], tmp_path)
    config, tensors = json.loads((folder / CONFIG).read_text()), safetensors.torch.load_file(folder / WEIGHTS)
    ranks = {name: int(layer.kept.sum()) for name, layer in ml.adapters(model)}
    assert sum(ranks.values()) == 2 * 6 and config["total_step"] == 6
    for name, layer in ml.adapters(model):
        assert config["rank_pattern"][f"{name}.lora_E"] == layer.mask.tolist()
        assert [tensors[f"base_model.model.{name}.lora_{part}"].shape for part in "AEB"] == [
            (ranks[name], layer.in_features), (ranks[name], 1), (layer.out_features, ranks[name])]


def test_a_triplet_that_has_grown_again_is_written(models, tmp_path, ids):
    model = trained(METHODS["AdaLoRA"])
    name, layer = next((name, layer) for name, layer in ml.adapters(model) if not layer.mask.all())
    revived = int((~layer.mask).nonzero()[0])
    with torch.no_grad():
        layer.lam[revived] = 0.7
    folder = ml.save_adapter(model, tmp_path)
    assert json.loads((folder / CONFIG).read_text())["rank_pattern"][f"{name}.lora_E"][revived]
    assert torch.equal(ml.load_adapter(small(), folder).eval()(ids), model(ids))


def test_a_layer_that_lost_every_triplet_loads(tmp_path, ids):
    model = trained(METHODS["AdaLoRA"])
    _, layer = next(ml.adapters(model))
    with torch.no_grad():
        layer.lam.zero_()
        layer.mask.fill_(False)
    assert torch.equal(ml.load_adapter(small(), ml.save_adapter(model, tmp_path)).eval()(ids), model(ids))


def test_vera_is_two_vectors_a_layer_and_a_seed(models, tmp_path, ids):
    model = models["VeRA"]
    whole, lean = ml.save_adapter(model, tmp_path / "whole"), ml.save_adapter(model, tmp_path / "lean", projection=False)
    tensors = safetensors.torch.load_file(lean / WEIGHTS)
    assert sum(tensor.numel() for tensor in tensors.values()) == ml.trainable_parameters(model)
    assert safetensors.torch.load_file(whole / WEIGHTS).keys() - tensors.keys() == {"base_model.vera_A", "base_model.vera_B"}
    for folder in (whole, lean):
        assert torch.equal(ml.load_adapter(small(), folder).eval()(ids), model(ids))


@pytest.mark.parametrize("projection", [True, False], ids=["with projections", "seed only"])
@pytest.mark.parametrize("metadata", [True, False], ids=["ours", "PEFT's"])
def test_a_wrong_seed_is_an_error(models, tmp_path, projection, metadata):
    folder = ml.save_adapter(models["VeRA"], tmp_path, projection)
    edit_config(folder, projection_prng_key=8)
    edit(folder, lambda tensors: None, lambda about: about if metadata else None)
    if projection or metadata:
        refused(folder, "projection_prng_key is 8 here and was 7" if metadata else "vera_A is not what this configuration makes it")
    else:                                                                 # nothing in such a folder could tell
        assert ml.load_adapter(small(), folder)


def test_a_seed_that_draws_other_numbers_here_is_an_error(models, tmp_path):
    folder = ml.save_adapter(models["VeRA"], tmp_path, projection=False)
    edit(folder, lambda tensors: None, lambda about: about | {"state": {"projections": "0" * 64}})
    refused(folder, "this seed draws other projections")


def flip(key, at=0):
    def change(tensors):
        tensors[key].view(-1)[at] += 1e-3
    return change


@pytest.mark.parametrize("name, change, says", [
    ("VeRA", flip("base_model.vera_A"), "vera_A is not what this configuration makes it"),
    ("VeRA", flip("base_model.vera_B", -1), "vera_B is not what this configuration makes it"),
    ("VeRA", lambda t: t.pop("base_model.vera_B"), "vera_B is missing"),
    ("VeRA", lambda t: t.update({"base_model.vera_A": torch.zeros(3, 3)}), "vera_A has shape"),
    ("LoRA-drop", lambda t: [flip(key)(t) for key in t if "blocks.0" in key or "blocks.1" in key], "is not what this configuration makes it"),
    ("Delta-LoRA", flip("base_model.model.blocks.0.attention.q_proj.minilora_B_K"), "lora_B.weight is not what this configuration makes it"),
    ("Delta-LoRA", lambda t: t.pop("base_model.model.blocks.0.attention.q_proj.minilora_B_K"), "minilora_B_K is missing"),
    ("DoRA", lambda t: t.pop("base_model.model.blocks.0.attention.q_proj.lora_magnitude_vector"), "lora_magnitude_vector is missing"),
    ("DoRA", lambda t: t["base_model.model.blocks.0.attention.q_proj.lora_magnitude_vector"].fill_(float("nan")), "not finite"),
    ("AdaLoRA", lambda t: t.pop("base_model.model.blocks.0.attention.q_proj.lora_E"), "lora_E is missing"),
    ("PiSSA", lambda t: t.update({"base_model.model.blocks.0.attention.q_proj.lora_A.weight": torch.zeros(3, 16)}), r"has shape \(3, 16\).*need \(6, 16\)"),
])
def test_wrong_tensors_are_named(models, tmp_path, name, change, says):
    folder = ml.save_adapter(models[name], tmp_path)
    edit(folder, change)
    refused(folder, f"{WEIGHTS}: .*{says}")


@pytest.mark.parametrize("name, fields, says", [
    ("DoRA", {"use_dora": False}, "use_dora is False here and was True"),
    ("LoRA+", {"r": 4}, "r is 4 here and was 3"),
    ("PiSSA", {"r": 3}, "r is 3 here and was 6"),
    ("Delta-LoRA", {"lora_alpha": 5}, "lora_alpha is 5 here"),
    ("AdaLoRA", {"init_r": 5, "rank_pattern": None}, "init_r is 5 here and was 4"),
    ("AdaLoRA", {"target_r": 5}, "target_rank 5 is above initial_rank 4"),
    ("AdaLoRA", {"tinit": 9}, "warmup_steps 9"),
    ("AdaLoRA", {"rank_pattern": {"q_proj.lora_E": [True] * 4}}, "rank_pattern does not name the layers"),
    ("AdaLoRA", {"rank_pattern": 3}, "rank_pattern does not name the layers"),
    ("AdaLoRA", {"use_rslora": True}, "use_rslora = True changes what"),
    ("AdaLoRA", {"init_r": None}, "initial_rank must be a whole number"),
    ("VeRA", {"r": 0}, "rank must be a whole number"),
    ("VeRA", {"r": 21}, "r is 21 here and was 20"),
    ("VeRA", {"d_initial": "a"}, "could not convert"),
    ("VeRA", {"layers_pattern": "blocks"}, "layers_pattern = 'blocks' changes what"),
    ("LoRA", {"peft_type": "VERA"}, "lora_alpha = 5 changes what"),
    ("LoRA", {"peft_type": ["LORA"]}, "peft_type is"),
])
def test_an_edited_configuration_is_refused(models, tmp_path, name, fields, says):
    folder = ml.save_adapter(models[name], tmp_path)
    edit_config(folder, **fields)
    refused(folder, f"{CONFIG}: .*{says}")


@pytest.mark.parametrize("flags", [[True] * 3, [1, 0, 1, 1], "yes", [True, None, True, True]])
def test_a_broken_rank_pattern_is_named(models, tmp_path, flags):
    folder = ml.save_adapter(models["AdaLoRA"], tmp_path)
    patterns = json.loads((folder / CONFIG).read_text())["rank_pattern"]
    edit_config(folder, rank_pattern=patterns | {"blocks.0.attention.q_proj.lora_E": flags})
    refused(folder, "rank_pattern of blocks.0.attention.q_proj must be 4 times true or false")


@pytest.mark.parametrize("about, says", [
    ({"method": "LoRAX"}, "names no method that is known here"), ({"fields": {"rang": 3}}, "names no method that is known here"),
    ({"fields": {"rank": 0}}, "names no method that is known here"), ({"layers": ["head"]}, "target_modules is"),
    ({"method": "DoRA"}, "use_dora is False here and was True"), ({"fields": None}, "names no method"),
])
def test_edited_metadata_is_refused(models, tmp_path, about, says):
    folder = ml.save_adapter(models["LoRA"], tmp_path)
    edit(folder, lambda tensors: None, lambda said: said | about)
    refused(folder, says)


@pytest.mark.parametrize("about", [[], 3, {"method": "LoRA"}, "x"])
def test_metadata_that_says_nothing_is_refused(models, tmp_path, about):
    folder = ml.save_adapter(models["LoRA"], tmp_path)
    edit(folder, lambda tensors: None, lambda said: about)
    if about:
        refused(folder, f"{WEIGHTS}: damaged")


@pytest.mark.parametrize("state", [{}, None, {"own": 3}, {"own": ["nonsense"]}])
def test_a_lost_choice_of_lora_drop_is_refused(models, tmp_path, state):
    folder = ml.save_adapter(models["LoRA-drop"], tmp_path)
    edit(folder, lambda tensors: None, lambda said: said | {"state": state})
    refused(folder, "lacks the state of LoRADrop" if state != {"own": ["nonsense"]} else "is not what this configuration makes it")


def test_vera_without_its_digest_is_refused(models, tmp_path):
    folder = ml.save_adapter(models["VeRA"], tmp_path, projection=False)
    edit(folder, lambda tensors: None, lambda said: said | {"state": {}})
    refused(folder, "lacks the state of VeRA")


def test_a_randomized_pissa_of_peft_is_refused_with_a_way_out(models, tmp_path):
    folder = ml.save_adapter(models["LoRA"], tmp_path)
    edit_config(folder, init_lora_weights="pissa_niter_4")
    refused(folder, "pissa_niter_4.*path_initial_model_for_weight_conversion")
