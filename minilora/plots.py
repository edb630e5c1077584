"""Figures, and nothing else: numbers in, a matplotlib Figure out. Colours are Okabe and Ito's, which colour-blind readers can tell apart."""

import itertools
import math
from statistics import fmean
from typing import NamedTuple

from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke

BLACK, ORANGE, SKY, GREEN, YELLOW, BLUE, VERMILION, PURPLE = (
    "#000000", "#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7")


def printable(name: str, otherwise: str = "your text") -> str:
    """A name as a title can show it: matplotlib's own font knows no Chinese, and takes what stands between two $ for mathematics."""
    return name.replace("$", r"\$") if name.isascii() else otherwise


def loss_curve(history: dict, title: str, floor: float | None = None) -> Figure:
    """Training loss and held-out loss over the steps, in bits per byte. history as finetune returns it; floor in nats."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    losses = [loss / math.log(2) for loss in history["loss"]]
    axes.plot(range(1, len(losses) + 1), losses, color=SKY, linewidth=1, label="training, one batch")
    if history["evaluated"]:
        steps, values = zip(*history["evaluated"])
        axes.plot(steps, [value / math.log(2) for value in values], color=VERMILION, marker="o", linewidth=2, label="held out")
    if floor is not None:
        axes.axhline(floor / math.log(2), color=BLACK, linestyle="--", linewidth=1, label="floor (the grammar's own)")
    axes.set(xlabel="step", ylabel="bits per byte", title=title)
    axes.grid(alpha=0.25)
    axes.legend()
    return figure


def lora_drawing(out: int = 6, into: int = 9, rank: int = 2) -> Figure:
    """y = W x + s · B A x, every matrix drawn to scale: W grey and locked, A and B in colour."""
    figure = Figure(figsize=(9, 3), layout="constrained")
    axes = figure.subplots()
    axes.set_aspect("equal")
    axes.axis("off")
    x = 0.0

    def matrix(rows: int, columns: int, name: str, below: str, color: str, filled: float) -> None:
        nonlocal x
        for row in range(rows):
            for column in range(columns):
                axes.add_patch(Rectangle((x + column, -rows / 2 + row), 0.92, 0.92, facecolor=color, alpha=filled, edgecolor=color))
        axes.text(x + columns / 2, 0, name, ha="center", va="center", fontsize=20, weight="bold", color="white" if filled > 0.6 else BLACK)
        axes.text(x + columns / 2, -rows / 2 - 0.7, below, ha="center", va="top", fontsize=10)
        x += columns + 0.6

    def sign(text: str) -> None:
        nonlocal x
        axes.text(x + 0.5, 0, text, ha="center", va="center", fontsize=20)
        x += 1.6

    matrix(out, into, "W", "frozen: not one bit moves\n(out, in)", "#888888", 0.35)
    sign("+")
    sign("s ·")
    matrix(out, rank, "B", "trained, starts at 0\n(out, rank)", BLUE, 0.85)
    sign("·")
    matrix(rank, into, "A", "trained, starts random\n(rank, in)", VERMILION, 0.85)
    axes.set(xlim=(-0.5, x), ylim=(-out / 2 - 2.3, out / 2 + 0.3))
    axes.set_title("LoRA does not decompose W: it adds  dW = s · B A  beside it,  s = alpha / rank", fontsize=13)
    return figure


class Identity(NamedTuple):
    """`left` is `right` `when`: in the whole of training, or as a function at one moment. `unless`, they are `off` apart: the largest
    difference over the largest entry of what they add to W."""

    key: str
    left: str
    right: str
    training: bool
    when: str
    unless: str
    off: float


IDENTITIES = (                                                  # tests/test_identities.py proves each, in float64
    Identity("a_and_b_share_their_size", "LoRA", "LoRA", False, "(A / c, c B) for (A, B)", "trained on by Adam", 0.55),
    Identity("strength_is_speed", "LoRA+", "LoRA", True, "ratio c for alpha · c; Adam, no decay", "with weight decay", 0.62),
    Identity("ratio_one", "LoRA+", "LoRA", True, "ratio 1", "ratio 2", 1),
    Identity("root_of_rank", "rsLoRA", "LoRA", True, "alpha · √r for alpha", "equal alpha", 0.74),
    Identity("all_are_kept", "LoRA-drop", "LoRA", True, "threshold 1, equal seed", "threshold 0.1", 0.88),
    Identity("vera_absorbed", "VeRA", "LoRA", False, "A = diag(d) A, B = diag(b) B, s = 1", "d forgotten", 1.3),
    Identity("adalora_of_fixed_masks", "AdaLoRA", "LoRA", True, "Λ fixed at ones and zeros, no penalty", "Λ trained", 0.51),
    Identity("no_delta", "Delta-LoRA", "LoRA", True, "λ = 0", "λ = 0.5", 0.5),
    Identity("delta_from_the_start", "Delta-LoRA", "LoRA", True, "K = 0, scale (1 + λ)s; Adam", "K = 5", 0.81),
    Identity("delta_by_gradient_descent", "Delta-LoRA", "LoRA", True, "K = 0, scale (1 + λ)s, rate / (1 + λ); SGD", "equal rate", 0.67),
    Identity("delta_is_two_pairs", "Delta-LoRA", "LoRA", False, "rank 2r: [A; A_K], [(1 + λ) B, −λ B_K]", "B_K forgotten", 0.8),
    Identity("pissa_is_two_pairs", "PiSSA", "LoRA", False, "rank 2r: [A; A₀], [B, −B₀]", "+ B₀", 0.15),
    Identity("pissa_is_lora_on_the_residual", "PiSSA", "LoRA", True, "on W − s B₀A₀, from (A₀, B₀)", "on W, from (A, 0)", 2.7),
    Identity("dora_of_free_length", "DoRA", "LoRA", False, "m = ‖W + s B A‖ at every moment", "m stays ‖W‖", 0.92),
    Identity("dora_starts_as_base", "DoRA", "the base", False, "at the start", "m 10 % longer", 0.1),
    Identity("pissa_starts_as_base", "PiSSA", "the base", False, "at the start", "B₀A₀ forgotten", 1.2),
    Identity("a_stands_still", "LoRA-FA", "LoRA+", True, "A at rate 0, ratio 1", "A at B's rate", 0.91),
    Identity("nothing_to_project", "LoRA-FA", "LoRA-FA projected", True, "A Aᵀ = 1, s = 1", "A as drawn", 1.5),
    Identity("the_whole_space", "LoRA-FA", "full fine-tuning", True, "rank = in, AᵀA = 1, s = 1; SGD", "Adam", 2.1),
)


def identity_map() -> Figure:
    """Which method is which other, and when: one line an identity, drawn through for all of training, dashed for one moment."""
    rows = len(IDENTITIES)
    figure = Figure(figsize=(11, 0.5 * rows + 1.2), layout="constrained")
    axes = figure.subplots()
    axes.axis("off")
    axes.set(xlim=(-0.2, 10.2), ylim=(rows + 0.9, -0.7))
    for row, edge in enumerate(IDENTITIES):
        color = BLUE if edge.training else VERMILION
        axes.plot([1.9, 8.1], [row, row], color=color, linewidth=1.8, linestyle="-" if edge.training else (0, (4, 3)))
        for x, ha, text, tone in ((2.1, "left", edge.when, BLACK), (7.95, "right", f"{edge.unless}: {edge.off:.0%} apart", "#666666")):
            axes.text(x, row - 0.1, text, ha=ha, va="bottom", fontsize=10.5, color=tone)
    for x, names in ((0.0, [edge.left for edge in IDENTITIES]), (8.1, [edge.right for edge in IDENTITIES])):
        first = 0
        for row in range(1, rows + 1):                          # a method that follows itself is one box
            if row == rows or names[row] != names[first]:
                axes.add_patch(Rectangle((x, first - 0.42), 1.9, row - first - 0.16, facecolor="#EEF3F7", edgecolor="#888888"))
                axes.text(x + 0.95, (first + row - 1) / 2, names[first].replace(" ", "\n", 1), ha="center", va="center", fontsize=11, weight="bold")
                first = row
    axes.text(2.1, rows + 0.1, "through: equal in all of training", color=BLUE, fontsize=10.5, va="center")
    axes.text(2.1, rows + 0.6, "dashed: the same function at one moment", color=VERMILION, fontsize=10.5, va="center")
    axes.text(7.95, rows + 0.1, "grey: one condition dropped", color="#666666", fontsize=10.5, va="center", ha="right")
    axes.set_title("When is one method another?  Each line is proved in float64, and so is its failure", fontsize=13)
    return figure


def merge_survival(ratios: list[float], shares: dict[tuple[str, str], list[float]]) -> Figure:
    """How much of an update is left once it is merged. ratios: ‖dW‖ / ‖W‖; shares as `survival` returns them."""
    figure = Figure(figsize=(10, 4.4), layout="constrained")
    axes = figure.subplots()
    colors = {"float32": BLACK, "float16": BLUE, "bfloat16": ORANGE, "nf4": VERMILION}
    for (base, into), share in shares.items():
        label = f"{into}, {'dense base' if base == 'dense' else '4-bit base' if into != 'nf4' else '4-bit base, back into four bits'}"
        axes.plot(ratios, [100 * value for value in share], color=colors[into], linewidth=2, linestyle="-" if base == "dense" else (0, (2, 2)), label=label)
    axes.set(xscale="log", ylim=(-3, 103), xlabel="‖dW‖ / ‖W‖", ylabel="weights that still show the update, %",
             title="Merging rounds: what is smaller than a step of the type is gone")
    axes.annotate("where a 4-bit base\nis exactly 0, every\nupdate arrives", (ratios[1], 100 * shares["nf4", "bfloat16"][1]), xytext=(-8, 80),
                  textcoords="offset points", fontsize=9, color="#666666", arrowprops={"arrowstyle": "-", "color": "#BBBBBB"})
    axes.grid(alpha=0.25)
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    return figure


Interval = tuple[float, float, float]                           # mean, low, high


def quality(points: dict[str, list[tuple[str, str, int, Interval]]]) -> Figure:
    """Held-out bits per byte against trainable parameters: a row an entry, most parameters on top, and a panel a task.
    task: (name, base, parameters, bits per byte) of each entry."""
    counts = {}                                                 # name -> parameters; LoRA-drop's differ from task to task
    for name, _, parameters, _ in (entry for entries in points.values() for entry in entries):
        counts.setdefault(name, []).append(parameters)
    rows = sorted(counts, key=lambda name: -max(counts[name]))
    labels = [f"{name}   {'–'.join(f'{count:,.0f}' for count in sorted({min(counts[name]), max(counts[name])}))}" for name in rows]
    figure = Figure(figsize=(min(3.0 * len(points), 8.4) + 2.6, 0.27 * len(rows) + 1.4), layout="constrained")
    panels = list(figure.subplots(1, len(points), squeeze=False, sharey=True)[0])
    for axes, (task, entries) in zip(panels, points.items()):
        for name, base, _, (mean, low, high) in entries:
            color, marker, _ = BASES[base]
            row = rows.index(name) + (0.17 if base == "nf4" else -0.17)
            axes.plot([low, high], [row, row], color=color, linewidth=1.4, alpha=0.5)
            axes.plot(mean, row, marker=marker, color=color, markersize=4.5)
            if name == "full":
                axes.axvline(mean, color="#888888", linestyle=":", linewidth=1, zorder=0)
        axes.set(title=printable(task), xlabel="held out, bits per byte")
        axes.grid(axis="x", alpha=0.25)
        axes.tick_params(left=False)
        for row in range(0, len(rows), 2):                      # so that the eye keeps its row
            axes.axhspan(row - 0.5, row + 0.5, color="#888888", alpha=0.08, linewidth=0)
    panels[0].set_yticks(range(len(rows)), labels, fontsize=9)
    panels[0].set(ylim=(len(rows) - 0.5, -0.5))
    panels[0].set_title("trainable\nparameters", loc="left", x=-0.02, ha="right", fontsize=10)
    _legend(figure)
    return figure


def forgetting(points: dict[str, list[tuple[str, str, Interval, Interval]]]) -> Figure:
    """What was forgotten against what was learned, a panel a task, one under the other; a thin line ties a method's two bases.
    task: (name, base, bits per byte held out, bits per byte more on the tiny world) of each entry."""
    figure = Figure(figsize=(9, 4.6 * len(points) + 0.4), layout="constrained")
    panels = list(figure.subplots(len(points), 1, squeeze=False)[:, 0])
    for axes, (task, entries) in zip(panels, points.items()):
        axes.set(title=printable(task), xlabel="held out, bits per byte (learned more: to the left)", ylabel="forgotten, bits per byte\n(better: lower)")
        axes.grid(alpha=0.25)
        for name, base, (x, left, right), (y, under, over) in entries:
            color, marker, _ = BASES[base]
            axes.plot([left, right, x, x, x], [y, y, y, under, over], color=color, linewidth=1, alpha=0.3)
            axes.plot(x, y, marker=marker, color=color, markersize=5)
            axes.plot(*zip(*[(at, to) for other, _, (at, *_), (to, *_) in entries if other == name]), color="#888888", linewidth=0.6, zorder=1)
    _legend(figure)
    figure.draw_without_rendering()                             # where things stand on the page is known from here on
    for axes, entries in zip(panels, points.values()):
        _named(axes, [(name, x, y) for name, _, (x, *_), (y, *_) in entries])
    return figure


BASES = {"fp32": (BLUE, "o", "dense base"), "nf4": (VERMILION, "s", "4-bit base")}


VERDICTS = {"shown": (GREEN, "o"), "contradicted": (VERMILION, "X"), "open": ("#888888", "o")}


def verdicts(rows: list[tuple[str, list[tuple[str, Interval, str]], float, float]]) -> Figure:
    """A row a claim, in it a mark with its interval for each task: the number judged less the line, in units of the claim's own margin.

    rows: (headline, [(task, (mean, low, high), verdict), …], line, margin). What lies beyond ±4 margins stands at the edge, with an arrow.
    """
    tasks = list(dict.fromkeys(task for _, found, _, _ in rows for task, _, _ in found))
    figure = Figure(figsize=(10, 0.42 * len(rows) + 1.2), layout="constrained")
    axes = figure.subplots()
    for row, (headline, found, line, margin) in enumerate(rows):
        for place, (task, (mean, low, high), says) in enumerate(found):
            y = row + (place - (len(found) - 1) / 2) * 0.8 / max(4, len(tasks))
            color, mark = VERDICTS[says]
            mean, low, high = ((value - line) / margin for value in (mean, low, high))
            axes.plot([max(-4, min(4, low)), max(-4, min(4, high))], [y, y], color=color, linewidth=1.6)
            beyond = abs(mean) > 4
            axes.plot(max(-4, min(4, mean)), y, marker=(">" if mean > 0 else "<") if beyond else mark, color=color, markersize=6, fillstyle="none" if says == "open" else "full")
            axes.text(4.25, y, task, fontsize=6.5, va="center", color=color)
        axes.axhline(row + 0.5, color="#DDDDDD", linewidth=0.7)
    axes.axvline(0, color=BLACK, linewidth=1)
    axes.set(yticks=range(len(rows)), yticklabels=[headline for headline, *_ in rows], ylim=(len(rows) - 0.5, -0.5), xlim=(-4.2, 4.9),
             xlabel="the number judged less the claim's line, in margins of that claim", title="Claims on trial: 95 % intervals, and the verdict by rule")
    axes.tick_params(axis="y", labelsize=8.5)
    handles = [Line2D([], [], color=color, marker=mark, label=says, fillstyle="none" if says == "open" else "full") for says, (color, mark) in VERDICTS.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False)
    return figure


LINES = (BLACK, BLUE, VERMILION, GREEN, ORANGE, PURPLE, SKY)


def learning_and_forgetting(curves: dict[str, dict[str, list[list[float]]]]) -> Figure:
    """A panel a task: forgotten against score, a curve for each entry, a dot for each tenth of the run; it begins at the top left.

    curves: task -> name -> [[score, forgotten], …], the mean of the seeds.
    """
    figure, panels = _panels(len(curves), 4.6, 4.2)
    for axes, (task, entries) in zip(panels, curves.items()):
        for color, (name, curve) in zip(itertools.cycle(LINES), entries.items()):
            axes.plot(*zip(*curve), color=color, marker=".", linewidth=1.4, label=name)
        axes.invert_xaxis()
        axes.set(xlabel="held-out bits per byte (better to the right)", ylabel="forgotten, bits per byte of the tiny world", title=printable(task))
        axes.grid(alpha=0.25)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    return figure


def rate_curves(curves: dict[str, dict[str, dict[float, list[float]]]]) -> Figure:
    """A panel a task: the score against the learning rate, a curve an entry, a bar from the lowest to the highest seed.

    curves: task -> name -> rate -> [a score a seed].
    """
    figure, panels = _panels(len(curves), 5, 4.2)
    for axes, (task, entries) in zip(panels, curves.items()):
        lowest = min(fmean(scores) for points in entries.values() for scores in points.values())
        for color, (name, points) in zip(itertools.cycle(LINES), entries.items()):
            rates = sorted(points)
            means = [fmean(points[rate]) for rate in rates]
            spread = [[mean - min(points[rate]) for mean, rate in zip(means, rates)], [max(points[rate]) - mean for mean, rate in zip(means, rates)]]
            axes.errorbar(rates, means, yerr=spread, color=color, marker=".", linewidth=1.4, capsize=2, label=name)
        axes.set(xscale="log", xlabel="learning rate", ylabel="held-out bits per byte", title=printable(task), ylim=(None, lowest + 1.5))
        axes.grid(alpha=0.25)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 2 * len(curves)), frameon=False)
    return figure


def alpha_grid(scores: dict[tuple[float, float], float], title: str) -> Figure:
    """A field for each alpha (up) and learning rate (right): its score in figures and grey, the best of each row framed.

    scores: (alpha, rate) -> score; nan where it diverged.
    """
    alphas, rates = (sorted({pair[i] for pair in scores}) for i in (0, 1))
    figure = Figure(figsize=(1.1 * len(rates) + 1.5, 0.7 * len(alphas) + 1.6), layout="constrained")
    axes = figure.subplots()
    known = sorted(score for score in scores.values() if not math.isnan(score))
    for row, alpha in enumerate(alphas):
        best = min(rates, key=lambda rate: scores.get((alpha, rate), math.inf))
        for column, rate in enumerate(rates):
            score = scores.get((alpha, rate), math.nan)
            shade = min(1.0, (score - known[0]) / (known[-1] - known[0] or 1)) if not math.isnan(score) else 1.0
            axes.add_patch(Rectangle((column - 0.5, row - 0.5), 1, 1, facecolor=str(0.95 - 0.6 * shade), edgecolor="white"))
            axes.text(column, row, "diverged" if math.isnan(score) else f"{score:.2f}", ha="center", va="center", fontsize=9,
                      color=BLACK if shade < 0.6 else "white")
            if rate == best:
                axes.add_patch(Rectangle((column - 0.46, row - 0.46), 0.92, 0.92, fill=False, edgecolor=ORANGE, linewidth=2.5))
    axes.set(xticks=range(len(rates)), xticklabels=[f"{rate:g}" for rate in rates], yticks=range(len(alphas)), yticklabels=[f"{alpha:g}" for alpha in alphas],
             xlim=(-0.5, len(rates) - 0.5), ylim=(-0.5, len(alphas) - 0.5), xlabel="learning rate", ylabel="alpha", title=title)
    return figure


def intruder_dots(points: dict[str, list[tuple[str, float, float]]]) -> Figure:
    """A panel a task: what was forgotten against intruder dimensions a layer, a named dot a method. points: task -> (name, intruders, forgotten)."""
    figure, panels = _panels(len(points), 5.5, 4.6)
    for axes, (task, dots) in zip(panels, points.items()):
        axes.scatter([x for _, x, _ in dots], [y for _, _, y in dots], color=BLUE, zorder=3)
        axes.set(xlabel="intruder dimensions among a layer's first ten", ylabel="forgotten, bits per byte", title=printable(task))
        axes.margins(0.2)
        axes.grid(alpha=0.25)
    figure.draw_without_rendering()                             # where things stand on the page is known from here on
    for axes, dots in zip(panels, points.values()):
        _named(axes, dots)
    return figure


def _panels(count: int, width: float, height: float) -> tuple[Figure, list]:
    """A figure with so many panels of that size, two in a row, or on a page they would be too small to read."""
    rows, columns = math.ceil(count / 2), min(2, count)
    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    for spare in panels[count:]:
        spare.remove()
    return figure, panels[:count]


def _legend(figure: Figure) -> None:
    figure.legend(handles=[Line2D([], [], marker=marker, color=color, linestyle="", label=label) for color, marker, label in BASES.values()],
                  loc="outside lower center", ncols=2, frameon=False)


def _named(axes, points: list[tuple[str, float, float]], size: float = 8.5) -> None:
    """A name beside the first point of each, at the nearest place where it covers no point and no other name."""
    unit = axes.figure.dpi / 72                                 # pixels of a printer's point
    taken = [(x - 4 * unit, y - 4 * unit, x + 4 * unit, y + 4 * unit) for x, y in axes.transData.transform([point[1:] for point in points])] if points else []
    frame = axes.get_window_extent()
    for name in dict.fromkeys(name for name, _, _ in points):
        place = next(point[1:] for point in points if point[0] == name)
        x, y = axes.transData.transform(place)
        wide, high = 0.6 * size * len(name) * unit, 1.3 * size * unit
        for turn in range(16 * 14):
            far, angle = (9 + 5 * (turn // 16)) * unit, turn % 16 * math.tau / 16
            middle = x + (far + wide / 2) * math.cos(angle), y + far * math.sin(angle)
            box = middle[0] - wide / 2, middle[1] - high / 2, middle[0] + wide / 2, middle[1] + high / 2
            inside = box[0] > frame.x0 and box[2] < frame.x1 and box[1] > frame.y0 and box[3] < frame.y1
            if inside and not any(box[0] < b[2] and b[0] < box[2] and box[1] < b[3] and b[1] < box[3] for b in taken):
                break
        taken.append(box)
        axes.annotate(name, place, xytext=((middle[0] - x) / unit, (middle[1] - y) / unit), textcoords="offset points", fontsize=size, ha="center", va="center",
                      path_effects=[withStroke(linewidth=2, foreground="white")],
                      arrowprops={"arrowstyle": "-", "color": "#555555", "linewidth": 0.5, "shrinkA": 0, "shrinkB": 3} if far > 12 * unit else None)


def capacity(records: list[dict]) -> Figure:
    """Facts remembered against rank, and bits held by each trained parameter; every seed a point, the mean a line; a line style and a
    marker for each number of facts and of steps. records: as `curve` returns them."""
    figure = Figure(figsize=(12, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    colors = {"lora": BLUE, "lora-fa": ORANGE, "vera": GREEN, "full": BLACK}
    settings = list(dict.fromkeys((record["count"], record["steps"]) for record in records))
    styles = list(zip(settings, itertools.cycle("os^Dv"), itertools.cycle(("-", "--", ":", "-."))))
    for (count, steps), marker, dashes in styles:
        here = [record for record in records if (record["count"], record["steps"]) == (count, steps)]
        lora = [record for record in here if record["method"] == "lora"]
        ranks = sorted({record["rank"] for record in lora})
        left.plot(ranks, [100 * fmean(r["remembered"] for r in lora if r["rank"] == rank) for rank in ranks], color=BLUE, linestyle=dashes)
        left.scatter([r["rank"] for r in lora], [100 * r["remembered"] for r in lora], color=BLUE, s=18, marker=marker)
        for method in {r["method"]: None for r in here}:
            mine = [r for r in here if r["method"] == method]
            right.scatter([r["parameters"] for r in mine], [r["bits"] / r["parameters"] for r in mine], color=colors.get(method, PURPLE), s=20, marker=marker)
    ranks = sorted({record["rank"] for record in records if record["method"] == "lora"})
    left.set(xscale="log", xlabel="rank of LoRA", ylabel="facts remembered, %", ylim=(-3, 103), title="how many facts a rank learns in so many steps")
    left.set_xticks(ranks, [str(rank) for rank in ranks])
    left.minorticks_off()
    right.set(xscale="log", xlabel="trainable parameters", ylabel="bits held, per trained parameter", title="what a parameter holds", ylim=(0, None))
    methods = [name for name in colors if any(record["method"] == name for record in records)]
    key = [Line2D([], [], color=BLUE, linestyle=dashes, marker=marker, label=f"{count} facts, {steps:,} steps")
           for (count, steps), marker, dashes in styles]
    left.legend(handles=key, frameon=False, loc="center right")
    right.legend(handles=[Line2D([], [], color=colors[name], marker="o", linestyle="", label=name) for name in methods], frameon=False)
    for axes in (left, right):
        axes.grid(alpha=0.25)
    return figure


def room(held: dict[str, dict[int, list[float]]], told: dict[int, float]) -> Figure:
    """Bits held when nothing more is learned, against the number of facts told: a line an entry through its means, every seed a dot; grey: all that
    was told.      held: name -> number of facts -> [bits a seed]     told: number of facts -> bits."""
    figure = Figure(figsize=(6.4, 4.4), layout="constrained")
    axes = figure.subplots()
    counts = sorted(told)
    axes.plot(counts, [told[count] for count in counts], color="#999999", linestyle=":", label="told")
    for color, (name, points) in zip(itertools.cycle(LINES), held.items()):
        there = sorted(points)
        axes.plot(there, [fmean(points[count]) for count in there], color=color, label=name)
        axes.scatter([count for count in there for _ in points[count]], [bits for count in there for bits in points[count]], color=color, s=18)
    axes.set(xscale="log", yscale="log", xlabel="facts told", ylabel="bits held", title="Room: what is held when more training adds little")
    axes.set_xticks(counts, [str(count) for count in counts])
    axes.minorticks_off()
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    return figure


def rank_film(film: dict) -> Figure:
    """AdaLoRA's surviving triplets, one frame after another: blocks downwards, modules across; below, the budget that forces the cuts."""
    modules = list(dict.fromkeys(name.rsplit(".", 1)[-1] for name in film["names"]))
    blocks = list(dict.fromkeys(name.rsplit(".", 2)[0] for name in film["names"]))
    place = {name: (blocks.index(name.rsplit(".", 2)[0]), modules.index(name.rsplit(".", 1)[-1])) for name in film["names"]}
    figure = Figure(figsize=(1.7 * len(film["steps"]) + 0.8, 4.6), layout="constrained")
    grid = figure.add_gridspec(2, len(film["steps"]), height_ratios=[2, 1])
    for frame, (step, kept) in enumerate(zip(film["steps"], film["kept"])):
        axes = figure.add_subplot(grid[0, frame])
        picture = [[math.nan] * len(modules) for _ in blocks]
        for name, count in zip(film["names"], kept):
            row, column = place[name]
            picture[row][column] = count
            axes.text(column, row, str(count), ha="center", va="center", fontsize=7, color="white" if count < film["most"] * 0.6 else BLACK)
        axes.imshow(picture, vmin=0, vmax=film["most"], cmap="viridis", aspect="auto")
        axes.set_title(f"step {step}", fontsize=10)
        axes.set_xticks(range(len(modules)), [module.replace("_proj", "") for module in modules], fontsize=7, rotation=45)
        axes.set_yticks(range(len(blocks)), [f"block {row}" for row in range(len(blocks))] if frame == 0 else [""] * len(blocks), fontsize=8)
    axes = figure.add_subplot(grid[1, :])
    axes.plot(film["budget"], color=BLUE, linewidth=2, label="budget: triplets that all layers together may keep")
    axes.plot(film["steps"], [sum(kept) for kept in film["kept"]], "o", color=VERMILION, label="kept")
    axes.set(xlabel="step", ylabel="triplets", ylim=(0, 1.15 * film["budget"][0]))
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, fontsize=9)
    return figure


