"""Right answers in another style than the solutions': each must pass."""

import math

import numpy
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minilora import LoRA, LoRALinear


def lora_branch__einsum(x: Tensor, A: Tensor, B: Tensor, alpha: float, rank: int) -> Tensor:
    return torch.einsum("...r,or->...o", torch.einsum("...i,ri->...r", x, A), B).mul(alpha).div(rank)


def lora_branch__in_place_on_its_own_tensor(x: Tensor, A: Tensor, B: Tensor, alpha: float, rank: int) -> Tensor:
    y = F.linear(F.linear(x, A), B)
    y *= alpha
    y /= rank
    print("norm", y.norm().item())
    return y


def lora_branch__a_loop_over_the_rank(x: Tensor, A: Tensor, B: Tensor, alpha: float, rank: int) -> Tensor:
    y = x.new_zeros(*x.shape[:-1], B.shape[0])
    for a, b in zip(A, B.T):
        y = y + (x * a).sum(-1, keepdim=True) * b
    return y * alpha / rank


class LoRALayer__functional(nn.Module):
    def __init__(self, linear, rank, alpha):
        super().__init__()
        self.B = nn.Parameter(torch.zeros(linear.weight.shape[0], rank))
        self.A = nn.Parameter((2 * torch.rand(rank, linear.weight.shape[1]) - 1) / math.sqrt(linear.weight.shape[1]))
        self.base, self.rank, self.alpha = linear, rank, alpha
        for parameter in linear.parameters():
            parameter.requires_grad = False

    def forward(self, input):
        return F.linear(F.linear(input, self.A), self.B * self.alpha / self.rank) + F.linear(input, self.base.weight, self.base.bias)


def lora_gradients__by_autograd(G: Tensor, A: Tensor, B: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    A, B = A.detach().clone().requires_grad_(), B.detach().clone().requires_grad_()
    with torch.enable_grad():
        return torch.autograd.grad((scale * B @ A * G.detach()).sum(), (A, B))


def merge_lora__on_a_copy(W: Tensor, A: Tensor, B: Tensor, alpha: float, rank: int) -> Tensor:
    merged = W.detach().clone()
    merged += (alpha / rank) * (B @ A).to(W.dtype)
    return merged


def merge_lora__addmm_in_float64(W: Tensor, A: Tensor, B: Tensor, alpha: float, rank: int) -> Tensor:
    return torch.addmm(W.double(), B.double(), A.double(), alpha=alpha / rank).to(W)


def inject_lora__recursive(model: nn.Module, targets: list[str], rank: int, alpha: float) -> nn.Module:
    for parameter in model.parameters():
        parameter.requires_grad = False
    for name, child in model.named_children():
        if name in targets and isinstance(child, nn.Linear):
            setattr(model, name, LoRALinear(child, LoRA(rank, alpha)))
        else:
            inject_lora__recursive(child, targets, rank, alpha)
    return model


def lora_parameter_count__a_loop(shapes: list[tuple[int, int]], rank: int) -> int:
    total = 0
    for shape in shapes:
        total += rank * shape[0]
        total += rank * shape[1]
    return total


def best_rank__numpy(W: Tensor, rank: int) -> tuple[Tensor, float]:
    U, sigma, Vt = numpy.linalg.svd(W.detach().numpy(), full_matrices=False)
    sigma[rank:] = 0
    return torch.from_numpy(U @ numpy.diag(sigma) @ Vt), float((sigma**2).sum() / (W**2).sum())


def best_rank__eigenvectors(W: Tensor, rank: int) -> tuple[Tensor, float]:
    values, vectors = torch.linalg.eigh(W.T @ W)                 # rising
    keep = vectors[:, -rank:]
    return W @ keep @ keep.T, (values[-rank:].sum() / values.sum()).item()
