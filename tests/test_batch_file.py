"""`sample.py --batch-file`: an answer for each row, in order, and none lost to a kill."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from minitransformer.commands import batch_answers, sample
from minitransformer.errors import UserError
from minitransformer.generation.config import SamplingConfig
from minitransformer.generation.jsonl_answers import AnswerFile
from minitransformer.generation.streaming import stream_text
from minitransformer.models.config import ModelConfig
from minitransformer.models.decoder import DecoderLM
from minitransformer.models.model import build_model
from minitransformer.runs import Run
from minitransformer.settings import with_settings
from minitransformer.text.chat_template import ChatTemplate, Message
from minitransformer.text.tokenizers import Bytes
from tests.runs_for_tests import Call
from tests.test_sampling_command import SCRIPT, write_run

CHATML = ChatTemplate.named("chatml")
TOKENIZER = Bytes().with_special_tokens(CHATML.control_tokens)
SIZES = {"d_model": 16, "num_layers": 1, "num_heads": 2, "context_length": 128, "vocab_size": TOKENIZER.vocab_size}
ROWS = [{"prompt": f"row {number} " + "é" * (number % 5), "id": number} for number in range(20)]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, shake: Callable[[DecoderLM], DecoderLM]) -> Path:
    """Runs with a decoder that converses, a translator, a masked-language model and a classifier."""
    folder = tmp_path_factory.mktemp("batch")
    objectives = {
        "decoder": "causal",
        "encoder-decoder": "seq2seq",
        "encoder": "masked",
        "encoder-classifier": "classify",
    }
    for topology, objective in objectives.items():
        torch.manual_seed(5)
        classes = {"num_classes": 3} if topology == "encoder-classifier" else {}
        config = with_settings(ModelConfig(), {"topology": topology, **SIZES, **classes})
        write_run(folder / topology, [shake(build_model(config))], TOKENIZER, objective)
    (folder / "decoder" / "chat_template.jinja").write_text(CHATML.source)
    return folder


@pytest.fixture
def command(call: Call, runs: Path, tmp_path: Path) -> Call:
    jsonl(tmp_path / "in.jsonl", ROWS)
    flags = ["--device", "cpu", "--max-new-tokens", "8", "--batch-file", str(tmp_path / "in.jsonl")]
    return partial(call, sample, str(runs / "decoder"), *flags, "--out", str(tmp_path / "out.jsonl"))


def jsonl(path: Path, rows: list[Any]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def written(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def alone(run: Path, prompts: list[list[int]], **settings: Any) -> list[str]:
    """What follows each of the prompts by itself."""
    opened = Run.open(run)
    model, sampling = opened.load_model(), SamplingConfig(**{"max_new_tokens": 8, "seed": 3, **settings})
    return ["".join(p for [p] in stream_text(model, opened.tokenizer, prompt, sampling)) for prompt in prompts]


def test_every_row_has_its_fields_and_its_answer_as_if_it_were_alone(command: Any, runs: Path, tmp_path: Path) -> None:
    code, out, err = command("--seed", "3", "--batch-size", "3")
    assert (code, out, err) == (0, "", f"note: {tmp_path / 'out.jsonl'} has the answers to 20 rows\n")
    expected = alone(runs / "decoder", [TOKENIZER.encode(str(row["prompt"])) for row in ROWS])
    assert written(tmp_path / "out.jsonl") == [
        {**row, "output": text} for row, text in zip(ROWS, expected, strict=True)
    ]
    assert [path.name for path in tmp_path.iterdir() if "out" in path.name] == ["out.jsonl"]


def test_a_template_makes_prompts_of_fields(command: Any, runs: Path, tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("{{ id }}: {{ prompt | upper }}\n")
    assert command("--seed", "3", "--template", str(tmp_path / "t.txt"))[0] == 0
    expected = alone(runs / "decoder", [TOKENIZER.encode(f"{row['id']}: {str(row['prompt']).upper()}") for row in ROWS])
    assert [row["output"] for row in written(tmp_path / "out.jsonl")] == expected


def test_rows_are_asked_in_conversations(command: Any, runs: Path, tmp_path: Path) -> None:
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    jsonl(tmp_path / "in.jsonl", [{"messages": talk}, {"prompt": "a"}])
    assert command("--seed", "3", "--chat", "--system", "S")[0] == 0
    messages = [[Message(**each) for each in talk], [Message("system", "S"), Message("user", "a")]]
    expected = alone(runs / "decoder", [CHATML.encode_prompt(each, TOKENIZER) for each in messages])
    assert [row["output"] for row in written(tmp_path / "out.jsonl")] == [
        text.split("<|im_end|>")[0] for text in expected
    ]


def test_sources_are_translated_as_on_the_command_line(call: Call, command: Any, runs: Path, tmp_path: Path) -> None:
    greedy = [str(runs / "encoder-decoder"), "--device", "cpu", "--max-new-tokens", "8", "--num-beams", "2"]
    lines = "\n".join(str(row["prompt"]) for row in ROWS).encode()
    _, out, _ = call(sample, *greedy, piped=lines)
    files = ["--batch-file", str(tmp_path / "in.jsonl"), "--out", str(tmp_path / "out.jsonl")]
    assert call(sample, *greedy, *files)[0] == 0
    assert "".join(f"{row['output']}\n" for row in written(tmp_path / "out.jsonl")) == out


def test_rows_are_classified_as_on_the_command_line(call: Call, command: Any, runs: Path, tmp_path: Path) -> None:
    classifier = [str(runs / "encoder-classifier"), "--device", "cpu"]
    _, out, _ = call(sample, *classifier, piped="\n".join(str(row["prompt"]) for row in ROWS).encode())
    files = ["--batch-file", str(tmp_path / "in.jsonl"), "--out", str(tmp_path / "out.jsonl")]
    assert call(sample, *classifier, *files)[0] == 0
    named = [row["output"] for row in written(tmp_path / "out.jsonl")]
    assert named == [line.split()[0] for line in out.splitlines()]
    assert len(set(named)) > 1


@pytest.mark.parametrize("topology", ["decoder", "encoder-decoder"])
@pytest.mark.parametrize("after", [0, 1, 7, 16, 19])
def test_a_batch_that_was_stopped_ends_with_the_same_file(
    topology: str, after: int, runs: Path, tmp_path: Path, call: Call, command: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = [str(runs / topology), "--device", "cpu", "--max-new-tokens", "8", "--batch-size", "2"]
    flags += ["--batch-file", str(tmp_path / "in.jsonl"), "--out"]
    assert call(sample, *flags, str(tmp_path / "whole.jsonl"), "--seed", "3")[0] == 0
    add = AnswerFile.add

    def stop(file: AnswerFile, stream: Any, answer: str) -> None:
        if file.done == after:
            stream.write(b'{"prompt": "half a li')
            raise KeyboardInterrupt
        add(file, stream, answer)

    with monkeypatch.context() as patch:
        patch.setattr(AnswerFile, "add", stop)
        assert call(sample, *flags, str(tmp_path / "out.jsonl"), "--seed", "3")[0] == 130
    assert not (tmp_path / "out.jsonl").exists()
    code, _, err = call(sample, *flags, str(tmp_path / "out.jsonl"))  # the seed is that of the first call
    assert code == 0
    assert err.endswith(f"20 rows, {after} of them by an earlier call\n" if after else "20 rows\n")
    assert (tmp_path / "out.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


@pytest.mark.parametrize("change", ["settings", "rows", "weights"])
def test_answers_to_another_request_are_not_gone_on_with(command: Any, tmp_path: Path, change: str) -> None:
    partial_file = tmp_path / "out.jsonl.partial"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AnswerFile, "_complete", lambda file: None)
        assert command("--seed", "3")[0] == 0
    kept = partial_file.read_bytes()
    if change == "rows":
        jsonl(tmp_path / "in.jsonl", ROWS[:-1])
    more = {"settings": ["--temperature", "0.5"], "weights": ["--weights", "int8"], "rows": []}[change]
    code, _, err = command("--seed", "3", *more)
    assert code == 2
    assert "out.jsonl.partial has answers to other rows, or by another model or settings: remove it" in err
    assert partial_file.read_bytes() == kept


@pytest.mark.skipif(sys.platform == "win32", reason="signals are POSIX")
def test_a_batch_goes_on_after_a_kill(command: Any, runs: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    partial_file = tmp_path / "out.jsonl.partial"
    jsonl(tmp_path / "in.jsonl", [{"prompt": f"row {number}"} for number in range(1500)])
    flags = ["--device", "cpu", "--batch-file", str(tmp_path / "in.jsonl"), "--out", str(out), "--seed", "3"]
    process = subprocess.Popen([sys.executable, str(SCRIPT), str(runs / "decoder"), *flags, "--max-new-tokens", "90"])
    limit = time.monotonic() + 120
    while not partial_file.exists() or partial_file.read_bytes().count(b"\n") < 3:
        assert time.monotonic() < limit
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = partial_file.read_bytes().partition(b"\n")[2]
    assert not out.exists()
    code = subprocess.run(
        [sys.executable, str(SCRIPT), str(runs / "decoder"), *flags, "--max-new-tokens", "90"]
    ).returncode
    assert code == 0
    assert out.read_bytes().startswith(before[: before.rfind(b"\n") + 1])
    assert [row["prompt"] for row in written(out)] == [f"row {number}" for number in range(1500)]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "has no row"),
        ("[1]\n", "line 1 is [1]: give a JSON object in each line"),
        ('{"prompt": "a"}\n\n{"prompt"\n', "line 3 is not JSON"),
        ('{"question": "a"}\n', "row 1 has no field 'prompt', only question: add it, or give a --template"),
        ('{"prompt": 3}\n', "row 1 has prompt 3, which must be a text"),
        ('{"prompt": "a", "output": "b"}\n', "line 1 has a field 'output', which the answers would replace: rename it"),
    ],
)
def test_a_row_without_a_prompt_is_one_sentence(command: Any, tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "in.jsonl").write_text(content)
    code, _, err = command()
    assert (code, err.count("\n")) == (2, 1)
    assert message in err


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ("hello", "has messages 'hello': give a list of objects with texts role and content"),
        ([{"role": "user"}], "give a list of objects with texts role and content"),
        ([], "give a list of objects"),
        ([{"role": "assistant", "content": "x"}], "has messages that end with an answer: leave the last one out"),
        ([{"role": "user", "content": "x" * 200}], "row 1 has a prompt of 219 tokens, and the model sees 128"),
    ],
)
def test_a_row_without_a_question_is_one_sentence(command: Any, tmp_path: Path, messages: Any, message: str) -> None:
    jsonl(tmp_path / "in.jsonl", [{"messages": messages}])
    code, _, err = command("--chat")
    assert code == 2
    assert message in err


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (
            "{{ prompt }} {{ question }}",
            "needs what {rows}, row 1 lacks ('question' is undefined): its fields are prompt, id",
        ),
        ("{{ prompt.__class__ }}", "fails (the attribute '__class__' of a str is out of bounds)"),
        ("{% for", "fails (line 1: "),
    ],
)
def test_a_template_that_does_not_fit_the_rows_is_one_sentence(
    command: Any, tmp_path: Path, template: str, message: str
) -> None:
    (tmp_path / "t.txt").write_text(template)
    code, _, err = command("--template", str(tmp_path / "t.txt"))
    assert (code, err.count("\n")) == (2, 1)
    assert message.replace("{rows}", str(tmp_path / "in.jsonl")) in err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--prompt a", "--batch-file holds the prompts: leave --prompt"),
        ("--lines", "--batch-file holds the prompts"),
        ("--interactive", "--batch-file holds the prompts"),
        ("--num-samples 2", "--batch-file has one answer for each row"),
    ],
)
def test_a_second_source_of_prompts_is_refused(command: Any, flags: str, message: str) -> None:
    code, _, err = command(*flags.split())
    assert code == 2
    assert message in err


def test_files_are_checked_before_anything_is_written(call: Call, command: Any, runs: Path, tmp_path: Path) -> None:
    run = str(runs / "decoder")
    for flags, message in {
        ("--out", "x"): "--out is for many prompts: give --batch-file as well",
        ("--template", "x"): "--template is for many prompts: give --batch-file as well",
        ("--batch-file", "x"): "--batch-file needs a file for the answers: name one with --out",
        ("--batch-file", str(tmp_path / "none"), "--out", "x"): "none cannot be read",
    }.items():
        code, _, err = call(sample, run, *flags)
        assert (code, message in err) == (2, True), err
    (tmp_path / "out.jsonl").write_text("mine")
    code, _, err = command()
    assert (code, "out.jsonl already exists: choose another --out" in err) == (2, True)
    assert (tmp_path / "out.jsonl").read_text() == "mine"
    code, _, err = call(sample, str(runs / "encoder"), "--batch-file", "x", "--out", "y")
    assert (code, "--batch-file is for models that generate texts" in err) == (2, True)


def test_two_processes_do_not_write_one_file(tmp_path: Path) -> None:
    first, second = (AnswerFile(tmp_path / "out.jsonl", {}, ROWS) for _ in range(2))

    def write() -> Iterator[None]:
        with first.writing():
            yield

    writer = write()
    next(writer)
    with pytest.raises(UserError, match="another process is writing"), second.writing():
        pass
    writer.close()


def test_a_model_that_generates_nothing_is_refused() -> None:
    with pytest.raises(UserError, match="generates no text"):
        batch_answers.generate_answers(
            build_model(with_settings(ModelConfig(), {"topology": "encoder", **SIZES})),
            TOKENIZER,
            SamplingConfig(),
            1,
            [],
            0,
        )
