import torch


def healthy(A, B, lr, ratio, weight_decay):
    """No Adam in it at all, and the decay is done before each step; the groups say nothing of it."""
    optimizer = torch.optim.SGD([{"params": [A], "lr": lr}, {"params": [B], "lr": ratio * lr}])

    @torch.no_grad()
    def decay(*_):
        for group in optimizer.param_groups:
            for p in group["params"]:
                p.mul_(1 - group["lr"] * weight_decay)

    optimizer.register_step_pre_hook(decay)
    return optimizer


def sick(A, B, lr, ratio, weight_decay):
    """A decays, B does not."""
    groups = [{"params": [A], "lr": lr}, {"params": [B], "lr": ratio * lr, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, weight_decay=weight_decay)


def sick_too(A, B, lr, ratio, weight_decay):
    """Adam takes the decay into the gradient and divides by its size: any decay, the same step."""
    return torch.optim.Adam([{"params": [A], "lr": lr}, {"params": [B], "lr": ratio * lr}], weight_decay=weight_decay)
