"""The variants against PEFT: same base, same random tensors, same data; on the tiny GPT and a Llama with biases. Folders: test_folders_peft.py.

Relative means: the largest difference of a tensor, over the largest value in it. Trajectories are compared in float64, where fifty
steps of AdamW leave no room for chaos.
"""

import copy
from dataclasses import replace

import peft
import peft.optimizers
import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import nn

import minilora as ml

TARGETS = ["q_proj", "v_proj", "up_proj", "down_proj"]
NAMES = {                                                                # ours: PEFT's, for each adapted layer
    ml.LoRA: {"A": "lora_A", "B": "lora_B"},
    ml.DoRA: {"A": "lora_A", "B": "lora_B", "magnitude": "lora_magnitude_vector"},
    ml.VeRA: {"b": "vera_lambda_b", "d": "vera_lambda_d"},
    ml.AdaLoRA: {"Q": "lora_A", "lam": "lora_E", "P": "lora_B"},
}
METHODS = {
    "LoRA": ml.LoRA(3, alpha=5),
    "rsLoRA": ml.LoRA(3, alpha=5, rslora=True),
    "LoRA+": ml.LoRAPlus(3, alpha=5),
    "LoRA-FA": ml.LoRAFA(3, alpha=5),
    "DoRA": ml.DoRA(3, alpha=5),
    "DoRA, rsLoRA": ml.DoRA(3, alpha=5, rslora=True),
    "VeRA": ml.VeRA(20, d_initial=0.3, seed=7),
    "AdaLoRA": ml.AdaLoRA(4, 2, alpha=5),
}
EVERY = pytest.mark.parametrize("name", METHODS)


def lively(model):
    """Weights of size 1/√in and biases that are not zero: see test_lora_peft.py."""
    with torch.no_grad():
        for linear in model.modules():
            if isinstance(linear, nn.Linear):
                linear.weight.normal_(std=linear.in_features ** -0.5)
                if linear.bias is not None:
                    linear.bias.normal_(std=0.1)
    return model


def tiny_gpt():
    torch.manual_seed(0)
    return lively(ml.TinyGPT(ml.GPTConfig(context=16, width=24, layers=2, heads=2)))


def llama():
    torch.manual_seed(0)
    return lively(transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=256, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        attention_bias=True, mlp_bias=True)))


BUILDS = pytest.mark.parametrize("build", [tiny_gpt, llama])


def config(method, **options):
    if isinstance(method, ml.VeRA):
        return peft.VeraConfig(r=method.rank, d_initial=method.d_initial, projection_prng_key=method.seed, target_modules=TARGETS, **options)
    if isinstance(method, ml.AdaLoRA):
        return peft.AdaLoraConfig(init_r=method.initial_rank, target_r=method.target_rank, lora_alpha=method.alpha, tinit=method.warmup_steps, tfinal=method.final_steps,
                                  deltaT=method.interval, beta1=method.beta1, beta2=method.beta2, orth_reg_weight=method.orthogonal_weight,
                                  total_step=method.total_steps or 1000, target_modules=TARGETS, **options)
    return peft.LoraConfig(r=method.rank, lora_alpha=method.alpha, use_rslora=method.rslora, use_dora=isinstance(method, ml.DoRA), target_modules=TARGETS, **options)


def names(method):
    return next(NAMES[kind] for kind in type(method).__mro__ if kind in NAMES)


def tensors(model, method):
    """{(layer, our name): tensor} of ours or of PEFT's."""
    if not isinstance(model, peft.PeftModel):
        return {(name, key): getattr(layer, key) for name, layer in ml.adapters(model) for key in names(method)}
    found = {}
    for name, module in model.base_model.model.named_modules():
        if isinstance(module, peft.tuners.tuners_utils.BaseTunerLayer):
            for key, theirs in names(method).items():
                tensor = getattr(module, theirs)["default"]
                found[name, key] = getattr(tensor, "weight", tensor)
    return found


