"""QLoRA: LoRA beside a base in four bits (Dettmers et al. 2023, arXiv:2305.14314, sections 3 and 4).

    y = x · dequantize(Q)ᵀ + b + s · (x Aᵀ) Bᵀ          Q = NF4 of W, its scales quantized again (minilora/quant/)

`adapt` quantizes what it adapts: this is `quantize` and LoRA in one step, with the paper's settings. It belongs on all linear layers of
the blocks, which is what `adapt` takes when no targets are named; the paper found attention alone not to reach full fine-tuning.
Taking the adapter away leaves the 4-bit base; the dense W is gone.

Trainable parameters: rank · (in + out) for each adapted layer.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from minilora import checks
from minilora.methods.lora import LoRA, LoRALinear
from minilora.quant.linear import NF4Linear
from minilora.quant.nf4 import check_block_size


@dataclass(frozen=True)
class QLoRA(LoRA):
    """LoRA's fields, with the paper's alpha and dropout (for models up to 13B); block_size: weights to a scale; double: scales in 8 bits."""

    alpha: float = 16.0
    dropout: float = 0.1
    block_size: int = 64
    double: bool = True
    four_bits: ClassVar[bool] = True

    def __post_init__(self):
        super().__post_init__()
        check_block_size(self.block_size)
        checks.flag("double", self.double)

    def layer(self, linear: nn.Linear) -> LoRALinear:
        return LoRALinear(NF4Linear.of(linear, self.block_size, self.double), self)
