"""Training a BPE, and encoding with it."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from typing import Any

from minitransformer.benchmark.case import Absent, BenchSetting, Case, Contestant, Subject, Work, missing
from minitransformer.errors import UserError
from minitransformer.processes import processors

VOCABULARY = 4096
THEIRS = "tokenizers"


class TokenizerTraining(Subject, name="tokenizer-training"):
    """Training throughput of a byte-level BPE of 4096 tokens in MB/s: rustbpe and Hugging Face's."""

    about = f"throughput of training a BPE of {VOCABULARY} tokens, in MB/s"

    def cases(self) -> Iterator[Case]:
        entries: list[Contestant | Absent] = [
            missing(THEIRS, THEIRS) or Contestant(THEIRS, partial(_timed, self.setting, _train_theirs), base=True),
            Contestant("ours (rustbpe)", partial(_timed, self.setting, _train_ours)),
        ]
        yield Case.of("tokenizer training", "MB/s", entries)


class Encoding(Subject, name="encoding"):
    """Encoding throughput in MB/s, on one thread and on all cores."""

    about = "encoding throughput in MB/s, on one thread and on all cores"

    def cases(self) -> Iterator[Case]:
        entries: list[Contestant | Absent] = [
            missing(THEIRS, THEIRS) or Contestant(THEIRS, partial(_timed, self.setting, _encode_theirs), base=True)
        ]
        for threads in sorted({1, processors()}):
            name = f"ours on {threads} thread{'s' if threads > 1 else ''}"
            entries.append(Contestant(name, partial(_timed, self.setting, partial(_encode_ours, threads=threads))))
        yield Case.of("encoding", "MB/s", entries)


def _timed(setting: BenchSetting, prepare: Callable[[list[str]], Callable[[], object]]) -> Work:
    texts = list(texts_of(setting.data, setting.megabytes))
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    once = prepare(texts)

    def sample() -> float:
        start = time.perf_counter()
        once()
        return megabytes / (time.perf_counter() - start)

    return Work(sample)


def texts_of(data: str, megabytes: float) -> Iterator[str]:
    """About the first `megabytes` of the text in `data`; raises `UserError` if there is less."""
    from minitransformer.text.corpora import open_corpus

    left = megabytes * 1e6
    for piece in open_corpus(data).pieces():
        text = piece.text[: int(left) + 1]
        yield text
        left -= len(text.encode())
        if left <= 0:
            return
    raise UserError(f"{data} has {megabytes - left / 1e6:.1f} MB, less than --megabytes {megabytes:g}: lower it")


def _train_ours(texts: list[str]) -> Callable[[], object]:
    from minitransformer.text.tokenizers import BPE

    return lambda: BPE.train(texts, VOCABULARY)


def _train_theirs(texts: list[str]) -> Callable[[], object]:
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

    from minitransformer.text.tokenizers import GPT4_SPLIT

    def once() -> Any:
        tokenizer = Tokenizer(models.BPE())
        split = pre_tokenizers.Split(Regex(_without_possessives(GPT4_SPLIT)), "isolated")
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
        )
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, initial_alphabet=alphabet, show_progress=False)
        tokenizer.train_from_iterator(texts, trainer)
        return tokenizer

    return once


def _without_possessives(pattern: str) -> str:
    """An equivalent pattern for a library without possessive quantifiers."""
    return pattern.replace("++", "+").replace("?+", "?").replace("*+", "*")


def _encode_ours(texts: list[str], threads: int) -> Callable[[], object]:
    from minitransformer.text.threads import in_order
    from minitransformer.text.tokenizers import BPE

    tokenizer = BPE.train(islice(texts, 200), VOCABULARY)

    def once() -> int:
        return sum(map(len, in_order(tokenizer.encode_array, texts, threads, len)))

    return once


def _encode_theirs(texts: list[str]) -> Callable[[], object]:
    # Read by the library on first use; otherwise it warns and encodes on one thread.
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    tokenizer: Any = _train_theirs(list(islice(texts, 200)))()
    return lambda: tokenizer.encode_batch_fast(texts)
