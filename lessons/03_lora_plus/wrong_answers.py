"""Plausible mistakes in lesson 03. The tests must reject each one, with the message named here."""

import math

import torch
from torch import Tensor, nn

from lessons import provokes
from minilora import LoRA, LoRAPlus, adapters

Terms = tuple[Tensor, Tensor, Tensor]


@provokes("the scale is missing")
def three_terms__no_scale(x: Tensor, A: Tensor, B: Tensor, dA: Tensor, dB: Tensor, scale: float) -> Terms:
    return x @ A.T @ dB.T, x @ dA.T @ B.T, x @ dA.T @ dB.T


@provokes("in another order")
def three_terms__in_another_order(x: Tensor, A: Tensor, B: Tensor, dA: Tensor, dB: Tensor, scale: float) -> Terms:
    return scale * (x @ dA.T @ B.T), scale * (x @ A.T @ dB.T), scale * (x @ dA.T @ dB.T)


@provokes("A has moved already")
def three_terms__one_after_the_other(x: Tensor, A: Tensor, B: Tensor, dA: Tensor, dB: Tensor, scale: float) -> Terms:
    return scale * (x @ (A + dA).T @ dB.T), scale * (x @ dA.T @ B.T), scale * (x @ dA.T @ dB.T)


@provokes("B has moved already")
def three_terms__last_term_twice(x: Tensor, A: Tensor, B: Tensor, dA: Tensor, dB: Tensor, scale: float) -> Terms:
    return scale * (x @ A.T @ dB.T), scale * (x @ dA.T @ (B + dB).T), scale * (x @ dA.T @ dB.T)


@provokes("this is the branch before the step")
def three_terms__with_the_old_product(x: Tensor, A: Tensor, B: Tensor, dA: Tensor, dB: Tensor, scale: float) -> Terms:
    return scale * (x @ A.T @ B.T), scale * (x @ A.T @ dB.T), scale * (x @ dA.T @ B.T)


@provokes("the scale is squared")
def three_terms__scale_twice(x: Tensor, A: Tensor, B: Tensor, dA: Tensor, dB: Tensor, scale: float) -> Terms:
    return scale * (x @ A.T @ dB.T), scale * (x @ dA.T @ B.T), scale**2 * (x @ dA.T @ dB.T)


@provokes("let x meet A or δA first")
def three_terms__forms_the_large_matrix(x: Tensor, A: Tensor, B: Tensor, dA: Tensor, dB: Tensor, scale: float) -> Terms:
    return scale * (x @ (dB @ A).T), scale * (x @ (B @ dA).T), scale * (x @ (dB @ dA).T)


@provokes("the value is right, but the gradient that reaches")
def three_terms__detached(x: Tensor, A: Tensor, B: Tensor, dA: Tensor, dB: Tensor, scale: float) -> Terms:
    return scale * (x @ A.T @ dB.T), scale * (x @ dA.T @ B.T), (scale * (x @ dA.T @ dB.T)).detach()


@provokes("no gradient reaches dB")
def three_terms__step_as_a_constant(x: Tensor, A: Tensor, B: Tensor, dA: Tensor, dB: Tensor, scale: float) -> Terms:
    dA, dB = dA.detach(), dB.detach()
    return scale * (x @ A.T @ dB.T), scale * (x @ dA.T @ B.T), scale * (x @ dA.T @ dB.T)


@provokes("float32 goes in")
def three_terms__in_float64(x: Tensor, A: Tensor, B: Tensor, dA: Tensor, dB: Tensor, scale: float) -> Terms:
    x, A, B, dA, dB = (t.double() for t in (x, A, B, dA, dB))
    return scale * (x @ A.T @ dB.T), scale * (x @ dA.T @ B.T), scale * (x @ dA.T @ dB.T)


def _slope(u: list[float], v: list[float]) -> float:
    middle, height = sum(u) / len(u), sum(v) / len(v)
    return sum((a - middle) * (b - height) for a, b in zip(u, v)) / sum((a - middle) ** 2 for a in u)


@provokes("the slope in log against log")
def growth_exponent__without_logarithms(widths: list[int], sizes: list[float]) -> float:
    return _slope(widths, sizes)


@provokes("the slope in log against log")
def growth_exponent__log_of_the_sizes_only(widths: list[int], sizes: list[float]) -> float:
    return _slope(widths, [math.log(size) for size in sizes])


@provokes("between the first and the last point")
def growth_exponent__two_points(widths: list[int], sizes: list[float]) -> float:
    return math.log(sizes[-1] / sizes[0]) / math.log(widths[-1] / widths[0])


@provokes("subtract the means first")
def growth_exponent__through_zero(widths: list[int], sizes: list[float]) -> float:
    across, up = [math.log(width) for width in widths], [math.log(size) for size in sizes]
    return sum(u * v for u, v in zip(across, up)) / sum(u * u for u in across)


