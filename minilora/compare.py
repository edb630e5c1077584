"""The fair fight: full fine-tuning and every method, on dense and on 4-bit bases, for one task after another.

    run       reads 1,600 windows of 64 bytes, whatever the method. Where a task asks questions, in twice as many steps of half the size
    score     bits per byte of the held-out part; where it asks, of the answers alone: no model can guess what will be asked
    rate      each method its own, from eight runs on `task.choosing()`, whose held-out part has nothing of the task's: three rates half
              a decade apart; two more, each where the best so far has most room beside it; and the best three of the five again with
              another seed, for a rate that is lucky once is not a good one
    report    on the task's held-out part, at that rate. A seed means the same batches for every method, so differences are paired
    interval  bootstrap over the seeds' differences, widened for so few of them: 95 %

Every finished run is in the results file at once, and none is ever made twice: a comparison that was stopped goes on where it was.
"""

import csv
import hashlib
import io
import json
import math
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from math import prod
from pathlib import Path

import numpy as np
import torch

from minilora import data, storage
from minilora.adapter import adapt, find_targets
from minilora.gpt import TinyGPT, load_base
from minilora.measure import COSTS, bytes_alive, disk_bytes, ledger
from minilora.methods import METHODS, RATES, make_method
from minilora.quant.linear import quantize
from minilora.training import answer_loss, exact_match, finetune, held_out_loss, next_byte_loss

OWN_BASE = ("qlora", "loftq", "qpissa")                # these put the base in four bits themselves
PUBLISHED = Path(__file__).with_name("published.json")
CONTEXT = 64
SEARCH_SEEDS = (1000, 1001)                             # which no report uses
HALF_A_DECADE = math.sqrt(10)
TASKS = {"voice": data.voice, "facts": lambda: data.facts(16), "sums": lambda: data.sums(20)}      # so much as runs of this length can learn


@dataclass(frozen=True)
class Entry:
    """One line of the table: a method, its base ("fp32" or "nf4") and its rank (None: the method's usual one)."""

    method: str
    base: str = "fp32"
    rank: int | None = None

    def __str__(self) -> str:
        return self.method + (f" r={self.rank}" if self.rank else "") + (" on nf4" if self.base == "nf4" and self.method not in OWN_BASE else "")

    def model(self, base: Path | None = None) -> TinyGPT:
        model = load_base(base)
        return quantize(model) if self.base == "nf4" and self.method not in OWN_BASE else model

    def adapted(self, steps: int, base: Path | None = None) -> TinyGPT:
        return adapt(self.model(base), make_method(self.method, self.rank, steps=steps))


def entries() -> list[Entry]:
    """Every method on every base that it can stand on: full fine-tuning and Delta-LoRA must move W. QLoRA is LoRA on nf4 with its
    paper's alpha and dropout."""
    return [*(Entry(name) for name in METHODS if name not in OWN_BASE), *(Entry(name, "nf4") for name in METHODS if name not in ("full", "delta-lora"))]


