"""Settings as data: declared in their variant, nested in dataclasses and JSON, flat flags on the command line.

A variant is a class whose settings are an inner frozen dataclass. A configuration holds a `Choice` of a
variant; its value is a `Chosen`, the variant with its settings.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import MISSING, dataclass, field, fields, is_dataclass, replace
from functools import cache
from inspect import getattr_static
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from minitransformer.errors import UserError, suggestion
from minitransformer.records import checked_value, type_hints

T = TypeVar("T")
Variant = TypeVar("Variant", covariant=True)

LARGEST = 3.4028234663852886e38
"""the largest float32"""
LIMITS: dict[str, Callable[[Any, Any], bool]] = {
    "above": operator.gt,
    "at_least": operator.ge,
    "below": operator.lt,
    "at_most": operator.le,
}


def setting(default: Any, *, help: str = "", **about: Any) -> Any:
    """A dataclass field with metadata.

    `above`, `at_least`, `at_most` and `below` limit a number, `most` bounds it by memory; `must` states the
    limits in words. `choices` are the values that a string may have. `flag` is its name on the
    command line, by default the variant's name and the field's. `needs` names another setting without which it has
    no effect, or that setting and its required values.
    Metadata for other code: `changes_task` (losses with different values are not comparable),
    `changes_tokens` (they are comparable in bits per byte), `follows_data` (usually determined by the data),
    `of_files` (how files are read), `observes_only` (no effect on the results), `repeatable` (its flag may be given
    several times), `may_change_on_resume`.
    """
    return field(default=default, metadata={"help": help, **about})


@dataclass(frozen=True)
class Chosen(Generic[Variant]):
    """A variant and its settings. Raises `UserError` for a number outside declared limits."""

    variant: type[Variant]
    settings: Any

    def __post_init__(self) -> None:
        check_settings(self.settings, self.variant)

    @property
    def name(self) -> str:
        """The registered name of the variant."""
        variant: Any = self.variant
        return variant.name

    def make(self, *args: Any, **kwargs: Any) -> Variant:
        """An instance of the variant: `variant(settings, *args, **kwargs)`."""
        variant: Any = self.variant
        return variant(self.settings, *args, **kwargs)

    def __str__(self) -> str:
        return self.name


class Choice(Generic[T]):
    """A dataclass field that holds a `Chosen` variant of `family`; assigning a name chooses its default settings."""

    def __init__(self, family: type[T], default: str, *, help: str = "", **about: Any) -> None:
        self.family, self.default, self.about = family, default, MappingProxyType({"help": help, **about})

    if not TYPE_CHECKING:

        def __class_getitem__(cls, family: type) -> Any:
            """The type of the constructor argument, for runtime type checkers."""
            return Chosen | str

    def __set_name__(self, owner: type, name: str) -> None:
        self.attribute = name

    def __get__(self, record: object | None, owner: type) -> Chosen[T]:
        return self._chosen(self.default) if record is None else record.__dict__[self.attribute]

    def __set__(self, record: object, value: Chosen[T] | str) -> None:
        record.__dict__[self.attribute] = self._chosen(value) if isinstance(value, str) else value

    def _chosen(self, name: str) -> Chosen[T]:
        family: Any = self.family
        return family.choose(name)


@dataclass(frozen=True)
class Declared:
    """A setting that a dataclass declares: a configuration, or the settings of `variant`."""

    attribute: str
    name: str
    """unique flat name, as on the command line"""
    kind: Any
    default: Any
    about: Mapping[str, Any]
    family: Any = None
    """root of the variants, for a choice"""
    variant: Any = None


def declared(record: Any, variant: Any = None) -> tuple[Declared, ...]:
    """The settings that a dataclass declares, in order, without those of nested parts."""
    return _declared(record, variant)


@cache
def _declared(record: Any, variant: Any) -> tuple[Declared, ...]:
    found = []
    for each in fields(record):
        choice = getattr_static(record, each.name, None)
        family = choice.family if isinstance(choice, Choice) else None
        about = choice.about if isinstance(choice, Choice) else each.metadata
        default = each.default if each.default is not MISSING else None
        name = about.get("flag") or (each.name if variant is None else f"{variant.name}-{each.name}")
        kind = type_hints(record)[each.name]
        found.append(Declared(each.name, name.replace("-", "_"), kind, default, about, family, variant))
    return tuple(found)


def all_declared(record: type, variant: Any = None) -> Iterator[Declared]:
    """Every setting of a dataclass, including its parts and all variants that may be chosen."""
    for each in declared(record, variant):
        if is_part(each):
            yield from all_declared(each.kind)
            continue
        yield each
        for member in each.family.registry.values() if each.family else ():
            yield from all_declared(member.Settings, member)


def names_with(record: type, about: str) -> set[str]:
    """The flat names of all settings of a dataclass that have the metadata `about`."""
    return {each.name for each in all_declared(record) if each.about.get(about)}


def kinds(record: type) -> dict[str, Any]:
    """The type of every setting of a dataclass, by flat name; a choice is a str."""
    return {each.name: str if each.family else each.kind for each in all_declared(record)}


def is_part(each: Declared) -> bool:
    """Whether it is a nested dataclass of settings."""
    return is_dataclass(each.kind) and each.family is None


def settings_of(
    record: Any, variant: Any = None, *, keep: Callable[[Declared], bool] = lambda each: True
) -> Iterator[tuple[Declared, Any]]:
    """Every setting of `record` that `keep` accepts, with its value; a choice is followed by its own settings."""
    for each in declared(type(record), variant):
        value = getattr(record, each.attribute)
        if is_part(each):
            yield from settings_of(value, keep=keep)
        elif keep(each):
            yield each, value
            if each.family is not None:
                yield from settings_of(value.settings, value.variant, keep=keep)


def flat_values(record: Any) -> dict[str, Any]:
    """The values of all settings of `record`, by flat name; a choice is the name of its variant."""
    return {each.name: value.name if each.family else value for each, value in settings_of(record)}


def flat(record: Any) -> dict[str, Any]:
    """The `flat_values` the settings of `record` that have an effect."""
    every = flat_values(record)
    return {each.name: every[each.name] for each, _ in settings_of(record, keep=lambda each: applies(each, every))}


def applies(each: Declared, values: Mapping[str, Any]) -> bool:
    """Whether the flat `values` satisfy what a setting `needs`, or do not contain it."""
    needs = each.about.get("needs")
    name, possible = needs if isinstance(needs, tuple) else (needs, None)
    if name not in values:
        return True
    return bool(values[name]) if possible is None else values[name] in possible


def with_settings(record: T, changes: Mapping[str, Any]) -> T:
    """`record` with the settings `changes`, by flat name.

    Another variant starts from its own defaults, and keeps changed settings that it shares with the previous one.
    A method `implied` of `record` returns further changes that follow from `changes`.
    Raises `UserError` for an unknown name, a setting of a variant that is not chosen, and an invalid value.
    """
    left = {**(record.implied(changes) if hasattr(record, "implied") else {}), **changes}
    result = _changed(record, left, None)
    if left:
        raise _misplaced(next(iter(left)), result)
    _check_needs(result, changes)
    return result


def _check_needs(record: Any, names: Iterable[str]) -> None:
    """Raises `UserError` if a setting among `names` is not its default and has no effect."""
    values = flat_values(record)
    for each, value in settings_of(record):
        if each.name in names and value != each.default and not applies(each, values):
            needs = each.about["needs"]
            name, possible = needs if isinstance(needs, tuple) else (needs, ())
            what = f"{name} {' or '.join(map(repr, possible))}" if possible else name
            raise UserError(
                f"{each.name} has no effect without {what}, and {name} is {values[name]!r}: leave it out, or set {what}"
            )


def _changed(record: Any, left: dict[str, Any], variant: Any) -> Any:
    """`record` with those changes in `left` that belong to it, which are removed from `left`."""
    values: dict[str, Any] = {}
    for each in declared(type(record), variant):
        old = getattr(record, each.attribute)
        if is_part(each):
            values[each.attribute] = _changed(old, left, None)
        elif each.family is None:
            values[each.attribute] = left.pop(each.name, old)
        else:
            new = _switched(old, left.pop(each.name, old), each.family)
            values[each.attribute] = replace(new, settings=_changed(new.settings, left, new.variant))
    changed = {name: value for name, value in values.items() if value is not getattr(record, name)}
    return replace(record, **changed) if changed else record


def _switched(old: Chosen[Any], value: Chosen[Any] | str, family: Any) -> Chosen[Any]:
    if not isinstance(value, str):
        return value
    new = family.choose(value)
    if new.variant is old.variant:
        return old
    set_before = {each.name: v for each, v in settings_of(old.settings, old.variant) if v != each.default}
    return replace(new, settings=_changed(new.settings, set_before, new.variant))


def _misplaced(name: str, record: Any) -> UserError:
    known = list(all_declared(type(record)))
    owners = [each.variant for each in known if each.name == name and each.variant]
    if not owners:
        near = suggestion(name, [each.name for each in known])
        return UserError(f"unknown setting {name!r}: {near}The names are those of the flags in --help")
    choice = next(each for each in known if each.family and owners[0] in each.family.registry.values())
    values = flat_values(record)
    now = f"{choice.name} is {values[choice.name]!r}" if choice.name in values else "that is not chosen"
    which = " or ".join(repr(owner.name) for owner in owners)
    return UserError(f"{name} belongs to {choice.name} {which}, and {now}: leave it out, or choose {owners[0].name!r}")


def check_settings(record: Any, variant: Any = None) -> None:
    """Raises `UserError` if a number in `record` is not finite in float32, or outside its declared limits.

    NaN would pass comparisons, and spread to all weights.
    """
    for each in declared(type(record), variant):
        value, about = getattr(record, each.attribute), each.about
        if "choices" in about and value not in about["choices"]:
            known = about["choices"]
            kind = each.name.replace("_", " ")
            raise UserError(f"unknown {kind} {value!r}: {suggestion(str(value), known)}known are {', '.join(known)}")
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(number, int | float) and not isinstance(number, bool):
                _check_number(each.name, number, about)


def _check_number(name: str, value: float, about: Mapping[str, Any]) -> None:
    if not abs(value) <= LARGEST and isinstance(value, float):
        raise UserError(f"{name} is {value}: it must be finite, in float32 too")
    limits = {word: about[word] for word in LIMITS if word in about}
    if not all(LIMITS[word](value, limit) for word, limit in limits.items()):
        must = " and ".join(f"{word.replace('_', ' ')} {limit:,}" for word, limit in limits.items())
        raise UserError(f"{name} is {value}: it must be {about.get('must', must)}")
    if value > about.get("most", value):
        raise UserError(f"{name} is {value}: it must be at most {about['most']:,}")


def to_json(record: Any) -> dict[str, Any]:
    """`record` as JSON values: a choice is an object with the variant's name and its settings."""
    result: dict[str, Any] = {}
    for each in declared(type(record)):
        value = getattr(record, each.attribute)
        if is_part(each):
            result[each.attribute] = to_json(value)
        elif each.family is None:
            result[each.attribute] = value
        else:
            result[each.attribute] = {"name": value.name, **to_json(value.settings)}
    return result


