"""AdaLoRA: the update as an SVD, whose least useful singular values are cut while training goes on (Zhang et al. 2023, arXiv:2303.10512).

    dW = s · P Λ Q        P: (out, r)   Λ = diag(lam): (r)   Q: (r, in)        s = alpha / r, r = initial_rank (eq. 3)

P and Q start random, lam at zero. A penalty keeps P's columns and Q's rows near orthonormal (eq. 4), and after each step every
triplet (lam_k, column k of P, row k of Q), of all layers together, is judged:

    I = |w · dL/dw|       Ī <- β₁ Ī + (1 − β₁) I       U <- β₂ U + (1 − β₂) |I − Ī|           for each weight w     (eq. 8 to 10)
    importance of a triplet = (Ī U) of its lam + mean of (Ī U) over its column + mean over its row                (eq. 7 and 11)

The `budget` most important keep their lam; the others' lam is set to zero. Nothing else of them is, so a triplet that was cut can
grow again before the next cut. The budget, a number of triplets over all layers, falls from initial_rank to target_rank a layer:

    budget(t) = b_T + (b_0 − b_T) (1 − (t − warmup) / (total − final − warmup))³      between the warm-up and the final steps

Where the paper and its authors' code differ, the code is followed: this curve (eq. 12 as printed misses both its ends), I taken
after the optimizer's step, the penalty's norms averaged and not squared, s = alpha / (r + 1e-5) whatever has been cut.

Trainable parameters: initial_rank · (in + out + 1) for each adapted layer. What was cut is not saved.
"""

from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minilora import checks
from minilora.adapter import Adapter, Method, adapters, add_product
from minilora.methods.lora import check_rank, too_thin
from minilora.safety.watch import LINES


@dataclass(frozen=True)
class AdaLoRA(Method):
    """initial_rank: of every layer at the start; target_rank: of the average layer at the end (None: two thirds of it, as in the
    paper); alpha, dropout: as in LoRA; total_steps: length of training (None: finetune fills it in); warmup_steps: before the first
    cut; final_steps: after the last; interval: steps between cuts; beta1, beta2: of the averages; orthogonal_weight: of the penalty."""

    initial_rank: int
    target_rank: int | None = None
    alpha: float = 8.0
    total_steps: int | None = field(default=None, compare=False)     # belongs to a run, not to the method
    warmup_steps: int = 0
    final_steps: int = 0
    interval: int = 1
    beta1: float = 0.85
    beta2: float = 0.85
    orthogonal_weight: float = 0.1
    dropout: float = 0.0

    def __post_init__(self):
        checks.whole("initial_rank", self.initial_rank, 1)
        if self.target_rank is None:
            object.__setattr__(self, "target_rank", max(1, round(self.initial_rank / 1.5)))
        checks.whole("target_rank", self.target_rank, 1)
        if self.target_rank > self.initial_rank:
            raise ValueError(f"target_rank {self.target_rank} is above initial_rank {self.initial_rank}: AdaLoRA only ever cuts")
        checks.number("alpha", self.alpha, "above 0", lambda alpha: alpha > 0)       # PEFT takes 0 for "equal to the rank"
        for name, least in (("warmup_steps", 0), ("final_steps", 0), ("interval", 1)):
            checks.whole(name, getattr(self, name), least)
        for name in ("beta1", "beta2", "dropout"):
            checks.share(name, getattr(self, name))
        checks.number("orthogonal_weight", self.orthogonal_weight, "of at least 0", lambda weight: weight >= 0)
        if self.total_steps is not None:
            checks.whole("total_steps", self.total_steps, 1)
            if self.warmup_steps + self.final_steps >= self.total_steps:
                raise ValueError(f"warmup_steps {self.warmup_steps} + final_steps {self.final_steps} leave none of the "
                                 f"{self.total_steps} steps to cut in")

    def scheduled(self, steps: int) -> "AdaLoRA":
        if self.total_steps is not None and self.total_steps > steps:
            raise ValueError(f"total_steps {self.total_steps} is more than the {steps} steps of training: the budget would not be reached")
        return replace(self, total_steps=self.total_steps or steps)

    @property
    def lines(self) -> tuple[str, ...]:
        return ("penalty", "after_step") if self.orthogonal_weight else ("after_step",)

    def unfit(self, linear: nn.Linear) -> str:
        return too_thin(self.initial_rank, linear)

    def layer(self, linear: nn.Linear) -> "AdaLoRALinear":
        return AdaLoRALinear(linear, self)

    def penalty(self, model: nn.Module) -> Tensor:
        """orthogonal_weight · the mean over all P and Q of ‖PᵀP − 1‖ and ‖QQᵀ − 1‖, Frobenius."""
        grams = []
        for _, layer in adapters(model):
            layer.met("penalty")
            grams += [layer.P.T @ layer.P, layer.Q @ layer.Q.T]
        norms = [torch.linalg.vector_norm(gram - torch.eye(len(gram), dtype=gram.dtype, device=gram.device)) for gram in grams]
        return self.orthogonal_weight * sum(norms) / len(norms)

    @property
    def last_cut(self) -> int:
        """The step after which the pattern is fixed: where the final steps begin, or the last step of all."""
        if self.total_steps is None:
            raise ValueError("total_steps is not set: the budget's schedule needs the length of training (finetune fills it in)")
        return self.total_steps - max(self.final_steps, 1)

    def budget(self, step: int, layers: int) -> int:
        """How many triplets all layers together may keep."""
        first, last = self.initial_rank * layers, self.target_rank * layers
        if step >= self.last_cut:
            return last
        if step <= self.warmup_steps:
            return first
        to_go = 1 - (step - self.warmup_steps) / (self.total_steps - self.final_steps - self.warmup_steps)
        return int((first - last) * to_go**3 + last)

    @torch.no_grad()
    def after_step(self, model: nn.Module, step: int) -> None:
        layers, last_cut = [layer for _, layer in adapters(model)], self.last_cut
        for layer in layers:
            layer.met("after_step")
            if step < self.total_steps - self.final_steps:
                layer.judge(self.beta1, self.beta2)
        if step >= last_cut or step > self.warmup_steps and step % self.interval == 0:
            if step <= last_cut:
                if not layers[0].watch.weighed:                       # once: to look at a number is to wait for the GPU
                    if not any(layer.importance().any() for layer in layers):
                        raise ValueError("AdaLoRA has seen no gradient to judge its triplets by. A loop has " + LINES["after_step"])
                    layers[0].watch.weighed = True
                keep_best(layers, self.budget(step, len(layers)))
            for layer in layers:
                layer.lam.masked_fill_(~layer.mask, 0.0)


