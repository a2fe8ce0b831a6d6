"""The server: each answer is that of `sample`, every mistake a sentence with its status, and no row stays taken."""

from __future__ import annotations

import asyncio
import base64
import json
import threading
import time
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("fastapi", reason="the server needs the extra serve")
pytest.importorskip("httpx", reason="fastapi's test client needs it")

from fastapi.testclient import TestClient

from minitransformer.generation.config import SamplingConfig
from minitransformer.generation.likelihoods import Continuation, log_likelihoods
from minitransformer.generation.streaming import stream_text
from minitransformer.models.model import build_model
from minitransformer.runs import Run
from minitransformer.runs.drifting import sent_texts
from minitransformer.runs.embedding import open_embedder
from minitransformer.serving.app import make_app
from minitransformer.serving.journal import AnswerJournal
from minitransformer.serving.limits import ServingLimits
from minitransformer.serving.metrics import Metrics
from minitransformer.serving.models import Models, Room, open_served
from minitransformer.serving.service import Service
from minitransformer.text.chat_template import CHATML, ChatTemplate, Message
from minitransformer.text.tokenizers import Bytes
from tests.runs_for_tests import TINY, configured

pytestmark = pytest.mark.unchecked_shapes
TOKENIZER = Bytes().with_special_tokens(ChatTemplate.named("chatml").control_tokens)
LIMITS = ServingLimits(max_tokens=300, max_queue=6, max_body=10_000, max_seconds=20.0, body_seconds=0.3)
ROWS = 3
SCHEMA = {"type": "object", "properties": {"n": {"enum": [1, 22]}}, "required": ["n"], "additionalProperties": False}


def write_run(path: Path, shake: Any, **model: Any) -> None:
    config = configured(TINY, vocab_size=TOKENIZER.vocab_size, context_length=96, **model)
    torch.manual_seed(1)
    Run.create(path, config, TOKENIZER, TOKENIZER, initial=shake(build_model(config.model)))


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory, shake: Callable[[Any], Any]) -> Service:
    """A decoder that has learned conversations, a classifier and a translator."""
    folder = tmp_path_factory.mktemp("served")
    write_run(folder / "gpt", shake)
    (folder / "gpt" / "chat_template.jinja").write_text(CHATML)
    write_run(folder / "classes", shake, topology="encoder-classifier", num_classes=3, objective="classify")
    write_run(folder / "pairs", shake, topology="encoder-decoder", objective="seq2seq")
    found = Service(Models(), LIMITS, Metrics(), AnswerJournal(folder / "log.jsonl"))
    for name in ("gpt", "classes", "pairs"):
        found.models[name] = open_served(name, folder / name, Room(batch_size=ROWS), LIMITS, found.metrics, print)
    return found


@pytest.fixture(scope="module")
def client(service: Service) -> Iterator[TestClient]:
    with TestClient(make_app(service), raise_server_exceptions=False) as client:
        yield client


def complete(client: TestClient, **body: Any) -> Any:
    answer = client.post("/v1/completions", json={"model": "gpt", **body})
    assert answer.status_code == 200, answer.text
    return answer.json()


def texts_of_sample(service: Service, prompt: str, **sampling: Any) -> list[str]:
    run, pieces = service.models["gpt"].run, []
    model: Any = run.load_model()
    for step in stream_text(model, TOKENIZER, TOKENIZER.encode_prompt(prompt), SamplingConfig(**sampling)):
        pieces.append(step)
    return ["".join(each) for each in zip(*pieces, strict=True)]


def chunks(client: TestClient, path: str = "/v1/completions", **body: Any) -> list[Any]:
    answer = client.post(path, json={"model": "gpt", "stream": True, **body})
    assert answer.headers["content-type"].startswith("text/event-stream")
    *events, done = answer.text.removesuffix("\n\n").split("\n\n")
    assert done == "data: [DONE]"
    return [json.loads(event.removeprefix("data: ")) for event in events]


def refused(client: TestClient, status: int, path: str = "/v1/completions", **body: Any) -> dict[str, Any]:
    answer = client.post(path, json=body)
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    return error


