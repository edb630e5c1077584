"""Full fine-tuning: no adapter, every weight of the model is trained. The yardstick, and the one method that changes W.

Trainable parameters: all of them. With Adam in float32 that is 16 bytes each: weight, gradient and two moments.
"""

from dataclasses import dataclass
from typing import ClassVar

from minilora.adapter import Method


@dataclass(frozen=True)
class FullFineTuning(Method):
    """No hyper-parameters, and no way back: `unload` has nothing to take out. Keep a copy of the model."""

    trains_base: ClassVar[bool] = True
