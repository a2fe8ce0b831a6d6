"""Every part of the registries in every topology: it runs, and its gradients are finite and reach every weight."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from minitransformer.architecture.attention import QK_NORMS
from minitransformer.architecture.block import Block
from minitransformer.architecture.feedforward import FeedForward
from minitransformer.architecture.init import Initialisation
from minitransformer.architecture.kernels import KERNELS
from minitransformer.architecture.linear import ScoreProjection
from minitransformer.architecture.norms import Norm
from minitransformer.architecture.positions import PositionScheme
from minitransformer.architecture.rotary_scaling import RotaryScaling
from minitransformer.errors import UserError
from minitransformer.models.config import ModelConfig
from minitransformer.models.model import Model, build_model
from minitransformer.settings import with_settings
from tests.placements_for_tests import EVERY_PLACEMENT

SIZES = {"d_model": 16, "num_layers": 2, "num_heads": 4, "context_length": 16, "vocab_size": 11}
TOPOLOGIES: dict[str, dict[str, Any]] = {
    "decoder": {},
    "encoder": {},
    "encoder-classifier": {"num_classes": 3},
    "decoder-classifier": {"num_classes": 3},
    "encoder-headless": {},
    "encoder-decoder": {},
}
STACKS = {
    "decoder": ["stack"],
    "encoder": ["stack"],
    "encoder-classifier": ["stack"],
    "decoder-classifier": ["stack"],
    "encoder-headless": ["stack"],
    "encoder-decoder": ["encoder", "decoder"],
}
every_topology = pytest.mark.parametrize("topology", TOPOLOGIES)
PARTS: list[dict[str, Any]] = [
    *EVERY_PLACEMENT,
    *({"positions": name} for name in PositionScheme.registry),
    # Not every bias: softmax does not see that of the keys in cross-attention.
    *({"norm": name, "attention_output_bias": True} for name in Norm.registry),
    {"norm": "layer", "norm_bias": True},
    {"norm": "dyt", "norm_bias": True},
    *({"feedforward": name} for name in FeedForward.registry),
    *({"feedforward": name, "num_experts": 2} for name in FeedForward.registry),
    *({"qk_norm": name, "norm": "rms"} for name in QK_NORMS),
    *({"block": name} for name in Block.registry),
    *({"attention_kernel": name} for name in KERNELS),
    *({"rotary_scaling": name, "rotary_fraction": 0.5} for name in RotaryScaling.registry),
    *({"rotary_scaling": name, "rotary_factor": 4.0} for name in ("linear", "llama3")),
    {"embedding_dim": 6, "num_kv_heads": 1, "logit_softcap": 3.0, "attention_softcap": 2.0},
    {"head": "transformed", "head_bias": True, "tied_embeddings": False, "embedding_norm": True},
    {"token_smear": True},
    {"first_norm": False, "embedding_norm": True, "attention_window": 3},
]


OF_A_LANGUAGE_MODEL = {"head", "head_bias", "tied_embeddings", "logit_softcap"}
"""settings of what predicts tokens, refused by a model that predicts none"""


def make(topology: str, **choices: Any) -> Model:
    if topology in ("encoder-classifier", "decoder-classifier", "encoder-headless"):
        choices = {name: value for name, value in choices.items() if name not in OF_A_LANGUAGE_MODEL}
    return build_model(with_settings(ModelConfig(), {**SIZES, "topology": topology, **TOPOLOGIES[topology], **choices}))


def outputs(model: Model) -> Tensor:
    every_token = torch.arange(11)[None]
    texts = [every_token, every_token.flip(1)] if model.config.topology == "encoder-decoder" else [every_token]
    return model(*texts)


@every_topology
@pytest.mark.parametrize("choices", PARTS, ids=str)
def test_every_part_sends_finite_gradients_to_every_weight(topology: str, choices: dict[str, Any], shake: Any) -> None:
    # Without any norm, the shaken weights would saturate a tanh.
    pooling = (
        {"pooling": "relu"}
        if topology in ("encoder-classifier", "decoder-classifier") and "residual" in choices
        else {}
    )
    model = shake(make(topology, **choices, **pooling)).double()
    for module in model.modules():
        if isinstance(module, ScoreProjection):
            module.weight.data.mul_(0.01)  # where no norm bounds them, scores would give one key everything
    outputs(model).sin().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name


@every_topology
@pytest.mark.parametrize("name", Initialisation.registry)
def test_every_initialisation_starts_with_finite_logits(topology: str, name: str) -> None:
    assert outputs(make(topology, init=name)).isfinite().all()


def test_an_unknown_head_is_answered_with_the_nearest() -> None:
    with pytest.raises(UserError, match="unknown head 'transform': did you mean 'transformed'"):
        ModelConfig(head="transform")


@every_topology
def test_no_weight_is_forgotten_by_the_state_dict(topology: str, shake: Any) -> None:
    model, other = shake(make(topology)), shake(make(topology))
    assert not torch.equal(outputs(other), outputs(model))
    other.load_state_dict(model.state_dict())
    assert torch.equal(outputs(other), outputs(model))


def test_flops_count_every_attention_and_no_idle_expert() -> None:
    sizes: dict[str, Any] = {"num_decoder_layers": 3, "d_ff": 20, "feedforward": "gelu"}
    plain = make("encoder-decoder", **sizes).flops_per_token(10)
    attentions = 2 + 2 * 3  # the encoder's, and two in each block of the decoder
    assert plain == 6 * (attentions * 4 * 16 * 16 + 5 * 2 * 16 * 20 + 11 * 16) + 12 * attentions * 16 * 10
    experts = make("encoder-decoder", **sizes, num_experts=4, experts_per_token=1).flops_per_token(10)
    assert experts == plain + 6 * 5 * 4 * 16  # the routers


@every_topology
def test_a_window_is_where_the_pattern_says_and_the_pattern_repeats(topology: str) -> None:
    model = make(topology, num_layers=5, attention_window=3, window_pattern=(True, True, False))
    for stack in STACKS[topology]:
        assert getattr(model, stack).windows == [3, 3, None, 3, 3]


@pytest.mark.parametrize("pattern", [(True, False), (False, True)], ids=str)
def test_a_layer_without_the_window_sees_everything(pattern: tuple[bool, ...], shake: Any) -> None:
    def last_logit_sees(tokens: Tensor, **choices: Any) -> list[bool]:
        model = shake(make("decoder", attention_window=2, **choices)).double().eval()
        before = model(tokens)[:, -1]
        changes = [tokens.index_copy(1, torch.tensor([i]), (tokens[:, [i]] + 1) % 11) for i in range(tokens.size(1))]
        return [not torch.equal(model(changed)[:, -1], before) for changed in changes]

    tokens = torch.randint(0, 11, (1, 8))
    assert last_logit_sees(tokens) == [False] * 5 + [True] * 3
    assert all(last_logit_sees(tokens, window_pattern=pattern))
