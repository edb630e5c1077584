"""Four roads out of W on the tiny GPT: how far does each lead, and what does W + dW look like there? Writes results.json beside this file.

    run       40 steps on 8 windows of 64 bytes of the task `voice`, on the 24 linears, AdamW without decay, the rate falling linearly to 0
    search    for each traveller its own rate: steps by a factor of 2 from a guess, on until the best rate has a worse one on both sides.
              Seeds 1000 and 1001, which no report uses, scored on a held-out part that no report uses (`voice.choosing()`)
    roads     each traveller at its rate, seeds 0 to 4: the loss held out, what was forgotten, the spectrum of dW, and its intruders
    scales    LoRA of ranks 1, 8 and 64 at alpha 8, with s = alpha / r and with s = alpha / √r: the search once more
    kept      the same at two rates, seeds 0 to 2: each rank's own, and the one that was chosen for rank 1, where the two scales are one

A seed is one of the random A, where there is one, and of the order of the batches. Losses are nats per byte. A run is never made twice:
stopped, the same command goes on. About ten minutes on one core.
"""

import json
import math
import os
from pathlib import Path

import torch
from torch import Tensor, nn

import minilora as ml
from lessons.rates import best_power

RESULTS = Path(__file__).with_name("results.json")
STEPS, ROWS, CONTEXT = 40, 8, 64
ROADS = {"full": ml.FullFineTuning(), "LoRA 8": ml.LoRA(8, alpha=16.0), "DoRA 8": ml.DoRA(8, alpha=16.0), "PiSSA 8": ml.PiSSA(8),
         "LoRA 64": ml.LoRA(64, alpha=16.0), "rsLoRA 64": ml.LoRA(64, alpha=16.0, rslora=True)}
GUESS = {"full": 0.002, "LoRA 8": 0.008, "DoRA 8": 0.008, "PiSSA 8": 0.004, "LoRA 64": 0.008, "rsLoRA 64": 0.002,
         "alpha/r 1": 0.008, "alpha/r 8": 0.016, "alpha/r 64": 0.016, "alpha/√r 8": 0.008, "alpha/√r 64": 0.008}
RANKS = 1, 8, 64
RANKED = {f"{'alpha/√r' if rslora else 'alpha/r'} {rank}": ml.LoRA(rank, alpha=8.0, rslora=rslora)
          for rslora in (False, True) for rank in RANKS if rank > 1 or not rslora}                    # at rank 1 the two are one
SEARCH, SEEDS = (1000, 1001), range(5)
TOP, THRESHOLDS, LENGTHS = 10, (0.4, 0.5, 0.6, 0.7, 0.8), (0.05, 0.1, 0.2, 0.4)


def run(part: str, who: str, lr: float, seed: int) -> dict:
    """One record: the loss held out, and for `roads` what W + dW looks like."""
    method = (ROADS | RANKED)[who]
    voice = ml.data.voice()
    model = ml.load_base()
    torch.manual_seed(seed)
    ml.adapt(model, method)
    record = {"part": part, "who": who, "lr": lr, "seed": seed, "held_out": None}
    try:
        ml.finetune(model, method, voice.batches(ROWS, CONTEXT, seed), STEPS, lr, schedule="linear", progress=False)
        loss = ml.held_out_loss(model, (voice.choosing() if part in ("search", "scales") else voice).held_out(CONTEXT + 1))
        if math.isfinite(loss):
            record["held_out"] = round(loss, 5)
    except FloatingPointError:
        return record
    if part == "roads":
        record |= looks(model)
    return record


