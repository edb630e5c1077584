"""Every variant's layer against its equation written out, float64: values, gradients, start, merge, counts, places it must work in."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import minilora as ml

IN, OUT, RANK = 7, 5, 3
METHODS = {
    "LoRA+": ml.LoRAPlus(RANK, alpha=5),
    "LoRA-FA": ml.LoRAFA(RANK, alpha=5),
    "LoRA-FA, projected": ml.LoRAFA(RANK, alpha=5, projection=True),
    "VeRA": ml.VeRA(RANK, d_initial=0.3, seed=4),
    "VeRA, wide": ml.VeRA(20),
    "Delta-LoRA": ml.DeltaLoRA(RANK, alpha=5, delta_ratio=1.7),
    "LoRA-drop": ml.LoRADrop(RANK, alpha=5, threshold=0.5, warmup_steps=2),
    "AdaLoRA": ml.AdaLoRA(RANK, 2, alpha=5),
    "rsLoRA": ml.LoRA(RANK, alpha=5, rslora=True),
    "DoRA": ml.DoRA(RANK, alpha=5),
    "DoRA, rsLoRA": ml.DoRA(RANK, alpha=5, rslora=True),
    "PiSSA": ml.PiSSA(RANK, alpha=5),
}
EVERY = pytest.mark.parametrize("name", METHODS)
DROPS = pytest.mark.parametrize("kind", [ml.LoRA, ml.LoRAPlus, ml.LoRAFA, ml.VeRA, ml.LoRADrop, ml.AdaLoRA, ml.DoRA, ml.PiSSA])


def layer(method, bias=True, dtype=torch.float64, awake=True, into=IN, out=OUT):
    """One adapted layer; awake: with every tensor of the adapter random, buffers too."""
    torch.manual_seed(0)
    linear = nn.Linear(into, out, bias=bias, dtype=dtype).requires_grad_(False)
    made = method.wrap({"it": linear})["it"]
    if awake:
        with torch.no_grad():
            for key, tensor in [*made.named_parameters(), *made.named_buffers()]:
                if not key.startswith("base.") and tensor.is_floating_point() and key not in ("A_0", "B_0"):
                    tensor.copy_(0.5 * torch.randn(tensor.shape, dtype=torch.float64))
            if hasattr(made, "started"):
                made.started.fill_(True)
    return made


def equation(made, x):
    """The method as its paper has it, dense and slow. What is a constant in backward is detached."""
    W, method = made.base.weight, made.method
    bias = 0 if made.base.bias is None else made.base.bias
    if isinstance(method, ml.VeRA):
        return x @ W.T + bias + made.b * ((made.d * (x @ made.A[:, : W.shape[1]].T)) @ made.B[: W.shape[0]].T)
    if isinstance(method, ml.AdaLoRA):
        return x @ (W + method.alpha / (method.initial_rank + 1e-5) * made.P @ torch.diag(made.lam) @ made.Q).T + bias
    s = method.alpha / (method.rank ** 0.5 if method.rslora else method.rank)
    BA = made.B @ made.A
    if isinstance(method, ml.DoRA):
        V = W + s * BA
        return x @ (made.magnitude[:, None] * V / V.norm(dim=1, keepdim=True).detach()).T + bias
    if isinstance(method, ml.DeltaLoRA):
        W = W + method.delta_ratio * s * (BA.detach() - made.B_K @ made.A_K)
    if isinstance(method, ml.PiSSA):
        W = W - s * made.B_0 @ made.A_0
    return x @ (W + s * BA).T + bias


@EVERY
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(IN,), (4, IN), (2, 3, IN), (0, IN)])
def test_forward_is_the_equation(name, bias, shape):
    made, x = layer(METHODS[name], bias), torch.randn(shape, dtype=torch.float64)
    got = made(x)
    assert got.shape == (*shape[:-1], OUT) and torch.allclose(got, equation(made, x), rtol=0, atol=1e-12)
    assert not got.numel() or (got - made.base(x)).abs().max() > 0.02


@EVERY
@pytest.mark.parametrize("bias", [True, False])
def test_gradients_are_the_equations(name, bias):
    made, x = layer(METHODS[name], bias), torch.randn(2, 6, IN, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(2, 6, OUT, dtype=torch.float64)
    trained = {key: p for key, p in made.named_parameters() if p.requires_grad}
    got = torch.autograd.grad(made(x), [x, *trained.values()], upstream)
    wanted = torch.autograd.grad(equation(made, x), [x, *trained.values()], upstream)
    for key, one, other in zip(["x", *trained], got, wanted, strict=True):
        assert other.abs().max() > 1e-3 and torch.allclose(one, other, rtol=0, atol=1e-11), key
    assert not any(key.startswith("base.") for key in trained)
    frozen = {"LoRA-FA": {"A"}, "LoRA-FA, projected": {"A"}, "VeRA": {"A", "B"}, "VeRA, wide": {"A", "B"}}.get(name, set())
    assert {key for key, p in made.named_parameters() if not p.requires_grad and not key.startswith("base.")} == frozen


@EVERY
def test_what_merge_adds_is_what_the_layer_adds(name):
    made, x = layer(METHODS[name]), torch.randn(4, IN, dtype=torch.float64)
    assert made.delta_weight().shape == (OUT, IN)
    assert torch.allclose(F.linear(x, made.base.weight + made.delta_weight(), made.base.bias), made(x), rtol=0, atol=1e-12)


@EVERY
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_it_starts_as_the_base(name, dtype):
    made, x = layer(METHODS[name], dtype=dtype, awake=False), torch.randn(4, IN, dtype=dtype)
    if name.startswith("DoRA"):                                           # m / n is 1 but for the last bits
        assert torch.allclose(made(x), made.base(x), rtol=0, atol=10 * torch.finfo(dtype).eps)
    else:
        assert torch.equal(made(x), made.base(x))


@EVERY
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_beside_a_16_bit_base_the_adapter_is_float32(name, dtype):
    made, x = layer(METHODS[name], dtype=dtype), torch.randn(4, IN, dtype=dtype, requires_grad=True)
    assert {p.dtype for key, p in [*made.named_parameters(), *made.named_buffers()] if not key.startswith("base.") and p.is_floating_point()} == {torch.float32}
    got, exact = made(x), copy.deepcopy(made).double()
    assert got.dtype == dtype and torch.allclose(got.double(), equation(exact, x.detach().double()), rtol=0.05, atol=0.1)
    got.float().square().sum().backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.any() for p in made.parameters() if p.requires_grad) and x.grad.any()


@EVERY
def test_it_works_under_autocast(name):
    made, x = layer(METHODS[name], dtype=torch.float32), torch.randn(4, IN)
    with torch.autocast("cpu", torch.bfloat16):
        got = made(x)
    got.float().sum().backward()
    assert torch.allclose(got.float(), made(x), atol=0.15) and all(p.grad.any() for p in made.parameters() if p.requires_grad)


@pytest.mark.parametrize("base", ["dense", "nf4"])
@pytest.mark.parametrize("name", [*METHODS, "LoRA, dropout", "QLoRA", "LoftQ", "QPiSSA"])
def test_no_forward_branches_on_a_tensor(name, base):
    """torch.compile takes it whole; on a GPU a branch would wait for the device. Compiled once for all of training, and the same numbers."""
    method = {"LoRA, dropout": ml.LoRA(3, dropout=0.5), "QLoRA": ml.QLoRA(3), "LoftQ": ml.LoftQ(3), "QPiSSA": ml.QPiSSA(3)} | METHODS
    method = method[name]
    if base == "nf4" and isinstance(method, (ml.DeltaLoRA, ml.LoftQ)):
        pytest.skip("needs a dense W")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64))
    ml.adapt(ml.quantize(model, ["0", "2"]) if base == "nf4" else model, method, ["0", "2"])
    torch._dynamo.reset()
    compilations, x = [], torch.randn(4, 64)
    compiled = torch.compile(model, fullgraph=True, backend=lambda graph, inputs: compilations.append(1) or graph.forward)
    optimizer = torch.optim.AdamW(method.parameter_groups(model, 0.01))
    for step in range(3):
        (compiled(x).square().mean() + method.penalty(model)).backward()
        method.before_step(model, step)
        optimizer.step()
        optimizer.zero_grad()
    torch.manual_seed(1)
    said = compiled(x)
    torch.manual_seed(1)
    assert torch.equal(said, model(x)) and len(compilations) == 1


@EVERY
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_in_a_transformer_encoder_padded_batches_take_the_short_cut_too(name):
    """nn.TransformerEncoder packs a padded batch into a nested tensor in evaluation, where few operations exist."""
    torch.manual_seed(0)
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(24, 2, 40, batch_first=True, dropout=0.0), 2, enable_nested_tensor=True)
    ml.adapt(encoder, METHODS[name], ["linear1", "linear2"])
    for _, made in ml.adapters(encoder):
        with torch.no_grad():
            for key, p in made.named_parameters():
                if not key.startswith("base."):
                    p.normal_(std=0.3)
    x, padding = torch.randn(3, 6, 24), torch.tensor([[False] * 6, [False] * 4 + [True] * 2, [False] * 3 + [True] * 3])
    plain = encoder.train()(x, src_key_padding_mask=padding)[~padding]
    with torch.no_grad():
        short = encoder.eval()(x, src_key_padding_mask=padding)[~padding]
    assert torch.allclose(plain, short, atol=1e-5)


def gpt(dtype=torch.float64):
    torch.manual_seed(0)
    model = ml.TinyGPT(ml.GPTConfig(context=16, width=24, layers=3, heads=2)).to(dtype)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.2)
    return model


@pytest.fixture
def ids():
    return torch.randint(256, (3, 12), generator=torch.Generator().manual_seed(1))


@EVERY
def test_adapt_train_merge_and_unload_on_a_model(name, ids):
    base = gpt()
    before = copy.deepcopy(base.state_dict())
    model = ml.adapt(copy.deepcopy(base), METHODS[name], ["q_proj", "up_proj", "down_proj"])
    assert torch.allclose(model(ids), base(ids), rtol=0, atol=1e-11)
    ml.finetune(model, METHODS[name], lambda step: (ids[:, :-1], ids[:, 1:]), 5, 0.03, progress=False)
    said = model.eval()(ids)
    assert (said - base(ids)).abs().max() > 1e-2
    with ml.disabled(model):
        assert torch.equal(model(ids), base(ids))
    merged = ml.merge(copy.deepcopy(model))
    assert torch.allclose(merged(ids), said, rtol=0, atol=1e-10) and merged.state_dict().keys() == before.keys()
    ml.unload(model)
    assert model.state_dict().keys() == before.keys() and all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


@pytest.mark.parametrize("name, formula", [
    ("LoRA+", lambda i, o: 3 * (i + o)), ("LoRA-FA", lambda i, o: 3 * o), ("VeRA", lambda i, o: 3 + o), ("VeRA, wide", lambda i, o: 20 + o),
    ("Delta-LoRA", lambda i, o: 3 * (i + o)), ("LoRA-drop", lambda i, o: 3 * (i + o)), ("AdaLoRA", lambda i, o: 3 * (i + o + 1)),
    ("rsLoRA", lambda i, o: 3 * (i + o)), ("DoRA", lambda i, o: 3 * (i + o) + o), ("PiSSA", lambda i, o: 3 * (i + o)),
])
def test_the_number_of_trainable_parameters(name, formula):
    model = ml.adapt(gpt(), METHODS[name], ["q_proj", "up_proj", "down_proj"])
    assert ml.trainable_parameters(model) == 3 * (formula(24, 24) + formula(24, 96) + formula(96, 24))


@EVERY
def test_a_copy_is_independent_and_keeps_what_its_own_layers_share(name, ids):
    model = gpt(torch.float32)
    ml.finetune(model, METHODS[name], lambda step: (ids[:, :-1], ids[:, 1:]), 3, 0.03, progress=False)
    said, twin = model.eval()(ids), copy.deepcopy(model)
    with torch.no_grad():
        for p in twin.parameters():
            if p.requires_grad:
                p.add_(0.1)
    assert torch.equal(model(ids), said) and (twin(ids) - said).abs().max() > 1e-2

    def sharing(model):
        tensors = [(n, id(p)) for n, p in model.named_parameters(remove_duplicate=False)]
        return {(a, b) for a, i in tensors for b, j in tensors if a < b and i == j}

    for other in (twin, copy.deepcopy(model).double(), copy.deepcopy(model).to(torch.bfloat16)):
        assert sharing(other) == sharing(model)
    assert bool(sharing(model)) == (name in ("VeRA", "VeRA, wide", "LoRA-drop"))


@EVERY
def test_any_model_with_linears_learns(name):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 24), nn.Tanh(), nn.Linear(24, 17), nn.Tanh(), nn.Linear(17, 4))
    x, y = torch.randn(64, 6), torch.randn(64, 4)
    history = ml.finetune(model, METHODS[name], lambda step: (x, y), 40, 0.05 / getattr(METHODS[name], "ratio", 1), targets=["0", "2", "4"], loss_fn=lambda m, x, y: F.mse_loss(m(x), y), progress=False)
    assert history["loss"][-1] < 0.93 * history["loss"][0]


@DROPS
def test_dropout_is_on_the_branch_only_and_off_in_evaluation(kind):
    made = layer(kind(RANK, alpha=5, dropout=0.5) if kind not in (ml.VeRA, ml.AdaLoRA) else kind(RANK, dropout=0.5))
    x = torch.randn(4, IN, dtype=torch.float64)
    made.train()
    torch.manual_seed(3)
    got = made(x)
    torch.manual_seed(3)
    dropped = F.dropout(x, 0.5)
    if kind is ml.DoRA:                                                   # g ⊙ (x Wᵀ + s · (dropped A ᵀ) Bᵀ) + bias
        s, bias = made.scale, made.base.bias
        g = (made.magnitude / (made.base.weight + s * made.B @ made.A).norm(dim=1)).detach()
        expected = g * (x @ made.base.weight.T + s * dropped @ made.A.T @ made.B.T) + bias
    else:
        expected = made.base(x) + dropped @ made.delta_weight().T
    assert torch.allclose(got, expected, rtol=0, atol=1e-12) and not torch.allclose(got, made(x))
    assert torch.allclose(made.eval()(x), equation(made, x), rtol=0, atol=1e-12)


# Bad input: one ValueError that names the thing, before anything is changed.

RANKED = [ml.LoRA, ml.LoRAPlus, ml.LoRAFA, ml.VeRA, ml.DeltaLoRA, ml.LoRADrop, ml.AdaLoRA, ml.DoRA, ml.PiSSA]


@pytest.mark.parametrize("kind", RANKED)
@pytest.mark.parametrize("rank", [0, -1, 1.5, True, "8", None])
def test_a_rank_must_be_a_whole_number_of_at_least_one(kind, rank):
    with pytest.raises(ValueError, match="rank must be a whole number of at least 1"):
        kind(rank)


@pytest.mark.parametrize("kind, fields, says", [
    *[(kind, {"alpha": bad}, "alpha") for kind in RANKED if kind is not ml.VeRA for bad in (float("nan"), float("inf"), "8")],
    *[(kind, {"dropout": bad}, "dropout") for kind in RANKED for bad in (1.0, -0.1, float("nan"))],
    (ml.LoRAPlus, {"ratio": float("nan")}, "ratio"), (ml.LoRAPlus, {"ratio": -1}, "ratio"), (ml.LoRAFA, {"alpha": 0, "projection": True}, "alpha"),
    (ml.VeRA, {"d_initial": float("inf")}, "d_initial"), (ml.VeRA, {"seed": -1}, "seed"), (ml.VeRA, {"seed": 1.5}, "seed"),
    (ml.DeltaLoRA, {"dropout": 0.1}, "dropout must be 0"), (ml.DeltaLoRA, {"delta_ratio": -1}, "delta_ratio"), (ml.DeltaLoRA, {"start_step": -1}, "start_step"),
    *[(ml.LoRADrop, {"threshold": bad}, "threshold") for bad in (0, -0.5, 1.1, float("nan"), "all")], (ml.LoRADrop, {"warmup_steps": 0}, "warmup_steps"),
    (ml.AdaLoRA, {"target_rank": 4}, "target_rank 4 is above initial_rank 3"), (ml.AdaLoRA, {"target_rank": 0}, "target_rank"),
    (ml.AdaLoRA, {"beta1": 1.0}, "beta1"), (ml.AdaLoRA, {"beta2": -0.1}, "beta2"), (ml.AdaLoRA, {"interval": 0}, "interval"), (ml.AdaLoRA, {"alpha": 0}, "alpha"),
    (ml.AdaLoRA, {"orthogonal_weight": -1}, "orthogonal_weight"), (ml.AdaLoRA, {"warmup_steps": -1}, "warmup_steps"), (ml.AdaLoRA, {"final_steps": 0.5}, "final_steps"),
    (ml.AdaLoRA, {"total_steps": 10, "warmup_steps": 6, "final_steps": 4}, "leave none of the 10 steps"), (ml.AdaLoRA, {"total_steps": 0}, "total_steps"),
    (ml.PiSSA, {"alpha": 0}, "alpha must be positive"), (ml.PiSSA, {"alpha": -3}, "alpha must be positive"),
])
def test_senseless_hyper_parameters_are_refused(kind, fields, says):
    with pytest.raises(ValueError, match=says):
        kind(3, **fields)


def unchanged(model, match, act):
    before, flags, kinds = copy.deepcopy(model.state_dict()), [p.requires_grad for p in model.parameters()], [type(m) for m in model.modules()]
    with pytest.raises(ValueError, match=match) as error:
        act()
    assert "\n" not in str(error.value)
    assert [type(m) for m in model.modules()] == kinds and [p.requires_grad for p in model.parameters()] == flags
    assert all(tensor.dtype != before[key].dtype or torch.equal(tensor.nan_to_num(7.0), before[key].nan_to_num(7.0)) for key, tensor in model.state_dict().items())


@pytest.mark.parametrize("through", ["adapt", "finetune"])
@pytest.mark.parametrize("kind", RANKED)
def test_a_model_it_cannot_sit_on_is_refused_and_left_alone(kind, through, ids):
    def put(model, method, targets=None):
        def act():
            if through == "adapt":
                ml.adapt(model, method, targets)
            else:
                ml.finetune(model, method, lambda step: (ids[:, :-1], ids[:, 1:]), 30, 0.01, targets=targets, progress=False)
        return act

    model = gpt(torch.float32)
    if kind is not ml.VeRA:
        unchanged(model, r"blocks.0.attention.q_proj: rank 25 is above min\(in, out\)", put(model, kind(25)))
        assert len(list(ml.adapters(ml.adapt(gpt(), kind(24))))) == 18                    # just so many is right
    unchanged(model, "no Linear matches 'token_embedding'", put(model, kind(3), ["token_embedding"]))
    with torch.no_grad():
        model.blocks[1].mlp.up_proj.weight[3, 5] = float("nan")
    unchanged(model, "blocks.1.mlp.up_proj: its weight holds values that are not finite", put(model, kind(3)))
    model.blocks[1].mlp.up_proj.weight = nn.Parameter(torch.zeros(96, 24, dtype=torch.int8), requires_grad=False)
    unchanged(model, "blocks.1.mlp.up_proj: its weight is stored as torch.int8", put(model, kind(3)))
    tied = gpt()
    tied.head.weight = tied.token_embedding.weight
    unchanged(tied, "tied", put(tied, kind(3), ["head"]))
    bare = nn.ModuleDict({"conv": nn.Conv1d(3, 3, 1), "norm": nn.LayerNorm(3)})
    unchanged(bare, "no Linear", put(bare, kind(3)))


@pytest.mark.parametrize("method, says", [
    (ml.DeltaLoRA(3, start_step=30), "start_step 30 is beyond training, whose last step is 29"),
    (ml.LoRADrop(3, warmup_steps=31), "warmup_steps 31 is more than the 30 steps"),
    (ml.AdaLoRA(3, 2, total_steps=31), "total_steps 31 is more than the 30 steps"),
    (ml.AdaLoRA(3, 2, warmup_steps=20, final_steps=10), "leave none of the 30 steps"),
])
def test_a_schedule_longer_than_training_is_refused(method, says, ids):
    model = gpt()
    unchanged(model, says, lambda: ml.finetune(model, method, lambda step: (ids[:, :-1], ids[:, 1:]), 30, 0.01, progress=False))
