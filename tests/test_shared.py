"""What workers of the tests share: measured by one of them, and read by the others."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.shared_for_tests import measured_once


def test_of_workers_that_ask_at_once_one_measures_and_all_have_what_it_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTEST_XDIST_WORKER", "gw0")
    measured: list[Path] = []

    def measure(folder: Path) -> dict[str, int]:
        measured.append(folder)
        time.sleep(0.05)
        return {"found": len(measured)}

    def ask(worker: int) -> Any:
        base = tmp_path / f"gw{worker}"
        base.mkdir()
        factory: Any = SimpleNamespace(getbasetemp=lambda: base)
        return measured_once(factory, "it", measure)

    with ThreadPoolExecutor(4) as workers:
        assert list(workers.map(ask, range(4))) == [{"found": 1}] * 4
    assert len(measured) == 1
