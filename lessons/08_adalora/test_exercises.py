"""What is true of a right answer to lesson 08. Two sizes of every dimension, fractions for scales and betas, nothing that is zero unless it was cut."""

import math
from fractions import Fraction

import pytest
import torch
from torch import nn

import minilora as ml
from lessons.expect import Sizes, draw, must_equal

CASES = [(7, 5, 2, 4.5), (4, 6, 3, 2 / 3)]                              # out, in, r, scale
each_case = pytest.mark.parametrize("out, into, rank, scale", CASES)
each_lead = pytest.mark.parametrize("lead", [(), (3,), (2, 6)])


def layer(out, into, rank):
    """W, P, lam, Q."""
    return tuple(draw(*shape, seed=seed) for seed, shape in enumerate([(out, into), (out, rank), (rank,), (rank, into)]))


# svd_forward

@each_case
@each_lead
def test_a_layer_speaks_through_its_triplets(svd_forward, lead, out, into, rank, scale):
    (W, P, lam, Q), x = layer(out, into, rank), draw(*lead, into, seed=9)
    z = x @ Q.T
    must_equal(svd_forward(x, W, P, lam, Q, scale), x @ (W + scale * P @ torch.diag(lam) @ Q).T, {
        "this is the branch alone: x Wᵀ is missing": scale * (lam * z) @ P.T,
        "the scale is missing": x @ W.T + (lam * z) @ P.T,
        "the scale is divided by r once more: it is s already": x @ W.T + scale / rank * (lam * z) @ P.T,
        "the scale belongs to the branch, not to W": scale * (x @ W.T + (lam * z) @ P.T),
        "lam is missing: it makes each of the r numbers louder or softer": x @ W.T + scale * z @ P.T,
        "lam is added; it multiplies": x @ W.T + scale * (lam + z) @ P.T,
        "lam is squared: P Λ Q has it once": x @ W.T + scale * (lam * lam * z) @ P.T,
        "the absolute value of lam is taken: it may be negative": x @ W.T + scale * (lam.abs() * z) @ P.T,
        "the branch is taken away; it is added": x @ W.T - scale * (lam * z) @ P.T,
    }, f"svd_forward on x of shape {(*lead, into)}")


def test_the_layer_makes_no_large_matrix(svd_forward):
    W, P, lam, Q = layer(60, 50, 3)
    with Sizes() as made:
        svd_forward(draw(2, 50, seed=9), W, P, lam, Q, 0.5)
    assert made.largest < 60 * 50, f"an (out, in) matrix was made, {made.largest:,} numbers: multiply x by Qᵀ, then by lam, then by Pᵀ"


@each_case
def test_a_layer_starts_silent_and_only_lam_hears(svd_forward, out, into, rank, scale):
    W, P, lam, Q = layer(out, into, rank)
    x, leaves = draw(4, into, seed=9), [t.requires_grad_() for t in (P, torch.zeros_like(lam), Q)]
    y = svd_forward(x, W, *leaves, scale)
    assert torch.allclose(y, x @ W.T, rtol=1e-12), "with lam = 0 the branch must add nothing: the base speaks"
    assert y.requires_grad, "no gradient comes out: P, lam and Q need theirs, so detach none of them"
    y.tanh().sum().backward()
    assert leaves[1].grad is not None and leaves[1].grad.all(), "at the start lam alone hears the loss, and it must hear all of it"
    assert not leaves[0].grad.any() and not leaves[2].grad.any(), "with lam = 0 no gradient of the loss reaches P and Q"


# orthogonality

