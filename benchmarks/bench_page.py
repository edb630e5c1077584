"""benchmarks/README.md and bench.png, written from bench.json: every number is read from there.

    python benchmarks/bench_page.py            writes them; a test writes the page again and compares
"""

import argparse
import json
from pathlib import Path

from minilora import plots, storage

HERE = Path(__file__).parent
NAMES = {"lora": "LoRA", "lora-dropout": "LoRA, dropout 0.1", "rslora": "rsLoRA", "lora-plus": "LoRA+", "lora-fa": "LoRA-FA",
         "lora-fa-projected": "LoRA-FA, projected", "vera": "VeRA, rank 256", "adalora": "AdaLoRA, 12 to 8", "dora": "DoRA", "pissa": "PiSSA",
         "qlora": "QLoRA", "loftq": "LoftQ", "delta-lora": "Delta-LoRA", "lora-drop": "LoRA-drop"}
NO_COUNTERPART = ("delta-lora", "lora-drop")
BYTES = 128                                                # in a row of a batch


def page(content: dict) -> str:
    about, records = content["about"], content["records"]
    stages = {stage: [record for record in records if record["stage"] == stage] for stage in SECTIONS}
    parts = [head(about, stages)] + [section(stages[stage]) for stage, section in SECTIONS.items() if stages[stage]] + [REST]
    return "\n\n".join(parts) + "\n"


def head(about: dict, stages: dict[str, list[dict]]) -> str:
    versions = ", ".join(f"{name} {number}" for name, number in about["versions"].items())
    return f"""# minilora beside PEFT and bitsandbytes

    make bench
    make bench OPTIONS="--only steps --methods dora,vera"

It writes this page and its picture; every number here is from [bench.json](bench.json), which it writes too. Stopped, it goes on.
A ratio is ours over theirs: **below 1 we take less.** Times are CPU time of one thread: on a quiet machine that is the wall clock, and on
a busy one the turns of other programs are not in it. The two take turns step by step, who goes first alternates, and each pair gives a
ratio: written are the median and, in brackets, the middle half.

{about['cores']} cores, of which one is used; {about['machine']}; {versions}.
(bitsandbytes has faster 4-bit kernels for CPUs in a package of their own, `kernels`, which is not installed here.)

## What was aimed at

{aims(stages)}"""


def steps_said(records: list[dict]) -> str:
    return f"""## A training step

Forward, backward, optimizer, and what the method asks for beside them, on a TinyGPT all of whose blocks' linear layers are adapted. The
larger the batch, the more of a step is the multiplication by W, which both must do; the smaller, the more is what each does for a layer.
{depths(records)}

{step_table(records)}

Rank 8 where nothing else is said. LoRA-FA is beside PEFT's LoRA with A frozen, and projected beside PEFT's `create_lorafa_optimizer`;
LoRA+ beside its `create_loraplus_optimizer`. QLoRA and LoftQ are beside PEFT's LoRA on bitsandbytes' `Linear4bit`: PEFT's own LoftQ keeps
a dense base on a CPU. AdaLoRA judges and cuts at every step on both sides. ¹ PEFT does not have it; it stands beside PEFT's LoRA, which
does less.

![A dot and its middle half for each method, a panel for each width, two batches in two colours; left of the line at 1 minilora takes less](bench.png)

Kept alive for backward, by autograd's own count: {alive(records)}."""


def imports_said(records: list[dict]) -> str:
    said = [f"`import {record['package']}` takes {interval(record['ratio'])} times as long as `import {record['over']}`" for record in records]
    return f"""## Starting

{'; '.join(said)}."""


def disk_said(records: list[dict]) -> str:
    return f"""## Saving and loading

{disk_table(records)}

Ours is flushed to the disk before it takes the place of what was there, so that a power failure leaves no half of a file; a load holds
the folder against the base's fingerprint, which reads every weight of it, and against its own digest. PEFT does neither. The wall clock
holds the waiting for the disk; CPU time does not."""


def nf4_said(records: list[dict]) -> str:
    return f"""## Four bits

{nf4_table(records)}"""


