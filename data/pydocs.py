"""The documentation that every Python carries: its language reference, and the docstrings of its standard library."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator

from minitransformer.text import stdlib

DESCRIPTION = "Python's own documentation, about 2 MB of English"
# Below this a docstring says little more than the name above it.
SHORTEST = 40

Definition = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
version = stdlib.version


def documents() -> Iterator[str]:
    """One document for each topic of the reference, then one for each module, like a page of `help()`."""
    yield from topics()
    seen: set[str] = set()
    for name, path in stdlib.modules():
        entries = [entry for entry in page(name, stdlib.syntax_tree(path.read_bytes()), seen) if entry]
        if entries:
            yield "\n\n".join([name, *entries]) + "\n"


def topics() -> Iterator[str]:
    """The chapters of the language reference that `help("topics")` knows."""
    from pydoc_data.topics import topics as texts

    # A chapter may be filed under two names.
    for text in dict.fromkeys(texts[name] for name in sorted(texts)):
        yield inspect.cleandoc(text) + "\n"


def page(module: str, tree: ast.Module, seen: set[str]) -> Iterator[str]:
    """The module's docstring, then heading and docstring of each class and function; each docstring once."""
    yield described("", tree, seen)
    yield from members(module, tree, seen)


def members(prefix: str, parent: ast.AST, seen: set[str]) -> Iterator[str]:
    for node in ast.iter_child_nodes(parent):
        if isinstance(node, Definition):
            yield described(heading(prefix, node), node, seen)
            if isinstance(node, ast.ClassDef):
                yield from members(f"{prefix}.{node.name}", node, seen)
        elif isinstance(node, ast.If | ast.Try):  # definitions that depend on the platform
            yield from members(prefix, node, seen)


def heading(prefix: str, node: Definition) -> str:
    """What one would type: `json.dumps(obj, *, skipkeys=False)`, `class json.JSONEncoder(object)`."""
    if isinstance(node, ast.ClassDef):
        bases = ", ".join(map(ast.unparse, node.bases))
        return f"class {prefix}.{node.name}" + (f"({bases})" if bases else "")
    return f"{prefix}.{node.name}({ast.unparse(node.args)})"


def described(title: str, node: Definition | ast.Module, seen: set[str]) -> str:
    """Title over indented docstring, or the docstring alone; empty if it is short or was seen before."""
    text = ast.get_docstring(node) or ""
    if len(text) < SHORTEST or text in seen:
        return ""
    seen.add(text)
    if not title:
        return text
    return "\n".join([title, *("    " + line if line else "" for line in text.splitlines())])
