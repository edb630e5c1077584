"""What is true of a right answer to lesson 05. Two sizes for every dimension, ranks below and above the width, vectors that are not zero."""

import math

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import minilora as ml
from lessons.expect import Sizes, draw, must_equal

CASES = [(7, 5, 2), (4, 9, 3), (3, 4, 11)]                              # out, in, rank: in the last one rank is more than both
LEADS = [(), (3,), (2, 6)]
each_case = pytest.mark.parametrize("out, into, rank", CASES)
each_lead = pytest.mark.parametrize("lead", LEADS)

LLAMA = ([(4096, 4096)] * 4 + [(11008, 4096)] * 2 + [(4096, 11008)]) * 32    # q k v o, gate up, down


def layer(out, into, rank):
    """W, A, B, b, d."""
    shapes = (out, into), (rank, into), (out, rank), (out,), (rank,)
    return tuple(draw(*shape, seed=seed) for seed, shape in enumerate(shapes))


# vera_count

@pytest.mark.parametrize("shapes, rank, want", [
    ([(768, 768)] * 24, 1024, 43_008),                                      # RoBERTa-base, q and v
    ([(1024, 1024)] * 48, 256, 61_440),                                     # RoBERTa-large, q and v
    (LLAMA, 1024, 1_589_248), (LLAMA, 256, 1_417_216),
    ([(7, 5)], 3, 10), ([(5, 7), (2, 9)], 4, 15), ([], 6, 0)])
def test_vera_trains_rank_plus_out_a_layer(vera_count, shapes, rank, want):
    got = vera_count(shapes, rank)
    assert isinstance(got, int), f"a whole number is wanted, got {type(got).__name__}"
    mistakes = {
        "this is LoRA's count: in VeRA A and B are frozen, only d and b train": sum(rank * (out + into) for out, into in shapes),
        "this adds the input's width: b is as long as the layer's output": sum(rank + into for _, into in shapes),
        "d is counted once, but every layer has a d of its own": rank + sum(out for out, _ in shapes),
        "d is missing: rank numbers a layer": sum(out for out, _ in shapes),
        "the shared A and B are counted; they are frozen": want + rank * sum(max(side) for side in zip(*shapes)),
    }
    for name, wrong in mistakes.items():
        assert got == want or got != wrong, f"{name}: {got:,} where {want:,} is wanted"
    assert got == want, f"{len(shapes)} layers, rank {rank}: {want:,} is wanted, got {got:,}"


# vera_forward

@each_case
@each_lead
def test_vera_adds_a_random_update_scaled_on_both_sides(vera_forward, lead, out, into, rank):
    (W, A, B, b, d), x = layer(out, into, rank), draw(*lead, into, seed=9)
    z = x @ A.T
    must_equal(vera_forward(x, W, A, B, b, d), x @ (W + torch.diag(b) @ B @ torch.diag(d) @ A).T, {
        "this is the branch alone: x Wᵀ is missing": b * ((d * z) @ B.T),
        "d is missing: x Aᵀ has rank numbers, and d scales each": x @ W.T + b * (z @ B.T),
        "b is missing: it scales each output of the branch": x @ W.T + (d * z) @ B.T,
        "b scales W's output too; it belongs to the branch alone": b * (x @ W.T + (d * z) @ B.T),
        "b is added; it scales": x @ W.T + (d * z) @ B.T + b,
        "d is added; it scales": x @ W.T + b * ((d + z) @ B.T),
        "the branch is divided by the rank; VeRA has no alpha and no such scale": x @ W.T + b * ((d * z) @ B.T) / rank,
        "the branch is taken away; it is added": x @ W.T - b * ((d * z) @ B.T),
    }, f"vera_forward on x of shape {(*lead, into)}")


