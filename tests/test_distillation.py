"""Distillation: the loss is that of its equation, and a run with a teacher is a run like any other."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from minitransformer.commands import compress
from minitransformer.commands import train as command
from minitransformer.compression import measuring
from minitransformer.models.model import Model
from minitransformer.runs import Run
from minitransformer.text.batches import IGNORE
from minitransformer.text.tokenizers import Bytes
from minitransformer.training.distillation import Distillation
from minitransformer.training.objectives import Causal
from minitransformer.training.objectives import cross_entropy as chunks
from tests.runs_for_tests import SMALL, assert_same_weights, refused, saved_weights, train


@pytest.mark.parametrize("fewest", [1, 1 << 24], ids=["in chunks", "at once"])
@pytest.mark.parametrize(("weight", "temperature"), [(0.25, 2.0), (1.0, 1.0)])
def test_loss_and_gradients_are_those_of_the_equation(
    tiny_decoder: Callable[..., Model],
    monkeypatch: pytest.MonkeyPatch,
    fewest: int,
    weight: float,
    temperature: float,
) -> None:
    monkeypatch.setitem(chunks.FEWEST_LOGITS, "cpu", fewest)
    student, teacher = tiny_decoder(), tiny_decoder(d_model=32, num_layers=1, tied_embeddings=False)
    tokens = torch.randint(11, (5, 13))
    targets = tokens[:, 1:].clone()
    targets[0, :4] = IGNORE
    batch = Causal.batch_type(tokens[:, :-1], targets)
    objective = Causal(Causal.Settings(), Bytes(), student.config, 12)
    found = Distillation(objective, teacher, weight, temperature).loss_sum(student, batch)
    found.backward()
    gradient = student.head.weight.grad.clone()
    student.zero_grad()
    ours, theirs = student(batch.inputs), teacher(batch.inputs).detach()
    kept = targets != IGNORE
    p, q = (theirs[kept].float() / temperature).softmax(-1), (ours[kept].float() / temperature).softmax(-1)
    own = F.cross_entropy(ours[kept], targets[kept], reduction="sum")
    expected = (1 - weight) * own + weight * temperature**2 * (p * (p / q).log()).sum()
    expected.backward()
    torch.testing.assert_close(found.float(), expected.float(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(gradient.float(), student.head.weight.grad.float(), rtol=1e-3, atol=1e-4)
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_a_teacher_that_is_the_student_teaches_nothing(tiny_decoder: Callable[..., Model]) -> None:
    model = tiny_decoder()
    tokens = torch.randint(11, (2, 9))
    batch = Causal.batch_type(tokens[:, :-1], tokens[:, 1:])
    objective = Causal(Causal.Settings(), Bytes(), model.config, 8)
    assert Distillation(objective, model, 1.0, 3.0).loss_sum(model, batch).abs() < 1e-3


def test_a_run_with_a_teacher_learns_something_else_resumes_exactly_and_is_fine_tuned_without(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    few = ["--steps", "4", "--save-every", "2", "--eval-every", "4", "--data", "my.txt", *SMALL]
    taught = ["--teacher", "run", "--distill-weight", "0.9"]
    assert command.main(["--out", "alone", *few]) == 0
    assert command.main(["--out", "taught", *few, *taught]) == 0
    config = Run.open(Path("taught")).config.training
    assert config.teacher == str(run)
    assert config.teacher_sha256 is not None
    whole = saved_weights(Path("taught"))
    assert any(not torch.equal(weight, whole[name]) for name, weight in saved_weights(Path("alone")).items())
    assert command.main(["--resume", "taught", "--checkpoint", "step-000002"]) == 0
    assert_same_weights(saved_weights(Path("taught")), whole)
    assert train("--init-from", "taught", "--out", "tuned", steps=1) == 0
    assert Run.open(Path("tuned")).config.training.teacher is None
    assert command.main(["--resume", "run", "--steps", "8"]) == 0
    assert "has other weights than at the start" in refused(capsys, "--resume", "taught", "--steps", "6", code=1)
    run.rename("elsewhere")
    assert f"the teacher {run} is not there" in refused(capsys, "--resume", "taught", "--steps", "6", code=1)


FEW = ["--steps", "3", "--data", "my.txt", *SMALL]
INT8 = ["run", "--out", "teacher"]
LORA = ["--init-from", "run", "--out", "teacher", "--adapter", "lora", "--steps", "1", "--compile", "off"]


@pytest.mark.parametrize(
    ("flags", "make_teacher", "same"),
    [
        (["--batch-size", "1", "--grad-accumulation", "2"], None, True),
        (["--activation-checkpointing"], None, True),
        (["--on-oom", "halve"], None, True),
        (["--precision", "bf16"], None, False),
        (["--context-length", "32", "--sequence-length", "16"], None, True),
        ([], lambda: compress.main(INT8), False),
        ([], lambda: command.main(LORA), False),
    ],
    ids=["accumulated", "recomputed", "halved", "bf16", "longer context", "from int8", "from an adapter"],
)
@pytest.mark.unchecked_shapes
def test_a_run_learns_from_its_teacher_however_it_is_trained(
    run: Path, monkeypatch: pytest.MonkeyPatch, flags: list[str], make_teacher: Callable[[], int] | None, same: bool
) -> None:
    monkeypatch.setattr(measuring, "NEW_TOKENS", 1)
    assert make_teacher is None or make_teacher() == 0
    teacher = ["--teacher", "run" if make_teacher is None else "teacher", "--distill-weight", "1"]
    assert command.main(["--out", "plain", *FEW, "--teacher", "run", "--distill-weight", "1"]) == 0
    assert command.main(["--out", "taught", *FEW, *teacher, *flags]) == 0
    plain, taught = saved_weights(Path("plain")), saved_weights(Path("taught"))
    nearly = [torch.allclose(taught[name], weight, rtol=1e-3, atol=1e-5) for name, weight in plain.items()]
    assert all(nearly) if same else not all(nearly)
    for name, weight in plain.items():  # in another precision, or from nearly the same teacher: nearly the same
        assert F.cosine_similarity(taught[name].flatten(), weight.flatten(), dim=0) > 0.9


COMPILED = """
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from minitransformer.models.config import ModelConfig
from minitransformer.models.model import build_model
from minitransformer.text.tokenizers import Bytes
from minitransformer.training.distillation import Distillation
from minitransformer.training.objectives import Causal

