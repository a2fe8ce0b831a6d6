"""Recipes: each makes the same documents every time, once, whole or not at all."""

from __future__ import annotations

import ast
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from minitransformer.errors import UserError
from minitransformer.text import folders, recipes, stdlib
from minitransformer.text.corpora import open_corpus

ROOT = Path(__file__).resolve().parents[1]
SHAKESPEARE = ROOT.parent / "shared" / "data" / "tinyshakespeare.txt"
needs_shakespeare = pytest.mark.skipif(not SHAKESPEARE.exists(), reason="needs tinyshakespeare.txt of shared/data")


@pytest.fixture(autouse=True)
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MINITRANSFORMER_DATA", str(tmp_path / "work"))
    monkeypatch.delenv("MINITRANSFORMER_SHAKESPEARE", raising=False)
    return tmp_path / "work"


def texts(path: Path) -> list[str]:
    return [json.loads(line)["text"] for line in path.read_bytes().split(b"\n")[:-1]]


def test_every_file_of_the_folder_is_a_recipe_named_with_dashes() -> None:
    assert {"pydocs", "shakespeare", "stdlib-code"} <= set(recipes.known())
    for recipe in map(recipes.load_recipe, recipes.known()):
        assert len(recipe.DESCRIPTION) < 80
        assert "\n" not in recipe.DESCRIPTION
        assert recipe.version() == recipe.version()


def test_an_unknown_recipe_gets_the_nearest_name() -> None:
    with pytest.raises(UserError, match="did you mean 'stdlib-code'"):
        recipes.load_recipe("stdlib_code")


@pytest.fixture(scope="module")
def pydocs() -> list[str]:
    return list(recipes.load_recipe("pydocs").documents())


