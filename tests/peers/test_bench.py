"""benchmarks/bench.py compares like with like: in each pair PEFT's model is the same method, with as many trained numbers and the same loss."""

import sys
from pathlib import Path

import peft
import pytest
import torch

import minilora as ml

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import bench

WITHOUT = ("delta-lora", "lora-drop")                     # PEFT has not these
IDS = bench.batch(2, 16)


def pair(name):
    one = bench.PAIRS[name]
    return bench.Ours(one.ours, bench.base(64, 2, 16)), bench.Theirs(one, bench.base(64, 2, 16))


def loss(side):
    """In training mode: B = 0 hides dropout at the start, and in eval mode bitsandbytes turns its weights into 16 bits."""
    with torch.no_grad():
        return ml.next_byte_loss(side.model.train(), IDS[:, :-1], IDS[:, 1:]).item()


@pytest.mark.parametrize("name", [name for name in bench.PAIRS if name not in WITHOUT])
def test_both_train_as_many_numbers_and_begin_at_one_loss(name):
    ours, theirs = pair(name)
    trained = [sum(p.numel() for p in side.model.parameters() if p.requires_grad) for side in (ours, theirs)]
    assert trained[0] == trained[1] > 0
    assert isinstance(theirs.model, peft.PeftModel) and len(list(ml.adapters(ours.model))) == 12
    if name != "loftq":                                   # which does not start at its 4-bit base
        near = 1e-5 if name == "qlora" else 1e-6         # the scales' mean is taken in float64 here, there in float32
        assert loss(ours) == pytest.approx(loss(theirs), rel=near)
    before = loss(ours), loss(theirs)
    for side in (ours, theirs):
        for _ in range(12):
            side.step(IDS)
    assert loss(ours) < before[0] and loss(theirs) < before[1] and ours.done == theirs.done == 12


@pytest.mark.parametrize("name", WITHOUT)
def test_what_peft_has_not_stands_beside_its_lora(name):
    ours, theirs = pair(name)
    assert theirs.config is bench.LORA
    ours.step(IDS), theirs.step(IDS)


def test_the_optimizers_are_those_that_the_page_names():
    assert type(pair("lora-fa-projected")[1].optimizer).__name__ == "LoraFAOptimizer"
    rates = [{group["lr"] for group in side.optimizer.param_groups if group["params"]} for side in pair("lora-plus")]
    assert rates == [{bench.LR, 16 * bench.LR}] * 2


def test_ratios_are_of_ours_to_theirs_and_who_goes_first_alternates():
    order = []

    def clock(one):
        order.append(one)
        return {"ours": 3.0, "theirs": 2.0}[one] + (one == "ours" and len(order) < 3) * 100      # the first round is slow, and not counted

    assert bench.ratios("ours", "theirs", 2, clock) == [1.5, 1.5, 1.5]
    assert order == ["theirs", "ours", "ours", "theirs", "theirs", "ours"]


def test_a_slope_is_the_exponent():
    assert bench.slope((8, 16, 64), [3 * size**0.7 for size in (8, 16, 64)]) == pytest.approx(0.7, abs=1e-12)


def test_bitsandbytes_layers_stand_in_every_place_of_the_blocks():
    model = bench.in_four_bits(bench.base(64, 1))
    kinds = [type(module).__name__ for module in model.blocks.modules() if hasattr(module, "in_features")]
    assert kinds == ["Linear4bit"] * 6 and model.blocks[0].mlp.up_proj.weight.quant_type == "nf4"


@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("name", ["lora", "lora-dropout", "rslora", "lora-fa", "vera", "adalora", "dora", "pissa"])
def test_no_more_bytes_are_alive_for_backward_than_in_peft(width, name):
    one, ids = bench.PAIRS[name], bench.batch(4, 64)
    sides = bench.Ours(one.ours, bench.base(width, 2)), bench.Theirs(one, bench.base(width, 2))
    mine, peers = (bench.bytes_alive(side.model, lambda: ml.next_byte_loss(side.model, ids[:, :-1], ids[:, 1:])) for side in sides)
    assert 0 < mine <= (0.76 * peers if name == "dora" else peers)       # 0.737 at width 512, six layers
