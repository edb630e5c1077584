"""The fair fight: full fine-tuning and every method, on dense and on 4-bit bases, for one task after another.

    run       400 steps of 8 windows of 64 bytes, whatever the method, the rate up over a tenth of them and down to zero
    score     bits per byte of the held-out part; where a task asks, of the answers alone; where it tells facts, of these in the words told
    rate      each method its own, from five runs on `task.choosing()`, whose held-out part has nothing of the task's: three rates half a
              decade apart, and two more, each where the best so far has most room beside it
    report    on the task's held-out part, at that rate. A seed means the same batches for every method, so differences are paired
    curve     at the start and after every tenth of the run: the score, and what the tiny world costs more than before, on fewer windows

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
from torch import nn

from minilora import data, formats, storage
from minilora.adapter import Method, adapt, find_targets
from minilora.gpt import TinyGPT, load_base
from minilora.evidence.formulas import COSTS
from minilora.evidence.intruders import intruders
from minilora.evidence.ledger import bytes_alive, disk_bytes, ledger
from minilora.methods import METHODS, RATES, make_method
from minilora.methods.lora import LoRA, LoRALinear
from minilora.quant.linear import quantize
from minilora.training import answer_loss, exact_match, finetune, held_out_loss, next_byte_loss

OWN_BASE = tuple(name for name in METHODS if make_method(name).four_bits)        # these put the base in four bits themselves
PUBLISHED = Path(__file__).with_name("published.json")
CONTEXT = 64
SEARCH_SEED = 1000                                      # which no report uses
TENTHS, SAMPLED = 10, 32                                # moments of a curve, and windows read for one of its points
HALF_A_DECADE = math.sqrt(10)
# Enough is asked that a score has little noise: 80 facts, 64 of them in words never told, and 582 sums.
TASKS = {"voice": data.voice, "facts": lambda: data.facts(80, every=5), "sums": lambda: data.sums(75), "code": data.code}
PARTS = {"attention": ["q_proj", "k_proj", "v_proj", "o_proj"], "mlp": ["up_proj", "down_proj"], "one mlp": ["blocks.2.mlp.up_proj", "blocks.2.mlp.down_proj"]}


@dataclass(frozen=True)
class Entry:
    """One line of the table: a method, its base ("fp32" or "nf4"), its rank (None: the method's usual one); and where a question asks for
    it, another alpha, only some layers (a name of PARTS), other rows a step (as much is read in all), or the factor that starts at zero."""

    method: str
    base: str = "fp32"
    rank: int | None = None
    alpha: float | None = None
    only: str = ""
    rows: int | None = None
    zero: str = "B"

    def __str__(self) -> str:
        said = [f"r={self.rank}" if self.rank else "", "on nf4" if self.base == "nf4" and self.method not in OWN_BASE else "",
                f"alpha={self.alpha:g}" if self.alpha else "", self.only, f"rows={self.rows}" if self.rows else "", "A=0" if self.zero == "A" else ""]
        return " ".join([self.method, *filter(None, said)])

    @property
    def key(self) -> dict:
        """How a record names it: method, base and rank always, the rest where it is not the usual."""
        fields = asdict(self)
        return {name: value for name, value in fields.items() if name in ("method", "base", "rank") or value != getattr(Entry, name)}

    @staticmethod
    def of(record: dict) -> "Entry":
        return Entry(**{name: record[name] for name in Entry.__dataclass_fields__ if name in record})

    def way(self, steps: int) -> Method:
        """The method for a run of so many steps."""
        method = make_method(self.method, self.rank, self.alpha, steps)
        return ZeroA(**asdict(method)) if self.zero == "A" else method

    def model(self, base: Path | None = None) -> TinyGPT:
        model = load_base(base)
        return quantize(model) if self.base == "nf4" and self.method not in OWN_BASE else model

    def adapted(self, steps: int, base: Path | None = None) -> TinyGPT:
        return adapt(self.model(base), self.way(steps), PARTS.get(self.only))


@dataclass(frozen=True)
class ZeroA(LoRA):
    """LoRA the other way round: A starts at zero and B random, U(±1/√rank). dW = s · B A starts at zero all the same."""

    def layer(self, linear: nn.Linear) -> LoRALinear:
        layer = super().layer(linear)
        nn.init.kaiming_uniform_(layer.B, a=math.sqrt(5))
        nn.init.zeros_(layer.A)
        return layer


formats.FORMATS[ZeroA] = formats.LoRAFormat()           # how it began is not on disk


def entries(four_bits: bool = False) -> list[Entry]:
    """Every method once; with `four_bits` again on that base, where it can stand on it: full fine-tuning and Delta-LoRA must move W. QLoRA is
    LoRA on nf4 with its paper's alpha and dropout."""
    once = [Entry(name, "nf4" if name in OWN_BASE else "fp32") for name in METHODS]
    return once + [Entry(name, "nf4") for name in METHODS if name not in ("full", "delta-lora", *OWN_BASE)] * four_bits


def at_budget(budget: int, steps: int, base: Path | None = None, four_bits: bool = False, within: float = 0.1, largest: int = 512) -> list[Entry]:
    """Every entry at the rank that brings it nearest to `budget` trainable parameters, if that is within a tenth of it. LoRA-drop before
    it drops: how many it will, only its data can tell. VeRA up to rank `largest`: beyond, its random matrices outgrow the model."""
    sizes, found = [(linear.out_features, linear.in_features) for linear in find_targets(load_base(base)).values()], []
    for entry in entries(four_bits):
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

    steps: int = 400
    rows: int = 8
    base: Path | None = None

    def of(self, entry: Entry) -> "Settings":
        """With other rows a step an entry has fewer or more steps, so that it reads as much."""
        return replace(self, rows=entry.rows, steps=self.steps * self.rows // entry.rows) if entry.rows else self

    def train(self, entry: Entry, task: data.Task, lr: float, seed: int, look: Callable[[TinyGPT], float] | None = None) -> TinyGPT:
        """One run. Returns the model; raises FloatingPointError where its loss stops being finite."""
        here, model = self.of(entry), entry.model(self.base)
        finetune(model, entry.way(here.steps), task.batches(here.rows, CONTEXT, seed), here.steps, lr, seed, targets=PARTS.get(entry.only),
                 evaluate=look, evaluate_every=max(1, here.steps // TENTHS), warmup=here.steps // 10, schedule="linear", progress=False)
        return model

    def trial(self, entry: Entry, task: data.Task, lr: float, seed: int) -> float | None:
        """The score of one run, None where it diverged."""
        try:
            score = bits(self.train(entry, task, lr, seed), task)
        except FloatingPointError:
            return None
        return score if math.isfinite(score) else None

    def run(self, entry: Entry, task: data.Task, lr: float, seed: int) -> tuple[dict, TinyGPT | None]:
        """All the scores of one run and its model; None for each where it diverged. Forgotten is what the tiny world costs more than before
        `adapt`, so a method that puts the base in four bits itself answers for those too."""
        world, curve = data.world(), []
        before = entry.model(self.base)
        few = bits(before, world, SAMPLED)

        def look(model: TinyGPT) -> float:
            curve.append([round(bits(model, task, SAMPLED), 4), round(bits(model, world, SAMPLED) - few, 4)])
            return curve[-1][0]

        try:
            model = self.train(entry, task, lr, seed, look)
            score, after = bits(model, task), bits(model, world)
        except FloatingPointError:
            score = math.nan
        if not math.isfinite(score):
            return {"bits_per_byte": None, "forgotten": None, "curve": None}, None
        scores = {"bits_per_byte": score, "world_bits_per_byte": after, "forgotten": after - bits(before, world), "curve": curve}
        if task.questions:
            scores["exact_match"] = exact_match(model, task.questions)
        if entry.base == "fp32":
            scores["intruders"] = intruders(model, before)
        return scores, model


def bits(model: TinyGPT, task: data.Task, windows: int | None = None) -> float:
    """The score: bits per byte of the held-out part, or of its first windows; of the facts as they were told; or of the answers where the
    task asks."""
    if task.questions:
        return answer_loss(model, task.told or task.questions) / math.log(2)
    return held_out_loss(model, task.held_out(CONTEXT + 1)[:windows]) / math.log(2)


class Results:
    """The results file: what the runs have in common, and one record a run. Written whole after each run, so never half."""

    def __init__(self, path: Path, common: dict):
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path, self.left, self.since = path, None, time.process_time()          # left: the file as this comparison left it
        self.content = {"about": common, "search": [], "runs": [], "grid": []}
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

    def find(self, part: str, entry: Entry, **key) -> dict | None:
        return next((record for record in self.content[part] if Entry.of(record) == entry and all(record[name] == value for name, value in key.items())), None)

    def add(self, part: str, record: dict) -> None:
        if self.left is not None and (not self.path.exists() or self.path.read_bytes() != self.left):
            raise ValueError(f"{self.path} was changed by something else, another comparison perhaps; run one at a time, or take another --out")
        self.content[part].append(record)
        self.content["about"]["cpu_seconds"] = round(self.content["about"]["cpu_seconds"] + time.process_time() - self.since, 2)
        self.since = time.process_time()
        self.left = write(self.path, self.content)


def read(path: Path) -> dict:
    """A results file, each run in it once. Raises ValueError naming it where it is not one, OSError where it cannot be read."""
    try:
        content = json.loads(path.read_bytes())
        made = [(part, run["task"], Entry.of(run), run["seed"], part == "runs" or run["lr"]) for part in ("runs", "grid") for run in content[part]]
        whole = (isinstance(content["about"]["settings"], dict) and all(map(_is_search, content["search"]))
                 and all(map(_is_run, content["runs"] + content["grid"])) and all("bits_per_byte" in record for record in content["search"])
                 and len(made) == len(set(made)))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        whole = False
    if not whole:
        raise ValueError(f"{path}: not a results file of compare, or damaged; remove it, or name another")
    return content


def _is_search(record: dict) -> bool:
    entry = Entry.of(record)
    return (all(type(value) is str for value in (record["task"], record["method"], record["base"], entry.only)) and entry.zero in ("A", "B")
            and type(record["seed"]) is int and _is_number(record["lr"]) and (record["rank"] is None or type(record["rank"]) is int)
            and (entry.rows is None or type(entry.rows) is int) and (entry.alpha is None or _is_number(entry.alpha))
            and (record.get("bits_per_byte") is None or _is_number(record["bits_per_byte"])))


def _is_run(record: dict) -> bool:
    scores, costs = record["scores"] | {}, record["costs"] | {}         # no list has that
    curve, doublings = scores.pop("curve", None), scores.pop("doublings", None)
    return (_is_search(record) and "bits_per_byte" in scores and all(value is None or _is_number(value) for value in scores.values())
            and all(points is None or len(points) > 1 and all(len(point) == 2 and all(map(_is_number, point)) for point in points) for points in (curve, doublings))
            and all(_is_number(value) and value > 0 for value in costs.values()))


def _is_number(value: object) -> bool:
    return type(value) in (int, float) and abs(value) < 1e300           # not nan


def write(path: Path, content: dict) -> bytes:
    """One record a line, so that two results files can be compared by eye. Returns what it wrote."""
    lines = [f'"about": {json.dumps(content["about"])}']
    lines += [f'"{part}": [\n' + ",\n".join(json.dumps(record) for record in content[part]) + "\n]" for part in ("search", "runs", "grid")]
    written = ("{\n" + ",\n".join(lines) + "\n}\n").encode()
    storage.write_atomically(path, written)
    return written


def joined(contents: list[dict]) -> dict:
    """Several results files of one fight as one; a task may have its own number of steps. Raises ValueError where they do not belong together."""
    first, whole = contents[0]["about"], {"about": {}, "search": [], "runs": [], "grid": []}
    tasks, steps = {}, {}
    for content in contents:
        about = content["about"]
        for what, one, other in (("settings", first["settings"] | {"steps": 0}, about["settings"] | {"steps": 0}), ("versions", first["versions"], about["versions"])):
            if one != other:
                raise ValueError(f"these were not made with the same {what}: {one} and {other}")
        for name, digest in about["tasks"].items():
            if tasks.setdefault(name, digest) != digest or steps.setdefault(name, about["settings"]["steps"]) != about["settings"]["steps"]:
                raise ValueError(f"these were not made on the same data and steps: {name!r} is not the same in all")
        for part in ("search", "runs", "grid"):
            whole[part] += content[part]
    settings = first["settings"] | {"steps": steps}
    return whole | {"about": first | {"settings": settings, "tasks": tasks, "cpu_seconds": sum(content["about"]["cpu_seconds"] for content in contents)}}


def search(entry: Entry, name: str, task: data.Task, settings: Settings, results: Results) -> float:
    """The rate with the fewest bits per byte on the task for choosing. Five runs for each entry, whatever it is."""
    choosing = task.choosing()

    def trial(lr: float) -> float:
        lr = float(f"{lr:.3g}")
        record = results.find("search", entry, task=name, lr=lr, seed=SEARCH_SEED)
        if record is None:
            record = {**entry.key, "task": name, "lr": lr, "seed": SEARCH_SEED, "bits_per_byte": settings.trial(entry, choosing, lr, SEARCH_SEED)}
            results.add("search", record)
        return math.inf if record["bits_per_byte"] is None else record["bits_per_byte"]

    centre = RATES[entry.method]
    tried = {rate: trial(rate) for rate in (centre / HALF_A_DECADE, centre, centre * HALF_A_DECADE)}
    for _ in range(2):
        rate = most_room(tried)
        tried[rate] = trial(rate)
    return float(f"{min(tried, key=tried.get):.3g}")


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
        method = one.way(settings.steps)
        model = one.adapted(settings.steps, settings.base)
        method.prepare(model, lambda step: (x, y), next_byte_loss, 1e-5)
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
        if Entry.of(record) == entry:
            rates[record["task"]] = record["lr"]
    return rates.get(task) or (sorted(rates.values())[len(rates) // 2] if rates else RATES[entry.method])


def common(settings: Settings, command: str, quick: bool = False) -> dict:
    """What the runs of a results file have in common."""
    base = storage.base_fingerprint(load_base(settings.base))
    return {"command": command, "settings": {"steps": settings.steps, "rows": settings.rows, "context": CONTEXT, "base": base[:12], "quick": quick},
            "versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}, "cpu_seconds": 0}


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
    results, prices = Results(out / "results.json", common(settings, command, quick)), {}
    for name, task in tasks.items():
        results.same_data(name, task)
        for entry in lineup:
            missing = [seed for seed in range(seeds) if not results.find("runs", entry, task=name, seed=seed)]
            if not missing:
                continue
            there = {run["lr"] for run in results.content["runs"] if run["task"] == name and Entry.of(run) == entry}
            lr = there.pop() if there else published_rate(entry, name) if quick else search(entry, name, task, settings, results)
            if entry not in prices:
                prices[entry] = priced(entry, settings.of(entry))
            for seed in missing:
                scores, model = settings.run(entry, task, lr, seed)
                costs = (weighed(model) if model else {}) | prices[entry]
                results.add("runs", {**entry.key, "task": name, "seed": seed, "lr": lr, "steps": settings.of(entry).steps, "scores": scores, "costs": costs})
                say(f"{name}: {entry}, seed {seed}: {'diverged' if model is None else format(scores['bits_per_byte'], '.3f')} bits per byte")
    return results
