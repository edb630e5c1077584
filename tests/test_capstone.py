"""The capstone holds together: its run as the page shows it, the adapter here and in PEFT, what it refuses and names, and that a stop leaves nothing."""

import contextlib
import importlib
import io
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from matplotlib.figure import Figure
from safetensors.torch import load_file

import lessons
import minilora as ml
from lessons.capstone import answers, stage
from lessons.capstone.card import written
from lessons.capstone.finetune import finetune

ROOT = Path(lessons.__file__).parent.parent
FOLDER = ROOT / "lessons" / "capstone"
PAGE = FOLDER / "README.md"


@pytest.fixture(scope="module")
def shown(tmp_path_factory):
    """(what a run with the worked answers printed, its folder); their lessons' tests, which CI runs by themselves, are not run once more here"""
    pytest.importorskip("peft")                # the page shows what PEFT says too
    out, said, complained = tmp_path_factory.mktemp("runs") / "capstone", io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(said), contextlib.redirect_stderr(complained), torch.random.fork_rng([]):
        patch.setattr(answers, "judge", lambda kind: {})
        patch.setattr(sys, "argv", ["finetune.py", "--out", str(out), "--answers", "solutions"])
        importlib.import_module("lessons.conftest")        # which judge would have done
        runpy.run_path(str(FOLDER / "finetune.py"), run_name="__main__")
    assert not complained.getvalue()
    return said.getvalue(), out


def test_the_script_is_short_and_calls_exercises_only():
    script = (FOLDER / "finetune.py").read_text(encoding="utf-8")
    assert len(script.splitlines()) <= 60
    known = {name for names in lessons.exercises().values() for name in names}
    assert set(re.findall(r"\bmy\.(\w+)", script)) - {"txt"} == {name for names in answers.needed().values() for name in names} <= known


def test_the_page_shows_what_the_run_prints(shown):
    """Whole numbers to the last digit; others, which differ a little from machine to machine, nearly. What the model writes may differ.
    (After a change to gpt.py, which the run reads: `python lessons/capstone/finetune.py --answers solutions`, and its output on the page.)"""
    page = re.search(r"^```text\n(.*?)^```", PAGE.read_text(encoding="utf-8"), flags=re.M | re.S)[1]
    texts = [re.sub(r"^ +\|.*\n", "", text, flags=re.M) for text in (page, shown[0])]
    texts = [re.sub(r"(\d)e-0\d|equal, bit for bit|█+|SHA-256 \w+|^in .*:", "…", text, flags=re.M).rstrip() for text in texts]
    decimal = r"\d+\.\d+(?![\d.])"
    assert re.sub(decimal, "…", re.sub(r"(PEFT) +", r"\1 ", texts[0])) == re.sub(decimal, "…", re.sub(r"(PEFT) +", r"\1 ", texts[1]))
    numbers = [[float(number) for number in re.findall(decimal, text)] for text in texts]
    assert len(numbers[0]) > 12 and numbers[0] == pytest.approx(numbers[1], rel=0.05)


def test_the_pages_table_and_counts_are_the_scripts(shown):
    text = PAGE.read_text(encoding="utf-8")
    listed, lesson = {}, ""
    for number, names in re.findall(r"^\| (?:\[(\d\d)\]\(\S+\))? ?\| ((?:`\w+` ?)+)\|", text, flags=re.M):
        lesson = number or lesson
        listed.setdefault(lesson, set()).update(re.findall(r"`(\w+)`", names))
    assert listed == {lesson[:2]: set(names) for lesson, names in answers.needed().items()} and count() == 12 and "**Yes: twelve of your own answers" in text
    source = (ROOT / "minilora" / "gpt.py").read_bytes()
    held_out = int(re.match(r"gpt.py: (\d+) bytes", shown[0])[1])
    assert held_out <= len(source) / 10 and f"of its {len(source):,} bytes the first {len(source) * 9 // 10:,} are read" in text


