"""What is true of a right answer to lesson 10."""

import copy
import gc
import itertools
import math
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

import minilora as ml
from lessons.expect import Sizes, draw, must_equal
from minilora.evidence.ledger import bytes_alive, ledger
from minilora.quant.nf4 import LEVELS

SHAPES = [(10, 13), (6, 11)]                                               # out, in: 130 and 66 weights, blocks that end in the middle of a row
LEADS = [(), (5,), (2, 3)]
each_shape = pytest.mark.parametrize("out, into", SHAPES)
each_lead = pytest.mark.parametrize("lead", LEADS)
with_and_without = pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])


class Alive(TorchDispatchMode):
    """Inside the block it notes every storage that is made there; afterwards, which of them are still alive."""

    def __init__(self):
        super().__init__()
        self.made = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        given = {t.untyped_storage().data_ptr() for t in args if isinstance(t, torch.Tensor)}
        for t in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(t, torch.Tensor) and t.untyped_storage().data_ptr() not in given:
                self.made.append((StorageWeakRef(t.untyped_storage()), t.untyped_storage().data_ptr(), t.untyped_storage().nbytes()))
        return result

    def bytes(self, *but: torch.Tensor) -> int:
        known = {t.untyped_storage().data_ptr() for t in but}
        return sum({place: size for reference, place, size in self.made if not reference.expired() and place not in known}.values())


class Naive(nn.Module):
    """A 4-bit layer as one writes it first."""

    def __init__(self, base: ml.NF4Linear):
        super().__init__()
        self.base = base

    def forward(self, x):
        return F.linear(x, self.base.dequantize(), self.base.bias)


def small_gpt(width=16, layers=2, rank=2):
    torch.manual_seed(0)
    return ml.adapt(ml.TinyGPT(ml.GPTConfig(context=12, width=width, layers=layers, heads=2)), ml.QLoRA(rank, dropout=0.0))


# naive_keeps

LAYERS = [(7, 5, True), (4, 9, False), (3, 8, True)]


@pytest.mark.parametrize("size", [4, 2])
@pytest.mark.parametrize("layers", [LAYERS, LAYERS[1:], [(6, 10, False)], []], ids=len)
def test_the_naive_form_keeps_what_dx_will_ask_for(naive_keeps, layers, size):
    got, want = naive_keeps(list(layers), size), size * sum(out * into * asked for out, into, asked in layers)
    everything, packed = size * sum(out * into for out, into, _ in layers), sum(out * into * asked for out, into, asked in layers) // 2
    known = {everything: "a layer whose x needs no gradient is counted: nobody will ask for dL/dx there, and torch does not keep its W̃",
             want // size: "these are numbers, not bytes", packed: "these are the codes: what is kept is dense, `size` bytes a number",
             size * max([out * into for out, into, asked in layers if asked], default=0): "that is the largest alone: until backward comes, all of them are held at once",
             size * sum((out + into) * asked for out, into, asked in layers): "out · in numbers in each, not out + in",
             size * sum(out * into * (not asked) for out, into, asked in layers): "it is the other way round: kept is what will be asked for"}
    assert got == want or got not in known, f"{known.get(got)} ({size} bytes a number, {layers}: {want} is right, got {got})"
    assert got == want, f"{size} bytes a number, {layers}: {want} bytes, got {got}"


@pytest.mark.parametrize("width, layers", [(16, 2), (8, 3)])
def test_a_real_model_in_the_naive_form_keeps_as_much(naive_keeps, width, layers):
    model, ids = small_gpt(width, layers), torch.arange(24).view(2, 12)
    shapes = [(layer.out_features, layer.in_features, not name.startswith("blocks.0.") or not name.endswith(("q_proj", "k_proj", "v_proj")))
              for name, layer in ml.adapters(model)]                       # the first q, k and v read what nobody trains
    by_hand = bytes_alive(model, lambda: model(ids))
    for _, layer in ml.adapters(model):
        layer.base = Naive(layer.base)
    want, got = bytes_alive(model, lambda: model(ids)) - by_hand, naive_keeps(shapes, 4)
    assert got == want, f"a GPT of {layers} blocks, width {width}: measured, the naive form keeps {want:,} bytes more than by hand, got {got:,}"


# FourBitLinearFunction

def four_bits(out, into, seed=0, dtype=torch.float64, double=False):
    return ml.quantize_nf4(draw(out, into, seed=seed, dtype=dtype), block_size=32, double=double)


def given(out, into, lead=(5,), bias=True, dtype=torch.float64):
    """x, Q, bias, g."""
    x, g = draw(*lead, into, seed=1, dtype=dtype), draw(*lead, out, seed=2, dtype=dtype)
    return x.requires_grad_(), four_bits(out, into), draw(out, seed=3, dtype=dtype).requires_grad_() if bias else None, g


def must_be_wide(got, want, what):
    """x is float64 here. What is right to seven digits, and no further, went through a narrower type."""
    if isinstance(got, torch.Tensor) and got.shape == want.shape:
        off = ((got.double() - want).abs().max() / want.abs().max()).item()
        assert not 1e-11 < off < 1e-5, f"{what} has the rounding errors of float32 ({off:.1g}), and x is float64: make W̃ and the product in x's dtype"


