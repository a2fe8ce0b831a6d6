"""The recurrent encoder-decoder: its attention and itself against their equations, and its counts."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from minitransformer.architecture.additive_attention import AdditiveAttention, additive_attention_weights
from minitransformer.architecture.init import Initialisation
from minitransformer.models.config import ModelConfig
from minitransformer.models.model import build_model, count_parameters
from minitransformer.models.recurrent import RecurrentEncoderDecoder
from tests.texts_for_tests import close, texts

D, LENGTH = 8, 6
SIZES = {"topology": "rnn", "d_model": D, "num_layers": 1, "context_length": 32, "vocab_size": 11}

# Attention


@given(queries=st.integers(1, 3), keys=st.integers(1, 5), masked=st.booleans())
def test_additive_attention_is_that_of_a_loop_in_float64(queries: int, keys: int, masked: bool) -> None:
    q, k, v = torch.randn(2, queries, 4).double(), torch.randn(2, keys, 4).double(), torch.randn(4).double()
    mask = torch.rand(2, queries, keys) < 0.6 if masked else None
    weights = additive_attention_weights(q, k, v, mask=mask)
    for b in range(2):
        for i in range(queries):
            scores = [
                math.exp(sum(v[f].item() * math.tanh(q[b, i, f].item() + k[b, j, f].item()) for f in range(4)))
                if mask is None or mask[b, i, j]
                else 0.0
                for j in range(keys)
            ]
            expected = [score / (sum(scores) or 1.0) for score in scores]
            close(weights[b, i], torch.tensor(expected, dtype=torch.float64))


def test_a_text_of_padding_alone_has_no_context_and_no_gradient_that_is_not_a_number(shake: Any) -> None:
    attention, state, annotations = shake(AdditiveAttention(3, 4, 5)), torch.randn(2, 3), torch.randn(2, 6, 4)
    is_token = torch.tensor([[True] * 6, [False] * 6])
    context = attention(state, annotations, attention.key(annotations), is_token)
    assert context[0].all()
    assert not context[1].any()
    context.sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in attention.parameters())


# The model


def reference(model: RecurrentEncoderDecoder, source: Tensor, inputs: Tensor) -> Tensor:
    """One text through a model of one layer, by the equations of the paper and of torch's GRU cell."""

    def step(gru: nn.GRU, suffix: str, x: Tensor, h: Tensor) -> Tensor:
        weights = [getattr(gru, f"{name}_l0{suffix}") for name in ("weight_ih", "bias_ih", "weight_hh", "bias_hh")]
        (xr, xz, xn), (hr, hz, hn) = (weights[0] @ x + weights[1]).chunk(3), (weights[2] @ h + weights[3]).chunk(3)
        reset, update = (xr + hr).sigmoid(), (xz + hz).sigmoid()
        return (1 - update) * (xn + reset * hn).tanh() + update * h

    words = model.embedding.table.weight[source]
    forward, backward = [torch.zeros(D).double()], [torch.zeros(D).double()]
    for word in words:
        forward.append(step(model.encoder, "", word, forward[-1]))
    for word in words.flip(0):
        backward.append(step(model.encoder, "_reverse", word, backward[-1]))
    annotations = torch.cat([torch.stack(forward[1:]), torch.stack(backward[:0:-1])], dim=1)
    state = (model.first_state.weight @ backward[-1] + model.first_state.bias).tanh()
    attention, logits = model.attention, []
    for word in model.target_embedding.table.weight[inputs]:
        scores = [(attention.query.weight @ state + attention.key.weight @ h).tanh() for h in annotations]
        context = (torch.stack(scores) @ attention.score.weight[0]).softmax(0) @ annotations
        state = step(model.decoder, "", torch.cat([word, context]), state)
        before = model.readout.weight @ torch.cat([state, word, context]) + model.readout.bias
        logits.append(model.head.weight @ torch.stack([before[::2], before[1::2]]).amax(0))
    return torch.stack(logits)


def test_the_model_is_its_equations(tiny_model: Any) -> None:
    model, source, inputs = tiny_model(**SIZES), texts(), texts(length=4)
    close(model(source, inputs)[0], reference(model, source[0], inputs[0]))


def test_padding_between_tokens_does_not_matter_either(tiny_model: Any) -> None:
    model, source, inputs, wide = tiny_model(**SIZES), texts(), texts(), texts(1, 9)
    is_token = torch.tensor([[True, False, True, True, False, False, True, True, True]])
    wide[is_token] = source[0]
    close(model(wide, inputs, source_is_token=is_token), model(source, inputs))
    wide[is_token] = inputs[0]
    close(model(source, wide, is_token=is_token)[is_token], model(source, inputs)[0])


def test_an_empty_source_is_an_empty_source_whatever_its_padding_holds(tiny_model: Any) -> None:
    model, inputs, nothing = tiny_model(**SIZES), texts(), torch.zeros(1, 4).bool()
    logits = [model(texts(1, 4), inputs, source_is_token=nothing) for _ in range(2)]
    assert logits[0].isfinite().all()
    close(logits[0], logits[1])


# Its weights


@pytest.mark.parametrize("name", Initialisation.registry)
def test_gates_start_with_orthogonal_recurrence_and_without_biases(name: str) -> None:
    model = build_model(ModelConfig(**{**SIZES, "init": name, "num_layers": 2, "d_model": 64}))
    for parameter_name, parameter in [*model.encoder.named_parameters(), *model.decoder.named_parameters()]:
        for gate in parameter.chunk(3):
            if parameter_name.startswith("bias"):
                assert not gate.any()
            elif parameter_name.startswith("weight_hh"):
                torch.testing.assert_close(gate @ gate.T, torch.eye(64), rtol=1e-4, atol=1e-5)
            else:
                expected = torch.empty_like(gate)
                Initialisation.choose(name).make().linear(expected)
                assert gate.std().item() == pytest.approx(expected.std().item(), rel=0.05)


def test_the_configuration_makes_it_and_its_parameters_are_counted_without_weights() -> None:
    config = ModelConfig(**SIZES)
    model = build_model(config)
    assert isinstance(model, RecurrentEncoderDecoder)
    encoder, decoder = 2 * 3 * D * (D + D + 2), 3 * D * (3 * D + D + 2)
    linears = (D * D + D) + (D * D + 2 * D * D + D) + (4 * D * 2 * D + 2 * D)
    assert model.num_parameters() == count_parameters(config) == 11 * D + encoder + decoder + linears


def test_flops_are_six_for_each_weight_of_a_product_and_those_of_attention(tiny_model: Any) -> None:
    gates = 2 * 3 * D * (D + D) + 3 * D * (3 * D + D)
    linears = D * D + (D * D + 2 * D * D + D) + 4 * D * 2 * D + 11 * D
    assert tiny_model(**SIZES).flops_per_token(10) == 6 * (gates + linears) + 6 * (D + 2 * D) * 10
