"""What an adapted model costs: measured, and beside each measured figure the closed formula that predicts it.

    n tokens go through a layer  in -> out;  x takes e bytes a number, an adapter's own numbers f bytes (4, or 8 beside float64)

                   trained            bytes alive for backward            FLOPs forward             backward
    full           out·in + out       n·in·e                              2n·in·out                 4n·in·out
    LoRA           r(in + out)        n(in + r)e                          2n·in·out + 2nr(in+out)   2n·in·out + 4nr(in+out)
    the others     see the class of each below: what it adds to this or takes away

A frozen layer keeps nothing for backward, which is why the adapter's own input is most of what LoRA keeps. Dropout keeps x once more.
Where x has 16 bits and the adapter 32, the adapter's matrices are kept a second time, rounded.

Bytes alive are those that autograd still holds when the forward pass is over: each storage once, what was freed at once not counted,
parameters and buffers not counted, for they are there anyway. Layers that read one x, as q, k and v do, keep it once between them.
"""

import json
import tempfile
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from math import prod
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from minilora import storage
from minilora.adapter import Adapter, Method, adapters
from minilora.methods.adalora import AdaLoRA
from minilora.methods.delta_lora import DeltaLoRA
from minilora.methods.dora import DoRA
from minilora.methods.full import FullFineTuning
from minilora.methods.loftq import LoftQ, QPiSSA
from minilora.methods.lora import LoRA
from minilora.methods.lora_drop import LoRADrop
from minilora.methods.lora_fa import LoRAFA
from minilora.methods.lora_plus import LoRAPlus
from minilora.methods.pissa import PiSSA
from minilora.methods.qlora import QLoRA
from minilora.methods.vera import VeRA
from minilora.quant.linear import NF4Linear
from minilora.shapes import Shape

Tensors = dict[str, tuple[int, ...]]        # name: shape


# The formulas. One class a method, one method a question; o = out, i = in, n = tokens, e and f = bytes as above.

class LoRACost:
    """LoRA's formulas, which those of the others are written as differences from."""

    keeps_x = True                                              # the gradient of A needs it

    def trained(self, m, o: int, i: int) -> Tensors:
        """What gets a gradient, by its name in the layer."""
        return {"A": (m.rank, i), "B": (o, m.rank)}

    def frozen(self, m, o: int, i: int, f: int) -> int:
        """Bytes that the layer keeps beside what is trained and the base."""
        return 0

    def frozen_parameters(self, m, o: int, i: int) -> int:
        """Of these, frozen parameters; the rest is buffers."""
        return 0

    def shared(self, m, o: int, i: int) -> int:
        """Numbers that all layers keep together; o, i: the tallest and the widest."""
        return 0

    def saved(self, m, o: int, i: int) -> Tensors:
        """What is written to disk, by PEFT's names."""
        return {"lora_A.weight": (m.rank, i), "lora_B.weight": (o, m.rank)}

    def alive(self, m, o: int, i: int, n: int, e: int, f: int) -> int:
        dropped = getattr(m, "dropout", 0) > 0
        x = n * i * e * (self.keeps_x + dropped)                # its input; with dropout the mask too, as large as x
        return x + n * m.rank * e + self.extra(m, o, i, n, e, f) + (self.rounded(m, o, i) * e if e != f else 0)

    def extra(self, m, o: int, i: int, n: int, e: int, f: int) -> int:
        """Bytes alive that LoRA does not have."""
        return 0

    def shared_input(self, m, e: int, f: int) -> int:
        """Bytes of each number of x that layers which read one x keep once between them. With dropout each keeps an x of its own."""
        return e if self.keeps_x and not getattr(m, "dropout", 0) else 0

    def rounded(self, m, o: int, i: int) -> int:
        """Numbers of the adapter that are kept a second time where x has another type."""
        return m.rank * (i + o)

    def flops(self, m, o: int, i: int, n: int) -> tuple[int, int]:
        """Of one layer with its base, forward and backward (to x and to what is trained)."""
        low = 2 * n * m.rank * (i + o)
        return 2 * n * i * o + low, 2 * n * i * o + 2 * low


