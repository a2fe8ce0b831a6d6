"""From a prompt, or a source, to tokens: `generate`, `search` and `translate`."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import takewhile
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from minitransformer.generation.arriving import on_host
from minitransformer.generation.beam import beam_search
from minitransformer.generation.config import SamplingConfig, check_no_beams
from minitransformer.generation.engine import Engine
from minitransformer.generation.fast.steps import recorded_reads, recorded_steps
from minitransformer.generation.modes import evaluating
from minitransformer.generation.processors import ForceToken, Processor, SuppressTokens
from minitransformer.generation.readers import CachedReader, Reader, TargetReader, UncachedReader
from minitransformer.generation.sampling import (
    Request,
    check_prompt,
    choose,
    own_generators,
    seeded,
    uniform_numbers,
)
from minitransformer.models.decoder import DecoderLM


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
    (on the CPU), by default one with the seed of `sampling`; torch's global one is not touched. `cached=False` gives
    the same tokens, slowly. `sampling.stop` is for callers that turn tokens into text.
    """
    check_no_beams(sampling)
    check_prompt(prompt)
    streams = own_generators(sampling.num_samples, seeded(generator, sampling))
    if not cached:
        requests = [Request(prompt, sampling, uniform_numbers(numbers), ends) for numbers in streams]
        yield from decode(UncachedReader(model), requests, model, vocab_size)
        return
    slots = len(prompt) + sampling.max_new_tokens
    engine = Engine(model, len(streams), slots, vocab_size=vocab_size, make_steps=recorded_steps)
    requests = [engine.submit(prompt, sampling, ends=ends, numbers=numbers) for numbers in streams]
    while not engine.idle:
        if engine.step():
            yield [request.tokens[-1] for request in requests]


def generate_each(
    model: DecoderLM,
    prompts: Sequence[Sequence[int]],
    sampling: SamplingConfig,
    *,
    batch_size: int,
    ends: Sequence[int] = (),
    vocab_size: int | None = None,
    over: Callable[[int, int], bool] = lambda number, token: False,
) -> Iterator[tuple[int, list[int]]]:
    """For each prompt, its number and the tokens that follow it, in the order in which they end.

    Each is what `generate` gives for this prompt alone with the same seed, up to the rounding of sums, with one of
    `ends` as its last token if it has come. `over` is told the number and each new token, and may end the text.
    """
    slots = max(map(len, prompts), default=0) + sampling.max_new_tokens
    rows = min(batch_size, len(prompts))
    engine = Engine(model, rows, slots, vocab_size=vocab_size, make_steps=recorded_steps)
    numbers = {
        engine.submit(prompt, sampling, ends=ends, stops=partial(over, number)): number
        for number, prompt in enumerate(prompts)
    }
    while not engine.idle:
        for request, _ in engine.step():
            if request.done:
                yield numbers[request], request.tokens


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
    processors = sampling.make_processors(len(prompt), ends)
    with evaluating(model):
        max_tokens = len(prompt) + sampling.max_new_tokens
        read: Reader = CachedReader(model, max_tokens, recorded_reads) if cached else UncachedReader(model)
        [found] = beam_search(
            read, prompts, sampling, processors=processors, ends=ends, vocab_size=vocab_size, stops=stops
        )
    return [hypothesis.tokens for hypothesis in found[: sampling.num_samples]]


@torch.inference_mode()
def decode(
    read: Reader, requests: Sequence[Request], model: nn.Module, vocab_size: int | None = None
) -> Generator[list[int], None, None]:
    """The plain loop of an engine: one token for each request a step, until all are done, as `read` sees whole texts.

    The prompts are of one length. `model` is in eval mode meanwhile.
    """
    device = next(model.parameters()).device
    with evaluating(model):
        for step in on_host(_choices(read, requests, device, vocab_size), device.type == "cuda"):
            for request, token in zip(requests, step, strict=True):
                if not request.done:
                    request.take(token)
            yield [request.tokens[-1] for request in requests]
            if all(request.done for request in requests):
                return


def _choices(
    read: Reader, requests: Sequence[Request], device: torch.device, vocab_size: int | None
) -> Iterator[Int[Tensor, "samples"]]:
    """The tokens of each step, on the device, which need not have drawn them yet."""
    prompts, most = torch.tensor([list(request.prompt) for request in requests]), requests[0].sampling.max_new_tokens
    tokens = torch.cat([prompts, prompts.new_zeros(len(requests), most)], dim=1).to(device)
    for length in range(prompts.size(1), tokens.size(1)):
        chosen = choose(read(tokens.narrow(1, 0, length))[:, :vocab_size], requests)
        tokens[:, length] = chosen
        yield chosen


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
            streams = own_generators(len(rows), seeded(generator, sampling))
            requests = [Request([start], limited, uniform_numbers(own), ends, rules=rules) for own in streams]
            for _ in decode(read, requests, model, vocab_size):
                pass
            drawn = [request.tokens for request in requests]
            targets = [drawn[i : i + copies] for i in range(0, len(drawn), copies)]
        else:
            prompts = torch.full((len(sources), 1), start, device=device)
            processors = limited.make_processors(1, ends, rules)
            found = beam_search(read, prompts, limited, processors=processors, ends=ends, vocab_size=vocab_size)
            targets = [[hypothesis.tokens for hypothesis in text[: sampling.num_samples]] for text in found]
    return [[_before(ends, tokens) for tokens in text] for text in targets]


def _rules(forced: dict[int, int | None], never: Sequence[int]) -> list[Processor]:
    """`forced` says after how many tokens which one must come, if any."""
    banned = [SuppressTokens(never)] if never else []
    return [*banned, *(ForceToken(length, token) for length, token in forced.items() if token is not None)]


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
