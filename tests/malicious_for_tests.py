"""Folders made to do harm, opened in a process of little memory: `python -m tests.malicious_for_tests FOLDER`.

It prints a JSON object: for each attack, what came of it, and how many seconds it took.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import resource
import shutil
import struct
import sys
import time
import traceback
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from minitransformer import files
from minitransformer.errors import UserError
from minitransformer.models.model import build_model
from minitransformer.pretrained.shards import INDEX
from minitransformer.training.checkpoint import choose_checkpoint, load_learner_state, load_model
from minitransformer.training.shard_writer import ShardWriter
from minitransformer.training.weights import unique_tensors
from tests.hostile_for_tests import at_most, changed, checkpoint_folder, open_checkpoint, open_run, run_folder
from tests.shards_for_tests import CONFIG, one_rank, optimizers_of, sharded_model, state_of, take_step

ROOM = 512 << 20
"""bytes of memory beyond what importing takes"""
MARK, SHARDED = "mark", "sharded"
STEP = "checkpoints/step-000005"


class Payload:
    """Makes its mark where a pickle of it is opened by who trusts it."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return Path.touch, (self.mark,)


def resealed(step: Path) -> None:
    """The manifest of a checkpoint fits its files: who wants to deceive writes the right checksums."""
    manifest = step / "manifest.json"
    record = json.loads(manifest.read_text())
    record.pop("checksum", None)
    record["sha256"] = {name: files.sha256(step / name) for name in record["sha256"] if (step / name).is_file()}
    manifest.write_text(json.dumps(record))


# --- safetensors whose header lies


def with_header(path: Path, header: Any, length: int | None = None, data: bytes = b"") -> None:
    content = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(content) if length is None else length) + content + data)


def header_of(path: Path) -> tuple[dict[str, Any], bytes]:
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def with_first_tensor(path: Path, **about: Any) -> None:
    header, data = header_of(path)
    name = next(name for name in header if name != "__metadata__")
    header[name] = {**header[name], **about}
    with_header(path, header, data=data)


