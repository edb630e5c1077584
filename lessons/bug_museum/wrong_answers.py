"""Tests that look like tests: a plausible one for each exhibit, and what the museum says to it."""

import torch
import torch.nn.functional as F
from torch import nn

from lessons import provokes

WALKS_BY, OTHER_COAT, ON_HEALTHY, HOW = "it passes on the sick code", "in another coat", "it fails on the healthy code", "test what the code does, not how"


@provokes(WALKS_BY)
def test_01_merged_twice__asleep(code):
    layer, x = code(7, 5, 2, 3), torch.randn(4, 5)      # B = 0
    y = layer(x)
    assert torch.allclose(layer.eval().eval()(x), y)


@provokes(OTHER_COAT)
def test_01_merged_twice__only_eval(code):
    layer, x = code(7, 5, 2, 3), torch.randn(4, 5)
    nn.init.normal_(layer.B)
    y = layer(x)
    assert torch.allclose(layer.eval().eval()(x), y, atol=1e-4)


@provokes(HOW)
def test_01_merged_twice__looks_at_W(code):
    layer = code(7, 5, 2, 3)
    nn.init.normal_(layer.B)
    W, dW = layer.W.data.clone(), 1.5 * layer.B.data @ layer.A.data
    layer.eval(), layer.eval()
    assert torch.allclose(layer.W, W + dW, atol=1e-4)


@provokes(HOW)
def test_02_transposed_init__bounds(code):
    assert 0.9 / 20 < code(50, 400).abs().max() <= 1 / 20


@provokes(WALKS_BY)
def test_02_transposed_init__square(code):
    assert abs(code(50, 50).std() * 150**0.5 - 1) < 0.1


@provokes(WALKS_BY)
def test_03_no_gradient__data_that_ask(code):
    net = code(3, 6, 2)
    net(torch.randn(4, 6, requires_grad=True)).sum().backward()
    assert all(p.grad is not None for p in net.parameters() if p.requires_grad)


@provokes(OTHER_COAT)
def test_03_no_gradient__one_block(code):
    net = code(3, 6, 2)
    net(torch.randn(4, 6)).sum().backward()
    assert net.blocks[1].B.grad is not None


@provokes(ON_HEALTHY)
def test_03_no_gradient__not_zero(code):
    net = code(3, 6, 2)
    net(torch.randn(4, 6)).sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in net.parameters() if p.requires_grad)     # A's is zero while B is


@provokes(HOW)
def test_04_head_wrapped__type(code):
    assert type(code(5, 9, 4, 2).head) is nn.Linear


@provokes(OTHER_COAT)
def test_04_head_wrapped__bias(code):
    assert any(p.requires_grad and p.shape == (4,) for p in code(5, 9, 4, 2).head.parameters())


@provokes(OTHER_COAT)
def test_05_no_zero__all_zero(code):
    assert (code(torch.zeros(4, 32), 32) == 0).all()


@provokes(OTHER_COAT)
def test_05_no_zero__lopsided(code):
    w = torch.cat([torch.zeros(8, 16), torch.rand(8, 16)], 1)      # nothing below zero: the smallest is zero, and exact
    assert (code(w, 32)[:, :16] == 0).all()


@provokes(WALKS_BY)
def test_06_wrong_axis__asleep(code):
    W = torch.randn(8, 5)
    assert torch.allclose(code(W, 2).weight(), W, atol=1e-5)


@provokes("before an assert of yours could fail")
def test_06_wrong_axis__compares_too_early(code):
    layer = code(torch.randn(8, 5), 2)
    nn.init.normal_(layer.B)
    apart = (layer.weight().norm(dim=1) - layer.magnitude.flatten()).abs().max()         # lengths 8 and 5 on the sick one
    assert apart < 1e-5


@provokes(OTHER_COAT)
def test_06_wrong_axis__shape(code):
    assert code(torch.randn(8, 5), 2).magnitude.numel() == 8


@provokes(OTHER_COAT)
def test_07_saved_empty__not_empty(code):
    assert code(7, 5, 2).save()


@provokes(WALKS_BY)
def test_07_saved_empty__asleep(code):
    layer, x = code(7, 5, 2), torch.randn(4, 5)
    assert torch.equal(code(7, 5, 2).load(layer.save())(x), layer(x))


@provokes(HOW)
def test_07_saved_empty__names(code):
    assert sorted(code(7, 5, 2).save()) == ["A", "B"]


