"""Adapter folders of every method, both ways: saved here and loaded in PEFT, saved by PEFT and loaded here; on the tiny GPT and a Llama.
Layers of their own ranks and alphas; heads, norms and biases that are trained too; every way in which PEFT names layers: also on a BERT, a T5, a CNN.

The same function is asked for, in float64 to 1e-10; and that PEFT reads our folder without a word of warning.
"""

import copy
import json
import warnings

import peft
import pytest
import torch
import transformers
from torch import nn

import minilora as ml

TARGETS = ["q_proj", "v_proj", "up_proj", "down_proj"]
METHODS = {
    "LoRA": ml.LoRA(rank=3, alpha=5),
    "rsLoRA": ml.LoRA(rank=3, alpha=5, rslora=True),
    "LoRA+": ml.LoRAPlus(rank=3, alpha=5),
    "LoRA-FA": ml.LoRAFA(rank=3, alpha=5),
    "VeRA": ml.VeRA(rank=20, seed=7),
    "Delta-LoRA": ml.DeltaLoRA(rank=3, alpha=5, delta_ratio=1.7, start_step=2),
    "Delta-LoRA, rsLoRA": ml.DeltaLoRA(rank=3, alpha=5, start_step=2, rslora=True),
    "LoRA-drop": ml.LoRADrop(rank=3, alpha=5, threshold=0.3, warmup_steps=2),
    "AdaLoRA": ml.AdaLoRA(initial_rank=4, target_rank=2, alpha=5),
    "AdaLoRA, all kept": ml.AdaLoRA(initial_rank=4, target_rank=4, alpha=5),
    "DoRA": ml.DoRA(rank=3, alpha=5),
    "DoRA, rsLoRA": ml.DoRA(rank=3, alpha=5, rslora=True),
    "PiSSA": ml.PiSSA(rank=3, alpha=5),
    "PiSSA, rsLoRA": ml.PiSSA(rank=3, alpha=5, rslora=True),
}


def lively(model):
    """Weights of size 1/√in and biases that are not zero: see test_lora_peft.py."""
    with torch.no_grad():
        for linear in model.modules():
            if isinstance(linear, nn.Linear):
                linear.weight.normal_(std=linear.in_features ** -0.5)
                if linear.bias is not None:
                    linear.bias.normal_(std=0.1)
    return model


def tiny_gpt(dtype=torch.float64):
    torch.manual_seed(0)
    return lively(ml.TinyGPT(ml.GPTConfig(context=16, width=24, layers=3, heads=2))).to(dtype)


def llama(dtype=torch.float64):
    torch.manual_seed(0)
    return lively(transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=256, hidden_size=24, intermediate_size=40, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        attention_bias=True, mlp_bias=True))).to(dtype)


BUILDS = pytest.mark.parametrize("build", [tiny_gpt, llama])


def batches(step):
    ids = torch.randint(256, (3, 13), generator=torch.Generator().manual_seed(step))
    return ids[:, :-1], ids[:, 1:]


@torch.no_grad()
def logits(model):
    out = model.eval()(batches(99)[0])
    return getattr(out, "logits", out)


def trained(build, method):
    """After six steps of our loop at a high rate."""
    model = build()
    ml.finetune(model, method, batches, 6, 0.05, targets=TARGETS, progress=False)
    return model


@BUILDS
@pytest.mark.parametrize("name", METHODS)
def test_a_folder_saved_here_is_the_same_function_in_peft(build, name, tmp_path):
    model = trained(build, METHODS[name])
    ml.save_adapter(model, tmp_path)
    with warnings.catch_warnings():
        if type(METHODS[name]) is not ml.AdaLoRA:                       # there PEFT warns of its own rank_pattern, see below
            warnings.simplefilter("error", UserWarning)
            warnings.simplefilter("error", RuntimeWarning)
        theirs = peft.PeftModel.from_pretrained(build(), tmp_path)
    assert (logits(theirs) - logits(model)).abs().max() < 1e-10
    assert (logits(model) - logits(build())).abs().max() > 1e-2
    assert (logits(theirs.merge_and_unload()) - logits(model)).abs().max() < 1e-10


