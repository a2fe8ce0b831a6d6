"""`embed`: one vector for each text, from the last hidden states of a model."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro
from torch import Tensor
from typing_extensions import Doc

from minitransformer import files
from minitransformer.architecture.pooling import POOLINGS
from minitransformer.commands import DONE, check_outputs, parse, piped_text, with_exit_code
from minitransformer.errors import UserError
from minitransformer.registry import lookup
from minitransformer.runs.embedding import Embedder, open_embedder
from minitransformer.text.corpora import LINES, documents, kind, read
from minitransformer.text.tables import TABLES
from minitransformer.training.machine import choose_device

OUTPUTS = (".jsonl", ".npy")
POOLING = Doc(
    f"how the hidden states of a text become one vector: {', '.join(POOLINGS)}; None is as the checkpoint's "
    "1_Pooling/config.json says, or else the mean of an encoder's tokens, and the last of a decoder's"
)


@dataclass(frozen=True)
class Options:
    """Which model embeds which texts, and how."""

    model: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RUN|CHECKPOINT")]
    """run folder, or a public checkpoint: a folder, or a name on the Hugging Face hub"""
    data: Path | None = None
    """file of texts, one in each line, or in a field of each row of .jsonl, .csv, .tsv, .parquet or a .json array; None
    reads the lines of standard input"""
    field: str = "text"
    """field of each row that holds the text"""
    out: Path | None = None
    """new file: .jsonl has a text and its embedding in each line, .npy a float32 array of texts by features; None
    writes JSON lines to standard output"""
    pooling: Annotated[str | None, POOLING] = None
    normalised: bool | None = None
    """whether embeddings have length 1; None is whether the checkpoint's modules.json has Normalize"""
    prompt: str | None = None
    """what precedes each text, such as 'query: '; None is the checkpoint's default prompt, or else nothing"""
    batch_size: int = 32
    """number of texts to embed at a time"""
    checkpoint: str | None = None
    """checkpoint of the run, such as step-000500 or latest; None is the best, or else the latest"""
    device: str = "auto"
    """auto, cpu, cuda or mps"""

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise UserError(f"batch_size is {self.batch_size}: it must be at least 1")
        if self.pooling is not None:
            lookup("pooling", self.pooling, POOLINGS)
        if self.out is not None and self.out.suffix not in OUTPUTS:
            raise UserError(f"--out {self.out} ends with neither of {' and '.join(OUTPUTS)}: choose one of them")
        check_outputs({"--out": self.out})


@with_exit_code
def main(arguments: Sequence[str]) -> int:
    """Embed; returns the exit code."""
    about = "Turn texts into vectors, whose distances say how similar the texts are to the model of a run."
    options = parse(Options, arguments, prog="minitransformer embed", description=about)
    texts = _texts(options.data, options.field)
    embedder = open_embedder(
        options.model,
        options.checkpoint,
        str(choose_device(options.device)),
        pooling=options.pooling,
        normalised=options.normalised,
        prompt=options.prompt,
    )
    embeddings = embedder.embeddings(texts, options.batch_size)
    if options.out is None:
        for line in _lines(texts, embeddings):
            print(line, end="")
    else:
        _write(options.out, texts, embeddings)
        print(*_summary(options.out, len(texts), embedder), sep="\n")
    if embedder.num_cut:
        cut, most = embedder.num_cut, embedder.room + embedder.framing.length
        print(f"note: {cut} of {len(texts)} texts have more than {most} tokens, and lost their end", file=sys.stderr)
    return DONE


def _texts(data: Path | None, field: str) -> list[str]:
    """The texts to embed; raises `UserError` if there are none."""
    if data is not None and not data.is_file():
        raise UserError(f"there is no file {data}: name one with --data, or leave it out to read standard input")
    if data is not None and kind(data) in LINES | TABLES:
        texts = ["".join(document) for document in documents(data, field, lambda size: None)]
    elif field != "text":
        raise UserError(f"--field is {field!r}, and lines of text have no fields: leave it out, or name a .jsonl")
    else:
        text = piped_text() if data is None else "".join(read(data))
        texts = text.removesuffix("\n").split("\n") if text else []
    if not texts:
        where = "standard input" if data is None else data
        raise UserError(f"there is no text in {where}: give a text in each line, or a file with --data")
    return texts


def _lines(texts: Iterable[str], embeddings: Iterable[Tensor]) -> Iterator[str]:
    for text, embedding in zip(texts, embeddings, strict=True):
        # The shortest decimals that are read back as the same float32.
        numbers = [float(str(number)) for number in embedding.numpy()]
        yield json.dumps({"text": text, "embedding": numbers}) + "\n"


def _write(out: Path, texts: Sequence[str], embeddings: Iterable[Tensor]) -> None:
    with files.writing(out, "choose another --out"), files.whole_file(out) as file:
        if out.suffix == ".npy":
            np.save(file, np.stack([embedding.numpy() for embedding in embeddings]))
        else:
            file.writelines(line.encode() for line in _lines(texts, embeddings))


def _summary(out: Path, count: int, embedder: Embedder) -> Iterator[str]:
    settings = embedder.settings
    length = ", of length 1" if settings.normalised else ""
    yield f"texts      {count:,}"
    yield f"embedding  {embedder.model.config.d_model} features, pooling {settings.pooling!r}{length}"
    yield f"file       {out}"
