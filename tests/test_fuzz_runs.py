"""Run folders of any content are opened, used and resumed, or refused in one sentence; nothing else is touched."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import strategies as st

from minitransformer.commands import compare, export, sample
from minitransformer.commands.train import main as train_main
from minitransformer.runs import Run
from minitransformer.training.checkpoint import choose_checkpoint, load_trainer_state
from tests.fuzz_for_tests import any_texts, cases, for_cases, sentence_of, texts, untouched
from tests.hostile_for_tests import open_run
from tests.runs_for_tests import SMALL, TEXT

pytestmark = pytest.mark.unchecked_shapes
STEPS = ["step-999999999999999999", "step-9999999999999999999", f"step-{'9' * 200}", "step-٠٠٠٠٠٥", "step--00001"]
FOLDERS = ["step-000000", "step-000003.replaced", "step-000009.partial", "latest", "best", "black-box", "exported"]
FILES = ["train.lock", "generation_config.json", "target-tokenizer.json", "model.safetensors", "a.json.replaced"]
NAMES = st.one_of(
    texts.map(lambda text: "a" + text.replace("/", "").replace("\0", "")[:40]),
    st.sampled_from([*STEPS, *FOLDERS, *FILES]),
)


class Runs:
    """Two runs with three checkpoints each, and what stands around them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "my.txt").write_text(TEXT)
        for name, seed in (("one", "0"), ("other", "1")):
            flags = ["--data", str(folder / "my.txt"), "--out", str(folder / name), "--seed", seed, "--steps", "6"]
            assert train_main([*flags, "--save-every", "2", "--keep-last", "3", *SMALL]) == 0
        self.names = sorted(str(path.relative_to(folder / "one")) for path in (folder / "one").rglob("*"))

    def changes(self) -> st.SearchStrategy[tuple[str, str, Any]]:
        """What to do, to which entry of the run, and with what."""
        every = st.sampled_from(self.names)
        other = st.sampled_from(self.names)
        kinds = [
            st.tuples(
                st.sampled_from(["remove", "folder", "pipe", "empty", "itself", "swap", "outside"]), every, other
            ),
            st.tuples(st.sampled_from(["cut", "flip"]), every, st.floats(0, 1)),
            st.tuples(st.just("link"), every, st.sampled_from(["nothing", "/dev/zero", "/dev/null", "/", "../secret"])),
            st.tuples(st.sampled_from(["rename", "extra", "extra folder", "extra link"]), every, NAMES),
        ]
        return st.one_of(*kinds)


def remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def change(run: Path, kind: str, name: str, by: Any) -> None:
    """Damage one entry of the run folder; earlier changes may have removed it."""
    path, outside = run / name, run.parent / "other"
    if not os.path.lexists(path) or not path.parent.is_dir():
        return
    match kind:
        case "rename" | "extra" | "extra folder" | "extra link":
            target = path.parent / by
            if len(os.fsencode(by)) > 255 or os.path.lexists(target):
                return
            if kind == "rename":
                path.rename(target)
            elif kind == "extra":
                target.write_bytes(b"{}")
            elif kind == "extra folder":
                target.mkdir()
            else:
                target.symlink_to(outside / name)
        case "cut" | "flip" if path.is_file():
            content = path.read_bytes()
            place = int(by * max(len(content) - 1, 0))
            flipped = bytes(byte ^ 1 for byte in content[place : place + 1])
            path.write_bytes(content[:place] + (b"" if kind == "cut" else flipped + content[place + 1 :]))
        case "swap" if path.is_file() and (outside / by).is_file():
            remove(path)
            shutil.copy(outside / by, path)
        case "remove" | "folder" | "pipe" | "empty" | "itself" | "outside" | "link":
            remove(path)
            if kind == "folder":
                path.mkdir()
                (path / "a").write_text("a")
            elif kind == "pipe":
                os.mkfifo(path)
            elif kind == "empty":
                path.touch()
            elif kind != "remove":
                path.symlink_to({"itself": path, "outside": outside / name, "link": by}[kind])


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MINITRANSFORMER_DATA", str(folder / "work"))
        return Runs(folder)


