"""PagedAdamW beside torch's AdamW, bit for bit; and the bytes it keeps on the device."""

import copy
import functools
import pickle
import warnings

import pytest
import torch
from torch import nn

import minilora as ml

pytestmark = pytest.mark.filterwarnings("ignore:PagedAdamW:UserWarning")


def parameters(dtype=torch.float32):
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(shape, dtype=dtype)) for shape in [(7, 30), (1,), (64, 3), (), (5, 5, 5)]]


def paged(params, budget=800, page=60, **options):
    return ml.PagedAdamW(params, budget=budget, page=page, **options)


def set_gradients(params, step, without=()):
    for i, p in enumerate(params):
        p.grad = None if i in without else torch.randn(p.shape, generator=torch.Generator().manual_seed(100 * step + i)).to(p.dtype)


def train(optimizer, params, steps, first=0, without=()):
    for step in range(first, first + steps):
        set_gradients(params, step, without)
        optimizer.step()


def states(optimizer):
    return [t for state in optimizer.state_dict()["state"].values() for t in state.values()]


def equal(one, other):
    return len(one) == len(other) and all(torch.equal(a, b) for a, b in zip(one, other))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("budget, page", [(16, 1), (100, 7), (800, 60), (5000, 64), (10**9, 2**20)])
def test_the_numbers_are_adamws_bit_for_bit(dtype, budget, page):
    settings = {"lr": 0.03, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1}
    ours, theirs = parameters(dtype), parameters(dtype)
    one, other = paged(ours, budget, page, **settings), torch.optim.AdamW(theirs, **settings)
    for optimizer, params in ((one, ours), (other, theirs)):
        train(optimizer, params, 4)
        train(optimizer, params, 2, first=4, without=(0, 3))                        # a parameter may have no gradient for a while
        train(optimizer, params, 2, first=6)
    assert equal(ours, theirs) and equal(states(one), states(other))
    assert one.resident <= one.peak <= budget


def test_groups_have_rates_of_their_own_and_a_schedule_moves_them():
    ours, theirs = parameters(), parameters()
    for params, make in ((ours, paged), (theirs, torch.optim.AdamW)):
        optimizer = make([{"params": params[:2], "lr": 0.1}, {"params": params[2:], "weight_decay": 0.0}], lr=0.01)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
        for step in range(5):
            train(optimizer, params, 1, first=step)
            scheduler.step()
    assert equal(ours, theirs)


def test_a_closure_is_called_with_gradients_on():
    p = nn.Parameter(torch.ones(3))
    optimizer = paged([p], lr=0.1)

    def closure():
        optimizer.zero_grad()
        loss = p.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 3 and torch.allclose(p, torch.tensor(0.9), atol=0.01)


def test_a_gradient_may_be_strided():
    ours, theirs = ([nn.Parameter(torch.arange(12.0).view(3, 4))] for _ in range(2))
    for params, make in ((ours, functools.partial(paged, budget=40, page=5)), (theirs, torch.optim.AdamW)):
        optimizer = make(params, lr=0.1)
        params[0].grad = torch.arange(12.0).view(4, 3).T
        optimizer.step()
    assert equal(ours, theirs)


