"""What an adapter tells by itself, and what names of tensors tell. No model is asked.

Which scale is surprising: LoRA's paper goes from 1 to 8 (GPT-2: alpha 32, rank 4), QLoRA to 1/4 (alpha 16, rank 64), and most folders have 1 or
2. Above 8 the first steps are large beside W; below 1/16 a rate that suits others hardly moves W. With rsLoRA the same bounds hold for alpha / √rank.
"""

from collections.abc import Collection, Iterable

from torch import Tensor

from minilora.formats import FORMATS
from minilora.safety.configuration import PREFIX
from minilora.safety.targets import kind, listed
from minilora.scale.doctor.findings import Finding, count, short
from minilora.scale.doctor.sheets import NAMED, WRAPPERS, Sheet

LARGEST, SMALLEST = 8.0, 1 / 16


def of_sheet(sheet: Sheet) -> list[Finding]:
    """All that a folder, or an adapter on a model, tells without its base."""
    return [finding for finding in (*of_keys(sheet.keys, adapter=True), _not_finite(sheet), silent(sheet), strength(sheet), _saved_beside(sheet),
                                    _idle_targets(sheet)) if finding]


def silent(sheet: Sheet, fix: str = "Saved before training, or training never reached it: see that the optimizer holds it") -> Finding | None:
    """dW is zero in all layers; or in all of one kind, as where a loss does not depend on them. AdaLoRA cuts whole layers: of it only all count."""
    found = [name for name in sheet.layers if sheet.is_silent(name)]
    if len(found) < len(sheet.layers):
        speak = {kind(name) for name in sheet.layers if name not in found}
        found = [] if sheet.kind == "AdaLoRA" else [name for name in found if kind(name) not in speak]
    if not found:
        return None
    tensor = {"VeRA": "b", "AdaLoRA": "lam"}.get(sheet.kind, "B")
    where = "" if len(found) == len(sheet.layers) else f" ({listed(map(short, found), 2)})"
    changes = "the adapter changes nothing" if not where else "they change nothing"
    return Finding(f"{tensor} is zero", f"{count(len(found), len(sheet.layers), 'layers')}{where}: {changes}", fix)


def strength(sheet: Sheet) -> Finding | None:
    """A scale beyond what papers use. PiSSA's and Delta-LoRA's folders say it as that of the rank that is trained."""
    scales = sheet.scales
    if sheet.about.get("fields"):
        scales = _of_method(sheet)
    odd = {name: scale for name, scale in scales.items() if not SMALLEST <= abs(scale) <= LARGEST}
    if not odd:
        return None
    name, scale = max(odd.items(), key=lambda pair: abs(pair[1]))
    rank = sheet.ranks.get(name, 0)
    if sheet.rslora and abs(scale) > LARGEST:
        advice = f"rsLoRA divides by √{rank}: alpha / r would be {scale / rank ** 0.5:.3g}. Take an alpha smaller by √{rank}"
    else:
        smaller = abs(scale) > LARGEST
        advice = f"Papers use 1/4 to 8, mostly 1 or 2: {'a smaller alpha, or a lower rate' if smaller else 'a larger alpha, or a higher rate'}"
    return Finding("scale", f"s = {scale:.3g} in {count(len(odd), len(sheet.layers), 'layers')}", advice)


def _of_method(sheet: Sheet) -> dict[str, float]:
    kinds = {kind.__name__: kind for kind in FORMATS}
    found = {}
    for name in sheet.layers:
        said = (sheet.about.get("others") or {}).get(name, sheet.about)
        try:
            method = kinds[said["method"]](**said["fields"])
        except (KeyError, TypeError, ValueError):
            continue
        scale = FORMATS[type(method)].scale(method)
        if scale is not None:
            found[name] = scale
    return found


