"""The shapes of real models, so that what a method costs on one can be told without having it.

A shape is known by name, or read from the config.json that every model on Hugging Face has. Nothing is downloaded.
"""

import json
from dataclasses import dataclass
from pathlib import Path

MOST = 2**31 - 1                                              # the largest size believed


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
class Reading:
    """`tensors` tensors, each read by `times` layers of each of these kinds."""

    tensors: int
    names: tuple[str, ...]
    times: int = 1


@dataclass(frozen=True)
class Shape:
    """A model: its linear layers in the blocks, how many parameters all else has (embeddings, norms, the output head), and which layers
    read one tensor."""

    name: str
    kinds: tuple[Kind, ...]
    rest: int
    readings: tuple[Reading, ...] = ()

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

    def read_again(self, kinds: tuple[Kind, ...]) -> int:
        """Numbers of a token that several of these layers read, counted once for each layer but the first."""
        again = 0
        for reading in self.readings:
            widths = [kind.into for kind in kinds if kind.name in reading.names]
            again += reading.tensors * max(0, len(widths) * reading.times - 1) * max(widths, default=0)       # they read one tensor: of one width
        return again


def size(c: dict, key: str, default: int | None = None) -> int:
    """The whole number at `key`. The default stands in where it is left out or null; without one that is refused, as is any other value."""
    value = c.get(key)
    if value is None:
        if default is None:
            raise ValueError(f"{key!r} is missing or no number")
        return default
    if type(value) is not int or not 0 < value <= MOST:       # type(), for True is an int too
        raise ValueError(f"{key!r} must be a whole number from 1 to {MOST}, got {json.dumps(value):.40}")
    return value


def flag(c: dict, key: str) -> bool:
    """The truth value at `key`; false where it is left out."""
    value = c.get(key, False)
    if type(value) is not bool:
        raise ValueError(f"{key!r} must be true or false, got {json.dumps(value):.40}")
    return value


def divided(c: dict, width: str = "hidden_size", heads: str = "num_attention_heads") -> int:
    """The width of a head, where nothing else says it."""
    if size(c, width) % size(c, heads):
        raise ValueError(f"{heads!r} must divide {width!r}, got {c[heads]} and {c[width]}")
    return c[width] // c[heads]


def attention(c: dict) -> tuple[int, int, int, int]:
    """The widths of the model, of all queries, of all keys (the values' too), and of one head."""
    heads, head = size(c, "num_attention_heads"), size(c, "head_dim", 0) or divided(c)
    return size(c, "hidden_size"), heads * head, size(c, "num_key_value_heads", heads) * head, head


def words(c: dict, width: int, bias: bool = False) -> int:
    """The parameters of the embedding and of the output head, which are one matrix where they are tied."""
    return size(c, "vocab_size") * (width * (1 if flag(c, "tie_word_embeddings") else 2) + bias)


def grouped(layers: int, width: int, q: int, kv: int, bias: bool) -> tuple[Kind, ...]:
    return Kind("q_proj", layers, q, width, bias), Kind("k_proj", layers, kv, width, bias), Kind("v_proj", layers, kv, width, bias)


QKV = ("q_proj", "k_proj", "v_proj")


def megatron(layers: int, width: int, qkv: int, inner: int, bias: bool, mlp_bias: bool) -> tuple[Kind, ...]:
    """Megatron's names: q, k and v in one matrix, an MLP without a gate."""
    return (Kind("query_key_value", layers, qkv, width, bias), Kind("dense", layers, width, width, bias),
            Kind("dense_h_to_4h", layers, inner, width, mlp_bias), Kind("dense_4h_to_h", layers, width, inner, mlp_bias))


def gated(name: str, c: dict) -> Shape:
    """Llama and its kin: grouped keys and values, an MLP with a gate, RMS norms. Qwen 3 norms q and k too, Gemma 2 what leaves a sublayer."""
    (width, q, kv, head), inner, layers, kind = attention(c), size(c, "intermediate_size"), size(c, "num_hidden_layers"), c["model_type"]
    bias = kind not in ("mistral", "qwen2") and flag(c, "attention_bias")
    mlp_bias = kind in ("llama", "granite", "smollm3") and flag(c, "mlp_bias")
    kinds = (*grouped(layers, width, q, kv, bias or kind == "qwen2"), Kind("o_proj", layers, width, q, bias),
             *(Kind(part, layers, inner, width, mlp_bias) for part in ("gate_proj", "up_proj")), Kind("down_proj", layers, width, inner, mlp_bias))
    norms = (4 if kind == "gemma2" else 2) * width + (2 * head if kind == "qwen3" else 0)
    return Shape(name, kinds, layers * norms + width + words(c, width), (Reading(layers, QKV), Reading(layers, ("gate_proj", "up_proj"))))


