"""Whether a run is better than the one that is served, on the same items."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from minitransformer.amounts import counted
from minitransformer.analysis.evaluation import estimate_text
from minitransformer.errors import UserError
from minitransformer.evaluation.estimates import PairedDifference, paired_differences
from minitransformer.evaluation.metrics import Metric, metric_text
from minitransformer.models.model import Model
from minitransformer.registry import lookup
from minitransformer.runs.comparing import check_comparable, paired_parts
from minitransformer.runs.evaluating import HeldOutData
from minitransformer.runs.open import Run
from minitransformer.runs.predicting import Predictions, Wanted, measure_loss, predict_all


@dataclass(frozen=True)
class Judgement:
    """A metric of a new run and of the served one on the same items."""

    metric: str
    items: int
    found: PairedDifference

    @property
    def is_better(self) -> bool:
        """Whether the new run is better, and the interval of the difference excludes 0."""
        is_lower = self.found.difference.value < 0
        return self.found.is_clear and is_lower == Metric.named(self.metric).lower_is_better

    @property
    def sentence(self) -> str:
        """The figures."""
        first, second = (metric_text(self.metric, each) for each in (self.found.first, self.found.second))
        difference = estimate_text(self.metric, self.found.difference)
        title = Metric.named(self.metric).title
        return f"{title} {first}, not {second}, on {counted(self.items, 'items')}: a difference of {difference}"


def check_servable(new: Run, old: Run) -> None:
    """Raises `UserError` for a run that could not answer the requests that the old one answers."""
    kinds = [run.config.model.topology for run in (new, old)]
    if kinds[0] != kinds[1]:
        raise UserError(f"{new.path} has the topology {kinds[0]}, and {old.path}, which is served, {kinds[1]}")
    if old.chat_template is not None and new.chat_template is None:
        raise UserError(f"{new.path} has learned no conversations, and {old.path}, which is served, has: fine-tune it")
    lengths = [run.config.model.text_length for run in (new, old)]
    if lengths[0] < lengths[1]:
        raise UserError(f"{new.path} sees {lengths[0]:,} tokens, and {old.path}, which is served, {lengths[1]:,}")


def check_metric(name: str, new: Run, old: Run) -> None:
    """Raises `UserError` for a metric that says nothing of which of two runs is better."""
    lookup("metric", name, Metric.registry)
    metric = Metric.named(name)
    if metric.lower_is_better is None:
        raise UserError(f"neither direction of {name} is better: choose another --metric")
    is_same = new.target_tokenizer.fingerprint == old.target_tokenizer.fingerprint
    if not is_same and not metric.across_tokenizers:
        others = ", ".join(name for name, each in Metric.registry.items() if each.across_tokenizers)
        raise UserError(f"{name} does not compare, as {new.path} has another tokenizer: give --metric one of {others}")


def judge_run(
    new: HeldOutData, old: HeldOutData, checkpoints: tuple[str | None, str | None], metric: str, device: torch.device
) -> Judgement:
    """How `metric` differs between two runs; raises `UserError` if they do not compare, or if it is not measured."""
    check_comparable(new, old)
    measure: Callable[[Model, HeldOutData, torch.device], Predictions] = measure_loss
    if not Metric.named(metric).in_training:  # it is of answers or translations, which take longer
        measure = _predict
    models = (data.run.load_model(name, str(device)) for data, name in zip((new, old), checkpoints, strict=True))
    found = [measure(model, data, device) for model, data in zip(models, (new, old), strict=True)]
    known: list[str] = []
    for ours, theirs in paired_parts((new, found[0]), (old, found[1])):
        differences = paired_differences(ours.items, theirs.items)
        if metric in differences:
            return Judgement(metric, len(ours.items), differences[metric])
        known += differences
    raise UserError(f"{metric} is not measured on {new.kind}: give --metric one of {', '.join(known)}")


def _predict(model: Model, data: HeldOutData, device: torch.device) -> Predictions:
    return predict_all(model, data, device, Wanted())
