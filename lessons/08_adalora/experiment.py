"""Who cuts best on the tiny GPT? Writes results.json beside this file, which the notebook reads.

    shoot     40 steps of AdaLoRA, initial rank 6, on 8 windows of 64 bytes of the task `voice`, and no cut: 24 layers with 6 triplets each, 144
    say       then each triplet is looked at: its importance (Ī U, smoothed, as in the paper), the same of this step alone (|lam · dL/dlam|), its
              size (‖dW‖ of this triplet alone, without s), and its price: how much the held-out loss rises while it alone is out (lam_k = 0), on a
              held-out part that no report uses (`voice.choosing()`). The same price for whole layers
    estimate  after the same 40 steps: −lam_k · dL/dlam_k, with L the very loss that the price is taken from: what the first derivative says of each price
    cut       each editor keeps 48 of the 144, an average of 2 a layer, at once; the held-out loss right after that cut, and after 60 further steps
              in which what was cut stays cut
    none      60 further steps, and nobody cuts
    gradual   60 further steps of AdaLoRA itself: the budget falls from 144 to 48 over the next 40, a cut every 5, what was cut may come back
    two       nobody cuts: 100 steps with rank 2 in every layer from the start, and the same s
    rates     `two`, and AdaLoRA from the first step to the last as in `gradual`, at 0.015, 0.06 and 0.12 as well; seeds 0 and 1
    penalty   40 steps without a cut, with the orthogonality penalty weighed 0, 0.1 and 1. Afterwards: the mean of ‖PᵀP − 1‖ and ‖QQᵀ − 1‖; and `overlap`,
              Σ ‖dW‖² over the sum of each triplet's own ‖·‖², which is 1 where triplets stand at right angles. Seeds 0, 1, 2
    revival   60 steps of AdaLoRA without a warm-up, 15 of them final, with a cut every 1, 5 or 15 steps: how many of the 144 were cut at some cut before
              the last (`cut_before`), and how many of these stay in at the end (`returned`). Seeds 0, 1, 2

An editor sees what `say` saw, no more: `importance`, `size`, `price` keep the largest, `lot` draws; `fair` keeps the two most important of each layer.
All but `two`, `rates`, `penalty` and `revival` start from the same model and the same moments of AdamW, and all read the same batches, so that
differences are paired by seed. One rate, 0.03, for all but `rates`, falling linearly to 0. Losses are nats per byte. A run is never made twice:
stopped, the same command goes on. About ten minutes on one core.
"""

import copy
import json
import os
from pathlib import Path

import torch
from torch import Tensor

import minilora as ml

RESULTS = Path(__file__).with_name("results.json")
STEPS, WARM_UP, FINAL, INTERVAL = 100, 40, 20, 5
ROWS, CONTEXT, RANK, TARGET, ALPHA, LR = 8, 64, 6, 2, 8.0, 0.03
SEEDS = range(5)
EDITORS = ("importance", "size", "price", "fair", "lot")


class Run:
    """One seed's model, its optimizer, and how far it has come."""

    def __init__(self, seed: int, lr: float = LR, **others):
        self.method = ml.AdaLoRA(**{"initial_rank": RANK, "target_rank": TARGET, "alpha": ALPHA, "total_steps": STEPS, "warmup_steps": WARM_UP - 1,
                                    "final_steps": FINAL, "interval": INTERVAL} | others)
        torch.manual_seed(seed)
        self.model = ml.adapt(ml.load_base(), self.method)
        self.optimizer = torch.optim.AdamW(self.method.parameter_groups(self.model, lr))
        self.voice, self.seed, self.lr = ml.data.voice(), seed, lr

    @property
    def layers(self) -> list[ml.AdaLoRALinear]:
        return [layer for _, layer in ml.adapters(self.model)]

    def train(self, steps: range, mask: Tensor | None = None, cuts: bool = False) -> None:
        """mask: (r, layers), what stays in; cuts: AdaLoRA cuts by itself."""
        batches = self.voice.batches(ROWS, CONTEXT, self.seed)
        for step in steps:
            self.optimizer.param_groups[0]["lr"] = self.lr * (1 - step / self.method.total_steps)
            self.optimizer.zero_grad()
            (ml.next_byte_loss(self.model, *batches(step)) + self.method.penalty(self.model)).backward()
            self.optimizer.step()
            if cuts:
                self.method.after_step(self.model, step)
            else:
                self.judge()
            if mask is not None:
                self.cut(mask)

    @torch.no_grad()
    def judge(self) -> None:
        for layer in self.layers:
            layer.met("after_step")
            layer.judge(self.method.beta1, self.method.beta2)

    @torch.no_grad()
    def cut(self, mask: Tensor) -> None:
        for layer, kept in zip(self.layers, mask.unbind(dim=1)):
            layer.lam.masked_fill_(~kept, 0.0)

    def branch(self) -> "Run":
        """The same run once more, which may go another way."""
        other = copy.copy(self)
        other.model = copy.deepcopy(self.model)
        other.optimizer = torch.optim.AdamW(other.method.parameter_groups(other.model, other.lr))
        other.optimizer.load_state_dict(copy.deepcopy(self.optimizer.state_dict()))
        return other

    def loss(self, windows: Tensor | None = None) -> float:
        return ml.held_out_loss(self.model, self.voice.held_out(CONTEXT + 1) if windows is None else windows)


