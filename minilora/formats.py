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
import re
from collections.abc import Iterable

import torch
from torch import Tensor

from minilora.adapter import Adapter, Method
from minilora.methods.adalora import AdaLoRA, AdaLoRALinear
from minilora.methods.delta_lora import DeltaLoRA, DeltaLoRALinear
from minilora.methods.dora import DoRA, DoRALinear
from minilora.methods.loftq import LoftQ, LoftQLinear, QPiSSA
from minilora.methods.lora import LoRA, LoRALinear
from minilora.methods.lora_drop import LoRADrop, LoRADropLinear, kinds, share_pairs
from minilora.methods.lora_fa import LoRAFA
from minilora.methods.lora_plus import LoRAPlus
from minilora.methods.pissa import PiSSA, PiSSALinear
from minilora.methods.qlora import QLoRA
from minilora.methods.vera import VeRA, VeRALinear

Layers = dict[str, Adapter]
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32, "float64": torch.float64}    # that layers can compute in


class LoRAFormat:
    """How a method is written and read. The others are this one but for what they override."""

    layer: type[Adapter] = LoRALinear
    covers = {"A", "B"}                               # the layer's tensors that come back from what `write` gives and `state` says
    one_for_all = False                               # whether all layers must have the very same method
    peft_type, only_bias = "LORA", "lora_only"        # and how PEFT calls "the biases of the adapted layers"
    read_fields = {"r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "init_lora_weights", "rank_pattern", "alpha_pattern"}
    ignored_fields = {"eva_config"}                   # by PEFT too, or it has only to do with the start
    allowed = {"init_lora_weights": [True, False, "gaussian", "orthogonal", "eva", "mica", "pissa"]}             # other starts alter the base

    def config(self, layers: Layers, projection: bool = True) -> dict:
        """PEFT's fields. Raises ValueError where they cannot say what these layers are."""
        each = {name: FORMATS[type(layer.method)].fields(layer) for name, layer in layers.items()}
        if len({fields["use_rslora"] for fields in each.values()}) > 1:                # one flag for all: then their scales are said as alpha / r
            each = {name: lora_config(fields["r"], layers[name].scale * fields["r"], fields["lora_dropout"]) | {"use_dora": fields["use_dora"]}
                    for name, fields in each.items()}
        first, config = next(iter(each.items()))
        for name, fields in each.items():
            if fields["use_dora"] != config["use_dora"]:
                with_, without = (first, name) if config["use_dora"] else (name, first)
                raise ValueError(f"{with_} has a DoRA and {without} none, and PEFT's use_dora is one for all layers of a folder; "
                                 "save the parts of the model one by one, each in a folder of its own: save_adapter(model.part, ...)")
        for field, pattern in (("r", "rank_pattern"), ("lora_alpha", "alpha_pattern")):
            differ = {f"^{re.escape(name)}": fields[field] for name, fields in each.items() if fields[field] != config[field]}
            config |= {pattern: differ} if differ else {}
        return config                                 # of several dropouts PEFT hears of the first; only training knows them

    def fields(self, layer: Adapter) -> dict:
        """One layer's part of them."""
        method = layer.method
        return lora_config(method.rank, method.alpha, method.dropout, method.rslora)

    def methods(self, config: dict, names: Iterable[str]) -> dict[str, Method]:
        """What each layer is in a folder that PEFT wrote. Raises KeyError, TypeError or ValueError where the fields make no sense."""
        kind = DoRA if config.get("use_dora") else PiSSA if config.get("init_lora_weights") == "pissa" else LoRA
        if kind is DoRA and config.get("init_lora_weights") == "pissa":
            raise ValueError("use_dora together with init_lora_weights = 'pissa' is not supported")
        return {name: kind(rank=by_pattern(config, "rank_pattern", name, config["r"]),
                           alpha=float(by_pattern(config, "alpha_pattern", name, config["lora_alpha"])),
                           dropout=float(config.get("lora_dropout", 0.0)), rslora=bool(config.get("use_rslora", False))) for name in names}

    def write(self, layer: Adapter) -> dict[str, Tensor]:
        """One layer's tensors, by the end of their names."""
        return {"lora_A.weight": layer.A, "lora_B.weight": layer.B}

    def read(self, layer: Adapter, tensors: dict[str, Tensor]) -> None:
        """Copy them back. A tensor that is not copied, because the layer has it already, is compared afterwards."""
        layer.A.copy_(tensors["lora_A.weight"])
        layer.B.copy_(tensors["lora_B.weight"])

    def write_shared(self, layers: Layers, projection: bool = True) -> dict[str, Tensor]:
        """What all layers have in common, by whole names."""
        return {}

    def state(self, layers: Layers, projection: bool = True) -> dict:
        """What PEFT has no field for, for the metadata. Raises ValueError where these layers have a state that would not come back."""
        return {}

    def restore(self, layers: Layers, state: dict | None, config: dict, tensors: dict[str, Tensor]) -> None:
        """Bring fresh layers into that state (None: PEFT wrote the folder), so that they have the file's tensors. Raises as `methods` does."""

    def fits(self, method: Method, tensors: dict[str, Tensor]) -> None:
        """Raises ValueError where one layer's tensors in the file rule this method out; before layers are made, of whatever size it says."""

    def cast(self, layer: Adapter, dtype: torch.dtype) -> None:
        """Bring a layer of ours to the dtype it was saved in."""
        for name, tensor in (*layer.named_parameters(), *layer.named_buffers()):
            if name in self.covers and tensor.is_floating_point():
                tensor.data = tensor.data.to(dtype)

    def check(self, layer: Adapter) -> None:
        """Raises ValueError where the layer is not what its method makes, and would come back as another."""
        method, kind = layer.method, type(layer)
        if kind is not self.layer:
            raise ValueError(f"it is a {kind.__name__}, and {type(method).__name__} makes a {self.layer.__name__}, which is what would be loaded")
        own = {name for name, _ in (*layer.named_parameters(), *layer.named_buffers()) if not name.startswith("base.")}
        if own - self.covers:
            raise ValueError(f"it has {min(own - self.covers)}, which {type(self).__name__} in minilora/formats.py does not write")
        rank = getattr(method, "rank", None) or method.initial_rank
        if self.rank(layer) != rank:
            raise ValueError(f"it has rank {self.rank(layer)}, and its method says {rank}; adapt with the rank that you want")
        scale = self.scale(method)
        if scale is not None and layer.scale != scale:
            raise ValueError(f"its scale is {layer.scale}, and {method} makes it {scale}; give the layer a method whose alpha says so: "
                             "layer.method = dataclasses.replace(layer.method, alpha=...)")

    def rank(self, layer: Adapter) -> int:
        return len(layer.A)

    def scale(self, method: Method) -> float | None:
        return method.scale


class DoRAFormat(LoRAFormat):
    layer, covers = DoRALinear, {"A", "B", "magnitude"}

    def fields(self, layer: Adapter) -> dict:
        return super().fields(layer) | {"use_dora": True}

    def write(self, layer: Adapter) -> dict[str, Tensor]:
        return super().write(layer) | {"lora_magnitude_vector": layer.magnitude}

    def read(self, layer: Adapter, tensors: dict[str, Tensor]) -> None:
        super().read(layer, tensors)
        layer.magnitude.copy_(tensors["lora_magnitude_vector"])


class LoRADropFormat(LoRAFormat):
    layer, covers, one_for_all = LoRADropLinear, {"A", "B", "decided", "own"}, True

    def state(self, layers: Layers, projection: bool = True) -> dict:                               # "own": None as long as nothing was chosen
        decided = {name for name, layer in layers.items() if layer.decided}
        if decided and len(decided) < len(layers):
            raise ValueError(f"LoRA-drop has chosen for {min(decided)} and not for {min(layers.keys() - decided)}: "
                             "adapt and prepare all layers together")
        own = [name for name, layer in layers.items() if layer.own]
        for names in kinds(layers):
            rest = [layers[name] for name in names if name not in own]
            if any(layer.A is not rest[0].A or layer.B is not rest[0].B for layer in rest):
                raise ValueError(f"{', '.join(names)}: LoRA-drop lets those without a pair of their own share one, and these do not")
        return {"own": own if decided else None}

    def restore(self, layers: Layers, state: dict | None, config: dict, tensors: dict[str, Tensor]) -> None:
        if state["own"] is not None:
            share_pairs(layers, set(state["own"]))


class PiSSAFormat(LoRAFormat):
    layer, covers = PiSSALinear, {"A", "B", "A_0", "B_0"}

    def fields(self, layer: Adapter) -> dict:
        rank = 2 * layer.method.rank
        return lora_config(rank, rank * layer.method.scale)

    def write(self, layer: Adapter) -> dict[str, Tensor]:
        return {"lora_A.weight": torch.cat([layer.A, layer.A_0]), "lora_B.weight": torch.cat([layer.B, -layer.B_0], dim=1)}

    def read(self, layer: Adapter, tensors: dict[str, Tensor]) -> None:
        A, A_0 = tensors["lora_A.weight"].chunk(2)
        B, minus_B_0 = tensors["lora_B.weight"].chunk(2, dim=1)
        for place, value in ((layer.A, A), (layer.A_0, A_0), (layer.B, B), (layer.B_0, -minus_B_0)):
            place.copy_(value)


class DeltaLoRAFormat(LoRAFormat):
    layer, covers = DeltaLoRALinear, {"A", "B", "A_K", "B_K", "started"}

    def fields(self, layer: Adapter) -> dict:
        if not layer.started:
            return super().fields(layer)
        rank = 2 * layer.method.rank
        return lora_config(rank, rank * layer.method.scale * (1 + layer.method.delta_ratio))

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

    def state(self, layers: Layers, projection: bool = True) -> dict:
        return {"started": [name for name, layer in layers.items() if layer.started]}

    def restore(self, layers: Layers, state: dict | None, config: dict, tensors: dict[str, Tensor]) -> None:
        for name, layer in layers.items():
            layer.started.fill_(name in state["started"])


class AdaLoRAFormat(LoRAFormat):
    layer, one_for_all, peft_type = AdaLoRALinear, True, "ADALORA"
    covers = {"P", "lam", "Q", "mask", *(f"{kind}_{w}" for kind in ("sensitivity", "uncertainty") for w in ("P", "lam", "Q"))}    # these begin anew
    names = {"initial_rank": "init_r", "target_rank": "target_r", "alpha": "lora_alpha", "dropout": "lora_dropout", "total_steps": "total_step",
             "warmup_steps": "tinit", "final_steps": "tfinal", "interval": "deltaT", "beta1": "beta1", "beta2": "beta2",
             "orthogonal_weight": "orth_reg_weight"}
    read_fields = {*names.values(), "rank_pattern"}
    ignored_fields = {"r", "eva_config"}
    allowed = {"init_lora_weights": [True, False]}

    def config(self, layers: Layers, projection: bool = True) -> dict:
        method = next(iter(layers.values())).method
        fields = {theirs: getattr(method, ours) for ours, theirs in self.names.items()}
        fields["lora_alpha"] = whole_if_whole(method.alpha)
        fields["total_step"] = method.total_steps or method.warmup_steps + method.final_steps + 1      # PEFT insists on a number
        kept = {f"{name}.lora_E": layer.kept.tolist() for name, layer in layers.items()}
        cut = any(not all(pattern) for pattern in kept.values())
        return fields | {"rank_pattern": kept if cut else None, "init_lora_weights": True}

    def methods(self, config: dict, names: Iterable[str]) -> dict[str, Method]:
        config["init_r"], config["lora_alpha"]                                        # KeyError where one is missing
        return dict.fromkeys(names, AdaLoRA(**{ours: config[theirs] for ours, theirs in self.names.items() if theirs in config}))

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

    def rank(self, layer: Adapter) -> int:
        return len(layer.lam)

    def scale(self, method: AdaLoRA) -> float:
        return method.alpha / (method.initial_rank + 1e-5)

    def restore(self, layers: Layers, state: dict | None, config: dict, tensors: dict[str, Tensor]) -> None:
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
    layer, covers, one_for_all, peft_type, only_bias = VeRALinear, {"A", "B", "b", "d"}, True, "VERA", "vera_only"
    read_fields = {"r", "d_initial", "projection_prng_key", "vera_dropout", "save_projection"}
    ignored_fields: set[str] = set()
    allowed = {"init_weights": [True, False]}

    def config(self, layers: Layers, projection: bool = True) -> dict:
        method = next(iter(layers.values())).method
        return {"r": method.rank, "d_initial": method.d_initial, "projection_prng_key": method.seed, "vera_dropout": method.dropout,
                "save_projection": projection, "init_weights": True}

    def methods(self, config: dict, names: Iterable[str]) -> dict[str, Method]:
        return dict.fromkeys(names, VeRA(rank=config["r"], d_initial=float(config.get("d_initial", 0.1)), seed=config["projection_prng_key"],
                                         dropout=float(config.get("vera_dropout", 0.0))))

    def fits(self, method: VeRA, tensors: dict[str, Tensor]) -> None:
        d = tensors.get("vera_lambda_d")
        if d is not None and d.numel() != method.rank:
            raise ValueError(f"the rank is {method.rank}, and vera_lambda_d in the weights file has {d.numel()} numbers")

    def rank(self, layer: Adapter) -> int:
        return len(layer.d)

    def scale(self, method: VeRA) -> None:
        return None

    def cast(self, layer: Adapter, dtype: torch.dtype) -> None:
        for vector in (layer.b, layer.d):             # A and B belong to all layers, see `restore`
            vector.data = vector.data.to(dtype)

    def write(self, layer: Adapter) -> dict[str, Tensor]:
        return {"vera_lambda_b": layer.b, "vera_lambda_d": layer.d}

    def read(self, layer: Adapter, tensors: dict[str, Tensor]) -> None:
        layer.b.copy_(tensors["vera_lambda_b"])
        layer.d.copy_(tensors["vera_lambda_d"])

    def write_shared(self, layers: Layers, projection: bool = True) -> dict[str, Tensor]:
        first = next(iter(layers.values()))
        return {"base_model.vera_A": first.A, "base_model.vera_B": first.B} if projection else {}

    def state(self, layers: Layers, projection: bool = True) -> dict:
        """The projections' digest, so that it is known, and not hoped, that the seed still draws the same; and what they were rounded to."""
        first, *others = layers.items()
        A, B = first[1].A, first[1].B
        widest, tallest = (max(getattr(layer, side) for layer in layers.values()) for side in ("in_features", "out_features"))
        for name, layer in others:
            if not (layer.A is A or torch.equal(layer.A, A)) or not (layer.B is B or torch.equal(layer.B, B)):
                raise ValueError(f"{name} and {first[0]} hold different projections A and B, and VeRA has one for all: adapt all layers together")
        if (A.shape[1], len(B)) != (widest, tallest):
            raise ValueError(f"A and B were drawn for wider layers than those that are left, {A.shape[1]} -> {len(B)} and not {widest} -> {tallest}")
        if not projection and not all(torch.equal(drawn.to(M), M) for drawn, M in zip(first[1].method.projections(widest, tallest), (A, B))):
            raise ValueError("A and B are not what this seed draws, so the seed alone does not bring them back; save with projection=True")
        return {"projections": digest(A, B), "dtype": str(A.dtype).removeprefix("torch.")}

    def restore(self, layers: Layers, state: dict | None, config: dict, tensors: dict[str, Tensor]) -> None:
        if state is None:
            return
        first = next(iter(layers.values()))
        if state.get("dtype") in DTYPES:
            for M in (first.A, first.B):                                              # the same two in every layer
                M.data = M.data.to(DTYPES[state["dtype"]])
        saved = [tensors.get(f"base_model.vera_{M}") for M in "AB"]
        if all(M is not None and M.is_floating_point() and M.shape == drawn.shape for M, drawn in zip(saved, (first.A, first.B))) and state["projections"] == digest(*saved):
            first.A.copy_(saved[0])
            first.B.copy_(saved[1])
        elif state["projections"] != digest(first.A, first.B):
            raise ValueError("this seed draws other projections A and B here than those the vectors were trained with")


def digest(A: Tensor, B: Tensor) -> str:
    """SHA-256 of VeRA's A and B in float32, which is how they are drawn."""
    return hashlib.sha256(b"".join(M.detach().cpu().float().numpy().tobytes() for M in (A, B))).hexdigest()


def by_pattern(config: dict, field: str, name: str, usual: object) -> object:
    """PEFT's rule: the first key that is, as a regular expression, the layer's name or the end of it; else what the other layers have."""
    patterns = config.get(field) or {}
    if not isinstance(patterns, dict):
        raise ValueError(f"{field} must hold a number for each expression, got {patterns!r}")
    return next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", name)), usual)


def lora_config(rank: int, alpha: float, dropout: float = 0.0, rslora: bool = False) -> dict:
    return {"r": rank, "lora_alpha": whole_if_whole(alpha), "lora_dropout": dropout, "use_rslora": rslora, "use_dora": False,
            "init_lora_weights": True}


def whole_if_whole(value: float) -> float:
    return int(value) if value == int(value) else value


class LoftQFormat(LoRAFormat):
    layer = LoftQLinear


FORMATS = {LoRA: LoRAFormat(), LoRAPlus: LoRAFormat(), LoRAFA: LoRAFormat(), LoRADrop: LoRADropFormat(), QLoRA: LoRAFormat(),
           LoftQ: LoftQFormat(), QPiSSA: LoftQFormat(), DoRA: DoRAFormat(),
           PiSSA: PiSSAFormat(), DeltaLoRA: DeltaLoRAFormat(), AdaLoRA: AdaLoRAFormat(), VeRA: VeRAFormat()}
PEFT_TYPES = {"LORA": LoRAFormat(), "ADALORA": AdaLoRAFormat(), "VERA": VeRAFormat()}
PEFTS_OWN = FORMATS | {PiSSA: LoRAFormat()}           # in folders that PEFT wrote: A and B beside an altered W, which PiSSA makes again
