"""The published fight, in stages that can be run side by side, one process each. A stage that was stopped goes on.

    OMP_NUM_THREADS=1 python benchmarks/fight.py pilot voice facts sums code rates parts zero batches alpha capacity
    python benchmarks/fight.py --publish            joins what is there into minilora/evidence/published.json

    pilot      full and LoRA at their usual rates, on seeds that no report uses: how long is long enough, and how many seeds decide
    voice …    every method and what the claims need on this task: a rate searched for each, then SEEDS runs
    rates      one grid of learning rates for full fine-tuning and for LoRA of four ranks
    parts      attention alone against the MLP alone, at 40,960 parameters each
    zero       A at zero and B random, the other way round
    batches    an eighth of the steps with eight times the rows
    alpha      LoRA of rank 8: five alphas, seven learning rates
    capacity   small adapters told more and more facts, until they hold no more
"""

import argparse
import statistics
import time
from pathlib import Path

import torch

from minilora.evidence import claims, compare
from minilora.evidence.compare import Entry, Results, Settings
from minilora.evidence.scoreboard import paired, score_of, seeds_needed

FOLDER = Path("runs/fight")
SEEDS = 6                                  # by the pilot
PILOT_SEEDS = range(2000, 2004)
QUESTIONS = ("facts", "code")              # the tasks on which our own questions are asked
FULL, LORA = Entry("full"), Entry("lora")
COMMAND = "python benchmarks/fight.py"


def fight(stage: str, tasks: tuple[str, ...], lineup: list[Entry]) -> None:
    """Every entry on every task: a rate searched for each, then its runs."""
    compare.compare({task: compare.TASKS[task]() for task in tasks}, SEEDS, FOLDER / stage, Settings(), lineup, command=COMMAND, say=say)


def grid(stage: str, settings: Settings, task: str, entry: Entry, rates: tuple[float, ...], seeds: range) -> None:
    """Every entry at every rate: nothing is chosen."""
    results = Results(FOLDER / stage / "results.json", compare.common(settings, COMMAND))
    results.same_data(task, compare.TASKS[task]())
    for lr in rates:
        for seed in seeds:
            if not results.find("grid", entry, task=task, lr=lr, seed=seed, steps=settings.of(entry).steps):
                scores, model = settings.run(entry, compare.TASKS[task](), lr, seed)
                results.add("grid", {**entry.key, "task": task, "seed": seed, "lr": lr, "steps": settings.of(entry).steps, "scores": scores, "costs": {}})
                say(f"{stage}: {task}, {entry} at {lr:g}, seed {seed}: {scores['bits_per_byte']}")


def pilot() -> None:
    for task in compare.TASKS:
        for entry, lr in ((FULL, 1e-3), (LORA, 1e-2)):
            for steps in (200, 400, 800):
                grid(f"pilot-{steps}", Settings(steps), task, entry, (lr,), PILOT_SEEDS if steps == 400 else PILOT_SEEDS[:1])


def rates() -> None:
    for task in QUESTIONS:
        grid("rates", Settings(), task, FULL, (1e-4, 3e-4, 1e-3, 3e-3, 1e-2), range(3))
        for rank in (4, 16, 64):
            grid("rates", Settings(), task, Entry("lora", rank=rank), (1e-3, 3e-3, 1e-2, 3e-2, 1e-1), range(3))


def alpha() -> None:
    for strength in (2.0, 8.0, 32.0, 128.0):
        grid("alpha", Settings(), "facts", Entry("lora", alpha=strength), (1e-3, 3e-3, 1e-2, 3e-2, 1e-1), range(3))


STAGES = {
    "pilot": pilot,
    **{task: lambda task=task: fight(task, (task,), claims.PUBLISHED_LINEUP) for task in compare.TASKS},
    "rates": rates,
    "parts": lambda: fight("parts", QUESTIONS, [claims.ATTENTION, claims.MLP]),
    "zero": lambda: fight("zero", QUESTIONS, [claims.ZERO_A]),
    "batches": lambda: fight("batches", QUESTIONS, [claims.FULL_LARGE, claims.LORA_LARGE]),
    "alpha": alpha,
}


def publish() -> None:
    """All stages but the pilot as one file, and what the pilot said."""
    contents = [compare.read(file) for stage in STAGES if stage != "pilot" and (file := FOLDER / stage / "results.json").exists()]
    whole = compare.joined(contents)
    whole["about"]["pilot"] = {}
    for steps in (200, 400, 800):
        runs = compare.read(FOLDER / f"pilot-{steps}" / "results.json")["grid"]
        for task in compare.TASKS:
            scores = [score_of(runs, task, entry) for entry in (FULL, LORA)]
            behind = paired(scores[1], scores[0])
            about = whole["about"]["pilot"].setdefault(task, {})
            about[f"{steps} steps"] = [round(score[PILOT_SEEDS[0]], 4) for score in scores]
            if steps == 400:
                about["deviation"] = round(statistics.stdev(behind), 4)
                about["seeds"] = seeds_needed(about["deviation"], claims.MARGIN)
    compare.write(compare.PUBLISHED, whole)
    say(f"{compare.PUBLISHED}: {len(whole['runs'])} runs, {len(whole['search'])} of the search, {len(whole['grid'])} of grids, {whole['about']['cpu_seconds'] / 3600:.1f} CPU hours")


def say(text: str) -> None:
    print(time.strftime("%H:%M:%S"), text, flush=True)


if __name__ == "__main__":
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("stages", nargs="*", choices=STAGES)
    arguments.add_argument("--publish", action="store_true")
    chosen = arguments.parse_args()
    torch.set_num_threads(1)
    for stage in chosen.stages:
        STAGES[stage]()
    if chosen.publish:
        publish()
