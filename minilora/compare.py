"""The fair fight: full fine-tuning and every method, on dense and on 4-bit bases, for one task after another.

    rate      each method its own, from six runs on `task.choosing()`, whose held-out part has nothing of the task's: three rates half a
              decade apart, a fourth beside the best (beyond it at the edge, else halfway to its better neighbour), and the best two
              of these again with another seed
    report    on the task's held-out part, at that rate. A seed means the same batches for every method, so differences are paired
    interval  bootstrap over the seeds' differences: 95 % of 10,000 resamples

Every finished run is in the results file at once, and none is ever made twice: a comparison that was stopped goes on where it was.
"""

import csv
import io
import json
import math
import platform
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from minilora import data, storage
from minilora.adapter import adapt, trainable_parameters
from minilora.gpt import TinyGPT, load_base
from minilora.measure import disk_bytes
from minilora.methods import METHODS, RATES, make_method
from minilora.quant.linear import quantize
from minilora.training import exact_match, finetune, held_out_loss

OWN_BASE = ("qlora", "loftq", "qpissa")                # these put the base in four bits themselves
PUBLISHED = Path(__file__).with_name("published.json")
ROWS, CONTEXT = 16, 64
SEARCH_SEEDS = (1000, 1001)                             # which no report uses


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
    """Every method on every base that it can stand on: full fine-tuning and Delta-LoRA must move W; LoRA in four bits is QLoRA."""
    return [*(Entry(name) for name in METHODS if name not in OWN_BASE),
            *(Entry(name, "nf4") for name in METHODS if name not in ("full", "delta-lora", "lora"))]


def at_budget(budget: int, steps: int, within: float = 0.1, largest: int = 512) -> list[Entry]:
    """Every entry at the rank that brings it nearest to `budget` trainable parameters, if that is within a tenth of it."""
    found = []
    for entry in entries():
        if entry.method == "full":
            continue
        counts: dict[int, int] = {}

        def count(rank: int) -> int:
            if rank not in counts:
                try:
                    counts[rank] = trainable_parameters(Entry(entry.method, "fp32" if entry.method in OWN_BASE else entry.base, rank).adapted(steps))
                except ValueError:                     # above what the smallest layer can hold
                    counts[rank] = 2**62
            return counts[rank]

        low, high = 1, largest
        while low < high:                              # the first rank at or above the budget: counts grow with the rank
            middle = (low + high) // 2
            low, high = (low, middle) if count(middle) >= budget else (middle + 1, high)
        rank = min((r for r in (low, low - 1) if r), key=lambda r: abs(count(r) - budget))
        if abs(count(rank) - budget) <= within * budget:
            usual = make_method(entry.method, rank, steps=steps) == make_method(entry.method, steps=steps)
            found.append(entry if usual else Entry(entry.method, entry.base, rank))
    return found


@dataclass(frozen=True)
class Settings:
    """What the runs of one comparison have in common."""

    steps: int = 100
    base: Path | None = None

    def run(self, entry: Entry, task: data.Task, lr: float, seed: int) -> tuple[dict, TinyGPT | None]:
        """Train once. Returns the scores, with None for each where the loss stopped being finite, and the model."""
        model, method = entry.model(self.base), make_method(entry.method, entry.rank, steps=self.steps)
        names = ["bits_per_byte", "world_bits_per_byte", "forgotten"] + ["exact_match"] * bool(task.questions)
        try:
            before = bits(model, data.world())
            history = finetune(model, method, task.batches(ROWS, CONTEXT, seed), self.steps, lr, seed, warmup=self.steps // 10, schedule="linear", progress=False)
        except FloatingPointError:
            return dict.fromkeys(names), None
        world = bits(model, data.world())
        scores = {"bits_per_byte": bits(model, task), "world_bits_per_byte": world, "forgotten": world - before,
                  "training": [round(sum(history["loss"][i:i + 10]) / len(history["loss"][i:i + 10]) / math.log(2), 4) for i in range(0, self.steps, 10)]}
        if task.questions:
            scores["exact_match"] = exact_match(model, task.questions)
        return scores, model


def bits(model: TinyGPT, task: data.Task) -> float:
    """Bits per byte on the task's held-out part."""
    return held_out_loss(model, task.held_out(CONTEXT + 1)) / math.log(2)


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

    def find(self, part: str, **key) -> dict | None:
        return next((record for record in self.content[part] if all(record[name] == value for name, value in key.items())), None)

    def add(self, part: str, record: dict) -> None:
        self.content[part].append(record)
        write(self.path, self.content)


def read(path: Path) -> dict:
    """A results file. Raises ValueError naming it where it is not one."""
    try:
        content = json.loads(path.read_text())
        assert {"about", "search", "runs"} <= content.keys()
        return content
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, AssertionError, AttributeError):
        raise ValueError(f"{path}: not a results file of compare; remove it, or take another --out") from None


