"""Adapters on disk in PEFT's layout, and checkpoints of a run. Nothing is ever half-written, and nothing that is loaded runs.

    folder/adapter_config.json           PEFT's field names: peft_type, r, lora_alpha, target_modules, …
    folder/adapter_model.safetensors     PEFT's keys: base_model.model.<layer>.lora_A.weight (rank, in), .lora_B.weight (out, rank)

The safetensors metadata, which PEFT ignores, also names the method and the base: an adapter is an addition to one particular W.
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

from minilora.adapter import Adapter, Method, adapters, disabled, find_targets, install
from minilora.gpt import TinyGPT
from minilora.methods import LoRA

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
TENSORS = {"A": "lora_A.weight", "B": "lora_B.weight"}

# Of PEFT's LoraConfig: what we read, what changes nothing, and what must have this value because we do nothing else.
READ = {"peft_type", "r", "lora_alpha", "lora_dropout", "use_rslora", "target_modules"}
HARMLESS = {"auto_mapping", "base_model_name_or_path", "inference_mode", "megatron_core", "peft_version", "qalora_group_size",
            "revision", "task_type"}
ALLOWED = {"bias": ["none"], "init_lora_weights": [True, False, "gaussian"]}    # the other inits alter the base


def save_adapter(model: nn.Module, folder: str | Path) -> Path:
    """Write the model's adapter to `folder`, so that load_adapter here and PeftModel.from_pretrained in PEFT read it."""
    found = dict(adapters(model))
    if not found:
        raise ValueError("nothing to save: this model has no adapters (after full fine-tuning save the whole model)")
    method = next(iter(found.values())).method
    tensors = {f"{PREFIX}{name}.{TENSORS[tensor]}": getattr(layer, tensor).detach().cpu().contiguous()
               for name, layer in found.items() for tensor in TENSORS}
    about = {"method": type(method).__name__, "fields": dataclasses.asdict(method), "layers": list(found),
             "base": base_fingerprint(model)}
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / WEIGHTS, _packed(tensors, {"format": "pt", "minilora": json.dumps(about)}))
    write_atomically(folder / CONFIG, (json.dumps(_peft_config(method, list(found)), indent=2) + "\n").encode())
    return folder


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
    layers = _layers(model, config, config_file)
    if about:
        if about["fields"] != dataclasses.asdict(method) or about["layers"] != list(layers):
            raise ValueError(f"{config_file}: does not belong to {WEIGHTS} beside it, which was saved as {about['method']} "
                             f"{about['fields']} on {len(about['layers'])} layers; the file has been edited or mixed up")
        base = base_fingerprint(model)
        if about["base"] != base and not any_base:
            raise ValueError(f"{weights_file}: made for another base (fingerprint {about['base'][:12]}, this model's is "
                             f"{base[:12]}); load the base it was trained on, or pass any_base=True")
    with torch.random.fork_rng([]):                 # the adapters' random starts are overwritten: spend no one's random numbers on them
        wrapped = method.wrap(layers)
    _fill(wrapped, tensors, weights_file)
    for adapter in wrapped.values():
        for tensor in TENSORS:
            getattr(adapter, tensor).requires_grad_(trainable)
    return install(model, wrapped)


def base_fingerprint(model: nn.Module) -> str:
    """SHA-256 of the base's names, shapes and bits; the adapters on it do not count."""
    digest = hashlib.sha256()
    with disabled(model):
        for name, tensor in model.state_dict().items():
            if isinstance(tensor, Tensor):
                digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
                digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def save_model(model: TinyGPT, path: str | Path) -> None:
    """A whole TinyGPT with its configuration, as load_base reads it."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    write_atomically(path, _packed(tensors, {"format": "pt", "gpt_config": json.dumps(dataclasses.asdict(model.config))}))


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


def _peft_config(method: LoRA, layers: list[str]) -> dict:
    return {
        "peft_type": "LORA", "task_type": None, "base_model_name_or_path": None, "inference_mode": True,
        "r": method.rank, "lora_alpha": int(method.alpha) if method.alpha == int(method.alpha) else method.alpha,
        "lora_dropout": method.dropout, "use_rslora": method.rslora, "target_modules": layers,
        "bias": "none", "fan_in_fan_out": False, "init_lora_weights": True, "modules_to_save": None,
    }


def _read_config(file: Path) -> dict:
    try:
        config = json.loads(file.read_bytes())
    except OSError as error:
        raise ValueError(f"{file}: cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise ValueError(f"{file}: not whole JSON ({error})") from None
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        kind = config.get("peft_type") if isinstance(config, dict) else type(config).__name__
        raise ValueError(f"{file}: peft_type is {kind!r}; what can be loaded is 'LORA'")
    for field, value in config.items():
        if field in ALLOWED and value not in ALLOWED[field]:
            raise ValueError(f"{file}: {field} = {value!r} is not supported; it may be {ALLOWED[field]}")
        if field not in READ | HARMLESS | set(ALLOWED) and value:
            raise ValueError(f"{file}: {field} = {value!r} changes what the adapter means and is not supported")
    return config


def _method(config: dict, file: Path) -> LoRA:
    try:
        return LoRA(rank=config["r"], alpha=float(config["lora_alpha"]), dropout=float(config.get("lora_dropout", 0.0)),
                    rslora=bool(config.get("use_rslora", False)))
    except KeyError as error:
        raise ValueError(f"{file}: the field {error} is missing") from None
    except (TypeError, ValueError) as error:
        raise ValueError(f"{file}: {error}") from None


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
            return {key: opened.get_tensor(key) for key in opened.keys()}, about
    except FileNotFoundError:
        raise ValueError(f"{file}: no such file") from None
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"{file}: damaged or cut short ({error})") from None


@torch.no_grad()
def _fill(wrapped: dict[str, Adapter], tensors: dict[str, Tensor], file: Path) -> None:
    """Copy each tensor to its place, after checking every one."""
    places = {f"{PREFIX}{name}.{TENSORS[tensor]}": getattr(adapter, tensor)
              for name, adapter in wrapped.items() for tensor in TENSORS}
    for verb, keys in (("is missing", places.keys() - tensors.keys()), ("is unexpected", tensors.keys() - places.keys())):
        if keys:
            more = f" (and {len(keys) - 1} more)" if len(keys) > 1 else ""
            raise ValueError(f"{file}: the tensor {min(keys)} {verb}{more}")
    for key, place in places.items():
        if tensors[key].shape != place.shape:
            raise ValueError(f"{file}: {key} has shape {tuple(tensors[key].shape)}; "
                             f"this model and configuration need {tuple(place.shape)}")
        if not tensors[key].is_floating_point() or not tensors[key].isfinite().all():
            raise ValueError(f"{file}: {key} holds values that are not finite numbers")
        place.copy_(tensors[key])
