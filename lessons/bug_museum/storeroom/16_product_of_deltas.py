import torch


def healthy(W, A, B, A2, B2, scale):
    """Both products in one."""
    return W + scale * torch.cat([B2, B], 1) @ torch.cat([A2, -A], 0)


def sick(W, A, B, A2, B2, scale):
    """As if B alone had moved."""
    return W + scale * (B2 - B) @ A2
