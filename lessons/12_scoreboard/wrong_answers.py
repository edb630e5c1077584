"""Plausible mistakes in lesson 12, each of which the tests must reject with the message named here."""

import math
import random
import statistics

import numpy as np
import torch

from lessons import provokes
from minilora.evidence.compare import Entry
from minilora.evidence.scoreboard import above, discoveries, student_t


@provokes("the highest rank below the budget")
def rank_at_budget__from_below(trained: dict[int, int], budget: int) -> int | None:
    rank = max((rank for rank in trained if trained[rank] <= budget), default=None)
    return rank if rank and 10 * (budget - trained[rank]) <= budget else None


@provokes("two ranks are equally near")
def rank_at_budget__lower_of_two(trained: dict[int, int], budget: int) -> int | None:
    rank = min(sorted(trained), key=lambda rank: abs(trained[rank] - budget))
    return rank if 10 * abs(trained[rank] - budget) <= budget else None


@provokes("the method stays out")
def rank_at_budget__always(trained: dict[int, int], budget: int) -> int | None:
    return min(trained, key=lambda rank: (abs(trained[rank] - budget), -rank))


@provokes("a tenth of the budget away is still in")
def rank_at_budget__strict(trained: dict[int, int], budget: int) -> int | None:
    rank = min(trained, key=lambda rank: (abs(trained[rank] - budget), -rank))
    return rank if 10 * abs(trained[rank] - budget) < budget else None


@provokes("this is the number of parameters")
def rank_at_budget__count(trained: dict[int, int], budget: int) -> int | None:
    count = min(trained.values(), key=lambda count: abs(count - budget))
    return count if 10 * abs(count - budget) <= budget else None


@provokes("equal points do not beat each other")
def pareto_front__twins_kill_each_other(points: dict[str, tuple[float, ...]]) -> list[str]:
    alive = {name: point for name, point in points.items() if not any(map(math.isnan, point))}
    return [name for name, point in alive.items() if not any(other != name and all(a <= b for a, b in zip(theirs, point)) for other, theirs in alive.items())]


@provokes("nowhere higher and somewhere lower is enough")
def pareto_front__lower_everywhere(points: dict[str, tuple[float, ...]]) -> list[str]:
    alive = {name: point for name, point in points.items() if not any(map(math.isnan, point))}
    return [name for name, point in alive.items() if not any(all(a < b for a, b in zip(theirs, point)) for theirs in alive.values())]


@provokes("is neither on the front nor beats anybody")
def pareto_front__diverged_wins(points: dict[str, tuple[float, ...]]) -> list[str]:
    return [name for name, point in points.items() if not any(other != point and all(a <= b for a, b in zip(other, point)) for other in points.values())]


@provokes("prices a point")
def pareto_front__two_prices(points: dict[str, tuple[float, ...]]) -> list[str]:
    alive = {name: point for name, point in points.items() if not any(map(math.isnan, point))}
    return [name for name, (x, *y) in alive.items() if not any((a, b[:1]) != (x, y[:1]) and a <= x and b[:1] <= y[:1] for a, *b in alive.values())]


@provokes("not in the order")
def pareto_front__sorted(points: dict[str, tuple[float, ...]]) -> list[str]:
    alive = {name: point for name, point in points.items() if not any(map(math.isnan, point))}
    return sorted(name for name, point in alive.items() if not any(other != point and all(a <= b for a, b in zip(other, point)) for other in alive.values()))


@provokes("higher is better; every coordinate is a price")
def pareto_front__higher_is_better(points: dict[str, tuple[float, ...]]) -> list[str]:
    alive = {name: point for name, point in points.items() if not any(map(math.isnan, point))}
    return [name for name, point in alive.items() if not any(other != point and all(a >= b for a, b in zip(other, point)) for other in alive.values())]


def _at(curve, level):
    for (before, kept), (after, lost) in zip(curve, curve[1:]):
        if after <= level:
            return kept + (lost - kept) * (before - level) / (before - after)
    return curve[-1][1]


