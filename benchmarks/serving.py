"""Serving several adapters: one mixed batch, beside one adapter after another and merging before each; bench.py runs it (--only serving).

A request is one row of `tokens` bytes through the model once; the batch's rows use the adapters in turn. Of the same batch:

    base          without adapters: the ceiling
    mixed         one pass, each row with its own adapter (minilora/scale/serving.py)
    one by one    for each adapter: put it on the model, and one pass of its rows
    merged        for each adapter: add its B A to a copy of W, and one pass of its rows

All four take turns in one run, and each share of base is of one round. Bytes: what is held beside the base, the adapters (mixed: stacked) and, where
one is merged, the new W that is made for it. One token is a step of decoding, where the products are as small as they get.
"""

import copy
import statistics
import tempfile
import time
from collections.abc import Callable

import torch
from torch import nn

import minilora as ml
from minilora.adapter import swapped
from minilora.scale.serving import rows, serve
from minilora.storage import read_adapter

MODELS = {"tiny GPT": ml.GPTConfig(), "width 512": ml.GPTConfig(width=512, layers=2, heads=8)}


def folders(base: nn.Module, count: int, rank: int, root: str) -> dict[str, str]:
    """So many LoRAs on every linear layer of the blocks, their B random."""
    made = {}
    for seed in range(count):
        torch.manual_seed(seed)
        for _, layer in ml.adapters(ml.adapt(base, ml.LoRA(rank))):
            nn.init.normal_(layer.B, std=0.02)
        made[f"a{seed}"] = str(ml.save_adapter(base, f"{root}/a{seed}"))
        ml.unload(base)
    return made


def merged(adapters: dict[str, ml.Adapter]) -> dict[str, nn.Linear]:
    """New layers with W + B A."""
    made = {}
    for name, adapter in adapters.items():
        made[name] = linear = nn.Linear(adapter.in_features, adapter.out_features, device="meta")
        linear.weight, linear.bias = nn.Parameter(adapter.base.weight + adapter.delta_weight(), requires_grad=False), adapter.base.bias
    return made


def ways(base: nn.Module, saved: dict[str, str], ids: torch.Tensor) -> tuple[dict[str, Callable[[], None]], dict[str, int]]:
    """What is timed, by name, and the bytes that it holds beside the base."""
    served = serve(copy.deepcopy(base), saved)
    alone = {name: read_adapter(base, folder)[0] for name, folder in saved.items()}
    for layer in (layer for adapters in alone.values() for layer in adapters.values()):
        layer.eval().requires_grad_(False)
    whose = [list(saved)[row % len(saved)] for row in range(len(ids))]
    groups = {name: ids[[row for row, owner in enumerate(whose) if owner == name]] for name in dict.fromkeys(whose)}

    def mixed():
        with rows(served, whose):
            served(ids)

    def one_by_one():
        for name, group in groups.items():
            with swapped(base, alone[name]):
                base(group)

    def merge_each():
        for name, group in groups.items():
            with swapped(base, merged(alone[name])):
                base(group)

    stacks = sum(tensor.nbytes for _, layer in ml.adapters(served) for tensor in (layer.A, layer.B))
    pairs = sum(tensor.nbytes for adapters in alone.values() for layer in adapters.values() for tensor in (layer.A, layer.B))
    copies = sum(layer.base.weight.nbytes for layer in alone[next(iter(alone))].values())
    return ({"base": lambda: base(ids), "mixed": mixed, "one by one": one_by_one, "merged": merge_each},
            {"base": 0, "mixed": stacks, "one by one": pairs, "merged": pairs + copies})


@torch.no_grad()
def seconds(run: Callable[[], None]) -> float:
    began = time.process_time()
    run()
    return time.process_time() - began


def measured(title: str, count: int, tokens: int, batch: int = 16, rank: int = 8, rounds: int = 9) -> dict[str, object]:
    """Of each way its share of base's requests a second, all of them a round's, and the bytes it holds."""
    torch.manual_seed(0)
    base, ids = ml.TinyGPT(MODELS[title]).eval(), torch.randint(256, (batch, tokens))
    with tempfile.TemporaryDirectory() as root:
        runs, held = ways(base, folders(base, count, rank, root), ids)
    for run in runs.values():
        seconds(run)                                                  # warms up
    took = [{way: seconds(runs[way]) for way in (list(runs) if turn % 2 else reversed(runs))} for turn in range(rounds)]
    return {"shares": {way: [turn["base"] / turn[way] for turn in took] for way in runs if way != "base"},
            "rate": batch / statistics.median(turn["base"] for turn in took), "held": {way: held[way] for way in runs if way != "base"}}
