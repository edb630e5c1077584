"""Models, adapters and runs on disk: what each folder tells by itself, and beside the base it belongs to. Nothing in them is executed."""

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from minilora.data import TASKS
from minilora.gpt import load_base
from minilora.methods import METHODS, RATES, make_method
from minilora.quant.linear import quantize
from minilora.safety import runs
from minilora.safety.configuration import PREFIX, read_json
from minilora.safety.targets import find_targets, kind
from minilora.scale.doctor import live, merged, progress, symptoms
from minilora.scale.doctor.findings import Finding, Report, count, short
from minilora.scale.doctor.sheets import BIN, IN_FOUR_BITS, Sheet, read_sheet
from minilora.scale.doctor.weights import Weights, fingerprints
from minilora.storage import CONFIG, START_OVER, WEIGHTS, base_fingerprint, load_adapter

HISTORY, CHECKPOINT, MODEL, REAL = "history.json", "checkpoint.pt", "model.safetensors", "model"        # what `finetune` writes, see commands/finetune.py
UNFIT = "made for another base"                                                           # as load_adapter says it


@dataclass
class Base:
    """What adapters are held against: its tensors, and, of a TinyGPT's file, that it can be loaded whole."""

    weights: Weights

    @property
    def is_tiny(self) -> bool:
        return "gpt_config" in self.weights.metadata

    @property
    def tied_head(self) -> bool:
        """No tensor of a head in the files, and the configuration does not say that it is untied."""
        return self.weights.config.get("tie_word_embeddings") is not False and not any("head" in key for key in self.weights.keys)

    def weight(self, name: str, sheet: Sheet) -> Tensor | None:
        """(out, in) of that layer; None where it is not there, or is packed."""
        key = self.weights.find(f"{name}.weight")
        W = self.weights.get(key) if key else None
        if W is None or W.dim() != 2 or not W.is_floating_point():
            return None
        return W.T if sheet.config.get("fan_in_fan_out") else W


def examine(paths: list[Path], base: Path | None = None) -> list[Report]:
    """A report of each path, in this order; what stands against what is in the report of the later one.

    A model is a safetensors file or a folder of them; an adapter, a folder of ours or PEFT's; a run, what finetune wrote. `base`: the model
    that adapters belong to, and that models beside it come from. Raises ValueError where a path is none of these, or a file is damaged.
    """
    kinds = [(path, kind_of(path)) for path in paths]
    original = Base(Weights(whole_model(base))) if base else None
    sheets, reports = [], []
    for path, what in kinds:
        if what == "run":
            reports.append(of_run(path, original, sheets))
        elif what == "adapter":
            reports.append(of_adapter(path, original, sheets))
        else:
            reports.append(Report(str(path)))                       # below, when all adapters are read
    for report, (path, what) in zip(reports, kinds):
        if what == "model":
            of_model(report, path, original, sheets)
    return reports


def kind_of(path: Path) -> str:
    """"model", "adapter" or "run". Raises ValueError where there is nothing to look at."""
    if not path.is_file() and not path.is_dir():
        raise ValueError(f"{path}: {'neither a file nor a folder' if path.exists() else 'no such file or folder'}")
    if path.is_file():
        if path.name in (WEIGHTS, CONFIG, HISTORY, CHECKPOINT, BIN):
            raise ValueError(f"{path}: one file of several; name the folder {path.parent}")
        return "model"
    there = {file.name for file in path.iterdir()}
    if there & {HISTORY, CHECKPOINT}:
        return "run"
    if there & {CONFIG, WEIGHTS, BIN}:
        return "adapter"
    if not any(name.endswith(".safetensors") or name == "config.json" for name in there):
        below = sorted({file.parent.relative_to(path).as_posix() for depth in ("*", "*/*") for name in (CONFIG, HISTORY, "config.json")
                        for file in path.glob(f"{depth}/{name}")})
        raise ValueError(f"{path}: holds no model, no adapter and no run" + (f"; folders in it do: {', '.join(below[:4])}" if below else ""))
    return "model"


