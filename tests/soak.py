"""A long trial of what must never break. Not for CI: test_fuzz.py, test_resume.py and test_training.py do small versions of it.

    make soak     or     OMP_NUM_THREADS=1 python tests/soak.py [--only cycles,kills …] [--seed 0] [--cycles 1000 …]     the default counts are below

    cycles        adapt, train, save, load, merge, unload: random methods, shapes, types and seeds. A loaded model says what the saved one
                  said, bit for bit; a merged one what the unmerged one said, within its type's rounding; an unloaded one is the base,
                  bit for bit. Memory does not grow, and no file stays open.
    folders       damaged adapter folders      ) each is refused by one clear line and leaves the model as it was, or does what the whole one does;
    checkpoints   damaged checkpoints          ) no crash, no hang, and nothing in them is ever run
    results       damaged files of compare and of capacity
    kills         `python -m minilora finetune` killed (SIGKILL) at random moments, and gone on with: the adapter is the uninterrupted run's, bit for bit

Case k of a part depends on --seed and k alone: --from k --folders 1 runs it again. The exit code is 1 where anything failed, and the failures are listed.
"""

import argparse
import contextlib
import copy
import faulthandler
import gc
import hashlib
import io
import json
import os
import pickle
import random
import select
import signal
import statistics
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path

os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"] = "0"      # else torch keeps a kernel for every new shape, up to a thousand: no leak, but it looks like one

import torch

import minilora as ml
import minilora.__main__
import test_fuzz
import test_resume
from minilora import plots, storage
from minilora.evidence import capacity, claims, compare, scoreboard
from minilora.methods import METHODS

ROOT = Path(__file__).parent.parent
LIMIT = 120                                              # seconds of wall clock for one case: what takes longer hangs
COUNTS = {"cycles": 1000, "folders": 10_000, "checkpoints": 400, "results": 300, "kills": 100}


# Cycles

BASES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64, "nf4": torch.float32}
# How far a merged model's logits may be from the unmerged one's, in parts of the largest. Merging rounds W + dW once, and sums are made in
# another order: that is some hundred roundings, of 2^-53 and of 2^-24. In bfloat16 they are of 2^-9, and a model with large updates multiplies
# them without bound, merged or not: there both are held against the same model in float64.
TOLERANCE = {"float64": 1e-12, "float32": 2e-5, "nf4": 2e-5}
ROUGHER = 8                                              # in bfloat16: times as far from the float64 answer as the unmerged model is


