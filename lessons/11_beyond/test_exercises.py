"""What is true of a right answer to lesson 11. Two sizes for every dimension, scales that are fractions, factors that are not zero."""

import math

import pytest
import torch
from torch import nn

import minilora as ml
from lessons.expect import draw, each_size, must_equal

each_lead = pytest.mark.parametrize("lead", [(), (3,), (2, 6)])


# rslora_scale

@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("alpha, rank", [(9.0, 2), (2.0, 3), (0.5, 7), (16, 64), (8, 1), (3, 10)])
def test_scale_is_the_packages(rslora_scale, alpha, rank, rslora):
    got, want = rslora_scale(alpha, rank, rslora), ml.LoRA(rank, alpha=alpha, rslora=rslora).scale
    root = math.sqrt(rank)
    mistakes = {
        "this is the scale of rsLoRA; without rslora it is alpha / rank": alpha / root,
        "alpha was divided by the rank and then by √rank": alpha / rank / root,
        "this is floored: alpha // rank has no fractions": alpha // rank,
        "alpha was multiplied by √rank": alpha * root,
        "the root was taken of the whole: √(alpha / rank)": math.sqrt(alpha / rank),
        "the root was taken of alpha": math.sqrt(alpha) / rank,
        "this is the other way round: rank over alpha": rank / alpha,
        "√rank was rounded": alpha / int(root),
    } | ({"this is LoRA's own scale; rsLoRA divides by √rank": alpha / rank} if rslora else {})
    for name, wrong in mistakes.items():
        assert math.isclose(want, wrong, rel_tol=1e-6) or not math.isclose(got, wrong, rel_tol=1e-6), f"{name} (alpha {alpha}, rank {rank}, rslora {rslora}: {want:.4g} is wanted, got {got:.4g})"
    assert math.isclose(got, want, rel_tol=1e-6), f"alpha {alpha}, rank {rank}, rslora {rslora}: {want:.4g} is wanted, got {got:.4g}"


def test_the_two_scales_meet_at_rank_one_and_part_by_the_root(rslora_scale):
    for rank in (1, 5, 64):
        ratio = rslora_scale(3.0, rank, True) / rslora_scale(3.0, rank, False)
        assert math.isclose(ratio, math.sqrt(rank), rel_tol=1e-6), f"at rank {rank} rsLoRA's scale is √{rank} times LoRA's, yours {ratio:.4g} times"


# dora_forward

def dora(size, seed=0):
    """W, bias, A, B, m: of both signs, for a trained magnitude is free."""
    W, A, B = size.factors(seed)
    return W, draw(size.out, seed=seed + 303), A, B, draw(size.out, seed=seed + 404)


def held(W, A, B, m, s, n=None):
    """W' with the norm as a constant."""
    V = W + s * B @ A
    return (m / V.detach().norm(dim=1) if n is None else m / n)[:, None] * V


@each_size
@each_lead
def test_rows_are_turned_and_then_stretched(dora_forward, size, lead):
    (W, b, A, B, m), x, s = dora(size), draw(*lead, size.into, seed=9), size.scale
    V = W + s * B @ A
    n, columns = V.norm(dim=1), V.norm(dim=0)
    must_equal(dora_forward(x, W, b, A, B, m, s), x @ held(W, A, B, m, s).T + b, {
        "n is the length of the columns of V, one for each input; it is one for each output, a row of (out, in)": x @ (m[:, None] * V / columns).T + b,
        "n is the length of W's rows; it is that of V = W + s · B A, anew at each call": x @ held(W, A, B, m, s, W.norm(dim=1)).T + b,
        "n is the length of all of V, one number; it is one for each row": x @ (m[:, None] * V / V.norm()).T + b,
        "n is missing: V is to be divided by it": x @ (m[:, None] * V).T + b,
        "n is squared: divide by the length, not by the sum of squares": x @ held(W, A, B, m, s, n * n).T + b,
        "n is the sum of |V|; the length is the root of the sum of squares": x @ held(W, A, B, m, s, V.abs().sum(1)).T + b,
        "m is missing: these are rows of length 1": x @ (V / n[:, None]).T + b,
        "s is missing": x @ held(W, A, B, m, 1.0).T + b,
        "the bias is scaled too; m / n belongs to V alone": (m / n) * (x @ V.T + b),
        "only W is stretched; m / n belongs to W + s · B A as a whole": x @ ((m / n)[:, None] * W + s * B @ A).T + b,
        "only the update is stretched; m / n belongs to W + s · B A as a whole": x @ (W + (m / n)[:, None] * (s * B @ A)).T + b,
        "the magnitude is taken as positive; m is free, and a row may turn round": x @ held(W, A, B, m.abs(), s).T + b,
        "the bias is missing": x @ held(W, A, B, m, s).T,
    }, f"dora_forward on x of shape {(*lead, size.into)}")


