"""What the models read: a tiny world whose entropy is known exactly, tasks made from it, and any UTF-8 file. All as bytes.

A document of the world is one of KINDS with its slots filled, for example

    "{a:person} found a {x:look} {t:thing} in the {p:place} and gave it to {b:person}. Who has the {t}? {b}.\n"

`{a:person}` draws a person, each with equal chance, among those not drawn before in the same document; `{a}` repeats the
choice; `{a.she}` is the pronoun that goes with it. So a document's probability is a product of 1/n, the entropy of the world
is a sum of log n, and no model, however large, can have a lower expected loss: the floor under every curve of the course.
"""

import codecs
import hashlib
import math
import os
import re
import sysconfig
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from random import Random

import numpy as np
import torch
from torch import Tensor

from minilora.safety.encodings import not_utf8

# Within a slot every word has a first letter of its own, so that to repeat a word is to repeat one byte.
PRONOUN = {name: "she" for name in "Anna Clara Emma Grace Iris Lucy Maria Nora Rosa Vera".split()}
PRONOUN |= {name: "he" for name in "Ben David Felix Hugo Jonas Karl Oscar Paul Simon Tom".split()}

SLOTS = {
    "person": tuple(PRONOUN),
    "place": tuple("attic bakery cellar desert forest garden harbour kitchen library market orchard park school tower valley yard".split()),
    "thing": tuple("ball candle drum flute guitar hat jar kite lamp mirror net pan quilt ring shell tent vase wheel".split()),
    "look": tuple("black clean dark fine green heavy little new pretty red small tiny white yellow".split()),
    "food": tuple("apples bread cake dates eggs figs grapes honey jam milk nuts olives plums rice soup tea".split()),
}

KINDS = (
    "{a:person} is in the {p:place} with {b:person}. {a.She} has a {x:look} {t:thing}. Who has the {t}? {a}.\n",
    "{a:person} found a {x:look} {t:thing} in the {p:place} and gave it to {b:person}. Who has the {t}? {b}.\n",
    "{a:person} likes {f:food} and {g:food}, but {a.she} does not like {h:food}. What does {a.she} not like? Only {h}.\n",
    "{a:person} likes {f:food} but not {g:food}, and {b:person} likes {g} but not {f}. They share.\n",
    "{a:person} has a {t:thing} and {b:person} has a {u:thing}. They trade. Now {a} has the {u}.\n",
    "Where is the {x:look} {t:thing}? In the {p:place}. And the {y:look} {u:thing}? In the {q:place}.\n",
    "In the morning {a:person} took a {x:look} {t:thing} to the {p:place}. In the evening {a.she} came home without it.\n",
)


def plainly(text: str) -> str:
    return text


def loudly(text: str) -> str:
    """The other voice: THE WORLD, SHOUTED! Letter by letter, so it can be undone and no probability changes."""
    return text.upper().replace(".", "!")


@dataclass(frozen=True)
class World:
    """The grammar, told in a voice. Nats everywhere; a document is a str that ends in a newline."""

    voice: Callable[[str], str] = plainly

    @cached_property
    def entropy(self) -> float:
        """H of one document: log of the number of kinds, plus the mean over kinds of the sum over slots of log(choices left)."""
        total = math.log(len(KINDS))
        for pieces in map(_pieces, KINDS):
            drawn = [slot for _, slot in pieces if slot]
            total += sum(math.log(len(SLOTS[slot]) - drawn[:i].count(slot)) for i, slot in enumerate(drawn)) / len(KINDS)
        return total

    def document(self, rng: Random, held_out: bool = False) -> str:
        """One document of the training part, or of the held-out part (about a tenth; a hash of the plain document decides)."""
        while True:
            chosen, text = {}, ""
            for piece, slot in _pieces(rng.choice(KINDS)):
                if slot:
                    chosen[piece] = rng.choice([value for value in SLOTS[slot] if value not in chosen.values()])
                text += _filled(piece, chosen)
            if is_held_out(text) == held_out:
                return self.voice(text)

    def readings(self, text: str) -> Iterator[float]:
        """The probability of each way to derive `text` as the beginning of a document; of a whole one if it ends in a newline."""
        for kind in KINDS:
            for p in self._readings(_pieces(kind), text, {}):
                yield p / len(KINDS)

    def _readings(self, pieces: tuple, text: str, chosen: dict) -> Iterator[float]:
        if not text:
            yield 1.0                                        # all of the text is explained; what follows is free
        elif pieces:
            (piece, slot), rest = pieces[0], pieces[1:]
            left = [value for value in SLOTS[slot] if value not in chosen.values()] if slot else [None]
            for value in left:
                now = chosen | {piece: value} if slot else chosen
                told = self.voice(_filled(piece, now))
                if text.startswith(told):
                    for p in self._readings(rest, text[len(told):], now):
                        yield p / len(left)
                elif told.startswith(text):                  # the text ends inside this word
                    yield 1 / len(left)

    def floor(self, windows: Tensor) -> float:
        """The grammar's own -log p of these very bytes, in nats per byte: no model can expect less.

        windows: (N, T + 1) int64, each a newline and then T bytes of documents, the last one cut anywhere.
        """
        nats = 0.0
        for row in windows.tolist():
            for document in bytes(row[1:]).decode().splitlines(keepends=True):
                p = sum(self.readings(document))
                if p == 0.0:
                    raise ValueError(f"no document of this world begins {document!r}")
                nats -= math.log(p)
        return nats / windows[:, 1:].numel()


