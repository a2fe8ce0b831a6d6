"""Marian's SentencePiece tokenizers, against `transformers` reading the same files, from import to export."""

from __future__ import annotations

import io
import json
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

from minitransformer.commands import export, sample, train
from minitransformer.errors import UserError
from minitransformer.pretrained.marian import SOURCE, TARGET, SentencePiece
from minitransformer.pretrained.tokenizers import load_target_tokenizer, load_tokenizer
from minitransformer.runs import Run
from minitransformer.text.tokenizers import Bytes, Tokenizer

sentencepiece = pytest.importorskip("sentencepiece", reason="the sentencepiece package is not installed")
library = pytest.importorskip("transformers", reason="the reference implementation is not installed")

ENGLISH = ["The quick brown fox jumps over the lazy dog, doesn't it?", "She'll say 12345.", "a cat on the mat"] * 9
GERMAN = ["Der schnelle braune Fuchs springt über den faulen Hund.", "Größe und café au lait", "eine Katze"] * 9
TEXTS = [
    *ENGLISH[:3],
    *GERMAN[:3],
    "",
    "  two  spaces\n\tand 東京 🦊 \u3000 ",
    "▁already ▁ marked",
    "ﬁligree, ｆｕｌｌ width, e\u0301, zero\x00byte, soft\u00adhyphen, \u200b\ufeff",
    "</s> <pad> <unk> spelled",
    ">>deu<< the fox",
    ">>xyz<< the fox",
    " >>deu<< the fox",
    ">><< >> the",
    "ψ" * 300,
]


