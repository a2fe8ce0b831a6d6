"""Encoders: the laws that every choice of their parts obeys, with the heads for masked tokens and for classes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from minitransformer.architecture.positions import PositionScheme
from tests.placements_for_tests import EVERY_PLACEMENT
from tests.texts_for_tests import close, texts, with_padding, without_padding

LENGTH = 6
VARIANTS: list[dict[str, Any]] = [
    *EVERY_PLACEMENT,
    *({"positions": name} for name in PositionScheme.registry),
    {"block": "parallel", "num_kv_heads": 2, "num_segments": 2},
    {"attention_window": 3, "window_pattern": (True, False), "attention_kernel": "by-hand"},
    {"num_experts": 3, "feedforward": "swiglu", "attention_softcap": 2.0, "embedding_dim": 6},
]
every_variant = pytest.mark.parametrize("choices", VARIANTS, ids=str)
both_topologies = pytest.mark.parametrize(
    "kind", [{"topology": "encoder"}, {"topology": "encoder-classifier", "num_classes": 3}], ids=["words", "classes"]
)


@both_topologies
@every_variant
def test_padding_never_matters(kind: dict[str, Any], choices: dict[str, Any], tiny_model: Any) -> None:
    model, tokens = tiny_model(**kind, **choices), texts()
    padded, is_token = with_padding(tokens, 3, 11)
    hidden = without_padding(model.hidden_states(padded, is_token=is_token), is_token)
    close(hidden, model.hidden_states(tokens).expand_as(hidden))
    logits = model(padded, is_token=is_token)
    assert logits.isfinite().all()
    found = logits if "num_classes" in kind else without_padding(logits, is_token)
    close(found, model(tokens).expand_as(found))


@both_topologies
@every_variant
def test_padding_sends_no_gradient_that_is_not_a_number(
    kind: dict[str, Any], choices: dict[str, Any], tiny_model: Any
) -> None:
    model = tiny_model(**kind, **choices)
    is_token = torch.tensor([[False, False, True, True], [True, True, True, False]])
    model(texts(2, 4), is_token=is_token).logsumexp(-1).sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


@both_topologies
def test_every_token_changes_every_output(kind: dict[str, Any], tiny_model: Any) -> None:
    model, tokens = tiny_model(**kind), texts()
    for place in range(LENGTH):
        other = tokens.clone()
        other[:, place] = (other[:, place] + 1) % 11
        assert (model(other) != model(tokens)).any(-1).all()


@both_topologies
def test_texts_of_a_batch_do_not_meet(kind: dict[str, Any], tiny_model: Any) -> None:
    model, tokens = tiny_model(**kind), texts(3)
    for row, logits in enumerate(model(tokens)):
        close(logits, model(tokens[row : row + 1])[0])


@both_topologies
def test_segments_count_and_are_the_first_by_default(kind: dict[str, Any], tiny_model: Any) -> None:
    model, tokens = tiny_model(**kind, num_segments=2), texts(2)
    segments = (torch.arange(LENGTH) >= 3).long().expand(2, -1)
    assert torch.equal(model(tokens), model(tokens, segments=torch.zeros_like(tokens)))
    assert not torch.allclose(model(tokens), model(tokens, segments=segments))


def test_given_positions_replace_those_that_count_tokens(tiny_model: Any) -> None:
    model, tokens = tiny_model("encoder", positions="sinusoidal"), texts()
    close(model(tokens, positions=torch.arange(LENGTH)[None]), model(tokens))
    assert not torch.allclose(model(tokens, positions=torch.arange(LENGTH)[None] + 3), model(tokens))


def test_the_next_sentence_is_two_logits_from_the_first_token(tiny_model: Any) -> None:
    model = tiny_model("encoder", next_sentence=True, num_segments=2)
    tokens = texts(2)
    logits, follows = model(tokens)
    assert follows.shape == (2, 2)
    assert torch.equal(follows, model.next_sentence(model.hidden_states(tokens)[:, :1]))
    assert torch.equal(logits, model.token_logits(tokens))
    assert tiny_model("encoder").next_sentence is None


@pytest.mark.parametrize("classes", [1, 5])
def test_a_classifier_has_a_logit_for_each_class(classes: int, tiny_model: Any) -> None:
    model = tiny_model("encoder-classifier", num_classes=classes)
    assert model(texts(2)).shape == (2, classes)


def test_a_classifier_drops_what_it_pools_in_training(tiny_model: Any) -> None:
    model, hidden = tiny_model("encoder-classifier", num_classes=2, dropout=0.5), torch.randn(2, 3, 16).double()
    assert torch.equal(model.head(hidden), model.head(hidden))
    model.train()
    assert not torch.equal(model.head(hidden), model.head(hidden))