@each_lead
@with_and_without
@each_shape
def test_the_product_is_that_of_the_dense_weight(FourBitLinearFunction, out, into, bias, lead):
    x, Q, b, _ = given(out, into, lead, bias)
    W, plain = Q.dequantize(), 0 if b is None else b.detach()
    got = FourBitLinearFunction.apply(x, Q, b)
    must_be_wide(got, x.detach() @ W.T + plain, "the result")
    must_equal(got, x.detach() @ W.T + plain, {"the bias is missing": x.detach() @ W.T, "the bias is subtracted": x.detach() @ W.T - plain},
               f"the result, x of shape {tuple(x.shape)}, {'with' if bias else 'no'} bias")


@each_lead
@with_and_without
@each_shape
def test_x_and_the_bias_get_their_gradients(FourBitLinearFunction, out, into, bias, lead):
    x, Q, b, g = given(out, into, lead, bias)
    y = FourBitLinearFunction.apply(x, Q, b)
    assert y.requires_grad, "no gradient can flow: the result must come from apply, with no detach()"
    y.backward(g.clone(), retain_graph=True)                               # a clone: dL/dbias may be g itself, seen anew
    assert x.grad is not None, "dL/dx is None: the adapters of all layers below would learn nothing. W̃ is frozen, x is not"
    W, rows = Q.dequantize(), g.reshape(-1, out)
    must_be_wide(x.grad, g @ W, "dL/dx")
    must_equal(x.grad, g @ W, {"the bias has no part in dL/dx": g @ W + (0 if b is None else b.detach().sum())}, "dL/dx")
    if bias:
        assert b.grad is not None, "dL/dbias is None, and the bias asks for it"
        must_equal(b.grad, rows.sum(0), {"dL/dbias is the sum over all rows, not their mean": rows.mean(0), "the first row only: dL/dbias is the sum over all": rows[0]}, "dL/dbias")
    x.grad = None
    y.backward(g.clone())
    assert torch.allclose(x.grad, g @ W), "asked a second time (retain_graph=True), backward gives something else: what it needs must still be there"


@pytest.mark.parametrize("way", ["through a transpose", "from a sum, one number seen from everywhere"])
@each_shape
def test_g_need_not_be_contiguous(FourBitLinearFunction, out, into, way):
    x, Q, b, g = given(out, into, (2, 5))
    g = g if way == "through a transpose" else torch.ones_like(g)
    y = FourBitLinearFunction.apply(x, Q, b)
    try:
        (y.transpose(0, 1) * g.transpose(0, 1).contiguous() if way == "through a transpose" else y).sum().backward()
    except RuntimeError as error:
        assert "view size" not in str(error), f"g comes {way} and is not contiguous: there .view fails, .reshape does not"
        raise
    must_equal(x.grad, g @ Q.dequantize(), {}, f"dL/dx where g comes {way}")
    must_equal(b.grad, g.reshape(-1, out).sum(0), {}, f"dL/dbias where g comes {way}")


@pytest.mark.parametrize("double", [False, True], ids=["plain scales", "double-quantized scales"])
@each_shape
def test_nothing_outlives_the_product(FourBitLinearFunction, out, into, double):
    x, _, b, _ = given(out, into)
    Q = four_bits(out, into, double=double)
    with Alive() as alive:
        y = FourBitLinearFunction.apply(x, Q, b)
    left = alive.bytes(y)
    assert left < out * into * 8, f"a dense weight is still there when forward is over: {left:,} bytes, and W̃ is {out * into * 8:,}. Keep Q, and make W̃ again in backward"
    assert left == 0, f"{left:,} bytes that forward made are still there when it is over: only the result may stay"


def test_x_is_let_go(FourBitLinearFunction):
    x, Q, b, _ = given(10, 13)
    moved = x * 2
    held = weakref.ref(moved)
    y = FourBitLinearFunction.apply(moved, Q, b)
    del moved
    assert held() is None and y.requires_grad, "x is still held: only the gradient of W would ask for it, and W is frozen"


@each_shape
def test_backward_holds_nothing_either(FourBitLinearFunction, out, into):
    x, Q, b, g = given(out, into)
    y = FourBitLinearFunction.apply(x, Q, b)
    with Alive() as alive:
        y.backward(g, retain_graph=True)
    left = alive.bytes(x.grad, b.grad)
    assert left == 0, f"{left:,} bytes that backward made are still there when it is over: W̃ is {out * into * 8:,}; only the gradients may stay"


def test_what_asks_for_no_gradient_gets_none_and_costs_none(FourBitLinearFunction):
    for out, into in ((40, 30), (24, 36)):
        x, Q, b, g = given(out, into, (2,))
        y = FourBitLinearFunction.apply(x.detach(), Q, b)
        with Sizes() as watch:
            gradients = FourBitLinearFunction.backward(y.grad_fn, g)
        assert len(gradients) == 3, f"three gradients are wanted, for x, Q and bias, got {len(gradients)}"
        assert gradients[0] is None, "x asks for no gradient and gets one: look at ctx.needs_input_grad"
        assert watch.largest < out * into / 2, "x asks for no gradient, and W̃ was made in backward all the same"
        assert gradients[2].shape == (out,), f"dL/dbias: shape ({out},) is wanted, got {tuple(gradients[2].shape)}: the sum over all rows"
        y = FourBitLinearFunction.apply(x, Q, b.detach())
        gradients = FourBitLinearFunction.backward(y.grad_fn, g)
        assert gradients[0] is not None and gradients[1] is None, "x asks for its gradient, and Q has none: they are the first and the second result"
        assert gradients[2] is None, "the bias is frozen and gets a gradient: look at ctx.needs_input_grad"


