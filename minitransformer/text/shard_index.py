"""An index of shards: a JSON file that `--data` names, for data larger than one disk."""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from minitransformer.errors import StorageError, UserError, suggestion
from minitransformer.records import fits, fitted, in_words, read_json, shown, type_hints
from minitransformer.text.token_files import dtype_of, reading_shard
from minitransformer.text.tokenizers import Tokenizer

FORMAT = 1
REMEDY = "write it anew, such as with `minitransformer tokenize`"
TOKENS = ".bin"
"""suffix of a file of token ids; all others are text"""
LEAST_WEIGHT, MOST_WEIGHT = 1e-12, 1e15
LOOKED_AT = 1 << 16
"""bytes of a JSON file in which an index names its shards"""


@dataclass(frozen=True)
class Shard:
    """A file of an index: token ids (`.bin`), little-endian and nothing else, or text in any form that `--data` reads.

    An id has 2 bytes if the vocabulary has at most 65536, else 4; every document begins with the end-of-text token.
    It may also be another index, whose shards then share the weight.
    """

    path: str
    """as the index has it: relative to its folder, or absolute"""
    weight: float | None = None
    """share of the training rows, relative to the other shards; None is its number of tokens"""
    tokens: int | None = None
    sha256: str | None = None

    @property
    def is_text(self) -> bool:
        return not self.path.endswith(TOKENS)


@dataclass(frozen=True)
class ShardIndex:
    """The shards to train on, those for validation if it names any, and the tokenizer of its token files."""

    path: Path
    tokenizer: Path | None
    shards: tuple[Shard, ...]
    validation: tuple[Shard, ...]

    @classmethod
    def read(cls, path: Path, within: tuple[Path, ...] = ()) -> ShardIndex:
        """The index at `path`, with the shards of the indices `within` which it is named.

        Raises `UserError` for a mistake in it.
        """
        if path.resolve() in within:
            raise UserError(f"{path} is an index within itself: remove it there")
        record = read_json(path, REMEDY)
        _check_names(record, ("format", "tokenizer", "shards", "validation"), f"{path}")
        if record.get("format", FORMAT) != FORMAT:
            raise UserError(f"{path} has format {shown(record['format'])}, and this version reads {FORMAT}: update")
        tokenizer = record.get("tokenizer")
        if not isinstance(tokenizer, str | None):
            raise UserError(f"{path} has tokenizer {shown(tokenizer)}: give the path of a tokenizer.json")
        _check_path(tokenizer or "", f"{path}")
        lists = [_shards(record.get(name, []), name, path) for name in ("shards", "validation")]
        index = cls(path, None if tokenizer is None else path.parent / Path(tokenizer).expanduser(), *lists)
        index = index._unfolded((*within, path.resolve()))
        index._check()
        return index

    def _unfolded(self, within: tuple[Path, ...]) -> ShardIndex:
        """The same index, with the shards of each index that it names in the place of that one."""
        tokenizer, shards, validation = self.tokenizer, list[Shard](), list(self.validation)
        for shard in self.shards:
            if not is_index(str(self.place(shard))):
                shards.append(shard)
                continue
            inner = ShardIndex.read(self.place(shard), within)
            tokenizer = _shared_tokenizer(tokenizer, inner.tokenizer)
            folder = Path(shard.path).parent
            for found, named in ((shards, inner._weighed(shard.weight)), (validation, inner.validation)):
                found += [replace(each, path=str(folder / Path(each.path).expanduser())) for each in named]
        return replace(self, tokenizer=tokenizer, shards=tuple(shards), validation=tuple(validation))

    def _weighed(self, weight: float | None) -> Sequence[Shard]:
        """The shards for training, of the `weight` together if it is given."""
        if weight is None:
            return self.shards
        parts = [shard.weight or shard.tokens or 0 for shard in self.shards]
        if not all(parts):
            name = self.shards[parts.index(0)].path
            raise UserError(f"{self.path} is weighed as a whole, and has neither weight nor tokens of {name}: give one")
        return [
            replace(shard, weight=weight * part / sum(parts)) for shard, part in zip(self.shards, parts, strict=True)
        ]

    def _check(self) -> None:
        if not self.shards:
            raise UserError(f'{self.path} names no shards: list them under "shards"')
        places: set[Path] = set()
        for shard in (*self.shards, *self.validation):
            if (place := self.place(shard).resolve()) in places:
                raise UserError(f"{self.path} has {shard.path} twice: remove one, and double the other's weight")
            places.add(place)
        for shard in self.validation:
            if shard.weight is not None:
                raise UserError(f"{self.path} weighs {shard.path}, which is for validation: remove its weight")
        if len({shard.weight is None for shard in self.shards}) > 1:
            raise UserError(f"{self.path} weighs some of its shards only: give each a weight, or none")
        if self.tokenizer is None and (tokens := [shard for shard in self.all if not shard.is_text]):
            raise UserError(
                f"{self.path} has tokens in {tokens[0].path}, and not the tokenizer that made them: "
                'name its tokenizer.json under "tokenizer"'
            )

    @property
    def all(self) -> tuple[Shard, ...]:
        """Every shard."""
        return (*self.shards, *self.validation)

    def place(self, shard: Shard) -> Path:
        """The path of `shard`."""
        return self.path.parent / Path(shard.path).expanduser()

    def size(self, shard: Shard) -> int:
        """Bytes of the file of `shard`; raises `StorageError` if there is none, or an empty one."""
        path = self.place(shard)
        with reading_shard(path):
            found = path.stat().st_size
        if not path.is_file() or not found:
            raise StorageError(f"shard {path} is {'empty' if path.is_file() else 'no file'}: restore it")
        return found

    @property
    def token_bytes(self) -> int:
        """Bytes of each token in its files of tokens."""
        assert self.tokenizer is not None, "an index with tokens names their tokenizer"
        return dtype_of(Tokenizer.load(self.tokenizer)).itemsize


