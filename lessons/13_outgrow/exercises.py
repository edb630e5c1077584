"""Lesson 13: does the same code hold on a real model? Replace each `raise NotImplementedError` and run `pytest lessons/13_outgrow`.

A (rank, in), B (out, rank), s = scale, dW = s · B A, as ever. The rest of a ship is new: layers that lie the other way round, a crew of several processes,
a gate that is only so deep, passengers who each want another port. torch is enough; you need neither transformers nor a second process.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor


def conv1d_adapter(x: Tensor, W: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """(y, merged): LoRA on GPT-2's Conv1D, a linear layer whose weight lies the other way round, (in, out): its own output is x W + bias.

    y = the layer's output plus s · (x Aᵀ) Bᵀ. merged: the one weight that does the work of both, which lies as W does. A and B lie as they
    always do. bias may be None. Gradients pass through both results.

    x: (..., in)   W: (in, out)   bias: (out) or None   A: (rank, in)   B: (out, rank)   ->   (..., out), (in, out)
    """
    raise NotImplementedError


def shard_batches(batches: Callable[[int], tuple[Tensor, Tensor]], process: int, processes: int) -> Callable[[int], tuple[Tensor, Tensor]]:
    """The share of one process (0 … processes - 1) of every batch: a function of the step, as `batches` is.

    batches(step) gives x and y, which have the same number of rows and stay as they are; the function that you return gives some of these rows, of
    x and y the same ones. Of each batch every row goes to exactly one process, and all get equally many: then the mean of the processes' gradients
    is the gradient of the whole batch, and N processes train what one would. The function may be asked for any step, in any order, and says the
    same each time; torch's global random generator is left as it is. It raises ValueError for a batch whose rows cannot be dealt evenly.
    """
    raise NotImplementedError


def allreduce_bytes(shapes: list[tuple[int, int]], rank: int | None, processes: int, element_size: int = 4) -> float:
    """Bytes that one process sends in one training step, so that all end up with the sum of all gradients (a ring all-reduce).

    Each of N processes sends 2 (N - 1) / N times the bytes of the gradients: in N - 1 rounds an N-th of them as sums grow, in N - 1 more an
    N-th as the finished sums go round. rank: gradients of A (rank, in) and B (out, rank) of each layer; None: those of W (out, in).

    shapes: (out, in) of each adapted layer   element_size: bytes a number   ->   not rounded
    """
    raise NotImplementedError


def peak_of_loading(dense: list[int], packed: list[int | None], layer_by_layer: bool) -> int:
    """The most bytes that are there at once while the layers of a model come in and are packed into four bits, in this order.

    dense[i]: bytes of layer i as it lies in the file. packed[i]: its bytes in four bits, or None for a layer that stays dense (an embedding, a
    norm) and is not copied. A layer is packed beside its dense self, and only then the dense one is let go (freed).
    layer_by_layer: read one layer, pack it, let go, read the next. Otherwise: read the whole model first, then pack one layer after the other.
    Without layers it is 0.
    """
    raise NotImplementedError


def many_adapters(x: Tensor, W: Tensor, A: Tensor, B: Tensor, scales: Tensor, which: Tensor) -> Tensor:
    """One batch, an adapter of its own for each row: y_b = x_b Wᵀ + scales[i] · (x_b A_iᵀ) B_iᵀ with i = which[b].

    Where which[b] is -1 the row gets the base's answer, x_b Wᵀ. Without a loop over rows or adapters; no product B A is formed; and no tensor that
    you make may grow with n times the size of A or B: a row meets its own, however many adapters there are. All numbers are finite.

    x: (batch, T, in)   W: (out, in)   A: (n, rank, in)   B: (n, out, rank)   scales: (n)   which: (batch) int64, -1 … n - 1   ->   (batch, T, out)
    """
    raise NotImplementedError


def diagnose(layers: list[dict]) -> tuple[str, list[str]]:
    """(link, names): the first broken link in the chain of a training step, and in which layers it is broken, in their order.

    A layer is {"name": "0.q_proj", "alpha": 16.0, "rank": 8, "scale": 2.0, "W": reading, "A": reading, "B": reading}, and a reading is what was
    seen of this tensor over one backward and one step of the optimizer; numbers are the largest |entry|:

        {"before": 0.31, "trainable": True, "gradient": 0.02, "in_optimizer": True, "moved": 0.001}         gradient None: there is none

    The chain. Check one link in all layers, then the next link. Zero is 0.0: what is small is not zero.

        "base trains"            W is trainable (nothing else is asked of W)
        "frozen"                 A or B is not trainable
        "no gradient"            A or B has None
        "both zero"              the gradients of A and of B are both zero: nothing can ever move (that of A alone is zero in every healthy first step)
        "not in the optimizer"   A or B is not in it
        "stands still"           A or B has a gradient that is not zero, and has not moved at all
        "odd scale"              scale is neither alpha / rank nor alpha / √rank: relative error at most 1e-9 (the default of math.isclose)
        "healthy"                no link is broken; names is []
    """
    raise NotImplementedError