def write_marian(folder: Path) -> None:
    """source.spm, target.spm and their common vocab.json, whose ids are those of neither model."""
    models = {}
    for name, texts in ((SOURCE, ENGLISH), (TARGET, GERMAN)):
        written = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts),
            model_writer=written,
            vocab_size=48,
            hard_vocab_limit=False,
            minloglevel=2,
            bos_id=-1,
            unk_id=1,
            eos_id=0,
        )
        (folder / name).write_bytes(written.getvalue())
        models[name] = sentencepiece.SentencePieceProcessor(model_proto=written.getvalue())
    pieces = [model.id_to_piece(number) for model in models.values() for number in range(len(model))]
    ordered = dict.fromkeys(["</s>", "<unk>", ">>deu<<", *sorted(pieces), "<pad>"])
    (folder / "vocab.json").write_text(json.dumps({piece: number for number, piece in enumerate(ordered)}))
    # As published, without the class of the tokenizer.
    (folder / "tokenizer_config.json").write_text(json.dumps({"target_lang": "de", "source_lang": "en"}))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Marian as transformers saves it, with the tokenizer's files."""
    path = tmp_path_factory.mktemp("marian")
    write_marian(path)
    size = len(json.loads((path / "vocab.json").read_text()))
    sides = {f"{side}_{name}": 2 for side in ("encoder", "decoder") for name in ("layers", "attention_heads")}
    feedforward = {"encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
    padding = {"pad_token_id": size - 1, "decoder_start_token_id": size - 1, "bad_words_ids": [[size - 1]]}
    ends = {"eos_token_id": 0, "forced_eos_token_id": 0}
    config = library.MarianConfig(
        vocab_size=size,
        d_model=32,
        max_position_embeddings=64,
        scale_embedding=False,
        num_beams=2,
        activation_function="swish",
        **sides,
        **feedforward,
        **padding,
        **ends,
    )
    torch.manual_seed(1)
    model = library.MarianMTModel(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "embed_positions" not in name:
                weight.normal_(std=0.1 if name.endswith("bias") or "shared" in name else 1.0)
    model.save_pretrained(path)
    return path


def both(folder: Path) -> tuple[Tokenizer, Tokenizer]:
    source = load_tokenizer(folder)
    assert isinstance(source, SentencePiece)
    return source, load_target_tokenizer(folder, source)


@pytest.mark.parametrize("text", TEXTS, ids=ascii)
def test_ids_and_texts_of_both_sides_are_those_of_the_reference(text: str, folder: Path) -> None:
    theirs = library.MarianTokenizer.from_pretrained(folder, split_special_tokens=True)
    source, target = both(folder)
    ids = {"source": theirs(text)["input_ids"], "target": theirs(text_target=text)["input_ids"]}
    sides = {"source": source, "target": target}
    assert {side: each.pair_framing.around(each.encode(text)) for side, each in sides.items()} == ids
    for tokens in ids.values():
        assert target.decode(tokens) == theirs.decode(tokens, skip_special_tokens=True)


def test_a_side_reads_with_its_own_model_and_one_vocabulary(folder: Path) -> None:
    source, target = both(folder)
    assert source.encode("schnelle") != target.encode("schnelle")
    assert target.shares_ids(source)
    assert not target.shares_ids(Bytes())
    for tokenizer in (source, target):
        again = Tokenizer.from_json(json.loads(json.dumps(tokenizer.to_json())))
        assert (again.encode(TEXTS[0]), again.framing, again.fingerprint) == (
            tokenizer.encode(TEXTS[0]),
            tokenizer.framing,
            tokenizer.fingerprint,
        )
        assert all(again.decode_bytes([token]) == tokenizer.decode_bytes([token]) for token in range(again.vocab_size))


def test_no_text_spells_a_special_token(folder: Path) -> None:
    for tokenizer in both(folder):
        for text in TEXTS:
            assert not set(tokenizer.encode(text)) & (set(tokenizer.special_tokens.values()) - {tokenizer.unknown})


def test_import_translates_as_the_reference_is_fine_tuned_and_goes_back_unchanged(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    importing = import_module("minitransformer.commands.import")
    assert importing.main([str(folder), "--out", str(tmp_path / "run")]) == 0
    run = Run.open(tmp_path / "run")
    assert run.target_tokenizer.encode("schnelle") != run.tokenizer.encode("schnelle")
    theirs, model = library.MarianTokenizer.from_pretrained(folder), library.MarianMTModel.from_pretrained(folder)
    capsys.readouterr()
    for text in ("a cat", ">>deu<< the lazy dog"):
        greedy = model.generate(
            **theirs([text], return_tensors="pt"), num_beams=1, max_new_tokens=9, no_repeat_ngram_size=1
        )
        assert len(set(greedy[0].tolist())) > 5
        greedily = ["--temperature", "0", "--num-beams", "1", "--max-new-tokens", "9", "--no-repeat-ngram", "1"]
        assert sample.main([str(tmp_path / "run"), "--prompt", text, *greedily]) == 0
        assert capsys.readouterr().out.strip() == theirs.decode(greedy[0], skip_special_tokens=True)
    pairs = tmp_path / "pairs.tsv"
    pairs.write_text("".join(f"{a} {i}\t{b}\n" for i, (a, b) in enumerate(zip(ENGLISH, GERMAN, strict=True))))
    tuned = ["--init-from", str(tmp_path / "run"), "--data", str(pairs), "--out", str(tmp_path / "tuned")]
    assert train.main([*tuned, "--steps", "1", "--device", "cpu"]) == 0
    assert Run.open(tmp_path / "tuned").config.model.target_vocab_size is None
    for name in ("run", "tuned"):
        assert export.main([str(tmp_path / name), "--to", str(tmp_path / f"{name}-out")]) == 0
        for file in (SOURCE, TARGET, "vocab.json"):
            assert (tmp_path / f"{name}-out" / file).read_bytes() == (folder / file).read_bytes()
        library.MarianTokenizer.from_pretrained(tmp_path / f"{name}-out")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: (folder / TARGET).unlink(), "has source.spm, but no target.spm: download it again"),
        (lambda folder: (folder / SOURCE).write_bytes(b"spm"), "the sentencepiece package cannot read the model"),
        (lambda folder: (folder / "vocab.json").write_text("{}"), r"vocab.json lacks </s>, <unk>, <pad>: download it"),
        (
            lambda folder: (folder / "tokenizer_config.json").write_text('{"separate_vocabs": true}'),
            r"has a vocabulary for each side \(separate_vocabs\), which is not supported",
        ),
    ],
)
def test_damaged_or_missing_files_are_one_sentence(spoil: Any, message: str, folder: Path, tmp_path: Path) -> None:
    for file in (SOURCE, TARGET, "vocab.json", "config.json"):
        (tmp_path / file).write_bytes((folder / file).read_bytes())
    spoil(tmp_path)
    with pytest.raises(UserError, match=message):
        load_tokenizer(tmp_path)


def test_without_the_package_the_extra_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "sentencepiece", None)
    with pytest.raises(UserError, match=r"needs the sentencepiece package: pip install minitransformer\[hub\]"):
        load_tokenizer(folder)
