"""Tasks and their measurements, as JSON values."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Task = dict[str, Any]
"""A task: all choices of a measurement, including the seed; it is its own key."""
Measurement = dict[str, Any]
"""The measured values."""
MeasureTask = Callable[[Task], Measurement]


@dataclass(frozen=True)
class Result:
    """A task and its measurement."""

    task: Task
    measured: Measurement


@dataclass(frozen=True)
class Failure:
    """A task that could not be measured, and why."""

    task: Task
    reason: str

    def __str__(self) -> str:
        choices = ", ".join(f"{name} {value}" for name, value in self.task.items())
        return f"{self.reason}, at {choices}"


def canonical(task: Task) -> str:
    """The task as canonical JSON, independent of the order of its choices."""
    return json.dumps(task, sort_keys=True, separators=(",", ":"))


def task_key(task: Task) -> str:
    """The key of a task: 16 hexadecimal digits of the SHA-256 of its canonical JSON."""
    return hashlib.sha256(canonical(task).encode()).hexdigest()[:16]