def test_vera_makes_no_large_matrix(vera_forward):
    W, A, B, b, d = layer(60, 50, 3)
    with Sizes() as sizes:
        vera_forward(draw(2, 50, seed=9), W, A, B, b, d)
    assert sizes.largest < 60 * 50, (f"an (out, in) matrix was made, {sizes.largest:,} numbers: multiply x by Aᵀ, then by d, then by Bᵀ, then by b; "
                                     "a diagonal matrix is never needed")


@each_case
def test_vera_starts_silent_and_passes_the_gradients(vera_forward, out, into, rank):
    W, A, B, b, d = layer(out, into, rank)
    x = draw(4, into, seed=9)
    assert torch.equal(vera_forward(x, W, A, B, torch.zeros_like(b), d), x @ W.T), "with b = 0 the branch must add nothing: the base speaks"
    g, leaves = draw(4, out, seed=10), [t.requires_grad_() for t in (x, b, d)]
    y = vera_forward(x, W, A, B, b, d)
    assert y.requires_grad, "no gradient comes out: b, d and x need theirs, so detach none of them"
    y.backward(g)
    v = (d * (x @ A.T)) @ B.T
    for name, leaf, want in zip(("x", "b", "d"), leaves, (g @ (W + b[:, None] * (B * d) @ A), (g * v).sum(0), ((g * b) @ B * (x @ A.T)).sum(0))):
        assert leaf.grad is not None, f"no gradient reaches {name}: it is cut off, by a .detach() or torch.no_grad()"
        must_equal(leaf.grad, want.detach(), {}, f"the gradient of {name}")


# slice_shared

@pytest.mark.parametrize("rank, widest, tallest", [(3, 9, 7), (2, 6, 11)])
@pytest.mark.parametrize("into, out", [(5, 4), (6, 7), (1, 1)])
def test_a_slice_is_the_first_columns_and_the_first_rows(slice_shared, rank, widest, tallest, into, out):
    A, B = draw(rank, widest), draw(tallest, rank, seed=1)
    got = slice_shared(A, B, into, out)
    assert isinstance(got, tuple) and len(got) == 2, f"a tuple of two tensors is wanted, got {type(got).__name__}"
    last = {"these are the last columns; every layer takes the first": A[:, widest - into:]} if into < widest else {}
    must_equal(got[0], A[:, :into], last | {"A was sliced by its rows; rank stays, the width is cut": A[:into]} if into < rank else last, "A's part")
    last = {"these are the last rows; every layer takes the first": B[tallest - out:]} if out < tallest else {}
    must_equal(got[1], B[:out], last, "B's part")
    for name, part, of in (("A", got[0], A), ("B", got[1], B)):
        assert part.data_ptr() == of.data_ptr(), f"{name}'s part is a copy: slice, and every layer looks at the same numbers"


def test_the_largest_layer_takes_everything(slice_shared):
    A, B = draw(3, 9), draw(7, 3, seed=1)
    A_all, B_all = slice_shared(A, B, 9, 7)
    assert torch.equal(A_all, A) and torch.equal(B_all, B), "a layer as wide as A and as tall as B takes all of both"


@pytest.mark.parametrize("rank, widest, tallest", [(3, 9, 7), (2, 6, 4)])
@pytest.mark.parametrize("wider, taller", [(1, -1), (-2, 1), (5, 20)])
def test_what_does_not_fit_is_refused(slice_shared, rank, widest, tallest, wider, taller):
    into, out = widest + wider, tallest + taller
    with pytest.raises(ValueError):
        slice_shared(draw(rank, widest), draw(tallest, rank, seed=1), into, out)
        pytest.fail(f"a layer with in = {into}, out = {out} does not fit A with {widest} columns and B with {tallest} rows: raise ValueError, or the slice is silently too short")


# draw_projections

