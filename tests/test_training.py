"""A training step and a training run: what they compute, and that interruptions leave no trace."""

import json
import math
import signal
from dataclasses import fields, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from minitransformer.models.decoder import DecoderLM
from minitransformer.text.batches import IGNORE, Batch
from minitransformer.text.tokenizers import Bytes
from minitransformer.training.checkpoint import checkpoint_step, checkpoints_in, choose_checkpoint
from minitransformer.training.divergence import MOST_STEPS_WITHOUT_UPDATE, NonFiniteTraining, are_finite
from minitransformer.training.learner import Learner
from minitransformer.training.light import LightAdamW
from minitransformer.training.logging import RunFiles
from minitransformer.training.muon import Muon, jordan, nearest_to_one, orthogonalise, polar_express
from minitransformer.training.objectives import Causal
from minitransformer.training.optimizers import AdamW, Optimizer, Rates, build_optimizers
from minitransformer.training.signals import StopRequest
from tests.runs_for_tests import (
    TINY,
    call_after_step,
    configured,
    cpu,
    loader_of,
    prepared_text,
    reading_learner,
    trainer_for,
    validation_of,
)

pytestmark = pytest.mark.unchecked_shapes

SETTINGS = Rates(lr=0.1, embedding_lr=0.1, head_lr=0.1, weight_decay=0.1)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return prepared_text(tmp_path_factory.mktemp("text"))


def weights_after(trainer):
    return {name: tensor.clone() for name, tensor in trainer.learner.model.state_dict().items()}


def assert_same(left, right):
    assert left.keys() == right.keys()
    for name in left:
        assert torch.equal(left[name], right[name]), f"{name} differs"


def metrics(path):
    timeless = ("tokens_per_second", "mfu", "seconds", "seconds_left")
    records = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in record.items() if k not in timeless} for record in records]


def causal(kind=Causal):
    return kind.choose().make(Bytes(), TINY.model, TINY.sequence_length)


def gradients(model, batches, grad_clip=0.0):
    """The gradient that one step descends along."""
    config = configured(grad_clip=grad_clip)
    learner, reader = reading_learner(model, causal(), config)
    result = learner.step(batches)
    return reader.gradients[0], result


def random_batch(size, generator, ignored=0.0):
    tokens = torch.randint(260, (size, 17), generator=generator)
    targets = tokens[:, 1:].clone()
    targets[torch.rand(targets.shape, generator=generator) < ignored] = IGNORE
    return Batch(tokens[:, :-1].contiguous(), targets)


