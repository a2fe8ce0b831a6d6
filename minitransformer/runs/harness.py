"""Runs as models of the lm-evaluation-harness, which scores them as its `hf` model scores their exports.

    from lm_eval import simple_evaluate
    from minitransformer.runs.harness import RunModel

    simple_evaluate(model=RunModel("runs/NAME"), tasks=["arc_easy"])

Gao et al. 2021 (github.com/EleutherAI/lm-evaluation-harness).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from minitransformer.errors import UserError
from minitransformer.generation.config import SamplingConfig
from minitransformer.generation.likelihoods import Continuation, log_likelihoods
from minitransformer.generation.streaming import texts_in_batches
from minitransformer.runs.choosing import ChoiceScorer
from minitransformer.runs.open import Run

try:
    from lm_eval.api.model import TemplateLM
    from lm_eval.models.utils import normalize_gen_kwargs
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ImportError:
    raise UserError("the harness needs lm_eval, which is not installed: pip install 'minitransformer[eval]'") from None


class RunModel(TemplateLM):
    """The decoder of a run; raises `UserError` for a run of another model.

    A score is the same bits whatever `batch_size`, which is the number of texts to generate at a time. A text that is
    longer than the context of the model loses its beginning, as those of the `hf` model do.
    """

    def __init__(
        self, run: str | Path, *, checkpoint: str | None = None, device: str = "cpu", batch_size: int | str = 16
    ) -> None:
        super().__init__()
        scorer = ChoiceScorer.of_run(Run.open(Path(run)), checkpoint, device)
        self.model, self.run_tokenizer, self.cased = scorer.model, scorer.tokenizer, scorer.cased
        self.batch_size = int(batch_size)

    @property
    def tokenizer_name(self) -> str:
        """What tells cached requests of one tokenizer from those of another."""
        return self.run_tokenizer.fingerprint

    @property
    def max_length(self) -> int:
        """The most tokens that the model reads."""
        return self.model.config.text_length

    @property
    def eot_token_id(self) -> int:
        return self.run_tokenizer.end_of_text

    @property
    def prefix_token_id(self) -> int:
        """The first token of a text without a context."""
        return self.run_tokenizer.encode_prompt("")[0]

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """The ids of a text, after the framing's prefix unless `add_special_tokens` is False."""
        prefix = () if add_special_tokens is False else self.run_tokenizer.framing.prefix
        return [*prefix, *self.run_tokenizer.encode(self.cased(string))]

    def _loglikelihood_tokens(
        self, requests: Iterable[tuple[Any, list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        texts = [self._fitted(context, ids) for _, context, ids in requests]
        return [(score.nats, score.is_greedy) for score in log_likelihoods(self.model, texts)]

    def _fitted(self, context: Sequence[int], ids: Sequence[int]) -> Continuation:
        """A text whose last token is not read, without the beginning for which there is no room."""
        if not 0 < len(ids) <= self.max_length:
            raise UserError(f"a text to score has {len(ids)} tokens, and the model scores 1 to {self.max_length}")
        room = self.max_length + 1 - len(ids)
        return Continuation(tuple(context[-room:]), tuple(ids))

    def loglikelihood_rolling(self, requests: Iterable[Any], disable_tqdm: bool = False) -> list[float]:
        """log p of whole texts, in windows that do not overlap but for one token."""
        found = []
        for (text,) in (request.args for request in requests):
            windows = get_rolling_token_windows(self.tok_encode(text), self.prefix_token_id, self.max_length, 1)
            scored = self._loglikelihood_tokens([(None, *make_disjoint_window(window)) for window in windows])
            found.append(sum(nats for nats, _ in scored))
        return found

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """The continuation of each context, up to one of its stop strings."""
        by_settings: dict[str, list[int]] = {}
        for place, request in enumerate(requests):
            by_settings.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(place)
        found = [""] * len(requests)
        for settings, places in by_settings.items():
            sampling = sampling_of(json.loads(settings))
            room = self.max_length - sampling.max_new_tokens
            if room < 1:
                raise UserError(
                    f"{sampling.max_new_tokens} tokens are to be generated, and the model sees {self.max_length}: "
                    "ask for fewer with max_gen_toks"
                )
            prompts = [self.tok_encode(requests[place].args[0])[-room:] for place in places]
            texts = texts_in_batches(self.model, self.run_tokenizer, prompts, sampling, self.batch_size)
            for place, text in zip(places, texts, strict=True):
                found[place] = text
        return found


def sampling_of(settings: dict[str, Any]) -> SamplingConfig:
    """The harness's settings of generation as ours; raises `UserError` for those that we do not have."""
    known = normalize_gen_kwargs(settings)
    sampled = known.pop("do_sample")
    length, stop = known.pop("max_gen_toks"), tuple(filter(None, known.pop("until")))
    temperature = known.pop("temperature", 1.0) if sampled else 0.0
    return SamplingConfig(max_new_tokens=length, stop=stop, temperature=temperature, seed=0, **known)
