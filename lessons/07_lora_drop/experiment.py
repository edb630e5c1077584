"""Which layers should keep a pair of their own on the tiny GPT? Writes results.json beside this file, which the notebook reads.

    run        60 steps on 8 windows of 64 bytes of the task `voice`, on the 24 linears, AdamW without decay, always at the rate 0.01. Nothing is searched
    LoRA       every layer has its own pair
    loudest    LoRA-drop: the layers of largest output importance keep theirs, until `threshold` is reached; 10 batches of warm-up, as ml.LoRADrop does it
    missed     in each kind as many layers as LoRA-drop kept, but those with the highest price of taking them out of the trained LoRA
    drawn      in each kind as many, drawn at random
    none       no layer keeps its own: one pair for each kind

The price is measured on a held-out part of its own (`voice.choosing()`), the loss reported on the other one. A seed fixes A, the batches and the draw.
Losses are nats per byte. A run is never made twice: stopped, the same command goes on. A few minutes on one core.
"""

import json
import os
from pathlib import Path
from random import Random

import torch

import minilora as ml
from minilora.adapter import swapped
from minilora.methods.lora_drop import kinds, share_pairs

RESULTS = Path(__file__).with_name("results.json")
STEPS, ROWS, CONTEXT, RANK, ALPHA, LR, WARM_UP = 60, 8, 64, 4, 8.0, 1e-2, 10
THRESHOLDS, SEEDS = (0.5, 0.7, 0.9), range(3)
VOICE = ml.data.voice()


def trained(method: ml.Method, seed: int, kept: set[str] | None = None) -> torch.nn.Module:
    """The base, adapted and trained; `kept`: the layers that have a pair of their own, where it is not the method that chooses them."""
    torch.manual_seed(seed)
    model = ml.adapt(ml.load_base(), method)
    if kept is not None:
        share_pairs(dict(ml.adapters(model)), kept)
    ml.finetune(model, method, VOICE.batches(ROWS, CONTEXT, seed), STEPS, LR, seed=seed, progress=False)
    return model


def prices(model: torch.nn.Module) -> dict[str, float]:
    """What the loss rises by when one adapter is out, on the part for choosing."""
    windows = VOICE.choosing().held_out(129)[:24]
    whole, found = ml.held_out_loss(model, windows), {}
    for name, layer in ml.adapters(model):
        with swapped(model, {name: layer.base}):
            found[name] = ml.held_out_loss(model, windows) - whole
    return found


def record(seed: int, arm: str, threshold: float, model: torch.nn.Module) -> dict:
    own = [name for name, layer in ml.adapters(model) if not hasattr(layer, "own") or layer.own]
    return {"seed": seed, "arm": arm, "threshold": threshold, "trained": ml.trainable_parameters(model),
            "held_out": round(ml.held_out_loss(model, VOICE.held_out(129)[:64]), 5), "kept": own}


class Records:
    """results.json, a line a run, written whole after each."""

    def __init__(self, path: Path):
        self.path = path
        found = json.loads(path.read_text()) if path.exists() else {"runs": [], "prices": {}}
        self.runs, self.prices = found["runs"], found["prices"]

    def find(self, seed: int, arm: str, threshold: float) -> dict | None:
        return next((run for run in self.runs if (run["seed"], run["arm"], run["threshold"]) == (seed, arm, threshold)), None)

    def add(self, run: dict) -> None:
        self.runs.append(run)
        print({key: value for key, value in run.items() if key != "kept"}, f"{len(run['kept'])} kept", flush=True)
        about = {"command": "python lessons/07_lora_drop/experiment.py", "torch": torch.__version__, "steps": STEPS, "rows": ROWS, "context": CONTEXT,
                 "rank": RANK, "alpha": ALPHA, "lr": LR, "warm_up": WARM_UP, "nats_per_byte": "held_out, prices"}
        lines = ",\n".join(json.dumps(run) for run in self.runs)
        half = self.path.with_suffix(".part")
        half.write_text(f'{{\n"about": {json.dumps(about)},\n"prices": {json.dumps(self.prices)},\n"runs": [\n{lines}\n]\n}}\n')
        os.replace(half, self.path)


def chosen(arm: str, like: list[str], price: dict[str, float], seed: int) -> set[str]:
    """In each kind as many layers as `like` has there."""
    random, found = Random(f"drawn/{seed}"), set()
    layers = dict(ml.adapters(ml.adapt(ml.load_base(), ml.LoRADrop(RANK, ALPHA))))
    for names in kinds(layers):
        count = sum(name in like for name in names)
        found |= set(sorted(names, key=lambda name: -price[name])[:count] if arm == "missed" else random.sample(names, count))
    return found


def main() -> None:
    torch.set_num_threads(1)
    records = Records(RESULTS)
    for seed in SEEDS:
        if not records.find(seed, "LoRA", 1.0):
            model = trained(ml.LoRA(RANK, ALPHA), seed)
            records.prices[str(seed)] = {name: round(price, 5) for name, price in prices(model).items()}
            records.add(record(seed, "LoRA", 1.0, model))
        for threshold in THRESHOLDS:
            if not records.find(seed, "loudest", threshold):
                records.add(record(seed, "loudest", threshold, trained(ml.LoRADrop(RANK, ALPHA, threshold=threshold, warmup_steps=WARM_UP), seed)))
            like = records.find(seed, "loudest", threshold)["kept"]
            for arm in ("missed", "drawn"):
                if threshold < max(THRESHOLDS) and not records.find(seed, arm, threshold):
                    kept = chosen(arm, like, records.prices[str(seed)], seed)
                    records.add(record(seed, arm, threshold, trained(ml.LoRADrop(RANK, ALPHA), seed, kept)))
        if not records.find(seed, "none", 0.0):
            records.add(record(seed, "none", 0.0, trained(ml.LoRADrop(RANK, ALPHA), seed, set())))


if __name__ == "__main__":
    main()
