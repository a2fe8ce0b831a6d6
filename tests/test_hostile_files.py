"""Damaged and hostile files are refused in one sentence: no traceback, no hang, no memory, nothing opened elsewhere."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from minitransformer import pretrained, settings
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
from minitransformer.records import MOST_DEPTH, checked_fields, parse_json, read_json
from minitransformer.runs import Run
from minitransformer.tasks.store import ResultStore
from minitransformer.text.corpora import open_corpus
from minitransformer.text.tokenizers import BPE, END_OF_TEXT, Bytes, Characters, Framing, Tokenizer
from minitransformer.training.checkpoint import (
    checkpoints_in,
    load_trainer_state,
    remove_old_checkpoints,
    write_checkpoint,
)
from minitransformer.training.config import DataConfig, RunConfig, TrainingConfig
from minitransformer.training.logging import RunFiles, records_until

from .mutations import mutated
from .runs_for_tests import TINY, configured

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
    run = Run.create(path, config, Bytes().framed(Framing(before=(256,))).with_special_tokens(["<|mask|>"]), Bytes())
    write_checkpoint(run.checkpoints, 5, build_model(config.model), {"optimizers": [], "progress": {"step": 5}})
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
    tokenizer = BPE(ranks).framed(Framing(before=(259,)))
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
    trained.framed(Framing(before=(1,), never=(2,), start=3)).save(path / "bpe.json")
    Characters.fit(lambda: iter(["a text"])).save(path / "chars.json")
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
    from .test_pretrained_tokenizers import like_bert, like_qwen2, like_t5

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


@pytest.mark.parametrize(
    ("part", "name", "value", "must"),
    [
        ("model", "num_layers", True, "a whole number"),
        ("model", "num_layers", 2.0, "a whole number"),
        ("model", "num_layers", 10**30, "a whole number"),
        ("model", "num_kv_heads", "2", "a whole number or null"),
        ("model", "residual", ["pre"], "an object"),
        ("model", "residual", {"name": ["pre"]}, "a text"),
        ("model", "window_pattern", [1], "a list"),
        ("model", "window_pattern", True, "a list"),
        ("training", "compile", "maybe", "'auto' or 'on' or 'off'"),
        ("training", "lr", "0.1", "a number"),
        ("training", "lr", 10**400, "a number"),
        ("training", "lr", False, "a number"),
        ("training", "patience", {}, "a whole number or null"),
        ("training", "tensorboard", 0, "true or false"),
    ],
)
def test_a_setting_of_another_type_is_refused_by_name(
    tmp_path: Path, part: str, name: str, value: Any, must: str
) -> None:
    path = run_folder(tmp_path / "run")
    record = json.loads((path / "config.json").read_text())
    changed(path / "config.json", **{part: {**record[part], name: value}})
    assert f"config.json has {name} " in (said := refused(lambda: Run.open(path)))
    assert f"which must be {must}: " in said


def test_a_whole_number_is_a_number(tmp_path: Path) -> None:
    path = run_folder(tmp_path / "run")
    changed(path / "config.json", training={**RunConfig().to_json()["training"], "lr": 1})
    assert type(Run.open(path).config.training.lr) is float


@pytest.mark.parametrize("record", [{}, {"model_type": "gpt2"}, {"model": {}, "data": {}}, {"model": 3}])
def test_another_json_object_is_no_run(tmp_path: Path, record: Any) -> None:
    path = run_folder(tmp_path / "run")
    (path / "config.json").write_text(json.dumps(record))
    said = "is a public checkpoint" if "model_type" in record else "is not the configuration of a run (it has no"
    assert said in refused(lambda: Run.open(path))


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        *(("run", name) for name in ("config.json", "tokenizer.json", "checkpoints/step-000005/manifest.json")),
        *(("checkpoint", name) for name in ("config.json", INDEX, "tokenizer.json", "generation_config.json")),
        *(("older checkpoint", name) for name in ("vocab.json", "tokenizer_config.json", "added_tokens.json")),
        *(("laboratory", name) for name in ("experiment.json", "sweep.json")),
        ("history", "config.json"),
    ],
)
def test_json_that_is_nested_too_deep_is_refused(tmp_path: Path, kind: str, name: str) -> None:
    make, open_it = KINDS[kind]
    path = make(tmp_path / "folder")
    for depth in (200_000, MOST_DEPTH + 1):
        (path / name).write_bytes(b'{"a":' * depth + b"0" + b"}" * depth)
        assert name.rpartition("/")[2] in refused(lambda: open_it(path))


def test_depth_is_bounded_and_what_is_less_deep_is_read() -> None:
    assert parse_json("[" * MOST_DEPTH + "]" * MOST_DEPTH)
    with pytest.raises(ValueError, match="deep"):
        parse_json("[" * (MOST_DEPTH + 1) + "]" * (MOST_DEPTH + 1))


@pytest.mark.parametrize("content", [b'"\\ud800"', b'["\\uDFFF"]', b'{"\\ud800": 1}'])
def test_half_a_surrogate_pair_is_no_text(content: bytes) -> None:
    with pytest.raises(ValueError, match="surrogate"):
        parse_json(content)
    assert parse_json(b'"\\ud83e\\udd8a \\\\ud800"') == "\N{FOX FACE} \\ud800"


@pytest.mark.parametrize("line", ["5", "[]", "null", '"step"', '{"step": "7"}', "{", '{"step": true}', "[" * 100_000])
def test_a_line_that_is_no_record_is_left_out_when_a_run_goes_on(tmp_path: Path, line: str) -> None:
    path = run_folder(tmp_path / "run")
    metrics = path / "metrics.jsonl"
    whole = metrics.read_text()
    metrics.write_text(line + "\n" + whole)
    compare_runs(path)
    RunFiles(path, resume_at=9).close()
    assert metrics.read_text() == whole


@pytest.mark.parametrize("manifest", ["[]", "5", '{"sha256": []}', '{"sha256": {"model.safetensors": 5}}', "[" * 9999])
def test_a_manifest_of_another_kind_is_damage(tmp_path: Path, manifest: str) -> None:
    path = run_folder(tmp_path / "run")
    (path / "checkpoints/step-000005/manifest.json").write_text(manifest)
    assert "checkpoint step-000005" in (said := refused(lambda: Run.open(path).load_model()))
    assert "is damaged" in said


@pytest.mark.parametrize("name", ["../../../secret", "/etc/hostname"])
def test_a_manifest_names_files_of_its_checkpoint_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    path = run_folder(tmp_path / "run")
    (tmp_path / "secret").write_text("secret")
    changed(path / "checkpoints/step-000005/manifest.json", sha256={name: "0" * 64})
    opened: list[Path] = []
    monkeypatch.setattr("minitransformer.files.sha256", lambda file: opened.append(file))
    refused(lambda: Run.open(path).load_model())
    assert not opened


def test_links_to_checkpoints_elsewhere_are_none(tmp_path: Path) -> None:
    path, other = run_folder(tmp_path / "run"), run_folder(tmp_path / "other")
    folder, elsewhere = path / "checkpoints", other / "checkpoints/step-000005"
    (folder / "step-000009").symlink_to(elsewhere)
    (folder / "step-000010").write_text("a file")
    for link in ("latest", "best"):
        (folder / link).unlink(missing_ok=True)
    (folder / "latest").symlink_to(elsewhere)
    assert [found.name for found in checkpoints_in(folder)] == ["step-000005"]
    assert Run.open(path).checkpoint() == (folder / "step-000005").resolve()
    for name in ("latest", "step-000009", str(elsewhere)):
        assert "has no checkpoint" in refused(lambda name=name: Run.open(path).load_model(name))
    (folder / "best").symlink_to(elsewhere)
    assert "has no checkpoint 'best'" in refused(lambda: Run.open(path).load_model())
    remove_old_checkpoints(folder, 1)
    assert elsewhere.is_dir()


def test_pipes_and_dangling_links_of_a_data_folder_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    os.mkfifo(tmp_path / "b.txt")
    (tmp_path / "c.txt").symlink_to(tmp_path / "nothing")
    (tmp_path / "d.txt").symlink_to(tmp_path / "d.txt")
    with at_most(SECONDS):
        assert [piece.text for piece in open_corpus(str(tmp_path)).pieces()] == ["text"]


@pytest.mark.parametrize("kind", ["run", "checkpoint", "older checkpoint", "tokenizer", "laboratory"])
def test_a_pipe_in_place_of_a_file_is_not_waited_for(tmp_path: Path, kind: str) -> None:
    make, open_it = KINDS[kind]
    whole = make(tmp_path / "whole")
    for file in [file for file in whole.rglob("*") if file.suffix in (".json", ".jsonl", ".safetensors", ".txt")]:
        if file.parent.is_symlink():
            continue
        content = file.read_bytes()
        file.unlink()
        os.mkfifo(file)
        with at_most(SECONDS), suppress(UserError):
            open_it(whole)
        file.unlink()
        file.write_bytes(content)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("num_layers", 10**9, "num_layers is 1000000000: it must be at most"),
        ("num_layers", 9999, "tensors, too few for 9999 layers"),
        ("num_experts", 9999, "tensors, too few for"),
        ("d_ff", 10**8, "too few for"),
        ("vocab_size", 10**8, "too few for"),
        ("d_model", 10**8, "too few for"),
        ("context_length", 10**9, "it must be at most"),
        ("num_heads", 10**12, "it must be at most"),
    ],
)
def test_a_model_that_is_larger_than_its_weights_is_refused_before_it_takes_memory(
    tmp_path: Path, name: str, value: int, message: str
) -> None:
    path = run_folder(tmp_path / "run")
    record = json.loads((path / "config.json").read_text())
    changed(path / "config.json", model={**record["model"], name: value})
    assert message in refused(lambda: Run.open(path).load_model())


@pytest.mark.parametrize("name", ["n_layer", "n_embd", "vocab_size", "n_positions", "n_inner", "n_head"])
@pytest.mark.parametrize("value", [9_984, 10**8, 10**9, 10**18])
def test_a_checkpoint_that_says_it_is_huge_is_refused(tmp_path: Path, name: str, value: int) -> None:
    path = checkpoint_folder(tmp_path / "checkpoint")
    changed(path / "config.json", **{name: value})
    refused(lambda: pretrained.load(path))


@pytest.mark.parametrize("positions", ["sinusoidal", "sinusoidal-halves"])
def test_a_table_of_positions_that_fits_no_memory_is_refused(positions: str) -> None:
    said = refused(lambda: ModelConfig(positions=positions, context_length=1 << 26, d_model=1 << 20))
    assert "does not fit into memory" in said


@pytest.mark.parametrize("name", ["bpe.json", "bytes.json", "chars.json"])
def test_an_id_larger_than_any_vocabulary_is_refused(tmp_path: Path, name: str) -> None:
    file = tokenizer_folder(tmp_path / "tokenizers") / name
    changed(file, special_tokens={END_OF_TEXT: 10**9})
    assert "token id 1000000000 is larger than any vocabulary" in refused(lambda: Tokenizer.load(file))


@pytest.mark.parametrize("pattern", ["", "a*", "a+", r"(?:(a*)*)*\1b", "(", "(" * 5000, "x" * 1_000_000])
def test_a_pattern_that_fails_or_leaves_out_text_is_refused(tmp_path: Path, pattern: str) -> None:
    file = tokenizer_folder(tmp_path / "tokenizers") / "bpe.json"
    changed(file, pattern=pattern)
    assert "not a tokenizer" in refused(lambda: Tokenizer.load(file))


@pytest.mark.parametrize(
    "shard",
    ["../secret.safetensors", "/SECRET", "a/../../secret.safetensors", ".", "..", "", "x" * 999, "\0", 5, None],
)
def test_no_shard_is_opened_outside_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shard: Any) -> None:
    path = checkpoint_folder(tmp_path / "checkpoint")
    shutil.copy(path / "half-0.safetensors", tmp_path / "secret.safetensors")
    if shard == "/SECRET":
        shard = str(tmp_path / "secret.safetensors")
    places = json.loads((path / INDEX).read_text())["weight_map"]
    changed(path / INDEX, weight_map={**places, next(iter(places)): shard})
    opened: list[Path] = []
    monkeypatch.setattr("minitransformer.pretrained.shards._opened", opened.append)
    refused(lambda: pretrained.load(path))
    assert not opened


class Runs:
    """What makes its mark where a pickle is opened by who trusts it."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return Path.touch, (self.mark,)


