"""Speculative decoding: greedily the very texts of the large model alone, otherwise texts of its distribution."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from fractions import Fraction
from itertools import product
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minitransformer.errors import UserError
from minitransformer.generation.config import SamplingConfig
from minitransformer.generation.decode import generate
from minitransformer.generation.fast import recording, steps
from minitransformer.generation.fast.steps import recorded_steps
from minitransformer.generation.logits import CachedLogits
from minitransformer.generation.sampling import sample_generators
from minitransformer.generation.speculation import Draft, accept, draw_by_weight, speculate
from minitransformer.generation.streaming import stream_text
from minitransformer.generation.window import window_length
from minitransformer.models.decoder import DecoderLM
from tests.prepared_for_tests import fitted

pytestmark = pytest.mark.unchecked_shapes

MakeDecoder = Callable[..., DecoderLM]


def texts(model: DecoderLM, draft: Draft, prompt: list[int], ends: Any = (), **choices: Any) -> list[list[int]]:
    samples = speculate(
        model, draft, prompt, SamplingConfig(**{"seed": 3, **choices}), ends=ends, make_steps=recorded_steps
    )
    return [[token for tokens in steps for token in tokens] for steps in samples]


def unrecorded(model: DecoderLM) -> DecoderLM:
    """`model` with a hook, so that its steps are not recorded: that takes longer than a few steps of many shapes."""
    model.head.register_forward_hook(lambda module, args, output: None)
    return model


def alone(model: DecoderLM, prompt: list[int], ends: Any = (), **choices: Any) -> list[int]:
    return [token for [token] in generate(model, prompt, SamplingConfig(**choices), ends=ends)]


# One round

quarters = st.sampled_from([[a, b, 4 - a - b] for a, b in product(range(5), repeat=2) if a + b <= 4])
MIDDLES = torch.arange(0.5, 12) / 12  # of twelfths: they decide exactly between shares of 1/4, 1/3, 1/2, 2/3, 3/4


@given(quarters, quarters, quarters)
def test_what_stands_after_a_guess_has_exactly_the_probabilities_of_the_model(
    draft: list[int], model: list[int], after: list[int]
) -> None:
    """Every outcome of one guess, over all equally likely numbers: p(x) for the first token, p(x) p(y) for two."""
    q = torch.tensor([draft]).double() / 4
    p = torch.tensor([model, after]).double() / 4
    first: dict[int, Fraction] = {}
    both: dict[tuple[int, int], Fraction] = {}
    for guess, count in enumerate(draft):
        for uniform in product(MIDDLES, repeat=2):
            standing, last = accept(torch.tensor([guess]), q, p, torch.stack(uniform))
            share = Fraction(count, 4 * 144)
            new = (guess, last) if standing else (last,)
            first[new[0]] = first.get(new[0], Fraction(0)) + share
            if standing:
                both[new] = both.get(new, Fraction(0)) + share
    assert [first.get(x, 0) for x in range(3)] == [Fraction(count, 4) for count in model]
    for x, y in product(range(3), repeat=2):
        stands = min(Fraction(draft[x], 4), Fraction(model[x], 4))
        assert both.get((x, y), 0) == stands * Fraction(after[y], 4)


def test_a_guess_that_the_model_thinks_impossible_never_stands() -> None:
    q, p = torch.tensor([[0.5, 0.5]]), torch.tensor([[0.0, 1.0], [0.5, 0.5]])
    assert accept(torch.tensor([0]), q, p, torch.tensor([0.0, 0.7])) == (0, 1)


def test_two_that_differ_by_rounding_only_still_give_a_token() -> None:
    p = torch.tensor([[0.25, 0.75], [0.5, 0.5]])
    q = p[:1] * (1 + 1e-6)
    standing, last = accept(torch.tensor([0]), q, p, torch.tensor([1 - 2**-24, 0.5]))
    assert (standing, last) in {(0, 1), (1, 1)}


# Whole texts

choices = st.fixed_dictionaries(
    {},
    optional={
        "top_k": st.integers(1, 8),
        "top_p": st.floats(0.3, 1),
        "min_p": st.floats(0, 0.5),
        "repetition_penalty": st.floats(0.7, 2),
        "no_repeat_ngram": st.integers(2, 3),
        "min_new_tokens": st.integers(0, 12),
    },
)


@given(choices, st.integers(1, 6), st.integers(1, 12), st.lists(st.integers(0, 10), min_size=1, max_size=20))
@settings(max_examples=10)
def test_greedy_decoding_with_a_draft_writes_what_the_model_alone_writes(
    tiny_decoder: MakeDecoder, choices: dict[str, Any], guesses: int, context: int, prompt: list[int]
) -> None:
    """With contexts that overflow, ends of text, and a draft that sees more or less than the model."""
    torch.manual_seed(1)
    model, small = unrecorded(tiny_decoder(context_length=context)), unrecorded(tiny_decoder(context_length=9))
    wanted = {**choices, "temperature": 0.0, "max_new_tokens": 25}
    expected = alone(model, prompt, ends=[3], **wanted)
    assert texts(model, Draft(small, guesses), prompt, ends=[3], num_samples=2, **wanted) == [expected] * 2


def slowly(model: DecoderLM, draft: Draft, prompt: list[int], sampling: SamplingConfig, end: int) -> list[int]:
    """One text by algorithm 1 of the paper: no cache, everything read anew for every token."""
    [generator] = sample_generators(1, torch.Generator().manual_seed(sampling.seed or 0))
    processors = sampling.make_processors(len(prompt), [end])

    def probabilities(judge: DecoderLM, tokens: list[int]) -> torch.Tensor:
        rows = torch.tensor([tokens])
        logits = judge(rows[:, -window_length(len(tokens), judge.config.context_length) :])[:, -1]
        for process in processors:
            logits = process(logits, rows)
        return logits.softmax(-1)[0]

    new: list[int] = []
    while len(new) < sampling.max_new_tokens and end not in new:
        so_far = [*prompt, *new]
        drawing, judging = torch.rand(2, draft.tokens + 1, generator=generator).tolist()
        room = model.config.context_length - window_length(len(so_far), model.config.context_length)
        count = min(draft.tokens, room)
        judging = judging[draft.tokens - count :]
        guesses: list[int] = []
        for number in drawing[:count]:
            q = probabilities(draft.model, so_far + guesses)
            guesses.append(int(draw_by_weight(q[None], torch.tensor([number]))))
        for place, (guess, number) in enumerate(zip(guesses, judging, strict=False)):
            p, q = (probabilities(judge, so_far + guesses[:place]) for judge in (model, draft.model))
            if number * q[guess] >= p[guess]:
                weights = (p - q).clamp(min=0)
                break
            new.append(guess)
        else:
            weights = probabilities(model, so_far + guesses)
        new.append(int(draw_by_weight(weights[None], torch.tensor(judging[-1:]))))
    new = new[: sampling.max_new_tokens]
    return new[: new.index(end) + 1] if end in new else new


@given(
    choices,
    st.floats(0.3, 2),
    st.integers(1, 6),
    st.integers(1, 12),
    st.lists(st.integers(0, 10), min_size=1, max_size=20),
    st.integers(0, 1000),
)
@settings(max_examples=10)
def test_with_caches_it_is_the_algorithm_of_the_paper_without(
    tiny_decoder: MakeDecoder,
    choices: dict[str, Any],
    temperature: float,
    guesses: int,
    context: int,
    prompt: list[int],
    seed: int,
) -> None:
    torch.manual_seed(seed)
    model, small = unrecorded(tiny_decoder(context_length=context)), unrecorded(tiny_decoder(context_length=9))
    wanted = {**choices, "temperature": temperature, "max_new_tokens": 20, "seed": seed}
    with torch.no_grad():
        expected = slowly(model, Draft(small, guesses), prompt, SamplingConfig(**wanted), end=3)
    assert texts(model, Draft(small, guesses), prompt, ends=[3], **wanted) == [expected]


def probabilities_of_texts(
    model: DecoderLM, prompt: list[int], sampling: SamplingConfig, length: int, end: int
) -> dict[tuple[int, ...], float]:
    """Of every text that the model alone can write."""
    whole: dict[tuple[int, ...], float] = {}
    beginnings: dict[tuple[int, ...], float] = {(): 1.0}
    for _ in range(length):
        longer: dict[tuple[int, ...], float] = {}
        for beginning, probability in beginnings.items():
            tokens = torch.tensor([[*prompt, *beginning]])
            logits = model(tokens)[:, -1]
            for process in sampling.make_processors(len(prompt), [end]):
                logits = process(logits, tokens)
            for token, share in enumerate(logits.softmax(-1)[0].tolist()):
                (whole if token == end else longer)[(*beginning, token)] = probability * share
        beginnings = longer
    return {text: probability for text, probability in {**whole, **beginnings}.items() if probability > 0}


@pytest.mark.parametrize(
    "wanted",
    [
        {"temperature": 1.0},
        {"temperature": 1.3, "top_k": 3, "repetition_penalty": 1.4},
        {"temperature": 1.2, "top_p": 0.9, "min_p": 0.1, "min_new_tokens": 2},
    ],
    ids=str,
)
def test_texts_come_as_often_as_from_the_model_alone(tiny_decoder: MakeDecoder, wanted: dict[str, Any]) -> None:
    model, small = tiny_decoder(vocab_size=4), tiny_decoder(vocab_size=4, num_layers=1)
    for one in (model, small):  # logits near enough that many texts are likely, and far enough to be rejected
        with torch.no_grad():
            one.embedding.table.weight.mul_(0.3)
    sampling = SamplingConfig(**wanted, max_new_tokens=3, num_samples=500, seed=11)
    with torch.no_grad():
        expected = probabilities_of_texts(model, [1, 2], sampling, 3, end=0)
    assert math.isclose(sum(expected.values()), 1, abs_tol=1e-9)
    draft = Draft(small, 2)
    samples = speculate(model, draft, [1, 2], sampling, ends=[0], make_steps=recorded_steps)
    counts = Counter(tuple(token for tokens in steps for token in tokens) for steps in samples)
    assert set(counts) <= set(expected), "a text came that the model cannot write"
    assert 0.05 < draft.accepted / draft.proposed < 0.95, "nothing was tried"
    # Texts that are expected less than five times count as one, as is usual for this test.
    likely = {text: 500 * p for text, p in expected.items() if 500 * p >= 5}
    observed = [counts[text] for text in likely] + [500 - sum(counts[text] for text in likely)]
    awaited = [*likely.values(), max(500 - sum(likely.values()), 1e-9)]
    chi_square = sum((o - e) ** 2 / e for o, e in zip(observed, awaited, strict=True) if e > 1)
    freedom = len(likely)
    # Wilson and Hilferty's 99.9 % point.
    assert chi_square < freedom * (1 - 2 / (9 * freedom) + 3.09 * math.sqrt(2 / (9 * freedom))) ** 3


def test_a_draft_that_is_the_model_is_always_right(tiny_decoder: MakeDecoder) -> None:
    model = tiny_decoder()
    draft = Draft(model, 4)
    [text] = texts(model, draft, [1, 2], temperature=1.0, max_new_tokens=15)
    assert (draft.proposed, draft.accepted, len(text)) == (12, 12, 15)


def test_both_prefill_the_prompt_once_and_proposed_tokens_are_verified_together(tiny_decoder: MakeDecoder) -> None:
    model, small = tiny_decoder(), tiny_decoder()
    lengths: dict[str, list[int]] = {"model": [], "draft": []}
    model.embedding.register_forward_hook(lambda module, args, output: lengths["model"].append(args[0].size(1)))
    small.embedding.register_forward_hook(lambda module, args, output: lengths["draft"].append(args[0].size(1)))
    texts(model, Draft(small, 3), [1, 2, 3, 4, 5, 6, 7], max_new_tokens=8, num_samples=3, temperature=1.0)
    assert lengths["model"][0] == lengths["draft"][0] == 7
    assert set(lengths["model"][1:]) == {4}
    assert set(lengths["draft"][1:]) <= {1, 2}


def test_the_seed_decides_and_neither_length_nor_number_of_samples_does(tiny_decoder: MakeDecoder) -> None:
    model, small = unrecorded(tiny_decoder()), unrecorded(tiny_decoder(num_layers=1))
    four, two = (texts(model, Draft(small), [1], num_samples=n, max_new_tokens=20) for n in (4, 2))
    assert four[:2] == two
    assert len(set(map(tuple, four))) == 4
    assert texts(model, Draft(small), [1], num_samples=2, max_new_tokens=7) == [text[:7] for text in two]
    assert texts(model, Draft(small), [1], num_samples=2, max_new_tokens=20, seed=4) != two


def test_a_sample_that_is_left_early_changes_no_other(tiny_decoder: MakeDecoder) -> None:
    model, small = tiny_decoder(), tiny_decoder(num_layers=1)
    whole = texts(model, Draft(small), [1, 2], num_samples=3, max_new_tokens=20)
    samples = speculate(
        model, Draft(small), [1, 2], SamplingConfig(seed=3, num_samples=3, max_new_tokens=20), make_steps=recorded_steps
    )
    begun = [next(steps) for steps in samples]
    assert [text[: len(some)] for text, some in zip(whole, begun, strict=True)] == begun


def test_a_draft_with_fewer_tokens_or_none_to_guess_is_refused(tiny_decoder: MakeDecoder) -> None:
    model = tiny_decoder()
    with pytest.raises(UserError, match="the draft has 7 tokens, and the model 11"):
        texts(model, Draft(tiny_decoder(vocab_size=7)), [1])
    with pytest.raises(UserError, match="draft_tokens is 0"):
        Draft(model, 0)
    with pytest.raises(UserError, match="the prompt has no token"):
        texts(model, Draft(model), [])


def test_a_stream_with_a_draft_stops_at_stop_strings_and_ends(tiny_decoder: MakeDecoder) -> None:
    tokenizer = fitted("chars", "abcdefghij")
    model, small = unrecorded(tiny_decoder()), unrecorded(tiny_decoder(num_layers=1))
    wanted = {"temperature": 1.5, "num_samples": 4, "max_new_tokens": 60, "seed": 2}
    sampling = SamplingConfig(**wanted)
    ended = texts(model, Draft(small), [1], ends=tokenizer.ends, **wanted)
    streams = list(zip(*stream_text(model, tokenizer, [1], sampling, draft=Draft(small)), strict=True))
    assert ["".join(pieces) for pieces in streams] == [tokenizer.decode(text) for text in ended]
    stop = tokenizer.decode(ended[1])[1:3]
    stopped = SamplingConfig(**wanted, stop=(stop,))
    streams = list(zip(*stream_text(model, tokenizer, [1], stopped, draft=Draft(small)), strict=True))
    assert ["".join(pieces) for pieces in streams] == [tokenizer.decode(text).split(stop)[0] for text in ended]


# The cache behind it


@pytest.mark.parametrize("fixed", [False, True])
@given(st.lists(st.tuples(st.integers(0, 9), st.integers(1, 4)), max_size=12), st.integers(1, 12))
@settings(max_examples=15)
def test_logits_after_a_rewind_are_those_of_the_tokens_that_follow_it(
    tiny_decoder: MakeDecoder, fixed: bool, rounds: list[tuple[int, int]], context: int
) -> None:
    model, tokens = unrecorded(tiny_decoder(context_length=context)), torch.randint(11, (1, 7))
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        for module in (steps, recording):
            patch.setattr(module, "has_fixed_shapes", lambda device: fixed)
        patch.setattr(recording, "captured", recording.traced)
        next_logits = CachedLogits(model, 1, 100, recorded_steps)
        next_logits(tokens)
        for removed, new in rounds:
            length = max(0, tokens.size(1) - removed)
            next_logits.rewind(length)
            tokens = torch.cat([tokens[:, :length], torch.randint(11, (1, new))], dim=1)
            window = window_length(tokens.size(1), context)
            count = min(new, window)
            expected = model(tokens[:, -window:])[:, -count:]
            torch.testing.assert_close(next_logits.after_each(tokens, count), expected)