@each_size
def test_a_layer_may_have_no_bias(dora_forward, size):
    (W, _, A, B, m), x, s = dora(size), draw(2, 3, size.into, seed=9), size.scale
    try:
        got = dora_forward(x, W, None, A, B, m, s)
    except (TypeError, AttributeError) as error:
        pytest.fail(f"bias may be None, and then nothing is added: {error}")
    must_equal(got, x @ held(W, A, B, m, s).T, {}, "dora_forward without a bias")


@each_size
def test_it_starts_as_the_base(dora_forward, size):
    W, bias, A, B, _ = dora(size)
    x = draw(4, size.into, seed=9)
    got = dora_forward(x, W, bias, A, torch.zeros_like(B), W.norm(dim=1), size.scale)
    assert torch.allclose(got, x @ W.T + bias, rtol=1e-9), "with B = 0 and m = the lengths of W's rows the base must speak"


@each_size
def test_the_norm_is_a_constant_in_backward(dora_forward, size):
    x, g = draw(4, size.into, seed=9), draw(4, size.out, seed=10)
    W, *rest = dora(size)
    leaves = dict(zip(("x", "bias", "A", "B", "m"), [t.requires_grad_() for t in (x, *rest)]))

    def gradients(y):
        assert y.requires_grad, "no gradient comes out: x, bias, A, B and m need theirs, and only n is a constant"
        return dict(zip(leaves, torch.autograd.grad(y, [*leaves.values()], g, allow_unused=True)))

    x, bias, A, B, m = leaves.values()
    V = W + size.scale * B @ A
    got = gradients(dora_forward(x, W, bias, A, B, m, size.scale))
    want, through = gradients(x @ held(W, A, B, m, size.scale).T + bias), gradients(x @ ((m / V.norm(dim=1))[:, None] * V).T + bias)
    for name in leaves:
        assert got[name] is not None, f"no gradient reaches {name}: only n is a constant, nothing else is cut off"
        must_equal(got[name], want[name], {"n is not a constant: the gradient goes through the norm as well, so detach n": through[name]}, f"the gradient of {name}")


# dora_gradient

def by_autograd(G, W, A, B, m, s, hold=True):
    """dL/dm, dL/dA, dL/dB of L = ⟨G, W'⟩."""
    m, A, B = (t.clone().requires_grad_() for t in (m, A, B))
    V = W + s * B @ A
    n = V.norm(dim=1)
    return torch.autograd.grad(((m / (n.detach() if hold else n))[:, None] * V * G).sum(), (m, A, B))


@each_size
def test_gradients_are_autograds_with_the_norm_held(dora_gradient, size):
    W, _, A, B, m = dora(size)
    G, s, V = draw(size.out, size.into, seed=9), size.scale, W + size.scale * B @ A
    n = V.norm(dim=1)
    got = dora_gradient(G, W, A, B, m, s)
    assert isinstance(got, tuple) and len(got) == 3, f"a tuple of three tensors is wanted, got {type(got).__name__}"
    want, free = by_autograd(G, W, A, B, m, s), by_autograd(G, W, A, B, m, s, hold=False)
    to_V = (m / n)[:, None] * G
    must_equal(got[0], want[0], {
        "dL/dm is not divided by n: W' = m ⊙ V / n": (G * V).sum(1),
        "dL/dm has m in it; W' is linear in m": m * (G * V).sum(1) / n,
        "dL/dm is taken with W; what m stretches is V = W + s · B A": (G * W).sum(1) / W.norm(dim=1),
        "dL/dm is ⟨G, W⟩ / n; what m stretches is V = W + s · B A, so it is ⟨G, V⟩ / n": (G * W).sum(1) / n,
        "dL/dm is the mean of a row; every input is a summand": (G * V).mean(1) / n,
        "dL/dm is the sum of G's rows; each entry meets the entry of V / n that m stretches": G.sum(1),
    }, "dL/dm")
    at_start, whole, alone = ((factor[:, None] * G) for factor in (m / W.norm(dim=1), m, 1 / n))
    for name, mine, right, passed, onwards in (("dL/dA", got[1], want[1], free[1], lambda to_V: s * B.T @ to_V), ("dL/dB", got[2], want[2], free[2], lambda to_V: s * to_V @ A.T)):
        must_equal(mine, right, {
            f"{name} goes through the norm as well; n is held": passed,
            f"{name} is LoRA's: the factor m / n of each row is missing": onwards(G),
            f"{name} lacks s": onwards(to_V) / s,
            f"{name} has m, but is not divided by n": onwards(whole),
            f"{name} is divided by n, but m is missing": onwards(alone),
            f"{name}: n is the length of W's rows; it is that of V's": onwards(at_start),
        }, name)


