"""The papers' headlines on trial: each with a number that would have to come out above a line.

    shown                     the whole 95 % interval lies above the line
    contradicted              the whole interval lies below it
    not shown at this scale   the line is inside or touched, or there is no interval

The margin was set before any run. A first fight was set aside for its faults: rates from too few runs, questions scored with their
answers, and, in five claims, arms that differed in more than the claim or a measure that favoured one side. What is published came after.

Differences are paired: a seed means the same batches. "Matches" means: worse by less than MARGIN, and then the line is -MARGIN.
Everything here is a model of 875,264 parameters and 1,600 windows of text, so a verdict is about this scale and no other.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from minilora.adapter import adapt, merge
from minilora.evidence.compare import Entry
from minilora.evidence.formulas import nf4_bytes
from minilora.evidence.ledger import flops
from minilora.methods import make_method
from minilora.evidence.scoreboard import bootstrap, interval, of, paired, score_of

MARGIN = 0.05           # bits per byte: about a tenth of what is left after fine-tuning on the task voice

FULL, LORA, LORA_NF4 = Entry("full"), Entry("lora"), Entry("lora", "nf4")
LOW, HIGH, HIGH_RS, HALF = Entry("lora", rank=1), Entry("lora", rank=64), Entry("rslora", rank=64), Entry("dora", rank=4)
SMALLER = Entry("adalora", rank=5)
LINEUP = (LOW, HIGH, HIGH_RS, HALF, SMALLER)                    # what the claims need beyond compare's own entries

Samples = Callable[[list[dict], str], list[float]]      # (runs, task) -> one number a seed, or one in all where nothing is drawn


@dataclass(frozen=True)
class Claim:
    """One headline: what the paper found and where, what is run here, and the line that the number judged has to be above."""

    key: str
    headline: str
    paper: str                  # its figure and setting
    run: str                    # here, and what is predicted of it
    line: float
    samples: Samples
    exact: bool = False         # the number is computed from formulas and has no spread


def verdict(low: float, high: float, line: float) -> str:
    """By rule, from the interval."""
    if math.isnan(low) or math.isnan(high):
        return "not shown at this scale"
    return "shown" if low > line else "contradicted" if high < line else "not shown at this scale"


def judge(claim: Claim, runs: list[dict], task: str) -> tuple[float, float, float, str] | None:
    """The number, its interval and the verdict; None where the runs are not there."""
    values = claim.samples(runs, task)
    if not values:
        return None
    mean, low, high = (values[0],) * 3 if claim.exact else bootstrap(values)
    return mean, low, high, verdict(low, high, claim.line)


def better(one: Entry, other: Entry, score: str = "bits_per_byte") -> Samples:
    """By how many bits per byte `one` is better (lower) than `other`."""
    return lambda runs, task: paired(score_of(runs, task, other, score), score_of(runs, task, one, score))


def speed(one: Entry, other: Entry) -> Samples:
    """How many times sooner `one` gets to where both get, as log2: 1 for twice as fast, -1 for half as fast, to the nearest ten steps.
    Where both get: the higher of the two training losses of their last ten steps."""

    def samples(runs: list[dict], task: str) -> list[float]:
        ours, theirs = (score_of(runs, task, entry, "training") for entry in (one, other))
        found = []
        for seed in sorted(ours.keys() & theirs.keys()):
            if not isinstance(ours[seed], list) or not isinstance(theirs[seed], list):
                found.append(math.nan)                          # one of them diverged
                continue
            goal = max(ours[seed][-1], theirs[seed][-1])
            our_time, their_time = (next(place for place, loss in enumerate(losses, 1) if loss <= goal) for losses in (ours[seed], theirs[seed]))
            found.append(math.log2(their_time / our_time))
        return found

    return samples


def fewer_parameters(one: Entry, other: Entry) -> Samples:
    """How many times fewer `one` trains, as it stood at the end of each run."""

    def samples(runs: list[dict], task: str) -> list[float]:
        ours, theirs = ({run["seed"]: run["costs"].get("trainable_parameters", math.nan) for run in of(runs, task, entry)} for entry in (one, other))
        return [theirs[seed] / ours[seed] for seed in sorted(ours.keys() & theirs.keys())]

    return samples


def always(value: Callable[[], float]) -> Samples:
    return lambda runs, task: [value()]


def _plain_over_merged() -> float:
    """FLOPs of a layer over those of what it has become when an adapter was merged into it."""
    linear, x = nn.Linear(64, 48), torch.randn(5, 64, requires_grad=True)
    before = flops(lambda: linear(x))[0]
    model = merge(adapt(nn.Sequential(linear), make_method("lora", 4), ["0"]))
    return before / flops(lambda: model(x))[0]


def memory(one: Entry, other: Entry) -> Samples:
    """All bytes of training (weights, gradients, AdamW's state, alive for backward) of `other` over those of `one`."""

    def samples(runs: list[dict], task: str) -> list[float]:
        kinds = ("weight_bytes", "gradient_bytes", "optimizer_bytes", "alive_bytes")
        ours, theirs = (next((sum(run["costs"].get(kind, math.nan) for kind in kinds) for run in of(runs, task, entry)), None) for entry in (one, other))
        return [theirs / ours] if ours and theirs else []

    return samples


CLAIMS = (
    Claim("lora_matches_full", "LoRA matches full fine-tuning at about 1 % of the parameters or fewer",
          "GPT-3 175B, MNLI-m: 91.7 % with 4.7M parameters trained, 89.5 % with all (2106.09685)",
          "LoRA r=1 (1.05 %) against full: worse by less than 0.05 bits per byte", -MARGIN, better(LOW, FULL)),
    Claim("no_latency", "merged, LoRA adds no latency", "W + s B A is one matrix of W's shape (2106.09685, section 4.1)",
          "FLOPs of a plain layer over those of a merged one: above 0.999", 0.999, always(_plain_over_merged), exact=True),
    Claim("rank_saturates", "a small rank is enough", "GPT-3 175B, WikiSQL, Wq and Wv: 73.4 % at rank 1, 73.8 % at 8, 73.5 % at 64 (2106.09685, section 7.2)",
          "LoRA r=8 against r=64: worse by less than 0.05 bits per byte", -MARGIN, better(LORA, HIGH)),
    Claim("rslora_high_rank", "alpha/√r makes high ranks useful", "with alpha/r higher ranks learn slowly, with alpha/√r they gain (2312.03732, abstract)",
          "rsLoRA against LoRA, both r=64: better", 0.0, better(HIGH_RS, HIGH)),
    Claim("lora_plus_faster", "LoRA+ converges sooner than LoRA", "1 to 2 % better and up to 2 times faster (2402.12354, abstract)",
          "log2 of how many times sooner it is where both get: more than 0", 0.0, speed(Entry("lora-plus"), LORA)),
    Claim("lora_fa_memory", "LoRA-FA cuts activation memory, and with it the whole", "up to 1.4 times less memory in all than LoRA (2308.03303, abstract)",
          "all bytes of training, LoRA's over LoRA-FA's: more than 1", 1.0, memory(Entry("lora-fa"), LORA), exact=True),
    Claim("vera_matches", "VeRA matches LoRA with ten times fewer parameters", "RoBERTa-large, GLUE: 87.8 with 0.061M parameters, LoRA 87.8 with 0.8M (2310.11454, table 2)",
          "VeRA r=64 against LoRA r=8: worse by less than 0.05 bits per byte", -MARGIN, better(Entry("vera"), LORA)),
    Claim("vera_ten_times_fewer", "… with ten times fewer", "13 times fewer there",
          "LoRA's parameters over VeRA's: more than 10", 10.0, fewer_parameters(Entry("vera"), LORA), exact=True),
    Claim("delta_lora_better", "Delta-LoRA beats LoRA", "on RoBERTa, GPT-2 and BART, at LoRA's memory (2309.02411, abstract)",
          "Delta-LoRA against LoRA, both r=8: better", 0.0, better(Entry("delta-lora"), LORA)),
    Claim("lora_drop_half", "LoRA-drop halves the parameters", "on average half of LoRA's (2402.07721, abstract)",
          "LoRA's parameters over LoRA-drop's, both r=8: more than 2", 2.0, fewer_parameters(Entry("lora-drop"), LORA)),
    Claim("lora_drop_matches", "… and matches LoRA", "comparable to LoRA and to full fine-tuning (2402.07721, abstract)",
          "LoRA-drop against LoRA, both r=8: worse by less than 0.05 bits per byte", -MARGIN, better(Entry("lora-drop"), LORA)),
    Claim("adalora_better", "AdaLoRA beats LoRA at equal budget", "DeBERTaV3-base, GLUE: 89.31 with 1.27M parameters, LoRA 88.34 with 1.33M (2303.10512)",
          "AdaLoRA from 12 to 8 against LoRA r=8: better; its budget is what is left, and it trains half as much again", 0.0, better(Entry("adalora"), LORA)),
    Claim("adalora_as_many_trained", "… also where it may train no more than LoRA", "the same, read strictly; added after the runs",
          "AdaLoRA from 8 to 5 against LoRA r=8: better", 0.0, better(SMALLER, LORA)),
    Claim("qlora_matches", "QLoRA matches 16-bit LoRA", "LLaMA, MMLU: 53.1 on NF4 with double quantization, 53.0 on 16 bits (2305.14314)",
          "LoRA r=8 on NF4 against the same on float32: worse by less than 0.05 bits per byte", -MARGIN, better(LORA_NF4, LORA)),
    Claim("qlora_bits", "… at 4.127 bits a parameter", "4 bits, and 0.127 for the scales (2305.14314, section 3)",
          "16 bits over those stored for each number of a weight 4096 × 4096: above 16 / 4.128", 16 / 4.128, always(lambda: 2 * 4096**2 / nf4_bytes(4096, 4096)), exact=True),
    Claim("dora_half_rank", "DoRA beats LoRA at half its rank", "LLaMA-7B, eight commonsense tasks: 77.5 at half the rank of LoRA's 74.7 (2402.09353)",
          "DoRA r=4 against LoRA r=8: better", 0.0, better(HALF, LORA)),
    Claim("pissa_faster", "PiSSA converges sooner than LoRA", "and ends higher: LLaMA-2-7B, GSM8K 53.22 against 43.23 (2404.02948v4)",
          "log2 of how many times sooner it is where both get: more than 0", 0.0, speed(Entry("pissa"), LORA)),
    Claim("loftq_better", "LoftQ beats QLoRA at low bits", "Phi-2 at 4 bits, GSM8K: 64.1 against 60.2; more at 2 bits (2310.08659 and its repository)",
          "LoftQ against LoRA on NF4, both r=8, 4 bits: better", 0.0, better(Entry("loftq", "nf4"), LORA_NF4)),
    Claim("learns_less", "LoRA learns less than full fine-tuning", "Llama-2-7B, 20B tokens of code, HumanEval: 0.224 at r=256, full 0.263 (2405.09673)",
          "full against LoRA r=8: better", 0.0, better(FULL, LORA)),
    Claim("forgets_less", "… and forgets less", "it keeps more of HellaSwag, ARC-Challenge and WinoGrande (2405.09673)",
          "bits per byte lost on the tiny world, full's less LoRA's: more than 0", 0.0, better(LORA, FULL, "forgotten")),
)


def report(runs: list[dict]) -> str:
    """Every claim with its verdict on each task, as text."""
    tasks = list(dict.fromkeys(run["task"] for run in runs))
    lines = []
    for claim in CLAIMS:
        lines += [f"{claim.key}: {claim.headline}", f"    paper   {claim.paper}", f"    here    {claim.run}"]
        verdicts = {task: judge(claim, runs, task) for task in tasks}
        if claim.exact:                                         # one task says it for all
            verdicts = {"exact": next(filter(None, verdicts.values()), None)}
        for name, found in verdicts.items():
            lines.append(f"    {name:<7} " + ("the runs are not there" if found is None else f"{found[0]:.3f}: {found[3]}" if claim.exact else
                                              f"{interval(*found[:3])}: {found[3]}"))
    return "\n".join(lines)
