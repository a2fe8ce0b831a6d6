"""`--format hf`: a folder of the transformers library."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from minitransformer import pretrained
from minitransformer.exporting.copies import Copy
from minitransformer.exporting.exported import Exported
from minitransformer.exporting.families import added_biases, family_that_holds
from minitransformer.exporting.formats import ExportChoices, ExportFormat
from minitransformer.exporting.library import LibraryCopy, OwnCopy, class_of
from minitransformer.models.config import ModelConfig
from minitransformer.pretrained.families import families_of


class HuggingFace(ExportFormat, name="hf"):
    """config.json, safetensors and the files of the tokenizer, for the transformers library."""

    has_families = True

    def __init__(self, subject: Exported, wanted: ExportChoices) -> None:
        super().__init__(subject, wanted)
        self.family = family_that_holds(subject.model.config, wanted.family)

    @classmethod
    def holders(cls, config: ModelConfig) -> list[str]:
        return families_of(replace(config, vocab_size=config.vocab_size or 1))

    def about(self) -> dict[str, Any]:
        return {"family": self.family, **added_biases(self.exported.model.config, self.family)}

    def write(self, folder: Path) -> None:
        subject = self.exported
        pretrained.write_public(
            subject.model,
            folder,
            self.family,
            subject.fields(),
            tokenizer=subject.tokenizer,
            originals=subject.originals,
            generation=subject.generation(),
            chat_template=subject.template_source,
        )

    def open(self, folder: Path) -> Copy:
        model_class, runtime = class_of(folder)
        if model_class is None:
            return OwnCopy(folder, runtime)
        return LibraryCopy(folder, model_class, runtime, self.exported.tokenizer.target_start)
