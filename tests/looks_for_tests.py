"""Small models to look at, and looks at them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from minitransformer.analysis.look import look_at
from minitransformer.analysis.look_record import Look, LookRequest
from minitransformer.models.model import Model
from minitransformer.text.tokenizers import MASK, Bytes

TOKENIZER = Bytes().with_special_tokens([MASK])
END = TOKENIZER.end_of_text
PROMPT = "Naïve </script> a\tb"
TOPOLOGIES = ("decoder", "encoder", "encoder-decoder", "rnn")
MakeModel = Callable[..., Model]


def looked(model: Model, prompt: str = PROMPT, **choices: Any) -> Look:
    return look_at(model, LookRequest(prompt, **choices), TOKENIZER, TOKENIZER)
