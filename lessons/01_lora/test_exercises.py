"""What is true of a right answer. B is random here wherever it can be: at B = 0 almost any answer passes."""

import copy
import math

import pytest
import torch
from torch import nn

import minilora as ml
from lessons.expect import SIZES, Size, draw, each_size, must_equal

# lora_branch

@each_size
@pytest.mark.parametrize("leading", [(), (4,), (3, 4)], ids=["one x", "a batch", "batch and time"])
def test_branch_is_the_scaled_product(lora_branch, size, leading):
    _, A, B = size.factors()
    x = draw(*leading, size.into, seed=1)
    full = x @ (B @ A).T
    must_equal(lora_branch(x, A, B, size.alpha, size.rank), size.scale * full, {
        "the scale is missing: s = alpha / rank": full,
        "the scale is alpha / rank; this looks like alpha alone": size.alpha * full,
        "the scale is alpha / rank; this looks like rank / alpha": full / size.scale,
        "the scale is alpha / rank; this looks like alpha // rank, which throws the fraction away": size.alpha // size.rank * full,
        "the scale is alpha / rank; this looks like alpha / √rank, which is rsLoRA's": size.alpha / math.sqrt(size.rank) * full,
    }, f"lora_branch on x of shape {(*leading, size.into)}")


def test_branch_is_silent_where_B_is_zero(lora_branch):
    size = SIZES[0]
    _, A, B = size.factors()
    branch = lora_branch(draw(4, size.into), A, torch.zeros_like(B), size.alpha, size.rank)
    assert not branch.any(), "with B = 0 the branch must add nothing: is x or W in the sum?"


class Watch(torch.overrides.TorchFunctionMode):
    """The largest tensor that comes up."""

    largest = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.largest = max(self.largest, result.numel())
        return result


def test_branch_never_forms_the_large_matrix(lora_branch):
    """At width 1,000 B A holds a million numbers; the two thin products hold rank + out."""
    wide = 1000
    x, A, B = draw(1, wide), draw(2, wide, seed=1), draw(wide, 2, seed=2)
    with Watch() as watch:
        lora_branch(x, A, B, 3.0, 2)
    assert watch.largest <= 2 * wide, f"B A was formed, {watch.largest:,} numbers: multiply x by Aᵀ first, then by Bᵀ"


# LoRALayer

def awake(LoRALayer, size: Size = SIZES[0], bias=True):
    """A layer in float64 whose B is not zero, with the frozen layer it was made from."""
    torch.manual_seed(3)
    linear = nn.Linear(size.into, size.out, bias=bias, dtype=torch.float64)
    layer = LoRALayer(linear, size.rank, size.alpha).double()
    for name, want in (("A", (size.rank, size.into)), ("B", (size.out, size.rank))):
        assert isinstance(getattr(layer, name, None), nn.Parameter), f"self.{name} must be there, an nn.Parameter"
        got = tuple(getattr(layer, name).shape)
        assert got == want, f"A is (rank, in) and B is (out, rank): {name} {want} is wanted, got {got}"
    with torch.no_grad():
        layer.A.copy_(draw(size.rank, size.into, seed=5))
        layer.B.copy_(draw(size.out, size.rank, seed=4))
    return layer, linear


@each_size
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_layer_adds_the_branch_to_the_base(LoRALayer, size, bias):
    layer, linear = awake(LoRALayer, size, bias)
    x = draw(2, 3, size.into, seed=1)
    base, full = linear(x), x @ (layer.B @ layer.A).T
    mistakes = {
        "only the base speaks: the branch is not added": base,
        "W is replaced: base(x) is missing from the sum": size.scale * full,
        "the scale is missing: s = alpha / rank": base + full,
        "the scale is alpha / rank; this looks like alpha alone": base + size.alpha * full,
        "the scale is alpha / rank; this looks like alpha // rank, which throws the fraction away": base + size.alpha // size.rank * full,
    }
    if bias:
        mistakes["the bias is counted twice: base(x) has it already"] = base + size.scale * full + linear.bias
    must_equal(layer(x), base + size.scale * full, mistakes, "LoRALayer.forward")


def test_layer_starts_as_the_base(LoRALayer):
    torch.manual_seed(0)
    linear = nn.Linear(64, 48)
    x = torch.randn(3, 64)
    before = linear(x)
    layer = LoRALayer(linear, 4, 8.0)
    assert torch.equal(layer(x), before), "the adapted layer must start as the base, bit for bit: B starts at zero"
    assert not layer.B.any(), "B starts at zero, and A random: here B is not zero"
    assert layer.A.any(), "A starts random: were A zero too, neither factor would ever receive a gradient"


