"""The fair fight: what is drawn from which data, what is run once only, and the arithmetic of intervals and verdicts."""

import json
import math
import shutil
import subprocess
import sys
import time
from functools import cache
from random import Random

import numpy as np
import pytest
import torch
from matplotlib.text import Text

import minilora as ml
from minilora import data, plots
from minilora.evidence import capacity, claims, compare, scoreboard
from minilora.evidence.claims import sooner
from minilora.evidence.compare import Entry, Results, Settings, at_budget, entries
from minilora.evidence.scoreboard import paired, score_of
from minilora.methods import METHODS

LORA, VERA = Entry("lora"), Entry("vera")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("base") / "base.safetensors"
    ml.storage.save_model(ml.TinyGPT(ml.GPTConfig(context=64, width=16, layers=2, heads=2)), path)
    return path


@pytest.fixture(scope="module")
def finished(tmp_path_factory, base):
    """The folder of a comparison that was made once: LoRA and VeRA, two seeds. Who goes on with it takes a copy."""
    folder = tmp_path_factory.mktemp("finished")
    run(folder, base)
    return folder


@cache
def trained(entry):
    """The number of trainable parameters, from the adapted model itself."""
    return ml.trainable_parameters(entry.adapted(100))


def quietly(*_):
    pass


def one_line_tasks():
    return {"voice": data.voice()}


# Which data

def documents(windows):
    return {line for row in windows.tolist() for line in bytes(row).decode(errors="ignore").split("\n")[1:-1]}       # the last may be cut


@pytest.mark.parametrize("make", [data.world, data.voice])
def test_what_rates_are_chosen_on_is_not_what_is_reported(make):
    task = make()
    choosing = task.choosing()
    ours, theirs = documents(task.held_out(400)), documents(choosing.held_out(400))
    assert len(ours) > 100 and len(theirs) > 100 and not ours & theirs
    rows = [{tuple(row) for row in windows.tolist()} for windows in (task.held_out(65), choosing.held_out(65))]
    assert not rows[0] & rows[1]


def test_sums_for_choosing_are_neither_asked_nor_told_elsewhere():
    task = data.sums()
    choosing = task.choosing()
    asked, for_choice = {q for q, _ in task.questions}, {q for q, _ in choosing.questions}
    assert for_choice and not asked & for_choice
    numbers = {tuple(sorted(q.strip("\n=").split("+"))) for q in for_choice}
    told = set()
    for step in range(60):
        x, _ = choosing.batches(16, 64, seed=step)(0)
        told |= {tuple(sorted(line.split("=")[0].split("+"))) for row in x.tolist() for line in bytes(row).decode().split("\n")[1:-1]}
    assert len(told) > 1000 and not told & numbers and not told & {tuple(sorted(q.strip("\n=").split("+"))) for q in asked}


def test_facts_for_choosing_are_other_facts():
    ours, theirs = (set(task.questions) for task in (data.facts(), data.facts().choosing()))
    assert ours and theirs and not ours & theirs


def test_text_for_choosing_ends_where_the_held_out_part_begins():
    content = b"".join(b"line %d of a text\n" % i for i in range(600))
    task = data.split_text(content, "t")
    cut = len(content) * 9 // 10
    held_out, for_choice = (b"".join(bytes(row) for row in windows.tolist()) for windows in (task.held_out(65), task.choosing().held_out(65)))
    assert held_out in content[cut:] and for_choice in content[:cut]
    windows = [task.choosing().window(Random(seed), 65) for seed in range(200)]
    assert not any(window in for_choice for window in windows)


# What is run

def test_every_method_is_there_and_where_it_is_wanted_on_every_base_that_it_can_stand_on():
    assert [entry.method for entry in entries()] == [*ml.methods.METHODS] and set(entries()) < set(entries(four_bits=True))
    found = entries(four_bits=True)
    assert len(found) == len(set(found)) == 23 and Entry("lora", "nf4") in found
    assert {entry.method for entry in found} == {*ml.methods.METHODS}
    assert {entry.method for entry in found if entry.base == "fp32"} | {"qlora", "loftq", "qpissa"} == {*ml.methods.METHODS}
    for entry in found:
        model = entry.adapted(40)
        assert ml.trainable_parameters(model) > 0
        four_bits = [m for m in model.modules() if isinstance(m, ml.NF4Linear)]
        assert (len(four_bits) == 24) == (entry.base == "nf4")


def test_what_a_question_changes_is_changed_and_nothing_else():
    whole = sum(linear.weight.numel() for linear in ml.adapter.find_targets(ml.load_base()).values())
    for entry, trained_names in ((claims.ATTENTION, {"q_proj", "k_proj", "v_proj", "o_proj"}), (claims.MLP, {"up_proj", "down_proj"})):
        model = entry.adapted(10)
        assert {name.split(".")[-1] for name, _ in ml.adapters(model)} == trained_names and ml.trainable_parameters(model) == 40_960 < whole
    (_, usual), *_ = ml.adapters(LORA.adapted(10))
    (_, turned), *_ = ml.adapters(claims.ZERO_A.adapted(10))
    assert not usual.B.any() and usual.A.all() and not turned.A.any() and turned.B.all() and usual.scale == turned.scale
    assert turned.B.abs().max() <= 1 / math.sqrt(8) < 1.02 * turned.B.abs().max()
    assert Entry("lora", alpha=32.0).way(10) == ml.LoRA(8, alpha=32.0)
    assert Settings(400, 8).of(claims.LORA_LARGE) == Settings(50, 64) and Settings(400, 8).of(LORA) == Settings(400, 8)


def test_an_entry_is_found_again_in_its_record_and_says_what_is_special():
    for entry in (*entries(True), *claims.LINEUP, claims.ATTENTION, claims.ZERO_A, claims.LORA_LARGE, Entry("lora", alpha=32.0)):
        assert Entry.of(json.loads(json.dumps(entry.key)) | {"task": "t", "seed": 1}) == entry
    assert LORA.key == {"method": "lora", "base": "fp32", "rank": None} and claims.ATTENTION.key["only"] == "attention"
    assert [str(entry) for entry in (claims.ATTENTION, claims.ZERO_A, claims.LORA_LARGE, Entry("lora", "nf4"), Entry("loftq", "nf4"), Entry("lora", alpha=32.0))] == [
        "lora r=10 attention", "lora A=0", "lora rows=64", "lora on nf4", "loftq", "lora alpha=32"]


def test_a_budget_is_met_within_a_tenth_or_the_method_stays_out():
    found = at_budget(73_728, 40)
    assert Entry("lora") in found and Entry("lora-fa", rank=16) in found and not any(entry.method in ("full", "vera") for entry in found)
    for entry in found:
        assert abs(trained(entry) - 73_728) <= 7_373
    assert Entry("vera", rank=192) in at_budget(9_216, 40) and Entry("dora", "nf4") in at_budget(78_336, 40, four_bits=True) and at_budget(10, 40) == []


def run(out, base, lineup=(LORA, VERA), seeds=2, quick=True, **settings):
    return compare.compare(one_line_tasks(), seeds, out, Settings(10, 4, base, **settings), list(lineup), quick, "test", quietly)


