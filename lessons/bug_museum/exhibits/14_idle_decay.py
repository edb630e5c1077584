"""14 · The idle weight decay

The piece: LoRA+'s optimizer: AdamW in two groups, A at lr and B at ratio · lr.
The promise: code(A, B, lr, ratio, weight_decay) is an optimizer. A step in which all gradients are zero multiplies A by 1 − lr · weight_decay and
B by 1 − ratio · lr · weight_decay.
"""

import torch
from torch import nn


def healthy(A, B, lr, ratio, weight_decay):
    groups = [{"params": [A], "lr": lr}, {"params": [B], "lr": ratio * lr}]
    return torch.optim.AdamW(groups, weight_decay=weight_decay)


def sick(A, B, lr, ratio, weight_decay, decay_of_the_groups=0.0):
    groups = [{"params": [A], "lr": lr, "weight_decay": decay_of_the_groups}, {"params": [B], "lr": ratio * lr, "weight_decay": decay_of_the_groups}]
    return torch.optim.AdamW(groups, weight_decay=weight_decay)             # what a group says of itself comes first


def cost():
    def shrunk(kind):
        A, B = nn.Parameter(torch.ones(2, 3)), nn.Parameter(torch.ones(4, 2))
        optimizer = kind(A, B, lr=1e-3, ratio=16, weight_decay=0.1)
        A.grad, B.grad = torch.zeros_like(A), torch.zeros_like(B)
        for _ in range(200):
            optimizer.step()
        return 1 - B.mean().item(), optimizer.defaults["weight_decay"]

    (lost, said), (due, _) = shrunk(sick), shrunk(healthy)
    return f"in 200 steps with decay 0.1 an idle B loses {lost:.0%} of its length instead of {due:.0%}; optimizer.defaults says {said}"
