import torch
import torch.nn.functional as F

from lessons.bug_museum import piece

Shown = piece("exhibits", "06_wrong_axis").Healthy


class Healthy(Shown):
    def weight(self):
        return torch.einsum("o,oi->oi", self.magnitude, F.normalize(self.W + torch.einsum("or,ri->oi", self.B, self.A), dim=1))


class Sick(Shown):
    """One length for the whole matrix: m has the right shape, and weight() is W at the start."""

    def weight(self):
        V = self.W + self.B @ self.A
        return (self.magnitude / self.W.norm(dim=1))[:, None] * V * self.W.norm() / V.norm()
