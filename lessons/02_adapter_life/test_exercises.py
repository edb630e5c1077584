"""What is true of a right answer. Ranks differ, scales are fractions, B is never zero, and files are real ones."""

import copy
import json
import math

import pytest
import safetensors.torch
import torch
from torch import nn

import minilora as ml
from lessons.expect import draw, must_equal


# adapter_bytes

def file_of(tensors, metadata=None):
    return safetensors.torch.save(tensors, metadata)


FILES = {
    "one tensor": ({"a": torch.zeros(3, 5)}, None),
    "three types": ({"a": torch.zeros(3, 5), "b": torch.zeros(7, dtype=torch.float16), "c": torch.zeros(2, 2, dtype=torch.float64)}, None),
    "notes": ({"x.lora_A.weight": torch.zeros(2, 6), "x.lora_B.weight": torch.zeros(9, 2)}, {"format": "pt", "note": "n" * 300}),
    "an empty tensor": ({"a": torch.zeros(0, 5), "b": torch.zeros(4, dtype=torch.bfloat16)}, None),
    "a long header": ({f"layer.{i}.lora_A.weight": torch.zeros(1, dtype=torch.float16) for i in range(900)}, None),
}


@pytest.mark.parametrize("which", FILES)
def test_every_byte_has_its_place(adapter_bytes, which):
    tensors, metadata = FILES[which]
    content = file_of(tensors, metadata)
    got = adapter_bytes(content)
    assert isinstance(got, dict), f"a dict from name to bytes is wanted, got {type(got).__name__}"
    assert got.get("length") == 8, f"the first part is the length itself, 8 bytes under 'length'; got {got.get('length')!r}"
    size = len(content) - 8 - sum(t.nbytes for t in tensors.values())
    assert got.get("header") != size + 8, "the 8 bytes of the length are counted in the header, too"
    assert got.get("header") == size, f"the header has {size:,} bytes here, got {got.get('header')!r}: eight bytes, the lowest first"
    assert "__metadata__" not in got, "__metadata__ is a note in the header, not a tensor"
    found = {name: part for name, part in got.items() if name not in ("length", "header")}
    assert found.keys() == tensors.keys(), f"a part for each tensor: {', '.join(list(tensors)[:3])} …; got {', '.join(list(found)[:3])} …"
    for name, tensor in tensors.items():
        assert found[name] == tensor.nbytes, (
            f"end - begin of data_offsets is {tensor.nbytes} for {name}, {tensor.numel()} numbers of {tensor.element_size()} bytes; got {found[name]!r}")
    assert sum(got.values()) == len(content), f"the parts add up to {sum(got.values()):,} bytes, the file has {len(content):,}"


def test_the_parts_stand_in_the_headers_order(adapter_bytes):
    content = file_of(*FILES["three types"])
    header = json.loads(content[8:8 + int.from_bytes(content[:8], "little")])
    assert list(adapter_bytes(content)) == ["length", "header", *header], "length, header, then the tensors in the order in which the header names them"


@pytest.mark.parametrize("name", ["a", "ab", "abc"])
def test_a_header_that_no_one_filled_up(adapter_bytes, name):
    header = json.dumps({name: {"dtype": "F16", "shape": [3], "data_offsets": [0, 6]}}).encode()       # safetensors adds spaces at its end, others need not
    got = adapter_bytes(len(header).to_bytes(8, "little") + header + bytes(6))
    assert got == {"length": 8, "header": len(header), name: 6}, f"three numbers of 2 bytes after a header of {len(header)} bytes: got {got}"


def test_the_file_of_a_real_adapter(adapter_bytes, tmp_path):
    model = ml.adapt(small_gpt(), ml.LoRA(rank=3))
    got = adapter_bytes((ml.save_adapter(model, tmp_path) / "adapter_model.safetensors").read_bytes())
    want = 4 * sum(3 * (layer.in_features + layer.out_features) for _, layer in ml.adapters(model))
    numbers = sum(size for name, size in got.items() if name not in ("length", "header"))
    assert numbers == want, f"A and B of all layers are 4 · rank · (in + out) = {want:,} bytes; these parts have {numbers:,}"


# concatenate

def pairs_of(ranks, out=7, into=5, seed=0, dtype=torch.float64):
    return [(draw(rank, into, seed=seed + 2 * i, dtype=dtype), draw(out, rank, seed=seed + 2 * i + 1, dtype=dtype)) for i, rank in enumerate(ranks)]


