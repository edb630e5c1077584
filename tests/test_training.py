"""The loop: what it trains, what it returns, and that a stopped run goes on bit for bit, wherever it was stopped."""

import copy
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import minilora as ml
from minilora.training import Schedule, uninterrupted

TASK = ml.data.world()
BATCHES = TASK.batches(4, 31, seed=3)
METHODS = [ml.LoRA(rank=3, alpha=5, dropout=0.2), ml.LoRA(rank=2, rslora=True), ml.FullFineTuning()]


def run(model, method=METHODS[0], batches=BATCHES, steps=20, lr=1e-2, **options):
    return ml.finetune(model, method, batches, steps, lr, progress=False, **{"weight_decay": 0.01, "schedule": "cosine", "warmup": 3} | options)


def small(seed=0):
    torch.manual_seed(seed)
    return ml.TinyGPT(ml.GPTConfig(context=32, width=16, layers=2, heads=2))


def equal(one, other):
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


class Stop(Exception):
    pass


def stopping(at, error):
    def batches(step):
        if step == at:
            raise error
        return BATCHES(step)

    return batches


def test_training_lowers_the_loss_and_only_the_adapter_moves(tiny):
    before = {name: tensor.clone() for name, tensor in tiny.state_dict().items()}
    history = run(tiny, steps=60)
    assert sum(history["loss"][-5:]) / 5 < sum(history["loss"][:5]) / 5 - 0.08    # little: under it lies an untrained model
    assert all(layer.B.abs().max() > 0 for _, layer in ml.adapters(tiny))
    ml.unload(tiny)
    assert all(torch.equal(tensor, before[name]) for name, tensor in tiny.state_dict().items())


