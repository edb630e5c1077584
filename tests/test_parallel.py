"""Several processes against one. Two launches of torchrun, whose processes do all of tests/parallel_worker.py; here their results are looked at."""

import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

import minilora as ml
from minilora.__main__ import main
from minilora.methods import METHODS, make_method
from minilora.scale import parallel
from minilora.storage import load_checkpoint, save_model
from minilora.training import OneProcess

WORKER = Path(__file__).with_name("parallel_worker.py")
spec = importlib.util.spec_from_file_location("parallel_worker", WORKER)
worker = importlib.util.module_from_spec(spec)
spec.loader.exec_module(worker)


def torchrun(out, *arguments):
    clean = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")} | {"OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(WORKER), str(out), *arguments],
                          capture_output=True, text=True, errors="replace", env=clean, timeout=300)


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    out = tmp_path_factory.mktemp("parallel")
    torch.manual_seed(0)
    save_model(ml.TinyGPT(ml.GPTConfig(context=32, width=16, layers=3, heads=2)), out / "base.safetensors")
    with pytest.raises(KeyboardInterrupt):
        worker.train(worker.small(), worker.method_named("lora"), None, worker.stopping(2), checkpoint=out / "one.pt")
    return out


@pytest.fixture(scope="module")
def killed(out):
    """The run whose second process was killed, and the step of what it left, before anything goes on from there."""
    run = torchrun(out, "kill")
    return run, torch.load(out / "killed" / "checkpoint.pt", weights_only=True)["state"]["step"]


@pytest.fixture(scope="module")
def found(out, killed):
    """What the first process found, and the second."""
    run = torchrun(out)
    assert run.returncode == 0, run.stdout + run.stderr
    return [torch.load(out / f"results{rank}.pt", weights_only=True) for rank in (0, 1)]


@pytest.fixture(scope="module")
def alone():
    """alone(name): history and state of one process's run with that method."""
    done = {}

    def alone(name):
        if name not in done:
            model = worker.small()
            done[name] = worker.train(model, worker.method_named(name), None), worker.state(model)
        return done[name]

    return alone


def near(one, other, tolerance):
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=0, atol=tolerance, msg=lambda text: f"{name}: {text}")
    return True


IN_FLOAT64 = 1e-12      # 1e-14 is what is seen; in float32 the same sums differ by 4e-7


@pytest.mark.parametrize("name", METHODS)
def test_two_processes_give_one_processs_adapter(name, found, alone):
    """Rows of unequal counts of targets, one without any; two batches a step, clipping, weight decay, AdaLoRA's penalty and cuts, LoRA-drop's pairs."""
    (history, state, _), (expected, alone_state) = found[0]["methods"][name], alone(name)
    assert near(state, alone_state, IN_FLOAT64) and history["lr"] == expected["lr"]
    assert history["loss"] == pytest.approx(expected["loss"], abs=1e-12)
    assert history["loss"][0] != history["loss"][3] and all(torch.equal(state[key], tensor) for key, tensor in found[1]["methods"][name][1].items())


def test_all_begin_as_the_first_process_does(found):
    model = worker.small()
    torch.manual_seed(0)
    ml.adapt(model, worker.method_named("lora"), ["q_proj", "down_proj"])
    worker.train(model, worker.method_named("lora"), None)
    assert near(found[0]["started apart"], worker.state(model), IN_FLOAT64) and near(found[1]["started apart"], found[0]["started apart"], 0)


def test_in_float32_what_differs_is_the_order_of_summation(found):
    model = worker.small(torch.float32)
    expected = worker.train(model, worker.method_named("lora"), None, evaluate=worker.held_out, evaluate_every=2)
    history, state = found[0]["others"]["float32"]
    assert near(state, worker.state(model), 1e-5)
    assert [step for step, _ in history["evaluated"]] == [0, 2, 4]
    assert [loss for _, loss in history["evaluated"]] == pytest.approx([loss for _, loss in expected["evaluated"]], abs=1e-5)


