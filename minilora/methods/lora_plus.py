"""LoRA+: the layer is LoRA's; B learns faster than A (Hayou et al. 2024, arXiv:2402.12354).

    learning rate of A = lr        learning rate of B = ratio · lr        ratio > 1

A's gradient passes through B, which starts at zero, and B's through A, which does not. At one rate for both, a wide layer learns
less from each step than it could; a rate of its own for B is the remedy.

Who gets which rate: the B of each adapter, and nothing else, gets ratio · lr. Whatever else you have unfrozen gets lr: a head,
an embedding, biases, norms. Weight decay holds for all of them but vectors (biases, norms). The authors' code and PEFT instead
give every 1-D parameter ratio · lr and an adapted embedding 1e-6; where only A and B are trained the groups are the same.

Trainable parameters: rank · (in + out) for each adapted layer, as in LoRA.
"""

from dataclasses import dataclass

from torch import nn

from minilora import checks
from minilora.adapter import adapters
from minilora.methods.lora import LoRA


@dataclass(frozen=True)
class LoRAPlus(LoRA):
    """LoRA's fields, and ratio: how much faster B learns than A."""

    ratio: float = 16.0

    def __post_init__(self):
        super().__post_init__()
        checks.number("ratio", self.ratio, "of at least 0", lambda ratio: ratio >= 0)

    @property
    def lines(self) -> tuple[str, ...]:
        return ("parameter_groups",)

    def parameter_groups(self, model: nn.Module, lr: float, weight_decay: float = 0.0) -> list[dict]:
        trainable, fast = [p for p in model.parameters() if p.requires_grad], set()
        for _, layer in adapters(model):
            layer.met("parameter_groups")
            fast.add(layer.B)
        groups = [
            {"params": [p for p in trainable if p not in fast and p.dim() > 1], "lr": lr, "weight_decay": weight_decay},
            {"params": [p for p in trainable if p in fast], "lr": lr * self.ratio, "weight_decay": weight_decay},
            {"params": [p for p in trainable if p not in fast and p.dim() < 2], "lr": lr, "weight_decay": 0.0},
        ]
        return [group for group in groups if group["params"]]
