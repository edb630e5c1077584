"""Intruder dimensions: directions that a fine-tuned weight has and the weight before had not (Shuttleworth et al. 2024, arXiv:2410.21228).

    W + dW = U S Vᵀ      an intruder: one of the first `top` columns u of U with  max over columns u₀ of W's U₀ of |uᵀu₀| < below

A weight that only turned a little keeps its directions, in another order perhaps; what has been added from outside is like none of them.
"""

import torch
from torch import Tensor, nn

from minilora.adapter import Adapter
from minilora.safety.conv1d import linear_layers
from minilora.safety.targets import find_targets


def count_intruders(W: Tensor, dW: Tensor, top: int = 10, below: float = 0.5) -> int:
    """How many of the `top` greatest left singular vectors of W + dW are like no left singular vector of W. W, dW: (out, in)."""
    before, after = (torch.linalg.svd(weight.double(), full_matrices=False).U for weight in (W, W + dW))     # (out, min(out, in))
    return int(((after[:, :top].T @ before).abs().amax(1) < below).sum())


@torch.no_grad()
def intruders(model: nn.Module, before: nn.Module, top: int = 10, below: float = 0.5) -> float:
    """Their mean number over the layers that were or could be adapted. before: the model as it was, with the same names."""
    found, trained = [], linear_layers(model)
    for name, linear in find_targets(before).items():
        layer = model.get_submodule(name)
        dW = layer.delta_weight() if isinstance(layer, Adapter) else trained[name].weight - linear.weight
        found.append(count_intruders(linear.weight, dW, top, below))
    return sum(found) / len(found)
