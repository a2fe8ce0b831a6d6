"""The page of the server in a real browser: what is typed reaches the models, and their answers are shown and kept."""

from __future__ import annotations

import json
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("fastapi", reason="the server needs the extra serve")
pytest.importorskip("uvicorn", reason="the server needs the extra serve")

import uvicorn

from minitransformer.models.model import build_model
from minitransformer.runs import Run
from minitransformer.serving.app import make_app
from minitransformer.serving.journal import AnswerJournal
from minitransformer.serving.limits import ServingLimits
from minitransformer.serving.metrics import Metrics
from minitransformer.serving.models import Models, Room, open_served
from minitransformer.serving.page import HEADERS, PAGE
from minitransformer.serving.service import Service
from minitransformer.text.chat_template import CHATML, ChatTemplate
from minitransformer.text.tokenizers import Bytes
from tests.browser_for_tests import CHROMIUM, Browser
from tests.runs_for_tests import TINY, configured

pytestmark = pytest.mark.unchecked_shapes
TOKENIZER = Bytes().with_special_tokens(ChatTemplate.named("chatml").control_tokens)
KEY = "a-key"
LONG = 4000
NEVER_ENDING = json.dumps({"do_sample": True, "min_new_tokens": LONG})
COUNTING = (
    "window.counts = new Set(), new MutationObserver(() => counts.add(document.querySelectorAll('.token').length))"
    ".observe(find('turns'), {subtree: true, childList: true}), 0"
)
SHOWN = (
    "[...document.querySelectorAll('.turn:last-child .answer')].map(answer =>"
    " [...answer.querySelectorAll('.token:not(.unsaid)')].map(token => token.textContent).join(''))"
)


def test_the_page_refers_to_nothing_outside_and_parses_no_text_as_html() -> None:
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)|\bsrc=|url\(|@import|innerHTML|outerHTML|insertAdj", PAGE)
    policy = HEADERS["Content-Security-Policy"]
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe" not in policy


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("page")


@pytest.fixture(scope="module")
def address(folder: Path, shake: Callable[[Any], Any]) -> Iterator[str]:
    """Where two models that chat are served, to those who have the key."""
    limits = ServingLimits(max_tokens=LONG)
    service = Service(Models(), limits, Metrics(), AnswerJournal(None))
    config = configured(TINY, vocab_size=TOKENIZER.vocab_size, context_length=LONG + 100, positions="rotary")
    for seed, name in enumerate(("one", "two")):
        torch.manual_seed(seed)
        Run.create(folder / name, config, TOKENIZER, TOKENIZER, initial=shake(build_model(config.model)))
        (folder / name / "chat_template.jinja").write_text(CHATML)
        (folder / name / "generation_config.json").write_text(NEVER_ENDING)
        service.models[name] = open_served(name, folder / name, Room(batch_size=2), limits, service.metrics, print)
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(make_app(service, (KEY,)), log_config=None, access_log=False))
    thread = threading.Thread(target=server.run, args=([listener],))
    thread.start()
    yield f"http://127.0.0.1:{listener.getsockname()[1]}/"
    server.should_exit = True
    thread.join()


@pytest.fixture(scope="module")
def browser(folder: Path, address: str) -> Iterator[Browser]:
    """A browser whose page has been given the key."""
    if CHROMIUM is None:
        pytest.skip("no chromium is installed here")
    browser = Browser(folder / "browser")
    try:
        browser.open(address)
        browser.wait("document.activeElement.id === 'key'")
        browser.type(KEY)
        browser.press("Enter")
        browser.wait("models.length === 2 && document.activeElement.id === 'prompt'")
        assert browser.ask("field('mode').value") == "chat"
        browser.complaints.clear()  # the console notes that the first request was answered with 401
        yield browser
    finally:
        browser.close()


@pytest.fixture
def page(browser: Browser, address: str) -> Iterator[Browser]:
    """The page as it begins; in the end it must not have complained."""
    browser.open(address)
    browser.ask("localStorage.clear()")
    browser.open(address)
    browser.wait("models.length === 2 && document.activeElement.id === 'prompt'")
    yield browser
    assert browser.complaints == []
    assert browser.ask("root.dataset.error") is None


