"""Numbers: what the words say is what the digits say, by a reading that shares nothing with the writing."""

from __future__ import annotations

import random
from dataclasses import replace
from datetime import date
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minitransformer.errors import UserError
from minitransformer.text import recipes
from minitransformer.text.datasets.generated_pairs import POOL, GeneratedPairs, generate_pairs, generates_pairs
from minitransformer.text.token_files import TokenPairs
from minitransformer.text.tokenizers import Bytes

numbers: Any = recipes.load_recipe("numbers")
VALUES = {
    **{"zero": 0, "oh": 0, "one": 1, "two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8},
    **{"nine": 9, "ten": 10, "eleven": 11, "twelve": 12, "thirteen": 13, "fourteen": 14, "fifteen": 15},
    **{"sixteen": 16, "seventeen": 17, "eighteen": 18, "nineteen": 19, "twenty": 20, "thirty": 30, "forty": 40},
    **{"fifty": 50, "sixty": 60, "seventy": 70, "eighty": 80, "ninety": 90},
}
DAYS = (
    *("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth", "eleventh"),
    *("twelfth", "thirteenth", "fourteenth", "fifteenth", "sixteenth", "seventeenth", "eighteenth", "nineteenth"),
    *("twentieth", "twenty-first", "twenty-second", "twenty-third", "twenty-fourth", "twenty-fifth", "twenty-sixth"),
    *("twenty-seventh", "twenty-eighth", "twenty-ninth", "thirtieth", "thirty-first"),
)
MONTHS = {
    **{"january": "01", "february": "02", "march": "03", "april": "04", "may": "05", "june": "06", "july": "07"},
    **{"august": "08", "september": "09", "october": "10", "november": "11", "december": "12"},
}


def value(words: str) -> int:
    """What number words say: a sum that hundreds, thousands and millions multiply."""
    whole = group = 0
    for word in words.replace("-", " ").split():
        if word == "hundred":
            group *= 100
        elif word in ("thousand", "million"):
            whole, group = whole + group * {"thousand": 1000, "million": 1_000_000}[word], 0
        elif word != "and":
            group += VALUES[word]
    return whole + group


def iso(words: str) -> str:
    """What a date says."""
    the, day, of, month, *year = words.split()
    assert (the, of) == ("the", "of")
    if year[1:2] == ["thousand"]:
        number = value(" ".join(year))
    elif year[-1] == "hundred":
        number = 100 * value(year[0])
    else:
        number = 100 * value(year[0]) + value(" ".join(year[1:]))
    return f"{number}-{MONTHS[month]}-{DAYS.index(day) + 1:02d}"


@given(st.integers(1, 9).flatmap(lambda digits: st.integers(0, 10**digits - 1)))
def test_number_words_say_the_number(number: int) -> None:
    assert value(numbers.in_words(number)) == number


@given(st.dates(date(1100, 1, 1), date(2099, 12, 31)))
def test_date_words_say_the_date(day: date) -> None:
    assert iso(numbers.date_in_words(day)) == day.isoformat()


def test_no_two_numbers_and_no_two_years_have_the_same_words() -> None:
    assert len({numbers.in_words(number) for number in range(20_000)}) == 20_000
    assert len({numbers.year_in_words(year) for year in range(1100, 2100)}) == 1000


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (0, "zero"),
        (13, "thirteen"),
        (40, "forty"),
        (99, "ninety-nine"),
        (100, "one hundred"),
        (4012, "four thousand and twelve"),
        (4112, "four thousand one hundred and twelve"),
        (100_200, "one hundred thousand two hundred"),
        (120_001, "one hundred and twenty thousand and one"),
        (5_000_000, "five million"),
        (
            987_654_321,
            "nine hundred and eighty-seven million six hundred and fifty-four thousand three hundred and twenty-one",
        ),
    ],
)
def test_numbers_are_said_as_in_british_english(number: int, words: str) -> None:
    assert numbers.in_words(number) == words


@pytest.mark.parametrize(
    ("day", "words"),
    [
        (date(1984, 5, 3), "the third of may nineteen eighty-four"),
        (date(1905, 12, 20), "the twentieth of december nineteen oh five"),
        (date(1809, 2, 12), "the twelfth of february eighteen oh nine"),
        (date(1900, 1, 31), "the thirty-first of january nineteen hundred"),
        (date(2000, 2, 29), "the twenty-ninth of february two thousand"),
        (date(2007, 9, 12), "the twelfth of september two thousand and seven"),
        (date(2010, 10, 8), "the eighth of october twenty ten"),
        (date(1111, 11, 11), "the eleventh of november eleven eleven"),
    ],
)
def test_dates_are_said_as_in_british_english(day: date, words: str) -> None:
    assert numbers.date_in_words(day) == words


def draw(held_out: bool, count: int = 5000) -> list[tuple[str, str]]:
    generator = random.Random(1)
    return [numbers.pair(generator, held_out) for _ in range(count)]


