"""Figures, and nothing else: numbers in, a matplotlib Figure out. Colours are Okabe and Ito's, which colour-blind readers can tell apart."""

import math

from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

BLACK, ORANGE, SKY, GREEN, YELLOW, BLUE, VERMILION, PURPLE = (
    "#000000", "#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7")


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