def test_a_record_says_what_was_run_and_what_it_cost(tmp_path, base, finished):
    results = run(shutil.copytree(finished, tmp_path / "out"), base)
    runs = results.content["runs"]
    assert [(r["method"], r["seed"]) for r in runs] == [("lora", 0), ("lora", 1), ("vera", 0), ("vera", 1)]
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == results.content
    one, model = runs[1], Entry("lora").model(base)
    method = ml.LoRA(8)
    before = compare.bits(model, data.world())
    ml.finetune(model, method, data.voice().batches(4, 64, 1), 10, one["lr"], 1, warmup=1, schedule="linear", progress=False)
    assert one["scores"]["bits_per_byte"] == compare.bits(model, data.voice())
    assert one["scores"]["forgotten"] == compare.bits(model, data.world()) - before
    assert one["costs"]["trainable_parameters"] == ml.trainable_parameters(model)
    assert one["costs"]["optimizer_bytes"] == 8 * ml.trainable_parameters(model) + 4 * 24 and one["costs"]["disk_bytes"] > 4 * ml.trainable_parameters(model)
    assert runs[0]["lr"] == runs[1]["lr"] and results.content["about"]["cpu_seconds"] > 0 and set(results.content["about"]["versions"]) == {"python", "torch", "numpy"}


def test_no_run_is_ever_made_twice(tmp_path, base, finished, monkeypatch):
    folder, first, made = shutil.copytree(finished, tmp_path / "out"), compare.read(finished / "results.json"), []
    train = Settings.run
    monkeypatch.setattr(Settings, "run", lambda self, entry, *rest: made.append((entry, rest[-1])) or train(self, entry, *rest))
    again = run(folder, base, seeds=2)
    assert made == [] and again.content["runs"] == first["runs"]
    run(folder, base, seeds=3)
    assert made == [(LORA, 2), (VERA, 2)]


def test_a_comparison_that_was_killed_goes_on_where_it_was(tmp_path, base, finished):
    """Killed by SIGKILL between its runs and in them; what is left is whole and the end is the same."""
    code = f"""
import sys; sys.path.insert(0, {str(tmp_path)!r})
from pathlib import Path
from minilora import data
from minilora.evidence import compare
compare.compare({{"voice": data.voice()}}, 2, Path({str(tmp_path / "killed")!r}), compare.Settings(10, 4, Path({str(base)!r})), [compare.Entry("lora"), compare.Entry("vera")], True, "test")
"""
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    child.stdout.readline()                                        # one run is finished
    time.sleep(0.05)
    child.kill()
    child.wait()
    left = compare.read(tmp_path / "killed" / "results.json")["runs"]
    assert 1 <= len(left) <= 4
    resumed, straight = run(tmp_path / "killed", base), compare.read(finished / "results.json")
    assert resumed.content["runs"][:len(left)] == left
    assert [r["scores"] for r in resumed.content["runs"]] == [r["scores"] for r in straight["runs"]]


def test_two_comparisons_in_one_place_do_not_erase_each_other(tmp_path, base):
    results = run(tmp_path, base, lineup=[LORA], seeds=1)
    other = run(tmp_path, base, lineup=[VERA], seeds=1)
    with pytest.raises(ValueError, match="changed by something else"):
        results.add("runs", results.content["runs"][0])
    assert compare.read(tmp_path / "results.json") == other.content and len(other.content["runs"]) == 2


def test_further_seeds_have_the_rate_of_those_that_are_there(tmp_path, base, monkeypatch):
    first = run(tmp_path, base, lineup=[LORA], seeds=1).content["runs"][0]["lr"]
    monkeypatch.setattr(compare, "published_rate", lambda entry, task: 7 * first)
    assert [r["lr"] for r in run(tmp_path, base, lineup=[LORA, VERA], seeds=2).content["runs"]] == [first, first, 7 * first, 7 * first]


def test_a_published_rate_is_the_tasks_or_the_middle_one(tmp_path, monkeypatch):
    runs = [made_up("lora", [1.0], task=task)[0] | {"lr": lr} for task, lr in (("voice", 0.3), ("facts", 0.1), ("sums", 0.2))]
    compare.write(tmp_path / "p.json", {"about": {"settings": {}}, "search": [], "runs": runs, "grid": []})
    monkeypatch.setattr(compare, "PUBLISHED", tmp_path / "p.json")
    assert [compare.published_rate(LORA, task) for task in ("voice", "facts", "my.txt")] == [0.3, 0.1, 0.2]
    assert compare.published_rate(VERA, "voice") == ml.methods.RATES["vera"]


def test_a_base_that_is_too_small_is_refused_before_anything_is_run(tmp_path, base):
    with pytest.raises(ValueError, match="rank 64 is above"):
        run(tmp_path / "out", base, lineup=[LORA, Entry("lora", rank=64)])
    ml.storage.save_model(ml.TinyGPT(ml.GPTConfig(context=32, width=32, layers=1, heads=2)), tmp_path / "short.safetensors")
    with pytest.raises(ValueError, match="reads 32 bytes at once, and compare gives it 64"):
        run(tmp_path / "out", tmp_path / "short.safetensors")
    assert not (tmp_path / "out").exists()


def test_a_text_that_has_changed_anywhere_is_another(tmp_path):
    content = b"".join(b"line %d of a text\n" % i for i in range(3000))
    results = Results(tmp_path / "results.json", {"settings": {}, "cpu_seconds": 0})
    results.same_data("t", data.split_text(content, "t"))
    with pytest.raises(ValueError, match="other data named 't'"):
        results.same_data("t", data.split_text(content.replace(b"line 1500 ", b"line 1501 "), "t"))


def test_what_delta_lora_costs_is_measured_when_w_moves(base):
    settings = Settings(10, base=base)
    assert compare.priced(Entry("delta-lora"), settings)["alive_bytes"] > compare.priced(LORA, settings)["alive_bytes"]


@pytest.mark.parametrize("name", METHODS)
def test_every_method_has_its_price(name, base):
    """LoRA-drop too, which looks at data before its first step."""
    cost = compare.priced(Entry(name, "nf4" if name in compare.OWN_BASE else "fp32"), Settings(10, 2, base=base))
    assert cost["alive_bytes"] > 0 and 0.05 < cost["step_ratio"] < 20


def test_a_task_that_asks_has_its_exact_matches_recorded(base):
    settings, asks = Settings(10, base=base), data.facts(4)
    scores, model = settings.run(LORA, asks, 0.01, 0)
    assert scores["exact_match"] == ml.exact_match(model, asks.questions) and scores["bits_per_byte"] == compare.bits(model, asks)
    assert "exact_match" not in settings.run(LORA, data.voice(), 0.01, 0)[0]


def test_a_curve_begins_before_training_and_ends_where_the_run_does(base):
    settings, task = Settings(20, 4, base=base), data.voice()
    scores, model = settings.run(LORA, task, 0.01, 0)
    before, few = LORA.model(base), data.world().held_out(65)[:compare.SAMPLED]
    assert len(scores["curve"]) == 11
    assert scores["curve"][0] == [pytest.approx(compare.bits(before, task, compare.SAMPLED), abs=1e-4), 0.0]
    lost = (ml.held_out_loss(model, few) - ml.held_out_loss(before, few)) / math.log(2)
    assert scores["curve"][-1] == [pytest.approx(compare.bits(model, task, compare.SAMPLED), abs=1e-4), pytest.approx(lost, abs=1e-4)]
    looked_at, left = settings.train(LORA, task, 0.01, 0, look=lambda model: 0.0), settings.train(LORA, task, 0.01, 0)
    assert all(torch.equal(a, b) for a, b in zip(looked_at.state_dict().values(), left.state_dict().values(), strict=True))


def test_facts_are_scored_in_the_words_that_told_them_and_asked_in_others(base):
    task, model = data.facts(10, every=5), LORA.model(base)
    assert len(task.told) == 10 and len(task.questions) == 8
    assert compare.bits(model, task) == pytest.approx(ml.training.answer_loss(model, task.told) / math.log(2))
    lines = {line for step in range(40) for row in task.batches(8, 64)(step)[0].tolist() for line in bytes(row).decode().split("\n")[1:-1]}
    assert all((question + answer).strip() in lines for question, answer in task.told)
    assert not any((question + answer).strip() in lines for question, answer in task.questions) and sum(line.startswith("What does") for line in lines) == 2


