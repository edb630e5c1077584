"""The identity map: when one method is another. Each edge of the picture (plots.IDENTITIES) is a theorem here, checked in float64.

`theorem` returns how far the two sides are apart under the edge's conditions: 0 but for rounding. `twin` drops one condition, and
returns how far apart they are then; the edge states that amount. Apart means: the largest difference of what they add to W, over the
largest entry of that, at every step of training where the edge is of kind "training", else at one moment with random factors.
"""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import minilora as ml
from minilora.plots import IDENTITIES, identity_map

RANK, ALPHA, STEPS, LR = 3, 5.0, 30, 0.02
TARGETS = ["0", "2"]


def plain():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(7, 9), nn.Tanh(), nn.Linear(9, 8)).double()


def batch(step):
    dice = torch.Generator().manual_seed(step)
    return torch.randn(16, 7, dtype=torch.float64, generator=dice), torch.randn(16, 8, dtype=torch.float64, generator=dice)


def adapted(method, like=None, awake=False, base=None):
    """plain() adapted; with the factors of another model, or with all of its own random."""
    torch.manual_seed(1)
    model = ml.adapt(base or plain(), method, TARGETS)
    with torch.no_grad():
        for name, layer in ml.adapters(model):
            if like is not None:
                other = dict(ml.adapters(like))[name]
                layer.A.copy_(other.A), layer.B.copy_(other.B)
            if awake:
                for key, p in layer.named_parameters():
                    if not key.startswith("base."):
                        p.normal_()
    return model


def adam(decay=0.0):
    return lambda groups: torch.optim.AdamW([group | {"weight_decay": decay} for group in groups], eps=1e-30)


def sgd(groups):
    return torch.optim.SGD([{key: value for key, value in group.items() if key != "weight_decay"} for group in groups])


def weights(model):
    return [layer.weight + layer.delta_weight().detach() if isinstance(layer, ml.Adapter) else layer.weight.detach().clone() for layer in (model[0], model[2])]


def train(model, method, optimizer=adam(), lr=LR, groups=None, steps=STEPS):
    """The loop with its hooks; returns the effective weights after each step."""
    optimizer, seen = optimizer(groups or method.parameter_groups(model, lr)), []
    for step in range(steps):
        x, y = batch(step)
        optimizer.zero_grad()
        (F.mse_loss(model(x), y) + method.penalty(model)).backward()
        method.before_step(model, step)
        optimizer.step()
        method.after_step(model, step)
        seen.append(weights(model))
    return seen


def apart(one, other):
    """Two trajectories, or two models at one moment."""
    if isinstance(one, nn.Module):
        one, other = [weights(one)], [weights(other)]
    start = [layer.weight for layer in (plain()[0], plain()[2])]
    return max((a - b).abs().max().item() / (b - W).abs().max().item() for now, then in zip(one, other, strict=True) for a, b, W in zip(now, then, start))


lora = ml.LoRA(RANK, alpha=ALPHA)
THEOREMS, TWINS = {}, {}


def theorem(function):
    THEOREMS[function.__name__] = function
    return function


def twin(function):
    TWINS[function.__name__] = function
    return function


def pairwise(one, other, optimizer=adam(), lr=LR, other_lr=None):
    """Train both from the same start."""
    left = adapted(one)
    right = adapted(other, like=left)
    return apart(train(left, one, optimizer, lr), train(right, other, optimizer, other_lr or lr))


@theorem
def strength_is_speed():
    """(cs) B A with B at rate lr is s (cB) A with cB at rate c · lr; A's gradient is the same, and Adam does not see B's being c times smaller."""
    return pairwise(ml.LoRA(RANK, alpha=3 * ALPHA), ml.LoRAPlus(RANK, alpha=ALPHA, ratio=3))


@twin
def strength_is_speed():
    return pairwise(ml.LoRA(RANK, alpha=3 * ALPHA), ml.LoRAPlus(RANK, alpha=ALPHA, ratio=3), adam(decay=0.5))


@theorem
def ratio_one():
    return pairwise(ml.LoRAPlus(RANK, alpha=ALPHA, ratio=1), lora, adam(decay=0.1))


@twin
def ratio_one():
    return pairwise(ml.LoRAPlus(RANK, alpha=ALPHA, ratio=2), lora)


