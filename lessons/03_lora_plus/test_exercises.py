"""What is true of a right answer to lesson 03."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

import minilora as ml
from lessons.expect import draw, must_equal

# three_terms

SIZES = [(7, 5, 2), (4, 9, 3)]                                         # out, in, rank: not square, wide and tall
NAMES = ("s · δB A x", "s · B δA x", "s · δB δA x")


def step(out, into, rank, dtype=torch.float64):
    """A, B, δA, δB, all random."""
    shapes = ((rank, into), (out, rank), (rank, into), (out, rank))
    return tuple(draw(*shape, seed=seed, dtype=dtype) for seed, shape in enumerate(shapes))


def three(answer):
    assert isinstance(answer, tuple) and len(answer) == 3, f"a tuple of three tensors is wanted, got {type(answer).__name__}"
    return answer


@pytest.mark.parametrize("scale", [0.375, 2.5])
@pytest.mark.parametrize("rows", [(), (6,), (2, 3)])
@pytest.mark.parametrize("out, into, rank", SIZES)
def test_each_term_is_its_product(three_terms, out, into, rank, rows, scale):
    A, B, dA, dB = step(out, into, rank)
    x = draw(*rows, into, seed=9)
    plain = [x @ (dB @ A).T, x @ (B @ dA).T, x @ (dB @ dA).T]
    for i, got in enumerate(three(three_terms(x, A, B, dA, dB, scale))):
        must_equal(got, scale * plain[i], {
            "the scale is missing": plain[i],
            "the scale is squared": scale**2 * plain[i],
            "the terms are in another order: δB A x, then B δA x, then δB δA x": scale * plain[i - 1],
            "the terms are in another order: δB A x comes first, then B δA x, then δB δA x": scale * plain[i - 2],
            "this is the branch before the step": scale * (x @ (B @ A).T),
            "A has moved already: δB meets the A from before the step": scale * (x @ (dB @ (A + dA)).T),
            "B has moved already: δA meets the B from before the step": scale * (x @ ((B + dB) @ dA).T),
        }, NAMES[i])


@pytest.mark.parametrize("out, into, rank", SIZES)
def test_the_terms_add_up_to_what_the_step_changed(three_terms, out, into, rank):
    A, B, dA, dB = step(out, into, rank)
    x, scale = draw(3, into, seed=5), 0.75
    change = scale * (x @ (A + dA).T @ (B + dB).T - x @ A.T @ B.T)
    worst = (sum(three(three_terms(x, A, B, dA, dB, scale))) - change).abs().max().item()
    assert worst < 1e-12, f"the three must add up to s · ((B + δB)(A + δA) - B A) x: off by up to {worst:.3g}"


def test_the_terms_are_in_the_dtype_of_x(three_terms):
    A, B, dA, dB = step(7, 5, 2, torch.float32)
    for name, got in zip(NAMES, three(three_terms(draw(3, 5, dtype=torch.float32), A, B, dA, dB, 0.5))):
        assert got.dtype == torch.float32, f"{name}: float32 goes in, {got.dtype} came out"


def test_the_terms_never_form_the_large_matrix(three_terms):
    out, into, rank, sizes = 300, 200, 2, []

    class Watch(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            sizes.extend(t.numel() for t in (result if isinstance(result, (tuple, list)) else [result]) if isinstance(t, torch.Tensor))
            return result

    with Watch():
        three_terms(torch.ones(4, into), torch.ones(rank, into), torch.ones(out, rank), torch.ones(rank, into), torch.ones(out, rank), 0.5)
    assert max(sizes) < out * into, f"a matrix of {max(sizes):,} numbers was formed, (out, in): let x meet A or δA first"


def test_gradients_pass_through_every_term(three_terms):
    given = [t.requires_grad_() for t in (draw(3, 5, seed=9), *step(7, 5, 2))]
    needs = ((0, 1, 4), (0, 2, 3), (0, 3, 4))                          # x and the two factors of each term
    for name, got, ours in zip(NAMES, three(three_terms(*given, 0.375)), needs):
        assert got.requires_grad, f"{name} is cut off from autograd: no detach(), no .data"
        found = torch.autograd.grad(got.square().sum(), [given[i] for i in ours], allow_unused=True, retain_graph=True)
        assert all(g is not None and g.any() for g in found), f"{name} is cut off from one of its factors"


# growth_exponent

@pytest.mark.parametrize("power", [0.0, 1.0, -0.5, 2.25])
@pytest.mark.parametrize("factor", [1.0, 0.003, 70.0])
def test_exponent_of_a_pure_power(growth_exponent, power, factor):
    widths = [64, 1024, 128, 4096]                                     # in no order
    sizes = [factor * width**power for width in widths]
    got = growth_exponent(widths, sizes)
    assert isinstance(got, float), f"a Python float is wanted, got {type(got).__name__}"
    through_zero = sum(math.log(w) * math.log(s) for w, s in zip(widths, sizes)) / sum(math.log(w) ** 2 for w in widths)
    if not math.isclose(through_zero, power, abs_tol=1e-6):
        assert not math.isclose(got, through_zero, rel_tol=1e-6), "the line may begin anywhere: subtract the means first, c need not be 1"
    assert math.isclose(got, power, abs_tol=1e-9), f"size = {factor} · width^{power} grows with the exponent {power}, got {got:.4f}: the slope in log against log"


def test_exponent_is_the_least_squares_slope(growth_exponent):
    widths, sizes = [3, 10, 17, 200, 900], [2.0, 9.0, 4.0, 60.0, 33.0]
    across, up = torch.tensor(widths).double().log(), torch.tensor(sizes).double().log()
    line = torch.stack([across, torch.ones_like(across)], dim=1)
    want = torch.linalg.lstsq(line, up[:, None]).solution[0].item()
    got = growth_exponent(widths, sizes)
    ends = math.log(sizes[-1] / sizes[0]) / math.log(widths[-1] / widths[0])
    middle, height = across - across.mean(), up - up.mean()
    other = ((height @ height) / (middle @ height)).item()
    assert not math.isclose(got, ends, rel_tol=1e-9), "this is the slope between the first and the last point; least squares asks all of them"
    assert not math.isclose(got, other, rel_tol=1e-9), "divide by the variance of log width, not by what the sizes do"
    assert math.isclose(got, want, rel_tol=1e-9), f"least squares through five points that lie on no line: {want:.6f}, got {got:.6f}"


@pytest.mark.parametrize("widths, sizes, want", [([2, 8], [3.0, 24.0], 1.5), ([5, 1], [1.0, 1.0], 0.0), ([1, 10, 100], [7.0, 7.0, 7.0], 0.0)])
def test_exponent_of_few_points(growth_exponent, widths, sizes, want):
    got = growth_exponent(widths, sizes)
    assert math.isclose(got, want, abs_tol=1e-12), f"widths {widths}, sizes {sizes}: the slope is {want}, got {got}"


# widest_useful_rate

CASES = [(3.0, 5.0, 0.25), (0.125, 40.0, 2.0), (6.0, 0.5, 0.75), (0.7, 3e4, 1.0)]


@pytest.mark.parametrize("from_B, from_A, limit", CASES)
def test_the_widest_rate_reaches_the_limit(widest_useful_rate, from_B, from_A, limit):
    got = widest_useful_rate(from_B, from_A, limit)
    root = math.sqrt(from_B**2 + 4 * from_A * limit)
    want = (root - from_B) / (2 * from_A)
    for wrong, name in ((limit / from_B, "from_A · η² is left out: A moves too"), (math.sqrt(limit / from_A), "from_B · η is left out: B moves A's old features"),
                        (limit / (from_B + from_A), "the last two terms have both rates in them: from_A · η², not from_A · η"),
                        (-(from_B + root) / (2 * from_A), "this is the negative root"), ((from_B + root) / (2 * from_A), "the sign of `from_B` is wrong: (-from_B + √…) / (2 from_A)"),
                        ((root - from_B) / from_A, "divide by 2 · from_A"), (want / 2, "half of the right rate")):
        assert not math.isclose(got, wrong, rel_tol=1e-9), name
    moved = from_B * got + from_A * got**2
    assert math.isclose(moved, limit, rel_tol=1e-9), f"at η = {got:.6g} the output moves by {moved:.6g}; the limit is {limit}"


@pytest.mark.parametrize("from_B, from_A, limit, want", [(4.0, 0.0, 0.5, 0.125), (0.0, 4.0, 9.0, 1.5), (0.3, 0.0, 6.0, 20.0)])
def test_the_widest_rate_where_one_side_stands_still(widest_useful_rate, from_B, from_A, limit, want):
    try:
        got = widest_useful_rate(from_B, from_A, limit)
    except ZeroDivisionError:
        pytest.fail(f"from_B {from_B}, from_A {from_A}: a division by zero; from_A = 0 leaves from_B · η ≤ limit")
    assert math.isclose(got, want, rel_tol=1e-9), f"from_B {from_B}, from_A {from_A}, limit {limit}: the largest rate is {want}, got {got}"


@pytest.mark.parametrize("limit", [0.5, 3.0])
def test_no_rate_is_too_large_where_nothing_moves(widest_useful_rate, limit):
    try:
        got = widest_useful_rate(0.0, 0.0, limit)
    except ZeroDivisionError:
        pytest.fail("from_B = from_A = 0: nothing moves, so no rate is too large: math.inf, not a division by zero")
    assert got == math.inf, f"from_B = from_A = 0: nothing moves, so no rate is too large: math.inf, got {got}"


@pytest.mark.parametrize("from_A", [1e-12, 1e-16, 1e-30])
def test_the_widest_rate_loses_no_digits(widest_useful_rate, from_A):
    got, want = widest_useful_rate(3.0, from_A, 0.5), 1 / 6              # from_A · η² is below the twelfth digit
    assert math.isclose(got, want, rel_tol=1e-9), (
        f"from_A = {from_A}: √(from_B² + 4 · from_A · limit) - from_B is a difference of near equals and loses its digits; multiply above and below by their sum. "
        f"{want:.12f} is wanted, got {got:.12f}")


# balanced_rates

@pytest.mark.parametrize("from_B, from_A, limit", CASES)
def test_balanced_rates_share_the_work(balanced_rates, from_B, from_A, limit):
    got = balanced_rates(from_B, from_A, limit)
    assert isinstance(got, tuple) and len(got) == 2, f"two rates are wanted: (lr_A, lr_B), got {got!r}"
    lr_A, lr_B = got
    want = (from_B / from_A, limit / (2 * from_B))
    assert not (math.isclose(lr_A, want[1]) and math.isclose(lr_B, want[0])), "the two are in the wrong order: A's rate comes first"
    assert not math.isclose(from_B * lr_B, limit), "each side moves the output by half of the limit; here the first term takes all of it"
    assert math.isclose(from_B * lr_B, limit / 2, rel_tol=1e-9), f"from_B · lr_B is {from_B * lr_B:.6g}, and half of the limit is {limit / 2}"
    assert math.isclose(from_A * lr_A * lr_B, limit / 2, rel_tol=1e-9), (
        f"from_A · lr_A · lr_B is {from_A * lr_A * lr_B:.6g}, and half of the limit is {limit / 2}: A's rate is multiplied by B's")


def test_the_ratio_grows_with_the_width(balanced_rates):
    """from_A grows with the width, from_B does not: so lr_A falls as 1 / width, and lr_B stays."""
    narrow, wide = balanced_rates(0.6, 10.0, 0.5), balanced_rates(0.6, 640.0, 0.5)
    assert math.isclose(wide[1], narrow[1], rel_tol=1e-9), "64 times the width in `from_A`: B's rate has no reason to change"
    assert math.isclose(wide[0] * 64, narrow[0], rel_tol=1e-9), f"64 times the width in `from_A`: A's rate must be 64 times lower, {narrow[0]:.4g} became {wide[0]:.4g}"


# lora_plus_groups and decay_where

class Gate(nn.Module):
    """Not an adapter, though it has a B; and parameters of no, one and three dimensions."""

    def __init__(self):
        super().__init__()
        self.B, self.lora_B = nn.Parameter(torch.ones(3, 4)), nn.Parameter(torch.ones(4, 3))
        self.scalar, self.cube = nn.Parameter(torch.tensor(1.5)), nn.Parameter(torch.ones(2, 2, 2))


def zoo(method=None):
    """Two adapters, and more that trains beside them; one adapter's A, a bias and a weight are frozen."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"one": nn.Linear(5, 7), "two": nn.Linear(6, 4), "norm": nn.LayerNorm(4), "head": nn.Linear(4, 3), "gate": Gate()})
    ml.adapt(model, method or ml.LoRAPlus(rank=2, alpha=3.0), ["one", "two"])
    for name in ("norm", "head", "gate"):
        model[name].requires_grad_(True)
    model["head"].weight.requires_grad_(False)
    model["two"].A.requires_grad_(False)
    return model


