"""DoRA: the norms without a dense matrix, the magnitude, and what neither may touch."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import minilora as ml


def layer(method=ml.DoRA(3, alpha=5), into=40, out=30, dtype=torch.float64):
    torch.manual_seed(0)
    made = method.layer(nn.Linear(into, out).to(dtype).requires_grad_(False))
    with torch.no_grad():
        made.B.normal_(), made.magnitude.mul_(1.3)
    return made


@pytest.mark.parametrize("shape", [(40, 30), (30, 40), (7, 5)])
@pytest.mark.parametrize("fields", [{}, {"rslora": True}, {"alpha": 0.01}])
def test_the_norms_are_the_dense_matrixs(shape, fields):
    made = layer(ml.DoRA(3, **fields), *shape)
    dense = (made.base.weight + made.scale * made.B @ made.A).norm(dim=1)
    assert torch.allclose(made.row_norms(), dense, rtol=1e-12, atol=0)


def test_the_magnitude_starts_as_the_norms_of_w_one_for_each_output():
    made = ml.DoRA(3).layer(nn.Linear(40, 30))
    assert made.magnitude.shape == (30,) and torch.allclose(made.magnitude, made.base.weight.norm(dim=1), rtol=1e-6, atol=0)


def test_in_16_bits_the_norms_are_taken_in_float32():
    made = layer(dtype=torch.bfloat16)
    dense = (made.base.weight.double() + made.scale * made.B.double() @ made.A.double()).norm(dim=1)
    assert torch.allclose(made.row_norms().double(), dense, rtol=1e-5, atol=0)


class Largest(TorchDispatchMode):
    """The largest tensor that any operation makes, views of what is there not counted."""

    def __init__(self, known):
        super().__init__()
        self.known, self.numel = {p.untyped_storage().data_ptr() for p in known}, 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        out = function(*arguments, **(keywords or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in self.known:
                self.numel = max(self.numel, tensor.numel())
        return out


def test_no_tensor_of_the_weights_size_is_ever_made():
    made, x = layer(dtype=torch.float32), torch.randn(2, 40, requires_grad=True)
    with Largest(made.parameters()) as seen:
        made(x).square().sum().backward()
    assert 2 * 40 <= seen.numel < 30 * 40 / 4                                         # the batch and the factors are 80 to 120 numbers
    with Largest(made.parameters()) as seen:
        made.delta_weight()
    assert seen.numel == 30 * 40                                                      # so it would be noticed


def test_length_and_direction_are_apart():
    """Whatever A and B do, row k of W' is as long as |m_k|; twice m is twice the output, the bias aside."""
    made, x = layer(), torch.randn(4, 40, dtype=torch.float64)
    W = made.base.weight + made.delta_weight()
    assert torch.allclose(W.norm(dim=1), made.magnitude, rtol=1e-12, atol=0)
    before = made(x)
    with torch.no_grad():
        made.magnitude.mul_(2)
    assert torch.allclose(made(x) - made.base.bias, 2 * (before - made.base.bias), rtol=0, atol=1e-12)


def test_the_norm_is_a_constant_in_backward():
    """Without detaching, the gradients of A and B are others; that of m is the same."""
    made, x = layer(), torch.randn(4, 40, dtype=torch.float64)
    V = made.base.weight + made.scale * made.B @ made.A
    dense = lambda n: x @ (made.magnitude[:, None] * V / n).T + made.base.bias
    wanted, other = (torch.autograd.grad(dense(n).square().sum(), [made.A, made.B, made.magnitude], retain_graph=True)
                     for n in (V.norm(dim=1, keepdim=True).detach(), V.norm(dim=1, keepdim=True)))
    got = torch.autograd.grad(made(x).square().sum(), [made.A, made.B, made.magnitude])
    assert all(torch.allclose(one, two, rtol=1e-9, atol=1e-9) for one, two in zip(got, wanted))
    assert all((one - two).norm() > 0.05 * one.norm() for one, two in zip(got[:2], other[:2])) and torch.allclose(got[2], other[2], rtol=1e-9)


def test_a_row_of_zeros_stays_one_and_nothing_is_divided_by_zero():
    linear = nn.Linear(7, 5).requires_grad_(False)
    linear.weight[2] = 0
    made, x = ml.DoRA(3).layer(linear), torch.randn(4, 7)
    y = made(x)
    y.square().sum().backward()
    assert y.isfinite().all() and torch.equal(y[:, 2], linear.bias[2].expand(4))
    assert all(p.grad.isfinite().all() for p in (made.A, made.B, made.magnitude)) and made.delta_weight().isfinite().all()