def test_the_loop_is_adamw_written_out(tiny):
    """Against torch's optimizer and scheduler in the plainest loop there is."""
    tiny.double()
    twin = ml.adapt(small().double(), ml.LoRA(rank=2))
    ml.adapt(tiny, ml.LoRA(rank=2))
    twin.load_state_dict(tiny.state_dict())
    history = run(tiny, ml.LoRA(rank=2), steps=10, schedule="linear")
    optimizer = torch.optim.AdamW([p for p in twin.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.01)
    for step in range(10):
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * ((step + 1) / 4 if step < 3 else 1 - (step - 3) / 7)
        x, y = BATCHES(step)
        loss = F.cross_entropy(twin(x).flatten(0, 1).float(), y.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        assert history["loss"][step] == pytest.approx(loss.item(), rel=1e-6)
    for (_, one), (_, other) in zip(ml.adapters(tiny), ml.adapters(twin)):
        assert torch.allclose(one.B, other.B, rtol=0, atol=1e-10) and torch.allclose(one.A, other.A, rtol=0, atol=1e-10)


def test_the_hooks_are_called_in_order(tiny):
    calls = []

    class Watched(ml.LoRA):
        def prepare(self, model, batches, loss_fn, lr):
            calls.append("prepare")

        def penalty(self, model):
            calls.append("penalty")
            return 0.0

        def before_step(self, model, step):
            layer = next(ml.adapters(model))[1]
            calls.append(("before", step, layer.B.grad is not None, bool(layer.B.any())))

        def after_step(self, model, step):
            layer = next(ml.adapters(model))[1]
            calls.append(("after", step, layer.B.grad is not None, bool(layer.B.any())))

    run(tiny, Watched(rank=2), steps=2, warmup=0, schedule="constant")
    assert calls == ["prepare", "penalty", ("before", 0, True, False), ("after", 0, True, True), "penalty", ("before", 1, True, True), ("after", 1, True, True)]


def test_the_penalty_reaches_the_gradient_but_not_the_history():
    class Pulled(ml.LoRA):
        def penalty(self, model):
            return 100.0 * sum(layer.A.pow(2).sum() for _, layer in ml.adapters(model))

    plain, pulled = small(), small()
    first = run(plain, ml.LoRA(rank=2), steps=8)["loss"][0], run(pulled, Pulled(rank=2), steps=8)["loss"][0]
    assert first[0] == first[1]
    size = [sum(layer.A.abs().sum().item() for _, layer in ml.adapters(model)) for model in (plain, pulled)]
    assert size[1] < 0.9 * size[0]


@pytest.mark.parametrize("method", METHODS, ids=["lora", "rslora", "full"])
def test_the_same_seed_gives_the_same_bits(method):
    one, other = small(), small()
    torch.manual_seed(99)
    first = run(one, method)
    torch.manual_seed(7)
    assert first == run(other, method) and equal(one, other)


def test_another_seed_gives_another_start():
    one, other = small(), small()
    run(one, seed=0), run(other, seed=1)
    assert not equal(one, other)


def test_the_callers_random_numbers_are_left_alone(tiny):
    state = torch.get_rng_state()
    run(tiny, steps=2)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("method", METHODS, ids=["lora", "rslora", "full"])
@pytest.mark.parametrize("error", [KeyboardInterrupt(), Stop()], ids=["ctrl-c", "error"])
def test_interrupted_at_every_step_it_ends_bit_identical(tmp_path, capsys, method, error):
    straight, again, checkpoint = small(), small(), tmp_path / "c.pt"
    expected = run(straight, method)
    for at in range(20):                                 # each goes on where the one before it was interrupted
        with pytest.raises(type(error)):
            run(small(), method, stopping(at, error), checkpoint=checkpoint)
        assert capsys.readouterr().out == (f"resumed at step {at - 1}\n" if at else "")
    assert run(again, method, checkpoint=checkpoint) == expected and equal(again, straight)
    assert capsys.readouterr().out == "resumed at step 19\n"


def test_the_same_model_object_can_go_on_too(tmp_path):
    straight, model = small(), small()
    expected = run(straight)
    with pytest.raises(Stop):
        run(model, batches=stopping(7, Stop()), checkpoint=tmp_path / "c.pt")
    assert run(model, checkpoint=tmp_path / "c.pt") == expected and equal(model, straight)


@pytest.mark.parametrize("where", ["forward", "before_step", "after_step"])
def test_stopped_in_the_middle_of_a_step_it_still_ends_bit_identical(tmp_path, where):
    """In the forward pass random numbers are spent; around optimizer.step() weights are half moved. Neither may be saved."""
    straight = small()
    expected = run(straight)

    class Fragile(ml.LoRA):
        fuse = [9]

        def blow(self, step):
            if step == 9 and self.fuse:
                raise Stop

        def before_step(self, model, step):
            if where == "before_step":
                self.blow(step)

        def after_step(self, model, step):
            if where == "after_step":
                self.blow(step)

        def __repr__(self):
            return repr(METHODS[0])

    def exploding(model, x, y):
        loss = ml.next_byte_loss(model, x, y)
        if torch.equal(x, BATCHES(9)[0]) and Fragile.fuse:
            raise Stop
        return loss

    method = Fragile(rank=3, alpha=5, dropout=0.2)
    with pytest.raises(Stop):
        run(small(), method, checkpoint=tmp_path / "c.pt", **({"loss_fn": exploding} if where == "forward" else {}))
    Fragile.fuse.clear()
    again = small()
    assert run(again, method, checkpoint=tmp_path / "c.pt") == expected and equal(again, straight)


def test_a_finished_run_is_not_trained_again(tmp_path):
    one, other = small(), small()
    expected = run(one, checkpoint=tmp_path / "c.pt")
    assert run(other, batches=BATCHES, checkpoint=tmp_path / "c.pt") == expected and equal(one, other)


KILLED = """
    import sys, time, torch
    import minilora as ml
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = ml.TinyGPT(ml.GPTConfig(context=32, width=16, layers=2, heads=2))
    given = ml.data.world().batches(4, 31, seed=3)
    def batches(step):
        time.sleep(0.15)
        return given(step)
    print("ready", flush=True)
    ml.finetune(model, ml.LoRA(rank=3, alpha=5, dropout=0.2), batches, 20, 1e-2, checkpoint=sys.argv[1], progress=False)
"""


def test_two_real_kills_and_it_ends_bit_identical(tmp_path, capsys):
    script = tmp_path / "train.py"
    script.write_text(textwrap.dedent(KILLED))
    straight, last = small(), small()

    def train(model, checkpoint=None):
        return ml.finetune(model, METHODS[0], BATCHES, 20, 1e-2, checkpoint=checkpoint, progress=False)

    expected, checkpoint, resumed = train(straight), tmp_path / "killed.pt", []
    for _ in range(2):
        process = subprocess.Popen([sys.executable, script, checkpoint], stdout=subprocess.PIPE, text=True)
        process.stdout.readline()
        written = checkpoint.stat().st_mtime_ns if checkpoint.exists() else 0
        while not checkpoint.exists() or checkpoint.stat().st_mtime_ns == written:
            time.sleep(0.01)
        time.sleep(0.2)                                  # some way into a later step
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        resumed += [line for line in process.stdout.read().splitlines() if line.startswith("resumed")]
    assert train(last, checkpoint) == expected and equal(last, straight)
    resumed += capsys.readouterr().out.splitlines()
    steps = [int(line.rpartition(" ")[2]) for line in resumed]
    assert len(steps) == 2 and 0 < steps[0] < steps[1] < 20
    assert not list(tmp_path.rglob("*.tmp"))


@pytest.mark.parametrize("change, says", [
    ({"steps": 21}, "steps was 20 and now is 21"), ({"lr": 2e-2}, "lr was 0.01"), ({"seed": 5}, "seed was 0"), ({"schedule": "linear"}, "schedule"),
    ({"accumulate": 2}, "accumulate was 1"), ({"clip": 1.0}, "clip was None"), ({"method": ml.LoRA(rank=4)}, "method was .*rank=3"), ({"targets": ["q_proj"]}, "adapted layers"), ({"batches": TASK.batches(4, 31, seed=4)}, "first batch was another"),
])
def test_a_checkpoint_of_another_run_is_refused(tmp_path, change, says):
    run(small(), checkpoint=tmp_path / "c.pt")
    model, before = small(), (tmp_path / "c.pt").read_bytes()
    with pytest.raises(ValueError, match=f"c.pt: a checkpoint of another run, whose {says}"):
        run(model, **{"checkpoint": tmp_path / "c.pt"} | change)
    assert not list(ml.adapters(model)) and equal(model, small()) and (tmp_path / "c.pt").read_bytes() == before


def test_a_checkpoint_for_another_base_is_refused(tmp_path):
    run(small(), checkpoint=tmp_path / "c.pt")
    with pytest.raises(ValueError, match="base"):
        run(small(seed=1), checkpoint=tmp_path / "c.pt")


@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda b: b"", lambda b: bytes(len(b))])
def test_a_damaged_checkpoint_is_named_and_kept(tmp_path, damage):
    path = tmp_path / "c.pt"
    run(small(), checkpoint=path)
    broken = damage(path.read_bytes())
    path.write_bytes(broken)
    with pytest.raises(ValueError, match="c.pt: not a whole checkpoint"):
        run(small(), checkpoint=path)
    assert path.read_bytes() == broken


