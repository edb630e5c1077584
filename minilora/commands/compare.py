"""compare, claims and capacity: every method side by side, the papers' headlines judged, facts remembered against rank."""

import argparse
import io
import json
import math
import sys
from pathlib import Path

from minilora import data, plots, storage
from minilora.commands.arguments import task_names, whole
from minilora.commands.folders import room
from minilora.commands.models import base_argument, byte_base
from minilora.evidence import capacity, claims, compare, scoreboard


def add(commands) -> None:
    fight = commands.add_parser("compare", help="every method on your text or the built-in tasks, each at its own learning rate")
    source = fight.add_mutually_exclusive_group()
    source.add_argument("--text", type=Path, metavar="FILE", help="any UTF-8 file; its last tenth is held out")
    source.add_argument("--task", type=task_names, default=["voice"], help="comma-separated: voice, facts, sums, code (default: voice)")
    fight.add_argument("--quick", action="store_true", help="one seed, 80 steps, and the learning rates of the published search")
    fight.add_argument("--seeds", type=whole(1), help="runs of each method (default: 5, quick 1)")
    fight.add_argument("--steps", type=whole(10), help="of training, 8 windows of 64 bytes each (default: 400, quick 80)")
    fight.add_argument("--nf4", action="store_true", help="every method on a base in four bits too")
    fight.add_argument("--budget", type=whole(1), metavar="PARAMS", help="and again, all with about so many trainable parameters")
    fight.add_argument("--claims", action="store_true", help="also what the papers' claims need, and the verdicts")
    fight.add_argument("--out", type=Path, metavar="DIR", help="results go there; a comparison that was stopped goes on (default: runs/compare)")
    fight.set_defaults(run=run_compare)
    base_argument(fight)

    trial = commands.add_parser("claims", help="the papers' headlines, judged by rule")
    trial.add_argument("--results", type=Path, default=compare.PUBLISHED, metavar="FILE", help="a results.json of compare --claims (default: the published one)")
    trial.set_defaults(run=run_claims)

    memory = commands.add_parser("capacity", help="facts remembered against rank, one curve more with each call; and AdaLoRA's ranks as a film")
    memory.add_argument("--facts", type=whole(2), default=128)
    memory.add_argument("--steps", type=whole(10), default=800)
    memory.add_argument("--seeds", type=whole(1), default=3)
    memory.add_argument("--out", type=Path, required=True, metavar="DIR")
    memory.set_defaults(run=run_capacity)


def run_compare(args: argparse.Namespace) -> int:
    tasks = [data.text(args.text)] if args.text else [compare.TASKS[name]() for name in args.task]
    tasks = {task.name: task for task in tasks}
    settings = compare.Settings(args.steps or (80 if args.quick else 400), base=args.base)
    out, seeds = args.out or Path("runs/compare"), args.seeds or (1 if args.quick else 5)
    byte_base(args.base)
    command = " ".join(["python -m minilora", *(sys.argv[1:] if sys.argv[0].endswith("__main__.py") else ["compare"])])
    with room(out):
        budget = compare.at_budget(args.budget, settings.steps, args.base, args.nf4) if args.budget else []
        lineup = list(dict.fromkeys([*compare.entries(args.nf4), *budget, *(claims.LINEUP if args.claims else ())]))
        try:
            content = compare.compare(tasks, seeds, out, settings, lineup, args.quick, command).content
        except KeyboardInterrupt:
            print(f"\nstopped; the finished runs are in {out}. The same command goes on from there.", file=sys.stderr)
            return 130
        runs = [run for run in content["runs"] if run["task"] in tasks and run["seed"] < seeds]    # an earlier call may have made more
        write_comparison(runs, out)
    for task in tasks:
        print(f"\n{task}, at equal steps; bytes in KiB, time as a share of full fine-tuning's, forgotten in bits per byte on the tiny world")
        print(scoreboard.table(runs, task))
        if args.budget:
            print(f"\n{task}, at about {args.budget:,} trainable parameters")
            print(scoreboard.table(runs, task, budget) if budget else "no method can be brought within a tenth of that")
    if args.quick:
        print("\nA first look and no ranking: few runs, short ones, at rates that were found for longer ones. Without --quick each finds its own.")
    if args.claims:
        print("\n" + claims.report({"runs": runs, "grid": []}))
    print(f"\nin {out}: {', '.join(sorted(file.name for file in out.iterdir()))}")
    return 0


def write_comparison(runs: list[dict], out: Path) -> None:
    """The table as CSV, and the two pictures."""
    scoreboard.write_csv(runs, out / "results.csv")
    better, kept = {}, {}
    for task in dict.fromkeys(run["task"] for run in runs):
        better[task], kept[task] = [], []
        for entry in scoreboard.entries_of(runs, task):
            score, lost = (drawn(scoreboard.score_of(runs, task, entry, name)) for name in ("bits_per_byte", "forgotten"))
            if score:
                name = entry.method + (f" r={entry.rank}" if entry.rank else "")
                better[task].append((name, entry.base, scoreboard.costs_of(runs, task, entry)["trainable_parameters"], score))
                if not entry.rank:                          # at other ranks too, names would cover the picture
                    kept[task].append((name, entry.base, score, lost))
    for name, figure in (("quality.png", plots.quality(better)), ("forgetting.png", plots.forgetting(kept))):
        picture = io.BytesIO()
        figure.savefig(picture, dpi=110)
        storage.write_atomically(out / name, picture.getvalue())


def drawn(scores: dict[int, float]) -> plots.Interval | None:
    """The mean and its interval, of no width where there is one seed; None where a run diverged."""
    mean, low, high = scoreboard.confidence(list(scores.values()))
    return None if math.isnan(mean) else (mean, low, high) if math.isfinite(low) else (mean,) * 3


def run_claims(args: argparse.Namespace) -> int:
    content = compare.read(args.results)
    print(f"{args.results.name}: {content['about'].get('command', '')}\n")
    print(claims.report(content))
    return 0


def run_capacity(args: argparse.Namespace) -> int:
    data.invented(args.facts)                             # refused here, if there are not so many
    with room(args.out):
        file = args.out / "capacity.json"
        records = capacity.read(file) if file.exists() else []

        def keep(record: dict) -> None:
            records.append(record)
            storage.write_atomically(file, ("[\n" + ",\n".join(map(json.dumps, records)) + "\n]\n").encode())

        found = capacity.curve(args.facts, args.steps, args.seeds, list(records), keep=keep)
        for name, figure in (("capacity.png", plots.capacity(found)), ("film.png", plots.rank_film(capacity.film()))):
            picture = io.BytesIO()
            figure.savefig(picture, dpi=110)
            storage.write_atomically(args.out / name, picture.getvalue())
    print(f"in {args.out}: {', '.join(sorted(file.name for file in args.out.iterdir()))}")
    return 0
