"""What an export accepts, `transformers` opens with the same logits; what an import accepts means the same to both."""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from minitransformer import pretrained
from minitransformer.architecture.attention import QK_NORMS
from minitransformer.architecture.block import Block
from minitransformer.architecture.embeddings import POOLING_ACTIVATIONS
from minitransformer.architecture.feedforward import FeedForward
from minitransformer.architecture.norms import Norm
from minitransformer.architecture.positions import PositionScheme
from minitransformer.architecture.residual import Residual
from minitransformer.architecture.rotary_scaling import RotaryScaling
from minitransformer.errors import UserError
from minitransformer.models.config import HEADS, ModelConfig
from minitransformer.models.model import Model, build_model
from minitransformer.pretrained.families import Family
from minitransformer.settings import with_settings
from tests.members_for_tests import FLOAT32, MEMBERS, VOCABULARY, reopened_difference

library = pytest.importorskip("transformers")
Changes = dict[str, Any]

BIASES = [None, True, False]
# For every setting that may stand in the way of a format, values on both sides.
SETTINGS: dict[str, list[Any]] = {
    "d_model": [32, 48],
    "num_layers": [1, 3],
    "num_decoder_layers": [None, 1],
    "num_heads": [2, 3],
    "num_kv_heads": [None, 1, 2],
    "head_dim": [None, 6, 10],
    "d_ff": [None, 40],
    "context_length": [16, 40],
    "num_segments": [None, 1, 3],
    "next_sentence": [False, True],
    "num_classes": [1, 2],
    "pooling": list(POOLING_ACTIVATIONS),
    "pooled": ["first", "mean"],
    "pooled_norm": [False, True],
    "first_norm": [True, False],
    "transform_bias": [True, False],
    "block": list(Block.registry),
    "residual": list(Residual.registry),
    "norm": list(Norm.registry),
    "norm_eps": [1e-5, 1e-12, 1e-3],
    "norm_bias": BIASES,
    "embedding_norm": [True, False],
    "positions": list(PositionScheme.registry),
    "rotary_base": [500.0],
    "rotary_fraction": [1.0, 0.5, 0.75],
    "rotary_scaling": list(RotaryScaling.registry),
    "rotary_factor": [2.0],
    "rotary_low_freq_factor": [2.0],
    "rotary_high_freq_factor": [3.0],
    "rotary_original_length": [16],
    "rotary_beta_fast": [4.0],
    "rotary_beta_slow": [0.5],
    "rotary_magnitude": [None, 1.5],
    "rotary_whole_pairs": [True, False],
    "rotary_window_base": [None, 20.0],
    "rotary_layers": [(True,), (True, False), (False, True, True)],
    "pre_scaled_multiplier": [0.5],
    "embedding_scale": [0.7],
    "t5_buckets": [8],
    "t5_max_distance": [10],
    "feedforward": list(FeedForward.registry),
    "num_experts": [None, 1, 4],
    "experts_per_token": [1, 2],
    "bias": [True, False],
    "qkv_bias": BIASES,
    "attention_output_bias": BIASES,
    "qk_norm": list(QK_NORMS),
    "attention_scale": [None, 1.0, 0.3],
    "qkv_clip": [None, 0.5],
    "attention_softcap": [None, 5.0],
    "attention_window": [None, 5, 16],
    "window_pattern": [(True,), (True, False), (False, True), (False,)],
    "head": list(HEADS),
    "head_bias": [True, False],
    "logit_scale": [1.0, 0.5],
    "logit_softcap": [None, 3.0],
    "tied_embeddings": [True, False],
    "shared_embeddings": [True, False],
    "scaled_embeddings": [True, False],
    "embedding_dim": [None, 16],
    "token_smear": [False, True],
    "target_vocab_size": [None, 30],
}
SINGLE: list[Changes] = [{name: value} for name, values in SETTINGS.items() for value in values]


@cache
def member(name: str) -> tuple[str, ModelConfig]:
    """The family of a member and our configuration of it."""
    chosen = MEMBERS[name]
    config_class = getattr(library, chosen.architecture).config_class
    hf = {**config_class(vocab_size=VOCABULARY, **chosen.choices).to_dict(), "architectures": [chosen.architecture]}
    return config_class.model_type, Family.named(config_class.model_type).model_config(hf)


def variants(name: str, changes: list[Changes]) -> Iterator[ModelConfig]:
    """The changed members that are models, and that the family holds."""
    model_type, config = member(name)
    for change in changes:
        try:
            changed = with_settings(config, change)
            build_model(changed)
        except UserError:
            continue
        with suppress(UserError):  # of a shape that the family cannot have
            if not Family.named(model_type).obstacles(changed):
                yield changed