def test_a_completion_is_what_sample_gives_for_the_same_seed(client: TestClient, service: Service) -> None:
    sampling = {"seed": 5, "temperature": 0.9, "top_k": 7, "presence_penalty": 1.5, "frequency_penalty": 0.5}
    answer = complete(client, prompt="ab", n=2, max_tokens=12, **sampling)
    expected = texts_of_sample(service, "ab", num_samples=2, max_new_tokens=12, **sampling)
    assert [choice["text"] for choice in answer["choices"]] == expected
    assert answer["usage"] == {"prompt_tokens": 2, "completion_tokens": 24, "total_tokens": 26}
    [default] = texts_of_sample(service, "ab", seed=5)
    assert complete(client, prompt="ab", seed=5)["choices"][0]["text"] == default


@settings(max_examples=5)
@given(st.lists(st.tuples(st.text("abc", max_size=9), st.integers(0, 9), st.integers(1, 9)), min_size=1, max_size=6))
def test_an_answer_is_the_same_whoever_else_asks(client: TestClient, service: Service, asked: list[Any]) -> None:
    found: dict[int, str] = {}

    def ask(number: int, prompt: str, seed: int, length: int) -> None:
        answer = complete(client, prompt=prompt, seed=seed, max_tokens=length)
        found[number] = answer["choices"][0]["text"]

    threads = [threading.Thread(target=ask, args=(number, *each)) for number, each in enumerate(asked)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    for number, (prompt, seed, length) in enumerate(asked):
        assert [found[number]] == texts_of_sample(service, prompt, seed=seed, max_new_tokens=length)


def test_a_stream_is_the_whole_answer_in_pieces(client: TestClient) -> None:
    body = {"prompt": ["ab", "c"], "max_tokens": 9, "seed": 3, "n": 2, "echo": True, "logprobs": 2}
    whole = complete(client, **body)["choices"]
    *parts, last = chunks(client, **body, stream_options={"include_usage": True})
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == 36
    for choice in whole:
        own = [each for part in parts for each in part["choices"] if each["index"] == choice["index"]]
        assert "".join(each["text"] for each in own) == choice["text"]
        assert own[-1]["finish_reason"] == choice["finish_reason"] == "length"
        told = [each["logprobs"]["token_logprobs"] for each in own if each["logprobs"]]
        assert list(chain(*told)) == choice["logprobs"]["token_logprobs"]


def test_log_probabilities_of_a_prompt_are_those_of_evaluation(client: TestClient, service: Service) -> None:
    ids = list(b"abcabd")
    [choice] = complete(client, prompt=ids, max_tokens=1, echo=True, logprobs=1, temperature=0)["choices"]
    found = choice["logprobs"]
    assert found["tokens"][:6] == list("abcabd")
    model: Any = service.models["gpt"].run.load_model()
    [score] = log_likelihoods(model, [Continuation((ids[0],), tuple(ids[1:]))])
    assert found["token_logprobs"][0] is None
    assert sum(found["token_logprobs"][1:-1]) == pytest.approx(score.nats, abs=1e-4)
    pairs = list(zip(found["token_logprobs"], found["top_logprobs"], strict=True))[1:]
    best = [value == max(top.values()) for value, top in pairs]
    assert all(best[:-1]) == score.is_greedy
    assert best[-1], "at temperature 0"
    none = complete(client, prompt=ids, max_tokens=0, echo=True, logprobs=1)["choices"][0]
    assert (none["text"], none["logprobs"]["token_logprobs"]) == ("abcabd", found["token_logprobs"][:-1])


def test_a_stop_string_a_bias_and_an_end_end_a_text(client: TestClient) -> None:
    body = {"prompt": "ab", "max_tokens": 30, "temperature": 0}
    [whole] = complete(client, **body)["choices"]
    stop = whole["text"][5:7]
    [choice] = complete(client, **body, stop=stop)["choices"]
    assert choice["text"] == whole["text"][: whole["text"].index(stop)]
    assert choice["finish_reason"] == "stop"
    [biased] = complete(client, **body, logit_bias={"120": 100})["choices"]
    assert biased["text"] == "x" * 30
    [ended] = complete(client, **body, logit_bias={str(TOKENIZER.end_of_text): 100})["choices"]
    assert (ended["text"], ended["finish_reason"]) == ("", "stop")


def test_a_chat_is_answered_by_the_template_up_to_the_end_of_its_turn(client: TestClient, service: Service) -> None:
    messages = [{"role": "system", "content": "S"}, {"role": "user", "content": [{"type": "text", "text": "hi"}]}]
    body = {"messages": messages, "max_tokens": 8, "temperature": 0}
    answer = client.post("/v1/chat/completions", json={"model": "gpt", **body, "logprobs": True, "top_logprobs": 1})
    [choice] = answer.json()["choices"]
    prompt = ChatTemplate.named("chatml").encode_prompt([Message("system", "S"), Message("user", "hi")], TOKENIZER)
    [text] = complete(client, prompt=prompt, max_tokens=8, temperature=0)["choices"]
    assert choice["message"]["content"] == text["text"]
    assert answer.json()["usage"]["prompt_tokens"] == len(prompt)
    assert len(choice["logprobs"]["content"]) == 8
    first, *parts = chunks(client, "/v1/chat/completions", **body)
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert "".join(part["choices"][0]["delta"].get("content", "") for part in parts) == text["text"]
    end = TOKENIZER.special_tokens["<|im_end|>"]
    ended = client.post("/v1/chat/completions", json={"model": "gpt", **body, "logit_bias": {str(end): 100}}).json()
    assert ended["choices"][0]["finish_reason"] == "stop"


def test_an_answer_keeps_to_its_json_schema(client: TestClient) -> None:
    pytest.importorskip("llguidance", reason="constrained decoding needs the extra serve")
    wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}
    for seed in range(3):
        [choice] = complete(client, prompt="a", seed=seed, max_tokens=40, response_format=wanted)["choices"]
        assert json.loads(choice["text"])["n"] in (1, 22)
        assert choice["finish_reason"] == "stop"
    wanted["json_schema"]["schema"] = {"type": "nonsense"}  # type: ignore[index]
    assert "nonsense" in refused(client, 400, model="gpt", prompt="a", response_format=wanted)["message"]


