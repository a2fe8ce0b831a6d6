"""`train.py` as its users meet it: what it leaves behind, what it says, and what it refuses."""

import itertools
import json
import re
import string
import sys
from pathlib import Path

import pytest
import torch

from minitransformer.commands import unknown_flags
from minitransformer.commands.export import Options as ExportOptions
from minitransformer.commands.sample import Options as SampleOptions
from minitransformer.commands.train import Options, main
from minitransformer.generation.config import SamplingConfig
from minitransformer.models.model import count_parameters
from minitransformer.runs import Run
from minitransformer.settings import kinds
from minitransformer.text.corpora import short_name
from minitransformer.text.tokenizers import TiktokenEncoding, Tokenizer
from minitransformer.training.config import RunConfig, with_vocabulary
from minitransformer.training.presets import PRESETS
from tests.prepared_for_tests import fitted
from tests.runs_for_tests import SMALL, configured, refused, saved_weights, train


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
    assert torch.equal(model.embedding.table.weight, saved_weights(path, "best")["embedding.table.weight"])
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
    kind, usual = Tokenizer.registry[tokenizer], Tokenizer.choose(tokenizer)
    if tokenizer in ("tokenizers", "sentencepiece"):
        pytest.skip("belongs to an imported checkpoint, and is never fitted")
    if issubclass(kind, TiktokenEncoding) and not all(path.exists() for path in kind._cached().values()):
        pytest.skip("its ranks are not on this machine")
    text = "".join(map(chr, [10, *range(32, 96)]))
    if tokenizer == "bpe":
        text = " ".join(map("".join, itertools.product(string.ascii_lowercase, repeat=3)))
    assert fitted(tokenizer, text).vocab_size == kind.usual_vocab_size(usual.settings)


def test_help_counts_the_parameters_of_presets_by_their_own_tokenizers(here, capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    counts = dict(
        line.split()[:2] for line in capsys.readouterr().out.splitlines() if re.match(r"\s+\S+\s+[\d.]+M\b", line)
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


def test_tensorboard_that_is_not_installed_is_said_before_any_work(run, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    before = (run / "config.json").read_text()
    for arguments in (["--resume", "run", "--steps", "9"], ["--data", "my.txt"], ["--init-from", "run"]):
        assert "--no-tensorboard" in refused(capsys, *arguments, "--tensorboard")
    assert (run / "config.json").read_text() == before
    assert not Path("runs").exists()


@pytest.mark.parametrize("seed", [2**63, 2**64])
def test_a_seed_that_torch_cannot_hold_is_refused_before_anything_is_made(here, capsys, seed):
    assert "below 2 to the 63rd" in refused(capsys, "--out", "run", "--seed", str(seed), *SMALL)
    assert not (here / "run").exists()


@pytest.mark.parametrize(
    ("data", "name"),
    [
        *(("my.txt", "my"), ("a/s.txt.gz", "s"), ("notes/**/*.md", "notes"), ("a/s*.txt", "s"), ("pydocs", "pydocs")),
        *(("*.txt", "data"), ("v1.2/", "v1.2"), ("my file.jsonl", "my-file"), ("s.txt*", "s"), ("-", "data")),
    ],
)
def test_a_run_is_called_by_what_its_data_is_called(data, name):
    assert short_name(data) == name


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
    assert "there is no flag --xyzzy: see --help" in refused(capsys, "--xyzzy", "1")
    assert "unexpected argument 'stray'" in refused(capsys, "--steps", "3", "stray")
    assert list(here.iterdir()) == [here / "my.txt"]


def test_what_flags_are_called_elsewhere_are_no_flags_here_and_lead_to_one():
    of_training = {*unknown_flags.flag_names(Options), *(name.replace("_", "-") for name in kinds(RunConfig))}
    of_sampling = {name.replace("_", "-") for name in SamplingConfig().flat}
    known = of_training.union(of_sampling, *map(unknown_flags.flag_names, (SampleOptions, ExportOptions)))
    assert set(unknown_flags.ELSEWHERE) <= known
    for theirs in unknown_flags.ELSEWHERE.values():
        assert not set(theirs) & of_training
