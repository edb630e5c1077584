"""What is a throw of VeRA's dice worth on the tiny GPT? Writes results.json beside this file, which the notebook reads.

    run       40 steps on 8 windows of 64 bytes of the task `voice`, on the 24 linears, AdamW without decay, the rate falling linearly to 0
    search    for each bettor its own rate: steps by a factor of 2 from a guess, on until the best rate has a worse one on both sides.
              Two throws that no report uses, on other batches, scored on a held-out part that no report uses (`voice.choosing()`)
    throws    each bettor at its rate: ten throws of its random numbers, always the same batches, the other held-out part
    own       VeRA of rank 192 at the same rate, but each of the 24 layers throws an A and a B of its own: what does sharing cost?

A bettor is LoRA of rank 1 (its A is thrown, then trained) or VeRA of some rank (A and B are thrown, then frozen). A throw is a seed.
LoRA of rank 1 and VeRA of rank 192 train the same number of numbers: 9,216. Losses are nats per byte. A run is never made twice: stopped,
the same command goes on. About six minutes on one core.
"""

import json
import math
import os
from pathlib import Path

import torch

import minilora as ml
from lessons.rates import best_power

RESULTS = Path(__file__).with_name("results.json")
STEPS, ROWS, CONTEXT = 40, 8, 64
BETTORS = {"LoRA 1": (ml.LoRA, 1), "VeRA 12": (ml.VeRA, 12), "VeRA 48": (ml.VeRA, 48), "VeRA 192": (ml.VeRA, 192)}
GUESS = {ml.LoRA: 0.008, ml.VeRA: 0.128}
SEARCH, THROWS = (1000, 1001), range(10)


def run(part: str, bettor: str, lr: float, throw: int, order: int) -> dict:
    """One record: how many numbers were trained, and the loss held out. throw: the seed of the random matrices; order: of the batches."""
    kind, rank = BETTORS[bettor]
    method = ml.LoRA(rank, alpha=8.0) if kind is ml.LoRA else ml.VeRA(rank, seed=throw)
    voice = ml.data.voice()
    held_out = (voice.choosing() if part == "search" else voice).held_out(CONTEXT + 1)
    model = ml.load_base()
    torch.manual_seed(throw)                                             # LoRA's A is drawn from here, VeRA's matrices from their own seed
    ml.adapt(model, method)
    if part == "own":
        throw_for_each(model, method)
    trained = ml.trainable_parameters(model)
    try:
        ml.finetune(model, method, voice.batches(ROWS, CONTEXT, order), STEPS, lr, schedule="linear", progress=False)
        loss = ml.held_out_loss(model, held_out)
    except FloatingPointError:
        loss = math.nan
    return {"part": part, "bettor": bettor, "lr": lr, "throw": throw, "order": order, "trained": trained,
            "held_out": round(loss, 5) if math.isfinite(loss) else None}


def throw_for_each(model: torch.nn.Module, method: ml.VeRA) -> None:
    """In place: each layer's A and B from a seed that no other layer has. As wide and as tall as the shared ones were, so of the same scale."""
    for i, (_, layer) in enumerate(ml.adapters(model)):
        own = ml.VeRA(method.rank, seed=1000 * (method.seed + 1) + i).projections(layer.A.shape[1], layer.B.shape[0])
        layer.A, layer.B = (torch.nn.Parameter(M, requires_grad=False) for M in own)


class Records:
    """results.json, a line a run, written whole after each."""

    def __init__(self, path: Path):
        self.path, self.runs = path, json.loads(path.read_text())["runs"] if path.exists() else []

    def loss(self, *key) -> float:
        """The held-out loss of the run with these arguments, made now if it was not made before; infinite where it diverged."""
        record = next((r for r in self.runs if (r["part"], r["bettor"], r["lr"], r["throw"], r["order"]) == key), None)
        if record is None:
            record = run(*key)
            self.runs.append(record)
            self.write()
            print(record, flush=True)
        return math.inf if record["held_out"] is None else record["held_out"]

    def write(self) -> None:
        about = {"command": "python lessons/05_vera/experiment.py", "torch": torch.__version__, "steps": STEPS, "rows": ROWS, "context": CONTEXT,
                 "nats_per_byte": "held_out"}
        lines = ",\n".join(json.dumps(record) for record in self.runs)
        half = self.path.with_suffix(".part")
        half.write_text(f'{{\n"about": {json.dumps(about)},\n"runs": [\n{lines}\n]\n}}\n')
        os.replace(half, self.path)


def best_rate(records: Records, bettor: str) -> float:
    """The rate with the least mean loss over the two throws of the search, with a worse neighbour on both sides."""
    def rate(power: int) -> float:
        return GUESS[BETTORS[bettor][0]] * 2.0**power

    def score(power: int) -> float:
        return sum(records.loss("search", bettor, rate(power), seed, seed) for seed in SEARCH) / len(SEARCH)

    return rate(best_power(score))


def main() -> None:
    torch.set_num_threads(1)
    records = Records(RESULTS)
    rates = {bettor: best_rate(records, bettor) for bettor in BETTORS}
    print("rate chosen for each:", rates)
    for throw in THROWS:
        for bettor, lr in rates.items():
            records.loss("throws", bettor, lr, throw, 0)
    for throw in THROWS:
        records.loss("own", "VeRA 192", rates["VeRA 192"], throw, 0)


if __name__ == "__main__":
    main()
