"""The fight on lessons/results.md and its pictures, written from minilora/evidence/published.json: every number is read from there.

    python benchmarks/page.py            writes them; a test writes the page again and compares
"""

import argparse
import functools
import math
import statistics
from pathlib import Path

import numpy as np

from minilora import plots
from minilora.evidence import capacity, claims, compare, scoreboard
from minilora.evidence.claims import CLAIMS, Claim, Verdict
from minilora.evidence.compare import Entry

ROOT = Path(__file__).parent.parent
NAMES = {
    "full": Entry("full"), "LoRA, rank 64": Entry("lora", rank=64), "rsLoRA, rank 64": Entry("rslora", rank=64), "AdaLoRA, 12 to 8": Entry("adalora"),
    "DoRA": Entry("dora"), "LoRA": Entry("lora"), "LoRA+": Entry("lora-plus"), "Delta-LoRA": Entry("delta-lora"),
    "PiSSA": Entry("pissa"), "LoRA-drop": Entry("lora-drop"), "AdaLoRA, 8 to 5": Entry("adalora", rank=5), "DoRA, rank 4": Entry("dora", rank=4),
    "LoRA-FA, rank 16": Entry("lora-fa", rank=16), "LoRA-FA": Entry("lora-fa"), "LoRA, rank 1": Entry("lora", rank=1), "VeRA, rank 64": Entry("vera"), "LoRA, 4-bit base": Entry("lora", "nf4"),
    "LoftQ": Entry("loftq", "nf4"),
}
TASKS = {"voice": "the tiny world told in another voice", "facts": "80 facts told again and again, scored in the words that told them",
         "sums": "582 additions not seen before", "code": "Python's standard library without its documentation, held out by module"}
CURVES = ("full", "LoRA, rank 1", "LoRA", "LoRA, rank 64", "AdaLoRA, 12 to 8")

# What a claim's runs do not show. Written before them.
LIMITS = {
    "lora_matches_full": "A model with more to spare may need less rank.",
    "rank_saturates": "At alpha/r a higher rank has a lower scale; its rate was searched, its scale was not.",
    "rslora_high_rank": "Both had their own rate: what is left is what the rate could not make up for.",
    "lora_plus_faster": "One ratio, 16; rates were searched for the score at the end. The clock was changed after four seeds: by training loss it had seen no difference.",
    "vera_matches": "VeRA's rank of 64 is low for it; papers take 256 and more.",
    "delta_lora_better": "From the first step on it is LoRA of three times the alpha, so this asks about alpha once more.",
    "lora_drop_half": "Its threshold of 0.9 is the paper's; four layers leave little to share.",
    "lora_drop_matches": "Where little was dropped, little could be lost.",
    "adalora_better": "It trains half as much again as it keeps.",
    "adalora_as_many_trained": "Added after an earlier fight, before this one.",
    "qlora_matches": "A base of 875,264 weights; large ones have outliers that this one has not.",
    "dora_half_rank": "One rank each.",
    "pissa_faster": "Rates were searched for the score at the end, not for speed.",
    "loftq_better": "At four bits; its paper gains more at two.",
    "learns_less": "Rank 8, and tasks that fit in 3,200 windows.",
    "forgets_less": "Forgetting is measured on the one thing that the base knew best.",
    "adalora_forgets_less": "Found by looking, so voice and code prove nothing; facts and sums are the test. Nor does it say why.",
    "rate_ratio": "Two tasks and one alpha.",
    "rate_flat": "With alpha/√r it would move.",
    "mlp_better": "A model with short contexts; attention may matter more in long ones.",
    "large_batches": "As much is read in an eighth of the steps; with as many steps it is another question.",
    "intruders": "Ten directions and a cosine of 0.5 are a choice.",
    "intruders_rank": "With alpha/r; the paper's rank-stabilised runs are not here.",
    "intruders_forget": "A correlation over methods, each at its own rate, says nothing of causes.",
    "zero_b": "B = 0 and A = 0 at one scale each.",
    "capacity_below": "One place for the adapter, the MLP of the third block, and rates that were not searched further than a pilot.",
    "capacity_above": "How much fits elsewhere, or at a higher rank. Between 8 and 128 facts there are one or two seeds.",
    "alpha_once": "One task, rank 8, and rates half a decade apart. At first the score was read off a parabola, which a cliff beside it pulled below every run.",
}


STAGES = {"parts": claims.MLP, "zero": claims.ZERO_A, "batches": claims.LORA_LARGE, "rates": claims.RANKS[1], "alpha": claims.ALPHAS[0], "capacity": claims.SMALL}


