"""Lesson 00, worked."""

import math

import torch
from torch import Tensor, nn

from minilora import GPTConfig


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    T, d = q.shape[-2:]
    scores = q @ k.transpose(-1, -2) / math.sqrt(d)                        # (B, heads, T, T): row t asks, column s answers
    later = torch.ones(T, T, dtype=torch.bool, device=q.device).triu(1)    # True where s > t
    return scores.masked_fill(later, -math.inf).softmax(-1) @ v            # (B, heads, T, e)


def next_byte_nats(logits: Tensor, ids: Tensor) -> Tensor:
    log_p = logits[:, :-1].log_softmax(-1)                                 # (B, T-1, V)
    return -log_p.gather(-1, ids[:, 1:, None]).mean()


def bits_per_byte(nats: float, text: str) -> float:
    return nats / math.log(2) / len(text.encode())


def grammar_entropy(kinds: list[list[int]]) -> float:
    inside = [sum(math.log(choices) for choices in slots) for slots in kinds]
    return math.log(len(kinds)) + sum(inside) / len(kinds)


def parameter_count(config: GPTConfig) -> int:
    w = config.width
    attention = 4 * (w * w + w)                                            # q, k, v, o
    mlp = (4 * w * w + 4 * w) + (4 * w * w + w)                            # up, down
    norm = 2 * w
    block = attention + mlp + 2 * norm                                     # 12 w² + 13 w
    embeddings = (config.vocab_size + config.context) * w
    return embeddings + config.layers * block + norm + config.vocab_size * w


@torch.no_grad()                                                           # a step is no part of the graph
def adamw_step(
    p: Tensor, grad: Tensor, m: Tensor, v: Tensor, step: int, lr: float,
    beta1: float = 0.9, beta2: float = 0.999, eps: float = 1e-8, weight_decay: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    m = beta1 * m + (1 - beta1) * grad
    v = beta2 * v + (1 - beta2) * grad**2
    m_hat = m / (1 - beta1**step)                                          # both start at 0, and this makes up for it
    v_hat = v / (1 - beta2**step)
    p = (1 - lr * weight_decay) * p                                        # decoupled: the decay never passes through m and v
    return p - lr * m_hat / (v_hat.sqrt() + eps), m, v


def training_bytes(model: nn.Module) -> int:
    copies = {True: 4, False: 1}                                           # weight, gradient, m, v; or the weight alone
    return sum(p.numel() * p.element_size() * copies[p.requires_grad] for p in model.parameters())
