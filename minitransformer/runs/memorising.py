"""What a language model repeats of the text that it has learned: verbatim, unprompted, and of planted secrets."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from random import Random
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from minitransformer.errors import UserError
from minitransformer.evaluation.exposure import Exposure, exposure
from minitransformer.evaluation.memorisation import Extraction
from minitransformer.generation.config import SamplingConfig
from minitransformer.generation.decode import generate
from minitransformer.generation.scoring import score_texts
from minitransformer.models.decoder import DecoderLM
from minitransformer.runs.evaluating import HeldOutData
from minitransformer.runs.open import Run
from minitransformer.runs.resume import check_same_text
from minitransformer.text.canaries import Canary
from minitransformer.text.spans import count_spans
from minitransformer.text.token_files import TokenSource
from minitransformer.text.tokenizers import Tokenizer
from minitransformer.training.objectives import Causal

TokenTexts = npt.NDArray[np.int64]
ROWS = 16
"""texts that are generated at a time"""


@dataclass(frozen=True)
class LearnedText:
    """The tokens that a model has learned, and those that were held out; the latter may be empty."""

    training: TokenSource
    validation: TokenSource

    @classmethod
    def of_run(cls, run: Run) -> LearnedText:
        """The training text of `run`; raises `UserError` if it has none, or if it has changed since."""
        _check_objective(run)
        if not run.text:
            raise UserError(f"{run.path} was imported, without the text that it has learned: name that with --data")
        prepared = run.config.prepare(run.tokenizers)
        check_same_text(run, run.config, prepared)
        return cls(prepared.targets("train"), prepared.targets("validation"))

    @classmethod
    def of_files(cls, run: Run, data: Sequence[str]) -> LearnedText:
        """All of `data`, in the tokens of `run`."""
        _check_objective(run)
        return cls(HeldOutData.of_files(run, data, None).prepared.targets("train"), np.empty(0, np.uint16))


def _check_objective(run: Run) -> None:
    objective = run.config.training.objective
    if objective.variant is not Causal:
        raise UserError(
            "memorisation is measured for models that predict the next token of a text, and the objective of "
            f"{run.path} is {objective.name}: name another run"
        )


def draw_texts(tokens: TokenSource, length: int, count: int, seed: int) -> TokenTexts:
    """[texts, length] of `tokens` at random places, `count` of them or as many as there are places."""
    places = max(0, len(tokens) - length + 1)
    begins = np.random.default_rng(seed).choice(places, min(count, places), replace=False) if places else np.arange(0)
    return np.asarray(tokens[np.sort(begins)[:, None] + np.arange(length)]).astype(np.int64)


def extract(model: DecoderLM, texts: TokenTexts, prefix: int) -> Extraction:
    """How far greedy decoding continues the first `prefix` tokens of each of `texts` [texts, length] as it goes on."""
    _, likeliest = score_texts(model, torch.from_numpy(texts))
    verbatim = likeliest[:, prefix - 1 :].long().cumprod(1).sum(1)
    return Extraction(verbatim.numpy(), texts.shape[1] - prefix)


def write_texts(
    model: DecoderLM, tokenizer: Tokenizer, count: int, length: int, seed: int, temperature: float
) -> Iterator[TokenTexts]:
    """Unprompted texts [some, length] in batches, `count` in all; a document that ends is followed by another."""
    generator = torch.Generator().manual_seed(seed)
    for done in range(0, count, ROWS):
        rows = min(ROWS, count - done)
        sampling = SamplingConfig(num_samples=rows, max_new_tokens=length, temperature=temperature)
        steps = generate(model, tokenizer.separator, sampling, generator=generator, vocab_size=tokenizer.vocab_size)
        yield np.array(list(steps), np.int64).T


@dataclass(frozen=True)
class CanaryResult:
    """What is left of a planted canary: how often it stands in the training text, and what the model knows of it."""

    canary: Canary
    in_training: int
    exposure: Exposure
    is_written: bool
    """whether greedy decoding completes the secret"""

    def to_json(self) -> dict[str, Any]:
        about = {"text": self.canary.text, "planted": self.canary.times, "in_training": self.in_training}
        return {**about, **self.exposure.to_json(), "written": self.is_written}


@dataclass(frozen=True)
class CanaryScorer:
    """A model that tells planted secrets from `others` that might have been planted."""

    model: DecoderLM
    tokenizer: Tokenizer
    others: int
    seed: int

    def results(self, canaries: Sequence[Canary], training: TokenSource) -> Iterator[CanaryResult]:
        """The result of each canary in turn; `training` is the text that it may stand in, as a document of its own."""
        counts = count_spans([self.tokenizer.encode(canary.text) for canary in canaries], training)
        for canary, count in zip(canaries, counts.tolist(), strict=True):
            yield self._result(canary, count)

    def _result(self, canary: Canary, count: int) -> CanaryResult:
        secrets = canary.other_secrets(self.others, Random(f"{self.seed} {canary.before}"))
        nats = self._nats([canary.text, *map(canary.with_secret, secrets)])
        return CanaryResult(canary, count, exposure(nats[0], nats[1:], canary.num_secrets), self._is_written(canary))

    def _document(self, text: str) -> list[int]:
        """The ids of a document of the training text, as long as the model reads."""
        ids = [*self.tokenizer.separator, *self.tokenizer.encode(text)]
        if len(ids) - 1 > self.model.config.text_length:
            raise UserError(
                f"the canary {text!r} has {len(ids) - 1} tokens, and the model reads {self.model.config.text_length}: "
                "plant a shorter one"
            )
        return ids

    def _nats(self, texts: Sequence[str]) -> npt.NDArray[np.float64]:
        """−log p of each of `texts`, of which those of one length in tokens share batches."""
        documents = [self._document(text) for text in texts]
        lengths = np.array([len(ids) for ids in documents])
        found = np.empty(len(texts))
        for length in np.unique(lengths):
            places = np.flatnonzero(lengths == length)
            nats, _ = score_texts(self.model, torch.tensor([documents[place] for place in places]))
            found[places] = nats.double().sum(1).numpy()
        return found

    def _is_written(self, canary: Canary) -> bool:
        """Whether the tokens from the first one of the secret to the last one are what greedy decoding writes."""
        ids = self._document(canary.before + canary.secret)
        start = self._document(canary.before)
        shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(start, ids, strict=False)))
        _, likeliest = score_texts(self.model, torch.tensor([ids]))
        return bool(likeliest[0, shared - 1 :].all())
