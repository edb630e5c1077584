"""The doctor on the tiny GPT: each confusion is named where it is, with the number that shows it, and where it is not nothing is said.

Numbers that a finding shows are worked out here by other means: counted, or from the dense dW in float64.
"""

import copy
import json
import shutil
import warnings
from random import Random

import pytest
import torch
from matplotlib.figure import Figure
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import minilora as ml
from minilora import data, plots, storage
from minilora.__main__ import main
from minilora.methods import METHODS, make_method
from minilora.safety import runs
from minilora.scale.doctor import merged, progress
from minilora.scale.doctor import diagnose, examine, machine
from minilora.scale.doctor.findings import WIDTH, Finding, Report

CONFIG = ml.GPTConfig(context=32, width=16, layers=2, heads=2)


def small(seed=0, **fields):
    torch.manual_seed(seed)
    return ml.TinyGPT(ml.GPTConfig(**vars(CONFIG) | fields))


def batches(step):
    ids = torch.randint(256, (2, 13), generator=torch.Generator().manual_seed(step))
    return ids[:, :-1], ids[:, 1:]


def names(report):
    return [finding.name for finding in report]


def only(report, name):
    """The one finding, of this name, on a line that fits."""
    assert names(report) == [name], str(report)
    finding, = report
    assert str(finding) == f"{finding.name:<17} {finding.evidence}. {finding.fix}"             # it was not cut
    assert any(digit in finding.evidence for digit in "0123456789") or "nan" in finding.evidence, finding
    return finding


def step(model, method, optimizer, steps=1, lr=1e-2):
    for i in range(steps):
        (ml.next_byte_loss(model, *batches(i)) + method.penalty(model)).backward()
        method.before_step(model, i)
        optimizer.step()
        method.after_step(model, i)
        optimizer.zero_grad()


def adam(model, lr=1e-2):
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr)


@pytest.fixture
def folder(tmp_path, wake):
    """folder(method, name="a", model=None, **fields of adapt) -> an adapter's folder whose factors are random, B too."""

    def folder(method=ml.LoRA(3, alpha=5), name="a", model=None, targets=None):
        return ml.save_adapter(wake(ml.adapt(model or small(), method, targets)), tmp_path / name)

    return folder


@pytest.fixture
def base(tmp_path):
    storage.save_model(small(), tmp_path / "base.safetensors")
    return tmp_path / "base.safetensors"


def edited(folder, tensors=None, metadata=None, **fields):
    """The folder with other tensors or configuration. Without `metadata` ours is kept."""
    file = folder / storage.WEIGHTS
    with safe_open(file, "pt") as opened:
        about = opened.metadata()
    if tensors is not None or metadata is not None:
        save_file({key: tensor.contiguous() for key, tensor in (tensors or load_file(file)).items()}, file, about if metadata is None else metadata)
    config = json.loads((folder / storage.CONFIG).read_text()) | fields
    (folder / storage.CONFIG).write_text(json.dumps(config))
    return folder


# What is healthy

@pytest.mark.parametrize("name", METHODS)
def test_nothing_is_found_in_any_method_while_all_is_well(name, tmp_path, base):
    """Plain, adapted, in the middle of training, trained, saved, loaded both ways, merged: in memory and on disk, with the base and without."""
    method, model, original = make_method(name, 3, None, 8), small(), small()
    beside = None if name == "full" else original
    reports = [diagnose(model)]
    ml.adapt(model, method)
    reports += [diagnose(model, base=beside)]
    ml.finetune(model, method, batches, 8, 1e-2, progress=False, evaluate_every=3,
                evaluate=lambda model: reports.append(diagnose(model)) or 0.0)
    reports += [diagnose(model, adam(model), beside, batches(9))]
    if name != "full":
        out = ml.save_adapter(model, tmp_path / "out")
        reports += [*examine([out]), *examine([out], base)]
        reports += [diagnose(ml.load_adapter(small(), out), base=beside), diagnose(ml.load_adapter(small(), out, trainable=True), base=beside)]
        storage.save_model(ml.merge(model), tmp_path / "merged.safetensors")
        reports += [diagnose(model, base=original), *examine([out, tmp_path / "merged.safetensors"], base), *examine([tmp_path / "merged.safetensors"])]
    assert all(str(report).endswith("\n  nothing found") for report in reports), [str(report) for report in reports if report]
    assert len(reports) == (7 if name == "full" else 15)


def test_everything_is_left_as_it_was(wake):
    """A backward pass with dropout, a buffer that moves, and gradients that are there: numbers, gradients, modes, random numbers, what is watched."""
    model = wake(ml.adapt(small(), ml.LoRA(3, dropout=0.5)))
    model.norm.register_buffer("calls", torch.zeros(()))
    model.norm.register_forward_pre_hook(lambda module, _: module.calls.add_(1) and None)
    model.blocks[0].eval()
    ml.next_byte_loss(model, *batches(0)).backward()
    p = next(p for p in model.parameters() if p.requires_grad)
    grad, before = p.grad, p.grad.clone()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modes, watched = [m.training for m in model.modules()], [dict(vars(layer.watch)) for _, layer in ml.adapters(model)]
    original = small()
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    assert not diagnose(model, adam(model), original, batches(1))
    assert torch.equal(torch.rand(4), expected)
    assert p.grad is grad and torch.equal(grad, before)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert [m.training for m in model.modules()] == modes and [vars(layer.watch) for _, layer in ml.adapters(model)] == watched
    clean = ml.adapt(small(), ml.LoRA(3))
    diagnose(clean, batch=batches(1))
    assert all(p.grad is None for p in clean.parameters())


# In memory

def test_nothing_trains(folder):
    model = ml.load_adapter(small(), folder())
    assert not diagnose(model)                                                    # loaded to be used
    assert only(diagnose(model.train()), "nothing trains").evidence.startswith("0 of ")
    assert only(diagnose(small().requires_grad_(False), batch=batches(0)), "nothing trains").fix.startswith("To train: adapt()")
    assert not diagnose(ml.load_adapter(small(), folder(name="b"), trainable=True).train(), batch=batches(0))


