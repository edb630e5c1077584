"""The 4-bit layer: its products and gradients, what stays in memory, what is on disk, and every method of the family on top."""

import copy
import gc
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import minilora as ml
from minilora.quant.linear import Product

METHODS = {
    "LoRA": ml.LoRA(3, alpha=5), "rsLoRA": ml.LoRA(3, alpha=5, rslora=True), "LoRA+": ml.LoRAPlus(3), "LoRA-FA": ml.LoRAFA(3, projection=True),
    "VeRA": ml.VeRA(10), "LoRA-drop": ml.LoRADrop(3, warmup_steps=2), "AdaLoRA": ml.AdaLoRA(4, 2), "DoRA": ml.DoRA(3), "PiSSA": ml.PiSSA(3),
}
EVERY = pytest.mark.parametrize("name", METHODS)
OWN_BASE = {"QLoRA": ml.QLoRA(3, dropout=0.0), "LoftQ": ml.LoftQ(3, iterations=2), "QPiSSA": ml.QPiSSA(3)}


def layer(out=48, inp=72, bias=True, dtype=torch.float32, **options):
    torch.manual_seed(0)
    return ml.NF4Linear.of(nn.Linear(inp, out, bias=bias, dtype=dtype), **options)


def small(seed=0, width=32):
    torch.manual_seed(seed)
    return ml.TinyGPT(ml.GPTConfig(context=32, width=width, layers=2, heads=2))


def train(model, method, steps=4, batches=None, **options):
    batches = batches or ml.data.world().batches(2, 31, seed=3)
    return ml.finetune(model, method, batches, steps, 0.01, progress=False, **options)


def ids(seed=5):
    return torch.randint(0, 256, (2, 20), generator=torch.Generator().manual_seed(seed))


def dense_twin(model):
    """Each 4-bit layer as the dense one that it stands for."""
    model = copy.deepcopy(model)
    for name, module in [*model.named_modules()]:
        if isinstance(module, ml.NF4Linear):
            linear = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None, dtype=module.compute_dtype)
            linear.load_state_dict({"weight": module.dequantize()} | ({"bias": module.bias} if module.bias is not None else {}))
            ml.adapter.put(model, name, linear.requires_grad_(False))
    return model


def floats_of_at_least(size):
    gc.collect()
    with warnings.catch_warnings():        # some object of torch warns when it is asked for its type
        warnings.simplefilter("ignore", FutureWarning)
        return [t for t in gc.get_objects() if isinstance(t, torch.Tensor) and t.is_floating_point() and t.numel() >= size]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(72,), (5, 72), (2, 3, 72), (0, 72)])
def test_product_and_gradients_are_the_dense_ones(shape, bias):
    nf4 = layer(bias=bias, dtype=torch.float64)
    x = torch.randn(*shape, dtype=torch.float64, requires_grad=True)
    x2 = x.detach().clone().requires_grad_()
    y, expected = nf4(x), F.linear(x2, nf4.dequantize(), nf4.bias)
    assert torch.equal(y, expected)
    g = torch.randn_like(y)
    parameters = [nf4.bias] if bias else []
    for ours, theirs in zip(torch.autograd.grad(y, [x, *parameters], g), torch.autograd.grad(expected, [x2, *parameters], g)):
        assert torch.allclose(ours, theirs, rtol=0, atol=1e-12)


def test_gradients_by_finite_differences():
    nf4 = layer(6, 8, dtype=torch.float64)
    x = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, b: Product.apply(x, b, nf4), (x, nf4.bias))


@pytest.mark.parametrize("double", [True, False])
def test_no_dense_float_of_the_weights_size_is_alive_after_the_forward(double):
    size = 384 * 256
    model = nn.Sequential(*(layer(256, 256, double=double) for _ in range(2)), layer(384, 256, double=double))
    ml.adapt(model, ml.LoRA(4), ["0", "1", "2"])
    x = torch.randn(3, 256, requires_grad=True)
    before = {id(t) for t in floats_of_at_least(256 * 256)}
    y = model(x)
    assert not [t for t in floats_of_at_least(256 * 256) if id(t) not in before]
    y.sum().backward()
    assert not [t for t in floats_of_at_least(256 * 256) if id(t) not in before] and x.grad.any()

    kept = []                                                                       # and written naively, autograd keeps one
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        base = model[2].base
        F.linear(torch.randn(3, 256, requires_grad=True), base.dequantize(), base.bias)
        assert max(kept) == size
        kept.clear()
        base(torch.randn(3, 256, requires_grad=True))
        assert not kept


