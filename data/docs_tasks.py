"""Tasks about the source of the standard library: to summarise, to extract and to answer."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from typing import Any

from minitransformer import files
from minitransformer.text import recipes, stdlib

DESCRIPTION = "docstrings to sum up, functions to search, and the questions of docs-qa"
# A shorter text leaves nothing to sum up, and a longer one does not fit into a small context.
SHORTEST, LONGEST = 80, 600
LONGEST_SUMMARY = 100

Function = ast.FunctionDef | ast.AsyncFunctionDef
Documented = ast.Module | ast.ClassDef | Function


def version() -> str:
    """Changes with the Python version, and with the recipe whose questions are among the tasks."""
    return f"{stdlib.version()} {files.sha256(recipes.known()['docs-qa'])}"


def documents() -> Iterator[dict[str, str]]:
    """Rows with a prompt, its completion, and the package as their group, so that no package is in both splits."""
    questions: Any = recipes.load_recipe("docs-qa")
    seen: set[str] = set()
    for module, path in stdlib.modules():
        for node in ast.walk(stdlib.syntax_tree(path.read_bytes())):
            for task, text, answer in [*summaries(node), *exceptions(node, questions.raised)]:
                if text not in seen and SHORTEST <= len(text) <= LONGEST:
                    seen.add(text)
                    group = module.partition(".")[0]
                    yield {"prompt": f"{task} {text}", "completion": answer, "group": group}
    yield from questions.documents()


def summaries(node: ast.AST) -> Iterator[tuple[str, str, str]]:
    """A docstring without its first paragraph, which sums it up, and that."""
    if isinstance(node, Documented) and (text := ast.get_docstring(node)):
        first, _, rest = (" ".join(part.split()) for part in text.partition("\n\n"))
        if len(first) <= LONGEST_SUMMARY:
            yield "Summarise:", rest, first


def exceptions(node: ast.AST, raised: Any) -> Iterator[tuple[str, str, str]]:
    """A function, and the names of the exceptions in its `raise` statements."""
    if isinstance(node, Function) and (names := raised(node)):
        yield "Which exceptions are raised here?", " ".join(ast.unparse(node).split()), ", ".join(names)
