"""What is true of a right answer to lesson 00."""

import itertools
import math
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lessons.expect import draw, must_equal
from minilora import GPTConfig, TinyGPT, data

each_shape = pytest.mark.parametrize("shape", [(2, 3, 5, 8, 6), (1, 2, 4, 3, 7)], ids=["T=5, d=8", "T=4, d=3"])


def qkv(shape=(2, 3, 5, 8, 6), seed: int = 0):
    B, heads, T, d, e = shape
    return draw(B, heads, T, d, seed=seed), draw(B, heads, T, d, seed=seed + 101), draw(B, heads, T, e, seed=seed + 202)


def test_attention_never_looks_ahead(causal_attention):
    q, k, v = qkv()
    before = causal_attention(q, k, v)
    k[:, :, 3:], v[:, :, 3:] = 7.0, -7.0
    after = causal_attention(q, k, v)
    assert torch.allclose(before[:, :, :3], after[:, :, :3], equal_nan=True), (
        "a position looks ahead: set the scores of later positions to -inf before the softmax (a zero is still a vote)")


def test_attention_weights_sum_to_one(causal_attention):
    q, k, v = qkv(seed=2)
    got = causal_attention(q, k, torch.ones_like(v))[:, :, 1:]
    assert torch.allclose(got, torch.ones_like(got)), (
        f"each row of weights must sum to 1: softmax over the keys, the last dimension; here they sum to {got.min():.3f} … {got.max():.3f}")


def test_attention_of_the_first_position_is_itself(causal_attention):
    q, k, v = qkv(seed=1)
    assert torch.allclose(causal_attention(q, k, v)[:, :, 0], v[:, :, 0]), (
        "position 0 can see only itself, so its output is v[0]: keep the diagonal, mask only what comes after")


