"""python -m minilora as a user meets it: whole runs, a real Ctrl-C and a real kill, and one clear line for each bad input."""

import codecs
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from contextlib import nullcontext

import pytest
import torch
from matplotlib.figure import Figure

import minilora as ml
from minilora import plots, storage
from minilora.safety import runs
from minilora.evidence import capacity, claims, compare
from minilora.__main__ import main
from minilora.methods import METHODS
from minilora.storage import save_model

TEXT = "The quick brown fox jumps over the lazy dog, number {}. "


@pytest.fixture
def base(tmp_path):
    """A small base of its own, so that a run takes a second."""
    torch.manual_seed(0)
    save_model(ml.TinyGPT(ml.GPTConfig(context=64, width=16, layers=2, heads=2)), tmp_path / "base.safetensors")
    return str(tmp_path / "base.safetensors")


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "fox.txt"
    path.write_text("".join(TEXT.format(i) for i in range(100)), encoding="utf-8")
    return str(path)


@pytest.fixture
def finetune(tmp_path, base, text, capsys):
    """finetune(--flag, value, …) -> (exit code, stdout, stderr, DIR), in process, on the small base. Its samples and its picture take
    longer than its six steps, so they are small unless `whole`."""
    generate = ml.TinyGPT.generate

    def run(*flags, out=tmp_path / "out", source=("--text", text), whole=False):
        words = ["finetune", *source, "--base", base, "--rank", "2", "--steps", "6", "--out", str(out), *flags]
        with pytest.MonkeyPatch.context() as patch:
            if not whole:
                patch.setattr(ml.TinyGPT, "generate", lambda self, prompt, max_new, *rest, **named: generate(self, prompt, 9, *rest, **named))
                patch.setattr(plots, "loss_curve", lambda *_: Figure(figsize=(1, 1)))
            try:
                code = main(words)
            except SystemExit as stop:
                code = stop.code
        captured = capsys.readouterr()
        return code, captured.out, captured.err, out

    return run


def files(folder):
    return sorted(path.name for path in folder.iterdir())


FINISHED = ["adapter_config.json", "adapter_model.safetensors", "history.json", "loss.png"]


def test_a_run_shows_what_changed_and_writes_four_files(finetune):
    code, out, err, folder = finetune(whole=True)
    assert code == 0 and files(folder) == FINISHED
    for said in ("before:", "after:", "bits per byte", "forgotten:", "parameters trained", "of them seen in training"):
        assert said in out
    assert "6/6" in err                                              # the progress bar
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")
    history = json.loads((folder / "history.json").read_text())
    assert len(history["loss"]) == 6 and history["method"] == "lora" and history["hyperparameters"]["rank"] == 2
    assert [step for step, _ in history["evaluated"]] == [0, 6]
    assert history["evaluated"][-1][1] == pytest.approx(history["after"]["bits_per_byte"] * 0.6931471805599453, rel=1e-6)


def test_what_is_written_is_what_was_trained(finetune, base):
    _, _, _, folder = finetune()
    history = json.loads((folder / "history.json").read_text())
    model = ml.load_adapter(ml.load_base(base), folder)
    windows = ml.data.text(folder.parent / "fox.txt").held_out(65)
    assert ml.held_out_loss(model, windows) / 0.6931471805599453 == pytest.approx(history["after"]["bits_per_byte"], rel=1e-6)


@pytest.mark.parametrize("task", ["voice", "facts", "sums"])
def test_built_in_tasks(finetune, task):
    code, out, _, folder = finetune(source=("--task", task))
    assert code == 0 and files(folder) == FINISHED
    assert ("byte for byte" in out) == (task != "voice")


def test_chinese_text(finetune, tmp_path):
    (tmp_path / "论语.txt").write_text("子曰：学而时习之，不亦说乎？有朋自远方来，不亦乐乎？\n" * 60, encoding="utf-8")
    code, out, _, folder = finetune(source=("--text", str(tmp_path / "论语.txt")))
    assert code == 0 and files(folder) == FINISHED and out.count("子曰") >= 2 and "论语.txt" in out


def test_full_fine_tuning_writes_the_whole_model(finetune, capsys):
    code, _, _, folder = finetune("--method", "full")
    assert code == 0 and files(folder) == ["history.json", "loss.png", "model.safetensors"]
    assert main(["generate", "--adapter", str(folder), "--prompt", "The", "--max-new", "5", "--seed", "0"]) == 0
    assert capsys.readouterr().out.startswith("The")


