"""`campaign`: disturb small runs by every fault, and print what came of each."""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import tyro

from minitransformer.commands import DONE, FAILED, parse, start, with_exit_code
from minitransformer.errors import UserError
from minitransformer.files import make_folder, writing
from minitransformer.registry import lookup
from minitransformer.reliability.campaign import Campaign, FaultOutcome, cell
from minitransformer.reliability.disturbed_runs import FAILED_CASE, RunKind, run_kinds
from minitransformer.reliability.faults import Fault, can_mount
from minitransformer.reliability.launcher import Commands

PROGRAM = "minitransformer campaign"
ABOUT = (
    "Try on this machine that a run cannot be lost: small runs, alone or on two ranks, are killed, stopped, and given "
    "full disks and damaged files, and then continued. Each must end with the very bits of a run that was not "
    "disturbed, or be refused in one sentence. The exit code is 0 if all are, and 1 if not."
)
LEGEND = "= equal bit for bit, ≈ equal within rounding, r refused in one sentence"
REMEDY = "choose another --folder"
NARROWEST = 8
"""columns of a cell"""
LONG = 17
"""cases of each kind and fault: more than 200 kills"""


@dataclass(frozen=True)
class Options:
    """How many cases, of what, and where."""

    long: bool = False
    """some hundred cases, which take half an hour, instead of one of each"""
    count: int | None = None
    """cases of each fault and kind of run; None is 1, or 17 with --long"""
    seed: int = 0
    """seed of the first case; the next ones have the next numbers"""
    fault: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """only this fault; may be repeated"""
    kind: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """only this kind of run; may be repeated"""
    folder: Path | None = None
    """folder on the disk to try; None is the system's own for temporary files"""
    json: bool = False
    """print every outcome as JSON, instead of the table"""
    markdown: bool = False
    """print the table in Markdown"""


@with_exit_code
def main(arguments: Sequence[str]) -> int:
    """Disturb runs; returns the exit code."""
    options = parse(Options, arguments, prog=PROGRAM, description=ABOUT)
    known = run_kinds()
    kinds = [lookup("kind", name, known) for name in options.kind or known]
    faults = [Fault.named(name) for name in options.fault or Fault.registry]
    _check(options)
    count = options.count or (LONG if options.long else 1)
    parent = options.folder or Path(tempfile.gettempdir())
    with writing(parent, REMEDY):
        make_folder(parent)
        folder = Path(tempfile.mkdtemp(prefix="campaign-", dir=parent.resolve()))
        campaign = Campaign(Commands(start, ["minitransformer.commands.train"]), kinds, faults, folder)
        table = FaultTable(kinds, markdown=options.markdown, quiet=options.json)
        outcomes: list[FaultOutcome] = []
        for fault in faults:
            outcomes += campaign.outcomes(fault, count, options.seed)
            table.add(fault, outcomes)
    failures = [each for each in outcomes if each.result == FAILED_CASE]
    print(json.dumps([asdict(each) for each in outcomes]) if options.json else _conclusion(outcomes, faults))
    _report(failures)
    if not failures:
        shutil.rmtree(folder)
    return FAILED if failures else DONE


def _check(options: Options) -> None:
    if not hasattr(os, "fork"):
        raise UserError("the campaign starts processes by fork, which this system lacks: run it on Linux or macOS")
    if options.long and options.count is not None:
        raise UserError(f"--long determines the count: leave --count {options.count} out")
    if options.count is not None and options.count < 1:
        raise UserError(f"--count is {options.count}: give at least 1")
    if options.json and options.markdown:
        raise UserError("--json prints no table: leave --markdown out")


class FaultTable:
    """Faults × kinds of run, printed row by row."""

    def __init__(self, kinds: Sequence[RunKind], *, markdown: bool, quiet: bool) -> None:
        self.kinds, self.markdown, self.quiet = kinds, markdown, quiet
        names = [kind.name for kind in kinds]
        self._line("fault", names)
        if markdown:
            self._line("---", ["---"] * len(names))

    def add(self, fault: type[Fault], outcomes: Sequence[FaultOutcome]) -> None:
        """The row of `fault`."""
        self._line(fault.about, [cell(outcomes, fault, kind) for kind in self.kinds])

    def _line(self, first: str, cells: Sequence[str]) -> None:
        if self.markdown:
            line = f"| {' | '.join([first, *cells])} |"
        else:
            widths = [1 + max(NARROWEST, len(kind.name)) for kind in self.kinds]
            line = f"{first:24}" + "".join(f"{text:>{width}}" for text, width in zip(cells, widths, strict=True))
        if not self.quiet:
            print(line.rstrip(), flush=True)


def _conclusion(outcomes: Sequence[FaultOutcome], faults: Sequence[type[Fault]]) -> str:
    disk = "a disk in memory" if can_mount() else "a limit on the size of files"
    lines = [f"\n{len(outcomes)} cases: {LEGEND}", f"the full disk is {disk}"]
    lines += [f"not tried: {fault.about}, as {why}" for fault in faults if (why := fault.why_not()) is not None]
    return "\n".join(lines)


def _report(failures: Sequence[FaultOutcome]) -> None:
    for each in failures:
        command = f'{PROGRAM} --fault {each.fault} --kind "{each.kind}" --seed {each.seed}'
        print(
            f"failed: {each.fault}, {each.kind}: {each.reason}\n  again: {command}\n  left: {each.folder}",
            file=sys.stderr,
        )