def test_evaluation_is_noted_once_a_step_and_does_not_move_the_run(tmp_path):
    def evaluate(model):
        assert not model.training and not torch.is_grad_enabled()
        torch.rand(5)
        return 1.0

    plain, watched = small(), small()
    losses = run(plain)["loss"]
    history = run(watched, evaluate=evaluate, evaluate_every=8)
    assert history["evaluated"] == [[0, 1.0], [8, 1.0], [16, 1.0], [20, 1.0]]
    assert history["loss"] == losses and equal(plain, watched)
    with pytest.raises(Stop):
        run(small(), batches=stopping(8, Stop()), checkpoint=tmp_path / "c.pt", evaluate=evaluate, evaluate_every=8)
    assert run(small(), checkpoint=tmp_path / "c.pt", evaluate=evaluate, evaluate_every=8) == history


def test_a_model_that_is_adapted_already_is_trained_on(tiny):
    method = ml.LoRA(rank=2)
    run(tiny, method, steps=5)
    before = [layer.B.clone() for _, layer in ml.adapters(tiny)]
    run(tiny, method, steps=1, warmup=0)
    moved = [(layer.B - old).abs().max().item() for (_, layer), old in zip(ml.adapters(tiny), before)]
    assert all(0 < distance <= 0.011 for distance in moved)     # one Adam step of 0.01, from where it stood
    with pytest.raises(ValueError, match="adapted with LoRA.rank=2.*asked to train LoRA.rank=3"):
        run(tiny, ml.LoRA(rank=3))


