"""Double quantization against its slow specification, and where a careless one goes wrong."""

import dataclasses

import numpy as np
import pytest
import torch

import minilora as ml
from minilora.quant import spec
from minilora.quant.double import MAP, DoubleQuantized, double_quantize


def scales_like(name, m, seed=0):
    g = torch.Generator().manual_seed(seed)
    return {"normal": lambda: torch.randn(m, 64, generator=g).abs().amax(1), "uniform": lambda: torch.rand(m, generator=g),
            "heavy": lambda: torch.tan(1.57 * torch.rand(m, generator=g)), "equal": lambda: torch.full((m,), 0.3), "zeros": lambda: torch.zeros(m)}[name]()


def test_the_map_is_the_specifications():
    assert MAP.shape == (256,) and np.abs(MAP.numpy() - spec.dynamic_map()).max() < 1e-7 and torch.equal(MAP, MAP.sort().values)
    assert (MAP < 0).sum() == 127 and (MAP > 0).sum() == 128 and MAP[127] == 0 and MAP[-1] == 1
    assert MAP[0].item() == pytest.approx(-0.99297, abs=1e-5) and MAP[128].item() == pytest.approx(5.5e-7, rel=1e-3)


@pytest.mark.parametrize("name", ["normal", "uniform", "heavy", "equal", "zeros"])
@pytest.mark.parametrize("m", [1, 2, 255, 256, 257, 700])
def test_codes_and_scales_are_the_specifications(name, m):
    scales = scales_like(name, m, seed=m)
    ours = double_quantize(scales)
    codes, absmax, offset = spec.quantize_scales(scales.numpy())
    assert ours.offset.item() == pytest.approx(float(offset), rel=2e-7, abs=1e-12) and np.allclose(ours.absmax, absmax, rtol=1e-5, atol=1e-7)
    off = np.abs(ours.codes.numpy().astype(int) - codes)
    assert off.max() <= 1 and (off > 0).mean() <= 0.01                                    # a tie, after another order of rounding
    assert np.allclose(ours.dequantize(), spec.dequantize_scales(codes, absmax, offset), rtol=0.04, atol=float(absmax.max()) * 0.01)


def test_each_code_is_the_nearest():
    scales = scales_like("heavy", 1000)
    ours = double_quantize(scales)
    v = (scales - ours.offset) / ours.absmax.repeat_interleave(256)[:1000]
    assert torch.equal((MAP[ours.codes.int()] - v).abs(), (MAP - v[:, None]).abs().amin(dim=1))


def test_the_error_is_below_one_percent_on_normal_weights():
    w = torch.randn(512, 512, generator=torch.Generator().manual_seed(0))
    dense, double = ml.quantize_nf4(w).scales, ml.quantize_nf4(w, double=True).scales
    assert ((double - dense).abs() / dense).max() < 0.01 and not torch.equal(double, dense)


def test_bits_are_counted_in_what_is_stored():
    Q = ml.quantize_nf4(torch.randn(4096, 4096, generator=torch.Generator().manual_seed(0)), double=True)
    parts = (Q.codes, Q.stored_scales.codes, Q.stored_scales.absmax, Q.stored_scales.offset)
    stored = sum(part.untyped_storage().nbytes() for part in parts)
    assert Q.nbytes == stored and round(Q.bits_per_parameter, 3) == 4.127
    assert Q.bits_per_parameter == pytest.approx(4 + 8 / 64 + 32 / (64 * 256) + 32 / 2**24, abs=1e-12)


def test_what_is_stored_holds_no_padding():
    Q = double_quantize(scales_like("normal", 300))
    assert Q.codes.untyped_storage().nbytes() == 300


@pytest.mark.parametrize("seed", range(20))
def test_no_scale_is_below_zero_so_no_sign_flips(seed):
    """A block near zero beside an outlier: mean off, rounded, mean on, and it can end below 0. Cauchy numbers do it thousands of times."""
    w = torch.tan(3.14159 * (torch.rand(512, 512, generator=torch.Generator().manual_seed(seed)) - 0.5))
    Q = ml.quantize_nf4(w, double=True)
    d = Q.stored_scales
    raw = MAP[d.codes.int()] * d.absmax.repeat_interleave(256) + d.offset
    assert (Q.scales >= 0).all() and (Q.dequantize() * w >= 0).all()
    assert seed or (raw < 0).any()                                                        # the case does occur


def test_a_missing_or_foreign_part_is_refused():
    whole = double_quantize(torch.rand(300))
    for name in ("codes", "absmax", "offset"):
        with pytest.raises(ValueError, match=f"need codes, absmax and offset; {name} is None"):
            dataclasses.replace(whole, **{name: None})
    with pytest.raises(ValueError, match="300 scales in blocks of 256 need uint8 codes, 2 absmax and one offset, got"):
        dataclasses.replace(whole, absmax=whole.absmax[:1])
    with pytest.raises(ValueError, match="got codes of torch.int32"):
        dataclasses.replace(whole, codes=whole.codes.int())


def test_the_offset_does_not_depend_on_how_many_threads_add_it_up():
    scales = scales_like("normal", 200_000)
    threads = torch.get_num_threads()
    try:
        found = []
        for n in (1, 2):
            torch.set_num_threads(n)
            found.append(double_quantize(scales))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(found[0].offset, found[1].offset) and torch.equal(found[0].codes, found[1].codes)
    assert isinstance(found[0], DoubleQuantized)
