import torch
import torch.nn.functional as F

from lessons.bug_museum import piece

Shown = piece("exhibits", "12_dropout_on_W").Healthy


class Healthy(Shown):
    """A mask made by hand."""

    def drop(self, x):
        return x * (torch.rand_like(x) >= self.dropout) / (1 - self.dropout) if self.training else x


class Sick(Shown):
    """Drops what comes out, of both roads."""

    def forward(self, x):
        return F.dropout(x @ self.W.T + self.s * (x @ self.A.T) @ self.B.T, self.dropout, self.training)
