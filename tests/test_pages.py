"""The pages say only what is true now: links lead somewhere, commands parse, snippets run, tables are what the published runs say."""

import contextlib
import copy
import io
import json
import re
import runpy
import shlex
import statistics
from pathlib import Path

import pytest

import lessons
import minilora as ml
from minilora.__main__ import parser
from minilora.evidence import capacity, claims, compare, scoreboard
from minilora.evidence.compare import Entry

ROOT = Path(lessons.__file__).parent.parent
FRONT = [ROOT / "README.md", ROOT / "README.zh.md"]
RESULTS = ROOT / "lessons" / "results.md"
PAGES = [*FRONT, *sorted(page for page in (ROOT / "lessons").rglob("*.md") if page.parent.name != ".ipynb_checkpoints")]      # Jupyter keeps copies
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)")

each_page = pytest.mark.parametrize("page", PAGES, ids=[str(page.relative_to(ROOT)) for page in PAGES])
each_front = pytest.mark.parametrize("page", FRONT, ids=[page.name for page in FRONT])


def prose(page: Path) -> str:
    """The page without its code: what only looks like a link there is none."""
    return re.sub(r"^```.*?^```|^    .*?$|`[^`\n]*`", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)


def one_line(page: Path) -> str:
    return " ".join(page.read_text(encoding="utf-8").split())


def code(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), flags=re.M | re.S)


def commands(page: Path) -> list[str]:
    """The lines that a reader is to type in a terminal, without their comments; of inline ones those of this package."""
    text = page.read_text(encoding="utf-8")
    lines = re.findall(r"^    ((?:\.venv/bin/|python |make ).*)$", text, flags=re.M) + re.findall(r"`(python -m minilora [^`]+|make \w+)`", text)
    return [line.partition("  #")[0].rstrip() for line in lines]


def rows(page: Path, first: str) -> list[list[str]]:
    """The cells of the one table whose heading begins so, without heading and rule."""
    tables = re.findall(r"(?:^\|.*\n)+", page.read_text(encoding="utf-8") + "\n", flags=re.M)
    found = [[[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()] for table in tables if table.startswith(first)]
    assert len(found) == 1, f"{page.name} has {len(found)} tables that begin with {first}"
    return found[0][2:]


@each_page
def test_links_and_pictures_are_there_and_pictures_have_words(page):
    for picture, words, target in LINK.findall(prose(page)):
        if not re.match(r"https?://|#", target):
            assert (page.parent / target.partition("#")[0]).exists(), f"{page.name} points to {target}"
        assert not picture or len(words) >= 20, f"{target} in {page.name} needs an alt text that says what is to be seen, not {words!r}"


@each_front
def test_the_front_page_is_short(page):
    text = page.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 80 and 1 <= sum(picture == "!" for picture, _, _ in LINK.findall(text)) <= 3
    assert max(map(len, text.splitlines())) <= 155


@each_page
def test_commands_parse(page):
    targets = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.M)[1].split()
    for line in commands(page):
        program, *words = shlex.split(line)
        if program == "make":
            assert words[0] in targets, line
            if words[1:]:
                parser().parse_args(["compare", "--quick", *shlex.split(words[1].removeprefix("OPTIONS="))])
        elif words[:2] == ["-m", "minilora"]:
            parser().parse_args(words[2:])
        else:
            assert any((ROOT / word).exists() for word in words), line


def test_both_front_pages_show_the_same_code_commands_and_links():
    def shown(page):
        plain = [re.sub(r" *# .*", "", block) for block in code(page, "python")]
        targets = {target for _, _, target in LINK.findall(page.read_text(encoding="utf-8"))} - {other.name for other in FRONT}
        return plain, code(page, "text"), commands(page), targets

    english, chinese = map(shown, FRONT)
    assert english == chinese


@each_front
def test_the_exercise_gets_the_verdict_that_is_shown_and_its_cure_solves_it(page):
    answer = code(page, "python")[0]
    assert printed(answer) == code(page, "text")[0]
    cured = answer.replace("alpha / rank * (x @ (B @ A).T)", "alpha / rank * (x @ A.T @ B.T)")
    assert "`x @ A.T @ B.T`" in page.read_text(encoding="utf-8") and f"`{printed(cured).strip()}`" in page.read_text(encoding="utf-8")


def printed(source: str) -> str:
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        exec(source, {})
    return said.getvalue()


@each_front
def test_the_package_snippet_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("my.txt").write_text("It was a dark and stormy night. " * 80)
    names = {}
    exec(code(page, "python")[1].replace("steps=200", "steps=2"), names)
    assert not list(ml.adapters(names["model"])) and list(ml.adapters(ml.load_adapter(ml.load_base(), "mine")))


