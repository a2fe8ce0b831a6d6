"""The threads that end this process when another rank is lost, and the ways in which it ends by itself."""

from __future__ import annotations

import os
import select
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, NoReturn

from minitransformer.errors import UserError
from minitransformer.training.launch import note_end, number_from_launcher
from minitransformer.training.liveness import FAILED, SUSPECT, Beat, Vigil

if TYPE_CHECKING:
    from torch.distributed import Store

PACKAGE = Path(__file__).parents[1]
INTERRUPTED, TERMINATED = 128 + signal.SIGINT, 128 + signal.SIGTERM
NOTICE = getattr(signal, "SIGUSR1", signal.SIGTERM)
"""Slurm's notice before the time limit; not on every system"""
GRACE = 2.0
"""seconds in which the main thread may end by itself, or rank 0 may report an error that all ranks have"""


class Watch:
    """Beats of this process, and a look at those of all ranks, in threads of their own.

    Liveness is the process's: its main thread may compile, prepare or save as long as it likes. `store` is that of this
    attempt, `memory` the launcher's. While entered, a SIGTERM that nobody else handles ends the process.
    """

    def __init__(self, store: Store, memory: Store, rank: int, names: Sequence[str], timeout: float) -> None:
        self.store, self.memory, self.rank = store, memory, rank
        self.vigil = Vigil(rank, names, timeout)
        self.steps = 0
        self._beats = 0
        self._store_lost = False
        self._received: list[int] = []
        self._deadline: tuple[float, int] | None = None
        self._over = threading.Event()
        self._ending = threading.Lock()

    def __enter__(self) -> Watch:
        self._signals, wakes = socket.socketpair()
        wakes.setblocking(False)
        # Python's handlers run in the main thread, which may wait for another rank for ever.
        signal.set_wakeup_fd(wakes.fileno(), warn_on_full_buffer=False)
        self._wakes = wakes
        for number in (signal.SIGTERM, NOTICE):
            signal.signal(number, _unhandled)
        for work in (self._exchange_beats, self._look_out):
            threading.Thread(target=work, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self._leave(error)
        self._over.set()
        signal.set_wakeup_fd(-1)
        for number in (signal.SIGTERM, NOTICE):  # torchrun sends one when the first rank has ended
            signal.signal(number, signal.SIG_IGN)

    def _exchange_beats(self) -> None:
        before = time.monotonic()
        try:
            while not self._over.wait(self.vigil.interval):
                self._say()
                self.vigil.hear(self._heard(), self._elapsed(before))
                before = time.monotonic()
        except RuntimeError:
            self._store_lost = True

    def _heard(self) -> list[Beat]:
        keys = [f"beat/{rank}" for rank in range(len(self.vigil.names))]
        if self.store.check(keys):
            return [Beat.decode(content) for content in self.store.multi_get(keys)]
        # Some have not begun, and the store would wait for them.
        return [
            Beat.decode(self.store.get(key)) if self.store.check([key]) else last
            for key, last in zip(keys, self.vigil.beats, strict=True)
        ]

    def _elapsed(self, before: float) -> float:
        """Seconds since `before`, without those in which this process was stopped."""
        return min(time.monotonic() - before, 2 * self.vigil.interval)

    def _say(self, code: int | None = None) -> None:
        waits, place = _main_thread()
        self._beats += 1
        self.store.set(f"beat/{self.rank}", Beat(self._beats, self.steps, waits, place, code).encode())

    def _look_out(self) -> None:
        before = time.monotonic()
        while not self._over.is_set():
            ready, _, _ = select.select([self._signals], [], [], self.vigil.interval)
            self.vigil.unheard += self._elapsed(before)
            before = time.monotonic()
            for number in self._signals.recv(64) if ready else b"":
                self._notice(number)
            if self._store_lost:
                self._finish_without_store()
            if self._deadline is not None and before > self._deadline[0]:
                self._end(self._deadline[1], "\ninterrupted")
            if (ending := self.vigil.ending()) is not None:
                self._end(ending.code, ending.sentence and f"error: {ending.sentence}")

    def _notice(self, number: int) -> None:
        """Set a time to end for a second signal, or for one that the main thread does not handle."""
        again = number != NOTICE and {signal.SIGINT, signal.SIGTERM} & {*self._received}
        self._received.append(number)
        self.vigil.alarmed |= number == signal.SIGTERM
        handled = signal.getsignal(number) not in (_unhandled, signal.default_int_handler)
        if self._deadline is None and (again or not handled):
            patience = GRACE if number == signal.SIGINT or again else SUSPECT + GRACE
            self._deadline = time.monotonic() + patience, INTERRUPTED if number == signal.SIGINT else TERMINATED

    def _finish_without_store(self) -> None:
        """Without `torchrun`, finish the step and save, unless Ctrl-C has ended it."""
        if signal.SIGINT in self._received:
            self._end(INTERRUPTED, "\ninterrupted")
        if not self._received:
            os.kill(os.getpid(), signal.SIGTERM)

    def _leave(self, error: BaseException) -> NoReturn:
        """End the process because of an `error` in the main thread, which is reported once, by one rank."""
        if isinstance(error, UserError | SystemExit | KeyboardInterrupt):
            with suppress(RuntimeError):
                note_end(self.memory, _exit_code(error))
        name = self.vigil.names[self.rank]
        if isinstance(error, UserError | SystemExit):
            if self.rank > 0:
                time.sleep(GRACE)
            speaks = isinstance(error, UserError) and not error.reported
            self._end(_exit_code(error), (speaks and f"error: {f'{name}: ' if self.rank else ''}{error}") or "")
        if isinstance(error, KeyboardInterrupt):
            self._end(INTERRUPTED, "\ninterrupted")
        if isinstance(error, BrokenPipeError):  # nobody reads the output
            self._end(FAILED)
        if isinstance(error, RuntimeError):  # as an operation raises when another rank is lost
            self.vigil.alarmed = True
            self.vigil.unheard += self.vigil.timeout if self._store_lost else 0.0
            time.sleep(SUSPECT)
        self._end(FAILED, f"{name}:\n{''.join(traceback.format_exception(error))}")

    def _end(self, code: int, text: str = "") -> NoReturn:
        """End the process at once; files that it writes are whole or absent."""
        self._ending.acquire()  # once, by the first thread
        with suppress(Exception):
            sys.stdout.flush()
        if text and self._may_speak():
            print(text, file=sys.__stderr__, flush=True)
        if not self._store_lost:
            with suppress(RuntimeError):
                self._say(code)
        os._exit(code)

    def _may_speak(self) -> bool:
        """Whether no other rank has spoken; without the store, one rank on each node speaks."""
        if not self._store_lost and self.vigil.unheard <= self.vigil.timeout / 2:
            with suppress(RuntimeError):
                return self.store.add("spoken", 1) == 1
        return number_from_launcher("LOCAL_RANK") == 0


def _exit_code(error: BaseException) -> int:
    code = getattr(error, "exit_code", getattr(error, "code", INTERRUPTED))
    return code if isinstance(code, int) else FAILED if code else 0


def _unhandled(number: int, frame: FrameType | None) -> None:
    """Leave the signal to the thread that looks out."""


def _main_thread() -> tuple[bool, str]:
    """Whether the main thread is in a collective operation, and where it is in this package."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    inner = frame
    while frame is not None and PACKAGE not in Path(frame.f_code.co_filename).parents:
        frame = frame.f_back
    waits = inner is not None and (
        "torch/distributed" in inner.f_code.co_filename or inner.f_code.co_name == "_engine_run_backward"
    )
    if frame is None:
        return waits, "an unknown place"
    return waits, f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno} ({frame.f_code.co_name})"
