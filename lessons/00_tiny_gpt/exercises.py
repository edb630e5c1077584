"""Lesson 00: what does full fine-tuning cost?

Write each function where it says `raise NotImplementedError`, then run `pytest lessons/00_tiny_gpt`. Stuck? See hints.md.
"""

from torch import Tensor, nn

from minilora import GPTConfig


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q kᵀ / √d) v, where position t sees only the positions 0 … t.

    q, k: (B, heads, T, d)   v: (B, heads, T, e)   ->   (B, heads, T, e)
    Without F.scaled_dot_product_attention: that is what your answer is compared with.
    """
    raise NotImplementedError


def next_byte_nats(logits: Tensor, ids: Tensor) -> Tensor:
    """Mean of -log p(ids[b, t+1] | ids[b, 0 … t]) over the B · (T - 1) predictions, in nats.

    logits: (B, T, V), where logits[b, t] is the model's guess after reading ids[b, 0 … t]   ids: (B, T) int64   ->   scalar
    The logits at the last position guess a byte that is not there: they do not count. Write it without F.cross_entropy.
    """
    raise NotImplementedError


def bits_per_byte(nats: float, text: str) -> float:
    """A model pays `nats` (natural logarithm) for the whole of `text`. How many bits (logarithm to base 2) is that for each byte of its UTF-8?"""
    raise NotImplementedError


def grammar_entropy(kinds: list[list[int]]) -> float:
    """H = -Σ p log p over all documents of a small grammar, in nats: the floor under every model's expected loss.

    A document is one of `kinds`, each equally likely; kinds[i] holds, for each slot of kind i, how many choices it has, each
    equally likely. No two choices lead to the same text. [[24, 16], [12]] is two kinds, one with two slots and one with one.
    """
    raise NotImplementedError


def parameter_count(config: GPTConfig) -> int:
    """How many numbers TinyGPT(config) learns: a formula in vocab_size, context, width and layers, no model built.

    Embeddings for bytes and positions; in each block six Linears with bias (q, k, v, o, up, down) and two LayerNorms (weight
    and bias each); one last LayerNorm; a head without bias that is not tied to the embedding.
    """
    raise NotImplementedError


def adamw_step(
    p: Tensor, grad: Tensor, m: Tensor, v: Tensor, step: int, lr: float,
    beta1: float = 0.9, beta2: float = 0.999, eps: float = 1e-8, weight_decay: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """One step of AdamW: the new (p, m, v). All tensors have the shape of p; `step` is 1 the first time, when m and v are zero.

        m ← β₁ m + (1 - β₁) g          m̂ = m / (1 - β₁ˢᵗᵉᵖ)          p ← (1 - lr · weight_decay) p
        v ← β₂ v + (1 - β₂) g²         v̂ = v / (1 - β₂ˢᵗᵉᵖ)          p ← p - lr · m̂ / (√v̂ + eps)

    Return the running m and v themselves, not m̂ and v̂. Leave the tensors you were given as they are.
    """
    raise NotImplementedError


def training_bytes(model: nn.Module) -> int:
    """Bytes that training `model` with Adam keeps from step to step: every parameter; and for each trainable one (requires_grad)
    also its gradient and Adam's two moments, all in the parameter's own dtype. Activations are not counted.
    """
    raise NotImplementedError
