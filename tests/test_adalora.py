"""AdaLoRA: the budget's golden values, the scores by hand, what is cut, ties, revival, the penalty, and schedules that cannot be."""

import pytest
import torch
from torch import nn

import minilora as ml
from minilora.methods.adalora import keep_best


def pair(method, dtype=torch.float64):
    """Two adapted layers of different shape in a small model, and data for it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(7, 9), nn.Tanh(), nn.Linear(9, 8)).to(dtype)
    return ml.adapt(model, method, ["0", "2"]), torch.randn(64, 7, dtype=dtype), torch.randn(64, 8, dtype=dtype)


def loop(method, model, x, y, steps, lr=0.02):
    """Training with the hooks; yields the step after each, gradients still there."""
    optimizer = torch.optim.AdamW(method.parameter_groups(model, lr))
    for step in range(steps):
        optimizer.zero_grad()
        rows = torch.randperm(64, generator=torch.Generator().manual_seed(step))[:16]
        ((model(x[rows]) - y[rows]).square().mean() + method.penalty(model)).backward()
        optimizer.step()
        method.after_step(model, step)
        yield step


def alive(model):
    return sum(int((layer.lam != 0).sum()) for _, layer in ml.adapters(model))


GOLDEN = {10: 12, 11: 11, 15: 10, 20: 9, 25: 7, 30: 6, 40: 5} | dict.fromkeys(range(50, 101), 4) | dict.fromkeys(range(0, 11), 12)


def test_the_budget_is_the_reference_codes():
    """2 matrices, rank 6 to 2, warm-up 10, final 20 of 100 steps: PEFT's values."""
    method = ml.AdaLoRA(6, 2, total_steps=100, warmup_steps=10, final_steps=20, interval=5)
    assert {step: method.budget(step, 2) for step in GOLDEN} == GOLDEN


def test_cuts_fall_on_the_interval_and_in_the_final_steps_on_every_one():
    method = ml.AdaLoRA(6, 2, total_steps=100, warmup_steps=10, final_steps=20, interval=5)
    model, x, y = pair(method)
    counts, patterns = {}, {}
    for step in loop(method, model, x, y, 100):
        counts[step], patterns[step] = alive(model), [layer.mask.tolist() for _, layer in ml.adapters(model)]
    cuts = [step for step in range(11, 80) if step % 5 == 0] + list(range(80, 100))
    assert all(counts[step] == method.budget(step, 2) for step in cuts)
    assert counts[10] == counts[14] == 12 and counts[16] == 12 and counts[15] == 10           # cut at 15, all grown again by 16
    assert counts[79] > 4 and counts[80] == counts[81] == counts[99] == 4
    assert all(patterns[step] == patterns[80] for step in range(80, 100))                     # fixed in the final steps
    assert len({str(patterns[step]) for step in cuts}) > 3                                    # and not before


@pytest.mark.parametrize("interval", [1, 7, 1000])
def test_without_final_steps_the_last_step_cuts(interval):
    method = ml.AdaLoRA(6, 2, total_steps=20, interval=interval)
    model, x, y = pair(method)
    list(loop(method, model, x, y, 20))
    assert alive(model) == 4


def test_a_target_equal_to_the_initial_rank_cuts_nothing():
    """There PEFT and the original code crash."""
    method = ml.AdaLoRA(6, 6, total_steps=20, warmup_steps=2, final_steps=5)
    model, x, y = pair(method)
    for step in loop(method, model, x, y, 20):
        assert alive(model) == 12


def test_scores_and_masks_by_hand():
    """Equations 7 to 11 element by element, from what stands after the optimizer's step; and the masks of a whole run from them."""
    method = ml.AdaLoRA(5, 2, alpha=3, total_steps=30, warmup_steps=2, final_steps=10, interval=2, beta1=0.7, beta2=0.9)
    model, x, y = pair(method)
    layers, names = dict(ml.adapters(model)), ("P", "lam", "Q")
    mean = {(name, w): torch.zeros_like(getattr(layer, w)) for name, layer in layers.items() for w in names}
    spread = {key: torch.zeros_like(value) for key, value in mean.items()}
    optimizer, cuts, keeps = torch.optim.AdamW(method.parameter_groups(model, 0.02)), 0, []
    for step in range(30):
        optimizer.zero_grad()
        ((model(x) - y).square().mean() + method.penalty(model)).backward()
        optimizer.step()
        scores = []
        for name, layer in layers.items():
            for w in names if step < 20 else ():
                I = (getattr(layer, w) * getattr(layer, w).grad).abs().detach()
                mean[name, w] = 0.7 * mean[name, w] + 0.3 * I
                spread[name, w] = 0.9 * spread[name, w] + 0.1 * (I - mean[name, w]).abs()
            s = {w: mean[name, w] * spread[name, w] for w in names}
            scores += [((s["lam"][k] + s["P"][:, k].mean() + s["Q"][k].mean()).item(), name, k) for k in range(5)]
        cut = step == 20 or 2 < step < 20 and step % 2 == 0
        if cut:
            keeps = [(name, k) for _, name, k in sorted(scores, reverse=True)[: method.budget(step, 2)]]
            cuts += 1
        method.after_step(model, step)
        for name, layer in layers.items():
            if step <= 20:
                assert torch.allclose(layer.importance(), torch.tensor([score for score, n, _ in scores if n == name], dtype=torch.float64), rtol=1e-10, atol=0)
            if cut or step > 20:
                assert [(name, k) in keeps for k in range(5)] == layer.mask.tolist() == (layer.lam != 0).tolist(), step
    assert cuts == 9 and len(keeps) == 4


