"""minilora beside PEFT and bitsandbytes, the two interleaved in one run: every number of README.md beside this file.

    make bench        or     OMP_NUM_THREADS=1 python benchmarks/bench.py [--only steps,nf4 …] [--methods dora,vera]

    steps     a training step of every method, ours over PEFT's, at three widths and two batches; and the bytes alive for backward
    imports   `import minilora` over `import torch`, in fresh processes
    disk      an adapter saved and loaded again
    nf4       four bits: to quantize, to dequantize, a layer; and the most memory that quantizing takes
    serving   a batch whose rows use several adapters at once, beside one adapter after another and merging before each
    growth    how a step's time grows with rank, layers and length, as a slope in logarithms; beside it that of its FLOPs

Times are CPU time of this process, which has one thread. On a quiet machine that is the wall clock; on a busy one the wall clock also holds
the turns of other programs. (Where the disk is waited for, that is not in it: so of `disk` the wall clock is noted too.)
Ours and theirs take turns step by step, and who goes first alternates. Of each pair one ratio; noted are quartiles of all.

What is measured is in runs/bench.json at once, so that a run that was stopped goes on; once whole it goes to bench.json and the page is written.
Needs requirements-peers.txt.
"""

import argparse
import copy
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr
from dataclasses import dataclass, field
from importlib.metadata import version
from io import StringIO
from pathlib import Path

with redirect_stderr(StringIO()):                         # bitsandbytes says that an optional package is missing
    import bitsandbytes as bnb
import peft
import torch
from peft.optimizers import create_lorafa_optimizer, create_loraplus_optimizer
from torch import Tensor, nn

import bench_page
import minilora as ml
import serving as server
from minilora import storage
from minilora.evidence.ledger import bytes_alive, flops

HERE = Path(__file__).parent
PARTIAL, PUBLISHED = Path("runs/bench.json"), HERE / "bench.json"
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"]
LR = 1e-4
SIZES = {128: (4, 15), 512: (2, 5), 1024: (1, 5)}       # width: blocks, rounds
BATCHES = (2, 8)                                          # rows of 128 bytes
WARM = 1                                                  # the first round is not counted
Record = dict[str, object]


# Contenders: the same TinyGPT, adapted by us and by PEFT on every linear layer of the blocks

LORA = peft.LoraConfig(r=8, lora_alpha=8)


@dataclass(frozen=True)
class Pair:
    """A method of ours, and PEFT's configuration of the same one. theirs_in_nf4: PEFT's sits on bitsandbytes' Linear4bit."""

    ours: ml.Method
    theirs: peft.PeftConfig = field(default_factory=lambda: LORA)
    theirs_in_nf4: bool = False
    frozen_A: bool = False
    optimizer: Callable[[peft.PeftModel], torch.optim.Optimizer] | None = None      # PEFT's own; else AdamW


PAIRS = {
    "lora": Pair(ml.LoRA(8)),
    "lora-dropout": Pair(ml.LoRA(8, dropout=0.1), peft.LoraConfig(r=8, lora_alpha=8, lora_dropout=0.1)),
    "rslora": Pair(ml.LoRA(8, rslora=True), peft.LoraConfig(r=8, lora_alpha=8, use_rslora=True)),
    "lora-plus": Pair(ml.LoRAPlus(8), optimizer=lambda model: create_loraplus_optimizer(model, torch.optim.AdamW, lr=LR, loraplus_lr_ratio=16)),
    "lora-fa": Pair(ml.LoRAFA(8), frozen_A=True),
    "lora-fa-projected": Pair(ml.LoRAFA(8, projection=True), optimizer=lambda model: create_lorafa_optimizer(model, r=8, lora_alpha=8, lr=LR)),
    "vera": Pair(ml.VeRA(256), peft.VeraConfig(r=256)),
    "adalora": Pair(ml.AdaLoRA(12, 8, total_steps=10_000),
                    peft.AdaLoraConfig(init_r=12, target_r=8, lora_alpha=8, orth_reg_weight=0.1, total_step=10_000)),
    "dora": Pair(ml.DoRA(8), peft.LoraConfig(r=8, lora_alpha=8, use_dora=True)),
    "pissa": Pair(ml.PiSSA(8), peft.LoraConfig(r=8, lora_alpha=8, init_lora_weights="pissa")),
    "qlora": Pair(ml.QLoRA(8), peft.LoraConfig(r=8, lora_alpha=16, lora_dropout=0.1), theirs_in_nf4=True),
    "loftq": Pair(ml.LoftQ(8, double=True), theirs_in_nf4=True),
    "delta-lora": Pair(ml.DeltaLoRA(8)),
    "lora-drop": Pair(ml.LoRADrop(8, warmup_steps=1)),    # PEFT has not the last two: they stand beside its LoRA
}