config = ModelConfig(d_model=16, num_layers=1, num_heads=2, context_length=8, vocab_size=11)
student, teacher, counter = build_model(config), build_model(config), CompileCounterWithBackend("aot_eager")
distillation = Distillation(Causal(Causal.Settings(), Bytes(), config, 8), teacher, 0.5, 2.0)
compiled, graphs = torch.compile(student, backend=counter), []
for step in range(3):
    tokens = torch.randint(11, (2, 9))
    batch, gradients = Causal.batch_type(tokens[:, :-1], tokens[:, 1:]), []
    for model in (student, compiled):
        distillation.loss_sum(model, batch).backward()
        gradients.append([weight.grad.clone() for weight in student.parameters()])
        student.zero_grad()
    torch.testing.assert_close(*gradients)
    graphs.append(counter.frame_count)
print(graphs[0] > 0 and len(set(graphs)) == 1)
"""


@pytest.mark.slow
def test_a_compiled_student_learns_the_same_and_is_compiled_once() -> None:
    # In a process of its own: the compiler cannot read the checks that the tests put around signatures.
    done = subprocess.run([sys.executable, "-c", COMPILED], capture_output=True, text=True)
    assert done.stdout == "True\n", done.stderr[-2000:]


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (
            ["--tokenizer", "chars"],
            "the teacher run has another tokenizer, so that its predictions",
        ),
        (["--vocab-size", "300"], "the teacher run has vocab_size 257, and the run 300: they must be the same"),
        (
            ["--context-length", "32"],
            "the teacher run reads 16 tokens, and sequences have 32",
        ),
        (["--teacher", "nowhere"], "nowhere is not a run folder"),
    ],
)
def test_a_teacher_that_cannot_teach_is_refused(
    run: Path, capsys: pytest.CaptureFixture[str], flags: list[str], sentence: str
) -> None:
    teacher = [] if "--teacher" in flags else ["--teacher", "run"]
    assert sentence in refused(capsys, *SMALL, "--data", "my.txt", "--out", "x", "--steps", "2", *teacher, *flags)
