"""The papers' headlines and our own questions on trial: each with a number, and what it would have to be, written before the runs.

    shown           the number lies above the line (and below `most`, where a claim says how much)
    contradicted    it lies below what would still be worth anything (or above `most`)
    open            neither can be said

"Matches" means: worse by less than MARGIN, so its line is -MARGIN. "Better" means: by more than 0, and it is contradicted where what may be
gained is less than MARGIN. By one-sided t-tests of paired differences (a seed means the same batches), and all of them together by
Benjamini and Hochberg's rule: of the verdicts "shown" and "contradicted" at most FALSE are expected to be wrong. The intervals are 95 % each.

Everything here is a model of 875,264 parameters and 3,200 windows of text, so a verdict is about this scale and no other.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from minilora.adapter import adapt, merge
from minilora.evidence.compare import Entry, entries
from minilora.evidence.formulas import nf4_bytes
from minilora.evidence.ledger import flops
from minilora.evidence.scoreboard import above, confidence, discoveries, entries_of, interval, of, paired, score_of
from minilora.methods import make_method

MARGIN = 0.05           # bits per byte
SOONER = 0.1            # of log2: 7 % sooner
FALSE = 0.05            # of the verdicts that are not open

FULL, LORA, LORA_NF4 = Entry("full"), Entry("lora"), Entry("lora", "nf4")
LOW, HIGH, HIGH_RS, HALF = Entry("lora", rank=1), Entry("lora", rank=64), Entry("rslora", rank=64), Entry("dora", rank=4)
SMALLER = Entry("adalora", rank=5)
LINEUP = (LOW, HIGH, HIGH_RS, HALF, SMALLER, LORA_NF4)          # what the claims need beyond compare's own entries
LEFT_OUT = [Entry("rslora"), Entry("qlora", "nf4"), Entry("qpissa", "nf4")]                      # no claim is about these
FIRST = [FULL, LORA, LOW, HIGH, Entry("lora-fa"), Entry("lora-fa", rank=16), Entry("vera"), Entry("lora-plus"), LORA_NF4, Entry("adalora"), HALF, HIGH_RS, Entry("pissa")]
PUBLISHED_LINEUP = [entry for entry in dict.fromkeys([*FIRST, *entries(), *LINEUP]) if entry not in LEFT_OUT]
ATTENTION, MLP = Entry("lora", rank=10, only="attention"), Entry("lora", only="mlp")             # 40,960 trained parameters each
ZERO_A = Entry("lora", zero="A")
FULL_LARGE, LORA_LARGE = Entry("full", rows=64), Entry("lora", rows=64)
RANKS = tuple(Entry("lora", rank=rank) for rank in (4, 16, 64))
FACTS, SMALL = (8, 16, 32, 64, 128), Entry("lora", rank=4, only="one mlp")                       # told, and an adapter of 5,120 parameters
ALPHAS = tuple(Entry("lora", alpha=alpha) for alpha in (2.0, 8.0, 32.0, 128.0))

Samples = Callable[[dict, str], list[float]]            # (a results file, task) -> one number a seed, or one in all where nothing is drawn


@dataclass(frozen=True)
class Claim:
    """One headline: what the paper found and where, or what was predicted; what is run here; and what the number judged has to be."""

    key: str
    headline: str
    paper: str                  # its figure and setting, or why we ask
    run: str                    # here, and what is predicted of it
    line: float                 # shown above it
    samples: Samples
    worth: float | None = None  # contradicted below it (None: below the line)
    most: float | None = None   # and shown below this only, contradicted above it
    exact: bool = False         # the number is computed from formulas or counted, and has no spread


@dataclass(frozen=True)
class Verdict:
    """What the runs say of a claim on a task: the number, its interval, and shown, contradicted or open."""

    mean: float
    low: float
    high: float
    says: str


def judge(content: dict) -> dict[tuple[str, str], Verdict]:
    """(claim's key, task) -> its verdict, for all of which the runs are there. They are judged together: see discoveries."""
    tasks = list(dict.fromkeys(run["task"].split()[-1] for run in content["runs"] + content["grid"]))       # "64 facts" are facts
    found = {(claim, task): values for claim in CLAIMS for task in tasks if (values := claim.samples(content, task))}
    tests = {}
    for (claim, task), values in found.items():
        if not claim.exact:
            tests[claim, task, "shown"], tests[claim, task, "contradicted"] = p_values(claim, values)
    believed = dict(zip(tests, discoveries(list(tests.values()), FALSE)))
    verdicts = {}
    for (claim, task), values in found.items():
        if claim.exact:
            verdicts[claim.key, task] = Verdict(values[0], values[0], values[0], "shown" if values[0] > claim.line else "contradicted")
        else:
            says = next((side for side in ("shown", "contradicted") if believed[claim, task, side]), "open")
            verdicts[claim.key, task] = Verdict(*confidence(values), says)
    return verdicts


def p_values(claim: Claim, values: list[float]) -> tuple[float, float]:
    """How likely numbers like these are where the claim is false, and where it is true, at the worst."""
    opposite = [-value for value in values]
    shown, contradicted = above(values, claim.line), above(opposite, -(claim.line if claim.worth is None else claim.worth))
    if claim.most is not None:
        shown, contradicted = max(shown, above(opposite, -claim.most)), min(1.0, 2 * min(contradicted, above(values, claim.most)))
    return shown, contradicted


def better(one: Entry, other: Entry, score: str = "bits_per_byte") -> Samples:
    """By how much `one` is better (lower) than `other`, in bits per byte or what the score is in."""
    return lambda content, task: paired(score_of(content["runs"], task, other, score), score_of(content["runs"], task, one, score))


def at_equal_learning(one: Entry, other: Entry, compared: Callable[[list, list, float], float]) -> Samples:
    """For each seed, compared(curve of `one`, curve of `other`, the score where both get: the best of the one that learned less)."""

    def samples(content: dict, task: str) -> list[float]:
        ours, theirs = (score_of(content["runs"], task, entry, "curve") for entry in (one, other))
        found = []
        for seed in sorted(ours.keys() & theirs.keys()):
            curves = ours[seed], theirs[seed]
            if all(isinstance(curve, list) for curve in curves):
                found.append(compared(*curves, max(min(score for score, _ in curve) for curve in curves)))
            else:
                found.append(math.nan)                          # one of them diverged
        return found

    return samples


def moment(curve: list[list[float]], level: float) -> float:
    """When the score first came down to this level, in tenths of the run, on the line between the two moments of the curve around it."""
    for place, ((before, _), (after, _)) in enumerate(zip(curve, curve[1:])):
        if after <= level:
            return place + (1.0 if before <= level else (before - level) / (before - after))     # before training does not count
    return math.nan


def sooner(one: Entry, other: Entry) -> Samples:
    """How many times sooner `one` gets to where both get, as log2: 1 for twice as fast, -1 for half as fast. By held-out bits per byte."""

    def compared(ours: list, theirs: list, level: float) -> float:
        our_time, their_time = moment(ours, level), moment(theirs, level)
        return math.log2(their_time / our_time)

    return at_equal_learning(one, other, compared)


def forgotten_at(curve: list[list[float]], level: float) -> float:
    """What was forgotten at that moment, on the same line."""
    when = moment(curve, level)
    return math.nan if math.isnan(when) else float(np.interp(when, range(len(curve)), [lost for _, lost in curve]))


def forgets_less(one: Entry, other: Entry) -> Samples:
    """By how many bits per byte `one` has forgotten less than `other` when both have learned as much."""
    return at_equal_learning(one, other, lambda ours, theirs, level: forgotten_at(theirs, level) - forgotten_at(ours, level))


def fewer_parameters(one: Entry, other: Entry) -> Samples:
    """How many times fewer `one` trains, as it stood at the end of each run."""

    def samples(content: dict, task: str) -> list[float]:
        ours, theirs = ({run["seed"]: run["costs"].get("trainable_parameters", math.nan) for run in of(content["runs"], task, entry)} for entry in (one, other))
        return [theirs[seed] / ours[seed] for seed in sorted(ours.keys() & theirs.keys())]

    return samples


def best(content: dict, task: str, entry: Entry) -> dict[int, tuple[float, float]]:
    """seed -> (log10 of the best rate, the lowest score), from the grid. The rate: the bottom of the parabola through the lowest point and its
    neighbours; the lowest point's own where it is the last one or a neighbour diverged. The score: as measured at the lowest point, for beside
    a cliff the parabola's bottom promises what no run has reached."""
    found = {}
    for seed in {run["seed"] for run in of(content["grid"], task, entry)}:
        points = sorted((math.log10(run["lr"]), run["scores"]["bits_per_byte"]) for run in of(content["grid"], task, entry)
                        if run["seed"] == seed and run["scores"]["bits_per_byte"] is not None)
        if not points:
            continue
        at = min(range(len(points)), key=lambda i: points[i][1])
        around = points[max(0, at - 1):at + 2]
        found[seed] = points[at]
        if len(around) == 3:
            a, b, _ = np.polyfit(*zip(*around), 2)
            if a > 0:
                found[seed] = (-b / (2 * a), points[at][1])
    return found


def rate_ratio(one: Entry, other: Entry) -> Samples:
    """log10 of how many times higher the best rate of `one` is."""
    return lambda content, task: paired(*({seed: rate for seed, (rate, _) in best(content, task, entry).items()} for entry in (one, other)))


def better_at_best(one: Entry, other: Entry) -> Samples:
    """By how much `one` is better (lower), each at its best rate of the grid."""
    return lambda content, task: paired(*({seed: score for seed, (_, score) in best(content, task, entry).items()} for entry in (other, one)))


def batch_price(one: Entry, one_large: Entry, other: Entry, other_large: Entry) -> Samples:
    """By how much more large batches cost `one` than `other`."""

    def samples(content: dict, task: str) -> list[float]:
        prices = []
        for small, large in ((one, one_large), (other, other_large)):
            few, many = (score_of(content["runs"], task, entry) for entry in (small, large))
            prices.append({seed: many[seed] - few[seed] for seed in few.keys() & many.keys()})
        return paired(*prices)

    return samples


def more_intruders(one: Entry, other: Entry) -> Samples:
    """How many more intruder dimensions a layer of `one` has, of ten."""
    return better(other, one, "intruders")


def goes_with_forgetting(content: dict, task: str) -> list[float]:
    """For each seed, over all entries on the dense base: the rank correlation of intruder dimensions and forgetting."""
    lineup = [entry for entry in entries_of(content["runs"], task) if entry.base == "fp32" and not (entry.rows or entry.only or entry.zero == "A")]
    counted, lost = ([score_of(content["runs"], task, entry, name) for entry in lineup] for name in ("intruders", "forgotten"))
    found = []
    for seed in sorted(set.intersection(*map(set, counted))) if len(lineup) > 4 else ():
        pairs = [(a[seed], b[seed]) for a, b in zip(counted, lost) if math.isfinite(a[seed]) and math.isfinite(b[seed])]
        ranks = [*map(_ranks, zip(*pairs))]
        found.append(float(np.corrcoef(*ranks)[0, 1]) if len(pairs) > 4 and all(len({*values}) > 1 for values in ranks) else math.nan)
    return found


def _ranks(values: tuple[float, ...]) -> list[float]:
    """Equal values share their mean rank."""
    return [sum(other < value for other in values) + sum(other == value for other in values) / 2 for value in values]


def holds_more(one: Entry, other: Entry, count: int) -> Samples:
    """By how many bits a fact `one` holds more than `other`, of `count` facts that were told until twice as long brought nothing more."""

    def samples(content: dict, task: str) -> list[float]:
        held = [score_of(content["grid"], f"{count} facts", entry, "held") for entry in (one, other)]
        return [difference / count for difference in paired(*held)] if task == "facts" else []

    return samples


def always(value: Callable[[], float]) -> Samples:
    return lambda content, task: [value()]


def _plain_over_merged() -> float:
    """FLOPs of a layer over those of what it has become when an adapter was merged into it."""
    linear, x = nn.Linear(64, 48), torch.randn(5, 64, requires_grad=True)
    before = flops(lambda: linear(x))[0]
    model = merge(adapt(nn.Sequential(linear), make_method("lora", 4), ["0"]))
    return before / flops(lambda: model(x))[0]


def memory(one: Entry, other: Entry) -> Samples:
    """All bytes of training (weights, gradients, AdamW's state, alive for backward) of `other` over those of `one`."""

    def samples(content: dict, task: str) -> list[float]:
        kinds = ("weight_bytes", "gradient_bytes", "optimizer_bytes", "alive_bytes")
        ours, theirs = (next((sum(run["costs"].get(kind, math.nan) for kind in kinds) for run in of(content["runs"], task, entry)), None) for entry in (one, other))
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
          "rsLoRA against LoRA, both r=64: better", 0.0, better(HIGH_RS, HIGH), worth=MARGIN),
    Claim("lora_plus_faster", "LoRA+ converges sooner than LoRA", "1 to 2 % better and up to 2 times faster (2402.12354, abstract)",
          "log2 of how many times sooner it comes to the score where both get: more than 0", 0.0, sooner(Entry("lora-plus"), LORA), worth=SOONER),
    Claim("lora_fa_memory", "LoRA-FA cuts activation memory, and with it the whole", "up to 1.4 times less memory in all than LoRA (2308.03303, abstract)",
          "all bytes of training, LoRA's over LoRA-FA's: more than 1", 1.0, memory(Entry("lora-fa"), LORA), exact=True),
    Claim("vera_matches", "VeRA matches LoRA with ten times fewer parameters", "RoBERTa-large, GLUE: 87.8 with 0.061M parameters, LoRA 87.8 with 0.8M (2310.11454, table 2)",
          "VeRA r=64 against LoRA r=8: worse by less than 0.05 bits per byte", -MARGIN, better(Entry("vera"), LORA)),
    Claim("vera_ten_times_fewer", "… with ten times fewer", "13 times fewer there",
          "LoRA's parameters over VeRA's: more than 10", 10.0, fewer_parameters(Entry("vera"), LORA), exact=True),
    Claim("delta_lora_better", "Delta-LoRA beats LoRA", "on RoBERTa, GPT-2 and BART, at LoRA's memory (2309.02411, abstract)",
          "Delta-LoRA against LoRA, both r=8: better", 0.0, better(Entry("delta-lora"), LORA), worth=MARGIN),
    Claim("lora_drop_half", "LoRA-drop halves the parameters", "on average half of LoRA's (2402.07721, abstract)",
          "LoRA's parameters over LoRA-drop's, both r=8: more than 2", 2.0, fewer_parameters(Entry("lora-drop"), LORA)),
    Claim("lora_drop_matches", "… and matches LoRA", "comparable to LoRA and to full fine-tuning (2402.07721, abstract)",
          "LoRA-drop against LoRA, both r=8: worse by less than 0.05 bits per byte", -MARGIN, better(Entry("lora-drop"), LORA)),
    Claim("adalora_better", "AdaLoRA beats LoRA at equal budget", "DeBERTaV3-base, GLUE: 89.31 with 1.27M parameters, LoRA 88.34 with 1.33M (2303.10512)",
          "AdaLoRA from 12 to 8 against LoRA r=8: better; its budget is what is left, and it trains half as much again", 0.0, better(Entry("adalora"), LORA), worth=MARGIN),
    Claim("adalora_as_many_trained", "… also where it may train no more than LoRA", "the same, read strictly",
          "AdaLoRA from 8 to 5 against LoRA r=8: better", 0.0, better(SMALLER, LORA), worth=MARGIN),
    Claim("qlora_matches", "QLoRA matches 16-bit LoRA", "LLaMA, MMLU: 53.1 on NF4 with double quantization, 53.0 on 16 bits (2305.14314)",
          "LoRA r=8 on NF4 against the same on float32: worse by less than 0.05 bits per byte", -MARGIN, better(LORA_NF4, LORA)),
    Claim("qlora_bits", "… at 4.127 bits a parameter", "4 bits, and 0.127 for the scales (2305.14314, section 3)",
          "16 bits over those stored for each number of a weight 4096 × 4096: above 16 / 4.128", 16 / 4.128, always(lambda: 2 * 4096**2 / nf4_bytes(4096, 4096)), exact=True),
    Claim("dora_half_rank", "DoRA beats LoRA at half its rank", "LLaMA-7B, eight commonsense tasks: 77.5 at half the rank of LoRA's 74.7 (2402.09353)",
          "DoRA r=4 against LoRA r=8: better", 0.0, better(HALF, LORA), worth=MARGIN),
    Claim("pissa_faster", "PiSSA converges sooner than LoRA", "and ends higher: LLaMA-2-7B, GSM8K 53.22 against 43.23 (2404.02948v4)",
          "log2 of how many times sooner it comes to the score where both get: more than 0", 0.0, sooner(Entry("pissa"), LORA), worth=SOONER),
    Claim("loftq_better", "LoftQ beats QLoRA at low bits", "Phi-2 at 4 bits, GSM8K: 64.1 against 60.2; more at 2 bits (2310.08659 and its repository)",
          "LoftQ against LoRA on NF4, both r=8, 4 bits: better", 0.0, better(Entry("loftq", "nf4"), LORA_NF4), worth=MARGIN),
    Claim("learns_less", "LoRA learns less than full fine-tuning", "Llama-2-7B, 20B tokens of code, HumanEval: 0.224 at r=256, full 0.263 (2405.09673)",
          "full against LoRA r=8: better", 0.0, better(FULL, LORA), worth=MARGIN),
    Claim("forgets_less", "… and forgets less", "it keeps more of HellaSwag, ARC-Challenge and WinoGrande (2405.09673)",
          "bits per byte lost on the tiny world when both have learned as much, full's less LoRA's: more than 0", 0.0, forgets_less(LORA, FULL), worth=MARGIN),
    Claim("adalora_forgets_less", "AdaLoRA forgets less than LoRA", "seen here on voice and code; written down before it was run on facts and sums",
          "bits per byte lost on the tiny world when both have learned as much, LoRA's (r=8) less AdaLoRA's (12 to 8): more than 0", 0.0, forgets_less(Entry("adalora"), LORA), worth=MARGIN),
    Claim("rate_ratio", "LoRA's best rate is about ten times full fine-tuning's", "said of large models; predicted: 10 times, from 3.2 to 32 times",
          "log10 of LoRA's (r=16, alpha=8) best rate over full's, from a grid: between 0.5 and 1.5", 0.5, rate_ratio(RANKS[1], FULL), most=1.5),
    Claim("rate_flat", "… and hardly depends on the rank, with alpha/r", "predicted: less than half a decade from rank 4 to 64",
          "log10 of the best rate at r=64 over that at r=4: between -0.5 and 0.5", -0.5, rate_ratio(RANKS[2], RANKS[0]), most=0.5),
    Claim("mlp_better", "attention alone is worse than the MLP alone", "at equal parameters; predicted: yes",
          "LoRA on the MLP (r=8) against LoRA on q, k, v and o (r=10), 40,960 parameters each: better", 0.0, better(MLP, ATTENTION), worth=MARGIN),
    Claim("large_batches", "large batches cost LoRA more than full fine-tuning", "predicted: yes",
          "what 64 rows a step instead of 8 cost, in an eighth of the steps, LoRA's less full's: more than 0", 0.0,
          batch_price(LORA, LORA_LARGE, FULL, FULL_LARGE), worth=MARGIN),
    Claim("intruders", "LoRA puts in new directions, full fine-tuning does not", "intruder dimensions (2410.21228)",
          "intruders among a layer's first ten directions, LoRA's less full's: more than 0", 0.0, more_intruders(LORA, FULL), worth=0.5),
    Claim("intruders_rank", "… more at a low rank than at a high one", "the same paper; alpha/r at both ranks here",
          "intruders at r=8 less those at r=64: more than 0", 0.0, more_intruders(LORA, HIGH), worth=0.5),
    Claim("intruders_forget", "… and they go with forgetting", "the same paper",
          "rank correlation of intruders and forgetting over all methods on the dense base: more than 0", 0.0, goes_with_forgetting, worth=0.3),
    Claim("zero_b", "it matters which factor starts at zero", "B = 0 and A random learns better than the reverse (2406.08447); predicted: yes",
          "LoRA as usual against LoRA with A = 0 and B random, both r=8: better", 0.0, better(LORA, ZERO_A), worth=MARGIN),
    Claim("capacity_below", "LoRA equals full fine-tuning as long as it has room", "said of large models; predicted: yes",
          f"bits a fact of {FACTS[0]} facts, 5,120 parameters of LoRA less full: worse by less than 0.4 of 7.98", -0.4, holds_more(SMALL, FULL, FACTS[0])),
    Claim("capacity_above", "… and falls behind when it is full", "predicted: yes",
          f"bits a fact of {FACTS[-1]} facts, full less 5,120 parameters of LoRA: more than 0", 0.0, holds_more(FULL, SMALL, FACTS[-1]), worth=0.4),
    Claim("alpha_once", "with its rate searched, alpha makes no difference", "under Adam alpha moves the rate that is best; predicted: a factor of 16 changes nothing",
          "LoRA r=8 with alpha 2 against alpha 32, each at its best rate: within 0.05 bits per byte", -MARGIN, better_at_best(ALPHAS[0], ALPHAS[2]), most=MARGIN),
)


def report(content: dict) -> str:
    """Every claim with its verdict on each task, as text."""
    verdicts = judge(content)
    lines = []
    for claim in CLAIMS:
        lines += [f"{claim.key}: {claim.headline}", f"    asked   {claim.paper}", f"    here    {claim.run}"]
        found = {task: verdict for (key, task), verdict in verdicts.items() if key == claim.key}
        if claim.exact:                                         # one task says it for all
            found = {"exact": verdict for verdict in list(found.values())[:1]}
        for task, verdict in found.items():
            lines.append(f"    {task:<7} " + (f"{verdict.mean:.3f}" if claim.exact else interval(verdict.mean, verdict.low, verdict.high)) + f": {verdict.says}")
        if not found:
            lines.append("    the runs are not there")
    return "\n".join(lines)