def base(width: int, layers: int, context: int = 128) -> ml.TinyGPT:
    torch.manual_seed(0)
    return ml.TinyGPT(ml.GPTConfig(width=width, layers=layers, context=context))


def in_four_bits(model: nn.Module) -> nn.Module:
    """The linear layers of the blocks as bitsandbytes'."""
    for block in model.blocks:
        for part in (block.attention, block.mlp):
            for name, linear in list(part.named_children()):
                there = bnb.nn.Linear4bit(linear.in_features, linear.out_features, compute_dtype=torch.float32, quant_type="nf4")
                there.weight = bnb.nn.Params4bit(linear.weight.data.clone(), requires_grad=False, quant_type="nf4")
                there.bias = linear.bias
                setattr(part, name, there.to("cpu"))
    return model


def adapted_by_peft(pair: Pair, model: nn.Module) -> peft.PeftModel:
    config = copy.deepcopy(pair.theirs)
    config.target_modules = set(TARGETS)
    model = peft.get_peft_model(in_four_bits(model) if pair.theirs_in_nf4 else model, config)
    for name, parameter in model.named_parameters() if pair.frozen_A else ():
        if "lora_A" in name:
            parameter.requires_grad_(False)
    return model


class Ours:
    """A model of ours in training; step() is the loop of adapter.py's Method."""

    def __init__(self, method: ml.Method, model: ml.TinyGPT):
        self.method, self.model = method, ml.adapt(model, method, TARGETS)
        if isinstance(method, ml.LoRADrop):
            self.method.prepare(self.model, lambda step: (torch.zeros(1, 8, dtype=torch.long),) * 2, ml.next_byte_loss, LR)
        self.optimizer = torch.optim.AdamW(method.parameter_groups(self.model, LR), lr=LR)
        self.done = 0

    def step(self, ids: Tensor) -> None:
        self.optimizer.zero_grad()
        (ml.next_byte_loss(self.model, ids[:, :-1], ids[:, 1:]) + self.method.penalty(self.model)).backward()
        self.method.before_step(self.model, self.done)
        self.optimizer.step()
        self.method.after_step(self.model, self.done)
        self.done += 1


class Theirs:
    """PEFT's in training, as its documentation has it."""

    def __init__(self, pair: Pair, model: ml.TinyGPT):
        self.config, self.model = pair.theirs, adapted_by_peft(pair, model)
        make = pair.optimizer or (lambda model: torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=LR))
        self.optimizer, self.done = make(self.model), 0

    def step(self, ids: Tensor) -> None:
        self.optimizer.zero_grad()
        loss = ml.next_byte_loss(self.model, ids[:, :-1], ids[:, 1:])
        if self.config.peft_type == "ADALORA":            # PEFT adds it by itself to outputs that have a loss; here as it writes it
            grams = [p @ p.T if "lora_A" in name else p.T @ p for name, p in self.model.named_parameters() if "lora_A" in name or "lora_B" in name]
            norms = [torch.norm(gram - torch.eye(*gram.shape), p="fro") for gram in grams]
            loss = loss + self.config.orth_reg_weight * sum(norms) / len(norms)
        loss.backward()
        self.optimizer.step()
        if self.config.peft_type == "ADALORA":
            self.model.base_model.update_and_allocate(self.done)
        self.done += 1


# Clocks

