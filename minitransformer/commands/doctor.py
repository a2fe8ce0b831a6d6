"""`doctor`: what `train` with the same flags would meet, without training."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from minitransformer.commands import DONE, FAILED, with_exit_code
from minitransformer.commands.train import Options as TrainOptions
from minitransformer.commands.train import folder_option, open_parent, parse_run, preset_and_flags, text_option
from minitransformer.errors import UserError
from minitransformer.preflight import Candidate, Finding, findings_of
from minitransformer.registry import lookup
from minitransformer.runs import Run
from minitransformer.runs.begin import with_chat_template
from minitransformer.training.launch import number_from_launcher
from minitransformer.training.presets import PRESETS
from minitransformer.training.ranks import Ranks, joined_ranks, spoken_by_main

ABOUT = "Say whether train.py with the same flags would work, and what it would need, without training."
WIDTH, INDENT = 80, 20


@dataclass(frozen=True)
class Options(TrainOptions):
    """The flags of train.py, and how the findings are printed."""

    json: bool = False
    """print one JSON object"""
    ranks: int | None = None
    """ranks of a run that is planned, of which one is examined; None is those that torchrun has started"""


@spoken_by_main()
@with_exit_code
def main(arguments: Sequence[str]) -> int:
    """Print what is found, under torchrun for all ranks; returns the exit code: 0 if it would train, 1 if not."""
    with joined_ranks() as ranks:
        options, about = _read(arguments, ranks)
        answered = int(ranks.sum(torch.ones(())))
    # The ranks have parted: a rehearsal of one of them is on a process group of its own.
    if not ranks.is_main:
        return DONE
    candidate = Candidate(**about, **_sizes(options.ranks, answered))
    found = list(findings_of(candidate))
    fails = any(finding.status == "problem" for finding in found)
    if options.json:
        print(json.dumps({"trains": not fails, "findings": [finding.to_json() for finding in found]}, indent=2))
    else:
        print(*map(_lines, found), sep="\n")
    return FAILED if fails else DONE


def _read(arguments: Sequence[str], ranks: Ranks) -> tuple[Options, dict[str, Any]]:
    """The command's flags, and the run that they describe, as arguments of `Candidate`."""
    about: dict[str, Any] = {}
    if (resume := folder_option(arguments, "--resume")) is not None:
        about["resumed"] = run = Run.open(resume)
        base = run.config
    elif (initial := text_option(arguments, "--init-from")) is not None:
        about["parent"], base = open_parent(initial, arguments, ranks)
        about["usual"] = base
    else:
        preset, arguments = preset_and_flags(arguments)
        base = lookup("preset", preset, PRESETS)
    prog = "minitransformer doctor [PRESET]"
    options, config = parse_run(Options, arguments, base, ranks, prog=prog, description=ABOUT)
    if "parent" in about:
        config = with_chat_template(config, about["parent"])
    return options, {**about, "config": config, "out": options.out, "checkpoint": options.checkpoint}


def _sizes(planned: int | None, answered: int) -> dict[str, Any]:
    """The numbers of ranks of `Candidate`: those that are `planned`, or those that `answered`."""
    if planned is None:
        here = number_from_launcher("LOCAL_WORLD_SIZE") or 1
        return {"ranks": answered, "answered": answered, "ranks_here": here}
    if planned < 1:
        raise UserError(f"{planned} ranks cannot train: give --ranks 1 or more")
    if answered > 1:
        raise UserError(f"--ranks {planned} is a plan, and torchrun has started {answered} ranks: give one of them")
    return {"ranks": planned, "answered": None}


def _lines(finding: Finding) -> str:
    """A line of a finding, and of its remedy, if any."""
    head = f"{finding.status:8}{finding.topic:12}"
    wrapped = textwrap.wrap(finding.text, WIDTH, initial_indent=head, subsequent_indent=" " * INDENT)
    if finding.remedy:
        arrow = f"{'':{INDENT - 2}}→ "
        wrapped += textwrap.wrap(finding.remedy, WIDTH, initial_indent=arrow, subsequent_indent=" " * INDENT)
    return "\n".join(wrapped)
