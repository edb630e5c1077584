"""A model in memory: its adapters, ours or PEFT's, the optimizer, and a backward pass. All of it is left as it was found."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from minilora.adapter import Adapter, adapters, unwrapped, without_adapters
from minilora.data import placed
from minilora.formats import FORMATS
from minilora.quant.linear import NF4Linear
from minilora.safety import beside, configuration
from minilora.safety.targets import kind
from minilora.scale.doctor import merged, symptoms
from minilora.scale.doctor.findings import Finding, Report, count, short
from minilora.scale.doctor.sheets import Sheet, own_sheet, peft_sheet

STEPS = 2          # of an optimizer, after which B has moved: a warm-up may begin with a rate of 0
MOST = 0.5         # of the blocks' weights: where more lie outside nn.Linear, "all linear layers" is the smaller part


@dataclass(frozen=True)
class Layer:
    """One adapted layer: its module, W, and what is trained beside W."""

    name: str
    module: nn.Module
    base: nn.Module
    parameters: dict[str, nn.Parameter]

    @property
    def trained(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.parameters.items() if p.requires_grad}

    @property
    def W(self) -> Tensor | None:
        """(out, in); None where it is in four or eight bits, or turned as GPT-2's."""
        weight = None if isinstance(self.base, NF4Linear) else getattr(self.base, "weight", None)
        plain = isinstance(self.base, nn.Linear) and isinstance(weight, nn.Parameter) and weight.is_floating_point()
        return weight.detach() if plain and weight.dim() == 2 and weight.numel() == self.base.in_features * self.base.out_features else None

    @torch.no_grad()
    def dW(self) -> Tensor | None:
        """(out, in), of PEFT's of its active adapters."""
        if isinstance(self.module, Adapter):
            return self.module.delta_weight().detach()
        active = [name for name in self.module.active_adapters if name in getattr(self.module, "scaling", {})]
        return sum(self.module.get_delta_weight(name).detach() for name in active) if active else None


def layers_of(plain: nn.Module) -> list[Layer]:
    """Ours and PEFT's. A parameter that layers share is in each of them."""
    found = []
    for name, module in plain.named_modules():
        if isinstance(module, Adapter):
            base, inside = module.base, "base."
        elif _is_peft(module) and isinstance(getattr(module, "base_layer", None), nn.Module):
            base, inside = module.base_layer, "base_layer."
        else:
            continue
        found.append(Layer(name, module, base, {key: p for key, p in module.named_parameters() if not key.startswith(inside)}))
    return found


def _is_peft(module: nn.Module) -> bool:
    return type(module).__module__.startswith("peft.tuners.")


def diagnose(model: nn.Module, optimizers: list[torch.optim.Optimizer], base: nn.Module | None, batch: object, loss_fn: Callable[..., Tensor]) -> Report:
    with unwrapped(model) as plain:
        layers = layers_of(plain)
        trained = {name: p for name, p in plain.named_parameters() if p.requires_grad}
        everything = sum(p.numel() for p in plain.parameters())
        kinds = list(dict.fromkeys(type(layer.module.method).__name__ if isinstance(layer.module, Adapter) else f"PEFT's {type(layer.module).__name__}"
                                   for layer in layers))
        report = Report(f"{type(model).__name__}: {f'{len(layers)} layers with {chr(44).join(kinds)}' if layers else 'no adapters'}, "
                        f"{sum(p.numel() for p in trained.values()):,} of {everything:,} numbers trained")
        sheet = _sheet(plain, layers)
        steps = _steps(optimizers, layers)
        learns = bool(optimizers) or batch is not None or bool(layers) and plain.training
        report.findings += [finding for finding in (
            _nothing_trained(layers, trained, everything) if learns else None,
            _base_trained(layers),
            _silent(sheet, layers, steps),
            sheet and symptoms.strength(sheet),
            *_not_saved(plain, layers),
            *_tied(plain, layers),
            *_optimizer(plain, layers, trained, optimizers),
        ) if finding]
        coverage, share = _coverage(plain, layers)
        report.findings += coverage
        report.notes += share
        if base is not None:
            with unwrapped(base) as original:
                report.findings += _against(plain, layers, original)
        report.findings += _gradients(model, plain, layers) if batch is None else _backward(model, plain, layers, batch, loss_fn)
    return report


