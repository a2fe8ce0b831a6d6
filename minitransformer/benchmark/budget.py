"""The time budget of a case, shared among its contestants."""

from __future__ import annotations

from time import monotonic

LEAST_SECONDS = 20.0
"""minimum seconds of a part, while they last: less is not enough to import torch"""


class Budget:
    """`seconds` from now on for `parts` in sequence.

    Each may take its share of the rest when it starts, and twice that for preparation and a minimum of rounds;
    unused time is left to the others. If the shares are too short, the first parts take what they need, and the last
    ones get nothing.
    """

    def __init__(self, seconds: float, parts: int) -> None:
        self.end = monotonic() + seconds
        self.parts = parts

    def next_part(self) -> tuple[float, float]:
        """The soft and the hard deadline of the part that starts now."""
        now = monotonic()
        share = (self.end - now) / self.parts
        self.parts = max(1, self.parts - 1)
        return min(self.end, now + max(share, LEAST_SECONDS)), min(self.end, now + max(2 * share, LEAST_SECONDS))
