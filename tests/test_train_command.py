"""`train.py` as its users meet it: what it leaves behind, what it says, and how it survives."""

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from minitransformer.commands import unknown_flags
from minitransformer.commands.export import Options as ExportOptions
from minitransformer.commands.sample import Options as SampleOptions
from minitransformer.commands.train import Flags, main
from minitransformer.errors import UserError
from minitransformer.models.config import ModelConfig
from minitransformer.models.model import count_parameters
from minitransformer.runs import Run
from minitransformer.settings import kinds
from minitransformer.text.corpora import short_name
from minitransformer.text.tokenizers import TiktokenEncoding, Tokenizer
from minitransformer.training.config import RunConfig, with_vocabulary
from minitransformer.training.finetuning import check_fits
from minitransformer.training.presets import PRESETS
from tests.runs_for_tests import TEXT, configured, unsealed

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


@pytest.mark.parametrize("tokenizer", Tokenizer.registry)
def test_what_help_says_of_a_vocabulary_is_what_the_tokenizer_finds(tokenizer):
    kind = Tokenizer.registry[tokenizer]
    if tokenizer == "tokenizers":
        pytest.skip("belongs to an imported checkpoint, and is never fitted")
    if tokenizer == "bpe":
        assert kind.usual_vocab_size == kind.default_vocab_size
        return
    if issubclass(kind, TiktokenEncoding) and not all(path.exists() for path in kind._cached().values()):
        pytest.skip("its ranks are not on this machine")
    characters = "".join(map(chr, [10, *range(32, 96)]))
    assert kind.fit(lambda: iter([characters])).vocab_size == kind.usual_vocab_size


