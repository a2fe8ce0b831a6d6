"""Pairs of texts, such as sentences and their translations."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from minitransformer.errors import UserError
from minitransformer.settings import setting
from minitransformer.text.datasets.base import BatchShape, DataRequest, Dataset, Names, one_file
from minitransformer.text.datasets.generated_pairs import generate_pairs, generates_pairs
from minitransformer.text.datasets.pair_data import PairData
from minitransformer.text.datasets.pair_preparation import PairPreparation
from minitransformer.text.pairs import PairCorpus, open_pairs


class Pairs(Dataset, name="pairs"):
    """Sources and targets: of a .tsv or .jsonl, of two files whose lines belong together, or made up by a recipe."""

    cuts_text = False

    @dataclass(frozen=True)
    class Settings:
        target_data: str | None = setting(
            None,
            flag="target_data",
            of_files=True,
            may_change_on_resume=True,
            changes_task=True,
            help="the file whose lines belong to those of data",
        )
        validation_target_data: str | None = setting(
            None,
            flag="validation_target_data",
            of_files=True,
            may_change_on_resume=True,
            changes_task=True,
            help="the file whose lines belong to those of validation_data",
        )
        source_field: str = setting(
            "source",
            flag="source_field",
            of_files=True,
            changes_task=True,
            help="field of each .jsonl line that holds the source",
        )
        target_field: str = setting(
            "target",
            flag="target_field",
            of_files=True,
            changes_task=True,
            help="field of each .jsonl line that holds the target",
        )
        lowercase: bool = setting(
            False, flag="lowercase", changes_task=True, help="lower-case the text, also what is translated later"
        )
        separate_vocabularies: bool = setting(
            False, flag="separate_vocabularies", changes_tokens=True, help="fit a vocabulary to each side"
        )
        too_long: Literal["skip", "cut"] = setting(
            "skip", flag="too_long", changes_task=True, help="what to do with a side that is longer than the context"
        )
        batch_tokens: int = setting(
            2048,
            flag="batch_tokens",
            at_least=1,
            may_change_on_resume=True,
            help="tokens in a micro-batch, padding included, on the side that has more",
        )

    settings: Settings

    def check(self, validation_data: Names | None) -> None:
        if (target := self.settings.validation_target_data) is not None and validation_data is None:
            raise UserError(f"validation_target_data is {target!r} without validation_data: name both files")

    def prepare(self, request: DataRequest) -> PairData:
        name = one_file(request.data)
        validation = None if request.validation_data is None else one_file(request.validation_data)
        made_up = generates_pairs(name)
        data = self._generated(name, request) if made_up else self._of_files(name, validation, request)
        return replace(data, batch_tokens=self.settings.batch_tokens)

    def tokens_per_step(self, shape: BatchShape) -> int:
        return 2 * self.settings.batch_tokens * shape.micro_batches

    def cased(self, text: str) -> str:
        return text.lower() if self.settings.lowercase else text

    def _of_files(self, name: str, validation: str | None, request: DataRequest) -> PairData:
        tokenizers = request.tokenizers
        return PairPreparation(
            self._opened(name, self.settings.target_data),
            tokenizers[0] if tokenizers else request.tokenizer,
            target_tokenizer=tokenizers[1] if len(tokenizers) > 1 else None,
            separate=self.settings.separate_vocabularies,
            vocab_size=request.vocab_size,
            validation=None if validation is None else self._opened(validation, self.settings.validation_target_data),
            validation_fraction=request.validation_fraction,
            context_length=request.context_length,
            too_long=self.settings.too_long,
        ).run()

    def _opened(self, name: str, target_name: str | None) -> PairCorpus:
        settings = self.settings
        fields = {"source_field": settings.source_field, "target_field": settings.target_field}
        return open_pairs(name, target_name, **fields, lowercase=settings.lowercase)

    def _generated(self, name: str, request: DataRequest) -> PairData:
        """There is no text to fit a tokenizer to, but bytes need none."""
        settings = self.settings
        files = {
            "target_data": settings.target_data,
            "validation_data": request.validation_data,
            "validation_target_data": settings.validation_target_data,
        }
        for flag, value in files.items():
            if value is not None:
                raise UserError(f"{flag} is {value!r}, and nothing would read it: {name} makes its pairs up")
        if not request.tokenizers and request.tokenizer != "bytes":
            raise UserError(f"{name} makes pairs up as bytes, not {request.tokenizer}: --tokenizer bytes")
        if settings.separate_vocabularies:
            raise UserError(f"{name} has one vocabulary, bytes, for both sides: leave --separate-vocabularies out")
        tokenizer = request.tokenizers[0] if request.tokenizers else None
        return generate_pairs(name, tokenizer, context_length=request.context_length)