def test_it_holds_codes_scales_and_bias_and_nothing_else():
    nf4 = layer(256, 256)
    assert {name: (t.dtype, tuple(t.shape)) for name, t in nf4.state_dict().items()} == {
        "codes": (torch.uint8, (256 * 128,)), "scale_codes": (torch.uint8, (1024,)), "scale_absmax": (torch.float32, (4,)),
        "scale_offset": (torch.float32, ()), "bias": (torch.float32, (256,))}
    assert {*layer(double=False).state_dict()} == {"codes", "scales", "bias"}
    assert "weight" not in dict(nf4.named_parameters()) and sum(t.nbytes for t in nf4.state_dict().values()) < 256 * 256 * 0.54


@pytest.mark.parametrize("double", [True, False])
def test_state_dict_round_trip_and_deepcopy(double, tmp_path):
    one, other = layer(double=double), ml.NF4Linear.of(nn.Linear(72, 48), double=double)
    x = torch.randn(4, 72)
    assert not torch.equal(one(x), other(x))
    torch.save(one.state_dict(), tmp_path / "layer.pt")
    other.load_state_dict(torch.load(tmp_path / "layer.pt", weights_only=True))
    copied = copy.deepcopy(one)
    assert torch.equal(one(x), other(x)) and torch.equal(one(x), copied(x))
    copied.codes.zero_()
    assert not torch.equal(one(x), copied(x))


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("part", ["codes", "scale_codes", "scale_absmax", "scale_offset"])
def test_storage_with_a_missing_part_is_refused(part, strict):
    nf4 = layer()
    state = {name: t for name, t in nf4.state_dict().items() if name != part}
    with pytest.raises(RuntimeError, match=f"{part} is missing: a part of its 4-bit weight"):
        nf4.load_state_dict(state, strict=strict)
    delattr(nf4, part)
    with pytest.raises(ValueError, match=f"has lost {part}: its weight cannot be made again"):
        nf4(torch.randn(2, 72))


def test_a_dense_state_dict_and_one_of_other_blocks_are_refused():
    with pytest.raises(RuntimeError, match="holds a dense weight: load that first, then quantize"):
        layer().load_state_dict(nn.Linear(72, 48).state_dict())
    with pytest.raises(RuntimeError, match="size mismatch for scales"):
        layer(double=False).load_state_dict(layer(double=False, block_size=32).state_dict())


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("move", ["half", "bfloat16", "double", "float"])
def test_another_dtype_of_the_model_leaves_codes_and_scales_alone(move, double):
    nf4 = layer(double=double)
    before, weight = {name: b.clone() for name, b in nf4.named_buffers()}, nf4.dequantize()
    getattr(nf4, move)()
    assert all(torch.equal(b, before[name]) and b.dtype == before[name].dtype for name, b in nf4.named_buffers())
    assert torch.equal(nf4.dequantize(), weight) and nf4.bias.dtype == getattr(torch, {"half": "float16"}.get(move, move))
    x = torch.randn(3, 72, dtype=nf4.bias.dtype)
    assert nf4(x).dtype == x.dtype and torch.equal(nf4(x), F.linear(x.float(), weight, nf4.bias.float()).to(x.dtype))


def test_to_another_device():
    nf4 = layer().to("meta")
    assert {b.device.type for b in nf4.buffers()} == {"meta"} and nf4.scale_codes.dtype == torch.uint8


def test_the_compute_dtype_is_chosen_and_the_output_has_the_inputs():
    torch.manual_seed(0)
    linear = nn.Linear(72, 48)
    Q = ml.quantize_nf4(linear.weight, double=True)
    nf4 = ml.NF4Linear(Q, linear.bias, compute_dtype=torch.bfloat16)
    x = torch.randn(4, 72)
    assert nf4.weight.dtype == torch.bfloat16 and nf4(x).dtype == torch.float32
    assert torch.equal(nf4(x), F.linear(x.bfloat16(), Q.dequantize(torch.bfloat16), linear.bias.bfloat16()).float())
    assert ml.NF4Linear(Q).compute_dtype == torch.float32 and "computes in torch.float32" in repr(ml.NF4Linear(Q))


def test_a_layer_in_eval_mode_stays_in_it():
    assert not ml.NF4Linear.of(nn.Linear(72, 48).eval()).training and ml.NF4Linear.of(nn.Linear(72, 48)).training


