"""`embed`: vectors of texts as the folder of the model says, those of transformers for its models."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import processors
from torch import Tensor

from minitransformer.commands import embed, export
from minitransformer.runs import Run
from minitransformer.runs.embedding import Embedder, open_embedder
from tests.runs_for_tests import Call, untrained_run
from tests.sentences_for_tests import MINILM, TEXTS, TINY, reference_embeddings, write_sentence_folder
from tests.tokenizers_for_tests import like_qwen2

importing = import_module("minitransformer.commands.import")


def array(path: Path) -> Tensor:
    return torch.from_numpy(np.load(path))


def lines_of(out: str) -> tuple[list[str], Tensor]:
    records = [json.loads(line) for line in out.splitlines()]
    return [record["text"] for record in records], torch.tensor([record["embedding"] for record in records])


def jsonl(path: Path, texts: list[str], field: str = "text") -> str:
    path.write_text("".join(json.dumps({field: text}) + "\n" for text in texts))
    return str(path)


def test_embeddings_of_a_folder_like_minilm_are_those_of_transformers(tmp_path: Path, call: Call) -> None:
    folder, data = write_sentence_folder(tmp_path / "minilm", MINILM), jsonl(tmp_path / "texts.jsonl", TEXTS)
    code, out, err = call(embed, str(folder), "--data", data, "--out", str(tmp_path / "out.npy"), "--batch-size", "2")
    assert code == 0, err
    assert "384 features, pooling 'mean', of length 1" in out
    assert err == f"note: 1 of {len(TEXTS)} texts have more than 64 tokens, and lost their end\n"
    expected = reference_embeddings(folder, TEXTS)
    assert (array(tmp_path / "out.npy") - expected).abs().max() < 1e-5
    assert (expected - expected.roll(1, 0)).abs().max() > 1e-2  # texts differ by far more than that


@pytest.mark.parametrize("architecture", ["BertModel", "BertForMaskedLM"])
@pytest.mark.parametrize("pooling", ["mean", "first", "last"])
@pytest.mark.parametrize("normalised", [True, False])
def test_flags_replace_what_the_folder_says(
    architecture: str, pooling: str, normalised: bool, tmp_path: Path, call: Call
) -> None:
    folder = write_sentence_folder(tmp_path / "public", architecture=architecture)
    texts = [*TEXTS[:2], TEXTS[-1]]
    flags = ["--pooling", pooling, "--normalised", str(normalised)]
    code, out, err = call(embed, str(folder), *flags, piped="\n".join(texts).encode())
    assert code == 0, err
    read, embeddings = lines_of(out)
    assert read == texts
    expected = reference_embeddings(folder, texts, pooling=pooling, normalise=normalised)
    torch.testing.assert_close(embeddings, expected, rtol=1e-5, atol=1e-5)


def test_an_import_embeds_as_its_folder_does_and_goes_back_with_all_that_it_says(tmp_path: Path, call: Call) -> None:
    pooling = {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}
    folder = write_sentence_folder(tmp_path / "public", pooling=pooling)
    code, out, err = call(importing, str(folder), "--out", str(tmp_path / "run"))
    assert code == 0, err
    assert out.splitlines()[-1] == f"next       python -m minitransformer embed {tmp_path / 'run'}"
    code, out, err = call(export, str(tmp_path / "run"), "--to", str(tmp_path / "out"))
    assert code == 0, err
    assert "hidden states  same: relative error" in out
    for name in (
        "modules.json",
        "1_Pooling/config.json",
        "sentence_bert_config.json",
        "config_sentence_transformers.json",
    ):
        assert (tmp_path / "out" / name).read_bytes() == (folder / name).read_bytes()
    expected = reference_embeddings(folder, TEXTS, pooling="first")
    torch.testing.assert_close(reference_embeddings(tmp_path / "out", TEXTS, pooling="first"), expected)
    for at in ("public", "run", "out"):
        found = torch.stack([*open_embedder(str(tmp_path / at)).embeddings(TEXTS, batch_size=3)])
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_sentence_transformers_gives_our_embeddings_and_opens_our_export(tmp_path: Path, call: Call) -> None:
    library = pytest.importorskip("sentence_transformers", reason="sentence_transformers is not installed")
    folder = write_sentence_folder(tmp_path / "older")
    library.SentenceTransformer(str(folder), device="cpu").save(str(tmp_path / "newer"))
    for name in ("older", "newer"):
        assert call(importing, str(tmp_path / name), "--out", str(tmp_path / f"{name}-run"))[0] == 0
        assert call(export, str(tmp_path / f"{name}-run"), "--to", str(tmp_path / f"{name}-out"))[0] == 0
        for at in (name, f"{name}-out"):
            theirs = torch.tensor(library.SentenceTransformer(str(tmp_path / at), device="cpu").encode(TEXTS))
            ours = torch.stack([*open_embedder(str(tmp_path / at)).embeddings(TEXTS, batch_size=2)])
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_a_default_prompt_and_lower_case_are_obeyed(tmp_path: Path) -> None:
    folder = write_sentence_folder(
        tmp_path / "public",
        texts={"max_seq_length": 64, "do_lower_case": True},
        prompts={"prompts": {"query": "The lazy "}, "default_prompt_name": "query"},
    )
    prompted = torch.stack([*open_embedder(str(folder)).embeddings(["DOG", " dog \n"], batch_size=1)])
    expected = reference_embeddings(folder, ["the lazy dog"])
    torch.testing.assert_close(prompted[:1], expected, rtol=1e-5, atol=1e-5)
    bare = torch.stack([*open_embedder(str(folder), prompt="").embeddings(["dog"], batch_size=1)])
    torch.testing.assert_close(bare, reference_embeddings(folder, ["dog"]), rtol=1e-5, atol=1e-5)
    assert open_embedder(str(folder)).tokens("DOG") == open_embedder(str(folder)).tokens("dog")


def test_a_decoder_embeds_by_its_last_token_which_may_be_a_special_one(tmp_path: Path, call: Call) -> None:
    """As Qwen3-Embedding, whose tokenizer ends each text with a token of its own."""
    tokenizer = like_qwen2()
    end = tokenizer.token_to_id("<|endoftext|>")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A <|endoftext|>", special_tokens=[("<|endoftext|>", end)]
    )
    sizes = {**TINY, "num_key_value_heads": 1, "tie_word_embeddings": True}
    pooling = {"pooling_mode_lasttoken": True, "pooling_mode_mean_tokens": False}
    folder = write_sentence_folder(
        tmp_path / "qwen", sizes, architecture="Qwen3Model", tokenizer=tokenizer, pooling=pooling
    )
    (folder / "tokenizer_config.json").write_text('{"pad_token": "<|other|>", "eos_token": "<|endoftext|>"}')
    code, out, err = call(embed, str(folder), "--data", jsonl(tmp_path / "texts.jsonl", TEXTS))
    assert code == 0, err
    embeddings = lines_of(out)[1]
    torch.testing.assert_close(embeddings, reference_embeddings(folder, TEXTS, pooling="last"), rtol=1e-5, atol=1e-5)


RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "decoder": ("causal", {}),
    "encoder": ("masked", {"topology": "encoder", "num_segments": 2}),
}


@pytest.mark.parametrize("kind", RUNS)
def test_our_own_runs_embed_by_hidden_states_at_their_tokens(kind: str, tmp_path: Path, call: Call, shake: Any) -> None:
    objective, choices = RUNS[kind]
    model, texts = untrained_run(tmp_path / "run", shake, objective, **choices), ["ab", "a longer text", ""]
    code, out, err = call(embed, str(tmp_path / "run"), piped="\n".join([*texts, ""]).encode())
    assert code == 0, err
    read, embeddings = lines_of(out)
    assert read == texts
    end = Run.open(tmp_path / "run").tokenizer.end_of_text
    for text, embedding in zip(texts, embeddings, strict=True):
        tokens = [*text.encode()] if kind == "decoder" else [end, *text.encode()]
        hidden = model.hidden_states(torch.tensor([tokens or [end]]))[0]
        expected = hidden[-1] if kind == "decoder" else hidden.mean(0)
        torch.testing.assert_close(embedding, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", RUNS)
def test_a_text_is_the_same_in_every_batch_and_comes_in_its_turn(kind: str, tmp_path: Path, shake: Any) -> None:
    objective, choices = RUNS[kind]
    untrained_run(tmp_path / "run", shake, objective, **choices)
    texts = ["x" * (number * 7 % 11) + str(number) for number in range(70)]
    embedder = open_embedder(str(tmp_path / "run"))
    alone = torch.stack([*embedder.embeddings(texts, batch_size=1)])
    together = torch.stack([*embedder.embeddings(texts, batch_size=2)])  # more than are sorted at a time
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)
    assert len(alone.unique(dim=0)) == len(texts)


def test_both_files_and_standard_output_hold_the_same_numbers(tmp_path: Path, call: Call, shake: Any) -> None:
    untrained_run(tmp_path / "run", shake, "causal")
    data, texts = jsonl(tmp_path / "in.jsonl", ["one\ntwo", "“three”"], "body"), ["one\ntwo", "“three”"]
    flags = [str(tmp_path / "run"), "--data", data, "--field", "body"]
    _, printed, _ = call(embed, *flags)
    for name in ("out.npy", "out.jsonl"):
        assert call(embed, *flags, "--out", str(tmp_path / name))[0] == 0
    assert (tmp_path / "out.jsonl").read_text() == printed
    read, embeddings = lines_of(printed)
    assert read == texts
    assert torch.equal(embeddings, array(tmp_path / "out.npy"))


def test_a_text_that_is_too_long_loses_its_end_and_keeps_what_frames_it(tmp_path: Path, shake: Any) -> None:
    untrained_run(tmp_path / "run", shake, "masked", topology="encoder")
    embedder = open_embedder(str(tmp_path / "run"))
    assert embedder.tokens("a" * 100) == [embedder.tokenizer.end_of_text, *b"a" * 23]
    assert embedder.tokens("a" * 23) == embedder.tokens("a" * 24)
    assert embedder.num_cut == 2


MISTAKES = [
    (["run", "--pooling", "means"], "unknown pooling 'means': did you mean 'mean'?"),
    (["run", "--out", "out.csv"], "--out out.csv ends with neither of .jsonl and .npy"),
    (["run", "--out", "there.npy"], "there.npy already exists: choose another --out"),
    (["run", "--batch-size", "0"], "batch_size is 0: it must be at least 1"),
    (["run", "--data", "none.txt"], "there is no file none.txt"),
    (["run", "--field", "body"], "--field is 'body', and lines of text have no fields"),
    (["run"], "there is no text in standard input"),
    (["pairs", "--data", "there.txt"], "topology 'encoder-decoder' reads pairs of texts"),
    (["public", "--checkpoint", "best", "--data", "there.txt"], "--checkpoint best is for runs"),
    (["max", "--data", "there.txt"], "the pooling is 'max_tokens', and known are mean, first, last"),
    (["./none", "--data", "there.txt"], "none is not a run folder"),
]


@pytest.mark.parametrize(("arguments", "words"), MISTAKES)
def test_a_mistake_is_one_sentence(
    arguments: list[str], words: str, tmp_path: Path, call: Call, shake: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    made = {
        "run": lambda: untrained_run(tmp_path / "run", shake, "causal"),
        "pairs": lambda: untrained_run(tmp_path / "pairs", shake, "seq2seq", topology="encoder-decoder"),
        "public": lambda: write_sentence_folder(tmp_path / "public"),
        "max": lambda: write_sentence_folder(
            tmp_path / "max", pooling={"pooling_mode_max_tokens": True, "pooling_mode_mean_tokens": False}
        ),
    }
    made.get(arguments[0], lambda: None)()
    (tmp_path / "there.npy").touch()
    (tmp_path / "there.txt").write_text("text")
    code, out, err = call(embed, *arguments)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert words in err
    assert (tmp_path / "there.npy").stat().st_size == 0


def test_a_prompt_that_is_to_be_left_out_of_the_pooling_is_refused(tmp_path: Path, call: Call) -> None:
    folder = write_sentence_folder(tmp_path / "public", pooling={"pooling_mode": "mean", "include_prompt": False})
    code, _, err = call(embed, str(folder), "--prompt", "query: ", piped=b"text")
    assert code == 2
    assert "the prompt 'query: ' is to be left out of the pooling" in err
    assert isinstance(open_embedder(str(folder)), Embedder)


def test_spaces_around_a_text_do_not_count(tmp_path: Path, shake: Any) -> None:
    untrained_run(tmp_path / "run", shake, "causal")
    embedder = open_embedder(str(tmp_path / "run"))
    assert embedder.tokens(" a b\n") == embedder.tokens("a b") == [*b"a b"]
