"""lessons/questions.md, its Chinese twin and choose.md: no number on them is from memory.

Every number of weight (one with a comma, a point, three digits or a unit) is computed here from the package, or stands in a file that the
answer links to (FACTS), or is a paper's and stands beside the paper's link (PAPERS).
"""

import functools
import inspect
import json
import math
import re
import unicodedata
from pathlib import Path

import pytest
import torch

import lessons
import minilora as ml
from minilora.evidence.formulas import COSTS, extrapolated, formula, nf4_bytes
from minilora.evidence.shapes import shape
from minilora.quant import double
from minilora.quant.nf4 import unpack

LESSONS = Path(lessons.__file__).parent
ENGLISH, CHINESE, CHOOSE = (LESSONS / name for name in ("questions.md", "questions.zh.md", "choose.md"))
BOTH = pytest.mark.parametrize("page", [ENGLISH, CHINESE], ids=lambda page: page.name)
EACH = pytest.mark.parametrize("number", range(1, 41))

ANSWER = re.compile(r"<details><summary><b>(\d+)\. (.+?)</b></summary>\n\n(.+?)\n\n</details>\n", re.S)
LINK = re.compile(r"\[([^\]]*)\]\(([^)\s]+)\)")
NUMBER = re.compile(r"(?<![\w.])\d+(?:,\d{3})*(?:\.\d+)?(?:e-\d+)?", re.A)
WRONG = {ENGLISH: "**Often wrong:**", CHINESE: "**常见错误**："}
SHOWN = {ENGLISH: "**Shown in** ", CHINESE: "**出处**："}
COLUMNS, MOST_LINES = 125, 20                                   # half a screen

GLM, LLAMA = shape("chatglm-6b"), shape("llama-7b")
QKV = ["query_key_value"]
TOKENS, MIB, GIB = 1024, 2**20, 2**30

