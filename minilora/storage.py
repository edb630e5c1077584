"""Adapters on disk in PEFT's layout, and checkpoints of a run. Nothing is ever half-written, and nothing that is loaded runs.

    folder/adapter_config.json           PEFT's field names: peft_type, r, lora_alpha, target_modules, …
    folder/adapter_model.safetensors     PEFT's keys: base_model.model.<layer>.lora_A.weight (rank, in), .lora_B.weight (out, rank)

formats.py says how each method is put in these terms, configuration.py how layers are named, and what is saved beside them. The safetensors
metadata, which PEFT ignores, also names the methods and the base: an adapter is an addition to one particular W.
"""

import dataclasses
import hashlib
import io
import json
import os
import re
from collections.abc import Collection
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from minilora.adapter import Adapter, Method, adapters, install, swapped, unwrapped, without_adapters
from minilora.formats import DTYPES, FORMATS, PEFT_TYPES, PEFTS_OWN, LoRAFormat
from minilora.gpt import TinyGPT
from minilora.safety import beside, configuration
from minilora.safety.configuration import PREFIX
from minilora.safety.conv1d import stands_for_conv1d

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PEFTS_COPIES = (".original_module.bias", ".modules_to_save.bias")     # bias = "all" makes PEFT write a saved module's bias three times
START_OVER = "remove it to start over (--force does, on the command line)"


def save_adapter(model: nn.Module, folder: str | Path, projection: bool = True) -> Path:
    """Write the model's adapter to `folder`, so that load_adapter here and PeftModel.from_pretrained in PEFT read it.

    What is trained beside the adapters (a head, norms, biases), and buffers that have moved, go with it: whole modules as PEFT's modules_to_save,
    or its bias = "all" and "lora_only". Names are the plain model's, also where it is compiled or inside DataParallel or an averaged copy.
    projection=False leaves VeRA's A and B out: the seed draws them again, and the loader knows by their digest if it did.

    Raises ValueError, nothing written, naming the layer or tensor that could not come back: layers of methods that one folder cannot hold together,
    an Adapter or Method that is not of this package, numbers that are not finite, a trained tensor that PEFT's format has no place for.
    """
    config, about, tensors = _content(model, projection)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / WEIGHTS, packed(tensors, {"format": "pt", "minilora": about}))
    write_atomically(folder / CONFIG, config)
    return folder


def described(model: nn.Module, projection: bool = True) -> tuple[bytes, str]:
    """What save_adapter writes beside the tensors: the configuration file, and the weights file's metadata."""
    return _content(model, projection)[:2]


def load_adapter(model: nn.Module, folder: str | Path, trainable: bool = False, any_base: bool = False) -> nn.Module:
    """Put the adapter in `folder` on a plain model, in place, and return it, in eval mode; trainable: to go on training it, its mode as it was.

    What the folder holds beside adapters (a trained head, norms, biases) takes the place of the model's own, which disabled() and unload() bring back.

    Raises ValueError naming the file and the key, the model unchanged, where a file is missing or damaged, a tensor is
    missing, unexpected, of the wrong shape or not finite, the configuration asks for what we do not do, or the adapter was made
    for another base (any_base=True loads it all the same).
    """
    if trainable and isinstance(model, DistributedDataParallel):
        raise ValueError("DistributedDataParallel would not see the adapters' gradients: load_adapter first, then wrap the model")
    with unwrapped(model) as plain:
        wrapped, values, trained = read_adapter(plain, folder, any_base)
        if not trainable:
            for adapter in wrapped.values():
                adapter.requires_grad_(False)
        install(plain, wrapped)
        with without_adapters(plain):
            beside.replace(plain, values, trained, trainable)
    return model if trainable else model.eval()


def method_name(folder: str | Path) -> str:
    """The name of the method that an adapter's folder was saved with, "" where PEFT has made it. Raises ValueError as load_adapter does."""
    return _read_tensors(_files(Path(folder))[1])[1].get("method", "")