def page(content: dict) -> str:
    about, runs, every = content["about"], content["runs"], content["runs"] + content["search"] + content["grid"]
    tasks = [task for task in TASKS if task in {run["task"] for run in runs}]
    entries = {Entry.of(record) for record in every}
    stages = [*tasks, *(stage for stage, entry in STAGES.items() if entry in entries)]
    verdicts, seeds = claims.judge(content), sorted({run["seed"] for run in runs})
    said = [verdict.says for (key, _), verdict in verdicts.items() if not CLAIM[key].exact]
    asked = [claim for claim in CLAIMS if not claim.exact and any((claim.key, task) in verdicts for task in tasks)]
    again, decided = halves(content, seeds)
    settings, pilot = about["settings"], about["pilot"]
    return f"""# What was measured

Every figure on this page is of one small model, the tiny GPT of 875,264 parameters, on a CPU. It says nothing about large models by itself. Where a paper found
otherwise on a large model, both may be right. `python benchmarks/page.py` writes this page, number by number, from [published.json](../minilora/evidence/published.json).

## How the fight was fought

    .venv/bin/python benchmarks/fight.py pilot {' '.join(stages)}

{lines(f'- **{task}**: {TASKS[task]}.' for task in tasks)}

**A run** is {length(settings['steps'], tasks)} of {settings['rows']} windows of {settings['context']} bytes, for every method. {long_enough(pilot, tasks, settings['steps'])}

**Rates.** Each method has its own on each task. Five runs find it, by the same rule for all, on data that the report never sees.

**Seeds.** {len(seeds)}. A seed means the same batches for every method, so differences are paired. {enough_seeds(pilot, tasks)}

**Verdicts.** "Matches" means: worse by less than {claims.MARGIN} bits per byte. "Better" means: by more than 0; it is contradicted where what may be gained is less than
{claims.MARGIN}. By one-sided t-tests of the paired differences, and all {len(said)} verdicts together by Benjamini and Hochberg's rule: of those that are not open one in
{round(1 / claims.FALSE)} at most is expected to be wrong. Intervals are 95 % each; simulated with {len(seeds)} seeds they
cover the truth in {coverage(len(seeds), 'normal'):.0f} of 100 fights where the differences are normal, and in {coverage(len(seeds), 'exponential'):.0f} where they are as lopsided as an exponential. Predictions and margins were written before the runs,
but where a question says otherwise.

**Runs.** {len(every):,}, of which {len(content['search'])} only to find the rates: {about['cpu_seconds'] / 3600:.1f} hours of one core. Python {about['versions']['python']}, torch {about['versions']['torch']}.{not_yet(content, tasks, asked)}

## The verdicts

    .venv/bin/python -m minilora claims

Of {len(said)} verdicts {said.count('shown')} are shown, {said.count('contradicted')} contradicted and {said.count('open')} open.{f" Of {decided} that the first half of the seeds decides alone, the second half alone says the same of {again}." if decided else ""}
Where a field of the table is empty, the question was not asked on that task.

![A row a claim: the number judged and its interval for each task; right of the line it is shown, left of it contradicted; what is open is hollow](claims.png)

| claim | {' | '.join(tasks)} |
|---|{'---|' * len(tasks)}
{lines(f'| {claim.headline} | ' + ' | '.join(verdicts[claim.key, task].says if (claim.key, task) in verdicts else '' for task in tasks) + ' |' for claim in asked)}

{counted(verdicts, tasks)}

## What each method learned, and what it forgot

Rank 8 where nothing else is said; means of {len(seeds)} seeds; lower is better everywhere.

{table(runs, tasks)}

The scores are held-out bits per byte; on facts and sums of the answers alone. *Forgotten* is in bits per byte lost on the tiny world at the end of the run.{answered(runs, tasks)}
Not run, for no claim is about them: QLoRA's preset (LoRA on the 4-bit base with its paper's alpha and dropout), rsLoRA of rank 8 (LoRA of another alpha) and QPiSSA.

![Held-out bits per byte with intervals, a row for each method and rank, most trainable parameters on top, a panel for each task; dotted: full fine-tuning](quality.png)

![Forgotten against learned, a curve for each of five methods from the start to the end of the run, a panel for each task](forgetting.png)

## Question by question

The answer first, then each task's number with its interval, counted so that more speaks for the claim; what was judged; why it is asked; and what these runs do not show.

{(chr(10) * 2).join(paragraph(content, claim, verdicts, tasks) for claim in asked)}
"""


