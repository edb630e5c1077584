"""What is true of a right answer to lesson 07."""

import copy
import math

import pytest
import torch
from torch import nn

import minilora as ml
from lessons.expect import Sizes, draw, must_equal

CASES = [(7, 5, 2, 3.0), (4, 9, 3, 2.0)]                                # out, in, rank, alpha: s is 1.5, then 2/3
each_case = pytest.mark.parametrize("out, into, rank, alpha", CASES)


# output_importance

@each_case
@pytest.mark.parametrize("lead", [(), (6,), (2, 3)])
def test_importance_is_what_the_update_says(output_importance, lead, out, into, rank, alpha):
    x, A, B, s = draw(*lead, into, seed=1), draw(rank, into, seed=2), draw(out, rank, seed=3), alpha / rank
    got, says = output_importance(x, A, B, s), x @ (s * B @ A).T
    assert isinstance(got, float), f"a Python float is wanted, got {type(got).__name__}: .item()"
    mistakes = {
        "this is a norm: its square is wanted, the sum of all squares": says.norm(),
        "the scale is missing: dW = s · B A": (says / s).square().sum(),
        "the scale is not squared: it is inside dW": says.square().sum() / s,
        "the sum over all rows is wanted, not the mean": says.square().sum() / max(1, math.prod(lead)),
        "this is the mean of all numbers; the sum is wanted": says.square().mean(),
        "this is ‖dW‖², which never looks at x: what counts is what dW says on data": (s * B @ A).square().sum(),
        "the sum is squared; sum the squares": says.sum().square(),
    }
    for name, wrong in mistakes.items():
        assert not math.isclose(got, wrong.item(), rel_tol=1e-9) or math.isclose(wrong.item(), says.square().sum().item(), rel_tol=1e-9), name
    assert math.isclose(got, says.square().sum().item(), rel_tol=1e-9), f"Σ ‖dW x‖² is {says.square().sum():.6g}, got {got:.6g}"


def test_importance_never_forms_dw(output_importance):
    x, A, B = draw(2, 900), draw(3, 900, seed=1), draw(800, 3, seed=2)
    with Sizes() as made:
        output_importance(x, A, B, 0.5)
    assert made.largest < 800 * 900 // 4, f"dW was formed, {made.largest:,} numbers: multiply x by Aᵀ first, then by Bᵀ"


# importance_shares

def test_shares_sum_to_one_and_keep_their_names(importance_shares):
    g = {"v": 3.0, "q": 1.0, "k": 0.0, "o": 0.5}
    got = importance_shares(g)
    assert isinstance(got, dict) and list(got) == list(g), f"one share a layer, by name and in the order given: {list(g)}, got {got!r:.80}"
    assert math.isclose(sum(got.values()), 1.0), f"shares sum to 1: divide each g by the sum of all, not by the largest; these sum to {sum(got.values()):.3f}"
    assert all(math.isclose(got[name], g[name] / 4.5) for name in g), f"I = g / Σ g, got {got}"


def test_shares_of_tiny_updates_are_shares_all_the_same(importance_shares):
    got = importance_shares({"a": 1e-30, "b": 3e-30})
    assert math.isclose(got["b"], 0.75), f"only the ratio counts, however small the updates are after a short warm-up (no eps in the sum): {got}"


@pytest.mark.parametrize("g", [{"q": 0.0, "v": 0.0}, {"q": 0.0}])
def test_shares_of_nothing_are_refused(importance_shares, g):
    try:
        got = importance_shares(g)
    except ValueError as error:
        assert "warm-up" in str(error), f"the error should say what to do, a warm-up; it says {error}"
        return
    except ZeroDivisionError:
        pytest.fail("0 / 0: at B = 0 every g is 0. Say so with a ValueError that names the warm-up", pytrace=False)
    pytest.fail(f"at B = 0 every g is 0, and no layer can be compared: raise a ValueError that says so; got {got}", pytrace=False)


# share_until

@pytest.mark.parametrize("shares, threshold, want, why", [
    ([0.125, 0.5, 0.125, 0.25], 0.75, [1, 3], "0.5 + 0.25 reach 0.75 exactly, and that is enough"),
    ([0.125, 0.5, 0.125, 0.25], 0.76, [0, 1, 3], "0.5 + 0.25 do not reach 0.76; of the two with 0.125 the earlier one goes first"),
    ([0.125, 0.5, 0.125, 0.25], 0.5, [1], "one layer reaches 0.5"),
    ([0.125, 0.5, 0.125, 0.25], 0.01, [1], "at least one layer is needed to reach any threshold, and it is the most important one"),
    ([0.25, 0.25, 0.25, 0.25], 0.5, [0, 1], "all equal: the earlier ones go first"),
    ([0.5, 0.25, 0.25], 0.75, [0, 1], "0.25 and 0.25 tie: the earlier one"),
    ([0.0, 0.25, 0.0, 0.75], 0.875, [1, 3], "layers that say nothing are not needed"),
    ([0.0, 0.25, 0.75], 1.0, [0, 1, 2], "at threshold 1 all layers keep theirs, also the one whose share is 0"),
    ([0.75, 0.25, 0.0, 0.0, 0.0], 1.0, [0, 1, 2, 3, 4], "at threshold 1 all layers keep theirs"),
    ([1.0], 0.9, [0], "a single layer")])