@pytest.mark.parametrize("method", [name for name in METHODS if name != "full"])
def test_every_method_trains_stops_goes_on_speaks_and_merges(finetune, method, base, tmp_path, monkeypatch, capsys):
    """Stopped in process after its third step, the same command ends with the bytes of a run that was not stopped."""
    code, out, _, straight = finetune("--method", method, out=tmp_path / "straight")
    assert code == 0 and files(straight) == FINISHED and f"{method}: " in out
    clear, cleared = torch.optim.AdamW.zero_grad, []

    def stop(self):
        cleared.append(1)
        if len(cleared) == (4 if method == "lora-drop" else 3):                      # its warm-up of one step clears once
            raise KeyboardInterrupt
        clear(self)

    monkeypatch.setattr(torch.optim.AdamW, "zero_grad", stop)
    code, _, _, folder = finetune("--method", method)
    assert code == 130 and files(folder) == ["checkpoint.pt"]
    monkeypatch.undo()
    code, out, _, folder = finetune("--method", method)
    assert code == 0 and "resumed at step 2" in out
    assert all((folder / name).read_bytes() == (straight / name).read_bytes() for name in FINISHED[:3])
    said = []
    for flags in (["--adapter", str(folder)], ["--base", str(tmp_path / "merged")]):
        if said:
            assert main(["merge", "--adapter", str(folder), "--base", base, "--out", str(tmp_path / "merged")]) == 0
            capsys.readouterr()
        assert main(["generate", "--prompt", "The", "--max-new", "9", "--temperature", "0", "--base", base, *flags]) == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[1] and said[0].startswith("The")


@pytest.mark.parametrize("spelled, method", [("LoRA+", "lora-plus"), ("loraplus", "lora-plus"), ("lora_fa", "lora-fa"), ("DoRA", "dora"), ("Delta-LoRA", "delta-lora"),
                                             ("rsLoRA", "rslora"), ("LoRA-drop", "lora-drop"), ("AdaLoRA", "adalora"), ("VeRA", "vera"), ("PiSSA", "pissa")])
def test_a_method_is_known_however_it_is_spelled(finetune, spelled, method):
    code, _, _, folder = finetune("--method", spelled, "--steps", "1")
    assert code == 0 and json.loads((folder / "history.json").read_text())["method"] == method


def test_adaloras_rank_is_its_target(finetune):
    _, _, _, folder = finetune("--method", "adalora", "--rank", "4", "--steps", "20")
    fields = json.loads((folder / "history.json").read_text())["hyperparameters"]
    assert {key: fields[key] for key in ("initial_rank", "target_rank", "total_steps", "warmup_steps", "final_steps")} == {
        "initial_rank": 6, "target_rank": 4, "total_steps": 20, "warmup_steps": 2, "final_steps": 10}


def test_targets_and_alpha_are_used(finetune):
    _, _, _, folder = finetune("--targets", "q_proj,down_proj", "--alpha", "3")
    config = json.loads((folder / "adapter_config.json").read_text())
    assert len(config["target_modules"]) == 4 and config["lora_alpha"] == 3


def test_the_same_command_twice_gives_the_same_bytes(finetune, tmp_path):
    one, two = finetune(out=tmp_path / "one")[3], finetune(out=tmp_path / "two")[3]
    assert all((one / name).read_bytes() == (two / name).read_bytes() for name in FINISHED[:3])
    three = finetune("--seed", "1", out=tmp_path / "three")[3]
    assert (one / FINISHED[1]).read_bytes() != (three / FINISHED[1]).read_bytes()


def test_a_finished_run_is_refused_without_force(finetune):
    folder = finetune()[3]
    before = {name: (folder / name).read_bytes() for name in files(folder)}
    code, out, err, _ = finetune()
    assert code == 2 and "finished run" in err and "--force" in err and err.count("\n") == 1
    assert before == {name: (folder / name).read_bytes() for name in files(folder)}
    assert finetune("--force", "--seed", "3")[0] == 0
    assert before["adapter_model.safetensors"] != (folder / "adapter_model.safetensors").read_bytes()


@pytest.mark.parametrize("flags", [("--lr", "1e31"), ("--rank", "99"), ("--targets", "query"), ("--context", "65")])
def test_what_is_refused_does_not_cost_the_run_that_force_would_replace(finetune, flags):
    folder = finetune()[3]
    before = {name: (folder / name).read_bytes() for name in files(folder)}
    code, _, err, _ = finetune("--force", *flags)
    assert code == 2 and err.count("\n") == 1 and {name: (folder / name).read_bytes() for name in files(folder)} == before


def test_a_folder_with_other_things_in_it_is_refused_and_force_keeps_them(finetune, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("years of work")
    code, _, err, folder = finetune()
    assert code == 2 and "not empty" in err and files(folder) == ["thesis.txt"]
    assert finetune("--force")[0] == 0 and (folder / "thesis.txt").read_text() == "years of work"


def test_a_kill_while_the_first_checkpoint_was_written_blocks_nothing(finetune, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".checkpoint.pt.tmp").write_bytes(b"half of it")
    code, _, _, folder = finetune()
    assert code == 0 and files(folder) == FINISHED


def stopped(finetune, monkeypatch, how, *flags, **where):
    """A run in which `how` happens in its third step; before it a checkpoint is written after each."""
    clear, cleared = torch.optim.AdamW.zero_grad, []

    def stop(self):
        cleared.append(1)
        if len(cleared) == 3:
            how()
        clear(self)

    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "zero_grad", stop)
        patch.setattr(runs, "CHECKPOINT_SHARE", 1.0)
        return finetune(*flags, **where)


def interrupt():
    raise KeyboardInterrupt


