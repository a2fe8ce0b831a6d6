"""The configuration of a run, on its way to disk and back."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from typing import Any

import pytest

from minitransformer.errors import UserError
from minitransformer.models.config import ModelConfig
from minitransformer.settings import all_declared, flat_values, with_settings
from minitransformer.text.datasets import Pairs
from minitransformer.training.config import DataConfig, RunConfig, TrainingConfig
from minitransformer.training.finetuning import fine_tuning
from minitransformer.training.objectives import Masked, Seq2Seq
from minitransformer.training.presets import PRESETS
from tests.runs_for_tests import chosen_for


def stored(config: RunConfig) -> dict[str, Any]:
    return json.loads(json.dumps(config.to_json()))


def in_format_1(config: RunConfig) -> dict[str, Any]:
    """As versions wrote it in which every setting stood flat."""
    parts = {"model": config.model, "data": config.data, "training": config.training}
    return json.loads(json.dumps({name: flat_values(part) for name, part in parts.items()}))


@pytest.mark.parametrize("preset", PRESETS)
def test_a_configuration_whose_settings_were_flat_is_read_as_it_was_meant(preset: str) -> None:
    assert RunConfig.from_json(in_format_1(PRESETS[preset]), "config.json") == PRESETS[preset]


def test_settings_of_variants_that_were_not_chosen_fall_away_with_the_flat_format() -> None:
    record = in_format_1(RunConfig(ModelConfig(positions="alibi")))
    record["model"] |= {"rotary_base": 500.0, "t5_buckets": 7}
    assert RunConfig.from_json(record, "config.json").model == ModelConfig(positions="alibi")


def test_what_stood_in_training_and_belongs_to_an_objective_or_to_pairs_is_found_there() -> None:
    """As versions of format 1 wrote it: every setting of every objective in training, those of pairs in both parts."""
    record = in_format_1(PRESETS["transformer-mini"])
    for name in ("data_kind", "batch_tokens"):
        del record["data"][name]
    record["data"] |= {"lowercase": True, "target_data": "x", "too_long": "cut"}
    record["training"] |= {"batch_tokens": 77, "label_smoothing": 0.2, "mask_probability": 0.3, "mean_span": 4.0}
    config = RunConfig.from_json(record, "config.json")
    pairs = Pairs.choose(lowercase=True, target_data="x", too_long="cut", batch_tokens=77)
    assert (config.data.dataset, config.training.objective) == (pairs, Seq2Seq.choose(label_smoothing=0.2))
    text = in_format_1(RunConfig(ModelConfig(topology="encoder"), training=TrainingConfig(objective="masked")))
    del text["data"]["data_kind"]
    text["training"] |= {"batch_tokens": 77, "label_smoothing": 0.2, "mask_probability": 0.3}
    assert RunConfig.from_json(text, "config.json").training.objective == Masked.choose(probability=0.3)


def test_a_format_of_the_future_is_refused() -> None:
    with pytest.raises(UserError, match=r"^x/config\.json has format 99, and this version reads up to"):
        RunConfig.from_json({**stored(RunConfig()), "format": 99}, "x/config.json")


@pytest.mark.parametrize("preset", PRESETS)
def test_a_configuration_comes_back_from_disk_as_it_was(preset: str) -> None:
    assert RunConfig.from_json(stored(PRESETS[preset]), "config.json") == PRESETS[preset]


def test_a_run_that_is_older_than_a_setting_has_its_default() -> None:
    config = RunConfig()
    changed = replace(config, training=replace(config.training, steps=7))
    record = stored(changed)
    del record["training"]["optimizer"]["eps"]
    assert RunConfig.from_json(record, "config.json") == changed


@pytest.mark.parametrize("residual", ["hybrid", "hybrid-star"])
def test_an_older_hybridnorm_still_normalises_all_features_together(residual: str) -> None:
    record = in_format_1(RunConfig(ModelConfig(residual=residual)))
    assert RunConfig.from_json(record, "config.json").model.qk_norm == "none"  # by head, as its authors have it
    del record["model"]["value_norm"]
    assert RunConfig.from_json(record, "config.json").model.qk_norm == "full"
    record["model"]["qk_norm"] = "head"
    assert RunConfig.from_json(record, "config.json").model.qk_norm == "head"


@pytest.mark.parametrize("part", ["model", "data", "training"])
def test_a_setting_that_nothing_here_knows_is_refused(part: str) -> None:
    record = stored(RunConfig())
    record[part]["telepathy"] = True
    with pytest.raises(UserError, match=r"^x/config\.json has unknown settings \(telepathy\)"):
        RunConfig.from_json(record, "x/config.json")


NUMBERS = [
    (part, each.name, "tuple" in str(each.kind))
    for part in (ModelConfig, DataConfig, TrainingConfig)
    for each in all_declared(part)
    if "float" in str(each.kind)
]


@pytest.mark.parametrize(("part", "name", "several"), NUMBERS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e39])
def test_a_number_that_is_not_finite_in_float32_is_refused(part: type, name: str, several: bool, value: float) -> None:
    with pytest.raises(UserError, match=re.escape(f"{name} is {value}: ")):
        with_settings(part(), {**chosen_for(part, name), name: (1.0, value) if several else value})


@pytest.mark.parametrize(("part", "name"), [(TrainingConfig, "eps"), (ModelConfig, "norm_eps")])
def test_an_epsilon_that_is_zero_in_float32_is_refused(part: type, name: str) -> None:
    for value in (1e-300, 1e-46, 0.0):
        with pytest.raises(UserError, match=re.escape(f"{name} is {value}")):
            with_settings(part(), {name: value})
    with_settings(part(), {name: 1e-30})


def test_a_run_from_before_a_part_of_validation_was_drawn_goes_on_reading_all() -> None:
    record = in_format_1(RunConfig())
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
    assert tuned.data.dataset.settings == parent.data.dataset.settings


@pytest.mark.parametrize(
    ("choices", "words"),
    [
        ({"sequence_length": 0}, "sequence_length is 0: it must be at least 1"),
        ({"sequence_length": 257}, "sequence_length 257 is greater than context_length 256"),
    ],
)
def test_a_sequence_length_that_no_run_can_have_is_refused(choices: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        RunConfig(training=TrainingConfig(**choices))


def test_pairs_have_no_sequence_length() -> None:
    preset = PRESETS["transformer-mini"]
    with pytest.raises(UserError, match="pairs keep their own length"):
        replace(preset, training=replace(preset.training, sequence_length=16))
