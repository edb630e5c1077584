"""What rank buys: facts remembered against rank and against trainable parameters; and AdaLoRA's own answer, as a film.

A fact gives a name one of 14 · 18 things, log2(252) = 7.98 bits that nothing else tells. After training, the model's probability of
the right thing, asked in the words it was told in, says how many of them it holds:

    bits held = Σ over facts of 7.98 + log2 p(thing | "name has a ")         at most 7.98 a fact; none where it is negative in sum

What is held after so many steps is not all that a rank could hold: small ranks go on learning when large ones have long had it all. So
`until_flat` doubles the steps until that brings next to nothing more: what is held then is the adapter's capacity, or all there was.
"""

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path

from minilora import data
from minilora.adapter import adapters, trainable_parameters
from minilora.evidence.compare import PARTS, Entry
from minilora.gpt import load_base
from minilora.methods import RATES, make_method
from minilora.training import answer_loss, exact_match, finetune

RANKS = (1, 2, 4, 8, 16, 32)
OTHERS = (("lora-fa", 16), ("vera", 64), ("vera", 256), ("full", None))
GAIN, MOST_STEPS = 0.03, 6400               # twice as long has to bring more than GAIN, or it counts as flat
BITS = math.log2(len(data.SLOTS["look"]) * len(data.SLOTS["thing"]))


def questions(facts: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    """Each fact in the words it was told in: (what comes before the thing, the thing)."""
    return [(f"\n{name} has a ", f"{thing}.\n") for name, thing in facts]


def bits_held(model, facts: Sequence[tuple[str, str]]) -> float:
    """Bits of the facts that the model holds, by the formula above."""
    asked = questions(facts)
    missing = answer_loss(model, asked) / math.log(2) * sum(len(thing.encode()) for _, thing in asked)
    return max(0.0, BITS * len(facts) - missing)


def read(path: Path) -> list[dict]:
    """The records of an earlier curve. Raises ValueError naming the file where it holds none."""
    try:
        records = json.loads(path.read_bytes())
        whole = isinstance(records, list) and all(
            type(record["method"]) is str and (record["rank"] is None or type(record["rank"]) is int)
            and all(type(record[key]) in (int, float) and 0 <= record[key] < math.inf for key in ("count", "steps", "seed", "lr", "parameters", "remembered", "bits"))
            and min(record["count"], record["steps"], record["parameters"]) > 0 for record in records)
    except (ValueError, KeyError, TypeError, RecursionError):
        whole = False
    if not whole:
        raise ValueError(f"{path}: not a file of capacity's records, or damaged; remove it, or take another --out")
    return records


def curve(count: int = 128, steps: int = 800, seeds: int = 3, done: Sequence[dict] = (), say: Callable[[str], None] = print,
          keep: Callable[[dict], None] = lambda record: None) -> list[dict]:
    """One record for each method, rank and seed: how many of `count` facts it answers and how many bits it holds. `done` is not run again."""
    records = list(done)
    for method, rank in [*(("lora", rank) for rank in RANKS), *OTHERS]:
        for seed in range(seeds):
            key = {"method": method, "rank": rank, "count": count, "steps": steps, "seed": seed}
            if any(key.items() <= record.items() for record in records):
                continue
            facts, model = data.invented(count, seed), load_base()
            finetune(model, make_method(method, rank, steps=steps), data.facts(count, seed).batches(16, 64, seed), steps, RATES[method], seed,
                     warmup=steps // 10, schedule="linear", progress=False)
            remembered = exact_match(model, questions(facts))
            record = key | {"lr": RATES[method], "parameters": trainable_parameters(model), "remembered": remembered, "bits": bits_held(model, facts)}
            records.append(record)
            keep(record)
            say(f"{method} {rank or ''} seed {seed}: {remembered:.1%} of {count} facts, {record['bits']:.0f} bits, {record['bits'] / record['parameters']:.4f} a parameter")
    return records


def until_flat(entry: Entry, count: int, seed: int, lr: float, first: int = 400, last: int = MOST_STEPS, gain: float = GAIN, rows: int = 8) -> dict:
    """`count` facts told for `first` steps, for twice as many, and so on, each a run of its own with the rate down to zero at its end; until
    twice as long holds less than `gain` more, or `last`.

    Returns {"steps": of the last run, "held": its bits, "doublings": [[steps, bits], ...], "parameters": trained}.
    """
    facts, doublings, steps = data.invented(count, seed), [], first
    while True:
        model = load_base()
        finetune(model, entry.way(steps), data.facts(count, seed).batches(rows, 64, seed), steps, lr, seed, targets=PARTS.get(entry.only),
                 warmup=steps // 10, schedule="linear", progress=False)
        doublings.append([steps, round(bits_held(model, facts), 2)])
        if steps >= last or len(doublings) > 1 and doublings[-1][1] <= (1 + gain) * doublings[-2][1]:
            return {"steps": steps, "held": doublings[-1][1], "doublings": doublings, "parameters": trainable_parameters(model)}
        steps *= 2


def film(steps: int = 200, frames: int = 8, task: str = "voice", seed: int = 0) -> dict:
    """AdaLoRA on a task: at `frames` moments, how many triplets each layer keeps; and the budget at each step. The moments are the start, the
    end, and between them those at which the budget has lost its next equal part.

    Returns {"steps": [...], "names": [...], "kept": [[per layer] per frame], "budget": [per step], "most": initial rank}.
    """
    model, method = load_base(), make_method("adalora", steps=steps)
    kept = []

    def look(model) -> float:
        kept.append([int(layer.kept.sum()) for _, layer in adapters(model)])
        return 0.0

    finetune(model, method, data.TASKS[task]().batches(16, 64, seed), steps, RATES["adalora"], seed, evaluate=look, evaluate_every=1,
             warmup=steps // 10, schedule="linear", progress=False)
    names = [name for name, _ in adapters(model)]
    budget = [method.budget(step, len(names)) for step in range(steps)]
    lost = [(budget[0] - budget[-1]) * part / (frames - 2) for part in range(1, frames - 1)]
    moments = [0, *(next(step for step in range(steps) if budget[0] - budget[step] >= loss) + 1 for loss in lost), steps]      # kept[k]: after k steps
    return {"steps": moments, "names": names, "kept": [kept[moment] for moment in moments], "budget": budget, "most": method.initial_rank}
