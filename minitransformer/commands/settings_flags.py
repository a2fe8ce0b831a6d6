"""A flag for every setting of a configuration, including the settings of all variants."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields, make_dataclass
from typing import Annotated, Any, TypeVar

import tyro
from typing_extensions import Doc

from minitransformer.commands import HELP, given_flags, parse
from minitransformer.settings import Declared, declared, flat, is_part, with_settings

Options = TypeVar("Options")
Record = TypeVar("Record")


@dataclass(frozen=True)
class Group:
    """Settings that `--help` lists under one heading."""

    title: str
    about: str
    settings: list[Declared]


def parse_with_settings(
    options: type[Options], arguments: Sequence[str], base: Record, **about: str
) -> tuple[Options, Record]:
    """Parse a command's own `options`, and `base` with the settings given as flags.

    An option takes the place of a setting of the same name. Raises `UserError` for a flag that does not exist, and for
    one of a variant that is not chosen.
    """
    taken = {field.name for field in fields(options)}  # type: ignore[arg-type]
    groups = _groups(type(base), taken)
    parsed, given = parse_groups(options, arguments, groups, flat(base), **about)
    return parsed, with_settings(base, given)


def parse_groups(
    options: type[Options],
    arguments: Sequence[str],
    groups: Sequence[Group],
    now: Mapping[str, Any],
    *,
    title: str = "command",
    **about: str,
) -> tuple[Options, dict[str, Any]]:
    """Parse a command's own `options`, and the settings in `groups` that are given as flags, by flat name.

    Only given flags are added to the parser, except for `--help`, which lists the command's own under `title`, and
    shows the defaults `now`. Raises `UserError` for a flag that does not exist.
    """
    wanted = None if HELP & set(arguments) else given_flags(arguments)
    settings = [each for group in groups for each in group.settings]
    known = [each.name for each in settings] + [f"no_{each.name}" for each in settings if each.kind is bool]
    # Without a help text, tyro looks for one in the source file of each class, which takes a tenth of a second.
    members: list[tuple[str, Any]] = [
        ("options", Annotated[options, tyro.conf.arg(name=title, help=inspect.getdoc(options))])
    ]
    for number, group in enumerate(groups):
        shown = [each for each in group.settings if wanted is None or _is_given(each.name, wanted)]
        if shown:
            kind = make_dataclass(f"Group{number}", [_flag(each, now) for each in shown], frozen=True)
            kind.__doc__ = group.about
            members.append((f"group{number}", Annotated[kind, tyro.conf.arg(name=group.title, help=group.about)]))
    parsed: Any = parse(make_dataclass("Flags", members, frozen=True), arguments, known=known, **about)
    values = {name: value for title, _ in members[1:] for name, value in vars(getattr(parsed, title)).items()}
    given = {name: value for name, value in values.items() if _is_given(name, given_flags(arguments))}
    return parsed.options, given


def _is_given(name: str, flags: set[str]) -> bool:
    return name in flags or f"no_{name}" in flags


def _groups(record: type, taken: Collection[str] = ()) -> list[Group]:
    """The settings of each part, then of each variant that it may choose; each flag once, except those `taken`."""
    groups: list[Group] = []
    for part in filter(is_part, declared(record)):
        about = (part.kind.__doc__ or "").partition("\n\n")[0]
        groups += _with_variants(Group(part.name, about, list(declared(part.kind))))
    seen = set(taken)
    for group in groups:
        group.settings[:] = [each for each in group.settings if each.name not in seen]
        seen |= {each.name for each in group.settings}
    return groups


def _with_variants(group: Group) -> list[Group]:
    groups = [group]
    for choice in group.settings:
        for variant in choice.family.registry.values() if choice.family else ():
            if own := declared(variant.Settings, variant):
                about = (variant.__doc__ or "").partition("\n")[0]
                groups += _with_variants(Group(f"{choice.name.replace('_', '-')} {variant.name}", about, list(own)))
    return groups


def _flag(each: Declared, now: Mapping[str, Any]) -> tuple[str, Any, Any]:
    """The dataclass field for a setting's flag; its default is only shown in `--help`."""
    help, names = each.about.get("help", ""), each.about.get("choices") or (each.family and each.family.registry)
    if names:
        help = f"{help}: {', '.join(names)}"
    kind: Any = str if each.family else each.kind
    if each.about.get("repeatable"):
        kind = Annotated[kind, tyro.conf.UseAppendAction]
    default = now.get(each.name, each.default.name if each.family else each.default)
    return each.name, Annotated[kind, Doc(help)], field(default=default)