@BUILDS
@pytest.mark.parametrize("name", METHODS)
def test_what_peft_saves_again_is_the_same_function_here(build, name, tmp_path):
    """PEFT drops our metadata: what comes back is what its fields say, PiSSA and Delta-LoRA as the LoRA they are equal to."""
    model = trained(build, METHODS[name])
    peft.PeftModel.from_pretrained(build(), ml.save_adapter(model, tmp_path / "ours")).save_pretrained(tmp_path / "theirs")
    loaded = ml.load_adapter(build(), tmp_path / "theirs")
    assert (logits(loaded) - logits(model)).abs().max() < 1e-10
    kind = type(METHODS[name])
    assert {type(layer.method) for _, layer in ml.adapters(loaded)} == {kind if kind in (ml.DoRA, ml.AdaLoRA, ml.VeRA) else ml.LoRA}


def lora(**fields):
    return peft.LoraConfig(r=3, lora_alpha=5, target_modules=TARGETS, **fields)


def vera(**fields):
    return peft.VeraConfig(r=20, projection_prng_key=7, d_initial=0.3, target_modules=TARGETS, **fields)


def adalora(**fields):
    return peft.AdaLoraConfig(init_r=4, lora_alpha=5, total_step=8, target_modules=TARGETS, **fields)


def exercised(build, config):
    """A PEFT model after a few AdamW steps; AdaLoRA's allocator runs too."""
    model = peft.get_peft_model(build(), config)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for step in range(6):
        optimizer.zero_grad()
        out = model(batches(step)[0])
        nn.functional.cross_entropy(getattr(out, "logits", out).flatten(0, 1), batches(step)[1].flatten()).backward()
        optimizer.step()
        if config.peft_type == "ADALORA" and config.target_r < config.init_r:
            model.base_model.update_and_allocate(step)
    return model


@BUILDS
@pytest.mark.parametrize("config, kind", [
    (lora(), ml.LoRA), (lora(use_rslora=True, lora_dropout=0.3), ml.LoRA), (lora(use_dora=True), ml.DoRA),
    (lora(use_dora=True, use_rslora=True), ml.DoRA), (vera(), ml.VeRA), (vera(save_projection=False), ml.VeRA),
    (adalora(target_r=2), ml.AdaLoRA), (adalora(target_r=2, tinit=1, tfinal=4, deltaT=2), ml.AdaLoRA), (adalora(target_r=4), ml.AdaLoRA),
], ids=["lora", "rslora", "dora", "dora, rslora", "vera", "vera, seed only", "adalora, cut", "adalora, final", "adalora, whole"])
def test_a_folder_of_peft_is_the_same_function_here(build, config, kind, tmp_path):
    theirs = exercised(build, copy.deepcopy(config))
    theirs.save_pretrained(tmp_path)
    reloaded = peft.PeftModel.from_pretrained(build(), tmp_path)        # what PEFT itself makes of its folder (AdaLoRA drops what grew again)
    ours = ml.load_adapter(build(), tmp_path)
    assert {type(layer.method) for _, layer in ml.adapters(ours)} == {kind}
    assert (logits(ours) - logits(reloaded)).abs().max() < 1e-10
    assert (logits(ours) - logits(build())).abs().max() > 1e-2


@BUILDS
@pytest.mark.parametrize("rslora", [False, True])
def test_pefts_own_pissa_folder_is_converted(build, rslora, tmp_path):
    """In it A and B stand beside an altered W. Here W is the original, and A₀, B₀ are found again by the same SVD. (float32: PEFT refuses more.)"""
    torch.manual_seed(0)
    theirs = peft.get_peft_model(build(torch.float32), lora(init_lora_weights="pissa", use_rslora=rslora))
    with torch.no_grad():
        for module in theirs.modules():
            if isinstance(module, peft.tuners.lora.Linear):
                module.lora_A["default"].weight.add_(0.1 * torch.randn_like(module.lora_A["default"].weight))
                module.lora_B["default"].weight.add_(0.1 * torch.randn_like(module.lora_B["default"].weight))
    theirs.save_pretrained(tmp_path / "theirs")
    ours = ml.load_adapter(build(torch.float32), tmp_path / "theirs")
    largest = logits(theirs).abs().max()
    assert (logits(ours) - logits(theirs)).abs().max() < 1e-5 * largest and (logits(ours) - logits(build(torch.float32))).abs().max() > 0.1
    assert {type(layer.method) for _, layer in ml.adapters(ours)} == {ml.PiSSA}
    again = peft.PeftModel.from_pretrained(build(torch.float32), ml.save_adapter(ours, tmp_path / "ours"))     # now a LoRA of rank 6
    assert json.loads((tmp_path / "ours" / "adapter_config.json").read_text())["r"] == 6
    assert (logits(again) - logits(theirs)).abs().max() < 1e-5 * largest


