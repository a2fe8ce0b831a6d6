"""Samples to look at: a text, filled masks, translations."""

from __future__ import annotations

from collections.abc import Sequence
from functools import singledispatch

import torch

from minitransformer.generation.config import SamplingConfig
from minitransformer.generation.decode import generate, translate
from minitransformer.generation.fill import fill_masks
from minitransformer.models.decoder import DecoderLM
from minitransformer.models.encoder import EncoderLM
from minitransformer.models.encoder_decoder import Seq2SeqLM
from minitransformer.models.model import Model
from minitransformer.text.tokenizers import Tokenizer


@singledispatch
def sample_of(
    model: Model,
    tokenizer: Tokenizer,
    target_tokenizer: Tokenizer,
    examples: Sequence[Sequence[int]],
    max_new_tokens: int,
) -> str:
    """A deterministic sample of `model`; `examples` are inputs for models that need them."""
    raise NotImplementedError(f"no sample of {type(model).__name__}")


@sample_of.register
def written(
    model: DecoderLM,
    tokenizer: Tokenizer,
    target_tokenizer: Tokenizer,
    examples: Sequence[Sequence[int]],
    max_new_tokens: int,
) -> str:
    """A text from an empty prompt with the default sampling settings and seed 0."""
    sampling = SamplingConfig(max_new_tokens=max_new_tokens, seed=0)
    prompt = tokenizer.encode_prompt("")
    steps = generate(model, prompt, sampling, ends=tokenizer.ends, vocab_size=tokenizer.vocab_size)
    return tokenizer.decode([token for [token] in steps])


@sample_of.register
def filled(
    model: EncoderLM,
    tokenizer: Tokenizer,
    target_tokenizer: Tokenizer,
    examples: Sequence[Sequence[int]],
    max_new_tokens: int,
) -> str:
    """`filled_text` of each example."""
    return "\n\n".join(filled_text(model, tokenizer, example) for example in examples)


def filled_text(model: EncoderLM, tokenizer: Tokenizer, tokens: Sequence[int], guesses: int = 5) -> str:
    """The text of `tokens` with its masks numbered, and the most likely tokens for each mask."""
    found = fill_masks(model, tokens, tokenizer.mask, guesses=guesses, vocab_size=tokenizer.vocab_size)
    lines = [""]
    begin = number = 0
    for place, token in enumerate([*tokens, tokenizer.mask]):
        if token == tokenizer.mask:
            lines[0] += tokenizer.decode(tokens[begin:place])
            begin = place + 1
            number += 1
            lines[0] += f"[{number}]" if place < len(tokens) else ""
    for number, likeliest in enumerate(found, start=1):
        shown = (
            f"{tokenizer.decode([token], skip_special=False)!r} {probability:.0%}" for token, probability in likeliest
        )
        lines.append(f"[{number}] {', '.join(shown)}")
    return "\n".join(lines)


@sample_of.register(Seq2SeqLM)
def translated(
    model: Seq2SeqLM,
    tokenizer: Tokenizer,
    target_tokenizer: Tokenizer,
    examples: Sequence[Sequence[int]],
    max_new_tokens: int,
) -> str:
    """Each example, and its translation by greedy decoding."""
    targets = translations(
        model, examples, SamplingConfig(temperature=0, max_new_tokens=max_new_tokens), target_tokenizer
    )
    return "\n".join(
        f"{tokenizer.decode(source)}\n  -> {target_tokenizer.decode(target)}"
        for source, [target] in zip(examples, targets, strict=True)
    )


def translations(
    model: Seq2SeqLM,
    sources: Sequence[Sequence[int]],
    sampling: SamplingConfig,
    target_tokenizer: Tokenizer,
    generator: torch.Generator | None = None,
) -> list[list[list[int]]]:
    """`translate`, with the framing of `target_tokenizer`."""
    framing = target_tokenizer.framing
    return translate(
        model,
        sources,
        sampling,
        start=target_tokenizer.target_start,
        ends=target_tokenizer.ends,
        forced_bos=framing.forced_bos,
        forced_eos=framing.forced_eos,
        suppressed=framing.suppressed,
        vocab_size=target_tokenizer.vocab_size,
        generator=generator,
    )