def nested(record: type, values: Mapping[str, Any], variant: Any = None) -> dict[str, Any]:
    """Flat settings nested as in `to_json`, without those of variants that are not chosen."""
    result: dict[str, Any] = {}
    for each in declared(record, variant):
        if each.family is None:
            result |= {each.attribute: values[each.name]} if each.name in values else {}
            continue
        name = values.get(each.name, each.default.name)
        member = each.family.registry.get(name) if isinstance(name, str) else None
        result[each.attribute] = {"name": name, **(nested(member.Settings, values, member) if member else {})}
    if variant is None:
        known = {each.name for each in all_declared(record)}
        result |= {name: value for name, value in values.items() if name not in known}
    return result


def flattened(record: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `nested`, for any version: unknown settings keep their names."""
    known = {(each.variant and each.variant.name, each.attribute): each.name for each in all_declared(record)}

    def pairs(values: Mapping[str, Any], variant: str | None) -> Iterator[tuple[str, Any]]:
        for attribute, value in values.items():
            name = known.get((variant, attribute), attribute if variant is None else f"{variant}_{attribute}")
            if isinstance(value, dict) and isinstance(value.get("name"), str):
                yield name, value["name"]
                yield from pairs({key: inner for key, inner in value.items() if key != "name"}, value["name"])
            else:
                yield name, value

    return dict(pairs(values, None))


def from_json(record: type[T], values: Any, origin: str, variant: Any = None) -> T:
    """The inverse of `to_json`, with `values` read from the file `origin`.

    Missing settings have their defaults.
    Raises `UserError` for an unknown setting or variant and for invalid values,
    `StorageError` for a value of another type.
    """
    members = {each.attribute: each for each in declared(record, variant)}
    if unknown := values.keys() - members.keys():
        what = ", ".join(sorted(unknown))
        raise UserError(f"{origin} has unknown settings ({what}): a newer version wrote it, so update")
    result: dict[str, Any] = {}
    for attribute, value in values.items():
        each = members[attribute]
        if each.family is None:
            result[attribute] = checked_value(value, each.kind, each.name, origin)
            continue
        choice = dict(checked_value(value, dict, each.name, origin))
        name = checked_value(choice.pop("name", None), str, each.name, origin)
        try:
            member = each.family.named(name)
        except UserError as error:
            raise UserError(f"{origin}: {error}") from None
        settings = from_json(member.Settings, choice, origin, member)
        result[attribute] = Chosen(member, settings)
    try:
        return record(**result)
    except UserError as error:
        raise UserError(f"{origin}: {error}") from None
