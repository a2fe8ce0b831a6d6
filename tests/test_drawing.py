"""Tokens are drawn as often as the model says, by numbers of one text alone, and rounding next to never changes one."""

from __future__ import annotations

import math
from itertools import islice

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from minitransformer.generation.drawing import LEAST, ONE_ROUND, draw, race_numbers
from minitransformer.generation.sampling import sample_generators
from minitransformer.generation.speculation import draw_by_weight

TWO_ROUNDS = 1114
vocabularies = st.sampled_from([1, 2, 65, ONE_ROUND, ONE_ROUND + 1, 2 * ONE_ROUND, TWO_ROUNDS])


def numbers_of(generator: torch.Generator, draws: int, vocab: int) -> Tensor:
    """The random numbers of so many steps of one text."""
    return torch.from_numpy(np.array(list(islice(race_numbers(generator, vocab), draws))))


def numbers_for(draws: int, vocab: int, seed: int = 1) -> Tensor:
    return numbers_of(torch.Generator().manual_seed(seed), draws, vocab)


def deviation(counts: Tensor, expected: Tensor) -> float:
    """Pearson's chi-square of all cells, in standard deviations from its mean; rare ones are one cell together."""
    counts, expected = counts.flatten().double(), expected.flatten().double()
    rare = expected < 5
    assert not counts[expected == 0].any(), "an impossible token was drawn"
    if rare.any() and expected[rare].sum() > 0:
        counts = torch.cat([counts[~rare], counts[rare].sum()[None]])
        expected = torch.cat([expected[~rare], expected[rare].sum()[None]])
    else:
        counts, expected = counts[~rare], expected[~rare]
    freedom = len(counts) - 1
    return float(((counts - expected) ** 2 / expected).sum() - freedom) / math.sqrt(2 * freedom)


# How often


