"""Runs of older formats of `config.json`, made by the code of then: they open, decode alike and go on.

Format 1 had every setting flat, format 2 the tokenizer as a name.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from minitransformer.architecture.norms import LayerNorm
from minitransformer.architecture.positions import Rotary
from minitransformer.commands import sample, train
from minitransformer.runs import Run
from minitransformer.settings import flat
from minitransformer.text.tokenizers import BPE, Bytes
from minitransformer.training.optimizers import Optimizer
from tests.runs_for_tests import TEXT, unsealed

FORMAT_1, FORMAT_2 = Path(__file__).parent / "old_run", Path(__file__).parent / "old_run_2"


@pytest.fixture(params=[FORMAT_1, FORMAT_2], ids=["format 1", "format 2"])
def stored(request: pytest.FixtureRequest) -> Path:
    return request.param


@pytest.fixture
def old(stored: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the run, beside the text that it learned from."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MINITRANSFORMER_DATA", str(tmp_path / "data"))
    (tmp_path / "text.txt").write_text(TEXT)
    return Path(shutil.copytree(stored, tmp_path / "run"))


def test_settings_that_were_flat_stand_with_the_variants_that_they_belong_to() -> None:
    config = Run.open(FORMAT_1).config
    assert config.model.norm == LayerNorm.choose(eps=1e-4)
    assert config.model.positions == Rotary.choose(base=500.0)
    assert config.training.optimizer.variant is Optimizer.named("muon")
    assert flat(config)["beta1"] == 0.8
    assert config.data.tokenizer == Bytes.choose()


def test_a_tokenizer_that_was_a_name_has_the_settings_of_its_variant() -> None:
    run = Run.open(FORMAT_2)
    assert run.config.data.tokenizer == BPE.choose(vocab_size=None)
    assert (run.config.model.vocab_size, run.tokenizer.vocab_size) == (280, 280)


def test_it_decodes_what_it_decoded_then(old: Path, stored: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert sample.main(["run", "--prompt", "Line 7: the ", "--temperature", "0", "--max-new-tokens", "24"]) == 0
    assert capsys.readouterr().out.strip() == (stored / "greedy.txt").read_text().strip()


def test_it_goes_on_and_is_written_in_the_format_of_today(old: Path, stored: Path) -> None:
    assert train.main(["--resume", "run", "--steps", "601"]) == 0
    run = Run.open(old)
    record = unsealed(old / "config.json")
    assert record["format"] == 3
    assert record["data"]["tokenizer"]["name"] == run.tokenizer.name
    assert max(checkpoint.name for checkpoint in run.checkpoints.glob("step-*")) == "step-000601"
    assert flat(run.config) == flat(Run.open(stored).config) | {"steps": 601}
