"""SIGTERM and Ctrl-C end a server when it has answered what was begun, and that is no failure."""

from __future__ import annotations

import http.client
import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("fastapi", reason="the server needs the extra serve")
pytest.importorskip("uvicorn", reason="the server needs the extra serve")

from minitransformer.models.model import build_model
from minitransformer.runs import Run
from minitransformer.text.tokenizers import Bytes
from tests.runs_for_tests import TINY, configured

pytestmark = [
    pytest.mark.unchecked_shapes,
    pytest.mark.skipif(sys.platform == "win32", reason="signals are POSIX"),
]


@pytest.fixture
def server(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    tokenizer = Bytes()
    config = configured(TINY, vocab_size=tokenizer.vocab_size, context_length=1024)
    Run.create(tmp_path / "one", config, tokenizer, tokenizer, initial=build_model(config.model))
    command = [sys.executable, "-m", "minitransformer", "serve", str(tmp_path / "one"), "--port", "0"]
    with subprocess.Popen([*command, "--device", "cpu"], stderr=subprocess.PIPE, text=True) as process:
        yield process
        process.kill()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_server_with_0_after_what_was_begun(server: subprocess.Popen[str], number: int) -> None:
    assert server.stderr is not None
    listening = next(line for line in server.stderr if "listening on http://" in line)
    connection = http.client.HTTPConnection(listening.split("//")[1].split("/")[0], timeout=60)
    asked = {"model": "one", "prompt": "ab", "max_tokens": 500, "stream": True, "min_new_tokens": 500}
    connection.request("POST", "/v1/completions", json.dumps(asked), {"Content-Type": "application/json"})
    answer = connection.getresponse()
    assert answer.status == 200, answer.read()
    first = answer.readline()
    server.send_signal(number)
    rest = answer.read()
    assert first.startswith(b"data: ")
    assert rest.endswith(b"data: [DONE]\n\n")
    server.stderr.read()
    assert server.wait(60) == 0
