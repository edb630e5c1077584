"""Each method in PEFT's terms: which fields of adapter_config.json and which tensors say what it is. storage.py does the rest.

    LoRA, LoRA+, LoRA-FA,
    QLoRA, LoftQ, QPiSSA     lora_A.weight (rank, in), lora_B.weight (out, rank)
    LoRA-drop                the same, the shared pair written out for each layer that uses it
    DoRA                     the same, and lora_magnitude_vector (out)
    PiSSA                    LoRA of rank 2r on the original W:  A = [A; A₀],  B = [B, −B₀]
    Delta-LoRA               LoRA of rank 2r and scale (1 + λ)s:  A = [A; A_K],  B = [B, −λ/(1 + λ) B_K];  before step K plain LoRA
    AdaLoRA                  lora_A = Q, lora_B = P, lora_E = lam (r, 1), without the triplets that rank_pattern marks as cut
    VeRA                     vera_lambda_b (out), vera_lambda_d (rank) for each layer; once vera_A, vera_B, or only the seed
"""

import hashlib

import torch
from torch import Tensor

from minilora.adapter import Adapter, Method
from minilora.methods.adalora import AdaLoRA
from minilora.methods.delta_lora import DeltaLoRA
from minilora.methods.dora import DoRA
from minilora.methods.loftq import LoftQ, QPiSSA
from minilora.methods.lora import LoRA
from minilora.methods.lora_drop import LoRADrop, share_pairs
from minilora.methods.lora_fa import LoRAFA
from minilora.methods.lora_plus import LoRAPlus
from minilora.methods.pissa import PiSSA
from minilora.methods.qlora import QLoRA
from minilora.methods.vera import VeRA

Layers = dict[str, Adapter]


