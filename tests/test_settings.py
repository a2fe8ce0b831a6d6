"""Laws of settings, nested in JSON and flat by name, refused where they do not belong; and of variants by name."""

from __future__ import annotations

import json
from collections import defaultdict
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minitransformer.errors import UserError
from minitransformer.registry import Registered, lookup
from minitransformer.settings import (
    Declared,
    all_declared,
    flat,
    flat_values,
    flattened,
    from_json,
    kinds,
    to_json,
    with_settings,
)
from minitransformer.training.config import RunConfig
from minitransformer.training.presets import PRESETS
from tests.runs_for_tests import chosen_for

DECLARED = list(all_declared(RunConfig))
CHOICES = [each for each in DECLARED if each.family is not None]
OF_VARIANTS = [each for each in DECLARED if each.variant is not None]


presets = st.sampled_from(list(PRESETS.values()))
variants = st.permutations(CHOICES).flatmap(
    lambda choices: st.tuples(*(st.tuples(st.just(c.name), st.sampled_from(list(c.family.registry))) for c in choices))
)
"""a name for every choice, in any order"""


def configuration(preset: RunConfig, variants: tuple[tuple[str, str], ...]) -> RunConfig:
    """`preset` with these variants, as far as they go together."""
    for choice, name in variants:
        with suppress(UserError):
            preset = with_settings(preset, {choice: name})
    return preset


def through_json(config: RunConfig) -> dict[str, Any]:
    return json.loads(json.dumps(to_json(config)))


@given(presets, variants)
def test_what_json_holds_is_what_it_was(preset: RunConfig, variants: tuple[tuple[str, str], ...]) -> None:
    config = configuration(preset, variants)
    for part, again in through_json(config).items():
        before = getattr(config, part)
        assert from_json(type(before), again, "config.json") == before


@given(presets, variants)
def test_json_made_flat_holds_every_setting_by_its_flat_name(
    preset: RunConfig, variants: tuple[tuple[str, str], ...]
) -> None:
    config = configuration(preset, variants)
    parts = [flattened(RunConfig, part) for part in to_json(config).values()]
    found = {name: value for part in parts for name, value in part.items()}
    assert found == flat_values(config)
    assert flat(config).items() <= found.items()


@given(presets, presets, variants)
def test_flat_settings_lead_from_any_configuration_to_any_other(
    start: RunConfig, preset: RunConfig, variants: tuple[tuple[str, str], ...]
) -> None:
    end = configuration(preset, variants)
    defaults = {each.name: each.default for each in DECLARED if not (each.family or each.variant)}
    assert flat(with_settings(start, defaults | flat(end))) == flat(end)


@pytest.mark.parametrize("each", OF_VARIANTS, ids=lambda each: f"{each.variant.name} {each.name}")
def test_a_setting_of_a_variant_that_is_not_chosen_is_refused_by_name(each: Declared) -> None:
    choice = next(iter(chosen_for(RunConfig, each.name)))
    default = RunConfig()
    if each.name in flat_values(default):
        assert with_settings(default, {each.name: each.default})
        return
    with pytest.raises(UserError) as caught:
        with_settings(default, {each.name: each.default})
    sentence = str(caught.value)
    assert "\n" not in sentence
    assert sentence.startswith(f"{each.name} belongs to {choice} ")
    assert all(word in sentence for word in ("leave it out", "or choose"))


def test_settings_that_share_a_flat_name_have_one_type() -> None:
    found = defaultdict(set)
    for each in DECLARED:
        found[each.name].add(str if each.family else each.kind)
    assert {name: types for name, types in found.items() if len(types) > 1} == {}
    assert found.keys() == kinds(RunConfig).keys()


@pytest.mark.parametrize("each", DECLARED, ids=lambda each: each.name)
def test_every_setting_has_a_help_text_of_its_own(each: Declared) -> None:
    assert each.about.get("help")
    assert not each.about["help"].startswith(("Muon:", "llama3:"))


@pytest.mark.parametrize("choice", CHOICES, ids=lambda each: each.name)
def test_every_variant_of_a_choice_can_be_chosen_by_its_name(choice: Declared) -> None:
    assert issubclass(choice.family, Registered)
    for name, variant in choice.family.registry.items():
        chosen = choice.family.choose(name)
        assert (chosen.name, chosen.variant) == (name, variant)
        assert chosen == choice.family.choose(name)


def test_an_unknown_setting_is_answered_with_the_nearest() -> None:
    with pytest.raises(UserError, match=r"^unknown setting 'rotary_bas': did you mean 'rotary_base'\?"):
        with_settings(RunConfig(), {"rotary_bas": 1.0})


class Fruit(Registered, kind="fruit"):
    pass


class Apple(Fruit, name="apple"):
    pass


class Pear(Fruit, name="pear"):
    pass


class Cox(Apple):
    pass


class Vegetable(Registered, kind="vegetable"):
    pass


def test_a_class_is_found_by_the_name_in_its_class_statement() -> None:
    assert Fruit.named("apple") is Apple
    assert Apple.name == "apple"
    assert list(Fruit.registry) == ["apple", "pear"]


def test_families_do_not_see_each_other_and_nameless_classes_are_not_found() -> None:
    assert Vegetable.registry == {}
    assert Cox not in Fruit.registry.values()


def test_an_unknown_name_is_answered_with_the_nearest_and_all() -> None:
    with pytest.raises(UserError) as caught:
        Fruit.named("appel")
    assert str(caught.value) == "unknown fruit 'appel': did you mean 'apple'? known are apple, pear"


def test_a_name_that_is_near_nothing_is_answered_with_all() -> None:
    with pytest.raises(UserError) as caught:
        lookup("fruit", "xyzzy", Fruit.registry)
    assert str(caught.value) == "unknown fruit 'xyzzy': known are apple, pear"


def test_a_name_taken_twice_is_refused_and_the_first_stays() -> None:
    with pytest.raises(UserError, match="fruit 'apple' is already registered: choose another name"):
        type("Other", (Fruit,), {}, name="apple")
    assert Fruit.named("apple") is Apple
