"""PiSSA: it starts from the best rank-r part of W, with W kept."""

import pytest
import torch
from torch import nn

import minilora as ml


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


def test_both_factors_have_gradients_from_the_first_step():
    made = layer(ml.PiSSA(3))
    made(torch.randn(4, 9, dtype=torch.float64)).square().sum().backward()
    assert made.A.grad.any() and made.B.grad.any() and not made.A_0.requires_grad and not made.B_0.requires_grad