def estimate(run: Run) -> list[list]:
    """(r, layers): by how much the loss would rise without the triplet, were it a straight line in lam."""
    windows = run.voice.choosing().held_out(CONTEXT + 1)[:24]
    loss = ml.next_byte_loss(run.model, windows[:, :-1], windows[:, 1:])
    slopes = torch.autograd.grad(loss, [layer.lam for layer in run.layers])
    found = torch.stack([-layer.lam.detach() * slope for layer, slope in zip(run.layers, slopes)], dim=1)
    return [[float(f"{number:.5g}") for number in row] for row in found.tolist()]


@torch.no_grad()
def say(run: Run) -> dict[str, list]:
    """{what: one row for each k, with one number for each layer}; price_of_layer: one number for each layer."""
    layers = run.layers
    found = {"importance": torch.stack([layer.importance() for layer in layers], dim=1),
             "of lam alone": torch.stack([layer.sensitivity_lam * layer.uncertainty_lam for layer in layers], dim=1),
             "this step": torch.stack([(layer.lam * layer.lam.grad).abs() for layer in layers], dim=1),
             "size": torch.stack([layer.lam.abs() * layer.P.norm(dim=0) * layer.Q.norm(dim=1) for layer in layers], dim=1)}
    windows = run.voice.choosing().held_out(CONTEXT + 1)[:24]
    whole, prices = run.loss(windows), torch.zeros(RANK + 1, len(layers))
    for i, layer in enumerate(layers):
        for k in range(RANK + 1):                                        # the last: all of the layer's
            out = torch.arange(RANK) == k if k < RANK else torch.ones(RANK, dtype=torch.bool)
            lam = layer.lam.clone()
            layer.lam.masked_fill_(out, 0.0)
            prices[k, i] = run.loss(windows) - whole
            layer.lam.copy_(lam)
    found |= {"price": prices[:-1], "price of layer": prices[-1:]}
    return {what: [[float(f"{number:.5g}") for number in row] for row in numbers.tolist()] for what, numbers in found.items()}


def choose(editor: str, said: dict[str, list], seed: int) -> Tensor:
    """(r, layers), bool: the 48 that stay in."""
    layers = len(said["importance"][0])
    if editor == "fair":
        best = torch.tensor(said["importance"]).argsort(dim=0, descending=True)[:TARGET]                      # (2, layers)
        return torch.zeros(RANK, layers, dtype=torch.bool).scatter_(0, best, True)
    votes = torch.rand(RANK, layers, generator=torch.Generator().manual_seed(seed)) if editor == "lot" else torch.tensor(said[editor])
    mask = torch.zeros(RANK * layers, dtype=torch.bool)
    mask[votes.flatten().argsort(descending=True, stable=True)[:TARGET * layers]] = True
    return mask.view(RANK, layers)


@torch.no_grad()
def angles(run: Run) -> dict[str, float]:
    """How far from orthonormal, and how much the triplets overlap."""
    alone = sum((layer.lam.square() * layer.P.square().sum(0) * layer.Q.square().sum(1)).sum().item() for layer in run.layers)
    together = sum((layer.delta_weight() / layer.scale).square().sum().item() for layer in run.layers)
    return {"distance": round(ml.AdaLoRA(RANK, orthogonal_weight=1.0).penalty(run.model).item(), 4), "overlap": round(together / alone, 5)}


