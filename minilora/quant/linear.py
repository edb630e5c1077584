"""A linear layer whose weight is in four bits (QLoRA: Dettmers et al. 2023, arXiv:2305.14314, section 3).

    y = x · dequantize(codes, scales)ᵀ + b            dL/dx = dL/dy · dequantize(codes, scales)

The dense weight exists for the length of one product, and backward makes it anew. Written as F.linear(x, dequantize(w)), autograd
would keep it from forward to backward, of every layer at once, and nothing were saved. W gets no gradient: it is frozen.
"""

import warnings

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minilora.adapter import adapters, find_targets, put
from minilora.quant.double import DoubleQuantized
from minilora.quant.nf4 import NF4Tensor, quantize_nf4
from minilora.safety.conv1d import stands_for_conv1d
from minilora.safety.targets import PLAIN_FORWARDS


class Product(torch.autograd.Function):
    """x Wᵀ + b, where what is kept for backward is the layer and not W."""

    @staticmethod
    def forward(ctx, x: Tensor, bias: Tensor | None, layer: "NF4Linear") -> Tensor:
        ctx.layer = layer
        return F.linear(x, layer.dequantize(x.dtype), bias)

    @staticmethod
    def backward(ctx, grad: Tensor):
        to_x, to_bias, _ = ctx.needs_input_grad
        return (grad @ ctx.layer.dequantize(grad.dtype) if to_x else None,            # (..., out) -> (..., in)
                grad.reshape(-1, grad.shape[-1]).sum(0) if to_bias else None, None)


class NF4Linear(nn.Linear):
    """codes and scales of W as buffers, and the bias; nothing else. x is cast to compute_dtype and y back; under autocast its dtype rules.

    weight: an NF4Tensor of shape (out, in).     compute_dtype: None for the dtype that was quantized.
    """

    stands_for_conv1d = False      # then merging makes a Conv1D again

    def __init__(self, weight: NF4Tensor, bias: nn.Parameter | None = None, compute_dtype: torch.dtype | None = None):
        nn.Module.__init__(self)
        if len(weight.shape) != 2:
            raise ValueError(f"a linear layer's weight is (out, in), got the shape {tuple(weight.shape)}")
        self.out_features, self.in_features = weight.shape
        self.block_size, self.dtype = weight.block_size, weight.dtype
        self.compute_dtype = compute_dtype or weight.dtype
        self.bias = bias
        self.register_buffer("codes", weight.codes)
        scales = weight.stored_scales
        parts = vars(scales) if isinstance(scales, DoubleQuantized) else {"scales": scales}
        self.parts = {name: name if name == "scales" else f"scale_{name}" for name in parts}
        for name, tensor in parts.items():
            self.register_buffer(self.parts[name], tensor)

    @classmethod
    def of(cls, linear: nn.Linear, block_size: int = 64, double: bool = True) -> "NF4Linear":
        """`linear` in four bits, in a layer of its own; as it is if it is in four bits already."""
        if isinstance(linear, cls):
            return linear
        return cls.standing_for(linear, quantize_nf4(linear.weight, block_size, double))

    @classmethod
    def standing_for(cls, linear: nn.Linear, weight: NF4Tensor, compute_dtype: torch.dtype | None = None) -> "NF4Linear":
        """`weight` in the place of `linear`, whose bias it takes."""
        layer = cls(weight, linear.bias, compute_dtype).train(linear.training)
        layer.stands_for_conv1d = stands_for_conv1d(linear)
        return layer

    @property
    def quantized(self) -> NF4Tensor:
        """Codes and scales together. Raises ValueError where a part is missing."""
        missing = [buffer for buffer in ("codes", *self.parts.values()) if getattr(self, buffer, None) is None]
        if missing:
            raise ValueError(f"this 4-bit layer has lost {', '.join(missing)}: its weight cannot be made again")
        parts = {name: getattr(self, buffer) for name, buffer in self.parts.items()}
        scales = parts["scales"] if "scales" in parts else DoubleQuantized(**parts)
        return NF4Tensor(self.codes, scales, torch.Size((self.out_features, self.in_features)), self.dtype, self.block_size)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """(out, in): level · scale, a new dense tensor, in `dtype` or else in compute_dtype."""
        return self.quantized.dequantize(dtype or self.compute_dtype)

    @property
    def weight(self) -> Tensor:
        """(out, in): what the layer multiplies by. Each look makes it anew."""
        return self.dequantize()

    def forward(self, x: Tensor) -> Tensor:
        device = x.device.type
        if torch.is_autocast_enabled(device):
            compute = back = torch.get_autocast_dtype(device)
        else:
            compute, back = self.compute_dtype, x.dtype
        bias = None if self.bias is None else self.bias.to(compute)
        return Product.apply(x.to(compute), bias, self).to(back)

    def _apply(self, fn, recurse: bool = True) -> "NF4Linear":
        """.to(), .cuda(), .half() …: codes and scales follow to another device, never to another dtype."""
        before = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            if self._buffers[name].dtype != buffer.dtype:
                self._buffers[name] = buffer.to(self._buffers[name].device)
        return self

    def _load_from_state_dict(self, state_dict, prefix, *rest) -> None:
        here = {name for name in ("codes", *self.parts.values()) if prefix + name in state_dict}
        missing = {"codes", *self.parts.values()} - here
        if missing:    # an error also with strict=False: codes of one weight beside scales of another would be no weight at all
            why = "it holds a dense weight: load that first, then quantize" if prefix + "weight" in state_dict else "a part of its 4-bit weight"
            rest[-1].append(f"{prefix}{min(missing)} is missing: {why}")
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def extra_repr(self) -> str:
        return (f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, {self.quantized.bits_per_parameter:.3f} bits, "
                f"blocks of {self.block_size}, computes in {self.compute_dtype}")