@pytest.mark.parametrize("out, into, ranks", [(7, 5, (2, 2)), (4, 6, (3, 3, 3)), (7, 5, (2, 3)), (5, 8, (1, 4, 2)), (3, 9, (2,))],
                         ids=["two", "three", "ranks 2 and 3", "ranks 1, 4, 2", "one alone"])
def test_concatenated_does_the_work_of_all(concatenate, out, into, ranks):
    pairs = pairs_of(ranks, out, into)
    got = concatenate(list(pairs))
    assert isinstance(got, tuple) and len(got) == 2, "two tensors are wanted: A, then B"
    A, B = got
    assert A.shape != (out, sum(ranks)) or B.shape != (sum(ranks), into), "A and B are in the wrong order: A comes first"
    if len(set(ranks)) == 1 and len(ranks) > 1:
        assert A.shape != (ranks[0], into), "the factors were added, or some left out: the rank of a sum is the sum of the ranks, set them side by side"
    assert tuple(A.shape) == (sum(ranks), into), f"A is all A_i one above the other, ({sum(ranks)}, {into}); got {tuple(A.shape)}"
    assert tuple(B.shape) == (out, sum(ranks)), f"B is all B_i side by side, ({out}, {sum(ranks)}); got {tuple(B.shape)}"
    must_equal(B @ A, sum(B_i @ A_i for A_i, B_i in pairs), {
        "each B must meet its own A: the two lists are in different orders": sum(B_i @ A_i for (A_i, _), (_, B_i) in zip(pairs, reversed(pairs)))
        if len(set(ranks)) == 1 and len(ranks) > 1 else torch.zeros(0),
        "this is the mean of the updates: the sum is wanted": sum(B_i @ A_i for A_i, B_i in pairs) / len(pairs) if len(pairs) > 1 else torch.zeros(0),
    }, "B A")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_concatenated_keeps_the_type(concatenate, dtype):
    A, B = concatenate(pairs_of((2, 3), dtype=dtype))
    assert A.dtype == B.dtype == dtype, f"{dtype} in, {dtype} out; got {A.dtype} and {B.dtype}"


def test_gradients_reach_every_concatenated_factor(concatenate):
    pairs = [(A.requires_grad_(), B.requires_grad_()) for A, B in pairs_of((2, 3))]
    A, B = concatenate(pairs)
    assert A.requires_grad and B.requires_grad, "no gradient can come back: build A and B from the tensors themselves, no .data, no .detach()"
    (B @ A).square().sum().backward()
    assert all(t.grad is not None and t.grad.any() for pair in pairs for t in pair), "some factor gets no gradient"


# cross_terms

@pytest.mark.parametrize("out, into, rank, count", [(7, 5, 2, 2), (4, 6, 3, 2), (7, 5, 2, 3), (5, 9, 1, 4)])
def test_cross_terms_are_what_is_too_much(cross_terms, out, into, rank, count):
    pairs = pairs_of((rank,) * count, out, into, seed=20)
    own = sum(B @ A for A, B in pairs)
    too_much = sum(B for _, B in pairs) @ sum(A for A, _ in pairs)
    want = sum(B @ A for i, (_, B) in enumerate(pairs) for j, (A, _) in enumerate(pairs) if i != j)
    upper = sum(B @ A for i, (_, B) in enumerate(pairs) for j, (A, _) in enumerate(pairs) if i < j)
    must_equal(cross_terms(list(pairs)), want, {
        "this is (Σ B)(Σ A) whole: the updates themselves are still in it": too_much,
        "these are the updates B_i A_i themselves: wanted is what stands beside them": own,
        "the sign is the other way round: what is there, less what should be there": -want,
        "only i < j: each B meets every other A, before it and after it": upper,
        "only i > j: each B meets every other A, before it and after it": want - upper,
        "the updates are taken off twice": want - own,
    }, "cross_terms")


@pytest.mark.parametrize("out, into, rank", [(7, 5, 2), (3, 4, 3)])
def test_one_alone_has_no_cross_terms(cross_terms, out, into, rank):
    got = cross_terms(pairs_of((rank,), out, into))
    must_equal(got, torch.zeros(out, into, dtype=torch.float64), {}, "the cross terms of a single adapter, which are zero")