def test_layer_draws_A_as_nn_Linear_does(LoRALayer):
    torch.manual_seed(0)
    A = LoRALayer(nn.Linear(400, 30), 50, 8.0).A            # 20,000 draws
    bound = 1 / math.sqrt(400)
    assert A.abs().max() <= bound, f"A is drawn too wide: kaiming_uniform_(a=√5) on (rank, in) stays within 1/√in = {bound}, got {A.abs().max().item():.3f}"
    assert A.abs().max() > 0.99 * bound and abs(A.std().item() * math.sqrt(3 * 400) - 1) < 0.03, \
        f"A is drawn too narrow: std 1/√(3·in) = {1 / math.sqrt(1200):.4f} is wanted, got {A.std().item():.4f}"


def test_layer_trains_A_and_B_and_nothing_else(LoRALayer):
    layer, linear = awake(LoRALayer)
    trainable = {name for name, p in layer.named_parameters() if p.requires_grad}
    assert "base.weight" not in trainable, "W is not frozen: LoRA trains A and B beside it"
    assert "base.bias" not in trainable, "the base's bias is not frozen: freeze the whole layer, not only its weight"
    assert trainable == {"A", "B"}, f"A and B must be the trainable parameters, got {sorted(trainable)}"
    assert layer.base is linear, "keep the layer that was given as self.base, not a copy of it"


def test_layer_training_leaves_W_bit_for_bit(LoRALayer):
    layer, linear = awake(LoRALayer)
    before, A, B = linear.weight.detach().clone(), layer.A.detach().clone(), layer.B.detach().clone()
    layer(draw(4, SIZES[0].into)).square().sum().backward()
    with torch.no_grad():                                        # a step of SGD, without the seconds that importing torch.optim's compiler takes
        for p in layer.parameters():
            if p.requires_grad:
                p -= 0.1 * p.grad
    assert torch.equal(linear.weight, before), "W moved in training: it has to stay as it is, bit for bit"
    assert not torch.equal(layer.A, A) and not torch.equal(layer.B, B), "with B not zero, one step must move both A and B"


# lora_gradients

@each_size
@pytest.mark.parametrize("seed", [0, 1])
def test_gradients_are_autograds(lora_gradients, size, seed):
    W, A, B = size.factors(seed)
    A, B = A.requires_grad_(), B.requires_grad_()
    effective = W + size.scale * B @ A
    effective.retain_grad()
    (draw(4, size.into, seed=1) @ effective.T).tanh().sum().backward()
    got = lora_gradients(effective.grad, A.detach(), B.detach(), size.scale)
    assert isinstance(got, tuple) and len(got) == 2, "two tensors are wanted: dL/dA, then dL/dB"
    assert got[0].shape != B.shape or got[1].shape != A.shape, "the two are in the wrong order: dL/dA comes first, then dL/dB"
    for gradient, of, name in ((got[0], A, "dL/dA = s Bᵀ G"), (got[1], B, "dL/dB = s G Aᵀ")):
        must_equal(gradient, of.grad, {f"the scale is missing in {name}": of.grad / size.scale, f"the scale is squared in {name}": of.grad * size.scale}, name.partition(" ")[0])


def test_gradients_at_the_start_move_only_B(lora_gradients):
    W, A, B = SIZES[0].factors()
    dA, dB = lora_gradients(W, A, torch.zeros_like(B), 1.5)      # any G will do
    assert not dA.any(), "at B = 0 dL/dA = s Bᵀ G is zero: only B can move at the first step"
    assert dB.any(), "at B = 0 dL/dB = s G Aᵀ is not zero: it has A in it, not B"


# merge_lora

@each_size
def test_merge_does_the_work_of_both(merge_lora, size):
    W, A, B = size.factors()
    must_equal(merge_lora(W, A, B, size.alpha, size.rank), W + size.scale * B @ A, {
        "the scale is missing: s = alpha / rank": W + B @ A,
        "the scale is alpha / rank; this looks like alpha alone": W + size.alpha * B @ A,
        "the scale is alpha / rank; this looks like alpha // rank, which throws the fraction away": W + size.alpha // size.rank * B @ A,
        "W is missing: merging adds the update to W": size.scale * B @ A,
        "the update is subtracted: that is how one takes it out again": W - size.scale * B @ A,
    }, "merge_lora")


