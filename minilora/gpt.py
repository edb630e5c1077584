"""TinyGPT: a byte-level transformer small enough to read at one sitting (GPT-2's shape, Radford et al. 2019, without dropout).

    h = E[ids] + P                        E: (256, width)     P: (context, width)
    h = h + Attention(norm(h))            in each block: every position looks back at the ones before it,
    h = h + MLP(norm(h))                  then thinks alone
    logits = norm(h) Uᵀ                   U: (256, width), a matrix of its own, not tied to E

The six matrices of a block are separate nn.Linear layers (q, k, v, o, up, down): they are what the adapters sit on.
"""

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn


@dataclass(frozen=True)
class GPTConfig:
    """vocab_size: 256, one symbol a byte; context: longest input in bytes; width must be a multiple of heads."""

    vocab_size: int = 256
    context: int = 128
    width: int = 128
    layers: int = 4
    heads: int = 4

    def __post_init__(self):
        for name, value in asdict(self).items():
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"GPTConfig: {name} must be a whole number of at least 1, got {value!r}")
        if self.width % self.heads:
            raise ValueError(f"GPTConfig: width {self.width} does not split evenly over {self.heads} heads")


class Attention(nn.Module):
    """Causal self-attention: softmax(q kᵀ / √d) v in each head, then one matrix to mix the heads."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.heads = config.heads
        self.q_proj = nn.Linear(config.width, config.width)
        self.k_proj = nn.Linear(config.width, config.width)
        self.v_proj = nn.Linear(config.width, config.width)
        self.o_proj = nn.Linear(config.width, config.width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (self.split_heads(project(x)) for project in (self.q_proj, self.k_proj, self.v_proj))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)    # (B, heads, T, width/heads)
        return self.o_proj(mixed.transpose(1, 2).flatten(2))               # (B, T, width)

    def split_heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)           # (B, T, width) -> (B, heads, T, width/heads)


class MLP(nn.Module):
    """Four times wider, a smooth gate, and back."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.up_proj = nn.Linear(config.width, 4 * config.width)
        self.down_proj = nn.Linear(4 * config.width, config.width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.gelu(self.up_proj(x)))                     # (B, T, width) -> (B, T, 4·width) -> back


class Block(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.width)
        self.attention = Attention(config)
        self.mlp_norm = nn.LayerNorm(config.width)
        self.mlp = MLP(config)

    def forward(self, h: Tensor) -> Tensor:
        h = h + self.attention(self.attention_norm(h))
        return h + self.mlp(self.mlp_norm(h))


class TinyGPT(nn.Module):
    """ids: (B, T) int64, T <= context  ->  logits: (B, T, vocab_size), float."""

    def __init__(self, config: GPTConfig = GPTConfig()):
        super().__init__()
        self.config = config
        self.token_embedding = nn.Embedding(config.vocab_size, config.width)
        self.position_embedding = nn.Embedding(config.context, config.width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width)
        self.head = nn.Linear(config.width, config.vocab_size, bias=False)
        self._initialize()

    def _initialize(self) -> None:
        """GPT-2's: N(0, 0.02) everywhere; matrices that write to the residual stream shrink by √(2·layers), since so many add up."""
        for name, module in self.named_modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                writes_to_stream = name.endswith(("o_proj", "down_proj"))
                nn.init.normal_(module.weight, std=0.02 / math.sqrt(2 * self.config.layers if writes_to_stream else 1))
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def forward(self, ids: Tensor) -> Tensor:
        if ids.shape[-1] > self.config.context:
            raise ValueError(f"input of {ids.shape[-1]} bytes, but this model's context is {self.config.context}: cut it into windows")
        positions = torch.arange(ids.shape[-1], device=ids.device)
        h = self.token_embedding(ids) + self.position_embedding(positions)     # (B, T, width)
        for block in self.blocks:
            h = block(h)
        return self.head(self.norm(h))                                         # (B, T, vocab_size)

    @torch.no_grad()
    def generate(self, prompt: str, max_new: int, temperature: float = 0.0, seed: int | None = None) -> str:
        """The prompt and `max_new` more bytes. temperature 0: the likeliest byte each time; above: sampled, repeatable with a seed.

        An empty prompt begins a new document. Bytes that are no UTF-8 are shown as �.
        """
        if not 0.0 <= temperature < math.inf:
            raise ValueError(f"temperature must be finite and not negative, got {temperature}")
        device = self.head.weight.device
        dice = None if seed is None else torch.Generator().manual_seed(seed)
        text = list(prompt.encode())
        start = [] if text else [ord("\n")]
        was_training = self.training
        self.eval()
        try:
            for _ in range(max_new):
                ids = torch.tensor([(start + text)[-self.config.context:]], device=device)
                logits = self(ids)[0, -1].float().cpu()                        # (vocab_size,)
                if temperature == 0.0:
                    text.append(int(logits.argmax()))
                else:
                    text.append(int(torch.multinomial(F.softmax(logits / temperature, -1), 1, generator=dice)))
        finally:
            self.train(was_training)
        return bytes(text).decode(errors="replace")


def load_base(path: str | Path | None = None) -> TinyGPT:
    """The shipped base model, or the one in a file that `python -m minilora pretrain` or `merge` wrote.

    Raises ValueError, naming the file, where it is missing, broken or no TinyGPT.
    """
    path = Path(path or Path(__file__).with_name("base.safetensors"))
    try:
        with safe_open(path, "pt") as file:
            config = GPTConfig(**json.loads((file.metadata() or {})["gpt_config"]))
            weights = {name: file.get_tensor(name) for name in file.keys()}
        model = TinyGPT(config)
        model.load_state_dict(weights)
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file; `python -m minilora pretrain --out {path}` makes one") from None
    except KeyError:
        raise ValueError(f"{path}: a safetensors file, but not one of a TinyGPT (its metadata has no gpt_config)") from None
    except (SafetensorError, OSError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: not a whole TinyGPT file ({str(error).splitlines()[0]})") from None
    return model.to(next(iter(weights.values())).dtype)
