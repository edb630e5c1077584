"""Lesson 12, worked. The same names and signatures as in exercises.py."""

import math
import statistics

import torch

from minilora.evidence.compare import Entry
from minilora.evidence.scoreboard import above, discoveries, student_t


def rank_at_budget(trained: dict[int, int], budget: int) -> int | None:
    """Nearest, not nearest from below: a method that trains a little more is no cheat if everybody may."""
    rank = min(trained, key=lambda rank: (abs(trained[rank] - budget), -rank))
    return rank if 10 * abs(trained[rank] - budget) <= budget else None


def pareto_front(points: dict[str, tuple[float, ...]]) -> list[str]:
    """Comparisons with nan are all false: a run that diverged would be beaten by nobody, so it goes first."""
    finished = {name: point for name, point in points.items() if not any(map(math.isnan, point))}

    def beaten(point: tuple[float, ...]) -> bool:
        return any(other != point and all(a <= b for a, b in zip(other, point)) for other in finished.values())

    return [name for name, point in finished.items() if not beaten(point)]


def forgotten_at_equal_learning(one: list[list[float]], other: list[list[float]]) -> tuple[float, float]:
    """The level is where the worse learner ends its learning; the better one passed it earlier."""
    level = max(min(score for score, _ in curve) for curve in (one, other))

    def at_level(curve: list[list[float]]) -> float:
        for (before, kept), (after, lost) in zip(curve, curve[1:]):
            if after <= level:
                return kept + (lost - kept) * (before - level) / (before - after)

    return at_level(one), at_level(other)


def bootstrap_interval(values: list[float], share: float = 0.95, draws: int = 10_000, seed: int = 0) -> tuple[float, float]:
    """All draws at once, a row each."""
    dice = torch.Generator().manual_seed(seed)
    drawn = torch.randint(len(values), (draws, len(values)), generator=dice)             # which of the values: (draws, n)
    means = torch.tensor(values, dtype=torch.float64)[drawn].mean(1)                     # (draws)
    return means.quantile((1 - share) / 2).item(), means.quantile((1 + share) / 2).item()


def enough_seeds(pilot: list[float], reach: float) -> int:
    """t falls with n too, so n is not just (t s / reach)² of the pilot's own t."""
    deviation = statistics.stdev(pilot)
    for n in range(3, 51):
        if student_t(0.975, n - 1) * deviation / math.sqrt(n) <= reach:
            return n
    raise ValueError(f"differences with a standard deviation of {deviation:.3g} need more than 50 seeds to be known to {reach:g}")


def believe(p_values: list[float], rate: float = 0.05) -> list[bool]:
    """Those above the line are believed too, if a later one is below it again: the largest k counts, not the first that fails."""
    m = len(p_values)
    largest = max((k for k, p in enumerate(sorted(p_values), 1) if p <= rate * k / m), default=0)
    return [p <= rate * largest / m for p in p_values]


def verdict(runs: list[dict], task: str, one: Entry, other: Entry, line: float, worth: float, others: list[float], rate: float = 0.05) -> str:
    """Pair, subtract, test twice, and look at the whole table before saying anything."""
    scores = {(Entry.of(run), run["seed"]): run["scores"]["bits_per_byte"] for run in runs if run["task"] == task}
    pairs = [(theirs, scores[one, seed]) for (entry, seed), theirs in scores.items() if entry == other and (one, seed) in scores]
    if any(None in pair for pair in pairs):
        return "open"
    d = [theirs - ours for theirs, ours in pairs]
    tests = [above(d, line), above([-gain for gain in d], -worth)]
    shown, contradicted, *_ = discoveries(tests + others, rate)
    return "shown" if shown else "contradicted" if contradicted else "open"