def cpu(action: Callable[[], object]) -> float:
    began = time.process_time()
    action()
    return time.process_time() - began


def quartiles(values: list[float]) -> list[float]:
    return [float(f"{value:.4g}") for value in statistics.quantiles(values, n=4, method="inclusive")]


def ratios(ours: object, theirs: object, rounds: int, clock: Callable[[object], float] = cpu) -> list[float]:
    """Quartiles of clock(ours) / clock(theirs)."""
    found = []
    for turn in range(WARM + rounds):
        took = {one: clock(one) for one in ((ours, theirs) if turn % 2 else (theirs, ours))}
        if turn >= WARM:
            found.append(took[ours] / took[theirs])
    return quartiles(found)


def batch(rows: int, length: int = 128) -> Tensor:
    return torch.randint(256, (rows, length + 1), generator=torch.Generator().manual_seed(0))


# Stages. Each yields what it measures, one record after the other: its name as a dict, and how to measure it

Cell = tuple[dict[str, object], Callable[[], Record]]


def steps(names: list[str]) -> Iterator[Cell]:
    for width, (layers, rounds) in SIZES.items():
        for name in names:
            for rows in BATCHES:
                yield {"method": name, "width": width, "layers": layers, "rows": rows}, lambda: one_step(name, width, layers, rows, rounds)


def one_step(name: str, width: int, layers: int, rows: int, rounds: int) -> Record:
    pair, ids = PAIRS[name], batch(rows)
    ours, theirs = Ours(pair.ours, base(width, layers)), Theirs(pair, base(width, layers))
    found = ratios(lambda: ours.step(ids), lambda: theirs.step(ids), rounds)
    alive = [bytes_alive(side.model, lambda: ml.next_byte_loss(side.model, ids[:, :-1], ids[:, 1:])) for side in (ours, theirs)]
    return {"ratio": found, "alive": alive}


def imports(names: list[str]) -> Iterator[Cell]:
    for package, rounds in (("minilora", 11), ("peft", 3)):
        yield {"package": package, "over": "torch"}, lambda: {"ratio": ratios(package, "torch", rounds, import_time)}


def import_time(package: str) -> float:
    """CPU seconds of a Python that imports it and ends."""
    child = subprocess.Popen([sys.executable, "-c", f"import {package}"], cwd=HERE.parent, stderr=subprocess.DEVNULL)
    _, status, used = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise RuntimeError(f"`import {package}` failed")
    return used.ru_utime + used.ru_stime


def disk(names: list[str]) -> Iterator[Cell]:
    for name in names:
        if name in ("lora", "vera", "adalora", "dora", "pissa", "qlora"):                                # the forms on disk
            yield {"method": name}, lambda: save_and_load(name)


def save_and_load(name: str, rounds: int = 11) -> Record:
    pair, found = PAIRS[name], {}
    ours, theirs = Ours(pair.ours, base(128, 4)).model, Theirs(pair, base(128, 4)).model
    with tempfile.TemporaryDirectory() as folder:
        here, there = f"{folder}/ours", f"{folder}/theirs"
        for clock in (cpu, wall):
            kind = clock.__name__
            found[f"save_{kind}"] = ratios(lambda: ml.save_adapter(ours, here), lambda: theirs.save_pretrained(there), rounds, clock)
            for_us, for_them = ([base(128, 4) for _ in range(WARM + rounds)] for _ in range(2))           # a load takes a plain model
            if name == "qlora":
                for_us, for_them = [ml.quantize(model, TARGETS) for model in for_us], [in_four_bits(model) for model in for_them]
            found[f"load_{kind}"] = ratios(lambda: ml.load_adapter(for_us.pop(), here), lambda: peft.PeftModel.from_pretrained(for_them.pop(), there),
                                           rounds, clock)
        found["bytes"] = [sum(file.stat().st_size for file in Path(where).iterdir() if file.name != "README.md") for where in (here, there)]
    return found


def wall(action: Callable[[], object]) -> float:
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


