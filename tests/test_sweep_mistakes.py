"""Mistakes of who sweeps are one sentence before anything starts; values are read as train.py reads them."""

import sys

import pytest

from minitransformer.commands import sweep as command
from minitransformer.commands import train as train_command_module
from tests.sweeping_for_tests import SMALL, refused, sweep

pytestmark = [pytest.mark.unchecked_shapes, pytest.mark.usefixtures("short_text")]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ["nothing to sweep", "--set"]),
        (["--set", "learning_rate=1"], ["learning_rate", "--help"]),
        (["--set", "residal=pre,post"], ["residal", "'residual'"]),
        (["--set", "lr"], ["lr", "no values"]),
        (["--set", "lr=-1,1e-3"], ["lr is -1.0: it must be above 0", "lr -1"]),
        (["--set", "residual=pots,pre"], ["unknown residual placement 'pots': did you mean 'post'?"]),
        (["--set", "tied_embeddings=yes,no"], ["tied_embeddings", "true"]),
        (["--set", "d_model=16,20", "--set", "num_heads=2,8"], ["d_model 20", "num_heads 8", "in the combination"]),
        (["--set", "lr=1e-4..1e-2"], ["lr is a range", "--random"]),
        (["--set", "lr=1e-2..1e-4", "--random", "3"], ["empty"]),
        (["--set", "residual=a..b", "--random", "3"], ["not a number"]),
        (["--set", "residual=pre,post", "--random", "3"], ["--random 3", "2 distinct"]),
        (["--set", "lr=1e-4..1e-2", "--random", "0"], ["--random is 0"]),
        (["--set", "lr=1,2", "--set", "lr=3"], ["lr", "2 times"]),
        (["--set", "seed=1,2"], ["--seeds"]),
        (["--set", "lr=1,2", "--seeds", "0,0"], ["--seeds", "different"]),
        (["--set", "lr=1,2", "--seeds", "a"], ["--seeds a"]),
        (["--set", "data=a.txt,b.txt"], ["data", "not comparable"]),
        (["--set", "tokenizer=bytes,chars", "--metric", "validation_loss"], ["tokenizer", "bits_per_byte"]),
        (["--set", "window_pattern=True,False"], ["window_pattern", "flag"]),
        (["--set", "lr=1,2", "--halving", "3"], ["--halving 3", "2"]),
        (["--set", "lr=1,2", "--halving", "1"], ["--halving is 1"]),
        (["--set", "lr=1,2,3,4,5,6,7,8,9", "--halving", "3"], ["6 steps", "--steps"]),
        (["--set", "steps=6,8", "--halving", "2"], ["steps", "--halving"]),
        (["--set", "lr=1,2", "--processes", "0"], ["--processes is 0"]),
        (["--set", "lr=1,2", "--smallest-difference", "-1"], ["--smallest-difference is -1"]),
        (["--set", "lr=1,2", "--device", "abacus"], ["abacus", "cpu"]),
        (["--set", "lr=1,2", "--out", "my.txt"], ["my.txt", "file"]),
        (["--set", "lr=1,2", "--out", "."], ["other contents", "--out"]),
    ],
)
def test_a_mistake_is_one_sentence_before_anything_starts(here, in_process, capsys, arguments, words):
    error = refused(capsys, "gpt-nano", "--data", "my.txt", "--steps", "6", *SMALL, *arguments)
    for word in words:
        assert word in error
    assert not in_process
    assert not (here / "sweeps").exists()


@pytest.mark.parametrize("value", ["lr=abc", "compile=maybe", "num_layers=2.5"])
def test_a_value_that_does_not_parse_is_answered_as_train_answers_it(here, capsys, value):
    name, _, word = value.partition("=")
    said = []
    for main, arguments in (
        (command.main, ["--set", value]),
        (train_command_module.main, [f"--{name.replace('_', '-')}", word]),
    ):
        with pytest.raises(SystemExit) as stopped:
            main(arguments)
        assert stopped.value.code == 2
        said.append(" ".join(capsys.readouterr().err.replace("│", " ").split()).partition("──")[0])
    assert word in said[0]


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("tied_embeddings=true,False", (True, False)),
        ("norm-bias=none,true", (None, True)),
        ("d_ff=None,32", (None, 32)),
        ("lr=1,3e-4", (1.0, 3e-4)),
        ("residual=pre, post,pre", ("pre", "post")),
        ("compile=on,off", ("on", "off")),
    ],
)
def test_values_are_read_as_train_reads_them(text, values):
    read = command._setting(text).values
    assert read == values
    assert list(map(type, read)) == list(map(type, values))


def test_tokens_that_differ_are_compared_by_bits_per_byte(here, in_process, capsys):
    assert sweep("--set", "tokenizer=bytes,chars", "--out", "s", steps=2) == 0
    assert "bits per byte" in capsys.readouterr().out


def test_a_metric_that_the_objective_does_not_have_is_refused(here, capsys):
    arguments = ["--set", "lr=1,2", "--metric", "bits_per_byte", "--data", "my.txt", *SMALL]
    assert "objective 'masked' has no bits per byte" in refused(capsys, "bert-mini", *arguments)
    arguments[3] = "accuracy"
    assert "no accuracy: use --metric validation_loss" in refused(capsys, "gpt-nano", *arguments)


@pytest.mark.parametrize("module", ["matplotlib.figure", "scipy.stats"])
def test_what_is_not_installed_is_said_before_anything_is_trained(here, in_process, capsys, monkeypatch, module):
    monkeypatch.setitem(sys.modules, module, None)
    arguments = ["gpt-nano", "--set", "lr=1e-3,1e-2", "--data", "my.txt", *SMALL]
    assert f"sweeps need {module.partition('.')[0]}" in refused(capsys, *arguments)
    assert not in_process
    assert not (here / "sweeps").exists()


def test_a_sweep_with_tensorboard_is_refused_where_it_is_not_installed(here, in_process, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    arguments = ["gpt-nano", "--set", "lr=1e-3,1e-2", "--data", "my.txt", *SMALL, "--tensorboard"]
    assert "--tensorboard needs" in refused(capsys, *arguments)
    assert not in_process