def test_embeddings_classes_translations_and_tokens_are_those_of_the_commands(
    client: TestClient, service: Service
) -> None:
    embedder = open_embedder(str(service.models["gpt"].run.path))
    expected = np.stack([each.numpy() for each in embedder.embeddings(["ab", "c"], 2)])
    body = {"model": "gpt", "input": ["ab", "c"]}
    found = client.post("/v1/embeddings", json=body).json()["data"]
    np.testing.assert_allclose([each["embedding"] for each in found], expected, rtol=1e-6)
    packed = client.post("/v1/embeddings", json={**body, "encoding_format": "base64"}).json()["data"]
    assert [base64.b64decode(each["embedding"]) for each in packed] == [row.tobytes() for row in expected]
    [classes] = client.post("/classify", json={"model": "classes", "input": "ab"}).json()["data"]
    assert sum(each["probability"] for each in classes["classes"]) == pytest.approx(1)
    assert classes["label"] == classes["classes"][0]["label"]
    made = client.post("/translate", json={"model": "pairs", "input": ["ab", "c"], "max_tokens": 5, "num_beams": 2})
    assert [each["index"] for each in made.json()["data"]] == [0, 1]
    told = client.post("/tokenize", json={"model": "gpt", "prompt": "hé", "return_token_strs": True}).json()
    assert (told["tokens"], told["token_strs"]) == (list("hé".encode()), ["h", "bytes:\\xc3", "bytes:\\xa9"])