FACTS = {                                                       # file, as the pages link to it: what it says, blanks apart
    "../notebooks/00_tiny_gpt.ipynb": ("the plain voice 0.31 2.95 0.31", "claim 16 · 875,264 = 14,004,224 bytes"),
    "../notebooks/01_lora.ipynb": (
        "it keeps 27% of W's energy; the base goes from 0.22 to 4.27 nats per byte", "bit for bit what they were: 69 of 69",
        "| | r = 4 | 16 | 64 | 256 |",
        "| SGD, s = α/r | 1.000 | 0.253 | 0.061 | 0.015 |", "| SGD, s = α/√r | 1.000 | 1.013 | 0.972 | 0.950 |",
        "| Adam, s = α/r | 1.000 | 1.019 | 1.012 | 0.998 |", "| Adam, s = α/√r | 1.000 | 2.038 | 4.048 | 7.983 |"),
    "../notebooks/02_adapter_life.ipynb": (
        "claim 8 + 7,120 + 147,456 = 154,584 bytes", "without Adam's moments the loss rises by up to 0.67 nats per byte within ten steps"),
    "02_adapter_life/README.md": (
        "Merged in float32 the loss moves by 6e-08 nats", "In bfloat16 99.5 % of the weights move under this adapter, whose update is half as long as W;",
        "of one a thousandth as long 13 % do",
        "the cross terms are 77 % as long as the update that was wanted", "| full, full | loud | **1.87** | **4.08** |",
        "no adapter at all costs the loud voice 3.76", "(the loud one 1.87 instead of 0.49,"),
    "../notebooks/03_lora_plus.ipynb": (
        "alpha 128 at its best rate, 0.004, against alpha 8 at its best: -0.153 [-0.256, -0.049]",
        "width 128, ratio 16: held-out loss -15%, -0.153 [-0.256, -0.049]",
        "| 0.25 | 0.032 | 0.008 |", "| 64 | 0.002 | 0.128 |"),
    "03_lora_plus/README.md": ("Alpha 128 at rate 0.001 ends **0.351 [0.283, 0.418] nats per byte worse** than alpha 8 at 0.016;",
                               "alpha 128 at its own best rate, 0.004, ends 0.153"),
    "../notebooks/04_lora_fa.ipynb": ("at rank 8 a random A sees 5.4%, the best 8 directions hold 96%",),
    "04_lora_fa/README.md": (
        "LoRA takes **1.48** times what LoRA-FA takes here, 1.08 times with adapters on q and v only",
        "LoRA of rank 2 trains 2.1 % of the numbers and takes **78 %**",
        "in the tiny GPT 35.5 MB against 35.8"),
    "../notebooks/05_vera.ipynb": (
        "| learning rates 10 to 50 times LoRA's | 16 times LoRA 1's",
        "LoRA, rank 1 the branches multiply 9,216 times a token, W 786,432: 0.01 times as much",
        "VeRA, rank 192 the branches multiply 1,769,472 times a token, W 786,432: 2.25 times as much"),
    "05_vera/README.md": (
        "train **9,216 numbers each**", "LoRA of rank 1 ends at 1.793", "VeRA of rank 192 at **1.256",
        "has rank **128 of 128** in every layer", "= 319 of 16,384 directions"),
    "../notebooks/06_delta_lora.ipynb": ("LoRA of alpha 24: **2.324 ± 0.049**", "full fine-tuning rank of the change in 24 layers: [128]"),
    "07_lora_drop/README.md": ("in **2 of 18** cases", "A guesser gets 4.5.", "(by 0.33 to 0.37 nats per byte)",
                               "drawing by lot gave the same loss within the spread"),
    "results.md": (
        "voice +4.960 [+4.465, +5.454]", "facts +1.865 [+1.701, +2.030]", "sums +8.144 [+7.172, +9.117]", "code +1.645 [+1.409, +1.881]",
        "voice −0.009 [−0.014, −0.004]", "sums −0.204 [−0.218, −0.191]",
        "voice +0.003 [+0.001, +0.005]", "sums +0.222 [+0.000, +0.444]", "code +0.016 [+0.012, +0.020]",
        "sums +0.285 [+0.249, +0.321]", "is 400 steps", "voice +0.221 [+0.073, +0.368]", "sums +0.197 [+0.102, +0.291]", "code −0.103 [−0.242, +0.037]"),
    "../tests/test_loftq.py": ("double=False), 0.0921), (ml.LoftQ(16), 0.0868), (ml.LoftQ(16, iterations=5), 0.0788),",
                               "(ml.QPiSSA(16, iterations=5), 0.0779),"),
}
PAPERS = {                                                      # number: the paper whose link has to stand beside it
    5: {"780": "2305.14314", "48": "2305.14314"},
    10: {"25": "2106.09685", "15": "2405.09673"},
    26: {"70.4": "2106.09685", "73.7": "2106.09685"},
    39: {"100": "2405.09673"},
    "choose": {"0.263": "2405.09673", "0.224": "2405.09673"},
}
SAID = {10: {"1,000"}, 23: {"4"}}                               # in a mistake that is quoted, where it means nothing exact


def answers(page: Path) -> dict[int, tuple[str, str]]:
    """number: (question, answer)."""
    return {int(number): (question, answer) for number, question, answer in ANSWER.findall(page.read_text(encoding="utf-8"))}


def plain(text: str) -> str:
    """Without links, Python and commands."""
    return LINK.sub("", re.sub(r"^```.*?^```|`python [^`]*`", "", text, flags=re.M | re.S))


def numbers(text: str) -> list[str]:
    return NUMBER.findall(plain(text))


def figures(text: str) -> set[str]:
    """The numbers of weight."""
    text = plain(text)
    return {found[0] for found in NUMBER.finditer(text)
            if re.search(r"[.,e]|\d{3}", found[0]) or re.match(r" ?(%|[KMG]i?B\b)", text[found.end():])}


def targets(text: str) -> list[str]:
    return [target for _, target in LINK.findall(text)]


