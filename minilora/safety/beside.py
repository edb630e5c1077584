"""What stands beside the adapters: heads, embeddings, norms, biases, buffers. Some of it is trained too, and some moves by itself.

An adapter leaves its W alone. But a head may be unfrozen, and a BatchNorm's running means move in every forward pass of training. So that
save_adapter misses nothing, and unload gives back what was there, a model keeps a record from the moment adapters are put on it.

Names are those of the plain model's state dict; every function here takes the model while its adapters are out.
"""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

RECORD = "_beside_the_adapters"


@dataclass
class Record:
    sums: dict[str, tuple | None]                                    # of each tensor's bits, as the adapters came
    originals: dict[str, Tensor]                                     # copies of the buffers; and what load_adapter put others in the place of
    loaded: dict[str, bool] = field(default_factory=dict)            # what it put there, and whether that was trained


def tensors(model: nn.Module, adapted: Collection[str]) -> dict[str, Tensor]:
    """All tensors but the weights of the adapted layers: their biases stand beside, too."""
    return {name: tensor for name, tensor in model.state_dict(keep_vars=True).items() if isinstance(tensor, Tensor)
            and (name.rpartition(".")[0] not in adapted or name.endswith(".bias"))}


def remember(model: nn.Module, adapted: Collection[str]) -> None:
    """Begin a record: the model is about to get adapters on these layers."""
    forget(model)
    found = tensors(model, adapted)
    copies = {name: tensor.detach().clone() for name, tensor in found.items()
              if not isinstance(tensor, nn.Parameter) and tensor.dtype != torch.uint8}         # the codes of a 4-bit weight never move
    setattr(model, RECORD, Record({name: _sum_of_bits(tensor) for name, tensor in found.items()}, copies))


def forget(model: nn.Module) -> None:
    for module in model.modules():
        vars(module).pop(RECORD, None)


def changed(model: nn.Module, adapted: Collection[str]) -> set[str]:
    """The names of what is trained, was loaded, or is no longer what it was when the adapters came. A buffer that no record knows may have moved."""
    record, found = _recorded(model), tensors(model, adapted)
    return {name for name, tensor in found.items() if tensor.requires_grad or name in record.loaded
            or (_differ(record.sums[name], _sum_of_bits(tensor)) if name in record.sums else not isinstance(tensor, nn.Parameter))}


def trained(model: nn.Module, names: Collection[str]) -> list[str]:
    """Those of `names` that training changes, or that the folder they came from says it had changed."""
    record, found = _recorded(model), model.state_dict(keep_vars=True)
    return sorted(name for name in names if found[name].requires_grad or record.loaded.get(name))


def replace(model: nn.Module, values: dict[str, Tensor], trained: Collection[str], trainable: bool) -> None:
    """Put these in the places of the model's own tensors, which are kept. Tensors that were one stay one if both get the same values."""
    record, put = getattr(model, RECORD), {}
    for name, value in values.items():
        table, leaf = _place(model, name)
        there, value = table[leaf], value.to(table[leaf])
        if isinstance(there, nn.Parameter):
            if id(there) not in put or not torch.equal(put[id(there)], value):
                put[id(there)] = nn.Parameter(value.clone(), requires_grad=trainable and name in trained)
            record.originals[name], table[leaf] = there, put[id(there)]
        else:
            there.copy_(value)                                       # its original is in the record already
        record.loaded[name] = name in trained


def restore(model: nn.Module) -> None:
    """Put the originals back for good. What was trained in place, with no copy kept, stays as it is."""
    for name, original in _recorded(model).originals.items():
        table, leaf = _place(model, name)
        if isinstance(original, nn.Parameter):
            table[leaf] = _alike(original, table[leaf])
        else:
            with torch.no_grad():
                table[leaf].copy_(original)
    forget(model)


@contextmanager
def as_before(model: nn.Module) -> Iterator[nn.Module]:
    """Inside the block the originals are in the model, afterwards what was there."""
    there = []
    try:
        for name, original in _recorded(model).originals.items():
            table, leaf = _place(model, name)
            there.append((table, leaf, table[leaf]))
            table[leaf] = _alike(original, table[leaf]) if isinstance(original, nn.Parameter) else original.to(table[leaf], copy=True)
        yield model
    finally:
        for table, leaf, tensor in there:
            table[leaf] = tensor


def _recorded(model: nn.Module) -> Record:
    """All records in the model as one: its parts may have been adapted one by one."""
    whole = Record({}, {})
    for prefix, module in model.named_modules():
        if RECORD in vars(module):
            part, prefix = vars(module)[RECORD], prefix and f"{prefix}."
            whole.sums |= {prefix + name: sum_ for name, sum_ in part.sums.items()}
            whole.originals |= {prefix + name: tensor for name, tensor in part.originals.items()}
            whole.loaded |= {prefix + name: trained for name, trained in part.loaded.items()}
    return whole


def _place(model: nn.Module, name: str) -> tuple[dict, str]:
    """The module's own table that holds the tensor, and its key there."""
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    return module._parameters if leaf in module._parameters else module._buffers, leaf


def _alike(original: nn.Parameter, now: Tensor) -> nn.Parameter:
    """The original, where the model is by now: .to() could not reach it."""
    original.data = original.data.to(now)
    return original


def _sum_of_bits(tensor: Tensor) -> tuple | None:
    """Changes when a number does, if not by chance: quick, and no proof. None where there are no bits to read."""
    if tensor.is_meta or type(tensor) not in (Tensor, nn.Parameter) or tensor.dtype.itemsize > 8:
        return None
    whole = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.dtype.itemsize]
    return tensor.dtype, int(tensor.detach().contiguous().view(whole).sum())


def _differ(before: tuple | None, now: tuple | None) -> bool:
    return before is not None and now is not None and before[0] == now[0] and before != now        # in another dtype there is no telling
