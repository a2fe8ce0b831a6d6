"""README, the map of the package and the tour of the architecture: all that they name is there."""

from __future__ import annotations

import ast
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from minitransformer import plugins
from minitransformer.__main__ import COMMANDS
from minitransformer.architecture.residual import Residual
from minitransformer.commands import load_command, train, with_plugins
from minitransformer.compression.request import CompressionRequest
from minitransformer.generation.config import SamplingConfig
from minitransformer.settings import kinds
from minitransformer.training.config import RunConfig
from tests.test_house import BASE, MODULES, ROOMS

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "minitransformer"
README, MAP, TOUR = ROOT / "README.md", PACKAGE / "README.md", PACKAGE / "architecture/README.md"
PAGES = pytest.mark.parametrize("page", [README, MAP, TOUR], ids=["readme", "map", "tour"])

BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", flags=re.MULTILINE | re.DOTALL)
PLACEHOLDERS = {"FILE.py", "NAME.py", "rezero.py"}
"""names of files that the reader gives"""
OTHERS = {"check", "continuous-batching", "dtype", "max-restarts", "shutdown-timeout"}
"""flags of other programs"""


def prose(page: Path) -> str:
    return BLOCK.sub("", page.read_text(encoding="utf-8"))


def code_spans(text: str) -> list[str]:
    return re.findall(r"`([^`\n]+)`", text)


def section(page: Path, title: str) -> str:
    return re.split(r"^## ", page.read_text(encoding="utf-8").split(f"\n## {title}", 1)[1], flags=re.MULTILINE)[0]


def rows(text: str) -> Iterator[list[str]]:
    """The cells of each row of the tables in `text`, without their headings."""
    for line in text.splitlines():
        if line.startswith("|") and not line.startswith("|---"):
            yield [cell.strip() for cell in line.strip("|").split("|")]


def paths_named(page: Path) -> Iterator[tuple[str, list[Path]]]:
    """Every span that looks like a file or folder of ours, with all places that it may mean.

    Where a paragraph or a row has named a file, the next name without a folder is of the same one.
    """
    for line in prose(page).splitlines():
        beside: list[Path] = []
        for span in code_spans(line):
            if not re.fullmatch(r"[\w/.-]+(\.py|\.cpp|/)", span) or span in PLACEHOLDERS or span.startswith("runs/"):
                continue
            name = span.replace("NAME.py", "")
            places = [folder / name for folder in (*beside, page.parent, PACKAGE, ROOT)]
            yield span, places
            beside = [place.parent for place in places if place.exists()][:1] or beside


@PAGES
def test_every_file_and_folder_that_a_page_names_exists(page: Path) -> None:
    named = list(paths_named(page))
    assert [span for span, places in named if not any(place.exists() for place in places)] == []


