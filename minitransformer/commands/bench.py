"""`bench`: measure speed and memory, relative to peers and to the limits of the machine."""

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

from minitransformer.benchmark.case import JUDGE, BenchSetting, Case
from minitransformer.benchmark.limits import Limits, chosen_device, measure_limits
from minitransformer.benchmark.peers import NanoGPT
from minitransformer.benchmark.report import (
    WIDTH,
    as_json,
    case_table,
    growth_as_json,
    growth_picture,
    growth_table,
    heading,
    picture,
)
from minitransformer.benchmark.rounds import Budget, CaseResult, RoundsPlan, measure
from minitransformer.benchmark.scaling import Axis, Growth, grow
from minitransformer.benchmark.shape import SHAPES
from minitransformer.benchmark.subjects import Subject
from minitransformer.benchmark.workers import ContestantFailed
from minitransformer.commands import DONE, FAILED, INTERRUPTED, parse, with_exit_code
from minitransformer.errors import UserError
from minitransformer.files import whole_file, write_text, writing
from minitransformer.registry import lookup

REMEDY = "name another file"


@dataclass(frozen=True)
class Options:
    """What to measure, how often, and what to compare with."""

    only: tuple[str, ...] = ()
    """subjects to measure (with --scaling: axes); none means all"""
    contestants: tuple[str, ...] = ()
    """patterns of the names to measure, such as "ours*"; none means all"""
    shape: Annotated[str, Doc(f"shape of the model: {', '.join(SHAPES)}")] = "nanogpt-cpu"
    against: Path | None = None
    """nanoGPT checkout to compare with"""
    base: str | None = None
    """contestant that is the baseline of all ratios; None is a peer, if one is available"""
    rounds: int = 11
    """measurements per contestant, interleaved with those of the baseline"""
    warmup: int = 2
    """warm-up measurements per contestant, which are discarded"""
    seconds: float = BenchSetting.seconds
    """minimum duration of a measurement; shorter work is repeated"""
    device: str = "auto"
    """auto, cpu, cuda or mps"""
    data: str = BenchSetting.data
    """text for the tokenizer and time-to-loss subjects: a recipe or a file"""
    megabytes: float = BenchSetting.megabytes
    """megabytes of text for the tokenizer subjects"""
    tokens: int = BenchSetting.tokens
    """number of tokens to generate, capped by the context length"""
    target_loss: Annotated[float, Doc(f"{JUDGE.label} that time-to-loss trains to; a target is a character")] = (
        BenchSetting.target_loss
    )
    scaling: bool = False
    """measure instead how memory and time scale with context, vocabulary, batch and corpus size"""
    minutes: float = 20.0
    """time limit: rounds, contestants and (with --scaling) sizes are reduced to fit"""
    json: Path | None = None
    """file for the results, every single measurement included"""
    plot: Path | None = None
    """PNG plot of the ratios, or with --scaling of the growth"""
    seed: int = 0
    """random seed of the order within rounds, the weights and the tokens"""

    def plan(self) -> RoundsPlan:
        return RoundsPlan(self.rounds, self.warmup, self.base, seed=self.seed)


@with_exit_code
def main(arguments: Sequence[str]) -> int:
    """Measure; returns the exit code."""
    about = "Measure speed and memory, relative to peers and to the limits of the machine.\n\nSubjects:\n"
    about += "\n".join(f"  {name:19}{subject.about}" for name, subject in sorted(Subject.registry.items()))
    about += "\n\nAxes of --scaling: " + ", ".join(Axis.registry)
    options = parse(Options, arguments, prog="minitransformer bench", description=about)
    _check(options)
    return _scaling(options) if options.scaling else _compare(options)


def _check(options: Options) -> None:
    """Raises `UserError` early for options that would fail after minutes of measuring."""
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
            raise UserError(f"{path} cannot be written, because {path.parent} does not exist: {REMEDY}")


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


# --- comparison of contestants


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
    """The limits of the machine, or why they are unknown."""
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
    chosen = [_select(case, options) for case in cases]
    return [case for case in chosen if case.contestants or case.absent]


def _select(case: Case, options: Options) -> Case:
    """The case with only the selected contestants."""

    def is_selected(name: str) -> bool:
        return not options.contestants or any(fnmatchcase(name, pattern) for pattern in options.contestants)

    return replace(
        case,
        contestants=tuple(entry for entry in case.contestants if is_selected(entry.name)),
        absent=tuple(entry for entry in case.absent if is_selected(entry.name)),
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
    """The current measurement: one updated line on a terminal, a line for each change in a pipe."""

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
        """Print results in place of the progress line."""
        self.clear()
        for line in lines:
            print(line, flush=True)

    def clear(self) -> None:
        if self.live:
            print(f"\r{'':{WIDTH - 1}}\r", end="", file=sys.stderr, flush=True)
