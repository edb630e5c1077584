"""What is true of a right answer to lesson 09. Blocks of every length, also a short last one; levels that are not NF4's, ties, and zeros."""

import math
from statistics import NormalDist

import pytest
import torch

import minilora as ml
from lessons.expect import draw, must_equal
from minilora.quant.double import MAP, DoubleQuantized
from minilora.quant.linear import NF4Linear
from minilora.quant.nf4 import LEVELS, NF4Tensor

NF4 = LEVELS.double()
FIVE = torch.tensor([-1, -0.5, 0, 0.25, 1], dtype=torch.float64)         # uneven, and every middle is a number that binary holds exactly
INT4 = torch.arange(-7, 8, dtype=torch.float64) / 7
TABLES = {"NF4": NF4, "int4": INT4, "five levels": FIVE}
each_table = pytest.mark.parametrize("table", TABLES)


def is_whole(got, names):
    """A tuple of as many tensors as there are names."""
    assert isinstance(got, tuple) and len(got) == len(names), f"a tuple ({', '.join(names)}) is wanted, got {type(got).__name__}"
    for name, part in zip(names, got):
        assert isinstance(part, torch.Tensor), f"{name}: a tensor is wanted, got {type(part).__name__}"


def must_be(got, want, mistakes, what):
    """Codes and bytes: uint8, and equal to the last one. Values are compared before the type, so that a mistake is called by its name."""
    assert isinstance(got, torch.Tensor), f"{what}: a tensor is wanted, got {type(got).__name__}"
    for name, wrong in mistakes.items():
        assert torch.equal(want.long(), wrong.long()) or not torch.equal(got.long(), wrong.long()), f"{name} ({what})"
    assert got.shape == want.shape, f"{what}: shape {tuple(want.shape)} is wanted, got {tuple(got.shape)}"
    different = (got.long() != want.long()).flatten().nonzero().flatten().tolist()
    assert not different, (f"{len(different)} of {want.numel()} differ, first at {different[0]}: {want.flatten()[different[0]]} is wanted, "
                           f"got {got.flatten()[different[0]]} ({what})")
    assert got.dtype == torch.uint8, f"uint8 is wanted, a byte each; got {got.dtype} ({what})"


def nearest(v, levels):
    """The slow, obvious way: every distance, and of two equal ones the first."""
    return (v[..., None] - levels).abs().argmin(dim=-1)


def is_zero(codes, levels, what, usual):
    """Every code is that of the 0. `usual`: where the 0 is in the table of which everybody thinks first."""
    zero, ends = levels.tolist().index(0), (0, len(levels) - 1)
    why = (f": {usual} is only the usual place, look where this table has its 0" if set(codes.tolist()) == {usual} != {zero}
           else ": 0 / 0 is not a number" if set(codes.tolist()) <= {*ends} else "")
    assert codes.tolist() == [zero] * len(codes), f"{what}, {zero} here; you have {codes.tolist()}{why}"


# bits_per_weight

@pytest.mark.parametrize("block_size, second, want", [
    (20, None, 5.6), (64, None, 4.5), (64, 256, 4.126953125), (32, None, 5.0),
    (32, 256, 4.25390625), (128, 512, 4.06298828125), (4096, None, 4.0078125), (100, 40, 4.088)])
def test_bits_are_four_and_a_share_of_the_scale(bits_per_weight, block_size, second, want):
    got = bits_per_weight(block_size, second)
    mistakes = {"the scale is left out, or its share rounded down to 0 by //: every weight pays its share of it": 4.0,
                "the scale's share is rounded down: / is wanted, not //": 4 + 32 // block_size, "the 4 bits of the code are left out": want - 4,
                "these are bytes, or bits in which a scale counts 4: a float32 scale is 32 bits": 4 + 4 / block_size if second is None else 4 + (1 + 4 / second) / block_size}
    if second is None:
        mistakes["the scale is taken as 16 bits; it is a float32"] = 4 + 16 / block_size
    else:
        mistakes |= {"`second` is ignored: 32 bits for every `second` scales, not for each of them": 4 + (8 + 32) / block_size,
                     "this is without double quantization: with `second` a scale takes 8 bits and a share of another": 4 + 32 / block_size,
                     "the second scale is left out, or its share rounded down to 0 by //: 32 bits for every `second` scales": 4 + 8 / block_size,
                     "the second scale is shared by `second` weights here, but it is shared by `second` scales, which are second · block_size weights":
                         4 + 8 / block_size + 32 / second,
                     "the float32 scale is still there beside the 8 bits: the 8 bits stand in its place": 4 + (32 + 8 + 32 / second) / block_size}
    for name, wrong in mistakes.items():
        assert math.isclose(wrong, want) or not math.isclose(got, wrong), f"{name}: {got:.6g} where {want:.6g} is wanted"
    assert math.isclose(got, want, rel_tol=1e-12), f"blocks of {block_size}, second {second}: {want:.9g} bits are wanted, got {got:.9g}"


