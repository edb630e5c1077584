"""A batch of several adapters beside PEFT's own (adapter_names, a loop over adapters), and in transformers' generate: Llama, GPT-2 with its Conv1D, T5.

float64, and the same logits to 1e-10.
"""

import copy
import functools

import peft
import pytest
import torch
import transformers

import minilora as ml
from minilora.scale.serving import add, remove, rows, serve

SMALL = dict(vocab_size=65, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
             max_position_embeddings=32)
GPT2 = dict(vocab_size=65, n_positions=32, n_embd=32, n_inner=48, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2)
T5 = dict(vocab_size=65, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0, eos_token_id=2)
MODELS = {
    "Llama": (lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL, attention_bias=True, bos_token_id=1, eos_token_id=2)),
              ["q_proj", "v_proj"], ["o_proj", "up_proj", "down_proj"]),
    "GPT-2": (lambda: transformers.GPT2LMHeadModel(transformers.GPT2Config(**GPT2)), ["c_attn"], ["c_attn", "c_fc", "mlp.c_proj"]),
    "T5": (lambda: transformers.T5ForConditionalGeneration(transformers.T5Config(**T5)), ["q", "v"], ["wi", "wo"]),
}
IDS = torch.randint(3, 65, (6, 9), generator=torch.Generator().manual_seed(5))
DECODERS = pytest.mark.parametrize("name", ["Llama", "GPT-2"])
pytestmark = pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to")


@functools.cache
def first(name):
    torch.manual_seed(0)
    model = MODELS[name][0]().double().eval()
    with torch.no_grad():
        for key, p in model.named_parameters():
            if p.dim() > 1 or key.endswith("bias"):
                p.normal_(std=0.25 if p.dim() > 1 else 0.1)
    return model


def build(name):
    return copy.deepcopy(first(name))


@torch.no_grad()
def stirred(model, seed):
    dice = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        if p.requires_grad:
            p.add_(0.2 * torch.randn(p.shape, generator=dice, dtype=torch.float64))
    return model


@DECODERS
def test_pefts_mixed_batch(name, tmp_path):
    """Folders that PEFT wrote: ranks, scales and layers of their own; and PEFT's name for the base. (A DoRA it does not mix.)"""
    few, many = MODELS[name][1:]
    configs = {"fr": peft.LoraConfig(r=2, lora_alpha=3, target_modules=few),
               "de": peft.LoraConfig(r=5, lora_alpha=3, use_rslora=True, target_modules=many),
               "it": peft.LoraConfig(r=3, lora_alpha=5, target_modules=many)}
    for seed, (one, config) in enumerate(configs.items()):
        config.fan_in_fan_out = name == "GPT-2"
        stirred(peft.get_peft_model(build(name), config), seed).save_pretrained(tmp_path / one)
    theirs = peft.PeftModel.from_pretrained(build(name), tmp_path / "fr", adapter_name="fr")
    for one in ("de", "it"):
        theirs.load_adapter(tmp_path / one, adapter_name=one)
    names = ["de", "__base__", "fr", "it", "de", "fr"]
    ours, base = build(name), first(name)(IDS).logits
    serve(ours, {one: tmp_path / one for one in configs} | {"__base__": None})
    with rows(ours, names), torch.no_grad():
        said = ours(IDS).logits
        wanted = theirs.eval()(IDS, adapter_names=names).logits
    assert torch.allclose(said, wanted, rtol=0, atol=1e-10)
    assert torch.equal(said[1], base[1]) and all((said[at] - base[at]).abs().max() > 0.1 for at in (0, 2, 3, 4, 5))
    kinds = {key: type(module) for key, module in first(name).named_modules()}
    assert {key: type(module) for key, module in ml.unload(ours).named_modules()} == kinds
    assert all(torch.equal(tensor, first(name).state_dict()[key]) for key, tensor in ours.state_dict().items())


