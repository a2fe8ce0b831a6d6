"""Recorded steps do what the model does, for every model, and nothing to other threads."""

from __future__ import annotations

import gc
import signal
import threading
import weakref
from collections.abc import Callable
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor

from minitransformer.architecture.attention import scaled_dot_product_attention
from minitransformer.architecture.block import Block
from minitransformer.architecture.feedforward import FeedForward
from minitransformer.architecture.norms import Norm
from minitransformer.generation.config import SamplingConfig
from minitransformer.generation.decode import generate
from minitransformer.generation.fast import many_rows, recording, rows
from minitransformer.generation.fast.recording import FEW_PRODUCTS, MOST, SOON, Recorded, products_of
from minitransformer.generation.fast.rows import KernelLinear, RowLinear, for_single_rows, gelu_by_columns
from minitransformer.generation.fast.steps import KEPT, recorded_steps
from minitransformer.generation.logits import CachedLogits
from minitransformer.generation.weights import Float32
from minitransformer.models.decoder import DecoderLM
from tests.placements_for_tests import WHAT_A_STEP_NEEDS

MakeDecoder = Callable[..., DecoderLM]


@pytest.mark.parametrize(
    "choices",
    [
        *WHAT_A_STEP_NEEDS,
        *({"feedforward": name} for name in FeedForward.registry),
        *({"norm": name, "qk_norm": "head"} for name in Norm.registry),
        *({"block": name} for name in Block.registry),
        {"num_kv_heads": 1, "qk_norm": "full"},
        {"num_kv_heads": 2, "head_dim": 6, "attention_scale": 1.0},
        {"bias": True, "tied_embeddings": False, "scaled_embeddings": True, "attention_window": 3},
        {"attention_window": 4, "window_pattern": (False, True), "attention_softcap": 2.0, "logit_softcap": 3.0},
        {"rotary_fraction": 0.5, "rotary_scaling": "llama3", "rotary_factor": 4.0, "rotary_original_length": 8},
        {"num_experts": 3, "feedforward": "swiglu"},
        {"head": "transformed", "head_bias": True, "logit_scale": 0.5, "embedding_norm": True},
        {"embedding_dim": 6},
        {"attention_kernel": "by-hand", "num_kv_heads": 2},
    ],
    ids=str,
)
def test_what_is_replayed_is_what_the_model_says(tiny_decoder: MakeDecoder, choices: dict[str, Any]) -> None:
    model = tiny_decoder(dropout=0.5, **choices)
    tokens = torch.randint(11, (2, 25))
    tokens[:, :3] = tokens[0, :3]
    with torch.no_grad():
        expected = model(tokens)
        for slots, last in ((16, 9), (32, 25), (28, 6)):  # a recording serves every cache
            next_logits = CachedLogits(model, 2, slots, recorded_steps)
            for length in range(3, last + 1):
                torch.testing.assert_close(next_logits(tokens[:, :length]), expected[:, length - 1])


@pytest.fixture
def by_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    """All products are many, on every processor."""
    if not torch.backends.mkldnn.is_available():
        pytest.skip("torch is built without oneDNN")
    monkeypatch.setattr(many_rows, "MANY_PRODUCTS", 1)
    monkeypatch.setattr(many_rows, "has_onednn_for_float32", lambda: True)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("inputs", "outputs"), [(16, 48), (48, 16)])
def test_products_by_onednn_are_products(inputs: int, outputs: int, bias: bool, by_onednn: None) -> None:
    linear = torch.nn.Linear(inputs, outputs, bias=bias)
    fast, x = RowLinear(linear), torch.randn(5, 3, inputs)
    for some in (x, x[:, -1:], x.transpose(0, 1), x[0, :2]):
        torch.testing.assert_close(fast(some), linear(some))
    assert many_rows.has_many_products(x, outputs)
    assert not many_rows.has_many_products(x.double(), outputs)
    by_hand = many_rows.multiply_many_rows(x, linear.weight.detach(), fast.bias)
    assert torch.equal(KernelLinear(Float32(linear))(x), by_hand), "15 rows are many for our own kernel"


