"""`sample.py`: text on standard output, notes on standard error, and an exit code for every way to end."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from minitransformer.commands import sample
from minitransformer.generation.config import SamplingConfig
from minitransformer.generation.streaming import best_texts
from minitransformer.models.decoder import DecoderLM
from minitransformer.runs import Run
from minitransformer.text.tokenizers import Tokenizer
from tests.sampling_for_tests import (
    CONTEXT,
    MODEL,
    SCRIPT,
    continued,
    endless_run,
    expected,
    sample_command,
    sampled_runs,
    write_run,
)

runs, endless = pytest.fixture(scope="session")(sampled_runs), pytest.fixture(scope="session")(endless_run)
command = pytest.fixture(sample_command)


def test_a_prompt_is_continued_by_the_latest_run_and_only_text_is_on_standard_output(command: Any, runs: Path) -> None:
    code, out, err = command("--prompt", "ab", "--seed", "7")
    assert (code, [out]) == (0, expected(runs, "ab"))
    assert err == "note: the model is that of runs/chars\n"


def test_a_run_and_a_checkpoint_can_be_named(command: Any, runs: Path) -> None:
    first, latest = (expected(runs, "ab", checkpoint) for checkpoint in ("step-000001", "latest"))
    assert first != latest
    code, out, err = command("runs/chars", "--checkpoint", "step-000001", "--prompt", "ab", "--seed", "7")
    assert (code, [out], err) == (0, first, "")


def test_a_prompt_may_come_from_a_pipe_or_a_file_or_not_at_all(command: Any, runs: Path) -> None:
    text = "é b\n"
    (runs / "prompt.txt").write_text(text, encoding="utf-8")
    piped = command("--seed", "7", piped=text.encode())
    assert [piped[1]] == expected(runs, text)
    assert command("--seed", "7", "--prompt-file", "prompt.txt") == piped
    assert [command("--seed", "7")[1]] == expected(runs, "")
    assert [command("--seed", "7", piped=b"")[1]] == expected(runs, "")


def test_several_samples_have_a_line_between_them(command: Any, runs: Path) -> None:
    _, out, _ = command("--prompt", "ab", "--seed", "7", "--num-samples", "3", "--temperature", "1.5")
    texts = expected(runs, "ab", num_samples=3, temperature=1.5)
    assert out == f"{sample.SEPARATOR}\n".join(texts)
    assert len(set(texts)) == 3


def test_stop_strings_may_be_several(command: Any, runs: Path) -> None:
    flags = ("--prompt", "", "--seed", "7", "--temperature", "3", "--max-new-tokens", "200")
    _, out, _ = command(*flags, "--stop", "ab", "--stop", "dc")
    assert [out] == expected(runs, "", temperature=3.0, max_new_tokens=200, stop=("ab", "dc"))
    assert "ab" not in out
    assert "dc" not in out


def test_the_seed_that_was_drawn_gives_the_text_again(command: Any) -> None:
    _, out, err = command("runs/chars", "--prompt", "ab")
    seed = err.split()[2]
    assert command("runs/chars", "--prompt", "ab", "--seed", seed) == (0, out, "")


def test_passing_the_context_is_announced_in_one_line(command: Any) -> None:
    rule = "the oldest half is dropped and the rest is read anew"
    _, _, err = command("runs/chars", "--prompt", "ab", "--seed", "7", "--max-new-tokens", str(CONTEXT - 1))
    assert err == ""
    _, _, err = command("runs/chars", "--prompt", "ab", "--seed", "7", "--max-new-tokens", str(CONTEXT))
    assert rule in err
    assert err.count("\n") == 1
    _, _, err = command("runs/chars", "--prompt", "ab" * CONTEXT, "--seed", "7")
    assert rule in err
    assert "of the prompt's 64 tokens, the last " in err
    assert err.count("\n") == 1


def test_interactive_mode_continues_line_after_line(command: Any) -> None:
    code, out, err = command("runs/chars", "--interactive", "--seed", "7", piped="ab\nxyz\né".encode())
    assert code == 0
    assert out.startswith("ab")
    assert "\né" in out
    assert err.count("error: character 'x'") == 1, "a line that cannot be encoded ends nothing"


def test_weights_in_fewer_bytes_write_text_and_a_small_model_says_what_multiplies_them(command: Any) -> None:
    arguments = ("--prompt", "ab", "--seed", "7", "--weights")
    exact = command(*arguments, "fp32")
    for weights in ("bf16", "int8"):
        code, out, err = command(*arguments, weights)
        assert (code, out[:2], len(out)) == (0, "ab", len(exact[1]))
        assert f"note: {weights} weights are multiplied by torch's own kernels, as compiling another" in err


def test_each_line_is_continued_as_if_it_were_the_only_prompt(command: Any, runs: Path) -> None:
    prompts = ["ab", "", "é b", "dd cab", "a"]
    arguments = ("--lines", "--seed", "7", "--batch-size", "2")
    code, out, err = command(*arguments, "runs/chars", piped="\n".join(prompts).encode())
    expected_lines = [continued(runs, prompt)[0].replace("\n", r"\n") for prompt in prompts]
    assert (code, out.splitlines(), err) == (0, expected_lines, "")


def test_a_draft_changes_no_greedy_text_and_its_luck_is_told(command: Any, runs: Path, endless: Path) -> None:
    greedy = ("runs/chars", "--prompt", "ab", "--temperature", "0")
    _, alone, _ = command(*greedy)
    code, out, err = command(*greedy, "--draft", "runs/chars", "--draft-tokens", "3")
    assert (code, out) == (0, alone)
    assert re.fullmatch(r"note: of the draft's (\d+) guesses, the model accepted \1 \(100%\)\n", err)
    code, out, err = command(*greedy, "--draft", str(endless))
    assert (code, out) == (0, alone)
    assert re.fullmatch(r"note: of the draft's \d+ guesses, the model accepted \d+ \(\d+%\)\n", err)


def test_a_draft_answers_line_after_line_too(command: Any) -> None:
    flags = ("runs/chars", "--interactive", "--temperature", "0")
    _, alone, _ = command(*flags, piped=b"ab\nc")
    _, out, err = command(*flags, "--draft", "runs/chars", piped=b"ab\nc")
    assert out == alone
    assert err.count("guesses") == 1


def test_a_draft_with_another_tokenizer_is_refused(command: Any, runs: Path, tmp_path: Path) -> None:
    other = Tokenizer.named("chars").fit(lambda: iter(["abcdé \nx"]))
    write_run(tmp_path / "other", [DecoderLM(MODEL)], other)
    code, out, err = command("runs/chars", "--prompt", "ab", "--draft", str(tmp_path / "other"))
    assert (code, out) == (2, "")
    assert "has another tokenizer than runs/chars" in err
    assert err.count("\n") == 1


def test_a_beam_search_writes_the_best_texts_and_draws_nothing(command: Any, runs: Path) -> None:
    run = Run.open(runs / "runs" / "chars")
    sampling = SamplingConfig(num_beams=4, num_samples=2, max_new_tokens=10)
    best, second = (
        f"ab{text}" for text in best_texts(run.load_model(), run.tokenizer, run.tokenizer.encode_prompt("ab"), sampling)
    )
    flags = ("runs/chars", "--num-beams", "4")
    assert command(*flags, "--prompt", "ab") == (0, best.removesuffix("\n") + "\n", "")
    _, out, err = command(*flags, "--prompt", "ab", "--num-samples", "2")
    assert (out, err) == ("\n".join(text.removesuffix("\n") for text in (best, sample.SEPARATOR, second)) + "\n", "")
    code, out, err = command(*flags, "--lines", piped=b"ab\nc\nab")
    lines = out.splitlines()
    assert (code, err, len(lines)) == (0, "", 3)
    assert lines[0] == lines[2] == best.replace("\n", r"\n")
    code, out, err = command(*flags, "--interactive", piped=b"ab\nab")
    assert (code, out, err) == (0, 2 * (best.removesuffix("\n") + "\n"), "")


def test_a_beam_search_past_the_context_is_announced(command: Any) -> None:
    code, _, err = command("runs/chars", "--prompt", "ab", "--num-beams", "2", "--max-new-tokens", str(CONTEXT + 4))
    assert (code, err.count("\n")) == (0, 1)
    assert "the oldest half is dropped and the rest is read anew" in err


def started(run: Path) -> subprocess.Popen[bytes]:
    arguments = [sys.executable, str(SCRIPT), str(run), "--prompt", "ab", "--max-new-tokens", "1000000"]
    arguments += ["--temperature", "0"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(SCRIPT.parent)}
    process = subprocess.Popen(
        arguments,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None
    # Text arrives while more is made.
    assert process.stdout.read(4).startswith(b"ab")
    return process


@pytest.mark.skipif(sys.platform == "win32", reason="signals are POSIX")
def test_ctrl_c_ends_quietly_with_130(endless: Path) -> None:
    process = started(endless)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert b"Traceback" not in err


@pytest.mark.skipif(sys.platform == "win32", reason="pipes are POSIX")
def test_a_reader_that_leaves_ends_it_quietly(endless: Path) -> None:
    process = started(endless)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    err = process.stderr.read()
    assert process.wait(timeout=60) == 1
    assert b"Traceback" not in err
    assert b"BrokenPipe" not in err