@pytest.mark.parametrize("content", ["code", "a list", "another state", "empty", "cut"])
def test_the_state_of_a_trainer_runs_no_code_and_is_refused_when_damaged(tmp_path: Path, content: str) -> None:
    checkpoint = run_folder(tmp_path / "run") / "checkpoints/step-000005"
    state = checkpoint / "trainer.pt"
    if content == "code":
        torch.save(Runs(tmp_path / "mark"), state)
    elif content in ("a list", "another state"):
        torch.save([1] if content == "a list" else {"a": 1}, state)
    else:
        state.write_bytes(state.read_bytes()[: 100 if content == "cut" else 0])
    assert "trainer.pt" in refused(lambda: load_trainer_state(checkpoint))
    assert not (tmp_path / "mark").exists()


def test_values_are_checked_by_the_types_of_a_record() -> None:
    whole = {**RunConfig().to_json()["training"], "probe": ["a"], "patience": 3}
    assert settings.from_json(TrainingConfig, whole, "x").probe == ("a",)
    for values in ({"probe": "a"}, {"probe": [3]}, {"compile": "maybe"}, {"device": None}):
        assert refused(lambda values=values: settings.from_json(TrainingConfig, values, "x")).startswith("x has ")
    assert checked_fields(DataConfig, {"field": "a"}, "x") == {"field": "a"}


def test_a_file_that_is_too_large_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "a.json").open("wb") as file:
        file.truncate(1 << 40)
    assert "MB" in refused(lambda: read_json(tmp_path / "a.json", "use another"))


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_files_are_opened_or_refused_in_one_sentence(tmp_path: Path, kind: str) -> None:
    assert tracebacks(kind, 40, tmp_path) == []


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_four_thousand_damaged_files_give_no_traceback(tmp_path: Path, kind: str) -> None:
    assert tracebacks(kind, -(-4000 // len(KINDS)), tmp_path) == []
