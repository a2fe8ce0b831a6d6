"""Plugins as a command loads them: a file with variants, whose names are known from then on."""

from __future__ import annotations

import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

LATE = 10**6
"""updates after which nothing depends on the training step any more"""
PLUGINS = Path(__file__).parent / "plugins"


def load_plugin(path: Path) -> ModuleType:
    """The module in the file at `path`."""
    spec = spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[path.stem] = module_from_spec(spec)  # where dataclasses look for the types of their fields
    spec.loader.exec_module(module)
    return module


def late(model: nn.Module) -> Any:
    """`model` as it is long after its training began, for laws of the equation that it has then."""
    for module in model.modules():
        if hasattr(module, "begin_step"):
            module.begin_step(LATE)
    return model