def written(path: Path) -> str:
    """A file's text with one blank for many; of a notebook the prose and what the cells printed."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".ipynb":
        parts = []
        for cell in json.loads(text)["cells"]:
            parts += cell["source"] if cell["cell_type"] == "markdown" else ()
            for output in cell.get("outputs", ()):
                parts += [*output.get("text", ()), "\n", *output.get("data", {}).get("text/markdown", ()), "\n"]
        text = "".join(parts)
    return " ".join(text.split())


def in_linked_files(text: str) -> set[str]:
    return {word for target in targets(text) for said in FACTS.get(target, ()) for word in NUMBER.findall(said)}


# What can be computed

def total(model, method, layers=None, base="fp16", tokens=TOKENS):
    return extrapolated(model, method, layers, tokens, base)[-1]


def trained(method, layers=QKV, model=GLM) -> int:
    return total(model, method, layers).trainable


def held(line) -> tuple[str, ...]:
    """GiB of weights, gradients and AdamW's state, and of all three."""
    parts = line.trained_bytes + line.frozen_bytes, line.gradient_bytes, line.optimizer_bytes
    return tuple(f"{part / GIB:.2f}" for part in (*parts, sum(parts)))


def flops(method, checkpointed: bool) -> int:
    line = total(LLAMA, method)
    return (1 + checkpointed) * line.forward_flops + line.backward_flops


def break_even(out: int, into: int) -> int:
    """The highest rank at which LoRA trains no more than W has."""
    return max(r for r in range(1, min(out, into) + 1) if sum(map(math.prod, COSTS[ml.LoRA].trained(ml.LoRA(r), out, into).values())) <= out * into)


def alive_bytes(method, dropout=0.0) -> int:
    """Of one layer of width 1024, for 512 tokens at rank 8 in float32."""
    return COSTS[method].alive(method(8, dropout=dropout), 1024, 1024, 512, 4, 4)


def normal_pair(ratio: float):
    """W, and an update of that length in W's own."""
    g = torch.Generator().manual_seed(0)
    W, dW = torch.randn(512, 512, generator=g), torch.randn(512, 512, generator=g)
    return W, dW * (ratio * W.norm() / dW.norm())


def bits(doubly: bool) -> float:
    return 8 * nf4_bytes(4096, 4096, 64, doubly) / 4096**2


