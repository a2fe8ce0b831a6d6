"""`verify-resume`: runs of every kind resume exactly, and a resume that does not is shown where it differs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from minitransformer.commands import start
from minitransformer.commands import train as command
from minitransformer.commands.verify_resume import main
from minitransformer.reliability.launcher import Start
from minitransformer.reliability.state import differences
from minitransformer.training.checkpoint import CHECKPOINTS
from minitransformer.training.learner import Learner
from minitransformer.training.loader import Loader
from minitransformer.training.loop import Trainer
from minitransformer.training.objectives import Objective
from minitransformer.training.optimizers import Optimizer
from minitransformer.training.precision import Precision
from tests.forked_for_tests import forked_commands
from tests.ranks_for_tests import CASES, write_texts
from tests.runs_for_tests import SMALL, train
from tests.starts_for_tests import with_another_weight_on_rank_1

pytestmark = pytest.mark.unchecked_shapes


def flags(**choices: Any) -> list[str]:
    words = {"dropout": 0.1, "grad_accumulation": 2, "tokenizer": "bytes", "data": "text.txt", **choices}
    words = {"d_model": 16, "num_layers": 2, "context_length": 16, "batch_size": 2, **words}
    if words.get("topology") != "rnn":
        words["num_heads"] = 2
    given: list[str] = []
    for name, value in words.items():
        flag = name.replace("_", "-")
        given += [f"--{flag}" if value else f"--no-{flag}"] if isinstance(value, bool) else [f"--{flag}", str(value)]
    return given


@pytest.fixture
def texts(here: Path) -> Path:
    write_texts(here)
    return here


def verified(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> dict[str, Any]:
    capsys.readouterr()
    assert main([*arguments, "--json"]) == code
    proof: dict[str, Any] = json.loads(capsys.readouterr().out)
    return proof


@pytest.mark.parametrize("name", CASES)
def test_every_kind_of_run_resumes_exactly(texts: Path, capsys: Any, name: str) -> None:
    choices = {key: value for key, value in CASES[name].items() if key not in ("batch_tokens", "precision")}
    if teacher := choices.get("teacher"):
        assert command.main([*flags(), "--steps", "1", "--out", teacher]) == 0
    proof = verified(capsys, *flags(**choices, eval_every=2))
    assert proof["equal"]
    assert (proof["first"], proof["stop"], proof["last"]) == (0, 3, 6)
    assert all(count > 0 for part, count in proof["compared"].items() if part != "precision state")


@pytest.mark.parametrize("precision", Precision.registry)
@pytest.mark.parametrize("optimizer", Optimizer.registry)
def test_every_precision_and_optimizer_resumes_exactly(
    texts: Path, capsys: Any, precision: str, optimizer: str
) -> None:
    proof = verified(capsys, *flags(precision=precision, optimizer=optimizer), "--steps", "4")
    assert proof["equal"]
    assert proof["machine"]["precision"] == precision
    assert (proof["compared"]["precision state"] > 0) == (precision == "fp16")


def test_every_objective_is_among_the_cases() -> None:
    assert {case.get("objective", "causal") for case in CASES.values()} == set(Objective.registry)


def test_a_run_is_verified_from_its_latest_checkpoint_and_left_as_it_was(run: Path, capsys: Any) -> None:
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    proof = verified(capsys, "run", "--steps", "4")
    assert proof["equal"]
    assert (proof["first"], proof["stop"], proof["last"]) == (6, 8, 10)
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_a_fine_tune_that_has_only_its_initial_weights_is_verified(run: Path, capsys: Any, monkeypatch: Any) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_save", lambda self: None)
        assert train("--out", "tuned", "--init-from", "run") == 0
    assert [path.name for path in (run.parent / "tuned" / CHECKPOINTS).glob("step-*")] == ["step-000000"]
    assert verified(capsys, "tuned", "--steps", "2")["equal"]


def test_nothing_is_left_in_the_folder_for_temporary_runs(texts: Path, capsys: Any) -> None:
    (texts / "disk").mkdir()
    assert verified(capsys, *flags(), "--steps", "2", "--folder", "disk")["equal"]
    assert list((texts / "disk").iterdir()) == []


# --- a resume that is not exact


def different(capsys: Any, *arguments: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The first difference, and its parts by name."""
    difference = verified(capsys, *(arguments or flags()), code=1)["difference"]
    return difference, {part["part"]: part for part in difference["parts"]}


