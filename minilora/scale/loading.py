"""A transformers model from its folder or hub name, tensor by tensor. In four bits, the dense base never exists as a whole.

    config.json                              ->  the model on torch's meta device: shapes and no numbers
    a tensor of model.safetensors            ->  read, cast, put in its place; a target's weight goes into four bits at once
    what no file holds (rotary frequencies)  ->  made as transformers makes it

At its peak the memory holds the finished model and one dense tensor, two where it is cast. Nothing that is loaded runs: no pickles, no code
from the hub.
"""

import json
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from tqdm import tqdm

from minilora.adapter import find_targets, put
from minilora.quant.linear import NF4Linear, quantize
from minilora.safety.configuration import read_json

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "sentencepiece.bpe.model")     # one of them there must be
SMALL_FILES = ["*.json", "*.txt", "*.model", "*.jinja"]
INSTALL = "pip install 'transformers>=5' tokenizers"
FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
WHOLE = {"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool}


class Stored(NamedTuple):
    """Where a tensor lies on the disk, and its form: from `start` on, row by row."""

    file: Path
    start: int
    shape: tuple[int, ...]
    dtype: str


def load_model(source: str | Path, four_bits: bool = False, dtype: torch.dtype | None = None, device: torch.device | str = "cpu") -> nn.Module:
    """A causal language model, in eval mode, bit for bit what AutoModelForCausalLM.from_pretrained makes of it.

    source: a folder with config.json and model.safetensors (or its shards and their index), or a name on the hub, as "Qwen/Qwen2.5-0.5B".
    four_bits: with the layers in four bits that ml.quantize picks, bit for bit as it makes them.     dtype: None for the checkpoint's own.

    Raises ValueError in one line where transformers is absent, the folder or the hub has no such model, it is no causal language model or is
    quantized already, a file is missing, damaged or a pickle, or a tensor is missing, unexpected or of the wrong shape.
    """
    folder = _folder(source)
    config = _config(folder)
    stored = _stored(folder)
    model = _skeleton(folder, config, str(source), dtype or _dtype_of(config, stored))
    places = _places(model, stored)
    if places is None:
        return _converted(folder, model, four_bits, device)
    missing = _compare(folder, model, stored, places)
    targets = find_targets(model, tell=True) if four_bits else {}
    _fill(model, stored, places, targets, device)
    _complete(folder, model, missing, device)
    return model.eval()


def load_tokenizer(source: str | Path):
    """The tokenizer beside the model, a transformers one. Raises ValueError in one line where there is none, or transformers is absent."""
    folder = _folder(source, weights=False)
    from transformers import AutoTokenizer

    if not any((folder / name).exists() for name in TOKENIZERS):
        raise ValueError(f"{folder} holds no tokenizer ({TOKENIZERS[0]}): save the model's own there with tokenizer.save_pretrained({str(folder)!r})")
    try:
        with quiet():
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
            works = len(tokenizer("a b", add_special_tokens=False).input_ids) > 0
    except Exception as error:                                       # each tokenizer library has errors of its own
        raise ValueError(f"{folder}: its tokenizer cannot be read ({first_line(error)})") from None
    if not works:
        raise ValueError(f"{folder}: its tokenizer gives no tokens; its vocabulary is missing or empty")
    return tokenizer


def _folder(source: str | Path, weights: bool = True) -> Path:
    """The folder itself, or the place on this disk where the hub's files are by now."""
    try:
        import transformers  # noqa: F401
    except ImportError:
        raise ValueError(f"{source}: real models are built by transformers, which is not installed: {INSTALL}") from None
    folder, name = Path(source), str(source)
    if folder.is_dir():
        if not (folder / CONFIG).exists() and (folder / "model" / CONFIG).exists():
            raise ValueError(f"{folder} is a run, which has left a model in it: name {folder / 'model'}")
        if not (folder / CONFIG).exists() and (folder / "adapter_config.json").exists():
            raise ValueError(f"{folder} is an adapter: name the model that it was made for, and this as the adapter")
        return folder
    if folder.exists():
        raise ValueError(f"{source} is a file; a model is a folder with {CONFIG} and {WEIGHTS}, or a name on the hub")
    if isinstance(source, Path) or name.startswith((".", "/", "~")) or name.count("/") > 1 or "\\" in name:
        raise ValueError(f"{source}: no such folder")
    from huggingface_hub import snapshot_download

    try:
        with quiet():
            folder = Path(snapshot_download(name, allow_patterns=SMALL_FILES))
            if weights:
                shards = {*_table(folder / INDEX).values()} if (folder / INDEX).exists() else {WEIGHTS}
                folder = Path(snapshot_download(name, allow_patterns=[*SMALL_FILES, *shards]))
        return folder
    except Exception as error:                                       # the hub's own, the network's, the disk's
        raise ValueError(f"{name}: no such folder here, and the hub did not give it ({type(error).__name__}: {first_line(error)})") from None


def _config(folder: Path):
    """The configuration of a causal language model that transformers knows."""
    from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig

    file = folder / CONFIG
    kind = _read_json(file).get("model_type")
    try:
        with quiet():
            config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:
        if not isinstance(kind, str):
            raise ValueError(f"{file}: it names no model_type") from None
        what = f"its fields make no {kind}" if kind in CONFIG_MAPPING else f"the architecture {kind!r} is not one that this transformers knows"
        raise ValueError(f"{file}: {what} ({first_line(error)})") from None
    heads = [str(name) for name in config.architectures or [] if re.search(r"For(?!CausalLM)[A-Z]", str(name))]
    if getattr(config, "is_encoder_decoder", False) or type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING or heads:
        what = (heads or config.architectures or [config.model_type])[0]
        raise ValueError(f"{file}: {what} is no causal language model, one that continues its own text")
    if getattr(config, "quantization_config", None):
        raise ValueError(f"{file}: this checkpoint is quantized already, by another library; load the model as it was before")
    return config


def _stored(folder: Path) -> dict[str, Stored]:
    """Every tensor of the checkpoint. Only the files' headers are read."""
    index, table = folder / INDEX, {}
    if (folder / WEIGHTS).exists():
        files = [folder / WEIGHTS]
    elif index.exists():
        table = _table(index)
        files = [folder / name for name in dict.fromkeys(table.values())]
    else:
        pickles = sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth") for file in folder.glob(pattern))
        if pickles:
            raise ValueError(f"{folder} holds {pickles[0]}, a pickle, which could run code, and no {WEIGHTS}. If you trust it, load it with "
                             "transformers and save it again: save_pretrained writes safetensors")
        raise ValueError(f"{folder} holds no weights: neither {WEIGHTS} nor {INDEX}")
    found = {}
    for file in files:
        try:
            with safe_open(file, "pt"):                              # which looks whether header and length agree
                pass
            with open(file, "rb") as opened:
                size = int.from_bytes(opened.read(8), "little")      # the header's length, then the header, then the data
                header = json.loads(opened.read(size))
            found |= {name: Stored(file, 8 + size + about["data_offsets"][0], tuple(about["shape"]), about["dtype"])
                      for name, about in header.items() if name != "__metadata__"}
        except FileNotFoundError:
            raise ValueError(f"{file}: no such file, and {INDEX} names it: a shard is missing") from None
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{file}: damaged or cut short ({first_line(error)})") from None
    for name, shard in table.items():
        if name not in found:
            raise ValueError(f"{folder / shard}: the tensor {name} is missing, and {INDEX} says that it is there")
    return found


def _table(index: Path) -> dict[str, str]:
    """Which file holds which tensor."""
    table = _read_json(index).get("weight_map")
    if not isinstance(table, dict) or not table or not all(isinstance(name, str) and Path(name).name == name for name in table.values()):
        raise ValueError(f"{index}: its weight_map does not say which file holds which tensor")
    return table


def _read_json(file: Path) -> dict:
    if not file.exists():
        raise ValueError(f"{file}: no such file; a model's folder holds {CONFIG} and {WEIGHTS}")
    return read_json(file)


def _dtype_of(config, stored: dict[str, Stored]) -> torch.dtype:
    """As from_pretrained has it: what the configuration says, else what the first tensor of floating-point numbers has."""
    first = next((FLOATS[tensor.dtype] for tensor in stored.values() if tensor.dtype in FLOATS), torch.float32)
    said = getattr(config, "dtype", None)
    return getattr(torch, said) if isinstance(said, str) else said or first


def _skeleton(folder: Path, config, name: str, dtype: torch.dtype) -> nn.Module:
    """The model on the meta device."""
    from transformers import AutoModelForCausalLM

    config.name_or_path = name
    try:
        with quiet(), torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
    except Exception as error:                                       # sizes that do not go together fail in many ways
        raise ValueError(f"{folder / CONFIG}: no model can be built of it ({type(error).__name__}: {first_line(error)})") from None


def _places(model: nn.Module, stored: dict[str, Stored]) -> dict[str, str] | None:
    """The model's name for each tensor of the checkpoint: often the same, or without "transformer.". None where transformers does more to
    them than rename."""
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
    except ImportError:
        import transformers
        raise ValueError(f"transformers {transformers.__version__} is older than this loader reads: {INSTALL}") from None
    rules, prefix, expected, places = get_model_conversion_mapping(model), model.base_model_prefix, model.state_dict(), {}
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    if len(renamings) + len(converters) < len(rules) or _keeps_some_wide(model):
        return None
    for name in stored:
        place, converter = rename_source_key(name, renamings, converters, prefix, expected)
        if place not in expected and name in expected:
            place, converter = rename_source_key(name, [], [], prefix, expected)
        if converter:
            return None
        places[name] = place
    return places


def _keeps_some_wide(model: nn.Module) -> bool:
    """Whether some layers stay in float32 where the others have 16 bits."""
    fields = {torch.float16: ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict"), torch.bfloat16: ("_keep_in_fp32_modules_strict",)}
    return any(getattr(model, field, None) for field in fields.get(model.dtype, ()))


def _compare(folder: Path, model: nn.Module, stored: dict[str, Stored], places: dict[str, str]) -> set[str]:
    """Which of the model's tensors the checkpoint does not hold, and need not. Raises ValueError where it lacks one, or has another, or another shape."""
    expected, there, buffers = model.state_dict(), set(places.values()), [name for name, _ in model.named_buffers()]
    ignored = list(model._keys_to_ignore_on_load_unexpected or [])
    ignored += [rf"(^|\.){end}$" for end in ("rotary_emb.inv_freq", "position_ids") if any(name.endswith(end) for name in buffers)]
    missing, tied = expected.keys() - there, model.all_tied_weights_keys
    for other, first in tied.items():
        if there & {first, *(name for name, source in tied.items() if source == first)}:
            missing -= {other, first}
    missing = {name for name in missing if not any(re.search(pattern, name) for pattern in model._keys_to_ignore_on_load_missing or [])}
    unexpected = {name for name, place in places.items() if place not in expected and not any(re.search(pattern, place) for pattern in ignored)}
    for verb, names in (("is missing", missing), ("is unexpected", unexpected)):
        if names:
            more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
            raise ValueError(f"{folder}: the tensor {min(names)} {verb}{more}; a {type(model).__name__} of its {CONFIG} has {len(expected)} tensors")
    for name, place in places.items():
        if place in expected:
            file, _, shape, dtype = stored[name]
            if shape != tuple(expected[place].shape):
                raise ValueError(f"{file}: {name} has shape {shape}; its {CONFIG} needs {tuple(expected[place].shape)}")
            if dtype not in (FLOATS if expected[place].is_floating_point() else WHOLE):
                raise ValueError(f"{file}: {name} is stored as {dtype}, quantized by another library; load the model as it was before")
    return expected.keys() - there


def _fill(model: nn.Module, stored: dict[str, Stored], places: dict[str, str], targets: dict[str, nn.Linear], device: torch.device | str) -> None:
    """Read each tensor and put it in its place, the targets' weights in four bits."""
    expected = model.state_dict()
    for name, where in tqdm(stored.items(), "reading", unit="tensor", leave=False, disable=None):       # shown on a terminal only
        place = places[name]
        if place in expected:
            _set(model, place, _read(where).to(device, expected[place].dtype))
        owner, _, leaf = place.rpartition(".")
        if leaf == "weight" and owner in targets:
            try:
                layer = NF4Linear.of(targets.pop(owner))             # popped, so that nothing holds the dense weight any longer
            except ValueError as error:
                raise ValueError(f"{where.file}: {name}: {error}") from None
            layer._is_hf_initialized = True
            put(model, owner, layer)


def _read(where: Stored) -> Tensor:
    """One tensor, from the disk straight into memory of its own."""
    tensor = torch.empty(where.shape, dtype=(FLOATS | WHOLE)[where.dtype])
    try:
        with open(where.file, "rb") as file:
            file.seek(where.start)
            size = file.readinto(tensor.reshape(-1).view(torch.uint8).numpy())
    except OSError as error:
        raise ValueError(f"{where.file}: cannot be read ({error.strerror})") from None
    if size != tensor.nbytes:
        raise ValueError(f"{where.file}: cut short while it was read")
    return tensor


def _set(model: nn.Module, place: str, tensor: Tensor, is_ready: bool = True) -> None:
    owner, _, leaf = place.rpartition(".")
    module = model.get_submodule(owner)
    if leaf in module._parameters:
        tensor = nn.Parameter(tensor, requires_grad=tensor.is_floating_point())
    tensor._is_hf_initialized = is_ready                             # transformers fills what has no such mark
    setattr(module, leaf, tensor)


def _complete(folder: Path, model: nn.Module, missing: set[str], device: torch.device | str) -> None:
    """What the checkpoint does not hold, as from_pretrained makes it: tied weights, buffers that are computed."""
    from transformers import GenerationConfig

    for name in missing:
        if name in model.all_tied_weights_keys:
            model.get_parameter(name)._is_hf_initialized = True      # will be another's
        else:
            _set(model, name, torch.empty_like(model.state_dict()[name], device=device), is_ready=False)
    for name, buffer in list(model.named_non_persistent_buffers()):
        _set(model, name, torch.empty_like(buffer, device=device), is_ready=False)
    device = torch.device(device)
    with quiet(), torch.random.fork_rng([device] if device.type == "cuda" else []):     # some models draw before they look what is missing
        model.initialize_weights()
        model.tie_weights(missing_keys=set(missing), recompute_mapping=False)
        if (folder / "generation_config.json").exists():
            try:
                model.generation_config = GenerationConfig.from_pretrained(folder)
            except Exception as error:
                raise ValueError(f"{folder / 'generation_config.json'}: cannot be read ({first_line(error)})") from None
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_meta:
            raise ValueError(f"{folder}: {name} is still without numbers after all files were read")


def _converted(folder: Path, model: nn.Module, four_bits: bool, device: torch.device | str) -> nn.Module:
    """Loaded by transformers, which makes the model's tensors of the checkpoint's; then put in four bits."""
    from transformers import AutoModelForCausalLM

    warnings.warn(f"{folder}: transformers converts this checkpoint's tensors as it loads them" + (
        ", so the base exists densely before it is put in four bits" if four_bits else ""), stacklevel=3)
    name = model.name_or_path
    try:
        with quiet():
            model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=model.dtype, use_safetensors=True, trust_remote_code=False,
                                                               output_loading_info=True)
    except Exception as error:
        raise ValueError(f"{folder}: transformers cannot load it ({type(error).__name__}: {first_line(error)})") from None
    for verb, key in (("is missing", "missing_keys"), ("is unexpected", "unexpected_keys"), ("has the wrong shape", "mismatched_keys")):
        if info[key]:
            raise ValueError(f"{folder}: the tensor {min(map(str, info[key]))} {verb}")
    model.name_or_path = model.config.name_or_path = name
    model = model.to(device)
    return quantize(model) if four_bits else model


@contextmanager
def quiet() -> Iterator[None]:
    """transformers without its progress bars and advice: what matters here is an error, or a warning of ours."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def first_line(error: BaseException) -> str:
    """An error's first line that says something."""
    return next((line.strip().rstrip(" :.") for line in str(error).splitlines() if line.strip()), type(error).__name__)
