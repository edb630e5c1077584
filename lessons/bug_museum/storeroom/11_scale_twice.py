from lessons.bug_museum import piece

Shown = piece("exhibits", "11_scale_twice").Healthy


class Healthy(Shown):
    """Forms the whole matrix at each call."""

    def forward(self, x):
        return x @ (self.W + self.delta()).T


class Sick(Shown):
    """This time merge() is right, and forward scales on the way in and on the way out."""

    def forward(self, x):
        branch = (self.s * x) @ self.A.T @ self.B.T
        return x @ self.W.T + self.s * branch
