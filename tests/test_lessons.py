"""The lessons, proved: every stub fails, every solution passes, every wrong answer is rejected with its message, and hints are there."""

import ast
import os
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as xml
from collections import defaultdict
from pathlib import Path

import pytest

import lessons

ROOT = Path(lessons.__file__).parent.parent
NAMES = lessons.exercises()
EXERCISES = [(lesson, name) for lesson, names in NAMES.items() for name in names]
each_exercise = pytest.mark.parametrize("lesson, name", EXERCISES, ids=[name for _, name in EXERCISES])
each_lesson = pytest.mark.parametrize("lesson", NAMES)


def source(lesson, kind):
    path = ROOT / "lessons" / lesson / f"{'exercises' if kind == 'committed' else kind}.py"
    if kind == "committed":
        shown = subprocess.run(["git", "show", f"HEAD:./{path.name}"], cwd=path.parent, capture_output=True, encoding="utf-8")
        if shown.returncode == 0:
            return shown.stdout
    return path.read_text(encoding="utf-8")


def definitions(lesson, kind):
    return {node.name: node for node in ast.parse(source(lesson, kind)).body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}


def stub(lesson, name):
    """The exercise as committed. A learner may commit answers on a branch of their own: a skip; only where CI is set is it a failure."""
    try:
        node = definitions(lesson, "committed")[name]
        bodies = [node] if isinstance(node, ast.FunctionDef) else [child for child in node.body if isinstance(child, ast.FunctionDef)]
        is_stub = all(ast.unparse(body.body[-1]) == "raise NotImplementedError" for body in bodies)
    except (KeyError, SyntaxError):
        is_stub = False
    if not is_stub and not os.environ.get("CI"):
        pytest.skip("solved in the last commit")
    assert is_stub, f"{name} is committed with an answer in it"
    return node


@pytest.fixture(scope="module")
def verdicts(tmp_path_factory):
    """verdicts(kind): {answer's name: [(test, "" or its message), …]}; one pytest for all lessons, each kind once."""
    done = {}

    def verdicts(kind):
        if kind not in done:
            report = tmp_path_factory.mktemp("junit") / "report.xml"
            run = subprocess.run([sys.executable, "-m", "pytest", "lessons", "-q", f"--answers={kind}", f"--junitxml={report}", "-p", "no:nbval", "-p", "no:cacheprovider"],
                                 cwd=ROOT, capture_output=True, text=True)
            assert run.returncode in (0, 1), run.stdout + run.stderr
            done[kind] = defaultdict(list)
            for case in xml.parse(report).iter("testcase"):
                properties = {p.get("name"): p.get("value") for p in case.iter("property")}
                failed = case.find("failure") is not None or case.find("error") is not None
                done[kind][properties["answer"]].append((case.get("name"), (properties.get("message") or "no message") if failed else ""))
        return done[kind]

    return verdicts


@each_exercise
def test_every_solution_passes_at_least_two_tests(verdicts, lesson, name):
    found = verdicts("solutions")[name]
    assert len(found) >= 2 and not [verdict for verdict in found if verdict[1]], found


@each_exercise
def test_every_stub_as_committed_is_not_solved_yet(verdicts, lesson, name):
    stub(lesson, name)
    found = verdicts("committed")[name]
    assert found and all(message == f"{lessons.NOT_SOLVED}: {name}" for _, message in found), found


@each_exercise
def test_every_wrong_answer_is_rejected_with_its_message(verdicts, lesson, name):
    wrong = {other: node for other, node in definitions(lesson, "wrong_answers").items() if other.partition("__")[0] == name}
    assert len(wrong) >= 3
    for other, node in wrong.items():
        promised = [ast.literal_eval(d.args[0]) for d in node.decorator_list if isinstance(d, ast.Call) and d.func.id == "provokes"]
        assert promised, f"{other} does not say what it provokes"
        messages = [message for _, message in verdicts("wrong_answers")[other] if message]
        assert messages, f"{other} passes every test"
        assert any(promised[0] in message for message in messages), f"{other} should provoke {promised[0]!r}; it got {messages}"


@each_lesson
def test_every_wrong_answer_belongs_to_an_exercise(lesson):
    strays = [name for name in lessons.public_names(source(lesson, "wrong_answers")) if name.partition("__")[0] not in NAMES[lesson]]
    assert not strays


@each_exercise
def test_stub_and_solution_share_their_signature(lesson, name):
    def signatures(node):
        parts = [node] if isinstance(node, ast.FunctionDef) else [c for c in node.body if isinstance(c, ast.FunctionDef) and (c.name == "__init__" or c.name[0] != "_")]
        return {part.name: (ast.unparse(part.args), part.returns and ast.unparse(part.returns)) for part in parts}

    assert signatures(stub(lesson, name)) == signatures(definitions(lesson, "solutions")[name])


@each_exercise
def test_every_exercise_has_three_hints_a_docstring_and_a_place_in_the_readme(lesson, name):
    assert [bool(hint) for hint in lessons.hints(lesson)[name]] == [True] * 3
    assert name in (ROOT / "lessons" / lesson / "README.md").read_text(encoding="utf-8")
    assert ast.get_docstring(stub(lesson, name))


