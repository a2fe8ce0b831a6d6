"""`evaluate`: a model on data that it has not learned."""

from __future__ import annotations

import json
from collections.abc import Sequence

from minitransformer import files
from minitransformer.analysis.evaluation import Section
from minitransformer.analysis.evaluation_page import evaluation_page
from minitransformer.commands import DONE, choice_report, parse, table_width, with_exit_code
from minitransformer.commands.data_evaluation import evaluate_data
from minitransformer.commands.evaluate_options import Options
from minitransformer.reporting.figures import check_figures
from minitransformer.reporting.plain import titled_table
from minitransformer.runs import Run
from minitransformer.text.corpora import named

ABOUT = (
    "Evaluate a model on the validation data of its run, or on all of other data of the same kind: the metrics of its "
    "objective, exact match and F1 of the answers that it writes, BLEU and chrF of translations, and figures for each "
    "class. With --choices, a model chooses the likeliest candidate of each item. Intervals have 95% confidence: score "
    "intervals of shares of items, and bootstrap intervals over items of all else."
)


@with_exit_code
def main(arguments: Sequence[str]) -> int:
    """Evaluate; returns the exit code."""
    options = parse(Options, arguments, prog="minitransformer evaluate", description=ABOUT)
    if options.html is not None:
        check_figures()
    run = Run.open(options.run)
    about = {"run": str(options.run), "checkpoint": run.checkpoint(options.checkpoint).resolve().name}
    about["data"] = named(options.data) if options.data else f"{named(run.config.data.data)}, validation"
    print(f"model      {about['run']}, {about['checkpoint']}")
    print(f"data       {about['data']}")
    evaluation = choice_report.evaluate_choices if options.choices else evaluate_data
    found = evaluation(run, options)
    for section in found.sections:
        _tell(section)
    if options.out is not None:
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in found.rows()]
        with files.writing(options.out, "choose another --out"):
            files.write_text(options.out, "".join(lines))
    if options.html is not None:
        page = evaluation_page(about, found)
        with files.writing(options.html, "choose another --html"):
            files.write_text(options.html, page)
    if options.json is not None:
        with files.writing(options.json, "choose another --json"):
            files.write_text(options.json, json.dumps({**about, **found.record}, indent=2) + "\n")
    return DONE


def _tell(section: Section) -> None:
    for table in section.tables:
        if table.rows:
            print(f"\n{titled_table(table, table_width())}")
    for note in section.notes:
        print(note)
