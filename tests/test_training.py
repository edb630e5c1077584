"""The loop: what it trains, what it returns, and that a stopped run goes on bit for bit, wherever it was stopped."""

import os
import signal
import subprocess
import sys
import textwrap
import time

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
    ({"method": ml.LoRA(rank=4)}, "method was .*rank=3"), ({"targets": ["q_proj"]}, "adapted layers"), ({"batches": TASK.batches(4, 31, seed=4)}, "first batch was another"),
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
    ({"steps": 0}, "steps"), ({"steps": 2.5}, "steps"), ({"lr": 0}, "learning rate"), ({"lr": -1.0}, "learning rate"), ({"lr": float("nan")}, "learning rate"),
    ({"lr": float("inf")}, "learning rate"), ({"weight_decay": -0.1}, "weight_decay"), ({"warmup": -1}, "warmup"), ({"schedule": "square"}, "schedule"),
    ({"evaluate_every": 0}, "evaluate_every"),
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
