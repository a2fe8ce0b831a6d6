"""The configuration of a run, on its way to disk and back."""

from __future__ import annotations

import json
import math
import re
from dataclasses import fields, replace
from typing import Any

import pytest

from minitransformer.errors import UserError
from minitransformer.models.config import ModelConfig
from minitransformer.training.config import DataConfig, RunConfig, TrainingConfig
from minitransformer.training.finetuning import fine_tuning
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


NUMBERS = [
    (part, field.name)
    for part in (ModelConfig, DataConfig, TrainingConfig)
    for field in fields(part)
    if "float" in str(field.type)
]


@pytest.mark.parametrize(("part", "name"), NUMBERS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e39])
def test_a_number_that_is_not_finite_in_float32_is_refused(part: type, name: str, value: float) -> None:
    with pytest.raises(UserError, match=re.escape(f"{name} is {value}: ")):
        part(**{name: value})


@pytest.mark.parametrize(("part", "name"), [(TrainingConfig, "eps"), (ModelConfig, "norm_eps")])
def test_an_epsilon_that_is_zero_in_float32_is_refused(part: type, name: str) -> None:
    for value in (1e-300, 1e-46, 0.0):
        with pytest.raises(UserError, match=re.escape(f"{name} is {value}")):
            part(**{name: value})
    part(**{name: 1e-30})


def test_a_run_from_before_a_part_of_validation_was_drawn_goes_on_reading_all() -> None:
    record = stored(RunConfig())
    del record["training"]["validation_tokens"]
    assert RunConfig.from_json(record, "config.json").training.validation_tokens == 0


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("new_data", [True, False])
def test_every_preset_can_be_fine_tuned_at_a_tenth_of_its_rates(preset: str, new_data: bool) -> None:
    parent = PRESETS[preset]
    tuned = fine_tuning(parent, from_scratch=True, new_data=new_data)
    assert tuned.model == parent.model
    assert tuned.training.lr == pytest.approx(parent.training.lr / 10)
    assert tuned.training.warmup_steps <= 20
    assert tuned.sequence_length <= min(1024, parent.model.context_length)
    again = fine_tuning(tuned, from_scratch=False, new_data=new_data)
    assert again.training == tuned.training
    assert tuned.data.lowercase == parent.data.lowercase


@pytest.mark.parametrize(
    ("choices", "words"),
    [
        ({"sequence_length": 0}, "sequence_length is 0: it must be at least 1"),
        ({"sequence_length": 257}, "sequence_length 257 is more than context_length 256"),
    ],
)
def test_a_sequence_length_that_no_run_can_have_is_refused(choices: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        RunConfig(training=TrainingConfig(**choices))


def test_pairs_have_no_sequence_length() -> None:
    preset = PRESETS["transformer-mini"]
    with pytest.raises(UserError, match="pairs are as long as they are"):
        replace(preset, training=replace(preset.training, sequence_length=16))