def test_settings_and_files_that_do_not_fit_are_refused(tmp_path, base):
    run(tmp_path, base, lineup=[LORA], seeds=1)
    before = (tmp_path / "results.json").read_bytes()
    with pytest.raises(ValueError, match="a comparison with other settings"):
        compare.compare(one_line_tasks(), 1, tmp_path, Settings(11, 4, base), [LORA], True, "", quietly)
    assert (tmp_path / "results.json").read_bytes() == before
    torch.manual_seed(1)
    other = base.with_name("other.safetensors")
    ml.storage.save_model(ml.TinyGPT(ml.GPTConfig(context=64, width=16, layers=2, heads=2)), other)
    with pytest.raises(ValueError, match="a comparison with other settings"):                  # another base
        run(tmp_path, other, lineup=[LORA], seeds=1)
    with pytest.raises(ValueError, match="runs on other data named 'voice'"):                   # another text of the same name
        compare.compare({"voice": data.world()}, 1, tmp_path, Settings(10, 4, base), [LORA], True, "", quietly)
    assert (tmp_path / "results.json").read_bytes() == before
    for content in ("{}", "[]", "", "{\"about\": 1", "7"):
        (tmp_path / "results.json").write_text(content)
        with pytest.raises(ValueError, match="not a results file of compare"):
            run(tmp_path, base)


def test_a_results_file_that_was_edited_is_refused_whatever_was_edited(tmp_path):
    good = {"about": {"settings": {}, "cpu_seconds": 1}, "search": [{"task": "t", "method": "lora", "base": "fp32", "rank": None, "seed": 1000, "lr": 0.1, "bits_per_byte": None}],
            "runs": [{"task": "t", "method": "lora", "base": "fp32", "rank": None, "rows": 64, "only": "mlp", "seed": seed, "lr": 0.1, "costs": {"trainable_parameters": 5},
                      "scores": {"bits_per_byte": 1.0, "forgotten": None, "curve": [[2.0, 0.0], [1.0, 0.5]]}} for seed in (0, 1)],
            "grid": [{"task": "t", "method": "lora", "base": "fp32", "rank": None, "seed": 0, "lr": lr, "costs": {}, "scores": {"bits_per_byte": lr}} for lr in (0.1, 0.2)]}
    path = tmp_path / "results.json"
    path.write_text(json.dumps(good))
    assert compare.read(path) == good

    def places(part, at=()):
        for key in part if isinstance(part, dict) else range(len(part)):
            yield (*at, key)
            if isinstance(part[key], (dict, list)) and key != "settings":
                yield from places(part[key], (*at, key))

    allowed = 0
    for place in places(good):
        for value in ("x", [], {}, [None], None, 7, -1, 0, 10**400, math.nan, math.inf, True, ...):
            content = json.loads(json.dumps(good))
            *above, last = place
            part = content
            for key in above:
                part = part[key]
            if value is ...:
                part.pop(last)
            else:
                part[last] = value
            path.write_text(json.dumps(content))
            try:
                content = compare.read(path)
            except ValueError as error:
                assert str(error).startswith(f"{path}: not a results file")
            else:                                                 # it may stand, then: all that reads it must be able to
                allowed += 1
                for task in {run["task"] for run in content["runs"]}:
                    scoreboard.table(content["runs"], task)
                claims.report(content)
                scoreboard.write_csv(content["runs"], tmp_path / "r.csv")
    assert allowed > 20
    path.write_text(json.dumps(good | {"runs": [good["runs"][0]] * 2}))
    with pytest.raises(ValueError, match="not a results file"):
        compare.read(path)
    path.write_text("[" * 100_000)
    with pytest.raises(ValueError, match="not a results file"):
        compare.read(path)


def test_what_is_refused_is_refused_before_the_first_run(tmp_path):
    torch.manual_seed(0)
    narrow = tmp_path / "narrow.safetensors"
    ml.storage.save_model(ml.TinyGPT(ml.GPTConfig(context=64, width=8, layers=1, heads=2)), narrow)
    with pytest.raises(ValueError, match="^adalora: .* rank 12 is above"):
        compare.compare(one_line_tasks(), 1, tmp_path / "out", Settings(10, base=narrow), entries(), True, "", quietly)
    assert not (tmp_path / "out").exists()
    ml.storage.save_model(ml.TinyGPT(ml.GPTConfig(context=64, width=1, layers=1, heads=1)), narrow)
    assert {entry.method for entry in at_budget(10**9, 100, narrow)} == set()


def test_who_went_on_with_a_comparison_is_written_down(tmp_path, base):
    run(tmp_path, base, lineup=[LORA], seeds=1)
    for _ in range(2):
        compare.compare(one_line_tasks(), 2, tmp_path, Settings(10, 4, base), [LORA], True, "another command", quietly)
    about = compare.read(tmp_path / "results.json")["about"]
    assert [later["command"] for later in about["continued"]] == ["another command"] and about["continued"][0]["versions"] == about["versions"]


def test_costs_of_a_method_whose_layers_share_are_the_mean_of_its_seeds():
    runs = made_up("lora-drop", [1.0, 1.0, None])
    for run, count in zip(runs, (60, 71, 0)):
        run["costs"] = {"alive_bytes": 5} | ({"trainable_parameters": count} if count else {})
    assert scoreboard.costs_of(runs, "t", Entry("lora-drop")) == {"alive_bytes": 5, "trainable_parameters": 65.5}
    assert scoreboard.costs_of(runs[2:], "t", Entry("lora-drop")) == {"alive_bytes": 5}


def searched(monkeypatch, tmp_path, score):
    """search() on made-up scores, given as score(lr): what it chose and the rates it ran."""
    made, reported = [], data.voice()

    def trial(self, entry, task, lr, seed):
        assert seed == compare.SEARCH_SEED and not torch.equal(task.held_out(65), reported.held_out(65))
        made.append(lr)
        return score(lr)

    monkeypatch.setattr(Settings, "trial", trial)
    results = Results(tmp_path / "results.json", {"settings": {}, "cpu_seconds": 0})
    chosen = compare.search(LORA, "voice", data.voice(), Settings(10), results)
    assert len(made) == len(results.content["search"]) == 5
    assert compare.search(LORA, "voice", data.voice(), Settings(10), results) == chosen and len(made) == 5        # none twice
    return chosen, made


def test_the_search_goes_beyond_an_edge_and_then_into_the_gap(tmp_path, monkeypatch):
    curve = {0.00316: 3.0, 0.01: 2.0, 0.0316: 1.0, 0.1: 4.0, 0.0178: 1.1}
    assert searched(monkeypatch, tmp_path, curve.get) == (0.0316, [0.00316, 0.01, 0.0316, 0.1, 0.0178])


@pytest.mark.parametrize("halfway, fifth, chosen", [(1.2, 0.00562, 0.01), (0.9, 0.0133, 0.0178)])
def test_the_search_looks_on_the_other_side_of_a_best_in_the_middle_or_nearer_to_a_better_one(halfway, fifth, chosen, tmp_path, monkeypatch):
    curve = {0.00316: 2.0, 0.01: 1.0, 0.0316: 1.5, 0.0178: halfway, 0.00562: 1.4, 0.0133: 0.95}
    found, made = searched(monkeypatch, tmp_path, curve.get)
    assert made[3:] == [0.0178, fifth] and found == chosen


def test_the_search_survives_rates_that_diverge(tmp_path, monkeypatch):
    chosen, made = searched(monkeypatch, tmp_path, lambda lr: None if lr > 0.002 else 1.0)
    assert made == [0.00316, 0.01, 0.0316, 0.001, 0.000316] and chosen == 0.001


