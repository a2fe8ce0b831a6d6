"""Stored weights: what fewer bytes cost in exactness, the kernel that multiplies them, and what happens without it."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from minitransformer.architecture.embeddings import HeadAround
from minitransformer.errors import UserError
from minitransformer.generation.config import SamplingConfig
from minitransformer.generation.decode import generate
from minitransformer.generation.fast import row_kernel, rows
from minitransformer.generation.fast.rows import KernelLinear, project_rows, with_row_kernel
from minitransformer.generation.fast.steps import recorded_steps
from minitransformer.generation.logits import CachedLogits
from minitransformer.generation.weights import BFloat16, Float32, Int4, Int8, StoredWeights
from minitransformer.models.decoder import DecoderLM
from minitransformer.models.int4 import dequantise_groups

MakeDecoder = Callable[..., DecoderLM]
FEWER_BYTES = [BFloat16, Int8, Int4]
EVERY = [Float32, *FEWER_BYTES]
sizes = st.integers(1, 90)


@pytest.fixture(scope="module")
def compiled() -> None:
    """Skips where no kernel can be compiled."""
    try:
        row_kernel.prepare(lambda line: None)
    except row_kernel.CannotCompile as reason:
        pytest.skip(str(reason))


@pytest.fixture
def with_kernel(compiled: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small models use the kernel too."""
    monkeypatch.setattr(rows, "FEW_WEIGHTS", 0)


def restored(kind: type[StoredWeights], weight: torch.Tensor) -> torch.Tensor:
    """The matrix that the stored one stands for."""
    stored, scale = kind.store(weight)
    if kind is Int4:
        assert scale is not None
        return dequantise_groups(stored, scale, weight.size(1))
    wide = stored.to(weight.dtype)
    return wide if scale is None else wide * scale[:, None]


def stored_map(kind: type[StoredWeights], weight: torch.Tensor, bias: torch.Tensor | None = None) -> StoredWeights:
    linear = nn.Linear(weight.size(1), weight.size(0), bias=bias is not None)
    linear.load_state_dict({"weight": weight} if bias is None else {"weight": weight, "bias": bias})
    return kind(linear)


# What is stored


@given(sizes, sizes, st.floats(1e-6, 1e6))
def test_bf16_changes_a_weight_by_a_share_of_2_to_the_minus_8(out: int, features: int, size: float) -> None:
    weight = torch.randn(out, features, dtype=torch.float64) * size
    assert ((restored(BFloat16, weight) - weight).abs() <= weight.abs() * 2**-8).all()


@given(sizes, sizes, st.floats(1e-6, 1e6))
def test_int8_changes_a_weight_by_half_of_a_127th_of_the_largest_of_its_row(
    out: int, features: int, size: float
) -> None:
    weight = torch.randn(out, features, dtype=torch.float64) * size
    largest = weight.abs().amax(-1, keepdim=True)
    assert ((restored(Int8, weight) - weight).abs() <= largest / 254 * (1 + 1e-6)).all()
    assert (Int8.store(weight)[0].abs().amax(-1) == 127).all()


@given(sizes, sizes, st.floats(1e-6, 1e6))
def test_int4_changes_a_weight_by_half_of_a_7th_of_the_largest_of_its_group(
    out: int, features: int, size: float
) -> None:
    weight = torch.randn(out, features, dtype=torch.float64) * size
    error = (restored(Int4, weight) - weight).abs()
    for group, errors in zip(weight.split(64, dim=1), error.split(64, dim=1), strict=True):
        assert (errors <= group.abs().amax(-1, keepdim=True) / 14 * (1 + 1e-6)).all()


def test_a_row_of_zeros_stays_one() -> None:
    assert (restored(Int8, torch.zeros(2, 5)) == 0).all()


# The products