def sparse_terabytes(path: Path) -> None:
    """A header that tells the truth about a file of a terabyte, which takes no room on disk."""
    header, _ = header_of(path)
    name = next(name for name in header if name != "__metadata__")
    size = 1 << 40
    with_header(path, {name: {"dtype": "F32", "shape": [size // 4], "data_offsets": [0, size]}})
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size + size)


HEADERS: dict[str, Callable[[Path], object]] = {
    "header of 2^63 bytes": lambda path: with_header(path, {}, length=1 << 63),
    "header of a terabyte": lambda path: with_header(path, {}, length=1 << 40),
    "terabytes of data": lambda path: with_first_tensor(path, shape=[1 << 38], data_offsets=[0, 1 << 40]),
    "overlapping tensors": lambda path: with_first_tensor(path, data_offsets=[64, 192]),
    "negative offsets": lambda path: with_first_tensor(path, data_offsets=[-128, 0]),
    "offsets the wrong way": lambda path: with_first_tensor(path, data_offsets=[128, 0]),
    "more elements than 64 bits count": lambda path: with_first_tensor(path, shape=[1 << 62, 1 << 62]),
    "a negative shape": lambda path: with_first_tensor(path, shape=[-4, -8]),
    "unknown dtype": lambda path: with_first_tensor(path, dtype="pickle"),
    "NaN as a shape": lambda path: with_first_tensor(path, shape=[float("nan")]),
    "deep JSON as a header": lambda path: with_header(path, b'{"a":' * 100_000),
    "integer of 5000 digits": lambda path: with_header(path, b'{"a": ' + b"9" * 5000 + b"}"),
    "empty": lambda path: path.write_bytes(b""),
}


# --- pickles, and zip files that hold them


def zipped(parts: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as file:
        for name, content in parts.items():
            file.writestr(f"archive/{name}", content)
    return buffer.getvalue()


def bomb(path: Path, name: str) -> None:
    """A zip file of some megabytes with a record that fits no memory here."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as file:
        for other in {"data.pkl", "version", "byteorder"} - {name}:
            file.writestr(f"archive/{other}", {"version": "3\n", "byteorder": "little"}.get(other, pickle.dumps({}, 2)))
        with file.open(f"archive/{name}", "w", force_zip64=True) as record:
            for _ in range(20):
                record.write(bytes(ROOM >> 4))


def lying_storage(path: Path, number: int) -> None:
    """A state whose tensor says it has `number` elements; its record has one."""
    torch.save({"optimizers": torch.ones(77_777), "precision": {}, "progress": {}}, path)
    with zipfile.ZipFile(path) as file:
        parts = {name.partition("/")[2]: file.read(name) for name in file.namelist()}
    small = struct.pack("<i", 77_777)
    assert parts["data.pkl"].count(b"J" + small) == 2
    parts["data.pkl"] = parts["data.pkl"].replace(b"J" + small, b"\x8a\x08" + struct.pack("<q", number))
    path.write_bytes(zipped({**parts, "data/0": b"\0\0\0\0"}))


def state_with(**changes: Any) -> dict[str, Any]:
    return {"optimizers": [], "precision": {}, "progress": {"step": 5}, **changes}


def pickled_nest(depth: int) -> bytes:
    return b"\x80\x02" + b"]" * depth + b"a" * (depth - 1) + b"."


PICKLES: dict[str, Callable[[Path, Path], object]] = {
    "a pickle": lambda path, mark: path.write_bytes(pickle.dumps(Payload(mark))),
    "a pickle of protocol 0": lambda path, mark: path.write_bytes(pickle.dumps(Payload(mark), 0)),
    "a pickle of torch's": lambda path, mark: torch.save(Payload(mark), path),
    "an old pickle of torch's": lambda path, mark: torch.save(
        Payload(mark), path, _use_new_zipfile_serialization=False
    ),
    "a pickle inside a state": lambda path, mark: torch.save(state_with(precision=Payload(mark)), path),
    "a module of torch's": lambda path, mark: torch.save(torch.nn.Linear(2, 2), path),
    "a list nested 100,000 deep": lambda path, mark: path.write_bytes(
        zipped({"data.pkl": pickled_nest(100_000), "version": b"3\n"})
    ),
    "a zip bomb as the pickle": lambda path, mark: bomb(path, "data.pkl"),
    "a zip bomb as the version": lambda path, mark: bomb(path, "version"),
    "a trainer of other types": lambda path, mark: torch.save([1, 2], path),
    "a storage of terabytes": lambda path, mark: lying_storage(path, 1 << 40),
    "a storage that is larger than its record": lambda path, mark: lying_storage(path, 1 << 20),
    "names that leave the archive": lambda path, mark: path.write_bytes(
        zipped({"../../../mark": b"", "data.pkl": pickle.dumps([1], 2), "version": b"3\n"})
    ),
}


# --- what is opened


Opening = Callable[[], object]


def open_to_resume(run: Path) -> None:
    open_run(run)
    load_learner_state(run / STEP, torch.nn.Linear(1, 1))


def run_with(name: str, damage: Callable[[Path, Path], object]) -> Callable[[Path], Opening]:
    def attack(folder: Path) -> Opening:
        run = run_folder(folder / "run")
        damage(run / STEP / name, folder / MARK)
        resealed(run / STEP)
        return lambda: open_to_resume(run)

    return attack


def checkpoint_with(damage: Callable[[Path], object]) -> Callable[[Path], Opening]:
    def attack(folder: Path) -> Opening:
        path = checkpoint_folder(folder / "checkpoint")
        damage(path / "half-0.safetensors")
        return lambda: open_checkpoint(path)

    return attack


def shards_with(damage: Callable[[Path], object]) -> Callable[[Path], Opening]:
    """A checkpoint that two ranks would have written."""

    def attack(folder: Path) -> Opening:
        run = folder / "run"
        shutil.copytree(folder.parent / SHARDED, run)
        step = run / "checkpoints/step-000004"
        damage(step / "shard-00001-model-00001-of-00002.safetensors")
        resealed(step)
        return lambda: open_sharded(run)

    return attack


def with_places(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Another place in the whole for the first tensor of a shard."""
    header, data = header_of(path)
    about = header["__metadata__"]["DCP_SHARDING_INFO"]
    places = json.loads(about)
    change(places)
    header["__metadata__"]["DCP_SHARDING_INFO"] = json.dumps(places)
    with_header(path, header, data=data)


PLACES: dict[str, Callable[[dict[str, Any]], object]] = {
    "a place in terabytes": lambda places: next(iter(places.values())).update(saved_offsets=[1 << 40, 0]),
    "a negative place": lambda places: next(iter(places.values())).update(saved_offsets=[-4, 0]),
    "a place that is text": lambda places: next(iter(places.values())).update(saved_offsets="abc"),
    "no place": lambda places: places.pop(next(iter(places))),
}


def write_sharded(folder: Path) -> None:
    """A checkpoint of a model that is divided over ranks, of which this is the only one."""
    checkpoints = folder / SHARDED / "checkpoints"
    checkpoints.mkdir(parents=True)
    with one_rank(folder):
        model = sharded_model()
        optimizers = optimizers_of(model)
        take_step(model, optimizers, 1)
        ShardWriter().write_state(checkpoints, 4, unique_tensors(model), state_of(optimizers, model, 4), CONFIG)


def open_sharded(run: Path) -> None:
    chosen = choose_checkpoint(run / "checkpoints")
    load_model(chosen, CONFIG)
    load_learner_state(chosen, build_model(CONFIG.model))


def pickle_as_a_shard(folder: Path) -> Opening:
    path = checkpoint_folder(folder / "checkpoint")
    torch.save(Payload(folder / MARK), path / "pytorch_model.bin")
    places = json.loads((path / INDEX).read_text())["weight_map"]
    changed(path / INDEX, weight_map=dict.fromkeys(places, "pytorch_model.bin"))
    return lambda: open_checkpoint(path)


def code_beside_a_checkpoint(folder: Path) -> Opening:
    """As `trust_remote_code` would run it."""
    path = checkpoint_folder(folder / "checkpoint")
    (path / "modeling.py").write_text(f"open({str(folder / MARK)!r}, 'w')")
    changed(path / "config.json", auto_map={"AutoModel": "modeling.Model"}, model_type="modeling")
    return lambda: open_checkpoint(path)


def attacks() -> dict[str, Callable[[Path], Opening]]:
    found: dict[str, Callable[[Path], Opening]] = {}
    for what, damage in HEADERS.items():
        found[f"run: {what}"] = run_with("model.safetensors", lambda path, _, damage=damage: damage(path))
        found[f"checkpoint: {what}"] = checkpoint_with(damage)
        found[f"sharded: {what}"] = shards_with(damage)
    for what, change in PLACES.items():
        found[f"sharded: {what}"] = shards_with(lambda path, change=change: with_places(path, change))
    found["checkpoint: a sparse file of a terabyte"] = checkpoint_with(sparse_terabytes)
    found["checkpoint: a pickle that its index names"] = pickle_as_a_shard
    found["checkpoint: code beside it"] = code_beside_a_checkpoint
    for what, write in PICKLES.items():
        found[f"run: {what} as trainer.pt"] = run_with("trainer.pt", write)
        if "bomb" not in what:
            found[f"run: {what} as model.safetensors"] = run_with("model.safetensors", write)
    return found


def outcome(opening: Opening) -> str:
    """The sentence by which an attack is refused, or what else it leads to."""
    try:
        with at_most(20):
            opening()
    except UserError as error:
        return f"refused: {error}"
    except BaseException:
        return traceback.format_exc()
    return "opened"


def limit_memory() -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * os.sysconf("SC_PAGE_SIZE") + ROOM,) * 2)


def main(folder: Path) -> None:
    results = {}
    open_to_resume(run_folder(folder / "warm"))  # imports what is imported late
    open_checkpoint(checkpoint_folder(folder / "warm-checkpoint"))
    write_sharded(folder)
    open_sharded(folder / SHARDED)
    limit_memory()
    for number, (name, attack) in enumerate(attacks().items()):
        place = folder / str(number)
        place.mkdir()
        opening = attack(place)
        start = time.perf_counter()
        came = outcome(opening)
        results[name] = [came, time.perf_counter() - start, bool(list(folder.rglob(MARK)))]
        shutil.rmtree(place)
    print(json.dumps(results))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
