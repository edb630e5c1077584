"""load_model against transformers' own from_pretrained, bit for bit; in four bits against ml.quantize; and what each bad folder is told."""

import json
import os
import re
import shutil
import subprocess
import sys
import warnings

import pytest
import safetensors.torch
import torch

import minilora as ml
from minilora.storage import base_fingerprint

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

transformers.utils.logging.disable_progress_bar()

from minilora.scale.loading import load_model, load_tokenizer
from minilora.scale.saving import save_folder

SMALL = dict(vocab_size=65, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=3, num_key_value_heads=3,
             max_position_embeddings=64)
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16}
KINDS = {
    "llama": ("LlamaForCausalLM", SMALL),
    "yarn": ("LlamaForCausalLM", SMALL | {"rope_parameters": YARN}),
    "qwen2": ("Qwen2ForCausalLM", SMALL | {"tie_word_embeddings": True}),               # biases on q, k, v
    "qwen3": ("Qwen3ForCausalLM", SMALL | {"tie_word_embeddings": True, "head_dim": 16}),
    "gpt2": ("GPT2LMHeadModel", dict(vocab_size=65, n_positions=64, n_embd=24, n_layer=2, n_head=3)),
    "mixtral": ("MixtralForCausalLM", SMALL | {"num_local_experts": 4}),
    "mamba": ("MambaForCausalLM", dict(vocab_size=65, hidden_size=24, num_hidden_layers=2, state_size=4)),      # draws at random while it is completed
}
IDS = torch.arange(32).view(2, 16)


