"""python -m minilora: fine-tune the tiny GPT on a text of your own, let it speak, merge what it learned.

    finetune   --text FILE | --task voice|facts|sums   [--method lora --rank 8 --steps 200 --out DIR …]
               methods: full lora lora-plus lora-fa vera delta-lora lora-drop adalora rslora dora pissa qlora loftq qpissa
    generate   [--adapter DIR] --prompt TEXT
    merge      --adapter DIR --out FILE
    compare    [--quick] [--text FILE | --task voice,facts,sums] --out DIR      every method, a table and two pictures
    claims     [--results FILE]                        the papers' headlines, judged by what compare measured
    capacity   --out DIR                               facts remembered against rank; AdaLoRA's ranks as a film
    cost       [--shape chatglm-6b] --method lora …    what a method costs, measured here; on a real model by the same formulas
    pretrain   --out FILE                              how the shipped base was made
"""

import argparse
import copy
import dataclasses
import io
import json
import math
import sys
import tempfile
from pathlib import Path

import torch

import minilora as ml
from minilora import capacity, claims, compare, data, measure, plots, scoreboard, shapes, storage
from minilora.methods import METHODS, RATES, make_method

CHECKPOINT, MODEL, HISTORY, PICTURE = "checkpoint.pt", "model.safetensors", "history.json", "loss.png"
WRITTEN = (CHECKPOINT, MODEL, HISTORY, PICTURE, storage.CONFIG, storage.WEIGHTS)


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        self.exit(2, f"minilora: {message}\n")


