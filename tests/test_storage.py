"""Adapters on disk: what is written, that it comes back bit for bit, and that nothing broken or foreign gets in."""

import json
import os
import pickle
import subprocess
import sys

import pytest
import safetensors.torch
import torch

import minilora as ml
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
    torch.save({"identity": {}, "state": Bomb(tmp_path / "exploded")}, tmp_path / "c.pt")
    with pytest.raises(ValueError, match="c.pt: not a whole checkpoint"):
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


def test_a_16_bit_base_keeps_float32_factors_on_disk(tmp_path, wake, ids):
    model = wake(ml.adapt(small().bfloat16(), METHOD)).eval()
    loaded = ml.load_adapter(small().bfloat16(), ml.save_adapter(model, tmp_path)).eval()
    assert torch.equal(loaded(ids), model(ids))
    assert {t.dtype for t in safetensors.torch.load_file(tmp_path / WEIGHTS).values()} == {torch.float32}