def test_the_loss_falls_and_every_way_gives_the_same_function(shown):
    report = json.loads((shown[1] / "capstone.json").read_text(encoding="utf-8"))
    assert report["answers"] == "solutions" and len(report["losses"]) == report["steps"] == 60
    assert sum(report["losses"][-10:]) < 0.7 * sum(report["losses"][:10]) and report["bits_after"] < report["bits_before"] - 0.3
    assert report["apart"].keys() == {"lora_branch", "merge_lora", "ml.load_adapter", "PEFT"} and max(report["apart"].values()) < 1e-3
    assert report["sample_before"] != report["sample_after"]


@torch.no_grad()
def test_the_folder_loads_here_and_in_peft(shown):
    peft = pytest.importorskip("peft")
    ids = torch.randint(256, (4, 50), generator=torch.Generator().manual_seed(0))
    base, merged = ml.load_base().eval()(ids), ml.load_base(shown[1] / "model.safetensors").eval()(ids)
    ours, theirs = ml.load_adapter(ml.load_base(), shown[1])(ids), peft.PeftModel.from_pretrained(ml.load_base(), shown[1]).eval()(ids)
    assert (merged - base).abs().max() > 1 and (ours - merged).abs().max() < 1e-3 and (theirs - ours).abs().max() < 1e-4
    size = sum(tensor.numel() for tensor in load_file(shown[1] / "adapter_model.safetensors").values())
    assert size == 4 * sum(sum(linear.weight.shape) for linear in ml.load_base().blocks.modules() if isinstance(linear, torch.nn.Linear))
    assert {file.name for file in shown[1].iterdir()} == {"adapter_model.safetensors", "adapter_config.json", "model.safetensors", "capstone.png", "capstone.json"}


# What is said of answers that are not there, or not right

TOY = {
    "00_toy/exercises.py": "def double(x):\n    raise NotImplementedError\n\n\ndef triple(x):\n    return 2 * x\n\n\ndef spare(x):\n    raise NotImplementedError\n",
    "00_toy/solutions.py": "def double(x: int) -> int:\n    return 2 * x\n\n\ndef triple(x: int) -> int:\n    return 3 * x\n\n\ndef spare(x: int) -> int:\n    return x\n",
    "00_toy/test_exercises.py": "def test_two(double):\n    assert double(1) == 2\n\n\ndef test_three(triple):\n    assert triple(1) == 3, 'looks doubled'\n\n\n"
                                "def test_spare(spare):\n    assert spare(1) == 1\n",
    "00_toy/hints.md": "", "01_more/hints.md": "",
    "01_more/exercises.py": "def fourth(x):\n    return x / 4\n", "01_more/solutions.py": "def half(x: float) -> float:\n    return x / 2\n\n\ndef fourth(x: float) -> float:\n    return x / 4\n",
    "01_more/test_exercises.py": "def test_half(half):\n    assert half(1) == 0.5\n\n\ndef test_fourth(fourth):\n    assert fourth(1) == 0.25\n",
    "02_broken/hints.md": "", "02_broken/exercises.py": "def fifth(x:\n", "02_broken/solutions.py": "def fifth(x: float) -> float:\n    return x / 5\n",
    "02_broken/test_exercises.py": "def test_fifth(fifth):\n    assert fifth(1) == 0.2\n",
    "capstone/finetune.py": "my.double(1), my.triple(1), my.half(1), my.fourth(1), my.fifth(1)\n",
}


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """What ASK prints, part by part, in a folder with the real machinery and two lessons of arithmetic."""
    tmp_path = tmp_path_factory.mktemp("toy")
    for file in ("conftest.py", "pyproject.toml", "lessons/capstone/answers.py", *(f"lessons/{name}.py" for name in ("conftest", "__init__", "guard", "mutants", "expect"))):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / file, tmp_path / file)
    for name, content in TOY.items():
        (tmp_path / "lessons" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "lessons" / name).write_text(content, encoding="utf-8")

    alone = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")} | {"PYTHONPATH": str(tmp_path), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    return subprocess.run([sys.executable, "-c", ASK], cwd=tmp_path, capture_output=True, encoding="utf-8", env=alone).stdout.split("--\n")