def keep_best(layers: list["AdaLoRALinear"], budget: int) -> None:
    """Set the masks: True for the `budget` most important triplets of all layers. Exactly so many, also where importances tie:
    then the lower k is kept first, and every layer keeps as many as the others."""
    importance = torch.stack([layer.importance() for layer in layers], dim=1)             # (r, layers)
    best = importance.flatten().argsort(descending=True, stable=True)[:budget]
    mask = torch.zeros(importance.numel(), dtype=torch.bool, device=best.device)
    mask[best] = True
    for layer, kept in zip(layers, mask.view_as(importance).unbind(dim=1)):
        layer.mask.copy_(kept)


class AdaLoRALinear(Adapter):
    """A frozen linear layer with P Λ Q beside it, and what is needed to judge the triplets."""

    def __init__(self, base: nn.Linear, method: AdaLoRA):
        check_rank(method.initial_rank, base)
        super().__init__(base, method)
        rank = method.initial_rank
        self.scale = method.alpha / (rank + 1e-5)
        self.dropout = nn.Dropout(method.dropout)
        self.P = self.empty(base.out_features, rank)
        self.lam = self.empty(rank)
        self.Q = self.empty(rank, base.in_features)
        nn.init.zeros_(self.lam)
        nn.init.normal_(self.Q, std=0.02)
        nn.init.normal_(self.P, std=0.02)
        for name in ("P", "lam", "Q"):
            self.register_buffer(f"sensitivity_{name}", torch.zeros_like(getattr(self, name)))
            self.register_buffer(f"uncertainty_{name}", torch.zeros_like(getattr(self, name)))
        self.register_buffer("mask", torch.ones(rank, dtype=torch.bool, device=self.lam.device))

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)                                                              # (..., in) -> (..., out)
        z = F.linear(self.dropout(x), (self.lam[:, None] * self.Q).to(x.dtype))       # (..., in) -> (..., r)
        return add_product(y, z, self.P, self.scale)                                  # y + s · z Pᵀ

    def factors(self) -> tuple[Tensor, Tensor]:
        """(out, r) and (r, in): merging adds their product to W."""
        return self.scale * (self.P * self.lam), self.Q

    @property
    def kept(self) -> Tensor:
        """(r), bool: the triplets that were not cut, or have grown again since."""
        return self.mask | (self.lam != 0)

    def judge(self, beta1: float, beta2: float) -> None:
        """Take this step's |w · dL/dw| into the running means."""
        for name in ("P", "lam", "Q"):
            w = getattr(self, name)
            if w.grad is not None:
                I = (w * w.grad).abs_()
                sensitivity = getattr(self, f"sensitivity_{name}").mul_(beta1).add_(I, alpha=1 - beta1)
                getattr(self, f"uncertainty_{name}").mul_(beta2).add_(I.sub_(sensitivity).abs_(), alpha=1 - beta2)

    def importance(self) -> Tensor:
        """(r): of each triplet."""
        P, lam, Q = (getattr(self, f"sensitivity_{name}") * getattr(self, f"uncertainty_{name}") for name in ("P", "lam", "Q"))
        return lam + P.mean(dim=0) + Q.mean(dim=1)
