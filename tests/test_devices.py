"""Memory and devices: the loop never waits for a GPU between two looks, blocks are computed again, losses under autocast; every method on every
device that is here."""

import copy
import dataclasses

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import minilora as ml
from minilora.evidence.ledger import bytes_alive
from minilora.methods import METHODS, make_method
from minilora.safety.recompute import KINDS, recomputed, recomputing

BATCHES = ml.data.world().batches(2, 31, seed=3)
GPUS = [pytest.param(device, marks=pytest.mark.skipif(not there, reason=f"needs {device}"))
        for device, there in (("cuda", torch.cuda.is_available()), ("mps", torch.backends.mps.is_available()))]
EVERY = pytest.mark.parametrize("name", METHODS)
WAITS = {torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default, torch.ops.aten.masked_select.default,
         torch.ops.aten.equal.default}                 # what a GPU's answer is waited for by: item(), bool(), indexing by a mask


def small(layers=2, heads=2):
    torch.manual_seed(0)
    return ml.TinyGPT(ml.GPTConfig(context=32, width=16, layers=layers, heads=heads))


def usual(name, steps=12):
    return make_method(name, None if name == "full" else 3, None, steps)


def run(model, method, batches=BATCHES, steps=12, **options):
    return ml.finetune(model, method, batches, steps, 0.01, progress=False, **options)