ASK = """
import pytest
from lessons.capstone.answers import NotReady, own_answers
for kind in ("exercises", "solutions"):
    try: print(own_answers(kind).triple(5))
    except NotReady as reason: print(reason)
for words in (["lessons"], ["lessons", "--answers=solutions"], ["lessons/00_toy"]):
    print("--", flush=True)
    pytest.main([*words, "-q", "-p", "no:cacheprovider"])
"""


def test_missing_and_wrong_answers_are_named_all_at_once(toy):
    assert toy[0] == """The capstone needs 5 of your answers, and not all are ready.
Not written yet:
  00_toy/exercises.py      double
  01_more/exercises.py     half
Their tests fail:
  00_toy/exercises.py      triple: looks doubled
Python cannot read these files:
  02_broken/exercises.py   line 1: '(' was never closed
`.venv/bin/pytest lessons` says more, and what comes next.
15
"""


def test_the_board_ends_with_the_capstone(toy):
    _, stubs, worked, part = toy
    assert re.search(r"^next: double .*\ncapstone +your answers to 1 of 5 needed exercises are there; next: double \(00_toy\)$", stubs, flags=re.M), stubs
    assert re.fullmatch(r"capstone +ready: all 5 answers are there\. .*", worked.splitlines()[-2]), worked
    assert "00_toy " in part and "capstone" not in part                   # which says nothing of the other lesson's answers


def count():
    return sum(map(len, answers.needed().values()))


# A run in this process, of three steps: what goes wrong in it, and what it leaves

def small():
    with torch.random.fork_rng([]):
        torch.manual_seed(1)
        return ml.TinyGPT(ml.GPTConfig(width=16, layers=1, heads=2))


@pytest.fixture
def my(monkeypatch):
    """The worked answers, which a test may spoil; a run takes them without a check, on a base of one small layer, and shows no samples and draws nothing."""
    from lessons.conftest import load_file as load_lesson

    my = SimpleNamespace(**{name: getattr(load_lesson(ROOT / "lessons" / lesson, "solutions"), name) for lesson, names in answers.needed().items() for name in names})
    monkeypatch.setattr(stage, "own_answers", lambda kind: my)
    monkeypatch.setattr(ml, "load_base", small)
    monkeypatch.setattr(stage, "peft_reads", lambda folder: {})
    monkeypatch.setattr(stage, "card", lambda report: Figure((1, 1)))
    monkeypatch.setattr(stage.Show, "sample", lambda self, model: "a sample")
    return my


def stopped(out, *words):
    """How a run ended that did not succeed, and that it left nothing."""
    before = {file: file.read_bytes() for file in out.rglob("*")} if out.exists() else {}
    with pytest.raises(SystemExit) as end:
        stage.perform(finetune, ["--out", str(out), "--steps", "3", *words])
    assert ({file: file.read_bytes() for file in out.rglob("*")} if out.exists() else {}) == before and out.exists() == bool(before)
    return end.value.code


@pytest.mark.parametrize("moment", ["step", "the_end", "card"])
def test_ctrl_c_leaves_nothing_and_an_older_run_whole(my, moment, tmp_path, monkeypatch, capsys):
    def interrupt(*arguments):
        raise KeyboardInterrupt

    stage.perform(finetune, ["--out", str(tmp_path / "older"), "--steps", "1"])
    assert "replaces" not in capsys.readouterr().out
    monkeypatch.setattr(stage if moment == "card" else stage.Show, moment, interrupt)
    for out in (tmp_path / "older", tmp_path / "new"):
        assert stopped(out) == 130
        said = capsys.readouterr().out
        assert said.endswith("stopped; nothing was written\n") and said.startswith(f"replaces the run in {out}, once") == (out.name == "older")


