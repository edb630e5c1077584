"""Sentences about LoRA that one hears, each with the numbers it foretells and the run that finds them. `python -m lessons.myths` writes myths.md.

    @myth(the claim, where one meets it, Line(what, where it would have to lie), …, right=the sentence to say instead)
    def the_run(what_is_on_trial=…): return the numbers, in the order of the lines

The argument of a run is what is on trial; tests/test_myths.py turns it into its opposite and sees the verdict turn. How a verdict is counted from
the numbers: court.py. What several runs share (`trained`, `fresh`, `walk`, …): stage.py. Most are of the shipped tiny GPT, 24 adapted layers and
875,264 parameters; `walk` takes two layers in float64.
"""

import argparse
import copy
import json
import math
import statistics
import warnings
from functools import cache, partial
from unittest import mock

import torch
import torch.nn.functional as F
from torch import nn

import minilora as ml
from lessons import stage
from lessons.court import MYTHS, Line, chapter, myth, page
from lessons.stage import (FULL, HERE, LORA, adam, apart, at_rates, batch, bill, forward_flops, fresh, held_out, in_four_bits, layers, rank, step_flops,
                           trained, trained_in_four_bits, two_layers, voices, walk)
from minilora.evidence import capacity, compare
from minilora.evidence.compare import Entry
from minilora.evidence.formulas import extrapolated
from minilora.evidence.ledger import bytes_alive, disk_bytes, flops, optimizer_bytes
from minilora.evidence.scoreboard import of
from minilora.evidence.shapes import shape


chapter("What LoRA is")


@myth("LoRA decomposes W into two small matrices.", "slides, and first answers in interviews",
      Line("rank of a trained layer, W + dW with r = 8; the largest of 24", "at most 8"),
      Line("numbers of W that are not what they were", "at least 1"),
      right="W keeps every bit, and the layer its rank of {0}. What is a product of two small matrices is the update that stands beside it.",
      lesson="01_lora")
def decomposes_w(make=trained):
    model, before = make(), ml.load_base()
    moved = sum((layer.base.weight != before.get_submodule(name).weight).sum() for name, layer in ml.adapters(model))
    return max(rank(layer.base.weight + layer.delta_weight()) for layer in layers(model)), moved


@myth("A and B come from an SVD of W.", "blog posts that explain LoRA by a picture of an SVD",
      Line("share of A's length² along W's first 8 right singular vectors", "at least 0.9", ".2f", 0.02),
      right="A is random and B is zero; W is not even looked at. PiSSA starts from W's SVD, and that is another method.", lesson="01_lora")
def comes_from_an_svd(method=LORA):
    shares = []
    for layer in layers(fresh(method)):
        V = torch.linalg.svd(layer.base.weight, full_matrices=False).Vh[:8]          # (8, in)
        shares.append(((layer.A @ V.T).norm() / layer.A.norm()).item() ** 2)
    return statistics.fmean(shares)


@myth("LoRA trains a subset of W's weights.", "news articles; talks that show a matrix with a few cells coloured",
      Line("trained numbers that are W's own", "at least 1"),
      Line("numbers of the model that are other ones afterwards, for each that was trained", "at most 1", ".1f", 0.1),
      right="None of what is trained is in W, and merged it moves every number of W: {1} for each that was trained.", lesson="01_lora")
def trains_a_subset(make=trained):
    model, before = copy.deepcopy(make()), ml.load_base()
    learns = {name: p for name, p in model.named_parameters() if p.requires_grad}
    own = sum(p.numel() for name, p in learns.items() if name in before.state_dict())
    after = ml.merge(model) if layers(model) else model
    moved = sum((a != b).sum().item() for a, b in zip(after.parameters(), before.parameters(), strict=True))
    return own, moved / sum(p.numel() for p in learns.values())


@myth("At the very first step only B moves.", "careful lecture notes",
      Line("largest number in dL/dA, 24 layers", "exactly 0", ".3f"),
      Line("largest number in dL/dB", "above 0", ".2f", 0.02),
      right="dL/dA = s Bᵀ G, and B is zero. From the second step on both move. (Weight decay would move A at once: AdamW's default is 0.01.)",
      lesson="01_lora")
def only_b_moves(wake=lambda B: None):
    model = fresh()
    for layer in layers(model):
        wake(layer.B)
    ml.next_byte_loss(model, *batch()).backward()
    return max(layer.A.grad.abs().max() for layer in layers(model)), max(layer.B.grad.abs().max() for layer in layers(model))


@myth("B may start at random, as A does.", "home-made implementations",
      Line("loss before the first step, above the base's, nats per byte", "at most 0.01", ".2f", 0.05),
      right="With B = 0 the adapted model starts as the base. With B drawn as A is, it starts {0} nats per byte worse. Training can make that good "
            "again, and need "
            "not have to.", lesson="01_lora")
def b_at_random(draw=partial(nn.init.kaiming_uniform_, a=math.sqrt(5))):
    model = fresh()
    for layer in layers(model):
        draw(layer.B.data)
    return held_out(model) - held_out(ml.load_base())


@myth("A and B may both start at zero; training will wake them.", "home-made implementations",
      Line("length of dW after 30 steps", "above 0", ".3f"),
      right="dL/dA has the factor B and dL/dB the factor A: where both are zero, both gradients are, for ever. One must be random.", lesson="01_lora")
def both_at_zero(draw=nn.init.zeros_):
    layer = fresh().blocks[0].attention.q_proj
    draw(layer.A.data)
    optimizer, (x, y) = torch.optim.AdamW([layer.A, layer.B], lr=0.01, weight_decay=0.0), torch.randn(2, 16, 128)
    for _ in range(30):
        optimizer.zero_grad()
        F.mse_loss(layer(x), y).backward()
        optimizer.step()
    return layer.delta_weight().norm()


