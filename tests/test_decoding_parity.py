"""Greedy and beam search write what the `transformers` library writes, token for token."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from minitransformer import pretrained
from minitransformer.generation.config import SamplingConfig
from minitransformer.generation.decode import generate, search_each, translate
from minitransformer.models.decoder import DecoderLM
from tests.members_for_tests import public
from tests.test_pretrained_parity import folder, transformers  # noqa: F401  (fixtures)

START, END, NEW_TOKENS = 2, 7, 10
# What the library calls each of our settings.
NAMES = {
    "num_beams": "num_beams",
    "num_samples": "num_return_sequences",
    "length_penalty": "length_penalty",
    "early_stopping": "early_stopping",
    "no_repeat_ngram": "no_repeat_ngram_size",
    "min_new_tokens": "min_new_tokens",
    "repetition_penalty": "repetition_penalty",
}
SETTINGS: list[dict[str, Any]] = [
    {"num_beams": 1},
    {"num_beams": 4},
    {"num_beams": 4, "length_penalty": 0.6},
    {"num_beams": 3, "length_penalty": 2.0, "no_repeat_ngram": 2},
    {"num_beams": 2, "min_new_tokens": 5, "repetition_penalty": 1.3},
    {"num_beams": 4, "num_samples": 3},
    {"num_beams": 3, "early_stopping": "true", "num_samples": 3},
    {"num_beams": 3, "early_stopping": "never", "length_penalty": 1.5, "num_samples": 2},
    {"num_beams": 3, "early_stopping": "never", "length_penalty": -1.0},
]
THEIR_WORDS = {"true": True, "false": False}


def theirs(
    model: Any, tokens: torch.Tensor, settings: dict[str, Any], ends: Sequence[int] | None = (END,), **options: Any
) -> list[list[int]]:
    """What the library writes after `tokens`, in float64, without its own ideas of how texts begin and end."""
    for name in ("forced_eos_token_id", "forced_bos_token_id", "bad_words_ids"):
        setattr(model.generation_config, name, None)
    renamed = {NAMES[name]: THEIR_WORDS.get(value, value) for name, value in settings.items()}
    # What pads a text that ended is cut: it ends with its first end.
    how = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "eos_token_id": ends and list(ends), "pad_token_id": END}
    found = model.generate(tokens, **how, **renamed, **options)
    prompt = 1 if "decoder_start_token_id" in options else tokens.size(1)
    return [row[prompt:] for row in found.tolist()]


def before_the_end(tokens: list[int]) -> list[int]:
    return tokens[: tokens.index(END)] if END in tokens else tokens


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("name", ["t5 of equal sides", "bart", "marian"])
def test_encoder_decoders_write_what_the_reference_writes(
    name: str,
    settings: dict[str, Any],
    folder: Path,  # noqa: F811
) -> None:
    model, path = public(name, folder)
    ours, _ = pretrained.load(path)
    torch.manual_seed(3)
    source = torch.randint(8, 60, (2, 6))
    expected = [before_the_end(row) for row in theirs(model.double(), source, settings, decoder_start_token_id=START)]
    sampling = SamplingConfig(temperature=0, max_new_tokens=NEW_TOKENS, **settings)
    texts = translate(ours.double(), source.tolist(), sampling, start=START, ends=[END])
    assert [tokens for text in texts for tokens in text] == expected
    model.float()


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("name", ["gpt2", "llama", "mistral", "bloom"])
def test_decoders_write_what_the_reference_writes(
    name: str,
    settings: dict[str, Any],
    folder: Path,  # noqa: F811
) -> None:
    """With a token that ends texts, with several that do come, and with none."""
    model, path = public(name, folder)
    ours = pretrained.load(path)[0].double()
    assert isinstance(ours, DecoderLM)
    sampling = SamplingConfig(temperature=0, max_new_tokens=NEW_TOKENS, **settings)
    prompt = [9, 8, 30, 12]
    likely = [token for [token] in generate(ours, prompt, SamplingConfig(temperature=0, max_new_tokens=NEW_TOKENS))]
    for ends in ([END], [likely[0], likely[3], END], []):
        expected = theirs(model.double(), torch.tensor([prompt]), settings, ends or None)
        if sampling.num_beams == 1:
            found = [[token for [token] in generate(ours, prompt, sampling, ends=ends)]]
        else:
            [found] = search_each(ours, [prompt], sampling, ends=ends)
        assert [up_to_an_end(text, ends) for text in expected] == found
        if likely[0] in ends and (sampling.num_beams == 1 or sampling.early_stopping == "true"):
            assert any(text[-1] in ends for text in found)
    model.float()


def up_to_an_end(tokens: list[int], ends: list[int]) -> list[int]:
    return tokens[: next((place for place, token in enumerate(tokens, start=1) if token in ends), len(tokens))]