@pytest.mark.parametrize("tried, expected", [
    ({1.0: 3, 10.0: 2, 100.0: 1}, 100 * math.sqrt(10)), ({1.0: 1, 10.0: 2, 100.0: 3}, 1 / math.sqrt(10)),
    ({1.0: 3, 10.0: 1, 100.0: 2}, math.sqrt(1000)), ({1.0: 2, 10.0: 1, 100.0: 3}, math.sqrt(10)),
    ({1.0: 2, 10.0: 1, 20.0: 0.5, 100.0: 3}, math.sqrt(2000)), ({1.0: 2, 5.0: 1, 10.0: 1.5}, math.sqrt(5)),
])
def test_the_next_rate_is_where_there_is_most_room(tried, expected):
    assert compare.most_room(tried) == pytest.approx(expected)


def test_where_a_task_asks_the_answers_are_scored(base):
    asks, tells = data.sums(8), data.voice()
    model = Entry("lora").model(base)
    by_hand, size = 0.0, 0
    for question, answer in asks.questions:
        for end in range(len(answer)):
            logits = model(torch.tensor([list((question + answer[:end]).encode())]))[0, -1]
            by_hand, size = by_hand - torch.log_softmax(logits, -1)[ord(answer[end])].item() / math.log(2), size + 1
    assert compare.bits(model, asks) == pytest.approx(by_hand / size, rel=1e-5)
    assert compare.bits(model, tells) == pytest.approx(ml.held_out_loss(model, tells.held_out(65)) / math.log(2))


def test_what_is_compared_is_asked_of_enough_and_chosen_on_other_questions():
    for name, task in ((name, make()) for name, make in compare.TASKS.items()):
        assert task.name == name
        asked, for_choice = set(task.questions), set(task.choosing().questions)
        assert not asked & for_choice and (name in ("voice", "code") or len(asked) >= {"facts": 64, "sums": 500}[name] and len(for_choice) >= 64)
        assert not set(task.told) & set(task.choosing().told) and len(task.held_out(65)) >= 64


def test_a_run_that_diverges_is_a_record_and_not_a_crash(tmp_path, base):
    for method in ("full", "lora-drop"):                            # in training, and in the look before it
        scores, model = Settings(10, base=base).run(Entry(method), data.voice(), 1e30, 0)
        assert model is None and scores["bits_per_byte"] is None and Settings(10, base=base).trial(Entry(method), data.voice(), 1e30, 0) is None
    runs = [{"method": "full", "base": "fp32", "rank": None, "task": "voice", "seed": 0, "lr": 1e30, "scores": scores, "costs": {}}]
    assert "diverged" in scoreboard.table(runs, "voice")


def test_stages_of_one_fight_are_joined_and_of_two_are_refused():
    def stage(task, **about):
        return file_of(made_up("lora", [1.0], task=task)) | {"about": {"settings": {"steps": 1}, "versions": {}, "tasks": {task: "d"}, "cpu_seconds": 7} | about}

    whole = compare.joined([stage("a"), stage("b")])
    assert [run["task"] for run in whole["runs"]] == ["a", "b"] and whole["about"]["tasks"] == {"a": "d", "b": "d"} and whole["about"]["cpu_seconds"] == 14
    assert compare.joined([stage("a"), stage("b", settings={"steps": 2})])["about"]["settings"] == {"steps": {"a": 1, "b": 2}}
    for other in (stage("b", settings={"steps": 1, "rows": 2}), stage("b", versions={"torch": "0"}), stage("a", tasks={"a": "e"}), stage("a", settings={"steps": 2})):
        with pytest.raises(ValueError, match="not made"):
            compare.joined([stage("a"), other])


# What is made of it

def made_up(method, values, task="t", base="fp32", **scores):
    return [{"method": method, "base": base, "rank": None, "task": task, "seed": seed, "lr": 0.1, "costs": {"trainable_parameters": 100},
             "scores": {"bits_per_byte": value} | {name: series[seed] for name, series in scores.items()}} for seed, value in enumerate(values)]


def test_differences_are_paired_by_seed():
    runs = made_up("lora", [1.0, 2.0, 3.0]) + made_up("full", [0.5, 1.5, 2.5, 9.0])
    assert paired(score_of(runs, "t", LORA), score_of(runs, "t", Entry("full"))) == [0.5, 0.5, 0.5]
    shuffled = list(reversed(runs))
    assert paired(score_of(shuffled, "t", LORA), score_of(shuffled, "t", Entry("full"))) == [0.5, 0.5, 0.5]
    assert score_of(runs, "other", LORA) == {} and score_of(runs, "t", Entry("lora", "nf4")) == {}


@pytest.mark.parametrize("draw, least, most", [("normal", 0.94, 0.96), ("laplace", 0.93, 0.98), ("uniform", 0.92, 0.96), ("exponential", 0.85, 0.93)])
def test_how_often_the_interval_of_six_seeds_covers_the_truth(draw, least, most):
    """95 in 100 for normal values; more for long tails; fewer for lopsided ones, which paired differences of one method and another seldom are."""
    dice = np.random.default_rng(0)
    values = {"normal": dice.normal, "laplace": dice.laplace, "exponential": lambda size: dice.exponential(size=size) - 1, "uniform": lambda size: dice.uniform(-1, 1, size)}[draw](size=(8000, 6))
    assert least < np.mean([low <= 0 <= high for _, low, high in map(scoreboard.confidence, values)]) < most


def test_the_interval_is_of_the_mean_and_needs_three_values():
    mean, low, high = scoreboard.confidence([1.0, 2.0, 3.0, 4.0, 5.0])
    assert (mean, low, high) == (3.0, pytest.approx(3 - 2.776 * math.sqrt(2.5 / 5), abs=1e-3), pytest.approx(3 + 2.776 * math.sqrt(2.5 / 5), abs=1e-3))
    assert scoreboard.confidence([1.0, 2.0]) == (1.5, -math.inf, math.inf) and scoreboard.confidence([4.0]) == (4.0, -math.inf, math.inf)
    assert scoreboard.confidence([7.0] * 5) == (7.0, 7.0, 7.0)
    assert math.isnan(scoreboard.confidence([1.0, math.nan, 2.0])[0]) and scoreboard.confidence([])[1:] == (-math.inf, math.inf)


@pytest.mark.parametrize("freedom, expected", [(1, 12.706), (4, 2.776), (5, 2.571), (9, 2.262), (19, 2.093)])
def test_students_t_is_the_one_in_the_tables(freedom, expected):
    assert scoreboard.student_t(0.975, freedom) == pytest.approx(expected, abs=2e-3)
    assert scoreboard.student_tail(expected, freedom) == pytest.approx(0.025, abs=1e-4) and scoreboard.student_tail(-expected, freedom) == pytest.approx(0.975, abs=1e-4)
    assert scoreboard.student_tail(0.0, freedom) == pytest.approx(0.5)


def test_a_p_value_is_the_share_of_samples_that_lie_as_far_by_chance():
    """Of a true mean on the line, p is uniform; and it says nothing where there is nothing to say it from."""
    dice = np.random.default_rng(1)
    found = [scoreboard.above(sample, 2.0) for sample in dice.normal(2.0, 0.3, (4000, 5))]
    assert [np.mean(np.array(found) < p) for p in (0.01, 0.05, 0.5)] == pytest.approx([0.01, 0.05, 0.5], abs=0.012)
    assert scoreboard.above([1.0, 2.0], 0.0) == scoreboard.above([1.0, math.nan, 1.0], 0.0) == 1.0
    assert scoreboard.above([1.0] * 4, 0.5) == 0.0 and scoreboard.above([1.0] * 4, 1.0) == 1.0


