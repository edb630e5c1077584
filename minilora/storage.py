"""Adapters on disk in PEFT's layout, and checkpoints of a run. Nothing is ever half-written, and nothing that is loaded runs.

    folder/adapter_config.json           PEFT's field names: peft_type, r, lora_alpha, target_modules, …
    folder/adapter_model.safetensors     PEFT's keys: base_model.model.<layer>.lora_A.weight (rank, in), .lora_B.weight (out, rank)

formats.py says how each method is put in these terms. The safetensors metadata, which PEFT ignores, also names the method and the
base: an adapter is an addition to one particular W.
"""

import dataclasses
import hashlib
import io
import json
import os
import re
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from minilora.adapter import Adapter, Method, adapters, find_targets, install, swapped
from minilora.gpt import TinyGPT
from minilora.formats import FORMATS, METHODS, PEFT_TYPES, PEFTS_OWN, LoRAFormat

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."

# Of PEFT's fields: what changes nothing, and what must have this value because we do nothing else. formats.py has what is read.
HARMLESS = {"auto_mapping", "base_model_name_or_path", "inference_mode", "megatron_core", "peft_version", "qalora_group_size",
            "revision", "task_type"}
ALLOWED = {"bias": ["none"]}


def save_adapter(model: nn.Module, folder: str | Path, projection: bool = True) -> Path:
    """Write the model's adapter to `folder`, so that load_adapter here and PeftModel.from_pretrained in PEFT read it.

    projection=False leaves VeRA's A and B out: the seed draws them again, and the loader knows by their digest if it did.
    """
    layers = dict(adapters(model))
    if not layers:
        raise ValueError("nothing to save: this model has no adapters (after full fine-tuning save the whole model)")
    form, options = FORMATS[type(next(iter(layers.values())).method)], {"projection": projection}
    tensors = {key: tensor.detach().cpu().clone().contiguous() for key, tensor in _tensors(form, layers, options).items()}
    config, about = described(model, projection)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / WEIGHTS, _packed(tensors, {"format": "pt", "minilora": about}))
    write_atomically(folder / CONFIG, config)
    return folder


def described(model: nn.Module, projection: bool = True) -> tuple[bytes, str]:
    """What save_adapter writes beside the tensors: the configuration file, and the weights file's metadata."""
    layers = dict(adapters(model))
    method = next(iter(layers.values())).method
    form = FORMATS[type(method)]
    about = {"method": type(method).__name__, "fields": dataclasses.asdict(method), "layers": list(layers),
             "base": base_fingerprint(model), "state": form.state(layers)}
    config = _shell(form) | {"target_modules": list(layers)} | form.config(method, layers, projection=projection)
    return (json.dumps(config, indent=2) + "\n").encode(), json.dumps(about)


def load_adapter(model: nn.Module, folder: str | Path, trainable: bool = False, any_base: bool = False) -> nn.Module:
    """Put the adapter in `folder` on a plain model, in place, and return it. trainable: go on training it.

    Raises ValueError naming the file and the key, the model unchanged, where a file is missing or damaged, a tensor is
    missing, unexpected, of the wrong shape or not finite, the configuration asks for what we do not do, or the adapter was made
    for another base (any_base=True loads it all the same).
    """
    config_file, weights_file = Path(folder) / CONFIG, Path(folder) / WEIGHTS
    config = _read_config(config_file)
    tensors, about = _read_tensors(weights_file)
    method = _method(config, config_file)
    form = PEFTS_OWN[type(method)]
    linears = _layers(model, config, config_file)
    if about:
        method = _saved_method(about, weights_file)
        form = FORMATS[type(method)]
        if about["layers"] != list(linears):
            raise _mixed_up(config_file, about, "target_modules", list(linears), about["layers"])
    options = {"projection": config.get("save_projection", True)}
    with torch.random.fork_rng([]), torch.no_grad():     # the adapters' random starts are overwritten: spend no one's random numbers on them
        try:
            wrapped = method.wrap(linears)
            form.restore(wrapped, about.get("state", {}) if about else None, config)
        except ValueError as error:
            raise ValueError(f"{config_file}: {error}") from None
        except (KeyError, TypeError):
            raise ValueError(f"{weights_file}: its metadata lacks the state of {about['method']}; the file has been edited") from None
        base = base_fingerprint(model, wrapped) if about else None
        if about and about["base"] != base and not any_base:
            raise ValueError(f"{weights_file}: made for another base (fingerprint {about['base'][:12]}, this model's is "
                             f"{base[:12]}); load the base it was trained on, or pass any_base=True")
        for field, value in form.config(method, wrapped, **options).items() if about else ():
            if config.get(field) != value:
                raise _mixed_up(config_file, about, field, config.get(field), value)
        _fill(form, wrapped, options, tensors, weights_file)
    if not trainable:
        for adapter in wrapped.values():
            adapter.requires_grad_(False)
    return install(model, wrapped)