def test_ties_keep_exactly_the_budget_and_empty_no_layer():
    """With `score <= threshold`, as the reference code has it, equal scores cut every triplet of every layer."""
    model, _, _ = pair(ml.AdaLoRA(4, 2))
    layers = [layer for _, layer in ml.adapters(model)]
    for budget in range(9):
        keep_best(layers, budget)
        kept = [int(layer.mask.sum()) for layer in layers]
        assert sum(kept) == budget and max(kept) - min(kept) <= 1


def test_all_layers_compete_in_one_ranking():
    model, _, _ = pair(ml.AdaLoRA(4, 2))
    first, second = (layer for _, layer in ml.adapters(model))
    for layer, sensitivities in ((first, [9.0, 1.0, 8.0, 7.0]), (second, [2.0, 6.0, 0.5, 0.1])):
        layer.sensitivity_lam.copy_(torch.tensor(sensitivities))
        layer.uncertainty_lam.fill_(1.0)
    keep_best([first, second], 4)
    assert first.mask.tolist() == [True, False, True, True] and second.mask.tolist() == [False, True, False, False]


def test_the_penalty_is_the_mean_norm_and_drives_p_and_q_to_orthonormal():
    method = ml.AdaLoRA(3, 2, orthogonal_weight=0.7)
    model, _, _ = pair(method)
    terms = [torch.linalg.matrix_norm(gram - torch.eye(3, dtype=torch.float64)) for _, layer in ml.adapters(model)
             for gram in (layer.P.T @ layer.P, layer.Q @ layer.Q.T)]
    assert torch.allclose(method.penalty(model), 0.7 * sum(terms) / 4, rtol=1e-14, atol=0)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for _ in range(300):
        optimizer.zero_grad()
        method.penalty(model).backward()
        optimizer.step()
    assert method.penalty(model) < 0.05
    assert ml.AdaLoRA(3, 2, orthogonal_weight=0).penalty(model) == 0


def test_only_lam_has_a_gradient_from_the_task_at_the_start_and_the_penalty_moves_the_others():
    method = ml.AdaLoRA(3, 2)
    model, x, _ = pair(method)
    model(x).square().mean().backward()
    assert all(layer.lam.grad.any() and not layer.P.grad.any() and not layer.Q.grad.any() for _, layer in ml.adapters(model))
    method.penalty(model).backward()
    assert all(layer.P.grad.any() and layer.Q.grad.any() for _, layer in ml.adapters(model))


def test_p_and_q_start_small_and_random():
    layer = ml.AdaLoRA(64).layer(nn.Linear(512, 256))
    assert layer.P.std().item() == pytest.approx(0.02, rel=0.03) and layer.Q.std().item() == pytest.approx(0.02, rel=0.03) and not layer.lam.any()


def test_two_thirds_is_the_target_where_none_is_named():
    assert [ml.AdaLoRA(rank).target_rank for rank in (12, 6, 3, 2, 1)] == [8, 4, 2, 1, 1]


def test_a_loop_of_ones_own_must_say_how_long_it_is():
    method = ml.AdaLoRA(6, 2)
    model, x, y = pair(method)
    with pytest.raises(ValueError, match="total_steps is not set.*finetune fills it in"):
        next(loop(method, model, x, y, 5))


def test_finetune_fills_it_in_and_the_layers_know():
    method = ml.AdaLoRA(6, 2)
    model, x, y = pair(method, torch.float32)
    ml.finetune(model, method, lambda step: (x, y), 12, 0.02, loss_fn=lambda m, x, y: (m(x) - y).square().mean(), progress=False)
    assert alive(model) == 4 and {layer.method.total_steps for _, layer in ml.adapters(model)} == {12} and method.total_steps is None
    again = ml.AdaLoRA(6, 2)                                                              # an equal method: trained on
    ml.finetune(model, again, lambda step: (x, y), 9, 0.02, loss_fn=lambda m, x, y: (m(x) - y).square().mean(), progress=False)
    assert {layer.method.total_steps for _, layer in ml.adapters(model)} == {9}


def test_the_penalty_is_trained_on_but_not_reported():
    histories = []
    for weight in (0.0, 5.0):
        method = ml.AdaLoRA(6, 2, orthogonal_weight=weight)
        model, x, y = pair(method, torch.float32)
        histories.append(ml.finetune(model, method, lambda step: (x, y), 8, 0.02, loss_fn=lambda m, x, y: (m(x) - y).square().mean(), progress=False)["loss"])
    assert histories[0][0] == histories[1][0] and histories[0][-1] != histories[1][-1]


def test_after_the_last_cut_the_pattern_is_left_alone_even_where_nothing_was_judged():
    """An adapter that was loaded has its pattern, and no running means to choose another by."""
    method = ml.AdaLoRA(6, 2, total_steps=8, final_steps=3)
    model, *_ = pair(method)
    masks = [torch.arange(6) >= 4 for _ in ml.adapters(model)]
    for (_, layer), mask in zip(ml.adapters(model), masks):
        layer.mask.copy_(mask)
    method.after_step(model, 6)
    assert all(torch.equal(layer.mask, mask) and not layer.lam[~mask].any() for (_, layer), mask in zip(ml.adapters(model), masks))
