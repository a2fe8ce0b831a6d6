"""The loop that decodes: read what is new, process the logits, draw a token for each sample, again.

**Past the context.** A model sees `context_length` tokens at most. When its window is full, the oldest half is dropped
and the rest is read anew, at positions that start from 0; the window then grows again. Which tokens the window holds
follows from how many there are (`window_length`), whether they were given or generated, so a prompt that is too
long keeps its last tokens by the same rule. Reading anew makes this exact for every position scheme.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor

from minitransformer.architecture.cache import KVCache
from minitransformer.errors import UserError
from minitransformer.generation.processors import SamplingConfig
from minitransformer.generation.recording import Recorded, for_single_rows, has_hooks
from minitransformer.models.decoder import DecoderLM
from minitransformer.text.tokenizers import Tokenizer


def window_length(total: int, context_length: int) -> int:
    """How many of `total` tokens, the last ones, a model sees that sees at most `context_length`.

    All of them while they fit. One more than fits, and what remains is half of a full window and the newest token.
    """
    if total <= context_length:
        return total
    after_a_drop = context_length // 2 + 1
    return after_a_drop + (total - context_length - 1) % (context_length + 1 - after_a_drop)


class Reader(Protocol):
    """Reads all tokens so far, and gives the logits of the next one."""

    def __call__(self, tokens: Int[Tensor, "samples length"]) -> Float[Tensor, "samples vocab"]: ...


class UncachedReader:
    """Reads the whole window for every token: the meaning of decoding, without its speed."""

    def __init__(self, model: DecoderLM) -> None:
        self.model = model

    def __call__(self, tokens: Int[Tensor, "samples length"]) -> Float[Tensor, "samples vocab"]:
        window = window_length(tokens.size(1), self.model.config.context_length)
        return _last_logits(self.model, tokens[:, -window:])


class CachedReader:
    """Reads each token once, as long as the window only grows; the first call's tokens are the same in every sample."""

    def __init__(self, model: DecoderLM, max_tokens: int) -> None:
        self.model = for_single_rows(model)
        self.context_length = model.config.context_length
        self.cache = model.new_cache(min(max_tokens, self.context_length))
        self.read = self._read if any(map(has_hooks, model.modules())) else Recorded(self._read)
        self.start: int | None = None

    def __call__(self, tokens: Int[Tensor, "samples length"]) -> Float[Tensor, "samples vocab"]:
        samples, total = tokens.shape
        window = window_length(total, self.context_length)
        if self.start is None:
            self.start = total - window
            logits = self._read(tokens[:1, -window:], torch.arange(window, device=tokens.device))
            self.cache.select(torch.zeros(samples, dtype=torch.long, device=tokens.device))
            return logits.expand(samples, -1)
        new = 1 if total - window == self.start else window
        self.start = total - window
        return self.read(tokens[:, -new:], torch.arange(window - new, window, device=tokens.device))

    def _read(self, tokens: Int[Tensor, "samples new"], slots: Int[Tensor, "new"]) -> Float[Tensor, "samples vocab"]:
        self.cache.place(slots)
        return _last_logits(self.model, tokens, self.cache)


def _last_logits(model: DecoderLM, tokens: Tensor, cache: KVCache | None = None) -> Tensor:
    # The head reads the last token only: logits of a whole prompt would be its length times the vocabulary.
    return model.head(model.hidden_states(tokens, cache=cache)[:, -1])


def uniform_draws(samples: int, steps: int, generator: torch.Generator) -> Float[Tensor, "samples steps"]:
    """Numbers in [0, 1): each sample has its own stream, whatever the number of samples and of steps."""
    seeds = torch.randint(2**63 - 1, (samples,), generator=generator).tolist()
    return torch.stack([torch.rand(steps, generator=torch.Generator().manual_seed(seed)) for seed in seeds])


def draw(logits: Float[Tensor, "samples vocab"], uniform: Float[Tensor, "samples"]) -> Int[Tensor, "samples"]:
    """The token at which the cumulative probability first exceeds `uniform`: token i with probability softmax(logits)ᵢ.

    One random number for each sample, where `torch.multinomial` takes one for each token of the vocabulary.
    """
    cumulative = logits.softmax(-1).cumsum(-1)
    # Times the total, which rounding keeps from being 1: below it, so the token found exists and is not impossible.
    return torch.searchsorted(cumulative, uniform[:, None] * cumulative[:, -1:], right=True)[:, 0]


@torch.inference_mode()
def generate(
    model: DecoderLM,
    prompt: Sequence[int],
    sampling: SamplingConfig,
    *,
    generator: torch.Generator | None = None,
    end_of_text: int | None = None,
    vocab_size: int | None = None,
    cached: bool = True,
) -> Generator[list[int], None, None]:
    """The tokens that follow `prompt`, step by step: each step gives one token for each sample.

    Ends after `max_new_tokens` steps, or when every sample has produced `end_of_text`; a sample that has goes on giving
    it. Only tokens below `vocab_size` are drawn (default: all that the model has). Random numbers come from `generator`
    (on the CPU), by default one with the seed of `sampling`; torch's global one is not touched. The model is in eval
    mode meanwhile. `cached=False` gives the same tokens, slowly. `sampling.stop` is for who turns tokens into text.
    """
    if not prompt:
        raise UserError("the prompt has no token: begin with the end-of-text token")
    if generator is None:
        generator = torch.Generator()
        generator.seed() if sampling.seed is None else generator.manual_seed(sampling.seed)
    samples, steps = sampling.num_samples, sampling.max_new_tokens
    processors = sampling.processors()
    device = next(model.parameters()).device
    uniform = uniform_draws(samples, steps, generator).to(device)
    tokens = torch.zeros(samples, len(prompt) + steps, dtype=torch.long)
    tokens[:, : len(prompt)] = torch.tensor(prompt)
    tokens = tokens.to(device)
    ended = [False] * samples
    was_training = model.training
    model.eval()
    try:
        read: Reader = CachedReader(model, len(prompt) + steps) if cached else UncachedReader(model)
        for step in range(steps):
            so_far = tokens[:, : len(prompt) + step]
            logits = read(so_far)[:, :vocab_size]
            logits = logits if logits.dtype == torch.float64 else logits.float()
            if step == 0 and not logits.isfinite().all():
                raise UserError("the model predicts no finite probabilities: choose an earlier checkpoint")
            for process in processors:
                logits = process(logits, so_far)
            chosen = logits.argmax(-1) if sampling.greedy else draw(logits, uniform[:, step])
            tokens[:, len(prompt) + step] = chosen
            new = chosen.tolist()
            if end_of_text is not None:
                new = [end_of_text if over else token for token, over in zip(new, ended, strict=True)]
                ended = [token == end_of_text for token in new]
            yield new
            if all(ended):
                return
    finally:
        model.train(was_training)


def sample_text(model: DecoderLM, tokenizer: Tokenizer, max_new_tokens: int) -> str:
    """What `model` writes from the beginning of a text, drawn with the default settings and always the same numbers."""
    end = tokenizer.end_of_text
    sampling = SamplingConfig(max_new_tokens=max_new_tokens, seed=0)
    steps = generate(model, [end], sampling, end_of_text=end, vocab_size=tokenizer.vocab_size)
    return tokenizer.decode([token for [token] in steps])
