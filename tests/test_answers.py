"""Answers to the lessons' exercises that their authors wrote for the tests' sake: every wrong one is rejected with its message, every right one in
another style passes, and a sample of the solutions' mutants is rejected too (all of them: make mutants)."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

import lessons

ROOT = Path(lessons.__file__).parent.parent
NAMES = lessons.exercises()
each_lesson = pytest.mark.parametrize("lesson", NAMES)
each_exercise = pytest.mark.parametrize("lesson, name", [(lesson, name) for lesson, names in NAMES.items() for name in names], ids=[name for names in NAMES.values() for name in names])


def source(lesson, kind):
    return (ROOT / "lessons" / lesson / f"{kind}.py").read_text(encoding="utf-8-sig")


def definitions(lesson, kind):
    return {node.name: node for node in ast.parse(source(lesson, kind)).body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}


@each_exercise
def test_every_wrong_answer_is_rejected_with_its_message(verdicts, lesson, name):
    wrong = {other: node for other, node in definitions(lesson, "wrong_answers").items() if other.partition("__")[0] == name}
    assert len(wrong) >= 3
    for other, node in wrong.items():
        promised = [ast.literal_eval(d.args[0]) for d in node.decorator_list if isinstance(d, ast.Call) and d.func.id == "provokes"]
        assert promised, f"{other} does not say what it provokes"
        messages = [message for _, message in verdicts("wrong_answers")[other] if message]
        assert messages, f"{other} passes every test"
        assert any(promised[0] in message for message in messages), f"{other} should provoke {promised[0]!r}; it got {messages}"


@each_lesson
def test_every_right_answer_passes(verdicts, lesson):
    right = lessons.public_names(source(lesson, "right_answers"))
    assert len(right) >= 2
    for name in right:
        found = verdicts("right_answers")[name]
        assert found and not [message for _, message in found if message], (name, found)


@pytest.mark.parametrize("kind", ["wrong_answers", "right_answers"])
@each_lesson
def test_every_further_answer_belongs_to_an_exercise(lesson, kind):
    strays = [name for name in lessons.public_names(source(lesson, kind)) if name.partition("__")[0] not in NAMES[lesson]]
    assert not strays


def test_a_sample_of_the_mutants_is_rejected(alone):
    sample = os.environ.get("MUTANTS", "20/0")
    done = subprocess.run([sys.executable, "-m", "lessons.mutants", "--sample", sample], cwd=ROOT, capture_output=True, text=True, env=alone)
    assert done.returncode == 0, done.stdout + done.stderr