@pytest.mark.parametrize("kind", EVERY)
@given(out=sizes, features=sizes, rows=st.integers(0, 8) | st.integers(0, 128), bias=st.booleans())
def test_the_kernel_multiplies_with_what_is_stored(
    compiled: None, kind: type[StoredWeights], out: int, features: int, rows: int, bias: bool
) -> None:
    linear = nn.Linear(features, out, bias=bias)
    x = torch.randn(2, rows, features)[:, ::2]  # whose rows do not follow each other in memory
    with torch.no_grad():
        expected = x @ restored(kind, linear.weight).t() + (linear.bias if bias else 0)
        torch.testing.assert_close(KernelLinear(kind(linear))(x), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", FEWER_BYTES)
@given(out=sizes, features=st.sampled_from([5, 64, 100, 128]), rows=st.sampled_from([1, 3, 65]))
def test_torchs_kernels_multiply_with_what_is_stored_but_for_rounded_rows(
    kind: type[StoredWeights], out: int, features: int, rows: int
) -> None:
    weight, x = torch.randn(out, features), torch.randn(rows, features)
    exact = x.double() @ restored(kind, weight).double().t()
    # A share of 2^-8 of each product and of the sum, at most, for rounding the row, the scale and the result.
    most = 3 * 2**-8 * (x.abs().double() @ restored(kind, weight).double().abs().t()) + 1e-5
    assert ((stored_map(kind, weight).product(x) - exact).abs() <= most).all()


@pytest.mark.parametrize("kind", [Int8, Int4])
@given(out=sizes, features=sizes | st.just(200), rows=st.integers(1, 8), outlier=st.floats(1, 1e6))
def test_with_integers_the_kernel_changes_a_feature_by_2_to_the_minus_16_of_the_largest_of_its_64(
    compiled: None, kind: type[StoredWeights], out: int, features: int, rows: int, outlier: float
) -> None:
    weight, x = torch.randn(out, features), torch.randn(rows, features)
    x[:, features // 2] *= outlier
    largest = torch.cat([block.abs().amax(-1, keepdim=True).expand_as(block) for block in x.split(64, dim=1)], dim=1)
    exact = restored(kind, weight).double()
    most = (2**-16 * largest + 2**-20 * x.abs()).double() @ exact.abs().t()
    product = KernelLinear(stored_map(kind, weight))(x)
    assert ((product - x.double() @ exact.t()).abs() <= most + 1e-30).all()


@pytest.mark.parametrize("kind", EVERY)
@given(outs=st.tuples(sizes, sizes, sizes), features=sizes, rows=st.integers(0, 8), bias=st.booleans())
def test_several_maps_by_one_call_give_what_each_gives(
    compiled: None, kind: type[StoredWeights], outs: tuple[int, ...], features: int, rows: int, bias: bool
) -> None:
    maps = [KernelLinear(kind(nn.Linear(features, out, bias=bias))) for out in outs]
    x = torch.randn(2, rows, features)[:, ::2]
    with torch.no_grad(), mock.patch.object(KernelLinear, "forward", side_effect=AssertionError):
        together = project_rows(x, *maps)
    with torch.no_grad():
        assert all(torch.equal(one, linear(x)) for one, linear in zip(together, maps, strict=True))


def test_maps_that_are_not_alike_are_multiplied_one_by_one(compiled: None) -> None:
    linear = nn.Linear(70, 5)
    fast, hooked = [KernelLinear(Int8(linear)) for _ in range(2)]
    called: list[nn.Module] = []
    hooked.register_forward_hook(lambda module, inputs, output: called.append(module))
    others = [hooked, KernelLinear(Int4(linear)), KernelLinear(Int8(nn.Linear(70, 5, bias=False))), linear]
    for x in (torch.randn(1, 70), torch.randn(99, 70)):
        for other in others:
            for one, part in zip(project_rows(x, fast, other), (fast, other), strict=True):
                assert torch.equal(one, part(x))
    assert len(called) == 4  # by us and by the call, for each x


@pytest.mark.parametrize("kind", [Int8, Int4])
def test_features_that_are_not_finite_do_not_become_numbers(compiled: None, kind: type[StoredWeights]) -> None:
    x = torch.zeros(3, 70)
    x[0, 3], x[1, 69] = torch.nan, -torch.inf
    product = KernelLinear(stored_map(kind, torch.ones(2, 70)))(x)
    assert product.isfinite().tolist() == [[False, False], [False, False], [True, True]]


@pytest.mark.parametrize("kind", EVERY)
def test_the_kernel_gives_the_same_for_any_number_of_threads(compiled: None, kind: type[StoredWeights]) -> None:
    maps, x = [KernelLinear(stored_map(kind, torch.randn(out, 150))) for out in (700, 300, 500)], torch.randn(7, 150)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(torch.cat(list(project_rows(x, *maps)), dim=1))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(result, results[0]) for result in results)


def test_the_kernel_leaves_the_arithmetic_of_the_process_as_it_was(compiled: None) -> None:
    assert torch.tensor(1e-310, dtype=torch.float64) * 1 > 0, "subnormal numbers are 0"


def test_an_impossible_product_is_refused_by_the_kernel(compiled: None) -> None:
    product = torch.ops.minitransformer.row_product
    for x, weight in ((torch.ones(1, 3), torch.ones(2, 4)), (torch.ones(1, 4).double(), torch.ones(2, 4))):
        with pytest.raises(RuntimeError):
            product(x, weight, None, None)
    x, eights, fours = torch.ones(1, 128), torch.ones(2, 128, dtype=torch.int8), torch.ones(2, 64, dtype=torch.uint8)
    for weight, scale in ((eights, None), (eights, torch.ones(3)), (fours, torch.ones(2)), (fours, torch.ones(2, 3))):
        with pytest.raises(RuntimeError):
            product(x, weight, scale, None)


# Models


MODELS = [
    {},
    {"bias": True, "tied_embeddings": False, "feedforward": "gelu"},
    {"logit_scale": 0.5, "logit_softcap": 3.0, "num_kv_heads": 2},
    {"head": "transformed", "head_bias": True},
    {"embedding_dim": 6},
    {"num_experts": 3},
]


@pytest.mark.parametrize("choices", MODELS, ids=str)
@pytest.mark.parametrize(("kind", "tolerance"), [(BFloat16, 0.01), (Int8, 0.05)])
def test_logits_stay_close_to_those_of_fp32(
    tiny_decoder: MakeDecoder,
    with_kernel: None,
    choices: dict[str, object],
    kind: type[StoredWeights],
    tolerance: float,
) -> None:
    model = tiny_decoder(d_model=32, **choices).float()
    for name, weight in model.named_parameters():
        if weight.dim() == 2 and "embedding" not in name:
            torch.nn.init.normal_(weight, std=weight.size(1) ** -0.5)
    tokens = torch.randint(11, (2, 12))
    with torch.no_grad():
        expected = model(tokens)
        difference = with_row_kernel(kind.applied(model))(tokens) - expected
    assert 0 < difference.square().mean().sqrt() < tolerance * expected.std()


@pytest.mark.parametrize("kind", EVERY)
@pytest.mark.parametrize("choices", MODELS, ids=str)
def test_cached_decoding_is_uncached_decoding_with_stored_weights(
    tiny_decoder: MakeDecoder, with_kernel: None, choices: dict[str, object], kind: type[StoredWeights]
) -> None:
    model = with_row_kernel(kind.applied(tiny_decoder(context_length=8, **choices).float()))
    tokens = torch.randint(11, (1, 8))
    with torch.no_grad():
        next_logits, expected = CachedLogits(model, 1, 8, recorded_steps), model(tokens)
        for length in range(3, 9):
            torch.testing.assert_close(next_logits(tokens[:, :length]), expected[:, length - 1], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("choices", MODELS, ids=str)
def test_fp32_is_the_model_up_to_rounding(
    tiny_decoder: MakeDecoder, with_kernel: None, choices: dict[str, object]
) -> None:
    model = tiny_decoder(d_model=32, **choices).float()
    stored = with_row_kernel(model)
    assert any(isinstance(module, KernelLinear) for module in stored.modules())
    for batch in (1, 2, 9):
        tokens = torch.randint(11, (batch, 3))
        with torch.no_grad():
            torch.testing.assert_close(stored(tokens), model(tokens), rtol=1e-5, atol=1e-5)


def test_fp32_weights_are_not_copied(tiny_decoder: MakeDecoder, with_kernel: None) -> None:
    model = tiny_decoder().float()
    assert with_row_kernel(model).head.product.weights.stored.data_ptr() == model.head.weight.data_ptr()


def test_in_fp32_a_small_model_is_left_as_it_is(tiny_decoder: MakeDecoder) -> None:
    model = tiny_decoder().float()
    assert with_row_kernel(Float32.applied(model), pytest.fail) is model


@pytest.mark.parametrize("kind", FEWER_BYTES)
def test_every_linear_map_is_stored_and_the_model_stays_as_it_was(
    tiny_decoder: MakeDecoder, kind: type[StoredWeights]
) -> None:
    model = tiny_decoder(tied_embeddings=True)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    stored = kind.applied(model)
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    assert linear
    assert not any(isinstance(module, nn.Linear) for module in stored.modules())
    assert sum(isinstance(module, kind) for module in stored.modules()) == len(linear)
    assert isinstance(stored.head, HeadAround)
    assert stored.embedding.table.weight.data_ptr() == model.embedding.table.weight.data_ptr()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(isinstance(module, StoredWeights) for module in model.modules())


@pytest.mark.parametrize("kind", FEWER_BYTES)
def test_stored_weights_are_saved_and_loaded_like_any(tiny_decoder: MakeDecoder, kind: type[StoredWeights]) -> None:
    stored = kind.applied(tiny_decoder(d_model=32, bias=True).float())
    other = kind.applied(tiny_decoder(d_model=32, bias=True, num_kv_heads=None).float())
    tokens = torch.randint(11, (1, 5))
    with torch.no_grad():
        for weight in other.parameters():
            weight.zero_()
        assert not torch.equal(other(tokens), stored(tokens))
        other.load_state_dict(stored.state_dict())
        assert torch.equal(other(tokens), stored(tokens))
    assert {weight.dtype for name, weight in stored.state_dict().items() if name.endswith("stored")} == {
        {BFloat16: torch.bfloat16, Int8: torch.int8, Int4: torch.uint8}[kind]
    }


def test_an_unknown_name_is_refused_with_the_known_ones() -> None:
    with pytest.raises(UserError, match=r"int9.: did you mean .int8.\? known are fp32, bf16, int8, int4"):
        StoredWeights.named("int9")


# The compiler


@pytest.fixture
def nothing_compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(rows, "FEW_WEIGHTS", 0)
    monkeypatch.delenv("CXX", raising=False)
    return tmp_path


def test_without_a_compiler_torch_multiplies_and_one_line_says_so(
    tiny_decoder: MakeDecoder, nothing_compiled: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "")
    said: list[str] = []
    small = tiny_decoder().float()
    assert with_row_kernel(small, pytest.fail) is small
    model = with_row_kernel(Int8.applied(small), said.append)
    assert said == ["int8 weights are multiplied by torch's own kernels, as there is no C++ compiler, g++ or clang++"]
    assert len(list(generate(model, [1], SamplingConfig(max_new_tokens=5, seed=0)))) == 5


def test_a_compiler_that_fails_is_no_compiler(
    tiny_decoder: MakeDecoder, nothing_compiled: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = nothing_compiled / "c++"
    broken.write_text("#!/bin/sh\necho 'error: no such header' >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    said: list[str] = []
    with_row_kernel(BFloat16.applied(tiny_decoder().float()), said.append)
    assert said[-1].endswith(f"as {broken} cannot compile it (error: no such header)")
    assert not list(nothing_compiled.rglob("*.so"))


def test_a_cache_that_cannot_be_written_is_said(
    tiny_decoder: MakeDecoder, nothing_compiled: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", os.devnull)
    monkeypatch.setattr(row_kernel, "find_compiler", lambda: "c++")
    said: list[str] = []
    with_row_kernel(BFloat16.applied(tiny_decoder().float()), said.append)
    assert "cannot be written (Not a directory)" in said[-1]


def test_small_models_compile_nothing(tiny_decoder: MakeDecoder, tmp_path: Path) -> None:
    said: list[str] = []
    with_row_kernel(Int8.applied(tiny_decoder().float()), said.append)
    assert said == [
        "int8 weights are multiplied by torch's own kernels, as compiling another does not pay for so small a model"
    ]
