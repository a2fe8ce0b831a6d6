"""What is measured once, and what came of it, in values that JSON has."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Task = dict[str, Any]
"""What is measured once: it names every choice, the seed among them, and so is its own key."""
Measurement = dict[str, Any]
"""What was measured."""
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
    """The task as JSON, in the same letters whatever the order of its choices."""
    return json.dumps(task, sort_keys=True, separators=(",", ":"))


def task_key(task: Task) -> str:
    """What names the task: 16 hexadecimal digits of the SHA-256 of its canonical JSON."""
    return hashlib.sha256(canonical(task).encode()).hexdigest()[:16]