@functools.cache
def computed() -> dict[int, tuple[str, ...]]:
    """What each answer has to say, on both pages."""
    qkv, = GLM.targets(QKV)
    four, twelve = str(qkv.into), str(qkv.out)
    lora, rank8 = f"{trained(ml.LoRA(8)):,}", trained(ml.LoRA(8), None, LLAMA)
    full32, lora16, qlora = total(LLAMA, ml.FullFineTuning(), base="fp32"), total(LLAMA, ml.LoRA(8)), total(LLAMA, ml.QLoRA(8), base="nf4")
    model16 = f"{2 * LLAMA.parameters / GIB:.2f}"
    alive = {method: f"{total(LLAMA, method(8)).alive_bytes / GIB:.2f}" for method in (ml.LoRA, ml.DoRA)}
    square = 4096 * 4096
    one = formula("one", ml.LoRADrop(8), qkv.out, qkv.into, TOKENS).trainable
    vera, pissa = COSTS[ml.VeRA], COSTS[ml.PiSSA]
    hundredth = {into: ml.merge_autopsy(*normal_pair(0.01), into) for into in ("nf4", "bfloat16")}
    q_and_v = {r: trained(ml.LoRA(r), ["q_proj", "v_proj"], LLAMA) for r in range(1, 65)}
    most = max(r for r in q_and_v if q_and_v[r] <= rank8)
    tiny = ml.trainable_parameters(ml.adapt(ml.load_base(), ml.LoRA(8)))
    share_of_two = 100 * trained_share(2)
    embedding = GLM.rest - (28 * 4 + 2) * 4096                                # norms taken off: two of weight and bias a block, and a last one
    linears = sum(kind.parameters for kind in LLAMA.kinds)
    decay = inspect.signature(torch.optim.AdamW).parameters["weight_decay"].default
    return {
        1: ("4096 → 4096", f"{square:,}", f"{8 * (4096 + 4096):,}", f"{100 * 8 * 8192 / square:.2f} %"),
        4: (f"{model16} GiB", f"{qlora.frozen_bytes / GIB:.2f} GiB"),
        5: (str(bits(False)), f"{bits(True):.3f}"),
        6: (f"{trained(ml.AdaLoRA(12)):,}",),
        8: (f"{four} → {twelve}", f"28 · 8 · ({four} + {twelve}) = {lora}", f"{100 * trained(ml.LoRA(8)) / GLM.parameters:.4f} %",
            f"{GLM.parameters:,}",
            f"{4 * trained(ml.LoRA(8)) / MIB:.0f} MiB", f"{2 * trained(ml.LoRA(8)) / MIB:.0f} MiB", *map(" | ".join, rows_of_ranks())),
        9: (f"{held(full32)[3]} GiB", f"{held(lora16)[3]} GiB", f"{4 * rank8 / MIB} MiB", f"{model16} GiB"),
        10: (f"{TOKENS:,}", f"{flops(ml.FullFineTuning(), False) / 1e12:.1f} TFLOP", f"{flops(ml.LoRA(8), False) / 1e12:.1f}",
             *(f"{flops(ml.FullFineTuning(), again) / flops(ml.LoRA(8), again):.2f}" for again in (False, True)), f"{LLAMA.parameters / rank8:.0f}"),
        12: (f"{trained(ml.LoRAFA(8)):,}", "1024", "512", f"{alive_bytes(ml.LoRA) / alive_bytes(ml.LoRAFA):.0f}"),
        13: (f"{trained(ml.VeRA(256)):,}", "256", f"{vera.shared(ml.VeRA(256), qkv.out, qkv.into):,}"),
        14: (f"{trained(ml.DeltaLoRA(8)):,}",),
        15: (f"{trained(ml.LoRAPlus(8)):,}",),
        16: (f"{(13 + 1) * one:,}",),
        17: (f"{trained(ml.DoRA(8)):,}", f"{alive[ml.DoRA]} GiB", f"{alive[ml.LoRA]} GiB", f"{TOKENS:,}"),
        18: (lora, f"{trained(ml.LoRA(64, rslora=True)):,}", f"{ml.LoRA(64, rslora=True).scale / ml.LoRA(64).scale:.0f}"),
        19: (f"{trained(ml.PiSSA(8)):,}", f"{28 * sum(map(math.prod, pissa.saved(ml.PiSSA(8), qkv.out, qkv.into).values())):,}"),
        20: (f"{trained(ml.LoftQ(8)):,}", "512 × 512"),
        22: (str(decay),),
        23: (f"{LLAMA.parameters:,}", f"{rank8:,}", f"{alive[ml.LoRA]} GiB", f"{TOKENS:,}", *(" | ".join(held(line)) for line in (full32, lora16, qlora)),
             f"{7e9 / 2 / 1e9} GB"),
        24: (f"{100 * hundredth['nf4'].survives:.1f} %", f"{hundredth['nf4'].error:.2f}", f"{100 * hundredth['bfloat16'].survives:.1f} %",
             f"{hundredth['bfloat16'].error:.2f}", f"{100 * ml.merge_autopsy(*normal_pair(0.1), 'nf4').survives:.1f} %"),
        25: ("256",),
        26: (f"{rank8:,}", f"{q_and_v[8]:,}", f"{q_and_v[most]:,}", str(most)),
        27: (f"{2 * GLM.parameters / GIB:.2f} GiB", f"{100 * 2 * trained(ml.LoRA(8)) / MIB:.0f} MiB", f"{100 * 2 * GLM.parameters / GIB:,.0f} GiB",
             f"{100 * trained(ml.LoRA(8)) / (qkv.count * qkv.out * qkv.into):.2f} %"),
        31: (f"{share_of_two:.0f} %", f"{share_of_two:.1f} %", held(lora16)[3], model16),
        29: ("128",),
        33: (f"{four} → {twelve}", lora, f"{3 * qkv.count * 8 * (qkv.into + qkv.out // 3):,}", f"{trained(ml.LoRA(24)):,}"),
        34: (f"{2 * linears / GIB:.2f} GiB",),
        35: (*level_statistics(), str(bits(False)), f"{bits(True):.3f}", f"{bits(False) - bits(True):.3f}", str(double.BLOCK)),
        36: ("4096 → 4096", str(break_even(4096, 4096)), f"{four} → {twelve}", str(break_even(qkv.out, qkv.into)),
             f"{100 * 64 * 8192 / square:.3f} %"),
        37: ("512", "1024", *(f"{alive_bytes(method, dropout):,}" for method in (ml.LoRA, ml.LoRAFA) for dropout in (0.0, 0.1))),
        38: (f"{embedding:,}", f"{embedding / trained(ml.LoRA(8)):.0f}"),
        40: (f"{tiny:,}", "256", str(ml.LoRA(256, alpha=8).scale)),
    }