def test_merge_returns_a_new_tensor(merge_lora):
    size = SIZES[1]
    W, A, B = size.factors()
    merged = merge_lora(W, A, torch.zeros_like(B), size.alpha, size.rank)
    assert merged.untyped_storage().data_ptr() != W.untyped_storage().data_ptr(), "the result shares W's memory: return a new tensor, or there is no way back"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_merge_keeps_the_dtype_of_W(merge_lora, dtype):
    size = SIZES[0]
    W, A, B = size.factors(2)
    merged = merge_lora(W.to(dtype), A.float(), B.float(), 1.0, size.rank)
    assert merged.dtype == dtype, f"the result has W's dtype, {dtype}, also where A and B are float32; got {merged.dtype}"
    must_equal(merged, W + B @ A / size.rank, {}, f"merge_lora in {dtype}", rtol=0.02, atol=0.02)       # bfloat16 keeps 8 bits


@each_size
def test_merged_layer_says_the_same(merge_lora, size):
    W, A, B = size.factors(5)
    x = draw(3, 4, size.into, seed=1)
    apart = x @ W.T + size.scale * (x @ A.T @ B.T)
    together = x @ merge_lora(W, A, B, size.alpha, size.rank).T
    assert torch.allclose(apart, together, rtol=1e-9, atol=1e-12), f"merged and unmerged disagree by {(apart - together).abs().max().item():.3g}"


# inject_lora

def small_gpt():
    torch.manual_seed(0)
    return ml.TinyGPT(ml.GPTConfig(context=16, width=16, layers=2, heads=2))


@pytest.mark.parametrize("rank, alpha", [(3, 2.0), (2, 5.0)])
def test_inject_swaps_the_targets_and_no_others(inject_lora, rank, alpha):
    model = inject_lora(small_gpt(), ["q_proj", "down_proj"], rank, alpha)
    found = {name for name, _ in ml.adapters(model)}
    want = {f"blocks.{i}.{name}" for i in (0, 1) for name in ("attention.q_proj", "mlp.down_proj")}
    assert not want - found, f"not every target was swapped: {sorted(want - found)} still have no adapter"
    assert found == want, f"layers were swapped that no target names: {sorted(found - want)}"
    scales, ranks = ({of(layer) for _, layer in ml.adapters(model)} for of in (lambda layer: layer.scale, lambda layer: layer.A.shape[0]))
    assert scales == {alpha / rank}, f"rank and alpha do not reach the layers: s should be alpha / rank = {alpha / rank:.3f}, and is {scales}"
    assert ranks == {rank}, f"rank and alpha do not reach the layers: A should have rank = {rank} rows, and has {ranks}"


def test_inject_works_in_place(inject_lora):
    model = small_gpt()
    q_proj = model.blocks[0].attention.q_proj
    assert inject_lora(model, ["q_proj"], 2, 4.0) is model, "change the model itself and return it, not a copy"
    assert model.blocks[0].attention.q_proj.base is q_proj, "the adapter must hold the very layer it replaces: the pretrained weights are in there"


def test_inject_freezes_all_but_A_and_B(inject_lora):
    model = inject_lora(small_gpt(), ["q_proj", "v_proj"], 2, 4.0)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    others = sorted(name for name in trainable if name.rpartition(".")[2] not in ("A", "B"))
    assert not others, f"not everything is frozen: {others[0]} and {len(others) - 1} more still train; norms, embeddings and biases too must be frozen"
    assert len(trainable) == 8, f"the new A and B are frozen too: freeze first, swap afterwards ({len(trainable)} of 8 are trainable)"


def test_inject_matches_whole_parts_of_a_name(inject_lora):
    torch.manual_seed(0)
    model = nn.ModuleDict({"q_proj": nn.Linear(4, 4), "fancy_q_proj": nn.Linear(4, 4), "q_proj_old": nn.Linear(4, 4), "value": nn.Linear(4, 4)})
    model = inject_lora(model, ["q_proj"], 2, 4.0)
    assert [name for name, _ in ml.adapters(model)] == ["q_proj"], \
        f'"q_proj" means the part of the name after the last dot, whole; swapped were {[name for name, _ in ml.adapters(model)]}'


