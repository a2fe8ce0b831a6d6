"""What was answered: kept for a while so that feedback finds it, and written to a file only if that is asked for."""

from __future__ import annotations

import json
import time
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minitransformer import files
from minitransformer.runs.served import STOPPED
from minitransformer.serving.errors import ApiError
from minitransformer.serving.texts import Generation

MOST_KEPT = 1024
"""answers that feedback can name, the latest ones"""


@dataclass(frozen=True)
class Answered:
    """A request and its answers; `asked` has the prompts, or the messages."""

    id: str
    model: str
    asked: Mapping[str, Any]
    answers: Sequence[Mapping[str, Any]]

    def row(self, index: int) -> dict[str, Any]:
        """One answer with what it answers, as a row of JSONL."""
        own = dict(self.asked)
        if "prompts" in own:
            prompts = own.pop("prompts")
            own["prompt"] = prompts[index * len(prompts) // len(self.answers)]
        return {"id": self.id, "index": index, "model": self.model, **own, **self.answers[index]}


class AnswerJournal:
    """The latest answers, the feedback on them, and if there is a `log`, all requests."""

    def __init__(self, log: Path | None) -> None:
        self._log = log
        self._kept: OrderedDict[str, Answered] = OrderedDict()

    def note(self, id: str, model: str, asked: Mapping[str, Any], generation: Generation) -> None:
        """Keep what was asked and answered."""
        answers = [
            {
                "answer": text.text,
                "finish_reason": text.finish or STOPPED,
                "prompt_tokens": len(text.prompt),
                "completion_tokens": text.num_tokens,
            }
            for text in generation.texts
        ]
        answered = Answered(id, model, asked, answers)
        self._kept[id] = answered
        if len(self._kept) > MOST_KEPT:
            self._kept.popitem(last=False)
        if self._log is not None:
            now = time.time()
            append_rows(self._log, [{**answered.row(index), "time": now} for index in range(len(answers))])

    def find(self, id: str, index: int) -> dict[str, Any]:
        """The row of an answer; raises `ApiError` if it is none of the latest."""
        answered = self._kept.get(id)
        if answered is None or index >= len(answered.answers):
            raise ApiError(404, f"there is no answer {index} to a request {id[:100]!r} among the latest", param="id")
        return answered.row(index)


def append_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Add `rows` to the JSONL file at `path`; raises `StorageError` if it cannot be written."""
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    with files.writing(path, "choose another file"), path.open("ab") as file:
        file.write(lines.encode(errors="replace"))
