"""Logits processors do what their papers say, the decode loop is exact, and streams never show what is not certain."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import islice, pairwise
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from minitransformer.architecture.cache import KVCache
from minitransformer.architecture.positions import PositionScheme
from minitransformer.architecture.residual import Residual
from minitransformer.errors import UserError
from minitransformer.generation.arriving import on_host
from minitransformer.generation.decode import generate
from minitransformer.generation.fast import recording, steps
from minitransformer.generation.processors import (
    MinP,
    RepetitionPenalty,
    SamplingConfig,
    Temperature,
    TopK,
    TopP,
)
from minitransformer.generation.readers import window_length
from minitransformer.generation.samples import sample_of
from minitransformer.generation.sampling import draw, own_generators, uniform_numbers
from minitransformer.generation.streaming import TextStream, stream_text
from minitransformer.models.decoder import DecoderLM
from minitransformer.text.tokenizers import Tokenizer
from tests.placements_for_tests import choosing

MakeDecoder = Callable[..., DecoderLM]
NO_TOKENS = torch.zeros(1, 0, dtype=torch.long)
# Quarters make ties likely and sums exact enough to compare.
logit_rows = st.lists(st.integers(-20, 20).map(lambda n: n / 4), min_size=1, max_size=12)


def processed(processor: Any, row: list[float], tokens: list[int] | None = None) -> list[float]:
    logits = torch.tensor([row], dtype=torch.float64)
    before = logits.clone()
    result = processor(logits, NO_TOKENS if tokens is None else torch.tensor([tokens]))[0].tolist()
    assert torch.equal(logits, before), "a processor changed its input"
    return result


def probabilities(row: list[float]) -> list[float]:
    highest = max(row)
    weights = [math.exp(logit - highest) for logit in row]
    return [weight / sum(weights) for weight in weights]


def kept(row: list[float]) -> set[int]:
    return {i for i, logit in enumerate(row) if logit != -math.inf}


# Processors


@given(logit_rows, st.data(), st.floats(0.1, 5))
def test_repetition_penalty_is_ctrls(row: list[float], data: st.DataObject, penalty: float) -> None:
    tokens = data.draw(st.lists(st.integers(0, len(row) - 1), min_size=1, max_size=20))
    expected = [
        logit if i not in tokens else logit / penalty if logit > 0 else logit * penalty for i, logit in enumerate(row)
    ]
    assert processed(RepetitionPenalty(penalty), row, tokens) == pytest.approx(expected)


@given(logit_rows, st.floats(0.05, 5))
def test_temperature_divides_the_logarithms_of_probabilities(row: list[float], temperature: float) -> None:
    expected = probabilities([logit / temperature for logit in row])
    assert probabilities(processed(Temperature(temperature), row)) == pytest.approx(expected)


@given(logit_rows, st.sampled_from([1e-3, 1e-30, 1e-46, 5e-324]))
def test_the_limit_of_temperature_zero_is_greedy(row: list[float], temperature: float) -> None:
    logits = Temperature(temperature)(torch.tensor([row]), NO_TOKENS)
    likeliest = [i for i, logit in enumerate(row) if logit == max(row)]
    expected = torch.zeros(len(row))
    expected[likeliest] = 1 / len(likeliest)
    torch.testing.assert_close(logits.softmax(-1)[0], expected)


@given(logit_rows, st.integers(1, 15))
def test_top_k_keeps_the_k_likeliest_and_their_ties(row: list[float], k: int) -> None:
    last = sorted(row, reverse=True)[: min(k, len(row))][-1]
    result = processed(TopK(k), row)
    assert kept(result) == {i for i, logit in enumerate(row) if logit >= last}
    assert all(result[i] == row[i] for i in kept(result))


@given(logit_rows, st.floats(0.01, 0.999))
def test_top_p_keeps_the_smallest_set_that_reaches_p(row: list[float], p: float) -> None:
    probability = probabilities(row)
    nucleus = kept(processed(TopP(p), row))
    mass = sum(probability[i] for i in nucleus)
    assert nucleus
    assert mass >= p - 1e-9, "the set does not reach p"
    assert mass - min(probability[i] for i in nucleus) < p + 1e-9, "one token less would do"
    outside = set(range(len(row))) - nucleus
    assert all(probability[i] <= min(probability[j] for j in nucleus) + 1e-12 for i in outside), (
        "likelier ones left out"
    )


@given(logit_rows, st.floats(0.001, 1))
def test_min_p_keeps_what_is_likely_enough_beside_the_likeliest(row: list[float], min_p: float) -> None:
    probability = probabilities(row)
    share = [value / max(probability) for value in probability]
    result = kept(processed(MinP(min_p), row))
    assert {i for i in range(len(row)) if share[i] > min_p + 1e-9} <= result
    assert result <= {i for i in range(len(row)) if share[i] >= min_p - 1e-9}


@given(
    logit_rows,
    st.floats(0.01, 3),
    st.none() | st.integers(1, 5),
    st.none() | st.floats(0.01, 1),
    st.none() | st.floats(0, 1),
    st.floats(0.5, 2),
)
def test_something_always_remains_to_be_drawn(
    row: list[float], temperature: float, k: int | None, p: float | None, min_p: float | None, penalty: float
) -> None:
    logits = torch.tensor([row])
    tokens = torch.zeros(1, 1, dtype=torch.long)
    for process in SamplingConfig(temperature, k, p, min_p, penalty).processors(1, []):
        logits = process(logits, tokens)
    total = logits.softmax(-1).sum()
    torch.testing.assert_close(total, torch.tensor(1.0))


def test_processors_stand_in_the_order_that_users_know() -> None:
    every = SamplingConfig(temperature=0.5, top_k=5, top_p=0.5, min_p=0.1, repetition_penalty=1.2)
    assert every.processors(1, []) == [RepetitionPenalty(1.2), Temperature(0.5), TopK(5), TopP(0.5), MinP(0.1)]
    assert SamplingConfig(temperature=1, top_p=1, min_p=0).processors(1, []) == []
    assert SamplingConfig(temperature=0, top_k=5, repetition_penalty=1.2).processors(1, []) == [RepetitionPenalty(1.2)]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_p", math.nan),
        ("min_p", -0.1),
        ("min_p", 1.1),
        ("top_k", 0),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", math.nan),
        ("max_new_tokens", 0),
        ("num_samples", 0),
        ("seed", -1),
        ("stop", ("",)),
    ],
)
def test_a_setting_without_meaning_is_refused_by_name_and_value(field: str, value: Any) -> None:
    with pytest.raises(UserError, match="stop string is empty" if field == "stop" else rf"{field} is {value}"):
        SamplingConfig(**{field: value})


# Drawing


def test_tokens_are_drawn_as_often_as_the_model_says() -> None:
    probability = torch.tensor([0.5, 0.25, 0.0, 0.15, 0.07, 0.03])
    trials = 20_000
    uniform = torch.rand(trials, generator=torch.Generator().manual_seed(1))
    tokens = draw(probability.log().expand(trials, -1), uniform)
    counts = torch.bincount(tokens, minlength=6).float()
    assert counts[2] == 0, "an impossible token was drawn"
    possible = probability > 0
    expected = probability[possible] * trials
    chi_square = ((counts[possible] - expected) ** 2 / expected).sum().item()
    assert chi_square < 18.47, "beyond the 99.9 % point of 4 degrees of freedom"


@given(st.integers(1, 2000), st.integers(0, 2**32))
def test_no_number_draws_an_impossible_token(vocab: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(1, vocab, generator=generator) * 10
    logits[torch.rand(1, vocab, generator=generator) < 0.5] = -math.inf
    logits[0, 0] = -math.inf
    logits[0, vocab // 2] = 0
    for number in (0.0, 1 - 2**-24):
        token = draw(logits, torch.tensor([number])).item()
        assert logits.softmax(-1)[0, int(token)] > 0


def test_every_sample_has_its_own_numbers_whatever_their_count_and_length() -> None:
    long, short = (
        [list(islice(uniform_numbers(own), steps)) for own in own_generators(samples, torch.Generator().manual_seed(5))]
        for samples, steps in ((4, 600), (2, 30))
    )
    assert [numbers[:30] for numbers in long[:2]] == short
    assert len({number for numbers in long for number in numbers}) > 2390


# The window


@given(st.integers(1, 20), st.integers(1, 100))
def test_the_window_drops_the_oldest_half_when_it_is_full(context: int, total: int) -> None:
    window: list[int] = []
    for token in range(total):
        if len(window) == context:
            window = window[(context + 1) // 2 :]
        window.append(token)
    assert window_length(total, context) == len(window)


# The loop


def run(model: DecoderLM, prompt: list[int], *, cached: bool = True, **settings: Any) -> list[list[int]]:
    return list(generate(model, prompt, SamplingConfig(**{"seed": 3, **settings}), cached=cached))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("positions", PositionScheme.registry)
def test_cached_decoding_is_uncached_decoding_even_past_the_context(
    tiny_decoder: MakeDecoder, positions: str, temperature: float
) -> None:
    for choices in ({}, {"num_kv_heads": 2, "qk_norm": "head", "attention_window": 5}):
        model = tiny_decoder(positions=positions, context_length=8, **choices)
        settings = {"temperature": temperature, "num_samples": 2, "max_new_tokens": 14}
        for prompt in ([1, 2, 3], list(range(11)) * 2):  # shorter and longer than the context
            assert run(model, prompt, **settings) == run(model, prompt, cached=False, **settings)


@pytest.mark.parametrize(
    "choices",
    [{}, {"positions": "t5"}, {"positions": "learned", "token_smear": True}, {"attention_window": 5}],
    ids=str,
)
@pytest.mark.parametrize(
    ("fixed", "all_seen"),
    [(True, [8, 16, 24, 32]), (False, [4, 5])],  # called or recorded; the other lengths are replayed
    ids=["fixed shapes", "any length"],
)
def test_a_text_that_looks_at_more_slots_the_longer_it_is_is_the_same(
    tiny_decoder: MakeDecoder,
    choices: dict[str, Any],
    fixed: bool,
    all_seen: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(recording, "FEW_SLOTS", 8)
    for module in (steps, recording):
        monkeypatch.setattr(module, "has_fixed_shapes", lambda device: fixed)
    monkeypatch.setattr(recording, "captured", recording.traced)
    model = tiny_decoder(context_length=32, **choices)
    settings = {"num_samples": 2, "max_new_tokens": 40}
    expected = run(model, [1, 2, 3], cached=False, **settings)
    seen = []
    at = KVCache.at
    monkeypatch.setattr(
        KVCache, "at", lambda cache, slots, n, **known: (seen.append(int(n)), at(cache, slots, n, **known))[1]
    )
    assert run(model, [1, 2, 3], **settings) == expected
    assert list(dict.fromkeys(seen)) == all_seen


@given(st.integers(1, 100_000), st.integers(1, 100_000))
def test_attention_looks_at_few_slots_more_than_are_in_use(length: int, most: int) -> None:
    length = min(length, most)
    seen = recording.slots_visible(length, most, fixed=True)
    assert length <= seen <= min(most, max(1.25 * length + 1, length + recording.FEW_SLOTS))


def test_a_long_text_looks_at_few_numbers_of_slots() -> None:
    assert len({recording.slots_visible(length, 32768, fixed=True) for length in range(1, 32769)}) == 20


@pytest.mark.parametrize("residual", Residual.registry)
def test_cached_decoding_is_uncached_decoding_for_every_placement(tiny_decoder: MakeDecoder, residual: str) -> None:
    model = tiny_decoder(context_length=8, **choosing(residual))
    settings = {"temperature": 0.7, "top_k": 8, "top_p": 0.95, "repetition_penalty": 1.3, "max_new_tokens": 20}
    assert run(model, [1, 2, 3], **settings) == run(model, [1, 2, 3], cached=False, **settings)


@pytest.mark.parametrize("context", [1, 2, 3])
def test_the_smallest_contexts_decode(tiny_decoder: MakeDecoder, context: int) -> None:
    model = tiny_decoder(context_length=context)
    assert run(model, [1, 2], max_new_tokens=9) == run(model, [1, 2], max_new_tokens=9, cached=False)


def test_greedy_decoding_takes_the_likeliest_token_of_the_model(tiny_decoder: MakeDecoder) -> None:
    model = tiny_decoder()
    tokens = [4, 2]
    for [new] in run(model, tokens, temperature=0, max_new_tokens=20):
        assert new == model(torch.tensor([tokens]))[0, -1].argmax().item()
        tokens = [*tokens, new]


@pytest.mark.parametrize(("asynchronous", "order"), [(False, "0a1b2c"), (True, "01a2bc")])
def test_an_asynchronous_device_has_the_next_step_to_do_while_one_is_read(asynchronous: bool, order: str) -> None:
    events = []

    def steps() -> Iterator[Tensor]:
        for step in range(3):
            events.append(str(step))
            yield torch.tensor([step])

    for [step] in on_host(steps(), asynchronous):
        events.append("abc"[step])
    assert "".join(events) == order


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("choices", [{}, {"num_experts": 3}], ids=str)
def test_a_gpu_writes_by_its_graphs_what_it_writes_alone(tiny_decoder: MakeDecoder, choices: dict[str, Any]) -> None:
    model = tiny_decoder(context_length=16, **choices).cuda()
    settings = {"temperature": 1.0, "num_samples": 2, "max_new_tokens": 40}
    assert run(model, [1, 2, 3], **settings) == run(model, [1, 2, 3], cached=False, **settings)


def test_continuing_a_continuation_is_one_long_continuation(tiny_decoder: MakeDecoder) -> None:
    """Which tokens a model sees does not depend on who wrote them."""
    model = tiny_decoder(context_length=8)
    whole = [new for [new] in run(model, [1, 2], temperature=0, max_new_tokens=40)]
    for part in (3, 7, 20):
        rest = run(model, [1, 2, *whole[:part]], temperature=0, max_new_tokens=40 - part)
        assert [new for [new] in rest] == whole[part:]


def test_the_seed_decides_the_text_and_nothing_else_does(tiny_decoder: MakeDecoder) -> None:
    model = tiny_decoder()
    settings = {"temperature": 1.5, "max_new_tokens": 20}
    four = run(model, [1], num_samples=4, **settings)
    torch.manual_seed(99)
    state = torch.get_rng_state()
    two = run(model, [1], num_samples=2, **settings)
    assert torch.equal(state, torch.get_rng_state()), "the global generator was used"
    assert [step[:2] for step in four] == two
    assert [step[:2] for step in run(model, [1], num_samples=4, temperature=1.5, max_new_tokens=5)] == two[:5]
    assert run(model, [1], num_samples=2, seed=4, **settings) != two
    assert len({tuple(sample) for sample in zip(*four, strict=True)}) == 4


def test_the_loop_ends_when_every_sample_has_ended(tiny_decoder: MakeDecoder) -> None:
    model = tiny_decoder()
    sampling = SamplingConfig(temperature=2.0, num_samples=3, max_new_tokens=500, seed=0)
    samples = list(zip(*generate(model, [1], sampling, ends=[0]), strict=True))
    ends = [sample.index(0) for sample in samples]
    assert len(set(ends)) > 1
    assert max(ends) == len(samples[0]) - 1, "the loop went on after the last end"
    assert all(set(sample[end:]) == {0} for sample, end in zip(samples, ends, strict=True))


def test_tokens_that_the_tokenizer_lacks_are_never_drawn(tiny_decoder: MakeDecoder) -> None:
    sampling = SamplingConfig(temperature=5.0, max_new_tokens=40, seed=0)
    steps = list(generate(tiny_decoder(vocab_size=64), [1], sampling, vocab_size=3))
    assert {new for [new] in steps} == {0, 1, 2}


def test_the_prompt_is_read_once_for_all_samples_and_then_token_by_token(tiny_decoder: MakeDecoder) -> None:
    model = tiny_decoder()
    read = []
    model.embedding.register_forward_hook(lambda module, args, output: read.append(tuple(args[0].shape)))
    run(model, [1, 2, 3, 4], num_samples=3, max_new_tokens=4)
    assert read == [(1, 4), (3, 1), (3, 1), (3, 1)]


def test_the_model_is_as_before_when_the_loop_ends_or_is_left(tiny_decoder: MakeDecoder) -> None:
    model = tiny_decoder(dropout=0.5).train()
    sampling = SamplingConfig(max_new_tokens=5, seed=1)
    first = list(generate(model, [1], sampling))
    assert first == list(generate(model, [1], sampling)), "dropout was on"
    steps = generate(model, [1], sampling)
    next(steps)
    assert model.training, "the mode of the model changes for the caller between steps"
    assert not torch.is_inference_mode_enabled(), "inference mode leaks into the caller between steps"
    steps.close()
    assert model.training
    model(torch.tensor([[1]])).sum().backward()


def test_a_model_without_finite_logits_is_refused(tiny_decoder: MakeDecoder) -> None:
    model = tiny_decoder()
    with torch.no_grad():
        model.embedding.table.weight.fill_(math.nan)
    with pytest.raises(UserError, match="no finite probabilities"):
        run(model, [1])


def test_an_empty_prompt_is_refused(tiny_decoder: MakeDecoder) -> None:
    with pytest.raises(UserError, match="no token"):
        run(tiny_decoder(), [])


# Streams


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
    return Tokenizer.named("bytes").fit(lambda: iter(["abc"]))


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
