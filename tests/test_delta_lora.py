"""Delta-LoRA: the telescoped form against the paper's in-place updates of W, written out; when W moves, and how far."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import minilora as ml

STEPS = 12


def regression():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(7, 9), nn.Tanh(), nn.Linear(9, 5)).double()
    return model, torch.randn(64, 7, dtype=torch.float64), torch.randn(64, 5, dtype=torch.float64)


def batch(x, y, step):
    rows = torch.randperm(64, generator=torch.Generator().manual_seed(step))[:16]
    return x[rows], y[rows]


def literal(method, starts, micro_batches=1):
    """The paper's algorithm on real weights: LoRA, and after each optimizer step t >= K  W += λ s (B₊A₊ − B A). Yields all W_eff."""
    model, x, y = regression()
    s = method.alpha / method.rank
    layers = [model[0], model[2]]
    factors = [(A.clone().requires_grad_(True), B.clone().requires_grad_(True)) for A, B in starts]
    W = [layer.weight.detach().clone() for layer in layers]
    optimizer = torch.optim.AdamW([p for pair in factors for p in pair], lr=0.02, weight_decay=0.1, eps=1e-30)
    for step in range(STEPS):
        optimizer.zero_grad()
        for xs, ys in zip(*(part.chunk(micro_batches) for part in batch(x, y, step))):
            h = xs
            for i, (A, B) in enumerate(factors):
                h = h @ (W[i] + s * B @ A).T + layers[i].bias
                h = torch.tanh(h) if i == 0 else h
            (F.mse_loss(h, ys) / micro_batches).backward()
        before = [(B @ A).detach() for A, B in factors]
        optimizer.step()
        if step >= method.start_step:
            for i, (A, B) in enumerate(factors):
                W[i] += method.delta_ratio * s * ((B @ A).detach() - before[i])
        yield [W[i] + s * (B @ A).detach() for i, (A, B) in enumerate(factors)]


def ours(method, model, x, y, micro_batches=1):
    optimizer = torch.optim.AdamW(method.parameter_groups(model, 0.02, 0.1), eps=1e-30)
    for step in range(STEPS):
        optimizer.zero_grad()
        for xs, ys in zip(*(part.chunk(micro_batches) for part in batch(x, y, step))):
            (F.mse_loss(model(xs), ys) / micro_batches).backward()
        method.before_step(model, step)
        optimizer.step()
        method.after_step(model, step)
        yield [layer.weight + layer.delta_weight().detach() for _, layer in ml.adapters(model)]


def adapted(method):
    model, x, y = regression()
    return ml.adapt(model, method, ["0", "2"]), x, y


@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.parametrize("start_step", [0, 1, 3, 7, 11])
@pytest.mark.parametrize("delta_ratio", [0.5, 2.0])
def test_it_is_the_papers_in_place_update_at_every_step(start_step, delta_ratio, micro_batches):
    method = ml.DeltaLoRA(2, alpha=3, delta_ratio=delta_ratio, start_step=start_step)
    model, x, y = adapted(method)
    starts = [(layer.A.detach().clone(), layer.B.detach().clone()) for _, layer in ml.adapters(model)]
    began = [layer.weight.clone() for _, layer in ml.adapters(model)]
    for step, (mine, papers) in enumerate(zip(ours(method, model, x, y, micro_batches), literal(method, starts, micro_batches), strict=True)):
        for one, other in zip(mine, papers):
            assert (one - other).abs().max() < 1e-12, step
    assert all((one - first).abs().max() > 0.05 for one, first in zip(mine, began))
    assert all(torch.equal(layer.weight, first) for (_, layer), first in zip(ml.adapters(model), began))          # and W is where it was


@pytest.mark.parametrize("start_step, rank", [(0, 2), (4, 4)])
def test_the_change_of_w_has_rank_2r_at_most(start_step, rank):
    method = ml.DeltaLoRA(2, alpha=3, start_step=start_step)
    model, x, y = adapted(method)
    *_, last = ours(method, model, x, y)
    for (_, layer), W_eff in zip(ml.adapters(model), last):
        values = torch.linalg.svdvals(W_eff - layer.weight)
        assert (values > 1e-10).sum() == rank


def test_the_formula_of_the_sum():
    """W_eff = W + (1 + λ) s B A − λ s B_K A_K."""
    method = ml.DeltaLoRA(2, alpha=3, delta_ratio=1.7, start_step=4)
    model, x, y = adapted(method)
    snapshots = []
    for step, _ in enumerate(ours(method, model, x, y)):
        if step == 3:
            snapshots = [(layer.A.detach().clone(), layer.B.detach().clone()) for _, layer in ml.adapters(model)]
            assert not any(layer.started or layer.B_K.any() for _, layer in ml.adapters(model))                   # until now it is LoRA
    for (_, layer), (A_K, B_K) in zip(ml.adapters(model), snapshots):
        assert torch.equal(layer.A_K, A_K) and torch.equal(layer.B_K, B_K)
        assert torch.allclose(layer.delta_weight(), 2.7 * 1.5 * layer.B @ layer.A - 1.7 * 1.5 * B_K @ A_K, atol=1e-14)


def test_the_delta_is_of_the_product_and_not_the_product_of_deltas():
    """A stored third-party version had (ΔB)(ΔA): far too small."""
    method = ml.DeltaLoRA(2, alpha=3, start_step=0)
    model, x, y = adapted(method)
    steps = ours(method, model, x, y)
    next(steps)
    layer = next(ml.adapters(model))[1]
    A, B = layer.A.detach().clone(), layer.B.detach().clone()
    before = layer.delta_weight().detach()
    next(steps)
    moved = layer.delta_weight().detach() - before
    right = 3 * 1.5 * (layer.B @ layer.A - B @ A)
    wrong = 1.5 * (layer.B @ layer.A - B @ A) + 2 * 1.5 * (layer.B - B) @ (layer.A - A)
    assert torch.allclose(moved, right, atol=1e-14) and (moved - wrong).norm() > 0.5 * moved.norm()


def test_a_copy_trained_on_keeps_its_own_snapshot():
    method = ml.DeltaLoRA(2, alpha=3, start_step=1)
    model, x, y = adapted(method)
    list(ours(method, model, x, y))
    twin = copy.deepcopy(model)
    list(ours(method, twin, x, y))
    for (_, one), (_, other) in zip(ml.adapters(model), ml.adapters(twin)):
        assert torch.equal(one.A_K, other.A_K) and not torch.equal(one.A, other.A)
