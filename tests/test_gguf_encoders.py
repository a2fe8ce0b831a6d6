"""Encoders and encoder-decoders leave as GGUF files and come back; what is wrong in one is noticed."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable
from functools import cache, partial
from multiprocessing.connection import Connection
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch

from minitransformer import pretrained
from minitransformer.commands import embed, export
from minitransformer.errors import UserError
from minitransformer.exporting import ExportFormat, llama_cpp
from minitransformer.exporting import gguf as gguf_room
from minitransformer.exporting.certificate import compared_inputs, same_token_ids
from minitransformer.exporting.copies import CopyError
from minitransformer.exporting.exported import Exported
from minitransformer.exporting.formats import ExportChoices, certify
from minitransformer.exporting.hostile import hostile_texts
from minitransformer.exporting.llama_cpp import (
    has_llama_cpp,
    near_weights,
    same_embeddings,
)
from minitransformer.exporting.llama_process import LlamaProcess
from minitransformer.pretrained import gguf_files
from minitransformer.pretrained.tokenizers import PublicTokenizer, load_tokenizer, template
from minitransformer.runs import Run
from minitransformer.runs.importing import import_checkpoint
from minitransformer.text.tokenizers import Framing, Tokenizer
from minitransformer.text.tokenizers.spelled import encode_with_special_tokens
from tests import exports_for_tests
from tests.exports_for_tests import SHAPE, changed, run_that_leaves, tokenizer_of_conversations, with_swapped_tokens
from tests.runs_for_tests import Call

pytest.importorskip("gguf", reason="the package gguf is not installed")
pytest.importorskip("tokenizers", reason="the package tokenizers is not installed")
sentencepiece = pytest.importorskip("sentencepiece", reason="the sentencepiece package, which trains one, is missing")
tokenizers_for_tests = pytest.importorskip("tests.tokenizers_for_tests")

PROSE = ["The quick brown fox jumps over the lazy dog, doesn't it?", "Größe und café au lait, ﬁne 12345."] * 9


@cache
def wordpieces() -> Tokenizer:
    made = tokenizers_for_tests.like_bert()
    content = {**json.loads(made.to_str()), "truncation": None, "padding": None}
    return PublicTokenizer(content, made.token_to_id("[SEP]")).framed(Framing(*template(content["post_processor"])))


@cache
def unigrams() -> Tokenizer:
    written = io.BytesIO()
    how = {"vocab_size": 64, "hard_vocab_limit": False, "minloglevel": 2}
    special = {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1}
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(PROSE), model_writer=written, **how, **special)
    with TemporaryDirectory() as folder:
        (Path(folder) / "spiece.model").write_bytes(written.getvalue())
        (Path(folder) / "config.json").write_text('{"model_type": "t5"}')
        (Path(folder) / "tokenizer_config.json").write_text('{"extra_ids": 3}')
        tokenizer = load_tokenizer(Path(folder))
    assert tokenizer is not None
    return tokenizer


BERT = {
    **{"topology": "encoder", "residual": "post", "positions": "learned", "bias": True, "embedding_norm": True},
    **{"feedforward": "gelu", "norm_eps": 1e-12, "num_segments": 2},
}
T5 = {"topology": "encoder-decoder", "norm": "rms", "positions": "t5", "attention_scale": 1.0, "num_decoder_layers": 1}
OLD_T5 = {**T5, "feedforward": "relu", "logit_scale": SHAPE["d_model"] ** -0.5}
MASKED = {"head": "transformed", "head_bias": True}
MODERN = {
    **{"topology": "encoder", "residual": "pre", "first_norm": False, "embedding_norm": True, "feedforward": "geglu"},
    **{"attention_window": 9, "window_pattern": (False, True), "rotary_window_base": 500.0, "head": "transformed"},
}
MEMBERS: dict[str, tuple[Callable[[], Tokenizer], str, dict[str, Any]]] = {
    "BERT": (wordpieces, "masked", {**BERT, **MASKED}),
    "BERT of bytes, without segments": (
        tokenizer_of_conversations,
        "masked",
        {**BERT, **MASKED, "num_segments": None, "feedforward": "gelu-tanh"},
    ),
    "a classifier": (wordpieces, "classify", {**BERT, "topology": "encoder-classifier", "num_classes": 3}),
    "XLM-RoBERTa": (unigrams, "masked", {**BERT, **MASKED, "num_segments": 1}),
    "ModernBERT": (tokenizer_of_conversations, "masked", MODERN),
    "T5": (unigrams, "seq2seq", OLD_T5),
    "T5 1.1": (unigrams, "seq2seq", {**T5, "feedforward": "geglu-tanh", "tied_embeddings": False}),
    "T5 with scaled scores": (unigrams, "seq2seq", {**OLD_T5, "attention_scale": None}),
}


def run_of(name: str, path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    tokenizer, objective, choices = MEMBERS[name]
    monkeypatch.setattr(exports_for_tests, "tokenizer_of_conversations", tokenizer)
    return run_that_leaves(path, objective, chat=False, **choices)


def written(run: Run, folder: Path, weights: str = "f32") -> Any:
    made: Any = ExportFormat.named("gguf")(Exported.of(run), ExportChoices(weights=weights))
    folder.mkdir()
    made.write(folder)
    return made


@pytest.mark.parametrize("name", MEMBERS)
def test_a_file_comes_back_and_leaves_proven(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = written(run_of(name, tmp_path / "run", monkeypatch), tmp_path / "out")
    model, tokenizer = pretrained.load(tmp_path / "out" / "model.gguf")
    assert tokenizer is not None
    ours = dict(made.exported.model.named_parameters())
    assert model.num_parameters() == made.exported.model.num_parameters()
    for key, weight in model.named_parameters():
        torch.testing.assert_close(weight, ours[key], rtol=3e-7 if name.startswith("T5") else 0, atol=0)
    with torch.inference_mode():
        torch.testing.assert_close(
            model(*compared_inputs(made.exported)), made.exported.outputs(*compared_inputs(made.exported))
        )
    for text in hostile_texts(made.exported.source, made.exported.special_tokens):
        ids = encode_with_special_tokens(tokenizer, text) if text else []
        assert tokenizer.framing.around(ids) == made.exported.token_ids(text)
    if has_llama_cpp():
        assert certify(made, tmp_path / "out").difference is None


Change = Callable[[dict[str, Any]], dict[str, Any]]


def exchanged(left: str, right: str) -> Change:
    return lambda found: {**found, left: found[right], right: found[left]}


def without(name: str) -> Change:
    return lambda found: {key: value for key, value in found.items() if key != name}


KEY = "tokenizer.ggml."
TENSORS, WORDS = "save_weights", "gguf_vocabulary"
FAULTS: dict[str, tuple[str, str, str, Change]] = {
    "segments in another order": ("BERT", "weights", TENSORS, changed("token_types.weight", lambda w: w.flip(0))),
    "positions that start at 2": ("BERT", "weights", TENSORS, changed("position_embd.weight", lambda w: w.roll(2, 0))),
    "two norms exchanged": (
        "BERT",
        "weights",
        TENSORS,
        exchanged("blk.0.attn_output_norm.weight", "blk.0.layer_output_norm.weight"),
    ),
    "a rounded norm of embeddings": (
        "BERT",
        "weights",
        TENSORS,
        changed("token_embd_norm.weight", lambda w: w.half().float()),
    ),
    "an unlearned pooler": ("a classifier", "weights", TENSORS, changed("cls.weight", lambda w: w * 0)),
    "classes in another order": ("a classifier", "weights", TENSORS, changed("cls.output.weight", lambda w: w.flip(0))),
    "upper case": ("BERT", "token ids", WORDS, changed(KEY + "normalizer.lowercase", lambda value: False)),
    "accents": ("BERT", "token ids", WORDS, changed(KEY + "normalizer.strip_accents", lambda value: False)),
    "another last token": ("BERT", "token ids", WORDS, changed(KEY + "seperator_token_id", lambda number: number + 1)),
    "pieces with the marks of BERT": (
        "BERT",
        "token ids",
        WORDS,
        changed(KEY + "tokens", lambda each: [one.removeprefix("▁") if one[0] in "▁[" else "##" + one for one in each]),
    ),
    "a mask that is text": (
        "BERT",
        "token ids",
        WORDS,
        changed(KEY + "token_type", lambda kinds: [1 if number == 4 else kind for number, kind in enumerate(kinds)]),
    ),
    "no map of characters": ("XLM-RoBERTa", "token ids", WORDS, without(KEY + "precompiled_charsmap")),
    "spaces that are kept": ("T5", "token ids", WORDS, changed(KEY + "remove_extra_whitespaces", lambda value: False)),
    "two pieces exchanged": ("T5", "token ids", WORDS, changed(KEY + "tokens", with_swapped_tokens)),
    "sentinels that are text": (
        "T5",
        "token ids",
        WORDS,
        changed(
            KEY + "token_type",
            lambda kinds: [1 if number > 2 and kind == 3 else kind for number, kind in enumerate(kinds)],
        ),
    ),
    "gate above up": ("ModernBERT", "weights", TENSORS, changed("blk.0.ffn_up.weight", lambda w: w.roll(64, 0))),
    "a scale left out": ("T5", "weights", TENSORS, changed("dec.output_norm.weight", lambda w: w * 32**0.5)),
    "biases of the other side": (
        "T5",
        "weights",
        TENSORS,
        exchanged("enc.blk.0.attn_rel_b.weight", "dec.blk.0.attn_rel_b.weight"),
    ),
    "keys of self-attention": (
        "T5",
        "weights",
        TENSORS,
        exchanged("dec.blk.0.attn_k.weight", "dec.blk.0.cross_attn_k.weight"),
    ),
    "gate and up exchanged": (
        "T5 1.1",
        "weights",
        TENSORS,
        exchanged("enc.blk.0.ffn_gate.weight", "enc.blk.0.ffn_up.weight"),
    ),
    "a tied head": ("T5 1.1", "weights", TENSORS, without("output.weight")),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_noticed(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    member, noticed_by, place, change = FAULTS[name]
    run, original = run_of(member, tmp_path / "run", monkeypatch), getattr(gguf_files, place)
    monkeypatch.setattr(gguf_files, place, lambda *given: change(original(*given)))
    made = written(run, tmp_path / "out")
    monkeypatch.setattr(gguf_files, place, original)
    comparison = {"weights": near_weights, "token ids": same_token_ids}[noticed_by]
    agreement = comparison(made.exported, made.open(tmp_path / "out"))
    assert agreement is not None
    assert not agreement.agrees


def test_another_pooling_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = run_of("BERT", tmp_path / "run", monkeypatch)
    monkeypatch.setattr(gguf_room, "POOLINGS", {"mean": 2})
    made = written(run, tmp_path / "out")
    agreement = same_embeddings(made.exported, made.open(tmp_path / "out"))
    assert agreement is not None
    assert not agreement.agrees


def test_a_t5_of_llama_cpps_own_converter_keeps_its_scale(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, save = run_of("T5", tmp_path / "run", monkeypatch), gguf_files.save_weights
    scaled = changed("dec.output_norm.weight", lambda weight: weight * SHAPE["d_model"] ** 0.5)
    monkeypatch.setattr(gguf_files, "save_weights", lambda *given: scaled(save(*given)))
    add = gguf_files._add
    monkeypatch.setattr(gguf_files, "_add", lambda to, key, value: key == "t5.logit_scale" or add(to, key, value))
    made = written(run, tmp_path / "out")
    model, _ = pretrained.load(tmp_path / "out" / "model.gguf")
    inputs = compared_inputs(made.exported)
    with torch.inference_mode():
        torch.testing.assert_close(model(*inputs), made.exported.outputs(*inputs))


def test_an_imported_file_embeds_as_it_says_and_leaves_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: Call
) -> None:
    run = run_of("BERT", tmp_path / "run", monkeypatch)
    monkeypatch.setattr(Exported, "pooling", "first")
    written(run, tmp_path / "out")
    monkeypatch.undo()
    back = import_checkpoint(str(tmp_path / "out" / "model.gguf"), tmp_path / "back")
    (tmp_path / "texts").write_text("The quick brown fox\n")
    vectors = []
    for flags in ([str(run.path), "--pooling", "first"], [str(back.path)]):
        code, out, _ = call(embed, *flags, "--data", str(tmp_path / "texts"))
        assert code == 0
        vectors.append(json.loads(out)["embedding"])
    assert vectors[0] == pytest.approx(vectors[1], abs=1e-6)
    again = written(back, tmp_path / "again")
    assert again.exported.pooling == "first"
    assert gguf_files.GGUFFile(tmp_path / "again" / "model.gguf").own["pooling_type"] == 2


def test_what_an_encoder_needs_is_said_with_every_flag(tmp_path: Path, call: Call) -> None:
    run = run_that_leaves(tmp_path / "run", "masked", topology="encoder", residual="pre", feedforward="squared-relu")
    flags = ["--to", str(tmp_path / "out"), "--format", "gguf", "--family", "bert"]
    code, _, err = call(export, str(run.path), *flags)
    assert code == 2
    for flag in ("--residual post", "--positions learned", "--embedding-norm", "--feedforward gelu"):
        assert flag in err


def test_a_wordpiece_that_llama_cpp_would_split_otherwise_is_one_sentence() -> None:
    content = json.loads(tokenizers_for_tests.like_bert().to_str())
    content["normalizer"]["handle_chinese_chars"] = False
    content["post_processor"] = None
    with pytest.raises(UserError, match="keeps Chinese characters together; does not put one token before and one"):
        gguf_files.gguf_vocabulary(content, 300)


ASSERTION = "/build/src/llama-vocab.cpp:7: GGML_ASSERT(special_sep_id != LLAMA_TOKEN_NULL) failed\n"


def abort_as_llama_cpp_does(remote: Connection, log: str) -> None:
    remote.recv()
    Path(log).write_text("llama_model_loader: loaded\n" + ASSERTION)
    os.abort()


@pytest.mark.slow
def test_an_abort_of_llama_cpp_is_one_sentence_and_refuses_the_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: Call
) -> None:
    run = run_of("BERT", tmp_path / "run", monkeypatch)
    monkeypatch.setattr(gguf_room, "has_llama_cpp", lambda: True)
    monkeypatch.setattr(llama_cpp, "version", lambda name: "0")
    monkeypatch.setattr(llama_cpp, "LlamaProcess", partial(LlamaProcess, abort_as_llama_cpp_does))
    code, _, err = call(export, str(run.path), "--to", str(tmp_path / "out"), "--format", "gguf")
    assert code == 1
    [sentence] = err.splitlines()
    assert sentence.startswith(
        "error: llama.cpp ended with this copy open: it was killed by SIGABRT (llama-vocab.cpp:7"
    )
    assert "the copy was removed" in sentence
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(not has_llama_cpp(), reason="llama-cpp-python is not installed")
def test_llama_cpp_itself_aborts_without_us(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = written(run_of("T5", tmp_path / "run", monkeypatch), tmp_path / "out")
    monkeypatch.setattr(gguf_room.GGUF, "_about", lambda self: {"tokenizer.ggml.add_bos_token": True})
    made.write(tmp_path / "out")
    with pytest.raises(CopyError, match=r"SIGABRT \(llama-vocab.cpp:\d+: GGML_ASSERT\(special_bos_id"):
        LlamaProcess().ask("token_ids", tmp_path / "out" / "model.gguf", 96, "word")
