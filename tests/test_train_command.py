"""`train.py` as its users meet it: what it leaves behind, what it says, and how it survives."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from minitransformer.commands.train import main
from minitransformer.runs import Run
from tests.runs_for_tests import TEXT

ROOT = Path(__file__).parent.parent
SHAPE = ["--d-model", "16", "--num-layers", "1", "--num-heads", "2", "--context-length", "16", "--tokenizer", "bytes"]
SMALL = [*SHAPE, "--batch-size", "2", "--warmup-steps", "2", "--compile", "off", "--precision", "fp32"]


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MINITRANSFORMER_DATA", str(tmp_path / "work"))
    (tmp_path / "my.txt").write_text(TEXT)
    return tmp_path


def train(*arguments, steps=6):
    return main([*arguments, "--data", "my.txt", "--steps", str(steps), *SMALL])


def refused(capsys, *arguments, code=2):
    """The one sentence that a mistake gets, or with code 1 a failure."""
    assert main(list(arguments)) == code
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1, error
    return error


def test_a_run_leaves_all_that_other_commands_need(here, capsys):
    assert train("gpt-nano") == 0
    path = here / "runs/gpt-nano-my"
    assert {p.name for p in path.iterdir()} == {
        *("config.json", "tokenizer.json", "metrics.jsonl", "train.log", "samples.txt", "checkpoints", "train.lock")
    }
    assert (path / "checkpoints/latest").resolve().name == "step-000006"
    record = json.loads((path / "config.json").read_text())
    assert record["model"]["vocab_size"] == 257
    assert record["provenance"]["torch"] == torch.__version__
    model = Run.open(path).load_model()
    stored = load_file(path / "checkpoints/best/model.safetensors")
    assert torch.equal(model.embedding.table.weight, stored["embedding.table.weight"])
    out = capsys.readouterr().out
    assert "bits per byte" in out
    assert "python sample.py runs/gpt-nano-my" in out


def test_a_second_run_with_the_default_name_gets_a_number(here):
    assert train(steps=1) == 0
    assert train(steps=1) == 0
    assert sorted(p.name for p in (here / "runs").iterdir()) == ["gpt-micro-my", "gpt-micro-my-2"]


def test_a_pipe_gets_lines_that_can_be_searched(here, capsys):
    assert train("--log-every", "2") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines if line.startswith("step") and " loss " in line and "lr" in line] == [
        *("2", "4", "6")
    ]


def test_help_names_every_preset_with_its_parameters(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--help"])
    assert stopped.value.code == 0
    out = capsys.readouterr().out
    assert "gpt2-124m" in out
    assert "124.44M" in out
    assert "--d-model" in out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["gpt-mimi"], ["gpt-mimi", "gpt-mini"]),
        (["--data", "nowhere.txt"], ["nowhere.txt"]),
        (["--data", "empty.txt"], ["empty.txt", "empty"]),
        (["--data", "binary.txt"], ["binary.txt"]),
        (["--data", "latin1.txt"], ["latin1.txt", "byte 3"]),
        (["--data", "lines.jsonl"], ["lines.jsonl", "line 2", "text"]),
        (["--data", "short.txt", "--tokenizer", "bytes"], ["short", "257", "--context-length"]),
        (["--data", "my.txt", "--d-model", "100", "--num-heads", "3"], ["d_model 100", "num_heads 3", "99"]),
        (["--data", "my.txt", "--vocab-size", "100"], ["100", "vocab"]),
        (["--data", "my.txt", "--tokenizer", "bytes", "--vocab-size", "100"], ["100", "257"]),
        (["--data", "my.txt", "--tokenizer", "byte"], ["byte", "bytes"]),
        (["--data", "my.txt", "--residual", "per"], ["per", "pre"]),
        (["--data", "my.txt", "--positions", "rotari"], ["rotari", "rotary"]),
        (["--data", "my.txt", "--d-model", "12", "--num-heads", "4"], ["head_dim", "3"]),
        (["--data", "my.txt", "--dropout", "1.5"], ["dropout", "1.5"]),
        (["--data", "my.txt", "--lr", "0"], ["lr is 0"]),
        (["--data", "my.txt", "--min-lr", "2"], ["min_lr 2", "lr 0.0"]),
        (["--data", "my.txt", "--steps", "0"], ["steps is 0"]),
        (["--data", "my.txt", "--device", "cuda:9"], ["cuda:9", "cpu"]),
        (["--data", "my.txt", "--device", "tpu"], ["tpu", "cpu"]),
        (["--data", "my.txt", "--precision", "fp4"], ["fp4", "fp16"]),
        (["--data", "my.txt", "--schedule", "cosin"], ["cosin", "cosine"]),
        (["--data", "my.txt", "--out", "taken"], ["taken", "exists", "--out"]),
        (["--resume", "nowhere"], ["nowhere", "not a run folder"]),
        (["--checkpoint", "best", "--data", "my.txt"], ["--checkpoint", "--resume"]),
    ],
)
def test_a_mistake_gets_one_sentence_and_leaves_nothing(here, capsys, arguments, words):
    (here / "empty.txt").write_text("")
    (here / "binary.txt").write_bytes(b"abc\0\1\2")
    (here / "latin1.txt").write_bytes("cafés".encode("latin-1"))
    (here / "lines.jsonl").write_text('{"text": "one"}\n{"body": "two"}\n')
    (here / "short.txt").write_text("too short")
    (here / "taken").mkdir()
    (here / "taken/notes.txt").write_text("mine")
    error = refused(capsys, *arguments)
    for word in words:
        assert word in error
    assert not (here / "runs").exists()
    assert [path.name for path in (here / "taken").iterdir()] == ["notes.txt"]


def test_a_disk_without_room_is_noticed_before_training(here, capsys, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000}))
    error = refused(capsys, "--data", "my.txt", *SMALL, code=1)
    assert "GB free" in error
    assert "--keep-last" in error
    assert not (here / "runs").exists()


@pytest.fixture
def run(here, capsys):
    assert train("--out", "run", "--save-every", "2") == 0
    capsys.readouterr()
    return here / "run"


def test_resuming_extends_the_steps_and_clears_what_a_killed_run_left(run, capsys):
    (run / "checkpoints/step-000008-cut.partial").mkdir()
    (run / "checkpoints/.latest-1.partial").symlink_to("step-000006")
    assert main(["--resume", "run", "--steps", "9"]) == 0
    assert "changed    steps 6 -> 9" in capsys.readouterr().out
    assert Run.open(run).config.training.steps == 9
    assert (run / "checkpoints/latest").resolve().name == "step-000009"
    assert not list(run.rglob("*.partial"))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--steps", "9", "--d-model", "32"], ["d_model 16", "32"]),
        (["--steps", "9", "--residual", "post"], ["residual pre", "post"]),
        (["--steps", "9", "--tokenizer", "chars"], ["tokenizer bytes", "chars"]),
        (["--steps", "9", "--seed", "1"], ["seed 0", "1"]),
        ([], ["6 steps", "--steps"]),
        (["--steps", "9", "--checkpoint", "step-000003"], ["step-000003", "step-000004"]),
    ],
)
def test_a_run_cannot_become_another_run(run, capsys, arguments, words):
    before = (run / "config.json").read_text(), (run / "metrics.jsonl").read_text()
    error = refused(capsys, "--resume", "run", *arguments)
    for word in words:
        assert word in error
    assert before == ((run / "config.json").read_text(), (run / "metrics.jsonl").read_text())


def test_resuming_with_another_text_is_refused(here, run, capsys):
    (here / "my.txt").write_text(TEXT.upper())
    assert "not the text" in refused(capsys, "--resume", "run", "--steps", "9")


@pytest.mark.parametrize("file", ["model.safetensors", "trainer.pt", "manifest.json"])
@pytest.mark.parametrize("damage", ["truncated", "altered", "missing"])
def test_a_damaged_checkpoint_is_refused_and_the_previous_one_offered(run, capsys, file, damage):
    path = run / "checkpoints/step-000006" / file
    content = bytearray(path.read_bytes())
    if damage == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "altered":
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    else:
        path.unlink()
    error = refused(capsys, "--resume", "run", "--steps", "9", code=1)
    assert "step-000006" in error
    assert "--checkpoint step-000004" in error
    assert main(["--resume", "run", "--steps", "9", "--checkpoint", "step-000004"]) == 0


def process(*arguments, **environment):
    command = [sys.executable, str(ROOT / "train.py"), *arguments, "--data", "my.txt", *SMALL]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)


def wait_for(path, child, seconds=120):
    end = time.monotonic() + seconds
    while not path.exists():
        assert child.poll() is None, child.stdout.read()
        assert time.monotonic() < end, f"{path} does not appear"
        time.sleep(0.01)


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_and_says_how_to_continue(here, number, code):
    child = process("--out", "run", "--steps", "100000", "--save-every", "100")
    wait_for(here / "run/checkpoints/step-000100", child)
    child.send_signal(number)
    out, _ = child.communicate(timeout=60)
    assert child.returncode == code, out
    step = int((here / "run/checkpoints/latest").resolve().name.removeprefix("step-"))
    assert f"stopped at step {step}" in out
    assert "python train.py --resume run" in out
    assert "Traceback" not in out


@pytest.mark.slow
def test_a_killed_run_resumes_as_if_nothing_had_happened(here, capsys):
    steps = ["--steps", "600", "--save-every", "50", "--eval-every", "100", "--dropout", "0.1"]
    child = process("--out", "killed", *steps)
    wait_for(here / "killed/checkpoints/step-000200", child)
    assert f"pid {child.pid}" in refused(capsys, "--resume", "killed")
    child.kill()
    child.wait()
    for arguments in (["--resume", "killed"], ["--out", "whole", *steps]):
        child = process(*arguments)
        text, _ = child.communicate(timeout=120)
        assert child.returncode == 0, text
    left, right = (load_file(here / run / "checkpoints/latest/model.safetensors") for run in ("killed", "whole"))
    assert all(torch.equal(left[name], right[name]) for name in right)
    assert not list((here / "killed").rglob("*.partial"))
