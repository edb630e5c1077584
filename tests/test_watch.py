"""Loops of one's own: the one in Method's docstring runs every method; where a line is missing, or no gradient arrives, it is said."""

import copy
import textwrap
from contextlib import suppress
from warnings import catch_warnings, simplefilter

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import minilora as ml
from minilora.safety.watch import BY_HAND, LINES

METHODS = {
    "full": ml.FullFineTuning(), "LoRA": ml.LoRA(2), "LoRA+": ml.LoRAPlus(2, ratio=4), "LoRA-FA": ml.LoRAFA(2, projection=True), "VeRA": ml.VeRA(4),
    "Delta-LoRA": ml.DeltaLoRA(2, start_step=1), "LoRA-drop": ml.LoRADrop(2, warmup_steps=2, threshold=0.5), "AdaLoRA": ml.AdaLoRA(3, 1, total_steps=5),
    "DoRA": ml.DoRA(2), "PiSSA": ml.PiSSA(2), "QLoRA": ml.QLoRA(2, dropout=0.0), "LoftQ": ml.LoftQ(2), "QPiSSA": ml.QPiSSA(2),
}
LOOP = textwrap.dedent(ml.Method.__doc__.split("the loss:\n\n")[1].split("\n\n")[0])


def batches(step):
    x = torch.randn(16, 6, generator=torch.Generator().manual_seed(step))
    return x, x[:, :4] * x[:, 1:5]


def loss_fn(model, x, y):
    return F.mse_loss(model(x), y)


def model(method):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 9), nn.Tanh(), nn.Linear(9, 4))
    return ml.adapt(net, method, None if method.trains_base else ["0", "2", "4"])


def run(method, loop=LOOP, net=None, steps=5):
    net = net or model(method)
    exec(loop, {"torch": torch, "model": net, "method": method, "batches": batches, "loss_fn": loss_fn, "lr": 0.01, "steps": steps})
    return net


@pytest.mark.parametrize("name", METHODS)
def test_the_loop_in_the_docstring_trains_every_method_as_finetune_does(name):
    assert len(LOOP.splitlines()) == 8 and all(f"method.{hook}(" in LOOP for hook in LINES)
    ours, theirs = model(METHODS[name]), model(METHODS[name])
    run(METHODS[name], net=ours)
    ml.finetune(theirs, METHODS[name], batches, 5, 0.01, loss_fn=loss_fn, weight_decay=0.0, progress=False)
    assert all(torch.equal(tensor, theirs.state_dict()[key]) for key, tensor in ours.state_dict().items())
    assert not name == "AdaLoRA" or sum(int(layer.kept.sum()) for _, layer in ml.adapters(ours)) == 3


def without(line):
    """The loop without that hook."""
    changed = {"penalty": (" + method.penalty(model)", ""), "parameter_groups": ("method.parameter_groups(model, lr)", "[p for p in model.parameters() if p.requires_grad]")}
    old, new = changed.get(line, (next(row for row in LOOP.splitlines() if f"method.{line}(" in row), ""))
    assert old in LOOP
    return LOOP.replace(old, new)


NEEDED = [("Delta-LoRA", "before_step"), ("LoRA-drop", "prepare"), ("AdaLoRA", "after_step"), ("AdaLoRA", "penalty"), ("LoRA+", "parameter_groups"),
          ("LoRA-FA", "before_step")]


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("name, line", NEEDED)
def test_a_missing_line_is_named_at_the_second_step(name, line, mode):
    method = METHODS[name]
    net = getattr(model(method), mode)()
    run(method, without(line), net, steps=1)
    said = f"{type(method).__name__} is trained without .*method.{line}"
    with pytest.warns(UserWarning, match=f"{said}.*written that line by hand") if line in BY_HAND else pytest.raises(ValueError, match=said):
        run(method, without(line), net, steps=1)


@pytest.mark.parametrize("name", METHODS)
def test_a_line_that_the_method_does_not_need_may_be_missing(name):
    for line in LINES:
        if (name, line) not in NEEDED:
            run(METHODS[name], without(line))


