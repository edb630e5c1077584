"""Plausible mistakes, each of which the tests must reject with the message named here."""

import copy
import math

import torch
from torch import Tensor, nn

from lessons import provokes
from minilora import LoRA, LoRALinear


@provokes("the scale is missing")
def lora_branch__no_scale(x: Tensor, A: Tensor, B: Tensor, alpha: float, rank: int) -> Tensor:
    return x @ A.T @ B.T


@provokes("this looks like alpha alone")
def lora_branch__alpha_without_rank(x: Tensor, A: Tensor, B: Tensor, alpha: float, rank: int) -> Tensor:
    return alpha * (x @ A.T @ B.T)


@provokes("this looks like alpha / √rank")
def lora_branch__rslora(x: Tensor, A: Tensor, B: Tensor, alpha: float, rank: int) -> Tensor:
    return alpha / math.sqrt(rank) * (x @ A.T @ B.T)


@provokes("B A was formed")
def lora_branch__forms_the_product(x: Tensor, A: Tensor, B: Tensor, alpha: float, rank: int) -> Tensor:
    return alpha / rank * (x @ (B @ A).T)


@provokes("with B = 0 the branch must add nothing")
def lora_branch__adds_x(x: Tensor, A: Tensor, B: Tensor, alpha: float, rank: int) -> Tensor:
    return alpha / rank * (x @ A.T @ B.T) + x.sum()


class _LoRALayer(nn.Module):
    """What the wrong layers share; each has one mistake in it."""

    def __init__(self, linear: nn.Linear, rank: int, alpha: float):
        super().__init__()
        self.base = linear.requires_grad_(False)
        self.scale = alpha / rank
        self.A = nn.Parameter(torch.empty(rank, linear.in_features))
        self.B = nn.Parameter(torch.zeros(linear.out_features, rank))
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.scale * (x @ self.A.T @ self.B.T)


@provokes("the base's bias is not frozen")
class LoRALayer__bias_trains(_LoRALayer):
    def __init__(self, linear: nn.Linear, rank: int, alpha: float):
        super().__init__(linear, rank, alpha)
        if linear.bias is not None:
            linear.bias.requires_grad_(True)


@provokes("W moved in training")
class LoRALayer__base_trains(_LoRALayer):
    def __init__(self, linear: nn.Linear, rank: int, alpha: float):
        super().__init__(linear, rank, alpha)
        linear.requires_grad_(True)


@provokes("this looks like alpha alone")
class LoRALayer__alpha_without_rank(_LoRALayer):
    def __init__(self, linear: nn.Linear, rank: int, alpha: float):
        super().__init__(linear, rank, alpha)
        self.scale = alpha


@provokes("the bias is counted twice")
class LoRALayer__bias_twice(_LoRALayer):
    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y if self.base.bias is None else y + self.base.bias


@provokes("the adapted layer must start as the base")
class LoRALayer__B_random(_LoRALayer):
    def __init__(self, linear: nn.Linear, rank: int, alpha: float):
        super().__init__(linear, rank, alpha)
        nn.init.kaiming_uniform_(self.B, a=math.sqrt(5))


@provokes("were A zero too")
class LoRALayer__A_zero(_LoRALayer):
    def __init__(self, linear: nn.Linear, rank: int, alpha: float):
        super().__init__(linear, rank, alpha)
        nn.init.zeros_(self.A)


@provokes("A is drawn too wide")
class LoRALayer__A_standard_normal(_LoRALayer):
    def __init__(self, linear: nn.Linear, rank: int, alpha: float):
        super().__init__(linear, rank, alpha)
        nn.init.normal_(self.A)


@provokes("A is (rank, in) and B is (out, rank)")
class LoRALayer__factors_transposed(_LoRALayer):
    def __init__(self, linear: nn.Linear, rank: int, alpha: float):
        super().__init__(linear, rank, alpha)
        self.A, self.B = nn.Parameter(self.A.T.clone()), nn.Parameter(self.B.T.clone())

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.scale * (x @ self.A @ self.B)


@provokes("W is replaced")
class LoRALayer__replaces_W(_LoRALayer):
    def forward(self, x: Tensor) -> Tensor:
        return self.scale * (x @ self.A.T @ self.B.T)


