"""The folders of recipes and of prepared data."""

from __future__ import annotations

import os
from pathlib import Path

import minitransformer

PACKAGE = Path(minitransformer.__file__).parent
REMEDY = "set MINITRANSFORMER_DATA to another folder"


def recipe_folder() -> Path:
    """The folder of recipes: in the installed package, or `data/` in a checkout."""
    installed = PACKAGE / "recipes"
    return installed if installed.is_dir() else PACKAGE.parent / "data"


def work_folder() -> Path:
    """The folder for recipes' output and prepared data.

    `MINITRANSFORMER_DATA` if set; else a checkout's `data/` if writable; else `~/.cache/minitransformer`.
    """
    if chosen := os.environ.get("MINITRANSFORMER_DATA"):
        return Path(chosen).expanduser()
    checkout = PACKAGE.parent / "data"
    if recipe_folder() == checkout and os.access(checkout, os.W_OK):
        return checkout
    return Path.home() / ".cache" / "minitransformer"
