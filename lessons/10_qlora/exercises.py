"""Lesson 10: what must backward not keep? Replace each `raise NotImplementedError` and run `pytest lessons/10_qlora`.

W (out, in) is quantized once and never again: Q is its ml.NF4Tensor, four bits a weight, and Q.dequantize(dtype) makes W̃ (out, in), the dense
weight that Q stands for, as a new tensor. A (rank, in), B (out, rank), s = alpha / rank:        y = x W̃ᵀ + bias + s · (x Aᵀ) Bᵀ
"""

import torch
from torch import Tensor, nn

import minilora as ml


def naive_keeps(layers: list[tuple[int, int, bool]], size: int) -> int:
    """Bytes of dense weights that autograd holds at the end of the forward pass where each layer is written F.linear(x, Q.dequantize(), bias).

    layers: (out, in, whether this layer's x needs a gradient). W̃ is a tensor like any other there: it is kept where dL/dx = g W̃ will ask for it.
    size: bytes a number of W̃.
    """
    raise NotImplementedError


class FourBitLinearFunction(torch.autograd.Function):
    """x W̃ᵀ + bias, where W̃ lives for one product, in forward and again in backward. FourBitLinearFunction.apply(x, Q, bias) calls it."""

    @staticmethod
    def forward(ctx, x: Tensor, Q: ml.NF4Tensor, bias: Tensor | None) -> Tensor:
        """x: (..., in), one vector (in) too   Q: of an (out, in) weight   bias: (out), or None   ->   (..., out). x may have any floating dtype, bias
        has the same, and so have the product and the result. No tensor that is made here may outlive the call, but for the result; and x is not
        kept either, for only the gradient of a weight would ask for it.
        """
        raise NotImplementedError

    @staticmethod
    def backward(ctx, g: Tensor) -> tuple[Tensor | None, None, Tensor | None]:
        """g = dL/d(result): (..., out), perhaps a view, not contiguous   ->   dL/dx: (..., in), None for Q, dL/dbias: (out), the sum over all rows.

        None, and nothing computed, for what asks for no gradient: ctx.needs_input_grad says for each of x, Q and bias whether it does.
        """
        raise NotImplementedError


def qlora_bill(model: nn.Module) -> dict[str, int]:
    """What a step holds beside activations, in bytes. Each parameter and buffer counts once, however many modules share it.

        "frozen"      parameters without requires_grad, and all buffers (codes and scales are buffers), as they are stored
        "trained"     parameters with requires_grad
        "gradients"   one number of the same type for each number that is trained
        "moments"     AdamW's two, each of the parameter's type; its step counters are no moments
        "passing"     the largest W̃: only one is there at a time. Of the ml.NF4Linear in the model, each with out_features, in_features and the
                      compute_dtype that its W̃ is made in; 0 where there is none
    """
    raise NotImplementedError


def page_in_page_out(visits: list[int], room: int) -> list[tuple[str, int]]:
    """The log of a paged optimizer: what moved between host and device, in order, as ("in", page) and ("out", page).

    visits: the pages in the order in which they are used; each has to be on the device when it is. At first none is. room: how many fit, at least 1.
    A page that is there moves nothing. Where there is no room, one page goes out first: the one that was USED LAST. An optimizer goes
    through its pages in the same order in each step, so this is the one that is wanted again last.
    """
    raise NotImplementedError


def left_after_merge(W: Tensor, dW: Tensor, block_size: int) -> tuple[float, float]:
    """Merge dW into W in four bits. What the layer gains is D = nf4(W + dW) - nf4(W), with nf4(w) the dense weight that w in four bits stands for.

    ->   (⟨D, dW⟩ / ‖dW‖², how much of dW is left: 1 all, 0 none;   ‖D - dW‖ / ‖dW‖, how far D is from dW), as Python floats

    W, dW: (out, in), floating, perhaps of two types, dW not zero. W is either the original weight or the W̃ of a 4-bit base; this function need not
    know which. Add in float32 or wider; scales are not quantized (ml.quantize_nf4 with its default).
    """
    raise NotImplementedError


class QLoRALayer(nn.Module):
    """y = x W̃ᵀ + bias + s · (x Aᵀ) Bᵀ: LoRA beside a base in four bits. You may use ml.NF4Linear, which calls a function like yours.

    Its parameters A and B, and nothing else, are trained.
    """

    def __init__(self, linear: nn.Linear, rank: int, alpha: float):
        """Takes over `linear`: W in four bits with double-quantized scales (what ml.NF4Linear.of does), its bias, frozen. W itself is not kept.

        A: (rank, in), from U(-1/√in, 1/√in)   B: (out, rank), zero. Both in float32, whatever linear's type is.
        """
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., in), of any floating dtype   ->   (..., out), of the same. A and B meet x in x's dtype or in float32, as you like."""
        raise NotImplementedError

    def merged(self) -> nn.Linear:
        """A dense nn.Linear that says what this layer says: W̃ + s · B A, added in float32 and rounded once, to the type of the linear that
        was taken over; and the bias, if there is one. Copies: the layer stays as it is, and no gradient has to pass through.
        """
        raise NotImplementedError