def test_cross_terms_pass_gradients_on(cross_terms):
    pairs = [(A.requires_grad_(), B.requires_grad_()) for A, B in pairs_of((2, 2), seed=30)]
    (A_1, B_1), (A_2, B_2) = pairs
    got = cross_terms(pairs)
    assert got.requires_grad, "no gradient can come back: no .data, no .detach()"
    G = draw(7, 5, seed=40)
    (got * G).sum().backward()
    must_equal(A_1.grad, (B_2.T @ G).detach(), {}, "dL/dA₁ = B₂ᵀ G: in the cross terms A₁ meets only the other's B")


# merge_in_float32

MERGES = [(W, factors, scale, out, into, rank)
          for W, factors in ((torch.bfloat16, torch.float32), (torch.float16, torch.float32), (torch.bfloat16, torch.bfloat16),
                             (torch.float32, torch.float32), (torch.float64, torch.float64), (torch.float32, torch.bfloat16))
          for scale, out, into, rank in ((0.75, 40, 30, 3), (2.5, 24, 56, 5))]


def merge_case(W_type, factor_type, out, into, rank, seed=50):
    return draw(out, into, seed=seed, dtype=W_type), draw(rank, into, seed=seed + 1, dtype=factor_type), draw(out, rank, seed=seed + 2, dtype=factor_type)


@pytest.mark.parametrize("W_type, factor_type, scale, out, into, rank", MERGES)
def test_merged_is_the_nearest_number_that_the_type_has(merge_in_float32, W_type, factor_type, scale, out, into, rank):
    W, A, B = merge_case(W_type, factor_type, out, into, rank)
    got = merge_in_float32(W.clone(), A, B, scale)
    assert isinstance(got, torch.Tensor), f"a tensor is wanted, got {type(got).__name__}"
    assert got.dtype == W_type, f"the result has W's type, {W_type}; got {got.dtype}"
    assert got.shape == W.shape, f"shape {tuple(W.shape)} is wanted, got {tuple(got.shape)}"
    dW = scale * B.double() @ A.double()
    exact, precise = W.double() + dW, 1e-13 if W_type == torch.float64 else 1e-6
    for mistake, wrong in {"W is missing: merging adds to W": dW, "the scale is missing": W.double() + dW / scale,
                           "the update is subtracted": W.double() - dW, "the scale is squared": W.double() + scale * dW,
                           "divided by the scale": W.double() + dW / scale**2}.items():
        is_wrong = torch.allclose(got.double(), wrong, rtol=1e-2, atol=1e-2)
        assert not is_wrong, mistake
    room = precise * (W.double().abs() + scale * B.double().abs() @ A.double().abs())
    nearest = (exact.to(W_type).double() - exact).abs()
    worse = ((got.double() - exact).abs() > nearest + room).double().mean().item()
    why = "it was computed in too few digits" if W_type in (torch.float32, torch.float64) else "something was rounded before the end: widen W and the factors first"
    assert worse == 0, f"{why}; {worse:.0%} of the weights are not the nearest {W_type} to W + dW"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_merging_leaves_the_old_weight_alone(merge_in_float32, dtype):
    W, A, B = merge_case(dtype, torch.float32 if dtype != torch.float64 else dtype, 6, 4, 2)
    before = W.clone()
    got = merge_in_float32(W, A, B, 0.5)
    unchanged = torch.equal(W, before)                                 # apart, so that a failure prints no numbers of W
    assert unchanged, "W was changed in place: return a new tensor, or there is no way back"
    assert got.data_ptr() != W.data_ptr(), "the result shares W's memory: return a new tensor"


# survivors

def a_share(got, want):
    """The type first, then a share that is right but for the digits of float32."""
    assert isinstance(got, float), f"a Python float is wanted, got {type(got).__name__}: .item()"
    assert math.isclose(got, want, rel_tol=1e-12) or not math.isclose(got, want, rel_tol=1e-6), (
        f"right, but only to the digits of float32 ({got:.12f} for {want:.12f}): take the mean in float64")
    return got


def test_survivors_by_hand(survivors):
    # bfloat16 has steps of 1/128 above 1, and of 1/256 below it: 0.003 up is less than half a step, 0.003 down is more
    W = torch.tensor([1.0, 1.0, 1.0, 1.0, 1.0])
    dW = torch.tensor([0.003, -0.003, 0.0, 0.01, 0.0])
    got = a_share(survivors(W, dW, torch.bfloat16), 2 / 3)
    assert not math.isclose(got, 2 / 5), "weights whose dW is 0 have nothing to lose: they do not count in the whole either"
    assert not math.isclose(got, 1 / 3), "this is the share that was lost"
    assert not math.isclose(got, 4 / 5) and not math.isclose(got, 1.0), "round W + dW to the type before you compare"
    assert math.isclose(got, 2 / 3), f"1 + 0.003 is stored as 1; 1 - 0.003 and 1 + 0.01 are not: 2 of 3 survive, got {got:.4f}"


