"""How texts are generated: the settings of every sampling processor, the lengths, and the beam search."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from minitransformer.errors import UserError, suggestion
from minitransformer.generation.processors import Processor, Temperature
from minitransformer.settings import Chosen, Declared, check_settings, declared, setting

MOST_NEW_TOKENS = 1_000_000
"""memory for the tokens of a text is allocated at once"""


def ordered_processors() -> list[type[Processor]]:
    """The registered processors in the order in which they are applied."""
    return sorted(Processor.registry.values(), key=lambda one: (one.keeps_likeliest, one.order))


def processor_settings(*, keeps_likeliest: bool | None = None) -> Iterator[Declared]:
    """The settings of all registered processors, or of those that may change which token is most likely or may not."""
    for one in ordered_processors():
        if keeps_likeliest in (None, one.keeps_likeliest):
            yield from declared(one.Settings, one)


@dataclass(frozen=True, init=False)
class SamplingConfig:
    """How tokens are drawn, and how many: `SamplingConfig(temperature=0.5, top_k=5, max_new_tokens=10)`.

    The settings of processors are keywords by their flat names, as on the command line with `_` for `-`. Raises
    `UserError` for a value that has no meaning.
    """

    max_new_tokens: int = setting(200, at_least=1, most=MOST_NEW_TOKENS, help="most tokens to generate")
    num_samples: int = setting(1, at_least=1, help="number of continuations; of a beam search, the best ones")
    seed: int | None = setting(
        None,
        at_least=0,
        below=2**63,
        must="at least 0 and below 2^63",
        help="seed of the random numbers: the same seed gives the same text; None takes a new one",
    )
    stop: tuple[str, ...] = setting(
        (), repeatable=True, help="text that ends a sample, and is not part of it (may be given several times)"
    )
    num_beams: int = setting(1, at_least=1, help="number of beams; with 2 or more, the most likely text found is taken")
    length_penalty: float = setting(
        1.0,
        help="beams are ranked by log-probability / length to this power: above 0 favours longer texts",
    )
    early_stopping: str = setting(
        "false",
        choices=("false", "true", "never"),
        help="with num_beams finished texts, end if no beam is better (false), at once (true), or if none can become "
        "better (never)",
    )
    processors: tuple[Chosen[Processor], ...] = ()
    """all that are registered, with their settings, in the order in which they are applied"""

    def __init__(self, *, processors: Sequence[Chosen[Processor]] | None = None, **settings: Any) -> None:
        values = {each.attribute: settings.pop(each.attribute, each.default) for each in own_settings()}
        base = [one.choose() for one in ordered_processors()] if processors is None else processors
        values["processors"] = tuple(_with_settings(chosen, settings) for chosen in base)
        if settings:
            known = [each.name for each in (*own_settings(), *processor_settings())]
            name = next(iter(settings))
            raise UserError(f"unknown setting {name!r}: {suggestion(name, known)}known are {', '.join(known)}")
        for name, value in values.items():
            object.__setattr__(self, name, value)
        check_settings(self)
        if self.num_beams > 1 and self.num_samples > self.num_beams:
            raise UserError(f"num_samples {self.num_samples} is more than num_beams {self.num_beams}: lower it")
        if "" in self.stop:
            raise UserError("a stop string is empty: give the text that should end a sample")

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is taken every time."""
        return any(one.variant is Temperature and one.settings.temperature == 0 for one in self.processors)

    @cached_property
    def law(self) -> str:
        """All processors with their settings: logits of texts that have the same ones are processed together."""
        return repr(self.processors)

    @property
    def flat(self) -> dict[str, Any]:
        """The value of every setting by its flat name."""
        values = {each.name: getattr(self, each.attribute) for each in own_settings()}
        for chosen in self.processors:
            for each in declared(type(chosen.settings), chosen.variant):
                values[each.name] = getattr(chosen.settings, each.attribute)
        return values

    def make_processors(
        self, prompt_length: int, ends: Sequence[int], rules: Sequence[Processor] = ()
    ) -> list[Processor]:
        """The processors that have an effect after a prompt of so many tokens, in the order in which they are applied.

        `rules` are the model's own, and decide last which tokens are possible at all.
        """
        used = [one for one in self.processors if one.variant.has_effect(one.settings)]
        made = [one.make(prompt_length, ends) for one in used if not one.variant.keeps_likeliest]
        if self.greedy or self.num_beams > 1:
            return [*made, *rules]
        return [*made, *rules, *(one.make(prompt_length, ends) for one in used if one.variant.keeps_likeliest)]


def own_settings() -> list[Declared]:
    """The settings of `SamplingConfig` that belong to no processor."""
    return [each for each in declared(SamplingConfig) if each.attribute != "processors"]


def _with_settings(chosen: Chosen[Processor], settings: dict[str, Any]) -> Chosen[Processor]:
    """`chosen` with those of the flat `settings` that belong to it, which are removed from them."""
    own = declared(type(chosen.settings), chosen.variant)
    given = {each.attribute: settings.pop(each.name) for each in own if each.name in settings}
    return replace(chosen, settings=replace(chosen.settings, **given)) if given else chosen


def check_no_beams(sampling: SamplingConfig) -> None:
    """Raises `UserError` for a beam search where each text is decoded one token after the other."""
    if sampling.num_beams > 1:
        raise UserError(f"num_beams is {sampling.num_beams}, and these texts are not searched for: make it 1")
