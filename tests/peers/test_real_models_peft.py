"""Every method that PEFT has, both ways, on models as they come from transformers: Llama, Qwen3 with a tied head, GPT-2, Mixtral. All layers of
the blocks, which is what adapt takes by itself: GPT-2's are Conv1D, Mixtral's experts are Parameters of three dimensions.

The same logits and the same gradients of all that is trained, at random values of it, in float64. (Llama's norms and Mixtral's router compute in
float32 even so; but what goes in agrees to 1e-15, and all but never rounds differently.)
"""

import copy
import functools
import json
import warnings

import peft
import peft.optimizers
import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import nn
from transformers.pytorch_utils import Conv1D

import minilora as ml
from minilora.evidence.intruders import intruders
from minilora.evidence.ledger import ledger, predicted, readers
from minilora.safety.targets import find_targets
from minilora.storage import base_fingerprint

SMALL = dict(vocab_size=65, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
             max_position_embeddings=32)
GPT2 = dict(vocab_size=65, n_positions=32, n_embd=32, n_inner=48, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0)
IDS = torch.randint(65, (3, 11), generator=torch.Generator().manual_seed(5))
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MODELS = {
    "Llama": (lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL)), [*ATTENTION, "gate_proj", "up_proj", "down_proj"]),
    "Qwen3": (lambda: transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**SMALL, head_dim=8, tie_word_embeddings=True)),
              [*ATTENTION, "gate_proj", "up_proj", "down_proj"]),
    "GPT-2": (lambda: transformers.GPT2LMHeadModel(transformers.GPT2Config(**GPT2)), ["c_attn", "c_proj", "c_fc"]),
    "Mixtral": (lambda: transformers.MixtralForCausalLM(transformers.MixtralConfig(**SMALL, num_local_experts=4, experts_implementation="eager")),
                ATTENTION),
}
EACH = pytest.mark.parametrize("name", MODELS)
pytestmark = [pytest.mark.filterwarnings(f"ignore:{said}") for said in (
    ".*lie outside nn.Linear", "fan_in_fan_out is set to", ".*rank_pattern keys did not match", ".*have invalid shape", ".*is_gradient_checkpointing")]


@functools.cache
def first(name):
    """Weights of size 1/√in and biases that are not zero; in evaluation, so without GPT-2's dropout."""
    torch.manual_seed(0)
    model = MODELS[name][0]().double().eval()
    with torch.no_grad():
        for key, p in model.named_parameters():
            if p.dim() > 1 or key.endswith("bias"):
                p.normal_(std=0.18 if p.dim() > 1 else 0.1)
    return model


def build(name, dtype=torch.float64):
    return copy.deepcopy(first(name)).to(dtype)


def stirred(model, seed=2):
    """Random values for all that is trained, and for LoRA-FA's A: B is not 0, and a magnitude is not ‖W + s · BA‖."""
    dice = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, p in model.named_parameters():
            if p.requires_grad and ".ranknum." not in key or key.endswith(".A"):      # a constant that PEFT, in float64, leaves to be trained
                p.add_(0.2 * torch.randn(p.shape, generator=dice, dtype=torch.float64))
    return model


def loss(model):
    return F.cross_entropy(model(IDS).logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())


def gradients(layer):
    """Of one of our layers, by PEFT's names; of AdaLoRA's triplets those that are kept."""
    if isinstance(layer, ml.AdaLoRALinear):
        kept = layer.kept
        return {"lora_A": layer.Q.grad[kept], "lora_E": layer.lam.grad[kept, None], "lora_B": layer.P.grad[:, kept]}
    names = {"lora_A": "A", "lora_B": "B", "lora_magnitude_vector": "magnitude", "vera_lambda_b": "b", "vera_lambda_d": "d"}
    found = {theirs: getattr(layer, own, None) for theirs, own in names.items()}
    return {theirs: p.grad for theirs, p in found.items() if p is not None and p.grad is not None}


