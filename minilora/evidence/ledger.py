"""What an adapted model costs, measured: and beside each measured figure what formulas.py predicts.

Bytes alive are those that autograd still holds when the forward pass is over: each storage once, what was freed at once not counted,
parameters and buffers not counted, for they are there anyway. Layers that read one x, as q, k and v do, keep it once between them.
"""

import json
import tempfile
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from math import prod
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from minilora import storage
from minilora.adapter import Adapter, adapters
from minilora.evidence.formulas import COSTS, SHARED, Line, LoRACost, Tensors, formula, shared_inputs, with_shared, with_sum
from minilora.methods.adalora import AdaLoRA
from minilora.methods.delta_lora import DeltaLoRA
from minilora.methods.full import FullFineTuning
from minilora.methods.lora_drop import LoRADrop
from minilora.methods.vera import VeRA
from minilora.quant.linear import NF4Linear
from minilora.safety.conv1d import linear_layers, original


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
    names, groups, held = {original(layer): name for name, layer in _layers(model).items()}, {}, []

    def note(layer: nn.Module, inputs: tuple) -> None:
        held.append(inputs[0])                                  # as long as it is held, no other tensor can be in its place
        groups.setdefault(inputs[0].data_ptr(), []).append(names[layer])

    with watching(names, note):
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
    if not any(True for _ in adapters(model)):
        return len(storage.packed({name: tensor.contiguous() for name, tensor in storage.whole(model).items()}, storage.model_metadata(model)))
    with tempfile.TemporaryDirectory() as folder:
        storage.save_adapter(model, folder)
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
        layers = [original(layer) for layer in _layers(model).values()]
        with torch.random.fork_rng([]), watching(layers, _wants_gradient):
            together = bytes_alive(model, run, layers)
        lines.append(Line(SHARED, alive_bytes=together - sum(line.alive_bytes for line in lines)))
    model.train(training)
    for parameter, gradient in gradients.items():
        parameter.grad = gradient
    return with_sum([*lines, _weighed("the rest", model, counted)])


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
        lines.append(formula(name, method, base.out_features, base.in_features, tokens, base.bias is not None, _type(layer).itemsize, four_bits, alone))
        counted |= {id(t) for t in (*layer.parameters(), *layer.buffers())}
    if lines and isinstance(method, VeRA):
        lines[0] = with_shared(lines[0], method, [(layer.out_features, layer.in_features) for layer in layers.values()], max(4, _type(layer).itemsize))
    if run:
        twice = 0                                               # numbers that each layer by itself would keep once more
        with torch.random.fork_rng([]):
            for first, *others in readers(model, run):
                twice += tokens * layers[first].in_features * len(others)
        lines.append(shared_inputs(method, twice, _type(layer).itemsize))
    return with_sum([*lines, _weighed("the rest", model, counted)])


def _layers(model: nn.Module) -> dict[str, nn.Module]:
    return dict(adapters(model)) or {name: layer for name, layer in linear_layers(model).items() if layer.weight.requires_grad}


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
