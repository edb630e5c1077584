"""Each exhibit judges your test of it: healthy code must pass it, sick code must not."""

import pytest

from lessons.bug_museum import HERE, NAMES, judge
from lessons.conftest import load_file

KINDS = ("exercises", "solutions", "committed")          # the museum has no other files of answers


@pytest.mark.parametrize("name", NAMES)
def test_exhibit(request, name):
    kind = request.config.getoption("--answers")
    if kind not in KINDS:
        pytest.skip("no such answers in the museum")
    written = getattr(load_file(HERE, kind), f"test_{name}", None)
    if written is None:
        pytest.fail(f"{kind}.py of the museum defines no test_{name}", pytrace=False)
    verdict = judge(written, name)
    if verdict:
        pytest.fail(verdict, pytrace=False)
