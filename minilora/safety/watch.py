"""What goes wrong in a training loop without a word: a line of it is missing, or no gradient reaches an adapter.

Each adapter has a Watch, which looks on until the first step is known to be in order, and then costs nothing. Under torch.compile it is
shut: what it does is not part of the model.
"""

import warnings

import torch
from torch import nn

from minilora.safety.targets import kind, listed

LINES = {    # of a loop, by the method's hook
    "prepare": "method.prepare(model, batches, loss_fn, lr) before the loop",
    "parameter_groups": "an optimizer made of method.parameter_groups(model, lr)",
    "penalty": "method.penalty(model) added to the loss",
    "before_step": "method.before_step(model, step) after backward() and before optimizer.step()",
    "after_step": "method.after_step(model, step) after optimizer.step() and before the gradients are cleared",
}

BY_HAND = {"parameter_groups", "penalty"}      # what a loop may as well work out by itself, so that their absence is no proof


class Watch:
    """lines: of the loop, that the adapter's method needs and has not met yet; called, read: in training, the adapter, and its weight by others.
    judged: its gradients have been; weighed: AdaLoRA's triplets have been."""

    def __init__(self, method: object):
        home = type(method).lines.fget.__module__              # a subclass elsewhere that writes a hook anew answers for it
        self.lines = {line for line in method.lines if getattr(type(method), line).__module__ == home}
        self.called = self.read = self.judged = self.weighed = False
        self.versions: list[int] | None = None

    @property
    def is_open(self) -> bool:
        return bool(self.lines) or not self.judged

    def call(self, layer: nn.Module) -> None:
        """A forward pass. Raises ValueError, or warns, where what is trained has changed since the one before, and a line has not been met."""
        self.called |= layer.training
        if self.lines and torch.is_grad_enabled():
            versions = [p._version for p in layer.parameters() if p.requires_grad]        # each change in place counts one up
            missing = layer.missing_lines() if self.versions not in (None, versions) else set()
            for line in (line for line in LINES if line in missing):
                said = f"{type(layer.method).__name__} is trained without {LINES[line]}"
                if line not in BY_HAND:
                    raise ValueError(f"{said}: so it would silently be another method. The docstring of minilora.Method has the whole loop")
                warnings.warn(f"{said}: it is another method, unless you have written that line by hand", stacklevel=3)
                self.lines.discard(line)
            self.versions = versions


def judge(layers: dict[str, nn.Module]) -> None:
    """After a backward: every adapter has a gradient, or there is an innocent reason. Raises ValueError where there is none."""
    trained = {name: [p for key, p in layer.named_parameters() if p.requires_grad and not key.startswith("base.")] for name, layer in layers.items()}
    without = {name: layers[name].watch for name, parameters in trained.items() if any(p.grad is None for p in parameters)}
    reached = {kind(name) for name, parameters in trained.items() if parameters and name not in without}
    if not reached and not any(layer.watch.called or layer.watch.read for layer in layers.values()):
        return                                                                        # nothing has run yet: a hook was called by hand
    unjudged = {name: watch for name, watch in without.items() if not watch.judged}
    called = [name for name, watch in unjudged.items() if watch.called]
    read = [name for name, watch in unjudged.items() if watch.read and not watch.called]
    silent = [name for name in without if kind(name) not in reached and name not in called + read]      # others: an expert without tokens, a block left out
    said = []
    if read:
        said.append(f"{listed(read)}: the model reads .weight past the adapter and never calls it, as F.multi_head_attention_forward does; name other targets")
    if called:
        said.append(f"{listed(called)}: called, but where no gradient is recorded or after which it is lost, as by reentrant checkpointing "
                    "(use_reentrant=False), torch.no_grad() or .detach()")
    if silent:
        said.append(f"{listed(silent)}: nothing has called them, nor others of their kind; name as targets what the loss depends on")
    if said:
        opening = "after backward() these adapters have no gradient" if reached else (
            f"no adapter has a gradient. A loop has {LINES['before_step']}; if yours has, then this is why")
        raise ValueError(f"{opening}: {'; '.join(said)}")
    for layer in layers.values():
        layer.watch.judged = True
