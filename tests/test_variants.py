"""The variants at their edges: other people's layers beside them, mixed precision, a warm-up that must leave no trace, odd schedules, and
Delta-LoRA, LoRA-FA and AdaLoRA once more against formulas written out here. What each layer computes is proved in test_methods.py."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import minilora as ml
from minilora.methods.lora_drop import share_pairs

METHODS = {
    "LoRA": ml.LoRA(3, alpha=5),
    "LoRA+": ml.LoRAPlus(3, alpha=5),
    "LoRA-FA": ml.LoRAFA(3, alpha=5, projection=True),
    "VeRA": ml.VeRA(10, d_initial=0.3),
    "Delta-LoRA": ml.DeltaLoRA(3, alpha=5, delta_ratio=1.7, start_step=1),
    "LoRA-drop": ml.LoRADrop(3, alpha=5, threshold=0.4, warmup_steps=2),
    "AdaLoRA": ml.AdaLoRA(3, 2, alpha=5),
    "rsLoRA": ml.LoRA(3, alpha=5, rslora=True),
    "DoRA": ml.DoRA(3, alpha=5),
    "PiSSA": ml.PiSSA(3, alpha=5),
}
EVERY = pytest.mark.parametrize("name", METHODS)


def mse(model, x, y):
    return F.mse_loss(model(x), y)


def train(model, method, batches, steps, **options):
    return ml.finetune(model, method, batches, steps, **{"lr": 0.02, "loss_fn": mse, "progress": False} | options)


def same(state, before):
    return state.keys() == before.keys() and all(torch.equal(tensor, before[name]) for name, tensor in state.items())


def perceptron():
    """Layers of different shapes, and a norm with running means between them."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 5))


def regression(step):
    dice = torch.Generator().manual_seed(step)
    return torch.randn(16, 6, generator=dice), torch.randn(16, 5, generator=dice)


def deep(layers=3):
    torch.manual_seed(0)
    model = ml.TinyGPT(ml.GPTConfig(context=16, width=16, layers=layers, heads=2))
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.25)
    return model


def text(step):
    ids = torch.randint(256, (2, 13), generator=torch.Generator().manual_seed(step))
    return ids[:, :-1], ids[:, 1:]


@EVERY
@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
def test_under_autocast_an_adapter_answers_in_the_dtype_that_its_base_would(name, base, bias):
    """Or a model of which one part is adapted meets two dtypes where it had one."""
    torch.manual_seed(0)
    layer = METHODS[name].wrap({"it": nn.Linear(7, 5, bias=bias, dtype=base).requires_grad_(False)})["it"]
    for given in (torch.float32, torch.bfloat16):
        x = torch.randn(4, 7).to(given)
        with torch.autocast("cpu", torch.bfloat16):
            assert layer(x).dtype == layer.base(x).dtype == torch.bfloat16


@EVERY
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_packed_and_padded_batches_say_the_same_in_a_transformer_encoder(name, wake):
    """The packing is nn.TransformerEncoder's own; the test sees to it that it took place."""
    torch.manual_seed(0)
    block = nn.TransformerEncoderLayer(24, 2, 40, batch_first=True, dropout=0.0)
    packed, padded = (nn.TransformerEncoder(copy.deepcopy(block), 2, enable_nested_tensor=nested) for nested in (True, False))
    padded.load_state_dict(packed.state_dict())
    x, mask = torch.randn(3, 6, 24), torch.tensor([[False] * 6, [False] * 4 + [True] * 2, [False] * 3 + [True] * 3])
    plain = padded.eval()(x, src_key_padding_mask=mask)[~mask]
    seen, said = [], []
    for encoder in (packed, padded):
        wake(ml.adapt(encoder, METHODS[name], ["linear1", "linear2"])).eval()
        for _, layer in ml.adapters(encoder):
            layer.base.register_forward_pre_hook(lambda _, given: seen.append(given[0].is_nested))
            if name == "Delta-LoRA":
                layer.started.fill_(True)
        with torch.no_grad():
            said.append(encoder(x, src_key_padding_mask=mask)[~mask])
    assert seen == [True] * 4 + [False] * 4 and torch.allclose(*said, rtol=0, atol=1e-5) and (said[0] - plain).abs().max() > 0.01


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_lora_drop_hears_layers_that_are_given_packed_batches_too():
    torch.manual_seed(0)
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(24, 2, 40, batch_first=True, dropout=0.0), 3, enable_nested_tensor=True)
    x, mask = torch.randn(3, 6, 24), torch.tensor([[False] * 6, [False] * 4 + [True] * 2, [False] * 3 + [True] * 3])
    loss_fn = lambda model, x, mask: model(x, src_key_padding_mask=mask)[~mask].square().mean()
    method = ml.LoRADrop(3, alpha=5, warmup_steps=2)
    ml.adapt(encoder, method, ["linear1"])
    for _, layer in ml.adapters(encoder):
        nn.init.normal_(layer.B)
    found, wanted = method.judge(encoder.eval(), lambda step: (x, mask), loss_fn), dict.fromkeys(dict(ml.adapters(encoder)), 0.0)
    encoder.use_nested_tensor = False

    def note(name, layer):                                                # over the tokens that are no padding, of both batches
        def hook(_, given):
            wanted[name] += 2 * (given[0][~mask] @ layer.delta_weight().T).square().sum().item()
        return hook

    for name, layer in ml.adapters(encoder):
        layer.base.register_forward_pre_hook(note(name, layer))
    encoder(x, src_key_padding_mask=mask)
    assert found == pytest.approx(wanted, rel=1e-5) and min(wanted.values()) > 1