def mistakes_of_the_norm(Ps, Qs):
    def over(grams, norm=lambda t: t.norm(), total=lambda norms: sum(norms) / len(norms)):
        return total([norm(gram - torch.eye(len(gram)).double()) for gram in grams])

    P, Q = [P.T @ P for P in Ps], [Q @ Q.T for Q in Qs]
    return {
        "the norms are squared; the authors' code does not square them": over(P + Q, norm=lambda t: t.square().sum()),
        "the norms of all P and Q are added; their mean is wanted": over(P + Q, total=sum),
        "squared and added: this is the paper's equation 4; the mean of the norms is wanted": over(P + Q, lambda t: t.square().sum(), sum),
        "each pair of P and Q is added before the mean: that is twice the mean over all P and all Q": 2 * over(P + Q),     # of one layer: the sum, above
        "Q is forgotten": over(P),
        "P is forgotten": over(Q),
        "PPᵀ is (out, out), and can never be the identity while out is more than r: PᵀP": over([P @ P.T for P in Ps] + Q),
        "QᵀQ is (in, in), and can never be the identity while in is more than r: QQᵀ": over(P + [Q.T @ Q for Q in Qs]),
        "the identity is not taken away": sum(gram.norm() for gram in P + Q) / len(P + Q),
        "a matrix of ones is taken away, not the identity": over(P + Q, norm=lambda t: (t + torch.eye(len(t)).double() - 1).norm()),
        "the root of the mean square of all entries: the norm is the root of the sum": over(P + Q, norm=lambda t: t.square().mean().sqrt()),
        "this is the spectral norm; Frobenius is wanted": over(P + Q, norm=lambda t: torch.linalg.matrix_norm(t, 2)),
        "this is the nuclear norm; Frobenius is wanted": over(P + Q, norm=lambda t: torch.linalg.matrix_norm(t, "nuc")),
        "the absolute values are added; Frobenius adds squares": over(P + Q, norm=lambda t: t.abs().sum()),
    }, over(P + Q)


@pytest.mark.parametrize("shapes", [[(4, 6, 3), (7, 5, 3), (9, 4, 3)], [(5, 8, 4), (6, 3, 2)], [(7, 5, 2)]])
def test_distance_from_orthonormal(orthogonality, shapes):
    Ps, Qs = [draw(out, rank, seed=i) for i, (out, _, rank) in enumerate(shapes)], [draw(rank, into, seed=50 + i) for i, (_, into, rank) in enumerate(shapes)]
    mistakes, want = mistakes_of_the_norm(Ps, Qs)
    must_equal(orthogonality(Ps, Qs), want, mistakes, f"{len(shapes)} layer{'s' * (len(shapes) > 1)}")


@pytest.mark.parametrize("length", [0.5, 1.2])
def test_distance_of_orthogonal_directions_is_that_of_their_lengths(orthogonality, length):
    P, Q = length * torch.linalg.qr(draw(7, 3)).Q, torch.linalg.qr(draw(5, 3, seed=1)).Q.T * length
    got, want = orthogonality([P, P], [Q, Q]), abs(length**2 - 1) * 3**0.5
    must_equal(got, torch.tensor(want, dtype=torch.float64), mistakes_of_the_norm([P, P], [Q, Q])[0], "2 layers", rtol=1e-6)
    assert abs(got - want) < 1e-9, f"three orthogonal directions of length {length} are |{length}² − 1| · √3 = {want:.4f} from orthonormal, got {got:.4f}"