@pytest.mark.parametrize("rank, widest, tallest, seed", [(8, 20, 50, 0), (30, 64, 24, 7)])
def test_the_throw_is_the_packages(draw_projections, rank, widest, tallest, seed):
    torch.manual_seed(5)
    got = draw_projections(rank, widest, tallest, seed)
    assert isinstance(got, tuple) and len(got) == 2, f"a tuple of two tensors is wanted, got {type(got).__name__}"
    A, B = ml.VeRA(rank, seed=seed).projections(widest, tallest)
    for name, matrix, want, fan_in in (("A", got[0], A, widest), ("B", got[1], B, rank)):
        assert matrix.shape == want.shape, f"{name}: shape {tuple(want.shape)} is wanted, got {tuple(matrix.shape)}"
        assert matrix.dtype == torch.float32, f"{name}: float32 is wanted, got {matrix.dtype}"
        c, largest = math.sqrt(6 / fan_in), matrix.abs().max().item()
        unit = want / c                                                      # the same throw in U(-1, 1)
        for says, wrong in ((f"{name} lies in ±1/√fan_in: that is a = √5, nn.Linear's own and LoRA's; VeRA's gain is √2, the bound √(6 / fan_in)", fan_in**-0.5),
                            (f"{name}'s bound is √(2 / fan_in), which is the standard deviation wanted; the bound of a uniform is √3 times that", math.sqrt(2 / fan_in)),
                            (f"{name}'s bound is √(3 / fan_in): the gain √2 is missing", math.sqrt(3 / fan_in)),
                            (f"{name}'s fan_in is its number of columns, {fan_in}, and not of rows", math.sqrt(6 / want.shape[0])),
                            (f"{name}'s bound is √(6 / (rows + columns)), Xavier's; Kaiming counts the columns alone", math.sqrt(6 / sum(want.shape)))):
            assert not torch.allclose(matrix, wrong * unit, rtol=1e-5), says
        assert largest <= c * (1 + 1e-6), f"{name} has an entry of {largest:.3f}, outside ±{c:.3f} = ±√(6 / {fan_in}): uniform, not normal, and fan_in is the number of columns"
        assert torch.equal(matrix, want), (f"{name} has other numbers than ml.VeRA's: one generator, seeded once; A is drawn first with shape (rank, widest), "
                                           "then B goes on where A stopped; uniform_(-c, c, generator=...)")


def test_the_throw_spends_nobodys_random_numbers(draw_projections):
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = draw_projections(3, 6, 5, 2)
    assert torch.equal(torch.get_rng_state(), before), "torch's global random state has moved: draw from a torch.Generator of your own"
    torch.manual_seed(99)
    assert all(torch.equal(*pair) for pair in zip(first, draw_projections(3, 6, 5, 2))), "the same seed must throw the same numbers, whatever torch.manual_seed was"
    assert not torch.equal(first[0], draw_projections(3, 6, 5, 3)[0]), "another seed must throw other numbers"


# vera_gradients

@each_case
@each_lead
def test_gradients_are_autograds(vera_gradients, lead, out, into, rank):
    W, A, B, b, d = layer(out, into, rank)
    x, g = draw(*lead, into, seed=9), draw(*lead, out, seed=10)
    b_, d_ = b.clone().requires_grad_(), d.clone().requires_grad_()
    (x @ W.T + b_ * ((d_ * (x @ A.T)) @ B.T)).backward(g)
    with torch.no_grad():
        got = vera_gradients(x, g, A, B, b, d)
    assert isinstance(got, tuple) and len(got) == 2, f"a tuple of two tensors is wanted, got {type(got).__name__}"

    def total(t):
        return t.reshape(-1, t.shape[-1]).sum(0)

    z, rows = x @ A.T, max(1, math.prod(lead))
    db, dd = b_.grad, d_.grad
    for which, got_, want, mistakes in (
        ("dL/db", got[0], db, {
            "d is missing in dL/db: what stands beside b is (d ⊙ (x Aᵀ)) Bᵀ": total(g * (z @ B.T)),
            "b is in its own gradient: y is linear in b": total(g * b * ((d * z) @ B.T)),
            "g is missing in dL/db": total((d * z) @ B.T),
        }),
        ("dL/dd", got[1], dd, {
            "b is missing in dL/dd: what reaches d has come through b, then through B": total((g @ B) * z),
            "d is in its own gradient: y is linear in d": total(((g * b) @ B) * d * z),
            "x Aᵀ is missing in dL/dd": total((g * b) @ B),
        }),
    ):
        if rows > 1:
            mistakes |= {f"{which} is the mean over the rows; every row is a summand of the loss: sum": want / rows}
        must_equal(got_, want, mistakes, which)


