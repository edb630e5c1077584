"""Every method with state of its own, stopped in process and gone on with: the same bits as a run that was never stopped."""

import pytest
import torch

import minilora as ml
from minilora.methods.lora_drop import share_pairs

BATCHES = ml.data.world().batches(2, 31, seed=3)
METHODS = {
    "LoRA+": ml.LoRAPlus(3, alpha=5, dropout=0.2),
    "LoRA-FA": ml.LoRAFA(3, alpha=5, projection=True, dropout=0.2),
    "VeRA": ml.VeRA(10, dropout=0.2),
    "Delta-LoRA": ml.DeltaLoRA(3, alpha=5, start_step=6),
    "LoRA-drop": ml.LoRADrop(3, alpha=5, threshold=0.3, warmup_steps=2, dropout=0.2),
    "AdaLoRA": ml.AdaLoRA(4, 2, alpha=5, warmup_steps=2, final_steps=3, interval=2, dropout=0.2),
    "DoRA": ml.DoRA(3, alpha=5, dropout=0.2),
    "PiSSA": ml.PiSSA(3, alpha=5, dropout=0.2),
}
EVERY = pytest.mark.parametrize("name", METHODS)


def small():
    torch.manual_seed(0)
    return ml.TinyGPT(ml.GPTConfig(context=32, width=16, layers=3, heads=2))


def run(model, method, batches=BATCHES, **options):
    return ml.finetune(model, method, batches, 12, 0.02, targets=["q_proj", "down_proj"], weight_decay=0.01, schedule="cosine", warmup=3, progress=False, **options)


def stopping(at, calls_before=0):
    """Stop when the step `at` of training asks for its batch (LoRA-drop has asked before, for its warm-up)."""
    asked = []

    def batches(step):
        asked.append(step)
        if step == at and len(asked) > calls_before:
            raise KeyboardInterrupt
        return BATCHES(step)

    return batches


def equal(one, other):
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


@EVERY
def test_stopped_again_and_again_it_ends_bit_identical(name, tmp_path, capsys):
    method, straight, again, printed = METHODS[name], small(), small(), ""
    expected = run(straight, method)
    for at in (0, 1, 5, 6, 7, 9, 11):                    # before, at and after Delta-LoRA's start, AdaLoRA's cuts and its last one
        with pytest.raises(KeyboardInterrupt):
            run(small(), method, stopping(at, 4 if name == "LoRA-drop" and at == 0 else 0), checkpoint=tmp_path / "c.pt")
        assert capsys.readouterr().out == printed
        printed = f"resumed at step {at}\n"
    assert run(again, method, checkpoint=tmp_path / "c.pt") == expected and equal(again, straight)
    assert capsys.readouterr().out == printed
    for (_, one), (_, other) in zip(ml.adapters(again), ml.adapters(straight)):
        assert one.method == other.method and repr(one.method) == repr(other.method)


@pytest.mark.parametrize("name", ["LoRA-FA", "Delta-LoRA", "AdaLoRA"])
def test_accumulated_and_clipped_it_ends_bit_identical_too(name, tmp_path, capsys):
    """Stopped in the second of the three batches that a step reads."""
    method, straight, again = METHODS[name], small(), small()
    expected = run(straight, method, accumulate=3, clip=0.02)
    assert expected != run(small(), method, accumulate=3) and expected != run(small(), method, clip=0.02)
    for at in (10, 22):
        with pytest.raises(KeyboardInterrupt):
            run(small(), method, stopping(at), accumulate=3, clip=0.02, checkpoint=tmp_path / "c.pt")
    assert run(again, method, accumulate=3, clip=0.02, checkpoint=tmp_path / "c.pt") == expected and equal(again, straight)
    assert "resumed at step 7\n" in capsys.readouterr().out


@EVERY
def test_a_model_that_was_adapted_by_hand_gets_its_frozen_parts_from_the_checkpoint_too(name, tmp_path):
    """Another process starts from other random numbers: LoRA-FA's A, which is not trained, must be the old one all the same."""
    method = METHODS[name]

    def by_hand(seed):
        model = small()
        torch.manual_seed(seed)
        return ml.adapt(model, method, ["q_proj", "down_proj"])

    straight, again = by_hand(1), by_hand(2)
    expected = run(straight, method)
    with pytest.raises(KeyboardInterrupt):
        run(by_hand(1), method, stopping(7, 4 if name == "LoRA-drop" else 0), checkpoint=tmp_path / "c.pt")
    assert run(again, method, checkpoint=tmp_path / "c.pt") == expected and equal(again, straight)


def test_lora_drops_other_choice_is_refused_and_the_model_left_alone(tmp_path):
    method = METHODS["LoRA-drop"]
    with pytest.raises(KeyboardInterrupt):
        run(small(), method, stopping(7, 4), checkpoint=tmp_path / "c.pt")
    written = (tmp_path / "c.pt").read_bytes()
    other = ml.adapt(small(), method, ["q_proj", "down_proj"])
    share_pairs(dict(ml.adapters(other)), set())
    before = {key: tensor.clone() for key, tensor in other.state_dict().items()}
    with pytest.raises(ValueError, match="c.pt: a checkpoint of a run whose layers shared other tensors .*remove it to start over"):
        run(other, method, checkpoint=tmp_path / "c.pt")
    assert all(torch.equal(tensor, before[key]) for key, tensor in other.state_dict().items())
    assert (tmp_path / "c.pt").read_bytes() == written


