"""The doctor on transformers' models and PEFT's adapters: a Llama, a GPT-2 (whose layers are turned), a BERT with a head, a Mixtral; in memory, on disk.

What PEFT and transformers do is done by them here: their training mode, their checkpointing, their merge, their folders.
"""

import copy
import json
import subprocess
import sys
import warnings

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import minilora as ml
from minilora import storage
from minilora.__main__ import main
from minilora.scale.doctor import diagnose, examine
from minilora.scale.doctor.weights import Weights, fingerprints

pytestmark = pytest.mark.filterwarnings("ignore")
transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()


def llama(seed=0, **fields):
    torch.manual_seed(seed)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**dict(
        vocab_size=64, hidden_size=24, intermediate_size=40, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2) | fields))


def gpt2():
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=64, n_embd=24, n_layer=8, n_head=2, n_positions=32, bos_token_id=0, eos_token_id=0)
    return transformers.GPT2LMHeadModel(config)


def bert():
    torch.manual_seed(0)
    return transformers.BertForSequenceClassification(transformers.BertConfig(
        vocab_size=64, hidden_size=24, num_hidden_layers=4, num_attention_heads=3, intermediate_size=40))


IDS = torch.randint(64, (2, 12), generator=torch.Generator().manual_seed(1))


def batch(model):
    return {"input_ids": IDS, "labels": torch.tensor([0, 1]) if hasattr(model.get_base_model(), "classifier") else IDS}


def train(model, optimizer, steps=3):
    model.train()
    for _ in range(steps):
        model(**batch(model)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def adam(model, lr=1e-2):
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr)


def loud(model, size=0.2):
    """Every factor random, B too."""
    dice = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if any(part in name for part in ("lora_", "vera_lambda", ".A", ".B")):
                p.copy_(size * torch.randn(p.shape, generator=dice))
    return model


def names(report):
    return [finding.name for finding in report]


def only(report, name):
    assert names(report) == [name], str(report)
    finding, = report
    assert str(finding) == f"{finding.name:<17} {finding.evidence}. {finding.fix}" and any(digit in finding.evidence for digit in "0123456789")
    return finding


