"""A certificate notices whatever in a copy is not as it was trained, in every format."""

from __future__ import annotations

import json
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from minitransformer.commands import export
from minitransformer.exporting import ExportFormat
from minitransformer.exporting.certificate import (
    compare_copy,
    same_chat,
    same_ends,
    same_logits,
    same_token_ids,
    same_weights,
)
from minitransformer.exporting.exported import Exported
from minitransformer.exporting.formats import ExportChoices
from tests.exports_for_tests import IN_A_FOLDER, LLAMA, run_that_leaves
from tests.runs_for_tests import Call

with suppress(ImportError):  # before a test captures the standard error that it keeps for its warnings
    import transformers  # noqa: F401

QUICK = (same_weights, same_token_ids, same_logits, same_chat, same_ends)


def written(run: Any, folder: Path, name: str, **choices: Any) -> ExportFormat:
    """A run's copy in `folder`, without a certificate."""
    made: ExportFormat = ExportFormat.named(name)(Exported.of(run), ExportChoices(**choices))
    folder.mkdir()
    made.write(folder)
    return made


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[ExportFormat, Path]:
    pytest.importorskip("transformers", reason="the reference implementation is not installed")
    path = tmp_path_factory.mktemp("llama")
    return written(run_that_leaves(path / "run", **LLAMA), path / "out", "hf"), path / "out"


@pytest.mark.parametrize("name", IN_A_FOLDER)
def test_a_fault_in_a_folder_is_noticed(name: str, llama: tuple[ExportFormat, Path], tmp_path: Path) -> None:
    made, whole = llama
    noticed_by, plant = IN_A_FOLDER[name]
    plant(Path(shutil.copytree(whole, tmp_path / "out")))
    found = compare_copy(made.exported, made.open(tmp_path / "out"), QUICK)
    assert noticed_by in {each.name for each in found if not each.agrees}


def test_a_copy_without_a_fault_agrees_in_everything(
    llama: tuple[ExportFormat, Path], tmp_path: Path, call: Call
) -> None:
    made, _ = llama
    code, out, err = call(export, str(made.exported.run.path), "--to", str(tmp_path / "out"), "--license", "mit")
    assert (code, err) == (0, "")
    for name in ("weights", "token ids", "logits", "greedy text", "chat template", "stop tokens"):
        assert f"{name:14} same: " in out
    certificate = json.loads((tmp_path / "out" / "certificate.json").read_text())
    assert certificate["agrees"] is certificate["is_foreign"] is True
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md"} <= certificate["sha256"].keys()
    card = (tmp_path / "out" / "README.md").read_text()
    assert card.startswith("---\nlicense: mit\npipeline_tag: text-generation\n")
    assert "| weights | 21 tensors, bit for bit |" in card
