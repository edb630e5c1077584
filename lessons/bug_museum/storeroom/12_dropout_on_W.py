import torch
import torch.nn.functional as F

from lessons.bug_museum import piece

Shown = piece("exhibits", "12_dropout_on_W").Healthy


class Healthy(Shown):
    """A mask made by hand."""

    def drop(self, x):
        if not self.training:
            return x
        kept = torch.rand_like(x) >= self.dropout
        return torch.where(kept, x / (1 - self.dropout if self.dropout < 1 else 1), 0.0)


class Sick(Shown):
    """Drops what comes out, of both roads."""

    def forward(self, x):
        return F.dropout(x @ self.W.T + self.s * (x @ self.A.T) @ self.B.T, self.dropout, self.training)