@pytest.mark.parametrize(
    ("body", "status", "sentence"),
    [
        ({}, 400, "model: Field required"),
        ({"model": "gpt"}, 400, "prompt: Field required"),
        ({"model": "gqt", "prompt": "a"}, 404, "there is no model 'gqt': did you mean 'gpt'?"),
        ({"model": "pairs", "prompt": "a"}, 400, "continues no prompts"),
        ({"model": "gpt", "prompt": "a", "temprature": 1}, 400, "did you mean 'temperature'?"),
        ({"model": "gpt", "prompt": "a", "top_k": "3"}, 400, "top_k is '3', and must be a whole number"),
        ({"model": "gpt", "prompt": "a", "min_p": 2}, 400, "min_p is 2"),
        ({"model": "gpt", "prompt": "a", "presence_penalty": 3}, 400, "presence_penalty is 3"),
        ({"model": "gpt", "prompt": "a", "best_of": 3, "n": 2}, 400, "best_of is not supported, as"),
        ({"model": "gpt", "prompt": "a", "suffix": "b"}, 400, "suffix is not supported, as"),
        (
            {"model": "gpt", "prompt": "a", "max_tokens": 301},
            400,
            "max_tokens is 301, and this server gives at most 300",
        ),
        ({"model": "gpt", "prompt": "a", "max_tokens": 0}, 400, "gives no text"),
        ({"model": "gpt", "prompt": [97] * 97}, 400, "the prompt has 97 tokens, and the model sees 96"),
        ({"model": "gpt", "prompt": "a" * 9000}, 400, "the text has 9,000 characters"),
        ({"model": "gpt", "prompt": "a", "n": 10}, 400, "at most 9 at a time"),
        ({"model": "gpt", "prompt": [999]}, 400, "there is no token 999"),
        ({"model": "gpt", "prompt": []}, 400, "prompt"),
        ({"model": "gpt", "prompt": "a", "logit_bias": {"999": 1}}, 400, "logit_bias names token 999"),
        ({"model": "gpt", "prompt": "\ud800"}, 400, "surrogate"),
        ({"model": "gpt", "prompt": "a" * 10_001}, 413, "the body is larger than 10,000 bytes"),
    ],
)
def test_a_mistake_is_a_sentence_with_its_status(client: TestClient, body: Any, status: int, sentence: str) -> None:
    answer = client.post("/v1/completions", content=json.dumps(body), headers={"Content-Type": "application/json"})
    assert answer.status_code == status, answer.text
    assert sentence in answer.json()["error"]["message"]


def test_fields_that_ask_for_nothing_are_no_mistake(client: TestClient) -> None:
    body = {"prompt": "a", "seed": 1, "max_tokens": 5, "n": 2}
    with_them = complete(client, **body, best_of=2, suffix=None, presence_penalty=0)
    assert with_them["choices"] == complete(client, **body)["choices"]


