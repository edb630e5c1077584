"""adapt(), merge(), unload(): the one place where a Linear is swapped for an adapter, and back.

An adapter holds the frozen layer and adds to it: y = base(x) + delta(x). W is never touched, so taking the adapter away
gives the model back bit for bit. A method (minilora/methods/) says which adapter to put on a layer.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from minilora import beside


class Adapter(nn.Module):
    """A frozen linear layer with something trainable beside it. A subclass adds parameters, forward and delta_weight."""

    no_way_back: ClassVar[str] = ""        # why unload() cannot give the model back, where it cannot

    def __init__(self, base: nn.Linear, method: "Method"):
        super().__init__()
        self.base = base
        self.method = method
        # nn.TransformerEncoderLayer has a fused path that reads .weight and skips forward(); it stays off where a hook is set.
        self.register_forward_hook(_stay_visible)

    def delta_weight(self) -> Tensor:
        """(out, in): what merging adds to W."""
        raise NotImplementedError

    def __call__(self, x: Tensor, *rest, **named) -> Tensor:
        if x.is_nested:    # nn.TransformerEncoder packs padded batches so, outside training; few operations take them
            return self.base(x) + F.linear(x, self.delta_weight().to(x.dtype))
        return super().__call__(x, *rest, **named)

    def empty(self, *shape: int) -> nn.Parameter:
        """An unfilled parameter on the base's device; float32 beside a 16-bit base, whose steps are too coarse for Adam's updates."""
        dtype = self.weight.dtype if self.weight.dtype == torch.float64 else torch.float32
        return nn.Parameter(torch.empty(*shape, device=self.weight.device, dtype=dtype))

    @property
    def weight(self) -> Tensor:
        return self.base.weight

    @property
    def bias(self) -> Tensor | None:
        return self.base.bias

    @property
    def in_features(self) -> int:
        return self.base.in_features

    @property
    def out_features(self) -> int:
        return self.base.out_features


def _stay_visible(module, inputs, output):
    return None


def add_product(y: Tensor, z: Tensor, B: Tensor, scale: float) -> Tensor:
    """y + scale · z Bᵀ in one pass over y.     y: (..., out)   z: (..., rank)   B: (out, rank)"""
    out, rank = B.shape
    return torch.addmm(y.reshape(-1, out), z.reshape(-1, rank), B.T.to(y.dtype), alpha=scale).view_as(y)


@dataclass(frozen=True)
class Method:
    """A fine-tuning method: hyper-parameters, and answers to what the training loop asks. Most answer only `layer`."""

    trains_base: ClassVar[bool] = False    # only full fine-tuning does, and it puts no adapters

    def layer(self, linear: nn.Linear) -> Adapter:
        """The adapter to put on one layer."""
        raise NotImplementedError

    def wrap(self, linears: dict[str, nn.Linear]) -> dict[str, Adapter]:
        """The adapters of all targets at once, for methods whose layers share tensors. Raises ValueError before anything is changed."""
        wrapped = {}
        for name, linear in linears.items():
            try:
                wrapped[name] = self.layer(linear)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None
        return wrapped

    def scheduled(self, steps: int) -> "Method":
        """This method, told how long training will be. Raises ValueError where its own schedule is longer."""
        return self

    def parameter_groups(self, model: nn.Module, lr: float, weight_decay: float = 0.0) -> list[dict]:
        """What the optimizer gets."""
        trainable = [p for p in model.parameters() if p.requires_grad]
        return [{"params": trainable, "lr": lr, "weight_decay": weight_decay}]

    def prepare(self, model: nn.Module, batches: Callable, loss_fn: Callable, lr: float) -> None:
        """Look at data before training."""

    def penalty(self, model: nn.Module) -> Tensor | float:
        """Added to the loss of each step."""
        return 0.0

    def before_step(self, model: nn.Module, step: int) -> None:
        """After backward, before optimizer.step(). Steps count from 0."""

    def after_step(self, model: nn.Module, step: int) -> None:
        """After optimizer.step(), before gradients are cleared."""


def adapt(model: nn.Module, method: Method, targets: list[str] | None = None) -> nn.Module:
    """Freeze `model` whole, norms and biases too, and put `method`'s adapters on its target Linears, in place. Returns it.

    A target names the Linears whose dotted name equals it or ends in ".target". None: those inside an nn.ModuleList (the
    repeated blocks); where there is none, all but the output head.

    Raises ValueError, the model unchanged, where nothing matches, an adapter is there already, a weight is tied to another
    module's, not finite or stored in whole numbers, the layer belongs to nn.MultiheadAttention (which reads its weight past any
    adapter), or the method refuses.
    """
    if any(True for _ in adapters(model)):
        raise ValueError("this model is adapted already: unload() or merge() it first")
    if method.trains_base:
        if targets is not None:
            raise ValueError(f"{type(method).__name__} trains every weight of the model: it takes no targets")
        quantized = [name for name, m in model.named_modules() if isinstance(m, nn.Linear) and "codes" in m._buffers]
        if quantized:
            raise ValueError(f"{quantized[0]} is in four bits, which cannot be trained; adapt it, or train the dense model")
        return model.requires_grad_(True)
    with unwrapped(model) as plain:
        install(plain, method.wrap(find_targets(plain, targets)))
    return model


def install(model: nn.Module, wrapped: dict[str, Adapter]) -> nn.Module:
    """Freeze the model and put ready adapters in their places; what stands beside them goes on record."""
    beside.remember(model, wrapped)
    model.requires_grad_(False)
    for name, adapter in wrapped.items():
        adapter.train(adapter.base.training)
        put(model, name, adapter)
    return model


def find_targets(model: nn.Module, targets: list[str] | None = None) -> dict[str, nn.Linear]:
    """The Linears that `adapt` would put adapters on, by dotted name. Raises ValueError as adapt does."""
    if isinstance(targets, str):
        targets = [targets]
    inside_attention = {id(m.out_proj) for m in model.modules() if isinstance(m, nn.MultiheadAttention)}
    linears = {name: m for name, m in model.named_modules() if name and isinstance(m, nn.Linear)}
    if targets is None:
        free = {name: linear for name, linear in linears.items() if id(linear) not in inside_attention}
        lists = tuple(f"{name}." for name, m in model.named_modules() if isinstance(m, nn.ModuleList))
        chosen = {name: linear for name, linear in free.items() if lists and name.startswith(lists)}
        if not chosen:
            head = _output_head(model, free)
            chosen = {name: linear for name, linear in free.items() if linear is not head or len(free) == 1}
    else:
        chosen = {}
        for target in targets:
            matching = {name: linear for name, linear in linears.items() if name == target or name.endswith(f".{target}")}
            if not matching:
                raise ValueError(f"no Linear matches {target!r}; this model has {_names(model, linears)}")
            chosen |= matching
        chosen = {name: linear for name, linear in linears.items() if name in chosen}      # in the model's order
    if not chosen:
        raise ValueError(f"no Linear to adapt; this model has {_names(model, linears)}")
    check_targets(model, chosen)
    return chosen


def check_targets(model: nn.Module, chosen: dict[str, nn.Linear]) -> None:
    """Raises ValueError where an adapter on one of them would be passed by, or could not work."""
    inside_attention = {id(m.out_proj) for m in model.modules() if isinstance(m, nn.MultiheadAttention)}
    _refuse_tied(model, chosen)
    for name, linear in chosen.items():
        if id(linear) in inside_attention:
            raise ValueError(f"{name} belongs to an nn.MultiheadAttention, which reads its weight directly and would bypass an adapter")
        weight = linear.weight
        if not weight.is_floating_point():
            raise ValueError(f"{name}: its weight is stored as {weight.dtype}, quantized by another library; adapt the model as it was before")
        if not weight.is_meta and not weight.isfinite().all():
            raise ValueError(f"{name}: its weight holds values that are not finite numbers; the base is broken")


def adapters(model: nn.Module) -> Iterator[tuple[str, Adapter]]:
    """(dotted name, adapter) of every adapted layer."""
    for name, module in model.named_modules():
        if isinstance(module, Adapter):
            yield name, module


def trainable_parameters(model: nn.Module) -> int:
    """How many numbers training may change; a tensor that layers share counts once."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


