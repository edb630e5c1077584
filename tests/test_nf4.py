"""NF4 against its slow specification: levels, codes, scales, values; at every size, in every type, at ties and tails."""

import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

import minilora as ml
from minilora.quant import spec
from minilora.quant.nf4 import BLOCK_SIZES, CHUNK, LEVELS, THRESHOLDS, derived_levels, unpack

TYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def values(Q):
    """level · scale, one product in float32, rounded once."""
    levels = LEVELS[unpack(Q.codes, Q.shape.numel()).long()]
    return (levels * Q.scales.repeat_interleave(Q.block_size)[:len(levels)]).to(Q.dtype).view(Q.shape)


def same_as_spec(w, block_size):
    codes, scales = spec.quantize(w.float().numpy(), LEVELS.numpy(), block_size)
    Q = ml.quantize_nf4(w, block_size)
    assert np.array_equal(Q.codes.numpy(), spec.pack(codes)) and np.array_equal(Q.scales.numpy(), scales)
    assert np.array_equal(spec.unpack(Q.codes.numpy(), len(codes)), codes)
    expected = torch.from_numpy(spec.dequantize(codes, scales, LEVELS.numpy(), block_size)).to(w.dtype).view(w.shape)
    assert torch.equal(Q.dequantize(), expected) and Q.dequantize().dtype == w.dtype


def test_the_levels_are_quantiles_of_the_normal_distribution():
    assert (derived_levels() - LEVELS).abs().max() <= 5e-7
    assert torch.equal(derived_levels(offset=0.9677083), LEVELS)
    assert abs(1 - (1 / 30 + 1 / 32) / 2 - 0.9677083) < 4e-8


def test_the_papers_formula_does_not_give_them():
    """15 values where there are 16, symmetric where NF4 is not; its second is 0.077 from NF4's."""
    paper = spec.paper_levels()
    assert len(paper) == 15 and paper == pytest.approx([-q for q in reversed(paper)], abs=1e-12)
    assert paper[1] == pytest.approx(-0.7689, abs=5e-5) and LEVELS[1] == pytest.approx(-0.6962, abs=5e-5)
    assert (LEVELS < 0).sum() == 7 and (LEVELS > 0).sum() == 8 and LEVELS[7] == 0


@pytest.mark.parametrize("n", [*range(1, 70), 127, 128, 129, 200, 299, 300])
def test_every_size(n):
    same_as_spec(random(n, seed=n), 32)
    same_as_spec(random(n, seed=n).to(torch.bfloat16), 64)


