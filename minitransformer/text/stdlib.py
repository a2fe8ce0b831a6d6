"""The source files of the running Python's standard library."""

from __future__ import annotations

import ast
import hashlib
import os
import platform
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

# Tests, installed packages and generated tables are not written to be read.
LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "lib-dynload", "encodings", "pydoc_data"}
# These contain the machine that Python was built on.
OF_THE_MACHINE = ("_sysconfigdata", "config-")


def modules() -> Iterator[tuple[str, Path]]:
    """Dotted name and file of each module, sorted by name."""
    root = Path(sysconfig.get_path("stdlib"))
    found: dict[str, Path] = {}
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if name not in LEFT_OUT and not name.startswith((*OF_THE_MACHINE, "."))]
        for file in files:
            if file.endswith(".py") and not file.startswith((*OF_THE_MACHINE, ".")):
                path = Path(folder, file)
                parts = path.relative_to(root).with_suffix("").parts
                found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    yield from sorted(found.items())


def version() -> str:
    """Changes with the Python version and with a distribution's patches."""
    listing = "\n".join(f"{name} {path.stat().st_size}" for name, path in modules())
    return f"{platform.python_version()} {hashlib.sha256(listing.encode()).hexdigest()}"


def syntax_tree(source: bytes) -> ast.Module:
    """The syntax tree of a module; an empty one for templates that only look like modules."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # old modules have escapes that newer Pythons frown upon
        try:
            return ast.parse(source)
        except (SyntaxError, ValueError):
            return ast.Module([], [])