@pytest.mark.parametrize("name", ["LoRA", "LoRA-drop"])
def test_a_stopped_run_ends_bit_identical_beside_a_norm_with_running_means(name, tmp_path, capsys):
    """The base has buffers too: training moves a BatchNorm's, and what is read in evaluation must not depend on a stop."""
    def stopping(step):
        seen.append(step)
        if step == 3 and len(seen) > (4 if name == "LoRA-drop" else 0):
            raise KeyboardInterrupt
        return regression(step)

    straight, again, seen = perceptron(), perceptron(), []
    expected = train(straight, METHODS[name], regression, 6)
    with pytest.raises(KeyboardInterrupt):
        train(perceptron(), METHODS[name], stopping, 6, checkpoint=tmp_path / "c.pt")
    assert train(again, METHODS[name], regression, 6, checkpoint=tmp_path / "c.pt") == expected
    assert capsys.readouterr().out == "resumed at step 3\n" and same(again.state_dict(), straight.state_dict())


@pytest.mark.parametrize("make, says", [
    (lambda: ml.adapt(deep(), ml.VeRA(3, seed=2**64)), "seed"), (lambda: ml.LoRA(3, alpha=10**400), "alpha"),
], ids=["seed", "alpha"])
def test_numbers_too_large_to_be_numbers_are_refused_by_name(make, says):
    with pytest.raises(ValueError, match=says):
        make()


@EVERY
@pytest.mark.parametrize("wrong", ["conv", "embedding", "norm"])
def test_finetune_leaves_a_half_frozen_model_as_it_was_where_a_target_is_no_linear(name, wrong):
    model = nn.ModuleDict({"conv": nn.Conv1d(6, 6, 3), "embedding": nn.Embedding(9, 6), "norm": nn.LayerNorm(6), "read": nn.Linear(6, 5), "head": nn.Linear(5, 4)})
    model.norm.requires_grad_(False)
    before, flags, kinds = copy.deepcopy(model.state_dict()), [p.requires_grad for p in model.parameters()], [type(m) for m in model.modules()]
    with pytest.raises(ValueError, match=f"no Linear matches '{wrong}'; this model has read, head"):
        train(model, METHODS[name], regression, 3, targets=["read", wrong])
    assert same(model.state_dict(), before) and [p.requires_grad for p in model.parameters()] == flags and [type(m) for m in model.modules()] == kinds
    assert False in flags and True in flags


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-9), (torch.float32, 1e-3)])
@pytest.mark.parametrize("dependent", ["a copy", "a sum", "a zero"])
def test_where_rows_of_a_depend_on_each_other_the_projection_is_onto_what_they_span(dtype, tolerance, dependent):
    torch.manual_seed(0)
    method = ml.LoRAFA(4, alpha=6, projection=True)
    model = ml.adapt(nn.Sequential(nn.Linear(70, 50).to(dtype)), method, ["0"])
    layer, x, upstream = model[0], torch.randn(11, 70, dtype=dtype), torch.randn(11, 50, dtype=dtype)
    with torch.no_grad():
        layer.A[3] = {"a copy": layer.A[0], "a sum": layer.A[:3].sum(0), "a zero": 0 * layer.A[0]}[dependent]
        layer.B.normal_()
    model(x).backward(upstream)
    method.before_step(model, 0)
    span = torch.linalg.qr(layer.A[:3].double().T).Q                                       # (in, 3), orthonormal
    G = upstream.double().T @ x.double()
    assert torch.allclose(1.5 * (layer.B.grad @ layer.A).double(), G @ span @ span.T, rtol=0, atol=tolerance) and G.abs().max() > 1