@pytest.mark.parametrize("name, method", [("experts", ml.LoRA(2)), ("experts with a penalty", ml.AdaLoRA(3, 2))])
def test_an_expert_that_only_some_processes_meet_or_none(name, method, found):
    """And a process whose rows meet none, and one of whose targets none counts."""
    expected = worker.experts(method, None)
    assert near(found[0]["others"][name], expected, IN_FLOAT64)
    if name == "experts":
        moved = {key.split(".")[1] for key, tensor in expected.items() if key.endswith(".B") and tensor.any()}
        assert moved == {"0", "1", "2"}


def test_pages_and_recomputed_blocks(found, alone):
    for name in ("paged", "recomputed"):
        history, state = found[0]["others"][name]
        assert near(state, alone("lora")[1], IN_FLOAT64) and history["loss"] == pytest.approx(alone("lora")[0]["loss"], abs=1e-12)


@pytest.mark.parametrize("name", METHODS)
def test_the_bytes_of_a_step_are_those_of_the_gradients_once(name, found):
    """float64; beside the gradients go the losses of the step's two batches, and one float32 that nothing uses. Not once for each batch."""
    model = worker.small()
    worker.train(model, worker.method_named(name), None, steps=3 if name != "adalora" else 4)
    assert found[0]["methods"][name][2] == 8 * (ml.trainable_parameters(model) + 2) + 4
    if name == "lora-drop":
        assert found[0]["methods"][name][2] < found[0]["methods"]["lora"][2]           # of a shared pair once
    if name == "lora":
        assert 10 * found[0]["methods"][name][2] < found[0]["methods"]["full"][2]


@pytest.mark.parametrize("name", worker.SHARDED)
def test_a_sharded_base_gives_the_same_adapter_and_half_of_it_is_in_each_process(name, found, alone, out):
    history, state, held, peak = found[0]["sharded"][name]
    expected = {key: tensor for key, tensor in alone(name)[1].items() if key in state}
    assert near(state, expected, IN_FLOAT64) and history["loss"] == pytest.approx(alone(name)[0]["loss"], abs=1e-12)
    plain = worker.small()
    base, block = (sum(p.nbytes for p in module.parameters()) for module in (plain, plain.blocks[1]))
    outside = base - 3 * block
    model = ml.load_adapter(plain, out / f"sharded-{name}")
    ml.unload(model)
    ml.adapt(model, worker.method_named(name).scheduled(4), ["q_proj", "down_proj"])
    tensors = [pair for _, layer in ml.adapters(model) for pair in (*layer.named_parameters(), *layer.named_buffers())]
    ours = sum(tensor.nbytes for key, tensor in tensors if not key.startswith("base."))
    assert held == base // 2 + ours if name != "lora-drop" else base // 2 < held < base // 2 + ours      # pairs come to be shared
    assert peak == base // 2 + ours + (outside + block) // 2                       # whole are the block at work and what stands outside of blocks


def test_saved_and_merged_from_shards_it_is_as_from_one_process(found, alone, out):
    model = worker.small()
    worker.train(model, worker.method_named("lora"), None)
    loaded = ml.load_adapter(worker.small(), out / "sharded-lora")
    for (name, one), (_, other) in zip(ml.adapters(loaded), ml.adapters(model), strict=True):
        assert torch.allclose(one.delta_weight(), other.delta_weight(), rtol=0, atol=IN_FLOAT64) and one.B.any(), name
    assert near(found[0]["sharded"]["merged"], ml.merge(model).state_dict(), IN_FLOAT64)


def test_each_process_draws_masks_of_its_own_and_a_resumed_run_draws_them_again(found, out):
    (state, first), (other_state, second) = found[0]["dropout"], found[1]["dropout"]
    assert len(first) == len(second) == 8 and not any(torch.equal(one, other) for one, other in zip(first, second))
    assert not any(torch.equal(first[i], first[j]) for i in range(8) for j in range(i))
    for here, straight in zip(found, (first, second)):
        again, masks = here["resumed"]
        assert all(torch.equal(one, other) for one, other in zip(masks, straight[4:], strict=True))
        assert all(torch.equal(again[key], tensor) for key, tensor in state.items()) and all(torch.equal(other_state[key], state[key]) for key in state)
    assert not (out / "never.pt").exists()