@each_front
def test_the_lessons_table_has_every_lesson_with_the_minutes_of_its_exercises(page):
    listed = {re.search(r"lessons/(\w+)/README\.md", row[0])[1]: row for row in rows(page, "| | ")}
    assert list(listed) == list(lessons.exercises())
    for lesson, (number, question, notebook, minutes) in listed.items():
        own = ROOT / "lessons" / lesson / "README.md"
        heading, *names = next(line for line in own.read_text(encoding="utf-8").splitlines() if line.startswith("|") and "minutes" in line).strip("| ").split("|")
        column = [name.strip() for name in [heading, *names]].index("minutes") - len(names) - 1          # counted from the right
        each = [int(line.strip().strip("|").split("|")[column]) for line in own.read_text(encoding="utf-8").splitlines()
                if any(f"| `{name}` |" in line for name in lessons.exercises()[lesson])]
        assert len(each) == len(lessons.exercises()[lesson]) and int(minutes) == sum(each), f"{lesson}: {sum(each)} minutes"
        assert f"[{lesson[:2]}]" in number and f"notebooks/{lesson}.ipynb" in notebook
        assert page.name != "README.md" or question in own.read_text(encoding="utf-8").splitlines()[0]


def test_the_map_has_every_lesson_and_the_minutes_of_the_front_page():
    front = {row[0][:4]: (row[1], row[3]) for row in rows(ROOT / "README.md", "| | ")}
    assert {row[0][:4]: (row[1], row[3]) for row in rows(ROOT / "lessons" / "README.md", "| lesson ")} == front


# results.md

PUBLISHED = compare.read(compare.PUBLISHED)
WRITER = runpy.run_path(str(ROOT / "benchmarks" / "page.py"))


def test_the_fight_on_the_page_of_results_is_what_the_results_file_says():
    assert RESULTS.read_text(encoding="utf-8").partition(WRITER["REST"])[0] == WRITER["page"](PUBLISHED) + "\n"


def test_the_page_follows_the_file():
    """A run that came out otherwise is another page."""
    content = copy.deepcopy(PUBLISHED)
    content["runs"][0]["scores"]["bits_per_byte"] += 0.5
    assert WRITER["page"](content) != WRITER["page"](PUBLISHED)


def measured(entry, task, scores, lr=0.01, seed=0, **costs):
    return {**entry.key, "task": task, "seed": seed, "lr": lr, "steps": 400, "scores": scores, "costs": costs}


@pytest.mark.parametrize("hurts, said", [
    (0.0, "goes from 2.03 (alpha 2, rate 0.015625) to 2.03 (alpha 128, rate 0.000244141); along the one beyond, each at the next higher rate, "
          "from 2.12 (alpha 2, rate 0.0625) to 2.12 (alpha 128, rate 0.000976562)."),
    (1.0, "from 2.12 (alpha 8, rate 0.015625) to 3.12 (alpha 2, rate 0.0625). They are one knob as long as the rate is low; a high rate hurts by itself"),
])
def test_whether_alpha_and_the_rate_are_one_knob_is_read_along_the_diagonals(hurts, said):
    """A score that depends on alpha · rate alone; and one that the highest rate spoils, whatever alpha."""
    rates = [2.0**power for power in (-12, -10, -8, -6, -4)]
    grid = [measured(entry, "code", {"bits_per_byte": 2 + entry.alpha * lr + hurts * (lr == rates[-1]) + seed - 1}, lr, seed)
            for entry in claims.ALPHAS for lr in rates for seed in range(3)]
    text = WRITER["one_knob"]({"grid": grid})
    assert said in text and ("hurts by itself" in text) == bool(hurts)


def test_the_ceiling_is_where_most_was_held():
    def held(count, *doublings):
        return measured(claims.SMALL, f"{count} facts", {"held": doublings[-1], "doublings": [[400 * 2**i, bits] for i, bits in enumerate(doublings)]}, trainable_parameters=5000)

    grid = [held(8, 50, 51), held(32, 90, 100), held(32, 90, 200), held(128, 60, 61)]
    assert WRITER["ceiling"]({"grid": grid}) == ("At most it held 150 bits, of 32 facts: 0.030 a trained parameter; of 128 facts 61. "
                                                 "With 32 facts it was still learning after 6,400 steps, where the doubling ended.")
    assert WRITER["ceiling"]({"grid": [grid[0], grid[3]]}) == "At most it held 61 bits, of 128 facts: 0.012 a trained parameter; of 128 facts 61."


