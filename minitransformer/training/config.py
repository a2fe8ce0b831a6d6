"""Everything that a training run is told, in three frozen records: the model, the data, and the training itself."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

from minitransformer import settings
from minitransformer.errors import UserError
from minitransformer.models.config import ModelConfig
from minitransformer.records import shown
from minitransformer.settings import Choice, check_settings, setting
from minitransformer.text.recipes import known
from minitransformer.text.tokenizers import Tokenizer
from minitransformer.training.objectives import Objective
from minitransformer.training.objectives.base import Prepared
from minitransformer.training.optimizers import Optimizer, Rates
from minitransformer.training.precision import Precision
from minitransformer.training.schedules import Schedule

DATA = (
    "what to learn from, one or several: a recipe, a file, a folder or a glob of .txt, .md, .jsonl or source code; "
    "a .csv, .tsv, .parquet or a .json array; - is standard input; for pairs a .tsv, a .jsonl or one of two parallel "
    f"files. Recipes: {', '.join(known())}"
)

VALIDATION_TOKENS = (
    "of validation, read each time: the same ones, drawn by seed, but all in the last step; 0 is always all; None "
    "is a tenth of the tokens trained on in between, and 8192 at least"
)


FORMAT = 2
"""of `config.json`: in the first, settings of variants stood flat among the others"""


@dataclass(frozen=True)
class DataConfig:
    """Which text, and how it becomes tokens."""

    data: str | tuple[str, ...] = setting("pydocs", may_change_on_resume=True, changes_task=True, help=DATA)
    field: str = setting(
        "text", changes_task=True, help="the field of each .jsonl line, table row or array element that holds the text"
    )
    target_data: str | None = setting(
        None, may_change_on_resume=True, changes_task=True, help="pairs: the file whose lines belong to those of data"
    )
    validation_data: str | tuple[str, ...] | None = setting(
        None,
        may_change_on_resume=True,
        changes_task=True,
        help="what to validate on, named as data is; None takes some of data",
    )
    validation_target_data: str | None = setting(
        None,
        may_change_on_resume=True,
        changes_task=True,
        help="pairs: the file whose lines belong to those of validation_data",
    )
    source_field: str = setting(
        "source", changes_task=True, help="pairs: the field of each .jsonl line that holds the source"
    )
    target_field: str = setting(
        "target", changes_task=True, help="pairs: the field of each .jsonl line that holds the target"
    )
    lowercase: bool = setting(False, changes_task=True, help="pairs: in lower case only, also what is translated later")
    separate_vocabularies: bool = setting(False, changes_tokens=True, help="pairs: a vocabulary for each side")
    too_long: Literal["skip", "cut"] = setting(
        "skip", changes_task=True, help="pairs: what to do with a side that is longer than the context"
    )
    tokenizer: str = setting("bpe", choices=Tokenizer.registry, changes_tokens=True, help="tokenizer")
    validation_fraction: float = setting(
        0.1,
        changes_task=True,
        at_least=0,
        below=1,
        help="share of the text that is kept for validation; 0 trains on all of it, and validates nothing",
    )

    def __post_init__(self) -> None:
        check_settings(self)
        for name in ("data", "validation_data"):
            # One source has one spelling, on the command line and in the files of older runs.
            if isinstance(value := getattr(self, name), tuple):
                if not value:
                    raise UserError(f"{name} names nothing: give a file, a folder or a recipe")
                object.__setattr__(self, name, value[0] if len(value) == 1 else value)
        if self.validation_target_data is not None and self.validation_data is None:
            raise UserError(
                f"validation_target_data is {self.validation_target_data!r} without validation_data: name both files"
            )

    @property
    def validates(self) -> bool:
        """Whether there is text to validate on."""
        return self.validation_fraction > 0 or self.validation_data is not None


@dataclass(frozen=True)
class TrainingConfig:
    """How the weights are learned, how often to look, and on what machine."""

    objective: str = setting(
        "causal", choices=Objective.registry, changes_task=True, may_change_on_resume=False, help="what is learned"
    )
    steps: int = setting(1000, at_least=1, help="updates of the weights")
    batch_size: int = setting(16, at_least=1, help="sequences in a micro-batch")
    batch_tokens: int = setting(
        2048, at_least=1, help="pairs: tokens in a micro-batch, padding included, on the side that has more"
    )
    grad_accumulation: int = setting(1, at_least=1, help="micro-batches in a step")
    sequence_length: int | None = setting(
        None,
        at_least=1,
        help="tokens of a training sequence; None is context_length, or the length of the pairs",
    )
    optimizer: Choice[Optimizer] = Choice(Optimizer, "adamw", may_change_on_resume=False, help="optimizer")
    lr: float = setting(1e-3, above=0, help="highest learning rate")
    embedding_lr: float | None = setting(
        None, above=0, help="highest learning rate of embeddings, biases and norms; None is lr"
    )
    head_lr: float | None = setting(
        None, above=0, help="highest learning rate of a head that is not tied to the embedding; None is embedding_lr"
    )
    min_lr: float = setting(0.0, at_least=0, help="learning rate that the schedule ends with")
    schedule: Choice[Schedule] = Choice(Schedule, "cosine", help="learning-rate schedule")
    warmup_steps: int = setting(50, at_least=0, help="steps in which the learning rate grows from 0")
    weight_decay: float = setting(0.1, at_least=0, help="decay of matrices (never of biases and norms)")
    label_smoothing: float = setting(
        0.0,
        at_least=0,
        below=1,
        help="encoder-decoders: share of the probability that training gives to all tokens alike",
    )
    mask_probability: float = setting(
        0.15, above=0, below=1, changes_task=True, help="masked: share of the tokens that are hidden"
    )
    span_density: float = setting(
        0.15, above=0, below=1, changes_task=True, help="span-corruption: share of the tokens that are cut out"
    )
    mean_span: float = setting(3.0, at_least=1, changes_task=True, help="span-corruption: tokens of a span, on average")
    expert_balance: float = setting(
        0.01, at_least=0, help="mixtures of experts: weight of the loss that shares the work among them"
    )
    grad_clip: float = setting(1.0, at_least=0, help="largest norm of the gradient; 0 switches clipping off")
    eval_every: int = setting(250, at_least=1, help="steps between validations (the last step always has one)")
    validation_tokens: int | None = setting(None, at_least=0, observes_only=True, help=VALIDATION_TOKENS)
    save_every: int = setting(
        250, at_least=1, observes_only=True, help="steps between checkpoints (the last step always has one)"
    )
    log_every: int = setting(10, at_least=1, observes_only=True, help="steps between lines in metrics.jsonl")
    probe: tuple[str, ...] = setting(
        (),
        observes_only=True,
        help="what to measure inside the model while it trains, such as gradient-norm; any other name lists all",
    )
    probe_every: int = setting(
        10,
        at_least=1,
        observes_only=True,
        needs="probe",
        help="steps between measurements (the first step always has one)",
    )
    keep_last: int = setting(2, at_least=1, observes_only=True, help="newest checkpoints to keep, beside the best one")
    patience: int | None = setting(
        None, at_least=1, help="stop after this many validations without a better one; None is never"
    )
    sample_at_eval: bool = setting(False, observes_only=True, help="print a sample after each validation")
    tensorboard: bool = setting(False, observes_only=True, help="also write TensorBoard events into the run folder")
    device: str = setting("auto", help="cpu, cuda, cuda:1, mps, …; auto takes the fastest there is")
    precision: str = setting("auto", choices=("auto", *Precision.registry), help="arithmetic, auto takes the fastest")
    compile: Literal["auto", "on", "off"] = setting(
        "auto", help="torch.compile; auto uses it where it pays for the length of the run"
    )
    seed: int = setting(
        0,
        at_least=0,
        below=1 << 63,
        observes_only=True,
        may_change_on_resume=False,
        help="of the weights, the batches and dropout",
    )

    def __post_init__(self) -> None:
        check_settings(self)
        if self.min_lr > self.lr:
            raise UserError(f"min_lr {self.min_lr} is above lr {self.lr}: lower it")

    @property
    def rates(self) -> Rates:
        """What optimizers are told of the learning rate and the decay."""
        embedding_lr = self.embedding_lr or self.lr
        return Rates(self.lr, embedding_lr, self.head_lr or embedding_lr, self.weight_decay)

    def learning_rate_multiplier(self, step: int) -> float:
        """Of the peak learning rate at `step`, counted from 0."""
        schedule = self.schedule.make()
        floor = self.min_lr / self.lr
        return schedule.with_warmup(step, steps=self.steps, warmup_steps=self.warmup_steps, floor=floor)


@dataclass(frozen=True)
class RunConfig:
    """One run: flat on the command line, nested in `config.json`."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)

    def __post_init__(self) -> None:
        objective, topology = Objective.named(self.training.objective), self.model.topology
        possible = [name for name, other in Objective.registry.items() if topology in other.topologies]
        if possible and topology not in objective.topologies:
            raise UserError(
                f"objective {objective.name!r} cannot train topology {topology!r}: "
                f"choose --objective {' or '.join(possible)}"
            )
        if not self.data.validates:
            for name in ("patience", "sample_at_eval"):
                if getattr(self.training, name):
                    raise UserError(f"{name} waits for validations, and validation_fraction 0 has none: give some text")
        self._check_sequence_length(objective)

    def _check_sequence_length(self, objective: type[Objective]) -> None:
        if (length := self.training.sequence_length) is None:
            return
        if not objective.cuts_text:
            raise UserError(f"sequence_length is {length}, and pairs are as long as they are: leave it out")
        if length > self.model.context_length:
            raise UserError(
                f"sequence_length {length} is more than context_length {self.model.context_length}: lower it"
            )

    @property
    def sequence_length(self) -> int:
        """Tokens of a training sequence, at most."""
        return self.training.sequence_length or self.model.context_length

    def check_trainable(self) -> None:
        """Raises `UserError` for a model that can only be imported: nothing trains its topology."""
        topology = self.model.topology
        if not any(topology in objective.topologies for objective in Objective.registry.values()):
            raise UserError(f"nothing here trains topology {topology!r}: train another topology")

    def to_json(self) -> dict[str, Any]:
        return {"format": FORMAT, **settings.to_json(self)}

    @classmethod
    def from_json(cls, record: dict[str, Any], origin: str) -> RunConfig:
        """The configuration in `record`, read from the file `origin`.

        A setting that it lacks is newer than the run, and has its default, which is how the run behaved or is made to
        by another setting. Raises `UserError` for one that nothing here knows and for a newer format, `StorageError`
        for a value of another type and for what is no configuration.
        """
        parts = [field.name for field in fields(cls)]
        if missing := [name for name in parts if not isinstance(record.get(name), dict)]:
            raise UserError(f"{origin} is no configuration of a run (it has no {', '.join(missing)}): restore it")
        values = as_of_today(record, origin)
        kinds = {"model": ModelConfig, "data": DataConfig, "training": TrainingConfig}
        return cls(**{name: settings.from_json(kind, values[name], origin) for name, kind in kinds.items()})


