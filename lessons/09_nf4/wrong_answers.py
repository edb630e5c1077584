"""Plausible mistakes in lesson 09, each of which the tests must reject with the message named here."""

import torch
import torch.nn.functional as F
from torch import Tensor

from lessons import provokes
from minilora.quant.nf4 import LEVELS

Q = torch.special.ndtri


@provokes("the second scale is shared by `second` weights here")
def bits_per_weight__second_of_weights(block_size: int, second: int | None) -> float:
    return 4 + 32 / block_size if second is None else 4 + 8 / block_size + 32 / second


@provokes("the float32 scale is still there")
def bits_per_weight__both_scales(block_size: int, second: int | None) -> float:
    return 4 + 32 / block_size + (0 if second is None else (8 + 32 / second) / block_size)


@provokes("these are bytes")
def bits_per_weight__bytes(block_size: int, second: int | None) -> float:
    return 4 + 4 / block_size if second is None else 4 + (1 + 4 / second) / block_size


@provokes("the second scale is left out")
def bits_per_weight__no_second_scale(block_size: int, second: int | None) -> float:
    return 4 + (32 if second is None else 8) / block_size


@provokes("bits are wanted, got")
def bits_per_weight__always_256(block_size: int, second: int | None) -> float:
    return 4 + (32 if second is None else 8 + 32 / 256) / block_size


@provokes("`second` is ignored")
def bits_per_weight__second_ignored(block_size: int, second: int | None) -> float:
    return 4 + (32 if second is None else 8 + 32) / block_size


@provokes("/ is wanted, not //")
def bits_per_weight__floored(block_size: int, second: int | None) -> float:
    return 4 + 32 // block_size if second is None else 4 + 8 / block_size + 32 / (second * block_size)


@provokes("not divided by the largest")
def normal_levels__not_scaled(p: float, bits: int) -> Tensor:
    half = 2 ** (bits - 1)
    above, below = (Q(torch.linspace(0.5, p, n, dtype=torch.float64)) for n in (half + 1, half))
    return torch.cat([-below.flip(0)[:-1], above])


@provokes("the larger half is below 0")
def normal_levels__sides_swapped(p: float, bits: int) -> Tensor:
    half = 2 ** (bits - 1)
    above, below = (Q(torch.linspace(0.5, p, n, dtype=torch.float64)) for n in (half, half + 1))
    return torch.cat([-below.flip(0)[:-1], above]) / above[-1]


@provokes("one level too many")
def normal_levels__symmetric(p: float, bits: int) -> Tensor:
    above = Q(torch.linspace(0.5, p, 2 ** (bits - 1) + 1, dtype=torch.float64))
    return torch.cat([-above.flip(0)[:-1], above]) / above[-1]


@provokes("one code would never be used")
def normal_levels__literal_equation_4(p: float, bits: int) -> Tensor:
    q = Q(torch.linspace(0, 1, 2**bits + 2, dtype=torch.float64)[1:-1])
    return (q[:-1] + q[1:]) / (q[-2] + q[-1])


@provokes("one code would never be used")
def normal_levels__one_too_few(p: float, bits: int) -> Tensor:
    above = Q(torch.linspace(0.5, p, 2 ** (bits - 1), dtype=torch.float64))
    return torch.cat([-above.flip(0)[:-1], above]) / above[-1]


@provokes("the quantiles are missing")
def normal_levels__equal_steps(p: float, bits: int) -> Tensor:
    half = 2 ** (bits - 1)
    return torch.cat([torch.linspace(-1, 0, half, dtype=torch.float64)[:-1], torch.linspace(0, 1, half + 1, dtype=torch.float64)])


@provokes("as float32 rounds")
def normal_levels__quantiles_in_float32(p: float, bits: int) -> Tensor:
    half = 2 ** (bits - 1)
    above, below = (Q(torch.linspace(0.5, p, n)).double() for n in (half + 1, half))
    return torch.cat([-below.flip(0)[:-1], above]) / above[-1]


@provokes("not ascending")
def normal_levels__not_sorted(p: float, bits: int) -> Tensor:
    half = 2 ** (bits - 1)
    above, below = (Q(torch.linspace(0.5, p, n, dtype=torch.float64)) for n in (half + 1, half))
    return torch.cat([-below[1:], above]) / above[-1]


