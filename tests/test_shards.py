"""Sharded checkpoints: any number of ranks loads what any other has saved, and every command opens them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from minitransformer import files
from minitransformer.commands import export, look, sample
from minitransformer.commands.train import main as train_main
from minitransformer.errors import StorageError, UserError
from minitransformer.models.model import build_model
from minitransformer.runs import Run
from minitransformer.text.tokenizers import Bytes
from minitransformer.training.checkpoint import (
    choose_checkpoint,
    damage,
    load_learner_state,
    load_model,
    load_progress,
    write_checkpoint,
)
from minitransformer.training.shard_writer import ShardWriter
from minitransformer.training.weights import Parent, weights_digest
from tests.runs_for_tests import SMALL, configured, metrics, saved_weights
from tests.shards_for_tests import (
    CONFIG,
    die,
    die_last,
    fail,
    load,
    loaded_from,
    on_ranks,
    one_rank,
    optimizers_of,
    sharded_model,
    state_of,
    take_step,
    train,
    unique_tensors,
    whole_state,
)

pytestmark = pytest.mark.unchecked_shapes
Loaded = dict[str, Tensor]


def same(left: Loaded, right: Loaded) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@pytest.fixture
def rank(tmp_path: Path) -> Iterator[None]:
    with one_rank(tmp_path):
        yield


def save_sharded(folder: Path, step: int = 2, config: Any = CONFIG) -> Loaded:
    """Write a checkpoint of a model divided over the ranks of this test; returns what it holds."""
    folder.mkdir(parents=True, exist_ok=True)
    model = sharded_model(config)
    optimizers = optimizers_of(model, config)
    for number in range(step):
        take_step(model, optimizers, number)
    ShardWriter().write_state(folder, step, unique_tensors(model), state_of(optimizers, model, step), config)
    return whole_state(model, optimizers)


def save_whole(folder: Path, *, by_number: bool = False) -> Loaded:
    """The same of an ordinary model; `by_number`, as older versions kept the state of optimizers."""
    folder.mkdir(parents=True, exist_ok=True)
    model = build_model(CONFIG.model)
    optimizers = optimizers_of(model)
    for number in range(2):
        take_step(model, optimizers, number)
    state = state_of(optimizers, model, 2)
    if by_number:
        state["optimizers"] = [optimizer.state_dict() for optimizer in optimizers]
    write_checkpoint(folder, 2, model, state, CONFIG)
    return whole_state(model, optimizers)


# --- in one process


@pytest.mark.usefixtures("rank")
def test_one_process_loads_what_ranks_have_saved(tmp_path: Path) -> None:
    expected = save_sharded(tmp_path / "checkpoints")
    chosen = choose_checkpoint(tmp_path / "checkpoints")
    assert same(loaded_from(chosen, build_model(CONFIG.model)), expected)
    assert load_progress(chosen)["step"] == 2
    assert (chosen.stat().st_mode & 0o777) == (chosen.parent.stat().st_mode & 0o777)


@pytest.mark.usefixtures("rank")
@pytest.mark.parametrize("by_number", [False, True])
def test_ranks_load_what_one_process_has_saved(tmp_path: Path, by_number: bool) -> None:
    expected = save_whole(tmp_path / "checkpoints", by_number=by_number)
    assert same(loaded_from(choose_checkpoint(tmp_path / "checkpoints"), sharded_model()), expected)


def test_a_state_by_numbers_and_one_by_names_are_the_same(tmp_path: Path) -> None:
    """Checkpoints of older versions have numbers."""
    loaded = []
    for by_number in (False, True):
        torch.manual_seed(0)
        expected = save_whole(tmp_path / str(by_number), by_number=by_number)
        loaded.append(loaded_from(choose_checkpoint(tmp_path / str(by_number)), build_model(CONFIG.model)))
        assert same(loaded[-1], expected)
    assert same(*loaded)


def test_the_state_of_a_parameter_that_is_not_trained_is_refused(tmp_path: Path) -> None:
    save_whole(tmp_path)
    checkpoint = choose_checkpoint(tmp_path)
    state = load_learner_state(checkpoint, build_model(CONFIG.model))
    state["optimizers"][0]["state"]["another.weight"] = {}
    write_checkpoint(tmp_path, 2, build_model(CONFIG.model), state, CONFIG)
    with pytest.raises(StorageError, match=r"another\.weight"):
        loaded_from(choose_checkpoint(tmp_path), build_model(CONFIG.model))


@pytest.mark.usefixtures("rank")
def test_every_command_opens_a_sharded_run(tmp_path: Path, capsys: Any) -> None:
    config = configured(CONFIG, vocab_size=Bytes().vocab_size, positions="learned", bias=True)
    run = Run.create(tmp_path / "run", config, Bytes(), Bytes())
    save_sharded(run.checkpoints, config=config)
    path = str(run.path)
    assert sample.main([path, "--prompt", "a", "--max-new-tokens", "3"]) == 0
    assert look.main([path, "--prompt", "abc", "--out", str(tmp_path / "look.html")]) == 0
    assert export.main([path, "--to", str(tmp_path / "exported")]) == 0
    exported = {name for file in (tmp_path / "exported").glob("*.safetensors") for name in load_file(file)}
    assert exported
    parent = Parent.of(run.path, run.checkpoint())
    assert parent.sha256 == weights_digest(run.checkpoint())


@pytest.mark.usefixtures("rank")
def test_a_run_goes_on_from_a_sharded_checkpoint_in_one_process(here: Path, capsys: Any) -> None:
    for name, steps in (("whole", 6), ("parts", 4)):
        assert (
            train_main(["--data", "my.txt", "--out", name, "--steps", str(steps), "--schedule", "constant", *SMALL])
            == 0
        )
    run = Run.open(here / "parts")
    model, chosen = run.load_model(), run.checkpoint()
    ShardWriter().write_state(run.checkpoints, 4, unique_tensors(model), load_learner_state(chosen, model), run.config)
    assert list(chosen.glob("shard-*"))
    assert train_main(["--resume", "parts", "--steps", "6"]) == 0
    assert same(saved_weights(here / "parts"), saved_weights(here / "whole"))
    assert metrics(here / "parts")[-1] == metrics(here / "whole")[-1]


@pytest.mark.usefixtures("rank")
def test_a_sharded_checkpoint_executes_nothing_when_it_is_opened(tmp_path: Path) -> None:
    """It has no file of pickles but that which `torch.load` reads with `weights_only`."""
    save_sharded(tmp_path / "checkpoints")
    kinds = {path.suffix for path in choose_checkpoint(tmp_path / "checkpoints").iterdir()}
    assert kinds == {".json", ".pt", ".safetensors"}


@pytest.mark.usefixtures("rank")
@pytest.mark.parametrize("suffix", ["00001-of-00002.safetensors", "00002-of-00002.safetensors", "trainer.pt"])
@pytest.mark.parametrize("fault", ["missing", "flipped", "cut"])
def test_a_damaged_file_of_a_rank_is_noticed(tmp_path: Path, suffix: str, fault: str) -> None:
    save_sharded(tmp_path / "checkpoints")
    (damaged,) = (tmp_path / "checkpoints/step-000002").glob(f"*{suffix}")
    content = damaged.read_bytes()
    if fault == "missing":
        damaged.unlink()
    else:
        damaged.write_bytes(content[:-8] if fault == "cut" else content[:-1] + bytes([content[-1] ^ 1]))
    assert damaged.name in (damage(damaged.parent) or "")
    with pytest.raises(StorageError, match=r"step-000002 .* is damaged"):
        choose_checkpoint(tmp_path / "checkpoints")


def sealed_again(checkpoint: Path, **changes: Any) -> None:
    """Write the right checksums, as one who wants to deceive does."""
    manifest = files.unsealed(json.loads((checkpoint / "manifest.json").read_text()))
    names = [name for name in manifest["sha256"] if (checkpoint / name).exists()]
    manifest = {**manifest, "sha256": {name: files.sha256(checkpoint / name) for name in names}, **changes}
    (checkpoint / "manifest.json").write_text(json.dumps(files.sealed(manifest)))


@pytest.mark.usefixtures("rank")
def test_weights_that_the_manifest_does_not_name_are_refused(tmp_path: Path) -> None:
    """All safetensors files are read."""
    save_sharded(tmp_path / "checkpoints")
    chosen = choose_checkpoint(tmp_path / "checkpoints")
    shutil.copy(next(chosen.glob("shard-*")), chosen / "shard-00009-model-00001-of-00002.safetensors")
    assert "does not know shard-00009" in (damage(chosen) or "")


@pytest.mark.usefixtures("rank")
@pytest.mark.parametrize("names", [{}, {"../../secret": "0" * 64}, {"trainer.pt": "0" * 64}, []])
def test_a_manifest_of_ranks_names_files_of_its_checkpoint_only(tmp_path: Path, names: Any) -> None:
    save_sharded(tmp_path / "checkpoints")
    chosen = choose_checkpoint(tmp_path / "checkpoints")
    sealed_again(chosen, sha256=names)
    assert "manifest.json" in (damage(chosen) or "")


def written_again(path: Path, tensors: Loaded, offsets: Any) -> None:
    """The safetensors file at `path` with other tensors, which begin at other places of the whole ones."""
    save_file(tensors, path, {"DCP_SHARDING_INFO": offsets if isinstance(offsets, str) else json.dumps(offsets)})
    sealed_again(path.parent)


@pytest.mark.usefixtures("rank")
@pytest.mark.parametrize("offset", [[10**12, 0], [-5, 0], [0], ["a", 0], {}, None])
def test_parts_at_places_that_cannot_be_are_refused_before_they_take_memory(tmp_path: Path, offset: Any) -> None:
    save_sharded(tmp_path / "checkpoints")
    chosen = choose_checkpoint(tmp_path / "checkpoints")
    for path in sorted(chosen.glob("shard-*")):
        tensors = load_file(path)
        with safe_open(path, "pt") as file:
            offsets = json.loads(file.metadata()["DCP_SHARDING_INFO"])
        name = next(name for name, tensor in tensors.items() if tensor.dim() == 2)
        written_again(path, tensors, {**offsets, name: {"saved_offsets": offset}})
        with pytest.raises(UserError, match=r"no complete shards|does not fit"):
            loaded_from(chosen, build_model(CONFIG.model))


@pytest.mark.usefixtures("rank")
def test_a_part_that_is_missing_is_not_left_as_it_was(tmp_path: Path) -> None:
    save_sharded(tmp_path / "checkpoints")
    chosen = choose_checkpoint(tmp_path / "checkpoints")
    (path,) = chosen.glob("shard-*-model-00001*")
    tensors = load_file(path)
    name = next(name for name, tensor in tensors.items() if tensor.dim() == 2)
    tensors[name] = tensors[name][1:].contiguous()
    places = {each: {"saved_offsets": [0] * tensor.dim()} for each, tensor in tensors.items()}
    written_again(path, tensors, {**places, name: {"saved_offsets": [1, 0]}})
    with pytest.raises(StorageError, match=f"a part of {name} is missing"):
        load_model(chosen, CONFIG)


@pytest.mark.usefixtures("rank")
def test_the_weights_of_another_model_are_refused(tmp_path: Path) -> None:
    save_sharded(tmp_path / "checkpoints")
    with pytest.raises(UserError, match="does not fit the model of its run"):
        loaded_from(choose_checkpoint(tmp_path / "checkpoints"), build_model(configured(CONFIG, d_ff=7).model))


@pytest.mark.usefixtures("rank")
def test_a_disk_that_is_too_small_for_all_ranks_is_noticed_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_sharded(tmp_path / "checkpoints")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000}))
    with pytest.raises(StorageError, match=r"step-000004 needs .*step-000002 is the last one"):
        save_sharded(tmp_path / "checkpoints", step=4)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["latest", "step-000002"]


# --- on several ranks


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two ranks have saved."""
    folder = tmp_path_factory.mktemp("two") / "run"
    (folder / "checkpoints").mkdir(parents=True)
    on_ranks(2, folder, train)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 3])
