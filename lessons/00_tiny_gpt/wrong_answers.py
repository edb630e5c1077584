"""Plausible mistakes in lesson 00. The tests must reject each one, with a message that names it."""

import math

import torch
from torch import Tensor, nn

from lessons import provokes
from minilora import GPTConfig


@provokes("looks ahead")
def causal_attention__no_mask(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).softmax(-1) @ v


@provokes("a zero is still a vote")
def causal_attention__zeros_for_minus_infinity(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).tril().softmax(-1) @ v


@provokes("keep the diagonal")
def causal_attention__blind_to_itself(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    T, d = q.shape[-2:]
    return (q @ k.transpose(-1, -2) / math.sqrt(d)).masked_fill(torch.ones(T, T, dtype=torch.bool).triu(0), -math.inf).softmax(-1) @ v


@provokes("softmax over the keys")
def causal_attention__softmax_over_queries(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    T, d = q.shape[-2:]
    return (q @ k.transpose(-1, -2) / math.sqrt(d)).masked_fill(torch.ones(T, T, dtype=torch.bool).triu(1), -math.inf).softmax(-2) @ v


@provokes("divided by √d")
def causal_attention__divided_by_d(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    T, d = q.shape[-2:]
    return (q @ k.transpose(-1, -2) / d).masked_fill(torch.ones(T, T, dtype=torch.bool).triu(1), -math.inf).softmax(-1) @ v


@provokes("divided by √d")
def causal_attention__not_scaled(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    T = q.shape[-2]
    return (q @ k.transpose(-1, -2)).masked_fill(torch.ones(T, T, dtype=torch.bool).triu(1), -math.inf).softmax(-1) @ v


@provokes("guess the byte at t + 1")
def next_byte_nats__not_shifted(logits: Tensor, ids: Tensor) -> Tensor:
    return -logits.log_softmax(-1).gather(-1, ids[:, :, None]).mean()


@provokes("guess the byte at t + 1")
def next_byte_nats__shifted_the_other_way(logits: Tensor, ids: Tensor) -> Tensor:
    return -logits[:, 1:].log_softmax(-1).gather(-1, ids[:, :-1, None]).mean()


@provokes("the mean, not the sum")
def next_byte_nats__summed(logits: Tensor, ids: Tensor) -> Tensor:
    return -logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None]).sum()


@provokes("the natural logarithm")
def next_byte_nats__in_bits(logits: Tensor, ids: Tensor) -> Tensor:
    return -logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None]).mean() / math.log(2)


@provokes("not -log of the mean p")
def next_byte_nats__log_of_the_mean(logits: Tensor, ids: Tensor) -> Tensor:
    return -logits[:, :-1].softmax(-1).gather(-1, ids[:, 1:, None]).mean().log()


@provokes("use log_softmax")
def next_byte_nats__log_after_softmax(logits: Tensor, ids: Tensor) -> Tensor:
    return -logits[:, :-1].softmax(-1).gather(-1, ids[:, 1:, None]).log().mean()


@provokes("a byte is not a character")
def bits_per_byte__of_characters(nats: float, text: str) -> float:
    return nats / math.log(2) / len(text)


@provokes("divide by ln 2")
def bits_per_byte__still_nats(nats: float, text: str) -> float:
    return nats / len(text.encode())


@provokes("divide by ln 2")
def bits_per_byte__multiplied(nats: float, text: str) -> float:
    return nats * math.log(2) / len(text.encode())


@provokes("which kind it is has to be told too")
def grammar_entropy__kind_for_free(kinds: list[list[int]]) -> float:
    return sum(math.log(n) for slots in kinds for n in slots) / len(kinds)


@provokes("average over kinds")
def grammar_entropy__kinds_summed(kinds: list[list[int]]) -> float:
    return math.log(len(kinds)) + sum(math.log(n) for slots in kinds for n in slots)


@provokes("no log of the number of documents")
def grammar_entropy__documents_equally_likely(kinds: list[list[int]]) -> float:
    return math.log(sum(math.prod(slots) for slots in kinds))


@provokes("so their logarithms add")
def grammar_entropy__choices_added(kinds: list[list[int]]) -> float:
    return math.log(len(kinds)) + sum(math.log(max(1, sum(slots))) for slots in kinds) / len(kinds)