def test_under_autocast_its_dtype_rules_forward_and_backward():
    nf4 = layer()
    x = torch.randn(4, 72, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = nf4(x)
    assert y.dtype == torch.bfloat16 and torch.equal(y, F.linear(x.bfloat16(), nf4.dequantize(torch.bfloat16), nf4.bias.bfloat16()))
    y.backward(torch.ones_like(y))
    assert x.grad.dtype == torch.float32 and torch.allclose(x.grad, (torch.ones(4, 48) @ nf4.dequantize()), atol=0.05)


def test_a_vector_is_no_weight():
    with pytest.raises(ValueError, match=r"weight is \(out, in\), got the shape \(64,\)"):
        ml.NF4Linear(ml.quantize_nf4(torch.randn(64)))


def test_quantize_takes_adapts_targets():
    model = ml.quantize(small(), ["q_proj", "blocks.1.mlp.down_proj"], block_size=32, double=False)
    found = {name: m for name, m in model.named_modules() if isinstance(m, ml.NF4Linear)}
    assert [*found] == ["blocks.0.attention.q_proj", "blocks.1.attention.q_proj", "blocks.1.mlp.down_proj"]
    assert all(m.block_size == 32 and "scales" in m.parts for m in found.values())
    everywhere = ml.quantize(small())
    assert sum(isinstance(m, ml.NF4Linear) for m in everywhere.modules()) == 12
    assert not any(isinstance(m, ml.NF4Linear) for m in (everywhere.head,) if hasattr(everywhere, "head"))


def test_the_weight_is_what_quantize_nf4_says_of_the_one_that_was_there():
    model = small()
    weights = {name: m.weight.detach().clone() for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    for name, m in ml.quantize(model).named_modules():
        if isinstance(m, ml.NF4Linear):
            assert torch.equal(m.dequantize(), ml.quantize_nf4(weights[name], double=True).dequantize())


def poisoned():
    model = small()
    model.blocks[1].mlp.up_proj.weight.data[3, 4] = float("nan")
    return model


@pytest.mark.parametrize("model, options, message", [
    (small, {"targets": ["nowhere"]}, "no Linear matches 'nowhere'"), (small, {"block_size": 48}, "block_size must be one of"),
    (poisoned, {}, "blocks.1.mlp.up_proj: its weight holds values that are not finite"),
    (lambda: ml.adapt(small(), ml.LoRA(2)), {}, "adapted already: quantize first, then adapt"),
    (lambda: ml.quantize(small()), {}, "blocks.0.attention.q_proj is in four bits already"),
])
def test_what_cannot_be_quantized_is_refused_and_the_model_left_alone(model, options, message):
    model = model()
    before = {name: (id(m), type(m)) for name, m in model.named_modules()}
    with pytest.raises(ValueError, match=message):
        ml.quantize(model, **options)
    assert {name: (id(m), type(m)) for name, m in model.named_modules()} == before


def test_four_bits_cannot_be_trained_and_w_cannot_move():
    model = ml.quantize(small())
    with pytest.raises(ValueError, match="blocks.0.attention.q_proj is in four bits, which cannot be trained"):
        ml.adapt(model, ml.FullFineTuning())
    with pytest.raises(ValueError, match="blocks.0.attention.q_proj: Delta-LoRA lets W follow B A, and a W in four bits cannot"):
        ml.adapt(model, ml.DeltaLoRA(2))
    with pytest.raises(ValueError, match="LoftQ chooses the 4-bit base itself and needs the dense weight"):
        ml.adapt(model, ml.LoftQ(2))
    assert not list(ml.adapters(model))


def test_a_4_bit_layer_that_two_places_share_is_refused():
    model = ml.quantize(nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32)), ["0", "2"])
    model[2] = model[0]
    with pytest.raises(ValueError, match="its weight is tied"):
        ml.adapt(model, ml.LoRA(2), ["0"])