def equal(one, other):
    return all(torch.equal(a.cpu(), b.cpu()) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


class Waits(TorchDispatchMode):
    """Counts them. AdamW's own do not count: its step counters are on the CPU, wherever the parameters are."""

    count, paused = 0, False

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        self.count += function in WAITS and not self.paused
        return function(*arguments, **named or {})

    def optimizer(self, groups, lr):
        optimizer = torch.optim.AdamW(groups, lr=lr)
        optimizer.register_step_pre_hook(lambda *_: setattr(self, "paused", True))
        optimizer.register_step_post_hook(lambda *_: setattr(self, "paused", False))
        return optimizer


@EVERY
def test_between_two_looks_nothing_is_waited_for(name):
    seen = []
    with Waits() as waits:
        run(small(), usual(name), lambda step: (seen.append(waits.count), BATCHES(step))[1], read_every=10, clip=1.0,
            optimizer=waits.optimizer)
    late = seen[-11:]                                  # before steps 1 to 11; in the first ones loops are judged, and AdaLoRA's triplets
    assert len(set(late[2:9])) == 1                    # steps 3 to 8: nothing
    if name == "lora":
        with Waits() as waits:                         # the same count does see those who look
            run(small(), usual(name), BATCHES, steps=2, loss_fn=lambda model, x, y: (loss := ml.next_byte_loss(model, x, y), loss.item())[0])
        assert waits.count >= 2


@EVERY
def test_seldom_looked_at_the_numbers_are_the_same(name, tmp_path, capsys):
    one, other, again = small(), small(), small()
    history = run(one, usual(name), accumulate=2)
    assert run(other, usual(name), accumulate=2, read_every=5) == history and equal(one, other) and len(history["loss"]) == 12

    def stopped(step):
        if step == 14:                                 # of 24 batches: after 7 steps, between two looks
            raise KeyboardInterrupt
        return BATCHES(step)

    with pytest.raises(KeyboardInterrupt):
        run(small(), usual(name), stopped, accumulate=2, read_every=5, checkpoint=tmp_path / "c.pt")
    capsys.readouterr()
    assert run(again, usual(name), accumulate=2, read_every=5, checkpoint=tmp_path / "c.pt") == history and equal(one, again)
    assert "resumed at step 7" in capsys.readouterr().out


@pytest.mark.parametrize("at, look", [(6, 8), (9, 12), (3, 4)])
def test_a_run_that_diverged_between_two_looks_leaves_the_checkpoint_before(at, look, tmp_path, capsys):
    def broken(model, x, y):
        return ml.next_byte_loss(model, x, y) * (float("nan") if torch.equal(x, BATCHES(at)[0]) else 1.0)

    read = []
    with pytest.raises(FloatingPointError, match=f"the loss is nan at step {at}: "):
        run(small(), ml.LoRA(3), lambda step: (read.append(step), BATCHES(step))[1], loss_fn=broken, read_every=4, checkpoint=tmp_path / "c.pt")
    assert max(read) == look - 1
    straight, healed = small(), small()
    history = run(straight, ml.LoRA(3))
    assert run(healed, ml.LoRA(3), checkpoint=tmp_path / "c.pt") == history and equal(healed, straight)
    resumed = capsys.readouterr().out
    assert resumed in {"", *(f"resumed at step {step}\n" for step in range(4, look, 4))} and (resumed or look < 12)    # saved as often as costs little


def test_stopped_after_it_diverged_it_is_not_saved(tmp_path):
    def batches(step):
        if step == 7:
            raise KeyboardInterrupt
        return BATCHES(step)

    def broken(model, x, y):
        return ml.next_byte_loss(model, x, y) * (float("nan") if torch.equal(x, BATCHES(6)[0]) else 1.0)

    with pytest.raises(FloatingPointError, match="the loss is nan at step 6"):
        run(small(), ml.LoRA(3), batches, loss_fn=broken, read_every=100, checkpoint=tmp_path / "c.pt")
    assert not (tmp_path / "c.pt").exists()


@pytest.mark.parametrize("name, kind", [*((name, KINDS[0]) for name in METHODS), *((name, KINDS[1]) for name in ("full", "dora", "qlora"))])
def test_computed_again_the_numbers_are_the_same(name, kind, tmp_path, capsys):
    method = usual(name)
    if hasattr(method, "dropout") and name != "delta-lora":             # which takes none
        method = dataclasses.replace(method, dropout=0.3)
    one, other, again = small(), small(), small()
    history, keys = run(one, method), list(one.state_dict())
    assert run(other, method, checkpointing=kind) == history and equal(one, other) and list(other.state_dict()) == keys

    def stopped(step):
        if step == 5:
            raise KeyboardInterrupt
        return BATCHES(step)

    if name != "lora-drop":                            # whose warm-up reads step 5 before
        with pytest.raises(KeyboardInterrupt):
            run(small(), method, stopped, checkpointing=kind, checkpoint=tmp_path / "c.pt")
        assert run(again, method, checkpoint=tmp_path / "c.pt") == history and equal(one, again)         # with or without
        assert "resumed at step 5" in capsys.readouterr().out


@pytest.mark.parametrize("kind", KINDS)
def test_computed_again_less_is_kept(kind):
    x, y = BATCHES(0)

    def alive(layers, kind):
        model = ml.adapt(small(layers), ml.LoRA(3)).train()

        def loss():
            with recomputing(model, kind), recomputed(model, kind):
                return ml.next_byte_loss(model, x, y)

        return bytes_alive(model, loss)

    (plain_2, plain_8), (again_2, again_8) = ([alive(layers, which) for layers in (2, 8)] for which in (None, kind))
    # a block more: kept whole, many times its input of 2 · 31 · 16 numbers; computed again, that input and little else
    assert (plain_8 - plain_2) / 6 > 10 * 2 * 31 * 16 * 4 and 2 * 31 * 16 * 4 <= (again_8 - again_2) / 6 <= 3 * 2 * 31 * 16 * 4


def test_without_blocks_there_is_nothing_to_compute_again():
    flat = nn.Sequential(nn.Linear(4, 3))
    with pytest.raises(ValueError, match="no nn.ModuleList of blocks; leave checkpointing out"):
        ml.finetune(flat, ml.LoRA(2), lambda step: (torch.ones(2, 4), torch.ones(2, 3)), 2, 0.1, checkpointing="reentrant", targets=["0"], progress=False)
    assert not any(True for _ in ml.adapters(flat))


@EVERY
def test_under_autocast_what_is_trained_keeps_its_type(name, tmp_path):
    types = set()

    def loss_fn(model, x, y):
        loss = ml.next_byte_loss(model, x, y)
        types.add(model.blocks[0].attention.q_proj(torch.zeros(1, 16)).dtype)
        return loss

    one, other, again = small(), small(), small()
    exact, history = run(one, usual(name)), run(other, usual(name), loss_fn=loss_fn, autocast=torch.bfloat16)
    assert types == {torch.bfloat16} and all(p.dtype == torch.float32 for p in other.parameters())
    assert history["loss"] != exact["loss"] and torch.allclose(*(torch.tensor(h["loss"]) for h in (history, exact)), rtol=1e-2)       # bf16: 2⁻⁸
    with pytest.raises(KeyboardInterrupt):
        run(small(), usual(name), autocast=torch.bfloat16, checkpoint=tmp_path / "c.pt", loss_fn=interrupting(7, loss_fn))
    if (tmp_path / "c.pt").exists():
        with pytest.raises(ValueError, match="whose autocast was 'torch.bfloat16' and now is None"):
            run(small(), usual(name), checkpoint=tmp_path / "c.pt")
    assert run(again, usual(name), autocast=torch.bfloat16, loss_fn=loss_fn, checkpoint=tmp_path / "c.pt") == history and equal(other, again)


def interrupting(at, loss_fn):
    calls = []

    def stopped(model, x, y):
        calls.append(0)
        if len(calls) > at:
            raise KeyboardInterrupt
        return loss_fn(model, x, y)

    return stopped


@pytest.mark.parametrize("wrong, says", [({"autocast": torch.float16}, "autocast must be None or torch.bfloat16.*float16 would need"),
                                         ({"checkpointing": True}, "checkpointing must be None, 'non-reentrant' or 'reentrant', got True"),
                                         ({"read_every": -1}, "read_every"), ({"read_every": 1.5}, "read_every")])
def test_bad_options_are_refused(tiny, wrong, says):
    before = copy.deepcopy(tiny.state_dict())
    with pytest.raises(ValueError, match=says):
        run(tiny, ml.LoRA(3), **wrong)
    assert not any(True for _ in ml.adapters(tiny)) and all(torch.equal(before[name], tensor) for name, tensor in tiny.state_dict().items())


@pytest.mark.parametrize("device", GPUS)
@EVERY
def test_on_a_gpu_as_on_the_cpu(name, device, tmp_path):
    here, there, loaded = small(), small().to(device), small().to(device)
    W = {key: tensor.clone() for key, tensor in there.state_dict().items()}
    exact = run(here, usual(name), read_every=4)
    history = run(there, usual(name), read_every=4)
    assert torch.allclose(*(torch.tensor(h["loss"]) for h in (history, exact)), rtol=1e-3)
    ids = BATCHES(0)[0].to(device)
    if name == "full":
        return
    ml.save_adapter(there, tmp_path)
    assert torch.equal(ml.load_adapter(loaded, tmp_path)(ids), there.eval()(ids))
    if name not in ("loftq", "qpissa"):
        adapted = there(ids)
        assert torch.allclose(ml.merge(copy.deepcopy(there))(ids), adapted, atol=1e-4)
        assert all(torch.equal(tensor, W[key]) for key, tensor in ml.unload(there).state_dict().items() if key in W)


@pytest.mark.parametrize("device", GPUS)
def test_four_bits_on_a_gpu_are_those_of_the_cpu(device):
    here, there = ml.quantize(small()), ml.quantize(small().to(device))
    assert equal(here, there)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs cuda")
@EVERY
def test_on_cuda_nothing_is_waited_for(name):
    def batches(step):
        torch.cuda.set_sync_debug_mode("error" if 2 < step < 10 else "default")
        return tuple(part.pin_memory() for part in BATCHES(step))

    try:
        run(small().cuda(), usual(name), batches, read_every=100)
    finally:
        torch.cuda.set_sync_debug_mode("default")