class LoRAFACost(LoRACost):
    keeps_x = False                                             # A is frozen

    def trained(self, m, o, i):
        return {"B": (o, m.rank)}

    def frozen(self, m, o, i, f):
        return f * m.rank * i

    def frozen_parameters(self, m, o, i):
        return m.rank * i

    def flops(self, m, o, i, n):
        forward, backward = super().flops(m, o, i, n)
        return forward, backward - 2 * n * m.rank * i           # no gradient of A


class LoRADropCost(LoRACost):
    def frozen(self, m, o, i, f):
        return 2                                                # "decided" and "own"


class VeRACost(LoRACost):
    keeps_x = False

    def trained(self, m, o, i):
        return {"d": (m.rank,), "b": (o,)}

    def shared(self, m, o, i):
        return m.rank * (i + o)

    def saved(self, m, o, i):
        return {"vera_lambda_b": (o,), "vera_lambda_d": (m.rank,)}

    def extra(self, m, o, i, n, e, f):
        return n * o * e                                        # what b multiplies

    def rounded(self, m, o, i):
        return m.rank * (i + o) + m.rank + o

    def flops(self, m, o, i, n):
        low = 2 * n * m.rank * (i + o)
        return 2 * n * i * o + low, 2 * n * i * o + low         # nothing for A and B


class DeltaLoRACost(LoRACost):
    """From start_step on, when W moves."""

    def frozen(self, m, o, i, f):
        return f * m.rank * (i + o) + 1                         # the snapshot, and whether it was taken

    def saved(self, m, o, i):
        return {"lora_A.weight": (2 * m.rank, i), "lora_B.weight": (o, 2 * m.rank), "minilora_B_K": (o, m.rank)}

    def extra(self, m, o, i, n, e, f):
        return 2 * m.rank * (i + o) * e                         # [A; A_K] and [B, -B_K]

    def flops(self, m, o, i, n):
        return tuple(flops + 4 * n * m.rank * (i + o) for flops in super().flops(m, o, i, n))


class AdaLoRACost(LoRACost):
    def trained(self, m, o, i):
        return {"P": (o, m.initial_rank), "lam": (m.initial_rank,), "Q": (m.initial_rank, i)}

    def frozen(self, m, o, i, f):
        return f * 2 * m.initial_rank * (i + o + 1) + m.initial_rank      # two running means of each, and the mask

    def saved(self, m, o, i, kept: int | None = None):
        kept = m.target_rank if kept is None else kept
        return {"lora_A": (kept, i), "lora_E": (kept, 1), "lora_B": (o, kept)}

    def alive(self, m, o, i, n, e, f):
        r = m.initial_rank
        x = n * i * e * (1 + (m.dropout > 0))
        return x + n * r * e + r * i * e + (o * r * e if e != f else 0)    # Λ Q, and P rounded

    def flops(self, m, o, i, n):
        low = 2 * n * m.initial_rank * (i + o)
        return 2 * n * i * o + low, 2 * n * i * o + 2 * low


class DoRACost(LoRACost):
    def trained(self, m, o, i):
        return super().trained(m, o, i) | {"magnitude": (o,)}

    def saved(self, m, o, i):
        return super().saved(m, o, i) | {"lora_magnitude_vector": (o,)}

    def extra(self, m, o, i, n, e, f):
        return n * o * e + o * f + o * e                        # what m multiplies, the norms, and m / n

    def flops(self, m, o, i, n):
        forward, backward = super().flops(m, o, i, n)
        return forward + 2 * m.rank * (m.rank * i + i * o + o * m.rank), backward      # the norms, from the factors


class PiSSACost(LoRACost):
    def frozen(self, m, o, i, f):
        return f * m.rank * (i + o)                             # A_0 and B_0

    def saved(self, m, o, i):
        return {"lora_A.weight": (2 * m.rank, i), "lora_B.weight": (o, 2 * m.rank)}

    def alive(self, m, o, i, n, e, f):
        return n * f * (i * (1 + (m.dropout > 0)) + m.rank)     # in the adapter's type throughout

    def shared_input(self, m, e, f):
        return super().shared_input(m, e, f) if e == f else 0   # else each makes its own x of that type

    def flops(self, m, o, i, n):
        low = 2 * n * m.rank * (i + o)
        return 2 * n * i * o + 2 * low, 2 * n * i * o + 3 * low


