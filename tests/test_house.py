"""The rooms of the package: imports point one way, names mean one thing, and files and functions are small."""

import subprocess
import sys
import tomllib
from collections import defaultdict
from functools import cache
from pathlib import Path

import pytest

import minitransformer
from tests.house_for_tests import Source, circles, function_lengths, imports_of, public_names, read_package

PACKAGE = Path(minitransformer.__file__).parent
MODULES = read_package(PACKAGE)
TESTS = {name: source for name, source in read_package(PACKAGE.parent / "tests").items() if source.path.suffix == ".py"}

BASE = {
    "__init__",
    "amounts",
    "errors",
    "files",
    "plugins",
    "processes",
    "records",
    "registry",
    "settings",
    "toolchain",
}
"""modules beside the rooms that serve all of them"""
MODEL = {"architecture", "models", "text"}
# Each room, and the rooms that it may import from besides BASE.
ROOMS = {
    "architecture": set(),
    "models": {"architecture"},
    "text": set(),
    "evaluation": set(),
    "training": {*MODEL, "evaluation"},
    "generation": {*MODEL},
    "pretrained": {*MODEL},
    "runs": {*MODEL, "evaluation", "training", "generation", "pretrained", "diagnostics"},
    "exporting": {*MODEL, "generation", "pretrained", "runs"},
    "reporting": set(),
    "diagnostics": {*MODEL, "training"},
    "tasks": {"runs"},
    "reliability": {*MODEL, "training", "runs"},
    "lab": {*MODEL, "evaluation", "training", "runs", "diagnostics", "reporting", "tasks"},
    "analysis": {*MODEL, "evaluation", "training", "generation", "runs", "diagnostics", "reporting", "tasks"},
    "benchmark": {*MODEL, "evaluation", "training", "generation", "reporting"},
    "compression": {*MODEL, "training", "generation", "pretrained", "runs", "diagnostics"},
    "preflight": {"models", "text", "training", "runs"},
    "serving": {*MODEL, "training", "generation", "runs"},
    "commands": {
        *{*MODEL, "evaluation", "training", "generation", "pretrained", "runs", "diagnostics", "reporting"},
        *{"tasks", "reliability", "lab", "analysis", "benchmark", "preflight", "compression", "serving", "exporting"},
    },
    "__main__": {"commands"},
}
# The modules beside the rooms, and those among them that each may import.
BESIDE = {
    **{name: set() for name in ("__init__", "amounts", "errors")},
    **{name: {"errors"} for name in ("files", "records", "toolchain")},
    "settings": {"errors", "records"},
    "registry": {"errors", "settings"},
    "plugins": {"errors", "records", "settings"},
    "processes": {"errors", "plugins"},
}
COMMAND = {"main", "Options", "Flags"}
"""what files of commands/ define: the command, and what may be given to it"""


def source_of(name: str, text: str, *, is_package: bool = False) -> Source:
    return Source(name, Path("__init__.py" if is_package else "file.py"), text)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("import p.a.b", {"p.a.b"}),
        ("import p.a.b as c, p.d", {"p.a.b", "p.d"}),
        ("from p.a import b", {"p.a.b"}),
        ("from p.a import b as c, thing", {"p.a.b", "p.a"}),
        ("from p.d import thing", {"p.d"}),
        ("from . import b", {"p.a.b"}),
        ("from .b import thing", {"p.a.b"}),
        ("from ..d import thing", {"p.d"}),
        ("from .. import d", {"p.d"}),
        ("if TYPE_CHECKING:\n    from p.d import Thing", {"p.d"}),
        ("def f():\n    from p.d import thing", {"p.d"}),
        ("class A:\n    def f(self):\n        import p.d", {"p.d"}),
        ('import_module("p.d")', {"p.d"}),
        ('importlib.import_module("p.a.b")', {"p.a.b"}),
        ("import_module(name)", set()),
        ("import os, torch.nn\nfrom pathlib import Path", set()),
    ],
)
def test_every_form_of_import_is_read(text: str, found: set[str]) -> None:
    modules = dict.fromkeys(("p", "p.a", "p.a.b", "p.a.here", "p.d"))
    assert imports_of(source_of("p.a.here", text), modules) == found