@given(st.integers(1, 4), st.integers(1, 3), st.integers(0, 999))
def test_k_micro_batches_give_the_gradient_of_one_batch(count, size, seed):
    torch.manual_seed(seed)
    model = DecoderLM(TINY.model)
    # Padding is spread unevenly, so that a mean over micro-batch means would be wrong.
    batch = random_batch(count * size, torch.Generator().manual_seed(seed), ignored=0.5)
    whole, whole_result = gradients(model, [batch])
    parts, parts_result = gradients(model, batch.split(size))
    for name in whole:
        torch.testing.assert_close(parts[name], whole[name], atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(parts_result.loss, whole_result.loss)


def test_the_loss_is_the_mean_over_the_targets_that_count():
    model = DecoderLM(TINY.model)
    batch = random_batch(3, torch.Generator().manual_seed(0), ignored=0.3)
    _, result = gradients(model, [batch])
    log_p = model(batch.inputs).double().log_softmax(-1)
    rows, columns = torch.nonzero(batch.targets != IGNORE, as_tuple=True)
    expected = -log_p[rows, columns, batch.targets[rows, columns]].mean()
    assert result.loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_clipping_scales_the_gradient_down_to_the_given_norm():
    model = DecoderLM(TINY.model)
    batch = random_batch(2, torch.Generator().manual_seed(0))
    free, result = gradients(model, [batch])
    clipped, _ = gradients(model, [batch], grad_clip=0.5 * result.grad_norm.item())
    norm = torch.stack([g.norm() for g in clipped.values()]).norm().item()
    assert norm == pytest.approx(0.5 * result.grad_norm.item(), rel=1e-4)
    for name in free:
        torch.testing.assert_close(clipped[name], 0.5 * free[name], atol=1e-6, rtol=1e-3)


def test_only_matrices_decay():
    model = DecoderLM(TINY.model)
    [optimizer] = build_optimizers(AdamW.choose(), model, SETTINGS)
    decays = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert all(decays[id(p)] == (0.1 if p.dim() > 1 else 0.0) for p in model.parameters())


@pytest.mark.parametrize("name", Optimizer.registry)
@pytest.mark.parametrize("tied", [True, False])
def test_every_optimizer_updates_every_weight_once(name, tied):
    model = DecoderLM(replace(TINY.model, tied_embeddings=tied, bias=True, positions="learned", qk_norm="head"))
    updated = [
        id(p)
        for o in build_optimizers(Optimizer.choose(name), model, SETTINGS)
        for g in o.param_groups
        for p in g["params"]
    ]
    assert sorted(updated) == sorted(id(p) for p in model.parameters())


@pytest.mark.parametrize(
    ("quintics", "seen", "least", "most"),
    # How small a singular value is lifted, and what all those become.
    [(jordan(5), 0.03, 0.3, 1.3), (polar_express(3), 5e-4, 0.07, 1.94), (polar_express(6), 5e-4, 0.96, 1.04)],
)
@given(st.integers(1, 12), st.integers(1, 12), st.integers(1, 3), st.integers(0, 999))
def test_orthogonalising_keeps_directions_and_makes_their_sizes_alike(
    quintics, seen, least, most, rows, columns, count, seed
):
    matrices = torch.randn(count, rows, columns, generator=torch.Generator().manual_seed(seed))
    u, s, v = torch.linalg.svd(matrices, full_matrices=False)
    sizes = (u.mT @ orthogonalise(matrices, quintics) @ v.mT).diagonal(dim1=1, dim2=2)
    lifted = s / s.norm(dim=1, keepdim=True) > seen
    assert ((sizes > least) & (sizes < most))[lifted].all()


@given(st.integers(1, 8), st.integers(1, 8), st.integers(1, 3), st.integers(0, 999))
def test_rounding_to_bfloat16_makes_nothing_grow(rows, columns, rank, seed):
    generator = torch.Generator().manual_seed(seed)
    matrices = torch.randn(4, rows, rank, generator=generator) @ torch.randn(4, rank, columns, generator=generator)
    for quintics in (jordan(5), polar_express(3), polar_express(5), polar_express(8)):
        orthogonal = orthogonalise(matrices.bfloat16(), quintics).float()
        assert torch.linalg.matrix_norm(orthogonal, 2).max() < 2.2


@given(st.floats(1e-3, 0.9), st.floats(1.0, 2.0), st.lists(st.floats(-0.1, 0.1), min_size=3, max_size=3))
def test_no_other_polynomial_is_nearer_to_one(lowest, highest, others):
    x = torch.linspace(lowest, highest, 4001, dtype=torch.float64)

    def distance(a, b, c):
        return (a * x + b * x**3 + c * x**5 - 1).abs().max().item()

    quintic, most = nearest_to_one(lowest, highest)
    assert distance(*quintic) == pytest.approx(most, rel=1e-4, abs=1e-7)
    assert distance(*(q + other for q, other in zip(quintic, others, strict=True))) >= most * (1 - 1e-4) - 1e-7


def test_adamw_is_torchs_own_bit_for_bit():
    ours, theirs = (nn.Parameter(torch.ones(5, 3)) for _ in range(2))
    optimizers = [kind([p], lr=0.1, fused=True) for kind, p in ((LightAdamW, ours), (torch.optim.AdamW, theirs))]
    for _ in range(4):
        ours.grad = torch.randn(5, 3)
        theirs.grad = ours.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("shape", [(8, 8), (24, 8), (8, 24)])
def test_muon_is_torchs_own_up_to_its_bfloat16(shape):
    ours, theirs = (nn.Parameter(torch.ones(shape)) for _ in range(2))
    muon = Muon([ours], lr=0.1, momentum=0.9, weight_decay=0.2)
    reference = torch.optim.Muon([theirs], lr=0.1, momentum=0.9, weight_decay=0.2)
    for _ in range(4):
        ours.grad = torch.randn(shape)
        theirs.grad = ours.grad.clone()
        muon.step()
        reference.step()
    torch.testing.assert_close(ours, theirs, atol=5e-3, rtol=5e-3)


def test_muon_takes_matrices_of_a_shape_together_as_it_would_alone():
    together = [nn.Parameter(torch.randn(4, 6)) for _ in range(3)]
    alone = [nn.Parameter(p.detach().clone()) for p in together]
    optimizers = [Muon(together, lr=0.1), *(Muon([p], lr=0.1) for p in alone)]
    for p, q in zip(together, alone, strict=True):
        p.grad = torch.randn(4, 6)
        q.grad = p.grad.clone()
    for optimizer in optimizers:
        optimizer.step()
    for p, q in zip(together, alone, strict=True):
        torch.testing.assert_close(p, q)


class TimesInfinity(Causal):
    def loss_sum(self, model, batch):
        return super().loss_sum(model, batch) * math.inf


class TimesNaN(Causal):
    def loss_sum(self, model, batch):
        return super().loss_sum(model, batch) * math.nan


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16", "fp8"])
@pytest.mark.parametrize("broken", [TimesInfinity, TimesNaN])
@pytest.mark.parametrize("first", [True, False])
def test_a_loss_or_gradient_that_is_not_finite_changes_neither_weights_nor_averages(precision, broken, first):
    config = configured(optimizer="muon", momentum=0.9, lr=0.1, schedule="constant", warmup_steps=0)
    model = DecoderLM(config.model)
    learner = Learner(config, model, loader_of(causal()), cpu(precision))
    batch = random_batch(2, torch.Generator().manual_seed(0))

    def step(objective):
        learner.objective = causal(objective)
        return learner.step([batch])

    def averages():
        states = [state for optimizer in learner.optimizers for state in optimizer.state.values()]
        return [tensor.clone() for state in states for tensor in state.values()]

    if not first:
        assert step(Causal).finite
    weights, before = {name: tensor.clone() for name, tensor in model.state_dict().items()}, averages()
    assert not step(broken).finite
    assert_same(weights, model.state_dict())
    before = before or [torch.zeros_like(average) for average in averages()]
    assert all(torch.equal(*pair) for pair in zip(before, averages(), strict=True))
    step(Causal)
    assert all(tensor.isfinite().all() for tensor in [*averages(), *model.state_dict().values()])


@pytest.mark.parametrize("optimizer", Optimizer.registry)
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16", "fp8"])
def test_a_step_asks_the_device_for_no_number(precision, optimizer):
    class NoNumber(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            assert func is not torch.ops.aten._local_scalar_dense.default
            return func(*args, **(kwargs or {}))

    class OnHost(Batch):
        num_targets = 32  # here, counting waits for nothing

        def to(self, device, non_blocking=False):
            return Batch(self.inputs, self.targets)

    config = configured(optimizer=optimizer, dropout=0.1)
    learner = Learner(config, DecoderLM(config.model), loader_of(causal()), cpu(precision))
    random = random_batch(2, torch.Generator().manual_seed(0))
    batch = OnHost(**{field.name: getattr(random, field.name) for field in fields(random)})
    with NoNumber():
        result = learner.step([batch])
        with pytest.raises(AssertionError):
            bool(result.finite)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16", "fp8"])
def test_every_precision_learns_the_text(text, tmp_path, precision):
    trainer = trainer_for(tmp_path / "run", text, configured(precision=precision, steps=60, eval_every=60))
    trainer.train()
    losses = [record["loss"] for record in metrics(tmp_path / "run") if "loss" in record]
    assert losses[-1] < losses[0] - 1.5
    assert {p.dtype for p in trainer.learner.model.parameters()} == {torch.float32}


@settings(max_examples=8)
@given(
    stop_at=st.integers(1, 11),
    dropout=st.sampled_from([0.0, 0.3]),
    grad_accumulation=st.integers(1, 3),
    precision=st.sampled_from(["fp32", "bf16", "fp8"]),
    optimizer=st.sampled_from(sorted(Optimizer.registry)),
)
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(
    text, tmp_path_factory, stop_at, dropout, grad_accumulation, precision, optimizer
):
    folder = tmp_path_factory.mktemp("runs")
    config = configured(dropout=dropout, grad_accumulation=grad_accumulation, precision=precision, optimizer=optimizer)
    whole = trainer_for(folder / "whole", text, config)
    whole.train()

    stop = StopRequest()
    first = trainer_for(folder / "parts", text, config, stop)
    call_after_step(first, stop_at, lambda: setattr(stop, "signal", signal.SIGINT))
    first.train()
    assert first.progress.step == stop_at
    torch.manual_seed(stop_at)  # whatever happened in between
    second = trainer_for(folder / "parts", text, config, resume_at=stop_at)
    second.restore(choose_checkpoint(folder / "parts/checkpoints"))
    second.train()

    assert_same(weights_after(whole), weights_after(second))
    for left, right in zip(whole.learner.optimizers, second.learner.optimizers, strict=True):
        left, right = left.state_dict(), right.state_dict()
        assert left["param_groups"] == right["param_groups"]
        for index in left["state"]:
            assert_same(left["state"][index], right["state"][index])
    assert metrics(folder / "whole") == metrics(folder / "parts")


def test_a_run_may_be_extended(text, tmp_path):
    short, long = configured(steps=6, schedule="constant"), configured(steps=12, schedule="constant")
    trainer_for(tmp_path / "run", text, short).train()
    extended = trainer_for(tmp_path / "run", text, long, resume_at=6)
    extended.restore(choose_checkpoint(tmp_path / "run/checkpoints"))
    extended.train()
    whole = trainer_for(tmp_path / "whole", text, long)
    whole.train()
    assert_same(weights_after(extended), weights_after(whole))


def test_a_changed_learning_rate_holds_after_resuming(text, tmp_path):
    trainer_for(tmp_path / "run", text, configured(steps=6, schedule="constant")).train()
    resumed = trainer_for(tmp_path / "run", text, configured(lr=5e-4, schedule="constant"), resume_at=6)
    resumed.restore(choose_checkpoint(tmp_path / "run/checkpoints"))
    resumed.train()
    assert metrics(tmp_path / "run")[-2]["lr"] == pytest.approx(5e-4)


def test_two_seeds_differ_and_one_seed_does_not(text, tmp_path):
    def trained(name, seed):
        trainer = trainer_for(tmp_path / name, text, configured(seed=seed, steps=3))
        trainer.train()
        return weights_after(trainer)

    assert_same(trained("a", 1), trained("b", 1))
    assert not torch.equal(trained("c", 2)["embedding.table.weight"], trained("d", 3)["embedding.table.weight"])


def test_a_run_stops_early_when_validation_no_longer_improves(text, tmp_path):
    config = configured(lr=1e-12, steps=100, eval_every=1, patience=3, save_every=100, warmup_steps=0)
    trainer = trainer_for(tmp_path / "run", text, config)
    losses = iter([3.0, 2.0, 2.5, 2.1, 2.2, 1.0])
    trainer._validate = lambda: trainer._note(validation_of(next(losses)))
    trainer.train()
    assert trainer.stopped_early
    assert (trainer.progress.step, trainer.progress.best_step) == (5, 2)
    assert (tmp_path / "run/checkpoints/best").resolve().name == "step-000002"
    assert (tmp_path / "run/checkpoints/latest").resolve().name == "step-000005"


def test_the_last_k_checkpoints_and_the_best_one_are_kept(text, tmp_path):
    trainer = trainer_for(tmp_path / "run", text, configured(save_every=1, keep_last=3, eval_every=5))
    trainer.train()
    names = sorted(path.name for path in (tmp_path / "run/checkpoints").glob("step-*"))
    best = (tmp_path / "run/checkpoints/best").resolve().name
    assert names == sorted({best, "step-000010", "step-000011", "step-000012"})


def test_training_that_stays_non_finite_ends_with_the_weights_it_had(text, tmp_path):
    trainer = trainer_for(tmp_path / "run", text, configured(steps=100, eval_every=1000, save_every=1000))
    before = weights_after(trainer)
    trainer.learner.objective.loss_sum = lambda model, batch: model(batch.inputs).sum() * math.nan
    with pytest.raises(NonFiniteTraining, match=r"begin anew with lower rates, such as --lr 0\.001$"):
        trainer.train()
    assert_same(before, weights_after(trainer))
    assert trainer.progress.step == MOST_STEPS_WITHOUT_UPDATE
    assert all(record["loss"] is None for record in metrics(tmp_path / "run"))
    assert not list((tmp_path / "run/checkpoints").iterdir())


def broken_from(trainer, step):
    """The loss is NaN in all steps after `step`."""
    loss_sum = trainer.learner.objective.loss_sum
    trainer.learner.objective.loss_sum = lambda model, batch: (
        loss_sum(model, batch) * (math.nan if trainer.progress.step >= step else 1)
    )


def checkpoint_steps(path):
    return [checkpoint_step(checkpoint) for checkpoint in checkpoints_in(path / "checkpoints")]


def test_the_last_checkpoint_from_before_the_first_skipped_step_is_kept(text, tmp_path):
    trainer = trainer_for(tmp_path / "run", text, configured(steps=100, save_every=1, eval_every=100))
    broken_from(trainer, 7)
    with pytest.raises(NonFiniteTraining):
        trainer.train()
    # Step 8 was the first to be skipped; what came of step 7 may be why, what came of step 6 is not.
    assert checkpoint_steps(tmp_path / "run") == [6, 25, 26]


def test_a_run_that_has_recovered_keeps_no_more_checkpoints_than_others(text, tmp_path):
    trainer = trainer_for(tmp_path / "run", text, configured(steps=12, save_every=1, eval_every=6))
    loss_sum = trainer.learner.objective.loss_sum
    trainer.learner.objective.loss_sum = lambda model, batch: (
        loss_sum(model, batch) * (math.inf if trainer.progress.step == 3 else 1)
    )
    trainer.train()
    assert trainer.progress.best_step == 12
    assert checkpoint_steps(tmp_path / "run") == [11, 12]


def test_no_checkpoint_is_offered_whose_weights_are_lost(text, tmp_path):
    trainer = trainer_for(tmp_path / "run", text, configured(steps=100, save_every=3, eval_every=100))
    table = trainer.learner.model.embedding.table.weight
    call_after_step(trainer, 9, lambda: table.data.mul_(1e38))
    with pytest.raises(NonFiniteTraining, match=r"--checkpoint step-000006 --lr 0\.001$"):
        trainer.train()
    assert checkpoint_steps(tmp_path / "run") == [6, 24, 27]


@pytest.mark.parametrize("optimizer", Optimizer.registry)
def test_weights_that_an_update_made_infinite_are_not_saved(text, tmp_path, optimizer):
    config = configured(optimizer=optimizer, tied_embeddings=False, steps=50, save_every=4, eval_every=25)
    trainer = trainer_for(tmp_path / "run", text, config)
    of_a_token_that_the_text_has_not = trainer.learner.model.embedding.table.weight.data[-1]
    call_after_step(trainer, 6, lambda: of_a_token_that_the_text_has_not.fill_(math.nan))
    with pytest.raises(NonFiniteTraining, match=r"after step 8 .* not saved; .* --checkpoint step-000004 --lr 0\.001$"):
        trainer.train()
    assert checkpoint_steps(tmp_path / "run") == [4]
    assert (tmp_path / "run/checkpoints/latest").resolve().name == "step-000004"


def test_large_weights_are_finite_though_their_norm_is_not():
    large = torch.full((4,), 3e38)
    assert are_finite([large, torch.ones(2)])
    for number in (math.nan, math.inf, -math.inf):
        assert not are_finite([large, torch.tensor([1.0, number])])


def test_what_is_not_finite_is_null_in_the_metrics(tmp_path):
    log = RunFiles(tmp_path, resume_at=0)
    log.record({"step": 1, "loss": math.nan, "probe/gradient-norm": -math.inf, "accuracy": None, "tokens": 5})
    log.close()

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    assert json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=refuse) == {
        **{"step": 1, "loss": None, "probe/gradient-norm": None, "accuracy": None, "tokens": 5}
    }


def stopped_in_its_first_validation(path, text, config):
    with StopRequest() as stop:
        trainer = trainer_for(path, text, config, stop)
        batches = trainer.learner.loader.validation_batches

        def interrupted():
            signal.raise_signal(signal.SIGTERM)
            return batches()

        trainer.learner.loader.validation_batches = interrupted
        trainer.train()
        assert stop.exit_code == 143
    assert trainer.validation is None


def test_a_signal_during_validation_does_not_wait_for_it_and_loses_nothing(text, tmp_path):
    config = configured(eval_every=4, save_every=100)
    whole = trainer_for(tmp_path / "whole", text, config)
    whole.train()
    stopped_in_its_first_validation(tmp_path / "parts", text, config)
    second = trainer_for(tmp_path / "parts", text, config, resume_at=4)
    second.restore(choose_checkpoint(tmp_path / "parts/checkpoints"))
    second.train()
    assert_same(weights_after(whole), weights_after(second))
    assert metrics(tmp_path / "whole") == metrics(tmp_path / "parts")


def test_the_best_checkpoint_is_kept_though_a_signal_came_in_its_validation(text, tmp_path):
    config = configured(eval_every=4, save_every=100, keep_last=1)
    stopped_in_its_first_validation(tmp_path / "run", text, config)
    second = trainer_for(tmp_path / "run", text, config, resume_at=4)
    second.restore(choose_checkpoint(tmp_path / "run/checkpoints"))
    second.train(until=5)
    assert second.progress.best_step == 4
    assert choose_checkpoint(tmp_path / "run/checkpoints", "best").name == "step-000004"


def test_a_run_goes_on_from_the_checkpoint_that_was_chosen_for_it(text, tmp_path):
    config = configured(save_every=2, steps=6, keep_last=3)
    trainer_for(tmp_path / "run", text, config).train()
    second = trainer_for(tmp_path / "run", text, config, resume_at=4)
    second.restore(choose_checkpoint(tmp_path / "run/checkpoints", "step-000004"))
    second.train(until=4)  # stopped at once
    assert choose_checkpoint(tmp_path / "run/checkpoints").name == "step-000004"