@pytest.mark.parametrize("vocab", [6, 65, ONE_ROUND, TWO_ROUNDS])
def test_tokens_are_drawn_as_often_as_the_model_says(vocab: int) -> None:
    logits = 2 * torch.randn(vocab, generator=torch.Generator().manual_seed(vocab))
    logits[vocab // 3] = -math.inf
    trials = 20_000
    tokens = draw(logits.expand(trials, -1), numbers_for(trials, vocab))
    assert deviation(torch.bincount(tokens, minlength=vocab), logits.double().softmax(0) * trials) < 4


@pytest.mark.parametrize("vocab", [ONE_ROUND, TWO_ROUNDS])
def test_unlikely_tokens_are_drawn_as_often_as_they_should(vocab: int) -> None:
    """All but one of them, together one draw in a hundred, with probabilities down to 1e-6."""
    probability = torch.full((vocab,), 0.01 / (vocab - 1), dtype=torch.float64)
    probability[7] = 0.99
    trials = 20_000
    tokens = draw(probability.log().expand(trials, -1), numbers_for(trials, vocab))
    assert int((tokens != 7).sum()) == pytest.approx(200, abs=4 * math.sqrt(200))
    assert len(tokens[tokens != 7].unique()) > 130


def test_numbers_are_fine_enough_for_a_probability_of_1e_9() -> None:
    """A token of probability p beside one other is drawn where E / E' < p / (1 − p)."""
    numbers = numbers_for(4000, ONE_ROUND).flatten()
    near_0 = numbers[numbers < 1e-3]
    counts = torch.histc(near_0, bins=20, min=0, max=1e-3)
    assert deviation(counts, torch.full((20,), len(numbers) * 1e-3 / 20)) < 4
    assert len(near_0.unique()) > 0.999 * len(near_0), "the smallest are multiples of a step that is too large"
    logits = torch.tensor([[0.0, math.log(1e-9)]])
    at = 1e-9 * torch.tensor([1 - 1e-4, 1 + 1e-4])
    assert draw(logits.expand(2, -1), torch.stack([torch.ones_like(at), at], dim=1)).tolist() == [1, 0]


@given(vocabularies, st.integers(0, 2**32))
def test_no_number_draws_an_impossible_token(vocab: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(3, vocab, generator=generator) * 10
    logits[torch.rand(3, vocab, generator=generator) < 0.5] = -math.inf
    logits[0] = -math.inf
    logits[:, vocab // 2] = 0
    ends = torch.tensor([LEAST, 45])
    numbers = ends[torch.randint(2, (3, len(numbers_for(1, vocab)[0])), generator=generator)]
    tokens = draw(logits, numbers)
    assert logits.gather(1, tokens[:, None]).isfinite().all()
    assert tokens[0] == vocab // 2


# By numbers of one text alone


@given(vocabularies, st.permutations(range(5)), st.integers(1, 5), st.integers(0, 2**32))
def test_a_draw_depends_on_its_own_row_alone(vocab: int, order: list[int], others: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(5 + others, vocab, generator=generator)
    numbers = numbers_for(5 + others, vocab, seed)
    each = [draw(logits[row : row + 1], numbers[row : row + 1]).item() for row in range(5)]
    assert draw(logits, numbers)[:5].tolist() == each
    assert draw(logits[order], numbers[order]).tolist() == [each[row] for row in order]


@pytest.mark.parametrize(("vocab", "most"), [(ONE_ROUND, 1.5), (TWO_ROUNDS, 3.0)])
def test_tokens_that_become_impossible_move_hardly_any_others(vocab: int, most: float) -> None:
    """As at the edge of top-p: without a hundredth of the probability, so many hundredths of the draws change."""
    trials = 3000
    logits, numbers = torch.randn(vocab, generator=torch.Generator().manual_seed(1)), numbers_for(trials, vocab)
    ascending = logits.argsort()
    out = ascending[logits.softmax(0)[ascending].cumsum(0) < 0.01]
    before, after = (draw(each.expand(trials, -1), numbers) for each in (logits, logits.index_fill(0, out, -math.inf)))
    left = torch.isin(before, out)
    assert not torch.isin(after, out).any()
    assert left.any()
    assert (before != after).float().mean() < most / 100
    assert vocab > ONE_ROUND or torch.equal(before[~left], after[~left])


@pytest.mark.parametrize("vocab", [3, ONE_ROUND + 1])
def test_steps_texts_and_seeds_know_nothing_of_each_other(vocab: int) -> None:
    """Pairs of draws from three tokens are as likely as the products say: of one text, of two, of two seeds."""
    logits = torch.full((vocab,), -math.inf)
    logits[[0, vocab // 2, vocab - 1]] = torch.tensor([0.5, 0.3, 0.2]).log()
    places = {0: 0, vocab // 2: 1, vocab - 1: 2}
    trials = 6000

    def drawn(generator: torch.Generator) -> Tensor:
        numbers = numbers_of(generator, trials, vocab)
        return torch.tensor([places[token] for token in draw(logits.expand(trials, -1), numbers).tolist()])

    first, second = map(drawn, sample_generators(2, torch.Generator().manual_seed(5)))
    [other_seed] = map(drawn, sample_generators(1, torch.Generator().manual_seed(6)))
    probability = torch.tensor([0.5, 0.3, 0.2])
    expected = probability[:, None] * probability
    for one, other in [(first[::2], first[1::2]), (first, second), (first, other_seed), (second, other_seed)]:
        assert deviation(torch.bincount(3 * one + other, minlength=9), expected * len(one)) < 4


@pytest.mark.parametrize("vocab", [65, TWO_ROUNDS])
def test_every_sample_has_its_own_numbers_whatever_their_count_and_length(vocab: int) -> None:
    long, short = (
        [numbers_of(own, steps, vocab) for own in sample_generators(samples, torch.Generator().manual_seed(5))]
        for samples, steps in ((4, 150), (2, 30))
    )
    assert all(torch.equal(one[:30], other) for one, other in zip(long, short, strict=False))
    rows = torch.stack(long).flatten(0, 1)
    assert len({tuple(row.tolist()) for row in rows}) == len(rows)
    assert len(rows.unique()) > 0.98 * rows.numel()


# Whatever is rounded


@settings(max_examples=4)
@given(st.sampled_from([1.0, 4.0]), st.integers(0, 2**32))
def test_a_race_is_decided_by_more_than_rounding(scale: float, seed: int) -> None:
    """Where logits change by 1e-4 of themselves, one draw in thousands does; inverted distributions, one in twenty."""
    rows, vocab = 64, 50_257
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(rows, vocab, generator=generator)
    others = logits * (1 + 1e-4 * torch.randn(rows, vocab, generator=generator))
    numbers = numbers_for(rows, vocab, seed)
    assert (draw(logits, numbers) != draw(others, numbers)).sum() <= 1
    uniform = torch.rand(rows, generator=generator)
    assert (draw_by_weight(logits.softmax(-1), uniform) != draw_by_weight(others.softmax(-1), uniform)).any()