def fused(name: str, c: dict) -> Shape:
    """Gate and up in one matrix. In Phi-3 q, k and v too; GLM-4 (glm) has biases there; the later glm4 norms also what leaves a sublayer."""
    (width, q, kv, _), inner, layers, kind = attention(c), size(c, "intermediate_size"), size(c, "num_hidden_layers"), c["model_type"]
    qkv = (Kind("qkv_proj", layers, q + 2 * kv, width),) if kind == "phi3" else grouped(layers, width, q, kv, flag(c, "attention_bias"))
    kinds = (*qkv, Kind("o_proj", layers, width, q), Kind("gate_up_proj", layers, 2 * inner, width), Kind("down_proj", layers, width, inner))
    return Shape(name, kinds, layers * (4 if kind == "glm4" else 2) * width + width + words(c, width), (Reading(layers, QKV),))


def chatglm(name: str, c: dict) -> Shape:
    """ChatGLM-6B: biases everywhere; the output head is the embedding. Its successors of the same model_type have other keys: chatglm2."""
    if "ffn_hidden_size" in c or "padded_vocab_size" in c:
        return chatglm2(name, c)
    width, layers = size(c, "hidden_size"), size(c, "num_layers")
    kinds = megatron(layers, width, 3 * width, size(c, "inner_hidden_size"), True, True)
    return Shape(name, kinds, layers * 4 * width + 2 * width + size(c, "vocab_size") * width)


def chatglm2(name: str, c: dict) -> Shape:
    """ChatGLM2, ChatGLM3 and GLM-4 in their own files: q, k and v fused and grouped, gate and up fused, RMS norms, a head of its own."""
    width, inner, layers, bias = size(c, "hidden_size"), size(c, "ffn_hidden_size"), size(c, "num_layers"), flag(c, "add_bias_linear")
    heads, head = size(c, "num_attention_heads"), size(c, "kv_channels")
    q, kv = heads * head, (size(c, "multi_query_group_num") if flag(c, "multi_query_attention") else heads) * head
    kinds = (Kind("query_key_value", layers, q + 2 * kv, width, bias or flag(c, "add_qkv_bias")), Kind("dense", layers, width, q, bias),
             Kind("dense_h_to_4h", layers, 2 * inner, width, bias), Kind("dense_4h_to_h", layers, width, inner, bias))
    norm = width * (1 if flag(c, "rmsnorm") else 2)
    return Shape(name, kinds, (2 * layers + flag(c, "post_layer_norm")) * norm + 2 * size(c, "padded_vocab_size") * width)


def gpt_neox(name: str, c: dict) -> Shape:
    """q, k and v fused; attention_bias says nothing of the MLP, which has biases."""
    width, layers = size(c, "hidden_size"), size(c, "num_hidden_layers")
    kinds = megatron(layers, width, 3 * width, size(c, "intermediate_size"), flag(c, "attention_bias"), True)
    return Shape(name, kinds, layers * 4 * width + 2 * width + words(c, width))


def falcon(name: str, c: dict) -> Shape:
    """q, k and v fused: grouped in the new architecture, one key for all heads in the 7B, one for each in the oldest. One norm in a block, or two."""
    width, layers, heads, head = size(c, "hidden_size"), size(c, "num_hidden_layers"), size(c, "num_attention_heads"), divided(c)
    bias, new = flag(c, "bias"), flag(c, "new_decoder_architecture")
    keys = size(c, "num_kv_heads", heads) if new else 1 if flag(c, "multi_query") else heads
    kinds = megatron(layers, width, (heads + 2 * keys) * head, size(c, "ffn_hidden_size", 4 * width), bias, bias)
    norms = 2 if not flag(c, "parallel_attn") or size(c, "num_ln_in_parallel_attn", 2 if new else 1) == 2 else 1
    return Shape(name, kinds, (norms * layers + 1) * 2 * width + words(c, width), (Reading(layers, ("query_key_value", "dense_h_to_4h")),) * (norms == 1))


def bloom(name: str, c: dict) -> Shape:
    """q, k and v fused, biases everywhere, a norm after the embedding. Its width and depth go by two names each."""
    width, layers = size(c, "n_embed" if "n_embed" in c else "hidden_size"), size(c, "num_hidden_layers" if "num_hidden_layers" in c else "n_layer")
    return Shape(name, megatron(layers, width, 3 * width, 4 * width, True, True), (2 * layers + 2) * 2 * width + words(c, width))


