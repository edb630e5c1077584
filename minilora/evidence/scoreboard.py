"""What a comparison's runs say: means with their intervals, and one table a task.

    difference   paired: of one seed's run of one entry and the same seed's of another, so that what the batches do falls out
    interval     95 %, by Student's t over the seeds; of fewer than three there is none
"""

import csv
import io
import math
import statistics
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path

import numpy as np

from minilora import storage
from minilora.evidence.compare import Entry

FEWEST = 3                                                      # seeds that an interval can be told from


def confidence(values: Sequence[float]) -> tuple[float, float, float]:
    """The mean and its 95 % interval, mean ± t s/√n with n - 1 degrees of freedom: exact for normal values, whatever their number; a test counts
    how often it misses for others. Below FEWEST values the interval is infinite. A nan among them (a run that diverged) makes all three so."""
    mean, error = _mean_and_error(values)
    if math.isnan(error):
        return mean, -math.inf, math.inf
    reach = student_t(0.975, len(values) - 1) * error
    return mean, mean - reach, mean + reach


def above(values: Sequence[float], line: float) -> float:
    """How likely a mean so far above the line is where the true mean lies on it: the p-value of the one-sided t-test. 1 where there is no telling."""
    mean, error = _mean_and_error(values)
    if math.isnan(error):
        return 1.0
    if error == 0:
        return float(mean <= line)
    return student_tail((mean - line) / error, len(values) - 1)


def _mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """The mean, and its standard error s/√n."""
    values = np.asarray(values, float)
    if len(values) == 0 or not np.isfinite(values).all():
        return math.nan, math.nan
    return float(values.mean()), float(values.std(ddof=1)) / math.sqrt(len(values)) if len(values) >= FEWEST else math.nan


def seeds_needed(deviation: float, reach: float) -> int:
    """The fewest seeds whose 95 % interval reaches no further than so, when paired differences have this standard deviation."""
    return next(n for n in range(FEWEST, 10_000) if student_t(0.975, n - 1) * deviation / math.sqrt(n) <= reach)


def discoveries(p_values: Sequence[float], rate: float = 0.05) -> list[bool]:
    """Which of many tests to believe, so that of those believed a share of `rate` at most is expected to be false (Benjamini & Hochberg 1995):
    the k smallest, for the largest k whose k-th smallest is at most rate · k / (number of tests)."""
    ordered = sorted(p_values)
    line = max((p for k, p in enumerate(ordered, 1) if p <= rate * k / len(ordered)), default=-1.0)
    return [p <= line for p in p_values]


# Student's t with ν degrees of freedom. With t = √ν tan θ its density is cos^(ν−1) θ, which is summed from 0 to π/2.

@cache
def _student(freedom: int) -> tuple[np.ndarray, np.ndarray]:
    """θ, and the share of |t| below √ν tan θ."""
    theta = np.linspace(0, math.pi / 2, 100_001)
    height = np.cos(theta) ** (freedom - 1)
    below = np.concatenate([[0], np.cumsum(height[1:] + height[:-1])])
    return theta, below / below[-1]


def student_t(p: float, freedom: int) -> float:
    """The quantile, p above 1/2."""
    theta, below = _student(freedom)
    return math.sqrt(freedom) * math.tan(np.interp(2 * p - 1, below, theta))


def student_tail(t: float, freedom: int) -> float:
    """The probability of more than t."""
    theta, below = _student(freedom)
    beyond = (1 - np.interp(math.atan(abs(t) / math.sqrt(freedom)), theta, below)) / 2
    return float(beyond if t > 0 else 1 - beyond)


def of(runs: list[dict], task: str, entry: Entry) -> Iterator[dict]:
    """The runs of one entry."""
    return (run for run in runs if run["task"] == task and run["method"] == entry.method and run["rank"] == entry.rank and Entry.of(run) == entry)


def entries_of(runs: list[dict], task: str) -> list[Entry]:
    return list(dict.fromkeys(Entry.of(run) for run in runs if run["task"] == task))


def score_of(runs: list[dict], task: str, entry: Entry, name: str = "bits_per_byte") -> dict[int, float]:
    """seed -> score. A run that diverged has nan."""
    scores = {run["seed"]: run["scores"].get(name) for run in of(runs, task, entry)}
    return {seed: math.nan if score is None else score for seed, score in scores.items()}


def costs_of(runs: list[dict], task: str, entry: Entry) -> dict:
    """The mean over the seeds that did not diverge (LoRA-drop's layers share in some more than in others); else what is known without
    training."""
    costs = [run["costs"] for run in of(runs, task, entry)]
    costs = [cost for cost in costs if "trainable_parameters" in cost] or costs
    return {name: statistics.fmean(cost[name] for cost in costs) for name in costs[0] if all(name in cost for cost in costs)}


def paired(one: dict[int, float], other: dict[int, float]) -> list[float]:
    """one - other, for each seed that both have."""
    return [one[seed] - other[seed] for seed in sorted(one.keys() & other.keys())]


def table(runs: list[dict], task: str, budget: list[Entry] | None = None) -> str:
    """The scoreboard of one task, best first: at equal steps, or (budget: those entries) at about equal trainable parameters."""
    lineup = [entry for entry in entries_of(runs, task) if (entry == Entry(entry.method, entry.base) if budget is None else entry in budget)]
    full = {seed: score for seed, score in score_of(runs, task, Entry("full")).items() if math.isfinite(score)}

    def score(name: str, form: str, times: float = 1.0):
        return lambda entry: interval(*confidence([times * value for value in score_of(runs, task, entry, name).values()]), form)

    def behind(entry: Entry) -> str:
        differences = paired(score_of(runs, task, entry), full)
        return interval(*confidence(differences), "+.3f") if differences and entry.method != "full" else "–"

    def cost(name: str, form: str, unit: int = 1):
        return lambda entry: format(costs_of(runs, task, entry)[name] / unit, form) if name in costs_of(runs, task, entry) else "–"

    cells = {"method": str, "rate": lambda entry: f"{next(of(runs, task, entry))['lr']:.2g}", "bits per byte": score("bits_per_byte", ".3f"), "behind full": behind}
    if any("exact_match" in run["scores"] for run in runs if run["task"] == task):
        cells["answered %"] = score("exact_match", ".0f", 100)
    cells |= {"forgotten": score("forgotten", "+.2f"), "trained": cost("trainable_parameters", ",.0f"), "weights": cost("weight_bytes", ",.0f", 1024),
                 "gradients": cost("gradient_bytes", ",.0f", 1024), "AdamW": cost("optimizer_bytes", ",.0f", 1024), "alive": cost("alive_bytes", ",.0f", 1024),
                 "file": cost("disk_bytes", ",.0f", 1024), "time": cost("step_ratio", ".2f")}
    means = {entry: confidence(list(score_of(runs, task, entry).values()))[0] for entry in lineup}
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
    flat = [{key: value for key, value in run.items() if key not in ("scores", "costs")} | {k: v for k, v in run["scores"].items() if k != "curve"} | run["costs"]
            for run in runs]
    names = list(dict.fromkeys(key for row in flat for key in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat)
    storage.write_atomically(path, text.getvalue().encode())