def test_distance_has_a_gradient_and_a_dtype(orthogonality):
    for dtype in (torch.float32, torch.bfloat16):
        got = orthogonality([draw(7, 3, dtype=dtype)], [draw(3, 5, seed=1, dtype=dtype)])
        assert got.dtype == dtype and got.shape == (), f"factors in {dtype} give one number, (), in {dtype}; got {got.dtype} of shape {tuple(got.shape)}"
    others, leaves = (draw(6, 2, seed=2), draw(2, 4, seed=3)), (draw(7, 3).requires_grad_(), draw(3, 5, seed=1).requires_grad_())
    got = orthogonality([leaves[0], others[0]], [leaves[1], others[1]])
    mistakes, value = mistakes_of_the_norm([leaves[0].detach(), others[0]], [leaves[1].detach(), others[1]])
    must_equal(got.detach(), value, mistakes, "2 layers")
    assert got.requires_grad, "no gradient comes out, and a penalty works through its gradient alone"
    got.backward()
    for name, leaf in zip("PQ", leaves):
        gram = (leaf.T @ leaf if name == "P" else leaf @ leaf.T).detach() - torch.eye(3).double()
        want = 2 * (leaf.detach() @ gram if name == "P" else gram @ leaf.detach()) / gram.norm() / 4      # one of four norms
        assert leaf.grad is not None, f"no gradient reaches {name}"
        must_equal(leaf.grad, want, {}, f"the gradient of {name}")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_distance_has_no_slope_where_it_is_zero(orthogonality, dtype):
    """P and Q are columns and rows of the identity, exactly orthonormal; the second layer is not."""
    P, Q, P2, Q2 = (t.to(dtype).requires_grad_() for t in (torch.eye(7, 3), torch.eye(3, 5), draw(4, 2), draw(2, 6, seed=1)))
    orthogonality([P, P2], [Q, Q2]).backward()
    for name, leaf in (("P", P), ("Q", Q)):
        assert leaf.grad is not None and not leaf.grad.isnan().any(), (
            f"{name} is exactly orthonormal, and its gradient is NaN: the slope of a square root at 0 is infinite, times 0. One NaN in a penalty ends the training; .norm() gives 0 there")
        assert not leaf.grad.any(), f"{name} is exactly orthonormal, the best it can be: its gradient is 0, got up to {leaf.grad.abs().max():.3g}"
    assert P2.grad.all() and Q2.grad.all(), "the other layer is not orthonormal, and must hear so"


# smoothed

@pytest.mark.parametrize("beta1, beta2", [(0.85, 0.6), (0.3, 0.9)])
@pytest.mark.parametrize("shape", [(7, 3), (4,)])
def test_the_means_take_in_the_news(smoothed, shape, beta1, beta2):
    w, g, mean, spread = draw(*shape), draw(*shape, seed=1), draw(*shape, seed=2).abs(), draw(*shape, seed=3).abs()
    I = (w * g).abs()
    new = beta1 * mean + (1 - beta1) * I
    got = smoothed(w, g, mean.clone(), spread.clone(), beta1, beta2)
    must_equal(got[0], new, {
        "I is |w · dL/dw|: the absolute value is missing": beta1 * mean + (1 - beta1) * w * g,
        "the absolute value is taken of the whole; I = |w · dL/dw| first": (beta1 * mean + (1 - beta1) * w * g).abs(),
        "β₁ and 1 − β₁ have changed places: the old mean weighs β₁": (1 - beta1) * mean + beta1 * I,
        "β₂ stands where β₁ belongs": beta2 * mean + (1 - beta2) * I,
        "I is squared": beta1 * mean + (1 - beta1) * I**2,
        "w is missing in I: it is |w · dL/dw|": beta1 * mean + (1 - beta1) * g.abs(),
        "the gradient is missing in I: it is |w · dL/dw|": beta1 * mean + (1 - beta1) * w.abs(),
        "the mean forgets the past: this is I alone": I,
        "the uncertainty comes second": beta2 * spread + (1 - beta2) * (I - new).abs(),
        "1 − β₁ is missing": beta1 * mean + I,
        "divided by 1 − β₁, as Adam corrects its bias; AdaLoRA does not": new / (1 - beta1),
    }, "Ī")
    must_equal(got[1], beta2 * spread + (1 - beta2) * (I - new).abs(), {
        "U measures how far I is from the old Ī; the new one is wanted": beta2 * spread + (1 - beta2) * (I - mean).abs(),
        "the absolute value is missing in |I − Ī|": beta2 * spread + (1 - beta2) * (I - new),
        "the square is taken; U is the mean of |I − Ī|": beta2 * spread + (1 - beta2) * (I - new) ** 2,
        "β₂ and 1 − β₂ have changed places: the old U weighs β₂": (1 - beta2) * spread + beta2 * (I - new).abs(),
        "β₁ stands where β₂ belongs": beta1 * spread + (1 - beta1) * (I - new).abs(),
        "U is the mean of I here; it is that of |I − Ī|": beta2 * spread + (1 - beta2) * I,
        "U forgets the past": (I - new).abs(),
        "1 − β₂ is missing": beta2 * spread + (I - new).abs(),
    }, "U")