@myth("LoRA of full rank is full fine-tuning.", "interview answers",
      Line("highest rank of B A, over that of any update of W (8 × 12, r = 8)", "at least 1", ".2f"),
      Line("trained numbers, over W's own", "at most 1", ".2f"),
      Line("how far apart the two are after 30 steps at one rate, over the way gone", "at most 0.01", ".2f", 0.05),
      right="It can express any update, with {1} times as many numbers. But gradient steps on A and B are other steps than those on W: same reach, "
            "another way.")
def full_rank_is_full(one=ml.LoRA(8), other=FULL):
    A, B = torch.randn(8, 8), torch.randn(12, 8)
    return rank(B @ A) / 8, (A.numel() + B.numel()) / (8 * 12) if isinstance(one, ml.LoRA) else 1, apart(walk(one), walk(other))


chapter("What it costs")


@myth("With LoRA the base model gets smaller.", "product pages",
      Line("bytes stored in training, adapter and base over the base", "below 1", ".3f"),
      Line("the same once it is merged", "below 1", ".3f"),
      right="In training the base is there whole, and the adapter comes on top; merged, it is as large as before. Small is the file that one sends, "
            "and the optimizer's state.")
def base_gets_smaller(method=LORA, base=ml.load_base):
    def stored(model):
        return sum(t.nbytes for t in (*model.parameters(), *model.buffers()))

    model = fresh(method, base)
    return stored(model) / stored(ml.load_base()), stored(ml.merge(model)) / stored(ml.load_base())


@myth("A model with LoRA answers faster than its base.", "product pages",
      Line("FLOPs of a forward pass over the base's, adapter beside W", "below 1", ".2f"),
      Line("the same, merged", "below 1", ".2f"),
      right="Beside W the adapter is additional work, {0} times the base's in all; merged there is none. Faster it never is.")
def answers_faster(change=fresh):
    model, base = change(), forward_flops(ml.load_base())
    return forward_flops(model) / base, forward_flops(ml.merge(model) if layers(model) else model) / base


@myth("Once merged, LoRA costs nothing at inference.", "papers, and product pages",
      Line("FLOPs of a forward pass, merged over base", "at most 1", ".3f"),
      Line("numbers stored, merged over base", "at most 1", ".3f"),
      right="W + s B A is one matrix of W's shape. (Then it is one model with one skill: adapters can no longer be exchanged on it.)",
      lesson="02_adapter_life")
def merged_is_free(finish=ml.merge):
    model, base = finish(fresh()), ml.load_base()
    return forward_flops(model) / forward_flops(base), sum(p.numel() for p in model.parameters()) / sum(p.numel() for p in base.parameters())


@myth("Training with LoRA is always faster.", "tutorials",
      Line("FLOPs of a step over full fine-tuning's, rank 8 in layers of width 128", "below 1", ".2f"),
      Line("the same, rank 64", "below 1", ".2f"),
      right="What is saved is the gradient of W, a third of the work at best; forward and the way back through W remain. The branch adds its own "
            "work, and at a high rank it "
            "eats the saving. Two small products a layer also keep a GPU less busy than their FLOPs say.")
def trains_faster(ranks=(8, 64)):
    full = step_flops(ml.load_base())
    return [step_flops(fresh(ml.LoRA(r))) / full for r in ranks]


@myth("2 % trained parameters mean 2 % of the compute.", "interview answers",
      Line("FLOPs of a step at rank 2, percent of full fine-tuning's", "at most 4", ".0f"),
      Line("trained numbers, percent", "", ".1f"),
      right="{1} % are trained for {0} % of the work: forward is all there, and backward has to pass through every frozen W on its way down.")
def compute_in_proportion(model=partial(fresh, ml.LoRA(2))):
    model, full = model(), ml.load_base()
    return 100 * step_flops(model) / step_flops(full), 100 * ml.trainable_parameters(model) / ml.trainable_parameters(full)


@myth("2 % trained parameters mean 2 % of the memory.", "interview answers",
      Line("bytes of a step at rank 2, percent of full fine-tuning's", "at most 4", ".0f", 2),
      Line("trained numbers, percent", "", ".1f"),
      right="{1} % trained, {0} % of the bytes: weights and activations stay. Only gradients and the optimizer's state shrink.", lesson="04_lora_fa")
def memory_in_proportion(model=partial(fresh, ml.LoRA(2))):
    model, full = model(), ml.load_base()
    return 100 * bill(model) / bill(full), 100 * ml.trainable_parameters(model) / ml.trainable_parameters(full)


@myth("AdamW's state shrinks as the trained parameters do.", "course notes",
      Line("bytes of state for a trained number, LoRA over full fine-tuning", "at most 1.01", ".3f"),
      right="Two moments for every trained number, none for a frozen one. This is what LoRA saves for certain.", lesson="00_tiny_gpt")
def state_in_proportion(model=fresh):
    def state_of_a_number(model):
        return optimizer_bytes([p for p in model.parameters() if p.requires_grad]) / ml.trainable_parameters(model)

    return state_of_a_number(model()) / state_of_a_number(ml.load_base())


@myth("A frozen W needs no backward pass.", "interview answers",
      Line("FLOPs of backward through a frozen layer in the middle of a model, over a trained one's", "exactly 0", ".2f"),
      right="It needs no gradient of its own, but x Wᵀ has to hand dL/dx = G W down to what is trained below: half of a trained layer's backward. "
            "Only below the lowest adapter is there none.",
      lesson="04_lora_fa")
def no_backward(middle=True):
    def backward(learns):
        linear, x, one = nn.Linear(128, 128).requires_grad_(learns), torch.randn(16, 128, requires_grad=middle), torch.ones(1, requires_grad=True)
        return flops(lambda: one * linear(x))[1]

    return backward(False) / backward(True)


