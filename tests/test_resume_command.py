"""`train.py --resume`: a run goes on as if nothing had happened, and never becomes another run."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from minitransformer.commands.train import main
from minitransformer.runs import Run
from tests.runs_for_tests import SMALL, TEXT, assert_same_weights, refused, saved_weights, train, unsealed

ROOT = Path(__file__).parent.parent


def test_resuming_extends_the_steps_and_clears_what_a_killed_run_left(run, capsys):
    (run / "checkpoints/step-000008-cut.partial").mkdir()
    (run / "checkpoints/.latest-1.partial").symlink_to("step-000006")
    assert main(["--resume", "run", "--steps", "9"]) == 0
    assert "changed    steps 6 -> 9" in capsys.readouterr().out
    assert Run.open(run).config.training.steps == 9
    assert (run / "checkpoints/latest").resolve().name == "step-000009"
    assert not list(run.rglob("*.partial"))


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("optimizer", "lr"),
    [
        ("adamw", "1e6"),
        *(pytest.param("adamw", lr, marks=SLOW) for lr in ("100", "1e12", "1e38")),
        *(pytest.param("muon", lr, marks=SLOW) for lr in ("100", "1e6", "1e12")),
    ],
)
def test_after_training_diverged_it_goes_on_as_the_message_says(here, capsys, optimizer, lr):
    keeping = ["--save-every", "5", "--log-every", "1", "--eval-every", "50", "--optimizer", optimizer]
    assert train("--out", "run", *keeping, steps=20) == 0
    assert main(["--resume", "run", "--steps", "70", "--lr", lr]) == 3
    [message] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("error: ")]
    assert "python train.py --resume run --checkpoint step-0000" in message
    command = message.partition("python train.py ")[2].split()
    assert main(command) == 0
    records = [json.loads(line) for line in (here / "run/metrics.jsonl").read_text().splitlines()]
    losses = [record["loss"] for record in records if "loss" in record]
    assert len(losses) == 70
    assert None not in losses
    assert losses[-1] < losses[0]


def test_training_that_diverged_from_its_beginning_is_to_begin_anew(here, capsys):
    assert train("--out", "run", "--lr", "1e6", "--save-every", "5", steps=100) == 3
    out = capsys.readouterr().out
    assert "train again with lower learning rates, such as --lr 0.001" in out
    assert "--resume" not in out


def test_a_decay_that_makes_weights_infinite_leaves_no_such_checkpoint(here, capsys):
    assert train("--out", "run", "--lr", "1e3", "--weight-decay", "1e38", "--save-every", "1", steps=100) == 3
    assert "error: after step 1, the weights or the optimizer state are infinite or NaN" in capsys.readouterr().out
    assert not list((here / "run/checkpoints").iterdir())


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
    assert_same_weights(saved_weights(here / "killed"), saved_weights(here / "whole"))
    assert not list((here / "killed").rglob("*.partial"))


@pytest.fixture
def units(monkeypatch):
    """Whether this CPU has instructions for bfloat16, from now on."""

    def set_units(there):
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: there)

    return set_units


AUTO = [word for word in SMALL if word not in ("--precision", "fp32")]


ON_CPU = ["gpt-nano", "--data", "my.txt", "--device", "cpu", *AUTO]


@pytest.mark.unchecked_shapes
@pytest.mark.parametrize("there", [True, False])
def test_auto_is_resolved_once_and_a_resumed_run_ends_bit_for_bit(here, units, capsys, there):
    units(there)
    precision = "bf16" if there else "fp32"
    assert main([*ON_CPU, "--out", "whole", "--steps", "6", "--schedule", "constant"]) == 0
    assert main([*ON_CPU, "--out", "parts", "--steps", "3", "--schedule", "constant"]) == 0
    units(True)  # whatever "auto" would be now
    assert main(["--resume", "parts", "--steps", "6"]) == 0
    out = capsys.readouterr().out
    assert f"changed    precision {precision}" not in out
    assert f"{precision} (as before), compile off (as before)" in out
    for run in ("whole", "parts"):
        record = json.loads((here / run / "config.json").read_text())
        assert record["machine"] == {"device": "cpu", "precision": precision, "compile": False}
        assert record["training"]["precision"] == "auto"
    assert_same_weights(saved_weights(here / "whole"), saved_weights(here / "parts"))


@pytest.mark.unchecked_shapes
def test_a_resumed_run_says_what_this_machine_does_not_have(here, units, capsys):
    units(True)
    assert main([*ON_CPU, "--out", "run", "--steps", "3"]) == 0
    units(False)
    assert main(["--resume", "run", "--steps", "5"]) == 0
    assert "changed    precision bf16 -> fp32 (this machine has no bf16 units)\n" in capsys.readouterr().out
    assert Run.open(here / "run").machine.precision == "fp32"


@pytest.mark.unchecked_shapes
def test_a_resumed_run_may_be_asked_for_another_precision(here, units, capsys):
    units(False)
    assert main([*ON_CPU, "--out", "run", "--steps", "2"]) == 0
    for steps, precision, change in (("3", "bf16", "fp32 -> bf16"), ("4", "fp16", "bf16 -> fp16")):
        assert main(["--resume", "run", "--steps", steps, "--precision", precision]) == 0
        assert f"changed    precision {change} (as asked)\n" in capsys.readouterr().out
        run = Run.open(here / "run")
        assert (run.machine.precision, run.config.training.precision) == (precision, precision)


@pytest.mark.unchecked_shapes
def test_a_run_of_an_older_version_is_resolved_when_it_goes_on(here, units):
    units(False)
    assert main([*ON_CPU, "--out", "run", "--steps", "2"]) == 0
    record = unsealed(here / "run/config.json")
    del record["machine"]
    (here / "run/config.json").write_text(json.dumps(record))
    assert Run.open(here / "run").machine is None
    assert main(["--resume", "run", "--steps", "3"]) == 0
    assert Run.open(here / "run").machine.precision == "fp32"


@pytest.mark.unchecked_shapes
def test_a_run_that_was_stopped_early_says_what_lets_it_go_on(here, capsys):
    never_better = ("--patience", "1", "--eval-every", "1", "--lr", "1e-30", "--embedding-lr", "1e-30")
    assert train("--out", "early", *never_better, steps=9) == 0
    before = (here / "early/config.json").read_text()
    assert "raise --patience" in refused(capsys, "--resume", "early", "--steps", "12")
    assert (here / "early/config.json").read_text() == before
    assert main(["--resume", "early", "--steps", "12", "--patience", "3"]) == 0
