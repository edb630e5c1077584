"""Lesson 02: what is in an adapter's file, and what may be done with it? Replace each `raise NotImplementedError` and run `pytest lessons/02_adapter_life`.

Shapes as PyTorch stores them: W (out, in), A (rank, in), B (out, rank). One adapter adds dW = scale · B A to one frozen W.
"""

from pathlib import Path

import torch
from torch import Tensor, nn


def adapter_bytes(content: bytes) -> dict[str, int]:
    """Where every byte of a safetensors file goes: {"length": 8, "header": …, <a tensor's name>: its bytes, …}, tensors in the header's order.

        8 bytes             how long the header is: a whole number, its lowest byte first
        so many bytes       the header, JSON: {"<tensor>": {"dtype": "F32", "shape": [4, 128], "data_offsets": [begin, end]}, …}
        all the others      the numbers; begin and end count from the first byte after the header, and end is the first that is no longer the tensor's

    The header may also have an entry "__metadata__", notes of whoever wrote the file: no tensor. The sizes add up to len(content).
    """
    raise NotImplementedError


def concatenate(pairs: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """The one pair (A, B) that does the work of all: B A = B₁A₁ + B₂A₂ + …, with the A's one above the other and the B's side by side.

    pairs: (A_i, B_i), at least one; A_i: (rank_i, in), B_i: (out, rank_i), each of a rank of its own   ->   (Σ rank_i, in), (out, Σ rank_i)
    """
    raise NotImplementedError


def cross_terms(pairs: list[tuple[Tensor, Tensor]]) -> Tensor:
    """What (Σ B_i)(Σ A_i) has in it beside the sum of the updates Σ B_i A_i: all B_i A_j with i ≠ j, added up.

    pairs: (A_i, B_i), at least one, all of one rank; A_i: (rank, in), B_i: (out, rank)   ->   (out, in); for a single pair zeros
    """
    raise NotImplementedError


def merge_in_float32(W: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """W + scale · B A, computed in float32 or wider (in float64 where W is) and rounded once, at the end, to W's dtype.
    A new tensor; W is left as it is. Training is over: no gradient has to pass through.

    W: (out, in), of any floating dtype   A: (rank, in)   B: (out, rank), of one dtype, which need not be W's   ->   (out, in), of W's dtype
    """
    raise NotImplementedError


def survivors(W: Tensor, dW: Tensor, dtype: torch.dtype) -> float:
    """The share of weights, 0 to 1, in which a merge into `dtype` leaves any trace: round(base + dW) is not base, where base = round(W).

    W, dW: of one shape, any floating dtype. Make the sum in float64 and round it once, to `dtype`. A weight whose dW is 0 has nothing to lose:
    it counts neither as survivor nor in the whole. At least one dW is not 0. A Python float, right to twelve digits: take the mean in float64 too.
    """
    raise NotImplementedError


def what_resume_needs(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> dict:
    """All that a run of training must keep to go on later as if it had never stopped, bit for bit. Batches are a function of the step, so:

        "trained"     {name: detached copy} of every parameter with requires_grad, by its name in the model; the frozen ones are on disk already
        "optimizer"   what optimizer.state_dict() says: Adam's two moments of each number, and how many steps it has made
        "random"      torch.get_rng_state(): the random generator's state, from which dropout draws
        "step"        the next step's number

    Training may go on in the same process: nothing that is returned may change with it.
    """
    raise NotImplementedError


def scaled_mixture(folders: list[Path], weights: list[float], into: Path) -> None:
    """Write to the folder `into` the one adapter that adds Σ weight_i · dW_i to each layer, in PEFT's format, so that ml.load_adapter reads it.

    Each of `folders` holds plain LoRA, all on the same layers, each with its own rank and alpha:
        adapter_config.json           "r", "lora_alpha", "use_rslora" (may be missing, which is false), "target_modules" and more
        adapter_model.safetensors     "base_model.model.<layer>.lora_A.weight" (r, in) and "….lora_B.weight" (out, r) for every layer, float32, no other tensors
        dW_i = scale_i · B_i A_i      scale_i = lora_alpha / r, or lora_alpha / √r where use_rslora is true
    The new folder has the same two files and the same tensor names: "r" is the sum of the ranks, and its scale is whatever you make of "lora_alpha".
    A weight may be any number, also 0 or below. `into` may not exist yet. Write the tensors with safetensors.torch.save_file, in float32, no metadata.
    """
    raise NotImplementedError
