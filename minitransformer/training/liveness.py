"""Which rank has died, was stopped or hangs, judged by what the processes of all ranks say of themselves."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import astuple, dataclass

from minitransformer.amounts import duration

FAILED = 1
SUSPECT = 10.0
"""patience with a rank after a sign that one is lost, in seconds; torchrun kills 30 seconds after its SIGTERM"""
HANG = 60
"""patience with a step, relative to that with a process: compiling, saving or a long validation may take a while"""


@dataclass(frozen=True)
class Beat:
    """What a rank says of itself; a process that is stopped or dead says nothing."""

    number: int = 0
    steps: int = 0
    """how often the ranks of the training loop have agreed to go on"""
    waits: bool = False
    """whether the main thread is in a collective operation"""
    place: str = ""
    """where the main thread is in this package"""
    code: int | None = None
    """exit code, when it leaves after an error, which it has reported"""

    def encode(self) -> str:
        return json.dumps(astuple(self))

    @classmethod
    def decode(cls, content: bytes) -> Beat:
        return cls(*json.loads(content))


@dataclass(frozen=True)
class Ending:
    """Why this process has to end: its exit code, and a sentence; "" if another rank has spoken."""

    code: int
    sentence: str = ""


class Vigil:
    """What `rank` knows of the others, from their beats.

    Only time in which this process runs counts: after it was stopped, others have not been silent.
    """

    def __init__(self, rank: int, names: Sequence[str], timeout: float) -> None:
        self.rank, self.names, self.timeout = rank, names, timeout
        self.beats = [Beat()] * len(names)
        self.advice = "no step was saved: run the command again"
        self.alarmed = False
        """whether there is a sign that a rank is lost: a failed operation, or SIGTERM from torchrun"""
        self.unheard = 0.0
        """seconds without an answer of the store"""
        self._silent = [0.0] * len(names)
        self._still = 0.0

    @property
    def interval(self) -> float:
        """Seconds between beats."""
        return min(1.0, self.timeout / 10)

    def hear(self, beats: Sequence[Beat], seconds: float) -> None:
        """The newest `beats` of all ranks, `seconds` after those before."""
        steps = beats[self.rank].steps
        # Before the first step, data of any size is prepared.
        self._still = self._still + seconds if 0 < steps == self.beats[self.rank].steps else 0.0
        for rank, (old, new) in enumerate(zip(self.beats, beats, strict=True)):
            self._silent[rank] = self._silent[rank] + seconds if new.number == old.number else 0.0
        self.beats, self.unheard = list(beats), 0.0

    def ending(self) -> Ending | None:
        """Why this process has to end, if it has to."""
        others = [rank for rank in range(len(self.names)) if rank != self.rank]
        codes = [code for rank in others if (code := self.beats[rank].code) is not None]
        if codes:
            return Ending(codes[0])
        if self.unheard > self._patience(self.timeout):
            return self._lost([0], self.unheard)  # torchrun keeps the store on its node
        patience = self._patience(min(SUSPECT, self.timeout) if self.alarmed else self.timeout)
        if silent := [rank for rank in others if self._silent[rank] > patience]:
            return self._lost(silent, max(self._silent[rank] for rank in silent))
        return self._hung() if self._still > HANG * self.timeout else None

    def _patience(self, most: float) -> float:
        """`most` seconds, less those between a beat and a look at it."""
        return most - 2 * self.interval

    def _lost(self, ranks: Sequence[int], seconds: float) -> Ending:
        who = ", ".join(self.names[rank] for rank in ranks)
        verb = "have" if len(ranks) > 1 else "has"
        return Ending(FAILED, f"{who} {verb} not answered for {duration(seconds)}; {self.advice}")

    def _hung(self) -> Ending:
        """Ranks that do not wait for others hang."""
        ranks = range(len(self.names))
        hung = [rank for rank in ranks if not self.beats[rank].waits] or list(ranks)
        where = ", ".join(f"{self.names[rank]} at {self.beats[rank].place}" for rank in hung)
        return Ending(FAILED, f"no step has ended for {duration(self._still)}, with {where}; {self.advice}")
