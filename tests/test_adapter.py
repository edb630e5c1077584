"""adapt, merge, unload, disabled: what is swapped, what is refused, and that W is never touched."""

import copy
import pickle
import warnings

import pytest
import torch
from torch import nn

import minilora as ml

LORA = ml.LoRA(rank=3, alpha=5)


def snapshot(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(model, before):
    after = model.state_dict()
    return list(after) == list(before) and all(torch.equal(after[name], before[name]) for name in before)


class Plain(nn.Module):
    """No ModuleList: everything but the head is adapted."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(6, 10)
        self.second = nn.Sequential(nn.Linear(10, 8), nn.ReLU(), nn.Linear(8, 9, bias=False))
        self.head = nn.Linear(9, 4)

    def forward(self, x):
        return self.head(self.second(self.first(x)))


def names(model):
    return [name for name, _ in ml.adapters(model)]


def test_without_targets_the_blocks_linears_are_adapted_and_the_head_is_not(tiny):
    ml.adapt(tiny, LORA)
    assert len(names(tiny)) == 2 * 6 and all(name.startswith("blocks.") for name in names(tiny))


def test_without_a_module_list_all_but_the_head_is_adapted():
    assert names(ml.adapt(Plain(), LORA)) == ["first", "second.0", "second.2"]


def test_a_lone_linear_is_adapted():
    assert names(ml.adapt(nn.Sequential(nn.Linear(5, 4), nn.Tanh()), LORA)) == ["0"]


@pytest.mark.parametrize("targets, expected", [
    (["q_proj"], ["blocks.0.attention.q_proj", "blocks.1.attention.q_proj"]),
    (["blocks.1.mlp.up_proj", "head"], ["blocks.1.mlp.up_proj", "head"]),
    (["mlp.down_proj"], ["blocks.0.mlp.down_proj", "blocks.1.mlp.down_proj"]),
    ("q_proj", ["blocks.0.attention.q_proj", "blocks.1.attention.q_proj"]),
])
def test_a_target_is_a_whole_name_or_its_end(tiny, targets, expected):
    assert names(ml.adapt(tiny, LORA, targets)) == expected


@pytest.mark.parametrize("target", ["proj", "_proj", "q_projection", "", "blocks", "attention", "norm", "q_proj.base"])
def test_a_target_that_matches_nothing_is_refused_with_what_there_is(tiny, target):
    before = snapshot(tiny)
    with pytest.raises(ValueError, match="no Linear matches.*q_proj, k_proj, v_proj, o_proj, up_proj, down_proj, head"):
        ml.adapt(tiny, LORA, ["q_proj", target])
    assert same(tiny, before) and all(p.requires_grad for p in tiny.parameters())


def test_no_targets_at_all_and_no_linears_are_refused(tiny):
    with pytest.raises(ValueError, match="no Linear to adapt"):
        ml.adapt(tiny, LORA, [])
    with pytest.raises(ValueError, match="wrap it in nn.Sequential"):
        ml.adapt(nn.Linear(4, 4), LORA)
    with pytest.raises(ValueError, match="no Linear"):
        ml.adapt(nn.Sequential(nn.Conv1d(2, 2, 1)), LORA)


def test_everything_else_is_frozen_norms_and_biases_too(tiny):
    ml.adapt(tiny, LORA)
    trainable = {name.rpartition(".")[2] for name, p in tiny.named_parameters() if p.requires_grad}
    assert trainable == {"A", "B"}


def test_trainable_parameters_are_rank_times_in_plus_out(tiny):
    ml.adapt(tiny, LORA)
    assert ml.trainable_parameters(tiny) == 2 * 3 * (4 * (16 + 16) + 2 * (16 + 64))


def test_a_shared_parameter_counts_once():
    model = Plain()
    model.second[0].weight = nn.Parameter(torch.zeros(8, 10))
    model.twin = nn.Linear(10, 8, bias=False)
    model.twin.weight = model.second[0].weight
    assert ml.trainable_parameters(model) == 6 * 10 + 10 + 80 + 8 + 72 + 36 + 4


def test_adapting_twice_is_refused(tiny, ids):
    ml.adapt(tiny, LORA, ["q_proj"])
    expected = tiny(ids)
    with pytest.raises(ValueError, match="adapted already"):
        ml.adapt(tiny, LORA, ["v_proj"])
    assert torch.equal(tiny(ids), expected) and len(names(tiny)) == 2


def test_a_tied_weight_is_refused(tiny):
    tiny.head.weight = tiny.token_embedding.weight
    before = snapshot(tiny)
    with pytest.raises(ValueError, match="head: its weight is tied .*token_embedding.weight = head.weight"):
        ml.adapt(tiny, LORA, ["head"])
    assert same(tiny, before)
    assert "head" not in names(ml.adapt(tiny, LORA))           # untied layers beside it are welcome


def test_a_layer_used_twice_is_tied_too():
    shared = nn.Linear(4, 4)
    with pytest.raises(ValueError, match="tied"):
        ml.adapt(nn.Sequential(shared, nn.ReLU(), shared, nn.Linear(4, 2)), LORA, ["0"])


def test_one_refusal_leaves_every_layer_alone(tiny):
    before = snapshot(tiny)
    with pytest.raises(ValueError, match="head: rank 17 is above|rank 17 is above min"):
        ml.adapt(tiny, ml.LoRA(rank=17), ["up_proj", "head"])
    assert same(tiny, before) and all(p.requires_grad for p in tiny.parameters())


def test_multihead_attentions_linear_is_refused_when_named_and_left_out_otherwise():
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 24, batch_first=True), 2, enable_nested_tensor=False)
    with pytest.raises(ValueError, match="out_proj belongs to an nn.MultiheadAttention"):
        ml.adapt(encoder, LORA, ["linear1", "out_proj"])
    with pytest.warns(UserWarning, match=r"\d\d% of the blocks' weights lie outside nn.Linear.*in_proj_weight; left out is layers.\*.self_attn.out_proj"):
        ml.adapt(encoder, LORA)
    assert names(encoder) == [f"layers.{i}.linear{j}" for i in (0, 1) for j in (1, 2)]


@pytest.mark.filterwarnings("ignore:.*lie outside nn.Linear")
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("nested", [False, True])
def test_the_encoder_layers_fused_path_does_not_bypass_the_adapter(wake, padded, nested):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 24, dropout=0.0, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=nested).eval()
    x = torch.randn(3, 5, 16)
    mask = torch.arange(5).expand(3, 5) >= torch.tensor([[5], [3], [4]]) if padded else None
    wake(ml.adapt(encoder, LORA))
    real = ~mask if padded else torch.ones(3, 5, dtype=torch.bool)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")                        # torch: nested tensors are a prototype
        slow = encoder.train()(x, src_key_padding_mask=mask)   # in training mode: never fused
        encoder.eval()
        with torch.no_grad():
            fast = encoder(x, src_key_padding_mask=mask)
            merged = ml.merge(copy.deepcopy(encoder))(x, src_key_padding_mask=mask)
            base = ml.unload(copy.deepcopy(encoder))(x, src_key_padding_mask=mask)
    assert torch.allclose(slow[real], fast[real], atol=1e-5)
    assert torch.allclose(slow[real], merged[real], atol=1e-5)
    assert (slow[real] - base[real]).abs().max() > 0.05


def test_disabled_lets_the_base_speak_and_then_puts_the_adapters_back(tiny, ids, wake):
    base = tiny(ids)
    wake(ml.adapt(tiny, LORA))
    adapted = tiny(ids)
    with ml.disabled(tiny) as model:
        assert model is tiny and torch.equal(tiny(ids), base) and not names(tiny)
    assert torch.equal(tiny(ids), adapted) and not torch.allclose(adapted, base)


def test_disabled_puts_the_adapters_back_after_an_error(tiny, ids, wake):
    wake(ml.adapt(tiny, LORA))
    adapted = tiny(ids)
    with pytest.raises(RuntimeError), ml.disabled(tiny):
        raise RuntimeError
    assert torch.equal(tiny(ids), adapted)


def test_unload_gives_the_base_back_same_keys_same_bits(tiny, wake):
    before, types = snapshot(tiny), [type(m) for m in tiny.modules()]
    wake(ml.adapt(tiny, LORA))
    assert ml.unload(tiny) is tiny
    assert same(tiny, before) and [type(m) for m in tiny.modules()] == types


def test_merged_equals_unmerged_and_is_made_of_plain_linears(tiny, ids, wake):
    tiny.double()
    before = snapshot(tiny)
    wake(ml.adapt(tiny, LORA))
    expected, kept = tiny(ids), copy.deepcopy(tiny)
    assert ml.merge(tiny) is tiny
    assert torch.allclose(tiny(ids), expected, rtol=0, atol=1e-12)
    assert not names(tiny) and list(tiny.state_dict()) == list(before)
    assert all(type(m) is nn.Linear for n, m in tiny.named_modules() if n.endswith("proj"))
    assert same(ml.unload(kept), before)


def test_merging_makes_a_new_matrix_and_leaves_w_alone(tiny, wake):
    wake(ml.adapt(tiny, LORA))
    layer = tiny.blocks[0].mlp.up_proj
    W, kept = layer.base.weight, layer.base.weight.clone()
    ml.merge(tiny)
    assert torch.equal(W, kept) and tiny.blocks[0].mlp.up_proj.weight is not W


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_merge_rounds_once_to_the_asked_dtype(tiny, wake, dtype):
    wake(ml.adapt(tiny, LORA))
    layer = copy.deepcopy(tiny.blocks[1].mlp.down_proj)
    exact = layer.base.weight + layer.delta_weight()
    merged = ml.merge(tiny, dtype=dtype).blocks[1].mlp.down_proj
    assert merged.weight.dtype == merged.bias.dtype == dtype and torch.equal(merged.weight, exact.to(dtype))


@pytest.mark.parametrize("before, after", [(torch.bfloat16, torch.float32), (torch.float16, torch.float32), (torch.float32, torch.bfloat16), (torch.float32, torch.float64)])
@pytest.mark.parametrize("method", [LORA, ml.DoRA(rank=3), ml.QLoRA(rank=3, dropout=0.0)], ids=["LoRA", "DoRA", "QLoRA"])
def test_merged_into_another_dtype_the_whole_model_is_in_it(tiny, ids, wake, before, after, method):
    wake(ml.adapt(tiny.to(before), method, ["up_proj", "q_proj"]))
    expected = tiny(ids).double()
    said = ml.merge(tiny, dtype=after)(ids)
    assert said.dtype == after and {p.dtype for p in tiny.parameters()} == {after}
    assert torch.allclose(said.double(), expected, atol=0.02 * expected.abs().max().item())


@pytest.mark.parametrize("place, option", [("blocks.0.mlp.up_proj.weight", torch.float16), ("blocks.0.mlp.up_proj.bias", torch.float16), ("head.weight", torch.float16),
                                           ("blocks.1.mlp_norm.weight", torch.float16)])
def test_a_number_too_large_for_the_type_is_refused_and_the_model_left_alone(tiny, place, option):
    tiny.get_parameter(place).data.view(-1)[3] = -1e5
    ml.adapt(tiny, LORA)
    before, there = snapshot(tiny), names(tiny)
    with pytest.raises(ValueError, match=f"{place} holds 100000, and torch.float16 ends at 65504; merge into a wider type"):
        ml.merge(tiny, dtype=option)
    assert same(tiny, before) and names(tiny) == there
    ml.merge(tiny, dtype=torch.bfloat16)


def test_a_sum_too_large_for_the_bases_own_type_and_a_broken_adapter_are_refused(tiny, wake):
    wake(ml.adapt(tiny.half(), LORA))
    layer = tiny.blocks[1].mlp.down_proj
    layer.base.weight.data.view(-1)[0] = 65_000
    with torch.no_grad():
        layer.A.fill_(100.0), layer.B.fill_(100.0)
    with pytest.raises(ValueError, match="blocks.1.mlp.down_proj.weight holds 114992, and torch.float16 ends"):
        ml.merge(tiny)
    with torch.no_grad():
        layer.A.fill_(float("nan"))
    with pytest.raises(ValueError, match=r"blocks.1.mlp.down_proj: W \+ delta_weight holds values that are not finite"):
        ml.merge(tiny)
    assert len(names(tiny)) == 12


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, torch.bool])
def test_a_type_that_nothing_computes_in_is_refused(tiny, dtype):
    with pytest.raises(ValueError, match=f"dtype must be one that layers compute in.*got {dtype}"):
        ml.merge(ml.adapt(tiny, LORA), dtype=dtype)


@pytest.mark.parametrize("verb", [ml.merge, ml.unload])
def test_there_must_be_something_to_merge_or_unload(tiny, verb):
    with pytest.raises(ValueError, match=f"nothing to {verb.__name__}.*full fine-tuning"):
        verb(tiny)


def test_full_fine_tuning_trains_everything_and_puts_nothing_in(tiny):
    tiny.requires_grad_(False)
    assert ml.trainable_parameters(ml.adapt(tiny, ml.FullFineTuning())) == sum(p.numel() for p in tiny.parameters())
    assert not names(tiny)
    with pytest.raises(ValueError, match="takes no targets"):
        ml.adapt(tiny, ml.FullFineTuning(), ["q_proj"])


def test_an_adapter_shows_its_bases_face(tiny):
    base = tiny.blocks[0].mlp.up_proj
    ml.adapt(tiny, LORA)
    layer = tiny.blocks[0].mlp.up_proj
    assert layer.weight is base.weight and layer.bias is base.bias and (layer.in_features, layer.out_features) == (16, 64)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_a_copy_of_an_adapted_model_is_equal_and_independent(tiny, ids, wake, duplicate):
    wake(ml.adapt(tiny, LORA))
    expected, twin = tiny(ids), duplicate(tiny)
    assert torch.equal(twin(ids), expected)
    wake(twin, seed=9)
    assert torch.equal(tiny(ids), expected) and not torch.allclose(twin(ids), expected)


def test_adapting_keeps_training_and_evaluation_mode(tiny):
    tiny.eval()
    ml.adapt(tiny, ml.LoRA(rank=2, dropout=0.5))
    assert not any(m.training for m in tiny.modules())
    ml.merge(tiny)
    assert not any(m.training for m in tiny.modules())
