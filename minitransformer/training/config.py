"""Everything that a training run is told, in three frozen records: the model, the data, and the training itself."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields, replace
from typing import Annotated, Any, Literal

from typing_extensions import Doc

from minitransformer.errors import UserError
from minitransformer.models.config import SMALLEST, ModelConfig, check_numbers, choice
from minitransformer.records import checked_fields
from minitransformer.registry import lookup
from minitransformer.text.recipes import known
from minitransformer.text.tokenizers import Tokenizer
from minitransformer.training.muon import NEWTON_SCHULZ
from minitransformer.training.objectives import Objective
from minitransformer.training.objectives.base import Prepared
from minitransformer.training.optimizers import OPTIMIZERS, OptimizerSettings
from minitransformer.training.precision import Precision
from minitransformer.training.schedules import SCHEDULES, learning_rate_share

DATA = Doc(
    "what to learn from, one or several: a recipe, a file, a folder or a glob of .txt, .md, .jsonl or source code; "
    "a .csv, .tsv, .parquet or a .json array; - is standard input; for pairs a .tsv, a .jsonl or one of two parallel "
    f"files. Recipes: {', '.join(known())}"
)

VALIDATION_TOKENS = Doc(
    "of validation, read each time: the same ones, drawn by seed, but all in the last step; 0 is always all; None "
    "is a tenth of the tokens trained on in between, and 8192 at least"
)


@dataclass(frozen=True)
class DataConfig:
    """Which text, and how it becomes tokens."""

    data: Annotated[str | tuple[str, ...], DATA] = "pydocs"
    field: str = "text"
    """the field of each .jsonl line, table row or array element that holds the text"""
    target_data: str | None = None
    """pairs: the file whose lines belong to those of data"""
    validation_data: str | tuple[str, ...] | None = None
    """what to validate on, named as data is; None takes some of data"""
    validation_target_data: str | None = None
    """pairs: the file whose lines belong to those of validation_data"""
    source_field: str = "source"
    """pairs: the field of each .jsonl line that holds the source"""
    target_field: str = "target"
    """pairs: the field of each .jsonl line that holds the target"""
    lowercase: bool = False
    """pairs: in lower case only, also what is translated later"""
    separate_vocabularies: bool = False
    """pairs: a vocabulary for each side"""
    too_long: Literal["skip", "cut"] = "skip"
    """pairs: what to do with a side that is longer than the context"""
    tokenizer: Annotated[str, choice("tokenizer", Tokenizer.registry)] = "bpe"
    validation_fraction: float = 0.1
    """share of the text that is kept for validation; 0 trains on all of it, and validates nothing"""

    def __post_init__(self) -> None:
        check_numbers(self)
        Tokenizer.named(self.tokenizer)
        for name in ("data", "validation_data"):
            # One source has one spelling, on the command line and in the files of older runs.
            if isinstance(value := getattr(self, name), tuple):
                if not value:
                    raise UserError(f"{name} names nothing: give a file, a folder or a recipe")
                object.__setattr__(self, name, value[0] if len(value) == 1 else value)
        if not 0 <= self.validation_fraction < 1:
            raise UserError(f"validation_fraction is {self.validation_fraction}: it must be at least 0 and below 1")
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

    objective: Annotated[str, choice("what is learned", Objective.registry)] = "causal"
    steps: int = 1000
    """updates of the weights"""
    batch_size: int = 16
    """sequences in a micro-batch"""
    batch_tokens: int = 2048
    """pairs: tokens in a micro-batch, padding included, on the side that has more"""
    grad_accumulation: int = 1
    """micro-batches in a step"""
    sequence_length: int | None = None
    """tokens of a training sequence, at most context_length; None is context_length, or the length of the pairs"""
    optimizer: Annotated[str, choice("optimizer", OPTIMIZERS)] = "adamw"
    lr: float = 1e-3
    """highest learning rate"""
    embedding_lr: float | None = None
    """highest learning rate of embeddings, biases and norms; None is lr"""
    head_lr: float | None = None
    """highest learning rate of a head that is not tied to the embedding; None is embedding_lr"""
    min_lr: float = 0.0
    """learning rate that the schedule ends with"""
    schedule: Annotated[str, choice("course of the learning rate", SCHEDULES)] = "cosine"
    warmup_steps: int = 50
    """steps in which the learning rate grows from 0"""
    weight_decay: float = 0.1
    """decay of matrices (never of biases and norms)"""
    beta1: float = 0.9
    """AdamW: decay of the mean of gradients"""
    beta2: float = 0.95
    """AdamW: decay of the mean of squared gradients"""
    eps: float = 1e-8
    """AdamW: added to the root of the mean of squared gradients"""
    momentum: float = 0.95
    """Muon: decay of the mean of gradients"""
    newton_schulz: Annotated[str, choice("Muon: coefficients of these steps", NEWTON_SCHULZ)] = "jordan"
    newton_schulz_steps: int = 5
    """Muon: steps towards an orthogonal update; fewer are cheaper"""
    label_smoothing: float = 0.0
    """encoder-decoders: share of the probability that training gives to all tokens alike"""
    mask_probability: float = 0.15
    """masked: share of the tokens that are hidden"""
    span_density: float = 0.15
    """span-corruption: share of the tokens that are cut out"""
    mean_span: float = 3.0
    """span-corruption: tokens of a span, on average"""
    expert_balance: float = 0.01
    """mixtures of experts: weight of the loss that shares the work among them"""
    grad_clip: float = 1.0
    """largest norm of the gradient; 0 switches clipping off"""
    eval_every: int = 250
    """steps between validations (the last step always has one)"""
    validation_tokens: Annotated[int | None, VALIDATION_TOKENS] = None
    save_every: int = 250
    """steps between checkpoints (the last step always has one)"""
    log_every: int = 10
    """steps between lines in metrics.jsonl"""
    probe: tuple[str, ...] = ()
    """what to measure inside the model while it trains, such as gradient-norm; an unknown name is answered with all"""
    probe_every: int = 10
    """steps between measurements (the first step always has one)"""
    keep_last: int = 2
    """newest checkpoints to keep, beside the best one"""
    patience: int | None = None
    """stop after this many validations without a better one; None is never"""
    sample_at_eval: bool = False
    """print a sample after each validation"""
    tensorboard: bool = False
    """also write TensorBoard events into the run folder"""
    device: str = "auto"
    """cpu, cuda, cuda:1, mps, …; auto takes the fastest there is"""
    precision: Annotated[str, choice("arithmetic, auto takes the fastest", ("auto", *Precision.registry))] = "auto"
    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile; auto uses it where it pays for the length of the run"""
    seed: int = 0
    """of the weights, the batches and dropout"""

    def __post_init__(self) -> None:
        check_numbers(self)
        minimum = {
            **dict.fromkeys(("steps", "batch_size", "batch_tokens", "grad_accumulation", "keep_last", "mean_span"), 1),
            **dict.fromkeys(("eval_every", "save_every", "log_every", "probe_every", "newton_schulz_steps"), 1),
            **dict.fromkeys(("warmup_steps", "weight_decay", "grad_clip", "min_lr", "seed", "expert_balance"), 0),
        }
        for name, least in minimum.items():
            if getattr(self, name) < least:
                raise UserError(f"{name} is {getattr(self, name)}: it must be at least {least}")
        if self.seed >= 1 << 63:
            raise UserError(f"seed is {self.seed}: it must be below 2 to the 63rd")
        if self.patience is not None and self.patience < 1:
            raise UserError(f"patience is {self.patience}: it must be at least 1")
        if self.sequence_length is not None and self.sequence_length < 1:
            raise UserError(f"sequence_length is {self.sequence_length}: it must be at least 1")
        if self.validation_tokens is not None and self.validation_tokens < 0:
            raise UserError(f"validation_tokens is {self.validation_tokens}: it must be at least 0, which is all")
        for name in ("lr", "embedding_lr", "head_lr", "eps"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise UserError(f"{name} is {value}: it must be above 0")
        if self.eps < SMALLEST:
            raise UserError(f"eps is {self.eps}, which is 0 in float32: it must be at least {SMALLEST:.1e}")
        if self.min_lr > self.lr:
            raise UserError(f"min_lr {self.min_lr} is above lr {self.lr}: lower it")
        for name in ("mask_probability", "span_density"):
            if not 0 < getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}: it must be between 0 and 1")
        for name in ("beta1", "beta2", "momentum", "label_smoothing"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}: it must be at least 0 and below 1")
        Objective.named(self.objective)
        lookup("optimizer", self.optimizer, OPTIMIZERS)
        lookup("Newton-Schulz iteration", self.newton_schulz, NEWTON_SCHULZ)
        lookup("schedule", self.schedule, SCHEDULES)
        if self.precision != "auto":
            Precision.named(self.precision)

    @property
    def optimizer_settings(self) -> OptimizerSettings:
        """What the optimizers are made from."""
        return OptimizerSettings(
            lr=self.lr,
            embedding_lr=self.embedding_lr or self.lr,
            head_lr=self.head_lr or self.embedding_lr or self.lr,
            weight_decay=self.weight_decay,
            beta1=self.beta1,
            beta2=self.beta2,
            momentum=self.momentum,
            newton_schulz=self.newton_schulz,
            newton_schulz_steps=self.newton_schulz_steps,
            eps=self.eps,
        )

    def learning_rate_share(self, step: int) -> float:
        """The share of the highest learning rate at `step`, counted from 0."""
        schedule, floor = SCHEDULES[self.schedule], self.min_lr / self.lr
        return learning_rate_share(schedule, step, steps=self.steps, warmup_steps=self.warmup_steps, floor=floor)


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
        return asdict(self)

    @classmethod
    def from_json(cls, record: dict[str, Any], origin: str) -> RunConfig:
        """The configuration in `record`, read from the file `origin`.

        A field that it lacks is newer than the run, and has its default, which is how the run behaved or is made to by
        another field; but before `validation_tokens`, all were read. Raises `UserError` for one that nothing here
        knows, for a value of another type, and for what is no configuration.
        """
        parts: dict[str, Any] = {}
        if missing := [field.name for field in fields(cls) if not isinstance(record.get(field.name), dict)]:
            raise UserError(f"{origin} is no configuration of a run (it has no {', '.join(missing)}): restore it")
        for name, part in (("model", ModelConfig), ("data", DataConfig), ("training", TrainingConfig)):
            values = _today(record[name]) if name == "model" else record[name]
            if unknown := values.keys() - {field.name for field in fields(part)}:
                what = ", ".join(sorted(unknown))
                raise UserError(
                    f"{origin} has settings that are unknown here ({what}): update, as a newer version wrote it"
                )
            values = checked_fields(part, values, origin)
            if name == "training":
                values.setdefault("validation_tokens", 0)
            try:
                parts[name] = part(**values)
            except UserError as error:
                raise UserError(f"{origin}: {error}") from None
        return cls(**parts)