def test_a_fully_fine_tuned_model_goes_on_as_one_of_its_own_sizes_only(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        ml.finetune(small(), ml.FullFineTuning(), stopping(3), 12, 0.02, checkpoint=tmp_path / "run.pt", progress=False)
    before = (tmp_path / "run.pt").read_bytes()
    wider = ml.TinyGPT(ml.GPTConfig(context=32, width=24, layers=3, heads=2))
    with pytest.raises(ValueError, match=r"a run on another model: its .+ is \(\d+, 16\), here it is \(\d+, 24\); .*--force"):
        ml.finetune(wider, ml.FullFineTuning(), BATCHES, 12, 0.02, checkpoint=tmp_path / "run.pt", progress=False)
    assert (tmp_path / "run.pt").read_bytes() == before


def test_a_fully_fine_tuned_model_goes_on_from_what_it_began_with_or_from_where_it_stopped(tmp_path):
    """Its own weights cannot be the fingerprint, for they move; another model of the same sizes is told by what the run began with."""
    def train(model, batches=BATCHES, **options):
        return ml.finetune(model, ml.FullFineTuning(), batches, 12, 0.02, progress=False, **options)

    straight, stopped, again = small(), small(), small()
    expected, checkpoint = train(straight), tmp_path / "run.pt"
    for model, last in ((stopped, 3), (small(), 6)):                   # stopped, gone on with by a fresh one, and stopped once more
        with pytest.raises(KeyboardInterrupt):
            train(model, stopping(last), checkpoint=checkpoint)
    before = checkpoint.read_bytes()
    other = small()
    with torch.no_grad():
        next(other.parameters())[0, 0] += 1e-3
    for wrong in (other, stopped):                                     # `stopped` is where the run stood at step 3, and the checkpoint is of step 6
        weights = {key: tensor.clone() for key, tensor in wrong.state_dict().items()}
        with pytest.raises(ValueError, match="run.pt: a checkpoint of a run on another model: this one is neither what it began with"):
            train(wrong, checkpoint=checkpoint)
        assert all(torch.equal(tensor, weights[key]) for key, tensor in wrong.state_dict().items()) and checkpoint.read_bytes() == before
    assert train(again, checkpoint=checkpoint) == expected and equal(again, straight)


def test_a_stopped_model_that_is_still_in_memory_goes_on(tmp_path):
    """And is stopped again; then either it or a fresh one goes on, for the run began as it began."""
    straight, model, fresh = small(), small(), small()
    expected = ml.finetune(straight, ml.FullFineTuning(), BATCHES, 12, 0.02, progress=False)
    for last in (5, 8):
        with pytest.raises(KeyboardInterrupt):
            ml.finetune(model, ml.FullFineTuning(), stopping(last), 12, 0.02, checkpoint=tmp_path / "run.pt", progress=False)
    written = (tmp_path / "run.pt").read_bytes()
    for again in (model, fresh):
        (tmp_path / "run.pt").write_bytes(written)
        assert ml.finetune(again, ml.FullFineTuning(), BATCHES, 12, 0.02, checkpoint=tmp_path / "run.pt", progress=False) == expected and equal(again, straight)


def test_a_checkpoint_in_which_more_was_trained_is_refused(tmp_path):
    """A norm was trained along by hand, and now it is not: the optimizer's state would go to the wrong tensors."""
    models = [ml.adapt(small(), ml.LoRA(3), ["q_proj", "down_proj"]) for _ in range(2)]
    norm = next(name for name, _ in models[0].named_parameters() if "norm" in name)
    models[0].get_parameter(norm).requires_grad_(True)
    with pytest.raises(KeyboardInterrupt):
        run(models[0], ml.LoRA(3), stopping(4), checkpoint=tmp_path / "c.pt")
    before = {key: tensor.clone() for key, tensor in models[1].state_dict().items()}
    with pytest.raises(ValueError, match=f"trained other tensors .{norm}.; remove it to start over"):
        run(models[1], ml.LoRA(3), checkpoint=tmp_path / "c.pt")
    assert all(torch.equal(tensor, before[key]) for key, tensor in models[1].state_dict().items())


@pytest.mark.parametrize("one, other", [
    (ml.DeltaLoRA(3, start_step=6), ml.DeltaLoRA(3, start_step=5)), (ml.LoRAPlus(3), ml.LoRA(3)), (ml.LoRAFA(3), ml.LoRAFA(3, projection=True)),
    (ml.VeRA(10), ml.VeRA(10, seed=1)), (ml.AdaLoRA(4, 2), ml.AdaLoRA(4, 2, total_steps=11)), (ml.DoRA(3), ml.PiSSA(3)),
])
def test_a_checkpoint_of_another_method_is_refused(one, other, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run(small(), one, stopping(4), checkpoint=tmp_path / "c.pt")
    model = small()
    with pytest.raises(ValueError, match="whose method was"):
        run(model, other, checkpoint=tmp_path / "c.pt")
    assert not list(ml.adapters(model)) and all(p.requires_grad for p in model.parameters())