def test_of_what_is_believed_few_are_false():
    """40 tests of nothing and 20 of something, again and again; without the rule one in ten of the believed would be false."""
    dice, false = np.random.default_rng(2), []
    for _ in range(150):
        tests = [scoreboard.above(sample, 0.0) for sample in np.concatenate([dice.normal(0.0, 1.0, (40, 6)), dice.normal(2.0, 1.0, (20, 6))])]
        believed = scoreboard.discoveries(tests, 0.05)
        false.append(sum(believed[:40]) / max(1, sum(believed)))
        assert sum(believed[40:]) >= 10
    assert 0.01 < np.mean(false) < 0.05
    assert scoreboard.discoveries([0.04, 0.9], 0.05) == [False, False] and scoreboard.discoveries([0.02, 0.05, 0.9, 0.03], 0.05) == [False] * 4
    assert scoreboard.discoveries([0.01, 0.024, 0.9, 0.037], 0.05) == [True, True, False, True] and scoreboard.discoveries([], 0.05) == []


def test_so_many_seeds_reach_no_further_than_wanted():
    n = scoreboard.seeds_needed(0.04, 0.05)
    assert n == 5 and scoreboard.student_t(0.975, 4) * 0.04 / math.sqrt(5) <= 0.05 < scoreboard.student_t(0.975, 3) * 0.04 / math.sqrt(4)


def one_claim(monkeypatch, values, **limits):
    """The verdict on made-up numbers, of a claim that stands alone."""
    claim = claims.Claim("it", "it", "", "", samples=lambda content, task: values, **limits)
    monkeypatch.setattr(claims, "CLAIMS", (claim,))
    return claims.judge({"runs": made_up("lora", [1.0]), "grid": []})["it", "t"].says


def around(mean, spread=0.01):
    return [mean + spread * z for z in (-1.2, -0.5, 0.0, 0.1, 0.6, 1.0)]


@pytest.mark.parametrize("values, limits, expected", [
    (around(0.2), dict(line=0.0), "shown"), (around(-0.2), dict(line=0.0), "contradicted"), (around(0.001), dict(line=0.0), "open"),
    (around(-0.03), dict(line=-0.05), "shown"), (around(-0.07), dict(line=-0.05), "contradicted"), (around(-0.05), dict(line=-0.05), "open"),
    (around(0.001), dict(line=0.0, worth=0.05), "contradicted"), (around(0.03), dict(line=0.0, worth=0.05), "shown"), (around(0.03, 0.2), dict(line=0.0, worth=0.05), "open"),
    (around(1.0), dict(line=0.5, most=1.5), "shown"), (around(1.7), dict(line=0.5, most=1.5), "contradicted"), (around(0.3), dict(line=0.5, most=1.5), "contradicted"),
    (around(1.5), dict(line=0.5, most=1.5), "open"), (around(0.5), dict(line=0.5, most=1.5), "open"),
    ([0.3, 0.2], dict(line=0.0), "open"), ([0.3, math.nan, 0.3, 0.3], dict(line=0.0), "open"), ([0.2] * 3, dict(line=0.0), "shown"), ([0.0] * 3, dict(line=0.0), "open"),
    ([2.1], dict(line=2.0, exact=True), "shown"), ([2.0], dict(line=2.0, exact=True), "contradicted"),
])
def test_a_verdict_follows_from_the_numbers_alone(monkeypatch, values, limits, expected):
    assert one_claim(monkeypatch, values, **limits) == expected


def test_one_lucky_claim_among_many_empty_ones_is_not_believed(monkeypatch):
    dice = np.random.default_rng(3)
    lucky = around(0.01, 0.01)
    assert one_claim(monkeypatch, lucky, line=0.0) == "shown"
    others = [claims.Claim(f"{i}", "", "", "", samples=lambda content, task, values=list(dice.normal(size=6)): values, line=0.0) for i in range(60)]
    monkeypatch.setattr(claims, "CLAIMS", (*claims.CLAIMS, *others))
    assert claims.judge({"runs": made_up("lora", [1.0]), "grid": []})["it", "t"].says == "open"


def file_of(runs, grid=()):
    return {"about": {}, "search": [], "runs": runs, "grid": list(grid)}


def test_claims_on_made_up_runs_with_known_answers():
    curves = [[[3.0, 0.0], [1.0, 2.0]]] * 5, [[[3.0, 0.0], [1.2, 0.9]]] * 5
    runs = made_up("full", [1.0, 1.1, 1.2, 1.3, 1.4], curve=curves[0]) + made_up("lora", [1.2, 1.3, 1.4, 1.5, 1.6], curve=curves[1])
    runs += made_up("delta-lora", [1.21, 1.29, 1.41, 1.49, 1.6]) + made_up("vera", [1.5, 1.6, 1.7, 1.8, 1.9]) + made_up("lora", [1.21, 1.31, 1.41, 1.51, 1.61], base="nf4")
    found = claims.judge(file_of(runs))
    said = {key: verdict.says for (key, task), verdict in found.items()}
    assert said["learns_less"] == said["forgets_less"] == said["qlora_matches"] == "shown"
    assert said["vera_matches"] == "contradicted" and said["delta_lora_better"] == "contradicted"                        # what it may gain is less than the margin
    assert found["learns_less", "t"].mean == pytest.approx(0.2) and "adalora_better" not in said
    assert found["forgets_less", "t"].mean == pytest.approx(2.0 * 0.9 - 0.9)                                              # at a score of 1.2
    told = claims.report(file_of(runs))
    assert "the runs are not there" in told and told.count("contradicted") == 3                                          # and ten times fewer: of made-up counts that are equal


def test_forgetting_is_compared_where_both_have_learned_as_much():
    curve = [[3.0, 0.0], [2.0, 1.0], [2.2, 1.5], [1.0, 2.0]]
    assert [claims.forgotten_at(curve, level) for level in (2.5, 2.0, 1.6, 1.0)] == pytest.approx([0.5, 1.0, 1.75, 2.0])
    assert claims.forgotten_at(curve, 3.0) == 1.0 and math.isnan(claims.forgotten_at(curve, 0.9))
    quick, slow = [[3.0, 0.0], [1.0, 1.0], [0.5, 4.0]], [[3.0, 0.0], [2.0, 1.0], [1.0, 1.5]]
    runs = made_up("full", [0.5, 0.5], curve=[quick, quick]) + made_up("lora", [1.0, 1.0], curve=[slow, None])
    found = claims.forgets_less(LORA, Entry("full"))(file_of(runs), "t")
    assert found[0] == pytest.approx(1.0 - 1.5) and math.isnan(found[1])


def grid_of(entry, lowest, seeds=4, height=1.0):
    """A parabola in log10 of the rate, another lowest point for each seed."""
    return [{**entry.key, "task": "t", "seed": seed, "lr": lr, "costs": {}, "scores": {"bits_per_byte": height + (math.log10(lr) - lowest - seed / 100) ** 2}}
            for seed in range(seeds) for lr in (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)]