def test_what_two_began_one_ends_and_what_one_began_two(found, alone, out, tmp_path, capsys):
    history, state = found[0]["from one"]
    expected, expected_state = alone("lora")
    model = worker.small()
    shutil.copy(out / "two.pt", tmp_path)
    ended = worker.train(model, worker.method_named("lora"), None, checkpoint=tmp_path / "two.pt")
    assert "resumed at step 2" in capsys.readouterr().out
    assert near(worker.state(model), expected_state, IN_FLOAT64) and near(state, expected_state, IN_FLOAT64)
    assert ended["loss"] == pytest.approx(expected["loss"], abs=1e-12) and history["loss"] == pytest.approx(expected["loss"], abs=1e-12)


@pytest.mark.parametrize("name, message", [
    ("rows", "ValueError: 2 processes and a batch of 1 rows: each needs one"),
    ("norm", "ValueError: 1 is a BatchNorm1d, which would take its means from each process's own rows"),
    ("reentrant", "ValueError: reentrant checkpointing hides"),
    ("four bits", "ValueError: blocks.0.attention.q_proj.base is in four bits, and those are not cut"),
    ("full", "ValueError: there is no frozen base to shard"),
    ("settings", "ValueError: rank 1 was started with another method than rank 0 (LoRA(rank=2, alpha=6.0"),
    ("base", "ValueError: rank 1 was started with another base than rank 0"),
    ("nudged", "ValueError: the processes train different numbers: at step 2 blocks.1.mlp.down_proj.A is not on rank 1 what it is on rank 0"),
    ("seen late", "ValueError: the processes train different numbers: at the end blocks.1.mlp.down_proj.A is not on rank 1"),
    ("not a number", "FloatingPointError: the loss is nan at step 2"),
])
def test_what_cannot_be_is_said_by_the_first_process_only(name, message, found, out):
    assert found[0]["errors"][name].startswith(message) and found[1]["errors"][name] == "SystemExit: 2"
    assert not (out / "rows.pt").exists() and load_checkpoint(out / "nan.pt", {})["step"] == 2


def test_what_only_the_second_process_meets_the_first_one_says(found):
    assert found[0]["second alone"] == "ConnectionError: rank 1 has ended: no such text"


def test_a_killed_process_ends_the_job_with_one_line(killed, out):
    run, step = killed
    said = [line for line in run.stderr.splitlines() if line.startswith("minilora: ")]
    assert run.returncode != 0 and step == 4
    assert said == [f"minilora: rank 1 of 2 processes has ended without a word: killed, or its machine is gone. In {out / 'killed'} is the checkpoint of "
                    "step 4; the same command goes on from there, on as many processes or on another number"]


def test_the_same_command_goes_on_from_there_bit_for_bit(found, out):
    code, printed = found[0]["command resumed"]
    assert code == 0 and printed.count("resumed at step 4\n") == 1
    for name in ("adapter_config.json", "adapter_model.safetensors", "history.json"):
        assert (out / "killed" / name).read_bytes() == (out / "straight" / name).read_bytes()
    assert not (out / "killed" / "checkpoint.pt").exists()


def test_only_the_first_process_prints_and_its_report_counts_bytes(found):
    code, printed = found[0]["command"]
    assert code == 0 and "qlora: 1,728 of 20,304 parameters trained\n" in printed
    assert "all-reduced: 6,920 bytes a step by each of 2 processes; full fine-tuning 81,216\n" in printed      # 4 bytes: 1,728, a loss, one more
    assert all(found[1][name] == (0, "") for name in ("command", "command resumed", "command sharded"))


def test_more_processes_than_rows_on_the_command_line(found, out):
    code, printed = found[0]["command with rows for one"]
    said = "minilora: 2 processes and a batch of 1 rows: each needs one at least; start fewer processes, or read larger batches"
    assert code == 2 and printed.splitlines()[-1] == said and found[1]["command with rows for one"] == (2, "") and not (out / "nothing").exists()


