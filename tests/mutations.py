"""Damage to files: JSON with other types, keys, depths and numbers, and bytes that are no JSON at all."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Iterator
from typing import Any

VALUES: list[Any] = [
    *(None, True, False, 0, 1, -1, 2, 7, 0.5, -0.5, 1e308, 10**9, 10**18, 2**63, -(2**63), 10**30, 10**400),
    *(float("nan"), float("inf"), "", "text", "none", "1", "\0", "../x", "/etc/passwd", "é" * 300, "\ud800"),
    *([], [[]], [0], [1, 2], ["a"], [None], {}, {"a": 1}, {"": {}}, [10**9], {"Sequence": 1}),
]


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every container inside `value`, with each of its keys."""
    stack = [value]
    while stack:
        container = stack.pop()
        for key in list(container) if isinstance(container, dict) else range(len(container)):
            yield container, key
            if isinstance(container[key], dict | list):
                stack.append(container[key])


def with_structure_changed(content: bytes, rng: random.Random) -> bytes:
    """The JSON in `content` with one to three changes of type, key, number or depth, at random places."""
    value = json.loads(content)
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        found = list(places(value)) if isinstance(value, dict | list) else []
        if not found or rng.random() < 0.02:
            value = copy.deepcopy(rng.choice(VALUES))
            continue
        # Half of the places among the first ones: those of a long list would hide all others.
        container, key = rng.choice(found[:80] if rng.random() < 0.5 else found)
        match rng.choice(["replace", "replace", "replace", "delete", "add", "nest", "swap"]):
            case "replace":
                container[key] = copy.deepcopy(rng.choice(VALUES))
            case "delete":
                del container[key]
            case "add" if isinstance(container, dict):
                container[rng.choice(["", "new", "type", "\0", str(key) + "_"])] = copy.deepcopy(rng.choice(VALUES))
            case "add":
                container.insert(key, copy.deepcopy(rng.choice(VALUES)))
            case "nest":
                container[key] = [container[key]] if rng.random() < 0.5 else {"type": container[key]}
            case "swap":
                other, name = rng.choice(found)
                container[key] = copy.deepcopy(other[name]) if name in other or isinstance(other, list) else None
    return json.dumps(value).encode()


def with_bytes_changed(content: bytes, rng: random.Random) -> bytes:
    """`content` cut off, with bytes that are other ones, doubled, or nested deeper than a parser can go."""
    place = rng.randrange(len(content) + 1)
    match rng.choice(["cut", "flip", "not UTF-8", "double", "deep", "empty", "UTF-16", "NUL"]):
        case "cut":
            return content[:place]
        case "flip":
            changed = bytearray(content)
            for _ in range(rng.randrange(1, 20)):
                changed[rng.randrange(len(changed))] = rng.randrange(256)
            return bytes(changed)
        case "not UTF-8":
            return content[:place] + b"\xff\xfe\xc3(" + content[place:]
        case "double":
            return content + content[place:]
        case "deep":
            return rng.choice([b"[" * 200_000, b'{"a":' * 200_000, b"[" * 600 + b"]" * 600])
        case "UTF-16":
            return content.decode().encode("utf-16")
        case "NUL":
            return content[:place] + b"\0" + content[place:]
        case _:
            return b""


def mutated(content: bytes, rng: random.Random) -> bytes:
    """Another content for a JSON file, or one of JSON lines, that holds `content`."""
    if rng.random() < 0.2:
        return with_bytes_changed(content, rng)
    try:
        return with_structure_changed(content, rng)
    except ValueError:
        lines = content.split(b"\n")
        place = rng.choice([i for i, line in enumerate(lines) if line])
        try:
            lines[place] = with_structure_changed(lines[place], rng)
        except ValueError:
            lines[place] = with_bytes_changed(lines[place], rng)
        return b"\n".join(lines)