PLAIN_FORWARDS.add(NF4Linear.forward)


def quantize(model: nn.Module, targets: list[str] | None = None, block_size: int = 64, double: bool = True) -> nn.Module:
    """Put the target Linears in four bits, in place, and return the model; targets as in adapt, with its warning. Each dense weight is gone.

    Raises ValueError, the model unchanged, where adapt would, on an adapted model, and where a target is in four bits already.
    """
    if any(True for _ in adapters(model)):
        raise ValueError("this model is adapted already: quantize first, then adapt")
    linears = find_targets(model, targets, tell=True)
    for name, linear in linears.items():
        if isinstance(linear, NF4Linear):
            raise ValueError(f"{name} is in four bits already")
    quantized = {name: NF4Linear.of(linear, block_size, double) for name, linear in linears.items()}
    for name, layer in quantized.items():
        put(model, name, layer)
    return model


@torch.no_grad()
def merge_nf4(model: nn.Module) -> nn.Module:
    """Fold the adapters of 4-bit layers into four bits again, in place. Returns the model; warns how much of the updates was lost.

    A level is a wide step: most of a small update does not reach the next one. `merge` loses nothing, and leaves a dense model.
    Raises ValueError, the model unchanged, where an adapter's base is not in four bits.
    """
    found, merged, lost, whole = dict(adapters(model)), {}, 0.0, 0.0
    for name, layer in found.items():
        if not isinstance(layer.base, NF4Linear):
            raise ValueError(f"{name}: its base is not in four bits; merge() folds it in, and quantize() can follow")
        dW = layer.delta_weight().float()
        sum_ = layer.base.dequantize(torch.float32) + dW
        double = "scales" not in layer.base.parts
        merged[name] = NF4Linear.standing_for(layer.base, quantize_nf4(sum_.to(layer.base.dtype), layer.base.block_size, double), layer.base.compute_dtype)
        lost += (merged[name].dequantize(torch.float32) - sum_).square().sum().item()
        whole += dW.square().sum().item()
    if not found:
        raise ValueError("nothing to merge: this model has no adapters")
    for name, layer in merged.items():
        put(model, name, layer.train(found[name].training))
    warnings.warn(f"merging into four bits moved the weights by {(lost / whole) ** 0.5 if whole else float('inf'):.2f} times the length of the "
                  "updates beside where they belong; merge() is exact", stacklevel=2)
    return model