@provokes("nats")
def grammar_entropy__in_bits(kinds: list[list[int]]) -> float:
    return math.log2(len(kinds)) + sum(math.log2(n) for slots in kinds for n in slots) / len(kinds)


@provokes("all six biases and both norms")
def parameter_count__without_biases(config: GPTConfig) -> int:
    w = config.width
    return (2 * config.vocab_size + config.context) * w + config.layers * (12 * w * w + 4 * w) + 2 * w


@provokes("both norms (weight and bias)")
def parameter_count__norms_without_bias(config: GPTConfig) -> int:
    w = config.width
    return (2 * config.vocab_size + config.context) * w + config.layers * (12 * w * w + 11 * w) + w


@provokes("a head of its own")
def parameter_count__head_tied(config: GPTConfig) -> int:
    w = config.width
    return (config.vocab_size + config.context) * w + config.layers * (12 * w * w + 13 * w) + 2 * w


@provokes("without bias")
def parameter_count__head_with_bias(config: GPTConfig) -> int:
    w = config.width
    return (2 * config.vocab_size + config.context) * w + config.layers * (12 * w * w + 13 * w) + 2 * w + config.vocab_size


@provokes("the last norm")
def parameter_count__last_norm_forgotten(config: GPTConfig) -> int:
    w = config.width
    return (2 * config.vocab_size + config.context) * w + config.layers * (12 * w * w + 13 * w)


@provokes("Heads share the width")
def parameter_count__attention_times_heads(config: GPTConfig) -> int:
    w = config.width
    return (2 * config.vocab_size + config.context) * w + config.layers * (config.heads * 4 * (w * w + w) + 8 * w * w + 9 * w) + 2 * w


