"""Variants from outside the package: the README's own example, run as a user would, and what can go wrong."""

import hashlib
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from minitransformer.commands import start
from minitransformer.errors import StorageError
from minitransformer.plugins import check_plugins
from tests.forked_for_tests import run_command as run

ROOT = Path(__file__).parents[1]
TINY = [
    "--d-model=16",
    "--num-layers=2",
    "--num-heads=2",
    "--context-length=16",
    "--vocab-size=260",
    "--tokenizer=bytes",
]
SHORT = ["--steps=4", "--eval-every=2", "--batch-size=2", "--precision=fp32", "--device=cpu"]


def readme_example() -> str:
    """The Python block of the README that defines a placement."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.S)
    [example] = [block for block in blocks if "(PreLN, name=" in block]
    return example


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rezero.py").write_text(readme_example(), encoding="utf-8")
    (tmp_path / "text.txt").write_text("A fox is quick and brown. " * 200, encoding="utf-8")
    return tmp_path


def train(*arguments: str) -> subprocess.CompletedProcess[str]:
    return run("train", "--data", "text.txt", "--out", "run", *TINY, *SHORT, *arguments)


PLUGIN = "--plugin", "rezero.py", "--residual", "rezero", "--rezero-start", "0.25"


def test_the_example_of_the_readme_has_twenty_lines_at_most() -> None:
    assert len(readme_example().splitlines()) <= 24


def test_the_readmes_placement_trains_resumes_and_writes_and_its_run_says_which_file_it_needs(here: Path) -> None:
    trained = train(*PLUGIN)
    assert trained.returncode == 0, trained.stderr
    record = json.loads((here / "run/config.json").read_text())
    assert record["model"]["residual"] == {"name": "rezero", "start": 0.25}
    [plugin] = record["plugins"]
    assert plugin["name"] == "rezero.py"
    resumed = run("train", "--plugin", "rezero.py", "--resume", "run", "--steps", "6")
    assert resumed.returncode == 0, resumed.stderr
    written = run("sample", "run", "--plugin=rezero.py", "--prompt", "A fox", "--max-new-tokens", "4")
    assert written.returncode == 0, written.stderr
    without = run("sample", "run", "--prompt", "A fox")
    assert (without.returncode, without.stdout) == (2, "")
    assert "needs the plugin rezero.py: give it with --plugin rezero.py" in without.stderr
    (here / "rezero.py").write_text(readme_example() + "\n")
    changed = run("sample", "run", "--plugin", "rezero.py", "--prompt", "A fox")
    assert changed.returncode == 2
    assert "another version of the plugin rezero.py" in changed.stderr


def test_code_in_a_run_folder_is_never_executed(here: Path) -> None:
    assert train(*PLUGIN).returncode == 0
    for name in ("rezero.py", "minitransformer.py", "sitecustomize.py"):
        (here / "run" / name).write_text("import pathlib; pathlib.Path('executed').touch()\n" + readme_example())
    assert run("sample", "run", "--prompt", "A fox").returncode == 2
    assert not (here / "executed").exists()


def test_a_sweep_trains_placements_of_a_plugin_in_processes_of_their_own(here: Path) -> None:
    swept = run(
        *("sweep", "--plugin", "rezero.py", "--set", "residual=pre,rezero", "--out", "swept", "--data", "text.txt"),
        *(*TINY, *SHORT, "--processes", "1"),
    )
    assert swept.returncode == 0, swept.stdout + swept.stderr
    assert (here / "swept/trials/residual-rezero-seed-0/config.json").exists()
    compared = run("compare", *(str(path) for path in sorted((here / "swept/trials").iterdir())))
    assert compared.returncode == 0, compared.stderr
    assert "rezero" in compared.stdout


def test_a_flag_of_a_plugin_is_listed_under_the_variant_that_it_belongs_to(here: Path) -> None:
    help = " ".join(run("train", "--plugin", "rezero.py", "--help").stdout.replace("│", " ").split())
    assert "residual rezero options" in help
    assert "--rezero-start" in help
    refused = train("--plugin", "rezero.py", "--rezero-start", "0.5")
    assert refused.returncode == 2
    assert "rezero_start belongs to residual 'rezero', and residual is 'pre'" in refused.stderr


PROCESSOR = """
from dataclasses import dataclass
from minitransformer.generation.processors import Processor
from minitransformer.settings import setting

class Favour(Processor, name="favour"):
    "The logit of one byte is higher by `strength`."

    @dataclass(frozen=True)
    class Settings:
        byte: int = setting(120, at_least=0, at_most=255, help="which one")
        strength: float = setting(0.0, at_least=0, help="how much")

    def __call__(self, logits, tokens):
        logits = logits.clone()
        logits[:, self.settings.byte] += self.settings.strength
        return logits