def test_frozen_adapters_are_refused(tiny):
    ml.adapt(tiny, METHODS[0]).requires_grad_(False)
    with pytest.raises(ValueError, match="every parameter is frozen"):
        run(tiny)


def test_it_leaves_mode_and_gradients_as_it_found_them(tiny):
    tiny.eval()
    run(tiny, steps=2)
    assert not tiny.training and all(p.grad is None for p in tiny.parameters())


@pytest.mark.parametrize("wrong, says", [
    ({"steps": 0}, "steps"), ({"steps": 2.5}, "steps"), ({"lr": 0}, "learning rate"), ({"lr": -1.0}, "learning rate"), ({"lr": float("nan")}, "learning rate"), ({"lr": 1e300}, "at most 1e.30"),
    ({"lr": float("inf")}, "learning rate"), ({"weight_decay": -0.1}, "weight_decay"), ({"warmup": -1}, "warmup"), ({"schedule": "square"}, "schedule"),
    ({"evaluate_every": 0}, "evaluate_every"), ({"accumulate": 0}, "accumulate"), ({"accumulate": 1.5}, "accumulate"), ({"clip": 0}, "clip"),
    ({"clip": -1.0}, "clip"), ({"clip": float("nan")}, "clip"),
])
def test_bad_arguments_are_refused_before_anything_changes(tiny, wrong, says):
    with pytest.raises(ValueError, match=says):
        run(tiny, **wrong)
    assert not list(ml.adapters(tiny)) and all(p.requires_grad for p in tiny.parameters())


def test_a_loss_that_is_not_finite_stops_the_run(tiny):
    with pytest.raises(FloatingPointError, match="the loss is nan at step 3"):
        run(tiny, loss_fn=lambda model, x, y: ml.next_byte_loss(model, x, y) * (float("nan") if torch.equal(x, BATCHES(3)[0]) else 1.0))


@pytest.mark.parametrize("shape, factors", [
    ("constant", [0.25, 0.5, 0.75, 1, 1, 1]), ("linear", [0.25, 0.5, 0.75, 1, 6 / 7, 5 / 7]), ("cosine", [0.25, 0.5, 0.75, 1, 0.95048, 0.81174])])
def test_schedules(shape, factors):
    assert [Schedule(shape, 10, 3)(step) for step in range(6)] == pytest.approx(factors, abs=1e-5)


def test_ctrl_c_waits_for_the_end_of_the_step(request):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)      # a shell's background job is started with Ctrl-C ignored
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    reached = []
    with pytest.raises(KeyboardInterrupt):
        with uninterrupted():
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.01)
            reached.append("end of the step")
        reached.append("too far")
    assert reached == ["end of the step"] and signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_held_out_loss_is_the_mean_over_all_windows(tiny):
    windows = TASK.held_out(33)[:7]
    expected = F.cross_entropy(tiny(windows[:, :-1]).flatten(0, 1), windows[:, 1:].flatten()).item()
    assert ml.held_out_loss(tiny, windows, rows=3) == pytest.approx(expected, rel=1e-6)