def test_the_means_keep_no_graph(smoothed):
    w = nn.Parameter(draw(7, 3))
    for got, name in zip(smoothed(w, draw(7, 3, seed=1), draw(7, 3, seed=2).abs(), draw(7, 3, seed=3).abs(), 0.85, 0.6), ("Ī", "U")):
        assert not got.requires_grad, f"w is a Parameter, and {name} carries its graph: over a training the graphs of all steps would hang together. torch.no_grad() or .detach()"


def test_ten_steps_are_the_packages(smoothed):
    torch.manual_seed(0)
    layer = ml.AdaLoRA(3, 2).layer(nn.Linear(5, 4).double())
    mean, spread = torch.zeros_like(layer.Q), torch.zeros_like(layer.Q)
    for step in range(10):
        with torch.no_grad():
            layer.Q.copy_(draw(3, 5, seed=step))
            layer.Q.grad = draw(3, 5, seed=100 + step)
            layer.judge(0.7, 0.9)
            mean, spread = smoothed(layer.Q.detach(), layer.Q.grad, mean, spread, 0.7, 0.9)
    must_equal(mean, layer.sensitivity_Q, {}, "Ī after ten steps from 0, beside the package's")
    must_equal(spread, layer.uncertainty_Q, {}, "U after ten steps from 0, beside the package's")


# triplet_importance

@each_case
def test_importance_of_a_triplet(triplet_importance, out, into, rank, scale):
    shapes = {"P": (out, rank), "lam": (rank,), "Q": (rank, into)}
    mean = {name: draw(*shape, seed=i).abs() for i, (name, shape) in enumerate(shapes.items())}
    spread = {name: draw(*shape, seed=10 + i).abs() for i, (name, shape) in enumerate(shapes.items())}
    s = {name: mean[name] * spread[name] for name in shapes}
    must_equal(triplet_importance(mean, spread), s["lam"] + s["P"].mean(0) + s["Q"].mean(1), {
        "the sums over column and row are taken; their means are wanted, or wide layers would always win": s["lam"] + s["P"].sum(0) + s["Q"].sum(1),
        "the sum over the column of P; its mean is wanted": s["lam"] + s["P"].sum(0) + s["Q"].mean(1),
        "the sum over the row of Q; its mean is wanted": s["lam"] + s["P"].mean(0) + s["Q"].sum(1),
        "the mean of Ī times the mean of U; for each weight multiply first": s["lam"] + mean["P"].mean(0) * spread["P"].mean(0) + mean["Q"].mean(1) * spread["Q"].mean(1),
        "this is lam's alone: P's column and Q's row are missing": s["lam"],
        "lam's is missing": s["P"].mean(0) + s["Q"].mean(1),
        "Q's row is missing": s["lam"] + s["P"].mean(0),
        "P's column is missing": s["lam"] + s["Q"].mean(1),
        "the three are multiplied; they are added": s["lam"] * s["P"].mean(0) * s["Q"].mean(1),
        "the mean of the three; their sum is wanted": (s["lam"] + s["P"].mean(0) + s["Q"].mean(1)) / 3,
        "the uncertainty is missing: Ī times U": mean["lam"] + mean["P"].mean(0) + mean["Q"].mean(1),
        "Ī and U are added; multiply them": sum(t for t in (mean["lam"], spread["lam"], (mean["P"] + spread["P"]).mean(0), (mean["Q"] + spread["Q"]).mean(1))),
        "column and row share one mean here; each has a mean of its own, and the two are added": s["lam"] + (s["P"].sum(0) + s["Q"].sum(1)) / (out + into),
        "half the sum of the column's and the row's mean; they are added whole": s["lam"] + (s["P"].mean(0) + s["Q"].mean(1)) / 2,
        "one mean over the whole of Q; each triplet has its own row of Q": s["lam"] + s["P"].mean(0) + s["Q"].mean(),
        "one mean over the whole of P; each triplet has its own column of P": s["lam"] + s["P"].mean() + s["Q"].mean(1),
        "one mean over the whole of P, and of Q; each triplet has its own column and row": s["lam"] + s["P"].mean() + s["Q"].mean(),
        "the rows of P and the columns of Q; a triplet has a column of P and a row of Q": s["lam"] + s["P"].mean(1)[:rank] + s["Q"].mean(0)[:rank],
        "a row of P; a triplet has a column of it": s["lam"] + s["P"].mean(1)[:rank] + s["Q"].mean(1),
        "a column of Q; a triplet has a row of it": s["lam"] + s["P"].mean(0) + s["Q"].mean(0)[:rank],
        "one mean over all numbers of the triplet; lam would drown in it": (s["lam"] + s["P"].sum(0) + s["Q"].sum(1)) / (1 + out + into),
        "the largest of the column and of the row; the mean is wanted": s["lam"] + s["P"].amax(0) + s["Q"].amax(1),
    }, "importance")