def pair(build, method, dtype=torch.float64, **options):
    """The same base adapted by us and by PEFT, with the same random tensors."""
    base = build().to(dtype)
    ours = ml.adapt(copy.deepcopy(base), method, TARGETS)
    theirs = peft.get_peft_model(copy.deepcopy(base), config(method, **options))
    for name, parameter in theirs.named_parameters():
        if ".ranknum." in name:                                          # see test_in_float64_peft_leaves_a_constant_to_be_trained
            parameter.requires_grad_(False)
    mine, peers = tensors(ours, method), tensors(theirs, method)
    assert mine.keys() == peers.keys() and len(mine) == len(names(method)) * 2 * len(TARGETS)
    with torch.no_grad():
        for key, tensor in mine.items():
            if key[1] == "magnitude":
                tensor.mul_(1 + 0.2 * torch.randn_like(tensor))
            else:
                tensor.normal_(std=0.2)
            peers[key].copy_(tensor.view_as(peers[key]))
    return ours, theirs


def batch(step):
    ids = torch.randint(256, (3, 13), generator=torch.Generator().manual_seed(step))
    return ids[:, :-1], ids[:, 1:]


def logits(model, ids):
    out = model(ids)
    return getattr(out, "logits", out)


def loss(model, step):
    x, y = batch(step)
    return F.cross_entropy(logits(model, x).flatten(0, 1), y.flatten())


def relative(one, other):
    return ((one - other.view_as(one)).abs().max() / other.abs().max().clamp_min(1e-30)).item()


def compare(ours, theirs, method, tolerance):
    peers = tensors(theirs, method)
    for key, tensor in tensors(ours, method).items():
        assert relative(tensor, peers[key]) < tolerance, key


@BUILDS
@EVERY
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-10), (torch.float32, 1e-5)], ids=["float64", "float32"])
def test_logits_and_gradients_of_the_first_step(build, name, dtype, tolerance):
    method = METHODS[name]
    ours, theirs = pair(build, method, dtype)
    assert relative(logits(ours, batch(0)[0]), logits(theirs, batch(0)[0])) < tolerance
    assert relative(logits(ours, batch(0)[0]), logits(build().to(dtype), batch(0)[0])) > 0.1
    loss(ours, 0).backward(), loss(theirs, 0).backward()
    peers = tensors(theirs, method)
    for key, tensor in tensors(ours, method).items():
        if tensor.requires_grad:
            assert tensor.grad.abs().max() > 0 and relative(tensor.grad, peers[key].grad) < tolerance, key
    if name != "LoRA-FA":
        assert ml.trainable_parameters(ours) == theirs.get_nb_trainable_parameters()[0]


@BUILDS
@EVERY
def test_fifty_steps_of_adamw(build, name):
    method = METHODS[name]
    ours, theirs = pair(build, method)
    if name == "LoRA-FA":                                                # off: plain freezing
        for key, tensor in tensors(theirs, method).items():
            tensor.requires_grad_(key[1] != "A")
    start = {key: tensor.detach().clone() for key, tensor in tensors(ours, method).items()}
    mine = torch.optim.AdamW(method.parameter_groups(ours, 1e-3, 0.01))
    if name == "LoRA+":
        peers = peft.optimizers.create_loraplus_optimizer(theirs, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16, loraplus_weight_decay=0.01)
    else:
        peers = torch.optim.AdamW([p for p in theirs.parameters() if p.requires_grad], lr=1e-3, weight_decay=0.01)
    for step in range(50):
        for model, optimizer in ((ours, mine), (theirs, peers)):
            optimizer.zero_grad()
            loss(model, step).backward()
            optimizer.step()
        if name == "AdaLoRA":                                            # in the warm-up it judges and does not cut yet
            replace(method, total_steps=200, warmup_steps=100).after_step(ours, step)
    assert all((tensor - start[key]).abs().max() > 2e-3 for key, tensor in tensors(ours, method).items() if tensor.requires_grad)
    compare(ours, theirs, method, 1e-10)
    assert relative(logits(ours, batch(99)[0]), logits(theirs, batch(99)[0])) < 1e-10


@BUILDS
@EVERY
def test_merged_weights(build, name):
    ours, theirs = pair(build, METHODS[name])
    merged, peers = ml.merge(ours).state_dict(), theirs.merge_and_unload().state_dict()
    assert merged.keys() == peers.keys() and max((merged[key] - peers[key]).abs().max().item() for key in merged) < 1e-13


