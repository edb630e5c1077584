"""cost: what a method costs, measured on the shipped base; on a model that is not here, by the formulas."""

import argparse
import io
from pathlib import Path

import torch

import minilora as ml
from minilora import plots, storage
from minilora.commands.arguments import layer_names, method_name, whole
from minilora.evidence import compare, formulas, ledger, scoreboard, shapes
from minilora.methods import METHODS, make_method

COST_HEAD = ["layers", "in -> out", "count", "trained", "frozen", "weights", "gradients", "AdamW", "alive", "MFLOP forward", "backward"]
COST_NOTE = ("Bytes alive and FLOPs are those of the adapted layers; layers that read one input keep it once, which is taken off in a line of its own.\n"
             "Weights count what stays beside an adapter too.")


def add(commands) -> None:
    parser = commands.add_parser("cost", help="what a method costs on a real model, by the formulas")
    parser.add_argument("--shape", help=f"{', '.join(shapes.KNOWN)}, or a model's config.json (default: the shipped base, measured)")
    parser.add_argument("--method", type=method_name, default="lora")
    parser.add_argument("--rank", type=whole(1, 2**16), help="default: 8, VeRA 64")
    parser.add_argument("--targets", type=layer_names, help="comma-separated names of layers (default: all linear layers of the blocks)")
    parser.add_argument("--base", dest="base_type", choices=["fp32", "fp16", "nf4"], help="how the frozen weights are stored (default: fp16; the shipped base: fp32; nf4 where the method does so itself)")
    parser.add_argument("--tokens", type=whole(1), default=1024, help="in a batch, for bytes alive and FLOPs")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="draw the bars of every method there (PNG)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
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
    *lines, shared, rest, total = formulas.extrapolated(shape, method, targets, args.tokens, base)
    print(f"{shape.name}: {shape.parameters:,} parameters, {base}; {described}\n")
    there = {kind.name: kind for kind in shape.kinds}
    rows = [cost_row(line, kind.into, kind.out, kind.count) for line in lines for kind in [there[line.name]]]
    print(scoreboard.columns([COST_HEAD, *rows, *map(cost_row, (shared, rest, total))]))
    print(f"\ntrained: {total.trainable:,} parameters ({total.trainable / shape.parameters:.4%}), {mib(4 * total.trainable)} in fp32, {mib(2 * total.trainable)} in fp16")
    print(COST_NOTE)
    if args.picture:
        draw_costs(args, shape, targets)
    return 0


def cost_row(line: formulas.Line, into: int = 0, out: int = 0, count: int = 0, name: str = "") -> list[str]:
    return [name or line.name, f"{into:,} -> {out:,}" if out else "", str(count or ""), f"{line.trainable:,}", f"{line.frozen:,}",
            *map(mib, (line.trained_bytes + line.frozen_bytes, line.gradient_bytes, line.optimizer_bytes, line.alive_bytes)),
            f"{line.forward_flops / 1e6:,.0f}", f"{line.backward_flops / 1e6:,.0f}"]


def measured_cost(args: argparse.Namespace, method: ml.Method, targets: list[str] | None, base: str, described: str) -> int:
    """On the shipped base, which is here: every layer measured, and beside the sums what the formulas say."""
    if base == "fp16" or args.picture or args.tokens > 2**16:
        raise ValueError(f"without --shape the shipped base is measured: on fp32 or nf4, without a picture, and with at most {2**16:,} tokens")
    model = compare.Entry(args.method, base).model()
    ml.adapt(model, method, targets)
    width = max(length for length in range(1, model.config.context + 1) if args.tokens % length == 0)
    ids = torch.zeros(args.tokens // width, width, dtype=torch.long)
    *lines, shared, rest, total = ledger.ledger(model, args.tokens, lambda: model(ids))
    foretold = ledger.predicted(model, args.tokens, lambda: model(ids))[-1]
    sizes = {name: module for name, module in model.named_modules()}
    print(f"the shipped base: {sum(p.numel() for p in ml.load_base().parameters()):,} parameters, {base}; {described}\n")
    rows = [cost_row(line, sizes[line.name].in_features, sizes[line.name].out_features, 1) for line in lines]
    sums = [cost_row(total, name="all, measured"), cost_row(foretold, name="all, by the formulas")]
    print(scoreboard.columns([COST_HEAD, *rows, cost_row(shared), cost_row(rest), *sums]))
    print(f"\non disk: {ledger.disk_bytes(model):,} bytes measured, {ledger.predicted_disk_bytes(model):,} by the formula\n{COST_NOTE}")
    return 0


def draw_costs(args: argparse.Namespace, shape: shapes.Shape, targets: list[str] | None) -> None:
    """A bar for each method on this shape: weights, gradients, AdamW's state, bytes alive in the adapted layers."""
    bars = {}
    for name in METHODS:
        for base in ("fp32" if args.base_type == "fp32" else "fp16", "nf4"):
            try:
                total = formulas.extrapolated(shape, make_method(name, None if name == "full" else args.rank), targets, args.tokens, base)[-1]
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
