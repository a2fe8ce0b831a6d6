"""`drift`: what users send to a served run beside its validation data."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, cast

import tyro

from minitransformer import files
from minitransformer.analysis.drift import drift_page, drift_section
from minitransformer.commands import DONE, check_outputs, parse, table_width, with_exit_code
from minitransformer.errors import UserError
from minitransformer.models.decoder import DecoderLM
from minitransformer.reporting.figures import check_figures
from minitransformer.reporting.plain import titled_table
from minitransformer.runs import Run
from minitransformer.runs.drifting import check_decoder, losses_of, sent_texts, validation_texts
from minitransformer.runs.evaluating import HeldOutData
from minitransformer.runs.promoting import served_checkpoint
from minitransformer.text.corpora import named
from minitransformer.training.machine import choose_device

ABOUT = (
    "Say whether a served decoder still fits its use: loss per token and length of what users send, from the log of "
    "`serve --log`, beside the validation data of its run. Tokens are compared at the same positions: in a "
    "conversation, those of its last message. Intervals have 95% confidence, by bootstrap over texts."
)


@dataclass(frozen=True)
class Options:
    """Which model, which requests, and where the results go."""

    run: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN")]
    """run folder that is served; of one with promotions, the run that is served now"""
    log: Path
    """.jsonl file that `serve --log` has written"""
    model: str | None = None
    """name that the run is served by; None is for a log of one model"""
    data: tuple[str, ...] = ()
    """files, folders or recipes to compare with, such as train.py's --data; none is the run's validation data"""
    texts: int = 1000
    """most texts of either side: the latest of users, and validation texts drawn at random"""
    json: Path | None = None
    """new .json file with the results; None writes none"""
    html: Path | None = None
    """new .html file with the results and a plot; None writes none"""
    device: str = "auto"
    """auto, cpu, cuda or mps"""

    def __post_init__(self) -> None:
        if self.texts < 2:
            raise UserError(f"texts is {self.texts}: it must be at least 2")
        check_outputs({"--json": self.json, "--html": self.html})


@with_exit_code
def main(arguments: Sequence[str]) -> int:
    """Compare; returns the exit code."""
    options = parse(Options, arguments, prog="minitransformer drift", description=ABOUT)
    if options.html is not None:
        check_figures()
    path, checkpoint = served_checkpoint(options.run)
    run = Run.open(path)
    check_decoder(run)
    sent = sent_texts(run, options.log, options.texts, options.model)
    data = HeldOutData.of_files(run, options.data, None) if options.data else HeldOutData.of_run(run)
    about = {"run": str(path), "checkpoint": run.checkpoint(checkpoint).resolve().name, "log": str(options.log)}
    about["data"] = named(options.data) if options.data else f"{named(run.config.data.data)}, validation"
    for name, value in about.items():
        print(f"{name:10} {value}")
    model = cast(DecoderLM, run.load_model(checkpoint, str(choose_device(options.device))))
    usual = losses_of(model, validation_texts(data, options.texts), "validation texts")
    section = drift_section(losses_of(model, sent, "texts of users"), usual, data.kind)
    for table in section.tables:
        print(f"\n{titled_table(table, table_width())}")
    print(*section.notes, sep="\n")
    if options.html is not None:
        with files.writing(options.html, "choose another --html"):
            files.write_text(options.html, drift_page(about, section))
    if options.json is not None:
        with files.writing(options.json, "choose another --json"):
            files.write_text(options.json, json.dumps({**about, **section.record}, indent=2) + "\n")
    return DONE
