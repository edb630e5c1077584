"""What is true of a right answer to lesson 06. Two sizes for every dimension, scales that are fractions, factors that are not zero."""

import math

import pytest
import torch

import minilora as ml
from lessons.expect import Sizes, draw, must_equal

CASES = [(7, 5, 2, 3.0, 0.5), (4, 9, 3, 2.0, 1.75)]                     # out, in, rank, alpha, λ: s is 1.5, then 2/3
each_case = pytest.mark.parametrize("out, into, rank, alpha, ratio", CASES)


def factors(out, into, rank, seed=0):
    """W, A_K, B_K, A, B."""
    shapes = ((out, into), (rank, into), (out, rank), (rank, into), (out, rank))
    return tuple(draw(*shape, seed=seed + i) for i, shape in enumerate(shapes))


# literal_update

@each_case
def test_update_is_the_delta_of_the_product(literal_update, out, into, rank, alpha, ratio):
    W, A, B, A_next, B_next = factors(out, into, rank)
    s, moved = alpha / rank, B_next @ A_next - B @ A
    must_equal(literal_update(W, A, B, A_next, B_next, s, ratio), W + ratio * s * moved, {
        "this is the product of the deltas, (B₊ - B)(A₊ - A); the paper moves W by the delta of the product, B₊A₊ - B A": W + ratio * s * (B_next - B) @ (A_next - A),
        "the scale s is missing": W + ratio * moved,
        "λ is missing": W + s * moved,
        "the sign: W follows B A, it does not run away from it": W - ratio * s * moved,
        "this is the update alone: W itself is missing from the sum": ratio * s * moved,
        "only the new product is added: take the old one away, or it is counted at every step": W + ratio * s * B_next @ A_next,
        "this adds LoRA's own branch as well; here only W's update is wanted": W + s * B_next @ A_next + ratio * s * moved,
    }, "literal_update")


def test_update_is_nothing_where_nothing_moved(literal_update):
    W, A, B, *_ = factors(7, 5, 2)
    assert torch.allclose(literal_update(W, A, B, A.clone(), B.clone(), 1.5, 0.5), W, rtol=0, atol=1e-12), "the factors stood still, so W must"


# telescope

def many_steps(out, into, rank, s, ratio, steps=6):
    """The literal way, step by step: W after all of them, and the factors before the first and after the last."""
    W = W_0 = draw(out, into, seed=30)
    path = [(draw(rank, into, seed=40 + t), draw(out, rank, seed=60 + t)) for t in range(steps + 1)]
    for (A, B), (A_next, B_next) in zip(path, path[1:]):
        W = W + ratio * s * (B_next @ A_next - B @ A)
    return W_0, W, path[0], path[-1]


@each_case
def test_telescope_is_what_all_the_steps_made(telescope, out, into, rank, alpha, ratio):
    s = alpha / rank
    W_0, W, (A_K, B_K), (A, B) = many_steps(out, into, rank, s, ratio)
    BA, old = B @ A, B_K @ A_K
    must_equal(telescope(W_0, A_K, B_K, A, B, s, ratio), W + s * BA, {
        "this is W after its updates; the layer multiplies by W + s · B A, LoRA's branch is still there": W,
        "the start (A_K, B_K) is not taken away: what was learned before step K never went into W": W_0 + (1 + ratio) * s * BA,
        "B_K A_K is taken away (1 + λ) times; it went only into W's part, λ times": W_0 + (1 + ratio) * s * (BA - old),
        "B_K A_K is taken away once; it is λ times": W_0 + (1 + ratio) * s * BA - s * old,
        "B_K A_K has the wrong sign: it is where the sum begins, so it is taken away": W_0 + (1 + ratio) * s * BA + ratio * s * old,
        "the scale s is missing": W_0 + (1 + ratio) * BA - ratio * old,
        "λ is missing: the updates of W are λ times as long as LoRA's branch": W_0 + 2 * s * BA - s * old,
        "this is plain LoRA: W's own part is missing": W_0 + s * BA,
    }, "telescope", rtol=1e-9, atol=1e-10)


