"""`export`: write the model of a run as others open it."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import tyro
from typing_extensions import Doc

from minitransformer import pretrained
from minitransformer.commands import DONE, FAILED, parse, run_command
from minitransformer.errors import UserError
from minitransformer.models.config import PRESETS, ModelConfig
from minitransformer.pretrained.families import Family, Obstacle
from minitransformer.pretrained.formats import families_of, nearest_family
from minitransformer.pretrained.originals import original_fields, originals_of
from minitransformer.pretrained.reopened import reference_of, reopened_difference
from minitransformer.pretrained.tokenizer_files import special_ids, target_ids
from minitransformer.runs import Run
from minitransformer.settings import kinds

# As a share of the logits: rounding costs about 1e-5, the wrong epsilon or GELU at least 3e-4.
TOLERANCE = 2e-4


@dataclass(frozen=True)
class Options:
    """Which run, where to, and as what."""

    run: tyro.conf.Positional[Path]
    """run folder"""
    to: Path
    """folder to write, which must not exist yet"""
    format: Annotated[
        str | None, Doc(f"family of checkpoints; None is the first that can hold it: {', '.join(Family.registry)}")
    ] = None
    checkpoint: str | None = None
    """checkpoint of the run; None is the best, or the latest if none is called that"""


def main(arguments: Sequence[str]) -> int:
    """Export; returns the exit code."""
    return run_command(lambda: _export(arguments))


def _export(arguments: Sequence[str]) -> int:
    about = _description() if {"-h", "--help"} & set(arguments) else ""
    options = parse(Options, arguments, prog="minitransformer export", description=about)
    run = Run.open(options.run)
    family = _format(run.config.model, options.format)
    model = run.load_model(options.checkpoint)
    originals = originals_of(run.path, run.target_tokenizer)
    extra = _extra(run) if originals is None else original_fields(originals)
    tokenizer, generation = run.target_tokenizer, run.generation_config
    pretrained.save(model, options.to, family, extra, tokenizer=tokenizer, originals=originals, generation=generation)
    reference, reader = reference_of(options.to)
    try:
        difference = reopened_difference(model, options.to)
    except UserError as error:
        return _removed(options.to, str(error))
    if not difference <= TOLERANCE:
        return _removed(options.to, f"logits of the copy, opened by {reader}, differ by {difference:.1e} of their size")
    by = reader if reference is not None else f"minitransformer alone, as {reader}"
    print(f"format     {family}")
    print(f"folder     {options.to}")
    if originals is not None:
        print("tokenizer  the files that were imported, unchanged")
    print(f"checked    logits of the copy, opened by {by}, differ by {difference:.1e} of their size at most")
    return DONE


def _extra(run: Run) -> dict[str, Any]:
    """What config.json says of special tokens."""
    targets = target_ids(run.target_tokenizer) if run.config.model.topology == "encoder-decoder" else {}
    return {**special_ids(run.target_tokenizer), **targets}


def _removed(folder: Path, reason: str) -> int:
    shutil.rmtree(folder)
    print(f"error: {reason}: the copy was removed; choose another --format", file=sys.stderr)
    return FAILED


def _description() -> str:
    formats = {
        name: families_of(replace(config, vocab_size=config.vocab_size or 1)) for name, config in PRESETS.items()
    }
    able = "; ".join(f"{name} ({', '.join(families)})" for name, families in formats.items() if families)
    return (
        "Write the model of a run as the transformers library opens it, and compare the logits of both.\n\n"
        f"Of the presets, these can be exported as they are: {able}. Imports, and what was trained from them, can be "
        "exported to the family that they came from. For others, the command says which flags of train.py to give."
    )


def _format(config: ModelConfig, wanted: str | None) -> str:
    """The family to write; raises `UserError` with all that stands in its way, and the flags that go round it."""
    if wanted is None:
        family, obstacles = nearest_family(config)
    else:
        family, obstacles = wanted, Family.named(wanted).obstacles(config)
    if not obstacles:
        return family
    who = "no known format holds this model, and the nearest is" if wanted is None else "this model is none of"
    if obstacles[0].setting == "topology":
        raise UserError(f"{who} {family}: {obstacles[0]}")
    flags = " ".join(_flag(obstacle) for obstacle in obstacles)
    why = "; ".join(map(str, obstacles))
    raise UserError(f"{who} {family}: {why}: train a model with {flags}, which {family} holds")


def _flag(obstacle: Obstacle) -> str:
    """How train.py is told the value that the family holds."""
    name, value = obstacle.setting.replace("_", "-"), obstacle.choice
    if kinds(ModelConfig)[obstacle.setting] is bool:
        return f"--{name}" if value else f"--no-{name}"
    return f"--{name} {_spelled(value)}"


def _spelled(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
