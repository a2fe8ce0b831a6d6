"""Everything that a training run is told, in three frozen records: the model, the data, and the training itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

from minitransformer import settings
from minitransformer.errors import UserError
from minitransformer.models.config import ModelConfig
from minitransformer.records import shown
from minitransformer.settings import Choice, check_settings, setting
from minitransformer.text.datasets import BatchShape, DataRequest, Dataset, PreparedData
from minitransformer.text.recipes import known
from minitransformer.text.tokenizers import Tokenizer
from minitransformer.training.objectives import Objective
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

    dataset: Choice[Dataset] = Choice(
        Dataset, "text", flag="data_kind", changes_task=True, help="which follows from the objective"
    )
    data: str | tuple[str, ...] = setting("pydocs", may_change_on_resume=True, changes_task=True, help=DATA)
    field: str = setting(
        "text", changes_task=True, help="the field of each .jsonl line, table row or array element that holds the text"
    )
    validation_data: str | tuple[str, ...] | None = setting(
        None,
        may_change_on_resume=True,
        changes_task=True,
        help="what to validate on, named as data is; None takes some of data",
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
        self.dataset.make().check(self.validation_data)

    @property
    def validates(self) -> bool:
        """Whether there is text to validate on."""
        return self.validation_fraction > 0 or self.validation_data is not None


@dataclass(frozen=True)
class TrainingConfig:
    """How the weights are learned, how often to look, and on what machine."""

    objective: Choice[Objective] = Choice(
        Objective, "causal", changes_task=True, may_change_on_resume=False, help="what is learned"
    )
    steps: int = setting(1000, at_least=1, help="updates of the weights")
    batch_size: int = setting(16, at_least=1, help="sequences in a micro-batch")
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
        must="at least 0 and below 2 to the 63rd",
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
        objective, topology = self.training.objective.variant, self.model.topology
        possible = [name for name, other in Objective.registry.items() if topology in other.topologies]
        if possible and topology not in objective.topologies:
            raise UserError(
                f"objective {objective.name!r} cannot train topology {topology!r}: "
                f"choose --objective {' or '.join(possible)}"
            )
        self._choose_dataset(objective)
        if not self.data.validates:
            for name in ("patience", "sample_at_eval"):
                if getattr(self.training, name):
                    raise UserError(f"{name} waits for validations, and validation_fraction 0 has none: give some text")
        self._check_sequence_length()

    def _choose_dataset(self, objective: type[Objective]) -> None:
        """The kind of data that `objective` learns from, unless another one was chosen, which is a mistake."""
        dataset, wanted = self.data.dataset, objective.dataset.choose()
        if dataset.variant is wanted.variant:
            return
        if dataset != DataConfig().dataset:
            raise _other_dataset(objective, dataset.name)
        object.__setattr__(self, "data", replace(self.data, dataset=wanted))

    def _check_sequence_length(self) -> None:
        if (length := self.training.sequence_length) is None:
            return
        if not self.data.dataset.variant.cuts_text:
            raise UserError(f"sequence_length is {length}, and pairs are as long as they are: leave it out")
        if length > self.model.context_length:
            raise UserError(
                f"sequence_length {length} is more than context_length {self.model.context_length}: lower it"
            )

    def implied(self, changes: Mapping[str, Any]) -> dict[str, Any]:
        """What follows from the flat settings `changes`: with another objective comes its kind of data."""
        name = changes.get("objective", self.training.objective.name)
        objective = Objective.registry.get(name)
        if objective is None:
            return {}
        if changes.get("data_kind", objective.dataset.name) != objective.dataset.name:
            raise _other_dataset(objective, changes["data_kind"])
        return {"data_kind": objective.dataset.name}

    @property
    def sequence_length(self) -> int:
        """Tokens of a training sequence, at most."""
        return self.training.sequence_length or self.model.context_length

    def batch_shape(self, window: int, whole: bool = False) -> BatchShape:
        """What a step reads, in windows of so many tokens."""
        return BatchShape(window, self.training.batch_size, self.training.grad_accumulation, whole)

    @property
    def tokens_per_step(self) -> int:
        """How many tokens a step reads, about."""
        return self.data.dataset.make().tokens_per_step(self.batch_shape(self.sequence_length))

    def prepare(self, tokenizers: Sequence[Tokenizer] = ()) -> PreparedData:
        """The data of this run as token ids; `tokenizers` are those that it has already, otherwise they are fitted.

        Raises `UserError` for data that cannot be used.
        """
        data = self.data
        request = DataRequest(
            data.data,
            data.tokenizer,
            self.sequence_length,
            field=data.field,
            validation_data=data.validation_data,
            validation_fraction=data.validation_fraction,
            vocab_size=self.model.vocab_size,
            special_tokens=self.training.objective.variant.special_tokens,
            tokenizers=tokenizers,
        )
        return data.dataset.make().prepare(request)

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


def _other_dataset(objective: type[Objective], name: str) -> UserError:
    return UserError(
        f"objective {objective.name!r} learns from data of the kind {objective.dataset.name!r}, not {name!r}: "
        "leave out --data-kind, or choose another --objective"
    )


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
    objective = Objective.registry.get(str(training.get("objective")), TrainingConfig.objective.variant)
    data = {"data_kind": objective.dataset.name, **record["data"]}
    if "batch_tokens" in training:
        data["batch_tokens"] = training.pop("batch_tokens")
    return {
        "model": settings.nested(ModelConfig, model),
        "data": settings.nested(DataConfig, data),
        "training": settings.nested(TrainingConfig, training),
    }


def with_usual_vocabulary(config: RunConfig) -> ModelConfig:
    """The model of `config` before its data is known: about as many tokens as its tokenizer usually finds."""
    own = config.training.objective.variant.special_tokens
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


def with_vocabulary(model: ModelConfig, prepared: PreparedData) -> ModelConfig:
    """`model` for the tokens that the data has, where it leaves their number open."""
    source, target = prepared.tokenizer, prepared.target_tokenizer
    return replace(
        model,
        vocab_size=model.vocab_size or source.vocab_size,
        target_vocab_size=None if target is source else model.target_vocab_size or target.vocab_size,
    )
