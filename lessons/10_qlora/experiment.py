"""How much of an update is left when it is merged into four bits? Writes results.json beside this file, which the notebook reads.

    run      40 steps on 8 windows of 64 bytes of the task `voice`: QLoRA of rank 8, alpha 16, no dropout, on the 24 linears of the shipped base,
             AdamW without decay, the rate falling linearly to 0
    merges   "trained"     the adapter beside its 4-bit base, not merged: what was trained
             "dense"       W̃ + dW in float32, W̃ the weight that the four bits stand for
             "four"        W̃ + dW in four bits again (ml.merge_nf4)
             "original"    W + dW in float32, W the base before it was quantized
             "again"       W + dW in four bits (ml.quantize)

Six learning rates make updates of six lengths; a seed gives A and the batches. Of each merge the held-out loss in nats per byte; of the two
into four bits also what is left of dW, ⟨D, dW⟩ / ‖dW‖², and ‖D − dW‖ / ‖dW‖, where D is what the layers gained on W̃; over all layers together.
A run is never made twice: stopped, the same command goes on. About five minutes on one core.
"""

import copy
import json
import os
import warnings
from pathlib import Path

import torch

import minilora as ml

RESULTS = Path(__file__).with_name("results.json")
STEPS, ROWS, CONTEXT, RANK, ALPHA = 40, 8, 64, 8, 16.0
RATES, SEEDS = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2), range(5)


@torch.no_grad()
def run(lr: float, seed: int) -> dict:
    """One record."""
    voice, method = ml.data.voice(), ml.QLoRA(RANK, alpha=ALPHA, dropout=0.0)
    held_out = voice.held_out(CONTEXT + 1)
    torch.manual_seed(seed)
    model = ml.adapt(ml.load_base(), method)
    with torch.enable_grad():
        ml.finetune(model, method, voice.batches(ROWS, CONTEXT, seed), STEPS, lr, schedule="linear", progress=False)

    original = ml.load_base()
    adapters, before = dict(ml.adapters(model)), {}
    for name, layer in adapters.items():
        before[name] = layer.base.dequantize(), layer.delta_weight()
        original.get_submodule(name).weight += before[name][1]
    merged = {"trained": model, "dense": ml.merge(copy.deepcopy(model)), "four": ml.merge_nf4(copy.deepcopy(model)), "original": original,
              "again": ml.quantize(copy.deepcopy(original))}
    record = {"lr": lr, "seed": seed, "length": length(before), "loss": {name: ml.held_out_loss(m, held_out) for name, m in merged.items()}}
    with ml.disabled(model):
        record["loss"]["base"] = ml.held_out_loss(model, held_out)
    for way in ("four", "again"):
        record[way] = arrived(before, {name: merged[way].get_submodule(name).dequantize() for name in adapters})
    return record


def length(before: dict) -> float:
    """‖dW‖ / ‖W̃‖ over all layers."""
    return (sum(dW.square().sum() for _, dW in before.values()) / sum(W.square().sum() for W, _ in before.values())).sqrt().item()


def arrived(before: dict, after: dict) -> dict:
    """What is left of dW, and how far from it the layers landed, over all layers."""
    along = sum(((after[name] - W) * dW).sum() for name, (W, dW) in before.items())
    off = sum((after[name] - W - dW).square().sum() for name, (W, dW) in before.items())
    whole = sum(dW.square().sum() for _, dW in before.values())
    return {"left": (along / whole).item(), "error": (off / whole).sqrt().item()}


def rounded(value):
    return {key: rounded(part) for key, part in value.items()} if isinstance(value, dict) else float(f"{value:.5g}") if isinstance(value, float) else value


def main() -> None:
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message="merging into four bits")
    runs = json.loads(RESULTS.read_text(encoding="utf-8"))["runs"] if RESULTS.exists() else []
    about = {"command": "python lessons/10_qlora/experiment.py", "torch": torch.__version__, "steps": STEPS, "rows": ROWS, "context": CONTEXT, "rank": RANK,
             "alpha": ALPHA, "loss": "nats per byte, held out"}
    for seed in SEEDS:
        for lr in RATES:
            if not any((done["lr"], done["seed"]) == (lr, seed) for done in runs):
                runs.append(rounded(run(lr, seed)))
                print(runs[-1], flush=True)
                half = RESULTS.with_suffix(".part")
                lines = ",\n".join(json.dumps(done) for done in runs)
                half.write_text(f'{{\n"about": {json.dumps(about)},\n"runs": [\n{lines}\n]\n}}\n', encoding="utf-8")
                os.replace(half, RESULTS)


if __name__ == "__main__":
    main()
