"""`promote`: serve another run in place of one, if it is better; and go back."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from minitransformer import files
from minitransformer.analysis.promotion import Judgement, check_metric, check_servable, judge_run
from minitransformer.commands import DONE, FAILED, check_outputs, parse, with_exit_code
from minitransformer.errors import UserError
from minitransformer.evaluation.metrics import Metric
from minitransformer.runs import Run
from minitransformer.runs.evaluating import HeldOutData
from minitransformer.runs.promoting import folder_of, go_back, promote_over, served_checkpoint
from minitransformer.training.machine import choose_device

ABOUT = (
    "Have the server of a run serve another one, if that is better on data which neither has learned: the 95% interval "
    "of the paired difference must exclude 0. If not, nothing changes, and the exit code is 1. A running server "
    "follows within seconds, and answers what it has begun with the run before. --back undoes the last promotion."
)


@dataclass(frozen=True)
class Options:
    """Which run, in place of which, and by what it is judged."""

    run: Annotated[tyro.conf.Positional[Path | None], tyro.conf.arg(metavar="NEW")] = None
    """run folder to serve from now on"""
    over: Annotated[Path | None, tyro.conf.arg(metavar="OLD")] = None
    """run folder that the server was started with; NEW must be better than what is served for it now"""
    data: tuple[str, ...] = ()
    """files, folders or recipes to compare on, which neither run has learned"""
    target_data: str | None = None
    """file with the other side of pairs, line by line"""
    metric: str = "validation_loss"
    """what must be better: the name of a metric as `evaluate --json` has it, such as accuracy, bleu or token_f1"""
    checkpoint: str | None = None
    """checkpoint of NEW, such as step-000500 or latest; None is the best, or else the latest"""
    back: bool = False
    """serve again what was served before the last promotion over OLD"""
    json: Path | None = None
    """new .json file with the figures; None writes none"""
    device: str = "auto"
    """auto, cpu, cuda or mps"""

    def __post_init__(self) -> None:
        if self.over is None:
            raise UserError("promote needs the run folder that the server was started with: name it with --over")
        if self.back:
            default = ("validation_loss", "auto")
            if self.run or self.data or self.target_data or self.checkpoint or self.json:
                raise UserError("--back compares nothing: give it with --over alone")
            if (self.metric, self.device) != default:
                raise UserError("--back measures nothing: leave --metric and --device out")
        elif self.run is None:
            raise UserError("there is no run to promote: name its folder, or give --back")
        elif not self.data:
            raise UserError("a run is promoted if it is better on data that neither has learned: name it with --data")
        check_outputs({"--json": self.json})


@with_exit_code
def main(arguments: Sequence[str]) -> int:
    """Promote, or go back; returns the exit code."""
    options = parse(Options, arguments, prog="minitransformer promote", description=ABOUT)
    assert options.over is not None, "which was checked"
    Run.open(options.over)
    if options.back:
        left = go_back(options.over)
        path, checkpoint = served_checkpoint(options.over)
        print(f"left       {folder_of(options.over, left)}, {left.checkpoint}, which was served since {left.since}")
        print(f"served     {path}, {Run.open(path).checkpoint(checkpoint).resolve().name}")
        return DONE
    return _promote(options, options.over)


def _promote(options: Options, over: Path) -> int:
    assert options.run is not None, "which was checked"
    path, served = served_checkpoint(over)
    new, old = Run.open(options.run), Run.open(path)
    # The names are fixed here: a run that is still training has another best checkpoint later.
    names = tuple(run.checkpoint(name).resolve().name for run, name in ((new, options.checkpoint), (old, served)))
    if new.path.resolve() == old.path.resolve() and names[0] == names[1]:
        raise UserError(f"{options.run}, {names[0]}, is served already: name another run")
    check_servable(new, old)
    check_metric(options.metric, new, old)
    data = [HeldOutData.of_files(run, options.data, options.target_data) for run in (new, old)]
    found = judge_run(data[0], data[1], (names[0], names[1]), options.metric, choose_device(options.device))
    print(f"new        {options.run}, {names[0]}")
    print(f"served     {path}, {names[1]}")
    print(f"compared   {found.sentence}")
    if options.json is not None:
        record = {"new": str(options.run), "served": str(path), "checkpoints": list(names), "metric": options.metric}
        figures = {"items": found.items, **found.found.to_json(), "promoted": found.is_better}
        with files.writing(options.json, "choose another --json"):
            files.write_text(options.json, json.dumps({**record, **figures}, indent=2) + "\n")
    if not found.is_better:
        print(f"kept       {path}: {_reason(found)}")
        return FAILED
    promote_over(over, new, names[0], found.sentence)
    print(f"promoted   {options.run} is served for {over} from now on")
    print(f"back       python -m minitransformer promote --back --over {over}")
    return DONE


def _reason(found: Judgement) -> str:
    """Why the served run is kept."""
    if not found.found.is_clear:
        return "the interval of the difference does not exclude 0"
    return f"the new run is worse in {Metric.named(found.metric).title}"