@pytest.mark.parametrize("double, block_size", [(False, 64), (True, 64), (True, 32)])
def test_bits_are_those_of_what_is_stored(bits_per_weight, double, block_size):
    n = 2 * 256 * block_size
    stored = 8 * ml.quantize_nf4(draw(n).float(), block_size, double).nbytes - 32 * double          # less the one offset
    got = bits_per_weight(block_size, 256 if double else None)
    assert got * n == pytest.approx(stored, rel=1e-12), f"{n:,} weights of the package take {stored:,} bits in blocks of {block_size}, by your count {got * n:,.0f}"


# normal_levels

def by_hand(p, above, below):
    """`above` quantiles above 0 and `below` below, over the largest."""
    Q = NormalDist().inv_cdf
    positive, negative = ([Q(0.5 + (p - 0.5) * i / steps) for i in range(1, steps + 1)] for steps in (above, below))
    return torch.tensor([-q for q in reversed(negative)] + [0.0] + positive, dtype=torch.float64) / Q(p)


def quantiles(shares):
    """Q of each share, over the largest."""
    q = torch.tensor([NormalDist().inv_cdf(share) for share in shares], dtype=torch.float64)
    return q / q.max()


def last_left_out(end, half):
    """Shares from 0.5 up to `end` in one step more on both sides, and `end` itself left out."""
    below, above = ([0.5 + (end - 0.5) * i / steps for i in range(1, steps)] for steps in (half, half + 1))
    return quantiles([*[1 - share for share in reversed(below)], 0.5, *above])


@pytest.mark.parametrize("p, bits", [(0.9677083, 4), (0.9677083, 2), (0.95, 3), (0.995, 5), (0.8, 4)])
def test_levels_are_quantiles_with_a_zero_among_them(normal_levels, p, bits):
    got, half = normal_levels(p, bits), 2 ** (bits - 1)
    want = by_hand(p, half, half - 1)
    without_zero = torch.cat([want[:half - 1], want[half:]])
    no_zero = quantiles([1 - p + (2 * p - 1) * i / (2**bits - 1) for i in range(2**bits)])
    zero_below, zero_above = no_zero.clone(), no_zero.clone()
    zero_below[half - 1], zero_above[half] = 0, 0
    assert isinstance(got, torch.Tensor), f"a tensor is wanted, got {type(got).__name__}"
    if got.shape == want.shape and torch.allclose(got.double().sort().values, want, atol=1e-6):
        assert torch.allclose(got.double(), want, atol=1e-6), "the levels are right and not ascending: sort them"
        assert got.dtype == torch.float64, f"float64 is wanted, got {got.dtype}"
        off = (got - want).abs().max().item()
        assert off < 1e-9, f"the levels are off by {off:.1g}, as float32 rounds: take the quantiles in float64 from the first step on"
    alike = got.shape == (2**bits - 1,) and torch.allclose(got, -got.flip(0))
    assert not alike, f"{2**bits - 1} levels, alike on both sides: half - 1 levels on each, so one code would never be used (normal_levels({p}, {bits}))"
    must_equal(got, want, {
        "no level is 0: equal shares from 1 - p to p have none among them; take each side for itself, from 0.5 on": no_zero,
        "equal shares from 1 - p to p, and the last level below 0 put at 0; take each side for itself, in steps of its own from 0.5 on": zero_below,
        "equal shares from 1 - p to p, and the first level above 0 put at 0; take each side for itself, in steps of its own from 0.5 on": zero_above,
        "p is ignored: these are the levels for 0.9677083": by_hand(0.9677083, half, half - 1),
        "the shares run to 1 and their end is left out, so p is ignored: they end at p": last_left_out(1.0, half),
        "the last share is left out: p belongs to them, and 0.5 is the one left out": last_left_out(p, half),
        "they are not divided by the largest: it has to be 1": want * NormalDist().inv_cdf(p),
        "the larger half is below 0: NF4 has one level more above": -want.flip(0),
        "0 is missing": without_zero,
        "the same steps on both sides make one level too many: below 0 there are half - 1": by_hand(p, half, half),
        "equal steps between 0 and 1: the quantiles are missing": torch.cat([torch.linspace(-1, 0, half, dtype=torch.float64), torch.linspace(0, 1, half + 1, dtype=torch.float64)[1:]]),
    }, f"normal_levels({p}, {bits})")


