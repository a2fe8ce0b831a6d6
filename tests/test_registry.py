"""Names for variants: a class registers itself, and a misspelt name is answered with the nearest one."""

from __future__ import annotations

import pytest

from minitransformer.errors import UserError
from minitransformer.registry import Registered, lookup


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
