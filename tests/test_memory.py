"""Steps that run out of memory: halved micro-batches give the same numbers, or the run ends with the remedy."""

import os
import subprocess
import sys

import pytest
import torch

from minitransformer.commands.train import main
from minitransformer.text.pair_batches import PairBatch
from minitransformer.training.checkpoint import choose_checkpoint, load_trainer_state
from minitransformer.training.memory import OutOfMemory, is_out_of_memory, parts_of
from tests.runs_for_tests import configured, metrics, refused, saved_weights, train, trainer_for, weights_after

pytestmark = pytest.mark.unchecked_shapes
OF_CUDA = torch.OutOfMemoryError("CUDA out of memory")
OF_THE_CPU = RuntimeError("[enforce fail at alloc_cpu.cpp:117] . DefaultCPUAllocator: can't allocate memory: you tried")


def tight(trainer, rows, *, error=OF_CUDA, in_backward=False, after=0):
    """The memory of `trainer` holds micro-batches of `rows` sequences, once `after` steps are done."""
    model = trainer.learner.model

    def fail(size):
        if size > rows and trainer.learner.steps_done >= after:
            raise error

    def before(module, arguments):
        fail(0 if in_backward or not torch.is_grad_enabled() else len(arguments[0]))

    def hidden(module, arguments, output):
        if in_backward and output.requires_grad:
            output.register_hook(lambda gradient: fail(len(gradient)))

    model.register_forward_pre_hook(before)
    model.stack.blocks[0].register_forward_hook(hidden)
    return trainer


def losses(run):
    return [row["loss"] for row in metrics(run) if "loss" in row]


@pytest.mark.parametrize("in_backward", [False, True])
@pytest.mark.parametrize("error", [MemoryError(), OF_THE_CPU, OF_CUDA])
@pytest.mark.parametrize("rows", [1, 2, 3])
def test_halved_micro_batches_give_the_losses_and_weights_of_whole_ones(text, tmp_path, error, rows, in_backward):
    config = configured(batch_size=5, grad_accumulation=2, on_oom="halve", optimizer="muon")
    whole = trainer_for(tmp_path / "whole", text, config)
    whole.train()
    halved = tight(trainer_for(tmp_path / "halved", text, config), rows, error=error, in_backward=in_backward, after=3)
    halved.train()
    assert losses(tmp_path / "halved") == pytest.approx(losses(tmp_path / "whole"), rel=1e-5)
    for name, weight in weights_after(halved).items():
        torch.testing.assert_close(weight, weights_after(whole)[name], atol=1e-4, rtol=1e-3)
    parts = {1: 8, 2: 4, 3: 2}[rows]
    said = (tmp_path / "halved/train.log").read_text()
    assert said.count("out of memory") == 1
    assert f"step 4: out of memory, so that each micro-batch is now divided into {parts}; the rows" in said


def test_the_choice_survives_a_resume_and_is_said_once(text, tmp_path):
    config = configured(batch_size=4, on_oom="halve", steps=12)
    first = tight(trainer_for(tmp_path / "run", text, config), 2)
    first.train(until=6)
    saved = load_trainer_state(choose_checkpoint(tmp_path / "run/checkpoints"))
    assert saved["micro_batches"] == {"batch_size": 4, "halvings": 1}
    second = trainer_for(tmp_path / "run", text, config, resume_at=6)
    second.restore(choose_checkpoint(tmp_path / "run/checkpoints"))
    sizes = []
    second.learner.model.register_forward_pre_hook(lambda module, arguments: sizes.append(len(arguments[0])))
    second.learner.step(second.learner.next_batches())
    assert sizes == [2, 2]
    assert (tmp_path / "run/train.log").read_text().count("out of memory") == 1


def test_another_batch_size_is_tried_as_it_is(text, tmp_path):
    first = tight(trainer_for(tmp_path / "run", text, configured(batch_size=4, on_oom="halve")), 2)
    first.train(until=3)
    second = trainer_for(tmp_path / "run", text, configured(batch_size=2, grad_accumulation=2), resume_at=3)
    second.restore(choose_checkpoint(tmp_path / "run/checkpoints"))
    assert second.learner.micro_batches.halvings == 0


