"""`sample` for encoders and encoder-decoders, `import` and `export`: what goes in, what comes out, what is refused."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

from minitransformer import pretrained
from minitransformer.commands import sample, train
from minitransformer.generation.config import SamplingConfig
from minitransformer.generation.decode import translate
from minitransformer.generation.fill import fill_masks
from minitransformer.models.config import ModelConfig
from minitransformer.models.model import Model, build_model
from minitransformer.runs import Run
from minitransformer.text.tokenizers import MASK, Bytes
from minitransformer.training.checkpoint import write_checkpoint
from minitransformer.training.config import DataConfig, RunConfig, TrainingConfig

with suppress(ImportError):  # before a test captures the standard error that it keeps for its warnings
    import transformers  # noqa: F401

SHAPE = {"d_model": 16, "num_layers": 1, "num_heads": 2, "context_length": 24}
Call = Callable[..., tuple[int, str, str]]


def run_of(path: Path, shake: Any, objective: str, **choices: Any) -> Model:
    """A run folder of an untrained model with shaken weights."""
    tokenizer = Bytes().with_special_tokens([MASK])
    model = shake(build_model(ModelConfig(**{**SHAPE, "vocab_size": tokenizer.vocab_size, **choices}))).eval()
    config = RunConfig(model.config, DataConfig(tokenizer="bytes"), TrainingConfig(objective=objective))
    run = Run.create(path, config, tokenizer, tokenizer)
    write_checkpoint(run.checkpoints, 0, model, {})
    return model


@pytest.fixture
def call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Call:
    """Runs a command with what is piped in; gives code, output and notes."""

    def called(command: Any, *arguments: str, piped: str | None = None) -> tuple[int, str, str]:
        (tmp_path / "piped").write_text(piped or "")
        with (tmp_path / "piped").open(encoding="utf-8") as stdin:
            monkeypatch.setattr(sys, "stdin", stdin)
            code = command.main(list(arguments))
        out, err = capfd.readouterr()
        return code, out, err

    return called


def test_masks_of_each_line_are_numbered_and_filled(tmp_path: Path, call: Call, shake: Any) -> None:
    model = run_of(tmp_path / "run", shake, "masked", topology="encoder")
    code, out, _ = call(sample, str(tmp_path / "run"), piped="a <mask> c\nno[MASK]\n")
    assert code == 0
    first, guesses, second, _ = out.splitlines()
    assert first == "a [1] c"
    assert second == "no[1]"
    end, mask = 256, 257
    [[(token, probability), *_]] = fill_masks(model, [end, *b"a ", mask, *b" c"], mask, vocab_size=258)
    assert guesses.startswith(
        f"[1] {bytes([token]).decode(errors='replace') if token < 256 else ''!r} {probability:.0%}"
    )


def test_a_line_without_a_mask_and_one_that_is_too_long_are_refused(tmp_path: Path, call: Call, shake: Any) -> None:
    run_of(tmp_path / "run", shake, "masked", topology="encoder")
    code, _, err = call(sample, str(tmp_path / "run"), "--prompt", "nothing hidden")
    assert (code, err.count("\n")) == (2, 1)
    assert "there is no mask in 'nothing hidden': write <mask>" in err
    code, _, err = call(sample, str(tmp_path / "run"), "--prompt", "x" * 30 + "<mask>")
    assert code == 2
    assert "a line has 32 tokens, and the model sees 24" in err


@pytest.mark.parametrize("topology", ["encoder-decoder", "rnn"])
def test_lines_are_translated_in_their_order(topology: str, tmp_path: Path, call: Call, shake: Any) -> None:
    model = run_of(tmp_path / "run", shake, "seq2seq", topology=topology)
    lines = ["one", "twenty-two", "3"]
    code, out, _ = call(
        sample, str(tmp_path / "run"), "--num-beams", "2", "--max-new-tokens", "6", piped="\n".join(lines) + "\n"
    )
    assert code == 0
    sources = [[*line.encode(), 256] for line in lines]
    expected = translate(
        model, sources, SamplingConfig(num_beams=2, max_new_tokens=6), start=256, ends=[256], vocab_size=258
    )
    decoder = Bytes().with_special_tokens([MASK])
    assert out == "".join(decoder.decode(tokens) + "\n" for [tokens] in expected)


def test_several_translations_of_a_line_have_their_rank_before_them(tmp_path: Path, call: Call, shake: Any) -> None:
    run_of(tmp_path / "run", shake, "seq2seq", topology="encoder-decoder")
    options = ("--num-beams", "3", "--num-samples", "2", "--max-new-tokens", "4")
    code, out, _ = call(sample, str(tmp_path / "run"), *options, "--prompt", "one")
    assert code == 0
    assert out.startswith("1\t")
    assert "\n2\t" in out


def test_a_line_longer_than_the_context_is_cut_and_said(tmp_path: Path, call: Call, shake: Any) -> None:
    run_of(tmp_path / "run", shake, "seq2seq", topology="encoder-decoder")
    code, _, err = call(sample, str(tmp_path / "run"), "--max-new-tokens", "2", "--prompt", "x" * 40)
    assert code == 0
    assert "note: a line of 41 tokens is cut to the 24 that the model sees" in err


@pytest.mark.parametrize(
    ("topology", "flags", "why"),
    [
        ("encoder", "--temperature 0.5", "fills in masks"),
        ("encoder", "--num-beams 2", "fills in masks"),
        ("encoder", "--seed 1", "fills in masks"),
        ("encoder", "--lines", "fills in masks"),
        ("encoder", "--stop x", "fills in masks"),
        ("encoder-decoder", "--lines", "makes a line of each line"),
        ("rnn", "--stop x", "ends by itself"),
        ("encoder-decoder", "--draft-tokens 2", "name its run with --draft"),
        ("encoder-decoder", "--num-beams 2 --top-k 3", "has no part in a beam search"),
        ("rnn", "--length-penalty 2", "give --num-beams 2 or more"),
        ("encoder-decoder", "--interactive --batch-size 2", "one line is answered at a time"),
    ],
)
def test_a_flag_that_means_nothing_to_a_kind_of_model_is_refused(
    topology: str, flags: str, why: str, tmp_path: Path, call: Call, shake: Any
) -> None:
    run_of(tmp_path / "run", shake, "masked" if topology == "encoder" else "seq2seq", topology=topology)
    code, out, err = call(sample, str(tmp_path / "run"), *flags.split(), piped="one <mask>\n")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("error: --")
    assert why in err


# Import and export


export, importing = import_module("minitransformer.commands.export"), import_module("minitransformer.commands.import")
GPT2 = {"positions": "learned", "bias": True}
LLAMA = {"norm": "rms", "feedforward": "swiglu"}


def test_a_run_is_exported_and_its_copy_checked(tmp_path: Path, call: Call, shake: Any) -> None:
    library = pytest.importorskip("transformers", reason="the reference implementation is not installed")
    model = run_of(tmp_path / "run", shake, "causal", **GPT2)
    code, out, err = call(export, str(tmp_path / "run"), "--to", str(tmp_path / "out"))
    assert (code, err) == (0, "")
    assert "format     gpt2" in out
    opened = f"opened by transformers {library.__version__}"
    [difference] = re.findall(rf"logits of the copy, {re.escape(opened)}, have a relative error of at most (\S+)", out)
    assert float(difference) < 1e-5
    copy, _ = pretrained.load(tmp_path / "out")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), copy.parameters(), strict=True))


def test_without_transformers_the_copy_is_opened_again_by_ours_and_that_is_said(
    tmp_path: Path, call: Call, shake: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    run_of(tmp_path / "run", shake, "causal", **GPT2)
    code, out, _ = call(export, str(tmp_path / "run"), "--to", str(tmp_path / "out"))
    assert code == 0
    assert (
        "opened by minitransformer alone, as transformers is not installed, have a relative error of at most 0.0e+00"
        in out
    )


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            {"activation_function": "relu"},
            r"logits of the copy, opened by transformers \S+, have a relative error of",
        ),
        ({"n_head": None}, r"transformers cannot open the copy in \S+ \(Validation error for field 'n_head'"),
    ],
    ids=["another model", "cannot be opened"],
)
def test_a_copy_that_is_another_model_for_transformers_is_removed(
    damage: dict[str, Any], message: str, tmp_path: Path, call: Call, shake: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("transformers", reason="the reference implementation is not installed")
    save = pretrained.save

    def damaged(model: Model, folder: Path, *arguments: Any, **options: Any) -> None:
        save(model, folder, *arguments, **options)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | damage))

    monkeypatch.setattr(pretrained, "save", damaged)
    run_of(tmp_path / "run", shake, "causal", **GPT2)
    code, out, err = call(export, str(tmp_path / "run"), "--to", str(tmp_path / "out"))
    assert (code, out) == (1, "")
    assert re.match(f"error: {message}.*: the copy was removed; choose another --format\n$", err), err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("family", "choices"),
    [
        ("llama", LLAMA),
        ("mixtral", {**LLAMA, "num_experts": 2}),
        ("qwen2", {**LLAMA, "qkv_bias": True}),
        ("qwen3", {**LLAMA, "qk_norm": "head"}),
    ],
)
def test_the_first_family_that_holds_a_model_is_found(
    family: str, choices: dict[str, Any], tmp_path: Path, call: Call, shake: Any
) -> None:
    run_of(tmp_path / "run", shake, "causal", **choices)
    code, out, _ = call(export, str(tmp_path / "run"), "--to", str(tmp_path / "out"))
    assert code == 0
    assert f"format     {family}\n" in out


def test_everything_in_the_way_of_the_nearest_format_is_named_with_flags_that_go_round_it(
    tmp_path: Path, call: Call, shake: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MINITRANSFORMER_DATA", str(tmp_path / "data"))
    preset = {"feedforward": "squared-relu", "qk_norm": "head", "tied_embeddings": False, "token_smear": True}
    run_of(tmp_path / "run", shake, "causal", **preset)
    code, _, err = call(export, str(tmp_path / "run"), "--to", str(tmp_path / "out"))
    assert code == 2
    assert err == (
        "error: no known format can represent this model; the nearest is qwen3: norm is 'layer', and qwen3 can only "
        "hold 'rms'; feedforward is 'squared-relu', and qwen3 can only hold 'swiglu' or 'geglu-tanh' or 'geglu' or "
        "'reglu'; token_smear is True, and qwen3 can only hold False: train a model with --norm rms --feedforward "
        "swiglu --no-token-smear, which qwen3 can represent\n"
    )
    (tmp_path / "text.txt").write_text("the dog and the cat " * 200)
    [flags] = re.findall("train a model with (.*), which", err)
    code, *_ = call(
        train,
        *("gpt-nano", "--data", str(tmp_path / "text.txt"), "--tokenizer", "bytes", "--out", str(tmp_path / "trained")),
        *("--d-model", "16", "--num-layers", "1", "--context-length", "16", "--token-smear", *flags.split()),
        *("--steps", "1", "--warmup-steps", "0", "--device", "cpu"),
    )
    assert code == 0
    code, out, _ = call(export, str(tmp_path / "trained"), "--to", str(tmp_path / "out"))
    assert code == 0
    assert "format     qwen3\n" in out


def test_a_format_that_is_asked_for_says_all_that_is_in_its_way(tmp_path: Path, call: Call, shake: Any) -> None:
    run_of(tmp_path / "run", shake, "causal", **LLAMA, qk_norm="head", attention_window=3, window_pattern=(True,))
    code, _, err = call(export, str(tmp_path / "run"), "--to", str(tmp_path / "out"), "--format", "llama")
    assert code == 2
    assert "cannot be exported as llama: qk_norm is 'head', and llama can only hold 'none'; attention_window" in err
    assert "train a model with --qk-norm none --attention-window None, which llama can represent" in err


def test_the_help_says_which_presets_can_be_exported(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        export.main(["--help"])
    assert "gpt2-124m (gpt2, opt)" in capsys.readouterr().out


def test_what_no_format_can_hold_is_refused_and_nothing_written(tmp_path: Path, call: Call, shake: Any) -> None:
    run_of(tmp_path / "run", shake, "causal", residual="residual")
    code, _, err = call(export, str(tmp_path / "run"), "--to", str(tmp_path / "out"))
    assert code == 2
    assert "residual is 'residual'" in err
    assert not (tmp_path / "out").exists()
    code, _, err = call(export, str(tmp_path / "run"), "--to", str(tmp_path / "out"), "--format", "lama")
    assert code == 2
    assert "did you mean 'llama'" in err


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
    code, out, _ = call(export, str(tmp_path / "tuned"), "--to", str(tmp_path / "back"), "--format", "gpt2")
    assert code == 0
    transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "back")


def write_public(folder: Path, generation: Any) -> None:
    """A tiny GPT-2 with a tokenizer of bytes, and how its publisher would have it generate."""
    model = build_model(ModelConfig(**SHAPE, **GPT2, vocab_size=257))
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


def test_lengths_of_targets_count_the_token_that_they_begin_after(tmp_path: Path, call: Call, shake: Any) -> None:
    run_of(tmp_path / "run", shake, "seq2seq", topology="encoder-decoder")
    advice = {"max_length": 6, "min_length": 6, "num_beams": 2, "length_penalty": 2.0, "no_repeat_ngram_size": 0}
    (tmp_path / "run" / "generation_config.json").write_text(json.dumps(advice))
    code, out, err = call(sample, str(tmp_path / "run"), "--prompt", "one")
    assert code == 0
    assert "num_beams 2, length_penalty 2.0, max_new_tokens 5, min_new_tokens 5" in err
    flags = "--num-beams 2 --length-penalty 2 --max-new-tokens 5 --min-new-tokens 5"
    (tmp_path / "run" / "generation_config.json").unlink()
    assert call(sample, str(tmp_path / "run"), "--prompt", "one", *flags.split()) == (0, out, "")


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
