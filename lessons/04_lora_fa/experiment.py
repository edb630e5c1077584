"""Does an A that looks the right way learn more? Plain LoRA-FA, with the projection, and with an A chosen from the first gradient; rank 8 each.

    python lessons/04_lora_fa/experiment.py          about half a minute; writes results.json, which notebook 04 reads

Each side has its own learning rate, the best of four on a validation part with seed 10; then seeds 0, 1 and 2 on another part.
"""

import json
import math
import statistics
from pathlib import Path

import torch
from torch import nn

import minilora as ml

RESULTS = Path(__file__).with_name("results.json")
STEPS, GRID, SEEDS = 40, (3e-3, 1e-2, 3e-2, 1e-1), (0, 1, 2)
SIDES = {"A drawn": (ml.LoRAFA(8), False), "A drawn, projection": (ml.LoRAFA(8, projection=True), False), "A chosen": (ml.LoRAFA(8), True)}


def first_gradients() -> list[torch.Tensor]:
    """dL/dW of the base's 24 layers on a batch of the new voice: (out, in) each."""
    dense = ml.load_base()
    ml.next_byte_loss(dense, *ml.data.voice().batches(16, 128)(0)).backward()
    return [module.weight.grad.double() for block in dense.blocks for module in block.modules() if isinstance(module, nn.Linear)]


def trained(method: ml.LoRAFA, chosen: list[torch.Tensor] | None, lr: float, seed: int) -> ml.TinyGPT:
    """chosen: the gradients whose 8 strongest right singular vectors take A's place, as long as a drawn A's rows are."""
    torch.manual_seed(seed)
    model = ml.adapt(ml.load_base(), method)
    for (_, layer), G in zip(ml.adapters(model), chosen or ()):
        length_of_a_row = layer.A.norm() / math.sqrt(8)
        layer.A.data.copy_(torch.linalg.svd(G, full_matrices=False).Vh[:8] * length_of_a_row)
    ml.finetune(model, method, ml.data.voice().batches(4, 64, seed), STEPS, lr, seed=seed, progress=False)
    return model


def seen_by(model: ml.TinyGPT) -> float:
    """The share of the gradient of W_eff, as it is now, that the layers' own A's see; and dW has to lie in what they see."""
    for _, layer in ml.adapters(model):
        layer.weight.requires_grad_(True)
    ml.next_byte_loss(model, *ml.data.voice().batches(16, 128)(0)).backward()
    shares = []
    for _, layer in ml.adapters(model):
        G, Q = layer.weight.grad.double(), torch.linalg.qr(layer.A.detach().double().T).Q
        dW = layer.delta_weight().detach().double()
        assert (dW - dW @ Q @ Q.T).norm() < 1e-5 * dW.norm()
        shares.append(((G @ Q).square().sum() / G.square().sum()).item())
    return statistics.mean(shares)


def main() -> None:
    gradients, held_out = first_gradients(), ml.data.voice().held_out(129)
    validation, reported = held_out[:32], held_out[64:96]
    found = {}
    for side, (method, chosen) in SIDES.items():
        tried = {lr: ml.held_out_loss(trained(method, gradients if chosen else None, lr, 10), validation) / math.log(2) for lr in GRID}
        rate = min(tried, key=tried.get)
        models = [trained(method, gradients if chosen else None, rate, seed) for seed in SEEDS]
        found[side] = {"tried": {str(lr): round(loss, 4) for lr, loss in tried.items()}, "rate": rate,
                       "bits": [round(ml.held_out_loss(model, reported) / math.log(2), 4) for model in models], "seen": [round(seen_by(model), 4) for model in models]}
        print(side, found[side], flush=True)
    RESULTS.write_text(json.dumps({"steps": STEPS, "seeds": SEEDS, "sides": found}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