@EVERY
def test_every_method_on_top_is_the_same_function_as_on_the_dense_twin(name):
    """Trained for some steps, so that no factor is zero; values, all gradients, and the merged model, in float64."""
    model = ml.quantize(small().double())
    train(model, METHODS[name])
    twin = dense_twin(model)
    for m in (model, twin):
        m.eval().zero_grad()
        (F.cross_entropy(m(ids()).flatten(0, 1), ids(6).flatten()) + METHODS[name].penalty(m)).backward()
    assert torch.allclose(model(ids()), twin(ids()), rtol=0, atol=1e-10)
    grads, theirs = ({n: p.grad for n, p in m.named_parameters() if p.grad is not None} for m in (model, twin))
    assert grads.keys() == theirs.keys() and all(torch.allclose(g, theirs[n], rtol=0, atol=1e-10) for n, g in grads.items())
    assert any(g.any() for g in grads.values())
    logits = model(ids())
    ml.merge(model)
    assert torch.allclose(model(ids()), logits, rtol=0, atol=1e-10) and not any(isinstance(m, ml.NF4Linear) for m in model.modules())


@EVERY
def test_unload_gives_the_4_bit_base_back_bit_for_bit(name):
    model = ml.quantize(small())
    before = {key: t.clone() for key, t in model.state_dict().items()}
    train(model, METHODS[name])
    ml.unload(model)
    assert before.keys() == model.state_dict().keys() and all(torch.equal(t, before[key]) for key, t in model.state_dict().items())


@pytest.mark.parametrize("name", [*METHODS, *OWN_BASE])
def test_a_folder_is_the_same_model_again(name, tmp_path):
    """On a quantized model; for methods that quantize by themselves also on the dense one."""
    method, dense = (METHODS | OWN_BASE)[name], name in OWN_BASE
    model = small() if dense else ml.quantize(small())
    train(model, method)
    ml.save_adapter(model, tmp_path)
    logits = model.eval()(ids())
    again = ml.load_adapter(small() if dense else ml.quantize(small()), tmp_path).eval()
    assert torch.equal(again(ids()), logits)
    with pytest.raises(ValueError, match="made for another base"):
        ml.load_adapter(small(seed=1) if dense else small(), tmp_path)
    if name == "QLoRA":
        assert torch.equal(ml.load_adapter(ml.quantize(small()), tmp_path).eval()(ids()), logits)


@pytest.mark.parametrize("name", [*METHODS, *OWN_BASE])
def test_stopped_it_ends_bit_identical(name, tmp_path):
    method = (METHODS | OWN_BASE)[name]
    text = ml.data.world().batches(2, 31, seed=3)

    def start():
        return small() if name in OWN_BASE else ml.quantize(small())

    def stopping(step):
        if step == 3:
            raise KeyboardInterrupt
        return text(step)

    straight, again = start(), start()
    expected = train(straight, method, 6)
    with pytest.raises(KeyboardInterrupt):
        train(start(), method, 6, stopping, checkpoint=tmp_path / "c.pt")
    assert train(again, method, 6, checkpoint=tmp_path / "c.pt") == expected
    assert all(torch.equal(t, again.state_dict()[key]) for key, t in straight.state_dict().items())


def test_a_checkpoint_does_not_carry_the_base(tmp_path):
    model = ml.quantize(small(width=256))
    train(model, ml.VeRA(2), 1, checkpoint=tmp_path / "c.pt")
    assert (tmp_path / "c.pt").stat().st_size < sum(m.quantized.nbytes for m in model.modules() if isinstance(m, ml.NF4Linear)) / 2


@pytest.mark.parametrize("name", OWN_BASE)
def test_a_run_that_fails_leaves_the_dense_model(name):
    model = small()
    before = {key: (id(t), t.clone()) for key, t in model.state_dict(keep_vars=True).items()}

    def broken(step):
        raise OSError("no more data")

    def refuses(*_):
        raise OSError("no")

    method = copy.copy(OWN_BASE[name])
    object.__setattr__(method, "prepare", refuses)
    with pytest.raises(OSError):
        train(model, method)
    now = model.state_dict(keep_vars=True)
    assert now.keys() == before.keys() and all(id(t) == before[key][0] and torch.equal(t, before[key][1]) for key, t in now.items())
    assert all(p.requires_grad for p in model.parameters())


def test_merging_into_four_bits_again_warns_and_names_the_loss():
    model = ml.quantize(small(), block_size=32, double=False)
    train(model, ml.LoRA(3))
    merged = ml.merge(copy.deepcopy(model))
    with pytest.warns(UserWarning, match=r"moved the weights by \d\.\d\d times the length of the updates") as caught:
        ml.merge_nf4(model)
    lost = whole = 0.0
    for name, m in model.named_modules():
        if isinstance(m, ml.NF4Linear):
            assert m.block_size == 32 and "scales" in m.parts
            target, base = merged.get_submodule(name).weight, ml.quantize(small(), block_size=32, double=False).get_submodule(name).dequantize()
            assert torch.equal(m.dequantize(), ml.quantize_nf4(target, 32).dequantize())
            lost, whole = lost + (m.dequantize() - target).square().sum().item(), whole + (target - base).square().sum().item()
    assert f"{(lost / whole) ** 0.5:.2f} times" in str(caught[0].message)
    with pytest.raises(ValueError, match="nothing to merge"):
        ml.merge_nf4(model)