def given(groups, model):
    """name -> (rate, decay), from groups that any optimizer would take."""
    assert isinstance(groups, list) and all(isinstance(group, dict) for group in groups), "a list of dicts is wanted, one a group"
    for group in groups:
        assert {"params", "lr", "weight_decay"} <= group.keys(), f"a group needs params, lr and weight_decay; this has {sorted(group)}"
        assert isinstance(group["params"], list), f'"params" is a list, got {type(group["params"]).__name__}'
        assert group["params"], "an empty group: leave out what has nobody in it"
    names = {id(p): name for name, p in model.named_parameters()}
    every = [(names.get(id(p), "a stranger"), group) for group in groups for p in group["params"]]
    found = {name: (group["lr"], group["weight_decay"]) for name, group in every}
    twice = sorted({name for name, _ in every if [other for other, _ in every].count(name) > 1})
    assert not twice, f"{twice[0]} stands in the groups twice"
    frozen = [name for name in found if name == "a stranger" or not model.get_parameter(name).requires_grad]
    assert not frozen, f"{frozen[0]} is frozen and stands in a group all the same"
    missing = [name for name, p in model.named_parameters() if p.requires_grad and name not in found]
    assert not missing, f"{missing[0]} trains and stands in no group"
    return found


def is_fast(name):
    return name in ("one.B", "two.B")