def broken(monkeypatch: Any, change: Any) -> None:
    """Have `change(learner)` follow each restored state."""
    load = Learner.load_state_dict

    def restored(self: Learner, state: dict[str, Any]) -> None:
        load(self, state)
        change(self)

    monkeypatch.setattr(Learner, "load_state_dict", restored)


def test_a_moment_that_is_not_restored_is_named_with_its_place_and_both_values(
    texts: Path, capsys: Any, monkeypatch: Any
) -> None:
    def forget(learner: Learner) -> None:
        parameter = learner.optimizers[0].param_groups[0]["params"][0]
        learner.optimizers[0].state[parameter]["exp_avg_sq"].view(-1)[17:] = 0

    broken(monkeypatch, forget)
    difference, parts = different(capsys, *flags(optimizer="adamw"))
    assert (difference["step"], difference["when"]) == (3, "on resuming")
    assert list(parts) == ["optimizer state"]
    part = parts["optimizer state"]
    assert part["name"].startswith("exp_avg_sq of ")
    assert part["index"] == [1, 1]  # element 17, in rows of 16
    assert part["whole"] > part["resumed"] == 0
    assert part["count"] == 1


def test_random_numbers_of_another_step_are_found_in_the_step_after_resuming(
    texts: Path, capsys: Any, monkeypatch: Any
) -> None:
    seed = Learner._seed

    def shift(learner: Learner) -> None:
        learner._seed = lambda row: seed(learner, row) + 1  # type: ignore[method-assign]

    broken(monkeypatch, shift)
    difference, parts = different(capsys)
    assert (difference["step"], difference["when"]) == (4, "after resuming")
    assert {"losses", "weights", "optimizer state"} <= parts.keys()
    assert parts["losses"]["name"] == "loss"
    assert "data" not in parts


def test_data_of_another_step_is_found(texts: Path, capsys: Any, monkeypatch: Any) -> None:
    batches = Loader.training_batches

    def shift(learner: Learner) -> None:
        learner._batches = lambda step: batches(learner.loader, step + 1)

    broken(monkeypatch, shift)
    difference, parts = different(capsys)
    assert (difference["step"], difference["when"]) == (3, "on resuming")
    assert list(parts) == ["data"]
    assert parts["data"]["name"] == "inputs of micro-batch 0"


def test_weights_that_are_one_bit_off_are_found(texts: Path, capsys: Any, monkeypatch: Any) -> None:
    def nudge(learner: Learner) -> None:
        weight = next(learner.model.parameters()).data.view(-1)
        weight[3] = torch.nextafter(weight[3], torch.tensor(9.0))

    broken(monkeypatch, nudge)
    difference, parts = different(capsys)
    assert difference["step"] == 3
    assert parts["weights"]["index"] == [0, 3]
    assert parts["weights"]["count"] == 1


def test_the_scale_of_float16_is_compared(texts: Path, capsys: Any, monkeypatch: Any) -> None:
    def double(learner: Learner) -> None:
        state = learner.precision.state_dict()
        learner.precision.load_state_dict({**state, "scale": 2 * state["scale"]})

    broken(monkeypatch, double)
    _, parts = different(capsys, *flags(precision="fp16"))
    assert parts["precision state"]["name"] == "scale"


def test_progress_that_is_lost_is_found_in_the_next_step(texts: Path, capsys: Any, monkeypatch: Any) -> None:
    restore = Trainer.restore

    def forget(self: Trainer, chosen: Path) -> None:
        restore(self, chosen)
        self.progress.tokens = 0

    monkeypatch.setattr(Trainer, "restore", forget)
    difference, parts = different(capsys)
    assert difference["step"] == 4
    assert parts.keys() == {"losses", "progress"}
    assert parts["progress"]["name"] == "tokens"


