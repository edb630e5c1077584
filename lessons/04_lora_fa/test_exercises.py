"""What is true of a right answer to lesson 04."""

import itertools
import weakref

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

import minilora as ml
from lessons.expect import draw, must_equal
from minilora.evidence.ledger import bytes_alive

# bytes_formula

COMBINATIONS = [*itertools.product([False, True], repeat=2)]           # frozen_A, dropout


def bill_is(got, want, tokens, into, rank, size, frozen_A, dropout):
    """The likely mistake first."""
    x, z = tokens * into * size, tokens * rank * size
    bill = f"{tokens} tokens, in = {into}, rank {rank}, {size} bytes a number, A {'frozen' if frozen_A else 'trained'}, dropout {dropout}"
    right = (not frozen_A) * x + dropout * x + z
    for wrong, name in ((right - z, "x Aᵀ is missing: the gradient of B needs it, whatever A does"), (right - x * dropout, "the mask is missing: with dropout it is kept, and is as large as x"),
                        (right + x * frozen_A, "x is still kept: only the gradient of A asked for it, and A stands still"), (right - x * (not frozen_A), "x is missing: the gradient of A needs it"),
                        (right // size, "these are numbers, not bytes"), (right + rank * into * size, "A is a parameter, which is there anyway")):
        assert got != wrong or wrong == right, f"{name} ({bill}: got {got:,}, {right:,} is right)"
    assert got == want == right, f"{bill}: {right:,} bytes, got {got:,}"
    assert isinstance(got, int), f"an int is wanted, got {type(got).__name__} {got}"


@pytest.mark.parametrize("frozen_A, dropout, want", [(False, False, 2_113_536), (True, False, 16_384), (False, True, 4_210_688), (True, True, 2_113_536)])
def test_the_bill_of_a_layer_of_512_tokens_and_width_1024(bytes_formula, frozen_A, dropout, want):
    bill_is(bytes_formula(512, 1024, 8, 4, frozen_A, dropout), want, 512, 1024, 8, 4, frozen_A, dropout)


@pytest.mark.parametrize("frozen_A, dropout", COMBINATIONS)
@pytest.mark.parametrize("tokens, into, rank, dtype", [(11, 6, 2, torch.float32), (5, 9, 3, torch.float64)])
def test_the_bill_is_what_a_real_layer_keeps(bytes_formula, tokens, into, rank, dtype, frozen_A, dropout):
    method = (ml.LoRAFA if frozen_A else ml.LoRA)(rank=rank, dropout=0.25 if dropout else 0.0)
    layer = method.layer(nn.Linear(into, 4, dtype=dtype).requires_grad_(False))
    held = bytes_alive(layer, lambda: layer(torch.ones(tokens, into, dtype=dtype, requires_grad=True)))
    bill_is(bytes_formula(tokens, into, rank, dtype.itemsize, frozen_A, dropout), held, tokens, into, rank, dtype.itemsize, frozen_A, dropout)


# saved_bytes

def test_saved_is_what_a_product_keeps(saved_bytes):
    """The gradient of one side of a product is the other side: both are kept."""
    for n, dtype in ((7, torch.float32), (5, torch.float64)):
        a, b = (torch.ones(n, n, dtype=dtype, requires_grad=True) for _ in range(2))
        got, want = saved_bytes(lambda: (a @ b).sum(), []), 2 * n * n * dtype.itemsize
        assert got != want // dtype.itemsize and got != n * n * 2 * 4 or got == want, f"bytes, not numbers, and a {dtype} has {dtype.itemsize} of them: {want}, got {got}"
        assert got == want, f"a @ b keeps a and b for backward, two tensors of equal size and values: {want} bytes, got {got}"
        assert isinstance(got, int), f"an int is wanted, got {type(got).__name__} {got}"


def test_saved_leaves_parameters_out(saved_bytes):
    for into, out, tokens in ((6, 3, 5), (2, 9, 4)):
        linear, x = nn.Linear(into, out), torch.ones(tokens, into, requires_grad=True)
        got, x_bytes, W_bytes = saved_bytes(lambda: linear(x), linear.parameters()), tokens * into * 4, out * into * 4
        assert got != x_bytes + W_bytes, "W was counted: it is a parameter, kept as W or as its view Wᵀ, and there anyway: compare storages"
        assert got == x_bytes, f"for the gradient of W the layer keeps x, {x_bytes} bytes, got {got}"
        assert saved_bytes(lambda: linear(x), []) == x_bytes + W_bytes, "only the storages of `parameters` are left out; where it is empty, W counts too"
        assert saved_bytes(lambda: linear(x), [x]) == W_bytes, "only the storages of `parameters` are left out; here that is x, and W counts"
        assert saved_bytes(lambda: linear(x), [linear.weight[1:]]) == x_bytes, "a parameter may be a part of a storage, and all of that is there anyway: compare storages on both sides"


def test_saved_counts_a_storage_once_and_whole(saved_bytes):
    x = torch.ones(6, 8, requires_grad=True)
    q, k, v = (nn.Linear(8, out) for out in (3, 3, 5))
    got = saved_bytes(lambda: torch.cat([q(x), k(x), v(x)], dim=1), [*q.parameters(), *k.parameters(), *v.parameters()])
    assert got != 3 * 6 * 8 * 4, "one x was counted three times: three layers read it, and it lies in memory once: compare data_ptr()"
    assert got == 6 * 8 * 4, f"three layers keep one x of {6 * 8 * 4} bytes, got {got}"
    large = torch.ones(10, 8)
    part, w = large[2:4], torch.ones(8, requires_grad=True)
    got = saved_bytes(lambda: part * w, [w])
    assert got != 2 * 8 * 4, "a view of two rows keeps all ten alive: ask untyped_storage().nbytes(), not the tensor's own size"
    assert got == 10 * 8 * 4, f"two of ten rows keep the storage of all ten, {10 * 8 * 4} bytes, got {got}"
    rows = torch.ones(2, 8)
    got = saved_bytes(lambda: (rows[0] * w) + (rows[1] * w), [w])
    assert got == 2 * 8 * 4, f"two rows of one storage, which lies there once: {2 * 8 * 4} bytes, got {got}: compare storages, not tensors"


def test_saved_is_nothing_where_nothing_is_trained(saved_bytes):
    linear = nn.Linear(6, 3).requires_grad_(False)
    assert saved_bytes(lambda: linear(torch.ones(4, 6)), linear.parameters()) == 0, "no gradient is wanted of anything, so nothing is kept"


def test_saved_runs_once_and_lets_backward_go_on(saved_bytes):
    runs, x = [], torch.full((3,), 2.0, requires_grad=True)

    def run():
        runs.append((x**3).sum())
        return runs[-1]

    saved_bytes(run, [])
    assert len(runs) == 1, f"run() is called once, not {len(runs)} times: it may be a long one"
    runs[0].backward()
    assert torch.equal(x.grad, torch.full((3,), 12.0)), "what the second hook gives back is what backward works with: it must be the tensor that was put aside"


def test_saved_agrees_with_the_ledger_on_a_whole_model(saved_bytes):
    for rank, method in ((2, ml.LoRA), (3, ml.LoRAFA)):
        torch.manual_seed(0)
        model = ml.adapt(ml.TinyGPT(ml.GPTConfig(context=12, width=16, layers=2, heads=2)), method(rank=rank))
        ids = torch.arange(24).view(2, 12)
        want, got = bytes_alive(model, lambda: model(ids)), saved_bytes(lambda: model(ids), model.parameters())
        assert got == want, f"a small GPT under {method.__name__} keeps {want:,} bytes for backward, got {got:,}"


# LoRAFAFunction and SeededDropoutFunction

SIZES = [(7, 5, 2, 0.75), (4, 9, 3, 2.5)]                               # out, in, rank, scale
SHAPES = [(), (6,), (2, 3)]


def given(out, into, rank, rows=(6,), dtype=torch.float64):
    """x, A, B, and a gradient from above."""
    return tuple(draw(*shape, seed=seed, dtype=dtype) for seed, shape in enumerate([(*rows, into), (rank, into), (out, rank), (*rows, out)], start=3))


def kept_of(function, x, A, B, *rest):
    """{name or shape: bytes} of what the result holds for backward, A and B left out: by the hook, and what was hung on ctx past it."""
    seen = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: seen.append(tensor) or tensor, lambda tensor: tensor):
        y = function.apply(x, A, B, *rest)
    hung = [name for name, value in getattr(y.grad_fn, "__dict__", {}).items()
            if any(isinstance(part, torch.Tensor) and part.numel() > 1 for part in (value if isinstance(value, (list, tuple)) else [value]))]
    assert not hung, f"ctx.{hung[0]} is a tensor past the books: use ctx.save_for_backward, which autograd watches over"
    there = {t.untyped_storage().data_ptr() for t in (A, B)}
    storages = {t.untyped_storage().data_ptr(): (tuple(t.shape), t.untyped_storage().nbytes()) for t in seen}
    return {shape: size for place, (shape, size) in storages.items() if place not in there}


def backward_of(function, x, A, B, g, *rest):
    """(result, dL/dx, dL/dA, dL/dB), A asking for a gradient too."""
    leaves = [t.detach().clone().requires_grad_() for t in (x, A, B)]
    before = [t.detach().clone() for t in (*leaves, g)]
    y = function.apply(*leaves, *rest)
    assert y.requires_grad, "no gradient can flow: the result must come from apply, with no detach()"
    y.backward(g)
    for name, now, was in zip(("x", "A", "B", "g"), (*leaves, g), before):
        assert torch.equal(now, was), f"{name} was changed in place: work on a copy"
    return y.detach(), *(t.grad for t in leaves)


def formed(function, x, A, B, g, *rest):
    """The largest tensor that forward and backward make."""
    sizes = []

    class Watch(TorchFunctionMode):
        def __torch_function__(self, operation, types, args=(), kwargs=None):
            result = operation(*args, **(kwargs or {}))
            sizes.extend(t.numel() for t in (result if isinstance(result, (tuple, list)) else [result]) if isinstance(t, torch.Tensor))
            return result

    with Watch():
        y = function.apply(x.requires_grad_(), A, B.requires_grad_(), *rest)
        with torch.no_grad():
            function.backward(y.grad_fn, g)                             # called by hand: the engine would hide it from the watch
    return max(sizes)


@pytest.mark.parametrize("rows", SHAPES)
@pytest.mark.parametrize("out, into, rank, scale", SIZES)
def test_the_frozen_branch_says_what_loras_does(LoRAFAFunction, out, into, rank, scale, rows):
    x, A, B, g = given(out, into, rank, rows)
    plain = x @ (B @ A).T
    must_equal(LoRAFAFunction.apply(x, A, B, scale), scale * plain, {"the scale is missing": plain, "the scale is squared": scale**2 * plain}, f"the result, x of shape {tuple(x.shape)}")


@pytest.mark.parametrize("rows", SHAPES)
@pytest.mark.parametrize("out, into, rank, scale", SIZES)
def test_the_frozen_branch_gives_x_and_B_their_gradients(LoRAFAFunction, out, into, rank, scale, rows):
    x, A, B, g = given(out, into, rank, rows)
    _, dx, dA, dB = backward_of(LoRAFAFunction, x, A, B, g, scale)
    rows_of_g, rows_of_x = g.reshape(-1, out), x.reshape(-1, into)
    assert dx is not None, "dL/dx is None: the layers below would learn nothing"
    plain_x, plain_B = g @ (B @ A), rows_of_g.T @ (rows_of_x @ A.T)
    must_equal(dx, scale * plain_x, {"the scale is missing in dL/dx": plain_x, "the scale is squared in dL/dx": scale**2 * plain_x}, "dL/dx")
    assert dB is not None, "dL/dB is None: nothing would be trained"
    tokens = len(rows_of_g)
    several = {"dL/dB is the sum over all tokens, not their mean": scale * plain_B / tokens,
               "the first token only: dL/dB is the sum over all": scale * rows_of_g[:1].T @ (rows_of_x[:1] @ A.T)} if tokens > 1 else {}
    must_equal(dB, scale * plain_B, {"the scale is missing in dL/dB": plain_B, "the scale is squared in dL/dB": scale**2 * plain_B} | several, "dL/dB")
    assert dA is None, "A stands still: None is wanted in its place, not a gradient, even where A asks for one"


def test_the_frozen_branch_keeps_x_A_and_not_x(LoRAFAFunction):
    for tokens, into, rank, out in ((512, 1024, 8, 64), (6, 9, 3, 5)):
        x, A, B, g = given(out, into, rank, (tokens,), torch.float32)
        x.requires_grad_(), B.requires_grad_()
        kept = kept_of(LoRAFAFunction, x, A, B, 0.75)
        x_bytes, z_bytes = tokens * into * 4, tokens * rank * 4
        assert (tokens, into) not in kept, f"x is kept, {x_bytes:,} bytes: no gradient here needs it, x Aᵀ is enough"
        assert sum(kept.values()) == z_bytes, f"x Aᵀ is {z_bytes:,} bytes, and {sum(kept.values()):,} are kept, of the shapes {[*kept]}"


def test_the_frozen_branch_lets_go_of_x(LoRAFAFunction):
    """Not by the books but by the tensor itself: is it dead when nobody else holds it?"""
    x, A, B, _ = given(7, 5, 2)
    held = weakref.ref(x)
    y = LoRAFAFunction.apply(x, A, B.requires_grad_(), 0.75)
    del x
    assert held() is None and y.requires_grad, "x is still held somewhere, past save_for_backward: a list, a closure, an attribute?"


def test_the_frozen_branch_never_forms_the_large_matrix(LoRAFAFunction):
    out, into = 300, 200
    x, A, B, g = given(out, into, 2, (4,))
    largest = formed(LoRAFAFunction, x, A, B, g, 0.75)
    assert largest < out * into, "a matrix of out · in numbers was formed, B A or dL/dW: let the tokens meet the thin side first, (g B) A"


def test_the_frozen_branch_keeps_the_dtype(LoRAFAFunction):
    x, A, B, g = given(7, 5, 2, dtype=torch.float32)
    y, dx, _, dB = backward_of(LoRAFAFunction, x, A, B, g, 0.75)
    assert {y.dtype, dx.dtype, dB.dtype} == {torch.float32}, f"float32 goes in, {y.dtype}, {dx.dtype} and {dB.dtype} came out"


def test_the_frozen_branch_trains_in_a_model_as_minilora_does(LoRAFAFunction):
    """Two layers, five steps: the same B as ml.LoRAFA's, to the last digits."""
    torch.manual_seed(0)
    method = ml.LoRAFA(rank=2, alpha=3.0)
    model = ml.adapt(nn.Sequential(nn.Linear(5, 7), nn.GELU(), nn.Linear(7, 4)).double(), method, ["0", "2"])
    layers = [layer for _, layer in ml.adapters(model)]
    Bs = [layer.B.detach().clone().requires_grad_() for layer in layers]
    x, target = draw(9, 5), draw(9, 4, seed=1)
    for _ in range(5):
        h = x
        for layer, B in zip(layers, Bs):
            h = layer.base(h) + LoRAFAFunction.apply(h, layer.A, B, method.scale)
            h = nn.functional.gelu(h) if layer is layers[0] else h
        for params, y in (([layer.B for layer in layers], model(x)), (Bs, h)):
            (y - target).square().mean().backward()
            with torch.no_grad():
                for B in params:
                    B -= 0.5 * B.grad
                    B.grad = None
    assert all(B.any() for B in Bs), "after five steps B is still zero: no gradient reaches it"
    off = max((B - layer.B).abs().max().item() for B, layer in zip(Bs, layers))
    assert off < 1e-9, f"after five steps B is {off:.2g} away from that of ml.LoRAFA"


# bytes_freed

READS = {"q": "x", "k": "x", "v": "x", "o": "mixed", "up": "h", "down": "wide"}
BYTES = {"x": 100, "mixed": 70, "h": 30, "wide": 400}


@pytest.mark.parametrize("frozen, elsewhere, want, why", [
    ({"up"}, set(), 30, "only up read h"),
    ({"up", "down"}, set(), 430, "two inputs, each read by one layer"),
    ({"q", "k", "v"}, set(), 100, "q, k and v read one x, which lies there once"),
    ({"q", "k"}, set(), 0, "v's A is still trained, and it needs the same x"),
    ({"q", "v", "down"}, set(), 400, "k's A is still trained, and it needs the x that q and v let go"),
    ({"o"}, {"mixed"}, 0, "attention keeps its output whatever o_proj does"),
    (set(READS), {"mixed"}, 530, "x, h and wide; mixed is kept by attention"),
    (set(READS), {"mixed", "x", "h", "wide"}, 0, "all four are kept elsewhere"),
    (set(READS), set(), 600, "all four inputs, each once"),
    (set(), {"mixed"}, 0, "no A stands still"),
])
def test_what_is_freed_without_dropout(bytes_freed, frozen, elsewhere, want, why):
    got = bytes_freed(READS, BYTES, frozen, elsewhere, False)
    per_layer = sum(BYTES[READS[layer]] for layer in frozen)
    assert got == want or got != per_layer, f"each layer was asked by itself, as a formula for one layer does: {why}. {want} is wanted, got {got}"
    assert got == want, f"A frozen in {sorted(frozen)}, kept elsewhere {sorted(elsewhere)}: {why}. {want} is wanted, got {got}"


@pytest.mark.parametrize("frozen, want", [({"q"}, 100), ({"q", "k", "v"}, 300), (set(READS), 800), ({"o", "down"}, 470), (set(), 0)])
def test_what_is_freed_with_dropout(bytes_freed, frozen, want):
    got, once = bytes_freed(READS, BYTES, frozen, {"mixed"}, True), bytes_freed(READS, BYTES, frozen, {"mixed"}, False)
    assert got == want or got != once, f"with dropout each layer has a dropped x of its own, shared with nobody and kept by nobody else: {want}, got {got}"
    assert got == want, f"A frozen in {sorted(frozen)}: their dropped inputs, one each, {want} bytes, got {got}"


@pytest.mark.parametrize("reads, sizes, frozen, elsewhere, want", [
    ({}, {}, set(), set(), 0), ({"a": "x"}, {"x": 8, "unread": 50}, {"a"}, set(), 8), ({"a": "x", "b": "y", "c": "y"}, {"x": 16, "y": 5}, {"a", "c"}, {"unread"}, 16)])
def test_what_is_freed_elsewhere_than_in_a_gpt(bytes_freed, reads, sizes, frozen, elsewhere, want):
    for dropout in (False, True):
        now = want if not dropout else sum(sizes[reads[layer]] for layer in frozen)
        got = bytes_freed(reads, sizes, frozen, elsewhere, dropout)
        assert got == now, f"reads {reads}, sizes {sizes}, frozen {sorted(frozen)}, dropout {dropout}: {now} is wanted, got {got}"


@pytest.mark.parametrize("dropout", [0.0, 0.25])
def test_what_is_freed_is_what_a_real_model_lets_go(bytes_freed, dropout):
    """A small GPT, the A of some layers frozen after the other; each time the bytes alive are measured."""
    torch.manual_seed(0)
    model = ml.adapt(ml.TinyGPT(ml.GPTConfig(context=12, width=16, layers=2, heads=2)), ml.LoRA(rank=2, dropout=dropout)).train()
    layers, ids, tokens = dict(ml.adapters(model)), torch.arange(24).view(2, 12), 24
    reads, sizes, elsewhere = {}, {}, set()
    for name, layer in layers.items():
        block, _, kind = name.rpartition(".")
        x = f"{block}'s " + {"o_proj": "mixed", "up_proj": "h", "down_proj": "wide"}.get(kind, "x")
        reads[name], sizes[x] = x, tokens * layer.in_features * 4
        elsewhere |= {x} if kind == "o_proj" else set()
    before, frozen = bytes_alive(model, lambda: model(ids)), set()
    for kinds in (("q_proj", "o_proj"), ("down_proj", "v_proj"), ("k_proj", "up_proj")):
        for name, layer in layers.items():
            if name.endswith(kinds):
                layer.A.requires_grad_(False)
                frozen.add(name)
        want = before - bytes_alive(model, lambda: model(ids))
        got = bytes_freed(reads, sizes, set(frozen), elsewhere, dropout > 0)
        kinds = sorted({name.rpartition(".")[2] for name in frozen})
        assert got == want, f"a GPT of 2 blocks, dropout {dropout}, A frozen in {', '.join(kinds)}: it lets {want:,} bytes go, the answer says {got:,}"


def test_the_audit_leaves_its_arguments_alone(bytes_freed):
    reads, sizes, frozen, elsewhere = dict(READS), dict(BYTES), {"q", "up"}, {"mixed"}
    for dropout in (False, True):
        bytes_freed(reads, sizes, frozen, elsewhere, dropout)
        assert (reads, sizes, frozen, elsewhere) == (READS, BYTES, {"q", "up"}, {"mixed"}), "an argument was changed: work on a copy"


# project_gradient

@pytest.mark.parametrize("out, into, rank, scale", SIZES)
def test_the_projected_gradient_by_the_formula(project_gradient, out, into, rank, scale):
    _, A, g, _ = given(out, into, rank)                                  # B's shape is its gradient's
    inverse = torch.linalg.inv(A @ A.T)
    must_equal(project_gradient(g, A, scale), g @ inverse / scale**2, {
        "A Aᵀ where its inverse is wanted": g @ (A @ A.T) / scale**2, "divided by scale, not by its square: one is in g, one in s · B A": g @ inverse / scale,
        "the scale is missing: divide by its square": g @ inverse, "multiplied by scale² instead of divided": g @ inverse * scale**2,
        "this is g / scale²: (A Aᵀ)⁺ is missing": g / scale**2,
        "(A Aᵀ)⁺ is wanted, without a root": g @ torch.linalg.inv(torch.linalg.cholesky(A @ A.T)) / scale**2,
    }, "ĝ")


@pytest.mark.parametrize("out, into, rank, scale", SIZES)
def test_a_projected_step_moves_W_as_the_full_gradient_would(project_gradient, out, into, rank, scale):
    """s · ĝ A = G P: the two agree on everything that A can see, and what it cannot see stays."""
    G, A = draw(out, into, seed=1), draw(rank, into, seed=2)
    step = scale * project_gradient(scale * G @ A.T, A, scale) @ A
    seen, unseen = A.T, torch.linalg.svd(A).Vh[rank:].T
    assert torch.allclose(step @ seen, G @ seen, atol=1e-9), f"along the rows of A the step must be the full gradient's: off by up to {(step @ seen - G @ seen).abs().max():.3g}"
    assert torch.allclose(step @ unseen, torch.zeros_like(G @ unseen), atol=1e-9), "across the rows of A the step must be zero"


@pytest.mark.parametrize("dtype, limit", [(torch.float64, 1e-9), (torch.float32, 1e-4)])
def test_rows_of_A_may_depend_on_each_other(project_gradient, dtype, limit):
    G, A = draw(4, 9, seed=1, dtype=dtype), draw(3, 9, seed=2, dtype=dtype)
    A[2] = A[0]
    try:
        got = project_gradient(0.75 * G @ A.T, A, 0.75)
    except torch.linalg.LinAlgError:                                    # a RuntimeError, but so is a stub's NotImplementedError
        pytest.fail("two rows of A are alike, and A Aᵀ has no inverse: take the pseudo-inverse, torch.linalg.pinv")
    independent = A[:2]
    want = G @ independent.T @ torch.linalg.inv(independent @ independent.T) @ independent
    off = (0.75 * got @ A - want).abs().max().item()
    assert off < limit, f"two rows of A are alike, and A Aᵀ has no inverse: take the pseudo-inverse; the step is off by up to {off:.3g}"
    assert got.dtype == dtype, f"{dtype} goes in, {got.dtype} came out"


def test_the_projection_is_minilora_s(project_gradient):
    for rank, alpha in ((2, 3.0), (3, 1.5)):
        torch.manual_seed(0)
        method = ml.LoRAFA(rank=rank, alpha=alpha, projection=True)
        model = ml.adapt(nn.Sequential(nn.Linear(6, 5)).double(), method, ["0"])
        model(draw(7, 6)).square().sum().backward()
        g = model[0].B.grad.clone()
        method.before_step(model, 0)
        off = (project_gradient(g, model[0].A.detach(), method.scale) - model[0].B.grad).abs().max().item()
        assert off < 1e-9, f"rank {rank}, alpha {alpha}: off by up to {off:.3g} from what ml.LoRAFA(projection=True) gives the optimizer"


def test_the_gradient_given_is_not_overwritten(project_gradient):
    _, A, g, _ = given(7, 5, 2)
    before = g.clone(), A.clone()
    project_gradient(g, A, 0.75)
    assert torch.equal(g, before[0]) and torch.equal(A, before[1]), "g or A was changed in place: work on a copy"


# row_space

@pytest.mark.parametrize("out, into, rank", [(7, 5, 2), (4, 9, 3), (3, 8, 1)])
def test_what_A_sees_of_G(row_space, out, into, rank):
    G, A = draw(out, into, seed=1), draw(rank, into, seed=2)
    answer = row_space(G, A)
    assert isinstance(answer, tuple) and len(answer) == 2, "two things are wanted: G P, and the share"
    got, share = answer
    Q = torch.linalg.qr(A.T).Q                                           # (in, rank), orthonormal
    want = G @ Q @ Q.T
    must_equal(got, want, {
        "the inverse of A Aᵀ is missing: A's rows are neither of length 1 nor at right angles": G @ A.T @ A,
        "this is what A does not see, G - G P": G - want, "this is P itself: what it leaves of G is wanted": Q @ Q.T,
    }, "G P")
    assert isinstance(share, float), f"the share is a Python float, got {type(share).__name__}: use .item()"
    right = (want.norm() / G.norm()).item() ** 2
    for wrong, name in ((right**0.5, "the share is of squares: ‖G P‖² / ‖G‖², no root"), (1 - right, "this is the share that is lost"), (1 / right, "‖G P‖² goes above, ‖G‖² below"),
                        ((want.abs().sum() / G.abs().sum()).item(), "‖·‖² is a sum of squares, not of absolute values"), (right**2, "the share is squared once too often")):
        assert abs(share - wrong) > 1e-9, f"{name}; got {share:.4f}"
    assert abs(share - right) < 1e-9, f"‖G P‖² / ‖G‖² is {right:.6f}, got {share:.6f}"


def test_what_A_sees_twice_it_sees_once(row_space):
    G, A = draw(4, 9, seed=1), draw(3, 9, seed=2)
    once = row_space(G, A)[0]
    twice, share = row_space(once, A)
    must_equal(twice, once, {}, "P P is P: G P projected again")
    assert abs(share - 1.0) < 1e-9, f"of what lies in the row space A sees everything: a share of 1, got {share:.6f}"


def test_what_A_sees_does_not_depend_on_the_length_of_its_rows(row_space):
    G, A = draw(4, 9, seed=1), draw(3, 9, seed=2)
    mixed = draw(3, 3, seed=4) @ A * 7.5                                 # other rows, the same space
    must_equal(row_space(G, mixed)[0], row_space(G, A)[0], {}, "other rows that span the same space see the same")


def test_an_A_of_full_rank_sees_everything(row_space):
    for n in (4, 6):
        G, A = draw(3, n, seed=1), draw(n, n, seed=2)
        got, share = row_space(G, A)
        must_equal(got, G, {}, f"rank {n} of {n} inputs: G itself", rtol=1e-6, atol=1e-8)
        assert abs(share - 1) < 1e-8, f"rank {n} of {n} inputs is all of it: a share of 1, got {share:.6f}"


# SeededDropoutFunction

def mask_of(function, shape, p, seed, dtype=torch.float64):
    """What dropped(x) is where x is all ones: A and B are the identity."""
    eye = torch.eye(shape[-1], dtype=dtype)
    return function.apply(torch.ones(shape, dtype=dtype), eye, eye, 1.0, p, seed)


@pytest.mark.parametrize("p", [0.25, 0.8])
def test_the_mask_drops_a_share_p_and_makes_up_for_it(SeededDropoutFunction, p):
    mask = mask_of(SeededDropoutFunction, (400, 50), p, 3)
    values = mask.unique()
    assert len(values) == 2 and values[0] == 0, f"each number is dropped or kept: two values, 0 and 1 / (1 - p), got {len(values)} values from {values[0]:.3f} to {values[-1]:.3f}"
    dropped = (mask == 0).double().mean().item()
    assert abs(dropped - (1 - p)) > 0.02, f"p is the probability to be dropped, not to be kept: of p = {p}, a share of {dropped:.3f} was dropped"
    assert abs(dropped - p) < 0.02, f"a share of p = {p} is dropped, here {dropped:.3f}"
    kept = values[1].item()
    assert abs(kept - 1) > 1e-9, "what is kept is divided by 1 - p, or the branch gets weaker"
    assert abs(kept - 1 / (1 - p)) < 1e-9, f"what is kept is divided by 1 - p: {1 / (1 - p):.3f} is wanted, got {kept:.3f}"
    by_row = (mask == 0).double().mean(1)
    assert by_row.std() < 0.2, "each number has its own throw of the dice, not each row"
    assert (mask == 0).double().mean(0).std() < 0.1, "each number has its own throw of the dice, not each column"


def test_nothing_is_dropped_at_p_zero(SeededDropoutFunction):
    x, A, B, g = given(7, 5, 2)
    y, dx, _, dB = backward_of(SeededDropoutFunction, x, A, B, g, 0.75, 0.0, 1)
    must_equal(y, 0.75 * x @ A.T @ B.T, {}, "p = 0: the branch without dropout")
    must_equal(dx, 0.75 * g @ B @ A, {}, "p = 0: dL/dx without dropout")
    must_equal(dB, 0.75 * g.T @ (x @ A.T), {}, "p = 0: dL/dB without dropout")


def test_the_seed_decides_and_nothing_else_does(SeededDropoutFunction):
    x, A, B, _ = given(7, 50, 2)
    state = torch.get_rng_state()
    one = SeededDropoutFunction.apply(x, A, B, 0.75, 0.5, 11)
    assert torch.equal(torch.get_rng_state(), state), "torch's common dice were thrown: draw with a torch.Generator of your own"
    torch.manual_seed(4)
    again, other = (SeededDropoutFunction.apply(x, A, B, 0.75, 0.5, seed) for seed in (11, 12))
    torch.set_rng_state(state)
    assert torch.equal(one, again), "one seed, two masks: forward and backward would not agree"
    assert not torch.equal(one, other), "another seed must give another mask"


@pytest.mark.parametrize("rows", SHAPES)
@pytest.mark.parametrize("out, into, rank, scale", SIZES)
def test_forward_and_backward_drop_the_same(SeededDropoutFunction, out, into, rank, scale, rows):
    x, A, B, g = given(out, into, rank, rows)
    p, seed = 0.4, 5
    mask = mask_of(SeededDropoutFunction, tuple(x.shape), p, seed)
    must_be_the_gradients_of(SeededDropoutFunction, x, A, B, g, scale, p, seed, mask)


def must_be_the_gradients_of(function, x, A, B, g, scale, p, seed, mask):
    dropped, out, into = x * mask, B.shape[0], A.shape[1]
    y, dx, dA, dB = backward_of(function, x, A, B, g, scale, p, seed)
    must_equal(y, scale * dropped @ A.T @ B.T, {"the scale is missing": dropped @ A.T @ B.T, "nothing is dropped": scale * x @ A.T @ B.T}, "the result")
    assert dx is not None and dB is not None, "dL/dx or dL/dB is None: both are wanted"
    back = scale * g @ B @ A
    must_equal(dx, back * mask, {"dL/dx: what was dropped gets no gradient, so it goes through the mask too": back, "the scale is missing in dL/dx": g @ B @ A * mask,
                                 "dL/dx: the mask is there, but not the 1 / (1 - p)": back * mask * (1 - p)},
               "dL/dx, through the mask of forward: is the same one drawn in backward, whatever the layout of x?")
    rows_of = g.reshape(-1, out).T
    plain = rows_of @ (dropped.reshape(-1, into) @ A.T)
    must_equal(dB, scale * plain, {"the scale is missing in dL/dB": plain, "dL/dB is made from x, not from dropped x": scale * rows_of @ (x.reshape(-1, into) @ A.T)}, "dL/dB")
    assert dA is None, "A stands still: None is wanted in its place, not a gradient, even where A asks for one"


def test_an_x_that_is_not_contiguous_gets_the_same_mask_twice(SeededDropoutFunction):
    _, A, B, g = given(4, 9, 3)
    x = draw(9, 6, seed=3).T                                             # (6, 9), and its columns lie together
    assert not x.is_contiguous()
    eye = torch.eye(9, dtype=torch.float64)
    mask = SeededDropoutFunction.apply(torch.ones(9, 6, dtype=torch.float64).T, eye, eye, 1.0, 0.4, 5)
    leaf = x.detach().requires_grad_()                                   # not cloned: a clone may lie in another order
    SeededDropoutFunction.apply(leaf, A, B, 0.75, 0.4, 5).backward(g)
    must_equal(leaf.grad, 0.75 * g @ B @ A * mask, {"dL/dx: what was dropped gets no gradient, so it goes through the mask too": 0.75 * g @ B @ A},
               "x is a transposed matrix: the mask must follow its shape, not how it lies in memory; torch.empty_like follows the memory")


def test_the_seed_is_kept_and_not_the_mask(SeededDropoutFunction):
    for tokens, into, rank, out in ((512, 1024, 8, 64), (6, 9, 3, 5)):
        x, A, B, g = given(out, into, rank, (tokens,), torch.float32)
        x.requires_grad_(), B.requires_grad_()
        kept = kept_of(SeededDropoutFunction, x, A, B, 0.75, 0.1, 2)
        large, z_bytes = tokens * into * 4, tokens * rank * 4
        assert (tokens, into) not in kept, f"x, dropped x or the mask is kept, up to {large:,} bytes: keep dropped(x) Aᵀ, and draw the mask anew from the seed"
        assert sum(kept.values()) == z_bytes, f"dropped(x) Aᵀ is {z_bytes:,} bytes, and {sum(kept.values()):,} are kept, of the shapes {[*kept]}"


def test_the_seeded_branch_never_forms_the_large_matrix(SeededDropoutFunction):
    out, into = 300, 200
    x, A, B, g = given(out, into, 2, (4,))
    largest = formed(SeededDropoutFunction, x, A, B, g, 0.75, 0.25, 1)
    assert largest < out * into, "a matrix of out · in numbers was formed, B A or dL/dW: let the tokens meet the thin side first"


def test_the_seeded_branch_keeps_the_dtype(SeededDropoutFunction):
    x, A, B, g = given(7, 5, 2, dtype=torch.float32)
    y, dx, _, dB = backward_of(SeededDropoutFunction, x, A, B, g, 0.75, 0.25, 1)
    assert {y.dtype, dx.dtype, dB.dtype} == {torch.float32}, f"float32 goes in, {y.dtype}, {dx.dtype} and {dB.dtype} came out"


def test_the_gain_is_won_back(SeededDropoutFunction):
    """One layer, 512 tokens of width 1024: ml.LoRAFA behind dropout keeps 2,113,536 bytes, the seeded branch 16,384."""
    layer = ml.LoRAFA(rank=8, dropout=0.1).layer(nn.Linear(1024, 64).requires_grad_(False))
    x = draw(512, 1024, dtype=torch.float32).requires_grad_()
    naive = bytes_alive(layer, lambda: layer(x))
    seeded = bytes_alive(layer, lambda: layer.base(x) + SeededDropoutFunction.apply(x, layer.A, layer.B, layer.scale, 0.1, 2))
    assert naive == 129 * seeded, f"behind dropout ml.LoRAFA keeps {naive:,} bytes; a seed makes it {naive // 129:,}, 129 times less; here {seeded:,} are kept"
