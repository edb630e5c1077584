"""A LoRA training step here and in PEFT: the same model, the same factors' shapes, interleaved in one run; and what backward keeps alive.

    python benchmarks/lora.py [--rounds 40]

A ratio below 1 is in our favour. Needs requirements-peers.txt.
"""

import argparse
import copy
import statistics
import time
import weakref

import peft
import torch
from torch import nn

import minilora as ml

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"]


def pair(width: int, layers: int, dropout: float = 0.0) -> tuple[nn.Module, nn.Module]:
    """The same TinyGPT, adapted by us and by PEFT, rank 8 on every linear layer of the blocks."""
    torch.manual_seed(0)
    base = ml.TinyGPT(ml.GPTConfig(width=width, layers=layers))
    config = peft.LoraConfig(r=8, lora_alpha=16, lora_dropout=dropout, target_modules=TARGETS)
    return ml.adapt(copy.deepcopy(base), ml.LoRA(rank=8, alpha=16, dropout=dropout), TARGETS), peft.get_peft_model(base, config)


def seconds(model: nn.Module, optimizer: torch.optim.Optimizer, ids: torch.Tensor) -> float:
    """One step: forward, backward, AdamW."""
    began = time.perf_counter()
    optimizer.zero_grad()
    ml.next_byte_loss(model, ids[:, :-1], ids[:, 1:]).backward()
    optimizer.step()
    return time.perf_counter() - began


class Kept:
    """What autograd holds instead of the tensor; it dies when the graph lets go."""

    def __init__(self, tensor: torch.Tensor):
        self.tensor = tensor


def bytes_alive(model: nn.Module, ids: torch.Tensor) -> int:
    """Bytes that autograd still holds after the forward pass: each storage once, parameters not counted, nothing that was freed at once."""
    seen = []

    def pack(tensor: torch.Tensor) -> Kept:
        kept = Kept(tensor)
        seen.append(weakref.ref(kept))
        return kept

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept.tensor):
        loss = ml.next_byte_loss(model, ids[:, :-1], ids[:, 1:])
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    storages = {kept.tensor.untyped_storage().data_ptr(): kept.tensor.untyped_storage().nbytes() for kept in (ref() for ref in seen) if kept is not None}
    del loss
    return sum(size for pointer, size in storages.items() if pointer not in parameters)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--rounds", type=int, default=40)
    rounds = arguments.parse_args().rounds
    print(f"{'width':>5} {'layers':>6} {'dropout':>7} | {'time, ours / PEFT (middle half)':>32} | {'bytes alive, ours':>17} {'PEFT':>12} {'ratio':>6}")
    for width, layers in ((128, 4), (512, 4)):
        for dropout in (0.0, 0.1):
            models = pair(width, layers, dropout)
            ids = torch.randint(256, (8, 129), generator=torch.Generator().manual_seed(0))
            optimizers = [torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3) for model in models]
            alive = [bytes_alive(model, ids) for model in models]
            ratios = []
            for turn in range(rounds + 3):
                order = (0, 1) if turn % 2 else (1, 0)            # who goes first alternates
                took = {who: seconds(models[who], optimizers[who], ids) for who in order}
                if turn >= 3:                                     # the first ones warm up
                    ratios.append(took[0] / took[1])
            low, middle, high = statistics.quantiles(ratios, n=4)
            print(f"{width:>5} {layers:>6} {dropout:>7} | {f'{middle:.3f} ({low:.3f} to {high:.3f})':>32} | {alive[0]:>17,} {alive[1]:>12,} {alive[0] / alive[1]:>6.3f}")


if __name__ == "__main__":
    main()
