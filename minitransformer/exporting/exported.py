"""What leaves: the model of a run, and everything that its texts need."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minitransformer.exporting.copies import outputs_of
from minitransformer.generation.config import SamplingConfig
from minitransformer.generation.decode import generate
from minitransformer.generation.embedding import usual_pooling
from minitransformer.models.config import ModelConfig
from minitransformer.models.decoder import DecoderLM
from minitransformer.models.encoder_decoder import EncoderDecoder
from minitransformer.models.model import Model, build_model, in_full_precision
from minitransformer.pretrained.chat import published_special_tokens
from minitransformer.pretrained.checkpoint import Undrawn
from minitransformer.pretrained.originals import CHAT, FOLDER, original_fields, originals_of
from minitransformer.pretrained.sentences import sentence_settings
from minitransformer.pretrained.tokenizer_files import special_ids, target_ids
from minitransformer.runs import Run
from minitransformer.runs.begin import check_merges
from minitransformer.settings import with_settings
from minitransformer.text.chat_template import ChatTemplate
from minitransformer.text.templates import read_template
from minitransformer.text.tokenizers import Framing, Tokenizer
from minitransformer.text.tokenizers.spelled import encode_with_special_tokens

LEARNED = {
    "encoder": "masked_framing",
    "encoder-headless": "masked_framing",
    "encoder-classifier": "label_framing",
    "decoder-classifier": "label_framing",
    "encoder-decoder": "pair_framing",
}
"""what stands around a text of each topology; of any other, what its tokenizer says"""


@dataclass(frozen=True)
class Exported:
    """A run to export: its `model` in float32, without an adapter or matrices of few bits, from this checkpoint."""

    run: Run
    model: Model
    checkpoint: str

    @classmethod
    def of(cls, run: Run, checkpoint: str | None = None) -> Exported:
        """Raises `UserError` if the run has an adapter that its weights cannot take in."""
        check_merges(run)
        exported = cls(
            run, in_full_precision(run.load_model(checkpoint)).float().eval(), run.checkpoint(checkpoint).resolve().name
        )
        exported.originals  # noqa: B018  (what is damaged is reported before anything is written)
        return exported

    @cached_property
    def source(self) -> Tokenizer:
        """The tokenizer of what the model reads, with what stands around a text as the model has learned it."""
        return self._framed(self.run.tokenizer)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of what it writes, framed alike."""
        return self.source if len(self.run.tokenizers) == 1 else self._framed(self.run.target_tokenizer)

    def _framed(self, tokenizer: Tokenizer) -> Tokenizer:
        if self.originals is not None:
            return tokenizer
        framing: Framing = getattr(tokenizer, LEARNED.get(self.model.config.topology, "framing"))
        return tokenizer.framed(framing)

    @cached_property
    def originals(self) -> Path | None:
        """The files of an import that still describe the tokenizer."""
        return originals_of(self.run.path, self.run.tokenizer)

    @cached_property
    def template(self) -> ChatTemplate | None:
        return self.run.chat_template

    @property
    def template_source(self) -> str | None:
        """The run's own template; that of an import is among its `originals`."""
        own = self.run.path / CHAT
        return read_template(own) if own.is_file() else None

    @property
    def ends(self) -> list[int]:
        """The ids that end a text, and an answer where the run has learned to end it; an import says so itself."""
        has_own = self.template is not None and self.template_source is not None
        return list(dict.fromkeys(self.template.end_ids(self.tokenizer) if has_own else self.tokenizer.ends))  # type: ignore[union-attr]

    @property
    def special_tokens(self) -> dict[str, int]:
        """Special tokens by the names that they have outside."""
        return (published_special_tokens(self.run.path) if self.originals else {}) or self.source.special_tokens

    def fields(self) -> dict[str, Any]:
        """The fields of config.json on special tokens and classes."""
        ends: Any = self.ends if len(self.ends) > 1 else self.ends[0]
        if self.originals is not None:
            found = original_fields(self.originals)
            is_kept = not self.writes or set(_listed(found.get("eos_token_id"))) >= set(self.ends)
            return found if is_kept else {**found, "eos_token_id": ends}
        found = {**special_ids(self.tokenizer), "eos_token_id": ends}
        return found | (target_ids(self.tokenizer) if self.is_two_sided else {})

    def generation(self) -> dict[str, Any] | None:
        """An import's generation_config.json, with all that ends a text."""
        published = self.run.generation_config
        if published is None or set(_listed(published.get("eos_token_id"))) >= set(self.ends):
            return published
        return {**published, "eos_token_id": self.ends}

    @property
    def pooling(self) -> str:
        """How an encoder's hidden states become the embedding of a text."""
        settings = sentence_settings(self.run.path / FOLDER)
        return usual_pooling(self.model) if settings is None else settings.pooling

    def without_token_head(self) -> Exported:
        """The same run with the hidden states of its encoder alone, where it predicts masked tokens."""
        if self.model.config.topology != "encoder":
            return self
        with Undrawn():
            bare = build_model(headless(self.model.config)).eval()
        weights = self.model.state_dict()
        bare.load_state_dict({name: weights[name] for name in bare.state_dict()})
        return replace(self, model=bare)

    @property
    def writes(self) -> bool:
        """Whether its model generates texts."""
        return isinstance(self.model, DecoderLM | EncoderDecoder)

    @property
    def is_two_sided(self) -> bool:
        return self.model.config.topology == "encoder-decoder"

    def token_ids(self, text: str) -> list[int]:
        """The ids of `text` between the tokens that frame it; special tokens spelled out are the tokens."""
        ids = encode_with_special_tokens(self.source, text, self.special_tokens) if text else []
        return self.source.framing.around(ids)

    @torch.inference_mode()
    def outputs(self, *inputs: Tensor) -> Tensor:
        """The logits, of tokens if the model has several heads, or its hidden states."""
        return outputs_of(self.model, *inputs)

    def greedy(self, prompt: list[int], count: int) -> list[int] | None:
        """The most likely tokens after a prompt or for a source, as `sample.py` writes them; None if it writes none."""
        if isinstance(self.model, DecoderLM):
            sampling = SamplingConfig(temperature=0.0, max_new_tokens=count)
            return [token for [token] in generate(self.model, prompt, sampling, ends=self.ends)]
        if not isinstance(self.model, EncoderDecoder):
            return None
        source, target = torch.tensor([prompt]), [self.tokenizer.target_start]
        while len(target) <= count and target[-1] not in self.ends[: len(target) - 1]:
            target.append(int(self.outputs(source, torch.tensor([target]))[0, -1].argmax()))
        return target[1:]


def headless(config: ModelConfig) -> ModelConfig:
    """The configuration of an encoder of tokens without its head; any other as it is."""
    return with_settings(config, {"topology": "encoder-headless"}) if config.topology == "encoder" else config


def _listed(value: Any) -> list[int]:
    return value if isinstance(value, list) else [] if value is None else [value]
