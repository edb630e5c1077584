"""Right answers in another style than the solutions': each must pass."""

import torch
import torch.nn.functional as F
from torch import Tensor


def bytes_formula__item_by_item(tokens, into, rank, size, frozen_A, dropout):
    numbers = rank
    if not frozen_A:
        numbers += into
    if dropout:
        numbers += into
    return tokens * size * numbers


def saved_bytes__a_list_first(run, parameters):
    aside = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: aside.append(t) or (t, "kept"), lambda pair: pair[0]):
        y = run()
    parameters = [p.untyped_storage().data_ptr() for p in parameters]
    storages = {}
    for t in aside:
        if t.untyped_storage().data_ptr() not in parameters:
            storages.setdefault(t.untyped_storage().data_ptr(), t.untyped_storage().nbytes())
    del y
    return sum(storages.values())


class LoRAFAFunction__einsum_and_scaled_early(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, A, B, scale):
        z = torch.einsum("...i,ri->...r", x, A) * scale
        ctx.save_for_backward(A, z, B)
        ctx.scale = scale
        return F.linear(z, B)

    @staticmethod
    def backward(ctx, g):
        A, z, B = ctx.saved_tensors
        back = F.linear(g, B.T) * ctx.scale
        dB = torch.einsum("to,tr->or", g.reshape(-1, g.shape[-1]), z.reshape(-1, z.shape[-1]))
        return F.linear(back, A.T), None, dB, None


class LoRAFAFunction__only_what_is_asked_for(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, A, B, scale):
        z = F.linear(x, A)
        ctx.save_for_backward(z, B, A)
        ctx.rest = {"scale": scale}
        return F.linear(z, B).mul_(scale)

    @staticmethod
    def backward(ctx, g):
        z, B, A = ctx.saved_tensors
        g = g * ctx.rest["scale"]
        dx = g.matmul(B).matmul(A) if ctx.needs_input_grad[0] else None
        dB = (g.reshape(-1, g.shape[-1], 1) * z.reshape(-1, 1, z.shape[-1])).sum(0) if ctx.needs_input_grad[2] else None
        return dx, None, dB, None


def bytes_freed__input_by_input(reads, sizes, frozen, elsewhere, dropout):
    total = 0
    for x in sizes:
        readers = [layer for layer in reads if reads[layer] == x]
        let_go = [layer for layer in readers if layer in frozen]
        if dropout:
            total += len(let_go) * sizes[x]
        elif readers and len(let_go) == len(readers) and x not in elsewhere:
            total += sizes[x]
    return total


def project_gradient__pinv_of_A_twice(g: Tensor, A: Tensor, scale: float) -> Tensor:
    back = torch.linalg.pinv(A)                                           # (in, rank); (A Aᵀ)⁺ = (Aᵀ)⁺ A⁺
    return (g / scale**2) @ back.T @ back


def project_gradient__by_singular_values(g: Tensor, A: Tensor, scale: float) -> Tensor:
    U, sigma, _ = torch.linalg.svd(A, full_matrices=False)
    keep = sigma > 1e-5 * sigma[0]
    return g @ U[:, keep] @ torch.diag(sigma[keep] ** -2) @ U[:, keep].T / scale**2


def row_space__orthonormal(G: Tensor, A: Tensor) -> tuple[Tensor, float]:
    Q, _ = torch.linalg.qr(A.T)
    inside = G @ Q
    return inside @ Q.T, (inside.norm() ** 2 / G.norm() ** 2).item()


def row_space__solve(G: Tensor, A: Tensor) -> tuple[Tensor, float]:
    seen = torch.linalg.solve(A @ A.T, A @ G.T).T @ A
    return seen, torch.sum(seen * G).item() / torch.sum(G * G).item()      # P is symmetric and P P = P


class SeededDropoutFunction__rand_and_compare(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, A, B, scale, p, seed):
        dice = torch.Generator(device=x.device)
        dice.manual_seed(seed)
        mask = (torch.rand(x.shape, generator=dice, device=x.device) >= p).to(x.dtype)
        z = F.linear(x * mask, A) / (1 - p)
        ctx.save_for_backward(z, A, B)
        ctx.numbers = scale, p, seed, x.shape
        return scale * F.linear(z, B)

    @staticmethod
    def backward(ctx, g):
        z, A, B = ctx.saved_tensors
        scale, p, seed, shape = ctx.numbers
        dice = torch.Generator(device=g.device)
        dice.manual_seed(seed)
        mask = (torch.rand(shape, generator=dice, device=g.device) >= p).to(g.dtype)
        g = scale * g
        return (g @ B) @ A * mask / (1 - p), None, torch.einsum("to,tr->or", g.reshape(-1, g.shape[-1]), z.reshape(-1, z.shape[-1])), None, None, None
