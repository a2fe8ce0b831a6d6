"""`compress`: make a smaller run of a trained one, and say what that costs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated

import tyro
from tqdm import tqdm

from minitransformer.amounts import size
from minitransformer.commands import DONE, check_outputs, given_flags, note, table_width, with_exit_code
from minitransformer.commands.family_plot import draw_family, with_interval
from minitransformer.commands.settings_flags import parse_with_settings
from minitransformer.compression.making import Source
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
    out: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """folder of the new run, which must not exist yet; none is made without it"""
    data: tuple[str, ...] = ()
    """files, folders or recipes to calibrate and measure on, such as train.py's --data; none is the run's own data"""
    checkpoint: Annotated[str | None, tyro.conf.arg(metavar="NAME")] = None
    """checkpoint of the run; None is the best, or else the latest"""
    plot: Annotated[Path | None, tyro.conf.arg(metavar="FILE.png")] = None
    """draw size against quality of RUN and of all runs beside the new one (beside RUN without --out) that were made
    from it, by compression, distillation or fine-tuning, and print a table; all are measured on the same data"""


@with_exit_code
def main(arguments: Sequence[str]) -> int:
    """Compress; returns the exit code."""
    options, request = parse_with_settings(
        Options, arguments, CompressionRequest(), prog="minitransformer compress", description=ABOUT
    )
    _check(options, given_flags(arguments))
    source = Source.open(options.run, options.checkpoint, options.data)
    held_out = source.held_out()
    if options.plot is not None and held_out is None:
        raise UserError("there is no quality to draw: name files with --data, or leave --plot out")
    if options.out is not None:
        method, model = source.compressed(request.compression)
        print(*method.remarks, sep="\n", end="\n" if method.remarks else "", flush=True)
        measured = _measured(source, held_out, model, options.out.name)
        source.write(options.out, method, model, request.compression, measured)
        print(f"run        {options.out}")
    if options.plot is not None and held_out is not None:
        draw_family(source, held_out, options.run if options.out is None else options.out, options.plot)
    return DONE


def _check(options: Options, given: set[str]) -> None:
    """Raises `UserError` for options that cannot be met, before minutes of work."""
    if options.out is not None:
        check_free(options.out)
    elif options.plot is None:
        raise UserError("nothing is asked for: give --out for the folder of the new run, or --plot")
    elif settings := given - {field.name for field in fields(options)}:
        flag = f"--{min(settings).replace('_', '-')}"
        raise UserError(f"{flag} is for a new run: name its folder with --out, or leave it out")
    if options.plot is not None:
        figures.check_figures()
        if options.plot.suffix != ".png":
            raise UserError(f"{options.plot} is no .png file: give --plot another name")
        check_outputs({"--plot": options.plot}, new=False)


def _measured(source: Source, held_out: QualityData | None, model: Model, name: str) -> dict[str, ModelFigures]:
    """The figures of the original and of `model`, which are printed."""
    total = 0 if held_out is None else 2 * len(held_out.batches)
    with tqdm(total=total, desc="measuring", disable=None if total else True, leave=False) as bar:
        found = figures_of({source.run.path.name: source.model(), name: model}, held_out, note, bar.update)
    rows = [
        [
            name,
            size(each.bytes),
            each.tokens_per_second and f"{each.tokens_per_second:.0f}",
            with_interval(each.quality, each.quality_low, each.quality_high, ".3f"),
            with_interval(each.change, each.change_low, each.change_high, "+.2%") if number else None,
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
