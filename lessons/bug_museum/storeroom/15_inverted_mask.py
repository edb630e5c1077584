import torch


def healthy(q, k, v, keep):
    """Sentence by sentence, with the padding cut off."""
    return torch.stack([(q1 @ k1[keep1].T / q1.shape[-1] ** 0.5).softmax(-1) @ v1[keep1] for q1, k1, v1, keep1 in zip(q, k, v, keep)])


def sick(q, k, v, keep):
    """Adds the mask where -inf was to be added: padding is a little less liked, no more."""
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5 + keep[:, None, :].to(q.dtype)
    return scores.softmax(-1) @ v
