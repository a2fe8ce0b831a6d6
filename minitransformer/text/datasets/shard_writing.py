"""Tokenizing text into shards of token ids, with the index that names them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from minitransformer.errors import UserError
from minitransformer.files import sha256, whole_folder, writing
from minitransformer.text.datasets.pipeline import TOKENIZERS
from minitransformer.text.datasets.text import TextPreparation, encode_in_order
from minitransformer.text.shard_index import FORMAT, TOKENS
from minitransformer.text.token_files import Tokens, dtype_of

INDEX = "index.json"


def write_token_shards(preparation: TextPreparation, out: Path, shard_size: int) -> list[dict[str, Any]]:
    """Write the corpus into the new folder `out`: shards of `shard_size` tokens, their tokenizer and their index.

    Returns the shards of the index. Raises `UserError` if `out` exists, and `StorageError` for a full disk.
    """
    if shard_size < 1:
        raise UserError(f"--shard-size is {shard_size}: it must be at least 1 token")
    if out.exists():
        raise UserError(f"{out} already exists: choose another --out")
    [tokenizer] = preparation.fit()
    with writing(out, "choose an --out on another disk"):
        out.parent.mkdir(parents=True, exist_ok=True)
        with whole_folder(out) as folder:
            parts = encode_in_order(preparation.parts("none"), tokenizer, preparation.bytes)
            files = _written((part.tokens for part in parts), folder, shard_size)
            preparation.check_unchanged()
            itemsize = dtype_of(tokenizer).itemsize
            shards = [
                {"path": path.name, "tokens": path.stat().st_size // itemsize, "sha256": sha256(path)} for path in files
            ]
            tokenizer.save(folder / TOKENIZERS[0])
            record = {"format": FORMAT, "tokenizer": TOKENIZERS[0], "shards": shards}
            (folder / INDEX).write_text(json.dumps(record, indent=1) + "\n")
    return shards


def _written(arrays: Iterable[Tokens], folder: Path, shard_size: int) -> list[Path]:
    """The files of the joined `arrays`, `shard_size` tokens in each; less than half of that joins the file before."""
    files: list[Path] = []
    room = 0
    for array in arrays:
        while len(array):
            if not room:
                files.append(folder / f"shard-{len(files):05}{TOKENS}")
                room = shard_size
            with files[-1].open("ab") as file:
                file.write(array[:room].tobytes())
            array, room = array[room:], max(0, room - len(array))
    if len(files) > 1 and room > shard_size / 2:
        with files[-2].open("ab") as file, files[-1].open("rb") as rest:
            shutil.copyfileobj(rest, file)
        files.pop().unlink()
    return files