def main(arguments: list[str] | None = None) -> int:
    """Run one command. Returns its exit code: 0, 2 for bad input (one line says what), 130 after Ctrl-C."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")          # a terminal without UTF-8 shows ? and goes on
    args = parser().parse_args(arguments)
    try:
        return args.run(args)
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        return 130
    except BrokenPipeError:
        return 0
    except (ValueError, OSError, FloatingPointError) as error:
        print(f"minilora: {error}", file=sys.stderr)
        return 2


def parser() -> Parser:
    top = Parser(prog="minilora", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = top.add_subparsers(required=True, metavar="command", parser_class=Parser)

    finetune = commands.add_parser("finetune", help="adapt the base to a text or a built-in task")
    source = finetune.add_mutually_exclusive_group(required=True)
    source.add_argument("--text", type=Path, metavar="FILE", help="any UTF-8 file; its last tenth is held out")
    source.add_argument("--task", choices=data.TASKS, help="a task with known answers")
    finetune.add_argument("--method", type=method_name, default="lora", help=", ".join(METHODS))
    finetune.add_argument("--rank", type=whole(1, 2**16), help="rank of the update (default: 8, VeRA 64); AdaLoRA's target, from half as much again")
    finetune.add_argument("--alpha", type=positive, help="strength of the update (default: the method's)")
    finetune.add_argument("--steps", type=whole(1), default=200)
    finetune.add_argument("--lr", type=positive, help="peak learning rate (default: one that suits the method)")
    finetune.add_argument("--seed", type=whole(0), default=0)
    finetune.add_argument("--targets", type=layer_names, help="comma-separated names of layers (default: all linear layers of the blocks)")
    finetune.add_argument("--out", type=Path, metavar="DIR", help="where the adapter goes (default: runs/NAME-METHOD)")
    finetune.add_argument("--force", action="store_true", help="replace what an earlier run left in DIR")
    finetune.set_defaults(run=run_finetune)

    generate = commands.add_parser("generate", help="continue a prompt")
    generate.add_argument("--prompt", default="", help="how the text begins (default: a new document)")
    generate.add_argument("--adapter", type=Path, metavar="DIR", help="what finetune wrote")
    generate.add_argument("--max-new", type=whole(1), default=200, metavar="BYTES")
    generate.add_argument("--temperature", type=not_negative, default=0.7)
    generate.add_argument("--seed", type=whole(0), default=None)
    generate.set_defaults(run=run_generate)

    merge = commands.add_parser("merge", help="fold an adapter into a model file of its own")
    merge.add_argument("--adapter", type=Path, required=True, metavar="DIR")
    merge.add_argument("--out", type=Path, required=True, metavar="FILE")
    merge.add_argument("--force", action="store_true", help="replace FILE")
    merge.set_defaults(run=run_merge)

    fight = commands.add_parser("compare", help="every method on your text or the built-in tasks, each at its own learning rate")
    source = fight.add_mutually_exclusive_group()
    source.add_argument("--text", type=Path, metavar="FILE", help="any UTF-8 file; its last tenth is held out")
    source.add_argument("--task", type=task_names, default=["voice"], help="comma-separated: voice, facts, sums (default: voice)")
    fight.add_argument("--quick", action="store_true", help="one seed, 40 steps, and the learning rates of the published search")
    fight.add_argument("--seeds", type=whole(1), help="runs of each method (default: 5, quick 1)")
    fight.add_argument("--steps", type=whole(10), help="of training (default: 100, quick 40); where a task asks questions, twice as many of half the size")
    fight.add_argument("--budget", type=whole(1), metavar="PARAMS", help="and again, all with about so many trainable parameters")
    fight.add_argument("--claims", action="store_true", help="also what the papers' claims need, and the verdicts")
    fight.add_argument("--out", type=Path, metavar="DIR", help="results go there; a comparison that was stopped goes on (default: runs/compare)")
    fight.set_defaults(run=run_compare)

    trial = commands.add_parser("claims", help="the papers' headlines, judged by rule")
    trial.add_argument("--results", type=Path, default=compare.PUBLISHED, metavar="FILE", help="a results.json of compare --claims (default: the published one)")
    trial.set_defaults(run=run_claims)

    memory = commands.add_parser("capacity", help="facts remembered against rank, one curve more with each call; and AdaLoRA's ranks as a film")
    memory.add_argument("--facts", type=whole(2), default=128)
    memory.add_argument("--steps", type=whole(10), default=800)
    memory.add_argument("--seeds", type=whole(1), default=3)
    memory.add_argument("--out", type=Path, required=True, metavar="DIR")
    memory.set_defaults(run=run_capacity)

    cost = commands.add_parser("cost", help="what a method costs on a real model, by the formulas")
    cost.add_argument("--shape", help=f"{', '.join(shapes.KNOWN)}, or a model's config.json (default: the shipped base, measured)")
    cost.add_argument("--method", type=method_name, default="lora")
    cost.add_argument("--rank", type=whole(1, 2**16), help="default: 8, VeRA 64")
    cost.add_argument("--targets", type=layer_names, help="comma-separated names of layers (default: all linear layers of the blocks)")
    cost.add_argument("--base", dest="base_type", choices=["fp32", "fp16", "nf4"], help="how the frozen weights are stored (default: fp16; the shipped base: fp32; nf4 where the method does so itself)")
    cost.add_argument("--tokens", type=whole(1), default=1024, help="in a batch, for bytes alive and FLOPs")
    cost.add_argument("--picture", type=Path, metavar="FILE", help="draw the bars of every method there (PNG)")
    cost.set_defaults(run=run_cost)

    for command in (finetune, generate, merge, fight):
        command.add_argument("--base", type=Path, metavar="FILE", help="another base than the shipped one")

    pretrain = commands.add_parser("pretrain", help="make a base model from nothing, as the shipped one was made")
    pretrain.add_argument("--out", type=Path, required=True, metavar="FILE")
    pretrain.add_argument("--steps", type=whole(1), default=5500)
    pretrain.set_defaults(run=run_pretrain)
    return top


def run_finetune(args: argparse.Namespace) -> int:
    task = data.text(args.text) if args.text else data.TASKS[args.task]()
    method = make_method(args.method, args.rank, args.alpha, args.steps)
    targets = args.targets
    model = on_best_device(byte_base(args.base))
    ml.adapt(copy.deepcopy(model), method, targets)       # whatever the method or the targets refuse, it is refused here
    context, lr = model.config.context, args.lr or RATES[args.method]
    windows = task.held_out(context + 1)

    out = args.out or Path("runs") / f"{args.text.stem if args.text else args.task}-{args.method}"
    made = claim(out, args.force)
    try:
        seen = f", {data.overlap(task, args.text.read_bytes()):.0%} of them seen in training" if args.text else ""
        print(f"{task.name}: {windows.numel():,} bytes held out{seen}\n\nbefore:\n{sample(model, task)}\n")
        before = scores(model, task, windows)
        try:
            history = ml.finetune(
                model, method, task.batches(16, context, args.seed), args.steps, lr, args.seed, out / CHECKPOINT, targets=targets,
                warmup=min(20, args.steps // 10), schedule="linear", evaluate=lambda model: ml.held_out_loss(model, windows))
        except KeyboardInterrupt:
            print(f"\nstopped; a checkpoint is in {out}. The same command goes on from there.", file=sys.stderr)
            return 130
        after = scores(model, task, windows)
        print(f"\nafter:\n{sample(model, task)}\n")
        report(model, args.method, before, after)
        settings = {"task": task.name, "method": args.method, "hyperparameters": dataclasses.asdict(method), "targets": targets,
                    "steps": args.steps, "lr": lr, "seed": args.seed, "trainable_parameters": ml.trainable_parameters(model)}
        write_results(out, model, settings | {"before": before, "after": after} | history, task.floor and task.floor(windows))
        print(f"\nin {out}: {', '.join(sorted(file.name for file in out.iterdir()))}")
        return 0
    finally:
        for folder in made:                               # a folder that nothing was written to is not left behind
            if folder.exists() and not any(folder.iterdir()):
                folder.rmdir()


def write_results(out: Path, model: ml.TinyGPT, summary: dict, floor: float | None) -> None:
    """The adapter (or the model, fully fine-tuned), the picture, and last the history, which marks the run as finished."""
    if any(True for _ in ml.adapters(model)):
        ml.save_adapter(model, out)
    else:
        storage.save_model(model, out / MODEL)
    title = f"{plots.printable(summary['task'])}: {summary['method']}, {summary['trainable_parameters']:,} trainable parameters"
    picture = io.BytesIO()
    plots.loss_curve(summary, title, floor).savefig(picture, dpi=150)
    storage.write_atomically(out / PICTURE, picture.getvalue())
    storage.write_atomically(out / HISTORY, (json.dumps(summary, indent=1) + "\n").encode())
    (out / CHECKPOINT).unlink(missing_ok=True)


def run_generate(args: argparse.Namespace) -> int:
    model = on_best_device(load(args))
    print(model.generate(args.prompt, args.max_new, args.temperature, args.seed))
    return 0


def run_merge(args: argparse.Namespace) -> int:
    if args.out.exists() and not args.force:
        raise ValueError(f"{args.out} exists already; --force replaces it")
    storage.save_model(ml.merge(ml.load_adapter(ml.load_base(args.base), args.adapter)), args.out)
    print(f"{args.out}: a model of its own; speak with it by `generate --base {args.out}`")
    return 0


def run_compare(args: argparse.Namespace) -> int:
    tasks = {args.text.name: data.text(args.text)} if args.text else {name: compare.TASKS[name]() for name in args.task}
    settings = compare.Settings(args.steps or (40 if args.quick else 100), base=args.base)
    out, seeds = args.out or Path("runs/compare"), args.seeds or (1 if args.quick else 5)
    byte_base(args.base)
    made = room(out)
    budget = compare.at_budget(args.budget, settings.steps, args.base) if args.budget else []
    lineup = list(dict.fromkeys([*compare.entries(), *budget, *(claims.LINEUP if args.claims else ())]))
    command = " ".join(["python -m minilora", *(sys.argv[1:] if sys.argv[0].endswith("__main__.py") else ["compare"])])
    try:
        runs = compare.compare(tasks, seeds, out, settings, lineup, args.quick, command).content["runs"]
    except KeyboardInterrupt:
        print(f"\nstopped; the finished runs are in {out}. The same command goes on from there.", file=sys.stderr)
        return 130
    except ValueError:
        for folder in made:                               # refused before the first run: no empty folder stays
            if not any(folder.iterdir()):
                folder.rmdir()
        raise
    runs = [run for run in runs if run["task"] in tasks and run["seed"] < seeds]        # an earlier call may have made more
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
        print(f"\n{claims.report(runs)}")
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
    mean, low, high = scoreboard.bootstrap(list(scores.values()))
    return None if math.isnan(mean) else (mean, low, high) if math.isfinite(low) else (mean,) * 3


def run_claims(args: argparse.Namespace) -> int:
    content = compare.read(args.results)
    print(f"{args.results.name}: {content['about'].get('command', '')}\n")
    print(claims.report(content["runs"]))
    return 0


def run_capacity(args: argparse.Namespace) -> int:
    data.invented(args.facts)                             # refused here, if there are not so many
    room(args.out)
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


def run_cost(args: argparse.Namespace) -> int:
    targets = args.targets
    method = make_method(args.method, None if args.method == "full" else args.rank)
    rank = getattr(method, "target_rank", getattr(method, "rank", None))
    described = f"{args.method}{f', rank {rank}' if rank else ''}, {args.tokens:,} tokens"
    base = args.base_type or ("nf4" if args.method in compare.OWN_BASE else "fp16" if args.shape else "fp32")
    if args.method in compare.OWN_BASE and base != "nf4":
        raise ValueError(f"{args.method} puts its base in four bits; leave --base {base} out")
    if args.shape is None:
        return measured_cost(args, method, targets, base, described)
    shape = shapes.shape(args.shape)
    *lines, shared, rest, total = measure.extrapolated(shape, method, targets, args.tokens, base)
    print(f"{shape.name}: {shape.parameters:,} parameters, {base}; {described}\n")
    there = {kind.name: kind for kind in shape.kinds}
    rows = [cost_row(line, kind.into, kind.out, kind.count) for line in lines for kind in [there[line.name]]]
    print(scoreboard.columns([COST_HEAD, *rows, *map(cost_row, (shared, rest, total))]))
    print(f"\ntrained: {total.trainable:,} parameters ({total.trainable / shape.parameters:.4%}), {mib(4 * total.trainable)} in fp32, {mib(2 * total.trainable)} in fp16")
    print(COST_NOTE)
    if args.picture:
        draw_costs(args, shape, targets)
    return 0


COST_HEAD = ["layers", "in -> out", "count", "trained", "frozen", "weights", "gradients", "AdamW", "alive", "MFLOP forward", "backward"]
COST_NOTE = ("Bytes alive and FLOPs are those of the adapted layers; layers that read one input keep it once, which is taken off in a line of its own.\n"
             "Weights count what stays beside an adapter too.")


def cost_row(line: measure.Line, into: int = 0, out: int = 0, count: int = 0, name: str = "") -> list[str]:
    return [name or line.name, f"{into:,} -> {out:,}" if out else "", str(count or ""), f"{line.trainable:,}", f"{line.frozen:,}",
            *map(mib, (line.trained_bytes + line.frozen_bytes, line.gradient_bytes, line.optimizer_bytes, line.alive_bytes)),
            f"{line.forward_flops / 1e6:,.0f}", f"{line.backward_flops / 1e6:,.0f}"]


def measured_cost(args: argparse.Namespace, method: ml.Method, targets: list[str] | None, base: str, described: str) -> int:
    """On the shipped base, which is here: every layer measured, and beside the sums what the formulas say."""
    if base == "fp16" or args.picture or args.tokens > 2**16:
        raise ValueError(f"without --shape the shipped base is measured: on fp32 or nf4, without a picture, and with at most {2**16:,} tokens")
    model = compare.Entry(args.method, base).model()
    ml.adapt(model, method, targets)
    method.before_step(model, 0)                          # from here on Delta-LoRA moves W
    width = max(length for length in range(1, model.config.context + 1) if args.tokens % length == 0)
    ids = torch.zeros(args.tokens // width, width, dtype=torch.long)
    *lines, shared, rest, total = measure.ledger(model, args.tokens, lambda: model(ids))
    formulas = measure.predicted(model, args.tokens, lambda: model(ids))[-1]
    sizes = {name: module for name, module in model.named_modules()}
    print(f"the shipped base: {sum(p.numel() for p in ml.load_base().parameters()):,} parameters, {base}; {described}\n")
    rows = [cost_row(line, sizes[line.name].in_features, sizes[line.name].out_features, 1) for line in lines]
    sums = [cost_row(total, name="all, measured"), cost_row(formulas, name="all, by the formulas")]
    print(scoreboard.columns([COST_HEAD, *rows, cost_row(shared), cost_row(rest), *sums]))
    print(f"\non disk: {measure.disk_bytes(model):,} bytes measured, {measure.predicted_disk_bytes(model):,} by the formula\n{COST_NOTE}")
    return 0


def draw_costs(args: argparse.Namespace, shape: shapes.Shape, targets: list[str] | None) -> None:
    """A bar for each method on this shape: weights, gradients, AdamW's state, bytes alive in the adapted layers."""
    bars = {}
    for name in METHODS:
        for base in ("fp32" if args.base_type == "fp32" else "fp16", "nf4"):
            try:
                total = measure.extrapolated(shape, make_method(name, None if name == "full" else args.rank), targets, args.tokens, base)[-1]
            except ValueError:                            # it cannot stand on that base
                continue
            if (name in compare.OWN_BASE) == (base == "nf4"):
                bars[f"{name}, {base}"] = {"weights": (total.trained_bytes + total.frozen_bytes) / 2**30, "gradients": total.gradient_bytes / 2**30,
                                           "AdamW": total.optimizer_bytes / 2**30, f"alive, {args.tokens:,} tokens": total.alive_bytes / 2**30}
    picture = io.BytesIO()
    plots.cost_bars(bars, f"{plots.printable(shape.name, 'the shape')}, rank {args.rank or '8 (VeRA 64)'}: memory of training").savefig(picture, dpi=110)
    args.picture.parent.mkdir(parents=True, exist_ok=True)
    storage.write_atomically(args.picture, picture.getvalue())
    print(f"drawn: {args.picture}")