def test_merging_into_four_bits_keeps_double_quantization_and_the_compute_dtype():
    torch.manual_seed(0)
    linear = nn.Linear(72, 48)
    model = nn.Sequential(ml.NF4Linear(ml.quantize_nf4(linear.weight, double=True), linear.bias, compute_dtype=torch.bfloat16))
    ml.adapt(model, ml.LoRA(3), ["0"])
    nn.init.normal_(model[0].B)
    with pytest.warns(UserWarning, match="moved the weights"):
        ml.merge_nf4(model)
    assert model[0].compute_dtype == torch.bfloat16 and "scale_codes" in model[0].state_dict()


def test_only_a_4_bit_base_takes_an_update_in_four_bits():
    model = ml.adapt(small(), ml.LoRA(2))
    with pytest.raises(ValueError, match="blocks.0.attention.q_proj: its base is not in four bits"):
        ml.merge_nf4(model)
    assert len(list(ml.adapters(model))) == 12


def test_qlora_is_quantize_and_lora():
    one = ml.adapt(small(), ml.QLoRA(3, alpha=5, dropout=0.0))
    other = ml.adapt(ml.quantize(small()), ml.LoRA(3, alpha=5))
    for (_, a), (_, b) in zip(ml.adapters(one), ml.adapters(other)):
        with torch.no_grad():
            b.A.copy_(a.A), b.B.normal_(), a.B.copy_(b.B)
    assert torch.equal(one(ids()), other(ids())) and ml.trainable_parameters(one) == ml.trainable_parameters(other)
    assert {layer.base.quantized.block_size for _, layer in ml.adapters(one)} == {64} and all(isinstance(m.base, ml.NF4Linear) for _, m in ml.adapters(one))
    layer = ml.QLoRA(3, block_size=128, double=False).layer(nn.Linear(72, 48)).base
    assert layer.block_size == 128 and "scales" in layer.parts
    method = ml.QLoRA(64)
    assert (method.alpha, method.dropout, method.block_size, method.double) == (16.0, 0.1, 64, True)


@pytest.mark.parametrize("options, message", [({"block_size": 10}, "block_size must be"), ({"double": 1}, "double must be True or False, got 1"),
                                              ({"rank": 0}, "rank must be"), ({"dropout": 1.0}, "dropout must be")])
def test_bad_settings_of_qlora_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ml.QLoRA(**{"rank": 4} | options)


def test_a_transformers_model():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(vocab_size=256, hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
    model = ml.adapt(transformers.LlamaForCausalLM(config), ml.QLoRA(4))
    assert len(list(ml.adapters(model))) == 14 and not isinstance(model.lm_head, ml.NF4Linear)
    history = train(model, ml.QLoRA(4), 8)
    assert history["loss"][-1] < history["loss"][0]
    logits = model.eval()(ids()).logits
    assert torch.allclose(ml.merge(model)(ids()).logits, logits, atol=1e-4)


def test_gradient_checkpointing_and_packed_batches_go_through():
    from torch.utils.checkpoint import checkpoint
    model = ml.adapt(nn.Sequential(layer(64, 64), nn.Tanh(), layer(64, 64)), ml.LoRA(3), ["0", "2"])
    for _, m in ml.adapters(model):
        nn.init.normal_(m.B)
    x = torch.randn(5, 64)
    model(x).sum().backward()
    grads = [m.A.grad.clone() for _, m in ml.adapters(model)]
    model.zero_grad()
    checkpoint(model, x, use_reentrant=False).sum().backward()
    assert all(torch.allclose(m.A.grad, g, atol=1e-5) for (_, m), g in zip(ml.adapters(model), grads))
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        packed = torch.nested.nested_tensor([torch.randn(3, 64), torch.randn(5, 64)])
        for part, expected in zip(model[0](packed).unbind(), packed.unbind()):
            assert torch.allclose(part, model[0](expected), atol=1e-5)
