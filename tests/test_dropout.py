"""Dropout: the stated share, the mean and the variance that it has to keep, and the way back."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from minitransformer.architecture.dropout import LEVELS, Dropout, apply_dropout

COUNT = 200_000


@pytest.mark.parametrize("p", [0.001, 0.1, 0.2, 0.5, 0.9])
def test_the_stated_share_is_dropped_and_mean_and_variance_are_those_of_dropout(p: float) -> None:
    torch.manual_seed(0)
    thinned = apply_dropout(torch.ones(COUNT), p).double()
    sigma = math.sqrt(p * (1 - p) / COUNT)
    assert thinned.eq(0).double().mean().item() == pytest.approx(p, abs=5 * sigma)
    assert thinned.mean().item() == pytest.approx(1, abs=5 * sigma / (1 - p))
    assert thinned.var().item() == pytest.approx(p / (1 - p), rel=0.1)


@given(p=st.floats(0, 1))
def test_what_is_kept_is_scaled_so_that_the_mean_is_exact(p: float) -> None:
    """The share that random bits really keep, times the scale, is 1, and it is as near to 1 - p as bits allow."""
    kept = {value for value in apply_dropout(torch.ones(64, dtype=torch.float64), p).tolist() if value}
    assert len(kept) <= 1
    for scale in kept:
        assert abs(1 / scale - (1 - p)) <= 0.5 / LEVELS + 1e-12
        assert (LEVELS / scale) == pytest.approx(round(LEVELS / scale), abs=1e-6)


def test_nothing_is_dropped_at_0_and_all_at_1() -> None:
    x = torch.randn(50)
    assert apply_dropout(x, 0.0) is x
    assert not apply_dropout(x, 1.0).any()


def test_elements_are_dropped_independently_of_their_neighbours() -> None:
    torch.manual_seed(0)
    dropped = apply_dropout(torch.ones(COUNT), 0.3).eq(0).double() - 0.3
    for distance in (1, 2, 3, 4, 8, 64, 1024):  # four neighbours share a number of 64 bits
        covariance = (dropped[distance:] * dropped[:-distance]).mean().item()
        assert abs(covariance) < 5 * 0.21 / math.sqrt(COUNT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_gradients_go_where_values_went(dtype: torch.dtype) -> None:
    x = torch.randn(7, 9, 5).to(dtype).requires_grad_()
    thinned = apply_dropout(x, 0.4)
    assert thinned.dtype == dtype
    upstream = torch.randn(7, 9, 5).to(dtype)
    (gradient,) = torch.autograd.grad(thinned, x, upstream)
    torch.testing.assert_close(gradient, torch.where(thinned == 0, 0.0, upstream / 0.6), rtol=1e-2, atol=1e-3)


def test_the_seed_decides_what_is_dropped() -> None:
    first, second, other = (apply_dropout(torch.ones(99), 0.5) for _ in map(torch.manual_seed, (3, 3, 4)))
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


def test_in_evaluation_the_module_does_nothing_and_other_devices_have_torchs_own() -> None:
    x, module = torch.randn(5, 5), Dropout(0.5)
    assert module.eval()(x) is x
    assert not torch.equal(module.train()(x), x)
    assert apply_dropout(x.to("meta"), 0.5).shape == F.dropout(x.to("meta"), 0.5).shape


COMPILED = """
import torch
from functools import partial
from minitransformer.models.config import ModelConfig
from minitransformer.models.model import build_model
from minitransformer.training.objectives.cross_entropy import summed_loss

sizes = {"d_model": 16, "num_layers": 2, "num_heads": 2, "context_length": 160, "vocab_size": 9}
model = build_model(ModelConfig(dropout=0.3, **sizes))
tokens, targets = torch.randint(9, (2, 2, 160))

def step(forward):
    torch.manual_seed(5)
    model.zero_grad()
    loss = forward(tokens, readout=partial(summed_loss, targets=targets))
    loss.backward()
    return [loss.detach(), *(parameter.grad for parameter in model.parameters())]

compiled = torch.compile(model, backend="aot_eager_decomp_partition", fullgraph=True)
torch.testing.assert_close(step(compiled), step(model))
torch.testing.assert_close(step(compiled), step(compiled), rtol=0, atol=0)
"""


@pytest.mark.slow
def test_a_compiled_step_drops_what_the_eager_one_drops_in_one_graph() -> None:
    # In a process of its own: the compiler cannot read the checks that the tests put around signatures.
    done = subprocess.run([sys.executable, "-c", COMPILED], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
