"""From tokens to text while they are generated: never half a character, and never a part of a stop string."""

from __future__ import annotations

import codecs
from collections.abc import Iterator, Sequence

import torch

from minitransformer.generation.config import SamplingConfig
from minitransformer.generation.decode import generate, generate_each, search_each
from minitransformer.generation.fast.steps import recorded_steps
from minitransformer.generation.speculation import Draft, speculate
from minitransformer.models.decoder import DecoderLM
from minitransformer.text.tokenizers import Tokenizer


class TextStream:
    """Incremental decoding of UTF-8 bytes, up to a stop string.

    All that `feed` and `finish` return, joined, is the text of all bytes (U+FFFD where they are not UTF-8) up to the
    stop string that is complete first, the longest of those complete at once; `stopped` says that there is one.
    """

    def __init__(self, stop: Sequence[str] = ()) -> None:
        self.stop = stop
        self.stopped = False
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""

    def feed(self, piece: bytes) -> str:
        """The text that is certain now, without what may be half a character or the beginning of a stop string."""
        return self._advance(self._decoder.decode(piece))

    def finish(self) -> str:
        """The rest, which was held back."""
        text = self._advance(self._decoder.decode(b"", final=True)) + self._held
        self._held = ""
        return text

    def _advance(self, text: str) -> str:
        if self.stopped:
            return ""
        if not self.stop:
            return text
        held = self._held + text
        found = [(begin + len(stop), begin) for stop in self.stop if (begin := held.find(stop)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return held[: min(found)[1]]
        certain = len(held) - self._possible_beginning(held)
        self._held = held[certain:]
        return held[:certain]

    def _possible_beginning(self, text: str) -> int:
        """How many of the last characters of `text` may be the beginning of a stop string."""
        longest = min(len(text), max(map(len, self.stop)) - 1)
        lengths = range(longest, 0, -1)
        return next((n for n in lengths if any(stop.startswith(text[-n:]) for stop in self.stop)), 0)


class TokenStream(TextStream):
    """The text of one sample, from its tokens up to one of the tokenizer's `ends`."""

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str]) -> None:
        super().__init__(stop)
        self._tokenizer = tokenizer
        self._ended = False

    @property
    def over(self) -> bool:
        """Whether no text follows."""
        return self.stopped or self._ended

    def feed_tokens(self, *tokens: int) -> str:
        """`feed` the bytes of these tokens."""
        self._ended |= tokens[-1] in self._tokenizer.ends
        return self.feed(self._tokenizer.decode_bytes(token for token in tokens if token not in self._tokenizer.ends))


def stream_text(
    model: DecoderLM,
    tokenizer: Tokenizer,
    prompt: Sequence[int],
    sampling: SamplingConfig,
    *,
    generator: torch.Generator | None = None,
    cached: bool = True,
    draft: Draft | None = None,
) -> Iterator[list[str]]:
    """The text that follows `prompt`: at each step, the new text of each sample, which may be "".

    A sample ends with an end-of-text token or a stop string; the stream ends when all have. The arguments are those of
    `generate`; with a `draft`, those of `speculate`, and the samples come one after the other.
    """
    if draft is not None:
        yield from _stream_speculated_text(model, draft, tokenizer, prompt, sampling, generator)
        return
    streams = [TokenStream(tokenizer, sampling.stop) for _ in range(sampling.num_samples)]
    steps = generate(
        model,
        prompt,
        sampling,
        generator=generator,
        ends=tokenizer.ends,
        vocab_size=tokenizer.vocab_size,
        cached=cached,
    )
    for step in steps:
        yield [stream.feed_tokens(token) for stream, token in zip(streams, step, strict=True)]
        if all(stream.over for stream in streams):
            break
    steps.close()
    yield [stream.finish() for stream in streams]


def best_texts(
    model: DecoderLM, tokenizer: Tokenizer, prompts: Sequence[Sequence[int]], sampling: SamplingConfig
) -> Iterator[list[str]]:
    """For each prompt, the `num_samples` best texts of a beam search, the best first, up to their stop strings."""

    def decode(tokens: Sequence[int]) -> tuple[str, bool]:
        stream = TokenStream(tokenizer, sampling.stop)
        return stream.feed_tokens(*tokens) + stream.finish(), stream.stopped

    for found in search_each(
        model,
        prompts,
        sampling,
        ends=tokenizer.ends,
        vocab_size=tokenizer.vocab_size,
        stops=(lambda tokens: decode(tokens)[1]) if sampling.stop else None,
    ):
        yield [decode(tokens)[0] for tokens in found]


def texts_in_batches(
    model: DecoderLM,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    sampling: SamplingConfig,
    batch_size: int,
) -> Iterator[str]:
    """The text that follows each prompt, in their order, each as soon as it and those before it are complete.

    `batch_size` of them are generated at a time. `num_samples` is taken for 1.
    """
    streams = [TokenStream(tokenizer, sampling.stop) for _ in prompts]
    texts = [""] * len(prompts)

    def stops(number: int, token: int) -> bool:
        texts[number] += streams[number].feed_tokens(token)
        return streams[number].over

    done, shown = set(), 0
    for number, _ in generate_each(
        model,
        prompts,
        sampling,
        batch_size=batch_size,
        ends=tokenizer.ends,
        vocab_size=tokenizer.vocab_size,
        stops=stops,
    ):
        texts[number] += streams[number].finish()
        done.add(number)
        while shown in done:
            yield texts[shown]
            shown += 1


def _stream_speculated_text(
    model: DecoderLM,
    draft: Draft,
    tokenizer: Tokenizer,
    prompt: Sequence[int],
    sampling: SamplingConfig,
    generator: torch.Generator | None,
) -> Iterator[list[str]]:
    samples = speculate(
        model,
        draft,
        prompt,
        sampling,
        generator=generator,
        ends=tokenizer.ends,
        vocab_size=tokenizer.vocab_size,
        make_steps=recorded_steps,
    )
    for number, steps in enumerate(samples):
        stream = TokenStream(tokenizer, sampling.stop)
        for tokens in steps:
            yield _text_of(number, stream.feed_tokens(*tokens), sampling.num_samples)
            if stream.over:
                break
        yield _text_of(number, stream.finish(), sampling.num_samples)


def _text_of(sample: int, text: str, samples: int) -> list[str]:
    return [text if number == sample else "" for number in range(samples)]