def test_at_the_start_only_b_hears(vera_gradients):
    _, A, B, b, d = layer(7, 5, 2)
    db, dd = vera_gradients(draw(4, 5, seed=9), draw(4, 7, seed=10), A, B, torch.zeros_like(b), d)
    assert db.all() and not dd.any(), "with b = 0 every entry of b has a gradient and none of d's: g reaches d through b alone"


def test_gradients_need_no_large_matrix(vera_gradients):
    _, A, B, b, d = layer(60, 50, 3)
    with torch.no_grad(), Sizes() as sizes:
        vera_gradients(draw(2, 50, seed=9), draw(2, 60, seed=10), A, B, b, d)
    assert sizes.largest < 60 * 50, f"an (out, in) matrix was made, {sizes.largest:,} numbers: go back the way forward came, through b, B and A, a vector at a time"


# vera_bytes

def saved(shapes, rank, projections, folder):
    """What the package's own file holds, for a model of Linears of these shapes, on the base's dtype float32."""
    model = nn.ModuleList([nn.Linear(into, out) for out, into in shapes])
    ml.save_adapter(ml.adapt(model, ml.VeRA(rank), [str(i) for i in range(len(shapes))]), folder, projection=projections)
    return sum(tensor.nbytes for tensor in load_file(folder / "adapter_model.safetensors").values())


@pytest.mark.parametrize("projections", [False, True])
@pytest.mark.parametrize("shapes, rank", [([(7, 5), (4, 9), (3, 2)], 5), ([(5, 12), (8, 3)], 4), ([(6, 6)], 3)])
def test_bytes_are_the_files(vera_bytes, shapes, rank, projections, tmp_path):
    got, want = vera_bytes(shapes, rank, projections), saved(shapes, rank, projections, tmp_path)
    assert isinstance(got, int), f"a whole number is wanted, got {type(got).__name__}"
    trained = sum(rank + out for out, _ in shapes)
    each = sum(rank * (out + into) for out, into in shapes)
    for name, wrong in {
        "A and B are in there, but a seed stands for them": 4 * (trained + rank * sum(max(side) for side in zip(*shapes))),
        "A and B are missing: with projections they are in the file": 4 * trained,
        "A and B are counted for every layer; they are shared, so once": 4 * (trained + each),
        "numbers are counted, not bytes: float32 takes four": want // 4,
        "this is float16, two bytes; the file is float32": want // 2,
        "the vectors are missing": want - 4 * trained,
    }.items():
        assert got == want or got != wrong, f"{name}: {got:,} bytes where {want:,} are wanted"
    assert got == want, f"shapes {shapes}, rank {rank}, projections {projections}: the file holds {want:,} bytes of tensors, you count {got:,}"


@pytest.mark.parametrize("projections, want", [(False, 6_356_992), (True, 96_534_528)])
def test_bytes_of_a_llama(vera_bytes, projections, want):
    got = vera_bytes(LLAMA, 1024, projections)
    assert got == want, f"LLaMA-7B, all linears, rank 1024, projections {projections}: {want:,} bytes are wanted, got {got:,} (widest 11008, tallest 11008)"


# vera_reach

