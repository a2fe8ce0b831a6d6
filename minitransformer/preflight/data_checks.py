"""Data, tokenizer, and the weights that a run starts from."""

from __future__ import annotations

from minitransformer.amounts import amount, size
from minitransformer.preflight.candidate import Candidate
from minitransformer.preflight.check import Finding, PreflightCheck
from minitransformer.preflight.data_state import bytes_per_token
from minitransformer.runs.begin import check_fits_run, check_has_base
from minitransformer.runs.resume import changed_settings, check_can_resume, check_same_text
from minitransformer.text.corpora import named
from minitransformer.training.logging import TensorBoard

MOST_EPOCHS = 16
"""repetitions of a text from which it has little left to teach: Muennighoff et al. 2023 (arXiv 2305.16264)"""


class StartCheck(PreflightCheck, name="start"):
    """The weights that it starts from, and the settings that may not change."""

    def find(self, candidate: Candidate) -> Finding:
        if candidate.config.training.tensorboard:
            TensorBoard.check()
        if candidate.resumed is not None:
            check_can_resume(candidate.resumed)
            changed_settings(candidate.resumed.config, candidate.config)
            at = "step 0" if candidate.start is None else candidate.start.name
            return Finding("ok", f"{at}, {candidate.steps_left:,} steps to do")
        if candidate.parent is not None:
            check_fits_run(candidate.parent, candidate.config)
            assert candidate.start is not None
            return Finding("ok", f"{candidate.start.name} of {candidate.parent.path.name}")
        check_has_base(candidate.config)
        return Finding("ok", f"new weights, {candidate.steps_left:,} steps to do")


class DataCheck(PreflightCheck, name="data"):
    """Whether the data can be read, how much there is, and how often it would be read."""

    def find(self, candidate: Candidate) -> Finding:
        data, config = candidate.data, candidate.whole
        if data.error is not None:
            raise data.error
        if data.prepared is not None and candidate.resumed is not None:
            check_same_text(candidate.resumed, config, data.prepared)
        if data.unmade is not None:
            return Finding("note", f"recipe {data.unmade} is not made yet", "train.py makes it, or downloads its text")
        if data.tokens is None:
            return Finding("ok", f"{named(config.data.data)}: fresh pairs for every batch")
        return self._amount(candidate, data.tokens)

    def _amount(self, candidate: Candidate, tokens: int) -> Finding:
        config, data = candidate.whole, candidate.data
        ratio, epochs = tokens / candidate.parameters, config.training.steps * config.tokens_per_step / tokens
        figures = {
            "tokens": tokens,
            "tokens_per_parameter": ratio,
            "epochs": epochs,
            "estimated": data.size is not None,
        }
        if data.size is not None:
            return Finding(
                "note",
                f"{size(data.size)}, about {amount(tokens)} tokens, {ratio:.3g} per parameter, are not prepared",
                f"train.py reads them once, and writes about {size(cache_size(candidate))}",
                figures,
            )
        text = f"{amount(tokens)} tokens, {ratio:.3g} per parameter, read {amount(epochs)} times"
        if epochs > MOST_EPOCHS:
            return Finding("note", text, "give more data or fewer --steps, or watch the validation loss", figures)
        return Finding("ok", text, figures=figures)


def cache_size(candidate: Candidate) -> int:
    """Bytes that preparing its data would write; 0 if it is prepared, or generated."""
    size_of_text = (candidate.data.size or 0) - candidate.data.tokenized
    vocabulary = candidate.whole.model.vocab_size or 0
    return (2 if vocabulary <= 1 << 16 else 4) * (size_of_text // bytes_per_token(candidate.whole))


class TokenizerCheck(PreflightCheck, name="tokenizer"):
    """The tokenizer beside the model: vocabulary, special tokens and length."""

    def find(self, candidate: Candidate) -> Finding:
        config, prepared = candidate.whole, candidate.data.prepared
        model, length = config.model, config.sequence_length
        lengths = f"length {length:,} of {model.context_length:,}"
        if prepared is None:
            return Finding("ok", f"{config.data.tokenizer}, {model.vocab_size or 0:,} tokens as usual; {lengths}")
        tokenizer = prepared.tokenizer
        figures = {
            "tokenizer": tokenizer.name,
            "tokens": tokenizer.vocab_size,
            "vocab_size": model.vocab_size,
            "special_tokens": list(tokenizer.special_tokens),
            "sequence_length": length,
        }
        vocabulary = f"{tokenizer.vocab_size:,} of {model.vocab_size or 0:,} rows"
        return Finding("ok", f"{tokenizer.name}, {vocabulary}; {lengths}", figures=figures)