def test_share_until_the_threshold_is_reached(share_until, shares, threshold, want, why):
    got = share_until(list(shares), threshold)
    assert isinstance(got, list), f"a list of indices is wanted, got {type(got).__name__}"
    assert len(set(shares)) < len(shares) or sorted(got) != sorted(set(range(len(shares))) - set(want)), "these are the layers that do not keep their pair"
    assert got == want or sorted(got) != want, f"ascending order is wanted: {want}, got {got}"
    assert got == want, f"{why}: shares {shares}, threshold {threshold} keep {want}, got {got}"


def test_share_until_by_importance_and_not_by_place(share_until):
    shares = [i / 55 for i in (1, 2, 3, 4, 5, 6, 7, 8, 9, 10)]
    assert share_until(shares, 0.5) == [6, 7, 8, 9], "the largest shares first: 10 + 9 + 8 of 55 are not yet half, with 7 they are"


# share_pair

def pairs(count, out=4, into=6, rank=2):
    torch.manual_seed(0)
    layers = []
    for _ in range(count):
        layer = nn.Module()
        layer.A, layer.B = nn.Parameter(torch.randn(rank, into)), nn.Parameter(torch.randn(out, rank))
        layers.append(layer)
    return layers


@pytest.mark.parametrize("count, kept", [(5, [1, 3]), (4, [0]), (3, [2])])
def test_pair_is_one_and_the_same(share_pair, count, kept):
    layers = pairs(count)
    before = [(layer.A, layer.B, layer.A.detach().clone(), layer.B.detach().clone()) for layer in layers]
    returned = share_pair(layers, list(kept))
    assert returned is None, "nothing is returned: the layers themselves are changed"
    rest = [i for i in range(count) if i not in kept]
    for i in kept:
        assert layers[i].A is before[i][0] and layers[i].B is before[i][1], f"layer {i} is kept: its own pair must stay"
    first = rest[0]
    for i in rest:
        same = layers[i].A is layers[first].A and layers[i].B is layers[first].B
        copied = layers[i].A is not layers[first].A and torch.equal(layers[i].A, layers[first].A)
        assert not copied, "these are copies: equal today, apart after one step. Assign the Parameter itself"
        assert same, f"layers {first} and {i} are to share both A and B"
    assert layers[first].A is before[first][0] and layers[first].B is before[first][1], "the shared pair is that of the first layer that is not kept"
    assert torch.equal(layers[first].A, before[first][2]) and torch.equal(layers[first].B, before[first][3]), "no number changes: only who holds which pair"
    trained = {id(p) for p in nn.ModuleList(layers).parameters()}
    assert len(trained) == 2 * (len(kept) + 1), f"an optimizer should see {len(kept) + 1} pairs, it sees {len(trained) / 2:g}"


def test_pair_where_all_are_kept(share_pair):
    layers = pairs(3)
    before = [(layer.A, layer.B) for layer in layers]
    share_pair(layers, [0, 1, 2])
    assert all(layer.A is A and layer.B is B for layer, (A, B) in zip(layers, before)), "all are kept, so nothing is shared"


# shared_gradient

@each_case
@pytest.mark.parametrize("count", [1, 3])
def test_gradient_of_a_shared_pair_is_a_sum(shared_gradient, count, out, into, rank, alpha):
    s = alpha / rank
    A, B = draw(rank, into, seed=1).requires_grad_(), draw(out, rank, seed=2).requires_grad_()
    effective = [draw(out, into, seed=10 + i) + s * B @ A for i in range(count)]
    for W in effective:
        W.retain_grad()
    sum((draw(4, into, seed=20 + i) @ W.T).tanh().square().sum() for i, W in enumerate(effective)).backward()
    Gs = [W.grad for W in effective]
    got = shared_gradient([G.clone() for G in Gs], A.detach(), B.detach(), s)
    assert isinstance(got, tuple) and len(got) == 2, "two tensors are wanted: dL/dA, then dL/dB"
    assert got[0].shape != B.shape or A.shape == B.shape, "the two are in the wrong order: dL/dA comes first"
    mistakes = lambda right: {"the scale is missing": right / s, "the scale is squared": right * s} | ({
        "this is the mean: the gradients of the layers add up": right / count} if count > 1 else {})
    first = {"only the first layer is heard": s * B.T.detach() @ Gs[0], "only the last layer is heard": s * B.T.detach() @ Gs[-1]} if count > 1 else {}
    must_equal(got[0], A.grad, mistakes(A.grad) | first, "dL/dA")
    must_equal(got[1], B.grad, mistakes(B.grad), "dL/dB")


# drop_count