chapter("What it learns")


FULL_RATES, LORA_RATES = (1e-3, 3e-3, 1e-2), (1e-2, 3e-2, 1e-1)


@myth("LoRA converges faster, because it regularises.", "forum answers",
      Line("LoRA's loss after 30 steps less full fine-tuning's, each at the best of three rates, nats per byte", "below 0", ".2f", 0.05),
      right="Full fine-tuning is {0} nats per byte ahead here. Where LoRA looks faster, look whether both had a learning rate of their own. (And it "
            "overfits as anything does: three cards on.)")
def converges_faster(ours=(LORA, *LORA_RATES), theirs=(FULL, *FULL_RATES)):
    return min(at_rates(*ours).values()) - min(at_rates(*theirs).values())


def rate_of(task, entry):
    """The learning rate that the published fight found for it on that task."""
    return next(of(compare.read(compare.PUBLISHED)["runs"], task, entry))["lr"]


@myth("LoRA wants ten times the learning rate of full fine-tuning.", "practitioners' reports",
      Line("best rate of LoRA over best rate of full fine-tuning, on the task voice", "at least 5", ".1f"),
      Line("on code", "at least 5", ".1f"),
      Line("on facts", "at least 5", ".1f"),
      Line("on sums", "at least 5", ".1f"),
      right="The scoreboard's searches, five runs for each, found {0} and {1} times on voice and code, and {2} and {3} on facts and sums. Search "
            "LoRA's own rate, from full fine-tuning's upwards. (minilora/evidence/published.json.)")
def ten_times_the_rate(rate_of=rate_of):
    return [rate_of(task, Entry("lora")) / rate_of(task, Entry("full")) for task in ("voice", "code", "facts", "sums")]


@myth("Take the learning rate that full fine-tuning had.", "scripts in which only the model line was changed",
      Line("LoRA's loss at full fine-tuning's best rate, above that at its own best", "at most 0.05", ".2f", 0.1),
      right="At that rate LoRA has barely left the base: it ends {0} nats per byte behind what it can do.")
def same_rate(method=LORA):
    full = at_rates(FULL, *FULL_RATES)
    return held_out(trained(method, min(full, key=full.get))) - min(at_rates(LORA, *LORA_RATES).values())


@myth("LoRA cannot overfit: it has too few parameters.", "forum answers",
      Line("training loss after 40 steps on four windows, nats per byte", "at least 0.5", ".2f", 0.1),
      Line("held-out loss at the end, above its lowest on the way", "at most 0.1", ".2f", 0.1),
      right="It learns 256 bytes nearly by heart ({0}), while the held-out loss rises by {1} again. 73,728 numbers are many for a small text.")
def cannot_overfit(fresh_text=False, steps=40):
    text, read = ml.data.voice().batches(4, 64, stage.seed), lambda step: text(step if fresh_text else 0)
    history = ml.finetune(ml.load_base(), LORA, read, steps, 1e-2, stage.seed, evaluate=held_out, evaluate_every=10, progress=False)
    curve = [loss for _, loss in history["evaluated"]]
    return history["loss"][-1], curve[-1] - min(curve)


@myth("LoRA always forgets less than full fine-tuning.", "summaries",
      Line("what full fine-tuning forgets of the tiny world at its best rate, less what LoRA forgets at rate 0.01, nats per byte", "above 0", ".1f", 0.4),
      Line("the same, LoRA at rate 0.03", "above 0", ".1f", 0.4),
      right="At 0.01 LoRA forgets less, by {0}; at 0.03 more than full fine-tuning ({1}). Forgetting grows with how far one trains: compare it at "
            "equal learning.")
def forgets_less(rates=(1e-2, 3e-2)):
    world = ml.data.world()
    return [held_out(trained(FULL, 3e-3), world) - held_out(trained(LORA, lr), world) for lr in rates]


@myth("Rank 1 can hold only a little, whatever one does.", "rules of thumb",
      Line("of 128 invented facts, remembered at rank 1 after 3,200 steps, percent", "at most 25", ".0f"),
      Line("after 800 steps", "", ".0f"),
      right="After 800 steps it remembers {1} %, after 3,200 {0} %. Rank buys time before it buys room. (Means of three seeds in "
            "benchmarks/capacity.json.)")
def rank_one_is_full(steps=3200):
    records = capacity.read(HERE.parent / "benchmarks" / "capacity.json")
    def remembered(steps):
        return 100 * statistics.fmean(r["remembered"] for r in records if (r["method"], r["rank"], r["count"], r["steps"]) == ("lora", 1, 128, steps))
    return remembered(steps), remembered(800)


chapter("Hyper-parameters")


@myth("alpha is a learning rate.", "forum answers, and some documentation",
      Line("alpha × 4 beside B's rate × 4, under Adam: how far apart after 30 steps", "at most 1e-9", "tiny"),
      Line("alpha × 4 beside both rates × 4", "at most 1e-9", "tiny", 0.01),
      right="Under Adam alpha is exactly the learning rate of B, and not A's. (ε → 0, no weight decay; under SGD it is neither.)", lesson="03_lora_plus")
def alpha_is_a_rate(optimizer=adam):
    loud = walk(ml.LoRA(3, alpha=20), optimizer=optimizer)
    return apart(loud, walk(ml.LoRAPlus(3, alpha=5, ratio=4), optimizer=optimizer)), apart(loud, walk(ml.LoRA(3, alpha=5), 0.08, optimizer))


@myth("A higher alpha means more parameters.", "interview answers",
      Line("trained numbers at alpha 64 over those at alpha 8", "above 1", ".2f"),
      right="alpha is one fixed number that multiplies the branch. Rank decides how many are trained: r (in + out) a layer.", lesson="01_lora")
