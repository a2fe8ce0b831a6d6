"""What `evaluate` says of a model's predictions, beside the metrics of its objective."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import singledispatch
from pathlib import Path
from typing import Any

from minitransformer import files
from minitransformer.commands import table_width
from minitransformer.errors import UserError
from minitransformer.evaluation.answers import answer_totals
from minitransformer.evaluation.class_report import class_report
from minitransformer.evaluation.metrics import described_values, intervals_of, values_of
from minitransformer.evaluation.translations import corpus_scores
from minitransformer.generation.config import SamplingConfig
from minitransformer.models.decoder import DecoderClassifier, DecoderLM
from minitransformer.models.encoder import EncoderClassifier
from minitransformer.models.encoder_decoder import Seq2SeqLM
from minitransformer.models.model import Model
from minitransformer.reporting.plain import plain_table
from minitransformer.runs.answering import answers_to, questions_of
from minitransformer.runs.classifying import classify_all
from minitransformer.runs.evaluating import HeldOutData
from minitransformer.runs.translating import translate_all
from minitransformer.training.validation import Validation

USUAL_BATCH, USUAL_BEAMS = 16, 5


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


@dataclass
class Predictions:
    """Lines to print, the same for a file, and a row for each prediction; without any there is nothing to predict."""

    lines: list[str] = field(default_factory=list)
    record: dict[str, Any] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)

    def write(self, out: Path) -> None:
        """Write a line for each prediction to the new file `out`; raises `UserError` if there are none."""
        if not self.rows:
            raise UserError("there are no answers, translations or classes in this data to write: leave --out out")
        with files.writing(out, "choose another --out"):
            files.write_text(out, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in self.rows))


def titled_lines(title: str, of_what: str, lines: Iterable[str]) -> list[str]:
    """Lines below a title, which stand in columns."""
    return [f"{title:10} {of_what}", *(f"{'':11}{line}" for line in lines)]


@singledispatch
def predict_all(model: Model, data: HeldOutData, wanted: Wanted) -> Predictions:
    """What `model` predicts for each text of `data`, compared with what stands there."""
    wanted.check("this data, for which nothing is generated")
    return Predictions()


@predict_all.register
def _answered(model: DecoderLM, data: HeldOutData, wanted: Wanted) -> Predictions:
    asked = questions_of(data)
    if not asked:
        wanted.check("data without questions")
        return Predictions()
    wanted.check("answers", "batch_size")
    answers = list(answers_to(data.run, model, asked, wanted.batch_size or USUAL_BATCH))
    pairs = [(answer, each.reference) for answer, each in zip(answers, asked, strict=True)]
    totals = answer_totals(pairs)
    found = Validation(values_of(totals), sum(each.length for each in asked), intervals=intervals_of(totals))
    lines = described_values(found.values, found.intervals)
    return Predictions(
        titled_lines("answers", f"to {totals.texts:,} questions, by greedy decoding", lines),
        {"answers": found.record()},
        [{"reference": reference, "answer": answer} for answer, reference in pairs],
    )


@predict_all.register
def _translated(model: Seq2SeqLM, data: HeldOutData, wanted: Wanted) -> Predictions:
    wanted.check("translations", "num_beams")
    beams = wanted.num_beams or USUAL_BEAMS
    sampling = SamplingConfig(max_new_tokens=model.config.text_length, num_beams=beams)
    if beams == 1:
        sampling = SamplingConfig(max_new_tokens=model.config.text_length, temperature=0.0)
    found = list(translate_all(data, model, sampling))
    try:
        scores = corpus_scores([each.translation for each in found], [each.reference for each in found])
        lines = [line for score in scores for line in str(score).splitlines()]
    except UserError as missing:
        scores, lines = [], [str(missing)]
    return Predictions(
        titled_lines("outputs", f"for {len(found):,} sources, by {beams} beam{'s' * (beams > 1)}", lines),
        {"outputs": {"num_beams": beams, "scores": [score.to_json() for score in scores]}},
        [each._asdict() for each in found],
    )


@predict_all.register(EncoderClassifier)
@predict_all.register(DecoderClassifier)
def _classified(model: Model, data: HeldOutData, wanted: Wanted) -> Predictions:
    wanted.check("classes")
    names, found = data.run.class_names, list(classify_all(data, model))
    report = class_report(names, [each.label for each in found], [each.probabilities for each in found])
    columns, *rows = report.rows()
    lines = [f"calibration error {report.calibration_error:.1%}"]
    lines += ["", *plain_table(columns, rows, table_width()).splitlines()]
    return Predictions(lines, {"classes": report.to_json()}, [_row(names, each) for each in found])


def _row(names: Sequence[str], each: Any) -> dict[str, Any]:
    likeliest = names[each.probabilities.index(max(each.probabilities))]
    probabilities = dict(zip(names, each.probabilities, strict=True))
    return {"text": each.text, "label": names[each.label], "predicted": likeliest, "probabilities": probabilities}
