"""A model's configuration: one sentence for every value that no model can have."""

from __future__ import annotations

from dataclasses import FrozenInstanceError
from typing import Any

import pytest

from minitransformer.errors import UserError
from minitransformer.models.config import PRESETS, ModelConfig
from minitransformer.settings import all_declared, with_settings
from tests.runs_for_tests import chosen_for

BAD: list[tuple[dict[str, Any], str]] = [
    (
        {"d_model": 100, "num_heads": 3},
        "d_model 100 is not divisible by num_heads 3: choose a multiple, such as 99, or give head_dim",
    ),
    (
        {"d_model": 2, "num_heads": 8},
        "d_model 2 is not divisible by num_heads 8: choose a multiple, such as 8, or give head_dim",
    ),
    ({"num_heads": 4, "num_kv_heads": 3}, "num_heads 4 is not divisible by num_kv_heads 3: choose a divisor"),
    ({"num_heads": 4, "num_kv_heads": 8}, "num_heads 4 is not divisible by num_kv_heads 8: choose a divisor"),
    ({"dropout": 1.0}, "dropout is 1.0: it must be at least 0 and below 1"),
    ({"dropout": -0.1}, "dropout is -0.1: it must be at least 0 and below 1"),
    ({"dropout": float("nan")}, "dropout is nan: it must be finite, in float32 too"),
    ({"norm_eps": 0.0}, "norm_eps is 0.0: it must be at least 1.2e-38, as less is 0 in float32"),
    ({"rotary_fraction": 1.5}, "rotary_fraction is 1.5: it must be above 0 and at most 1"),
    (
        {"num_experts": 2, "experts_per_token": 3},
        "experts_per_token 3 is greater than num_experts 2: lower it",
    ),
    (
        {"block": "parallel-two-norms", "residual": "post"},
        "block 'parallel-two-norms' needs residual 'pre', not 'post': choose 'pre'",
    ),
    (
        {"block": "parallel", "residual": "b2t"},
        "residual 'b2t' adds the input of a block to the output of its feed-forward network, and in a parallel block "
        "that is Post-LN: choose --block sequential, or --residual post",
    ),
    (
        {"num_layers": 3, "residual": "mix"},
        "residual 'mix' has Post-LN in the first quarter of the layers, and 3 layers have none: "
        "choose at least 4, or --residual pre",
    ),
    (
        {"topology": "encoder-decoder", "num_layers": 8, "num_decoder_layers": 2, "residual": "mix"},
        "residual 'mix' has Post-LN in the first quarter of the layers, and 2 layers have none: "
        "choose at least 4, or --residual pre",
    ),
    (
        {"norm": "dyt", "residual": "residual-scaled"},
        "residual 'residual-scaled' scales a stream, which norm 'dyt' does not undo: "
        "choose --residual residual, or another --norm",
    ),
    (
        {"num_classes": 3},
        "topology 'decoder' has no classes, and num_classes is 3: leave it out",
    ),
    (
        {"next_sentence": True},
        "next_sentence needs two segments, and num_segments is None: set it to 2",
    ),
    (
        {"head": "transformed", "embedding_dim": 8},
        "head 'transformed' cannot be combined with embedding_dim 8: leave one of them out",
    ),
    (
        {"first_norm": False, "residual": "post"},
        "first_norm has no effect with residual 'post': leave it out, or choose 'pre'",
    ),
    (
        {"transform_bias": False},
        "transform_bias has no effect with head 'linear': leave it out, or choose 'transformed'",
    ),
    ({"window_pattern": ()}, "window_pattern is empty: give True or False for at least one layer"),
]


@pytest.mark.parametrize(("choices", "sentence"), BAD, ids=lambda value: str(value) if isinstance(value, dict) else "")
def test_a_bad_value_gives_one_sentence_that_names_it_and_its_remedy(choices: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError) as caught:
        with_settings(ModelConfig(), choices)
    assert str(caught.value) == sentence


WHOLE = list(dict.fromkeys(each.name for each in all_declared(ModelConfig) if each.kind in (int, int | None)))


@pytest.mark.parametrize("value", [0, -3])
@pytest.mark.parametrize("name", WHOLE)
def test_every_size_must_be_at_least_one(name: str, value: int) -> None:
    with pytest.raises(UserError) as caught:
        with_settings(ModelConfig(), {**chosen_for(ModelConfig, name), name: value})
    least = "at least 2 and at most 6" if name == "mhc_lite_streams" else "at least 1"
    assert str(caught.value) == f"{name} is {value}: it must be {least}"


def test_sizes_are_all_there() -> None:
    expected = (
        "d_model num_layers num_decoder_layers num_heads num_kv_heads head_dim d_ff context_length vocab_size "
        "target_vocab_size num_segments num_classes mhc_lite_streams rotary_original_length t5_buckets t5_max_distance "
        "num_experts experts_per_token attention_window embedding_dim int4_group_size lora_rank soft_prompt_tokens"
    )
    assert expected.split() == WHOLE


@pytest.mark.parametrize(
    ("field", "kind", "misspelt", "nearest"),
    [
        ("residual", "residual placement", "residul", "residual"),
        ("norm", "norm", "layernorm", "layer"),
        ("positions", "position scheme", "rotry", "rotary"),
        ("feedforward", "feed-forward network", "gelu_tanh", "gelu-tanh"),
        ("attention_kernel", "attention kernel", "by_hand", "by-hand"),
        ("init", "initialisation", "gpt-2", "gpt2"),
    ],
)
def test_an_unknown_name_is_answered_with_the_nearest(field: str, kind: str, misspelt: str, nearest: str) -> None:
    with pytest.raises(UserError, match=f"^unknown {kind} '{misspelt}': did you mean '{nearest}'\\? known are "):
        ModelConfig(**{field: misspelt})


def test_a_configuration_is_frozen_and_equal_to_its_likes() -> None:
    config = ModelConfig()
    with pytest.raises(FrozenInstanceError):
        config.d_model = 3  # type: ignore[misc]
    assert config == ModelConfig(**vars(config))
    assert hash(config) == hash(ModelConfig())


def test_features_of_a_head_are_those_given_or_a_share_of_d_model() -> None:
    assert ModelConfig(d_model=64, num_heads=4).features_per_head == 16
    assert ModelConfig(d_model=65, num_heads=4, head_dim=10).features_per_head == 10


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_a_model_that_is_allowed(name: str) -> None:
    assert ModelConfig(**vars(PRESETS[name])) == PRESETS[name]