@provokes("the two are in the wrong order")
def lora_gradients__swapped(G: Tensor, A: Tensor, B: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    return scale * G @ A.T, scale * B.T @ G


@provokes("the scale is missing in dL/dA")
def lora_gradients__no_scale(G: Tensor, A: Tensor, B: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    return B.T @ G, G @ A.T


@provokes("the scale is squared in dL/dB")
def lora_gradients__scale_squared_in_B(G: Tensor, A: Tensor, B: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    return scale * B.T @ G, scale**2 * G @ A.T


@provokes("dL/dA: shape")
def lora_gradients__transposed(G: Tensor, A: Tensor, B: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    return (scale * B.T @ G).T, (scale * G @ A.T).T


@provokes("the scale is missing")
def merge_lora__no_scale(W: Tensor, A: Tensor, B: Tensor, alpha: float, rank: int) -> Tensor:
    return W + B @ A


@provokes("this looks like alpha alone")
def merge_lora__alpha_without_rank(W: Tensor, A: Tensor, B: Tensor, alpha: float, rank: int) -> Tensor:
    return W + alpha * B @ A


@provokes("merge_lora changed its argument W")
def merge_lora__in_place(W: Tensor, A: Tensor, B: Tensor, alpha: float, rank: int) -> Tensor:
    W += alpha / rank * B @ A
    return W


@provokes("merge_lora changed its argument W")
def merge_lora__in_place_and_a_copy(W: Tensor, A: Tensor, B: Tensor, alpha: float, rank: int) -> Tensor:
    return W.add_(alpha / rank * B @ A).clone()


@provokes("W is missing")
def merge_lora__update_alone(W: Tensor, A: Tensor, B: Tensor, alpha: float, rank: int) -> Tensor:
    return alpha / rank * B @ A


def _inject(model: nn.Module, matches, rank: int, alpha: float) -> nn.Module:
    for name, linear in list(model.named_modules()):
        parent, _, last = name.rpartition(".")
        if isinstance(linear, nn.Linear) and matches(name, last):
            setattr(model.get_submodule(parent), last, LoRALinear(linear, LoRA(rank=rank, alpha=alpha)))
    return model


@provokes("not everything is frozen")
def inject_lora__norms_train(model: nn.Module, targets: list[str], rank: int, alpha: float) -> nn.Module:
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Embedding)):
            module.requires_grad_(False)
    return _inject(model, lambda name, last: last in targets, rank, alpha)


@provokes("not everything is frozen")
def inject_lora__freezes_only_targets(model: nn.Module, targets: list[str], rank: int, alpha: float) -> nn.Module:
    for name, module in model.named_modules():
        if name.rpartition(".")[2] in targets:
            module.requires_grad_(False)
    return _inject(model, lambda name, last: last in targets, rank, alpha)


@provokes("the new A and B are frozen too")
def inject_lora__freezes_last(model: nn.Module, targets: list[str], rank: int, alpha: float) -> nn.Module:
    return _inject(model, lambda name, last: last in targets, rank, alpha).requires_grad_(False)


@provokes("means the part of the name after the last dot, whole")
def inject_lora__matches_a_bare_ending(model: nn.Module, targets: list[str], rank: int, alpha: float) -> nn.Module:
    return _inject(model.requires_grad_(False), lambda name, last: name.endswith(tuple(targets)), rank, alpha)


@provokes("means the part of the name after the last dot, whole")
def inject_lora__matches_anywhere(model: nn.Module, targets: list[str], rank: int, alpha: float) -> nn.Module:
    return _inject(model.requires_grad_(False), lambda name, last: any(target in name for target in targets), rank, alpha)


@provokes("not every target was swapped")
def inject_lora__first_target_only(model: nn.Module, targets: list[str], rank: int, alpha: float) -> nn.Module:
    return _inject(model.requires_grad_(False), lambda name, last: last == targets[0], rank, alpha)


@provokes("not a copy")
def inject_lora__a_copy(model: nn.Module, targets: list[str], rank: int, alpha: float) -> nn.Module:
    return _inject(copy.deepcopy(model).requires_grad_(False), lambda name, last: last in targets, rank, alpha)


@provokes("rank and alpha do not reach the layers")
def inject_lora__default_alpha(model: nn.Module, targets: list[str], rank: int, alpha: float) -> nn.Module:
    return _inject(model.requires_grad_(False), lambda name, last: last in targets, rank, 8.0)


@provokes("A has rank · in entries and B has out · rank")
def lora_parameter_count__only_A(shapes: list[tuple[int, int]], rank: int) -> int:
    return sum(rank * into for out, into in shapes)


@provokes("A has rank · in entries and B has out · rank")
def lora_parameter_count__square_case(shapes: list[tuple[int, int]], rank: int) -> int:
    return sum(2 * rank * into for out, into in shapes)


@provokes("these are W's own entries")
def lora_parameter_count__counts_W(shapes: list[tuple[int, int]], rank: int) -> int:
    return sum(out * into for out, into in shapes)


@provokes("A has rank · in entries and B has out · rank")
def lora_parameter_count__first_shape_only(shapes: list[tuple[int, int]], rank: int) -> int:
    return rank * sum(shapes[0]) if shapes else 0


@provokes("not the best of its rank")
def best_rank__smallest(W: Tensor, rank: int) -> tuple[Tensor, float]:
    U, sigma, Vt = torch.linalg.svd(W, full_matrices=False)
    return U[:, -rank:] * sigma[-rank:] @ Vt[-rank:], (sigma[:rank].square().sum() / sigma.square().sum()).item()


@provokes("mind that svd returns Vᵀ")
def best_rank__columns_of_Vt(W: Tensor, rank: int) -> tuple[Tensor, float]:
    U, sigma, Vt = torch.linalg.svd(W, full_matrices=False)
    side = min(W.shape)
    right = Vt.clone()
    right[:, :side] = Vt[:, :side].T
    return U[:, :rank] * sigma[:rank] @ right[:rank], (sigma[:rank].square().sum() / sigma.square().sum()).item()


@provokes("energy is Σ σ², not Σ σ")
def best_rank__not_squared(W: Tensor, rank: int) -> tuple[Tensor, float]:
    U, sigma, Vt = torch.linalg.svd(W, full_matrices=False)
    return U[:, :rank] * sigma[:rank] @ Vt[:rank], (sigma[:rank].sum() / sigma.sum()).item()


@provokes("this is the share that is lost")
def best_rank__share_lost(W: Tensor, rank: int) -> tuple[Tensor, float]:
    U, sigma, Vt = torch.linalg.svd(W, full_matrices=False)
    return U[:, :rank] * sigma[:rank] @ Vt[:rank], (sigma[rank:].square().sum() / sigma.square().sum()).item()


@provokes("the share is of squares")
def best_rank__norms(W: Tensor, rank: int) -> tuple[Tensor, float]:
    U, sigma, Vt = torch.linalg.svd(W, full_matrices=False)
    return U[:, :rank] * sigma[:rank] @ Vt[:rank], (sigma[:rank].norm() / sigma.norm()).item()


# Nearly right: each of these passes where the scale is whole, one size is tried, or nobody looks at what was given.

@provokes("throws the fraction away")
def lora_branch__floored_scale(x: Tensor, A: Tensor, B: Tensor, alpha: float, rank: int) -> Tensor:
    return alpha // rank * (x @ A.T @ B.T)


@provokes("lora_branch changed its argument x")
def lora_branch__spoils_x(x: Tensor, A: Tensor, B: Tensor, alpha: float, rank: int) -> Tensor:
    x *= alpha / rank
    return x @ A.T @ B.T


@provokes("no gradient reaches")
def lora_branch__detached(x: Tensor, A: Tensor, B: Tensor, alpha: float, rank: int) -> Tensor:
    return (alpha / rank * (x @ A.T @ B.T)).detach()


@provokes("no gradient reaches A")
def lora_branch__A_through_data(x: Tensor, A: Tensor, B: Tensor, alpha: float, rank: int) -> Tensor:
    return alpha / rank * (x @ A.data.T @ B.T)


@provokes("the scale is missing")
def lora_branch__rank_written_in(x: Tensor, A: Tensor, B: Tensor, alpha: float, rank: int) -> Tensor:
    return alpha / 2 * (x @ A.T @ B.T)


@provokes("returned None")
def lora_branch__prints(x: Tensor, A: Tensor, B: Tensor, alpha: float, rank: int) -> Tensor:
    print(alpha / rank * (x @ A.T @ B.T))


@provokes("throws the fraction away")
class LoRALayer__floored_scale(_LoRALayer):
    def __init__(self, linear: nn.Linear, rank: int, alpha: float):
        super().__init__(linear, rank, alpha)
        self.scale = alpha // rank


@provokes("changed its argument x")
class LoRALayer__spoils_x(_LoRALayer):
    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        return y + x.mul_(self.scale) @ self.A.T @ self.B.T


@provokes("no gradient reaches x")
class LoRALayer__deaf_below(_LoRALayer):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.detach())


@provokes("the gradient that reaches x is off")
class LoRALayer__base_without_gradient(_LoRALayer):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            y = self.base(x)
        return y + self.scale * (x @ self.A.T @ self.B.T)


@provokes('missing the required "forward" function')
class LoRALayer__misspelt(nn.Module):
    def __init__(self, linear: nn.Linear, rank: int, alpha: float):
        super().__init__()
        self.base, self.scale = linear.requires_grad_(False), alpha / rank
        self.A = nn.Parameter(torch.empty(rank, linear.in_features))
        self.B = nn.Parameter(torch.zeros(linear.out_features, rank))

    def foward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.scale * (x @ self.A.T @ self.B.T)


@provokes("changed its argument G")
def lora_gradients__spoils_G(G: Tensor, A: Tensor, B: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    G *= scale
    return B.T @ G, G @ A.T


@provokes("throws the fraction away")
def merge_lora__floored_scale(W: Tensor, A: Tensor, B: Tensor, alpha: float, rank: int) -> Tensor:
    return W + (alpha // rank * B @ A).to(W.dtype)


@provokes("W's dtype")
def merge_lora__in_the_factors_dtype(W: Tensor, A: Tensor, B: Tensor, alpha: float, rank: int) -> Tensor:
    return W + alpha / rank * B @ A


@provokes("is no nn.Linear stays as it is")
def inject_lora__any_layer_of_that_name(model: nn.Module, targets: list[str], rank: int, alpha: float) -> nn.Module:
    for name, layer in list(model.requires_grad_(False).named_modules()):
        parent, _, last = name.rpartition(".")
        if last in targets:
            layer = layer if isinstance(layer, nn.Linear) else nn.Linear(4, 4)
            setattr(model.get_submodule(parent), last, LoRALinear(layer, LoRA(rank=rank, alpha=alpha)))
    return model


@provokes("rank and alpha do not reach the layers")
def inject_lora__floored_scale(model: nn.Module, targets: list[str], rank: int, alpha: float) -> nn.Module:
    return _inject(model.requires_grad_(False), lambda name, last: last in targets, rank, alpha // rank * rank)