def test_levels_are_nf4s(normal_levels):
    got = normal_levels(0.9677083, 4)
    assert got.shape == NF4.shape, f"16 levels are wanted for 4 bits, got {len(got)}"
    off = (got - NF4).abs().max().item()
    assert off < 5e-7, f"with p = 0.9677083 and 4 bits these are NF4's published levels, of which yours are up to {off:.2g} off"
    assert got[7] == 0 and got[0] == -1 and got[15] == 1, f"-1, 0 and 1 are there exactly; you have {got[0]}, {got[7]}, {got[15]}"


# quantize_block

@each_table
@pytest.mark.parametrize("shape", [(7,), (3, 5), (2, 3, 6), (5, 64)])
def test_codes_are_the_nearest_levels(quantize_block, shape, table):
    levels, w = TABLES[table], 3 * draw(*shape)
    w.view(-1, shape[-1])[0] *= 1e-30                                    # blocks of very different size
    w.view(-1, shape[-1])[-1, 1] = -30.0                                 # in the last block the largest is negative
    got = quantize_block(w, levels)
    is_whole(got, ("codes", "scales"))
    codes, scales = got
    want = w.abs().amax(dim=-1)
    must_equal(scales, want, {
        "the largest w, and not the largest |w|": w.amax(dim=-1),
        "the largest weight with its sign; a scale is the largest |w|, never negative": w.gather(-1, w.abs().argmax(dim=-1, keepdim=True)).squeeze(-1),
        "one scale for all blocks: every last dimension is a block of its own": w.abs().max().expand(want.shape),
        "one scale for all blocks": w.abs().max(),
        "the standard deviation; the largest level is 1, so the largest |w| is wanted": w.std(dim=-1),
        "the mean |w|; the largest level is 1, so the largest |w| is wanted": w.abs().mean(dim=-1),
        "1 / scale": 1 / want,
        "the blocks have kept a dimension of size 1": want[..., None],
    }, f"scales of w of shape {shape}")
    v = w / want[..., None]
    below = (torch.searchsorted(levels, v, right=True) - 1).clamp(0, len(levels) - 1)
    must_be(codes, nearest(v, levels), {
        "this is the level below, not the nearest: count the middles between levels": below,
        "this is the level above, not the nearest: count the middles between levels": torch.searchsorted(levels, v),
        "the levels were compared with w itself: divide by the scale first": nearest(w, levels),
        "an epsilon beside the scale, or in its place, swallows a small block: divide by the scale itself": nearest(w / want[..., None].clamp_min(1e-12), levels),
        "NF4's levels, whatever `levels` says": nearest(v, NF4),
        "the codes are counted from above: code 0 is the level -1": len(levels) - 1 - nearest(v, levels),
        "the codes are those of equal steps from -1 to 1": ((v + 1) / 2 * (len(levels) - 1)).round(),
    }, f"codes of w of shape {shape}, {table}")


def test_a_tie_goes_down(quantize_block):
    w = 2 * torch.tensor([1, -0.75, -0.25, 0.125, 0.625, 0.1250001, -0.2500001], dtype=torch.float64)
    got = quantize_block(w, FIVE)
    is_whole(got, ("codes", "scales"))
    must_be(got[0], torch.tensor([4, 0, 1, 2, 3, 3, 1]), {
        "half-way between two levels the upper one was taken: the lower one is wanted": torch.tensor([4, 1, 2, 3, 4, 3, 1]),
        "half-way between two levels the one nearer to 0 was taken: the lower one is wanted": torch.tensor([4, 1, 2, 2, 3, 3, 1]),
    }, "codes at ties")