def whole_model(path: Path) -> Path:
    """The model there; of a run, the one that full fine-tuning left."""
    what = kind_of(path)
    left = next((path / name for name in (MODEL, REAL) if (path / name).exists()), None)
    if what == "run" and left:
        return left
    if what != "model":
        raise ValueError(f"{path}: the base must be a model, and this is {'an adapter' if what == 'adapter' else 'a run'}")
    return path


# Models

def of_model(report: Report, path: Path, base: Base | None, sheets: list[Sheet]) -> None:
    model = Base(Weights(path))
    dtypes = sorted({str(model.weights.get(key).dtype).removeprefix("torch.") for key in list(model.weights.keys)[:8]})
    report.seen = f"{path}: a model, {len(model.weights.keys)} tensors, {', '.join(dtypes)}"
    report.findings += symptoms.of_keys(model.weights.keys, adapter=False)
    for sheet in sheets:
        report.findings += holds(model, base, sheet, report)
    if base is not None and not sheets and model.weights.keys & base.weights.keys:
        matrices = [key for key in model.weights.keys & base.weights.keys if len(model.weights.shape(key)) == 2 and "embed" not in key]
        report.findings += live.swallowed((key, base.weights.get(key), model.weights.get(key)) for key in matrices)


def holds(model: Base, base: Base | None, sheet: Sheet, report: Report) -> Iterator[Finding]:
    """How often the model holds the adapter's dW: exactly, where the original is at hand; and what of it arrived."""
    t, lost, whole, dtype = [], 0, 0, None
    for name in sheet.layers:                                        # one at a time: W is as large as it is
        W, W_0 = model.weight(name, sheet), base.weight(name, sheet) if base else None
        pair = None if W is None else sheet.update(name, W.shape[1])
        if pair is None or W.shape != (len(pair[1]), pair[0].shape[1]) or base and (W_0 is None or W_0.shape != W.shape):
            continue
        t.append(merged.projection(W.double() - W_0.double() if base else W, *pair))
        if base and W.dtype in (torch.bfloat16, torch.float16):
            dW = pair[1] @ pair[0]
            same = (W_0.to(W.dtype) == W) & (dW != 0)
            lost, whole, dtype = lost + int(same.sum()), whole + int((dW != 0).sum()), W.dtype
    told = merged.held(t, enough=1 if base else merged.ENOUGH)
    if told and told.times > 1:
        yield Finding("merged twice", f"W{' minus base' if base else ''} is {told.times} dW in {told.agree:.0%} of {told.layers} layers",
                      "Merge into the original once more, and only once")
    elif told and told.times == 1:
        report.notes.append(f"it holds dW of the {sheet.kind} adapter once ({told.agree:.0%} of {told.layers} layers): do not load that on it")
        if lost > 0.5 * whole:
            yield live.swallowed_finding(lost / whole, told.layers, dtype)
    elif lost > 0.5 * whole:                                          # so much is lost that t says nothing
        yield live.swallowed_finding(lost / whole, len(t), dtype)


# Adapters

def of_adapter(path: Path, base: Base | None, sheets: list[Sheet]) -> Report:
    report = Report(f"{path}: an adapter")
    if (path / BIN).exists() and not (path / WEIGHTS).exists():
        size = (path / BIN).stat().st_size
        report.findings.append(Finding("a pickle", f"{BIN} ({size:,} bytes) and no safetensors: opening it could run code",
                                       "If you trust it: torch.load(weights_only=True), save_file()"))
        return report
    sheet = read_sheet(path)
    report.seen = f"{path}: an adapter, {sheet}"
    report.findings += symptoms.of_sheet(sheet)
    if base is None and sheet.about and sheet.about.get("base") == base_fingerprint(load_base()):
        base = Base(Weights(Path(load_base.__globals__["__file__"]).with_name("base.safetensors")))
        report.notes.append("made for the shipped base")
    if base is not None and sheet.layers:
        report.findings += against(path, sheet, base, report)
    sheets.append(sheet)
    return report