HEALTHY = {
    "LoRA": (llama, peft.LoraConfig(r=4, lora_alpha=8)),
    "all-linear DoRA": (llama, peft.LoraConfig(r=4, use_dora=True, target_modules="all-linear")),
    "PiSSA": (llama, peft.LoraConfig(r=4, init_lora_weights="pissa")),
    "VeRA": (llama, peft.VeraConfig(r=8, target_modules=["q_proj", "o_proj"])),
    "AdaLoRA": (llama, peft.AdaLoraConfig(init_r=4, target_r=2, total_step=20, target_modules=["q_proj", "v_proj"])),
    "GPT-2": (gpt2, peft.LoraConfig(r=4, fan_in_fan_out=True)),
    "a classifier": (bert, peft.LoraConfig(r=4, task_type="SEQ_CLS")),
    "a head": (llama, peft.LoraConfig(r=4, modules_to_save=["lm_head"], target_modules=["q_proj"])),
    "biases": (gpt2, peft.LoraConfig(r=4, bias="all", fan_in_fan_out=True)),
    "an embedding": (llama, peft.LoraConfig(r=4, target_modules=["q_proj", "embed_tokens"])),
    "two blocks": (llama, peft.LoraConfig(r=4, target_modules=["q_proj"], layers_to_transform=[2, 3])),
    "tied": (lambda: llama(tie_word_embeddings=True), peft.LoraConfig(r=4)),
    "IA3": (llama, peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"])),
    "LoHa": (llama, peft.LoHaConfig(r=4, target_modules=["q_proj"])),
}


@pytest.mark.parametrize("name", HEALTHY)
def test_nothing_is_found_in_what_peft_makes(name, tmp_path):
    """Fresh, in training, trained, switched off, saved, loaded, merged in memory and on disk."""
    build, config = HEALTHY[name]
    original, model = build(), peft.get_peft_model(build(), copy.deepcopy(config))
    original.save_pretrained(tmp_path / "base")
    optimizer = adam(model)
    reports = [diagnose(model, optimizer, original, batch(model))]
    train(model, optimizer)
    reports += [diagnose(model, optimizer, original, batch(model))]
    model.save_pretrained(tmp_path / "a")
    reports += [*examine([tmp_path / "a"]), *examine([tmp_path / "a"], tmp_path / "base")]
    loaded = peft.PeftModel.from_pretrained(build(), tmp_path / "a")
    reports += [diagnose(loaded, base=original)]
    if name != "IA3":
        loaded.merge_adapter()                                                    # which PEFT takes back when it likes
        reports += [diagnose(loaded, base=original)]
        loaded.unmerge_adapter()
    merged = model.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    reports += [diagnose(merged, base=original), *examine([tmp_path / "a", tmp_path / "merged"], tmp_path / "base")]
    assert not any(reports), [str(report) for report in reports if report]


@pytest.mark.parametrize("method", [ml.LoRA(4), ml.PiSSA(4), ml.QLoRA(4)], ids=lambda method: type(method).__name__)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_is_found_in_ours_on_a_llama(method, dtype, tmp_path):
    original = llama().to(dtype)
    original.save_pretrained(tmp_path / "base")
    model = ml.adapt(copy.deepcopy(original), method)
    optimizer = torch.optim.AdamW(method.parameter_groups(model, 1e-2))
    reports = [diagnose(model, optimizer, original, {"input_ids": IDS})]
    for step in range(3):
        ml.next_byte_loss(model, {"input_ids": IDS}).backward()
        method.before_step(model, step)
        optimizer.step()
        optimizer.zero_grad()
    ml.save_adapter(model, tmp_path / "a")
    reports += [diagnose(model, optimizer, original, {"input_ids": IDS}), *examine([tmp_path / "a"], tmp_path / "base")]
    assert not any(reports), [str(report) for report in reports if report]
    assert reports[-1].notes[0] == "28 of 28 of the blocks' matrices have an adapter"


@pytest.mark.parametrize("build, whose", [(llama, "ours"), (llama, "PEFT's"), (gpt2, "PEFT's")])
def test_reentrant_checkpointing(build, whose):
    """The whole output has no gradient then, as no input of a block has one: unless somebody gives the embeddings' output one, as
    transformers has done by itself since 5.23."""
    def model(use_reentrant, helped):
        plain = build()
        plain = loud(ml.adapt(plain, ml.LoRA(2)) if whose == "ours" else peft.get_peft_model(plain, peft.LoraConfig(r=2)))
        inner = plain if whose == "ours" else plain.base_model.model
        inner.activation_checkpointing_enable({"use_reentrant": use_reentrant})
        if not helped:
            inner.disable_input_require_grads()
        return plain

    finding = only(diagnose(model(True, False), batch={"input_ids": IDS}), "no gradient")
    assert finding.fix == "Checkpointing: use_reentrant=False, or enable_input_require_grads()"
    assert not diagnose(model(True, True), batch={"input_ids": IDS}) and not diagnose(model(False, False), batch={"input_ids": IDS})
    trained = model(True, False)
    head = (trained if whose == "ours" else trained.base_model.model).lm_head.weight
    if build is llama and whose == "ours":                                                         # there a backward reaches the head alone
        head.requires_grad_(True)
        ml.next_byte_loss(trained.train(), {"input_ids": IDS}).backward()
        assert only(diagnose(trained), "no gradient").evidence.startswith(".grad is None in all 28 adapters")


def test_a_head_that_peft_does_not_save(tmp_path):
    model = peft.get_peft_model(llama(), peft.LoraConfig(r=2))
    assert not diagnose(model)
    model.base_model.model.lm_head.weight.requires_grad_(True)
    evidence = only(diagnose(model), "head not saved").evidence
    assert evidence == "1 trained tensors are in no modules_to_save (base_model.model.lm_head.weight, 1,536 numbers)"
    model.save_pretrained(tmp_path)
    assert not any("lm_head" in key for key in load_file(tmp_path / storage.WEIGHTS))              # PEFT really leaves it out
    ours = ml.adapt(llama(), ml.LoRA(2))
    ours.lm_head.requires_grad_(True)
    assert not diagnose(ours)                                                                      # and save_adapter does not


@pytest.mark.parametrize("lost, fields", [(True, {}), (True, {"modules_to_save": None}), (False, {})])
def test_a_head_that_is_not_in_the_folder(lost, fields, tmp_path):
    peft.get_peft_model(bert(), peft.LoraConfig(r=2, task_type="SEQ_CLS")).save_pretrained(tmp_path)
    loud_folder(tmp_path, lambda key: not (lost and "classifier" in key))
    config = json.loads((tmp_path / storage.CONFIG).read_text())
    assert config["modules_to_save"] == ["classifier", "score"]                                    # of which a BERT has one
    (tmp_path / storage.CONFIG).write_text(json.dumps(config | fields))
    report, = examine([tmp_path])
    if lost:
        assert ("SEQ_CLS" if fields else "classifier, score") in only(report, "head not saved").evidence
    else:
        assert not report


def loud_folder(folder, keep=lambda key: True, rename=lambda key: key, size=0.2):
    """The folder's tensors at random, some left out or under other names."""
    dice = torch.Generator().manual_seed(3)
    tensors = load_file(folder / storage.WEIGHTS)
    loud = {rename(key): size * torch.randn(tensor.shape, generator=dice) for key, tensor in tensors.items() if keep(key)}
    save_file(loud, folder / storage.WEIGHTS, {"format": "pt"})
    return folder


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("how", [{"target_modules": ["lm_head"]}, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}],
                         ids=["adapted", "saved whole"])
