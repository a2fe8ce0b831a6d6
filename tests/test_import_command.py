"""`import`: a public checkpoint becomes a run with its tokenizer and its publisher's advice, and goes back."""

from __future__ import annotations

import json
import subprocess
import sys
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

from minitransformer import pretrained
from minitransformer.commands import export, sample, train
from minitransformer.models.config import ModelConfig
from minitransformer.models.model import build_model
from minitransformer.runs import Run
from minitransformer.text.tokenizers import Bytes
from tests.runs_for_tests import Call

with suppress(ImportError):  # before a test captures the standard error that it keeps for its warnings
    import transformers  # noqa: F401


importing = import_module("minitransformer.commands.import")


GPT2 = {"positions": "learned", "bias": True}


def test_a_checkpoint_becomes_a_run_that_samples_trains_and_goes_back(
    tmp_path: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    transformers = pytest.importorskip("transformers", reason="the reference implementation is not installed")
    tokenizers = pytest.importorskip("tokenizers", reason="the tokenizers package is not installed")
    monkeypatch.setenv("MINITRANSFORMER_DATA", str(tmp_path / "data"))
    implementation = tokenizers.Tokenizer(tokenizers.models.BPE())
    implementation.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    implementation.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )
    implementation.train_from_iterator(["the cat and the dog " * 20], trainer)
    size = implementation.get_vocab_size()
    # With ids that the vocabulary has: of others the library complains, to the stream that was there when it came.
    ends = {"bos_token_id": 0, "eos_token_id": 0}
    config = transformers.GPT2Config(vocab_size=size, n_positions=16, n_embd=16, n_layer=1, n_head=2, **ends)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "public")
    implementation.save(str(tmp_path / "public" / "tokenizer.json"))

    code, out, err = call(importing, str(tmp_path / "public"), "--out", str(tmp_path / "run"))
    assert code == 0
    assert "error" not in err
    assert f"{size:,} tokens" in out
    code, out, _ = call(sample, str(tmp_path / "run"), "--prompt", "the cat", "--max-new-tokens", "3")
    assert code == 0
    assert out.startswith("the cat")
    (tmp_path / "text.txt").write_text("the dog and the cat " * 200)
    code, out, _ = call(
        train,
        *("--init-from", str(tmp_path / "run"), "--data", str(tmp_path / "text.txt"), "--out", str(tmp_path / "tuned")),
        *("--steps", "2", "--warmup-steps", "0", "--device", "cpu"),
    )
    assert code == 0
    code, out, _ = call(export, str(tmp_path / "tuned"), "--to", str(tmp_path / "back"), "--family", "gpt2")
    assert code == 0
    transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "back")


def write_public(folder: Path, generation: Any) -> None:
    """A tiny GPT-2 with a tokenizer of bytes, and how its publisher would have it generate."""
    model = build_model(ModelConfig(d_model=16, num_layers=1, num_heads=2, context_length=24, vocab_size=257, **GPT2))
    pretrained.save(model, folder, "gpt2", {"eos_token_id": 256}, tokenizer=Bytes(), generation=generation)


def test_how_a_publisher_would_generate_goes_in_with_an_import_and_out_as_it_came(tmp_path: Path, call: Call) -> None:
    advice = {"do_sample": True, "top_p": 0.5, "eos_token_id": [256, 10], "max_new_tokens": 3, "some_new_field": [1]}
    write_public(tmp_path / "public", advice)
    assert call(importing, str(tmp_path / "public"), "--out", str(tmp_path / "run"))[0] == 0
    run = Run.open(tmp_path / "run")
    assert set(run.tokenizer.ends) == {256, 10}
    _, out, err = call(sample, str(tmp_path / "run"), "--prompt", "ab", "--seed", "1")
    name = tmp_path / "run" / "generation_config.json"
    advised = "temperature 1.0, top_p 0.5, max_new_tokens 3"
    assert err == f"note: by {name}, unless flags say otherwise: {advised}\n"
    flags = "--temperature 1 --top-p 0.5 --max-new-tokens 3 --seed 1"
    assert call(sample, str(tmp_path / "run"), "--prompt", "ab", *flags.split()) == (0, out, "")
    assert call(export, str(tmp_path / "run"), "--to", str(tmp_path / "out"))[0] == 0
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text()) == advice
    transformers = pytest.importorskip("transformers", reason="the reference implementation is not installed")
    theirs = transformers.GenerationConfig.from_pretrained(tmp_path / "out")
    assert (theirs.do_sample, theirs.top_p, theirs.eos_token_id) == (True, 0.5, [256, 10])