def against(path: Path, sheet: Sheet, base: Base, report: Report) -> Iterator[Finding]:
    """The adapter beside its base: do the layers fit, is it the one, does it hold dW already."""
    yield from tied(sheet, base)
    unfit = list(misfits(sheet, base))
    if unfit:
        yield unfit[0]
        return
    coverage = _coverage(sheet, base)
    if coverage:
        report.notes.append(coverage)
    right, why = is_the_one(path, sheet, base)
    if right:
        report.notes.append(f"{short(str(base.weights.path))} is the base it was made for (fingerprint {sheet.about['base'][:12]})")
        return
    t = []
    for name in sheet.layers:
        W = base.weight(name, sheet)
        pair = None if W is None else sheet.update(name, W.shape[1])
        if pair is not None and W.shape == (len(pair[1]), pair[0].shape[1]):
            t.append(merged.projection(W, *pair))
    told = merged.held(t)
    if told and told.times >= 1:
        times = "twice" if told.times == 1 else f"{told.times + 1} times"
        yield Finding("merged already", f"⟨W, dW⟩ / ‖dW‖² is near {told.times} in {told.agree:.0%} of {told.layers} layers: on this base dW "
                      f"would count {times}", "Take the original")
    elif right is False:
        yield Finding("wrong base", why, "Load the weights it was trained on")


def misfits(sheet: Sheet, base: Base) -> Iterator[Finding]:
    """Layers of other sizes; layers that other blocks of this model have. Where a whole kind is missing, files may only name it otherwise."""
    found, missing, odd = {}, [], []
    for name in sheet.layers:
        key = base.weights.find(f"{name}.weight")
        if key is None:
            missing += [name] if not (base.tied_head and is_head(name)) else []
            continue
        found[name] = base.weights.shape(key)
        W, sizes = base.weight(name, sheet), sheet.sizes(name)
        if W is not None and sizes and any(size not in (0, here) for size, here in zip(sizes, W.shape)):
            odd.append(name)
    fix = "Take the model it was trained on"
    if odd:
        sizes, here = (" x ".join(map(str, size)) for size in (sheet.sizes(odd[0]), found[odd[0]]))
        of = count(len(odd), len(sheet.layers), "layers")
        yield Finding("wrong base", f"{of} have other sizes: {short(odd[0], 36)} is for {sizes}, here {here}", fix)
    elif missing and (not found or {kind(name) for name in missing} <= {kind(name) for name in found}):
        yield Finding("wrong base", f"{count(len(missing), len(sheet.layers), 'layers')} are not in this model ({short(missing[0])})", fix)


def is_the_one(path: Path, sheet: Sheet, base: Base) -> tuple[bool | None, str]:
    """By the fingerprint in a folder of ours. (None, ""), where there is none or this model's cannot be known."""
    noted = sheet.about.get("base")
    if not isinstance(noted, str):
        return None, ""
    if base.is_tiny:
        return tiny_fits(path, base)
    if sheet.kind in IN_FOUR_BITS:
        return None, ""
    tried = []
    for fingerprint in fingerprints(base.weights, sheet.layers, sheet.config):
        if fingerprint == noted:
            return True, ""
        tried.append(fingerprint)
    if not tried:
        return None, ""
    return False, f"made on fingerprint {noted[:12]}, this model's is {tried[0][:12]}, and none of {len(tried)} types fits"


def tiny_fits(path: Path, base: Base) -> tuple[bool | None, str]:
    """load_adapter's own verdict, on the base as it is and in four bits."""
    said = ""
    for prepare in (lambda model: model, quantize, lambda model: quantize(model, double=False)):
        try:
            load_adapter(prepare(load_base(base.weights.path)), path)
            return True, ""
        except ValueError as error:
            said = said or str(error)
            if UNFIT not in str(error):
                break
    if UNFIT not in said:
        return None, ""
    here = re.search(r"fingerprint (.*), this model's is (\w+)", said, re.DOTALL)
    return False, f"made on the base of fingerprint {here[1]}, and this one's is {here[2]}"


