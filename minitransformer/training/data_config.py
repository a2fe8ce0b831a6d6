"""The part of a run's configuration that says which data is read, and how."""

from __future__ import annotations

from dataclasses import dataclass

from minitransformer.errors import UserError
from minitransformer.settings import Choice, check_settings, setting
from minitransformer.text.datasets import Dataset
from minitransformer.text.recipes import known
from minitransformer.text.tokenizers import Tokenizer

DATA = (
    "training data, one or several of: a recipe; a file, a folder or a glob of .txt, .md, .jsonl or source code; "
    "a .csv, .tsv, .parquet or a .json array; - for standard input; for pairs, a .tsv, a .jsonl or two parallel "
    f"files. Recipes: {', '.join(known())}"
)
READ_BY_LLAMA_CPP = ", ".join(name for name, kind in Tokenizer.registry.items() if kind.in_gguf)


@dataclass(frozen=True)
class DataConfig:
    """The training data, and how it is tokenized."""

    dataset: Choice[Dataset] = Choice(
        Dataset, "text", flag="data_kind", changes_task=True, help="kind of data, which the objective determines"
    )
    data: str | tuple[str, ...] = setting("pydocs", may_change_on_resume=True, changes_task=True, help=DATA)
    field: str = setting(
        "text", changes_task=True, help="field of each .jsonl line, table row or array element that holds the text"
    )
    validation_data: str | tuple[str, ...] | None = setting(
        None,
        may_change_on_resume=True,
        changes_task=True,
        help="validation data, given as --data is; None holds out a part of the data",
    )
    tokenizer: Choice[Tokenizer] = Choice(
        Tokenizer, "bpe", changes_tokens=True, help=f"tokenizer (llama.cpp reads {READ_BY_LLAMA_CPP} alone)"
    )
    validation_fraction: float = setting(
        0.1,
        changes_task=True,
        at_least=0,
        below=1,
        help="fraction of the data held out for validation; 0 is no validation",
    )

    def __post_init__(self) -> None:
        check_settings(self)
        for name in ("data", "validation_data"):
            # A single source is a str, on the command line and in old config files.
            if isinstance(value := getattr(self, name), tuple):
                if not value:
                    raise UserError(f"{name} is empty: give a file, a folder or a recipe")
                object.__setattr__(self, name, value[0] if len(value) == 1 else value)
        self.dataset.make().check(self.validation_data)

    @property
    def validates(self) -> bool:
        """Whether there is validation data."""
        return self.validation_fraction > 0 or self.validation_data is not None
