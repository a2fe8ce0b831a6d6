"""Attention, predictions and residual norms of a model on a text, token by token, as plain data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import singledispatch
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from minitransformer.analysis.look_record import Look, LookRequest, MapPlan, Prediction, Text, watched
from minitransformer.errors import UserError
from minitransformer.generation.classes import Classifier
from minitransformer.generation.config import SamplingConfig
from minitransformer.generation.fill import encode_with_masks
from minitransformer.generation.samples import translations
from minitransformer.models.decoder import DecoderClassifier, DecoderLM
from minitransformer.models.encoder import Encoder, EncoderLM
from minitransformer.models.encoder_decoder import Seq2SeqLM
from minitransformer.models.model import Model
from minitransformer.models.recurrent import RecurrentEncoderDecoder
from minitransformer.text.tokenizers import Tokenizer

MAX_WEIGHTS = 2**24
"""maximum number of attention weights, about 22 MB of HTML"""
GUESSES = 5
ROWS_AT_ONCE = 32


@singledispatch
def look_at(model: Model, request: LookRequest, tokenizer: Tokenizer, target_tokenizer: Tokenizer) -> Look:
    """Run `model` on the text of `request`, and record it.

    Raises `UserError` for a text that the model cannot read, for unknown layers, and for more weights than
    MAX_WEIGHTS.
    """
    raise UserError(f"a model of topology {model.name!r} has no attention to show: choose another run")


@look_at.register
@torch.inference_mode()
def _decoder(model: DecoderLM, request: LookRequest, tokenizer: Tokenizer, target_tokenizer: Tokenizer) -> Look:
    _refuse_target(request, model)
    before = tokenizer.framing.prefix
    room = model.config.context_length - len(before)
    tokens = [*before, *_fitting(tokenizer.encode(request.prompt), request, room)]
    texts = {"text": Text("Text", tokens, tokenizer)}
    plans = [MapPlan("Self-attention", "stack.blocks.{}.attention", "text", "text", model.config.num_layers)]
    _check_size(plans, texts, request, model)
    with watched(model) as seen:
        logits = model(_row(tokens, model))[0]
    places = range(1, len(tokens) + 1)
    return Look(
        texts,
        seen.maps(plans, request),
        "text",
        predictions_of(logits, places, [*tokens[1:], None], tokenizer),
        seen.norms(("stack", "Decoder", "text")),
        [
            "Each token is predicted at the previous position, from all tokens up to there. The first token has no "
            "prediction, and the last row predicts the next token."
        ],
    )


@look_at.register(Encoder)
@look_at.register(DecoderClassifier)
@torch.inference_mode()
def _encoder(
    model: Encoder | DecoderClassifier, request: LookRequest, tokenizer: Tokenizer, target_tokenizer: Tokenizer
) -> Look:
    _refuse_target(request, model)
    framing = tokenizer.label_framing if isinstance(model, Classifier) else tokenizer.masked_framing
    room = model.config.context_length - framing.length
    tokens = framing.around(_fitting(encode_with_masks(tokenizer, request.prompt), request, room))
    texts = {"text": Text("Text", tokens, tokenizer)}
    plans = [MapPlan("Self-attention", "stack.blocks.{}.attention", "text", "text", model.config.num_layers)]
    _check_size(plans, texts, request, model)
    with watched(model) as seen:
        output = _outputs(model)(_row(tokens, model))[0]
    predictions, remark = _encoder_predictions(model, tokens, tokenizer, output)
    norms = seen.norms(("stack", "Encoder" if isinstance(model, Encoder) else "Decoder", "text"))
    return Look(texts, seen.maps(plans, request), "text", predictions, norms, [remark])


def _outputs(model: Encoder | DecoderClassifier) -> Callable[..., Tensor]:
    """The function that computes the logits of the inspected head, or without one the hidden states."""
    return model.token_logits if isinstance(model, EncoderLM) else model


def _encoder_predictions(
    model: Encoder | DecoderClassifier, tokens: Sequence[int], tokenizer: Tokenizer, output: Tensor
) -> tuple[list[Prediction], str]:
    if isinstance(model, Classifier):
        shares = ", ".join(f"{number}: {share:.1%}" for number, share in enumerate(output.softmax(-1).tolist()))
        return [], f"The model predicts a class of the whole text, not tokens. Classes: {shares}."
    if not isinstance(model, EncoderLM):
        return [], "The model embeds the whole text, and predicts nothing."
    hidden = {number for number in tokenizer.special_tokens.values() if number != tokenizer.mask}
    places = [place for place, token in enumerate(tokens) if token not in hidden]
    logits = masked_one_by_one(model, tokens, places, tokenizer.mask)
    targets = [None if tokens[place] == tokenizer.mask else tokens[place] for place in places]
    return predictions_of(logits, places, targets, tokenizer), (
        "Each token is masked alone and predicted from all others; the losses sum to the "
        "pseudo-log-likelihood of Salazar et al. 2020 (arXiv 1910.14659). Maps and norms are those of the unmasked "
        "text. Special tokens and masks in the text have no loss."
    )


def masked_one_by_one(
    model: EncoderLM, tokens: Sequence[int], places: Sequence[int], mask: int
) -> Float[Tensor, "places vocab_size"]:
    """The logits at each of `places` with only that position masked."""
    device = next(model.parameters()).device
    logits = []
    for chunk in torch.tensor(places, dtype=torch.long).split(ROWS_AT_ONCE):
        is_hidden = torch.arange(len(tokens)) == chunk[:, None]
        rows = torch.tensor(tokens).masked_fill(is_hidden, mask)
        logits.append(model.token_logits(rows.to(device), places=is_hidden.to(device)))
    return torch.cat(logits)


@look_at.register(Seq2SeqLM)
@torch.inference_mode()
def _encoder_decoder(
    model: Seq2SeqLM,
    request: LookRequest,
    tokenizer: Tokenizer,
    target_tokenizer: Tokenizer,
) -> Look:
    framing, end = tokenizer.pair_framing, target_tokenizer.pair_framing.suffix[0]
    room = model.config.context_length - framing.length
    source = framing.around(_fitting(tokenizer.encode(_line(request.prompt)), request, room))
    target, remark = _target(model, source, request, target_tokenizer)
    inputs = [target_tokenizer.target_start, *target]
    texts = {"source": Text("Source", source, tokenizer), "target": Text("Target", inputs, target_tokenizer)}
    plans = _plans(model)
    _check_size(plans, texts, request, model)
    with watched(model) as seen:
        logits = model(_row(source, model), _row(inputs, model))[0]
    places = range(1, len(inputs) + 1)
    return Look(
        texts,
        seen.maps(plans, request),
        "target",
        predictions_of(logits, places, [*target, end], target_tokenizer),
        seen.norms(("encoder", "Encoder", "source"), ("decoder", "Decoder", "target")),
        [
            remark,
            "Each target token is predicted at the previous position, which is also its row in the attention maps of "
            "the decoder.",
        ],
    )


def _target(model: Any, source: Sequence[int], request: LookRequest, tokenizer: Tokenizer) -> tuple[Sequence[int], str]:
    """The target tokens after the start token, and a sentence on their origin."""
    # The start token takes one position of the context.
    room = model.config.context_length - 1
    if request.target is not None:
        target = [*tokenizer.framing.prefix, *tokenizer.encode(_line(request.target))]
        if len(target) > room:
            raise UserError(f"the target has {len(target)} tokens, and the model generates at most {room}: shorten it")
        return target, "The target is given (teacher forcing)."
    greedy = SamplingConfig(temperature=0, max_new_tokens=room)
    [[target]] = translations(model, [source], greedy, tokenizer)
    return target, "The target is the model's own output by greedy decoding."


def _plans(model: Seq2SeqLM) -> list[MapPlan]:
    config = model.config
    if isinstance(model, RecurrentEncoderDecoder):
        return [MapPlan("Alignment", "attention", "target", "source", 1)]
    return [
        MapPlan("Encoder", "encoder.blocks.{}.attention", "source", "source", config.num_layers),
        MapPlan("Decoder", "decoder.blocks.{}.attention", "target", "target", config.decoder_layers),
        MapPlan("Decoder to encoder", "decoder.blocks.{}.cross_attention", "target", "source", config.decoder_layers),
    ]


def predictions_of(
    logits: Float[Tensor, "places vocab"], places: Sequence[int], tokens: Sequence[int | None], tokenizer: Tokenizer
) -> list[Prediction]:
    """The predictions at the positions `places`, which hold `tokens`.

    Probabilities are over all logits of the model; guesses are limited to the tokenizer's vocabulary.
    """
    log_p = (logits if logits.dtype == torch.float64 else logits.float()).log_softmax(-1)
    # p log p is 0 for p = 0.
    entropies = torch.special.entr(log_p.exp()).sum(-1).tolist()
    likeliest = log_p[:, : tokenizer.vocab_size].topk(min(GUESSES, tokenizer.vocab_size))
    found = []
    for row, (place, token) in enumerate(zip(places, tokens, strict=True)):
        known = None if token is None else log_p[row, token]
        guesses = zip(likeliest.indices[row].tolist(), likeliest.values[row].exp().tolist(), strict=True)
        found.append(
            Prediction(
                place,
                token,
                probability=None if known is None else known.exp().item(),
                loss=None if known is None else -known.item(),
                entropy=entropies[row],
                guesses=list(guesses),
            )
        )
    return found


def _row(tokens: Sequence[int], model: nn.Module) -> Tensor:
    return torch.tensor([tokens], device=next(model.parameters()).device)


def _line(text: str) -> str:
    """The single line of `text`."""
    lines = text.splitlines()
    if len(lines) != 1:
        raise UserError(f"a text to translate must be one line, not {len(lines)}: give one line")
    return lines[0]


def _refuse_target(request: LookRequest, model: Model) -> None:
    if request.target is not None:
        raise UserError(f"--target needs an encoder-decoder, not topology {model.name!r}: leave it")


def _fitting(tokens: list[int], request: LookRequest, room: int) -> list[int]:
    """The tokens of the prompt to read; raises `UserError` if there are none, or too many."""
    if not tokens:
        raise UserError("the prompt is empty: give --prompt TEXT, or pipe text in")
    kept = tokens if request.last is None else tokens[-request.last :]
    if len(kept) > room:
        raise UserError(
            f"the prompt has {len(kept)} tokens, and the model reads at most {room}: "
            f"shorten it, or keep its end with --last {room}"
        )
    return kept


def _check_size(plans: Sequence[MapPlan], texts: dict[str, Text], request: LookRequest, model: Model) -> None:
    """Raises `UserError` for unknown layers, and for more weights than a page can hold."""
    highest = max(plan.num_layers for plan in plans) - 1
    unknown = [layer for layer in request.layers if not 0 <= layer <= highest]
    if unknown:
        raise UserError(f"there is no layer {unknown[0]}: the layers of this model are 0 to {highest}")
    weights = sum(
        len(request.layers_of(plan.num_layers))
        * model.config.num_heads
        * len(texts[plan.queries].tokens)
        * len(texts[plan.keys].tokens)
        for plan in plans
    )
    if weights > MAX_WEIGHTS:
        raise UserError(
            f"the maps of this text have {weights / 1e6:.1f} million weights, and a page holds "
            f"{MAX_WEIGHTS / 1e6:.1f} million: choose layers with --layers, or fewer tokens with --last"
        )
