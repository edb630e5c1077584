from lessons.bug_museum import piece

Shown = piece("exhibits", "07_saved_empty").Healthy


class Healthy(Shown):
    """Other names on disk than in the layer, and load() knows it."""

    def save(self):
        return {f"adapter.{name}.weight": tensor for name, tensor in super().save().items()}

    def load(self, saved):
        return super().load({name.split(".")[1]: tensor for name, tensor in saved.items()})


class Sick(Shown):
    """Looks for names that end in A. The file is not empty, and B is not in it."""

    def save(self):
        return {name: tensor for name, tensor in super().save().items() if name.endswith("A")}