@provokes(WALKS_BY)
def test_08_tied_head__head_alone(code):
    model = code(11, 6, 2)
    nn.init.normal_(model.B)
    want = model.head.weight.data + model.B.data @ model.A.data
    model.merge()
    assert torch.allclose(model.head.weight, want)


@provokes(HOW)
def test_08_tied_head__address(code):
    model = code(11, 6, 2)
    there = model.embedding.weight.data_ptr()
    model.merge()
    assert model.embedding.weight.data_ptr() == there != model.head.weight.data_ptr()


@provokes(HOW)
def test_08_tied_head__untied(code):
    model = code(11, 6, 2)
    model.merge()
    assert model.head.weight is not model.embedding.weight


@provokes(HOW)
def test_08_tied_head__embedding_stays(code):
    model = code(11, 6, 2)
    nn.init.normal_(model.B)
    E = model.embedding.weight.detach().clone()
    model.merge()
    assert torch.equal(E, model.embedding.weight)


@provokes(HOW)
def test_09_wrapper_prefix__names(code):
    model = code(6, 2)
    assert sorted(code.save(code.wrap(model))) == sorted(code.save(model))


@provokes(OTHER_COAT)
def test_09_wrapper_prefix__tag(code):
    model, x = code(6, 2), torch.randn(4, 6)
    nn.init.normal_(model.up.weight)
    saved = code.save(code.wrap(model))
    assert not any(name.startswith("module.") for name in saved) or torch.equal(code.load(code(6, 2), saved)(x), model(x))


@provokes(HOW)
def test_10_head_left_behind__names(code):
    assert {"head.weight", "head.bias"} <= set(code(5, 3, 2).save())


@provokes(OTHER_COAT)
def test_10_head_left_behind__weight(code):
    trained = code(5, 3, 2)
    assert torch.equal(code(5, 3, 2).load(trained.save()).head.weight, trained.head.weight)


@provokes(WALKS_BY)
def test_10_head_left_behind__adapter(code):
    trained = code(5, 3, 2)
    nn.init.normal_(trained.B)
    assert torch.equal(code(5, 3, 2).load(trained.save()).B, trained.B)


@provokes(WALKS_BY)
def test_11_scale_twice__alpha_is_rank(code):
    layer, x = code(7, 5, 2, 2), torch.randn(4, 5)
    nn.init.normal_(layer.B)
    y = layer(x)
    layer.merge()
    assert torch.allclose(layer(x), y, atol=1e-3)


@provokes(OTHER_COAT)
def test_11_scale_twice__merge_alone(code):
    layer = code(7, 5, 2, 9)
    nn.init.normal_(layer.B)
    want = layer.W.data + 4.5 * layer.B.data @ layer.A.data
    layer.merge()
    assert torch.allclose(layer.W, want, atol=1e-3)


@provokes(WALKS_BY)
def test_12_dropout_on_W__in_eval(code):
    layer, x = code(7, 5, 2, 3, 0.5), torch.randn(20, 5)
    assert torch.allclose(layer.eval()(x), x @ layer.W.T, atol=1e-5)


@provokes("it returned something and asserted nothing")
def test_12_dropout_on_W__returned(code):
    layer, x = code(7, 5, 2, 3, 0.5), torch.randn(20, 5)
    return torch.allclose(layer.train()(x), x @ layer.W.T, atol=1e-5)


@provokes(ON_HEALTHY)
def test_12_dropout_on_W__awake(code):
    layer, x = code(7, 5, 2, 3, 0.5), torch.randn(20, 5)
    nn.init.normal_(layer.B)
    y = x @ layer.W.T + 1.5 * (x @ layer.A.T) @ layer.B.T
    assert torch.allclose(layer.train()(x), y, atol=1e-4)


@provokes(WALKS_BY)
def test_13_forgetful_resume__no_step_after(code):
    first = code().train(5)
    assert torch.equal(code().load(first.save()).W, first.W)


@provokes(OTHER_COAT)
def test_13_forgetful_resume__any_state(code):
    assert code().load(code().train(5).save()).optimizer.state_dict()["state"]


@provokes(WALKS_BY)
def test_14_idle_decay__defaults(code):
    A, B = nn.Parameter(torch.ones(2, 5)), nn.Parameter(torch.ones(7, 2))
    assert code(A, B, 0.01, 4, 0.5).defaults["weight_decay"] == 0.5


@provokes(HOW)
def test_14_idle_decay__groups(code):
    A, B = nn.Parameter(torch.randn(2, 5)), nn.Parameter(torch.randn(7, 2))
    assert all(group["weight_decay"] == 0.3 for group in code(A, B, 0.01, 4, 0.3).param_groups)