def alpha_adds_parameters(small=LORA, large=ml.LoRA(8, alpha=64)):
    return ml.trainable_parameters(fresh(large)) / ml.trainable_parameters(fresh(small))


def best_alpha(lr, r=4):
    """Of alpha / r = 1/2 … 64 the one that learns best in 40 steps of Adam what another rank-4 update has done to a layer of width 32."""
    dice = torch.Generator().manual_seed(0)
    W, C, D, x = (torch.randn(*size, generator=dice, dtype=torch.float64) for size in ((32, 32), (32, r), (r, 32), (64, 32)))
    y, losses = x @ (W + C @ D / 8).T, {}
    for ratio in (0.5, 1, 2, 4, 8, 16, 32, 64):
        torch.manual_seed(0)
        linear = nn.Linear(32, 32, bias=False, dtype=torch.float64)
        linear.weight.data = W.clone()
        model = ml.adapt(nn.Sequential(linear), ml.LoRA(r, alpha=ratio * r))
        optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=lr)
        for _ in range(40):
            optimizer.zero_grad()
            loss = F.mse_loss(model(x), y)
            loss.backward()
            optimizer.step()
        losses[ratio] = loss.item()
    return min(losses, key=losses.get)


@myth("alpha should be twice the rank.", "rules of thumb, default settings",
      Line("best alpha / rank at learning rate 0.01", "exactly 2", ".0f"),
      Line("at 0.03", "exactly 2", ".0f"),
      Line("at 0.1", "exactly 2", ".0f"),
      right="It depends on the learning rate: {0} at 0.01, {1} at 0.03, {2} at 0.1. What training feels is both together; fix one, search the "
            "other.", lesson="03_lora_plus")
def twice_the_rank(rates=(0.01, 0.03, 0.1)):
    return [best_alpha(lr) for lr in rates]


def first_step(r, optimizer, alpha=8.0):
    """How far one step at rate 0.001 moves the output of a layer of width 512; the mean of eight draws."""
    moved = []
    for seed in range(8):
        torch.manual_seed(seed)
        model, x, g = ml.adapt(nn.Sequential(nn.Linear(512, 512)), ml.LoRA(r, alpha=alpha)), torch.randn(1, 512), torch.randn(1, 512)
        before = model(x)
        (before * g).sum().backward()
        optimizer([p for p in model.parameters() if p.requires_grad], lr=1e-3).step()
        moved.append((model(x) - before).norm().item())
    return statistics.fmean(moved)


@myth("alpha/r frees one from finding the learning rate again when the rank changes.", "documentation",
      Line("first step under Adam, rank 64 over rank 4", "at least 0.5", ".2f", 0.1),
      Line("first step under SGD, rank 64 over rank 4", "at least 0.5", ".2f", 0.1),
      right="Under Adam the first step is about as long at both ranks ({0}); under SGD rank 64's is {1} of rank 4's. And that is the first step only: "
            "for what follows, rsLoRA's paper wants alpha/√r.", lesson="01_lora")
def no_retuning(optimizers=(torch.optim.Adam, torch.optim.SGD)):
    return [first_step(64, optimizer) / first_step(4, optimizer) for optimizer in optimizers]


@myth("The rank that was trained is the rank that was needed.", "interview answers",
      Line("directions of 8 that hold 90 % of dW's length², the mean of 24 layers", "at least 7", ".1f", 0.3),
      Line("loss without the weaker half of the directions of every layer, above that with all", "at least 0.1", ".2f", 0.03),
      right="A few directions carry most of a trained update ({0} of 8 for nine tenths), and half of them can be taken away afterwards at {1} nats "
            "per byte. A small rank to *start* with is another question.")
def rank_is_needed(make=trained):
    model, whole = copy.deepcopy(make()), held_out(make())
    for layer in layers(model):
        U, S, Vh = torch.linalg.svd(layer.delta_weight().detach(), full_matrices=False)
        layer.carry = (S[:8].square().cumsum(0) < 0.9 * S.square().sum()).sum().item() + 1
        layer.B.data[:, 4:], layer.A.data[4:] = 0, 0
        layer.B.data[:, :4], layer.A.data[:4] = U[:, :4] * S[:4] / layer.scale, Vh[:4]
    return statistics.fmean(layer.carry for layer in layers(model)), held_out(model) - whole


@myth("A rank above the layer's width helps.", "grid searches",
      Line("rank of B A over the width, r = 256 in a 128 × 128 layer", "above 1", ".2f"),
      Line("trained numbers over W's own", "", ".2f"),
      right="No update of W has a higher rank than W's smaller side. Beyond it one trains {1} times as many numbers as W has; `ml.LoRA` refuses.",
      lesson="01_lora")
def rank_above_width(r=256, width=128):
    A, B = torch.randn(r, width, dtype=torch.float64), torch.randn(width, r, dtype=torch.float64)
    return rank(B @ A) / width, (A.numel() + B.numel()) / width**2


@myth("Adapters on q and v are enough.", "default settings, after the first paper",
      Line("loss with q and v at rank 18, above that with all six kinds at rank 4: as many numbers each", "at most 0.05", ".2f", 0.1),
      right="At equal parameters q and v alone end {0} nats per byte behind: the MLP has most to say here.", lesson="07_lora_drop")
def q_and_v(few=("q_proj", "v_proj"), r=18):
    some, every = (trained(ml.LoRA(rank), targets=names) for rank, names in ((r, few), (4, None)))
    return held_out(some) - held_out(every)


