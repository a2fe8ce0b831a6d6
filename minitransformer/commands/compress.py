"""`compress`: make a smaller run of a trained one, and say what that costs."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from tqdm import tqdm

from minitransformer import files
from minitransformer.amounts import size
from minitransformer.commands import DONE, check_outputs, table_width, with_exit_code
from minitransformer.commands.settings_flags import parse_with_settings
from minitransformer.compression.making import Source, beside
from minitransformer.compression.measuring import ModelFigures, QualityData, figures_of
from minitransformer.compression.request import CompressionRequest
from minitransformer.errors import UserError
from minitransformer.models.model import Model
from minitransformer.reporting import figures
from minitransformer.reporting.plain import plain_table
from minitransformer.runs import check_free

ABOUT = (
    "Make a smaller run of a trained one: fewer bits for each weight, pruned weights, heads and hidden units, or fewer "
    "layers. It is sampled, evaluated, fine-tuned and exported as any other. Its size, its speed, and its quality on "
    "the validation data are measured beside those of the original; intervals have 95% confidence."
)


@dataclass(frozen=True)
class Options:
    """Which run to compress, and where to."""

    run: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN")]
    """run folder"""
    out: Annotated[Path, tyro.conf.arg(metavar="DIR")]
    """folder of the new run, which must not exist yet"""
    data: tuple[str, ...] = ()
    """files, folders or recipes to calibrate and measure on, such as train.py's --data; none is the run's own data"""
    checkpoint: Annotated[str | None, tyro.conf.arg(metavar="NAME")] = None
    """checkpoint of the run; None is the best, or else the latest"""
    plot: Annotated[Path | None, tyro.conf.arg(metavar="FILE.png")] = None
    """also draw size against quality, of this run and of all others beside it that were made from the same one"""


@with_exit_code
def main(arguments: Sequence[str]) -> int:
    """Compress; returns the exit code."""
    options, request = parse_with_settings(
        Options, arguments, CompressionRequest(), prog="minitransformer compress", description=ABOUT
    )
    check_free(options.out)
    if options.plot is not None and options.plot.suffix != ".png":
        raise UserError(f"{options.plot} is no .png file: give --plot another name")
    check_outputs({"--plot": options.plot}, new=False)
    source = Source.open(options.run, options.checkpoint, options.data)
    method, model = source.compressed(request.compression)
    print(*method.remarks, sep="\n", end="\n" if method.remarks else "", flush=True)
    held_out = source.held_out()
    measured = _measured(source, held_out, model, options.out.name)
    source.write(options.out, method, model, request.compression, measured)
    print(f"run        {options.out}")
    if options.plot is not None:
        _draw(options, "quality" if held_out is None else held_out.unit)
    return DONE


def _measured(source: Source, held_out: QualityData | None, model: Model, name: str) -> dict[str, ModelFigures]:
    """The figures of the original and of `model`, which are printed."""
    total = 0 if held_out is None else 2 * len(held_out.batches)
    with tqdm(total=total, desc="measuring", disable=None if total else True, leave=False) as bar:
        found = figures_of({source.run.path.name: source.model(), name: model}, held_out, _note, bar.update)
    rows = [
        [
            name,
            size(each.bytes),
            each.tokens_per_second and f"{each.tokens_per_second:.0f}",
            _with_interval(each.quality, each.quality_low, each.quality_high, ".3f"),
            _with_interval(each.change, each.change_low, each.change_high, "+.2%") if number else None,
        ]
        for number, (name, each) in enumerate(found.items())
    ]
    unit = "quality" if held_out is None else held_out.unit
    print(plain_table(["run", "size", "tokens/s", unit, "change"], rows, table_width()))
    if held_out is None:
        print("\nquality    not measured, as there is no validation data: name files with --data")
    else:
        print(f"\nmeasured   on {held_out.tokens:,} tokens of validation data")
    return found


def _with_interval(value: float | None, low: float | None, high: float | None, form: str) -> str | None:
    if value is None:
        return None
    return f"{value:{form}}" if low is None or high is None else f"{value:{form}} [{low:{form}}, {high:{form}}]"


def _draw(options: Options, unit: str) -> None:
    assert options.plot is not None
    found = {name: each for name, each in beside(options.out, options.run).items() if each["quality"] is not None}
    if not found:
        raise UserError("there is no quality to draw: name files with --data, or leave --plot out")
    names = list(found)
    image = figures.labelled_points(
        names,
        [found[name]["bytes"] / 1e6 for name in names],
        [found[name]["quality"] for name in names],
        [(found[name]["quality_low"], found[name]["quality_high"]) for name in names],
        x_label="size of the weights (MB)",
        y_label=unit,
        title="Size and quality",
    )
    with files.writing(options.plot, "choose another --plot"), files.whole_file(options.plot) as file:
        file.write(figures.png(image))
    print(f"plot       {options.plot}")


def _note(text: str) -> None:
    print(f"note: {text}", file=sys.stderr, flush=True)