@pytest.mark.skipif(os.name != "posix", reason="signals are sent as POSIX has them")
def test_kill_is_answered_like_ctrl_c(finetune, monkeypatch):
    code, _, err, folder = stopped(finetune, monkeypatch, lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert code == 143 and "a checkpoint is in" in err and files(folder) == ["checkpoint.pt"]
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    code, out, _, folder = finetune()
    assert code == 0 and "resumed at step 2" in out and files(folder) == FINISHED


def test_stopped_before_there_is_a_checkpoint_it_names_none(finetune, monkeypatch):
    monkeypatch.setattr(ml.LoRADrop, "prepare", lambda *_: interrupt())
    code, _, err, folder = finetune("--method", "lora-drop")
    assert code == 130 and err.endswith("\nstopped; no checkpoint was written yet; the same command begins anew.\n") and not folder.exists()


def test_a_full_disk_is_one_line_under_the_progress_bar(finetune, monkeypatch):
    def full(number):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        code, _, err, folder = stopped(finetune, monkeypatch, lambda: patch.setattr(storage.os, "fsync", full))
    assert code == 2 and files(folder) == ["checkpoint.pt"]
    assert err.endswith(f"\nminilora: [Errno 28] No space left on device: '{folder / 'checkpoint.pt'}'\n") and "Traceback" not in err
    code, out, _, folder = finetune()
    assert code == 0 and "resumed at step 2" in out and files(folder) == FINISHED


def test_two_runs_in_one_folder(finetune, monkeypatch):
    said = []
    code, _, _, folder = stopped(finetune, monkeypatch, lambda: said.extend([finetune(), finetune("--force")]))
    for refused, _, err, _ in said:
        assert refused == 2 and err.endswith(f"minilora: {folder}: another run is writing there; wait for its end, or choose another place\n")
    assert len(said) == 2 and code == 0 and files(folder) == FINISHED


@pytest.mark.parametrize("command", [["compare", "--quick"], ["capacity"]])
def test_other_commands_too_are_alone_in_their_folder(command, tmp_path, capsys):
    with runs.alone(tmp_path):
        assert main([*command, "--out", str(tmp_path)]) == 2
    assert f"{tmp_path}: another run is writing there" in capsys.readouterr().err and files(tmp_path) == []


@pytest.mark.parametrize("changed", ["held out", "in the middle", "longer"])
def test_a_text_that_changed_since_the_run_was_stopped_is_said(finetune, monkeypatch, text, changed, tmp_path):
    assert stopped(finetune, monkeypatch, interrupt)[0] == 130
    before = (tmp_path / "out" / "checkpoint.pt").read_bytes()
    with open(text, encoding="utf-8") as file:
        words = file.read()
    cut = len(words) * 9 // 10
    with open(text, "w", encoding="utf-8") as file:
        file.write({"held out": words[:cut] + "#" * (len(words) - cut), "in the middle": words[:2500] + "#" + words[2501:], "longer": words + "#"}[changed])
    code, _, err, folder = finetune()
    assert code == 2 and "the text has changed since" in err and "--force" in err and (folder / "checkpoint.pt").read_bytes() == before
    assert finetune("--force")[0] == 0 and files(folder) == FINISHED


@pytest.mark.skipif(os.name != "posix", reason="a pipe with a name, and names that are no text")
def test_a_pipe_and_any_name_give_what_the_file_gives(finetune, monkeypatch, text, tmp_path):
    straight = finetune(out=tmp_path / "straight")[3]
    content = open(text, "rb").read()
    os.mkfifo(tmp_path / "pipe")

    def through_the_pipe(*flags, **options):
        writer = threading.Thread(target=(tmp_path / "pipe").write_bytes, args=(content,))
        writer.start()
        found = finetune(*flags, source=("--text", str(tmp_path / "pipe")), **options)
        writer.join()
        return found

    assert stopped(through_the_pipe, monkeypatch, interrupt)[0] == 130
    code, out, _, folder = through_the_pipe()
    assert code == 0 and "resumed at step 2" in out and "47% of them seen in training" in out
    odd = os.fsdecode(os.fsencode(str(tmp_path)) + b"/f\xfc\xff\xe4.txt")
    with open(odd, "wb") as file:
        file.write(codecs.BOM_UTF8 + content)                                        # and with a byte order mark
    code, out, _, other = finetune(source=("--text", odd), out=tmp_path / "other")
    assert code == 0 and "f\N{REPLACEMENT CHARACTER}" in out
    for name in FINISHED[:2]:
        assert (folder / name).read_bytes() == (other / name).read_bytes() == (straight / name).read_bytes()


@pytest.mark.parametrize("flags", [["--steps", "1", "--lr", "1e30"], ["--steps", "4", "--lr", "1e30"]])
def test_a_rate_that_is_far_too_high_is_one_line_whose_advice_can_be_followed(finetune, flags):
    code, _, err, folder = finetune(*flags)
    line = err.splitlines()[-1]
    assert code == 2 and "is nan" in line and "a lower learning rate than 1e+30 may help" in line and "--force" in line and "Traceback" not in err
    assert files(folder) == ["checkpoint.pt"]
    code, _, err, _ = finetune(*flags[:2], "--lr", "1e-3")
    assert code == 2 and "whose lr was 1e+30" in err and "--force" in err
    assert finetune(*flags[:2], "--lr", "1e-3", "--force")[0] == 0 and files(folder) == FINISHED


def test_weights_in_four_bits_are_counted_as_the_parameters_they_stand_for(finetune, tmp_path):
    said = {method: re.search(r"([\d,]+) of ([\d,]+) parameters", finetune("--method", method, "--steps", "1", out=tmp_path / method)[1]).groups()
            for method in ("lora", "qlora", "full")}
    assert said["lora"] == said["qlora"] and said["full"][0] == said["full"][1]
    trained, everything = (int(number.replace(",", "")) for number in said["lora"])
    assert everything - trained == int(said["full"][1].replace(",", ""))


def test_accumulate_and_clip_are_used_and_belong_to_the_run(finetune, monkeypatch, tmp_path):
    flags = ("--accumulate", "2", "--clip", "0.05", "--steps", "5")
    straight, plain = finetune(*flags, out=tmp_path / "straight")[3], finetune("--steps", "5", out=tmp_path / "plain")[3]
    assert stopped(finetune, monkeypatch, interrupt, *flags)[0] == 130
    for other, says in ((("--accumulate", "3", *flags[2:]), "accumulate was 2 and now is 3"), ((*flags[:2], *flags[4:]), "clip was 0.05 and now is None")):
        code, _, err, _ = finetune(*other)
        assert code == 2 and says in err
    code, out, _, folder = finetune(*flags)
    assert code == 0 and "resumed at step 2" in out
    assert all((folder / name).read_bytes() == (straight / name).read_bytes() for name in FINISHED[:3])
    assert (folder / FINISHED[1]).read_bytes() != (plain / FINISHED[1]).read_bytes()
    assert json.loads((folder / "history.json").read_text())["clip"] == 0.05


def test_rows_and_context_are_used(finetune, tmp_path):
    plain = json.loads((finetune("--steps", "1", out=tmp_path / "plain")[3] / "history.json").read_text())
    for flags in (["--rows", "3"], ["--context", "32"]):
        other = json.loads((finetune("--steps", "1", *flags, out=tmp_path / flags[0])[3] / "history.json").read_text())
        assert other["loss"] != plain["loss"] and (other["evaluated"][0] != plain["evaluated"][0]) == (flags[0] == "--context")
    code, _, err, _ = finetune("--context", "65", out=tmp_path / "wide")
    assert code == 2 and err == "minilora: --context 65: this model reads at most 64\n" and not (tmp_path / "wide").exists()


def test_a_text_cut_inside_its_last_character_is_said_in_one_line(finetune, tmp_path):
    (tmp_path / "cut.txt").write_bytes(("子曰：学而时习之。\n" * 100 + "子").encode()[:-1])
    code, _, err, _ = finetune("--steps", "1", source=("--text", str(tmp_path / "cut.txt")))
    assert code == 0 and err.startswith(f"minilora: {tmp_path / 'cut.txt'}: the file ends inside a character; its beginning (e5 ad) is left out\n")


def test_version(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0 and capsys.readouterr().out == f"minilora {ml.__version__}\n" and re.fullmatch(r"\d+\.\d+\.\d+", ml.__version__)


def start(base, text, out):
    words = [sys.executable, "-m", "minilora", "finetune", "--text", text, "--base", base, "--rank", "2", "--steps", "200", "--out", str(out)]
    # a shell's background job would start with Ctrl-C ignored
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
                            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler))