@pytest.mark.parametrize("start_step", [0, 1, 3, 7])
@pytest.mark.parametrize("delta_ratio", [0.5, 2.0])
def test_finetune_follows_the_papers_updates_of_w(start_step, delta_ratio):
    """The same losses and the same W_eff as LoRA whose W is written to after each step. No eps -> 0 is needed: the sum is exact."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 5)).double()
    batches = lambda step: tuple(part.double() for part in regression(step))
    method = ml.DeltaLoRA(2, alpha=3, delta_ratio=delta_ratio, start_step=start_step)
    ml.adapt(model, method, ["0", "2"])
    layers = [model[0], model[2]]
    factors = [tuple(p.detach().clone().requires_grad_() for p in (layer.A, layer.B)) for layer in layers]
    W = [layer.weight.clone() for layer in layers]
    optimizer, losses, s = torch.optim.AdamW([p for pair in factors for p in pair], lr=0.02, weight_decay=0.1), [], 3 / 2
    for step in range(12):
        h, y = batches(step)
        for i, (A, B) in enumerate(factors):
            h = F.linear(torch.tanh(h) if i else h, W[i] + s * B @ A, layers[i].bias)
        losses.append(F.mse_loss(h, y))
        optimizer.zero_grad()
        losses[-1].backward()
        old = [(B @ A).detach() for A, B in factors]
        optimizer.step()
        if step >= start_step:
            W = [w + delta_ratio * s * ((B @ A).detach() - before) for w, (A, B), before in zip(W, factors, old)]
    history = train(model, method, batches, 12, weight_decay=0.1)
    assert history["loss"] == pytest.approx([loss.item() for loss in losses], rel=1e-12)
    for layer, w, (A, B) in zip(layers, W, factors):
        assert torch.allclose(layer.weight + layer.delta_weight(), w + s * B @ A, rtol=0, atol=1e-12)
        assert (w - layer.weight).abs().max() > 0.02 and torch.linalg.matrix_rank(layer.delta_weight(), atol=1e-10) == (4 if start_step else 2)


@pytest.mark.parametrize("loss_fn, refused", [(mse, False), (lambda *given: 0 * mse(*given), True)])
def test_lora_drops_warm_up_moves_nothing_that_is_not_its_own(loss_fn, refused):
    """Not a head that you have unfrozen, not a norm's running means."""
    model, method = perceptron(), ml.LoRADrop(3, warmup_steps=2)
    ml.adapt(model, method, ["0", "3"])
    model[5].requires_grad_(True)
    before = copy.deepcopy({name: tensor for name, tensor in model.state_dict().items() if not name.endswith(("own", "decided"))})
    if refused:
        with pytest.raises(ValueError, match="LoRA-drop cannot judge"):
            method.prepare(model, regression, loss_fn, 0.02)
    else:
        method.prepare(model, regression, loss_fn, 0.02)
    moved = {name for name, tensor in before.items() if not torch.equal(tensor, model.state_dict()[name])}
    assert not moved and all(bool(layer.decided) != refused for _, layer in ml.adapters(model))


@pytest.mark.parametrize("call", range(4))
@pytest.mark.parametrize("by_hand", [True, False])
def test_stopped_in_lora_drops_warm_up_nothing_has_happened(call, by_hand, tmp_path):
    """By Ctrl-C at either look at the sample: the adapter is at its start, undecided, or not there at all; and the run can begin."""
    method, calls, model = ml.LoRADrop(3, threshold=0.4, warmup_steps=2, dropout=0.1), [], deep()

    def interrupted(step):
        calls.append(step)
        if len(calls) == call + 1:
            raise KeyboardInterrupt
        return text(step)

    if by_hand:
        ml.adapt(model, method, ["q_proj"])
    before, flags, random = copy.deepcopy(model.state_dict()), [p.requires_grad for p in model.parameters()], torch.get_rng_state()
    with pytest.raises(KeyboardInterrupt):
        train(model.eval(), method, interrupted, 4, targets=["q_proj"], loss_fn=ml.next_byte_loss, checkpoint=tmp_path / "c.pt")
    assert same(model.state_dict(), before) and [p.requires_grad for p in model.parameters()] == flags and not model.training
    assert torch.equal(torch.get_rng_state(), random) and not (tmp_path / "c.pt").exists() and not any(len(m._forward_hooks) > 1 for m in model.modules())
    train(model, method, text, 4, targets=["q_proj"], loss_fn=ml.next_byte_loss, checkpoint=tmp_path / "c.pt")
    assert all(layer.decided for _, layer in ml.adapters(model))