@pytest.mark.parametrize("name, rows, checkpointing, says", [
    ("lora", 1, None, "2 processes and a batch of 1 rows"), ("lora", 2, "reentrant", "reentrant checkpointing"), ("full", 2, None, "no frozen base"),
    *((name, 2, None, "is in four bits, and those are not cut") for name in ("qlora", "loftq", "qpissa")),
])
def test_what_processes_refuse_does_not_cost_the_run_that_force_would_replace(name, rows, checkpointing, says, monkeypatch, tmp_path, capsys):
    two = types.SimpleNamespace(count=2, shard=True)
    with pytest.raises(ValueError, match=says):
        parallel.Processes.refuse(two, make_method(name), rows, checkpointing)
    parallel.Processes.refuse(two, ml.LoRA(2), 2, "non-reentrant")
    asked = []
    monkeypatch.setattr(OneProcess, "refuse", lambda self, *of: asked.append(of) or parallel.Processes.refuse(two, *of))
    (tmp_path / "history.json").write_text("a run")
    flags = ["--method", name, "--rows", str(rows), *(["--checkpointing", checkpointing] if checkpointing else [])]
    assert main(["finetune", "--task", "facts", "--force", "--out", str(tmp_path), *flags]) == 2
    assert says in capsys.readouterr().err and asked[0][1:] == (rows, checkpointing) and (tmp_path / "history.json").read_text() == "a run"


def test_a_sharded_base_on_the_command_line(found, out, capsys):
    assert found[0]["command sharded"][0] == 0
    base = ["--base", str(out / "base.safetensors")]
    assert main([*worker.COMMAND, "--method", "dora", "--rank", "2", "--steps", "3", *base, "--out", str(out / "one")]) == 0
    expected, history = (json.loads((out / name / "history.json").read_text()) for name in ("one", "sharded"))
    for key in ("before", "after"):
        assert history[key] == pytest.approx(expected[key], abs=1e-5)
    models = [ml.load_adapter(ml.load_base(out / "base.safetensors"), out / name) for name in ("one", "sharded")]
    for (name, one), (_, other) in zip(*map(ml.adapters, models), strict=True):
        assert torch.allclose(one.delta_weight(), other.delta_weight(), rtol=0, atol=1e-5) and one.delta_weight().any(), name


def test_one_process_is_one_and_has_nothing_to_shard(monkeypatch, tmp_path, capsys):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with parallel.several() as processes:
        assert type(processes) is OneProcess and processes.first and processes.count == 1
    assert main([*worker.COMMAND, "--shard", "--out", str(tmp_path / "out")]) == 2 and not (tmp_path / "out").exists()
    assert capsys.readouterr().err.startswith("minilora: to shard is to cut the base over several processes, and there is one: torchrun")


