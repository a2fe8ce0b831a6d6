"""The data of a run before it starts: prepared, preparable within seconds, not yet, or unusable."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from minitransformer.errors import UserError
from minitransformer.text import recipes
from minitransformer.text.corpora import open_corpus
from minitransformer.text.datasets import Conversations, Labels, NotPrepared, Pairs, PreparedData
from minitransformer.text.datasets.conversation_preparation import PreparedConversations
from minitransformer.text.datasets.label_preparation import PreparedLabels
from minitransformer.text.datasets.pair_data import PreparedPairs
from minitransformer.text.datasets.text import PreparedText, TooShort
from minitransformer.text.shard_index import ShardIndex, index_in
from minitransformer.text.token_files import Ragged, TokenPairs
from minitransformer.text.tokenizers import Bytes, Tokenizer
from minitransformer.training.config import RunConfig, with_usual_vocabulary
from minitransformer.training.finetuning import prepare_fine_tuning

QUICK = 16_000_000
"""bytes of text that are prepared within seconds"""
CHARACTERS = 1000
"""vocabularies below this size are of bytes or characters"""
BYTES_PER_TOKEN = 4
"""of text, by larger vocabularies"""


@dataclass(frozen=True)
class DataState:
    """`prepared` data with the configuration that it fits, or why there is none: an `error`, or it is `unprepared`."""

    config: RunConfig
    prepared: PreparedData | None = None
    error: UserError | None = None
    unmade: str | None = None
    """recipe that has not been made"""
    size: int | None = None
    """bytes of unprepared text"""
    tokenized: int = 0
    """about how many of these are tokens already, and are not written again"""

    @property
    def tokens(self) -> int | None:
        """Number of training tokens, estimated from the size of unprepared text; None if unknown or endless."""
        if self.prepared is not None:
            try:
                return self.prepared.num_tokens("train")
            except UserError:  # generated without end
                return None
        return None if self.size is None else self.size // bytes_per_token(self.config)


def bytes_per_token(config: RunConfig) -> int:
    """About how many bytes of text a token of the configured tokenizer has."""
    return 1 if (with_usual_vocabulary(config).vocab_size or 0) < CHARACTERS else BYTES_PER_TOKEN


def data_state(config: RunConfig, tokenizers: Sequence[Tokenizer], usual: RunConfig | None) -> DataState:
    """The state of the data of `config`, prepared if it is cached, or if that takes seconds.

    `tokenizers` are those of a resumed run or a parent; `usual` are the defaults of a fine-tune.
    """
    try:
        if (recipe := _unmade(config)) is not None:
            return DataState(config, unmade=recipe)
        if not _is_cached(config, tokenizers) and (size := text_size(config)) > QUICK:
            return DataState(config, size=size, tokenized=tokenized_size(config))
        if usual is not None:
            return DataState(*prepare_fine_tuning(config, usual, tokenizers))
        return DataState(config, config.prepare(tokenizers))
    except UserError as error:
        return DataState(config, error=error)


def _is_cached(config: RunConfig, tokenizers: Sequence[Tokenizer]) -> bool:
    with suppress(TooShort):
        try:
            config.prepare(tokenizers, only_cached=True)
        except NotPrepared:
            return False
    return True


def _names(config: RunConfig) -> list[str]:
    data = config.data
    sources = [each for each in (data.data, data.validation_data) if each is not None]
    return [name for each in sources for name in ([each] if isinstance(each, str) else each)]


def _unmade(config: RunConfig) -> str | None:
    if config.data.dataset.variant is not Pairs:
        for name in _names(config):
            if name in recipes.known() and not recipes.made_at(name, recipes.load_recipe(name)).exists():
                return name
    return None


def text_size(config: RunConfig) -> int:
    """Bytes of the files of `config`."""
    data, dataset = config.data, config.data.dataset
    if dataset.variant.cuts_text and (index := index_in(data.data)) is not None:
        found = ShardIndex.read(index)
        return sum(found.size(shard) for shard in found.all if shard.is_text) + tokenized_size(config)
    if dataset.variant.cuts_text:
        return sum(open_corpus(name, data.field).size for name in (data.data, data.validation_data) if name is not None)
    if isinstance(labels := dataset.make(), Labels):
        return sum(
            labels.corpus(name, data.field).size for name in (data.data, data.validation_data) if name is not None
        )
    targets = [getattr(dataset.settings, name, None) for name in ("target_data", "validation_target_data")]
    return sum(Path(name).expanduser().stat().st_size for name in (*_names(config), *targets) if name is not None)


def tokenized_size(config: RunConfig) -> int:
    """About how many bytes of the text are tokens already, in shards of an index."""
    if not config.data.dataset.variant.cuts_text or (path := index_in(config.data.data)) is None:
        return 0
    index = ShardIndex.read(path)
    tokens = [shard for shard in index.all if not shard.is_text]
    bytes_each = index.token_bytes if tokens else 1
    return sum(index.size(shard) // bytes_each for shard in tokens) * bytes_per_token(config)


def stand_in(config: RunConfig) -> PreparedData:
    """Data of the shape that `config` reads, in place of data that is not prepared: all pairs have full length."""
    tokenizer = Bytes().with_special_tokens(config.training.objective.variant.special_tokens)
    length, training = config.sequence_length, config.training
    if config.data.dataset.variant is Conversations:
        return _full_conversations(config, tokenizer)
    if config.data.dataset.variant.cuts_text:
        tokens = np.zeros((training.batch_size * training.grad_accumulation + 3) * length + 1, np.uint16)
        return PreparedText(Path(), tokenizer, tokens, tokens, len(tokens), len(tokens), 1, 1, "given")
    batch_tokens = config.data.dataset.settings.batch_tokens
    count = training.grad_accumulation * max(1, batch_tokens // length)
    side = Ragged.join([np.zeros(length - 1, np.uint16)] * count, np.dtype("<u2"))
    pairs = TokenPairs(side, side)
    if config.data.dataset.variant is Labels:
        label = Ragged.join([np.zeros(1, np.uint16)] * count, np.dtype("<u2"))
        pairs = TokenPairs(side, label)
        return PreparedLabels(Path(), tokenizer, tokenizer, pairs, pairs, 0, 0, 0, ("", "x"), batch_tokens=batch_tokens)
    return PreparedPairs(Path(), tokenizer, tokenizer, pairs, pairs, 0, 0, batch_tokens=batch_tokens)


def _full_conversations(config: RunConfig, tokenizer: Tokenizer) -> PreparedConversations:
    """Conversations of which each fills a row, and is answer but for its first token."""
    count = config.training.grad_accumulation * config.training.batch_size
    ids = Ragged.join([np.zeros(config.sequence_length + 1, np.uint16)] * count, np.dtype("<u2"))
    pairs = TokenPairs(ids, Ragged(np.ones_like(ids.tokens), ids.offsets))
    return PreparedConversations(Path(), tokenizer, pairs, pairs, 0, 0)