def as_of_today(record: dict[str, Any], origin: str) -> dict[str, dict[str, Any]]:
    """The parts of the configuration `record`, of any format; raises `UserError` for one that is newer than this."""
    version = record.get("format", 1)
    if version not in (1, FORMAT):
        raise UserError(f"{origin} has format {shown(version)}, and this version reads up to {FORMAT}: update")
    values = {name: record[name] for name in ("model", "data", "training")}
    return from_format_1(values) if version == 1 else values


def from_format_1(record: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The parts of a configuration whose settings were flat, of variants that were not chosen too."""
    model, training = record["model"], record["training"]
    # Until values had a choice of their own, HybridNorm without qk_norm normalised all features together.
    older = "value_norm" not in model and model.get("residual") in ("hybrid", "hybrid-star")
    if older and model.get("qk_norm", "none") == "none":
        model = model | {"qk_norm": "full"}
    training = {"validation_tokens": 0, **training}  # before there was a choice, validations read all of them
    return {
        "model": settings.nested(ModelConfig, model),
        "data": settings.nested(DataConfig, record["data"]),
        "training": settings.nested(TrainingConfig, training),
    }


def with_usual_vocabulary(config: RunConfig) -> ModelConfig:
    """The model of `config` before its data is known: about as many tokens as its tokenizer usually finds."""
    own = Objective.named(config.training.objective).special_tokens
    usual = Tokenizer.named(config.data.tokenizer).usual_vocab_size + len(own)
    return replace(config.model, vocab_size=config.model.vocab_size or usual)


def fixed_settings(config: RunConfig) -> dict[str, Any]:
    """The settings that resuming cannot change: with others it would be another run.

    They are those of the model and the data, and of training those that say so; a setting of a variant is as the part
    of the configuration that chose it.
    """
    fixed: dict[str, Any] = {}
    for part, may_change in ((config.model, False), (config.data, False), (config.training, True)):
        flat = settings.flat(part)
        about = {
            each.name: each.about.get("may_change_on_resume", may_change) for each, _ in settings.settings_of(part)
        }
        fixed |= {name: value for name, value in flat.items() if not about[name]}
    return fixed


def with_vocabulary(model: ModelConfig, prepared: Prepared) -> ModelConfig:
    """`model` for the tokens that the data has, where it leaves their number open."""
    source, target = prepared.tokenizer, prepared.target_tokenizer
    return replace(
        model,
        vocab_size=model.vocab_size or source.vocab_size,
        target_vocab_size=None if target is source else model.target_vocab_size or target.vocab_size,
    )
