"""Shapes of real models: against transformers, which builds them without numbers, and against known figures."""

import json

import pytest
import torch

import minilora as ml
from minilora.measure import extrapolated, ledger, predicted
from minilora.shapes import KNOWN, shape

transformers = pytest.importorskip("transformers")
SMALL = {"vocab_size": 100, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3, "num_attention_heads": 4}
CONFIGS = {
    "llama": transformers.LlamaConfig(**SMALL, num_key_value_heads=2), "llama, biases": transformers.LlamaConfig(**SMALL, attention_bias=True, mlp_bias=True),
    "llama, tied": transformers.LlamaConfig(**SMALL, tie_word_embeddings=True, head_dim=16), "mistral": transformers.MistralConfig(**SMALL, num_key_value_heads=2),
    "qwen2": transformers.Qwen2Config(**SMALL, num_key_value_heads=2), "qwen3": transformers.Qwen3Config(**SMALL, num_key_value_heads=2, head_dim=16),
    "gemma": transformers.GemmaConfig(**SMALL, num_key_value_heads=1, head_dim=16),
    "gpt_neox": transformers.GPTNeoXConfig(**SMALL), "gpt2": transformers.GPT2Config(vocab_size=100, n_embd=48, n_layer=3, n_head=4, n_positions=64),
    "opt": transformers.OPTConfig(vocab_size=100, hidden_size=48, ffn_dim=80, num_hidden_layers=3, num_attention_heads=4, max_position_embeddings=64, word_embed_proj_dim=48),
    "opt, narrow": transformers.OPTConfig(vocab_size=100, hidden_size=48, ffn_dim=80, num_hidden_layers=3, num_attention_heads=4, max_position_embeddings=64,
                                          word_embed_proj_dim=32),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_parameters_and_targets_are_transformers(name, tmp_path):
    CONFIGS[name].save_pretrained(tmp_path)
    found = shape(str(tmp_path / "config.json"))
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(CONFIGS[name])
    assert found.parameters == sum(p.numel() for p in model.parameters())
    for kind in found.kinds:
        layers = [m for n, m in model.named_modules() if n.endswith("." + kind.name) and hasattr(m, "weight")]
        assert len(layers) == kind.count and all({*m.weight.shape} == {kind.out, kind.into} and (m.bias is not None) == kind.bias for m in layers)
    assert shape(str(tmp_path)) == found


@pytest.mark.parametrize("name, parameters", [("chatglm-6b", 6_173_286_400), ("llama-7b", 6_738_415_616), ("llama-13b", 13_015_864_320),
                                              ("llama-3-8b", 8_030_261_248), ("gpt2", 124_439_808)])
def test_known_sizes(name, parameters):
    assert shape(name).parameters == shape(name.upper()).parameters == parameters


@pytest.mark.parametrize("method, targets, trained", [
    (ml.LoRA(8), ["query_key_value"], 3_670_016), (ml.LoRA(8), None, 14_680_064), (ml.LoRA(4), ["query_key_value"], 1_835_008),
    (ml.LoRAFA(8), ["query_key_value"], 2_752_512), (ml.VeRA(256), ["query_key_value"], 351_232), (ml.DoRA(8), ["query_key_value"], 4_014_080),
    (ml.AdaLoRA(12), ["query_key_value"], 5_505_360),
])
def test_chatglms_adapters(method, targets, trained):
    *_, total = extrapolated(shape("chatglm-6b"), method, targets)
    assert total.trainable == trained and total.trained_bytes == 4 * trained
    assert total.optimizer_bytes > 8 * trained and total.gradient_bytes == 4 * trained


def test_chatglms_weights():
    fp16, nf4 = (extrapolated(shape("chatglm-6b"), ml.LoRA(8), ["query_key_value"], base=base)[-1] for base in ("fp16", "nf4"))
    assert fp16.frozen == 6_173_286_400 and fp16.frozen_bytes == 2 * 6_173_286_400            # 11.50 GiB
    assert nf4.frozen == fp16.frozen and nf4.frozen_bytes == pytest.approx(3.980e9, rel=5e-4)
    assert extrapolated(shape("chatglm-6b"), ml.FullFineTuning())[-1].trainable == 6_173_286_400


@pytest.mark.parametrize("base", ["fp32", "nf4"])
@pytest.mark.parametrize("method", [ml.LoRA(3), ml.VeRA(9), ml.AdaLoRA(4, 2), ml.DoRA(3, dropout=0.1), ml.PiSSA(3), ml.LoRAFA(3)])
def test_extrapolation_is_the_ledger_of_a_model_that_is_here(method, base):
    """A Llama of shapes that are not square, in float32: the same totals. NF4 beside float32, so of 4-bit bytes only the adapters'."""
    config = CONFIGS["llama"]
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config)
    if base == "nf4":
        ml.quantize(model)
    ml.adapt(model, method)
    there = shape_of(config)
    *_, total = extrapolated(there, method, tokens=33, base=base)
    *_, here = predicted(model, tokens=33)
    assert ledger(model, tokens=33)[-1] == here
    assert (total.trainable, total.frozen, total.optimizer_bytes, total.forward_flops) == (here.trainable, here.frozen, here.optimizer_bytes, here.forward_flops)
    if base == "fp32":
        buffers = sum(b.nbytes for name, b in model.named_buffers() if "inv_freq" in name)
        assert total.alive_bytes == here.alive_bytes and total.frozen_bytes == here.frozen_bytes - buffers


def shape_of(config):
    from minilora.shapes import FAMILIES
    return FAMILIES[config.model_type]("here", config.to_dict())


def test_what_is_not_known_is_refused(tmp_path):
    for content, message in (("{}", "no model_type"), ("[1]", "no model_type"), ("not json", "no model_type"), ('{"model_type": "mamba"}', "'mamba' is not known here; known are llama"),
                             ('{"model_type": "llama", "hidden_size": 5}', "intermediate_size"), (json.dumps(KNOWN["llama-7b"] | {"num_hidden_layers": "x"}), "no number")):
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(ValueError, match=message):
            shape(str(tmp_path / "config.json"))
    with pytest.raises(ValueError, match="no shape named 'gpt-9' and no such file; known are chatglm-6b, llama-7b"):
        shape("gpt-9")
    with pytest.raises(ValueError, match="llama-7b has no linear layers named 'qkv'; it has down_proj"):
        extrapolated(shape("llama-7b"), ml.LoRA(8), ["qkv"])
    with pytest.raises(ValueError, match="rank 5000 is above"):
        extrapolated(shape("llama-7b"), ml.LoRA(5000))
    with pytest.raises(ValueError, match="must move W"):
        extrapolated(shape("llama-7b"), ml.DeltaLoRA(8), base="nf4")
