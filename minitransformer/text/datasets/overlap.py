"""How many documents of validation also stand in training, counted while both are written."""

from __future__ import annotations

import hashlib
from array import array

import numpy as np


class SharedDocuments:
    """Hashes of 64 bits of the documents of training and of validation."""

    def __init__(self) -> None:
        self._digests = {False: array("Q"), True: array("Q")}
        self._open = {False: hashlib.blake2b(digest_size=8), True: hashlib.blake2b(digest_size=8)}
        self._begun = {False: False, True: False}

    def add(self, text: str, opens: bool, validation: bool) -> None:
        """Add a piece of a document, in the order of its split; `opens` marks the first one."""
        if opens:
            self._close(validation)
        self._open[validation].update(text.encode())
        self._begun[validation] = True

    def add_digest(self, digest: int, validation: bool) -> None:
        """Add a whole document by its hash."""
        self._digests[validation].append(digest)

    def _close(self, validation: bool) -> None:
        if self._begun[validation]:
            self._digests[validation].append(int.from_bytes(self._open[validation].digest()))
        self._open[validation] = hashlib.blake2b(digest_size=8)
        self._begun[validation] = False

    def count(self) -> int:
        """The number of documents of validation that also stand in training."""
        for validation in (False, True):
            self._close(validation)
        training, validation_ones = (np.array(self._digests[each], np.uint64) for each in (False, True))
        return int(np.isin(validation_ones, training).sum())


def shared_warning(shared: int, documents: int, what: str) -> str:
    """The lines of a summary that say so."""
    return (
        f"warning    {shared:,} of {documents:,} validation {what} are trained on, so that\n"
        "           losses are too good: `data clean --against` removes them"
    )