@pytest.mark.parametrize("threshold, kept", [
    (1e-300, [1]), (0.4, [1]), (0.4 + 1e-12, [1, 3]), (0.7, [1, 3]), (0.7 + 1e-12, [1, 2, 3]), (0.9, [1, 2, 3]), (0.9 + 1e-12, [0, 1, 2, 3]), (1 - 1e-12, [0, 1, 2, 3])])
def test_lora_drop_keeps_the_fewest_that_reach_the_threshold_to_the_last_digit(threshold, kept):
    """One kind at a time: the other kind's importances are a million times larger, and its two layers always tie."""
    layers = dict(ml.adapters(ml.adapt(deep(layers=4), ml.LoRADrop(3), ["q_proj", "blocks.0.mlp.up_proj", "blocks.1.mlp.up_proj"])))
    g = dict.fromkeys(layers, 3e6) | dict(zip(sorted(layers_of(range(4))), (1.0, 4.0, 2.0, 3.0)))            # shares 0.1, 0.4, 0.2, 0.3
    up = {f"blocks.{i}.mlp.up_proj" for i in ((0, 1) if threshold > 0.5 else (0,))}
    assert ml.LoRADrop(3, threshold=threshold).kept(g, layers) == layers_of(kept) | up


def layers_of(kept):
    return {f"blocks.{i}.attention.q_proj" for i in kept}


@pytest.mark.parametrize("ours, theirs", [([0], [1]), ([0, 1], [1, 2]), ([0], [0, 1]), ([0, 1], [0]), ([], [3])])
def test_a_checkpoint_of_other_shared_layers_is_refused(ours, theirs, tmp_path):
    """Also where as many share, and the tensors have the same names: blocks 2 and 3 on one side, blocks 0 and 3 on the other."""
    method, models = ml.LoRADrop(3, warmup_steps=2), []
    for kept in (theirs, ours):
        models.append(ml.adapt(deep(layers=4), method, ["q_proj"]))
        share_pairs(dict(ml.adapters(models[-1])), layers_of(kept))
    train(models[0], method, text, 4, loss_fn=ml.next_byte_loss, checkpoint=tmp_path / "c.pt")
    before = copy.deepcopy(models[1].state_dict())
    with pytest.raises(ValueError, match="c.pt: a checkpoint of"):
        train(models[1], method, text, 4, loss_fn=ml.next_byte_loss, checkpoint=tmp_path / "c.pt")
    assert same(models[1].state_dict(), before)


@pytest.mark.parametrize("by_hand", [True, False])
def test_a_run_that_goes_on_keeps_the_choice_that_it_began_with(by_hand, tmp_path, monkeypatch):
    """Another machine may round otherwise, and would choose other layers: it is not asked again."""
    method, says = ml.LoRADrop(3, threshold=0.5, warmup_steps=2), {}
    monkeypatch.setattr(ml.LoRADrop, "judge", lambda *_: says)

    def start():
        torch.manual_seed(7)
        return ml.adapt(deep(), method, ["q_proj"]) if by_hand else deep()

    def go_on(model, batches=text, **options):
        return train(model, method, batches, 6, targets=["q_proj"], loss_fn=ml.next_byte_loss, **options)

    def interrupted(step):
        if step == 4:
            raise KeyboardInterrupt
        return text(step)

    says.update(zip(sorted(layers_of(range(3))), (5.0, 4.0, 3.0)))                          # 0 and 1 are kept
    straight, again = start(), start()
    expected = go_on(straight)
    with pytest.raises(KeyboardInterrupt):
        go_on(start(), interrupted, checkpoint=tmp_path / "c.pt")
    says.update(zip(sorted(layers_of(range(3))), (9.0, 1.0, 1.0)))                          # 0 alone
    assert go_on(again, checkpoint=tmp_path / "c.pt") == expected and same(again.state_dict(), straight.state_dict())
    assert [layer.own.item() for _, layer in ml.adapters(again)] == [True, True, False]