def test_w_is_trained(wake):
    model = wake(ml.adapt(small(), ml.LoRA(3)))
    model.blocks[1].requires_grad_(True)
    assert only(diagnose(model), "W is trained").evidence.startswith("6 of 12 adapted layers")
    assert not diagnose(ml.adapt(small(), ml.FullFineTuning()))


@pytest.mark.parametrize("method, leaf", [(ml.LoRA(3), "B"), (ml.VeRA(8), "b"), (ml.AdaLoRA(4, total_steps=9), "lam"), (ml.PiSSA(3), "B"),
                                          (ml.DoRA(3), "B")],
                         ids=lambda value: getattr(type(value), "__name__", value))
def test_b_is_zero_after_steps_and_not_before(method, leaf):
    model = ml.adapt(small(), method)
    optimizer = torch.optim.AdamW(method.parameter_groups(model, 1e-2))
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    assert not diagnose(model, optimizer)
    step(model, method, optimizer)
    assert not diagnose(model, optimizer)                                         # a warm-up may begin with a rate of 0
    step(model, method, optimizer)
    finding = only(diagnose(model, optimizer), f"{leaf} is zero")
    assert "all 12 layers" in finding.evidence and finding.fix.startswith("2 steps")
    for group in optimizer.param_groups:
        group["lr"] = 1e-2
    step(model, method, optimizer)
    assert not diagnose(model, optimizer)


def test_b_is_zero_in_one_kind_only(wake):
    """A kind counts where all its layers are silent; a layer whose kin speak, as an expert without tokens, does not."""
    model = wake(ml.adapt(small(), ml.LoRA(3)))
    optimizer = adam(model, 0.0)
    step(model, ml.LoRA(3), optimizer, 2)
    with torch.no_grad():
        model.blocks[0].mlp.up_proj.B.zero_()
    assert not diagnose(model, optimizer)
    with torch.no_grad():
        model.blocks[1].mlp.up_proj.B.zero_()
    assert "2 of 12 layers (blocks.*.mlp.up_proj)" in only(diagnose(model, optimizer), "B is zero").evidence


def test_an_adapter_that_was_saved_untrained_is_silent_for_good(tmp_path):
    ml.save_adapter(ml.adapt(small(), ml.LoRA(3)), tmp_path)
    assert "frozen" in only(diagnose(ml.load_adapter(small(), tmp_path)), "B is zero").fix
    assert not diagnose(ml.load_adapter(small(), tmp_path, trainable=True))
    assert only(examine([tmp_path])[0], "B is zero").evidence == "all 12 layers: the adapter changes nothing"


@pytest.mark.parametrize("alpha, rank, rslora, scale", [(8, 1, False, ""), (17, 2, False, "8.5"), (1, 16, False, ""), (0.9, 16, False, "0.0563"),
                                                        (0, 2, False, "0"), (32, 16, True, ""), (64, 16, True, "16"), (-20, 2, False, "-10")])
def test_scale(alpha, rank, rslora, scale, tmp_path, wake):
    """8 = 32 / 4 is in LoRA's paper, 1/16 is the other end; rsLoRA by alpha / √rank."""
    model = wake(ml.adapt(small(), ml.LoRA(rank, alpha=alpha, rslora=rslora)))
    for report in diagnose(model), examine([ml.save_adapter(model, tmp_path)])[0]:
        if not scale:
            assert not report
            continue
        finding = only(report, "scale")
        assert finding.evidence == f"s = {scale} in all 12 layers" and ("alpha / r would be 4" in finding.fix) == rslora


@pytest.mark.parametrize("method", [ml.DeltaLoRA(2, alpha=14), ml.PiSSA(4), ml.AdaLoRA(4, alpha=30, total_steps=9)],
                         ids=lambda method: type(method).__name__)
def test_scale_is_the_methods_and_not_its_folders(method, folder):
    """Delta-LoRA's folder says (1 + λ)s, three times as much, of the pair of rank 2r that PEFT reads."""
    assert not examine([folder(method)])[0]


def test_optimizer_made_before_adapt():
    model = small()
    optimizer = adam(model)
    ml.adapt(model, ml.LoRA(3))
    others = len(list(small().parameters()))
    assert only(diagnose(model, optimizer), "optimizer").evidence == f"it holds 0 of 24 trained tensors of adapters, and {others} others"
    assert not diagnose(model, adam(model)) and not diagnose(model)
    with pytest.raises(ValueError, match="optimizer must be a torch optimizer"):
        diagnose(model, 3)
    with pytest.raises(ValueError, match="base must be a model in memory, got a str"):
        diagnose(model, base="base.safetensors")


def test_optimizer_that_holds_a_part_or_what_is_gone():
    model = ml.adapt(small(), ml.LoRA(3))
    A, B = ([getattr(layer, M) for _, layer in ml.adapters(model)] for M in "AB")
    assert "12 of 24 trained tensors of adapters are not in it (blocks.*.attention.q_proj.B)" in only(
        diagnose(model, torch.optim.SGD(A, 0.1)), "optimizer").evidence
    assert not diagnose(model, [torch.optim.SGD(A, 0.1), torch.optim.SGD(B, 0.1)])
    model.head.requires_grad_(True)
    assert "1 of 25 trained tensors are not in it (head.weight)" in only(diagnose(model, torch.optim.SGD(A + B, 0.1)), "optimizer").evidence
    optimizer = torch.optim.SGD(A + B, 0.1)
    ml.adapt(ml.unload(model), ml.LoRA(3)).head.requires_grad_(False)
    assert [finding.evidence for finding in diagnose(model, optimizer)] == [
        "it holds 0 of 24 trained tensors of adapters, and 24 others", "24 of its 24 tensors are no longer in the model"]


