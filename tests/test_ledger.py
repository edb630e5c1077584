"""The ledger: every measured figure against its closed formula, to the byte."""

import itertools
from dataclasses import fields, replace

import pytest
import torch
from torch import nn

import minilora as ml
from minilora.evidence.formulas import Line, nf4_bytes
from minilora.evidence.ledger import bytes_alive, disk_bytes, flops, ledger, predicted, predicted_disk_bytes, readers

METHODS = {
    "full": ml.FullFineTuning(), "LoRA": ml.LoRA(3), "rsLoRA": ml.LoRA(3, rslora=True), "LoRA+": ml.LoRAPlus(3), "LoRA-FA": ml.LoRAFA(3),
    "VeRA": ml.VeRA(10), "Delta-LoRA": ml.DeltaLoRA(3), "LoRA-drop": ml.LoRADrop(3, warmup_steps=1), "AdaLoRA": ml.AdaLoRA(4, 2),
    "DoRA": ml.DoRA(3), "PiSSA": ml.PiSSA(3), "QLoRA": ml.QLoRA(3, dropout=0.0), "LoftQ": ml.LoftQ(3), "QPiSSA": ml.QPiSSA(3),
}
OWN_BASE = ("QLoRA", "LoftQ", "QPiSSA")


def model(dtype=torch.float32, bias=True, layers=2):
    torch.manual_seed(0)
    gpt = ml.TinyGPT(ml.GPTConfig(context=32, width=32, layers=layers, heads=2))
    if not bias:
        for linear in gpt.modules():
            if isinstance(linear, nn.Linear):
                linear.bias = None
    return gpt.to(dtype)


CASES = [(name, base, dropout) for name, base, dropout in itertools.product(METHODS, ("fp32", "bf16", "fp64", "nf4", "nf4 of bf16"), (0.0, 0.1))
         if not (base.startswith("nf4") and name in ("full", "Delta-LoRA")) and not (name in OWN_BASE and base.startswith("nf4"))
         and not (dropout and name in ("full", "Delta-LoRA"))]


def adapted(name, base, dropout=0.0, bias=True, train=False, layers=2):
    gpt = model({"bf16": torch.bfloat16, "nf4 of bf16": torch.bfloat16, "fp64": torch.float64}.get(base, torch.float32), bias, layers)
    if base.startswith("nf4"):
        ml.quantize(gpt)
    method = METHODS[name]
    method = replace(method, dropout=dropout) if dropout else method
    if train:
        ml.finetune(gpt, method, ml.data.world().batches(2, 31), 4, 0.01, progress=False)
        return gpt
    return ml.adapt(gpt, method)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name, base, dropout", CASES)
def test_every_formula_is_equal_to_what_is_measured_to_the_byte(name, base, dropout, bias):
    gpt = adapted(name, base, dropout, bias, layers=1)           # six layers of three shapes, three of which read one input
    ids = torch.zeros(5, 10, dtype=torch.long)
    for line, formula in zip(ledger(gpt, 50, lambda: gpt(ids)), predicted(gpt, 50, lambda: gpt(ids)), strict=True):
        for field in fields(Line):
            assert getattr(line, field.name) == getattr(formula, field.name), (line.name, field.name)


@pytest.mark.parametrize("name, base", [(name, base) for name, base, dropout in CASES if not dropout])
def test_what_is_on_disk_is_predicted_to_the_byte(name, base):
    """Trained first, so that AdaLoRA has cut, Delta-LoRA has begun and LoRA-drop has chosen."""
    gpt = adapted(name, base, train=True)
    assert bool(dict(ml.adapters(gpt))) == (name != "full")
    assert disk_bytes(gpt) == predicted_disk_bytes(gpt)


def test_layers_that_read_one_input_keep_it_once():
    """q, k and v of both blocks, 50 tokens, 32 wide: two of three x are none; LoRA-FA keeps no x, and behind dropout each has its own."""
    ids, once = torch.zeros(5, 10, dtype=torch.long), -2 * 2 * 50 * 32 * 4
    for name, dropout, expected in (("LoRA", 0.0, once), ("DoRA", 0.0, once), ("full", 0.0, once), ("LoRA-FA", 0.0, 0), ("VeRA", 0.0, 0), ("LoRA", 0.1, 0)):
        gpt = adapted(name, "fp32", dropout)
        *lines, shared, rest, total = ledger(gpt, 50, lambda: gpt(ids))
        assert shared == Line("shared inputs", alive_bytes=expected), name
        assert total.alive_bytes == sum(line.alive_bytes for line in lines) + expected and ledger(gpt, 50) == [*lines, rest, replace(total, alive_bytes=total.alive_bytes - expected)]
    assert sorted(map(len, readers(gpt, lambda: gpt(ids)))) == [1, 1, 1, 1, 1, 1, 3, 3]


def test_the_sum_of_bytes_alive_is_what_training_holds():
    """LoRA beside LoRA-FA in a whole training step: all that differs is what LoRA's layers keep of their inputs."""
    ids, held, lines = torch.zeros(5, 10, dtype=torch.long), {}, {}
    for name in ("LoRA", "LoRA-FA"):
        gpt = adapted(name, "fp32")
        held[name], lines[name] = bytes_alive(gpt, lambda: gpt(ids)), ledger(gpt, 50, lambda: gpt(ids))[-1].alive_bytes
    softmax_keeps = 2 * 50 * 32 * 4                               # o_proj's x: attention keeps it for itself, with either method
    assert held["LoRA"] - held["LoRA-FA"] == lines["LoRA"] - lines["LoRA-FA"] - softmax_keeps