class FullCost(LoRACost):
    def trained(self, m, o, i):
        return {"weight": (o, i)}                               # and the bias, which `formula` adds

    def alive(self, m, o, i, n, e, f):
        return n * i * e

    def flops(self, m, o, i, n):
        return 2 * n * i * o, 4 * n * i * o


COSTS: dict[type[Method], LoRACost] = {
    FullFineTuning: FullCost(), LoRA: LoRACost(), LoRAPlus: LoRACost(), QLoRA: LoRACost(), LoftQ: LoRACost(), QPiSSA: LoRACost(), LoRAFA: LoRAFACost(),
    LoRADrop: LoRADropCost(), VeRA: VeRACost(), DeltaLoRA: DeltaLoRACost(), AdaLoRA: AdaLoRACost(), DoRA: DoRACost(), PiSSA: PiSSACost(),
}


def nf4_bytes(o: int, i: int, block_size: int = 64, double: bool = True) -> int:
    """A weight (out, in) in four bits, scales and all."""
    blocks = -(-o * i // block_size)
    return -(-o * i // 2) + (blocks + 4 * -(-blocks // 256) + 4 if double else 4 * blocks)


# The measurements.

class _Kept:
    """What autograd holds instead of the tensor; it dies when the graph lets go."""

    def __init__(self, tensor: Tensor):
        self.tensor = tensor.detach()        # an output that its own graph holds would hold the graph, and never die


def bytes_alive(module: nn.Module, run: Callable[[], object], within: Iterable[nn.Module] | None = None) -> int:
    """Bytes that autograd holds after `run`, a forward pass of `module`, for its backward; or of these, what was saved within some of its parts."""
    seen, inside = [], [module] if within is None else []

    def pack(tensor: Tensor) -> _Kept:
        kept = _Kept(tensor)
        if inside:
            seen.append(weakref.ref(kept))
        return kept

    with watching(within or (), lambda part, x: inside.append(part), lambda part, x, y: inside.remove(part)):
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept.tensor):
            result = run()
    there = {tensor.untyped_storage().data_ptr() for tensor in (*module.parameters(), *module.buffers())}
    found = {kept.tensor.untyped_storage().data_ptr(): kept.tensor.untyped_storage().nbytes() for kept in (ref() for ref in seen) if kept is not None}
    del result                                                  # the graph lived as long as this
    return sum(size for pointer, size in found.items() if pointer not in there)


@contextmanager
def watching(parts: Iterable[nn.Module], before: Callable, after: Callable | None = None) -> Iterator[None]:
    """Hooks around the forward pass of each part."""
    handles = [part.register_forward_pre_hook(before) for part in parts] + [part.register_forward_hook(after) for part in parts if after]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _wants_gradient(layer: nn.Module, inputs: tuple) -> None:
    if not inputs[0].requires_grad:
        inputs[0].requires_grad_()


def readers(model: nn.Module, run: Callable[[], object]) -> list[list[str]]:
    """The adapted layers by what they read in `run`, a forward pass of the whole model: those that read one tensor are in one group."""
    layers = _layers(model)
    names, groups, held = {layer: name for name, layer in layers.items()}, {}, []

    def note(layer: nn.Module, inputs: tuple) -> None:
        held.append(inputs[0])                                  # as long as it is held, no other tensor can be in its place
        groups.setdefault(inputs[0].data_ptr(), []).append(names[layer])

    with watching(layers.values(), note):
        run()
    return list(groups.values())


def flops(run: Callable[[], Tensor]) -> tuple[int, int]:
    """Forward and backward, by torch's counter. run() gives a tensor that backward can start from."""
    with FlopCounterMode(display=False) as forward:
        result = run()
    with FlopCounterMode(display=False) as backward:
        result.sum().backward()
    return forward.get_total_flops(), backward.get_total_flops()


def disk_bytes(model: nn.Module) -> int:
    """What is written of it: the adapter's folder, or after full fine-tuning the whole model."""
    with tempfile.TemporaryDirectory() as folder:
        if any(True for _ in adapters(model)):
            storage.save_adapter(model, folder)
        else:
            storage.save_model(model, Path(folder) / "model.safetensors")
        return sum(file.stat().st_size for file in Path(folder).iterdir())


def predicted_disk_bytes(model: nn.Module) -> int:
    """The same from the formulas: a header that names every tensor, its numbers, and for an adapter the configuration."""
    layers = dict(adapters(model))
    if not layers:
        return _packed_bytes({name: tuple(t.shape) for name, t in storage.whole(model).items()}, storage.model_metadata(model), next(model.parameters()).dtype)
    method = next(iter(layers.values())).method
    cost, shapes = COSTS[type(method)], {}
    for name, layer in layers.items():
        o, i = layer.out_features, layer.in_features
        if isinstance(method, AdaLoRA):
            saved = cost.saved(method, o, i, int(layer.kept.sum()))
        elif isinstance(method, DeltaLoRA) and not layer.started:
            saved = LoRACost().saved(method, o, i)
        else:
            saved = cost.saved(method, o, i)
        shapes |= {f"{storage.PREFIX}{name}.{end}": shape for end, shape in saved.items()}
    if isinstance(method, VeRA):
        o, i = (max(getattr(layer, side) for layer in layers.values()) for side in ("out_features", "in_features"))
        shapes |= {"base_model.vera_A": (method.rank, i), "base_model.vera_B": (o, method.rank)}
    config, about = storage.described(model)
    wide = next(iter(layers.values())).weight.dtype == torch.float64
    return _packed_bytes(shapes, {"format": "pt", "minilora": about}, torch.float64 if wide else torch.float32) + len(config)


def _packed_bytes(shapes: Tensors, metadata: dict[str, str], dtype: torch.dtype) -> int:
    """A safetensors file: 8 bytes, a header in JSON filled up to a multiple of 8, and the numbers."""
    kind = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}[dtype]
    header, place = {"__metadata__": metadata}, 0
    for name, shape in sorted(shapes.items()):
        header[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [place, place := place + dtype.itemsize * prod(shape)]}
    size = len(json.dumps(header, sort_keys=True).encode())
    return 8 + size + -size % 8 + place


