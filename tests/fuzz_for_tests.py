"""Values, texts and paths of every kind, and what must hold whatever is made of them."""

from __future__ import annotations

import json
import string
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from minitransformer.errors import UserError
from tests.hostile_for_tests import SECONDS, at_most
from tests.mutations import VALUES

SURROGATES = st.characters(categories=["Cs"])
MARKS = st.characters(categories=["Mn", "Me", "Mc"])
NONCHARACTERS = st.sampled_from(["\ufdd0", "\ufffe", "\uffff", "\U0001ffff", "\U0010fffe", "\U0010ffff"])
ODD = st.sampled_from(
    ["", "\0", "\ufeff", "\r", "\n", "\r\n", "\x85", "\u2028", "\t", " ", "\x1b[1m", "\x7f", "\u202e"]
)
PLANES = st.integers(0, 16).flatmap(
    lambda plane: st.characters(
        min_codepoint=plane << 16, max_codepoint=(plane << 16) + 0xFFFF, exclude_categories=["Cs"]
    )
)

pieces = st.one_of(PLANES, PLANES, ODD, NONCHARACTERS, MARKS, st.text(string.ascii_letters + " .,'0", max_size=9))
texts = st.lists(pieces, max_size=40).map("".join)
"""valid text: characters of all planes, noncharacters, marks, NUL, byte order marks and mixed line ends"""
any_texts = st.lists(st.one_of(pieces, SURROGATES), max_size=20).map("".join)
"""the same, and half surrogate pairs, which are no text"""

scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 300),
    st.integers(),
    st.floats(),
    st.floats(-2, 2),
    texts,
    st.sampled_from([value for value in VALUES if value != "\ud800"]),
)
json_values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3), max_leaves=5
)
"""any JSON value, and the numbers that are none"""


def for_cases(count: int, check: Callable[..., object], *strategies: st.SearchStrategy[Any]) -> None:
    """Call `check` with `count` examples of `strategies`, each within a time limit."""

    # Without shrinking, which takes minutes: the values are short as they are.
    @settings(
        max_examples=count,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(st.tuples(*strategies))
    def checked(values: tuple[Any, ...]) -> None:
        with at_most(SECONDS):
            check(*values)

    checked()


def cases(few: int, many: int) -> pytest.MarkDecorator:
    """`count` is `few`, and in the slow tests `many`."""
    return pytest.mark.parametrize("count", [few, pytest.param(many, marks=pytest.mark.slow)])


def sentence_of(action: Callable[[], object]) -> str | None:
    """The sentence by which `action` is refused; None if it is not. Any other error is one of the test."""
    try:
        action()
    except UserError as error:
        sentence = str(error).strip()
        assert sentence
        assert "\n" not in sentence, sentence
        return sentence
    return None


def state_of(folder: Path, but: str = "") -> dict[str, tuple[Any, ...]]:
    """Every file, link and folder in `folder`, and what they hold; those in the folder `but` in it are left out."""
    found = {}
    for top in sorted(folder.iterdir()):
        for path in [] if top.name == but else [top, *(top.rglob("*") if top.is_dir() else ())]:
            content = path.read_bytes() if path.is_file() and not path.is_symlink() else b""
            target = str(path.readlink()) if path.is_symlink() else ""
            found[str(path.relative_to(folder))] = (path.lstat().st_mode, content, target)
    return found


@contextmanager
def untouched(folder: Path, but: str = "") -> Iterator[None]:
    """Nothing in `folder` is written, removed or added, except in the folder `but` in it."""
    before = state_of(folder, but)
    yield
    assert state_of(folder, but) == before


def places_in(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every value inside a JSON value."""
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield (*path, key)
        yield from places_in(inner, (*path, key))


def with_value(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    """A copy of a JSON value with `new` at `path`."""
    copy = json.loads(json.dumps(value))
    container = copy
    for key in path[:-1]:
        container = container[key]
    container[path[-1]] = new
    return copy
