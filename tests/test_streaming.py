"""Streams of text show whole characters, and nothing that is not certain."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from minitransformer.generation.config import SamplingConfig
from minitransformer.generation.decode import generate
from minitransformer.generation.samples import sample_of
from minitransformer.generation.streaming import TextStream, stream_text
from minitransformer.models.decoder import DecoderLM
from minitransformer.text.tokenizers import Bytes

MakeDecoder = Callable[..., DecoderLM]


def streamed(content: bytes, cuts: list[int], stop: tuple[str, ...] = ()) -> tuple[list[str], TextStream]:
    stream = TextStream(stop)
    edges = [0, *sorted(cut % (len(content) + 1) for cut in cuts), len(content)]
    pieces = [stream.feed(content[a:b]) for a, b in pairwise(edges)]
    return [*pieces, stream.finish()], stream


cut_points = st.lists(st.integers(0, 200), max_size=30)


@given(st.text(max_size=40), cut_points)
@example("🙂é漢", list(range(20)))
def test_a_stream_shows_whole_characters_and_all_of_them(text: str, cuts: list[int]) -> None:
    pieces, _ = streamed(text.encode(), cuts)
    assert "".join(pieces) == text
    assert "�" in text or not any("�" in piece for piece in pieces)


@given(st.binary(max_size=40), cut_points)
@example(b"\xf0\x9f\x99", [1, 2])
@example(b"\xf0\x9f\x99a\xff\xe2\x82", [1, 2, 3, 4, 5, 6])
def test_a_stream_of_any_bytes_is_their_decoding(content: bytes, cuts: list[int]) -> None:
    assert "".join(streamed(content, cuts)[0]) == content.decode(errors="replace")


def up_to_stop(text: str, stop: tuple[str, ...]) -> str:
    """The slow statement: read one character more at a time until a stop string is complete."""
    for end in range(len(text) + 1):
        complete = [text[:end].removesuffix(s) for s in stop if text[:end].endswith(s)]
        if complete:
            return min(complete, key=len)
    return text


@given(
    st.text("abé", max_size=20), st.lists(st.text("abé", min_size=1, max_size=5), min_size=1, max_size=3), cut_points
)
@example("aab", ["ab"], [1, 2])
@example("abcd", ["abcd", "bc"], [])
def test_a_stop_string_and_what_follows_is_never_shown(text: str, stops: list[str], cuts: list[int]) -> None:
    stop = tuple(stops)
    pieces, stream = streamed(text.encode(), cuts, stop)
    expected = up_to_stop(text, stop)
    assert "".join(pieces) == expected
    assert stream.stopped == any(s in text for s in stop)
    # Nothing shown was ever taken back: all that a stream says early is right.
    assert all(expected.startswith("".join(pieces[:n])) for n in range(len(pieces)))


def test_text_is_held_back_only_while_it_may_be_a_stop_string() -> None:
    stream = TextStream(["\n\nUser:"])
    pieces = [stream.feed(piece.encode()) for piece in ("Hi", "\n", "\nUs", "ed", "\n\nUser", ":", "more")]
    assert pieces == ["Hi", "", "", "\n\nUsed", "", "", ""]
    assert stream.finish() == ""


@pytest.fixture
def byte_tokenizer() -> Any:
    return Bytes()


def test_a_text_stream_is_the_decoding_of_the_tokens(tiny_decoder: MakeDecoder, byte_tokenizer: Any) -> None:
    model = tiny_decoder(vocab_size=300, d_model=16)
    sampling = SamplingConfig(temperature=1.0, num_samples=3, max_new_tokens=40, seed=2)
    end = byte_tokenizer.end_of_text
    steps = generate(model, [65], sampling, ends=[end], vocab_size=byte_tokenizer.vocab_size)
    expected = [byte_tokenizer.decode(sample) for sample in zip(*steps, strict=True)]
    pieces = list(stream_text(model, byte_tokenizer, [65], sampling))
    assert ["".join(sample) for sample in zip(*pieces, strict=True)] == expected
    assert len(set(expected)) == 3


def test_a_text_stream_ends_when_every_sample_has_met_its_stop(tiny_decoder: MakeDecoder, byte_tokenizer: Any) -> None:
    model = tiny_decoder(vocab_size=257)
    sampling = SamplingConfig(temperature=3.0, num_samples=2, max_new_tokens=3000, seed=2)
    free = ["".join(sample) for sample in zip(*stream_text(model, byte_tokenizer, [65], sampling), strict=True)]
    stop = (free[0][5:7], free[1][8:11])
    stopped = SamplingConfig(temperature=3.0, num_samples=2, max_new_tokens=3000, seed=2, stop=stop)
    pieces = list(stream_text(model, byte_tokenizer, [65], stopped))
    texts = ["".join(sample) for sample in zip(*pieces, strict=True)]
    assert texts == [up_to_stop(text, stop) for text in free]
    assert len(pieces) < 60


def test_a_sample_of_a_model_in_training_is_text_and_repeats(tiny_decoder: MakeDecoder, byte_tokenizer: Any) -> None:
    model = tiny_decoder(vocab_size=257, dropout=0.1).train()
    assert (
        sample_of(model, byte_tokenizer, byte_tokenizer, [], 20)
        == sample_of(model, byte_tokenizer, byte_tokenizer, [], 20)
        != ""
    )
    assert model.training