@BUILDS
def test_lora_pluss_groups_are_pefts(build):
    """Who gets which rate and which decay; PEFT's own weight_decay= has no effect, loraplus_weight_decay= has."""
    method = ml.LoRAPlus(3, alpha=5, ratio=7)
    ours, theirs = pair(build, method)

    def said(groups, model):
        where = {id(tensor): key for key, tensor in tensors(model, method).items()}
        return {where[id(p)]: (pytest.approx(group["lr"]), group["weight_decay"]) for group in groups for p in group["params"]}

    optimizer = peft.optimizers.create_loraplus_optimizer(theirs, torch.optim.AdamW, lr=0.01, loraplus_lr_ratio=7, loraplus_weight_decay=0.3)
    wanted = said(optimizer.param_groups, theirs)
    assert said(method.parameter_groups(ours, 0.01, 0.3), ours) == wanted
    assert {tuple(map(str, rates)) for rates in wanted.values()} == {("0.07 ± 7.0e-08", "0.3"), ("0.01 ± 1.0e-08", "0.3")}
    deaf = peft.optimizers.create_loraplus_optimizer(theirs, torch.optim.AdamW, lr=0.01, loraplus_lr_ratio=7, weight_decay=0.3)
    assert {group["weight_decay"] for group in deaf.param_groups} == {0.0}


@BUILDS
@pytest.mark.parametrize("rslora", [False, True])
def test_lora_fas_projection_is_pefts_optimizer(build, rslora, monkeypatch):
    """50 steps in float32, with its bfloat16 product switched off, and with an eps that plays no part: PEFT adds it to √v before
    the bias correction, torch after. (At PEFT's 1e-6 that alone makes 1e-3, in float64 too.)"""
    monkeypatch.setattr(peft.optimizers.lorafa, "is_bf16_available", lambda *_, **__: False)
    method = ml.LoRAFA(3, alpha=5, rslora=rslora, projection=True)
    ours, theirs = pair(build, method, torch.float32)
    peers = peft.optimizers.create_lorafa_optimizer(theirs, r=3, lora_alpha=5, lr=1e-3, use_rslora=rslora)
    for group in peers.param_groups:
        group["eps"] = 1e-12
    mine = torch.optim.AdamW(method.parameter_groups(ours, 1e-3), eps=1e-12, weight_decay=0.0)
    start = {key: tensor.detach().clone() for key, tensor in tensors(ours, method).items()}
    for step in range(50):
        for model, optimizer in ((ours, mine), (theirs, peers)):
            optimizer.zero_grad()
            loss(model, step).backward()
            if model is ours:
                method.before_step(ours, step)
            optimizer.step()
    compare(ours, theirs, method, 1e-5)
    assert all((tensor - start[key]).abs().max() > 5e-3 for key, tensor in tensors(ours, method).items() if key[1] == "B")


@BUILDS
def test_veras_projections_are_pefts_bit_for_bit(build):
    method = METHODS["VeRA"]
    ours = ml.adapt(build(), method, TARGETS)
    theirs = peft.get_peft_model(build(), config(method))
    layer = next(ml.adapters(ours))[1]
    assert torch.equal(layer.A, theirs.base_model.vera_A["default"]) and torch.equal(layer.B, theirs.base_model.vera_B["default"])
    peers = tensors(theirs, method)
    assert all(torch.equal(tensor, peers[key]) for key, tensor in tensors(ours, method).items())


@BUILDS
def test_doras_magnitudes_start_as_pefts(build):
    method = METHODS["DoRA"]
    ours, theirs = ml.adapt(build().double(), method, TARGETS), peft.get_peft_model(build().double(), config(method))
    peers = tensors(theirs, method)
    assert all(relative(tensor, peers[key]) < 1e-14 for key, tensor in tensors(ours, method).items() if key[1] == "magnitude")


