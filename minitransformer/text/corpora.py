"""The documents that `--data` names, streamed in pieces of bounded size."""

from __future__ import annotations

import codecs
import glob
import gzip
import json
import os
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from minitransformer.errors import UserError
from minitransformer.text import recipes
from minitransformer.text.tables import ARRAYS, DELIMITERS, PARQUET, TABLES, array, parquet, separated, text_of

# Threads hold a few pieces each, so this bounds memory; it is large enough for negligible overhead per task.
PIECE = 1 << 18
PROSE = {".txt", ".md"}
LINES = {".jsonl"}
CODE = {
    *(".py", ".pyi", ".js", ".mjs", ".jsx", ".ts", ".tsx", ".java", ".kt", ".scala", ".go", ".rs", ".c", ".h", ".cc"),
    *(".cpp", ".cxx", ".hpp", ".cu", ".cuh", ".cs", ".swift", ".rb", ".php", ".pl", ".lua", ".r", ".jl", ".hs", ".ml"),
    *(".ex", ".exs", ".erl", ".clj", ".el", ".lisp", ".scm", ".sh", ".bash", ".zsh", ".ps1", ".sql", ".html", ".css"),
    *(".scss", ".tex", ".rst", ".yaml", ".yml", ".toml", ".cmake", ".zig", ".v", ".sv", ".vhd", ".dart", ".m", ".f90"),
}

Signature = list[tuple[str, int, int, int]]


class Piece(NamedTuple):
    """A part of a document; `opens` marks the first one."""

    text: str
    opens: bool


@dataclass(frozen=True)
class Files:
    """Files in a fixed order, and their name in messages."""

    name: str
    files: tuple[Path, ...]

    @property
    def size(self) -> int:
        """Bytes on disk."""
        return sum(path.stat().st_size for path in self.files)

    def signature(self) -> Signature:
        """Path, size and modification times, which change with the files."""
        entries = [(str(path.resolve()), path.stat()) for path in self.files]
        return [(path, entry.st_size, entry.st_mtime_ns, entry.st_ctime_ns) for path, entry in entries]

    def check_unchanged(self, signature: Signature) -> None:
        """Raises `UserError` if the files have changed."""
        if self.signature() != signature:
            raise UserError(f"{self.name} changed while being read: try again when nothing writes to it")


@dataclass(frozen=True)
class Corpus(Files):
    """Documents: one per text file, JSONL line or table row.

    `skipped` counts the files of a folder whose suffix is not text.
    """

    field: str = "text"
    skipped: int = 0

    def pieces(self, on_read: Callable[[int], object] = lambda count: None) -> Iterator[Piece]:
        """All documents in order, each non-empty, in pieces of at most 2 · PIECE characters.

        `on_read` is called with the number of bytes read since its last call.
        Raises `UserError` with the file, and the byte or line, that is not text.
        """
        for path in self.files:
            for document in documents(path, self.field, on_read):
                opens = True
                for text in cut(document, PIECE):
                    yield Piece(text, opens)
                    opens = False


def kind(path: Path) -> str:
    """The suffix that determines how `path` is read, without .gz."""
    return (Path(path.stem) if path.suffix.lower() == ".gz" else path).suffix.lower()


def cut(texts: Iterator[str] | list[str], size: int) -> Iterator[str]:
    """`texts`, joined and cut into pieces of about `size` characters whose encodings concatenate to that of the whole.

    The cut is before a whitespace that follows a letter or digit. There GPT-4's split pattern, and GPT-2's and
    GPT-4o's, end one match and begin the next: a match that holds a letter or digit never goes on into whitespace,
    and no lookahead is open at its end. (After a newline it would not be so: GPT-2 takes the last of several
    whitespaces by itself, unless the text ends there, and GPT-4o joins `!`, newline and `/`.)
    Text without such a position is cut between any two characters.
    """
    rest = ""
    for text in texts:
        rest += text
        while len(rest) > size:
            place = size
            while place and not (rest[place].isspace() and rest[place - 1].isalnum()):
                place -= 1
            place = place or size
            yield rest[:place]
            rest = rest[place:]
    if rest:
        yield rest


