import copy

import torch

from lessons.bug_museum import piece

Shown = piece("exhibits", "19_eval_forgotten").Healthy


class Healthy(Shown):
    """A copy does the talking."""

    @torch.no_grad()
    def sample(self, prompt, new):
        speaker, ids = copy.deepcopy(self).eval(), list(prompt)
        for _ in range(new):
            ids.append(speaker(torch.tensor(ids)).argmax().item())
        return ids


class Sick(Shown):
    """`training = False` is said to the model, and its dropout layer does not hear it."""

    @torch.no_grad()
    def sample(self, prompt, new):
        was, self.training, ids = self.training, False, list(prompt)
        for _ in range(new):
            ids.append(self(torch.tensor(ids)).argmax().item())
        self.training = was
        return ids
