"""The bug museum, proved: each given test tells healthy from sick, twice over; what only looks like a test is turned away; the labels say what the pieces cost."""

import ast
import contextlib
import functools
import io
import os
import re
import shutil
from pathlib import Path

import pytest
import torch

import lessons
from lessons.bug_museum import HERE, NAMES, code, judge, kinds, outcome, piece
from lessons.conftest import load_file

ROOT = Path(lessons.__file__).parent.parent
SOLUTIONS, WRONG, RIGHT = (load_file(HERE, kind) for kind in ("solutions", "wrong_answers", "right_answers"))
ROWS = re.findall(r"^\| \[(\d\d)\]\(exhibits/(\w+)\.py\) (.+?) \| (.+?) \| (.+?) \| (.+?) \| (\d+) \|$", (HERE / "README.md").read_text(encoding="utf-8"), flags=re.M)

each_exhibit = pytest.mark.parametrize("name", NAMES)
each_room = pytest.mark.parametrize("room", ["exhibits", "storeroom"])


@functools.cache
def committed():
    """The stubs as the last commit has them; a learner may commit answers on a branch of their own."""
    module = load_file(HERE, "committed" if shutil.which("git") and (ROOT / ".git").exists() else "exercises")
    answered = [name for name in NAMES if outcome(getattr(module, f"test_{name}"), None, 0).__class__ is not NotImplementedError]
    if answered and not os.environ.get("CI"):
        pytest.skip(f"solved in the last commit: {answered[0]}")
    assert not answered
    return module


def test_there_are_twenty_exhibits_and_the_museum_is_no_lesson():
    assert len(NAMES) == 20 and [name[:2] for name in NAMES] == [f"{number:02}" for number in range(1, 21)]
    assert "bug_museum" not in lessons.exercises()


@each_exhibit
def test_an_exhibit_is_at_most_a_page_and_says_what_it_promises(name):
    source = (HERE / "exhibits" / f"{name}.py").read_text(encoding="utf-8")
    assert len(source.splitlines()) <= 60 and max(map(len, source.splitlines())) <= 155
    assert re.match(rf'"""{name[:2]} · .+\n\nThe piece: .+\n(.+\n)*The promise: ', source)
    assert not [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Assert)]      # an assert is the visitor's


@each_exhibit
@each_room
def test_neither_piece_is_called_what_it_is(room, name):
    assert kinds(room, name) in (["healthy", "sick"], ["healthy", "sick", "sick_too"][:3 if room == "storeroom" else 2])
    assert {code(room, name, health).__name__ for health in kinds(room, name)} == {"code"}


@each_exhibit
def test_a_given_test_tells_healthy_from_sick_at_further_seeds(name):
    test = getattr(SOLUTIONS, f"test_{name}")            # (seeds 0 and 1 are the board's, below)
    for room in ("exhibits", "storeroom"):
        for kind in kinds(room, name):
            said = outcome(test, code(room, name, kind), 2)
            assert said is None if kind == "healthy" else isinstance(said, AssertionError)


@each_exhibit
def test_a_stub_fails_on_both_and_is_not_solved_yet(name):
    stub = getattr(committed(), f"test_{name}")
    assert all(type(outcome(stub, code("exhibits", name, health), 0)) is NotImplementedError for health in ("healthy", "sick"))
    assert judge(stub, name) == lessons.NOT_SOLVED


@each_exhibit
def test_what_always_fails_or_never_fails_or_stops_is_turned_away(name):
    def never(code):
        pass

    def always(code):
        assert False, "no code is good enough"

    def skipped(code):
        pytest.skip("another day")

    def broken(code):
        import no_such_module  # noqa: F401

    def asks_its_name(code):
        assert "sick" not in f"{code.__name__} {code.__qualname__}".lower()

    assert "passes on the sick code" in judge(never, name) and "passes on the sick code" in judge(asks_its_name, name)
    assert "fails on the healthy code" in judge(always, name) and "stops on the healthy code" in judge(broken, name) and "skipped" in judge(skipped, name)


