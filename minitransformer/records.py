"""Read JSON from disk, and check values against the annotated types of a frozen dataclass."""

from __future__ import annotations

import json
import re
import reprlib
import stat
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from minitransformer.errors import StorageError

T = TypeVar("T")

# The largest files read whole are vocabularies and shard indices, of some tens of megabytes.
MOST_BYTES = 256 << 20
MOST_DEPTH = 100
# JSON can hold a lone surrogate, which cannot be encoded, printed or written.
SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
WORDS: dict[Any, str] = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "a text",
    dict: "an object",
    NoneType: "null",
}


def shown(value: Any) -> str:
    """The value for an error message: its `repr`, shortened where it is long."""
    short = reprlib.Repr()
    short.maxstring = short.maxother = short.maxlong = 60
    return short.repr(value)


def parse_json(content: str | bytes) -> Any:
    """The value of the JSON `content`, UTF-8 if it is bytes.

    Raises `ValueError` for invalid JSON, more than `MOST_DEPTH` levels of nesting, or half a surrogate pair.
    """
    text = content.decode("utf-8-sig") if isinstance(content, bytes) else content
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError(f"it is nested more than {MOST_DEPTH} deep") from None
    level = [value]
    for _ in range(MOST_DEPTH):
        level = [
            inner
            for outer in level
            for inner in (outer.values() if isinstance(outer, dict) else outer if isinstance(outer, list) else ())
            if isinstance(inner, dict | list)
        ]
        if not level:
            break
    else:
        raise ValueError(f"it is nested more than {MOST_DEPTH} deep")
    if SURROGATE.search(text):
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise ValueError("it holds half a surrogate pair") from None
    return value


def read_bytes(path: Path, remedy: str) -> bytes:
    """The content of the regular file at `path`; raises `StorageError` for other kinds, which could block."""
    try:
        entry = path.stat()
        if not stat.S_ISREG(entry.st_mode):
            raise StorageError(f"{path} is not a regular file: {remedy}")
        if entry.st_size > MOST_BYTES:
            size, most = entry.st_size / 1e6, MOST_BYTES / 1e6
            raise StorageError(
                f"{path} has {size:.0f} MB, more than the {most:.0f} MB allowed for such a file: {remedy}"
            )
        return path.read_bytes()
    except OSError as error:
        raise StorageError(f"{path} cannot be read ({error.strerror}): {remedy}") from None


def read_json(path: Path, remedy: str) -> dict[str, Any]:
    """The object in the JSON file at `path`; raises `StorageError` if there is none."""
    try:
        value = parse_json(read_bytes(path, remedy))
    except ValueError as error:
        raise StorageError(f"{path} is damaged ({error}): {remedy}") from None
    if not isinstance(value, dict):
        raise StorageError(f"{path} is damaged (it holds no JSON object): {remedy}")
    return value


def fitted(value: Any, annotation: Any) -> Any:
    """Convert the JSON `value` to the type `annotation`: a list to a tuple, 1 to a float.

    Raises `ValueError` for another type; an int is a float, and a bool is neither.
    """
    origin, options = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return fitted(value, options[0])
    if origin is Literal:
        if any(type(value) is type(option) and value == option for option in options):
            return value
    elif origin in (Union, UnionType):
        for option in options:
            if fits(value, option):
                return fitted(value, option)
    elif origin is tuple:
        kinds = options[:1] * len(value) if options[1:] == (...,) and isinstance(value, list | tuple) else options
        if isinstance(value, list | tuple) and len(kinds) == len(value):
            return tuple(fitted(part, kind) for part, kind in zip(value, kinds, strict=True))
    elif annotation is float:
        if isinstance(value, float) or (type(value) is int and abs(value) < 1 << 1000):
            return float(value)
    elif annotation is int:
        if type(value) is int and abs(value) < 1 << 63:
            return value
    elif isinstance(value, origin or annotation) and isinstance(value, bool) == (annotation is bool):
        return value
    raise ValueError(f"{shown(value)} is not {in_words(annotation)}")


def fits(value: Any, annotation: Any) -> bool:
    """Whether `value` fits the type `annotation`."""
    try:
        fitted(value, annotation)
    except ValueError:
        return False
    return True


def in_words(annotation: Any) -> str:
    """The type `annotation` in words, for an error message."""
    origin, options = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return in_words(options[0])
    if origin in (Union, UnionType):
        return " or ".join(dict.fromkeys(map(in_words, options)))
    if origin is Literal:
        return " or ".join(map(repr, options))
    if origin is tuple:
        return "a list"
    return WORDS.get(origin or annotation, "a valid value")


type_hints = cache(get_type_hints)


def checked_fields(kind: type, values: Mapping[str, Any], origin: str) -> dict[str, Any]:
    """Convert `values` to the annotated types of the fields of `kind`.

    Raises `StorageError` naming the file `origin`, the field and its value, for a value of another type.
    """
    return {name: checked_value(value, type_hints(kind)[name], name, origin) for name, value in values.items()}


def checked_value(value: Any, annotation: Any, name: str, origin: str) -> Any:
    """`value` as the type `annotation` of the field `name`; raises `StorageError` for another type."""
    try:
        return fitted(value, annotation)
    except ValueError:
        what = in_words(annotation)
        raise StorageError(f"{origin} has {name} {shown(value)}, which must be {what}: restore the file") from None


def whole_record(kind: type[T], value: Any, what: str, origin: str) -> T:
    """An instance of the dataclass `kind` from the JSON object `value`, read from the file `origin`.

    Raises `StorageError`, which calls it a record of `what`, for wrong members or types.
    """
    record: type = kind
    if not isinstance(value, dict) or value.keys() != type_hints(record).keys():
        raise StorageError(f"{origin} has a damaged record of {what} ({shown(value)}): restore the file")
    return kind(**checked_fields(record, value, origin))