@pytest.mark.parametrize("budget", [480, 800, 2000])
def test_what_is_on_the_device_is_counted_and_never_above_the_budget(budget, monkeypatch):
    """Counted here from the tensors themselves, after every page that comes."""
    params = parameters()
    optimizer = paged(params, budget)
    fetch, seen = ml.PagedAdamW.fetch, []

    def counting(self, *key):
        pair = fetch(self, *key)
        there = sum(tensor.nbytes for pair in self.pages.values() for tensor in pair)
        assert there == self.resident <= budget
        assert len({t.data_ptr() for pair in self.pages.values() for t in pair} & {t.data_ptr() for s in self.state.values() for t in s.values()}) == 0
        seen.append(there)
        return pair

    monkeypatch.setattr(ml.PagedAdamW, "fetch", counting)
    train(optimizer, params, 3)
    assert max(seen) == optimizer.peak and len(seen) == 3 * sum(-(-p.numel() // 60) for p in params)
    whole = 8 * sum(p.numel() for p in params)
    assert optimizer.peak > budget - 480 and optimizer.moved > 2 * whole            # full, but for less than a page; and pages went both ways


def test_where_all_fits_nothing_moves_twice():
    params = parameters()
    optimizer = paged(params, budget=8 * sum(p.numel() for p in params))
    train(optimizer, params, 5)
    assert optimizer.moved == optimizer.resident == optimizer.peak == optimizer.budget


def test_the_page_used_last_goes_first():
    """So of a budget of three pages in five, two stay through every step; had the oldest gone, every page would move at every step."""
    p = nn.Parameter(torch.randn(50))
    optimizer = paged([p], budget=3 * 80, page=10)
    train(optimizer, [p], 1)
    before = optimizer.moved
    train(optimizer, [p], 10, first=1)
    assert (optimizer.moved - before) / 10 <= 2 * 3 * 80


@pytest.mark.parametrize("into, out_of", [("paged", "adamw"), ("adamw", "paged"), ("paged", "paged")])
def test_its_state_is_adamws(into, out_of):
    make = {"paged": paged, "adamw": torch.optim.AdamW}
    params = parameters()
    straight, half = copy.deepcopy(params), params
    train(torch.optim.AdamW(straight, lr=0.05), straight, 6)
    first = make[out_of](half, lr=0.05)
    train(first, half, 3)
    second = make[into](half, lr=1.0)
    kept = [p.detach().clone() for p in half]
    train(second, half, 2, first=50)                                                # what it did and had before is forgotten
    with torch.no_grad():
        for p, value in zip(half, kept):
            p.copy_(value)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    train(second, half, 3, first=3)
    assert equal(straight, half) and second.param_groups[0]["lr"] == 0.05
    if into == "paged":
        assert second.peak <= second.budget and second.resident == sum(t.nbytes for pair in second.pages.values() for t in pair)


def test_loading_shares_nothing_with_what_was_loaded():
    params = parameters()
    first = paged(params)
    train(first, params, 2)
    state = copy.deepcopy(first.state_dict())
    kept = copy.deepcopy(state)
    second = paged(params)
    second.load_state_dict(state)
    train(second, params, 2)
    second.state_dict()
    assert all(torch.equal(t, state["state"][i][key]) for i, s in kept["state"].items() for key, t in s.items())


def test_finetune_takes_it_and_goes_on_after_a_stop_with_the_same_bits(tmp_path):
    optimizer = functools.partial(ml.PagedAdamW, budget=2_000, page=100)

    def model():
        torch.manual_seed(0)
        return ml.TinyGPT(ml.GPTConfig(context=32, width=32, layers=2, heads=2))

    text = ml.data.world().batches(2, 31, seed=3)

    def stopping(step):
        if step == 3:
            raise KeyboardInterrupt
        return text(step)

    plain, straight, again = model(), model(), model()
    expected = ml.finetune(plain, ml.QLoRA(3), text, 6, 0.01, progress=False)
    assert ml.finetune(straight, ml.QLoRA(3), text, 6, 0.01, optimizer=optimizer, progress=False) == expected
    with pytest.raises(KeyboardInterrupt):
        ml.finetune(model(), ml.QLoRA(3), stopping, 6, 0.01, checkpoint=tmp_path / "c.pt", optimizer=optimizer, progress=False)
    with pytest.raises(ValueError, match="optimizer"):
        ml.finetune(model(), ml.QLoRA(3), text, 6, 0.01, checkpoint=tmp_path / "c.pt", optimizer=torch.optim.SGD, progress=False)
    assert ml.finetune(again, ml.QLoRA(3), text, 6, 0.01, checkpoint=tmp_path / "c.pt", optimizer=optimizer, progress=False) == expected
    for one in (straight, again):
        assert all(torch.equal(t, one.state_dict()[key]) for key, t in plain.state_dict().items())


@pytest.mark.parametrize("twin", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))], ids=["deepcopy", "pickle"])
def test_a_copy_goes_on_by_itself(twin):
    ours = parameters()
    one = paged(ours, lr=0.05)
    train(one, ours, 3)
    kept = (one.budget, one.page)
    theirs, other = twin((ours, one))
    assert (other.budget, other.page, other.resident, other.pages) == (*kept, 0, {})
    train(one, ours, 3, first=3), train(other, theirs, 3, first=3)
    assert equal(ours, theirs) and equal(states(one), states(other)) and other.peak <= other.budget
    straight = parameters()
    train(torch.optim.AdamW(straight, lr=0.05), straight, 6)
    assert equal(ours, straight)                                                    # and the first was not disturbed


def test_on_a_cpu_it_says_that_the_budget_is_simulated():
    with pytest.warns(UserWarning, match="host memory, so the budget is simulated and saves nothing"):
        paged(parameters())


@pytest.mark.parametrize("options, message", [
    ({"budget": 7}, "budget must be a whole number of at least 8, got 7"), ({"budget": 1e6}, "budget must be"), ({"budget": None}, "budget must be"),
    ({"page": 0}, "page must be"), ({"page": True}, "page must be"), ({"lr": -1.0}, "learning rate"), ({"lr": float("nan")}, "learning rate"),
    ({"betas": (1.0, 0.9)}, "betas"), ({"betas": (0.9, -0.1)}, "betas"), ({"eps": -1e-8}, "eps"), ({"weight_decay": -1}, "weight_decay"),
])
def test_bad_settings_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        paged(parameters(), **options)


def test_a_parameter_that_is_strided_is_refused():
    with pytest.raises(ValueError, match="not contiguous"):
        paged([nn.Parameter(torch.randn(4, 6).T)])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_cuda_the_state_is_in_pinned_memory_and_the_numbers_are_the_same():
    ours, theirs = ([nn.Parameter(torch.randn(300, 40, generator=torch.Generator().manual_seed(0)).cuda())] for _ in range(2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        one, other = paged(ours, 32_000, 1000), torch.optim.AdamW(theirs, foreach=False)
    for step in range(4):
        for params in (ours, theirs):
            params[0].grad = torch.randn(300, 40, generator=torch.Generator().manual_seed(step)).cuda()
        one.step(), other.step()
    assert equal(ours, theirs) and one.peak <= 32_000
    assert all(state["exp_avg"].is_pinned() and state["exp_avg_sq"].is_pinned() for state in one.state.values())