def mib(size: float) -> str:
    return f"{size / 2**10:,.1f} KiB" if 0 < size < 2**20 else f"{size / 2**20:,.1f} MiB" if size < 2**30 else f"{size / 2**30:,.2f} GiB"


def run_pretrain(args: argparse.Namespace) -> int:
    torch.manual_seed(0)
    model = on_best_device(ml.TinyGPT())
    tiny = data.world()
    windows = tiny.held_out(model.config.context + 1)
    checkpoint = args.out.with_suffix(".checkpoint")
    ml.finetune(model, ml.FullFineTuning(), data.pretraining(), args.steps, lr=3e-3, checkpoint=checkpoint, weight_decay=0.01,
                warmup=200, schedule="cosine", evaluate=lambda model: ml.held_out_loss(model, windows), evaluate_every=250)
    storage.save_model(model, args.out)
    checkpoint.unlink()
    print(f"tiny world, held out: {ml.held_out_loss(model, windows):.4f} nats per byte, floor {tiny.floor(windows):.4f}")
    return 0


def task_names(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in data.TASKS:
            raise argparse.ArgumentTypeError(f"invalid choice: {name!r} (choose from {', '.join(data.TASKS)})")
    return list(dict.fromkeys(names))


def layer_names(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",")]
    if not all(names):
        raise argparse.ArgumentTypeError(f"names of layers with commas between them, got {text!r}")
    return names


