"""Embeddings of texts by the model of a run, or of a public checkpoint that is no run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from jaxtyping import Float
from torch import Tensor

from minitransformer import pretrained
from minitransformer.architecture.pooling import POOLINGS
from minitransformer.errors import UserError
from minitransformer.generation.embedding import embed_in_batches, framing_of_text, text_embeddings, usual_pooling
from minitransformer.models.model import Model
from minitransformer.pretrained.checkpoint import is_checkpoint
from minitransformer.pretrained.gguf_files import is_gguf
from minitransformer.pretrained.originals import FOLDER
from minitransformer.pretrained.sentences import SentenceSettings, sentence_settings
from minitransformer.pretrained.vocabularies import how_to_make_one
from minitransformer.runs.begin import check_merges
from minitransformer.runs.open import Run
from minitransformer.text.tokenizers import Tokenizer


class Embedder:
    """A model, and how it turns texts into vectors; raises `UserError` where it cannot.

    `num_cut` counts the texts that were longer than what the model reads, and lost their end.
    """

    def __init__(
        self, model: Model, tokenizer: Tokenizer, settings: SentenceSettings, cased: Callable[[str], str] = str
    ) -> None:
        if settings.pooling not in POOLINGS:
            known = ", ".join(POOLINGS)
            raise UserError(f"the pooling is {settings.pooling!r}, and known are {known}: choose one with --pooling")
        if settings.prompt and not settings.pools_prompt:
            raise UserError(
                f"the prompt {settings.prompt!r} is to be left out of the pooling, which is not supported: "
                "put it into each text, or give --prompt ''"
            )
        self.model, self.tokenizer, self.settings, self.cased = model, tokenizer, settings, cased
        self.framing = framing_of_text(model, tokenizer)
        longest = model.config.context_length
        self.room = min(settings.most_tokens or longest, longest) - self.framing.length
        if self.room < 1:
            raise UserError(f"the model reads {self.room + self.framing.length} tokens, too few for any text")
        self.num_cut = 0

    def embeddings(self, texts: Iterable[str], batch_size: int) -> Iterator[Float[Tensor, "d_model"]]:
        """The embedding of each text in turn, computed `batch_size` at a time."""
        return self.embeddings_of(map(self.tokens, texts), batch_size)

    def embeddings_of(self, texts: Iterable[Sequence[int]], batch_size: int) -> Iterator[Float[Tensor, "d_model"]]:
        """`embeddings` of texts whose tokens are given as the model reads them."""
        pool, normalise = POOLINGS[self.settings.pooling], self.settings.normalised
        of_batch = partial(text_embeddings, self.model, pool=pool, normalise=normalise)
        return embed_in_batches(texts, batch_size, of_batch)

    def tokens(self, text: str) -> list[int]:
        """The tokens of `text` as the model reads them: stripped, after the prompt, cut at the end."""
        text = (self.settings.prompt + text).strip()
        ids = self.tokenizer.encode(self.cased(text.lower() if self.settings.lower_case else text))
        self.num_cut += len(ids) > self.room
        return self.framing.around(ids[: self.room]) or [self.tokenizer.end_of_text]


def open_embedder(name: str, checkpoint: str | None = None, device: str = "cpu", **wanted: Any) -> Embedder:
    """The embedder of the run folder or public checkpoint `name`.

    It embeds as its folder says, and else by its usual pooling without normalisation. `wanted` are settings that
    replace those, where they are not None.
    """
    if is_checkpoint(name):
        if checkpoint is not None:
            raise UserError(f"--checkpoint {checkpoint} is for runs, and {name} is a public checkpoint: leave it out")
        with pretrained.checkpoint_files(name) as folder:
            model, tokenizer = pretrained.load(name if is_gguf(name) else folder)
            if tokenizer is None:
                raise UserError(how_to_make_one(name))
            return Embedder(model.to(device), tokenizer, _settings(folder, model, wanted))
    run = Run.open(Path(name))
    check_merges(run)
    return embedder_of(run, run.load_model(checkpoint, device), **wanted)


def embedder_of(run: Run, model: Model, **wanted: Any) -> Embedder:
    """The embedder of a model of `run`, which embeds as `open_embedder` says."""
    return Embedder(model, run.tokenizer, _settings(run.path / FOLDER, model, wanted), run.cased)


def _settings(folder: Path, model: Model, wanted: dict[str, Any]) -> SentenceSettings:
    settings = sentence_settings(folder) or SentenceSettings(usual_pooling(model), normalised=False)
    return replace(settings, **{name: value for name, value in wanted.items() if value is not None})