@each_size
def test_the_gradients_are_made_by_hand(dora_gradient, size):
    W, _, A, B, m = dora(size)
    recorded = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: recorded.append(tensor) or tensor, lambda tensor: tensor):
        dora_gradient(draw(size.out, size.into, seed=9), W, A, B, m, size.scale)
    assert not recorded, "autograd recorded this, and by hand is the exercise: with n held W' is linear in m and linear in V, so three lines are enough"


@each_size
def test_gradients_are_the_packages(dora_gradient, size):
    W, bias, A, B, m = dora(size, seed=20)
    linear = nn.Linear(size.into, size.out).double()
    layer = ml.DoRA(size.rank, alpha=size.alpha).layer(linear)
    with torch.no_grad():
        for mine, value in ((linear.weight, W), (linear.bias, bias), (layer.A, A), (layer.B, B), (layer.magnitude, m)):
            mine.copy_(value)
    x, g = draw(6, size.into, seed=30), draw(6, size.out, seed=31)
    layer(x).backward(g)
    got = dora_gradient(g.T @ x, W, A, B, m, size.scale)
    for name, mine, theirs in zip(("dL/dm", "dL/dA", "dL/dB"), got, (layer.magnitude, layer.A, layer.B)):
        must_equal(mine, theirs.grad, {}, f"{name} beside ml.DoRA's", rtol=1e-7, atol=1e-9)


# pissa_split

def three(got):
    assert isinstance(got, tuple) and len(got) == 3, f"a tuple of three tensors is wanted, got {type(got).__name__}"
    return got


def not_in_float32(got, want, name):
    """Wrong from the seventh digit on: that is no mistake of the formula."""
    off = ((got - want).abs().max() / want.abs().max()).item()
    assert not 1e-10 < off < 1e-5, f"{name} is right to about {-math.log10(off):.0f} digits, as float32 is: compute in float64 (W.double()), and round at the end"


@each_size
@pytest.mark.parametrize("full", [False, True])
def test_the_principal_part_and_the_rest(pissa_split, size, full):
    W, s = draw(size.out, size.into, seed=5), size.scale
    r = min(W.shape) if full else size.rank
    A, B, rest = three(pissa_split(W, r, s))
    U, S, Vt = torch.linalg.svd(W, full_matrices=False)
    best, last = (U[:, :r] * S[:r]) @ Vt[:r], (U[:, -r:] * S[-r:]) @ Vt[-r:]
    assert A.shape == (r, size.into) and B.shape == (size.out, r), (f"shapes: A is (rank, in) = {(r, size.into)} and B (out, rank) = {(size.out, r)}, "
                                                                     f"yours are {tuple(A.shape)} and {tuple(B.shape)}")
    not_in_float32(s * B @ A, best, "s · B A")
    must_equal(s * B @ A, best, {
        "s · B A is s times too large: the singular values are divided by s, because the layer multiplies by it": s * best,
        "s · B A is s times too small: √(S / s) on each side is S / s in all": best / s,
        "these are the smallest singular values; the principal part has the largest": last,
        "the singular values are missing: these are directions alone": s * U[:, :r] @ Vt[:r],
        "the singular values are there twice: a root on each side is once in all": (U[:, :r] * S[:r] ** 2) @ Vt[:r] / s,
        "s · B A has the singular values' roots only; one root on each side": s * (U[:, :r] * (S[:r] / s).sqrt()) @ Vt[:r],
    }, "s · B A")
    share = torch.diag(S[:r] / s)
    for name, gram in (("A Aᵀ", A @ A.T), ("Bᵀ B", B.T @ B)):
        must_equal(gram, share, {
            f"{name}: all of S lies on this side; the root of it belongs on each": torch.diag((S[:r] / s) ** 2),
            f"{name}: nothing of S lies on this side; the root of it belongs on each": torch.eye(r).double(),
            f"{name}: the directions come smallest first; largest first is wanted": share.flip(0, 1),
            f"{name}: √S, and not √(S / s)": share * s,
            f"{name}: s is taken whole on this side; √s belongs on each": share / s,
        }, f"{name} is diag(S_r / s)")
    must_equal(rest, W - best, {
        "rest is W minus B A; s belongs there too": W - best / s,
        "rest is the principal part itself": best,
        "rest is W + s · B A: it is taken away": W + best,
    }, "rest", atol=1e-11)


