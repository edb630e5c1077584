"""What survives a merge: against the same done by hand, and the shares that the course prints."""

import pytest
import torch

import minilora as ml
from minilora import plots

FLOATS = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def pair(ratio=1e-3, shape=(512, 512), seed=0):
    """W normal, and dW normal with ‖dW‖ = ratio · ‖W‖."""
    g = torch.Generator().manual_seed(seed)
    W, dW = torch.randn(shape, generator=g), torch.randn(shape, generator=g)
    return W, dW * (ratio * W.norm() / dW.norm())


@pytest.mark.parametrize("into, unmoved", [("float32", 0.0), ("float16", 0.215), ("bfloat16", 0.775), ("nf4", 0.9995)])
def test_a_thousandth_of_w(into, unmoved):
    found = ml.merge_autopsy(*pair(), into)
    assert found.unmoved == pytest.approx(unmoved, abs=0.01) and found.survives == 1 - found.unmoved
    assert (found.error < 1e-3) == (into == "float32")


@pytest.mark.parametrize("into", FLOATS)
@pytest.mark.parametrize("ratio", [1e-4, 1e-2])
def test_floats_by_hand(into, ratio):
    W, dW = pair(ratio, (60, 80))
    base = W.to(FLOATS[into])
    merged = (base.double() + dW.double()).to(FLOATS[into])
    found = ml.merge_autopsy(W, dW, into)
    assert found.unmoved == (merged == base).double().mean().item()
    assert found.error == pytest.approx(((merged.double() - base.double() - dW.double()).norm() / dW.double().norm()).item())


def test_four_bits_by_hand():
    W, dW = pair(0.1, (60, 80))
    base = ml.quantize_nf4(W, 32)
    merged = ml.quantize_nf4(base.dequantize() + dW, 32)
    codes = [torch.stack([Q.codes >> 4, Q.codes & 15], dim=1).flatten() for Q in (base, merged)]
    found = ml.merge_autopsy(W, dW, "nf4", block_size=32)
    assert found.unmoved == pytest.approx((codes[0] == codes[1]).double().mean().item(), abs=2e-4)
    assert found.error == pytest.approx(((merged.dequantize() - base.dequantize() - dW).norm() / dW.norm()).item(), rel=1e-3)


def test_small_updates_are_lost_and_large_ones_survive():
    for into in ("float16", "bfloat16", "nf4"):
        shares = [ml.merge_autopsy(*pair(ratio), into).survives for ratio in (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)]
        assert shares == sorted(shares) and shares[0] < 0.05 and shares[-1] > (0.7 if into == "nf4" else 0.99)


def test_weights_that_have_no_update_do_not_count():
    W, dW = pair(1e-2)
    dW[:256] = 0
    assert ml.merge_autopsy(W, dW, "float32").unmoved < 1e-3
    assert ml.merge_autopsy(W, dW, "bfloat16").unmoved == pytest.approx(ml.merge_autopsy(W[256:], dW[256:], "bfloat16").unmoved)


def test_neither_is_changed_and_a_real_adapter_goes_in():
    W, dW = pair()
    kept = W.clone(), dW.clone()
    ml.merge_autopsy(W, dW, "nf4")
    assert torch.equal(W, kept[0]) and torch.equal(dW, kept[1])
    layer = ml.LoRA(4).layer(torch.nn.Linear(72, 48))
    torch.nn.init.normal_(layer.B)
    assert 0 < ml.merge_autopsy(layer.weight, layer.delta_weight()).survives <= 1


@pytest.mark.parametrize("arguments, message", [
    ((torch.ones(3, 4), torch.ones(4, 3)), r"one shape, got \(3, 4\) and \(4, 3\)"), ((torch.ones(3), torch.zeros(3)), "dW is 0 everywhere"),
    ((torch.ones(3), torch.ones(3), "int8"), "into must be one of float32, float16, bfloat16, nf4, got 'int8'"),
    ((torch.ones(3), torch.full((3,), float("nan"))), "not finite"), ((torch.full((3,), float("inf")), torch.ones(3)), "not finite"),
    ((torch.full((3,), 1e5), torch.ones(3), "float16"), "overflows float16"),
])
def test_bad_input_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        ml.merge_autopsy(*arguments)


def test_survival_over_dtype_base_and_length():
    W, dW = pair(1.0)
    shares = ml.survival(W, dW, [1e-5, 1e-3, 1.0])
    assert {*shares} == {(base, into) for base in ("dense", "nf4") for into in ("float32", "float16", "bfloat16", "nf4")} - {("dense", "nf4")}
    for into in FLOATS:
        assert shares["dense", into][1] == pytest.approx(ml.merge_autopsy(W, 1e-3 * dW, into).survives, abs=1e-4)
        assert shares["nf4", into][1] == pytest.approx(ml.merge_autopsy(ml.quantize_nf4(W).dequantize(), 1e-3 * dW, into).survives, abs=1e-4)
    zeros = (ml.quantize_nf4(W).dequantize() == 0).double().mean().item()             # to 0 anything can be added
    assert shares["nf4", "bfloat16"][0] == pytest.approx(zeros, abs=2e-3) and zeros == pytest.approx(0.088, abs=2e-3) and shares["dense", "bfloat16"][0] < 0.005
    assert shares["nf4", "nf4"][0] < 1e-3 and shares["nf4", "nf4"][2] > 0.8
    with pytest.raises(ValueError, match="nothing to merge"):
        ml.survival(W, 0 * dW, [1e-3])


def test_the_picture_shows_every_line():
    W, dW = pair(1.0, (64, 64))
    ratios = [1e-5, 1e-3, 1e-1]
    axes = plots.merge_survival(ratios, ml.survival(W, dW, ratios)).axes[0]
    assert len([line for line in axes.lines if len(line.get_xdata()) == 3]) == len(axes.get_legend().texts) == 7