def _shards(entries: Any, name: str, path: Path) -> tuple[Shard, ...]:
    if not isinstance(entries, list):
        raise UserError(f'{path} has "{name}" {shown(entries)}: give a list of shards')
    return tuple(_shard(entry, f'number {i} of "{name}" in {path}') for i, entry in enumerate(entries, start=1))


def _shard(entry: Any, where: str) -> Shard:
    if isinstance(entry, str):
        entry = {"path": entry}
    if not isinstance(entry, dict) or "path" not in entry:
        raise UserError(f"{where} is {shown(entry)}: give a path, or an object with one")
    _check_names(entry, [field.name for field in fields(Shard)], where)
    for name, value in entry.items():
        if not fits(value, type_hints(Shard)[name]):
            raise UserError(f"{where} has {name} {shown(value)}: it must be {in_words(type_hints(Shard)[name])}")
    shard = Shard(**{name: fitted(value, type_hints(Shard)[name]) for name, value in entry.items()})
    _check_path(shard.path, where)
    if shard.weight is not None and not LEAST_WEIGHT <= shard.weight <= MOST_WEIGHT:
        raise UserError(
            f"{where} has weight {shard.weight}: it must be between {LEAST_WEIGHT:g} and {MOST_WEIGHT:g}, "
            "or leave the shard out"
        )
    if shard.tokens is not None and shard.tokens < 1:
        raise UserError(f"{where} has tokens {shard.tokens}: it must be at least 1")
    if shard.is_text and shard.tokens is not None:
        raise UserError(f"{where} has tokens {shard.tokens} and is text, whose tokens are counted: remove them")
    return shard


def _check_path(path: str, where: str) -> None:
    """Raises `UserError` for a path that no file can have."""
    with suppress(OSError):
        try:
            Path(path).expanduser().lstat()
        except (ValueError, RuntimeError):
            raise UserError(f"{where} names {shown(path)}, which is no path: name a file") from None


def _check_names(record: dict[str, Any], known: Sequence[str], where: str) -> None:
    for name in record:
        if name not in known:
            raise UserError(f"{where} has {name!r}: {suggestion(name, known)}it may have {', '.join(known)}")


def _shared_tokenizer(first: Path | None, second: Path | None) -> Path | None:
    """The tokenizer of two indices; raises `UserError` if they differ."""
    if first is None or second is None:
        return first or second
    if Tokenizer.load(first).fingerprint != Tokenizer.load(second).fingerprint:
        raise UserError(f"{first} and {second} differ, and a mixture has one tokenizer: tokenize one of them again")
    return first


def is_index(name: str) -> bool:
    """Whether `name` is a JSON file whose beginning is that of an index."""
    path = Path(name).expanduser()
    if path.suffix.lower() != ".json" or not path.is_file():
        return False
    try:
        with path.open("rb") as file:
            beginning = file.read(LOOKED_AT)
    except OSError as error:
        raise StorageError(f"{path} cannot be read ({error.strerror}): check its permissions") from None
    return beginning.lstrip().startswith(b"{") and re.search(rb'"shards"\s*:', beginning) is not None


def index_in(data: str | Sequence[str]) -> Path | None:
    """The index that `data` names, if any; raises `UserError` for one among other sources."""
    names = [data] if isinstance(data, str) else list(data)
    indices = [name for name in names if is_index(name)]
    if indices and len(names) > 1:
        raise UserError(f"{indices[0]} is an index of shards and must be the only source: add the others to it")
    return Path(indices[0]).expanduser() if indices else None


def check_no_index(validation: str | Sequence[str]) -> None:
    """Raises `UserError` for an index among validation data."""
    for name in [validation] if isinstance(validation, str) else validation:
        if is_index(name):
            raise UserError(
                f'{name} is an index of shards, which --data takes: name those for validation under "validation" in it'
            )
