"""Each exercise is a pytest fixture of its own name; a stub is `not solved yet`; at the end a board shows what is next."""

import ast
import contextlib
import functools
import importlib.util
import itertools
import signal
import subprocess
import sys
import threading
from collections import defaultdict
from pathlib import Path

import pytest

import lessons
from lessons import NOT_SOLVED, first_hint, learners_line, mistake, own_file, public_names
from lessons.guard import guarded
from lessons.mutants import mutants_asked_for

SAME_AGAIN = "failed for the same reason"
VARIANTS = ("wrong_answers", "right_answers")          # files of several answers an exercise, called <exercise>__<what is special>
SECONDS = defaultdict(lambda: 20, mutants=5)           # that a test may take

exercises = functools.cache(lessons.exercises)

done_with = pytest.StashKey[set]()                     # answers whose other tests need not run: out of time, or caught
seen = pytest.StashKey[set]()                          # mistakes that have been told
shortened = pytest.StashKey[set]()                     # exercises of which -k has left tests out


def pytest_configure(config):
    config.stash[done_with], config.stash[seen], config.stash[shortened] = set(), set(), set()


def exercise_fixture(name: str):
    def answer(request):
        with guarded(name, load_answer(request, name), getattr(load_file(request.path.parent, "solutions"), name), promise(request.path.parent, name)) as answer:
            yield answer

    return pytest.fixture(name=name)(answer)


for _names in exercises().values():
    for _name in _names:
        globals()[f"exercise_{_name}"] = exercise_fixture(_name)


def load_answer(request, name: str):
    """The learner's own object in a notebook, or what the chosen file of the test's lesson defines under this name."""
    live = getattr(request.config, "live_answers", {})
    kind, folder = request.config.getoption("--answers"), request.path.parent
    if name in live:
        request.node.own_file = own_file(live[name])
        return live[name]
    if kind == "mutants":
        return request.param.answer()
    request.node.own_file = str(file_of(folder, kind))
    module = load_file(folder, kind)
    name = getattr(request, "param", name)               # of a wrong or an unusual right answer
    if not hasattr(module, name):
        pytest.fail(f"{kind}.py of {folder.name} defines no {name}", pytrace=False)
    request.node.provokes = getattr(getattr(module, name), "provokes", None)
    return getattr(module, name)


def file_of(folder: Path, kind: str) -> Path:
    return folder / f"{'exercises' if kind == 'committed' else kind}.py"


def load_file(folder: Path, kind: str):
    """The module, read anew unless it is the solutions, which nobody edits meanwhile."""
    return worked(folder) if kind == "solutions" else _load(folder, kind)


@functools.cache
def worked(folder: Path):
    return _load(folder, "solutions")


def _load(folder: Path, kind: str):
    path = file_of(folder, kind)
    module = importlib.util.module_from_spec(importlib.util.spec_from_file_location(f"{folder.name}.{kind}", path))
    sys.modules[module.__name__] = module                # dataclasses and pickle look their module up there
    try:
        source = committed(path) if kind == "committed" else path.read_text(encoding="utf-8-sig")
        exec(compile(source, str(path), "exec"), module.__dict__)
    except SyntaxError as error:
        pytest.fail(f"{path.name} of {folder.name}, line {error.lineno}: {error.msg}", pytrace=False)
    except (Exception, SystemExit) as error:
        line = learners_line(error, str(path)).removeprefix(f"{path.name}:").partition(":")[0] or "?"
        pytest.fail(f"{path.name} of {folder.name}, line {line}: {type(error).__name__}: {error}", pytrace=False)
    return module


def committed(path: Path) -> str:
    """The file as the last commit has it."""
    try:
        shown = subprocess.run(["git", "show", f"HEAD:./{path.name}"], cwd=path.parent, capture_output=True, encoding="utf-8")
    except FileNotFoundError:
        pytest.fail("--answers=committed needs git, which is not installed here", pytrace=False)
    if shown.returncode != 0:
        pytest.fail(f"--answers=committed finds no {path.name} in a commit: {shown.stderr.strip()}", pytrace=False)
    return shown.stdout.removeprefix("\ufeff")


