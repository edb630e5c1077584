"""The lessons, proved: every stub fails, every solution passes, and files, hints, signatures and minutes are there. More answers: test_answers.py."""

import ast
import json
import os
import shutil
import subprocess
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
    if kind == "committed" and shutil.which("git"):
        shown = subprocess.run(["git", "show", f"HEAD:./{path.name}"], cwd=path.parent, capture_output=True, encoding="utf-8")
        if shown.returncode == 0:
            return shown.stdout.removeprefix("\ufeff")
    return path.read_text(encoding="utf-8-sig")


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


@each_exercise
def test_every_solution_passes_at_least_two_tests(verdicts, lesson, name):
    found = verdicts("solutions")[name]
    assert len(found) >= 2 and not [verdict for verdict in found if verdict[1]], found


@each_exercise
def test_every_stub_as_committed_is_not_solved_yet(verdicts, lesson, name):
    stub(lesson, name)
    found = verdicts("committed")[name]
    assert found and all(message == f"{lessons.NOT_SOLVED}: {name}" for _, message in found), found


@pytest.mark.parametrize("notebook", sorted((ROOT / "notebooks").glob("*.ipynb")), ids=lambda path: path.stem)
def test_a_notebook_is_plain_python(notebook):
    """No magics: nbval passes a cell `%nosuchmagic`, and whatever comes after it."""
    for number, cell in enumerate(json.loads(notebook.read_text(encoding="utf-8"))["cells"]):
        if cell["cell_type"] == "code":
            ast.parse("".join(cell["source"]), f"{notebook.name}, cell {number}")


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
