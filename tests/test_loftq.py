"""LoftQ and QPiSSA: how near they start to W, at every scale; the two lines of the loop, written out again; what cannot be undone."""

import copy

import pytest
import torch
from torch import nn

import minilora as ml

BOTH = pytest.mark.parametrize("method", [ml.LoftQ, ml.QPiSSA])


def linear(out=48, inp=72, bias=True, seed=0):
    torch.manual_seed(seed)
    return nn.Linear(inp, out, bias=bias)


def normal(size=512):
    layer = nn.Linear(size, size, bias=False)
    layer.weight.data = torch.randn(size, size, generator=torch.Generator().manual_seed(0))
    return layer


def decaying(size=256, power=0.98):
    """A weight whose singular values fall off, as those of trained layers do."""
    torch.manual_seed(0)
    U, V = (torch.linalg.qr(torch.randn(size, size, dtype=torch.float64))[0] for _ in range(2))
    layer = nn.Linear(size, size, bias=False)
    layer.weight.data = (U * power ** torch.arange(size) @ V.T).float()
    return layer


def start_error(layer, method):
    """‖W − (Q + s B A)‖ / ‖W‖ of one adapted layer."""
    adapted = method.layer(copy.deepcopy(layer))
    W = layer.weight.detach().double()
    return ((adapted.base.dequantize(torch.float64) + adapted.delta_weight().double() - W).norm() / W.norm()).item()


@pytest.mark.parametrize("method, error", [
    (ml.QLoRA(16, dropout=0.0, double=False), 0.0921), (ml.LoftQ(16), 0.0868), (ml.LoftQ(16, iterations=5), 0.0788),
    (ml.QPiSSA(16), 0.0867), (ml.QPiSSA(16, iterations=5), 0.0779),
])
def test_the_start_is_nearer_to_w_than_qloras(method, error):
    assert start_error(normal(), method) == pytest.approx(error, abs=5e-4)


def test_where_singular_values_fall_off_qpissa_gains_most():
    """Its factors take the part of W that is largest, and four bits hold a rest that is small."""
    layer = decaying()
    plain, loftq, qpissa = (start_error(layer, method) for method in (ml.QLoRA(64, double=False), ml.LoftQ(64, iterations=5), ml.QPiSSA(64, iterations=5)))
    assert qpissa < 0.5 * loftq < 0.5 * plain


@BOTH
@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("alpha", [0.5, 1, 8, 16, 100])
def test_every_alpha_starts_at_the_same_place(method, alpha, rslora):
    layer = linear()
    reference = method(8, alpha=8, iterations=2).layer(copy.deepcopy(layer))
    adapted = method(8, alpha=alpha, rslora=rslora, iterations=2).layer(copy.deepcopy(layer))
    assert torch.equal(adapted.base.codes, reference.base.codes)
    assert torch.allclose(adapted.delta_weight(), reference.delta_weight(), rtol=0, atol=1e-6)
    assert torch.allclose(adapted.A.norm(), adapted.B.norm())                      # the scale is shared out evenly


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("iterations", [1, 3])
def test_the_loop_is_the_papers(iterations, double):
    """Written out with torch.linalg.svd and quantize_nf4, for s = 1, with block sizes and shapes that leave tails."""
    layer, W = linear(50, 73), linear(50, 73).weight.detach().double()

    def best(M):
        U, S, Vt = torch.linalg.svd(M, full_matrices=False)
        return U[:, :4] @ torch.diag(S[:4]) @ Vt[:4]

    def nf4(M):
        return ml.quantize_nf4(M, 32, double).dequantize(torch.float64)

    loftq = torch.zeros_like(W)
    for _ in range(iterations):
        Q = nf4(W - loftq)
        loftq = best(W - Q)
    adapted = ml.LoftQ(4, alpha=4, iterations=iterations, block_size=32, double=double).layer(copy.deepcopy(layer))
    assert torch.equal(adapted.base.dequantize(torch.float64), Q) and torch.allclose(adapted.delta_weight().double(), loftq, rtol=0, atol=1e-6)

    Q = torch.zeros_like(W)
    for _ in range(iterations):
        pissa = best(W - Q)
        Q = nf4(W - pissa)
    adapted = ml.QPiSSA(4, iterations=iterations, block_size=32, double=double).layer(copy.deepcopy(layer))
    assert torch.equal(adapted.base.dequantize(torch.float64), Q) and torch.allclose(adapted.delta_weight().double(), pissa, rtol=0, atol=1e-6)


@BOTH
@pytest.mark.parametrize("shape", [(48, 72), (72, 48)])
def test_the_layer_is_lora_on_q(method, shape):
    layer = linear(*shape)
    adapted = method(5, alpha=3).layer(copy.deepcopy(layer))
    x = torch.randn(4, shape[1])
    with torch.no_grad():
        adapted.A.add_(0.1), adapted.B.sub_(0.2)
        expected = nn.functional.linear(x, adapted.base.dequantize() + adapted.scale * adapted.B @ adapted.A, layer.bias)
    assert adapted.scale == 3 / 5 and torch.allclose(adapted(x), expected, atol=1e-5)
    assert adapted.A.shape == (5, shape[1]) and adapted.B.shape == (shape[0], 5) and isinstance(adapted.base, ml.NF4Linear)
    assert torch.equal(adapted.base.bias, layer.bias)


@BOTH
def test_there_is_no_way_back_and_it_says_so(method):
    model = ml.adapt(nn.Sequential(linear(), nn.ReLU(), linear(16, 48)), method(4), ["0", "2"])
    before = {key: t.clone() for key, t in model.state_dict().items()}
    with pytest.raises(ValueError, match="the dense W is gone; load the model again"):
        ml.unload(model)
    assert all(torch.equal(t, before[key]) for key, t in model.state_dict().items())
    logits = model(torch.ones(2, 72))
    assert torch.allclose(ml.merge(model)(torch.ones(2, 72)), logits, atol=1e-5) and type(model[0]) is nn.Linear


@BOTH
@pytest.mark.parametrize("options, message", [
    ({"iterations": 0}, "iterations must be"), ({"iterations": 1.5}, "iterations must be"), ({"alpha": 0}, "alpha must be"), ({"alpha": -1.0}, "alpha must be"),
    ({"block_size": 16}, "block_size must be one of"), ({"double": "yes"}, "double must be"), ({"rank": 0}, "rank must be"), ({"rank": "4"}, "rank must be"),
])
def test_bad_settings_are_refused(method, options, message):
    with pytest.raises(ValueError, match=message):
        method(**{"rank": 4} | options)


@BOTH
def test_what_cannot_be_adapted_leaves_the_model_alone(method):
    model = nn.Sequential(linear(), linear(16, 48))
    for rank, message in ((17, "1: .*rank"), (4, "1: .*not finite")):
        if rank == 4:
            model[1].weight.data[2, 3] = float("inf")
        with pytest.raises(ValueError, match=message):
            ml.adapt(model, method(rank), ["0", "1"])
        assert all(type(layer) is nn.Linear for layer in model)


def test_qpissas_alpha_is_its_rank():
    assert ml.QPiSSA(12).alpha == 12 and ml.QPiSSA(12).scale == 1 and ml.QPiSSA(12, alpha=6).scale == 0.5