def test_exact_match_is_what_greedy_generation_says(tiny):
    questions = [("ab", tiny.generate("ab", 4)[2:]), ("xyz", "no\n"), ("k", tiny.generate("k", 6)[1:]), ("k", tiny.generate("k", 6)[1:-1] + "#")]
    questions = [(q, a) for q, a in questions if "\N{REPLACEMENT CHARACTER}" not in a]
    expected = sum(tiny.generate(q, len(a.encode())) == q + a for q, a in questions) / len(questions)
    assert ml.exact_match(tiny, questions, rows=2) == expected


def ragged(step):
    """Two rows with from 0 to 30 targets that count; none in every seventh."""
    x, y = TASK.batches(2, 15)(step)
    y = y.clone()
    y[:, :5 * step % 15] = -100
    return x, y.fill_(-100) if step % 7 == 3 else y


def together(batches, k):
    """The k batches of an accumulated step as one."""
    return lambda step: tuple(torch.cat(parts) for parts in zip(*(batches(k * step + i) for i in range(k))))


EVERY = [ml.LoRA(2), ml.LoRAPlus(2), ml.LoRAFA(2, projection=True), ml.VeRA(4), ml.DoRA(2), ml.AdaLoRA(3, 2, orthogonal_weight=0.5), ml.DeltaLoRA(2), ml.PiSSA(2),
         ml.FullFineTuning()]


@pytest.mark.parametrize("clip", [None, 0.05], ids=["", "clipped"])
@pytest.mark.parametrize("method", EVERY, ids=[type(method).__name__ for method in EVERY])
def test_accumulated_batches_move_as_one_batch_of_them_all(method, clip):
    one, other = small(), small()
    options = {"steps": 4, "lr": 1e-3, "clip": clip, "warmup": 0, "schedule": "constant"}
    accumulated = run(one, method, ragged, accumulate=4, **options)
    whole = run(other, method, together(ragged, 4), **options)
    assert accumulated["loss"] == pytest.approx(whole["loss"], abs=1e-6 * 5.5) and accumulated["lr"] == whole["lr"]        # the loss is 5.5
    for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True):
        assert torch.allclose(a.float(), b.float(), rtol=0, atol=1e-6)


def test_the_mean_of_the_means_would_be_wrong(tiny):
    """The test above has teeth: with equal weights the gradient is another."""
    found = []
    for weighed in (True, False):
        model = small()
        loss_fn = ml.next_byte_loss if weighed else lambda model, x, y: sum(ml.next_byte_loss(model, *batch) for batch in map(ragged, (0, 1, 2))) / 3
        found.append(run(model, ml.LoRA(2), ragged, 1, warmup=0, schedule="constant", accumulate=3 if weighed else 1, loss_fn=loss_fn)["loss"][0])
    assert abs(found[0] - found[1]) > 1e-4


def test_each_hook_is_called_once_a_step_and_clip_comes_after_before_step(tiny):
    seen = []

    class Watched(ml.LoRA):
        def penalty(self, model):
            seen.append("penalty")
            return 0.0

        def before_step(self, model, step):
            for _, layer in ml.adapters(model):
                layer.B.grad.mul_(1000.0)
            seen.append(("before", step))

        def after_step(self, model, step):
            length = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm().item()
            seen.append(("after", step, round(length, 4)))

    run(tiny, Watched(rank=2), steps=2, accumulate=3, clip=0.5, warmup=0)
    assert seen == ["penalty", ("before", 0), ("after", 0, 0.5), "penalty", ("before", 1), ("after", 1, 0.5)]