@PAGES
def test_every_link_of_a_page_leads_to_a_file_or_a_heading(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    titles = re.findall(r"^#+ (.*)", text, re.M)
    headings = {re.sub(r"[^\w -]", "", title).strip().lower().replace(" ", "-") for title in titles}
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if not link.startswith("https://"):
            path, _, heading = link.partition("#")
            assert (page.parent / path).exists(), link
            assert not heading or heading in headings, link


@PAGES
def test_every_name_in_code_font_is_a_name_of_the_code(page: Path) -> None:
    files = [*PACKAGE.rglob("*.py"), *ROOT.glob("data/*.py")]
    source = "\n".join(file.read_text(encoding="utf-8") for file in files)
    names = {span for span in code_spans(prose(page)) if re.fullmatch(r"[A-Za-z_][A-Za-z_0-9]*", span)}
    assert names
    assert {name for name in names if not re.search(rf"\b{name}\b", source)} == set()


@PAGES
def test_every_flag_that_a_page_names_is_one_of_a_command(page: Path) -> None:
    files = PACKAGE.glob("commands/*.py")
    fields = re.findall(r"^    (\w+):", "\n".join(file.read_text(encoding="utf-8") for file in files), re.M)
    settings = {*kinds(RunConfig), *kinds(CompressionRequest), *SamplingConfig().flat, *fields}
    known = {name.replace("_", "-") for name in settings} | {"help", "plugin", *OTHERS}
    named = set(re.findall(r"`[^`\n]*?--([a-z][\w-]*)", prose(page)))
    assert {flag for flag in named if flag.removeprefix("no-") not in known} == set()


def commands_of(page: Path) -> Iterator[str]:
    """Every command of ours that a page prints, without what stands around it in the shell."""
    text = page.read_text(encoding="utf-8")
    lines = re.sub(r"\\\n *", "", text).splitlines()
    printed = [line.strip() for line in lines if line.startswith("    ") and "python" in line]
    for line in [*printed, *(span for span in code_spans(prose(page)) if span.startswith("python "))]:
        for part in re.split(r"\s(?:\||&&|<|>)\s", re.sub(r"\s#\s.*", "", line) + " "):
            if match := re.search(r"python (?:-m minitransformer |(?=(?:train|sample)\.py))", part):
                command = part[match.end() :].strip()
                yield from [command] if command != "COMMAND" and "--help" not in command else []


class Parsed(BaseException):
    """A command line was understood."""


def stop(*arguments: Any, **named: Any) -> Any:
    raise Parsed


PRINTED = sorted({command for page in (README, MAP, TOUR) for command in commands_of(page)})


def test_the_pages_print_commands() -> None:
    assert {command.split()[0].removesuffix(".py") for command in PRINTED} == set(COMMANDS)


@pytest.fixture
def rezero(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file of the README's example, in the current folder; its placement is known until the test ends."""
    [example] = [code for _, code in BLOCK.findall(README.read_text(encoding="utf-8")) if "(PreLN, name=" in code]
    (tmp_path / "rezero.py").write_text(example, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    others = {name: member for name, member in Residual.registry.items() if name != "rezero"}
    monkeypatch.setattr(Residual, "registry", others)
    monkeypatch.setattr(plugins, "_loaded", {})


@pytest.mark.parametrize("command", PRINTED)
@pytest.mark.usefixtures("rezero")
def test_every_command_that_a_page_prints_is_understood(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name, *arguments = shlex.split(command)
    module = load_command(name.removesuffix(".py"))
    # The runs that are named are not there.
    monkeypatch.setattr(train, "text_option", lambda arguments, flag: None)
    understood: dict[str, Callable[[], None]] = {
        **dict.fromkeys(("train", "doctor"), lambda: monkeypatch.setattr(train, "with_files", stop)),
        "verify_resume": lambda: monkeypatch.setattr(module, "trainable", stop),
        "sweep": lambda: monkeypatch.setattr(module, "_check", stop),
        "sample": lambda: monkeypatch.setattr(module, "check_together", stop),
        "data": lambda: monkeypatch.setattr(module, "_config", stop),
        "compress": lambda: monkeypatch.setattr(module, "_check", stop),
    }
    understood.get(module.__name__.rpartition(".")[2], lambda: stop_after_parsing(module, monkeypatch))()
    with pytest.raises(Parsed):
        module.main(with_plugins(arguments))


TESTS = README.read_text(encoding="utf-8") + MAP.read_text(encoding="utf-8")
PYTEST = sorted(set(re.findall(r"^    python -m pytest (.*?)  +#", TESTS, re.M)))


def test_every_test_file_that_a_command_names_exists() -> None:
    named = {word for line in PYTEST for word in shlex.split(line) if word.startswith("tests/")}
    assert named
    assert {name for name in named if not (ROOT / name).exists()} == set()


@pytest.mark.slow
@pytest.mark.parametrize("line", [line for line in PYTEST if "plugin" in line])
@pytest.mark.usefixtures("rezero")
def test_the_laws_are_found_for_a_plugin_by_the_command_that_is_printed(line: str, tmp_path: Path) -> None:
    words = shlex.split(line.replace("rezero.py", str(tmp_path / "rezero.py")))
    program = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-n", "0", *words]
    collected = subprocess.run(program, capture_output=True, text=True, cwd=ROOT)
    assert collected.returncode == 0, collected.stderr
    assert re.search(r"test_residual\.py: \d\d", collected.stdout)


def stop_after_parsing(module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    parse = module.parse

    def parse_and_stop(*arguments: Any, **named: Any) -> None:
        parse(*arguments, **named)
        raise Parsed

    monkeypatch.setattr(module, "parse", parse_and_stop)


def test_the_examples_of_the_tour_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Residual, "registry", dict(Residual.registry))  # the tour registers a placement
    blocks = [code for language, code in BLOCK.findall(TOUR.read_text(encoding="utf-8")) if language == "python"]
    assert blocks
    names: dict[str, Any] = {"__name__": "tour"}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)


def test_every_module_of_the_architecture_is_on_the_tour() -> None:
    tour = TOUR.read_text(encoding="utf-8")
    files = {file.name for file in TOUR.parent.glob("*.py")} - {"__init__.py"}
    assert {name for name in files if f"]({name})" not in tour} == set()


def test_the_rooms_of_the_map_are_those_that_the_house_has() -> None:
    everything: set[str] = set()
    found = {}
    for cells in list(rows(section(MAP, "Rooms")))[1:]:
        [room] = code_spans(cells[0])
        found[room] = everything if cells[1] == "all rooms above" else set(code_spans(cells[1]))
        everything = everything | {room}
    assert found == ROOMS
    beside = section(MAP, "Rooms").split("Beside the rooms stand", 1)[1]
    assert BASE - {"__init__"} <= set(code_spans(beside))


def test_every_name_is_in_the_file_that_the_map_says() -> None:
    named = re.findall(
        r"`(\w+)`(?: or `\w+`)?(?: for [\w ]+)? (?:in|of) `([\w/]+\.py)`", MAP.read_text(encoding="utf-8")
    )
    assert len(named) > 20
    missing = [
        (name, file)
        for name, file in named
        if not re.search(rf"^ *(class |def )?{name}\b", (PACKAGE / file).read_text(encoding="utf-8"), re.M)
    ]
    assert missing == []


def families() -> set[str]:
    """The root of every family of variants in the package."""
    classes = [node for source in MODULES.values() for node in ast.walk(source.tree) if isinstance(node, ast.ClassDef)]
    return {node.name for node in classes if any(word.arg == "kind" for word in node.keywords)}


def test_the_map_says_of_every_family_of_variants_how_to_add_one() -> None:
    table = section(MAP, "To add an X, touch Y")
    derived = {name for cells in rows(table) for name in code_spans(cells[1])}
    assert families() - derived == set()


def test_the_map_shows_a_setting_as_it_stands_in_the_code() -> None:
    [block] = BLOCK.findall(section(MAP, "A setting"))
    assert block[1].strip() in (PACKAGE / "training/schedules.py").read_text(encoding="utf-8")


def test_the_map_knows_every_keyword_that_says_something_of_a_setting() -> None:
    calls = [node for source in MODULES.values() for node in ast.walk(source.tree) if isinstance(node, ast.Call)]
    declaring = [call for call in calls if getattr(call.func, "id", "") in ("setting", "size", "count", "Choice")]
    used = {word.arg for call in declaring for word in call.keywords if word.arg}
    known = {name for cells in rows(section(MAP, "A setting")) for name in code_spans(cells[0])}
    assert used
    assert used - known == set()
