"""`--format gguf`: one file for llama.cpp."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from minitransformer.exporting.copies import Copy
from minitransformer.exporting.exported import Exported
from minitransformer.exporting.families import added_biases, family_that_holds
from minitransformer.exporting.formats import ExportChoices, ExportFormat
from minitransformer.exporting.llama_cpp import COMPARISONS, LlamaCopy, ReadBack, has_llama_cpp
from minitransformer.models.config import ModelConfig
from minitransformer.pretrained.checkpoint import with_zero_biases
from minitransformer.pretrained.families import families_of
from minitransformer.pretrained.gguf_families import GGUFFamily
from minitransformer.pretrained.gguf_files import STORED, gguf_package, write_gguf
from minitransformer.pretrained.gguf_vocabularies import TEMPLATE
from minitransformer.pretrained.originals import CHAT
from minitransformer.pretrained.tokenizer_files import described
from minitransformer.pretrained.tokenizers import FILE
from minitransformer.text.templates import read_template

FILE_NAME = "model.gguf"


class GGUF(ExportFormat, name="gguf"):
    """One file for llama.cpp, in 16, 8 or 4 bits, with the tokenizer (bpe, bytes, gpt2 or cl100k_base) in it."""

    has_families = True
    weights = STORED
    comparisons = COMPARISONS

    def __init__(self, exported: Exported, choices: ExportChoices) -> None:
        super().__init__(exported, choices)
        gguf_package()
        self.family = family_that_holds(exported.model.config, choices.family, GGUFFamily)
        self.tolerance = GGUFFamily.named(self.family).tolerance

    @classmethod
    def holders(cls, config: ModelConfig) -> list[str]:
        return families_of(replace(config, vocab_size=config.vocab_size or 1), GGUFFamily)

    def about(self) -> dict[str, Any]:
        added = added_biases(self.exported.model.config, self.family, GGUFFamily)
        return {"family": self.family, "weights": self.stored, **added}

    def write(self, folder: Path) -> None:
        assert self.stored is not None
        self.write_as(self.stored, folder / FILE_NAME)

    def write_as(self, stored: str, path: Path) -> None:
        """Write the file with its matrices stored in another way."""
        originals = self.exported.originals
        file = None if originals is None else originals / FILE
        content = json.loads(file.read_text(encoding="utf-8")) if file is not None and file.is_file() else None
        tokenizer = described(self.exported.tokenizer) if content is None else content
        model = with_zero_biases(self.exported.model, GGUFFamily.named(self.family))
        write_gguf(model, path, self.family, stored, tokenizer, self._about())

    def _about(self) -> dict[str, Any]:
        """The metadata on special tokens and conversations."""
        exported, tokenizer = self.exported, self.exported.tokenizer
        fields, framing = exported.fields(), tokenizer.framing
        ids = {
            "bos": fields.get("bos_token_id"),
            "padding": fields.get("pad_token_id"),
            **dict(zip(("eos", "eot", "eom"), exported.ends, strict=False)),
        }
        about = {f"tokenizer.ggml.{name}_token_id": number for name, number in ids.items() if number is not None}
        about["tokenizer.ggml.add_bos_token"] = framing.prefix != ()
        about["tokenizer.ggml.add_eos_token"] = framing.suffix != ()
        if (template := self._template()) is not None:
            about[TEMPLATE] = template
        return {"general.name": exported.run.path.resolve().name, **about}

    def _template(self) -> str | None:
        own, originals = self.exported.template_source, self.exported.originals
        if own is None and originals is not None and (originals / CHAT).is_file():
            return read_template(originals / CHAT)
        return own

    def open(self, folder: Path) -> Copy:
        kind = LlamaCopy if has_llama_cpp() else ReadBack
        return kind(folder / FILE_NAME, self)
