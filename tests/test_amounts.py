"""Numbers in what is printed."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minitransformer.amounts import amount, duration, size


@pytest.mark.parametrize(
    ("said", "words"),
    [
        *((amount(0), "0"), (amount(812), "812"), (amount(768_000), "768k"), (amount(999_600), "1M")),
        *((amount(1_843_000), "1.84M"), (amount(124_440_000), "124M"), (amount(5.5e9), "5.5B")),
        *((size(0), "0 bytes"), (size(900), "900 bytes"), (size(65_300), "65.3 kB"), (size(2.43e6), "2.43 MB")),
        *((duration(0.51), "0.51 s"), (duration(43), "43 s"), (duration(132), "2.2 min"), (duration(18_360), "5.1 h")),
        *((duration(4e6), "1111 h"), (amount(3e15), "3000T")),
    ],
)
def test_a_number_has_three_digits_and_a_unit(said: str, words: str) -> None:
    assert said == words


@given(number=st.integers(1, 10**14), seconds=st.floats(1e-3, 1e6))
def test_what_is_something_is_not_said_to_be_nothing(number: int, seconds: float) -> None:
    for said in (amount(number), size(number), duration(seconds)):
        assert float(re.match(r"[\d.]+", said)[0]) > 0
        assert "e" not in said.partition("bytes")[0]