@pytest.mark.parametrize("dtype, close", [(torch.float32, 1e-5), (torch.bfloat16, 0.05)], ids=str)
@pytest.mark.parametrize("stored", [torch.float32, torch.float64, torch.bfloat16], ids=lambda dtype: f"quantized from {dtype}")
def test_the_product_is_made_in_x_s_type(FourBitLinearFunction, stored, dtype, close):
    Q = four_bits(10, 13, dtype=stored)
    x, b, g = (draw(*shape, seed=seed, dtype=dtype) for seed, shape in enumerate([(5, 13), (10,), (5, 10)], start=1))
    y = FourBitLinearFunction.apply(x.requires_grad_(), Q, b.requires_grad_())
    y.backward(g)
    assert y.dtype == x.grad.dtype == b.grad.dtype == dtype, f"x is {dtype}: the result is {y.dtype}, dL/dx {x.grad.dtype}"
    W = Q.dequantize(dtype).double()
    must_equal(y.detach(), x.detach().double() @ W.T + b.detach().double(), {}, f"the result in {dtype}", close, close)
    must_equal(x.grad, g.double() @ W, {}, f"dL/dx in {dtype}", close, close)


def test_nothing_given_is_changed(FourBitLinearFunction):
    x, Q, b, g = given(10, 13)
    before = [t.detach().clone() for t in (x, b, g, Q.codes, Q.scales)]
    FourBitLinearFunction.apply(x, Q, b).backward(g)
    for name, now, was in zip(("x", "bias", "g", "the codes", "the scales"), (x, b, g, Q.codes, Q.scales), before):
        assert torch.equal(now, was), f"{name} changed: work on a copy"


# qlora_bill

KEYS = ["frozen", "trained", "gradients", "moments", "passing"]


def bill_is(got, want, model):
    trained = [p for p in model.parameters() if p.requires_grad]
    numbers, buffers = sum(p.numel() for p in trained), sum(buffer.nbytes for buffer in model.buffers())
    assert isinstance(got, dict) and sorted(got) == sorted(KEYS), f"the entries wanted are {', '.join(KEYS)}, got {got}"
    mistakes = {"frozen": {want["frozen"] + want["trained"]: "what is trained is counted under frozen too",
                           want["frozen"] - buffers: "the buffers are missing: model.parameters() does not name them, model.buffers() does"},
                "trained": {want["trained"] + want["frozen"]: "what is frozen is counted as trained: ask requires_grad"},
                "gradients": {4 * numbers: "four bytes a number are counted: a gradient has the type of its parameter", want["gradients"] + want["frozen"]: "what is frozen has no gradient"},
                "moments": {8 * numbers: "four bytes a number are counted: a moment has the type of its parameter", want["moments"] + 4 * len(trained): "AdamW's step counters are counted: they are no moments",
                            want["trained"]: "AdamW keeps two numbers for each that is trained", want["trained"] + want["frozen"]: "what is frozen has no moments"},
                "passing": {}}
    for name in KEYS:
        known = mistakes[name].get(got[name]) or ("more than there is: parameters() and buffers() of a module name those of its children too, and a shared tensor counts once"
                                                  if name in ("frozen", "trained") and got[name] > want[name] else None)
        assert got[name] == want[name] or known is None, f"{name}: {known} ({want[name]:,} is right, got {got[name]:,})"
        assert got[name] == want[name], f"{name}: {want[name]:,} bytes, got {got[name]:,}"


