"""Gradient checkpointing. Of each block only the input is kept for backward, which computes the rest again (Chen et al. 2016,
arXiv:1604.06174, section 3.1): memory of √n or, as here, of one block and n inputs, for one more forward pass.

    "non-reentrant"    torch's newer way: backward recomputes what autograd asks for
    "reentrant"        its older one: backward runs the block anew. It passes a gradient to parameters inside only where an input has one, and
                       below the first block is a frozen embedding; so here every block's input is made to have one
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from minilora.adapter import swapped

KINDS = ("non-reentrant", "reentrant")
FLAG, FUNCTION = "gradient_checkpointing", "_gradient_checkpointing_func"      # by which transformers' modules know


def again(reentrant: bool, function: Callable, *inputs):
    """function(*inputs), of which backward gets the inputs only."""
    if reentrant and not any(isinstance(x, Tensor) and x.requires_grad for x in inputs):
        inputs = tuple(x.requires_grad_() if isinstance(x, Tensor) and x.is_floating_point() else x for x in inputs)
    return checkpoint(function, *inputs, use_reentrant=reentrant)


class Recomputed(nn.Module):
    """A block in whose place it stands for the length of one forward pass."""

    def __init__(self, block: nn.Module, reentrant: bool):
        super().__init__()
        self.block, self.reentrant = block, reentrant

    def forward(self, *inputs, **named):
        if not (self.training and torch.is_grad_enabled()):
            return self.block(*inputs, **named)
        return again(self.reentrant, partial(self.block, **named), *inputs)


@contextmanager
def recomputing(model: nn.Module, kind: str | None) -> Iterator[None]:
    """Around a run.     kind: one of KINDS, or None for nothing. Raises ValueError where the model has no blocks.

    transformers' modules have a flag each, which some of them ask in backward too, so it is up for the whole run.
    """
    asking = _asking(model) if kind else []
    if kind and not asking:
        blocks(model)
    before = [(module, dict(vars(module))) for module in asking]
    for module in asking:
        setattr(module, FLAG, True)
        setattr(module, FUNCTION, partial(again, kind == "reentrant"))
    try:
        yield
    finally:
        for module, was in before:
            for name in (FLAG, FUNCTION):
                if name in was:
                    setattr(module, name, was[name])
                else:
                    delattr(module, name)


@contextmanager
def recomputed(model: nn.Module, kind: str | None) -> Iterator[None]:
    """Around a forward pass of such a run: a model without flags has its blocks wrapped, and its names are other ones for so long."""
    if kind is None:
        yield
    elif _asking(model):
        with _uncached(model):
            yield
    else:
        with _wrapped(model, kind):
            yield


@contextmanager
def _uncached(model: nn.Module) -> Iterator[None]:
    """A cache of keys and values does not go with this, and transformers would say so to a user who asked for none."""
    configs = {id(config): config for module in model.modules() if getattr(config := getattr(module, "config", None), "use_cache", False) is True}
    for config in configs.values():
        config.use_cache = False
    try:
        yield
    finally:
        for config in configs.values():
            config.use_cache = True


@contextmanager
def _wrapped(model: nn.Module, kind: str) -> Iterator[None]:
    with swapped(model, {name: Recomputed(block, kind == "reentrant").train(block.training) for name, block in blocks(model).items()}):
        yield


def _asking(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if hasattr(module, FLAG)]


def blocks(model: nn.Module) -> dict[str, nn.Module]:
    """The entries of the model's outermost nn.ModuleLists, by name. Raises ValueError where there are none."""
    lists = [name for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    outermost = [name for name in lists if not any(name.startswith(f"{other}.") for other in lists)]
    found = {f"{name}.{i}": block for name in outermost for i, block in enumerate(model.get_submodule(name))}
    if not found:
        raise ValueError("checkpointing computes blocks again, and this model has no nn.ModuleList of blocks; leave checkpointing out")
    return found