def _blocks(path: Path, on_read: Callable[[int], object]) -> Iterator[bytes]:
    """The bytes of a file, decompressed if it ends in .gz, without a byte-order mark."""
    try:
        with path.open("rb") as raw:
            packed = path.suffix.lower() == ".gz"
            stream: BinaryIO = gzip.GzipFile(fileobj=raw) if packed else raw  # type: ignore[assignment]
            at, first = 0, True
            while block := stream.read(PIECE):
                if b"\0" in block:
                    raise UserError(
                        f"{path} is not text (it holds NUL bytes): convert it to UTF-8 text, or leave it out"
                    )
                yield block.removeprefix(codecs.BOM_UTF8) if first else block
                on_read(raw.tell() - at)
                at, first = raw.tell(), False
    except OSError as error:
        if isinstance(error, gzip.BadGzipFile):
            raise UserError(f"{path} is not in gzip format: compress it again, or remove .gz from its name") from None
        raise UserError(f"{path} cannot be read ({error.strerror}): check its permissions") from None
    except (EOFError, zlib.error):
        raise UserError(f"{path} is damaged or truncated: compress it again") from None


def read(
    path: Path, on_read: Callable[[int], object] = lambda count: None, encoding: str | None = None
) -> Iterator[str]:
    """The text of a file in parts; raises `UserError` with the offset of the first byte that is not in `encoding`.

    None is UTF-8, where the data has no setting for its encoding.
    """
    decode, before = codecs.getincrementaldecoder(encoding or "utf-8")(), 0
    for last, block in _with_end(_blocks(path, on_read)):
        pending = len(decode.getstate()[0])
        try:
            yield decode.decode(block, final=last)
        except UnicodeDecodeError as error:
            raise _undecodable(path, before - pending + error.start, error.object[error.start], encoding) from None
        before += len(block)


def _with_end(blocks: Iterator[bytes]) -> Iterator[tuple[bool, bytes]]:
    for block in blocks:
        yield False, block
    yield True, b""


def _undecodable(path: Path, offset: int, value: int, encoding: str | None) -> UserError:
    remedy = "convert it, for example with iconv -t UTF-8"
    if encoding is not None:
        remedy = f"choose another --encoding, such as latin-1, or {remedy}"
    return UserError(f"{path} is not {(encoding or 'utf-8').upper()} at byte {offset} (0x{value:02x}): {remedy}")


def jsonl_documents(
    path: Path, field: str, on_read: Callable[[int], object], encoding: str | None = None
) -> Iterator[list[str]]:
    """The field's text of every line, without empty lines and texts."""
    for number, record in jsonl_records(path, on_read, encoding):
        yield [text_of(record, field, path, "line", number)]


def jsonl_records(
    path: Path, on_read: Callable[[int], object], encoding: str | None = None
) -> Iterator[tuple[int, Any]]:
    """The number of every line, without empty ones, and the JSON in it."""
    for number, line in enumerate(split_lines(read(path, on_read, encoding)), start=1):
        if not line.strip():
            continue
        try:
            yield number, json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path} line {number} is not JSON ({error}): each line must be one object") from None


def documents(
    path: Path, field: str, on_read: Callable[[int], object], encoding: str | None = None
) -> Iterator[Iterator[str] | list[str]]:
    """The documents in a file, each in parts: its whole text, or the field of each row."""
    suffix = kind(path)
    if suffix in LINES:
        yield from jsonl_documents(path, field, on_read, encoding)
    elif suffix in DELIMITERS:
        lines = (line + "\n" for line in split_lines(read(path, on_read, encoding)))
        yield from ([text] for text in separated(lines, path, field))
    elif suffix in ARRAYS:
        yield from ([text] for text in array(read(path, on_read, encoding), path, field))
    elif suffix in PARQUET:
        yield from ([text] for text in parquet(path, field, on_read))
    else:
        yield read(path, on_read, encoding)


def split_lines(texts: Iterable[str]) -> Iterator[str]:
    """`texts` split at newlines only: JSON strings may hold the other characters that str.splitlines splits at."""
    parts: list[str] = []
    for text in texts:
        *whole, rest = text.split("\n")
        for line in whole:
            yield "".join([*parts, line])
            parts = []
        parts.append(rest)
    yield "".join(parts)


