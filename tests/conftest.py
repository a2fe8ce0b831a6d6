"""What all tests share: signatures whose shapes are checked, one thread for each worker, examples that repeat."""

from __future__ import annotations

import gc
import os
import sys
import zlib
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import hypothesis
import jaxtyping
import pytest
import torch
from jaxtyping import install_import_hook

from tests.shape_checks_for_tests import checked, unchecked

# Before the first import of what it checks: from here on, every call must have the shapes that its signature says.
jaxtyping.jaxtyped = checked
install_import_hook(["minitransformer.architecture", "minitransformer.models"], "beartype.beartype")

from minitransformer.generation.fast import recording  # noqa: E402
from minitransformer.models.config import ModelConfig  # noqa: E402
from minitransformer.models.model import Model, build_model  # noqa: E402
from minitransformer.settings import with_settings  # noqa: E402
from tests.late_for_tests import late  # noqa: E402

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)

hypothesis.settings.register_profile("default", deadline=None, max_examples=25, derandomize="CI" in os.environ)
hypothesis.settings.register_profile("thorough", hypothesis.settings.get_profile("default"), max_examples=500)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


seed_torch = torch.manual_seed if torch.cuda.is_available() else torch.default_generator.manual_seed
"""without the stack traces that torch keeps of each seed for the devices that are not there"""


class TorchRandom:
    """Torch's generator for Hypothesis, which seeds it before every example."""

    seed = staticmethod(seed_torch)
    getstate = staticmethod(torch.get_rng_state)
    setstate = staticmethod(torch.set_rng_state)


torch_random = TorchRandom()  # Hypothesis keeps a weak reference
hypothesis.register_random(torch_random)


@pytest.hookimpl(trylast=True)
def pytest_collection_finish() -> None:
    """Python's collector need not go through the thousands of tests, and the modules, again and again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="session")
def shapes_are_not_checked_while_recording() -> Iterator[None]:
    """They were in the step before, which had the same ones; while torch records, checking them takes far longer."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recording, "traced", unchecked()(recording.traced))
        yield


@pytest.fixture(autouse=True)
def shapes_are_not_checked_in_long_runs(request: pytest.FixtureRequest) -> Iterator[None]:
    """Of tests with the mark `unchecked_shapes`, which call over and over what other tests call with checks."""
    with unchecked() if request.node.get_closest_marker("unchecked_shapes") else nullcontext():
        yield


@pytest.hookimpl(tryfirst=True)
def pytest_fixture_setup(fixturedef: Any) -> None:
    """What a fixture draws depends on its name alone, and not on which tests were there before it."""
    seed_torch(zlib.crc32(str(fixturedef.argname).encode()))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_call() -> None:
    """What a test draws does not depend on which of its fixtures were there already."""
    seed_torch(0)


@pytest.fixture(scope="session")
def shake() -> Callable[[torch.nn.Module], Any]:
    """Redraws every weight of a module, late in its training: no gain is 1, no bias 0 and no attention uniform."""

    @torch.no_grad()
    def shaken(module: torch.nn.Module) -> torch.nn.Module:
        for parameter in module.parameters():
            parameter.normal_(std=0.5).add_(1.0 if parameter.dim() == 1 else 0.0)
        return late(module)

    return shaken


@pytest.fixture(scope="session")
def tiny_model(shake: Callable[[torch.nn.Module], Model]) -> Callable[..., Model]:
    """Makes a model of the given topology and choices, small, in float64 and eval mode, with shaken weights."""

    def make(topology: str, **choices: Any) -> Model:
        sizes = {"d_model": 16, "num_layers": 2, "num_heads": 4, "context_length": 32, "vocab_size": 11}
        return (
            shake(build_model(with_settings(ModelConfig(), {"topology": topology, **sizes, **choices}))).double().eval()
        )

    return make


@pytest.fixture(scope="session")
def tiny_decoder(tiny_model: Callable[..., Model]) -> Callable[..., Model]:
    return partial(tiny_model, "decoder")


@pytest.fixture(scope="session")
def make_model(tiny_model: Callable[..., Model]) -> Callable[..., Model]:
    """`tiny_model` with a vocabulary of bytes and two heads, for looks at it."""
    from tests.looks_for_tests import TOKENIZER

    def make(topology: str, **choices: Any) -> Model:
        heads = {} if topology == "rnn" else {"num_heads": 2}
        return tiny_model(topology, vocab_size=TOKENIZER.vocab_size, **{**heads, **choices})

    return make


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A prepared text of 200 lines."""
    from tests.runs_for_tests import prepared_text

    return prepared_text(tmp_path_factory.mktemp("text"))


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, with a text to train on."""
    from tests.runs_for_tests import TEXT

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MINITRANSFORMER_DATA", str(tmp_path / "work"))
    (tmp_path / "my.txt").write_text(TEXT)
    return tmp_path


@pytest.fixture
def run(here: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    """A run of six steps in `here`, with a checkpoint every two."""
    from tests.runs_for_tests import train

    assert train("--out", "run", "--save-every", "2") == 0
    capsys.readouterr()
    return here / "run"


@pytest.fixture
def short_text(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A shorter text in `here`, to sweep over."""
    from minitransformer.analysis import trials
    from tests.sweeping_for_tests import TEXT

    monkeypatch.setenv("COLUMNS", "80")
    trials._prepared.cache_clear()
    (here / "my.txt").write_text(TEXT)


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Trials run here, one after the other, and leave a note; real processes take seconds to start."""
    from minitransformer.tasks import pool

    began = []

    def outcomes(tasks: Any, measure: Any, processes: int) -> Iterator[Any]:
        for task in tasks:
            began.append(task)
            yield pool._outcome(measure, task)

    monkeypatch.setattr(pool, "outcomes", outcomes)
    return began


@pytest.fixture
def call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """Runs a command with what is piped in; gives code, output and notes."""

    def called(command: Any, *arguments: str, piped: bytes = b"") -> tuple[int, str, str]:
        (tmp_path / "piped").write_bytes(piped)
        with (tmp_path / "piped").open(encoding="utf-8") as stdin:
            monkeypatch.setattr(sys, "stdin", stdin)
            code = command.main(list(arguments))
        out, err = capfd.readouterr()
        return code, out, err

    return called
