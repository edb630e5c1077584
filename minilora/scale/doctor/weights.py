"""A model's tensors on disk, read one at a time: nothing is executed, and no model need fit in memory.

    model.safetensors                      one file
    config.json + model.safetensors        a folder of transformers
    model.safetensors.index.json           the same in shards: which file holds which tensor
"""

import hashlib
from collections.abc import Collection, Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from minilora.quant.linear import NF4Linear
from minilora.quant.nf4 import quantize_nf4
from minilora.safety import configuration
from minilora.safety.configuration import read_json
from minilora.safety.targets import find_targets

ONE, INDEX, CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"
PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")


class Weights:
    """keys: names of all tensors; metadata: of the file. Raises ValueError where the path holds no whole model."""

    def __init__(self, path: Path):
        self.path = path
        self.files: dict[str, Path] = {}
        self.metadata: dict[str, str] = {}
        self.open: dict[Path, safe_open] = {}
        for file, named in self._files().items():
            opened = self._opened(file)
            missing = named - set(opened.keys())
            if missing:
                raise ValueError(f"{file}: holds no {min(missing)}, which {INDEX} says is there")
            self.files |= dict.fromkeys(named or opened.keys(), file)
            self.metadata |= opened.metadata() or {}
        if not self.files:
            raise ValueError(f"{path}: holds no tensor")

    def _files(self) -> dict[Path, set[str]]:
        """Each file, and what the index says is in it (nothing, where there is no index)."""
        if self.path.is_file():
            return {self.path: set()}
        index = self.path / INDEX
        if index.exists():
            places = read_json(index).get("weight_map")
            if not isinstance(places, dict) or not all(isinstance(file, str) and Path(file).name == file for file in places.values()):
                raise ValueError(f"{index}: its weight_map does not say which file holds which tensor")
            return {self.path / file: {key for key, there in places.items() if there == file} for file in sorted(set(places.values()))}
        files = [self.path / ONE] if (self.path / ONE).exists() else sorted(self.path.glob("*.safetensors"))
        if not files:
            pickle = next((name for name in PICKLES if (self.path / name).exists()), None)
            what = f"{pickle}, a pickle, which could run code, and no safetensors; save_pretrained() of the loaded model writes them" if pickle else (
                "no safetensors file: no model, no adapter and no run of finetune")
            raise ValueError(f"{self.path}: holds {what}")
        return dict.fromkeys(files, frozenset())

    def _opened(self, file: Path) -> safe_open:
        if file not in self.open:
            try:
                self.open[file] = safe_open(file, "pt")
            except FileNotFoundError:
                raise ValueError(f"{file}: no such file") from None
            except (SafetensorError, OSError) as error:
                raise ValueError(f"{file}: no whole safetensors file ({str(error).splitlines()[0]})") from None
        return self.open[file]

    @property
    def keys(self) -> Collection[str]:
        return self.files.keys()

    def get(self, key: str) -> Tensor:
        return self._opened(self.files[key]).get_tensor(key)

    def shape(self, key: str) -> tuple[int, ...]:
        return tuple(self._opened(self.files[key]).get_slice(key).get_shape())

    def find(self, name: str) -> str | None:
        """The key of that tensor, also where one of the two names begins further out: model.layers.0.… and layers.0.…"""
        tail = name
        while tail:
            if tail in self.files:
                return tail
            _, _, tail = tail.partition(".")
            if tail.partition(".")[0].isdecimal():          # 0.q_proj.weight would be anybody's
                break
        longer = [key for key in self.files if key.endswith(f".{name}")]
        return longer[0] if len(longer) == 1 else None

    @property
    def config(self) -> dict:
        """config.json, or {}."""
        file = self.path / CONFIG
        return read_json(file) if file.exists() else {}

    def skeleton(self) -> nn.Module | None:
        """The transformers model that config.json describes, its tensors without numbers; None where that cannot be made here."""
        names = self.config.get("architectures") or []
        try:
            import transformers
            kind = getattr(transformers, names[0])
            with torch.device("meta"):
                return kind(kind.config_class.from_pretrained(self.path))
        except Exception:                                   # no transformers, another version's, a class of its author's own: then there is no telling
            return None

    def fingerprint(self, plain: nn.Module, dtype: torch.dtype | None, without: Collection[str], four_bits: Collection[str] = ()) -> str | None:
        """storage.base_fingerprint of that model with these numbers, in `dtype` or as stored, those layers in four bits as ml.quantize puts
        them there; None where a tensor of the model is not in the files."""
        digest, state, first = hashlib.sha256(), plain.state_dict(keep_vars=True), {}
        for name, tensor in state.items():                  # a tied tensor is in the files under one of its names
            if name in self.files:
                first.setdefault(id(tensor), name)

        def found(name: str) -> Tensor:
            tensor = self.get(first[id(state[name])])
            return tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor

        def add(name: str, tensor: Tensor) -> None:
            if name not in without:
                digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
                digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())

        for name, tensor in state.items():
            layer, _, leaf = name.rpartition(".")
            if id(tensor) not in first:
                return None
            if layer not in four_bits:
                add(name, found(name))
            elif leaf == "weight":                          # its bias comes first then, as in the layer's state dict
                bias = f"{layer}.bias"
                linear = NF4Linear(quantize_nf4(found(name), double=True), nn.Parameter(found(bias)) if bias in state else None)
                for part, value in linear.state_dict().items():
                    add(f"{layer}.{part}", value)
        return digest.hexdigest()


def fingerprints(weights: Weights, layers: Collection[str], config: dict) -> Iterator[str]:
    """What a folder of ours may have noted of this base: as stored, in the types that a model is loaded in, in four bits. Nothing, where it
    cannot be known: no transformers here, a head or a layer that this class of models has not."""
    plain = weights.skeleton()
    if plain is None or not set(layers) <= {name for name, _ in plain.named_modules()}:
        return
    saved = tuple(config.get("modules_to_save") or ())
    if not all(any(name.endswith(end) for name, _ in plain.named_modules()) for end in saved):
        return
    without = configuration.places_beside(plain, layers, config).values()
    try:
        blocks = find_targets(plain)
    except ValueError:                                      # no nn.Linear there
        blocks = {}
    for four_bits in ((), blocks):
        for dtype in (None, torch.float32, torch.bfloat16, torch.float16, torch.float64):
            found = weights.fingerprint(plain, dtype, without, four_bits)
            if found is None:
                return
            yield found