@contextmanager
def disabled(model: nn.Module) -> Iterator[nn.Module]:
    """The base speaks: inside the block every adapter is out of the model, afterwards it is back. What load_adapter put beside the adapters, and
    what forward passes have moved there, is out too; a head that you train in place is not."""
    with unwrapped(model) as plain, without_adapters(plain), beside.as_before(plain):
        yield model


def without_adapters(model: nn.Module) -> AbstractContextManager[nn.Module]:
    """Inside the block each base is in its adapter's place."""
    return swapped(model, {name: adapter.base for name, adapter in adapters(model)})


@contextmanager
def unwrapped(model: nn.Module) -> Iterator[nn.Module]:
    """Inside the block the model without the wrappers of torch.compile, DataParallel and their like, so that names are the plain model's."""
    plain, undo = _inside(model), []

    def unwrap(parent: nn.Module) -> None:
        for leaf, child in list(parent._modules.items()):
            if child is not None:
                inner = _inside(child)
                if inner is not child:
                    undo.append((parent, leaf, child, inner))
                    parent._modules[leaf] = inner
                unwrap(inner)

    try:
        unwrap(plain)
        yield plain
    finally:
        for parent, leaf, wrapper, inner in undo:
            if parent._modules[leaf] is inner:             # a compiled Linear that has got an adapter by now stays without its wrapper
                parent._modules[leaf] = wrapper


