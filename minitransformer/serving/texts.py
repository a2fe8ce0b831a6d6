"""One continuation as it is generated, and all of a request, written by the engine's thread and read by the server."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from minitransformer.generation.config import SamplingConfig
from minitransformer.generation.logprobs import LogprobRecord
from minitransformer.generation.processors import Processor
from minitransformer.generation.sampling import Request
from minitransformer.generation.streaming import TokenStream


@dataclass(eq=False)
class GeneratedText:
    """What follows a prompt: `text` grows, and at the end `finish` says why it ends, "stop" or "length"."""

    prompt: Sequence[int]
    sampling: SamplingConfig
    ends: Sequence[int]
    stream: TokenStream
    generator: torch.Generator
    rules: Sequence[Processor] = ()
    record: LogprobRecord | None = None
    text: str = ""
    finish: str | None = None
    request: Request | None = None
    newest: float = 0.0
    """when its newest token came"""

    @property
    def num_tokens(self) -> int:
        """Number of tokens so far, with the one that ends it."""
        return len(self.request.tokens) if self.request else 0

    def stops(self, token: int) -> bool:
        """Take the next token; whether the text ends with it."""
        self.text += self.stream.feed_tokens(token)
        return self.stream.over

    def end(self) -> None:
        """Take what was held back: there are no more tokens."""
        self.text += self.stream.finish()
        self.finish = "stop" if self.stream.over else "length"


@dataclass(eq=False)
class Generation:
    """The texts of one request. `changed` is set when there is news, of a stream after each step."""

    texts: Sequence[GeneratedText]
    streams: bool
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    error: Exception | None = None
    begun: float = field(default_factory=time.monotonic)

    @property
    def done(self) -> bool:
        """Whether all texts have ended."""
        return all(text.finish for text in self.texts)

    async def news(self) -> None:
        """Wait until there is more than at the last call; raises what has made it fail."""
        await self.changed.wait()
        self.changed.clear()
        if self.error is not None:
            raise self.error