# budget

SCHEDULES = [dict(total=100, warmup=10, final=20, first=12, last=4), dict(total=64, warmup=0, final=0, first=288, last=192), dict(total=90, warmup=13, final=31, first=144, last=48),
             dict(total=50, warmup=7, final=0, first=60, last=7), dict(total=2, warmup=0, final=0, first=100, last=2), dict(total=9, warmup=8, final=0, first=5, last=3),
             dict(total=9, warmup=5, final=3, first=70, last=10), dict(total=9, warmup=2, final=4, first=6, last=6)]


@pytest.mark.parametrize("plan", SCHEDULES, ids=lambda plan: " ".join(f"{key} {value}" for key, value in plan.items()))
def test_budget_is_a_cubic_between_two_ends(budget, plan):
    total, warmup, final, first, last = plan.values()
    got, span, end = [budget(step, **plan) for step in range(total)], total - final - warmup, total - max(final, 1)
    between = range(warmup + 1, end)

    def curve(gone=lambda step: Fraction(step - warmup, span), shape=lambda t: (1 - t) ** 3, whole=math.floor, floor=last):
        return [whole(floor + (first - last) * shape(gone(step))) for step in between]

    for name, wrong in {
        "this is equation 12 as it is printed, with final in the numerator too: it begins above the first budget and misses the last": curve(lambda step: Fraction(step - warmup - final, span)),
        "this is a straight line; the power 3 is missing": curve(shape=lambda t: 1 - t),
        "1 − t³ instead of (1 − t)³: that cuts slowly at first, and fast at the end": curve(shape=lambda t: 1 - t**3),
        "the square; it is the third power": curve(shape=lambda t: (1 - t) ** 2),
        "rounded up; it is rounded down": curve(whole=math.ceil),
        "rounded to the nearest; it is rounded down": curve(whole=round),
        "the warm-up is not taken away from the step": curve(lambda step: Fraction(step, span)),
        "the curve reaches its end at the last step of all; it has to be there when the final steps begin": curve(lambda step: Fraction(step - warmup, total - warmup)),
        "what is left at last is missing: the curve falls to 0": curve(floor=0),
    }.items():
        assert wrong == curve() or [got[step] for step in between] != wrong, f"{name} ({plan})"
    assert got[-1] == last, f"the last step, {total - 1}, is always at the last budget, {last}: {plan} gives {got[-1]}"
    for step, number in enumerate(got):
        assert type(number) is int, f"a whole number is wanted, got {type(number).__name__}"
        if step in between:
            want = last + (first - last) * (1 - Fraction(step - warmup, span)) ** 3
            if want.denominator > 1 or (span & (span - 1)) == 0:        # where it is a whole number floats may fall on either side, except for halves
                assert number == math.floor(want), f"step {step} of {plan}: {float(want):.3f}, rounded down {math.floor(want)}, got {number}"
        elif step >= end:
            assert number == last, f"step {step} is one of the final steps, from {end} on: {last}, got {number} ({plan})"
        else:
            assert number == first, f"step {step} is in the warm-up, up to {warmup} and including it, where nothing is cut: {first}, got {number} ({plan})"