def agree(ours, theirs, tolerance=1e-10):
    """One function, one gradient. PEFT has our PiSSA as a LoRA of twice its rank: its first half is ours."""
    said, peers = ours(IDS).logits, theirs(IDS).logits
    assert (said - peers).abs().max() < tolerance * peers.abs().max()
    loss(ours).backward(), loss(theirs).backward()
    layers, compared = theirs.base_model.model, 0
    for name, layer in ml.adapters(ours):
        for key, grad in gradients(layer).items():
            found = getattr(layers.get_submodule(name), key)["default"]
            found = getattr(found, "weight", found).grad
            compared += 1
            if grad.numel():                                               # of a layer whose triplets are all cut nothing is left
                assert grad.any() and (grad - found[tuple(map(slice, grad.shape))]).abs().max() < tolerance * grad.abs().max(), (name, key)
    return compared


def same_groups(method, ours, theirs):
    """Each A and B has the rate and the decay that PEFT's LoRA+ gives it."""
    peers, said = theirs.base_model.model, {}
    optimizer = peft.optimizers.create_loraplus_optimizer(theirs, torch.optim.AdamW, lr=0.01, loraplus_lr_ratio=16, loraplus_weight_decay=0.3)
    for groups in (method.parameter_groups(ours, 0.01, 0.3), optimizer.param_groups):
        said |= {id(p): (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}
    for name, layer in ml.adapters(ours):
        for key, lr in (("A", 0.01), ("B", 0.16)):
            peer = getattr(peers.get_submodule(name), f"lora_{key}")["default"].weight
            assert said[id(getattr(layer, key))] == said[id(peer)] == pytest.approx((lr, 0.3))


METHODS = {
    "LoRA": ml.LoRA(3, alpha=5), "rsLoRA": ml.LoRA(3, alpha=5, rslora=True), "LoRA+": ml.LoRAPlus(3, alpha=5), "LoRA-FA": ml.LoRAFA(3, alpha=5),
    "DoRA": ml.DoRA(3, alpha=5), "PiSSA": ml.PiSSA(3, alpha=5), "AdaLoRA": ml.AdaLoRA(4, 2, alpha=5), "VeRA": ml.VeRA(20, seed=7),
    "QLoRA": ml.QLoRA(3, alpha=5, dropout=0.0), "LoftQ": ml.LoftQ(3, alpha=5), "QPiSSA": ml.QPiSSA(3, alpha=5),
}
TENSORS = {"LoRA-FA": 1, "DoRA": 3, "AdaLoRA": 3}                          # that have a gradient in each layer; else two


def dense(adapted, name):
    """The base with W as the adapted model has it: in four bits other numbers, for PEFT written out."""
    model = build(name)
    with torch.no_grad():
        for at, layer in ml.adapters(adapted):
            weight = model.get_submodule(at).weight
            weight.copy_(layer.base.weight.T if name == "GPT-2" else layer.base.weight)
    return model


@EACH
@pytest.mark.parametrize("method", METHODS)
def test_our_folder_is_the_same_function_with_the_same_gradients_in_peft(name, method, tmp_path):
    ours = stirred(ml.adapt(build(name), METHODS[method]))
    if method == "AdaLoRA":
        with torch.no_grad():
            for k, (_, layer) in enumerate(ml.adapters(ours)):
                layer.mask[k % 4] = layer.lam[k % 4] = 0                   # each has lost another triplet
    ml.save_adapter(ours, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["fan_in_fan_out"] == (name == "GPT-2")
    with warnings.catch_warnings():
        if method != "AdaLoRA":                                            # PEFT warns of its own rank_pattern
            warnings.simplefilter("error", UserWarning)
        theirs = peft.PeftModel.from_pretrained(dense(ours, name), tmp_path, is_trainable=True)
    if method == "LoRA+":
        same_groups(METHODS[method], ours, theirs)
    assert agree(ours, theirs) == TENSORS.get(method, 2) * len(find_targets(first(name)))
    assert (ours(IDS).logits - first(name)(IDS).logits).abs().max() > 0.1


def vera(**fields):
    return peft.VeraConfig(r=20, projection_prng_key=7, d_initial=0.3, **fields)


CONFIGS = {
    "LoRA": functools.partial(peft.LoraConfig, r=3, lora_alpha=5), "rsLoRA": functools.partial(peft.LoraConfig, r=3, lora_alpha=5, use_rslora=True),
    "DoRA": functools.partial(peft.LoraConfig, r=3, lora_alpha=5, use_dora=True), "VeRA": vera,
    "AdaLoRA": functools.partial(peft.AdaLoraConfig, init_r=4, target_r=2, lora_alpha=5, total_step=8),
    "PiSSA": functools.partial(peft.LoraConfig, r=3, lora_alpha=5, init_lora_weights="pissa"),
}


@EACH
@pytest.mark.parametrize("config", CONFIGS)
def test_a_folder_of_peft_is_the_same_function_with_the_same_gradients_here(name, config, tmp_path):
    """Its PiSSA takes no float64: in float32 the same SVD by another way, and two layers of rounding, leave 1e-4."""
    dtype, tolerance = (torch.float32, 2e-4) if config == "PiSSA" else (torch.float64, 1e-10)
    theirs = stirred(peft.get_peft_model(build(name, dtype), CONFIGS[config](target_modules=MODELS[name][1])))
    if config == "AdaLoRA":
        loss(theirs).backward()
        theirs.base_model.update_and_allocate(4)                           # cuts
        theirs.zero_grad()
    theirs.save_pretrained(tmp_path)
    if config == "AdaLoRA":                                                # what PEFT itself makes of its folder, the cut ones left out
        theirs = peft.PeftModel.from_pretrained(build(name), tmp_path, is_trainable=True)
    ours = ml.load_adapter(build(name, dtype), tmp_path, trainable=True)
    assert agree(ours, theirs, tolerance) == TENSORS.get(config, 2) * len(find_targets(first(name)))


@pytest.mark.parametrize("config", ["LoRA", "VeRA", "AdaLoRA"])
def test_of_a_conv1d_the_flag_is_not_asked_and_of_a_linear_it_must_be_false(config, tmp_path):
    """PEFT goes by the layer and corrects the flag; so it stands as false where the last of several layers was an nn.Linear."""
    for name, wrong in (("GPT-2", False), ("Llama", True)):
        theirs = stirred(peft.get_peft_model(build(name), CONFIGS[config](target_modules=MODELS[name][1])))
        theirs.save_pretrained(tmp_path)
        file = tmp_path / "adapter_config.json"
        said = json.loads(file.read_text())
        assert said["fan_in_fan_out"] is not wrong
        for flag in (wrong, None, "yes"):
            file.write_text(json.dumps(said | {"fan_in_fan_out": flag}))
            if flag == "yes" or flag and name == "Llama":
                reason = "fan_in_fan_out = 'yes' is not what PEFT" if flag == "yes" else "here there is none: model.layers.0.self_attn.q_proj is"
                with pytest.raises(ValueError, match=reason):
                    ml.load_adapter(build(name), tmp_path)
            else:
                assert (ml.load_adapter(build(name), tmp_path)(IDS).logits - theirs(IDS).logits).abs().max() < 1e-10
        with pytest.warns(UserWarning, match=f"fan_in_fan_out is set to {wrong} but"):
            file.write_text(json.dumps(said | {"fan_in_fan_out": wrong}))
            peft.PeftModel.from_pretrained(build(name), tmp_path)


def test_conv1d_and_linear_in_one_folder(tmp_path):
    def scorer():
        torch.manual_seed(1)
        return transformers.GPT2ForSequenceClassification(transformers.GPT2Config(**GPT2, num_labels=5, pad_token_id=0)).double().eval()

    ours = stirred(ml.adapt(scorer(), ml.LoRA(3, alpha=5), ["c_attn", "score"]))
    theirs = peft.PeftModel.from_pretrained(scorer(), ml.save_adapter(ours, tmp_path / "ours"))
    assert (ours(IDS).logits - theirs(IDS).logits).abs().max() < 1e-10 < 1e-2 < (ours(IDS).logits - scorer()(IDS).logits).abs().max()
    theirs.save_pretrained(tmp_path / "theirs")
    for folder, flag in (("ours", True), ("theirs", False)):
        assert json.loads((tmp_path / folder / "adapter_config.json").read_text())["fan_in_fan_out"] is flag
        assert torch.equal(ml.load_adapter(scorer(), tmp_path / folder)(IDS).logits, ours(IDS).logits)


def test_biases_that_are_trained_beside_conv1d(tmp_path):
    model = ml.adapt(build("GPT-2"), ml.LoRA(3), ["c_attn", "c_fc"])
    for _, layer in ml.adapters(model):
        layer.bias.requires_grad_(True)
    said = stirred(model)(IDS).logits
    theirs = peft.PeftModel.from_pretrained(build("GPT-2"), ml.save_adapter(model, tmp_path / "ours"))
    assert (theirs(IDS).logits - said).abs().max() < 1e-10
    theirs.save_pretrained(tmp_path / "theirs")
    for folder in ("ours", "theirs"):
        assert json.loads((tmp_path / folder / "adapter_config.json").read_text())["bias"] == "lora_only"
        loaded = ml.load_adapter(build("GPT-2"), tmp_path / folder)
        assert (loaded(IDS).logits - said).abs().max() < 1e-10 and all(layer.bias is layer.base.conv1d.bias for _, layer in ml.adapters(loaded))
        unloaded = ml.unload(loaded)
        assert all(torch.equal(unloaded.state_dict()[key], tensor) for key, tensor in first("GPT-2").state_dict().items())


def test_pefts_adapters_on_parameters_are_refused_by_name(tmp_path):
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], target_parameters=["experts.gate_up_proj"])
    peft.get_peft_model(build("Mixtral"), config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"target_parameters = \['experts.gate_up_proj'\] changes what the adapter means"):
        ml.load_adapter(build("Mixtral"), tmp_path)


