"""The configuration of a run, in three frozen dataclasses: model, data and training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

from minitransformer import settings
from minitransformer.errors import UserError
from minitransformer.models.adapters import name_pattern
from minitransformer.models.config import CLASSIFIERS, ModelConfig
from minitransformer.records import shown
from minitransformer.settings import Choice, check_settings, setting
from minitransformer.text.datasets import BatchShape, DataRequest, PreparedData
from minitransformer.text.tokenizers import Tokenizer
from minitransformer.training.data_config import DataConfig
from minitransformer.training.objectives import Objective
from minitransformer.training.optimizers import Optimizer, Rates
from minitransformer.training.parallel import Parallel
from minitransformer.training.precision import Precision
from minitransformer.training.schedules import Schedule
from minitransformer.training.spikes import SpikePolicy

VALIDATION_TOKENS = (
    "tokens of the fixed random subset that each validation but the last reads; 0 is the whole split; None is a tenth "
    "of the tokens trained on in between, but at least 8192"
)


FORMAT = 3
"""version of `config.json`; format 1 had the settings of variants flat, format 2 the tokenizer as a name"""


@dataclass(frozen=True)
class TrainingConfig:
    """Optimisation, validation and logging, and the device."""

    objective: Choice[Objective] = Choice(
        Objective, "causal", changes_task=True, may_change_on_resume=False, help="training objective"
    )
    steps: int = setting(1000, at_least=1, help="number of training steps")
    batch_size: int = setting(16, at_least=1, help="sequences per micro-batch")
    grad_accumulation: int = setting(1, at_least=1, help="micro-batches per step")
    sequence_length: int | None = setting(
        None,
        at_least=1,
        help="tokens per training sequence; None is context_length, or the length of each pair",
    )
    optimizer: Choice[Optimizer] = Choice(Optimizer, "adamw", may_change_on_resume=False, help="optimizer")
    lr: float = setting(1e-3, above=0, help="peak learning rate")
    embedding_lr: float | None = setting(
        None, above=0, help="peak learning rate of embeddings, biases and norms; None is lr"
    )
    head_lr: float | None = setting(None, above=0, help="peak learning rate of an untied head; None is embedding_lr")
    min_lr: float = setting(0.0, at_least=0, help="final learning rate of the schedule")
    freeze: tuple[str, ...] = setting(
        (),
        repeatable=True,
        may_change_on_resume=False,
        help="regular expression for the whole names of weights that are not trained, such as 'embedding.*' (may be "
        "given several times)",
    )
    keep_zeros: bool = setting(
        False,
        may_change_on_resume=False,
        help="weights of linear maps that are 0 before a step are 0 after it, so that a pruned model stays pruned",
    )
    teacher: str | None = setting(
        None,
        may_change_on_resume=False,
        help="run folder of a larger model with the same tokenizer, whose predictions are learned beside the targets "
        "(distillation)",
    )
    teacher_sha256: str | None = setting(
        None, needs="teacher", may_change_on_resume=False, help="SHA-256 of the teacher's weights; None is found"
    )
    distill_weight: float = setting(
        0.5,
        above=0,
        at_most=1,
        needs="teacher",
        may_change_on_resume=False,
        help="weight of the divergence from the teacher; the rest is that of the targets",
    )
    distill_temperature: float = setting(
        2.0,
        above=0,
        needs="teacher",
        may_change_on_resume=False,
        help="temperature of both predictions in the divergence",
    )
    schedule: Choice[Schedule] = Choice(Schedule, "cosine", help="learning-rate schedule")
    warmup_steps: int = setting(50, at_least=0, help="steps of linear learning-rate warm-up")
    weight_decay: float = setting(0.1, at_least=0, help="weight decay of matrices (not of biases and norms)")
    expert_balance: float = setting(0.01, at_least=0, help="weight of the load-balancing loss of mixtures of experts")
    grad_clip: float = setting(1.0, at_least=0, help="maximum gradient norm; 0 disables clipping")
    max_skipped_steps: int = setting(
        20,
        at_least=1,
        help="skipped steps in a row, for an infinite or NaN loss or gradient, that end the run with exit code 3",
    )
    on_spike: Choice[SpikePolicy] = Choice(
        SpikePolicy,
        "stop",
        help="what follows max_skipped_steps: stop, or rollback to a checkpoint, also after a spike of the loss",
    )
    on_oom: Literal["stop", "halve"] = setting(
        "stop",
        help="if a step runs out of memory, stop, or halve the micro-batches and double their number in a step",
    )
    eval_every: int = setting(250, at_least=1, help="steps between validations; the last step always has one")
    validation_tokens: int | None = setting(None, at_least=0, observes_only=True, help=VALIDATION_TOKENS)
    save_every: int = setting(
        250, at_least=1, observes_only=True, help="steps between checkpoints; the last step always has one"
    )
    log_every: int = setting(10, at_least=1, observes_only=True, help="steps between records in metrics.jsonl")
    probe: tuple[str, ...] = setting(
        (),
        observes_only=True,
        help="diagnostics to record during training, such as gradient-norm; an unknown name lists all",
    )
    probe_every: int = setting(
        10,
        at_least=1,
        observes_only=True,
        needs="probe",
        help="steps between diagnostics; the first step always has them",
    )
    keep_last: int = setting(
        2, at_least=1, observes_only=True, help="number of latest checkpoints to keep, besides the best"
    )
    patience: int | None = setting(
        None, at_least=1, help="early stopping after this many validations without improvement; None is off"
    )
    sample_at_eval: bool = setting(False, observes_only=True, help="generate a sample after each validation")
    tensorboard: bool = setting(False, observes_only=True, help="also write TensorBoard events to the run folder")
    device: str = setting("auto", help="cpu, cuda, cuda:1, mps, …; auto is the fastest available")
    precision: str = setting(
        "auto", choices=("auto", *Precision.registry), help="precision of matrix products; auto is the fastest"
    )
    compile: Literal["auto", "on", "off"] = setting(
        "auto", help="torch.compile; auto uses it if the run is long enough to profit"
    )
    activation_checkpointing: bool = setting(
        False,
        observes_only=True,
        help="recompute the inside of each block in the backward pass: less memory, and about a third more time",
    )
    parallel: Choice[Parallel] = Choice(
        Parallel, "ddp", observes_only=True, help="how the ranks that torchrun starts share the training"
    )
    rank_timeout: float = setting(
        60.0,
        at_least=1,
        observes_only=True,
        help="seconds after which a rank whose process does not answer ends the run",
    )
    seed: int = setting(
        0,
        at_least=0,
        below=1 << 63,
        must="at least 0 and below 2 to the 63rd",
        observes_only=True,
        may_change_on_resume=False,
        help="random seed of weights, batches and dropout",
    )

    def __post_init__(self) -> None:
        check_settings(self)
        if self.min_lr > self.lr:
            raise UserError(f"min_lr {self.min_lr} is above lr {self.lr}: lower it")

    @property
    def rates(self) -> Rates:
        """The learning rates and the weight decay."""
        embedding_lr = self.embedding_lr or self.lr
        return Rates(self.lr, embedding_lr, self.head_lr or embedding_lr, self.weight_decay)

    def learning_rate_multiplier(self, step: int) -> float:
        """The learning rate at `step`, counted from 0, relative to its peak."""
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
        for pattern in self.training.freeze:
            name_pattern(pattern, "freeze")
        if self.training.freeze and self.model.adapter.name != "none":
            raise UserError(f"adapter {self.model.adapter.name!r} freezes all other weights already: leave freeze out")
        objective, topology = self.training.objective.variant, self.model.topology
        possible = [name for name, other in Objective.registry.items() if topology in other.topologies]
        if possible and topology not in objective.topologies:
            raise UserError(
                f"objective {objective.name!r} cannot train topology {topology!r}: "
                f"choose --objective {' or '.join(possible)}"
            )
        if self.training.activation_checkpointing and topology == "rnn":
            raise UserError(
                "activation_checkpointing recomputes transformer blocks, and topology 'rnn' has none: leave it out"
            )
        self._choose_dataset(objective)
        if not self.data.validates:
            for name in ("patience", "sample_at_eval"):
                if getattr(self.training, name):
                    raise UserError(
                        f"{name} needs validation data, and validation_fraction is 0: raise it, or leave {name} out"
                    )
        self._check_sequence_length()

    def _choose_dataset(self, objective: type[Objective]) -> None:
        """Set the kind of data that `objective` needs; raises `UserError` if another one was chosen."""
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
            raise UserError(f"sequence_length is {length}, but pairs keep their own length: leave it out")
        if length > self.model.text_length:
            context, prefix = self.model.context_length, self.model.context_length - self.model.text_length
            beside = f", of which {prefix} tokens are the prompt's" if prefix else ""
            raise UserError(f"sequence_length {length} is greater than context_length {context}{beside}: lower it")

    def implied(self, changes: Mapping[str, Any]) -> dict[str, Any]:
        """Further changes that follow from the flat `changes`: another objective brings its kind of data and head."""
        name = changes.get("objective", self.training.objective.name)
        objective = Objective.registry.get(name)
        if objective is None:
            return {}
        if changes.get("data_kind", objective.dataset.name) != objective.dataset.name:
            raise _other_dataset(objective, changes["data_kind"])
        brought: dict[str, Any] = {"data_kind": objective.dataset.name}
        if "topology" not in changes and (topology := objective.classifier_of.get(self.model.topology)):
            brought |= {"topology": topology, "next_sentence": False}
        if not objective.dataset.cuts_text and self.data.dataset.variant.cuts_text:
            brought["sequence_length"] = None
        if objective.dataset.usual_data and self.data.data == DataConfig.data and "data" not in changes:
            brought["data"] = objective.dataset.usual_data
        return brought

    @property
    def sequence_length(self) -> int:
        """Maximum number of tokens of a training sequence."""
        return self.training.sequence_length or self.model.text_length

    def batch_shape(self, window: int, whole: bool = False) -> BatchShape:
        """The shape of a step's batches, in windows of `window` tokens."""
        return BatchShape(window, self.training.batch_size, self.training.grad_accumulation, whole)

    @property
    def tokens_per_step(self) -> int:
        """Approximate number of tokens per step."""
        return self.data.dataset.make().tokens_per_step(self.batch_shape(self.sequence_length))

    def prepare(self, tokenizers: Sequence[Tokenizer] = (), *, only_cached: bool = False) -> PreparedData:
        """The tokenized data of this run; `tokenizers` are fitted unless given.

        Raises `UserError` for data that cannot be used, and with `only_cached` `NotPrepared` for data that is not yet.
        """
        return self.data.dataset.make().prepare(self.data_request(tokenizers, only_cached=only_cached))

    def data_request(self, tokenizers: Sequence[Tokenizer] = (), *, only_cached: bool = False) -> DataRequest:
        """What is asked of the dataset of this run."""
        data = self.data
        return DataRequest(
            data.data,
            data.tokenizer,
            self.sequence_length,
            field=data.field,
            validation_data=data.validation_data,
            validation_fraction=data.validation_fraction,
            vocab_size=self.model.vocab_size,
            special_tokens=self.training.objective.variant.special_tokens,
            tokenizers=tokenizers,
            only_cached=only_cached,
        )

    def check_trainable(self) -> None:
        """Raises `UserError` for a topology that can only be imported."""
        topology = self.model.topology
        if not any(topology in objective.topologies for objective in Objective.registry.values()):
            raise UserError(f"topology {topology!r} can only be imported, not trained: choose another topology")

    def to_json(self) -> dict[str, Any]:
        return {"format": FORMAT, **settings.to_json(self)}

    @classmethod
    def from_json(cls, record: dict[str, Any], origin: str) -> RunConfig:
        """The configuration in `record`, read from the file `origin`.

        Missing settings are newer than the run, and have their defaults, which preserve its behaviour, possibly
        through another setting. Raises `UserError` for an unknown setting or a newer format, `StorageError`
        for a value of another type or a record that is not a configuration.
        """
        parts = [field.name for field in fields(cls)]
        if missing := [name for name in parts if not isinstance(record.get(name), dict)]:
            raise UserError(f"{origin} is not the configuration of a run (it has no {', '.join(missing)}): restore it")
        values = as_of_today(record, origin)
        kinds = {"model": ModelConfig, "data": DataConfig, "training": TrainingConfig}
        return cls(**{name: settings.from_json(kind, values[name], origin) for name, kind in kinds.items()})