def test_training_never_has_the_lengths_that_validation_asks() -> None:
    trained = [digits for _, digits in draw(held_out=False) if "-" not in digits]
    assert {len(digits) for digits in trained} == set(range(1, 10))
    assert 0.7 < len(trained) / 5000 < 0.8
    lengths = {numbers.count_words(words) for words, digits in draw(held_out=False) if "-" not in digits}
    assert {5, 7, 10, 12} < lengths
    assert not lengths & {6, 11}
    assert {numbers.count_words(words) for words, _ in draw(held_out=True)} == {6, 11}


@pytest.mark.parametrize("held_out", [False, True])
def test_every_drawn_pair_is_exact(held_out: bool) -> None:
    for words, digits in draw(held_out):
        assert digits == (iso(words) if "-" in digits else str(value(words)))


def test_pairs_depend_on_the_generator_alone() -> None:
    assert draw(held_out=False) == draw(held_out=False)


def test_as_text_each_pair_is_a_line() -> None:
    documents = list(numbers.documents())
    assert len(documents) == 20_000
    words, digits = documents[0].removesuffix("\n").split(" = ")
    assert digits == (iso(words) if "-" in digits else str(value(words)))


# --- as batches


def generated(batch_tokens: int, seed: int = 0, context_length: int = 256) -> GeneratedPairs:
    return GeneratedPairs(numbers.pair, Bytes(), context_length, batch_tokens, seed)


def said(batches: GeneratedPairs, index: int) -> list[tuple[str, str]]:
    """The pairs of a batch as text."""
    batch = batches.batch(index)
    rows = zip(batch.source.tolist(), batch.targets.clamp(min=0).tolist(), strict=True)
    return [(Bytes().decode(source).rstrip("\0"), Bytes().decode(target).rstrip("\0")) for source, target in rows]


@given(batch_tokens=st.integers(1, 600), seed=st.integers(0, 2**32), index=st.integers(0, 2**40))
def test_generated_batches_keep_to_the_budget_and_depend_on_seed_and_index_alone(
    batch_tokens: int, seed: int, index: int
) -> None:
    batches = generated(batch_tokens, seed)
    batch = batches.batch(index)
    rows = len(batch.source)
    assert rows == 1 or rows * max(batch.source.shape[1], batch.targets.shape[1]) <= batch_tokens
    batches.batch(index + POOL)
    again = generated(batch_tokens, seed).batch(index)
    assert torch.equal(batch.source, again.source)
    assert torch.equal(batch.targets, again.targets)


@pytest.mark.parametrize("batch_tokens", [50, 1000])
def test_no_generated_pair_is_used_twice_but_by_chance_and_none_is_held_out(batch_tokens: int) -> None:
    batches = generated(batch_tokens)
    seen = [pair for index in range(3 * POOL) for pair in said(batches, index)]
    long = [words for words, digits in seen if len(digits) >= 6]
    assert len(set(long)) > 0.99 * len(long) > 10
    assert all(digits == (iso(words) if "-" in digits else str(value(words))) for words, digits in seen)
    assert not {numbers.count_words(words) for words, digits in seen if "-" not in digits} & {6, 11}


def test_what_is_longer_than_the_context_is_not_trained_on() -> None:
    batches = generated(500, context_length=60)
    assert max(batches.batch(index).source.shape[1] for index in range(2 * POOL)) == 60


def test_generated_data_validates_on_the_same_held_out_pairs_every_time() -> None:
    data, again = (generate_pairs("numbers", context_length=128) for _ in range(2))

    def answers(pairs: TokenPairs) -> list[str]:
        return [Bytes().decode(pairs.targets[i].tolist()) for i in range(len(pairs))]

    assert answers(data.validation) == answers(again.validation)
    assert len(answers(data.validation)) == 500
    assert {numbers.count_words(numbers.in_words(int(digits))) for digits in answers(data.validation)} == {6, 11}
    assert data.num_bytes("validation") == sum(map(len, answers(data.validation)))
    assert data.folder == again.folder
    data = replace(data, batch_tokens=1000)
    assert sum(len(batch.source) for batch in data.ordered_batches("validation")) == 500
    assert said(data.training_batches(3), 5) == said(generated(1000, seed=3, context_length=128), 5)
    assert "500 pairs" in data.summary()
    assert max(map(len, data.summary().splitlines())) < 80


def test_a_context_without_room_for_what_validation_asks_is_refused() -> None:
    with pytest.raises(UserError, match=r"numbers needs up to \d+ tokens per side, and the context has 32"):
        generate_pairs("numbers", context_length=32)


def test_a_recipe_of_texts_makes_no_pairs() -> None:
    assert generates_pairs("numbers")
    assert not generates_pairs("pydocs")
    assert not generates_pairs("somewhere.tsv")
    with pytest.raises(UserError, match="recipe pydocs makes no pairs: choose numbers"):
        generate_pairs("pydocs", context_length=128)
