"""15 · True means the other thing

The piece: attention over padded sentences, softmax(q kᵀ / √d) v.
The promise: code(q, k, v, keep) takes q, k, v (batch, T, d) and keep (batch, T), True at real tokens. What stands at the other places of
k and v has no influence.
"""

import torch


def weights(q, k, hidden):
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5                    # (batch, T, T)
    return scores.masked_fill(hidden[:, None, :], -torch.inf).softmax(-1)


def healthy(q, k, v, keep):
    return weights(q, k, hidden=~keep) @ v


def sick(q, k, v, keep):
    return weights(q, k, hidden=keep) @ v              # for one function True is "look here", for its neighbour "look away"


def cost():
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 10, 4)
    keep = torch.arange(10)[None] < 7
    return f"{weights(q, k, hidden=keep)[..., ~keep[0]].sum(-1).mean():.0%} of the attention rests on three paddings, none on seven words"
