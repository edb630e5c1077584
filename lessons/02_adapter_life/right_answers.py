"""Right answers in another style, which the tests must take."""

import io
import json
import struct
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn


def adapter_bytes__with_struct(content: bytes) -> dict[str, int]:
    (size,) = struct.unpack_from("<Q", content)
    header = json.loads(content[8:][:size].decode())
    header.pop("__metadata__", None)
    return dict(length=8, header=size) | {name: int.__rsub__(*about["data_offsets"]) for name, about in header.items()}


def concatenate__step_by_step(pairs: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    A, B = pairs[0]
    for more_A, more_B in pairs[1:]:
        A, B = torch.vstack((more_A, A)), torch.hstack((more_B, B))    # any order will do, if it is the same for both
    return A, B


def cross_terms__pair_by_pair(pairs: list[tuple[Tensor, Tensor]]) -> Tensor:
    total = pairs[0][1] @ pairs[0][0] * 0
    for i, (_, B) in enumerate(pairs):
        for j, (A, _) in enumerate(pairs):
            if i != j:
                total = total + torch.einsum("or,ri->oi", B, A)
    return total


def cross_terms__stacked(pairs: list[tuple[Tensor, Tensor]]) -> Tensor:
    A, B = torch.stack([A for A, _ in pairs]), torch.stack([B for _, B in pairs])
    return torch.einsum("aor,bri->oi", B, A) - torch.einsum("aor,ari->oi", B, A)


def merge_in_float32__in_place_on_a_copy(W: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    merged = W.double() if W.dtype != torch.float64 else W.clone()
    merged += torch.einsum("or,ri->oi", B.double(), A.double()).mul(scale)
    return merged.type_as(W)


def merge_in_float32__addmm(W: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    wide = torch.promote_types(W.dtype, torch.float32)
    return torch.addmm(W.to(wide), B.to(wide), A.to(wide), alpha=scale).to(W.dtype)


def survivors__by_counting(W: Tensor, dW: Tensor, dtype: torch.dtype) -> float:
    moved = 0
    for w, d in zip(W.flatten().to(dtype), dW.flatten()):
        moved += bool(d) and (w.double() + d.double()).to(dtype).item() != w.item()
    return moved / int(dW.count_nonzero())


def what_resume_needs__through_a_file(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> dict:
    trained = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            trained[name] = parameter.data
    file = io.BytesIO()
    torch.save(dict(step=step, random=torch.random.get_rng_state(), optimizer=optimizer.state_dict(), trained=trained), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def scaled_mixture__factor_in_A_and_a_scale_of_its_own(folders: list[Path], weights: list[float], into: Path) -> None:
    mixed, rank = {}, 0
    for folder, weight in zip(folders, weights):
        config = json.loads(Path(folder, "adapter_config.json").read_bytes())
        scale = config["lora_alpha"] / config["r"] ** (0.5 if config.get("use_rslora", False) else 1)
        rank += config["r"]
        for name, tensor in load_file(Path(folder, "adapter_model.safetensors")).items():
            is_A = name.endswith(".lora_A.weight")
            mixed.setdefault(name, []).append(tensor * weight * scale / 2 if is_A else tensor)
    Path(into).mkdir(exist_ok=True, parents=True)
    save_file({name: torch.cat(parts, dim=0 if name.endswith(".lora_A.weight") else 1) for name, parts in mixed.items()}, Path(into, "adapter_model.safetensors"))
    config.update(r=rank, lora_alpha=2.0 * rank, use_rslora=False)
    Path(into, "adapter_config.json").write_text(json.dumps(config, indent=2))
