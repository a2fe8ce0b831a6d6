"""Numbers and dates in English words, and the same in digits: a translation that is right or wrong, without end."""

from __future__ import annotations

import random
from collections.abc import Iterator
from datetime import date, timedelta

DESCRIPTION = "English numbers and dates in words, and in digits, without end"

SMALL = (
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"),
    *("thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen"),
)
TENS = ("", "", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
SCALES = ((1_000_000, "million"), (1_000, "thousand"))
IRREGULAR = {
    **{"one": "first", "two": "second", "three": "third", "five": "fifth"},
    **{"eight": "eighth", "nine": "ninth", "twelve": "twelfth"},
}
MONTHS = (
    *("january", "february", "march", "april", "may", "june"),
    *("july", "august", "september", "october", "november", "december"),
)
FIRST_DAY, LAST_DAY = date(1100, 1, 1), date(2099, 12, 31)
MOST_DIGITS = 9
# Numbers of so many words are never trained on, and are all that validation asks; shorter and longer ones are trained.
HELD_OUT = (6, 11)
DATES = 0.25
DOCUMENTS = 20_000


def pair(generator: random.Random, held_out: bool) -> tuple[str, str]:
    """Words and digits: a number, or a date; with `held_out`, a number of as many words as HELD_OUT says."""
    if not held_out and generator.random() < DATES:
        day = FIRST_DAY + timedelta(generator.randrange((LAST_DAY - FIRST_DAY).days + 1))
        return date_in_words(day), day.isoformat()
    while True:
        digits = generator.randint(1, MOST_DIGITS)
        number = generator.randrange(10 ** (digits - 1) if digits > 1 else 0, 10**digits)
        words = in_words(number)
        if (count_words(words) in HELD_OUT) == held_out:
            return words, str(number)


def count_words(text: str) -> int:
    """Words, of which "forty-two" has two."""
    return len(text.replace("-", " ").split())


def in_words(number: int) -> str:
    """British English, as of 0 to 999,999,999: "four thousand and twelve", "one hundred thousand two hundred"."""
    words = []
    for scale, name in SCALES:
        count, number = divmod(number, scale)
        if count:
            words += [below_thousand(count), name]
    if 0 < number < 100 and words:
        words.append("and")
    if number or not words:
        words.append(below_thousand(number))
    return " ".join(words)


def below_thousand(number: int) -> str:
    hundreds, rest = divmod(number, 100)
    if not hundreds:
        return below_hundred(rest)
    return f"{SMALL[hundreds]} hundred" + (f" and {below_hundred(rest)}" if rest else "")


def below_hundred(number: int) -> str:
    if number < 20:
        return SMALL[number]
    tens, ones = divmod(number, 10)
    return TENS[tens] + (f"-{SMALL[ones]}" if ones else "")


def ordinal(number: int) -> str:
    """Of 1 to 99: "twenty-first"."""
    before, dash, last = below_hundred(number).rpartition("-")
    last = IRREGULAR.get(last, last.removesuffix("y") + "ieth" if last.endswith("y") else f"{last}th")
    return before + dash + last


def date_in_words(day: date) -> str:
    """ "the third of may nineteen eighty-four" """
    return f"the {ordinal(day.day)} of {MONTHS[day.month - 1]} {year_in_words(day.year)}"


def year_in_words(year: int) -> str:
    """Of 1100 to 2099, as said: "nineteen eighty-four", "nineteen oh five", "nineteen hundred", "two thousand"."""
    century, rest = divmod(year, 100)
    if year // 10 == 200:
        return in_words(year)
    if not rest:
        return f"{below_hundred(century)} hundred"
    return f"{below_hundred(century)} {'oh ' if rest < 10 else ''}{below_hundred(rest)}"


def version() -> str:
    """The documents depend on nothing but this file."""
    return ""


def documents() -> Iterator[str]:
    """Pairs as lines of text, for a model that reads one text: "four thousand and twelve = 4012"."""
    generator = random.Random(0)
    for _ in range(DOCUMENTS):
        words, digits = pair(generator, held_out=False)
        yield f"{words} = {digits}\n"