@provokes("at the end: it compares one that learned more")
def forgotten_at_equal_learning__at_the_end(one: list[list[float]], other: list[list[float]]) -> tuple[float, float]:
    return one[-1][1], other[-1][1]


@provokes("this is the moment after the level was passed")
def forgotten_at_equal_learning__no_line(one: list[list[float]], other: list[list[float]]) -> tuple[float, float]:
    level = max(min(score for score, _ in curve) for curve in (one, other))
    return tuple(next(lost for score, lost in curve if score <= level) for curve in (one, other))


@provokes("the lowest of the curve may have been earlier")
def forgotten_at_equal_learning__last_score(one: list[list[float]], other: list[list[float]]) -> tuple[float, float]:
    level = max(one[-1][0], other[-1][0])
    return _at(one, level), _at(other, level)


@provokes("a level that one run never came to")
def forgotten_at_equal_learning__lowest_of_all(one: list[list[float]], other: list[list[float]]) -> tuple[float, float]:
    level = min(score for score, _ in one + other)
    return tuple(_at(curve, level) if min(curve)[0] <= level else math.nan for curve in (one, other))


@provokes("wrong order")
def forgotten_at_equal_learning__other_first(one: list[list[float]], other: list[list[float]]) -> tuple[float, float]:
    level = max(min(score for score, _ in curve) for curve in (one, other))
    return _at(other, level), _at(one, level)


@provokes("this is the last time")
def forgotten_at_equal_learning__last_time(one: list[list[float]], other: list[list[float]]) -> tuple[float, float]:
    level, found = max(min(score for score, _ in curve) for curve in (one, other)), []
    for curve in (one, other):
        for (before, kept), (after, lost) in zip(curve, curve[1:]):
            if after <= level < before:
                crossing = kept + (lost - kept) * (before - level) / (before - after)
        found.append(crossing)
    return tuple(found)


def _drawn(values, share, draws, seed, size=None, statistic=statistics.fmean, replace=True):
    dice, size = random.Random(seed), size or len(values)
    found = sorted(statistic(dice.choices(values, k=size) if replace else dice.sample(values, size)) for _ in range(draws))
    return found[int((1 - share) / 2 * (draws - 1))], found[int((1 + share) / 2 * (draws - 1))]


@provokes("draw with replacement")
def bootstrap_interval__shuffled(values: list[float], share: float = 0.95, draws: int = 10_000, seed: int = 0) -> tuple[float, float]:
    return _drawn(values, share, draws, seed, replace=False)


@provokes("these are quantiles of the values")
def bootstrap_interval__of_values(values: list[float], share: float = 0.95, draws: int = 10_000, seed: int = 0) -> tuple[float, float]:
    x = torch.tensor(values, dtype=torch.float64)
    return x.quantile((1 - share) / 2).item(), x.quantile((1 + share) / 2).item()


@provokes("each tail has 1 - share")
def bootstrap_interval__both_tails(values: list[float], share: float = 0.95, draws: int = 10_000, seed: int = 0) -> tuple[float, float]:
    return _drawn(values, 2 * share - 1, draws, seed)


@provokes("these are means of n - 1 values")
def bootstrap_interval__one_fewer(values: list[float], share: float = 0.95, draws: int = 10_000, seed: int = 0) -> tuple[float, float]:
    return _drawn(values, share, draws, seed, size=len(values) - 1)


@provokes("these are medians")
def bootstrap_interval__medians(values: list[float], share: float = 0.95, draws: int = 10_000, seed: int = 0) -> tuple[float, float]:
    return _drawn(values, share, draws, seed, statistic=statistics.median)


@provokes("this is mean ± z s/√n")
def bootstrap_interval__formula(values: list[float], share: float = 0.95, draws: int = 10_000, seed: int = 0) -> tuple[float, float]:
    reach = statistics.NormalDist().inv_cdf((1 + share) / 2) * statistics.pstdev(values) / math.sqrt(len(values))
    return statistics.fmean(values) - reach, statistics.fmean(values) + reach