def test_optimizer_made_before_prepare():
    """LoRA-drop lets layers share a pair: what the others had is no longer in the model."""
    method = ml.LoRADrop(3, threshold=0.1, warmup_steps=1)
    model = ml.adapt(small(layers=3), method)
    optimizer = adam(model)
    method.prepare(model, batches, ml.next_byte_loss, 0.01)
    gone = 36 - len({p for p in model.parameters() if p.requires_grad})
    assert gone and only(diagnose(model, optimizer), "optimizer").evidence == f"{gone} of its 36 tensors are no longer in the model"
    assert not diagnose(model, adam(model))


def test_targets_that_missed_layers(wake):
    """Whole kinds or whole blocks left out are a choice; a kind that has gaps where another has none is not."""
    for targets in ["q_proj", "v_proj"], ["blocks.1.attention.q_proj", "blocks.1.mlp.up_proj"]:
        report = diagnose(wake(ml.adapt(small(), ml.LoRA(3), targets)))
        assert not report and "of 12 of the blocks' Linears have an adapter; without: " in report.notes[0]
    report = diagnose(wake(ml.adapt(small(), ml.LoRA(3), ["blocks.0.attention.q_proj", "v_proj"])))
    assert only(report, "targets").evidence == "blocks.*.attention.q_proj has an adapter in 1 of 2 blocks, others in more"
    assert report.notes == ["3 of 12 of the blocks' Linears have an adapter; without: k_proj, o_proj, up_proj, down_proj, q_proj"]


class Fused(nn.Module):
    """A block whose experts are one tensor, as transformers keep them."""

    def __init__(self, experts):
        super().__init__()
        self.gate, self.experts = nn.Linear(8, 4), nn.Parameter(torch.randn(experts, 8, 8))

    def forward(self, x):
        return torch.einsum("bi,eio,be->bo", x, self.experts, self.gate(x)[:, :len(self.experts)])


@pytest.mark.parametrize("experts, found", [(3, True), (0, False)])
def test_most_weights_lie_outside_of_all_linears(experts, found):
    model = nn.Module()
    model.blocks = nn.ModuleList(Fused(experts) for _ in range(2))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ml.adapt(model, ml.LoRA(2))
    report = diagnose(model)
    if found:                                                                     # 3 · 64 of 3 · 64 + 32
        assert "86% of the blocks' weights are in none (blocks.*.experts)" in only(report, "targets").evidence
    assert bool(report) == found


def test_tied_weights(wake):
    model = wake(ml.adapt(small(), ml.LoRA(3), ["head"]))
    assert not diagnose(model)
    model.token_embedding.weight = model.head.base.weight                         # as tie_weights() of a transformers model does, after adapt
    assert "token_embedding.weight = head.base.weight" in only(diagnose(model), "tied weights").evidence
    model = small()
    model.head.weight = model.token_embedding.weight
    assert not diagnose(model, adam(model))                                       # full training of a tied model is what it is
    wake(ml.adapt(model, ml.LoRA(3)))
    assert not diagnose(model)
    model.head.weight.requires_grad_(True)
    assert only(diagnose(model), "tied weights").evidence == "4,096 trained numbers have 2 names (token_embedding.weight = head.weight)"


def test_shared_factors_are_no_tied_weights(wake):
    """VeRA's are frozen, LoRA-drop's are trained."""
    assert not diagnose(wake(ml.adapt(small(), ml.VeRA(8))), batch=batches(0))
    method = ml.LoRADrop(3, threshold=0.1, warmup_steps=1)
    model = ml.adapt(small(layers=3), method)
    method.prepare(model, batches, ml.next_byte_loss, 0.01)
    pairs = [layer.A for _, layer in ml.adapters(model)]
    assert len(set(pairs)) < len(pairs) and not diagnose(wake(model), batch=batches(0))


def test_what_cannot_be_saved(wake):
    """save_adapter saves a trained head, and refuses a tensor that PEFT's format has no place for."""
    model = wake(ml.adapt(small(), ml.LoRA(3)))
    model.head.requires_grad_(True)
    assert not diagnose(model)
    model.scale = nn.Parameter(torch.ones(3))
    assert "scale is trained" in only(diagnose(model), "cannot be saved").evidence


def recomputed(model, use_reentrant):
    """Each block under checkpointing."""
    for block in model.blocks:
        block.forward = Checkpointed(block.forward, use_reentrant)
    return model


class Checkpointed:
    def __init__(self, forward, use_reentrant):
        self.forward, self.use_reentrant = forward, use_reentrant

    def __call__(self, h):
        return torch.utils.checkpoint.checkpoint(self.forward, h, use_reentrant=self.use_reentrant)


@pytest.mark.filterwarnings("ignore:None of the inputs")
def test_no_gradient_under_reentrant_checkpointing(wake):
    model = recomputed(wake(ml.adapt(small(), ml.LoRA(3))), True)
    assert "0 of 12 adapters" in only(diagnose(model, batch=batches(0)), "no gradient").evidence
    model.head.requires_grad_(True)                                               # now backward runs, and reaches the head alone
    assert not diagnose(model)
    assert "all 12 adapters" in only(diagnose(model, batch=batches(0)), "no gradient").evidence
    ml.next_byte_loss(model, *batches(0)).backward()
    assert "all 12 adapters" in only(diagnose(model), "no gradient").evidence     # from the gradients that are there
    assert not diagnose(recomputed(wake(ml.adapt(small(), ml.LoRA(3))), False), batch=batches(0))


def test_no_gradient_in_one_kind(wake):
    model = wake(ml.adapt(small(), ml.LoRA(3)))
    ml.next_byte_loss(model, *batches(0)).backward()
    model.blocks[0].mlp.up_proj.A.grad = model.blocks[0].mlp.up_proj.B.grad = None
    assert not diagnose(model)                                                    # its kin has one: an expert without tokens
    model.blocks[1].mlp.up_proj.A.grad = model.blocks[1].mlp.up_proj.B.grad = None
    assert "2 of 12 adapters (blocks.*.mlp.up_proj)" in only(diagnose(model), "no gradient").evidence


