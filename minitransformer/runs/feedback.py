"""Fine-tuning data from what users say of a served run's answers."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from minitransformer.runs.served import STOPPED, ServedAnswer
from minitransformer.text.chat_template import ASSISTANT, Message

CORRECTED, LIKED = "corrected answers", "answers with a thumb up"
NO_CORRECTION, CUT, EMPTY, REPEATED = (
    "thumbs down without a correction",
    "answers that the limit of tokens has cut, without a correction",
    "empty answers and corrections",
    "repetitions of another example",
)
WHOLE_SCALE = 1 << 64


@dataclass
class FeedbackExamples:
    """Rows of instruction data, those for `training` and those `held_out`, and how many came of what."""

    training: list[dict[str, Any]] = field(default_factory=list)
    held_out: list[dict[str, Any]] = field(default_factory=list)
    used: Counter[str] = field(default_factory=Counter)
    left_out: Counter[str] = field(default_factory=Counter)


def examples_of(answers: Iterable[ServedAnswer], held_out_fraction: float = 0.0) -> FeedbackExamples:
    """An example for each answer that is corrected, or else has a thumb up.

    What is asked with the same words is on one side, whenever it was asked: a hash of it decides, so that what is held
    out once is held out in later data too.
    """
    found = FeedbackExamples()
    seen: set[Any] = set()
    for each in latest_feedback(answers):
        answer, reason = _wanted(each)
        if (each.asked, answer) in seen:
            answer, reason = None, REPEATED
        if answer is None:
            found.left_out[reason] += 1
            continue
        seen.add((each.asked, answer))
        found.used[reason] += 1
        digest = hashlib.sha256(repr(each.asked).encode(errors="replace")).digest()
        is_held_out = int.from_bytes(digest[:8]) < held_out_fraction * WHOLE_SCALE
        (found.held_out if is_held_out else found.training).append(_row(each, answer, digest.hex()[:16]))
    return found


def latest_feedback(answers: Iterable[ServedAnswer]) -> Iterator[ServedAnswer]:
    """Each answer once, with the last rating and the last correction that was given."""
    found: dict[tuple[str, int], ServedAnswer] = {}
    for each in answers:
        before = found.get((each.id, each.index), each)
        found[each.id, each.index] = replace(
            each,
            rating=before.rating if each.rating is None else each.rating,
            correction=before.correction if each.correction is None else each.correction,
        )
    yield from found.values()


def _wanted(each: ServedAnswer) -> tuple[str | None, str]:
    """What should have been answered, if anything is known of it, and why."""
    if each.correction is not None and each.correction.strip():
        return each.correction, CORRECTED
    if each.rating != "up":
        return None, EMPTY if each.rating is None else NO_CORRECTION
    if not each.answer.strip():
        return None, EMPTY
    return (None, CUT) if each.finish_reason in ("length", STOPPED) else (each.answer, LIKED)


def _row(each: ServedAnswer, answer: str, group: str) -> dict[str, Any]:
    """The example in a shape of `text/conversations.py`; rows of one `group` are in one split."""
    if each.prompt is not None:
        return {"prompt": each.prompt, "completion": answer, "group": group}
    messages = [*each.messages, Message(ASSISTANT, answer)]
    return {"messages": [{"role": one.role, "content": one.content} for one in messages], "group": group}