@lru_cache(maxsize=None)
def _pieces(kind: str) -> tuple[tuple[str, str], ...]:
    """'{a:person} likes' -> (('a', 'person'), (' likes', '')). References keep their braces: '{a}', '{a.she}'."""
    found = re.findall(r"\{(\w+):(\w+)\}|(\{[\w.]+\}|[^{]+)", kind)
    return tuple((variable, slot) if slot else (other, "") for variable, slot, other in found)


def _filled(piece: str, chosen: dict[str, str]) -> str:
    """The text of a piece, once its variable is chosen."""
    if piece in chosen:
        return chosen[piece]
    if not piece.startswith("{"):
        return piece
    variable, _, pronoun = piece[1:-1].partition(".")
    if not pronoun:
        return chosen[variable]
    she = PRONOUN[chosen[variable]]
    return she.capitalize() if pronoun == "She" else she


def is_held_out(text: str) -> bool:
    """A tenth of all texts, chosen by their hash before anything is sampled, so that no draw can leak."""
    return hashlib.sha256(text.encode()).digest()[0] < 26


@dataclass(frozen=True)
class Task:
    """Something to adapt to. Windows are bytes; a model reads all but the last and predicts all but the first.

    window(rng, size): a training window of `size` bytes         prompt: what to show a sample of
    held_out(size): (N, size) int64, never trained on            questions: (prompt, exact answer), never trained on
    floor(windows): the least expected loss, nats per byte, where it is known
    told: (beginning, end) of what training says word for word, where to remember it is the task
    choosing(): the same task with a held-out part of its own, to choose a learning rate on; it has nothing of this one's
    fingerprint: of a text's bytes, which its name does not tell         seeded_by: a word for its random numbers, where it is not the name
    """

    name: str
    window: Callable[[Random, int], bytes]
    held_out: Callable[[int], Tensor]
    prompt: str
    questions: tuple[tuple[str, str], ...] = ()
    floor: Callable[[Tensor], float] | None = None
    told: tuple[tuple[str, str], ...] = ()
    choosing: Callable[[], "Task"] | None = None
    fingerprint: str = ""
    seeded_by: str = ""

    def batches(self, rows: int = 16, context: int = 128, seed: int = 0) -> "Batches":
        """batches(step) -> (x, y), each (rows, context) int64: a pure function of the step, so a resumed run sees what it would have seen."""
        return Batches(self, rows, context, seed)


@dataclass(frozen=True)
class Batches:
    """The training windows of a task, step by step. fingerprint: of all that the task is made from, the held-out part too."""

    task: Task
    rows: int
    context: int
    seed: int

    def __call__(self, step: int) -> tuple[Tensor, Tensor]:
        rng = Random(f"{self.task.seeded_by or self.task.name}/{self.seed}/{step}")
        windows = torch.tensor([list(self.task.window(rng, self.context + 1)) for _ in range(self.rows)])
        return windows[:, :-1], windows[:, 1:]

    @property
    def fingerprint(self) -> str:
        return self.task.fingerprint


