"""`--format gguf`: one file for llama.cpp."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from minitransformer.exporting.copies import Copy
from minitransformer.exporting.exported import Exported, headless
from minitransformer.exporting.families import added_biases, family_that_holds
from minitransformer.exporting.formats import ExportChoices, ExportFormat
from minitransformer.exporting.llama_cpp import COMPARISONS, LlamaCopy, ReadBack, has_llama_cpp
from minitransformer.models.config import ModelConfig
from minitransformer.pretrained.checkpoint import with_zero_biases
from minitransformer.pretrained.families import families_of
from minitransformer.pretrained.gguf_encoders import CLASSES, POOLING, POOLINGS, RANK
from minitransformer.pretrained.gguf_families import GGUFFamily
from minitransformer.pretrained.gguf_files import START, STORED, gguf_package, write_gguf
from minitransformer.pretrained.gguf_vocabularies import TEMPLATE
from minitransformer.pretrained.originals import CHAT, class_names
from minitransformer.pretrained.tokenizer_files import described
from minitransformer.pretrained.tokenizers import content_of_folder
from minitransformer.registry import lookup
from minitransformer.text.templates import read_template

FILE_NAME = "model.gguf"
HOLDS = {"encoder-headless": "hidden states, as llama.cpp has no head for masked tokens"}


class GGUF(ExportFormat, name="gguf"):
    """One file for llama.cpp, in 16, 8 or 4 bits, with its tokenizer (not chars) in it; encoders as hidden states."""

    has_families = True
    weights = STORED
    comparisons = COMPARISONS

    def __init__(self, exported: Exported, choices: ExportChoices) -> None:
        super().__init__(exported.without_token_head(), choices)
        gguf_package()
        self.family = family_that_holds(self.exported.model.config, choices.family, GGUFFamily)
        self.tolerance = GGUFFamily.named(self.family).tolerance_for(self.exported.model.config)

    @classmethod
    def holders(cls, config: ModelConfig) -> list[str]:
        return families_of(headless(replace(config, vocab_size=config.vocab_size or 1)), GGUFFamily)

    def about(self) -> dict[str, Any]:
        config = self.exported.model.config
        holds = {"holds": HOLDS[config.topology]} if config.topology in HOLDS else {}
        return {"family": self.family, "weights": self.stored, **holds, **added_biases(config, self.family, GGUFFamily)}

    def write(self, folder: Path) -> None:
        assert self.stored is not None
        self.write_as(self.stored, folder / FILE_NAME)

    def write_as(self, stored: str, path: Path) -> None:
        """Write the file with its matrices stored in another way."""
        originals = self.exported.originals
        content = None if originals is None else content_of_folder(originals)
        tokenizer = described(self.exported.tokenizer) if content is None else content
        model = with_zero_biases(self.exported.model, GGUFFamily.named(self.family))
        write_gguf(model, path, self.family, stored, tokenizer, self._about())

    def _about(self) -> dict[str, Any]:
        """The metadata on special tokens and conversations."""
        exported, tokenizer = self.exported, self.exported.tokenizer
        fields, framing = exported.fields(), tokenizer.framing
        ids = {
            "bos": next(iter(framing.prefix), fields.get("bos_token_id")),
            "padding": fields.get("pad_token_id"),
            **dict(zip(("eos", "eot", "eom"), exported.ends, strict=False)),
        }
        about = {f"tokenizer.ggml.{name}_token_id": number for name, number in ids.items() if number is not None}
        about["tokenizer.ggml.add_bos_token"] = framing.prefix != ()
        about["tokenizer.ggml.add_eos_token"] = framing.suffix != ()
        if (template := self._template()) is not None:
            about[TEMPLATE] = template
        of_family = {f"{self.family}.{key}": value for key, value in self._about_family().items()}
        return {"general.name": exported.run.path.resolve().name, **about, **of_family}

    def _about_family(self) -> dict[str, Any]:
        """The metadata on how a text becomes classes or an embedding, and on how a target starts."""
        exported = self.exported
        if exported.is_two_sided:
            return {START: exported.tokenizer.target_start}
        if (classes := exported.model.config.num_classes) is not None:
            return {POOLING: RANK, CLASSES: class_names(exported.run.path, classes)}
        return {} if exported.writes else {POOLING: lookup("pooling of GGUF files", exported.pooling, POOLINGS)}

    def _template(self) -> str | None:
        own, originals = self.exported.template_source, self.exported.originals
        if own is None and originals is not None and (originals / CHAT).is_file():
            return read_template(originals / CHAT)
        return own

    def open(self, folder: Path) -> Copy:
        kind = LlamaCopy if has_llama_cpp() else ReadBack
        return kind(folder / FILE_NAME, self)
