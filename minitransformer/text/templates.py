"""Jinja templates, rendered in a process of their own, which a template cannot leave and in which it cannot hang."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from threading import Lock
from typing import Any

from minitransformer.errors import UserError
from minitransformer.records import read_bytes

PROGRAM = Path(__file__).with_name("template_sandbox.py")
TOO_LONG = {"kind": "time", "error": "it takes more than 2 seconds of processor time"}
ENDED = {"kind": "ended", "error": "the process that renders it has ended"}


class TemplateMistake(UserError):
    """What is wrong with a template; `kind` says which limit it hit or which mistake it is."""

    def __init__(self, origin: str, answer: Mapping[str, str]) -> None:
        lines = answer["error"].strip().splitlines() or ["no reason given"]
        self.kind, self.reason = answer["kind"], lines[0]
        remedies = {
            "security": "a template may read its variables only: use another one",
            "undefined": "name what there is",
            "refusal": "change the conversation, or use another template",
        }
        super().__init__(f"the template {origin} fails ({self.reason}): {remedies.get(self.kind, 'mend it')}")


class RenderingProcess:
    """`template_sandbox.py`, which is started when the first template is rendered, and again after one has ended it."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._process: subprocess.Popen[bytes] | None = None

    def ask(self, request: Mapping[str, Any]) -> dict[str, str]:
        """The answer to `request`."""
        line = json.dumps(request).encode() + b"\n"
        with self._lock:
            if self._process is None or self._process.poll() is not None:
                self._process = self._start()
            answered = b""
            try:
                answered = self._exchange(self._process, line)
            finally:
                if not answered:  # it has ended, or Ctrl-C came before an answer that would be taken for the next one
                    self._process.kill()
                    self._process.communicate()
        if not answered:
            return TOO_LONG if self._process.returncode == -getattr(signal, "SIGPROF", 0) else ENDED
        answer: dict[str, str] = json.loads(answered)
        return answer

    @staticmethod
    def _start() -> subprocess.Popen[bytes]:
        # -P: the folder of the program holds modules named as packages are.
        command = [sys.executable, "-P", str(PROGRAM)]
        return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)

    @staticmethod
    def _exchange(process: subprocess.Popen[bytes], line: bytes) -> bytes:
        """The line that answers `line`; empty if the process ends instead."""
        assert process.stdin
        assert process.stdout
        try:
            process.stdin.write(line)
            process.stdin.flush()
            return process.stdout.readline()
        except BrokenPipeError:
            return b""


@lru_cache(maxsize=1)
def _process_of(parent: int) -> RenderingProcess:
    """The rendering process of the process `parent`: one that is forked off needs its own."""
    return RenderingProcess()


def render_template(source: str, variables: Mapping[str, Any], origin: str, *, strict: bool = False) -> str:
    """The text of the Jinja template `source` with `variables`, which are JSON; `origin` is its name in errors.

    A variable that is missing is empty, or with `strict` a mistake. Raises `TemplateMistake` for a template that fails,
    reaches out of its sandbox, or needs more than 2 seconds, 1 GiB or 4,000,000 characters.
    """
    answer = _process_of(os.getpid()).ask({"source": source, "variables": variables, "strict": strict})
    if "error" in answer:
        raise TemplateMistake(origin, answer)
    return answer["text"]


def filled_template(source: str, row: Mapping[str, Any], origin: str, where: str) -> str:
    """The prompt template `source` with the fields of a row; raises `UserError` for a missing one."""
    try:
        return render_template(source, row, origin, strict=True)
    except TemplateMistake as mistake:
        if mistake.kind != "undefined":
            raise
        raise UserError(
            f"the template {origin} needs what {where} lacks ({mistake.reason}): its fields are {', '.join(row)}"
        ) from None


def read_template(path: Path) -> str:
    """The source of the template in the file at `path`; raises `UserError` if there is none, or no text in it."""
    if not path.exists():
        raise UserError(f"there is no file {path}: give a Jinja template")
    try:
        return read_bytes(path, "give a Jinja template").decode("utf-8-sig")
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8: give a Jinja template") from None
