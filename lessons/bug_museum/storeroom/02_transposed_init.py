import torch


def healthy(rank, into):
    """Normal instead of uniform."""
    return torch.randn(rank, into) / (3 * into) ** 0.5


def sick(rank, into):
    shape = (rank, into)
    return torch.randn(shape) / (3 * shape[0]) ** 0.5
