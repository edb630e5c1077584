from lessons.bug_museum import piece

Shown = piece("exhibits", "07_saved_empty").Healthy


class Healthy(Shown):
    """Saves the base as well. Large, and right."""

    def save(self):
        return {name: tensor.clone() for name, tensor in self.state_dict().items()}


class Sick(Shown):
    """Looks for names that end in A. The file is not empty, and B is not in it."""

    def save(self):
        return {name: tensor for name, tensor in super().save().items() if name.endswith("A")}