@functools.cache
def promise(folder: Path, name: str) -> str:
    """What the docstring of the worked solution says: the exercise's is the learner's own to change."""
    for node in ast.parse(file_of(folder, "solutions").read_text(encoding="utf-8-sig")).body:
        if getattr(node, "name", None) == name:
            return "\n".join(ast.get_docstring(part) or "" for part in [node, *node.body] if isinstance(part, (ast.FunctionDef, ast.ClassDef)))
    return ""


def pytest_generate_tests(metafunc):
    """With --answers=wrong_answers (right_answers, mutants) each test runs once for every such answer to its exercise."""
    kind, folder = metafunc.config.getoption("--answers"), Path(metafunc.definition.path).parent
    name = next((name for name in exercises().get(folder.name, []) if name in metafunc.fixturenames), None)
    if name is None:
        return
    if kind in VARIANTS and file_of(folder, kind).exists():
        variants = public_names(file_of(folder, kind).read_text(encoding="utf-8-sig"))
        metafunc.parametrize(name, [variant for variant in variants if variant.partition("__")[0] == name], indirect=True)
    if kind == "mutants":
        metafunc.parametrize(name, mutants_asked_for(metafunc.config.getoption("--mutants"), folder, name), indirect=True, ids=str)


def asked(item) -> list[str]:
    return [name for name in exercises().get(item.path.parent.name, []) if name in item.fixturenames] if item.path.name == "test_exercises.py" else []


def judged(item) -> str:
    """The name of the answer that this test judges: of the exercise, of the variant, of the mutant."""
    names = asked(item)
    variant = item.callspec.params.get(names[0]) if names and hasattr(item, "callspec") else None
    return str(variant or ", ".join(names))


# A test has its time, and an answer that has used it up is not asked again.

@contextlib.contextmanager
def limit(item):
    seconds = SECONDS[item.config.getoption("--answers")]
    if not asked(item) or not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(_, frame):
        while frame and not frame.f_code.co_filename.startswith("<frozen importlib"):
            frame = frame.f_back
        if frame:                                        # inside an import, which must not be left half done: once more in a second
            return
        item.config.stash[done_with].add(judged(item))
        pytest.fail(f"no answer after {seconds} s: an endless loop?", pytrace=False)

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds, 1)     # and again each second, should the answer swallow the first
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item):
    if judged(item) in item.config.stash[done_with]:
        pytest.skip("this answer needs no more tests")
    with limit(item):
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    with limit(item):
        return (yield)


# What is said of a failure: the mistake, what was given, the learner's own line, what was printed. Once each.

@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if not asked(item) or report.skipped or (report.passed and report.when != "call"):
        return report
    report.asked, report.judged = asked(item), (answer := judged(item))
    item.user_properties.append(("answer", answer))
    if report.failed and call.excinfo is not None:
        report.told = told(call.excinfo.value, item, report)
        report.longrepr = "\n".join(report.told)
        report.outcome_word = NOT_SOLVED if report.told[0].startswith(NOT_SOLVED) else None
        again = (answer, mistake(report.told[0])) if call.when == "call" else report.told[0]       # a file that cannot be read: once for all
        if report.outcome_word is None and again in item.config.stash[seen]:
            report.outcome_word = SAME_AGAIN
        item.config.stash[seen].add(again)
        item.user_properties.append(("message", report.told[0]))
        expected = getattr(item, "provokes", None)       # a wrong answer that got its message, or a mutant that was caught
        if item.config.getoption("--answers") == "mutants" or expected and expected in report.told[0]:
            item.config.stash[done_with].add(answer)
    return report