def read_adapter(plain: nn.Module, folder: str | Path, any_base: bool = False) -> tuple[dict[str, Adapter], dict[str, Tensor], Collection[str]]:
    """The adapters in `folder` by the names of their layers, filled, each with this model's layer as its base, and not yet in their places; what is
    to stand beside them, by its name in the model; and which names of that were trained. The model is only looked at. Raises as load_adapter does."""
    config_file, weights_file = _files(Path(folder))
    config = configuration.read(config_file)
    tensors, about = _read_tensors(weights_file)
    linears = configuration.layers_meant(plain, config, config_file, peft_made=not about)
    methods = _methods(config, about, linears, config_file, weights_file)
    if about and about["layers"] != list(linears):
        raise _mixed_up(config_file, about, "target_modules", list(linears), about["layers"])
    with torch.random.fork_rng([]), torch.no_grad():     # the adapters' random starts are overwritten: spend no one's random numbers on them
        wrapped = _fresh(methods, linears, config, about, tensors, config_file, weights_file)
        places = configuration.places_beside(plain, linears, config)
        if about:
            _compare(plain, wrapped, config, about, places, any_base, config_file, weights_file)
        values = _fill(plain, wrapped, places, config, about, tensors, weights_file)
    return wrapped, values, about["beside"]["trained"] if about and values else values


def base_fingerprint(model: nn.Module, without: Collection[str] = ()) -> str:
    """SHA-256 of the base's names, shapes and bits, as the plain model's; adapters and wrappers do not count, nor the tensors named in `without`."""
    with unwrapped(model) as plain:
        return _fingerprint(plain, dict(adapters(plain)), without)


def _fingerprint(plain: nn.Module, wrapped: dict[str, Adapter], without: Collection[str]) -> str:
    """The same, with these adapters on it or about to be put on it."""
    digest = hashlib.sha256()
    with swapped(plain, {name: adapter.base for name, adapter in wrapped.items()}):
        for name, tensor in plain.state_dict().items():
            if isinstance(tensor, Tensor) and name not in without:
                digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
                tensor = getattr(tensor, "full_tensor", tensor.detach)()         # a sharded one is put together by all its processes
                digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def save_model(model: TinyGPT, path: str | Path) -> None:
    """A whole TinyGPT with its configuration, as load_base reads it. Raises ValueError, nothing written, where load_base could not: adapters on it,
    layers in four bits, tied weights, numbers that are not finite."""
    with unwrapped(model) as plain:
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in whole(plain).items()}
        with torch.device("meta"):
            expected = TinyGPT(plain.config).state_dict()
        for name in sorted(tensors.keys() ^ expected.keys()):
            if any(True for _ in adapters(plain)):
                why = "it has adapters: save_adapter() writes those, merge() folds them in"
            elif name.endswith(".codes") or f"{name.rpartition('.')[0]}.codes" in tensors:
                why = "a layer is in four bits: save the dense model, and quantize() what was loaded, which gives the same bits"
            else:
                why = "it is not a TinyGPT of its own configuration, or two of its weights are one"
            raise ValueError(f"{path}: load_base could not read this model back, because of {name}: {why}")
        for name, tensor in tensors.items():
            if not tensor.isfinite().all():
                raise ValueError(f"{path}: {name} holds values that are not finite numbers")
        write_atomically(path, packed(tensors, model_metadata(plain)))


def whole(model: nn.Module) -> dict[str, Tensor]:
    """All that makes the model, by its first name: a tied head is its embedding and is there once."""
    once = {}
    for name, tensor in model.state_dict().items():
        once.setdefault((tensor.data_ptr(), tensor.shape), (name, tensor))
    return dict(once.values())


def model_metadata(model: TinyGPT) -> dict[str, str]:
    return {"format": "pt", "gpt_config": json.dumps(dataclasses.asdict(model.config))}


