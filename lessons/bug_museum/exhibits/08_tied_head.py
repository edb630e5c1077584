"""08 · Two names, one matrix

The piece: a language model whose head is tied to its embedding: one matrix E, read at the entrance and at the exit. The adapter sits on the head.
The promise: merge() folds the adapter in, and the logits stay what they were.
"""

import torch
from torch import nn


class Healthy(nn.Module):
    """logits = h Eᵀ + (h Aᵀ) Bᵀ, h = tanh(E[ids])       E (vocabulary, width)   A (rank, width)   B (vocabulary, rank)"""

    def __init__(self, vocabulary, width, rank):
        super().__init__()
        self.embedding, self.head = nn.Embedding(vocabulary, width), nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.embedding.weight
        self.A, self.B = nn.Parameter(torch.randn(rank, width)), nn.Parameter(torch.zeros(vocabulary, rank))

    def forward(self, ids):                                                  # (..., ) -> (..., vocabulary)
        h = torch.tanh(self.embedding(ids))
        return self.head(h) + h @ self.A.T @ self.B.T

    @torch.no_grad()
    def merge(self):
        self.head.weight = nn.Parameter(self.head.weight + self.B @ self.A)  # a matrix of its own from now on
        self.B.zero_()


class Sick(Healthy):
    """In place, to save memory."""

    @torch.no_grad()
    def merge(self):
        self.head.weight += self.B @ self.A
        self.B.zero_()


@torch.no_grad()
def cost():
    torch.manual_seed(0)
    model, ids = Sick(50, 16, rank=2), torch.arange(50)
    nn.init.normal_(model.B)
    before = model(ids).argmax(-1)
    model.merge()
    return f"the merged model names another next token after {(model(ids).argmax(-1) != before).sum()} of 50"