def test_training_that_is_not_deterministic_is_not_blamed_on_resuming(
    texts: Path, capsys: Any, monkeypatch: Any
) -> None:
    monkeypatch.setattr(Learner, "_seed", lambda self, row: int(torch.seed() % 1000))
    assert main([*flags(), "--steps", "2"]) == 1
    told = capsys.readouterr().out
    assert "step 1, before the stop" in told
    assert "training itself is not deterministic" in told


def test_a_training_that_diverges_is_not_compared(texts: Path, capsys: Any, monkeypatch: Any) -> None:
    spoil = Learner.step

    def step(self: Learner, batches: Any) -> Any:
        next(self.model.parameters()).data.fill_(float("nan"))
        return spoil(self, batches)

    monkeypatch.setattr(Learner, "step", step)
    assert main(flags()) == 3
    assert capsys.readouterr().err == "error: this training diverges in these steps: lower its learning rates\n"


def test_what_differs_is_said_in_words(texts: Path, capsys: Any, monkeypatch: Any) -> None:
    broken(monkeypatch, lambda learner: next(learner.model.parameters()).data.view(-1)[3].add_(1))
    assert main(flags()) == 1
    told = capsys.readouterr().out
    assert "different, first at step 3, on resuming: what is restored from disk is not what was saved" in told
    assert "weights" in told
    assert "[0, 3] is " in told


@pytest.mark.parametrize(
    ("left", "right", "same"),
    [
        (torch.tensor([0.0, float("nan")]), torch.tensor([0.0, float("nan")]), True),
        (torch.tensor([0.0, 1.0]), torch.tensor([-0.0, 1.0]), False),
        (torch.tensor(3.0), torch.tensor(3.0, dtype=torch.float64), False),
        (torch.zeros(2, 1), torch.zeros(1, 2), False),
        (torch.tensor([True, False]), torch.tensor([True, True]), False),
        (torch.zeros(2), None, False),
        (0.1 + 0.2, 0.3, False),
        (float("nan"), float("nan"), True),
        (0.0, -0.0, False),
        (1, True, False),
    ],
)
def test_states_are_equal_if_all_bits_are(left: Any, right: Any, same: bool) -> None:
    assert (differences({"weights": {"x": left}}, {"weights": {"x": right}}) == []) == same


# --- mistakes


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nothing-here"], "nothing-here"),
        (["--steps", "3"], "even number"),
        (["--steps", "0"], "even number"),
        (["run", "--d-model", "32"], "cannot change"),
        (["--data", "my.txt", *SMALL, "--folder", "nowhere"], "--folder"),
    ],
)
def test_a_mistake_is_one_sentence(run: Path, capsys: Any, arguments: list[str], said: str) -> None:
    assert main(arguments) in (1, 2)
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert said in error


# --- several ranks


def on_two_ranks(texts: Path, begin: Start = start) -> dict[str, Any]:
    words = [*flags(optimizer="muon"), "--steps", "4", "--json"]
    ended = forked_commands(begin)(texts, "verify-resume", *words, ranks=2)
    assert ended.outputs[0], ended.output
    proof: dict[str, Any] = json.loads(ended.outputs[0])
    assert ended.done == proof["equal"]
    return proof


def test_two_ranks_resume_exactly(texts: Path) -> None:
    proof = on_two_ranks(texts)
    assert proof["equal"]
    assert proof["ranks"] == 2


@pytest.mark.slow
def test_of_two_ranks_the_one_that_does_not_resume_exactly_is_named(texts: Path) -> None:
    difference = on_two_ranks(texts, with_another_weight_on_rank_1)["difference"]
    assert (difference["step"], difference["when"], difference["rank"]) == (2, "on resuming", 1)
    assert [part["part"] for part in difference["parts"]] == ["weights"]