def saved(folder, kind="llama", dtype=torch.float32, shard="5GB"):
    """A checkpoint as transformers writes it, with no parameter left at 0 or 1."""
    torch.manual_seed(0)
    cls, sizes = KINDS[kind]
    model = getattr(transformers, cls)(getattr(transformers, cls).config_class(**sizes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    model.generation_config.temperature, model.generation_config.do_sample = 0.6, True
    model.to(dtype).save_pretrained(folder, max_shard_size=shard)
    return folder


def quietly(call, *args, **named):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return call(*args, **named)


def reference(folder, **named):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, **named)


def assert_same(ours, theirs):
    """Logits, every tensor, every buffer (those of no file, too), and the configurations."""
    assert type(ours) is type(theirs) and not ours.training
    for mine, other in ((ours.state_dict(), theirs.state_dict()), (dict(ours.named_buffers()), dict(theirs.named_buffers()))):
        assert mine.keys() == other.keys()
        assert all(torch.equal(mine[name], other[name]) and mine[name].dtype == other[name].dtype for name in mine)
    assert {name for name, _ in ours.named_parameters()} == {name for name, _ in theirs.named_parameters()}       # tied ones once
    assert torch.equal(ours(IDS).logits, theirs(IDS).logits)


CASES = [(kind, dtype, shard) for kind in ("llama", "qwen2", "gpt2", "mixtral") for dtype in (torch.float32, torch.bfloat16) for shard in ("5GB", "12KB")]
CASES += [(kind, torch.bfloat16, "5GB") for kind in ("yarn", "qwen3", "mamba")]


@pytest.mark.parametrize("kind, dtype, shard", CASES, ids=[f"{kind}-{str(dtype)[6:]}-{'whole' if shard == '5GB' else 'sharded'}" for kind, dtype, shard in CASES])
def test_a_loaded_model_is_what_from_pretrained_makes(tmp_path, kind, dtype, shard):
    saved(tmp_path, kind, dtype, shard)
    assert (tmp_path / "model.safetensors.index.json").exists() == (shard == "12KB")
    before = torch.get_rng_state()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        ours = load_model(tmp_path)
    assert torch.equal(before, torch.get_rng_state())
    converts = f"{tmp_path}: transformers converts this checkpoint's tensors as it loads them"
    assert [str(warning.message) for warning in said] == ([converts] if kind == "mixtral" else [])
    theirs = reference(tmp_path)
    assert_same(ours, theirs)
    assert next(ours.parameters()).dtype == dtype and ours.config.to_dict() == theirs.config.to_dict()
    assert ours.generation_config.to_dict() == theirs.generation_config.to_dict() and ours.generation_config.temperature == 0.6
    assert all(parameter.requires_grad for parameter in ours.parameters())


def rewritten(folder, change):
    """The checkpoint's one file, with `change` made to its dict of tensors."""
    file = folder / "model.safetensors"
    tensors = safetensors.torch.load_file(file)
    safetensors.torch.save_file(change(tensors) or tensors, file, {"format": "pt"})
    return folder


def without_prefix(tensors):
    """As the hub has GPT-2: no "transformer." before the names, and the causal mask of each layer among the tensors."""
    masks = {f"h.{i}.attn.bias": torch.ones(1, 1, 64, 64) for i in range(2)}
    return {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()} | masks


def head_only(tensors):
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")


def old_rotary(tensors):
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.full((4,), 7.0)


@pytest.mark.parametrize("four_bits", [False, True])
@pytest.mark.parametrize("kind, change", [("gpt2", without_prefix), ("qwen2", head_only), ("llama", old_rotary)])
def test_names_that_are_not_the_models(tmp_path, kind, change, four_bits):
    rewritten(saved(tmp_path, kind), change)
    ours, theirs = load_model(tmp_path, four_bits), reference(tmp_path)
    assert_same(ours, ml.quantize(theirs) if four_bits else theirs)


@pytest.mark.parametrize("kind", ["llama", "mixtral"])
def test_the_dtype_is_what_was_asked_for_else_the_configurations_else_the_first_tensors(tmp_path, kind):
    saved(tmp_path, kind, torch.bfloat16)
    assert_same(quietly(load_model, tmp_path, dtype=torch.float32), reference(tmp_path, dtype=torch.float32))
    config = json.loads((tmp_path / "config.json").read_text())
    for said, found in (("float16", torch.float16), (None, torch.bfloat16)):
        (tmp_path / "config.json").write_text(json.dumps(config | {"dtype": said}))
        ours = quietly(load_model, tmp_path)
        assert_same(ours, reference(tmp_path))
        assert next(ours.parameters()).dtype == found


def test_layers_that_transformers_keeps_in_32_bits_stay_so(tmp_path, monkeypatch):
    monkeypatch.setattr(transformers.LlamaForCausalLM, "_keep_in_fp32_modules_strict", ["norm"])
    saved(tmp_path, dtype=torch.bfloat16)
    with pytest.warns(UserWarning, match="transformers converts"):
        ours = load_model(tmp_path)
    theirs = reference(tmp_path).state_dict()
    assert theirs["model.norm.weight"].dtype == torch.float32 and theirs["lm_head.weight"].dtype == torch.bfloat16
    assert all(tensor.dtype == theirs[name].dtype and torch.equal(tensor, theirs[name]) for name, tensor in ours.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2", "mixtral"])
def test_in_four_bits_it_is_what_quantize_makes_of_the_dense_model(tmp_path, kind, dtype):
    saved(tmp_path, kind, dtype, "12KB")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        ours = load_model(tmp_path, four_bits=True)
    theirs = quietly(ml.quantize, reference(tmp_path))
    assert_same(ours, theirs)
    assert base_fingerprint(ours) == base_fingerprint(theirs)
    in_four_bits = [name for name, layer in ours.named_modules() if isinstance(layer, ml.NF4Linear)]
    assert in_four_bits == [name for name, layer in theirs.named_modules() if isinstance(layer, ml.NF4Linear)]
    assert len(in_four_bits) == {"llama": 14, "qwen2": 14, "gpt2": 8, "mixtral": 8}[kind]
    assert all(getattr(layer, "stands_for_conv1d", False) == (kind == "gpt2") for layer in ours.modules() if isinstance(layer, ml.NF4Linear))
    assert any("exists densely" in str(warning.message) for warning in said) == (kind == "mixtral")


MEMORY = '''
import gc, sys, torch
import minilora as ml

assert not [name for name in sys.modules if name.startswith(("transformers", "minilora.scale"))]      # a learner needs neither

from minilora.scale.loading import load_model
from transformers import LlamaConfig, LlamaForCausalLM

torch.set_num_threads(1)


def save(name, **sizes):
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(vocab_size=64, num_attention_heads=8, num_key_value_heads=8, **sizes))
    model = model.to_empty(device="cpu").bfloat16()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    model.save_pretrained(f"{sys.argv[1]}/{name}", max_shard_size="40MB")


def status(field):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(field))


def grown(call):
    """By how much the process was larger at its largest moment, and what the call gave."""
    gc.collect()
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")                                   # the peak begins here
    before = status("VmRSS")
    model = call()
    return status("VmHWM") - before, model


save("small", hidden_size=64, intermediate_size=64, num_hidden_layers=1)
save("large", hidden_size=768, intermediate_size=3072, num_hidden_layers=3)
ml.quantize(load_model(f"{sys.argv[1]}/small"))           # what is imported and kept at the first call is none of the model's
load_model(f"{sys.argv[1]}/small", four_bits=True)
layer_by_layer, model = grown(lambda: load_model(f"{sys.argv[1]}/large", four_bits=True))
packed = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
del model
dense_first, _ = grown(lambda: ml.quantize(load_model(f"{sys.argv[1]}/large")))
print(layer_by_layer, dense_first, packed)
'''


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="the peak of a process is read as Linux tells it")
def test_the_dense_base_never_exists_as_a_whole(tmp_path, without_malloc):
    """Counted is all that the process has resident at its largest moment (VmHWM: heap, torch's tensors, pages of mapped files), less what it had
    before the call; freed tensors go back to the system at once (MALLOC_MMAP_THRESHOLD_), so that the peak is of what is alive. Measured: 1.1
    to 1.3 dense layers of 4.7 MB above the packed model of 15 MB, and one of them is the layer that is just read; loaded densely first, 12."""
    run = subprocess.run([sys.executable, "-W", "ignore", "-c", MEMORY, str(tmp_path)], capture_output=True, text=True,
                         env=without_malloc | {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"})
    assert run.returncode == 0, run.stderr
    layer_by_layer, dense_first, packed = map(int, run.stdout.split())
    dense_layer = 768 * 3072 * 2
    assert 0.9 * packed < layer_by_layer <= packed + 2 * dense_layer
    assert dense_first > packed + 8 * dense_layer


def test_what_is_loaded_can_be_trained_and_its_adapter_fits_the_model_from_another_place(tmp_path):
    """Four bits, LoRA, two steps; the folder's name is on record, and the same checkpoint elsewhere is the same base."""
    saved(tmp_path / "here", "qwen2")
    shutil.copytree(tmp_path / "here", tmp_path / "there")
    model = load_model(tmp_path / "here", four_bits=True)
    ml.finetune(model, ml.QLoRA(2, dropout=0.0), lambda step: (IDS, IDS), 2, 0.01, progress=False)
    ml.save_adapter(model, tmp_path / "adapter")
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"] == str(tmp_path / "here")
    other = ml.load_adapter(load_model(tmp_path / "there", four_bits=True), tmp_path / "adapter")
    assert torch.equal(model.eval()(IDS).logits, other(IDS).logits)
    dense = ml.load_adapter(reference(tmp_path / "there"), tmp_path / "adapter")          # QLoRA puts all that it sits on in four bits
    assert torch.equal(dense(IDS).logits, other(IDS).logits)


def bpe(folder, **special):
    """A byte-level tokenizer, as the hub's tokenizer.json."""
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer, made.decoder = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False), tokenizers.decoders.ByteLevel()
    made.train_from_iterator(["the quick brown fox"], tokenizers.trainers.BpeTrainer(
        vocab_size=270, initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(), special_tokens=["<s>"], show_progress=False))
    transformers.PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", **special).save_pretrained(folder)
    return folder


def test_a_tokenizer_is_transformers_own(tmp_path):
    bpe(saved(tmp_path))
    ours, theirs = load_tokenizer(tmp_path), transformers.AutoTokenizer.from_pretrained(tmp_path)
    ids = ours("the quick 狐狸").input_ids
    assert ids == theirs("the quick 狐狸").input_ids and ours.decode(ids) == "the quick 狐狸" and ours.bos_token == "<s>"


def config(folder, **fields):
    said = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(said | fields))


def drop(*names):
    return lambda folder: [(folder / name).unlink() for name in names]


def tensors(change):
    return lambda folder: rewritten(folder, change) and None


def write(name, content):
    return lambda folder: (folder / name).write_text(content)


def pickled(folder):
    torch.save({}, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def cut(folder):
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:-100])


