"""Calls of the native code in tokenizers, whose regular expressions may come from a file."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from threading import Thread
from typing import TypeVar

T = TypeVar("T")

SECONDS, CHARACTERS_PER_SECOND = 5.0, 50_000
"""far more time than any text takes that is split without backtracking"""


def call_native(call: Callable[[], T]) -> T:
    """What `call` returns; raises `ValueError` for a panic in Rust, and for a plain `Exception`."""
    try:
        return call()
    except BaseException as error:
        if type(error) is not Exception and type(error).__name__ != "PanicException":
            raise
        raise ValueError(str(error)) from None


def call_within_time(call: Callable[[], T], characters: int) -> T:
    """`call_native`; raises `ValueError` where `call` takes far longer than so many characters need.

    `call` must release the GIL. The thread that it runs in cannot be stopped, and ends with the process.
    """
    result: Future[T] = Future()

    def run() -> None:
        try:
            result.set_result(call_native(call))
        except BaseException as error:
            result.set_exception(error)

    Thread(target=run, daemon=True).start()
    limit = SECONDS + characters / CHARACTERS_PER_SECOND
    try:
        return result.result(limit)
    except TimeoutError:
        raise ValueError(f"it takes more than {limit:.0f} s for {characters:,} characters") from None