@pytest.mark.parametrize("lr, ratio", [(0.01, 16.0), (0.3, 0.25)])
def test_only_the_adapters_B_is_faster(lora_plus_groups, lr, ratio):
    model = zoo()
    for name, (rate, _) in given(lora_plus_groups(model, lr, ratio, 0.1), model).items():
        if is_fast(name):
            assert not math.isclose(rate, lr), f"{name} is an adapter's B and learns at lr: ratio · lr is wanted"
            assert math.isclose(rate, ratio * lr), f"{name} is an adapter's B: ratio · lr = {ratio * lr} is wanted, got {rate}"
        else:
            kind = "no adapter's B, whatever it is called" if name.startswith("gate.") else "a vector" if model.get_parameter(name).dim() < 2 else "not a B"
            assert math.isclose(rate, lr), f"{name} is {kind}: it learns at lr = {lr}, got {rate}"


@pytest.mark.parametrize("decay", [0.3, 0.02])
def test_decay_spares_vectors_and_nothing_else(lora_plus_groups, decay):
    model = zoo()
    for name, (_, got) in given(lora_plus_groups(model, 0.01, 4.0, decay), model).items():
        if model.get_parameter(name).dim() < 2:
            assert got == 0, f"{name} is a vector (dim() < 2): weight decay 0.0 is wanted, got {got}"
        else:
            assert got == decay, f"{name} is no vector: weight decay {decay} is wanted, got {got}"


