"""A thousand damaged adapter folders: each is refused by a ValueError that names its file, or loads as exactly what it says.

A failed load leaves the model as it was: its modules, tensors, flags, mode, and the random state.
"""

import json
import random

import pytest
import safetensors.torch
import torch

import minilora as ml

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
METHODS = {
    "LoRA": ml.LoRA(rank=3, alpha=5, dropout=0.25), "rsLoRA": ml.LoRA(rank=3, alpha=5, rslora=True), "LoRA+": ml.LoRAPlus(rank=3), "LoRA-FA": ml.LoRAFA(rank=3),
    "VeRA": ml.VeRA(rank=6, seed=7), "Delta-LoRA": ml.DeltaLoRA(rank=3, start_step=1), "LoRA-drop": ml.LoRADrop(rank=3, threshold=0.4, warmup_steps=1),
    "AdaLoRA": ml.AdaLoRA(initial_rank=4, target_rank=2), "DoRA": ml.DoRA(rank=3), "PiSSA": ml.PiSSA(rank=3), "QLoRA": ml.QLoRA(rank=3), "LoftQ": ml.LoftQ(rank=3),
}
ODD = [None, True, False, 0, 1, -1, 3, 7, 10**9, 0.5, -2.5, 1e300, float("nan"), "", "x", "none", "all", "(", ".*", "pissa", [], [0], ["q_proj"], [None], {}, {"a": 1},
       {"q_proj": 2}, {"(": 2}, [[0, 1]], {"own": 3}]
FIELDS = ["rank_pattern", "alpha_pattern", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save", "bias", "init_lora_weights", "use_dora",
          "target_modules", "lora_bias", "fan_in_fan_out", "use_rslora", "save_projection", "peft_type", "beside", "others", "state", "base", "digest", "anything"]


def small():
    torch.manual_seed(0)
    return ml.TinyGPT(ml.GPTConfig(vocab_size=16, context=8, width=8, layers=2, heads=2))


def batches(step):
    ids = torch.randint(16, (2, 8), generator=torch.Generator().manual_seed(step))
    return ids[:, :-1], ids[:, 1:]


