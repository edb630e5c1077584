"""What is true of a right answer to lesson 13. Nothing square but where a mistake shall be named, B not zero, several processes, adapters and layers."""

import copy
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import minilora as ml
from lessons.expect import SIZES, Size, Sizes, draw, must_equal

# conv1d_adapter

CUBE = Size(out=5, into=5, rank=5, alpha=3.0)                              # here even a wrong product has a result, so that it can be named
each_way = pytest.mark.parametrize("size", SIZES, ids=str)
each_lead = pytest.mark.parametrize("lead", [(3,), (2, 6), ()], ids=["(3, in)", "(2, 6, in)", "(in)"])


def lying(size, lead=(3,), seed=0):
    """x, W (in, out), bias, A, B."""
    W, A, B = size.factors(seed)
    return draw(*lead, size.into, seed=seed + 9), W.T.clone(), draw(size.out, seed=seed + 303), A, B


def that_fit(mistakes):
    """Those that have a result at this size: most wrong products only have one where all sizes are equal."""
    found = {}
    for name, wrong in mistakes.items():
        try:
            found[name] = wrong()
        except RuntimeError:
            continue
    return found


def both_results(conv1d_adapter, size, lead=(3,), with_bias=True):
    (x, W, b, A, B), s = lying(size, lead), size.scale
    bias, plus = (b, b) if with_bias else (None, 0)
    base, branch, turned = x @ W + plus, s * (x @ A.T) @ B.T, (B @ A).T
    of_y = {
        "only the base speaks: the branch is missing": base, "only the branch speaks: x W and the bias are missing": branch,
        "the scale is missing": base + branch / s, "the scale is squared": base + s * branch,
    } | that_fit({
        "W lies (in, out) here, so the layer's own output is x W; x Wᵀ is nn.Linear's": lambda: x @ W.T + plus + branch,
        "A and B lie as ever, only W is turned: the branch is s · (x Aᵀ) Bᵀ": lambda: base + s * x @ A @ B,
        "A and B lie as ever, only W is turned: the branch is s · (x Aᵀ) Bᵀ, and this has x A": lambda: base + s * x @ A @ B.T,
        "A and B lie as ever, only W is turned: the branch is s · (x Aᵀ) Bᵀ, and this ends with B": lambda: base + s * x @ A.T @ B,
        "the branch is s · (x Aᵀ) Bᵀ: A first, then B": lambda: base + s * x @ B.T @ A.T,
    })
    if with_bias:
        of_y |= {"the bias is missing": base - b + branch, "the bias is counted twice": base + b + branch, "the bias is scaled too": base + branch + (s - 1) * b}
    of_merged = {
        "merged lies (out, in), as in nn.Linear; it lies as W does, (in, out)": (W + s * turned).T,
        "the scale is missing in merged": W + turned, "the scale is squared in merged": W + s * s * turned, "merged is dW alone: W is missing": s * turned,
        "the update is subtracted": W - s * turned, "this is W itself: the update is missing": W,
    } | that_fit({
        "s · B A lies (out, in), and W (in, out): turn the update before it is added": lambda: W + s * B @ A,
        "the update is B A, turned; this is A B": lambda: W + s * A @ B,
        "the update is B A, turned; this is (A B)ᵀ": lambda: W + s * (A @ B).T,
    })
    y, merged = conv1d_adapter(x, W, bias, A, B, s)
    must_equal(y, base + branch, of_y, "y")
    must_equal(merged, W + s * turned, of_merged, "merged")


@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no bias"])
def test_where_all_sizes_are_equal(conv1d_adapter, with_bias):
    """Here torch would stop no wrong product; the other sizes are for it to stop some."""
    both_results(conv1d_adapter, CUBE, (3,), with_bias)


@each_way
@each_lead
@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no bias"])
def test_a_layer_that_lies_the_other_way(conv1d_adapter, size, lead, with_bias):
    both_results(conv1d_adapter, size, lead, with_bias)


@each_way
def test_merged_does_the_work_of_both(conv1d_adapter, size):
    """Without a look at formulas: the layer with `merged` for a weight and a silent branch says what y says. And a second call says the same."""
    x, W, b, A, B = lying(size, (2, 6), seed=7)
    for _ in range(2):
        y, merged = conv1d_adapter(x, W, b, A, B, 0.75)
        again = conv1d_adapter(x, merged, b, A, torch.zeros_like(B), 0.75)[0]
        assert torch.allclose(again, y, rtol=1e-9, atol=1e-12), f"a layer whose weight is merged should say y, and is off by up to {(again - y).abs().max():.3g}"


def test_it_is_the_packages_linear_layer_turned(conv1d_adapter):
    torch.manual_seed(1)
    layer = ml.LoRALinear(nn.Linear(6, 4, dtype=torch.float64), ml.LoRA(rank=3, alpha=2.0))
    with torch.no_grad():
        layer.B.copy_(draw(4, 3, seed=5))
    x = draw(2, 7, 6, seed=6)
    W, b = layer.base.weight.detach().T.contiguous(), layer.base.bias.detach()
    y, merged = conv1d_adapter(x, W, b, layer.A.detach(), layer.B.detach(), layer.scale)
    want = layer(x).detach()
    assert torch.allclose(y, want, rtol=1e-9, atol=1e-12), f"the same numbers in an nn.Linear with ml.LoRA say something else: off by {(y - want).abs().max():.3g}"
    assert torch.equal(merged, merged.contiguous()) and merged.shape == W.shape and torch.allclose(merged.T, layer.base.weight + layer.delta_weight(), rtol=1e-9), \
        "merged is not the merged nn.Linear's weight, turned"


