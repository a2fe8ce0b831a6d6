"""What a run's model predicts for each item of its data, beside what stands there."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial, singledispatch
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from minitransformer.amounts import counted
from minitransformer.errors import UserError
from minitransformer.evaluation.answers import answer_items
from minitransformer.evaluation.class_report import ClassReport, class_report
from minitransformer.evaluation.items import Items
from minitransformer.evaluation.translations import SCORES, signature_of, translation_columns
from minitransformer.generation.config import SamplingConfig
from minitransformer.models.decoder import DecoderClassifier, DecoderLM
from minitransformer.models.encoder import EncoderClassifier
from minitransformer.models.encoder_decoder import Seq2SeqLM
from minitransformer.models.model import Model
from minitransformer.runs.answering import answers_to, questions_of
from minitransformer.runs.evaluating import Evaluation, HeldOutData
from minitransformer.runs.translating import translate_all
from minitransformer.text.datasets.pair_data import PairData

USUAL_BATCH, USUAL_BEAMS = 16, 5
COUNTED = ("nats", "targets", "correct", "exact", "token_f1")
"""what is told of an item in numbers, where it is counted"""


@dataclass(frozen=True)
class Wanted:
    """How predictions are made, where it matters; None is as usual."""

    batch_size: int | None = None
    num_beams: int | None = None

    def check(self, of_what: str, *used: str) -> None:
        """Raises `UserError` for a setting that is not `used` where the data is `of_what`."""
        for name, value in vars(self).items():
            if value is not None and name not in used:
                raise UserError(f"--{name.replace('_', '-')} has no effect on {of_what}: leave it out")


@dataclass(frozen=True)
class EvaluatedPart:
    """Items of one kind: what was counted of each, its texts, and what else is told of each, such as a prediction.

    Each belongs to a number of the data, as several questions to one conversation. `predictions` names what is told
    that a model predicts.
    """

    name: str
    """in JSON"""
    title: str
    items: Items
    numbers: npt.NDArray[np.int64]
    """[items]"""
    texts: Callable[[int], Mapping[str, str]]
    told: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    predictions: str = ""

    def of(self, labels: Sequence[str]) -> list[str]:
        """[items] the labels of the data that they belong to."""
        return [labels[number] for number in self.numbers.tolist()]

    def describe(self, place: int) -> dict[str, Any]:
        """All that is known of one item."""
        told = {name: values[place] for name, values in self.told.items()}
        numbers = {name: self.items.columns[name][place].item() for name in COUNTED if name in self.items.columns}
        return {"item": int(self.numbers[place]), **self.texts(place), **told, **numbers}


@dataclass(frozen=True)
class Predictions:
    """The parts of an evaluation, the first with the loss, and more on classes, and on how outputs were made."""

    evaluation: Evaluation
    parts: Sequence[EvaluatedPart]
    classes: ClassReport | None = None
    outputs: Mapping[str, Any] = field(default_factory=dict)
    notes: Sequence[str] = ()


def predict_all(model: Model, data: HeldOutData, device: torch.device, wanted: Wanted) -> Predictions:
    """What `model` makes of `data`: its loss, and classes, translations or answers."""
    return predict_with(model, data, wanted, partial(measure_loss, model, data, device))


def measure_loss(model: Model, data: HeldOutData, device: torch.device) -> Predictions:
    """What the run's objective measures for `model`, without any output of it."""
    evaluation = data.evaluate(model, device)
    items = evaluation.items
    title = f"{counted(len(items), data.kind)} of {counted(int(items.columns['tokens'].sum()), 'tokens')}"
    return Predictions(evaluation, [EvaluatedPart("metrics", title, items, np.arange(len(items)), data.text_of)])


@singledispatch
def predict_with(model: Model, data: HeldOutData, wanted: Wanted, measure: Callable[[], Predictions]) -> Predictions:
    """What `measure` finds, with what `model` predicts; raises `UserError` before that for what has no effect."""
    wanted.check("this data, for which nothing is generated")
    return measure()


