"""adapt(), merge(), unload(): the one place where a Linear is swapped for an adapter, and back.

An adapter holds the frozen layer and adds to it: y = base(x) + delta(x). W is never touched, so taking the adapter away
gives the model back bit for bit. A method (minilora/methods/) says which adapter to put on a layer; safety/targets.py, which
layers can carry one; safety/watch.py notices where a loop trains something else than was meant.
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

from minilora.safety import beside
from minilora.safety.conv1d import dense_conv1d, original, stands_for_conv1d
from minilora.safety.targets import find_targets
from minilora.safety.watch import Watch, judge


class Adapter(nn.Module):
    """A frozen linear layer with something trainable beside it. A subclass adds parameters, forward, and factors or delta_weight."""

    no_way_back: ClassVar[str] = ""        # why unload() cannot give the model back, where it cannot

    def __init__(self, base: nn.Linear, method: "Method"):
        super().__init__()
        self.base = base
        self.method = method
        self.watch = Watch(method)
        # nn.TransformerEncoderLayer has a fused path that reads .weight and skips forward(); it stays off where any part has a hook.
        self.visible = nn.Identity()
        self.visible.register_forward_hook(_never_called)

    def factors(self) -> tuple[Tensor, Tensor]:
        """left (out, k) and right (k, in): the layer computes x (W + left @ right)ᵀ + b."""
        raise NotImplementedError

    def delta_weight(self) -> Tensor:
        """(out, in): what merging adds to W."""
        left, right = self.factors()
        return left @ right

    def missing_lines(self) -> set[str]:
        """The lines of a training loop that the method needs and this layer has not met."""
        return self.watch.lines

    def met(self, line: str) -> None:
        self.watch.lines.discard(line)

    def __call__(self, x: Tensor, *rest, **named) -> Tensor:
        if not torch.compiler.is_compiling() and self.watch.is_open:
            self.watch.call(self)
        if x.is_nested:    # nn.TransformerEncoder packs padded batches so, outside training; few operations take them
            return self.base(x) + F.linear(x, self.delta_weight().to(x.dtype))
        return super().__call__(x, *rest, **named)

    def empty(self, *shape: int) -> nn.Parameter:
        """An unfilled parameter on the base's device; float32 beside a 16-bit base, whose steps are too coarse for Adam's updates."""
        W = self.base.weight
        return nn.Parameter(torch.empty(*shape, device=W.device, dtype=torch.float64 if W.dtype == torch.float64 else torch.float32))

    @property
    def weight(self) -> Tensor:
        """The base's, for those who ask; the layers themselves take base.weight."""
        if self.training and not torch.compiler.is_compiling() and torch.is_grad_enabled():
            self.watch.read = True
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


def _never_called(module, inputs, output):
    return None


def add_product(y: Tensor, z: Tensor, B: Tensor, scale: float) -> Tensor:
    """y + scale · z Bᵀ in one pass over y.     y: (..., out)   z: (..., rank)   B: (out, rank)"""
    out, rank = B.shape
    return torch.addmm(y.reshape(-1, out), z.reshape(-1, rank), B.T.to(y.dtype), alpha=scale).view_as(y)


@dataclass(frozen=True)
class Method:
    """A fine-tuning method: hyper-parameters, and answers to what the training loop asks. Most answer only `layer`.

    A loop of your own, the same for every method; batches(step) gives x and y, loss_fn(model, x, y) the loss:

        method.prepare(model, batches, loss_fn, lr)
        optimizer = torch.optim.AdamW(method.parameter_groups(model, lr))
        for step in range(steps):
            (loss_fn(model, *batches(step)) + method.penalty(model)).backward()
            method.before_step(model, step)
            optimizer.step()
            method.after_step(model, step)
            optimizer.zero_grad()

    Most lines do nothing for most methods. Where one is missing that the method lives by, the second step is refused with its name (a
    warning for penalty and parameter_groups, which one may write by hand).
    """

    trains_base: ClassVar[bool] = False    # only full fine-tuning does, and it puts no adapters
    four_bits: ClassVar[bool] = False      # whether it puts the base in four bits itself

    @property
    def lines(self) -> tuple[str, ...]:
        """The lines of that loop without which this would silently be another method. Its hooks tell each layer: layer.met("before_step")."""
        return ()

    def unfit(self, linear: nn.Linear) -> str:
        """Why the method cannot sit on this layer, or "". Such layers are left out, unless they were asked for by name."""
        return ""

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
        """After backward, before optimizer.step(). Steps count from 0; at the first, every adapter must have a gradient."""
        if step == 0:
            check_gradients(model)

    def after_step(self, model: nn.Module, step: int) -> None:
        """After optimizer.step(), before gradients are cleared."""


