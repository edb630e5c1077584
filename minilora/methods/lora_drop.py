"""LoRA-drop: layers whose LoRA says little give up their own pair and share one (Zhou et al. 2024, arXiv:2402.07721).

    g_i = Σ ‖dW_i x_i‖²  over a sample, after a short warm-up        I_i = g_i / Σ_j g_j
    the layers of largest I, until their sum reaches `threshold`, keep a pair (A_i, B_i) of their own; all others share one pair

What is judged is the output of dW on data: a large update that meets no input does nothing. Then training starts anew.

We had no code of the authors to follow. Where their text leaves a choice, this is ours: layers are ranked, and share, among those of
one kind (q_proj with q_proj: equal shapes, and names equal but for numbers); the sample is the first `warmup_steps` batches, seen once for the warm-up and once more
to judge; after it every pair goes back to its start, so that with threshold = 1 LoRA-drop is LoRA, bit for bit.

Trainable parameters, for each kind with L layers, k of them kept: rank · (in + out) · (k + 1), or · L if k = L.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from minilora import checks
from minilora.adapter import adapters
from minilora.data import placed
from minilora.methods.lora import LoRA, LoRALinear
from minilora.safety.targets import kind


@dataclass(frozen=True)
class LoRADrop(LoRA):
    """LoRA's fields, and threshold: the share of all importance that keeps its own pairs; warmup_steps: batches to judge by."""

    threshold: float = 0.9
    warmup_steps: int = 20

    def __post_init__(self):
        super().__post_init__()
        checks.number("threshold", self.threshold, "above 0 and at most 1", lambda threshold: 0 < threshold <= 1)
        checks.whole("warmup_steps", self.warmup_steps, 1)

    def scheduled(self, steps: int) -> "LoRADrop":
        if self.warmup_steps > steps:
            raise ValueError(f"warmup_steps {self.warmup_steps} is more than the {steps} steps of training that it prepares")
        return self

    @property
    def lines(self) -> tuple[str, ...]:
        return ("prepare",)

    def layer(self, linear: nn.Linear) -> "LoRADropLinear":
        return LoRADropLinear(linear, self)

    def prepare(self, model: nn.Module, batches: Callable, loss_fn: Callable, lr: float) -> None:
        layers = dict(adapters(model))
        for layer in layers.values():
            layer.met("prepare")
        if all(layer.decided for layer in layers.values()):
            return                                                    # a model that was loaded, or is trained on
        device, mode = next(model.parameters()).device, model.training
        fixed = {id(buffer) for layer in layers.values() for buffer in layer.base.buffers()}
        moving = [p for p in model.parameters() if p.requires_grad] + [buffer for buffer in model.buffers() if id(buffer) not in fixed]
        started = [tensor.detach().clone() for tensor in moving]      # a head that is trained too, a norm's running means: all go back
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            try:
                self.warm_up(model, batches, loss_fn, lr)
                g = self.judge(model, batches, loss_fn)
            finally:
                model.train(mode)
                with torch.no_grad():
                    for tensor, start in zip(moving, started):
                        tensor.copy_(start)
                        tensor.grad = None
                for layer in layers.values():
                    layer.watch.called = layer.watch.read = False
        share_pairs(layers, self.kept(g, layers))

    def warm_up(self, model: nn.Module, batches: Callable, loss_fn: Callable, lr: float) -> None:
        """With B = 0 every dW is 0: a few steps, so that there is something to judge."""
        device = next(model.parameters()).device
        optimizer = torch.optim.AdamW(self.parameter_groups(model, lr))
        model.train()
        for step in range(self.warmup_steps):
            optimizer.zero_grad()
            loss_fn(model, *placed(batches(step), device)).backward()
            optimizer.step()

    @torch.no_grad()
    def judge(self, model: nn.Module, batches: Callable, loss_fn: Callable) -> dict[str, float]:
        """g_i of each layer: the sum of ‖dW x‖² over all that it sees in the sample."""
        g = dict.fromkeys(dict(adapters(model)), 0.0)
        device = next(model.parameters()).device

        def listen(name, layer):
            def hook(base, inputs):
                x = torch.cat(inputs[0].unbind()) if inputs[0].is_nested else inputs[0]          # a packed batch: without its padding
                dW_x = layer.scale * F.linear(F.linear(x.to(layer.A.dtype), layer.A), layer.B)    # (..., out)
                g[name] += dW_x.double().square().sum().item()
            return hook

        hooks = [layer.base.register_forward_pre_hook(listen(name, layer)) for name, layer in adapters(model)]
        try:
            model.eval()
            for step in range(self.warmup_steps):
                loss_fn(model, *placed(batches(step), device))
        finally:
            for hook in hooks:
                hook.remove()
        return g

    def kept(self, g: dict[str, float], layers: dict[str, LoRALinear]) -> set[str]:
        """The names of the layers that keep a pair of their own. Raises ValueError where the g of a kind are all 0, FloatingPointError where
        they are not finite."""
        kept = set()
        for names in kinds(layers):
            values = torch.tensor([g[name] for name in names], dtype=torch.float64)
            if not values.isfinite().all() or not values.sum() > 0:
                error = ValueError if values.isfinite().all() else FloatingPointError
                raise error(f"LoRA-drop cannot judge {', '.join(names)}: the outputs of their updates sum to {values.sum().item():g} "
                                 f"after {self.warmup_steps} warm-up steps; another learning rate or more warmup_steps may help")
            largest, order = values.sort(descending=True, stable=True)
            below = (largest.cumsum(0) / values.sum() < self.threshold).sum().item()      # so many do not reach it yet
            count = len(names) if self.threshold == 1 else below + 1
            kept |= {names[i] for i in order[:count].tolist()}
        return kept


class LoRADropLinear(LoRALinear):
    """LoRA's layer, which knows whether its pair is its own."""

    def __init__(self, base: nn.Linear, method: LoRADrop):
        super().__init__(base, method)
        self.register_buffer("decided", torch.tensor(False, device=self.A.device))
        self.register_buffer("own", torch.tensor(True, device=self.A.device))

    def missing_lines(self) -> set[str]:
        return super().missing_lines() - ({"prepare"} if self.decided else set())     # what was loaded or is gone on with was prepared then


def kinds(layers: dict[str, LoRALinear]) -> list[list[str]]:
    """The names of the layers, kind by kind: blocks.0.attention.q_proj with blocks.1.attention.q_proj, if their shapes are equal."""
    found: dict[tuple, list[str]] = {}
    for name, layer in layers.items():
        found.setdefault((kind(name), layer.out_features, layer.in_features), []).append(name)
    return list(found.values())


def share_pairs(layers: dict[str, LoRADropLinear], kept: set[str]) -> None:
    """In each kind, let the layers that are not kept hold the pair of the first of them: one A, one B, counted and trained once."""
    for names in kinds(layers):
        rest = [layers[name] for name in names if name not in kept]
        for layer in rest:
            layer.A, layer.B = rest[0].A, rest[0].B
            layer.own.fill_(False)
    for layer in layers.values():
        layer.decided.fill_(True)