@provokes("divide by the variance of log width")
def growth_exponent__of_the_widths(widths: list[int], sizes: list[float]) -> float:
    across, up = [math.log(width) for width in widths], [math.log(size) for size in sizes]
    return 1 / _slope(up, across) if any(u != up[0] for u in up) else 0.0


@provokes("a Python float is wanted")
def growth_exponent__a_tensor(widths: list[int], sizes: list[float]) -> float:
    across, up = torch.tensor(widths).double().log(), torch.tensor(sizes).double().log()
    return (across - across.mean()) @ (up - up.mean()) / (across - across.mean()).square().sum()


@provokes("A moves too")
def widest_useful_rate__A_stands_still(from_B: float, from_A: float, limit: float) -> float:
    return limit / from_B if from_B else math.inf


@provokes("B moves A's old features")
def widest_useful_rate__only_the_last_terms(from_B: float, from_A: float, limit: float) -> float:
    return math.sqrt(limit / from_A) if from_A else math.inf


@provokes("not from_A · η")
def widest_useful_rate__linear(from_B: float, from_A: float, limit: float) -> float:
    return limit / (from_B + from_A) if from_B + from_A else math.inf


@provokes("loses its digits")
def widest_useful_rate__cancels(from_B: float, from_A: float, limit: float) -> float:
    if from_A == 0:
        return limit / from_B if from_B else math.inf
    return (math.sqrt(from_B**2 + 4 * from_A * limit) - from_B) / (2 * from_A)


@provokes("a division by zero")
def widest_useful_rate__divides_by_from_A(from_B: float, from_A: float, limit: float) -> float:
    return (math.sqrt(from_B**2 + 4 * from_A * limit) - from_B) / (2 * from_A)


@provokes("nothing moves, so no rate is too large")
def widest_useful_rate__zero_where_nothing_moves(from_B: float, from_A: float, limit: float) -> float:
    return 2 * limit / (from_B + math.sqrt(from_B**2 + 4 * from_A * limit)) if from_B or from_A else 0.0


@provokes("divide by 2 · from_A")
def widest_useful_rate__twice(from_B: float, from_A: float, limit: float) -> float:
    return 4 * limit / (from_B + math.sqrt(from_B**2 + 4 * from_A * limit)) if from_B or from_A else math.inf


@provokes("this is the negative root")
def widest_useful_rate__other_root(from_B: float, from_A: float, limit: float) -> float:
    return -(from_B + math.sqrt(from_B**2 + 4 * from_A * limit)) / (2 * from_A) if from_A else math.inf


@provokes("A's rate comes first")
def balanced_rates__swapped(from_B: float, from_A: float, limit: float) -> tuple[float, float]:
    return limit / (2 * from_B), from_B / from_A


@provokes("takes all of it")
def balanced_rates__whole_limit(from_B: float, from_A: float, limit: float) -> tuple[float, float]:
    return from_B / from_A, limit / from_B


@provokes("A's rate is multiplied by B's")
def balanced_rates__as_if_apart(from_B: float, from_A: float, limit: float) -> tuple[float, float]:
    return limit / (2 * from_A), limit / (2 * from_B)


@provokes("A's rate must be 64 times lower")
def balanced_rates__root_of_from_A(from_B: float, from_A: float, limit: float) -> tuple[float, float]:
    return math.sqrt(limit / (2 * from_A)), limit / (2 * from_B)


def _groups(model: nn.Module, fast: list, lr: float, ratio: float, weight_decay: float, vectors: float = 0.0) -> list[dict]:
    chosen = {id(p) for p in fast}
    rest = [p for p in model.parameters() if p.requires_grad and id(p) not in chosen]
    groups = [{"params": fast, "lr": ratio * lr, "weight_decay": weight_decay},
              {"params": [p for p in rest if p.dim() >= 2], "lr": lr, "weight_decay": weight_decay},
              {"params": [p for p in rest if p.dim() < 2], "lr": lr, "weight_decay": vectors}]
    return [group for group in groups if group["params"]]


def _Bs(model: nn.Module) -> list:
    return [p for p in {layer.B for _, layer in adapters(model)} if p.requires_grad]


@provokes("whatever it is called")
def lora_plus_groups__by_the_name_B(model: nn.Module, lr: float, ratio: float, weight_decay: float = 0.0) -> list[dict]:
    return _groups(model, [p for name, p in model.named_parameters() if p.requires_grad and name.endswith(".B")], lr, ratio, weight_decay)