def garbled(folder):
    (folder / "model.safetensors").write_bytes(b"\xff" * 500)


def not_finite(t):
    t["model.layers.1.mlp.up_proj.weight"][3, 4] = float("inf")


def narrower(t):
    t["model.layers.1.mlp.up_proj.weight"] = t["model.layers.1.mlp.up_proj.weight"][:, :-1].contiguous()


def in_eight_bits(t):
    t["model.layers.1.mlp.up_proj.weight"] = t["model.layers.1.mlp.up_proj.weight"].to(torch.int8)


BAD = {
    "no weights": (drop("model.safetensors"), r"holds no weights: neither model.safetensors nor model.safetensors.index.json"),
    "a pickle": (pickled, r"holds pytorch_model.bin, a pickle, which could run code, and no model.safetensors"),
    "a tensor missing": (tensors(lambda t: t.pop("model.norm.weight") is None), r"the tensor model.norm.weight is missing; a LlamaForCausalLM"),
    "the head missing": (tensors(lambda t: t.pop("lm_head.weight") is None), r"the tensor lm_head.weight is missing"),
    "two tensors too many": (tensors(lambda t: t.update(score=torch.ones(2, 2), zoo=torch.ones(1))), r"the tensor score is unexpected \(and 1 more\)"),
    "a wrong shape": (tensors(narrower), r"model.safetensors: model.layers.1.mlp.up_proj.weight has shape \(40, 23\); its config.json needs \(40, 24\)"),
    "stored as int8": (tensors(in_eight_bits), r"up_proj.weight is stored as I8, quantized by another library"),
    "cut": (cut, r"model.safetensors: damaged or cut short"),
    "garbled": (garbled, r"model.safetensors: damaged or cut short"),
    "no config": (drop("config.json"), r"config.json: no such file; a model's folder holds"),
    "a broken config": (write("config.json", "{"), r"config.json: not whole JSON"),
    "a list as config": (write("config.json", "[]"), r"config.json: holds a list, not an object"),
    "an unknown architecture": (lambda folder: config(folder, model_type="llama9"), r"the architecture 'llama9' is not one that this transformers knows"),
    "no architecture": (write("config.json", '{"hidden_size": 3}'), r"config.json: it names no model_type"),
    "code from the hub": (lambda folder: config(folder, model_type="mine", auto_map={"AutoConfig": "evil.Config"}), r"the architecture 'mine' is not one"),
    "a width of words": (lambda folder: config(folder, hidden_size="wide"), r"config.json: its fields make no llama \(.*hidden_size"),
    "sizes that do not fit": (lambda folder: config(folder, num_hidden_layers=-3, layer_types=["x"]), r"config.json: "),
    "an encoder-decoder": (write("config.json", '{"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]}'),
                           "T5ForConditionalGeneration is no causal language model"),
    "an unnamed encoder-decoder": (write("config.json", '{"model_type": "bart"}'), "bart is no causal language model"),
    "a classifier": (lambda folder: config(folder, architectures=["LlamaForSequenceClassification"]),
                     "LlamaForSequenceClassification is no causal language model"),
    "a picture model": (write("config.json", '{"model_type": "vit"}'), "vit is no causal language model"),
    "quantized already": (lambda folder: config(folder, quantization_config={"quant_method": "gptq", "bits": 4}), "quantized already, by another library"),
    "a broken generation_config": (write("generation_config.json", "{"), r"generation_config.json: cannot be read"),
}


