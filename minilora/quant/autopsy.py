"""What merging does to a small update: W + dW has to be rounded to what W's type can hold, and much of dW is smaller than its steps.

    merged = round(W + dW)        unmoved = the share of weights for which the same number is stored as before: for them dW is gone
                                  error = ‖merged − (W + dW)‖ / ‖dW‖

bfloat16 has 8 bits of significance: a weight moves only where |dW| is more than about 1/500 to 1/250 of |W|. In four bits it moves only
where dW carries it over the middle to the next of sixteen levels; its block's scale may move a little, which is no update but noise,
so that the error can be above 1: worse than not merging.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from minilora.quant.nf4 import quantize_nf4, unpack

FORMATS = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "nf4": None}


@dataclass(frozen=True)
class Autopsy:
    """unmoved: share of weights that merging leaves as they were, 0 to 1; error: ‖merged − (W + dW)‖ / ‖dW‖."""

    unmoved: float
    error: float

    @property
    def survives(self) -> float:
        """The share of weights in which something of dW arrives."""
        return 1 - self.unmoved


@torch.no_grad()
def merge_autopsy(W: Tensor, dW: Tensor, into: str = "bfloat16", block_size: int = 64) -> Autopsy:
    """Merge dW into W stored as `into`: "float32", "float16", "bfloat16" or "nf4". W, dW: of one shape; weights whose dW is 0 do not count.

    W is first put into that type, as a base of that type would be. To merge into the dense weight of a 4-bit base, give that weight.
    Raises ValueError where the shapes differ, a number is not finite or too large for the type, dW is all zeros, or `into` is no such type.
    """
    if into not in FORMATS:
        raise ValueError(f"into must be one of {', '.join(FORMATS)}, got {into!r}")
    if W.shape != dW.shape:
        raise ValueError(f"W and dW must have one shape, got {tuple(W.shape)} and {tuple(dW.shape)}")
    if not (W.isfinite().all() and dW.isfinite().all()):
        raise ValueError("W or dW holds a value that is not finite")
    if not dW.any():
        raise ValueError("dW is 0 everywhere: there is nothing to merge")

    def stored(weight: Tensor) -> tuple[Tensor, Tensor]:
        """What is stored for each weight, and what it stands for."""
        if into != "nf4":
            return weight.to(FORMATS[into]), weight.to(FORMATS[into]).double()
        Q = quantize_nf4(weight.float(), block_size)
        return unpack(Q.codes, W.numel()).view(W.shape), Q.dequantize(torch.float64)

    before, base = stored(W)
    target = base + dW.double()
    after, merged = stored(target)
    if not (base.isfinite().all() and merged.isfinite().all()):
        raise ValueError(f"W overflows {into}")
    return Autopsy((after == before)[dW != 0].double().mean().item(), ((merged - target).norm() / dW.double().norm()).item())


def survival(W: Tensor, dW: Tensor, ratios: Iterable[float], block_size: int = 64) -> dict[tuple[str, str], list[float]]:
    """What survives, for dW made so long that ‖dW‖ / ‖W‖ is each of `ratios`: (base, into) -> one share for each ratio.

    base: "dense", W as it is, or "nf4", the dense weight that W in four bits stands for; into: as in merge_autopsy. Raises as it does.
    """
    if not dW.any():
        raise ValueError("dW is 0 everywhere: there is nothing to merge")
    bases = {"dense": W, "nf4": quantize_nf4(W.float(), block_size).dequantize()}
    unit = dW.double() * (W.double().norm() / dW.double().norm())                         # as long as W
    ratios = list(ratios)
    return {(base, into): [merge_autopsy(weight, ratio * unit, into, block_size).survives for ratio in ratios]
            for base, weight in bases.items() for into in FORMATS if (base, into) != ("dense", "nf4")}