@theorem
def root_of_rank():
    return pairwise(ml.LoRA(RANK, alpha=ALPHA, rslora=True), ml.LoRA(RANK, alpha=ALPHA * math.sqrt(RANK)), adam(decay=0.1))


@twin
def root_of_rank():
    return pairwise(ml.LoRA(RANK, alpha=ALPHA, rslora=True), lora)


def frozen_a(rate_of_a):
    left, plus = adapted(ml.LoRAFA(RANK, alpha=ALPHA)), ml.LoRAPlus(RANK, alpha=ALPHA, ratio=1)
    right = adapted(plus, like=left)
    groups = [group | {"lr": rate_of_a if any(p is layer.A for _, layer in ml.adapters(right) for p in group["params"]) else LR}
              for group in plus.parameter_groups(right, LR)]
    return apart(train(left, ml.LoRAFA(RANK, alpha=ALPHA)), train(right, plus, groups=groups))


@theorem
def a_stands_still():
    return frozen_a(0.0)


@twin
def a_stands_still():
    return frozen_a(LR)


def projected(orthonormal):
    one, other = ml.LoRAFA(RANK, alpha=RANK, projection=True), ml.LoRAFA(RANK, alpha=RANK)
    left = adapted(one)
    if orthonormal:
        with torch.no_grad():
            for _, layer in ml.adapters(left):
                layer.A.copy_(torch.linalg.qr(layer.A.T).Q.T)
    right = adapted(other, like=left)
    return apart(train(left, one), train(right, other))


@theorem
def nothing_to_project():
    """ĝ = g (A Aᵀ)⁻¹ / s² is g where A Aᵀ = 1 and s = 1."""
    return projected(orthonormal=True)


@twin
def nothing_to_project():
    return projected(orthonormal=False)


def whole_space(optimizer):
    """Rank = in; A square and orthonormal; s = 1."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(7, 9), nn.Tanh(), nn.Linear(9, 9)).double()
    method, full = ml.LoRAFA(7, alpha=7), copy.deepcopy(base).requires_grad_(False)
    model = ml.adapt(base, method, ["0"])
    with torch.no_grad():
        model[0].A.copy_(torch.linalg.qr(model[0].A).Q)
    full[0].weight.requires_grad_(True)
    trajectories = []
    for net, parameter in ((model, model[0].B), (full, full[0].weight)):
        step_by, seen = optimizer([{"params": [parameter], "lr": LR}]), []
        for step in range(STEPS):
            x, y = batch(step)
            step_by.zero_grad()
            net(x)[:, :8].sub(y).square().mean().backward()
            step_by.step()
            seen.append(net[0].weight + net[0].delta_weight().detach() if net is model else net[0].weight.detach().clone())
        trajectories.append(seen)
    start = model[0].weight
    return max(((a - b).abs().max() / (b - start).abs().max()).item() for a, b in zip(*trajectories))


@theorem
def the_whole_space():
    """B ← B − lr · s G Aᵀ moves W_eff by − lr · s² G AᵀA = − lr · G: gradient descent on W itself."""
    return whole_space(sgd)


@twin
def the_whole_space():
    return whole_space(adam())


@theorem
def no_delta():
    return pairwise(ml.DeltaLoRA(RANK, alpha=ALPHA, delta_ratio=0.0), lora, adam(decay=0.1))


@twin
def no_delta():
    return pairwise(ml.DeltaLoRA(RANK, alpha=ALPHA, delta_ratio=0.5), lora)


@theorem
def delta_from_the_start():
    """W + s B A + λ s B A, and Adam divides out the 1 + λ by which the gradients differ."""
    return pairwise(ml.DeltaLoRA(RANK, alpha=ALPHA, delta_ratio=2.0), ml.LoRA(RANK, alpha=3 * ALPHA), adam(decay=0.1))


@twin
def delta_from_the_start():
    return pairwise(ml.DeltaLoRA(RANK, alpha=ALPHA, delta_ratio=2.0, start_step=5), ml.LoRA(RANK, alpha=3 * ALPHA))


@theorem
def delta_by_gradient_descent():
    return pairwise(ml.DeltaLoRA(RANK, alpha=ALPHA, delta_ratio=2.0), ml.LoRA(RANK, alpha=3 * ALPHA), sgd, 0.3, 0.1)


@twin
def delta_by_gradient_descent():
    return pairwise(ml.DeltaLoRA(RANK, alpha=ALPHA, delta_ratio=2.0), ml.LoRA(RANK, alpha=3 * ALPHA), sgd, 0.1, 0.1)


def two_pairs(sign):
    """Delta-LoRA's sum as one LoRA of rank 2r: [A; A_K] and [(1 + λ) B, −λ B_K]."""
    model = adapted(ml.DeltaLoRA(RANK, alpha=ALPHA, delta_ratio=2.0, start_step=1), awake=True)
    double = ml.adapt(plain(), ml.LoRA(2 * RANK, alpha=2 * ALPHA), TARGETS)
    with torch.no_grad():
        for (_, layer), (_, other) in zip(ml.adapters(model), ml.adapters(double)):
            layer.A_K.normal_(), layer.B_K.normal_(), layer.started.fill_(True)
            other.A.copy_(torch.cat([layer.A, layer.A_K]))
            other.B.copy_(torch.cat([3 * layer.B, sign * 2 * layer.B_K], dim=1))
    return apart(model, double)