"""


def test_a_sampling_processor_of_a_plugin_is_a_flag_and_changes_what_is_generated(here: Path) -> None:
    (here / "mine.py").write_text(PROCESSOR, encoding="utf-8")
    assert train().returncode == 0
    flags = ("run", "--prompt", "A fox", "--plugin", "mine.py", "--max-new-tokens", "3", "--temperature")
    for temperature in ("0", "1"):
        favoured = run("sample", *flags, temperature, "--favour-strength", "1000", "--favour-byte", "33")
        assert favoured.stdout == "A fox!!!\n", favoured.stderr
    assert "xxx" not in run("sample", *flags, "1").stdout, "without its flag, it has no effect"
    refused = run("sample", *flags, "1", "--favour-strength", "-1")
    assert (refused.returncode, refused.stderr) == (2, "error: favour_strength is -1.0: it must be at least 0\n")
    help = " ".join(run("sample", "--plugin", "mine.py", "--help").stdout.replace("│", " ").split())
    assert re.search(r"sampling options.*--favour-byte INT which one \(default: 120\).*beam search options", help)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, r"the plugin bad\.py cannot be read \(No such file or directory\): name a Python file"),
        ("def f(:\n", r"the plugin bad\.py cannot be loaded \(SyntaxError: invalid syntax.*line 1\): fix it"),
        ("1 / 0\n", r"the plugin bad\.py cannot be loaded \(ZeroDivisionError: division by zero\): fix it"),
        (
            "from minitransformer.architecture.residual import PreLN\nclass Mine(PreLN, name='post'): pass\n",
            "residual placement 'post' is already registered: choose another name",
        ),
    ],
)
def test_a_plugin_that_cannot_be_loaded_gets_one_sentence(
    here: Path, capsys: pytest.CaptureFixture[str], content: str | None, words: str
) -> None:
    if content is not None:
        (here / "bad.py").write_text(content)
    assert start("train", ["--plugin", "bad.py"]) == 2
    assert re.fullmatch(f"error: {words}\n", capsys.readouterr().err)


@pytest.mark.slow
def test_the_laws_run_over_the_readmes_placement(here: Path) -> None:
    tests = [str(ROOT / "tests" / name) for name in ("test_residual.py", "test_init.py", "test_topologies.py")]
    laws = subprocess.run(
        [sys.executable, "-m", "pytest", "--plugin", str(here / "rezero.py"), "-k", "rezero", *tests],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert laws.returncode == 0, laws.stdout[-3000:]
    assert int(re.search(r"(\d+) passed", laws.stdout + " 0 passed")[1]) >= 0  # type: ignore[index]
    shutil.rmtree(ROOT / ".pytest_cache", ignore_errors=True)


def test_one_file_adds_a_variant_of_every_family(here: Path) -> None:
    plugin = f"--plugin={ROOT / 'tests/plugins/one_of_each.py'}"
    trained = train(
        plugin,
        *("--feedforward=mish", "--norm=p-norm", "--norm-eps=1e-6", "--positions=last-first", "--last-first-every=3"),
        *("--init=gpt2-half", "--optimizer=adamw-without-decay", "--schedule=power", "--power-exponent=3"),
        *("--objective=causal-tempered", "--causal-tempered-scale=0.5"),
        *("--tokenizer=bytes-shifted", "--bytes-shifted-by=3"),
    )
    assert trained.returncode == 0, trained.stderr
    assert "tokens per target" in trained.stdout
    record = json.loads((here / "run/config.json").read_text())
    assert record["training"]["objective"] == {"name": "causal-tempered", "scale": 0.5}
    assert record["data"]["tokenizer"] == {"name": "bytes-shifted", "by": 3}
    written = run("sample", "run", plugin, "--prompt", "A fox", "--max-new-tokens", "4")
    assert written.returncode == 0, written.stderr
    assert "mine" in run("lab", plugin, "list").stdout
    assert "gpt2-cousin" in run("export", plugin, "--help").stdout


def test_a_tokenizer_of_a_plugin_is_recorded_and_fitted_anew_by_another_version(here: Path) -> None:
    source = (ROOT / "tests/plugins/one_of_each.py").read_text()
    tokenizers = []
    for name, content in (("one", source), ("two", source.replace("cls(settings.by)", "cls(settings.by + 1)"))):
        (here / "mine.py").write_text(content)
        trained = train("--plugin=mine.py", "--tokenizer=bytes-shifted", f"--out={name}")
        assert trained.returncode == 0, trained.stderr
        [plugin] = json.loads((here / name / "config.json").read_text())["plugins"]
        assert plugin == {"name": "mine.py", "sha256": hashlib.sha256(content.encode()).hexdigest()}
        tokenizers.append(json.loads((here / name / "tokenizer.json").read_text())["by"])
    assert tokenizers == [1, 2]
    without = run("sample", "two", "--prompt", "A fox")
    assert without.returncode == 2
    assert "needs the plugin mine.py: give it with --plugin mine.py" in without.stderr


@pytest.mark.parametrize("recorded", [5, "rezero.py", [5], [{"name": "rezero.py"}], [{"name": 3, "sha256": "0"}]])
def test_a_damaged_record_of_plugins_is_named(recorded: object) -> None:
    with pytest.raises(StorageError, match=r"^x/config\.json has "):
        check_plugins(recorded, "x/config.json")
