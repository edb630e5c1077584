"""What a bad argument is told: its name, what it must be, what it was."""

import sys


def whole(name: str, value: object, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name} must be a whole number of at least {least}, got {value!r}")


def number(name: str, value: object, must: str = "", holds=lambda value: True) -> None:
    """A finite number for which `holds` is true; `must` says in words what that asks for."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= sys.float_info.max or not holds(value):
        raise ValueError(f"{name} must be a finite number{must and ' ' + must}, got {value!r}")


def flag(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be True or False, got {value!r}")


def share(name: str, value: object) -> None:
    """A probability that leaves something over: at least 0 and below 1."""
    number(name, value, "of at least 0 and below 1", lambda value: 0 <= value < 1)