class LoRAFormat:
    """How a method is written and read. The others are this one but for what they override."""

    peft_type = "LORA"
    read_fields = {"r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "init_lora_weights"}
    ignored_fields: set[str] = set()                  # by PEFT too
    allowed = {"init_lora_weights": [True, False, "gaussian", "pissa"]}               # other starts alter the base

    def config(self, method: LoRA, layers: Layers, **options) -> dict:
        """PEFT's fields."""
        return lora_config(method.rank, method.alpha, method.dropout, method.rslora)

    def method(self, config: dict) -> Method:
        """What a folder that PEFT wrote holds. Raises KeyError, TypeError or ValueError where the fields make no sense."""
        kind = DoRA if config.get("use_dora") else PiSSA if config.get("init_lora_weights") == "pissa" else LoRA
        if kind is DoRA and config.get("init_lora_weights") == "pissa":
            raise ValueError("use_dora together with init_lora_weights = 'pissa' is not supported")
        return kind(rank=config["r"], alpha=float(config["lora_alpha"]), dropout=float(config.get("lora_dropout", 0.0)),
                    rslora=bool(config.get("use_rslora", False)))

    def write(self, layer: Adapter) -> dict[str, Tensor]:
        """One layer's tensors, by the end of their names."""
        return {"lora_A.weight": layer.A, "lora_B.weight": layer.B}

    def read(self, layer: Adapter, tensors: dict[str, Tensor]) -> None:
        """Copy them back. A tensor that is not copied, because the layer has it already, is compared afterwards."""
        layer.A.copy_(tensors["lora_A.weight"])
        layer.B.copy_(tensors["lora_B.weight"])

    def write_shared(self, layers: Layers, **options) -> dict[str, Tensor]:
        """What all layers have in common, by whole names."""
        return {}

    def state(self, layers: Layers) -> dict:
        """What PEFT has no field for, for the metadata."""
        return {}

    def restore(self, layers: Layers, state: dict | None, config: dict) -> None:
        """Bring fresh layers into that state (None: PEFT wrote the folder), so that they have the file's tensors. Raises as `method` does."""


class DoRAFormat(LoRAFormat):
    def config(self, method: DoRA, layers: Layers, **options) -> dict:
        return super().config(method, layers) | {"use_dora": True}

    def write(self, layer: Adapter) -> dict[str, Tensor]:
        return super().write(layer) | {"lora_magnitude_vector": layer.magnitude}

    def read(self, layer: Adapter, tensors: dict[str, Tensor]) -> None:
        super().read(layer, tensors)
        layer.magnitude.copy_(tensors["lora_magnitude_vector"])


class LoRADropFormat(LoRAFormat):
    def state(self, layers: Layers) -> dict:                                          # "own": None as long as nothing was chosen
        decided = all(layer.decided for layer in layers.values())
        return {"own": [name for name, layer in layers.items() if layer.own] if decided else None}

    def restore(self, layers: Layers, state: dict | None, config: dict) -> None:
        if state["own"] is not None:
            share_pairs(layers, set(state["own"]))


class PiSSAFormat(LoRAFormat):
    def config(self, method: PiSSA, layers: Layers, **options) -> dict:
        return lora_config(2 * method.rank, 2 * method.rank * method.scale)

    def write(self, layer: Adapter) -> dict[str, Tensor]:
        return {"lora_A.weight": torch.cat([layer.A, layer.A_0]), "lora_B.weight": torch.cat([layer.B, -layer.B_0], dim=1)}

    def read(self, layer: Adapter, tensors: dict[str, Tensor]) -> None:
        A, A_0 = tensors["lora_A.weight"].chunk(2)
        B, minus_B_0 = tensors["lora_B.weight"].chunk(2, dim=1)
        for place, value in ((layer.A, A), (layer.A_0, A_0), (layer.B, B), (layer.B_0, -minus_B_0)):
            place.copy_(value)


class DeltaLoRAFormat(LoRAFormat):
    def config(self, method: DeltaLoRA, layers: Layers, **options) -> dict:
        if not self.started(layers):
            return super().config(method, layers)
        return lora_config(2 * method.rank, 2 * method.rank * method.scale * (1 + method.delta_ratio))

    def write(self, layer: Adapter) -> dict[str, Tensor]:
        if not layer.started:
            return super().write(layer)
        share = layer.method.delta_ratio / (1 + layer.method.delta_ratio)
        return {"lora_A.weight": torch.cat([layer.A, layer.A_K]), "lora_B.weight": torch.cat([layer.B, -share * layer.B_K], dim=1),
                "minilora_B_K": layer.B_K}            # PEFT passes it over; from −λ/(1 + λ) B_K it would not come back bit for bit

    def read(self, layer: Adapter, tensors: dict[str, Tensor]) -> None:
        rank = len(layer.A)
        layer.A.copy_(tensors["lora_A.weight"][:rank])
        layer.B.copy_(tensors["lora_B.weight"][:, :rank])
        if layer.started:
            layer.A_K.copy_(tensors["lora_A.weight"][rank:])
            layer.B_K.copy_(tensors["minilora_B_K"])

    def started(self, layers: Layers) -> bool:
        return any(bool(layer.started) for layer in layers.values())

    def state(self, layers: Layers) -> dict:
        return {"started": self.started(layers)}

    def restore(self, layers: Layers, state: dict | None, config: dict) -> None:
        for layer in layers.values():
            layer.started.fill_(bool(state["started"]))


class AdaLoRAFormat(LoRAFormat):
    peft_type = "ADALORA"
    names = {"initial_rank": "init_r", "target_rank": "target_r", "alpha": "lora_alpha", "dropout": "lora_dropout", "total_steps": "total_step",
             "warmup_steps": "tinit", "final_steps": "tfinal", "interval": "deltaT", "beta1": "beta1", "beta2": "beta2",
             "orthogonal_weight": "orth_reg_weight"}
    read_fields = {*names.values(), "rank_pattern"}
    ignored_fields = {"r"}
    allowed = {"init_lora_weights": [True, False]}

    def config(self, method: AdaLoRA, layers: Layers, **options) -> dict:
        fields = {theirs: getattr(method, ours) for ours, theirs in self.names.items()}
        fields["lora_alpha"] = whole_if_whole(method.alpha)
        fields["total_step"] = method.total_steps or method.warmup_steps + method.final_steps + 1      # PEFT insists on a number
        kept = {f"{name}.lora_E": layer.kept.tolist() for name, layer in layers.items()}
        cut = any(not all(pattern) for pattern in kept.values())
        return fields | {"rank_pattern": kept if cut else None, "fan_in_fan_out": False, "init_lora_weights": True}

    def method(self, config: dict) -> AdaLoRA:
        config["init_r"], config["lora_alpha"]                                        # KeyError where one is missing
        return AdaLoRA(**{ours: config[theirs] for ours, theirs in self.names.items() if theirs in config})

    def write(self, layer: Adapter) -> dict[str, Tensor]:
        kept = layer.kept
        return {"lora_A": layer.Q[kept], "lora_E": layer.lam[kept, None], "lora_B": layer.P[:, kept]}

    def read(self, layer: Adapter, tensors: dict[str, Tensor]) -> None:
        kept = layer.kept.clone()
        for place in (layer.P, layer.lam, layer.Q):
            place.zero_()
        layer.Q[kept] = tensors["lora_A"].to(layer.Q)
        layer.lam[kept] = tensors["lora_E"][:, 0].to(layer.lam)
        layer.P[:, kept] = tensors["lora_B"].to(layer.P)

    def restore(self, layers: Layers, state: dict | None, config: dict) -> None:
        patterns = config.get("rank_pattern")
        if not patterns:
            return
        if not isinstance(patterns, dict) or patterns.keys() != {f"{name}.lora_E" for name in layers}:
            raise ValueError("rank_pattern does not name the layers that target_modules names")
        for name, layer in layers.items():
            kept = patterns[f"{name}.lora_E"]
            if not isinstance(kept, list) or len(kept) != len(layer.lam) or not all(isinstance(flag, bool) for flag in kept):
                raise ValueError(f"rank_pattern of {name} must be {len(layer.lam)} times true or false, one for each triplet")
            layer.mask.copy_(torch.tensor(kept))


class VeRAFormat(LoRAFormat):
    peft_type = "VERA"
    read_fields = {"r", "d_initial", "projection_prng_key", "vera_dropout", "save_projection"}
    allowed = {"init_weights": [True, False]}

    def config(self, method: VeRA, layers: Layers, projection: bool = True) -> dict:
        return {"r": method.rank, "d_initial": method.d_initial, "projection_prng_key": method.seed, "vera_dropout": method.dropout,
                "save_projection": projection, "fan_in_fan_out": False, "init_weights": True}

    def method(self, config: dict) -> VeRA:
        return VeRA(rank=config["r"], d_initial=float(config.get("d_initial", 0.1)), seed=config["projection_prng_key"],
                    dropout=float(config.get("vera_dropout", 0.0)))

    def write(self, layer: Adapter) -> dict[str, Tensor]:
        return {"vera_lambda_b": layer.b, "vera_lambda_d": layer.d}

    def read(self, layer: Adapter, tensors: dict[str, Tensor]) -> None:
        layer.b.copy_(tensors["vera_lambda_b"])
        layer.d.copy_(tensors["vera_lambda_d"])

    def write_shared(self, layers: Layers, projection: bool = True) -> dict[str, Tensor]:
        first = next(iter(layers.values()))
        return {"base_model.vera_A": first.A, "base_model.vera_B": first.B} if projection else {}

    def state(self, layers: Layers) -> dict:
        """The projections' digest: that the seed still draws the same numbers is then known, and not hoped."""
        return {"projections": digest(next(iter(layers.values())))}

    def restore(self, layers: Layers, state: dict | None, config: dict) -> None:
        if state is not None and state["projections"] != digest(next(iter(layers.values()))):
            raise ValueError("this seed draws other projections A and B here than those the vectors were trained with")


def digest(layer: Adapter) -> str:
    """SHA-256 of VeRA's A and B in float32, which is how they are drawn."""
    return hashlib.sha256(b"".join(M.detach().cpu().float().numpy().tobytes() for M in (layer.A, layer.B))).hexdigest()


def lora_config(rank: int, alpha: float, dropout: float = 0.0, rslora: bool = False) -> dict:
    return {"r": rank, "lora_alpha": whole_if_whole(alpha), "lora_dropout": dropout, "use_rslora": rslora, "use_dora": False,
            "fan_in_fan_out": False, "init_lora_weights": True}


def whole_if_whole(value: float) -> float:
    return int(value) if value == int(value) else value


FORMATS = {LoRA: LoRAFormat(), LoRAPlus: LoRAFormat(), LoRAFA: LoRAFormat(), LoRADrop: LoRADropFormat(), QLoRA: LoRAFormat(), LoftQ: LoRAFormat(),
           QPiSSA: LoRAFormat(), DoRA: DoRAFormat(),
           PiSSA: PiSSAFormat(), DeltaLoRA: DeltaLoRAFormat(), AdaLoRA: AdaLoRAFormat(), VeRA: VeRAFormat()}
METHODS = {kind.__name__: kind for kind in FORMATS}
PEFT_TYPES = {"LORA": LoRAFormat(), "ADALORA": AdaLoRAFormat(), "VERA": VeRAFormat()}
PEFTS_OWN = FORMATS | {PiSSA: LoRAFormat()}           # in folders that PEFT wrote: A and B beside an altered W, which PiSSA makes again