def revival(run: Run) -> dict[str, int]:
    """What was cut and stays in at the end all the same."""
    masks, last_cut = [], run.method.last_cut
    for step in range(run.method.total_steps):
        run.train(range(step, step + 1), cuts=True)
        if 0 < step <= last_cut and step % run.method.interval == 0:     # each interval divides last_cut
            masks.append(torch.stack([layer.mask.clone() for layer in run.layers], dim=1))
    cut_before = ~torch.stack(masks[:-1]).all(0)                         # (r, layers)
    return {"cuts": len(masks), "cut_before": int(cut_before.sum()), "returned": int((cut_before & masks[-1]).sum())}


class Records:
    """results.json, a line a record, written whole after each."""

    def __init__(self, path: Path):
        self.path, self.runs = path, json.loads(path.read_text())["runs"] if path.exists() else []

    def find(self, part: str, seed: int) -> dict | None:
        return next((record for record in self.runs if (record["part"], record["seed"]) == (part, seed)), None)

    def add(self, record: dict) -> None:
        self.runs.append(record)
        about = {"command": "python lessons/08_adalora/experiment.py", "torch": torch.__version__, "steps": STEPS, "cut_at": WARM_UP, "rows": ROWS,
                 "context": CONTEXT, "initial_rank": RANK, "kept_per_layer": TARGET, "alpha": ALPHA, "lr": LR,
                 "nats_per_byte": ["price", "estimate", "cut", "end"]}
        lines = ",\n".join(json.dumps(each) for each in self.runs)
        half = self.path.with_suffix(".part")
        half.write_text(f'{{\n"about": {json.dumps(about)},\n"runs": [\n{lines}\n]\n}}\n')
        os.replace(half, self.path)
        print({key: value for key, value in record.items() if not isinstance(value, list)}, flush=True)


def main() -> None:
    torch.set_num_threads(1)
    records = Records(RESULTS)
    for seed in SEEDS:
        if not records.find("two", seed):
            run = Run(seed, initial_rank=TARGET, alpha=ALPHA * TARGET / RANK)
            run.train(range(STEPS))
            records.add({"part": "two", "seed": seed, "end": round(run.loss(), 5)})
        for lr in (0.015, 0.06, 0.12) if seed < 2 else ():
            for part, fields in (("two", {"initial_rank": TARGET, "alpha": ALPHA * TARGET / RANK}), ("gradual", {})):
                if not records.find(f"{part} at {lr}", seed):
                    run = Run(seed, lr, **fields)
                    run.train(range(STEPS), cuts=part == "gradual")
                    records.add({"part": f"{part} at {lr}", "seed": seed, "end": round(run.loss(), 5)})
        for weight in (0.0, 0.1, 1.0) if seed < 3 else ():
            if not records.find(f"penalty {weight}", seed):
                run = Run(seed, orthogonal_weight=weight, total_steps=WARM_UP, warmup_steps=0, final_steps=0)
                run.train(range(WARM_UP))
                records.add({"part": f"penalty {weight}", "seed": seed, **angles(run), "end": round(run.loss(), 5)})
        for interval in (1, 5, 15) if seed < 3 else ():
            if not records.find(f"revival {interval}", seed):
                run = Run(seed, total_steps=60, warmup_steps=0, final_steps=15, interval=interval)
                records.add({"part": f"revival {interval}", "seed": seed, **revival(run), "end": round(run.loss(), 5)})
        if all(records.find(part, seed) for part in ("say", "estimate", "none", "gradual", *EDITORS)):
            continue
        shot = Run(seed)
        names = [name for name, _ in ml.adapters(shot.model)]
        shot.train(range(WARM_UP))
        if not records.find("say", seed):
            records.add({"part": "say", "seed": seed, "layers": names, "loss": round(shot.loss(), 5), **say(shot)})
        if not records.find("estimate", seed):
            records.add({"part": "estimate", "seed": seed, "estimate": estimate(shot)})
        for part in ("none", "gradual", *EDITORS):
            if records.find(part, seed):
                continue
            run, mask = shot.branch(), choose(part, records.find("say", seed), seed) if part in EDITORS else None
            record = {"part": part, "seed": seed}
            if mask is not None:
                run.cut(mask)
                record |= {"cut": round(run.loss(), 5), "kept": mask.sum(dim=0).tolist()}
            run.train(range(WARM_UP, STEPS), mask, cuts=part == "gradual")
            if part == "gradual":
                record["kept"] = [int(layer.kept.sum()) for layer in run.layers]
            records.add(record | {"end": round(run.loss(), 5)})


if __name__ == "__main__":
    main()