@each_table
def test_a_block_of_zeros_stays_one(quantize_block, table):
    levels = TABLES[table]
    w = torch.stack([draw(6), torch.zeros(6).double(), draw(6, seed=1) / draw(6, seed=1).abs().max()])          # the last has scale 1
    got = quantize_block(w, levels)
    is_whole(got, ("codes", "scales"))
    codes, scales = got
    assert scales.shape == (3,), f"scales: one a block, shape (3,), is wanted, got {tuple(scales.shape)}"
    assert scales.isfinite().all() and scales[1] == 0, f"a block of zeros has scale 0; the scales are {scales.tolist()}"
    is_zero(codes[1], levels, "a block of zeros has the code of the level 0", 7)
    must_be(codes[[0, 2]], nearest(w[[0, 2]] / w[[0, 2]].abs().amax(dim=1, keepdim=True), levels), {}, "codes beside a block of zeros")


def test_a_block_in_float32_is_the_packages(quantize_block):
    w = draw(50 * 64, dtype=torch.float32)
    got, Q = quantize_block(w.view(50, 64), LEVELS), ml.quantize_nf4(w)
    is_whole(got, ("codes", "scales"))
    must_equal(got[1], Q.scales, {}, "scales of 50 blocks")
    assert got[1].dtype == torch.float32, f"scales: w's dtype, float32, is wanted, got {got[1].dtype}"
    must_be(got[0].flatten(), torch.stack([Q.codes >> 4, Q.codes & 15], dim=1).flatten(), {}, "codes of 50 blocks, beside the package's")


@pytest.mark.parametrize("table", ["NF4", "five levels"])
def test_no_weight_is_off_by_more_than_half_the_widest_gap(quantize_block, table):
    levels, w = TABLES[table], draw(40, 32)
    got = quantize_block(w, levels)
    is_whole(got, ("codes", "scales"))
    assert got[1].shape == (40,), f"scales: one a block, shape (40,), is wanted, got {tuple(got[1].shape)}"
    back = levels[got[0].long()] * got[1][:, None]
    worst = ((back - w).abs() / w.abs().amax(dim=-1, keepdim=True)).max().item()
    assert worst <= levels.diff().max().item() / 2 + 1e-12, f"read back, a weight is off by {worst:.3f} of its block's scale: more than half the widest gap"
    place = w.abs().argmax(dim=-1, keepdim=True)
    assert torch.allclose(back.gather(1, place), w.gather(1, place)), "the largest weight of a block comes back exactly: its level is -1 or 1"


# pack

