"""The museum's board: a mark an exhibit, then the next one and its first hint. (lessons/conftest.py draws that of the numbered lessons.)"""

import pytest

from lessons import NOT_SOLVED, first_hint
from lessons.bug_museum import NAMES
from lessons.conftest import SAME_AGAIN

unreadable = pytest.StashKey[bool]()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """A stub is shown as what it is, without a page of its own."""
    report = yield
    if call.when == "setup" and report.failed:           # the file cannot be read: said once
        report.outcome_word = SAME_AGAIN if item.session.stash.get(unreadable, False) else None
        item.session.stash[unreadable] = True
    if call.when == "call" and not report.skipped:
        report.exhibit = item.callspec.params["name"]
        item.user_properties.append(("answer", report.exhibit))
        if report.failed and str(call.excinfo.value) == NOT_SOLVED:
            report.outcome_word = NOT_SOLVED             # lessons/conftest.py prints it
    return report


def pytest_terminal_summary(terminalreporter, config):
    verdicts = {report.exhibit: {"passed": "#", "failed": "x"}.get(outcome, ".") for outcome in ("passed", "failed", NOT_SOLVED)
                for report in terminalreporter.getreports(outcome) if hasattr(report, "exhibit")}
    if not verdicts or config.getoption("--answers") not in ("exercises", "solutions"):
        return
    terminalreporter.section("the bug museum")
    marks = "".join(verdicts.get(name, "?") for name in NAMES)
    terminalreporter.write_line(f"bug_museum       {marks} {marks.count('#')}/{len(NAMES)} solved" + ("   (?: not run)" if "?" in marks else ""))
    upcoming = next((name for name in NAMES if verdicts.get(name, "#") != "#"), None)
    if upcoming:
        terminalreporter.write_line(f"next: test_{upcoming} in lessons/bug_museum/exercises.py. {first_hint('bug_museum', upcoming)}")
