"""Folders of every kind that commands open, how each is opened, and the sentence by which a damaged one is refused."""

from __future__ import annotations

import json
import random
import signal
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from minitransformer import pretrained
from minitransformer.analysis.compare import compare
from minitransformer.analysis.search_space import Values
from minitransformer.analysis.sweep import SweepFolder
from minitransformer.analysis.sweep_plan import SweepPlan
from minitransformer.errors import UserError
from minitransformer.lab.experiment import ExperimentSettings
from minitransformer.lab.experiments.identities import Identities
from minitransformer.lab.runner import ExperimentFolder
from minitransformer.models.config import ModelConfig
from minitransformer.models.model import build_model
from minitransformer.pretrained.shards import INDEX, WEIGHTS
from minitransformer.pretrained.tokenizers import load_tokenizer
from minitransformer.runs import Run
from minitransformer.tasks.store import ResultStore
from minitransformer.text.tokenizers import BPE, END_OF_TEXT, Bytes, Framing, Tokenizer
from minitransformer.training.checkpoint import checkpoints_in, write_checkpoint
from minitransformer.training.logging import records_until
from tests.mutations import mutated
from tests.prepared_for_tests import fitted
from tests.runs_for_tests import TINY, configured

SECONDS = 20


PLAN = SweepPlan("gpt-nano", configured(), (Values("lr", (0.1, 0.2)),))


