"""check(f): run a lesson's tests on a function you just wrote in a notebook cell. (@provokes marks the lessons' wrong answers.)"""

import ast
import contextlib
import difflib
import io
import re
from pathlib import Path

import pytest

LESSONS = Path(__file__).parent


def check(answer) -> None:
    """Run the tests that ask for the exercise of this name on `answer`, a function or a class, and print the verdict."""
    name = getattr(answer, "__name__", type(answer).__name__)
    lesson = next((folder for folder, names in exercises().items() if name in names), None)
    if lesson is None:
        known = [name for names in exercises().values() for name in names]
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.4) or known
        raise ValueError(f"no exercise is called {name!r}; there are {', '.join(near)}")
    verdicts = Verdicts({name: answer})
    quiet = ["-p", "no:terminal", "-p", "no:cacheprovider", "-p", "no:nbval", "--capture=no", "--answers=exercises"]
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        code = pytest.main([*quiet, f"--rootdir={LESSONS.parent}", f"--confcutdir={LESSONS.parent}",
                            "-c", str(LESSONS.parent / "pyproject.toml"), str(LESSONS / lesson / "test_exercises.py")], plugins=[verdicts])
    if code not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):       # stopped by hand, or the tests cannot be read
        print(f"{name}: no verdict, pytest stopped ({pytest.ExitCode(code).name.lower()}). `pytest lessons/{lesson}` says why.")
        return
    failed = [(test, message) for test, message in verdicts.found if message]
    if any(NOT_SOLVED in message for _, message in failed):
        print(f"{name}: {NOT_SOLVED}. {first_hint(lesson, name)}")
    elif failed:
        print(f"{name}: {len(failed)} of {len(verdicts.found)} tests fail.")
        for test, message in failed:
            print(f"  {test}: {message}")
    else:
        print(f"{name}: {len(verdicts.found)} of {len(verdicts.found)} tests pass. Solved.")


NOT_SOLVED = "not solved yet"


class Verdicts:
    """A pytest plugin: judge these live answers, run no other exercise's tests, and keep what each test said."""

    def __init__(self, answers: dict):
        self.answers, self.found = answers, []

    def pytest_configure(self, config):
        config.live_answers = self.answers

    def pytest_collection_modifyitems(self, items):
        items[:] = [item for item in items if self.answers.keys() & set(item.fixturenames)]

    def pytest_runtest_logreport(self, report):
        if report.when == "call" or report.failed:
            self.found.append((report.nodeid.rpartition("::")[2], getattr(report, "short", "") or "failed" if report.failed else ""))


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