def nf4(names: list[str], size: int = 4096, width: int = 2048, rows: int = 256, rounds: int = 7) -> Iterator[Cell]:
    w = torch.randn(size, size, generator=torch.Generator().manual_seed(0))
    for double in (False, True):
        def theirs():
            return bnb.functional.quantize_4bit(w, quant_type="nf4", compress_statistics=double)

        yield {"what": "quantize", "double": double, "size": size}, lambda: {"ratio": ratios(lambda: ml.quantize_nf4(w, double=double), theirs, rounds)}
        Q, (codes, state) = ml.quantize_nf4(w, double=double), theirs()
        yield {"what": "dequantize", "double": double, "size": size}, lambda: {
            "ratio": ratios(lambda: Q.dequantize(), lambda: bnb.functional.dequantize_4bit(codes, state), rounds)}
    dense = nn.Linear(width, width, bias=False).requires_grad_(False)
    there = bnb.nn.Linear4bit(width, width, bias=False, compute_dtype=torch.float32, quant_type="nf4")
    there.weight = bnb.nn.Params4bit(dense.weight.data.clone(), requires_grad=False, quant_type="nf4")
    there, ours = there.to("cpu"), ml.NF4Linear.of(dense)
    x = torch.randn(rows, width, requires_grad=True)

    def pass_through(layer: nn.Module) -> None:
        """Forward, and the gradient of x."""
        x.grad = None
        layer(x).backward(torch.ones(1).expand(rows, width))

    for what, one, other in (("layer, ours over bitsandbytes", ours, there), ("layer, ours over dense", ours, dense),
                             ("layer, bitsandbytes over dense", there, dense)):
        yield {"what": what, "size": width, "rows": rows}, lambda: {"ratio": ratios(lambda: pass_through(one), lambda: pass_through(other), rounds)}
    yield {"what": "peak", "size": size}, lambda: {"dense_weights": peak(size)}


PEAK = """
import torch, minilora as ml
def resident(line):
    return 1024 * next(int(row.split()[1]) for row in open("/proc/self/status") if row.startswith(line))
w = torch.randn({size}, {size})
ml.quantize_nf4(w[:128], double=True)
open("/proc/self/clear_refs", "w").write("5")           # the peak counts from here
before = resident("VmRSS")
ml.quantize_nf4(w, double=True)
print(1 + (resident("VmHWM") - before) / w.nbytes)
"""


def peak(size: int) -> float | None:
    """The most memory while quantizing, the weight included, in dense weights. None where the system does not say."""
    if not Path("/proc/self/clear_refs").exists():
        return None
    run = subprocess.run([sys.executable, "-c", PEAK.format(size=size)], capture_output=True, text=True, check=True, cwd=HERE.parent)
    return round(float(run.stdout), 3)


GROWTH = {"rank": (8, 16, 32, 64, 128), "layers": (1, 2, 4, 8), "length": (32, 64, 128, 256)}
GROWING = {"lora": ml.LoRA, "vera": ml.VeRA, "adalora": lambda rank: ml.AdaLoRA(rank, rank, total_steps=10_000), "dora": ml.DoRA, "qlora": ml.QLoRA}


def serving(names: list[str]) -> Iterator[Cell]:
    for model in server.MODELS:
        for tokens in (1, 32):
            for count in (2, 4, 8, 16):
                yield {"model": model, "tokens": tokens, "adapters": count}, lambda: serve(model, count, tokens)


def serve(model: str, count: int, tokens: int) -> Record:
    found = server.measured(model, count, tokens)
    return found | {"shares": {way: quartiles(shares) for way, shares in found["shares"].items()}, "rate": round(found["rate"], 1)}


def growth(names: list[str]) -> Iterator[Cell]:
    for name in names:
        for axis in GROWTH if name in GROWING else ():
            yield {"method": name, "axis": axis}, lambda: slopes(name, axis)


