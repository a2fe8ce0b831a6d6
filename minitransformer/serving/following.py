"""Another run is served once it is promoted: it takes over between two requests, and none is dropped."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

from minitransformer.errors import UserError
from minitransformer.runs.promoting import SERVED, served_checkpoint
from minitransformer.serving.models import ServedModel
from minitransformer.serving.service import Service

LOG = logging.getLogger("minitransformer.serving")
EVERY = 1.0
"""seconds between two looks at the records"""


class Follower:
    """Looks whether something was promoted over the runs of `service`, or taken back, and replaces its models.

    Requests that have begun go on with the model that they have found, which is closed when the last of them has ended.
    A run that does not open is said in the log, and what was served before stays.
    """

    def __init__(self, service: Service) -> None:
        self._service = service
        self._stamps = {name: _stamp(served.folder) for name, served in service.models.items()}
        self._retiring: set[asyncio.Task[None]] = set()

    async def follow(self) -> None:
        """Look again and again, until it is cancelled."""
        while True:
            for name, served in list(self._service.models.items()):
                stamp = _stamp(served.folder)
                if stamp != self._stamps[name]:
                    self._stamps[name] = stamp
                    await self._replace(name, served)
            await asyncio.sleep(EVERY)

    async def close(self) -> None:
        """Close the models that were replaced, whose requests have ended."""
        await asyncio.gather(*self._retiring)

    async def _replace(self, name: str, old: ServedModel) -> None:
        try:
            path, checkpoint = served_checkpoint(old.folder)
            new = await asyncio.to_thread(old.reopen)
            await asyncio.to_thread(self._service.models.share, new)
        except UserError as error:
            LOG.error("%s is served as before: %s", name, error)
            return
        except Exception:  # such as too little memory for two models
            LOG.exception("%s is served as before", name)
            return
        self._service.models[new.name] = new
        new.start(asyncio.get_running_loop())
        LOG.info("%s is now %s, %s", name, path, checkpoint or "its best checkpoint")
        retiring = asyncio.create_task(self._retire(old))
        self._retiring.add(retiring)
        retiring.add_done_callback(self._retiring.discard)

    async def _retire(self, old: ServedModel) -> None:
        before = set(self._service.running)
        while before & self._service.running:
            await asyncio.sleep(EVERY / 10)
        await asyncio.to_thread(old.close)


def _stamp(folder: Path) -> tuple[int, int] | None:
    """What changes whenever the record is replaced; None without one."""
    try:
        found = (folder / SERVED).stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_ino