@contextmanager
def at_most(seconds: int) -> Iterator[None]:
    """Raises `TimeoutError` in whatever takes longer."""

    def stop(*_: object) -> None:
        raise TimeoutError(f"took more than {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def refused(action: Callable[[], object]) -> str:
    """The sentence by which `action` is refused."""
    with at_most(SECONDS), pytest.raises(UserError) as caught:
        action()
    sentence = str(caught.value)
    assert "\n" not in sentence.strip()
    return sentence


def run_folder(path: Path) -> Path:
    config = configured(TINY, d_model=8, num_layers=1, seed=3)
    run = Run.create(path, config, Bytes().framed(Framing(prefix=(256,))).with_special_tokens(["<|mask|>"]), Bytes())
    write_checkpoint(
        run.checkpoints, 5, build_model(config.model), {"optimizers": [], "precision": {}, "progress": {"step": 5}}
    )
    lines = [{"step": step, "loss": 2.0 / step, "tokens": step, "seconds": 0.1} for step in range(1, 6)]
    lines.append({"step": 5, "validation_loss": 1.0, "bits_per_byte": 2.0, "accuracy": None})
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    # Without what else they hold, such as checksums: who wants to deceive writes the right ones.
    keep_only(path / "config.json", "format", "model", "data", "training", "text", "provenance")
    keep_only(path / "checkpoints/step-000005/manifest.json", "step", "sha256")
    return path


def keep_only(path: Path, *names: str) -> None:
    """Removes all other fields of the JSON object at `path`."""
    path.write_text(json.dumps({name: value for name, value in json.loads(path.read_text()).items() if name in names}))


def open_run(path: Path) -> None:
    """What commands read of a run folder."""
    run = Run.open(path)
    run.tokenizer.decode(run.tokenizer.encode_prompt("a text"))
    checkpoints_in(run.checkpoints)
    model = run.load_model()
    assert model.num_parameters() > 0
    records_until(path / "metrics.jsonl", 4)
    compare([path, path])


def compare_runs(path: Path) -> None:
    """The same without the settings' types, as `compare` reads runs of other versions too."""
    comparison = compare([path, path])
    comparison.results()
    comparison.runs()


def checkpoint_folder(path: Path) -> Path:
    """A checkpoint as the transformers library keeps it, in two shards, with its tokenizer."""
    config = ModelConfig(
        d_model=8, num_layers=1, num_heads=2, context_length=16, vocab_size=270, positions="learned", bias=True, d_ff=16
    )
    ranks = [bytes([value]) for value in range(256)] + [b"th", b"the", b" a"]
    tokenizer = BPE(ranks).framed(Framing(prefix=(259,)))
    extra = {"bos_token_id": 259, "eos_token_id": [259, 1], "bad_words_ids": [[3]], "id2label": {"0": "a"}}
    pretrained.save(build_model(config), path, "gpt2", extra, tokenizer=tokenizer)
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": 259, "forced_eos_token_id": [259]}))
    (path / "special_tokens_map.json").write_text(json.dumps({"eos_token": {"content": END_OF_TEXT}}))
    from safetensors.torch import load_file, save_file

    tensors = load_file(path / WEIGHTS)
    (path / WEIGHTS).unlink()
    halves = [dict(list(tensors.items())[i::2]) for i in range(2)]
    for i, half in enumerate(halves):
        save_file(half, path / f"half-{i}.safetensors")
    places = {name: f"half-{i}.safetensors" for i, half in enumerate(halves) for name in half}
    (path / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return path


def older_checkpoint_folder(path: Path) -> Path:
    """The same with the files that came before tokenizer.json."""
    checkpoint_folder(path)
    content = json.loads((path / "tokenizer.json").read_text())
    (path / "tokenizer.json").unlink()
    vocabulary = {**content["model"]["vocab"], END_OF_TEXT: 259}
    (path / "vocab.json").write_text(json.dumps(vocabulary))
    (path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(map(" ".join, content["model"]["merges"])) + "\n")
    (path / "added_tokens.json").write_text(json.dumps({"<new>": 260}))
    (path / "tokenizer_config.json").write_text(json.dumps({"eos_token": END_OF_TEXT, "add_bos_token": True}))
    return path


def open_checkpoint(path: Path) -> None:
    model, tokenizer = pretrained.load(path)
    assert model.num_parameters() > 0
    if tokenizer is not None:
        tokenizer.decode(tokenizer.encode_prompt("the text"))


def tokenizer_folder(path: Path) -> Path:
    path.mkdir()
    trained = BPE.train(iter(["some text, some words"] * 3), 262)
    trained.framed(Framing(prefix=(1,), suppressed=(2,), start=3)).save(path / "bpe.json")
    fitted("chars", "a text").save(path / "chars.json")
    Bytes().save(path / "bytes.json")
    return path


def open_tokenizers(path: Path) -> None:
    for file in sorted(path.iterdir()):
        tokenizer = Tokenizer.load(file)
        assert len(tokenizer.fingerprint) == 64
        with suppress(UserError):  # the characters may be other ones
            tokenizer.decode(tokenizer.encode_prompt("a text"))


def public_tokenizers(path: Path) -> Path:
    """Those of other kinds than byte-level BPE, as checkpoints and as runs have them."""
    from tests.tokenizers_for_tests import like_bert, like_qwen2, like_t5

    for make in (like_bert, like_qwen2, like_t5):
        folder = path / make.__name__
        folder.mkdir(parents=True)
        make().save(str(folder / "tokenizer.json"))
        (folder / "config.json").write_text(json.dumps({"model_type": "bert", "eos_token_id": 3, "bos_token_id": 1}))
        tokenizer = load_tokenizer(folder)
        assert tokenizer is not None
        tokenizer.save(path / f"{make.__name__}.json")
    return path


def open_public_tokenizers(path: Path) -> None:
    for file in sorted(path.iterdir()):
        tokenizer = load_tokenizer(file) if file.is_dir() else Tokenizer.load(file)
        assert tokenizer is not None
        assert len(tokenizer.fingerprint) == 64
        tokenizer.decode(tokenizer.encode_prompt("a text"))


def laboratory_folder(path: Path) -> Path:
    path.mkdir()
    store = ResultStore(path / "results.jsonl")
    for seed in range(4):
        store.add({"lr": 0.1, "seed": seed}, {"loss": 2.0}, 1.5)
    experiment = {"experiment": "E0", "settings": {"quick": True, "data": "text"}, "provenance": [{"commit": "x"}]}
    (path / "experiment.json").write_text(json.dumps(experiment))
    (path / "sweep.json").write_text(json.dumps({"identity": PLAN.identity, "provenance": [{"commit": "x"}]}))
    return path


def open_laboratory(path: Path) -> None:
    store = ResultStore(path / "results.jsonl")
    store.results([{"lr": 0.1, "seed": seed} for seed in range(4)])
    try:
        ExperimentFolder(path, Identities(ExperimentSettings(quick=True, data="text")))
    finally:
        SweepFolder(path, PLAN)


KINDS: dict[str, tuple[Callable[[Path], Path], Callable[[Path], None]]] = {
    "run": (run_folder, open_run),
    "history": (run_folder, compare_runs),
    "public tokenizer": (public_tokenizers, open_public_tokenizers),
    "tokenizer": (tokenizer_folder, open_tokenizers),
    "checkpoint": (checkpoint_folder, open_checkpoint),
    "older checkpoint": (older_checkpoint_folder, open_checkpoint),
    "laboratory": (laboratory_folder, open_laboratory),
}


def tracebacks(kind: str, count: int, folder: Path) -> list[str]:
    """Opens `count` folders of this kind with a file that is damaged; what was neither opened nor refused."""
    make, open_it = KINDS[kind]
    whole = make(folder / "whole")
    open_it(whole)
    names = sorted(p for p in whole.rglob("*") if p.suffix in (".json", ".jsonl", ".txt") and not p.parent.is_symlink())
    failures = []
    for seed in range(count):
        rng = random.Random(f"{kind} {seed}")
        file = rng.choice(names)
        before = file.read_bytes()
        file.write_bytes(mutated(before, rng))
        try:
            with at_most(SECONDS):
                open_it(whole)
        except UserError as error:
            if "\n" in str(error).strip():
                failures.append(f"{seed} {file.name}: several lines: {error}")
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            frames = traceback.extract_tb(error.__traceback__)
            ours = [frame for frame in frames if "minitransformer" in frame.filename][-1]
            failures.append(f"{seed} {file.name}: {error!r:.200} at {ours.filename}:{ours.lineno}")
        finally:
            file.write_bytes(before)
    return failures


def changed(path: Path, **parts: Any) -> None:
    """Fields of the JSON object at `path` become other ones."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **parts}))
