"""The formats in which a model leaves: each writes a folder, and opens it again in the runtime that its users have."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from minitransformer import files
from minitransformer.errors import UserError
from minitransformer.exporting.card import write_card
from minitransformer.exporting.certificate import ALL, Certificate, CopyComparison, compare_copy
from minitransformer.exporting.copies import Copy, CopyError
from minitransformer.exporting.exported import Exported
from minitransformer.models.config import ModelConfig
from minitransformer.registry import Registered
from minitransformer.runs import provenance


class CertificateError(CopyError):
    """A copy that is not what was trained, with the certificate that says where."""

    def __init__(self, sentence: str, certificate: Certificate) -> None:
        super().__init__(sentence)
        self.certificate = certificate


@dataclass(frozen=True)
class ExportChoices:
    """What is asked of a format: the family of checkpoints, and how weights are stored; None is its own choice."""

    family: str | None = None
    weights: str | None = None


class ExportFormat(Registered, kind="format"):
    """A folder that a foreign runtime opens: `write` fills it, and `open` opens it there.

    The constructor raises `UserError` with every reason for which the format cannot hold the run.
    """

    comparisons: ClassVar[tuple[CopyComparison, ...]] = ALL
    has_families: ClassVar[bool] = False
    weights: ClassVar[tuple[str, ...]] = ()
    """the ways to store weights, of which the first is the default; none for weights as they are"""

    def __init__(self, subject: Exported, wanted: ExportChoices) -> None:
        if wanted.family is not None and not self.has_families:
            raise UserError(f"format {self.name!r} has no families: leave --family {wanted.family} out")
        if wanted.weights is not None and wanted.weights not in self.weights:
            known = f"choose {', '.join(self.weights)}" if self.weights else "leave it out"
            raise UserError(f"format {self.name!r} cannot store weights as {wanted.weights!r}: {known}")
        self.exported = subject
        self.stored = wanted.weights or next(iter(self.weights), None)

    @classmethod
    def holders(cls, config: ModelConfig) -> list[str]:
        """What of this format holds a model: names of families, or of the format itself; empty if nothing does."""
        raise NotImplementedError

    def about(self) -> dict[str, Any]:
        """What a certificate says of this format."""
        return {}

    def write(self, folder: Path) -> None:
        """Write all files to the empty `folder`."""
        raise NotImplementedError

    def open(self, folder: Path) -> Copy:
        """What `write` has written; raises `UserError` if the runtime cannot open it."""
        raise NotImplementedError


def formats_of(config: ModelConfig) -> list[str]:
    """The names of the formats that hold a model."""
    return [name for name, kind in ExportFormat.registry.items() if kind.holders(config)]


def export_run(made: ExportFormat, to: Path, license: str | None) -> Certificate:
    """Write an export to the new folder `to`, with its certificate and its card; a copy that differs is not kept.

    Raises `UserError` if `to` exists, and `CertificateError` for a copy that is not what was trained.
    """
    if to.exists():
        raise UserError(f"{to} already exists: choose another folder")
    with files.writing(to, "choose another folder"):
        to.parent.mkdir(parents=True, exist_ok=True)
        with files.whole_folder(to) as partial:
            made.write(partial)
            certificate = certify(made, partial)
            if (difference := certificate.difference) is not None:
                raise CertificateError(
                    f"the copy, opened by {certificate.runtime}, is not what was trained ({difference}): "
                    "it was removed; choose another --format or --family",
                    certificate,
                )
            write_card(made.exported, certificate, partial, license)
            certificate.write(partial)
    return certificate


def certify(made: ExportFormat, folder: Path) -> Certificate:
    """The certificate of what `made` has written to `folder`."""
    copy = made.open(folder)
    checks = compare_copy(made.exported, copy, made.comparisons)
    run = {"run": made.exported.run.path.resolve().name, "checkpoint": made.exported.checkpoint, **made.about()}
    return Certificate(made.name, copy.runtime, copy.is_foreign, checks, {**run, **provenance()})