@torch.no_grad()
def looks(model: nn.Module) -> dict:
    """What was forgotten (nats per byte lost on the tiny world), and of the 24 layers: ‖dW‖ / ‖W‖, the singular values of dW over the largest
    of W (both means), and how many of W + dW's first ten directions are intruders, by threshold; at 0.6 also with dW set to other lengths."""
    base, world = ml.load_base(), ml.data.world().held_out(CONTEXT + 1)
    layers = [(W, dW) for W, dW in ((W.double(), change(model, name)) for name, W in linears(base).items())]
    return {"forgotten": round(ml.held_out_loss(model, world) - ml.held_out_loss(base, world), 5),
            "length": round(sum((dW.norm() / W.norm()).item() for W, dW in layers) / len(layers), 5),
            "spectrum": [float(f"{value:.4g}") for value in sum(torch.linalg.svdvals(dW) / torch.linalg.matrix_norm(W, 2) for W, dW in layers) / len(layers)],
            "intruders": {str(threshold): sum(intruders(W, dW, threshold) for W, dW in layers) for threshold in THRESHOLDS},
            "at_length": {str(length): sum(intruders(W, length * W.norm() / dW.norm() * dW, 0.6) for W, dW in layers) for length in LENGTHS}}


def linears(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in model.state_dict().items() if name.endswith("_proj.weight")}


def change(model: nn.Module, name: str) -> Tensor:
    """dW of one layer in float64, of an adapted model or of one whose W itself was trained."""
    layer = model.get_submodule(name.removesuffix(".weight"))
    return layer.delta_weight().double() if isinstance(layer, ml.Adapter) else layer.weight.double() - linears(ml.load_base())[name].double()


def intruders(W: Tensor, dW: Tensor, threshold: float) -> int:
    """Of the first ten left singular vectors of W + dW, those whose largest |cosine| with any of W's is below the threshold."""
    U, new = (torch.linalg.svd(M, full_matrices=False)[0] for M in (W, W + dW))
    return int(((U.T @ new[:, :TOP]).abs().amax(0) < threshold).sum())


class Records:
    """results.json, a line a run, written whole after each."""

    def __init__(self, path: Path):
        self.path, self.runs = path, json.loads(path.read_text())["runs"] if path.exists() else []

    def loss(self, part: str, who: str, lr: float, seed: int) -> float:
        """The held-out loss of the run with these arguments, made now if it was not made before; infinite where it diverged."""
        key = (part, who, lr, seed)
        record = next((r for r in self.runs if (r["part"], r["who"], r["lr"], r["seed"]) == key), None)
        if record is None:
            record = run(*key)
            self.runs.append(record)
            self.write()
            print(*key, record["held_out"], flush=True)
        return math.inf if record["held_out"] is None else record["held_out"]

    def write(self) -> None:
        about = {"command": "python lessons/11_beyond/experiment.py", "torch": torch.__version__, "steps": STEPS, "rows": ROWS, "context": CONTEXT,
                 "nats_per_byte": ["held_out", "forgotten"], "top": TOP}
        lines = ",\n".join(json.dumps(record) for record in self.runs)
        half = self.path.with_suffix(".part")
        half.write_text(f'{{\n"about": {json.dumps(about)},\n"runs": [\n{lines}\n]\n}}\n')
        os.replace(half, self.path)


def best_rate(records: Records, part: str, who: str) -> float:
    """The rate with the least mean loss over the two seeds of the search, with a worse neighbour on both sides."""
    def rate(power: int) -> float:
        return GUESS[who] * 2.0**power

    def score(power: int) -> float:
        return sum(records.loss(part, who, rate(power), seed) for seed in SEARCH) / len(SEARCH)

    return rate(best_power(score))


def main() -> None:
    torch.set_num_threads(1)
    records = Records(RESULTS)
    for who in ROADS:
        lr = best_rate(records, "search", who)
        for seed in SEEDS:
            records.loss("roads", who, lr, seed)
    rates = {who: best_rate(records, "scales", who) for who in RANKED}
    print("rate chosen for each:", rates)
    for who, lr in rates.items():
        for rate in sorted({lr, rates["alpha/r 1"]}):
            for seed in SEEDS[:3]:
                records.loss("kept", who, rate, seed)


if __name__ == "__main__":
    main()
