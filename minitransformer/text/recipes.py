"""Recipes: named datasets, each made once by a file in `data/`."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol, cast

from minitransformer.errors import UserError
from minitransformer.files import locked, whole_file, writing
from minitransformer.registry import lookup
from minitransformer.text.folders import REMEDY, recipe_folder, work_folder

FIELDS = ("text", "label")


class Recipe(Protocol):
    """The interface of a file in `data/`."""

    DESCRIPTION: str

    def version(self) -> str:
        """What the documents depend on besides the recipe's source code; cheap."""

    def documents(self) -> Iterator[str | tuple[str, str] | dict[str, str]]:
        """The documents, in a deterministic order: texts, texts with their labels, or rows with fields."""


def known() -> dict[str, Path]:
    """Recipes by name: `stdlib-code` is `stdlib_code.py`."""
    files = sorted(recipe_folder().glob("[a-z]*.py"))
    return {file.stem.replace("_", "-"): file for file in files}


def load_recipe(name: str) -> Recipe:
    """The recipe `name`; raises `UserError` with the nearest name."""
    path = lookup("recipe", name, known())
    spec = importlib.util.spec_from_file_location(f"minitransformer_recipe_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return cast(Recipe, module)


def made_at(name: str, recipe: Recipe) -> Path:
    """The file of this recipe's documents, named by a hash of what they depend on."""
    source = known()[name].read_bytes()
    version = hashlib.sha256(source + recipe.version().encode()).hexdigest()[:12]
    return work_folder() / name / f"{version}.jsonl"


def make(name: str) -> Path:
    """The recipe's documents as JSONL: rows, or the field `text`, with `label` of labelled ones; made on first use.

    Raises `UserError` when the recipe cannot get them.
    """
    recipe = load_recipe(name)
    target = made_at(name, recipe)
    if target.exists():
        return target
    with writing(target, REMEDY), locked(target):
        # Under the lock, partial files are those of a dead process.
        for partial in target.parent.glob(f".{target.name}-*.partial"):
            partial.unlink()
        if not target.exists():
            _write(name, recipe, target)
    return target


def _record(document: str | tuple[str, str] | dict[str, str]) -> dict[str, str]:
    if isinstance(document, dict):
        return document
    return {"text": document} if isinstance(document, str) else dict(zip(FIELDS, document, strict=True))


def _write(name: str, recipe: Recipe, target: Path) -> None:
    from tqdm import tqdm

    print(f"making {name} ({recipe.DESCRIPTION}) in {target}", file=sys.stderr)
    with whole_file(target) as file:
        empty = True
        # disable=None: a bar on a terminal, nothing in a pipe.
        for document in tqdm(recipe.documents(), desc=name, unit=" documents", disable=None):
            file.write(json.dumps(_record(document), ensure_ascii=False).encode() + b"\n")
            empty = False
        if empty:
            raise UserError(f"recipe {name} found no documents on this machine: choose another recipe, or a file")
