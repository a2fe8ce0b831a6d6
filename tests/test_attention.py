"""Attention: each kernel against the equation written out as a loop, and multi-head attention against its parts."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from minitransformer.architecture import kernels
from minitransformer.architecture.attention import (
    QK_NORMS,
    AttentionKernel,
    AttentionView,
    EachHead,
    MultiHeadAttention,
    PerHead,
    attention_weights,
    repeat_heads,
    scaled_dot_product_attention,
)
from minitransformer.architecture.kernels import KERNELS, blockwise_attention, fastest_attention, fused_attention
from minitransformer.architecture.norms import RMSNorm
from minitransformer.errors import UserError
from tests.conftest import unchecked

every_kernel = pytest.mark.parametrize("kernel", KERNELS.values(), ids=KERNELS)


@dataclass
class Case:
    """The arguments of one attention call, in float64."""

    q: Tensor
    k: Tensor
    v: Tensor
    view: dict[str, Any]

    @property
    def inputs(self) -> list[Tensor]:
        """What gradients flow to."""
        return [x for x in (self.q, self.k, self.v, self.view["bias"]) if x is not None]

    def gradients(self, output: Tensor) -> list[Tensor]:
        weights = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output)
        return list(
            torch.autograd.grad((output * weights).sum(), self.inputs, allow_unused=True, materialize_grads=True)
        )

    def sees(self, b: int, h: int, i: int) -> list[int]:
        """The keys that query i may attend to."""
        keys, queries = self.k.size(2), self.q.size(2)
        mask = self.view["mask"]
        mask = torch.ones(1, 1, 1, keys).bool() if mask is None else mask
        mask = mask.expand(self.q.size(0), self.q.size(1), queries, keys)
        return [j for j in range(keys) if mask[b, h, i, j] and not (self.view["causal"] and j > i + keys - queries)]


def looped(case: Case) -> tuple[Tensor, Tensor]:
    """Weights and output, one query at a time."""
    q, k, v, bias = case.q, case.k, case.v, case.view["bias"]
    scale = case.view["scale"]
    scale = 1 / math.sqrt(q.size(3)) if scale is None else scale
    weights, outputs = [], []
    for b in range(q.size(0)):
        for h in range(q.size(1)):
            shared = h // (q.size(1) // k.size(1))
            for i in range(q.size(2)):
                row = [torch.zeros((), dtype=q.dtype)] * k.size(2)
                seen = case.sees(b, h, i)
                scores = [scale * (q[b, h, i] * k[b, shared, j]).sum() for j in seen]
                if bias is not None:
                    full = bias.expand(q.size(0), q.size(1), q.size(2), k.size(2))
                    scores = [score + full[b, h, i, j] for score, j in zip(scores, seen, strict=True)]
                total = sum(score.exp() for score in scores)
                for score, j in zip(scores, seen, strict=True):
                    row[j] = score.exp() / total
                weights.append(torch.stack(row))
                outputs.append(sum(row[j] * v[b, shared, j] for j in range(k.size(2))))
    shape = q.shape[:3]
    return torch.stack(weights).view(*shape, -1), torch.stack(outputs).view(*shape, -1)


@st.composite
def cases(draw: st.DrawFn, **fixed: Any) -> Case:
    """Any call: grouped heads, more queries than keys or fewer, rows that see nothing, arguments that broadcast."""

    def size(most: int) -> int:
        return draw(st.integers(1, most))

    batch, kv_heads, groups, queries, keys = size(2), size(2), size(3), size(4), size(5)
    heads = kv_heads * groups

    def broadcast() -> tuple[int, int, int, int]:
        return draw(st.sampled_from([1, batch])), draw(st.sampled_from([1, heads])), queries, keys

    def argument(name: str, values: st.SearchStrategy[Any]) -> Any:
        return fixed[name] if name in fixed else draw(values)

    torch.manual_seed(draw(st.integers(0, 2**16)))
    mask = torch.rand(broadcast()) < draw(st.sampled_from([0.2, 0.7])) if argument("masked", st.booleans()) else None
    bias = torch.randn(broadcast()).double().requires_grad_() if argument("biased", st.booleans()) else None
    view = {
        "causal": argument("causal", st.booleans()),
        "mask": mask,
        "bias": bias,
        "scale": argument("scale", st.sampled_from([None, 1.0, 0.3])),
    }
    head_dim, value_dim = size(4), size(4)
    return Case(
        torch.randn(batch, heads, queries, head_dim).double().requires_grad_(),
        torch.randn(batch, kv_heads, keys, head_dim).double().requires_grad_(),
        torch.randn(batch, kv_heads, keys, value_dim).double().requires_grad_(),
        view,
    )


@every_kernel
@given(case=cases())
def test_attention_is_the_equation_in_values_and_gradients(kernel: Any, case: Case) -> None:
    _, expected = looped(case)
    actual = kernel(case.q, case.k, case.v, **case.view)
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(case.gradients(actual), case.gradients(expected), rtol=1e-10, atol=1e-11)


@given(case=cases())
def test_weights_are_those_of_the_equation_and_sum_to_one_or_to_zero_where_nothing_is_seen(case: Case) -> None:
    weights = attention_weights(case.q, case.k, **case.view)
    torch.testing.assert_close(weights, looped(case)[0], rtol=1e-10, atol=1e-12)
    batch, heads, queries = case.q.shape[:3]
    sums = [[[float(bool(case.sees(b, h, i))) for i in range(queries)] for h in range(heads)] for b in range(batch)]
    torch.testing.assert_close(weights.sum(-1), torch.tensor(sums, dtype=weights.dtype))


@every_kernel
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_query_that_may_attend_to_nothing_gets_zero_and_sends_back_zero(
    kernel: Any, biased: bool, dtype: torch.dtype
) -> None:
    q, k, v = (torch.randn(2, 2, 3, 4).to(dtype).requires_grad_() for _ in range(3))
    bias = torch.randn(2, 2, 3, 3).to(dtype).requires_grad_() if biased else None
    mask = torch.ones(2, 1, 3, 3).bool()
    mask[0, :, 1] = False
    with torch.autograd.set_detect_anomaly(True):  # not even on the way is there anything that is not a number
        output = kernel(q, k, v, mask=mask, bias=bias)
        output.square().sum().backward()
    assert not output[0, :, 1].any()
    assert not q.grad[0, :, 1].any()
    leaves = [q, k, v] if bias is None else [q, k, v, bias]
    assert all(leaf.grad.isfinite().all() and leaf.grad.any() for leaf in leaves)


@every_kernel
def test_more_queries_than_keys_may_all_attend_without_a_mask_as_in_cross_attention(kernel: Any) -> None:
    q, k = torch.randn(1, 2, 5, 4), torch.randn(1, 2, 3, 4)
    assert kernel(q, k, k).ne(0).all()
    assert kernel(q, k, k, causal=True).ne(0).any(-1)[0, 0].tolist() == [False, False, True, True, True]


@every_kernel
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("shape", [(6,), (5, 6), (1, 6), (5, 1), (4, 5, 6), (2, 1, 1, 6), (2, 1, 5, 1)], ids=str)
def test_masks_and_biases_broadcast_alike_in_every_kernel(
    kernel: Any, grad: bool, causal: bool, shape: tuple[int, ...]
) -> None:
    """With gradients and without, where `auto` takes other kernels; [query, key] is the usual mask of a textbook."""
    q, k, v = torch.randn(2, 4, 5, 4).double(), torch.randn(2, 2, 6, 4).double(), torch.randn(2, 2, 6, 4).double()
    mask, bias = torch.rand(shape) < 0.7, torch.randn(shape).double()
    for limits in ({"mask": mask}, {"bias": bias}, {"mask": mask, "bias": bias}):
        whole = {name: limit.expand(2, 4, 5, 6) for name, limit in limits.items()}
        expected = looped(Case(q, k, v, {"mask": None, "bias": None, "scale": None, "causal": causal, **whole}))[1]
        with torch.set_grad_enabled(grad), patch.object(kernels, "QUERIES_AT_ONCE", 2), unchecked():
            torch.testing.assert_close(kernel(q, k, v, causal=causal, **limits), expected, rtol=1e-10, atol=1e-12)


@every_kernel
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 4), (3, 2), (1, 2)])
def test_heads_that_cannot_be_shared_out_are_refused_with_both_counts(
    kernel: Any, grad: bool, heads: int, kv_heads: int
) -> None:
    q, k = torch.randn(1, heads, 3, 4), torch.randn(1, kv_heads, 3, 4)
    with torch.set_grad_enabled(grad), pytest.raises(UserError, match=rf"{heads} query heads.* {kv_heads} key"):
        kernel(q, k, k)
    with pytest.raises(UserError, match="cannot share"):
        MultiHeadAttention(24, heads, num_kv_heads=kv_heads)


@given(case=cases())
def test_fused_is_by_hand_in_float32(case: Case) -> None:
    view = {**case.view, "bias": None if case.view["bias"] is None else case.view["bias"].float()}
    q, k, v = case.q.float(), case.k.float(), case.v.float()
    by_hand = scaled_dot_product_attention(q, k, v, **view)
    fused = fused_attention(q, k, v, **view)
    torch.testing.assert_close(fused, by_hand, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(case.gradients(fused), case.gradients(by_hand), rtol=1e-4, atol=1e-5)


@every_kernel
@given(case=cases(scale=None))
def test_bfloat16_is_near_float64(kernel: Any, case: Case) -> None:
    rounded = Case(*(x.detach().bfloat16() for x in (case.q, case.k, case.v)), dict(case.view))
    if case.view["bias"] is not None:
        rounded.view["bias"] = case.view["bias"].detach().bfloat16()
    actual = kernel(rounded.q, rounded.k, rounded.v, **rounded.view)
    assert actual.dtype == torch.bfloat16
    torch.testing.assert_close(actual.double(), looped(case)[1].detach(), rtol=0.05, atol=0.05)


@every_kernel
@given(case=cases())
def test_grouped_heads_are_heads_that_share_repeated_keys_and_values(kernel: Any, case: Case) -> None:
    heads = case.q.size(1)
    repeated = kernel(case.q, repeat_heads(case.k, heads), repeat_heads(case.v, heads), **case.view)
    torch.testing.assert_close(kernel(case.q, case.k, case.v, **case.view), repeated, rtol=1e-12, atol=1e-12)


def test_repeated_heads_are_neighbours() -> None:
    x = torch.arange(3.0).view(1, 3, 1, 1)
    assert repeat_heads(x, 6).flatten().tolist() == [0, 0, 1, 1, 2, 2]
    assert repeat_heads(x, 3) is x


@pytest.mark.parametrize(
    ("kernel", "dtype", "dropout", "training", "length"),
    [
        (fused_attention, torch.float32, 0.0, True, 200),
        (fused_attention, torch.float32, 0.0, False, 5),
        (blockwise_attention, torch.float32, 0.0, True, 5),
        (blockwise_attention, torch.float32, 0.5, True, 200),
        (blockwise_attention, torch.bfloat16, 0.0, False, 5),
    ],
)
def test_the_fastest_kernel_gives_what_one_of_them_gives(
    kernel: AttentionKernel, dtype: torch.dtype, dropout: float, training: bool, length: int
) -> None:
    q, k, v = torch.randn(3, 2, 2, length, 4).to(dtype)
    with torch.set_grad_enabled(training):
        torch.manual_seed(1)
        first = fastest_attention(q, k, v, causal=True, dropout=dropout)
        torch.manual_seed(1)
        second = kernel(q, k, v, causal=True, dropout=dropout)
    assert torch.equal(first, second)


@pytest.mark.parametrize("size", [1, 2, 3, 5, 100])
@given(case=cases())
def test_blocks_of_any_size_are_the_whole(size: int, case: Case) -> None:
    whole = scaled_dot_product_attention(case.q, case.k, case.v, **case.view)
    with patch.object(kernels, "QUERIES_AT_ONCE", size):
        blocks = blockwise_attention(case.q, case.k, case.v, **case.view)
    torch.testing.assert_close(blocks, whole)
    torch.testing.assert_close(case.gradients(blocks), case.gradients(whole))


@every_kernel
def test_dropout_drops_the_stated_share_and_keeps_the_expectation(kernel: Any) -> None:
    # Equal scores and values: every weight is 1/64, and what a feature of the output lacks was dropped.
    keys, rows = 64, 400
    q, k = torch.zeros(1, 1, rows, keys), torch.zeros(1, 1, keys, keys)
    survived = kernel(q, k, torch.eye(keys)[None, None], dropout=0.3)
    assert survived.eq(0).float().mean().item() == pytest.approx(0.3, abs=0.02)
    assert survived.sum(-1).mean().item() == pytest.approx(1.0, abs=0.02)
    assert survived.max().item() == pytest.approx(1 / keys / 0.7, rel=1e-5)


def by_parts(module: MultiHeadAttention, x: Tensor, memory: Tensor, view: AttentionView) -> Tensor:
    """Concat(head₁, …) W_O, one head at a time, with slices of the weight matrices."""
    d, heads = module.head_dim, module.query.out_features // module.head_dim
    shared = heads // (module.key.out_features // d)

    limit = torch.tensor(module.clip or torch.inf, dtype=torch.float64)

    def project(layer: torch.nn.Linear, source: Tensor, head: int) -> Tensor:
        rows = slice(head * d, (head + 1) * d)
        projected = source @ layer.weight[rows].T + (0 if layer.bias is None else layer.bias[rows])
        return projected if module.clip is None else projected.sign() * projected.abs().minimum(limit)

    def normalised(norm: torch.nn.Module, x: Tensor, head: int) -> Tensor:
        if isinstance(norm, EachHead):
            return norm.norms[head](x)
        return norm.norm(x) if isinstance(norm, PerHead) else norm(x)

    outputs = []
    for head in range(heads):
        q = view.rotate(normalised(module.query_norm, project(module.query, x, head), head)[:, None])
        key = project(module.key, memory, head // shared)
        k = view.rotate(normalised(module.key_norm, key, head // shared)[:, None])
        v = project(module.value, memory, head // shared)[:, None]
        bias = None if view.bias is None else view.bias[:, head, None]
        options = {"scale": module.scale, "softcap": module.softcap}
        outputs.append(
            scaled_dot_product_attention(q, k, v, causal=view.causal, mask=view.mask, bias=bias, **options)[:, 0]
        )
    return torch.cat(outputs, -1) @ module.output.weight.T + (0 if module.output.bias is None else module.output.bias)


norm_of_each_head = QK_NORMS["head"](RMSNorm.choose().make, 2)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(
    ("heads", "options"),
    [
        (4, {}),
        (4, {"num_kv_heads": 2}),
        (4, {"num_kv_heads": 1}),
        (4, {"bias": False}),
        (4, {"scale": 1.0}),
        (3, {"head_dim": 5}),
        (4, {"make_norm": norm_of_each_head}),
        (4, {"make_norm": QK_NORMS["each-head"](RMSNorm.choose().make, 2), "num_kv_heads": 2}),
        (4, {"clip": 0.3}),
        (4, {"softcap": 0.5}),
    ],
    ids=lambda value: str(value) if isinstance(value, int) else "-".join(value),
)
@pytest.mark.parametrize("crossing", [False, True], ids=["self", "cross"])
def test_multi_head_attention_is_its_heads_side_by_side(
    kernel: str, heads: int, options: dict[str, Any], crossing: bool, shake: Any
) -> None:
    module = shake(MultiHeadAttention(8, heads, kernel=KERNELS[kernel], **options)).double()
    x = torch.randn(2, 5, 8).double()
    memory = torch.randn(2, 3, 8).double() if crossing else None
    source = x if memory is None else memory
    view = AttentionView(
        causal=not crossing,
        mask=torch.rand(2, 1, 5, source.size(1)) < 0.7,
        bias=torch.randn(1, heads, 5, source.size(1)).double(),
        rotate=lambda y: y.flip(-1) * 1.5,
    )
    torch.testing.assert_close(module(x, memory, view=view), by_parts(module, x, source, view), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kernel", KERNELS)
def test_grouped_heads_with_equal_counts_are_multi_head_bit_for_bit(kernel: str) -> None:
    plain = MultiHeadAttention(8, 4, kernel=KERNELS[kernel])
    grouped = MultiHeadAttention(8, 4, num_kv_heads=4, kernel=KERNELS[kernel])
    grouped.load_state_dict(plain.state_dict())
    x, view = torch.randn(2, 5, 8), AttentionView(causal=True)
    assert torch.equal(plain(x, view=view), grouped(x, view=view))


def test_multi_query_attention_projects_one_key_head_and_one_value_head() -> None:
    module = MultiHeadAttention(8, 4, num_kv_heads=1)
    assert module.query.weight.shape == (8, 8)
    assert module.key.weight.shape == module.value.weight.shape == (2, 8)


@pytest.mark.parametrize("kernel", KERNELS)
def test_attention_drops_weights_in_training_and_never_in_evaluation(kernel: str) -> None:
    module = MultiHeadAttention(8, 2, dropout=0.5, kernel=KERNELS[kernel])
    x, view = torch.randn(2, 6, 8), AttentionView()
    assert not torch.equal(module.train()(x, view=view), module.train()(x, view=view))
    certain = MultiHeadAttention(8, 2, dropout=0.0, kernel=KERNELS[kernel])
    certain.load_state_dict(module.state_dict())
    assert torch.equal(module.eval()(x, view=view), certain.train()(x, view=view))


def test_a_wrong_shape_is_named_by_the_signature() -> None:
    q = torch.randn(1, 2, 3, 4)
    with pytest.raises(TypeError, match="head_dim"):
        scaled_dot_product_attention(q, torch.randn(1, 2, 3, 5), q)


def test_the_student_s_tour_knows_every_kernel():
    page = (Path(kernels.__file__).parent / "README.md").read_text(encoding="utf-8")
    section = page.partition("## 1. ")[2].partition("## 2. ")[0]
    assert [kernel.__name__ for kernel in KERNELS.values() if f"`{kernel.__name__}`" not in section] == []
    assert f"lists all {['no', 'one', 'two', 'three', 'four', 'five', 'six'][len(KERNELS)]}" in section