def tied(sheet: Sheet, base: Base) -> Iterator[Finding]:
    """The head of a tied model, adapted or trained apart."""
    if not base.tied_head:
        return
    heads = [name for name in (*sheet.layers, *(key.removeprefix(PREFIX).removesuffix(".weight") for key in sheet.beside)) if is_head(name)]
    if heads:
        yield Finding("tied weights", f"it changes {heads[0]}, and 0 of {len(base.weights.keys)} tensors of the base are a head: it is the embedding",
                      "Merged and saved it is lost: untie it first")


def is_head(name: str) -> bool:
    return name.rpartition(".")[2] in ("lm_head", "output_projection", "embed_out")


def _coverage(sheet: Sheet, base: Base) -> str:
    """Matrices of the numbered blocks, and how many have an adapter."""
    blocks = [key.removesuffix(".weight") for key in base.weights.keys if key.endswith(".weight") and re.search(r"\.\d+\.", key)
              and len(base.weights.shape(key)) == 2]
    have = {base.weights.find(f"{name}.weight") for name in sheet.layers}
    bare = [name for name in blocks if f"{name}.weight" not in have]
    if not blocks:
        return ""
    kinds = ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in bare))
    return f"{len(blocks) - len(bare)} of {len(blocks)} of the blocks' matrices have an adapter" + (f"; without: {kinds}" if bare else "")


# Runs

def of_run(path: Path, base: Base | None, sheets: list[Sheet]) -> Report:
    if (path / HISTORY).exists():
        history = read_json(path / HISTORY)
        steps = history.get("steps")
        report = Report(f"{path}: a run of {history.get('method')}, {steps} steps, finished")
        findings = _judged(path / HISTORY, history, steps)
        if (path / CONFIG).exists() or (path / WEIGHTS).exists():
            there = of_adapter(path, base, sheets)
            report.notes += there.notes
            findings = there.findings + findings
        elif history.get("method") != "full":
            findings.append(Finding("no adapter", f"{HISTORY} is there, and 0 of the adapter's 2 files", "They were moved or removed: run it again"))
        report.findings += findings
        return report
    state, identity = _checkpoint(path / CHECKPOINT)
    steps, step = identity["steps"], state["step"]
    report = Report(f"{path}: a run of {identity['method'].partition('(')[0]}, {step} of {steps} steps")
    report.findings += _judged(path / CHECKPOINT, state["history"], steps)
    if identity["warmup"] >= steps:
        report.findings.append(Finding("warm-up too long", f"{identity['warmup']} steps of warm-up, in a run of {steps}", progress.WARMUP))
    report.findings += _still_zero(state, step)
    if runs.is_running(path):
        report.notes.append("it is running now")
    else:
        report.findings.append(Finding("unfinished", f"step {step} of {steps}", f"This goes on: {command(path, state, identity)}"))
    return report


def _judged(file: Path, history: dict, steps: object) -> list[Finding]:
    if not isinstance(steps, int):
        raise ValueError(f"{file}: does not say of how many steps the run was; no file of finetune's")
    try:
        return progress.judge(history, steps)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None


def _checkpoint(file: Path) -> tuple[dict, dict]:
    """(state, identity). weights_only: data, never code."""
    try:
        saved = torch.load(file, map_location="cpu", weights_only=True)
        state, identity = saved["state"], saved["identity"]
        kinds = {"steps": int, "warmup": int, "method": str, "seed": int, "accumulate": int, "step": int, "trained": dict, "history": dict,
                 "digests": dict}
        if not all(isinstance((identity if key in identity else state)[key], kind_) for key, kind_ in kinds.items()):
            raise ValueError
    except Exception as error:
        raise ValueError(f"{file}: not a whole checkpoint ({type(error).__name__}); {START_OVER}") from None
    return state, identity


