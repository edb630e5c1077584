"""Plausible mistakes, each of which the tests must reject with the message named here."""

import copy
import json
import math
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lessons import provokes


def _header(content: bytes) -> tuple[int, dict]:
    size = int.from_bytes(content[:8], "little")
    return size, json.loads(content[8:8 + size])


def _sizes(header: dict) -> dict[str, int]:
    return {name: about["data_offsets"][1] - about["data_offsets"][0] for name, about in header.items() if name != "__metadata__"}


@provokes("__metadata__ is a note")
def adapter_bytes__notes_as_a_tensor(content: bytes) -> dict[str, int]:
    size, header = _header(content)
    return {"length": 8, "header": size} | {name: len(json.dumps(about)) if name == "__metadata__" else about["data_offsets"][1] - about["data_offsets"][0]
                                            for name, about in header.items()}


@provokes("counted in the header, too")
def adapter_bytes__length_twice(content: bytes) -> dict[str, int]:
    size, header = _header(content)
    return {"length": 8, "header": 8 + size} | _sizes(header)


@provokes("numbers of 2 bytes")
def adapter_bytes__always_four_bytes(content: bytes) -> dict[str, int]:
    size, header = _header(content)
    return {"length": 8, "header": size} | {name: 4 * math.prod(about["shape"]) for name, about in header.items() if name != "__metadata__"}


@provokes("eight bytes, the lowest first")
def adapter_bytes__header_written_again(content: bytes) -> dict[str, int]:
    _, header = _header(content)
    return {"length": 8, "header": len(json.dumps(header))} | _sizes(header)


@provokes("in the order in which the header names them")
def adapter_bytes__sorted(content: bytes) -> dict[str, int]:
    size, header = _header(content)
    return dict(sorted(({"length": 8, "header": size} | _sizes(header)).items()))


@provokes("end - begin")
def adapter_bytes__where_it_ends(content: bytes) -> dict[str, int]:
    size, header = _header(content)
    return {"length": 8, "header": size} | {name: about["data_offsets"][1] for name, about in header.items() if name != "__metadata__"}


@provokes("the first part is the length itself")
def adapter_bytes__without_the_length(content: bytes) -> dict[str, int]:
    size, header = _header(content)
    return {"header": size} | _sizes(header)


