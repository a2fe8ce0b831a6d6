"""Logits processors do what their papers say."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minitransformer.errors import UserError
from minitransformer.generation.config import SamplingConfig
from minitransformer.generation.processors import (
    FrequencyPenalty,
    MinP,
    PresencePenalty,
    RepetitionPenalty,
    Temperature,
    TopK,
    TopP,
)
from minitransformer.models.decoder import DecoderLM

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


@given(logit_rows, st.data(), st.floats(0.1, 5))
def test_repetition_penalty_is_ctrls(row: list[float], data: st.DataObject, penalty: float) -> None:
    tokens = data.draw(st.lists(st.integers(0, len(row) - 1), min_size=1, max_size=20))
    expected = [
        logit if i not in tokens else logit / penalty if logit > 0 else logit * penalty for i, logit in enumerate(row)
    ]
    assert processed(RepetitionPenalty.choose(penalty=penalty).make(), row, tokens) == pytest.approx(expected)


@given(logit_rows, st.data(), st.integers(-8, 8), st.integers(-8, 8), st.integers(0, 3))
def test_presence_and_frequency_penalties_are_openais_and_do_not_count_the_prompt(
    row: list[float], data: st.DataObject, presence: int, frequency: int, prompt: int
) -> None:
    tokens = data.draw(st.lists(st.integers(0, len(row) - 1), min_size=prompt, max_size=20))
    counts = [tokens[prompt:].count(token) for token in range(len(row))]
    once = processed(PresencePenalty.choose(penalty=presence / 4).make(prompt), row, tokens)
    assert once == [logit - (n > 0) * presence / 4 for logit, n in zip(row, counts, strict=True)]
    often = processed(FrequencyPenalty.choose(penalty=frequency / 4).make(prompt), row, tokens)
    assert often == [logit - n * frequency / 4 for logit, n in zip(row, counts, strict=True)]


@given(logit_rows, st.floats(0.05, 5))
def test_temperature_divides_the_logarithms_of_probabilities(row: list[float], temperature: float) -> None:
    expected = probabilities([logit / temperature for logit in row])
    assert probabilities(processed(Temperature.choose(temperature=temperature).make(), row)) == pytest.approx(expected)


@given(logit_rows, st.sampled_from([1e-3, 1e-30, 1e-46, 5e-324]))
def test_the_limit_of_temperature_zero_is_greedy(row: list[float], temperature: float) -> None:
    logits = Temperature.choose(temperature=temperature).make()(torch.tensor([row]), NO_TOKENS)
    likeliest = [i for i, logit in enumerate(row) if logit == max(row)]
    expected = torch.zeros(len(row))
    expected[likeliest] = 1 / len(likeliest)
    torch.testing.assert_close(logits.softmax(-1)[0], expected)


@given(logit_rows, st.integers(1, 15))
def test_top_k_keeps_the_k_likeliest_and_their_ties(row: list[float], k: int) -> None:
    last = sorted(row, reverse=True)[: min(k, len(row))][-1]
    result = processed(TopK.choose(k=k).make(), row)
    assert kept(result) == {i for i, logit in enumerate(row) if logit >= last}
    assert all(result[i] == row[i] for i in kept(result))


@given(logit_rows, st.floats(0.01, 0.999))
def test_top_p_keeps_the_smallest_set_that_reaches_p(row: list[float], p: float) -> None:
    probability = probabilities(row)
    nucleus = kept(processed(TopP.choose(p=p).make(), row))
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
    result = kept(processed(MinP.choose(p=min_p).make(), row))
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
    sampling = SamplingConfig(temperature=temperature, top_k=k, top_p=p, min_p=min_p, repetition_penalty=penalty)
    for process in sampling.make_processors(1, []):
        logits = process(logits, tokens)
    total = logits.softmax(-1).sum()
    torch.testing.assert_close(total, torch.tensor(1.0))


def test_processors_stand_in_the_order_that_users_know() -> None:
    def made(**settings: Any) -> list[tuple[str, Any]]:
        processors = SamplingConfig(**settings).make_processors(1, [])
        return [(process.name, *vars(process.settings).values()) for process in processors]

    every = made(min_p=0.1, top_p=0.5, top_k=5, temperature=0.5, repetition_penalty=1.2)
    assert every == [("repetition-penalty", 1.2), ("temperature", 0.5), ("top-k", 5), ("top-p", 0.5), ("min-p", 0.1)]
    assert made(temperature=1, top_p=1, min_p=0) == []
    assert made(temperature=0, top_k=5, repetition_penalty=1.2) == [("repetition-penalty", 1.2)]


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