def refused(call, says):
    """One line, a ValueError."""
    with pytest.raises(ValueError) as error:
        quietly(call)
    message = str(error.value)
    assert re.search(says, message) and "\n" not in message and len(message) < 500, message


@pytest.mark.parametrize("case", BAD)
def test_a_bad_folder_is_told_in_one_line(tmp_path, case):
    spoil, says = BAD[case]
    spoil(saved(tmp_path))
    refused(lambda: load_model(tmp_path), says)


def test_a_weight_that_is_not_finite_is_named_where_it_is_put_in_four_bits(tmp_path):
    rewritten(saved(tmp_path), not_finite)
    refused(lambda: load_model(tmp_path, four_bits=True), r"model.safetensors: model.layers.1.mlp.up_proj.weight: the value at \(3, 4\) is inf")


@pytest.mark.parametrize("spoil, says", [
    (lambda index, first, second: first.unlink(), r"model-00001-of-\d+.safetensors: no such file, and model.safetensors.index.json names it: a shard"),
    (lambda index, first, second: shutil.copy(second, first), r"is missing, and model.safetensors.index.json says that it is there"),
    (lambda index, first, second: index.write_text("{}"), "its weight_map does not say which file"),
    (lambda index, first, second: index.write_text('{"weight_map": {"a": "../b.safetensors"}}'), "its weight_map does not say which file"),
])
def test_a_bad_shard_is_told_in_one_line(tmp_path, spoil, says):
    saved(tmp_path, shard="12KB")
    spoil(tmp_path / "model.safetensors.index.json", *sorted(tmp_path.glob("model-*"))[:2])
    refused(lambda: load_model(tmp_path), says)