def test_both_results_let_gradients_through(conv1d_adapter):
    x, W, b, A, B = lying(SIZES[0], seed=2)
    A, B = A.requires_grad_(), B.requires_grad_()
    for place, name in ((0, "y"), (1, "merged")):
        result = conv1d_adapter(x, W, b, A, B, 0.5)[place]
        assert result.requires_grad, f"no gradient passes through {name}: is there a .detach() or torch.no_grad()?"
        got = torch.autograd.grad((result * draw(*result.shape, seed=11)).sum(), (A, B))
        assert all(each.any() for each in got), f"through {name} nothing reaches A or B"


# shard_batches

def dealt(rows=12, columns=5):
    """batches(step) -> x (rows, columns), y (rows): every row of every step is another, and y belongs to its x."""
    def batches(step):
        x = 1000.0 * step + torch.arange(rows * columns, dtype=torch.float64).view(rows, columns)
        return x, x[:, 0].long() + 7

    return batches


def numbers(y):
    """Which rows these are, from y."""
    return [int((each - 7) % 1000 // 5) for each in y]


each_crew = pytest.mark.parametrize("rows, processes", [(12, 3), (12, 2), (12, 4), (6, 6), (10, 5), (4, 1)])


def shares(shard_batches, rows, processes, step):
    return [shard_batches(dealt(rows), process, processes)(step) for process in range(processes)]


@each_crew
def test_every_row_goes_to_exactly_one_process(shard_batches, rows, processes):
    parts = shares(shard_batches, rows, processes, 2)
    sizes = [tuple(x.shape) for x, _ in parts]
    assert all(len(shape) == 2 and shape[1] == 5 for shape in sizes), f"x was cut across its columns, or flattened: shapes {sizes}; deal rows, the first dimension"
    steps = sorted({int(x[0, 0] // 1000) for x, _ in parts if len(x)})
    assert steps in ([], [2]), f"asked for step 2, the processes got rows of step {steps}: each takes a share of the same batch, at the step asked for"
    assert not (processes > 1 and all(len(x) == len(y) == rows for x, y in parts)), "every process got the whole batch: N processes would do the same work N times"
    for process, (x, y) in enumerate(parts):
        assert len(x) == len(y), f"of {rows} rows process {process} of {processes} got {len(x)} of x and {len(y)} of y: deal both"
    seen = sorted(itertools.chain(*(numbers(y) for _, y in parts)))
    twice, missing = sorted({row for row in seen if seen.count(row) > 1}), sorted({*range(rows)} - {*seen})
    assert not twice, f"rows {twice} went to more than one process ({rows} rows, {processes} processes)"
    assert not missing, f"rows {missing} went to nobody ({rows} rows, {processes} processes)"
    assert {len(y) for _, y in parts} == {rows // processes}, f"not all got equally many: {[len(y) for _, y in parts]}"


@each_crew
def test_x_and_y_stay_together(shard_batches, rows, processes):
    for process, (x, y) in enumerate(shares(shard_batches, rows, processes, 1)):
        assert len(x) == len(y), f"process {process} got {len(x)} rows of x and {len(y)} of y: deal both"
        assert torch.equal(x[:, 0].long() + 7, y), f"process {process} got rows of y that do not belong to its rows of x"
        assert y.dtype == torch.int64 and x.dtype == torch.float64, f"the types have changed: x {x.dtype}, y {y.dtype}"


def test_it_is_a_function_of_the_step_asked_for(shard_batches):
    first, second = (shard_batches(dealt(), process, 2) for process in range(2))
    for step in (3, 0, 7, 3):
        for share in (first, second, first):
            x, y = share(step)
            got = int(x[0, 0] // 1000)
            assert got == step, f"asked for step {step} it gives rows of step {got}: each process takes a share of the same batch, at the step asked for"
            assert torch.equal(share(step)[0], x), f"asked for step {step} twice it gives other rows: the share follows from the step alone, no dice and no counter"


def test_the_batch_stays_as_it_is(shard_batches):
    """A batch function that keeps its batch and gives it again, as a cache does."""
    x, y = dealt(12)(0)
    x_before, y_before = x.clone(), y.clone()
    for process in (0, 1, 2, 0):
        shard_batches(lambda step: (x, y), process, 3)(0)
        assert torch.equal(x, x_before) and torch.equal(y, y_before), "it wrote into the batch that batches(step) gave: others read it too; take rows out, and leave it as it is"


def test_the_dice_of_others_stay_as_they_are(shard_batches):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    for process in range(2):
        shard_batches(dealt(12), process, 2)(3)
        assert torch.equal(torch.get_rng_state(), before), "torch's global generator was seeded anew or drawn from: dropout and all other dice of the training would fall otherwise"


def test_two_crews_do_not_disturb_each_other(shard_batches):
    """Two shares of different batches, asked in turn."""
    large, small = shard_batches(dealt(12), 1, 3), shard_batches(dealt(6), 1, 3)
    for step in (0, 1):
        assert len(large(step)[1]) == 4 and len(small(step)[1]) == 2, "the share of one batch function came from another's: keep nothing between calls"


@pytest.mark.parametrize("rows, processes", [(7, 2), (2, 3), (11, 4), (1, 2)])
def test_what_cannot_be_dealt_evenly_is_refused(shard_batches, rows, processes):
    for process in range(processes):
        try:
            got = len(shard_batches(dealt(rows), process, processes)(0)[1])
        except ValueError:
            continue
        pytest.fail(f"a batch of {rows} cannot be dealt evenly to {processes} processes: ValueError is wanted; process {process} got a share, rows in it: {got}; "
                    "a row left out is never learned, and of uneven shares the mean of means is not the mean", pytrace=False)


def test_each_batch_is_asked_whether_it_comes_out_even(shard_batches):
    """Step 0 has 6 rows, step 1 has 7, step 2 has 4."""
    share = shard_batches(lambda step: dealt((6, 7, 4)[step])(step), 1, 2)
    got = len(share(0)[1]), len(share(2)[1])
    assert got == (3, 2), f"batches of 6 and of 4 rows for 2 processes: 3 and 2 rows are wanted, got {got[0]} and {got[1]}"
    try:
        share(1)
    except ValueError:
        return
    pytest.fail("the batch of step 1 has 7 rows, which 2 processes cannot share evenly: look at each batch, not only at the first", pytrace=False)


@pytest.mark.parametrize("processes", [2, 3])
def test_the_mean_of_their_gradients_is_the_gradient_of_the_whole(shard_batches, processes):
    A, B = draw(3, 5, seed=1), draw(4, 3, seed=2)

    def batches(step):
        return draw(6, 5, seed=step + 40), draw(6, 4, seed=step + 80)

    def gradients(x, y):
        factors = [A.clone().requires_grad_(), B.clone().requires_grad_()]
        return torch.autograd.grad(F.mse_loss(x @ factors[0].T @ factors[1].T, y), factors)

    alone = gradients(*batches(5))
    crew = [gradients(*shard_batches(batches, process, processes)(5)) for process in range(processes)]
    for i, name in enumerate("AB"):
        together = torch.stack([each[i] for each in crew]).mean(0)
        off = (together - alone[i]).abs().max().item()
        assert off < 1e-12, f"the mean of {processes} processes' gradients of {name} is off by {off:.3g} from that of the whole batch"


# allreduce_bytes

LLAMA_7B_QV = [(4096, 4096)] * 64
WIRES = [([(7, 5), (4, 6)], 2, 5, 4), ([(7, 5)], 3, 8, 4), ([(7, 5), (4, 6), (9, 2)], 1, 7, 2), ([(7, 5), (4, 6)], None, 5, 4), ([(8, 3)], None, 6, 8),
         (LLAMA_7B_QV, 8, 8, 4), (LLAMA_7B_QV, None, 8, 2)]


@pytest.mark.parametrize("shapes, rank, processes, element_size", WIRES, ids=lambda value: f"layers {len(value)}" if isinstance(value, list) else str(value))
def test_what_one_process_sends(allreduce_bytes, shapes, rank, processes, element_size):
    got = float(allreduce_bytes(shapes, rank, processes, element_size))
    full, thin = sum(out * into for out, into in shapes), sum((rank or 0) * (out + into) for out, into in shapes)
    count, N = (full if rank is None else thin), processes
    want = 2 * (N - 1) / N * count * element_size
    mistakes = {
        "these are W's gradients, and W is frozen: A and B travel": want / count * full,
        "with rank None it is W that trains, out · in numbers": want / count * thin,
        "this is half of it: the sums have to travel too, once they are complete": want / 2,
        "this is what is sent if everybody sends everything to everybody; in a ring each sends an N-th at a time": (N - 1) * count * element_size,
        "this is what all processes send together (or each, if every round sent everything); one is asked for, and a round sends an N-th": want * N,
        "2 · bytes is the limit for many processes; (N − 1) / N of it is sent": 2 * count * element_size,
        "the ring's factor is upside down: (N − 1) / N": 2 * N / (N - 1) * count * element_size,
        "these are numbers; a number has element_size bytes": want / element_size,
        "these are bits; eight of them are a byte": 8 * want,
        "the ring's factor is missing: these are the bytes of the gradients": count * element_size,
        "this is A's gradient alone": want / count * sum((rank or 0) * into for _, into in shapes),
        "this is B's gradient alone": want / count * sum((rank or 0) * out for out, _ in shapes),
        "this multiplies the rank with out · in; A has rank · in numbers and B out · rank": want / count * full * (rank or 0),
        "this takes every number for 4 bytes: element_size says how many": want / element_size * 4,
        "this is the first layer only": want / count * (math.prod(shapes[0]) if rank is None else rank * sum(shapes[0])),
    }
    what = f"layers: {len(shapes)}, rank {rank}, processes: {processes}, bytes a number: {element_size}"
    for name, wrong in mistakes.items():
        assert math.isclose(want, wrong) or not math.isclose(got, wrong) or not wrong, f"{name} ({what}: {want:,.0f} is wanted, got {got:,.0f})"
    assert math.isclose(got, want), f"{what}: {want:,.2f} bytes are wanted, got {got:,.2f}"


def test_alone_one_sends_nothing(allreduce_bytes):
    for rank in (3, None):
        got = allreduce_bytes([(7, 5), (4, 6)], rank, 1)
        assert got == 0, f"a single process has nobody to send to: 0 is wanted, got {got:,}"
    assert allreduce_bytes([], 3, 4) == 0, "no layers, no bytes"


@pytest.mark.parametrize("processes", [2, 3, 5])
def test_a_ring_that_is_really_walked_sends_as_much(allreduce_bytes, processes):
    """The gradient of one layer goes round in `processes` pieces, and every byte is counted."""
    shapes, rank = [(processes * 3, processes * 2)], 2                      # so that pieces are equal
    pieces = [[draw(2 * 5, seed=31 * me + piece) for piece in range(processes)] for me in range(processes)]
    total = [sum(mine[piece] for mine in pieces) for piece in range(processes)]
    sent = 0
    for adding, begin in ((True, 0), (False, 1)):                           # sums grow; then the finished ones go round
        for turn in range(processes - 1):
            letters = [((me + begin - turn) % processes, pieces[me][(me + begin - turn) % processes].clone()) for me in range(processes)]
            sent += letters[0][1].numel() * 4                               # of process 0, had they been float32
            for me, (piece, letter) in enumerate(letters):
                there = pieces[(me + 1) % processes]
                there[piece] = there[piece] + letter if adding else letter
    assert all(torch.allclose(mine[piece], total[piece]) for mine in pieces for piece in range(processes))
    got = allreduce_bytes(shapes, rank, processes)
    assert math.isclose(got, sent), f"a ring of {processes} that sums {10 * processes} numbers sent {sent} bytes a process, got {got:.1f}; without a word a number has 4 bytes"


# peak_of_loading

CARGO = [
    ([100, 100, 100], [13, 13, 13]),
    ([100, 100, 400], [13, 13, 50]),                                        # the largest comes last
    ([400, 100, 100], [50, 13, 13]),                                        # or first
    ([100, 700, 90, 60], [13, 88, 12, 8]),
    ([300, 100, 200, 100, 50], [None, 13, 25, 13, None]),                   # embedding first, a norm last
    ([50, 100, 200, 100, 900], [None, 13, 25, 13, None]),                   # a head last, which stays dense
    ([10, 10, 500], [9, 8, 70]),                                            # the early ones hardly shrink
    ([80, 20], [None, None]), ([64], [9]), ([64], [None]), ([], []),
]
each_cargo = pytest.mark.parametrize("dense, packed", CARGO, ids=[f"{dense}" for dense, _ in CARGO])


def walked(dense, packed, layer_by_layer):
    """Every layer as an object that is there or is not; the heaviest moment."""
    there, moments = {("dense", i): size for i, size in enumerate(dense)} if not layer_by_layer else {}, [0]
    moments.append(sum(there.values()))
    for i, (whole, small) in enumerate(zip(dense, packed)):
        there["dense", i] = whole
        moments.append(sum(there.values()))
        if small is not None:
            there["packed", i] = small
            moments.append(sum(there.values()))
            del there["dense", i]
    return max(moments), sum(there.values())


@each_cargo
@pytest.mark.parametrize("layer_by_layer", [True, False], ids=["layer by layer", "whole model first"])
def test_the_heaviest_moment(peak_of_loading, dense, packed, layer_by_layer):
    want, end = walked(dense, packed, layer_by_layer)
    got = peak_of_loading(dense, packed, layer_by_layer)
    whole, small = sum(dense), [p for p in packed if p is not None]
    first = small[0] if small else 0
    mistakes = {
        "this is what is there at the end; the peak is somewhere on the way": end,
        "this is the peak of loading layer by layer; here the whole model comes first" if not layer_by_layer
        else "this is the peak where the whole model comes first; here one layer comes at a time": walked(dense, packed, not layer_by_layer)[0],
        "this is the whole dense model; for a moment its first packed layer lies beside it" if not layer_by_layer else "this is the whole dense model": whole,
        "dense and packed lie side by side for a moment: the layer's own packed bytes are missing":
            walked(dense, [None if p is None else 0 for p in packed], False)[0] if not layer_by_layer
            else max([sum(d if p is None else p for d, p in zip(dense[:i], packed)) + dense[i] for i in range(len(dense))], default=0),
        "this lets the dense layer go before its packed self is there":
            max([sum(d if p is None else p for d, p in zip(dense[:i], packed)) + max(dense[i], packed[i] or 0) for i in range(len(dense))], default=0),
        "a layer that stays dense is not copied: it is there once": walked(dense, [d if p is None else p for d, p in zip(dense, packed)], layer_by_layer)[0],
        "a layer that stays dense stays: its bytes are not given back": walked(dense, [0 if p is None else p for p in packed], layer_by_layer)[0],
        "this is all packed layers and the largest dense one; the largest may have gone before the last came": end + max(dense, default=0),
        "this packs the layers of the whole model all at once": whole + sum(small),
        "this keeps the packed layers of the past, but forgets those that stay dense":
            max([sum(p or 0 for p in packed[:i + 1]) + dense[i] for i in range(len(dense))], default=0),
        "the largest packed layer lies beside the whole model only if it comes first": whole + max(small, default=0),
    }
    for name, wrong in mistakes.items():
        assert got == want or got != wrong, f"{name} (dense {dense}, packed {packed}: {want} is wanted, got {got})"
    assert got == want, f"dense {dense}, packed {packed}, {'layer by layer' if layer_by_layer else 'the whole model first'}: {want} is wanted, got {got} (at the first layer: {whole + first})"


def test_it_is_what_a_real_loading_holds(peak_of_loading):
    """Real tensors, ml.quantize_nf4, and after each line a look at what is alive."""
    shapes = [(96, 64), (32, 64), (64, 96)]
    kept, peaks = [], []
    for i, shape in enumerate(shapes):
        layer = draw(*shape, seed=i, dtype=torch.float32)
        if i != 1:                                                          # layer 1 stays dense
            four = ml.quantize_nf4(layer)
            peaks.append(sum(kept) + layer.nbytes + four.nbytes)
            layer = four
        kept.append(layer.nbytes)
        peaks.append(sum(kept))
    dense = [4 * out * into for out, into in shapes]
    packed = [ml.quantize_nf4(draw(*shape, dtype=torch.float32)).nbytes if i != 1 else None for i, shape in enumerate(shapes)]
    got = peak_of_loading(dense, packed, True)
    assert got == max(peaks), f"three layers, really packed: {max(peaks):,} bytes at most, got {got:,}"


def test_a_seven_billion_model_goes_through_the_gate(peak_of_loading):
    """Llama-2-7B in 16 bits, in MB: 32 blocks of 405, embedding and head of 262 each stay dense."""
    dense, packed = [262, *[405] * 32, 262], [None, *[104] * 32, None]
    whole, by_layer = (peak_of_loading(dense, packed, way) for way in (False, True))
    assert (whole, by_layer) == (13_588, 3_995), f"13,588 MB with the whole model first and 3,995 layer by layer are wanted, got {whole:,} and {by_layer:,}"


# many_adapters

@pytest.mark.parametrize("out, into, rank, T", [(7, 5, 2, 3), (4, 6, 3, 1), (5, 5, 5, 5)], ids=["7x5, rank 2", "4x6, rank 3, one token", "5x5, rank 5"])
@pytest.mark.parametrize("which", [[2, 0, 2, 1], [1, -1, 0, 0, -1, 2], [0], [-1, -1], [3, 2, 1, 0, 3], [-1, 3, -1, 1]], ids=str)
def test_each_row_meets_its_own_adapter(many_adapters, out, into, rank, T, which):
    n, batch = 4, len(which)
    x, W, A, B = draw(batch, T, into, seed=1), draw(out, into, seed=2), draw(n, rank, into, seed=3), draw(n, out, rank, seed=4)
    scales = torch.tensor([0.5, 1.75, -0.4, 3.2], dtype=torch.float64)

    def rows(one):
        return torch.stack([one(x[b], i) for b, i in enumerate(which)])

    def branch(x_b, i):
        return scales[i] * x_b @ A[i].T @ B[i].T

    def own(x_b, i):
        return x_b @ W.T + (branch(x_b, i) if i >= 0 else 0)

    mistakes = {
        "-1 means the base's answer; in Python it also means the last one": rows(lambda x_b, i: x_b @ W.T + branch(x_b, i)),
        "-1 means the base's answer; here such a row got adapter 0": rows(lambda x_b, i: x_b @ W.T + branch(x_b, max(i, 0))),
        "a row with -1 still has the base's answer, x Wᵀ": rows(lambda x_b, i: own(x_b, i) if i >= 0 else torch.zeros(T, out, dtype=x.dtype)),
        "scales are missing: each adapter has one": rows(lambda x_b, i: x_b @ W.T + (branch(x_b, i) / scales[i] if i >= 0 else 0)),
        "each row got the scale of adapter 0": rows(lambda x_b, i: x_b @ W.T + (branch(x_b, i) * scales[0] / scales[i] if i >= 0 else 0)),
        "row b got adapter b; which[b] says whose it is": torch.stack([x[b] @ W.T + branch(x[b], b % n) for b in range(batch)]),
        "every row got the first row's adapter": torch.stack([own(x[b], which[0]) for b in range(batch)]),
        "every row got all adapters, added up": rows(lambda x_b, i: x_b @ W.T + sum(branch(x_b, j) for j in range(n))),
        "the base's x Wᵀ is missing": rows(lambda x_b, i: own(x_b, i) - x_b @ W.T),
        "only the base speaks": x @ W.T,
        "only the first token of each row met its adapter": torch.cat([rows(own)[:, :1], (x @ W.T)[:, 1:]], 1),
    }
    if len({b if i < 0 else i for b, i in enumerate(which)}) < 2 or which == [-1, -1]:
        mistakes = {name: wrong for name, wrong in mistakes.items() if name.startswith(("-1", "a row with", "scales", "row b", "the base's", "only the base"))}
    got = many_adapters(x, W, A, B, scales, torch.tensor(which))
    if out == into == rank:
        mistakes |= {"A lies (rank, in): the branch has x Aᵀ, and this has x A": rows(lambda x_b, i: x_b @ W.T + (scales[i] * x_b @ A[i] @ B[i].T if i >= 0 else 0)),
                     "B lies (out, rank): the branch ends with Bᵀ, and this with B": rows(lambda x_b, i: x_b @ W.T + (scales[i] * x_b @ A[i].T @ B[i] if i >= 0 else 0)),
                     "W lies (out, in): the base's answer is x Wᵀ": rows(lambda x_b, i: own(x_b, i) - x_b @ W.T + x_b @ W)}
    if T == batch:
        mistakes["which was laid over the tokens; it counts the rows of the batch"] = torch.stack(
            [torch.stack([own(x[b, t:t + 1], i)[0] for t, i in enumerate(which)]) for b in range(batch)])
    must_equal(got, rows(own), mistakes, f"rows of adapters {which}")


def crowd(batch, n, T=2, out=6, into=5, rank=3, seed=0):
    return (draw(batch, T, into, seed=seed + 1), draw(out, into, seed=seed + 2), draw(n, rank, into, seed=seed + 3), draw(n, out, rank, seed=seed + 4),
            draw(n, seed=seed + 5), torch.arange(batch) % (n + 1) - 1)


def test_it_says_what_each_would_say_alone(many_adapters):
    x, W, A, B, scales, which = crowd(9, 5)
    together = many_adapters(x, W, A, B, scales, which)
    for b in range(9):
        alone = many_adapters(x[b:b + 1], W, A, B, scales, which[b:b + 1])
        assert torch.allclose(together[b:b + 1], alone, rtol=1e-9, atol=1e-12), f"row {b} says something else in company than alone: rows must not mix"


class Counted(TorchDispatchMode):
    """How many operations PyTorch was asked for."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += 1
        return function(*args, **(kwargs or {}))


def test_no_loop_over_rows_or_adapters(many_adapters):
    counts = {}
    for batch, n in ((4, 3), (40, 3), (40, 30)):
        given = crowd(batch, n)
        with Counted() as counted:
            many_adapters(*given)
        counts[batch, n] = counted.count
    assert counts[40, 3] < counts[4, 3] + 10, f"a loop over rows: {counts[4, 3]} operations for 4 rows, {counts[40, 3]} for 40"
    assert counts[40, 30] < counts[40, 3] + 10, f"a loop over adapters: {counts[40, 3]} operations with 3 of them, {counts[40, 30]} with 30"


def test_nothing_large_is_made(many_adapters):
    batch, T, width, rank, largest = 4, 1, 60, 2, {}
    for n in (5, 600):
        given = crowd(batch, n, T, width, width, rank)
        with Sizes() as seen:
            many_adapters(*given)
        largest[n] = seen.largest
    assert largest[600] < 2 * largest[5] + 601, (
        f"the largest tensor grows with the number of adapters, {largest[5]:,} numbers with 5 and {largest[600]:,} with 600: gather A[which] and B[which] first, so that a row meets its own only")
    limit = 2 * batch * width * rank
    assert largest[5] <= limit, f"B A was formed: {largest[5]:,} numbers at once, where a row's own A and B have {width * rank}; multiply with Aᵀ first, then with Bᵀ"


def test_training_reaches_only_the_adapters_that_were_asked_for(many_adapters):
    x, W, A, B, scales, _ = crowd(4, 5)
    A, B = A.requires_grad_(), B.requires_grad_()
    many_adapters(x, W, A, B, scales, torch.tensor([3, -1, 1, 3])).square().sum().backward()
    for factor, name in ((A, "A"), (B, "B")):
        assert factor.grad is not None, f"no gradient reaches {name}"
        got = [i for i in range(5) if factor.grad[i].any()]
        assert got == [1, 3], f"rows of adapters 3, -1, 1 and 3 should move {name} of adapters 1 and 3, and move those of {got}"


# diagnose

LINKS = ("base trains", "frozen", "no gradient", "both zero", "not in the optimizer", "stands still", "odd scale")


def reading(before=0.3, trainable=True, gradient=0.02, in_optimizer=True, moved=0.001):
    return {"before": before, "trainable": trainable, "gradient": gradient, "in_optimizer": in_optimizer, "moved": moved}


def layer(name="0.q_proj", alpha=12.0, rank=8, scale=None, **changed):
    """As a healthy first step leaves it: B = 0 at the start, so A has gradient 0 and does not move."""
    parts = {"W": reading(0.9, False, None, False, 0.0), "A": reading(gradient=0.0, moved=0.0), "B": reading(before=0.0)}
    for key, what in changed.items():
        parts[key[0]] = parts[key[0]] | what
    return {"name": name, "alpha": alpha, "rank": rank, "scale": alpha / rank if scale is None else scale, **parts}


FROZEN = {"trainable": False, "gradient": None, "in_optimizer": False, "moved": 0.0}         # and all that follows from it
SICK = {
    "base trains": [{"W": {"trainable": True, "gradient": 0.2, "in_optimizer": True, "moved": 0.001}}, {"W": {"trainable": True}}],
    "frozen": [{"A": FROZEN, "B": FROZEN}, {"A": FROZEN}, {"B": FROZEN}, {"B": {"trainable": False}}],
    "no gradient": [{"A": {"gradient": None, "moved": 0.0}, "B": {"gradient": None, "moved": 0.0}}, {"A": {"gradient": None}}, {"B": {"gradient": None, "moved": 0.0}}],
    "both zero": [{"A": {"before": 0.0}, "B": {"gradient": 0.0, "moved": 0.0}}, {"B": {"gradient": 0.0, "moved": 0.0}}],
    "not in the optimizer": [{"A": {"in_optimizer": False}, "B": {"in_optimizer": False, "moved": 0.0}}, {"A": {"in_optimizer": False}},
                             {"B": {"in_optimizer": False, "moved": 0.0}}],
    "stands still": [{"B": {"moved": 0.0}}, {"A": {"gradient": 0.01}, "B": {"before": 0.2}}, {"A": {"gradient": 0.01, "moved": 0.0}, "B": {"before": 0.2, "moved": 0.0}}],
    "odd scale": [{"scale": 12.0}, {"scale": 0.0}, {"scale": 1.0}, {"scale": 1.51}, {"scale": -1.5}, {"scale": 8 / 12}, {"scale": 0.75}, {"scale": 3.0}],
}
WHY = {
    "base trains": "W must be frozen", "frozen": "one of A and B is not trainable", "no gradient": "one of A and B has no gradient at all",
    "both zero": "A and B both have a gradient of zero", "not in the optimizer": "one of A and B is not in the optimizer",
    "stands still": "a tensor with a gradient has not moved", "odd scale": "the scale is neither alpha / rank nor alpha / √rank", "healthy": "no link is broken",
}


def must_say(diagnose, layers, link, names, because=""):
    got = diagnose(copy.deepcopy(layers))
    said, where = got[0], list(got[1])
    assert said in (*LINKS, "healthy"), f"{said!r} is no link of the chain"
    later = LINKS.index(said) > LINKS.index(link) if said in LINKS and link in LINKS else said == "healthy"
    hint = because or (f"it went past a broken link: {WHY[link]}" if later else f"{said} is not broken here; {WHY[link]}" if link != "healthy" else "this is healthy")
    assert said == link, f"{hint} ({link} is wanted, got {said})"
    assert sorted(where) == sorted(names) or where != [each["name"] for each in layers], f"{link}: all layers were named; it is broken in {names} only"
    assert sorted(where) != sorted(names) or where == names, f"{link}: the right layers, {names}, in another order, {where}"
    assert where == names, f"{link}: broken in {names}, got {where}"


def test_a_healthy_first_step(diagnose):
    """B = 0, so A has no voice yet: its gradient is zero, and it does not move."""
    must_say(diagnose, [layer(), layer("1.q_proj")], "healthy", [], "in every healthy first step A's gradient is 0 and A does not move, because B is 0: that is no broken link")


def test_a_healthy_later_step(diagnose):
    must_say(diagnose, [layer(A={"gradient": 0.01, "moved": 0.001}, B={"before": 0.02})], "healthy", [])
    must_say(diagnose, [layer(A={"gradient": 0.01, "moved": 0.001}, B={"before": 0.02, "gradient": 0.0, "moved": 0.0})], "healthy", [],
             "A alone has a gradient: one of the two is enough")


@pytest.mark.parametrize("alpha, rank", [(12.0, 8), (16, 64), (2.0, 3), (5, 1)])
def test_two_scales_are_usual(diagnose, alpha, rank):
    for scale in (alpha / rank, alpha / math.sqrt(rank)):
        must_say(diagnose, [layer(alpha=alpha, rank=rank, scale=scale * (1 + 1e-14))], "healthy", [],
                 "alpha / rank is LoRA's scale and alpha / √rank rsLoRA's, and the last digit may be rounded: both are healthy")


@pytest.mark.parametrize("alpha", [12.0, 1e-3, 6e4])
@pytest.mark.parametrize("root", [8, math.sqrt(8)], ids=["rank", "root"])
def test_nearly_is_odd(diagnose, alpha, root):
    """The limit is relative: it is the same for small scales and for large ones."""
    for off in (1e-7, -1e-7, 3e-9, -3e-9):
        must_say(diagnose, [layer(alpha=alpha, scale=alpha / root * (1 + off))], "odd scale", ["0.q_proj"],
                 f"a relative error of {abs(off):.0e} is not rounding: at most 1e-9 is, whether the scale is small or large")
    for off in (3e-10, -3e-10):
        must_say(diagnose, [layer(alpha=alpha, scale=alpha / root * (1 + off))], "healthy", [],
                 f"a relative error of {abs(off):.0e} is rounding: up to 1e-9 is, whether the scale is small or large")


def test_small_is_not_zero(diagnose):
    must_say(diagnose, [layer(B={"before": 0.0, "moved": 1e-9})], "healthy", [], "a tensor that moved by 1e-9 has moved: 'not at all' is 0.0")
    must_say(diagnose, [layer(B={"before": 0.0, "gradient": 1e-9, "moved": 0.001})], "healthy", [], "a gradient of 1e-9 is a gradient: zero is 0.0")
    must_say(diagnose, [layer(B={"before": 0.0, "gradient": 1e-9, "moved": 0.0})], "stands still", ["0.q_proj"], "a gradient of 1e-9 is a gradient: zero is 0.0")


def test_of_w_only_one_thing_is_asked(diagnose):
    must_say(diagnose, [layer(W={"moved": 0.001})], "healthy", [], "of W only one thing is asked, whether it is trainable: what else moved it is not training")


@pytest.mark.parametrize("link", LINKS)
def test_each_link_can_break(diagnose, link):
    for place, change in enumerate(SICK[link]):
        sick = layer("1.v_proj", scale=change.get("scale"), **{key: what for key, what in change.items() if key != "scale"})
        must_say(diagnose, [layer(), sick, layer("2.q_proj")], link, ["1.v_proj"])
        must_say(diagnose, [sick], link, ["1.v_proj"])
        must_say(diagnose, [layer("b", scale=7.1) if link != "odd scale" else layer("b"), sick | {"name": "a"}, layer(), sick | {"name": "z"}], link, ["a", "z"])
        must_say(diagnose, [sick | {"name": "z"}, layer(), sick | {"name": "a"}], link, ["z", "a"])


@pytest.mark.parametrize("first", LINKS[:-1])
def test_the_first_broken_link_is_the_cause(diagnose, first):
    """Two sick layers: the one whose link comes first in the chain, wherever it stands in the list."""
    def sick(name, link):
        change = SICK[link][0]
        return layer(name, scale=change.get("scale"), **{key: what for key, what in change.items() if key != "scale"})

    for later, turned in itertools.product(LINKS[LINKS.index(first) + 1:], (False, True)):
        one, other = sick("early", first), sick("late", later)
        layers = [other, layer(), one] if turned else [one, other]
        must_say(diagnose, layers, first, ["early"], f"two links are broken, {first!r} in one layer and {later!r} in another: the first of the chain is the cause, whatever the order of layers")


def test_an_idle_w_in_the_optimizer_is_no_fault(diagnose):
    """An optimizer made before adapt() holds W. W is frozen, so nothing moves it; that A and B are missing is what hurts."""
    idle = {"in_optimizer": True}
    must_say(diagnose, [layer(W=idle)], "healthy", [], "W is in the optimizer and frozen, without a gradient: nothing moves it, and no link is broken")
    must_say(diagnose, [layer(W=idle, A={"in_optimizer": False}, B={"in_optimizer": False, "moved": 0.0})], "not in the optimizer", ["0.q_proj"],
             "the optimizer holds W, which is frozen; A and B are what it lacks")


class Ship(nn.Module):
    """Three linear layers, in a list as blocks are."""

    def __init__(self):
        super().__init__()
        self.decks = nn.ModuleList([nn.Linear(6, 10), nn.Linear(10, 10), nn.Linear(10, 5)])
        self.past = None                                                    # a deck whose weight is read past its adapter

    def forward(self, x):
        for i, deck in enumerate(self.decks):
            x = F.linear(x, deck.base.weight, deck.base.bias) if i == self.past else deck(x)
            x = x.tanh()
        return x


def examined(ship, optimizer, x, y):
    """One step on a set-up as it is; for each layer what was seen."""
    tensors = {(name, key): tensor for name, deck in ml.adapters(ship) for key, tensor in (("W", deck.base.weight), ("A", deck.A), ("B", deck.B))}
    held, before = {id(p) for group in optimizer.param_groups for p in group["params"]}, {key: t.detach().clone() for key, t in tensors.items()}

    optimizer.zero_grad()
    F.mse_loss(ship(x), y).backward()
    seen = {key: None if t.grad is None else t.grad.abs().max().item() for key, t in tensors.items()}
    optimizer.step()
    return [{"name": name, "alpha": deck.method.alpha, "rank": deck.method.rank, "scale": deck.scale} | {
        key: {"before": before[name, key].abs().max().item(), "trainable": tensors[name, key].requires_grad, "gradient": seen[name, key],
              "in_optimizer": id(tensors[name, key]) in held, "moved": (tensors[name, key].detach() - before[name, key]).abs().max().item()} for key in "WAB"}
        for name, deck in ml.adapters(ship)]


def over(ship, lr=0.01):
    return torch.optim.AdamW([p for name, p in ship.named_parameters() if name.rpartition(".")[2] in ("A", "B")], lr=lr, weight_decay=0.0)


@torch.no_grad()
def fall_ill(ship, link):
    """What people do; the optimizer that comes of it."""
    decks = dict(ml.adapters(ship))
    deck = decks["decks.1"]
    if link == "base trains":
        ship.requires_grad_(True)
        return torch.optim.AdamW(ship.parameters(), lr=0.01, weight_decay=0.0)
    if link == "frozen":
        deck.requires_grad_(False)
        return torch.optim.AdamW([p for p in ship.parameters() if p.requires_grad], lr=0.01)
    if link == "no gradient":
        ship.past = 1
    if link == "both zero":
        deck.A.zero_()
    if link == "not in the optimizer":
        return torch.optim.AdamW([p for name, p in ship.named_parameters() if "decks.1." not in name and name[-1] in "AB"], lr=0.01)
    if link == "stands still":
        return over(ship, lr=0.0)
    if link == "odd scale":
        deck.scale = deck.method.alpha
    return over(ship)


@torch.no_grad()
def cure(ship, optimizer, link, names):
    """What helps against that link, in those layers; the optimizer afterwards."""
    decks = dict(ml.adapters(ship))
    for name in names:
        deck = decks[name]
        if link == "base trains":
            deck.base.requires_grad_(False)
        if link == "frozen":
            deck.A.requires_grad_(True), deck.B.requires_grad_(True)
        if link == "no gradient":
            ship.past = None
        if link == "both zero":
            nn.init.kaiming_uniform_(deck.A, a=math.sqrt(5))
        if link == "odd scale":
            deck.scale = deck.method.alpha / deck.method.rank
    return over(ship) if link in ("frozen", "not in the optimizer", "stands still") else optimizer


@pytest.mark.parametrize("link", ["healthy", *LINKS])
def test_your_diagnosis_heals_a_real_training(diagnose, link):
    """Each set-up is really ill, the evidence really taken, and the cure is the one for what you say."""
    torch.manual_seed(0)
    ship = ml.adapt(Ship(), ml.LoRA(rank=4, alpha=6.0))
    x, y = torch.randn(16, 6), torch.randn(16, 5)
    optimizer = fall_ill(ship, link)
    for visit in range(4):
        evidence = examined(ship, optimizer, x, y)
        said, names = diagnose(evidence)
        if said == "healthy":
            break
        optimizer = cure(ship, optimizer, said, list(names))
    evidence = examined(ship, optimizer, x, y)
    trained = {name for each in evidence for name in (each["name"],) if each["A"]["moved"] and each["B"]["moved"]}
    scales = {each["scale"] for each in evidence}
    assert not any(each["W"]["trainable"] for each in evidence) and scales == {1.5} and len(trained) == 3, (
        f"a training that was ill ({link}) is still ill after the cures for what you said, last {said!r} in {list(names)}; the layers that train: {sorted(trained)}, scales {scales}")
    assert visit == (link != "healthy"), f"a training that was {'healthy' if link == 'healthy' else f'ill ({link})'} was cured as often as you said: {visit}; wanted: {int(link != 'healthy')}; last you said {said!r}"
