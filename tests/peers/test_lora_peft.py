"""LoRA against PEFT, which nobody here wrote: same factors, same data, on the tiny GPT and on a transformers Llama.

Relative means: the largest difference of a tensor, over the largest value in it. Factors are random, B included, biases too,
and shapes are not square. Trajectories are compared in float64, where 50 steps of AdamW leave no room for chaos.
"""

import copy
import json

import peft
import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import nn

import minilora as ml

TARGETS = ["q_proj", "v_proj", "up_proj", "down_proj"]


def lively(model):
    """Biases that are not zero, or one that is lost or counted twice would hide; and weights of size 1/√in. The families' own
    N(0, 0.02) is for wide models: at width 24 attention is all but uniform, q's gradient a millionth, and float32 mostly rounding."""
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


def llama(**options):
    torch.manual_seed(0)
    shape = dict(vocab_size=256, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                 attention_bias=True, mlp_bias=True)
    return lively(transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape | options)))


MODELS = pytest.mark.parametrize("build", [tiny_gpt, llama])
METHODS = pytest.mark.parametrize("method", [ml.LoRA(rank=3, alpha=5), ml.LoRA(rank=4, alpha=6, rslora=True)], ids=["lora", "rslora"])


def logits(model, ids):
    out = model(ids)
    return getattr(out, "logits", out)


def batch(step):
    ids = torch.randint(256, (3, 13), generator=torch.Generator().manual_seed(step))
    return ids[:, :-1], ids[:, 1:]


def factors(model):
    """{layer: (A, B)} of ours or of PEFT's, by the name the layer has in the plain model."""
    if isinstance(model, peft.PeftModel):
        found = ((name, m) for name, m in model.base_model.model.named_modules() if isinstance(m, peft.tuners.lora.Linear))
        return {name: (m.lora_A["default"].weight, m.lora_B["default"].weight) for name, m in found}
    return {name: (layer.A, layer.B) for name, layer in ml.adapters(model)}


def pair(build, method, dtype=torch.float64, dropout=0.0, targets=TARGETS):
    """The same base adapted by us and by PEFT, with the same random factors."""
    base = build().to(dtype)
    config = peft.LoraConfig(r=method.rank, lora_alpha=method.alpha, lora_dropout=dropout, use_rslora=method.rslora, target_modules=targets)
    ours, theirs = ml.adapt(copy.deepcopy(base), method, targets), peft.get_peft_model(copy.deepcopy(base), config)
    mine, peers = factors(ours), factors(theirs)
    assert mine.keys() == peers.keys() and len(mine) == 2 * len(targets)
    with torch.no_grad():
        for name in mine:
            for one, other in zip(mine[name], peers[name]):
                other.copy_(one.normal_(std=0.2))
    return ours, theirs


def relative(one, other):
    return ((one - other).abs().max() / other.abs().max()).item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(24, 96), (96, 24)])
def test_the_start_is_pefts_bit_for_bit(shape, dtype):
    linear = nn.Linear(*shape, dtype=dtype)
    theirs = peft.get_peft_model(nn.Sequential(linear), peft.LoraConfig(r=3, target_modules=["0"]), autocast_adapter_dtype=False).base_model.model[0]
    torch.manual_seed(5)
    theirs.reset_lora_parameters("default", init_lora_weights=True)
    torch.manual_seed(5)
    ours = ml.LoRA(rank=3).layer(linear)
    assert torch.equal(ours.A, theirs.lora_A["default"].weight) and torch.equal(ours.B, theirs.lora_B["default"].weight)


def step(model, at):
    x, y = batch(at)
    loss = F.cross_entropy(logits(model, x).flatten(0, 1), y.flatten())
    loss.backward()
    return loss


@MODELS
@METHODS
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-10), (torch.float32, 1e-5)], ids=["float64", "float32"])
def test_logits_and_gradients_of_the_first_step(build, method, dtype, tolerance):
    ours, theirs = pair(build, method, dtype)
    assert relative(logits(ours, batch(0)[0]), logits(theirs, batch(0)[0])) < tolerance
    step(ours, 0), step(theirs, 0)
    for name, (A, B) in factors(ours).items():
        for one, other in zip((A, B), factors(theirs)[name]):
            assert one.grad.abs().max() > 0 and relative(one.grad, other.grad) < tolerance, name
    assert ml.trainable_parameters(ours) == theirs.get_nb_trainable_parameters()[0]


