"""Whose answers the capstone runs on: those that its script calls, judged by their lessons' own tests before anything is trained."""

import json
import re
import traceback
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest

from lessons import LESSONS, NOT_SOLVED, exercises, surroundings_kept

SCRIPT = Path(__file__).with_name("finetune.py")
RUNS, REPORT = LESSONS.parent / "runs", "capstone.json"      # where a run leaves its report: RUNS/<any name>/REPORT


class NotReady(Exception):
    """What keeps the capstone from running, in lines that are to be shown as they are."""


def needed() -> dict[str, list[str]]:
    """{lesson: the exercises of it that the script calls}, in the course's order."""
    called = set(re.findall(r"\bmy\.(\w+)\(", SCRIPT.read_text(encoding="utf-8")))
    found = {lesson: [name for name in names if name in called] for lesson, names in exercises().items()}
    return {lesson: names for lesson, names in found.items() if names}


def board_line(solved: set[str]) -> str:
    """The capstone on the progress board: how many of its answers are there, and whether it was run with them."""
    wanted = [(lesson, name) for lesson, names in needed().items() for name in names]
    todo = [(lesson, name) for lesson, name in wanted if name not in solved]
    if done := sorted(report.parent for report in RUNS.glob(f"*/{REPORT}") if json.loads(report.read_text(encoding="utf-8"))["answers"] == "exercises"):
        return f"done: runs/{done[0].name}"
    if todo:
        return f"your answers to {len(wanted) - len(todo)} of {len(wanted)} needed exercises are there; next: {todo[0][1]} ({todo[0][0]})"
    return f"ready: all {len(wanted)} answers are there. .venv/bin/python lessons/capstone/finetune.py my.txt"


def own_answers(kind: str) -> SimpleNamespace:
    """The answers by their names, once all have passed their lessons' tests. Raises NotReady, which names all that have not."""
    verdicts = judge(kind)
    missing, wrong, unread = defaultdict(list), [], {}
    for lesson, names in needed().items():
        for name in names:
            said = verdicts.get(name, "")
            if said.startswith(NOT_SOLVED) or said.endswith(f"defines no {name}"):
                missing[lesson].append(name)
            elif said.startswith(cannot_be_read := f"{kind}.py of {lesson}, "):
                unread[lesson] = said.removeprefix(cannot_be_read)
            elif said:
                wrong.append((lesson, f"{name}: {said}"))
    found = {"Not written yet:": [(lesson, ", ".join(names)) for lesson, names in missing.items()], "Their tests fail:": wrong,
             "Python cannot read these files:": list(unread.items())}
    if any(found.values()):
        width = max(len(f"{lesson}/{kind}.py") for said in found.values() for lesson, _ in said)
        lines = [f"The capstone needs {sum(map(len, needed().values()))} of your answers, and not all are ready."]
        for title, said in found.items():
            lines += [title] * bool(said) + [f"  {f'{lesson}/{kind}.py':<{width}}   {words}" for lesson, words in said]
        raise NotReady("\n".join([*lines, "`.venv/bin/pytest lessons` says more, and what comes next."]))
    from lessons.conftest import load_file                # which pytest has imported by now

    modules = {lesson: load_file(LESSONS / lesson, kind) for lesson in needed()}
    return SimpleNamespace(**{name: getattr(modules[lesson], name) for lesson, names in needed().items() for name in names})


def judge(kind: str) -> dict[str, str]:
    """{exercise: the first thing that its tests say against it}; they take a few seconds."""
    verdicts = Verdicts({name for names in needed().values() for name in names})
    tests = [str(LESSONS / lesson / "test_exercises.py") for lesson in needed()]
    with surroundings_kept():
        code = pytest.main(["-p", "no:terminal", "-p", "no:cacheprovider", "--capture=sys", f"--answers={kind}", f"--rootdir={LESSONS.parent}",
                            f"--confcutdir={LESSONS.parent}", "-c", str(LESSONS.parent / "pyproject.toml"), *tests], plugins=[verdicts])
    if code == pytest.ExitCode.INTERRUPTED:
        raise KeyboardInterrupt
    if code not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        raise NotReady(f"The lessons' tests cannot be run ({pytest.ExitCode(code).name.lower()}); `.venv/bin/pytest lessons` says why.")
    return verdicts.against


class Verdicts:
    """A pytest plugin: run the tests of these exercises only, and keep what each says first."""

    def __init__(self, names: set[str]):
        self.names, self.against = names, {}

    def pytest_collection_modifyitems(self, items):
        items[:] = [item for item in items if self.names & set(item.fixturenames)]

    def pytest_runtest_logreport(self, report):
        for name in report.failed and getattr(report, "asked", []) or []:
            self.against.setdefault(name, report.told[0])


@contextmanager
def blamed(kind: str) -> Iterator[None]:
    """An error that comes out of an answer is told with the answer's own line, for its tests did not foresee it."""
    try:
        yield
    except Exception as error:
        own = [frame for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename).name == f"{kind}.py" and LESSONS in Path(frame.filename).parents]
        if not own:
            raise
        where = f"{Path(own[-1].filename).parent.name}/{kind}.py:{own[-1].lineno}: {own[-1].line}"
        raise NotReady(f"{type(error).__name__}: {error}\n  {where}\nIts lesson's tests pass, so they have overlooked something; nothing was written.") from error
