"""A run notices when one of its files is not what was written."""

import json
import shutil

import pytest

from minitransformer.commands.sample import main as sample
from minitransformer.commands.train import main
from minitransformer.runs import Run
from minitransformer.training.checkpoint import damage
from tests.runs_for_tests import SMALL, assert_same_weights, prepared_text, refused, saved_weights, train


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"seed": 0', '"seed": 1'),
        ('"dropout": 0.0', '"dropout": 0.1'),
        ('"num_heads": 2', '"num_heads": 4'),
        ('"beta2": 0.95', '"beta2": 0.99'),
        ('"text": "', '"text": "0'),
    ],
)
@pytest.mark.parametrize("command", ["resume", "sample"])
def test_a_changed_digit_in_the_configuration_is_noticed(run, capsys, old, new, command):
    content = (run / "config.json").read_text()
    (run / "config.json").write_text(content.replace(old, new, 1))
    assert content != (run / "config.json").read_text()
    code = main(["--resume", "run", "--steps", "9"]) if command == "resume" else sample(["run", "--prompt", "Line"])
    error = capsys.readouterr().err
    assert code == 1
    assert error.startswith("error: run/config.json was changed after training")
    assert error.count("\n") == 1


def test_a_resumed_run_writes_down_its_configuration_anew(run, capsys):
    assert main(["--resume", "run", "--steps", "9", "--lr", "0.002"]) == 0
    assert main(["--resume", "run", "--steps", "12"]) == 0
    assert Run.open(run).config.training.lr == 0.002


def test_a_whole_configuration_of_another_run_does_not_fit_the_checkpoints(here, run, capsys):
    assert train("--out", "other", "--seed", "1") == 0
    shutil.copy(here / "other/config.json", run / "config.json")
    error = refused(capsys, "--resume", "run", "--steps", "9", code=1)
    assert "trained with seed 0" in error
    assert "config.json says 1" in error


def test_the_tokenizer_of_another_run_is_noticed(here, run, capsys):
    assert main(["--data", "my.txt", "--out", "other", "--steps", "1", *SMALL, "--tokenizer", "chars"]) == 0
    shutil.copy(here / "other/tokenizer.json", run / "tokenizer.json")
    assert "tokenizer.json was changed after training" in refused(capsys, "--resume", "run", "--steps", "9", code=1)


def test_a_run_from_before_there_were_checksums_opens_and_goes_on(here, run):
    record = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps({k: v for k, v in record.items() if k not in ("checksum", "sha256")}))
    for manifest in run.glob("checkpoints/step-*/manifest.json"):
        record = json.loads(manifest.read_text())
        manifest.write_text(json.dumps({"step": record["step"], "sha256": record["sha256"]}))
    for sums in (here / "work/prepared").glob("*/sha256.json"):
        sums.unlink()
    assert sample(["run", "--prompt", "Line", "--max-new-tokens", "3"]) == 0
    assert main(["--resume", "run", "--steps", "9"]) == 0


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"sha256": {}}, "no checksum of model.safetensors"),
        ({"step": 5}, "belongs to step 5"),
        ({"checksum": "0"}, "missing or damaged"),
    ],
)
def test_a_manifest_that_is_not_that_of_its_checkpoint_is_damage(run, change, words):
    checkpoint = run / "checkpoints/step-000006"
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    if "checksum" not in change:
        del manifest["checksum"]
    (checkpoint / "manifest.json").write_text(json.dumps({**manifest, **change}))
    assert words in damage(checkpoint)


@pytest.mark.parametrize("name", ["train.bin", "validation.bin", "meta.json", "tokenizer.json", "sha256.json"])
def test_prepared_text_of_which_a_byte_has_changed_is_made_again(tmp_path, name):
    prepared = prepared_text(tmp_path)
    path = prepared.folder / name
    content = path.read_bytes()
    path.write_bytes(content[:20] + bytes([content[20] ^ 1]) + content[21:])
    again = prepared_text(tmp_path)
    assert again.folder == prepared.folder
    assert path.read_bytes() == content


@pytest.mark.parametrize("name", ["scan", "tokenizer"])
def test_notes_about_a_text_of_which_a_digit_has_changed_are_taken_again(here, run, name):
    [note] = (here / "work/prepared").glob(f"{name}-*.json")
    content = note.read_bytes()
    digit = next(i for i, byte in enumerate(content) if chr(byte).isdigit())
    note.write_bytes(content[:digit] + bytes([content[digit] ^ 1]) + content[digit + 1 :])
    assert train("--out", "again") == 0
    assert note.read_bytes() == content
    assert_same_weights(saved_weights(here / "again"), saved_weights(run))


def test_hashes_of_a_large_file_take_every_core_and_see_every_byte(tmp_path, monkeypatch):
    from minitransformer.text import caching

    monkeypatch.setattr(caching, "BLOCK", 7)
    path = tmp_path / "tokens"
    content = bytes(range(50))
    seen = set()
    for place in range(len(content)):
        path.write_bytes(content[:place] + b"\xff" + content[place + 1 :])
        seen.add(caching.digest_of(path))
    assert len(seen) == len(content)
    path.write_bytes(content)
    assert caching.digest_of(path) == caching.digest_of(path)