@torch.no_grad()
def drawn(model: Model) -> Model:
    """`model` with other weights, of a size at which T5's scores, which nothing scales, are no matter of rounding."""
    for weight in model.parameters():
        weight.normal_(std=0.2).add_(1.0 if weight.dim() == 1 else 0.0)
    return model


def check(name: str, changes: list[Changes], tmp_path: Path) -> int:
    """Export all variants, and have them opened; returns their number."""
    family, _ = member(name)
    done = set()
    for config in variants(name, changes):
        if config in done:
            continue
        done.add(config)
        torch.manual_seed(0)
        model = drawn(build_model(config)).eval()
        pretrained.save(model, tmp_path / "copy", family)
        assert reopened_difference(model, tmp_path / "copy") <= 2 * FLOAT32, config
        again, _ = pretrained.load(tmp_path / "copy")
        assert Family.named(family).hf_config(again.config) == Family.named(family).hf_config(config)
        shutil.rmtree(tmp_path / "copy")
    return len(done)


# What the library has ignored, or could not open.
TREACHEROUS: list[Changes] = [
    {"rotary_fraction": 0.5},
    {"rotary_fraction": 0.5, "rotary_scaling": "linear", "rotary_factor": 2.0},
    {"num_segments": None},
    {"attention_window": None},
    {"feedforward": "relu"},
    {"num_experts": None},
]


@pytest.mark.parametrize("name", MEMBERS)
def test_a_setting_that_an_export_accepts_is_opened_with_the_same_logits(name: str, tmp_path: Path) -> None:
    check(name, TREACHEROUS, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", MEMBERS)
def test_every_setting_that_an_export_accepts_is_opened_with_the_same_logits(name: str, tmp_path: Path) -> None:
    chance = random.Random(name)
    several = [
        {setting: chance.choice(SETTINGS[setting]) for setting in chance.sample(list(SETTINGS), chance.choice([2, 3]))}
        for _ in range(30)
    ]
    # A setting of a variant that a member has not chosen is no change, and refused.
    assert check(name, [*SINGLE, *several], tmp_path) > 10


@pytest.mark.parametrize("name", MEMBERS)
def test_a_field_that_is_left_out_means_what_the_library_takes_it_for(name: str) -> None:
    chosen = MEMBERS[name]
    config_class = getattr(library, chosen.architecture).config_class
    family = Family.named(config_class.model_type)
    whole = {**config_class(vocab_size=VOCABULARY, **chosen.choices).to_dict(), "architectures": [chosen.architecture]}
    read = 0
    for field in whole.keys() - {"architectures", "model_type"}:
        partial = {key: value for key, value in whole.items() if key != field}
        try:
            ours = family.model_config(partial)
            completed = config_class.from_dict(partial).to_dict()
            theirs = family.model_config({**completed, "architectures": [chosen.architecture]})
        except (UserError, ValueError):
            continue
        read += 1
        # Sizes that are not said show in the tensors, whose shapes are compared.
        sizes = {name: getattr(theirs, name) for name in ("num_kv_heads", "head_dim", "d_ff", "num_decoder_layers")}
        assert with_settings(ours, sizes) == theirs, field
    assert read > 10


WHOLE_HEADS = ("falcon", "llama", "mistral", "mixtral", "qwen2", "qwen3", "olmo2", "gemma2", "cohere", "granite")


@pytest.mark.parametrize("family", WHOLE_HEADS)
def test_a_fraction_of_a_head_that_the_library_ignores_is_refused_both_ways(family: str) -> None:
    name = next(name for name in MEMBERS if member(name)[0] == family)
    _, config = member(name)
    hf = Family.named(family).hf_config(config)
    with pytest.raises(UserError, match=f"rotary_fraction is 0.5, and {family} can only hold 1.0"):
        Family.named(family).hf_config(with_settings(config, {"rotary_fraction": 0.5}))
    for spelling in ({"partial_rotary_factor": 0.5}, {"rope_parameters": {"partial_rotary_factor": 0.5}}):
        with pytest.raises(
            UserError, match=f"partial_rotary_factor is 0.5 in config.json: {family} rotates whole heads"
        ):
            Family.named(family).model_config({**hf, **spelling})
    whole = Family.named(family).model_config({**hf, "partial_rotary_factor": 1.0})
    assert Family.named(family).hf_config(whole) == hf
