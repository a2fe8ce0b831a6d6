"""Made better by use: data from feedback, drift of what users send, and runs that are promoted if they are better."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minitransformer.commands import drift, feedback, promote, train
from minitransformer.errors import StorageError
from minitransformer.evaluation.drift import RANGES, TextLosses, drift_between
from minitransformer.runs import Run
from minitransformer.runs.drifting import losses_of, sent_texts, validation_texts
from minitransformer.runs.evaluating import HeldOutData
from minitransformer.runs.feedback import CORRECTED, CUT, EMPTY, LIKED, NO_CORRECTION, REPEATED, examples_of
from minitransformer.runs.promoting import SERVED, served_checkpoint
from minitransformer.runs.served import ServedAnswer, read_answers
from minitransformer.text.conversations import open_conversations
from tests.runs_for_tests import refused

pytestmark = pytest.mark.unchecked_shapes
TINY = ["--d-model", "16", "--num-layers", "1", "--num-heads", "2", "--context-length", "96", "--tokenizer", "bytes"]
QUICK = [*TINY, "--device", "cpu", "--precision", "fp32"]
TALKS = [{"prompt": f"{i} and {i % 3}?" + " please" * (i % 4), "completion": str(i + i % 3)} for i in range(150)]


def jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def served(id: str, **row: Any) -> dict[str, Any]:
    return {"id": id, "index": 0, "model": "chat", "answer": "so", "finish_reason": "stop", **row}


def asked(question: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}]}


@pytest.fixture(scope="module")
def talker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that has learned conversations for a few steps."""
    folder = tmp_path_factory.mktemp("talker")
    data = jsonl(folder / "talks.jsonl", TALKS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MINITRANSFORMER_DATA", str(folder / "work"))
        chosen = ["gpt-nano", "--objective", "instruct", "--data", str(data), "--validation-fraction", "0.5"]
        assert train.main([*chosen, *QUICK, "--steps", "20", "--lr", "0.01", "--out", str(folder / "run")]) == 0
        yield folder / "run"


def test_feedback_becomes_examples_and_what_says_nothing_is_left_out_and_counted(
    talker: Path, tmp_path: Path, capsys: Any
) -> None:
    rows = [
        served("a", **asked("one?"), rating="up"),
        served("b", prompt="two", rating="down", correction="better"),
        served("c", prompt="three", rating="down"),
        served("d", prompt="four", rating="up", finish_reason="length"),
        served("d", prompt="four", index=1, rating="up", finish_reason="stopped"),
        served("e", prompt="five", rating="up"),
        served("e", prompt="five", rating="down"),  # changed their mind
        served("f", prompt="six", correction="  "),
        served("g", prompt="two", correction="better"),
    ]
    found = examples_of(read_answers(jsonl(tmp_path / "rows.jsonl", rows)))
    assert found.used == {LIKED: 1, CORRECTED: 1}
    assert found.left_out == {NO_CORRECTION: 2, CUT: 2, EMPTY: 1, REPEATED: 1}
    jsonl(talker / "feedback.jsonl", rows)
    capsys.readouterr()
    assert feedback.main([str(talker), "--to", str(tmp_path / "data.jsonl")]) == 0
    assert f"left out   2 {NO_CORRECTION}" in capsys.readouterr().out
    conversations = list(open_conversations(str(tmp_path / "data.jsonl")).pairs())
    assert [each.contents for each in conversations] == [("one?", "so"), ("two", "better")]


@settings(max_examples=10)
@given(st.lists(st.tuples(st.sampled_from("abcdefgh"), st.text(max_size=3)), max_size=20), st.floats(0.1, 0.9))
def test_what_is_held_out_once_is_held_out_in_later_data(pairs: list[tuple[str, str]], fraction: float) -> None:
    answers = [
        ServedAnswer(str(number), 0, "chat", "so", "stop", prompt, (), correction=f"{answer}.")
        for number, (prompt, answer) in enumerate(pairs)
    ]
    early, late = (examples_of(some, fraction) for some in (answers[: len(answers) // 2], answers))
    for side in ("training", "held_out"):
        assert [row for row in getattr(late, side) if row in getattr(early, side)] == getattr(early, side)
    assert not {row["prompt"] for row in late.training} & {row["prompt"] for row in late.held_out}


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"id": "a"}, "it needs an id, an answer"),
        (served("a"), "must have a prompt, which is a text, or messages"),
        (served("a", prompt="x", messages=[{"role": "user", "content": "x"}]), "and not both"),
        (served("a", messages=[{"role": "user"}]), "no list of objects with a role and a content"),
        (served("a", prompt="x", rating="so-so"), "has rating 'so-so': it must be up or down"),
        (served("a", prompt="x", index=True), "has index True, which must be a whole number"),
        ([], "is no row of a server's log"),
        (served("a", prompt="x", rating="down"), "says what to answer"),
    ],
)
def test_feedback_that_cannot_be_used_is_answered_in_one_sentence(
    talker: Path, tmp_path: Path, capsys: Any, row: Any, said: str
) -> None:
    jsonl(talker / "feedback.jsonl", [row])
    assert said in refused(capsys, str(talker), "--to", str(tmp_path / "data.jsonl"), main=feedback.main)
    assert not (tmp_path / "data.jsonl").exists()


