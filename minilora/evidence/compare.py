"""The fair fight: full fine-tuning and every method, on dense and on 4-bit bases, for one task after another.

    run       reads 1,600 windows of 64 bytes, whatever the method. Where a task asks questions, in twice as many steps of half the size
    score     bits per byte of the held-out part; where it asks, of the answers alone: no model can guess what will be asked
    rate      each method its own, from eight runs on `task.choosing()`, whose held-out part has nothing of the task's: three rates half
              a decade apart; two more, each where the best so far has most room beside it; and the best three of the five again with
              another seed, for a rate that is lucky once is not a good one
    report    on the task's held-out part, at that rate. A seed means the same batches for every method, so differences are paired

Every finished run is in the results file at once, and none is ever made twice: a comparison that was stopped goes on where it was.
What the runs say is read by scoreboard.py. (LoRA-drop's first look at the data, a tenth of the steps, comes on top and is not priced.)
"""

import hashlib
import json
import math
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from math import prod
from pathlib import Path

import numpy as np
import torch

from minilora import data, storage
from minilora.adapter import adapt, find_targets
from minilora.gpt import TinyGPT, load_base
from minilora.evidence.formulas import COSTS
from minilora.evidence.ledger import bytes_alive, disk_bytes, ledger
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


def at_budget(budget: int, steps: int, base: Path | None = None, within: float = 0.1, largest: int = 512) -> list[Entry]:
    """Every entry at the rank that brings it nearest to `budget` trainable parameters, if that is within a tenth of it. LoRA-drop before
    it drops: how many it will, only its data can tell. VeRA up to rank `largest`: beyond, its random matrices outgrow the model."""
    sizes, found = [(linear.out_features, linear.in_features) for linear in find_targets(load_base(base)).values()], []
    for entry in entries():
        if entry.method == "full":
            continue
        highest = largest if entry.method == "vera" else min(map(min, sizes))

        def count(rank: int) -> int:
            method = make_method(entry.method, rank, steps=steps)
            return sum(prod(shape) for o, i in sizes for shape in COSTS[type(method)].trained(method, o, i).values())

        ranks = range(1, highest + 1 if entry.method != "adalora" else highest * 2 // 3 + 1)         # AdaLoRA begins with half as much again
        rank = min(ranks, key=lambda rank: (abs(count(rank) - budget), -rank), default=None)
        if rank and abs(count(rank) - budget) <= within * budget:
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
        """All the scores of one run and its model; None for each where it diverged. Forgotten is what the tiny world costs more than before
        `adapt`, so a method that puts the base in four bits itself answers for those too."""
        try:
            model, loss = self.train(entry, task, lr, seed)
            score, world = bits(model, task), bits(model, data.world())
        except FloatingPointError:
            score = math.nan
        if not math.isfinite(score):
            return {"bits_per_byte": None, "forgotten": None, "training": None}, None
        scores = {"bits_per_byte": score, "world_bits_per_byte": world, "forgotten": world - bits(entry.model(self.base), data.world()),
                  "training": [round(statistics.fmean(loss[i:i + 10]) / math.log(2), 4) for i in range(0, self.steps, 10)]}
        return scores | ({"exact_match": exact_match(model, task.questions)} if task.questions else {}), model


def bits(model: TinyGPT, task: data.Task) -> float:
    """The score: bits per byte of the held-out part, or of the answers where the task asks."""
    return (answer_loss(model, task.questions) if task.questions else held_out_loss(model, task.held_out(CONTEXT + 1))) / math.log(2)


class Results:
    """The results file: what the runs have in common, and one record a run. Written whole after each run, so never half."""

    def __init__(self, path: Path, common: dict):
        self.path, self.left = path, None                      # the file as this comparison left it
        self.content = {"about": common, "search": [], "runs": []}
        if path.exists():
            self.content, self.left = read(path), path.read_bytes()
            was = self.content["about"]
            if was["settings"] != common["settings"]:
                raise ValueError(f"{path} holds a comparison with other settings ({was['settings']}, not {common['settings']}); take another --out")
            this = {key: common[key] for key in ("command", "versions") if key in common}
            if any(was.get(key) != value for key, value in this.items()) and this not in was.setdefault("continued", []):
                was["continued"].append(this)

    def same_data(self, name: str, task: data.Task) -> None:
        """A text may change and keep its name: then what is here was made from something else."""
        seen = [tensor.numpy().tobytes() for tensor in (task.held_out(CONTEXT + 1), *task.batches(context=CONTEXT)(0))]
        digest = hashlib.sha256(b"".join(seen) + task.fingerprint.encode()).hexdigest()[:12]
        if self.content["about"].setdefault("tasks", {}).setdefault(name, digest) != digest:
            raise ValueError(f"{self.path} holds runs on other data named {name!r}; take another --out")

    def find(self, part: str, **key) -> dict | None:
        return next((record for record in self.content[part] if all(record[name] == value for name, value in key.items())), None)

    def add(self, part: str, record: dict) -> None:
        if self.left is not None and (not self.path.exists() or self.path.read_bytes() != self.left):
            raise ValueError(f"{self.path} was changed by something else, another comparison perhaps; run one at a time, or take another --out")
        self.content[part].append(record)
        self.left = write(self.path, self.content)


def read(path: Path) -> dict:
    """A results file, each run in it once. Raises ValueError naming it where it is not one, OSError where it cannot be read."""
    try:
        content = json.loads(path.read_bytes())
        made = [(run["task"], run["method"], run["base"], run["rank"], run["seed"]) for run in content["runs"]]
        whole = (isinstance(content["about"]["settings"], dict) and all(map(_is_search, content["search"])) and all(map(_is_run, content["runs"]))
                 and all("bits_per_byte" in record for record in content["search"]) and len(made) == len(set(made)))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        whole = False
    if not whole:
        raise ValueError(f"{path}: not a results file of compare, or damaged; remove it, or name another")
    return content


def _is_search(record: dict) -> bool:
    return (all(type(record[key]) is str for key in ("task", "method", "base")) and type(record["seed"]) is int and _is_number(record["lr"])
            and (record["rank"] is None or type(record["rank"]) is int) and (record.get("bits_per_byte") is None or _is_number(record["bits_per_byte"])))


def _is_run(record: dict) -> bool:
    scores, costs = record["scores"] | {}, record["costs"] | {}         # no list has that
    training = scores.pop("training", None)
    return (_is_search(record) and "bits_per_byte" in scores and all(value is None or _is_number(value) for value in scores.values())
            and (training is None or len(training) > 0 and all(map(_is_number, training)))
            and all(_is_number(value) and value > 0 for value in costs.values()))


def _is_number(value: object) -> bool:
    return type(value) in (int, float) and abs(value) < 1e300           # not nan


def write(path: Path, content: dict) -> bytes:
    """One record a line, so that two results files can be compared by eye. Returns what it wrote."""
    lines = [f'"about": {json.dumps(content["about"])}']
    lines += [f'"{part}": [\n' + ",\n".join(json.dumps(record) for record in content[part]) + "\n]" for part in ("search", "runs")]
    written = ("{\n" + ",\n".join(lines) + "\n}\n").encode()
    storage.write_atomically(path, written)
    return written


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


def step_ratio(entry: Entry, settings: Settings, rounds: int = 10) -> float:
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

    Raises ValueError where `out` holds a comparison with other settings, another base or other data under the same name, or no comparison;
    and before anything is run, where the base is too small for an entry.
    """
    model = load_base(settings.base)
    if model.config.context < CONTEXT:
        raise ValueError(f"{settings.base}: a base that reads {model.config.context} bytes at once, and compare gives it {CONTEXT}")
    for entry in lineup:
        try:
            entry.adapted(settings.steps, settings.base)
        except ValueError as error:
            raise ValueError(f"{entry}: {error}") from None
    base = storage.base_fingerprint(model)
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
            there = {run["lr"] for run in results.content["runs"] if run["task"] == name and Entry(run["method"], run["base"], run["rank"]) == entry}
            lr = there.pop() if there else published_rate(entry, name) if quick else search(entry, name, task, here, results)
            if (entry, here) not in prices:
                prices[entry, here] = priced(entry, here)
            for key in missing:
                scores, model = here.run(entry, task, lr, key["seed"])
                costs = (weighed(model) if model else {}) | prices[entry, here]
                results.add("runs", key | {"lr": lr, "steps": here.steps, "scores": scores, "costs": costs})
                say(f"{name}: {entry}, seed {key['seed']}: {'diverged' if model is None else format(scores['bits_per_byte'], '.3f')} bits per byte")
    return results