def write(path: Path, content: dict) -> None:
    """One record a line, so that two results files can be compared by eye."""
    lines = [f'"about": {json.dumps(content["about"])}']
    lines += [f'"{part}": [\n' + ",\n".join(json.dumps(record) for record in content[part]) + "\n]" for part in ("search", "runs")]
    storage.write_atomically(path, ("{\n" + ",\n".join(lines) + "\n}\n").encode())


def search(entry: Entry, name: str, task: data.Task, settings: Settings, results: Results) -> float:
    """The rate with the fewest held-out bits per byte, on the task for choosing. Six runs for each entry, whatever it is."""
    step, centre = math.sqrt(10), RATES[entry.method]
    choosing = task.choosing()

    def trial(lr: float, seed: int) -> float:
        lr = float(f"{lr:.3g}")
        key = {**asdict(entry), "task": name, "lr": lr, "seed": seed}
        record = results.find("search", **key)
        if record is None:
            scores, _ = settings.run(entry, choosing, lr, seed)
            record = key | {"bits_per_byte": scores["bits_per_byte"]}
            results.add("search", record)
        return math.inf if record["bits_per_byte"] is None else record["bits_per_byte"]

    first, second = SEARCH_SEEDS
    low, middle, high = (centre / step, centre, centre * step)
    tried = {rate: trial(rate, first) for rate in (low, middle, high)}
    best = min(tried, key=tried.get)
    fourth = {low: low / step, high: high * step, middle: math.sqrt(middle * min(low, high, key=tried.get))}[best]
    tried[fourth] = trial(fourth, first)
    finalists = sorted(tried, key=tried.get)[:2]                   # a rate that is lucky once is not chosen
    return float(f"{min(finalists, key=lambda rate: tried[rate] + trial(rate, second)):.3g}")


def compare(tasks: dict[str, data.Task], seeds: int, out: Path, settings: Settings, budget: int | None = None, quick: bool = False,
            command: str = "", say: Callable[[str], None] = print) -> Results:
    """Every entry on every task; then, with a budget, at about equal trainable parameters. quick: rates as published, no search."""
    common = {"command": command, "settings": {"steps": settings.steps, "rows": ROWS, "context": CONTEXT, "quick": quick}, "seeds": seeds,
              "versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}}
    out.mkdir(parents=True, exist_ok=True)
    results = Results(out / "results.json", common)
    lineup = entries()
    lineup += [entry for entry in at_budget(budget, settings.steps) if entry not in lineup] if budget else []
    for name, task in tasks.items():
        for entry in lineup:
            lr = published_rate(entry, name) if quick else search(entry, name, task, settings, results)
            for seed in range(seeds):
                key = {**asdict(entry), "task": name, "seed": seed}
                if results.find("runs", **key):
                    continue
                scores, model = settings.run(entry, task, lr, seed)
                costs = {"trainable_parameters": trainable_parameters(model), "disk_bytes": disk_bytes(model)} if model else {}
                results.add("runs", key | {"lr": lr, "steps": settings.steps, "scores": scores, "costs": costs})
                say(f"{name}: {entry}, seed {seed}: {shown(scores['bits_per_byte'])} bits per byte")
    return results


def shown(value: float | None) -> str:
    return "diverged" if value is None else f"{value:.3f}"