def test_of_a_checkpoint_that_transformers_converts_too(tmp_path):
    rewritten(saved(tmp_path, "mixtral"), lambda t: t.pop("model.norm.weight") is None)
    refused(lambda: load_model(tmp_path), "the tensor model.norm.weight is missing")
    rewritten(saved(tmp_path, "mixtral"), lambda t: t.update({"model.norm.bias": torch.ones(24)}))
    refused(lambda: load_model(tmp_path), "the tensor model.norm.bias is unexpected")


@pytest.mark.parametrize("spoil, says", [
    (lambda folder: None, r"holds no tokenizer \(tokenizer.json\)"),
    (lambda folder: (folder / "tokenizer.json").write_text("{"), "its tokenizer cannot be read"),
    (lambda folder: (bpe(folder), (folder / "tokenizer.json").write_text("{}")), "its tokenizer cannot be read"),
])
def test_a_bad_tokenizer_is_told_in_one_line(tmp_path, spoil, says):
    spoil(saved(tmp_path))
    refused(lambda: load_tokenizer(tmp_path), says)


def test_a_place_that_is_no_folder(tmp_path):
    (tmp_path / "file").touch()
    for load in (load_model, load_tokenizer):
        refused(lambda: load(tmp_path / "file"), "is a file; a model is a folder")
        refused(lambda: load(tmp_path / "nowhere"), "nowhere: no such folder")
        refused(lambda: load("./nowhere/at/all"), "./nowhere/at/all: no such folder")


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The hub's own cache, and no network."""
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


def test_a_name_on_the_hub_without_network(hub):
    for load in (load_model, load_tokenizer):
        refused(lambda: load("somebody/some-model"), r"some-model: no such folder here, and the hub did not give it \((LocalEntryNotFound|OfflineMode)")
        refused(lambda: load("no such name!"), "no such name!: no such folder here, and the hub did not give it")


def test_a_name_that_the_hubs_cache_holds(hub):
    """Downloaded before: the library finds it without network. The name is what goes on record."""
    there = hub / "models--somebody--some-model"
    bpe(saved(there / "snapshots" / "abc", "qwen2", shard="12KB"))
    (there / "refs").mkdir()
    (there / "refs" / "main").write_text("abc")
    model = load_model("somebody/some-model")
    assert_same(model, reference(there / "snapshots" / "abc"))
    assert model.name_or_path == model.config.name_or_path == "somebody/some-model" and load_tokenizer("somebody/some-model").bos_token == "<s>"