@MODELS
@METHODS
def test_fifty_steps_of_adamw(build, method):
    ours, theirs = pair(build, method)
    optimizers = [torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], lr=1e-3) for m in (ours, theirs)]
    start = [A.detach().clone() for A, _ in factors(ours).values()]
    for at in range(50):
        for model, optimizer in zip((ours, theirs), optimizers):
            optimizer.zero_grad()
            step(model, at)
            optimizer.step()
    for (name, mine), began in zip(factors(ours).items(), start):
        assert (mine[0] - began).abs().max() > 1e-2                 # it did move
        assert all(relative(one, other) < 1e-10 for one, other in zip(mine, factors(theirs)[name])), name
    assert relative(logits(ours, batch(99)[0]), logits(theirs, batch(99)[0])) < 1e-10


@MODELS
def test_our_loop_trains_what_pefts_model_and_torchs_adamw_train(build):
    method = ml.LoRA(rank=3, alpha=5)
    ours, theirs = pair(build, method)
    ml.finetune(ours, method, batch, 20, 1e-3, weight_decay=0.01, progress=False)
    optimizer = torch.optim.AdamW([p for p in theirs.parameters() if p.requires_grad], lr=1e-3, weight_decay=0.01)
    for at in range(20):
        optimizer.zero_grad()
        step(theirs, at)
        optimizer.step()
    for name, mine in factors(ours).items():                        # our loss is taken in float32, for the sake of 16-bit models
        assert all(relative(one, other) < 1e-4 for one, other in zip(mine, factors(theirs)[name])), name


@MODELS
def test_dropout_draws_the_same_masks(build):
    ours, theirs = pair(build, ml.LoRA(rank=3, alpha=5, dropout=0.3), dropout=0.3)
    said = []
    for model in (ours.train(), theirs.train()):
        torch.manual_seed(7)
        said.append(logits(model, batch(0)[0]))
    assert relative(*said) < 1e-10
    assert relative(said[0], logits(ours.eval(), batch(0)[0])) > 1e-3


@MODELS
@METHODS
def test_merged_weights(build, method):
    ours, theirs = pair(build, method)
    merged, peers = ml.merge(ours).state_dict(), theirs.merge_and_unload().state_dict()
    assert merged.keys() == peers.keys()
    assert max((merged[name] - peers[name]).abs().max().item() for name in merged) < 1e-14


@MODELS
@METHODS
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_an_adapter_saved_here_loads_in_peft(build, method, dtype, tmp_path):
    ours, _ = pair(build, method, dtype)
    ml.save_adapter(ours, tmp_path)
    theirs = peft.PeftModel.from_pretrained(build().to(dtype), tmp_path).eval()
    if dtype == torch.float64:                                      # in float32 two orders of the same sum differ by about 1e-6
        assert relative(logits(theirs, batch(0)[0]), logits(ours.eval(), batch(0)[0])) < 1e-10
    assert all(torch.equal(one, other) for name in factors(ours) for one, other in zip(factors(ours)[name], factors(theirs)[name]))


@METHODS
@pytest.mark.parametrize("build, targets", [
    (tiny_gpt, TARGETS), (llama, TARGETS), (tiny_gpt, r".*\.(q_proj|up_proj)"), (llama, r".*\.(q_proj|up_proj)"),
    (llama, "all-linear"),                                          # PEFT takes it for transformers' own models only, and writes the names
], ids=["tiny_gpt, names", "llama, names", "tiny_gpt, pattern", "llama, pattern", "llama, all-linear"])
def test_an_adapter_saved_by_peft_loads_here(build, method, targets, tmp_path):
    config = peft.LoraConfig(r=method.rank, lora_alpha=method.alpha, use_rslora=method.rslora, target_modules=targets)
    theirs = peft.get_peft_model(build().double(), config).eval()
    with torch.no_grad():
        for A, B in factors(theirs).values():
            B.normal_(std=0.2)
    theirs.save_pretrained(tmp_path)
    ours = ml.load_adapter(build().double(), tmp_path).eval()
    assert [layer.method for _, layer in ml.adapters(ours)][0] == method
    assert factors(ours).keys() == factors(theirs).keys()
    assert relative(logits(ours, batch(0)[0]), logits(theirs, batch(0)[0])) < 1e-10


