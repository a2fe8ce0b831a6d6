"""Chat templates: how a conversation becomes the text that a model was trained on."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise
from typing import Any, ClassVar

from minitransformer.errors import UserError
from minitransformer.text.templates import render_template
from minitransformer.text.tokenizers import Tokenizer
from minitransformer.text.tokenizers.spelled import MARKS, encode_segments, unused_mark, with_broken_spellings

SYSTEM, USER, ASSISTANT = "system", "user", "assistant"
# What published templates end an answer with: <|im_end|>, </s>, <end_of_turn>, <｜end▁of▁sentence｜>.
CONTROL_TOKEN = re.compile(r"<[^<>\s]{1,40}>")
CHATML = """\
{% for message in messages %}
<|im_start|>{{ message['role'] }}
{{ message['content'] }}<|im_end|>
{% endfor %}
{% if add_generation_prompt %}
<|im_start|>assistant
{% endif %}
"""


@dataclass(frozen=True)
class Message:
    """What one side of a conversation says: `role` is "system", "user", "assistant", or another that a template has."""

    role: str
    content: str


@dataclass(frozen=True)
class ChatTemplate:
    """A Jinja template that writes a conversation as text, as transformers' `apply_chat_template` does.

    It sees `messages`, `add_generation_prompt` and `variables`, and is rendered in a sandbox (`text/templates.py`).
    """

    source: str
    origin: str
    """its file or name, for errors"""
    variables: Mapping[str, str] = field(default_factory=dict)
    """names of special tokens, such as bos_token and eos_token"""
    special_tokens: Mapping[str, int] = field(default_factory=dict)
    """ids of special tokens by the names that its publisher gave them, where the tokenizer has others"""

    built_in: ClassVar[Mapping[str, str]] = {"chatml": CHATML}
    control_tokens: ClassVar[tuple[str, ...]] = ("<|im_start|>", "<|im_end|>")
    """special tokens of the built-in template, which a new tokenizer should have"""

    @classmethod
    def named(cls, name: str) -> ChatTemplate:
        """The built-in template called `name`; raises `UserError` if there is none."""
        if name not in cls.built_in:
            raise UserError(f"there is no chat template {name!r}: choose {', '.join(cls.built_in)}, or give a file")
        return cls(cls.built_in[name], name)

    @classmethod
    def from_jinja(cls, source: str, origin: str, **details: Any) -> ChatTemplate:
        """The template `source`; raises `UserError` if it cannot write a short conversation."""
        template = cls(source, origin, **details)
        template.end_of_turn  # noqa: B018  (it writes one)
        return template

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool = False) -> str:
        """The text of `messages`, with `add_generation_prompt` up to where the assistant's next answer begins.

        Raises `UserError` for a template that fails, and for roles or an order of roles that it refuses.
        """
        variables = {
            **self.variables,
            "messages": [{"role": message.role, "content": message.content} for message in messages],
            "add_generation_prompt": add_generation_prompt,
            "tools": None,
            "documents": None,
        }
        return render_template(self.source, variables, self.origin)

    @cached_property
    def end_of_turn(self) -> str | None:
        """What follows an answer, and ends it; None where nothing does but the end of the text."""
        [mark] = MARKS[:1]
        _, *after = self.render([Message(USER, "?"), Message(ASSISTANT, mark)]).split(mark)
        rest = "".join(after).lstrip()
        known = [name for name in (*self.special_tokens, *self.variables.values()) if name and rest.startswith(name)]
        if known:
            return max(known, key=len)
        found = CONTROL_TOKEN.match(rest)
        return found[0] if found else None

    def answer_spans(self, messages: Sequence[Message], tokenizer: Tokenizer) -> tuple[list[int], list[bool]]:
        """The ids of a conversation, and for each whether the assistant writes it, the end of its turn included.

        An answer begins where the generation prompt ends. What follows the end of a turn, such as a line break, is not
        the assistant's. Nothing is put before or after the template's text, but where nothing in it ends the last
        answer, the end-of-text token does. Special tokens spelled out in a message are ordinary text. Raises
        `UserError` for a template that changes an answer by more than the whitespace around it.
        """
        safe, mark = self._with_ordinary_text(messages, tokenizer)
        text = self.render(safe)
        segments = _cut(text, self._answers(safe, text))
        encoded = encode_segments(tokenizer, segments, self.special_tokens, mark)
        if self.end_of_turn is None and messages[-1].role == ASSISTANT:
            encoded = [*encoded[:-2], [*encoded[-2], tokenizer.end_of_text]]
        is_answer = [bool(number % 2) for number, ids in enumerate(encoded) for _ in ids]
        return [token for ids in encoded for token in ids], is_answer

    def encode_prompt(self, messages: Sequence[Message], tokenizer: Tokenizer) -> list[int]:
        """The ids of a conversation up to the next answer: those of `answer_spans` before it."""
        safe, mark = self._with_ordinary_text(messages, tokenizer)
        prompt, text = self.render(safe, add_generation_prompt=True), self.render(safe)
        try:
            answers = self._answers(safe, text) if prompt.startswith(text) else []
        except UserError:  # earlier answers may be written in another way, as thoughts are left out
            answers = []
        encoded = encode_segments(tokenizer, _cut(prompt, answers), self.special_tokens, mark)
        return [token for ids in encoded for token in ids]

    def end_ids(self, tokenizer: Tokenizer) -> tuple[int, ...]:
        """The ids that end an answer: those that end a text, and `end_of_turn` if it is a token."""
        known = {**tokenizer.special_tokens, **self.special_tokens}
        return (*tokenizer.ends, *(known[name] for name in (self.end_of_turn,) if name in known))

    def _with_ordinary_text(self, messages: Sequence[Message], tokenizer: Tokenizer) -> tuple[list[Message], str]:
        """The messages with a mark in each special token that is spelled out in them, and the mark."""
        mark = unused_mark(message.content for message in messages)
        names = [*tokenizer.special_tokens, *self.special_tokens]
        broken = [with_broken_spellings(message.content, names, mark) for message in messages]
        return [replace(message, content=content) for message, content in zip(messages, broken, strict=True)], mark

    def _answers(self, messages: Sequence[Message], text: str) -> list[tuple[int, int]]:
        """Where the answers begin and end in `text`, which is the rendering of `messages`.

        A rendering with a placeholder for each answer shows what stands between them: with the answers in their places
        it must give `text`.
        """
        numbers = [number for number, message in enumerate(messages) if message.role == ASSISTANT]
        mark = unused_mark([text])
        marked = [replace(one, content=mark) if one.role == ASSISTANT else one for one in messages]
        between = self.render(marked).split(mark)
        contents = next(
            (
                trimmed
                for trim in (str, str.strip, str.lstrip, str.rstrip)
                if _woven(between, trimmed := [trim(messages[number].content) for number in numbers]) == text
            ),
            None,
        )
        if contents is None:
            raise UserError(
                f"the template {self.origin} does not write every answer as it is, so its tokens cannot be told from "
                "others: use another template, or conversations with one answer"
            )
        spans, end = [], 0
        for number, before, content, after in zip(numbers, between, contents, between[1:], strict=False):
            begin = end + len(before)
            end = begin + len(content)
            prompt = self.render(messages[:number], add_generation_prompt=True) if number else ""
            begins = len(prompt) if number and len(prompt) <= begin and text.startswith(prompt) else begin
            spans.append((begins, end + self._length_of_end(after)))
        return spans

    def _length_of_end(self, after: str) -> int:
        """How many characters of what follows an answer are the end of the turn."""
        rest = after.lstrip()
        is_end = self.end_of_turn is not None and rest.startswith(self.end_of_turn)
        return len(after) - len(rest) + len(self.end_of_turn or "") if is_end else 0


def is_template(text: str) -> bool:
    """Whether `text` is the source of a Jinja template, and not a name."""
    return "{{" in text or "{%" in text


def usual_names(tokenizer: Tokenizer) -> dict[str, str]:
    """The variables of a template for `tokenizer`, where none were published: the tokens around a text."""
    names = {number: name for name, number in tokenizer.special_tokens.items()}
    end = names[tokenizer.end_of_text]
    return {"bos_token": names.get(next(iter(tokenizer.framing.prefix), tokenizer.end_of_text), end), "eos_token": end}


def _woven(between: Sequence[str], contents: Sequence[str]) -> str | None:
    """What stands `between` the `contents`, with them; None unless there is a place for each."""
    if len(between) != len(contents) + 1:
        return None
    return between[0] + "".join(content + after for content, after in zip(contents, between[1:], strict=True))


def _cut(text: str, spans: Sequence[tuple[int, int]]) -> list[str]:
    """`text` in an odd number of segments: those with an odd number are the `spans`."""
    edges = [0, *(edge for span in spans for edge in span), len(text)]
    return [text[begin:end] for begin, end in pairwise(edges)]
