"""What stops a run and what may not: signals, a second run in the same place, a full disk, data that has changed."""

import os
import signal
import threading

import pytest
import torch

import minilora as ml
from minilora import storage
from minilora.safety import runs
from minilora.data import Batches, split_text
from minilora.safety.runs import alone, lock_of, stoppable, uninterrupted

BATCHES = ml.data.facts(8).batches(1, 15)
TEXT = "".join(f"Line {i} of the text says {i * i}.\n" for i in range(300)).encode()


def small():
    torch.manual_seed(0)
    return ml.TinyGPT(ml.GPTConfig(context=16, width=8, layers=1, heads=2))


def run(model, batches=BATCHES, steps=12, **options):
    return ml.finetune(model, ml.LoRA(2, dropout=0.2), batches, steps, 0.01, progress=False, **options)


def stopping(at, how, batches=BATCHES):
    def stop(step):
        if step == at:
            how()
        return batches(step)

    return stop


def kill_by(number):
    return lambda: os.kill(os.getpid(), number)


def interrupt():
    raise KeyboardInterrupt


@pytest.fixture
def heard():
    """heard(number): that signal has its usual effect in this test, also where pytest was started with nohup, which ignores SIGHUP."""
    before = {}
    yield lambda number: before.update({number: signal.signal(number, signal.SIG_DFL)})
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.skipif(os.name != "posix", reason="signals are sent as POSIX has them")
@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_kill_and_a_closed_terminal_leave_a_checkpoint_and_the_run_ends_with_the_same_bits(name, tmp_path, capsys, heard):
    number, straight, again = getattr(signal, name), small(), small()
    heard(number)
    expected = run(straight)
    with pytest.raises(SystemExit) as stop:
        run(small(), stopping(7, kill_by(number)), checkpoint=tmp_path / "c.pt")
    assert stop.value.code == 128 + number and signal.getsignal(number) == signal.SIG_DFL
    assert [file.name for file in tmp_path.iterdir()] == ["c.pt"]
    assert run(again, checkpoint=tmp_path / "c.pt") == expected and "resumed at step 7\n" in capsys.readouterr().out
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), straight.state_dict().values(), strict=True))


@pytest.mark.skipif(os.name != "posix", reason="signals are sent as POSIX has them")
def test_kill_waits_for_the_end_of_the_step_and_a_handler_of_ones_own_stays(request):
    request.addfinalizer(lambda: signal.signal(signal.SIGTERM, signal.SIG_DFL))
    reached = []
    with pytest.raises(SystemExit), stoppable():
        with uninterrupted():
            os.kill(os.getpid(), signal.SIGTERM)
            reached.append("end of the step")
        reached.append("too far")
    assert reached == ["end of the step"] and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    signal.signal(signal.SIGTERM, lambda *_: reached.append("mine"))
    with stoppable():
        os.kill(os.getpid(), signal.SIGTERM)
    assert reached == ["end of the step", "mine"]


def test_in_another_thread_signals_are_left_alone():
    failed = []

    def work():
        try:
            run(small(), steps=1)
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert not failed


def test_a_second_run_in_the_same_place_is_refused_while_the_first_lives(tmp_path):
    refused = []

    def second():
        try:
            run(other, checkpoint=tmp_path / "c.pt")
        except ValueError as error:
            refused.append(str(error))

    straight, model, other = small(), small(), small()
    expected = run(straight)
    assert run(model, stopping(5, second), checkpoint=tmp_path / "c.pt") == expected
    assert refused == [f"{tmp_path / 'c.pt'}: another run is writing there; wait for its end, or choose another place"]
    assert [file.name for file in tmp_path.iterdir()] == ["c.pt"]
    with alone(tmp_path), alone(tmp_path / "one"), alone(tmp_path / "two"):                   # a folder and two files in it are three places
        with pytest.raises(ValueError, match="another run"), alone(tmp_path):
            pass
    assert [file.name for file in tmp_path.iterdir()] == ["c.pt"]


def test_the_lock_of_a_run_that_was_killed_locks_nothing(tmp_path):
    lock_of(tmp_path).touch()
    lock_of(tmp_path / "c.pt").touch()
    with alone(tmp_path):
        run(small(), steps=1, checkpoint=tmp_path / "c.pt")
    assert [file.name for file in tmp_path.iterdir()] == ["c.pt"]