def open_corpus(data: str | Sequence[str], field: str = "text") -> Corpus:
    """The corpus that `data` names: one or several recipes (made if necessary), files, folders or globs.

    Folders are searched recursively, without hidden files, for the suffixes above (each also with .gz); files named
    directly or by a glob are always read, and tables are read by `field` as JSONL is. A file that is named
    twice is read once. A path with the name of a recipe needs `./`.
    Raises `UserError` when there is nothing to read.
    """
    names = [data] if isinstance(data, str) else list(data)
    parts = [_opened(name, field) for name in names]
    if field != "text" and not any(kind(file) in LINES | TABLES for part in parts for file in part.files):
        raise UserError(f"--field is {field!r}, and {named(names)} has no fields: leave it out")
    if len(parts) == 1:
        return parts[0]
    if made := [name for name in names if name in recipes.known() and field != "text"]:
        raise UserError(
            f"recipe {made[0]} has the field 'text', and --field is {field!r}: name data with the same field"
        )
    files = {file.resolve(): file for part in parts for file in part.files}
    return Corpus(named(names), tuple(files.values()), field, sum(part.skipped for part in parts))


def named(data: str | Sequence[str]) -> str:
    """The name of `--data` in messages."""
    names = [data] if isinstance(data, str) else list(data)
    return ", ".join(names) if len(names) < 4 else f"{names[0]} and {len(names) - 1} more"


def short_name(data: str | Sequence[str]) -> str:
    """A short name for runs on `data`: the last meaningful part of the first path."""
    names = [data] if isinstance(data, str) else list(data)
    name = _bare(names[0])
    return name if len(names) == 1 else f"{name}-and-{len(names) - 1}-more"


def _bare(data: str) -> str:
    """The last meaningful part of a path, without suffixes and wildcards."""
    for part in reversed(Path(data if data.strip("./") else os.path.abspath(data)).parts):
        name = re.sub(r"(\.[A-Za-z]\w*)+$", "", re.sub(r"[*?\[\]]+", "", part))
        if name := re.sub(r"[^\w.+-]+", "-", name).strip(".-"):
            return name
    return "data"


def _opened(data: str, field: str) -> Corpus:
    path, skipped = Path(data).expanduser(), 0
    if data in recipes.known():
        return Corpus(data, (recipes.make(data),), "text")
    if path.is_file():
        files = [path]
    elif path.is_dir():
        found = list(visible_files(path))
        files = [file for file in found if kind(file) in PROSE | LINES | CODE]
        skipped = len(found) - len(files)
        if not files:
            raise UserError(
                f"folder {data} has no text among its {len(found)} files: put .txt, .md, .jsonl or source code there, "
                "or name tables one by one, as by a glob"
            )
    elif glob.has_magic(data):
        files = sorted(Path(name) for name in glob.glob(str(path), recursive=True) if Path(name).is_file())
        if not files:
            raise UserError(f"no file matches {data!r}: check the pattern, and quote it against the shell")
    elif path.exists():
        raise UserError(f"{data} is neither a file nor a folder: pipe its content into --data -")
    else:
        raise UserError(no_such_data(data))
    try:
        empty = not any(file.stat().st_size for file in files)
    except OSError as error:
        raise UserError(f"{error.filename} cannot be read ({error.strerror}): check its permissions") from None
    if empty:
        raise UserError(f"{data} is empty: put text there")
    return Corpus(data, tuple(files), field, skipped)


def visible_files(folder: Path) -> Iterator[Path]:
    """The files of a folder and of the folders in it, sorted, without hidden ones."""

    def refuse(error: OSError) -> None:
        raise UserError(f"{error.filename} cannot be read ({error.strerror}): check its permissions") from None

    for parent, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        paths = (Path(parent, name) for name in sorted(names) if not name.startswith("."))
        # Reading a pipe could block, and a link may be broken.
        yield from (path for path in paths if path.is_file())


def no_such_data(data: str) -> str:
    """The message for a `--data` that names nothing."""
    names = list(recipes.known())
    nearest = get_close_matches(data, names, n=1, cutoff=0.5)
    hint = f"did you mean the recipe {nearest[0]!r}? " if nearest else ""
    return f"no file, folder or recipe {data!r}: {hint}recipes are {', '.join(names)}; anything else must be a path"
