"""The sampling flags of `sample`, and which of its flags can change nothing beside the others.

A flag that would be ignored is a mistake, and said: what it was meant to do would silently not happen.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from minitransformer.commands.settings_flags import Group
from minitransformer.errors import UserError
from minitransformer.generation.config import SamplingConfig, own_settings, processor_settings
from minitransformer.models.config import CLASSIFIERS

OF_BEAMS = ("length_penalty", "early_stopping")
OF_LINES = ("lines", "batch_size", "draft", "draft_tokens")
OF_CHATS = ("chat", "system")
OF_ROWS = ("batch_file", "out", "template")


def sampling_groups() -> list[Group]:
    """The flags of `SamplingConfig` as `--help` lists them, those of processors from plugins included."""
    beams = [each for each in own_settings() if each.name in ("num_beams", *OF_BEAMS)]
    texts = [each for each in own_settings() if each not in beams]
    return [
        Group("generation", "How long the text may become, and how many there are.", texts),
        Group("sampling", "How the next token is chosen, in the order of application.", list(processor_settings())),
        Group("beam search", "Several continuations at a time, instead of sampling.", beams),
    ]


@dataclass(frozen=True)
class Idle:
    """Flags that change nothing, and why, in words that follow their name; `cause` is the setting that makes it so."""

    flags: Collection[str]
    why: str
    cause: str = ""


def check_flags(given: set[str], values: Mapping[str, Any], topology: str, where: Mapping[str, str]) -> None:
    """Raises `UserError` for a flag that was `given` and can change nothing in a model of `topology`.

    `values` are those of all options; `where` says of some where they are from, if that is no flag.
    """
    for idle in _idle(values, topology):
        for flag in sorted(given & set(idle.flags)):
            if values[flag] is None or values[flag] is False:
                continue  # as good as not given
            elsewhere = where.get(idle.cause)
            cause = f" ({idle.cause} is {values[idle.cause]} in {elsewhere})" if elsewhere else ""
            raise UserError(f"--{flag.replace('_', '-')} {idle.why}{cause}")


def _idle(values: Mapping[str, Any], topology: str) -> Iterator[Idle]:
    beams = values["num_beams"] > 1
    drawing = {"seed", *(each.name for each in processor_settings(keeps_likeliest=True))}
    if topology == "encoder" or topology in CLASSIFIERS[1]:
        does = "fills in masks" if topology == "encoder" else "classifies them"
        of_rows = OF_ROWS if topology == "encoder" else ()
        yield Idle(
            (*SamplingConfig().flat, *OF_LINES, *OF_CHATS, *of_rows, "special_tokens"),
            f"is for models that generate texts, and this one {does}: leave it out",
        )
        return
    if beams:
        out = "leave it out, or give --num-beams 1"
        yield Idle(drawing, f"has no part in a beam search, which draws nothing: {out}", "num_beams")
        yield Idle(("draft",), f"guesses the tokens of one text, and a beam search follows several: {out}", "num_beams")
    else:
        yield Idle(OF_BEAMS, "is for a beam search: give --num-beams 2 or more")
        if values["temperature"] == 0:
            out = "leave it out, or give a --temperature above 0"
            why = f"changes nothing at temperature 0, which takes the likeliest token: {out}"
            yield Idle(drawing - {"temperature"}, why, "temperature")
            if values["num_samples"] > 1:
                why = f"would give the same text {values['num_samples']} times at temperature 0: {out}"
                yield Idle(("num_samples",), why, "temperature")
    if values["batch_file"] is None:
        yield Idle(OF_ROWS[1:], "is for many prompts: give --batch-file as well")
    if values["draft"] is None:
        yield Idle(("draft_tokens",), "is for a draft: name its run with --draft")
    yield from _idle_of_decoders(values, beams) if topology == "decoder" else _idle_of_translators(values)


def _idle_of_decoders(values: Mapping[str, Any], beams: bool) -> Iterator[Idle]:
    if values["chat"]:
        yield Idle(("special_tokens",), "is for prompts, and the template writes a conversation's: leave it out")
    else:
        yield Idle(("system",), "begins a conversation: give --chat as well")
    if not values["lines"] and values["batch_file"] is None:
        yield Idle(("batch_size",), "is for many prompts: give --lines or --batch-file as well")
    elif beams:
        yield Idle(("batch_size",), "changes nothing in a beam search, which takes one line at a time: leave it out")


def _idle_of_translators(values: Mapping[str, Any]) -> Iterator[Idle]:
    yield Idle(OF_CHATS, "is for models that continue prompts, and this one makes a line of each line: leave it out")
    yield Idle(("lines",), "is for models that continue prompts, and this one makes a line of each line: leave it out")
    yield Idle(("stop",), "is for models that continue prompts, and this one ends by itself: leave it out")
    if values["interactive"]:
        yield Idle(("batch_size",), "changes nothing where one line is answered at a time: leave it out")