@each_size
def test_no_other_pair_of_this_rank_is_nearer(pissa_split, size):
    W = draw(size.out, size.into, seed=6)
    A, B, rest = three(pissa_split(W, size.rank, size.scale))
    tail = torch.linalg.svdvals(W)[size.rank:].square().sum().sqrt().item()
    for name, what in (("W - s · B A", W - size.scale * B @ A), ("rest", rest)):
        not_in_float32(what.norm(), torch.tensor(tail, dtype=torch.float64), f"‖{name}‖")
        assert math.isclose(what.norm().item(), tail, rel_tol=1e-9), f"‖{name}‖ must be {tail:.4f}, the root of the sum of the other σ²; yours is {what.norm() / tail - 1:+.2g} of that away"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@each_size
def test_the_split_is_of_the_weights_type_and_rounded_once(pissa_split, size, dtype):
    W = draw(size.out, size.into, seed=7).to(dtype)
    parts = three(pissa_split(W, size.rank, size.scale))
    for name, part in zip(("A", "B", "rest"), parts):
        assert part.dtype == dtype, f"{name} is {part.dtype}; W is {dtype}, and so must all three be"
    U, S, Vt = torch.linalg.svd(W.double(), full_matrices=False)
    best = (U[:, :size.rank] * S[:size.rank]) @ Vt[:size.rank]
    want = W.double() - best
    made = size.scale * parts[1].double() @ parts[0].double()
    must_equal(parts[2], want.to(dtype), {"rest is W minus the A and B that were rounded before: make it from A and B in float64, then round each of the three once": (W.double() - made).to(dtype)},
               f"rest, beside the exact one rounded once to {dtype}; compute in float64, round at the end", rtol=torch.finfo(dtype).eps, atol=0.0)
    assert (made - best).abs().max() <= 4 * torch.finfo(dtype).eps * best.abs().max(), "s · B A is further from the best part than rounding explains"


# loftq_alternate

def times(n, what):
    return f"{n} {what}{'s' * (n != 1)}"


def nf4(w):
    return ml.quantize_nf4(w, block_size=32).dequantize(torch.float64)


def halves(w):
    return (2 * w).round() / 2


def best_part(M, r):
    U, S, Vt = torch.linalg.svd(M, full_matrices=False)
    return (U[:, :r] * S[:r]) @ Vt[:r]


@each_size
@pytest.mark.parametrize("quantize", [nf4, halves])
def test_one_round_gives_the_factors_what_rounding_missed(loftq_alternate, size, quantize):
    W, r, s = draw(size.out, size.into, seed=8), size.rank, size.scale
    Q, A, B = three(loftq_alternate(W, r, 1, s, quantize))
    start = best_part(W, r)
    must_equal(Q, quantize(W), {"this is QPiSSA, which begins with the SVD of W; LoftQ begins with B A = 0, so Q = quantize(W)": quantize(W - start),
                                "Q was made once more after the factors; in a round the factors come last": quantize(W - best_part(W - quantize(W), r))}, "Q after one round")
    must_equal(s * B @ A, best_part(W - Q, r), {
        "B A is the best part of W itself; it is that of W - Q, what rounding missed": start,
        "s · B A is s times too large: divide the singular values by s": s * best_part(W - Q, r),
        "the sign: the factors are given W - Q, not Q - W": -best_part(W - Q, r),
    }, "s · B A after one round", atol=1e-11)
    gram = torch.diag(torch.linalg.svdvals(W - Q)[:r] / s)
    for name, found in (("A Aᵀ", A @ A.T), ("Bᵀ B", B.T @ B)):
        must_equal(found, gram, {}, f"{name} is diag(S_r / s), the root on each side", atol=1e-11)


