"""The certificate of an export: what its copy was compared in with the run, and with which result."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minitransformer import files
from minitransformer.errors import UserError
from minitransformer.exporting.copies import Copy
from minitransformer.exporting.exported import Exported
from minitransformer.exporting.hostile import PROMPTS, encodable, hostile_texts
from minitransformer.text.chat_template import Message

NAME = "certificate.json"
# Of the root mean square of the logits: rounding gives about 1e-5, a wrong epsilon or GELU at least 3e-4.
TOLERANCE = 2e-4
LENGTH, MOST_LENGTH = 64, 1024
NEW_TOKENS = 24
CONVERSATIONS = (
    [{"role": "user", "content": "Hello, who are you?"}],
    [
        {"role": "user", "content": " Two\nlines, and 'quotes' "},
        {"role": "assistant", "content": "An answer."},
        {"role": "user", "content": "Again, 東京?"},
    ],
)


@dataclass(frozen=True)
class Agreement:
    """One comparison of a copy with its run: whether they agree, and what was found, with its figures."""

    name: str
    agrees: bool
    found: str
    figures: dict[str, Any]


@dataclass(frozen=True)
class Certificate:
    """All checks of an export, the runtime that opened it, and where both come from."""

    format: str
    runtime: str
    is_foreign: bool
    checks: tuple[Agreement, ...]
    about: dict[str, Any]

    @property
    def difference(self) -> str | None:
        """Where the copy differs from the run; None if it does not."""
        return "; ".join(f"{check.name}: {check.found}" for check in self.checks if not check.agrees) or None

    def write(self, folder: Path) -> None:
        """Write it to `folder`, with the SHA-256 of every file there."""
        sums = {
            str(path.relative_to(folder)): files.sha256(path) for path in sorted(folder.rglob("*")) if path.is_file()
        }
        record = {**asdict(self), "agrees": self.difference is None, "sha256": sums}
        files.write_text(folder / NAME, json.dumps(record, indent=2, ensure_ascii=False) + "\n")


CopyComparison = Callable[[Exported, Copy], Agreement | None]


def compare_copy(subject: Exported, copy: Copy, comparisons: tuple[CopyComparison, ...]) -> tuple[Agreement, ...]:
    """What each of the comparisons says, but for what the format does not hold."""
    return tuple(check for check in (one(subject, copy) for one in comparisons) if check is not None)


def same_weights(subject: Exported, copy: Copy) -> Agreement | None:
    """Every weight in the files is that of the run, bit for bit."""
    try:
        theirs = copy.weights()
    except UserError as error:
        return Agreement("weights", False, str(error), {})
    if theirs is None:
        return None
    ours = dict(subject.model.named_parameters())
    different = [name for name, weight in ours.items() if name not in theirs or not torch.equal(weight, theirs[name])]
    found = f"{len(ours)} tensors, bit for bit" if not different else f"{different[0]}{_and_more(different)} differs"
    return Agreement("weights", not different, found, {"tensors": len(ours), "different": different})


def same_token_ids(subject: Exported, copy: Copy) -> Agreement | None:
    """Texts on which tokenizers disagree have the same ids."""
    if copy.token_ids("") is None:
        return None
    texts = list(hostile_texts(subject.source, subject.special_tokens))
    different = [text for text in texts if copy.token_ids(text) != subject.token_ids(text)]
    found = f"{len(texts)} hostile texts"
    if different:
        theirs, ours = copy.token_ids(different[0]), subject.token_ids(different[0])
        place = next((i for i, (a, b) in enumerate(zip(theirs or [], ours, strict=False)) if a != b), 0)
        found = f"{different[0]!r}{_and_more(different)} has other ids, from token {place} on"
    return Agreement("token ids", not different, found, {"texts": len(texts), "different": different})


@torch.inference_mode()
def same_logits(subject: Exported, copy: Copy, tolerance: float = TOLERANCE) -> Agreement:
    """Outputs for random tokens differ by rounding alone; Kullback-Leibler divergences are those of predictions."""
    inputs = compared_inputs(subject)
    ours, theirs = subject.outputs(*inputs).double(), copy.outputs(*inputs).double()
    what = "hidden states" if subject.model.config.topology == "encoder-headless" else "logits"
    if ours.shape != theirs.shape:
        found = f"{list(theirs.shape)} in place of {list(ours.shape)}"
        return Agreement(what, False, found, {"shape": list(theirs.shape)})
    scale = ours.square().mean().sqrt().clamp(min=torch.finfo().tiny)
    difference = float((ours - theirs).abs().max() / scale)
    divergence = float(divergences(ours, theirs).max()) if what == "logits" else None
    found = f"relative error of at most {difference:.1e}"
    found += "" if divergence is None else f", KL {divergence:.1e}"
    figures = {"largest_difference": difference, "largest_kl": divergence, "tolerance": tolerance}
    return Agreement(what, difference <= tolerance, found, figures)


def same_greedy_text(subject: Exported, copy: Copy) -> Agreement | None:
    """The most likely continuations are the same tokens, but where two are as likely, up to rounding."""
    different: list[int] = []
    written, seconds = 0, {"ours": 0.0, "theirs": 0.0}
    prompts = [prompt for prompt in _prompts(subject) if prompt]
    for prompt in prompts:
        count = min(NEW_TOKENS, subject.model.config.text_length - len(prompt))
        begun = time.perf_counter()
        ours = subject.greedy(prompt, count)
        between = time.perf_counter()
        theirs = None if ours is None else copy.greedy(prompt, count, subject.ends)
        if ours is None or theirs is None:
            return None
        written, seconds["ours"] = written + len(ours), seconds["ours"] + between - begun
        seconds["theirs"] += time.perf_counter() - between
        place = _first_difference(ours, theirs)
        if place is not None and not _is_tie(subject, prompt, ours, theirs, place):
            different.append(place)
    found = f"{len(prompts)} texts of up to {NEW_TOKENS} tokens"
    if different:
        found = f"{len(different)} of {found} differ, from token {different[0]} on"
    speeds = {f"tokens_per_second_{who}": round(written / each, 1) for who, each in seconds.items()}
    return Agreement("greedy text", not different, found, {"texts": len(prompts), "different": different, **speeds})


def same_chat(subject: Exported, copy: Copy) -> Agreement | None:
    """Conversations are written and encoded as the run has learned them."""
    if subject.template is None:
        return None
    different = []
    for conversation in CONVERSATIONS:
        messages = [Message(**each) for each in conversation]
        text = subject.template.render(messages, add_generation_prompt=True)
        ours = (text, subject.template.encode_prompt(messages, subject.tokenizer))
        if copy.chat(conversation) != ours:
            different.append(text)
    found = f"{len(CONVERSATIONS)} conversations, their text and ids"
    if different:
        found = f"a conversation is not written as {different[0][:60]!r}"
    return Agreement(
        "chat template", not different, found, {"conversations": len(CONVERSATIONS), "different": different}
    )


def same_ends(subject: Exported, copy: Copy) -> Agreement | None:
    """The runtime stops at the tokens at which the run stops."""
    if (theirs := copy.ends()) is None:
        return None
    ours, names = set(subject.ends), {number: name for name, number in subject.special_tokens.items()}
    spelled = [names.get(token, str(token)) for token in subject.ends]
    found = ", ".join(spelled)
    if ours != theirs:
        found = f"{sorted(theirs)} in place of {sorted(ours)} ({found})"
    return Agreement("stop tokens", ours == theirs, found, {"ids": sorted(ours), "theirs": sorted(theirs)})


ALL: tuple[CopyComparison, ...] = (same_weights, same_token_ids, same_logits, same_greedy_text, same_chat, same_ends)


def compared_inputs(subject: Exported) -> tuple[Tensor, ...]:
    """Two random texts without padding ids, which some runtimes mask, longer than a window; for both sides."""
    config = subject.model.config
    assert config.vocab_size is not None
    length = min(MOST_LENGTH, max(LENGTH, 2 * (config.attention_window or 0)), config.text_length)
    tokens = torch.randint(config.vocab_size, (2, length), generator=torch.Generator().manual_seed(0))
    padding: Mapping[str, Any] = subject.fields()
    pad = padding.get("pad_token_id")
    tokens = tokens if pad is None else torch.where(tokens == pad, (tokens + 1) % config.vocab_size, tokens)
    return (tokens, tokens.flip(0)) if subject.is_two_sided else (tokens,)


def divergences(ours: Tensor, theirs: Tensor) -> Tensor:
    """KL(ours ‖ theirs) of each prediction, in nats."""
    p, q = ours.log_softmax(-1), theirs.log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1)


def _prompts(subject: Exported) -> Iterator[list[int]]:
    """The ids of texts as `sample.py` encodes them, in half of the context."""
    room = max(1, subject.model.config.text_length // 2)
    for text in PROMPTS:
        text = encodable(subject.source, text)
        ids = subject.token_ids(text) if subject.is_two_sided else subject.tokenizer.encode_prompt(text)
        yield ids[:room]


def _first_difference(ours: list[int], theirs: list[int]) -> int | None:
    if ours == theirs:
        return None
    return next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs)))


def _is_tie(subject: Exported, prompt: list[int], ours: list[int], theirs: list[int], place: int) -> bool:
    """Whether both tokens at the first difference are as likely, up to rounding."""
    if place >= min(len(ours), len(theirs)):
        return False
    before = ours[:place]
    if subject.is_two_sided:
        target = [subject.tokenizer.target_start, *before]
        logits = subject.outputs(torch.tensor([prompt]), torch.tensor([target]))
    else:
        logits = subject.outputs(torch.tensor([[*prompt, *before]]))
    last = logits[0, -1]
    gap = (last[ours[place]] - last[theirs[place]]).abs() / last.square().mean().sqrt()
    return bool(gap <= 2 * TOLERANCE)


def _and_more(different: list[str]) -> str:
    return f" (and {len(different) - 1} more)" if len(different) > 1 else ""
