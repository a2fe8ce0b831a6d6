"""Folders of sentence-transformers: what they say of embeddings is read, and what is not supported is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from minitransformer.errors import UserError
from minitransformer.pretrained.sentences import SentenceSettings, module_kinds, sentence_settings

TYPES = [f"sentence_transformers.models.{kind}" for kind in ("Transformer", "Pooling", "Normalize")]


def folder_of(tmp_path: Path, pooling: dict[str, Any], *, modules: Any = None, **files: Any) -> Path:
    """A folder without weights: `files` are the other configurations, by their names without the ending."""
    places = ["", "1_Pooling", "2_Normalize"]
    usual = [{"type": kind, "path": place} for kind, place in zip(TYPES, places, strict=True)]
    contents = {"modules": usual if modules is None else modules, "1_Pooling/config": pooling, **files}
    for name, content in contents.items():
        path = tmp_path / f"{name}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(content))
    return tmp_path


@pytest.mark.parametrize(
    ("pooling", "name"),
    [
        ({"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False}, "mean"),
        ({"pooling_mode_mean_tokens": False, "pooling_mode_cls_token": True}, "first"),
        ({"pooling_mode_mean_tokens": False, "pooling_mode_lasttoken": True}, "last"),
        ({"pooling_mode": "lasttoken"}, "last"),
        ({"pooling_mode": "cls"}, "first"),
        ({"pooling_mode": ["mean", "cls"]}, "mean+first"),
        ({}, "mean"),
        ({"pooling_mode_cls_token": True}, "first+mean"),  # as the library reads it: its mean is on unless turned off
        ({"pooling_mode_mean_tokens": False, "pooling_mode_max_tokens": True}, "max_tokens"),
    ],
)
def test_a_pooling_has_its_name_in_either_spelling(pooling: dict[str, Any], name: str, tmp_path: Path) -> None:
    settings = sentence_settings(folder_of(tmp_path, pooling))
    assert settings is not None
    assert sorted(settings.pooling.split("+")) == sorted(name.split("+"))


def test_everything_that_a_folder_says_is_read(tmp_path: Path) -> None:
    folder = folder_of(
        tmp_path,
        {"pooling_mode": "mean", "include_prompt": False},
        sentence_bert_config={"max_seq_length": 128, "do_lower_case": True},
        config_sentence_transformers={"prompts": {"query": "query: "}, "default_prompt_name": "query"},
    )
    assert sentence_settings(folder) == SentenceSettings("mean", True, 128, True, "query: ", pools_prompt=False)


def test_what_a_folder_does_not_say_has_a_default(tmp_path: Path) -> None:
    modules = [{"type": kind, "path": place} for kind, place in zip(TYPES, ["", "1_Pooling"], strict=False)]
    folder = folder_of(tmp_path, {"pooling_mode": "cls"}, modules=modules)
    assert sentence_settings(folder) == SentenceSettings("first", normalised=False)


@pytest.mark.parametrize(
    ("texts", "tokenizer", "most"),
    [
        ({"max_seq_length": 128}, {"model_max_length": 512}, 128),
        ({}, {"model_max_length": 256}, 256),
        ({"max_seq_length": None}, {"model_max_length": int(1e30)}, None),  # as the library writes that there is none
        ({}, {}, None),
    ],
)
def test_the_longest_text_is_where_older_and_newer_versions_of_the_library_keep_it(
    texts: dict[str, Any], tokenizer: dict[str, Any], most: int | None, tmp_path: Path
) -> None:
    settings = sentence_settings(folder_of(tmp_path, {}, sentence_bert_config=texts, tokenizer_config=tokenizer))
    assert settings is not None
    assert settings.most_tokens == most


def test_another_folder_says_nothing(tmp_path: Path) -> None:
    assert sentence_settings(tmp_path) is None
    assert module_kinds(tmp_path) == []


@pytest.mark.parametrize(
    ("modules", "words"),
    [
        ([{"type": f"m.{kind}", "path": str(i)} for i, kind in enumerate(("Transformer", "Pooling"))], "'0'"),
        ([{"type": "m.Transformer", "path": ""}], "supported are Transformer, Pooling in '1_Pooling'"),
        (
            [{"type": f"m.{kind}", "path": ""} for kind in ("Transformer", "Pooling", "Dense")],
            "has the modules Transformer, Pooling, Dense",
        ),
        ({}, "modules Transformer"),
        ([1], "is damaged"),
        ([{"type": 1, "path": ""}], "is damaged"),
        ([{"type": "m.Transformer"}], "is damaged"),
    ],
)
def test_modules_that_are_not_supported_are_named(modules: Any, words: str, tmp_path: Path) -> None:
    folder = folder_of(tmp_path, {}, modules=modules)
    with pytest.raises(UserError) as caught:
        sentence_settings(folder)
    assert "modules.json" in str(caught.value)
    assert words in str(caught.value) or modules == {}


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("sentence_bert_config", {"max_seq_length": "long"}, "most_tokens 'long'"),
        ("config_sentence_transformers", {"prompts": [], "default_prompt_name": "x"}, "prompts []"),
        ("1_Pooling/config", {"include_prompt": 3}, "pools_prompt 3"),
    ],
)
def test_a_value_of_another_type_is_named(name: str, content: Any, words: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        sentence_settings(folder_of(tmp_path, **{"pooling": {}, name: content}))
    assert words in str(caught.value)