def test_inject_takes_linears_only(inject_lora):
    model = inject_lora(nn.ModuleDict({"a": nn.ModuleDict({"q_proj": nn.Conv1d(4, 4, 1)}), "b": nn.ModuleDict({"q_proj": nn.Linear(4, 4)})}), ["q_proj"], 2, 3.0)
    assert type(model["a"]["q_proj"]) is nn.Conv1d, "a layer called q_proj that is no nn.Linear stays as it is: ask isinstance(layer, nn.Linear)"
    assert [name for name, _ in ml.adapters(model)] == ["b.q_proj"], "the nn.Linear called q_proj was not swapped"


def test_inject_says_what_the_model_said(inject_lora):
    model = small_gpt()
    ids = torch.randint(256, (2, 9), generator=torch.Generator().manual_seed(1))
    before = copy.deepcopy(model)(ids)
    assert torch.equal(inject_lora(model, ["q_proj", "up_proj"], 2, 4.0)(ids), before), "B = 0, so the model must say what it said before, bit for bit"


# lora_parameter_count

@pytest.mark.parametrize("shapes, rank, want", [
    ([(7, 5)], 1, 12), ([(7, 5), (3, 2)], 2, 34), ([], 4, 0),
    ([(12288, 12288)] * 2 * 96, 1, 4_718_592), ([(12288, 12288)] * 2 * 96, 4, 18_874_368), ([(12288, 12288)] * 2 * 96, 8, 37_748_736),
    ([(768, 768)] * 2 * 12, 8, 294_912),
], ids=["one", "two", "none", "GPT-3 r=1", "GPT-3 r=4", "GPT-3 r=8", "RoBERTa-base r=8"])
def test_count_by_hand_and_by_the_paper(lora_parameter_count, shapes, rank, want):
    full = sum(out * into for out, into in shapes)
    got = lora_parameter_count(shapes, rank)
    assert got != full or got == want, f"these are W's own entries, {full:,}, which are frozen: count A and B"
    assert got == want, f"A has rank · in entries and B has out · rank: {want:,} is wanted, got {got:,}"


def test_count_agrees_with_a_real_model(lora_parameter_count):
    model = small_gpt()
    shapes = [tuple(linear.weight.shape) for block in model.blocks for linear in block.modules() if isinstance(linear, nn.Linear)]
    real = ml.trainable_parameters(ml.adapt(model, ml.LoRA(rank=3)))
    got = lora_parameter_count(shapes, 3)
    assert got == real, f"A has rank · in entries and B has out · rank: an adapted model trains {real:,} numbers, this says {got:,}"


# best_rank

@pytest.mark.parametrize("shape", [(7, 5), (5, 7)])
@pytest.mark.parametrize("rank", [1, 3])
def test_best_rank_is_the_truncated_svd(best_rank, shape, rank):
    W = draw(*shape, seed=6)
    got, kept = best_rank(W, rank)
    assert got.shape == W.shape, f"the approximation has W's own shape {tuple(W.shape)}, got {tuple(got.shape)}"
    assert torch.linalg.matrix_rank(got) == rank, f"a matrix of rank {rank} is wanted, this has rank {torch.linalg.matrix_rank(got)}"
    sigma = torch.linalg.svdvals(W)
    least = sigma[rank:].square().sum().sqrt().item()
    error = (W - got).norm().item()
    assert abs(error - least) < 1e-9, f"not the best of its rank: the error is {error:.4f}, and {least:.4f} is possible; keep the largest σ, and mind that svd returns Vᵀ"


def test_best_rank_keeps_a_share_of_the_energy(best_rank):
    W = torch.diag(torch.tensor([4.0, 3.0, 2.0, 1.0], dtype=torch.float64))      # energy 16, 9, 4, 1 of 30
    kept = best_rank(W, 2)[1]
    assert isinstance(kept, float), f"the share is a Python float, got {type(kept).__name__}: use .item()"
    assert not math.isclose(kept, 7 / 10), "energy is Σ σ², not Σ σ: square the singular values"
    assert not math.isclose(kept, math.sqrt(25 / 30)), "the share is of squares, ‖W_r‖² / ‖W‖²: no root"
    assert not math.isclose(kept, 5 / 30), "this is the share that is lost: 1 minus it is kept"
    assert math.isclose(kept, 25 / 30), f"σ = 4, 3, 2, 1: two of them keep (16 + 9) / 30 = 0.8333, got {kept:.4f}"


def test_best_rank_keeps_everything_at_full_rank(best_rank):
    W = draw(7, 5, seed=8)
    got, kept = best_rank(W, 5)
    assert torch.allclose(got, W, atol=1e-12) and math.isclose(kept, 1.0), f"rank 5 of a 7x5 matrix is all of it; kept {kept:.4f}"
