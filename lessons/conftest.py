"""Each exercise is a pytest fixture of its own name; a stub is `not solved yet`; at the end a board shows what is next."""

import importlib.util
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest

from lessons import NOT_SOLVED, exercises, first_hint, public_names


def exercise_fixture(name: str):
    def answer(request):
        return load_answer(request, name)

    return pytest.fixture(name=name)(answer)


for _names in exercises().values():
    for _name in _names:
        globals()[f"exercise_{_name}"] = exercise_fixture(_name)


def load_answer(request, name: str):
    """The learner's own object in a notebook, or what the chosen file of the test's lesson defines under this name."""
    live = getattr(request.config, "live_answers", {})
    if name in live:
        return live[name]
    kind, folder = request.config.getoption("--answers"), request.path.parent
    name = getattr(request, "param", name)               # with wrong_answers: the name of one of them
    module = load_file(folder, kind)
    if not hasattr(module, name):
        pytest.fail(f"{kind}.py of {folder.name} defines no {name}", pytrace=False)
    return getattr(module, name)


def load_file(folder: Path, kind: str):
    path = folder / f"{'exercises' if kind == 'committed' else kind}.py"
    module = importlib.util.module_from_spec(importlib.util.spec_from_file_location(f"{folder.name}.{kind}", path))
    sys.modules[module.__name__] = module                # dataclasses and pickle look their module up there
    try:
        source = committed(path) if kind == "committed" else path.read_text(encoding="utf-8")
        exec(compile(source, str(path), "exec"), module.__dict__)
    except SyntaxError as error:
        pytest.fail(f"{path.name} of {folder.name}, line {error.lineno}: {error.msg}", pytrace=False)
    except Exception as error:
        line = next((t.tb_lineno for t in _frames(error) if t.tb_frame.f_code.co_filename == str(path)), "?")
        pytest.fail(f"{path.name} of {folder.name}, line {line}: {type(error).__name__}: {error}", pytrace=False)
    return module


def _frames(error):
    frame = error.__traceback__
    while frame:
        yield frame
        frame = frame.tb_next


def committed(path: Path) -> str:
    """The file as the last commit has it; without git, as it is."""
    shown = subprocess.run(["git", "show", f"HEAD:./{path.name}"], cwd=path.parent, capture_output=True, encoding="utf-8")
    return shown.stdout if shown.returncode == 0 else path.read_text(encoding="utf-8")


def pytest_generate_tests(metafunc):
    """With --answers=wrong_answers each test runs once for every wrong answer to its exercise."""
    if metafunc.config.getoption("--answers") != "wrong_answers":
        return
    folder = Path(metafunc.definition.path).parent
    if not (folder / "wrong_answers.py").exists():
        return
    wrong = public_names((folder / "wrong_answers.py").read_text(encoding="utf-8"))
    for name in exercises().get(folder.name, []):
        if name in metafunc.fixturenames:
            metafunc.parametrize(name, [w for w in wrong if w.partition("__")[0] == name], indirect=True)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if item.path.name != "test_exercises.py":
        return report
    asked = [name for name in exercises().get(item.path.parent.name, []) if name in item.fixturenames]
    if report.when == "call" or report.failed:
        report.asked = asked
        wrong = item.callspec.params.get(asked[0]) if asked and hasattr(item, "callspec") else None
        item.user_properties.append(("answer", wrong or ", ".join(asked)))
    if report.failed and call.excinfo is not None:
        error = call.excinfo.value
        if isinstance(error, NotImplementedError):
            report.short = report.longrepr = f"{NOT_SOLVED}: {', '.join(asked)}"
            report.unsolved = True
        else:
            said = str(error).strip() or type(error).__name__
            report.short = said.split("\n")[0] if isinstance(error, (AssertionError, pytest.fail.Exception)) else f"{type(error).__name__}: {said}"
            line = _learners_line(call.excinfo, item)
            report.longrepr = "\n".join(filter(None, [report.short, *said.split("\n")[1:6], line]))
        item.user_properties.append(("message", report.short))
    return report


def pytest_report_teststatus(report):
    """A stub counts as failed, and is shown as what it is, without a page of its own."""
    if getattr(report, "unsolved", False):
        return NOT_SOLVED, "_", NOT_SOLVED.upper()


def _learners_line(excinfo, item) -> str:
    """Where in the learner's file it went wrong, for errors that are raised there."""
    inside = [entry for entry in excinfo.traceback if Path(entry.path).parent == item.path.parent and Path(entry.path).name != "test_exercises.py"]
    return f"  {inside[-1].path.name}:{inside[-1].lineno + 1}: {str(inside[-1].statement).strip()}" if inside else ""


def pytest_terminal_summary(terminalreporter, config):
    """The progress board: a line a lesson, then the next exercise and its first hint."""
    if config.getoption("--answers") not in ("exercises", "solutions"):
        return
    failed, ran = defaultdict(set), defaultdict(set)
    for outcome in ("passed", "failed", "error", NOT_SOLVED):
        for report in terminalreporter.getreports(outcome):
            folder = Path(report.nodeid.partition("::")[0]).parent.name
            for name in getattr(report, "asked", []):
                ran[folder].add(name)
                if outcome != "passed":
                    failed[folder].add(name)
    if not ran:
        return
    terminalreporter.section("progress")
    upcoming = None
    for lesson, names in exercises().items():
        if lesson in ran:
            solved = [name in ran[lesson] and name not in failed[lesson] for name in names]
            terminalreporter.write_line(f"{lesson:<16} {''.join('#' if s else '.' for s in solved):<8} {sum(solved)}/{len(names)} solved")
            upcoming = upcoming or next(((lesson, name) for name, s in zip(names, solved) if name in ran[lesson] and not s), None)
    if upcoming:
        terminalreporter.write_line(f"next: {upcoming[1]} in lessons/{upcoming[0]}/exercises.py. {first_hint(*upcoming)}")