@TYPES
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_every_type_and_block_size(dtype, block_size):
    same_as_spec((3 * random(7, 2 * block_size // 7 + 1)).to(dtype), block_size)


@pytest.mark.parametrize("name, w", [
    ("uniform", torch.rand(190, generator=torch.Generator().manual_seed(0)) - 0.3), ("constant", torch.full((130,), -0.7)),
    ("tiny", 1e-30 * random(130)), ("huge", 1e38 * random(130).clamp(-3, 3)), ("zeros", torch.zeros(70)), ("one spike", torch.eye(12)[3]),
    ("heavy tails", torch.tan(1.5 * (2 * torch.rand(190, generator=torch.Generator().manual_seed(0)) - 1))), ("minus zero", -torch.zeros(65)),
])
def test_every_distribution(name, w):
    same_as_spec(w, 64)


def test_a_tie_goes_down_and_its_neighbours_to_either_side():
    for code, t in enumerate(THRESHOLDS.tolist()):
        block = torch.zeros(32)
        block[0] = 1.0
        block[1:4] = torch.tensor([t, np.nextafter(np.float32(t), np.float32(-2)), np.nextafter(np.float32(t), np.float32(2))])
        assert unpack(ml.quantize_nf4(block, 32).codes, 4).tolist() == [15, code, code, code + 1]


def test_the_first_of_two_is_in_the_high_half():
    assert ml.quantize_nf4(torch.tensor([1.0, -1.0])).codes.tolist() == [0xF0]
    assert ml.quantize_nf4(torch.tensor([-2.0])).codes.tolist() == [0x07]                # an odd one out beside the code of 0


def test_blocks_run_on_from_row_to_row():
    w = random(3, 48)
    assert ml.quantize_nf4(w).scales.tolist() == [w.flatten()[i:i + 64].abs().max() for i in (0, 64, 128)]


def test_zero_and_the_largest_of_a_block_come_back_as_they_were():
    w = random(50, 64)
    w[:, 7], w[3] = 0.0, 0.0
    back = ml.quantize_nf4(w).dequantize()
    largest = w.abs().argmax(dim=1, keepdim=True)
    assert torch.equal(back.gather(1, largest), w.gather(1, largest)) and not back[:, 7].any() and not back[3].any()


@pytest.mark.parametrize("n", [CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 4096 + 33])
def test_pieces_do_not_show(n):
    """A tensor is quantized and rebuilt piece by piece; the blocks are those of the whole."""
    w = random(n)
    Q = ml.quantize_nf4(w)
    padded = torch.cat([w, w.new_zeros(-n % 64)]).view(-1, 64)
    assert torch.equal(Q.scales, padded.abs().amax(dim=1)) and torch.equal(Q.dequantize(), values(Q))
    v = padded / padded.abs().amax(dim=1, keepdim=True)
    nearest = (v.flatten()[:n, None] - LEVELS).abs().argmin(dim=1)
    assert (unpack(Q.codes, n) != nearest).sum() <= n * 1e-5                              # rounding at a threshold


@TYPES
@pytest.mark.parametrize("into", [None, torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("double", [False, True])
def test_values_are_level_times_scale_rounded_once(dtype, into, double):
    Q = ml.quantize_nf4(random(33, 70).to(dtype), double=double)
    back = Q.dequantize(into)
    exact = LEVELS[unpack(Q.codes, 33 * 70).long()] * Q.scales.repeat_interleave(64)[:33 * 70]
    assert back.dtype == (into or dtype) and torch.equal(back, exact.view(33, 70).to(into or dtype))


def test_what_was_quantized_once_stays():
    Q = ml.quantize_nf4(random(100, 30))
    again = ml.quantize_nf4(Q.dequantize())
    assert torch.equal(again.codes, Q.codes) and torch.equal(again.scales, Q.scales)


def test_how_good_it_is_on_normal_numbers():
    """Root mean square error over the standard deviation .0920; and the levels are not used equally often, as one reads."""
    w = random(2**21)
    Q = ml.quantize_nf4(w)
    assert (Q.dequantize() - w).square().mean().sqrt().item() == pytest.approx(0.0920, abs=2e-4)
    share = unpack(Q.codes, w.numel()).bincount(minlength=16) / w.numel()
    assert share.min().item() == pytest.approx(0.017, abs=2e-3) and share.max().item() == pytest.approx(0.092, abs=2e-3)


def test_bits_are_counted_in_what_is_stored():
    Q = ml.quantize_nf4(random(4096, 1024))
    assert Q.bits_per_parameter == 4.5 and Q.nbytes == Q.codes.untyped_storage().nbytes() + Q.scales.untyped_storage().nbytes()


def test_a_tensor_that_is_not_contiguous():
    w = random(40, 50)
    for view in (w.T, w[::2, 3:], w.expand(3, 40, 50)):
        Q, expected = ml.quantize_nf4(view), ml.quantize_nf4(view.clone(memory_format=torch.contiguous_format))
        assert torch.equal(Q.codes, expected.codes) and Q.shape == view.shape and torch.equal(Q.dequantize(), expected.dequantize())


def test_a_parameter_gives_codes_without_a_history():
    Q = ml.quantize_nf4(torch.nn.Parameter(random(8, 8)))
    assert not Q.scales.requires_grad and not Q.dequantize().requires_grad


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("at", [(0, 0), (2, 5), (99, 6998)])
def test_what_is_not_finite_is_refused_with_its_place(bad, at, double):
    w = random(100, 6999)
    w[at] = bad
    w[99, 6998] = bad                                        # the first one is named
    with pytest.raises(ValueError, match=rf"the value at \({at[0]}, {at[1]}\) is {bad}"):
        ml.quantize_nf4(w, double=double)


@pytest.mark.parametrize("w, message", [
    (torch.arange(64), "floating-point numbers, got torch.int64"), (torch.ones(4, dtype=torch.bool), "got torch.bool"),
    (torch.ones(4, dtype=torch.complex64), "got torch.complex64"), ([1.0, 2.0], "got list"), (torch.empty(0, 5), r"shape \(0, 5\) has nothing"),
    (torch.empty(8, 8, device="meta"), "meta device.*load its weights first"),
])
def test_bad_input_is_refused(w, message):
    with pytest.raises(ValueError, match=message):
        ml.quantize_nf4(w)


@pytest.mark.parametrize("block_size", [0, 1, 16, 63, 96, 8192, -64, 64.5, "64", None, True])
def test_bad_block_sizes_are_refused(block_size):
    with pytest.raises(ValueError, match="block_size must be one of 32, 64, .* 4096, got"):
        ml.quantize_nf4(random(64), block_size)


def test_parts_that_do_not_fit_together_are_refused():
    Q = ml.quantize_nf4(random(10, 13))
    for parts in ((Q.codes[:-1], Q.scales), (Q.codes, Q.scales[:-1]), (Q.codes.int(), Q.scales), (Q.codes, torch.cat([Q.scales, Q.scales]))):
        with pytest.raises(ValueError, match="130 weights in blocks of 64 need 65 bytes of codes and 3 scales, got"):
            ml.NF4Tensor(*parts, Q.shape, Q.dtype, 64)


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="the peak is read from Linux")
def test_quantizing_needs_less_than_the_tensor_again(without_malloc):
    """Each size in a process of its own: the most memory it ever held, beyond what the dense tensor takes. Peak ≤ 2 × dense means ≤ 1 here."""
    code = """
import os, torch, minilora as ml
def resident(line):
    return 1024 * next(int(row.split()[1]) for row in open("/proc/self/status") if row.startswith(line))
for dtype in (torch.float32, torch.bfloat16):
    for size in (2048, 4096):
        if os.fork():                                       # torch is imported once
            os.wait()
            continue
        w = torch.randn(size, size).to(dtype)
        ml.quantize_nf4(w[:128], double=True).dequantize()
        with open("/proc/self/clear_refs", "w") as file:    # the peak counts from here
            file.write("5")
        before = resident("VmRSS")
        ml.quantize_nf4(w, double=True)
        print((resident("VmHWM") - before) / w.nbytes, flush=True)
        os._exit(0)
"""
    extra = [float(line) for line in subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=without_malloc).stdout.split()]
    assert len(extra) == 4 and max(extra) < 1 and min(extra) > 0.01, extra