@provokes("mirrored at the mean")
def bootstrap_interval__pivot(values: list[float], share: float = 0.95, draws: int = 10_000, seed: int = 0) -> tuple[float, float]:
    low, high = _drawn(values, share, draws, seed)
    return 2 * statistics.fmean(values) - high, 2 * statistics.fmean(values) - low


@provokes("the same seed must give the same interval")
def bootstrap_interval__no_seed(values: list[float], share: float = 0.95, draws: int = 10_000, seed: int = 0) -> tuple[float, float]:
    return _drawn(values, share, draws, None)


@provokes("the random state of torch has moved")
def bootstrap_interval__global_state(values: list[float], share: float = 0.95, draws: int = 10_000, seed: int = 0) -> tuple[float, float]:
    torch.manual_seed(seed)
    means = torch.tensor(values, dtype=torch.float64)[torch.randint(len(values), (draws, len(values)))].mean(1)
    return means.quantile((1 - share) / 2).item(), means.quantile((1 + share) / 2).item()


@provokes("the random state of random has moved")
def bootstrap_interval__global_random(values: list[float], share: float = 0.95, draws: int = 10_000, seed: int = 0) -> tuple[float, float]:
    random.seed(seed)
    return _drawn(values, share, draws, random.random())


@provokes("the random state of numpy has moved")
def bootstrap_interval__global_numpy(values: list[float], share: float = 0.95, draws: int = 10_000, seed: int = 0) -> tuple[float, float]:
    np.random.seed(seed)
    return tuple(np.quantile(np.random.choice(values, (draws, len(values))).mean(1), [(1 - share) / 2, (1 + share) / 2]))


@provokes("use float64")
def bootstrap_interval__float32(values: list[float], share: float = 0.95, draws: int = 10_000, seed: int = 0) -> tuple[float, float]:
    dice = torch.Generator().manual_seed(seed)
    means = torch.tensor(values)[torch.randint(len(values), (draws, len(values)), generator=dice)].mean(1)
    return means.quantile((1 - share) / 2).item(), means.quantile((1 + share) / 2).item()


@provokes("`draws` says how many")
def bootstrap_interval__fixed_draws(values: list[float], share: float = 0.95, draws: int = 10_000, seed: int = 0) -> tuple[float, float]:
    return _drawn(values, share, 10_000, seed)


def _first(reach, far, least=3, most=50):
    for n in range(least, most + 1):
        if far(n) <= reach:
            return n
    raise ValueError("too few")


@provokes("this takes 1.96 for t")
def enough_seeds__normal(pilot: list[float], reach: float) -> int:
    return _first(reach, lambda n: 1.96 * statistics.stdev(pilot) / math.sqrt(n))


@provokes("t is the pilot's")
def enough_seeds__t_of_the_pilot(pilot: list[float], reach: float) -> int:
    return _first(reach, lambda n: student_t(0.975, len(pilot) - 1) * statistics.stdev(pilot) / math.sqrt(n))


@provokes("t has n − 1 degrees of freedom")
def enough_seeds__freedom(pilot: list[float], reach: float) -> int:
    return _first(reach, lambda n: student_t(0.975, n) * statistics.stdev(pilot) / math.sqrt(n))


@provokes("t is the 0.95 quantile")
def enough_seeds__one_side(pilot: list[float], reach: float) -> int:
    return _first(reach, lambda n: student_t(0.95, n - 1) * statistics.stdev(pilot) / math.sqrt(n))


@provokes("by one less is wanted")
def enough_seeds__population(pilot: list[float], reach: float) -> int:
    return _first(reach, lambda n: student_t(0.975, n - 1) * statistics.pstdev(pilot) / math.sqrt(n))