def test_survivors_of_a_base_that_is_rounded_itself(survivors):
    # 1.003 is stored as 1; 1 + 0.002 is 1 again, though 1.003 + 0.002 would not be
    got = a_share(survivors(torch.tensor([[1.003, 1.003]]), torch.tensor([[0.002, 0.02]]), torch.bfloat16), 0.5)
    assert not math.isclose(got, 1.0), "the base is round(W): that is what dW is added to, and what the sum is compared with"
    assert math.isclose(got, 0.5), f"1.003 is stored as 1, and 1 + 0.002 is stored as 1 again: one of two survives, got {got:.4f}"


def test_survivors_are_counted_after_one_rounding(survivors):
    half = 2.0**-8                                                     # half a step above 1
    got = a_share(survivors(torch.ones(4), torch.tensor([half, half * (1 + 1e-3), half * (1 - 1e-3), -half]), torch.bfloat16), 0.5)
    assert math.isclose(got, 0.5), (
        f"of half a step, a shade more, a shade less, and a whole step down, the second and the last survive (a tie goes to the even number, here back to 1): "
        f"0.5, got {got:.4f}; dW is not rounded by itself")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shape, length", [((30, 40), 1e-3), ((17, 9), 1e-2), ((64, 20), 1e-7)])
def test_survivors_agree_with_the_packages_autopsy(survivors, dtype, shape, length):
    W, dW = draw(*shape, seed=60, dtype=torch.float32), length * draw(*shape, seed=61, dtype=torch.float32)
    dW[:3] = 0
    want = ml.merge_autopsy(W, dW, str(dtype).removeprefix("torch.")).survives
    got = a_share(survivors(W, dW, dtype), want)
    count = int(dW.count_nonzero())
    assert math.isclose(got, want, abs_tol=1e-12), (
        f"{round(want * count)} of {count} weights still show dW after a merge into {dtype}: {want:.12f}, got {got:.12f}, which is {got * count:.6g} weights")


# what_resume_needs

def small_run(seed=0, optimizer=torch.optim.AdamW, dropout=0.3):
    """A model with adapters and dropout, and its optimizer."""
    torch.manual_seed(seed)
    model = ml.adapt(nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)), ml.LoRA(rank=2, dropout=dropout), ["0", "2"])
    return model, optimizer([p for p in model.parameters() if p.requires_grad], lr=0.05)