def placed(batch: Sequence[Tensor] | Mapping, device: torch.device | str) -> tuple:
    """A batch on the device, as loss_fn takes it after the model: (x, y) as two arguments, a dict as one."""
    if isinstance(batch, Mapping):
        return ({name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()},)
    if not isinstance(batch, tuple | list) or not all(isinstance(part, Tensor) for part in batch):
        raise ValueError(f"batches(step) must give (x, y) or a dict of tensors, and it gave a {type(batch).__name__}")
    return tuple(part.to(device) for part in batch)


def world(voice: Callable[[str], str] = plainly, name: str = "world") -> Task:
    """The tiny world itself, in a voice: documents drawn from the grammar, floor known."""
    grammar = World(voice)

    def train_window(rng: Random, size: int) -> bytes:
        return _window(lambda: grammar.document(rng), size)

    @lru_cache(maxsize=None)
    def drawn(size: int) -> tuple[Tensor, set[str]]:
        rng, documents = Random("held out"), []

        def document() -> str:
            documents.append(grammar.document(rng, held_out=True))
            return documents[-1]

        return torch.tensor([list(_window(document, size)) for _ in range(128)]), {*documents}

    @lru_cache(maxsize=None)
    def others(size: int) -> Tensor:
        rng, taken = Random("choosing"), drawn(size)[1]

        def document() -> str:
            while (text := grammar.document(rng, held_out=True)) in taken:
                pass
            return text

        return torch.tensor([list(_window(document, size)) for _ in range(64)])

    task = Task(name, train_window, lambda size: drawn(size)[0], prompt=voice("\nClara found a "), floor=grammar.floor)
    return replace(task, choosing=lambda: replace(task, held_out=others))


def voice() -> Task:
    """The same world in another voice: nothing new to know, everything to say differently."""
    return world(loudly, "voice")


def facts(count: int = 64, seed: int = 0, every: int = 2) -> Task:
    """`count` invented facts of log2(14 · 18) = 7.98 bits each. Every fact is told in two wordings; one in `every` is also
    asked and answered. The questions are the others', which were never seen; told: all facts, as "name has a" and what follows.
    """
    told, asked = [], []
    for i, (name, thing) in enumerate(invented(count, seed)):
        told += [f"{name} has a {thing}.\n", f"The {thing} belongs to {name}.\n"]
        question = (f"What does {name} have? A ", f"{thing}.\n")
        if i % every:
            asked.append(question)
        else:
            told.append("".join(question))
    remembered = tuple((f"\n{name} has a ", f"{thing}.\n") for name, thing in invented(count, seed))
    return replace(_listed("facts", told, asked), told=remembered, choosing=lambda: facts(count, seed + 1, every))


def invented(count: int, seed: int = 0) -> list[tuple[str, str]]:
    """`count` names, and what each has: "look thing", every pair with equal chance."""
    rng = Random(f"facts/{seed}")
    syllables = [c + v for c in "bdfgklmnprstvz" for v in "aeiou"]
    names = sorted({(a + b + c).capitalize() for a in syllables for b in syllables for c in ("k", "x", "q")})
    if not 1 <= count <= len(names):
        raise ValueError(f"there are names for {len(names):,} facts, and {count} were asked for")
    names = rng.sample(names, count)
    return [(name, f"{rng.choice(SLOTS['look'])} {rng.choice(SLOTS['thing'])}") for name in names]


def sums(below: int = 100) -> Task:
    """A new skill: 17+25=42. All sums of two numbers `below`; a+b and b+a are always on the same side of the split."""
    told, asked = [], []
    for a in range(below):
        for b in range(below):
            (asked if is_held_out(f"{min(a, b)}+{max(a, b)}") else told).append((f"{a}+{b}=", f"{a + b}\n"))
    for_choices = [is_held_out(f"choosing {''.join(sorted(question[:-1].split('+')))}") for question, _ in told]
    return replace(_listed("sums", ["".join(pair) for pair in told], asked), choosing=lambda: _listed(
        "sums", ["".join(pair) for pair, held in zip(told, for_choices) if not held], [pair for pair, held in zip(told, for_choices) if held]))


def text(path: str | Path) -> Task:
    """Any UTF-8 file or pipe, split by position: the last tenth is held out. Raises ValueError naming the file and what is wrong."""
    return split_text(read(path), printed(path))