def test_a_bad_argument_is_told_once(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, said in (("0", "minilora: argument --rank: must be a whole number of at least 1, got '0'\n"), ("1", "")):
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(SystemExit, match="2"):
            main([*worker.COMMAND, "--rank", "0"])
        assert capsys.readouterr().err == said


def test_the_shares_are_all_rows_once():
    ids, table = torch.arange(10).view(5, 2), torch.ones(1, 2)
    batch = {"input_ids": ids, "positions": table, "use_cache": False, "scale": torch.tensor(2.0)}
    shares = [parallel.share(None, batch, rank, 3) for rank in range(3)]
    assert [share["input_ids"][:, 0].tolist() for share, _ in shares] == [[0, 6], [2, 8], [4]] and [n for _, n in shares] == [2, 2, 1]
    assert all(share["positions"] is table and share["use_cache"] is False and share["scale"] == 2 for share, _ in shares)
    assert [len(x) for (x, _), _ in (parallel.share(None, (ids, ids[:, 0]), rank, 2) for rank in (0, 1))] == [3, 2] and parallel.rows(batch) == 5


def test_a_share_without_targets_gets_a_row_that_counts_and_has_no_weight():
    x = torch.arange(4)[:, None]
    y = torch.tensor([[7], [-100], [8], [-100]])
    shares = [parallel.share(None, (x, y), rank, 2) for rank in (0, 1)]
    assert [(rows[:, 0].tolist(), n) for (rows, _), n in shares] == [([0, 2], 2), ([1, 3, 0], 0)]
    assert parallel.share(None, (x[:1], y[:1]), 1, 2)[1] == 0 and len(parallel.share(None, (x[:1], y[:1]), 1, 2)[0][0]) == 1       # none of its own


class Store(dict):
    """torch's, without other processes."""

    set, check = dict.__setitem__, lambda self, keys: all(key in self for key in keys)


@pytest.mark.parametrize("rank, error, others, ends", [
    (0, RuntimeError("gloo: closed"), {1: ["lost", ""], 3: ["lost", ""]}, "ConnectionError: rank 2 of 4 processes has ended without a word"),
    (0, RuntimeError("gloo: closed"), {3: ["lost", ""]}, "ConnectionError: rank 1, 2 of 4 processes has ended"),
    (0, SystemExit(143), {1: ["stopped", ""], 3: ["stopped", ""]}, "ConnectionError: rank 2 of 4"),
    (0, SystemExit(143), {1: ["stopped", ""], 2: ["stopped", ""], 3: ["lost", ""]}, None),
    (0, RuntimeError("gloo: closed"), {1: ["lost", ""], 2: ["failed", "CUDA out of memory"]}, "ConnectionError: rank 2 has ended: CUDA out of memory"),
    (0, RuntimeError("gloo: closed"), {1: ["lost", ""], 2: ["lost", ""], 3: ["lost", ""]}, "ConnectionError: the connection between the processes"),
    (0, ValueError("no such file"), {}, None),
    (1, ValueError("no such file"), {}, "SystemExit: 2"),
    (1, KeyError("a bug"), {}, None),                                  # shows its traceback, wherever it is
    (1, RuntimeError("gloo: closed"), {0: ["lost", ""]}, "SystemExit: 1"),
    (1, RuntimeError("gloo: closed"), {2: ["lost", ""], 3: ["lost", ""]}, "ConnectionError: rank 0 of 4"),       # the first is gone: the second speaks
    (2, RuntimeError("gloo: closed"), {}, "SystemExit: 1"),
    (1, KeyboardInterrupt(), {0: ["stopped", ""]}, None),
    (2, KeyboardInterrupt(), {}, None),
    (0, RuntimeError("shapes differ"), {}, None),
])
def test_who_speaks_and_of_whom(rank, error, others, ends, monkeypatch):
    monkeypatch.setattr(parallel, "PATIENCE", 0.05)
    store = Store({f"{other} has ended": json.dumps(words) for other, words in others.items()})
    store |= {f"{other} lives": json.dumps(["another machine", 1]) for other in range(4)}
    processes = parallel.Processes(rank, 4, torch.device("cpu"), store, shard=False, check_every=50)
    try:
        processes.__exit__(type(error), error, None)
        assert ends is None
    except (ConnectionError, SystemExit) as raised:
        assert ends and f"{type(raised).__name__}: {raised}".startswith(ends)
    assert f"{rank} has ended" in store
    processes.__exit__(SystemExit, SystemExit(1), None)                # a second time, further out: nothing more


def test_a_process_of_this_machine_that_has_not_answered_is_asked_for(monkeypatch):
    """The first is there, and still waits for the second, which therefore leaves it the word; the third is not."""
    monkeypatch.setattr(parallel, "PATIENCE", 0.05)
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    store = Store({f"{rank} lives": json.dumps([socket.gethostname(), pid]) for rank, pid in ((0, os.getpid()), (1, os.getppid()), (2, ended.pid))})
    for rank, kind, says in ((1, SystemExit, "1"), (0, ConnectionError, "rank 2 of 3 processes has ended without a word")):
        with pytest.raises(kind, match=says):
            parallel.Processes(rank, 3, torch.device("cpu"), store, shard=False, check_every=50).__exit__(RuntimeError, RuntimeError("gloo: closed"), None)
        store.pop(f"{rank} has ended")


def test_on_a_gpu_the_second_process_speaks_where_the_first_cannot(monkeypatch):
    """There it may be waiting inside NCCL."""
    monkeypatch.setattr(parallel, "PATIENCE", 0.05)
    processes = parallel.Processes(1, 2, torch.device("cuda", 1), Store(), shard=False, check_every=50)
    assert processes.__exit__(ValueError, ValueError("no such file"), None) is None


def test_what_stands_in_words(tmp_path):
    assert parallel.stands(tmp_path / "checkpoint.pt") == "No checkpoint was written yet; the same command begins anew"
