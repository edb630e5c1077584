"""An adapter as data: what its folder says, or what a live model would write. No model is needed, and what cannot be read is not guessed.

    layers     name -> the layer's tensors, by the ends of PEFT's keys         lora_A.weight (rank, in), lora_B.weight (out, rank), …
    scales     name -> s of dW = s · B A                                       alpha / rank; rsLoRA: alpha / √rank
"""

import json
import math
import re
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from minilora.adapter import Adapter, Method
from minilora.formats import FORMATS, by_pattern
from minilora.safety.configuration import KINDS, PREFIX, read_json
from minilora.storage import CONFIG, WEIGHTS

BIN = "adapter_model.bin"
ENDS = re.compile(r"\.(lora_[AB]\.weight|lora_[ABE]|lora_magnitude_vector(\.weight)?|lora_embedding_[AB]|vera_lambda_[bd]|minilora_B_K)$")
OURS = {"method": str, "fields": dict, "layers": list, "base": str}      # what our metadata must say
IN_FOUR_BITS = ("QLoRA", "LoftQ", "QPiSSA")
OTHER_STARTS = ("pissa", "olora", "loftq", "corda", "lora_ga")       # of PEFT, which alter W: dW is then no addition to the original


@dataclass
class Sheet:
    """keys: as they stand in the file; beside: the tensors that belong to no layer; about: our metadata, {} in a folder that PEFT wrote."""

    kind: str
    layers: dict[str, dict[str, Tensor]]
    scales: dict[str, float] = field(default_factory=dict)
    ranks: dict[str, int] = field(default_factory=dict)
    rslora: bool = False
    config: dict = field(default_factory=dict)
    about: dict = field(default_factory=dict)
    beside: dict[str, Tensor] = field(default_factory=dict)
    keys: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        ranks = sorted(set(self.ranks.values()))
        rank = f", rank {ranks[0]}" + (f" to {ranks[-1]}" if len(ranks) > 1 else "") if ranks else ""
        return f"{self.kind}{rank}, {len(self.layers)} layers" + ("" if self.about else ", written by PEFT" if self.config else "")

    def is_silent(self, name: str) -> bool:
        """Whether dW of the layer is zero, whatever W is. (Of DoRA: B A; its magnitude is then that of W, or nearly.)"""
        own = self.layers[name]
        if "vera_lambda_b" in own:
            return not (own["vera_lambda_b"].any() and own["vera_lambda_d"].any())
        A, B = self.factors(name) or (None, None)
        if A is None:
            return False
        if "lora_E" in own:
            return not own["lora_E"].any()
        if self.kind == "PiSSA" and self.about and len(A) % 2 == 0:                 # [A; A₀] and [B, −B₀]
            half = len(A) // 2
            return torch.equal(A[:half], A[half:]) and torch.equal(B[:, :half], -B[:, half:])
        return not (A.any() and B.any())

    def factors(self, name: str) -> tuple[Tensor, Tensor] | None:
        """A: (rank, in) and B: (out, rank), without s; None where the layer is no such pair (an embedding, a convolution)."""
        own = self.layers[name]
        A, B = (own.get(f"lora_{M}.weight", own.get(f"lora_{M}")) for M in "AB")
        return (A, B) if A is not None and B is not None and A.dim() == B.dim() == 2 and B.shape[1] == len(A) else None

    def update(self, name: str, into: int) -> tuple[Tensor, Tensor] | None:
        """A: (rank, in) and B: (out, rank) in float64 with dW = B A, of a layer of so many inputs; None where dW cannot be known without W
        (DoRA), or is no addition to the original W."""
        own, start = self.layers[name], str(self.config.get("init_lora_weights", ""))
        if self.config.get("use_dora") or self.kind in ("LoftQ", "QPiSSA") or not self.about and start.startswith(OTHER_STARTS):
            return None
        if "vera_lambda_b" in own:
            A, B = (next((tensor for key, tensor in self.beside.items() if key.endswith(f"vera_{M}")), None) for M in "AB")
            b, d = own["vera_lambda_b"].double(), own["vera_lambda_d"].double()
            if A is None or B is None or A.dim() != 2 or A.shape[1] < into or B.dim() != 2 or len(B) < len(b) or not len(d) == len(A) == B.shape[1]:
                return None
            return d[:, None] * A[:, :into].double(), b[:, None] * B[:len(b)].double()
        if self.factors(name) is None or name not in self.scales:
            return None
        A, B = (M.double() for M in self.factors(name))
        if "lora_E" in own:
            B = B * own["lora_E"].double().T
        return A, self.scales[name] * B

    def sizes(self, name: str) -> tuple[int, int] | None:
        """(out, in) of the layer; VeRA's shared A does not say how wide it is: (out, 0)."""
        if "vera_lambda_b" in self.layers[name]:
            return len(self.layers[name]["vera_lambda_b"]), 0
        pair = self.factors(name)
        return pair and (pair[1].shape[0], pair[0].shape[1])


def read_sheet(folder: Path) -> Sheet:
    """Raises ValueError where a file is missing or damaged."""
    config_file, weights_file = folder / CONFIG, folder / WEIGHTS
    if not config_file.exists():
        raise ValueError(f"{folder}: holds {WEIGHTS} and no {CONFIG}, without which nobody knows its scale")
    config = read_json(config_file)
    try:
        with safe_open(weights_file, "pt") as file:
            about = json.loads((file.metadata() or {}).get("minilora", "{}"))
            tensors = {key: file.get_tensor(key) for key in file.keys()}
    except FileNotFoundError:
        raise ValueError(f"{weights_file}: no such file") from None
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{weights_file}: no whole safetensors file ({str(error).splitlines()[0]})") from None
    for name, kind in KINDS.items():
        if config.get(name) is not None and not kind(config[name]):
            raise ValueError(f"{config_file}: {name} = {config[name]!r} is not what PEFT writes there")
    if about and not (isinstance(about, dict) and all(isinstance(about.get(key), kind) for key, kind in OURS.items())
                      and _are_objects(about.get("others", {}))):
        raise ValueError(f"{weights_file}: its metadata does not say which adapter this is")
    found = sheet(config, tensors, about)
    for name, own in found.layers.items():
        if not _fit(own):
            shapes = ", ".join(f"{end} {tuple(tensor.shape)}" for end, tensor in own.items())
            raise ValueError(f"{weights_file}: the tensors of {name} do not fit together: {shapes}")
    return found


