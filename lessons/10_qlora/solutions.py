"""Lesson 10, worked. The same names and signatures as in exercises.py."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import minilora as ml


def naive_keeps(layers: list[tuple[int, int, bool]], size: int) -> int:
    """Where nobody below is trained, dL/dx is not asked for, and torch does not keep what only dL/dx needs."""
    return size * sum(out * into for out, into, asked in layers if asked)


class FourBitLinearFunction(torch.autograd.Function):
    """Q is there anyway: to keep it costs nothing, and W̃ can be made from it as often as one likes."""

    @staticmethod
    def forward(ctx, x: Tensor, Q: ml.NF4Tensor, bias: Tensor | None) -> Tensor:
        ctx.Q = Q
        return F.linear(x, Q.dequantize(x.dtype), bias)                    # (..., in) -> (..., out); here W̃ is let go

    @staticmethod
    def backward(ctx, g: Tensor) -> tuple[Tensor | None, None, Tensor | None]:
        by_x, _, by_bias = ctx.needs_input_grad
        dx = g @ ctx.Q.dequantize(g.dtype) if by_x else None               # (..., out) -> (..., in)
        dbias = g.reshape(-1, g.shape[-1]).sum(0) if by_bias else None
        return dx, None, dbias


def qlora_bill(model: nn.Module) -> dict[str, int]:
    """parameters() and buffers() name each tensor once."""
    trained = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    frozen = sum(p.nbytes for p in model.parameters() if not p.requires_grad) + sum(buffer.nbytes for buffer in model.buffers())
    dense = [layer.out_features * layer.in_features * layer.compute_dtype.itemsize for layer in model.modules() if isinstance(layer, ml.NF4Linear)]
    return {"frozen": frozen, "trained": trained, "gradients": trained, "moments": 2 * trained, "passing": max(dense, default=0)}


def page_in_page_out(visits: list[int], room: int) -> list[tuple[str, int]]:
    here, log = [], []                                                     # the page used last stands last
    for page in visits:
        if page in here:
            here.remove(page)
        else:
            if len(here) == room:
                log.append(("out", here.pop()))
            log.append(("in", page))
        here.append(page)
    return log


def left_after_merge(W: Tensor, dW: Tensor, block_size: int) -> tuple[float, float]:
    """The first number asks about dW's own direction only; what lands beside it is in the second."""
    W, dW = W.double(), dW.double()
    D = ml.quantize_nf4(W + dW, block_size).dequantize() - ml.quantize_nf4(W, block_size).dequantize()
    return ((D * dW).sum() / dW.square().sum()).item(), ((D - dW).norm() / dW.norm()).item()


class QLoRALayer(nn.Module):
    """The base says x W̃ᵀ + bias, and what is trained stands beside it: nothing of Q is taken apart."""

    def __init__(self, linear: nn.Linear, rank: int, alpha: float):
        super().__init__()
        self.base = ml.NF4Linear.of(linear).requires_grad_(False)
        self.scale = alpha / rank
        self.A = nn.Parameter(torch.empty(rank, linear.in_features))
        self.B = nn.Parameter(torch.zeros(linear.out_features, rank))
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))                   # U(±1/√in)

    def forward(self, x: Tensor) -> Tensor:
        z = x @ self.A.T.to(x.dtype)                                       # (..., in) -> (..., rank)
        return self.base(x) + self.scale * (z @ self.B.T.to(x.dtype))      # (..., rank) -> (..., out)

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        out, into = self.base.out_features, self.base.in_features
        linear = nn.Linear(into, out, bias=self.base.bias is not None, dtype=self.base.dtype)
        linear.weight.copy_(self.base.dequantize(torch.float32) + self.scale * self.B @ self.A)
        if self.base.bias is not None:
            linear.bias.copy_(self.base.bias)
        return linear