def _sheet(plain: nn.Module, layers: list[Layer]) -> Sheet | None:
    ours = {layer.name: layer.module for layer in layers if isinstance(layer.module, Adapter)}
    if ours:
        return own_sheet(ours)
    return peft_sheet(plain) if layers else None


def _nothing_trained(layers: list[Layer], trained: dict, everything: int) -> Finding | None:
    if trained:
        return None
    loaded = "load_adapter(..., trainable=True), in PEFT is_trainable=True" if layers else "adapt() the model, or model.requires_grad_(True)"
    return Finding("nothing trains", f"0 of {everything:,} numbers have requires_grad", f"To train: {loaded}")


def _base_trained(layers: list[Layer]) -> Finding | None:
    found = [layer.name for layer in layers if isinstance(getattr(layer.base, "weight", None), nn.Parameter) and layer.base.weight.requires_grad]
    if not found:
        return None
    return Finding("W is trained", f"{count(len(found), len(layers), 'adapted layers')} have a W with requires_grad ({short(found[0])})",
                   "Freeze it: layer.base.weight.requires_grad_(False)")


def _silent(sheet: Sheet | None, layers: list[Layer], steps: int) -> Finding | None:
    """Fresh adapters are silent, and so they should be: it counts after steps, or where they are frozen."""
    if sheet is None or not sheet.layers:
        return None
    if steps >= STEPS:
        return symptoms.silent(sheet, f"{steps} steps of the optimizer did not reach it: look at the rate and at .grad")
    if not any(layer.trained for layer in layers) and all(map(sheet.is_silent, sheet.layers)):
        return symptoms.silent(sheet, "And it is frozen: it was saved before training, or training never reached it")
    return None


def _steps(optimizers: list[torch.optim.Optimizer], layers: list[Layer]) -> int:
    """How many the optimizers have made with parameters of adapters, as Adam and its kin count them."""
    own = {p for layer in layers for p in layer.parameters.values()}
    return max((int(state.get("step", 0)) for optimizer in optimizers for p, state in optimizer.state.items() if p in own), default=0)


def _not_saved(plain: nn.Module, layers: list[Layer]) -> Iterator[Finding]:
    """What is trained beside the adapters, and would not be in the folder."""
    ours = {layer.name: layer.module for layer in layers if isinstance(layer.module, Adapter)}
    if ours:
        form = FORMATS.get(type(next(iter(ours.values())).method))
        if form is None:
            return
        with without_adapters(plain):
            try:
                configuration.fields_beside(plain, ours, beside.changed(plain, ours), form.only_bias)
            except ValueError as error:
                yield Finding("cannot be saved", f"{str(error).removeprefix('not saved: ').partition(',')[0]}, and PEFT's format has 0 places for it",
                              "Freeze it, or put it in a module of its own")
    elif layers and getattr(plain, "peft_config", None):
        import peft
        saved = set()
        for name in plain.peft_config:
            saved |= {tensor.data_ptr() for tensor in peft.get_peft_model_state_dict(plain, adapter_name=name, save_embedding_layers=False).values()}
        own = {p for layer in layers for p in layer.parameters.values()}
        lost = {name: p for name, p in plain.named_parameters() if p.requires_grad and p not in own and p.data_ptr() not in saved
                and not any(p is getattr(layer.base, "weight", None) for layer in layers)}
        if lost:
            name, p = max(lost.items(), key=lambda pair: pair[1].numel())
            yield Finding("head not saved", f"{len(lost)} trained tensors are in no modules_to_save ({short(name, 32)}, {p.numel():,} numbers)",
                          "Name their module there")