def test_mixtrals_warning_names_its_experts_and_their_share():
    model = build("Mixtral")
    attention, outside = 2 * (2 * 32 * 32 + 2 * 16 * 32), 2 * (4 * 96 * 32 + 4 * 32 * 48 + 4 * 32)
    assert attention + outside == sum(p.numel() for p in model.model.layers.parameters() if p.dim() > 1)
    with pytest.warns(UserWarning) as caught:
        ml.adapt(model, ml.LoRA(3))
    assert [str(one.message) for one in caught] == [
        f"{outside / (attention + outside):.0%} of the blocks' weights lie outside nn.Linear and stay as they are: "
        "model.layers.*.mlp.experts.gate_up_proj, model.layers.*.mlp.experts.down_proj, model.layers.*.mlp.gate.weight"]
    with pytest.raises(ValueError, match=r"no Linear matches 'gate_up_proj'.*gate_up_proj is a Parameter \(4, 96, 32\)"):
        ml.adapt(build("Mixtral"), ml.LoRA(3), ["gate_up_proj"])


@EACH
def test_the_head_is_no_target_and_a_tied_one_is_refused(name):
    model = build(name)
    assert {at.rpartition(".")[2] for at in find_targets(model)} == set(MODELS[name][1])
    if name in ("Llama", "Mixtral"):
        assert list(find_targets(model, ["lm_head"])) == ["lm_head"]
    else:
        with pytest.raises(ValueError, match=r"lm_head: its weight is tied \(\S+ = lm_head.weight\)"):
            ml.adapt(model, ml.LoRA(3), ["lm_head"])