def test_telescope_at_step_k_is_lora(telescope):
    W, A_K, B_K, *_ = factors(7, 5, 2)
    got = telescope(W, A_K, B_K, A_K.clone(), B_K.clone(), 1.5, 0.5)
    assert torch.allclose(got, W + 1.5 * B_K @ A_K, atol=1e-12), "at step K W has not moved yet: W_eff is W_0 + s · B A"


# swallowed

def test_swallowed_in_bfloat16(swallowed):
    got = swallowed(0.02, 1e-5, 100, torch.bfloat16)
    assert isinstance(got, int), f"a whole number is wanted, got {type(got).__name__}"
    assert got != 0, "none is lost in float64, or where a finer copy is kept: store the sum in `dtype` after every addition"
    assert got == 100, f"bfloat16 near 0.02 has steps of 1.2e-4: each of the 100 additions of 1e-5 is rounded away; you count {got}"


def test_swallowed_once_the_weight_has_grown(swallowed):
    got = swallowed(0.0, 2.0**-8, 1000, torch.bfloat16)
    assert got != 0, "w must be replaced by the stored sum, or it never grows"
    assert got == 744, (f"256 additions of 1/256 reach 1, where bfloat16's steps are 1/128: half a step is rounded back to 1, so the other 744 are lost; "
                        f"you count {got}. Compare each sum with what was stored before it, not with the first number")


@pytest.mark.parametrize("weight, update, times, dtype, want", [
    (0.02, 1e-5, 100, torch.float32, 0), (1.0, 2.0**-12, 7, torch.float16, 7), (1.0, 2.0**-10, 7, torch.float16, 0), (1.0, -(2.0**-9), 300, torch.bfloat16, 300),
    (1.0, -(2.0**-8), 200, torch.bfloat16, 0), (0.5, 0.0, 9, torch.float32, 9), (0.5, 0.25, 0, torch.bfloat16, 0), (1.0, 0.0039063, 5, torch.bfloat16, 5)])
def test_swallowed_depends_on_the_type_the_sign_and_the_size(swallowed, weight, update, times, dtype, want):
    got = swallowed(weight, update, times, dtype)
    assert got == want, f"{times} additions of {update:g} to {weight:g} in {dtype}: {want} change nothing, you count {got} (both numbers are stored in that type first)"


# lora_in_disguise

def paths(alpha, ratio, optimizer, lr, steps=5):
    """W_eff of Delta-LoRA after some steps on a small regression, written out, and the same for plain LoRA of any alpha and rate."""
    x, target, W, A_0 = draw(30, 5, seed=1), draw(30, 4, seed=2), draw(4, 5, seed=3), draw(2, 5, seed=4)

    def run(alpha, ratio, lr):
        A, B, s = A_0.clone().requires_grad_(), torch.zeros(4, 2, dtype=torch.float64, requires_grad=True), alpha / 2
        step = optimizer([A, B], lr)
        for _ in range(steps):
            moved = ratio * s * (B @ A).detach()
            loss = (x @ (W + moved + s * B @ A).T - target).square().mean()
            step.zero_grad()
            loss.backward()
            step.step()
        return (W + (1 + ratio) * s * B @ A).detach()

    return run


