"""Labelled texts, such as sentences and what they are about."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

from minitransformer.errors import UserError
from minitransformer.settings import setting
from minitransformer.text.datasets.base import BatchShape, DataRequest, Dataset, Names
from minitransformer.text.datasets.label_preparation import LabelPreparation, PreparedLabels
from minitransformer.text.labels import LabelCorpus, open_labels


class Labels(Dataset, name="labels"):
    """Texts with a label each: rows of a table or .jsonl, or a folder or file for each label, or a recipe."""

    cuts_text = False
    usual_data = "docstrings"

    @dataclass(frozen=True)
    class Settings:
        label_field: str = setting(
            "label", flag="label_field", of_files=True, changes_task=True, help="field of each row with the label"
        )
        encoding: str = setting(
            "utf-8",
            flag="encoding",
            choices=("utf-8", "latin-1", "cp1252"),
            of_files=True,
            changes_task=True,
            help="character encoding of labelled texts",
        )
        classes: tuple[str, ...] = setting(
            (),
            flag="classes",
            changes_task=True,
            follows_data=True,
            help="names of the classes, in their order; none is all labels of the training data, sorted",
        )
        too_long: Literal["skip", "cut"] = setting(
            "cut", flag="too_long", changes_task=True, help="skip or truncate texts that are longer than the context"
        )
        batch_tokens: int = setting(
            2048,
            flag="batch_tokens",
            at_least=1,
            may_change_on_resume=True,
            help="tokens per micro-batch of labelled texts, padding included",
        )

        def __post_init__(self) -> None:
            if len(set(self.classes)) < len(self.classes):
                raise UserError(f"classes names one twice, in {', '.join(self.classes)}: name each once")

    settings: Settings

    def prepare(self, request: DataRequest) -> PreparedLabels:
        prepared: Any = self.preparation(request).run()
        return replace(prepared, batch_tokens=self.settings.batch_tokens)

    def preparation(self, request: DataRequest) -> LabelPreparation:
        arguments, settings = request.for_preparation(self.corpus), self.settings
        details: Any = {"classes": settings.classes, "too_long": settings.too_long}
        return LabelPreparation(**arguments, **details, for_training=request.for_training)

    def corpus(self, data: Names, field: str) -> LabelCorpus:
        """The labelled texts that `data` names; raises `UserError` if there are none."""
        settings = self.settings
        return open_labels(data, field=field, label_field=settings.label_field, encoding=settings.encoding)

    def tokens_per_step(self, shape: BatchShape) -> int:
        return self.settings.batch_tokens * shape.micro_batches