def _tied(plain: nn.Module, layers: list[Layer]) -> Iterator[Finding]:
    """One tensor under two names, of which one is adapted or trained. Adapters may share theirs: VeRA and LoRA-drop do."""
    own = {p for layer in layers for p in layer.parameters.values()}
    names: dict[nn.Parameter, list[str]] = {}
    for name, p in plain.named_parameters(remove_duplicate=False):
        if p not in own:
            names.setdefault(p, []).append(name)
    bases = {layer.base.weight: layer.name for layer in layers if isinstance(getattr(layer.base, "weight", None), nn.Parameter)}
    alone = {name for several in names.values() if len(several) == 1 for name in several}
    for p, several in names.items():
        if len(several) < 2 or not layers:
            continue
        other = [name for name in several if ".modules_to_save." not in name]
        copies = [name for name in alone if ".modules_to_save." in name
                  and any(name.partition(".modules_to_save.")[0] == there.partition(".original_module.")[0] for there in several)]
        equal = " = ".join(short(name, 32) for name in (other or several)[:2])
        if p in bases:
            yield Finding("tied weights", f"the W of an adapter has {len(several)} names ({equal})", "Merging parts them")
        elif p.requires_grad:
            yield Finding("tied weights", f"{p.numel():,} trained numbers have {len(several)} names ({equal})", "Both move: untie them first")
        elif len(copies) == 1:
            module = copies[0].partition(".modules_to_save.")[0]
            yield Finding("tied weights", f"a copy of {short(module, 30)} is trained, whose tensor has {len(several)} names",
                          "Loaded after a merge they are one: tie_word_embeddings=False")