@provokes("whatever it is called")
def lora_plus_groups__by_a_part_of_the_name(model: nn.Module, lr: float, ratio: float, weight_decay: float = 0.0) -> list[dict]:
    return _groups(model, [p for name, p in model.named_parameters() if p.requires_grad and "B" in name], lr, ratio, weight_decay)


@provokes("is a vector")
def lora_plus_groups__vectors_are_fast_too(model: nn.Module, lr: float, ratio: float, weight_decay: float = 0.0) -> list[dict]:
    groups = _groups(model, _Bs(model), lr, ratio, weight_decay)
    for group in groups:
        if group["params"][0].dim() < 2:
            group["lr"] = ratio * lr
    return groups


@provokes("stands in no group")
def lora_plus_groups__only_A_and_B(model: nn.Module, lr: float, ratio: float, weight_decay: float = 0.0) -> list[dict]:
    As = [layer.A for _, layer in adapters(model) if layer.A.requires_grad]
    groups = [{"params": As, "lr": lr, "weight_decay": weight_decay}, {"params": _Bs(model), "lr": ratio * lr, "weight_decay": weight_decay}]
    return [group for group in groups if group["params"]]


@provokes("is frozen and stands in a group")
def lora_plus_groups__frozen_too(model: nn.Module, lr: float, ratio: float, weight_decay: float = 0.0) -> list[dict]:
    fast = {layer.B for _, layer in adapters(model)}
    groups = [{"params": [p for p in model.parameters() if p in fast], "lr": ratio * lr, "weight_decay": weight_decay},
              {"params": [p for p in model.parameters() if p not in fast and p.dim() >= 2], "lr": lr, "weight_decay": weight_decay},
              {"params": [p for p in model.parameters() if p not in fast and p.dim() < 2], "lr": lr, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


@provokes("is a vector (dim() < 2)")
def lora_plus_groups__vectors_decay(model: nn.Module, lr: float, ratio: float, weight_decay: float = 0.0) -> list[dict]:
    return _groups(model, _Bs(model), lr, ratio, weight_decay, vectors=weight_decay)


@provokes("is no vector")
def lora_plus_groups__decay_without_effect(model: nn.Module, lr: float, ratio: float, weight_decay: float = 0.0) -> list[dict]:
    return _groups(model, _Bs(model), lr, ratio, 0.0)


@provokes("an empty group")
def lora_plus_groups__an_empty_group(model: nn.Module, lr: float, ratio: float, weight_decay: float = 0.0) -> list[dict]:
    groups = _groups(model, _Bs(model), lr, ratio, weight_decay)
    return groups + [{"params": [], "lr": lr, "weight_decay": 0.0}] * (3 - len(groups))


@provokes("stands in the groups twice")
def lora_plus_groups__a_shared_B_twice(model: nn.Module, lr: float, ratio: float, weight_decay: float = 0.0) -> list[dict]:
    return _groups(model, [layer.B for _, layer in adapters(model) if layer.B.requires_grad], lr, ratio, weight_decay)


@provokes("learns at lr: ratio · lr is wanted")
def lora_plus_groups__one_rate(model: nn.Module, lr: float, ratio: float, weight_decay: float = 0.0) -> list[dict]:
    return _groups(model, _Bs(model), lr, 1.0, weight_decay)


@provokes("is an adapter's B: ratio · lr")
def lora_plus_groups__slower(model: nn.Module, lr: float, ratio: float, weight_decay: float = 0.0) -> list[dict]:
    return _groups(model, _Bs(model), lr, 1 / ratio, weight_decay)


def _plain(plus: LoRAPlus, alpha: float, optimizer: str) -> LoRA:
    if optimizer not in ("adam", "sgd"):
        raise ValueError(f"optimizer must be 'adam' or 'sgd', got {optimizer!r}")
    return LoRA(rank=plus.rank, alpha=alpha, dropout=plus.dropout, rslora=plus.rslora)


def _right(plus: LoRAPlus, optimizer: str) -> float:
    return plus.alpha * (plus.ratio if optimizer == "adam" else math.sqrt(plus.ratio))


@provokes("SGD does not divide its step")
def ratio_as_alpha__sgd_as_adam(plus: LoRAPlus, optimizer: str) -> LoRA:
    return _plain(plus, plus.alpha * plus.ratio, optimizer)


@provokes("Adam divides its step")
def ratio_as_alpha__adam_as_sgd(plus: LoRAPlus, optimizer: str) -> LoRA:
    return _plain(plus, plus.alpha * math.sqrt(plus.ratio), optimizer)


@provokes("alpha was divided by the ratio")
def ratio_as_alpha__divided(plus: LoRAPlus, optimizer: str) -> LoRA:
    return _plain(plus, plus.alpha / plus.ratio, optimizer)


@provokes("alpha is plus's own")
def ratio_as_alpha__same_alpha(plus: LoRAPlus, optimizer: str) -> LoRA:
    return _plain(plus, plus.alpha, optimizer)


@provokes("wanted is the k with k² = ratio, so k = √ratio")
def ratio_as_alpha__sgd_squared(plus: LoRAPlus, optimizer: str) -> LoRA:
    return _plain(plus, plus.alpha * (plus.ratio if optimizer == "adam" else plus.ratio**2), optimizer)


@provokes("under Adam k is the ratio itself")
def ratio_as_alpha__adam_squared(plus: LoRAPlus, optimizer: str) -> LoRA:
    return _plain(plus, plus.alpha * (plus.ratio**2 if optimizer == "adam" else math.sqrt(plus.ratio)), optimizer)


@provokes("dropout is plus's own")
def ratio_as_alpha__forgets_dropout(plus: LoRAPlus, optimizer: str) -> LoRA:
    return LoRA(rank=plus.rank, alpha=_plain(plus, _right(plus, optimizer), optimizer).alpha, rslora=plus.rslora)


@provokes("rslora is plus's own")
def ratio_as_alpha__forgets_rslora(plus: LoRAPlus, optimizer: str) -> LoRA:
    return LoRA(rank=plus.rank, alpha=_plain(plus, _right(plus, optimizer), optimizer).alpha, dropout=plus.dropout)


@provokes("a plain ml.LoRA is wanted")
def ratio_as_alpha__still_with_a_ratio(plus: LoRAPlus, optimizer: str) -> LoRA:
    return LoRAPlus(rank=plus.rank, alpha=_plain(plus, _right(plus, optimizer), optimizer).alpha, dropout=plus.dropout, rslora=plus.rslora, ratio=1.0)


@provokes("is neither adam nor sgd")
def ratio_as_alpha__anything_else_is_sgd(plus: LoRAPlus, optimizer: str) -> LoRA:
    return LoRA(rank=plus.rank, alpha=_right(plus, optimizer), dropout=plus.dropout, rslora=plus.rslora)


@provokes("should name what was given")
def ratio_as_alpha__a_mute_error(plus: LoRAPlus, optimizer: str) -> LoRA:
    if optimizer not in ("adam", "sgd"):
        raise ValueError("unknown optimizer")
    return _plain(plus, _right(plus, optimizer), optimizer)


@provokes("so the same decay shrinks it ratio times as much")
def decay_where__the_same_for_both(model: nn.Module, lr: float, ratio: float, weight_decay: float) -> list[dict]:
    return _groups(model, _Bs(model), lr, ratio, weight_decay, vectors=weight_decay)


def _two(model: nn.Module, lr: float, ratio: float, decay_B: float, decay: float) -> list[dict]:
    fast = _Bs(model)
    groups = _groups(model, fast, lr, ratio, decay, vectors=decay)
    for group in groups:
        if any(p is group["params"][0] for p in fast):
            group["weight_decay"] = decay_B
    return groups


@provokes("divide by the ratio")
def decay_where__multiplied(model: nn.Module, lr: float, ratio: float, weight_decay: float) -> list[dict]:
    return _two(model, lr, ratio, weight_decay * ratio, weight_decay)


@provokes("without any decay B does not shrink")
def decay_where__none_for_B(model: nn.Module, lr: float, ratio: float, weight_decay: float) -> list[dict]:
    return _two(model, lr, ratio, 0.0, weight_decay)


@provokes("what is no B keeps its decay")
def decay_where__on_A_instead(model: nn.Module, lr: float, ratio: float, weight_decay: float) -> list[dict]:
    return _two(model, lr, ratio, weight_decay / ratio, weight_decay * ratio)


@provokes("what is no B keeps its decay")
def decay_where__spares_vectors(model: nn.Module, lr: float, ratio: float, weight_decay: float) -> list[dict]:
    groups = _two(model, lr, ratio, weight_decay / ratio, weight_decay)
    return [group | {"weight_decay": 0.0} if group["params"][0].dim() < 2 else group for group in groups]


@provokes("B learns at ratio · lr")
def decay_where__one_rate(model: nn.Module, lr: float, ratio: float, weight_decay: float) -> list[dict]:
    return _two(model, lr, 1.0, weight_decay / ratio, weight_decay)


@provokes("an empty group")
def decay_where__an_empty_group(model: nn.Module, lr: float, ratio: float, weight_decay: float) -> list[dict]:
    Bs = {layer.B for _, layer in adapters(model)}
    return [{"params": [p for p in model.parameters() if p.requires_grad and p in Bs], "lr": ratio * lr, "weight_decay": weight_decay / ratio},
            {"params": [p for p in model.parameters() if p.requires_grad and p not in Bs], "lr": lr, "weight_decay": weight_decay}]