def test_to_stop_on_sick_code_is_no_verdict():
    def stops(code):
        if (code(50, 400).std() - 0.5 / 3**0.5 / 10).abs() > 0.01:
            raise ImportError("not here")

    assert "stops without a verdict" in judge(stops, "02_transposed_init")


def test_a_failing_pytest_raises_or_assert_close_is_a_verdict():
    def close(code):
        torch.testing.assert_close(code(50, 400).std(), torch.tensor(1 / 1200**0.5), rtol=0.1, atol=0)

    def fails(code):
        if abs(code(50, 400).std() * 1200**0.5 - 1) > 0.1:
            pytest.fail("not the standard deviation that is promised")

    assert judge(close, "02_transposed_init") == judge(fails, "02_transposed_init") == ""


def test_what_is_raised_elsewhere_is_no_stub():
    def ends_in_torch(code):
        raise NotImplementedError("of torch's own")

    assert "of torch's own" in judge(ends_in_torch, NAMES[0])


@pytest.mark.parametrize("wrong", [name for name in vars(WRONG) if name.startswith("test_")])
def test_what_looks_like_a_test_gets_its_answer(wrong):
    test, name = getattr(WRONG, wrong), wrong.partition("__")[0].removeprefix("test_")
    assert name in NAMES and test.provokes in judge(test, name)


def test_each_exhibit_has_a_wrong_test_and_a_further_right_one():
    for module in (WRONG, RIGHT):
        assert {name.partition("__")[0] for name in vars(module) if name.startswith("test_")} == {f"test_{name}" for name in NAMES}


@each_exhibit
def test_the_label_says_what_the_piece_costs(name):
    (number, _, title, complaint, _, bill, _), = [row for row in ROWS if row[1] == name]
    shown = piece("exhibits", name)
    with torch.random.fork_rng(devices=[]):
        assert bill == shown.cost()
    assert shown.__doc__.startswith(f"{number} · {title}\n")
    stub = {node.name: node for node in ast.parse((HERE / "exercises.py").read_text(encoding="utf-8-sig")).body if isinstance(node, ast.FunctionDef)}[f"test_{name}"]
    assert ast.get_docstring(stub).splitlines()[0] == complaint


def test_the_labels_add_up():
    assert [row[1] for row in ROWS] == NAMES
    assert "about a hundred minutes" in (HERE / "README.md").read_text(encoding="utf-8") and abs(sum(int(row[-1]) for row in ROWS) - 100) < 5


@each_exhibit
def test_each_exhibit_has_two_hints(name):
    assert [bool(hint) for hint in lessons.hints("bug_museum")[name]] == [True, True]


def run(*options) -> str:
    """What a plain pytest of the museum prints."""
    said = io.StringIO()
    with lessons.surroundings_kept(), contextlib.redirect_stdout(said):
        pytest.main(["-q", "-p", "no:cacheprovider", "--capture=sys", f"--rootdir={ROOT}", f"--confcutdir={ROOT}", "-c", str(ROOT / "pyproject.toml"),
                     str(HERE), *options])
    return said.getvalue()


def test_a_plain_pytest_shows_the_board_and_marks_what_was_not_run():
    said = run("--answers=solutions", "-k", f"not {NAMES[1]}")
    assert f"#?{'#' * 18} 19/20 solved" in said and "19 passed" in said
    assert judge(getattr(SOLUTIONS, f"test_{NAMES[1]}"), NAMES[1]) == ""


def test_a_plain_pytest_says_not_solved_yet_and_what_is_next():
    committed()
    said = run("--answers=committed")
    assert f"20 {lessons.NOT_SOLVED}" in said and "Error" not in said


@pytest.mark.parametrize("right", [name for name in vars(RIGHT) if name.startswith("test_")])
def test_what_is_right_in_another_way_is_let_through(right):
    assert judge(getattr(RIGHT, right), right.partition("__")[0].removeprefix("test_")) == ""
