"""LoRA's layer against the equation written out, float64, and the closed form of its gradients."""

import copy
import math

import pytest
import torch
from torch import nn

import minilora as ml


def layer(method=ml.LoRA(rank=3, alpha=5), bias=True, dtype=torch.float64, awake=True):
    torch.manual_seed(0)
    made = method.layer(nn.Linear(7, 5, bias=bias, dtype=dtype).requires_grad_(False))
    if awake:
        nn.init.normal_(made.B)
    return made


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(7,), (4, 7), (2, 3, 7), (0, 7), (2, 0, 7)])
def test_forward_is_the_equation(bias, shape):
    lora, x = layer(bias=bias), torch.randn(shape, dtype=torch.float64)
    W = lora.base.weight + 5 / 3 * lora.B @ lora.A
    expected = x @ W.T + (lora.base.bias if bias else 0)
    got = lora(x)
    assert got.shape == expected.shape and torch.allclose(got, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("rslora, scale", [(False, 6 / 4), (True, 6 / 2)])
def test_scale_is_alpha_over_rank_or_over_its_root(rslora, scale):
    lora = layer(ml.LoRA(rank=4, alpha=6, rslora=rslora))
    assert lora.scale == scale
    assert torch.allclose(lora.delta_weight(), scale * lora.B @ lora.A, rtol=0, atol=1e-15)


def test_it_starts_as_the_base_with_a_random_and_b_zero():
    lora, x = layer(awake=False), torch.randn(4, 7, dtype=torch.float64)
    assert torch.equal(lora(x), lora.base(x))
    assert not lora.B.any() and lora.A.abs().max() <= 1 / math.sqrt(7)
    big = ml.LoRA(rank=64).layer(nn.Linear(512, 256))
    assert big.A.std().item() == pytest.approx(1 / math.sqrt(3 * 512), rel=0.02)      # U(±1/√in)


def test_gradients_are_the_closed_form_and_the_base_has_none():
    lora, x = layer(), torch.randn(6, 7, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(6, 5, dtype=torch.float64)
    lora(x).backward(upstream)
    G = upstream.T @ x.detach()                                                       # dL/dW_eff, (out, in)
    assert torch.allclose(lora.B.grad, 5 / 3 * G @ lora.A.T, rtol=0, atol=1e-12)
    assert torch.allclose(lora.A.grad, 5 / 3 * lora.B.T @ G, rtol=0, atol=1e-12)
    W = lora.base.weight + lora.delta_weight()
    assert torch.allclose(x.grad, upstream @ W, rtol=0, atol=1e-12)
    assert lora.base.weight.grad is None and lora.base.bias.grad is None


def test_at_the_start_only_b_has_a_gradient():
    lora = layer(awake=False)
    lora(torch.randn(6, 7, dtype=torch.float64)).pow(2).sum().backward()
    assert not lora.A.grad.any() and lora.B.grad.abs().min() > 0


def test_gradcheck():
    lora = layer()
    x = torch.randn(2, 3, 7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, A, B: torch.func.functional_call(lora, {"A": A, "B": B}, (x,)), (x, lora.A, lora.B))


def test_dropout_is_on_the_branch_only_and_off_in_evaluation():
    lora, x = layer(ml.LoRA(rank=3, alpha=5, dropout=0.5)), torch.randn(4, 7, dtype=torch.float64)
    lora.train()
    torch.manual_seed(3)
    got = lora(x)
    torch.manual_seed(3)
    dropped = nn.functional.dropout(x, 0.5)
    assert torch.allclose(got, lora.base(x) + 5 / 3 * dropped @ lora.A.T @ lora.B.T, rtol=0, atol=1e-12)
    assert not torch.allclose(got, lora(x))
    lora.eval()
    assert torch.allclose(lora(x), x @ (lora.base.weight + lora.delta_weight()).T + lora.base.bias, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_beside_a_16_bit_base_the_factors_are_float32(dtype):
    lora = layer(dtype=dtype)
    x = torch.randn(4, 7, dtype=dtype)
    assert lora.A.dtype == lora.B.dtype == torch.float32
    got = lora(x)
    assert got.dtype == dtype
    exact = x.double() @ (lora.base.weight.double() + lora.delta_weight().double()).T + lora.base.bias.double()
    assert torch.allclose(got.double(), exact, rtol=0.05, atol=0.05)
    got.float().sum().backward()
    assert lora.A.grad.dtype == torch.float32 and lora.A.grad.any()


def test_it_works_under_autocast():
    lora = layer(dtype=torch.float32)
    x = torch.randn(4, 7)
    with torch.autocast("cpu", torch.bfloat16):
        got = lora(x)
    assert got.dtype == torch.bfloat16 and torch.allclose(got.float(), lora(x), atol=0.1)


def test_a_copy_of_the_layer_is_independent():
    lora, x = layer(), torch.randn(4, 7, dtype=torch.float64)
    twin, expected = copy.deepcopy(lora), lora(x)
    nn.init.zeros_(twin.B)
    assert torch.equal(lora(x), expected) and torch.equal(twin(x), lora.base(x))


@pytest.mark.parametrize("rank", [0, -1, 1.0, True, "8"])
def test_a_rank_must_be_a_whole_number_of_at_least_one(rank):
    with pytest.raises(ValueError, match="rank must be a whole number of at least 1"):
        ml.LoRA(rank=rank)


def test_a_rank_above_the_layers_own_is_refused_and_equal_is_not():
    with pytest.raises(ValueError, match=r"rank 6 is above min\(in, out\) of a 7 -> 5 layer"):
        ml.LoRA(rank=6).layer(nn.Linear(7, 5))
    assert ml.LoRA(rank=5).layer(nn.Linear(7, 5)).A.shape == (5, 7)


@pytest.mark.parametrize("wrong", [{"alpha": float("nan")}, {"alpha": float("inf")}, {"dropout": 1.0}, {"dropout": -0.1}, {"dropout": float("nan")}])
def test_senseless_hyper_parameters_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        ml.LoRA(rank=2, **wrong)