@provokes("no level is 0")
def normal_levels__no_zero(p: float, bits: int) -> Tensor:
    """Sixteen equal shares, and no 0 among their quantiles."""
    levels = Q(torch.linspace(1 - p, p, 2**bits, dtype=torch.float64))
    return levels / levels[-1]


@provokes("put at 0")
def normal_levels__zero_put_in(p: float, bits: int) -> Tensor:
    levels = Q(torch.linspace(1 - p, p, 2**bits, dtype=torch.float64))
    levels[2 ** (bits - 1) - 1] = 0
    return levels / levels[-1]


@provokes("p is ignored: these are")
def normal_levels__p_ignored(p: float, bits: int) -> Tensor:
    half = 2 ** (bits - 1)
    above, below = (Q(torch.linspace(0.5, 0.9677083, n, dtype=torch.float64)) for n in (half + 1, half))
    return torch.cat([-below.flip(0)[:-1], above]) / above[-1]


@provokes("the shares run to 1")
def normal_levels__end_at_one(p: float, bits: int) -> Tensor:
    half = 2 ** (bits - 1)
    above, below = (Q(torch.linspace(0.5, 1, n, dtype=torch.float64)[:-1]) for n in (half + 2, half + 1))
    return torch.cat([-below.flip(0)[:-1], above]) / above[-1]


@provokes("p belongs to them")
def normal_levels__end_dropped(p: float, bits: int) -> Tensor:
    half = 2 ** (bits - 1)
    above, below = (Q(torch.linspace(0.5, p, n, dtype=torch.float64)[:-1]) for n in (half + 2, half + 1))
    return torch.cat([-below.flip(0)[:-1], above]) / above[-1]


@provokes("float64 is wanted")
def normal_levels__float32(p: float, bits: int) -> Tensor:
    half = 2 ** (bits - 1)
    above, below = (Q(torch.linspace(0.5, p, n, dtype=torch.float64)) for n in (half + 1, half))
    return (torch.cat([-below.flip(0)[:-1], above]) / above[-1]).float()


