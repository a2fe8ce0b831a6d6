"""What a kind of data is: how it becomes token ids, and which batches it yields."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from minitransformer.errors import UserError
from minitransformer.registry import Registered
from minitransformer.text.token_files import Tokens
from minitransformer.text.tokenizers import Tokenizer

if TYPE_CHECKING:
    from minitransformer.text.batches import Batches

Names = str | tuple[str, ...]


@dataclass(frozen=True)
class DataRequest:
    """Which data is wanted, as `DataConfig` names it, and for what model.

    `tokenizers` are those that a run has already, of what it reads and of what it writes; without them `tokenizer` is
    fitted, and has `special_tokens` beside those of the text.
    """

    data: Names
    tokenizer: str
    context_length: int
    field: str = "text"
    validation_data: Names | None = None
    validation_fraction: float = 0.1
    vocab_size: int | None = None
    special_tokens: Sequence[str] = ()
    tokenizers: Sequence[Tokenizer] = ()


@dataclass(frozen=True)
class BatchShape:
    """How much a step reads: `micro_batches`, of `rows` windows of `window` tokens where data has no rows of its own.

    With `whole`, validation leaves its last window out where that is shorter.
    """

    window: int
    rows: int
    micro_batches: int = 1
    whole: bool = False


class PreparedData(ABC):
    """Data as token ids, in a folder of its own that is named after its content, in two splits."""

    folder: Path
    tokenizer: Tokenizer
    target_tokenizer: Tokenizer
    """of what the model writes; for most data, `tokenizer` itself"""

    @abstractmethod
    def summary(self) -> str:
        """Lines for the terminal, of less than 80 columns."""

    @abstractmethod
    def shuffled_batches(self, shape: BatchShape, seed: int, step: int, change: Callable[[Any], Any]) -> list[Any]:
        """The micro-batches of a training step: a function of seed and step alone.

        `change` is what an objective makes of a batch, before that is cut into micro-batches.
        """

    @abstractmethod
    def ordered_batches(self, split: str, shape: BatchShape) -> Batches:
        """All of "train" or "validation" once, in order."""

    @abstractmethod
    def num_tokens(self, split: str) -> int:
        """How many tokens the split has; 0 if there is no such split."""

    @abstractmethod
    def num_bytes(self, split: str) -> int:
        """UTF-8 bytes of the text that `targets` are, so that bits per byte = nats summed over it / ln 2 / these."""

    @property
    def majority_baseline(self) -> float | None:
        """Accuracy on validation of always predicting the most frequent token of training, where that is known."""
        return None

    @abstractmethod
    def targets(self, split: str) -> Tokens:
        """[tokens] that a model is to write, where it is to write the text itself."""


class Dataset(Registered, kind="dataset"):
    """A kind of data."""

    cuts_text: ClassVar[bool] = True
    """whether its sequences are windows of any length that text is cut into"""

    def __init__(self, settings: Any) -> None:
        self.settings = settings

    def prepare(self, request: DataRequest) -> PreparedData:
        """The data as token ids, from disk if it was prepared before; raises `UserError` for data that is no good."""
        raise NotImplementedError

    def prepare_whole(self, request: DataRequest) -> PreparedData:
        """All of `data` as the split "train", and nothing to validate on, as for an evaluation."""
        return self.prepare(replace(request, validation_data=None, validation_fraction=0.0))

    def check(self, validation_data: Names | None) -> None:
        """Raises `UserError` for settings that do not go together, or not with what to validate on."""

    def tokens_per_step(self, shape: BatchShape) -> int:
        """How many tokens a step reads, about."""
        return shape.rows * shape.micro_batches * shape.window

    def cased(self, text: str) -> str:
        """`text` as the data has it: in lower case, where that was asked for."""
        return text


def one_file(names: Names) -> str:
    """The only one of `names`; raises `UserError` if there are several."""
    if isinstance(names, tuple):
        raise UserError(f"pairs come from one file, and there are {', '.join(names)}: join them into one")
    return names
