"""Several adapters in one batch, each row with its own (Punica: Chen et al. 2023, arXiv:2310.18547; S-LoRA: Sheng et al. 2023, arXiv:2311.03285).

    y_i = x_i Wᵀ + b + s_k (x_i A_kᵀ) B_kᵀ        k = the adapter of row i        x_i: (tokens, in)   A_k: (rank, in)   B_k: (out, rank)

    serve(model, {"fr": "runs/fr", "de": "runs/de"})
    with rows(model, ["fr", None, "de"]):                  # None: the base itself
        logits = model(ids)                                # ids: (3, T)
    unload(model)                                          # the base is back, bit for bit

The product with W, most of the work, is one for the whole batch. A layer holds the factors of all its adapters in two stacks, and its
forward gathers each row's and multiplies them row by row in two batched products: no loop over adapters, no sorting of rows, W untouched. A base
row's factors are zeros, and so is what a narrower adapter lacks: the widest sets what every row costs.

Every additive method is such a pair, however it was trained (Adapter.factors()): s is inside B. VeRA's pair is written out for each layer, so that
it costs what a LoRA of its rank does. DoRA's g is gathered too: g_k ⊙ (the sum above, without b) + b.

What a row gets does not depend on the other rows' adapters, not in one bit. Beside load_adapter's layer it is the same up to rounding: there s
comes last, and one product takes all rows together; products of other shapes may add up in other orders.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from minilora import checks
from minilora.adapter import Adapter, Method, adapters, install, put, unwrapped, without_adapters
from minilora.safety.conv1d import linear_layers, original
from minilora.storage import read_adapter


@dataclass(frozen=True)
class Serving(Method):
    """names: all that rows() may name, in the order in which they came."""

    names: tuple[str, ...]


@dataclass(frozen=True)
class Part:
    """One adapter in one layer: x (W + B A)ᵀ, with DoRA times g.     A: (rank, in)   B: (out, rank), s inside   g: (out) or None"""

    A: Tensor
    B: Tensor
    g: Tensor | None


class ServedLinear(Adapter):
    """A frozen linear layer and the factors of every adapter that has some for it. Slot 0 is the base's: zeros."""

    def __init__(self, base: nn.Linear, names: tuple[str, ...], parts: dict[str, Part]):
        super().__init__(base, Serving(names))
        self.slots = {name: slot for slot, name in enumerate(parts, start=1)}
        count, rank, some = 1 + len(parts), max(len(part.A) for part in parts.values()), next(iter(parts.values())).A
        self.register_buffer("A", some.new_zeros(count, rank, self.in_features))
        self.register_buffer("B", some.new_zeros(count, self.out_features, rank))
        stretched = any(part.g is not None for part in parts.values())
        self.register_buffer("g", some.new_ones(count, self.out_features) if stretched else None)
        for name, part in parts.items():
            slot, own = self.slots[name], len(part.A)
            self.A[slot, :own], self.B[slot, :, :own] = part.A, part.B
            if part.g is not None:
                self.g[slot] = part.g
        self.turn: dict[int, Tensor | None] = {}                      # number of rows -> (rows), their slots; inside rows() only

    def forward(self, x: Tensor) -> Tensor:
        count, slots = len(x), self.taken(len(x))
        y = self.base(x)                                                              # (rows, ..., in) -> (rows, ..., out)
        if slots is None:
            return y
        tokens = x.shape[1:-1].numel()                                                # of a row
        A = self.A.index_select(0, slots).to(x.dtype)                                 # (rows, rank, in)
        B = self.B.index_select(0, slots).to(y.dtype)                                 # (rows, out, rank)
        z = torch.bmm(x.reshape(count, tokens, self.in_features), A.mT)               # (rows, tokens, rank)
        v = torch.baddbmm(y.reshape(count, tokens, self.out_features), z, B.mT)       # y + z Bᵀ
        if self.g is not None:
            g = self.g.index_select(0, slots)[:, None].to(y.dtype)                    # (rows, 1, out)
            v = g * v if self.bias is None else torch.addcmul((1 - g) * self.bias.to(y.dtype), g, v)
        return v.view_as(y)

    def taken(self, count: int) -> Tensor | None:
        """The slots of a batch of so many rows; None where all of them are the base's. Raises ValueError where rows() did not name so many."""
        if not self.turn:
            raise ValueError(f"this model serves {_listed(self.method.names)}: say which for each row, with rows(model, [...])")
        if count not in self.turn:
            raise ValueError(f"rows() names the adapters of {' or '.join(map(str, self.turn))} rows, and a layer is given {count}: "
                             "name one for each row of the batch, and say beams=... where each of them is repeated")
        return self.turn[count]

    def parts(self) -> dict[str, Part]:
        """By name, what was stacked."""
        return {name: _trimmed(self.A[slot], self.B[slot], None if self.g is None else self.g[slot]) for name, slot in self.slots.items()}

    def factors(self) -> tuple[Tensor, Tensor]:
        raise ValueError(f"{_listed(self.method.names)} are served here together, which is no single update of W: unload(model), and load_adapter the one")

    def extra_repr(self) -> str:
        return ", ".join(self.slots)