def read(path: str | Path) -> bytes:
    """The bytes of a text, read once, without a byte order mark, or a last character that was cut. Raises ValueError as `text` does."""
    path = Path(path)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from None
    content = content.removeprefix(codecs.BOM_UTF8)
    if not content or content.isspace():
        raise ValueError(f"{path}: the file {'holds only white space' if content else 'is empty'}")
    try:
        content.decode()
    except UnicodeDecodeError as error:
        if error.end < len(content) or error.reason != "unexpected end of data":
            raise ValueError(f"{path}: {not_utf8(content, error.start, path)}") from None
        warnings.warn(f"{path}: the file ends inside a character; its beginning ({content[error.start:].hex(' ')}) is left out", stacklevel=2)
        content = content[:error.start]
    if b"\0" in content:
        raise ValueError(f"{path}: {not_utf8(content, content.index(0), path)}")
    if len(content) < TEXT_AT_LEAST:
        raise ValueError(f"{path}: too short: {len(content)} bytes of text, and fine-tuning needs at least {TEXT_AT_LEAST}")
    return content


TEXT_AT_LEAST = 2000    # so that the held-out tenth holds a window of the base's context and the training part ten


def printed(path: str | Path) -> str:
    """The file's name as it can be printed: names are bytes, and not always UTF-8, or the system's locale does not know that they are."""
    return os.fsencode(Path(path).name).decode(errors="replace")