def test_pydocs_are_the_same_in_another_process(pydocs: list[str]) -> None:
    code = (
        "import hashlib; from minitransformer.text import recipes\n"
        "print(hashlib.sha256(repr(list(recipes.load_recipe('pydocs').documents())).encode()).hexdigest())"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONHASHSEED": "7"}
    answer = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == hashlib.sha256(repr(pydocs).encode()).hexdigest()


def test_pydocs_are_about_two_megabytes_that_read_like_documentation(pydocs: list[str]) -> None:
    assert 1.5e6 < sum(map(len, pydocs)) < 5e6
    assert len(set(pydocs)) == len(pydocs) > 300
    assert not [text for text in pydocs if sys.base_prefix in text and sys.base_prefix != "/usr"]
    (json_page,) = (text for text in pydocs if text.startswith("json\n"))
    assert "\n\njson.dumps(obj, *, skipkeys=False, " in json_page
    assert "\n    Serialize ``obj`` to a JSON formatted ``str``." in json_page
    assert any(text.startswith('The "for" statement\n***') for text in pydocs)


def test_what_belongs_to_one_machine_or_to_the_tests_stays_out() -> None:
    names = [name for name, _ in stdlib.modules()]
    assert names == sorted(names)
    assert {"json", "json.decoder", "asyncio.tasks"} <= set(names)
    assert not [name for name in names if {"test", "tests", "site-packages"} & set(name.split("."))]
    assert not [name for name in names if "sysconfigdata" in name]


def test_stdlib_code_is_one_document_a_file() -> None:
    documents = list(recipes.load_recipe("stdlib-code").documents())
    assert len(documents) > 300
    assert sum("def dumps(obj, *, skipkeys=False" in text for text in documents) == 1


@pytest.fixture
def own_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with one recipe, whose documents are counted in `made.txt`."""
    folder = tmp_path / "recipes"
    folder.mkdir()
    (folder / "two_words.py").write_text(
        "from pathlib import Path\n"
        "DESCRIPTION = 'two words'\n"
        "def version():\n    return '1'\n"
        "def documents():\n"
        "    for word in ('one', 'two'):\n"
        "        with (Path(__file__).parent / 'made.txt').open('a') as file:\n"
        "            file.write(word)\n"
        "        yield word + '\\n'\n"
    )
    monkeypatch.setattr(recipes, "recipe_folder", lambda: folder)
    return folder


def test_a_recipe_is_made_once(own_recipe: Path, work: Path) -> None:
    assert [piece.text for piece in open_corpus("two-words").pieces()] == ["one\n", "two\n"]
    assert open_corpus("two-words").files == open_corpus("two-words").files
    assert (own_recipe / "made.txt").read_text() == "onetwo"
    assert [path.suffix for path in (work / "two-words").iterdir() if path.suffix != ".lock"] == [".jsonl"]


def test_a_changed_recipe_is_made_again(own_recipe: Path) -> None:
    first = recipes.make("two-words")
    source = own_recipe / "two_words.py"
    source.write_text(source.read_text().replace("'two')", "'three')"))
    assert texts(recipes.make("two-words")) == ["one\n", "three\n"]
    assert texts(first) == ["one\n", "two\n"]


def test_a_recipe_that_fails_half_way_leaves_nothing(own_recipe: Path, work: Path) -> None:
    source = own_recipe / "two_words.py"
    source.write_text(source.read_text().replace("yield", "assert word == 'one'\n        yield"))
    with pytest.raises(AssertionError):
        recipes.make("two-words")
    assert [path.suffix for path in (work / "two-words").iterdir()] == [".lock"]


def test_what_a_killed_recipe_left_is_removed(own_recipe: Path, work: Path) -> None:
    target = recipes.made_at("two-words", recipes.load_recipe("two-words"))
    target.parent.mkdir(parents=True)
    (target.parent / f".{target.name}-x.partial").write_text("{")
    assert texts(recipes.make("two-words")) == ["one\n", "two\n"]
    assert not list(target.parent.glob("*.partial"))


def test_a_recipe_without_documents_is_a_mistake(own_recipe: Path) -> None:
    (own_recipe / "two_words.py").write_text(
        "DESCRIPTION = 'none'\ndef version():\n    return ''\ndef documents():\n    return iter(())\n"
    )
    with pytest.raises(UserError, match="found no documents"):
        recipes.make("two-words")


@needs_shakespeare
@pytest.mark.parametrize("place", ["named", "work folder"])
def test_shakespeare_is_read_from_a_local_copy(work: Path, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    if place == "named":
        monkeypatch.setenv("MINITRANSFORMER_SHAKESPEARE", str(SHAKESPEARE))
    else:
        (work / "shakespeare").mkdir(parents=True)
        shutil.copy(SHAKESPEARE, work / "shakespeare" / "input.txt")
    assert texts(recipes.make("shakespeare")) == [SHAKESPEARE.read_text()]


def test_another_text_is_not_taken_for_shakespeare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "input.txt").write_text("to be or to be")
    monkeypatch.setenv("MINITRANSFORMER_SHAKESPEARE", str(tmp_path / "input.txt"))
    with pytest.raises(UserError, match="is not Tiny Shakespeare"):
        recipes.make("shakespeare")


def test_shakespeare_without_network_says_how_to_supply_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_network(*_: Any, **__: Any) -> Iterator[bytes]:
        raise OSError("no network")

    monkeypatch.setattr("urllib.request.urlopen", no_network)
    with pytest.raises(UserError, match=r"no network.*save it as .*input\.txt.*MINITRANSFORMER_SHAKESPEARE"):
        recipes.make("shakespeare")


def test_the_work_folder_is_the_checkouts_if_it_may_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert folders.work_folder() == tmp_path / "work"
    monkeypatch.delenv("MINITRANSFORMER_DATA")
    assert folders.work_folder() == ROOT / "data"
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert folders.work_folder() == Path.home() / ".cache" / "minitransformer"


def test_an_installed_package_has_its_recipes_inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folders, "PACKAGE", tmp_path / "minitransformer")
    shutil.copytree(ROOT / "data", tmp_path / "minitransformer" / "recipes", ignore=lambda _, names: [
        name for name in names if not name.endswith(".py")
    ])  # fmt: skip
    monkeypatch.delenv("MINITRANSFORMER_DATA")
    assert set(recipes.known()) >= {"pydocs", "stdlib-code"}
    assert folders.work_folder() == Path.home() / ".cache" / "minitransformer"


MODULE = b"""
class Reader(Base, Other):
    def read(self, size=-1, *, mode="r"):
        if size:
            raise ValueError("no")
        raise error
    def _hidden(self, a): ...
def load(path):
    def inner():
        raise KeyError
    raise os.Error
"""


def test_questions_about_a_module_have_the_answers_that_stand_in_it() -> None:
    recipe: Any = recipes.load_recipe("docs-qa")
    assert dict(recipe.questions("m", MODULE)) == {
        "What is m.Reader derived from?": "Base, Other",
        "What are the parameters of m.Reader.read?": "size=-1, *, mode='r'",
        "What is the default of size in m.Reader.read?": "-1",
        "What is the default of mode in m.Reader.read?": "'r'",
        "What does m.Reader.read raise?": "ValueError",
        "What are the parameters of m.load?": "path",
        "What does m.load raise?": "os.Error",
    }
    assert not list(recipe.questions("m._private", MODULE))


def test_docs_qa_names_the_package_of_each_question_so_that_none_is_in_both_splits() -> None:
    rows = [json.loads(line) for line in recipes.make("docs-qa").read_bytes().splitlines()]
    assert len({row["prompt"] for row in rows}) == len(rows) > 5000
    dumps = next(row for row in rows if row["prompt"] == "What is the default of indent in json.dumps?")
    assert dumps == {"prompt": dumps["prompt"], "completion": "None", "group": "json"}


def test_tasks_about_source_have_the_answers_that_stand_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe: Any = recipes.load_recipe("docs-tasks")
    text = "The rest says more, " * 5
    source = f'''def f(x):\n    """Reads x.\n\n    {text}\n    """\n    if x: raise KeyError\n    raise OSError\n'''
    raised = recipes.load_recipe("docs-qa").raised  # type: ignore[attr-defined]
    [(task, asked, answer)] = [
        each for node in ast.walk(stdlib.syntax_tree(source.encode())) for each in recipe.summaries(node)
    ]
    assert (task, asked, answer) == ("Summarise:", text.strip(), "Reads x.")
    [found] = [
        each for node in ast.walk(stdlib.syntax_tree(source.encode())) for each in recipe.exceptions(node, raised)
    ]
    assert found[2] == "KeyError, OSError"
    some = [(name, path) for name, path in stdlib.modules() if name.startswith(("json", "logging"))]
    monkeypatch.setattr(stdlib, "modules", lambda: iter(some))
    rows = list(recipe.documents())
    begins = ("Summarise: ", "Which exceptions are raised here? ", "What ")
    assert {next(each for each in begins if row["prompt"].startswith(each)) for row in rows} == set(begins)
    assert all(row["completion"] and row["group"] for row in rows)