def train(model, optimizer, steps):
    """Train for the numbers in `steps`; the batch is a function of the step."""
    for step in steps:
        x, y = draw(6, 5, seed=100 + step, dtype=torch.float32), draw(6, 3, seed=200 + step, dtype=torch.float32)
        loss = (model(x) - y).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def parameters(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def unmoved(before, after):
    """torch.equal by another name: pytest shows the arguments of what an assert calls, and a generator's state has 5,056 of them."""
    return isinstance(after, torch.Tensor) and torch.equal(before, after)


def part(kept, key):
    assert isinstance(kept, dict), f"a dict is wanted, got {type(kept).__name__}"
    assert key in kept, f"{key!r} is missing; there are {', '.join(map(repr, kept))}"
    return kept[key]


OPTIMIZERS = {"AdamW": torch.optim.AdamW, "SGD with momentum": lambda ps, lr: torch.optim.SGD(ps, lr=lr, momentum=0.9)}


def test_resume_keeps_what_is_trained_and_nothing_else(what_resume_needs):
    model, optimizer = small_run()
    train(model, optimizer, range(2))
    kept = what_resume_needs(model, optimizer, 2)
    want = {name for name, p in model.named_parameters() if p.requires_grad}
    extra = sorted(part(kept, "trained").keys() - want)
    assert not extra, f"frozen tensors are kept, too ({extra[0]}): they are on disk already, and they are nearly all of the model"
    assert kept["trained"].keys() == want, f"not all that is trained is kept: {sorted(want - kept['trained'].keys())}"
    assert all(torch.equal(tensor, model.get_parameter(name)) for name, tensor in kept["trained"].items()), "these are not the numbers of now"
    assert not any(tensor.requires_grad for tensor in kept["trained"].values()), (
        "detached copies are wanted, .detach().clone(): these still carry a gradient's history")
    assert kept.keys() == {"trained", "optimizer", "random", "step"}, f"four parts are wanted, got {sorted(kept)}"


@pytest.mark.parametrize("step", [2, 5])
def test_resume_begins_at_the_next_step(what_resume_needs, step):
    model, optimizer = small_run()
    train(model, optimizer, range(step))
    assert part(what_resume_needs(model, optimizer, step), "step") == step, "`step` is the next step's number already: keep it as it is"


def test_what_is_kept_stays_as_it_is(what_resume_needs):
    model, optimizer = small_run()
    train(model, optimizer, range(3))
    kept = what_resume_needs(model, optimizer, 3)
    trained = {name: tensor.detach().clone() for name, tensor in part(kept, "trained").items()}
    moments = copy.deepcopy(part(kept, "optimizer")["state"])
    random = part(kept, "random").clone()
    train(model, optimizer, range(3, 6))
    optimizer.param_groups[0]["lr"] = 7.0
    assert all(torch.equal(tensor, kept["trained"][name]) for name, tensor in trained.items()), (
        "training went on and the kept A and B moved with it: these are the living parameters, keep a copy (.detach().clone())")
    assert all(torch.equal(tensor, kept["optimizer"]["state"][i][name]) for i, parts in moments.items() for name, tensor in parts.items()), (
        "training went on and the kept moments moved with it: state_dict() hands out the living tensors, keep a deep copy")
    assert kept["optimizer"]["param_groups"][0]["lr"] == 0.05, "the kept learning rate changed with the optimizer's: keep a deep copy of the whole state_dict()"
    assert unmoved(random, kept["random"]), "the kept random state moved: keep a copy"


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("stop", [0, 3])
def test_resumed_is_as_if_never_stopped(what_resume_needs, kind, stop):
    model, optimizer = small_run(optimizer=OPTIMIZERS[kind])
    base = copy.deepcopy(model)                                        # what is on disk: W, and where A and B started
    torch.manual_seed(1)
    train(model, optimizer, range(stop))
    kept = what_resume_needs(model, optimizer, stop)
    train(model, optimizer, range(stop, 7))                            # never stopped
    want = parameters(model)

    _, fresh = small_run(seed=2, optimizer=OPTIMIZERS[kind])
    fresh.param_groups[0]["params"] = [p for p in base.parameters() if p.requires_grad]
    torch.manual_seed(99)                                              # another day
    trained = part(kept, "trained")
    missing = [name for name, p in base.named_parameters() if p.requires_grad and name not in trained]
    assert not missing, f"not all that is trained is kept: {', '.join(missing)}"
    with torch.no_grad():
        for name, tensor in trained.items():
            base.get_parameter(name).copy_(tensor)
    state = part(kept, "optimizer")
    assert not stop or state["state"], "the optimizer's moments are missing: optimizer.state_dict() has them under 'state'"
    fresh.load_state_dict(state)
    torch.set_rng_state(part(kept, "random"))
    train(base, fresh, range(part(kept, "step"), 7))
    got = parameters(base)
    worst = max((got[name] - want[name]).abs().max().item() for name in want)
    assert all(torch.equal(got[name], want[name]) for name in want), (
        f"the resumed run ends elsewhere, by up to {worst:.3g}: is each part of this very moment, the random generator's state included, and a copy?")


def test_keeping_disturbs_nothing(what_resume_needs):
    model, optimizer = small_run()
    train(model, optimizer, range(2))
    drawn, before, moments = torch.get_rng_state(), parameters(model), copy.deepcopy(optimizer.state_dict()["state"])
    flags = [p.requires_grad for p in model.parameters()]
    kept = what_resume_needs(model, optimizer, 2)
    assert unmoved(drawn, torch.get_rng_state()), "random numbers were drawn, or the seed was set: only read the generator's state"
    assert unmoved(drawn, part(kept, "random")), "'random' is torch.get_rng_state() as it is at the call"
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters()), "the model changed"
    assert flags == [p.requires_grad for p in model.parameters()], "what is trained and what is frozen changed"
    now = optimizer.state_dict()["state"]
    assert all(torch.equal(tensor, now[i][name]) for i, parts in moments.items() for name, tensor in parts.items()), "the optimizer changed"


