"""Instruction data: conversations in the field's four shapes of JSONL, from files and recipes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minitransformer.errors import UserError
from minitransformer.text import recipes
from minitransformer.text.chat_template import ASSISTANT, USER, Message
from minitransformer.text.columns import column_values
from minitransformer.text.corpora import LINES, Files, jsonl_records, kind, named, no_such_data, visible_files
from minitransformer.text.tables import text_of

MESSAGES, GROUP = "messages", "group"
SINGLE = (("prompt", "completion"), ("source", "target"))
"""fields of a question and its answer"""


@dataclass(frozen=True)
class ConversationRow:
    """`messages`, or a `text` of which all is learned; those of one `group` are all in one split."""

    messages: tuple[Message, ...] = ()
    text: str = ""
    group: str = ""

    @property
    def contents(self) -> tuple[str, ...]:
        """What is said, without roles."""
        return tuple(message.content for message in self.messages) or (self.text,)

    @property
    def parts(self) -> tuple[str, ...]:
        """All that it consists of, by which conversations differ."""
        return (*(part for each in self.messages for part in (each.role, each.content)), self.text, self.group)


@dataclass(frozen=True)
class ConversationCorpus(Files):
    """JSONL files of conversations; a row without another shape has its text in `field`."""

    field: str = "text"

    def pairs(self, on_read: Callable[[int], object] = lambda count: None) -> Iterator[ConversationRow]:
        """Every conversation, in order.

        `on_read` is called with the number of bytes read since its last call. Raises `UserError` with the line of a
        row that is no conversation, or has no answer.
        """
        for path in self.files:
            for number, row in jsonl_records(path, on_read):
                yield conversation_of(row, self.field, path, number)

    def column(self, name: str) -> Iterator[str]:
        """The value of every row in column `name`."""
        return (value for path in self.files for value in column_values(path, name))


def conversation_of(row: Any, field: str, path: Path, number: int) -> ConversationRow:
    """The conversation in a row: {"messages"}, {"prompt", "completion"}, {"source", "target"} or {"text"}.

    Raises `UserError` with its line for another row, and for one without an answer.
    """
    if not isinstance(row, dict):
        raise UserError(f"{path} line {number} is not an object: give messages, a prompt and its completion, or a text")
    group = text_of(row, GROUP, path, "line", number) if GROUP in row else ""
    shape = next((names for names in SINGLE if names[0] in row), None)
    if MESSAGES in row:
        found = ConversationRow(tuple(_messages(row[MESSAGES], path, number)), group=group)
    elif shape is not None:
        question, answer = (text_of(row, name, path, "line", number) if name in row else "" for name in shape)
        found = ConversationRow((Message(USER, question), Message(ASSISTANT, answer)), group=group)
    elif field in row:
        found = ConversationRow(text=text_of(row, field, path, "line", number), group=group)
    else:
        raise UserError(
            f"{path} line {number} has {', '.join(map(repr, row)) or 'no field'}: give messages, a prompt and its "
            f"completion, a source and its target, or a {field}"
        )
    if not any(answer.strip() for answer in _answers(found)):
        raise UserError(f"{path} line {number} has no answer to learn from: give it one, or leave the row out")
    return found


def _answers(conversation: ConversationRow) -> list[str]:
    return [each.content for each in conversation.messages if each.role == ASSISTANT] or [conversation.text]


def _messages(value: Any, path: Path, number: int) -> Iterator[Message]:
    if not isinstance(value, list):
        raise UserError(f"{path} line {number} has {MESSAGES} that are no list: give objects with a role and a content")
    for each in value:
        role, content = (text_of(each, name, path, f"{MESSAGES} of line", number) for name in ("role", "content"))
        yield Message(role, content)


def open_conversations(data: str | Sequence[str], *, field: str = "text") -> ConversationCorpus:
    """The conversations of `data`: .jsonl files, folders of them, or recipes; raises `UserError` for other data."""
    names = [data] if isinstance(data, str) else list(data)
    files = tuple(path for name in names for path in _files(name))
    corpus = ConversationCorpus(named(data), files, field)
    if next(corpus.pairs(), None) is None:
        raise UserError(f"{named(data)} has no conversation: put a JSON object for each in a line of its own")
    return corpus


def _files(name: str) -> list[Path]:
    path = Path(name).expanduser()
    if name in recipes.known():
        return [recipes.make(name)]
    if not path.exists():
        raise UserError(no_such_data(name))
    files = [path] if path.is_file() else list(visible_files(path))
    if others := [file for file in files if kind(file) not in LINES]:
        raise UserError(f"{others[0]} is no .jsonl, in which conversations are: write them there, one object a line")
    return files


def checked_names(variables: Sequence[str], tokens: Sequence[str]) -> tuple[Mapping[str, str], Mapping[str, int]]:
    """What a template calls special tokens: `variables` as eos_token=</s>, and ids of `tokens` as </s>=2."""
    for each in (*variables, *(each for each in tokens if not each.rpartition("=")[2].isdecimal())):
        if each in tokens or "=" not in each:
            form = "</s>=2" if each in tokens else "eos_token=</s>"
            raise UserError(f"{each!r} does not say what the chat template calls a token: write it as {form}")
    named_texts = (each.partition("=") for each in variables)
    named_ids = (each.rpartition("=") for each in tokens)
    return {name: text for name, _, text in named_texts}, {name: int(number) for name, _, number in named_ids}
