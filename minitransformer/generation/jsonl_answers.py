"""Answers to the rows of a JSONL file, written row by row so that a run that is killed goes on where it was."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from minitransformer import files
from minitransformer.errors import StorageError, UserError
from minitransformer.records import parse_json, shown

OUTPUT = "output"
"""the field of a row of the output that holds the generated text"""
REMEDY = "choose an --out on another disk"


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The objects in the JSONL file at `path`, without its empty lines; raises `UserError` for other content."""
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise UserError(
            f"{path} cannot be read ({error.strerror}): give a file with a JSON object in each line"
        ) from None
    rows = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = parse_json(line)
        except ValueError as error:
            raise UserError(f"{path}, line {number} is not JSON ({error}): give a JSON object in each line") from None
        if not isinstance(row, dict):
            raise UserError(f"{path}, line {number} is {shown(row)}: give a JSON object in each line")
        if OUTPUT in row:
            raise UserError(f"{path}, line {number} has a field {OUTPUT!r}, which the answers would replace: rename it")
        rows.append(row)
    if not rows:
        raise UserError(f"{path} has no row: give a JSON object in each line")
    return rows


def text_field(row: Mapping[str, Any], name: str, where: str) -> str:
    """The text in the field `name` of a row; raises `UserError` if there is none."""
    if name not in row:
        raise UserError(f"{where} has no field {name!r}, only {', '.join(row) or 'none'}: add it, or give a --template")
    if not isinstance(row[name], str):
        raise UserError(f"{where} has {name} {shown(row[name])}, which must be a text")
    value: str = row[name]
    return value


@dataclass
class AnswerFile:
    """The rows of the input with their answers, so far in `PATH.partial`, whose first line says what is asked.

    A later process that asks the same goes on after the last whole line. Lines are flushed to the system one by one: a
    kill loses none of them, and a power failure those that the system had not written.
    """

    path: Path
    request: Mapping[str, Any]
    """all that decides the answers, as JSON"""
    rows: Sequence[Mapping[str, Any]]
    done: int = 0

    @property
    def partial(self) -> Path:
        return self.path.with_name(self.path.name + files.PARTIAL)

    @contextmanager
    def writing(self) -> Iterator[BinaryIO]:
        """The open partial file, which becomes `path` at the end of the block if every row has its answer.

        Raises `UserError` if there is a file at `path`, if the partial file has answers to another request, and if
        another process is writing it.
        """
        with files.writing(self.path, REMEDY):
            files.make_folder(self.path.parent)
            lock = files.acquired(files.lock_of(self.path), wait=False)
            if lock is None:
                raise UserError(f"another process is writing {self.path}: wait until it ends, or choose another --out")
            try:
                check_new(self.path)
                with self.partial.open("a+b") as file:
                    self._go_to_end(file)
                    yield file
                    file.flush()
                    os.fsync(file.fileno())
                self._complete()
            finally:
                lock.release()
                files.lock_of(self.path).unlink(missing_ok=True)

    def add(self, file: BinaryIO, answer: str) -> None:
        """Write the answer to the next row."""
        row = {**self.rows[self.done], OUTPUT: answer}
        file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
        file.flush()
        self.done += 1

    def _go_to_end(self, file: BinaryIO) -> None:
        """Cut off half a line, check the request, and count the answers."""
        file.seek(0)
        content = file.read()
        whole = content[: content.rfind(b"\n") + 1]
        first, *answered = whole.splitlines() or [b""]
        header = json.dumps(self.request).encode()
        if first not in (b"", header):
            raise UserError(
                f"{self.partial} has answers to other rows, or by another model or settings: remove it, or choose "
                "another --out"
            )
        file.truncate(len(whole))
        if not first:
            file.write(header + b"\n")
            file.flush()
        self.done = len(answered)
        if self.done > len(self.rows):
            raise StorageError(f"{self.partial} has {self.done} answers to {len(self.rows)} rows: remove it")

    def _complete(self) -> None:
        if self.done < len(self.rows):
            return
        _, _, answers = self.partial.read_bytes().partition(b"\n")
        with files.whole_file(self.path) as file:
            file.write(answers)
        self.partial.unlink()


def check_new(path: Path) -> None:
    """Raises `UserError` if there is something at `path`, which answers would replace."""
    if path.exists():
        raise UserError(f"{path} already exists: choose another --out, or remove it")


def asked_before(path: Path) -> dict[str, Any]:
    """The request of a partial file for `path` that an earlier process has left; empty if there is none."""
    partial = path.with_name(path.name + files.PARTIAL)
    if not partial.is_file():
        return {}
    with partial.open("rb") as file:
        try:
            request = parse_json(file.readline())
        except ValueError:
            return {}
    return request if isinstance(request, dict) else {}