def test_decay_is_zero_where_none_is_asked_for(lora_plus_groups):
    model = zoo()
    assert {decay for _, decay in given(lora_plus_groups(model, 0.01, 4.0), model).values()} == {0.0}, "weight_decay is 0.0 by default"


def test_no_group_is_empty(lora_plus_groups):
    model = ml.adapt(nn.Sequential(nn.Linear(5, 7)), ml.LoRA(rank=2), ["0"])
    assert given(lora_plus_groups(model, 0.1, 8.0), model).keys() == {"0.A", "0.B"}
    for p in model.parameters():
        p.requires_grad_(p is model[0].A)
    assert given(lora_plus_groups(model, 0.1, 8.0), model).keys() == {"0.A"}
    assert lora_plus_groups(model.requires_grad_(False), 0.1, 8.0) == [], "nothing trains: no groups"


def test_a_B_that_layers_share_stands_there_once(lora_plus_groups):
    model = ml.adapt(nn.Sequential(nn.Linear(5, 7), nn.Linear(6, 7)), ml.LoRA(rank=2), ["0", "1"])
    model[1].B = model[0].B
    assert math.isclose(given(lora_plus_groups(model, 0.1, 8.0), model)["0.B"][0], 0.8)


def test_the_groups_leave_the_model_as_it_was(lora_plus_groups):
    model, before = zoo(), zoo()
    lora_plus_groups(model, 0.01, 4.0, 0.1)
    assert all(torch.equal(p, q) and p.requires_grad == q.requires_grad for p, q in zip(model.parameters(), before.parameters())), "the model was changed"