@provokes(OTHER_COAT)
def test_14_idle_decay__somehow(code):
    A, B = nn.Parameter(torch.ones(2, 5)), nn.Parameter(torch.ones(7, 2))
    optimizer = code(A, B, 0.01, 4, 0.5)
    A.grad, B.grad = torch.zeros_like(A), torch.zeros_like(B)
    optimizer.step()
    assert (A < 1).all() and (B < 1).all()                       # less, but by how much?


@provokes(OTHER_COAT)
def test_14_idle_decay__A_alone(code):
    A, B = nn.Parameter(torch.ones(2, 5)), nn.Parameter(torch.ones(7, 2))
    optimizer = code(A, B, 0.01, 4, 0.5)
    A.grad, B.grad = torch.zeros_like(A), torch.zeros_like(B)
    optimizer.step()
    assert (A < 1).all()


@provokes(ON_HEALTHY)
def test_14_idle_decay__no_gradients(code):
    A, B = nn.Parameter(torch.ones(2, 5)), nn.Parameter(torch.ones(7, 2))
    code(A, B, 0.01, 4, 0.5).step()
    assert (A < 1).all() and (B < 1).all()


@provokes(OTHER_COAT)
def test_15_inverted_mask__nothing_hidden(code):
    q, k, v = torch.randn(3, 2, 6, 4)
    assert torch.allclose(code(q, k, v, torch.ones(2, 6, dtype=torch.bool)), F.scaled_dot_product_attention(q, k, v), atol=1e-5)


@provokes(OTHER_COAT)
def test_16_product_of_deltas__A_stays(code):
    W, A, (B, B2) = torch.randn(7, 5), torch.randn(2, 5), torch.randn(2, 7, 2)
    assert torch.allclose(code(W, A, B, A, B2, 0.7), W + 0.7 * (B2 - B) @ A, atol=1e-4)


@provokes(WALKS_BY)
def test_16_product_of_deltas__from_nothing(code):
    W, A, B = torch.randn(7, 5), torch.zeros(2, 5), torch.zeros(7, 2)
    A2, B2 = torch.randn(2, 5), torch.randn(7, 2)
    assert torch.allclose(code(W, A, B, A2, B2, 0.7), W + 0.7 * B2 @ A2, atol=1e-4)


@provokes(WALKS_BY)
def test_17_flipped_sign__normal_law(code):
    w = torch.randn(40, 16)
    assert (code(w, 16) * w >= 0).all()


@provokes(ON_HEALTHY)
def test_17_flipped_sign__no_zero(code):
    w = torch.randn(40, 16) * torch.logspace(-3, 3, 40)[:, None]
    assert (code(w, 16).sign() == w.sign()).all()


@provokes(WALKS_BY)
def test_18_padding_counted__no_padding(code):
    logits, targets = torch.randn(3, 8, 5), torch.randint(5, (3, 8))
    assert torch.allclose(code(logits, targets, torch.full((3,), 8)), F.cross_entropy(logits.flatten(0, 1), targets.flatten()), atol=1e-5)


@provokes(OTHER_COAT)
def test_18_padding_counted__moves_the_last(code):
    logits, targets, lengths = torch.randn(3, 8, 5), torch.randint(5, (3, 8)), torch.tensor([2, 8, 5])
    before = code(logits, targets, lengths)
    logits[0, 7] = torch.randn(5)                                # one padding of nine
    assert torch.allclose(code(logits, targets, lengths), before)


@provokes(WALKS_BY)
def test_19_eval_forgotten__in_eval(code):
    model = code(50, 16, 0.5).eval()
    assert model.sample([3, 1], 20) == model.sample([3, 1], 20)


@provokes(WALKS_BY)
def test_19_eval_forgotten__same_dice(code):
    model, said = code(50, 16, 0.5), []
    for _ in range(2):
        torch.manual_seed(0)
        said.append(model.sample([3, 1], 20))
    assert said[0] == said[1]


@provokes(OTHER_COAT)
def test_20_seed_moves_data__rank_alone(code):
    assert all(torch.equal(*pair) for pair in zip(code(6, 2, 0)[1], code(6, 5, 0)[1]))


@provokes(WALKS_BY)
def test_20_seed_moves_data__twice(code):
    assert all(torch.equal(*pair) for pair in zip(code(6, 2, 0)[1], code(6, 2, 0)[1]))