def test_a_tied_head(tied, how, tmp_path):
    base = llama(tie_word_embeddings=tied)
    base.save_pretrained(tmp_path / "base")
    model = loud(peft.get_peft_model(base, peft.LoraConfig(r=2, **how)))
    model.save_pretrained(tmp_path / "a")
    for report in diagnose(model), examine([tmp_path / "a"], tmp_path / "base")[0]:
        if tied:
            only(report, "tied weights")
        else:
            assert not report


def test_optimizer_and_silence_in_peft():
    plain = llama()
    optimizer = adam(plain, 0.0)
    model = peft.get_peft_model(plain, peft.LoraConfig(r=2))
    assert only(diagnose(model, optimizer), "optimizer").evidence.startswith("it holds 0 of 16 trained tensors")
    optimizer = adam(model, 0.0)
    train(model, optimizer, 2)
    assert only(diagnose(model, optimizer), "B is zero").evidence.startswith("all 8 layers")
    for p in model.parameters():
        p.requires_grad_(False)
    assert names(diagnose(model)) == ["nothing trains", "B is zero"]
    optimizer = adam(peft.get_peft_model(llama(), peft.LoraConfig(r=2)))
    with torch.no_grad():
        model.base_model.model.model.layers[0].self_attn.q_proj.weight.requires_grad_(True)
    assert "W is trained" in names(diagnose(model))


def test_scale_of_peft(tmp_path):
    """alpha_pattern too; and the default, alpha = r = 8, is none."""
    for fields, said in (({}, ""), ({"lora_alpha": 80}, "s = 10 in all 8 layers"), ({"alpha_pattern": {"v_proj": 800}}, "s = 100 in 4 of 8 layers"),
                         ({"lora_alpha": 128, "r": 16, "use_rslora": True}, "s = 32 in all 8 layers")):
        model = loud(peft.get_peft_model(llama(), peft.LoraConfig(**fields)))
        model.save_pretrained(tmp_path)
        for report in diagnose(model), examine([tmp_path])[0]:
            assert not report if not said else only(report, "scale").evidence == said


def test_a_target_that_matches_nothing_in_peft(tmp_path):
    loud(peft.get_peft_model(llama(), peft.LoraConfig(r=2, target_modules=["q_proj", "c_attn"]))).save_pretrained(tmp_path)
    assert "1 of 2 names match no layer (c_attn); 4 layers" in only(examine([tmp_path])[0], "targets").evidence