def of_keys(keys: Collection[str], adapter: bool) -> list[Finding]:
    """What the names of the tensors in a file say: a wrapper was saved with the model, or the adapters were."""
    found = []
    for part, wrapper in WRAPPERS.items():
        if named := [key for key in keys if part in key.split(".")]:
            found.append(_prefixed(f"{part}.", wrapper, named, keys))
    whole = [key for key in keys if key.removeprefix(PREFIX).startswith("module.")]
    if whole and len(whole) == len([key for key in keys if not key.startswith("base_model.vera_")]):
        found.append(_prefixed("module.", "DataParallel", whole, keys))
    if twice := [key for key in keys if key.startswith(PREFIX + PREFIX)]:
        found.append(_prefixed(PREFIX + PREFIX, "two PeftModels", twice, keys))
    if adapter and (named := [key for key in keys if NAMED.search(key)]):
        name = NAMED.search(named[0])[2]
        found.append(Finding("name in keys", f"{len(named)} of {len(keys)} keys carry the adapter's name {name!r} ({short(named[0], 36)})",
                             "PEFT loads none: use save_pretrained"))
    if not adapter:
        found += _saved_with_adapters(keys)
    return found


def _prefixed(prefix: str, wrapper: str, named: list[str], keys: Collection[str]) -> Finding:
    return Finding("wrapper in keys", f"{len(named)} of {len(keys)} keys hold {prefix!r}, as {wrapper} names them ({short(named[0], 24)})",
                   "Save the model inside")


def _saved_with_adapters(keys: Collection[str]) -> list[Finding]:
    """save_pretrained, or a state dict, of an adapted model: W is there, but under a name that no plain model has."""
    there = set(keys)
    peft = [key for key in keys if key.endswith(".base_layer.weight")]
    bases = {key.rpartition(".base.")[0]: key for key in keys if key.endswith((".base.weight", ".base.codes"))}
    ours = [key for parent, key in bases.items() if {f"{parent}.{leaf}" for leaf in ("A", "b", "P")} & there]
    found = []
    for named, whose, fix in ((peft, "PEFT", "First merge_and_unload()"),
                              (ours, "minilora", "First merge(), or save_adapter()")):
        if named:
            what = f"{len(named)} of {len(keys)} tensors are {whose}'s bases, which no plain model loads ({short(named[0], 30)})"
            found.append(Finding("saved adapted", what, fix))
    if not found and (wrapped := [key for key in keys if key.startswith(PREFIX)]):
        found.append(_prefixed(PREFIX, "PeftModel", wrapped, keys))
    return found


def _not_finite(sheet: Sheet) -> Finding | None:
    def broken(tensors: Iterable[Tensor]) -> bool:
        return any(tensor.is_floating_point() and not tensor.float().isfinite().all() for tensor in tensors)

    found = [name for name, own in sheet.layers.items() if broken(own.values())]
    if not found:
        return None
    return Finding("not finite", f"{count(len(found), len(sheet.layers), 'layers')} hold nan or infinity ({short(found[0])})",
                   "Training has diverged: start anew with a lower rate, or with clip")


def _saved_beside(sheet: Sheet) -> Finding | None:
    """Modules that the configuration says were trained, and of which the file has nothing; a task whose head must have been."""
    modules, task = sheet.config.get("modules_to_save") or [], sheet.config.get("task_type")
    if any(f".{module}." in f".{key.removeprefix(PREFIX)}" for module in modules for key in sheet.beside):
        return None                                  # one is there; PEFT itself adds names that only some models have
    if modules:
        return Finding("head not saved", f"modules_to_save names {', '.join(map(short, modules[:2]))}, and 0 of {len(sheet.keys)} tensors are of it",
                       "It loads as a fresh one: save again from the trained model")
    if task in ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS") and not sheet.beside:
        return Finding("head not saved", f"a {task} adapter of {len(sheet.keys)} tensors, none of a head: it loads as a random one",
                       "Name it in modules_to_save, train again")
    return None


def _idle_targets(sheet: Sheet) -> Finding | None:
    """A name in target_modules that no layer bears: PEFT goes on without a word, as long as others match."""
    targets = sheet.config.get("target_modules")
    if not isinstance(targets, list) or not sheet.layers or any("lora_" in key for key in sheet.beside):       # of kinds that are not known here
        return None
    idle = [target for target in targets if not any(name == target or name.endswith(f".{target}") for name in sheet.layers)]
    if not idle:
        return None
    names = ", ".join(short(name, 24) for name in idle[:2])
    return Finding("targets", f"{len(idle)} of {len(targets)} names match no layer ({names}); {len(sheet.layers)} layers have an adapter",
                   "Look into model.named_modules()")
