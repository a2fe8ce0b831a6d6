"""The engine: whoever comes, waits, leaves or is cancelled beside it, a text is what it would have been alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minitransformer.architecture.cache import KVCache
from minitransformer.errors import UserError
from minitransformer.generation.batch import FEW_UNUSED, DecodeStep, MakeStep, plain_step, plain_steps
from minitransformer.generation.config import SamplingConfig
from minitransformer.generation.decode import generate
from minitransformer.generation.engine import Engine
from minitransformer.generation.fast.steps import recorded_steps
from minitransformer.generation.prefixes import BLOCK, PrefixCache
from minitransformer.generation.sampling import Request
from minitransformer.models.decoder import DecoderLM

pytestmark = pytest.mark.unchecked_shapes

MakeDecoder = Callable[..., DecoderLM]
ENDS = (0, 3)
SETTINGS = [
    SamplingConfig(temperature=0, max_new_tokens=12),
    SamplingConfig(temperature=1.0, max_new_tokens=7, seed=1),
    SamplingConfig(temperature=0.7, top_k=5, top_p=0.9, max_new_tokens=20, seed=2),
    SamplingConfig(temperature=1.2, repetition_penalty=1.5, min_new_tokens=3, max_new_tokens=15, seed=3),
    SamplingConfig(temperature=0, no_repeat_ngram=2, max_new_tokens=18),
]
arrivals = st.lists(
    st.tuples(
        st.integers(0, 4),  # steps before the next request comes
        st.lists(st.integers(1, 10), min_size=1, max_size=14),
        st.sampled_from(SETTINGS),
        st.none() | st.integers(0, 6),  # after how many steps it is cancelled
    ),
    min_size=1,
    max_size=7,
)


def alone(model: DecoderLM, prompt: list[int], sampling: SamplingConfig) -> list[int]:
    """By reading the whole window for every token."""
    return [token for [token] in generate(model, prompt, sampling, ends=ENDS, cached=False)]


@settings(max_examples=20)
@given(arrivals, st.integers(1, 4), st.integers(1, 9), st.sampled_from([plain_steps, recorded_steps]))
def test_a_text_is_the_same_alone_and_among_others(
    tiny_decoder: MakeDecoder, coming: list[Any], rows: int, chunk: int, make_steps: Any
) -> None:
    model = tiny_decoder(context_length=8)
    engine = Engine(model, rows, 40, make_steps=make_steps, chunk=chunk)
    submitted: list[tuple[Request, int | None]] = []
    told: dict[Request, list[int]] = {}

    def step() -> None:
        for request, token in engine.step():
            assert not told.get(request) or told[request][-1] not in ENDS, "a token after the end"
            told.setdefault(request, []).append(token)

    for steps, prompt, sampling, cancelled_after in coming:
        for _ in range(steps):
            step()
        submitted.append((engine.submit(prompt, sampling, ends=ENDS), cancelled_after))
        for request, after in submitted:
            if after is not None and len(request.tokens) >= after and not request.done:
                engine.cancel(request)
    while not engine.idle:
        step()
    for request, after in submitted:
        expected = alone(model, list(request.prompt), request.sampling)
        assert told.get(request, []) == request.tokens
        assert request.done
        if after is None:
            assert request.tokens == expected
        else:
            assert request.tokens == expected[: len(request.tokens)]


def test_sampled_texts_are_the_same_alone_and_in_a_batch_that_rounds_otherwise(tiny_decoder: MakeDecoder) -> None:
    """Sixteen requests, a large vocabulary; logits of the batch differ by 1e-5 of themselves: more than rounding."""
    model, noise = tiny_decoder(vocab_size=8000, context_length=64), torch.Generator().manual_seed(0)

    def rounded(model: DecoderLM) -> MakeStep:
        def make_step(cache: KVCache, count: int, full: bool) -> DecodeStep:
            step = plain_step(model.eval(), cache, count, full)
            return lambda *given: (logits := step(*given)) * (1 + 1e-5 * torch.randn(logits.shape, generator=noise))

        return make_step

    engine = Engine(model, 16, 64, make_steps=rounded)
    laws: list[dict[str, Any]] = [{}, {"top_p": 0.9}, {"top_k": 50, "temperature": 0.8}, {"min_p": 0.01}]
    requests = [
        engine.submit(
            [1 + seed, *range(seed)],
            SamplingConfig(**{"temperature": 1.0, **laws[seed % 4]}, seed=seed, max_new_tokens=16 + seed),
            ends=ENDS,
        )
        for seed in range(16)
    ]
    list(run(engine))
    assert [request.tokens for request in requests] == [
        [token for [token] in generate(model, request.prompt, request.sampling, ends=ENDS)] for request in requests
    ]
    assert len({token for request in requests for token in request.tokens}) > 200


def run(engine: Engine) -> Iterator[list[tuple[Request, int]]]:
    while not engine.idle:
        yield engine.step()


def test_requests_of_one_prompt_read_it_once_and_then_go_on_together(tiny_decoder: MakeDecoder) -> None:
    model, read = tiny_decoder(), []
    model.embedding.register_forward_hook(lambda module, args, output: read.append(tuple(args[0].shape)))
    engine = Engine(model, 3, 20)
    for seed in range(3):
        engine.submit([1, 2, 3, 4], SamplingConfig(max_new_tokens=3, seed=seed))
    assert [len(step) for step in run(engine)] == [3, 3, 3]
    assert read == [(1, 4), (3, 1), (3, 1)]


def test_a_long_prompt_is_read_in_chunks_while_others_go_on(tiny_decoder: MakeDecoder) -> None:
    model, read = tiny_decoder(), []
    engine = Engine(model, 2, 32, chunk=4)
    first = engine.submit([1, 2], SamplingConfig(temperature=0, max_new_tokens=9))
    engine.step()
    model.embedding.register_forward_hook(lambda module, args, output: read.append(args[0].size(1)))
    long = engine.submit([5] * 11, SamplingConfig(temperature=0, max_new_tokens=2))
    assert [[request for request, _ in engine.step()] for _ in range(4)] == [
        [first],
        [first],
        [first, long],
        [first, long],
    ]
    assert read == [4, 1, 4, 1, 3, 1, 1], "a chunk and a token in turn"


@pytest.mark.parametrize(
    "choices",
    [{}, {"positions": "t5"}, {"token_smear": True}, {"attention_window": 9}, {"residual": "attention-residuals"}],
)
def test_what_prompts_begin_with_in_common_is_read_once(tiny_decoder: MakeDecoder, choices: Any) -> None:
    model, read = tiny_decoder(context_length=128, **choices), []
    common = [1 + place * place % 10 for place in range(70)]
    prompts = [common + rest for rest in ([1, 2], [3, 4], [5], [6, 7, 8])] + [common[:50], common[:64], [9] * 40]
    engine = Engine(model, 2, 100, prefix_tokens=96)
    sampling = SamplingConfig(temperature=1.0, seed=3, max_new_tokens=5)
    requests = [engine.submit(prompt, sampling, ends=ENDS) for prompt in prompts]
    hook = model.embedding.register_forward_hook(lambda module, args, output: read.append(args[0].numel()))
    list(run(engine))
    hook.remove()
    assert [request.tokens for request in requests] == [alone(model, prompt, sampling) for prompt in prompts]
    assert engine.prefixes is not None
    assert engine.prefixes.reused_tokens == 64 + 64 + 32 + 32
    assert engine.prefixes.num_tokens == 96
    assert sum(size for size in read if size > 2) <= 74 + 7 + 9 + 18 + 32 + 40


def test_beginnings_of_prompts_that_were_read_together_are_kept_apart(tiny_decoder: MakeDecoder) -> None:
    model, sampling = tiny_decoder(context_length=128), SamplingConfig(temperature=1.0, seed=3, max_new_tokens=25)
    engine = Engine(model, 2, 100, prefix_tokens=256)
    for prompt in ([1] * 40 + [2] * 30, [1] * 40 + [3] * 30):
        engine.submit(prompt, sampling)
    list(run(engine))
    later = engine.submit([1] * 40 + [3] * 31, sampling)
    list(run(engine))
    expected = generate(model, later.prompt, sampling, cached=False)
    assert later.tokens == [token for [token] in expected]
    assert engine.prefixes is not None
    assert engine.prefixes.reused_tokens == 64


def test_beginnings_that_were_used_least_recently_make_room(tiny_decoder: MakeDecoder) -> None:
    kept, cache = PrefixCache(4 * BLOCK), tiny_decoder(context_length=128).new_cache()
    long, other = [1] * 3 * BLOCK, [2] * BLOCK
    for tokens in (long, other):
        kept.keep(tokens, cache, 0)
    assert len(kept.longest(long)) == 3
    kept.keep([3] * BLOCK, cache, 0)
    assert [len(kept.longest(tokens)) for tokens in (long, other, [3] * BLOCK)] == [3, 0, 1]
    kept.keep([4] * 2 * BLOCK, cache, 0)
    assert [len(kept.longest(tokens)) for tokens in (long, [3] * BLOCK, [4] * 2 * BLOCK)] == [1, 1, 2]


def test_a_short_prompt_does_not_wait_until_a_long_one_has_been_read(tiny_decoder: MakeDecoder) -> None:
    engine = Engine(tiny_decoder(context_length=64), 3, 60, chunk=4)
    sampling = SamplingConfig(temperature=0, max_new_tokens=20)
    first = engine.submit([1, 2], sampling)
    engine.step()
    long, short = engine.submit([5] * 30, sampling), engine.submit([6, 7], sampling)
    told = [[request for request, _ in engine.step()] for _ in range(9)]
    assert [request for step in told[:2] for request in step] == [first, first, short]
    assert all(first in step for step in told), "and no other text stands still"
    assert long in told[-1]


def test_a_cancelled_request_leaves_its_row_at_once(tiny_decoder: MakeDecoder) -> None:
    engine = Engine(tiny_decoder(), 1, 32)
    sampling = SamplingConfig(temperature=0, max_new_tokens=20)
    first, second, third = (engine.submit([token], sampling) for token in (1, 2, 4))
    assert [request for request, _ in engine.step()] == [first]
    engine.cancel(first)
    engine.cancel(third)
    assert [request for request, _ in engine.step()] == [second]
    engine.cancel(second)
    assert engine.idle
    assert engine.step() == []
    assert [len(request.tokens) for request in (first, second, third)] == [1, 1, 0]


def test_a_request_has_a_stop_condition_of_its_own(tiny_decoder: MakeDecoder) -> None:
    sampling, seen = SamplingConfig(temperature=0, max_new_tokens=9), []
    engine = Engine(tiny_decoder(), 2, 32)
    stopped = engine.submit([1, 2], sampling, stops=lambda token: (seen.append(token), len(seen) == 4)[1])
    free = engine.submit([1, 2], sampling)
    list(run(engine))
    assert stopped.tokens == seen == free.tokens[:4]
    assert len(free.tokens) == 9


def test_what_does_not_fit_is_refused(tiny_decoder: MakeDecoder) -> None:
    engine = Engine(tiny_decoder(), 1, 10)
    with pytest.raises(UserError, match="the prompt has no token"):
        engine.submit([], SamplingConfig())
    with pytest.raises(UserError, match="num_beams is 2"):
        engine.submit([1], SamplingConfig(num_beams=2))
    with pytest.raises(UserError, match="a text may have 14 tokens, and there are 10 slots"):
        engine.submit([1, 2], SamplingConfig(max_new_tokens=12))


def test_an_engine_leaves_the_mode_of_its_model_to_its_owner(tiny_decoder: MakeDecoder) -> None:
    model = tiny_decoder(dropout=0.5).train()
    engine = Engine(model, 1, 32)
    request = engine.submit([1, 2, 3], SamplingConfig(temperature=0, max_new_tokens=6))
    for _ in run(engine):
        assert model.training
        assert not torch.is_inference_mode_enabled()
    assert request.tokens == alone(model, [1, 2, 3], request.sampling)


def test_texts_that_follow_one_another_do_not_make_later_ones_attend_to_slots_of_earlier_ones(
    tiny_decoder: MakeDecoder,
) -> None:
    model = tiny_decoder(context_length=300)
    engine = Engine(model, 3, 300, make_steps=recorded_steps)
    requests = [engine.submit([1, 2], SamplingConfig(seed=n, max_new_tokens=9 + n % 4)) for n in range(24)]
    ends = []
    while not engine.idle:
        engine.step()
        ends.append(engine._rows.end)
    assert max(ends) < 2 * (2 + 12) + FEW_UNUSED < len(ends)
    for request in requests:
        assert request.tokens == [token for [token] in generate(model, [1, 2], request.sampling, cached=False)]
