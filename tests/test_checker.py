"""The checker itself, on a copy with a small lesson of its own: what it says of every answer and of every bad input."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import lessons

ROOT = Path(lessons.__file__).parent.parent
ALONE = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")} | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}

LESSON = {
    "exercises.py": "def double(x: int) -> int:\n    '''2x'''\n    raise NotImplementedError\n\n\ndef triple(x: int) -> int:\n    '''3x'''\n    raise NotImplementedError\n",
    "solutions.py": "def double(x: int) -> int:\n    return 2 * x\n\n\ndef triple(x: int) -> int:\n    return 3 * x\n",
    "test_exercises.py": "def test_four(double):\n    assert double(2) == 4, 'looks like a square'\n\n\ndef test_six(double):\n    assert double(3) == 6, 'looks like a square'\n\n\n"
                         "def test_nine(triple):\n    assert triple(3) == 9, 'not three times'\n",
    "hints.md": "## double\n<details><summary>Hint 1</summary>\n\nadd it to itself\n</details>\n\n## triple\n<details><summary>Hint 1</summary>\n\nonce more\n</details>\n",
    "wrong_answers.py": "from lessons import provokes\n\n\n@provokes('a square')\ndef double__squared(x: int) -> int:\n    return x * x\n",
}


@pytest.fixture
def school(tmp_path):
    """school(command line, **files) -> what it printed; in a folder with the real machinery and one small lesson."""
    for file in ("conftest.py", "pyproject.toml", *(f"lessons/{name}.py" for name in ("conftest", "__init__", "guard", "mutants", "expect"))):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / file, tmp_path / file)

    def run(*words, python=None, env={}, **files):
        folder = tmp_path / "lessons" / "00_arithmetic"
        folder.mkdir(exist_ok=True)
        for name, content in (LESSON | {f"{name}.py": content for name, content in files.items()}).items():
            (folder / name).write_text(content, encoding="utf-8")
        (tmp_path / "cell.py").write_text(python or "", encoding="utf-8")
        words = ["cell.py"] if python else words if "-m" in words else ["-m", "pytest", "lessons", "-q", *words]
        done = subprocess.run([sys.executable, *words], cwd=tmp_path, capture_output=True, encoding="utf-8", errors="replace", env=ALONE | {"PYTHONPATH": str(tmp_path)} | env)
        return done.stdout + done.stderr

    return run


def test_a_stub_is_reported_in_one_word_and_the_board_says_what_is_next(school):
    printed = school()
    assert "3 not solved yet" in printed and "Error" not in printed and "raise" not in printed
    assert re.search(r"00_arithmetic +\.\. +0/2 solved", printed)
    assert "next: double in lessons/00_arithmetic/exercises.py. Hint: add it to itself" in printed


def test_what_an_answer_may_change_is_for_the_solution_to_say_and_not_for_its_own_docstring(school):
    def lesson(said, body):
        return f"import torch\n\n\ndef double(x: torch.Tensor) -> torch.Tensor:\n    {said!r}\n    {body}\n\n\ndef triple(x: int) -> int:\n    return 3 * x\n"

    tests = "import torch\n\n\ndef test_it(double):\n    assert double(torch.ones(2)).sum() == 4\n\n\ndef test_nine(triple):\n    assert triple(3) == 9\n"
    for said in ("In place.", "My own words."):
        answer = lesson(said, "x *= 2; return x")
        assert "2/2 solved" in school(exercises=answer, solutions=lesson("In place.", "return 2 * x"), test_exercises=tests)
        assert "changed its argument" in school(exercises=answer, solutions=lesson("Twice.", "return 2 * x"), test_exercises=tests)


def test_the_board_counts_what_is_solved_and_a_mistake_comes_first(school):
    printed = school(exercises=LESSON["exercises.py"].replace("raise NotImplementedError", "return 2 * x"))
    assert re.search(r"00_arithmetic +#x +1/2 solved", printed) and "next: triple" in printed and "not three times" in printed
    wrong = school(exercises=LESSON["exercises.py"].replace("raise NotImplementedError", "return x * x", 1))
    assert re.search(r"00_arithmetic +x\. +0/2 solved", wrong)               # right at 2, wrong at 3: not solved
    assert "looks like a square" in wrong and "next: double" in wrong


def test_all_solved(school):
    printed = school("--answers=solutions")
    assert re.search(r"00_arithmetic +## +2/2 solved", printed) and "next:" not in printed and "3 passed" in printed


def test_a_file_that_cannot_be_read_is_one_line_that_says_where(school):
    printed = school(exercises=LESSON["exercises.py"] + "\ndef broken(:\n")
    assert "exercises.py of 00_arithmetic, line 10: invalid syntax" in printed and "INTERNAL" not in printed and "Traceback" not in printed
    assert "1 error" in printed and "2 failed for the same reason" in printed                                            # told once, not once a test
    assert "exercises.py of 00_arithmetic, line 10: SystemExit: 3" in school(exercises=LESSON["exercises.py"] + "\nimport sys; sys.exit(3)\n")
    assert "3 not solved yet" in school(exercises="\ufeff" + LESSON["exercises.py"])                       # a byte order mark


def test_an_error_on_import_or_inside_the_answer_names_the_learners_line(school):
    assert "exercises.py of 00_arithmetic, line 1: ModuleNotFoundError" in school(exercises="import torchh\n" + LESSON["exercises.py"])
    inside = school(exercises=LESSON["exercises.py"].replace("raise NotImplementedError", "return x + undefined", 1))
    assert "NameError" in inside and "exercises.py:3: return x + undefined" in inside


def test_a_missing_exercise_is_said_and_a_helper_of_ones_own_is_welcome(school):
    printed = school(exercises="def helper(x):\n    return 2 * x\n\n\ndef double(x):\n    return helper(x)\n")
    assert "exercises.py of 00_arithmetic defines no triple" in printed and re.search(r"00_arithmetic +#\. +1/2 solved", printed)


def test_a_file_that_is_not_utf_8_is_said_in_one_line(school, tmp_path):
    school()
    broken = tmp_path / "lessons" / "00_arithmetic" / "exercises.py"
    broken.write_bytes(broken.read_bytes() + b"# caf\xe9\n")
    command = [sys.executable, "-m", "pytest", "lessons", "-q"]
    printed = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=ALONE | {"PYTHONPATH": str(tmp_path)}).stdout
    assert "exercises.py of 00_arithmetic, line ?: UnicodeDecodeError" in printed and "Traceback" not in printed


def test_two_lessons_cannot_share_a_name(school, tmp_path):
    school()
    shutil.copytree(tmp_path / "lessons" / "00_arithmetic", tmp_path / "lessons" / "01_again")
    assert "two lessons have an exercise called double: 00_arithmetic and 01_again" in school()


def test_wrong_answers_are_run_one_by_one(school):
    printed = school("--answers=wrong_answers")
    assert "test_six[double__squared]" in printed and "1 failed, 1 passed" in printed


CHECK = """
import torch
from lessons import check
torch.manual_seed(3); want = torch.rand(1); torch.manual_seed(3)
def double(x): print("seen", x); return x * x
check(double)
def double(x): return 2 * x
check(double)
def double(x): raise NotImplementedError
print(check(double))
for wrong in (print, "double", None, 3):
    try: check(wrong)
    except ValueError as error: print(error, error._render_traceback_() == [str(error)])
