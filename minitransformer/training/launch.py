"""What `torchrun` gives to the processes that it starts: a store, places among them, and restarts."""

from __future__ import annotations

import json
import os
import shlex
import socket
import sys
import time
import uuid
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from minitransformer.errors import UserError

if TYPE_CHECKING:
    from torch.distributed import Store

MEETING = 300.0
"""patience with ranks that start, in seconds; they import torch first"""
ATTEMPT, RUN, ENDED = "minitransformer/attempt", "minitransformer/run", "minitransformer/ended"
"""keys that outlive a restart: the name of the latest attempt, its run folder, and the end of an earlier one"""


def number_from_launcher(name: str) -> int:
    """The number that the launcher gives as `name`; 0 without it."""
    return int(os.environ.get(name, "0"))


def open_store() -> Store:
    """A connection to the launcher's store; without `torchrun`, rank 0 keeps one."""
    from torch.distributed import TCPStore

    hosts = number_from_launcher("RANK") == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return TCPStore(
        address, port, is_master=hosts, timeout=timedelta(seconds=MEETING), wait_for_workers=False, multi_tenant=True
    )


def meet(store: Store, rank: int, size: int) -> tuple[str, list[str]]:
    """Wait for all ranks of this attempt; returns its name, unique among attempts, and the names of the ranks.

    The store may hold what ranks of earlier attempts have written, and nodes may disagree on the number of restarts:
    rank 0 names the attempt, and a rank has met the others if rank 0 has read what it wrote. Raises `UserError` if a
    rank is missing.
    """
    me = [f"rank {rank} (process {os.getpid()} on {socket.gethostname()})", uuid.uuid4().hex]
    if rank == 0:
        store.set(ATTEMPT, me[1])
    end = time.monotonic() + MEETING
    while time.monotonic() < end:
        attempt = _latest_attempt(store)
        store.set(f"{attempt}/{rank}", json.dumps(me))
        if rank == 0:
            _present(store, attempt, size, end)
        while time.monotonic() < end and _latest_attempt(store) == attempt:
            if store.check([f"{attempt}/all"]) and me in (present := json.loads(store.get(f"{attempt}/all"))):
                return attempt, [name for name, _ in present]
            time.sleep(0.05)
    raise UserError(f"the {size} ranks have not all started within {MEETING:.0f} seconds: start them together")


def _latest_attempt(store: Store) -> str:
    return store.get(ATTEMPT).decode() if store.check([ATTEMPT]) else ""


def _present(store: Store, attempt: str, size: int, end: float) -> None:
    """Publish what all ranks of `attempt` have written, if they come before `end`."""
    keys = [f"{attempt}/{rank}" for rank in range(size)]
    while not store.check(keys) and time.monotonic() < end:
        time.sleep(0.05)
    if store.check(keys):
        store.set(f"{attempt}/all", json.dumps([json.loads(store.get(key)) for key in keys]))


def note_end(store: Store, code: int) -> None:
    """Have `torchrun` not try again what has ended for good with exit code `code`."""
    store.set(ENDED, json.dumps([code, number_from_launcher("TORCHELASTIC_RESTART_COUNT")]))


def earlier_end(store: Store) -> int | None:
    """The exit code with which an earlier attempt ended for good."""
    if not store.check([ENDED]):
        return None
    code, restarts = json.loads(store.get(ENDED))
    # When nodes join, torchrun starts all ranks anew, which it does not count.
    return int(code) if number_from_launcher("TORCHELASTIC_RESTART_COUNT") > restarts else None


def launcher_command() -> str:
    """The command line that has started all ranks on this node, up to the script."""
    try:
        words = Path(f"/proc/{os.getppid()}/cmdline").read_text().split("\0")
        first = next(i for i, word in enumerate(words) if word.endswith(("torchrun", "torch.distributed.run")))
        script = words.index(sys.argv[0], first)
    except (OSError, StopIteration, ValueError):
        return "torchrun … train.py"
    return shlex.join(["torchrun", *words[first + 1 : script + 1]])