def test_a_line_of_the_loop_is_missing():
    model, method = ml.adapt(small(), ml.LoRAFA(3, projection=True)), ml.LoRAFA(3, projection=True)
    assert not diagnose(model, batch=batches(0))
    optimizer = adam(model)
    ml.next_byte_loss(model, *batches(0)).backward()
    optimizer.step()
    assert "LoRAFA is trained without method.before_step" in only(diagnose(model, batch=batches(0)), "the loop").evidence
    assert method.lines == ("before_step",)


def test_a_loss_that_is_no_number_and_errors_of_ones_own(wake):
    model = wake(ml.adapt(small(), ml.LoRA(3)))
    finding = only(diagnose(model, batch=batches(0), loss_fn=lambda model, x, y: ml.next_byte_loss(model, x, y) * float("nan")), "not finite")
    assert finding.evidence == "the loss of this batch is nan"
    with pytest.raises(ValueError, match="input of 40 bytes"):
        diagnose(model, batch=(torch.zeros(1, 40, dtype=torch.long),) * 2)


@pytest.mark.parametrize("times", [0, 1, 2])
def test_merged_already_in_memory(times, folder):
    out, model = folder(), small()
    for _ in range(times):
        ml.merge(ml.load_adapter(model, out, any_base=True))
    report = diagnose(ml.load_adapter(model, out, any_base=True), base=small())
    if not times:
        assert not report
    else:
        counts = ["twice", "3 times"][times - 1]
        assert f"base's W + {times} dW in 100% of 12 layers: with the adapter dW counts {counts}" in only(report, "merged already").evidence


def test_another_base_in_memory(folder):
    model = ml.load_adapter(small(1), folder(), any_base=True)
    assert only(diagnose(model, base=small()), "wrong base").evidence.startswith("W differs from base's in all 12 adapted layers")
    assert not diagnose(model, base=small(1))
    assert not diagnose(ml.load_adapter(small().bfloat16(), folder(name="b"), any_base=True), base=small())       # only rounded


