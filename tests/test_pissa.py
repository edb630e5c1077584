"""PiSSA: it starts from the best rank-r part of W, with W kept."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import minilora as ml
from minilora.methods.pissa import AddUpdate


def layer(method, into=9, out=6):
    torch.manual_seed(0)
    return method.layer(nn.Linear(into, out).double().requires_grad_(False))


@pytest.mark.parametrize("shape", [(9, 6), (6, 9)])
@pytest.mark.parametrize("method", [ml.PiSSA(3), ml.PiSSA(3, alpha=5), ml.PiSSA(3, alpha=0.5, rslora=True)])
def test_s_b0_a0_is_the_best_part_of_rank_r(method, shape):
    """Eckart and Young: what is left has the singular values of W from the r-th on, and no others."""
    made = layer(method, *shape)
    W, part = made.base.weight, made.scale * made.B_0 @ made.A_0
    values = torch.linalg.svdvals(W)
    assert torch.linalg.matrix_rank(part) == 3
    assert torch.allclose(torch.linalg.svdvals(W - part), torch.cat([values[3:], torch.zeros(3)]), atol=1e-12)
    assert torch.allclose(made.A_0.norm(dim=1), made.B_0.norm(dim=0), atol=1e-12)       # √S on either side
    assert torch.equal(made.A, made.A_0) and torch.equal(made.B, made.B_0)


def test_without_alpha_the_scale_is_one():
    assert layer(ml.PiSSA(3)).scale == 1.0 and ml.PiSSA(3).alpha == 3.0
    assert layer(ml.PiSSA(3, alpha=6)).scale == 2.0


def test_it_is_lora_on_the_residual():
    """The paper's own form: W − s · B₀A₀ frozen, s · B A added."""
    made, x = layer(ml.PiSSA(3, alpha=5)), torch.randn(4, 9, dtype=torch.float64)
    with torch.no_grad():
        made.A.add_(torch.randn_like(made.A))
        made.B.add_(torch.randn_like(made.B))
    residual = made.base.weight - made.scale * made.B_0 @ made.A_0
    assert torch.allclose(made(x), x @ (residual + made.scale * made.B @ made.A).T + made.base.bias, atol=1e-12)
    assert torch.linalg.matrix_rank(made.delta_weight()) == 6                          # 2r


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_it_is_silent_at_the_start_to_the_bit(dtype, dropout):
    """In 16 bits too, with dropout too, and with a W whose principal part is large: nothing has to cancel."""
    torch.manual_seed(0)
    linear = nn.Linear(48, 32).to(dtype).requires_grad_(False)
    linear.weight.mul_(30)
    made, x = ml.PiSSA(8, alpha=5, dropout=dropout).layer(linear).train(), torch.randn(7, 48).to(dtype)
    assert torch.equal(made(x), linear(x)) and not made.delta_weight().any()


def test_a_small_step_survives_16_bits():
    """One step in, what the layer adds is near what float64 says of it; as the difference of two large parts it would be lost."""
    torch.manual_seed(0)
    made = ml.PiSSA(8).layer(nn.Linear(48, 32).to(torch.bfloat16).requires_grad_(False))
    with torch.no_grad():
        made.base.weight.zero_(), made.base.bias.zero_()                               # leaves what is added, alone
        made.A.add_(1e-3 * torch.randn_like(made.A)), made.B.add_(1e-3 * torch.randn_like(made.B))
    x = torch.randn(64, 48).bfloat16()
    exact = x.double() @ (made.scale * (made.B.double() @ made.A.double() - made.B_0.double() @ made.A_0.double())).T
    assert (made(x).double() - exact).norm() < 0.01 * exact.norm()
    apart = [F.linear(F.linear(x, A.bfloat16()), B.bfloat16()).double() for A, B in ((made.A, made.B), (made.A_0, made.B_0))]
    assert (made.scale * (apart[0] - apart[1]) - exact).norm() > 0.2 * exact.norm()


@pytest.mark.parametrize("rows", [(5,), (2, 3), ()])
def test_gradients_by_finite_differences(rows):
    made, x = layer(ml.PiSSA(3, alpha=5)), torch.randn(*rows, 9, dtype=torch.float64, requires_grad=True)
    with torch.no_grad():
        made.A.add_(torch.randn_like(made.A)), made.B.add_(torch.randn_like(made.B))
    y = torch.randn(*rows, 6, dtype=torch.float64, requires_grad=True)
    call = lambda y, x, A, B: AddUpdate.apply(y, x, A, B, made.A_0, made.B_0, made.scale)
    assert torch.autograd.gradcheck(call, (y, x, made.A, made.B))
    with pytest.raises(RuntimeError, match="once_differentiable"):
        out = call(y, x, made.A, made.B)
        grad, = torch.autograd.grad(out.square().sum(), x, create_graph=True)
        grad.sum().backward()


def test_both_factors_have_gradients_from_the_first_step():
    made = layer(ml.PiSSA(3))
    made(torch.randn(4, 9, dtype=torch.float64)).square().sum().backward()
    assert made.A.grad.any() and made.B.grad.any() and not made.A_0.requires_grad and not made.B_0.requires_grad