@pytest.mark.parametrize("n", [1, 2, 3, 5, 8, 64, 101, 0])
def test_two_codes_in_a_byte(pack, n):
    codes = torch.randint(0, 16, (n,), generator=torch.Generator().manual_seed(n)).to(torch.uint8)
    if n > 2:
        codes[:2] = torch.tensor([15, 1])                                # 16 · 15 + 1 is not below 128, and not its own mirror
    even = torch.cat([codes, torch.full((n % 2,), 7, dtype=torch.uint8)]).long()
    first, second = even[::2], even[1::2]
    half = len(first)
    zeros = torch.cat([codes.long(), torch.zeros(n % 2, dtype=torch.long)])
    must_be(pack(codes), 16 * first + second, {
        "the first code is in the low half; it goes into the high one": 16 * second + first,
        "the odd one out is joined by 0; 7 is wanted, for code 0 stands for -1": 16 * zeros[::2] + zeros[1::2],
        "the odd one out is joined by 15; 7 is wanted": 16 * first + torch.cat([second[:n // 2], torch.full((n % 2,), 15)]),
        "each code has a byte of its own: two share one": codes,
        "the first half of the codes is packed with the second half; neighbours share a byte": 16 * even[:half] + even[half:],
        "15 · first + second; a shift by four bits is a product with 16": 15 * first + second,
        "the odd one out is lost: it needs a byte too": (16 * first + second)[:n // 2],
    }, f"n = {n}")


def test_the_bytes_are_those_of_the_package(pack):
    """Odd and even in one test, of the course's base model."""
    for n in (4096, 77):
        w = ml.load_base().blocks[0].attention.q_proj.weight.detach().flatten()[:n]
        Q = ml.quantize_nf4(w)
        codes = torch.stack([Q.codes >> 4, Q.codes & 15], dim=1).flatten()[:n]
        must_be(pack(codes), Q.codes, {}, f"{n} weights of the base model, beside the package's bytes")


# unpack

@pytest.mark.parametrize("n", [1, 2, 3, 5, 8, 64, 101])
def test_and_out_again(unpack, n):
    packed = torch.randint(0, 256, (-(-n // 2),), generator=torch.Generator().manual_seed(n)).to(torch.uint8)
    packed[0] = 0xF1                                                     # more than 127: a signed byte would be negative
    high, low = packed.long() // 16, packed.long() % 16
    want = torch.stack([high, low], dim=1).flatten()
    mistakes = {
        "the low half comes first here; the first code is in the high half": torch.stack([low, high], dim=1).flatten()[:n],
        "all high halves, then all low ones; the two of a byte are neighbours": torch.cat([high, low])[:n],
        "the high half is not shifted down: codes are from 0 to 15": torch.stack([packed.long() & 240, low], dim=1).flatten()[:n],
        "the low half still has the high one above it: & 15": torch.stack([high, packed.long()], dim=1).flatten()[:n],
    }
    if n % 2:
        mistakes["n is odd: the last half byte is a filler and no code"] = want
    must_be(unpack(packed, n), want[:n], mistakes, f"n = {n}, {len(packed)} bytes")


def test_unpack_reads_what_the_package_has_written(unpack):
    for n in (130, 131):
        Q = ml.quantize_nf4(draw(n).float())
        codes = unpack(Q.codes, n)
        must_be(codes, nearest(draw(n).float() / Q.scales.repeat_interleave(64)[:n], LEVELS), {}, f"the codes of {n} weights of the package")


# dequantize

def with_a_short_block(dequantize, codes, scales, levels, block_size):
    """What it gives back, where the two slips at a short last block are called by their name."""
    n = len(codes)
    try:
        got = dequantize(codes, scales, levels, block_size)
    except RuntimeError as error:
        if n % block_size == 0 or isinstance(error, NotImplementedError):
            raise
        slip = AssertionError(f"the last block may be shorter ({n} weights in blocks of {block_size}); torch says: {error}")
        raise slip.with_traceback(error.__traceback__) from error
    padded = isinstance(got, torch.Tensor) and got.shape == (len(scales) * block_size,) != codes.shape
    assert not padded, f"the last block may be shorter: leave out what was put behind the codes to fill it ({n} numbers are wanted, got {len(got)})"
    return got


@pytest.mark.parametrize("table", ["NF4", "five levels"])
def test_a_code_is_an_index_and_no_mask(dequantize, table):
    """As many codes as levels, none of them 0: here a mask would find no fault."""
    levels = TABLES[table]
    codes = torch.arange(len(levels), 0, -1).clamp_max(len(levels) - 1).to(torch.uint8)
    scales = torch.tensor([0.75], dtype=torch.float64)
    must_equal(dequantize(codes, scales, levels, len(levels)), 0.75 * levels[codes.long()], {
        "the uint8 codes were taken for a mask and not for indexes: codes.long()": 0.75 * levels,
        "the scales are missing": levels[codes.long()],
        "the code itself was multiplied: it is an index of a level": 0.75 * codes.double(),
    }, f"the codes {codes.tolist()}", rtol=1e-6)


@pytest.mark.parametrize("n, block_size, table", [(12, 4, "NF4"), (13, 4, "five levels"), (3, 5, "int4"), (200, 64, "NF4"), (200, 32, "five levels")])
def test_level_times_scale(dequantize, n, block_size, table):
    levels, blocks, what = TABLES[table], -(-n // block_size), f"{n} weights in blocks of {block_size}, {table}"
    codes = torch.randint(0, len(levels), (n,), generator=torch.Generator().manual_seed(n)).to(torch.uint8)
    scales = 0.1 + draw(blocks).abs()
    place, level = torch.arange(n), levels[codes.long()]
    want = level * scales[place // block_size]
    got = with_a_short_block(dequantize, codes, scales, levels, block_size)
    must_equal(got, want, {
        "the scales are missing": level,
        "the code itself was multiplied: it is an index of a level": codes.double() * scales[place // block_size],
        "divided by the scale; that was the way there": level / scales[place // block_size],
        "the scales go round, weight by weight; block_size neighbours share one": level * scales[place % blocks],
        "the blocks are made equally long; only the last may be shorter, all others have block_size": level * scales[place // -(-n // blocks)],
        "blocks of 64, whatever block_size says": level * scales[place // 64],
    }, what, rtol=1e-6)
    assert got.dtype == torch.float64, f"the scales' dtype, float64, is wanted, got {got.dtype}"
    must_equal(got, want, {}, what)


def test_dequantize_says_what_the_package_says(dequantize):
    for n in (64 * 7, 64 * 5 + 9):
        Q = ml.quantize_nf4(draw(n).float())
        codes = torch.stack([Q.codes >> 4, Q.codes & 15], dim=1).flatten()[:n]
        got = with_a_short_block(dequantize, codes, Q.scales, LEVELS, 64)
        must_equal(got, Q.dequantize(), {}, f"{n} weights of the package")
        assert torch.equal(got, Q.dequantize()) and got.dtype == torch.float32, "bit for bit the package's numbers, in float32: one product, and nothing else"


# double_quantize

EIGHTS = torch.tensor([-1, -0.75, -0.25, 0, 0.125, 0.5, 1])              # a small table, its middles exact


def scales_of(m, seed=0):
    """As they come: above 0, with a few large ones among them."""
    scales = 0.05 + 0.02 * draw(m, seed=seed).abs()
    scales[::9] *= 3
    return scales.float()


def in_parts(got):
    """(codes, absmax, offset), the offset a single number."""
    is_whole(got, ("codes", "absmax", "offset"))
    assert got[2].shape == (), f"the offset is one for all of the scales: a single number, of shape (), is wanted, got shape {tuple(got[2].shape)}"
    return got


each_map = pytest.mark.parametrize("table", [MAP, EIGHTS], ids=["the 8-bit map", "seven values"])


@each_map
@pytest.mark.parametrize("m, size", [(6, 3), (7, 3), (10, 4), (2, 5), (1000, 256)])
def test_the_scales_in_eight_bits(double_quantize, m, size, table):
    scales = scales_of(m)
    got = double_quantize(scales, table, size)
    is_whole(got, ("codes", "absmax", "offset"))
    codes, absmax, offset = got
    mean = scales.double().mean().float()
    must_equal(offset, mean, {
        "the median; the mean is wanted": scales.median(), "the largest scale; the mean is wanted": scales.max(), "the sum; the mean is wanted": scales.sum(),
        "no offset is taken off": torch.tensor(0.0), "the offset has a dimension; a single number, of shape (), is wanted": mean[None],
        "the mean of each block; there is one offset for all of the scales": torch.stack([part.mean() for part in scales.split(size)]),
        "zeros that fill the last block are in this mean: take it of the scales alone, before anything is put behind them": scales.sum() / (-(-m // size) * size),
    }, f"offset of {m} scales", rtol=1e-6)
    d = scales - mean
    parts = d.split(size)
    must_equal(absmax, torch.stack([part.abs().max() for part in parts]), {
        "the largest d, and not the largest |d|: a scale far below the mean counts too": torch.stack([part.max() for part in parts]),
        "taken of the scales, before the offset was taken off": torch.stack([part.abs().max() for part in scales.split(size)]),
        "one absmax for all blocks": d.abs().max().expand(len(parts)),
        "zeros were put behind before the offset was taken off, and it made them large: fill the last block behind d":
            torch.stack([torch.cat([part.abs(), mean.expand(size - len(part))]).max() for part in parts]),
    }, f"absmax of {m} scales in blocks of {size}", rtol=1e-6)
    v = d / absmax.repeat_interleave(size)[:m]
    must_be(codes, nearest(v, table), {
        "this is the value below, not the nearest: count the middles between values": (torch.searchsorted(table, v, right=True) - 1).clamp_min(0),
        "this is the value above, not the nearest: count the middles between values": torch.searchsorted(table, v),
        "d was not divided by its block's absmax": nearest(d, table),
        "the scales themselves were looked up: take the offset off first": nearest(scales / absmax.repeat_interleave(size)[:m], table),
        "equal steps, as in int8; the table says which values there are": ((v + 1) / 2 * (len(table) - 1)).round(),
    }, f"codes of {m} scales in blocks of {size}")
    for name, part in (("absmax", absmax), ("offset", offset)):
        assert part.dtype == torch.float32, f"{name}: float32 is wanted, got {part.dtype}"


def test_the_offset_is_added_up_in_float64(double_quantize):
    _, _, offset = in_parts(double_quantize(torch.tensor([2.0**24, 1, 4]), MAP, 256))
    why = ": in float32 the sum is rounded, add up in float64" if abs(offset - 5592407) < 8 else ""
    assert offset == 5592407, f"the mean of 2^24, 1 and 4 is 5592407, you have {offset.item():.1f}{why}"


def test_the_offset_taken_off_is_the_rounded_one(double_quantize):
    """1, and two of the next float32: their mean, a third of a step below the two, is rounded to them."""
    step = 2.0**-23
    codes, absmax, offset = in_parts(double_quantize(1 + step * torch.tensor([0.0, 1, 1]), EIGHTS, 3))
    assert offset == 1 + step, f"offset: the mean rounded to float32, 1 + 2^-23 = {1 + step:.9f}, is wanted, got {offset.item():.9f}"
    must_be(codes, torch.tensor([0, 3, 3]), {
        "d was taken from the mean in float64; the way back knows only the offset, so round first and take off that": torch.tensor([0, 5, 5]),
    }, "codes of 1, 1 + 2^-23, 1 + 2^-23")
    assert absmax == step, f"absmax: 2^-23 = {step:.3g} is wanted, got {absmax.item():.3g}"


@each_map
@pytest.mark.parametrize("scale", [0.0, 0.375])
def test_scales_that_are_all_alike(double_quantize, scale, table):
    codes, absmax, offset = in_parts(double_quantize(torch.full((7,), scale), table, 3))
    assert offset == scale and absmax.tolist() == [0, 0, 0], f"7 scales of {scale}: offset {scale} and absmax 0, 0, 0 are wanted, got {offset.item()} and {absmax.tolist()}"
    assert codes.shape == (7,), f"codes: shape (7,) is wanted, got {tuple(codes.shape)}"
    is_zero(codes, table, "where every d is 0 the code is that of the 0", 127)


def test_small_scales_have_the_same_codes(double_quantize):
    """All times 2^-80, which rounds nothing: an epsilon in the division would be larger than every scale here."""
    scales = scales_of(10)
    got, want = in_parts(double_quantize(scales * 2.0**-80, MAP, 4)), in_parts(double_quantize(scales, MAP, 4))
    must_be(got[0], want[0], {}, "codes of scales that are all 2^-80 times as large: divide by absmax itself, without an epsilon")
    assert torch.equal(got[1] * 2.0**80, want[1]) and torch.equal(got[2] * 2.0**80, want[2]), "absmax and offset are 2^-80 times as large, without an epsilon"


def test_a_scale_half_way_goes_down(double_quantize):
    codes, absmax, _ = in_parts(double_quantize(torch.tensor([2.0, 0.5, 0.5]), EIGHTS, 2))           # d = 1, -0.5, -0.5: -0.5 is half-way from -0.75 to -0.25
    assert absmax.tolist() == [1, 0.5], f"absmax 1, 0.5 are wanted, got {absmax.tolist()}"
    must_be(codes, torch.tensor([6, 1, 0]), {
        "half-way between two values the upper one was taken: the lower one is wanted": torch.tensor([6, 2, 0]),
    }, "codes of 2, 0.5, 0.5 in blocks of 2, a tie among them")


def test_the_tiny_gpt_runs_on_your_scales(double_quantize):
    """Its 24 layers in four bits with these scales say the very bits that ml.quantize's say."""
    theirs, mine = ml.quantize(ml.load_base()), ml.load_base()
    for name, layer in [*theirs.named_modules()]:
        if isinstance(layer, NF4Linear):
            parent, _, last = name.rpartition(".")
            linear = mine.get_submodule(name)
            got = in_parts(double_quantize(linear.weight.detach().view(-1, 64).abs().amax(dim=1), MAP, 256))
            weight = NF4Tensor(layer.codes, DoubleQuantized(*got), linear.weight.shape, torch.float32, 64)
            setattr(mine.get_submodule(parent), last, NF4Linear(weight, linear.bias))
    ids = torch.arange(40).view(1, 40) + 60
    with torch.no_grad():
        assert torch.equal(mine(ids), theirs(ids)), "the tiny GPT says something else with these scales than with the package's: some code, absmax or the offset differs"
