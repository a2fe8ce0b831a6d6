"""Standard input, stored in a file, since it is read several times and again on resume."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from pathlib import Path

from minitransformer.errors import UserError
from minitransformer.files import whole_file, writing
from minitransformer.text.folders import REMEDY, work_folder

NAME = "-"
BLOCK = 1 << 20

Sources = str | tuple[str, ...] | None


def names_standard_input(sources: Sources) -> bool:
    """Whether `-` is among the sources of a field such as `--data`."""
    return sources is not None and NAME in ((sources,) if isinstance(sources, str) else sources)


def without_standard_input(sources: Sources, others: Sources = None) -> Sources:
    """`sources` with `-` replaced by the path of a file that holds standard input.

    Raises `UserError` if `others` contain `-` too, if it is empty, or if the disk is full.
    """
    if not names_standard_input(sources):
        return sources
    if names_standard_input(others):
        raise UserError(
            "--data and --validation-data are both -, but standard input can be read only once: name a file"
        )
    path = str(_kept())
    return path if isinstance(sources, str) else tuple(path if source == NAME else source for source in sources or ())


def _kept() -> Path:
    """Standard input as a file named by its hash: .jsonl if the first line is a JSON object, else plain text."""
    if sys.stdin is None:
        raise UserError("--data - reads standard input, which is closed: pipe text in, or name a file")
    if sys.stdin.isatty():
        print("reading text from standard input; Ctrl-D ends it", file=sys.stderr)
    folder = work_folder() / "stdin"
    incoming = folder / f"incoming-{os.getpid()}"
    digest, beginning = hashlib.sha256(), b""
    with writing(folder, REMEDY):
        with whole_file(incoming) as file:
            while block := sys.stdin.buffer.read(BLOCK):
                beginning = beginning or block
                digest.update(block)
                file.write(block)
        if not beginning.strip():
            incoming.unlink()
            raise UserError("standard input is empty: pipe text into --data -")
        path = folder / f"stdin-{digest.hexdigest()[:12]}{_suffix(beginning)}"
        os.replace(incoming, path)
    return path


def _suffix(beginning: bytes) -> str:
    try:
        first = json.loads(beginning.strip().partition(b"\n")[0])
    except (ValueError, RecursionError):
        return ".txt"
    return ".jsonl" if isinstance(first, dict) else ".txt"
