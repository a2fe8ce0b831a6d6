"""`merge`: bake an adapter into its base, which becomes a run that needs neither."""

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
from minitransformer.pretrained.originals import inherit_originals
from minitransformer.runs import Run, check_free, only_writer
from minitransformer.runs.begin import check_merges


@dataclass(frozen=True)
class Options:
    """Which run to merge, and where to."""

    run: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN-FOLDER")]
    """run folder of an adapter"""
    out: Annotated[Path, tyro.conf.arg(metavar="FOLDER")]
    """folder of the new run, which must not exist yet"""
    checkpoint: Annotated[str | None, tyro.conf.arg(metavar="NAME")] = None
    """checkpoint of the run; None is the best, or else the latest"""


@with_exit_code
def main(arguments: Sequence[str]) -> int:
    """Merge; returns the exit code."""
    about = "Merge the adapter that a run has trained into the weights of its base: a run that can be moved alone."
    options = parse(Options, arguments, prog="minitransformer merge", description=about)
    run = Run.open(options.run)
    if run.config.model.adapter.name == "none":
        raise UserError(f"{options.run} has no adapter: its checkpoints hold all of its weights already")
    check_merges(run)
    check_free(options.out)
    model = run.load_model(options.checkpoint)
    with only_writer(options.out):
        Run.create(
            options.out,
            replace(run.config, model=model.config),
            run.tokenizer,
            run.target_tokenizer,
            initial=model,
            add_files=partial(inherit_originals, run.path),
        )
    print(f"model      {model.config.topology}, {amount(model.num_parameters())} parameters")
    print(f"run        {options.out}")
    return DONE