@pytest.mark.parametrize("kinds, rank, want, why", [
    ([(7, 5, 4, 2)], 3, 3 * 12 * 3, "two pairs of their own and one for the other two"),
    ([(7, 5, 4, 4)], 3, 3 * 12 * 4, "all four are kept: no shared pair is left over"),
    ([(7, 5, 4, 3)], 2, 2 * 12 * 4, "three of their own, and the fourth layer alone has the shared one"),
    ([(4, 9, 6, 1), (9, 4, 6, 6), (4, 4, 6, 5)], 2, 2 * (13 * 2 + 13 * 6 + 8 * 6), "each kind by itself"),
    ([(768, 768, 12, 5), (768, 768, 12, 7)], 8, 8 * 1536 * 14, "RoBERTa-base's q and v at rank 8, 5 and 7 of 12 kept"),
    ([], 8, 0, "no layers")])
def test_count_of_own_pairs_and_a_shared_one(drop_count, kinds, rank, want, why):
    got = drop_count(list(kinds), rank)
    assert isinstance(got, int), f"a whole number is wanted, got {type(got).__name__}"
    total = sum(rank * (out + into) * kept for out, into, _, kept in kinds)
    assert got != total or got == want, "the shared pair is missing from the count"
    product = sum(rank * out * into * min(kept + 1, layers) for out, into, layers, kept in kinds)
    assert got != product or got == want, "a pair has rank · (out + in) numbers, not rank · out · in"
    assert got == want, f"{want:,} numbers are wanted, got {got:,}: {why}"


# price_of_taking_out

def small():
    torch.manual_seed(0)
    model = ml.adapt(ml.TinyGPT(ml.GPTConfig(context=16, width=16, layers=2, heads=2)), ml.LoRA(rank=2, alpha=3.0)).double()
    with torch.no_grad():
        for i, (_, layer) in enumerate(ml.adapters(model)):
            layer.B.copy_(0.5 * draw(*layer.B.shape, seed=i))
    ids = torch.randint(256, (3, 12), generator=torch.Generator().manual_seed(1))

    def loss(model):
        with torch.no_grad():
            return nn.functional.cross_entropy(model(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).item()

    return model, loss


@pytest.mark.parametrize("chosen", [slice(None), slice(7, 4, -1)])
def test_price_is_measured_one_by_one(price_of_taking_out, chosen):
    model, loss = small()
    names = [name for name, _ in ml.adapters(model)][chosen]
    there, before, seen = dict(ml.adapters(model)), loss(model), []

    def evaluate(given):
        seen.append(given)
        return loss(given)

    got = price_of_taking_out(model, list(names), evaluate)
    assert all(given is model for given in seen), "evaluate was given a copy: take the adapter out of the model itself, in place, and put it back"
    assert dict(ml.adapters(model)) == there, "the adapters are not all in their places afterwards: put each back before the next is taken out"
    want = {}
    for name in names:
        silent = copy.deepcopy(model)
        with torch.no_grad():
            silent.get_submodule(name).B.zero_()
        want[name] = loss(silent) - before
    assert isinstance(got, dict) and set(got) == set(names), f"one price for each of the {len(names)} names, got {got!r:.60}"
    assert not all(math.isclose(got[name], want[name] + before, abs_tol=1e-12) for name in names), "this is the loss without it; the price is what that is more than before"
    assert not all(math.isclose(got[name], -want[name], abs_tol=1e-12) for name in names), "the sign: a layer that is missed has a price above zero"
    for name in names:
        assert math.isclose(got[name], want[name], abs_tol=1e-12), f"without {name} the loss is {want[name]:+.6f}, you say {got[name]:+.6f}: is only this one out, all others in?"


def test_price_of_a_top_level_layer(price_of_taking_out):
    torch.manual_seed(0)
    model = ml.adapt(nn.Sequential(nn.Linear(5, 3), nn.Tanh(), nn.Linear(3, 2)), ml.LoRA(rank=1), ["0"]).double()
    nn.init.normal_(model[0].B)
    x = draw(4, 5)
    got = price_of_taking_out(model, ["0"], lambda model: model(x).square().sum().item())
    with ml.disabled(model):
        without = model(x).square().sum().item()
    assert not math.isclose(got["0"], model(x).square().sum().item() - without, rel_tol=1e-9), "the sign: a layer that is missed has a price above zero"
    assert math.isclose(got["0"], without - model(x).square().sum().item(), rel_tol=1e-9), "a name without a dot is a child of the model itself: get_submodule('')"


def test_price_when_the_measurement_fails(price_of_taking_out):
    model, loss = small()
    there, names, calls = dict(ml.adapters(model)), [name for name, _ in ml.adapters(model)], []

    def breaks(model):
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("out of memory")
        return loss(model)

    try:
        price_of_taking_out(model, names, breaks)
    except NotImplementedError:                                         # a RuntimeError too: the stub, not the measurement
        raise
    except RuntimeError as error:
        assert "out of memory" in str(error), f"the error of evaluate must reach the caller, not another one: {error}"
    else:
        pytest.fail("evaluate raised an error, and it was swallowed: let it go on to the caller", pytrace=False)
    assert dict(ml.adapters(model)) == there, "evaluate raised an error, and the adapter that was out has stayed out: try … finally"