# scaled_mixture

def small_gpt(width=16):
    torch.manual_seed(0)
    return ml.TinyGPT(ml.GPTConfig(vocab_size=20, context=16, width=width, layers=1, heads=2))


TARGETS = ["q_proj", "up_proj", "down_proj"]


def written(folder, method, seed, width=16):
    """PEFT's two files, as if from training, and the update of each layer."""
    linears = {name: linear for name, linear in small_gpt(width).named_modules() if name.rpartition(".")[2] in TARGETS}
    A = {name: draw(method.rank, linear.in_features, seed=seed + i, dtype=torch.float32) for i, (name, linear) in enumerate(linears.items())}
    B = {name: draw(linear.out_features, method.rank, seed=seed + 50 + i, dtype=torch.float32) for i, (name, linear) in enumerate(linears.items())}
    folder.mkdir()
    tensors = {f"base_model.model.{name}.lora_{letter}.weight": tensor for letter, factors in (("A", A), ("B", B)) for name, tensor in factors.items()}
    safetensors.torch.save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "task_type": None, "target_modules": list(linears), "bias": "none", "r": method.rank, "lora_alpha": method.alpha}
    config |= {"use_rslora": True} if method.rslora else {}            # an older PEFT knows no such field
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return {name: method.scale * B[name] @ A[name] for name in linears}


def loaded(folder, width=16):
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (folder / file).is_file(), f"{file} is missing in the new folder"
    try:
        return ml.load_adapter(small_gpt(width), folder)
    except ValueError as error:
        pytest.fail(f"the new folder does not load: {error}", pytrace=False)


def mixed_updates(folder, width=16):
    return {name: layer.delta_weight().detach() for name, layer in ml.adapters(loaded(folder, width))}


def check_stored(folder, wanted):
    """B and A may hold the whole sum already, and the configuration multiply it once more: the likeliest mistake."""
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = safetensors.torch.load_file(folder / "adapter_model.safetensors")
    stored = {name: tensors[f"base_model.model.{name}.lora_B.weight"] @ tensors[f"base_model.model.{name}.lora_A.weight"] for name in wanted}
    alpha, r, rooted = config["lora_alpha"], config["r"], config.get("use_rslora", False)
    if all(torch.allclose(stored[name], wanted[name], rtol=1e-4, atol=1e-4) for name in wanted):
        assert not rooted or math.isclose(alpha, math.sqrt(r)), f"B and A are right, but the new folder still says use_rslora: lora_alpha / √r is {alpha / math.sqrt(r):g}, it must be 1"
        assert rooted or math.isclose(alpha, r), (
            f"B and A are right, but your adapter_config.json multiplies again: lora_alpha / r is {alpha:g} / {r:g} = {alpha / r:g}, it must be 1")


LOUD, SOFT, ROOTED = ml.LoRA(rank=2, alpha=5), ml.LoRA(rank=3, alpha=2), ml.LoRA(rank=4, alpha=3, rslora=True)
MIXTURES = {
    "one each": ((LOUD, SOFT), (1.0, 1.0)), "equal ranks": ((LOUD, ml.LoRA(rank=2, alpha=3)), (0.5, 0.25)), "halves and more": ((SOFT, LOUD), (0.5, 1.75)),
    "below zero": ((LOUD, SOFT), (-0.5, 1.0)), "zero": ((LOUD, SOFT), (0.0, 0.7)), "one alone": ((SOFT,), (0.4,)), "three": ((LOUD, SOFT, LOUD), (0.2, 0.5, -0.9)),
    "rsLoRA last": ((LOUD, ROOTED), (0.3, 0.6)), "rsLoRA first": ((ROOTED, LOUD), (0.3, 0.6)),
}


def test_mixture_is_concatenated(scaled_mixture, tmp_path):
    for i, method in enumerate((LOUD, SOFT)):
        written(tmp_path / str(i), method, seed=400 + 100 * i)
    scaled_mixture([tmp_path / "0", tmp_path / "1"], [0.5, 0.5], tmp_path / "mix")
    config = json.loads((tmp_path / "mix" / "adapter_config.json").read_text())
    assert config["r"] == 5, f"ranks 2 and 3 make rank 5, the configuration says r = {config['r']}"
    tensors = safetensors.torch.load_file(tmp_path / "mix" / "adapter_model.safetensors")
    old = safetensors.torch.load_file(tmp_path / "0" / "adapter_model.safetensors")
    assert tensors.keys() == old.keys(), "the tensors have other names than the old ones"
    assert all(tensor.dtype == torch.float32 for tensor in tensors.values()), "float32 is wanted"
    loaded(tmp_path / "mix")