@myth("Weight decay on A and B pulls the model back to its base.", "careful discussions of optimizers",
      Line("length of dW after 100 steps of AdamW with decay 0.1 and no gradient, over that before", "below 1", ".2f"),
      Line("numbers of W that moved", "exactly 0"),
      right="It shrinks B A towards zero, that is W + dW towards W. In full fine-tuning decay pulls towards zero, away from the base.",
      lesson="03_lora_plus")
def decay_pulls_back(train=lambda layer: [layer.A, layer.B]):
    layer = ml.adapt(two_layers(), ml.LoRA(3), ["0"])[0]
    nn.init.normal_(layer.B)
    before, W, learns = layer.delta_weight().norm(), layer.base.weight.clone(), train(layer)
    for p in learns:
        p.grad = torch.zeros_like(p)
    optimizer = torch.optim.AdamW(learns, lr=0.01, weight_decay=0.1)
    for _ in range(100):
        optimizer.step()
    return layer.delta_weight().norm() / before, (layer.base.weight != W).sum()


chapter("Four bits")


@myth("QLoRA decomposes the quantized weights.", "slides",
      Line("bytes of the 4-bit codes that training changed", "at least 1"),
      Line("rank of the base's dequantized W, the largest of 24 layers, r = 8", "at most 8"),
      right="The 4-bit W is frozen and whole; B A stands beside it in 16 or 32 bits. QLoRA is LoRA on another base.")
def decomposes_four_bits(make=trained_in_four_bits):
    before, pairs = in_four_bits(), list(ml.adapters(make()))
    moved = sum((layer.base.codes != before.get_submodule(name).codes).sum() for name, layer in pairs)
    return moved, max(rank(layer.base.dequantize()) for _, layer in pairs)


@myth("QLoRA trains faster than LoRA.", "product pages",
      Line("FLOPs of a step over LoRA's", "below 1", ".2f"),
      Line("work on top: times that a W is dequantized in a step, the mean of 24", "exactly 0", ".2f"),
      right="The products are the same, and a W is unpacked once forward and once backward on top (only the first q, k and v have nobody below to "
            "tell). One takes QLoRA for its memory.")
def four_bits_are_faster(base=in_four_bits):
    quick, dequantize = fresh(LORA, base), ml.NF4Linear.dequantize
    with mock.patch.object(ml.NF4Linear, "dequantize", autospec=True, side_effect=dequantize) as unpacked:
        work = step_flops(quick)
    return work / step_flops(fresh()), unpacked.call_count / 24


@myth("QLoRA halves again what LoRA on 8 bits needs.", "summaries, from 16 to 8 to 4",
      Line("bytes of Llama-7B's blocks, 4 bits (NF4, double quantization) over 8", "at most 0.55", ".2f"),
      Line("the whole step: embeddings and head in 16 bits, adapters of rank 64, their AdamW, what they keep of 2,048 tokens", "at most 0.55", ".2f"),
      right="The blocks are halved, nearly ({0}); of the whole step {1} is left, for adapters, their state, activations and embeddings are what they "
            "were. (By formula; the rest of the activations would bring it nearer to 1 still.)")
def halves_again(r=64, tokens=2048):
    llama, method = shape("llama-7b"), ml.LoRA(r)
    numbers = sum(kind.parameters for kind in llama.kinds)
    rows = sum(kind.count * kind.out for kind in llama.kinds)
    eight, four = numbers + 4 * rows, extrapolated(llama, method, tokens=tokens, base="nf4")
    whole = four[-1].trained_bytes + four[-1].frozen_bytes + four[-1].gradient_bytes + four[-1].optimizer_bytes + four[-1].alive_bytes
    blocks = four[-1].frozen_bytes - 2 * llama.rest
    return blocks / eight, whole / (whole - blocks + eight)


def codes_of(w, edges=None):
    """The 16 codes' counts of w in NF4, or where it falls between other edges."""
    if edges is not None:
        return torch.bucketize(w, edges).bincount(minlength=16)
    packed = ml.quantize_nf4(w).codes
    return torch.cat([packed >> 4, packed & 15]).bincount(minlength=16)


@myth("NF4's sixteen bins hold equally many weights.", "explanations of NF4",
      Line("the fullest bin over the emptiest, on a million normal numbers", "at most 1.1", ".1f", 0.1),
      right="The levels are quantiles of the normal, but each block is divided by its own largest number, and then the outer bins are nearly empty: "
            "{0} to 1.", lesson="09_nf4")
def equal_mass(edges=None):
    counts = codes_of(torch.randn(2**20, generator=torch.Generator().manual_seed(0)), edges)
    return counts.max() / counts.min()


def miss(w, **how) -> float:
    return (ml.quantize_nf4(w, **how).dequantize() - w).norm().item()


@myth("Double quantization makes the weights more accurate.", "interview answers",
      Line("error with it over that without, a million normal numbers", "below 1", ".4f", 0.0001),
      Line("bits saved a weight", "", ".3f"),
      right="It rounds the scales too, so it adds a little error ({0}) and saves {1} bits a weight. It is for memory.", lesson="09_nf4")
def double_is_more_accurate(one={"double": True}, other={"double": False}):
    w = torch.randn(2**20, generator=torch.Generator().manual_seed(0))
    return miss(w, **one) / miss(w, **other), ml.quantize_nf4(w, **other).bits_per_parameter - ml.quantize_nf4(w, **one).bits_per_parameter


@myth("NF4 is the best four-bit type.", "documentation",
      Line("error of evenly spaced int4 over NF4's, on normal weights", "above 1", ".2f", 0.01),
      Line("the same on uniform weights", "above 1", ".2f", 0.01),
      right="On normal numbers, which trained weights resemble. On uniform ones even steps are better: a type is best for a distribution.", lesson="09_nf4")
