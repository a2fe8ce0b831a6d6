"""How a stream is written: the chunks of what is new of each text, as server-sent events."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

from minitransformer.generation.logprobs import TokenLogprob
from minitransformer.serving.texts import GeneratedText


class Choices(Protocol):
    """How one endpoint writes its texts."""

    kind: str
    """"object" of a whole answer"""
    chunk_kind: str

    def whole(self, index: int, text: GeneratedText) -> dict[str, Any]:
        """The choice of a text that has ended."""
        ...

    def begin(self, index: int, text: GeneratedText) -> dict[str, Any] | None:
        """What a stream of a text begins with."""
        ...

    def piece(self, index: int, piece: str, found: Sequence[TokenLogprob], text: GeneratedText) -> dict[str, Any]:
        """More of a text."""
        ...

    def last(self, index: int, text: GeneratedText) -> dict[str, Any]:
        """What a stream of a text ends with."""
        ...


class ChunkWriter:
    """Writes the chunks of `texts`; `about` is what all of them say, which is encoded once."""

    def __init__(
        self, texts: Sequence[GeneratedText], choices: Choices, about: Mapping[str, Any], asks_usage: bool
    ) -> None:
        self._texts, self._choices = texts, choices
        self._before = f'data: {json.dumps(about).removesuffix("}")}, "choices": ['
        self._after = '], "usage": null}\n\n' if asks_usage else "]}\n\n"
        self._open = list(range(len(texts)))
        self._shown, self._told = [0] * len(texts), [0] * len(texts)

    @property
    def complete(self) -> bool:
        """Whether the ends of all texts have been written."""
        return not self._open

    def begin(self) -> str:
        """What streams of these texts begin with."""
        first = (self._choices.begin(index, text) for index, text in enumerate(self._texts))
        return "".join(self._event(choice) for choice in first if choice is not None)

    def more(self) -> str:
        """An event for all that is new of each text, and one for each that has ended."""
        return "".join(map(self._event, self._new()))

    def _new(self) -> Iterator[dict[str, Any]]:
        for index in list(self._open):
            text = self._texts[index]
            finish, whole = text.finish, text.text  # in this order: the text of a finished one is complete
            found = text.record.new[self._told[index] :] if text.record is not None else []
            if len(whole) > self._shown[index] or found:
                yield self._choices.piece(index, whole[self._shown[index] :], found, text)
                self._shown[index], self._told[index] = len(whole), self._told[index] + len(found)
            if finish is not None:
                self._open.remove(index)
                yield self._choices.last(index, text)

    def _event(self, choice: dict[str, Any]) -> str:
        return f"{self._before}{json.dumps(choice)}{self._after}"
