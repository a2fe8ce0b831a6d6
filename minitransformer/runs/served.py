"""What a server has taken down of requests: rows of its log, and of the feedback on its answers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minitransformer.errors import UserError
from minitransformer.records import fits, in_words, shown
from minitransformer.text.chat_template import Message
from minitransformer.text.corpora import jsonl_records

FEEDBACK = "feedback.jsonl"
"""in a run's folder: a row of the log with what a user says of the answer"""
RATINGS = ("up", "down")
STOPPED = "stopped"
"""why a text ended whose client went away; it stands for what "stop" and "length" are of others"""
FIELDS: Mapping[str, Any] = {
    "id": str,
    "index": int,
    "model": str,
    "answer": str,
    "finish_reason": str | None,
    "rating": str | None,
    "correction": str | None,
}


@dataclass(frozen=True)
class ServedAnswer:
    """An answer, and what was asked: a `prompt`, or `messages`; of feedback also its rating and correction."""

    id: str
    """of the request"""
    index: int
    model: str
    """the name that the run is served by"""
    answer: str
    finish_reason: str | None
    prompt: str | None
    messages: tuple[Message, ...]
    rating: str | None = None
    correction: str | None = None

    @property
    def asked(self) -> tuple[str | None, tuple[Message, ...]]:
        """What the user has sent."""
        return self.prompt, self.messages


def read_answers(path: Path) -> Iterator[ServedAnswer]:
    """Every row of a log or of feedback, in order; raises `UserError` with the line of another row."""
    if not path.is_file():
        raise UserError(f"{path} is no file: give the .jsonl that the server writes")
    for number, row in jsonl_records(path, lambda size: None):
        yield _answer_in(row, f"{path} line {number}")


def _answer_in(row: Any, where: str) -> ServedAnswer:
    if not isinstance(row, dict) or not {"id", "answer"} <= row.keys():
        raise UserError(f"{where} is no row of a server's log: it needs an id, an answer, and a prompt or messages")
    values = {"index": 0, "model": "", **dict.fromkeys(("finish_reason", "rating", "correction")), **row}
    for name, kind in FIELDS.items():
        if not fits(values[name], kind):
            raise UserError(f"{where} has {name} {shown(values[name])}, which must be {in_words(kind)}")
    if values["rating"] not in (None, *RATINGS):
        raise UserError(f"{where} has rating {shown(values['rating'])}: it must be {' or '.join(RATINGS)}")
    prompt, messages = row.get("prompt"), tuple(_messages(row.get("messages", []), where))
    if not fits(prompt, str | None) or (prompt is None) == (not messages):
        raise UserError(f"{where} must have a prompt, which is a text, or messages, and not both")
    return ServedAnswer(**{name: values[name] for name in FIELDS}, prompt=prompt, messages=messages)


def _messages(value: Any, where: str) -> Iterator[Message]:
    for each in value if isinstance(value, list) else [value]:
        if not isinstance(each, dict) or not all(fits(each.get(name), str) for name in ("role", "content")):
            raise UserError(f"{where} has messages that are no list of objects with a role and a content")
        yield Message(each["role"], each["content"])