def choose(page: Browser, **settings: object) -> None:
    """Fill in the settings as a user does, the last event included."""
    page.ask(f"Object.entries({json.dumps(settings)}).forEach(([name, value]) => {{ field(name).value = value; }})")
    page.ask("settings.dispatchEvent(new Event('input')), 0")


def send(page: Browser, prompt: str) -> None:
    page.ask("find('prompt').focus()")
    page.type(prompt)
    page.press("Enter")


def ended(page: Browser, turns: int = 1) -> None:
    page.wait(f"root.dataset.state === 'ready' && document.querySelectorAll('.turn .remark').length >= {turns}")


def said(folder: Path, name: str = "one") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / name / "feedback.jsonl").read_text().splitlines()]


def test_an_answer_comes_token_by_token_and_its_rating_and_correction_reach_the_server(
    page: Browser, folder: Path
) -> None:
    choose(page, max_tokens=600, seed=3, temperature=0.7)
    page.ask(COUNTING)
    send(page, "<b>hello</b> & é")
    ended(page)
    assert len(page.ask("[...counts]")) > 3
    assert page.ask("document.querySelector('.asked').lastChild.data") == "<b>hello</b> & é"
    page.point(".down", click=True)
    page.wait("document.querySelector('.down').getAttribute('aria-pressed') === 'true'")
    page.ask("document.querySelector('.answer button[aria-expanded]').focus()")
    page.press("Enter")
    page.ask("document.activeElement.select()")
    page.type("better")
    page.ask("document.activeElement.form.querySelector('button').focus()")
    page.press("Enter")
    page.wait("document.querySelector('.answer [role=status]').textContent.includes('correction')")
    rated, corrected = said(folder)
    assert rated["messages"] == [{"role": "user", "content": "<b>hello</b> & é"}]
    assert [rated["answer"]] == page.ask(SHOWN)
    assert (rated["rating"], rated["correction"]) == ("down", None)
    assert (corrected["rating"], corrected["correction"]) == ("down", "better")


@pytest.mark.parametrize(
    ("steps", "shown"),
    [
        ([["a", ["a"]], ["", ["<"]], ["<b", ["b"]]], ["a", "<", "b"]),  # held back, and no stop string after all
        ([["a", ["a"]], ["", ["<"]], ["", ["|"]]], ["a", "-<", "-|"]),  # a stop string
        ([["", ["ab<"]], ["ab", ["|>"]]], ["ab", "-|>"]),  # one that begins inside a token
        ([["", ["bytes:\\xc3"]], ["é!", ["bytes:\\xa9", "!"]]], ["é", "!"]),  # a character of two tokens
        ([["a", ["a"]], ["", ["bytes:\\xc3"]], ["\ufffd", []]], ["a", "\ufffd"]),  # one that was never finished
        ([["a", ["a"]], ["", ["<|end|>"]], ["b", ["b"]]], ["a", "-<|end|>", "b"]),  # a special token
    ],
)
def test_each_token_is_where_its_text_is(page: Browser, steps: list[Any], shown: list[str]) -> None:
    page.ask("window.answer = {text: '', tokens: []}, window.box = make('p'), 0")
    page.ask("window.flow = new TextFlow(box, answer), 0")
    for text, tokens in steps:
        entries = json.dumps([{"token": token, "logprob": -1, "top": []} for token in tokens])
        page.ask(f"answer.text += {json.dumps(text)}, answer.tokens.push(...{entries}), flow.draw(false), 0")
    page.ask("flow.draw(true), 0")
    spelling = "(span.matches('.unsaid') ? '-' : '') + (span.textContent)"
    assert page.ask(f"[...box.childNodes].map(span => {spelling})") == shown


def test_probabilities_stand_under_the_pointer_and_under_the_arrow_keys(page: Browser) -> None:
    choose(page, max_tokens=5, seed=1, alternatives="2")
    send(page, "a")
    ended(page)
    page.point(".token")
    first, *_ = page.wait("!find('tip').hidden && find('tip').innerText.split('\\n')")
    token = page.ask("session.turns[0].answers[0].tokens[0]")
    assert len(token["top"]) == 2
    assert first == page.ask(
        "spelled(session.turns[0].answers[0].tokens[0].token) + ' ' + "
        "percent(session.turns[0].answers[0].tokens[0].logprob)"
    )
    page.press("Escape")
    assert page.ask("find('tip').hidden")
    page.ask("document.querySelector('.text').focus({focusVisible: true})")
    page.press("ArrowRight")
    assert page.ask("[...document.querySelectorAll('.token')].indexOf(document.querySelector('.token.current'))") == 1
    assert "likeliest" in page.ask("find('announcer').textContent")
    assert not page.ask("find('tip').hidden")


