"""What is measured once for all workers of pytest-xdist, each of which has its own fixtures."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


def measured_once(factory: pytest.TempPathFactory, name: str, measure: Callable[[Path], Any]) -> Any:
    """What `measure` returns in an empty folder, as JSON; the worker that comes first measures, and others wait."""
    base = factory.getbasetemp()
    shared = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / name
    shared.mkdir(exist_ok=True)
    with (shared / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        result = shared / "result.json"
        if not result.exists():
            folder = shared / "folder"
            folder.mkdir()
            text = json.dumps(measure(folder))
            result.write_text(text)
        return json.loads(result.read_text())
