"""The myths: every trial decides with room to spare, verdicts can turn, and the page says what the trials find. `pytest -m myth`: these alone."""

import copy
import inspect
import json
import math
import re
from functools import cache

import pytest
import torch
from torch import nn

import minilora as ml
from lessons import myths
from lessons.court import MYTHS, Line, Myth, card
from lessons.myths import FULL_RATES, LORA_RATES
from lessons.stage import FULL, LORA, fresh, in_four_bits, layers, sgd, thin, trained, trained_in_four_bits
from minilora.adapter import put

pytestmark = pytest.mark.myth
PAGE = myths.HERE / "myths.md"


@cache
def found(name: str) -> tuple[float, ...]:
    return MYTHS[name].measure()


@pytest.mark.parametrize("name", MYTHS)
def test_a_trial_decides(name):
    numbers = found(name)
    assert len(numbers) == len(MYTHS[name].lines) and all(map(math.isfinite, numbers))
    for line, number in zip(MYTHS[name].lines, numbers):
        assert not line.close(number), f"{line.what}: {number} is so near to {line.wanted} that another machine might judge otherwise"


def changed(make, change):
    """A copy of a model with something done to it."""
    model = copy.deepcopy(make())
    with torch.no_grad():
        change(model)
    return lambda: model


def one_weight_trained(model):
    model.requires_grad_(False)
    model.head.weight.requires_grad_(True).add_(1)


def each(do):
    return lambda model: [do(layer) for layer in layers(model)]


def orthogonal(layer):
    nn.init.orthogonal_(layer.A), nn.init.orthogonal_(layer.B, 0.1)


def without_the_shared(model):
    for name, layer in list(ml.adapters(model)):
        if not layer.own:
            put(model, name, layer.base)


def side_by_side(A1, B1, A2, B2):
    return torch.cat([B1, B2], 1) @ torch.cat([A1, A2])


def equal_shares():
    return torch.special.ndtri(torch.arange(1, 16, dtype=torch.float64) / 16).float()


# trial: the opposite of what is on trial, and what the verdict is then. A function without arguments is called when its turn comes.
TURNED = {
    "decomposes_w": (lambda: {"make": changed(trained, each(lambda layer: layer.base.weight.zero_()))}, "true"),
    "comes_from_an_svd": ({"method": ml.PiSSA(8)}, "true"),
    "trains_a_subset": (lambda: {"make": changed(ml.load_base, one_weight_trained)}, "true"),
    "only_b_moves": ({"wake": nn.init.normal_}, "half true"),
    "both_at_zero": ({"draw": nn.init.normal_}, "true"),
    "full_rank_is_full": ({"one": FULL}, "true"),
    "base_gets_smaller": ({"base": in_four_bits}, "half true"),
    "answers_faster": ({"change": lambda: thin(ml.load_base())}, "true"),
    "merged_is_free": ({"finish": lambda model: model}, "false"),
    "trains_faster": ({"ranks": (1, 2)}, "true"),
    "no_backward": ({"middle": False}, "true"),
    "converges_faster": ({"ours": (FULL, *FULL_RATES), "theirs": (LORA, *LORA_RATES)}, "true"),
    "b_at_random": ({"draw": nn.init.zeros_}, "true"),
    "ten_times_the_rate": ({"rate_of": lambda task, entry: {"lora": 1.0, "full": 0.4}[entry.method]}, "false"),
    "cannot_overfit": ({"fresh_text": True, "steps": 20}, "true"),
    "forgets_less": ({"rates": (1e-2, 1e-2)}, "true"),
    "rank_one_is_full": ({"steps": 800}, "true"),
    "alpha_is_a_rate": ({"optimizer": sgd}, "false"),
    "alpha_adds_parameters": ({"large": ml.LoRA(16)}, "true"),
    "twice_the_rank": ({"rates": (0.03, 0.03, 0.03)}, "false"),
    "no_retuning": ({"optimizers": (torch.optim.Adam, torch.optim.Adam)}, "true"),
    "rank_is_needed": (lambda: {"make": changed(fresh, each(orthogonal))}, "half true"),
    "q_and_v": ({"few": None, "r": 4}, "true"),
    "decay_pulls_back": ({"train": lambda layer: [layer.base.weight]}, "false"),
    "decomposes_four_bits": (lambda: {"make": changed(trained_in_four_bits, each(lambda layer: layer.base.codes.add_(1)))}, "half true"),
    "four_bits_are_faster": ({"base": ml.load_base}, "half true"),
    "equal_mass": (lambda: {"edges": equal_shares()}, "true"),
    "double_is_more_accurate": ({"one": {"block_size": 32}}, "true"),
    "nf4_is_best": ({"draws": (torch.rand, torch.rand)}, "false"),
    "four_bits_learn": ({"make": in_four_bits}, "false"),
    "raises_the_rank": ({"film": lambda: [part[::-1] for part in myths.film()]}, "true"),
    "delta_has_full_rank": ({"make": lambda: trained(FULL, 3e-3)}, "true"),
    "delta_is_alpha": ({"optimizer": sgd}, "false"),
    "fa_halves": ({"method": LORA}, "false"),
    "vera_is_tiny": ({"r": 1}, "true"),
    "vera_is_low_rank": ({"r": 64}, "true"),
    "rslora_is_alpha": ({"alpha": 5}, "false"),
    "drop_is_free": ({"change": without_the_shared}, "true"),
    "merging_approximates": ({"spoil": lambda model: changed(lambda: model, lambda model: model.blocks[0].mlp.up_proj.weight.zero_())()}, "true"),
    "merging_is_lossless": ({"ratio": 1e-8}, "false"),
    "subtracts_exactly": ({"back": lambda W, dW: W}, "true"),
    "base_comes_back": (lambda: {"make": changed(trained, each(lambda layer: layer.base.weight.add_(1)))}, "false"),
    "add_the_factors": ({"product": side_by_side}, "true"),
    "any_fine_tune": ({"tuned": ((1e-4, 3), (1e-4, 3))}, "true"),
    "resumes_alone": ({"way": "checkpoint"}, "true"),
    "file_is_its_factors": ({"method": ml.VeRA(256)}, "false"),
}


