"""How a sentence that one hears is put on trial.

    claim  ->  what it foretells: a number, and where it would have to lie        set down before the run
    run    ->  the number
    verdict    true: every number lies where the claim wants it        false: none does        half true: some do

So a verdict is counted, never written. myths.py holds the claims and their runs; `page` makes myths.md of what they find.
"""

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

WANTED = {"at most": operator.le, "at least": operator.ge, "below": operator.lt, "above": operator.gt, "exactly": operator.eq}


@dataclass(frozen=True)
class Line:
    """One number that a claim foretells.

    what: of what it is; wanted: where it would have to lie ("at most 4"), or "" for a number that is only quoted; form: how it is printed;
    slack: 0 where every machine finds the same; else how far it may be off elsewhere, and then it must be farther than that from `wanted`.
    """

    what: str
    wanted: str
    form: str = ",.0f"
    slack: float = 0.0

    @property
    def bound(self) -> float:
        return float(self.wanted.rpartition(" ")[2].replace(",", ""))

    def holds(self, number: float) -> bool:
        return WANTED[self.wanted.rpartition(" ")[0]](number, self.bound)

    def close(self, number: float) -> bool:
        """So near to where it is wanted that another machine might judge otherwise."""
        return bool(self.wanted) and self.slack > 0 and abs(number - self.bound) <= self.slack

    def printed(self, number: float) -> str:
        if self.form == "tiny":
            return "< 1e-9" if number < 1e-9 else f"{number:.2f}"
        text = format(round(number, int(self.form.strip(",.f%") or 0)) + 0.0, self.form) if self.form.endswith("f") else format(number, self.form)
        return text.replace("-", "−")


@dataclass(frozen=True)
class Myth:
    """claim: as one hears it; met: the kind of place; lines: what it foretells; right: the sentence to say instead, with {0}, {1} … for the
    numbers found; lesson: where it is derived; run: the trial, which gives one number for each line."""

    chapter: str
    claim: str
    met: str
    lines: tuple[Line, ...]
    right: str
    lesson: str
    run: Callable[..., float | Sequence[float]]

    @property
    def name(self) -> str:
        return self.run.__name__

    def measure(self, **planted) -> tuple[float, ...]:
        """The trial's numbers; `planted`: what is on trial turned into its opposite."""
        with torch.random.fork_rng([]):
            torch.manual_seed(0)                       # whatever ran before
            found = self.run(**planted)
        numbers = found if isinstance(found, (tuple, list)) else [found]
        return tuple(float(number.detach() if isinstance(number, Tensor) else number) for number in numbers)

    def verdict(self, numbers: Sequence[float]) -> str:
        held = [line.holds(number) for line, number in zip(self.lines, numbers, strict=True) if line.wanted]
        return "true" if all(held) else "half true" if any(held) else "false"


MYTHS: dict[str, Myth] = {}
_chapters: list[str] = []


def chapter(title: str) -> None:
    _chapters.append(title)


def myth(claim: str, met: str, *lines: Line, right: str, lesson: str = "") -> Callable:
    """Put the function below on the list as the trial of this claim."""

    def on_trial(run: Callable) -> Callable:
        MYTHS[run.__name__] = Myth(_chapters[-1], claim, met, lines, right, lesson, run)
        return run

    return on_trial


# The page

MARK = {"false": "false", "half true": "*half true*", "true": "**true**"}
Show = Callable[[Myth, int, str], str]      # (myth, which of its lines, the number as printed) -> what stands on the page


def page(found: dict[str, tuple[float, ...]], head: str, show: Show = lambda myth, i, text: text) -> str:
    """myths.md: a table of verdicts, then a folded card for each claim."""
    verdicts = {name: MYTHS[name].verdict(numbers) for name, numbers in found.items()}
    count = {kind: list(verdicts.values()).count(kind) for kind in ("false", "half true", "true")}
    text = [head.format(all=len(found), false=count["false"], half=count["half true"], true=count["true"]), "| | one hears | verdict |", "|---:|---|---|"]
    cards, place = [], ""
    for number, (name, numbers) in enumerate(found.items(), 1):
        case = MYTHS[name]
        if case.chapter != place:
            place = case.chapter
            text.append(f"| | **{place}** | |")
            cards.append(f"## {place}\n")
        text.append(f"| {number} | {case.claim} | {MARK[verdicts[name]]} |")
        cards.append(card(number, case, numbers, show))
    return "\n".join([*text, "", *cards]).rstrip() + "\n"


def card(number: int, case: Myth, numbers: Sequence[float], show: Show) -> str:
    printed = [show(case, i, line.printed(value)) for i, (line, value) in enumerate(zip(case.lines, numbers, strict=True))]
    rows = [f"| {line.what} | {line.wanted} | {'≈ ' * (line.slack > 0)}{cell} | {'yes' if line.holds(value) else 'no'} |"
            for line, cell, value in zip(case.lines, printed, numbers) if line.wanted]
    more = f" · more in [lesson {case.lesson[:2]}]({case.lesson}/README.md)" if case.lesson else ""
    return "\n".join([
        f"<details><summary><b>{number}</b> {case.claim}</summary>", "",
        "| if that were so | it would be | it is | holds |", "|---|---:|---:|---|", *rows, "",
        f"**{case.verdict(numbers).capitalize()}.** {case.right.format(*printed)}", "",
        f"Met in {case.met} · `{case.name}` in [myths.py](myths.py){more}", "",
        "</details>", ""])
