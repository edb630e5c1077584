"""LoRA-FA: the bytes that backward need not keep, a frozen A, and the projection of the later version."""

import pytest
import torch
from torch import nn

import minilora as ml


def kept_bytes(method, dropout_input):
    """What autograd holds after the forward pass of one layer, 512 tokens of width 1024, parameters not counted."""
    torch.manual_seed(0)
    layer = method.layer(nn.Linear(1024, 768).requires_grad_(False)).train()
    parameters = {p.untyped_storage().data_ptr() for p in layer.parameters()}
    held = {}

    def pack(tensor):
        held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = layer(torch.randn(512, 1024, requires_grad=dropout_input))
    assert y.requires_grad
    return sum(size for pointer, size in held.items() if pointer not in parameters)


@pytest.mark.parametrize("method, dropout_input, expected", [
    (ml.LoRA(8), False, 2_113_536), (ml.LoRAFA(8), False, 16_384),                        # x and x Aᵀ; x Aᵀ alone
    (ml.LoRAFA(8, projection=True), False, 16_384),
    (ml.LoRA(8, dropout=0.1), True, 4_210_688), (ml.LoRAFA(8, dropout=0.1), True, 2_113_536),   # the mask is as large as x
])
def test_the_bytes_kept_for_backward(method, dropout_input, expected):
    assert kept_bytes(method, dropout_input) == expected


def test_a_does_not_move_and_is_in_no_group(tiny, ids):
    method = ml.LoRAFA(rank=3)
    ml.adapt(tiny, method)
    before = {name: layer.A.clone() for name, layer in ml.adapters(tiny)}
    assert {id(p) for group in method.parameter_groups(tiny, 0.1) for p in group["params"]} == {id(layer.B) for _, layer in ml.adapters(tiny)}
    ml.finetune(tiny, method, lambda step: (ids[:, :-1], ids[:, 1:]), 3, 0.1, weight_decay=0.1, progress=False)
    assert all(torch.equal(layer.A, before[name]) and layer.B.any() and layer.A.grad is None for name, layer in ml.adapters(tiny))


@pytest.mark.parametrize("fields", [{"alpha": 5}, {"alpha": 5, "rslora": True}])
def test_the_projected_step_is_the_full_gradient_on_the_row_space_of_a(fields):
    """s · ĝ A = G Aᵀ (A Aᵀ)⁻¹ A: a step of B moves W_eff as a step of W would, within what A can reach."""
    torch.manual_seed(0)
    method = ml.LoRAFA(rank=3, projection=True, **fields)
    model = nn.Sequential(nn.Linear(7, 5).double())
    ml.adapt(model, method, ["0"])
    layer, x = model[0], torch.randn(11, 7, dtype=torch.float64)
    with torch.no_grad():
        layer.B.normal_()
    upstream = torch.randn(11, 5, dtype=torch.float64)
    model(x).backward(upstream)
    g = layer.B.grad.clone()
    method.before_step(model, 0)
    G, A = upstream.T @ x, layer.A
    assert torch.allclose(layer.B.grad, g @ torch.linalg.inv(A @ A.T) / method.scale**2, rtol=0, atol=1e-10)
    onto = A.T @ torch.linalg.inv(A @ A.T) @ A                                        # (in, in), a projection
    assert torch.allclose(method.scale * layer.B.grad @ A, G @ onto, rtol=0, atol=1e-10)
    assert (G @ onto - G).abs().max() > 0.1                                           # and not the full gradient itself


def test_without_projection_the_gradient_is_left_alone(tiny, ids, wake):
    method = ml.LoRAFA(rank=3)
    wake(ml.adapt(tiny, method))
    ml.next_byte_loss(tiny, ids[:, :-1], ids[:, 1:]).backward()
    before = {name: layer.B.grad.clone() for name, layer in ml.adapters(tiny)}
    method.before_step(tiny, 0)
    assert all(torch.equal(layer.B.grad, before[name]) for name, layer in ml.adapters(tiny))


def test_a_rank_deficient_a_does_not_blow_up():
    """(A Aᵀ) has no inverse then; its pseudo-inverse projects on what there is."""
    method = ml.LoRAFA(rank=3, projection=True)
    model = ml.adapt(nn.Sequential(nn.Linear(7, 5)), method, ["0"])
    with torch.no_grad():
        model[0].A[2] = model[0].A[1]
    model(torch.randn(11, 7)).square().sum().backward()
    method.before_step(model, 0)
    assert model[0].B.grad.isfinite().all() and model[0].B.grad.abs().max() < 1e5


def test_the_projection_is_used_in_training(ids, tiny):
    import copy
    plain, projected = copy.deepcopy(tiny), tiny
    for model, method in ((plain, ml.LoRAFA(rank=3)), (projected, ml.LoRAFA(rank=3, projection=True))):
        ml.finetune(model, method, lambda step: (ids[:, :-1], ids[:, 1:]), 3, 0.01, progress=False)
    pairs = list(zip(ml.adapters(plain), ml.adapters(projected)))
    assert all(torch.equal(one.A, other.A) for (_, one), (_, other) in pairs)
    assert any((one.B - other.B).abs().max() > 1e-3 for (_, one), (_, other) in pairs)