def test_budget_has_the_reference_codes_numbers(budget):
    """Two matrices, ranks 6 to 2, warm-up 10, final 20 of 100 steps: PEFT's values."""
    for step, want in {0: 12, 10: 12, 11: 11, 15: 10, 20: 9, 25: 7, 30: 6, 40: 5, 50: 4, 79: 4, 80: 4, 99: 4}.items():
        got = budget(step, 100, 10, 20, 12, 4)
        assert got == want, f"step {step} of 100, warm-up 10, final 20, from 12 to 4: {want}, got {got}"


# keep_best

@pytest.mark.parametrize("rank, layers", [(4, 3), (3, 5)])
@pytest.mark.parametrize("share", [0, 0.3, 0.6, 1])
def test_the_best_of_all_layers_stay(keep_best, rank, layers, share):
    importance = draw(rank, layers).abs()
    number = int(share * rank * layers)
    got = keep_best(importance, number)
    assert got.shape == (rank, layers) and got.dtype == torch.bool, f"a mask of shape {(rank, layers)}, bool, is wanted, got {got.dtype} of shape {tuple(got.shape)}"
    order = sorted(range(rank * layers), key=lambda i: -importance.flatten()[i])
    want = torch.tensor([i in order[:number] for i in range(rank * layers)]).view(rank, layers)
    assert torch.equal(got, want) or not 0 < number < rank * layers or not torch.equal(got, ~want), "these are the ones to cut: True is for those that stay"
    assert torch.equal(got, want) or not torch.equal(got, torch.tensor([i in order[len(order) - number:] for i in range(rank * layers)]).view(rank, layers)), (
        "these are the least important ones; the most important stay")
    kept = int(got.sum())
    assert kept == number, f"exactly {number} of {rank * layers} are to stay, {kept} do"
    assert torch.equal(got, want), f"all layers compete in one ranking, so one may keep all and another none; kept a layer: {got.sum(0).tolist()}, wanted {want.sum(0).tolist()}"


@pytest.mark.parametrize("rank, layers", [(4, 3), (7, 40)])
def test_equals_are_kept_in_order_and_exactly(keep_best, rank, layers):
    equal = torch.full((rank, layers), 0.37, dtype=torch.float64)
    for number in (0, 1, layers - 1, layers, layers + 2, rank * layers - 1, rank * layers):
        got = keep_best(equal, number)
        kept = int(got.sum())
        assert kept == number or kept or not number, f"all are equal and all were cut, though {number} may stay: a threshold with <= cuts every triplet that ties with it"
        assert kept == number, f"all are equal: exactly {number} of {rank * layers} stay, {kept} do; a threshold cannot part equals, a sort can"
        a_layer = got.sum(0)
        assert a_layer.max() - a_layer.min() <= 1, f"all are equal: the lower k is kept first, so no layer has more than one above another; kept a layer {a_layer.tolist()}"
        want = (torch.arange(rank * layers) < number).view(rank, layers)
        assert torch.equal(got, want), f"all are equal: the lower k is kept first, and of equal k the earlier layer; {number} are wanted, kept {got.nonzero().tolist()[:6]} …"


def test_ties_in_the_middle(keep_best):
    importance = torch.tensor([[0.5, 0.1, 2.0], [0.5, 3.0, 0.5], [0.5, 0.5, 0.0]], dtype=torch.float64)
    got = keep_best(importance, 4)
    want = torch.tensor([[True, False, True], [True, True, False], [False, False, False]])
    assert torch.equal(got, want), f"of five with 0.5 the first two in the order of k, then of the layers, stay beside 2.0 and 3.0: {want.tolist()}, got {got.tolist()}"


def test_tiny_importances_are_ranked_too(keep_best):
    got = keep_best(torch.tensor([[1e-21, 3e-20], [2e-20, 4e-22]]), 2)
    assert got.tolist() == [[False, True], [True, False]], f"importances are products of small numbers: only their order counts, got {got.tolist()}"
    near = torch.tensor([[1.0, 1.0 + 1e-12], [1.0 + 3e-12, 1.0 + 2e-12]], dtype=torch.float64)
    assert keep_best(near, 2).tolist() == [[False, False], [True, True]], "float64 importances that differ by 1e-12 are not equal: rank the numbers as they are"


