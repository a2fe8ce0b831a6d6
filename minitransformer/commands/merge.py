"""`merge`: bake an adapter into its base, or the mean of checkpoints, into a run that needs none of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated

import tyro

from minitransformer.amounts import amount
from minitransformer.commands import DONE, parse, with_exit_code
from minitransformer.errors import UserError
from minitransformer.models.model import Model
from minitransformer.pretrained.originals import inherit_originals
from minitransformer.runs import Run, check_free, only_writer
from minitransformer.runs.averaging import average_model
from minitransformer.runs.begin import check_merges
from minitransformer.training.checkpoint import checkpoints_in


@dataclass(frozen=True)
class Options:
    """Which run to merge, and where to."""

    run: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN")]
    """run folder"""
    out: Annotated[Path, tyro.conf.arg(metavar="TO")]
    """folder of the new run, which must not exist yet"""
    checkpoint: Annotated[str | None, tyro.conf.arg(metavar="NAME")] = None
    """checkpoint of the run; None is the best, or else the latest"""
    average: Annotated[int | None, tyro.conf.arg(metavar="N")] = None
    """take the mean of the weights of the last N checkpoints"""

    def __post_init__(self) -> None:
        if self.average is not None and self.average < 2:
            raise UserError(f"average is {self.average}: give at least 2 checkpoints")
        if self.average is not None and self.checkpoint is not None:
            raise UserError("average takes the last checkpoints: leave out --checkpoint, or --average")


@with_exit_code
def main(arguments: Sequence[str]) -> int:
    """Merge; returns the exit code."""
    about = (
        "Merge the adapter that a run has trained into the weights of its base, or the weights of several checkpoints "
        "into their mean: a run that can be moved alone."
    )
    options = parse(Options, arguments, prog="minitransformer merge", description=about)
    run = Run.open(options.run)
    if run.config.model.adapter.name == "none" and options.average is None:
        raise UserError(f"{options.run} has no adapter, and its checkpoints hold all of its weights: give --average N")
    check_merges(run)
    check_free(options.out)
    model = _merged(run, options)
    with only_writer(options.out):
        Run.create(
            options.out,
            replace(run.config, model=model.config),
            run.tokenizer,
            run.target_tokenizer,
            run.text,
            initial=model,
            add_files=partial(inherit_originals, run.path),
            sources=run.sources,
        )
    print(f"model      {model.config.topology}, {amount(model.num_parameters())} parameters")
    print(f"run        {options.out}")
    return DONE


def _merged(run: Run, options: Options) -> Model:
    if options.average is None:
        return run.load_model(options.checkpoint)
    last = checkpoints_in(run.checkpoints)[-options.average :]
    if len(last) < options.average:
        raise UserError(
            f"{run.path} has {len(last)} checkpoints, not {options.average}: lower --average, or train with --keep-last"
        )
    print(f"mean of    {last[0].name} to {last[-1].name}")
    return average_model(run, last)
