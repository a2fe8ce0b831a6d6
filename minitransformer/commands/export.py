"""`export`: write the model of a run as others open it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import tyro
from torch import Tensor

from minitransformer import pretrained
from minitransformer.commands import DONE, parse, run_command
from minitransformer.errors import UserError
from minitransformer.models.config import choice
from minitransformer.models.encoder import EncoderLM
from minitransformer.models.model import Model
from minitransformer.pretrained.families import Family
from minitransformer.pretrained.tokenizers import special_ids, target_ids
from minitransformer.runs import Run

LENGTH = 16


@dataclass(frozen=True)
class Options:
    """Which run, where to, and as what."""

    run: tyro.conf.Positional[Path]
    """run folder"""
    to: Path
    """folder to write, which must not exist yet"""
    format: Annotated[
        str | None, choice("family of checkpoints; None is the first that can hold it", Family.registry)
    ] = None
    checkpoint: str | None = None
    """checkpoint of the run; None is the best, or the latest if none is called that"""


def main(arguments: Sequence[str]) -> int:
    """Export; returns the exit code."""
    return run_command(lambda: _export(arguments))


def _export(arguments: Sequence[str]) -> int:
    about = "Write the model of a run as the transformers library opens it."
    options = parse(Options, arguments, prog="minitransformer export", description=about)
    run = Run.open(options.run)
    model = run.load_model(options.checkpoint)
    family = options.format or _first_that_fits(model)
    extra = special_ids(run.target_tokenizer)
    if model.config.topology == "encoder-decoder":
        extra |= target_ids(run.target_tokenizer)
    generation = run.generation_config
    pretrained.save(model, options.to, family, extra, tokenizer=run.target_tokenizer, generation=generation)
    difference = _largest_difference(model, options.to)
    print(f"format     {family}")
    print(f"folder     {options.to}")
    print(f"checked    logits of the re-opened copy differ by {difference:.1e} at most")
    return DONE


def _first_that_fits(model: Model) -> str:
    refusals = []
    topology = model.config.topology
    candidates = {name: family for name, family in Family.registry.items() if topology in family.architectures}
    for name, family in candidates.items():
        try:
            family.hf_config(model.config)
        except UserError as error:
            refusals.append(str(error))
        else:
            return name
    why = f"; for one, {refusals[0]}" if refusals else f": none is for topology {topology!r}"
    raise UserError(f"no known format can hold this model{why}")


@torch.inference_mode()
def _largest_difference(model: Model, folder: Path) -> float:
    """Between the logits of `model` and those of the copy in `folder`, on random tokens."""
    copy, _ = pretrained.load(folder)
    assert model.config.vocab_size is not None
    tokens = torch.randint(
        model.config.vocab_size,
        (2, min(LENGTH, model.config.context_length)),
        generator=torch.Generator().manual_seed(0),
    )
    inputs = (tokens, tokens) if model.config.topology == "encoder-decoder" else (tokens,)
    logits, again = (_logits(of)(*inputs) for of in (model, copy))
    return float((logits - again).abs().max())


def _logits(model: Model) -> Callable[..., Tensor]:
    """What gives the logits of `model`: of tokens, where it has another head as well."""
    return model.token_logits if isinstance(model, EncoderLM) else model