def test_shared_pairs_of_lora_drop_are_counted_once():
    gpt = ml.TinyGPT(ml.GPTConfig(context=32, width=32, layers=4, heads=2))
    ml.finetune(gpt, ml.LoRADrop(3, warmup_steps=1, threshold=0.3), ml.data.world().batches(2, 31), 4, 0.01, progress=False)
    assert any(not layer.own for _, layer in ml.adapters(gpt))
    lines = ledger(gpt)
    assert lines == predicted(gpt) and lines[-1].trainable == ml.trainable_parameters(gpt)
    assert sum(line.trainable == 0 for line in lines[:-2]) > 0


def test_the_sum_is_the_model():
    gpt = adapted("LoRA", "nf4")
    *_, rest, total = ledger(gpt)
    assert total.trainable == ml.trainable_parameters(gpt) and rest.alive_bytes == 0
    assert total.frozen == sum(p.numel() for p in model().parameters())               # a 4-bit weight counts as what it stands for
    assert total.trained_bytes + total.frozen_bytes == sum(t.nbytes for t in (*gpt.parameters(), *gpt.buffers()))


def test_lora_keeps_its_input_and_lora_fa_does_not():
    """512 tokens through 1024 -> 1024 at rank 8, the figures of the lesson on LoRA-FA."""
    linear, x = nn.Linear(1024, 1024), torch.randn(512, 1024, requires_grad=True)
    for method, expected in ((ml.LoRA(8), 2_113_536), (ml.LoRAFA(8), 16_384), (ml.LoRA(8, dropout=0.1), 4_210_688), (ml.LoRAFA(8, dropout=0.1), 2_113_536)):
        layer = method.layer(linear.requires_grad_(False))
        assert bytes_alive(layer, lambda: layer(x)) == expected


def test_what_is_freed_at_once_is_not_counted_and_what_is_shared_counts_once():
    x = torch.randn(1000, requires_grad=True)
    assert bytes_alive(nn.Identity(), lambda: (x.exp().detach() + (2 * x).sin().detach() + x)) == 0
    assert bytes_alive(nn.Identity(), lambda: x.exp()) == 4000
    assert bytes_alive(nn.Identity(), lambda: (x * x, x * x)) == 4000
    assert bytes_alive(nn.Identity(), lambda: x.view(10, 100).T * 2 * x.view(100, 10)) == 8000


def test_counting_changes_nothing_of_the_model():
    gpt = adapted("LoRA", "fp32", dropout=0.1).eval()
    before = {name: t.clone() for name, t in gpt.state_dict().items()}
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    ledger(gpt)
    assert torch.equal(torch.rand(1), expected) and not gpt.training
    assert all(p.grad is None for p in gpt.parameters()) and all(torch.equal(t, before[name]) for name, t in gpt.state_dict().items())


def test_gradients_that_are_there_stay_there():
    gpt = adapted("LoRA", "fp32")
    gpt(torch.zeros(1, 5, dtype=torch.long)).sum().backward()
    before = {name: p.grad.clone() for name, p in gpt.named_parameters() if p.grad is not None}
    ledger(gpt)
    assert len(before) == 24 and all(torch.equal(dict(gpt.named_parameters())[name].grad, grad) for name, grad in before.items())


def test_adapters_that_are_not_trained_have_no_formulas(tmp_path):
    ml.save_adapter(adapted("LoRA", "fp32"), tmp_path)
    gpt = ml.load_adapter(model(), tmp_path)
    assert ledger(gpt)[-1].trainable == 0
    with pytest.raises(ValueError, match="trainable is False"):
        predicted(gpt)
    gpt = ml.load_adapter(model(), tmp_path, trainable=True)
    assert ledger(gpt) == predicted(gpt)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_delta_lora_costs_the_same_before_w_moves(dtype):
    """No forward pass asks whether it has begun, which on a GPU would mean to wait; it multiplies by that."""
    gpt = ml.adapt(model(dtype), ml.DeltaLoRA(3, start_step=5))
    before = ledger(gpt, 50)
    for _, layer in ml.adapters(gpt):
        layer.started.fill_(True)
    assert before == ledger(gpt, 50) == predicted(gpt, 50)


def test_a_tied_model_that_was_wholly_trained_is_weighed_once(tmp_path):
    transformers = pytest.importorskip("transformers")
    gpt = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
                                                                 tie_word_embeddings=True))
    assert disk_bytes(gpt) == predicted_disk_bytes(gpt)
    gpt.save_pretrained(tmp_path)                                 # theirs has another header, and the same numbers
    assert abs(disk_bytes(gpt) - (tmp_path / "model.safetensors").stat().st_size) < 6000


def test_flops_are_torchs():
    linear, x = nn.Linear(20, 30), torch.randn(7, 20, requires_grad=True)
    assert flops(lambda: linear(x)) == (2 * 7 * 20 * 30, 4 * 7 * 20 * 30)


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("shape", [(3, 5), (8, 8), (7, 130), (64, 300)])
def test_four_bit_bytes_of_any_shape(shape, double):
    """An odd number of weights, blocks that are not full, more blocks than one scale of scales serves."""
    assert nf4_bytes(*shape, double=double) == ml.quantize_nf4(torch.randn(shape), double=double).nbytes


def test_delta_lora_on_disk_before_w_moves_is_lora():
    gpt = ml.adapt(model(), ml.DeltaLoRA(3, start_step=5))
    assert disk_bytes(gpt) == predicted_disk_bytes(gpt)