@BUILDS
@pytest.mark.parametrize("rslora", [False, True])
def test_pissa_in_float32_which_is_all_that_peft_takes(build, rslora):
    """The same product s · B₀A₀ from the same SVD; then, with the same A and B, the same function and gradients."""
    method = ml.PiSSA(3, alpha=5, rslora=rslora)
    ours = ml.adapt(build(), method, TARGETS)
    theirs = peft.get_peft_model(build(), peft.LoraConfig(r=3, lora_alpha=5, use_rslora=rslora, init_lora_weights="pissa", target_modules=TARGETS))
    mine, peers = tensors(ours, method), tensors(theirs, ml.LoRA(3))
    for name, layer in ml.adapters(ours):
        assert relative(layer.scale * layer.B @ layer.A, layer.scale * peers[name, "B"] @ peers[name, "A"]) < 1e-5
    torch.manual_seed(1)
    with torch.no_grad():
        for key, tensor in mine.items():
            tensor.copy_(peers[key].add_(0.2 * torch.randn_like(tensor)))
    assert relative(logits(ours, batch(0)[0]), logits(theirs, batch(0)[0])) < 1e-5
    loss(ours, 0).backward(), loss(theirs, 0).backward()
    assert all(relative(tensor.grad, peers[key].grad) < 1e-5 for key, tensor in mine.items())


SCHEDULES = {
    "all three phases": dict(total_steps=80, warmup_steps=8, final_steps=20, interval=3),
    "the defaults": dict(total_steps=80),
    "no final phase": dict(total_steps=100, warmup_steps=4, interval=3),
}


@pytest.mark.parametrize("weight", [0.0, 0.5], ids=["no penalty", "penalty"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_adaloras_masks_are_equal_at_each_of_80_steps(schedule, weight):
    """PEFT adds its penalty only where the output has a loss and a task type is set, so: Llama, labels, CAUSAL_LM."""
    method = ml.AdaLoRA(4, 2, alpha=5, orthogonal_weight=weight, **SCHEDULES[schedule])
    ours, theirs = pair(llama, method, task_type="CAUSAL_LM")
    optimizers = [torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3) for model in (ours, theirs)]
    counts = []
    for step in range(80):
        ids = batch(step)[0]
        optimizers[0].zero_grad()
        (ours(input_ids=ids, labels=ids).loss + method.penalty(ours)).backward()
        optimizers[0].step()
        method.after_step(ours, step)
        optimizers[1].zero_grad()
        theirs(input_ids=ids, labels=ids).loss.backward()
        optimizers[1].step()
        theirs.base_model.update_and_allocate(step)
        mine, peers = tensors(ours, method), tensors(theirs, method)
        for key, tensor in mine.items():
            if key[1] == "lam":
                assert torch.equal(tensor != 0, peers[key].view(-1) != 0), (step, key)
        if step == 49:                                                    # later, where a gradient has all but vanished, Adam makes rounding grow
            compare(ours, theirs, method, 1e-9)
        counts.append(sum(int((tensor != 0).sum()) for key, tensor in mine.items() if key[1] == "lam"))
    assert counts[0] == 4 * 8 and min(counts) == 2 * 8 if schedule != "no final phase" else min(counts) < 3 * 8
    assert len(set(counts)) > 5


@BUILDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_in_float64_peft_leaves_a_constant_to_be_trained(build, dtype):
    """ranknum, the rank in AdaLoRA's s = alpha / (rank + 1e-5), is a frozen parameter until it is cast: then an optimizer that is given
    every trainable parameter moves it. Everywhere else in this file it is frozen."""
    theirs = peft.get_peft_model(build().to(dtype), config(METHODS["AdaLoRA"]))
    assert [p.requires_grad for name, p in theirs.named_parameters() if ".ranknum." in name] == [dtype == torch.float64] * 8


def test_peft_crashes_where_the_target_is_the_initial_rank_and_we_do_not():
    method = ml.AdaLoRA(4, 4, alpha=5, total_steps=10)
    ours, theirs = pair(llama, method)
    loss(ours, 0).backward(), loss(theirs, 0).backward()
    for step in range(1, 3):
        method.after_step(ours, step)
    assert all(layer.lam.all() for _, layer in ml.adapters(ours))
    with pytest.raises(RuntimeError, match="k"):
        for step in range(1, 3):
            theirs.base_model.update_and_allocate(step)