def test_help_counts_the_parameters_of_presets_by_their_own_tokenizers(here, capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    counts = dict(
        line.split() for line in capsys.readouterr().out.splitlines() if re.fullmatch(r"\s+\S+\s+[\d.]+M", line)
    )
    (here / "my.txt").write_text("".join(map(chr, [10, *range(32, 96)])) * 40)
    for preset in ("shakespeare", "shakespeare-fast", "nanogpt-cpu"):
        prepared = configured(PRESETS[preset], data="my.txt", context_length=64).prepare()
        size = count_parameters(with_vocabulary(PRESETS[preset].model, prepared)) / 1e6
        assert counts[preset] == f"{size:.2f}M"


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
        (["--data", "my.txt", "--lr", "inf"], ["lr is inf"]),
        (["--data", "my.txt", "--weight-decay", "nan"], ["weight_decay is nan"]),
        (["--data", "my.txt", "--grad-clip", "nan"], ["grad_clip is nan"]),
        (["--data", "my.txt", "--eps", "1e-300"], ["eps is 1e-300", "float32"]),
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
    assert "kB free" in error
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
    assert "begin anew with lower rates, such as --lr 0.001" in out
    assert "--resume" not in out


def test_a_decay_that_makes_weights_infinite_leaves_no_such_checkpoint(here, capsys):
    assert train("--out", "run", "--lr", "1e3", "--weight-decay", "1e38", "--save-every", "1", steps=100) == 3
    assert "error: after step 1 there are infinite or NaN numbers in the weights" in capsys.readouterr().out
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


def test_tensorboard_that_is_not_installed_is_said_before_any_work(run, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    before = (run / "config.json").read_text()
    for arguments in (["--resume", "run", "--steps", "9"], ["--data", "my.txt"], ["--init-from", "run"]):
        assert "--no-tensorboard" in refused(capsys, *arguments, "--tensorboard")
    assert (run / "config.json").read_text() == before
    assert not Path("runs").exists()


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
    left, right = (load_file(here / run / "checkpoints/latest/model.safetensors") for run in ("whole", "parts"))
    assert all(torch.equal(left[name], right[name]) for name in right)


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


def test_an_import_is_fine_tuned_and_not_resumed(run, capsys):
    (run / "config.json").write_text(json.dumps({**unsealed(run / "config.json"), "text": ""}))
    assert "--init-from run" in refused(capsys, "--resume", "run", "--steps", "9")


@pytest.mark.parametrize("seed", [2**63, 2**64])
def test_a_seed_that_torch_cannot_hold_is_refused_before_anything_is_made(here, capsys, seed):
    assert "below 2 to the 63rd" in refused(capsys, "--out", "run", "--seed", str(seed), *SMALL)
    assert not (here / "run").exists()


@pytest.mark.unchecked_shapes
def test_a_run_that_was_stopped_early_says_what_lets_it_go_on(here, capsys):
    never_better = ("--patience", "1", "--eval-every", "1", "--lr", "1e-30", "--embedding-lr", "1e-30")
    assert train("--out", "early", *never_better, steps=9) == 0
    before = (here / "early/config.json").read_text()
    assert "raise --patience" in refused(capsys, "--resume", "early", "--steps", "12")
    assert (here / "early/config.json").read_text() == before
    assert main(["--resume", "early", "--steps", "12", "--patience", "3"]) == 0


def test_a_public_checkpoint_is_imported_first(here, capsys):
    (here / "llama").mkdir()
    (here / "llama/config.json").write_text(json.dumps({"model_type": "llama"}))
    assert "minitransformer import llama" in refused(capsys, "--init-from", "llama")


def tuned(*arguments):
    data = () if "--data" in arguments else ("--data", "my.txt")
    return main(["--init-from", "parent", *data, "--device", "cpu", "--compile", "off", *arguments])


@pytest.fixture
def parent(here, capsys):
    """A run of Muon whose rates, context and steps are those of training from scratch."""
    assert main(["gpt-nano", "--out", "parent", "--data", "my.txt", "--steps", "3", *SMALL]) == 0
    record = unsealed(here / "parent/config.json")
    record["model"]["context_length"] = 4096
    record["training"] |= {"steps": 100_000, "warmup_steps": 700}
    (here / "parent/config.json").write_text(json.dumps(record))
    manifest = here / "parent/checkpoints/step-000003/manifest.json"
    manifest.write_text(json.dumps({name: value for name, value in unsealed(manifest).items() if name != "config"}))
    capsys.readouterr()
    return here / "parent"


@pytest.mark.unchecked_shapes
def test_a_fine_tune_names_its_parent_and_not_a_preset(here, parent, capsys):
    assert tuned("--steps", "2") == 0
    first = capsys.readouterr().out.splitlines()[0]
    assert first == "from       parent (decoder of 11.4k parameters, step-000003)"
    record = json.loads((here / "runs/parent-my/config.json").read_text())
    digest = hashlib.sha256((parent / "checkpoints/step-000003/model.safetensors").read_bytes()).hexdigest()
    assert record["parent"] == {"path": "parent", "checkpoint": "step-000003", "sha256": digest}
    assert main(["--resume", "runs/parent-my", "--steps", "3"]) == 0
    assert json.loads((here / "runs/parent-my/config.json").read_text())["parent"] == record["parent"]


@pytest.mark.unchecked_shapes
def test_a_fine_tune_learns_gently_and_its_own_children_as_gently(here, parent):
    assert tuned("--steps", "2") == 0
    old, new = Run.open(parent).config, Run.open(here / "runs/parent-my").config
    assert new.training.lr == pytest.approx(old.training.lr / 10)
    assert new.training.embedding_lr == pytest.approx(old.training.embedding_lr / 10)
    assert new.training.warmup_steps == 20
    assert (new.training.optimizer, new.training.weight_decay) == (old.training.optimizer, old.training.weight_decay)
    assert main(["--init-from", "runs/parent-my", "--steps", "1", "--out", "child"]) == 0
    assert Run.open(here / "child").config.training.lr == new.training.lr


@pytest.mark.unchecked_shapes
def test_a_short_text_fine_tunes_a_model_of_a_long_context(here, parent, capsys):
    (here / "short.txt").write_text(TEXT[:900])
    assert tuned("--data", "short.txt", "--steps", "1", "--out", "tuned") == 0
    config = Run.open(here / "tuned").config
    assert "sequences  90 tokens, of a context of 4,096\n" in capsys.readouterr().out
    assert (config.model.context_length, config.training.sequence_length) == (4096, 90)
    (here / "my.txt").write_text(TEXT * 10)
    assert tuned("--steps", "1", "--out", "long") == 0
    assert Run.open(here / "long").config.training.sequence_length == 1024


@pytest.mark.unchecked_shapes
def test_what_is_not_changed_by_training_is_the_parents_bit_for_bit(here, parent):
    assert tuned("--steps", "1", "--lr", "1e-30", "--embedding-lr", "1e-30", "--out", "tuned") == 0
    left, right = (load_file(here / run / "checkpoints/latest/model.safetensors") for run in ("parent", "tuned"))
    assert all(torch.equal(left[name], right[name]) for name in right)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["gpt-mini", "--init-from", "parent"], ["gpt-mini", "determines the model"]),
        (["--init-from", "parent", "--resume", "parent"], ["--resume", "--init-from", "one of them"]),
        (["--init-from", "parent", "--d-model", "32"], ["d_model 16", "32"]),
        (["--init-from", "parent", "--residual", "post"], ["residual pre", "post"]),
        (["--init-from", "parent", "--tokenizer", "chars"], ["determines the tokenizer"]),
        (["--init-from", "parent", "--checkpoint", "step-000009"], ["step-000009", "step-000003"]),
        (["--init-from", "parent", "--sequence-length", "5000"], ["5000", "4096"]),
        (["--init-from", "parent", "--data", "tiny.txt"], ["tiny.txt", "too short"]),
        (["--init-from", "parent", "--data", "tiny.txt", "--sequence-length", "60"], ["tiny.txt", "61"]),
    ],
)
def test_a_fine_tune_that_cannot_be_gets_one_sentence_and_leaves_nothing(here, parent, capsys, arguments, words):
    (here / "tiny.txt").write_text(TEXT[:40])
    error = refused(capsys, *arguments)
    for word in words:
        assert word in error
    assert not (here / "runs").exists()


