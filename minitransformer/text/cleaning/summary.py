"""What was found and what was removed, as a record for JSON."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from minitransformer.settings import to_json
from minitransformer.text.cleaning.config import Changes, CleaningConfig
from minitransformer.text.cleaning.examination import KEPT, reason_of
from minitransformer.text.cleaning.held_out import HeldOut
from minitransformer.text.cleaning.journal import Journal
from minitransformer.text.cleaning.scripts import SCRIPTS
from minitransformer.text.cleaning.verdicts import Job, Verdicts

SIZES = ("bytes", "characters", "words", "lines")
SHARES = (0, 0.05, 0.25, 0.5, 0.75, 0.95, 1)
"""of documents, at which the quantiles of their lengths are told"""
SHOWN = 10
"""groups of duplicates that are listed"""
HALF = 0.5
BINS = 34
"""powers of two of a number of words"""


def summary_of(job: Job, verdicts: Verdicts) -> dict[str, Any]:
    """All findings: sizes before and after, what is removed and why, what is changed, lengths, scripts, leaks."""
    before, after = Tally(), Tally()
    removed: dict[int, Tally] = {}
    start = 0
    for records in verdicts.journal.read("documents"):
        codes = verdicts.codes[start : start + len(records)]
        start += len(records)
        before.add(records)
        after.add(records[codes == KEPT])
        for code in np.unique(codes[codes != KEPT]).tolist():
            removed.setdefault(code, Tally()).add(records[codes == code])
    changes, totals = Changes(job.config), verdicts.journal.totals
    rules = [rule.name for rule in job.config.rules]
    return {
        "data": list(job.sources.names),
        "files": len(job.sources.files),
        "bytes_on_disk": job.sources.size,
        "settings": {**vars(job.config), "rules": {rule.name: to_json(rule.settings) for rule in job.config.rules}},
        "before": before.sizes,
        "after": after.sizes,
        "removed": [
            {"reason": reason_of(code, rules), "documents": tally.documents, "bytes": int(tally.sums["read"])}
            for code, tally in sorted(removed.items())
        ],
        "changed": dict(zip(changes.names, after.changed.tolist(), strict=False)),
        "personal": list(_personal(job.config, totals.get("personal", {}), before, after)),
        "lengths": {name: _quantiles(verdicts, name) for name in ("characters", "words", "lines")},
        "log2_words": {"before": before.words.tolist(), "after": after.words.tolist()},
        "scripts": list(_scripts(totals.get("letters", {}), before, after)),
        "duplicates": list(_groups(job, verdicts)),
        "tokens_per_byte": _tokens_per_byte(totals),
        "held_out": None if job.held_out is None else _held_out(job, verdicts.journal),
    }


class Tally:
    """Sums over documents."""

    def __init__(self) -> None:
        self.documents = 0
        self.sums = dict.fromkeys(("read", *SIZES), 0)
        self.changed, self.personal = np.zeros(16, np.int64), np.zeros(16, np.int64)
        self.scripts, self.words = np.zeros(len(SCRIPTS), np.int64), np.zeros(BINS, np.int64)

    def add(self, records: npt.NDArray[Any]) -> None:
        """Add the records of some documents."""
        self.documents += len(records)
        for name in self.sums:
            self.sums[name] += int(records[name].sum(dtype=np.int64))
        for counts, bits in ((self.changed, records["changed"]), (self.personal, records["personal"])):
            counts += np.array([np.count_nonzero(bits >> place & 1) for place in range(16)])
        self.scripts += np.bincount(records["script"], minlength=len(SCRIPTS))
        self.words += np.bincount(np.ceil(np.log2(records["words"] + 1.0)).astype(np.int64), minlength=BINS)

    @property
    def sizes(self) -> dict[str, int]:
        """Number of documents, and the sums of their sizes."""
        return {"documents": self.documents, **{name: self.sums[name] for name in SIZES}}


def _personal(
    config: CleaningConfig, occurrences: Mapping[str, int], before: Tally, after: Tally
) -> Iterator[dict[str, Any]]:
    for place, kind in enumerate(Changes(config).kinds):
        yield {
            "kind": kind.name,
            "found": occurrences.get(kind.name, 0),
            "documents": int(before.personal[place]),
            "documents_kept": int(after.personal[place]),
            "masked": kind.name in config.mask,
        }


def _quantiles(verdicts: Verdicts, name: str) -> dict[str, dict[str, int]]:
    """The values of one size at each of the `SHARES` of all documents, and of those that are kept."""
    values = verdicts.journal.column(name)
    found = {}
    for when, chosen in (("after", values[verdicts.codes == KEPT]), ("before", values)):
        chosen.sort()  # in place, which ends with all
        places = {f"{share:.0%}": round(share * (len(chosen) - 1)) for share in SHARES} if len(chosen) else {}
        found[when] = {share: int(chosen[place]) for share, place in places.items()}
    return {when: found[when] for when in ("before", "after")}


def _scripts(letters: Mapping[str, int], before: Tally, after: Tally) -> Iterator[dict[str, Any]]:
    """For each script, the most frequent first, its characters, and the documents of which it is the main one."""
    for place in sorted(range(len(SCRIPTS)), key=lambda place: -letters.get(SCRIPTS[place], 0)):
        if letters.get(SCRIPTS[place]) or before.scripts[place]:
            yield {
                "script": SCRIPTS[place],
                "characters": letters.get(SCRIPTS[place], 0),
                "documents": int(before.scripts[place]),
                "documents_kept": int(after.scripts[place]),
            }


def _groups(job: Job, verdicts: Verdicts) -> Iterator[dict[str, Any]]:
    """The documents that are repeated most often, and how often."""
    originals, counts = np.unique(verdicts.originals, return_counts=True)
    for place in np.argsort(-counts, kind="stable")[:SHOWN]:
        file, number = verdicts.location(int(originals[place]))
        name = str(job.sources.place(job.sources.files[file]))
        yield {"file": name, "document": number, "repeated": int(counts[place])}


def _tokens_per_byte(totals: Mapping[str, Any]) -> dict[str, Any] | None:
    """The tokens of a sample of documents over its bytes; None without a tokenizer."""
    if not totals.get("sampled_bytes"):
        return None
    return {
        "value": totals["sampled_tokens"] / totals["sampled_bytes"],
        "sampled_bytes": totals["sampled_bytes"],
        "sampled_tokens": totals["sampled_tokens"],
    }


def _held_out(job: Job, journal: Journal) -> dict[str, Any]:
    """How much of each held-out document stands in the documents before cleaning."""
    assert job.held_out is not None
    held_out = HeldOut.open(job.folder)
    hit = np.zeros(len(held_out.ngrams) + 1, bool)
    for places in journal.read("hits"):
        hit[places] = True
    shares = np.concatenate([np.empty(0), *held_out.shares(job.held_out.files, job.config.leak_words, hit)])
    return {
        "words": job.config.leak_words,
        "documents": len(shares),
        "sharing_any": int(np.count_nonzero(shares)),
        "sharing_half": int(np.count_nonzero(shares >= HALF)),
        "sharing_all": int(np.count_nonzero(shares == 1)),
    }