def test_by_default_the_run_ends_with_the_remedy(here, capsys, monkeypatch):
    def too_much(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nGPU 0 has a total capacity of …")

    monkeypatch.setattr("minitransformer.training.objectives.causal.Causal.loss_sum", too_much)
    assert train("--out", "run", "--validation-fraction", "0") == 1
    error = capsys.readouterr().err
    assert error == (
        "error: the memory does not hold a micro-batch of 2 sequences (CUDA out of memory. Tried to allocate 2 GiB.): "
        "give --on-oom halve, or halve --batch-size and double --grad-accumulation, which changes nothing else\n"
    )
    error = refused(capsys, "--resume", "run", "--on-oom", "halve", code=1)
    assert "a micro-batch of 1 sequence (" in error
    assert "--sequence-length" in error


def test_an_error_of_another_kind_is_not_hidden(text, tmp_path):
    config = configured(batch_size=4, on_oom="halve")
    trainer = tight(trainer_for(tmp_path / "run", text, config), 2, error=RuntimeError("shapes do not match"))
    with pytest.raises(RuntimeError, match="shapes do not match"):
        trainer.train()
    assert not is_out_of_memory(ValueError("out of memory"))


def test_the_weights_are_those_before_a_step_that_does_not_fit(text, tmp_path):
    trainer = trainer_for(tmp_path / "run", text, configured(batch_size=4))
    trainer.train(until=3)
    before = weights_after(trainer)
    with pytest.raises(OutOfMemory):
        tight(trainer, 2).train()
    assert all(torch.equal(weight, before[name]) for name, weight in weights_after(trainer).items())
    assert all(weight.grad is None for weight in trainer.learner.model.parameters())


def test_pairs_are_halved_as_texts_are():
    batch = PairBatch(*(torch.arange(5)[:, None] for _ in range(4)))
    assert [part.num_rows for part in parts_of(batch, 1)] == [3, 2]
    assert [part.num_rows for part in parts_of(batch, 3)] == [1] * 5
    assert torch.equal(torch.cat([part.source for part in parts_of(batch, 2)]), batch.source)


LIMITED = """
import resource, sys
from minitransformer.commands.train import main
from minitransformer.training.learner import Learner

def limited(self, batches):
    if self.steps_done == 0:
        now = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (now + 32_000_000, -1))
    try:
        return step(self, batches)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (-1, -1))

step, Learner.step = Learner.step, limited
sys.exit(main(sys.argv[1:]))
"""
LARGE = ["--batch-size", "64", "--context-length", "128", "--d-model", "64", "--num-layers", "2", "--num-heads", "2"]


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs RLIMIT_AS")
@pytest.mark.parametrize("choice", ["stop", "halve"])
def test_a_real_limit_of_memory(here, choice):
    flags = [*LARGE, "--tokenizer", "bytes", "--compile", "off", "--precision", "fp32", "--log-every", "1"]
    run = ["--data", "my.txt", "--steps", "3", "--validation-fraction", "0", *flags]
    assert main([*run, "--out", "whole"]) == 0
    command = [sys.executable, "-c", LIMITED, *run, "--out", "run", "--on-oom", choice]
    ended = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    if choice == "stop":
        assert ended.returncode == 1, ended.stderr
        assert ended.stderr.startswith("error: the memory does not hold a micro-batch of 64 sequences (")
        return
    assert ended.returncode == 0, ended.stderr
    assert "out of memory, so that each micro-batch is now divided into" in ended.stdout
    assert losses(here / "run") == pytest.approx(losses(here / "whole"), rel=1e-5)
    for name, weight in saved_weights(here / "run").items():
        torch.testing.assert_close(weight, saved_weights(here / "whole")[name], atol=1e-4, rtol=1e-3)
