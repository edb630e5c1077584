"""Models of transformers whose blocks are more than plain Linears: what is left out is said, what would be passed by is refused."""

import warnings

import pytest
import torch

import minilora as ml

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

SMALL = dict(vocab_size=64, hidden_size=24, intermediate_size=32, num_hidden_layers=2, num_attention_heads=3, num_key_value_heads=3)
GPT2 = dict(vocab_size=65, n_positions=64, n_embd=24, n_layer=2, n_head=3)
AUDIO = dict(hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=32, conv_dim=(16,), conv_stride=(5,), conv_kernel=(10,),
             num_feat_extract_layers=1, num_conv_pos_embedding_groups=4, apply_spec_augment=False)
IDS = torch.arange(32).view(2, 16)


def build(name, **options):
    """A small model by the name of its class; its configuration's is the same up to what it is for."""
    torch.manual_seed(0)
    kind = getattr(transformers, name)
    return kind(kind.config_class(**options))


def labels(model, x, y):
    return model(input_ids=x, labels=y).loss


def hidden(model, x, y):
    return model(x)[0].square().mean()


def tune(model, method=ml.LoRA(2), loss_fn=labels, x=IDS, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return ml.finetune(model, method, lambda step: (x, x), 2, 0.01, loss_fn=loss_fn, progress=False, **options)


@pytest.mark.parametrize("name", ["GPT2LMHeadModel", "GPT2DoubleHeadsModel", "GPT2ForSequenceClassification", "OpenAIGPTLMHeadModel",
                                  "ImageGPTForImageClassification", "DecisionTransformerModel"])
def test_conv1d_is_adapted_and_put_in_four_bits_and_the_head_is_not(name):
    """test_real_models_peft.py has the rest."""
    options = GPT2 if name != "DecisionTransformerModel" else dict(hidden_size=24, n_layer=2, n_head=3, max_ep_len=16)
    model = build(name, **options)
    blocks = {layer: m for layer, m in model.named_modules() if isinstance(m, transformers.pytorch_utils.Conv1D)}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ml.adapt(model, ml.LoRA(2))
    assert [layer for layer, _ in ml.adapters(model)] == list(blocks) and len(blocks) == 8
    assert all(model.get_submodule(layer).delta_weight().T.shape == m.weight.shape for layer, m in blocks.items())
    ml.unload(model)
    assert all(model.get_submodule(layer) is m for layer, m in blocks.items())
    ml.quantize(model)
    assert [layer for layer, m in model.named_modules() if isinstance(m, ml.NF4Linear)] == list(blocks)


@pytest.mark.parametrize("name, options, said", [
    ("MixtralForCausalLM", {"num_local_experts": 4}, r"\d\d% of the blocks' weights lie outside nn.Linear.*layers.\*.mlp.experts.gate_up_proj"),
    ("OlmoeForCausalLM", {"num_experts": 8}, r"\d\d% of .*layers.\*.mlp.experts.gate_up_proj"),
    ("PhimoeForCausalLM", {"num_local_experts": 4}, r"\d\d% of .*left out is model.layers.\*.mlp.router: PhimoeTopKRouter is an nn.Linear with a forward"),
    ("Qwen2MoeForCausalLM", {"num_experts": 4, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16},
     r"left out is model.layers.\*.mlp.shared_expert_gate: rank 2 is above min\(in, out\) of a 24 -> 1 layer"),
])
def test_mixtures_say_what_is_left_out_and_train(name, options, said):
    model = build(name, **SMALL | options)
    with pytest.warns(UserWarning, match=said):
        ml.adapt(model, ml.LoRA(2))
    tune(model)
    assert all(layer.B.any() for _, layer in ml.adapters(model))
    merged_from = model.eval()(input_ids=IDS).logits
    assert torch.allclose(ml.merge(model)(input_ids=IDS).logits, merged_from, atol=1e-5)


@pytest.mark.parametrize("name, target, what", [("PhimoeForCausalLM", "router", "PhimoeTopKRouter"), ("Qwen2MoeForCausalLM", "shared_expert_gate", "rank 2 is above")])
def test_asked_for_by_name_they_are_refused(name, target, what):
    model = build(name, **SMALL)
    with pytest.raises(ValueError, match=f"layers.0.mlp.{target}: {what}"):
        ml.adapt(model, ml.LoRA(2), ["q_proj", target])
    assert not list(ml.adapters(model))


@pytest.mark.parametrize("name, options, batch", [
    ("WavLMModel", AUDIO, {"loss_fn": hidden, "x": torch.randn(2, 400)}),
    ("MambaForCausalLM", dict(vocab_size=64, hidden_size=24, num_hidden_layers=2, state_size=4), {}),
    ("FalconMambaForCausalLM", dict(vocab_size=64, hidden_size=24, num_hidden_layers=2, state_size=4), {}),
])
def test_adapters_whose_weight_is_read_past_them_are_named(name, options, batch):
    passed_by = r"attention.(k|v|q|out)_proj" if "WavLM" in name else r"layers.\*.mixer.dt_proj"
    with pytest.raises(ValueError, match=f"these adapters have no gradient: .*{passed_by}.*reads .weight past the adapter"):
        tune(build(name, **options), **batch)
    targets = ["intermediate_dense", "output_dense"] if "WavLM" in name else ["in_proj", "out_proj"]
    model = build(name, **options)
    tune(model, targets=targets, **batch)
    assert all(layer.B.any() for _, layer in ml.adapters(model))


def test_a_layer_that_is_dropped_at_random_is_no_fault():
    torch.manual_seed(1)
    tune(build("Wav2Vec2Model", **AUDIO | {"num_hidden_layers": 6, "layerdrop": 0.6}), loss_fn=hidden, x=torch.randn(2, 400))


@pytest.mark.parametrize("config", [peft.LoraConfig(r=2, target_modules=["q_proj"]), peft.LoraConfig(r=2, use_dora=True, target_modules=["q_proj"]),
                                    peft.VeraConfig(r=2, target_modules=["q_proj"])], ids=["lora", "dora", "vera"])
def test_a_model_that_peft_has_adapted_is_refused(config):
    inner = build("LlamaForCausalLM", **SMALL)
    wrapped = peft.get_peft_model(inner, config)
    for model in (wrapped, inner):
        for verb in (lambda: ml.adapt(model, ml.LoRA(2)), lambda: ml.adapt(model, ml.LoRA(2), ["k_proj"]), lambda: ml.quantize(model)):
            with pytest.raises(ValueError, match="adapted by PEFT already.*merge_and_unload"):
                verb()
    assert len(list(ml.adapters(ml.adapt(wrapped.merge_and_unload(), ml.LoRA(2))))) == 14


def test_bitsandbytes_layers_are_refused_by_name():
    bnb = pytest.importorskip("bitsandbytes")
    model = build("LlamaForCausalLM", **SMALL)
    for layer in model.model.layers:
        layer.mlp.up_proj = bnb.nn.Linear4bit(24, 32, bias=False)
    with pytest.raises(ValueError, match="layers.0.mlp.up_proj: Linear4bit is an nn.Linear with a forward of its own"):
        ml.adapt(model, ml.LoRA(2), ["up_proj"])
    with pytest.warns(UserWarning, match=r"left out is model.layers.\*.mlp.up_proj"):
        ml.adapt(model, ml.LoRA(2))


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "Qwen2ForCausalLM"])
def test_a_16_bit_model_merges_to_32_bits_and_still_runs(name):
    model = build(name, **SMALL).to(torch.bfloat16).eval()
    ml.adapt(model, ml.LoRA(2))
    for _, layer in ml.adapters(model):
        torch.nn.init.normal_(layer.B, std=0.05)
    adapted = model(IDS).logits.float()
    said = ml.merge(model, dtype=torch.float32)(IDS).logits
    assert said.dtype == torch.float32 and torch.allclose(said, adapted, atol=0.03)
