"""The bug museum's own tests: each passes on healthy code and fails on sick code."""

import torch
import torch.nn.functional as F
from torch import nn


def test_01_merged_twice(code):
    layer, x = code(7, 5, 2, alpha=3), torch.randn(4, 5)
    nn.init.normal_(layer.B)                             # at B = 0 there is nothing to count twice
    y = layer(x)
    for mode in (True, False, False, True, True, False):
        layer.train(mode)
        assert torch.allclose(layer(x), y, atol=1e-4)


def test_02_transposed_init(code):
    for rank, into in ((4, 400), (64, 100)):
        A = code(rank, into)
        assert A.shape == (rank, into)
        assert abs(A.std() * (3 * into) ** 0.5 - 1) < 0.1


def test_03_no_gradient(code):
    net = code(blocks=3, width=6, rank=2)
    net(torch.randn(4, 6)).sum().backward()              # data as they come: they ask for no gradient
    assert all(p.grad is not None for p in net.parameters() if p.requires_grad)


def test_04_head_wrapped(code):
    net = code(5, 9, classes=4, rank=2)
    assert sum(p.numel() for p in net.head.parameters() if p.requires_grad) == 9 * 4 + 4


def test_05_no_zero(code):
    w = torch.randn(12, 32)
    w[torch.rand(12, 32) < 0.3] = 0.0
    assert (code(w, 32)[w == 0] == 0).all()


def test_06_wrong_axis(code):
    W = torch.randn(8, 5)
    layer = code(W, rank=2)
    nn.init.normal_(layer.B)                             # at B = 0 any axis will do; m is still what W's rows were
    assert torch.allclose(layer.weight().norm(dim=1), W.norm(dim=1), atol=1e-4)


def test_07_saved_empty(code):
    trained, x = code(7, 5, rank=2), torch.randn(4, 5)
    nn.init.normal_(trained.B)
    assert torch.equal(code(7, 5, rank=2).load(trained.save())(x), trained(x))


def test_08_tied_head(code):
    model, ids = code(11, 6, rank=2), torch.arange(11)
    nn.init.normal_(model.B)
    before = model(ids)
    model.merge()
    assert torch.allclose(model(ids), before, atol=1e-4)


def test_09_wrapper_prefix(code):
    model, x = code(6, rank=2), torch.randn(4, 6)
    for p in model.parameters():
        nn.init.normal_(p)
    for wrapped in (code.wrap(model), code.wrap(code.wrap(model))):
        assert torch.equal(code.load(code(6, rank=2), code.save(wrapped))(x), model(x))


def test_10_head_left_behind(code):
    trained, x = code(5, classes=3, rank=2), torch.randn(4, 5)
    for p in trained.parameters():
        if p.requires_grad:
            nn.init.normal_(p)                           # as if all of them had been trained
    assert torch.equal(code(5, classes=3, rank=2).load(trained.save())(x), trained(x))


def test_11_scale_twice(code):
    layer, x = code(7, 5, 2, alpha=9), torch.randn(4, 5)
    nn.init.normal_(layer.B)
    y = x @ layer.W.T + 9 / 2 * (x @ layer.A.T) @ layer.B.T
    assert torch.allclose(layer(x), y, atol=1e-3)
    layer.merge()
    assert torch.allclose(layer(x), y, atol=1e-3)


def test_12_dropout_on_W(code):
    layer, x = code(7, 5, 2, alpha=3, dropout=0.5), torch.randn(20, 5)
    assert torch.allclose(layer.train()(x), x @ layer.W.T, atol=1e-5)


def test_13_forgetful_resume(code):
    whole, first = code().train(9), code().train(5)
    assert torch.allclose(code().load(first.save()).train(4).W, whole.W, atol=1e-5)


def test_14_idle_decay(code):
    A, B = nn.Parameter(torch.ones(2, 5)), nn.Parameter(torch.ones(7, 2))
    optimizer = code(A, B, lr=0.01, ratio=4, weight_decay=0.5)
    A.grad, B.grad = torch.zeros_like(A), torch.zeros_like(B)      # with None the optimizer would pass them by
    optimizer.step()
    assert torch.allclose(A, torch.tensor(1 - 0.01 * 0.5)) and torch.allclose(B, torch.tensor(1 - 4 * 0.01 * 0.5))


def test_15_inverted_mask(code):
    q, k, v = torch.randn(3, 2, 6, 4)
    keep = torch.arange(6) < torch.tensor([[4], [5]])
    other = torch.randn(2, 6, 4)
    moved = [torch.where(keep[..., None], each, other) for each in (k, v)]
    assert torch.allclose(code(q, *moved, keep), code(q, k, v, keep), atol=1e-5)


def test_16_product_of_deltas(code):
    W, A, A2 = torch.randn(7, 5), *torch.randn(2, 2, 5)
    B, B2 = torch.randn(2, 7, 2)
    assert torch.allclose(code(W, A, B, A2, B2, 0.7), W + 0.7 * (B2 @ A2 - B @ A), atol=1e-4)


def test_17_flipped_sign(code):
    for _ in range(30):                                  # one matrix is a coin toss
        w = torch.randn(40, 16) * torch.logspace(-3, 3, 40)[:, None]
        assert (code(w, 16) * w >= 0).all()


def test_18_padding_counted(code):
    logits, targets, lengths = torch.randn(3, 8, 5), torch.randint(5, (3, 8)), torch.tensor([2, 8, 5])
    each = [F.cross_entropy(logits[i, :n], targets[i, :n], reduction="sum") for i, n in enumerate(lengths)]
    assert torch.allclose(code(logits, targets, lengths), sum(each) / lengths.sum(), atol=1e-5)


def test_19_eval_forgotten(code):
    model = code(50, 16, dropout=0.5)
    for mode in (True, False):
        model.train(mode)
        assert model.sample([3, 1], 20) == model.sample([3, 1], 20)
        assert model.training == mode


def test_20_seed_moves_data(code):
    _, batches = code(6, rank=2, seed=0)
    for rank, seed in ((2, 1), (5, 0), (5, 1)):
        _, others = code(6, rank, seed)
        assert all(torch.equal(one, other) for one, other in zip(batches, others, strict=True))