def test_answers_whose_tests_overlooked_something_are_named(my, tmp_path):
    right = vars(my).copy()
    my.merge_lora = lambda W, *rest: 1.01 * right["merge_lora"](W, *rest)
    assert stopped(tmp_path / "out") == "These are not the same function: merge_lora. Nothing was written."
    my.merge_lora, my.lora_branch = right["merge_lora"], lambda x, A, B, alpha, rank: right["lora_branch"](x, A, B, alpha, 2 * rank)
    assert stopped(tmp_path / "out") == "These are not the same function: lora_branch. Nothing was written."
    my.lora_branch, my.adapter_bytes = right["lora_branch"], lambda content: right["adapter_bytes"](content) | {"more": 4}
    size, foretold = map(int, re.findall(r"\d[\d,]*\d", stopped(tmp_path / "out").replace(",", "")))
    assert foretold == size + 4

    class Meddling(right["LoRALayer"]):
        def forward(self, x):
            self.base.weight.data[0, 0] = torch.nextafter(self.base.weight.data[0, 0], torch.tensor(9.0))
            return super().forward(x)

    my.adapter_bytes, my.LoRALayer = right["adapter_bytes"], Meddling
    assert stopped(tmp_path / "out").startswith("W has changed. LoRA never does that")


def test_an_error_inside_an_answer_is_told_with_its_line(my, tmp_path):
    file, names = ROOT / "lessons" / "00_tiny_gpt" / "exercises.py", {}
    exec(compile("\n\ndef adamw_step(*arguments, **more):\n    return 1 / 0\n", str(file), "exec"), names)
    my.adamw_step = names["adamw_step"]
    said = stopped(tmp_path / "out")
    assert said.splitlines()[0] == "ZeroDivisionError: division by zero" and "  00_tiny_gpt/exercises.py:4: " in said


def test_other_things_and_texts_that_cannot_be_read_are_refused_first(my, tmp_path, monkeypatch):
    monkeypatch.setattr(stage, "own_answers", lambda kind: pytest.fail("the answers were asked for before the text was read"))
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "notes.txt").write_text("mine")
    assert stopped(tmp_path / "theirs") == f"{tmp_path / 'theirs'} holds other things; take another --out"
    assert "nowhere.txt: cannot be read" in stopped(tmp_path / "out", "nowhere.txt")


def test_another_copys_script_is_refused(tmp_path):
    names = {}
    exec(compile("def finetune(*arguments):\n    pass\n", str(tmp_path / "lessons" / "capstone" / "finetune.py"), "exec"), names)
    with pytest.raises(SystemExit, match=f"another copy. Set PYTHONPATH to this one: {re.escape(str(tmp_path))}$"):
        stage.perform(names["finetune"], [])


def test_what_no_screen_shows_is_a_dot():
    assert written("H\x84user\n\n  Häu\ufffdser 家\x1c.") == ["H·user", "  Häu·ser 家·."]


def test_the_boards_line_and_when_it_is_done(tmp_path, monkeypatch):
    monkeypatch.setattr(answers, "RUNS", tmp_path)
    everything = {name for names in answers.needed().values() for name in names}
    assert answers.board_line(everything - {"merge_lora"}) == f"your answers to {count() - 1} of {count()} needed exercises are there; next: merge_lora (01_lora)"
    assert answers.board_line(everything).startswith(f"ready: all {count()} answers are there. .venv/bin/python lessons/capstone/finetune.py")
    for kind, line in (("solutions", "ready"), ("exercises", "done: runs/mine")):
        (tmp_path / "mine").mkdir(exist_ok=True)
        (tmp_path / "mine" / "capstone.json").write_text(json.dumps({"answers": kind}))
        assert answers.board_line(everything).startswith(line)