@each_shape
def test_attention_equals_torch(causal_attention, shape):
    q, k, v = qkv(shape, seed=3)
    got, want = causal_attention(q, k, v), F.scaled_dot_product_attention(q, k, v, is_causal=True)
    assert got.shape == want.shape, f"the output has v's shape: {tuple(want.shape)}, not {tuple(got.shape)}"
    assert torch.allclose(got, want), (
        f"scores are divided by √d, the root of the width of q (here √{shape[3]}), once; largest difference {(got - want).abs().max():.3g}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_attention_keeps_the_dtype(causal_attention, dtype):
    q, k, v = (part.to(dtype) for part in qkv(seed=4))
    got = causal_attention(q, k, v)
    assert got.dtype == dtype, f"the output has the dtype of q, k and v: {dtype}, not {got.dtype}"


each_text = pytest.mark.parametrize("shape", [(3, 7, 11), (2, 4, 5)], ids=["V=11", "V=5"])


def guesses(shape=(3, 7, 11), seed: int = 0):
    B, T, V = shape
    return draw(B, T, V, seed=seed), torch.randint(V, (B, T), generator=torch.Generator().manual_seed(seed))


@each_text
def test_loss_of_no_idea_is_log_of_the_choices(next_byte_nats, shape):
    _, ids = guesses(shape)
    got, V = float(next_byte_nats(torch.zeros(shape, dtype=torch.float64), ids)), shape[-1]
    assert math.isclose(got, math.log(V), rel_tol=1e-9), (
        f"equal logits over {V} bytes cost ln {V} = {math.log(V):.4f} nats: the mean, not the sum, and the natural logarithm; got {got:.4f}")


@each_text
def test_loss_of_a_sure_and_right_guess_is_zero(next_byte_nats, shape):
    _, ids = guesses(shape, 1)
    logits = torch.zeros(shape, dtype=torch.float64)
    logits[:, :-1] = 40.0 * F.one_hot(ids[:, 1:], shape[-1])
    got = float(next_byte_nats(logits, ids))
    assert abs(got) < 1e-9, (
        f"logits at position t guess the byte at t + 1: shift one against the other; got {got:.4f} for a model that is always right")


@each_text
def test_loss_equals_cross_entropy(next_byte_nats, shape):
    logits, ids = guesses(shape, 2)
    got = next_byte_nats(logits, ids)
    want = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    must_equal(got, want, {"the predictions of each sequence are summed: the mean is over all B · (T - 1)": want * (shape[1] - 1)},
               "the mean of the -log p, softmax over the last dimension; not -log of the mean p")


def test_loss_survives_large_logits(next_byte_nats):
    logits, ids = guesses(seed=3)
    got, want = next_byte_nats(1000 * logits, ids), F.cross_entropy(1000 * logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    assert torch.allclose(got, want), (
        f"log(softmax(x)) underflows to log 0: use log_softmax, which subtracts; got {float(got)}, not {float(want):.1f}")


def test_bits_of_plain_text(bits_per_byte):
    got = bits_per_byte(11.3 * math.log(2), "abcd")
    assert math.isclose(got, 2.825), (
        f"one bit is ln 2 = 0.693 nats, so divide by ln 2: 11.3 ln 2 nats over 4 bytes are 2.825 bits a byte, not {got:.4f}")


@pytest.mark.parametrize("text", ["naïve", "春眠不覺曉", "a\n"])
def test_bits_count_bytes(bits_per_byte, text):
    got, size = bits_per_byte(31.3 * math.log(2), text), len(text.encode())
    assert math.isclose(got, 31.3 / size), (
        f"a byte is not a character: {text!r} has {len(text)} characters and {size} bytes; got {got:.4f}, not {31.3 / size:.4f}")


def test_entropy_of_one_kind(grammar_entropy):
    got = grammar_entropy([[24, 16, 12]])
    assert math.isclose(got, math.log(24 * 16 * 12)), (
        f"independent slots multiply, so their logarithms add: ln 24 + ln 16 + ln 12 = {math.log(24 * 16 * 12):.4f} nats, not {got:.4f}")


def test_entropy_of_the_choice_of_kind(grammar_entropy):
    got = grammar_entropy([[], [], []])
    assert math.isclose(got, math.log(3)), (
        f"which kind it is has to be told too: 3 kinds without slots are ln 3 = {math.log(3):.4f} nats, not {got:.4f}")


@pytest.mark.parametrize("kinds", [[[5, 4], [3]], [[2], [2, 2, 7], [6, 1]], [[9], []]])
def test_entropy_is_the_mean_surprise(grammar_entropy, kinds):
    # The slow spec: list every document with its probability.
    p = [1 / len(kinds) / math.prod(slots) for slots in kinds for _ in itertools.product(*map(range, slots))]
    got, want = grammar_entropy(kinds), -sum(x * math.log(x) for x in p)
    assert math.isclose(got, want, rel_tol=1e-9), (
        f"kinds are equally likely, documents are not: average over kinds (no sum, no log of the number of documents); "
        f"{kinds} has {want:.4f} nats, not {got:.4f}")


def test_entropy_of_the_tiny_world(grammar_entropy):
    kinds = []
    for kind in data.KINDS:
        slots = re.findall(r"\{\w+:(\w+)\}", kind)                       # the same word is never drawn twice in a document
        kinds.append([len(data.SLOTS[slot]) - slots[:i].count(slot) for i, slot in enumerate(slots)])
    got, want = grammar_entropy(kinds), data.World().entropy
    assert math.isclose(got, want, rel_tol=1e-9), f"{kinds}, the tiny world, has {want:.4f} nats a document, not {got:.4f}"


def test_count_of_one_block(parameter_count):
    one, two = (parameter_count(GPTConfig(vocab_size=10, context=7, width=12, layers=n, heads=3)) for n in (1, 2))
    assert two - one == 12 * 12**2 + 13 * 12, (
        f"a block of width 12 has 12·12² + 13·12 = 1884 numbers: are all six biases and both norms (weight and bias) in it? got {two - one}")


def test_count_outside_the_blocks(parameter_count):
    config = GPTConfig(vocab_size=10, context=7, width=12, layers=1, heads=3)
    got = parameter_count(config) - (12 * 12**2 + 13 * 12)
    assert got == 10 * 12 + 7 * 12 + 2 * 12 + 10 * 12, (
        f"beside the blocks: byte and position embedding, the last norm, and a head of its own without bias: 348 numbers here, not {got}")


@pytest.mark.parametrize("config", [GPTConfig(), GPTConfig(300, 20, 48, 3, 6), GPTConfig(17, 200, 40, 2, 5)], ids=["shipped", "wide", "long"])
def test_count_is_the_models(parameter_count, config):
    want = sum(p.numel() for p in TinyGPT(config).parameters())
    assert parameter_count(config) == want, (
        f"{config} learns {want:,} numbers; the formula says {parameter_count(config):,}. Heads share the width, they add nothing")


def start(seed: int = 0, shape=(3, 5)):
    p, grad = draw(*shape, seed=seed), draw(*shape, seed=seed + 101)
    return p, grad, torch.zeros_like(p), torch.zeros_like(p)


def test_first_step_is_lr_long(adamw_step):
    p, grad, m, v = start()
    moved = (adamw_step(p, grad, m, v, 1, 0.1)[0] - p).abs()
    assert torch.allclose(moved, torch.full_like(p, 0.1), rtol=1e-3), (
        f"at step 1 m̂ = g and √v̂ = |g|, so every number moves by lr = 0.1: divide m and v by 1 - βˢᵗᵉᵖ; here {moved.min():.3g} … {moved.max():.3g}")


def test_moments_are_running_means(adamw_step):
    p, grad, m, v = start(1)
    for step in (1, 2):
        p, m, v = adamw_step(p, grad, m, v, step, 0.01, beta1=0.8, beta2=0.9)
    assert torch.allclose(m, (1 - 0.8**2) * grad) and torch.allclose(v, (1 - 0.9**2) * grad**2), (
        "return the running m and v: the correction by 1 - βˢᵗᵉᵖ is for this step's update only; m takes β₁ and g, v takes β₂ and g²")


def test_weight_decay_is_decoupled(adamw_step):
    p, grad, m, v = start(2)
    got = adamw_step(p, torch.zeros_like(grad), m, v, 1, 0.1, weight_decay=0.5)[0]
    assert torch.allclose(got, 0.95 * p), (
        "with no gradient p shrinks to (1 - lr · weight_decay) p: the decay is no part of the gradient, and lr scales it")


def test_eps_is_outside_the_root(adamw_step):
    p, grad, m, v = start(3)
    got = adamw_step(p, grad, m, v, 1, 0.1, eps=0.5)[0]
    must_equal(got, p - 0.1 * grad / (grad.abs() + 0.5), {
        "is eps inside the square root? AdamW divides by √v̂ + eps": p - 0.1 * grad / (grad**2 + 0.5).sqrt(),
        "v is not corrected: divide it by 1 - β₂ˢᵗᵉᵖ": p - 0.1 * grad / ((0.001 * grad**2).sqrt() + 0.5)},
        "p - lr · m̂ / (√v̂ + eps)")


@pytest.mark.parametrize("shape", [(3, 5), (4,), ()], ids=str)
def test_steps_equal_torch(adamw_step, shape):
    p, _, m, v = start(4, shape)
    theirs = p.clone().requires_grad_()
    optimizer = torch.optim.AdamW([theirs], lr=0.03, betas=(0.8, 0.95), eps=1e-3, weight_decay=0.1)
    for step in range(1, 21):
        theirs.grad = torch.sin(theirs.detach() + step)
        p, m, v = adamw_step(p, torch.sin(p + step), m, v, step, 0.03, 0.8, 0.95, 1e-3, 0.1)
        optimizer.step()
    assert torch.allclose(p, theirs.detach(), rtol=1e-10, atol=1e-12), (
        f"after 20 steps of AdamW the largest difference from torch.optim.AdamW is {(p - theirs).abs().max():.3g}: is every β raised to the power of step?")


def test_bytes_are_sixteen_a_parameter(training_bytes):
    model = TinyGPT(GPTConfig(vocab_size=10, context=7, width=12, layers=1, heads=3))
    count = sum(p.numel() for p in model.parameters())
    assert training_bytes(model) == 16 * count, (
        f"in float32 a trained number costs 16 bytes: weight, gradient and two moments, 4 each; here {training_bytes(model) / count:.2f} bytes")


def test_bytes_of_what_is_frozen(training_bytes):
    model = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3))
    model[0].requires_grad_(False)
    want = 4 * (5 * 7 + 7) + 16 * (7 * 3 + 3)
    assert training_bytes(model) == want, (
        f"a frozen parameter still lies there, 4 bytes, but has no gradient and no moments: {want} bytes, not {training_bytes(model)}")


def test_bytes_follow_the_dtype(training_bytes):
    model = nn.Linear(5, 7).to(torch.bfloat16)
    assert training_bytes(model) == 8 * (5 * 7 + 7), (
        f"a bfloat16 number has 2 bytes (element_size()), so 8 in training: 336 bytes, not {training_bytes(model)}")


def test_bytes_are_what_adam_holds(training_bytes):
    model = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(2, 5)).sum().backward()
    optimizer.step()
    held = [t for p in model.parameters() for t in (p, p.grad, optimizer.state[p]["exp_avg"], optimizer.state[p]["exp_avg_sq"])]
    want = sum(t.nbytes for t in held)
    assert training_bytes(model) == want, (
        f"weights, gradients, exp_avg and exp_avg_sq of a real AdamW hold {want} bytes, not {training_bytes(model)}")