def whole_folders(out):
    """(configuration, weights), as bytes: each method; one with a head trained too, one with layers of two ranks."""
    models = []
    for method in METHODS.values():
        models.append(small())
        ml.finetune(models[-1], method, batches, 3, 0.05, targets=["q_proj", "down_proj"], progress=False)
    ml.finetune(models[0], METHODS["LoRA"], batches, 1, 0.05, progress=False)
    models[0].head.requires_grad_(True)
    models.append(small())
    for rank, block in enumerate(models[-1].blocks, start=2):
        ml.adapt(block, ml.LoRA(rank, alpha=rank + 0.5), ["up_proj"])
    return [tuple((ml.save_adapter(model, out / str(i)) / name).read_bytes() for name in (CONFIG, WEIGHTS)) for i, model in enumerate(models)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return whole_folders(tmp_path_factory.mktemp("whole"))


def parts(weights):
    """The header, and the data after it."""
    size = int.from_bytes(weights[:8], "little")
    return json.loads(weights[8:8 + size]), weights[8 + size:]


def joined(header, data):
    header = json.dumps(header).encode()
    return len(header).to_bytes(8, "little") + header + data


def odd_entry(dice, tree):
    """Somewhere in a tree of JSON a value is another, an entry is gone, or has another name."""
    node = tree
    while isinstance(node, dict | list) and node and dice.random() < 0.6:
        key = dice.choice(list(node)) if isinstance(node, dict) else dice.randrange(len(node))
        if not isinstance(node[key], dict | list) or not node[key]:
            break
        node = node[key]
    if isinstance(node, list):
        node.insert(dice.randrange(len(node) + 1), dice.choice(ODD))
    else:
        key = dice.choice([*node, *FIELDS] if node is tree else list(node) or FIELDS)
        change = dice.randrange(4)
        if change == 0:
            node.pop(key, None)
        elif change == 1 and key in node:
            node[dice.choice([key + "x", key.upper(), *FIELDS])] = node.pop(key)
        elif key != "iterations":                     # LoftQ would do as many
            node[key] = dice.choice(ODD)


def bytes_changed(dice, content):
    content = bytearray(content)
    for _ in range(dice.randint(1, 4)):
        content[dice.randrange(len(content))] = dice.randrange(256)
    return bytes(content)


def mutant(dice, folders):
    """One folder, damaged; in half of them, as PEFT would have written it, our metadata is gone first."""
    config, weights = dice.choice(folders)
    if dice.random() < 0.4:
        header, data = parts(weights)
        header["__metadata__"] = {"format": "pt"}
        weights = joined(header, data)
    kind = dice.randrange(9)
    if kind == 0:
        weights = bytes_changed(dice, weights)
    elif kind == 1:
        weights = weights[:dice.randrange(len(weights))] if dice.random() < 0.5 else weights + b"\0" * dice.randint(1, 9)
    elif kind == 2:
        config = bytes_changed(dice, config) if dice.random() < 0.7 else config[:dice.randrange(len(config))]
    elif kind == 3:
        fields = json.loads(config)
        for _ in range(dice.randint(1, 2)):
            odd_entry(dice, fields)
        config = json.dumps(fields).encode()
    elif kind == 4:
        header, data = parts(weights)
        about = json.loads(header["__metadata__"].get("minilora", "{}"))
        odd_entry(dice, about)
        header["__metadata__"]["minilora"] = json.dumps(about)
        weights = joined(header, data)
    elif kind == 5:
        header, data = parts(weights)
        odd_entry(dice, header)
        weights = joined(header, data)
    elif kind == 6:
        config, weights = config, dice.choice(folders)[1]
    else:
        tensors, metadata = safetensors.torch.load(weights), parts(weights)[0]["__metadata__"]
        key = dice.choice(sorted(tensors))                # a file is read in no fixed order
        tensor = tensors.pop(key)
        new = dice.choice([
            lambda: {key: tensor.reshape(tensor.shape[::-1])}, lambda: {key: tensor[..., :-1].contiguous()}, lambda: {key: tensor * float(dice.choice(["nan", "inf", "-inf"]))},
            lambda: {key: tensor.to(dice.choice([torch.float16, torch.bfloat16, torch.float64, torch.int32, torch.float8_e4m3fn, torch.complex64, torch.bool]))},
            lambda: {key: tensor + 1e-3}, lambda: {}, lambda: {key + "s": tensor}, lambda: {key: tensor, key.replace("0", "1", 1): tensor.clone()},
            lambda: {key: tensor[None]}, lambda: {key: tensor.new_zeros(0)}, lambda: {key: tensor.flatten()[0].clone()}])()
        weights = safetensors.torch.save(tensors | new, metadata)
    return config, weights


def tried(number, config, weights, folders, folder):
    """Load what is damaged on a small model; "refused" or "loaded", after looking that it was done well."""
    model = small()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modules, mode = list(model.modules()), [module.training for module in model.modules()]
    (folder / CONFIG).write_bytes(config)
    (folder / WEIGHTS).write_bytes(weights)
    state = torch.get_rng_state()
    try:
        ml.load_adapter(model, folder)
    except ValueError as error:
        assert torch.equal(torch.get_rng_state(), state), number
        assert str(folder) in str(error), (number, error)
        assert all(one is other for one, other in zip(model.modules(), modules, strict=True)), number
        assert all(parameter.requires_grad for parameter in model.parameters()) and [module.training for module in modules] == mode, number
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items()), number
        return "refused"
    assert torch.equal(torch.get_rng_state(), state), number
    said, done = safetensors.torch.load(weights), safetensors.torch.load_file(ml.save_adapter(model, folder / "again") / WEIGHTS)
    if json.loads(config).get("init_lora_weights") == "pissa":      # PEFT's own, beside an altered W: here the first half of a LoRA of twice the rank
        done = {key: tensor.chunk(2, dim=int("lora_B" in key))[0] for key, tensor in done.items()}
    assert said.keys() == done.keys(), number
    for key in done:                                      # VeRA draws its projections anew; those of a file in 16 bits are the same numbers, rounded
        rounded = key.startswith("base_model.vera_") and said[key].dtype in (torch.float16, torch.bfloat16)
        assert torch.equal(said[key], done[key].to(said[key].dtype)) if rounded else torch.equal(said[key].to(done[key].dtype), done[key]), (number, key)
    if b"minilora" in weights:                            # what is ours is as it was written, or refused
        assert (json.loads(config), weights) in [(json.loads(c), w) for c, w in folders] or parts(weights)[1] in [parts(w)[1] for _, w in folders], number
    return "loaded"


def test_a_thousand_damaged_folders(folders, tmp_path):
    dice = random.Random(0)
    came = [tried(number, *mutant(dice, folders), folders, tmp_path) for number in range(1000)]
    assert came.count("refused") > 500 and came.count("loaded") > 50