# The ledger.

@dataclass(frozen=True)
class Line:
    """Bytes, but for parameters and FLOPs. One module's, or the sum of all."""

    name: str
    trainable: int = 0                          # parameters
    frozen: int = 0                             # parameters, of a 4-bit weight those it stands for
    trained_bytes: int = 0
    frozen_bytes: int = 0                       # weights and buffers as stored
    gradient_bytes: int = 0
    optimizer_bytes: int = 0                    # AdamW's two means and step
    alive_bytes: int = 0                        # for backward
    forward_flops: int = 0
    backward_flops: int = 0


def optimizer_bytes(parameters: list[Tensor]) -> int:
    """What AdamW comes to keep: made, stepped once on zeros, and counted."""
    if not parameters:
        return 0
    copies = [nn.Parameter(torch.zeros_like(p, device="cpu")) for p in parameters]
    for copy in copies:
        copy.grad = torch.zeros_like(copy)
    optimizer = torch.optim.AdamW(copies, lr=0.0)
    optimizer.step()
    return sum(tensor.nbytes for state in optimizer.state.values() for tensor in state.values())


def ledger(model: nn.Module, tokens: int = 1024, run: Callable[[], object] | None = None) -> list[Line]:
    """One line for each adapted layer, measured with `tokens` rows that need a gradient; one for all the rest; and the sum.

    What layers share is counted where it comes first. The rest of the model has no bytes alive and no FLOPs here: they depend on the
    batch and not on the method. Without adapters, the lines are those of the linear layers that are trained.

    run: a forward pass of the whole model over `tokens` rows. With it there is one more line before the rest: what the layers hold
    together, less what each holds by itself, for those that read one x keep it once. Without it each has an x of its own in the sum too.
    (In the first block x needs no gradient where the embedding is frozen, and a little less is held than here, where every x does.)
    """
    lines, counted, training = [], set(), model.training
    gradients = {parameter: parameter.grad for parameter in model.parameters()}
    model.zero_grad()                                           # lets go of them; ours come in their place
    model.train()
    for name, layer in _layers(model).items():
        with torch.random.fork_rng([]):
            x = torch.randn(tokens, layer.in_features, dtype=_type(layer), device=next(layer.parameters()).device, requires_grad=True)
            alive = bytes_alive(layer, lambda: layer(x))
            forward, backward = flops(lambda: layer(x))
        lines.append(_weighed(name, layer, counted, alive_bytes=alive, forward_flops=forward, backward_flops=backward))
    if run:
        layers = _layers(model).values()
        with torch.random.fork_rng([]), watching(layers, _wants_gradient):
            together = bytes_alive(model, run, layers)
        lines.append(Line(SHARED, alive_bytes=together - sum(line.alive_bytes for line in lines)))
    model.train(training)
    for parameter, gradient in gradients.items():
        parameter.grad = gradient
    return _with_sum([*lines, _weighed("the rest", model, counted)])


