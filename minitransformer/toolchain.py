"""Optional packages, the C++ compiler and its cache on this machine."""

from __future__ import annotations

import os
import re
import shutil
from importlib import import_module
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

from minitransformer.errors import UserError


def check_importable(who: str, extra: str, *modules: str, remedy: str = "") -> None:
    """Raises `UserError` for the first of `modules` that cannot be imported: `who` needs it, and `extra` installs it.

    They are imported rather than found, because their own dependencies may be missing.
    """
    for module in modules:
        try:
            import_module(module)
        except ImportError as error:
            package = (error.name or module).partition(".")[0]
            raise UserError(f'{who} {package}, which is not installed: pip install -e ".[{extra}]"{remedy}') from None


EXTRA = re.compile(r"""([\w.-]+)[^;]*; extra == ['"](\w+)['"]""")
FOR_DEVELOPERS = {"test", "check"}


def extras() -> dict[str, dict[str, str | None]]:
    """The optional packages of each extra, with the version that is installed, or None."""
    found: dict[str, dict[str, str | None]] = {}
    for match in filter(None, map(EXTRA.fullmatch, requires("minitransformer") or [])):
        package, extra = match.groups()
        if extra not in FOR_DEVELOPERS:
            found.setdefault(extra, {})[package] = installed_version(package)
    return found


def installed_version(package: str) -> str | None:
    """The version of a package that is installed; None if none is."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def find_compiler() -> str | None:
    """The C++ compiler in $CXX, or an installed one, if any."""
    return next((name for name in (os.environ.get("CXX", ""), "g++", "clang++") if shutil.which(name)), None)


def cache_folder() -> Path:
    """The user's cache folder for compiled code, which may not exist yet."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "minitransformer"
