"""Runs as models of the lm-evaluation-harness: its `hf` model gives the export of a run the same scores."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from minitransformer.commands import export
from minitransformer.errors import UserError
from tests.runs_for_tests import untrained_run

NAME = "minitransformer.runs.harness"
WORDS = ("the", "king", "and", "a", "queen", "of", "all", "that", "night", "sang", "so", "long", "to", "their", "dog")
EXPORTABLE = {"norm": "rms", "feedforward": "swiglu", "positions": "rotary", "num_layers": 2, "context_length": 96}


def test_the_harness_needs_lm_eval(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setitem(sys.modules, "lm_eval.api.model", None)
    monkeypatch.delitem(sys.modules, NAME, raising=False)
    with pytest.raises(UserError, match=r"needs lm_eval, .*: pip install 'minitransformer\[eval\]'"):
        __import__(NAME)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shake: Callable[[Any], Any]) -> Path:
    pytest.importorskip("lm_eval", reason="needs lm_eval, of the extra eval")
    for name in ("HF_DATASETS_OFFLINE", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    untrained_run(tmp_path / "run", shake, "causal", **EXPORTABLE)
    return tmp_path


def run_model(folder: Path, **choices: Any) -> Any:
    from minitransformer.runs.harness import RunModel

    return RunModel(folder / "run", **choices)


def asked(*arguments: Any) -> list[Any]:
    return [SimpleNamespace(args=each) for each in arguments]


def words(*places: int) -> str:
    return " ".join(WORDS[place % len(WORDS)] for place in places)


def tasks(folder: Path) -> list[dict[str, Any]]:
    """A task of each kind, with items in a file: choices with two examples, whole texts, and continuations."""
    rows = [
        {
            "question": words(i, i + 3),
            "choices": [words(i * j, 2 * i + j) for j in range(1, 2 + i % 3)] + [words(*range(i))],
            "label": i % 2,
            "text": words(*range(i, 4 * i)),
        }
        for i in range(3, 15)
    ]
    (folder / "items.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"data_files": {"test": str(folder / "items.jsonl")}}
    shared = {"dataset_path": "json", "dataset_kwargs": data, "test_split": "test", "fewshot_split": "test"}
    choices = {
        "doc_to_text": "{{question}}:",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{label}}",
        "num_fewshot": 2,
        "metric_list": [{"metric": name} for name in ("acc", "acc_norm", "acc_mutual_info")],
    }
    whole = {"doc_to_text": "", "doc_to_target": "{{text}}", "metric_list": [{"metric": "bits_per_byte"}]}
    written = {
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{text}}",
        "generation_kwargs": {"until": ["e"], "max_gen_toks": 6},
        "metric_list": [{"metric": "exact_match"}],
    }
    kinds = {"multiple_choice": choices, "loglikelihood_rolling": whole, "generate_until": written}
    return [{**shared, "task": kind, "output_type": kind, **about} for kind, about in kinds.items()]


def answers(folder: Path, model: Any) -> dict[str, list[Any]]:
    from lm_eval import simple_evaluate

    samples = simple_evaluate(model=model, tasks=tasks(folder), bootstrap_iters=0)["samples"]
    return {task: [answer for item in items for [answer] in item["resps"]] for task, items in samples.items()}


@pytest.mark.slow
def test_every_item_has_the_score_that_the_hf_model_gives_the_export(folder: Path) -> None:
    pytest.importorskip("accelerate", reason="the hf model of lm_eval needs accelerate")
    from lm_eval.models.huggingface import HFLM

    assert export.main([str(folder / "run"), "--to", str(folder / "export")]) == 0
    ours = answers(folder, run_model(folder))
    theirs = answers(folder, HFLM(pretrained=str(folder / "export"), batch_size=4, device="cpu", dtype="float32"))
    assert len(ours["multiple_choice"]) > 60
    for (nats, is_greedy), (their_nats, their_is_greedy) in zip(
        ours["multiple_choice"], theirs["multiple_choice"], strict=True
    ):
        assert nats == pytest.approx(their_nats, abs=2e-3, rel=1e-5)
        assert is_greedy == their_is_greedy
    assert ours["loglikelihood_rolling"] == pytest.approx(theirs["loglikelihood_rolling"], abs=2e-3, rel=1e-5)
    assert ours["generate_until"] == theirs["generate_until"]


def test_a_text_longer_than_the_context_loses_its_beginning(folder: Path) -> None:
    model = run_model(folder)
    most = model.max_length
    kept, cut = model.loglikelihood(asked(("x" * (most - 1), "yz"), ("a" * 50 + "x" * (most - 1), "yz")))
    assert kept == cut
    with pytest.raises(UserError, match=f"has {most + 1} tokens, and the model scores 1 to {most}"):
        model.loglikelihood(asked(("x", "y" * (most + 1))))


def test_a_text_in_windows_is_the_sum_of_its_windows(folder: Path) -> None:
    model = run_model(folder)
    text = words(*range(40))
    assert len(text) > model.max_length
    windows = [(text[: model.max_length],), (text[model.max_length :],)]
    first, _ = model.loglikelihood_rolling(asked(*windows))
    [(rest, _)] = model.loglikelihood(asked((text[: model.max_length], text[model.max_length :])))
    assert model.loglikelihood_rolling(asked((text,))) == [pytest.approx(first + rest)]


def test_a_generated_text_ends_before_a_stop_string_whatever_the_batch_size(folder: Path) -> None:
    requests = asked(*((words(i), {"until": [" "], "max_gen_toks": 8 - i % 2}) for i in range(5)))
    one, all_at_once = (run_model(folder, batch_size=size).generate_until(requests) for size in (1, "5"))
    assert one == all_at_once
    assert not any(" " in text for text in one)
    with pytest.raises(UserError, match="96 tokens are to be generated, and the model sees 96"):
        run_model(folder).generate_until(asked(("a", {"until": [], "max_gen_toks": 96})))
