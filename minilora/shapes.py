"""The shapes of real models, so that what a method costs on one can be told without having it.

A shape is known by name, or read from the config.json that every model on Hugging Face has. Nothing is downloaded.
"""

import json
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Kind:
    """The linear layers of one name: `count` of them, in -> out."""

    name: str
    count: int
    out: int
    into: int
    bias: bool = False

    @property
    def parameters(self) -> int:
        return self.count * self.out * (self.into + self.bias)


@dataclass(frozen=True)
class Shape:
    """A model: its linear layers in the blocks, and how many parameters all else has (embeddings, norms, the output head)."""

    name: str
    kinds: tuple[Kind, ...]
    rest: int

    @property
    def parameters(self) -> int:
        return sum(kind.parameters for kind in self.kinds) + self.rest

    def targets(self, names: list[str] | None = None) -> tuple[Kind, ...]:
        """The kinds named; all of them where none is. Raises ValueError naming those there are."""
        there = {kind.name for kind in self.kinds}
        for name in names or ():
            if name not in there:
                raise ValueError(f"{self.name} has no linear layers named {name!r}; it has {', '.join(sorted(there))}")
        return tuple(kind for kind in self.kinds if not names or kind.name in names)


def gated(name: str, c: dict) -> Shape:
    """Llama and its kin: grouped keys and values, an MLP with a gate, RMS norms."""
    width, inner, layers, heads = c["hidden_size"], c["intermediate_size"], c["num_hidden_layers"], c["num_attention_heads"]
    head = c.get("head_dim") or width // heads
    q, kv = heads * head, (c.get("num_key_value_heads") or heads) * head
    kind = c.get("model_type")
    qkv_bias = kind == "qwen2" or bool(c.get("attention_bias"))
    o_bias, mlp_bias = bool(c.get("attention_bias")) and kind != "qwen2", bool(c.get("mlp_bias"))
    kinds = (Kind("q_proj", layers, q, width, qkv_bias), Kind("k_proj", layers, kv, width, qkv_bias), Kind("v_proj", layers, kv, width, qkv_bias),
             Kind("o_proj", layers, width, q, o_bias), Kind("gate_proj", layers, inner, width, mlp_bias), Kind("up_proj", layers, inner, width, mlp_bias),
             Kind("down_proj", layers, width, inner, mlp_bias))
    norms = 2 * width + (2 * head if kind == "qwen3" else 0)
    tied = c.get("tie_word_embeddings", kind == "gemma")
    return Shape(name, kinds, layers * norms + width + c["vocab_size"] * width * (1 if tied else 2))


def gpt_neox(name: str, c: dict) -> Shape:
    width, inner, layers = c["hidden_size"], c["intermediate_size"], c["num_hidden_layers"]
    bias = c.get("attention_bias", True)
    kinds = (Kind("query_key_value", layers, 3 * width, width, bias), Kind("dense", layers, width, width, bias),
             Kind("dense_h_to_4h", layers, inner, width, True), Kind("dense_4h_to_h", layers, width, inner, True))
    return Shape(name, kinds, layers * 4 * width + 2 * width + c["vocab_size"] * width * (1 if c.get("tie_word_embeddings") else 2))


def opt(name: str, c: dict) -> Shape:
    width, inner, layers, narrow = c["hidden_size"], c["ffn_dim"], c["num_hidden_layers"], c.get("word_embed_proj_dim") or c["hidden_size"]
    bias = c.get("enable_bias", True)
    kinds = (*(Kind(part, layers, width, width, bias) for part in ("q_proj", "k_proj", "v_proj", "out_proj")), Kind("fc1", layers, inner, width, bias),
             Kind("fc2", layers, width, inner, bias))
    final = 2 * width if c.get("do_layer_norm_before", True) and not c.get("_remove_final_layer_norm") else 0
    projections = 2 * width * narrow if narrow != width else 0
    return Shape(name, kinds, layers * 4 * width + final + projections + (c["max_position_embeddings"] + 2) * width + c["vocab_size"] * narrow)


def gpt2(name: str, c: dict) -> Shape:
    """Its layers are Conv1D, which hold W transposed; the counts are the same."""
    width, layers = c["n_embd"], c["n_layer"]
    inner = c.get("n_inner") or 4 * width
    kinds = (Kind("c_attn", layers, 3 * width, width, True), Kind("attn.c_proj", layers, width, width, True), Kind("c_fc", layers, inner, width, True),
             Kind("mlp.c_proj", layers, width, inner, True))
    return Shape(name, kinds, layers * 4 * width + 2 * width + (c["vocab_size"] + c["n_positions"]) * width)


def chatglm(name: str, c: dict) -> Shape:
    """ChatGLM-6B: one fused matrix for q, k and v, an MLP without a gate, biases everywhere; the output head is the embedding."""
    width, inner, layers = c["hidden_size"], c["inner_hidden_size"], c["num_layers"]
    kinds = (Kind("query_key_value", layers, 3 * width, width, True), Kind("dense", layers, width, width, True),
             Kind("dense_h_to_4h", layers, inner, width, True), Kind("dense_4h_to_h", layers, width, inner, True))
    return Shape(name, kinds, layers * 4 * width + 2 * width + c["vocab_size"] * width)


FAMILIES = {"llama": gated, "mistral": gated, "qwen2": gated, "qwen3": gated, "gemma": gated, "gpt_neox": gpt_neox, "opt": opt, "gpt2": gpt2,
            "chatglm": chatglm}
LLAMA = {"model_type": "llama", "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32, "vocab_size": 32000}
KNOWN = {
    "chatglm-6b": {"model_type": "chatglm", "hidden_size": 4096, "inner_hidden_size": 16384, "num_layers": 28, "vocab_size": 130528},
    "llama-7b": LLAMA,
    "llama-13b": LLAMA | {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40},
    "llama-3-8b": LLAMA | {"intermediate_size": 14336, "num_key_value_heads": 8, "vocab_size": 128256},
    "gpt2": {"model_type": "gpt2", "n_embd": 768, "n_layer": 12, "vocab_size": 50257, "n_positions": 1024},
}


def shape(name: str) -> Shape:
    """The shape of that name, or of the config.json at that path. Raises ValueError that says which there are, or what the file lacks."""
    if name.lower() in KNOWN:
        config = KNOWN[name.lower()]
        return FAMILIES[config["model_type"]](name.lower(), config)
    path = Path(name)
    if not path.exists():
        raise ValueError(f"no shape named {name!r} and no such file; known are {', '.join(KNOWN)}, or give a model's config.json")
    path = path / "config.json" if path.is_dir() else path
    try:
        config = json.loads(path.read_text())
        kind = config["model_type"]
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError):
        raise ValueError(f"{path}: not a model's config.json (no model_type in it)") from None
    if kind not in FAMILIES:
        raise ValueError(f"{path}: the shape of a {kind!r} is not known here; known are {', '.join(FAMILIES)}")
    try:
        return FAMILIES[kind](path.parent.name or kind, config)
    except (KeyError, TypeError, ZeroDivisionError) as error:
        raise ValueError(f"{path}: {error} is missing or no number") from None