def save_checkpoint(path: str | Path, identity: dict, state: dict) -> None:
    """The state of a run and whose run it is, in one file that is replaced whole. At its end stands its SHA-256: torch, which passes over
    it, would load numbers that a disk has damaged without a word."""
    content = io.BytesIO()
    torch.save({"identity": identity, "state": state}, content)
    write_atomically(path, content.getvalue() + hashlib.sha256(content.getvalue()).digest())


def load_checkpoint(path: str | Path, identity: dict) -> dict:
    """The state saved there. Raises ValueError where the file is damaged, or belongs to a run with other settings."""
    try:
        written = Path(path).read_bytes()
        content, digest = written[:-32], written[-32:]
        if hashlib.sha256(content).digest() != digest:
            raise EOFError
        saved = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)     # weights_only: data, never code
        state, theirs = saved["state"], saved["identity"]
    except Exception as error:
        raise ValueError(f"{path}: not a whole checkpoint ({type(error).__name__}); {START_OVER}") from None
    for key in identity:
        if theirs.get(key) != identity[key]:
            raise ValueError(f"{path}: a checkpoint of another run, whose {key} was {theirs.get(key)!r} and now is {identity[key]!r}; "
                             f"go on with the same settings, or {START_OVER}")
    return state


def write_atomically(path: str | Path, content: bytes) -> None:
    """All of it or nothing, whenever the power fails: a temporary file beside it, flushed to the disk, then renamed."""
    path = Path(path)
    beside = path.with_name(f".{path.name}.tmp")
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder; a file is to be written there")
    try:
        with open(beside, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except BaseException as error:
        beside.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise OSError(error.errno, error.strerror or str(error), str(path)) from None     # a full disk does not say which file it was
        raise
    if os.name == "posix":                                                  # the rename itself, too
        directory = os.open(path.parent, os.O_RDONLY)
        os.fsync(directory)
        os.close(directory)


def packed(tensors: dict[str, Tensor], metadata: dict[str, str]) -> bytes:
    """A safetensors file, its header sorted: the library orders metadata at random, and equal adapters should be equal files."""
    content = safetensors.torch.save(tensors, metadata)
    size = int.from_bytes(content[:8], "little")                            # the header's length, then the header, then the data
    header = json.dumps(json.loads(content[8:8 + size]), sort_keys=True).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + content[8 + size:]


def _content(model: nn.Module, projection: bool) -> tuple[bytes, str, dict[str, Tensor]]:
    """All of a folder, held against the model: the configuration file, the metadata, the tensors."""
    with unwrapped(model) as plain:
        layers = dict(adapters(plain))
        if not layers:
            raise ValueError("nothing to save: this model has no adapters (after full fine-tuning save the whole model)")
        _check_together(layers)
        with without_adapters(plain):
            only_bias = _first_form(layers).only_bias
            extra = configuration.fields_beside(plain, layers, beside.changed(plain, layers), only_bias)
            config = _config(plain, layers, extra, projection)
            places = configuration.places_beside(plain, layers, config)
            about = _about(layers, projection) | {"base": _fingerprint(plain, {}, places.values())}
            if extra:
                about["beside"] = extra | {"trained": beside.trained(plain, places.values())}
            found = plain.state_dict()
            values = {key: found[name] for key, name in places.items()}
        tensors = {key: tensor.detach().cpu().clone().contiguous() for key, tensor in (_tensors(layers, FORMATS, projection) | values).items()}
    for key, tensor in tensors.items():
        if not _is_sound(tensor, beside=key in values):
            raise ValueError(f"not saved: {key} holds values that are not finite numbers; training has diverged, a lower learning rate may help")
    about["digest"] = _digest(tensors, about)
    return (json.dumps(config, indent=2) + "\n").encode(), json.dumps(about), tensors


def _check_together(layers: dict[str, Adapter]) -> None:
    """Each layer is what its method makes, and one folder can hold them all."""
    first, usual = next((name, layer.method) for name, layer in layers.items())
    for name, layer in layers.items():
        method, form = layer.method, FORMATS.get(type(layer.method))
        if form is None:
            kind = type(method).__name__
            raise ValueError(f"{name}: {kind} has no form on disk. Say which: minilora.formats.FORMATS[{kind}] = LoRAFormat(), where it adds nothing to "
                             "LoRA's A and B, or a class like those in that file; the program that loads needs the same line")
        try:
            form.check(layer)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        if method != usual and (form.one_for_all or FORMATS[type(usual)].one_for_all):
            raise ValueError(f"{name} has {method}, and {first} has {usual}: such layers cannot share a folder; save the parts of the model one by "
                             "one, each in a folder of its own: save_adapter(model.part, ...)")


def _about(layers: dict[str, Adapter], projection: bool) -> dict:
    """What PEFT has no field for: the layers' methods, and in what state they are."""
    usual, state = _named(next(iter(layers.values())).method), {}
    for form, same in _by_form(layers).items():
        state |= form.state(same, projection)
    others = {name: _named(layer.method) for name, layer in layers.items() if _named(layer.method) != usual}
    return usual | {"layers": list(layers), "state": state} | ({"others": others} if others else {})


def _named(method: Method) -> dict:
    return {"method": type(method).__name__, "fields": dataclasses.asdict(method)}


def _config(plain: nn.Module, layers: dict[str, Adapter], extra: dict, projection: bool) -> dict:
    """adapter_config.json. extra: PEFT's fields for what is saved beside the adapters."""
    form = _first_form(layers)
    shell = {"peft_type": form.peft_type, "task_type": None, "base_model_name_or_path": getattr(plain, "name_or_path", None) or None, "inference_mode": True,
             "bias": extra.get("bias", "none"), "modules_to_save": extra.get("modules_to_save"),
             "fan_in_fan_out": any(stands_for_conv1d(layer.base) for layer in layers.values())}
    return shell | {"target_modules": configuration.targets(plain, layers)} | form.config(layers, projection)


def _tensors(layers: dict[str, Adapter], forms: dict, projection: bool) -> dict[str, Tensor]:
    """All that the weights file holds of the adapters, by key."""
    own = {f"{PREFIX}{name}.{end}": tensor for name, layer in layers.items() for end, tensor in forms[type(layer.method)].write(layer).items()}
    return own | _first_form(layers).write_shared(layers, projection)


def _first_form(layers: dict[str, Adapter]) -> LoRAFormat:
    return FORMATS[type(next(iter(layers.values())).method)]


def _by_form(layers: dict[str, Adapter], forms: dict = FORMATS) -> dict[LoRAFormat, dict[str, Adapter]]:
    found: dict[LoRAFormat, dict[str, Adapter]] = {}
    for name, layer in layers.items():
        found.setdefault(forms[type(layer.method)], {})[name] = layer
    return found


def _is_sound(tensor: Tensor, beside: bool) -> bool:
    """Finite numbers. Beside the adapters there may be infinities (a mask) and whole numbers (a counter)."""
    if not tensor.is_floating_point():
        return beside
    tensor = tensor.float() if tensor.dtype.itemsize == 1 else tensor                # of float8 torch does not know isfinite
    return not tensor.isnan().any() if beside else bool(tensor.isfinite().all())


def _digest(tensors: dict[str, Tensor], about: dict) -> str:
    """SHA-256 of all that the weights file says, so that nothing in it changes unseen."""
    digest = hashlib.sha256(json.dumps({key: value for key, value in about.items() if key != "digest"}, sort_keys=True).encode())
    for key in sorted(tensors):
        digest.update(f"{key} {tensors[key].dtype}".encode())
        digest.update(tensors[key].reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _files(folder: Path) -> tuple[Path, Path]:
    """The two files; or what to do, where they are not there."""
    config, weights = folder / CONFIG, folder / WEIGHTS
    if folder.is_file():
        raise ValueError(f"{folder} is a file; load_adapter takes the folder that holds {CONFIG} and {WEIGHTS}")
    if not weights.exists() and (folder / "adapter_model.bin").exists():
        raise ValueError(f"{folder} holds adapter_model.bin, a pickle, which could run code, and no {WEIGHTS}. If you trust it, make one of it: "
                         "safetensors.torch.save_file(torch.load('adapter_model.bin', weights_only=True), 'adapter_model.safetensors')")
    if folder.is_dir() and not config.exists() and not weights.exists():
        below = sorted(file.parent.relative_to(folder).as_posix() for depth in ("*", "*/*") for file in folder.glob(f"{depth}/{CONFIG}"))
        raise ValueError(f"{folder} holds no {CONFIG}" + (f"; folders in it do, load one of them: {', '.join(below)}" if below else ""))
    return config, weights


def _read_tensors(file: Path) -> tuple[dict[str, Tensor], dict]:
    try:
        with safe_open(file, "pt") as opened:
            about = json.loads((opened.metadata() or {}).get("minilora", "{}"))
            if about != {}:
                _check_metadata(about)
            return {key: opened.get_tensor(key) for key in opened.keys()}, about
    except FileNotFoundError:
        raise ValueError(f"{file}: no such file") from None
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{file}: damaged or cut short ({error})") from None


def _check_metadata(about: object) -> None:
    """Raises ValueError where an entry is missing or of another kind."""
    if not isinstance(about, dict) or not {"method", "fields", "layers", "base"} <= about.keys():
        raise ValueError("its metadata does not say which adapter this is")
    extra = about.get("beside", {"trained": []})
    trained = extra.get("trained") if isinstance(extra, dict) else None
    for entry, value, kind in (("method", about["method"], str), ("layers", about["layers"], list), ("base", about["base"], str),
                               ("state", about.get("state") or {}, dict), ("others", about.get("others", {}), dict), ("beside", trained, list)):
        if not isinstance(value, kind):
            raise ValueError(f"the entry {entry!r} of its metadata is {about[entry]!r}")


def _methods(config: dict, about: dict, layers: Collection[str], config_file: Path, weights_file: Path) -> dict[Method, list[str]]:
    """The methods, and which layers have each: as PEFT's fields say, or as our metadata names them."""
    try:
        found = PEFT_TYPES[config["peft_type"]].methods(config, layers)
    except KeyError as error:
        raise ValueError(f"{config_file}: the field {error} is missing") from None
    except (TypeError, ValueError, OverflowError, re.error) as error:
        raise ValueError(f"{config_file}: {error}") from None
    groups: dict[Method, list[str]] = {}
    try:
        if about:
            kinds, others = {kind.__name__: kind for kind in FORMATS}, about.get("others", {})
            found = {name: kinds[said["method"]](**said["fields"]) for name in layers for said in [others.get(name, about)]}
        for name, method in found.items():
            groups.setdefault(method, []).append(name)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{weights_file}: its metadata names no method that is known here ({error}); was it saved by another version?") from None
    return groups


def _fresh(methods: dict[Method, list[str]], linears: dict[str, nn.Linear], config: dict, about: dict, tensors: dict[str, Tensor],
           config_file: Path, weights_file: Path) -> dict[str, Adapter]:
    """Adapters, ready to be filled and put in their places."""
    made, by_layer = {}, _by_layer(linears, tensors)
    try:
        for method, names in methods.items():
            for name in names:
                FORMATS[type(method)].fits(method, by_layer[name])
            made |= method.wrap({name: linears[name] for name in names})
        wrapped = {name: made[name] for name in linears}
        for form, layers in _by_form(wrapped, PEFTS_OWN if not about else FORMATS).items():
            form.restore(layers, (about.get("state") or {}) if about else None, config, tensors)
    except ValueError as error:
        raise ValueError(f"{config_file}: {error}") from None
    except (KeyError, TypeError) as error:
        raise ValueError(f"{weights_file}: its metadata lacks the state of {about['method']}; the file has been edited" if about else
                         f"{config_file}: its fields make no sense together ({error})") from None
    return wrapped


def _by_layer(names: Collection[str], tensors: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Each layer's tensors, by the end of their keys."""
    found: dict[str, dict[str, Tensor]] = {name: {} for name in names}
    for key, tensor in tensors.items():
        *parts, end = key.removeprefix(PREFIX).split(".")
        if ".".join(parts) not in found:
            *parts, before = parts or [""]
            end = f"{before}.{end}"
        if ".".join(parts) in found:
            found[".".join(parts)][end] = tensor
    return found


def _compare(plain: nn.Module, wrapped: dict[str, Adapter], config: dict, about: dict, places: dict[str, str], any_base: bool,
             config_file: Path, weights_file: Path) -> None:
    """Raises ValueError where a folder of ours was made for another base, or its configuration is not the one that was written with its weights."""
    written = _config(plain, wrapped, about.get("beside", {}), config.get("save_projection", True))
    for field in sorted((config.keys() | written.keys()) - configuration.HARMLESS):
        if (config.get(field) or None) != (written.get(field) or None):
            raise _mixed_up(config_file, about, field, config.get(field), written.get(field))
    base = _fingerprint(plain, wrapped, places.values())
    if about["base"] != base and not any_base:
        raise ValueError(f"{weights_file}: made for another base (fingerprint {about['base'][:12]}, this model's is "
                         f"{base[:12]}); load the base it was trained on, or pass any_base=True")


def _mixed_up(file: Path, about: dict, field: str, found: object, saved: object) -> ValueError:
    return ValueError(f"{file}: does not belong to {WEIGHTS} beside it, which was saved as {about['method']} {about['fields']} on "
                      f"{len(about['layers'])} layers: {field} is {found!r} here and was {saved!r}; the file has been edited or mixed up")


def _fill(plain: nn.Module, wrapped: dict[str, Adapter], places: dict[str, str], config: dict, about: dict, tensors: dict[str, Tensor],
          file: Path) -> dict[str, Tensor]:
    """Copy each tensor to its place in the adapters, after checking every one; then see that what was read is what would be written.
    Returns the tensors that are to stand beside the adapters, by their names in the plain model."""
    forms, projection, model = FORMATS if about else PEFTS_OWN, config.get("save_projection", True), plain.state_dict()
    beside = {key: model[name] for key, name in places.items()}
    expected = _tensors(wrapped, forms, projection) | beside
    unexpected = {key for key in tensors.keys() - expected.keys() if not (places and key.endswith(PEFTS_COPIES))}
    for verb, keys in (("is missing", expected.keys() - tensors.keys()), ("is unexpected", unexpected)):
        if keys:
            more = f" (and {len(keys) - 1} more)" if len(keys) > 1 else ""
            raise ValueError(f"{file}: the tensor {min(keys)} {verb}{more}")
    for key, place in expected.items():
        if tensors[key].shape != place.shape:
            raise ValueError(f"{file}: {key} has shape {tuple(tensors[key].shape)}; "
                             f"this model and configuration need {tuple(place.shape)}")
        if not _is_sound(tensors[key], beside=key in beside and tensors[key].is_floating_point() == place.is_floating_point()):
            raise ValueError(f"{file}: {key} holds values that are not finite numbers")
    for name, own in _by_layer(wrapped, tensors).items():
        layer, form = wrapped[name], forms[type(wrapped[name].method)]
        dtype = next(iter(own.values())).dtype
        if about and dtype in DTYPES.values():
            form.cast(layer, dtype)
        form.read(layer, own)
    for key, now in _tensors(wrapped, forms, projection).items():
        now, saved = now.cpu(), tensors[key]
        same = torch.equal(now, saved) if now.dtype == saved.dtype else torch.allclose(now.float(), saved.float(), rtol=1e-2, atol=1e-6)
        if not same:
            raise ValueError(f"{file}: {key} is not what this configuration makes it: it has been edited, or comes from another seed")
    if about.get("digest", "") not in ("", _digest(tensors, about)):
        raise ValueError(f"{file}: not as it was written: a number or an entry of its metadata has changed; it is damaged, or was edited")
    return {name: tensors[key] for key, name in places.items()}
