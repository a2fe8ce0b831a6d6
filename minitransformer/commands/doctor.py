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
from minitransformer.commands.train import folder_option, open_parent, parse_run, preset_and_flags
from minitransformer.preflight import Candidate, Finding, findings_of
from minitransformer.registry import lookup
from minitransformer.runs import Run
from minitransformer.training.presets import PRESETS
from minitransformer.training.ranks import Ranks, joined_ranks, spoken_by_main

ABOUT = "Say whether train.py with the same flags would work, and what it would need, without training."
WIDTH, INDENT = 80, 20


@dataclass(frozen=True)
class Options(TrainOptions):
    """The flags of train.py, and how the findings are printed."""

    json: bool = False
    """print one JSON object"""


@spoken_by_main()
@with_exit_code
def main(arguments: Sequence[str]) -> int:
    """Print what is found, under torchrun for all ranks; returns the exit code: 0 if it would train, 1 if not."""
    with joined_ranks() as ranks:
        options, about = _read(arguments, ranks)
        answered = int(ranks.sum(torch.ones(())))
        candidate = Candidate(**about, ranks=ranks.size, answered=answered)
        found = ranks.from_main(lambda: list(findings_of(candidate)))
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
    elif (initial := folder_option(arguments, "--init-from")) is not None:
        about["parent"], base = open_parent(initial, arguments)
        about["usual"] = base
    else:
        preset, arguments = preset_and_flags(arguments)
        base = lookup("preset", preset, PRESETS)
    prog = "minitransformer doctor [PRESET]"
    options, config = parse_run(Options, arguments, base, ranks, prog=prog, description=ABOUT)
    return options, {**about, "config": config, "out": options.out, "checkpoint": options.checkpoint}


def _lines(finding: Finding) -> str:
    """A line of a finding, and of its remedy, if any."""
    head = f"{finding.status:8}{finding.topic:12}"
    wrapped = textwrap.wrap(finding.text, WIDTH, initial_indent=head, subsequent_indent=" " * INDENT)
    if finding.remedy:
        arrow = f"{'':{INDENT - 2}}→ "
        wrapped += textwrap.wrap(finding.remedy, WIDTH, initial_indent=arrow, subsequent_indent=" " * INDENT)
    return "\n".join(wrapped)
