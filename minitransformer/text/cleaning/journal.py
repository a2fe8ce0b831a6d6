"""What was found out about each document, on disk, block by block: a reading that was killed goes on where it was."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

RECORD = np.dtype(
    [
        ("fingerprint", "<u8", 2),
        ("read", "<u4"),
        ("bytes", "<u4"),
        ("characters", "<u4"),
        ("words", "<u4"),
        ("lines", "<u4"),
        ("verdict", "u1"),
        ("script", "u1"),
        ("personal", "<u2"),
        ("changed", "<u2"),
    ]
)
"""of a document: the hash of its new text; bytes as it was read; sizes of its new text; what its own text says of it"""
SIGNATURE = 128
"""numbers of a MinHash signature"""
STREAMS = {
    "documents": RECORD,
    "signatures": np.dtype(("<u4", (SIGNATURE,))),
    "overlaps": np.dtype([("document", "<u8"), ("ngram", "<u4")]),
    "hits": np.dtype("<u4"),
}
BLOCKS = "blocks.jsonl"
AT_ONCE = 1 << 16
"""records that are read at a time"""


@dataclass(frozen=True)
class Examined:
    """What was found out about a block: an array for each stream, in which documents are numbered from 0."""

    streams: Mapping[str, npt.NDArray[Any]]
    totals: dict[str, Any]


@dataclass
class Journal:
    """Streams of records in `folder`; a block is in it once its line in `blocks.jsonl` is whole.

    `blocks` has the file and the number of documents of each, and `totals` the sums over all.
    """

    folder: Path
    blocks: list[tuple[int, int]] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(STREAMS, 0))
    totals: dict[str, Any] = field(default_factory=dict)
    complete: bool = False

    @classmethod
    def open(cls, folder: Path) -> Journal:
        """The journal in `folder`, without a block that was not written to its end."""
        folder.mkdir(parents=True, exist_ok=True)
        journal = cls(folder)
        content = (folder / BLOCKS).read_bytes() if (folder / BLOCKS).exists() else b""
        sizes = {name: journal._path(name).stat().st_size if journal._path(name).exists() else 0 for name in STREAMS}
        kept = 0
        for line in content.splitlines(keepends=True):
            if not line.endswith(b"\n") or not journal._take(line, sizes):
                break
            kept += len(line)
        for path, size in [(folder / BLOCKS, kept), *((journal._path(n), journal._size(n)) for n in STREAMS)]:
            with path.open("ab") as file:
                file.truncate(size)
        return journal

    def _take(self, line: bytes, sizes: Mapping[str, int]) -> bool:
        """Count the block of `line`; False for a damaged line, or if a stream lacks a part of it."""
        with suppress(ValueError, KeyError, TypeError):
            block = json.loads(line)
            if block.get("complete"):
                self.complete = True
                return True
            ends = {name: self.counts[name] + int(block["counts"][name]) for name in STREAMS}
            if all(ends[name] * STREAMS[name].itemsize <= sizes[name] for name in STREAMS):
                self._count(block["file"], block["counts"], block["totals"])
                return True
        return False

    def _count(self, file: int, counts: Mapping[str, int], totals: Mapping[str, Any]) -> None:
        self.blocks.append((file, counts["documents"]))
        for name in STREAMS:
            self.counts[name] += counts[name]
        add_counts(self.totals, totals)

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.bin"

    def _size(self, name: str) -> int:
        return self.counts[name] * STREAMS[name].itemsize

    def add(self, file: int, examined: Examined) -> None:
        """Write a block of the file number `file`."""
        before = self.counts["documents"]
        for name, records in examined.streams.items():
            if name == "overlaps":
                records["document"] += before
            with self._path(name).open("ab") as stream:
                stream.write(records.tobytes())
        counts = {name: len(examined.streams.get(name, ())) for name in STREAMS}
        self._append({"file": file, "counts": counts, "totals": examined.totals})
        self._count(file, counts, examined.totals)

    def finish(self) -> None:
        """Note that all files have been read."""
        self._append({"complete": True})
        self.complete = True

    def _append(self, block: dict[str, Any]) -> None:
        with (self.folder / BLOCKS).open("ab") as file:
            file.write(json.dumps(block).encode() + b"\n")

    def read(self, name: str, at_once: int = AT_ONCE) -> Iterator[npt.NDArray[Any]]:
        """The records of a stream in order, some at a time."""
        with self._path(name).open("rb") as file:
            left = self.counts[name]
            while left:
                found = np.frombuffer(file.read(min(at_once, left) * STREAMS[name].itemsize), STREAMS[name].base)
                count = min(at_once, left)
                yield found.reshape(count, *STREAMS[name].shape)
                left -= count

    def column(self, name: str) -> npt.NDArray[Any]:
        """[documents, …] one field of all documents."""
        kind, start = RECORD[name], 0
        found = np.empty((self.counts["documents"], *kind.shape), kind.base)
        for part in self.read("documents"):  # views of the parts would keep all of their fields in memory
            found[start : start + len(part)] = part[name]
            start += len(part)
        return found

    def signatures_of(self, documents: npt.NDArray[np.int64]) -> npt.NDArray[np.uint32]:
        """[documents, SIGNATURE] the signatures of some documents."""
        stored = np.memmap(self._path("signatures"), "<u4", "r", shape=(self.counts["signatures"], SIGNATURE))
        return np.asarray(stored[documents])


def add_counts(counts: dict[str, Any], more: Mapping[str, Any]) -> None:
    """Add `more` to `counts`, both numbers by name, which may be nested."""
    for name, value in more.items():
        if isinstance(value, Mapping):
            add_counts(counts.setdefault(name, {}), value)
        else:
            counts[name] = counts.get(name, 0) + value