def test_keeping_is_the_packages(keep_best):
    torch.manual_seed(0)
    layers = [ml.AdaLoRA(5, 2).layer(nn.Linear(8, 6)) for _ in range(4)]
    for i, layer in enumerate(layers):
        layer.sensitivity_lam.copy_(draw(5, seed=i).abs())
        layer.uncertainty_lam.fill_(1)
    ml.methods.adalora.keep_best(layers, 9)
    got = keep_best(torch.stack([layer.importance() for layer in layers], dim=1), 9)
    assert torch.equal(got, torch.stack([layer.mask for layer in layers], dim=1)), "the package keeps others"


# revive

STAYED_AWAY = "has not come back at step {}: cut at the steps for which choose gives a mask, and not in the steps after; the same Parameter stays with the optimizer"


def acts(targets, rate):
    """Some lam, and a train_step that draws each halfway (or so) to its target, which may change between the acts: targets(step) -> (r, layers)."""
    rank, layers = targets(0).shape
    lams = [nn.Parameter(torch.zeros(rank, dtype=torch.float64)) for _ in range(layers)]
    optimizer, steps = torch.optim.SGD(lams, lr=rate / 2), []

    def train_step(step):
        steps.append(step)
        optimizer.zero_grad()
        sum((lam - target).square().sum() for lam, target in zip(lams, targets(step).unbind(1))).backward()
        optimizer.step()

    return lams, train_step, steps


def at(masks):
    return lambda step: masks.get(step)


@pytest.mark.parametrize("rank, layers, cut", [(3, 2, 2), (4, 3, 0)])
def test_film_shows_the_cut_and_the_return(revive, rank, layers, cut):
    lams, train_step, made = acts(lambda step: draw(rank, layers), 0.5)                 # of both signs
    mask = draw(rank, layers, seed=3) > 0
    film = revive(lams, train_step, at({cut: mask}), 5)
    assert made == [0, 1, 2, 3, 4], f"train_step is called once for each step, 0 to 4, in this order; it was called with {made}"
    assert isinstance(film, list) and len(film) == 5, f"a list with one entry for each of 5 steps is wanted, got {film!r:.80}"
    film, left, full = [list(frame) for frame in film], mask.sum(0).tolist(), [rank] * layers
    assert film[cut] != full, f"the film shows no cut at step {cut}: count at the end of the step, after the cut ({film})"
    assert film[cut] != [rank - number for number in left] or 2 * sum(left) == rank * layers, "what the mask keeps was cut: it is True for those that stay"
    assert film[cut] == left, f"after the cut of step {cut} the layers have {left}, the film shows {film[cut]}"
    for step in range(cut + 1, 5):
        assert film[step] != left, f"what was cut at step {cut} {STAYED_AWAY.format(step)}"
    assert all(film[step] == full for step in range(5) if step != cut), f"{full} before and after the cut of step {cut}, the film shows {film}"
    assert all(type(number) is int for frame in film for number in frame), f"whole numbers are wanted, got {film}"


def test_cut_touches_nothing_else(revive):
    lams, train_step, _ = acts(lambda step: 1 + draw(3, 2).abs(), 0.5)
    there, mask = list(lams), torch.tensor([[True, False], [False, False], [True, True]])
    revive(lams, train_step, at({3: mask}), 4)
    assert all(lam is before for lam, before in zip(lams, there)), "a lam was replaced: the optimizer goes on training the old one. Write zeros into the one there is"
    want = (1 - 0.5**4) * (1 + draw(3, 2).abs())
    for i, lam in enumerate(lams):
        assert lam.requires_grad, "lam is no longer trained, so it can never come back"
        assert lam.grad is not None and lam.grad.all(), "the gradients were touched: only the numbers of lam are set to zero"
        assert not lam[~mask[:, i]].any(), "what is cut is set to zero, exactly"
        must_equal(lam.detach(), want[:, i] * mask[:, i], {"the kept ones were changed too: set to 1 or added to": mask[:, i].double()}, f"lam of layer {i} after the cut")