@DECODERS
def test_every_method_is_in_one_batch_what_it_is_in_peft_alone(name, tmp_path):
    """Those whose batches PEFT does not mix are here the same two products as any other."""
    few, many = MODELS[name][1:]
    methods = {"VeRA": ml.VeRA(9), "AdaLoRA": ml.AdaLoRA(4, 2), "PiSSA": ml.PiSSA(3), "Delta-LoRA": ml.DeltaLoRA(2), "DoRA": ml.DoRA(3, alpha=5)}
    for seed, (method, made) in enumerate(methods.items()):
        model = ml.adapt(build(name), made, many if seed % 2 else few)
        for _, layer in ml.adapters(model):
            if method == "Delta-LoRA":
                layer.started.fill_(True)
        ml.save_adapter(stirred(model, seed), tmp_path / method)
    names = ["PiSSA", "VeRA", "DoRA", "Delta-LoRA", "AdaLoRA", "VeRA"]
    with rows(serve(build(name), {method: tmp_path / method for method in methods}), names) as model, torch.no_grad():
        said = model(IDS).logits
    for at, method in enumerate(names):
        wanted = peft.PeftModel.from_pretrained(build(name), tmp_path / method).eval()(IDS).logits[at]
        assert torch.allclose(said[at], wanted, rtol=0, atol=1e-10) and (wanted - first(name)(IDS).logits[at]).abs().max() > 0.03, method


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """name of a model -> two folders on it."""
    root = tmp_path_factory.mktemp("two")

    @functools.cache
    def two(name):
        return {one: ml.save_adapter(stirred(ml.adapt(build(name), ml.LoRA(3), MODELS[name][at + 1]), at), root / f"{name} {one}")
                for at, one in enumerate(("fr", "de"))}

    return two


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("how", [dict(), dict(num_beams=3), dict(num_beams=4, num_return_sequences=2)], ids=["greedy", "beams", "two of four beams"])
def test_generate_writes_for_each_row_what_its_adapter_alone_would(name, how, two):
    """With a cache, and prompts of two lengths. Beam search repeats rows; T5's encoder sees each of them once all the same."""
    mask = torch.ones_like(IDS[:3])
    mask[1, :4] = 0
    ask = dict(input_ids=IDS[:3], attention_mask=mask, max_new_tokens=6, do_sample=False, pad_token_id=0) | how
    names, each = ["fr", None, "de"], how.get("num_return_sequences", 1)
    with rows(serve(build(name), two(name)), names, beams=how.get("num_beams", 1)) as model:
        said = model.generate(**ask)
    written = []
    for at, one in enumerate(names):
        alone = build(name) if one is None else ml.load_adapter(build(name), two(name)[one])
        wanted = alone.generate(**ask)[each * at:each * (at + 1)]
        written.append(wanted[:, -6:])
        width = max(said.shape[1], wanted.shape[1])                       # the longest answer of a batch says how far the others are padded
        pad = [torch.nn.functional.pad(some, (0, width - some.shape[1])) for some in (said[each * at:each * (at + 1)], wanted)]
        assert torch.equal(*pad), one
    assert len({str(some) for some in written}) == 3


def test_sampled_sequences_are_copies_too(two):
    with rows(serve(build("Llama"), two("Llama")), ["fr", "de"], beams=3) as model:
        torch.manual_seed(0)
        said = model.generate(input_ids=IDS[:2], max_new_tokens=4, do_sample=True, num_return_sequences=3, pad_token_id=0)
    with rows(model, ["fr"] * 3 + ["de"] * 3):
        torch.manual_seed(0)
        assert torch.equal(model.generate(input_ids=IDS[:2].repeat_interleave(3, dim=0), max_new_tokens=4, do_sample=True, pad_token_id=0), said)


@DECODERS
def test_without_beams_a_beam_search_is_refused(name, two):
    with rows(serve(build(name), two(name)), ["fr", "de"]) as model, pytest.raises(ValueError, match="of 2 rows, and a layer is given 4: .* say beams"):
        model.generate(input_ids=IDS[:2], max_new_tokens=3, num_beams=2, pad_token_id=0)


def test_add_and_remove_on_conv1d(two):
    folders, base = two("GPT-2"), first("GPT-2")
    model = add(serve(build("GPT-2"), {"fr": folders["fr"]}), "de", folders["de"])
    with rows(model, ["de", "fr"]), rows(both := serve(build("GPT-2"), folders), ["de", "fr"]):
        assert torch.allclose(model(IDS[:2]).logits, both(IDS[:2]).logits, rtol=0, atol=1e-12)
    remove(model, "de")
    assert type(model.transformer.h[0].mlp.c_fc) is type(base.transformer.h[0].mlp.c_fc)
    assert all(torch.equal(tensor, base.state_dict()[key]) for key, tensor in ml.unload(model).state_dict().items())


@pytest.mark.filterwarnings("ignore:.*lie outside nn.Linear")
def test_layers_that_get_tokens_instead_of_rows_say_so(tmp_path):
    """The shared expert of a Qwen2 mixture is given all tokens in one dimension."""
    torch.manual_seed(0)
    config = transformers.Qwen2MoeConfig(**SMALL, num_experts=4, moe_intermediate_size=16, shared_expert_intermediate_size=16)
    model = transformers.Qwen2MoeForCausalLM(config).eval()
    folder = ml.save_adapter(ml.adapt(copy.deepcopy(model), ml.LoRA(2), ["shared_expert.up_proj"]), tmp_path)
    with rows(serve(model, {"it": folder}), ["it", None]), pytest.raises(ValueError, match="of 2 rows, and a layer is given 18"):
        model(IDS[:2])
