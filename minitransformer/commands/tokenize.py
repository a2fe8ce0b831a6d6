"""`tokenize`: turn text into shards of tokens, for data larger than memory or than one disk."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from minitransformer.commands import DONE, parse, with_exit_code
from minitransformer.settings import Chosen
from minitransformer.text.corpora import named, open_corpus
from minitransformer.text.datasets.shard_writing import INDEX, write_token_shards
from minitransformer.text.datasets.text import TextPreparation
from minitransformer.text.tokenizers import Tokenizer


@dataclass(frozen=True)
class Options:
    """Which text to tokenize, how, and where to."""

    data: tyro.conf.Positional[tuple[str, ...]]
    """text, as --data of train.py takes it: files, folders, globs or recipes"""
    out: Path
    """new folder for the shards, their tokenizer.json and their index.json"""
    shard_size: int = 100_000_000
    """tokens of a shard"""
    tokenizer: str = "bpe"
    """tokenizer to fit, of those that `train.py --help` lists, or the tokenizer.json of a run or of other shards"""
    vocab_size: int | None = None
    """vocabulary size of a fitted tokenizer; None is its default"""
    field: str = "text"
    """field of each .jsonl line, table row or array element that holds the text"""


@with_exit_code
def main(arguments: Sequence[str]) -> int:
    """Tokenize; returns the exit code."""
    about = "Turn text into shards of tokens, for data larger than memory or than one disk."
    options = parse(Options, arguments, prog="minitransformer tokenize", description=about)
    tokenizer = _tokenizer(options.tokenizer)
    preparation = TextPreparation(
        open_corpus(options.data, options.field),
        tokenizer,
        context_length=1,
        vocab_size=options.vocab_size,
        validation_fraction=0.0,
    )
    shards = write_token_shards(preparation, options.out, options.shard_size)
    print(f"data       {named(options.data)}")
    print(f"tokens     {sum(shard['tokens'] for shard in shards):,} in {len(shards):,} shards of {tokenizer.name}")
    print(f"index      {options.out / INDEX}: add weights and validation shards, or name it in another index")
    print(f"next       python train.py --data {options.out / INDEX} --tokenizer {tokenizer.name}")
    return DONE


def _tokenizer(name: str) -> Chosen[Tokenizer] | Tokenizer:
    """The tokenizer in the file `name`, or the registered one to fit."""
    return Tokenizer.load(Path(name)) if Path(name).is_file() else Tokenizer.choose(name)