# GPT-2 from adapt() to the disk. Its twin has an nn.Linear with W = weightᵀ in the place of each Conv1D.

OURS = METHODS | {"LoRA-FA, projection": ml.LoRAFA(3, projection=True), "Delta-LoRA": ml.DeltaLoRA(3, alpha=5, start_step=1),
                  "LoRA-drop": ml.LoRADrop(3, alpha=5, threshold=0.3, warmup_steps=2), "AdaLoRA": ml.AdaLoRA(4, 2, alpha=5, warmup_steps=1)}
EXACT = {name: method for name, method in OURS.items() if name not in ("QLoRA", "LoftQ", "QPiSSA")}
OUTPUTS = [f"transformer.h.{i}.{part}" for i in range(2) for part in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")]


def twin(model):
    for name in OUTPUTS:
        layer = model.get_submodule(name)
        linear = nn.Linear(layer.nx, layer.nf, dtype=layer.weight.dtype)
        with torch.no_grad():
            linear.weight.copy_(layer.weight.T)
            linear.bias.copy_(layer.bias)
        model.set_submodule(name, linear.train(layer.training))
    return model


def batches(step):
    x = torch.randint(65, (3, 9), generator=torch.Generator().manual_seed(step))
    return x[:, :-1], x[:, 1:]


def tuned(model, method, steps=3, **options):
    return ml.finetune(model, method, batches, steps, 0.02, progress=False, **options)


@pytest.mark.parametrize("method", OURS)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-10), (torch.float32, 2e-4), (torch.bfloat16, 0.05)],
                         ids=["float64", "float32", "bfloat16"])
