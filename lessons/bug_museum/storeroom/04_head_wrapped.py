from torch import nn

from lessons.bug_museum import piece

shown = piece("exhibits", "04_head_wrapped")


class Healthy(shown.Healthy):
    """The head is in a box of its own."""

    def adapt(self, rank):
        super().adapt(rank)
        self.head = nn.Sequential(nn.Identity(), self.head)


class Sick(shown.Healthy):
    """The bias was remembered."""

    def adapt(self, rank):
        super().adapt(rank)
        self.head = shown.Adapter(self.head, rank)
        self.head.base.bias.requires_grad_(True)
