"""Lesson 03: why should B learn faster than A? Replace each `raise NotImplementedError` and run `pytest lessons/03_lora_plus`.

Shapes as PyTorch stores them: W (out, in), A (rank, in), B (out, rank). A step takes A to A + δA and B to B + δB; code says dA and dB.
"""

from torch import Tensor, nn

from minilora import LoRA, LoRAPlus


def three_terms(x: Tensor, A: Tensor, B: Tensor, dA: Tensor, dB: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """What one step changes in the branch's output s · B A x, in three parts: s · δB A x, s · B δA x and s · δB δA x, in this order.

    x: (..., in)   A, dA: (rank, in)   B, dB: (out, rank)   ->   three of (..., out), of x's dtype
    Their sum is the branch after the step minus the branch before it. Nothing of shape (out, in) is ever formed.
    """
    raise NotImplementedError


def growth_exponent(widths: list[int], sizes: list[float]) -> float:
    """p in size ≈ c · widthᵖ: the slope of the least-squares line through the points (log width, log size).

    Any number of points from two on, in any order; sizes are above 0, and at least two widths differ. Returns a Python float.
    """
    raise NotImplementedError


def widest_useful_rate(from_B: float, from_A: float, limit: float) -> float:
    """One rate η for both factors: the largest with from_B · η + from_A · η² ≤ limit.

    from_B: how far δB A x moves the output for each unit of B's rate.
    from_A: counts both terms with δA: how far B δA x + δB δA x move the output for each unit of A's rate times B's.
    limit: how far the output may move in a step, above 0.
    from_B, from_A ≥ 0. Where both are 0 no rate is too large: math.inf. Right to nine digits, also where `from_A` is tiny or 0.
    """
    raise NotImplementedError


def balanced_rates(from_B: float, from_A: float, limit: float) -> tuple[float, float]:
    """Two rates (lr_A, lr_B) with which each side does half of the work: from_B · lr_B = limit / 2 and from_A · lr_A · lr_B = limit / 2.

    from_B, from_A, limit as in widest_useful_rate, all above 0.
    """
    raise NotImplementedError


def lora_plus_groups(model: nn.Module, lr: float, ratio: float, weight_decay: float = 0.0) -> list[dict]:
    """What LoRA+ gives to the optimizer: the B of each adapter learns at ratio · lr, everything else that trains at lr.

    Each group is {"params": [...], "lr": ..., "weight_decay": ...}. Every trainable parameter of the model stands in exactly one group,
    a frozen one in none, and no group is empty. `weight_decay` is for all but vectors (p.dim() < 2: biases, norms), which get 0.0.
    `minilora.adapters(model)` gives (name, layer) for each adapter, and layer.B is its B. The model is left as it was.
    """
    raise NotImplementedError


def ratio_as_alpha(plus: LoRAPlus, optimizer: str) -> LoRA:
    """The plain LoRA, one rate for both factors (the rate of plus's A), that takes W + dW through the very same values as `plus`.

    optimizer: "adam" (eps → 0) or "sgd", in either case without weight decay and without clipping; for another name, a ValueError that
    names it. Only alpha may differ, and it differs between the two: rank, dropout and rslora are plus's own.
    """
    raise NotImplementedError


def decay_where(model: nn.Module, lr: float, ratio: float, weight_decay: float) -> list[dict]:
    """Groups for AdamW with which LoRA+ of this ratio is again plain LoRA of alpha · ratio trained at `lr` with `weight_decay`: decay and all.

    AdamW shrinks a parameter by 1 - (its group's rate) · (its group's decay) a step; the two runs agree if every factor shrinks alike.
    Groups as in lora_plus_groups, but what is not an adapter's B, vectors too, gets lr and weight_decay. ratio > 0.
    """
    raise NotImplementedError