def test_the_groups_are_those_of_minilora(lora_plus_groups):
    """On the tiny GPT, and a step of AdamW from each ends in the same numbers."""
    torch.manual_seed(0)
    method = ml.LoRAPlus(rank=2, alpha=3.0, ratio=6.0)
    model = ml.adapt(ml.TinyGPT(ml.GPTConfig(context=8, width=16, layers=1, heads=2)), method)
    ours = copy.deepcopy(model)
    for m, groups in ((ours, lora_plus_groups(ours, 0.01, 6.0, 0.1)), (model, method.parameter_groups(model, 0.01, 0.1))):
        ids = torch.arange(18).view(2, 9)
        ml.next_byte_loss(m, ids[:, :-1], ids[:, 1:]).backward()
        torch.optim.AdamW(groups).step()
    assert all(torch.equal(p, q) for p, q in zip(ours.parameters(), model.parameters())), "a step with these groups is not the step of ml.LoRAPlus"


# ratio_as_alpha: two trainings in float64, the one with two rates, the other with the alpha that the answer gives

def trained(method, optimizer, groups, steps=12):
    """dW of each layer after every step; the same start, batches and dropout for all."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 4)).double()
    ml.adapt(model, method, ["0", "2"])
    chosen, seen = optimizer(groups(model)), []
    for number in range(steps):
        x, y = draw(16, 6, seed=2 * number), draw(16, 4, seed=2 * number + 1)
        chosen.zero_grad()
        (model(x) - y).square().mean().backward()
        chosen.step()
        seen += [layer.delta_weight().detach().clone() for _, layer in ml.adapters(model)]
    return seen


def adam(groups):
    return torch.optim.AdamW(groups, eps=1e-30)


def sgd(groups):
    return torch.optim.SGD([{key: value for key, value in group.items() if key != "weight_decay"} for group in groups])


def apart(one, other):
    return max(((a - b).abs().max() / b.abs().max()).item() for a, b in zip(one, other, strict=True))


PLUSES = [ml.LoRAPlus(rank=3, alpha=5.0, ratio=6.25), ml.LoRAPlus(rank=2, alpha=0.5, ratio=0.36, rslora=True), ml.LoRAPlus(rank=4, alpha=7.0, ratio=16.0, dropout=0.25)]


def name_of_alpha(plus, optimizer, alpha):
    """The mistake that gives this alpha, or nothing."""
    right = plus.alpha * (plus.ratio if optimizer == "adam" else math.sqrt(plus.ratio))
    squared = ("you squared the ratio; under Adam k is the ratio itself" if optimizer == "adam"
               else "you squared the ratio; wanted is the k with k² = ratio, so k = √ratio")
    for wrong, name in ((plus.alpha, "alpha is plus's own: then B is as slow as A"), (plus.alpha / plus.ratio, "alpha was divided by the ratio: B must be faster"),
                        (plus.alpha * plus.ratio, "SGD does not divide its step by the gradient's size: alpha · k makes B's rate k² times as high"),
                        (plus.alpha * math.sqrt(plus.ratio), "Adam divides its step by the gradient's size: alpha · k makes B's rate k times as high"),
                        (plus.alpha * plus.ratio**2, squared), (plus.alpha + plus.ratio, "alpha and ratio are added")):
        if math.isclose(alpha, wrong) and not math.isclose(alpha, right):
            return name
    return ""


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
@pytest.mark.parametrize("plus", PLUSES, ids=lambda plus: f"ratio {plus.ratio}")
def test_alpha_does_the_work_of_the_ratio(ratio_as_alpha, plus, optimizer):
    got = ratio_as_alpha(plus, optimizer)
    assert type(got) is ml.LoRA, f"a plain ml.LoRA is wanted, got {type(got).__name__}"
    for field in ("rank", "dropout", "rslora"):
        assert getattr(got, field) == getattr(plus, field), f"{field} is plus's own, {getattr(plus, field)}; here it is {getattr(got, field)}"
    wrong = name_of_alpha(plus, optimizer, got.alpha)
    assert not wrong, f"{wrong} (alpha {plus.alpha}, ratio {plus.ratio}, {optimizer}: got alpha {got.alpha:g})"
    make, lr = (adam, 0.02) if optimizer == "adam" else (sgd, 0.05)
    off = apart(trained(got, make, lambda model: got.parameter_groups(model, lr)), trained(plus, make, lambda model: plus.parameter_groups(model, lr)))
    assert off < 1e-9, f"after 12 steps of {optimizer} dW is {off:.2g} of its size away from plus's; alpha {got.alpha:g} for alpha {plus.alpha:g} and ratio {plus.ratio:g}"


@pytest.mark.parametrize("other", ["lion", "adamw"])
def test_of_other_optimizers_nothing_is_promised(ratio_as_alpha, other):
    with pytest.raises(ValueError) as error:
        ratio_as_alpha(PLUSES[0], other)
        pytest.fail(f"{other!r} is neither adam nor sgd: a ValueError is wanted")
    assert other in str(error.value), f"the error should name what was given, {other!r}; it says {str(error.value)!r}"


# decay_where

@pytest.mark.parametrize("ratio, decay", [(5.0, 0.6), (0.4, 1.5)])
def test_every_factor_shrinks_as_in_the_other_run(decay_where, ratio, decay):
    model, lr = zoo(), 0.02
    for name, (rate, got) in given(decay_where(model, lr, ratio, decay), model).items():
        if is_fast(name):
            assert math.isclose(rate, ratio * lr), f"{name}: B learns at ratio · lr = {ratio * lr}, got {rate}"
            assert not math.isclose(got, decay), f"{name}: B's rate is ratio times as high, so the same decay shrinks it ratio times as much"
            assert not math.isclose(got, decay * ratio), f"{name}: the decay must be lower where the rate is higher: divide by the ratio"
            assert got > 0, f"{name}: without any decay B does not shrink, and in the other run it does"
            assert math.isclose(rate * got, lr * decay), f"{name}: rate · decay is {rate * got:.4g}, and in the other run it is {lr * decay:.4g}"
        else:
            assert math.isclose(rate, lr), f"{name} is no adapter's B: it learns at lr = {lr}, got {rate}"
            assert math.isclose(got, decay), f"{name}: what is no B keeps its decay of {decay}, vectors too; got {got}"


@pytest.mark.parametrize("ratio, decay", [(4.0, 0.5), (0.5, 2.0), (3.0, 0.0)])
def test_with_this_decay_alpha_is_the_ratio_again(decay_where, ratio, decay):
    lr, plus, plain = 0.02, ml.LoRAPlus(rank=3, alpha=5.0, ratio=ratio), ml.LoRA(rank=3, alpha=5.0 * ratio)
    one = trained(plus, adam, lambda model: decay_where(model, lr, ratio, decay), 20)
    other = trained(plain, adam, lambda model: plain.parameter_groups(model, lr, decay), 20)
    assert apart(one, other) < 1e-9, (
        f"after 20 steps of AdamW dW is {apart(one, other):.2g} of its size away from the run of alpha · ratio with the same decay: every factor must shrink as there")


def test_the_decay_groups_hold_no_empty_one(decay_where):
    model = ml.adapt(nn.Sequential(nn.Linear(5, 7)), ml.LoRAFA(rank=2), ["0"])
    assert given(decay_where(model, 0.1, 8.0, 0.1), model).keys() == {"0.B"}
    model[0].B.requires_grad_(False)
    assert decay_where(model, 0.1, 8.0, 0.1) == [], "nothing trains: no groups"
    model[0].A.requires_grad_(True)
    assert given(decay_where(model, 0.1, 8.0, 0.1), model).keys() == {"0.A"}
