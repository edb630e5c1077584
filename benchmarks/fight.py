"""The published fight, in stages that can be run side by side, one process each. A stage that was stopped goes on.

    OMP_NUM_THREADS=1 python benchmarks/fight.py pilot voice facts sums code rates parts zero batches alpha capacity
    python benchmarks/fight.py publish              joins what is there into minilora/evidence/published.json

    pilot      full and LoRA at their usual rates, on seeds that no report uses: how long is long enough, and how many seeds decide
    voice …    the methods and what the claims need on this task: a rate searched for each, then SEEDS runs
    rates      one grid of learning rates for full fine-tuning and for LoRA of three ranks
    parts      attention alone against the MLP alone, at 40,960 parameters each
    zero       A at zero and B random, the other way round
    batches    an eighth of the steps with eight times the rows
    alpha      LoRA of rank 8: four alphas, five learning rates
    capacity   8 to 128 facts told until nothing more is held, by full fine-tuning and by an adapter that is too small for them
"""

import argparse
import statistics
import time
from collections import Counter
from functools import partial
from pathlib import Path

import torch

from minilora.evidence import capacity, claims, compare
from minilora.evidence.compare import Entry, Results, Settings
from minilora.evidence.scoreboard import paired, score_of, seeds_needed

FOLDER = Path(__file__).with_name("fight")                # where a stage that was stopped goes on; git ignores it
SEEDS = 6
STEPS = {"facts": 800}                     # by the pilot, else 400: facts that have not been told often are not flat before
PILOT_SEEDS = range(2000, 2004)
QUESTIONS = ("sums", "code")               # the tasks on which our own questions are asked: both leave much to learn
FULL, LORA = Entry("full"), Entry("lora")
COMMAND = "python benchmarks/fight.py"


def settings_on(task: str) -> Settings:
    return Settings(STEPS.get(task, 400))


def fight(stage: str, task: str, lineup: list[Entry]) -> None:
    """Every entry on a task: a rate searched for each, then its runs."""
    compare.compare({task: compare.TASKS[task]()}, SEEDS, FOLDER / f"{stage}-{task}", settings_on(task), lineup, command=COMMAND, say=say)


def grid(stage: str, task: str, entry: Entry, rates: tuple[float, ...], seeds: range, settings: Settings | None = None) -> None:
    """An entry at every rate: nothing is chosen."""
    settings = settings or settings_on(task)
    results, data = Results(FOLDER / f"{stage}-{task}" / "results.json", compare.common(settings, COMMAND)), compare.TASKS[task]()
    results.same_data(task, data)
    for lr in rates:
        for seed in seeds:
            if not results.find("grid", entry, task=task, lr=lr, seed=seed):
                scores, _ = settings.run(entry, data, lr, seed)
                results.add("grid", {**entry.key, "task": task, "seed": seed, "lr": lr, "steps": settings.of(entry).steps, "scores": scores, "costs": {}})
                say(f"{stage}: {task}, {entry} at {lr:g}, seed {seed}: {scores['bits_per_byte']}")


def pilot() -> None:
    for task in ("voice", "code", "sums", "facts"):
        for entry, lr in ((FULL, 1e-3), (LORA, 1e-2)):
            for steps in (200, 400, 800):
                long = steps == STEPS.get(task, 400)
                grid(f"pilot-{steps}", task, entry, (lr,), PILOT_SEEDS if long else PILOT_SEEDS[:1], Settings(steps))


def rates() -> None:
    for task in QUESTIONS:
        grid("rates", task, FULL, (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2), range(3))              # so that the best lies inside
        for entry in claims.RANKS:
            grid("rates", task, entry, (1e-3, 3e-3, 1e-2, 3e-2, 1e-1), range(3))


def alpha() -> None:
    for entry in claims.ALPHAS:
        grid("alpha", "code", entry, (1e-3, 3e-3, 1e-2, 3e-2, 1e-1), range(3))


