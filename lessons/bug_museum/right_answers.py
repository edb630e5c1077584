"""Other tests that are right as well, written another way: the museum lets them through."""

import io
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn


def test_01_merged_twice__in_and_out(code):
    layer = code(3, 4, 2, alpha=5).double()
    layer.B.data.fill_(0.5)
    x = torch.eye(4, dtype=torch.float64)
    want = layer(x).detach()
    for verbs in ("train", "eval train", "eval eval", "train train", "train eval"):
        for verb in verbs.split():
            getattr(layer, verb)()
        torch.testing.assert_close(layer(x).detach(), want)


def test_02_transposed_init__many_draws(code):
    share = np.mean([code(3, 50).square().mean().item() for _ in range(200)]) * 3 * 50
    assert math.isclose(share, 1, rel_tol=0.1)


def test_03_no_gradient__who_moves(code):
    net = code(4, 5, 1)
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=1.0)
    net(torch.randn(8, 5)).square().sum().backward()
    optimizer.step()
    moved = {name for name, p in net.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name in before if name.endswith("B")}


def test_04_head_wrapped__every_number(code):
    net = code(6, 4, classes=7, rank=2)
    trained = [p for p in net.head.parameters() if p.requires_grad]
    assert sorted(tuple(p.shape) for p in trained) == [(7,), (7, 4)]


def test_05_no_zero__one_zero_a_block(code):
    for _ in range(5):
        w = torch.randn(10, 16)
        w[:, 3] = 0
        back = code(w, 16)
        assert not back[:, 3].any(), back[:, 3]


def test_06_wrong_axis__square(code):
    layer = code(torch.randn(6, 6), 3)
    with torch.no_grad():
        layer.B.normal_(), layer.magnitude.uniform_(1, 2)
    torch.testing.assert_close(torch.einsum("oi,oi->o", layer.weight(), layer.weight()), layer.magnitude.flatten() ** 2)


def test_06_wrong_axis__magnitude(code):
    layer = code(torch.randn(6, 4), 2)
    nn.init.normal_(layer.B)
    row_norms = layer.weight().norm(dim=1)
    assert torch.allclose(row_norms, layer.magnitude.flatten())      # of lengths 6 and 4 on the sick one


def test_07_saved_empty__through_a_file(code):
    one, other, file = code(4, 6, 3), code(4, 6, 3), io.BytesIO()
    one.B.data.uniform_(1, 2)
    torch.save(one.save(), file)
    file.seek(0)
    other.load(torch.load(file))
    np.testing.assert_allclose(other(torch.eye(6)).detach().numpy(), one(torch.eye(6)).detach().numpy())


def test_08_tied_head__by_hand(code):
    model = code(9, 5, 3)
    model.B.data.normal_()
    E = model.embedding.weight.detach().clone()
    want = torch.tanh(E) @ (E + model.B @ model.A).T
    model.merge()
    torch.testing.assert_close(model(torch.arange(9)), want)


def test_09_wrapper_prefix__the_parameters(code):
    model = code(5, 3)
    for p in model.parameters():
        p.data.normal_()
    loaded = code.load(code(5, 3), code.save(code.wrap(model)))
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), loaded.parameters(), strict=True))


def test_10_head_left_behind__a_real_step(code):
    x, y, model = torch.randn(20, 4), torch.randint(3, (20,)), code(4, 3, 2)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    for _ in range(3):
        F.cross_entropy(model(x), y).backward()
        optimizer.step(), optimizer.zero_grad()
    torch.testing.assert_close(code(4, 3, 2).load(model.save())(x), model(x))


def test_11_scale_twice__half(code):
    layer = code(4, 6, 8, alpha=4)
    layer.A.data.fill_(1.0), layer.B.data.fill_(1.0), layer.W.data.zero_()
    assert torch.allclose(layer(torch.ones(6)), torch.tensor(6 * 8 * 0.5))
    layer.merge()
    assert torch.allclose(layer(torch.ones(6)), torch.tensor(6 * 8 * 0.5))


def test_12_dropout_on_W__drop_all(code):
    layer, x = code(5, 4, 2, 3, dropout=1.0).train(), torch.randn(9, 4)
    layer.B.data.normal_()
    torch.testing.assert_close(layer(x), x @ layer.W.T)      # the branch has nothing left to say


def test_13_forgetful_resume__stop_often(code):
    whole, often = code(width=3).train(8), code(width=3)
    for _ in range(8):
        often = code(width=3).load(often.train(1).save())
    assert (often.W - whole.W).abs().max() < 1e-5


def test_14_idle_decay__half_life(code):
    for factor, ratio in ((0, 3), (1, 3)):
        both = [nn.Parameter(torch.full((2, 2), 8.0)) for _ in "AB"]
        optimizer = code(*both, 0.1, ratio, 5 / ratio**factor)                # lr · decay = 1/2, for A and then for B
        for p in both:
            p.grad = torch.zeros_like(p)
        optimizer.step(), optimizer.step()
        torch.testing.assert_close(both[factor].data, torch.full((2, 2), 2.0))


def test_15_inverted_mask__gradients(code):
    q, k, v = torch.randn(3, 1, 5, 4)
    v.requires_grad_()
    keep = torch.tensor([[True, False, True, True, False]])
    code(q, k, v, keep).sum().backward()
    assert torch.equal(v.grad[0].abs().sum(-1) > 0, keep[0])


def test_16_product_of_deltas__telescopes(code):
    A, B = torch.randn(4, 2, 5, dtype=torch.float64), torch.randn(4, 7, 2, dtype=torch.float64)
    W = W0 = torch.randn(7, 5, dtype=torch.float64)
    for t in range(3):
        W = code(W, A[t], B[t], A[t + 1], B[t + 1], 1.5)
    torch.testing.assert_close(W - W0, 1.5 * (B[3] @ A[3] - B[0] @ A[0]))


def test_17_flipped_sign__all_ones(code):
    for seed in range(40):
        sizes = torch.linspace(0.01, 1, 30) ** 3 * 10
        sizes[seed % 30] = 1000 + 37.0 * seed
        w = sizes[:, None].expand(30, 8).contiguous()
        if (code(w, 8) < 0).any():
            pytest.fail("a positive weight came back negative")


def test_18_padding_counted__longer_padding(code):
    logits, targets, lengths = torch.randn(2, 4, 6), torch.randint(6, (2, 4)), torch.tensor([3, 4])
    longer = torch.cat([logits, torch.randn(2, 9, 6)], 1), torch.cat([targets, torch.zeros(2, 9, dtype=torch.long)], 1)
    torch.testing.assert_close(code(*longer, lengths), code(logits, targets, lengths))


def test_18_padding_counted__other_padding(code):
    logits, targets, lengths = torch.randn(3, 8, 5), torch.randint(5, (3, 8)), torch.tensor([2, 8, 5])
    before = code(logits, targets, lengths)
    for i, n in enumerate(lengths):
        logits[i, n:] = torch.randn(8 - n, 5)
    assert torch.allclose(code(logits, targets, lengths), before)


def test_19_eval_forgotten__as_in_eval(code):
    model = code(40, 8, 0.4)
    assert model.eval().sample([5], 15) == model.train().sample([5], 15)


def test_20_seed_moves_data__as_one_stack(code):
    stacks = {torch.stack(code(5, rank, seed)[1]).sum().item() for rank in (1, 3) for seed in (4, 9)}
    assert len(stacks) == 1
