"""The loop that decodes: read what is new, process the logits, choose a token for each sample, again."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import takewhile
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from minitransformer.errors import UserError
from minitransformer.generation.beam import beam_search
from minitransformer.generation.processors import (
    Forced,
    LogitsProcessor,
    Never,
    SamplingConfig,
    at_least_float32,
    check_finite,
    check_no_beams,
)
from minitransformer.generation.readers import CachedReader, Reader, TargetReader, UncachedReader
from minitransformer.models.decoder import DecoderLM


def uniform_draws(samples: int, steps: int, generator: torch.Generator) -> Float[Tensor, "samples steps"]:
    """Numbers in [0, 1): each sample has its own stream, whatever the number of samples and of steps."""
    return torch.stack([torch.rand(steps, generator=own) for own in own_generators(samples, generator)])


def own_generators(samples: int, generator: torch.Generator) -> list[torch.Generator]:
    """A stream of random numbers for each sample, the same ones whatever the number of samples."""
    seeds = torch.randint(2**63 - 1, (samples,), generator=generator).tolist()
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def seeded(generator: torch.Generator | None, sampling: SamplingConfig) -> torch.Generator:
    """`generator`, by default one on the CPU with the seed of `sampling`, or with a new one if it has none."""
    if generator is None:
        generator = torch.Generator()
        generator.seed() if sampling.seed is None else generator.manual_seed(sampling.seed)
    return generator


def draw(logits: Float[Tensor, "samples vocab"], uniform: Float[Tensor, "samples"]) -> Int[Tensor, "samples"]:
    """A token by the softmax of its logits: `draw_by_weight` of them."""
    return draw_by_weight(logits.softmax(-1), uniform)


def draw_by_weight(
    weights: Float[Tensor, "samples vocab"], uniform: Float[Tensor, "samples"]
) -> Int[Tensor, "samples"]:
    """The token at which the cumulative weight first exceeds the share `uniform` of all: i with probability ∝ wᵢ.

    One random number for each sample, where `torch.multinomial` takes one for each token of the vocabulary.
    """
    cumulative = weights.cumsum(-1)
    # Times the total, which rounding keeps from being 1: below it, so the token found exists and is not impossible.
    share = uniform.unsqueeze(1) * cumulative.narrow(1, -1, 1)
    return torch.searchsorted(cumulative, share, right=True).squeeze(1)


@contextmanager
def evaluating(model: nn.Module) -> Generator[None, None, None]:
    """`model` is in eval mode meanwhile."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


@torch.inference_mode()
def generate(
    model: DecoderLM,
    prompt: Sequence[int],
    sampling: SamplingConfig,
    *,
    generator: torch.Generator | None = None,
    ends: Sequence[int] = (),
    vocab_size: int | None = None,
    cached: bool = True,
) -> Generator[list[int], None, None]:
    """The tokens that follow `prompt`, step by step: each step gives one token for each sample.

    Ends after `max_new_tokens` steps, or when every sample has produced one of `ends`; a sample that has goes on giving
    it. Only tokens below `vocab_size` are drawn (default: all that the model has). Random numbers come from `generator`
    (on the CPU), by default one with the seed of `sampling`; torch's global one is not touched. The model is in eval
    mode meanwhile. `cached=False` gives the same tokens, slowly. `sampling.stop` is for who turns tokens into text.
    """
    check_prompt(prompt)
    device = next(model.parameters()).device
    prompts = torch.tensor(prompt, device=device).expand(sampling.num_samples, -1)
    with evaluating(model):
        max_tokens = len(prompt) + sampling.max_new_tokens
        read: Reader = CachedReader(model, max_tokens) if cached else UncachedReader(model)
        yield from decode(read, prompts, sampling, generator=generator, ends=ends, vocab_size=vocab_size)


@torch.inference_mode()
def search(
    model: DecoderLM,
    prompt: Sequence[int],
    sampling: SamplingConfig,
    *,
    ends: Sequence[int] = (),
    vocab_size: int | None = None,
    stops: Callable[[Sequence[int]], bool] | None = None,
    cached: bool = True,
) -> list[list[int]]:
    """The `num_samples` best of the texts after `prompt` that a beam search with `num_beams` finds, the best first.

    Each is its new tokens, with the one of `ends` that ends it, if one does; `stops` says of new tokens whether they
    end a text as well. The window moves as in `generate`, whose other arguments these are. There are fewer texts than
    asked for only where nothing else is possible.
    """
    check_prompt(prompt)
    prompts = torch.tensor([prompt], device=next(model.parameters()).device)
    processors = sampling.processors(len(prompt), ends)
    with evaluating(model):
        max_tokens = len(prompt) + sampling.max_new_tokens
        read: Reader = CachedReader(model, max_tokens) if cached else UncachedReader(model)
        [found] = beam_search(
            read, prompts, sampling, processors=processors, ends=ends, vocab_size=vocab_size, stops=stops
        )
    return [hypothesis.tokens for hypothesis in found[: sampling.num_samples]]


def check_prompt(prompt: Sequence[int]) -> None:
    """Raises `UserError` for a prompt without a token, after which nothing can be predicted."""
    if not prompt:
        raise UserError("the prompt has no token: begin with the end-of-text token")