def test_fused_experts_are_no_linears():
    """transformers keeps a Mixtral's experts in one tensor a block: "all linear layers" are its attention and its router."""
    torch.manual_seed(0)
    config = transformers.MixtralConfig(vocab_size=64, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
                                        num_key_value_heads=2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = ml.adapt(transformers.MixtralForCausalLM(config), ml.LoRA(2))
    weights = {name: p.numel() for name, p in model.named_parameters() if ".layers." in name and p.dim() > 1 and not name.endswith((".A", ".B"))}
    share = sum(size for name, size in weights.items() if ".mlp." in name) / sum(weights.values())
    evidence = only(diagnose(model), "targets").evidence
    assert f"{share:.0%} of the blocks' weights are in none (model.layers.*.mlp.experts." in evidence and share > 0.5
    dense = transformers.MixtralForCausalLM(config)
    assert not diagnose(ml.adapt(dense, ml.LoRA(2), ["q_proj", "v_proj"]))                         # a choice


@pytest.mark.parametrize("whose", ["ours", "PEFT's"])
def test_save_pretrained_of_an_adapted_model(whose, tmp_path):
    model = ml.adapt(llama(), ml.LoRA(2)) if whose == "ours" else peft.get_peft_model(llama(), peft.LoraConfig(r=2)).base_model.model
    model.save_pretrained(tmp_path / "m", max_shard_size="40KB")
    assert len(list((tmp_path / "m").glob("*.safetensors"))) > 1
    assert f"tensors are {'minilora' if whose == 'ours' else 'PEFT'}'s bases" in only(examine([tmp_path / "m"])[0], "saved adapted").evidence
    llama().save_pretrained(tmp_path / "plain", max_shard_size="40KB")
    assert not examine([tmp_path / "plain"])[0]
    for file in list((tmp_path / "plain").glob("model-00002*")):
        file.unlink()
    with pytest.raises(ValueError, match="model-00002.*no such file"):
        examine([tmp_path / "plain"])


def test_a_state_dict_of_a_peft_model(tmp_path):
    model = peft.get_peft_model(llama(), peft.LoraConfig(r=2))
    model.save_pretrained(tmp_path)
    loud_folder(tmp_path, rename=lambda key: key.replace(".weight", ".default.weight"))
    assert "16 of 16 keys carry the adapter's name 'default'" in only(examine([tmp_path])[0], "name in keys").evidence
    save_file({f"base_model.model.{name}": tensor for name, tensor in llama().state_dict().items()}, tmp_path / "m.safetensors")
    assert "as PeftModel names them" in only(examine([tmp_path / "m.safetensors"])[0], "wrapper in keys").evidence


@pytest.fixture
def bases(tmp_path):
    llama().save_pretrained(tmp_path / "base", max_shard_size="40KB")
    llama(1).save_pretrained(tmp_path / "other")
    llama(num_hidden_layers=2).save_pretrained(tmp_path / "shallow")
    llama(hidden_size=32).save_pretrained(tmp_path / "wide")
    return tmp_path


def test_wrong_base_by_fingerprint_and_by_shape(bases):
    model = llama()
    ml.save_adapter(loud(ml.adapt(model, ml.LoRA(2))), bases / "a")
    assert not examine([bases / "a"], bases / "base")[0]
    finding = only(examine([bases / "a"], bases / "other")[0], "wrong base")
    assert storage.base_fingerprint(llama())[:12] in finding.evidence and storage.base_fingerprint(llama(1))[:12] in finding.evidence
    assert "14 of 28 layers are not in this model" in only(examine([bases / "a"], bases / "shallow")[0], "wrong base").evidence
    assert "layers have other sizes" in only(examine([bases / "a"], bases / "wide")[0], "wrong base").evidence
    loud(peft.get_peft_model(llama(), peft.LoraConfig(r=2))).save_pretrained(bases / "p")
    assert not examine([bases / "p"], bases / "other")[0]                                          # PEFT notes no fingerprint: nobody can know
    assert "4 of 8 layers are not" in only(examine([bases / "p"], bases / "shallow")[0], "wrong base").evidence


@pytest.mark.parametrize("as_loaded", [lambda model: model.bfloat16(), lambda model: model.half(), lambda model: ml.quantize(model),
                                       lambda model: ml.quantize(model.bfloat16())], ids=["bfloat16", "float16", "nf4", "bfloat16, nf4"])
def test_the_right_base_is_known_however_it_was_loaded(as_loaded, bases):
    ml.save_adapter(loud(ml.adapt(as_loaded(llama()), ml.LoRA(2))), bases / "a")
    report, = examine([bases / "a"], bases / "base")
    assert not report and "is the base it was made for" in report.notes[1]
    only(examine([bases / "a"], bases / "other")[0], "wrong base")


@pytest.mark.parametrize("build", [llama, gpt2, lambda: llama(tie_word_embeddings=True), lambda: llama(attention_bias=True)],
                         ids=["llama", "gpt2", "tied", "biases"])
def test_fingerprints_are_those_of_the_loaded_model(build, tmp_path):
    build().save_pretrained(tmp_path, max_shard_size="40KB")
    found = list(fingerprints(Weights(tmp_path), [], {}))
    for dtype, place in ((torch.float32, 0), (torch.bfloat16, 2)):
        assert found[place] == storage.base_fingerprint(transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype))
    if build is not gpt2:
        assert found[5] == storage.base_fingerprint(ml.quantize(transformers.AutoModelForCausalLM.from_pretrained(tmp_path)))


