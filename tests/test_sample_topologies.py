"""`sample` for encoders, encoder-decoders and recurrent networks: masks are filled, and lines are translated."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from minitransformer.commands import sample
from minitransformer.generation.config import SamplingConfig
from minitransformer.generation.decode import translate
from minitransformer.generation.fill import fill_masks
from minitransformer.text.tokenizers import MASK, Bytes
from tests.runs_for_tests import Call, untrained_run


def test_masks_of_each_line_are_numbered_and_filled(tmp_path: Path, call: Call, shake: Any) -> None:
    model = untrained_run(tmp_path / "run", shake, "masked", topology="encoder")
    code, out, _ = call(sample, str(tmp_path / "run"), piped=b"a <mask> c\nno[MASK]\n")
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
    untrained_run(tmp_path / "run", shake, "masked", topology="encoder")
    code, _, err = call(sample, str(tmp_path / "run"), "--prompt", "nothing hidden")
    assert (code, err.count("\n")) == (2, 1)
    assert "there is no mask in 'nothing hidden': write <mask>" in err
    code, _, err = call(sample, str(tmp_path / "run"), "--prompt", "x" * 30 + "<mask>")
    assert code == 2
    assert "a line has 32 tokens, and the model sees 24" in err


@pytest.mark.parametrize("topology", ["encoder-decoder", "rnn"])
def test_lines_are_translated_in_their_order(topology: str, tmp_path: Path, call: Call, shake: Any) -> None:
    model = untrained_run(tmp_path / "run", shake, "seq2seq", topology=topology)
    lines = ["one", "twenty-two", "3"]
    code, out, _ = call(
        sample,
        str(tmp_path / "run"),
        "--num-beams",
        "2",
        "--max-new-tokens",
        "6",
        piped="\n".join([*lines, ""]).encode(),
    )
    assert code == 0
    sources = [[*line.encode(), 256] for line in lines]
    expected = translate(
        model, sources, SamplingConfig(num_beams=2, max_new_tokens=6), start=256, ends=[256], vocab_size=258
    )
    decoder = Bytes().with_special_tokens([MASK])
    assert out == "".join(decoder.decode(tokens) + "\n" for [tokens] in expected)


def test_several_translations_of_a_line_have_their_rank_before_them(tmp_path: Path, call: Call, shake: Any) -> None:
    untrained_run(tmp_path / "run", shake, "seq2seq", topology="encoder-decoder")
    options = ("--num-beams", "3", "--num-samples", "2", "--max-new-tokens", "4")
    code, out, _ = call(sample, str(tmp_path / "run"), *options, "--prompt", "one")
    assert code == 0
    assert out.startswith("1\t")
    assert "\n2\t" in out


def test_a_line_longer_than_the_context_is_cut_and_said(tmp_path: Path, call: Call, shake: Any) -> None:
    untrained_run(tmp_path / "run", shake, "seq2seq", topology="encoder-decoder")
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
    untrained_run(tmp_path / "run", shake, "masked" if topology == "encoder" else "seq2seq", topology=topology)
    code, out, err = call(sample, str(tmp_path / "run"), *flags.split(), piped=b"one <mask>\n")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("error: --")
    assert why in err


def test_lengths_of_targets_count_the_token_that_they_begin_after(tmp_path: Path, call: Call, shake: Any) -> None:
    untrained_run(tmp_path / "run", shake, "seq2seq", topology="encoder-decoder")
    advice = {"max_length": 6, "min_length": 6, "num_beams": 2, "length_penalty": 2.0, "no_repeat_ngram_size": 0}
    (tmp_path / "run" / "generation_config.json").write_text(json.dumps(advice))
    code, out, err = call(sample, str(tmp_path / "run"), "--prompt", "one")
    assert code == 0
    assert "num_beams 2, length_penalty 2.0, max_new_tokens 5, min_new_tokens 5" in err
    flags = "--num-beams 2 --length-penalty 2 --max-new-tokens 5 --min-new-tokens 5"
    (tmp_path / "run" / "generation_config.json").unlink()
    assert call(sample, str(tmp_path / "run"), "--prompt", "one", *flags.split()) == (0, out, "")