@provokes("two mistakes: t is the 0.95 quantile, and s")
def enough_seeds__one_side_of_the_population(pilot: list[float], reach: float) -> int:
    return _first(reach, lambda n: student_t(0.95, n - 1) * statistics.pstdev(pilot) / math.sqrt(n))


@provokes("too few seeds, ")
def enough_seeds__one_side_normal(pilot: list[float], reach: float) -> int:
    return _first(reach, lambda n: 1.645 * statistics.stdev(pilot) / math.sqrt(n))


@provokes("3 seeds are the fewest")
def enough_seeds__two(pilot: list[float], reach: float) -> int:
    return _first(reach, lambda n: student_t(0.975, n - 1) * statistics.stdev(pilot) / math.sqrt(n), least=2)


@provokes("50 seeds are too few here")
def enough_seeds__any_number(pilot: list[float], reach: float) -> int:
    return _first(reach, lambda n: student_t(0.975, min(n, 60) - 1) * statistics.stdev(pilot) / math.sqrt(n), most=100_000)


@provokes("sixteen seeds reach exactly as far")
def enough_seeds__strict(pilot: list[float], reach: float) -> int:
    for n in range(3, 51):
        if student_t(0.975, n - 1) * statistics.stdev(pilot) / math.sqrt(n) < reach:
            return n
    raise ValueError("too few")


@provokes("each is tested alone")
def believe__alone(p_values: list[float], rate: float = 0.05) -> list[bool]:
    return [p <= rate for p in p_values]


@provokes("that is Bonferroni")
def believe__bonferroni(p_values: list[float], rate: float = 0.05) -> list[bool]:
    return [p <= rate / len(p_values) for p in p_values]


@provokes("this stops at the first")
def believe__stops(p_values: list[float], rate: float = 0.05) -> list[bool]:
    line = -1.0
    for k, p in enumerate(sorted(p_values), 1):
        if p > rate * k / len(p_values):
            break
        line = p
    return [p <= line for p in p_values]


@provokes("in the order of the sorted p-values")
def believe__sorted(p_values: list[float], rate: float = 0.05) -> list[bool]:
    ordered = sorted(p_values)
    line = max((p for k, p in enumerate(ordered, 1) if p <= rate * k / len(ordered)), default=-1.0)
    return [p <= line for p in ordered]


@provokes("only those below their own line")
def believe__own_line(p_values: list[float], rate: float = 0.05) -> list[bool]:
    ordered = sorted(p_values)
    return [p <= rate * (ordered.index(p) + 1) / len(ordered) for p in p_values]


@provokes("the rate is always 0.05")
def believe__fixed_rate(p_values: list[float], rate: float = 0.05) -> list[bool]:
    return discoveries(p_values, 0.05)


def _d(runs, task, one, other):
    scores = [{run["seed"]: run["scores"]["bits_per_byte"] for run in runs if run["task"] == task and Entry.of(run) == entry} for entry in (one, other)]
    return [math.nan if None in (scores[0][seed], scores[1][seed]) else scores[1][seed] - scores[0][seed] for seed in sorted(scores[0].keys() & scores[1].keys())]


def _says(d, line, worth, others, rate):
    shown, contradicted, *_ = discoveries([above(d, line), above([-x for x in d], -worth), *others], rate)
    return "shown" if shown else "contradicted" if contradicted else "open"


@provokes("is the difference the right way round")
def verdict__sign(runs: list[dict], task: str, one: Entry, other: Entry, line: float, worth: float, others: list[float], rate: float = 0.05) -> str:
    return _says([-x for x in _d(runs, task, one, other)], line, worth, others, rate)


@provokes("paired by seed")
def verdict__not_paired(runs: list[dict], task: str, one: Entry, other: Entry, line: float, worth: float, others: list[float], rate: float = 0.05) -> str:
    ours, theirs = ([run["scores"]["bits_per_byte"] for run in runs if run["task"] == task and Entry.of(run) == entry] for entry in (one, other))
    return _says([math.nan if None in pair else pair[1] - pair[0] for pair in zip(ours, theirs)], line, worth, others, rate)