@provokes("divide m and v by 1 - βˢᵗᵉᵖ")
def adamw_step__moments_not_corrected(
    p: Tensor, grad: Tensor, m: Tensor, v: Tensor, step: int, lr: float,
    beta1: float = 0.9, beta2: float = 0.999, eps: float = 1e-8, weight_decay: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    m, v = beta1 * m + (1 - beta1) * grad, beta2 * v + (1 - beta2) * grad**2
    return (1 - lr * weight_decay) * p - lr * m / (v.sqrt() + eps), m, v


@provokes("is every β raised to the power of step")
def adamw_step__correction_of_step_one_always(
    p: Tensor, grad: Tensor, m: Tensor, v: Tensor, step: int, lr: float,
    beta1: float = 0.9, beta2: float = 0.999, eps: float = 1e-8, weight_decay: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    m, v = beta1 * m + (1 - beta1) * grad, beta2 * v + (1 - beta2) * grad**2
    return (1 - lr * weight_decay) * p - lr * m / (1 - beta1) / ((v / (1 - beta2)).sqrt() + eps), m, v


@provokes("is eps inside the square root?")
def adamw_step__eps_inside_the_root(
    p: Tensor, grad: Tensor, m: Tensor, v: Tensor, step: int, lr: float,
    beta1: float = 0.9, beta2: float = 0.999, eps: float = 1e-8, weight_decay: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    m, v = beta1 * m + (1 - beta1) * grad, beta2 * v + (1 - beta2) * grad**2
    m_hat, v_hat = m / (1 - beta1**step), v / (1 - beta2**step)
    return (1 - lr * weight_decay) * p - lr * m_hat / (v_hat + eps).sqrt(), m, v


@provokes("no part of the gradient")
def adamw_step__decay_in_the_gradient(
    p: Tensor, grad: Tensor, m: Tensor, v: Tensor, step: int, lr: float,
    beta1: float = 0.9, beta2: float = 0.999, eps: float = 1e-8, weight_decay: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    grad = grad + weight_decay * p
    m, v = beta1 * m + (1 - beta1) * grad, beta2 * v + (1 - beta2) * grad**2
    m_hat, v_hat = m / (1 - beta1**step), v / (1 - beta2**step)
    return p - lr * m_hat / (v_hat.sqrt() + eps), m, v


@provokes("lr scales it")
def adamw_step__decay_without_lr(
    p: Tensor, grad: Tensor, m: Tensor, v: Tensor, step: int, lr: float,
    beta1: float = 0.9, beta2: float = 0.999, eps: float = 1e-8, weight_decay: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    m, v = beta1 * m + (1 - beta1) * grad, beta2 * v + (1 - beta2) * grad**2
    m_hat, v_hat = m / (1 - beta1**step), v / (1 - beta2**step)
    return (1 - weight_decay) * p - lr * m_hat / (v_hat.sqrt() + eps), m, v


@provokes("return the running m and v")
def adamw_step__corrected_moments_returned(
    p: Tensor, grad: Tensor, m: Tensor, v: Tensor, step: int, lr: float,
    beta1: float = 0.9, beta2: float = 0.999, eps: float = 1e-8, weight_decay: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    m, v = beta1 * m + (1 - beta1) * grad, beta2 * v + (1 - beta2) * grad**2
    m, v = m / (1 - beta1**step), v / (1 - beta2**step)
    return (1 - lr * weight_decay) * p - lr * m / (v.sqrt() + eps), m, v


@provokes("weight, gradient and two moments")
def training_bytes__size_of_the_model(model: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters())


@provokes("weight, gradient and two moments")
def training_bytes__one_moment(model: nn.Module) -> int:
    return sum(p.numel() * p.element_size() * (3 if p.requires_grad else 1) for p in model.parameters())


@provokes("no gradient and no moments")
def training_bytes__frozen_counts_in_full(model: nn.Module) -> int:
    return sum(4 * p.numel() * p.element_size() for p in model.parameters())


@provokes("a frozen parameter still lies there")
def training_bytes__frozen_counts_nothing(model: nn.Module) -> int:
    return sum(4 * p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)


@provokes("element_size()")
def training_bytes__always_float32(model: nn.Module) -> int:
    return sum(p.numel() * (16 if p.requires_grad else 4) for p in model.parameters())


# Nearly right: each of these passes where one size is tried, or nobody looks at what was given or at the gradient.

@provokes("divided by √d")
def causal_attention__width_written_in(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    T = q.shape[-2]
    return (q @ k.transpose(-1, -2) / math.sqrt(8)).masked_fill(torch.ones(T, T, dtype=torch.bool).triu(1), -math.inf).softmax(-1) @ v


@provokes("changed its argument q")
def causal_attention__spoils_q(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    T, d = q.shape[-2:]
    q /= math.sqrt(d)
    return (q @ k.transpose(-1, -2)).masked_fill(torch.ones(T, T, dtype=torch.bool).triu(1), -math.inf).softmax(-1) @ v


@provokes("no gradient reaches")
def causal_attention__weights_detached(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    T, d = q.shape[-2:]
    return (q @ k.transpose(-1, -2) / math.sqrt(d)).masked_fill(torch.ones(T, T, dtype=torch.bool).triu(1), -math.inf).softmax(-1).detach() @ v


@provokes("no gradient reaches logits")
def next_byte_nats__detached(logits: Tensor, ids: Tensor) -> Tensor:
    return -logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None]).mean().detach()


@provokes("a Tensor is wanted, got float")
def next_byte_nats__a_number(logits: Tensor, ids: Tensor) -> Tensor:
    return -logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None]).mean().item()


@provokes("the mean, not the sum")
def next_byte_nats__length_written_in(logits: Tensor, ids: Tensor) -> Tensor:
    return -logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None]).sum() / (len(ids) * 6)


@provokes("divide by ln 2")
def bits_per_byte__floored(nats: float, text: str) -> float:
    return nats / math.log(2) // len(text.encode())


@provokes("changed its argument kinds")
def grammar_entropy__empties_the_grammar(kinds: list[list[int]]) -> float:
    total, count = 0.0, len(kinds)
    while kinds:
        total += sum(math.log(n) for n in kinds.pop()) / count
    return math.log(count) + total


@provokes("changed its argument m")
def adamw_step__moments_in_place(
    p: Tensor, grad: Tensor, m: Tensor, v: Tensor, step: int, lr: float,
    beta1: float = 0.9, beta2: float = 0.999, eps: float = 1e-8, weight_decay: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    m.mul_(beta1).add_((1 - beta1) * grad)
    v.mul_(beta2).add_((1 - beta2) * grad**2)
    m_hat, v_hat = m / (1 - beta1**step), v / (1 - beta2**step)
    return (1 - lr * weight_decay) * p - lr * m_hat / (v_hat.sqrt() + eps), m, v


@provokes("changed its argument model")
def training_bytes__thaws_the_model(model: nn.Module) -> int:
    total = sum(p.numel() * p.element_size() * (4 if p.requires_grad else 1) for p in model.parameters())
    model.requires_grad_(True).eval()
    return total
