"""A run whose `config.json` had every setting flat, made by the code of then: it opens, decodes alike and goes on."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from minitransformer.architecture.norms import LayerNorm
from minitransformer.architecture.positions import Rotary
from minitransformer.commands import sample, train
from minitransformer.runs import Run
from minitransformer.settings import flat
from minitransformer.training.optimizers import Optimizer
from tests.runs_for_tests import TEXT, unsealed

STORED = Path(__file__).parent / "old_run"


@pytest.fixture
def old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the run, beside the text that it learned from."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MINITRANSFORMER_DATA", str(tmp_path / "data"))
    (tmp_path / "text.txt").write_text(TEXT)
    return Path(shutil.copytree(STORED, tmp_path / "run"))


def test_its_settings_stand_with_the_variants_that_they_belong_to(old: Path) -> None:
    config = Run.open(old).config
    assert config.model.norm == LayerNorm.choose(eps=1e-4)
    assert config.model.positions == Rotary.choose(base=500.0)
    assert config.training.optimizer.variant is Optimizer.named("muon")
    assert flat(config)["beta1"] == 0.8


def test_it_decodes_what_it_decoded_then(old: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert sample.main(["run", "--prompt", "Line 7: the ", "--temperature", "0", "--max-new-tokens", "24"]) == 0
    assert capsys.readouterr().out.strip() == (STORED / "greedy.txt").read_text().strip()


def test_it_goes_on_and_is_written_in_the_format_of_today(old: Path) -> None:
    assert train.main(["--resume", "run", "--steps", "601"]) == 0
    run = Run.open(old)
    assert unsealed(old / "config.json")["format"] == 2
    assert [checkpoint.name for checkpoint in run.checkpoints.glob("step-*")][-1:] == ["step-000601"]
    assert flat(run.config) == flat(Run.open(STORED).config) | {"steps": 601}
