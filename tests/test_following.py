"""A promoted run takes over in a running server: nothing is dropped, and what was begun ends with the run before."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("fastapi", reason="the server needs the extra serve")
pytest.importorskip("httpx", reason="fastapi's test client needs it")

from fastapi.testclient import TestClient

from minitransformer.models.model import build_model
from minitransformer.runs import Run
from minitransformer.runs.promoting import SERVED, go_back, promote_over
from minitransformer.runs.served import FEEDBACK
from minitransformer.serving import following
from minitransformer.serving.app import make_app
from minitransformer.serving.journal import AnswerJournal
from minitransformer.serving.limits import ServingLimits
from minitransformer.serving.metrics import Metrics
from minitransformer.serving.models import Models, Room, open_served
from minitransformer.serving.service import Service
from minitransformer.serving.sharing import share_equal_tensors
from minitransformer.text.tokenizers import Bytes
from tests.runs_for_tests import TINY, configured

pytestmark = pytest.mark.unchecked_shapes
LIMITS = ServingLimits(max_tokens=2000, max_seconds=60.0)
BODY: dict[str, Any] = {"model": "chat", "prompt": "ab", "temperature": 0, "max_tokens": 8}


@pytest.fixture
def service(tmp_path: Path, shake: Callable[[Any], Any], monkeypatch: pytest.MonkeyPatch) -> Service:
    """Of two runs with the same shape and other weights, the first."""
    monkeypatch.setattr(following, "EVERY", 0.02)
    tokenizer = Bytes()
    config = configured(TINY, vocab_size=tokenizer.vocab_size, context_length=32)
    for seed, name in enumerate(("one", "two")):
        torch.manual_seed(seed)
        Run.create(tmp_path / name, config, tokenizer, tokenizer, initial=shake(build_model(config.model)))
    found = Service(Models(), LIMITS, Metrics(), AnswerJournal(None))
    found.models["chat"] = open_served("chat", tmp_path / "one", Room(batch_size=2), LIMITS, found.metrics, print)
    return found


@pytest.fixture
def client(service: Service) -> Iterator[TestClient]:
    with TestClient(make_app(service), raise_server_exceptions=False) as client:
        yield client


def fingerprint(client: TestClient) -> str:
    found: str = client.get("/v1/models/chat").json()["fingerprint"]
    return found


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end, "it did not happen in 30 s"
        time.sleep(0.01)


def text_of(client: TestClient, **body: Any) -> str:
    answer = client.post("/v1/completions", json={**BODY, **body})
    assert answer.status_code == 200, answer.text
    found: str = answer.json()["choices"][0]["text"]
    return found


def test_a_promoted_run_answers_and_what_was_begun_ends_with_the_run_before(
    service: Service, client: TestClient, tmp_path: Path
) -> None:
    long = {"max_tokens": 900, "stop": None}
    old, old_text, old_long = service.models["chat"], text_of(client), text_of(client, **long)
    before, began = fingerprint(client), threading.Event()
    texts: list[str] = []

    def ask_long() -> None:
        with client.stream("POST", "/v1/completions", json={**BODY, **long, "stream": True}) as answer:
            for line in answer.iter_lines():
                began.set()
                if line.startswith("data: {"):
                    texts.append(json.loads(line.removeprefix("data: "))["choices"][0]["text"])

    asking = threading.Thread(target=ask_long)
    asking.start()
    assert began.wait(30)
    promote_over(tmp_path / "one", Run.open(tmp_path / "two"), "step-000000", "it is better")
    wait_for(lambda: fingerprint(client) != before)
    assert text_of(client) != old_text
    asking.join()
    assert "".join(texts) == old_long
    assert old.scheduler is not None
    wait_for(lambda: not old.scheduler._thread.is_alive())  # type: ignore[union-attr]
    go_back(tmp_path / "one")
    wait_for(lambda: fingerprint(client) == before)
    assert text_of(client) == old_text


def test_no_request_is_dropped_while_runs_are_switched(service: Service, client: TestClient, tmp_path: Path) -> None:
    statuses: list[int] = []
    done = threading.Event()

    def ask() -> None:
        while not done.is_set():
            statuses.append(client.post("/v1/completions", json=BODY).status_code)

    asking = [threading.Thread(target=ask) for _ in range(3)]
    for each in asking:
        each.start()
    before = first = fingerprint(client)
    for number in range(4):
        if number % 2:
            go_back(tmp_path / "one")
        else:
            promote_over(tmp_path / "one", Run.open(tmp_path / "two"), "step-000000", "it is better")
        wait_for(lambda last=before: fingerprint(client) != last)  # type: ignore[misc]
        before = fingerprint(client)
    done.set()
    for each in asking:
        each.join()
    assert set(statuses) == {200}
    assert before == first


def test_what_does_not_open_is_not_served_and_feedback_stays_in_one_folder(
    service: Service, client: TestClient, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    before = fingerprint(client)
    (tmp_path / "one" / SERVED).write_text("{")
    wait_for(lambda: "served as before" in caplog.text)
    assert fingerprint(client) == before
    (tmp_path / "one" / SERVED).unlink()
    promote_over(tmp_path / "one", Run.open(tmp_path / "two"), "step-000000", "it is better")
    wait_for(lambda: fingerprint(client) != before)
    answer = client.post("/v1/completions", json=BODY).json()
    assert client.post("/feedback", json={"id": answer["id"], "rating": "up"}).status_code == 200
    assert (tmp_path / "one" / FEEDBACK).exists()
    assert not (tmp_path / "two" / FEEDBACK).exists()


def test_models_share_the_weights_that_they_have_in_common(service: Service, tmp_path: Path) -> None:
    one = Run.open(tmp_path / "one")
    model: Any = one.load_model()
    changed = next(name for name, _ in model.named_parameters() if name.endswith("query.weight"))
    with torch.no_grad():
        model.get_parameter(changed).add_(1)
    Run.create(tmp_path / "three", one.config, Bytes(), Bytes(), initial=model)
    served = open_served("three", tmp_path / "three", Room(batch_size=2), LIMITS, Metrics(), print)
    saved = service.models.share(served)
    service.models[served.name] = served
    tensors = [dict(each.model.named_parameters()) for each in (service.models["chat"], served)]
    own = {name for name, each in tensors[0].items() if each.data_ptr() != tensors[1][name].data_ptr()}
    assert own == {changed}
    assert saved == sum(each.nbytes for name, each in tensors[0].items() if name not in own)
    assert all(torch.equal(each, tensors[1][name]) for name, each in model.named_parameters())


def test_tied_weights_that_models_share_are_counted_once() -> None:
    one, other = torch.nn.Linear(8, 8, bias=False), torch.nn.Linear(8, 8, bias=False)
    other.load_state_dict(one.state_dict())
    for model in (one, other):
        model.register_buffer("stored", model.weight.detach())
    assert share_equal_tensors(other, [one]) == one.weight.nbytes
    assert other.weight.data_ptr() == other.stored.data_ptr() == one.weight.data_ptr()


def test_every_series_of_the_dashboard_and_the_alerts_is_one_of_the_server() -> None:
    folder = Path(following.__file__).parent
    told = [(folder / name).read_text(encoding="utf-8") for name in ("grafana.json", "alerts.yml")]
    json.loads(told[0])
    named = {name for text in told for name in re.findall(r"minitransformer_\w+", text)}
    known = {sample for family in Metrics().registry.collect() for sample in series_of(family)}
    assert named <= known
    assert {name.removesuffix("_total").removesuffix("_bucket") for name in named} == {
        family.name for family in Metrics().registry.collect()
    }


def series_of(family: Any) -> list[str]:
    suffixes = {"counter": ["_total"], "histogram": ["_bucket", "_sum", "_count"], "gauge": [""]}[family.type]
    return [family.name + suffix for suffix in suffixes]