def test_a_bare_loop_names_what_comes_first():
    bare = "\n".join(["optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)", "for step in range(3):",
                      "    loss_fn(model, *batches(step)).backward()", "    optimizer.step()", "    optimizer.zero_grad()"])
    run(ml.LoRA(2), bare), run(ml.LoRAFA(2), bare), run(ml.PiSSA(2), bare)
    for name, line in NEEDED:
        said = f"{type(METHODS[name]).__name__} is trained without .*method.{line}"
        if line in BY_HAND:
            with pytest.warns(UserWarning, match=said), suppress(ValueError):         # AdaLoRA lacks after_step as well
                run(METHODS[name], bare)
        else:
            with pytest.raises(ValueError, match=said), catch_warnings():
                simplefilter("ignore")
                run(METHODS[name], bare)


@pytest.mark.parametrize("set_to_none", [True, False])
def test_adalora_after_zero_grad_has_nothing_to_judge_by(set_to_none):
    lines = LOOP.splitlines()
    lines[-1], lines[-2] = lines[-2], lines[-1].replace("()", f"(set_to_none={set_to_none})")
    with pytest.raises(ValueError, match="AdaLoRA has seen no gradient.*method.after_step.*before the gradients are cleared"):
        run(METHODS["AdaLoRA"], "\n".join(lines))


@pytest.mark.parametrize("name", [name for name in METHODS if name != "full"])
def test_before_step_after_zero_grad_is_named(name):
    lines = LOOP.splitlines()
    lines.insert(4, "    optimizer.zero_grad()")
    with pytest.raises(ValueError, match="no adapter has a gradient. A loop has method.before_step"):
        run(METHODS[name], "\n".join(lines))


@pytest.mark.parametrize("name", ["Delta-LoRA", "LoRA-drop"])
def test_what_was_loaded_or_copied_is_trained_on(name, tmp_path):
    net = run(METHODS[name])
    run(METHODS[name], net=copy.deepcopy(net))
    ml.save_adapter(net, tmp_path)
    torch.manual_seed(0)
    fresh = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 9), nn.Tanh(), nn.Linear(9, 4))
    run(METHODS[name], without("prepare"), ml.load_adapter(fresh, tmp_path, trainable=True))


# After the first backward every adapter has a gradient.

class Net(nn.Module):
    """Four equal blocks; `call` says how block i is used."""

    def __init__(self, call):
        super().__init__()
        torch.manual_seed(0)
        self.read, self.blocks, self.call = nn.Linear(6, 6), nn.ModuleList(nn.Linear(6, 6) for _ in range(4)), call

    def forward(self, x):
        x = self.read(x)
        for i, block in enumerate(self.blocks):
            x = torch.tanh(self.call(i, block, x))
        return x[:, :4]


def plain(i, block, x):
    return block(x)


def past(i, block, x):
    return F.linear(x, block.weight, block.bias) if i == 2 else block(x)


def detached(i, block, x):
    return block(x).detach() if i == 1 else block(x)


def reentrant(i, block, x):
    return checkpoint(block, x, use_reentrant=True) if i == 0 else block(x)


def all_reentrant(i, block, x):
    return checkpoint(block, x, use_reentrant=True)


def unrecorded(i, block, x):
    with torch.set_grad_enabled(i != 3):
        return block(x)


WRONG = {past: r"blocks.\*: the model reads .weight past the adapter", detached: r"blocks.\*: called, but where no gradient", reentrant: "use_reentrant=False",
         all_reentrant: "no adapter has a gradient.*use_reentrant=False", unrecorded: r"torch.no_grad\(\)"}