print(torch.equal(torch.rand(1), want))
"""


def test_check_judges_the_live_function_again_and_again(school):
    lines = school(python=CHECK).splitlines()
    assert lines[:4] == ["double: 1 of 2 tests fail.", "  looks like a square", "    it printed: seen 3", "    in test_six"]
    assert lines[4] == "double: 2 of 2 tests pass. Solved."
    assert lines[5].startswith("double: not solved yet. Hint: add it to itself") and lines[6] == "None"
    assert lines[7:11] == ["no exercise is called 'print'; there are double, triple True", "check takes the function or class itself: check(double), without quotes True",
                           "no exercise is called 'NoneType'; there are double, triple True", "no exercise is called 'int'; there are double, triple True"]
    assert lines[11:] == ["True"]                                            # the notebook's random numbers have not moved
    around = {"PYTEST_ADDOPTS": "-v --tb=short --nosuchoption", "PYTHONIOENCODING": "ascii"}
    assert school(python=CHECK, env=around, exercises="def (").splitlines() == lines         # nor do options, or what is in the file, matter


STOPPED = """
from lessons import check
def double(x):
    if x == 3: raise KeyboardInterrupt
    return 2 * x
check(double)
"""


def test_check_never_says_solved_where_tests_did_not_run_or_failed_with_an_odd_message(school):
    assert school(python=STOPPED) == "double: no verdict, stopped by hand at cell.py:4: if x == 3: raise KeyboardInterrupt\n"
    finishing, right = STOPPED.replace("raise KeyboardInterrupt", "return 0"), LESSON["test_exercises.py"]
    assert "no verdict" in school(python=finishing, test_exercises="import nowhere\n" + right)
    assert "no verdict" in school(python=finishing, test_exercises="def test_nine(triple):\n    assert triple(3) == 9\n")   # none asks for double
    odd = school(python=finishing, test_exercises=right.replace("'looks", "'\\nlooks"))                # numpy's messages begin so
    assert odd.splitlines() == ["double: 1 of 2 tests fail.", "  looks like a square", "    in test_six"]


# the guard, on a lesson with tensors

TENSORS = {
    "exercises": '''
def scaled(x, by):
    raise NotImplementedError

def clear(x):
    raise NotImplementedError

class Layer:
    pass
''',
    "solutions": '''
import torch
from torch import Tensor, nn

def scaled(x: Tensor, by: list[float]) -> Tensor:
    return x * by[0] / by[1]

def clear(x: Tensor) -> Tensor:
    "x becomes zero, in place."
    return x.zero_()

class Layer(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.A = nn.Parameter(torch.ones(width, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.A
''',
    "test_exercises": '''
import pytest
from lessons.expect import draw, must_equal

each_width = pytest.mark.parametrize("width", [3, 4])

@each_width
def test_scaled(scaled, width):
    must_equal(scaled(draw(2, width), [3.0, 2.0]), draw(2, width) * 1.5, {}, "scaled")

def test_clear(clear):
    assert not clear(draw(3)).any()

@each_width
def test_layer(Layer, width):
    layer = Layer(width)
    assert isinstance(layer, Layer) and type(layer).__name__ == "Layer"
    must_equal(layer(draw(2, width)), draw(2, width), {}, "Layer")
''',
    "hints": "",
}

SCALED = {                                                                   # what the function says, and what is said of it
    "x *= by[0] / by[1]; return x": "scaled changed its argument x: work on a copy",
    "return x * by.pop(0) / by[0]": "scaled changed its argument by: work on a copy",
    "return x.detach() * by[0] / by[1]": "scaled: no gradient reaches x: is there a .detach(), .data, .item() or torch.no_grad() in the way?",
    "return (x / 2 + x.detach() / 2) * by[0] / by[1]": "scaled: the value is right, but the gradient that reaches x is off",
    "return torch.from_numpy(x.numpy() * by[0] / by[1])": "scaled fails where a gradient is wanted: RuntimeError: Can't call numpy()",
    "print(x.shape)": "scaled returned None: is the return missing?\n    it printed: torch.Size([2, 3])",
    "return 3.0": "scaled: a Tensor is wanted, got float 3.0",
    "return x @ x": "it was given x (2, 3)\n    cell.py:6: ",
    "raise NotImplementedError('later')": "NotImplementedError: later",
    "y = x.clone(); y *= by[0]; y /= by[1]; return y": "scaled: 2 of 2 tests pass. Solved.",
}
LAYER = {
    "def forward(self, x): return torch.einsum('bi,i->bi', x, self.A)": "Layer: 2 of 2 tests pass. Solved.",
    "def foward(self, x): return x * self.A": 'is missing the required "forward" function',
    "def forward(self, x): return x * self.A.detach()": "Layer.forward: no gradient reaches A",
    "def forward(self, x): return x.mul_(self.A)": "Layer.forward changed its argument x",
}


def test_the_guard_holds_every_answer_to_its_arguments_gradients_and_type(school):
    cell = "import torch\nfrom torch import nn\nfrom lessons import check\n"
    for body in SCALED:
        cell += f"def scaled(x, by): {body}\ncheck(scaled)\nprint('--')\n"
    for body in LAYER:
        cell += f"class Layer(nn.Module):\n    def __init__(self, width):\n        super().__init__()\n        self.A = nn.Parameter(torch.ones(width).double())\n    {body}\n"
        cell += "before = vars(Layer).copy()\ncheck(Layer)\nassert vars(Layer) == before\nprint('--')\n"
    cell += "def clear(x): return x.zero_()\ncheck(clear)\nprint('--')\nscaled = 3\n"
    told = school(python=cell, **TENSORS).split("--\n")
    want = [*SCALED.values(), *LAYER.values(), "clear: 1 of 1 tests pass. Solved."]
    assert len(told) == len(want) + 1, told
    for printed, message in zip(told, want):
        assert re.sub(r":\d+: ", ":6: ", message) in re.sub(r":\d+: ", ":6: ", printed), (message, printed)
        assert printed.count("\n") <= 6, printed


def test_an_endless_loop_ends_and_a_part_of_the_tests_does_not_count_as_solved(school, tmp_path):
    solved = LESSON["exercises.py"].replace("raise NotImplementedError", "return 2 * x", 1)
    printed = school("-k", "four or nine", exercises=solved)
    assert re.search(r"00_arithmetic +\?\. +0/2 solved +\(\?: not all of its tests were run\)", printed), printed
    named = school("-k", "double", exercises=solved)                      # its tests are called four and six
    assert "2 passed" in named and re.search(r"00_arithmetic +#\. +1/2 solved", named), named
    assert "--answers=committed finds no exercises.py in a commit" in school("--answers=committed")
    machinery = tmp_path / "lessons" / "conftest.py"
    machinery.write_text(machinery.read_text(encoding="utf-8").replace("lambda: 20", "lambda: 1"), encoding="utf-8")
    endless = school(exercises=LESSON["exercises.py"].replace("raise NotImplementedError", "while x: pass", 1))
    assert "no answer after 1 s: an endless loop?" in endless and "1 skipped" in endless, endless          # not tried again
    assert "exercises.py:3: while x: pass" in endless


def test_mutants_that_live_are_shown_and_the_list_of_the_harmless_is_held_to(school):
    weak = LESSON["test_exercises.py"].replace("double(3) == 6", "double(2) == 4")
    table = school("-m", "lessons.mutants", test_exercises=weak)
    assert "    - return 2 * x\n    + return x ** 2" in table or "    - return 2 * x\n    + return 2 ** 2 * x" not in table, table
    assert re.search(r"00_arithmetic +\d+ +\d+ +0 +[1-9]", table), table
    listed = school("-m", "lessons.mutants", equivalent_mutants="EQUIVALENT = {('double', 'return 2 / x'): 'no', ('double', 'return 9'): 'no'}\n")
    assert "listed as equivalent in double, but is rejected by a test: return 2 / x" in listed and "but is no mutant: return 9" in listed, listed
