"""What is done with a text in one go: its vector, its class, its translation, its tokens."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
from fastapi import APIRouter, Request
from fastapi.responses import Response

from minitransformer.generation.classes import Classifier, classify
from minitransformer.generation.samples import translations
from minitransformer.generation.sampling import seeded
from minitransformer.models.encoder_decoder import Seq2SeqLM
from minitransformer.serving.chat import chat_tokens
from minitransformer.serving.completions import prompts_of
from minitransformer.serving.errors import ApiError, json_response
from minitransformer.serving.generating import check_characters
from minitransformer.serving.logprobs import token_text
from minitransformer.serving.models import ServedModel
from minitransformer.serving.schemas import ClassifyBody, EmbeddingBody, TokenizeBody, TranslateBody
from minitransformer.serving.service import new_id, service_of
from minitransformer.serving.waiting import while_connected
from minitransformer.text.tokenizers import Framing

router = APIRouter()
BATCH_SIZE = 32


@router.post("/v1/embeddings")
async def embed_texts(body: EmbeddingBody, request: Request) -> Response:
    """A vector for each text."""
    service = service_of(request)
    served = service.models.find(body.model)
    work = served.work(partial(_vectors, served, prompts_of(body.input), body.encoding_format))
    vectors, tokens = await while_connected(request.receive, work, service.limits.max_seconds)
    data = [{"object": "embedding", "index": index, "embedding": vector} for index, vector in enumerate(vectors)]
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    return json_response({"object": "list", "data": data, "model": served.name, "usage": usage})


def _vectors(served: ServedModel, inputs: Sequence[str | list[int]], form: str) -> tuple[list[Any], int]:
    embedder = served.embedder
    vocab_size, room = served.run.tokenizer.vocab_size, embedder.room
    rows = []
    for each in inputs:
        if isinstance(each, str):
            check_characters(served, len(each))
            rows.append(embedder.tokens(each))
        elif max(each) >= vocab_size or len(each) > room:
            raise ApiError(400, f"give ids below {vocab_size}, and at most {room} of them", param="input")
        else:
            rows.append(embedder.framing.around(each))
    found = [vector.numpy() for vector in embedder.embeddings_of(rows, BATCH_SIZE)]
    written = [
        base64.b64encode(vector.astype("<f4").tobytes()).decode()
        if form == "base64"
        else [float(str(number)) for number in vector.astype(np.float32)]
        for vector in found
    ]
    return written, sum(map(len, rows))


@router.post("/classify")
async def classify_texts(body: ClassifyBody, request: Request) -> Response:
    """The classes of each text with their probabilities, the likeliest first; of a regression, its value."""
    service = service_of(request)
    served = service.models.find(body.model)
    if not isinstance(served.model, Classifier):
        raise ApiError(400, f"the model {served.name} is no classifier: name one", param="model")
    work = served.work(partial(_classes, served, [str(text) for text in prompts_of(body.input)]))
    found, tokens = await while_connected(request.receive, work, service.limits.max_seconds)
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    return json_response(
        {"id": new_id("classify"), "object": "list", "data": found, "model": served.name, "usage": usage}
    )


def _classes(served: ServedModel, texts: Sequence[str]) -> tuple[list[dict[str, Any]], int]:
    names, model, count = served.run.class_names, served.model, 0
    found: list[dict[str, Any]] = []
    assert isinstance(model, Classifier)
    for index, text in enumerate(texts):
        tokens = _source(served, text, served.run.tokenizer.label_framing)
        values, count = classify(model, tokens), count + len(tokens)
        if len(values) == 1:
            found.append({"index": index, "value": values[0]})
            continue
        ranked = sorted(zip(names, values, strict=True), key=lambda entry: -entry[1])
        classes = [{"label": name, "probability": value} for name, value in ranked]
        found.append({"index": index, "label": ranked[0][0], "classes": classes})
    return found, count


@router.post("/translate")
async def translate_texts(body: TranslateBody, request: Request) -> Response:
    """What each text becomes."""
    service = service_of(request)
    served = service.models.find(body.model)
    if not isinstance(served.model, Seq2SeqLM):
        raise ApiError(400, f"the model {served.name} does not translate: name an encoder-decoder", param="model")
    work = served.work(partial(_translated, served, body))
    found, usage = await while_connected(request.receive, work, service.limits.max_seconds)
    data = [{"index": index, "text": text} for index, text in enumerate(found)]
    return json_response({"id": new_id("trans"), "object": "list", "data": data, "model": served.name, "usage": usage})


def _translated(served: ServedModel, body: TranslateBody) -> tuple[list[str], dict[str, int]]:
    tokenizer, model, defaults = served.run.target_tokenizer, served.model, served.defaults
    assert isinstance(model, Seq2SeqLM)
    asked = {
        "max_new_tokens": body.max_tokens,
        "num_beams": body.num_beams,
        "temperature": body.temperature,
        "seed": body.seed,
        "num_samples": 1,
    }
    sampling = type(defaults)(**{**defaults.flat, **{name: each for name, each in asked.items() if each is not None}})
    served.limits.check_new_tokens(sampling.max_new_tokens)
    sources = [_source(served, str(text), served.run.tokenizer.pair_framing) for text in prompts_of(body.input)]
    generator, found = seeded(None, sampling), []
    for begin in range(0, len(sources), BATCH_SIZE):
        found += translations(model, sources[begin : begin + BATCH_SIZE], replace(sampling), tokenizer, generator)
    before, new = sum(map(len, sources)), sum(len(best) for best, *_ in found)
    usage = {"prompt_tokens": before, "completion_tokens": new, "total_tokens": before + new}
    return [tokenizer.decode(best) for best, *_ in found], usage


def _source(served: ServedModel, text: str, framing: Framing) -> list[int]:
    """The tokens of a text as the model has learned to see it; raises `ApiError` for one that is too long."""
    check_characters(served, len(text))
    tokens = served.run.tokenizer.encode(served.run.cased(text))
    room = served.context_length - framing.length
    if len(tokens) > room:
        raise ApiError(
            400,
            f"a text has {len(tokens)} tokens, and the model sees {room}: shorten it",
            param="input",
            code="context_length_exceeded",
        )
    return framing.around(tokens)


@router.post("/tokenize")
async def tokenize_text(body: TokenizeBody, request: Request) -> Response:
    """The tokens of a prompt or a conversation, and their number."""
    served = service_of(request).models.find(body.model)
    if (body.prompt is None) == (body.messages is None):
        raise ApiError(400, "give either prompt or messages", param="prompt")
    return json_response(await served.work(partial(_tokenized, served, body)))


def _tokenized(served: ServedModel, body: TokenizeBody) -> dict[str, Any]:
    tokenizer = served.run.tokenizer
    if body.messages is not None:
        tokens = chat_tokens(served, body.messages)[1]
    else:
        prompt = body.prompt or ""
        check_characters(served, len(prompt))
        tokens = served.run.encode_prompt(prompt)
    strings = [token_text(tokenizer, token) for token in tokens] if body.return_token_strs else None
    return {"count": len(tokens), "max_model_len": served.context_length, "tokens": tokens, "token_strs": strings}