# claim -> the picture below its paragraph, and what is on it
PICTURES = {
    "rate_flat": ("rates", "Held-out bits per byte against the learning rate, a curve for full fine-tuning and for LoRA of each of three ranks, a panel for each task"),
    "alpha_once": ("alpha", "A field for each alpha and learning rate of LoRA, its bits per byte written in it, the best of each alpha framed"),
    "capacity_above": ("room", "Bits held when more training adds nothing, against the number of facts told, for full fine-tuning and for an adapter of 5,120 parameters"),
    "intruders_forget": ("intruders", "Forgetting against intruder dimensions in a layer, a named dot for each method on the dense base, a panel for each task"),
}


REST = "## What a method costs"            # from there on the page is written by hand
CLAIM = {claim.key: claim for claim in CLAIMS}


def lines(each) -> str:
    return "\n".join(each)


@functools.cache
def coverage(seeds: int, kind: str, fights: int = 4000) -> float:
    """In how many of 100 simulated fights with so many seeds the interval holds the truth."""
    differences = getattr(np.random.default_rng(0), kind)(size=(fights, seeds))
    truth = {"normal": 0.0, "exponential": 1.0}[kind]
    return 100 * statistics.fmean(low <= truth <= high for _, low, high in (scoreboard.confidence([*some]) for some in differences))


def listed(each) -> str:
    """a, b and c."""
    *most, last = each
    return f"{', '.join(most)} and {last}" if most else last


