"""The tiny world: its entropy by closed form, by Monte-Carlo and by counting; its tasks; and files of one's own."""

import ast
import hashlib
import math
import random
import re
import shutil
import statistics
import subprocess
import time

import numpy as np
import pytest
import torch

from minilora import data

PLAIN, LOUD = data.World(), data.World(data.loudly)


def documents(world, count, held_out=False, seed=0):
    rng = random.Random(seed)
    return [world.document(rng, held_out) for _ in range(count)]


def derivations(text, voice):
    """How many ways there are to derive a whole document: a second parser, by backtracking over regular expressions.

    Each kind becomes one pattern in which a slot is an alternation and a repeated name a back-reference; every assignment of
    words to slots that gives the text back is counted.
    """
    count = 0
    for kind in data.KINDS:
        slots = dict(re.findall(r"\{(\w+):(\w+)\}", kind))
        pattern, seen = "", set()
        for part in re.split(r"(\{[^}]+\})", kind):
            name, _, rest = part.strip("{}").partition(":")
            if not part.startswith("{"):
                pattern += re.escape(voice(part))
            elif rest:
                pattern += f"(?P<{name}>" + "|".join(map(voice, data.SLOTS[rest])) + ")"
                seen.add(name)
            elif "." in name:
                pattern += "(?:" + "|".join(voice(w) for w in ("she", "he", "She", "He")) + ")"
            else:
                pattern += f"(?P={name})"
        match = re.fullmatch(pattern, text)
        if match:
            words = [[w for w in data.SLOTS[slot] if voice(w) == match[name]] for name, slot in slots.items()]
            told = match.groupdict()
            distinct = all(told[a] != told[b] for a in slots for b in slots if a < b and slots[a] == slots[b])
            count += math.prod(map(len, words)) * distinct
    return count


def test_entropy_is_log_kinds_plus_the_slots_logs():
    # 20 people, 16 places, 18 things, 14 looks, 16 foods; a second person is one of 19, a third food one of 14
    choices = [20 * 16 * 19 * 14 * 18] * 2 + [20 * 16 * 15 * 14, 20 * 16 * 15 * 19, 20 * 18 * 19 * 17, 14 * 18 * 16 * 13 * 17 * 15, 20 * 14 * 18 * 16]
    assert PLAIN.entropy == pytest.approx(math.log(7) + sum(map(math.log, choices)) / 7, abs=1e-12)


def test_entropy_agrees_with_monte_carlo():
    # both parts together follow the grammar: nine tenths and one tenth, as the hash splits them
    rng = random.Random(1)
    share = 26 / 256
    surprise = []
    for _ in range(4000):
        document = PLAIN.document(rng, held_out=rng.random() < share)
        surprise.append(-math.log(sum(PLAIN.readings(document))))
    error = statistics.stdev(surprise) / math.sqrt(len(surprise))
    assert abs(statistics.mean(surprise) - PLAIN.entropy) < 4 * error


@pytest.mark.parametrize("world", [PLAIN, LOUD], ids=["plain", "loud"])
def test_every_document_has_exactly_one_derivation(world):
    for document in documents(world, 500):
        assert derivations(document, world.voice) == 1
        assert len(list(world.readings(document))) == 1


def test_what_the_grammar_does_not_say_has_no_reading():
    good = "Anna has a ball and Ben has a kite. They trade. Now Anna has the kite.\n"
    assert len(list(PLAIN.readings(good))) == 1
    for bad in (good.replace("Now Anna", "Now Ben"), good.replace("kite", "ball"), good[:-1] + " \n", good.replace("Ben", "Anna"), "x" + good):
        assert not list(PLAIN.readings(bad)), bad


def test_pronouns_agree():
    assert list(PLAIN.readings("Anna likes tea and milk, but she"))
    assert not list(PLAIN.readings("Anna likes tea and milk, but he"))