@pytest.mark.parametrize("out, into, rank", [(7, 5, 2), (4, 9, 3), (6, 5, 5), (5, 4, 11), (2, 3, 20)])
def test_full_rank_on_a_thin_surface(vera_reach, out, into, rank):
    _, A, B, b, d = layer(out, into, rank)
    got = vera_reach(A, B, b, d)
    assert isinstance(got, tuple) and all(isinstance(n, int) for n in got) and len(got) == 2, f"a tuple of two whole numbers is wanted, got {got!r}"
    thick, wide = min(rank, out, into), min(rank + out - 1, out * into)
    assert got[0] == thick, f"out {out}, in {into}, rank {rank}: dW has rank {thick} = min(rank, out, in), you have {got[0]}"
    assert got[1] == wide or got[1] != rank + out, (f"{rank + out} is how many numbers are trained; of the directions one is lost: "
                                                    "b times 2 and d divided by 2 is the same dW. Take the rank of the Jacobian, do not count its rows")
    assert got[1] == wide, f"out {out}, in {into}, rank {rank}: small steps move dW in {wide} directions, you have {got[1]}: one row of the Jacobian for each entry of b and of d"


def test_reach_at_the_start(vera_reach):
    _, A, B, b, d = layer(7, 5, 2)
    got = vera_reach(A, B, torch.zeros_like(b), d)
    assert got == (0, 7), f"with b = 0 dW is zero, of rank 0, and only b can move it, in 7 = out directions; you have {got}"


def test_reach_without_one_row_and_one_column(vera_reach):
    _, A, B, b, d = layer(7, 5, 4)
    b[2] = 0
    d[1] = 0
    got = vera_reach(A, B, b, d)
    assert got == (3, 10), f"with one zero in b and one in d dW has rank 3, and the zeros can still be moved: 10 = 4 + 7 - 1 directions; you have {got}"


def test_reach_counts_relatively(vera_reach):
    _, A, B, b, d = layer(7, 5, 4)
    got = vera_reach(A, B, 1e-8 * b, 1e-8 * d)
    assert got[0] == 4, f"all is small here, and the rank is 4 nevertheless, you have {got[0]}: compare with the largest singular value, not with a fixed number"
    got = vera_reach(A, B, b, d * torch.tensor([1, 1, 1, 1e-12]).double())
    assert got[0] == 3, f"one direction is 1e-12 of the others: it counts as zero (up to 1e-10 of the largest), so the rank is 3, you have {got[0]}"
    got = vera_reach(A, B, b, d * torch.tensor([1, 1, 1, 1e-7]).double())
    assert got[0] == 4, f"one direction is 1e-7 of the others, and that is more than 1e-10: the rank is 4, you have {got[0]}"
    _, A, B, b, d = layer(4, 9, 5)
    got = vera_reach(A, B, b * torch.tensor([1, 1, 1, 1e-7]).double(), d)
    assert got[0] == 4, f"one row is 1e-7 of the others, and that is more than 1e-10: the rank is 4, you have {got[0]}"


@pytest.mark.parametrize("small, want", [(1.5e-10, 2), (0.5e-10, 1)])
def test_reach_counts_zero_up_to_1e_10(vera_reach, small, want):
    one, ones = torch.eye(2, dtype=torch.float64), torch.ones(2, dtype=torch.float64)
    got = vera_reach(one, one, ones, torch.tensor([1, small], dtype=torch.float64))
    assert got[0] == want, f"dW = diag(1, {small:g}) has rank {want} when up to 1e-10 of the largest counts as zero, you have {got[0]}"


def test_reach_of_a_sum_that_hides_a_direction(vera_reach):
    """Rank 2, but both columns of B alike: dW has rank 1, and no step of d leaves it."""
    _, A, B, b, d = layer(7, 5, 2)
    B[:, 1] = B[:, 0]
    got = vera_reach(A, B, b, d)
    assert got == (1, 8), f"with two equal columns in B dW has rank 1 and can be moved in 8 directions, you have {got}: measure, do not count"