def told(error: BaseException, item, report) -> list[str]:
    own = getattr(item, "own_file", "")
    frame = error.__traceback__
    while frame and frame.tb_next:
        frame = frame.tb_next
    if isinstance(error, NotImplementedError) and not error.args and frame and frame.tb_frame.f_code.co_filename == own:
        return [f"{NOT_SOLVED}: {', '.join(asked(item))}"]
    first, *more = (str(error).strip() or type(error).__name__).split("\n")
    more = list(itertools.takewhile(lambda line: not line.startswith("assert "), more))         # from there on it is pytest's own
    if not isinstance(error, (AssertionError, pytest.fail.Exception)):
        first = f"{type(error).__name__}: {first}" if str(error).strip() else first
    printed = [f"it printed: {' | '.join(report.capstdout.split(chr(10))[:5]).strip(' |')[:200]}"] if report.capstdout.strip() else []
    line = [learners_line(error, own)] if learners_line(error, own) else []
    return [first, *(f"  {each}" for each in [*more[:5], *getattr(error, "__notes__", []), *line, *printed])]


def pytest_report_teststatus(report):
    """A stub counts as failed, and is shown as what it is, without a page of its own; so is a mistake that was told before."""
    word = getattr(report, "outcome_word", None)
    if word:
        return word, "_" if word == NOT_SOLVED else "F", word.upper()


def pytest_itemcollected(item):
    """`-k lora_branch` finds the tests of that exercise, whatever they are called."""
    item.extra_keyword_matches.update(asked(item))


def pytest_deselected(items):
    for item in items:
        item.config.stash[shortened].update(asked(item))


def pytest_terminal_summary(terminalreporter, config):
    """The progress board: a line a lesson, then the next exercise and its first hint."""
    if config.getoption("--answers") not in ("exercises", "solutions"):
        return
    failed, wrong, passed = set(), set(), defaultdict(set)
    for outcome in ("passed", "failed", "error", NOT_SOLVED, SAME_AGAIN):
        for report in terminalreporter.getreports(outcome):
            path, _, test = report.nodeid.partition("::")
            for name in getattr(report, "asked", []):
                passed[Path(path).parent.name, name].add(test.partition("[")[0])
                if outcome != "passed":
                    failed.add(name)
                if report.when == "call" and outcome in ("failed", SAME_AGAIN):
                    wrong.add(name)
    ran = {lesson for lesson, _ in passed}
    if not ran:
        return
    terminalreporter.section("progress")
    upcoming, solved = None, set()
    for lesson, names in exercises().items():
        if lesson in ran:
            tests = tests_of(Path(__file__).parent / lesson)
            part = {name for name in names if name in config.stash[shortened] or passed[lesson, name] < tests[name]}      # of these not all tests were run
            marks = ["x" if name in wrong else "." if name in failed or not passed[lesson, name] else "?" if name in part else "#" for name in names]
            solved.update(name for name, mark in zip(names, marks) if mark == "#")
            line = f"{lesson:<16} {''.join(marks):<8} {marks.count('#')}/{len(names)} solved"
            terminalreporter.write_line(line + ("   (?: not all of its tests were run)" if "?" in marks else ""))
            upcoming = upcoming or next(((lesson, name) for name, mark in zip(names, marks) if mark in ".x" and passed[lesson, name]), None)
    if upcoming:
        terminalreporter.write_line(f"next: {upcoming[1]} in lessons/{upcoming[0]}/exercises.py. {first_hint(*upcoming)}")
    if (Path(__file__).parent / "capstone").exists():
        from lessons.capstone.answers import board_line, needed

        if needed().keys() <= ran:
            terminalreporter.write_line(f"{'capstone':<16} {board_line(solved)}")


def tests_of(folder: Path) -> dict[str, set[str]]:
    """{exercise: the names of its tests}"""
    found = defaultdict(set)
    for node in ast.parse((folder / "test_exercises.py").read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test"):
            for argument in node.args.args:
                found[argument.arg].add(node.name)
    return found