def at_budget(budget: int, steps: int, within: float = 0.1, largest: int = 512) -> list[Entry]:
    """Every entry at the rank that brings it nearest to `budget` trainable parameters, if that is within a tenth of it."""
    sizes, found = [(linear.out_features, linear.in_features) for linear in find_targets(load_base()).values()], []
    for entry in entries():
        if entry.method == "full":
            continue
        highest = largest if entry.method == "vera" else min(map(min, sizes))

        def count(rank: int) -> int:
            method = make_method(entry.method, rank, steps=steps)
            return sum(prod(shape) for o, i in sizes for shape in COSTS[type(method)].trained(method, o, i).values())

        ranks = range(1, highest + 1 if entry.method != "adalora" else highest * 2 // 3 + 1)         # AdaLoRA begins with half as much again
        rank = min(ranks, key=lambda rank: (abs(count(rank) - budget), -rank))
        if abs(count(rank) - budget) <= within * budget:
            usual = make_method(entry.method, rank, steps=steps) == make_method(entry.method, steps=steps)
            found.append(entry if usual else Entry(entry.method, entry.base, rank))
    return found


@dataclass(frozen=True)
class Settings:
    """What the runs of one comparison have in common."""

    steps: int = 100
    rows: int = 16
    base: Path | None = None

    def on(self, task: data.Task) -> "Settings":
        """The same for this task: what is asked about has to be read often, so smaller steps and more of them."""
        return replace(self, steps=2 * self.steps, rows=self.rows // 2) if task.questions else self

    def train(self, entry: Entry, task: data.Task, lr: float, seed: int) -> tuple[TinyGPT, list[float]]:
        """One run. Returns the model and its training loss; raises FloatingPointError where that stops being finite."""
        model, method = entry.model(self.base), make_method(entry.method, entry.rank, steps=self.steps)
        history = finetune(model, method, task.batches(self.rows, CONTEXT, seed), self.steps, lr, seed, warmup=self.steps // 10, schedule="linear", progress=False)
        return model, history["loss"]

    def trial(self, entry: Entry, task: data.Task, lr: float, seed: int) -> float | None:
        """The score of one run, None where it diverged."""
        try:
            score = bits(self.train(entry, task, lr, seed)[0], task)
        except FloatingPointError:
            return None
        return score if math.isfinite(score) else None

    def run(self, entry: Entry, task: data.Task, lr: float, seed: int) -> tuple[dict, TinyGPT | None]:
        """All the scores of one run, None for each where it diverged; and the model."""
        names = ["bits_per_byte", "world_bits_per_byte", "forgotten"] + ["exact_match"] * bool(task.questions)
        try:
            model, loss = self.train(entry, task, lr, seed)
            score = bits(model, task)
        except FloatingPointError:
            score = math.nan
        if not math.isfinite(score):
            return dict.fromkeys(names), None
        world, before = bits(model, data.world()), bits(entry.model(self.base), data.world())
        scores = dict(zip(names, (score, world, world - before)))
        if task.questions:
            scores["exact_match"] = exact_match(model, task.questions)
        return scores | {"training": [round(statistics.fmean(loss[i:i + 10]) / math.log(2), 4) for i in range(0, self.steps, 10)]}, model


def bits(model: TinyGPT, task: data.Task) -> float:
    """The score: bits per byte of the held-out part, or of the answers where the task asks."""
    return (answer_loss(model, task.questions) if task.questions else held_out_loss(model, task.held_out(CONTEXT + 1))) / math.log(2)


class Results:
    """The results file: what the runs have in common, and one record a run. Written whole after each run, so never half."""

    def __init__(self, path: Path, common: dict):
        self.path = path
        self.content = {"about": common, "search": [], "runs": []}
        if path.exists():
            self.content = read(path)
            was = self.content["about"]
            if was["settings"] != common["settings"]:
                raise ValueError(f"{path} holds a comparison with other settings ({was['settings']}, not {common['settings']}); take another --out")

    def same_data(self, name: str, task: data.Task) -> None:
        """A text may change and keep its name: then what is here was made from something else."""
        digest = hashlib.sha256(b"".join(tensor.numpy().tobytes() for tensor in (task.held_out(CONTEXT + 1), *task.batches(context=CONTEXT)(0)))).hexdigest()[:12]
        if self.content["about"].setdefault("tasks", {}).setdefault(name, digest) != digest:
            raise ValueError(f"{self.path} holds runs on other data named {name!r}; take another --out")

    def find(self, part: str, **key) -> dict | None:
        return next((record for record in self.content[part] if all(record[name] == value for name, value in key.items())), None)

    def add(self, part: str, record: dict) -> None:
        self.content[part].append(record)
        write(self.path, self.content)


def read(path: Path) -> dict:
    """A results file. Raises ValueError naming it where it is not one."""
    try:
        content = json.loads(path.read_text())
        run = {"method", "base", "rank", "task", "seed", "lr"}
        whole = isinstance(content["about"]["settings"], dict) and all(run | {"bits_per_byte"} <= record.keys() for record in content["search"]) and all(
            run | {"scores", "costs"} <= record.keys() and "bits_per_byte" in record["scores"] and isinstance(record["costs"], dict) for record in content["runs"])
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError, AttributeError):
        whole = False
    if not whole:
        raise ValueError(f"{path}: not a results file of compare; remove it, or take another --out")
    return content


def write(path: Path, content: dict) -> None:
    """One record a line, so that two results files can be compared by eye."""
    lines = [f'"about": {json.dumps(content["about"])}']
    lines += [f'"{part}": [\n' + ",\n".join(json.dumps(record) for record in content[part]) + "\n]" for part in ("search", "runs")]
    storage.write_atomically(path, ("{\n" + ",\n".join(lines) + "\n}\n").encode())


def search(entry: Entry, name: str, task: data.Task, settings: Settings, results: Results) -> float:
    """The rate with the fewest bits per byte over both seeds, on the task for choosing. Eight runs for each entry, whatever it is."""
    choosing, (first, second) = task.choosing(), SEARCH_SEEDS

    def trial(lr: float, seed: int) -> float:
        lr = float(f"{lr:.3g}")
        key = {**asdict(entry), "task": name, "lr": lr, "seed": seed}
        record = results.find("search", **key)
        if record is None:
            record = key | {"bits_per_byte": settings.trial(entry, choosing, lr, seed)}
            results.add("search", record)
        return math.inf if record["bits_per_byte"] is None else record["bits_per_byte"]

    centre = RATES[entry.method]
    tried = {rate: trial(rate, first) for rate in (centre / HALF_A_DECADE, centre, centre * HALF_A_DECADE)}
    for _ in range(2):
        rate = most_room(tried)
        tried[rate] = trial(rate, first)
    finalists = sorted(tried, key=tried.get)[:3]
    return float(f"{min(finalists, key=lambda rate: tried[rate] + trial(rate, second)):.3g}")


def most_room(tried: dict[float, float]) -> float:
    """The rate to try next: beyond the best where it is the lowest or the highest, else in the middle of the wider gap beside it
    (in logarithms; of equal gaps the one towards the better neighbour). tried: rate -> score, lower is better."""
    rates, best = sorted(tried), min(tried, key=tried.get)
    if best == rates[0]:
        return best / HALF_A_DECADE
    if best == rates[-1]:
        return best * HALF_A_DECADE
    below, above = rates[rates.index(best) - 1], rates[rates.index(best) + 1]
    if math.isclose(best / below, above / best):
        return math.sqrt(best * min(below, above, key=tried.get))
    return math.sqrt(best * (below if best / below > above / best else above))


def step_ratio(entry: Entry, settings: Settings, rounds: int = 6) -> float:
    """The time of a training step over that of full fine-tuning, the two taking turns; the median."""
    x, y = data.world().batches(settings.rows, CONTEXT)(0)
    ratios = []
    contenders = []
    for one in (entry, Entry("full")):
        method = make_method(one.method, one.rank, steps=settings.steps)
        model = one.adapted(settings.steps, settings.base)
        contenders.append((model, method, torch.optim.AdamW(method.parameter_groups(model, 1e-5), lr=1e-5)))

    def step(model: TinyGPT, method, optimizer) -> float:
        began = time.perf_counter()
        optimizer.zero_grad()
        (next_byte_loss(model, x, y) + method.penalty(model)).backward()
        method.before_step(model, 0)
        optimizer.step()
        method.after_step(model, 0)
        return time.perf_counter() - began

    for turn in range(rounds + 2):
        took = [step(*contender) for contender in contenders]
        if turn > 1:                                               # the first two warm up
            ratios.append(took[0] / took[1])
    return statistics.median(ratios)


def priced(entry: Entry, settings: Settings) -> dict:
    """What a step costs, whatever the task: bytes alive for backward in the whole model, and its time."""
    model = entry.adapted(settings.steps, settings.base)
    x, y = data.world().batches(settings.rows, CONTEXT)(0)
    alive = bytes_alive(model, lambda: next_byte_loss(model.train(), x, y))
    return {"alive_bytes": alive, "step_ratio": round(step_ratio(entry, settings), 3)}


def weighed(model: TinyGPT) -> dict:
    """What a trained model holds. LoRA-drop has found only in training which layers share."""
    total = ledger(model, tokens=1)[-1]
    return {"trainable_parameters": total.trainable, "disk_bytes": disk_bytes(model), "weight_bytes": total.trained_bytes + total.frozen_bytes,
            "gradient_bytes": total.gradient_bytes, "optimizer_bytes": total.optimizer_bytes}


def published_rate(entry: Entry, task: str) -> float:
    """The rate that the committed search chose, for this task if it had it, else the middle one of its tasks; else the usual one."""
    rates = {}
    for record in read(PUBLISHED)["runs"] if PUBLISHED.exists() else ():
        if (record["method"], record["base"], record["rank"]) == (entry.method, entry.base, entry.rank):
            rates[record["task"]] = record["lr"]
    return rates.get(task) or (sorted(rates.values())[len(rates) // 2] if rates else RATES[entry.method])


def compare(tasks: dict[str, data.Task], seeds: int, out: Path, settings: Settings, lineup: list[Entry], quick: bool = False, command: str = "",
            say: Callable[[str], None] = print) -> Results:
    """Every entry on every task, seeds 0 to `seeds` - 1. quick: rates as published, no search. What `out` holds already is not run again.

    Raises ValueError where `out` holds a comparison with other settings, another base or other data under the same name, or no comparison.
    """
    base = storage.base_fingerprint(load_base(settings.base))
    common = {"command": command, "settings": {"steps": settings.steps, "rows": settings.rows, "context": CONTEXT, "base": base[:12], "quick": quick},
              "versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}}
    out.mkdir(parents=True, exist_ok=True)
    results, prices = Results(out / "results.json", common), {}
    for name, task in tasks.items():
        results.same_data(name, task)
        here = settings.on(task)
        for entry in lineup:
            wanted = [{**asdict(entry), "task": name, "seed": seed} for seed in range(seeds)]
            missing = [key for key in wanted if not results.find("runs", **key)]
            if not missing:
                continue
            lr = published_rate(entry, name) if quick else search(entry, name, task, here, results)
            if (entry, here) not in prices:
                prices[entry, here] = priced(entry, here)
            for key in missing:
                scores, model = here.run(entry, task, lr, key["seed"])
                costs = (weighed(model) if model else {}) | prices[entry, here]
                results.add("runs", key | {"lr": lr, "steps": here.steps, "scores": scores, "costs": costs})
                say(f"{name}: {entry}, seed {key['seed']}: {shown(scores['bits_per_byte'])} bits per byte")
    return results


def bootstrap(values: Sequence[float], resamples: int = 10_000, seed: int = 0) -> tuple[float, float, float]:
    """The mean, and its 95 % interval by the expanded percentile bootstrap (Hesterberg 2015, The American Statistician 69).

    Resamples of few values spread too little: of five, the plain percentiles miss the truth 15 times in a hundred. So the tails are cut
    where they would have to be for the mean of a normal sample, by Student's t. With one value there is no interval: it is infinite.
    """
    values = np.asarray(values, float)
    count = len(values)
    if count == 0 or not np.isfinite(values).all():
        return math.nan, -math.inf, math.inf
    if count == 1:
        return float(values[0]), -math.inf, math.inf
    drawn = np.random.default_rng(seed).choice(values, (resamples, count)).mean(axis=1)
    tail = statistics.NormalDist().cdf(-math.sqrt(count / (count - 1)) * student_t(0.975, count - 1))
    return float(values.mean()), *(float(q) for q in np.quantile(drawn, (tail, 1 - tail)))


@cache
def student_t(p: float, freedom: int) -> float:
    """The quantile of Student's t, p above 1/2. With t = √ν tan θ its density is cos^(ν−1) θ, which is summed up to p."""
    theta = np.linspace(0, math.pi / 2, 100_001)
    below = np.cumsum(np.cos(theta) ** (freedom - 1))
    return math.sqrt(freedom) * math.tan(theta[np.searchsorted(below / below[-1], 2 * p - 1)])


def of(runs: list[dict], task: str, entry: Entry) -> Iterator[dict]:
    return (run for run in runs if run["task"] == task and Entry(run["method"], run["base"], run["rank"]) == entry)


def score_of(runs: list[dict], task: str, entry: Entry, name: str = "bits_per_byte") -> dict[int, float]:
    """seed -> score. A run that diverged has nan."""
    scores = {run["seed"]: run["scores"].get(name) for run in of(runs, task, entry)}
    return {seed: math.nan if score is None else score for seed, score in scores.items()}


def costs_of(runs: list[dict], task: str, entry: Entry) -> dict:
    """Of the first seed that did not diverge; else what is known without training."""
    costs = [run["costs"] for run in of(runs, task, entry)]
    return next((cost for cost in costs if "trainable_parameters" in cost), costs[0])


def paired(one: dict[int, float], other: dict[int, float]) -> list[float]:
    """one - other, for each seed that both have."""
    return [one[seed] - other[seed] for seed in sorted(one.keys() & other.keys())]


def entries_of(runs: list[dict], task: str) -> list[Entry]:
    return list(dict.fromkeys(Entry(run["method"], run["base"], run["rank"]) for run in runs if run["task"] == task))


def table(runs: list[dict], task: str, budget: list[Entry] | None = None) -> str:
    """The scoreboard of one task, best first: at equal steps, or (budget: those entries) at about equal trainable parameters."""
    lineup = [entry for entry in entries_of(runs, task) if (entry in budget if budget is not None else entry.rank is None)]
    full, asks = score_of(runs, task, Entry("full")), any("exact_match" in run["scores"] for run in runs if run["task"] == task)
    rows = []
    for entry in lineup:
        score = score_of(runs, task, entry)
        mean, low, high = bootstrap(list(score.values()))
        behind, worst, best = bootstrap(paired(score, full))
        costs, rate = costs_of(runs, task, entry), next(of(runs, task, entry))["lr"]
        cells = [str(entry), f"{rate:.2g}", interval(mean, low, high), "" if entry.method == "full" else interval(behind, worst, best, "+.3f")]
        cells += [f"{100 * bootstrap(list(score_of(runs, task, entry, 'exact_match').values()))[0]:.1f}"] * asks
        cells += [f"{bootstrap(list(score_of(runs, task, entry, 'forgotten').values()))[0]:+.2f}", f"{costs.get('trainable_parameters', 0):,}"]
        cells += [f"{costs[key] / 1024:,.0f}" if key in costs else "" for key in ("weight_bytes", "gradient_bytes", "optimizer_bytes", "alive_bytes", "disk_bytes")]
        cells += [f"{costs['step_ratio']:.2f}" if "step_ratio" in costs else ""]
        rows.append((math.inf if math.isnan(mean) else mean, cells))
    head = ["method", "rate", "bits per byte", "behind full", *["answered %"] * asks, "forgotten", "trained", "weights", "gradients", "AdamW", "alive", "file", "time"]
    return columns([head, *(cells for _, cells in sorted(rows, key=lambda row: row[0]))])


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
    columns = list(dict.fromkeys(key for row in flat for key in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat)
    storage.write_atomically(path, text.getvalue().encode())


def shown(value: float | None) -> str:
    return "diverged" if value is None else f"{value:.3f}"
