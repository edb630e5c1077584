"""What the trials of myths.py share: the tiny GPT, trained and weighed; and two layers in float64, on which methods walk side by side."""

import math
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import minilora as ml
from minilora.evidence.ledger import bytes_alive, flops, optimizer_bytes

HERE = Path(__file__).parent
LORA, FULL = ml.LoRA(8), ml.FullFineTuning()
seed = 0            # of batches and factors, where a trial trains the tiny GPT


@cache
def trained(method=LORA, lr=1e-2, steps=30, task="voice", targets=None, base=ml.load_base):
    """The tiny GPT after so many steps of 4 × 64 bytes of a task. One run for all who ask: to change it, take a deepcopy."""
    model, batches = base(), ml.data.TASKS[task]().batches(4, 64, seed)
    ml.finetune(model, method, batches, steps, lr, seed, targets=targets, warmup=min(3, steps - 1), schedule="linear", progress=False)
    return model


@cache
def at_rates(method, *rates) -> dict[float, float]:
    """Held-out loss after training at each of these learning rates."""
    return {lr: held_out(trained(method, lr)) for lr in rates}


@cache
def trained_in_four_bits():
    return trained(base=in_four_bits)


def fresh(method=LORA, base=ml.load_base):
    """The tiny GPT just adapted, always with the same random factors."""
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        return ml.adapt(base(), method)


def in_four_bits():
    return ml.quantize(ml.load_base())


def voices(name="loud"):
    """The base with one of lesson 02's two adapters on it, of rank 4, both well trained."""
    return ml.load_adapter(ml.load_base(), HERE / "02_adapter_life" / "voices" / name)


def thin(model):
    """Every layer of the blocks as two thin ones of rank 8: what people think that LoRA is."""
    for name, linear in [(name, m) for name, m in model.blocks.named_modules() if isinstance(m, nn.Linear)]:
        parent, child = name.rpartition(".")[::2]
        setattr(model.blocks.get_submodule(parent), child, nn.Sequential(nn.Linear(linear.in_features, 8, bias=False), nn.Linear(8, linear.out_features)))
    return model


def held_out(model, task=ml.data.voice()) -> float:
    """Nats per byte on 48 windows that no training saw."""
    return ml.held_out_loss(model, task.held_out(65)[:48])


def batch(rows=4):
    return ml.data.voice().batches(rows, 64)(0)


def rank(M) -> int:
    return int(torch.linalg.matrix_rank(M.detach()))


def layers(model):
    return [layer for _, layer in ml.adapters(model)]


def step_flops(model) -> int:
    """Multiplications and additions of one training step, forward and backward."""
    return sum(flops(lambda: ml.next_byte_loss(model, *batch())))


def forward_flops(model) -> int:
    with FlopCounterMode(display=False) as counter:
        model(batch()[0])
    return counter.get_total_flops()


def bill(model) -> int:
    """Bytes of one training step of 16 × 64 bytes: all that is stored, gradients, AdamW's state, and what is alive for backward."""
    learns = [p for p in model.parameters() if p.requires_grad]
    stored = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    return stored + sum(p.nbytes for p in learns) + optimizer_bytes(learns) + bytes_alive(model, lambda: ml.next_byte_loss(model, *batch(16)))


def two_layers():
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 8)).double()


def adam(groups):
    return torch.optim.AdamW([group | {"weight_decay": 0.0} for group in groups], eps=1e-30)


def sgd(groups):
    return torch.optim.SGD([{"params": group["params"], "lr": group["lr"]} for group in groups])


def walk(method, lr=0.02, optimizer=adam, steps=30) -> torch.Tensor:
    """Two layers in float64 after so many steps, all methods from the same factors: what W has become, as one vector."""
    with torch.random.fork_rng([]):
        model = ml.adapt(two_layers(), method, ["0", "2"] if method is not FULL else None)
        torch.manual_seed(1)
        for _, layer in ml.adapters(model):
            nn.init.kaiming_uniform_(layer.A, a=math.sqrt(5))
        x, y = torch.randn(2, 16, 8, dtype=torch.float64)
    opt = optimizer(method.parameter_groups(model, lr))
    for step in range(steps):
        opt.zero_grad()
        F.mse_loss(model(x), y).backward()
        method.before_step(model, step)
        opt.step()
        method.after_step(model, step)
    ends = [layer.weight + layer.delta_weight() if isinstance(layer, ml.Adapter) else layer.weight for layer in (model[0], model[2])]
    return torch.cat([W.detach().flatten() for W in ends])


def apart(one, other) -> float:
    """How far two such ends are from one another, over how far the second went from the start."""
    start = torch.cat([layer.weight.detach().flatten() for layer in (two_layers()[0], two_layers()[2])])
    return ((one - other).norm() / (other - start).norm()).item()
