"""A text as a model's own tokens: windows to train on, windows held out, and a score that models of all tokenizers share.

    bits per byte = nats over all held-out tokens / (held-out bytes · ln 2)

A tokenizer with longer tokens has fewer and harder ones to predict; per byte of the text they can be compared. Where a tokenizer begins
every text with a token of its own (Llama's, Gemma's), every window begins with it too: such models are at a loss without it.
"""

import hashlib
import math
from dataclasses import dataclass
from random import Random

import torch
from torch import Tensor, nn

from minilora.data import nine_tenths
from minilora.training import IGNORED, next_byte_loss

MOST_WINDOWS = 128         # of a long text as many are scored, spread evenly
SHOWN = 48                 # bytes of the held-out part that begin a sample


@dataclass(frozen=True)
class TokenText:
    """train: (n) int64, the tokens of the first nine tenths.     rest: (m) int64, of the last tenth; size: its bytes.
    begin: the token that begins every text, if there is one.     prompt: how the held-out part begins.     fingerprint: of the text's bytes."""

    name: str
    train: Tensor
    rest: Tensor
    size: int
    begin: int | None
    prompt: str
    fingerprint: str

    def batches(self, rows: int, context: int, seed: int = 0) -> "TokenBatches":
        """batches(step) -> (x, y), each (rows, context) int64: a pure function of the step. Raises ValueError where the text is too short."""
        if len(self.train) <= context:
            raise ValueError(f"{self.name}: {len(self.train)} tokens to train on, and a window needs {context + 1}: a longer text, or a smaller --context")
        return TokenBatches(self, rows, context, seed)

    def held_out(self, context: int) -> Tensor:
        """(N, context + 1) int64: each token of the rest is predicted once, the first after the last that was trained on. What is short of a
        window is filled with -100."""
        ids = torch.cat([self.train[-1:], self.rest])                                 # (m + 1)
        fit = -(-len(self.rest) // context)
        count = min(fit, MOST_WINDOWS)
        windows = torch.full((count, context + 1), IGNORED)
        for i, window in enumerate(windows):
            part = ids[i * fit // count * context:][:context + 1]
            window[:len(part)] = part
        return self.begun(windows)

    def begun(self, windows: Tensor) -> Tensor:
        """The first token of a window is never predicted: it gives way to the one that begins a text."""
        if self.begin is not None:
            windows[:, 0] = self.begin
        return windows

    def nats_per_byte(self, model: nn.Module, windows: Tensor, rows: int = 8) -> float:
        """The held-out part's nats over its bytes; where not all its windows are scored, as if the others were like them."""
        return nats_per_token(model, windows, rows) * len(self.rest) / self.size


@dataclass(frozen=True)
class TokenBatches:
    """The training windows, step by step, from anywhere in the training part."""

    text: TokenText
    rows: int
    context: int
    seed: int

    def __call__(self, step: int) -> tuple[Tensor, Tensor]:
        rng, train = Random(f"text/{self.seed}/{step}"), self.text.train
        starts = [rng.randrange(len(train) - self.context) for _ in range(self.rows)]
        windows = self.text.begun(torch.stack([train[start:start + self.context + 1] for start in starts]))
        return windows[:, :-1], windows[:, 1:]

    @property
    def fingerprint(self) -> str:
        return self.text.fingerprint


def token_text(content: bytes, name: str, tokenizer) -> TokenText:
    """UTF-8 bytes, as minilora.data.read gives them, split by position before they are made tokens: none of them straddles the border."""
    train, rest = nine_tenths(content)
    ids = [torch.tensor(tokenizer(part.decode(), add_special_tokens=False, verbose=False).input_ids, dtype=torch.int64) for part in (train, rest)]
    begin = tokenizer.bos_token_id if tokenizer("a").input_ids[0] == tokenizer.bos_token_id else None
    return TokenText(name, *ids, len(rest), begin, rest[:SHOWN].decode(errors="ignore"), hashlib.sha256(content).hexdigest())


@torch.no_grad()
def nats_per_token(model: nn.Module, windows: Tensor, rows: int = 8) -> float:
    """Mean over the targets that are not -100. windows: (N, T + 1) int64."""
    device, was_training = next(model.parameters()).device, model.training
    model.eval()
    nats, count = 0.0, 0
    for part in windows.to(device).split(rows):
        x, y = part[:, :-1].clamp_min(0), part[:, 1:]                                 # behind the end of a text any token will do
        targets = int((y != IGNORED).sum())
        nats += next_byte_loss(model, x, y).item() * targets
        count += targets
    model.train(was_training)
    return nats / count


def longest(model: nn.Module) -> float:
    """How many tokens the model reads at once, where that has an end."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None) or math.inf


@dataclass(frozen=True)
class Speaker:
    """A model with its tokenizer, which speaks as TinyGPT does."""

    model: nn.Module
    tokenizer: object

    def generate(self, prompt: str, max_new: int, temperature: float = 0.0, seed: int | None = None) -> str:
        """The prompt and at most `max_new` more tokens, fewer where the model ends its text. temperature 0: the likeliest token each time;
        above: sampled from all of them, repeatable with a seed. Raises ValueError where the model does not read so many."""
        from transformers import GenerationConfig

        device, was_training = next(self.model.parameters()).device, self.model.training
        ids = self.tokenizer(prompt, verbose=False).input_ids if prompt else []
        ids = ids or [token for token in (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id) if token is not None][:1]
        if not ids:
            raise ValueError("this tokenizer has no token that begins a text: give a prompt")
        if len(ids) + max_new > longest(self.model):
            raise ValueError(f"{len(ids)} tokens of prompt and {max_new} new ones are more than the {longest(self.model)} that this model reads")
        wanted = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature else {"do_sample": False}
        settings = GenerationConfig(max_new_tokens=max_new, eos_token_id=self.model.generation_config.eos_token_id,
                                    pad_token_id=self.tokenizer.pad_token_id or 0, **wanted)
        x = torch.tensor([ids], device=device)                                        # (1, T)
        self.model.eval()
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(torch.seed() if seed is None else seed)
            found = self.model.generate(x, attention_mask=torch.ones_like(x), generation_config=settings)
        self.model.train(was_training)
        return self.tokenizer.decode(found[0], skip_special_tokens=True)