def test_every_method_trains_gpt2_as_its_twin_of_linears(method, dtype, tolerance):
    """In 16 bits products are rounded in another order; 0.05 is a few of their steps at the size of the logits."""
    model, other = build("GPT-2", dtype), twin(build("GPT-2", dtype))
    losses = torch.tensor([tuned(m, OURS[method])["loss"] for m in (model, other)])
    said, peers = model.eval()(IDS).logits, other.eval()(IDS).logits
    assert (losses[0] - losses[1]).abs().max() < tolerance and (said - peers).abs().max() < tolerance * peers.abs().max()
    assert (said - build("GPT-2", dtype)(IDS).logits).abs().max() > 0.01 and next(ml.adapters(model))[0] == OUTPUTS[0]
    for name, layer in ml.adapters(model):
        assert layer.weight.shape == (layer.out_features, layer.in_features) == other.get_submodule(name).weight.shape
        if method in ("LoftQ", "QPiSSA"):
            assert torch.equal(layer.base.codes, other.get_submodule(name).base.codes)


@pytest.mark.parametrize("method", EXACT)
def test_w_keeps_its_bits_and_unload_gives_gpt2_back(method):
    model, there = build("GPT-2", torch.float32), build("GPT-2", torch.float32)
    layers, before = [model.get_submodule(name) for name in OUTPUTS], base_fingerprint(model)
    ml.adapt(model, OURS[method])
    assert base_fingerprint(model) == before == base_fingerprint(there)
    tuned(model, OURS[method])
    assert base_fingerprint(model) == before
    with ml.disabled(model.eval()):
        assert torch.equal(model(IDS).logits, there(IDS).logits) and [model.get_submodule(name) for name in OUTPUTS] == layers
    assert not torch.equal(model(IDS).logits, there(IDS).logits)
    state = ml.unload(model).state_dict()
    assert [model.get_submodule(name) for name in OUTPUTS] == layers and list(state) == list(there.state_dict())
    assert all(torch.equal(state[key], tensor) for key, tensor in there.state_dict().items())


