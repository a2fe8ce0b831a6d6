"""Questions about the standard library and their answers: signatures, defaults, bases, and what raises what."""

from __future__ import annotations

import ast
from collections.abc import Iterator

from minitransformer.text import stdlib

DESCRIPTION = "questions about the functions and classes of the standard library, and answers"
# A longer answer is a listing.
LONGEST = 80

Function = ast.FunctionDef | ast.AsyncFunctionDef
version = stdlib.version


def documents() -> Iterator[dict[str, str]]:
    """A row for each question, whose group is its package, so that no package is in both splits."""
    seen: set[str] = set()
    for module, path in stdlib.modules():
        for question, answer in questions(module, path.read_bytes()):
            if question not in seen and 0 < len(answer) <= LONGEST:
                seen.add(question)
                yield {"prompt": question, "completion": answer, "group": module.partition(".")[0]}


def questions(module: str, source: bytes) -> Iterator[tuple[str, str]]:
    """Questions about what a module defines for others, and their answers."""
    if not any(part.startswith("_") for part in module.split(".")):
        yield from about_members(module, stdlib.syntax_tree(source))


def about_members(prefix: str, parent: ast.AST) -> Iterator[tuple[str, str]]:
    """Questions about the public functions and classes in a module or a class."""
    for node in ast.iter_child_nodes(parent):
        if isinstance(node, ast.If | ast.Try):  # definitions that depend on the platform
            yield from about_members(prefix, node)
        elif isinstance(node, Function | ast.ClassDef) and not node.name.startswith("_"):
            name = f"{prefix}.{node.name}"
            if isinstance(node, ast.ClassDef):
                if node.bases:
                    yield f"What is {name} derived from?", ", ".join(map(ast.unparse, node.bases))
                yield from about_members(name, node)
            else:
                yield from about_function(name, node, is_method=isinstance(parent, ast.ClassDef))


def about_function(name: str, node: Function, *, is_method: bool) -> Iterator[tuple[str, str]]:
    """Questions about the signature of a function, the defaults in it, and the exceptions that it raises itself."""
    signature = ast.unparse(node.args)
    if is_method:
        signature = signature.removeprefix("self").removeprefix("cls").removeprefix(", ")
    yield f"What are the parameters of {name}?", signature
    for parameter, default in defaults(node.args):
        yield f"What is the default of {parameter} in {name}?", ast.unparse(default)
    if names := raised(node):
        yield f"What does {name} raise?", ", ".join(names)


def defaults(arguments: ast.arguments) -> Iterator[tuple[str, ast.expr]]:
    """The parameters that have a default, and it."""
    positional = [*arguments.posonlyargs, *arguments.args]
    with_default = positional[len(positional) - len(arguments.defaults) :]
    for parameter, default in zip(with_default, arguments.defaults, strict=True):
        yield parameter.arg, default
    for parameter, keyword in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True):
        if keyword is not None:
            yield parameter.arg, keyword


def raised(function: Function) -> list[str]:
    """The names of the exceptions in the `raise` statements of a function, sorted; not those of functions inside it."""
    found: set[str] = set()
    nodes: list[ast.AST] = list(function.body)
    while nodes:
        node = nodes.pop()
        if isinstance(node, Function | ast.ClassDef | ast.Lambda):
            continue
        if isinstance(node, ast.Raise) and node.exc is not None:
            name = ast.unparse(node.exc.func if isinstance(node.exc, ast.Call) else node.exc)
            if name.rpartition(".")[2][:1].isupper():  # others are variables
                found.add(name)
        nodes += ast.iter_child_nodes(node)
    return sorted(found)