def test_all_linear_written_in_the_file_means_what_peft_means_by_it(tmp_path):
    theirs = peft.get_peft_model(llama(), peft.LoraConfig(r=3, target_modules="all-linear"))
    theirs.save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"target_modules": "all-linear"}))
    ours = ml.load_adapter(llama(), tmp_path)
    assert factors(ours).keys() == factors(theirs).keys() and not any("lm_head" in name for name in factors(ours))


@pytest.mark.parametrize("field, value", [
    ("init_lora_weights", "olora"), ("lora_bias", True), ("trainable_token_indices", [1, 2]), ("target_parameters", ["lm_head.weight"]),
])
def test_what_peft_can_and_we_do_not_is_refused_by_name(field, value, tmp_path):
    theirs = peft.get_peft_model(llama(), peft.LoraConfig(r=3, target_modules=["q_proj", "v_proj"], **{field: value}))
    theirs.save_pretrained(tmp_path)
    model = llama()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=f"adapter_config.json: {field}"):
        ml.load_adapter(model, tmp_path)
    assert not list(ml.adapters(model)) and all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_other_peft_methods_are_refused(tmp_path):
    peft.get_peft_model(llama(), peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[])).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="peft_type is 'IA3'"):
        ml.load_adapter(llama(), tmp_path)


def t5():
    torch.manual_seed(0)
    return transformers.T5ForConditionalGeneration(transformers.T5Config(
        vocab_size=64, d_model=24, d_kv=8, d_ff=40, num_layers=2, num_heads=3, decoder_start_token_id=0, dropout_rate=0.0))


def bert():
    torch.manual_seed(0)
    return transformers.BertModel(transformers.BertConfig(vocab_size=64, hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=40))


@pytest.mark.parametrize("build, targets, expected", [(t5, ["q", "v", "wo"], 16), (bert, ["query", "value"], 4), (bert, None, 12), (llama, None, 14)],
                         ids=["t5", "bert", "bert, all", "llama, all"])
def test_any_transformers_model_is_adapted_trained_merged_and_unloaded(build, targets, expected):
    model = build().eval()
    before = copy.deepcopy(model.state_dict())
    ids = torch.randint(64, (2, 7), generator=torch.Generator().manual_seed(0))

    def run():
        out = model(input_ids=ids, labels=ids) if build is t5 else model(input_ids=ids)
        return out[1] if build is t5 else out[0]

    with torch.no_grad():
        original = run()
        ml.adapt(model, ml.LoRA(rank=3, alpha=5), targets)
        assert len(list(ml.adapters(model))) == expected and torch.equal(run(), original)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(2):                                             # at the first step only B moves, at the second A too
        optimizer.zero_grad()
        run()[..., :5].sum().backward()
        optimizer.step()
    assert all(layer.B.any() and layer.A.grad.any() for _, layer in ml.adapters(model))
    adapted = run()
    assert (adapted - original).abs().max() > 1e-3
    plain, model = model, ml.merge(copy.deepcopy(model))
    assert not list(ml.adapters(model)) and torch.allclose(run(), adapted, atol=1e-5)
    model = ml.unload(plain)
    assert model.state_dict().keys() == before.keys() and all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_tied_head_is_left_alone_by_default_and_refused_when_named():
    model = llama(tie_word_embeddings=True)
    with pytest.raises(ValueError, match="lm_head: its weight is tied"):
        ml.adapt(model, ml.LoRA(rank=2), ["lm_head"])
    assert "lm_head" not in dict(ml.adapters(ml.adapt(model, ml.LoRA(rank=2))))
    assert isinstance(model.lm_head, nn.Linear)


def test_the_configuration_is_one_that_peft_reads_without_a_word(tmp_path, recwarn):
    ours, _ = pair(llama, ml.LoRA(rank=3, alpha=5), torch.float32)
    ml.save_adapter(ours, tmp_path)
    config = peft.PeftConfig.from_pretrained(tmp_path)
    assert (config.r, config.lora_alpha, sorted(config.target_modules)) == (3, 5, sorted(json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"]))
    assert not [warning for warning in recwarn if "unexpected" in str(warning.message).lower()]