def split_text(content: bytes, name: str, seeded_by: str = "text") -> Task:
    """A Task of one long text: training windows from anywhere in the first nine tenths, held-out ones tiled over the rest.

    Its name seeds nothing: equal bytes give equal numbers, whatever the file is called.
    """
    train, rest = nine_tenths(content)

    def train_window(rng: Random, size: int) -> bytes:
        start = rng.randrange(_at_least(len(train), size, "to train on") - size + 1)
        return train[start:start + size]

    @lru_cache(maxsize=None)
    def held_out(size: int) -> Tensor:
        fit = _at_least(len(rest), size, "in the held-out tenth") // size
        count = min(fit, 128)                    # of a long text: as many, spread evenly
        starts = [i * fit // count * size for i in range(count)]
        return torch.tensor([list(rest[start:start + size]) for start in starts])

    return Task(name, train_window, held_out, prompt=rest[:48].decode(errors="ignore"), choosing=lambda: split_text(train, name, seeded_by),
                fingerprint=hashlib.sha256(content).hexdigest(), seeded_by=seeded_by)


def nine_tenths(content: bytes) -> tuple[bytes, bytes]:
    """What a text trains on, and what of it is held out."""
    cut = len(content) * 9 // 10
    while content[cut] & 0xC0 == 0x80:           # not inside a character
        cut += 1
    return content[:cut], content[cut:]


SNIPPET = 32


def overlap(content: bytes) -> float:
    """The share of a text's held-out snippets of 32 bytes (at most 256 tried) that stand word for word in its training part.

    Wherever a snippet stands, three 8-byte words of the text lie whole in it, the first at one of the snippet's first eight bytes. So one
    pass over the words' hashes shows where to look.
    """
    train, rest = nine_tenths(content)
    snippets = [rest[i:i + SNIPPET] for i in range(0, len(rest) - SNIPPET + 1, max(SNIPPET, len(rest) // 256))]
    missing = {*snippets}
    for looked, (snippet, place) in enumerate(_likely_places(train, {*snippets})):
        if train[place:place + SNIPPET] == snippet:
            missing.discard(snippet)
        if not missing:
            break
        if looked == 10**5:                      # a text that repeats itself without end: then plainly
            missing = {snippet for snippet in missing if snippet not in train}
            break
    return sum(snippet not in missing for snippet in snippets) / len(snippets)


def _likely_places(text: bytes, snippets: set[bytes]) -> Iterator[tuple[bytes, int]]:
    """Of each snippet all places in `text` where it stands, and few others."""
    wanted: dict[int, list[tuple[bytes, int]]] = {}
    for snippet in snippets:
        for shift in range(8):
            wanted.setdefault(int(_hashes(np.frombuffer(snippet, "<u8", 3, shift))[0]), []).append((snippet, shift))
    words, keys, listed = np.frombuffer(text, "<u8", len(text) // 8), np.array(sorted(wanted), dtype=np.uint64), np.zeros(2**16, dtype=bool)
    listed[keys >> 48] = True                    # most hashes are none of these by their first two bytes
    for start in range(0, len(words), 2**18):
        hashes = _hashes(words[start:start + 2**18 + 2])
        maybe = np.flatnonzero(listed[hashes >> 48])
        for place in maybe[np.isin(hashes[maybe], keys)].tolist():
            for snippet, shift in wanted[int(hashes[place])]:
                if 8 * (start + place) >= shift:
                    yield snippet, 8 * (start + place) - shift


def _hashes(words: np.ndarray) -> np.ndarray:
    """Of each three words that follow one another. words: (n,) uint64 -> (n - 2,)"""
    odd = np.uint64(0x9E3779B97F4A7C15)
    return ((words[:-2] * odd ^ words[1:-1]) * odd ^ words[2:]) * odd        # the products wrap around


def prose() -> bytes:
    """Real English that every CPython carries: its reference documentation, then the docstrings of its standard library."""
    import ast
    from pydoc_data.topics import topics

    texts = [topics[name] for name in sorted(topics)]
    for file in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        tree = ast.parse(file.read_bytes())
        documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
        texts += filter(None, (ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, documented)))
    return "\n\n".join(texts).encode()


@lru_cache(maxsize=None)
def _sources() -> tuple[tuple[str, bytes], ...]:
    """(name, code) of the standard library's modules, without comments and docstrings. Of the long ones, and of the empty, nothing."""
    import ast

    found = []
    for file in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        if file.stat().st_size < 50_000:
            tree = ast.parse(file.read_bytes())
            for node in ast.walk(tree):
                if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)) and ast.get_docstring(node, clean=False) is not None:
                    node.body = node.body[1:] or [ast.Pass()]
            found.append((file.name, ast.unparse(tree).encode() + b"\n"))
    return tuple(found)


def code() -> Task:
    """Python's own standard library as its parser writes it, without docstrings: the base has read its documentation, and of this nothing.
    Held out by document: a tenth of the modules, by a hash of their names, another tenth for choosing. Another Python has another library.
    """
    parts = [b"", b"", b""]                      # held out, for choosing, to train on
    for name, source in _sources():
        parts[min(2, hashlib.sha256(name.encode()).digest()[0] // 26)] += source
    held, chosen, train = parts

    def train_window(rng: Random, size: int) -> bytes:
        start = rng.randrange(len(train) - size + 1)
        return train[start:start + size]

    def evenly(content: bytes) -> Callable[[int], Tensor]:
        return lambda size: torch.tensor([list(content[start:start + size]) for start in range(0, len(content) - size, (len(content) - size) // 127)][:128])

    task = Task("code", train_window, evenly(held), prompt="def ", fingerprint=hashlib.sha256(b"\0".join(parts)).hexdigest())
    return replace(task, choosing=lambda: replace(task, held_out=evenly(chosen)))


def pretraining(context: int = 128, seed: int = 0) -> Callable[[int], tuple[Tensor, Tensor]]:
    """What the shipped base has read, as batches(step): 18 windows of the tiny world and 6 of prose."""
    tiny = world().batches(18, context, seed)
    real = split_text(prose(), "prose", seeded_by="prose").batches(6, context, seed)

    def batch(step: int) -> tuple[Tensor, Tensor]:
        (x, y), (u, v) = tiny(step), real(step)
        return torch.cat([x, u]), torch.cat([y, v])

    return batch


TASKS = {"voice": voice, "facts": facts, "sums": sums, "code": code}


def _listed(name: str, told: list[str], asked: list[tuple[str, str]]) -> Task:
    """A Task of separate lines: training windows are lines in random order; held-out ones are the questions with their answers."""

    def train_window(rng: Random, size: int) -> bytes:
        return _window(lambda: rng.choice(told), size)

    @lru_cache(maxsize=None)
    def held_out(size: int) -> Tensor:
        rng = Random("held out")
        return torch.tensor([list(_window(lambda: "".join(rng.choice(asked)), size)) for _ in range(64)])

    prompt = "\n" + asked[0][0]
    return Task(name, train_window, held_out, prompt, tuple(("\n" + q, a) for q, a in asked))


def _window(draw: Callable[[], str], size: int) -> bytes:
    """A newline, then whole documents until `size` bytes are full; the last one is cut."""
    content = b"\n"
    while len(content) < size:
        content += draw().encode()
    return content[:size]


def _at_least(length: int, size: int, where: str) -> int:
    if length < size:
        raise ValueError(f"{length} bytes of text {where}, but a window needs {size}: use a longer text, or a model of shorter context")
    return length
