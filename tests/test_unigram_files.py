"""SentencePiece files of T5, mT5, XLM-RoBERTa and CamemBERT, against `transformers` reading the same."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest

from minitransformer.errors import UserError
from minitransformer.pretrained.tokenizers import load_tokenizer
from minitransformer.pretrained.unigram_files import BERT_FILE, T5_FILE
from minitransformer.text.tokenizers import Tokenizer
from tests.test_marian_tokenizer import TEXTS

sentencepiece = pytest.importorskip("sentencepiece", reason="the sentencepiece package, which trains one, is missing")
library = pytest.importorskip("transformers", reason="the reference implementation is not installed")

PROSE = ["The quick brown fox jumps over the lazy dog, doesn't it?", "Größe und café au lait, ﬁne 12345."] * 9
# The class in transformers, the file, and how each family's own was trained.
KINDS: dict[str, tuple[str, str, dict[str, Any], dict[str, Any]]] = {
    "t5": ("T5Tokenizer", T5_FILE, {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1}, {}),
    "mt5": (
        "T5Tokenizer",
        T5_FILE,
        {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1, "user_defined_symbols": ["▁<extra_id_0>"]},
        {"extra_ids": 0},
    ),
    "xlm-roberta": ("XLMRobertaTokenizer", BERT_FILE, {}, {}),
    "camembert": ("CamembertTokenizer", BERT_FILE, {}, {}),
}


@pytest.fixture(scope="module", params=KINDS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp(request.param)
    _, file, training, settings = KINDS[request.param]
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(PROSE),
        model_writer=written,
        vocab_size=64,
        hard_vocab_limit=False,
        minloglevel=2,
        **training,
    )
    (path / file).write_bytes(written.getvalue())
    (path / "config.json").write_text(json.dumps({"model_type": request.param}))
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    return path


def test_ids_are_those_of_the_reference(folder: Path) -> None:
    name, _, _, settings = KINDS[json.loads((folder / "config.json").read_text())["model_type"]]
    theirs = getattr(library, name).from_pretrained(folder, **settings)
    ours = load_tokenizer(folder)
    assert ours is not None
    assert ours.vocab_size == len(theirs)
    assert ours.end_of_text == theirs.eos_token_id
    assert set(theirs.all_special_tokens) <= ours.special_tokens.keys()
    for text in TEXTS:
        if "</s>" not in text:  # which is a token there, and a text here
            ids = theirs(text)["input_ids"]
            assert ours.framing.around(ours.encode(text)) == ids, text
            assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
    again = Tokenizer.from_json(ours.to_json())
    assert (again.encode(TEXTS[0]), again.framing) == (ours.encode(TEXTS[0]), ours.framing)


@pytest.mark.parametrize("size", [0, 1, 7, 100, -1])
def test_a_file_cut_short_is_one_sentence(size: int, folder: Path, tmp_path: Path) -> None:
    [file] = [file for file in (T5_FILE, BERT_FILE) if (folder / file).is_file()]
    (tmp_path / file).write_bytes((folder / file).read_bytes()[:size])
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    with pytest.raises(UserError, match=r"is damaged .*: download it again"):
        load_tokenizer(tmp_path)
