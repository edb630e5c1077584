"""How much faster should B learn on the tiny GPT? Writes results.json beside this file, which the notebook reads.

    run       60 steps on 8 windows of 64 bytes of the task `voice`, LoRA of rank 8 and alpha 8 on the 24 linears, Adam, no decay,
              6 steps of warm-up, then linearly to 0
    search    for each ratio its own rate: steps by a factor of 2 from a guess, on until the best rate has a worse one on both sides.
              Two seeds that no report uses, scored on a held-out part that no report uses (`voice.choosing()`)
    report    each ratio at its rate, and what "alpha is a learning rate" promises to be the same; six other seeds, the other part

A seed means the same A and the same batches for every ratio, so differences are paired. Losses are nats per byte. A run is never made
twice: stopped, the same command goes on. About six minutes on one core.
"""

import json
import math
import os
from pathlib import Path

import torch

import minilora as ml
from lessons.rates import best_power

RESULTS = Path(__file__).with_name("results.json")
STEPS, ROWS, CONTEXT, RANK, ALPHA = 60, 8, 64, 8, 8.0
RATIOS = (0.25, 1.0, 4.0, 16.0, 64.0)
SEARCH_SEEDS, SEEDS = (1000, 1001), range(6)
GUESS = 0.016                                    # for ratio 1; for ratio c it is divided by √c


def run(part: str, ratio: float, lr: float, seed: int) -> dict:
    """One record: the loss held out, and the training loss as means of ten steps. lr is A's rate, B's is ratio · lr."""
    voice = ml.data.voice()
    method = ml.LoRAPlus(rank=RANK, alpha=ALPHA, ratio=ratio)
    held_out = (voice.choosing() if part == "search" else voice).held_out(CONTEXT + 1)
    model, record = ml.load_base(), {"part": part, "ratio": ratio, "lr": lr, "seed": seed}
    try:
        history = ml.finetune(model, method, voice.batches(ROWS, CONTEXT, seed), STEPS, lr, seed, warmup=STEPS // 10, schedule="linear", progress=False)
        loss = ml.held_out_loss(model, held_out)
    except FloatingPointError:
        loss = math.nan
    if not math.isfinite(loss):
        return record | {"held_out": None, "training": None}
    return record | {"held_out": round(loss, 5), "training": [round(sum(history["loss"][i:i + 10]) / 10, 4) for i in range(0, STEPS, 10)]}


class Records:
    """results.json, a line a run, written whole after each."""

    def __init__(self, path: Path):
        self.path, self.runs = path, json.loads(path.read_text())["runs"] if path.exists() else []

    def loss(self, part: str, ratio: float, lr: float, seed: int) -> float:
        """The held-out loss of this run, made now if it was not made before; infinite where it diverged."""
        key = {"part": part, "ratio": ratio, "lr": lr, "seed": seed}
        record = next((r for r in self.runs if key.items() <= r.items()), None)
        if record is None:
            record = run(part, ratio, lr, seed)
            self.runs.append(record)
            self.write()
            print(record, flush=True)
        return math.inf if record["held_out"] is None else record["held_out"]

    def write(self) -> None:
        about = {"command": "python lessons/03_lora_plus/experiment.py", "torch": torch.__version__, "steps": STEPS, "rows": ROWS,
                 "context": CONTEXT, "rank": RANK, "alpha": ALPHA, "nats_per_byte": "held_out, training"}
        lines = ",\n".join(json.dumps(record) for record in self.runs)
        half = self.path.with_suffix(".part")
        half.write_text(f'{{\n"about": {json.dumps(about)},\n"runs": [\n{lines}\n]\n}}\n')
        os.replace(half, self.path)


def best_rate(records: Records, ratio: float) -> float:
    """The rate with the least mean loss over the two seeds of the search, with a worse neighbour on both sides."""
    def score(power: int) -> float:
        return sum(records.loss("search", ratio, rate(power), seed) for seed in SEARCH_SEEDS) / len(SEARCH_SEEDS)

    def rate(power: int) -> float:
        return GUESS * 2.0**power

    return rate(best_power(score, start=-round(math.log2(ratio) / 2)))


def main() -> None:
    torch.set_num_threads(1)
    records = Records(RESULTS)
    rates = {ratio: best_rate(records, ratio) for ratio in RATIOS}
    print("rate of A, chosen for each ratio:", rates)
    # Were alpha a learning rate, alpha · c at rate / c would be the run it started from. Under Adam alpha · c is ratio c.
    points = [*rates.items(), *((c, rates[1.0] / c) for c in (4.0, 16.0) if rates[1.0] / c != rates[c])]
    for seed in SEEDS:
        for ratio, lr in points:
            records.loss("report", ratio, lr, seed)


if __name__ == "__main__":
    main()
