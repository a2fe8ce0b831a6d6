"""Numbers for people: three significant digits and a unit, never 0.0."""

from __future__ import annotations


def amount(number: float) -> str:
    """A count, such as 812, 768k, 1.84M or 5.5B."""
    return _scaled(number, [(1, ""), (1e3, "k"), (1e6, "M"), (1e9, "B"), (1e12, "T")])


def counted(number: int, things: str) -> str:
    """A count and what is counted, whose plural ends with s, such as 1 text or 1,055 texts."""
    return f"{number:,} {things.removesuffix('s') if number == 1 else things}"


def size(number: float) -> str:
    """A file size, such as 812 bytes, 65.3 kB or 2.43 MB."""
    return _scaled(number, [(1, " bytes"), (1e3, " kB"), (1e6, " MB"), (1e9, " GB"), (1e12, " TB")])


def duration(seconds: float) -> str:
    """A duration, such as 0.5 s, 43 s, 2.2 min or 5.1 h."""
    return _scaled(seconds, [(1, " s"), (60, " min"), (3600, " h")])


def _scaled(number: float, units: list[tuple[float, str]]) -> str:
    """`number` in the largest unit that rounds to at least 1."""
    value, unit = next((number / one, unit) for one, unit in reversed(units) if one == 1 or number / one >= 0.9995)
    return f"{value:.0f}{unit}" if value >= 999.5 else f"{float(f'{value:.3g}'):g}{unit}"
