"""Which package of the standard library a docstring comes from: labels for free, on every machine."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from collections.abc import Iterator

from minitransformer.text import stdlib

DESCRIPTION = "docstrings of the standard library, each with the package that it comes from"
# Below this a docstring says little more than the name above it.
SHORTEST = 40
# Packages with fewer docstrings have too few to learn from.
FEWEST = 100

Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
version = stdlib.version


def documents() -> Iterator[tuple[str, str]]:
    """Each docstring once, as one line, with its package, of those that have enough; those of two packages in none."""
    packages: dict[str, set[str]] = defaultdict(set)
    for name, path in stdlib.modules():
        for text in docstrings(path.read_bytes()):
            packages[text].add(name.partition(".")[0])
    found: dict[str, list[str]] = defaultdict(list)
    for text, owners in packages.items():
        if len(owners) == 1:
            found[min(owners)].append(text)
    for package, texts in sorted(found.items()):
        if len(texts) >= FEWEST:
            yield from ((text, package) for text in texts)


def docstrings(source: bytes) -> Iterator[str]:
    """The docstrings of a module, its classes and its functions, without line breaks."""
    for node in ast.walk(stdlib.syntax_tree(source)):
        text = re.sub(r"\s+", " ", ast.get_docstring(node) or "") if isinstance(node, Documented) else ""
        if len(text) >= SHORTEST:
            yield text