def test_steps_by_onednn_are_those_of_the_model(tiny_decoder: MakeDecoder, by_onednn: None) -> None:
    test_what_is_replayed_is_what_the_model_says(tiny_decoder, {"bias": True, "feedforward": "swiglu"})


@pytest.mark.parametrize(
    "choices",
    [{}, {"positions": "alibi"}, {"num_kv_heads": 2}, {"attention_window": 4, "attention_softcap": 2.0}],
    ids=str,
)
def test_steps_of_many_heads_are_those_of_the_model(
    tiny_decoder: MakeDecoder, choices: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rows, "MANY_HEADS", 1)
    monkeypatch.setattr(rows, "scaled_dot_product_attention", by_hand := Mock(wraps=scaled_dot_product_attention))
    test_what_is_replayed_is_what_the_model_says(tiny_decoder, choices)
    assert by_hand.called == ("num_kv_heads" not in choices and "attention_window" not in choices)


class Other(torch.nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def scale_in_place(model: DecoderLM) -> None:
    for weight in model.parameters():
        weight.data.mul_(1.5)  # no version counter knows of this


def give_other_storage(model: DecoderLM) -> None:
    for weight in model.parameters():
        weight.data = weight.data * 1.5


def give_other_parameters(model: DecoderLM) -> None:
    model.load_state_dict({name: 1.5 * weight for name, weight in model.state_dict().items()}, assign=True)


def give_another_module(model: DecoderLM) -> None:
    attention = model.stack.blocks[0].attention
    attention.value, value = Other(16, 16, bias=False), attention.value
    attention.value.weight = value.weight


def give_another_class(model: DecoderLM) -> None:
    model.stack.blocks[1].feedforward.up.__class__ = Other


def give_another_setting(model: DecoderLM) -> None:
    model.stack.blocks[0].attention.scale = 2.0


def add_a_hook(model: DecoderLM) -> None:
    model.stack.blocks[1].feedforward.down.register_forward_hook(lambda module, args, output: 3 * output)


CHANGES = [
    scale_in_place,
    give_other_storage,
    give_other_parameters,
    give_another_module,
    give_another_class,
    give_another_setting,
    add_a_hook,
]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("inference", [False, True])
def test_a_text_after_a_change_of_the_model_is_that_of_the_changed_model(
    tiny_decoder: MakeDecoder, change: Callable[[DecoderLM], None], inference: bool
) -> None:
    model, tokens = tiny_decoder(d_model=16, feedforward="gelu", bias=True), torch.randint(11, (1, 6))

    def logits(of: DecoderLM) -> Tensor:
        next_logits = CachedLogits(of, 1, 8, recorded_steps)
        with torch.inference_mode(inference), torch.no_grad():
            return torch.cat([next_logits(tokens[:, :length]) for length in range(2, 7)]).clone()

    before = logits(model)
    change(model)
    with torch.no_grad():
        expected = model(tokens)[0, 1:]
    assert not torch.allclose(before, expected)
    torch.testing.assert_close(logits(model), expected)


def test_a_text_outside_of_autocast_has_nothing_of_one_inside(tiny_decoder: MakeDecoder) -> None:
    model, tokens = tiny_decoder(d_model=16).float(), torch.randint(11, (1, 6))

    def logits() -> Tensor:
        next_logits = CachedLogits(model, 1, 8, recorded_steps)
        with torch.inference_mode():
            return torch.cat([next_logits(tokens[:, :length]) for length in range(2, 7)]).clone()

    with torch.autocast("cpu", torch.bfloat16):
        rounded = logits()
    with torch.no_grad():
        expected = model(tokens)[0, 1:]
    assert (rounded - expected).abs().max() > 1e-4
    torch.testing.assert_close(logits(), expected)


def test_a_model_keeps_the_steps_of_some_numbers_of_rows_alone(tiny_decoder: MakeDecoder) -> None:
    model = tiny_decoder(d_model=16)
    for samples in range(1, 2 * MOST):
        list(generate(model, [1, 2], SamplingConfig(num_samples=samples, max_new_tokens=2)))
    assert len(KEPT[model]._recorded) <= MOST


def test_kept_steps_are_freed_with_their_model(tiny_decoder: MakeDecoder) -> None:
    model = tiny_decoder(d_model=16)
    list(generate(model, [1, 2], SamplingConfig(max_new_tokens=4)))
    assert model in KEPT
    known = weakref.ref(model)
    del model
    gc.collect()
    assert known() is None


def test_a_step_is_recorded_when_it_comes_again_and_each_shape_has_its_own() -> None:
    calls = []

    def step(a: Tensor, b: Tensor) -> Tensor:
        calls.append(a.shape)
        return a + b

    recorded = Recorded(step)
    for size in (2, 3):
        for number in range(4):
            assert torch.equal(recorded(torch.ones(size), torch.tensor([number])), torch.full((size,), 1.0 + number))
    assert calls == [(2,), (2,), (3,), (3,)]


def test_shapes_that_come_now_and_then_are_not_recorded() -> None:
    calls = []

    def step(a: Tensor, b: Tensor) -> Tensor:
        calls.append(len(a))
        return a + b

    recorded, b = Recorded(step), torch.ones(1)
    for _ in range(3):
        for size in (2, *[1] * SOON):
            recorded(torch.ones(size), b)
    assert calls == [2, 1, 1, 2, 2]
    recorded(torch.ones(1), b)
    recorded(torch.ones(2), b)
    assert calls == [2, 1, 1, 2, 2, 2], "recorded, and that replayed"


def test_no_more_recordings_are_kept_than_some() -> None:
    recorded = Recorded(lambda a: a + 1)
    for size in range(1, 3 * MOST):
        for _ in range(2):
            assert torch.equal(recorded(torch.ones(size)), torch.full((size,), 2.0))
        assert len(recorded._recordings) <= MOST


@pytest.mark.parametrize("fixed", [False, True])
def test_one_recording_serves_all_lengths_but_where_shapes_are_fixed(
    fixed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recording, "captured", recording.traced)
    calls = []

    def step(a: Tensor, b: Tensor) -> Tensor:
        calls.append(int(b.size(1)))
        return a + torch.arange(10).narrow(0, 0, b.size(1)).sum() + b.sum()

    recorded = Recorded(step, fixed=fixed)
    for length in (2, 2, 3, 3, 5, 1):
        expected = 1.0 + sum(range(length)) + length
        assert recorded(torch.ones(1), torch.ones(1, length)).tolist() == [expected]
    assert calls == ([2, 2, 3, 3, 5, 1] if fixed else [2, 2])


def settings_of_torch() -> list[Any]:
    return [torch.get_num_threads(), torch._C._get_mkldnn_enabled(), torch._C._get_graph_executor_optimize()]


def test_replays_leave_the_settings_of_torch_as_they_are_for_every_other_thread(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    during: dict[str, list[Any]] = {}

    def replay(a: Tensor) -> None:
        during["here"] = settings_of_torch()
        other = threading.Thread(target=lambda: during.update(elsewhere=settings_of_torch()))
        other.start()
        other.join()

    monkeypatch.setattr(recording, "traced", lambda step, tensors: replay)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        recorded = Recorded(lambda a: a + 1)
        for _ in range(2):
            recorded(torch.ones(1))
        assert settings_of_torch() == [3, torch.backends.mkldnn.is_available(), True]
    finally:
        torch.set_num_threads(threads)
    assert during["here"] == [1, torch.backends.mkldnn.is_available(), False]
    assert during["elsewhere"] == [3, torch.backends.mkldnn.is_available(), True]


@pytest.mark.parametrize("shape", [(1, 1, 6), (2, 3, 8), (1, 7), (3, 5), (1 << 14,)])
def test_gelu_by_columns_is_gelu(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    found, expected = gelu_by_columns(x), torch.nn.functional.gelu(x.double()).float()
    torch.testing.assert_close(found, expected)
    assert found.stride() == x.stride()


@pytest.mark.parametrize(("rows", "threads"), [(1, 1), (3, 1), (4, 3)])
def test_few_products_are_done_by_one_thread_which_no_other_process_can_delay(
    rows: int, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    during: list[int] = []

    def step(*tensors: Tensor) -> Tensor:
        during.append(torch.get_num_threads())
        return tensors[0]

    monkeypatch.setattr(recording, "traced", lambda step, tensors: step)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        recorded = Recorded(step, products=lambda a, b: len(a) * len(b) * FEW_PRODUCTS // 4)
        for length in (1, 1, 1, 4):
            recorded(torch.ones(rows), torch.ones(length))
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
    # Steps before a recording round as those after it, so that a text does not depend on the texts before it.
    assert during == [threads, threads, threads, 3], "four times as many products need several"


def test_products_are_those_with_weights_and_with_the_keys_and_values_that_are_seen(tiny_decoder: MakeDecoder) -> None:
    model = tiny_decoder(d_model=16, num_layers=3, d_ff=10, feedforward="relu", vocab_size=11)
    weights = 3 * (4 * 16 * 16 + 2 * 10 * 16) + 11 * 16
    tokens, seen = torch.zeros(5, 1), torch.zeros(1, 7)
    assert products_of(model)(tokens, torch.zeros(1), seen, torch.zeros(1)) == 5 * (weights + 3 * 2 * 16 * 7)


def test_an_interruption_while_a_step_is_recorded_is_not_lost() -> None:
    def step(a: Tensor, b: Tensor) -> Tensor:
        if torch.jit.is_tracing():
            signal.raise_signal(signal.SIGINT)
        return a + b

    recorded = Recorded(step)
    recorded(torch.ones(1), torch.ones(1))
    with pytest.raises(KeyboardInterrupt):
        recorded(torch.ones(1), torch.ones(1))
    assert recorded(torch.ones(1), torch.ones(1)).tolist() == [2]


def test_linear_maps_with_hooks_or_a_forward_of_their_own_keep_them(tiny_decoder: MakeDecoder) -> None:
    class Doubled(torch.nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    model = tiny_decoder(feedforward="relu")
    first, second = model.stack.blocks
    first.feedforward.up.__class__ = first.attention.value.__class__ = Doubled
    for linear in (second.feedforward.up, second.attention.key):
        linear.register_forward_hook(lambda module, args, output: output * 3)
    tokens = torch.randint(11, (1, 6))
    with torch.no_grad():
        found = for_single_rows(model)(tokens, cache=model.new_cache())
        torch.testing.assert_close(found, model(tokens))


@pytest.mark.parametrize(("d_model", "outputs"), [(16, [48, 16]), (256, [256] * 4)])
def test_only_small_queries_keys_and_values_are_one_product(
    d_model: int, outputs: list[int], tiny_decoder: MakeDecoder
) -> None:
    rows = for_single_rows(tiny_decoder(d_model=d_model, num_layers=1, bias=True))
    called = []
    for linear in [module for module in rows.stack.blocks[0].attention.modules() if isinstance(module, RowLinear)]:
        linear.register_forward_hook(lambda module, args, output: called.append(module.out_features))
    rows(torch.zeros(1, 1, dtype=torch.long), cache=rows.new_cache())
    assert called == outputs


def test_the_cache_of_one_prompt_is_repeated_exactly(tiny_decoder: MakeDecoder) -> None:
    model = tiny_decoder()
    next_logits = CachedLogits(model, 3, 20, recorded_steps)
    tokens = torch.randint(11, (1, 6)).expand(3, -1)
    with torch.no_grad():
        torch.testing.assert_close(next_logits(tokens), model(tokens)[:, -1])
        longer = torch.cat([tokens, torch.tensor([[1], [2], [3]])], 1)
        torch.testing.assert_close(next_logits(longer), model(longer)[:, -1])