def _still_zero(state: dict, step: int) -> Iterator[Finding]:
    """B of LoRA and its kin, b of VeRA, lam of AdaLoRA: two steps move it, whatever the warm-up."""
    for leaf in ("B", "b", "lam"):
        found = [tensor for name, tensor in state["trained"].items() if name.endswith(f".{leaf}")]
        if found:
            if step >= live.STEPS and not any(tensor.any() for tensor in found):
                yield Finding(f"{leaf} is zero", f"{count(len(found), len(found), 'layers')} after {step} steps",
                              "No gradient reaches it: look at .grad after backward")
            return


def command(path: Path, state: dict, identity: dict) -> str:
    """What goes on with that run, as far as the checkpoint knows it: it holds a digest of the text, and not its name."""
    name = next((name for name, make in METHODS.items() if identity["method"].startswith(f"{getattr(make, 'func', make).__name__}(")
                 and ("rslora=True" in identity["method"]) == (name == "rslora")), None)
    words = ["python -m minilora finetune", *_source(state, identity), *_targets(identity)]
    words += [f"--method {name}"] if name and name != "lora" else []
    rank = re.search(r"(?:target_rank|\brank)=(\d+)", identity["method"])
    words += [f"--rank {rank[1]}"] if rank and int(rank[1]) != (64 if name == "vera" else 8) else []
    alpha, usual = (re.search(r"\balpha=([\d.]+)", text) for text in (identity["method"], repr(make_method(name)) if name else ""))
    words += [f"--alpha {float(alpha[1]):g}"] if alpha and usual and float(alpha[1]) != float(usual[1]) else []
    words += [f"--steps {identity['steps']}"] if identity["steps"] != 200 else []
    words += [f"--lr {identity['lr']:g}"] if identity.get("lr") != RATES.get(name) and isinstance(identity.get("lr"), float) else []
    words += [f"--accumulate {identity['accumulate']}"] if identity.get("accumulate", 1) != 1 else []
    words += [f"--clip {identity['clip']:g}"] if identity.get("clip") else []
    words += ["--autocast bf16"] if identity.get("autocast") else []
    words += [f"--seed {identity['seed']}"] if identity.get("seed") else []
    return " ".join([*words, f"--out {path}"])


def _targets(identity: dict) -> list[str]:
    """Which layers were named, by their last names, or in full where those would mean others of the shipped base, too. Nothing where all of a
    TinyGPT's were taken. What a real model takes without names is not known here."""
    layers, usual = identity.get("adapted layers") or [], list(find_targets(load_base()))
    kinds = Counter(map(kind, layers))
    if not layers or kinds.keys() == {*map(kind, usual)} and len({*kinds.values()}) == 1:
        return []
    names = list(dict.fromkeys(name.rpartition(".")[2] for name in layers))
    if {*layers} < {*usual} and layers != [name for name in usual if name.rpartition(".")[2] in names]:
        names = layers
    return [f"--targets {','.join(names)}"]


def _source(state: dict, identity: dict) -> list[str]:
    """What was read, and the base, where it was not the shipped one. Of a built-in task the first batch is remembered: it is looked for at the
    contexts that a base may have. A text's --context and --rows are not known."""
    shipped, seen = load_base(), (state.get("digests") or {}).get(0)
    known = {kind(name) for name, _ in (*shipped.named_modules(), *shipped.named_parameters())}
    if not {kind(name) for name in identity.get("adapted layers") or state["trained"]} <= known:
        return ["--model MODEL --text FILE"]
    words = [] if identity.get("base") in (None, "", base_fingerprint(shipped)) else ["--base BASE"]
    for name, task in () if state.get("data") else TASKS.items():
        for rows in (16, 8, 4, 2, 1, 32):
            for context in (128, 64, 32, 256):
                batches = task().batches(rows, context, identity.get("seed", 0))
                if seen == runs.digest([batches(part) for part in range(identity.get("accumulate", 1))]):
                    return [f"--task {name}", *words, *([f"--rows {rows}"] if rows != 16 else [])]
    return ["--text FILE" if state.get("data") else "--task TASK", *words]
