"""Log-likelihoods of texts: their definition, and that no other text changes a bit of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from minitransformer.architecture.block import Block
from minitransformer.architecture.feedforward import FeedForward
from minitransformer.architecture.kernels import KERNELS
from minitransformer.architecture.norms import Norm
from minitransformer.architecture.positions import PositionScheme
from minitransformer.errors import UserError
from minitransformer.generation.likelihoods import Continuation, LogLikelihood, log_likelihoods
from minitransformer.models.config import ModelConfig
from minitransformer.models.decoder import DecoderLM
from minitransformer.models.model import build_model
from minitransformer.settings import with_settings
from tests.placements_for_tests import EVERY_PLACEMENT

VOCABULARY = 211
SIZES = {"vocab_size": VOCABULARY, "d_model": 48, "num_layers": 2, "num_heads": 4, "context_length": 160}
ORDERS = ("as given", "reversed", "shuffled")
PARTS: list[dict[str, Any]] = [
    *EVERY_PLACEMENT,
    *({"positions": name} for name in PositionScheme.registry),
    *({"norm": name} for name in Norm.registry),
    *({"feedforward": name} for name in FeedForward.registry),
    *({"block": name} for name in Block.registry),
    *({"attention_kernel": name} for name in KERNELS),
    {"num_experts": 4},
    {"attention_window": 7},
    {"token_smear": True, "num_kv_heads": 1},
    {"adapter": "soft-prompt"},
]


def decoder(dtype: torch.dtype = torch.float32, **choices: Any) -> DecoderLM:
    torch.manual_seed(0)
    model: Any = build_model(with_settings(ModelConfig(), {**SIZES, **choices})).eval().to(dtype)
    return model


def some_texts(count: int, seed: int, most: int = 70) -> list[Continuation]:
    """Texts of many lengths, of which each three have one context."""
    generator = torch.Generator().manual_seed(seed)

    def ids(at_most: int) -> tuple[int, ...]:
        length = int(torch.randint(1, at_most + 1, (), generator=generator))
        return tuple(torch.randint(VOCABULARY, (length,), generator=generator).tolist())

    contexts = [ids(most) for _ in range(count // 3)]
    return [Continuation(context, ids(most if place else 3)) for context in contexts for place in range(3)]


def in_batches(
    model: DecoderLM, texts: Sequence[Continuation], size: int, order: str
) -> dict[Continuation, LogLikelihood]:
    """The scores of `texts`, of which `size` are given at a time."""
    places = torch.arange(len(texts)).tolist()
    if order == "reversed":
        places.reverse()
    if order == "shuffled":
        places = torch.randperm(len(texts), generator=torch.Generator().manual_seed(size)).tolist()
    found = {}
    for begin in range(0, len(texts), size):
        some = [texts[place] for place in places[begin : begin + size]]
        found.update(zip(some, log_likelihoods(model, some), strict=True))
    return found


def check_same_bits(
    dtype: torch.dtype, sizes: Sequence[int], lengths_of_others: Sequence[int], orders: Sequence[str] = ORDERS
) -> None:
    """Every batch size and order, and texts of other lengths, which a batch would be padded for, among them."""
    model, texts = decoder(dtype), some_texts(24, seed=1)
    alone = {text: log_likelihoods(model, [text])[0] for text in texts}
    assert len({score.nats for score in alone.values()}) == len(texts)
    for most in lengths_of_others:
        others = some_texts(12, seed=2, most=most)
        for size in sizes:
            for order in orders:
                found = in_batches(model, [*texts, *others], size, order)
                assert {text: found[text] for text in texts} == alone, (size, order, most)


@pytest.mark.unchecked_shapes
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_score_is_the_same_bits_for_every_batch_size_order_and_padding(dtype: torch.dtype) -> None:
    check_same_bits(dtype, [1, 7, 64], [4, 30, 80])


@pytest.mark.slow
@pytest.mark.unchecked_shapes
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_score_is_the_same_bits_for_all_batch_sizes_up_to_64(dtype: torch.dtype) -> None:
    check_same_bits(dtype, range(1, 65), [80], ["shuffled"])


@pytest.mark.unchecked_shapes
@pytest.mark.parametrize("choices", PARTS, ids=str)
def test_a_score_is_the_same_bits_alone_and_among_others_for_every_variant(
    choices: dict[str, Any], shake: Callable[[Any], Any]
) -> None:
    model, texts = shake(decoder(**choices)), some_texts(24, seed=4, most=40)
    alone = [log_likelihoods(model, [text])[0] for text in texts]
    assert log_likelihoods(model, texts) == alone
    assert log_likelihoods(model, texts[::-1]) == alone[::-1]


@pytest.mark.parametrize("choices", [{}, {"num_experts": 4}, {"positions": "rotary"}], ids=str)
def test_a_score_is_the_sum_of_the_log_probabilities_of_a_forward_pass(choices: dict[str, Any]) -> None:
    model, texts = decoder(**choices), some_texts(24, seed=5)
    for text, score in zip(texts, log_likelihoods(model, texts), strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([[*text.context, *text.ids[:-1]]]))[0, -len(text.ids) :].double()
        of_each = logits.log_softmax(-1).gather(-1, torch.tensor(text.ids)[:, None])
        assert score.nats == pytest.approx(float(of_each.sum()), abs=2e-4)
        assert score.is_greedy == (logits.argmax(-1).tolist() == list(text.ids))


def test_what_the_model_would_write_is_greedy() -> None:
    model = decoder()
    with torch.no_grad():
        likeliest = int(model(torch.tensor([[3, 1]]))[0, -1].argmax())
    right, wrong = log_likelihoods(model, [Continuation((3, 1), (each,)) for each in (likeliest, likeliest - 1)])
    assert (right.is_greedy, wrong.is_greedy) == (True, False)


def test_a_soft_prompt_precedes_every_text() -> None:
    model: Any = decoder(adapter="soft-prompt")
    text = Continuation((3, 1), (4, 1, 5))
    with torch.no_grad():
        logits = model(torch.tensor([[3, 1, 4, 1]]))[0, -3:]
    expected = float(logits.log_softmax(-1).gather(-1, torch.tensor([[4], [1], [5]])).sum())
    assert log_likelihoods(model, [text])[0].nats == pytest.approx(expected, abs=1e-4)


def test_a_text_that_fills_the_context_is_scored_and_a_longer_one_is_refused() -> None:
    model = decoder()
    assert log_likelihoods(model, [Continuation((1,) * 100, (2,) * 61)])[0].nats < 0
    with pytest.raises(UserError, match="a text of 162 tokens is to be scored, and the model reads 160"):
        log_likelihoods(model, [Continuation((1,) * 100, (2,) * 62)])


def test_weights_that_are_not_finite_are_refused() -> None:
    model = decoder()
    torch.nn.init.constant_(model.head.weight, float("nan"))
    with pytest.raises(UserError, match="the weights have diverged"):
        log_likelihoods(model, [Continuation((1,), (2,))])