@pytest.mark.parametrize("method", OURS)
def test_merged_gpt2_is_saved_and_read_by_transformers(method, tmp_path):
    """W + dWᵀ, in a Conv1D, also where W was in four bits: a square layer would be read transposed without a word."""
    model = stirred(ml.adapt(build("GPT-2"), OURS[method]))
    said, sums = model(IDS).logits, {name: layer.base.weight + layer.delta_weight() for name, layer in ml.adapters(model)}
    drawn = torch.get_rng_state()
    ml.merge(model)
    assert torch.equal(torch.get_rng_state(), drawn)
    assert all(type(model.get_submodule(name)) is Conv1D and torch.equal(model.get_submodule(name).weight, W.T) for name, W in sums.items())
    assert (model(IDS).logits - said).abs().max() < 1e-12 * said.abs().max() < said.abs().max() and not any(p.requires_grad for p in model.parameters())
    kinds = [{key: (t.shape, t.dtype) for key, t in one.state_dict().items()} for one in (model, first("GPT-2"))]
    assert kinds[0] == kinds[1]
    model.save_pretrained(tmp_path)
    read = transformers.GPT2LMHeadModel.from_pretrained(tmp_path, dtype=torch.float64).eval()
    assert torch.equal(read(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize("config", CONFIGS)
def test_merged_weights_are_pefts(config, tmp_path):
    dtype, tolerance = (torch.float32, 1e-5) if config == "PiSSA" else (torch.float64, 1e-13)
    theirs = stirred(peft.get_peft_model(build("GPT-2", dtype), CONFIGS[config](target_modules=MODELS["GPT-2"][1])))
    theirs.save_pretrained(tmp_path)
    merged, peers = ml.merge(ml.load_adapter(build("GPT-2", dtype), tmp_path)).state_dict(), theirs.merge_and_unload().state_dict()
    assert merged.keys() == peers.keys() and max((merged[key] - peers[key]).abs().max().item() for key in merged) < tolerance


def test_merging_into_another_type():
    model = stirred(ml.adapt(build("GPT-2", torch.bfloat16), ml.LoRA(3)))
    sums = {name: layer.base.weight.float() + layer.delta_weight() for name, layer in ml.adapters(model)}
    merged = ml.merge(copy.deepcopy(model), dtype=torch.float32)
    assert {p.dtype for p in merged.parameters()} == {torch.float32}
    assert all(torch.equal(merged.get_submodule(name).weight.T, W) for name, W in sums.items())
    assert all(torch.equal(ml.merge(copy.deepcopy(model)).get_submodule(name).weight.T, W.bfloat16()) for name, W in list(sums.items())[:1])


def test_gpt2_in_four_bits_is_what_transformers_and_bitsandbytes_make_of_it(tmp_path):
    pytest.importorskip("bitsandbytes")
    build("GPT-2", torch.float32).save_pretrained(tmp_path)
    theirs = transformers.GPT2LMHeadModel.from_pretrained(tmp_path, device_map="cpu", quantization_config=transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4"))
    ours = ml.quantize(build("GPT-2", torch.float32), double=False)
    for name in OUTPUTS:
        layer, weight = ours.get_submodule(name), theirs.get_submodule(name).weight
        assert type(layer) is ml.NF4Linear and (layer.out_features, layer.in_features) == tuple(weight.quant_state.shape)
        assert torch.equal(layer.codes, weight.data.flatten()) and torch.equal(layer.scales, weight.quant_state.absmax)


def test_what_was_a_conv1d_is_one_again_after_four_bits(tmp_path):
    """quantize, adapt, merge into four bits, adapt, save, load on the quantized and on the dense base, merge."""
    model = ml.quantize(build("GPT-2"))
    with pytest.warns(UserWarning, match="merging into four bits"):
        ml.merge_nf4(stirred(ml.adapt(model, ml.LoRA(3))))
    said = stirred(ml.adapt(copy.deepcopy(model), ml.LoRA(3, alpha=5)))
    ml.save_adapter(said, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["fan_in_fan_out"] is True
    loaded = ml.load_adapter(copy.deepcopy(model), tmp_path)
    assert torch.equal(loaded(IDS).logits, said(IDS).logits)
    on_dense = ml.load_adapter(build("GPT-2"), tmp_path, any_base=True)
    assert all(torch.equal(layer.B, said.get_submodule(name).B) for name, layer in ml.adapters(on_dense))
    merged = ml.merge(loaded)
    assert {type(merged.get_submodule(name)) for name in OUTPUTS} == {Conv1D} and (merged(IDS).logits - said(IDS).logits).abs().max() < 1e-10


def test_a_run_on_gpt2_that_was_stopped_goes_on_bit_for_bit(tmp_path, capsys):
    def stopping(step):
        if step == 2:
            raise KeyboardInterrupt
        return batches(step)

    whole, model = build("GPT-2", torch.float32), build("GPT-2", torch.float32)
    tuned(whole, ml.DoRA(3), steps=4)
    with pytest.raises(KeyboardInterrupt):
        ml.finetune(model, ml.DoRA(3), stopping, 4, 0.02, checkpoint=tmp_path / "c.pt", progress=False)
    model = build("GPT-2", torch.float32)
    tuned(model, ml.DoRA(3), steps=4, checkpoint=tmp_path / "c.pt")
    assert "resumed at step 2" in capsys.readouterr().out
    assert all(torch.equal(p, whole.get_parameter(name)) for name, p in model.named_parameters()) and base_fingerprint(model) == base_fingerprint(whole)


@pytest.mark.parametrize("method", [ml.LoRA(3), ml.DoRA(3), ml.QLoRA(3), ml.FullFineTuning()], ids=lambda method: type(method).__name__)
def test_what_gpt2_costs_is_what_the_formulas_say(method):
    model = ml.adapt(build("GPT-2", torch.float32), method)
    lines = ledger(model, 33, lambda: model(IDS))
    assert lines == predicted(model, 33, lambda: model(IDS)) and [line.name for line in lines[:8]] == OUTPUTS
    assert {name for group in readers(model, lambda: model(IDS)) for name in group} >= set(OUTPUTS)


def test_intruders_of_gpt2_are_those_of_its_twin():
    before, after = build("GPT-2"), build("GPT-2")
    with torch.no_grad():
        for name in OUTPUTS[::3]:                                          # shapes that differ from their transpose, and one that does not
            after.get_submodule(name).weight[1] += 30
    found = intruders(after, before)
    assert found == intruders(twin(after), twin(before)) > 0