def method_name(text: str) -> str:
    """The name in METHODS, however it is spelled: LoRA+, lora_plus and lora-plus are one."""
    def plain(name):
        return name.lower().replace("+", "plus").replace("-", "").replace("_", "").replace(" ", "")
    for name in METHODS:
        if plain(name) == plain(text):
            return name
    raise argparse.ArgumentTypeError(f"invalid choice: {text!r} (choose from {', '.join(METHODS)})")


def load(args: argparse.Namespace) -> ml.TinyGPT:
    """The base, with the adapter if one is named; or the whole model that full fine-tuning left in that folder."""
    if args.adapter and (args.adapter / MODEL).exists():
        return byte_base(args.adapter / MODEL)
    model = byte_base(args.base)
    return ml.load_adapter(model, args.adapter) if args.adapter else model


def byte_base(path: Path | None) -> ml.TinyGPT:
    model = ml.load_base(path)
    if model.config.vocab_size != 256:
        raise ValueError(f"{path}: a base of {model.config.vocab_size} symbols, and texts are read here as bytes, of which there are 256")
    return model


def refuse_file(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file; --out takes a folder")


def room(out: Path) -> list[Path]:
    """Make sure that the folder is there and takes files. Returns the folders that had to be made."""
    refuse_file(out)
    made = [folder for folder in (out, *out.parents) if not folder.exists()]
    try:
        out.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=out).close()
    except OSError as error:
        for folder in filter(Path.exists, made):
            folder.rmdir()
        raise ValueError(f"{out}: cannot write there ({error.strerror})") from None
    return made