def serve(model: nn.Module, folders: dict[str, str | Path | None]) -> nn.Module:
    """Put layers with all these adapters at once on a plain model, in place, and return it, in eval mode. From then on rows() says which row uses which.

    folders: name -> the folder that save_adapter or PEFT wrote; None: the base itself under that name. The first dimension of what a served
    layer is given must be the rows of the batch. unload() takes everything out again, disabled() for a while. Of float64 models the factors are
    held in float64, else in float32.

    Raises ValueError, the model unchanged, as load_adapter does (another base, a damaged folder, a model that is adapted), and where an adapter cannot
    share the model: it stands on a 4-bit base of its own (LoftQ, QPiSSA; QLoRA on a dense model), brings a trained head, norm or bias with it, sits on the
    experts of a mixture, which see tokens without their rows, or adds something else than a low-rank product.
    """
    with unwrapped(model) as plain:
        if any(isinstance(layer, ServedLinear) for _, layer in adapters(plain)):
            raise ValueError("this model serves adapters already: add() another, or unload() it first")
        wrapped = _stacked(plain, {name: _read(plain, name, folder) for name, folder in folders.items()})
        install(plain, wrapped)
    return model.eval()


@contextmanager
def rows(model: nn.Module, names: Sequence[str | None], beams: int = 1) -> Iterator[nn.Module]:
    """Inside the block row i of every batch uses the adapter names[i]; None or "": the base.

    beams: how often generate() repeats each row, one copy after the other, as beam search and num_return_sequences do; batches of both
    sizes are then understood, and a row's copies use the row's adapter. One block at a time for a model; an inner one counts until it ends.

    Raises ValueError where a name is unknown, and from the model's forward where a batch has another number of rows, or none were named at all.
    """
    checks.whole("beams", beams, 1)
    names, layers = [names] if isinstance(names, str) else list(names), _served(model)
    for name in names:
        if name not in (None, "", *layers[0].method.names):
            raise ValueError(f"no adapter {name!r} is served; there are {_listed(layers[0].method.names)}, and None for the base")
    before, turns = [layer.turn for layer in layers], {}
    try:
        for layer in layers:
            slots = tuple(layer.slots.get(name, 0) for name in names), layer.A.device
            if slots not in turns:                                    # layers that the same adapters have share them
                turns[slots] = _turn(*slots, beams)
            layer.turn = turns[slots]
        yield model
    finally:
        for layer, turn in zip(layers, before):
            layer.turn = turn


def _turn(slots: tuple[int, ...], device: torch.device, beams: int) -> dict[int, Tensor | None]:
    """Number of rows -> their slots, as they are and each repeated."""
    each = torch.tensor(slots, device=device)
    return {len(slots) * times: each.repeat_interleave(times) if any(slots) else None for times in {1, beams}}


def add(model: nn.Module, name: str, folder: str | Path | None) -> nn.Module:
    """One more adapter for a model that serves some, between two batches. Returns it. Raises ValueError as serve does, the model unchanged."""
    names = _served(model)[0].method.names
    if name in names:
        raise ValueError(f"{name!r} is served already: remove() it first")
    with unwrapped(model) as plain:
        with without_adapters(plain):
            new = _read(plain, name, folder)
        _replace(plain, _held(plain) | {name: new})
    return model


def remove(model: nn.Module, name: str) -> nn.Module:
    """One adapter less; layers that only it had are plain again. Returns the model. Raises ValueError where it is unknown, or the last."""
    names = _served(model)[0].method.names
    if name not in names:
        raise ValueError(f"no adapter {name!r} is served; there are {_listed(names)}")
    with unwrapped(model) as plain:
        _replace(plain, {other: parts for other, parts in _held(plain).items() if other != name})
    return model


