"""What is installed on this machine: packages that only some commands need, and a compiler with its cache."""

from __future__ import annotations

import os
import shutil
from importlib import import_module
from pathlib import Path

from minitransformer.errors import UserError


def check_importable(who: str, extra: str, *modules: str, remedy: str = "") -> None:
    """Raises `UserError` for the first of `modules` that cannot be imported: `who` needs it, and `extra` installs it.

    They are imported, as finding them is not enough: what they need themselves may be missing.
    """
    for module in modules:
        try:
            import_module(module)
        except ImportError as error:
            package = (error.name or module).partition(".")[0]
            raise UserError(f'{who} {package}, which is not installed: pip install -e ".[{extra}]"{remedy}') from None


def find_compiler() -> str | None:
    """The C++ compiler of $CXX, or one that is installed, if there is any."""
    return next((name for name in (os.environ.get("CXX", ""), "g++", "clang++") if shutil.which(name)), None)


def cache_folder() -> Path:
    """Where later runs find what was compiled: a folder of the user's, which need not exist."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "minitransformer"
