"""Shapes of real models: against transformers, which builds them without numbers, and against known figures."""

import json
import re
from collections import Counter

import pytest
import torch
from torch import nn

import minilora as ml
from minilora.evidence.formulas import extrapolated
from minilora.evidence.ledger import ledger, predicted
from minilora.evidence.shapes import KNOWN, from_config, shape

transformers = pytest.importorskip("transformers")
SMALL = {"vocab_size": 100, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3, "num_attention_heads": 4}
GROUPED = SMALL | {"num_attention_heads": 6, "num_key_value_heads": 2}
ODD_HEADS = GROUPED | {"head_dim": 10}                        # 6 heads of 10 in a width of 48
GPT = {"vocab_size": 100, "n_embd": 48, "n_layer": 3, "n_head": 4, "n_positions": 64}
OPT = {"vocab_size": 100, "hidden_size": 48, "ffn_dim": 80, "num_hidden_layers": 3, "num_attention_heads": 4, "max_position_embeddings": 64}
FALCON = {"vocab_size": 100, "hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 6}
BLOOM = {"vocab_size": 100, "hidden_size": 48, "n_layer": 3, "n_head": 4}
BERT = SMALL | {"max_position_embeddings": 64, "type_vocab_size": 5}
T5 = {"vocab_size": 100, "d_model": 48, "d_kv": 10, "d_ff": 80, "num_layers": 3, "num_heads": 6, "relative_attention_num_buckets": 7}
UNTIED, TIED, BIASES = {"tie_word_embeddings": False}, {"tie_word_embeddings": True}, {"attention_bias": True, "mlp_bias": True}
CONFIGS = {name: getattr(transformers, f"{family}Config")(**keys) for name, family, keys in [
    ("llama", "Llama", SMALL | {"num_key_value_heads": 2}), ("llama, biases", "Llama", SMALL | BIASES),
    ("llama, tied", "Llama", SMALL | TIED | {"head_dim": 16}),
    ("granite", "Granite", GROUPED), ("granite, attention", "Granite", GROUPED | TIED | {"attention_bias": True}),
    ("granite, MLP", "Granite", GROUPED | {"mlp_bias": True}),
    ("smollm3", "SmolLM3", GROUPED), ("smollm3, biases", "SmolLM3", GROUPED | UNTIED | BIASES),
    ("mistral", "Mistral", ODD_HEADS), ("mistral, tied, no biases whatever is said", "Mistral", GROUPED | TIED | BIASES),
    ("qwen2", "Qwen2", GROUPED), ("qwen2, tied, its biases whatever is said", "Qwen2", GROUPED | TIED | {"attention_bias": False, "mlp_bias": True}),
    ("qwen3", "Qwen3", ODD_HEADS), ("qwen3, biases", "Qwen3", ODD_HEADS | TIED | {"attention_bias": True}),
    ("gemma", "Gemma", ODD_HEADS), ("gemma, biases", "Gemma", ODD_HEADS | UNTIED | {"attention_bias": True}),
    ("gemma2", "Gemma2", ODD_HEADS), ("gemma2, biases", "Gemma2", ODD_HEADS | UNTIED | {"attention_bias": True}),
    ("phi", "Phi", GROUPED), ("phi, tied", "Phi", GROUPED | TIED), ("phi, odd heads", "Phi", ODD_HEADS | {"qk_layernorm": True}),
    ("phi3", "Phi3", GROUPED), ("phi3, tied", "Phi3", ODD_HEADS | TIED),
    ("glm", "Glm", ODD_HEADS), ("glm, no bias", "Glm", ODD_HEADS | TIED | {"attention_bias": False}),
    ("glm4", "Glm4", ODD_HEADS), ("glm4, no bias", "Glm4", ODD_HEADS | TIED | {"attention_bias": False}),
    ("gpt_neox", "GPTNeoX", SMALL | {"hidden_size": 64}), ("gpt_neox, tied", "GPTNeoX", SMALL | TIED | {"hidden_size": 64, "attention_bias": False}),
    ("falcon, old", "Falcon", FALCON | {"multi_query": False, "bias": True, "parallel_attn": False}), ("falcon, 7b", "Falcon", FALCON | UNTIED),
    ("falcon, 7b wide", "Falcon", FALCON | {"ffn_hidden_size": 80, "num_kv_heads": 3, "num_ln_in_parallel_attn": 2}),
    ("falcon, 40b", "Falcon", FALCON | {"new_decoder_architecture": True, "num_kv_heads": 2}),
    ("falcon, 11b", "Falcon", FALCON | {"new_decoder_architecture": True, "num_kv_heads": 3, "num_ln_in_parallel_attn": 1,
                                        "ffn_hidden_size": 80, "bias": True}),
    ("falcon, both", "Falcon", FALCON | {"new_decoder_architecture": True, "parallel_attn": False}),
    ("bloom", "Bloom", BLOOM), ("bloom, untied", "Bloom", BLOOM | UNTIED),
    ("gpt2", "GPT2", GPT), ("gpt2, untied", "GPT2", GPT | UNTIED | {"n_inner": 80}), ("gpt_bigcode", "GPTBigCode", GPT),
    ("gpt_bigcode, heads of their own", "GPTBigCode", GPT | UNTIED | {"multi_query": False, "n_inner": 80}),
    ("gptj", "GPTJ", GPT | {"rotary_dim": 4}), ("gptj, tied", "GPTJ", GPT | TIED | {"rotary_dim": 4, "n_inner": 80}),
    ("opt", "OPT", OPT), ("opt, narrow", "OPT", OPT | {"word_embed_proj_dim": 32, "do_layer_norm_before": False}),
    ("opt, bare", "OPT", OPT | UNTIED | {"word_embed_proj_dim": 32, "enable_bias": False, "layer_norm_elementwise_affine": False}),
    ("opt, no last norm", "OPT", OPT | {"_remove_final_layer_norm": True}),
    ("bert", "Bert", BERT), ("bert, untied", "Bert", BERT | UNTIED), ("roberta", "Roberta", BERT), ("roberta, untied", "Roberta", BERT | UNTIED),
    ("t5", "T5", T5), ("t5, gated", "T5", T5 | {"feed_forward_proj": "gated-gelu", "num_decoder_layers": 2}),
]}

CANNOT_RUN = ("phi, odd heads", "falcon, 7b wide", "falcon, both")        # transformers builds them, and its forward pass fails


def built(config):
    """transformers' own model of that config, without numbers."""
    config.pad_token_id = 0                                   # a family's own may lie beyond a small vocabulary
    kind = transformers.AutoModelForSeq2SeqLM if config.is_encoder_decoder else transformers.AutoModelForCausalLM
    with torch.device("meta"):
        return kind.from_config(config)


def parameters(model):
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", CONFIGS)
def test_parameters_and_targets_are_transformers(name, tmp_path):
    """Every linear layer of the blocks is of one kind, that with the longest name it ends in; so each kind has its count, out, in and bias."""
    CONFIGS[name].save_pretrained(tmp_path)
    found, model = shape(str(tmp_path / "config.json")), built(CONFIGS[name])
    assert found.parameters == parameters(model)
    layers = Counter()
    for path, module in model.named_modules():
        if re.search(r"\.\d+\.", path) and isinstance(module, (nn.Linear, transformers.pytorch_utils.Conv1D)):
            kind = max((kind.name for kind in found.kinds if path.endswith("." + kind.name)), key=len)
            out, into = module.weight.shape if isinstance(module, nn.Linear) else module.weight.T.shape
            layers[kind, out, into, module.bias is not None] += 1
    assert layers == {(kind.name, kind.out, kind.into, kind.bias): kind.count for kind in found.kinds}
    assert shape(str(tmp_path)) == found


@pytest.mark.parametrize("name", [name for name in CONFIGS if name not in CANNOT_RUN])
def test_layers_that_read_one_tensor_are_transformers(name, tmp_path):
    """Their model with numbers, run: for every set of kinds, how many numbers of a token are read again."""
    CONFIGS[name].save_pretrained(tmp_path)
    CONFIGS[name].pad_token_id = 0
    found = shape(str(tmp_path))
    kind = transformers.AutoModelForSeq2SeqLM if CONFIGS[name].is_encoder_decoder else transformers.AutoModelForCausalLM
    model, read, held = kind.from_config(CONFIGS[name]).eval(), {}, []
    for path, module in model.named_modules():
        if re.search(r"\.\d+\.", path) and isinstance(module, (nn.Linear, transformers.pytorch_utils.Conv1D)):
            one = max((kind for kind in found.kinds if path.endswith("." + kind.name)), key=lambda kind: len(kind.name))

            def note(module, inputs, one=one):
                held.append(inputs[0])
                read.setdefault(inputs[0].data_ptr(), []).append(one)

            module.register_forward_pre_hook(note)
    ids = torch.arange(1, 6)[None]
    model(ids, **({"decoder_input_ids": ids} if CONFIGS[name].is_encoder_decoder else {}))
    for kinds in (found.kinds, found.kinds[:1], found.kinds[1:3], found.kinds[::2], found.kinds[-3:]):
        again = sum(kind.into for group in read.values() for kind in [kind for kind in group if kind in kinds][1:])
        assert found.read_again(kinds) == again, [kind.name for kind in kinds]


@pytest.mark.parametrize("name", CONFIGS)
def test_a_key_that_is_left_out_is_what_transformers_takes(name, tmp_path):
    """Every key of the file in turn: without it the same model as theirs, or refused by its name."""
    derived = ("transformers_version", "layer_types", "no_rope_layers", "is_gated_act", "dense_act_fn", "scale_decoder_outputs")
    config = {key: value for key, value in CONFIGS[name].to_diff_dict().items() if key not in derived}
    for key in config.keys() - {"model_type", "rope_parameters", "rotary_dim"}:
        (tmp_path / "config.json").write_text(json.dumps({other: value for other, value in config.items() if other != key}))
        try:
            found = shape(str(tmp_path))
        except ValueError as error:
            assert f"{key!r} is missing or no number" in str(error)
        else:
            assert found.parameters == parameters(built(transformers.AutoConfig.from_pretrained(tmp_path))), key


CHATGLM2 = {"model_type": "chatglm", "hidden_size": 4096, "ffn_hidden_size": 13696, "num_layers": 28, "kv_channels": 128, "num_attention_heads": 32,
            "multi_query_attention": True, "multi_query_group_num": 2, "padded_vocab_size": 65024, "add_qkv_bias": True, "add_bias_linear": False}
SMALL_CHATGLM2 = {"model_type": "chatglm", "hidden_size": 48, "ffn_hidden_size": 80, "num_layers": 3, "kv_channels": 10, "num_attention_heads": 6,
                  "multi_query_attention": True, "multi_query_group_num": 2, "padded_vocab_size": 100}


@pytest.mark.parametrize("config, total", [
    (CHATGLM2, 6_243_584_000), (CHATGLM2 | {"num_layers": 40, "padded_vocab_size": 151552}, 9_399_951_360),
    ({"model_type": "falcon", "hidden_size": 4544, "num_hidden_layers": 32, "num_attention_heads": 71, "vocab_size": 65024}, 6_921_720_704),
    ({"model_type": "bloom", "n_embed": 1024, "n_layer": 24, "num_attention_heads": 16, "vocab_size": 250880}, 559_214_592),
    ({"model_type": "gptj", "n_embd": 4096, "n_layer": 28, "n_head": 16, "vocab_size": 50400, "tie_word_embeddings": False}, 6_050_882_784),
    ({"model_type": "bert", "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "vocab_size": 30522}, 109_514_298),
    ({"model_type": "t5", "d_model": 768, "d_ff": 3072, "num_layers": 12, "num_heads": 12, "vocab_size": 32128}, 222_903_552),
    ({"model_type": "t5", "d_model": 768, "d_ff": 2048, "num_layers": 12, "num_heads": 12, "vocab_size": 32128, "feed_forward_proj": "gated-gelu",
      "tie_word_embeddings": False}, 247_577_856),
], ids=["ChatGLM2-6B", "GLM-4-9B", "Falcon-7B", "BLOOM-560M", "GPT-J-6B", "BERT base", "T5 base", "Flan-T5 base"])
def test_published_sizes(config, total):
    assert from_config("it", config).parameters == total


@pytest.mark.parametrize("bias", [False, True])
def test_chatglm2_is_transformers_glm_in_other_words(bias):
    """Their own code is not in transformers; Glm is the same model, q, k and v apart."""
    model = built(transformers.GlmConfig(**ODD_HEADS, attention_bias=bias))
    found = from_config("it", SMALL_CHATGLM2 | {"add_qkv_bias": bias})
    assert found.parameters == parameters(model)
    block = model.model.layers[0]
    there = (sum(layer.out_features for layer in (block.self_attn.q_proj, block.self_attn.k_proj, block.self_attn.v_proj)), *(
        layer.out_features for layer in (block.self_attn.o_proj, block.mlp.gate_up_proj, block.mlp.down_proj)))
    assert tuple(kind.out for kind in found.kinds) == there and [kind.into for kind in found.kinds] == [48, 60, 48, 80]
    assert [(kind.name, kind.count, kind.bias) for kind in found.kinds] == [
        ("query_key_value", 3, bias), ("dense", 3, False), ("dense_h_to_4h", 3, False), ("dense_4h_to_h", 3, False)]


def test_chatglm2s_switches():
    """What each adds, layer by layer, to three layers of 6 heads of 10 and 2 keys in a width of 48."""
    plain = from_config("it", SMALL_CHATGLM2).parameters
    everywhere = 3 * (100 + 48 + 160 + 48)
    for changes, more in (
        ({"multi_query_attention": False}, 3 * 80 * 48), ({"add_bias_linear": True}, everywhere), ({"add_qkv_bias": True}, 3 * 100),
        ({"add_bias_linear": True, "add_qkv_bias": True}, everywhere), ({"rmsnorm": False}, 7 * 48), ({"post_layer_norm": False}, -48),
    ):
        assert from_config("it", SMALL_CHATGLM2 | changes).parameters == plain + more


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
    (queries,), q_proj = shape("llama-7b").targets(["q_proj"]), extrapolated(shape("llama-7b"), ml.FullFineTuning(), ["q_proj"])[-1]
    assert q_proj.trainable == queries.parameters and q_proj.frozen == shape("llama-7b").parameters - queries.parameters


def test_a_rank_above_the_smaller_side_is_refused():
    assert extrapolated(shape("llama-7b"), ml.LoRA(4096), ["down_proj"])[-1].trainable == 32 * 4096 * (11008 + 4096)
    with pytest.raises(ValueError, match=r"rank 4097 is above min\(in, out\) of down_proj, 11008 -> 4096"):
        extrapolated(shape("llama-7b"), ml.LoRA(4097), ["down_proj"])


@pytest.mark.parametrize("targets", [None, ["q_proj", "v_proj", "down_proj"]])
@pytest.mark.parametrize("base", ["fp32", "nf4"])
@pytest.mark.parametrize("method", [ml.LoRA(3), ml.VeRA(9), ml.AdaLoRA(4, 2), ml.DoRA(3, dropout=0.1), ml.PiSSA(3), ml.LoRAFA(3)])
def test_extrapolation_is_the_ledger_of_a_model_that_is_here(method, base, targets):
    """A Llama of shapes that are not square, in float32: the same totals. NF4 beside float32, so of 4-bit bytes only the adapters'."""
    config = CONFIGS["llama"]
    torch.manual_seed(0)
    model, ids = transformers.LlamaForCausalLM(config), torch.zeros(3, 11, dtype=torch.long)
    if base == "nf4":
        ml.quantize(model)
    ml.adapt(model, method, targets)
    there = from_config("here", config.to_dict())
    *_, total = extrapolated(there, method, targets, tokens=33, base=base)
    *_, here = predicted(model, 33, lambda: model(ids))
    assert ledger(model, 33, lambda: model(ids))[-1] == here
    assert (total.trainable, total.frozen, total.optimizer_bytes, total.forward_flops) == (here.trainable, here.frozen, here.optimizer_bytes, here.forward_flops)
    if base == "fp32":
        assert total.alive_bytes == here.alive_bytes and total.frozen_bytes == here.frozen_bytes - not_counted(model)


@pytest.mark.parametrize("targets", [None, ["q_proj"], ["q_proj", "k_proj", "up_proj"]])
@pytest.mark.parametrize("method", [ml.QLoRA(3), ml.QLoRA(3, block_size=4096, double=False), ml.LoftQ(3), ml.LoftQ(3, double=True), ml.QPiSSA(3, block_size=128)])
def test_a_method_with_a_base_of_its_own_is_priced_as_adapt_makes_it(method, targets):
    """In its own blocks, its scales quantized again or not, and only where it adapts: in 16 bits, all the weights to the byte."""
    config = transformers.LlamaConfig(**SMALL, num_key_value_heads=2, dtype="float16")
    model = transformers.LlamaForCausalLM(config).half()
    ml.adapt(model, method, targets)
    total = extrapolated(from_config("here", config.to_dict()), method, targets, tokens=33, base="nf4")[-1]
    here = predicted(model, tokens=33)[-1]
    assert (total.trainable, total.frozen, total.frozen_bytes) == (here.trainable, here.frozen, here.frozen_bytes - not_counted(model))


def not_counted(model):
    """Buffers of the model itself, which are no weights."""
    return sum(b.nbytes for name, b in model.named_buffers() if "inv_freq" in name)


def test_what_is_not_known_is_refused(tmp_path):
    llama, there = KNOWN["llama-7b"], tmp_path / "config.json"
    without = {key: value for key, value in llama.items() if key != "intermediate_size"}
    for content, message in (
        *((text, "no model_type") for text in (b"{}", b"[1]", b"7", b"null", b"not json", b"[" * 200_000, b'{"model_type": ' + b"9" * 5000 + b"}",
                                               b'{"model_type": ["llama"]}', b"\xff\xfe{")),
        ({"model_type": "mamba"}, "'mamba' is not known here; known are llama"),
        ({"model_type": "llava", "text_config": {"hidden_size": 8}}, "'llava' with a text_config is a model of several parts"),
        (CHATGLM2 | {"vision_config": {"hidden_size": 8}}, "'chatglm' with a vision_config"),
        (without, "'intermediate_size' is missing or no number"),
        ({"model_type": "chatglm", "hidden_size": 8, "num_layers": 2}, "'inner_hidden_size' is missing"),
        ({"model_type": "chatglm", "hidden_size": 8, "num_layers": 2, "padded_vocab_size": 9}, "'ffn_hidden_size' is missing"),
        (llama | {"num_attention_heads": 31}, "'num_attention_heads' must divide 'hidden_size', got 31 and 4096"),
        (llama | {"tie_word_embeddings": "no"}, "'tie_word_embeddings' must be true or false, got \"no\""),
        (llama | {"mlp_bias": None}, "'mlp_bias' must be true or false, got null"),
        (KNOWN["gpt2"] | {"add_cross_attention": True}, "'add_cross_attention' is true"),
        (CONFIGS["t5"].to_dict() | {"feed_forward_proj": 1}, "'feed_forward_proj' must be a name such as gated-gelu, got 1"),
    ):
        there.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
        with pytest.raises(ValueError, match=f"^{there}: .*{message}"):
            shape(str(there))
    there.write_bytes(b"\xef\xbb\xbf" + json.dumps(llama).encode())           # with a byte order mark, as some editors write it
    assert shape(str(there)).parameters == shape("llama-7b").parameters
    there.unlink()
    with pytest.raises(ValueError, match=f"^{tmp_path}: a folder without a config.json$"):
        shape(str(tmp_path))
    with pytest.raises(ValueError, match="no shape named 'gpt-9' and no such file; known are chatglm-6b, llama-7b"):
        shape("gpt-9")
    with pytest.raises(ValueError, match="llama-7b has no linear layers named 'qkv'; it has down_proj"):
        extrapolated(shape("llama-7b"), ml.LoRA(8), ["qkv"])
    with pytest.raises(ValueError, match="rank 5000 is above"):
        extrapolated(shape("llama-7b"), ml.LoRA(5000))
    with pytest.raises(ValueError, match="must move W"):
        extrapolated(shape("llama-7b"), ml.DeltaLoRA(8), base="nf4")


@pytest.mark.parametrize("name", [name for name in CONFIGS if "," not in name] + ["falcon, 11b", "chatglm", "chatglm2"])
def test_sizes_that_are_no_sizes_are_refused_by_name(name, tmp_path):
    """Whatever a file has at a key whose value counts: one line which names both, or, where the key may be null, what it is without it."""
    config = {"chatglm": KNOWN["chatglm-6b"], "chatglm2": CHATGLM2}.get(name) or CONFIGS[name].to_dict()
    whole = from_config("it", config)

    def refused(key, value):
        (tmp_path / "config.json").write_text(json.dumps(config | {key: value}))
        try:
            found = shape(str(tmp_path))
        except ValueError as error:
            text = str(error)
            assert text.startswith(f"{tmp_path / 'config.json'}: '") and f"'{key}'" in text
            assert len(text) < len(str(tmp_path)) + 160 and "\n" not in text
            return True
        assert (found.kinds, found.rest) == (whole.kinds, whole.rest) or value is None
        return False

    numbers = [key for key, value in config.items() if type(value) is int and refused(key, "4\n" * 99)]
    assert len(numbers) >= 3
    for key in numbers:
        assert all(refused(key, value) for value in ("", "4096", 4.5, 64.0, 0, -4, True, False, [4], {}, 2**31, 10**4000, float("inf"), float("nan")))
        refused(key, None)
    assert any(refused(key, None) for key in numbers)
    for key in (key for key, value in config.items() if type(value) is bool and refused(key, "true")):
        assert all(refused(key, value) for value in ("", 1, 0, None, [True]))