def test_pefts_randomized_pissa_is_refused(tmp_path):
    peft.get_peft_model(llama(torch.float32), lora(init_lora_weights="pissa_niter_2")).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="pissa_niter_2.*path_initial_model_for_weight_conversion"):
        ml.load_adapter(llama(torch.float32), tmp_path)


def test_pefts_conversion_of_pissa_loads(tmp_path):
    torch.manual_seed(0)
    theirs = peft.get_peft_model(llama(torch.float32), lora(init_lora_weights="pissa_niter_4"))
    theirs.peft_config["default"].init_lora_weights = True              # as PEFT's documentation has it
    theirs.save_pretrained(tmp_path / "start")
    theirs.peft_config["default"].init_lora_weights = "pissa_niter_4"
    with torch.no_grad():
        for module in theirs.modules():
            if isinstance(module, peft.tuners.lora.Linear):
                module.lora_B["default"].weight.add_(0.1 * torch.randn_like(module.lora_B["default"].weight))
    said = logits(theirs)
    theirs.save_pretrained(tmp_path / "converted", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    ours = ml.load_adapter(llama(torch.float32), tmp_path / "converted")
    assert (logits(ours) - said).abs().max() < 1e-4 * said.abs().max() < 1e-2 * (said - logits(llama(torch.float32))).abs().max()


def test_the_warning_about_adaloras_pattern_is_pefts_own(tmp_path):
    """It says that the keys of rank_pattern match no module, of its own folders too, and applies them all the same."""
    exercised(llama, adalora(target_r=2)).save_pretrained(tmp_path / "theirs")
    ml.save_adapter(trained(llama, METHODS["AdaLoRA"]), tmp_path / "ours")
    for folder in ("theirs", "ours"):
        with pytest.warns(RuntimeWarning, match="rank_pattern keys did not match"):
            peft.PeftModel.from_pretrained(llama(), tmp_path / folder)


def bert():
    torch.manual_seed(0)
    return lively(transformers.BertForSequenceClassification(transformers.BertConfig(
        vocab_size=256, hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=40, num_labels=3))).double()


def t5():
    torch.manual_seed(0)
    return transformers.T5ForConditionalGeneration(transformers.T5Config(
        vocab_size=256, d_model=24, d_kv=8, d_ff=40, num_layers=2, num_heads=3, decoder_start_token_id=0)).double()


def cnn():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)).double()


@torch.no_grad()
def said(model):
    """What any of these models says."""
    model.eval()
    kind = type(getattr(model, "base_model", model) if not isinstance(model, peft.PeftModel) else model.base_model.model)
    ids = batches(99)[0].contiguous()
    if kind is nn.Sequential:
        return model(torch.linspace(-1, 1, 256, dtype=torch.float64).view(4, 1, 8, 8))
    out = model(input_ids=ids, labels=ids) if kind is transformers.T5ForConditionalGeneration else model(ids)
    return getattr(out, "logits", out)


def stirred(model, *also):
    """Every adapter, and these tensors beside them, away from where they started."""
    dice = torch.Generator().manual_seed(3)
    own = [p for _, layer in ml.adapters(model) for name, p in layer.named_parameters() 
           if not name.startswith("base.") and not (isinstance(layer, ml.VeRALinear) and name in "AB")]
    with torch.no_grad():
        for p in (*own, *also):
            p.add_(0.2 * torch.randn(p.shape, generator=dice, dtype=torch.float64))
    return model