def wait_for(path):
    for _ in range(6000):
        if path.exists():
            return
        time.sleep(0.01)
    raise AssertionError(f"{path} never came")


@pytest.mark.skipif(os.name != "posix", reason="signals are sent as POSIX has them")
def test_ctrl_c_then_a_kill_then_the_same_command_ends_as_if_nothing_had_happened(base, text, tmp_path, finetune):
    """What is stopped is a process of its own; what is not, runs here."""
    straight, out = tmp_path / "straight", tmp_path / "out"
    assert finetune("--steps", "200", out=straight)[0] == 0

    first = start(base, text, out)
    wait_for(out / "checkpoint.pt")
    first.send_signal(signal.SIGINT)
    _, err = first.communicate()
    assert first.returncode == 130 and "The same command goes on from there" in err and "Traceback" not in err
    assert files(out) == ["checkpoint.pt"]

    code, _, err, _ = finetune("--steps", "200", "--lr", "0.1")
    assert code == 2 and "whose lr was" in err and files(out) == ["checkpoint.pt"]

    second = start(base, text, out)
    written = (out / "checkpoint.pt").stat().st_mtime_ns
    while (out / "checkpoint.pt").stat().st_mtime_ns == written and second.poll() is None:
        time.sleep(0.005)
    second.kill()
    assert second.wait() == -signal.SIGKILL

    code, printed, _, _ = finetune("--steps", "200")
    assert code == 0 and "resumed at step" in printed and files(out) == FINISHED
    for name in FINISHED[:3]:
        assert (out / name).read_bytes() == (straight / name).read_bytes(), name


