from lessons.bug_museum import piece

shown = piece("exhibits", "03_no_gradient")


class Healthy(shown.Healthy):
    """The data are made to ask for a gradient, whether anybody wants it or not."""

    def checkpoint(self, block, x):
        return shown.Again.apply(block, x if x.requires_grad else x.clone().requires_grad_())


class Sick(shown.Healthy):
    """Only the first block is forgotten: after it, x asks for a gradient."""

    def checkpoint(self, block, x):
        return shown.Again.apply(block, x) if block is self.blocks[0] else super().checkpoint(block, x)