def _served(model: nn.Module) -> list[ServedLinear]:
    found = [layer for _, layer in adapters(model) if isinstance(layer, ServedLinear)]
    if not found:
        raise ValueError("this model serves no adapters: serve(model, {name: folder, ...}) first")
    return found


def _held(plain: nn.Module) -> dict[str, dict[str, Part]]:
    """name -> its parts by layer, of all that is served."""
    layers = dict(adapters(plain))
    by_layer = {at: layer.parts() for at, layer in layers.items()}
    return {name: {at: parts[name] for at, parts in by_layer.items() if name in parts} for name in next(iter(layers.values())).method.names}


def _stacked(plain: nn.Module, held: dict[str, dict[str, Part]]) -> dict[str, ServedLinear]:
    """A layer with all its adapters for each place that has one, not yet in its place."""
    wrapped, bases = {}, linear_layers(plain) | {at: layer.base for at, layer in adapters(plain)}
    for at, base in bases.items():
        parts = {name: parts[at] for name, parts in held.items() if at in parts}
        if parts:
            wrapped[at] = ServedLinear(base, tuple(held), parts)
    if not wrapped:
        names = f" ({_listed(held)})" if held else ""
        raise ValueError(f"no adapter to serve but the base itself{names}: that is the plain model, which unload() gives back")
    return wrapped


def _replace(plain: nn.Module, held: dict[str, dict[str, Part]]) -> None:
    """Let the model serve these instead."""
    before, after = dict(adapters(plain)), _stacked(plain, held)
    for at in before.keys() | after.keys():
        put(plain, at, after[at].train(after[at].base.training) if at in after else before[at].base)


def _read(plain: nn.Module, name: str, folder: str | Path | None) -> dict[str, Part]:
    """The adapter in that folder, by layer; of the base itself, nothing."""
    if not isinstance(name, str) or not name:
        raise ValueError(f"an adapter's name must be a text that is not empty, got {name!r}")
    if folder is None or folder == "":
        return {}
    wrapped, beside, _ = read_adapter(plain, folder)
    if beside:
        raise ValueError(f"{folder}: brings {_listed(sorted(beside))} with it, which all rows would share; load_adapter gives it a model of its own")
    for at, adapter in wrapped.items():
        kind, method = type(adapter), type(adapter.method).__name__
        if original(adapter.base) is not plain.get_submodule(at):
            raise ValueError(f"{folder}: {method} puts {at} in four bits of its own, and the other rows use this model's; "
                             + ("load_adapter gives it a model of its own" if adapter.no_way_back else "quantize(model) gives all of them the same"))
        if "experts" in at.split("."):
            raise ValueError(f"{folder}: {at} is one of several experts, which are given tokens and not rows; load_adapter gives it a model of its own")
        if _owner(kind, "forward") is not _owner(kind, "factors"):
            raise ValueError(f"{folder}: {at} is a {kind.__name__}, whose forward pass need not be a low-rank product's: let its factors() say so")
    return {at: _part(adapter) for at, adapter in wrapped.items()}


def _owner(kind: type, name: str) -> type:
    """The class that gives `kind` its method of that name."""
    return next(one for one in kind.__mro__ if name in vars(one))


@torch.no_grad()
def _part(adapter: Adapter) -> Part:
    """What the adapter adds, in float32 (float64 beside a float64 base), which it was perhaps not saved in. The adapter itself is used up."""
    wide = torch.float64 if adapter.base.weight.dtype == torch.float64 else torch.float32
    for name, tensor in (*adapter.named_parameters(), *adapter.named_buffers()):
        if not name.startswith("base.") and tensor.is_floating_point():
            tensor.data = tensor.data.to(wide)
    left, right = adapter.factors()
    return _trimmed(right, left, adapter.stretch() if hasattr(adapter, "stretch") else None)


def _trimmed(A: Tensor, B: Tensor, g: Tensor | None) -> Part:
    """Without the columns of B that are all zero: AdaLoRA's cut triplets, and what a wider neighbour asked for. One stays, for an update of zero."""
    used = B.any(dim=0)                                                               # (rank)
    used[0] |= not used.any()
    return Part(A[used], B[:, used], None if g is None or (g == 1).all() else g)


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names)
