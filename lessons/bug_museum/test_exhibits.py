"""Each exhibit judges your test of it: healthy code must pass it, sick code must not."""

import pytest

from lessons.bug_museum import HERE, NAMES, judge
from lessons.conftest import load_file

KINDS = ("exercises", "solutions", "committed")          # the museum has no other files of answers


@pytest.fixture(scope="module")
def written(request):
    """The file of tests, read once."""
    kind = request.config.getoption("--answers")
    if kind not in KINDS:
        pytest.skip("no such answers in the museum")
    return load_file(HERE, kind)


@pytest.mark.parametrize("name", NAMES)
def test_exhibit(written, name):
    test = getattr(written, f"test_{name}", None)
    if test is None:
        pytest.fail(f"{written.__file__} defines no test_{name}", pytrace=False)
    verdict = judge(test, name)
    if verdict:
        pytest.fail(verdict, pytrace=False)