def test_mistakes_about_where_feedback_goes_are_sentences(talker: Path, run: Path, capsys: Any) -> None:
    def told(*flags: str, of: Path = talker) -> str:
        return refused(capsys, str(of), *flags, main=feedback.main)

    assert "has no feedback.jsonl: serve it" in told("--to", "data.jsonl", of=run)
    assert "data.jsonl is named twice: choose another --test" in told("--to", "data.jsonl", "--test", "data.jsonl")
    assert "choose another --test" in told("--to", "data.jsonl", "--test", "data.txt")
    assert "must be above 0 and below 1" in told("--to", "data.jsonl", "--fraction", "1")
    jsonl(talker / "feedback.jsonl", [served("a", prompt="x", rating="up")])
    assert "there is no example for" in told("--to", "data.jsonl", "--test", "test.jsonl")
    jsonl(Path("data.jsonl"), [])
    assert "already exists" in told("--to", "data.jsonl")


def validation_log(run: Run, path: Path, change: Any = lambda question: question) -> Path:
    """What is asked in the validation split of `run`, as requests to a server."""
    data = HeldOutData.of_run(run)
    questions = [TALKS[row]["prompt"] for row in data.rows()[1]]
    return jsonl(path, [served(str(number), **asked(change(each))) for number, each in enumerate(questions)])


def test_requests_like_the_validation_data_show_no_drift_and_others_do(talker: Path, tmp_path: Path) -> None:
    run = Run.open(talker)
    found = {}
    for name, change in (("same", lambda text: text), ("other", lambda text: text.upper()[::-1] * 3)):
        log, out = validation_log(run, tmp_path / f"{name}.jsonl", change), tmp_path / f"{name}.json"
        assert drift.main([str(talker), "--log", str(log), "--json", str(out)]) == 0
        found[name] = json.loads(out.read_text())
    assert found["same"]["loss"]["difference"]["value"] == pytest.approx(0, abs=1e-6)
    assert found["same"]["length"]["difference"]["value"] == 0
    assert found["same"]["verdict"].startswith("No difference")
    assert found["other"]["loss"]["difference"]["interval"][0] > 0
    assert found["other"]["verdict"].startswith("What users send is harder")
    assert "and it is longer" in found["other"]["verdict"]


def test_of_a_conversation_the_last_message_is_measured_and_of_a_request_one_row(talker: Path, tmp_path: Path) -> None:
    run = Run.open(talker)
    messages = [{"role": role, "content": text} for role, text in (("user", "1?"), ("assistant", "2"), ("user", "3?"))]
    rows = [served("a", index=index, messages=messages, answer=str(index)) for index in range(3)]
    [text] = sent_texts(run, jsonl(tmp_path / "log.jsonl", rows), 9, None)
    assert run.tokenizer.decode(list(text.ids[text.first :])).strip() == "user\n3?\nassistant"
    model: Any = run.load_model()
    nats = losses_of(model, [text], "texts").nats.sum()
    log_p = model(torch.tensor([text.ids[:-1]])).log_softmax(-1)[0].detach()
    by_hand = -sum(float(log_p[place - 1, text.ids[place]]) for place in range(text.first, len(text.ids)))
    assert nats == pytest.approx(by_hand, rel=1e-5)


