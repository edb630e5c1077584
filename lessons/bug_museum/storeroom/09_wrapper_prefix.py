from lessons.bug_museum import piece

Shown = piece("exhibits", "09_wrapper_prefix").Healthy


class Healthy(Shown):
    """Saves the names as they come, and takes the tag off when loading."""

    @staticmethod
    def save(model):
        return {name: tensor.clone() for name, tensor in model.state_dict().items()}

    @staticmethod
    def load(model, saved):
        model.load_state_dict({name.replace("module.", ""): tensor for name, tensor in saved.items()}, strict=False)
        return model


class Sick(Shown):
    """lstrip takes letters, not a word: of module.down it leaves wn."""

    @staticmethod
    def save(model):
        return {name.lstrip("module."): tensor.clone() for name, tensor in model.state_dict().items()}