def opt(name: str, c: dict) -> Shape:
    """Learned positions, two more than are asked for; the 350M has a narrower embedding and a matrix on each side of the blocks."""
    width, inner, layers, bias = size(c, "hidden_size"), size(c, "ffn_dim"), size(c, "num_hidden_layers"), flag(c, "enable_bias")
    narrow, norm = size(c, "word_embed_proj_dim", width), 2 * width if flag(c, "layer_norm_elementwise_affine") else 0
    kinds = (*(Kind(part, layers, width, width, bias) for part in ("q_proj", "k_proj", "v_proj", "out_proj")),
             Kind("fc1", layers, inner, width, bias), Kind("fc2", layers, width, inner, bias))
    norms = 2 * layers + (flag(c, "do_layer_norm_before") and not flag(c, "_remove_final_layer_norm"))
    projections = 2 * width * narrow if narrow != width else 0
    rest = norms * norm + projections + (size(c, "max_position_embeddings") + 2) * width + words(c, narrow)
    return Shape(name, kinds, rest, (Reading(layers, QKV),))


def gpt2(name: str, c: dict) -> Shape:
    """GPT-2's layers are Conv1D, which hold W transposed; the counts are the same. StarCoder's gpt_bigcode has one key for all heads."""
    width, layers, inner = size(c, "n_embd"), size(c, "n_layer"), size(c, "n_inner", 4 * size(c, "n_embd"))
    kv = divided(c, "n_embd", "n_head") if c["model_type"] == "gpt_bigcode" and flag(c, "multi_query") else width
    kinds = (Kind("c_attn", layers, width + 2 * kv, width, True), Kind("attn.c_proj", layers, width, width, True),
             Kind("c_fc", layers, inner, width, True), Kind("mlp.c_proj", layers, width, inner, True))
    return Shape(name, kinds, layers * 4 * width + 2 * width + size(c, "n_positions") * width + words(c, width))


def gptj(name: str, c: dict) -> Shape:
    """Biases in the MLP and the output head alone; attention and MLP share the one norm of a block."""
    width, layers, inner = size(c, "n_embd"), size(c, "n_layer"), size(c, "n_inner", 4 * size(c, "n_embd"))
    kinds = (*(Kind(part, layers, width, width) for part in ("q_proj", "k_proj", "v_proj", "out_proj")),
             Kind("fc_in", layers, inner, width, True), Kind("fc_out", layers, width, inner, True))
    return Shape(name, kinds, layers * 2 * width + 2 * width + words(c, width, bias=True), (Reading(layers, (*QKV, "fc_in")),))


def phi(name: str, c: dict) -> Shape:
    """Phi 1 and 2: biases everywhere, in the output head too; attention and MLP share the one norm of a block."""
    (width, q, kv, _), inner, layers = attention(c), size(c, "intermediate_size"), size(c, "num_hidden_layers")
    kinds = (*grouped(layers, width, q, kv, True), Kind("dense", layers, width, q, True), Kind("fc1", layers, inner, width, True),
             Kind("fc2", layers, width, inner, True))
    norms = 2 * width + (4 * divided(c) if flag(c, "qk_layernorm") else 0)
    return Shape(name, kinds, layers * norms + 2 * width + words(c, width, bias=True), (Reading(layers, (*QKV, "fc1")),))


def bert(name: str, c: dict) -> Shape:
    """BERT and RoBERTa with the head that guesses masked words, no pooler. `output.dense` is the MLP's; the attention's has the longer name."""
    width, inner, layers = size(c, "hidden_size"), size(c, "intermediate_size"), size(c, "num_hidden_layers")
    kinds = (*(Kind(part, layers, width, width, True) for part in ("query", "key", "value", "attention.output.dense")),
             Kind("intermediate.dense", layers, inner, width, True), Kind("output.dense", layers, width, inner, True))
    embeddings = (size(c, "max_position_embeddings") + size(c, "type_vocab_size")) * width + 2 * width
    biases = size(c, "vocab_size") * (1 if flag(c, "tie_word_embeddings") else 2)     # untied, the head has a second one, of no use
    rest = layers * 4 * width + embeddings + width * (width + 1) + 2 * width + biases + words(c, width)
    return Shape(name, kinds, rest, (Reading(layers, ("query", "key", "value")),))


