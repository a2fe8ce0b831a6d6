"""Running text, in one piece or in shards."""

from __future__ import annotations

from minitransformer.text.corpora import open_corpus
from minitransformer.text.datasets.base import DataRequest, Dataset, PreparedData
from minitransformer.text.datasets.shards import ShardPreparation
from minitransformer.text.datasets.text import TextPreparation
from minitransformer.text.folders import work_folder
from minitransformer.text.shard_index import ShardIndex, check_no_index, index_in


class PlainText(Dataset, name="text"):
    """Running text: concatenated documents, cut into windows; an index names shards of it that are mixed by weight."""

    def prepare(self, request: DataRequest) -> PreparedData:
        if (index := index_in(request.data)) is not None:
            return ShardPreparation(ShardIndex.read(index), request, work_folder() / "prepared").run()
        validation = request.validation_data
        if validation is not None:
            check_no_index(validation)
        return TextPreparation(
            open_corpus(request.data, request.field),
            request.tokenizers[0] if request.tokenizers else request.tokenizer,
            vocab_size=request.vocab_size,
            validation=None if validation is None else open_corpus(validation, request.field),
            validation_fraction=request.validation_fraction,
            context_length=request.context_length,
            special_tokens=request.special_tokens,
            only_cached=request.only_cached,
        ).run()