def base_fingerprint(model: nn.Module, wrapped: dict[str, Adapter] | None = None) -> str:
    """SHA-256 of the base's names, shapes and bits; the adapters on it, or about to be put on it, do not count."""
    digest = hashlib.sha256()
    with swapped(model, {name: adapter.base for name, adapter in (wrapped or dict(adapters(model))).items()}):
        for name, tensor in model.state_dict().items():
            if isinstance(tensor, Tensor):
                digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
                digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def save_model(model: TinyGPT, path: str | Path) -> None:
    """A whole TinyGPT with its configuration, as load_base reads it."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in whole(model).items()}
    write_atomically(path, _packed(tensors, model_metadata(model)))


def whole(model: nn.Module) -> dict[str, Tensor]:
    """All that makes the model, by its first name: a tied head is its embedding and is there once."""
    once = {}
    for name, tensor in model.state_dict().items():
        once.setdefault((tensor.data_ptr(), tensor.shape), (name, tensor))
    return dict(once.values())


def model_metadata(model: TinyGPT) -> dict[str, str]:
    return {"format": "pt", "gpt_config": json.dumps(dataclasses.asdict(model.config))}


def save_checkpoint(path: str | Path, identity: dict, state: dict) -> None:
    """The state of a run and whose run it is, in one file that is replaced whole."""
    content = io.BytesIO()
    torch.save({"identity": identity, "state": state}, content)
    write_atomically(path, content.getvalue())


def load_checkpoint(path: str | Path, identity: dict) -> dict:
    """The state saved there. Raises ValueError where the file is damaged, or belongs to a run with other settings."""
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)     # weights_only: data, never code
        state, theirs = saved["state"], saved["identity"]
    except Exception as error:
        raise ValueError(f"{path}: not a whole checkpoint ({type(error).__name__}); remove it to start over") from None
    for key in identity:
        if theirs.get(key) != identity[key]:
            raise ValueError(f"{path}: a checkpoint of another run, whose {key} was {theirs.get(key)!r} and now is {identity[key]!r}; "
                             "go on with the same settings, or remove it to start over")
    return state


def write_atomically(path: str | Path, content: bytes) -> None:
    """All of it or nothing, whenever the power fails: a temporary file beside it, flushed to the disk, then renamed."""
    path = Path(path)
    beside = path.with_name(f".{path.name}.tmp")
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder; a file is to be written there")
    with open(beside, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)
    if os.name == "posix":                                                  # the rename itself, too
        directory = os.open(path.parent, os.O_RDONLY)
        os.fsync(directory)
        os.close(directory)


def _packed(tensors: dict[str, Tensor], metadata: dict[str, str]) -> bytes:
    """A safetensors file, its header sorted: the library orders metadata at random, and equal adapters should be equal files."""
    content = safetensors.torch.save(tensors, metadata)
    size = int.from_bytes(content[:8], "little")                            # the header's length, then the header, then the data
    header = json.dumps(json.loads(content[8:8 + size]), sort_keys=True).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + content[8 + size:]


def _shell(form: LoRAFormat) -> dict:
    """The fields that PEFT wants to see in every folder."""
    return {"peft_type": form.peft_type, "task_type": None, "base_model_name_or_path": None, "inference_mode": True, "bias": "none",
            "modules_to_save": None}


def _tensors(form: LoRAFormat, layers: dict[str, Adapter], options: dict) -> dict[str, Tensor]:
    """All that the weights file holds, by key."""
    own = {f"{PREFIX}{name}.{end}": tensor for name, layer in layers.items() for end, tensor in form.write(layer).items()}
    return own | form.write_shared(layers, **options)


def _read_config(file: Path) -> dict:
    try:
        config = json.loads(file.read_bytes())
    except OSError as error:
        raise ValueError(f"{file}: cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise ValueError(f"{file}: not whole JSON ({error})") from None
    kind = config.get("peft_type") if isinstance(config, dict) else type(config).__name__
    if not isinstance(kind, str) or kind not in PEFT_TYPES:
        raise ValueError(f"{file}: peft_type is {kind!r}; what can be loaded is {', '.join(map(repr, PEFT_TYPES))}")
    form = PEFT_TYPES[kind]
    allowed = ALLOWED | form.allowed
    for field, value in config.items():
        if field in allowed and value not in allowed[field]:
            hint = ""
            if field == "init_lora_weights" and str(value).startswith("pissa_niter"):
                hint = (": the randomized SVD that altered its base cannot be repeated. In PEFT, "
                        "save_pretrained(path_initial_model_for_weight_conversion=...) makes a LoRA of it, which loads here")
            raise ValueError(f"{file}: {field} = {value!r} is not supported; it may be {allowed[field]}{hint}")
        if field not in HARMLESS | form.read_fields | form.ignored_fields | {"peft_type", "target_modules"} | set(allowed) and value:
            raise ValueError(f"{file}: {field} = {value!r} changes what the adapter means and is not supported")
    return config


def _method(config: dict, file: Path) -> Method:
    """The method that PEFT's fields describe."""
    try:
        return PEFT_TYPES[config["peft_type"]].method(config)
    except KeyError as error:
        raise ValueError(f"{file}: the field {error} is missing") from None
    except (TypeError, ValueError) as error:
        raise ValueError(f"{file}: {error}") from None


