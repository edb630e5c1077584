"""adapter_config.json by PEFT's rules: which layers are adapted, and which tensors are saved beside the adapters. The methods' own fields: formats.py.

    target_modules         names of layers, whole or their ends; a string is a regular expression of whole names, or "all-linear"
    exclude_modules        the same; these are not adapted
    layers_to_transform    with target_modules as a list: only in the blocks of these numbers; layers_pattern: what the list of blocks is called
    modules_to_save        ends of the names of modules that are saved whole: a trained head
    bias                   "all" biases are saved, or "lora_only": those of the adapted layers
    fan_in_fan_out         true where layers are Conv1D, which store W transposed; what it says of them is not asked, as in PEFT
"""

import json
import re
from collections.abc import Collection
from pathlib import Path

from torch import nn

from minilora.adapter import adapters
from minilora.formats import PEFT_TYPES
from minilora.safety import beside
from minilora.safety.conv1d import linear_layers, original, stands_for_conv1d
from minilora.safety.targets import check_targets, find_targets

PREFIX = "base_model.model."

# Fields that change nothing, and those of the table above. Any other that formats.py does not know may change the meaning: refused, if it is set.
HARMLESS = {"auto_mapping", "base_model_name_or_path", "inference_mode", "megatron_core", "peft_version", "qalora_group_size",
            "revision", "task_type"}
PLACES = {"target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save", "bias", "fan_in_fan_out"}


def _names(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) and name for name in value)


def _number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


KINDS = {                                             # null may stand for all of them
    "target_modules": lambda value: isinstance(value, str) or _names(value),
    "exclude_modules": lambda value: isinstance(value, str) or _names(value),
    "layers_pattern": lambda value: isinstance(value, str) or _names(value),
    "layers_to_transform": lambda value: _number(value) or isinstance(value, list) and all(map(_number, value)),
    "modules_to_save": _names,
    "fan_in_fan_out": lambda value: isinstance(value, bool),
}


def read_json(file: Path) -> dict:
    """Raises ValueError where it is no whole JSON object."""
    try:
        found = json.loads(file.read_bytes())
    except OSError as error:
        raise ValueError(f"{file}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: not whole JSON ({error})") from None
    if not isinstance(found, dict):
        raise ValueError(f"{file}: holds a {type(found).__name__}, not an object")
    return found


def read(file: Path) -> dict:
    """The file's fields. Raises ValueError where it is no whole JSON, or asks for what is not done here."""
    config = read_json(file)
    kind = config.get("peft_type")
    if not isinstance(kind, str) or kind not in PEFT_TYPES:
        raise ValueError(f"{file}: peft_type is {kind!r}; what can be loaded is {', '.join(map(repr, PEFT_TYPES))}")
    form = PEFT_TYPES[kind]
    allowed = {"bias": ["none", "all", form.only_bias]} | form.allowed
    for field, value in config.items():
        if field in allowed and value not in allowed[field]:
            hint = ""
            if field == "init_lora_weights" and str(value).startswith("pissa_niter"):
                hint = (": the randomized SVD that altered its base cannot be repeated. In PEFT, "
                        "save_pretrained(path_initial_model_for_weight_conversion=...) makes a LoRA of it, which loads here")
            raise ValueError(f"{file}: {field} = {value!r} is not supported; it may be {allowed[field]}{hint}")
        if field not in HARMLESS | PLACES | form.read_fields | form.ignored_fields | {"peft_type"} | set(allowed) and value:
            raise ValueError(f"{file}: {field} = {value!r} changes what the adapter means and is not supported")
        if field in KINDS and value is not None and not KINDS[field](value):
            raise ValueError(f"{file}: {field} = {value!r} is not what PEFT writes there")
    if config.get("layers_pattern") and config.get("layers_to_transform") is None:     # PEFT refuses that, too
        raise ValueError(f"{file}: layers_pattern = {config['layers_pattern']!r} changes what the adapter means and is not supported without "
                         "layers_to_transform")
    return config