BAD = [
    (["--text", "{tmp}/nothing.txt"], "nothing.txt"), (["--text", "{tmp}"], "cannot be read"), (["--text", "{tmp}/empty.txt"], "empty"),
    (["--text", "{tmp}/short.txt"], "too short"), (["--text", "{tmp}/binary.txt"], "UTF-8|binary"),
    (["--text", "{text}", "--rank", "0"], "rank"), (["--text", "{text}", "--rank", "-1"], "rank"), (["--text", "{text}", "--rank", "17"], "rank 17 is above"),
    (["--text", "{text}", "--rank", "two"], "rank"), (["--text", "{text}", "--steps", "0"], "steps"), (["--text", "{text}", "--steps", "-3"], "steps"),
    (["--text", "{text}", "--steps", "1.5"], "steps"), (["--text", "{text}", "--steps", "inf"], "steps"), (["--text", "{text}", "--lr", "0"], "lr"),
    (["--text", "{text}", "--lr", "-1"], "lr"), (["--text", "{text}", "--lr", "nan"], "lr"), (["--text", "{text}", "--lr", "inf"], "lr"),
    (["--text", "{text}", "--method", "magic"], "magic"), (["--text", "{text}", "--targets", "query"], "no Linear matches 'query'.*q_proj"),
    (["--text", "{text}", "--task", "voice"], "not allowed with"), (["--task", "poetry"], "poetry"), ([], "required"),
    (["--text", "{text}", "--alpha", "x"], "alpha"), (["--text", "{text}", "--seed", "-1"], "seed"), (["--text", "{text}", "--base", "{tmp}/none"], "none: no such file"),
    (["--text", "{text}", "--base", "{text}"], "fox.txt: not a whole"), (["--text", "{text}", "--colour", "red"], "colour"),
    (["--text", "{text}", "--method", "full", "--targets", "q_proj"], "no targets"),
    (["--text", "{text}", "--method", "vera", "--alpha", "3"], "vera has no alpha"), (["--text", "{text}", "--method", "full", "--alpha", "3"], "full has no alpha"),
    (["--text", "{text}", "--method", "adalora", "--rank", "16"], "rank 24 is above"), (["--text", "{text}", "--method", "pissa", "--rank", "17"], "rank 17 is above"),
]


@pytest.mark.parametrize("flags, says", BAD, ids=[" ".join(flags[-2:]) or "nothing" for flags, _ in BAD])
def test_bad_input_is_one_clear_line_and_leaves_nothing_behind(tmp_path, base, text, capsys, flags, says):
    (tmp_path / "empty.txt").touch()
    (tmp_path / "short.txt").write_text("too short")
    (tmp_path / "binary.txt").write_bytes(bytes(range(256)) * 20)
    out = tmp_path / "a" / "b" / "out"
    words = [flag.format(tmp=tmp_path, text=text) for flag in flags]
    try:
        code = main(["finetune", "--base", base, "--out", str(out), *words])
    except SystemExit as stop:
        code = stop.code
    err = capsys.readouterr().err
    assert code == 2
    assert err.count("\n") == 1 and re.search(says, err), err
    assert not (tmp_path / "a").exists()


def test_a_place_that_cannot_be_written_is_one_clear_line(finetune, tmp_path):
    (tmp_path / "file").touch()
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        code, _, err, _ = finetune(out=out)
        assert code == 2 and err.count("\n") == 1 and "file" in err
    assert (tmp_path / "file").read_bytes() == b""