def decode(
    read: Reader,
    prompts: Int[Tensor, "samples length"],
    sampling: SamplingConfig,
    *,
    generator: torch.Generator | None = None,
    ends: Sequence[int] = (),
    vocab_size: int | None = None,
    rules: Sequence[LogitsProcessor] = (),
) -> Generator[list[int], None, None]:
    """`generate` for any reader: the tokens that follow the prompts, each sample's own.

    Raises `UserError` where a beam search is asked for: that is `search`. `rules` decide beside `sampling` which tokens
    are possible.
    """
    check_no_beams(sampling)
    uniform = uniform_draws(prompts.size(0), sampling.max_new_tokens, seeded(generator, sampling)).to(prompts.device)
    processors = sampling.processors(prompts.size(1), ends, rules)
    last, ended = [0] * prompts.size(0), [False] * prompts.size(0)
    for new in on_host(_choices(read, prompts, uniform, processors, sampling, vocab_size), prompts.is_cuda):
        new = [before if over else token for token, before, over in zip(new, last, ended, strict=True)]
        ended = [token in ends for token in new]
        last = new
        yield new
        if all(ended):
            return


def _choices(
    read: Reader,
    prompts: Int[Tensor, "samples length"],
    uniform: Float[Tensor, "samples steps"],
    processors: Sequence[LogitsProcessor],
    sampling: SamplingConfig,
    vocab_size: int | None,
) -> Iterator[Int[Tensor, "samples"]]:
    """The tokens of each step, on the device, which need not have drawn them yet."""
    tokens = torch.cat([prompts, torch.zeros_like(uniform, dtype=prompts.dtype)], dim=1)
    for step, numbers in enumerate(uniform.unbind(1)):
        so_far = tokens.narrow(1, 0, prompts.size(1) + step)  # an index takes Python twice as long
        logits = at_least_float32(read(so_far)[:, :vocab_size])
        if step == 0:
            check_finite(logits)
        for process in processors:
            logits = process(logits, so_far)
        chosen = logits.argmax(-1) if sampling.greedy else draw(logits, numbers)
        tokens[:, so_far.size(1)] = chosen
        yield chosen


def on_host(tensors: Iterable[Tensor], asynchronous: bool) -> Iterator[list[int]]:
    """Their numbers. Those of an asynchronous device are read when it has the next one to work on, and never idles."""
    before: Callable[[], list[int]] | None = None
    for tensor in tensors:
        if not asynchronous:
            yield tensor.tolist()
            continue
        arriving = _on_its_way(tensor)
        if before:
            yield before()
        before = arriving
    if before:
        yield before()


def _on_its_way(tensor: Tensor) -> Callable[[], list[int]]:
    """Begins to copy what `tensor` will hold; waits for that alone when called."""
    numbers = tensor.to("cpu", non_blocking=True)
    arrived = torch.cuda.Event() if tensor.is_cuda else None
    if arrived:
        arrived.record()

    def wait() -> list[int]:
        if arrived:
            arrived.synchronize()
        return numbers.tolist()

    return wait


@torch.inference_mode()
def translate(
    model: Any,
    sources: Sequence[Sequence[int]],
    sampling: SamplingConfig,
    *,
    start: int,
    ends: Sequence[int],
    first: int | None = None,
    last: int | None = None,
    never: Sequence[int] = (),
    vocab_size: int | None = None,
    generator: torch.Generator | None = None,
) -> list[list[list[int]]]:
    """For each source, `num_samples` targets, the best first, each without the one of `ends` that ends it.

    Every target begins after `start`, and has no more than the model's context. `first`, if there is one, is its first
    token whatever the model finds likely, `last` that of a target which would grow too long, and `never` are in none.
    With `num_beams`, what beam search finds; otherwise as in `generate`.
    """
    device = next(model.parameters()).device
    source, is_token = padded(sources, device)
    limited = replace(sampling, max_new_tokens=min(sampling.max_new_tokens, model.config.context_length))
    rules = _rules({1: first, limited.max_new_tokens: last}, never)
    copies = sampling.num_beams if sampling.num_beams > 1 else sampling.num_samples
    rows = torch.arange(len(sources), device=device).repeat_interleave(copies)
    with evaluating(model):
        read = TargetReader(model, model.encode(source, is_token=is_token).select(rows))
        if sampling.num_beams == 1:
            prompts = torch.full((len(rows), 1), start, device=device)
            steps = decode(read, prompts, limited, generator=generator, ends=ends, vocab_size=vocab_size, rules=rules)
            drawn = [list(tokens) for tokens in zip(*steps, strict=True)]
            targets = [drawn[i : i + copies] for i in range(0, len(drawn), copies)]
        else:
            prompts = torch.full((len(sources), 1), start, device=device)
            processors = limited.processors(1, ends, rules)
            found = beam_search(read, prompts, limited, processors=processors, ends=ends, vocab_size=vocab_size)
            targets = [[hypothesis.tokens for hypothesis in text[: sampling.num_samples]] for text in found]
    return [[_before(ends, tokens) for tokens in text] for text in targets]


def _rules(forced: dict[int, int | None], never: Sequence[int]) -> list[LogitsProcessor]:
    """`forced` says after how many tokens which one must come, if any."""
    banned = [Never(never)] if never else []
    return [*banned, *(Forced(length, token) for length, token in forced.items() if token is not None)]


def _before(ends: Sequence[int], tokens: list[int]) -> list[int]:
    """The tokens before the first that is one of `ends`."""
    return list(takewhile(lambda token: token not in ends, tokens))


def padded(
    sequences: Sequence[Sequence[int]], device: torch.device
) -> tuple[Int[Tensor, "batch length"], Tensor | None]:
    """The sequences as rows, padded at their ends, and where their real tokens are (None: everywhere)."""
    lengths = torch.tensor([len(sequence) for sequence in sequences], device=device)
    tokens = torch.zeros(len(sequences), int(lengths.max()), dtype=torch.long)
    for row, sequence in enumerate(sequences):
        tokens[row, : len(sequence)] = torch.tensor(sequence)
    is_token = torch.arange(tokens.size(1), device=device) < lengths[:, None]
    return tokens.to(device), None if is_token.all() else is_token