def test_where_the_lock_file_is_removed_in_the_same_moment_another_is_made(tmp_path, monkeypatch):
    flock, times = runs.fcntl.flock, []

    def late(file, how):
        times.append(1)
        if len(times) == 1:
            lock_of(tmp_path).unlink()                       # the run before ends between our open and our lock
        flock(file, how)

    monkeypatch.setattr(runs.fcntl, "flock", late)
    with alone(tmp_path):
        monkeypatch.undo()
        with pytest.raises(ValueError, match="another run"), alone(tmp_path):
            pass
    assert len(times) == 2 and not list(tmp_path.iterdir())


def test_windows_has_another_lock(tmp_path, monkeypatch):
    """No Windows here: its one call is played, by what its documentation says of it."""
    class Locking:
        LK_NBLCK, held = 2, set()

        def locking(self, number, how, size):
            if self.held:
                raise PermissionError(13, "Permission denied")
            self.held.add(number)

    monkeypatch.setattr(runs, "fcntl", None)
    monkeypatch.setattr(runs, "msvcrt", Locking(), raising=False)
    with alone(tmp_path):
        with pytest.raises(ValueError, match="another run"), alone(tmp_path):
            pass


@pytest.mark.parametrize("at", [0, 3, 9])
def test_a_full_disk_names_the_file_and_leaves_the_checkpoint_before(at, tmp_path, monkeypatch, capsys):
    """The disk is full from the step `at` on; the run goes on later from what was last written."""
    straight, again, full = small(), small(), []
    expected = run(straight)
    fsync = os.fsync

    def flush(number):
        if full:
            raise OSError(28, "No space left on device")
        fsync(number)

    monkeypatch.setattr(storage.os, "fsync", flush)
    monkeypatch.setattr(runs, "CHECKPOINT_SHARE", 1.0)       # after each step
    with pytest.raises(OSError) as error:
        run(small(), stopping(at, lambda: full.append(True)), checkpoint=tmp_path / "c.pt")
    assert error.value.errno == 28 and str(tmp_path / "c.pt") in str(error.value) and ".tmp" not in str(error.value)
    assert [file.name for file in tmp_path.iterdir()] == (["c.pt"] if at else [])
    full.clear()
    assert run(again, checkpoint=tmp_path / "c.pt") == expected
    assert (f"resumed at step {at}\n" in capsys.readouterr().out) == bool(at)


def test_no_folder_for_the_checkpoint_is_said_before_the_work(tmp_path):
    with pytest.raises(OSError) as error:
        run(small(), lambda step: pytest.fail("begun"), checkpoint=tmp_path / "none" / "c.pt")
    assert str(tmp_path / "none" / "c.pt") in str(error.value)


@pytest.mark.parametrize("where", [0, 1000, len(TEXT) // 2, len(TEXT) * 9 // 10 + 40, len(TEXT) - 1])
def test_one_byte_of_the_text_has_changed_anywhere(where, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run(small(), Interrupted(split_text(TEXT, "t"), 1, 15, 0), checkpoint=tmp_path / "c.pt")
    changed = TEXT[:where] + b"#" + TEXT[where + 1:]
    with pytest.raises(ValueError, match="c.pt: a checkpoint of another run, whose data was another: the text has changed since; remove it"):
        run(small(), split_text(changed, "t").batches(1, 15), checkpoint=tmp_path / "c.pt")


class Interrupted(Batches):
    def __call__(self, step):
        return interrupt() if step == 3 else super().__call__(step)


@pytest.mark.parametrize("moved, refused", [(0, "first batch"), (2, "batch of step 2"), (8, "batch of step 8"), (10, "")])
def test_batches_of_ones_own_are_looked_at_again_here_and_there(moved, refused, tmp_path):
    """Steps 0, 1, 2, 4, 8: of a function nothing else can be known. What comes after the stop may be anything."""
    with pytest.raises(KeyboardInterrupt):
        run(small(), stopping(10, interrupt), checkpoint=tmp_path / "c.pt")

    def other(step):
        return BATCHES(100) if step == moved else BATCHES(step)

    if refused:
        with pytest.raises(ValueError, match=f"whose {refused} was another"):
            run(small(), other, checkpoint=tmp_path / "c.pt")
    else:
        run(small(), other, checkpoint=tmp_path / "c.pt")


def test_equal_bytes_give_equal_numbers_under_any_name(tmp_path):
    one, other = split_text(TEXT, "a.txt"), split_text(TEXT, "b.txt")
    straight, again = small(), small()
    expected = run(straight, one.batches(1, 15))
    with pytest.raises(KeyboardInterrupt):
        run(small(), Interrupted(one, 1, 15, 0), checkpoint=tmp_path / "c.pt")
    assert run(again, other.batches(1, 15), checkpoint=tmp_path / "c.pt") == expected
