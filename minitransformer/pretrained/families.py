"""Families of public checkpoints: a table of configuration fields, and a table of rules for tensors."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, ClassVar

from minitransformer import settings
from minitransformer.architecture.norms import has_bias
from minitransformer.errors import UserError
from minitransformer.models.config import ModelConfig
from minitransformer.pretrained.rope import factors_of
from minitransformer.pretrained.rules import Rule
from minitransformer.records import fits, fitted, in_words, shown
from minitransformer.registry import Registered
from minitransformer.settings import flat, with_settings

HF = dict[str, Any]

ACTIVATIONS = {
    "relu": "relu",
    "gelu": "gelu",
    "gelu_new": "gelu-tanh",
    "gelu_pytorch_tanh": "gelu-tanh",
    "gelu_fast": "gelu-tanh",
}
SILU = {"silu": "silu", "swish": "silu"}
SHAPE = {
    "vocab_size": "vocab_size",
    "max_position_embeddings": "context_length",
    "hidden_size": "d_model",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
}
"""the fields that most families share"""
GATED = {"silu": "swiglu", "gelu_pytorch_tanh": "geglu-tanh", "gelu": "geglu", "relu": "reglu"}


BIASES = ("bias", "qkv_bias", "attention_output_bias", "norm_bias", "head_bias")
"""settings of biases: zeros are the same model without them"""
# Required fields, without a default.
SIZES = ("vocab_size", "d_model", "num_layers", "num_heads", "context_length")


@dataclass(frozen=True)
class Field:
    """A field of the family's configuration and ours; `values` translates values that are spelled differently.

    `default` is the family's default. A field with a default may only be null if it is `nullable`. `older` are former
    names of the field.
    """

    ours: str
    values: Mapping[Any, Any] | None = None
    default: Any = None
    older: Sequence[str] = ()
    nullable: bool = False

    def holds(self, value: Any) -> bool:
        """Whether the family's configuration can represent this value of ours."""
        if self.values is not None:
            return value in self.values.values()
        return value is not None or self.default is None or self.nullable


@dataclass(frozen=True)
class Obstacle:
    """A setting of a model that a family cannot represent: all `possible` values, and the one to choose."""

    family: str
    setting: str
    value: Any
    possible: tuple[Any, ...]
    """empty if every value but None is possible"""
    choice: Any

    def __str__(self) -> str:
        held = " or ".join(dict.fromkeys(map(repr, self.possible))) or f"a number, such as {self.choice!r}"
        return f"{self.setting} is {self.value!r}, and {self.family} can only hold {held}"