@pytest.mark.parametrize("alpha, ratio", [(3.0, 0.5), (1.2, 2.0)])
def test_disguise_under_adam_and_sgd(lora_in_disguise, alpha, ratio):
    got = lora_in_disguise(alpha, ratio)
    assert isinstance(got, tuple) and len(got) == 2, "two numbers are wanted: LoRA's alpha, and the factor on SGD's learning rate"
    larger, factor = got
    assert not math.isclose(larger, ratio * alpha), "λ alone is what W has; LoRA's own branch is beside it: 1 + λ in all"
    for name, optimizer, lr, share in (("Adam", lambda p, lr: torch.optim.Adam(p, lr, eps=1e-30), 0.05, 1.0),
                                       ("SGD", torch.optim.SGD, 0.05, factor)):
        run = paths(alpha, ratio, optimizer, lr)
        delta, lora = run(alpha, ratio, lr), run(larger, 0.0, share * lr)
        worst = (delta - lora).abs().max().item()
        assert worst < 1e-9, (f"under {name} the two part by {worst:.2g} in five steps: W_eff = W_0 + (1 + λ) s B A says which alpha; "
                              + ("the gradient of A and B is 1 + λ times smaller than that LoRA's, once for the gradient" if name == "SGD" else "Adam needs no factor"))


# delta_lora_forward

@each_case
@pytest.mark.parametrize("lead", [(), (3,), (2, 6)])
def test_forward_multiplies_by_w_eff(delta_lora_forward, lead, out, into, rank, alpha, ratio):
    (W, A_K, B_K, A, B), s, x = factors(out, into, rank), alpha / rank, draw(*lead, into, seed=9)
    BA, old = x @ (B @ A).T, x @ (B_K @ A_K).T
    must_equal(delta_lora_forward(x, W, A_K, B_K, A, B, s, ratio), x @ W.T + s * ((1 + ratio) * BA - ratio * old), {
        "this is plain LoRA: W's own movement, λ s (B A - B_K A_K), is missing": x @ W.T + s * BA,
        "this is W's part alone: LoRA's branch is missing": x @ W.T + ratio * s * (BA - old),
        "the scale is missing in W's movement": x @ W.T + s * BA + ratio * (BA - old),
        "B_K A_K is not taken away": x @ W.T + s * (1 + ratio) * BA,
    }, f"delta_lora_forward on x of shape {(*lead, into)}")


@each_case
def test_forward_passes_the_gradient_through_loras_branch_alone(delta_lora_forward, out, into, rank, alpha, ratio):
    W, A_K, B_K, A, B = (t.requires_grad_() for t in factors(out, into, rank))
    s, x, G = alpha / rank, draw(4, into, seed=9).requires_grad_(), draw(4, out, seed=10)
    y = delta_lora_forward(x, W, A_K, B_K, A, B, s, ratio)
    assert y.requires_grad, "no gradient at all comes out: detach the factors in W's movement, not in LoRA's branch"
    y.backward(G)
    dB = s * G.T @ x @ A.T
    assert A.grad is not None and B.grad is not None, "A and B hear nothing: LoRA's branch s · B A has to carry their gradient"
    must_equal(B.grad, dB.detach(), {"B hears 1 + λ times too much: while it trains, W is a constant, so detach A and B in W's movement": (1 + ratio) * dB.detach(),
                                     "B hears from W's movement alone": ratio * dB.detach()}, "dL/dB")
    must_equal(A.grad, (s * B.T @ G.T @ x).detach(), {}, "dL/dA")
    for name, t in (("W_0", W), ("A_K", A_K), ("B_K", B_K)):
        assert t.grad is None, f"{name} receives a gradient: it is a constant, detach it"
    W_eff = W + s * ((1 + ratio) * B @ A - ratio * B_K @ A_K)
    must_equal(x.grad, (G @ W_eff).detach(), {"x is cut off from W's movement: detach the factors, not the product with x": (G @ (W + s * B @ A)).detach()}, "dL/dx")


def test_forward_makes_no_large_matrix(delta_lora_forward):
    out, into, rank = 1500, 1100, 2
    W, A_K, B_K, A, B = factors(out, into, rank)
    x = draw(3, into, seed=9)
    with Sizes() as made:
        delta_lora_forward(x, W, A_K, B_K, A, B, 1.5, 0.5)
    assert made.largest < out * into // 4, f"an (out, in) matrix was made, {made.largest:,} numbers: multiply x by the thin factors, one after the other"