@predict_with.register
def _answered(model: DecoderLM, data: HeldOutData, wanted: Wanted, measure: Callable[[], Predictions]) -> Predictions:
    asked = questions_of(data)
    if not asked:
        wanted.check("data without questions")
        return measure()
    wanted.check("answers", "batch_size")
    found = measure()
    answers = list(answers_to(data.run, model, asked, wanted.batch_size or USUAL_BATCH))
    numbers, columns = np.array([each.conversation for each in asked]), found.evaluation.items.columns
    told = {
        "prompt": [data.prepared.tokenizer.decode(each.prompt) for each in asked],
        "reference": [each.reference for each in asked],
        "answer": answers,
        # Of the whole conversation.
        **{name: columns[name][numbers].tolist() for name in ("nats", "targets")},
    }
    items = answer_items(zip(answers, told["reference"], strict=True))
    title = f"Answers to {counted(len(asked), 'questions')}, by greedy decoding"
    part = EvaluatedPart("answers", title, items, numbers, lambda place: {}, told, "answer")
    return replace(found, parts=[*found.parts, part])


@predict_with.register
def _translated(model: Seq2SeqLM, data: HeldOutData, wanted: Wanted, measure: Callable[[], Predictions]) -> Predictions:
    if not isinstance(data.prepared, PairData):
        wanted.check("this data, for which nothing is generated")
        return measure()
    wanted.check("translations", "num_beams")
    found = measure()
    beams = wanted.num_beams or USUAL_BEAMS
    sampling = SamplingConfig(max_new_tokens=model.config.text_length, num_beams=beams)
    if beams == 1:
        sampling = SamplingConfig(max_new_tokens=model.config.text_length, temperature=0.0)
    outputs = translate_all(data, model, sampling)
    columns, signatures, notes = _compared(outputs, [data.text_of(place)["reference"] for place in range(len(outputs))])
    [loss] = found.parts
    items = replace(loss.items, columns={**loss.items.columns, **columns})
    part = replace(loss, items=items, told={"translation": outputs}, predictions="translation")
    notes = [f"Outputs for {len(outputs):,} sources, by {beams} beam{'s' * (beams > 1)}.", *notes]
    return replace(found, parts=[part], outputs={"num_beams": beams, "signatures": signatures}, notes=notes)


def _compared(
    outputs: Sequence[str], references: Sequence[str]
) -> tuple[Mapping[str, npt.NDArray[Any]], Mapping[str, str], list[str]]:
    """What BLEU and chrF count, their signatures, and notes on them; without sacrebleu, how to get it."""
    empty = sum(not each.strip() for each in outputs)
    notes = [f"{empty:,} of them are empty, in which nothing is right."] if empty else []
    try:
        columns = translation_columns(outputs, references)
    except UserError as missing:
        return {}, {}, [*notes, f"{missing}."]
    signatures = {name: signature_of(name) for name in SCORES}
    return columns, signatures, [*notes, *(f"Signature {text}" for text in signatures.values())]


@predict_with.register(EncoderClassifier)
@predict_with.register(DecoderClassifier)
def _classified(model: Model, data: HeldOutData, wanted: Wanted, measure: Callable[[], Predictions]) -> Predictions:
    wanted.check("classes")
    found = measure()
    names, labels, probabilities = data.run.class_names, found.evaluation.labels, found.evaluation.probabilities
    assert labels is not None, "of labelled texts"
    assert probabilities is not None, "of labelled texts"
    told = {
        "label": [names[each] for each in labels.tolist()],
        "predicted": [names[each] for each in probabilities.argmax(1).tolist()],
        "probabilities": [dict(zip(names, each, strict=True)) for each in probabilities.tolist()],
    }
    [loss] = found.parts
    part = replace(loss, told=told, predictions="predicted")
    return replace(found, parts=[part], classes=class_report(names, loss.items))
