"""`python -m pytest --plugin FILE`: the laws over every registered variant run over those of the file too."""

from pathlib import Path

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--plugin", action="append", default=[], metavar="FILE", help="run the laws over its variants too")


def pytest_collection(session: pytest.Session) -> None:
    """After `conftest.py`, which has to see every import of the package, and before a test file reads a registry."""
    from minitransformer.plugins import load_plugin

    for path in session.config.getoption("--plugin"):
        load_plugin(Path(path))
