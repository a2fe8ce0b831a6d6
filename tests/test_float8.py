"""Products in 8 bits: what is rounded, by how much, and where they are left out."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from minitransformer.errors import UserError
from minitransformer.models.model import build_model
from minitransformer.training.float8 import BACKWARDS, FORWARDS, Float8Products, linear, quantised
from minitransformer.training.machine import choose_machine
from minitransformer.training.precision import FP8
from tests.runs_for_tests import TINY

SIXTEENS = st.sampled_from([16, 32, 48])


class Products(TorchDispatchMode):
    """Counts the products in 8 bits."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._scaled_mm.default
        return func(*args, **(kwargs or {}))


def rounded(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    eighths, scale = quantised(x, dtype)
    return eighths.float() * scale


@given(SIXTEENS, SIXTEENS, SIXTEENS, st.booleans(), st.floats(1e-6, 1e6), st.integers(0, 999))
def test_a_product_and_its_gradients_are_those_of_the_rounded_factors(rows, features, outputs, bias, size, seed):
    generator = torch.Generator().manual_seed(seed)
    x, weight, b, arriving = (
        torch.randn(shape, generator=generator)
        for shape in ((2, rows, features), (outputs, features), (outputs,), (2, rows, outputs))
    )
    x, arriving = (size * x).requires_grad_(), (arriving / size).bfloat16()
    weight.requires_grad_()
    product = linear(x, weight, b if bias else None)
    assert product.dtype == torch.bfloat16
    product.backward(arriving)

    x8, weight8 = rounded(x.detach().flatten(0, 1), FORWARDS), rounded(weight.detach(), FORWARDS)
    arriving8 = rounded(arriving.flatten(0, 1), BACKWARDS)
    expected = (x8 @ weight8.t()).view(2, rows, outputs).bfloat16()
    expected = expected + b.bfloat16() if bias else expected
    torch.testing.assert_close(product, expected, rtol=2e-2, atol=1e-3 * size)
    torch.testing.assert_close(x.grad.flatten(0, 1), arriving8 @ weight8, rtol=1e-4, atol=1e-4 / size)
    torch.testing.assert_close(weight.grad, arriving8.t() @ x8, rtol=1e-4, atol=1e-3)


@given(st.sampled_from([(FORWARDS, 2**-4), (BACKWARDS, 2**-3)]), st.floats(-20, 20), st.integers(0, 999))
def test_the_largest_element_is_exact_and_others_lose_half_a_bit_of_what_is_kept(format, exponent, seed):
    dtype, most = format
    x = torch.randn(16, 16, generator=torch.Generator().manual_seed(seed)) * 10**exponent
    largest = x.abs().amax()
    error = (rounded(x, dtype) - x).abs()
    assert error[x.abs() == largest] <= 1e-6 * largest
    assert (error <= most * x.abs() + 1e-4 * largest).all()  # what is far smaller than the largest has fewer bits


def test_zeros_and_numbers_that_are_not_finite_stay_what_they_are():
    assert not rounded(torch.zeros(16, 16), FORWARDS).any()
    for bad in (torch.inf, torch.nan):
        x = torch.ones(16, 16)
        x[3, 4] = bad
        assert not rounded(x, FORWARDS)[3, 4].isfinite()


def test_factors_are_stored_by_rows_whatever_they_were():
    once = torch.randn(16, 1)
    for x in (torch.randn(16, 32).t(), once.expand(16, 32), torch.ones(()).expand(16, 32)):
        assert quantised(x, BACKWARDS)[0].is_contiguous()


@pytest.mark.parametrize("sizes", [(15, 16, 16), (16, 17, 16), (16, 16, 18)])
def test_sizes_that_the_kernels_lack_are_multiplied_as_ever(sizes):
    rows, features, outputs = sizes
    x, weight = torch.randn(rows, features), torch.randn(outputs, features)
    with Float8Products():
        assert torch.equal(F.linear(x, weight), x @ weight.t())


def test_all_linear_maps_of_a_model_are_multiplied_in_8_bits_there_and_back():
    model = build_model(TINY.model)
    tokens = torch.randint(TINY.model.vocab_size, (2, 16))
    plain = model(tokens)
    with Products() as products:
        with FP8(torch.device("cpu")).autocast():
            logits = model(tokens)
        forwards = products.count
        logits.float().square().mean().backward()
    layers = TINY.model.num_layers
    # queries, keys and values together, the output, and the two of the feed-forward network; the head has no sixteens
    assert (forwards, products.count) == (4 * layers, 12 * layers)
    assert 0 < (logits - plain).abs().max() < 0.1 * plain.std()


COMPILED = """
import torch
from minitransformer.models.config import ModelConfig
from minitransformer.models.model import build_model
from minitransformer.training.precision import FP8
sizes = {"d_model": 32, "num_layers": 2, "num_heads": 2, "context_length": 16, "vocab_size": 32}
model = build_model(ModelConfig(init="xavier", qk_norm="head", **sizes))
tokens = torch.randint(32, (2, 16))
compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
with FP8(torch.device("cpu")).autocast():
    torch.testing.assert_close(compiled(tokens), model(tokens))
with torch.profiler.profile() as profile, FP8(torch.device("cpu")).autocast():
    compiled(tokens).float().logsumexp(-1).sum().backward()
print(sum(event.count for event in profile.key_averages() if event.key == "aten::_scaled_mm"))
"""


@pytest.mark.slow
def test_a_compiled_model_multiplies_in_8_bits_in_one_graph():
    # In a process of its own: the compiler cannot read the checks that the tests put around signatures.
    done = subprocess.run([sys.executable, "-c", COMPILED], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == [str(3 * (2 * 4 + 1))]


def test_a_device_without_such_products_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert FP8.why_not(torch.device("cuda")) == "it has no matrix units for 8 bits"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert FP8.why_not(torch.device("cuda")) is None
    monkeypatch.setattr(FP8, "why_not", lambda device: "too old")
    with pytest.raises(UserError, match=r"'fp8' is impossible on cpu \(too old\): choose bf16"):
        choose_machine("cpu", "fp8", "off", run_flops=1e9)
