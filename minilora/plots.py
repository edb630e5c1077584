"""Figures, and nothing else: numbers in, a matplotlib Figure out. Colours are Okabe and Ito's, which colour-blind readers can tell apart."""

import math

from matplotlib.figure import Figure

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