@pytest.fixture
def data(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINITRANSFORMER_DATA", str(runs.folder / "work"))


def in_changed(runs: Runs, changes: list[tuple[str, str, Any]], do: Callable[[Path], object]) -> None:
    """Have `do` use a run with `changes`; what is beside it stays as it is."""
    with TemporaryDirectory(dir=runs.folder.parent) as folder:
        for name in ("one", "other"):
            shutil.copytree(runs.folder / name, Path(folder, name), symlinks=True)
        run = Path(folder, "one")
        Path(folder, "secret").write_text("secret")
        for each in changes:
            change(run, *each)
        with untouched(Path(folder), but=run.name):
            do(run)


def open_all(run: Path) -> None:
    """What commands read of a run, a part at a time: what is damaged hides nothing behind it."""
    sentence_of(lambda: open_run(run))
    sentence_of(lambda: load_trainer_state(choose_checkpoint(run / "checkpoints")))


def command(main: Callable[[list[str]], int], *arguments: str, refused: str = "") -> None:
    """`main` ends with an exit code, and says one sentence if it is not 0, about what is `refused`."""
    err = StringIO()
    with redirect_stdout(StringIO()), redirect_stderr(err):
        code = main(list(arguments))
    assert code in (0, 1, 2)
    if code:
        assert [line for line in err.getvalue().splitlines() if line.startswith("error: ")], err.getvalue()
    assert "Traceback" not in err.getvalue()
    assert refused in err.getvalue()


@cases(10, 500)
def test_a_run_folder_of_any_content_is_opened_or_refused(runs: Runs, count: int) -> None:
    def check(changes: list[tuple[str, str, Any]]) -> None:
        in_changed(runs, changes, open_all)

    for_cases(count, check, st.lists(runs.changes(), min_size=1, max_size=3))


@pytest.mark.usefixtures("data")
@cases(2, 60)
def test_a_run_folder_of_any_content_is_resumed_or_refused(runs: Runs, count: int) -> None:
    def check(changes: list[tuple[str, str, Any]], steps: str) -> None:
        in_changed(runs, changes, lambda run: command(train_main, "--resume", str(run), "--steps", steps))

    for_cases(count, check, st.lists(runs.changes(), min_size=1, max_size=2), st.sampled_from(["6", "7"]))


@pytest.mark.usefixtures("data")
@pytest.mark.parametrize(
    "name", ["metrics.jsonl", "train.log", "samples.txt", "train.lock", "config.json", "checkpoints"]
)
@pytest.mark.parametrize("to", ["outside", "nothing"])
def test_a_run_is_not_resumed_through_links(runs: Runs, name: str, to: str) -> None:
    changes = [("outside", name, "")] if to == "outside" else [("link", name, "../nothing")]
    in_changed(runs, changes, lambda run: command(train_main, "--resume", str(run), "--steps", "7"))


@pytest.mark.usefixtures("data")
@pytest.mark.parametrize("name", ["metrics.jsonl", "train.log", "samples.txt"])
def test_a_run_is_not_resumed_with_pipes(runs: Runs, name: str) -> None:
    in_changed(
        runs, [("pipe", name, "")], lambda run: command(train_main, "--resume", str(run), "--steps", "7", refused=name)
    )


@pytest.mark.usefixtures("data")
def test_a_run_whose_samples_are_a_folder_is_one_sentence(runs: Runs) -> None:
    in_changed(
        runs,
        [("folder", "samples.txt", "")],
        lambda run: command(train_main, "--resume", str(run), "--steps", "6", refused="samples.txt"),
    )


@pytest.mark.usefixtures("data")
@cases(3, 80)
def test_a_run_folder_of_any_content_is_used_by_commands_or_refused(runs: Runs, count: int) -> None:
    commands: dict[str, Callable[[Path], None]] = {
        "sample": lambda run: command(sample.main, str(run), "--prompt", "Line", "--max-new-tokens", "2"),
        "export": lambda run: command(export.main, str(run), "--to", str(run / "exported")),
        "compare": lambda run: command(compare.main, str(run), str(run.parent / "other")),
        "fine-tune": lambda run: command(
            train_main, "--init-from", str(run), "--data", str(runs.folder / "my.txt"), "--steps", "1",
            "--out", str(run / "tuned"), "--compile", "off",
        ),
    }  # fmt: skip

    def check(changes: list[tuple[str, str, Any]], name: str) -> None:
        in_changed(runs, changes, commands[name])

    for_cases(count, check, st.lists(runs.changes(), min_size=1, max_size=2), st.sampled_from(sorted(commands)))


@cases(20, 300)
def test_any_name_of_a_checkpoint_is_known_or_refused(runs: Runs, count: int) -> None:
    elsewhere = st.sampled_from(["", ".", "..", "/", "../..", "../../other/checkpoints/latest"])

    def check(name: str) -> None:
        said = sentence_of(lambda: Run.open(runs.folder / "one").checkpoint(name))
        assert said is None or "has no checkpoint" in said
        assert said is not None or "other" not in name

    for_cases(count, check, any_texts | NAMES | elsewhere)
