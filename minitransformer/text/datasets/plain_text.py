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
        if request.validation_data is not None:
            check_no_index(request.validation_data)
        return TextPreparation(**request.for_preparation(open_corpus), special_tokens=request.special_tokens).run()