def test_the_best_rate_of_a_grid_is_the_bottom_of_its_curve():
    grid = grid_of(LORA, -2.2) + grid_of(Entry("full"), -3.1, height=0.7)
    found = claims.best(file_of([], grid), "t", LORA)
    assert {seed: rate for seed, (rate, _) in found.items()} == pytest.approx({seed: -2.2 + seed / 100 for seed in range(4)}) and found[0][1] == pytest.approx(1.04)      # as measured at 1e-2
    assert claims.rate_ratio(LORA, Entry("full"))(file_of([], grid), "t") == pytest.approx([0.9] * 4)
    assert claims.better_at_best(Entry("full"), LORA)(file_of([], grid), "t") == pytest.approx([0.3 + (0.2 - seed / 100) ** 2 - (0.1 - seed / 100) ** 2 for seed in range(4)])
    cliff = [record | {"scores": {"bits_per_byte": 4.5}} if record["lr"] > 0.02 else record for record in grid_of(LORA, -2.2)]
    assert claims.best(file_of([], cliff), "t", LORA)[0][1] == pytest.approx(1.04)                                # and not below every run
    edge = [record for record in grid if record["lr"] >= 1e-2]
    assert claims.best(file_of([], edge), "t", LORA)[0][0] == -2.0                                                # no parabola beyond the end
    assert claims.best(file_of([], grid), "other", LORA) == {}


def test_large_batches_cost_what_is_lost_beyond_what_the_other_loses():
    runs = made_up("full", [1.0, 1.1]) + made_up("lora", [1.2, 1.3]) + [run | {"rows": 64} for run in made_up("full", [1.5, 1.7]) + made_up("lora", [2.0, 2.2])]
    price = claims.batch_price(LORA, claims.LORA_LARGE, Entry("full"), claims.FULL_LARGE)
    assert price(file_of(runs), "t") == pytest.approx([0.8 - 0.5, 0.9 - 0.6]) and price(file_of(runs[:6]), "t") == []
    assert price(file_of([run for run in runs if not (run["seed"] == 0 and run["method"] == "full" and "rows" not in run)]), "t") == pytest.approx([0.9 - 0.6])   # by seed


def test_intruders_are_counted_and_go_with_forgetting_or_do_not():
    methods = ("full", "lora", "vera", "dora", "pissa", "adalora")
    runs = [run for place, method in enumerate(methods) for run in made_up(method, [1.0] * 3, forgotten=[float(place)] * 3, intruders=[place / 2, -place, 1.0])]
    assert claims.more_intruders(LORA, Entry("full"))(file_of(runs), "t") == [0.5, -1.0, 0.0]
    found = claims.goes_with_forgetting(file_of(runs), "t")
    assert found[:2] == pytest.approx([1.0, -1.0]) and math.isnan(found[2])
    assert claims.goes_with_forgetting(file_of(runs[:6]), "t") == []
    for run in runs:
        run["scores"]["intruders"] = None                          # not counted, or diverged
    assert all(math.isnan(value) for value in claims.goes_with_forgetting(file_of(runs), "t"))


def test_sooner_is_how_much_earlier_one_is_where_both_get():
    def with_curves(method, curves):
        return made_up(method, [1] * len(curves), curve=[[[score, 0.0] for score in curve] for curve in curves])

    lora = with_curves("lora", [[5, 4, 3, 2]] * 5)
    pissa = with_curves("pissa", [[5, 2, 1, 1], [5, 4, 3, 2], [9, 9, 9, 3], [9, 9, 9, 9], [9, 8, 2.5, 2.5]])
    found = sooner(Entry("pissa"), LORA)(file_of(lora + pissa), "t")
    assert found[:4] == pytest.approx([math.log2(3 / 1), 0.0, math.log2(2 / 3), 0.0], abs=1e-12)              # the fourth learns nothing, and neither waits
    assert found[4] == pytest.approx(math.log2(2.5 / 2))                              # LoRA comes to 2.5 half way between 3 and 2
    assert sooner(LORA, Entry("pissa"))(file_of(lora + pissa), "t")[:3] == pytest.approx([-value for value in found[:3]])
    pissa[-1]["scores"]["curve"] = None
    assert math.isnan(sooner(Entry("pissa"), LORA)(file_of(lora + pissa), "t")[-1])


def test_memory_is_all_bytes_of_the_other_over_ones_own():
    runs = made_up("lora", [1.0, 1.0]) + made_up("lora-fa", [1.0, 1.0])
    for run, size in zip(runs, (6, 6, 3, 3)):
        run["costs"] = {"weight_bytes": size, "gradient_bytes": 2 * size, "optimizer_bytes": 1, "alive_bytes": 1, "disk_bytes": 100}
    assert claims.memory(Entry("lora-fa"), LORA)(file_of(runs), "t") == [20 / 11] and claims.memory(VERA, LORA)(file_of(runs), "t") == []


ARMS = {"lora_matches_full": ("lora r=1", "full"), "rank_saturates": ("lora", "lora r=64"), "rslora_high_rank": ("rslora r=64", "lora r=64"), "vera_matches": ("vera", "lora"),
        "delta_lora_better": ("delta-lora", "lora"), "lora_drop_matches": ("lora-drop", "lora"), "adalora_better": ("adalora", "lora"), "adalora_as_many_trained": ("adalora r=5", "lora"), "qlora_matches": ("lora on nf4", "lora"),
        "dora_half_rank": ("dora r=4", "lora"), "loftq_better": ("loftq", "lora on nf4"), "learns_less": ("full", "lora"), "mlp_better": ("lora mlp", "lora r=10 attention"),
        "zero_b": ("lora", "lora A=0")}


@pytest.mark.parametrize("key", ARMS)
def test_the_arms_of_each_claim_are_the_right_way_round(key):
    """Better by 1 bit per byte is +1, whichever the two are."""
    lineup = {str(entry): entry for entry in [*entries(), *claims.LINEUP, claims.ATTENTION, claims.MLP, claims.ZERO_A]}
    good, bad = (lineup[name] for name in ARMS[key])
    runs = [{**entry.key, "task": "t", "seed": seed, "lr": 0.1, "costs": {}, "scores": {"bits_per_byte": score}} for entry, score in ((good, 1.0), (bad, 2.0)) for seed in range(5)]
    claim = next(claim for claim in claims.CLAIMS if claim.key == key)
    assert claim.samples(file_of(runs), "t") == [1.0] * 5 and claim.most is None
    assert (claim.line, claim.worth) == ((-claims.MARGIN, None) if "match" in key or key == "rank_saturates" else (0.0, claims.MARGIN))


def test_fewer_parameters_is_the_others_count_over_ones_own():
    runs = made_up("lora", [1.0, 1.0]) + made_up("vera", [1.0, 1.0])
    for run in runs[2:]:
        run["costs"] = {"trainable_parameters": 25}
    assert claims.fewer_parameters(VERA, LORA)(file_of(runs), "t") == [4.0, 4.0]


def test_claims_by_formula_hold():
    found = claims.judge(file_of(made_up("lora", [1.0])))
    assert all(found[key, "t"].says == "shown" for key in ("no_latency", "qlora_bits")) and len({claim.key for claim in claims.CLAIMS}) == len(claims.CLAIMS)


def test_a_table_has_a_row_for_each_and_is_best_first():
    """The seeds' own differences fall out: full is better by 0.2 in each."""
    runs = made_up("lora", [1.2, 1.3, 2.2, 1.7, 1.2], exact_match=[0.5] * 5, forgotten=[2.0] * 5) + made_up("full", [1.0, 1.1, 2.0, 1.5, 1.0]) + made_up("vera", [2.0, 2.2, 2.4, 2.6, 2.5])
    rows = scoreboard.table(runs, "t").splitlines()
    assert [row.split()[0] for row in rows] == ["method", "full", "lora", "vera"] and "+0.200 [+0.200, +0.200]" in rows[2] and "50 [50, 50]" in rows[2]
    assert "+2.00 [+2.00, +2.00]" in rows[2] and rows[0].split()[-3:] == ["alive", "file", "time"]
    assert "[" not in scoreboard.table([run for run in runs if run["seed"] < 2], "t")                               # too few seeds for an interval