@pytest.mark.parametrize(
    "advice",
    [
        {"num_beams": 3, "early_stopping": True, "max_new_tokens": 6},
        {"num_beams": 2, "length_penalty": 0.5, "no_repeat_ngram_size": 2, "max_new_tokens": 5, "top_k": 0},
        {"do_sample": False, "temperature": 0.3, "repetition_penalty": 1.5, "max_new_tokens": 6, "typical_p": 1.0},
    ],
)
def test_an_import_writes_by_its_publishers_advice_what_the_reference_writes(
    advice: dict[str, Any], tmp_path: Path, call: Call
) -> None:
    transformers = pytest.importorskip("transformers", reason="the reference implementation is not installed")
    write_public(tmp_path / "public", {**advice, "eos_token_id": 256, "pad_token_id": 256})
    assert call(importing, str(tmp_path / "public"), "--out", str(tmp_path / "run"))[0] == 0
    _, out, err = call(sample, str(tmp_path / "run"), "--prompt", "ab", "--device", "cpu")
    assert err.count("\n") == 1
    model = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "public")
    [expected] = model.generate(torch.tensor([[*b"ab"]]), attention_mask=torch.ones(1, 2)).tolist()
    assert out.removesuffix("\n") == Bytes().decode(expected).removesuffix("\n")


def test_advice_of_a_publisher_that_makes_no_sense_makes_no_run(tmp_path: Path, call: Call) -> None:
    write_public(tmp_path / "public", {"temperature": "hot"})
    code, _, err = call(importing, str(tmp_path / "public"), "--out", str(tmp_path / "run"))
    assert (code, err.count("\n")) == (2, 1)
    assert "generation_config.json: temperature is 'hot'" in err
    assert not (tmp_path / "run").exists()


def test_a_folder_that_is_no_checkpoint_makes_no_run(tmp_path: Path, call: Call) -> None:
    (tmp_path / "empty").mkdir()
    code, _, err = call(importing, str(tmp_path / "empty"), "--out", str(tmp_path / "run"))
    assert code == 2
    assert "has no config.json" in err
    assert not (tmp_path / "run").exists()


def test_a_run_keeps_a_tokenizer_that_only_the_package_can_run(tmp_path: Path, call: Call) -> None:
    transformers = pytest.importorskip("transformers", reason="the reference implementation is not installed")
    tokenizers = pytest.importorskip("tokenizers", reason="the tokenizers package is not installed")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "cat", "##s", "sat"]
    vocabulary = {word: number for number, word in enumerate(words)}
    implementation = tokenizers.Tokenizer(tokenizers.models.WordPiece(vocabulary, unk_token="[UNK]"))
    implementation.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    implementation.add_special_tokens(words[:5])
    config = transformers.BertConfig(
        vocab_size=len(words), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    transformers.BertForMaskedLM(config).save_pretrained(tmp_path / "public")
    implementation.save(str(tmp_path / "public" / "tokenizer.json"))
    code, out, _ = call(importing, str(tmp_path / "public"), "--out", str(tmp_path / "run"))
    assert code == 0
    assert "tokenizer  tokenizers, 9 tokens" in out
    # In a process of its own, which has not imported what writes such runs.
    shown = subprocess.run(
        [
            sys.executable,
            str(Path(__file__).parent.parent / "sample.py"),
            str(tmp_path / "run"),
            "--prompt",
            "the [MASK]",
        ],
        capture_output=True,
        text=True,
    )
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout.startswith("the[1]\n[1] ")
