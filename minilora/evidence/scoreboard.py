"""What a comparison's runs say: means with their intervals, and one table a task.

    difference   paired: of one seed's run of one entry and the same seed's of another, so that what the batches do falls out
    interval     95 %, by bootstrap over the seeds (five cover 93 %); below five of them there is none
"""

import csv
import io
import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import cache
from pathlib import Path

import numpy as np

from minilora import storage
from minilora.evidence.compare import Entry

FEWEST = 5                                                      # seeds that an interval can be told from


def bootstrap(values: Sequence[float], resamples: int = 10_000, seed: int = 0) -> tuple[float, float, float]:
    """The mean and its 95 % interval: draw as many values again, with replacement, many times, and see how far the means spread.

    So few values spread too little: of five, the middle 95 % of such means miss the truth 15 times in a hundred. So the tails are cut
    where they would have to be for the mean of a normal sample, by Student's t: the expanded percentile bootstrap (Hesterberg 2015, The
    American Statistician 69). No such mean lies beyond the least or the greatest value, so of five it still misses 7 times in a hundred, 9
    where the tails are long. Below five even that cannot help, and the interval is infinite. A nan among the values makes all three so.
    """
    values = np.asarray(values, float)
    count = len(values)
    if count == 0 or not np.isfinite(values).all():
        return math.nan, -math.inf, math.inf
    if count < FEWEST:
        return float(values.mean()), -math.inf, math.inf
    means = np.random.default_rng(seed).choice(values, (resamples, count)).mean(axis=1)
    tail = statistics.NormalDist().cdf(-math.sqrt(count / (count - 1)) * student_t(0.975, count - 1))
    return float(values.mean()), *(float(q) for q in np.quantile(means, (tail, 1 - tail)))


@cache
def student_t(p: float, freedom: int) -> float:
    """The quantile of Student's t, p above 1/2. With t = √ν tan θ its density is cos^(ν−1) θ, which is summed up to p."""
    theta = np.linspace(0, math.pi / 2, 100_001)
    below = np.cumsum(np.cos(theta) ** (freedom - 1))
    return math.sqrt(freedom) * math.tan(theta[np.searchsorted(below / below[-1], 2 * p - 1)])


def of(runs: list[dict], task: str, entry: Entry) -> Iterator[dict]:
    """The runs of one entry."""
    return (run for run in runs if run["task"] == task and {key: run[key] for key in ("method", "base", "rank")} == asdict(entry))


def entries_of(runs: list[dict], task: str) -> list[Entry]:
    return list(dict.fromkeys(Entry(run["method"], run["base"], run["rank"]) for run in runs if run["task"] == task))


def score_of(runs: list[dict], task: str, entry: Entry, name: str = "bits_per_byte") -> dict[int, float]:
    """seed -> score. A run that diverged has nan."""
    scores = {run["seed"]: run["scores"].get(name) for run in of(runs, task, entry)}
    return {seed: math.nan if score is None else score for seed, score in scores.items()}


def costs_of(runs: list[dict], task: str, entry: Entry) -> dict:
    """The mean over the seeds that did not diverge (LoRA-drop's layers share in some more than in others); else what is known without
    training."""
    costs = [run["costs"] for run in of(runs, task, entry)]
    costs = [cost for cost in costs if "trainable_parameters" in cost] or costs
    return {name: statistics.fmean(cost[name] for cost in costs) for name in costs[0]}


def paired(one: dict[int, float], other: dict[int, float]) -> list[float]:
    """one - other, for each seed that both have."""
    return [one[seed] - other[seed] for seed in sorted(one.keys() & other.keys())]


def table(runs: list[dict], task: str, budget: list[Entry] | None = None) -> str:
    """The scoreboard of one task, best first: at equal steps, or (budget: those entries) at about equal trainable parameters."""
    lineup = [entry for entry in entries_of(runs, task) if (entry.rank is None if budget is None else entry in budget)]
    full = {seed: score for seed, score in score_of(runs, task, Entry("full")).items() if math.isfinite(score)}

    def score(name: str, form: str, times: float = 1.0):
        return lambda entry: interval(*bootstrap([times * value for value in score_of(runs, task, entry, name).values()]), form)

    def behind(entry: Entry) -> str:
        differences = paired(score_of(runs, task, entry), full)
        return interval(*bootstrap(differences), "+.3f") if differences and entry.method != "full" else "–"

    def cost(name: str, form: str, unit: int = 1):
        return lambda entry: format(costs_of(runs, task, entry)[name] / unit, form) if name in costs_of(runs, task, entry) else "–"

    cells = {"method": str, "rate": lambda entry: f"{next(of(runs, task, entry))['lr']:.2g}", "bits per byte": score("bits_per_byte", ".3f"), "behind full": behind}
    if any("exact_match" in run["scores"] for run in runs if run["task"] == task):
        cells["answered %"] = score("exact_match", ".0f", 100)
    cells |= {"forgotten": score("forgotten", "+.2f"), "trained": cost("trainable_parameters", ",.0f"), "weights": cost("weight_bytes", ",.0f", 1024),
                 "gradients": cost("gradient_bytes", ",.0f", 1024), "AdamW": cost("optimizer_bytes", ",.0f", 1024), "alive": cost("alive_bytes", ",.0f", 1024),
                 "file": cost("disk_bytes", ",.0f", 1024), "time": cost("step_ratio", ".2f")}
    means = {entry: bootstrap(list(score_of(runs, task, entry).values()))[0] for entry in lineup}
    lineup.sort(key=lambda entry: math.inf if math.isnan(means[entry]) else means[entry])
    return columns([[*cells], *([cell(entry) for cell in cells.values()] for entry in lineup)])


def columns(rows: list[list[str]]) -> str:
    """Rows of cells as text, every column as wide as its widest cell; the first is set to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join("  ".join([row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:]))]).rstrip() for row in rows)


def interval(mean: float, low: float, high: float, form: str = ".3f") -> str:
    if math.isnan(mean):
        return "diverged"
    return f"{mean:{form}}" if math.isinf(low) else f"{mean:{form}} [{low:{form}}, {high:{form}}]"


def write_csv(runs: list[dict], path: Path) -> None:
    """One row a run."""
    flat = [{key: value for key, value in run.items() if key not in ("scores", "costs")} | {k: v for k, v in run["scores"].items() if k != "training"} | run["costs"]
            for run in runs]
    names = list(dict.fromkeys(key for row in flat for key in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat)
    storage.write_atomically(path, text.getvalue().encode())
