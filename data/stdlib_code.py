"""The source code of Python's standard library."""

from __future__ import annotations

import tokenize
from collections.abc import Iterator

from minitransformer.text import stdlib

DESCRIPTION = "the source code of Python's standard library"
version = stdlib.version


def documents() -> Iterator[str]:
    """One document for each source file, tests left out."""
    for _, path in stdlib.modules():
        with tokenize.open(path) as file:  # some declare another encoding than UTF-8
            text = file.read()
        if text.strip():
            yield text