def room() -> None:
    """By the pilot the small adapter learned more at 3e-2 than at 1e-2; full has its usual rate. Three seeds at both ends, of which claims are
    made; between them one, for the picture."""
    results = Results(FOLDER / "capacity" / "results.json", compare.common(Settings(), COMMAND))
    for count in claims.FACTS:
        task = f"{count} facts"
        results.same_data(task, compare.data.facts(count))
        for entry, lr in ((claims.SMALL, 3e-2), (FULL, 1e-3)):
            for seed in range(3 if count in (claims.FACTS[0], claims.FACTS[-1]) else 1):
                if not results.find("grid", entry, task=task, seed=seed):
                    found = capacity.until_flat(entry, count, seed, lr)
                    scores = {"bits_per_byte": None, "held": found["held"], "doublings": found["doublings"]}
                    results.add("grid", {**entry.key, "task": task, "seed": seed, "lr": lr, "steps": found["steps"], "scores": scores,
                                         "costs": {"trainable_parameters": found["parameters"]}})
                    say(f"capacity: {task}, {entry}, seed {seed}: {found['held']} bits")


def asked(stage: str, lineup: list[Entry]) -> None:
    for task in QUESTIONS:
        fight(stage, task, lineup)


STAGES = {
    "pilot": pilot,
    **{task: partial(fight, "methods", task, claims.PUBLISHED_LINEUP) for task in compare.TASKS},
    "rates": rates,
    "parts": partial(asked, "parts", [claims.ATTENTION, claims.MLP]),
    "zero": partial(asked, "zero", [claims.ZERO_A]),
    "batches": partial(asked, "batches", [claims.FULL_LARGE, claims.LORA_LARGE]),
    "alpha": alpha,
    "capacity": room,
}


def publish() -> None:
    """All stages but the pilot as one file, and what the pilot said."""
    contents = [compare.read(file) for file in sorted(FOLDER.glob("*/results.json")) if not file.parent.name.startswith("pilot")]
    made = Counter((run["task"], Entry.of(run)) for content in contents for run in content["runs"] if run["seed"] < SEEDS)
    ready = {task for task in compare.TASKS if all(made[task, entry] == SEEDS for entry in claims.FIRST[:4])}         # else nothing is there to compare with
    whole = compare.joined([content for content in contents if all(task.split()[-1] in ready for task in content["about"]["tasks"])])
    whole["runs"] = [run for run in whole["runs"] if run["seed"] < SEEDS]
    whole["runs"].sort(key=lambda run: [*compare.TASKS].index(run["task"]))
    for part in ("search", "runs"):                        # an entry whose runs are not all there waits
        whole[part] = [record for record in whole[part] if made[record["task"], Entry.of(record)] == SEEDS]
    whole["about"]["pilot"] = {task: {} for task in compare.TASKS if task in ready}
    for task, about in whole["about"]["pilot"].items():
        for steps in (200, 400, 800):
            runs = compare.read(FOLDER / f"pilot-{steps}-{task}" / "results.json")["grid"]
            full, lora = (score_of(runs, task, entry) for entry in (FULL, LORA))
            about[f"{steps} steps"] = [round(scores[PILOT_SEEDS[0]], 4) for scores in (full, lora)]
            if len(full) > 1:
                about["deviation"] = round(statistics.stdev(paired(lora, full)), 4)
                about["seeds"] = seeds_needed(about["deviation"], claims.MARGIN)
    compare.write(compare.PUBLISHED, whole)
    say(f"{compare.PUBLISHED}: {len(whole['runs'])} runs, {len(whole['search'])} of the search, {len(whole['grid'])} of grids, {whole['about']['cpu_seconds'] / 3600:.1f} CPU hours")


def say(text: str) -> None:
    print(time.strftime("%H:%M:%S"), text, flush=True)


if __name__ == "__main__":
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("stages", nargs="+", choices=[*STAGES, "publish"])
    torch.set_num_threads(1)
    for stage in arguments.parse_args().stages:
        (publish if stage == "publish" else STAGES[stage])()
