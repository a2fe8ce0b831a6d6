"""`export`: write the model of a run in the format of the transformers library."""

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
from minitransformer.commands import DONE, FAILED, HELP, parse, with_exit_code
from minitransformer.errors import UserError
from minitransformer.models.config import PRESETS, ModelConfig
from minitransformer.models.int8 import Int8Linear
from minitransformer.pretrained.families import Family, Obstacle, families_of, nearest_family
from minitransformer.pretrained.originals import CHAT, original_fields, originals_of
from minitransformer.pretrained.peft_folders import save_adapter
from minitransformer.pretrained.reopened import reference_of, reopened_difference
from minitransformer.pretrained.tokenizer_files import special_ids, target_ids
from minitransformer.runs import Run
from minitransformer.runs.begin import check_merges
from minitransformer.settings import kinds
from minitransformer.text.templates import read_template
from minitransformer.training.checkpoint import load_unmerged

# Relative error of the logits: rounding gives about 1e-5, a wrong epsilon or GELU at least 3e-4.
TOLERANCE = 2e-4

FAMILIES = Doc(f"model family; None is the first that can represent the model: {', '.join(Family.registry)}")


@dataclass(frozen=True)
class Options:
    """Which run to export, where, and in which format."""

    run: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN-FOLDER")]
    """run folder"""
    to: Annotated[Path, tyro.conf.arg(metavar="NEW-FOLDER")]
    """output folder, which must not exist yet"""
    format: Annotated[str | None, tyro.conf.arg(metavar="{None}|FAMILY"), FAMILIES] = None
    adapter: bool = False
    """write the adapter of the run alone, as a folder of the peft library"""
    checkpoint: Annotated[str | None, tyro.conf.arg(metavar="{None}|CHECKPOINT")] = None
    """checkpoint of the run; None is the best, or else the latest"""


@with_exit_code
def main(arguments: Sequence[str]) -> int:
    """Export; returns the exit code."""
    about = _description() if HELP & set(arguments) else ""
    options = parse(Options, arguments, prog="minitransformer export", description=about)
    run = Run.open(options.run)
    if options.adapter:
        return _export_adapter(run, options)
    check_merges(run)
    family = _format(run.config.model.plain, options.format)
    model = run.load_model(options.checkpoint)
    originals = originals_of(run.path, run.tokenizer)
    extra = _extra(run) if originals is None else original_fields(originals)
    own_template = run.path / CHAT
    pretrained.save(
        model,
        options.to,
        family,
        extra,
        tokenizer=run.target_tokenizer,
        originals=originals,
        generation=run.generation_config,
        chat_template=read_template(own_template) if own_template.is_file() else None,
    )
    reference, reader = reference_of(options.to)
    try:
        difference = reopened_difference(model, options.to)
    except UserError as error:
        return _removed(options.to, str(error))
    if not difference <= TOLERANCE:
        return _removed(
            options.to, f"logits of the copy, opened by {reader}, have a relative error of {difference:.1e}"
        )
    what = "hidden states" if run.config.model.topology == "encoder-headless" else "logits"
    by = reader if reference is not None else f"minitransformer alone, as {reader}"
    print(f"format     {family}")
    print(f"folder     {options.to}")
    if originals is not None:
        print("tokenizer  the files that were imported, unchanged")
    print(f"checked    {what} of the copy, opened by {by}, have a relative error of at most {difference:.1e}")
    return DONE


def _export_adapter(run: Run, options: Options) -> int:
    if run.config.model.adapter.name == "none" or run.parent is None:
        raise UserError(f"{options.run} has no adapter: leave --adapter out")
    model = load_unmerged(run.checkpoint(options.checkpoint), run.config)
    save_adapter(model, options.to, _format(run.config.model.plain, options.format), run.parent.path)
    print(f"folder     {options.to}, for the base {run.parent.path}")
    if any(isinstance(part, Int8Linear) for part in model.modules()):
        print("note       it was trained over this base in 8 bits, and peft reads it in full: logits differ a bit")
    return DONE


def _extra(run: Run) -> dict[str, Any]:
    """The special tokens, for config.json."""
    tokenizer = run.target_tokenizer
    found = special_ids(tokenizer)
    if run.config.model.topology == "encoder-decoder":
        found |= target_ids(tokenizer)
    if (template := run.chat_template) is not None:
        ends = list(dict.fromkeys(template.end_ids(tokenizer)))
        found["eos_token_id"] = ends if len(ends) > 1 else ends[0]
    return found


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
        "Export the model of a run to the transformers library, and compare the logits of both.\n\n"
        f"Presets that can be exported without changes: {able}. Imported models, and runs fine-tuned from them, can be "
        "exported to their original family. For other models, the command says which flags of train.py are needed."
    )


def _format(config: ModelConfig, wanted: str | None) -> str:
    """The family to write; raises `UserError` with all obstacles, and the flags of train.py that avoid them."""
    if wanted is None:
        family, obstacles = nearest_family(config)
    else:
        family, obstacles = wanted, Family.named(wanted).obstacles(config)
    if not obstacles:
        return family
    who = (
        "no known format can represent this model; the nearest is"
        if wanted is None
        else "this model cannot be exported as"
    )
    if obstacles[0].setting == "topology":
        raise UserError(f"{who} {family}: {obstacles[0]}")
    flags = " ".join(_flag(obstacle) for obstacle in obstacles)
    why = "; ".join(map(str, obstacles))
    raise UserError(f"{who} {family}: {why}: train a model with {flags}, which {family} can represent")


def _flag(obstacle: Obstacle) -> str:
    """The flag of train.py for the value that the family has."""
    name, value = obstacle.setting.replace("_", "-"), obstacle.choice
    if kinds(ModelConfig)[obstacle.setting] is bool:
        return f"--{name}" if value else f"--no-{name}"
    return f"--{name} {_spelled(value)}"


def _spelled(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