@pytest.mark.parametrize("width, rank", [(16, 2), (24, 3)])
def test_the_bill_is_what_a_real_step_holds(qlora_bill, width, rank):
    model = small_gpt(width, rank=rank)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer, ids = torch.optim.AdamW(trained), torch.arange(24).view(2, 12)
    got = qlora_bill(model)
    model(ids).square().mean().backward()
    optimizer.step()
    moments = sum(state[name].nbytes for state in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq"))
    frozen = ledger(model, tokens=4)[-1].frozen_bytes                        # the last line is the sum
    dense, widest = sum(layer.weight.nbytes for _, layer in ml.adapters(model)), 4 * width * width * 4
    assert not isinstance(got, dict) or got.get("passing") != dense, f"passing: all dense weights are counted, {dense:,}: by hand only one is there at a time, the largest, {widest:,}"
    assert not isinstance(got, dict) or got.get("passing") != widest // 8, "passing: that is the packed weight; what passes is dense"
    bill_is(got, {"frozen": frozen, "trained": sum(p.nbytes for p in trained), "gradients": sum(p.grad.nbytes for p in trained), "moments": moments, "passing": widest}, model)


def test_the_bill_reads_types_and_takes_a_model_of_any_kind(qlora_bill):
    base = ml.NF4Linear.of(nn.Linear(40, 30).requires_grad_(False))
    wide = ml.NF4Linear(ml.quantize_nf4(draw(40, 50, dtype=torch.float32), double=True), compute_dtype=torch.bfloat16)      # more numbers, fewer bytes
    adapters = nn.ParameterDict({"A": torch.zeros(3, 40), "B": torch.zeros(30, 3, dtype=torch.bfloat16)})
    trained = 3 * 40 * 4 + 30 * 3 * 2
    frozen = sum(t.nbytes for layer in (base, wide) for t in (*layer.parameters(), *layer.buffers()))
    want = {"frozen": frozen, "trained": trained, "gradients": trained, "moments": 2 * trained, "passing": 30 * 40 * 4}
    model = nn.ModuleList([base, wide, nn.ModuleList([adapters])])
    got = qlora_bill(model)
    assert got.get("passing") != 40 * 50 * 4, "passing: the layer with the most numbers computes in bfloat16, two bytes each: ask each layer's compute_dtype"
    bill_is(got, want, model)
    model = nn.ModuleList([wide, nn.ModuleList([adapters])])
    bill_is(qlora_bill(model), want | {"frozen": sum(t.nbytes for t in wide.buffers()), "passing": 40 * 50 * 2}, model)


def test_the_bill_counts_a_shared_tensor_once_and_a_model_without_four_bits(qlora_bill):
    one = nn.Linear(6, 6)
    frozen = nn.BatchNorm1d(6).requires_grad_(False)
    shared = nn.Linear(6, 6)
    shared.weight = one.weight
    numbers = 36 + 6 + 6
    buffers = 2 * 6 * 4 + 8
    model = nn.Sequential(one, frozen, one, shared)
    bill_is(qlora_bill(model), {"frozen": 2 * 6 * 4 + buffers, "trained": 4 * numbers, "gradients": 4 * numbers, "moments": 8 * numbers, "passing": 0}, model)


# page_in_page_out

def rounds(pages, steps):
    return list(range(pages)) * steps


@pytest.mark.parametrize("visits, room, want", [
    ([], 2, []),
    ([4], 1, [("in", 4)]),
    ([4, 4, 4], 1, [("in", 4)]),
    ([0, 1, 0, 1], 2, [("in", 0), ("in", 1)]),
    ([0, 1, 2, 0], 2, [("in", 0), ("in", 1), ("out", 1), ("in", 2)]),
    ([0, 1, 0, 2, 1], 2, [("in", 0), ("in", 1), ("out", 0), ("in", 2)]),
    ([0, 1, 0], 1, [("in", 0), ("out", 0), ("in", 1), ("out", 1), ("in", 0)]),
    ([5, 1, 2, 3, 1, 4], 3, [("in", 5), ("in", 1), ("in", 2), ("out", 2), ("in", 3), ("out", 1), ("in", 4)]),      # here each wrong rule has a log of its own
    ([7, 3, 5, 3, 7, 9, 5, 3], 3, [("in", 7), ("in", 3), ("in", 5), ("out", 7), ("in", 9)]),
], ids=str)
def test_the_log_by_hand(page_in_page_out, visits, room, want):
    got = page_in_page_out(list(visits), room)
    assert [tuple(entry) for entry in got] == want, f"visits {visits}, room for {room}: {want} is wanted, got {got}{likely(got, visits, room)}"


def log_of(visits, room, choose):
    """The log where `choose` picks the place of the page that goes, in a list ordered from the page used longest ago."""
    here, log = [], []
    for i, page in enumerate(visits):
        if page in here:
            here.remove(page)
        else:
            if len(here) == room:
                log.append(("out", here.pop(choose(here, visits[i + 1:]))))
            log.append(("in", page))
        here.append(page)
    return log


def came_first(visits, room):
    here, log = [], []
    for page in visits:
        if page not in here:
            if len(here) == room:
                log.append(("out", here.pop(0)))
            log.append(("in", page))
            here.append(page)
    return log


def came_last(visits, room):
    here, log = [], []
    for page in visits:
        if page not in here:
            if len(here) == room:
                log.append(("out", here.pop()))
            log.append(("in", page))
            here.append(page)
    return log


def likely(got, visits, room):
    """The mistake, if it is a known one; where visits are few, two mistakes may leave the same log."""
    got, right = [tuple(entry) for entry in got], log_of(visits, room, lambda here, later: -1)
    known = {"the page used longest ago goes out: in rounds that is, of those on the device, the one wanted soonest": log_of(visits, room, lambda here, later: 0),
             "the page that came in first goes out": came_first(visits, room),
             "the page that came in last goes out: one that was used since is newer": came_last(visits, room),
             "the page with the highest number goes out: numbers say nothing about use": log_of(visits, room, lambda here, later: here.index(max(here))),
             "the page with the lowest number goes out: numbers say nothing about use": log_of(visits, room, lambda here, later: here.index(min(here))),
             "a page that comes in is logged before the one that makes room for it": [entry for pair in swapped(right) for entry in pair],
             "a page that is on the device already moves nothing": [("in", page) for page in visits],
             "what goes out is not logged": [entry for entry in right if entry[0] == "in"],
             "at the end the pages stay where they are": right + [("out", page) for page in sorted({page for _, page in right})]}
    names = [name for name, log in known.items() if got == log != right]
    return ": " + ". Or: ".join(names) if names else ""


def swapped(log):
    log = list(log)
    while log:
        yield (log[1], log[0]) if log[0][0] == "out" else (log[0],)
        log = log[2:] if log[0][0] == "out" else log[1:]


@pytest.mark.parametrize("pages, room", [(6, 4), (5, 2), (7, 6), (4, 4), (3, 5), (4, 1)])
def test_in_rounds_no_other_choice_moves_less(page_in_page_out, pages, room):
    """Belady's choice looks into the future and lets go of what is wanted last; nothing moves less."""
    visits = rounds(pages, 4)
    got = page_in_page_out(visits, room)
    best = log_of(visits, room, lambda here, later: max(range(len(here)), key=lambda i: later.index(here[i]) if here[i] in later else len(later)))
    moved, least = (sum(kind == "in" for kind, _ in log) for log in (got, best))
    assert moved == least, f"{pages} pages, room for {room}, 4 steps: {moved} pages came in, and {least} would do{likely(got, visits, room)}"


@pytest.mark.parametrize("room", [1, 3, 4])
def test_a_log_of_chance_visits_adds_up(page_in_page_out, room):
    visits = torch.randint(0, 6, (60,), generator=torch.Generator().manual_seed(room)).tolist()
    got = [tuple(entry) for entry in page_in_page_out(list(visits), room)]
    assert got == log_of(visits, room, lambda here, later: -1), f"60 visits, room for {room}: the page used last goes out, and only where there is no room{likely(got, visits, room)}"


@pytest.mark.parametrize("numbers, page, room", [(60, 10, 4), (21, 7, 2)])
def test_minilora_s_paged_adamw_moves_as_many_bytes(page_in_page_out, numbers, page, room):
    """m and v of a page are 8 bytes a number; what came in and what went out is counted."""
    w = nn.Parameter(torch.zeros(numbers))
    with pytest.warns(UserWarning, match="simulated"):
        optimizer = ml.PagedAdamW([w], budget=8 * page * room, page=page)
    for step in range(3):
        w.grad = torch.ones(numbers)
        optimizer.step()
    visits = rounds(numbers // page, 3)
    got = page_in_page_out(visits, room)
    assert 8 * page * len(got) == optimizer.moved, (f"{numbers // page} pages, room for {room}, 3 steps: ml.PagedAdamW moved {optimizer.moved // (8 * page)} times a page, "
                                                    f"the log has {len(got)}{likely(got, visits, room)}")


# left_after_merge

def nearest(w, block_size):
    """nf4(w), slowly: each block by its largest, each weight at the nearest level, the lower one at a tie."""
    flat, levels = w.double().flatten().clone(), LEVELS.double()
    for start in range(0, len(flat), block_size):
        block = flat[start:start + block_size]
        scale = block.abs().max().float()
        for i, value in enumerate(block.float()):
            block[i] = (LEVELS[(value / scale - levels).abs().argmin()] * scale).double()
    return flat.view(w.shape)


def on_levels(out=4, into=16, seed=0):
    """A weight that four bits hold exactly, in blocks of 32: W̃."""
    return nearest(draw(out, into, seed=seed), 32)


def pair_is(got, want, mistakes, what, close=1e-5):
    assert isinstance(got, tuple) and len(got) == 2 and all(isinstance(number, float) for number in got), f"two Python floats are wanted, got {got!r}: use .item()"
    for name, wrong in mistakes.items():
        for place in (0, 1):
            if wrong[place] is not None and abs(wrong[place] - want[place]) > 10 * close:
                assert abs(got[place] - wrong[place]) > close, f"{name} ({what}: {'what is left' if place == 0 else 'the distance'} is {want[place]:.4f}, got {got[place]:.4f})"
    for name, mine, right in zip(("what is left of dW", "the distance"), got, want):
        assert abs(mine - right) <= close * max(1, abs(right)), f"{what}: {name} is {right:.5f}, got {mine:.5f}"


@pytest.mark.parametrize("out, into, block_size, strength", [(8, 12, 32, 0.3), (5, 26, 64, 0.05), (6, 11, 32, 0.9)])
@pytest.mark.parametrize("base", ["the original weight", "a 4-bit base's W̃"])
def test_what_is_left_by_the_formula(left_after_merge, base, out, into, block_size, strength):
    W, dW = draw(out, into, seed=1), strength * draw(out, into, seed=2)
    W = W if base == "the original weight" else nearest(W, block_size)
    N, M = nearest(W, block_size), nearest(W + dW, block_size)
    D = M - N
    along, whole = (D * dW).sum(), dW.square().sum()
    want = (along / whole).item(), ((D - dW).norm() / dW.norm()).item()
    mistakes = {
        "that is the share of ‖dW‖, not of ‖dW‖²: project, do not take an angle": ((along / (D.norm() * dW.norm())).item(), None),
        "D's length says nothing about its direction: take ⟨D, dW⟩": ((D.norm() / dW.norm()).item(), None),
        "dW itself is compared, quantized alone: what is stored is W + dW": (((nearest(dW, block_size) * dW).sum() / whole).item(), ((nearest(dW, block_size) - dW).norm() / dW.norm()).item()),
        "D is counted from W, and before the merge the layer multiplied by nf4(W)": (((M - W) * dW).sum().div(whole).item(), ((M - W - dW).norm() / dW.norm()).item()),
        "divide by ‖dW‖², not by ‖dW‖": ((along / dW.norm()).item(), ((D - dW).norm() / whole).item()),
        "divide by ‖dW‖²: the unit is the update, not what arrived": ((along / D.square().sum()).item(), ((D - dW).norm() / D.norm()).item()),
        "the distance is a norm, with its root": (None, want[1]**2),
        "the distance is counted in lengths of W, it is wanted in lengths of dW": (None, ((D - dW).norm() / W.norm()).item()),
        "this is what is lost": (1 - want[0], None),
    }
    if block_size != 64:
        far = nearest(W + dW, 64) - nearest(W, 64)
        mistakes["blocks of 64 were made, quantize_nf4's default: hand it block_size"] = ((far * dW).sum() / whole).item(), ((far - dW).norm() / dW.norm()).item()
    pair_is(left_after_merge(W, dW, block_size), want, mistakes, f"into {base}, {out}x{into}, blocks of {block_size}")


def test_what_is_left_where_one_weight_crosses_and_one_does_not(left_after_merge):
    """By hand: level 8 goes half a step up and stays (a tie goes down), level 9 goes a little more than half a step and jumps."""
    W = LEVELS.double().repeat(4).view(4, 16)                              # every block has 1 in it, so scales stay
    dW = torch.zeros_like(W)
    up_8, up_9 = (LEVELS[9] - LEVELS[8]).item(), (LEVELS[10] - LEVELS[9]).item()
    dW[1, 8], dW[2, 9] = 0.4 * up_8, 0.6 * up_9
    whole = (0.4 * up_8)**2 + (0.6 * up_9)**2
    want = up_9 * 0.6 * up_9 / whole, math.sqrt((0.4 * up_8)**2 + (0.4 * up_9)**2) / math.sqrt(whole)
    pair_is(left_after_merge(W, dW, 32), want, {}, "two weights, one crosses the middle")


def test_a_small_update_of_a_4_bit_base_is_gone_and_of_the_original_is_not(left_after_merge):
    """The same dW, a hundredth of W long, away from the largest weight of each block. From a level nothing reaches the next; between levels some do, and as many as make up for it."""
    original = draw(256, 256, seed=1)
    W = ml.quantize_nf4(original).dequantize()
    dW = 0.01 * draw(256, 256, seed=2)
    dW[W.view(-1, 64).abs().amax(1, keepdim=True).expand(-1, 64).reshape(256, 256) == W.abs()] = 0
    gone, kept = left_after_merge(W, dW, 64), left_after_merge(original, dW, 64)
    assert abs(gone[0]) < 0.01 and abs(gone[1] - 1) < 0.05, f"into W̃ nothing arrives: 0 and 1 are wanted, got {gone}"
    assert 0.8 < kept[0] < 1.2 and kept[1] > 2, f"into the original weight dW arrives, in much noise: about 1 and above 2 are wanted, got {kept}"


def test_types_may_differ_and_the_sum_is_made_in_the_wider(left_after_merge):
    W, dW = on_levels(8, 16), 0.2 * draw(8, 16, seed=3)
    for one, other in itertools.product((torch.float64, torch.float32, torch.bfloat16), repeat=2):
        a, b = W.to(one), dW.to(other)
        want = left_after_merge(a.double(), b.double(), 32)
        pair_is(left_after_merge(a, b, 32), want, {}, f"W in {one}, dW in {other}; make both float32 or wider first", 1e-7)


# QLoRALayer

def layer_of(QLoRALayer, out=10, into=13, rank=3, alpha=2.0, bias=True, dtype=torch.float32):
    """The layer with B not zero, and the package's with the same numbers; and the layer's base from a second, equal linear."""
    torch.manual_seed(out)
    linear = nn.Linear(into, out, bias=bias, dtype=dtype)
    method = ml.QLoRA(rank, alpha=alpha, dropout=0.0)
    want, layer = method.layer(copy.deepcopy(linear).requires_grad_(False)), QLoRALayer(linear, rank, alpha)
    names = [name for name, p in layer.named_parameters() if p.requires_grad]
    assert sorted(names) == ["A", "B"], f"A and B are trained and nothing else; here it is {', '.join(names) or 'nothing'}"
    with torch.no_grad():
        layer.A.copy_(draw(rank, into, seed=1)), layer.B.copy_(draw(out, rank, seed=2))
        want.A.copy_(layer.A), want.B.copy_(layer.B)
    return layer, want


LAYERS_OF = [(10, 13, 3, 2.0), (6, 11, 2, 9.0)]
each_layer = pytest.mark.parametrize("out, into, rank, alpha", LAYERS_OF)


@each_lead
@with_and_without
@each_layer
def test_the_layer_says_what_minilora_s_does(QLoRALayer, out, into, rank, alpha, bias, lead):
    layer, want = layer_of(QLoRALayer, out, into, rank, alpha, bias)
    x, s = draw(*lead, into, seed=4, dtype=torch.float32), alpha / rank
    base, branch = want.base(x).detach(), (x @ want.A.T @ want.B.T).detach()
    must_equal(layer(x).detach(), base + s * branch, {"the scale is missing: alpha / rank": base + branch, "the scale is alpha, without rank": base + alpha * branch,
                                                      "the scale is alpha / √rank, as in rsLoRA; here it is alpha / rank": base + alpha / rank**0.5 * branch, "the branch is missing": base,
                                                      "the base is missing": s * branch, "the scale is upside down": base + branch / s,
                                                      "the scale covers the base too": s * (base + branch)}, f"y, x of shape {tuple(x.shape)}", 1e-4, 1e-4)


@each_layer
def test_the_layer_starts_as_its_base(QLoRALayer, out, into, rank, alpha):
    torch.manual_seed(0)
    linear = nn.Linear(into, out)
    four, x = ml.NF4Linear.of(copy.deepcopy(linear)), draw(5, into, dtype=torch.float32)
    layer = QLoRALayer(linear, rank, alpha)
    assert not layer.B.any(), "B starts at zero, so that the layer starts as its 4-bit base"
    assert layer.A.shape == (rank, into) and layer.B.shape == (out, rank), f"A (rank, in) and B (out, rank) are wanted, got {tuple(layer.A.shape)} and {tuple(layer.B.shape)}"
    assert layer.A.any(), "A is zero as well as B: neither would ever hear a gradient"
    assert torch.equal(layer(x), four(x)), "with B = 0 the layer must say what its 4-bit base says, to the bit"


def test_A_is_drawn_as_LoRA_draws_it(QLoRALayer):
    torch.manual_seed(0)
    for into in (256, 64):
        A = QLoRALayer(nn.Linear(into, 8), 64, 2.0).A.detach()
        bound = 1 / math.sqrt(into)
        assert A.abs().max() <= bound and A.abs().max() > 0.98 * bound, f"A comes from U(-1/√in, 1/√in), here ±{bound:.4f}; the largest is {A.abs().max():.4f}"
        assert abs(A.std() / (bound / math.sqrt(3)) - 1) < 0.05, "A comes from a uniform distribution, whose standard deviation is the bound / √3"
        assert (A[0] - A[1]).any(), "the rows of A are alike"


@with_and_without
@each_layer
def test_the_layer_keeps_four_bits_and_nothing_dense(QLoRALayer, out, into, rank, alpha, bias):
    linear = nn.Linear(into, out, bias=bias)
    W = weakref.ref(linear.weight)
    layer = QLoRALayer(linear, rank, alpha)
    want = ml.QLoRA(rank, alpha=alpha).layer(copy.deepcopy(linear).requires_grad_(False))
    stored, right = (sum(t.nbytes for t in (*m.parameters(), *m.buffers())) for m in (layer, want))
    assert stored < 4 * out * into, f"the layer stores {stored} bytes, and a dense W alone is {4 * out * into}: keep codes and scales only"
    assert stored == right, f"codes, scales in 8 bits, bias, A and B are {right} bytes, the layer stores {stored} (double-quantized scales are what ml.NF4Linear.of makes)"
    del linear
    assert W() is None or gc.collect() >= 0 and W() is None, "the dense W is still held by the layer, in an attribute, a list, a module"
    x = draw(4, into, dtype=torch.float32).requires_grad_()
    with Alive() as alive:
        y = layer(x)
    z, branch = 4 * rank * 4, 4 * out * 4
    assert alive.bytes(y) <= z + branch + 4 * rank * (into + out) and alive.bytes(y) < 4 * out * into, "a dense weight is still alive when forward is over: each layer's would wait there for backward"


@each_layer
def test_x_A_and_B_get_their_gradients(QLoRALayer, out, into, rank, alpha):
    layer, want = layer_of(QLoRALayer, out, into, rank, alpha)
    x = draw(5, into, seed=4, dtype=torch.float32)
    gradients = []
    for m in (layer, want):
        leaf = x.clone().requires_grad_()
        m(leaf).mul(draw(5, out, seed=5, dtype=torch.float32)).sum().backward()
        gradients.append((leaf.grad, m.A.grad, m.B.grad))
    for name, got, right in zip(("x", "A", "B"), *gradients):
        assert got is not None, f"no gradient reaches {name}"
        must_equal(got, right, {}, f"the gradient of {name}", 1e-4, 1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
@each_layer
def test_the_layer_takes_types_that_are_not_its_own(QLoRALayer, out, into, rank, alpha, dtype):
    for stored in (torch.float32, dtype):
        layer, want = layer_of(QLoRALayer, out, into, rank, alpha, dtype=stored)
        assert layer.A.dtype == layer.B.dtype == torch.float32, f"A and B are in float32 whatever the linear is, here {layer.A.dtype} and {layer.B.dtype} beside {stored}"
        x = draw(5, into, seed=4, dtype=dtype)
        y = layer(x)
        assert y.dtype == dtype, f"x is {dtype}, and the result {y.dtype}"
        must_equal(y.detach(), want.base(x).detach().double() + alpha / rank * (x.double() @ want.A.T.double() @ want.B.T.double()).detach(), {}, f"y in {dtype}", 0.05, 0.05)


def test_training_moves_A_and_B_and_not_one_bit_of_the_base(QLoRALayer):
    """All twelve layers of a small GPT, eight steps: the loss of ml.QLoRA to the last digits, and codes that have not moved."""
    theirs = small_gpt()
    mine = copy.deepcopy(theirs)
    method = next(layer.method for _, layer in ml.adapters(theirs))
    torch.manual_seed(0)
    plain = ml.TinyGPT(ml.GPTConfig(context=12, width=16, layers=2, heads=2)).requires_grad_(False)      # the numbers that small_gpt() begins with
    for name, their in ml.adapters(theirs):
        block, _, own = name.rpartition(".")
        layer = QLoRALayer(plain.get_submodule(name), method.rank, method.alpha)
        with torch.no_grad():
            layer.A.copy_(their.A)
        setattr(mine.get_submodule(block), own, layer)
    before = {name: tensor.clone() for name, tensor in mine.named_buffers()}
    ids, targets, losses = torch.arange(24).view(2, 12) * 7 % 50, torch.arange(1, 25).view(2, 12) * 7 % 50, {}
    for who, model in (("mine", mine), ("theirs", theirs)):
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
        for _ in range(8):
            loss = ml.next_byte_loss(model, ids, targets)
            losses.setdefault(who, []).append(loss.item())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    assert losses["mine"][-1] < losses["mine"][0] - 0.01, f"eight steps, and the loss went from {losses['mine'][0]:.3f} to {losses['mine'][-1]:.3f}"
    off = max(abs(a - b) for a, b in zip(losses["mine"], losses["theirs"]))
    assert off < 1e-3, f"over eight steps the loss is up to {off:.2g} away from that of ml.QLoRA"
    for name, tensor in mine.named_buffers():
        assert torch.equal(tensor, before[name]), f"{name} changed in training: codes and scales stand still"


@with_and_without
@each_layer
def test_merged_is_dense_and_says_the_same(QLoRALayer, out, into, rank, alpha, bias):
    layer, want = layer_of(QLoRALayer, out, into, rank, alpha, bias)
    dense = layer.merged()
    assert type(dense) is nn.Linear, f"a dense nn.Linear is wanted, got {type(dense).__name__}: merging into four bits loses the update"
    assert (dense.bias is not None) == bias, "the bias is there where the linear had one, and only there"
    W, product = want.base.dequantize(), (want.B @ want.A).detach()
    must_equal(dense.weight.detach(), W + alpha / rank * product, {
        "dW is missing: this is the base": W, "the scale is missing: alpha / rank": W + product,
        "the scale is alpha / √rank, as in rsLoRA; here it is alpha / rank": W + alpha / rank**0.5 * product, "W̃ is missing: this is dW": alpha / rank * product, "dW is subtracted": W - alpha / rank * product,
        "W̃ + dW went through four bits again": ml.quantize_nf4(W + alpha / rank * product, double=True).dequantize(),
        "this is dW quantized": W + ml.quantize_nf4(alpha / rank * product).dequantize()}, "the merged weight", 1e-5, 1e-5)
    x = draw(5, into, seed=4, dtype=torch.float32)
    must_equal(dense(x).detach(), layer(x).detach(), {"the bias is missing": dense(x).detach() - (0 if want.bias is None else want.bias.detach())} if bias else {}, "what the merged layer says", 1e-4, 1e-4)


def test_merged_is_a_copy_and_leaves_the_layer_alone(QLoRALayer):
    layer, _ = layer_of(QLoRALayer)
    before = {name: tensor.detach().clone() for name, tensor in layer.state_dict().items()}
    asks = {name: p.requires_grad for name, p in layer.named_parameters()}
    x = draw(5, 13, seed=4, dtype=torch.float32)
    said = layer(x).detach()
    dense = layer.merged()
    with torch.no_grad():
        dense.weight.zero_()
        dense.bias.zero_()
    for name, tensor in layer.state_dict().items():
        assert torch.equal(tensor, before[name]), f"{name} changed with the merged layer: the bias too must be a copy"
    assert torch.equal(layer(x), said), "after merging the layer says something else"
    assert {name: p.requires_grad for name, p in layer.named_parameters()} == asks, "after merging other parameters are trained than before"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_merged_has_the_type_of_the_linear_and_is_rounded_once(QLoRALayer, dtype):
    for out, into, rank, alpha in LAYERS_OF:
        layer, want = layer_of(QLoRALayer, out, into, rank, alpha, dtype=dtype)
        dense = layer.merged()
        assert dense.weight.dtype == dense.bias.dtype == dtype, f"the linear was {dtype}, the merged one is {dense.weight.dtype}, its bias {dense.bias.dtype}"
        once = (want.base.dequantize(torch.float32) + alpha / rank * want.B.float() @ want.A.float()).detach().to(dtype)
        if dtype == torch.bfloat16:
            twice = want.base.dequantize(dtype) + (alpha / rank * want.B.float() @ want.A.float()).detach().to(dtype)
            must_equal(dense.weight.detach(), once, {"rounded before adding: make the sum in float32, round it once": twice}, "the merged weight in bfloat16", 5e-3, 1e-3)
            share = (dense.weight == once).double().mean().item()
            assert share > 0.98, f"{1 - share:.0%} of the weights are rounded differently: make the sum in float32, and round once"
        else:
            must_equal(dense.weight.detach(), once, {}, "the merged weight in float64", 1e-5, 1e-5)