def serving_said(records: list[dict]) -> str:
    most = max(record["adapters"] for record in records)
    held = next(record["held"] for record in records if record["adapters"] == most and record["model"] == records[-1]["model"])
    return f"""## Many adapters, one batch

16 rows, each with its own LoRA of rank 8 out of so many: their requests a second as a share of the base's own, which is the ceiling. *Mixed* is one
pass with gathered A and B ([serving.py](../minilora/scale/serving.py)); *one by one* puts each adapter on for its rows; *merged* makes W + B A for each.

{serving_table(records)}

Beside the base's weights {most} adapters hold {held['mixed'] / 1e6:.1f} MB stacked, {held['one by one'] / 1e6:.1f} MB apart, and with one of them merged {held['merged'] / 1e6:.1f} MB ({records[-1]['model']})."""


def growth_said(records: list[dict]) -> str:
    spread = {record["axis"]: record["sizes"] for record in records}
    return f"""## How a step grows

Time ~ size^slope, fitted over {', '.join(f'{axis} {sizes[0]} to {sizes[-1]}' for axis, sizes in spread.items())}; one fit for each round,
in which all sizes take turns. Beside it the slope of the FLOPs that torch counts in forward and backward: where time grows slower than
that, a part of it does not depend on the size; where it grows faster, something is done that is no product.

{growth_table(records)}"""


REST = """## What else is here

- [fight.py](fight.py) runs the comparison of [what was measured](../lessons/results.md), and [page.py](page.py) writes that page;
  [capacity.json](capacity.json) is what rank buys.
- [base.py](base.py): how good the shipped base is."""
SECTIONS = {"steps": steps_said, "imports": imports_said, "disk": disk_said, "nf4": nf4_said, "serving": serving_said, "growth": growth_said}


def interval(ratio: list[float]) -> str:
    low, middle, high = ratio
    return f"{middle:.2f} ({low:.2f}–{high:.2f})"


def table(head: list[str], rows: list[list[str]]) -> str:
    rule = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, rule, *rows))


def aims(stages: dict[str, list[dict]]) -> str:
    own = [record for record in stages["steps"] if record["method"] not in NO_COUNTERPART]
    rows = [aim("every method PEFT has: a step of at most 1.0 of PEFT's", 1.0, own),
            aim("DoRA: at most 0.8 at every batch", 0.8, [record for record in own if record["method"] == "dora"]),
            aim("quantize to NF4: at most 0.9 of bitsandbytes'", 0.9, [record for record in stages["nf4"] if record["what"] == "quantize"]),
            aim("dequantize: at most 1.2 of bitsandbytes'", 1.2, [record for record in stages["nf4"] if record["what"] == "dequantize"]),
            aim("`import minilora`: at most 1.2 of `import torch`", 1.2, [record for record in stages["imports"] if record["package"] == "minilora"])]
    return table(["aim", "reached", "the worst"], rows)


def aim(words: str, limit: float, records: list[dict]) -> list[str]:
    """Judged by the worst median, to two decimals."""
    if not records:
        return [words, "not measured", ""]
    worst = max(records, key=lambda record: record["ratio"][1])
    missed = [record for record in records if round(record["ratio"][1], 2) > limit]
    names = "; ".join(f"{where(record)}, {record['ratio'][1]:.2f}" for record in missed)
    return [words, f"in {len(records) - len(missed)} of {len(records)}, not by {names}" if missed else "yes", f"{interval(worst['ratio'])}, {where(worst)}"]


def where(record: dict) -> str:
    if record["stage"] == "steps":
        return f"{NAMES[record['method']].partition(',')[0]} at width {record['width']} and {BYTES * record['rows']:,} bytes"
    if record["stage"] == "nf4":
        return "scales in 8 bits" if record["double"] else "scales in float32"
    return record["package"]


def places(records: list[dict]) -> list[tuple[int, int]]:
    """(width, rows) of the columns."""
    return sorted({(record["width"], record["rows"]) for record in records})