@each_size
@pytest.mark.parametrize("iterations", [1, 2, 5])
def test_the_rounds_are_the_packages(loftq_alternate, size, iterations):
    W = draw(size.out, size.into, seed=9)
    asked = []

    def quantize(w):
        asked.append(w.clone())
        return nf4(w)

    Q, A, B = three(loftq_alternate(W, size.rank, iterations, size.scale, quantize))
    assert len(asked) == iterations, f"quantize was called {times(len(asked), 'time')} in {times(iterations, 'round')}; it is once a round"
    assert torch.equal(asked[0], W), "the first Q is that of W as it is: B A begins at 0"
    if iterations > 1:
        first = best_part(W - nf4(W), size.rank)
        must_equal(asked[1], W - first, {
            "round 2 quantizes W - B A; s is missing": W - first / size.scale,
            "round 2 quantizes W + s · B A; what the factors hold is taken away": W + first,
            "round 2 quantizes W - Q, what is left; it quantizes W minus what the factors hold": W - nf4(W),
            "round 2 quantizes the first Q again; it quantizes W minus what the factors hold": nf4(W),
            "round 2 quantizes W again; it quantizes W minus what the factors hold": W,
        }, "what is quantized in round 2", atol=1e-11)
    theirs = ml.LoftQ(size.rank, alpha=size.alpha, iterations=iterations, block_size=32).split(W)
    earlier = {f"this is the Q of round {k}; that of the last round is wanted, also where it is further from W": nf4(w) for k, w in enumerate(asked[:-1], 1)}
    must_equal(Q, theirs[0].dequantize(torch.float64), earlier, f"Q after {times(iterations, 'round')}, beside ml.LoftQ's", atol=1e-6)
    must_equal(size.scale * B @ A, best := best_part(W - Q, size.rank), {
        "A and B are those of a round before Q's; they are made from the last Q": best_part(W - nf4(asked[-2]), size.rank) if iterations > 1 else best,
        "A and B are the best part of W - Q - s · B A; each round makes them anew, of W - Q": best_part(asked[-1] - Q, size.rank),
    }, f"s · B A after {times(iterations, 'round')}", atol=1e-9)


def test_five_rounds_end_nearer_than_four_bits_alone(loftq_alternate):
    W = draw(64, 96, seed=10)
    error = {}
    for rounds in (1, 5):
        Q, A, B = three(loftq_alternate(W, 8, rounds, 0.5, nf4))
        error[rounds] = ((W - Q - 0.5 * B @ A).norm() / W.norm()).item()
    alone = ((W - nf4(W)).norm() / W.norm()).item()
    assert error[5] < error[1] < alone, f"the error must fall: four bits alone {alone:.4f}, one round {error[1]:.4f}, five rounds {error[5]:.4f}"


@pytest.mark.parametrize("iterations", [0, -1])
def test_without_a_round_there_is_no_q(loftq_alternate, iterations):
    instead = "nothing was raised"
    try:
        loftq_alternate(draw(7, 5), 2, iterations, 1.5, halves)
    except ValueError:
        return
    except NotImplementedError:                                              # a stub is no mistake
        raise
    except Exception as error:
        instead = f"{type(error).__name__} came"
    pytest.fail(f"iterations = {iterations}: there is no Q to give back, so raise ValueError; {instead}")


# intruders

def basis(n, columns, seed):
    """Orthonormal columns (n, columns)."""
    return torch.linalg.qr(draw(n, columns, seed=seed)).Q


def made_of(out, into, seed=0):
    """W = U diag(S) Vᵀ with singular values that are far from one another, and its parts."""
    k = min(out, into)
    U, V, S = basis(out, k, seed), basis(into, k, seed + 1), torch.linspace(5, 1, k).double()
    return (U * S) @ V.T, U, V


