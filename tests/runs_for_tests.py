"""Small runs on real code: a text, a configuration, the trainer between them, and what `train.py` makes of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from minitransformer.commands import train as command
from minitransformer.evaluation.items import Totals
from minitransformer.evaluation.metrics import values_of
from minitransformer.models.config import ModelConfig
from minitransformer.models.model import Model, build_model
from minitransformer.runs import Run
from minitransformer.settings import all_declared, with_settings
from minitransformer.text.corpora import open_corpus
from minitransformer.text.datasets.text import PreparedText, TextPreparation
from minitransformer.text.tokenizers import MASK, Bytes
from minitransformer.training.checkpoint import write_checkpoint
from minitransformer.training.config import DataConfig, RunConfig, TrainingConfig
from minitransformer.training.learner import Learner, StepResult, build_learner
from minitransformer.training.loader import Loader
from minitransformer.training.logging import Logs, RunFiles
from minitransformer.training.loop import Trainer
from minitransformer.training.machine import Machine
from minitransformer.training.objectives import Objective
from minitransformer.training.signals import StopRequest
from minitransformer.training.validation import Validation

TEXT = "".join(f"Line {i}: the {'quick brown' if i % 3 else 'slow red'} fox counts {i * i}.\n" for i in range(200))

TINY = RunConfig(
    model=ModelConfig(d_model=16, num_layers=2, num_heads=2, context_length=16, vocab_size=260),
    data=DataConfig(tokenizer="bytes"),
    training=TrainingConfig(
        steps=12, batch_size=2, lr=1e-2, warmup_steps=2, eval_every=5, save_every=3, log_every=1, precision="fp32"
    ),
)


def configured(config: RunConfig = TINY, **changes: object) -> RunConfig:
    """`config` with changed settings, wherever they belong."""
    return with_settings(config, changes)


def chosen_for(record: type, name: str) -> dict[str, str]:
    """The choices without which a configuration has no setting of this name."""
    owners = [each.variant for each in all_declared(record) if each.name == name]
    choices: dict[str, str] = {}
    while owners and owners[0] is not None:
        choice = next(
            each for each in all_declared(record) if each.family and owners[0] in each.family.registry.values()
        )
        choices[choice.name] = owners[0].name
        owners = [choice.variant]
    return choices


def validation_of(loss: float, **about: Any) -> Validation:
    """A validation of which only the loss is known."""
    return Validation(values_of(Totals(nats=loss, targets=1)), **about)


def prepared_text(folder: Path, text: str = TEXT) -> PreparedText:
    source = folder / "text.txt"
    if not source.exists():
        source.write_text(text)
    return TextPreparation(
        open_corpus(str(source)), Bytes.choose(), context_length=16, cache=folder / "cache", workers=1, progress=False
    ).run()


CPU = torch.device("cpu")


def cpu(precision: str) -> Machine:
    """This CPU, without torch.compile."""
    return Machine(CPU, precision, compile=False, description="")


def learner_for(text: PreparedText, config: RunConfig = TINY, **choices: Any) -> Learner:
    return build_learner(config, text, cpu(config.training.precision), **choices)


class Reader(torch.optim.SGD):
    """An optimizer that keeps the gradients of each step, and changes nothing."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__([{"params": list(model.parameters()), "peak_lr": 0.0}], lr=0.0)
        self.model = model
        self.gradients: list[dict[str, Tensor]] = []

    def step(self, closure: Any = None) -> None:
        named = self.model.named_parameters()
        self.gradients.append({name: p.grad.clone() for name, p in named if p.grad is not None})


def loader_of(objective: Objective, config: RunConfig = TINY) -> Loader:
    """A loader without data, for steps whose batches a test gives."""
    return Loader(None, objective, config.batch_shape(objective.window), config.training.seed)  # type: ignore[arg-type]


def reading_learner(model: Model, objective: Objective, config: RunConfig) -> tuple[Learner, Reader]:
    """A learner of `model` that only reads the gradients of its steps."""
    learner, reader = Learner(config, model, loader_of(objective, config), cpu("fp32")), Reader(model)
    learner.optimizers = [reader]  # type: ignore[list-item]
    return learner, reader