def test_the_probabilities_of_what_may_come_next_add_up():
    symbols = [chr(i) for i in range(128)]
    for document in documents(PLAIN, 20):
        for cut in (0, 1, 5, len(document) // 2, len(document) - 1):
            start = document[:cut]
            ahead = sum(sum(PLAIN.readings(start + symbol)) for symbol in symbols)
            assert ahead == pytest.approx(sum(PLAIN.readings(start)) if start else 1.0, rel=1e-9)


def test_no_two_words_of_a_slot_begin_alike():
    assert all(len({word[0] for word in words}) == len(words) for words in data.SLOTS.values())
    assert len({word for words in data.SLOTS.values() for word in words}) == sum(map(len, data.SLOTS.values()))


def test_documents_are_whole_lines_that_fit_the_context():
    for document in documents(PLAIN, 2000):
        assert document.endswith("\n") and document.count("\n") == 1 and len(document) <= 128


def test_train_and_held_out_documents_are_disjoint():
    train, held_out = set(documents(PLAIN, 5000)), set(documents(PLAIN, 1000, held_out=True))
    assert not train & held_out
    assert not any(map(data.is_held_out, train)) and all(map(data.is_held_out, held_out))
    windows = data.world().held_out(129)
    shown = {line for row in windows.tolist() for line in bytes(row[1:]).decode().splitlines(keepends=True)[:-1]}
    assert shown and all(map(data.is_held_out, shown))


def test_the_other_voice_can_be_undone_and_shares_the_floor():
    told = {data.loudly(d): d for d in documents(PLAIN, 3000)}
    assert len(told) == len(set(documents(PLAIN, 3000)))
    for loud, plain in list(told.items())[:200]:
        assert sum(LOUD.readings(loud)) == pytest.approx(sum(PLAIN.readings(plain)), rel=1e-12)
    assert data.voice().floor(data.voice().held_out(65)) == pytest.approx(data.world().floor(data.world().held_out(65)), rel=1e-9)


def test_the_voices_held_out_documents_are_held_out_in_the_world_too():
    plain = {data.loudly(d) for d in documents(PLAIN, 5000)}
    assert not plain & set(documents(LOUD, 500, held_out=True))


def test_the_floor_of_whole_documents_is_their_log_probability():
    text = "\n" + "".join(documents(PLAIN, 3))
    nats = -sum(math.log(sum(PLAIN.readings(d))) for d in text[1:].splitlines(keepends=True))
    assert PLAIN.floor(torch.tensor([list(text.encode())])) == pytest.approx(nats / (len(text) - 1), rel=1e-12)


def test_the_floor_refuses_bytes_of_another_world():
    with pytest.raises(ValueError, match="no document"):
        PLAIN.floor(data.voice().held_out(65))


def test_batches_are_a_pure_function_of_the_step():
    one, two, other = data.world().batches(4, 64, seed=1), data.world().batches(4, 64, seed=1), data.world().batches(4, 64, seed=2)
    two(7)
    x, y = one(3)
    assert x.shape == y.shape == (4, 64) and x.dtype == torch.int64
    assert torch.equal(x, two(3)[0]) and torch.equal(y, two(3)[1])
    assert torch.equal(x[:, 1:], y[:, :-1])
    assert not torch.equal(x, one(4)[0]) and not torch.equal(x, other(3)[0])


def test_facts_ask_in_a_wording_that_was_not_trained():
    task = data.facts(20)
    rng = random.Random(0)
    trained = b"".join(task.window(rng, 2000) for _ in range(30)).decode()
    assert len(task.questions) == 10
    for question, answer in task.questions:
        name = question.split()[2]
        assert question.strip() not in trained
        assert f"{name} has a {answer.strip()}" in trained and f"The {answer.strip().rstrip('.')} belongs to {name}." in trained


def test_sums_are_right_and_both_orders_are_on_one_side():
    task = data.sums()
    rng = random.Random(0)
    trained = set(b"".join(task.window(rng, 5000)[1:].rpartition(b"\n")[0] + b"\n" for _ in range(40)).decode().split())
    asked = {(q + a).strip() for q, a in task.questions}
    assert not trained & asked and len(asked) > 800
    for line in trained | asked:
        a, b, total = map(int, re.split(r"[+=]", line))
        assert a + b == total
        assert not ((f"{b}+{a}={total}" in trained) and line in asked)


def test_a_text_is_split_by_position_between_characters(tmp_path):
    content = "三人行，必有我师焉。" * 200
    (tmp_path / "lunyu.txt").write_text(content, encoding="utf-8")
    task = data.text(tmp_path / "lunyu.txt")
    encoded = content.encode()
    windows = task.held_out(65)
    tail = bytes(windows[0].tolist()).decode(errors="ignore")
    assert encoded.endswith(encoded[len(encoded) * 9 // 10 + 3:]) and tail and windows.shape[1] == 65
    assert task.prompt and "\N{REPLACEMENT CHARACTER}" not in task.prompt


def test_training_windows_never_reach_the_held_out_part():
    content = b"a" * 9000 + b"b" * 1000
    task = data.split_text(content, "ab")
    rng = random.Random(0)
    assert all(set(task.window(rng, 129)) == {ord("a")} for _ in range(500))
    assert set(task.held_out(129).flatten().tolist()) == {ord("b")}


def test_overlap_counts_what_stands_in_both_parts():
    rng = random.Random(0)
    noise = bytes(rng.randrange(97, 123) for _ in range(10_000))
    assert data.overlap(noise) == 0.0
    repeated = noise[:1000] * 10
    assert data.overlap(repeated) == 1.0


@pytest.mark.parametrize("content, says", [
    (b"", "empty"), (b" \n\t ", "only white space"), (b"short", "too short: 5 bytes"),
    (b"\xff\xfe" * 2000, "not UTF-8"), (b"text\0" * 1000, "binary"), (("é" * 3000).encode("latin-1"), "not UTF-8"),
], ids=["empty", "blank", "short", "garbage", "zeros", "latin-1"])
def test_files_that_are_no_text_are_refused_by_name(tmp_path, content, says):
    (tmp_path / "file.txt").write_bytes(content)
    with pytest.raises(ValueError, match=f"file.txt.*{says}"):
        data.text(tmp_path / "file.txt")


def test_missing_files_and_folders_are_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match="nothing.txt.*cannot be read"):
        data.text(tmp_path / "nothing.txt")
    with pytest.raises(ValueError, match="cannot be read"):
        data.text(tmp_path)


def test_prose_is_the_same_every_time_and_has_no_binary_in_it():
    text = data.prose()
    assert text == data.prose() and len(text) > 500_000 and b"\0" not in text


WRITTEN = {
    "chinese": "三人行，必有我师焉。择其善者而从之，其不善者而改之。\n", "comments": "# 计算损失\nloss = x  # 返回模型的输出\n", "taiwan": "今天天氣很好，我們一起去公園。\n",
    "japanese": "これは日本語のテキストです。今日はとても良い天気ですね。\n", "korean": "오늘은 날씨가 아주 좋습니다. 우리는 공원에 갔다.\n",
    "russian": "Все счастливые семьи похожи друг на друга.\n", "french": "Il était une fois, à l'école, où les élèves déjà âgés rêvaient.\n",
    "german": "Die Straße führt über größere Brücken.\n", "spanish": "El niño comió mañana, ¿cómo está? Sí, señor.\n", "polish": "Jeśli mała żółta łódź płynie, będzie późno.\n",
    "quotes": "\N{LEFT DOUBLE QUOTATION MARK}It\N{RIGHT SINGLE QUOTATION MARK}s a test\N{RIGHT DOUBLE QUOTATION MARK} \N{EM DASH} he said.\n",
}


@pytest.mark.parametrize("who, encoding", [
    ("chinese", "GBK"), ("comments", "GBK"), ("chinese", "UTF-16"), ("chinese", "UTF-16LE"), ("french", "UTF-16"), ("french", "UTF-16BE"), ("quotes", "UTF-32"),
    ("taiwan", "BIG5"), ("japanese", "SHIFT_JIS"), ("japanese", "EUC-JP"), ("korean", "EUC-KR"), ("russian", "WINDOWS-1251"), ("russian", "KOI8-R"),
    ("french", "ISO-8859-1"), ("german", "ISO-8859-1"), ("spanish", "ISO-8859-1"), ("polish", "ISO-8859-2"), ("polish", "WINDOWS-1250"), ("quotes", "WINDOWS-1252"),
])
def test_a_text_in_another_encoding_is_told_which_and_the_line_that_converts_it(tmp_path, who, encoding):
    content = ("Some English first.\n" + WRITTEN[who] * 60).encode(encoding)
    (tmp_path / "my text.txt").write_bytes(content)
    with pytest.raises(ValueError) as error:
        data.text(tmp_path / "my text.txt")
    said = str(error.value)
    assert f"it seems, {encoding};" in said and "\n" not in said
    line = said.partition("to convert it: ")[2]
    assert line == f"iconv -f {encoding} -t UTF-8 '{tmp_path}/my text.txt' > 'my text-utf8.txt'"
    if shutil.which("iconv"):
        subprocess.run(line, shell=True, check=True, cwd=tmp_path)
        assert (tmp_path / "my text-utf8.txt").read_text(encoding="utf-8") == content.decode(encoding)


@pytest.mark.parametrize("content, says", [
    (("naïve façade, déjà vu. " * 200).encode() + b"\xff\xfe" + ("naïve façade. " * 50).encode(), "UTF-8 text, but damaged .byte 5400 is 0xff.*iconv -c"),
    (random.Random(0).randbytes(9000), "a binary file"), (bytes(b | 128 for b in random.Random(0).randbytes(9000)), "not UTF-8 text .byte 2 is 0xac.; convert it to UTF-8 first"),
], ids=["damaged", "binary", "unknown"])
def test_what_is_in_no_known_encoding_gets_no_wrong_advice(tmp_path, content, says):
    (tmp_path / "file.txt").write_bytes(content)
    with pytest.raises(ValueError, match=says):
        data.text(tmp_path / "file.txt")


def test_a_byte_order_mark_is_no_text(tmp_path):
    (tmp_path / "plain.txt").write_text("A line of text.\n" * 200, encoding="utf-8")
    (tmp_path / "marked.txt").write_text("A line of text.\n" * 200, encoding="utf-8-sig")
    plain, marked = data.text(tmp_path / "plain.txt"), data.text(tmp_path / "marked.txt")
    assert plain.fingerprint == marked.fingerprint and torch.equal(plain.batches(2, 32)(0)[0], marked.batches(2, 32)(0)[0])
    (tmp_path / "only.txt").write_bytes(b"\xef\xbb\xbf")
    with pytest.raises(ValueError, match="empty"):
        data.text(tmp_path / "only.txt")


@pytest.mark.parametrize("character", ["é", "语", "\N{GRINNING FACE}"])
def test_a_file_cut_inside_its_last_character_loses_that_alone(tmp_path, character):
    whole = ("some text of its own\n" * 120).encode()
    for kept in range(1, len(character.encode())):
        (tmp_path / "cut.txt").write_bytes(whole + character.encode()[:kept])
        with pytest.warns(UserWarning, match="cut.txt: the file ends inside a character"):
            assert data.text(tmp_path / "cut.txt").fingerprint == data.split_text(whole, "whole").fingerprint


def test_a_texts_name_seeds_nothing_and_the_shipped_bases_batches_are_still_what_they_were(monkeypatch):
    content = b"".join(b"Line %d.\n" % i for i in range(500))
    one, other = data.split_text(content, "a").batches(2, 32), data.split_text(content, "b").batches(2, 32)
    assert torch.equal(one(5)[0], other(5)[0]) and one.fingerprint == other.fingerprint
    monkeypatch.setattr(data, "prose", lambda: content)
    rng = random.Random("prose/0/7")
    assert [row.tolist() for row in data.pretraining(32)(7)[0][18:]] == [list(data.split_text(content, "c").window(rng, 33)[:-1]) for _ in range(6)]


@pytest.mark.parametrize("length", [2000, 2001, 2003, 2007, 30_011])
@pytest.mark.parametrize("kind", ["words", "letters", "twice", "two letters", "one letter"])
def test_overlap_is_what_looking_for_each_snippet_says(length, kind):
    rng = random.Random(length)
    letters = bytes(rng.randrange(97, 123) for _ in range(length))
    content = {"words": b" ".join(rng.choice([b"low", b"rank", b"of", b"the", b"matrix"]) for _ in range(length)), "letters": letters,
               "twice": letters[:length // 2] * 2 + b"!" * 9, "two letters": bytes(97 + b % 2 for b in letters), "one letter": b"a" * length}[kind][:length]
    cut = len(content) * 9 // 10
    train, rest = content[:cut], content[cut:]
    snippets = [rest[i:i + 32] for i in range(0, len(rest) - 31, max(32, len(rest) // 256))]
    assert data.overlap(content) == sum(snippet in train for snippet in snippets) / len(snippets)


def test_overlap_finds_what_stands_at_the_very_ends_of_the_training_part():
    letters = bytes(random.Random(3).randrange(97, 123) for _ in range(9000))
    for shift in range(8):
        content = letters + letters[:32] + b"#" * 436 + letters[9000 - 32 - shift:9000 - shift] + b"#" * (500 - shift)
        assert data.overlap(content[:10_000]) >= 1 / 31


def test_overlap_of_a_long_text_takes_no_more_than_a_look():
    """40 MB; looking for 256 snippets one by one read them 256 times. Text that is all alike is the worst there is."""
    noise = np.random.default_rng(0).integers(97, 123, 40_000_000, dtype=np.uint8).tobytes()
    for content, share in ((noise, 0.0), (b"0," * 20_000_000, 1.0), (b"0," * 18_000_000 + b"0,1," * 1_000_000, 0.0)):
        began = time.process_time()
        assert data.overlap(content) == share
        assert time.process_time() - began < 2


def test_code_is_held_out_by_module_and_has_neither_comments_nor_docstrings():
    task, sources = data.code(), dict(data._sources())
    assert len(sources) > 100 and "ast" not in sources and not any(b"#" in source.splitlines()[0] for source in sources.values() if source.strip())
    held, chosen = ({window for window in map(bytes, windows.tolist())} for windows in (task.held_out(65), task.choosing().held_out(65)))
    assert len(held) == len(chosen) == 128 and not held & chosen
    train = {bytes(row) for step in range(60) for row in task.batches(16, 64)(step)[0].tolist()}
    whose = {name: min(2, hashlib.sha256(name.encode()).digest()[0] // 26) for name in sources}
    parts = [b"".join(source for name, source in sources.items() if whose[name] == part) for part in range(3)]
    assert all(len(part) > 50_000 for part in parts) and len(parts[2]) > 5 * len(parts[0])
    assert all(window in parts[0] for window in held) and all(window in parts[1] for window in chosen) and all(row in parts[2] for row in train)
    for name, source in sources.items():                               # what is left is Python, and says nothing in prose
        tree = ast.parse(source)
        assert not any(isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) for node in ast.walk(tree)), name
