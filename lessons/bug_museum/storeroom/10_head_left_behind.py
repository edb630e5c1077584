from lessons.bug_museum import piece

Shown = piece("exhibits", "10_head_left_behind").Healthy


class Healthy(Shown):
    """Saves the base as well. Large, and right."""

    def save(self):
        return {name: tensor.clone() for name, tensor in self.state_dict().items()}


class Sick(Shown):
    """The head's weight came along, its bias did not."""

    def save(self):
        return {name: tensor for name, tensor in super().save().items() if not name.endswith("bias")}
