"""Black boxes of any content are opened or refused in one sentence, and nothing is written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import strategies as st

from minitransformer import files
from minitransformer.text.datasets.text import PreparedText
from minitransformer.training.black_box import BLACK_BOX, RECORD, BlackBox, leave_black_box
from tests.fuzz_for_tests import cases, for_cases, json_values, places_in, sentence_of, untouched, with_value
from tests.runs_for_tests import learner_for

pytestmark = pytest.mark.unchecked_shapes


@pytest.fixture
def box(tmp_path: Path, text: PreparedText) -> Path:
    leave_black_box(tmp_path, learner_for(text), None)
    return tmp_path / BLACK_BOX


@cases(20, 600)
def test_any_value_in_a_black_box_is_taken_or_refused(box: Path, count: int) -> None:
    record = json.loads((box / RECORD).read_text())
    del record["checksum"]
    places = list(places_in(record))
    short = [place for place in places if len(place) < 3]

    def check(place: tuple[Any, ...], value: Any) -> None:
        (box / RECORD).write_text(json.dumps(with_value(record, place, value)))
        with untouched(box.parent):
            sentence_of(lambda: BlackBox.open(box))

    for_cases(count, check, st.sampled_from(short) | st.sampled_from(places), json_values)


@cases(20, 300)
def test_files_of_a_black_box_with_any_bytes_are_taken_or_refused(box: Path, count: int) -> None:
    whole = {path.name: path.read_bytes() for path in box.iterdir()}
    record = json.loads(whole[RECORD])
    del record["checksum"]

    def check(name: str, content: bytes, start: float, is_sealed: bool) -> None:
        place = int(start * len(whole[name]))
        (box / name).write_bytes(
            whole[name][:place] + content + whole[name][place + len(content) :][: 10**9 * is_sealed]
        )
        if is_sealed and name != RECORD:  # who wants to deceive writes the right checksums
            sums = {each: files.sha256(box / each) for each in record["sha256"]}
            (box / RECORD).write_text(json.dumps({**record, "sha256": sums}))
        with untouched(box.parent):
            sentence_of(lambda: BlackBox.open(box))
        for each in (name, RECORD):
            (box / each).write_bytes(whole[each])

    for_cases(count, check, st.sampled_from(sorted(whole)), st.binary(max_size=50), st.floats(0, 1), st.booleans())
