"""`/v1/completions`: what follows a prompt."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from minitransformer.generation.logprobs import LogprobRecord, TokenLogprob
from minitransformer.serving.answering import Answering
from minitransformer.serving.errors import ApiError
from minitransformer.serving.generating import prompt_tokens, sampling_of_body, texts_after
from minitransformer.serving.logprobs import completion_logprobs
from minitransformer.serving.models import ServedModel
from minitransformer.serving.schemas import CompletionBody
from minitransformer.serving.service import new_id, service_of
from minitransformer.serving.texts import GeneratedText, Generation
from minitransformer.text.tokenizers import Tokenizer

router = APIRouter()


@router.post("/v1/completions")
async def complete(body: CompletionBody, request: Request) -> Response:
    """Continue each prompt, `n` times."""
    service = service_of(request)
    served, scheduler = service.models.find_decoder(body.model)
    prompts = prompts_of(body.prompt)
    texts = await asyncio.to_thread(_texts, served, body, prompts)
    generation = Generation(texts, streams=bool(body.stream))
    choices = CompletionChoices(served.run.tokenizer, [one for one in prompts for _ in range(body.n or 1)], body)
    return await Answering(
        new_id("cmpl"),
        service,
        served,
        scheduler,
        generation,
        choices,
        {"prompts": [_as_text(served.run.tokenizer, prompt) for prompt in prompts], "user": body.user},
        body.includes_usage,
    ).respond(request)


def prompts_of(given: Any) -> list[str | list[int]]:
    """The prompts of a request, which may have one or several, as texts or as tokens."""
    return [given] if isinstance(given, str) or isinstance(given[0], int) else list(given)


def _texts(served: ServedModel, body: CompletionBody, prompts: Sequence[str | list[int]]) -> list[GeneratedText]:
    if body.max_tokens == 0 and not body.echo:
        raise ApiError(400, "max_tokens is 0, which gives no text: ask for more, or give echo", param="max_tokens")
    # A text has one token at least: of a request for none it is left out.
    sampling = sampling_of_body(served, body, max(body.max_tokens, 1) if body.max_tokens is not None else None)
    record = None if body.logprobs is None else LogprobRecord(body.logprobs, bool(body.echo))
    return [
        text
        for prompt in prompts
        for text in texts_after(served, body, prompt_tokens(served, prompt), sampling, served.run.tokenizer, record)
    ]


def _as_text(tokenizer: Tokenizer, prompt: str | list[int]) -> str:
    return prompt if isinstance(prompt, str) else tokenizer.decode(prompt)


class CompletionChoices:
    """The choices of a completion."""

    kind = chunk_kind = "text_completion"

    def __init__(self, tokenizer: Tokenizer, prompts: Sequence[str | list[int]], body: CompletionBody) -> None:
        self._tokenizer, self._prompts, self._body = tokenizer, prompts, body
        self._offsets: dict[GeneratedText, int] = {}
        """the characters of each text whose log-probabilities have been told"""

    def whole(self, index: int, text: GeneratedText) -> dict[str, Any]:
        """The text, after its prompt if that is to be echoed."""
        none = self._body.max_tokens == 0
        found = [] if none or text.record is None else text.record.new
        return self._choice(
            index, self._echo(index) + ("" if none else text.text), self._logprobs(text, found), text.finish
        )

    def begin(self, index: int, text: GeneratedText) -> dict[str, Any] | None:
        """The echo of the prompt; its log-probabilities come with the first token."""
        return self._choice(index, self._echo(index), None, None) if self._body.echo else None

    def piece(self, index: int, piece: str, found: Sequence[TokenLogprob], text: GeneratedText) -> dict[str, Any]:
        """More text."""
        if self._body.max_tokens == 0:
            piece, found = "", []
        return self._choice(index, piece, self._logprobs(text, found), None)

    def last(self, index: int, text: GeneratedText) -> dict[str, Any]:
        """Why it ends."""
        return self._choice(index, "", None, text.finish)

    def _echo(self, index: int) -> str:
        return _as_text(self._tokenizer, self._prompts[index]) if self._body.echo else ""

    def _logprobs(self, text: GeneratedText, found: Sequence[TokenLogprob]) -> dict[str, Any] | None:
        """Of the tokens in `found`, and before them those of an echoed prompt, which are told once."""
        record = text.record
        if record is None:
            return None
        begins = record.of_prompt and text not in self._offsets
        prompt, first = (record.prompt, text.prompt[0]) if begins else ([], None)
        offset = self._offsets.get(text, 0)
        written, self._offsets[text] = completion_logprobs(self._tokenizer, first, [*prompt, *found], offset)
        return written

    def _choice(self, index: int, text: str, logprobs: Any, finish: str | None) -> dict[str, Any]:
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish}
