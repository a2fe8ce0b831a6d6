"""Sampling settings published with a checkpoint: from `generation_config.json` to those of `SamplingConfig`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from minitransformer.errors import UserError
from minitransformer.generation.config import SamplingConfig, processor_settings

# What we call each field of which the values mean the same here.
SAME = {
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "no_repeat_ngram_size": "no_repeat_ngram",
    "min_new_tokens": "min_new_tokens",
    "max_new_tokens": "max_new_tokens",
    "num_return_sequences": "num_samples",
    "num_beams": "num_beams",
    "length_penalty": "length_penalty",
}
WHOLE = {"top_k", "no_repeat_ngram_size", "min_new_tokens", "max_new_tokens", "num_return_sequences", "num_beams"}
OFF_AT_ZERO = {"top_k", "no_repeat_ngram_size"}
# Fields that would change what is generated, with the value at which they do not.
NOT_FOLLOWED = {
    "typical_p": 1.0,
    "top_h": None,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "diversity_penalty": 0.0,
    "num_beam_groups": 1,
    "penalty_alpha": None,
    "dola_layers": None,
    "encoder_repetition_penalty": 1.0,
    "encoder_no_repeat_ngram_size": 0,
    "exponential_decay_length_penalty": None,
    "guidance_scale": None,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
    "sequence_bias": None,
    "constraints": None,
    "force_words_ids": None,
}


@dataclass(frozen=True)
class Published:
    """The contents of a `generation_config.json`: `settings` of `SamplingConfig`, and entries that are not followed."""

    settings: dict[str, Any] = field(default_factory=dict)
    not_followed: list[str] = field(default_factory=list)


def published(content: Mapping[str, Any], name: str, *, two_sided: bool) -> Published:
    """The settings in `content`, the file called `name`, for a decoder, or for a model that is `two_sided`.

    Of the other library's defaults for fields that are missing, only the temperature of 1 is taken over. Raises
    `UserError` for a value that its field cannot have.
    """
    try:
        settings = _settings(content)
        settings |= _of_targets(content) if two_sided else _of_continuations(content)
        missing = [field for field, idle in NOT_FOLLOWED.items() if content.get(field) not in (None, [], idle)]
        draws = _flag(content, "do_sample")
        undrawn = _without_drawing(settings)
        if settings.get("num_beams", 1) > 1:
            missing += ["do_sample"] if draws else []
            settings = undrawn
        elif draws:
            settings = {"temperature": 1.0, **settings}
        elif draws is False:
            settings = {**undrawn, "temperature": 0.0}
        SamplingConfig(**settings)
    except (UserError, TypeError, ValueError, OverflowError) as error:
        raise UserError(f"{name}: {error}") from None
    return Published(settings, missing)


def _without_drawing(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Those of `settings` that have an effect without sampling."""
    drawing = {each.name for each in processor_settings(keeps_likeliest=True)}
    return {name: value for name, value in settings.items() if name not in drawing}


def _settings(content: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that mean the same for every topology."""
    numbers = {theirs: _number(content, theirs) for theirs in SAME if content.get(theirs) is not None}
    found = {SAME[theirs]: value for theirs, value in numbers.items() if value or theirs not in OFF_AT_ZERO}
    early = content.get("early_stopping")
    if early is not None:
        if early != "never" and not isinstance(early, bool):
            raise ValueError(f"early_stopping is {early!r}: it must be true, false or 'never'")
        found["early_stopping"] = str(early).lower()
    return found


def _of_targets(content: Mapping[str, Any]) -> dict[str, Any]:
    """Lengths of targets, without their start token, which the file counts."""
    lengths = {"max_length": "max_new_tokens", "min_length": "min_new_tokens"}
    return {
        ours: max(_number(content, theirs, whole=True) - 1, 0)
        for theirs, ours in lengths.items()
        if content.get(theirs) is not None and content.get(ours) is None
    }


def _of_continuations(content: Mapping[str, Any]) -> dict[str, Any]:
    stop = content.get("stop_strings")
    if stop is None:
        return {}
    stop = [stop] if isinstance(stop, str) else stop
    if not isinstance(stop, list) or not all(isinstance(text, str) for text in stop):
        raise ValueError(f"stop_strings is {stop!r}: it must be text, or a list of texts")
    return {"stop": tuple(stop)}


def _number(content: Mapping[str, Any], name: str, *, whole: bool = False) -> Any:
    value = content[name]
    whole |= name in WHOLE
    if isinstance(value, bool) or not isinstance(value, int if whole else int | float) or not math.isfinite(value):
        raise ValueError(f"{name} is {value!r}: it must be a {'whole ' if whole else ''}number")
    return value


def _flag(content: Mapping[str, Any], name: str) -> bool | None:
    value = content.get(name)
    if value is not None and not isinstance(value, bool):
        raise ValueError(f"{name} is {value!r}: it must be true or false")
    return value