# rank_of_the_change

@each_case
def test_rank_is_twice_loras(rank_of_the_change, out, into, rank, alpha, ratio):
    _, A_K, B_K, A, B = factors(out, into, rank)
    got, want = rank_of_the_change(A_K, B_K, A, B), min(2 * rank, out, into)
    assert isinstance(got, int), f"a whole number is wanted, got {type(got).__name__}"
    assert got != rank or rank == want, f"{rank} is LoRA's rank; two products of rank {rank}, with different rows and columns, make {want}"
    assert got == want, f"B A - B_K A_K of {out}x{into} at rank {rank} has rank {want}, got {got}"


@pytest.mark.parametrize("what, want", [("nothing moved", 0), ("half and twice", 0), ("all is zero", 0), ("B_K is zero", 3), ("only B moved", 3), ("one row moved", 1), ("one direction is tiny", 4), ("one direction is small", 6), ("all is small", 6), ("all is large", 6), ("A_K is zero", 3)])
def test_rank_where_the_factors_share_something(rank_of_the_change, what, want):
    _, A_K, B_K, A, B = factors(9, 11, 3)
    if what == "nothing moved":
        A, B = A_K.clone(), B_K.clone()
    elif what == "half and twice":
        A, B = A_K / 2, 2 * B_K                                     # other factors of the same product
    elif what == "all is zero":
        B, B_K = torch.zeros_like(B), torch.zeros_like(B_K)
    elif what == "B_K is zero":
        B_K = torch.zeros_like(B_K)
    elif what == "only B moved":
        A = A_K.clone()
    elif what == "one row moved":
        A, B = A_K.clone(), B_K.clone()
        A[1] += draw(11, seed=20)
    elif what == "one direction is tiny":
        B[:, 0], B_K[:, 0] = 1e-13 * B[:, 0], 0.0
    elif what == "one direction is small":
        B[:, 0] = 1e-7 * B[:, 0]
    elif what == "all is small":
        A, A_K, B, B_K = (1e-9 * t for t in (A, A_K, B, B_K))
    elif what == "all is large":
        A, A_K, B, B_K = (1e4 * t for t in (A, A_K, B, B_K))
        B[:, 0] = 1e-7 * B[:, 0]                                    # small beside the others, and no rounding
    elif what == "A_K is zero":
        A_K = torch.zeros_like(A_K)
        B_K[:, 1:] = 0.0                                            # B_K A would have rank 1
    got = rank_of_the_change(A_K, B_K, A, B)
    assert got == want, f"{what}: the rank of B A - B_K A_K is {want}, got {got} (a singular value counts above 1e-10 · ‖[B, B_K]‖ · ‖[A; A_K]‖)"


@pytest.mark.parametrize("second, want", [(2e-10, 2), (1e-10, 1)])
def test_rank_counts_from_1e_10_of_what_may_cancel(rank_of_the_change, second, want):
    A, B = torch.zeros(2, 5, dtype=torch.float64), torch.zeros(7, 2, dtype=torch.float64)
    A[0, 0], A[1, 1], B[0, 0], B[1, 1] = 1.0, second, 3.0, 3.0       # singular values 3 and 3 · second
    got = rank_of_the_change(torch.zeros_like(A), torch.zeros_like(B), A, B)
    assert got == want, f"singular values 3 and {3 * second:g}, and ‖[B, B_K]‖ · ‖[A; A_K]‖ = {18 ** 0.5:.2f}: {want} of them count, got {got}"


def test_rank_without_the_large_matrix(rank_of_the_change):
    _, A_K, B_K, A, B = (t if i else None for i, t in enumerate(factors(1500, 1100, 2)))
    with Sizes() as made:
        got = rank_of_the_change(A_K, B_K, A, B)
    assert made.largest < 1500 * 1100 // 4, f"an (out, in) matrix was made, {made.largest:,} numbers: [B, B_K] and [A; -A_K] are thin, and QR leaves a 4x4 core"
    assert got == 4