def predicted(model: nn.Module, tokens: int = 1024, run: Callable[[], object] | None = None) -> list[Line]:
    """The same lines from the formulas; only the rest of the model is counted, and from `run` it is only seen which layers read one x.

    Raises ValueError where the adapters are not trained: the formulas are those of training.
    """
    layers, lines, counted = _layers(model), [], set()
    if any(isinstance(layer, Adapter) and not any(p.requires_grad for p in layer.parameters()) for layer in layers.values()):
        raise ValueError("these adapters are not trained (load_adapter's trainable is False), and the formulas are those of training")
    for name, layer in layers.items():
        base, method = (layer.base, layer.method) if isinstance(layer, Adapter) else (layer, FullFineTuning())
        four_bits = (base.block_size, "scales" not in base.parts) if isinstance(base, NF4Linear) else None
        alone = not (isinstance(method, LoRADrop) and id(layer.A) in counted)
        line = formula(name, method, base.out_features, base.in_features, tokens, base.bias is not None, _type(layer).itemsize, four_bits, alone)
        lines.append(_as_lora(line, layer, tokens) if isinstance(method, DeltaLoRA) and not layer.started else line)
        counted |= {id(t) for t in (*layer.parameters(), *layer.buffers())}
    if lines and isinstance(method, VeRA):
        lines[0] = _with_shared(lines[0], method, [(layer.out_features, layer.in_features) for layer in layers.values()], max(4, _type(layer).itemsize))
    if run:
        twice = 0                                               # numbers that each layer by itself would keep once more
        with torch.random.fork_rng([]):
            for first, *others in readers(model, run):
                twice += tokens * layers[first].in_features * len(others)
        lines.append(_shared(method, twice, _type(layer).itemsize))
    return _with_sum([*lines, _weighed("the rest", model, counted)])


SHARED = "shared inputs"


def _shared(method: Method, numbers: int, e: int) -> Line:
    return Line(SHARED, alive_bytes=-numbers * COSTS[type(method)].shared_input(method, e, e if method.trains_base else max(e, 4)))


def _as_lora(line: Line, layer: Adapter, tokens: int) -> Line:
    """Delta-LoRA's, before W moves: the snapshot is there already, and the rest is LoRA's."""
    o, i, e = layer.out_features, layer.in_features, _type(layer).itemsize
    forward, backward = LoRACost().flops(layer.method, o, i, tokens)
    return replace(line, alive_bytes=LoRACost().alive(layer.method, o, i, tokens, e, max(e, 4)), forward_flops=forward, backward_flops=backward)


def formula(name: str, method: Method, o: int, i: int, tokens: int, bias: bool = True, e: int = 4, four_bits: tuple[int, bool] | None = None,
            alone: bool = True) -> Line:
    """What one layer in -> out costs. e: bytes a number of x and the base; four_bits: block size and whether doubly quantized, of a base
    in NF4; alone: whether it has trained tensors of its own, and not another layer's (LoRA-drop)."""
    cost, full = COSTS[type(method)], method.trains_base
    f = e if full else max(e, 4)
    shapes = [*cost.trained(method, o, i).values()] * alone + [(o,)] * (full and bias)
    numbers, in_base = sum(map(prod, shapes)), 0 if full else o * i + o * bias
    stored = in_base * e if four_bits is None else nf4_bytes(o, i, *four_bits) + o * bias * e
    return Line(name, numbers, in_base + cost.frozen_parameters(method, o, i), numbers * f, stored + cost.frozen(method, o, i, f), numbers * f,
                2 * numbers * f + 4 * len(shapes), cost.alive(method, o, i, tokens, e, f), *cost.flops(method, o, i, tokens))


