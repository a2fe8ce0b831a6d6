"""A training step: the gradient that it descends along, and what it does with numbers that are not finite."""

import math
from dataclasses import fields

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from minitransformer.models.model import build_model
from minitransformer.text.batches import IGNORE, Batch
from minitransformer.text.tokenizers import Bytes
from minitransformer.training.learner import Learner
from minitransformer.training.objectives import Causal
from minitransformer.training.optimizers import Optimizer
from tests.runs_for_tests import TINY, assert_same_weights, configured, cpu, loader_of, reading_learner

pytestmark = pytest.mark.unchecked_shapes


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
    model = build_model(TINY.model)
    # Padding is spread unevenly, so that a mean over micro-batch means would be wrong.
    batch = random_batch(count * size, torch.Generator().manual_seed(seed), ignored=0.5)
    whole, whole_result = gradients(model, [batch])
    parts, parts_result = gradients(model, batch.split(size))
    for name in whole:
        torch.testing.assert_close(parts[name], whole[name], atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(parts_result.loss, whole_result.loss)


def test_the_loss_is_the_mean_over_the_targets_that_count():
    model = build_model(TINY.model)
    batch = random_batch(3, torch.Generator().manual_seed(0), ignored=0.3)
    _, result = gradients(model, [batch])
    log_p = model(batch.inputs).double().log_softmax(-1)
    rows, columns = torch.nonzero(batch.targets != IGNORE, as_tuple=True)
    expected = -log_p[rows, columns, batch.targets[rows, columns]].mean()
    assert result.loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_clipping_scales_the_gradient_down_to_the_given_norm():
    model = build_model(TINY.model)
    batch = random_batch(2, torch.Generator().manual_seed(0))
    free, result = gradients(model, [batch])
    clipped, _ = gradients(model, [batch], grad_clip=0.5 * result.grad_norm.item())
    norm = torch.stack([g.norm() for g in clipped.values()]).norm().item()
    assert norm == pytest.approx(0.5 * result.grad_norm.item(), rel=1e-4)
    for name in free:
        torch.testing.assert_close(clipped[name], 0.5 * free[name], atol=1e-6, rtol=1e-3)


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
    model = build_model(config.model)
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
    assert_same_weights(weights, model.state_dict())
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
    learner = Learner(config, build_model(config.model), loader_of(causal()), cpu(precision))
    random = random_batch(2, torch.Generator().manual_seed(0))
    batch = OnHost(**{field.name: getattr(random, field.name) for field in fields(random)})
    with NoNumber():
        result = learner.step([batch])
        with pytest.raises(AssertionError):
            bool(result.finite)