def nf4_is_best(draws=(torch.randn, torch.rand)):
    def int4(w):
        scale = w.view(-1, 64).abs().amax(1, keepdim=True) / 7
        return ((w.view(-1, 64) / scale).round() * scale).view(w.shape)

    found = []
    for draw in draws:
        w = draw(2**18, generator=torch.Generator().manual_seed(0))
        w = 2 * w - 1 if draw is torch.rand else w
        found.append((int4(w) - w).norm().item() / miss(w))
    return found


@myth("LoRA on a four-bit base learns as well as on a dense one.", "papers",
      Line("loss after 30 steps above that on the dense base, nats per byte", "at most 0.05", ".3f", 0.02),
      right="{0} nats per byte here: B A learns around the rounding of W. (A small model and few steps; the paper says it of large ones.)")
def four_bits_learn(make=trained_in_four_bits):
    return held_out(make()) - held_out(trained())


chapter("The kin")


@cache
def film():
    """AdaLoRA from rank 6 to 4 in 24 steps: the budget, and the rank of each layer after every step."""
    method, kept = ml.AdaLoRA(6, 4, warmup_steps=3, final_steps=9, interval=3).scheduled(24), []
    ml.finetune(ml.load_base(), method, ml.data.voice().batches(4, 64, stage.seed), 24, 3e-2, stage.seed, evaluate_every=1, progress=False,
                evaluate=lambda model: kept.append([int(layer.kept.sum()) for layer in layers(model)]) or 0.0)
    return [method.budget(step, 24) for step in range(24)], kept


@myth("AdaLoRA raises the rank where accuracy is poor.", "summaries",
      Line("layers whose rank was ever above its start", "at least 1"),
      Line("steps at which the budget rose", "at least 1"),
      right="All layers start at the same rank, and the budget only falls. What decides is |weight · gradient| of each direction, smoothed; accuracy "
            "is never read.")
def raises_the_rank(film=film):
    budget, kept = film()
    return sum(max(ranks) > ranks[0] for ranks in zip(*kept)), sum(b > a for a, b in zip(budget, budget[1:]))


@myth("Delta-LoRA learns an update of full rank.", "summaries",
      Line("rank of the change of W, r = 4, the largest of 24 layers", "at least 128"),
      right="Every number of W moves, and the steps telescope: W₀ + (1 + λ) s B A − λ s B_K A_K, of rank {0} at most.", lesson="06_delta_lora")
def delta_has_full_rank(make=partial(trained, ml.DeltaLoRA(4, start_step=2), 1e-2, 5)):
    model, before = make(), ml.load_base()
    changes = [layer.delta_weight() for layer in layers(copy.deepcopy(model).double())]
    if not changes:                                         # no adapter: W itself was trained
        changes = [linear.weight - before.get_submodule(name).weight for name, linear in model.named_modules() if name.endswith("_proj")]
    return max(map(rank, changes))


@myth("Delta-LoRA from the first step is LoRA with a larger alpha.", "reviews of the paper",
      Line("how far apart after 30 steps of Adam, λ = 2 beside three times the alpha", "at most 1e-9", "tiny"),
      right="With K = 0 nothing is subtracted: (1 + λ) s B A. Adam divides the smaller gradient out (ε → 0).", lesson="06_delta_lora")
def delta_is_alpha(optimizer=adam):
    return apart(walk(ml.DeltaLoRA(3, alpha=5, delta_ratio=2.0), optimizer=optimizer), walk(ml.LoRA(3, alpha=15), optimizer=optimizer))


@myth("LoRA-FA halves memory.", "summaries",
      Line("what one layer keeps for backward, LoRA over LoRA-FA (512 tokens, width 1024, r = 8)", "at least 2", ".0f"),
      Line("all bytes of a step of the tiny GPT, LoRA over LoRA-FA", "at least 2", ".2f", 0.05),
      right="A layer by itself keeps {0} times less; of the whole bill {1} is gained, for weights, attention, norms and the MLP's own activations "
            "stay.", lesson="04_lora_fa")
def fa_halves(method=ml.LoRAFA(8)):
    def kept(method):
        model, x = ml.adapt(nn.Sequential(nn.Linear(1024, 1024)), method), torch.randn(512, 1024, requires_grad=True)
        return bytes_alive(model, lambda: model(x))

    return kept(LORA) / kept(method), bill(fresh()) / bill(fresh(method))


@myth("VeRA's files are tiny.", "summaries",
      Line("file of VeRA, rank 256, over LoRA's of rank 8: as saved by default, PEFT's way", "at most 0.2", ".2f", 0.01),
      Line("the same with the seed in place of the random matrices", "at most 0.2", ".2f", 0.01),
      right="With the seed alone {1} of LoRA's; but PEFT saves the random A and B by default, for a seed need not give the same numbers elsewhere, "
            "and then the file is {0} times LoRA's.", lesson="05_vera")
def vera_is_tiny(r=256):
    lora, vera = disk_bytes(fresh()), disk_bytes(fresh(ml.VeRA(r)))
    return vera / lora, (vera - 4 * r * (512 + 512)) / lora


@myth("VeRA is low-rank, like LoRA.", "summaries",
      Line("rank of dW, VeRA of rank 256, the largest of 24 layers, once b is awake", "at most 64"),
      right="dW = diag(b) B diag(d) A has rank {0}. Small is the count of trained numbers, not the rank.", lesson="05_vera")
def vera_is_low_rank(r=256):
    model = fresh(ml.VeRA(r))
    for layer in layers(model):
        nn.init.ones_(layer.b)
    return max(rank(layer.delta_weight()) for layer in layers(model.double()))


@myth("DoRA decomposes the model.", "its name",
      Line("largest relative error of: length of a row of the merged W = that row's magnitude", "at most 0.0001", ".4f"),
      Line("numbers of the adapted layers, over those of W and LoRA's branch", "below 1", ".3f"),
      right="It writes every row of W + s B A as length times direction, and trains the length by itself. W stays whole beside it; there is one "
            "number a row more than in LoRA, and nothing smaller.")
