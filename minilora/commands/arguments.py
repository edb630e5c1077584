"""What the arguments of the command line are made of: numbers, names, lists of names. Each refuses with one line."""

import argparse
import math
import os

from minilora import data
from minilora.methods import METHODS
from minilora.scale.parallel import there_are_several


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        is_told_elsewhere = there_are_several() and os.environ["RANK"] != "0"
        self.exit(2, "" if is_told_elsewhere else f"minilora: {message}\n")


def whole(least: int, most: int = 10**9):
    def number(text: str) -> int:
        if not text.isdecimal() or len(text) > 100 or int(text) < least:
            raise argparse.ArgumentTypeError(f"must be a whole number of at least {least}, got {text!r:.50}")
        if int(text) > most:
            raise argparse.ArgumentTypeError(f"must be at most {most:,}, got {text}")
        return int(text)

    return number


def positive(text: str) -> float:
    value = not_negative(text)
    if value == 0:
        raise argparse.ArgumentTypeError(f"must be positive and finite, got {text!r}")
    return value


def rate(text: str) -> float:
    if positive(text) > 1e30:                                # as finetune has it for float32: there Adam's own factors end
        raise argparse.ArgumentTypeError(f"must be at most 1e+30, got {text}")
    return positive(text)


def not_negative(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a finite number that is not negative, got {text!r}")
    return value


def not_empty(text: str) -> str:
    """"$MODEL" where it is not set must not mean the shipped base."""
    if not text.strip():
        raise argparse.ArgumentTypeError("must not be empty")
    return text


def method_name(text: str) -> str:
    """The name in METHODS, however it is spelled: LoRA+, lora_plus and lora-plus are one."""
    def plain(name):
        return name.lower().replace("+", "plus").replace("-", "").replace("_", "").replace(" ", "")
    for name in METHODS:
        if plain(name) == plain(text):
            return name
    raise argparse.ArgumentTypeError(f"invalid choice: {text!r} (choose from {', '.join(METHODS)})")


def task_names(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in data.TASKS:
            raise argparse.ArgumentTypeError(f"invalid choice: {name!r} (choose from {', '.join(data.TASKS)})")
    return list(dict.fromkeys(names))


def layer_names(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",")]
    if not all(names):
        raise argparse.ArgumentTypeError(f"names of layers with commas between them, got {text!r}")
    return names