def test_a_relative_import_of_a_package_is_read_from_inside_it() -> None:
    assert imports_of(source_of("p.a", "from .b import thing", is_package=True), {"p.a": 0, "p.a.b": 0}) == {"p.a.b"}


def test_circles_are_found_and_what_only_leads_to_one_is_none() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b", "d"}, "d": set()}) == [["b", "c"]]
    assert circles({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


def test_the_lines_of_a_function_are_those_of_its_signature_its_docstring_and_its_body() -> None:
    assert function_lengths(source_of("p", "@d\ndef f(\n    x,\n):\n    '''Says.'''\n    return x\n"))["f"] == 5


@cache
def all_imports() -> dict[str, set[str]]:
    return {name: imports_of(source, MODULES) for name, source in MODULES.items()}


def arrows(room: str) -> dict[str, set[str]]:
    """The rooms that the modules of `room` import from, by module."""
    return {
        name: {MODULES[target].room for target in all_imports()[name]} - {room}
        for name, source in MODULES.items()
        if source.room == room
    }


@pytest.mark.parametrize("room", ROOMS)
def test_imports_point_one_way(room: str) -> None:
    assert {name: more for name, rooms in arrows(room).items() if (more := rooms - ROOMS[room] - BASE)} == {}


@pytest.mark.parametrize("module", BESIDE)
def test_what_serves_all_rooms_imports_none_of_them(module: str) -> None:
    assert set().union(*arrows(module).values()) <= BESIDE[module]


def test_every_room_has_its_row_and_the_rows_have_no_circle() -> None:
    assert {source.room for source in MODULES.values()} == ROOMS.keys() | BESIDE.keys()
    assert circles({**ROOMS, **BESIDE}) == []


def test_no_import_runs_in_a_circle() -> None:
    assert circles(all_imports()) == []


def test_nothing_is_imported_for_its_side_effect() -> None:
    lines = [(name, line) for name, source in MODULES.items() for line in source.text.splitlines()]
    assert [name for name, line in lines if "noqa: F401" in line and "import readline" not in line] == []


def paths(sources: dict[str, Source]) -> dict[str, Source]:
    return {str(source.path.relative_to(PACKAGE.parent)): source for source in sources.values()}


ALL = paths(MODULES) | paths(TESTS)


def test_no_file_has_more_than_400_lines() -> None:
    lengths = {path: len(source.text.splitlines()) for path, source in ALL.items()}
    assert {path: n for path, n in lengths.items() if n > 400} == {}


def test_no_function_has_more_than_40_lines() -> None:
    lengths = {
        f"{path}: {name}": lines for path, source in ALL.items() for name, lines in function_lengths(source).items()
    }
    assert {name: n for name, n in lengths.items() if n > 40} == {}


def test_a_name_means_one_thing() -> None:
    places = defaultdict(list)
    for name, source in MODULES.items():
        for public in public_names(source) - (COMMAND if source.room in ("commands", "__main__") else set()):
            places[public].append(name)
    assert {name: where for name, where in places.items() if len(where) > 1} == {}


def test_preparing_text_needs_no_torch() -> None:
    code = "import sys, minitransformer.text.datasets; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_licence_and_citation_say_what_the_metadata_says() -> None:
    root = PACKAGE.parent
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    citation = (root / "CITATION.cff").read_text(encoding="utf-8").splitlines()
    assert f"{project['license']} License" in (root / "LICENSE").read_text(encoding="utf-8")
    for name, key in (("title", "name"), ("version", "version"), ("license", "license")):
        assert f"{name}: {project[key]}" in citation
