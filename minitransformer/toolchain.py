"""What compiling on this machine needs: a compiler, and a folder for what it makes."""

from __future__ import annotations

import os
import shutil
from pathlib import Path


def find_compiler() -> str | None:
    """The C++ compiler of $CXX, or one that is installed, if there is any."""
    return next((name for name in (os.environ.get("CXX", ""), "g++", "clang++") if shutil.which(name)), None)


def cache_folder() -> Path:
    """Where later runs find what was compiled: a folder of the user's, which need not exist."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "minitransformer"