def test_clip_is_torchs_on_all_that_is_trained_after_lora_fas_projection():
    method, model, twin = ml.LoRAFA(2, projection=True), small(), small()
    torch.manual_seed(0)
    ml.adapt(model, method), twin.load_state_dict(small().state_dict())
    torch.manual_seed(0)
    ml.adapt(twin, method)
    run(model, method, steps=3, clip=0.01, warmup=0, schedule="constant")
    trained = [p for p in twin.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.01)
    for step in range(3):
        optimizer.zero_grad()
        ml.next_byte_loss(twin, *BATCHES(step)).backward()
        method.before_step(twin, step)
        torch.nn.utils.clip_grad_norm_(trained, 0.01)
        optimizer.step()
    assert equal(model, twin)


def test_a_backward_made_inside_loss_fn_counts(tiny):
    """Micro-batches by hand: all but the last have had their backward when the loss comes back."""
    def by_hand(model, x, y):
        parts = [ml.next_byte_loss(model, a, b) / 2 for a, b in zip(x.chunk(2), y.chunk(2))]
        parts[0].backward()
        return parts[1]

    one, other = small(), small()
    run(one, ml.LoRA(2), steps=3, warmup=0, loss_fn=by_hand), run(other, ml.LoRA(2), steps=3, warmup=0)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(one.state_dict().values(), other.state_dict().values()))


class Continues(torch.nn.Module):
    """A causal language model in transformers' manner: it takes a dict's entries by name, and its loss is at labels moved by one."""

    def __init__(self):
        super().__init__()
        self.gpt = small()

    def can_generate(self):
        return True

    def forward(self, input_ids, attention_mask=None, labels=None):
        logits = self.gpt(input_ids)
        loss = None if labels is None else F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return SimpleNamespace(logits=logits, loss=loss)


def as_dict(step):
    ids = TASK.batches(3, 16)(step)[0]
    mask = torch.ones_like(ids)
    for row, short in enumerate((0, step % 5, 7)):
        mask[row, 16 - short:] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


@pytest.mark.parametrize("method", [ml.LoRA(2), ml.AdaLoRA(3, 2), ml.LoRADrop(2, warmup_steps=2, threshold=0.5)], ids=["lora", "adalora", "lora-drop"])
def test_a_batch_may_be_a_dict_as_transformers_has_it(method, tmp_path):
    one, other, again = Continues(), Continues(), Continues()
    expected = run(one, method, as_dict)
    by_hand = run(other, method, as_dict, loss_fn=lambda model, batch: model(**batch).loss)
    unlabelled = run(again, method, lambda step: {name: part for name, part in as_dict(step).items() if name != "labels"})
    assert by_hand == expected == unlabelled and equal(one, other) and equal(one, again)
    resumed = Continues()
    with pytest.raises(Stop):
        run(Continues(), method, lambda step: as_dict(step) if step != 9 else stopping(9, Stop())(9), checkpoint=tmp_path / "c.pt")
    assert run(resumed, method, as_dict, checkpoint=tmp_path / "c.pt") == expected and equal(resumed, one)


def test_accumulated_dicts_weigh_by_the_labels_that_count():
    one, other = Continues(), Continues()
    options = {"steps": 3, "lr": 1e-3, "warmup": 0}
    a = run(one, ml.LoRA(2), as_dict, accumulate=4, **options)
    b = run(other, ml.LoRA(2), lambda step: {name: torch.cat([as_dict(4 * step + i)[name] for i in range(4)]) for name in as_dict(0)}, **options)
    assert a["loss"] == pytest.approx(b["loss"], abs=5.5e-6)
    assert all(torch.allclose(x, y, rtol=0, atol=1e-6) for x, y in zip(one.state_dict().values(), other.state_dict().values()))


class NoLoss(Continues):
    def can_generate(self):
        return False