@pytest.mark.parametrize("name", TURNED)
def test_with_the_opposite_planted_the_verdict_turns(name):
    planted, verdict = TURNED[name]
    numbers = MYTHS[name].measure(**(planted() if callable(planted) else planted))
    assert MYTHS[name].verdict(numbers) == verdict != MYTHS[name].verdict(found(name)), numbers


def test_the_page_says_what_the_trials_find():
    """Word for word; a number that is the same everywhere digit for digit, one of training within its slack."""
    numbers, places = {name: found(name) for name in MYTHS}, []

    def show(case, i, text):
        places.append((case.name, i))
        return f"\0{len(places) - 1}\0"

    others = json.loads(myths.OTHER_SEEDS.read_text())
    expected = myths.whole_page(numbers, others, show=show)
    parts = re.split(r"\0(\d+)\0", expected)
    pattern = "".join(r"([−\d.,e<\- ]+?)" if i % 2 else re.escape(part) for i, part in enumerate(parts))
    asked = [places[int(part)] for part in parts[1::2]]
    written = re.fullmatch(pattern, PAGE.read_text(encoding="utf-8"))
    assert written, "myths.md is not what the trials give: `python -m lessons.myths` writes it anew"
    for (name, i), text in zip(asked, written.groups(), strict=True):
        line, number = MYTHS[name].lines[i], numbers[name][i]
        written_number = float(text.replace("−", "-").replace(",", "").removeprefix("< "))
        same = text == line.printed(number) or line.slack and abs(written_number - number) <= line.slack
        assert same, f"{name}: the page says {text}, the trial {line.printed(number)}; `python -m lessons.myths` writes the page anew"


def test_there_are_enough_and_a_reader_cannot_guess():
    verdicts = [case.verdict(found(name)) for name, case in MYTHS.items()]
    assert len(verdicts) >= 30 and min(map(verdicts.count, ("true", "half true", "false"))) >= 5 and len({case.chapter for case in MYTHS.values()}) >= 6
    assert len({case.claim for case in MYTHS.values()}) == len(MYTHS)
    for case in MYTHS.values():
        assert any(line.wanted for line in case.lines) and case.claim.endswith(".") and case.right and case.met
        assert len(inspect.getsource(case.run).rpartition(")\ndef ")[2].splitlines()) <= 16, f"{case.name} is too long to be read beside its claim"


def made(*wanted):
    return Myth("", "It is so.", "a test", tuple(Line("x", want, ".1f") for want in wanted), "It is {0}.", "", lambda: 0)


def test_a_verdict_is_counted():
    assert made("at most 4", "above 0").verdict((4, 1)) == "true"
    assert made("at most 4", "above 0").verdict((4, 0)) == made("at most 4", "above 0").verdict((5, 1)) == "half true"
    assert made("at most 4", "above 0").verdict((5, 0)) == "false"
    assert made("below 1", "").verdict((0.5, 99)) == "true" and made("at least 1,000").verdict((999,)) == "false"
    assert made("exactly 0").verdict((0,)) == "true" and made("exactly 0").verdict((1e-9,)) == "false"


def test_a_number_near_its_line_is_close_only_where_machines_differ():
    drawn = Line("x", "at most 1", ".1f", slack=0.2)
    assert drawn.close(1.1) and not drawn.close(1.3) and not Line("x", "at most 1").close(1.0) and not Line("x", "", slack=0.2).close(1.0)


def test_numbers_are_printed_for_a_page():
    assert [Line("x", "", form).printed(n) for form, n in ((",.0f", 786432), (".2f", -0.001), (".2f", -1.5), ("tiny", 1e-15), ("tiny", 0.57))] == [
        "786,432", "0.00", "−1.50", "< 1e-9", "0.57"]


def test_a_card_shows_line_number_and_verdict():
    text = card(7, made("at most 4"), (5.0,), lambda case, i, printed: printed)
    assert "| x | at most 4 | 5.0 | no |" in text and "**False.** It is 5.0." in text and "<b>7</b> It is so." in text