def _optimizer(plain: nn.Module, layers: list[Layer], trained: dict[str, nn.Parameter], optimizers: list[torch.optim.Optimizer]) -> Iterator[Finding]:
    if not optimizers:
        return
    held = {p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
    there = set(plain.parameters())
    own = {p for layer in layers for p in layer.trained.values()}
    fix = "Make it after adapt() and prepare()"
    gone, missing = held - there, own - held
    if own and not own & held:
        yield Finding("optimizer", f"it holds 0 of {len(own)} trained tensors of adapters, and {len(held)} others", fix)
    elif missing:
        names = [f"{layer.name}.{key}" for layer in layers for key, p in layer.trained.items() if p in missing]
        yield Finding("optimizer", f"{len(missing)} of {len(own)} trained tensors of adapters are not in it ({short(kind(names[0]))})", fix)
    elif rest := [name for name, p in trained.items() if p not in held | own]:
        yield Finding("optimizer", f"{len(rest)} of {len(trained)} trained tensors are not in it ({short(rest[0])})", "Freeze them, or make it anew")
    if gone:
        yield Finding("optimizer", f"{len(gone)} of its {len(held)} tensors are no longer in the model", fix)


def _coverage(plain: nn.Module, layers: list[Layer]) -> tuple[list[Finding], list[str]]:
    """Which of the blocks' Linears have an adapter. To leave whole kinds out is a choice; to have a kind in some blocks and another kind in others, or
    all Linears where most weights are in none, is not."""
    lists = tuple(f"{name}." for name, module in plain.named_modules() if isinstance(module, nn.ModuleList))
    inside = tuple(f"{layer.name}." for layer in layers)
    adapted = {layer.name for layer in layers if layer.name.startswith(lists)} if lists else set()
    if not adapted:
        return [], []
    linears = [name for name, module in plain.named_modules() if name in adapted or isinstance(module, nn.Linear) and name.startswith(lists)
               and not name.startswith(inside)]
    bare = [name for name in linears if name not in adapted]
    notes = [f"{len(adapted)} of {len(linears)} of the blocks' Linears have an adapter"
             + (f"; without: {', '.join(dict.fromkeys(name.rpartition('.')[2] for name in bare))}" if bare else "")]
    blocks = {kind(name): {numbers(there) for there in linears if kind(there) == kind(name)} for name in adapted}
    have = {kind(name): {numbers(there) for there in adapted if kind(there) == kind(name)} for name in adapted}
    ragged = [where for where in have if len(have[where]) < len(blocks[where])]
    if ragged and len({frozenset(have[where]) for where in have}) > 1:
        where = min(ragged, key=lambda where: len(have[where]) / len(blocks[where]))
        return [Finding("targets", f"{short(where)} has an adapter in {len(have[where])} of {len(blocks[where])} blocks, others in more",
                        "Look for the blocks whose layer has another name or class")], notes
    apart = {name for name, module in plain.named_modules() if isinstance(module, (nn.Linear, nn.Embedding)) or name in adapted}
    own = [name for name, p in plain.named_parameters() if p.dim() > 1 and name.startswith(lists)
           and not any(parent in apart for parent in _parents(name))]
    sizes = {name: plain.get_parameter(name).numel() for name in own}
    outside = sum(sizes.values())
    within = sum(layer.base.in_features * layer.base.out_features for layer in layers if layer.name in adapted and isinstance(layer.base, nn.Linear))
    if not bare and within and outside > MOST * (outside + within):
        share = f"{outside / (outside + within):.0%} of the blocks' weights are in none ({short(kind(max(own, key=sizes.get)), 40)})"
        return [Finding("targets", f"all Linears have an adapter, and {share}", "Experts? Conv1D?")], notes
    return [], notes


def numbers(name: str) -> tuple[str, ...]:
    """The block's number, and an expert's in it."""
    return tuple(part for part in name.split(".") if part.isdecimal())


def _parents(name: str) -> Iterable[str]:
    return (name[:i] for i, letter in enumerate(name) if letter == ".")


@torch.no_grad()
def _against(plain: nn.Module, layers: list[Layer], original: nn.Module) -> Iterator[Finding]:
    """The model beside the one that it is said to come from."""
    there = {_bare(name): p for name, p in original.named_parameters()}
    if layers:
        t, differ, seen = [], [], 0
        for layer in layers:
            W, W_0, dW = layer.W, there.get(f"{_bare(layer.name)}.weight"), layer.dW() if layer.W is not None else None
            if W is None or W_0 is None or dW is None or W.shape != W_0.shape:
                continue
            seen += 1
            moved = W.double() - W_0.to(W.dtype).double()
            if moved.any():
                differ.append(layer.name)
            length = dW.double().square().sum()
            if length > 0:
                by_design = 1.0 if getattr(layer.module, "merged", False) else 0.0             # PEFT's merge_adapter() can be undone, and it counts
                t.append(((moved * dW.double()).sum() / length).item() - by_design)
        told = merged.held(t, enough=1)
        if told and told.times >= 1:
            yield Finding("merged already", f"W is base's W + {told.times} dW in {told.agree:.0%} of {told.layers} layers: with the adapter dW counts "
                          f"{'twice' if told.times == 1 else f'{told.times + 1} times'}", "Load the original")
        elif differ and not any(getattr(layer.module, "merged", False) or _alters_base(plain) for layer in layers):
            yield Finding("wrong base", f"W differs from base's in {count(len(differ), seen, 'adapted layers')} ({short(differ[0])})",
                          "Load the weights that the adapter was trained on")
    else:
        yield from swallowed((name, there[_bare(name)], p) for name, p in plain.named_parameters() if _bare(name) in there and p.dim() == 2
                             and not isinstance(plain.get_submodule(name.rpartition(".")[0]), nn.Embedding))


def swallowed(pairs: Iterable[tuple[str, Tensor, Tensor]]) -> Iterator[Finding]:
    """(name, before, after) of a merge: what 16 bits have not let through."""
    same = whole = layers = 0
    dtype = None
    for _, before, after in pairs:
        if after.dtype in (torch.bfloat16, torch.float16) and before.shape == after.shape:
            here, size = merged.unmoved(before, after)
            if here < size:                                                    # a layer that had an adapter
                same, whole, layers, dtype = same + here, whole + size, layers + 1, after.dtype
    if whole and same > 0.5 * whole:
        yield swallowed_finding(same / whole, layers, dtype)


def swallowed_finding(share: float, layers: int, dtype: torch.dtype) -> Finding:
    step = str(dtype).removeprefix("torch.")
    return Finding("lost in rounding", f"{share:.0%} of the weights of {layers} merged layers did not move: |dW| is below half a step of {step}",
                   "Merge into float32: `merge --dtype fp32`")


def _bare(name: str) -> str:
    return name.removeprefix(configuration.PREFIX)


def _alters_base(plain: nn.Module) -> bool:
    return any(isinstance(getattr(config, "init_lora_weights", None), str) for config in (getattr(plain, "peft_config", None) or {}).values())


def _gradients(model: nn.Module, plain: nn.Module, layers: list[Layer]) -> list[Finding]:
    """After a backward of the caller's: some gradient is there, and no adapter has one. Without any, nothing has run, or all were cleared."""
    if not any(p.grad is not None for p in plain.parameters()):
        return []
    return _without_gradient(plain, layers)


def _without_gradient(plain: nn.Module, layers: list[Layer]) -> list[Finding]:
    """An expert to whom no token went has none either: a kind counts where none of its layers has one."""
    without = [layer.name for layer in layers if layer.trained and all(p.grad is None for p in layer.trained.values())]
    reached = {kind(layer.name) for layer in layers if any(p.grad is not None for p in layer.trained.values())}
    without = [name for name in without if kind(name) not in reached]
    if not without:
        return []
    trained = sum(1 for layer in layers if layer.trained)
    return [Finding("no gradient", f".grad is None in {count(len(without), trained, 'adapters')} ({short(kind(without[0]), 36)})",
                    _reentrant(plain) or "Not called, no_grad(), detach(), or reentrant?")]


def _reentrant(plain: nn.Module) -> str:
    """What to do where reentrant checkpointing is on, as transformers' models say."""
    for module in plain.modules():
        if getattr(module, "gradient_checkpointing", False):
            function = getattr(module, "_gradient_checkpointing_func", None)
            if getattr(function, "keywords", {}).get("use_reentrant", True):
                return "Checkpointing: use_reentrant=False, or enable_input_require_grads()"
    return ""


def _backward(model: nn.Module, plain: nn.Module, layers: list[Layer], batch: object, loss_fn: Callable[..., Tensor]) -> list[Finding]:
    """One forward and one backward pass, of which nothing stays."""
    if not any(p.requires_grad for p in plain.parameters()):
        return []                                                              # it is said already
    device = next(plain.parameters()).device
    with _as_it_was(plain):
        model.train()
        with torch.enable_grad():
            try:
                loss = loss_fn(model, *placed(batch, device))
            except ValueError as error:                                        # a line of the loop that the method lives by is missing
                if "is trained without" not in str(error):
                    raise
                return [Finding("the loop", f"1 line is missing: {str(error).partition(': so it')[0]}", "See Method")]
            if not loss.isfinite():
                return [Finding("not finite", f"the loss of this batch is {loss.item()}", "Look at the batch, and at the base alone")]
            if not loss.requires_grad:
                reason = _reentrant(plain) or "Is the forward pass under torch.no_grad(), or the output detached?"
                return [Finding("no gradient", f"the loss needs none, so backward() reaches {count(0, len(layers), 'adapters')}", reason)]
            loss.backward()
        return _without_gradient(plain, layers)


@contextmanager
def _as_it_was(plain: nn.Module) -> Iterator[None]:
    """Gradients, buffers, modes, random numbers, and what the adapters have noticed."""
    grads = [(p, p.grad) for p in plain.parameters()]
    buffers = [(buffer, buffer.detach().clone()) for buffer in plain.buffers()]
    modes = [(module, module.training) for module in plain.modules()]
    watches = [(layer.watch, vars(layer.watch) | {"lines": set(layer.watch.lines)}) for _, layer in adapters(plain)]
    device = next(plain.parameters()).device
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            for p, _ in grads:
                p.grad = None
            yield
    finally:
        for p, grad in grads:
            p.grad = grad
        with torch.no_grad():
            for buffer, before in buffers:
                if not torch.equal(buffer, before):
                    buffer.copy_(before)
        for module, mode in modes:
            module.training = mode
        for watch, before in watches:
            vars(watch).update(before)
