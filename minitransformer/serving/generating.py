"""From the body of a request to the texts that are generated for it, checked against the limits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from minitransformer.errors import UserError, suggestion
from minitransformer.generation.config import SamplingConfig, processor_settings
from minitransformer.generation.logprobs import LogprobRecord
from minitransformer.generation.processors import LogitBias, Processor
from minitransformer.generation.sampling import sample_generators, seeded
from minitransformer.generation.streaming import TokenStream
from minitransformer.records import fits, in_words, shown
from minitransformer.serving.errors import ApiError
from minitransformer.serving.models import ServedModel
from minitransformer.serving.schemas import GenerationBody
from minitransformer.serving.texts import GeneratedText
from minitransformer.text.tokenizers import Tokenizer

ANY_OBJECT: dict[str, Any] = {"type": "object"}
UNSUPPORTED = {
    "best_of": "each text that is generated is returned: ask for n of them, and choose",
    "suffix": "models continue a text, and fill no gap in one: give the prompt alone",
    "tools": "models call none: leave it out, or ask for JSON with response_format",
    "functions": "models call none: leave it out, or ask for JSON with response_format",
}
"""fields of OpenAI's API, and why they are refused"""


def sampling_of_body(served: ServedModel, body: GenerationBody, max_tokens: int | None) -> SamplingConfig:
    """The sampling settings that the body names, and for the others those of `sample`; raises `ApiError`."""
    further = _settings_in(body)
    served.limits.check_new_tokens(max_tokens or 0)
    asked = {
        "max_new_tokens": max_tokens,
        "num_samples": body.n or 1,
        "num_beams": 1,
        "seed": body.seed,
        "stop": body.stops,
        "temperature": body.temperature,
        "top_p": body.top_p,
        **further,
    }
    given = {name: value for name, value in asked.items() if value is not None}
    sampling = SamplingConfig(**{**served.defaults.flat, **given})
    served.limits.check_new_tokens(sampling.max_new_tokens)
    return sampling


def _settings_in(body: GenerationBody) -> dict[str, Any]:
    """The settings of sampling processors in `body`; raises `ApiError` for other fields and types."""
    known = {each.name: each for each in processor_settings()}
    further = {name: value for name, value in (body.model_extra or {}).items() if not _asks_nothing(body, name, value)}
    for name, value in further.items():
        short = name[:60]
        if name in UNSUPPORTED:
            what = f"{name} is not supported, as {UNSUPPORTED[name]}"
            raise ApiError(400, what, param=name, code="unsupported_field")
        if name not in known:
            hint = suggestion(short, [*known, *type(body).model_fields])
            what = f"there is no field {short!r}: {hint}/openapi.json names all"
            raise ApiError(400, what, param=short, code="unknown_field")
        if value is not None and not fits(value, known[name].kind):
            raise ApiError(400, f"{name} is {shown(value)}, and must be {in_words(known[name].kind)}", param=name)
    return further


def _asks_nothing(body: GenerationBody, name: str, value: Any) -> bool:
    """Whether it is a field that is not supported, with a value that changes nothing: clients send such."""
    return name in UNSUPPORTED and (value in (None, "", []) or (name == "best_of" and value == (body.n or 1)))


def texts_after(
    served: ServedModel,
    body: GenerationBody,
    prompt: Sequence[int],
    sampling: SamplingConfig,
    tokenizer: Tokenizer,
    record: LogprobRecord | None,
) -> list[GeneratedText]:
    """The `n` texts that follow `prompt`: those of `sample` with the same seed."""
    return [
        GeneratedText(
            prompt,
            sampling,
            tokenizer.ends,
            TokenStream(tokenizer, sampling.stop),
            generator,
            _rules(served, body, len(prompt)),
            None if record is None else LogprobRecord(record.alternatives, record.of_prompt),
        )
        for generator in sample_generators(body.n or 1, seeded(None, sampling))
    ]


def _rules(served: ServedModel, body: GenerationBody, prompt_length: int) -> Sequence[Processor]:
    rules: list[Processor] = []
    if body.logit_bias:
        vocab_size = served.run.tokenizer.vocab_size
        biases = {int(token): value for token, value in body.logit_bias.items()}
        if max(biases) >= vocab_size:
            raise ApiError(400, f"logit_bias names token {max(biases)}, and there are {vocab_size}", param="logit_bias")
        rules.append(LogitBias(biases))
    wanted = body.response_format
    if wanted is not None and body.wants_json:
        if wanted.type == "json_schema" and wanted.json_schema is None:
            raise ApiError(400, "response_format has no json_schema", param="response_format")
        schema = wanted.json_schema.schema_ if wanted.json_schema is not None else ANY_OBJECT
        rules.append(served.json_grammar.rule(schema, prompt_length))
    return tuple(rules) if rules else ()


def prompt_tokens(served: ServedModel, prompt: str | Sequence[int]) -> list[int]:
    """The tokens of a prompt as `sample` reads them, or those that are given.

    Raises `ApiError` for one that is longer than the context.
    """
    tokenizer = served.run.tokenizer
    if isinstance(prompt, str):
        check_characters(served, len(prompt))
        tokens = served.run.encode_prompt(prompt)
    else:
        tokens = list(prompt)
        if max(tokens) >= tokenizer.vocab_size:
            raise ApiError(
                400, f"there is no token {max(tokens)}: ids are 0 to {tokenizer.vocab_size - 1}", param="prompt"
            )
    return checked_length(served, tokens)


def check_characters(served: ServedModel, count: int) -> None:
    """Raises `ApiError` for a text that is too long whatever its tokens are, before it is encoded."""
    most = served.context_length * max(map(len, served.run.tokenizer.pieces))
    if count > most:
        raise ApiError(
            400,
            f"the text has {count:,} characters, and the model sees {served.context_length:,} tokens: shorten it",
            code="context_length_exceeded",
        )


def checked_length(served: ServedModel, tokens: list[int]) -> list[int]:
    """`tokens`; raises `ApiError` if the model cannot see them all."""
    most = served.context_length
    if len(tokens) > most:
        raise ApiError(
            400,
            f"the prompt has {len(tokens):,} tokens, and the model sees {most:,}: shorten it",
            code="context_length_exceeded",
        )
    return tokens


def check_failures(texts: Sequence[GeneratedText]) -> None:
    """Raises `UserError` if a text has ended because its schema could not be followed."""
    for text in texts:
        for rule in text.rules:
            if failure := getattr(rule, "failure", None):
                raise UserError(f"the JSON schema cannot be followed further ({failure}): give another one")
