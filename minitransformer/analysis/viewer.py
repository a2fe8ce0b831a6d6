"""The page of a look: one self-contained HTML file."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from minitransformer.analysis.look_record import AttentionMaps, Look, Prediction, Text
from minitransformer.reporting.pages import templates
from minitransformer.text.tokenizers import Tokenizer

LEVELS = 255
DIGITS = 5


def page_of(look: Look, title: str, facts: Mapping[str, str]) -> str:
    """The HTML of `look`, under a title and a few facts about the model."""
    # "<" could end the script element, so it is escaped.
    data = json.dumps({"title": title, "facts": facts, **look_data(look)}, allow_nan=False).replace("<", "\\u003c")
    return templates().get_template("analysis/viewer.html").render(data=data)


def look_data(look: Look) -> dict[str, Any]:
    """`look` as JSON values: tokens as text, weights quantised, numbers rounded to five digits."""
    tokenizer = look.texts[look.predicted].tokenizer
    return {
        "remarks": list(look.remarks),
        "texts": {name: _text_data(text) for name, text in look.texts.items()},
        "maps": [_map_data(maps) for maps in look.maps],
        "predicted": look.predicted,
        "predictions": [_prediction_data(prediction, tokenizer) for prediction in look.predictions],
        "norms": [
            {
                "title": group.title,
                "text": group.text,
                "values": [[_rounded(norm) for norm in state] for state in group.norms.tolist()],
            }
            for group in look.norms
        ],
    }


def _text_data(text: Text) -> dict[str, Any]:
    special = set(text.tokenizer.special_tokens.values())
    return {
        "title": text.title,
        "tokens": [spelled(text.tokenizer, token) for token in text.tokens],
        "special": [place for place, token in enumerate(text.tokens) if token in special],
    }


def _map_data(maps: AttentionMaps) -> dict[str, Any]:
    return {
        "title": maps.title,
        "queries": maps.queries,
        "keys": maps.keys,
        "layers": list(maps.layers),
        "heads": maps.weights.size(1),
        "weights": base64.b64encode(quantise_weights(maps.weights).numpy().tobytes()).decode(),
    }


def _prediction_data(prediction: Prediction, tokenizer: Tokenizer) -> dict[str, Any]:
    return {
        "place": prediction.place,
        "token": None if prediction.token is None else spelled(tokenizer, prediction.token),
        "probability": _rounded(prediction.probability),
        "loss": _rounded(prediction.loss),
        "entropy": _rounded(prediction.entropy),
        "guesses": [[spelled(tokenizer, token), _rounded(share)] for token, share in prediction.guesses],
    }


def _rounded(value: float | None) -> float | None:
    """`value` rounded; None if it is not finite, for JSON."""
    return None if value is None or not math.isfinite(value) else float(f"{value:.{DIGITS}g}")


def quantise_weights(weights: Float[Tensor, "*shape"]) -> UInt8[Tensor, "*shape"]:
    """√w in 255 steps, one byte per weight: the error of w is at most √w / 255, smaller for small weights."""
    return (weights.clamp(0, 1).sqrt() * LEVELS).round().to(torch.uint8)


def restored(levels: UInt8[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """The approximate weights from `quantise_weights`."""
    return (levels.float() / LEVELS) ** 2


def spelled(tokenizer: Tokenizer, token: int) -> str:
    """The text of a token: special tokens by name, others with visible whitespace."""
    for name, number in tokenizer.special_tokens.items():
        if number == token:
            return name
    return visible(tokenizer.token_bytes(token))


def visible(piece: bytes) -> str:
    """`piece` as text with marks for space (␣), line end (↵) and tab (⇥); bytes that are not UTF-8 in hexadecimal."""
    try:
        text = piece.decode()
    except UnicodeDecodeError:
        return f"⟨{piece.hex(' ').upper()}⟩"
    return "".join(map(_visible_character, text)) or "∅"


def _visible_character(character: str) -> str:
    if character in MARKS:
        return MARKS[character]
    return character if character.isprintable() else f"⟨U+{ord(character):04X}⟩"


MARKS = {" ": "␣", "\n": "↵", "\t": "⇥"}
