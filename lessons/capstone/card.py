"""The picture of a capstone: how the loss fell, and what the model wrote before and after."""

import math
import textwrap

from matplotlib.figure import Figure
from matplotlib.font_manager import findfont, get_font

from minilora.plots import BLACK, BLUE, SKY, VERMILION, printable


def card(report: dict) -> Figure:
    figure = Figure(figsize=(11, 4), layout="constrained")
    curve, page = figure.subplots(1, 2, width_ratios=[1, 1.25])
    curve.plot([nats / math.log(2) for nats in report["losses"]], color=SKY, label="training, one batch")
    curve.plot([0, report["steps"]], [report["bits_before"], report["bits_after"]], "o", color=VERMILION, label="held out")
    for at, key, side in ((0, "bits_before", "left"), (report["steps"], "bits_after", "right")):
        curve.annotate(f"{report[key]:.2f}", (at, report[key]), (0, 7), textcoords="offset points", ha=side)
    curve.set(xlabel="step", ylabel="bits per byte", title=f"The tiny GPT reads {printable(report['text'])}")
    curve.margins(y=0.12)
    curve.grid(alpha=0.25)
    curve.legend()
    page.axis("off")
    drawn = get_font(findfont("DejaVu Sans Mono")).get_char_index                        # 0 of a letter that the font lacks
    top, line_height = 1.0, 0.066
    for when, color in (("before", BLACK), ("after", BLUE)):
        lines = [part for line in written(report[f"sample_{when}"]) for part in textwrap.wrap(line, 60, drop_whitespace=False)][:5]
        shown = "\n".join("".join(letter if drawn(ord(letter)) else "·" for letter in line) for line in lines)
        page.text(0, top, f"{when}, {report[f'bits_{when}']:.2f} bits per byte", va="top", fontsize=11, weight="bold", color=color)
        page.text(0, top - 0.09, shown, va="top", fontsize=10, family="DejaVu Sans Mono", linespacing=1.5, color=color, parse_math=False)
        top -= 0.09 + line_height * len(lines) + 0.09
    figure.supxlabel(f"W untouched, bit for bit; adapter of {report['bytes']:,} bytes", fontsize=10)
    return figure


def written(text: str) -> list[str]:
    """The lines of what the model wrote; half a letter, or a control byte, which no screen shows, is a dot."""
    return ["".join(letter if letter.isprintable() and letter != "\ufffd" else "·" for letter in line.expandtabs(4)) for line in text.split("\n") if line.strip()]