each_shape = pytest.mark.parametrize("out, into", [(12, 8), (9, 14), (10, 10)])


def counted(got, want, why):
    assert isinstance(got, int) and not isinstance(got, bool), f"a whole number is wanted, got {type(got).__name__}"
    assert got == want, f"{why}: {want} wanted, got {got}"


def slips(W, dW, top, threshold):
    """{mistake: the count that it gives}"""
    (U, S, Vt), (new, _, new_Vt) = (torch.linalg.svd(M, full_matrices=False) for M in (W, W + dW))
    (whole, *_), (whole_new, *_) = (torch.linalg.svd(M) for M in (W, W + dW))
    k, C = min(W.shape), U.T @ new                                           # (old, new)
    own = torch.linalg.svd(dW, full_matrices=False).U

    def below(values):
        return int((values < threshold).sum())

    return {
        "the sign of a cosine was kept; an SVD leaves signs open, so take |cosine|": below(C[:, :top].amax(0)),
        "these are V's columns, directions of the input; left singular vectors are the columns of U": below((Vt @ new_Vt[:top].T).abs().amax(0)),
        "these are the rows of U; a singular vector is a column": below((U @ new.T)[:, :top].abs().amax(0)) if W.shape[0] == k else below((U[:top] @ new[:top].T).abs().amax(0)),
        "these are the directions of dW alone; asked are those of W + dW": below((U.T @ own[:, :top]).abs().amax(0)),
        "the largest was taken over the wrong axis: each new direction has its largest over all the old ones": below(C[:, :top].abs().amax(1)),
        "a full square U (full_matrices=True) has columns that are none of W's; W has min(out, in) left singular vectors": below((whole.T @ whole_new[:, :min(top, k)]).abs().amax(0)),
        "each direction was compared with the one of the same number; ask all of W's": below(C.diagonal()[:top].abs()),
        "only the first of W's directions were asked; compare with all of them": below(C[:top, :top].abs().amax(0)),
        "all directions of W + dW were asked, and not the first `top`": below(C.abs().amax(0)),
        "all directions of W + dW were asked, and only the count was cut at `top`": min(top, below(C.abs().amax(0))),
        "W's directions were asked whether they are still there; asked are those of W + dW": below(C[:top].abs().amax(1)),
        "this is the length of all cosines together; the largest one counts": below(C[:, :top].norm(dim=0)),
        "this counts the directions that W knows; an intruder is below the threshold": min(top, k) - below(C[:, :top].abs().amax(0)),
    }


@each_shape
def test_many_counts_at_once(intruders, out, into):
    """One count says little of a mistake; many name it."""
    W, *_ = made_of(out, into)
    dW = 3 * draw(out, 2, seed=71) @ draw(2, into, seed=72) / math.sqrt(out * into) + basis(out, out, 77) @ W - W
    asked = [(top, threshold) for top in (1, 3, 5, 6) for threshold in (0.35, 0.45, 0.55, 0.7, 0.9)]
    U, new = (torch.linalg.svd(M, full_matrices=False).U for M in (W, W + dW))
    largest = (U.T @ new).abs().amax(0)
    got, want = [intruders(W, dW, *at) for at in asked], [int((largest[:top] < threshold).sum()) for top, threshold in asked]
    tables = [slips(W, dW, *at) for at in asked] if got != want else [{}]
    for mistake in tables[0]:
        assert got != [table[mistake] for table in tables], mistake
    for at, mine, right in zip(asked, got, want):
        counted(mine, right, "of the first {} directions of W + dW, those whose largest |cosine| with any of W's is below {}".format(*at))


@each_shape
@pytest.mark.parametrize("seed", range(3))
def test_signs_do_not_matter(intruders, out, into, seed):
    W, *_ = made_of(out, into, seed)
    counted(intruders(W, -W @ basis(into, into, seed + 50) - W, 9, 0.9), 0,
            "only the input side was turned, and the sign changed: the left directions are W's own (an SVD leaves signs open)")


@each_shape
def test_nothing_new_no_intruder(intruders, out, into):
    W, U, V = made_of(out, into)
    counted(intruders(W, torch.zeros_like(W), 5, 0.9), 0, "dW = 0 brings no new direction; compare absolute cosines, with every old direction")
    counted(intruders(W, 20 * torch.outer(U[:, -1], V[:, -1]), 5, 0.9), 0,
            "dW makes W's weakest direction the strongest. It is an old one, at another place: compare with all of W's directions, not with the one of the same number, nor with the top ones")