def both_ways(model, build, tmp_path):
    """It comes back here, and is the same function in PEFT; and again here, from the folder that PEFT then writes."""
    ours = said(model)
    ml.save_adapter(model, tmp_path / "ours")
    assert torch.equal(said(ml.load_adapter(build(), tmp_path / "ours")), ours)
    theirs = peft.PeftModel.from_pretrained(build(), tmp_path / "ours")
    assert (said(theirs) - ours).abs().max() < 1e-10 < 1e-2 < (said(build()) - ours).abs().max()
    theirs.save_pretrained(tmp_path / "theirs")
    assert (said(ml.load_adapter(build(), tmp_path / "theirs")) - ours).abs().max() < 1e-10
    return json.loads((tmp_path / "ours" / "adapter_config.json").read_text())


@pytest.mark.parametrize("methods", [
    [ml.LoRA(2, alpha=3), ml.LoRA(4, alpha=32)], [ml.LoRA(2, alpha=3), ml.LoRA(2, alpha=3, rslora=True)], [ml.DoRA(3, alpha=2), ml.DoRA(2, alpha=7)],
    [ml.PiSSA(2), ml.LoRAPlus(3)], [ml.LoRAFA(2), ml.LoRA(2, dropout=0.5)],
], ids=["rank and alpha", "one rslora", "DoRA", "PiSSA and LoRA+", "LoRA-FA and dropout"])
def test_layers_of_their_own(methods, tmp_path):
    model = bert()
    for method, layer in zip(methods, model.bert.encoder.layer):
        ml.adapt(layer, method, ["query", "output.dense"])
    model.requires_grad_(False)
    config = both_ways(stirred(model), bert, tmp_path)
    assert config["modules_to_save"] is None and config["bias"] == "none"


def test_what_is_trained_beside_the_adapters(tmp_path):
    for at, (build, targets, beside, expected) in enumerate([
        (bert, ["query"], ["classifier."], ("none", ["classifier"])),
        (bert, ["query"], ["classifier.bias", "pooler.dense.bias"], ("none", ["bert.pooler.dense", "classifier"])),
        (bert, ["query", "value"], ["query.bias"], ("lora_only", None)),
        (llama, ["q_proj"], ["bias"], ("all", None)),
        (llama, ["q_proj", "up_proj"], ["norm", "embed_tokens", "q_proj.bias"], ("lora_only", [
            "model.embed_tokens", *(f"model.layers.{i}.{norm}_layernorm" for i in range(3) for norm in ("input", "post_attention")), "model.norm"])),
        (tiny_gpt, ["q_proj"], ["head", "position_embedding"], ("none", ["head", "position_embedding"])),
        (tiny_gpt, ["down_proj"], ["blocks.1.mlp_norm.weight", "norm."], None),
    ]):
        model = ml.adapt(build(), ml.LoRA(3, alpha=5), targets)
        also = [p for name, p in model.named_parameters() if any(part in name.replace(".base.", ".") for part in beside)]
        for p in also:
            p.requires_grad_(True)
        config = both_ways(stirred(model, *also), build, tmp_path / str(at))
        assert expected is None or (config["bias"], config["modules_to_save"]) == expected, beside


@pytest.mark.parametrize("method", [ml.VeRA(8), ml.AdaLoRA(3, 3), ml.DoRA(2), ml.PiSSA(2)], ids=lambda method: type(method).__name__)
def test_a_head_and_biases_with_other_methods(method, tmp_path):
    model = ml.adapt(bert(), method, ["query"])
    also = [*model.classifier.parameters(), *(layer.bias for _, layer in ml.adapters(model))]
    for p in also:
        p.requires_grad_(True)
    assert both_ways(stirred(model, *also), bert, tmp_path)["bias"] == ("vera_only" if isinstance(method, ml.VeRA) else "lora_only")


def test_running_statistics(tmp_path):
    model = ml.adapt(cnn(), ml.LoRA(2), ["4"]).train()
    for step in range(3):
        model(torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(step), dtype=torch.float64))
    assert both_ways(stirred(model), cnn, tmp_path)["modules_to_save"] == ["1", "5"]


def test_names_that_are_the_ends_of_others(tmp_path):
    def build():
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(144, 8), nn.Sequential(nn.ReLU(), nn.Linear(8, 8), nn.Tanh())).double()

    model = ml.adapt(build(), ml.LoRA(2), ["2"])
    assert both_ways(stirred(model), build, tmp_path)["target_modules"] == "2"