def level_statistics() -> tuple[str, str, str]:
    """NF4 on normal numbers: error over their standard deviation, and the shares of the level used least and of the one used most."""
    w = torch.randn(2**21, generator=torch.Generator().manual_seed(0))
    Q = ml.quantize_nf4(w)
    shares = unpack(Q.codes, w.numel()).bincount(minlength=16) / w.numel()
    return f"{(Q.dequantize() - w).square().mean().sqrt() / w.std():.4f}", f"{100 * shares.min():.0f} %", f"{100 * shares.max():.0f} %"


def trained_share(rank: int) -> float:
    model = ml.adapt(ml.load_base(), ml.LoRA(rank))
    return ml.trainable_parameters(model) / sum(p.numel() for p in ml.load_base().parameters())


def rows_of_ranks():
    """The cells of question 8's table."""
    for rank in (1, 4, 8, 16, 64):
        cells = [str(rank)]
        for layers in (QKV, None):
            count = trained(ml.LoRA(rank), layers)
            cells += [f"{count:,}", *(f"{size * count / MIB:g} MiB" for size in (4, 2))]
        yield cells


def computed_for_choice() -> set[str]:
    full32, lora16, qlora = total(LLAMA, ml.FullFineTuning(), base="fp32"), total(LLAMA, ml.LoRA(8)), total(LLAMA, ml.QLoRA(8), base="nf4")
    rank8, vera = 4 * lora16.trainable, ml.VeRA(256)
    widest, tallest = max(kind.into for kind in LLAMA.kinds), max(kind.out for kind in LLAMA.kinds)
    thousand = 1000 * 4 * trained(vera, None, LLAMA) + 4 * COSTS[ml.VeRA].shared(vera, tallest, widest)
    return {
        f"full {held(full32)[3]} GiB, LoRA {held(lora16)[3]}, QLoRA {held(qlora)[3]}",
        f"{TOKENS:,} tokens: {total(LLAMA, ml.LoRAFA(8)).alive_bytes / GIB:.2f} GiB kept, by LoRA {lora16.alive_bytes / GIB:.2f}",
        f"{rank8 / MIB} MiB each (LLaMA-7B, rank 8, fp32); the model {2 * LLAMA.parameters / GIB:.2f} GiB, once",
        f"a thousand: {thousand / GIB:.1f} GiB at rank 256, LoRA's {1000 * rank8 / GIB:.1f}",
        f"{100 * ml.merge_autopsy(*normal_pair(0.01), 'nf4').survives:.1f} % of the codes",
        f"DoRA keeps {total(LLAMA, ml.DoRA(8)).alive_bytes / GIB:.2f} GiB where LoRA keeps {lora16.alive_bytes / GIB:.2f}",
        f"{trained(ml.AdaLoRA(12)):,} numbers to end at LoRA's {trained(ml.LoRA(8)):,}",
    }


