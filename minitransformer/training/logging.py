"""Logs of a run: files, terminal or pipe, and TensorBoard."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from tqdm import tqdm

from minitransformer import files
from minitransformer.amounts import duration
from minitransformer.records import parse_json, read_bytes
from minitransformer.toolchain import check_importable


class Log:
    """Receives every record of metrics and every line of text; this base class discards them."""

    def record(self, numbers: dict[str, Any]) -> None:
        """Metrics of a step: `numbers["step"]`, and `loss`, `validation_loss` or others."""

    def line(self, text: str) -> None:
        """A line of text for the user."""

    def advance(self, step: int) -> None:
        """`step` steps are done."""

    def validating(self, done: int, total: int) -> None:
        """`done` of `total` batches of a validation are done."""

    def forget_validation(self, step: int) -> None:
        """Discard the validation at `step`, which no checkpoint includes and which is repeated."""

    def rewind(self, step: int, rollback: int) -> None:
        """Discard all records after `step`, and one of this rollback: the run goes on from `step`."""

    def sync(self) -> None:
        """Flush everything to disk."""

    def close(self) -> None:
        """Close the log."""


class Logs(Log):
    """Several logs as one."""

    def __init__(self, *logs: Log) -> None:
        self.logs = logs

    def record(self, numbers: dict[str, Any]) -> None:
        for log in self.logs:
            log.record(numbers)

    def line(self, text: str) -> None:
        for log in self.logs:
            log.line(text)

    def advance(self, step: int) -> None:
        for log in self.logs:
            log.advance(step)

    def validating(self, done: int, total: int) -> None:
        for log in self.logs:
            log.validating(done, total)

    def forget_validation(self, step: int) -> None:
        for log in self.logs:
            log.forget_validation(step)

    def rewind(self, step: int, rollback: int) -> None:
        for log in self.logs:
            log.rewind(step, rollback)

    def sync(self) -> None:
        for log in self.logs:
            log.sync()

    def close(self) -> None:
        for log in self.logs:
            log.close()


class RunFiles(Log):
    """`metrics.jsonl`, one record per line, and `train.log`, with timestamps."""

    def __init__(self, folder: Path, *, resume_at: int) -> None:
        self.path = folder / "metrics.jsonl"
        if self.path.exists():
            # Records after the checkpoint, and truncated lines, are written again.
            self._keep(records_until(self.path, resume_at))
        self.metrics = self.path.open("a", encoding="utf-8")
        self.words = (folder / "train.log").open("a", encoding="utf-8")
        files.sync(folder)

    def _keep(self, records: Iterable[dict[str, Any]]) -> None:
        files.write_text(self.path, "".join(f"{json.dumps(record)}\n" for record in records))

    def forget_validation(self, step: int) -> None:
        def again(record: dict[str, Any]) -> bool:
            return record["step"] == step and "validation_loss" in record

        self._drop_after(step, again)

    def rewind(self, step: int, rollback: int) -> None:
        # A kill may have come between the record of the rollback and the checkpoint that says so.
        self._drop_after(step, lambda record: record.get("rollback") == rollback)

    def _drop_after(self, step: int, drop: Callable[[dict[str, Any]], bool]) -> None:
        self.metrics.close()
        self._keep(record for record in records_until(self.path, step) if not drop(record))
        self.metrics = self.path.open("a", encoding="utf-8")

    def record(self, numbers: dict[str, Any]) -> None:
        # JSON has no infinity or NaN.
        known = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in numbers.items()}
        self.metrics.write(json.dumps(known, allow_nan=False) + "\n")
        self.metrics.flush()

    def line(self, text: str) -> None:
        self.words.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")
        self.words.flush()

    def sync(self) -> None:
        for file in (self.metrics, self.words):
            os.fsync(file.fileno())

    def close(self) -> None:
        self.metrics.close()
        self.words.close()


def records_until(metrics: Path, step: int) -> list[dict[str, Any]]:
    """The records of a `metrics.jsonl` up to `step`, without invalid lines."""
    text = read_bytes(metrics, "move it away, and the run continues without its earlier records").decode(
        errors="replace"
    )
    records = map(parse_record, text.split("\n"))
    return [record for record in records if record is not None and record["step"] <= step]


def parse_record(line: str) -> dict[str, Any] | None:
    """The record in a line of `metrics.jsonl`; None for an invalid line, as after a crash or an edit."""
    try:
        record = parse_json(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) and type(record.get("step")) is int else None


class Terminal(Log):
    """A progress bar on a terminal; in a pipe, a line per record."""

    def __init__(self, *, steps: int, done: int) -> None:
        self.bar: Any = None
        self.validation_bar: Any = None
        self._end, self._news = 0.0, ""
        if sys.stdout.isatty():
            # tqdm's own time estimate would ignore validations.
            layout = "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}{postfix}]"
            self.bar = tqdm(total=steps, initial=done, bar_format=layout, dynamic_ncols=True, file=sys.stdout)

    def record(self, numbers: dict[str, Any]) -> None:
        if "loss" not in numbers:
            return
        speed = f"{numbers['tokens_per_second'] / 1000:.1f}k tokens/s, mfu {numbers['mfu']:.0%}"
        loss = "none finite" if numbers["loss"] is None else f"{numbers['loss']:.4f}"
        if skipped := numbers["skipped_steps"]:
            loss += f" ({skipped} step{'s' * (skipped > 1)} skipped)"
        if self.bar is not None:
            self._end, self._news = time.monotonic() + numbers["seconds_left"], f"loss {loss}, {speed}"
            return
        left = f"{duration(numbers['seconds_left'])} left"
        print(f"step {numbers['step']} loss {loss} lr {numbers['lr']:.2e}, {speed}, {left}", flush=True)

    def line(self, text: str) -> None:
        if self.bar is not None:
            self.bar.write(text, file=sys.stdout)
        else:
            print(text, flush=True)

    def advance(self, step: int) -> None:
        if self.bar is not None:
            if self._news:
                left = tqdm.format_interval(max(0, self._end - time.monotonic()))
                self.bar.set_postfix_str(f"{left} left, {self._news}", refresh=False)
            self.bar.update(step - self.bar.n)

    def validating(self, done: int, total: int) -> None:
        if self.bar is None:
            return
        if self.validation_bar is None:
            layout = "validation {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}]"
            self.validation_bar = tqdm(
                total=total, bar_format=layout, dynamic_ncols=True, file=sys.stdout, leave=False, position=1
            )
        self.validation_bar.update(done - self.validation_bar.n)
        if done == total:
            self._close_validation_bar()

    def _close_validation_bar(self) -> None:
        if self.validation_bar is not None:
            self.validation_bar.close()
        self.validation_bar = None

    def close(self) -> None:
        self._close_validation_bar()
        if self.bar is not None:
            self.bar.set_postfix_str(self._news, refresh=False)
            self.bar.close()


class TensorBoard(Log):
    """Every metric as a scalar, in the run folder; missing ones are skipped."""

    def __init__(self, folder: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(os.fspath(folder / "tensorboard"))

    @staticmethod
    def check() -> None:
        """Raise a `UserError` if TensorBoard is not installed."""
        check_importable(
            "--tensorboard needs", "tensorboard", "torch.utils.tensorboard", remedy=", or give --no-tensorboard"
        )

    def record(self, numbers: dict[str, Any]) -> None:
        for name, value in numbers.items():
            if name != "step" and value is not None:
                self.writer.add_scalar(name, value, numbers["step"])

    def close(self) -> None:
        self.writer.close()
