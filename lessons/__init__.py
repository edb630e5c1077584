"""check(f): run a lesson's tests on a function you just wrote in a notebook cell. (@provokes marks the lessons' wrong answers.)"""

import ast
import contextlib
import difflib
import io
import os
import random
import re
import sys
import traceback
from pathlib import Path
from unittest import mock

import pytest

LESSONS = Path(__file__).parent


class NoSuchExercise(ValueError):
    """What check() cannot judge. In a notebook it is shown as its one line."""

    def _render_traceback_(self):
        return [str(self)]


def check(answer) -> None:
    """Run the tests that ask for the exercise of this name on `answer`, a function or a class, and print the verdict."""
    name = getattr(answer, "__name__", type(answer).__name__)
    known = [name for names in exercises().values() for name in names]
    if isinstance(answer, str):
        raise NoSuchExercise(f"check takes the function or class itself: check({answer if answer in known else known[0]}), without quotes")
    lesson = next((folder for folder, names in exercises().items() if name in names), None)
    if lesson is None:
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.4) or known
        raise NoSuchExercise(f"no exercise is called {name!r}; there are {', '.join(near)}")
    verdicts = Verdicts({name: answer})
    with surroundings_kept():
        code = pytest.main(["-p", "no:terminal", "-p", "no:cacheprovider", "--capture=sys", "--answers=exercises",
                            f"--rootdir={LESSONS.parent}", f"--confcutdir={LESSONS.parent}", "-c", str(LESSONS.parent / "pyproject.toml"),
                            str(LESSONS / lesson / "test_exercises.py")], plugins=[verdicts])
    if verdicts.stopped:
        say(f"{name}: no verdict, {verdicts.stopped}")
    elif code not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):     # the tests cannot be read, or none asks for it
        say(f"{name}: no verdict, pytest stopped ({pytest.ExitCode(code).name.lower()}). `pytest lessons/{lesson}` says why.")
    elif any(NOT_SOLVED in lines[0] for _, lines in verdicts.failed):
        say(f"{name}: {NOT_SOLVED}. {first_hint(lesson, name)}")
    elif verdicts.failed:
        say(f"{name}: {len(verdicts.failed)} of {verdicts.ran} tests fail.")
        for lines, tests in once_each(verdicts.failed):
            say("\n".join([f"  {lines[0]}", *(f"    {line.strip()}" for line in lines[1:]), f"    in {', '.join(tests)}"]))
    else:
        say(f"{name}: {verdicts.ran} of {verdicts.ran} tests pass. Solved.")


NOT_SOLVED = "not solved yet"


def say(text: str) -> None:
    """print, also where the output has no letter for √ or Δ."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    print(text.encode(encoding, "backslashreplace").decode(encoding))


@contextlib.contextmanager
def surroundings_kept():
    """For a pytest inside a notebook: it inherits no options or plugins, prints nothing, and leaves the random numbers where they were."""
    import numpy
    import torch

    alone = {"PYTEST_ADDOPTS": "", "PYTEST_PLUGINS": "", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    kept = random.getstate(), numpy.random.get_state()
    with mock.patch.dict(os.environ, alone), torch.random.fork_rng(devices=[]), contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        try:
            yield
        finally:
            random.setstate(kept[0])
            numpy.random.set_state(kept[1])


class Verdicts:
    """A pytest plugin: judge these live answers, run no other exercise's tests, and keep what each test said."""

    def __init__(self, answers: dict):
        self.answers, self.ran, self.failed, self.stopped = answers, 0, [], ""

    def pytest_configure(self, config):
        config.live_answers = self.answers

    def pytest_collection_modifyitems(self, items):
        items[:] = [item for item in items if self.answers.keys() & set(item.fixturenames)]

    def pytest_runtest_logreport(self, report):
        self.ran += report.when == "call" and not report.skipped or report.failed
        if report.failed:
            self.failed.append((report.nodeid.rpartition("::")[2], getattr(report, "told", None) or ["failed"]))

    def pytest_keyboard_interrupt(self, excinfo):
        line = learners_line(excinfo.value, own_file(*self.answers.values()))
        self.stopped = f"stopped by hand{line and ' at ' + line}"


def mistake(line: str) -> str:
    """What two messages share when they tell of the same mistake: all but numbers, and what stands in brackets."""
    while line != (line := re.sub(r"\([^()]*\)|\[[^\[\]]*\]|\d[\d.,e+-]*", "", line)):
        pass
    return line.strip()


def once_each(failed: list[tuple[str, list[str]]]) -> list[tuple[list[str], list[str]]]:
    """[(lines of a message, the tests that gave it)]: one mistake is told once, not again for each size it was tried at."""
    found = {}
    for test, lines in failed:
        tests = found.setdefault(mistake(lines[0]), (lines, {}))[1]
        name = test.partition("[")[0]
        tests[name] = tests.get(name, 0) + 1
    return [(lines, [name + (f", {times} times" if times > 1 else "") for name, times in tests.items()]) for lines, tests in found.values()]


def own_file(answer) -> str:
    """The file, or the cell, that an answer was written in."""
    for part in (answer, *vars(answer).values()) if isinstance(answer, type) else (getattr(answer, "__wrapped__", answer),):
        if hasattr(part, "__code__"):
            return part.__code__.co_filename
    return getattr(sys.modules.get(getattr(answer, "__module__", "")), "__file__", None) or ""


def learners_line(error: BaseException, file: str) -> str:
    """Where in the learner's file it went wrong, for errors that passed through it."""
    inside = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
    where = Path(file).name if Path(file).exists() else "line "
    return f"{where}{':' * (where != 'line ')}{inside[-1].lineno}: {inside[-1].line}" if inside else ""


def provokes(message: str):
    """Marks a wrong answer with the message that its tests must show."""

    def mark(answer):
        answer.provokes = message
        return answer

    return mark


def exercises() -> dict[str, list[str]]:
    """The exercises of each lesson, in order: the public functions and classes of its solutions.py (a learner may add to exercises.py)."""
    found, owner = {}, {}
    for folder in sorted(path for path in LESSONS.glob("[0-9][0-9]_*") if (path / "solutions.py").exists()):
        found[folder.name] = public_names((folder / "solutions.py").read_text(encoding="utf-8"))
        for name in found[folder.name]:
            if owner.setdefault(name, folder.name) != folder.name:
                raise ValueError(f"two lessons have an exercise called {name}: {owner[name]} and {folder.name}")
    return found


def public_names(source: str) -> list[str]:
    defined = (ast.FunctionDef, ast.ClassDef)
    return [node.name for node in ast.parse(source).body if isinstance(node, defined) and not node.name.startswith("_")]


def hints(lesson: str) -> dict[str, list[str]]:
    """The folded hints of each exercise in hints.md."""
    found = {}
    for part in re.split(r"^## ", (LESSONS / lesson / "hints.md").read_text(encoding="utf-8"), flags=re.M)[1:]:
        name = part.split("\n", 1)[0].strip().strip("`")
        found[name] = [hint.strip() for hint in re.findall(r"<details>\s*<summary>.*?</summary>(.*?)</details>", part, flags=re.S)]
    return found


def first_hint(lesson: str, name: str) -> str:
    hint = (hints(lesson).get(name) or [""])[0]
    return f"Hint: {' '.join(hint.split())}  (more in lessons/{lesson}/hints.md)"