def test_no_write_permission_is_one_clear_line_and_leaves_no_folder(finetune, tmp_path, monkeypatch):
    """Root may write anywhere, so the refusal is made where the system would make it."""
    import tempfile

    def denied(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(tempfile, "TemporaryFile", denied)
    code, _, err, _ = finetune(out=tmp_path / "a" / "out")
    assert code == 2 and "cannot write there (Permission denied)" in err and err.count("\n") == 1 and not (tmp_path / "a").exists()


def test_merged_and_adapted_models_say_the_same(finetune, base, tmp_path, capsys):
    folder = finetune("--steps", "30")[3]
    merged = tmp_path / "merged.safetensors"
    assert main(["merge", "--adapter", str(folder), "--base", base, "--out", str(merged)]) == 0
    adapted, plain = ml.load_adapter(ml.load_base(base), folder), ml.load_base(merged)
    ids = torch.arange(32)[None] + 60
    assert torch.allclose(adapted(ids), plain(ids), atol=1e-5) and not torch.allclose(plain(ids), ml.load_base(base)(ids), atol=1e-3)
    assert main(["merge", "--adapter", str(folder), "--base", base, "--out", str(merged)]) == 2
    assert "exists already" in capsys.readouterr().err
    capsys.readouterr()
    said = []
    for words in (["--adapter", str(folder), "--base", base], ["--base", str(merged)]):
        assert main(["generate", *words, "--prompt", "The quick", "--max-new", "20", "--temperature", "0"]) == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[1] and said[0].startswith("The quick")


@pytest.mark.parametrize("words, says", [
    (["generate", "--adapter", "{tmp}/nowhere"], "adapter_config.json"), (["generate", "--temperature", "-1"], "temperature"), (["generate", "--max-new", "0"], "max-new"),
    (["merge", "--adapter", "{tmp}/nowhere", "--out", "{tmp}/m"], "adapter_config.json"), (["dance"], "dance"), ([], "required"),
])
def test_other_commands_refuse_in_one_line_too(tmp_path, capsys, words, says):
    try:
        code = main([word.format(tmp=tmp_path) for word in words])
    except SystemExit as stop:
        code = stop.code
    err = capsys.readouterr().err
    assert code == 2 and err.count("\n") == 1 and says in err


def test_pretraining_runs_and_its_file_is_a_base(tmp_path, monkeypatch, capsys):
    """Of the prose and of the held-out windows a little is enough."""
    loss = ml.held_out_loss
    monkeypatch.setattr(ml, "held_out_loss", lambda model, windows: loss(model, windows[:4]))
    monkeypatch.setattr(ml.data, "prose", lambda: b"An index is what a book ends with. " * 90)
    assert main(["pretrain", "--steps", "2", "--out", str(tmp_path / "made.safetensors")]) == 0
    assert "floor" in capsys.readouterr().out
    assert ml.load_base(tmp_path / "made.safetensors").config == ml.GPTConfig()
    assert files(tmp_path) == ["made.safetensors"]


def test_compare_on_a_text_of_ones_own_is_made_once(base, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(compare, "CONTEXT", 16)
    monkeypatch.setattr(compare, "step_ratio", lambda *_: 1.0)             # 23 entries by a clock: test_compare.py asks it of two
    (tmp_path / "mine.txt").write_text("".join(f"Line {i} says that {i} and {i + 1} are neighbours.\n" for i in range(90)))
    flags = ["compare", "--text", str(tmp_path / "mine.txt"), "--quick", "--steps", "10", "--base", base, "--out", str(tmp_path / "out"), "--nf4"]
    assert main(flags) == 0
    first = capsys.readouterr().out
    assert files(tmp_path / "out") == ["forgetting.png", "quality.png", "results.csv", "results.json"]
    rows = [line.split("  ")[0] for line in first.split("fine-tuning's")[1].splitlines()[2:25]]
    assert {*METHODS} <= {*rows} and "dora on nf4" in rows and len(rows) == len(set(rows)) == 23
    before = (tmp_path / "out" / "results.json").read_bytes()
    assert main(flags) == 0
    second = capsys.readouterr().out
    assert "seed 0:" in first and "seed 0:" not in second and (tmp_path / "out" / "results.json").read_bytes() == before
    assert main([*flags[:5], "12", *flags[6:]]) == 2 and "other settings" in capsys.readouterr().err


@pytest.mark.parametrize("flags, message", [
    (["--task", "voice,chess"], "invalid choice: 'chess' (choose from voice, facts, sums, code)"), (["--seeds", "0"], "at least 1"), (["--steps", "5"], "at least 10"),
    (["--text", "nowhere.txt"], "nowhere.txt: cannot be read"), (["--budget", "9" * 400], "must be a whole number"), (["--budget", "1" + "0" * 12], "at most 1,000,000,000"),
])
def test_bad_flags_of_compare(flags, message, tmp_path, capsys):
    with pytest.raises(SystemExit) if "nowhere.txt" not in flags else nullcontext():
        assert main(["compare", *flags, "--out", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err and files(tmp_path) == []


def test_a_base_of_other_symbols_than_bytes_is_refused(tmp_path, capsys):
    (tmp_path / "my.txt").write_text("A line of a text. " * 200)
    ml.storage.save_model(ml.TinyGPT(ml.GPTConfig(vocab_size=100, context=64, width=16, layers=1, heads=2)), tmp_path / "b.safetensors")
    for command in (["compare", "--quick"], ["finetune", "--text", str(tmp_path / "my.txt")]):
        assert main([*command, "--base", str(tmp_path / "b.safetensors"), "--out", str(tmp_path / "out")]) == 2
        assert "a base of 100 symbols" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_comparison_that_is_refused_leaves_no_folder(tmp_path, capsys):
    ml.storage.save_model(ml.TinyGPT(ml.GPTConfig(context=64, width=8, layers=1, heads=2)), tmp_path / "narrow.safetensors")
    assert main(["compare", "--quick", "--base", str(tmp_path / "narrow.safetensors"), "--out", str(tmp_path / "a" / "b")]) == 2
    assert "adalora: " in capsys.readouterr().err
    assert files(tmp_path) == ["narrow.safetensors"]


def test_a_folder_that_takes_no_files_is_refused_before_the_work(tmp_path, monkeypatch, capsys):
    def refuse(*_, **__):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    monkeypatch.setattr(compare, "compare", lambda *_: pytest.fail("begun"))
    monkeypatch.setattr(capacity, "curve", lambda *_, **__: pytest.fail("begun"))
    for command in (["compare", "--quick"], ["capacity"]):
        assert main([*command, "--out", str(tmp_path / "a" / "b")]) == 2 and "cannot write there (Read-only file system)" in capsys.readouterr().err
    assert files(tmp_path) == []


def test_compare_with_a_budget_claims_and_seeds(base, tmp_path, monkeypatch, capsys):
    """All its flags, on a lineup that is short; a name that a title cannot show as it is."""
    lora, vera = compare.Entry("lora"), compare.Entry("vera")
    monkeypatch.setattr(compare, "CONTEXT", 16)
    monkeypatch.setattr(compare, "entries", lambda *_: [lora, vera, compare.Entry("full")])
    monkeypatch.setattr(claims, "LINEUP", (compare.Entry("lora", rank=1),))
    (tmp_path / "pay $1 to $2_.txt").write_text("".join(f"Line {i} says that {i} and {i + 1} are neighbours.\n" for i in range(90)))
    flags = ["compare", "--text", str(tmp_path / "pay $1 to $2_.txt"), "--steps", "10", "--base", base, "--out", str(tmp_path / "out")]
    assert main([*flags, "--budget", "3500", "--claims", "--seeds", "2"]) == 0
    out = capsys.readouterr().out
    at_budget = out.split("at about 3,500 trainable parameters\n")[1].split("\n\n")[0].splitlines()
    assert {line.split("  ")[0] for line in at_budget[1:]} == {"lora r=6", "vera r=268"}
    assert "lora_matches_full: " in out and "contradicted" not in out.split("learns_less")[1]                      # two seeds say nothing
    records = json.loads((tmp_path / "out" / "results.json").read_text())
    assert {run["seed"] for run in records["runs"]} == {0, 1} and all(record["lr"] for record in records["search"])
    assert main([*flags, "--seeds", "1", "--budget", "7"]) == 0                                                     # fewer than there are
    again = capsys.readouterr().out
    assert "no method can be brought within a tenth of that" in again and "seed 0:" not in again


@pytest.mark.parametrize("content", ["", "[{}]", "{}", "7", '{"about": 1, "search": [], "runs": []}', '{"about": {"settings": {}}, "search": [], "runs": [{"x": 1}]}',
                                     '{"about": {"settings": {}}, "search": [], "runs": ['])
def test_a_broken_results_file_is_named_and_left_alone(content, base, tmp_path, capsys):
    for file, command in (("results.json", ["compare", "--quick", "--base", base]), ("capacity.json", ["capacity"])):
        (tmp_path / file).write_text(content)
        assert main([*command, "--out", str(tmp_path)]) == 2
        assert f"{tmp_path / file}: not a" in capsys.readouterr().err and (tmp_path / file).read_text() == content
        (tmp_path / file).unlink()
        assert main([*command, "--out", __file__]) == 2 and "is a file; --out takes a folder" in capsys.readouterr().err
    (tmp_path / "results.json").write_text(content)
    assert main(["claims", "--results", str(tmp_path / "results.json")]) == 2 and "not a results file" in capsys.readouterr().err
    assert main(["capacity", "--facts", "20000", "--out", str(tmp_path / "new")]) == 2 and "names for 14,700 facts" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_claims_are_judged_from_the_published_results(capsys, tmp_path):
    assert main(["claims"]) == 0
    out = capsys.readouterr().out
    assert all(f"{claim.key}: " in out for claim in claims.CLAIMS) and "python benchmarks/fight.py" in out and "shown" in out
    assert main(["claims", "--results", str(tmp_path / "none.json")]) == 2 and "No such file" in capsys.readouterr().err


def test_capacity_writes_its_records_and_pictures(base, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(capacity, "load_base", lambda: ml.load_base(base))
    monkeypatch.setattr(capacity, "RANKS", (1, 2))
    monkeypatch.setattr(capacity, "OTHERS", ())
    monkeypatch.setattr(capacity, "film", lambda: {"steps": [0, 1], "names": ["blocks.0.a.q_proj"], "kept": [[3], [2]], "budget": [3, 2], "most": 3})
    flags = ["capacity", "--facts", "4", "--steps", "10", "--seeds", "1", "--out", str(tmp_path / "c")]
    assert main(flags) == 0 and "seed 0" in capsys.readouterr().out
    assert files(tmp_path / "c") == ["capacity.json", "capacity.png", "film.png"] and len(json.loads((tmp_path / "c" / "capacity.json").read_text())) == 2
    assert main(flags) == 0 and "seed 0" not in capsys.readouterr().out


@pytest.mark.parametrize("flags, trained", [(["--targets", "query_key_value"], "3,670,016"), ([], "14,680,064"), (["--base", "nf4", "--method", "dora"], "15,712,256"),
                                            (["--method", "full"], "6,173,286,400")])
def test_cost_of_chatglm(flags, trained, capsys, tmp_path):
    assert main(["cost", "--shape", "chatglm-6b", "--method", "lora", "--rank", "8", *flags, "--picture", str(tmp_path / "bars.png")]) == 0
    out = capsys.readouterr().out
    assert f"trained: {trained}" in out and (tmp_path / "bars.png").read_bytes()[:4] == b"\x89PNG"
    if "--targets" in flags:
        assert "14.0 MiB in fp32, 7.0 MiB in fp16" in out


@pytest.mark.parametrize("method, flags, trained", [("lora", [], "73,728"), ("full", [], "875,264"), ("vera", ["--base", "nf4", "--rank", "64"], "6,144"),
                                                    ("loftq", ["--targets", "q_proj"], "8,192"), ("delta-lora", [], "73,728")])
def test_cost_of_the_shipped_base_is_measured_beside_the_formulas(method, flags, trained, capsys):
    assert main(["cost", "--method", method, "--tokens", "20", *flags]) == 0
    out = capsys.readouterr().out
    measured, formula = (line.split("  ", 1)[1].split() for line in out.splitlines() if line.startswith("all, "))
    assert measured == formula and len(measured) == 12
    on_disk = re.search(r"on disk: ([\d,]+) bytes measured, ([\d,]+) by", out)
    assert measured[0] == trained and on_disk[1] == on_disk[2]
    assert main(["cost", "--method", method, "--base", "fp16"]) == 2 and ("on fp32 or nf4" if method != "loftq" else "four bits") in capsys.readouterr().err


@pytest.mark.parametrize("flags, message", [
    (["--tokens", "9" * 400], "must be a whole number"), (["--tokens", "100000"], "at most 65,536 tokens"), (["--rank", "100000000000"], "at most 65,536"),
    (["--targets", ""], "names of layers"), (["--targets", "q_proj,"], "names of layers"),
    (["--shape", "llama-7b", "--picture", "{tmp}"], "is a folder"),
])
def test_bad_flags_of_cost(flags, message, tmp_path, capsys):
    try:
        (tmp_path / "folder").mkdir()
        code = main(["cost", *(flag.format(tmp=tmp_path / "folder") for flag in flags)])
    except SystemExit as stop:
        code = stop.code
    assert code == 2 and message in capsys.readouterr().err
    assert files(tmp_path) == ["folder"] and files(tmp_path / "folder") == []


def test_names_of_layers_may_stand_apart(capsys):
    assert main(["cost", "--shape", "llama-7b", "--targets", "q_proj, v_proj"]) == 0 and "trained: 4,194,304" in capsys.readouterr().out


def test_cost_where_the_method_brings_its_own_base(capsys):
    assert main(["cost", "--method", "qlora", "--shape", "chatglm-6b"]) == 0
    out = capsys.readouterr().out
    assert "parameters, nf4; qlora, rank 8" in out and "3.76 GiB" in out
    assert main(["cost", "--method", "loftq", "--tokens", "9"]) == 0 and "parameters, nf4; loftq" in capsys.readouterr().out
    assert main(["cost", "--method", "qlora", "--shape", "chatglm-6b", "--base", "fp16"]) == 2 and "qlora puts its base in four bits" in capsys.readouterr().err
    assert main(["cost", "--method", "vera", "--tokens", "9"]) == 0 and "vera, rank 64" in capsys.readouterr().out


def test_cost_of_a_config_and_of_nothing_known(tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2", "n_embd": 48, "n_layer": 2, "vocab_size": 100, "n_positions": 16}))
    assert main(["cost", "--shape", str(tmp_path / "config.json"), "--rank", "4"]) == 0 and "c_attn" in capsys.readouterr().out
    assert main(["cost", "--shape", "gpt-9"]) == 2 and "known are chatglm-6b" in capsys.readouterr().err
    assert main(["cost", "--shape", "llama-7b", "--targets", "qkv"]) == 2 and "it has down_proj" in capsys.readouterr().err


CUDA = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 79.11 GiB of which 2.50 MiB is free. Including "
                              "non-PyTorch memory, this process has 79.10 GiB memory in use.")
LINUX = RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate 400 bytes. Error code 12")


@pytest.mark.parametrize("error, size", [(CUDA, ": no room for 20.00 MiB more"), (LINUX, ": no room for 400 bytes more"), (MemoryError(), "")],
                         ids=["CUDA", "CPU", "Python"])
def test_too_little_memory_is_one_line_that_says_what_needs_less_and_the_run_goes_on(finetune, monkeypatch, error, size):
    def full():
        raise error

    code, _, err, folder = stopped(finetune, monkeypatch, full)
    assert code == 2 and files(folder) == ["checkpoint.pt"] and "Traceback" not in err
    assert err.endswith(f"\nminilora: out of memory{size}. The same command with --checkpointing non-reentrant needs less and goes on. A smaller --rows "
                        "or --context, or --method qlora, is another run, with another --out or --force\n")
    code, out, _, folder = finetune("--checkpointing", "non-reentrant")
    assert code == 0 and "resumed at step 2" in out and files(folder) == FINISHED


def test_what_is_used_already_is_no_advice_and_other_errors_stay_themselves(finetune, monkeypatch):
    def fail(error):
        raise error

    flags = ("--checkpointing", "non-reentrant", "--method", "qlora")
    assert stopped(finetune, monkeypatch, lambda: fail(CUDA), *flags)[2].endswith("20.00 MiB more. A smaller --rows or --context is another run, with another "
                                                                                "--out or --force\n")
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        stopped(finetune, monkeypatch, lambda: fail(RuntimeError("mat1 and mat2")), *flags)


def test_other_commands_too_say_in_one_line_that_memory_has_run_out(base, monkeypatch, capsys):
    def full(*_, **__):
        raise CUDA

    monkeypatch.setattr(ml.TinyGPT, "generate", full)
    assert main(["generate", "--base", base]) == 2
    assert capsys.readouterr().err == "minilora: out of memory: no room for 20.00 MiB more\n"