def dora_decomposes(method=ml.DoRA(8)):
    def numbers(method):
        return sum(p.numel() for layer in layers(fresh(method)) for p in layer.parameters())

    model = trained(method, 1e-2, 4)
    errors = [((layer.base.weight + layer.delta_weight()).norm(dim=1) / layer.magnitude - 1).abs().max() for layer in layers(model)]
    return max(errors), numbers(method) / numbers(LORA)


@myth("rsLoRA is LoRA with another alpha.", "practitioners' notes",
      Line("how far apart after 30 steps: rsLoRA beside LoRA with alpha · √r", "at most 1e-9", "tiny"),
      right="At one rank they are the same runs, to the last digits of float64. rsLoRA is a rule for how alpha should grow with the rank.")
def rslora_is_alpha(alpha=5 * math.sqrt(3)):
    return apart(walk(ml.LoRA(3, alpha=5, rslora=True)), walk(ml.LoRA(3, alpha=alpha)))


@myth("In LoRA-drop the dropped layers cost nothing any more.", "summaries",
      Line("trained numbers over LoRA's", "below 1", ".2f", 0.02),
      Line("FLOPs of a step over LoRA's", "below 1", ".2f"),
      right="{0} of the numbers, all of the work: a dropped layer runs the shared pair. Saved are parameters, their state and the file.",
      lesson="07_lora_drop")
def drop_is_free(change=None):
    model, method = fresh(ml.LoRADrop(8, threshold=0.3, warmup_steps=2)), ml.LoRADrop(8, threshold=0.3, warmup_steps=2)
    method.prepare(model, ml.data.voice().batches(4, 64), ml.next_byte_loss, 1e-2)
    if change:
        change(model)
    return ml.trainable_parameters(model) / ml.trainable_parameters(fresh()), step_flops(model) / step_flops(fresh())


chapter("Files and life")


@myth("Merging loses accuracy because LoRA is an approximation.", "forum answers",
      Line("how far the loss moves by merging in float32, nats per byte", "at least 0.001", ".4f", 0.0002),
      Line("in bfloat16", "", ".4f", 0.0005),
      Line("of LoRA on a four-bit base, by merging into four bits", "", ".3f", 0.02),
      right="W + s B A is an identity, at any rank. What is lost is lost by rounding: {1} nats per byte in bfloat16, {2} in four bits, for updates as "
            "long as these (about half of W).",
      lesson="02_adapter_life")
def merging_approximates(spoil=lambda model: model):
    def moves(model, merged):
        return abs(held_out(merged) - held_out(model))

    model, four = voices(), trained_in_four_bits()
    with warnings.catch_warnings(action="ignore"):          # merge_nf4 says what it loses
        in_four = ml.merge_nf4(copy.deepcopy(four))
    exact, short = ml.merge(copy.deepcopy(model)), ml.merge(copy.deepcopy(model), torch.bfloat16).float()
    return moves(model, spoil(exact)), moves(model, short), moves(four, in_four)


@myth("Merging is lossless.", "documentation",
      Line("lost of an update a hundredth as long as W, in float32: ‖merged − (W + dW)‖ / ‖dW‖, percent", "at most 1", ".1f"),
      Line("in bfloat16", "at most 1", ".0f", 1),
      Line("in four bits", "at most 1", ".0f", 5),
      right="In float32 it is. In bfloat16 {1} % of such an update is lost. In four bits {2} %: the rounding is longer than the update. Merge into the "
            "dequantized W and keep 16 bits.", lesson="02_adapter_life")
def merging_is_lossless(ratio=0.01):
    layer = voices().blocks[0].mlp.up_proj
    W, dW = layer.base.weight, layer.delta_weight()
    dW = dW * ratio * W.norm() / dW.norm()
    return [100 * ml.merge_autopsy(W, dW, into).error for into in ("float32", "bfloat16", "nf4")]


@myth("A merged adapter can be subtracted again exactly.", "forum answers",
      Line("numbers of W that are not what they were, float32, percent", "exactly 0", ".0f", 3),
      Line("in bfloat16: ‖what comes back − W‖ / ‖W‖, percent", "", ".2f", 0.02),
      right="W + dW was rounded, and subtracting dW does not bring the lost digits back: {0} % of W come back as other numbers. In float32 they "
            "differ in the last "
            "digits, in bfloat16 by {1} % of W's length. Keep W, and the adapter beside it.", lesson="02_adapter_life")
def subtracts_exactly(back=lambda W, dW: (W + dW) - dW):
    changed, off, whole = [], 0.0, 0.0
    for layer in layers(voices()):
        W, dW = layer.base.weight, layer.delta_weight()
        changed.append((back(W, dW) != W).float().mean().item())
        W, dW = W.bfloat16(), dW.bfloat16()
        off, whole = off + (back(W, dW) - W).float().square().sum().item(), whole + W.float().square().sum().item()
    return 100 * statistics.fmean(changed), 100 * math.sqrt(off / whole)


@myth("As long as it is not merged, the base can be had back to the bit.", "documentation",
      Line("numbers of the trained model that are not the base's after unload", "exactly 0"),
      right="W was never written to. Take the branch away, and the file that one downloaded is there again.", lesson="01_lora")
def base_comes_back(make=trained):
    model, before = ml.unload(copy.deepcopy(make())).state_dict(), ml.load_base().state_dict()
    return sum((model[name] != before[name]).sum() for name in before)


