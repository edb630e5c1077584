from lessons.bug_museum import piece

Shown = piece("exhibits", "10_head_left_behind").Healthy


class Healthy(Shown):
    """In two drawers."""

    def save(self):
        saved = super().save()
        return {"adapter": {name: saved[name] for name in ("A", "B")}, "head": {name: saved[name] for name in ("head.weight", "head.bias")}}

    def load(self, saved):
        return super().load(saved["adapter"] | saved["head"])


class Sick(Shown):
    """The head's weight came along, its bias did not."""

    def save(self):
        return {name: tensor for name, tensor in super().save().items() if not name.endswith("bias")}
