"""benchmarks/README.md is what bench.json says, judged by its own rule; and the long trial (soak.py) notices what it is there to notice."""

import copy
import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "benchmarks"
WRITER = runpy.run_path(str(FOLDER / "bench_page.py"))
PUBLISHED = json.loads((FOLDER / "bench.json").read_bytes())


def row(content, first):
    """The cells of the one line of the page that begins so."""
    found = [line for line in WRITER["page"](content).splitlines() if line.startswith(f"| {first}")]
    assert len(found) == 1, found
    return [cell.strip() for cell in found[0].strip("|").split("|")]


def changed(ratio, **named):
    """The published file with one record that has another ratio."""
    content = copy.deepcopy(PUBLISHED)
    [record] = [record for record in content["records"] if named.items() <= record.items()]
    record["ratio"] = ratio
    return content


def test_the_page_is_what_the_file_says():
    assert (FOLDER / "README.md").read_text(encoding="utf-8") == WRITER["page"](PUBLISHED)
    assert max(map(len, (FOLDER / "README.md").read_text(encoding="utf-8").partition("## What was aimed at")[0].splitlines())) <= 155


def test_its_links_lead_somewhere_and_its_picture_has_words():
    for picture, words, target in re.findall(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)", WRITER["page"](PUBLISHED)):
        assert (FOLDER / target).exists() and (not picture or len(words) >= 20), target


def test_every_method_was_measured_at_every_width_and_batch():
    steps = [record for record in PUBLISHED["records"] if record["stage"] == "steps"]
    assert {(r["method"], r["width"], r["rows"]) for r in steps} == {(m, w, r) for m in WRITER["NAMES"] for w in (128, 512, 1024) for r in (2, 8)}
    assert all(r["ratio"] == sorted(r["ratio"]) and r["ratio"][0] > 0 and min(r["alive"]) > 0 for r in steps)
    assert {record["stage"] for record in PUBLISHED["records"]} == {"steps", "imports", "disk", "nf4", "serving", "growth"}


@pytest.mark.parametrize("middle, said", [(0.804, "yes"), (0.806, "in 5 of 6, not by DoRA at width 512 and 1,024 bytes, 0.81")])
def test_an_aim_is_judged_by_the_worst_median_to_two_decimals(middle, said):
    content = copy.deepcopy(PUBLISHED)
    for record in content["records"]:
        if record.get("method") == "dora" and record["stage"] == "steps":
            record["ratio"] = [0.5, 0.6, 0.9]
            if (record["width"], record["rows"]) == (512, 8):
                record["ratio"] = [0.7, middle, 2.0]
    cells = row(content, "DoRA: at most 0.8")
    assert cells[1] == said and cells[2].startswith(f"{middle:.2f} (0.70–2.00)")


def test_a_method_that_peft_has_not_is_judged_by_no_aim():
    slow = [9.0, 9.0, 9.0]
    first = "every method PEFT has"
    assert row(changed(slow, stage="steps", method="delta-lora", width=128, rows=2), first) == row(PUBLISHED, first)
    assert "LoRA+ at width 128 and 256 bytes, 9.00" in row(changed(slow, stage="steps", method="lora-plus", width=128, rows=2), first)[1]


def test_a_stage_that_was_not_measured_is_left_out_and_its_aim_says_so():
    content = PUBLISHED | {"records": [record for record in PUBLISHED["records"] if record["stage"] == "nf4"]}
    page = WRITER["page"](content)
    assert "## Four bits" in page and "## A training step" not in page and row(content, "DoRA")[1] == "not measured"


# soak.py, in a process of its own, for it forks

def soak(*options, change=""):
    program = f"import sys; sys.path.insert(0, 'tests'); import soak\n{change}\nsys.exit(soak.main())"
    return subprocess.run([sys.executable, "-c", program, *options], cwd=ROOT, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})


def test_a_short_trial_goes_well():
    run = soak("--cycles", "6", "--folders", "25", "--checkpoints", "12", "--results", "25", "--kills", "1", "--seed", "1")
    assert run.returncode == 0 and run.stdout.splitlines()[-1] == "all well", run.stdout + run.stderr
    counts = {"cycles": 6, "folders": 25, "checkpoints": 12, "results": 25, "kills": 1}
    assert all(f"{part}: {count} of {count} well" in run.stdout for part, count in counts.items())


WRONG = """
import os, time
came = iter(range(99))
def case(dice, folder):
    number = first + next(came)
    if number == 1:
        raise KeyError("lost")
    if number == 2:
        os.abort()
    if number == 3:
        time.sleep(60)
    return "fine"
worker, first = soak.worker, 0
def counted(part, numbers, *rest):
    global first
    first = numbers[0]
    worker(part, numbers, *rest)
soak.worker, soak.CASES["results"], soak.LIMIT = counted, case, 5
"""


def test_a_case_that_fails_dies_or_hangs_is_named_and_the_others_go_on():
    run = soak("--only", "results", "--results", "5", change=WRONG)
    assert run.returncode == 1 and "results: 2 of 5 well" in run.stdout, run.stdout + run.stderr
    assert run.stdout.splitlines()[-4:] == ["3 failed:", "results 1: KeyError: 'lost'", "results 2: the process died", "results 3: hangs, more than 5 s"]


def test_memory_that_grows_objects_that_stay_and_open_files_are_noticed():
    change = "kept = []\nsoak.CASES['cycles'] = lambda dice, folder: kept.append(([[] for _ in range(9)], b'x' * 40_000, open('/dev/null'))) or 'fine'"
    run = soak("--only", "cycles", "--cycles", "250", change=change)
    *_, count, memory, objects, files = run.stdout.splitlines()
    assert run.returncode == 1 and count == "3 failed:" and files == "cycles: 249 files stay open", run.stdout + run.stderr
    assert re.match(r"cycles: memory grew by \d\d,\d", memory) and re.match(r"cycles: the number of Python objects grew by 1[0-9]\.", objects)