def test_what_two_ranks_have_saved_others_load(run: Path, count: int) -> None:
    """Copied before the next step, and read by another number of ranks."""
    expected = torch.load(run / "expected.pt")
    chosen = choose_checkpoint(run / "checkpoints")
    assert chosen.name == "step-000004"
    assert len(list(chosen.glob("shard-*"))) == 4
    if count == 1:
        assert same(loaded_from(chosen, build_model(CONFIG.model)), expected)
    else:
        on_ranks(count, run, load)
        assert same(torch.load(run / f"loaded-by-{count}.pt"), expected)


@pytest.mark.slow
def test_several_ranks_load_what_one_process_has_saved(tmp_path: Path) -> None:
    expected = save_whole(tmp_path / "checkpoints")
    on_ranks(2, tmp_path, load)
    assert same(torch.load(tmp_path / "loaded-by-2.pt"), expected)


@pytest.mark.slow
@pytest.mark.parametrize("fault", [fail, die, die_last])
def test_a_checkpoint_of_ranks_is_whole_or_absent(run: Path, tmp_path: Path, fault: Any) -> None:
    """A disk that fills up, and kills of one rank."""
    copy = tmp_path / "run"
    shutil.copytree(run, copy, symlinks=True)
    on_ranks(2, copy, fault, killed=fault is not fail)
    assert choose_checkpoint(copy / "checkpoints").name == "step-000004"
    names = {path.name for path in (copy / "checkpoints").iterdir()}
    whole = {"best", "latest", "step-000002", "step-000004"}
    assert {name for name in names if not name.endswith(".partial")} == whole
    assert damage(copy / "checkpoints/step-000002") is None
    if fault is fail:
        assert names == whole
        assert (copy / "error-0").read_text() == (copy / "error-1").read_text() == "[Errno 28] No space left on device"