def layers_meant(plain: nn.Module, config: dict, file: Path, peft_made: bool) -> dict[str, nn.Linear]:
    """The layers that the file means, in the model's order. Raises ValueError where there are none, or as adapt does."""
    if any(True for _ in adapters(plain)):
        raise ValueError("load_adapter takes a plain model, and this one is adapted already: unload() or merge() it first")
    linears = linear_layers(plain)
    head = getattr(plain, "get_output_embeddings", lambda: None)()
    try:
        chosen = {name: linear for name, linear in linears.items() if _is_meant(name, original(linear) is head, config, peft_made)}
    except (re.error, OverflowError) as error:
        raise ValueError(f"{file}: target_modules, or another of its names, is no regular expression ({error})") from None
    try:
        if not chosen and isinstance(config.get("target_modules"), list) and config["target_modules"]:
            find_targets(plain, config["target_modules"])                             # says what there is, where a name matches nothing
        if not chosen:
            raise ValueError(f"{config.get('target_modules')!r} names no layer of this model")
        check_targets(plain, chosen)
    except ValueError as error:
        raise ValueError(f"{file}: target_modules: {error}") from None
    if config.get("fan_in_fan_out") and not any(map(stands_for_conv1d, chosen.values())):
        raise ValueError(f"{file}: fan_in_fan_out = True is for layers that store their weight (in, out), as Conv1D does, and here there is none: "
                         f"{next(iter(chosen))} is an nn.Linear; set it to false")
    return chosen


def _is_meant(name: str, is_head: bool, config: dict, peft_made: bool) -> bool:
    targets, excluded = config.get("target_modules") or [], config.get("exclude_modules") or []
    if re.fullmatch(excluded, name) if isinstance(excluded, str) else _is_or_ends(name, excluded):
        return False
    if peft_made and any(re.match(rf"(^|.*\.){module}($|\..*)", name) for module in config.get("modules_to_save") or []):
        return False                                  # what is saved whole gets no adapter; in a folder of ours it has none, by its exact name
    if isinstance(targets, str):
        return not is_head if targets == "all-linear" else bool(re.fullmatch(targets, name))
    if name in targets or not _is_or_ends(name, targets):
        return name in targets
    wanted, patterns = config.get("layers_to_transform"), config.get("layers_pattern")
    if wanted in (None, []):
        return True
    patterns = [patterns] if isinstance(patterns, str) and patterns else patterns
    tries = [rf"(?:^|.*?\.){pattern}\.(\d+)\." for pattern in patterns] if patterns else [r".*?\.[^.]*\.(\d+)\."]
    number = next((int(match[1]) for match in (re.match(pattern, name) for pattern in tries) if match), None)
    return number is not None and number in (wanted if isinstance(wanted, list) else [wanted])


def _is_or_ends(name: str, targets: list[str]) -> bool:
    return any(name == target or name.endswith(f".{target}") for target in targets)


def targets(plain: nn.Module, layers: Collection[str]) -> list[str] | str:
    """target_modules for these layers: their names; or an expression that means them alone, where a name is the end of another module's too."""
    ends = tuple(f".{name}" for name in layers)
    if any(name.endswith(ends) and name not in layers for name, _ in plain.named_modules()):
        return "|".join(map(re.escape, layers))
    return list(layers)


def fields_beside(plain: nn.Module, layers: Collection[str], changed: set[str], only_bias: str) -> dict:
    """bias and modules_to_save, so that all these tensors are saved. Raises ValueError where PEFT's format has no place for one."""
    if not changed:
        return {}
    biases = {name for name in beside.tensors(plain, layers) if name.endswith(".bias")}
    under = {f"{layer}.bias" for layer in layers} & biases
    bias, covered = ("all", biases) if changed == biases else (only_bias, under) if changed & under else ("none", set())
    owners = {name.rpartition(".")[0]: name for name in sorted(changed - covered)}
    for owner, name in owners.items():
        if not owner or _holds(owner, layers):
            raise ValueError(f"not saved: {name} is trained, or has moved, and belongs to {owner or 'the model itself'}, which holds adapters as well. "
                             "PEFT's format saves whole modules that hold none: freeze it, or put it in a module of its own")
    modules = [owner for owner in owners if not any(owner.startswith(f"{other}.") for other in owners)]
    return {"bias": bias, "modules_to_save": modules or None}


def places_beside(plain: nn.Module, layers: Collection[str], config: dict) -> dict[str, str]:
    """key in the weights file -> name in the plain model, of all that bias and modules_to_save say is saved."""
    ends, bias = tuple(config.get("modules_to_save") or ()), config.get("bias") or "none"
    whole = tuple(f"{name}." for name, _ in plain.named_modules(remove_duplicate=False) if ends and name.endswith(ends) and not _holds(name, layers))
    places = {}
    for name in beside.tensors(plain, layers):
        owner, _, leaf = name.rpartition(".")
        if whole and name.startswith(whole):
            places[PREFIX + name] = name
        elif leaf == "bias" and (bias == "all" or bias != "none" and owner in layers):
            places[f"{PREFIX}{owner}.base_layer.bias" if owner in layers else PREFIX + name] = name
    return places


def _holds(module: str, layers: Collection[str]) -> bool:
    return any(layer == module or layer.startswith(f"{module}.") for layer in layers)
