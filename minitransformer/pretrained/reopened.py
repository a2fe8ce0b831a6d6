"""Verify a written checkpoint by opening it again, with the `transformers` library if installed."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from minitransformer.errors import UserError
from minitransformer.models.encoder import EncoderLM
from minitransformer.models.model import Model
from minitransformer.pretrained.checkpoint import CONFIG, load
from minitransformer.pretrained.shards import read_checkpoint_json

LENGTH = 16
OUTPUTS = ("prediction_logits", "logits", "last_hidden_state")
"""outputs of the library's models that are compared, the first that a model has"""


def reference_of(folder: Path) -> tuple[type[nn.Module] | None, str]:
    """The `transformers` class for a folder, and the library's version; or None, and why."""
    [architecture] = read_checkpoint_json(folder / CONFIG)["architectures"]
    try:
        import transformers

        return getattr(transformers, architecture), f"transformers {transformers.__version__}"
    except (AttributeError, ImportError, RuntimeError) as error:
        missing = isinstance(error, ModuleNotFoundError) and error.name == "transformers"
        return None, "transformers is not installed" if missing else f"transformers has no {architecture}"


@torch.inference_mode()
def reopened_difference(model: Model, folder: Path) -> float:
    """The largest difference between outputs of `model` and of its copy in `folder`, on random tokens.

    It is relative to their root mean square, in float32. Raises `UserError` if the copy cannot be opened.
    """
    reference, _ = reference_of(folder)
    tokens = _tokens(model, read_checkpoint_json(folder / CONFIG).get("pad_token_id"))
    inputs = (tokens, tokens) if model.config.topology == "encoder-decoder" else (tokens,)
    logits = _logits_of(model.float().eval())(*inputs)
    copied = _logits_of(load(folder)[0])(*inputs) if reference is None else _reference_logits(reference, folder, inputs)
    return float((logits - copied).abs().max() / copied.square().mean().sqrt().clamp(min=torch.finfo().tiny))


def _tokens(model: Model, padding: int | None) -> Tensor:
    """Two random texts without padding ids, which some of the library's models mask."""
    size = model.config.vocab_size
    assert size is not None
    shape = (2, min(LENGTH, model.config.context_length))
    tokens = torch.randint(size, shape, generator=torch.Generator().manual_seed(0))
    return tokens if padding is None else torch.where(tokens == padding, (tokens + 1) % size, tokens)


def _logits_of(model: Model) -> Callable[..., Tensor]:
    """The function that computes the logits of `model`, of tokens if it has several heads, or its hidden states."""
    return model.token_logits if isinstance(model, EncoderLM) else model


def _reference_logits(reference: Any, folder: Path, inputs: tuple[Tensor, ...]) -> Tensor:
    names = ("input_ids", "decoder_input_ids")
    try:
        with _quiet():
            copy = reference.from_pretrained(folder, local_files_only=True).float().eval()
            output = copy(**dict(zip(names, inputs, strict=False)))
    except Exception as error:  # of the library, of its checks, of torch
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"transformers cannot open the copy in {folder} ({reason})") from None
    logits: Tensor = next(output[name] for name in OUTPUTS if name in output)
    return logits


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppress the library's warnings and progress bars."""
    from transformers.utils import logging as theirs

    level, bar = theirs.get_verbosity(), theirs.is_progress_bar_enabled()
    theirs.set_verbosity(logging.ERROR)
    theirs.disable_progress_bar()
    try:
        yield
    finally:
        theirs.set_verbosity(level)
        if bar:
            theirs.enable_progress_bar()
