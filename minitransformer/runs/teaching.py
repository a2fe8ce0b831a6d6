"""The teacher of a run: another run, whose predictions it learns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from minitransformer.errors import StorageError, UserError
from minitransformer.models.model import Model
from minitransformer.runs.open import Run
from minitransformer.text.datasets import PreparedData
from minitransformer.text.tokenizers import Tokenizer
from minitransformer.training.config import RunConfig
from minitransformer.training.weights import weights_digest


def with_teacher(config: RunConfig, prepared: PreparedData) -> RunConfig:
    """`config`, with known vocabulary, and the checksum of its teacher; raises `UserError` if that cannot teach it."""
    if config.training.teacher is None:
        return config
    teacher = Run.open(Path(config.training.teacher))
    _check_teaches(teacher, config, list(dict.fromkeys((prepared.tokenizer, prepared.target_tokenizer))))
    path, digest = str(teacher.path.absolute()), weights_digest(teacher.checkpoint())
    if config.training.teacher_sha256 not in (None, digest):
        raise UserError(f"the teacher {teacher.path} has weights with another teacher_sha256, {digest}: leave it out")
    return replace(config, training=replace(config.training, teacher=path, teacher_sha256=digest))


def open_teacher(config: RunConfig) -> Model | None:
    """The model of the teacher, if there is one; raises `StorageError` if its weights have changed."""
    if config.training.teacher is None:
        return None
    if not (path := Path(config.training.teacher)).is_dir():
        raise StorageError(f"the teacher {path} is not there, as it was at the start of the run: put it back")
    teacher = Run.open(path)
    checkpoint = teacher.checkpoint()
    if weights_digest(checkpoint) != config.training.teacher_sha256:
        raise StorageError(f"the teacher {teacher.path} has other weights than at the start of the run: restore them")
    return teacher.load_model(checkpoint.name)


def _check_teaches(teacher: Run, config: RunConfig, tokenizers: Sequence[Tokenizer]) -> None:
    own, model = teacher.config.model, config.model
    if not config.training.objective.variant.distills or model.next_sentence or own.next_sentence:
        raise UserError(
            f"objective {config.training.objective.name!r} learns from labels alone, and not from a teacher: leave "
            "--teacher out"
        )
    if [each.fingerprint for each in teacher.tokenizers] != [each.fingerprint for each in tokenizers]:
        raise UserError(
            f"the teacher {teacher.path} has another tokenizer, so that its predictions are of other tokens: give the "
            "data and the tokenizer that it was trained with"
        )
    for name in ("topology", "vocab_size", "target_vocab_size"):
        if getattr(own, name) != getattr(model, name):
            raise UserError(
                f"the teacher {teacher.path} has {name} {getattr(own, name)}, and the run {getattr(model, name)}: "
                "they must be the same"
            )
    if own.text_length < config.sequence_length:
        raise UserError(
            f"the teacher {teacher.path} reads {own.text_length} tokens, and sequences have {config.sequence_length}: "
            f"give --sequence-length {own.text_length}"
        )
