"""The interface of datasets: tokenization and batches."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from minitransformer.errors import UserError
from minitransformer.registry import Registered
from minitransformer.settings import Chosen
from minitransformer.text.token_files import TokenSource
from minitransformer.text.tokenizers import Tokenizer

if TYPE_CHECKING:
    from minitransformer.text.batches import Batches

Names = str | tuple[str, ...]


@dataclass(frozen=True)
class DataRequest:
    """Which data to prepare, as in `DataConfig`, and for which model.

    `tokenizers` are those of an existing run, of its input and its output; without them `tokenizer` is
    fitted, with additional `special_tokens`.
    """

    data: Names
    tokenizer: Chosen[Tokenizer]
    context_length: int
    field: str = "text"
    validation_data: Names | None = None
    validation_fraction: float = 0.1
    vocab_size: int | None = None
    special_tokens: Sequence[str] = ()
    tokenizers: Sequence[Tokenizer] = ()
    only_cached: bool = False
    """raise `NotPrepared` unless the data is cached"""
    for_training: bool = True
    """whether the data must have what is to be learned, as an example of each class"""

    def whole(self) -> DataRequest:
        """This request for all of `data`, without validation, to evaluate on it."""
        return replace(self, validation_data=None, validation_fraction=0.0, for_training=False)

    def for_preparation(self, corpus: Callable[[Names, str], Any]) -> dict[str, Any]:
        """The arguments of a preparation with one tokenizer; `corpus` opens data, whose text is in a field."""
        return {
            "corpus": corpus(self.data, self.field),
            "tokenizer": self.tokenizers[0] if self.tokenizers else self.tokenizer,
            "vocab_size": self.vocab_size,
            "validation": None if self.validation_data is None else corpus(self.validation_data, self.field),
            "validation_fraction": self.validation_fraction,
            "context_length": self.context_length,
            "only_cached": self.only_cached,
        }


@dataclass(frozen=True)
class BatchShape:
    """The size of a step: `micro_batches` of `rows` windows of `window` tokens, unless the dataset decides itself.

    With `whole`, validation omits a shorter last window; its windows begin `stride` tokens apart (default: `window`).
    """

    window: int
    rows: int
    micro_batches: int = 1
    whole: bool = False
    stride: int | None = None


class PreparedData(ABC):
    """Tokenized data in two splits, in a folder named after its content."""

    folder: Path
    tokenizer: Tokenizer
    target_tokenizer: Tokenizer
    """tokenizer of the model's output; for most data, `tokenizer` itself"""

    @abstractmethod
    def summary(self) -> str:
        """Lines for the terminal, under 80 columns."""

    @abstractmethod
    def shuffled_batches(self, shape: BatchShape, seed: int, step: int, change: Callable[[Any], Any]) -> list[Any]:
        """The micro-batches of a training step, which depend on seed and step alone.

        `change` is the objective's transformation of a batch before it is split into micro-batches.
        """

    @abstractmethod
    def ordered_batches(self, split: str, shape: BatchShape) -> Batches:
        """All of "train" or "validation" once, in order."""

    @abstractmethod
    def num_tokens(self, split: str) -> int:
        """Number of tokens in the split; 0 if there is no such split."""

    @abstractmethod
    def num_bytes(self, split: str) -> int:
        """UTF-8 bytes of the text in `targets`: bits per byte = total nats / ln 2 / num_bytes."""

    @property
    def sources(self) -> Mapping[str, str]:
        """A digest of each shard, by its path; none for data in one piece."""
        return {}

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the classes of labelled texts."""
        return ()

    @property
    def majority_baseline(self) -> float | None:
        """Validation accuracy of always predicting the most frequent training target, if known."""
        return None

    @abstractmethod
    def targets(self, split: str) -> TokenSource:
        """[tokens] of the targets, where these are the text itself."""


class Dataset(Registered, kind="dataset"):
    """A kind of data."""

    cuts_text: ClassVar[bool] = True
    """whether its sequences are as long as the run wants them, and not as the texts are"""
    usual_data: ClassVar[str | None] = None
    """the data in place of the default, which is text"""

    def __init__(self, settings: Any) -> None:
        self.settings = settings

    def prepare(self, request: DataRequest) -> PreparedData:
        """The tokenized data, cached on disk; raises `UserError` for unusable data."""
        raise NotImplementedError

    def prepare_whole(self, request: DataRequest) -> PreparedData:
        """All of `data` as the split "train", without validation, as for an evaluation."""
        return self.prepare(request.whole())

    def preparation(self, request: DataRequest) -> Any:
        """How the rows of `request` become the items of a split; None for data without rows, such as running text."""
        return None

    def check(self, validation_data: Names | None) -> None:
        """Raises `UserError` for settings that contradict each other or `validation_data`."""

    def tokens_per_step(self, shape: BatchShape) -> int:
        """Approximate number of tokens per step."""
        return shape.rows * shape.micro_batches * shape.window

    def with_contents(self) -> Any:
        """The settings, with the contents of small files in place of their names."""
        return self.settings

    def cased(self, text: str) -> str:
        """`text`, lower-cased if the data is."""
        return text


def one_file(names: Names) -> str:
    """The single file in `names`; raises `UserError` if there are several."""
    if isinstance(names, tuple):
        raise UserError(f"pairs must be in one file, not {', '.join(names)}: join them into one")
    return names