def claim(out: Path, force: bool) -> list[Path]:
    """Make sure that the folder is there, ours to write in, and no finished run's. Returns the folders that had to be made."""
    refuse_file(out)
    unfinished = {f".{name}.tmp" for name in WRITTEN}     # what a kill in the middle of writing leaves
    there = {file.name for file in out.iterdir()} - unfinished if out.exists() else set()
    if not force and HISTORY in there:
        raise ValueError(f"{out} holds a finished run; take another --out, or --force to replace it")
    if not force and there and CHECKPOINT not in there:
        raise ValueError(f"{out} is not empty and holds no run to go on with; take another --out, or --force to write there")
    made = room(out)
    if force:
        for name in {*WRITTEN, *unfinished}:
            (out / name).unlink(missing_ok=True)
    return made


def scores(model: ml.TinyGPT, task: data.Task, windows: torch.Tensor) -> dict[str, float]:
    """Bits per byte on the task's held-out part and on the tiny world's, and the share of its questions answered exactly."""
    home = data.world().held_out(model.config.context + 1)
    found = {"bits_per_byte": ml.held_out_loss(model, windows) / math.log(2),
             "world_bits_per_byte": ml.held_out_loss(model, home) / math.log(2)}
    if task.questions:
        found["exact_match"] = ml.exact_match(model, task.questions)
    return found