class Family(Registered, kind="model_type"):
    """A family of checkpoints, registered by its `model_type`.

    `architectures` are the `transformers` classes for each of our topologies. `fields` are translated, `fixed` are our
    settings of every member, `required` are values that a configuration must have (or omit).
    """

    architectures: ClassVar[dict[str, str]]
    fields: ClassVar[dict[str, Field | str]]
    fixed: ClassVar[dict[str, Any]]
    required: ClassVar[HF] = {}
    rules: ClassVar[Sequence[Rule]] = ()
    ignored: ClassVar[Sequence[str]] = ()
    file: ClassVar[str] = "config.json"
    """what holds the fields, for errors"""
    prefix: ClassVar[str] = ""
    """prefix of tensor names, which files of a headless model omit"""

    @classmethod
    def read(cls, hf: HF) -> dict[str, Any]:
        """Further fields of ours, computed from the family's configuration."""
        return {}

    @classmethod
    def write(cls, config: ModelConfig) -> HF:
        """The inverse of `read`."""
        return {}

    @classmethod
    def rules_for(cls, config: ModelConfig) -> Sequence[Rule]:
        """The rules for the tensors of a member with this configuration."""
        return cls.rules

    @classmethod
    def model_config(cls, hf: HF) -> ModelConfig:
        """Our configuration; raises `UserError` for an unsupported member."""
        for name, value in cls.required.items():
            if hf.get(name, value) != value:
                raise UserError(f"{name} is {hf[name]!r} in {cls.file}: only {value!r} can be loaded for {cls.name}")
        try:
            return with_settings(ModelConfig(), cls._choices(hf))
        except KeyError as missing:
            raise UserError(f"{cls.file} has no {missing.args[0]}: a checkpoint of {cls.name} needs it") from None
        except (ArithmeticError, AttributeError, TypeError) as error:
            raise UserError(f"{cls.file} is invalid for {cls.name} ({error}): download it again") from None

    @classmethod
    def _choices(cls, hf: HF) -> dict[str, Any]:
        """The fields of our configuration that are not the defaults."""
        ours: dict[str, Any] = {"topology": cls._topology(hf), **cls.fixed}
        hf = {**{name: field.default for name, field in cls._fields().items()}, **cls._without_older_names(hf)}
        kinds = settings.kinds(ModelConfig)
        for theirs, field in cls._fields().items():
            value = hf[theirs]
            if field.values is not None:
                if value not in field.values:
                    known = ", ".join(map(repr, field.values))
                    raise UserError(f"{theirs} is {value!r} in {cls.file}: known for {cls.name} are {known}")
                value = field.values[value]
            elif value is None and field.ours in SIZES:
                raise UserError(f"{cls.file} has no {theirs}, which a checkpoint of {cls.name} needs: add it")
            elif (value is None and not field.holds(None)) or not fits(value, kinds[field.ours]):
                must = in_words(kinds[field.ours])
                raise UserError(f"{theirs} is {shown(value)} in {cls.file}: it must be {must}")
            ours[field.ours] = value
        ours |= cls.read(hf)
        if ours["topology"] == "encoder-classifier":
            classes = len(hf.get("id2label") or range(hf.get("num_labels", 2)))
            ours["num_classes"] = classes
        for name, value in ours.items():
            if not fits(value, kinds[name]):
                raise TypeError(f"{name} becomes {shown(value)}")
        # JSON integers such as 0 and 1 may stand for floats.
        idle = {each.name for each in settings.all_declared(ModelConfig) if not settings.applies(each, ours)}
        return {name: fitted(value, kinds[name]) for name, value in ours.items() if name not in idle}

    @classmethod
    def _fields(cls) -> dict[str, Field]:
        return {theirs: Field(field) if isinstance(field, str) else field for theirs, field in cls.fields.items()}

    @classmethod
    def _without_older_names(cls, hf: HF) -> HF:
        newer = {old: name for name, field in cls._fields().items() for old in field.older}
        return {newer.get(name, name): value for name, value in hf.items()}

    @classmethod
    def _topology(cls, hf: HF) -> str:
        named = [t for t, architecture in cls.architectures.items() if architecture in (hf.get("architectures") or [])]
        return named[0] if named else next(iter(cls.architectures))

    @classmethod
    def hf_config(cls, config: ModelConfig) -> HF:
        """The family's configuration; raises `UserError` with every setting that it cannot represent."""
        if obstacles := cls.obstacles(config):
            raise UserError(f"{'; '.join(map(str, obstacles))}: choose another format")
        return cls._written(cls.widened(config))

    @classmethod
    def obstacles(cls, config: ModelConfig) -> list[Obstacle]:
        """Every setting that the family cannot represent; with their `choice` in place, it can.

        A bias that the family always has is none, as it is written as zeros. Raises `UserError` for impossible shapes,
        with the settings that contradict each other.
        """
        return cls.compared(config)[0]

    @classmethod
    def widened(cls, config: ModelConfig) -> ModelConfig:
        """The configuration of the same model with the biases that the family always has."""
        return with_settings(config, cls.compared(config)[1])

    @classmethod
    def compared(cls, config: ModelConfig) -> tuple[list[Obstacle], dict[str, bool]]:
        """The `obstacles`, and the settings of biases that the family always has and `config` has not."""
        found, own = cls._differences(config), _canonical(config)
        lacking = {name for name in BIASES if not own.get(name, True)}
        zeros = {each.setting: each.choice for each in found if each.setting in lacking}
        return [each for each in found if each.setting not in zeros], zeros

    @classmethod
    def may_hold(cls, ours: Mapping[str, Any]) -> bool:
        """Whether nothing in the table is in the way of canonical settings, which is known sooner than `obstacles`."""
        fixed = ((name, value) for name, value in cls.fixed.items() if name in ours)
        fields = (field for field in cls._fields().values() if field.ours in ours)
        return all(_equal(ours[name], value) or (name in BIASES and not ours[name]) for name, value in fixed) and all(
            field.holds(ours[field.ours]) for field in fields
        )

    @classmethod
    def _differences(cls, config: ModelConfig) -> list[Obstacle]:
        """Every setting that is another one when the family's configuration is read back."""
        if config.topology not in cls.architectures:
            return [cls._obstacle("topology", config.topology, tuple(cls.architectures))]
        found: dict[str, Obstacle] = {}
        while True:
            try:  # with the choices found so far, as one setting may hide another
                changed = with_settings(config, {name: obstacle.choice for name, obstacle in found.items()})
                more = cls._unrepresentable(changed) or cls._lost(changed)
            except UserError:
                if not found:
                    raise
                return list(found.values())
            if not more.keys() - found.keys():
                return list(found.values())
            found |= {name: obstacle for name, obstacle in more.items() if name not in found}

    @classmethod
    def _unrepresentable(cls, config: ModelConfig) -> dict[str, Obstacle]:
        """The settings that the family's configuration has no value for."""
        ours = _canonical(config)
        found = {
            name: cls._obstacle(name, flat(config).get(name), (value,))
            for name, value in cls.fixed.items()
            if not _equal(ours.get(name, value), value)
        }
        for field in cls._fields().values():
            if field.ours in ours and not field.holds(ours[field.ours]):
                values = field.values or {}
                choice = values.get(field.default, field.default)
                found[field.ours] = cls._obstacle(field.ours, ours[field.ours], tuple(values.values()), choice)
        return found

    @classmethod
    def _lost(cls, config: ModelConfig) -> dict[str, Obstacle]:
        """The settings that change when the family's configuration is read back."""
        before, after = _canonical(config), _canonical(cls.model_config(cls._written(config)))
        return {
            name: cls._obstacle(name, value, (after[name],))
            for name, value in before.items()
            if name in after and not _equal(value, after[name])
        }

    @classmethod
    def _obstacle(cls, name: str, value: Any, possible: tuple[Any, ...], choice: Any = None) -> Obstacle:
        return Obstacle(cls.name, name, value, possible, possible[0] if choice is None else choice)

    @classmethod
    def _written(cls, config: ModelConfig) -> HF:
        """The family's configuration, from settings that it can represent."""
        hf: HF = {"model_type": cls.name, "architectures": [cls.architectures[config.topology]], **cls.required}
        ours = _canonical(config)
        for theirs, field in cls._fields().items():
            if field.ours not in ours:  # it has no effect
                continue
            spelled = {ours: theirs for theirs, ours in reversed(list((field.values or {}).items()))}
            hf[theirs] = ours[field.ours] if field.values is None else spelled[ours[field.ours]]
        hf |= cls.write(config)
        if config.num_classes is not None:
            hf["id2label"] = {str(i): f"LABEL_{i}" for i in range(config.num_classes)}
            hf["label2id"] = {label: int(i) for i, label in hf["id2label"].items()}
        return hf


