"""Decoding tokens, and prefilling a prompt."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from minitransformer.benchmark.case import Absent, BenchSetting, Case, Contestant, Subject, Work, missing
from minitransformer.benchmark.workers import repeated
from minitransformer.errors import UserError

BATCHES = (1, 8, 64)


class Decode(Subject, name="decode"):
    """Tokens per second sampled after a short prompt, over all sequences of a batch."""

    about = "decoding throughput in tokens/s, at batch 1, 8 and 64"

    def cases(self) -> Iterator[Case]:
        tokens = _room(self.setting)
        for batch in BATCHES:
            entries = _contestants(self.setting, "decode", tokens, batch)
            yield Case.of(f"decode {tokens} tokens, batch {batch}", "tokens/s", entries)


class Prefill(Subject, name="prefill"):
    """Tokens per second of prefill, for a prompt that fills the context."""

    about = "prefill throughput in tokens/s"

    def cases(self) -> Iterator[Case]:
        length = self.setting.shape.context_length
        yield Case.of(f"prefill of {length} tokens", "tokens/s", _contestants(self.setting, "prefill", length, 1))


def _room(setting: BenchSetting) -> int:
    """Number of tokens to generate, capped by the context length."""
    room = setting.shape.context_length - setting.prompt
    if room < 1:
        raise UserError(
            f"a context of {setting.shape.context_length} has no room for a prompt of {setting.prompt} tokens"
        )
    return min(setting.tokens, room)


def _contestants(setting: BenchSetting, task: str, tokens: int, batch: int) -> Iterator[Contestant | Absent]:
    def entry(name: str, who: str, precision: str, *, base: bool = False) -> Contestant:
        return Contestant(name, partial(_work, setting, task, who, precision, tokens, batch), base)

    if setting.against:
        yield entry("nanoGPT", "nanogpt", "fp32", base=True)
    else:
        yield Absent("nanoGPT", "give a checkout with --against")
    for precision in ("fp32", "bf16"):
        name = f"transformers {precision}"
        yield missing("transformers", name) or entry(name, "transformers", precision, base=True)
    for weights in ("fp32", "bf16", "int8"):
        yield entry(f"ours {weights}", "ours", weights)


def _work(setting: BenchSetting, task: str, who: str, precision: str, tokens: int, batch: int) -> Work:
    from minitransformer.benchmark import decoding, ours

    once = getattr(decoding, f"{who}_{task}")(setting, precision, tokens, batch)
    finish = partial(ours.synchronise, setting.device)
    shape = setting.shape
    # Our precisions change only the stored weights: the cache, and on a CPU the products, are fp32.
    cache = "fp32" if who == "ours" else precision
    products = cache if setting.device == "cpu" else precision
    cost = (
        ours.reading_cost(shape, precision, products, tokens)
        if task == "prefill"
        else ours.decoding_cost(shape, precision, products, cache, setting.prompt + tokens, batch)
    )
    return Work(partial(repeated, once, tokens * batch, setting.seconds, finish), cost)