def test_a_table_at_a_budget_has_its_entries_and_no_others():
    runs = made_up("lora", [1.2]) + made_up("full", [1.0]) + [run | {"rank": 3} for run in made_up("vera", [2.0]) + made_up("lora", [1.1])]
    rows = scoreboard.table(runs, "t", [LORA, Entry("vera", rank=3)]).splitlines()
    assert [row.split("  ")[0] for row in rows[1:]] == ["lora", "vera r=3"] and "+1.000" in rows[2]


def test_one_run_that_diverged_spoils_no_other_row():
    runs = made_up("lora", [1.2, None]) + made_up("full", [1.0, None]) + made_up("vera", [2.0, 2.2])
    rows = scoreboard.table(runs, "t").splitlines()
    assert "+1.000" in rows[1] and rows[1].startswith("vera") and rows[2].count("diverged") >= 1 and "nan" not in "".join(rows)
    assert "diverged" not in scoreboard.table(made_up("lora", [1.2], forgotten=[0.1]), "t")                                          # without full, too


def test_pictures_and_csv_show_every_entry(tmp_path):
    points = {"voice": [("lora", "fp32", 1000.0, (1.0, 0.9, 1.1)), ("vera", "nf4", 100, (1.4, 1.3, 1.5)), ("full", "fp32", 9000, (0.5,) * 3)]}
    axes = plots.quality(points).axes[0]
    assert [label.get_text().split() for label in axes.get_yticklabels()] == [["full", "9,000"], ["lora", "1,000"], ["vera", "100"]]
    assert [list(line.get_xdata()) for line in axes.lines if len(line.get_xdata()) == 2 and line.get_linestyle() == "-"] == [[0.9, 1.1], [1.3, 1.5], [0.5, 0.5]]
    same = [(name, "fp32", (1.0,) * 3, (0.5, 0.4, 0.6)) for name in ("lora", "vera", "dora", "pissa")]          # four on one spot: each must be readable
    figure = plots.forgetting({"v": [*same, ("lora", "nf4", (1.4,) * 3, (0.1,) * 3)], "all diverged": []})
    names = figure.axes[0].texts
    boxes = [Text.get_window_extent(name) for name in names]      # of an annotation it would hold the line too
    assert [name.get_text() for name in names] == ["lora", "vera", "dora", "pissa"]
    assert not any(one.overlaps(other) for place, one in enumerate(boxes) for other in boxes[:place])
    scoreboard.write_csv(made_up("lora", [1.2, 1.3]), tmp_path / "r.csv")
    lines = (tmp_path / "r.csv").read_text().splitlines()
    assert len(lines) == 3 and lines[0].startswith("method,base,rank,task,seed,lr,bits_per_byte")


def test_a_picture_of_verdicts_shows_each_in_margins_of_its_own_claim():
    rows = [("one", [("voice", (0.1, 0.05, 0.15), "shown"), ("code", (-9.0, -9.5, -8.5), "contradicted")], 0.0, 0.05), ("two", [("voice", (0.5, 0.2, 0.8), "open")], 0.5, 0.1)]
    axes = plots.verdicts(rows).axes[0]
    marks = {tuple(map(float, (line.get_xdata()[0], round(line.get_ydata()[0], 3)))): line for line in axes.lines if len(line.get_xdata()) == 1}
    at = sorted((x, line.get_marker(), line.get_color(), line.get_fillstyle()) for (x, _), line in marks.items())
    assert at == [(-4.0, "<", plots.VERMILION, "full"), (0.0, "o", "#888888", "none"), (2.0, "o", plots.GREEN, "full")]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["one", "two"] and sorted(text.get_text() for text in axes.texts) == ["code", "voice", "voice"]


def test_curves_of_rates_of_alphas_and_of_forgetting_are_the_numbers_that_were_given():
    axes = plots.rate_curves({"code": {"full": {1e-3: [2.0, 2.2], 1e-4: [2.5, 2.5]}, "lora": {1e-2: [2.1]}}}).axes[0]
    assert [list(container.lines[0].get_xdata()) for container in axes.containers] == [[1e-4, 1e-3], [1e-2]] and list(axes.containers[0].lines[0].get_ydata()) == [2.5, 2.1]
    axes = plots.alpha_grid({(2.0, 1e-3): 2.5, (2.0, 1e-2): 2.0, (8.0, 1e-3): 2.25, (8.0, 1e-2): math.nan}, "t").axes[0]
    assert sorted(text.get_text() for text in axes.texts) == ["2.00", "2.25", "2.50", "diverged"]
    framed = [(round(patch.get_x() + 0.46), round(patch.get_y() + 0.46)) for patch in axes.patches if not patch.get_fill()]
    assert framed == [(1, 0), (0, 1)]                              # the best rate of each alpha
    axes = plots.learning_and_forgetting({"code": {"full": [[3.0, 0.0], [2.0, 4.0]]}}).axes[0]
    assert list(axes.lines[0].get_xdata()) == [3.0, 2.0] and axes.get_xlim()[0] > axes.get_xlim()[1]
    axes = plots.room({"full": {8: [60.0, 62.0], 16: [120.0]}}, {8: 64.0, 16: 128.0}).axes[0]
    assert [list(line.get_ydata()) for line in axes.lines] == [[64.0, 128.0], [61.0, 120.0]]
    axes = plots.intruder_dots({"code": [("full", 0.1, 4.0), ("lora", 2.9, 5.0)]}).axes[0]
    assert axes.collections[0].get_offsets().tolist() == [[0.1, 4.0], [2.9, 5.0]] and [text.get_text() for text in axes.texts] == ["full", "lora"]


# The capacity curve and the film

def test_bits_held_are_none_before_and_all_after_learning_by_heart():
    model, facts = ml.load_base(), data.invented(4)
    assert capacity.BITS == pytest.approx(math.log2(14 * 18)) and capacity.bits_held(model, facts) < 4
    told = [f"\n{name} has a {thing}.\n".encode().ljust(64, b"\n")[:64] for name, thing in facts]
    batch = torch.tensor([list(row) for row in told])
    ml.finetune(model, ml.LoRA(8), lambda step: (batch[:, :-1], batch[:, 1:]), 60, 1e-2, progress=False)
    assert capacity.bits_held(model, facts) == pytest.approx(4 * capacity.BITS, abs=1.0)


def test_bits_held_by_hand():
    model, (fact,) = ml.load_base(), data.invented(1, seed=3)
    question, answer = f"\n{fact[0]} has a ".encode(), f"{fact[1]}.\n".encode()
    told = torch.tensor([list(question + answer)])
    ml.finetune(model, ml.LoRA(8), lambda step: (told[:, :-1], told[:, 1:]), 6, 1e-2, progress=False)      # half known
    logp = 0.0
    for end in range(len(answer)):
        logits = model(torch.tensor([list(question + answer[:end])]))[0, -1].double()
        logp += torch.log_softmax(logits, -1)[answer[end]].item()
    held = capacity.BITS + logp / math.log(2)
    assert 1 < held < capacity.BITS - 1 and capacity.bits_held(model, [fact]) == pytest.approx(held, abs=1e-3)


def test_the_film_ends_at_the_target_and_follows_the_budget(monkeypatch):
    def small():
        torch.manual_seed(0)
        return ml.TinyGPT(ml.GPTConfig(context=64, width=16, layers=4, heads=2))

    monkeypatch.setattr(capacity, "load_base", small)
    film = capacity.film(steps=20, frames=3)
    assert film["steps"][0] == 0 and film["steps"][-1] == 20 and len(film["names"]) == 24 and len(film["budget"]) == 20
    assert sum(film["kept"][0]) == 24 * 12 and sum(film["kept"][-1]) == film["budget"][-1] == 24 * 8
    five = capacity.film(steps=40, frames=5)
    totals = [sum(kept) for kept in five["kept"]]
    assert totals == sorted(totals, reverse=True) and len({*totals[:4]}) == 4 and totals[3] == totals[4]             # no two frames before the last are alike
    assert capacity.film(steps=20, frames=2)["kept"][-1] == film["kept"][-1]          # looking changes nothing, and the seed is all there is
    axes = plots.rank_film(film).axes
    assert len(axes) == 4