def trainer_for(
    path: Path,
    text: PreparedText,
    config: RunConfig,
    stop: StopRequest | None = None,
    resume_at: int = 0,
    **choices: Any,
) -> Trainer:
    """A trainer in the run folder `path`, which is made unless it is there."""
    run = (
        Run.open(path).reconfigured(config)
        if path.exists()
        else Run.create(path, config, text.tokenizer, text.target_tokenizer, text.folder.name)
    )
    learner, log = learner_for(text, run.config, **choices), Logs(RunFiles(path, resume_at=resume_at))
    return Trainer(path, learner, log, stop or StopRequest(), sample=lambda model, objective: "a sample")


def assert_resumes_exactly(path: Path, text: PreparedText, config: RunConfig) -> None:
    """A run of four steps that was interrupted after two ends as an uninterrupted one, as it is opened too."""
    config = configured(config, steps=4, save_every=2, eval_every=4)
    whole = trainer_for(path / "whole", text, config)
    whole.train()
    trainer_for(path / "parts", text, configured(config, steps=2)).train()
    rest = trainer_for(path / "parts", text, config, resume_at=2)
    rest.restore(path / "parts" / "checkpoints" / "step-000002")
    rest.train()
    assert_same_weights(weights_after(whole), weights_after(rest))
    assert_same_weights(weights_after(whole), Run.open(path / "parts").load_model("latest").state_dict())


def call_after_step(trainer: Trainer, step: int, do: Callable[[], object]) -> None:
    """Have the learner of `trainer` call `do` once `step` steps are done."""
    learner, update = trainer.learner, trainer.learner.step

    def stepped(batches: Any) -> StepResult:
        result = update(batches)
        if learner.steps_done == step:
            do()
        return result

    learner.step = stepped  # type: ignore[method-assign]


def unsealed(path: Path) -> dict[str, Any]:
    """The record in the file at `path`, without the checksum that would notice a change."""
    record: dict[str, Any] = json.loads(path.read_text())
    del record["checksum"]
    return record


SHAPE = ["--d-model", "16", "--num-layers", "1", "--num-heads", "2", "--context-length", "16", "--tokenizer", "bytes"]
SMALL = [*SHAPE, "--batch-size", "2", "--warmup-steps", "2", "--compile", "off", "--precision", "fp32"]
"""flags of a run of seconds"""
Call = Callable[..., tuple[int, str, str]]
"""a command with its flags; gives code, output and notes"""


def train(*arguments: str, steps: int = 6) -> int:
    return command.main([*arguments, "--data", "my.txt", "--steps", str(steps), *SMALL])


def refused(capsys: Any, *arguments: str, code: int = 2, main: Callable[[list[str]], int] = command.main) -> str:
    """The one sentence that a mistake gets, or with code 1 a failure."""
    capsys.readouterr()
    assert main(list(arguments)) == code
    error: str = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1, error
    return error


def weights_after(trainer: Trainer) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in trainer.learner.model.state_dict().items()}


def saved_weights(run: Path, checkpoint: str = "latest") -> dict[str, Tensor]:
    return load_file(run / "checkpoints" / checkpoint / "model.safetensors")


def assert_same_weights(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    for name in left:
        assert torch.equal(left[name], right[name]), f"{name} differs"


def metrics(run: Path) -> list[dict[str, Any]]:
    """The records of a run, without what depends on time."""
    timeless = ("tokens_per_second", "mfu", "seconds", "seconds_left")
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in record.items() if k not in timeless} for record in records]


def untrained_run(path: Path, shake: Any, objective: str, **choices: Any) -> Model:
    """A run folder of an untrained model with shaken weights."""
    tokenizer = Bytes().with_special_tokens([MASK])
    sizes = {"d_model": 16, "num_layers": 1, "num_heads": 2, "context_length": 24, "vocab_size": tokenizer.vocab_size}
    model: Model = shake(build_model(ModelConfig(**{**sizes, **choices}))).eval()
    config = RunConfig(model.config, DataConfig(tokenizer="bytes"), TrainingConfig(objective=objective))
    run = Run.create(path, config, tokenizer, tokenizer)
    write_checkpoint(run.checkpoints, 0, model, {})
    return model