def test_choose_is_asked_after_the_step_and_once(revive):
    lams, train_step, made = acts(lambda step: torch.tensor([[1.0, 2.0], [3.0, 0.5]]).double(), 0.5)
    asked = []

    def choose(step):
        asked.append((step, len(made)))
        return torch.stack([lam.detach() for lam in lams], dim=1) > 0.9 if step in (0, 2) else None

    film = revive(lams, train_step, choose, 4)
    assert [step for step, _ in asked] == [0, 1, 2, 3], f"choose is asked once for each step, in order; it was asked for {[step for step, _ in asked]}"
    assert all(so_far == step + 1 for step, so_far in asked), "choose is asked before the step is made: first train_step(step), then choose(step)"
    assert list(film[0]) != [1, 1] or list(film[1]) != [1, 1], f"what was cut at step 0 {STAYED_AWAY.format(1)}"
    assert [list(frame) for frame in film] == [[1, 1], [2, 2], [1, 1], [2, 2]], f"cut at steps 0 and 2, all back at 1 and 3: [[1, 1], [2, 2], [1, 1], [2, 2]], got {film}"


def test_film_counts_what_is_there(revive):
    """Triplet 1 of layer 0 has nothing to do, so it does not come back; at step 3 everything is cut."""
    lams, train_step, _ = acts(lambda step: torch.tensor([[-2.0, 1.0], [0.0, 0.5]]).double(), 0.5)
    film = [list(frame) for frame in revive(lams, train_step, at({1: torch.tensor([[True, False], [False, True]]), 3: torch.zeros(2, 2, dtype=torch.bool)}), 5)]
    assert film[0] == [1, 2], f"what is not zero is counted, of either sign: [1, 2] after step 0, the film shows {film[0]}"
    assert film[1] != [1, 1] or film[2] != [1, 1], f"what was cut at step 1 {STAYED_AWAY.format(2)}"
    assert film[2] == [1, 2], f"a triplet without a gradient does not come back: [1, 2] after step 2, the film shows {film[2]}; count, do not assume"
    assert film[3] == [0, 0], f"a mask of False cuts everything, the film shows {film[3]} after it"
    assert film == [[1, 2], [1, 1], [1, 2], [0, 0], [1, 2]], f"the film should be [[1, 2], [1, 1], [1, 2], [0, 0], [1, 2]], it is {film}"


def test_no_steps_no_film(revive):
    lams, train_step, made = acts(lambda step: torch.ones(2, 2).double(), 0.5)
    assert list(revive(lams, train_step, at({}), 0)) == [] and not made, "without steps there is nothing to train and nothing to show"


def test_what_lay_on_the_floor_carries_the_second_act(revive):
    """One triplet may stay. In the first act triplet 0 has most to do, in the second triplet 2, which was cut three times by then."""
    script = torch.tensor([[3.0], [0.5], [1.0]]).double(), torch.tensor([[0.0], [0.0], [3.0]]).double()
    lams, train_step, _ = acts(lambda step: script[step >= 40], 0.25)

    def choose(step):
        size = lams[0].detach().abs()
        return (size == size.max())[:, None] if step in (10, 20, 30, 90) else None

    film = revive(lams, train_step, choose, 92)
    for step in (10, 20, 30, 90):
        assert film[step] == [1], f"one of three triplets may stay at the cut of step {step}: the film should have [1] there, it has {film[step]}"
        if step < 40:                                                    # later two of the three have nothing to do
            assert film[step + 1] != [1], f"what was cut at step {step} {STAYED_AWAY.format(step + 1)}"
            assert film[step + 1] == [3], f"all three triplets are alive again one step after the cut of step {step}: the film should have [3] there, it has {film[step + 1]}"
    left = (lams[0].detach() - script[1][:, 0]).square().sum().item()
    assert left < 1e-6, f"the loss of the second act is {left:.3g}: triplet 2 was cut in the first act, and had to come back (with revival it is below 1e-6, without 9)"
