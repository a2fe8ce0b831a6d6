"""The answers of a run's model to the prompts of its validation conversations, beside those that stand there."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any, NamedTuple, cast

import numpy as np

from minitransformer.generation.config import SamplingConfig
from minitransformer.generation.conversation import ChatFormat
from minitransformer.generation.streaming import texts_in_batches
from minitransformer.models.decoder import DecoderLM
from minitransformer.models.model import Model
from minitransformer.runs.evaluating import HeldOutData
from minitransformer.runs.open import Run
from minitransformer.text.datasets.conversation_preparation import PreparedConversations
from minitransformer.text.token_files import TokenPairs


class Question(NamedTuple):
    """The ids before an answer, the number of its ids, its text, and the number of its conversation."""

    prompt: list[int]
    length: int
    reference: str
    conversation: int


def questions_of(data: HeldOutData) -> list[Question]:
    """Every whole answer in `data`, if it has conversations."""
    prepared, split = data.prepared, data.split
    if not isinstance(prepared, PreparedConversations):
        return []
    numbers = range(len(prepared.conversations(split)))
    return [each for number in numbers for each in _answers(prepared, prepared.conversations(split), number)]


def _answers(prepared: PreparedConversations, pairs: TokenPairs, number: int) -> Iterator[Question]:
    ids, flags = pairs.sources[number].astype(np.int64), pairs.targets[number].astype(np.int64)
    tokenizer, end_of_turn = prepared.tokenizer, prepared.template.end_of_turn or ""
    edges = np.flatnonzero(np.diff(flags, prepend=0, append=0)).tolist()
    ends = set(prepared.template.end_ids(tokenizer))
    for place, (begin, end) in enumerate(pairwise(edges)):
        answer = tokenizer.decode(ids[begin:end].tolist())
        # A text without a question has nothing but a first token before it; a cut answer has no end.
        is_whole = int(ids[end - 1]) in ends or answer.endswith(end_of_turn)
        if place % 2 == 0 and is_whole and begin > len(tokenizer.framing.prefix or (tokenizer.end_of_text,)):
            yield Question(ids[:begin].tolist(), end - begin, answer.removesuffix(end_of_turn), number)


def answers_to(run: Run, model: Model, asked: Sequence[Question], batch_size: int) -> Iterator[str]:
    """What `model` answers to each prompt by greedy decoding, in as many tokens as the longest reference and as fit."""
    template: Any = run.chat_template
    decoder, chat = cast(DecoderLM, model), ChatFormat(template, run.tokenizer)
    most = max(each.length for each in asked)
    sampling = chat.with_stops(SamplingConfig(max_new_tokens=most, temperature=0.0))
    return texts_in_batches(decoder, chat.ending_tokenizer, [each.prompt for each in asked], sampling, batch_size)