def far(W, share, seed=5):
    """dW so short that about `share` of the weights stay under half a step of bfloat16: a dW of one length relative to each weight."""
    noise = torch.rand(W.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return W.double() * torch.where(noise < share, 2.0 ** -11, 2.0 ** -5)


@pytest.mark.parametrize("share, found", [(0.3, False), (0.7, True)])
def test_lost_in_rounding_counts_what_did_not_move(share, found, tmp_path):
    before, after = small().bfloat16(), small().bfloat16()
    with torch.no_grad():
        for block in after.blocks:
            block.mlp.up_proj.weight.copy_((block.mlp.up_proj.weight.double() + far(block.mlp.up_proj.weight, share)).to(torch.bfloat16))
    same = [(a.mlp.up_proj.weight == b.mlp.up_proj.weight).double().mean() for a, b in zip(before.blocks, after.blocks)]
    storage.save_model(before, tmp_path / "before")
    storage.save_model(after, tmp_path / "after")
    for report in diagnose(after, base=before), examine([tmp_path / "after"], tmp_path / "before")[0]:
        if found:
            assert f"{sum(same) / 2:.0%} of the weights of 2 merged layers" in only(report, "lost in rounding").evidence
        else:
            assert not report
    assert not diagnose(after.float(), base=before.float())                       # it is the type that loses


# On disk: an adapter and its base

def test_wrong_base(folder, tmp_path, base):
    out = folder()
    report, = examine([out], base)
    assert not report and f"fingerprint {storage.base_fingerprint(small())[:12]}" in report.notes[1]
    storage.save_model(small(1), tmp_path / "other")
    finding = only(examine([out], tmp_path / "other")[0], "wrong base")
    assert storage.base_fingerprint(small())[:12] in finding.evidence and storage.base_fingerprint(small(1))[:12] in finding.evidence
    storage.save_model(small(width=24), tmp_path / "wider")
    finding = only(examine([out], tmp_path / "wider")[0], "wrong base")
    assert "all 12 layers have other sizes: blocks.0.attention.k_proj is for 16 x 16, here 24 x 24" in finding.evidence
    deep = folder(name="deep", model=small(layers=3))
    assert "6 of 18 layers are not in this model (blocks.2.attention.k_proj)" in only(examine([deep], base)[0], "wrong base").evidence


def test_quantized_bases_are_known_by_their_fingerprint(folder, base):
    for name, model in (("double", ml.quantize(small())), ("single", ml.quantize(small(), double=False))):
        report, = examine([folder(name=name, model=model)], base)
        assert not report and "is the base it was made for" in report.notes[1]


@pytest.mark.parametrize("method", [ml.LoRA(3, alpha=5), ml.LoRA(3, alpha=5, rslora=True), ml.PiSSA(3), ml.DeltaLoRA(2, alpha=4),
                                    ml.AdaLoRA(4, total_steps=9), ml.VeRA(8), ml.LoRADrop(3)],
                         ids=["LoRA", "rsLoRA", "PiSSA", "Delta-LoRA", "AdaLoRA", "VeRA", "LoRA-drop"])
@pytest.mark.parametrize("times", [1, 2])
def test_merged_twice_by_the_original(method, times, folder, base, tmp_path):
    out, model = folder(method), small()
    for _ in range(times):
        ml.merge(ml.load_adapter(model, out, any_base=True))
    storage.save_model(model, tmp_path / "merged")
    (first, second), (third, fourth) = examine([out, tmp_path / "merged"], base), examine([out, tmp_path / "merged"])
    assert not first and not third
    if times == 1:
        assert not second and not fourth and "holds dW of the" in second.notes[0] and "once (100% of 12 layers)" in second.notes[0]
    else:
        assert f"W minus base is {times} dW in 100% of 12 layers" in only(second, "merged twice").evidence
        assert f"W is {times} dW in " in only(fourth, "merged twice").evidence            # by the projection, the original not at hand


def test_merged_already_without_the_original(folder, base, tmp_path):
    out = folder()
    storage.save_model(ml.merge(ml.load_adapter(small(), out)), tmp_path / "merged")
    assert "near 1 in 100% of 12 layers: on this base dW would count twice" in only(examine([out], tmp_path / "merged")[0], "merged already").evidence
    edited(out, metadata={"format": "pt"})                                        # as PEFT writes it: no fingerprint to tell a wrong base by
    assert not examine([out], base)[0]
    assert "near 1" in only(examine([out], tmp_path / "merged")[0], "merged already").evidence


def test_short_updates_or_few_layers_tell_nothing(tmp_path, base):
    """dW a hundred times shorter than chance makes ⟨W, dW⟩: then the layers do not agree, and nothing is said, merged or not."""
    torch.manual_seed(4)
    for targets, size in ((None, 1e-4), (["q_proj", "v_proj"], 0.3)):
        model = ml.adapt(small(), ml.LoRA(3), targets)
        with torch.no_grad():
            for _, layer in ml.adapters(model):
                layer.A.normal_()
                layer.B.normal_(std=size)
        ml.save_adapter(model, tmp_path / "a")
        edited(tmp_path / "a", metadata={"format": "pt"})
        storage.save_model(ml.merge(model), tmp_path / "merged")
        assert not examine([tmp_path / "a"], base)[0] and not examine([tmp_path / "a"], tmp_path / "merged")[0]


def test_projection_is_that_of_the_dense_update():
    dice = torch.Generator().manual_seed(0)
    W, A, B = (torch.randn(*shape, generator=dice, dtype=torch.float64) for shape in ((7, 5), (2, 5), (7, 2)))
    dW = B @ A
    assert merged.projection(W, A, B) == pytest.approx(((W * dW).sum() / (dW * dW).sum()).item(), rel=1e-12)
    assert merged.projection(W + 2 * dW, A, B) - merged.projection(W, A, B) == pytest.approx(2, rel=1e-12)
    assert merged.projection(W, A, 0 * B) is None


def test_layers_that_agree():
    assert merged.held([1.2, 0.8, 1.1, 0.9] * 2) == merged.Held(1, 1.0, 8)
    assert merged.held([1.2, 0.8, 1.1, 5.0] * 2) == merged.Held(1, 0.75, 8)
    assert merged.held([1.2, 0.8, 3.0, 5.0] * 2) is None and merged.held([1.2, 0.8, 1.1] * 2) is None and merged.held([None] * 9, enough=1) is None
    assert merged.held([2.1], enough=1) == merged.Held(2, 1.0, 1)


def trained_on(task, rate, steps=12):
    model = ml.load_base()
    ml.finetune(model, ml.LoRA(8), data.TASKS[task]().batches(4, 64), steps, rate, progress=False)
    return model


def test_a_trained_update_on_the_shipped_base_is_told_from_one_that_is_merged(tmp_path):
    """The threshold on real weights and a real gradient: fewer than a quarter of the 24 layers near 1 before, three quarters after."""
    model = trained_on("facts", 1e-2)
    layers = [(layer.base.weight.detach().double(), layer.A.detach().double(), layer.scale * layer.B.detach().double()) for _, layer in ml.adapters(model)]
    before = [merged.projection(W, A, B) for W, A, B in layers]
    assert sum(abs(t - 1) < merged.NEAR for t in before) < 6 and merged.held(before).times == 0
    assert merged.held([merged.projection(W + B @ A, A, B) for W, A, B in layers]).times == 1
    ml.save_adapter(model, tmp_path / "a")
    report, = examine([tmp_path / "a"])
    assert not report and report.notes[0] == "made for the shipped base"


def test_lost_in_rounding_of_an_adapter(tmp_path, wake):
    """The share of dW ≠ 0 for which bfloat16 stores the number that was there."""
    for std, found in ((2e-5, True), (0.3, False)):
        model = ml.adapt(small().bfloat16(), ml.LoRA(3))
        with torch.no_grad():
            for _, layer in ml.adapters(model):
                layer.B.normal_(std=std, generator=torch.Generator().manual_seed(1))
        storage.save_model(small().bfloat16(), tmp_path / "base")
        ml.save_adapter(model, tmp_path / "a")
        pairs = [(layer.base.weight.clone(), layer.delta_weight().detach()) for _, layer in ml.adapters(model)]
        storage.save_model(ml.merge(model), tmp_path / "merged")
        same = sum(int(((W.float() + dW).bfloat16() == W).sum()) for W, dW in pairs) / sum(W.numel() for W, _ in pairs)
        report = examine([tmp_path / "a", tmp_path / "merged"], tmp_path / "base")[1]
        assert (same > 0.5) == found
        if found:
            assert f"{same:.0%} of the weights of 12 merged layers" in only(report, "lost in rounding").evidence
        else:
            assert not report


def test_a_pickle(folder):
    out = folder()
    (out / "adapter_model.bin").write_bytes(b"cos\nsystem\n(S'touch x'\ntR.")
    assert not examine([out])[0]                                                  # the safetensors file is what is read
    (out / storage.WEIGHTS).unlink()
    assert "adapter_model.bin (26 bytes)" in only(examine([out])[0], "a pickle").evidence


@pytest.mark.parametrize("prefix, said", [("module.", "DataParallel"), ("_orig_mod.", "torch.compile"), ("_fsdp_wrapped_module.", "FSDP"),
                                          ("base_model.model.", "two PeftModels")])
def test_wrapper_in_keys(prefix, said, folder, base, tmp_path):
    out = folder()
    tensors = load_file(out / storage.WEIGHTS)
    edited(out, {key.replace("base_model.model.", f"base_model.model.{prefix}"): tensor for key, tensor in tensors.items()}, {"format": "pt"})
    for against in None, base:                                                    # and the layers are found all the same
        finding = only(examine([out], against)[0], "wrapper in keys")
        assert finding.evidence.startswith(f"24 of 24 keys hold '{'base_model.model.' * 2 if 'two' in said else prefix}', as {said}")
    state = small().state_dict()
    save_file({prefix + name: tensor for name, tensor in state.items()}, tmp_path / "model.safetensors")
    assert f"{len(state)} of {len(state)} keys hold '{prefix}'" in only(examine([tmp_path / "model.safetensors"])[0], "wrapper in keys").evidence


def test_a_part_of_the_model_may_be_called_module(tmp_path):
    save_file({"module.weight": torch.ones(2, 3), "head.weight": torch.ones(2, 3)}, tmp_path / "m.safetensors")
    assert not examine([tmp_path / "m.safetensors"])[0]


@pytest.mark.parametrize("method", [ml.LoRA(3), ml.VeRA(8), ml.AdaLoRA(4), ml.QLoRA(3)], ids=lambda method: type(method).__name__)
def test_saved_with_its_adapters(method, tmp_path):
    model = ml.adapt(small(), method)
    state = model.state_dict()
    save_file({name: tensor.clone() for name, tensor in state.items()}, tmp_path / "m.safetensors")
    assert only(examine([tmp_path / "m.safetensors"])[0], "saved adapted").evidence.startswith(f"12 of {len(state)} tensors are minilora's bases")
    save_file({name: tensor.clone() for name, tensor in small().state_dict().items()} | {"x.base.weight": torch.ones(2)}, tmp_path / "m.safetensors")
    assert not examine([tmp_path / "m.safetensors"])[0]                           # a module may be called base


def test_not_finite(folder):
    out = folder()
    tensors = load_file(out / storage.WEIGHTS)
    tensors["base_model.model.blocks.1.mlp.up_proj.lora_B.weight"][3, 1] = float("nan")
    assert only(examine([edited(out, tensors)])[0], "not finite").evidence == "1 of 12 layers hold nan or infinity (blocks.1.mlp.up_proj)"


def test_a_name_that_matches_no_layer(folder):
    out = edited(folder(), target_modules=["q_proj", "query", "up_proj"])
    assert "1 of 3 names match no layer (query); 12 layers" in only(examine([out])[0], "targets").evidence
    assert not examine([edited(out, target_modules="all-linear")])[0]


# Runs

@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of the command line: 30 steps on a small base, and its folder."""
    folder = tmp_path_factory.mktemp("run")
    torch.manual_seed(0)
    storage.save_model(small(), folder / "base.safetensors")
    generate = ml.TinyGPT.generate
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ml.TinyGPT, "generate", lambda self, prompt, *_, **__: generate(self, prompt, 1))
        patch.setattr(plots, "loss_curve", lambda *_: Figure(figsize=(1, 1)))
        patch.setattr("minilora.commands.bases.ByteBase.scores", lambda *_: {"bits_per_byte": 1.0, "world_bits_per_byte": 1.0})
        words = ["finetune", "--task", "voice", "--base", str(folder / "base.safetensors"), "--rank", "3", "--seed", "4"]
        assert main([*words, "--steps", "30", "--out", str(folder / "run")]) == 0
        zero_grad, cleared = torch.optim.AdamW.zero_grad, []

        def stop(self):
            cleared.append(1)
            if len(cleared) == 25:                                   # step 24, counted from 0, has begun
                raise KeyboardInterrupt
            zero_grad(self)

        patch.setattr(torch.optim.AdamW, "zero_grad", stop)
        assert main([*words, "--steps", "60", "--lr", "0.02", "--out", str(folder / "stopped")]) == 130
    return folder


@pytest.fixture
def run(finished, tmp_path):
    """run(**what history.json says otherwise) -> a copy of the finished run."""

    def run(**fields):
        shutil.copytree(finished / "run", tmp_path / "run", dirs_exist_ok=True)
        history = json.loads((tmp_path / "run" / "history.json").read_text()) | fields
        (tmp_path / "run" / "history.json").write_text(json.dumps(history))
        return tmp_path / "run"

    return run


def test_a_finished_run_is_in_order(run, finished):
    report, = examine([run()], finished / "base.safetensors")
    assert not report and report.seen.endswith("a run of lora, 30 steps, finished") and "is the base it was made for" in report.notes[1]


def falling(n, start=5.0, end=4.0, noise=0.2):
    dice = torch.Generator().manual_seed(0)
    return [start + (end - start) * i / (n - 1) + noise * torch.randn((), generator=dice).item() for i in range(n)]


def test_loss_that_never_fell_or_diverged(run):
    assert not examine([run(loss=falling(30))])[0]
    flat = falling(30, 5.0, 5.0)
    said = f"{sum(flat[:6]) / 6:.4f} in the first fifth, {sum(flat[-6:]) / 6:.4f} in the last"
    assert said in only(examine([run(loss=flat)])[0], "loss never fell").evidence
    assert "loss 5." in only(examine([run(loss=falling(30, 5.0, 9.0))])[0], "diverged").evidence
    assert only(examine([run(loss=[float("nan")] + falling(29))])[0], "diverged").evidence == "the loss of step 0 is nan"
    assert not examine([run(loss=falling(19, 5.0, 9.0))])[0]                      # too few to say


def test_warmup_longer_than_the_run(run):
    rising = [0.01 * (step + 1) / 41 for step in range(30)]
    assert "the rate still rises at the last of 30 steps, from 0.00024 to 0.0073" in only(examine([run(lr=rising)])[0], "warm-up too long").evidence
    assert not examine([run(lr=rising[:29] + rising[28:29])])[0] and not examine([run(lr=rising[:20])])[0]


def test_overfitting(run):
    loss = falling(30, 5, 3)
    rising = [[0, 5.0], [10, 4.0], [20, 4.2], [30, 4.4]]
    assert "held-out loss 4.000 at step 10, 4.400 at step 30" in only(examine([run(loss=loss, evaluated=rising)])[0], "overfitting").evidence
    for evaluated in [[0, 5.0], [10, 4.0], [20, 4.1], [30, 4.04]], [[0, 5.0], [10, 4.2], [20, 4.1], [30, 4.0]], [[0, 5.0], [30, 5.5]]:
        assert not examine([run(loss=loss, evaluated=evaluated)])[0]
    assert "overfitting" not in names(examine([run(loss=falling(30, 3, 5), evaluated=rising)])[0])        # training got worse as well: it is not that


def test_a_run_whose_adapter_is_silent_or_gone(run):
    folder = run()
    ml.save_adapter(ml.adapt(small(), ml.LoRA(3)), folder)
    only(examine([folder])[0], "B is zero")
    for name in storage.CONFIG, storage.WEIGHTS:
        (folder / name).unlink()
    only(examine([folder])[0], "no adapter")
    folder = run(method="full")
    for name in storage.CONFIG, storage.WEIGHTS:
        (folder / name).unlink()
    assert not examine([folder])[0]


def test_an_unfinished_run_and_the_command_that_goes_on(finished, monkeypatch, capsys):
    folder = finished / "stopped"
    before = sorted((file.name, file.stat().st_mtime_ns) for file in folder.iterdir())
    report, = examine([folder])
    command = f"python -m minilora finetune --task voice --base BASE --rank 3 --steps 60 --lr 0.02 --seed 4 --out {folder}"
    assert names(report) == ["unfinished"] and report.findings[0].evidence == "step 24 of 60" and report.findings[0].fix == f"This goes on: {command}"
    with runs.alone(folder):
        report, = examine([folder])
        assert not report and report.notes == ["it is running now"]
    assert sorted((file.name, file.stat().st_mtime_ns) for file in folder.iterdir()) == before


def test_what_a_checkpoint_tells(finished, tmp_path):
    saved = torch.load(finished / "stopped" / "checkpoint.pt", weights_only=True)

    def told(**changes):
        other = copy.deepcopy(saved)
        for key, value in changes.items():
            (other["identity"] if key in other["identity"] else other["state"])[key] = value
        storage.save_checkpoint(tmp_path / "checkpoint.pt", other["identity"], other["state"])
        return examine([tmp_path])[0]

    silent = {name: torch.zeros_like(tensor) if name.endswith(".B") else tensor for name, tensor in saved["state"]["trained"].items()}
    assert names(told()) == ["unfinished"]
    report = told(trained=silent)
    assert names(report) == ["B is zero", "unfinished"] and report.findings[0].evidence == "all 12 layers after 24 steps"
    assert names(told(trained=silent, step=1)) == ["unfinished"]
    assert names(told(warmup=60)) == ["warm-up too long", "unfinished"]
    assert "--text FILE" in told(data="another").findings[0].fix
    assert "--task TASK --base BASE --rank 3" in told(digests={0: "another"}).findings[0].fix
    assert "--task voice --rank 3" in told(base=storage.base_fingerprint(ml.load_base())).findings[0].fix
    batches = ml.data.TASKS["voice"]().batches(4, 32, 4)
    fix = told(accumulate=2, clip=0.5, autocast="torch.bfloat16", digests={0: runs.digest([batches(0), batches(1)])}).findings[0].fix
    assert "--task voice --base BASE --rows 4" in fix and "--accumulate 2 --clip 0.5 --autocast bf16 --seed 4" in fix
    assert "--alpha 3 " in told(method="DoRA(rank=8, alpha=3.0, dropout=0.0, rslora=False)").findings[0].fix
    layers = ["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"]
    assert "finetune --model MODEL --text FILE --targets q_proj,down_proj --rank 3" in told(**{"adapted layers": layers}).findings[0].fix
    all_of_it = [name for name, _ in ml.adapters(ml.adapt(ml.load_base(), ml.LoRA(3)))]
    for chosen, words in ((all_of_it, ""), ([name for name in all_of_it if name.endswith(("k_proj", "up_proj"))], "--targets k_proj,up_proj "),
                          (all_of_it[:1] + all_of_it[-1:], f"--targets {all_of_it[0]},{all_of_it[-1]} ")):
        assert f"--base BASE {words}--rank 3" in told(**{"adapted layers": chosen}).findings[0].fix
    assert "--method dora" in told(method="DoRA(rank=8, alpha=8.0, dropout=0.0, rslora=False)").findings[0].fix
    assert "--method rslora --rank 2" in told(method="LoRA(rank=2, alpha=8.0, dropout=0.0, rslora=True)").findings[0].fix


# The command

def test_the_command(folder, base, capsys, tmp_path):
    out = str(folder())
    assert main(["doctor", out, "--base", str(base)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "  nothing found"
    ml.save_adapter(ml.adapt(small(), ml.LoRA(3)), tmp_path / "zero")
    assert main(["doctor", out, str(tmp_path / "zero"), str(base)]) == 1
    said = capsys.readouterr()
    assert said.out.count("nothing found") == 2 and not said.err
    assert "\n  B is zero         all 12 layers: the adapter changes nothing. Saved before" in said.out
    assert all(len(line) <= 155 for line in said.out.splitlines() if str(tmp_path) not in line)


def test_without_a_path_it_describes_the_machine(capsys):
    assert main(["doctor"]) == 0
    said = capsys.readouterr().out
    assert said.splitlines() == machine() and f"torch {torch.__version__}" in said
    assert f"875,264 parameters, fingerprint {storage.base_fingerprint(ml.load_base())[:12]}" in said


def damaged(tmp_path, what):
    path = tmp_path / what.replace(" ", "_")
    if what == "nothing there":
        return path
    if what == "a text":
        path.write_text("no model")
        return path
    path.mkdir()
    if what == "other files":
        (path / "notes.txt").write_text("x")
    if what == "below":
        (path / "one").mkdir()
        (path / "one" / storage.CONFIG).write_text("{}")
    if what in ("broken JSON", "JSON of another kind", "broken tensors", "no tensors", "no configuration"):
        ml.save_adapter(ml.adapt(small(), ml.LoRA(3)), path)
        file = path / storage.WEIGHTS
        if "JSON" in what:
            (path / storage.CONFIG).write_text("[1]" if "kind" in what else '{"r": 3')
        if what == "broken tensors":
            file.write_bytes(file.read_bytes()[:-7])
        if what == "no tensors":
            file.unlink()
        if what == "no configuration":
            (path / storage.CONFIG).unlink()
    if what == "a pickled model":
        (path / "config.json").write_text("{}")
        (path / "pytorch_model.bin").write_bytes(b"x")
    if what == "a shard is missing":
        (path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-1.safetensors"}}')
        (path / "config.json").write_text("{}")
    if what in ("a tensor is missing", "an index that leads out"):
        save_file({"a": torch.ones(2)}, path / "model-1.safetensors")
        file = "model-1.safetensors" if "tensor" in what else "../model-1.safetensors"
        (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": file, "b": file}}))
    if what == "a broken history":
        (path / "history.json").write_text('{"steps": 3, "loss": "none"}')
    if what == "a broken checkpoint":
        (path / "checkpoint.pt").write_bytes(b"no")
    if what == "a checkpoint of others":
        torch.save({"state": {}, "identity": {}}, path / "checkpoint.pt")
    return path


@pytest.mark.parametrize("what, said", [
    ("nothing there", "no such file or folder"), ("a text", "no whole safetensors file"), ("empty", "holds no model, no adapter and no run"),
    ("other files", "holds no model, no adapter and no run"), ("below", "folders in it do: one"), ("broken JSON", "not whole JSON"),
    ("JSON of another kind", "holds a list, not an object"), ("broken tensors", "no whole safetensors file"), ("no tensors", "no such file"),
    ("no configuration", "nobody knows its scale"), ("a pickled model", "pytorch_model.bin, a pickle"), ("a shard is missing", "no such file"),
    ("a tensor is missing", "holds no b"), ("an index that leads out", "weight_map"), ("a broken history", "not the lists of numbers"),
    ("a broken checkpoint", "not a whole checkpoint"), ("a checkpoint of others", "not a whole checkpoint"),
])
def test_bad_input_is_one_line_and_exit_code_2(what, said, tmp_path, capsys):
    path = damaged(tmp_path, what)
    assert main(["doctor", str(path)]) == 2
    out, err = capsys.readouterr()
    assert not out and err.count("\n") == 1 and err.startswith(f"minilora: {path}") and said in err


JUNK = [None, True, 0, -1, 1e400, "", "(", [], [1], ["q_proj"], {}, {"(": 2}, [None], "all-linear"]


def test_whatever_is_written_there_is_judged_or_refused(folder, base, tmp_path):
    """Fields, metadata and tensors at random: a report, or a ValueError that names the file; never another error."""
    dice, refused = Random(0), 0
    sources = [folder(method, name=type(method).__name__) for method in (ml.LoRA(2), ml.VeRA(4), ml.AdaLoRA(3, total_steps=5), ml.PiSSA(2))]
    for _ in range(60):
        out = shutil.copytree(dice.choice(sources), tmp_path / "out", dirs_exist_ok=True)
        tensors, config = load_file(out / storage.WEIGHTS), json.loads((out / storage.CONFIG).read_text())
        with safe_open(out / storage.WEIGHTS, "pt") as opened:
            metadata = opened.metadata()
        about, key = json.loads(metadata["minilora"]), dice.choice(sorted(tensors))
        dice.choice([lambda: config.update({dice.choice([*config, "rank_pattern", "task_type", "init_r"]): dice.choice(JUNK)}),
                     lambda: about.update({dice.choice(["method", "fields", "layers", "base", "others"]): dice.choice(JUNK)}),
                     lambda: metadata.update(minilora=json.dumps(dice.choice(JUNK))),
                     lambda: tensors.pop(key), lambda: tensors.update({key: tensors[key].flatten()}), lambda: tensors.update({key: torch.zeros(3, 5)}),
                     lambda: tensors.update({key: tensors[key].long()})])()
        if metadata["minilora"].startswith('{"method"'):
            metadata["minilora"] = json.dumps(about)
        edited(out, tensors, metadata, **config)
        try:
            examine([out, base], base)
        except ValueError as error:
            refused += 1
            assert str(error).startswith(str(out)) and "\n" not in str(error)
    assert 5 < refused < 55


def test_bad_arguments(folder, base, capsys):
    out = folder()
    for words, said in (([str(out / storage.WEIGHTS)], f"name the folder {out}"),
                        ([str(base), "--base", str(out)], "the base must be a model, and this is an adapter"),
                        ([str(out), "--base", "gone"], "gone: no such file"), (["--base", str(base)], "--base is to hold something against")):
        assert main(["doctor", *words]) == 2 and said in capsys.readouterr().err


def test_a_report_is_a_few_lines_in_a_notebook():
    report = Report("a model", [Finding("B is zero", "all 3 layers", "Train it")], ["a note"])
    assert repr(report) == "a model\n  a note\n  B is zero         all 3 layers. Train it" and bool(report) and len(report) == 1
    assert repr(Report("a model")) == "a model\n  nothing found" and not Report("a model")
    assert len(str(Finding("x", "1" * 300, "y"))) == WIDTH
    assert progress.judge({"loss": [], "lr": [], "evaluated": []}, 0) == []