@provokes("not shown is not contradicted")
def verdict__no_third_word(runs: list[dict], task: str, one: Entry, other: Entry, line: float, worth: float, others: list[float], rate: float = 0.05) -> str:
    return "shown" if discoveries([above(_d(runs, task, one, other), line), *others], rate)[0] else "contradicted"


@provokes("test it")
def verdict__the_mean(runs: list[dict], task: str, one: Entry, other: Entry, line: float, worth: float, others: list[float], rate: float = 0.05) -> str:
    mean = statistics.fmean(_d(runs, task, one, other) or [math.nan])
    return "shown" if mean > line else "contradicted" if mean < worth else "open"


@provokes("surely below worth")
def verdict__worth_forgotten(runs: list[dict], task: str, one: Entry, other: Entry, line: float, worth: float, others: list[float], rate: float = 0.05) -> str:
    return _says(_d(runs, task, one, other), line, line, others, rate)


@provokes("then it is shown")
def verdict__contradicted_first(runs: list[dict], task: str, one: Entry, other: Entry, line: float, worth: float, others: list[float], rate: float = 0.05) -> str:
    d = _d(runs, task, one, other)
    shown, contradicted, *_ = discoveries([above(d, line), above([-x for x in d], -worth), *others], rate)
    return "contradicted" if contradicted else "shown" if shown else "open"


@provokes("others belong to the table")
def verdict__alone(runs: list[dict], task: str, one: Entry, other: Entry, line: float, worth: float, others: list[float], rate: float = 0.05) -> str:
    return _says(_d(runs, task, one, other), line, worth, [], rate)


@provokes("is `rate` used")
def verdict__own_rate(runs: list[dict], task: str, one: Entry, other: Entry, line: float, worth: float, others: list[float], rate: float = 0.05) -> str:
    return _says(_d(runs, task, one, other), line, worth, others, 0.05)


@provokes("and not Bonferroni")
def verdict__bonferroni(runs: list[dict], task: str, one: Entry, other: Entry, line: float, worth: float, others: list[float], rate: float = 0.05) -> str:
    d, strict = _d(runs, task, one, other), rate / (2 + len(others))
    return "shown" if above(d, line) <= strict else "contradicted" if above([-x for x in d], -worth) <= strict else "open"


@provokes("leaving it out would favour")
def verdict__diverged_left_out(runs: list[dict], task: str, one: Entry, other: Entry, line: float, worth: float, others: list[float], rate: float = 0.05) -> str:
    return _says([x for x in _d(runs, task, one, other) if not math.isnan(x)], line, worth, others, rate)


@provokes("it is no pair, and says nothing of the pairs")
def verdict__any_that_diverged(runs: list[dict], task: str, one: Entry, other: Entry, line: float, worth: float, others: list[float], rate: float = 0.05) -> str:
    if any(run["scores"]["bits_per_byte"] is None for run in runs if run["task"] == task and Entry.of(run) in (one, other)):
        return "open"
    return _says(_d(runs, task, one, other), line, worth, others, rate)


@provokes("whose record is it")
def verdict__by_method_alone(runs: list[dict], task: str, one: Entry, other: Entry, line: float, worth: float, others: list[float], rate: float = 0.05) -> str:
    ours, theirs = ({run["seed"]: run["scores"]["bits_per_byte"] or math.nan for run in runs if run["task"] == task and run["method"] == entry.method}
                    for entry in (one, other))
    return _says([theirs[seed] - ours[seed] for seed in ours.keys() & theirs.keys()], line, worth, others, rate)


@provokes("runs of another task")
def verdict__every_task(runs: list[dict], task: str, one: Entry, other: Entry, line: float, worth: float, others: list[float], rate: float = 0.05) -> str:
    return _says([x for each in dict.fromkeys(run["task"] for run in runs) for x in _d(runs, each, one, other)], line, worth, others, rate)
