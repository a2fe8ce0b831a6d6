"""What one client may take from the others: each limit with the status of a request beyond it."""

from __future__ import annotations

from dataclasses import dataclass

from minitransformer.serving.errors import ApiError

MOST_INPUTS = 2048
"""texts in one request, as in OpenAI's API"""


@dataclass(frozen=True)
class ServingLimits:
    """How large requests may be, how many may wait, and for how long."""

    max_tokens: int = 4096
    max_queue: int = 256
    max_body: int = 4 << 20
    """bytes"""
    max_seconds: float = 600.0
    body_seconds: float = 30.0
    """until a body has arrived"""
    header_seconds: float = 10.0
    """until the headers of a request have arrived"""
    read_seconds: float = 30.0
    """in which nothing that waits to be sent could be, as the client reads nothing"""
    max_connections: int = 512

    def check_new_tokens(self, count: int) -> None:
        """Raises `ApiError` for more new tokens than one text may have."""
        if count > self.max_tokens:
            raise ApiError(
                400, f"max_tokens is {count}, and this server gives at most {self.max_tokens}", param="max_tokens"
            )

    def check_waiting(self, waiting: int, more: int, room: int) -> None:
        """Raises `ApiError` if `more` texts do not fit beside those that wait and are decoded, in `room` rows."""
        most = room + self.max_queue
        if more > most:
            raise ApiError(400, f"the request asks for {more} texts, and this server takes at most {most} at a time")
        if waiting + more > most:
            raise ApiError(
                429,
                f"the cache is full: {room} texts are decoded, and {waiting - room} wait: try again later",
                code="queue_full",
                headers={"Retry-After": "1"},
            )
