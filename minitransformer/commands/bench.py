"""`bench`: how fast this is here, beside its peers and beside what the machine can do."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

from typing_extensions import Doc

from minitransformer.benchmark.budget import Budget
from minitransformer.benchmark.case import BenchSetting, Case
from minitransformer.benchmark.limits import Limits, chosen_device, measure_limits
from minitransformer.benchmark.peers import NanoGPT
from minitransformer.benchmark.report import WIDTH, as_json, case_table, heading, picture
from minitransformer.benchmark.rounds import CaseResult, RoundsPlan, measure
from minitransformer.benchmark.scaling import Axis, Growth, grow
from minitransformer.benchmark.scaling_report import growth_as_json, growth_picture, growth_table
from minitransformer.benchmark.shape import SHAPES
from minitransformer.benchmark.subjects import Subject
from minitransformer.benchmark.workers import ContestantFailed
from minitransformer.commands import DONE, FAILED, INTERRUPTED, parse, run_command
from minitransformer.errors import UserError
from minitransformer.files import whole_file, write_text, writing
from minitransformer.registry import lookup

REMEDY = "name another file"


@dataclass(frozen=True)
class Options:
    """What to measure, how often, and beside whom."""

    only: tuple[str, ...] = ()
    """subjects to measure (with --scaling: axes); all without it"""
    contestants: tuple[str, ...] = ()
    """patterns of names to measure, such as "ours*"; all without it"""
    shape: Annotated[str, Doc(f"shape of the model: {', '.join(SHAPES)}")] = "nanogpt-cpu"
    against: Path | None = None
    """checkout of nanoGPT to measure beside ours"""
    base: str | None = None
    """contestant that others are compared with; None is a peer, where one can be measured"""
    rounds: int = 11
    """measurements of each contestant, interleaved with those of the base"""
    warmup: int = 2
    """samples of each before these, which are dropped"""
    seconds: float = BenchSetting.seconds
    """that a sample takes at least; what is shorter is repeated"""
    device: str = "auto"
    """auto, cpu, cuda or mps"""
    data: str = BenchSetting.data
    """text for tokenizers and for time-to-loss: a recipe or a file"""
    megabytes: float = BenchSetting.megabytes
    """of the text, for tokenizers"""
    tokens: int = BenchSetting.tokens
    """to decode; fewer where the context has no room for them"""
    target_loss: float = BenchSetting.target_loss
    """of time-to-loss, in nats a character"""
    scaling: bool = False
    """instead: how memory and time grow with context, vocabulary, batch and text"""
    minutes: float = 20.0
    """that all of it may take: as many rounds, contestants, and with --scaling sizes, as fit"""
    json: Path | None = None
    """file for everything that was measured, each sample included"""
    plot: Path | None = None
    """picture (PNG) of the ratios, or with --scaling of the growth"""
    seed: int = 0
    """of the order within rounds, and of weights and tokens"""

    def plan(self) -> RoundsPlan:
        return RoundsPlan(self.rounds, self.warmup, self.base, seed=self.seed)


def main(arguments: Sequence[str]) -> int:
    """Measure; returns the exit code."""
    return run_command(lambda: _bench(arguments))


def _bench(arguments: Sequence[str]) -> int:
    about = "Measure speed and memory, beside peers and beside what the machine can do.\n\nSubjects:\n"
    about += "\n".join(f"  {name:20}{subject.about}" for name, subject in sorted(Subject.registry.items()))
    about += "\n\nAxes of --scaling: " + ", ".join(Axis.registry)
    options = parse(Options, arguments, prog="minitransformer bench", description=about)
    _check(options)
    return _scaling(options) if options.scaling else _compare(options)


def _check(options: Options) -> None:
    """Raises `UserError` now for what would go wrong after minutes of measuring."""
    for name in options.only:
        if options.scaling:
            Axis.named(name)
        else:
            Subject.named(name)
    lookup("shape", options.shape, SHAPES)
    for name, least in {"rounds": 1, "warmup": 0, "tokens": 1}.items():
        if getattr(options, name) < least:
            raise UserError(f"--{name} is {getattr(options, name)}: give {least} or more")
    for name in ("seconds", "megabytes", "target_loss", "minutes"):
        if not getattr(options, name) > 0:
            raise UserError(f"--{name.replace('_', '-')} is {getattr(options, name)}: it must be above 0")
    if options.plot is not None and find_spec("matplotlib") is None:
        raise UserError('--plot needs matplotlib, which is not installed: pip install -e ".[lab]"')
    for path in (options.json, options.plot):
        if path is not None and not path.absolute().parent.is_dir():
            raise UserError(f"{path} cannot be written, as there is no folder {path.parent}: {REMEDY}")


def _setting(options: Options) -> BenchSetting:
    against = None if options.against is None else NanoGPT.at(options.against)
    return BenchSetting(
        shape=SHAPES[options.shape],
        device=chosen_device(options.device),
        against=against,
        data=options.data,
        megabytes=options.megabytes,
        tokens=options.tokens,
        target_loss=options.target_loss,
        seconds=options.seconds,
        seed=options.seed,
    )


# --- contestants beside each other


def _compare(options: Options) -> int:
    began = time.monotonic()
    setting, plan = _setting(options), options.plan()
    cases = _cases(options, setting)
    progress = BenchProgress()
    results: list[CaseResult] = []
    interrupted = False
    try:
        progress("limits of the machine")
        limits, why_no_limits = _limits(setting)
        progress.show(heading(setting, plan, limits, why_no_limits))
        budget = Budget(began + 60 * options.minutes - time.monotonic(), len(cases))
        for case in cases:
            seconds = budget.next_part()[0] - time.monotonic()
            results.append(measure(case, replace(plan, seconds=seconds), report=progress))
            progress.show(case_table(results[-1], limits))
            if options.json is not None:
                content = as_json(results, setting, plan, limits, why_no_limits)
                with writing(options.json, REMEDY):
                    write_text(options.json, json.dumps(content, indent=1) + "\n")
    except KeyboardInterrupt:
        interrupted = True
    progress.clear()
    if interrupted:
        print(f"\ninterrupted: {len(results)} of {len(cases)} cases are measured", file=sys.stderr)
        return INTERRUPTED
    if options.plot is not None and any(len(result.samples) > 1 for result in results):
        _save_picture(options.plot, picture(results))
    return DONE if any(result.samples for result in results) else FAILED


def _limits(setting: BenchSetting) -> tuple[Limits | None, str]:
    """Those of the machine, or why they are not known."""
    try:
        return measure_limits(setting.device), ""
    except ContestantFailed as failure:
        return None, str(failure)


def _cases(options: Options, setting: BenchSetting) -> list[Case]:
    names = options.only or sorted(Subject.registry)
    cases = [case for name in names for case in Subject.named(name)(setting).cases()]
    known = {contestant.name for case in cases for contestant in case.contestants}
    known |= {absent.name for case in cases for absent in case.absent}
    for pattern in options.contestants:
        if not any(fnmatchcase(name, pattern) for name in known):
            lookup("contestant", pattern, dict.fromkeys(sorted(known)))
    if options.base is not None:
        lookup("contestant", options.base, dict.fromkeys(sorted(known)))
    chosen = [_chosen(case, options) for case in cases]
    return [case for case in chosen if case.contestants or case.absent]


def _chosen(case: Case, options: Options) -> Case:
    """The case with those contestants alone that were asked for."""

    def asked(name: str) -> bool:
        return not options.contestants or any(fnmatchcase(name, pattern) for pattern in options.contestants)

    return replace(
        case,
        contestants=tuple(entry for entry in case.contestants if asked(entry.name)),
        absent=tuple(entry for entry in case.absent if asked(entry.name)),
    )


# --- growth


def _scaling(options: Options) -> int:
    setting = _setting(options)
    names = options.only or tuple(Axis.registry)
    progress = BenchProgress()
    growths: list[Growth] = []
    interrupted = False
    try:
        for name in names:
            growths.append(grow(Axis.named(name)(setting), 60 * options.minutes / len(names), report=progress))
    except KeyboardInterrupt:
        interrupted = True
    progress.show(growth_table(growths))
    if options.json is not None:
        with writing(options.json, REMEDY):
            write_text(options.json, json.dumps(growth_as_json(growths), indent=1) + "\n")
    if interrupted:
        print(f"\ninterrupted: {len(growths)} of {len(names)} axes are measured", file=sys.stderr)
        return INTERRUPTED
    if options.plot is not None:
        _save_picture(options.plot, growth_picture(growths))
    return DONE if any(growth.points for growth in growths) else FAILED


def _save_picture(path: Path, figure: object) -> None:
    from minitransformer.reporting.figures import png

    with writing(path, REMEDY), whole_file(path) as file:
        file.write(png(figure))  # type: ignore[arg-type]


class BenchProgress:
    """What is being measured: in one line of a terminal, or in a pipe where something else begins."""

    def __init__(self) -> None:
        self.live = sys.stderr.isatty()
        self.subject = ""

    def __call__(self, line: str) -> None:
        subject = line.partition(":")[0]
        if self.live:
            print(f"\r{line[: WIDTH - 1]:{WIDTH - 1}}", end="", file=sys.stderr, flush=True)
        elif subject != self.subject:
            print(f"measuring: {subject}", file=sys.stderr, flush=True)
        self.subject = subject

    def show(self, lines: Iterable[str]) -> None:
        """Results, in place of what was being measured."""
        self.clear()
        for line in lines:
            print(line, flush=True)

    def clear(self) -> None:
        if self.live:
            print(f"\r{'':{WIDTH - 1}}\r", end="", file=sys.stderr, flush=True)
