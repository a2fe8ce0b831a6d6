"""`/v1/chat/completions`: the next answer in a conversation."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from minitransformer.generation.conversation import ChatFormat
from minitransformer.generation.logprobs import LogprobRecord, TokenLogprob
from minitransformer.serving.answering import Answering
from minitransformer.serving.errors import ApiError
from minitransformer.serving.generating import check_characters, checked_length, sampling_of_body, texts_after
from minitransformer.serving.logprobs import chat_logprobs
from minitransformer.serving.models import ServedModel
from minitransformer.serving.schemas import ChatBody, ChatMessage
from minitransformer.serving.service import new_id, service_of
from minitransformer.serving.texts import GeneratedText, Generation
from minitransformer.text.chat_template import ASSISTANT, Message
from minitransformer.text.tokenizers import Tokenizer

router = APIRouter()


@router.post("/v1/chat/completions")
async def answer_chat(body: ChatBody, request: Request) -> Response:
    """Answer the last message, `n` times."""
    service = service_of(request)
    served, scheduler = service.models.find_decoder(body.model)
    texts = await asyncio.to_thread(_texts, served, body)
    generation = Generation(texts, streams=bool(body.stream))
    messages = [{"role": message.role, "content": message.text} for message in body.messages]
    return await Answering(
        new_id("chatcmpl"),
        service,
        served,
        scheduler,
        generation,
        ChatChoices(served.run.tokenizer),
        {"messages": messages, "user": body.user},
        body.includes_usage,
    ).respond(request)


def chat_tokens(served: ServedModel, messages: Sequence[ChatMessage]) -> tuple[ChatFormat, list[int]]:
    """How the model's conversations are written, and these messages up to the next answer.

    Raises `ApiError` for a model without conversations, and for one that is longer than the context.
    """
    chat = served.chat
    if chat is None:
        raise ApiError(
            400, f"the model {served.name} has learned no conversations: POST /v1/completions instead", param="model"
        )
    check_characters(served, sum(len(message.text) for message in messages))
    if messages[-1].role == ASSISTANT:
        raise ApiError(400, "the last message is an answer: end with what is to be answered", param="messages")
    return chat, checked_length(served, chat.encode([Message(message.role, message.text) for message in messages]))


def _texts(served: ServedModel, body: ChatBody) -> list[GeneratedText]:
    chat, prompt = chat_tokens(served, body.messages)
    if body.max_tokens is not None and body.max_completion_tokens is not None:
        raise ApiError(400, "max_tokens and max_completion_tokens are one limit: give one of them", param="max_tokens")
    if body.top_logprobs is not None and not body.logprobs:
        raise ApiError(400, "top_logprobs is given without logprobs: give logprobs true", param="top_logprobs")
    asked = body.max_completion_tokens if body.max_tokens is None else body.max_tokens
    room = served.context_length + 1 - len(prompt)  # the last token is generated, and not read
    wanted = served.defaults.max_new_tokens if asked is None else asked
    served.limits.check_new_tokens(wanted)
    sampling = sampling_of_body(served, body, min(wanted, room))
    if not body.wants_json:  # which may spell the end of a turn in a string, and ends by itself
        sampling = chat.with_stops(sampling)
    record = LogprobRecord(body.top_logprobs or 0) if body.logprobs else None
    return texts_after(served, body, prompt, sampling, chat.ending_tokenizer, record)


class ChatChoices:
    """The choices of a chat."""

    kind, chunk_kind = "chat.completion", "chat.completion.chunk"

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def whole(self, index: int, text: GeneratedText) -> dict[str, Any]:
        """The answer as a message."""
        message = {"role": ASSISTANT, "content": text.text, "refusal": None}
        logprobs = None if text.record is None else self._logprobs(text.record.new, text)
        return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": text.finish}

    def begin(self, index: int, text: GeneratedText) -> dict[str, Any] | None:
        """Whose message it is."""
        return self._choice(index, {"role": ASSISTANT, "content": ""}, None, None)

    def piece(self, index: int, piece: str, found: Sequence[TokenLogprob], text: GeneratedText) -> dict[str, Any]:
        """More of the answer."""
        return self._choice(index, {"content": piece}, self._logprobs(found, text), None)

    def last(self, index: int, text: GeneratedText) -> dict[str, Any]:
        """Why it ends."""
        return self._choice(index, {}, None, text.finish)

    def _logprobs(self, found: Sequence[TokenLogprob], text: GeneratedText) -> dict[str, Any] | None:
        return None if text.record is None else chat_logprobs(self._tokenizer, found)

    def _choice(self, index: int, delta: dict[str, str], logprobs: Any, finish: str | None) -> dict[str, Any]:
        return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