@pytest.mark.parametrize("model, batches, says", [
    (NoLoss, lambda step: {"input_ids": as_dict(0)["input_ids"]}, "NoLoss gives no loss for a batch of input_ids: it needs labels"),
    (Continues, lambda step: as_dict(0)["input_ids"], "must give .x, y. or a dict of tensors, and it gave a Tensor"),
    (Continues, lambda step: ([1], [2]), "a dict of tensors, and it gave a tuple"),
])
def test_a_batch_that_is_neither_is_refused(model, batches, says):
    with pytest.raises(ValueError, match=says):
        run(model(), ml.LoRA(2), batches, 4)


def spoiled(at, how):
    def batches(step):
        x, y = BATCHES(step)
        return how(x, y.clone()) if step == at else (x, y)
    return batches


NAN = float("nan")


@pytest.mark.parametrize("options, says, and_not", [
    ({"batches": spoiled(3, lambda x, y: (x, y.fill_(-100)))}, "at step 3: all targets of its batch are -100.*nothing to learn", "learning rate"),
    ({"batches": spoiled(0, lambda x, y: (x, y.fill_(-100)))}, "at step 0: all targets of its batch are -100", "learning rate"),
    ({"batches": lambda step: tuple(part[:0] for part in BATCHES(step))}, "at step 0: its batch is empty", "learning rate"),
    ({"batches": lambda step: (BATCHES(0)[0], BATCHES(0)[1].fill_(-100)), "accumulate": 3}, "at step 0: all targets", "learning rate"),
    ({"batches": lambda step: (BATCHES(0)[0], BATCHES(0)[1].fill_(-100)), "method": ml.LoRADrop(2, warmup_steps=3)}, "in the warm-up: all targets", "learning rate"),
    ({"batches": lambda step: (BATCHES(0)[0].float() * NAN, BATCHES(0)[1]), "loss_fn": lambda model, x, y: x.mean() + ml.next_byte_loss(model, y, y)},
     "holds values that are not finite", "learning rate"),
    ({"loss_fn": lambda model, x, y: ml.next_byte_loss(model, x, y) * NAN}, "at step 0: and so it is without the adapters", "learning rate"),
    ({"loss_fn": lambda model, x, y: ml.next_byte_loss(model, x, y) * NAN, "method": ml.FullFineTuning()}, "and nothing was trained before", "learning rate"),
    ({"lr": 1e30}, "at step 1: a lower learning rate than 1e.30 may help", "batch"),
    ({"lr": 1e30, "method": ml.FullFineTuning()}, "at step 1: a lower learning rate than 1e.30 may help", "batch"),
    ({"lr": 1e30, "steps": 1, "optimizer": torch.optim.SGD, "loss_fn": lambda model, x, y: 1e20 * ml.next_byte_loss(model, x, y)},
     "the parameter .* is not finite at step 1: a lower learning rate than 1e.30 may help", "batch"),
])
def test_what_is_not_finite_is_said_with_its_reason(options, says, and_not):
    with pytest.raises(FloatingPointError, match=says) as error:
        run(small(), **{"method": ml.LoRA(2), "warmup": 0, "schedule": "constant", "steps": 5} | options)
    assert and_not not in str(error.value)