def test_a_head_or_a_class_that_the_files_do_not_tell(bases):
    """An adapter with a head that the base's class has not: whose fingerprint it holds, files cannot tell."""
    torch.manual_seed(0)
    model = transformers.LlamaForSequenceClassification(llama().config)
    ml.adapt(model, ml.LoRA(2)).score.requires_grad_(True)
    ml.save_adapter(loud(model), bases / "a")
    assert not examine([bases / "a"], bases / "other")[0]


@pytest.mark.parametrize("build, config", [(llama, peft.LoraConfig(r=2, lora_alpha=3)), (gpt2, peft.LoraConfig(r=2, fan_in_fan_out=True)),
                                           (llama, peft.LoraConfig(r=4, use_rslora=True, rank_pattern={"q_proj": 2}))],
                         ids=["llama", "gpt2", "patterns"])
def test_merged_by_peft(build, config, tmp_path):
    build().save_pretrained(tmp_path / "base")
    model = loud(peft.get_peft_model(build(), config), 0.3)
    model.save_pretrained(tmp_path / "a")
    once = model.merge_and_unload()
    once.save_pretrained(tmp_path / "once")
    again = peft.PeftModel.from_pretrained(once, tmp_path / "a")
    if build is not gpt2:                                                                          # whose W is turned: in memory it is not judged
        assert "W is base's W + 1 dW in 100% of 8 layers" in only(diagnose(again, base=build()), "merged already").evidence
    again.merge_and_unload().save_pretrained(tmp_path / "twice")
    assert not examine([tmp_path / "a"], tmp_path / "base")[0]
    assert "near 1 in" in only(examine([tmp_path / "a"], tmp_path / "once")[0], "merged already").evidence
    report = examine([tmp_path / "a", tmp_path / "once"], tmp_path / "base")[1]
    assert not report and "once (100% of 8 layers)" in report.notes[0]
    assert "2 dW in 100% of 8 layers" in only(examine([tmp_path / "a", tmp_path / "twice"], tmp_path / "base")[1], "merged twice").evidence


def test_names_that_begin_further_out(tmp_path):
    """GPT-2 on the hub: its files say h.0., a model of it transformer.h.0."""
    gpt2().save_pretrained(tmp_path / "m")
    state = load_file(tmp_path / "m" / "model.safetensors")
    save_file({key.removeprefix("transformer."): tensor for key, tensor in state.items()}, tmp_path / "m" / "model.safetensors")
    loud(peft.get_peft_model(gpt2(), peft.LoraConfig(r=2, fan_in_fan_out=True)), 0.3).save_pretrained(tmp_path / "a")
    report, = examine([tmp_path / "a"], tmp_path / "m")
    assert not report and report.notes == ["8 of 32 of the blocks' matrices have an adapter; without: c_proj, c_fc"]
    weights = Weights(tmp_path / "m")
    assert weights.find("transformer.h.0.attn.c_attn.weight") == "h.0.attn.c_attn.weight"
    assert weights.find("attn.c_attn.weight") is None and weights.find("transformer.0.attn.c_attn.weight") is None


def test_the_command_on_a_folder_of_peft(bases, capsys):
    loud(peft.get_peft_model(llama(), peft.LoraConfig(r=2))).save_pretrained(bases / "p")
    assert main(["doctor", str(bases / "p"), "--base", str(bases / "base")]) == 0
    assert "an adapter, LoRA, rank 2, 8 layers, written by PEFT" in capsys.readouterr().out
    assert main(["doctor", str(bases / "p"), "--base", str(bases / "shallow")]) == 1


def test_importing_the_package_imports_neither_transformers_nor_the_wing():
    code = ("import sys, minilora; wing = 'minilora.scale' in sys.modules; import minilora.scale.doctor; "
            "print(wing, [name for name in ('transformers', 'peft') if name in sys.modules])")
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False []\n"
