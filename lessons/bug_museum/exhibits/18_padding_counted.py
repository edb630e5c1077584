"""18 · Praise for padding

The piece: the loss of a batch of sentences of different lengths, padded to the longest.
The promise: code(logits, targets, lengths) is the mean of −log p over the real tokens, the first lengths[i] of row i. What stands behind
them counts for nothing.
logits (batch, T, vocabulary)   targets (batch, T)   lengths (batch,)
"""

import torch
import torch.nn.functional as F


def healthy(logits, targets, lengths):
    nats = F.cross_entropy(logits.transpose(1, 2), targets, reduction="none")          # (batch, T)
    real = torch.arange(targets.shape[1]) < lengths[:, None]
    return nats[real].mean()


def sick(logits, targets, lengths):
    return F.cross_entropy(logits.transpose(1, 2), targets)                  # that padding follows padding is soon learnt


def cost():
    torch.manual_seed(0)
    lengths, targets = torch.tensor([3, 5, 6, 20]), torch.randint(1, 30, (4, 20))
    targets[torch.arange(20) >= lengths[:, None]] = 0                        # the padding token
    logits = torch.zeros(4, 20, 30)                                          # knows nothing of the language,
    logits[targets == 0, 0] = 9.0                                            # but all about padding
    return f"a model that guesses each word blindly reports {sick(logits, targets, lengths):.2f} nats instead of {healthy(logits, targets, lengths):.2f}"