def _quantized(w: Tensor, levels: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    """What the wrong quantize_blocks share: the nearest levels, by these scales."""
    v = w / (scales + (scales == 0))[..., None]
    return torch.bucketize(v, (levels[:-1] + levels[1:]) / 2).to(torch.uint8), scales


@provokes("not the largest |w|")
def quantize_block__largest_w(w: Tensor, levels: Tensor) -> tuple[Tensor, Tensor]:
    return _quantized(w, levels, w.amax(dim=-1))


@provokes("one scale for all blocks")
def quantize_block__one_scale(w: Tensor, levels: Tensor) -> tuple[Tensor, Tensor]:
    return _quantized(w, levels, w.abs().max().expand(w.shape[:-1]))


@provokes("the standard deviation")
def quantize_block__standard_deviation(w: Tensor, levels: Tensor) -> tuple[Tensor, Tensor]:
    return _quantized(w, levels, w.std(dim=-1))


@provokes("0 / 0 is not a number")
def quantize_block__zeros_forgotten(w: Tensor, levels: Tensor) -> tuple[Tensor, Tensor]:
    scales = w.abs().amax(dim=-1)
    return torch.bucketize(w / scales[..., None], (levels[:-1] + levels[1:]) / 2).to(torch.uint8), scales


@provokes("swallows a small block")
def quantize_block__epsilon(w: Tensor, levels: Tensor) -> tuple[Tensor, Tensor]:
    scales = w.abs().amax(dim=-1)
    return torch.bucketize(w / (scales + 1e-12)[..., None], (levels[:-1] + levels[1:]) / 2).to(torch.uint8), scales


@provokes("NF4's levels, whatever")
def quantize_block__nf4_written_in(w: Tensor, levels: Tensor) -> tuple[Tensor, Tensor]:
    return _quantized(w, LEVELS.to(w.dtype), w.abs().amax(dim=-1))


@provokes("a block of zeros has scale 0")
def quantize_block__scale_one_for_zeros(w: Tensor, levels: Tensor) -> tuple[Tensor, Tensor]:
    scales = w.abs().amax(dim=-1)
    return _quantized(w, levels, torch.where(scales == 0, torch.ones_like(scales), scales))


@provokes("7 is only the usual place")
def quantize_block__zero_is_7(w: Tensor, levels: Tensor) -> tuple[Tensor, Tensor]:
    codes, scales = _quantized(w, levels, w.abs().amax(dim=-1))
    codes[scales == 0] = 7
    return codes, scales


@provokes("with its sign")
def quantize_block__signed_scale(w: Tensor, levels: Tensor) -> tuple[Tensor, Tensor]:
    return _quantized(w, levels, w.gather(-1, w.abs().argmax(dim=-1, keepdim=True)).squeeze(-1))


@provokes("kept a dimension of size 1")
def quantize_block__dimension_kept(w: Tensor, levels: Tensor) -> tuple[Tensor, Tensor]:
    codes, scales = _quantized(w, levels, w.abs().amax(dim=-1))
    return codes, scales[..., None]


@provokes("the level below, not the nearest")
def quantize_block__level_below(w: Tensor, levels: Tensor) -> tuple[Tensor, Tensor]:
    scales = w.abs().amax(dim=-1)
    v = w / (scales + (scales == 0))[..., None]
    return (torch.searchsorted(levels, v, right=True) - 1).clamp_min(0).to(torch.uint8), scales


@provokes("the level above, not the nearest")
def quantize_block__level_above(w: Tensor, levels: Tensor) -> tuple[Tensor, Tensor]:
    scales = w.abs().amax(dim=-1)
    return torch.searchsorted(levels, w / (scales + (scales == 0))[..., None]).to(torch.uint8), scales


@provokes("half-way between two levels the upper one was taken")
def quantize_block__ties_up(w: Tensor, levels: Tensor) -> tuple[Tensor, Tensor]:
    scales = w.abs().amax(dim=-1)
    v = w / (scales + (scales == 0))[..., None]
    return torch.bucketize(v, (levels[:-1] + levels[1:]) / 2, right=True).to(torch.uint8), scales


@provokes("the levels were compared with w itself")
def quantize_block__not_divided(w: Tensor, levels: Tensor) -> tuple[Tensor, Tensor]:
    return torch.bucketize(w, (levels[:-1] + levels[1:]) / 2).to(torch.uint8), w.abs().amax(dim=-1)


@provokes("uint8 is wanted")
def quantize_block__int64(w: Tensor, levels: Tensor) -> tuple[Tensor, Tensor]:
    codes, scales = _quantized(w, levels, w.abs().amax(dim=-1))
    return codes.long(), scales


@provokes("changed its argument w")
def quantize_block__in_the_callers_w(w: Tensor, levels: Tensor) -> tuple[Tensor, Tensor]:
    scales = w.abs().amax(dim=-1)
    w /= (scales + (scales == 0))[..., None]
    return torch.bucketize(w, (levels[:-1] + levels[1:]) / 2).to(torch.uint8), scales


@provokes("the first code is in the low half")
def pack__low_half_first(codes: Tensor) -> Tensor:
    even = torch.cat([codes, codes.new_full((len(codes) % 2,), 7)])
    return even[::2] | even[1::2] << 4


@provokes("is joined by 0")
def pack__filled_with_zero(codes: Tensor) -> Tensor:
    even = F.pad(codes, (0, len(codes) % 2))
    return even[::2] << 4 | even[1::2]


@provokes("the odd one out is lost")
def pack__odd_lost(codes: Tensor) -> Tensor:
    n = len(codes) // 2 * 2
    return codes[:n:2] << 4 | codes[1:n:2]


@provokes("the first half of the codes is packed with the second half")
def pack__halves(codes: Tensor) -> Tensor:
    even = torch.cat([codes, codes.new_full((len(codes) % 2,), 7)])
    return even[:len(even) // 2] << 4 | even[len(even) // 2:]


@provokes("max()")
def pack__none_of_none(codes: Tensor) -> Tensor:
    assert codes.max() < 16
    even = torch.cat([codes, codes.new_full((len(codes) % 2,), 7)])
    return even[::2] << 4 | even[1::2]


@provokes("uint8 is wanted, a byte each")
def pack__int64(codes: Tensor) -> Tensor:
    even = torch.cat([codes, codes.new_full((len(codes) % 2,), 7)]).long()
    return 16 * even[::2] + even[1::2]


@provokes("the low half comes first here")
def unpack__low_half_first(packed: Tensor, n: int) -> Tensor:
    return torch.stack([packed & 15, packed >> 4], dim=1).flatten()[:n]


@provokes("the two of a byte are neighbours")
def unpack__halves(packed: Tensor, n: int) -> Tensor:
    return torch.cat([packed >> 4, packed & 15])[:n]


@provokes("the last half byte is a filler")
def unpack__filler_kept(packed: Tensor, n: int) -> Tensor:
    return torch.stack([packed >> 4, packed & 15], dim=1).flatten()


@provokes("the low half still has the high one above it")
def unpack__not_masked(packed: Tensor, n: int) -> Tensor:
    return torch.stack([packed >> 4, packed], dim=1).flatten()[:n]


@provokes("is not shifted down")
def unpack__not_shifted(packed: Tensor, n: int) -> Tensor:
    return torch.stack([packed & 240, packed & 15], dim=1).flatten()[:n]


@provokes("differ")
def unpack__as_signed_bytes(packed: Tensor, n: int) -> Tensor:
    return torch.stack([packed.view(torch.int8) >> 4, packed.view(torch.int8) & 15], dim=1).flatten()[:n].to(torch.uint8)


@provokes("the scales go round")
def dequantize__scales_go_round(codes: Tensor, scales: Tensor, levels: Tensor, block_size: int) -> Tensor:
    return levels[codes.long()] * scales.repeat(block_size)[torch.arange(len(codes)) % len(scales)]


@provokes("the scales are missing")
def dequantize__no_scales(codes: Tensor, scales: Tensor, levels: Tensor, block_size: int) -> Tensor:
    return levels[codes.long()]


@provokes("the code itself was multiplied")
def dequantize__code_times_scale(codes: Tensor, scales: Tensor, levels: Tensor, block_size: int) -> Tensor:
    return codes * scales.repeat_interleave(block_size)[:len(codes)]


@provokes("were taken for a mask")
def dequantize__as_a_mask(codes: Tensor, scales: Tensor, levels: Tensor, block_size: int) -> Tensor:
    return levels[codes] * scales.repeat_interleave(block_size)[:len(codes)]


@provokes("the last block may be shorter (")
def dequantize__no_short_block(codes: Tensor, scales: Tensor, levels: Tensor, block_size: int) -> Tensor:
    return (levels[codes.long()].view(-1, block_size) * scales[:, None]).flatten()


@provokes("the last block may be shorter: leave out")
def dequantize__padding_kept(codes: Tensor, scales: Tensor, levels: Tensor, block_size: int) -> Tensor:
    return levels[F.pad(codes, (0, -len(codes) % block_size)).long()] * scales.repeat_interleave(block_size)


@provokes("the blocks are made equally long")
def dequantize__equal_blocks(codes: Tensor, scales: Tensor, levels: Tensor, block_size: int) -> Tensor:
    return levels[codes.long()] * scales.repeat_interleave(-(-len(codes) // len(scales)))[:len(codes)]


@provokes("blocks of 64, whatever")
def dequantize__always_64(codes: Tensor, scales: Tensor, levels: Tensor, block_size: int) -> Tensor:
    return levels[codes.long()] * scales.repeat_interleave(64)[:len(codes)]


@provokes("float64, is wanted, got torch.float32")
def dequantize__in_float32(codes: Tensor, scales: Tensor, levels: Tensor, block_size: int) -> Tensor:
    return (levels[codes.long()] * scales.repeat_interleave(block_size)[:len(codes)]).float()


def _doubly(scales: Tensor, table: Tensor, size: int, offset: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What the wrong double_quantizes share: all of it, with this offset."""
    d = scales - offset
    blocks = F.pad(d, (0, -len(d) % size)).view(-1, size)
    absmax = blocks.abs().amax(dim=1)
    v = blocks / (absmax + (absmax == 0))[:, None]
    return torch.bucketize(v, (table[:-1] + table[1:]) / 2).to(torch.uint8).flatten()[:len(d)], absmax, offset


@provokes("no offset is taken off")
def double_quantize__no_offset(scales: Tensor, table: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
    return _doubly(scales, table, size, torch.tensor(0.0))


@provokes("without an epsilon")
def double_quantize__epsilon(scales: Tensor, table: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
    _, absmax, offset = _doubly(scales, table, size, scales.double().mean().float())
    v = (scales - offset) / (absmax + 1e-8).repeat_interleave(size)[:len(scales)]
    return torch.bucketize(v, (table[:-1] + table[1:]) / 2).to(torch.uint8), absmax, offset


@provokes("in float32 the sum is rounded")
def double_quantize__mean_in_float32(scales: Tensor, table: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
    return _doubly(scales, table, size, scales.mean())


@provokes("there is one offset for all of the scales")
def double_quantize__offset_of_each_block(scales: Tensor, table: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
    parts = [_doubly(part, table, size, part.double().mean().float()) for part in scales.split(size)]
    return tuple(join([part[i] for part in parts]) for i, join in enumerate((torch.cat, torch.cat, torch.stack)))


@provokes("the scales themselves were looked up")
def double_quantize__scales_looked_up(scales: Tensor, table: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
    _, absmax, offset = _doubly(scales, table, size, scales.double().mean().float())
    v = scales / (absmax + (absmax == 0)).repeat_interleave(size)[:len(scales)]
    return torch.bucketize(v, (table[:-1] + table[1:]) / 2).to(torch.uint8), absmax, offset


@provokes("one absmax for all blocks")
def double_quantize__one_absmax(scales: Tensor, table: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
    codes, absmax, offset = _doubly(scales, table, len(scales), scales.double().mean().float())
    return codes, absmax.expand(-(-len(scales) // size)), offset


@provokes("and not the largest |d|")
def double_quantize__largest_d(scales: Tensor, table: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
    codes, _, offset = _doubly(scales, table, size, scales.double().mean().float())
    return codes, torch.stack([part.max() for part in (scales - offset).split(size)]), offset


@provokes("0 / 0 is not a number")
def double_quantize__alike_forgotten(scales: Tensor, table: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
    offset = scales.double().mean().float()
    d = scales - offset
    blocks = F.pad(d, (0, -len(d) % size)).view(-1, size)
    absmax = blocks.abs().amax(dim=1)
    return torch.bucketize(blocks / absmax[:, None], (table[:-1] + table[1:]) / 2).to(torch.uint8).flatten()[:len(d)], absmax, offset


@provokes("equal steps, as in int8")
def double_quantize__int8(scales: Tensor, table: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
    _, absmax, offset = _doubly(scales, table, size, scales.double().mean().float())
    v = (scales - offset) / (absmax + (absmax == 0)).repeat_interleave(size)[:len(scales)]
    return ((v + 1) / 2 * (len(table) - 1)).round().to(torch.uint8), absmax, offset


@provokes("is wanted, got (9,)")
def double_quantize__padding_kept(scales: Tensor, table: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
    offset = scales.double().mean().float()
    d = scales - offset
    blocks = F.pad(d, (0, -len(d) % size)).view(-1, size)
    absmax = blocks.abs().amax(dim=1)
    v = blocks / (absmax + (absmax == 0))[:, None]
    return torch.bucketize(v, (table[:-1] + table[1:]) / 2).to(torch.uint8).flatten(), absmax, offset


@provokes("127 is only the usual place")
def double_quantize__zero_is_127(scales: Tensor, table: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
    codes, absmax, offset = _doubly(scales, table, size, scales.double().mean().float())
    codes[(absmax == 0).repeat_interleave(size)[:len(codes)]] = 127
    return codes, absmax, offset


@provokes("are in this mean")
def double_quantize__padded_before_the_mean(scales: Tensor, table: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
    codes, absmax, offset = _doubly(scales, table, size, F.pad(scales, (0, -len(scales) % size)).double().mean().float())
    return codes, absmax, offset


@provokes("fill the last block behind d")
def double_quantize__padded_before_the_offset(scales: Tensor, table: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
    offset = scales.double().mean().float()
    codes, absmax, _ = _doubly(F.pad(scales, (0, -len(scales) % size)), table, size, offset)
    return codes[:len(scales)], absmax, offset


@provokes("the offset has a dimension")
def double_quantize__offset_with_a_dimension(scales: Tensor, table: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
    return _doubly(scales, table, size, scales.double().mean(dim=0, keepdim=True).float())


@provokes("from the mean in float64")
def double_quantize__offset_not_rounded(scales: Tensor, table: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
    codes, absmax, offset = _doubly(scales.double(), table.double(), size, scales.double().mean())
    return codes, absmax.float(), offset.float()


@provokes("the upper one was taken")
def double_quantize__ties_up(scales: Tensor, table: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
    _, absmax, offset = _doubly(scales, table, size, scales.double().mean().float())
    v = (scales - offset) / (absmax + (absmax == 0)).repeat_interleave(size)[:len(scales)]
    return torch.bucketize(v, (table[:-1] + table[1:]) / 2, right=True).to(torch.uint8), absmax, offset