@pytest.mark.parametrize(
    ("data", "name"),
    [
        *(("my.txt", "my"), ("a/s.txt.gz", "s"), ("notes/**/*.md", "notes"), ("a/s*.txt", "s"), ("pydocs", "pydocs")),
        *(("*.txt", "data"), ("v1.2/", "v1.2"), ("my file.jsonl", "my-file"), ("s.txt*", "s"), ("-", "data")),
    ],
)
def test_a_run_is_called_by_what_its_data_is_called(data, name):
    assert short_name(data) == name


def test_positions_that_are_learned_cannot_be_fewer(here):
    model = ModelConfig(positions="learned", vocab_size=9)
    with pytest.raises(UserError, match=r"context_length 256, not 128: give --sequence-length"):
        check_fits(model, replace(model, context_length=128))
    rotary = replace(model, positions="rotary")
    check_fits(rotary, replace(rotary, context_length=128, dropout=0.1))


@pytest.mark.parametrize(
    ("arguments", "flag"),
    [
        *((["--learning-rate", "1e-3"], "--lr"), (["--max-steps=10"], "--steps"), (["--n-layer", "3"], "--num-layers")),
        *((["--n_head", "3"], "--num-heads"), (["--residul", "post"], "--residual"), (["--bf16"], "--precision")),
        *((["--block-size", "8"], "--context-length"), (["--max-iters", "5"], "--steps")),
        *((["--wd", "0"], "--weight-decay"), (["--epochs", "3"], "--steps"), (["--smear"], "--token-smear")),
        (["--no-tied-embedings"], "--no-tied-embeddings"),
    ],
)
def test_a_flag_that_does_not_exist_is_answered_with_the_one_that_was_meant(here, capsys, arguments, flag):
    error = refused(capsys, "gpt-nano", "--data", "my.txt", *arguments)
    assert f"there is no flag {arguments[0].partition('=')[0]}: did you mean {flag}?" in error


def test_a_flag_like_no_other_and_a_word_too_many_get_one_sentence(here, capsys):
    assert "there is no flag --xyzzy: look into --help" in refused(capsys, "--xyzzy", "1")
    assert "nothing takes 'stray'" in refused(capsys, "--steps", "3", "stray")
    assert list(here.iterdir()) == [here / "my.txt"]


def test_what_flags_are_called_elsewhere_are_no_flags_here_and_lead_to_one():
    of_training = {*unknown_flags.flag_names(Flags), *(name.replace("_", "-") for name in kinds(RunConfig))}
    known = of_training.union(*map(unknown_flags.flag_names, (SampleOptions, ExportOptions)))
    for name, meant in unknown_flags.ELSEWHERE.items():
        assert name not in of_training
        assert set(meant) <= known, name
