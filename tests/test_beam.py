"""Beam search against all texts there are; translation, filled masks, and the processors that came with them."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from minitransformer.errors import UserError
from minitransformer.generation.beam import beam_search
from minitransformer.generation.config import SamplingConfig
from minitransformer.generation.decode import generate, generate_each, padded, search_each, translate
from minitransformer.generation.fill import fill_masks
from minitransformer.generation.logits import TargetLogits
from minitransformer.generation.processors import NEVER, MinLength, NoRepeatNGram
from minitransformer.generation.speculation import Draft, speculate
from minitransformer.generation.streaming import best_texts
from minitransformer.models.config import ModelConfig
from minitransformer.models.encoder_decoder import EncoderDecoder
from minitransformer.models.model import build_model
from minitransformer.text.tokenizers import Characters

VOCAB, END, LENGTH = 4, 3, 4


class Chain:
    """Logits that depend on the last token alone, and a record of how rows are reordered."""

    def __init__(self, logits: Tensor) -> None:
        self.logits = logits
        self.orders: list[list[int]] = []

    def __call__(self, tokens: Tensor) -> Tensor:
        return self.logits[tokens[:, -1]]

    def reorder(self, rows: Tensor) -> None:
        self.orders.append(rows.tolist())


def every_text() -> list[list[int]]:
    """All that can be written in LENGTH tokens: up to the first END, or without one."""
    texts = set()
    for tokens in itertools.product(range(VOCAB), repeat=LENGTH):
        texts.add(tokens[: tokens.index(END) + 1] if END in tokens else tokens)
    return [list(text) for text in sorted(texts)]


def score(log_p: Tensor, text: list[int], penalty: float) -> float:
    return sum(float(log_p[a, b]) for a, b in itertools.pairwise([0, *text])) / len(text) ** penalty


@given(seed=st.integers(0, 10_000), penalty=st.sampled_from([0.0, 0.6, 1.0, 2.0]))
def test_with_enough_beams_the_best_of_all_texts_is_found(seed: int, penalty: float) -> None:
    logits = torch.randn(VOCAB, VOCAB, generator=torch.Generator().manual_seed(seed)).double()
    [found] = beam_search(
        Chain(logits),
        torch.tensor([[0]]),
        SamplingConfig(num_beams=VOCAB**LENGTH, max_new_tokens=LENGTH, length_penalty=penalty),
        ends=[END],
    )
    log_p = logits.log_softmax(-1)
    best = max(every_text(), key=lambda text: score(log_p, text, penalty))
    assert found[0].score == pytest.approx(score(log_p, best, penalty))
    assert [h.score for h in found] == sorted((h.score for h in found), reverse=True)
    for hypothesis in found:
        assert hypothesis.score == pytest.approx(score(log_p, hypothesis.tokens, penalty))


def test_two_beams_find_what_greedy_search_misses() -> None:
    """After 0, token 1 is likelier than 2; but 2 is followed by the end for sure, and 1 by nothing likely."""
    p = torch.tensor([[0.05, 0.5, 0.4, 0.05], [0.25, 0.25, 0.25, 0.25], [0.01, 0.01, 0.01, 0.97], [0.25] * 4])
    greedy, beams = (
        beam_search(
            Chain(p.log()),
            torch.tensor([[0]]),
            SamplingConfig(num_beams=number, max_new_tokens=2, length_penalty=0.0),
            ends=[END],
        )[0]
        for number in (1, 2)
    )
    assert greedy[0].tokens[0] == 1
    assert beams[0].tokens == [2, END]


def test_the_beams_of_a_text_never_take_rows_of_another() -> None:
    chain = Chain(torch.randn(VOCAB, VOCAB))
    beam_search(chain, torch.tensor([[0], [1], [2]]), SamplingConfig(num_beams=2, max_new_tokens=4), ends=[END])
    for order in chain.orders:
        assert [row // 2 for row in order] == [0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize("choices", [{}, {"positions": "learned"}, {"attention_window": 5}], ids=str)
@pytest.mark.parametrize("new", [10, 40])
def test_beams_of_a_decoder_are_the_same_with_a_cache_and_without_within_the_context_and_past_it(
    choices: dict[str, Any], new: int, tiny_decoder: Any
) -> None:
    model = tiny_decoder(num_layers=1, context_length=12, **choices)
    sampling = SamplingConfig(num_beams=3, num_samples=3, max_new_tokens=new, no_repeat_ngram=4)
    prompts = [[1, 2, 3], [4, 5], list(range(9)) * 2, [1, 2, 3]]
    found = list(search_each(model, prompts, sampling, ends=[9]))
    assert found == list(search_each(model, prompts, sampling, ends=[9], cached=False))
    assert [len(texts) for texts in found] == [3] * 4


def test_of_the_beams_of_a_decoder_none_is_likelier_than_the_best_of_all_texts(tiny_decoder: Any) -> None:
    """With as many beams as there are texts, by the model's own probabilities, which do not count the prompt's."""
    model, prompt, length = tiny_decoder(vocab_size=4), [1, 2], 3
    every = torch.cartesian_prod(*[torch.arange(4)] * length)
    with torch.no_grad():
        log_p = model(torch.cat([torch.tensor([prompt]).expand(len(every), -1), every], 1)).log_softmax(-1)
    scores = log_p[:, 1:-1].gather(-1, every[..., None]).sum((1, 2))
    best = every[scores.argsort(descending=True)].tolist()
    sampling = SamplingConfig(num_beams=64, num_samples=5, max_new_tokens=length)
    [found] = search_each(model, [prompt], sampling)
    assert found == best[:5]


def test_a_stop_string_ends_a_beam_as_an_end_does_and_is_not_shown(tiny_decoder: Any) -> None:
    tokenizer, model = Characters("abcdefghij"), tiny_decoder(vocab_size=11)
    sampling = SamplingConfig(num_beams=4, num_samples=4, max_new_tokens=8)
    [[best, *_]] = best_texts(model, tokenizer, [[1, 2]], sampling)
    stop = best[2:4]
    [texts] = best_texts(model, tokenizer, [[1, 2]], replace(sampling, stop=(stop,)))
    assert not any(stop in text for text in texts)
    stops = tokenizer.encode(stop)
    [found] = search_each(model, [[1, 2]], sampling, ends=[10], stops=lambda new: new[-2:] == stops)
    assert texts == [tokenizer.decode(tokens).removesuffix(stop) for tokens in found]
    assert any(tokens[-2:] == stops for tokens in found)


def test_what_draws_texts_refuses_to_search_for_them(tiny_decoder: Any) -> None:
    model, sampling = tiny_decoder(), SamplingConfig(num_beams=2)
    for texts in (
        generate(model, [1], sampling),
        generate_each(model, [[1]], sampling, batch_size=1),
        speculate(model, Draft(model), [1], sampling),
    ):
        with pytest.raises(UserError, match="num_beams is 2"):
            next(texts)


def test_a_model_that_predicts_nothing_finite_is_refused_by_a_beam_search_too(tiny_decoder: Any) -> None:
    model = tiny_decoder()
    model.embedding.table.weight.data.fill_(float("nan"))
    with pytest.raises(UserError, match="no finite probabilities"):
        list(search_each(model, [[1]], SamplingConfig(num_beams=2)))
    with pytest.raises(UserError, match="no token"):
        list(search_each(model, [[]], SamplingConfig(num_beams=2)))


@given(
    texts=st.lists(st.lists(st.integers(0, 3), min_size=6, max_size=6), min_size=1, max_size=3),
    n=st.integers(1, 4),
)
def test_no_n_gram_is_completed_twice(texts: list[list[int]], n: int) -> None:
    logits = NoRepeatNGram.choose(n=n).make()(torch.zeros(len(texts), 4), torch.tensor(texts))
    for row, text in enumerate(texts):
        occurred = {tuple(text[i : i + n]) for i in range(len(text) - n + 1)}
        forbidden = {token for token in range(4) if (*text[len(text) - n + 1 :], token) in occurred}
        assert {token for token in range(4) if logits[row, token] == NEVER} == forbidden


def test_a_text_does_not_end_before_its_least_length() -> None:
    logits, tokens = torch.zeros(1, 4), torch.zeros(1, 5, dtype=torch.long)
    assert MinLength.choose(new_tokens=6).make(0, [END])(logits, tokens).tolist() == [[0, 0, 0, NEVER]]
    assert MinLength.choose(new_tokens=5).make(0, [END])(logits, tokens).tolist() == [[0, 0, 0, 0]]


@pytest.fixture(scope="module")
def translator(shake: Any) -> EncoderDecoder:
    config = ModelConfig(
        topology="encoder-decoder", d_model=16, num_layers=2, num_heads=4, context_length=24, vocab_size=11
    )
    return shake(build_model(config)).double().eval()


@pytest.mark.parametrize(
    "settings", [{"temperature": 0}, {"num_beams": 3}, {"num_beams": 3, "num_samples": 2}], ids=str
)
def test_a_source_is_translated_alike_alone_and_beside_longer_ones(
    settings: dict[str, Any], translator: EncoderDecoder
) -> None:
    sources = [[1, 2, 3], [4, 5, 6, 7, 8, 9, 1, 2], [3]]
    sampling = SamplingConfig(max_new_tokens=12, **settings)
    together = translate(translator, sources, sampling, start=10, ends=[10])
    alone = [translate(translator, [source], sampling, start=10, ends=[10])[0] for source in sources]
    assert together == alone
    assert all(len(texts) == sampling.num_samples for texts in together)


def test_one_beam_is_greedy_search(translator: EncoderDecoder) -> None:
    """Beam search with one beam, told apart from the loop that takes the likeliest token."""
    source, is_token = padded([[1, 2, 3]], torch.device("cpu"))
    with torch.no_grad():
        next_logits = TargetLogits(translator, translator.encode(source, is_token=is_token))
        [found] = beam_search(next_logits, torch.tensor([[10]]), SamplingConfig(max_new_tokens=9), ends=[10])
    [[greedy]] = translate(
        translator, [[1, 2, 3]], SamplingConfig(temperature=0, max_new_tokens=9), start=10, ends=[10]
    )
    assert [token for token in found[0].tokens if token != 10] == greedy


def test_masks_are_filled_with_the_likeliest_tokens_and_their_probabilities(shake: Any) -> None:
    config = ModelConfig(topology="encoder", d_model=16, num_layers=1, num_heads=4, context_length=8, vocab_size=11)
    model = shake(build_model(config)).eval()
    tokens = [1, 9, 3, 9, 5]
    found = fill_masks(model, tokens, mask=9, guesses=3, vocab_size=9)
    with torch.no_grad():
        probabilities = model(torch.tensor([tokens]))[0, [1, 3], :9].softmax(-1)
    assert len(found) == 2
    for guesses, expected in zip(found, probabilities, strict=True):
        assert [token for token, _ in guesses] == expected.argsort(descending=True)[:3].tolist()
        assert [p for _, p in guesses] == pytest.approx(expected.sort(descending=True).values[:3].tolist())
    assert fill_masks(model, [1, 2], mask=9) == []
