"""Checkpoints that are older than tokenizer.json: their vocabulary files, against `transformers` reading the same."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from minitransformer.errors import UserError
from minitransformer.generation.fill import encode_with_masks
from minitransformer.pretrained.tokenizers import PublicTokenizer, load_tokenizer
from minitransformer.pretrained.vocabularies import how_to_make_one
from minitransformer.text.tokenizers import BPE, Tokenizer

library = pytest.importorskip("tokenizers", reason="the tokenizers package is not installed")
from tokenizers import models, pre_tokenizers, trainers  # noqa: E402

PROSE = ["The quick brown fox jumps over the lazy dog, doesn't it?  She'll say 12345.", "Größe und café au lait"] * 4
TEXTS = [*PROSE[:2], "", "  two  spaces\n\tand 東京 🦊", "Unseen: ψ THE END"]
ANGLES = ["<s>", "<pad>", "</s>", "<unk>"]
BRACKETS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def write_merges(folder: Path, model_type: str, special: list[str], last: list[str]) -> None:
    """vocab.json and merges.txt, as the published GPT-2, RoBERTa and OPT come."""
    trained = library.Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=alphabet, special_tokens=special, show_progress=False
    )
    trained.train_from_iterator(PROSE, trainer)
    content = json.loads(trained.to_str())["model"]
    vocabulary = content["vocab"] | {name: len(content["vocab"]) + i for i, name in enumerate(last)}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    merges = [" ".join(merge) for merge in content["merges"]]
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))


def like_gpt2(folder: Path) -> None:
    write_merges(folder, "gpt2", [], ["<|endoftext|>"])


def like_roberta(folder: Path) -> None:
    write_merges(folder, "roberta", ANGLES, ["<mask>"])


def like_bart(folder: Path) -> None:
    write_merges(folder, "bart", ANGLES, ["<mask>"])


def write_words(folder: Path, **settings: Any) -> None:
    trained = library.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    trained.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trained.train_from_iterator(
        [*PROSE, *(text.lower() for text in PROSE)],
        trainers.WordPieceTrainer(vocab_size=200, special_tokens=BRACKETS, show_progress=False),
    )
    vocabulary = trained.get_vocab()
    (folder / "vocab.txt").write_text("\n".join(sorted(vocabulary, key=vocabulary.get)) + "\n", encoding="utf-8")
    (folder / "config.json").write_text(json.dumps({"model_type": "bert"}))
    if settings:
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def like_bert(folder: Path) -> None:
    write_words(folder)


def like_cased_bert(folder: Path) -> None:
    write_words(folder, do_lower_case=False)


KINDS: dict[str, tuple[Callable[[Path], None], str, type[Tokenizer]]] = {
    "gpt2": (like_gpt2, "GPT2Tokenizer", BPE),
    "roberta": (like_roberta, "RobertaTokenizer", PublicTokenizer),
    "bart": (like_bart, "BartTokenizer", PublicTokenizer),
    "bert": (like_bert, "BertTokenizer", PublicTokenizer),
    "cased bert": (like_cased_bert, "BertTokenizer", PublicTokenizer),
}


@pytest.mark.parametrize("name", KINDS)
def test_the_old_files_encode_as_in_the_reference(name: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="the reference implementation is not installed")
    write, reference, kind = KINDS[name]
    write(tmp_path)
    theirs = getattr(transformers, reference).from_pretrained(tmp_path)
    ours = load_tokenizer(tmp_path)
    assert isinstance(ours, kind)
    for text in TEXTS:
        assert ours.framing.around(ours.encode(text)) == theirs(text)["input_ids"], text
    assert ours.end_of_text == (theirs.sep_token_id if "bert" in name else theirs.eos_token_id)
    if theirs.mask_token is not None:
        # Theirs, read from these files, forgets what every published tokenizer.json says: the mask takes the space.
        masked = [f"the{space}{theirs.mask_token} fox" for space in (" ", "")]
        assert ours.framing.around(encode_with_masks(ours, masked[0])) == theirs(masked[1])["input_ids"]
    again = Tokenizer.from_json(ours.to_json())
    assert (again.encode(TEXTS[0]), again.framing) == (ours.encode(TEXTS[0]), ours.framing)


def test_words_of_bert_are_lower_cased_unless_the_settings_say_otherwise(tmp_path: Path) -> None:
    for name, expected in (("bert", True), ("cased bert", False)):
        folder = tmp_path / name
        folder.mkdir()
        KINDS[name][0](folder)
        tokenizer = load_tokenizer(folder)
        assert tokenizer is not None
        assert (tokenizer.encode("The Fox") == tokenizer.encode("the fox")) == expected


def test_opt_begins_with_the_token_that_ends_texts(tmp_path: Path) -> None:
    write_merges(tmp_path, "opt", ANGLES, [])
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer is not None
    assert tokenizer.encode_prompt("a")[0] == tokenizer.end_of_text == ANGLES.index("</s>")


def test_files_that_another_family_reads_differently_are_left_alone(tmp_path: Path) -> None:
    write_merges(tmp_path, "qwen2", [], ["<|endoftext|>"])
    assert load_tokenizer(tmp_path) is None


def test_a_damaged_vocabulary_is_one_sentence(tmp_path: Path) -> None:
    like_gpt2(tmp_path)
    (tmp_path / "merges.txt").write_bytes(b"\xff\xff")
    with pytest.raises(UserError, match=r"merges.txt is damaged .*: download it again"):
        load_tokenizer(tmp_path)
    other = tmp_path / "bert"
    other.mkdir()
    like_bert(other)
    (other / "vocab.txt").write_text("the\nfox\n")
    with pytest.raises(UserError, match=r"vocab.txt lacks \[UNK\], \[CLS\], \[SEP\]"):
        load_tokenizer(other)


@pytest.mark.parametrize(
    ("file", "expected"),
    [
        (None, "has no tokenizer.json, which a run needs: make one with python -c"),
        ("spiece.model", "but spiece.model, which only its own library reads: make one with python -c"),
        ("tokenizer.model", r"T.from_pretrained\('.*'\).save_pretrained\('.*'\)"),
    ],
)
def test_without_a_known_tokenizer_the_way_to_one_is_told(
    file: str | None, expected: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    if file is not None:
        (tmp_path / file).write_bytes(b"")
    with pytest.raises(UserError, match=expected):
        raise UserError(how_to_make_one(str(tmp_path)))


def test_import_takes_the_old_files(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    transformers = pytest.importorskip("transformers", reason="the reference implementation is not installed")
    shape = {"n_positions": 16, "n_embd": 16, "n_layer": 1, "n_head": 2}
    config = transformers.GPT2Config(vocab_size=512, **shape)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "public")
    saved = (tmp_path / "public" / "config.json").read_text()
    importing = import_module("minitransformer.commands.import")
    arguments = [str(tmp_path / "public"), "--out", str(tmp_path / "run")]
    assert importing.main(arguments) == 2
    assert "has no tokenizer.json, which a run needs: make one with python -c" in capfd.readouterr().err
    like_gpt2(tmp_path / "public")
    (tmp_path / "public" / "config.json").write_text(saved)
    assert importing.main(arguments) == 0
    assert "tokenizer  bpe, " in capfd.readouterr().out