# The tests

@BOTH
def test_forty_answers_are_folded_each_with_sources_and_what_is_often_wrong(page):
    text, found = page.read_text(encoding="utf-8"), answers(page)
    assert list(found) == list(range(1, 41)) and text.count("<details>") == text.count("</details>") == text.count("<summary>") == 40
    for number, (_, answer) in found.items():
        *_, shown, wrong = answer.split("\n\n")
        assert shown.startswith(SHOWN[page]) and targets(shown) and wrong.startswith(WRONG[page]) and "\n" not in wrong, number
        assert answer.count(WRONG[page]) == answer.count(SHOWN[page]) == 1, number


def test_bold_words_end_where_markdown_sees_it():
    """Two stars after a Chinese comma or colon and before a letter close nothing."""
    for number, (_, answer) in answers(CHINESE).items():
        for block in answer.split("\n\n"):
            assert block.count("**") % 2 == 0, number
            for words, after in re.findall(r"\*\*(.+?)\*\*(.?)", block):
                assert not unicodedata.category(words[-1]).startswith("P") or not after.isalnum(), f"{words} in answer {number}"


@BOTH
@EACH
def test_an_answer_is_half_a_screen_at_most(page, number):
    def width(line):
        return sum(2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in line)

    _, answer = answers(page)[number]
    lines = 0
    for block in answer.split("\n\n"):
        pieces = block.split("\n")
        own_lines = block.startswith(("    ", "|", "- ", "1. ", "```"))
        shown = pieces if own_lines else ["".join(pieces)]
        lines += sum(math.ceil(width(LINK.sub(r"\1", piece)) / COLUMNS) for piece in shown)
    assert lines <= MOST_LINES, f"{lines} lines"


@EACH
def test_both_pages_have_the_same_numbers_links_and_code(number):
    (question, english), (frage, chinese) = answers(ENGLISH)[number], answers(CHINESE)[number]
    assert set(numbers(question)) == set(numbers(frage)) and set(numbers(english)) == set(numbers(chinese))
    assert targets(english) == targets(chinese)
    code = [[re.sub(r" *#.*", "", block) for block in re.findall(r"^```python\n(.*?)^```", text, flags=re.M | re.S)] for text in (english, chinese)]
    assert code[0] == code[1]


def test_both_pages_have_the_same_sections():
    def sections(page):
        return [len(ANSWER.findall(part)) for part in page.read_text(encoding="utf-8").split("\n## ")]

    assert sections(ENGLISH) == sections(CHINESE) == [0, 11, 9, 20]


@BOTH
@EACH
def test_what_can_be_computed_is_what_the_package_says(page, number):
    text = " ".join(" ".join(answers(page)[number]).split())
    for said in computed().get(number, ()):
        assert re.search(rf"(?<![\w.,]){re.escape(said)}(?![\w,.]?\d)", text), f"{said} is not in answer {number}"


@pytest.mark.parametrize("target", FACTS)
def test_what_is_quoted_is_said_there(target):
    there = written(LESSONS / target)
    for said in FACTS[target]:
        assert " ".join(said.split()) in there, f"{target} does not say: {said}"


@BOTH
@EACH
def test_no_number_is_from_memory(page, number):
    question, answer = answers(page)[number]
    known = {word for said in computed().get(number, ()) for word in NUMBER.findall(said)} | in_linked_files(answer) | SAID.get(number, set())
    for word in figures(question) | figures(answer):
        paper = PAPERS.get(number, {}).get(word)
        assert word in known or paper and f"https://arxiv.org/abs/{paper}" in targets(answer), f"where does {word} come from?"


@pytest.mark.parametrize("page", [ENGLISH, CHINESE, CHOOSE], ids=lambda page: page.name)
def test_a_test_that_is_named_is_there(page):
    named = [(name, target) for name, target in LINK.findall(page.read_text(encoding="utf-8")) if name.startswith("test_")]
    assert named or page == CHOOSE
    for name, target in named:
        source = (page.parent / target).read_text(encoding="utf-8")
        assert Path(target).name == name or f"\ndef {name}(" in source, f"{target} has no {name}"


