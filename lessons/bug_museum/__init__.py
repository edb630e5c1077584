"""The attendant of the bug museum: judge(test, name) says what a learner's test lacks; "" if it tells the healthy code from the sick."""

import ast
import importlib.util
import random
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch

from lessons import NOT_SOLVED, learners_line, own_file

HERE = Path(__file__).parent
NAMES = [path.stem for path in sorted((HERE / "exhibits").glob("[0-9][0-9]_*.py"))]
SEEDS = (0, 1)                                           # luck does not help twice


def piece(room: str, name: str) -> ModuleType:
    """The file of that name in exhibits or storeroom, read anew: what one test did to it, the next does not see."""
    spec = importlib.util.spec_from_file_location(f"bug_museum.{room}.{name}", HERE / room / f"{name}.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def kinds(room: str, name: str) -> list[str]:
    """What that file holds: healthy, sick, and in the storeroom now and then sick_too."""
    return [key.lower() for key, value in vars(piece(room, name)).items() if key.lower() in ("healthy", "sick", "sick_too") and callable(value)]


def code(room: str, name: str, health: str):
    """The healthy or the sick one, a function or a class. Neither is called by what it is."""
    found = {key.lower(): value for key, value in vars(piece(room, name)).items()}[health]
    found.__name__ = found.__qualname__ = "code"
    return found


def judge(test: Callable, name: str) -> str:
    """`test` must pass on what is healthy and fail by an assertion on what is sick: on the piece on show, then on the one in the storeroom."""
    for room in ("exhibits", "storeroom"):
        for health in kinds(room, name):
            for seed in SEEDS:
                verdict = (on_healthy if health == "healthy" else on_sick)(room, outcome(test, code(room, name, health), seed), own_file(test))
                if verdict:
                    return verdict
    return ""


class Returned(Exception):
    """Nothing was raised; the test gave something back, at which nobody looks."""


def outcome(test: Callable, code, seed: int) -> BaseException | None:
    """What the test raised, or Returned. Its random numbers follow from the seed, and the caller's stay where they were."""
    kept = random.getstate()
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.default_generator.manual_seed(seed), random.seed(seed)     # torch.manual_seed takes milliseconds: it sees to every device
        try:
            return None if test(code) is None else Returned()
        except KeyboardInterrupt:
            raise
        except BaseException as error:                   # pytest.fail and SystemExit too
            return error
        finally:
            random.setstate(kept)


def on_healthy(room: str, error: BaseException | None, file: str) -> str:
    if error is None or isinstance(error, Returned):
        return ""
    if unwritten(error, file):
        return NOT_SOLVED
    if isinstance(error, pytest.skip.Exception):
        return "it is skipped, which is no verdict"
    verb = "fails" if isinstance(error, AssertionError | pytest.fail.Exception) else "stops"
    if room == "exhibits":
        return f"it {verb} on the healthy code, which keeps its promise{told(error, file)}"
    return f"it {verb} on the storeroom's healthy code, the same promise kept in another way: test what the code does, not how{told(error, file)}"


def on_sick(room: str, error: BaseException | None, file: str) -> str:
    if isinstance(error, Returned):
        return "it passes on sick code: it returned something and asserted nothing. Put `assert` where `return` stands"
    if error is None and room == "exhibits":
        return "it passes on the sick code: the bug walks by"
    if error is None:
        return "it catches the bug on show, but in another coat (the storeroom's) the bug walks by: test the whole promise, at sizes of your own"
    if unwritten(error, file):
        return NOT_SOLVED
    if not isinstance(error, (AssertionError, pytest.fail.Exception)) and not in_an_assert(error, file):
        return f"on sick code it stops without a verdict, before an assert of yours could fail{told(error, file)}"
    return ""


def in_an_assert(error: BaseException, file: str) -> bool:
    """Whether an assert of the learner's was comparing what cannot be compared, such as a vector of 5 with one of 8."""
    frames = [(frame.f_code.co_filename, line) for frame, line in traceback.walk_tb(error.__traceback__)]
    own = [line for name, line in frames if name == file]
    in_a_piece = any(Path(name).parent in (HERE / "exhibits", HERE / "storeroom") for name, _ in frames)
    if not own or in_a_piece or not isinstance(error, (RuntimeError, ValueError)):
        return False
    asserts = [node for node in ast.walk(ast.parse(Path(file).read_text(encoding="utf-8-sig"))) if isinstance(node, ast.Assert)]
    return any(node.lineno <= own[-1] <= node.end_lineno for node in asserts)


def unwritten(error: BaseException, file: str) -> bool:
    """A bare `raise NotImplementedError` of the learner's own file, not one of torch's."""
    frame = error.__traceback__
    while frame and frame.tb_next:
        frame = frame.tb_next
    return isinstance(error, NotImplementedError) and not error.args and frame.tb_frame.f_code.co_filename == file


def told(error: BaseException, file: str) -> str:
    """Where in the learner's file, and what was said."""
    said = str(error).strip().split("\n")[0]
    said = ": ".join(part for part in ("" if isinstance(error, AssertionError) else type(error).__name__, said) if part)
    return "".join(f"\n  {part}" for part in (learners_line(error, file), said) if part)
