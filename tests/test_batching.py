"""Many prompts in one batch: each text is what it would have been alone, whoever comes and goes beside it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minitransformer.architecture.positions import PositionScheme
from minitransformer.errors import UserError
from minitransformer.generation.batch import Rows
from minitransformer.generation.config import SamplingConfig
from minitransformer.generation.decode import generate, generate_each
from minitransformer.generation.fast import recording, steps
from minitransformer.generation.fast.steps import recorded_steps
from minitransformer.generation.prefill import PromptPrefill
from minitransformer.generation.streaming import stream_text, texts_in_batches
from minitransformer.models.decoder import DecoderLM
from minitransformer.text.tokenizers import Bytes

MakeDecoder = Callable[..., DecoderLM]
prompt_lists = st.lists(st.lists(st.integers(0, 10), min_size=1, max_size=20), min_size=1, max_size=6)


def alone(model: DecoderLM, prompt: list[int], sampling: SamplingConfig, ends: list[int]) -> list[int]:
    return [token for [token] in generate(model, prompt, sampling, ends=ends, cached=False)]


def together(
    model: DecoderLM, prompts: list[list[int]], sampling: SamplingConfig, ends: list[int], batch_size: int
) -> list[list[int]]:
    found = dict(generate_each(model, prompts, sampling, batch_size=batch_size, ends=ends))
    return [found[number] for number in range(len(prompts))]


@settings(max_examples=15)
@given(prompt_lists, st.integers(1, 7), st.sampled_from([0.0, 1.0]), st.integers(0, 2**32), st.integers(1, 25))
def test_each_text_is_what_it_would_have_been_alone(
    tiny_decoder: MakeDecoder,
    prompts: list[list[int]],
    batch_size: int,
    temperature: float,
    seed: int,
    new: int,
) -> None:
    model = tiny_decoder(context_length=8)
    sampling = SamplingConfig(temperature=temperature, max_new_tokens=new, seed=seed)
    expected = [alone(model, prompt, sampling, [0, 3]) for prompt in prompts]
    assert together(model, prompts, sampling, [0, 3], batch_size) == expected


@pytest.mark.parametrize(
    "choices",
    [
        *({"positions": name} for name in PositionScheme.registry),
        {"num_kv_heads": 2, "qk_norm": "head", "attention_window": 5},
        {"token_smear": True},
        {"num_experts": 3},
    ],
    ids=str,
)
def test_rows_that_begin_at_different_times_know_nothing_of_each_other(
    tiny_decoder: MakeDecoder, choices: dict[str, Any]
) -> None:
    model = tiny_decoder(context_length=12, **choices)
    prompts = [[1, 2, 3], [4], [5, 6, 7, 8, 9, 10, 1, 2, 3, 4, 5, 6, 7], [2, 2], [8, 7, 6]]
    sampling = SamplingConfig(temperature=1.0, max_new_tokens=17, seed=5)
    expected = [alone(model, prompt, sampling, [0]) for prompt in prompts]
    assert together(model, prompts, sampling, [0], 2) == expected


def test_rows_that_look_at_more_slots_the_further_they_are_write_the_same(
    tiny_decoder: MakeDecoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recording, "FEW_SLOTS", 4)
    for module in (steps, recording):
        monkeypatch.setattr(module, "has_fixed_shapes", lambda device: True)
    monkeypatch.setattr(recording, "captured", recording.traced)
    model = tiny_decoder(context_length=20)
    prompts = [[1, 2, 3], [4], [5, 6, 7, 8, 9, 10, 1], [2, 2], [8, 7, 6]]
    sampling = SamplingConfig(temperature=1.0, max_new_tokens=30, seed=5)
    expected = [alone(model, prompt, sampling, [0]) for prompt in prompts]
    assert together(model, prompts, sampling, [0], 2) == expected


def test_what_looks_back_looks_at_the_text_of_its_own_row(tiny_decoder: MakeDecoder) -> None:
    model, prompts = tiny_decoder(), [[1, 2, 1], [3], [4, 5, 4, 5]]
    sampling = SamplingConfig(
        temperature=0.7, repetition_penalty=1.5, no_repeat_ngram=2, min_new_tokens=4, max_new_tokens=9, seed=1, top_k=6
    )
    assert together(model, prompts, sampling, [0, 1], 3) == [alone(model, p, sampling, [0, 1]) for p in prompts]


def test_a_row_is_given_to_the_next_prompt_at_once(tiny_decoder: MakeDecoder, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = []
    step = Rows.decode
    monkeypatch.setattr(Rows, "decode", lambda self, tokens: (steps.append(tokens.tolist()), step(self, tokens))[1])
    lengths = {0: 2, 1: 6, 2: 4}
    written: dict[int, int] = {}

    def stops(number: int, token: int) -> bool:
        written[number] = written.get(number, 0) + 1
        return written[number] == lengths[number]

    model, sampling = tiny_decoder(), SamplingConfig(max_new_tokens=50, seed=0)
    order = [number for number, _ in generate_each(model, [[1], [2], [3]], sampling, batch_size=2, stops=stops)]
    assert order == [0, 2, 1], "both of the last two end in step 6"
    assert len(steps) == 5, "2 and then 4 tokens in one row, beside 6 in the other, of which prompts give the first"


@pytest.mark.parametrize("choices", [{}, {"positions": "t5"}, {"attention_window": 3}], ids=str)
def test_rows_of_different_lengths_take_several_tokens_at_a_time(
    tiny_decoder: MakeDecoder, choices: dict[str, Any]
) -> None:
    model, texts = tiny_decoder(**choices), torch.randint(11, (2, 16))
    rows = Rows(model, 2, 14, recorded_steps)
    with torch.no_grad():
        for row, length in enumerate((2, 5)):
            prefill = PromptPrefill(model, [texts[row, :length].tolist()])
            prefill.advance(length)
            rows.fill([row], prefill.results([0])[0], length)
        expected = model(texts)
        for begin in (0, 3, 6):
            new = torch.stack([texts[row, at : at + 3] for row, at in enumerate((2 + begin, 5 + begin))])
            logits = torch.stack([expected[row, at + 1 : at + 3] for row, at in enumerate((2 + begin, 5 + begin))])
            torch.testing.assert_close(rows.decode(new, 2), logits)


def test_an_empty_prompt_is_refused(tiny_decoder: MakeDecoder) -> None:
    with pytest.raises(UserError, match="no token"):
        list(generate_each(tiny_decoder(), [[1], []], SamplingConfig(), batch_size=2))


def test_no_prompts_are_no_texts(tiny_decoder: MakeDecoder) -> None:
    assert list(generate_each(tiny_decoder(), [], SamplingConfig(), batch_size=2)) == []


def test_texts_come_in_the_order_of_their_prompts_up_to_their_stops(tiny_decoder: MakeDecoder) -> None:
    tokenizer = Bytes()
    model = tiny_decoder(vocab_size=257)
    prompts = [tokenizer.encode(text) for text in ("a", "bc", "abc", "c", "ca")]
    free = SamplingConfig(temperature=3.0, max_new_tokens=30, seed=2)
    texts = ["".join(piece for [piece] in stream_text(model, tokenizer, prompt, free)) for prompt in prompts]
    assert list(texts_in_batches(model, tokenizer, prompts, free, 2)) == texts
    stop = (texts[0][3:5], texts[2][1:3])
    stopped = SamplingConfig(temperature=3.0, max_new_tokens=30, seed=2, stop=stop)
    expected = ["".join(piece for [piece] in stream_text(model, tokenizer, p, stopped)) for p in prompts]
    assert list(texts_in_batches(model, tokenizer, prompts, stopped, 2)) == expected
    assert expected != texts


def test_the_model_is_as_before_when_the_loop_is_left(tiny_decoder: MakeDecoder) -> None:
    model = tiny_decoder().train()
    texts = generate_each(model, [[1], [2]], SamplingConfig(max_new_tokens=3, seed=0), batch_size=1)
    next(texts)
    assert not torch.is_inference_mode_enabled()
    texts.close()
    assert model.training