def adapt(model: nn.Module, method: Method, targets: list[str] | None = None) -> nn.Module:
    """Freeze `model` whole, norms and biases too, and put `method`'s adapters on its target Linears, in place. Returns it. GPT-2's Conv1D is
    a Linear here.

    A target names the Linears whose dotted name equals it or ends in ".target". None: those inside an nn.ModuleList (the
    repeated blocks); where there is none, all but the output head. Of these, layers that can carry no adapter are left out: those with
    a forward of their own, those of nn.MultiheadAttention (which reads its weight past any adapter), those too thin for the rank. A
    warning names them, and what share of the blocks' weights no linear layer holds.

    Raises ValueError, the model unchanged, where nothing matches or nothing is left, an adapter is there already (PEFT's too), such a
    layer was named, a weight is tied to another module's, not finite or stored in 8 bits or whole numbers, or the method refuses.
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
        install(plain, method.wrap(find_targets(plain, targets, method.unfit, tell=True)))
    return model


def install(model: nn.Module, wrapped: dict[str, Adapter]) -> nn.Module:
    """Freeze the model and put ready adapters in their places; what stands beside them goes on record."""
    beside.remember(model, wrapped)
    model.requires_grad_(False)
    for name, adapter in wrapped.items():
        adapter.train(adapter.base.training)
        put(model, name, adapter)
    return model


def adapters(model: nn.Module) -> Iterator[tuple[str, Adapter]]:
    """(dotted name, adapter) of every adapted layer."""
    for name, module in model.named_modules():
        if isinstance(module, Adapter):
            yield name, module


def trainable_parameters(model: nn.Module) -> int:
    """How many numbers training may change; a tensor that layers share counts once."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def check_gradients(model: nn.Module) -> None:
    """Between the first backward() and optimizer.step(); method.before_step does it. Raises ValueError that names the adapters without
    a gradient and says why that may be: their weight is read past them, they ran where none is recorded, or nothing calls them.

    An adapter that nothing has called yet is let be where others of its kind have a gradient: an expert to whom no token went."""
    judge(dict(adapters(model)))


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
    """Fold the adapters in, in place: each becomes a new nn.Linear (or Conv1D, as it was) with weight W + delta_weight. Returns the model.

    The sum is made in float32 (float64 for a float64 base) and rounded once, to `dtype` or else to the base's. In 16 bits
    that rounding can swallow most of a small update. With `dtype` all of the model comes out in it, as after model.to(dtype), for
    layers of two types do not fit together. The parameters stay frozen; model.requires_grad_() trains them on.

    What was trained beside the adapters stays as it is.
    Raises ValueError, the model unchanged, where there are no adapters or a number is too large for the type.
    """
    found = _some_adapters(model, "merge")
    if dtype is not None:
        if not dtype.is_floating_point or dtype.itemsize < 2:
            raise ValueError(f"dtype must be one that layers compute in, as torch.float32 or torch.bfloat16, got {dtype}")
        inside = tuple(f"{name}." for name in found)
        for name, tensor in model.state_dict().items():
            if isinstance(tensor, Tensor) and tensor.is_floating_point() and not name.startswith(inside):
                _fits(name, tensor, dtype)
    merged = {name: _merged(name, adapter, dtype) for name, adapter in found.items()}
    for name, linear in merged.items():
        put(model, name, linear)
    beside.forget(model)
    return model if dtype is None else model.to(dtype)


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
def _merged(name: str, adapter: Adapter, dtype: torch.dtype | None) -> nn.Module:
    weight, bias = adapter.base.weight, adapter.base.bias
    wide, dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32, dtype or weight.dtype
    sum_ = weight.to(wide) + adapter.delta_weight().to(wide)
    if not sum_.is_meta and not sum_.isfinite().all():
        raise ValueError(f"{name}: W + delta_weight holds values that are not finite numbers; the adapter is broken")
    W, b = _fits(f"{name}.weight", sum_, dtype), None if bias is None else _fits(f"{name}.bias", bias, dtype)
    if stands_for_conv1d(adapter.base):
        return dense_conv1d(W, b).requires_grad_(False).train(adapter.training)
    linear = nn.Linear(adapter.in_features, adapter.out_features, bias=b is not None, device=W.device, dtype=dtype)
    linear.weight.copy_(W)
    if b is not None:
        linear.bias.copy_(b)
    return linear.requires_grad_(False).train(adapter.training)


def _fits(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """`tensor` in that type. Raises ValueError where a number becomes infinite by it."""
    there = tensor.to(dtype)
    if tensor.is_meta or there.isfinite().all() or not tensor.isfinite().all():
        return there
    raise ValueError(f"{name} holds {tensor.abs().max().item():g}, and {dtype} ends at {torch.finfo(dtype).max:g}; merge into a wider type")


def _some_adapters(model: nn.Module, verb: str) -> dict[str, Adapter]:
    found = dict(adapters(model))
    if not found:
        raise ValueError(f"nothing to {verb}: this model has no adapters (full fine-tuning changes W itself and leaves none)")
    return found


def put(model: nn.Module, name: str, module: nn.Module) -> None:
    """`module` in that place of the model; of a view the Conv1D. The hooks that were set on what was there go over: they are the place's."""
    module = original(module)
    path, _, child = name.rpartition(".")
    parent = model.get_submodule(path)
    there = getattr(parent, child)
    if "weight" not in vars(there) and "weight" not in vars(module):     # else a hook makes it at each call (torch.nn.utils.weight_norm): it stays
        for hooks in HOOKS:
            vars(there)[hooks], vars(module)[hooks] = vars(module)[hooks], vars(there)[hooks]
    setattr(parent, child, module)


HOOKS = ("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks", "_forward_pre_hooks_with_kwargs",
         "_backward_hooks", "_backward_pre_hooks", "_is_full_backward_hook")
