"""Texts with planted faults: copies, copies of which one word in ten is another, leaks, and personal data."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

from minitransformer.text.cleaning.config import CleaningConfig
from minitransformer.text.cleaning.summary import summary_of
from minitransformer.text.cleaning.verdicts import Job, Verdicts, judge, open_job
from minitransformer.text.cleaning.writing import write_cleaned


def real_texts(count: int, words: int = 120) -> list[str]:
    """Pieces of Python's reference manual in a fixed order, of which no two have eight words in a row in common."""
    manual = " ".join(" ".join(topics.values()).split()).split(" ")
    found, seen = [], set[tuple[str, ...]]()
    for start in range(0, len(manual) - words, words):
        piece = " ".join(manual[start : start + words])
        parts = re.findall(r"[^\W_]+", piece.lower())
        grams = set(zip(*(parts[shift:] for shift in range(8)), strict=False))
        if len(parts) > words / 2 and not grams & seen:
            seen |= grams
            found.append(piece)
    assert len(found) >= count, f"the manual has only {len(found)} such texts of {words} words"
    return found[:count]


def changed_words(text: str, share: float, draw: random.Random) -> str:
    """`text` with a share of its words, drawn at random, replaced by words that it does not have."""
    places = list(re.finditer(r"[^\W_]+", text))
    for place in sorted(draw.sample(places, round(share * len(places))), key=lambda each: -each.start()):
        text = f"{text[: place.start()]}other{draw.randrange(10**6)}{text[place.end() :]}"
    return text


def write_jsonl(path: Path, texts: list[str], **fields: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"id": i, "text": text, **fields}) + "\n" for i, text in enumerate(texts)))
    return path


def read_ids(path: Path) -> list[int]:
    return [json.loads(line)["id"] for line in path.read_text(encoding="utf-8").splitlines()]


def read_texts(path: Path) -> list[str]:
    return [json.loads(line)["text"] for line in path.read_text(encoding="utf-8").splitlines()]


def judged(*paths: Path, workers: int = 1, **choices: Any) -> tuple[Job, Verdicts]:
    job = open_job(tuple(map(str, paths)), CleaningConfig(**choices), workers, progress=False)
    return job, judge(job)


def cleaned(out: Path, *paths: Path, workers: int = 1, **choices: Any) -> dict[str, Any]:
    """The summary of a cleaning of `paths` into `out`."""
    job, verdicts = judged(*paths, workers=workers, **choices)
    write_cleaned(out, job, verdicts)
    return summary_of(job, verdicts)