def depths(records: list[dict]) -> str:
    there = sorted({(record["width"], record["layers"]) for record in records})
    return f"Width and blocks: {', '.join(f'{width} and {layers}' for width, layers in there)}."


def step_table(records: list[dict]) -> str:
    found = {(record["method"], record["width"], record["rows"]): interval(record["ratio"]) for record in records}
    head = ["", *(f"width {width}, {BYTES * rows:,} bytes" for width, rows in places(records))]
    rows = [[NAMES[method] + (" ¹" if method in NO_COUNTERPART else ""), *(found.get((method, *place), "") for place in places(records))]
            for method in NAMES if any(record["method"] == method for record in records)]
    return table(head, rows)


def alive(records: list[dict]) -> str:
    by_method: dict[str, list[float]] = {}
    for record in records:
        by_method.setdefault(record["method"], []).append(record["alive"][0] / record["alive"][1])
    other = [f"{NAMES[method]} {min(found):.2f}" + (f" to {max(found):.2f}" if round(max(found), 2) > round(min(found), 2) else "") + " times PEFT's"
             for method, found in by_method.items() if any(round(ratio, 2) != 1 for ratio in found)]
    return "; ".join([*other, "every other method as many as PEFT's, to a hundredth"])


def disk_table(records: list[dict]) -> str:
    rows = [[NAMES[record["method"]], *(interval(record[f"{verb}_{clock}"]) for verb in ("save", "load") for clock in ("cpu", "wall")),
             f"{record['bytes'][0]:,} / {record['bytes'][1]:,}"] for record in records]
    return table(["", "save, CPU", "save, wall clock", "load, CPU", "load, wall clock", "bytes, ours / PEFT"], rows)


def nf4_table(records: list[dict]) -> str:
    rows = []
    for record in records:
        size = f"{record['size']:,} × {record['size']:,}"
        if record["what"] == "peak" and record["dense_weights"] is not None:
            rows.append([f"most memory while quantizing {size}, the weight included", f"{record['dense_weights']:.2f} × the dense weight"])
        elif "double" in record:
            rows.append([f"{record['what']} {size}, {where(record)}", interval(record["ratio"])])
        elif "ratio" in record:
            rows.append([f"{record['what']}: forward and backward of {record['rows']} rows, width {record['size']:,}", interval(record["ratio"])])
    return table(["", "ratio"], rows)


def serving_table(records: list[dict]) -> str:
    ways = list(records[0]["shares"])
    rows = [[f"{record['model']}, {record['tokens']} token{'s' * (record['tokens'] > 1)}", str(record["adapters"]),
             *(interval(record["shares"][way]) for way in ways)] for record in records]
    return table(["", "adapters", *ways], rows)


def growth_table(records: list[dict]) -> str:
    axes = list(dict.fromkeys(record["axis"] for record in records))
    found: dict[str, dict[str, list[str]]] = {}
    for record in records:
        found.setdefault(record["method"], {})[record["axis"]] = [interval(record["slope"]), f"{record['flops_slope']:.2f}"]
    rows = [[NAMES[method].partition(",")[0], *(cell for axis in axes for cell in cells.get(axis, ["", ""]))] for method, cells in found.items()]
    return table(["", *(words for axis in axes for words in (axis, "FLOPs"))], rows)


def picture(content: dict):
    records = [record for record in content["records"] if record["stage"] == "steps"]
    panels = {}
    for width in sorted({record["width"] for record in records}):
        panels[f"width {width}"] = {f"{BYTES * rows:,} bytes a step": [(NAMES[record["method"]], *record["ratio"]) for record in records
                                                                      if (record["width"], record["rows"]) == (width, rows)]
                                    for rows in sorted({record["rows"] for record in records})}
    return plots.ratios(panels, "time of a training step, minilora over PEFT")


def write() -> None:
    content = json.loads((HERE / "bench.json").read_bytes())
    storage.write_atomically(HERE / "README.md", page(content).encode())
    picture(content).savefig(HERE / "bench.png", dpi=110)


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    write()
