"""From a prompt, or a source, to tokens: `generate`, `search_each` and `translate`."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import takewhile
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from minitransformer.generation.beam import beam_search
from minitransformer.generation.config import SamplingConfig, check_no_beams
from minitransformer.generation.engine import Engine
from minitransformer.generation.fast.steps import recorded_steps
from minitransformer.generation.host import stream_to_host
from minitransformer.generation.logits import CachedLogits, NextLogits, TargetLogits, UncachedLogits
from minitransformer.generation.modes import evaluating
from minitransformer.generation.processors import ForceToken, Processor, SuppressTokens
from minitransformer.generation.sampling import (
    Request,
    check_prompt,
    choose,
    sample_generators,
    seeded,
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
    """The tokens that follow `prompt`: at each step, one for each sample.

    Ends after `max_new_tokens` steps, or when every sample has ended with one of `ends`, which a sample repeats until
    then. Only tokens below `vocab_size` are drawn (default: all that the model has). Random numbers come from
    `generator` (on the CPU), by default one with the seed of `sampling`; torch's global one is not touched.
    `cached=False` gives the same tokens, slowly. `sampling.stop` is for callers that turn tokens into text.
    """
    check_no_beams(sampling)
    check_prompt(prompt)
    generators = sample_generators(sampling.num_samples, seeded(generator, sampling))
    if not cached:
        requests = [Request(prompt, sampling, own, ends) for own in generators]
        yield from decode(UncachedLogits(model), requests, model, vocab_size)
        return
    slots = len(prompt) + sampling.max_new_tokens
    engine = Engine(model, len(generators), slots, vocab_size=vocab_size, make_steps=recorded_steps)
    requests = [engine.submit(prompt, sampling, ends=ends, generator=own) for own in generators]
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
    stops: Callable[[int, int], bool] = lambda number, token: False,
) -> Iterator[tuple[int, list[int]]]:
    """For each prompt, its number and the tokens that follow it, in the order in which they end.

    The tokens are those of `generate` for this prompt alone with the same seed, up to one of `ends`; sums are rounded
    otherwise in a batch, which next to never changes a token (`draw`). `stops` is called with the number and each new
    token, and may end the text.
    """
    slots = _most_tokens(prompts, sampling)
    rows = min(batch_size, len(prompts))
    engine = Engine(model, rows, slots, vocab_size=vocab_size, make_steps=recorded_steps)
    number_of = {
        engine.submit(prompt, sampling, ends=ends, stops=partial(stops, number)): number
        for number, prompt in enumerate(prompts)
    }
    while not engine.idle:
        for request, _ in engine.step():
            if request.done:
                yield number_of[request], request.tokens


def _most_tokens(prompts: Sequence[Sequence[int]], sampling: SamplingConfig) -> int:
    return max(map(len, prompts), default=0) + sampling.max_new_tokens


@torch.inference_mode()
def search_each(
    model: DecoderLM,
    prompts: Sequence[Sequence[int]],
    sampling: SamplingConfig,
    *,
    ends: Sequence[int] = (),
    vocab_size: int | None = None,
    stops: Callable[[Sequence[int]], bool] | None = None,
    cached: bool = True,
) -> Iterator[list[list[int]]]:
    """For each prompt, the `num_samples` best continuations of a beam search with `num_beams`, the best first.

    Each is its new tokens, with the one of `ends` that ends it, if one does; `stops` says whether new tokens end a text
    as well. The other arguments are those of `generate`. There are fewer continuations than asked for only where no
    others are possible.
    """
    beams, most = sampling.num_beams, _most_tokens(prompts, sampling)
    next_logits: CachedLogits | UncachedLogits
    next_logits = CachedLogits(model, beams, most, recorded_steps) if cached else UncachedLogits(model)
    for prompt in prompts:
        check_prompt(prompt)
        next_logits.rewind(0)
        tokens = torch.tensor([prompt], device=next(model.parameters()).device)
        processors = sampling.make_processors(len(prompt), ends)
        with evaluating(model):
            [found] = beam_search(
                next_logits, tokens, sampling, processors=processors, ends=ends, vocab_size=vocab_size, stops=stops
            )
        yield [hypothesis.tokens for hypothesis in found[: sampling.num_samples]]


@torch.inference_mode()
def decode(
    next_logits: NextLogits, requests: Sequence[Request], model: nn.Module, vocab_size: int | None = None
) -> Generator[list[int], None, None]:
    """The plain loop of an engine: one token for each request a step, until all are done.

    The prompts are of one length. `model` is in eval mode during a step.
    """
    device = next(model.parameters()).device
    with evaluating(model):
        for step in stream_to_host(_choices(next_logits, requests, device, vocab_size), device.type == "cuda"):
            for request, token in zip(requests, step, strict=True):
                if not request.done:
                    request.append(token)
            yield [request.tokens[-1] for request in requests]
            if all(request.done for request in requests):
                return


def _choices(
    next_logits: NextLogits, requests: Sequence[Request], device: torch.device, vocab_size: int | None
) -> Iterator[Int[Tensor, "samples"]]:
    """The tokens of each step, on the device, which may still be computing them."""
    prompts, most = torch.tensor([list(request.prompt) for request in requests]), requests[0].sampling.max_new_tokens
    tokens = torch.cat([prompts, prompts.new_zeros(len(requests), most)], dim=1).to(device)
    for length in range(prompts.size(1), tokens.size(1)):
        chosen = choose(next_logits(tokens.narrow(1, 0, length))[:, :vocab_size], requests)
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
    forced_bos: int | None = None,
    forced_eos: int | None = None,
    suppressed: Sequence[int] = (),
    vocab_size: int | None = None,
    generator: torch.Generator | None = None,
) -> list[list[list[int]]]:
    """For each source, `num_samples` targets, the best first, each without the one of `ends` that ends it.

    Every target begins after `start`, and has no more tokens than the context length. `forced_bos`, if given, is its
    first token, `forced_eos` the last one of a target of maximum length, and none of `suppressed` is ever generated.
    With `num_beams` by beam search, otherwise as in `generate`.
    """
    device = next(model.parameters()).device
    source, is_token = padded(sources, device)
    limited = replace(sampling, max_new_tokens=min(sampling.max_new_tokens, model.config.context_length))
    rules = _rules({1: forced_bos, limited.max_new_tokens: forced_eos}, suppressed)
    copies = sampling.num_beams if sampling.num_beams > 1 else sampling.num_samples
    rows = torch.arange(len(sources), device=device).repeat_interleave(copies)
    with evaluating(model):
        next_logits = TargetLogits(model, model.encode(source, is_token=is_token).select(rows))
        if sampling.num_beams == 1:
            generators = sample_generators(len(rows), seeded(generator, sampling))
            requests = [Request([start], limited, own, ends, rules=rules) for own in generators]
            for _ in decode(next_logits, requests, model, vocab_size):
                pass
            drawn = [request.tokens for request in requests]
            targets = [drawn[i : i + copies] for i in range(0, len(drawn), copies)]
        else:
            prompts = torch.full((len(sources), 1), start, device=device)
            processors = limited.make_processors(1, ends, rules)
            found = beam_search(next_logits, prompts, limited, processors=processors, ends=ends, vocab_size=vocab_size)
            targets = [[hypothesis.tokens for hypothesis in text[: sampling.num_samples]] for text in found]
    return [[_before(ends, tokens) for tokens in text] for text in targets]


def _rules(forced: dict[int, int | None], suppressed: Sequence[int]) -> list[Processor]:
    """Of tokens that are forced at a length, if any, and of tokens that are suppressed."""
    banned = [SuppressTokens(suppressed)] if suppressed else []
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
