"""find_targets(): which layers get an adapter. What cannot carry one is left out aloud, or refused where it was asked for by name.

An adapter adds to y = x Wᵀ + b. So the layer beside it has to compute that and nothing else, it has to be called, and W has to be its own.
"""

import warnings
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from minilora.safety.conv1d import LinearView, conv1d, linear_layers, original

# The forwards that are known to be y = x Wᵀ + b, beside that of transformers' Conv1D. A class of your own that computes it too may be added.
PLAIN_FORWARDS = {nn.Linear.forward}

WHOLE = ("",)          # what every name begins with

WORTH_A_WORD = 0.01    # share of the weights that lies outside nn.Linear: below it are convolutions over four tokens and position biases


def find_targets(model: nn.Module, targets: list[str] | None = None, unfit: Callable[[nn.Linear], str] = lambda linear: "",
                 tell: bool = False) -> dict[str, nn.Linear]:
    """The Linears that `adapt` would put adapters on, by dotted name, in the model's order; of a Conv1D a view. Raises ValueError as adapt does.

    unfit(linear): why a method cannot sit on that layer, or "".     tell: warn of what is left out because no targets were named.
    """
    _refuse_peft(model)
    linears = linear_layers(model)
    chosen = _in_the_blocks(model, linears) if targets is None else _named(model, linears, [targets] if isinstance(targets, str) else targets)
    if not chosen:
        raise ValueError(f"no Linear to adapt; this model has {_last_names(model, linears)}")
    inside_attention = {id(m.out_proj) for m in model.modules() if isinstance(m, nn.MultiheadAttention)}
    reasons = {name: _bypassed(linear, inside_attention) or unfit(linear) for name, linear in chosen.items()}
    unfitting = {name: reason for name, reason in reasons.items() if reason}
    if unfitting and (targets is not None or len(unfitting) == len(chosen)):
        name, reason = next(iter(unfitting.items()))
        raise ValueError(f"{name}: {reason}")
    chosen = {name: linear for name, linear in chosen.items() if name not in unfitting}
    _refuse_tied(model, chosen)
    _refuse_broken(chosen)
    if tell and targets is None:
        _tell(model, linears, unfitting)
    return chosen


def check_targets(model: nn.Module, chosen: dict[str, nn.Linear]) -> None:
    """Raises ValueError where an adapter on one of these layers would be passed by, or could not work."""
    inside_attention = {id(m.out_proj) for m in model.modules() if isinstance(m, nn.MultiheadAttention)}
    for name, linear in chosen.items():
        if reason := _bypassed(linear, inside_attention):
            raise ValueError(f"{name}: {reason}")
    _refuse_tied(model, chosen)
    _refuse_broken(chosen)


def kind(name: str) -> str:
    """The name with its numbers as stars: what the blocks of a model have in common."""
    return ".".join("*" if part.isdecimal() else part for part in name.split("."))


def listed(names: Iterable[str], most: int = 6) -> str:
    """Each kind of name once, the first of them."""
    kinds = list(dict.fromkeys(map(kind, names)))
    return ", ".join(kinds[:most]) + (f" and {len(kinds) - most} more" if len(kinds) > most else "")


def _named(model: nn.Module, linears: dict[str, nn.Linear], targets: list[str]) -> dict[str, nn.Linear]:
    def meant(name: str, target: str) -> bool:
        return name == target or name.endswith(f".{target}")

    for target in targets:
        if not any(meant(name, target) for name in linears):
            there = [type(m).__name__ for name, m in model.named_modules() if meant(name, target)]
            there += [f"Parameter {tuple(p.shape)}" for name, p in model.named_parameters() if meant(name, target)]
            raise ValueError(f"no Linear matches {target!r}; this model has {_last_names(model, linears)}" + (f"; {target} is a {there[0]}" if there else ""))
    return {name: linear for name, linear in linears.items() if any(meant(name, target) for target in targets)}


def _in_the_blocks(model: nn.Module, linears: dict[str, nn.Linear]) -> dict[str, nn.Linear]:
    """Those inside an nn.ModuleList; where no list holds any weights, all but the output head. Never the head for want of others."""
    blocks, head = _blocks(model), _output_head(model, linears)
    inside = {name: linear for name, linear in linears.items() if name.startswith(blocks) and (blocks != WHOLE or original(linear) is not head)}
    others = _outside(model, blocks)
    if others and linears and not inside:
        where = next(iter(others)).rpartition(".")[0]
        what = type(model.get_submodule(where)).__name__
        raise ValueError(f"no Linear to adapt: the weights of this model's blocks are not in nn.Linear but in {what} ({kind(where)}, …), for which there "
                         f"is no adapter. Put nn.Linear layers with the same weights in their place, or name targets; there is {_last_names(model, linears)}")
    return inside or linears                                          # a lone Linear that is all there is


def _blocks(model: nn.Module) -> tuple[str, ...]:
    """What the names of all that is in the repeated blocks begin with; WHOLE where no nn.ModuleList holds a weight."""
    lists = tuple(f"{name}." for name, m in model.named_modules() if isinstance(m, nn.ModuleList))
    holds = any(name.startswith(lists) for name in linear_layers(model)) or _outside(model, lists)
    return lists if holds else WHOLE


