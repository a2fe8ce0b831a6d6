"""Small models to look at, and looks at them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from minitransformer.analysis.look import look_at
from minitransformer.analysis.look_record import Look, LookRequest
from minitransformer.models.config import ModelConfig
from minitransformer.models.model import Model, build_model
from minitransformer.text.tokenizers import MASK, Bytes

TOKENIZER = Bytes().with_special_tokens([MASK])
END = TOKENIZER.end_of_text
PROMPT = "Naïve </script> a\tb"
TOPOLOGIES = ("decoder", "encoder", "encoder-decoder", "rnn")
MakeModel = Callable[..., Model]


def model_maker(shake: Callable[[Model], Model]) -> MakeModel:
    """Makes a model of the given topology and choices, small, in float64 and eval mode, with shaken weights."""

    def make(topology: str, **choices: Any) -> Model:
        sizes: dict[str, Any] = {"d_model": 16, "num_layers": 2, "num_heads": 2, "context_length": 32}
        torch.manual_seed(0)
        config = ModelConfig(topology=topology, vocab_size=TOKENIZER.vocab_size, **{**sizes, **choices})
        return shake(build_model(config)).double().eval()

    return make


def looked(model: Model, prompt: str = PROMPT, **choices: Any) -> Look:
    return look_at(model, LookRequest(prompt, **choices), TOKENIZER, TOKENIZER)