@provokes("the factors were added")
def concatenate__added(pairs: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    return (sum(A for A, _ in pairs), sum(B for _, B in pairs)) if len({len(A) for A, _ in pairs}) == 1 else \
        (torch.cat([A for A, _ in pairs]), torch.cat([B for _, B in pairs], dim=1))


@provokes("A and B are in the wrong order")
def concatenate__B_first(pairs: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    return torch.cat([B for _, B in pairs], dim=1), torch.cat([A for A, _ in pairs])


@provokes("each B must meet its own A")
def concatenate__B_reversed(pairs: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    return torch.cat([A for A, _ in pairs]), torch.cat([B for _, B in reversed(pairs)], dim=1)


@provokes("A is all A_i")
def concatenate__first_two(pairs: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    return torch.cat([A for A, _ in pairs[:2]]), torch.cat([B for _, B in pairs[:2]], dim=1)


@provokes("this is the mean of the updates")
def concatenate__mean(pairs: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    return torch.cat([A for A, _ in pairs]), torch.cat([B for _, B in pairs], dim=1) / len(pairs)


@provokes("no gradient reaches")
def concatenate__detached(pairs: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    return torch.cat([A.data for A, _ in pairs]), torch.cat([B.data for _, B in pairs], dim=1)


@provokes("in, torch.bfloat16 out")
def concatenate__in_float32(pairs: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    A, B = torch.cat([A for A, _ in pairs]), torch.cat([B for _, B in pairs], dim=1)
    return (A, B) if A.dtype == torch.float64 else (A.float(), B.float())


@provokes("whole: the updates themselves are still in it")
def cross_terms__whole_product(pairs: list[tuple[Tensor, Tensor]]) -> Tensor:
    return sum(B for _, B in pairs) @ sum(A for A, _ in pairs)


@provokes("these are the updates B_i A_i themselves")
def cross_terms__own_terms(pairs: list[tuple[Tensor, Tensor]]) -> Tensor:
    return sum(B @ A for A, B in pairs)


@provokes("the sign is the other way round")
def cross_terms__negative(pairs: list[tuple[Tensor, Tensor]]) -> Tensor:
    return sum(B @ A for A, B in pairs) - sum(B for _, B in pairs) @ sum(A for A, _ in pairs)


@provokes("only i < j")
def cross_terms__half(pairs: list[tuple[Tensor, Tensor]]) -> Tensor:
    return sum((B @ A for i, (_, B) in enumerate(pairs) for A, _ in pairs[i + 1:]), torch.zeros(len(pairs[0][1]), pairs[0][0].shape[1], dtype=pairs[0][0].dtype))


@provokes("a Tensor is wanted, got int 0")
def cross_terms__a_bare_zero(pairs: list[tuple[Tensor, Tensor]]) -> Tensor:
    return sum(B @ A for i, (_, B) in enumerate(pairs) for j, (A, _) in enumerate(pairs) if i != j)


@provokes("off by up to")
def cross_terms__two_only(pairs: list[tuple[Tensor, Tensor]]) -> Tensor:
    (A_1, B_1), (A_2, B_2) = pairs[0], pairs[-1]
    return B_1 @ A_2 + B_2 @ A_1 if len(pairs) > 1 else 0 * B_1 @ A_1


@provokes("something was rounded before the end")
def merge_in_float32__rounded_twice(W: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    return W + (scale * B @ A).to(W.dtype)


@provokes("something was rounded before the end")
def merge_in_float32__product_of_16_bit_factors(W: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    wide = torch.float64 if W.dtype == torch.float64 else torch.float32
    return (W.to(wide) + scale * (B @ A).to(wide)).to(W.dtype)


@provokes("it was computed in too few digits")
def merge_in_float32__always(W: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    return (W.float() + scale * B.float() @ A.float()).to(W.dtype)


@provokes("the result has W's type")
def merge_in_float32__not_rounded(W: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    wide = torch.float64 if W.dtype == torch.float64 else torch.float32
    return W.to(wide) + scale * B.to(wide) @ A.to(wide)


@provokes("the scale is missing")
def merge_in_float32__no_scale(W: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    return (W.double() + B.double() @ A.double()).to(W.dtype)


@provokes("changed its argument W")
def merge_in_float32__in_place(W: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    return W.copy_(W.double() + scale * B.double() @ A.double())


@provokes("do not count in the whole either")
def survivors__of_all(W: Tensor, dW: Tensor, dtype: torch.dtype) -> float:
    base = W.to(dtype)
    return ((base.double() + dW.double()).to(dtype) != base).double().mean().item()


@provokes("this is the share that was lost")
def survivors__the_lost(W: Tensor, dW: Tensor, dtype: torch.dtype) -> float:
    base = W.to(dtype)
    return ((base.double() + dW.double()).to(dtype) == base)[dW != 0].double().mean().item()


@provokes("round W + dW to the type before you compare")
def survivors__not_rounded(W: Tensor, dW: Tensor, dtype: torch.dtype) -> float:
    base = W.to(dtype).double()
    return (base + dW.double() != base)[dW != 0].double().mean().item()


@provokes("the base is round(W)")
def survivors__base_not_rounded(W: Tensor, dW: Tensor, dtype: torch.dtype) -> float:
    return ((W.double() + dW.double()).to(dtype) != W.to(dtype))[dW != 0].double().mean().item()


@provokes("dW is not rounded by itself")
def survivors__sum_in_the_type(W: Tensor, dW: Tensor, dtype: torch.dtype) -> float:
    return (W.to(dtype) + dW.to(dtype) != W.to(dtype))[dW != 0].double().mean().item()


@provokes("take the mean in float64")
def survivors__mean_in_float32(W: Tensor, dW: Tensor, dtype: torch.dtype) -> float:
    base = W.to(dtype)
    return ((base.double() + dW.double()).to(dtype) != base)[dW != 0].float().mean().item()


@provokes("a Python float is wanted")
def survivors__a_tensor(W: Tensor, dW: Tensor, dtype: torch.dtype) -> float:
    base = W.to(dtype)
    return ((base.double() + dW.double()).to(dtype) != base)[dW != 0].double().mean()


def _kept(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> dict:
    return {"trained": {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad},
            "optimizer": copy.deepcopy(optimizer.state_dict()), "random": torch.get_rng_state(), "step": step}


@provokes("these are the living parameters")
def what_resume_needs__no_copies(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> dict:
    return _kept(model, optimizer, step) | {"trained": {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}}


@provokes("state_dict() hands out the living tensors")
def what_resume_needs__living_moments(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> dict:
    return _kept(model, optimizer, step) | {"optimizer": optimizer.state_dict()}


@provokes("frozen tensors are kept, too")
def what_resume_needs__the_whole_model(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> dict:
    return _kept(model, optimizer, step) | {"trained": {name: tensor.clone() for name, tensor in model.state_dict().items()}}


@provokes("the optimizer's moments are missing")
def what_resume_needs__no_moments(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> dict:
    return _kept(model, optimizer, step) | {"optimizer": {"state": {}, "param_groups": copy.deepcopy(optimizer.state_dict()["param_groups"])}}


@provokes("'random' is missing")
def what_resume_needs__no_random_state(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> dict:
    kept = _kept(model, optimizer, step)
    del kept["random"]
    return kept


@provokes("only read the generator's state")
def what_resume_needs__a_new_seed(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> dict:
    torch.manual_seed(step)
    return _kept(model, optimizer, step)


@provokes("`step` is the next step's number already")
def what_resume_needs__one_step_on(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> dict:
    return _kept(model, optimizer, step + 1)


def _mix(folders: list[Path], weights: list[float], into: Path, scale_of, rslora: bool = False, into_A=lambda factor: 1.0, metadata=None, alpha=None) -> None:
    loaded = [load_file(folder / "adapter_model.safetensors") for folder in folders]
    configs = [json.loads((folder / "adapter_config.json").read_text()) for folder in folders]
    factors, rank = [weight * scale_of(config) for weight, config in zip(weights, configs)], sum(config["r"] for config in configs)
    mixed = {name: torch.cat([into_A(f) * t[name] for f, t in zip(factors, loaded)]) if "lora_A" in name else
             torch.cat([f * t[name] for f, t in zip(factors, loaded)], dim=1) for name in loaded[0]}
    into.mkdir(parents=True, exist_ok=True)
    save_file(mixed, into / "adapter_model.safetensors", metadata)
    flag = configs[-1].get("use_rslora", False) if rslora else False
    (into / "adapter_config.json").write_text(json.dumps(configs[-1] | {"r": rank, "lora_alpha": alpha or rank, "use_rslora": flag}))


def _scale(config: dict) -> float:
    return config["lora_alpha"] / (math.sqrt(config["r"]) if config.get("use_rslora") else config["r"])


@provokes("the scales are missing")
def scaled_mixture__without_scales(folders: list[Path], weights: list[float], into: Path) -> None:
    _mix(folders, weights, into, lambda config: 1.0)


@provokes("the weights are missing")
def scaled_mixture__without_weights(folders: list[Path], weights: list[float], into: Path) -> None:
    _mix(folders, [1.0] * len(weights), into, _scale)


@provokes("the sign of a weight was lost")
def scaled_mixture__roots_of_the_size(folders: list[Path], weights: list[float], into: Path) -> None:
    _mix(folders, [abs(weight) for weight in weights], into, _scale)


@provokes("off by up to")
def scaled_mixture__factor_on_both_sides(folders: list[Path], weights: list[float], into: Path) -> None:
    _mix(folders, weights, into, _scale, into_A=lambda factor: factor)


@provokes("your adapter_config.json multiplies again: lora_alpha / r is 12.5 / 5 = 2.5, it must be 1")
def scaled_mixture__alpha_left_as_it_was(folders: list[Path], weights: list[float], into: Path) -> None:
    _mix(folders, weights, into, _scale)
    config = json.loads((into / "adapter_config.json").read_text())
    (into / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 2.5 * config["r"]}))


@provokes("an rsLoRA's scale is alpha / √r")
def scaled_mixture__rslora_overlooked(folders: list[Path], weights: list[float], into: Path) -> None:
    _mix(folders, weights, into, lambda config: config["lora_alpha"] / config["r"])


@provokes("the new folder still says use_rslora")
def scaled_mixture__still_rslora(folders: list[Path], weights: list[float], into: Path) -> None:
    _mix(folders, weights, into, _scale, rslora=True)


@provokes("the new folder does not load")
def scaled_mixture__old_notes(folders: list[Path], weights: list[float], into: Path) -> None:
    with safe_open(folders[0] / "adapter_model.safetensors", "pt") as opened:
        _mix(folders, weights, into, _scale, metadata=opened.metadata())


@provokes("ranks 2 and 3 make rank 5")
def scaled_mixture__factors_added(folders: list[Path], weights: list[float], into: Path) -> None:
    loaded = [load_file(folder / "adapter_model.safetensors") for folder in folders]
    configs = [json.loads((folder / "adapter_config.json").read_text()) for folder in folders]
    rank = min(config["r"] for config in configs)                      # to be able to add them at all
    mixed = {name: sum(math.sqrt(abs(w * _scale(c))) * (t[name][:rank] if "lora_A" in name else t[name][:, :rank]) for w, c, t in zip(weights, configs, loaded))
             for name in loaded[0]}
    into.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in mixed.items()}, into / "adapter_model.safetensors")
    (into / "adapter_config.json").write_text(json.dumps(configs[0] | {"r": rank, "lora_alpha": rank, "use_rslora": False}))


@provokes("FileNotFoundError")
def scaled_mixture__no_folder_made(folders: list[Path], weights: list[float], into: Path) -> None:
    (into / "adapter_config.json").write_text("")
