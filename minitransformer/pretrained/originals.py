"""An import's files besides its weights, which the run keeps and an export copies unchanged."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from minitransformer.errors import UserError
from minitransformer.pretrained.sentences import SENTENCE_FILES
from minitransformer.pretrained.shards import read_checkpoint_json
from minitransformer.pretrained.tokenizers import CONFIGS, FILE, NAMES, SETTINGS, load_tokenizer
from minitransformer.pretrained.vocabularies import FILES, SENTENCEPIECE
from minitransformer.text.tokenizers import Tokenizer

FOLDER = "original"
CHAT = "chat_template.jinja"
TOKENIZER_FILES = (FILE, SETTINGS, NAMES, CHAT, *FILES, *SENTENCEPIECE)
# Fields of config.json about tokens and classes, which do not affect the model.
NAMED = ("id2label", "label2id", "bad_words_ids")


def keep_originals(checkpoint: Path, run: Path) -> None:
    """Copy the files besides the weights from the folder `checkpoint` to the run folder `run`."""
    _copy(checkpoint, run / FOLDER, (*CONFIGS, *TOKENIZER_FILES, *SENTENCE_FILES))


def inherit_originals(parent: Path | None, run: Path) -> None:
    """Copy the kept files of the run folder `parent`, if any, to `run`, which is fine-tuned from it."""
    if parent is None:
        return
    if (parent / FOLDER).is_dir():
        keep_originals(parent / FOLDER, run)
    _copy(parent, run, (*CONFIGS[1:], CHAT))


def originals_of(run: Path, tokenizer: Tokenizer) -> Path | None:
    """The folder of a run's kept files, if they still describe `tokenizer`."""
    folder = run / FOLDER
    try:
        original = load_tokenizer(folder) if folder.is_dir() else None
    except UserError as error:
        raise UserError(f"{error}, or remove {folder}: the tokenizer is written anew then") from None
    return folder if original is not None and original.fingerprint == tokenizer.fingerprint else None


def write_originals(originals: Path, folder: Path) -> None:
    """Copy the files of the tokenizer, and those on embeddings of texts, to the checkpoint folder `folder`."""
    _copy(originals, folder, (*TOKENIZER_FILES, *SENTENCE_FILES))


def original_fields(originals: Path) -> dict[str, Any]:
    """The fields of config.json on special tokens and class names."""
    hf = read_checkpoint_json(originals / CONFIGS[0])
    return {name: value for name, value in hf.items() if name.endswith("_token_id") or name in NAMED}


def class_names(run: Path, count: int) -> list[str]:
    """The names of a classifier's classes; numbers if the import did not have `count` names."""
    config = run / FOLDER / CONFIGS[0]
    labels = read_checkpoint_json(config).get("id2label") if config.is_file() else None
    known = labels if isinstance(labels, dict) else {}
    return [str(known.get(str(number), number)) for number in range(count)]


def _copy(source: Path, target: Path, names: tuple[str, ...]) -> None:
    for name in names:
        if (source / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / name, target / name)
