"""What users send to a served run beside its validation data: how well its model predicts both."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from minitransformer.errors import UserError
from minitransformer.evaluation.drift import TextLosses
from minitransformer.generation.modes import evaluating
from minitransformer.models.decoder import DecoderLM
from minitransformer.runs.evaluating import HeldOutData
from minitransformer.runs.open import Run
from minitransformer.runs.served import ServedAnswer, read_answers
from minitransformer.text.chat_template import Message
from minitransformer.text.datasets.conversation_preparation import PreparedConversations


class UsedText(NamedTuple):
    """The ids of a text, and where in them the part begins that is measured: in a conversation, the last message."""

    ids: Sequence[int]
    first: int


def sent_texts(run: Run, log: Path, most: int, model: str | None) -> list[UsedText]:
    """The latest texts that users have sent, at most so many, each request once.

    Raises `UserError` where there is none of `model`, or where the log is of several models and none is named.
    """
    latest: deque[ServedAnswer] = deque(maxlen=most)
    names: set[str] = set()
    for each in read_answers(log):
        names.add(each.model)
        if model in (None, each.model) and not (latest and _is_same_request(latest[-1], each)):
            latest.append(each)
    if model is None and len(names) > 1:
        raise UserError(f"{log} has requests to {', '.join(sorted(names))}: name one with --model")
    if not latest:
        which = "" if model is None else f" to {model}, only to {', '.join(sorted(names)) or 'none'}"
        raise UserError(f"{log} has no request{which}: give a log of `serve --log`, and a model in it")
    return [_text_of(run, each) for each in latest]


def _is_same_request(before: ServedAnswer, each: ServedAnswer) -> bool:
    """Whether it is one more answer to the same question."""
    return before.id == each.id and before.asked == each.asked


def _text_of(run: Run, sent: ServedAnswer) -> UsedText:
    if sent.prompt is not None:
        return UsedText(run.encode_prompt(sent.prompt), 0)
    template = run.chat_template
    if template is None:
        raise UserError(f"the log has conversations, which {run.path} has not learned: give the log of another run")
    messages: list[Message] = list(sent.messages)
    _, is_answer = template.answer_spans(messages, run.tokenizer)
    return UsedText(template.encode_prompt(messages, run.tokenizer), _after_answers(is_answer))


def _after_answers(is_answer: Sequence[bool]) -> int:
    """The place after the last answer."""
    return 1 + max((place for place, is_one in enumerate(is_answer) if is_one), default=-1)


def validation_texts(data: HeldOutData, most: int) -> list[UsedText]:
    """Texts of validation data like those that users send: messages before an answer, or windows of text.

    Where there are more than `most`, they are drawn at random, and always the same ones.
    """
    prepared, split = data.prepared, data.split
    texts = _messages(prepared, split) if isinstance(prepared, PreparedConversations) else _windows(data)
    chosen = np.random.default_rng(0).permutation(len(texts))[:most]
    return [texts[number] for number in np.sort(chosen).tolist()]


def _messages(prepared: PreparedConversations, split: str) -> list[UsedText]:
    return [
        text for number in range(len(prepared.conversations(split))) for text in _questions(prepared, split, number)
    ]


def _questions(prepared: PreparedConversations, split: str, number: int) -> Iterator[UsedText]:
    """What stands before each answer of a conversation, from the end of the answer before."""
    pairs = prepared.conversations(split)
    ids, flags = pairs.sources[number].tolist(), pairs.targets[number].astype(np.int64)
    edges = np.flatnonzero(np.diff(flags, prepend=0, append=0)).tolist()
    for begin, before in zip(edges[::2], [0, *edges[1::2]], strict=False):
        yield UsedText(ids[:begin], before)


def _windows(data: HeldOutData) -> list[UsedText]:
    ids, window = data.prepared.targets(data.split), data.loader.shape.window
    return [UsedText(ids[begin : begin + window + 1].tolist(), 0) for begin in range(0, len(ids) - 1, window)]


@torch.inference_mode()
def losses_of(model: DecoderLM, texts: Iterable[UsedText], what: str) -> TextLosses:
    """−log p of each measured token of each text after those before it; the first token of a text is not predicted.

    Of a text that is longer than the context, the tokens beyond it are counted in its length alone. Raises `UserError`
    for a model whose logits are not finite.
    """
    device = next(model.parameters()).device
    found: list[tuple[int, list[float]]] = []
    lengths: list[int] = []
    with evaluating(model):
        for text in tqdm(list(texts), desc=what, unit="", leave=False, disable=None):
            lengths.append(len(text.ids) - text.first)
            ids = torch.tensor(text.ids[: model.config.text_length + 1], device=device)
            first = max(text.first, 1)
            found.append((first, _nats(model, ids, first) if first < len(ids) else []))
    if not any(nats for _, nats in found):
        raise UserError(f"no text among the {what} has a token to predict: give longer ones")
    return TextLosses.of_texts(found, lengths)


def _nats(model: DecoderLM, ids: Tensor, first: int) -> list[float]:
    """−log p of each of `ids` from the place `first`."""
    read = torch.cat([ids.new_tensor(model.prefix), ids[:-1]])
    logits = model(read[None])[0, len(model.prefix) + first - 1 :]
    nats = -logits.float().log_softmax(-1).gather(-1, ids[first:, None])[:, 0]
    if not nats.isfinite().all():
        raise UserError("the loss of a text is not finite: the weights have diverged, so choose another run")
    found: list[float] = nats.tolist()
    return found


def check_decoder(run: Run) -> None:
    """Raises `UserError` for a run whose model does not predict the text that it reads."""
    kind = run.config.model.topology
    if kind != "decoder" or run.config.model.num_classes:
        raise UserError(f"{run.path} does not predict what it reads (topology {kind}): drift is of decoders of text")