@myth("Adapters add up: add the A's and add the B's.", "scripts, and one option of a library",
      Line("‖(B₁ + B₂)(A₁ + A₂) − (B₁A₁ + B₂A₂)‖ / ‖B₁A₁ + B₂A₂‖, two voices", "at most 0.01", ".2f", 0.01),
      right="That product has B₁A₂ + B₂A₁ in it, which nobody trained: {0} times as long as what was wanted. Add the updates, or set the factors side "
            "by side: [B₁, B₂] [A₁; A₂].", lesson="02_adapter_life")
def add_the_factors(product=lambda A1, B1, A2, B2: (B1 + B2) @ (A1 + A2)):
    pairs = [(one.A, one.B, two.A, two.B) for one, two in zip(layers(voices("loud")), layers(voices("joined")))]
    wanted = [B1 @ A1 + B2 @ A2 for A1, B1, A2, B2 in pairs]
    wrong = [product(*pair) - want for pair, want in zip(pairs, wanted)]
    return math.hypot(*(M.norm().item() for M in wrong)) / math.hypot(*(M.norm().item() for M in wanted))


@myth("An adapter works on any fine-tune of its base.", "model cards",
      Line("loss with the loud voice on a base that was tuned a little (3 steps at 0.0001), above that on its own", "at most 0.1", ".2f", 0.03),
      Line("on one that was tuned in earnest (sums, 30 steps at 0.001)", "at most 0.1", ".2f", 0.1),
      right="It was trained beside one W. A little away from it nothing is noticed; far away {1} nats per byte are lost. So minilora's files hold a "
            "fingerprint of their base.", lesson="02_adapter_life")
def any_fine_tune(tuned=((1e-4, 3), (1e-3, 30))):
    dW, own = {name: layer.delta_weight() for name, layer in ml.adapters(voices())}, held_out(voices())

    def spoken(model):
        for name, update in dW.items():
            model.get_submodule(name).weight.data += update
        return held_out(model)

    return [spoken(copy.deepcopy(trained(FULL, lr, steps, "sums"))) - own for lr, steps in tuned]


@myth("The adapter's file is all that one needs to go on training.", "scripts",
      Line("loss at the second step after resuming from it, above that from a checkpoint (mean of three seeds)", "at most 0.02", ".2f"),
      Line("at the eleventh", "", ".2f"),
      right="AdamW's two moments are not in it: the loss jumps by {0} nats per byte, and ten steps later {1} of them are left. (From "
            "lessons/02_adapter_life/results.json.)", lesson="02_adapter_life")
def resumes_alone(way="adapter alone"):
    seeds = json.loads((HERE / "02_adapter_life" / "results.json").read_text())["resume"].values()
    return [statistics.fmean(seed[way][step] - seed["checkpoint"][step] for seed in seeds) for step in (1, 10)]


@myth("An adapter's file holds r (in + out) numbers a layer, and hardly anything else.", "course notes",
      Line("bytes of the folder over 4 r Σ (in + out)", "at most 1.05", ".2f", 0.01),
      right="{0} times: names, shapes and a page of settings are the rest. So it can be told beforehand what a file will weigh.", lesson="02_adapter_life")
def file_is_its_factors(method=LORA):
    return disk_bytes(fresh(method)) / (4 * 8 * sum(layer.in_features + layer.out_features for layer in layers(fresh())))


HEAD = """# Myths

{all} sentences that one hears about LoRA, each put on trial. {false} are false, {half} half true, {true} true.

A claim foretells one number or more, and where each would have to lie. If every number lies there, the claim is **true**; if none does, false; if some do, *half true*. So the
verdicts are counted. The runs are in [myths.py](myths.py), five to fifteen lines each; `python -m lessons.myths` does them all in half a minute and writes this page, and
`pytest -m myth` holds the page to them and plants the opposite in most of them, to see that the verdict can turn.

One counter-example is enough for *false*. *True* is an identity, or, behind a ≈, what was seen in a model of 875,264 parameters: such a number comes out of training or
of random draws, and may be a little different on your machine. {seeds}

To guess first, go past the table: there the claims stand folded, chapter by chapter.
"""


OTHER_SEEDS = HERE / "myths.json"          # what `python -m lessons.myths --seed 1`, 2 and 3 found


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m lessons.myths", description="Run all trials and write myths.md.")
    parser.add_argument("--seed", type=int, default=0, help="other batches and factors: verdicts go to myths.json, the page stays")
    stage.seed = parser.parse_args().seed
    found = {}
    for name, case in MYTHS.items():
        found[name] = case.measure()
        numbers = ", ".join(line.printed(number) for line, number in zip(case.lines, found[name]))
        print(f"{case.verdict(found[name]):<10} {case.claim}  {numbers}", flush=True)
    others = json.loads(OTHER_SEEDS.read_text()) if OTHER_SEEDS.exists() else {}
    if stage.seed:
        others[str(stage.seed)] = {name: MYTHS[name].verdict(numbers) for name, numbers in found.items() if any(line.slack for line in MYTHS[name].lines)}
        OTHER_SEEDS.write_text(json.dumps(others, indent=1) + "\n")
    else:
        (HERE / "myths.md").write_text(whole_page(found, others), encoding="utf-8")


def whole_page(found, others, **how) -> str:
    """The page; how the other seeds judged is in its head."""
    differ = {name for verdicts in others.values() for name, verdict in verdicts.items() if verdict != MYTHS[name].verdict(found[name])}
    seeds = f"Training was done with one seed. With {len(others)} others (`python -m lessons.myths --seed 1` …, kept in [myths.json](myths.json))\n"
    seeds += "every verdict behind a ≈ was the same." if not differ else f"the verdict was another one in {', '.join(f'`{name}`' for name in sorted(differ))}."
    return page(found, HEAD.replace("{seeds}", seeds), **how)


if __name__ == "__main__":
    main()