def halves(content: dict, seeds: list[int]) -> tuple[int, int]:
    """(of how many verdicts that the first half of the seeds decides the second half says the same, how many there are)."""
    first, second = (claims.judge(content | {part: [run for run in content[part] if (run["seed"] in some)] for part in ("runs", "grid")})
                     for some in (seeds[:len(seeds) // 2], seeds[len(seeds) // 2:]))
    decided = [key for key, verdict in first.items() if verdict.says != "open" and not CLAIM[key[0]].exact and key in second]
    return sum(second[key].says == first[key].says for key in decided), len(decided)


def length(steps: dict[str, int], tasks: list[str]) -> str:
    usual = statistics.mode(steps[task] for task in tasks)
    others = [f"on {task} {steps[task]}" for task in tasks if steps[task] != usual]
    return f"{usual} steps" + (f" ({', '.join(others)})" if others else "")


def long_enough(pilot: dict, tasks: list[str], steps: dict[str, int]) -> str:
    said = [f"on {task} LoRA goes from {pilot[task]['200 steps'][1]:.2f} bits per byte after 200 steps to {pilot[task]['400 steps'][1]:.2f} after 400 and "
            f"{pilot[task]['800 steps'][1]:.2f} after 800" for task in tasks]
    falling = [task for task in tasks if steps[task] < 800 and pilot[task][f"{steps[task]} steps"][1] - pilot[task]["800 steps"][1] > 2 * claims.MARGIN]
    speed = f" On {listed(falling)} the score was still falling fast: there the fight says who is ahead after so many steps, and not who gets further." if falling else ""
    return f"A pilot chose the length: {'; '.join(said)}.{speed}"


def enough_seeds(pilot: dict, tasks: list[str]) -> str:
    said = [f"{pilot[task]['deviation']:.3f} on {task}, for which ±{claims.MARGIN} takes {pilot[task]['seeds']}" for task in tasks]
    return f"In the pilot the paired differences of LoRA and full fine-tuning had a standard deviation of {'; '.join(said)}."


def not_yet(content: dict, tasks: list[str], asked: list[Claim]) -> str:
    """What is still to be run, if anything."""
    missing = [f"the task {task}" for task in TASKS if task not in tasks]
    missing += [f"“{claim.headline}”" for claim in CLAIMS if not claim.exact and claim not in asked]
    return f"\n\n**Not run yet:** {'; '.join(missing)}." if missing else ""


def counted(verdicts: dict[tuple[str, str], Verdict], tasks: list[str]) -> str:
    exact = {key: [verdicts[key, task] for task in tasks if (key, task) in verdicts] for key, claim in CLAIM.items() if claim.exact}
    said = {"no_latency": "merged, LoRA adds no latency ({:.0f} times the FLOPs of the plain layer)", "lora_fa_memory": "LoRA needs {:.2f} times LoRA-FA's memory in all",
            "vera_ten_times_fewer": "VeRA trains {:.0f} times fewer parameters", "qlora_bits": "QLoRA stores a weight in {:.3f} bits"}
    told = [said[key].format(16 / found[0].mean if key == "qlora_bits" else found[0].mean) for key, found in exact.items() if found]
    return f"Settled by counting: {'; '.join(told)}."


def table(runs: list[dict], tasks: list[str]) -> str:
    def mean(entry: Entry, task: str, score: str) -> float:
        return statistics.fmean(scoreboard.score_of(runs, task, entry, score).values())

    there = [(name, entry) for name, entry in NAMES.items() if any(scoreboard.score_of(runs, task, entry) for task in tasks)]
    rows = [f"| method | trained | {' | '.join(tasks)} | forgotten: {' | '.join(tasks)} |", f"|---|---:|{'---:|' * 2 * len(tasks)}"]
    for name, entry in there:
        ran = [task for task in tasks if scoreboard.score_of(runs, task, entry)]
        trained = sorted({round(scoreboard.costs_of(runs, task, entry)["trainable_parameters"]) for task in ran})
        cells = [f"{trained[0]:,}" + (f" to {trained[-1]:,}" if len(trained) > 1 else "")]
        cells += [format(mean(entry, task, score), form) if task in ran else "" for score, form in (("bits_per_byte", ".3f"), ("forgotten", ".1f")) for task in tasks]
        rows.append(f"| {name} | {' | '.join(cells)} |")
    return lines(rows)


def answered(runs: list[dict], tasks: list[str]) -> str:
    """How many questions are answered to the byte, from the worst method to the best."""
    what = {"facts": "facts asked in words never told", "sums": "sums"}
    said = []
    for task in (task for task in tasks if task in what):
        means = [statistics.fmean(values.values()) for entry in scoreboard.entries_of(runs, task) if (values := scoreboard.score_of(runs, task, entry, "exact_match"))]
        said.append(f"{100 * min(means):.0f} to {100 * max(means):.0f} % of the {what[task]}")
    return f" Answered to the byte, from the worst method to the best: {listed(said)}." if said else ""


def paragraph(content: dict, claim: Claim, verdicts: dict[tuple[str, str], Verdict], tasks: list[str]) -> str:
    """The answer first, then its numbers, what was run, and what it does not show."""
    found = {task: verdicts[claim.key, task] for task in tasks if (claim.key, task) in verdicts}
    by_verdict = {says: [task for task, verdict in found.items() if verdict.says == says] for says in ("shown", "contradicted", "open")}
    answer = "; ".join(f"{says} on {listed(where)}" for says, where in by_verdict.items() if where)
    numbers = "; ".join(f"{task} {scoreboard.interval(verdict.mean, verdict.low, verdict.high, '+.3f')}" for task, verdict in found.items()).replace("-", "−")
    found_too = f" {FOUND_TOO[claim.key](content)}" if claim.key in FOUND_TOO else ""
    shown = "\n\n![{1}]({0}.png)".format(*PICTURES[claim.key]) if claim.key in PICTURES else ""
    return f"**{claim.headline}: {answer}.** {numbers}.{found_too} Judged: {claim.run}. Asked because: {claim.paper}. Not shown: {LIMITS[claim.key]}{shown}"


def ceiling(content: dict) -> str:
    """What the small adapter held at most, of the most facts, and whether it was still learning."""
    runs = {count: [*scoreboard.of(content["grid"], f"{count} facts", claims.SMALL)] for count in claims.FACTS}
    held = {count: statistics.fmean(run["scores"]["held"] for run in some) for count, some in runs.items() if some}
    most, last = max(held, key=held.get), claims.FACTS[-1]
    parameters = runs[most][0]["costs"]["trainable_parameters"]
    rising = [count for count, some in runs.items() if any(still_rising(run["scores"]["doublings"]) for run in some)]
    return (f"At most it held {held[most]:.0f} bits, of {most} facts: {held[most] / parameters:.3f} a trained parameter; of {last} facts {held[last]:.0f}."
            + (f" With {listed(map(str, rising))} facts it was still learning after {capacity.MOST_STEPS:,} steps, where the doubling ended."
               if rising else ""))


def still_rising(doublings: list[list[float]]) -> bool:
    """Whether the last doubling brought more than `until_flat` takes for next to nothing."""
    return doublings[-1][1] > (1 + capacity.GAIN) * doublings[-2][1]


def alpha_scores(content: dict) -> dict[tuple[float, float], float]:
    """(alpha, rate) -> mean of the seeds; nan where one diverged."""
    return {(entry.alpha, lr): statistics.fmean(scores) for entry in claims.ALPHAS for lr, scores in scores_at(content["grid"], "code", entry).items()}


def one_knob(content: dict) -> str:
    """Whether only alpha times rate counts: along the grid's diagonals, where that product is about the same."""
    scores = {pair: math.inf if math.isnan(score) else score for pair, score in alpha_scores(content).items()}
    alphas, rates = (sorted({pair[i] for pair in scores}) for i in (0, 1))
    said = []
    for last in range(len(alphas) - 1, len(rates)):                    # the rate that the smallest alpha has
        along = [(scores[alpha, rates[last - place]], alpha, rates[last - place]) for place, alpha in enumerate(alphas)]
        best, worst = min(along), max(along)
        said.append((worst[0] - best[0], f"from {best[0]:.2f} (alpha {best[1]:g}, rate {best[2]:g}) to {worst[0]:.2f} (alpha {worst[1]:g}, rate {worst[2]:g})"))
    first, *_, (spread, beyond) = said
    knob = first[0] < 2 * claims.MARGIN < spread
    return (f"Along the diagonal of about equal alpha times rate the score goes {first[1]}; along the one beyond, each at the next higher rate, {beyond}."
            + " They are one knob as long as the rate is low; a high rate hurts by itself, whatever alpha." * knob)


FOUND_TOO = {"capacity_above": ceiling, "alpha_once": one_knob}


def pictures(content: dict) -> dict[str, object]:
    """name -> Figure."""
    runs, verdicts = content["runs"], claims.judge(content)
    tasks = [task for task in TASKS if task in {run["task"] for run in runs}]
    rows = [(claim.headline, found, claim.line, claims.SOONER if claim.worth == claims.SOONER else (claim.most - claim.line) / 2 if claim.most else max(claim.worth or 0, claims.MARGIN))
            for claim in CLAIMS if not claim.exact
            if (found := [(task, (v.mean, v.low, v.high), v.says) for task in tasks if (v := verdicts.get((claim.key, task)))])]
    quality, curves = {}, {}
    for task in tasks:
        entries = {name: entry for name, entry in NAMES.items() if scoreboard.score_of(runs, task, entry)}
        quality[task] = [(name, entry.base, round(scoreboard.costs_of(runs, task, entry)["trainable_parameters"]), scoreboard.confidence([*scoreboard.score_of(runs, task, entry).values()]))
                         for name, entry in entries.items()]
        curves[task] = {name: [[statistics.fmean(values) for values in zip(*points)] for points in zip(*scoreboard.score_of(runs, task, NAMES[name], "curve").values())]
                        for name in CURVES if name in entries}
    drawn = {"claims": plots.verdicts(rows), "quality": plots.quality(quality), "forgetting": plots.learning_and_forgetting(curves)}
    dots = {task: [(name, *(statistics.fmean(scoreboard.score_of(runs, task, entry, score).values()) for score in ("intruders", "forgotten")))
                   for name, entry in NAMES.items() if entry.base == "fp32" and scoreboard.score_of(runs, task, entry)] for task in tasks}
    drawn["intruders"] = plots.intruder_dots(dots)
    rates = {task: {name: spread for name, entry in (("full", claims.FULL), *((f"LoRA, rank {entry.rank}", entry) for entry in claims.RANKS))
                    if (spread := scores_at(content["grid"], task, entry))} for task in TASKS}
    if any(rates.values()):
        drawn["rates"] = plots.rate_curves({task: curves for task, curves in rates.items() if curves})
    if alphas := alpha_scores(content):
        drawn["alpha"] = plots.alpha_grid(alphas, "LoRA of rank 8 on code: held-out bits per byte")
    held = {name: {count: [*values.values()] for count in claims.FACTS if (values := scoreboard.score_of(content["grid"], f"{count} facts", entry, "held"))}
            for name, entry in (("full fine-tuning", claims.FULL), ("LoRA, 5,120 parameters", claims.SMALL))}
    if all(held.values()):
        drawn["room"] = plots.room(held, {count: count * capacity.BITS for count in claims.FACTS})
    return drawn


def scores_at(grid: list[dict], task: str, entry: Entry) -> dict[float, list[float]]:
    """rate -> a score a seed."""
    found = {}
    for run in scoreboard.of(grid, task, entry):
        found.setdefault(run["lr"], []).append(run["scores"]["bits_per_byte"] if run["scores"]["bits_per_byte"] is not None else math.nan)
    return found


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    published = compare.read(compare.PUBLISHED)
    path = ROOT / "lessons" / "results.md"
    rest = path.read_text(encoding="utf-8").partition(REST)[2]
    path.write_text(f"{page(published)}\n{REST}{rest}", encoding="utf-8")
    for name, figure in pictures(published).items():
        figure.savefig(ROOT / "lessons" / f"{name}.png", dpi=110)