@pytest.mark.parametrize("method", [ml.LoRA(2), ml.AdaLoRA(3, 1), ml.VeRA(4), ml.QLoRA(2), ml.LoRAFA(2)], ids=lambda method: type(method).__name__)
@pytest.mark.parametrize("call", WRONG, ids=lambda call: call.__name__)
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_an_adapter_that_no_gradient_reaches_is_named_with_the_reason(call, method):
    with pytest.raises(ValueError, match=WRONG[call]):
        ml.finetune(Net(call), method, batches, 5, 0.01, loss_fn=loss_fn, progress=False)


class TwoKinds(Net):
    def __init__(self):
        super().__init__(plain)
        self.unused = nn.ModuleList(nn.Linear(6, 6) for _ in range(2))


def test_a_part_that_the_loss_does_not_depend_on_is_named():
    with pytest.raises(ValueError, match=r"these adapters have no gradient: unused.\*: nothing has called them"):
        ml.finetune(TwoKinds(), ml.LoRA(2), batches, 5, 0.01, loss_fn=loss_fn, progress=False)
    ml.finetune(TwoKinds(), ml.LoRA(2), batches, 5, 0.01, loss_fn=loss_fn, targets=["blocks.0", "blocks.1"], progress=False)


@pytest.mark.parametrize("method", [ml.LoRA(2), ml.AdaLoRA(3, 1), ml.LoRADrop(2, warmup_steps=3)], ids=lambda method: type(method).__name__)
def test_an_expert_without_tokens_in_the_first_batch_is_let_be(method):
    """One block is left out at each training step, another each time; evaluation calls all of them before the first step."""
    def left_out(i, block, x):
        net.calls += i == 0
        assert net.step < 2 or block.weight is not None                               # looked at later on, which is no fault either
        return x if net.training and i == 1 + net.calls % 3 else block(x)

    def noting(step):
        net.step = step
        return batches(step)

    net = ml.adapt(Net(left_out), method)
    for _ in range(2):                                                                # and in a second run on the same model
        net.calls = net.step = 0
        ml.finetune(net, method, noting, 6, 0.01, loss_fn=loss_fn, progress=False, evaluate=lambda net: loss_fn(net, *batches(9)).item(), evaluate_every=2)
    assert isinstance(method, ml.AdaLoRA) or all(layer.B.any() for _, layer in ml.adapters(net))


def test_frozen_adapters_and_ordinary_checkpointing_are_no_fault():
    net = ml.adapt(Net(lambda i, block, x: checkpoint(block, x, use_reentrant=False)), ml.LoRA(2))
    for p in net.blocks[3].parameters():
        p.requires_grad_(False)
    ml.finetune(net, ml.LoRA(2), batches, 3, 0.01, loss_fn=loss_fn, progress=False)
    assert net.blocks[0].B.any() and not net.blocks[3].B.any()


def test_a_subclass_that_writes_a_hook_anew_is_believed():
    class Mine(ml.DeltaLoRA):
        def before_step(self, model, step):
            pass

    run(Mine(2))
    with pytest.raises(ValueError, match="Inherits is trained without method.before_step"):
        run(type("Inherits", (ml.DeltaLoRA,), {})(2), without("before_step"))


def test_a_hook_may_be_called_by_hand_before_anything_has_run():
    net = ml.adapt(Net(past), ml.DeltaLoRA(2))
    ml.DeltaLoRA(2).before_step(net, 0)
    assert all(layer.started for _, layer in ml.adapters(net))
    loss_fn(net, *batches(0)).backward()
    with pytest.raises(ValueError, match="reads .weight past the adapter"):           # and it has settled nothing
        ml.DeltaLoRA(2).before_step(net, 0)


def test_the_check_can_be_called_by_hand():
    net = ml.adapt(Net(past), ml.LoRA(2))
    loss_fn(net, *batches(0)).backward()
    with pytest.raises(ValueError, match="reads .weight past the adapter"):
        ml.check_gradients(net)
    with pytest.raises(ValueError, match="reads .weight past the adapter"):           # and again: nothing was settled
        ml.check_gradients(net)
    net = ml.adapt(Net(plain), ml.LoRA(2))
    loss_fn(net, *batches(0)).backward()
    ml.check_gradients(net)