def test_a_long_answer_stops_at_escape_and_is_rated_as_far_as_it_came(page: Browser, folder: Path) -> None:
    choose(page, max_tokens=LONG, alternatives="")
    send(page, "go on")
    page.wait("document.querySelector('.text')?.textContent.length > 5")
    page.press("Escape")
    ended(page)
    assert page.ask("document.querySelector('.answer .problem').textContent") == "Stopped."
    assert 5 < page.ask("session.turns[0].answers[0].text.length") < LONG
    page.point(".down", click=True)
    page.wait("document.querySelector('.down').getAttribute('aria-pressed') === 'true'")
    row = said(folder)[-1]
    assert (row["rating"], row["finish_reason"]) == ("down", "stopped")
    assert row["answer"].startswith(page.ask("session.turns[0].answers[0].text"))


def test_two_runs_answer_beside_each_other_and_are_kept_and_exported_with_their_settings(
    page: Browser, address: str, folder: Path
) -> None:
    choose(page, beside="two", max_tokens=8, seed=2, top_k=9, stop="zz\\n")
    send(page, "first")
    ended(page, 2)
    send(page, "second")
    ended(page, 4)
    shown = page.ask(SHOWN)
    assert len(set(shown)) == 2
    page.open(address)
    page.wait("models.length === 2")
    assert page.ask("field('beside').value") == "two"
    page.ask("document.querySelector('#sessions button').click()")
    assert page.ask(SHOWN) == shown
    page.point("#export", click=True)
    [file] = wait_for_files(folder / "browser")
    [conversation] = json.loads(file.read_text())["conversations"]
    assert KEY not in file.read_text()
    assert [turn["prompt"] for turn in conversation["turns"]] == ["first", "second"]
    last = conversation["turns"][1]
    expected = {"max_tokens": 8, "seed": 2, "top_k": 9, "stop": ["zz\n"], "logprobs": True, "top_logprobs": 5}
    assert last["settings"] == expected
    assert [(answer["model"], answer["text"]) for answer in last["answers"]] == [("one", shown[0]), ("two", shown[1])]


def wait_for_files(folder: Path) -> list[Path]:
    end = time.monotonic() + 10
    while not (found := list(folder.glob("minitransformer-*.json"))) and time.monotonic() < end:
        time.sleep(0.05)
    return found


def test_what_the_server_refuses_is_shown_as_its_sentence(page: Browser) -> None:
    choose(page, max_tokens=LONG + 1)
    send(page, "a")
    ended(page)
    assert f"this server gives at most {LONG}" in page.ask("document.querySelector('.answer .problem').textContent")
    page.complaints.clear()  # the console notes the status


def test_every_control_has_a_name_and_a_phone_shows_the_whole_width(page: Browser) -> None:
    choose(page, beside="two", max_tokens=20)
    send(page, "w" * 200)
    ended(page, 2)
    for width in (390, 1280):
        size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 500}
        page.call("Emulation.setDeviceMetricsOverride", **size)
        assert page.ask("root.scrollWidth <= innerWidth")
        assert page.ask("document.querySelector('main').clientWidth > 0.7 * innerWidth")
    nodes = page.call("Accessibility.getFullAXTree")["nodes"]
    controls = {"button", "textbox", "combobox", "spinbutton", "checkbox", "radio", "link"}
    names = [node["name"]["value"] for node in nodes if not node["ignored"] and node["role"]["value"] in controls]
    assert len(names) > 25
    assert all(names)


def test_no_script_of_a_text_would_run_and_no_other_server_can_be_asked(page: Browser) -> None:
    page.ask("addEventListener('securitypolicyviolation', event => { window.blocked = event.violatedDirective; })")
    page.ask("window.tried = () => { try { document.body.innerHTML = 'x'; } catch (error) { return error.name; } }, 0")
    assert page.ask("tried()") == "TypeError"
    assert page.ask("fetch('http://127.0.0.2/').catch(error => error.name)") == "TypeError"
    assert page.ask("window.blocked") == "connect-src"
    page.complaints.clear()
