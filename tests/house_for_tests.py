"""What the package imports, in every form that Python has, and how long its files and functions are."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path


@dataclass(frozen=True)
class Source:
    """A module of the package `root`, by its dotted name."""

    name: str
    path: Path
    text: str

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text)

    @property
    def is_package(self) -> bool:
        return self.path.name == "__init__.py"

    @property
    def room(self) -> str:
        """The folder below the package that it stands in, or its own name if it stands beside the rooms."""
        return self.name.split(".")[1] if "." in self.name else "__init__"


def read_package(root: Path) -> dict[str, Source]:
    """All modules below `root`, by dotted name."""
    found = {}
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root.parent).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        found[name] = Source(name, path, path.read_text(encoding="utf-8"))
    return found


def imports_of(source: Source, modules: Mapping[str, object]) -> set[str]:
    """The `modules` that `source` imports: at its top, under TYPE_CHECKING or inside a function, in whatever form.

    Of `from a import b` it is a.b where that is a module, and a otherwise.
    """
    found: set[str] = set()
    for node in ast.walk(source.tree):
        for name in _named(node, source):
            while name and name not in modules:
                name = name.rpartition(".")[0]
            if name:
                found.add(name)
    return found - {source.name}


def _named(node: ast.AST, source: Source) -> Iterator[str]:
    match node:
        case ast.Import(names=names):
            yield from (alias.name for alias in names)
        case ast.ImportFrom(module=module, names=names, level=level):
            base = source.name.split(".")
            base = base[: len(base) - level + source.is_package] if level else []
            start = ".".join([*base, *filter(None, [module])])
            yield from (f"{start}.{alias.name}" for alias in names)
        case ast.Call(func=ast.Name(id="import_module" | "__import__") | ast.Attribute(attr="import_module")) as call:
            match call.args:
                case [ast.Constant(value=str(name)), *_] if not name.startswith("."):
                    yield name


def circles(graph: Mapping[str, set[str]]) -> list[list[str]]:
    """The groups of nodes of which each reaches every other one (Tarjan 1972)."""
    number: dict[str, int] = {}
    lowest: dict[str, int] = {}
    path: list[str] = []
    found = []

    def visit(node: str) -> None:
        number[node] = lowest[node] = len(number)
        path.append(node)
        for target in graph.get(node, ()):
            if target not in number:
                visit(target)
                lowest[node] = min(lowest[node], lowest[target])
            elif target in path:
                lowest[node] = min(lowest[node], number[target])
        if lowest[node] == number[node]:
            group = path[path.index(node) :]
            del path[path.index(node) :]
            if len(group) > 1:
                found.append(sorted(group))

    for node in graph:
        if node not in number:
            visit(node)
    return found


def function_lengths(source: Source) -> dict[str, int]:
    """Lines of each function, with its signature and docstring; of those with one name, the longest."""
    lengths: dict[str, int] = {}
    for node in ast.walk(source.tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            lengths[node.name] = max(lines, lengths.get(node.name, 0))
    return lengths


def public_names(source: Source) -> set[str]:
    """Classes, functions and names of types that the module defines for others."""
    found = set()
    for node in source.tree.body:
        match node:
            case ast.ClassDef(name=name) | ast.FunctionDef(name=name):
                found.add(name)
            case ast.Assign(value=ast.Call(func=ast.Name(id="TypeVar"))):
                pass
            case ast.Assign(targets=[ast.Name(id=name)]) | ast.AnnAssign(target=ast.Name(id=name)):
                if not name.isupper() and name[:1].isupper():
                    found.add(name)
    return {name for name in found if not name.startswith("_")}
