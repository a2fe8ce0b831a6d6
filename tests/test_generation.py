"""The decode loop: cached decoding is uncached decoding, the seed decides the text, a text leaves nothing behind."""

from __future__ import annotations

import gc
import math
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain, islice
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from minitransformer.architecture import cache
from minitransformer.architecture.cache import KVCache
from minitransformer.architecture.positions import PositionScheme
from minitransformer.architecture.residual import Residual
from minitransformer.errors import UserError
from minitransformer.generation.config import SamplingConfig
from minitransformer.generation.decode import generate, generate_each
from minitransformer.generation.fast import recording, steps
from minitransformer.generation.fast.rows import RowLinear
from minitransformer.generation.fast.steps import recorded_steps
from minitransformer.generation.host import stream_to_host
from minitransformer.generation.speculation import Draft, speculate
from minitransformer.generation.window import window_length
from minitransformer.models.decoder import DecoderLM
from tests.placements_for_tests import choosing

pytestmark = pytest.mark.unchecked_shapes
MakeDecoder = Callable[..., DecoderLM]


@given(st.integers(1, 20), st.integers(1, 100))
def test_the_window_drops_the_oldest_half_when_it_is_full(context: int, total: int) -> None:
    window: list[int] = []
    for token in range(total):
        if len(window) == context:
            window = window[(context + 1) // 2 :]
        window.append(token)
    assert window_length(total, context) == len(window)


def run(model: DecoderLM, prompt: list[int], *, cached: bool = True, **settings: Any) -> list[list[int]]:
    return list(generate(model, prompt, SamplingConfig(**{"seed": 3, **settings}), cached=cached))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("positions", PositionScheme.registry)
def test_cached_decoding_is_uncached_decoding_even_past_the_context(
    tiny_decoder: MakeDecoder, positions: str, temperature: float
) -> None:
    for choices in ({}, {"num_kv_heads": 2, "qk_norm": "head", "attention_window": 5}):
        model = tiny_decoder(positions=positions, context_length=8, **choices)
        settings = {"temperature": temperature, "num_samples": 2, "max_new_tokens": 14}
        for prompt in ([1, 2, 3], list(range(11)) * 2):  # shorter and longer than the context
            assert run(model, prompt, **settings) == run(model, prompt, cached=False, **settings)


@pytest.mark.parametrize(
    "choices",
    [{}, {"positions": "t5"}, {"positions": "learned", "token_smear": True}, {"attention_window": 5}],
    ids=str,
)
@pytest.mark.parametrize(
    ("fixed", "all_seen"),
    [(True, [8, 16, 24, 32]), (False, [4, 5])],  # called or recorded; the other lengths are replayed
    ids=["fixed shapes", "any length"],
)
def test_a_text_that_looks_at_more_slots_the_longer_it_is_is_the_same(
    tiny_decoder: MakeDecoder,
    choices: dict[str, Any],
    fixed: bool,
    all_seen: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(recording, "FEW_SLOTS", 8)
    for module in (steps, recording):
        monkeypatch.setattr(module, "has_fixed_shapes", lambda device: fixed)
    monkeypatch.setattr(recording, "captured", recording.traced)
    model = tiny_decoder(context_length=32, **choices)
    settings = {"num_samples": 2, "max_new_tokens": 40}
    expected = run(model, [1, 2, 3], cached=False, **settings)
    seen = []
    at = KVCache.at
    monkeypatch.setattr(
        KVCache, "at", lambda cache, slots, n, **known: (seen.append(int(n)), at(cache, slots, n, **known))[1]
    )
    assert run(model, [1, 2, 3], **settings) == expected
    assert list(dict.fromkeys(seen)) == all_seen


@given(st.integers(1, 100_000), st.integers(1, 100_000))
def test_attention_looks_at_few_slots_more_than_are_in_use(length: int, most: int) -> None:
    length = min(length, most)
    seen = recording.slots_visible(length, most, fixed=True)
    assert length <= seen <= min(most, max(1.25 * length + 1, length + recording.FEW_SLOTS))


def test_a_long_text_looks_at_few_numbers_of_slots() -> None:
    assert len({recording.slots_visible(length, 32768, fixed=True) for length in range(1, 32769)}) == 20


@pytest.mark.parametrize("residual", Residual.registry)
def test_cached_decoding_is_uncached_decoding_for_every_placement(tiny_decoder: MakeDecoder, residual: str) -> None:
    model = tiny_decoder(context_length=8, **choosing(residual))
    settings = {"temperature": 0.7, "top_k": 8, "top_p": 0.95, "repetition_penalty": 1.3, "max_new_tokens": 20}
    assert run(model, [1, 2, 3], **settings) == run(model, [1, 2, 3], cached=False, **settings)


@pytest.mark.parametrize("context", [1, 2, 3])
def test_the_smallest_contexts_decode(tiny_decoder: MakeDecoder, context: int) -> None:
    model = tiny_decoder(context_length=context)
    assert run(model, [1, 2], max_new_tokens=9) == run(model, [1, 2], max_new_tokens=9, cached=False)


def test_greedy_decoding_takes_the_likeliest_token_of_the_model(tiny_decoder: MakeDecoder) -> None:
    model = tiny_decoder()
    tokens = [4, 2]
    for [new] in run(model, tokens, temperature=0, max_new_tokens=20):
        assert new == model(torch.tensor([tokens]))[0, -1].argmax().item()
        tokens = [*tokens, new]


@pytest.mark.parametrize(("asynchronous", "order"), [(False, "0a1b2c"), (True, "01a2bc")])
def test_an_asynchronous_device_has_the_next_step_to_do_while_one_is_read(asynchronous: bool, order: str) -> None:
    events = []

    def steps() -> Iterator[Tensor]:
        for step in range(3):
            events.append(str(step))
            yield torch.tensor([step])

    for [step] in stream_to_host(steps(), asynchronous):
        events.append("abc"[step])
    assert "".join(events) == order


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("choices", [{}, {"num_experts": 3}], ids=str)
def test_a_gpu_writes_by_its_graphs_what_it_writes_alone(tiny_decoder: MakeDecoder, choices: dict[str, Any]) -> None:
    model = tiny_decoder(context_length=16, **choices).cuda()
    settings = {"temperature": 1.0, "num_samples": 2, "max_new_tokens": 40}
    assert run(model, [1, 2, 3], **settings) == run(model, [1, 2, 3], cached=False, **settings)


def test_continuing_a_continuation_is_one_long_continuation(tiny_decoder: MakeDecoder) -> None:
    """Which tokens a model sees does not depend on who wrote them."""
    model = tiny_decoder(context_length=8)
    whole = [new for [new] in run(model, [1, 2], temperature=0, max_new_tokens=40)]
    for part in (3, 7, 20):
        rest = run(model, [1, 2, *whole[:part]], temperature=0, max_new_tokens=40 - part)
        assert [new for [new] in rest] == whole[part:]


def test_the_seed_decides_the_text_and_nothing_else_does(tiny_decoder: MakeDecoder) -> None:
    model = tiny_decoder()
    settings = {"temperature": 1.5, "max_new_tokens": 20}
    four = run(model, [1], num_samples=4, **settings)
    torch.manual_seed(99)
    state = torch.get_rng_state()
    two = run(model, [1], num_samples=2, **settings)
    assert torch.equal(state, torch.get_rng_state()), "the global generator was used"
    assert [step[:2] for step in four] == two
    assert [step[:2] for step in run(model, [1], num_samples=4, temperature=1.5, max_new_tokens=5)] == two[:5]
    assert run(model, [1], num_samples=2, seed=4, **settings) != two
    assert len({tuple(sample) for sample in zip(*four, strict=True)}) == 4


def test_the_loop_ends_when_every_sample_has_ended(tiny_decoder: MakeDecoder) -> None:
    model = tiny_decoder()
    sampling = SamplingConfig(temperature=2.0, num_samples=3, max_new_tokens=500, seed=0)
    samples = list(zip(*generate(model, [1], sampling, ends=[0]), strict=True))
    ends = [sample.index(0) for sample in samples]
    assert len(set(ends)) > 1
    assert max(ends) == len(samples[0]) - 1, "the loop went on after the last end"
    assert all(set(sample[end:]) == {0} for sample, end in zip(samples, ends, strict=True))


def test_tokens_that_the_tokenizer_lacks_are_never_drawn(tiny_decoder: MakeDecoder) -> None:
    sampling = SamplingConfig(temperature=5.0, max_new_tokens=40, seed=0)
    steps = list(generate(tiny_decoder(vocab_size=64), [1], sampling, vocab_size=3))
    assert {new for [new] in steps} == {0, 1, 2}


def test_the_prompt_is_read_once_for_all_samples_and_then_token_by_token(tiny_decoder: MakeDecoder) -> None:
    model = tiny_decoder()
    read = []
    model.embedding.register_forward_hook(lambda module, args, output: read.append(tuple(args[0].shape)))
    run(model, [1, 2, 3, 4], num_samples=3, max_new_tokens=4)
    assert read == [(1, 4), (3, 1), (3, 1), (3, 1)]


def test_the_model_is_as_before_when_the_loop_ends_or_is_left(tiny_decoder: MakeDecoder) -> None:
    model = tiny_decoder(dropout=0.5).train()
    sampling = SamplingConfig(max_new_tokens=5, seed=1)
    first = list(generate(model, [1], sampling))
    assert first == list(generate(model, [1], sampling)), "dropout was on"
    steps = generate(model, [1], sampling)
    next(steps)
    assert model.training, "the mode of the model changes for the caller between steps"
    assert not torch.is_inference_mode_enabled(), "inference mode leaks into the caller between steps"
    steps.close()
    assert model.training
    model(torch.tensor([[1]])).sum().backward()


def test_a_model_without_finite_logits_is_refused(tiny_decoder: MakeDecoder) -> None:
    model = tiny_decoder()
    with torch.no_grad():
        model.embedding.table.weight.fill_(math.nan)
    with pytest.raises(UserError, match="no finite probabilities"):
        run(model, [1])


def test_an_empty_prompt_is_refused(tiny_decoder: MakeDecoder) -> None:
    with pytest.raises(UserError, match="no token"):
        run(tiny_decoder(), [])


MakeDecoder = Callable[..., DecoderLM]
SAMPLING = SamplingConfig(max_new_tokens=6, seed=0)
WAYS: dict[str, Callable[[DecoderLM], Iterator[Any]]] = {
    "generate": lambda model: generate(model, [1, 2], SAMPLING),
    "left early": lambda model: islice(generate(model, [1, 2], SAMPLING), 4),
    "past the context": lambda model: generate(model, [1, 2], SamplingConfig(max_new_tokens=40, seed=0)),
    "many at a time": lambda model: generate_each(model, [[1, 2], [3], [4, 5]], SAMPLING, batch_size=2),
    "speculative": lambda model: chain.from_iterable(
        speculate(model, Draft(model), [1, 2], SAMPLING, make_steps=recorded_steps)
    ),
}


@dataclass
class Made:
    """What was made to decode."""

    buffers: list[weakref.ref[Tensor]] = field(default_factory=list)
    maps: list[weakref.ref[RowLinear]] = field(default_factory=list)
    recordings: list[int] = field(default_factory=list)

    def left(self) -> list[object]:
        return [one for ref in (*self.buffers, *self.maps) if (one := ref()) is not None]


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Made:
    found = Made()
    with_room, row_linear, traced = cache._with_room, RowLinear.__init__, recording.traced

    def buffer(*arguments: Any) -> Tensor:
        room = with_room(*arguments)
        found.buffers.append(weakref.ref(room))
        return room

    def linear(self: RowLinear, *maps: torch.nn.Linear) -> None:
        row_linear(self, *maps)
        found.maps.append(weakref.ref(self))

    def remembered(step: Any, tensors: Any) -> Any:
        found.recordings.append(len(tensors))
        return traced(step, tensors)

    monkeypatch.setattr(cache, "_with_room", buffer)
    monkeypatch.setattr(RowLinear, "__init__", linear)
    monkeypatch.setattr(recording, "traced", remembered)
    return found


@contextmanager
def without_collections() -> Iterator[None]:
    """What is in a circle stays: only what nobody knows any more goes."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


@pytest.mark.parametrize("way", WAYS)
def test_the_cache_of_a_text_is_gone_when_it_ends_and_what_else_it_was_decoded_with_when_the_model_is(
    way: str, tiny_decoder: MakeDecoder, made: Made
) -> None:
    model = tiny_decoder(num_layers=1, context_length=16)
    with without_collections():
        for _ in WAYS[way](model):
            pass
        assert made.buffers
        assert not [one for one in made.buffers if one() is not None]
        assert made.recordings
        assert made.left()
        del model
        assert not made.left()


@pytest.mark.parametrize("way", WAYS)
def test_further_texts_are_decoded_with_the_recordings_of_the_first(
    way: str, tiny_decoder: MakeDecoder, made: Made
) -> None:
    model = tiny_decoder(num_layers=1, context_length=16)
    texts = [list(WAYS[way](model)) for _ in range(2)]  # in the second, shapes may recur that the first had once
    maps, recordings = len(made.maps), len(made.recordings)
    assert texts[0] == texts[1] == list(WAYS[way](model))
    assert (len(made.maps), len(made.recordings)) == (maps, recordings)


MANY_TEXTS = """
import torch
from minitransformer.generation.decode import generate
from minitransformer.generation.config import SamplingConfig
from minitransformer.models.config import ModelConfig
from minitransformer.models.model import build_model

def memory():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096 / 1e6

model = build_model(ModelConfig(d_model=256, num_layers=2, num_heads=4, context_length=256, vocab_size=4000)).eval()
for number in range(24):
    for _ in generate(model, [1, 2, 3], SamplingConfig(max_new_tokens=5, seed=0)):
        pass
    if number == 8:
        before = memory()
print(memory() - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_many_texts_take_the_memory_of_one() -> None:
    """With a recording kept for each, fifteen texts of this model took 66 MB."""
    done = subprocess.run([sys.executable, "-c", MANY_TEXTS], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 25
