"""A member of every family of public checkpoints is compressed by every method, or refused in one sentence."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from minitransformer import pretrained
from minitransformer.compression.calibration import Calibration
from minitransformer.compression.request import CompressionConfig
from minitransformer.errors import UserError
from minitransformer.generation.config import SamplingConfig
from minitransformer.generation.decode import generate
from minitransformer.models.config import ModelConfig
from minitransformer.models.decoder import DecoderLM
from minitransformer.models.model import Model, build_in_parts, build_model, in_full_precision
from minitransformer.pretrained.families import Family
from minitransformer.settings import with_settings
from minitransformer.text.datasets import PreparedData
from minitransformer.text.tokenizers import Bytes
from minitransformer.training.config import DataConfig, RunConfig, TrainingConfig

SHAPE = {"vocab_size": 384, "d_model": 16, "num_layers": 2, "num_heads": 2, "d_ff": 16, "context_length": 64}
# What some families have, and others not: a member is as unusual as its family allows.
UNUSUAL: list[dict[str, Any]] = [
    {"positions": "alibi-falcon"},
    {"attention_window": 4, "window_pattern": (True, False)},
    {"rotary_layers": (True, False)},
    {"rotary_window_base": 50.0},
    {"qk_norm": "each-head"},
    {"block": "parallel"},
    {"qkv_bias": True},
]
BIASED = ("t5", "alibi", "alibi-falcon")
OBJECTIVES = {"decoder": "causal", "encoder": "masked", "encoder-decoder": "span-corruption"}
METHODS: dict[str, dict[str, Any]] = {
    "int8": {"method": "int8"},
    "int4": {"method": "int4"},
    "heads": {"method": "prune", "prune_heads": 1, "prune_units": 0.25},
    "layers": {"method": "drop-layers", "drop_layers_count": 1},
}


def member_of(family: type[Family]) -> ModelConfig:
    config = with_settings(ModelConfig(), {**SHAPE, "topology": next(iter(family.architectures))})
    config = with_settings(config, {found.setting: found.choice for found in family.obstacles(config)})
    for choices in UNUSUAL:
        with suppress(UserError):  # it does not go with the others
            changed = with_settings(config, choices)
            config = config if family.obstacles(changed) else changed
    return config


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[RunConfig, PreparedData]]:
    """For each topology, a configuration, and the data that it prepares."""
    file = tmp_path_factory.mktemp("data") / "text.txt"
    file.write_text("The quick brown fox jumps over the lazy dog.\n" * 40)
    found = {}
    for topology, objective in OBJECTIVES.items():
        model = with_settings(ModelConfig(), {**SHAPE, "topology": topology})
        data = DataConfig(data=str(file), tokenizer=Bytes.choose())
        config = RunConfig(model, data, TrainingConfig(objective=objective, batch_size=2))
        found[topology] = config, config.prepare(None)
    return found


def outputs(model: Model) -> Tensor:
    tokens = torch.randint(256, (2, 10), generator=torch.Generator().manual_seed(0))
    inputs = (tokens, tokens) if model.config.topology == "encoder-decoder" else (tokens,)
    with torch.inference_mode():
        return model(*inputs)


def compressed(config: ModelConfig, choices: dict[str, Any], run: tuple[RunConfig, PreparedData]) -> Model:
    torch.manual_seed(0)
    model = build_model(config).eval()
    for weight in model.parameters():
        weight.data.add_(torch.randn_like(weight) * 0.1)
    method = with_settings(CompressionConfig(), choices).method.make()
    method.check(model)
    calibration = Calibration(replace(run[0], model=config), run[1], 32) if method.calibrates else None
    return method.applied(model, calibration)


@pytest.mark.unchecked_shapes
@pytest.mark.parametrize("name", Family.registry)
def test_each_method_makes_a_model_like_any_other_or_says_why_not(
    name: str, runs: dict[str, tuple[RunConfig, PreparedData]], tmp_path: Path
) -> None:
    family = Family.named(name)
    config = member_of(family)
    tells_heads_apart = config.positions.name in BIASED or config.qk_norm in ("full", "each-head")
    for method, choices in METHODS.items():
        if method == "heads" and tells_heads_apart:
            with pytest.raises(UserError, match=r"leave --prune-heads out$"):
                compressed(config, choices, runs[config.topology])
            continue
        model = compressed(config, choices, runs[config.topology])
        opened = build_in_parts(model.config).eval()
        opened.load_state_dict(model.state_dict())
        whole = in_full_precision(opened)
        assert torch.equal(outputs(opened), outputs(model))
        if method == "int4" and isinstance(opened, DecoderLM):
            sampling = SamplingConfig(temperature=0.0, max_new_tokens=2)
            assert [*generate(opened, [1, 2, 3], sampling)] == [*generate(whole, [1, 2, 3], sampling)]
        # Heads that are narrower than all of them together, or another first layer, are not in every family.
        if not family.obstacles(whole.config) or method in ("int8", "int4"):
            pretrained.save(opened, tmp_path / method, name)
            back, _ = pretrained.load(tmp_path / method)
            torch.testing.assert_close(outputs(back), outputs(whole), rtol=0, atol=1e-5)