def _outside(model: nn.Module, blocks: tuple[str, ...]) -> dict[str, Tensor]:
    """The blocks' matrices (or more) that belong neither to a linear layer nor to an nn.Embedding, which looks up: parameters, and packed codes.
    The largest first."""
    apart = {name for name, m in model.named_modules() if isinstance(m, nn.Embedding)} | linear_layers(model).keys()
    packed = [(name, b) for name, b in model.named_buffers() if b.dtype in (torch.uint8, torch.int8, torch.int32)]
    found = [(name, tensor) for name, tensor in (*model.named_parameters(), *packed)
             if tensor.dim() > 1 and name.startswith(blocks) and not any(parent in apart for parent in _parents(name))]
    return dict(sorted(found, key=lambda pair: -pair[1].numel()))


def _parents(name: str) -> Iterable[str]:
    """"a.b.c" -> "a", "a.b"."""
    return (name[:i] for i, letter in enumerate(name) if letter == ".")


def _tell(model: nn.Module, linears: dict[str, nn.Linear], unfitting: dict[str, str]) -> None:
    """Warn, once a call, of the layers that were left out and of the weights that no linear layer holds."""
    blocks = _blocks(model)
    others = _outside(model, blocks)
    outside = sum(p.numel() for p in others.values())
    inside = sum(linear.in_features * linear.out_features for name, linear in linears.items() if name.startswith(blocks))
    said = []
    if outside > WORTH_A_WORD * (outside + inside):
        kinds = "nn.Linear and Conv1D" if any(isinstance(linear, LinearView) for linear in linears.values()) else "nn.Linear"
        said.append(f"{outside / (outside + inside):.0%} of the blocks' weights lie outside {kinds} and stay as they are: {listed(others)}")
    by_reason: dict[str, list[str]] = {}
    for name, reason in unfitting.items():
        by_reason.setdefault(reason, []).append(name)
    said += [f"left out is {listed(names)}: {reason}" for reason, names in by_reason.items()]
    if said:
        warnings.warn("; ".join(said), stacklevel=4)


def _bypassed(linear: nn.Linear, inside_attention: set[int]) -> str:
    """Why x Wᵀ + b is not what this layer adds to the model, or ""."""
    if id(linear) in inside_attention:
        return "out_proj belongs to an nn.MultiheadAttention, which reads its weight directly and would bypass an adapter"
    layer = original(linear)
    if "forward" in vars(layer):
        return ("its forward has been replaced on this very layer (by accelerate's hooks or by hand), and need not be x Wᵀ + b; "
                "take that off first")
    if type(layer).forward not in PLAIN_FORWARDS | {getattr(conv1d(), "forward", None)}:
        name, kind = type(layer).__name__, "an nn.Linear" if layer is linear else "a Conv1D"
        return (f"{name} is {kind} with a forward of its own, which need not be x Wᵀ + b. If it is, put {kind} with its weight and "
                f"bias in its place, or say so: minilora.safety.targets.PLAIN_FORWARDS.add({name}.forward)")
    return ""


def _refuse_peft(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if type(module).__module__.partition(".")[0] == "peft":
            raise ValueError(f"this model is adapted by PEFT already ({name or 'it'} is a {type(module).__name__}), whose own lora_A and lora_B are Linears; "
                             "merge_and_unload() or unload() gives the plain model")


def _refuse_tied(model: nn.Module, chosen: dict[str, nn.Linear]) -> None:
    owners: dict[int, list[str]] = {}
    for name, tensor in (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)):
        owners.setdefault(id(tensor), []).append(name)
    for name, linear in chosen.items():
        layer = original(linear)
        weight = layer._parameters.get("weight", layer._buffers.get("codes"))          # of a 4-bit layer the codes
        shared = owners.get(id(weight), [])
        if len(shared) > 1:
            raise ValueError(f"{name}: its weight is tied ({' = '.join(shared)}); an adapter on one would not move the other")


@torch.no_grad()
def _refuse_broken(chosen: dict[str, nn.Linear]) -> None:
    for name, linear in chosen.items():
        weight = linear.weight
        if not weight.is_floating_point() or weight.itemsize < 2:                      # whole numbers, or float8: storage, nothing computes in it
            raise ValueError(f"{name}: its weight is stored as {weight.dtype}, quantized by another library; adapt the model as it was before")
        if not weight.is_meta and not weight.isfinite().all():
            raise ValueError(f"{name}: its weight holds values that are not finite numbers; the base is broken")


def _output_head(model: nn.Module, linears: dict[str, nn.Linear]) -> nn.Module | None:
    """What transformers calls the output embeddings; in a plain module, the last Linear."""
    named = getattr(model, "get_output_embeddings", lambda: None)()
    return named if named is not None else original(next(reversed(linears.values()), None))


def _last_names(model: nn.Module, linears: dict[str, nn.Linear]) -> str:
    """The last parts of the Linears' names, each once: what a target usually is."""
    found = list(dict.fromkeys(name.rpartition(".")[2] for name in linears))
    if not found:
        return "no Linear below its top level" + (": it is one itself, wrap it in nn.Sequential" if isinstance(model, nn.Linear) else "")
    return ", ".join(found)
