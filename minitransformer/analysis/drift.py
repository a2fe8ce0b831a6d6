"""Whether a model still fits its use: what users send beside validation data, as a table, a sentence and a figure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from minitransformer.analysis.evaluation import INTERVAL, Section
from minitransformer.analysis.evaluation_page import add_section
from minitransformer.errors import UserError
from minitransformer.evaluation.drift import RANGES, Drift, TextLosses, drift_between
from minitransformer.evaluation.estimates import SMALL, Estimate
from minitransformer.reporting import figures
from minitransformer.reporting.figures import Curve
from minitransformer.reporting.pages import Page
from minitransformer.reporting.report import add_facts
from minitransformer.reporting.tables import Picture, Table

LEAST_LENGTH = 0.1
"""of the mean length of validation texts: a smaller difference is not told in a sentence"""


def drift_section(used: TextLosses, usual: TextLosses, kind: str) -> Section:
    """How what users send differs from validation texts, which are windows or messages by `kind`.

    Raises `UserError` where there is too little to compare.
    """
    drift = drift_between(used, usual)
    if drift is None:
        raise UserError(
            f"the validation data has fewer than {SMALL} tokens at every position where users send any: give more with "
            "--data"
        )
    has_lengths = kind == "conversations"
    rows = [["loss (nats per token)", *(_text(each, ".4f") for each in drift.loss)]]
    lengths = [_text(each, ".1f") for each in drift.length]
    rows.append(["mean length (tokens)", *(lengths if has_lengths else [lengths[0], None, None])])
    columns = ("", "users", "validation", f"difference, {INTERVAL}")
    title = f"{len(used):,} texts of users beside {len(usual):,} {'messages' if has_lengths else kind} of validation"
    notes = [verdict(drift, len(used), has_lengths=has_lengths), *_notes(drift, used, has_lengths=has_lengths)]
    record = {"texts": len(used), "validation": len(usual), "kind": kind, **drift.to_json(), "verdict": notes[0]}
    if not has_lengths:  # of windows, which all have one
        record["length"] = {"in_use": drift.length[0].to_json()}
    picture = Picture("Loss by position", lambda: _figure(used, usual), "The mean over ranges of positions.")
    return Section("drift", [Table(title, columns, rows)], notes, record, [picture])


def verdict(drift: Drift, count: int, *, has_lengths: bool) -> str:
    """One sentence: does the model still fit its use?"""
    loss, length = drift.loss[2], drift.length[2]
    ends = "" if loss.interval is None else f" [{loss.interval[0]:+.3f}, {loss.interval[1]:+.3f}]"
    told = f"{loss.value:+.3f}{ends} nats per token at the same positions"
    if loss.interval is None:
        found = f"Of {count} text nothing can be said: {told}"
    elif loss.interval[0] > 0:
        found = f"What users send is harder for the model than its validation data: {told}"
    elif loss.interval[1] < 0:
        found = f"What users send is easier for the model than its validation data: {told}"
    else:
        found = f"No difference from the validation data is seen in {count:,} texts: {told}"
    is_other = abs(length.value) >= LEAST_LENGTH * drift.length[1].value
    if has_lengths and is_other and length.interval is not None and not length.interval[0] <= 0 <= length.interval[1]:
        than = "longer" if length.value > 0 else "shorter"
        found += f"; and it is {than}: {drift.length[0].value:.0f} tokens, not {drift.length[1].value:.0f}"
    return f"{found}."


def _notes(drift: Drift, used: TextLosses, *, has_lengths: bool) -> list[str]:
    notes = []
    if not has_lengths:
        notes.append("Validation data of running text has no lengths to compare with.")
    if len(used) < SMALL:
        notes.append(f"With fewer than {SMALL} texts, an interval is too narrow.")
    if drift.compared < 1:
        notes.append(
            f"{1 - drift.compared:.0%} of the tokens of users stand where validation data has fewer than {SMALL}, and "
            "are left out of the loss."
        )
    return notes


def _text(each: Estimate, form: str) -> str:
    ends = "" if each.interval is None else " [{}, {}]".format(*(format(end, form) for end in each.interval))
    return format(each.value, form) + ends


def _figure(used: TextLosses, usual: TextLosses) -> Any:
    curves = []
    for label, losses in (("users", used), ("validation", usual)):
        counts = losses.targets.sum(0)
        kept = counts >= min(SMALL, counts.max())
        last = np.append(RANGES[1:], RANGES[-1] + 1) - 1
        middles, means = (RANGES + last)[kept] / 2, (losses.nats.sum(0) / np.maximum(counts, 1))[kept]
        curves.append(Curve(label, middles.tolist(), means.tolist()))
    return figures.curves(
        curves, x_label="position", y_label="loss (nats per token)", title="Loss by position", log_x=True
    )


def drift_page(about: Mapping[str, str], section: Section) -> str:
    """The HTML of it; raises `UserError` without matplotlib."""
    page = Page(f"Does {about['run']} fit its use?")
    page.paragraph(section.notes[0])
    add_facts(page, about)
    add_section(page, Section(section.name, section.tables, section.notes[1:], section.record, section.pictures))
    return page.html()