def _saved_method(about: dict, file: Path) -> Method:
    """The method that the metadata names."""
    try:
        return METHODS[about["method"]](**about["fields"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{file}: its metadata names no method that is known here ({error}); was it saved by another version?") from None


def _mixed_up(file: Path, about: dict, field: str, found: object, saved: object) -> ValueError:
    return ValueError(f"{file}: does not belong to {WEIGHTS} beside it, which was saved as {about['method']} {about['fields']} on "
                      f"{len(about['layers'])} layers: {field} is {found!r} here and was {saved!r}; the file has been edited or mixed up")


def _layers(model: nn.Module, config: dict, file: Path) -> dict[str, nn.Linear]:
    """The layers that target_modules means: names, or in a string a regular expression of whole names, or all Linears."""
    targets = config.get("target_modules")
    if any(True for _ in adapters(model)):
        raise ValueError("load_adapter takes a plain model, and this one is adapted already: unload() or merge() it first")
    if isinstance(targets, str):
        linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and name]
        if targets == "all-linear":
            head = getattr(model, "get_output_embeddings", lambda: None)()
            targets = [name for name in linears if model.get_submodule(name) is not head]
        else:
            targets = [name for name in linears if re.fullmatch(targets, name)]
    if not isinstance(targets, list) or not targets:
        raise ValueError(f"{file}: target_modules = {config.get('target_modules')!r} names no layer of this model")
    try:
        return find_targets(model, targets)
    except ValueError as error:
        raise ValueError(f"{file}: target_modules: {error}") from None


def _read_tensors(file: Path) -> tuple[dict[str, Tensor], dict]:
    try:
        with safe_open(file, "pt") as opened:
            about = json.loads((opened.metadata() or {}).get("minilora", "{}"))
            if about and not (isinstance(about, dict) and {"method", "fields", "layers", "base"} <= about.keys()):
                raise ValueError("its metadata does not say which adapter this is")
            return {key: opened.get_tensor(key) for key in opened.keys()}, about
    except FileNotFoundError:
        raise ValueError(f"{file}: no such file") from None
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"{file}: damaged or cut short ({error})") from None


def _fill(form: LoRAFormat, wrapped: dict[str, Adapter], options: dict, tensors: dict[str, Tensor], file: Path) -> None:
    """Copy each tensor to its place, after checking every one; then see that what was read is what would be written."""
    expected = _tensors(form, wrapped, options)
    for verb, keys in (("is missing", expected.keys() - tensors.keys()), ("is unexpected", tensors.keys() - expected.keys())):
        if keys:
            more = f" (and {len(keys) - 1} more)" if len(keys) > 1 else ""
            raise ValueError(f"{file}: the tensor {min(keys)} {verb}{more}")
    for key, place in expected.items():
        if tensors[key].shape != place.shape:
            raise ValueError(f"{file}: {key} has shape {tuple(tensors[key].shape)}; "
                             f"this model and configuration need {tuple(place.shape)}")
        if not tensors[key].is_floating_point() or not tensors[key].isfinite().all():
            raise ValueError(f"{file}: {key} holds values that are not finite numbers")
    for name, layer in wrapped.items():
        form.read(layer, {end: tensors[f"{PREFIX}{name}.{end}"] for end in form.write(layer)})
    for key, now in _tensors(form, wrapped, options).items():
        now, saved = now.cpu(), tensors[key]
        same = torch.equal(now, saved) if now.dtype == saved.dtype else torch.allclose(now.float(), saved.float(), rtol=1e-2, atol=1e-6)
        if not same:
            raise ValueError(f"{file}: {key} is not what this configuration makes it: it has been edited, or comes from another seed")