def some_method(dice: random.Random, base: str, most: int) -> ml.Method:
    rank, alpha, dropout = dice.randint(1, most), dice.choice([1, 5.5, 8, 16]), dice.choice([0.0, 0.0, 0.2])
    makers = {
        "LoRA": lambda: ml.LoRA(rank, alpha, dropout, dice.random() < 0.5), "LoRA+": lambda: ml.LoRAPlus(rank, alpha, dropout, ratio=4),
        "LoRA-FA": lambda: ml.LoRAFA(rank, alpha, dropout, projection=dice.random() < 0.5),
        "VeRA": lambda: ml.VeRA(4 * rank, seed=dice.randrange(2**40), dropout=dropout),
        "LoRA-drop": lambda: ml.LoRADrop(rank, alpha, dropout, threshold=0.5, warmup_steps=1), "DoRA": lambda: ml.DoRA(rank, alpha, dropout),
        "AdaLoRA": lambda: ml.AdaLoRA(rank, max(1, rank // 2), alpha, dropout=dropout),
        "PiSSA": lambda: ml.PiSSA(rank, dropout=dropout), "QLoRA": lambda: ml.QLoRA(rank, alpha),
    }
    if base != "nf4":                                    # these want a dense W
        makers |= {"Delta-LoRA": lambda: ml.DeltaLoRA(rank, alpha, start_step=dice.randint(0, 1)), "LoftQ": lambda: ml.LoftQ(rank, alpha),
                   "QPiSSA": lambda: ml.QPiSSA(rank)}
    return makers[dice.choice(sorted(makers))]()


def cycle(dice: random.Random, folder: Path) -> str:
    kind, heads = dice.choice(sorted(BASES)), dice.choice([1, 2])
    config = ml.GPTConfig(dice.choice([16, 33, 64]), dice.choice([8, 13]), heads * dice.choice([4, 6, 10]), dice.randint(1, 3), heads)
    if kind == "bfloat16":                               # torch makes and keeps a kernel for each new shape of 16 bits: that would look like a leak
        config = ml.GPTConfig(33, 13, 20, config.layers, 2)
    seed, method = dice.randrange(2**31), some_method(dice, kind, most=4)

    def base() -> ml.TinyGPT:
        torch.manual_seed(seed)
        model = ml.TinyGPT(config).to(BASES[kind])
        return ml.quantize(model) if kind == "nf4" else model

    def batches(step: int) -> tuple[torch.Tensor, torch.Tensor]:
        ids = torch.randint(config.vocab_size, (2, config.context), generator=torch.Generator().manual_seed(seed + step))
        return ids[:, :-1], ids[:, 1:]

    model, ids = base(), batches(99)[0]
    targets = dice.choice([None, ["q_proj", "down_proj"], ["o_proj"], ["up_proj", "v_proj"]])
    ml.finetune(model, method, batches, 3, 0.05, seed % 1000, targets=targets, progress=False)
    model.eval()
    with torch.no_grad():
        said, plain = model(ids), base().eval()(ids)
        ml.save_adapter(model, folder)
        loaded = ml.load_adapter(base(), folder)
        assert torch.equal(loaded(ids), said), "loaded, it says something else than what was saved"
        merged = ml.merge(copy.deepcopy(model))(ids)
        if kind == "bfloat16":
            exact = copy.deepcopy(model).double()(ids)
            far, allowed = apart(merged, exact), ROUGHER * apart(said, exact)
        else:
            far, allowed = apart(merged, said), TOLERANCE[kind]
        moved = apart(plain, said)
        assert far <= allowed, f"merged, it is {far:.1e} away, and {allowed:.1e} is allowed ({kind}, {method})"
        assert moved > allowed or kind == "bfloat16", f"training moved the logits by {moved:.1e} only, so this shows nothing ({kind}, {method})"
        if next(iter(ml.adapters(loaded)))[1].no_way_back:
            return f"{type(method).__name__} on {kind}"
        for one in (ml.unload(model), ml.unload(loaded)):
            there = base()
            if isinstance(method, ml.QLoRA):             # W stays in four bits
                ml.quantize(there, targets) if kind != "nf4" else None
            assert equal(one.state_dict(), there.state_dict()), "unloaded, it is not the base"
    return f"{type(method).__name__} on {kind}"


def apart(one: torch.Tensor, other: torch.Tensor) -> float:
    return ((one.double() - other.double()).abs().max() / other.abs().max()).item()


def equal(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def resident() -> int:
    """Bytes of memory that this process holds."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


LEAK, OBJECTS = 20_000, 2     # bytes and Python objects a cycle that are let pass. A model that stays has 50,000 bytes at least, and hundreds of objects


def growth(memory: list[int], objects: list[int]) -> list[str]:
    """What is wrong with memory, and with the number of Python objects, over the second half of the cycles."""
    problems = []
    for what, values, allowed in (("memory", memory, LEAK), ("the number of Python objects", objects, OBJECTS)):
        second = values[len(values) // 2:]
        if len(second) >= 100:
            grown = slope(second)
            print(f"cycles: {what} grew by {grown:,.1f} a cycle over the second half, {second[0]:,} to {second[-1]:,}; {allowed:,} are let pass")
            problems += [f"{what} grew by {grown:,.1f} a cycle over the second half"] if grown > allowed else []
    return problems


def slope(values: list[int]) -> float:
    """The median of the slopes of all pairs (Theil and Sen): a step of the allocator does not count."""
    points = list(enumerate(values))[::max(1, len(values) // 200)]
    return statistics.median((b - a) / (j - i) for k, (i, a) in enumerate(points) for j, b in points[k + 1:])


# Damage

class Payload:
    """In a pickle that is loaded without care, this runs a command."""

    def __init__(self, sign: Path):
        self.sign = sign

    def __reduce__(self):
        return os.system, (f"touch '{self.sign}'",)


def harsh(dice: random.Random, config: bytes, weights: bytes, sign: Path) -> tuple[bytes, bytes]:
    """Damage that no accident does. sign: a file that would be there if the damage had been run."""
    nested = dice.choice([b"[", b'{"a":']) * dice.choice([50, 5000, 200_000])
    fields, header = json.loads(config), test_fuzz.parts(weights)[0]
    field, size = dice.choice(sorted(fields)), dice.choice([0, 1, 2**31, 2**62, 2**64 - 1])
    kind = dice.randrange(9)
    if kind == 0:
        return nested, weights
    if kind == 1:
        return config.replace(b": null", b": " + nested, 1), weights
    if kind == 2:
        return json.dumps(fields).replace(f'"{field}": ', f'"{field}": 1{"0" * dice.choice([20, 400, 5000])}, "{field}_": ').encode(), weights
    if kind == 3:
        return dice.choice([b"", b"null", b"[]", b"3", b'"x"', config.decode().encode("utf-16"), b"\xff" * 99, config * 2]), weights
    if kind == 4:
        return config, size.to_bytes(8, "little") + weights[8:]
    if kind == 5:
        return config, len(nested).to_bytes(8, "little") + nested + test_fuzz.parts(weights)[1]
    if kind == 6:
        return config, pickle.dumps(Payload(sign))
    if kind == 7:
        tensors = io.BytesIO()
        torch.save({"x": Payload(sign)}, tensors)
        return config, tensors.getvalue()
    key = dice.choice(sorted(key for key in header if key != "__metadata__"))
    header[key] |= {"shape": dice.choice([[2**40, 2**40], [-1, 3], [0], [3.5], "x", [10**30]])}
    return config, test_fuzz.joined(header, test_fuzz.parts(weights)[1])


def folder_case(dice: random.Random, folder: Path) -> str:
    folders, sign = whole_folders(), folder / "was-run"
    config, weights = test_fuzz.mutant(dice, folders) if dice.random() < 0.85 else harsh(dice, *dice.choice(folders), sign)
    came = test_fuzz.tried("", config, weights, folders, folder)
    assert not sign.exists(), "what was in the file was run"
    return came


WHOLE: dict[str, object] = {}                            # made once, before the processes part


def whole_folders() -> list[tuple[bytes, bytes]]:
    if "folders" not in WHOLE:
        with tempfile.TemporaryDirectory() as out:
            WHOLE["folders"] = test_fuzz.whole_folders(Path(out))
    return WHOLE["folders"]


def whole_checkpoints() -> dict[str, tuple[bytes, list[torch.Tensor]]]:
    """Of each method the checkpoint of a run that was stopped in its middle, and how the run ends that goes on from it."""
    if "checkpoints" not in WHOLE:
        found = {}
        for name, method in test_resume.METHODS.items():
            straight = test_resume.small()
            test_resume.run(straight, method)
            with tempfile.TemporaryDirectory() as out:
                with contextlib.suppress(KeyboardInterrupt):
                    test_resume.run(test_resume.small(), method, test_resume.stopping(7), checkpoint=Path(out) / "c.pt")
                found[name] = (Path(out) / "c.pt").read_bytes(), straight.state_dict()
        WHOLE["checkpoints"] = found
    return WHOLE["checkpoints"]


def checkpoint_case(dice: random.Random, folder: Path) -> str:
    whole, sign, path = whole_checkpoints(), folder / "was-run", folder / "c.pt"
    name = dice.choice(sorted(whole))
    path.write_bytes(damaged_checkpoint(dice, whole, name, sign))
    model = test_resume.small()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            test_resume.run(model, test_resume.METHODS[name], checkpoint=path)
    except (ValueError, OSError) as error:
        assert one_line(error) and "c.pt" in str(error), f"no clear line: {error!r}"
        assert equal(model.state_dict(), before), "refused, and the model has changed"
        came = "refused"
    else:
        assert equal(model.state_dict(), whole[name][1]), "it went on and ended elsewhere than the whole run"
        came = "went on"
    assert not sign.exists(), "what was in the file was run"
    return came


def damaged_checkpoint(dice: random.Random, whole: dict, name: str, sign: Path) -> bytes:
    content, kind, written = whole[name][0], dice.randrange(7), io.BytesIO()
    if kind == 0:
        return content[:dice.randrange(len(content))]
    if kind == 1:
        return test_fuzz.bytes_changed(dice, content)
    if kind == 2:
        return whole[dice.choice(sorted(whole))][0]
    if kind == 3:
        return sealed(pickle.dumps(Payload(sign)))
    tree = torch.load(io.BytesIO(content), weights_only=True)
    if kind == 4:
        tree[dice.choice(["state", "identity", "other"])] = Payload(sign)
    else:
        for _ in range(dice.randint(1, 2)):
            odd_branch(dice, tree)
    torch.save(tree, written)
    return sealed(written.getvalue()) if kind == 4 else written.getvalue() + content[-32:]


def sealed(content: bytes) -> bytes:
    """With the digest that belongs to it."""
    return content + hashlib.sha256(content).digest()


def odd_branch(dice: random.Random, tree: object) -> None:
    """Somewhere in a tree of dicts, lists and tensors an entry is another, is gone or has another name."""
    while True:
        inner = [key for key in (tree if isinstance(tree, dict) else range(len(tree))) if isinstance(tree[key], dict | list) and len(tree[key])]
        if not inner or dice.random() < 0.2:
            break
        tree = tree[dice.choice(inner)]
    key = dice.choice(list(tree) if isinstance(tree, dict) else range(len(tree)))
    there, kind = tree[key], dice.randrange(4)
    if isinstance(there, torch.Tensor) and kind < 2:
        tree[key] = dice.choice([there.double() + float("nan"), there.flatten()[:1], there[None], there.to(torch.complex64), there.new_zeros(3, 5)])
    elif kind == 2 and isinstance(tree, dict):
        tree.pop(key)
    elif kind == 3 and isinstance(tree, dict):
        tree[f"{key}s"] = tree.pop(key)
    else:
        tree[key] = dice.choice([value for value in test_fuzz.ODD if value != there])


def result_case(dice: random.Random, folder: Path) -> str:
    """A file of compare's or of capacity's: refused, or its tables can be made."""
    of_compare, path = dice.random() < 0.6, folder / "results.json"
    tree = some_results() if of_compare else json.loads((ROOT / "benchmarks" / "capacity.json").read_bytes())[:12]
    kind = dice.randrange(5)
    content = json.dumps(tree).encode()
    if kind == 0:
        content = content[:dice.randrange(len(content))]
    elif kind == 1:
        content = test_fuzz.bytes_changed(dice, content)
    elif kind == 2:
        content = dice.choice([b"", b"[" * 100_000, b'{"about":' * 5000, b"null", b"[3]", b"{}", b"\xff\xfe",
                               b'{"about": {}, "search": [], "runs": [], "grid": []}', content.replace(b"0.", b"1e999", 1)])
    else:
        for _ in range(dice.randint(1, 2)):
            odd_branch(dice, tree)
        content = json.dumps(tree).encode()
    path.write_bytes(content)
    try:
        if of_compare:
            read = compare.read(path)
            for task in dict.fromkeys(run["task"] for run in read["runs"]):
                scoreboard.table(read["runs"], task)
            claims.report(read)
            compare.Results(path, read["about"])
        else:
            plots.capacity(capacity.read(path))
    except (ValueError, OSError) as error:
        assert one_line(error) and str(path) in str(error), f"no clear line: {error!r}"
        return "refused"
    return "read"


def some_results() -> dict:
    """Of the published runs those of a few methods, so that a case is quick."""
    if "results" not in WHOLE:
        WHOLE["results"] = compare.read(compare.PUBLISHED)
    whole = WHOLE["results"]
    kept = {part: [run for run in whole[part] if run["method"] in ("full", "lora", "dora") and run["seed"] in (0, 1, 1000)]
            for part in ("search", "runs", "grid")}
    return copy.deepcopy({"about": whole["about"]} | kept)


def one_line(error: BaseException) -> bool:
    return 0 < len(str(error)) and "\n" not in str(error)


# Kills

STEPS = 40


def finetune(method: str, base: Path, text: Path, out: Path) -> tuple[int, io.TextIOWrapper]:
    """`python -m minilora finetune …` as a process, and what it prints. It is forked from this one, which has imported torch: a new Python would spend
    most of its time on that, and most kills would hit it there. Its random state is none that any other run began with."""
    words = ["finetune", "--text", text, "--base", base, "--method", method, "--rank", 2, "--steps", STEPS, "--lr", 0.01, "--out", out]
    read, write = os.pipe()
    process = os.fork()
    if process:
        os.close(write)
        return process, os.fdopen(read)
    code = 1
    try:
        for stream in (1, 2):
            os.dup2(write, stream)
        sys.stdout = sys.stderr = open(1, "w", buffering=1, closefd=False)
        torch.seed()
        code = minilora.__main__.main([*map(str, words)])
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def ended(process: int, said: io.TextIOWrapper) -> tuple[int, str]:
    """Its exit code, below 0 where a signal ended it, and what else it has printed."""
    with said:
        rest = said.read()
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), rest


def straight(name: str, base: Path, text: Path, folder: Path) -> tuple[dict[str, bytes], float]:
    """What an uninterrupted run leaves, and how long it takes after its first word."""
    if name not in WHOLE:
        process, said = finetune(name, base, text, folder / "straight")
        said.readline()
        began = time.monotonic()
        code, rest = ended(process, said)
        assert code == 0, f"{name}: the uninterrupted run ended with {code}: {rest}"
        WHOLE[name] = left_by(folder / "straight"), time.monotonic() - began
    return WHOLE[name]


def left_by(out: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(out.iterdir()) if file.name != "loss.png" and not file.name.startswith(".")}


def kill_case(dice: random.Random, folder: Path) -> str:
    """Killed again and again, each time at a moment between its first word and what would be its end, until it has ended all the same."""
    name = dice.choice(sorted(METHODS))
    base, text, kills = folder.parent / "base.safetensors", folder.parent / "text.txt", []
    if not base.exists():
        torch.manual_seed(0)
        storage.save_model(ml.TinyGPT(ml.GPTConfig(context=32, width=16, layers=2, heads=2)), base)
        text.write_text("The cat sat on the mat, and the dog sat on the log. " * 60)
    expected, seconds = straight(name, base, text, folder)
    while not kills or dice.random() < 0.25:             # mostly once
        process, said = finetune(name, base, text, folder / "out")
        said.readline()
        time.sleep(dice.random() * seconds)
        os.kill(process, signal.SIGKILL)
        code, _ = ended(process, said)
        there = {file.name for file in (folder / "out").iterdir()}
        if "history.json" in there:
            break
        kills.append("with a checkpoint" if "checkpoint.pt" in there else "before the first checkpoint")
    if not kills and code == 0:
        return "ended before it was killed"
    code, rest = ended(*finetune(name, base, text, folder / "out"))
    if "history.json" in there:
        assert code == 2 and "finished run" in rest, f"{name}: {rest}"
    else:
        assert code == 0, f"{name}, killed {', '.join(kills)}, ended with {code}: {rest}"
        assert ("resumed at step" in rest) == (kills[-1] == "with a checkpoint"), f"{name}, killed {kills}: {rest}"
    found = left_by(folder / "out")
    assert found.keys() == expected.keys(), f"{name}: {sorted(found)} and not {sorted(expected)}"
    differ = [file for file in found if found[file] != expected[file]]
    assert not differ, f"{name}, killed {', '.join(kills)}: not the uninterrupted run's: {', '.join(differ)}"
    return f"{name}, killed {', '.join(kills) or 'at its very end'}"


# The trial itself

CASES: dict[str, Callable[[random.Random, Path], str]] = {"cycles": cycle, "folders": folder_case, "checkpoints": checkpoint_case,
                                                           "results": result_case, "kills": kill_case}


def worker(part: str, numbers: range, seed: int, pipe: int, shared: Path) -> None:
    """In a process of its own: one line of JSON a case."""
    gc.freeze()                                          # what is there already is not looked through again and again
    with os.fdopen(pipe, "w") as out:
        for number in numbers:
            with tempfile.TemporaryDirectory(dir=shared) as folder:
                failed, came = "", ""
                try:
                    came = CASES[part](random.Random(f"{part} {seed} {number}"), Path(folder))
                except Exception as error:
                    failed = f"{type(error).__name__}: {error}"[:2000]
            gc.collect()
            print(json.dumps([number, came, failed, resident(), len(gc.get_objects()), len(os.listdir("/proc/self/fd"))]), file=out, flush=True)


def trial(part: str, start: int, count: int, seed: int) -> list[str]:
    """All cases of a part. A process that dies or hangs is a failure of its case, and the next one goes on behind it."""
    failures, came, memory, objects, files, began = [], Counter(), [], [], [], time.monotonic()
    if part in ("folders", "checkpoints"):
        {"folders": whole_folders, "checkpoints": whole_checkpoints}[part]()
    number, end = start, start + count
    with tempfile.TemporaryDirectory() as shared:
        while number < end:
            read, write = os.pipe()
            child = os.fork()
            if not child:
                os.close(read)
                faulthandler.enable()
                worker(part, range(number, end), seed, write, Path(shared))
                os._exit(0)
            os.close(write)
            with os.fdopen(read) as lines:
                while number < end:
                    if not select.select([lines], [], [], LIMIT)[0]:
                        os.kill(child, signal.SIGKILL)
                        failures.append(f"{part} {number}: hangs, more than {LIMIT} s")
                        break
                    line = lines.readline()
                    if not line:
                        failures.append(f"{part} {number}: the process died")
                        break
                    number, what, failed, bytes_, there, open_ = json.loads(line)
                    memory.append(bytes_)
                    objects.append(there)
                    files.append(open_)
                    came[what] += 1
                    if failed:
                        failures.append(f"{part} {number}: {failed}")
                        print(failures[-1], flush=True)
                    number += 1
                    if (number - start) % max(1, count // 10) == 0:
                        print(f"{part}: {number - start:,} of {count:,} in {time.monotonic() - began:.0f} s, {len(failures)} failed, "
                              f"{bytes_ / 2**20:.0f} MiB, {open_} files open", flush=True)
            status = os.waitpid(child, 0)[1]
            if number < end:
                print(f"{failures[-1]} (wait status {status})", flush=True)
                number += 1
    if part == "cycles":
        left_open = [f"{files[-1] - files[0]} files stay open"] if files and files[-1] > files[0] else []
        failures += [f"cycles: {problem}" for problem in growth(memory, objects) + left_open]
    print(f"{part}: {count - len(failures):,} of {count:,} well, from {start}, seed {seed}, in {time.monotonic() - began:.0f} s: "
          f"{', '.join(f'{n:,} {what}' for what, n in sorted(came.items()) if what)}", flush=True)
    return failures


def main() -> int:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for part, count in COUNTS.items():
        arguments.add_argument(f"--{part}", type=int, default=count, metavar="N", help=f"default: {count:,}")
    arguments.add_argument("--only", default=",".join(COUNTS), metavar="A,B", help="parts, with commas between them")
    arguments.add_argument("--from", dest="start", type=int, default=0, metavar="K", help="the first case")
    arguments.add_argument("--seed", type=int, default=0)
    given = arguments.parse_args()
    torch.set_num_threads(1)
    failures = []
    for part in given.only.split(","):
        if part not in COUNTS:
            arguments.error(f"{part!r} is none of {', '.join(COUNTS)}")
        failures += trial(part, given.start, getattr(given, part), given.seed)
    print("\n".join([f"{len(failures)} failed:", *failures]) if failures else "all well")
    return bool(failures)


if __name__ == "__main__":
    sys.exit(main())
