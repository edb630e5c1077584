import torch
from torch import nn

from lessons.bug_museum import piece

Shown = piece("exhibits", "08_tied_head").Healthy


class Healthy(Shown):
    """The head keeps the matrix, the embedding gets the copy."""

    @torch.no_grad()
    def merge(self):
        self.embedding.weight = nn.Parameter(self.embedding.weight.clone())
        self.head.weight += self.B @ self.A
        self.B.zero_()


class Sick(Shown):
    """A new matrix, as it should be, and then the two are tied again, as they were."""

    @torch.no_grad()
    def merge(self):
        super().merge()
        self.embedding.weight = self.head.weight