# as_plain_lora

@each_case
def test_plain_lora_says_the_same(as_plain_lora, out, into, rank, alpha, ratio):
    _, A_K, B_K, A, B = factors(out, into, rank)
    got = as_plain_lora(A_K, B_K, A, B, alpha, ratio)
    assert isinstance(got, tuple) and len(got) == 3, "three things are wanted: A₂, B₂, alpha₂"
    A_2, B_2, alpha_2 = got
    assert A_2.shape == (2 * rank, into) and B_2.shape == (out, 2 * rank), f"A₂ is (2 rank, in) and B₂ (out, 2 rank), got {tuple(A_2.shape)} and {tuple(B_2.shape)}"
    assert torch.equal(A_2[:rank], A) and torch.equal(A_2[rank:], A_K), "A₂ is A above A_K, both as they are"
    assert torch.equal(B_2[:, :rank], B), "B₂ begins with B itself: the factors go into alpha₂ and into the second half"
    assert not math.isclose(alpha_2, (1 + ratio) * alpha), "the new scale is alpha₂ / (2 rank): of twice the rank, so alpha₂ doubles too"
    s = alpha / rank
    must_equal(alpha_2 / (2 * rank) * B_2 @ A_2, s * ((1 + ratio) * B @ A - ratio * B_K @ A_K), {
        "the second half is added: B_K A_K has to be taken away": s * ((1 + ratio) * B @ A + ratio * B_K @ A_K),
        "B_K A_K is taken away 1 + λ times: the second half of B₂ needs the factor λ / (1 + λ)": s * (1 + ratio) * (B @ A - B_K @ A_K),
        "B_K A_K is taken away λ (1 + λ) times: alpha₂ has 1 + λ in it already, so the second half of B₂ needs λ / (1 + λ)": s * (1 + ratio) * (B @ A - ratio * B_K @ A_K),
    }, "alpha₂ / (2 rank) · B₂ A₂")


def test_plain_lora_on_a_whole_model_has_the_same_logits(as_plain_lora):
    """The triumph: a Delta-LoRA that W's own learning is part of, taken off as an ordinary LoRA file's contents, on a W that never moved."""
    torch.manual_seed(0)
    method = ml.DeltaLoRA(rank=2, alpha=3.0, delta_ratio=1.5, start_step=0)
    delta = ml.adapt(ml.TinyGPT(ml.GPTConfig(context=16, width=16, layers=1, heads=2)).double(), method)
    plain = ml.unload(ml.adapt(ml.TinyGPT(ml.GPTConfig(context=16, width=16, layers=1, heads=2)).double(), method))
    plain.load_state_dict({name.replace("base.", ""): t for name, t in delta.state_dict().items() if name.replace("base.", "") in plain.state_dict()})
    layers, ids = dict(ml.adapters(delta)), torch.randint(256, (2, 9), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        for i, layer in enumerate(layers.values()):
            layer.B.copy_(draw(*layer.B.shape, seed=i))
        method.before_step(delta, 0)                                     # step K: the snapshot is taken here
        for i, layer in enumerate(layers.values()):
            layer.A.add_(draw(*layer.A.shape, seed=50 + i))
    said = {name: as_plain_lora(layer.A_K, layer.B_K, layer.A.detach(), layer.B.detach(), 3.0, 1.5) for name, layer in layers.items()}
    ml.adapt(plain, ml.LoRA(rank=4, alpha=next(iter(said.values()))[2]))
    with torch.no_grad():
        for name, layer in ml.adapters(plain):
            layer.A.copy_(said[name][0])
            layer.B.copy_(said[name][1])
        worst = (plain(ids) - delta(ids)).abs().max().item()
    assert worst < 1e-9, f"the logits of the plain LoRA and of Delta-LoRA differ by {worst:.2g}"
