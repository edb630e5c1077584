import torch
from torch import nn

from lessons.bug_museum import piece

Shown = piece("exhibits", "08_tied_head").Healthy


class Healthy(Shown):
    """The two stay tied, and the entrance reads a copy that was made before."""

    entrance = None

    def forward(self, ids):
        h = torch.tanh((self.embedding.weight if self.entrance is None else self.entrance)[ids])
        return self.head(h) + h @ self.A.T @ self.B.T

    @torch.no_grad()
    def merge(self):
        self.entrance = self.embedding.weight.clone()
        self.head.weight += self.B @ self.A
        self.B.zero_()


class Sick(Shown):
    """Two parameters, as it should be, and one memory under both."""

    @torch.no_grad()
    def merge(self):
        self.head.weight = nn.Parameter(self.embedding.weight.data)
        self.head.weight += self.B @ self.A
        self.B.zero_()