def _are_objects(others: object) -> bool:
    return isinstance(others, dict) and all(isinstance(other, dict) for other in others.values())


def _fit(own: dict[str, Tensor]) -> bool:
    """Whether one layer's tensors make an update. Convolutions and embeddings have other shapes, and are not judged."""
    if "vera_lambda_b" in own or "vera_lambda_d" in own:
        return own.keys() == {"vera_lambda_b", "vera_lambda_d"} and all(vector.dim() == 1 for vector in own.values())
    A, B, E = (own.get(f"lora_{M}.weight", own.get(f"lora_{M}")) for M in "ABE")
    if A is None or B is None:
        return "lora_embedding_A" in own and "lora_embedding_B" in own
    if E is not None and (E.dim() != 2 or E.shape != (len(A), 1)):
        return False
    return A.dim() > 1 and B.dim() > 1 and (A.dim() != 2 or B.shape[1] == len(A))


def sheet(config: dict, tensors: dict[str, Tensor], about: dict | None = None) -> Sheet:
    """From PEFT's fields and tensors. Fields that make no sense leave the scale unknown."""
    layers: dict[str, dict[str, Tensor]] = {}
    beside, about = {}, about or {}
    for key, tensor in tensors.items():
        plain = plain_key(key)
        if end := ENDS.search(plain):
            layers.setdefault(plain[:end.start()].removeprefix(PREFIX), {})[end[1]] = tensor
        else:
            beside[plain] = tensor
    kind = about.get("method") or ("DoRA" if config.get("use_dora") else {"LORA": "LoRA", "ADALORA": "AdaLoRA", "VERA": "VeRA"}.get(
        config.get("peft_type"), str(config.get("peft_type"))))
    found = Sheet(kind, layers, rslora=bool(config.get("use_rslora")), config=config, about=about, beside=beside, keys=list(tensors))
    for name, own in layers.items():
        try:
            found.ranks[name], scale = _strength(config, name, own)
        except (KeyError, TypeError, ValueError, ZeroDivisionError, OverflowError, re.error):
            continue
        if scale is not None:
            found.scales[name] = scale
    return found


def _strength(config: dict, name: str, own: dict[str, Tensor]) -> tuple[int, float | None]:
    """(rank, s) of a layer, as formats.py reads them; VeRA has no s."""
    if "vera_lambda_b" in own:
        return int(config["r"]), None
    if "lora_E" in own:
        return int(config["init_r"]), config["lora_alpha"] / (config["init_r"] + 1e-5)
    rank, alpha = by_pattern(config, "rank_pattern", name, config["r"]), by_pattern(config, "alpha_pattern", name, config["lora_alpha"])
    return int(rank), alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def plain_key(key: str) -> str:
    """The key as PEFT would write it: without wrappers, without the adapter's own name."""
    parts = [part for part in key.split(".") if part not in WRAPPERS]
    if parts[:1] == ["module"]:
        parts = parts[1:]
    plain = ".".join(parts)
    while plain.startswith(PREFIX + PREFIX):
        plain = plain.removeprefix(PREFIX)
    plain = plain.removeprefix(f"{PREFIX}module.") if plain.startswith(f"{PREFIX}module.") else plain.removeprefix(PREFIX)
    return PREFIX + NAMED.sub(r".\1.weight", plain) if not plain.startswith("base_model.vera_") else plain


WRAPPERS = {"_orig_mod": "torch.compile", "_fsdp_wrapped_module": "FSDP", "_checkpoint_wrapped_module": "a checkpoint wrapper"}
NAMED = re.compile(r"\.(lora_[AB])\.(\w+)\.weight$")                # lora_A.default.weight: as a live model of PEFT calls it


def own_sheet(layers: dict[str, Adapter]) -> Sheet:
    """Of adapters in a model; methods that have no form on disk are passed over."""
    first: Method = next(iter(layers.values())).method
    found = Sheet(type(first).__name__, {}, rslora=getattr(first, "rslora", False), about={"method": type(first).__name__})
    for name, layer in layers.items():
        form = FORMATS.get(type(layer.method))
        if form is not None:
            found.layers[name] = {end: tensor.detach() for end, tensor in form.write(layer).items()}
            found.ranks[name] = form.rank(layer)
            if hasattr(layer, "scale"):
                found.scales[name] = layer.scale
    return found


def peft_sheet(model: nn.Module) -> Sheet | None:
    """Of a live model of PEFT, its active adapter; None where it has none that could be saved."""
    import peft
    active = getattr(model, "active_adapters", None)
    active = active() if callable(active) else active               # a method on transformers' own models
    configs = getattr(model, "peft_config", None)
    names = [name for name in (active or []) if configs and name in configs]
    if not names:
        return None
    tensors = peft.get_peft_model_state_dict(model, adapter_name=names[0], save_embedding_layers=False)
    config = json.loads(json.dumps(configs[names[0]].to_dict(), default=list))
    return sheet(config, {key: tensor.detach() for key, tensor in tensors.items()})
