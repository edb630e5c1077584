import torch


def healthy(A, B, lr, ratio, weight_decay):
    """No Adam in it at all."""
    return torch.optim.SGD([{"params": [A], "lr": lr}, {"params": [B], "lr": ratio * lr}], weight_decay=weight_decay)


def sick(A, B, lr, ratio, weight_decay):
    """A decays, B does not."""
    groups = [{"params": [A], "lr": lr}, {"params": [B], "lr": ratio * lr, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, weight_decay=weight_decay)