def _today(model: dict[str, Any]) -> dict[str, Any]:
    """The fields of a model, as they are meant today."""
    # Until values had a choice of their own, HybridNorm without qk_norm normalised all features together.
    older = "value_norm" not in model and model.get("residual") in ("hybrid", "hybrid-star")
    return model | {"qk_norm": "full"} if older and model.get("qk_norm", "none") == "none" else model


def with_usual_vocabulary(config: RunConfig) -> ModelConfig:
    """The model of `config` before its data is known: about as many tokens as its tokenizer usually finds."""
    own = Objective.named(config.training.objective).special_tokens
    usual = Tokenizer.named(config.data.tokenizer).usual_vocab_size + len(own)
    return replace(config.model, vocab_size=config.model.vocab_size or usual)


# What resuming may not change of the training itself, and what it may of the data: where the same text lies.
FIXED = ("objective", "optimizer", "seed")
PLACES = ("data", "target_data", "validation_data", "validation_target_data")


def fixed_settings(config: RunConfig) -> dict[str, Any]:
    """The settings that resuming cannot change: with others it would be another run."""
    training, data = asdict(config.training), asdict(config.data)
    return {
        **asdict(config.model),
        **{name: value for name, value in data.items() if name not in PLACES},
        **{name: training[name] for name in FIXED},
    }


def with_vocabulary(model: ModelConfig, prepared: Prepared) -> ModelConfig:
    """`model` for the tokens that the data has, where it leaves their number open."""
    source, target = prepared.tokenizer, prepared.target_tokenizer
    return replace(
        model,
        vocab_size=model.vocab_size or source.vocab_size,
        target_vocab_size=None if target is source else model.target_vocab_size or target.vocab_size,
    )