def sample(model: ml.TinyGPT, task: data.Task) -> str:
    lines = model.generate(task.prompt, 160, temperature=0.7, seed=0).strip("\n").splitlines()
    return "\n".join(f"    {line}" for line in lines)


def report(model: ml.TinyGPT, method: str, before: dict, after: dict) -> None:
    everything = sum(parameter.numel() for parameter in model.parameters())
    print(f"{method}: {ml.trainable_parameters(model):,} of {everything:,} parameters trained")
    print(f"held out:  {before['bits_per_byte']:.3f} -> {after['bits_per_byte']:.3f} bits per byte")
    if "exact_match" in after:
        print(f"answered:  {before['exact_match']:.1%} -> {after['exact_match']:.1%} of unseen questions, byte for byte")
    world, now = before["world_bits_per_byte"], after["world_bits_per_byte"]
    print(f"forgotten: {now - world:+.3f} bits per byte on the tiny world ({world:.3f} -> {now:.3f})")


def on_best_device(model: ml.TinyGPT) -> ml.TinyGPT:
    best = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    return model.to(best)


def whole(least: int, most: int = 10**9):
    def number(text: str) -> int:
        if not text.isdecimal() or len(text) > 100 or int(text) < least:
            raise argparse.ArgumentTypeError(f"must be a whole number of at least {least}, got {text!r:.50}")
        if int(text) > most:
            raise argparse.ArgumentTypeError(f"must be at most {most:,}, got {text}")
        return int(text)

    return number


def positive(text: str) -> float:
    value = not_negative(text)
    if value == 0:
        raise argparse.ArgumentTypeError(f"must be positive and finite, got {text!r}")
    return value


def not_negative(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a finite number that is not negative, got {text!r}")
    return value


if __name__ == "__main__":
    sys.exit(main())