@each_shape
@pytest.mark.parametrize("parts, cosine", [(4, 0.5), (3, 3**-0.5)])
def test_a_planted_stranger_is_found(intruders, out, into, parts, cosine):
    W, U, V = made_of(out, into)
    stranger = U[:, :parts].sum(1) / math.sqrt(parts)
    dW = 1000 * torch.outer(stranger, V[:, -1])
    counted(intruders(W, dW, 1, cosine + 0.03), 1,
            f"dW is one strong direction whose largest |cosine| with W's is {cosine:.3f}, below {cosine + 0.03:.3f}. Ask W + dW's directions, not W's, and each for its largest |cosine|, "
            "not for the length of all its cosines together")
    counted(intruders(W, dW, 1, cosine - 0.03), 0, f"its largest |cosine|, {cosine:.3f}, is not below {cosine - 0.03:.3f}: it is the largest that counts, not the smallest, the mean or the sum")


@each_shape
def test_a_turned_output_makes_all_strangers(intruders, out, into):
    W, *_ = made_of(out, into)
    dW = basis(out, out, 77) @ W - W
    counted(intruders(W, dW, 50, 1.01), min(out, into), "top is above the number of directions: all of them are asked, and there are min(out, in)")
    counted(intruders(W, dW, 4, 1.01), 4, "every |cosine| is below 1.01, so of the first 4 directions all are counted")


@each_shape
def test_only_the_top_is_asked(intruders, out, into):
    W, U, V = made_of(out, into)
    k, S = min(out, into), torch.linspace(5, 1, min(out, into)).double()
    turned = U.clone()
    turned[:, -2], turned[:, -1] = (U[:, -2] + U[:, -1]) / math.sqrt(2), (U[:, -2] - U[:, -1]) / math.sqrt(2)
    dW = (turned * S) @ V.T - W
    counted(intruders(W, dW, k - 2, 0.8), 0, "the two weakest directions were turned, and they are not among the first: take the first columns of U")
    counted(intruders(W, dW, k - 1, 0.8), 1, f"of the first {k - 1} directions the last was turned by 45°, cosine 0.71")
    counted(intruders(W, dW, k, 0.8), 2, "the two weakest directions were turned by 45°, cosine 0.71")


def test_a_tall_w_knows_only_its_own_outputs(intruders):
    """out = in + 1: there is one output direction that W never makes. A full square U would list it as W's."""
    W, U, V = made_of(9, 8)
    unknown = torch.linalg.svd(W).U[:, 8]
    dW = 20 * torch.outer(unknown, V[:, 0])
    counted(intruders(W, dW, 1, 0.6), 1, "dW writes where W never wrote: W has min(out, in) left singular vectors, and a full square U (full_matrices=True) has columns that are none of W's")


def test_below_means_below(intruders):
    W, new = torch.tensor([[3, 0], [0, 2], [0, 0], [0, 0]]).double(), torch.tensor([[0, 0], [0, 0], [9, 0], [0, 4]]).double()
    counted(intruders(W, new - W, 1, 0.0), 0, "the first direction of W + dW has |cosine| 0 with both of W's, and 0 is not below 0")


def test_a_thin_update_is_heard_where_a_thick_one_is_not(intruders):
    """Both random, both 0.6 times as long as W. The thin one puts all its length into two directions."""
    W = draw(40, 60, seed=1) * torch.linspace(3, 0.2, 60).double()
    thin, thick = draw(40, 2, seed=2) @ draw(2, 60, seed=3), draw(40, 60, seed=4)
    thin, thick = (0.6 * W.norm() / M.norm() * M for M in (thin, thick))
    U, new = torch.linalg.svd(W, full_matrices=False).U, [torch.linalg.svd(W + M, full_matrices=False).U[:, :5] for M in (thin, thick)]
    want = [int(((U.T @ M).abs().amax(0) < 0.5).sum()) for M in new]
    got = [intruders(W, M, 5, 0.5) for M in (thin, thick)]
    assert got == want, f"a thin and a thick update of the same length: {want} intruders are wanted, got {got}"
