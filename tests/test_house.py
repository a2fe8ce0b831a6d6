"""The rooms of the package: imports point one way, and the first output does not wait for what it does not need."""

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import minitransformer

PACKAGE = Path(minitransformer.__file__).parent
# Each room, and the rooms that it may import from; modules beside the rooms (errors, registry, files) serve all.
ROOMS = {
    "architecture": set(),
    "models": {"architecture"},
    "text": set(),
    "evaluation": set(),
    "training": {"architecture", "models", "text", "evaluation"},
    "generation": {"architecture", "models", "text"},
    "pretrained": {"architecture", "models", "text"},
    "reporting": set(),
    "diagnostics": {"architecture", "models", "text", "training"},
    "runs": {"models", "text", "training", "generation", "pretrained", "diagnostics"},
    "lab": {"architecture", "models", "text", "evaluation", "training", "runs", "diagnostics", "reporting"},
    "analysis": {
        *{"architecture", "models", "text", "evaluation", "training", "generation", "runs"},
        *{"diagnostics", "reporting", "lab"},
    },
    "benchmark": {"architecture", "models", "text", "training", "generation", "reporting"},
    "commands": {
        *{"architecture", "models", "text", "evaluation", "training", "generation", "pretrained", "runs"},
        *{"diagnostics", "reporting", "lab", "analysis", "benchmark"},
    },
}
SHARED = {"amounts", "errors", "processes", "records", "registry", "files", "settings", "toolchain"}


def imported_rooms(path: Path) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    modules = [node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    return {module.split(".")[1] for module in modules if module.startswith("minitransformer.")}


@pytest.mark.parametrize("room", ROOMS)
def test_imports_point_one_way(room: str) -> None:
    for path in (PACKAGE / room).rglob("*.py"):
        assert imported_rooms(path) <= ROOMS[room] | SHARED | {room}, path


def test_preparing_text_needs_no_torch() -> None:
    code = (
        "import sys, minitransformer.text.datasets.text, minitransformer.text.corpora; sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_licence_and_citation_say_what_the_metadata_says() -> None:
    root = PACKAGE.parent
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    citation = (root / "CITATION.cff").read_text(encoding="utf-8").splitlines()
    assert f"{project['license']} License" in (root / "LICENSE").read_text(encoding="utf-8")
    for name, key in (("title", "name"), ("version", "version"), ("license", "license")):
        assert f"{name}: {project[key]}" in citation