def _equal(a: Any, b: Any) -> bool:
    both_floats = isinstance(a, float) and isinstance(b, float)
    return math.isclose(a, b, rel_tol=1e-9) if both_floats else a == b


IRRELEVANT = {"dropout", "init", "attention_kernel"}


def _canonical(config: ModelConfig) -> dict[str, Any]:
    """The fields of `config` that have an effect, with None resolved."""
    values = flat(config)
    values |= {
        "num_kv_heads": config.num_kv_heads or config.num_heads,
        "head_dim": config.features_per_head,
        "d_ff": config.d_ff or config.feedforward.variant.default_width(config.d_model),
        "norm_bias": "norm_bias" in values and has_bias(values["norm_bias"], config.bias),
        "qkv_bias": config.bias if config.qkv_bias is None else config.qkv_bias,
        "attention_output_bias": config.bias if config.attention_output_bias is None else config.attention_output_bias,
        "attention_scale": config.attention_scale or config.features_per_head**-0.5,
    }
    if "num_decoder_layers" in values:
        values["num_decoder_layers"] = config.decoder_layers
    if "window_pattern" in values:
        values["window_pattern"] = tuple(config.window_of(layer) is not None for layer in range(config.num_layers))
    if "rotary_layers" in values:
        values |= _canonical_rotation(config, values)
    return {name: value for name, value in values.items() if name not in IRRELEVANT}


def _canonical_rotation(config: ModelConfig, values: dict[str, Any]) -> dict[str, Any]:
    """The rotated layers, the base of windows where it makes a difference, and factors that are left to defaults."""
    rotary = config.positions.settings
    is_base = rotary.scaling.name == "none" and rotary.window_base == rotary.base
    windows = any(values.get("window_pattern", ()))
    scaling = rotary.scaling.make(rotary.base, config.context_length)
    return {
        "rotary_layers": tuple(rotary.layers[layer % len(rotary.layers)] for layer in range(config.num_layers)),
        "rotary_window_base": rotary.window_base if windows and not is_base else None,
        **factors_of(config),
        **({"rotary_magnitude": scaling.magnitude} if "rotary_magnitude" in values else {}),
    }


def obstacles_by_family(config: ModelConfig, kind: type[Family] = Family) -> dict[str, list[Obstacle]]:
    """The obstacles of each family with this topology, fewest first, and of these the one that adds the fewest biases.

    Families that cannot have such a shape are left out; raises `UserError` if none is left.
    """
    obstacles: dict[str, list[Obstacle]] = {}
    added: dict[str, int] = {}
    refusals = []
    for name, family in kind.registry.items():
        if config.topology in family.architectures:
            try:
                obstacles[name], zeros = family.compared(config)
                added[name] = len(zeros)
            except UserError as error:
                refusals.append(error)
    if refusals and not obstacles:
        raise refusals[0]
    return dict(sorted(obstacles.items(), key=lambda entry: (len(entry[1]), added[entry[0]])))


def families_of(config: ModelConfig, kind: type[Family] = Family) -> list[str]:
    """The families that can represent the model, first those that add the fewest biases."""
    ours = _canonical(config)
    added: dict[str, int] = {}
    for name, family in kind.registry.items():
        if config.topology in family.architectures and family.may_hold(ours):
            with suppress(UserError):  # of a shape that the family cannot have
                obstacles, zeros = family.compared(config)
                added |= {} if obstacles else {name: len(zeros)}
    return sorted(added, key=added.__getitem__)


def nearest_family(config: ModelConfig, kind: type[Family] = Family) -> tuple[str, list[Obstacle]]:
    """The family with the fewest obstacles, and these; raises `UserError` if none has this topology."""
    for family, obstacles in obstacles_by_family(config, kind).items():
        return family, obstacles
    raise UserError(f"no known format can represent topology {config.topology!r}: choose another run")