@each_lesson
def test_every_lesson_has_its_files_and_four_to_eight_exercises(lesson):
    assert 4 <= len(NAMES[lesson]) <= 8
    assert not os.environ.get("CI") or lessons.public_names(source(lesson, "committed")) == NAMES[lesson]
    assert (ROOT / "notebooks" / f"{lesson}.ipynb").exists()
    assert lesson in (ROOT / "README.md").read_text(encoding="utf-8")


@each_lesson
def test_every_test_asks_for_exactly_one_exercise(lesson):
    for name, node in definitions(lesson, "test_exercises").items():
        if name.startswith("test_"):
            asked = [argument.arg for argument in node.args.args if argument.arg in NAMES[lesson]]
            assert len(asked) == 1, f"{name} asks for {asked}"


# the machinery itself, on a copy with a lesson of its own

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
    for file in ("conftest.py", "pyproject.toml", "lessons/conftest.py", "lessons/__init__.py"):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / file, tmp_path / file)

    def run(*words, python=None, **files):
        folder = tmp_path / "lessons" / "00_arithmetic"
        folder.mkdir(exist_ok=True)
        for name, content in (LESSON | {f"{name}.py": content for name, content in files.items()}).items():
            (folder / name).write_text(content)
        command = [sys.executable, "-c", python] if python else [sys.executable, "-m", "pytest", "lessons", "-q", "-p", "no:nbval", *words]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(tmp_path)})
        return done.stdout + done.stderr

    return run


def test_a_stub_is_reported_in_one_word_and_the_board_says_what_is_next(school):
    printed = school()
    assert "3 not solved yet" in printed and "Error" not in printed and "raise" not in printed
    assert re.search(r"00_arithmetic +\.\. +0/2 solved", printed)
    assert "next: double in lessons/00_arithmetic/exercises.py. Hint: add it to itself" in printed


def test_the_board_counts_what_is_solved_and_a_mistake_comes_first(school):
    printed = school(exercises=LESSON["exercises.py"].replace("raise NotImplementedError", "return 2 * x"))
    assert re.search(r"00_arithmetic +#\. +1/2 solved", printed) and "next: triple" in printed and "not three times" in printed
    wrong = school(exercises=LESSON["exercises.py"].replace("raise NotImplementedError", "return x * x", 1))
    assert re.search(r"00_arithmetic +\.\. +0/2 solved", wrong)              # right at 2, wrong at 3: not solved
    assert "looks like a square" in wrong and "next: double" in wrong


def test_all_solved(school):
    printed = school("--answers=solutions")
    assert re.search(r"00_arithmetic +## +2/2 solved", printed) and "next:" not in printed and "3 passed" in printed


def test_a_syntax_error_is_one_line_that_says_where(school):
    printed = school(exercises=LESSON["exercises.py"] + "\ndef broken(:\n")
    assert "exercises.py of 00_arithmetic, line 10: invalid syntax" in printed and "INTERNAL" not in printed and "Traceback" not in printed


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
    command = [sys.executable, "-m", "pytest", "lessons", "-q", "-p", "no:nbval"]
    printed = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(tmp_path)}).stdout
    assert "exercises.py of 00_arithmetic, line ?: UnicodeDecodeError" in printed and "Traceback" not in printed


def test_two_lessons_cannot_share_a_name(school, tmp_path):
    school()
    shutil.copytree(tmp_path / "lessons" / "00_arithmetic", tmp_path / "lessons" / "01_again")
    assert "two lessons have an exercise called double: 00_arithmetic and 01_again" in school()


def test_wrong_answers_are_run_one_by_one(school):
    printed = school("--answers=wrong_answers")
    assert "test_six[double__squared]" in printed and "1 failed, 1 passed" in printed


CHECK = """
from lessons import check
def double(x): return x * x
check(double)
def double(x): return 2 * x
check(double)
def double(x): raise NotImplementedError
print(check(double))
try: check(print)
except ValueError as error: print(error)
"""


def test_check_judges_the_live_function_again_and_again(school):
    lines = school(python=CHECK).splitlines()
    assert lines[:2] == ["double: 1 of 2 tests fail.", "  test_six: looks like a square"]
    assert lines[2] == "double: 2 of 2 tests pass. Solved."
    assert lines[3].startswith("double: not solved yet. Hint: add it to itself") and lines[4] == "None"
    assert lines[5] == "no exercise is called 'print'; there are double, triple"
    assert school(python=CHECK, exercises="def (").splitlines() == lines     # what is in the file does not matter here


STOPPED = """
from lessons import check
def double(x):
    if x == 3: raise KeyboardInterrupt
    return 2 * x
check(double)
"""


def test_check_never_says_solved_where_tests_did_not_run_or_failed_with_an_odd_message(school):
    assert school(python=STOPPED) == "double: no verdict, pytest stopped (interrupted). `pytest lessons/00_arithmetic` says why.\n"
    finishing, right = STOPPED.replace("raise KeyboardInterrupt", "return 0"), LESSON["test_exercises.py"]
    assert "no verdict" in school(python=finishing, test_exercises="import nowhere\n" + right)
    assert "no verdict" in school(python=finishing, test_exercises="def test_nine(triple):\n    assert triple(3) == 9\n")   # none asks for double
    odd = school(python=finishing, test_exercises=right.replace("'looks", "'\\nlooks"))                # numpy's messages begin so
    assert odd.splitlines() == ["double: 1 of 2 tests fail.", "  test_six: looks like a square"]
    assert "no exercise is called 'int'" in school(python="from lessons import check\ncheck(double := 3)")
