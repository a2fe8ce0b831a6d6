"""The rows of `sample --batch-file`: their prompts, and the file of their answers."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import singledispatch
from pathlib import Path
from typing import Any

from minitransformer.errors import UserError
from minitransformer.generation.config import SamplingConfig
from minitransformer.generation.conversation import ChatFormat
from minitransformer.generation.jsonl_answers import AnswerFile, read_rows, text_field
from minitransformer.generation.samples import translations
from minitransformer.generation.streaming import best_texts, texts_in_batches
from minitransformer.models.decoder import DecoderLM
from minitransformer.models.encoder_decoder import Seq2SeqLM
from minitransformer.models.model import Model
from minitransformer.records import fits, shown
from minitransformer.text.chat_template import ASSISTANT, USER, Message
from minitransformer.text.templates import filled_template, read_template
from minitransformer.text.tokenizers import Tokenizer

MESSAGES, PROMPT = "messages", "prompt"
BATCHES_AT_ONCE = 8
"""of which the answers depend on nothing else, so that a run that goes on writes what an uninterrupted one would"""


@dataclass(frozen=True)
class RowPrompts:
    """Rows of a file, and the ids of the prompt of each."""

    path: Path
    rows: list[dict[str, Any]]
    prompts: list[list[int]]

    @property
    def digest(self) -> str:
        """SHA-256 of the rows and their prompts."""
        return hashlib.sha256(json.dumps([self.rows, self.prompts]).encode()).hexdigest()

    def check_fit(self, context_length: int) -> None:
        """Raises `UserError` for a prompt that is longer than the context, of which a part would be dropped."""
        for number, prompt in enumerate(self.prompts, start=1):
            if len(prompt) > context_length:
                raise UserError(
                    f"{self.path}, row {number} has a prompt of {len(prompt)} tokens, and the model sees "
                    f"{context_length}: shorten it"
                )


def read_prompts(
    path: Path,
    template: Path | None,
    chat: ChatFormat | None,
    system: Sequence[Message],
    encode: Callable[[str], list[int]],
) -> RowPrompts:
    """The rows of the JSONL file at `path`, and the prompt of each.

    It is the field "prompt", or `template` filled with the row's fields. For a `chat` it is what the user says after
    `system`, unless the row has "messages". Raises `UserError` for a row without a prompt.
    """
    rows = read_rows(path)
    source = None if template is None else read_template(template)
    prompts = []
    for number, row in enumerate(rows, start=1):
        where = f"{path}, row {number}"
        if chat is not None and source is None and MESSAGES in row:
            prompts.append(chat.encode(_messages(row[MESSAGES], where)))
            continue
        text = text_field(row, PROMPT, where) if source is None else filled_template(source, row, str(template), where)
        prompts.append(encode(text) if chat is None else chat.encode([*system, Message(USER, text)]))
    return RowPrompts(path, rows, prompts)


def _messages(value: Any, where: str) -> list[Message]:
    """The messages of a row, up to an answer that is wanted."""
    if not isinstance(value, list) or not all(_is_message(each) for each in value) or not value:
        raise UserError(f"{where} has {MESSAGES} {shown(value)}: give a list of objects with texts role and content")
    if value[-1]["role"] == ASSISTANT:
        raise UserError(f"{where} has {MESSAGES} that end with an answer: leave the last one out")
    return [Message(each["role"], each["content"]) for each in value]


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and fits(value.get("role"), str) and fits(value.get("content"), str)


def write_answers(
    found: RowPrompts,
    out: Path,
    request: Mapping[str, Any],
    batch_size: int,
    answers_to: Callable[[Sequence[list[int]], int], Iterator[str]],
) -> int:
    """Write each row with its answer to `out`, in their order; returns how many an earlier process had written.

    `answers_to` gives the answers to several prompts, which begin at a number of the file.
    """
    file = AnswerFile(out, {**request, "rows": found.digest, "batch_size": batch_size}, found.rows)
    size = BATCHES_AT_ONCE * batch_size
    with file.writing() as stream:
        before = file.done
        for begin in range(before // size * size, len(found.rows), size):
            answers = answers_to(found.prompts[begin : begin + size], begin)
            for number, answer in enumerate(answers, start=begin):
                if number >= before:
                    file.add(stream, answer)
    return before


@singledispatch
def generate_answers(
    model: Model,
    tokenizer: Tokenizer,
    sampling: SamplingConfig,
    batch_size: int,
    prompts: Sequence[list[int]],
    begin: int,
) -> Iterator[str]:
    """What `model` generates after each of the prompts, which are those from the number `begin` of a file."""
    raise UserError(f"a model of topology {model.name!r} generates no text: leave --batch-file out")


@generate_answers.register
def _continue_each(
    model: DecoderLM,
    tokenizer: Tokenizer,
    sampling: SamplingConfig,
    batch_size: int,
    prompts: Sequence[list[int]],
    begin: int,
) -> Iterator[str]:
    if sampling.num_beams > 1:
        return (best for best, *_ in best_texts(model, tokenizer, prompts, sampling))
    return texts_in_batches(model, tokenizer, prompts, sampling, batch_size)


@generate_answers.register
def _translate_each(
    model: Seq2SeqLM,
    tokenizer: Tokenizer,
    sampling: SamplingConfig,
    batch_size: int,
    prompts: Sequence[list[int]],
    begin: int,
) -> Iterator[str]:
    for first in range(0, len(prompts), batch_size):
        own = replace(sampling, seed=((sampling.seed or 0) + begin + first) % 2**63)
        for [tokens] in translations(model, prompts[first : first + batch_size], own, tokenizer):
            yield tokenizer.decode(tokens)