@theorem
def delta_is_two_pairs():
    return two_pairs(-1)


@twin
def delta_is_two_pairs():
    return two_pairs(0)


def dropped(threshold):
    """Through finetune with one seed, dropout and all: the same random numbers."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(7, 9), *(part for _ in range(3) for part in (nn.Tanh(), nn.Linear(9, 9))), nn.Tanh(), nn.Linear(9, 8)).double()
    said = []
    for method in (ml.LoRADrop(RANK, alpha=ALPHA, dropout=0.1, threshold=threshold, warmup_steps=4), ml.LoRA(RANK, alpha=ALPHA, dropout=0.1)):
        model = copy.deepcopy(base)
        ml.finetune(model, method, batch, STEPS, LR, targets=["2", "4", "6"], loss_fn=lambda m, x, y: F.mse_loss(m(x), y), progress=False)
        said.append([layer.delta_weight().detach() for _, layer in ml.adapters(model)])
    return max(((a - b).abs().max() / b.abs().max()).item() for a, b in zip(*said))


@theorem
def all_are_kept():
    return dropped(1.0)


@twin
def all_are_kept():
    return dropped(0.1)


def dora_at_start(stretch):
    model = adapted(ml.DoRA(RANK, alpha=ALPHA))
    with torch.no_grad():
        for _, layer in ml.adapters(model):
            layer.magnitude.mul_(stretch)
    return max((layer.delta_weight().abs().max() / layer.weight.abs().max()).item() for _, layer in ml.adapters(model))


@theorem
def dora_starts_as_base():
    return dora_at_start(1.0)


@twin
def dora_starts_as_base():
    return dora_at_start(1.1)


def dora_without_length(tied):
    model = adapted(ml.DoRA(RANK, alpha=ALPHA))
    with torch.no_grad():
        for _, layer in ml.adapters(model):
            layer.B.normal_()
            if tied:
                layer.magnitude.copy_(layer.row_norms())
    return apart(model, adapted(lora, like=model))


@theorem
def dora_of_free_length():
    """m = ‖W + s · B A‖ at every moment leaves W + s · B A."""
    return dora_without_length(tied=True)


@twin
def dora_of_free_length():
    return dora_without_length(tied=False)


def fixed_mask(trained):
    """Λ of ones and zeros: the kept columns of P and rows of Q are LoRA's B and A."""
    method = ml.AdaLoRA(4, 2, alpha=ALPHA, total_steps=10 * STEPS, warmup_steps=2 * STEPS, orthogonal_weight=0.0)
    model = adapted(method, awake=True)
    kept = torch.tensor([True, False, True, True])
    right = ml.adapt(plain(), ml.LoRA(RANK, alpha=ALPHA * RANK / (4 + 1e-5)), TARGETS)
    with torch.no_grad():
        for (_, layer), (_, other) in zip(ml.adapters(model), ml.adapters(right)):
            layer.lam.copy_(kept.double()).requires_grad_(trained)
            other.A.copy_(layer.Q[kept]), other.B.copy_(layer.P[:, kept])
    return apart(train(model, method), train(right, lora))


