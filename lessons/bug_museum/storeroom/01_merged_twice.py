from torch import nn

from lessons.bug_museum import piece

Shown = piece("exhibits", "01_merged_twice").Healthy


class Healthy(Shown):
    """Folds nothing: in eval mode the one matrix is made anew for each call."""

    def train(self, mode=True):
        return nn.Module.train(self, mode)

    def forward(self, x):
        return super().forward(x) if self.training else x @ (self.W + self.s * self.B @ self.A).T


class Sick(Shown):
    """eval() looks whether it has been here before. train() does not."""

    def train(self, mode=True):
        nn.Module.train(self, mode)
        if mode:
            self.fold(-1)
        elif not self.merged:
            self.fold(+1)
        return self
