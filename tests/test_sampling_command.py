"""`sample.py`: text on standard output, notes on standard error, and an exit code for every way to end."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from minitransformer.commands import sample
from minitransformer.generation.config import SamplingConfig
from minitransformer.generation.streaming import best_texts, stream_text
from minitransformer.models.config import ModelConfig
from minitransformer.models.decoder import DecoderLM
from minitransformer.models.model import Model, build_model
from minitransformer.runs import GENERATION, Run
from minitransformer.text.tokenizers import Tokenizer
from minitransformer.training.checkpoint import write_checkpoint
from minitransformer.training.config import DataConfig, RunConfig, TrainingConfig
from tests.prepared_for_tests import fitted
from tests.runs_for_tests import Call

SCRIPT = Path(__file__).parent.parent / "sample.py"
CONTEXT = 32
NOTHING_REMEMBERED = "note: each line is a prompt of its own, and none is remembered: --chat is for conversations\n"
TOKENIZER = fitted("chars", "abcdé \n")
MODEL = ModelConfig(d_model=16, num_layers=1, num_heads=2, context_length=CONTEXT, vocab_size=16)


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory, shake: Callable[[DecoderLM], DecoderLM]) -> Path:
    """A folder with the run `runs/chars`, whose model has more tokens than its tokenizer."""
    folder = tmp_path_factory.mktemp("sampling")
    torch.manual_seed(1)
    write_run(folder / "runs" / "chars", [shake(build_model(MODEL)), shake(build_model(MODEL))])
    return folder


@pytest.fixture(scope="session")
def endless(tmp_path_factory: pytest.TempPathFactory, shake: Callable[[DecoderLM], DecoderLM]) -> Path:
    """A run whose model knows nothing: all its logits are 0, and the greedy choice is for ever the first character."""
    path = tmp_path_factory.mktemp("sampling") / "endless"
    model = shake(build_model(replace(MODEL, tied_embeddings=False)))
    torch.nn.init.zeros_(model.head.weight)
    write_run(path, [model])
    return path


def write_run(
    path: Path, checkpoints: list[Model], tokenizer: Tokenizer = TOKENIZER, objective: str = "causal"
) -> None:
    config = RunConfig(checkpoints[0].config, DataConfig(), TrainingConfig(objective=objective))
    run = Run(path, config, tokenizer, tokenizer, text="none")
    run.checkpoints.mkdir(parents=True)
    tokenizer.save(path / "tokenizer.json")
    run.reconfigured(config)
    for step, model in enumerate(checkpoints, start=1):
        write_checkpoint(run.checkpoints, step, model, {})


@pytest.fixture
def command(runs: Path, monkeypatch: pytest.MonkeyPatch, call: Call) -> Call:
    """Runs the command in the folder of `runs`, with what is piped in; gives code, output and notes."""
    monkeypatch.chdir(runs)
    return partial(call, sample, "--device", "cpu", "--max-new-tokens", "10")


def continued(runs: Path, prompt: str, checkpoint: str | None = None, **settings: Any) -> list[str]:
    run = Run.open(runs / "runs" / "chars")
    options = SamplingConfig(**{"max_new_tokens": 10, "seed": 7, **settings})
    ids = run.tokenizer.encode(prompt) or [run.tokenizer.end_of_text]
    steps = stream_text(run.load_model(checkpoint), run.tokenizer, ids, options)
    return [prompt + "".join(pieces) for pieces in zip(*steps, strict=True)]


def expected(runs: Path, prompt: str, checkpoint: str | None = None, **settings: Any) -> list[str]:
    texts = continued(runs, prompt, checkpoint, **settings)
    return [text if text.endswith("\n") else text + "\n" for text in texts]


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
    _, out, _ = command("--prompt", "ab", "--seed", "7", "--num-samples", "4", "--temperature", "1.5")
    texts = expected(runs, "ab", num_samples=4, temperature=1.5)
    assert out == f"{sample.SEPARATOR}\n".join(texts)
    assert len(set(texts)) > 2


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
    assert re.fullmatch(r"note: of (\d+) tokens proposed by the draft, \1 were accepted \(100%\)\n", err)
    code, out, err = command(*greedy, "--draft", str(endless))
    assert (code, out) == (0, alone)
    assert re.fullmatch(r"note: of \d+ tokens proposed by the draft, \d+ were accepted \(\d+%\)\n", err)


def test_a_draft_answers_line_after_line_too(command: Any) -> None:
    flags = ("runs/chars", "--interactive", "--temperature", "0")
    _, alone, _ = command(*flags, piped=b"ab\nc")
    _, out, err = command(*flags, "--draft", "runs/chars", piped=b"ab\nc")
    assert out == alone
    assert err.count("proposed") == 1


def test_a_draft_with_another_tokenizer_is_refused(command: Any, runs: Path, tmp_path: Path) -> None:
    other = fitted("chars", "abcdé \nx")
    write_run(tmp_path / "other", [build_model(MODEL)], other)
    code, out, err = command("runs/chars", "--prompt", "ab", "--draft", str(tmp_path / "other"))
    assert (code, out) == (2, "")
    assert "has another tokenizer than runs/chars" in err
    assert err.count("\n") == 1


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
        ("--batch-size 32", "--batch-size", "give --lines or --batch-file as well"),
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


def test_a_beam_search_writes_the_best_texts_and_draws_nothing(command: Any, runs: Path) -> None:
    run = Run.open(runs / "runs" / "chars")
    sampling = SamplingConfig(num_beams=4, num_samples=2, max_new_tokens=10)
    [found] = best_texts(run.load_model(), run.tokenizer, [run.tokenizer.encode_prompt("ab")], sampling)
    best, second = (f"ab{text}" for text in found)
    flags = ("runs/chars", "--num-beams", "4")
    assert command(*flags, "--prompt", "ab") == (0, best.removesuffix("\n") + "\n", "")
    _, out, err = command(*flags, "--prompt", "ab", "--num-samples", "2")
    assert (out, err) == ("\n".join(text.removesuffix("\n") for text in (best, sample.SEPARATOR, second)) + "\n", "")
    code, out, err = command(*flags, "--lines", piped=b"ab\nc\nab")
    lines = out.splitlines()
    assert (code, err, len(lines)) == (0, "", 3)
    assert lines[0] == lines[2] == best.replace("\n", r"\n")
    code, out, err = command(*flags, "--interactive", piped=b"ab\nab")
    assert (code, out, err) == (0, 2 * (best.removesuffix("\n") + "\n"), NOTHING_REMEMBERED)


def test_a_beam_search_past_the_context_is_announced(command: Any) -> None:
    code, _, err = command("runs/chars", "--prompt", "ab", "--num-beams", "2", "--max-new-tokens", str(CONTEXT + 4))
    assert (code, err.count("\n")) == (0, 1)
    assert "the oldest half is dropped and the rest is read anew" in err


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


def started(run: Path) -> subprocess.Popen[bytes]:
    flags = ["--prompt", "ab", "--max-new-tokens", "1000000", "--temperature", "0"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(SCRIPT.parent)}
    process = subprocess.Popen(
        [sys.executable, str(SCRIPT), str(run), *flags],
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
