"""`export`: write the model of a run in the format of another runtime, and prove what was written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from typing_extensions import Doc

from minitransformer.commands import DONE, HELP, check_outputs, parse, with_exit_code
from minitransformer.errors import UserError
from minitransformer.exporting import ExportFormat, export_run
from minitransformer.exporting.certificate import Certificate
from minitransformer.exporting.exported import Exported
from minitransformer.exporting.families import family_that_holds
from minitransformer.exporting.formats import CertificateError, ExportChoices
from minitransformer.models.config import PRESETS
from minitransformer.models.int8 import Int8Linear
from minitransformer.pretrained.families import Family
from minitransformer.pretrained.peft_folders import save_adapter
from minitransformer.runs import Run
from minitransformer.training.checkpoint import load_unmerged

FORMATS = Doc(f"format of the copy: {', '.join(ExportFormat.registry)}")
FAMILIES = Doc(f"model family; None is the first that can represent the model: {', '.join(Family.registry)}")
STORED = {name: kind.weights for name, kind in ExportFormat.registry.items() if kind.weights}
WEIGHTS = Doc(
    "how the weights are stored: "
    + "; ".join(f"{', '.join(kinds)} (--format {name})" for name, kinds in STORED.items())
)


@dataclass(frozen=True)
class Options:
    """Which run to export, where, and in which format."""

    run: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN-FOLDER")]
    """run folder"""
    to: Annotated[Path, tyro.conf.arg(metavar="NEW-FOLDER")]
    """output folder, which must not exist yet"""
    format: Annotated[str, tyro.conf.arg(metavar="FORMAT"), FORMATS] = "hf"
    family: Annotated[str | None, tyro.conf.arg(metavar="{None}|FAMILY"), FAMILIES] = None
    weights: Annotated[str | None, tyro.conf.arg(metavar="{None}|TYPE"), WEIGHTS] = None
    license: Annotated[str | None, tyro.conf.arg(metavar="{None}|NAME")] = None
    """licence that the model card names, such as mit; None leaves it unknown"""
    adapter: bool = False
    """write the adapter of the run alone, as a folder of the peft library"""
    checkpoint: Annotated[str | None, tyro.conf.arg(metavar="{None}|CHECKPOINT")] = None
    """checkpoint of the run; None is the best, or else the latest"""


@with_exit_code
def main(arguments: Sequence[str]) -> int:
    """Export; returns the exit code."""
    about = _description() if HELP & set(arguments) else ""
    options = parse(Options, arguments, prog="minitransformer export", description=about)
    kind = ExportFormat.named(options.format)
    run = Run.open(options.run)
    if options.adapter:
        return _export_adapter(run, options)
    check_outputs({"--to": options.to})
    subject = Exported.of(run, options.checkpoint)
    made = kind(subject, ExportChoices(options.family, options.weights))
    try:
        certificate = export_run(made, options.to, options.license)
    except CertificateError as error:
        _print_table(error.certificate)
        raise
    for name, value in made.about().items():
        print(f"{name:14} {value}")
    if subject.originals is not None:
        print(f"{'tokenizer':14} the files that were imported, unchanged")
    _print_table(certificate)
    print(f"{'folder':14} {options.to}, with its certificate and its model card")
    return DONE


def _print_table(certificate: Certificate) -> None:
    by = certificate.runtime if certificate.is_foreign else f"{certificate.runtime}: not run elsewhere"
    print(f"{'opened by':14} {by}")
    for check in certificate.checks:
        print(f"{check.name:14} {'same' if check.agrees else 'DIFFERENT'}: {check.found}")


def _export_adapter(run: Run, options: Options) -> int:
    if run.config.model.adapter.name == "none" or run.parent is None:
        raise UserError(f"{options.run} has no adapter: leave --adapter out")
    given = {"--format": options.format != "hf", "--weights": options.weights, "--license": options.license}
    if unused := [flag for flag, value in given.items() if value]:
        raise UserError(f"--adapter writes a folder of peft, which {unused[0]} does not change: leave one of them out")
    model = load_unmerged(run.checkpoint(options.checkpoint), run.config)
    save_adapter(model, options.to, family_that_holds(run.config.model.plain, options.family), run.parent.path)
    print(f"folder     {options.to}, for the base {run.parent.path}")
    if any(isinstance(part, Int8Linear) for part in model.modules()):
        print("note       it was trained over this base in 8 bits, and peft reads it in full: logits differ a bit")
    return DONE


def _description() -> str:
    kinds = ExportFormat.registry.values()
    lines = [f"{kind.name}: {(kind.__doc__ or '').strip()} Presets: {presets_in(kind)}." for kind in kinds]
    return (
        "Export the model of a run to another runtime. What was written is opened there and compared with the run: "
        "weights, ids of hostile texts, logits, greedy text, chat template, stop tokens. A copy that differs is not "
        "kept.\n\n"
        + "\n\n".join(lines)
        + "\n\nImported models, and runs fine-tuned from them, can be exported to their "
        "original family. For other models, the command says which flags of train.py are needed."
    )


def presets_in(kind: type[ExportFormat]) -> str:
    """The presets that a format holds, with the families that hold them."""
    by_holders: dict[str, list[str]] = {}
    for preset, config in PRESETS.items():
        by_holders.setdefault(", ".join(kind.holders(config)), []).append(preset)
    without = by_holders.pop("", [])
    if list(by_holders) == [kind.name]:
        return f"all but {', '.join(without)}" if without else "all"
    return "; ".join(f"{', '.join(presets)} ({holders})" for holders, presets in by_holders.items()) or "none"
