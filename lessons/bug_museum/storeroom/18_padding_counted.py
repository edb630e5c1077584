import torch
import torch.nn.functional as F


def healthy(logits, targets, lengths):
    """By the index that cross_entropy ignores."""
    real = torch.arange(targets.shape[1]) < lengths[:, None]
    return F.cross_entropy(logits.flatten(0, 1), targets.masked_fill(~real, -100).flatten())


def sick(logits, targets, lengths):
    """One too many: the first padding of each row counts."""
    real = torch.arange(targets.shape[1]) <= lengths[:, None]
    return F.cross_entropy(logits.flatten(0, 1), targets.masked_fill(~real, -100).flatten())
