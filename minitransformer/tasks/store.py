"""Results on disk: one JSON line per measured task, so that a killed command loses none."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from minitransformer.files import writing
from minitransformer.records import parse_json, read_bytes
from minitransformer.tasks.task import Measurement, Result, Task, task_key

REMEDY = "choose another --out"


class ResultStore:
    """The results in the file at `path`, one line each: `key`, `task`, `measured`, `seconds`.

    One process writes; a line is flushed to disk when `add` returns. Unreadable lines, such as one truncated
    by a crash, are skipped and counted in `skipped`, and their tasks count as not measured.
    Non-finite numbers are written as by Python's json: NaN, Infinity.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.skipped = 0
        self.seconds: dict[str, float] = {}
        """duration of each measurement, by key"""
        self._measured: dict[str, Measurement] = {}
        lines = read_bytes(path, REMEDY).split(b"\n") if path.exists() else []
        self._ends_in_the_middle = bool(lines) and lines[-1] != b""
        for line in lines:
            if line.strip():
                self._read(line)

    def _read(self, line: bytes) -> None:
        try:
            record = parse_json(line)
            key, seconds = task_key(record["task"]), float(record["seconds"])
            if record["key"] != key or not isinstance(record["measured"], dict):
                raise ValueError("not what was written")
        except (ValueError, KeyError, TypeError, OverflowError):
            self.skipped += 1
            return
        self._measured[key], self.seconds[key] = record["measured"], seconds

    def __contains__(self, task: Task) -> bool:
        return task_key(task) in self._measured

    def results(self, tasks: Iterable[Task]) -> list[Result]:
        """The results of the measured `tasks`, in order."""
        return [Result(task, self._measured[task_key(task)]) for task in tasks if task in self]

    def add(self, task: Task, measured: Measurement, seconds: float) -> None:
        """Append a result; raises `UserError` if the disk is full or not writable."""
        key = task_key(task)
        record: dict[str, Any] = {"key": key, "task": task, "measured": measured, "seconds": round(seconds, 3)}
        # End a truncated line, so that it does not damage the next.
        line = b"\n" * self._ends_in_the_middle + json.dumps(record).encode() + b"\n"
        with writing(self.path, REMEDY), self.path.open("ab", buffering=0) as file:
            file.write(line)
            os.fsync(file.fileno())
        self._ends_in_the_middle = False
        self._measured[key], self.seconds[key] = measured, seconds