@settings(max_examples=5)
@given(st.integers(1, 30), st.integers(0, 3))
def test_a_shorter_text_is_compared_at_its_positions_alone(length: int, seed: int) -> None:
    by_range = np.random.default_rng(seed).random(len(RANGES)) + 1
    by_position = by_range[np.searchsorted(RANGES, np.arange(1, 61), side="right") - 1]
    long = TextLosses.of_texts([(1, by_position.tolist())] * 40, [61] * 40)
    short = TextLosses.of_texts([(1, by_position[:length].tolist())] * 5, [length + 1] * 5)
    found = drift_between(short, long)
    assert found is not None
    used, usual, difference = found.loss
    assert used.value == pytest.approx(usual.value) == pytest.approx(by_position[:length].mean())
    assert difference.value == pytest.approx(0, abs=1e-9)
    assert drift_between(long, replace(short, targets=short.targets * 0)) is None


def test_windows_of_text_are_compared_with_prompts(run: Path, capsys: Any) -> None:
    log = jsonl(run / "log.jsonl", [served(str(i), prompt="the quick brown fox"[: 3 + i]) for i in range(9)])
    assert drift.main([str(run), "--log", str(log), "--html", "drift.html"]) == 0
    told = capsys.readouterr().out
    assert "no lengths to compare" in told
    assert "fewer than 30 texts" in told
    assert "Loss by position" in Path("drift.html").read_text()
    windows = validation_texts(HeldOutData.of_run(Run.open(run)), 10**6)
    assert sum(len(each.ids) - 1 for each in windows) == len(Run.open(run).config.prepare().targets("validation")) - 1


def test_mistakes_about_a_log_are_sentences(talker: Path, run: Path, capsys: Any) -> None:
    def told(rows: list[Any], *flags: str, of: Path = talker) -> str:
        return refused(capsys, str(of), "--log", str(jsonl(run / "bad.jsonl", rows)), *flags, main=drift.main)

    two = [served("a", prompt="x y"), served("b", prompt="x y", model="other")]
    assert "has requests to chat, other: name one with --model" in told(two)
    assert "has no request to third, only to chat, other" in told(two, "--model", "third")
    assert "has no request" in told([])
    assert "has a token to predict" in told([served("a", prompt="")])
    assert "has not learned" in told([served("a", **asked("x"))], of=run)
    assert "is no file" in refused(capsys, str(run), "--log", "none.jsonl", main=drift.main)


def test_a_better_run_is_promoted_a_worse_one_is_not_and_one_command_goes_back(
    talker: Path, tmp_path: Path, capsys: Any
) -> None:
    data = ["--data", str(jsonl(tmp_path / "test.jsonl", TALKS[::2]))]
    over = ["--over", str(talker)]
    better = tmp_path / "better"
    more = ["--init-from", str(talker), "--data", str(talker.parent / "talks.jsonl"), "--steps", "40", "--lr", "0.01"]
    assert train.main([*more, "--device", "cpu", "--precision", "fp32", "--out", str(better)]) == 0
    assert promote.main([str(talker), "--over", str(better), *data]) == 1
    assert not (better / SERVED).exists()
    assert promote.main([str(better), *over, *data, "--json", str(tmp_path / "found.json")]) == 0
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["promoted"]
    assert found["difference"]["interval"][1] < 0
    assert served_checkpoint(talker)[0].resolve() == better.resolve()
    assert "is served already" in refused(capsys, str(better), *over, *data, main=promote.main)
    assert promote.main([str(talker), *over, *data]) == 1, "the run that it has replaced"
    assert promote.main(["--back", *over]) == 0
    assert served_checkpoint(talker) == (talker, None)
    assert "nothing was promoted" in refused(capsys, "--back", *over, main=promote.main)
    (talker / SERVED).write_text('{"promotions": [{"run": 1}]}')
    with pytest.raises(StorageError, match="damaged record of a promotion"):
        served_checkpoint(talker)
    (talker / SERVED).unlink()


def test_mistakes_about_a_promotion_are_sentences(talker: Path, run: Path, capsys: Any) -> None:
    data = ["--data", str(talker.parent / "talks.jsonl")]

    def told(*arguments: str) -> str:
        return refused(capsys, *arguments, main=promote.main)

    assert "name it with --over" in told(str(run), *data)
    assert "name it with --data" in told(str(run), "--over", str(talker))
    assert "give it with --over alone" in told("--back", "--over", str(talker), *data)
    assert "leave --metric and --device out" in told("--back", "--over", str(talker), "--metric", "accuracy")
    assert "there is no run to promote" in told("--over", str(talker), *data)
    assert "has learned no conversations" in told(str(run), "--over", str(talker), *data)
