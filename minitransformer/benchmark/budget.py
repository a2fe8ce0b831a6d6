"""The time that a case may take, shared among those that are measured."""

from __future__ import annotations

from time import monotonic

LEAST_SECONDS = 20.0
"""that a part may take, as long as they are there: less is over before torch is imported and has done anything"""


class Budget:
    """`seconds` from now on for `parts` that follow each other.

    Each may take its share of what is left when it begins, and twice that to get ready and for what a median needs;
    what it does not take is left to the others. Where the shares are too short for anything, the first ones take what
    they need, and the last ones have nothing.
    """

    def __init__(self, seconds: float, parts: int) -> None:
        self.end = monotonic() + seconds
        self.parts = parts

    def next_part(self) -> tuple[float, float]:
        """When the part that begins now should end, and when it has to."""
        now = monotonic()
        share = (self.end - now) / self.parts
        self.parts = max(1, self.parts - 1)
        return min(self.end, now + max(share, LEAST_SECONDS)), min(self.end, now + max(2 * share, LEAST_SECONDS))
