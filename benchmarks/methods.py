"""minilora beside PEFT, method by method: the time of a training step as a ratio, the two interleaved, and bytes alive for backward.

    OMP_NUM_THREADS=1 taskset -c 0 python benchmarks/methods.py [--methods dora,vera] [--rounds 20] [--width 512 --layers 6]

A step is forward, backward, AdamW, and what the method asks for beside it: AdaLoRA's penalty, scores and cut at every step, on both
sides. A ratio below 1 is in our favour. It depends on the batch: what both must do for each token, the multiplication by W, hides
what one of them does for each layer. So two batches, of 256 and 1,024 bytes. Needs requirements-peers.txt.
"""

import argparse
import copy
import statistics
import time

import peft
import torch
from torch import nn

import minilora as ml
from minilora.evidence.ledger import bytes_alive

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"]
METHODS = {
    "lora": (ml.LoRA(8), peft.LoraConfig(r=8, lora_alpha=8)),
    "lora, dropout": (ml.LoRA(8, dropout=0.1), peft.LoraConfig(r=8, lora_alpha=8, lora_dropout=0.1)),
    "rslora": (ml.LoRA(8, rslora=True), peft.LoraConfig(r=8, lora_alpha=8, use_rslora=True)),
    "lora-fa": (ml.LoRAFA(8), peft.LoraConfig(r=8, lora_alpha=8)),
    "vera": (ml.VeRA(256), peft.VeraConfig(r=256)),
    "adalora": (ml.AdaLoRA(12, 8, total_steps=10_000), peft.AdaLoraConfig(init_r=12, target_r=8, orth_reg_weight=0.1, total_step=10_000)),
    "dora": (ml.DoRA(8), peft.LoraConfig(r=8, lora_alpha=8, use_dora=True)),
    "pissa": (ml.PiSSA(8), peft.LoraConfig(r=8, lora_alpha=8, init_lora_weights="pissa")),
}


def pair(name: str, width: int, layers: int) -> tuple[nn.Module, nn.Module]:
    """The same TinyGPT, adapted by us and by PEFT on every linear layer of the blocks. LoRA-FA in PEFT: A frozen."""
    torch.manual_seed(0)
    base = ml.TinyGPT(ml.GPTConfig(width=width, layers=layers))
    method, config = METHODS[name]
    config = copy.deepcopy(config)
    config.target_modules = set(TARGETS)
    ours, theirs = ml.adapt(copy.deepcopy(base), method, TARGETS), peft.get_peft_model(base, config)
    if name == "lora-fa":
        for parameter_name, parameter in theirs.named_parameters():
            if "lora_A" in parameter_name:
                parameter.requires_grad_(False)
    return ours, theirs


def loss(model: nn.Module, method: ml.Method, ids: torch.Tensor) -> torch.Tensor:
    """The task's loss and the method's penalty; PEFT has its own for outputs with a loss, so here it is given as it writes it."""
    value = ml.next_byte_loss(model, ids[:, :-1], ids[:, 1:])
    if isinstance(model, peft.PeftModel) and isinstance(method, ml.AdaLoRA):
        norms = []
        for name, p in model.named_parameters():
            if "lora_A" in name or "lora_B" in name:
                gram = p @ p.T if "lora_A" in name else p.T @ p
                norms.append(torch.norm(gram - torch.eye(*gram.shape), p="fro"))
        return value + method.orthogonal_weight * sum(norms) / len(norms)
    return value if isinstance(model, peft.PeftModel) else value + method.penalty(model)


def seconds(model: nn.Module, method: ml.Method, optimizer: torch.optim.Optimizer, ids: torch.Tensor, step: int) -> float:
    """One step of training."""
    began = time.perf_counter()
    optimizer.zero_grad()
    loss(model, method, ids).backward()
    if not isinstance(model, peft.PeftModel):
        method.before_step(model, step)
    optimizer.step()
    if not isinstance(model, peft.PeftModel):
        method.after_step(model, step)
    elif isinstance(method, ml.AdaLoRA):
        model.base_model.update_and_allocate(step)
    return time.perf_counter() - began


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--methods", default=",".join(name for name in METHODS if "," not in name))
    arguments.add_argument("--rounds", type=int, default=20)
    arguments.add_argument("--width", type=int, default=512)
    arguments.add_argument("--layers", type=int, default=6)
    given = arguments.parse_args()
    print(f"{'method':>13} {'width':>5} {'layers':>6} {'batch':>5} | {'time, ours / PEFT (middle half)':>32} | {'bytes alive, ours':>17} {'PEFT':>12} {'ratio':>6}")
    for name in given.methods.split(","):
        models, method = pair(name, given.width, given.layers), METHODS[name][0]
        optimizers = [torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3) for model in models]
        for rows in (2, 8):
            ids = torch.randint(256, (rows, 129), generator=torch.Generator().manual_seed(0))
            alive = [bytes_alive(model, lambda: ml.next_byte_loss(model, ids[:, :-1], ids[:, 1:])) for model in models]
            ratios = []
            for turn in range(1, given.rounds + 4):
                order = (0, 1) if turn % 2 else (1, 0)            # who goes first alternates
                took = {who: seconds(models[who], method, optimizers[who], ids, turn) for who in order}
                if turn > 3:                                      # the first ones warm up
                    ratios.append(took[0] / took[1])
            low, middle, high = statistics.quantiles(ratios, n=4)
            print(f"{name:>13} {given.width:>5} {given.layers:>6} {rows * 128:>5} | {f'{middle:.3f} ({low:.3f} to {high:.3f})':>32} | "
                  f"{alive[0]:>17,} {alive[1]:>12,} {alive[0] / alive[1]:>6.3f}", flush=True)


if __name__ == "__main__":
    main()