@pytest.mark.parametrize("which", MIXTURES)
def test_mixture_adds_the_weighted_updates(scaled_mixture, tmp_path, which):
    methods, weights = MIXTURES[which]
    folders = [tmp_path / f"voice {i}" for i in range(len(methods))]
    updates = [written(folder, method, seed=300 + 100 * i) for i, (folder, method) in enumerate(zip(folders, methods))]
    scaled_mixture(folders, list(weights), tmp_path / "mix")
    got, scales = mixed_updates(tmp_path / "mix"), [method.scale for method in methods]
    assert got.keys() == updates[0].keys(), "the new adapter is on other layers than the old ones"

    check_stored(tmp_path / "mix", {name: sum(weight * update[name] for weight, update in zip(weights, updates)) for name in updates[0]})

    def weighted(factors):
        return {name: sum(factor * update[name] for factor, update in zip(factors, updates)) for name in updates[0]}

    for name, want in weighted(weights).items():
        mistakes = {"the weights are missing": [1.0] * len(weights), "the scales are missing: dW is scale · B A": [w / s for w, s in zip(weights, scales)],
                    "the weights are squared: put each into B or into A, not into both": [w * abs(w) for w in weights],
                    "the scales are squared: put each into B or into A, not into both": [w * s for w, s in zip(weights, scales)],
                    "the sign of a weight was lost": [abs(w) for w in weights],
                    "an rsLoRA's scale is alpha / √r: read use_rslora": [w / math.sqrt(m.rank) if m.rslora else w for w, m in zip(weights, methods)],
                    "the new folder still says use_rslora: its scale is alpha / √r then": [w * math.sqrt(sum(m.rank for m in methods)) for w in weights]}
        mistakes = {mistake: weighted(factors)[name] for mistake, factors in mistakes.items()}
        mistakes = {mistake: wrong for mistake, wrong in mistakes.items() if not torch.allclose(wrong, want, rtol=1e-3, atol=1e-3)}
        must_equal(got[name], want, mistakes, f"the update of {name}, weights {weights}", rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("width", [16, 24])
def test_mixture_of_adapters_that_minilora_saved_is_their_sum(scaled_mixture, tmp_path, width):
    plain, updates = small_gpt(width), []
    for i, method in enumerate((LOUD, SOFT)):
        model = ml.adapt(small_gpt(width), method, TARGETS)
        for j, (_, layer) in enumerate(ml.adapters(model)):
            layer.B.data.copy_(draw(*layer.B.shape, seed=500 + 50 * i + j))
        ml.save_adapter(model, tmp_path / str(i))
        updates.append({name: layer.delta_weight().detach() for name, layer in ml.adapters(model)})
    scaled_mixture([tmp_path / "0", tmp_path / "1"], [0.3, -0.1], tmp_path / "mix")
    ids = torch.randint(20, (2, 9), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        for name in updates[0]:
            plain.get_submodule(name).weight.add_(0.3 * updates[0][name] - 0.1 * updates[1][name])
        want, got = plain(ids), loaded(tmp_path / "mix", width)(ids)
    off = (got - want).abs().max().item()
    assert off < 1e-3, f"the model with the mixture says something else than the base with both updates on it: its logits are off by up to {off:.3g}"


def test_mixture_goes_where_it_should_and_touches_nothing_else(scaled_mixture, tmp_path):
    for i, method in enumerate((LOUD, SOFT)):
        written(tmp_path / str(i), method, seed=600 + 100 * i)
    before = {file: file.read_bytes() for i in "01" for file in (tmp_path / i).iterdir()}
    deep = tmp_path / "not" / "there" / "yet"
    scaled_mixture([tmp_path / "0", tmp_path / "1"], [1.0, 1.0], deep)
    first = mixed_updates(deep)
    scaled_mixture([tmp_path / "0", tmp_path / "1"], [1.0, 0.5], deep)                     # a second time into the same folder
    assert any(not torch.equal(first[name], update) for name, update in mixed_updates(deep).items()), "the second mixture did not replace the first"
    assert all(file.read_bytes() == content for file, content in before.items()), "the folders that were mixed have changed"
