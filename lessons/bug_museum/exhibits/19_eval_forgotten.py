"""19 · Sampled with the dropout on

The piece: a look at what the model says, in the middle of training. The next token is the likeliest one, so nothing is left to chance.
The promise: model.sample(prompt, new) is the same list each time, also while the model is in training mode, and leaves the mode as it was.
"""

import torch
from torch import nn


class Healthy(nn.Module):
    """The mean of the embeddings so far, dropout, a linear layer."""

    def __init__(self, vocabulary, width, dropout):
        super().__init__()
        self.embedding, self.dropout, self.head = nn.Embedding(vocabulary, width), nn.Dropout(dropout), nn.Linear(width, vocabulary)

    def forward(self, ids):                                                  # (T,) -> (vocabulary,), the next token's logits
        return self.head(self.dropout(self.embedding(ids).mean(0)))

    @torch.no_grad()
    def sample(self, prompt, new):
        """The prompt, a list of ids, and `new` more."""
        was = self.training
        self.eval()
        ids = list(prompt)
        for _ in range(new):
            ids.append(self(torch.tensor(ids)).argmax().item())
        self.train(was)
        return ids


class Sick(Healthy):
    @torch.no_grad()
    def sample(self, prompt, new):
        ids = list(prompt)
        for _ in range(new):
            ids.append(self(torch.tensor(ids)).argmax().item())
        return ids


def cost():
    torch.manual_seed(0)
    model = Sick(50, 32, dropout=0.1)
    said = {tuple(model.sample([1, 2, 3], 20)) for _ in range(20)}
    return f"20 greedy samples of one prompt, at dropout 0.1: {len(said)} different texts"