def test_the_penaltys_gradient_is_the_closed_form_and_zero_where_all_is_orthonormal():
    """d ‖PᵀP − 1‖ / dP = 2 P (PᵀP − 1) / ‖PᵀP − 1‖, a mean over the P and Q of all layers. At the bottom the norm has a kink."""
    torch.manual_seed(0)
    method = ml.AdaLoRA(3, 2, orthogonal_weight=0.7)
    model = ml.adapt(nn.Sequential(nn.Linear(7, 5), nn.Linear(5, 6)).double(), method, ["0", "1"])
    for _, layer in ml.adapters(model):
        nn.init.normal_(layer.P), nn.init.normal_(layer.Q)
    method.penalty(model).backward()
    for _, layer in ml.adapters(model):
        for M, grad in ((layer.P, layer.P.grad), (layer.Q.T, layer.Q.grad.T)):
            gap = M.detach().T @ M.detach() - torch.eye(3, dtype=torch.float64)
            assert torch.allclose(grad, 0.7 / 4 * 2 * M @ gap / gap.norm(), rtol=0, atol=1e-13) and grad.abs().max() > 0.01
        layer.P.grad = layer.Q.grad = None
        nn.init.eye_(layer.P), nn.init.eye_(layer.Q)
    method.penalty(model).backward()
    assert method.penalty(model) == 0 and not any(grad.any() for _, layer in ml.adapters(model) for grad in (layer.P.grad, layer.Q.grad))


def test_a_cut_sets_lam_to_zero_and_touches_nothing_else(wake):
    """So that the triplet can grow again from the directions that it has learned."""
    method = ml.AdaLoRA(4, 1, total_steps=8)
    model = wake(ml.adapt(nn.Sequential(nn.Linear(7, 5), nn.Linear(5, 6)), method, ["0", "1"]))
    (model(torch.randn(9, 7)).square().mean() + method.penalty(model)).backward()
    before = [(layer, *(p.detach().clone() for p in (layer.P, layer.lam, layer.Q))) for _, layer in ml.adapters(model)]
    method.after_step(model, 4)
    for layer, P, lam, Q in before:
        assert torch.equal(layer.P, P) and torch.equal(layer.Q, Q) and torch.equal(layer.lam, torch.where(layer.mask, lam, 0.0)) and lam.all()
    assert sum(int(layer.mask.sum()) for layer, *_ in before) == method.budget(4, 2) == 2


@pytest.mark.parametrize("final_steps", [0, 3])
def test_the_pattern_holds_for_as_long_as_training_goes_on_after_the_schedule(final_steps):
    x, y = (torch.randn(64, size, generator=torch.Generator().manual_seed(size)) for size in (6, 5))
    seen = []

    class Watched(ml.AdaLoRA):
        def after_step(self, model, step):
            super().after_step(model, step)
            seen.append([tuple((layer.lam != 0).tolist()) for _, layer in ml.adapters(model)])

    torch.manual_seed(0)
    train(nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 5)), Watched(4, 2, total_steps=8, warmup_steps=1, final_steps=final_steps, interval=5),
          lambda step: (x, y), 14, targets=["0", "2"])
    counts = [sum(map(sum, pattern)) for pattern in seen]
    last = 7 if final_steps == 0 else 8 - final_steps
    assert counts[last:] == [4] * (14 - last) and counts[last - 1] > 4 and all(pattern == seen[last] for pattern in seen[last:])


class Largest(TorchDispatchMode):
    """The most elements of any tensor that an operation makes; views of what is there do not count."""

    def __init__(self, known):
        super().__init__()
        self.known, self.numel = {p.untyped_storage().data_ptr() for p in known}, 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        out = function(*arguments, **(keywords or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in self.known:
                self.numel = max(self.numel, tensor.numel())
        return out


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("into, out", [(400, 300), (300, 400)])
def test_no_tensor_of_the_weights_size_is_made_beside_a_base_of_any_precision(dtype, into, out):
    torch.manual_seed(0)
    made, x = ml.DoRA(3, alpha=5).layer(nn.Linear(into, out).to(dtype).requires_grad_(False)), torch.randn(2, into, dtype=dtype)
    nn.init.normal_(made.B)
    with Largest(made.parameters()) as seen:
        made(x).float().square().sum().backward()
    assert made.A.grad.any() and 2 * into <= seen.numel < into * out


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_dora_starts_as_its_base_whatever_the_size_of_the_weights(scale):
    torch.manual_seed(0)
    linear = nn.Linear(70, 50).double().requires_grad_(False)
    linear.weight.mul_(scale)
    made, x = ml.DoRA(3, alpha=5).layer(linear), torch.randn(16, 70, dtype=torch.float64)
    assert (made(x) - linear(x)).norm() <= 1e-15 * linear(x).norm() and made.delta_weight().norm() <= 1e-15 * linear.weight.norm()
