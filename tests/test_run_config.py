"""The configuration of a run, on its way to disk and back."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from minitransformer.errors import UserError
from minitransformer.models.config import ModelConfig
from minitransformer.training.config import RunConfig
from minitransformer.training.presets import PRESETS


def stored(config: RunConfig) -> dict[str, Any]:
    return json.loads(json.dumps(config.to_json()))


@pytest.mark.parametrize("preset", PRESETS)
def test_a_configuration_comes_back_from_disk_as_it_was(preset: str) -> None:
    assert RunConfig.from_json(stored(PRESETS[preset]), "config.json") == PRESETS[preset]


def test_a_run_that_is_older_than_a_setting_has_its_default() -> None:
    config = RunConfig()
    changed = replace(config, training=replace(config.training, steps=7))
    record = stored(changed)
    del record["training"]["eps"]
    assert RunConfig.from_json(record, "config.json") == changed


@pytest.mark.parametrize("residual", ["hybrid", "hybrid-star"])
def test_an_older_hybridnorm_still_normalises_all_features_together(residual: str) -> None:
    record = stored(RunConfig(ModelConfig(residual=residual)))
    assert RunConfig.from_json(record, "config.json").model.qk_norm == "none"  # by head, as its authors have it
    del record["model"]["value_norm"]
    assert RunConfig.from_json(record, "config.json").model.qk_norm == "full"
    record["model"]["qk_norm"] = "head"
    assert RunConfig.from_json(record, "config.json").model.qk_norm == "head"


@pytest.mark.parametrize("part", ["model", "data", "training"])
def test_a_setting_that_nothing_here_knows_is_refused(part: str) -> None:
    record = stored(RunConfig())
    record[part]["telepathy"] = True
    with pytest.raises(UserError, match=r"^x/config\.json has settings that are unknown here \(telepathy\)"):
        RunConfig.from_json(record, "x/config.json")
