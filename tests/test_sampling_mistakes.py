"""`sample.py`: flags that contradict each other, or what a publisher advises, and what cannot be read."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from minitransformer.commands import sample
from minitransformer.runs import GENERATION
from tests.sampling_for_tests import (
    endless_run,
    expected,
    sample_command,
    sampled_runs,
)

runs, endless = pytest.fixture(scope="session")(sampled_runs), pytest.fixture(scope="session")(endless_run)
command = pytest.fixture(sample_command)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--lines", "--num-samples", "2"), "--lines writes one text for each line"),
        (("--batch-size", "0"), "batch_size is 0"),
        (("--weights", "int9"), "unknown weights 'int9': did you mean 'int8'? known are fp32, bf16, int8"),
        (("--draft", "nowhere", "--prompt", "a"), "nowhere is not a run folder"),
        (("runs/chars", "--draft", "runs/chars", "--draft-tokens", "0", "--seed", "1"), "draft_tokens is 0"),
        (("--temperature", "-1"), "temperature is -1.0"),
        (("nowhere",), "nowhere is not a run folder"),
        (("--prompt", "xyz"), "character 'x'"),
        (("--prompt", "a", "--prompt-file", "b"), "two prompts"),
        (("--interactive", "--prompt", "a"), "asks for its prompts"),
        (("--prompt-file", "nowhere.txt"), "nowhere.txt cannot be read (No such file or directory)"),
        (("--checkpoint", "step-9"), "no checkpoint 'step-9'"),
        (("--device", "quantum"), "device 'quantum' cannot be used here"),
    ],
)
def test_a_mistake_is_one_sentence_and_exit_code_2(command: Any, arguments: tuple[str, ...], message: str) -> None:
    code, out, err = command(*arguments)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert message in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "flag", "why"),
    [
        *(
            (f"--num-beams 4 {flag}", flag.split()[0], "has no part in a beam search")
            for flag in ("--temperature 0.8", "--top-k 5", "--top-p 0.9", "--min-p 0.1", "--seed 0")
        ),
        ("--num-beams=2 --draft runs/chars", "--draft", "a beam search follows several"),
        ("--num-beams 2 --lines --batch-size 4", "--batch-size", "one line at a time"),
        ("--length-penalty 1.0", "--length-penalty", "give --num-beams 2 or more"),
        ("--early_stopping never --num-beams 1", "--early-stopping", "give --num-beams 2 or more"),
        *(
            (f"--temperature 0 {flag}", flag.split()[0], "takes the likeliest token")
            for flag in ("--top-k 5", "--top-p 0.9", "--min-p 0.1", "--seed 0")
        ),
        ("--draft-tokens=4", "--draft-tokens", "name its run with --draft"),
        ("--batch-size 32", "--batch-size", "give --lines as well"),
    ],
)
def test_a_flag_that_can_change_nothing_beside_another_is_refused(
    command: Any, arguments: str, flag: str, why: str
) -> None:
    code, out, err = command("runs/chars", "--prompt", "ab", *arguments.split())
    assert (code, out) == (2, "")
    assert re.fullmatch(rf"error: {flag} .*{why}.*\n", err)


def test_flags_that_are_given_as_none_or_with_what_they_are_for_are_no_mistake(command: Any) -> None:
    for arguments in (
        "--num-beams 2 --top-k None --length-penalty 0.5 --early-stopping true",
        "--top-k 5 --top-p 0.9 --min-p 0.1 --temperature 0.5 --seed 1",
        "--temperature 0 --repetition-penalty 1.2 --no-repeat-ngram 3 --min-new-tokens 2",
    ):
        assert command("runs/chars", "--prompt", "ab", *arguments.split())[0] == 0


def test_contradictions_in_numbers_are_refused(command: Any) -> None:
    for arguments, message in (
        ("--num-beams 2 --num-samples 3", "num_samples 3 is more than num_beams 2"),
        ("--min-new-tokens 11", "min_new_tokens 11 is more than max_new_tokens 10"),
        ("--temperature 0 --num-samples 3", "--num-samples would give the same text 3 times at temperature 0"),
    ):
        code, out, err = command("runs/chars", "--prompt", "ab", *arguments.split())
        assert (code, out, err.count("\n"), message in err) == (2, "", 1, True)


# What the publisher of an import advises


@pytest.fixture
def advised(runs: Path) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Writes what `generation_config.json` of runs/chars says; it is gone afterwards."""
    path = runs / "runs" / "chars" / GENERATION
    yield lambda content: path.write_text(json.dumps(content)) and None
    path.unlink(missing_ok=True)


def test_what_the_publisher_advises_is_the_default_and_flags_override_it(
    command: Any, runs: Path, advised: Any
) -> None:
    advised({"do_sample": True, "temperature": 1.5, "top_k": 3, "eos_token_id": [1, 2], "max_new_tokens": 7})
    code, out, err = command("runs/chars", "--prompt", "ab", "--seed", "7", "--top-k", "4")
    assert (code, [out]) == (0, expected(runs, "ab", temperature=1.5, top_k=4))
    assert err == "note: by runs/chars/generation_config.json, unless flags say otherwise: temperature 1.5\n"
    advised({"do_sample": False, "temperature": 0.6, "top_p": 0.9})
    code, out, err = command("runs/chars", "--prompt", "ab")
    assert (code, [out]) == (0, expected(runs, "ab", temperature=0))
    assert "temperature 0.0" in err
    assert "--seed" not in err
    advised({"num_beams": 3, "early_stopping": True, "penalty_alpha": 0.6})
    code, out, err = command("runs/chars", "--prompt", "ab")
    assert (code, out) == (0, command("runs/chars", "--prompt", "ab", "--early-stopping", "true")[1])
    assert "num_beams 3, early_stopping true" in err
    assert "asks for penalty_alpha, which nothing here does" in err


def test_a_flag_against_what_the_publisher_advises_says_where_that_stands(command: Any, advised: Any) -> None:
    advised({"num_beams": 3})
    code, _, err = command("runs/chars", "--prompt", "ab", "--temperature", "0.5")
    assert code == 2
    assert "give --num-beams 1 (num_beams is 3 in runs/chars/generation_config.json)\n" in err
    assert command("runs/chars", "--prompt", "ab", "--temperature", "0.5", "--num-beams", "1")[0] == 0


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"temperature": "hot"}, "temperature is 'hot': it must be a number"),
        ({"top_k": 2.5}, "top_k is 2.5: it must be a whole number"),
        ({"top_p": 7}, "top_p is 7"),
        ({"num_beams": True}, "num_beams is True"),
        ({"do_sample": 1}, "do_sample is 1: it must be true or false"),
        ({"early_stopping": "soon"}, "early_stopping is 'soon'"),
        ({"temperature": 10**400}, "int too large"),
        ({"stop_strings": [1]}, "stop_strings is [1]"),
        ([], "it holds no JSON object"),
    ],
)
def test_advice_that_makes_no_sense_is_refused(command: Any, advised: Any, content: Any, message: str) -> None:
    advised(content)
    code, out, err = command("runs/chars", "--prompt", "ab")
    assert (code, out, err.count("\n")) == (1 if content == [] else 2, "", 1)
    assert "generation_config.json" in err
    assert message in err


def test_piped_bytes_that_are_no_text_are_refused(command: Any) -> None:
    code, out, err = command(piped=b"ab\xff")
    assert (code, out, err) == (2, "", "error: standard input is not UTF-8 (byte 2 is 0xff): convert it\n")


def test_without_a_run_the_way_to_one_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert sample.main([]) == 2
    assert "python train.py" in capfd.readouterr().err