def slopes(name: str, axis: str, rounds: int = 5) -> Record:
    """Of log time over log size, one for each round, in which all sizes take their turns; and of the FLOPs that torch counts."""
    sides, work = [], []
    for size in GROWTH[axis]:
        rank, layers, length = (size if axis == one else usual for one, usual in (("rank", 8), ("layers", 2), ("length", 128)))
        ours, ids = Ours(GROWING[name](rank), base(256, layers, 256)), batch(2, length)
        sides.append((ours, ids))
        work.append(sum(flops(lambda: ml.next_byte_loss(ours.model, ids[:, :-1], ids[:, 1:]))))
    found = []
    for turn in range(WARM + rounds):
        order = range(len(sides)) if turn % 2 else range(len(sides))[::-1]
        took = {i: cpu(lambda: sides[i][0].step(sides[i][1])) for i in order}
        if turn >= WARM:
            found.append(slope(GROWTH[axis], [took[i] for i in range(len(sides))]))
    return {"sizes": GROWTH[axis], "slope": quartiles(found), "flops_slope": round(slope(GROWTH[axis], work), 4)}


def slope(sizes: tuple[int, ...], values: list[float]) -> float:
    return statistics.linear_regression([*map(math.log, sizes)], [*map(math.log, values)]).slope


STAGES = {stage.__name__: stage for stage in (steps, imports, disk, nf4, serving, growth)}


def about() -> dict:
    versions = {name: version(name) for name in ("torch", "peft", "bitsandbytes", "transformers", "numpy")}
    return {"versions": {"python": platform.python_version()} | versions, "machine": platform.machine(), "cores": os.cpu_count()}


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for option, names in (("--only", STAGES), ("--methods", PAIRS)):
        arguments.add_argument(option, type=listed(names), default=list(names), metavar="A,B", help=", ".join(names))
    given = arguments.parse_args()
    torch.set_num_threads(1)
    here, records = about(), []
    if PARTIAL.exists() and (partial := json.loads(PARTIAL.read_bytes()))["about"] == here:
        records = partial["records"]
        print(f"going on after {len(records)} measurements; remove {PARTIAL} to begin anew")
    for stage in given.only:
        for name, measured in STAGES[stage](given.methods):
            name = {"stage": stage} | name
            if not any(name.items() <= record.items() for record in records):
                began = time.monotonic()
                records.append(name | measured())
                PARTIAL.parent.mkdir(exist_ok=True)
                storage.write_atomically(PARTIAL, as_json(here, records))
                said = {key: value for key, value in records[-1].items() if key not in name}
                print(f"{time.monotonic() - began:6.1f} s   {' '.join(map(str, name.values()))}: {said}", flush=True)
    publish(here, records)


def publish(here: dict, records: list[Record]) -> None:
    """bench.json, README.md and bench.png; what was measured before, with the same versions on as many cores, and not now, stays."""
    earlier = json.loads(PUBLISHED.read_bytes()) if PUBLISHED.exists() else {"about": None}
    if earlier["about"] == here:
        names = [{key: value for key, value in record.items() if key in NAMES} for record in records]
        records = [record for record in earlier["records"] if not any(name.items() <= record.items() for name in names)] + records
    stages, methods = [*STAGES], [*PAIRS]
    records.sort(key=lambda record: (stages.index(record["stage"]), record.get("width", 0), methods.index(record["method"]) if "method" in record else 0))
    storage.write_atomically(PUBLISHED, as_json(here, records))
    bench_page.write()
    PARTIAL.unlink(missing_ok=True)
    print(f"written: {', '.join(f'benchmarks/{name}' for name in ('bench.json', 'README.md', 'bench.png'))}")


NAMES = {"stage", "method", "width", "layers", "rows", "package", "over", "what", "double", "size", "axis", "model", "tokens", "adapters"}


def as_json(here: dict, records: list[Record]) -> bytes:
    """One record a line, so that a changed number is a changed line."""
    return (f'{{"about": {json.dumps(here)},\n"records": [\n' + ",\n".join(map(json.dumps, records)) + "\n]}\n").encode()


def listed(names: dict) -> Callable[[str], list[str]]:
    def chosen(text: str) -> list[str]:
        if unknown := [name for name in text.split(",") if name not in names]:
            raise argparse.ArgumentTypeError(f"{unknown[0]!r} is none of {', '.join(names)}")
        return text.split(",")

    return chosen


if __name__ == "__main__":
    main()