class Unsound(torch.autograd.Function):
    """x on the way forward, NaN on the way back: a loss that is finite, and a gradient that is not."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * NAN


@pytest.mark.parametrize("method", [ml.LoRA(2), ml.LoRAFA(2, projection=True), ml.FullFineTuning()], ids=["lora", "lora-fa", "full"])
@pytest.mark.parametrize("at, says", [(5, "a lower learning rate"), (0, "and nothing was trained before")])
def test_a_gradient_that_is_not_finite_stops_the_run_before_the_step(method, at, says, tmp_path):
    def loss_fn(model, x, y):
        loss = ml.next_byte_loss(model, x, y)
        return Unsound.apply(loss) if torch.equal(x, BATCHES(at)[0]) else loss

    model = small()
    with pytest.raises(FloatingPointError, match=f"the gradient of .* is not finite at step {at}: {says}"):
        run(model, method, steps=6, loss_fn=loss_fn, checkpoint=tmp_path / "c.pt")
    assert all(tensor.isfinite().all() for tensor in model.state_dict().values())
    if at:
        healed = small()
        history = run(healed, method, steps=6, checkpoint=tmp_path / "c.pt")           # the checkpoint is whole too
        assert len(history["loss"]) == 6 and all(tensor.isfinite().all() for tensor in healed.state_dict().values())


def test_a_parameter_that_overflows_at_the_last_step_is_in_no_checkpoint(tmp_path):
    with pytest.raises(FloatingPointError, match="the parameter .* is not finite at step 1"):
        run(small(), ml.LoRA(2), steps=1, lr=1e30, warmup=0, checkpoint=tmp_path / "c.pt", optimizer=torch.optim.SGD,
            loss_fn=lambda model, x, y: 1e20 * ml.next_byte_loss(model, x, y))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("given, what", [(lambda model, x, y: 3.0, "a float"), (lambda model, x, y: model(x), "a tensor of shape"), (lambda model, x, y: None, "a NoneType")])
def test_a_loss_that_is_no_number_is_refused(tiny, given, what):
    with pytest.raises(ValueError, match=f"loss_fn must give one number as a tensor, the mean over the batch, and it gave {what}"):
        run(tiny, loss_fn=given)


def test_a_loss_that_depends_on_nothing_is_refused(tiny):
    def cut(model, x, y):
        return ml.next_byte_loss(model, x, y).detach()

    with pytest.raises(ValueError, match=r"no adapter has a gradient.*blocks.\*.attention.q_proj.*called, but where no gradient is recorded.*\.detach\(\)"):
        run(copy.deepcopy(tiny), loss_fn=cut)
    with pytest.raises(ValueError, match="does not depend on any parameter that is trained"):
        run(tiny, ml.FullFineTuning(), loss_fn=cut)


@pytest.mark.parametrize("warmup, steps, share", [(500, 20, "4%"), (20, 20, "95%"), (3, 2, "50%")])
def test_a_warm_up_longer_than_the_run_is_said(tiny, warmup, steps, share):
    with pytest.warns(UserWarning, match=f"a warm-up of {warmup} steps does not end in {steps} steps of training: the learning rate comes to {share} of 0.01"):
        run(tiny, ml.LoRA(2), lambda step: tuple(part[:1, :4] for part in BATCHES(step)), steps, warmup=warmup)


def test_layers_adapted_apart_are_not_trained_as_one(tiny):
    ml.adapt(tiny.blocks[0], ml.LoRA(2, alpha=4)), ml.adapt(tiny.blocks[1], ml.LoRA(2, alpha=32))
    with pytest.raises(ValueError, match="adapted with LoRA.*alpha=32.* at blocks.1.*, and was asked to train LoRA.*alpha=4"):
        run(tiny, ml.LoRA(2, alpha=4))


def test_the_search_for_a_learning_rate_in_the_docstring_runs(capsys):
    """As it is written there, on a small model and for few steps."""
    search = textwrap.dedent(re.search(r"\n( +for lr in .*?)\n\n", ml.finetune.__doc__, re.S)[1])
    assert len(search.splitlines()) == 3
    task, model = ml.data.facts(8), small()
    named = {"ml": ml, "copy": copy, "model": model, "method": ml.LoRA(2), "windows": task.held_out(17)[:8],
             "task": SimpleNamespace(batches=lambda: task.batches(4, 16))}
    exec(search.replace(", 50, lr)", ", 15, lr, progress=False)"), named)
    tried = [tuple(map(float, line.split())) for line in capsys.readouterr().out.splitlines()]
    assert [lr for lr, _ in tried] == [1e-3, 3e-3, 1e-2, 3e-2] and len({loss for _, loss in tried}) == 4
    assert not list(ml.adapters(model)) and equal(model, small())