def test_the_picture_of_capacity_has_a_curve_for_each_number_of_facts_and_steps():
    records = [{"method": method, "rank": rank, "count": count, "steps": steps, "seed": seed, "parameters": 100 * rank, "bits": 10.0 * rank + seed, "remembered": remembered / 10 + seed / 100}
               for count, steps in ((128, 800), (512, 3200)) for method, rank, remembered in (("lora", 1, 2), ("lora", 2, 5), ("vera", 4, 9)) for seed in (0, 2)]
    left, right = plots.capacity(records).axes
    assert [list(line.get_ydata()) for line in left.lines] == [pytest.approx([21.0, 51.0])] * 2                 # the means
    assert [text.get_text() for text in left.get_legend().get_texts()] == ["128 facts, 800 steps", "512 facts, 3,200 steps"]
    assert [text.get_text() for text in right.get_legend().get_texts()] == ["lora", "vera"]
    assert sorted(y for dots in right.collections for _, y in dots.get_offsets())[0] == 0.1


def test_the_curve_runs_nothing_twice(monkeypatch):
    monkeypatch.setattr(capacity, "RANKS", (1,))
    monkeypatch.setattr(capacity, "OTHERS", (("full", None),))
    kept = []
    records = capacity.curve(8, 2, 1, say=quietly, keep=kept.append)
    assert records == kept and [(r["method"], r["parameters"] > 0) for r in records] == [("lora", True), ("full", True)]
    assert capacity.curve(8, 2, 1, done=records, say=quietly, keep=kept.append) == records and len(kept) == 2
    assert len(plots.capacity(records).axes) == 2


def test_facts_are_told_for_twice_as_long_until_that_brings_nothing(monkeypatch):
    told, answers = [], iter([10.0, 13.0, 15.0, 15.4, 99.0])
    monkeypatch.setattr(capacity, "finetune", lambda model, method, batches, steps, *rest, **options: told.append((steps, options["targets"], options["warmup"])))
    monkeypatch.setattr(capacity, "bits_held", lambda model, facts: next(answers))
    found = capacity.until_flat(claims.SMALL, 4, 0, 0.03, first=10, last=1000)
    where = ["blocks.2.mlp.up_proj", "blocks.2.mlp.down_proj"]
    assert told == [(10, where, 1), (20, where, 2), (40, where, 4), (80, where, 8)]                      # 15.4 is less than 3 % above 15
    assert found["steps"] == 80 and found["held"] == 15.4 and found["doublings"] == [[10, 10.0], [20, 13.0], [40, 15.0], [80, 15.4]]
    assert capacity.until_flat(Entry("full"), 4, 0, 0.001, first=10, last=10)["doublings"] == [[10, 99.0]]


def test_an_adapter_that_is_too_small_holds_its_facts_and_no_more():
    """By hand: bits held of as many facts, one arm less the other, a fact."""
    def grid(entry, count, held):
        return [{**entry.key, "task": f"{count} facts", "seed": seed, "lr": 0.1, "scores": {"bits_per_byte": None, "held": bits}, "costs": {}} for seed, bits in enumerate(held)]

    least, most = claims.FACTS[0], claims.FACTS[-1]
    content = {"runs": [], "grid": grid(claims.SMALL, least, [60.0, 61.0, 60.5]) + grid(claims.FULL, least, [61.0, 61.5, 61.5])
               + grid(claims.SMALL, most, [300.0, 310.0, 320.0]) + grid(claims.FULL, most, [1000.0, 1000.0, 1010.0])}
    found = claims.judge(content)
    assert set(found) >= {("capacity_below", "facts"), ("capacity_above", "facts")}
    assert found["capacity_below", "facts"].mean == pytest.approx(-2.5 / 3 / least) and found["capacity_below", "facts"].says == "shown"
    assert found["capacity_above", "facts"].mean == pytest.approx(2080 / 3 / most) and found["capacity_above", "facts"].says == "shown"


# What is published

def test_every_published_rate_follows_from_the_published_search(tmp_path, monkeypatch):
    """The search is replayed on its own records; none may be missing, and none may be over."""
    published, results = compare.read(compare.PUBLISHED), Results(tmp_path / "results.json", {"settings": {}, "cpu_seconds": 0})
    results.content["search"], used = published["search"], set()
    find = Results.find
    monkeypatch.setattr(Results, "find", lambda self, part, entry, **key: used.add((entry, *key.values())) or find(self, part, entry, **key))
    monkeypatch.setattr(Settings, "trial", lambda *_: pytest.fail("a search run is missing"))
    chosen = {(run["task"], Entry.of(run), run["lr"]) for run in published["runs"]}
    assert len(chosen) == len({(task, entry) for task, entry, _ in chosen})
    tasks = {name: compare.TASKS[name]() for name in {task for task, _, _ in chosen}}
    for name, entry, lr in chosen:
        assert compare.search(entry, name, tasks[name], Settings(), results) == lr
    assert len(used) == len(published["search"]) == 5 * len(chosen)


def test_the_published_fight_is_whole():
    """Of each task the same entries, each with the same seeds, of the length that is written down, at the costs that the formulas tell."""
    published = compare.read(compare.PUBLISHED)
    runs, about = published["runs"], published["about"]
    tasks = [name for name in about["tasks"] if name in compare.TASKS]                    # "64 facts" are of a grid
    lineups = [{*scoreboard.entries_of(runs, name)} for name in tasks]
    assert all(set(claims.FIRST[:4]) <= lineup for lineup in lineups) and about["command"] == "python benchmarks/fight.py" and about["cpu_seconds"] > 0
    parameters = {entry: trained(entry) for lineup in lineups for entry in lineup if entry.method != "lora-drop"}       # there the data decide
    seeds = {name: {run["seed"] for run in runs if run["task"] == name} for name in tasks}
    assert all(set(score_of(runs, name, entry)) >= seeds[name] & set(range(6)) == set(range(6)) for name, lineup in zip(tasks, lineups) for entry in lineup)
    for run in runs:
        entry, scores = Entry.of(run), run["scores"]
        assert scores["bits_per_byte"] is not None and ("exact_match" in scores) == (run["task"] in ("facts", "sums")) and len(scores["curve"]) == 11
        assert run["steps"] == Settings(about["settings"]["steps"][run["task"]]).of(entry).steps and ("intruders" in scores) == (entry.base == "fp32")
        assert run["costs"]["trainable_parameters"] == parameters.get(entry, run["costs"]["trainable_parameters"])
        assert run["costs"]["gradient_bytes"] == 4 * run["costs"]["trainable_parameters"]


def test_a_cost_that_one_of_the_runs_has_lost_is_left_out_of_the_table():
    """Such a file was once read and then broke the table by a KeyError."""
    content = compare.read(compare.PUBLISHED)
    task, first = content["runs"][0]["task"], Entry.of(content["runs"][0])
    damaged = list(scoreboard.of(content["runs"], task, first))[-1]
    del damaged["costs"]["optimizer_bytes"]
    assert "optimizer_bytes" not in scoreboard.costs_of(content["runs"], task, first) and scoreboard.costs_of(content["runs"], task, first)["alive_bytes"] > 0
    assert "–" in next(line for line in scoreboard.table(content["runs"], task).splitlines() if line.startswith(f"{first.method} "))