def _with_shared(line: Line, method: VeRA, sizes: list[tuple[int, int]], f: int) -> Line:
    """The line of the layer that comes first, with what all share."""
    shared = COSTS[VeRA].shared(method, max(o for o, _ in sizes), max(i for _, i in sizes))
    return replace(line, frozen=line.frozen + shared, frozen_bytes=line.frozen_bytes + shared * f)


def _layers(model: nn.Module) -> dict[str, nn.Module]:
    return dict(adapters(model)) or {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear) and module.weight.requires_grad}


def _type(layer: nn.Module) -> torch.dtype:
    base = layer.base if isinstance(layer, Adapter) else layer
    return base.compute_dtype if isinstance(base, NF4Linear) else base.weight.dtype


def _weighed(name: str, module: nn.Module, counted: set[int], **figures: int) -> Line:
    """What of `module` was not counted before; from now on it is."""
    parameters, buffers = ([t for t in tensors if id(t) not in counted] for tensors in (module.parameters(), module.buffers()))
    four_bits = sum(m.in_features * m.out_features for m in module.modules() if isinstance(m, NF4Linear) and id(m.codes) not in counted)
    counted |= {id(t) for t in (*parameters, *buffers)}
    trained, frozen = ([p for p in parameters if p.requires_grad is wanted] for wanted in (True, False))
    numbers, size = sum(p.numel() for p in trained), sum(p.nbytes for p in trained)
    return Line(name, numbers, sum(p.numel() for p in frozen) + four_bits, size, sum(t.nbytes for t in (*frozen, *buffers)), size,
                optimizer_bytes(trained), **figures)


def _with_sum(lines: list[Line]) -> list[Line]:
    return [*lines, Line("all", *(sum(getattr(line, field.name) for line in lines) for field in fields(Line)[1:]))]


def extrapolated(shape: Shape, method: Method, targets: list[str] | None = None, tokens: int = 1024, base: str = "fp16") -> list[Line]:
    """The formulas on a model that is not here: a line for each kind of layer that is adapted, one for the rest, and the sum.

    base: "fp32", "fp16", or "nf4", which puts every linear layer of the blocks in four bits (double quantization) and the rest in 16. A
    method that makes its own 4-bit base (QLoRA, LoftQ, QPiSSA) does so in its own way and only where it adapts, as `adapt` does.
    The last line but two is what layers that read one x do not keep again.
    Raises ValueError where `shape` has no such targets or the method cannot stand on that base.
    """
    if base not in ("fp32", "fp16", "nf4"):
        raise ValueError(f"base must be fp32, fp16 or nf4, got {base!r}")
    if base == "nf4" and isinstance(method, (FullFineTuning, DeltaLoRA)):
        raise ValueError(f"{type(method).__name__} must move W, which four bits cannot; take fp16 or fp32")
    own = hasattr(method, "block_size")
    e, four_bits = 4 if base == "fp32" else 2, (method.block_size, method.double) if own else (64, True) if base == "nf4" else None
    kinds = shape.targets(targets)
    lines = []
    for kind in kinds:
        rank = getattr(method, "initial_rank", getattr(method, "rank", 0))
        if rank > min(kind.out, kind.into) and not isinstance(method, VeRA):
            raise ValueError(f"rank {rank} is above min(in, out) of {kind.name}, {kind.into} -> {kind.out}")
        one = formula(kind.name, method, kind.out, kind.into, tokens, kind.bias, e, four_bits)
        lines.append(Line(kind.name, *(kind.count * getattr(one, field.name) for field in fields(Line)[1:])))
    if isinstance(method, VeRA):
        lines[0] = _with_shared(lines[0], method, [(kind.out, kind.into) for kind in kinds], 4)
    left = [kind for kind in shape.kinds if kind not in kinds]
    stored = sum(kind.count * (nf4_bytes(kind.out, kind.into) + kind.out * kind.bias * e) if four_bits and not own else kind.parameters * e for kind in left)
    others = sum(kind.parameters for kind in left) + shape.rest
    full = method.trains_base and not targets
    rest = Line("the rest", *((others, 0, others * e, 0, others * e, 2 * others * e) if full else (0, others, 0, stored + shape.rest * e)))
    return _with_sum([*lines, _shared(method, tokens * shape.read_again(kinds), e), rest])