def test_a_prompt_is_lower_cased_where_the_data_was(
    client: TestClient, service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = {"max_tokens": 5, "seed": 1}
    lower = complete(client, prompt="ab", **body)["choices"]
    monkeypatch.setattr(Run, "cased", lambda run, text: text.lower())
    assert complete(client, prompt="AB", **body)["choices"] == lower
    assert client.post("/tokenize", json={"model": "gpt", "prompt": "AB"}).json()["tokens"] == list(b"ab")
    assert sent_texts(service.models["gpt"].run, service.journal._log, 1, "gpt")[0].ids == list(b"ab")  # type: ignore[arg-type]


def test_a_key_is_asked_for_where_there_are_some(service: Service) -> None:
    client = TestClient(make_app(service, ["right", "other"]))
    assert client.get("/health").status_code == 200
    for key, status in ((None, 401), ("wrong", 401), ("right", 200), ("other", 200)):
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        assert client.get("/v1/models", headers=headers).status_code == status


def test_pages_of_other_sites_reach_nothing(service: Service) -> None:
    client = TestClient(make_app(service, hosts=["127.0.0.1"]), base_url="http://evil.example")
    assert client.get("/v1/models").status_code == 403
    assert TestClient(make_app(service, hosts=["127.0.0.1"]), base_url="http://127.0.0.1:80").get("/health").is_success


def idle(service: Service, within: float = 5.0) -> bool:
    """Whether no text waits and no row is taken, soon."""
    scheduler: Any = service.models["gpt"].scheduler
    until = time.monotonic() + within
    while time.monotonic() < until:
        if scheduler.unfinished == 0 and not scheduler._engine._row_of:
            return True
        time.sleep(0.01)
    return False


async def hang_up(app: Any, body: dict[str, Any], after: float, cut: bool = False, first: int = 0) -> list[Any]:
    """Ask as a client that goes away after `first` messages; with `cut` before all of the body is sent."""
    sent = json.dumps({"model": "gpt", "prompt": "ab", **body}).encode()
    messages: list[Any] = [{"type": "http.request", "body": sent[:20] if cut else sent, "more_body": cut}]
    answered: list[Any] = []

    async def receive() -> Any:
        if messages:
            return messages.pop()
        await asyncio.sleep(after)
        while len(answered) < first:
            await asyncio.sleep(0.005)
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        answered.append(message)

    headers = [(b"host", b"x"), (b"content-type", b"application/json")]
    scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": headers, "query_string": b""}
    await asyncio.wait_for(app({**scope, "http_version": "1.1", "scheme": "http", "root_path": ""}, receive, send), 10)
    return answered


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_hangs_up_frees_its_rows(client: TestClient, service: Service, stream: bool) -> None:
    generated = service.metrics.new_tokens.labels("gpt")._value.get
    before = generated()
    asked = {"n": 9, "max_tokens": 300, "stream": stream, "logit_bias": {str(TOKENIZER.end_of_text): -100}}
    service.journal._kept.clear()
    client.portal.call(hang_up, client.app, asked, 0.05, False, 4 * stream)  # type: ignore[union-attr]
    assert idle(service)
    assert generated() - before < 9 * 300 / 2, "and not when all texts have ended"
    kept = [each["finish_reason"] for answered in service.journal._kept.values() for each in answered.answers]
    assert kept == ["stopped"] * 9 * stream, "what was seen may be rated"


def test_half_a_body_is_not_waited_for(client: TestClient) -> None:
    call = client.portal.call  # type: ignore[union-attr]
    assert call(hang_up, client.app, {}, 0.0, True) == []
    start, _ = call(hang_up, client.app, {}, 5.0, True)
    assert start["status"] == 408


def test_more_than_fits_is_told_to_come_later(client: TestClient, service: Service) -> None:
    statuses = []

    def ask() -> None:
        body = {"model": "gpt", "prompt": "a", "n": 5, "max_tokens": 60}
        statuses.append(client.post("/v1/completions", json=body).status_code)

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert set(statuses) == {200, 429}
    assert idle(service)


def test_feedback_is_kept_with_what_it_is_about(client: TestClient, service: Service) -> None:
    answer = complete(client, prompt=["x", "yz"], n=2, max_tokens=3, seed=1)
    said = {"id": answer["id"], "index": 2, "rating": "down", "correction": "better"}
    assert client.post("/feedback", json=said).is_success
    path = service.models["gpt"].run.path / "feedback.jsonl"
    row = json.loads(path.read_text().splitlines()[-1])
    expected = {**said, "prompt": "yz", "answer": answer["choices"][2]["text"], "model": "gpt"}
    assert expected.items() <= row.items()
    refused(client, 404, "/feedback", id="cmpl-none", rating="up")
    refused(client, 400, "/feedback", id=answer["id"])
    logged = [json.loads(line) for line in service.journal._log.read_text().splitlines()]  # type: ignore[union-attr]
    assert any(row["id"] == answer["id"] and row["prompt"] == "yz" for row in logged)


def test_a_step_that_fails_is_an_error_of_its_requests_alone(
    client: TestClient, service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    scheduler: Any = service.models["gpt"].scheduler

    def fail() -> Any:
        raise RuntimeError("secret prompt")

    monkeypatch.setattr(scheduler._engine, "step", fail)
    error = refused(client, 500, model="gpt", prompt="a")
    assert "secret" not in error["message"]
    assert complete(client, prompt="a", max_tokens=1)["usage"]["completion_tokens"] == 1
    assert idle(service)


def test_the_metrics_count_what_was_done(client: TestClient) -> None:
    complete(client, prompt="a", max_tokens=4, temperature=0, logit_bias={"97": 100})
    page = client.get("/metrics").text
    assert 'minitransformer_requests_total{endpoint="/v1/completions",status="200"}' in page
    for name in ("generated_tokens_total", "prompt_tokens_total", "time_to_first_token_seconds_bucket", "queue_texts"):
        assert f'minitransformer_{name}{{model="gpt"' in page.replace('{le="0.001",', "{")