def _other_dataset(objective: type[Objective], name: str) -> UserError:
    return UserError(
        f"objective {objective.name!r} needs data kind {objective.dataset.name!r}, not {name!r}: "
        "leave out --data-kind, or choose another --objective"
    )


def as_of_today(record: dict[str, Any], origin: str) -> dict[str, dict[str, Any]]:
    """The parts of the configuration `record`, migrated to the current format; raises `UserError` for a newer one."""
    version = record.get("format", 1)
    if version not in (1, 2, FORMAT):
        raise UserError(f"{origin} has format {shown(version)}, and this version reads up to {FORMAT}: update")
    values = {name: record[name] for name in ("model", "data", "training")}
    return from_format_1(values) if version == 1 else from_format_2(values) if version == 2 else values


def from_format_1(record: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Migrate a configuration with flat settings, including those of variants that were not chosen."""
    model, training = record["model"], record["training"]
    # Before `value_norm` existed, HybridNorm without qk_norm normalised the features of all heads together.
    older = "value_norm" not in model and model.get("residual") in ("hybrid", "hybrid-star")
    if older and model.get("qk_norm", "none") == "none":
        model = model | {"qk_norm": "full"}
    training = {"validation_tokens": 0, **training}  # before this setting, validations read the whole split
    objective = Objective.registry.get(str(training.get("objective")), TrainingConfig.objective.variant)
    data = {"data_kind": objective.dataset.name, **record["data"]}
    if "batch_tokens" in training:
        data["batch_tokens"] = training.pop("batch_tokens")
    return {
        "model": settings.nested(ModelConfig, model),
        "data": settings.nested(DataConfig, data),
        "training": settings.nested(TrainingConfig, training),
    }


def from_format_2(record: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Migrate a configuration in which the tokenizer was a name, and had no settings."""
    tokenizer = {"tokenizer": {"name": record["data"]["tokenizer"]}} if "tokenizer" in record["data"] else {}
    return {**record, "data": {**record["data"], **tokenizer}}


def with_usual_vocabulary(config: RunConfig) -> ModelConfig:
    """The model of `config` with the usual vocabulary size of its tokenizer, before the data is known."""
    own = config.training.objective.variant.special_tokens
    tokenizer = config.data.tokenizer
    usual = tokenizer.variant.usual_vocab_size(tokenizer.settings) + len(own)
    model = replace(config.model, vocab_size=config.model.vocab_size or usual)
    return replace(model, num_classes=model.num_classes or (2 if model.topology in CLASSIFIERS[1] else None))


def with_vocabulary(model: ModelConfig, prepared: PreparedData) -> ModelConfig:
    """`model` with the vocabulary sizes of the data, where it leaves them open."""
    source, target, classes = prepared.tokenizer, prepared.target_tokenizer, len(prepared.classes)
    if model.num_classes not in (None, classes):
        raise UserError(
            f"num_classes is {model.num_classes}, and the data has {classes} classes: leave it out, or correct the data"
        )
    return replace(
        model,
        vocab_size=model.vocab_size or source.vocab_size,
        target_vocab_size=None if target.shares_ids(source) else model.target_vocab_size or target.vocab_size,
        num_classes=classes or None,
    )