def test_only_what_is_needed_is_asked_of_the_hub(tmp_path, monkeypatch):
    """Besides the small files, the shards that the index names: not the same weights once more in another form."""
    import huggingface_hub

    asked = []
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, allow_patterns: asked.append(allow_patterns) or str(tmp_path))
    saved(tmp_path, shard="12KB")
    load_model("somebody/sharded")
    assert {*asked[1]} - {*asked[0]} == {file.name for file in tmp_path.glob("model-*.safetensors")}
    assert not any("safetensors" in pattern for pattern in asked[0])
    (tmp_path / "model.safetensors.index.json").unlink()
    saved(tmp_path)
    load_model("somebody/whole")
    assert set(asked[3]) - set(asked[2]) == {"model.safetensors"}
    load_tokenizer(bpe(tmp_path)) and load_tokenizer("somebody/whole")
    assert len(asked) == 5 and asked[4] == asked[2]


def test_without_transformers_the_message_names_the_command(tmp_path, monkeypatch):
    saved(tmp_path)
    monkeypatch.setitem(sys.modules, "transformers", None)
    for load in (load_model, load_tokenizer):
        refused(lambda: load(tmp_path), r"transformers, which is not installed: pip install 'transformers>=5' tokenizers")


@pytest.mark.parametrize("four_bits", [False, True])
@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2", "mixtral"])
def test_a_folder_that_is_written_is_a_checkpoint_of_transformers(tmp_path, kind, four_bits):
    """With some layers merged, and of the others those in four bits written as they compute."""
    bpe(saved(tmp_path / "base", kind))
    model = quietly(load_model, tmp_path / "base", four_bits)
    quietly(ml.adapt, model, ml.LoRA(2), ["c_attn"] if kind == "gpt2" else ["q_proj", "v_proj"])
    for _, layer in ml.adapters(model):
        torch.nn.init.normal_(layer.B, std=0.1)
    with pytest.raises(ValueError, match="this model has adapters"):
        save_folder(model, load_tokenizer(tmp_path / "base"), tmp_path / "out")
    said = ml.merge(model)(IDS).logits
    save_folder(model, load_tokenizer(tmp_path / "base"), tmp_path / "out")
    theirs = reference(tmp_path / "out")
    assert torch.allclose(theirs(IDS).logits, said, rtol=0, atol=1e-5 if four_bits else 0)       # a 4-bit layer's product is another kernel's
    assert_same(quietly(load_model, tmp_path / "out"), theirs)
    names = [{*safetensors.torch.load_file(tmp_path / place / "model.safetensors")} for place in ("base", "out")]
    assert names[0] == names[1]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["base", "out"] and load_tokenizer(tmp_path / "out").bos_token == "<s>"


def test_a_folder_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    model, tokenizer = load_model(saved(tmp_path / "base", "llama")), load_tokenizer(bpe(tmp_path / "base"))
    save_folder(model, tokenizer, tmp_path / "out")
    before = {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}
    model.lm_head.weight.data.add_(1.0)

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    replace, calls = os.replace, []

    def second(*names):
        calls.append(names)
        return full() if len(calls) == 2 else replace(*names)

    def fails(kind):
        def fail(*_, **__):
            raise kind("Error while serializing: I/O error: No space left on device (os error 28)")
        return fail

    for where, name, fault in ((tokenizer, "save_pretrained", full), (os, "replace", second), (tokenizer, "save_pretrained", fails(Exception)),
                               (type(model), "save_pretrained", fails(safetensors.SafetensorError))):
        with monkeypatch.context() as patch:
            patch.setattr(where, name, fault)
            with pytest.raises(OSError, match="No space left"):
                save_folder(model, tokenizer, tmp_path / "out")
        assert sorted(file.name for file in tmp_path.iterdir()) == ["base", "out"]
        assert before == {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}
    save_folder(model, tokenizer, tmp_path / "out")
    assert torch.equal(load_model(tmp_path / "out").lm_head.weight, model.lm_head.weight)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["base", "out"]
    for other in ("thesis.docx", "photos"):
        (tmp_path / "out" / other).mkdir()
        with pytest.raises(ValueError, match=f"holds other things than a model \\({other}\\)"):
            save_folder(model, tokenizer, tmp_path / "out")
        (tmp_path / "out" / other).rmdir()
    (tmp_path / "out" / "config.json").unlink()
    with pytest.raises(ValueError, match="holds other things than a model"):
        save_folder(model, tokenizer, tmp_path / "out")