def test_the_share_answered_is_of_the_worst_and_of_the_best_method():
    runs = [measured(entry, task, {"exact_match": share}, seed=seed) for task, scale in (("sums", 0.1), ("facts", 1)) for entry, of in ((claims.LORA, 0.4), (claims.FULL, 0.8))
            for seed, share in ((0, scale * of), (1, scale * (of + 0.2)))]
    assert WRITER["answered"](runs, ["voice", "facts", "sums"]).endswith("from the worst method to the best: 50 to 90 % of the facts asked in words never told and 5 to 9 % of the sums.")
    assert WRITER["answered"](runs, ["voice"]) == ""


def test_every_claim_says_what_it_does_not_show():
    assert {*WRITER["LIMITS"]} == {claim.key for claim in claims.CLAIMS if not claim.exact}


def end(entry, task):
    return f"{statistics.fmean(scoreboard.score_of(PUBLISHED['runs'], task, entry).values()):.3f}"


def said_of_the_fight() -> dict[str, list[str]]:
    """notebook -> what its text says of the published runs, which are not run there."""
    tasks = ("voice", "facts", "sums", "code")
    vera, low, lora, adalora, pissa, loftq = Entry("vera"), claims.LOW, claims.LORA, Entry("adalora"), Entry("pissa"), Entry("loftq", "nf4")
    dropped = [100 * (1 - scoreboard.costs_of(PUBLISHED["runs"], task, Entry("lora-drop"))["trainable_parameters"] / 73_728) for task in tasks]
    less = {task: statistics.fmean(claims.forgets_less(adalora, lora)(PUBLISHED, task)) for task in tasks}
    worse = {task: -statistics.fmean(claims.better(adalora, lora)(PUBLISHED, task)) for task in tasks}
    return {
        "05_vera": [f"{end(vera, task)} against {end(low, task)} on {task}" for task in tasks] + [", ".join(f"{end(lora, task)} on {task}" for task in tasks)],
        "07_lora_drop": [f"LoRA-drop dropped {', '.join(f'{share:.1f}' for share in dropped[:-1])} and {dropped[-1]:.1f} % of the parameters on {', '.join(tasks[:-1])} and {tasks[-1]}"],
        "08_adalora": [", ".join(f"{worse[task]:.3f} on {task}" for task in tasks), ", ".join(f"{less[task]:.1f} on {task}" for task in tasks)],
        "11_beyond": [f"rsLoRA of rank 64 ends at {end(claims.HIGH_RS, 'voice')} and LoRA of rank 64 at {end(claims.HIGH, 'voice')}",
                      f"DoRA ends at {end(Entry('dora'), 'voice')}, LoRA at {end(lora, 'voice')} and PiSSA at {end(pissa, 'voice')}",
                      f"LoftQ at {end(loftq, 'voice')} and LoRA at {end(claims.LORA_NF4, 'voice')}"],
    }


@pytest.mark.parametrize("name", ["05_vera", "07_lora_drop", "08_adalora", "11_beyond"])
def test_what_a_notebook_says_of_the_fight_is_what_the_results_file_says(name):
    cells = json.loads((ROOT / "notebooks" / f"{name}.ipynb").read_text(encoding="utf-8"))["cells"]
    text = " ".join(" ".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown").replace("`", "").split())
    for sentence in said_of_the_fight()[name]:
        assert sentence in text, sentence


def test_what_lesson_12_says_of_forgetting_is_what_the_results_file_says():
    text = (ROOT / "lessons" / "12_scoreboard" / "README.md").read_text(encoding="utf-8")
    lost = [statistics.fmean(scoreboard.score_of(PUBLISHED["runs"], "voice", entry, "forgotten").values()) for entry in (claims.HIGH, claims.FULL)]
    assert "forgotten **{:.1f}** bits per byte at the end, full fine-tuning, of 875,264 numbers, **{:.1f}**".format(*lost) in text and lost[0] > lost[1]


def test_the_front_pages_count_the_runs():
    count = sum(len(PUBLISHED[part]) for part in ("runs", "search", "grid"))
    assert all(f"{count:,}" in page.read_text(encoding="utf-8") for page in FRONT)


def test_what_rank_buys_is_what_the_records_say():
    records = capacity.read(ROOT / "benchmarks" / "capacity.json")
    for count, steps, *cells in rows(RESULTS, "| facts | steps |"):
        here = [record for record in records if record["method"] == "lora" and [f"{record['count']:,}", f"{record['steps']:,}"] == [count, steps]]
        for rank, cell in zip((1, 2, 4, 8), cells, strict=True):
            remembered = [record["remembered"] for record in here if record["rank"] == rank]
            assert cell == (f"{100 * statistics.fmean(remembered):.1f}" if remembered else "") and len(remembered) in (0, 3), (count, steps, rank)
