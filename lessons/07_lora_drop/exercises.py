"""Lesson 07: which layers matter? Replace each `raise NotImplementedError` and run `pytest lessons/07_lora_drop`.

W (out, in), A (rank, in), B (out, rank), dW = s · B A. LoRA-drop asks each layer what its update *says*, dW x, and not how large it is.
"""

from collections.abc import Callable

from torch import Tensor, nn


def output_importance(x: Tensor, A: Tensor, B: Tensor, scale: float) -> float:
    """g = Σ ‖dW x‖² over all rows of x: how much this layer's update adds to what the layer says. A Python float; dW is never formed.

    x: (..., in)   A: (rank, in)   B: (out, rank)
    """
    raise NotImplementedError


def importance_shares(g: dict[str, float]) -> dict[str, float]:
    """I_i = g_i / Σ_j g_j for every layer, by name, in the order given.

    Raises ValueError where the sum is zero: then B is still zero everywhere, and there is nothing to compare. Its message says "warm-up".
    """
    raise NotImplementedError


def share_until(shares: list[float], threshold: float) -> list[int]:
    """Which layers keep a pair of their own: the most important ones, as few as reach `threshold` together. Their indices, in ascending order.

    0 < threshold <= 1. Of two layers with equal shares the earlier one goes first. At threshold 1 all layers keep theirs, also one whose share is 0.
    """
    raise NotImplementedError


def share_pair(layers: list[nn.Module], kept: list[int]) -> None:
    """Give all layers whose index is not in `kept` one and the same pair, in place: the A and the B of the first of them.

    All layers are of one shape, and each has parameters A and B. The same Parameter objects, no copies: an optimizer then sees the shared pair once.
    """
    raise NotImplementedError


def shared_gradient(Gs: list[Tensor], A: Tensor, B: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """(dL/dA, dL/dB) of a pair that several layers share, from each layer's own G = dL/dW_eff. No autograd.

    Gs: one (out, in) a layer   A: (rank, in)   B: (out, rank)   ->   (rank, in), (out, rank)
    """
    raise NotImplementedError


def drop_count(kinds: list[tuple[int, int, int, int]], rank: int) -> int:
    """How many numbers LoRA-drop trains. One entry a kind of layer: (out, in, layers, kept), of which `kept` have a pair of their own.

    The rest of a kind shares one pair; where nothing is left over, there is no shared pair.
    """
    raise NotImplementedError


def price_of_taking_out(model: nn.Module, names: list[str], evaluate: Callable[[nn.Module], float]) -> dict[str, float]:
    """What a layer's update is worth, measured: evaluate(model) with that one adapter out, minus evaluate(model) as it is. For each name.

    The module of that dotted name is an adapter; its `.base` is the layer without the update. One is out at a time, in place: evaluate is given the model
    itself, never a copy. Afterwards every adapter is in its place again, the very same object, also where `evaluate` raised an error (which goes on to the caller).
    """
    raise NotImplementedError