def test_the_table_of_memory_has_the_rows_that_the_formulas_give():
    for page in (ENGLISH, CHINESE):
        table = [line for line in answers(page)[23][1].splitlines() if line.startswith("| ")][1:]
        lines = total(LLAMA, ml.FullFineTuning(), base="fp32"), total(LLAMA, ml.LoRA(8)), total(LLAMA, ml.QLoRA(8), base="nf4")
        assert [tuple(cell.strip() for cell in row.strip("|").split("|"))[1:] for row in table] == [held(line) for line in lines]


def test_the_table_of_ranks_has_the_rows_that_the_formulas_give():
    for page in (ENGLISH, CHINESE):
        table = [line for line in answers(page)[8][1].splitlines() if line.startswith("| ")][1:]
        assert [[cell.strip() for cell in row.strip("|").split("|")] for row in table] == list(rows_of_ranks())


def test_an_adapter_is_trained_on_as_answer_11_says(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("my.txt").write_text("It was a dark and stormy night. " * 80)
    first = ml.adapt(ml.load_base(), ml.LoRA(3, alpha=5))
    with torch.no_grad():
        for _, layer in ml.adapters(first):
            layer.B.normal_(std=0.01)
    ml.save_adapter(first, "mine")
    source, = re.findall(r"^```python\n(.*?)^```", answers(ENGLISH)[11][1], flags=re.M | re.S)
    names = {"ml": ml}
    exec(source.replace("steps=200", "steps=2").replace("batches()", "batches(2, 32)"), names)
    assert names["method"] == ml.LoRA(3, alpha=5)
    before, after = (dict(ml.adapters(ml.load_adapter(ml.load_base(), folder))) for folder in ("mine", "mine-2"))
    assert before.keys() == after.keys() and all(not torch.equal(before[name].B, after[name].B) for name in before)
    assert not any(p.requires_grad for p in ml.load_adapter(ml.load_base(), "mine").parameters())


def test_a_step_of_gradient_descent_moves_w_as_answer_21_says():
    torch.manual_seed(0)
    A, B, G = torch.randn(3, 7).double(), torch.randn(5, 3).double(), torch.randn(5, 7).double()
    s, rate = 0.4, 1e-6
    moved = s * ((B - rate * s * G @ A.T) @ (A - rate * s * B.T @ G) - B @ A)
    assert torch.allclose(moved, -rate * s**2 * (G @ A.T @ A + B @ B.T @ G), rtol=0, atol=1e-10)


def test_one_pair_of_three_times_the_rank_says_what_three_pairs_say():
    """Answer 33."""
    torch.manual_seed(0)
    As, Bs = [torch.randn(2, 7).double() for _ in range(3)], [torch.randn(5, 2).double() for _ in range(3)]
    assert torch.allclose(torch.block_diag(*Bs) @ torch.cat(As), torch.cat([B @ A for A, B in zip(As, Bs)]))


def test_no_number_of_the_choice_is_from_memory():
    text = CHOOSE.read_text(encoding="utf-8")
    said = computed_for_choice()
    for sentence in said:
        assert sentence in " ".join(text.split()), sentence
    known = {word for sentence in said for word in NUMBER.findall(sentence)}
    for block in re.split(r"\n\n|\n(?=[|-])", text):
        for word in figures(block) - known - in_linked_files(block):
            assert f"https://arxiv.org/abs/{PAPERS['choose'].get(word)}" in targets(block), f"where does {word} come from? {block[:80]}"


def test_the_choice_is_one_page():
    text = CHOOSE.read_text(encoding="utf-8")
    first_table = [line.split("|")[1].strip() for line in text.splitlines() if line.startswith("| ")]
    assert [cell for cell in first_table if cell] == ["1", "2", "3", "4", "5"] and len(text.splitlines()) <= 70
