import torch

from lessons.bug_museum import piece

Shown = piece("exhibits", "13_forgetful_resume").Healthy


class Healthy(Shown):
    """Another optimizer, with a memory as well."""

    def __init__(self, width=6, lr=0.05):
        super().__init__(width, lr)
        self.optimizer = torch.optim.SGD([self.W], lr=lr / 5, momentum=0.9)


class Sick(Shown):
    """The moments are there; how many steps they are made of is not."""

    def load(self, saved):
        super().load(saved)
        for state in self.optimizer.state.values():
            state["step"].zero_()
        return self
