"""GPT-2's Conv1D computes what nn.Linear does, and stores its weight the other way round. How it lies is known here; others ask this file.

    nn.Linear   y = x Wᵀ + b    weight = W: (out, in)            Conv1D   y = x W' + b    weight = W': (in, out), and so W = W'ᵀ

An adapter sits beside a LinearView, which says W and holds the Conv1D as it is. In a model stands the adapter or the Conv1D, never the view.
transformers, whose class it is, is not imported here: where a model has a Conv1D, that has been done.
"""

import sys

import torch
from torch import Tensor, nn


class LinearView(nn.Linear):
    """A Conv1D seen as an nn.Linear. Nothing is copied, and the product is the Conv1D's own.

    weight: (out, in).     bias: (out).
    """

    stands_for_conv1d = True

    def __init__(self, conv1d: nn.Module):
        nn.Module.__init__(self)
        self.conv1d = conv1d
        self.in_features, self.out_features = conv1d.nx, conv1d.nf
        self.training = conv1d.training

    @property
    def weight(self) -> Tensor:
        return self.conv1d.weight.T

    @property
    def bias(self) -> nn.Parameter:
        return self.conv1d.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.conv1d(x)                                         # (..., in) -> (..., out)


def conv1d() -> type[nn.Module] | None:
    """transformers' Conv1D; None as long as nobody has imported transformers."""
    return getattr(sys.modules.get("transformers.pytorch_utils"), "Conv1D", None)


def linear_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """All that compute x Wᵀ + b below the top level, by dotted name: each nn.Linear, and a view of each Conv1D."""
    kind = conv1d() or ()
    return {name: LinearView(m) if isinstance(m, kind) else m for name, m in model.named_modules() if name and isinstance(m, (nn.Linear, kind))}


def original(layer: nn.Module) -> nn.Module:
    """What stands in the model: of a view the Conv1D, of any other layer itself."""
    return layer.conv1d if isinstance(layer, LinearView) else layer


def stands_for_conv1d(layer: nn.Module) -> bool:
    """Whether it is a view of a Conv1D, or holds in four bits the weight of what was one."""
    return getattr(layer, "stands_for_conv1d", False)


def dense_conv1d(W: Tensor, bias: Tensor) -> nn.Module:
    """A new Conv1D with copies of these.     W: (out, in)   bias: (out)"""
    with torch.device("meta"):                                        # a random start would be overwritten
        layer = conv1d()(*W.shape)
    layer.weight, layer.bias = nn.Parameter(W.T.clone(memory_format=torch.contiguous_format)), nn.Parameter(bias.clone())
    return layer
