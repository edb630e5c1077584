"""The bug museum: write the test that tells healthy code from sick. Replace each `raise NotImplementedError` and run `pytest lessons/bug_museum`.

`code` is a function or a class: the healthy one of an exhibit, or the sick one. Your test asserts what is promised: on healthy code nothing
happens, on sick code an assert fails. Each exhibit is one page in exhibits/; read there what is promised, and test that, at sizes of your own:
the storeroom has another healthy and another sick one. (B is zero at the start of every adapter here, and then many bugs do nothing yet.)
"""

import pytest
import torch
import torch.nn.functional as F
from torch import nn


def test_01_merged_twice(code):
    """"The more often I evaluate the model, the worse it gets."

    code(out, into, rank, alpha) is a layer with A, B, train() and eval(); whatever is called, and how often, its function stays the same.
    """
    raise NotImplementedError


def test_02_transposed_init(code):
    """"Same learning rate as everybody, and the loss jumps at the second step."

    code(rank, into) is A, (rank, in), of standard deviation 1 / √(3 in).
    """
    raise NotImplementedError


def test_03_no_gradient(code):
    """"It fits on my card now. It also learns rather less."

    code(blocks, width, rank) is a net, (…, width) -> (…, width); after backward every trainable parameter has a gradient.
    """
    raise NotImplementedError


def test_04_head_wrapped(code):
    """"Ten classes, and it never gets more than some of them."

    code(into, width, classes, rank) is a net with `body` and `head`. All width · classes + classes numbers of the head are trainable and no others in it;
    of the body only A and B are, and there the sick ones are sound.
    """
    raise NotImplementedError


def test_05_no_zero(code):
    """"The weights that I pruned are back."

    code(w, block) is w through four bits and back; what was zero is zero. `block` divides the number of weights.
    """
    raise NotImplementedError


def test_06_wrong_axis(code):
    """"My DoRA starts like theirs, and then goes its own way."

    code(W, rank) is a layer with A, B, magnitude and weight(); row i of weight() is magnitude[i] long, whatever A and B are.
    """
    raise NotImplementedError


def test_07_saved_empty(code):
    """"The file is remarkably small. The method is efficient, they say."

    code(out, into, rank) is a layer with A, B, save() and load(saved); a fresh one that loads computes what the saved one did.
    """
    raise NotImplementedError


def test_08_tied_head(code):
    """"Before merging it spoke better."

    code(vocabulary, width, rank) is a model, ids -> logits, with A, B and merge(), which leaves the logits as they were.
    """
    raise NotImplementedError


def test_09_wrapper_prefix(code):
    """"It loads without an error, and answers like the base model."

    code(width, rank) is a model; code.wrap(model) puts it in a wrapper; code.load(plain fresh model, code.save(wrapped)) computes what it did.
    """
    raise NotImplementedError


def test_10_head_left_behind(code):
    """"Perfect on my machine, and worse than a coin toss on yours."

    code(into, classes, rank) is a classifier with save() and load(saved); a fresh one that loads computes what the saved one did.
    """
    raise NotImplementedError


def test_11_scale_twice(code):
    """"Fine while it is an adapter. Merged, it shouts."

    code(out, into, rank, alpha) is a layer with W, A, B and merge(); y = x Wᵀ + alpha / rank (x Aᵀ) Bᵀ before and after.
    """
    raise NotImplementedError


def test_12_dropout_on_W(code):
    """"The loss before the first step is higher than the base model's."

    code(out, into, rank, alpha, dropout) is a layer with W, A, B; with B = 0 it computes x Wᵀ, in training too.
    """
    raise NotImplementedError


def test_13_forgetful_resume(code):
    """"There is a bump in the curve wherever the machine was restarted."

    code() is a run with W, train(steps), save() and load(saved); stopped and gone on with, it ends where an uninterrupted one ends.
    """
    raise NotImplementedError


def test_14_idle_decay(code):
    """"I tried five weight decays. It does not matter which."

    code(A, B, lr, ratio, weight_decay) is an optimizer; a step with zero gradients multiplies A by 1 − lr · weight_decay, B by 1 − ratio · lr · weight_decay.
    """
    raise NotImplementedError


def test_15_inverted_mask(code):
    """"The same sentence gets other answers in other company."

    code(q, k, v, keep) is attention, q, k, v (batch, T, d); where keep (batch, T) is False, k and v have no influence.
    """
    raise NotImplementedError


def test_16_product_of_deltas(code):
    """"It is said to go beyond LoRA. I cannot see any difference."

    code(W, A, B, A2, B2, scale) is W + scale · (B2 A2 − B A), a new matrix.
    """
    raise NotImplementedError


def test_17_flipped_sign(code):
    """"One of my layers turned against me."

    code(w, block) is w through four bits and back, its scales through eight; no weight comes back with the opposite sign.
    """
    raise NotImplementedError


def test_18_padding_counted(code):
    """"Wonderful loss. Dreadful sentences."

    code(logits, targets, lengths) is the mean of −log p over the first lengths[i] tokens of each row i.
    """
    raise NotImplementedError


def test_19_eval_forgotten(code):
    """"Temperature zero, and it still cannot make up its mind."

    code(vocabulary, width, dropout) is a model with sample(prompt, new); the same list each time, in training mode too, and the mode stays.
    """
    raise NotImplementedError


def test_20_seed_moves_data(code):
    """"Rank 8 beats rank 4 at some seeds, and loses at others."

    code(into, rank, seed) is A, (rank, in), and a list of batches; the batches are the same for every rank and seed.
    """
    raise NotImplementedError