def _inside(module: nn.Module) -> nn.Module:
    while True:
        parts = ["module"] if isinstance(module, (DataParallel, DistributedDataParallel, AveragedModel)) else []
        parts = [part for part in (*parts, "_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module") if part in module._modules]
        if not parts:
            return module
        module = module._modules[parts[0]]


@contextmanager
def swapped(model: nn.Module, modules: dict[str, nn.Module]) -> Iterator[nn.Module]:
    """Inside the block these modules are in the model, afterwards those that were there."""
    there = {name: model.get_submodule(name) for name in modules}
    try:
        for name, module in modules.items():
            put(model, name, module)
        yield model
    finally:
        for name, module in there.items():
            put(model, name, module)


def merge(model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """Fold the adapters in, in place: each becomes a new nn.Linear with weight W + delta_weight. Returns the model.

    The sum is made in float32 (float64 for a float64 base) and rounded once, to `dtype` or else to the base's. In 16 bits
    that rounding can swallow most of a small update. The parameters stay frozen; model.requires_grad_() trains them on.
    What was trained beside the adapters stays as it is.
    """
    merged = {name: _merged(adapter, dtype) for name, adapter in _some_adapters(model, "merge").items()}
    for name, linear in merged.items():
        put(model, name, linear)
    beside.forget(model)
    return model


def unload(model: nn.Module) -> nn.Module:
    """Take the adapters out, in place: the base is back, same keys, same bits. It stays frozen; model.requires_grad_() undoes that.

    Buffers (a BatchNorm's running means) are again what they were when the adapters came, and a head that load_adapter brought gives way to the
    model's own. A head that you have trained in place stays as trained: no copy of what it was is kept.

    Raises ValueError, the model unchanged, where there are none, or a method has put a base of its own in W's place (LoftQ).
    """
    found = _some_adapters(model, "unload")
    for name, adapter in found.items():
        if adapter.no_way_back:
            raise ValueError(f"{name}: {adapter.no_way_back}")
    for name, adapter in found.items():
        put(model, name, adapter.base)
    with unwrapped(model) as plain:
        beside.restore(plain)
    return model


@torch.no_grad()
def _merged(adapter: Adapter, dtype: torch.dtype | None) -> nn.Linear:
    weight = adapter.weight
    wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
    linear = nn.Linear(adapter.in_features, adapter.out_features, bias=adapter.bias is not None,
                       device=weight.device, dtype=dtype or weight.dtype)
    linear.weight.copy_(weight.to(wide) + adapter.delta_weight().to(wide))
    if adapter.bias is not None:
        linear.bias.copy_(adapter.bias)
    return linear.requires_grad_(False).train(adapter.training)


def _some_adapters(model: nn.Module, verb: str) -> dict[str, Adapter]:
    found = dict(adapters(model))
    if not found:
        raise ValueError(f"nothing to {verb}: this model has no adapters (full fine-tuning changes W itself and leaves none)")
    return found


def put(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def _output_head(model: nn.Module, linears: dict[str, nn.Linear]) -> nn.Linear | None:
    """What transformers calls the output embeddings; in a plain module, the last Linear."""
    named = getattr(model, "get_output_embeddings", lambda: None)()
    return named if named is not None else next(reversed(linears.values()), None)


def _refuse_tied(model: nn.Module, chosen: dict[str, nn.Linear]) -> None:
    owners: dict[int, list[str]] = {}
    for name, tensor in (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)):
        owners.setdefault(id(tensor), []).append(name)
    for name, linear in chosen.items():
        weight = linear._parameters.get("weight", linear._buffers.get("codes"))        # of a 4-bit layer the codes
        shared = owners.get(id(weight), [])
        if len(shared) > 1:
            raise ValueError(f"{name}: its weight is tied ({' = '.join(shared)}); an adapter on one would not move the other")


def _names(model: nn.Module, linears: dict[str, nn.Linear]) -> str:
    """The last parts of the Linears' names, each once: what a target usually is."""
    found = list(dict.fromkeys(name.rpartition(".")[2] for name in linears))
    if not found:
        return "no Linear below its top level" + (": it is one itself, wrap it in nn.Sequential" if isinstance(model, nn.Linear) else "")
    return ", ".join(found)
