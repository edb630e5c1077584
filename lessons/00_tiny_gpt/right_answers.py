"""Right answers in another style than the solutions': each must pass."""

import math
from math import log2

import torch
from torch import Tensor, nn

from minilora import GPTConfig


def causal_attention__einsum(q, k, v):
    scores = torch.einsum("bhtd,bhsd->bhts", q, k).div_(q.size(-1) ** 0.5)
    position = torch.arange(q.size(2))
    scores[..., position[:, None] < position[None, :]] = float("-inf")
    return torch.einsum("bhts,bhse->bhte", scores.softmax(3), v)


def causal_attention__position_by_position(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out = []
    for t in range(q.shape[2]):
        scores = (q[:, :, t : t + 1] * k[:, :, : t + 1]).sum(-1) / math.sqrt(q.shape[-1])
        weights = (scores - scores.amax(-1, keepdim=True)).exp()
        out.append((weights / weights.sum(-1, keepdim=True)).unsqueeze(-2) @ v[:, :, : t + 1])
    return torch.cat(out, dim=2)


def next_byte_nats__indexing(logits: Tensor, ids: Tensor) -> Tensor:
    guess = logits[:, :-1].reshape(-1, logits.shape[-1])
    came = ids[:, 1:].reshape(-1)
    return (guess.logsumexp(-1) - guess[torch.arange(len(came)), came]).mean()


def next_byte_nats__nll(logits: Tensor, ids: Tensor) -> Tensor:
    total = 0.0
    for row, line in zip(logits, ids):
        total = total + nn.functional.nll_loss(row[:-1].log_softmax(1), line[1:], reduction="sum")
    return total / ids[:, 1:].numel()


def bits_per_byte__log2_e(nats: float, text: str) -> float:
    return nats * log2(math.e) / len(bytes(text, "utf-8"))


def grammar_entropy__products(kinds: list[list[int]]) -> float:
    total = 0
    for slots in kinds:
        total += math.log(math.prod(slots) * len(kinds)) / len(kinds)
    return total


def parameter_count__polynomial(config: GPTConfig) -> int:
    return config.width * (2 * config.vocab_size + config.context + 2 + config.layers * (12 * config.width + 13))


def parameter_count__a_loop(config: GPTConfig) -> int:
    w, total = config.width, 0
    for _ in range(config.layers):
        for out, into in [(w, w)] * 4 + [(4 * w, w), (w, 4 * w)]:
            total += out * into + out
        total += 2 * 2 * w
    return total + 2 * w + config.vocab_size * w * 2 + config.context * w


def adamw_step__in_place_on_copies(p, grad, m, v, step, lr, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.0):
    p, m, v = p.clone(), m.clone(), v.clone()
    m.lerp_(grad, 1 - beta1)
    v.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    p.mul_(1 - lr * weight_decay)
    p.addcdiv_(m, v.sqrt().div_(math.sqrt(1 - beta2**step)).add_(eps), value=-lr / (1 - beta1**step))
    return p, m, v


@torch.no_grad()
def adamw_step__decay_last(p, grad, m, v, step, lr, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.0):
    m, v = grad + beta1 * (m - grad), grad.square() + beta2 * (v - grad.square())
    return p - lr * (weight_decay * p + m / (1 - beta1**step) / (torch.sqrt(v / (1 - beta2**step)) + eps)), m, v


def training_bytes__by_dtype(model: nn.Module) -> int:
    total = 0
    for parameter in model.parameters():
        total += parameter.nbytes
        if parameter.requires_grad:
            total += 3 * parameter.nbytes
    return total