@theorem
def adalora_of_fixed_masks():
    return fixed_mask(trained=False)


@twin
def adalora_of_fixed_masks():
    return fixed_mask(trained=True)


def pissa_start(start):
    model = adapted(ml.PiSSA(RANK, alpha=ALPHA))
    with torch.no_grad():
        for _, layer in ml.adapters(model):
            layer.B_0.mul_(start)
    return max((layer.delta_weight().abs().max() / layer.weight.abs().max()).item() for _, layer in ml.adapters(model))


@theorem
def pissa_starts_as_base():
    return pissa_start(1.0)


@twin
def pissa_starts_as_base():
    return pissa_start(0.0)


def residual(principal):
    """The paper's own form: W − s · B₀A₀ frozen, LoRA from (A₀, B₀)."""
    method = ml.PiSSA(RANK, alpha=ALPHA)
    model, base = adapted(method), plain()
    with torch.no_grad():
        for name, layer in ml.adapters(model):
            if principal:
                base.get_submodule(name).weight.sub_(layer.scale * layer.B_0 @ layer.A_0)
    right = adapted(lora, like=model if principal else None, base=base)
    return apart(train(model, method), train(right, lora))


@theorem
def pissa_is_lora_on_the_residual():
    return residual(principal=True)


@twin
def pissa_is_lora_on_the_residual():
    return residual(principal=False)


def pissa_pairs(sign):
    model = adapted(ml.PiSSA(RANK, alpha=ALPHA), awake=True)
    double = ml.adapt(plain(), ml.LoRA(2 * RANK, alpha=2 * ALPHA), TARGETS)
    with torch.no_grad():
        for (_, layer), (_, other) in zip(ml.adapters(model), ml.adapters(double)):
            other.A.copy_(torch.cat([layer.A, layer.A_0])), other.B.copy_(torch.cat([layer.B, sign * layer.B_0], dim=1))
    return apart(model, double)


@theorem
def pissa_is_two_pairs():
    return pissa_pairs(-1)


@twin
def pissa_is_two_pairs():
    return pissa_pairs(1)


def absorbed(d):
    model = adapted(ml.VeRA(RANK), awake=True)
    right = ml.adapt(plain(), ml.LoRA(RANK, alpha=RANK), TARGETS)
    with torch.no_grad():
        for (_, layer), (_, other) in zip(ml.adapters(model), ml.adapters(right)):
            A, B = layer.A[:, : layer.in_features], layer.B[: layer.out_features]
            other.A.copy_((layer.d[:, None] if d else 1) * A), other.B.copy_(layer.b[:, None] * B)
    return apart(right, model)


@theorem
def vera_absorbed():
    return absorbed(d=True)


@twin
def vera_absorbed():
    return absorbed(d=False)


def gauge(trained):
    """(A / c, c B) is the same product; trained on by Adam, whose steps are as long for A as for A / c, it is not."""
    left = adapted(lora, awake=True)
    right = adapted(lora, like=left)
    with torch.no_grad():
        for _, layer in ml.adapters(right):
            layer.A.div_(4), layer.B.mul_(4)
    return apart(train(left, lora), train(right, lora)) if trained else apart(left, right)


@theorem
def a_and_b_share_their_size():
    return gauge(trained=False)


@twin
def a_and_b_share_their_size():
    return gauge(trained=True)


def test_what_is_drawn_is_what_is_proved():
    keys = [edge.key for edge in IDENTITIES]
    assert len(set(keys)) == len(keys) and set(keys) == THEOREMS.keys() == TWINS.keys()


@pytest.mark.parametrize("edge", IDENTITIES, ids=lambda edge: edge.key)
def test_it_holds_under_its_conditions(edge):
    assert THEOREMS[edge.key]() < 1e-11


@pytest.mark.parametrize("edge", IDENTITIES, ids=lambda edge: edge.key)
def test_without_one_of_them_it_fails_by_the_amount_it_states(edge):
    assert TWINS[edge.key]() == pytest.approx(edge.off, rel=0.05)


def test_the_picture_shows_every_edge():
    texts = " ".join(text.get_text() for axes in identity_map().axes for text in axes.texts).replace("\n", " ")
    assert all(edge.when in texts for edge in IDENTITIES)
