"""Right answers in another style, each of which the tests must accept."""

import math
import random
import statistics
from fractions import Fraction

import numpy as np

from minilora.evidence.compare import Entry
from minilora.evidence.scoreboard import student_t, student_tail


def rank_at_budget__loop(trained: dict[int, int], budget: int) -> int | None:
    best = None
    for rank in sorted(trained):
        if best is None or abs(trained[rank] - budget) <= abs(trained[best] - budget):
            best = rank
    return best if Fraction(abs(trained[best] - budget), budget) <= Fraction(1, 10) else None


def rank_at_budget__ratio(trained: dict[int, int], budget: int) -> int | None:
    rank = max(sorted(trained, reverse=True), key=lambda rank: -abs(trained[rank] - budget))
    return rank if abs(trained[rank] / budget - 1) <= 0.1 else None


def pareto_front__loops(points: dict[str, tuple[float, ...]]) -> list[str]:
    front = []
    for name, mine in points.items():
        beaten = any(math.isnan(price) for price in mine)
        for theirs in points.values():
            lower, higher, lost = False, False, False
            for a, b in zip(theirs, mine):
                lower, higher, lost = lower or a < b, higher or a > b, lost or math.isnan(a)
            beaten = beaten or (lower and not higher and not lost)
        if not beaten:
            front.append(name)
    return front


def pareto_front__numpy(points: dict[str, tuple[float, ...]]) -> list[str]:
    names = [name for name, point in points.items() if not np.isnan(point).any()]
    if not names:
        return []
    table = np.array([points[name] for name in names])                       # (n, prices)
    below = (table[:, None] <= table[None]).all(-1) & (table[:, None] < table[None]).any(-1)
    return [name for name, beaten in zip(names, below.any(0)) if not beaten]


def forgotten_at_equal_learning__numpy(one: list[list[float]], other: list[list[float]]) -> tuple[float, float]:
    level, found = max(np.array(curve)[:, 0].min() for curve in (one, other)), []
    for curve in (one, other):
        scores, lost = np.array(curve).T
        i = int(np.argmax(scores <= level))
        found.append(float(np.interp(-level, -scores[i - 1:i + 1], lost[i - 1:i + 1])))
    return tuple(found)


def bootstrap_interval__random(values: list[float], share: float = 0.95, draws: int = 10_000, seed: int = 0) -> tuple[float, float]:
    dice = random.Random(seed)
    means = sorted(math.fsum(dice.choices(values, k=len(values))) / len(values) for _ in range(draws))
    tail = int((1 - share) / 2 * draws)
    return means[tail], means[draws - 1 - tail]


def bootstrap_interval__numpy(values: list[float], share: float = 0.95, draws: int = 10_000, seed: int = 0) -> tuple[float, float]:
    means = np.random.default_rng(seed).choice(values, size=(draws, len(values))).mean(axis=1)
    return tuple(np.percentile(means, [50 * (1 - share), 50 * (1 + share)]))


def enough_seeds__while(pilot: list[float], reach: float) -> int:
    s, n = np.std(pilot, ddof=1), 3
    while s * student_t(0.975, n - 1) / n**0.5 > reach:
        n += 1
        if n > 50:
            raise ValueError("more than 50")
    return n


def believe__numpy(p_values: list[float], rate: float = 0.05) -> list[bool]:
    p, m = np.array(p_values), len(p_values)
    below = np.flatnonzero(np.sort(p) <= rate * np.arange(1, m + 1) / m) if m else []
    answers = [False] * m
    for place in np.argsort(p, kind="stable")[:below[-1] + 1 if len(below) else 0]:
        answers[int(place)] = True
    return answers


def believe__adjusted(p_values: list[float], rate: float = 0.05) -> list[bool]:
    """q of a p-value: the smallest rate at which it is believed, m p_j / j minimized over all p_j from p upwards."""
    ordered = sorted(p_values)
    return [any(q >= p and q <= rate * j / len(ordered) for j, q in enumerate(ordered, 1)) for p in p_values]


def believe__q_values(p_values: list[float], rate: float = 0.05) -> list[bool]:
    """The same, from the largest down: m p / k, and never more than its larger neighbour's."""
    p, m = np.array(p_values), len(p_values)
    order = np.argsort(p)
    q = np.empty(m)
    q[order] = np.minimum.accumulate((p[order] * m / np.arange(1, m + 1))[::-1])[::-1]
    return [bool(each <= rate) for each in q]


def enough_seeds__squares(pilot: list[float], reach: float) -> int:
    for n in range(3, 51):
        if (student_t(0.975, n - 1) / reach) ** 2 * statistics.variance(pilot) <= n:
            return n
    raise ValueError("more than 50")


def verdict__by_hand(runs: list[dict], task: str, one: Entry, other: Entry, line: float, worth: float, others: list[float], rate: float = 0.05) -> str:
    table = {}
    for run in runs:
        if run["task"] == task:
            table.setdefault(Entry.of(run), {})[run["seed"]] = run["scores"]["bits_per_byte"]
    ours, theirs = table.get(one, {}), table.get(other, {})
    seeds = [seed for seed in ours if seed in theirs]
    if len(seeds) < 3 or any(ours[seed] is None or theirs[seed] is None for seed in seeds):
        return "open"
    d = np.array([theirs[seed] - ours[seed] for seed in seeds])
    error = d.std(ddof=1) / len(d)**0.5
    tests = [student_tail((d.mean() - line) / error, len(d) - 1), student_tail((worth - d.mean()) / error, len(d) - 1)]
    everything = sorted(tests + list(others))
    k = max([k for k, p in enumerate(everything, 1) if p * len(everything) <= rate * k], default=0)
    for p, word in zip(tests, ("shown", "contradicted")):
        if k and p <= everything[k - 1]:
            return word
    return "open"