@pytest.mark.parametrize("build, fields", [
    (llama, dict(target_modules=["q_proj", "v_proj"], exclude_modules=r".*layers\.0.*v_proj")),
    (bert, dict(target_modules=["query", "value"], exclude_modules=["layer.0.attention.self.query"])),
    (llama, dict(target_modules=["q_proj"], layers_to_transform=[0, 2], layers_pattern="layers")),
    (bert, dict(target_modules=["query"], layers_to_transform=1)),
    (t5, dict(target_modules=["q"], layers_to_transform=[0], layers_pattern=["layer", "block"])),
    (llama, dict(target_modules=["q_proj", "up_proj"], rank_pattern={r"layers\.1\..*q_proj": 2, "up_proj": 3, "proj": 1},
                 alpha_pattern={"up_proj": 7, "^model.layers.0.self_attn.q_proj": 1})),
    (tiny_gpt, dict(target_modules=["q_proj", "up_proj"], use_dora=True, use_rslora=True, rank_pattern={"up_proj": 3})),
    (llama, dict(target_modules=["q_proj", "query", "c_attn"])),
    (llama, dict(target_modules=["q_proj"], init_lora_weights="orthogonal")),
    (bert, dict(target_modules=["query"], modules_to_save=["classifier", "score"])),
    (tiny_gpt, dict(target_modules=["q_proj"], modules_to_save=["norm"])),
    (tiny_gpt, dict(target_modules=["q_proj"], bias="all")),
    (bert, dict(target_modules=["query"], bias="all", modules_to_save=["classifier"])),
    (llama, dict(target_modules=["q_proj"], bias="lora_only")),
    (t5, dict(target_modules=["q"], modules_to_save=["lm_head"])),
    (cnn, dict(target_modules=["4"], modules_to_save=["5", "6"])),
], ids=lambda value: value.__name__ if callable(value) else " ".join(value))
def test_whatever_names_pefts_layers(build, fields, tmp_path):
    torch.manual_seed(0)
    theirs = peft.get_peft_model(build(), peft.LoraConfig(r=4, lora_alpha=5, **fields))
    with torch.no_grad():
        for p in theirs.parameters():
            if p.requires_grad:
                p.add_(0.2 * torch.randn_like(p))
    theirs.save_pretrained(tmp_path)
    ours = ml.load_adapter(build(), tmp_path)
    assert (said(ours) - said(theirs)).abs().max() < 1e-10 < 1e-3 < (said(ours) - said(build())).abs().max()
    with ml.disabled(ours):
        assert torch.equal(said(ours), said(build()))
    assert torch.equal(said(ml.unload(ours)), said(build()))


def test_a_start_by_mica(tmp_path):
    theirs = peft.get_peft_model(llama(torch.float32), peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights="mica"))
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            if "lora_A" in name:
                p.normal_(std=0.2)
    theirs.save_pretrained(tmp_path)
    assert (said(ml.load_adapter(llama(torch.float32), tmp_path)) - said(theirs)).abs().max() < 1e-5


def test_a_start_by_eva(tmp_path):
    """It hands out ranks by the data and scales alpha with them, layer by layer; W stays."""
    config = peft.LoraConfig(r=4, lora_alpha=5, target_modules=["q_proj", "v_proj"], init_lora_weights="eva", eva_config=peft.EvaConfig(rho=2.0))
    theirs = peft.get_peft_model(llama(torch.float32), config)
    peft.initialize_lora_eva_weights(theirs, [{"input_ids": batches(step)[0]} for step in range(8)], show_progress_bar=False)
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.2)
    theirs.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["rank_pattern"]
    assert (said(ml.load_adapter(llama(torch.float32), tmp_path)) - said(theirs)).abs().max() < 1e-5


def test_a_shallower_models_folder_is_no_adapter_of_a_deeper_one(tmp_path):
    peft.get_peft_model(bert(), peft.LoraConfig(r=2, target_modules=["query"])).save_pretrained(tmp_path)
    deep = transformers.BertForSequenceClassification(transformers.BertConfig(
        vocab_size=256, hidden_size=24, num_hidden_layers=3, num_attention_heads=3, intermediate_size=40))
    with pytest.raises(ValueError, match="layer.2.attention.self.query.lora_A.weight is missing"):
        ml.load_adapter(deep, tmp_path)
