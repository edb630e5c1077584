"""finetune on transformers models with batches that are dicts, as their users have them: the loss is the model's own."""

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration

import minilora as ml
from minilora.evidence.ledger import bytes_alive
from minilora.safety.recompute import recomputed, recomputing


def llama():
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=24, intermediate_size=32, num_hidden_layers=2, num_attention_heads=3, num_key_value_heads=3))


def gpt2():
    return GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=32, n_embd=24, n_layer=2, n_head=3, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0))


def t5():
    return T5ForConditionalGeneration(T5Config(vocab_size=64, d_model=24, d_kv=8, d_ff=32, num_layers=1, num_heads=3, decoder_start_token_id=0, dropout_rate=0.0))


def bert():
    return BertForSequenceClassification(BertConfig(vocab_size=64, hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=32, num_labels=3,
                                                    hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0))


def batches(kind):
    def batch(step):
        dice = torch.Generator().manual_seed(step)
        ids, mask = torch.randint(1, 64, (2, 12), generator=dice), torch.ones(2, 12, dtype=torch.int64)
        mask[1, 12 - step % 6:] = 0
        labels = ids % 3 == 1 if kind is bert else ids.masked_fill(mask == 0, -100)
        return {"input_ids": ids, "attention_mask": mask, "labels": labels[:, 0].long() if kind is bert else labels}

    return batch


def made(kind):
    torch.manual_seed(0)
    return kind()


CASES = [(llama, ml.LoRA(2)), (llama, ml.AdaLoRA(3, 2)), (llama, ml.LoRADrop(2, warmup_steps=2, threshold=1.0)), (gpt2, ml.FullFineTuning()), (t5, ml.LoRA(2)), (bert, ml.LoRA(2))]


@pytest.mark.parametrize("kind, method", CASES, ids=[f"{kind.__name__} {type(method).__name__}" for kind, method in CASES])
def test_dicts_train_and_accumulated_ones_move_as_one(kind, method):
    """Labels that count differ from batch to batch, and where the model moves them by one, so does the weight."""
    one, other, alone = made(kind), made(kind), batches(kind)
    accumulated = ml.finetune(one, method, alone, 3, 1e-3, accumulate=4, progress=False)
    together = ml.finetune(other, method, lambda step: {name: torch.cat([alone(4 * step + i)[name] for i in range(4)]) for name in alone(0)}, 3, 1e-3, progress=False)
    assert accumulated["loss"] == pytest.approx(together["loss"], abs=4e-6)
    for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True):
        assert torch.allclose(a.float(), b.float(), rtol=0, atol=1e-6)


def test_without_labels_a_causal_model_learns_its_inputs_and_another_is_refused():
    def unlabelled(step):
        return {name: part for name, part in batches(llama)(step).items() if name != "labels"}

    one, other = made(llama), made(llama)
    expected = ml.finetune(one, ml.LoRA(2), batches(llama), 3, 1e-2, progress=False)
    assert ml.finetune(other, ml.LoRA(2), unlabelled, 3, 1e-2, progress=False) == expected
    with pytest.raises(ValueError, match="gives no loss for a batch of input_ids, attention_mask: it needs labels"):
        ml.finetune(made(bert), ml.LoRA(2), unlabelled, 3, 1e-2, progress=False)


def test_a_dict_without_a_label_that_counts_is_said():
    def nothing(step):
        return batches(llama)(step) | {"labels": torch.full((2, 12), -100)}

    with pytest.raises(FloatingPointError, match="at step 0: all targets of its batch are -100"):
        ml.finetune(made(llama), ml.LoRA(2), nothing, 3, 1e-2, progress=False)


@pytest.mark.parametrize("checkpointing", ["non-reentrant", "reentrant"])
@pytest.mark.parametrize("kind, method", CASES, ids=[f"{kind.__name__} {type(method).__name__}" for kind, method in CASES])
def test_blocks_computed_again_in_transformers_way_give_the_same_numbers(kind, method, checkpointing):
    plain, again, seen = made(kind), made(kind), []
    expected = ml.finetune(plain, method, batches(kind), 3, 1e-2, progress=False)
    before = [sorted(vars(module)) for module in again.modules()]
    handle = again.register_forward_pre_hook(lambda *_: seen.append(again.is_gradient_checkpointing))
    history = ml.finetune(again, method, batches(kind), 3, 1e-2, checkpointing=checkpointing, progress=False)
    pairs = zip(plain.state_dict().values(), again.state_dict().values(), strict=True)
    if kind is t5:                                         # which attends by another formula without its cache
        assert history["loss"] == pytest.approx(expected["loss"], rel=1e-6) and all(torch.allclose(a.float(), b.float(), atol=1e-5) for a, b in pairs)
    else:
        assert history == expected and all(torch.equal(a, b) for a, b in pairs)
    handle.remove()
    assert len(seen) >= 3 and all(seen) and not again.is_gradient_checkpointing
    if not any(True for _ in ml.adapters(again)):
        assert [sorted(vars(module)) for module in again.modules()] == before


def test_nothing_is_said_about_a_cache_that_nobody_asked_for(monkeypatch):
    said, model = [], made(llama)
    monkeypatch.setattr("transformers.utils.generic.logger.warning_once", said.append)
    ml.finetune(model, ml.LoRA(2), batches(llama), 2, 1e-2, checkpointing="non-reentrant", progress=False)
    assert said == [] and model.config.use_cache is True


def test_transformers_blocks_computed_again_keep_less():
    model = ml.adapt(made(llama), ml.LoRA(2)).train()

    def alive(kind):
        def loss():
            with recomputing(model, kind), recomputed(model, kind):
                return ml.next_byte_loss(model, batches(llama)(0))

        return bytes_alive(model, loss)

    assert max(alive("reentrant"), alive("non-reentrant")) < 0.5 * alive(None)
