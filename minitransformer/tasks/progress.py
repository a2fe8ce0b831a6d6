"""Progress reports of a command's tasks."""

from __future__ import annotations

import sys
import time

from tqdm import tqdm

from minitransformer.amounts import duration
from minitransformer.tasks.task import Failure, Task


class TaskProgress:
    """Called for each finished task; this base class prints nothing."""

    def begin(self, asked: int, done: int) -> None:
        """Start with `asked` tasks, of which `done` were measured before."""

    def measured(self, task: Task) -> None:
        """A task was measured."""

    def failed(self, failure: Failure) -> None:
        """A task failed."""

    def close(self) -> None:
        """End of the report."""


class TerminalProgress(TaskProgress):
    """A progress bar on a terminal; in a pipe, a line every few seconds."""

    SECONDS = 5.0

    def __init__(self, name: str) -> None:
        self.name = name
        self.bar: tqdm | None = None

    def begin(self, asked: int, done: int) -> None:
        self.asked, self.done, self.left = asked, done, asked - done
        self.tried = 0
        self.started = self.said = time.monotonic()
        if done:
            print(f"{self.name:10} {done} of {asked} tasks were measured before", flush=True)
        if sys.stdout.isatty() and self.left:
            layout = "{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}]"
            self.bar = tqdm(
                total=asked, initial=done, desc=self.name, bar_format=layout, dynamic_ncols=True, file=sys.stdout
            )

    def measured(self, task: Task) -> None:
        self.done += 1
        if self.bar is not None:
            self.bar.update()
        self._advance()

    def failed(self, failure: Failure) -> None:
        text = f"{self.name:10} failed: {failure}"
        if self.bar is not None:
            self.bar.write(text, file=sys.stdout)
        else:
            print(text, flush=True)
        self._advance()

    def _advance(self) -> None:
        self.tried, self.left, now = self.tried + 1, self.left - 1, time.monotonic()
        if self.bar is None and (not self.left or now - self.said > self.SECONDS):
            self.said = now
            seconds = (now - self.started) / self.tried * self.left
            print(f"{self.name:10} {self.done}/{self.asked} tasks, {duration(seconds)} left", flush=True)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()


SILENT = TaskProgress()
