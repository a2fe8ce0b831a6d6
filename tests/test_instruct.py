"""Instruction data: four shapes, loss on answers alone, packing that changes no logit, its mistakes, and resuming."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minitransformer.commands import doctor, evaluate, export, sample, train, verify_resume
from minitransformer.errors import UserError
from minitransformer.evaluation.answers import answer_items, token_f1
from minitransformer.evaluation.estimates import estimates_of
from minitransformer.models.model import Model, build_model
from minitransformer.runs import Run
from minitransformer.runs.answering import questions_of
from minitransformer.runs.evaluating import HeldOutData
from minitransformer.text.batches import IGNORE
from minitransformer.text.chat_template import ChatTemplate, Message
from minitransformer.text.conversations import open_conversations
from minitransformer.text.datasets.conversation_preparation import PreparedConversations
from minitransformer.text.packing import PackedBatch, packed_rows
from minitransformer.training.config import RunConfig, with_vocabulary
from minitransformer.training.loader import Loader
from minitransformer.training.objectives import Score
from tests.runs_for_tests import configured

TINY = ["--d-model", "16", "--num-layers", "1", "--num-heads", "2", "--context-length", "128", "--tokenizer", "bytes"]
ROWS: list[dict[str, Any]] = [
    {"prompt": f"{i} and {i % 3}?" + " please" * (i % 4), "completion": str(i + i % 3)} for i in range(40)
]
TALK = [
    {"role": "system", "content": "Add."},
    {"role": "user", "content": "1 and 2?"},
    {"role": "assistant", "content": "3"},
    {"role": "user", "content": "and 4?"},
    {"role": "assistant", "content": "7"},
]


@pytest.fixture(autouse=True)
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MINITRANSFORMER_DATA", str(tmp_path / "work"))
    return tmp_path


def jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def config_of(data: Path, **choices: Any) -> RunConfig:
    start = {"objective": "instruct", "vocab_size": None, "context_length": 128, "validation_fraction": 0.0}
    return configured(**{**start, "data": str(data), **choices})


def prepared_of(data: Path, **choices: Any) -> PreparedConversations:
    prepared = config_of(data, **choices).prepare()
    assert isinstance(prepared, PreparedConversations)
    return prepared


def first_batch(data: Path, **choices: Any) -> tuple[Loader, PackedBatch]:
    config = config_of(data, **choices)
    loader = Loader.of_run(config, config.prepare())
    [batch, *_] = loader.training_batches(0)
    assert isinstance(batch, PackedBatch)
    return loader, batch


def learned(data: Path, **choices: Any) -> list[str]:
    """The text of the targets of each conversation, with special tokens spelled out."""
    prepared = prepared_of(data, **choices)
    spans = zip(range(len(prepared.train)), strict=True)
    parts = [(prepared.train.sources[i], prepared.train.targets[i] == 1) for (i,) in spans]
    return [prepared.tokenizer.decode(ids[is_answer].tolist(), skip_special=False) for ids, is_answer in parts]


@pytest.mark.parametrize(
    ("row", "answers"),
    [
        ({"messages": TALK}, "3<|im_end|>7<|im_end|>"),
        ({"prompt": "1 and 2?", "completion": "3"}, "3<|im_end|>"),
        ({"source": "one", "target": "uno"}, "uno<|im_end|>"),
        ({"text": "All of it."}, "All of it.<|endoftext|>"),
        ({"prompt": "?", "completion": "say <|im_end|> twice"}, "say <|im_end|> twice<|im_end|>"),
    ],
)
def test_of_every_shape_the_answers_are_learned_with_the_token_that_ends_them(
    row: dict[str, Any], answers: str, tmp_path: Path
) -> None:
    assert learned(jsonl(tmp_path / "rows.jsonl", [row])) == [answers]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "?", "completion": " "}, "line 2 has no answer to learn from: give it one, or leave the row out"),
        ({"prompt": "?"}, "line 2 has no answer to learn from"),
        ({"messages": TALK[:2]}, "line 2 has no answer to learn from"),
        ({"messages": "hello"}, "line 2 has messages that are no list: give objects with a role and a content"),
        ({"messages": [{"role": "user"}]}, "messages of line 2 has no field 'content'"),
        ({"text": ""}, "line 2 has no answer to learn from"),
        ({"question": "?"}, "line 2 has 'question': give messages, a prompt and its completion, a source"),
        (["?"], "line 2 is not an object: give messages"),
        ({"prompt": 1, "completion": "2"}, "line 2 has a field 'prompt' that is not a string"),
    ],
)
def test_a_row_without_an_answer_is_refused_with_its_line(row: Any, message: str, tmp_path: Path) -> None:
    data = jsonl(tmp_path / "rows.jsonl", [ROWS[0], row])
    with pytest.raises(UserError, match=message):
        prepared_of(data)


def test_other_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("?")
    with pytest.raises(UserError, match=r"text.txt is no .jsonl, in which conversations are"):
        open_conversations(str(tmp_path))
    with pytest.raises(UserError, match=r"has no conversation: put a JSON object"):
        open_conversations(str(jsonl(tmp_path / "empty.jsonl", [])))


def shaken(config: RunConfig, prepared: PreparedConversations) -> Model:
    """A model whose weights are all far from those that leave a part without effect."""
    torch.manual_seed(1)
    model = build_model(with_vocabulary(config.model, prepared)).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


PARTS: list[dict[str, Any]] = [
    {},
    {"positions": "learned"},
    {"positions": "alibi"},
    {"positions": "t5"},
    {"attention_window": 5},
    {"token_smear": True},
    {"norm": "rms", "feedforward": "swiglu", "num_kv_heads": 1},
]


@pytest.mark.parametrize("choices", PARTS, ids=str)
def test_logits_of_packed_conversations_are_those_of_each_alone(choices: dict[str, Any], tmp_path: Path) -> None:
    data = jsonl(tmp_path / "rows.jsonl", ROWS)
    _, batch = first_batch(data, **choices)
    assert int(batch.documents.max()) > 1
    model: Any = shaken(config_of(data, **choices), prepared_of(data))
    together = model(batch.inputs, documents=batch.documents)
    for row, documents in enumerate(batch.documents):
        for number in range(1, int(documents.max()) + 1):
            alone = model(batch.inputs[row, documents == number][None])[0]
            torch.testing.assert_close(together[row, documents == number], alone, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("packing", [True, False])
def test_the_loss_is_the_sum_over_answers_by_hand(packing: bool, tmp_path: Path) -> None:
    data = jsonl(tmp_path / "rows.jsonl", [*ROWS[:7], {"messages": TALK}, {"text": "Sums."}])
    loader, _ = first_batch(data, packing=packing, batch_size=9 if not packing else 4)
    prepared: Any = loader.data
    model: Any = shaken(config_of(data, packing=packing), prepared)
    template, by_hand, seen = ChatTemplate.named("chatml"), 0.0, 0
    for conversation in open_conversations(str(data)).pairs():
        if conversation.messages:
            ids, is_answer = template.answer_spans(conversation.messages, prepared.tokenizer)
        else:
            end = prepared.tokenizer.end_of_text
            ids = [end, *prepared.tokenizer.encode(conversation.text), end]
            is_answer = [False, *[True] * (len(ids) - 1)]
        log_p = model(torch.tensor([ids]))[0].log_softmax(-1).detach()
        places = [place for place, learns in enumerate(is_answer) if learns]
        by_hand -= sum(float(log_p[place - 1, ids[place]]) for place in places)
        seen += len(places)
    batches = list(prepared.ordered_batches("train", loader.shape))
    assert sum(each.num_targets for each in batches) == seen == len(prepared.targets("train"))
    assert sum(each.num_tokens for each in batches) == prepared.num_tokens("train")
    losses = [loader.objective.loss_sum(model, each).item() for each in batches]
    scores = [loader.objective.score(model, each).nats.sum().item() for each in batches]
    assert sum(losses) == pytest.approx(by_hand, rel=1e-9)
    assert sum(scores) == pytest.approx(by_hand, rel=1e-9)


@given(lengths=st.lists(st.integers(1, 20), min_size=1, max_size=60), room=st.integers(20, 40))
def test_every_text_is_packed_once_and_rows_are_not_too_long(lengths: list[int], room: int) -> None:
    rows = packed_rows(np.array(lengths), room)
    assert sorted(number for row in rows for number in row) == list(range(len(lengths)))
    assert all(sum(lengths[number] for number in row) <= room for row in rows)
    fullest_first = sorted(sum(lengths[number] for number in row) for row in rows)
    assert len(fullest_first) < 2 or fullest_first[0] + fullest_first[1] > room  # two that fit would be one


def test_an_epoch_has_every_conversation_once_and_epochs_differ(tmp_path: Path) -> None:
    data = jsonl(tmp_path / "rows.jsonl", ROWS)
    config = config_of(data, batch_size=1)
    prepared = prepared_of(data)
    loader = Loader.of_run(config, prepared)
    size = len(prepared.ordered_batches("train", loader.shape))
    texts, rows = [], []
    for step in range(2 * size):
        [batch] = loader.training_batches(step)
        for number in range(1, int(batch.documents.max()) + 1):
            rows.append(step)
            texts.append(tuple(batch.inputs[batch.documents == number].tolist()))
    together = [{text for text, of in zip(texts, rows, strict=True) if of == row} for row in range(2 * size)]
    assert {frozenset(row) for row in together[:size]} != {frozenset(row) for row in together[size:]}
    first, second = texts[: len(ROWS)], texts[len(ROWS) :]
    assert len(set(first)) == len(ROWS)
    assert sorted(first) == sorted(second)
    assert first != second


def test_an_answer_is_exact_only_if_all_of_its_targets_are_right() -> None:
    documents = torch.tensor([[1, 1, 2, 2, 0], [1, 1, 1, 1, 1]])
    targets = torch.tensor([[IGNORE, 5, 6, 7, IGNORE], [1, IGNORE, 2, 3, 4]])
    batch = PackedBatch(torch.zeros_like(targets), targets, documents)
    right = torch.tensor([[False, True, True, False, False], [True, False, True, True, True]])
    nats = torch.where(targets == IGNORE, 0.0, 1.0)
    columns = Score(nats, right, whole=True).items(batch).columns
    assert columns["exact"].tolist() == [1, 0, 1]
    assert columns["tokens"].tolist() == [2, 2, 5]
    assert columns["nats"].tolist() == columns["targets"].tolist() == [1, 2, 4]


@pytest.mark.parametrize(("too_long", "kept"), [("cut", 3), ("skip", 2)])
def test_what_is_too_long_is_cut_or_skipped_and_counted(too_long: str, kept: int, tmp_path: Path) -> None:
    long = [{"prompt": "?", "completion": "yes " * 40}, {"prompt": "? " * 80, "completion": "yes"}]
    data = prepared_of(jsonl(tmp_path / "rows.jsonl", [*ROWS[:2], *long]), too_long=too_long)
    assert len(data.train) == kept
    assert (data.cut, data.skipped) == (1, 1) if too_long == "cut" else (0, 2)
    assert f"too long   {data.skipped} conversations skipped, {data.cut} cut" in data.summary()
    assert max(data.train.sources.lengths) <= 129
    with pytest.raises(UserError, match=r"leaves no conversation for train \(2 conversations, 2 of them too long"):
        prepared_of(jsonl(tmp_path / "long.jsonl", long), too_long="skip")


def test_conversations_of_a_group_are_in_one_split(tmp_path: Path) -> None:
    rows = [{**row, "group": f"g{number // 4}"} for number, row in enumerate(ROWS)]
    data = prepared_of(jsonl(tmp_path / "rows.jsonl", rows), validation_fraction=0.4)
    assert len(data.validation) + len(data.train) == len(rows)
    assert len(data.validation) % 4 == len(data.train) % 4 == 0
    assert len(data.validation)


def test_conversations_of_validation_that_are_trained_on_are_counted(tmp_path: Path) -> None:
    held = jsonl(tmp_path / "held.jsonl", [*ROWS[:2], {"prompt": "new?", "completion": "yes", "group": "g"}])
    train = jsonl(tmp_path / "train.jsonl", [*ROWS, {"prompt": "other?", "completion": "no", "group": "g"}])
    warning = "warning    2 of 3 validation conversations are trained on"
    assert warning in prepared_of(train, validation_data=str(held)).summary()
    assert "warning" not in prepared_of(train).summary()


def trained(out: Path, *flags: str) -> Run:
    assert train.main([*flags, "--out", str(out)]) == 0
    return Run.open(out)


@pytest.mark.parametrize("adapter", [[], ["--adapter", "lora"], ["--adapter", "soft-prompt"]], ids=str)
def test_a_fine_tune_learns_to_answer_and_holds_a_conversation(
    adapter: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text.txt").write_text("".join(f"{i} and {i % 3} are {i + i % 3}.\n" for i in range(200)))
    parent = trained(tmp_path / "parent", "gpt-nano", *TINY, "--data", str(tmp_path / "text.txt"), "--steps", "3")
    data = jsonl(tmp_path / "rows.jsonl", [{"prompt": f"Say {word}.", "completion": "a"} for word in "abcdefgh"])
    flags = ["--init-from", str(parent.path), "--objective", "instruct", "--data", str(data), "--lr", "2e-2"]
    steps = ["--steps", "40", "--validation-data", str(data), "--validation-fraction", "0"]
    run = trained(tmp_path / "tuned", *flags, *steps, *adapter)
    told = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    losses = [each["loss"] for each in told if "loss" in each]
    assert losses[-1] < losses[0]
    assert run.chat_template is not None
    assert run.chat_template.source == ChatTemplate.named("chatml").source
    assert f"next       python sample.py {run.path} --chat" in capsys.readouterr().out
    assert sample.main([str(run.path), "--chat", "--prompt", "Say c.", "--max-new-tokens", "4"]) == 0


def test_a_model_that_has_learned_to_answer_ends_its_answers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = jsonl(tmp_path / "rows.jsonl", [{"prompt": f"Say {word}.", "completion": "yes"} for word in "abcdefgh"])
    flags = ["gpt-nano", *TINY, "--objective", "instruct", "--data", str(data), "--validation-data", str(data)]
    run = trained(tmp_path / "run", *flags, "--steps", "60", "--lr", "2e-2", "--validation-fraction", "0")
    told = json.loads((run.path / "metrics.jsonl").read_text().splitlines()[-1])
    assert told["exact"] == 1.0
    assert told["exact_low"] == pytest.approx(8 / (8 + 1.959964**2))  # Wilson's interval, all of 8
    capsys.readouterr()
    chat = [str(run.path), "--chat", "--prompt", "Say b."]
    assert sample.main([*chat, "--temperature", "0", "--max-new-tokens", "9"]) == 0
    assert capsys.readouterr().out == "yes\n"
    assert evaluate.main([str(run.path), "--checkpoint", "latest", "--out", str(tmp_path / "answers.jsonl")]) == 0
    said = capsys.readouterr().out
    assert "Answers to 8 questions, by greedy decoding\n" in said
    assert "exact match  100.0%  67.6% to 100.0%\n" in said
    assert "token F1     100.0%  100.0% to 100.0%\n" in said
    written = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert [(row["item"], row["reference"], row["answer"]) for row in written] == [(n, "yes", "yes") for n in range(8)]
    assert all("Say" in row["prompt"] and row["exact"] == row["token_f1"] == 1 for row in written)
    assert sum(row["nats"] for row in written) / sum(row["targets"] for row in written) == pytest.approx(
        told["validation_loss"], rel=0.05
    )


def test_questions_are_those_before_whole_answers_and_answers_have_no_end(tmp_path: Path) -> None:
    long = {"prompt": "?", "completion": "no " * 60}
    data = jsonl(tmp_path / "rows.jsonl", [{"messages": TALK}, {"text": "Not asked."}, long])
    flags = ["gpt-nano", *TINY, "--objective", "instruct", "--data", str(data), "--validation-data", str(data)]
    run = trained(tmp_path / "run", *flags, "--validation-fraction", "0", "--steps", "1")
    template: Any = run.chat_template
    asked = questions_of(HeldOutData.of_run(run))
    assert [each.reference for each in asked] == ["3", "7"]
    prompts = [template.encode_prompt([Message(**each) for each in TALK[:end]], run.tokenizer) for end in (2, 4)]
    assert [each.prompt for each in asked] == prompts
    assert [each.length for each in asked] == [2, 2]


@pytest.mark.parametrize(
    ("answer", "reference", "f1"),
    [
        ("ValueError", "ValueError", 1.0),
        ("a, b=None", "a, b", 2 * 3 / (5 + 3)),
        ("", "x", 0.0),
        ("", "", 1.0),
        ("x x x", "x y", 2 * 1 / (3 + 2)),
    ],
)
def test_token_f1_is_that_of_its_definition(answer: str, reference: str, f1: float) -> None:
    assert token_f1(answer, reference) == pytest.approx(f1)


def test_metrics_of_answers_have_intervals_around_them() -> None:
    found = estimates_of(answer_items([(" a\n", "a")] * 30 + [("b", "a")] * 10))
    assert set(found) == {"exact", "token_f1"}
    for name, each in found.items():
        assert each.value == 0.75
        assert each.interval is not None
        assert 0.5 < each.interval[0] < 0.75 < each.interval[1] < 0.9, name


def test_another_template_is_learned_stored_and_inherited(tmp_path: Path) -> None:
    source = "{% for message in messages %}{{ message.role }}: {{ message.content }}{{ eos_token }}{% endfor %}"
    source += "{% if add_generation_prompt %}assistant: {% endif %}"
    (tmp_path / "own.jinja").write_text(source)
    data = jsonl(tmp_path / "rows.jsonl", ROWS)
    flags = ["--objective", "instruct", "--data", str(data), "--steps", "2"]
    run = trained(tmp_path / "run", "gpt-nano", *TINY, *flags, "--chat-template", str(tmp_path / "own.jinja"))
    (tmp_path / "own.jinja").unlink()
    prepared: Any = run.config.prepare(run.tokenizers)
    assert prepared.folder.name == run.text
    again = trained(tmp_path / "again", "--init-from", str(run.path), "--data", str(data), "--steps", "2")
    for each in (run, again):
        assert each.chat_template is not None
        assert each.chat_template.source == source
        ids, is_answer = each.chat_template.answer_spans(
            [Message("user", "?"), Message("assistant", "!")], each.tokenizer
        )
        assert ids[-1] == each.tokenizer.end_of_text
        assert is_answer[-1]


def test_a_template_that_is_no_file_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = jsonl(tmp_path / "rows.jsonl", ROWS)
    flags = ["gpt-nano", *TINY, "--objective", "instruct", "--data", str(data), "--chat-template", "chatlm"]
    assert train.main(flags) == 2
    assert "there is no chat template 'chatlm': choose chatml, or a file" in capsys.readouterr().err


@pytest.mark.parametrize("packing", [[], ["--no-packing"]], ids=str)
def test_it_is_rehearsed_and_resumes_bit_for_bit(packing: list[str], tmp_path: Path) -> None:
    data = str(jsonl(tmp_path / "rows.jsonl", ROWS))
    flags = ["gpt-nano", *TINY, "--objective", "instruct", "--data", data, "--steps", "6", *packing]
    assert doctor.main(flags) == 0
    assert verify_resume.main(flags) == 0


def test_an_exported_model_stops_where_an_answer_ends(tmp_path: Path) -> None:
    data = jsonl(tmp_path / "rows.jsonl", ROWS)
    exportable = [
        "--norm",
        "layer",
        "--feedforward",
        "gelu-tanh",
        "--positions",
        "learned",
        "--bias",
        "--qk-norm",
        "none",
    ]
    flags = ["gpt-nano", *TINY, *exportable, "--qk-norm", "none", "--objective", "instruct", "--data", str(data)]
    run = trained(tmp_path / "run", *flags, "--steps", "1")
    assert export.main([str(run.path), "--to", str(tmp_path / "out"), "--family", "gpt2"]) == 0
    ends = json.loads((tmp_path / "out" / "config.json").read_text())["eos_token_id"]
    assert ends == [run.tokenizer.end_of_text, run.tokenizer.special_tokens["<|im_end|>"]]
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == ChatTemplate.named("chatml").source