def t5(name: str, c: dict) -> Shape:
    """Encoder and decoder, whose blocks attend twice; wi is two where it is gated. The first block of each has the biases for distances.

    An untied head (T5 1.1, Flan) is counted: transformers 5 takes it from a checkpoint, though it makes none from a config.
    """
    width, heads, inner, layers = size(c, "d_model"), size(c, "num_heads"), size(c, "d_ff"), size(c, "num_layers")
    q, decoder, form = heads * size(c, "d_kv"), size(c, "num_decoder_layers", layers), c["feed_forward_proj"]
    if not isinstance(form, str):
        raise ValueError(f"'feed_forward_proj' must be a name such as gated-gelu, got {json.dumps(form):.40}")
    kinds = (*(Kind(part, layers + 2 * decoder, q, width) for part in "qkv"), Kind("o", layers + 2 * decoder, width, q),
             *(Kind(part, layers + decoder, inner, width) for part in (("wi_0", "wi_1") if form.startswith("gated-") else ("wi",))),
             Kind("wo", layers + decoder, width, inner))
    norms, distances = 2 * layers + 3 * decoder + 2, 2 * size(c, "relative_attention_num_buckets") * heads
    attending = Reading(layers + decoder, ("q", "k", "v")), Reading(1, ("k", "v"), decoder)       # all decoder blocks attend to the encoder's last state
    return Shape(name, kinds, norms * width + distances + words(c, width), (*attending, Reading(layers + decoder, ("wi_0", "wi_1"))))


TIED = {"tie_word_embeddings": True}
BERT = TIED | {"max_position_embeddings": 512, "type_vocab_size": 2}
GLM = {"num_key_value_heads": 2, "head_dim": 128, "attention_bias": True}
FAMILIES = {                                                  # and what transformers takes for a key that the file leaves out
    "llama": (gated, {}), "granite": (gated, {}), "smollm3": (gated, TIED | {"num_key_value_heads": 4}),
    "mistral": (gated, {"num_key_value_heads": 8}), "qwen2": (gated, {"num_key_value_heads": 32}),
    "qwen3": (gated, {"num_key_value_heads": 32, "head_dim": 128}), "gemma": (gated, TIED | {"num_key_value_heads": 16, "head_dim": 256}),
    "gemma2": (gated, TIED | {"num_key_value_heads": 4, "head_dim": 256}), "phi": (phi, {}), "phi3": (fused, {}), "glm": (fused, GLM),
    "glm4": (fused, GLM), "chatglm": (chatglm, {"rmsnorm": True, "post_layer_norm": True}), "gpt_neox": (gpt_neox, {"attention_bias": True}),
    "falcon": (falcon, TIED | {"multi_query": True, "parallel_attn": True}), "bloom": (bloom, TIED), "gpt2": (gpt2, TIED),
    "gpt_bigcode": (gpt2, TIED | {"multi_query": True}), "gptj": (gptj, {}), "bert": (bert, BERT), "roberta": (bert, BERT),
    "opt": (opt, TIED | {"enable_bias": True, "do_layer_norm_before": True, "layer_norm_elementwise_affine": True}),
    "t5": (t5, TIED | {"d_kv": 64, "relative_attention_num_buckets": 32, "feed_forward_proj": "relu"}),
}
LLAMA = {"model_type": "llama", "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32, "vocab_size": 32000}
KNOWN = {
    "chatglm-6b": {"model_type": "chatglm", "hidden_size": 4096, "inner_hidden_size": 16384, "num_layers": 28, "vocab_size": 130528},
    "llama-7b": LLAMA,
    "llama-13b": LLAMA | {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40},
    "llama-3-8b": LLAMA | {"intermediate_size": 14336, "num_key_value_heads": 8, "vocab_size": 128256},
    "gpt2": {"model_type": "gpt2", "n_embd": 768, "n_layer": 12, "vocab_size": 50257, "n_positions": 1024},
}


def from_config(name: str, config: dict) -> Shape:
    """The shape that a config.json describes. Raises ValueError that says what is not known, missing or no number in it."""
    kind = config["model_type"]
    for part in ("text_config", "vision_config", "audio_config"):
        if config.get(part):
            raise ValueError(f"a {kind!r:.60} with a {part} is a model of several parts; only models of text alone are known here")
    if kind not in FAMILIES:
        raise ValueError(f"the shape of a {kind!r:.60} is not known here; known are {', '.join(FAMILIES)}")
    if flag(config, "add_cross_attention"):
        raise ValueError("'add_cross_attention' is true, and layers that attend to another model are not counted here")
    family, defaults = FAMILIES[kind]
    return family(name, defaults | config)


def shape(name: str) -> Shape:
    """The shape of that name, or of the config.json at that path or in that folder. Raises ValueError that says which there are, or what is wrong."""
    if name.lower() in KNOWN:
        return from_config(name.lower(), KNOWN[name.lower()])
    path = Path(name)
    if not path.exists():
        raise ValueError(f"no shape named {name!r} and no such file; known are {', '.join(KNOWN)}, or give a model's config.json")
    path = path / "config.json" if path.is_dir() else path
    try:
        config = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise ValueError(f"{path.parent}: a folder without a config.json") from None
    except (OSError, ValueError, RecursionError):
        config = None
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise ValueError(f"{path}: not a model's config.json (no model_type in it)")
    try:
        return from_config(path.parent.name or config["model_type"], config)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