def cost_bars(costs: dict[str, dict[str, float]], title: str, unit: str = "GiB") -> Figure:
    """Stacked bars, a bar each: what the memory of training goes into. costs: bar -> part -> size."""
    figure = Figure(figsize=(9, 0.62 * len(costs) + 1.6), layout="constrained")
    axes = figure.subplots()
    parts = list(dict.fromkeys(part for sizes in costs.values() for part in sizes))
    colors = dict(zip(parts, ("#888888", BLUE, SKY, ORANGE, GREEN, PURPLE)))
    start = dict.fromkeys(costs, 0.0)
    for part in parts:
        sizes = [costs[bar].get(part, 0.0) for bar in costs]
        axes.barh(list(costs), sizes, left=[start[bar] for bar in costs], color=colors[part], label=part)
        start = {bar: start[bar] + size for bar, size in zip(costs, sizes)}
    for bar, total in start.items():
        axes.text(total, bar, f" {total:,.1f}", va="center", fontsize=9)
    axes.set(xlabel=unit, title=title, xlim=(0, max(start.values()) * 1.1))
    axes.invert_yaxis()
    axes.legend(frameon=False, loc="lower right")
    return figure


def ratios(panels: dict[str, dict[str, list[tuple[str, float, float, float]]]], title: str) -> Figure:
    """A panel for each size, a row for each method, a dot with its middle half for each kind; the line is at 1.

    panels: size -> kind -> [(method, low, middle, high), …].
    """
    names = list(dict.fromkeys(name for kinds in panels.values() for rows in kinds.values() for name, *_ in rows))
    figure = Figure(figsize=(10, 0.3 * len(names) + 1.6), layout="constrained")
    for axes, (size, kinds) in zip(figure.subplots(1, len(panels), sharey=True, sharex=True, squeeze=False)[0], panels.items()):
        for place, ((kind, rows), color) in enumerate(zip(kinds.items(), (BLUE, ORANGE, GREEN))):
            for name, low, middle, high in rows:
                y = names.index(name) + (place - (len(kinds) - 1) / 2) * 0.3
                axes.plot([low, high], [y, y], color=color, linewidth=2)
                axes.plot(middle, y, marker="o", markersize=5, color=color)
        axes.axvline(1, color=BLACK, linewidth=1)
        axes.grid(axis="x", alpha=0.25)
        axes.set(title=size, yticks=range(len(names)), yticklabels=names, ylim=(len(names) - 0.5, -0.5))
    figure.suptitle(title, fontsize=11)
    figure.legend(handles=[Line2D([], [], color=color, marker="o", label=kind) for kind, color in zip(next(iter(panels.values())), (BLUE, ORANGE, GREEN))],
                  loc="outside lower center", ncols=3, frameon=False)
    return figure
