"""The page of a look: what it holds, how the command writes it, and that a real browser draws it, from disk."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minitransformer.analysis.look_record import AttentionMaps, Look, Text
from minitransformer.analysis.viewer import page_of, quantise_weights, restored, spelled, visible
from minitransformer.commands import look as command
from minitransformer.runs import Run
from minitransformer.training.checkpoint import write_checkpoint
from minitransformer.training.config import DataConfig, RunConfig, TrainingConfig
from tests.looks_for_tests import END, PROMPT, TOKENIZER, TOPOLOGIES, MakeModel, looked


@given(st.lists(st.floats(0, 1, width=32), min_size=1, max_size=50))
def test_a_quantised_weight_is_off_by_little(weights: list[float]) -> None:
    exact = torch.tensor(weights)
    assert ((restored(quantise_weights(exact)) - exact).abs() <= exact.sqrt() / 255 + 1 / 510**2 + 1e-6).all()


@given(st.binary(max_size=8))
def test_a_spelled_token_hides_nothing(piece: bytes) -> None:
    text = visible(piece)
    assert text
    assert text.isprintable()
    assert text == text.strip()


def test_spaces_line_ends_and_bytes_have_their_marks() -> None:
    assert visible(b" a\n") == "␣a↵"
    assert visible("é\u200b".encode()) == "é⟨U+200B⟩"
    assert visible(b"\xe2\x80") == "⟨E2 80⟩"
    assert spelled(TOKENIZER, END) == "<|endoftext|>"


def data_of(page: str) -> Any:
    [content] = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    return json.loads(content)


@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_a_page_refers_to_nothing_outside_and_no_text_ends_its_data(topology: str, make_model: MakeModel) -> None:
    look = looked(make_model(topology), "</script><!-- <script> x", target=None)
    page = page_of(look, "a </script> title", {"run": "<!--"})
    assert page.count("</script>") == 2
    assert not re.search(r"https?:|\bsrc=|\bhref=|url\(|@import|\bfetch\(|XMLHttpRequest", page)
    data = data_of(page)
    assert data["title"] == "a </script> title"
    for name, text in look.texts.items():
        assert data["texts"][name]["tokens"] == [spelled(TOKENIZER, token) for token in text.tokens]


def test_twelve_layers_and_heads_of_128_tokens_stay_below_five_megabytes() -> None:
    weights = torch.rand(12, 12, 128, 128).softmax(-1)
    maps = AttentionMaps("Self-attention", "text", "text", range(12), weights)
    look = Look({"text": Text("Text", [65] * 128, TOKENIZER)}, [maps], "text")
    assert len(page_of(look, "large", {}).encode()) < 5e6


@pytest.fixture
def write_run(tmp_path: Path, make_model: MakeModel) -> Callable[..., Path]:
    """Makes a run folder with a model of the given topology and choices."""

    def write(topology: str, **choices: Any) -> Path:
        model = make_model(topology, **choices).float()
        config = RunConfig(model.config, DataConfig(), TrainingConfig())
        run = Run.create(tmp_path / "runs" / topology, config, TOKENIZER, TOKENIZER)
        write_checkpoint(run.checkpoints, 7, model, {})
        return run.path

    return write


def test_the_command_writes_the_page_and_says_what_it_found(
    write_run: Callable[..., Path], capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_run("decoder")
    monkeypatch.chdir(path.parent.parent)
    assert command.main(["--prompt", PROMPT, "--device", "cpu", "--layers", "1"]) == 0
    out, err = capfd.readouterr()
    assert err == ""
    assert re.search(r"mean loss +[\d.]+ nats over 19 tokens", out)
    data = data_of((path / "look.html").read_text())
    assert data["facts"]["checkpoint"] == "step-000007"
    assert data["maps"][0]["layers"] == [1]
    assert command.main([str(path), "--prompt", PROMPT, "--out", "sub/page.html", "--device", "cpu"]) == 0
    assert Path("sub/page.html").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere", "--prompt", "x"], "nowhere is not a run folder"),
        (["--prompt", ""], "the prompt is empty"),
        (["--prompt", "x", "--checkpoint", "step-000008"], "no checkpoint 'step-000008'"),
        (["--prompt", "x" * 33], "the prompt has 33 tokens"),
        (["--prompt", "x", "--out", "runs"], "runs cannot be written"),
        (["--prompt", "x", "--out", "runs/decoder/config.json/page.html"], "cannot be written"),
        (["--prompt", "x", "--device", "abacus"], "device 'abacus' cannot be used"),
    ],
)
def test_mistakes_on_the_command_line_are_one_sentence(
    arguments: list[str],
    message: str,
    write_run: Callable[..., Path],
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(write_run("decoder").parent.parent)
    assert command.main(arguments) == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert message in err
    assert err.count("\n") == 1


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
# Reads back what the page has drawn, then uses it as a person does: a click on a head, the arrow key on a token.
PROBE = """<script>
const weights = groups.map(group => group.layers.map((_, row) => Array.from({length: group.heads}, (_, head) => {
  const weight = group.weights(row, head);
  return group.queries.map((_, i) => group.keys.map((_, j) => weight(i, j)));
})));
const colours = [...document.querySelectorAll("canvas")].map(canvas => {
  const pixels = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
  return new Set(new Uint32Array(pixels.buffer)).size;
});
const heads = document.querySelectorAll("#thumbs button");
heads[heads.length - 1].click();
const title = find("map-title").textContent, tokens = document.querySelectorAll("#query-tokens button");
tokens[0].focus();
tokens[0].dispatchEvent(new KeyboardEvent("keydown", {key: "ArrowRight", bubbles: true}));
const reading = find("map-reading").textContent;
document.querySelectorAll("#measures button")[1].click();
const scale = find("loss-legend").textContent;
const found = {weights, colours, title, reading, legend: scale};
document.body.append(make("pre", {id: "probe"}, JSON.stringify(found)));
</script>"""


class Dom(HTMLParser):
    """The texts of the elements that have an id, and the attributes of the root."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.root: dict[str, str | None] = {}
        self.open: list[str | None] = []
        self.buttons: dict[str, list[str]] = {}
        self.texts: dict[str, str] = {}
        self.in_button = False
        self.feed(html)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        if tag == "html":
            self.root = dict(attributes)
        if tag in ("meta", "br"):
            return
        self.open.append(dict(attributes).get("id"))
        if tag == "button":
            self.in_button = True
            self.buttons.setdefault(self._place(), []).append("")

    def handle_endtag(self, tag: str) -> None:
        if tag in ("meta", "br"):
            return
        self.open.pop()
        self.in_button = self.in_button and tag != "button"

    def handle_data(self, data: str) -> None:
        self.texts[self._place()] = self.texts.get(self._place(), "") + data
        if self.in_button:
            self.buttons[self._place()][-1] += data

    def _place(self) -> str:
        return next((name for name in reversed(self.open) if name), "")


@pytest.fixture(scope="module")
def browsed(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Dom]:
    """What a page has become in a real browser, whose console must stay silent."""
    if CHROMIUM is None:
        pytest.skip("no chromium is installed here")

    folder = tmp_path_factory.mktemp("browser")

    def browse(page: str) -> Dom:
        file = folder / "page.html"
        file.write_text(page.replace("</body>", f"{PROBE}</body>"), encoding="utf-8")
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--dump-dom", "--virtual-time-budget=3000"]
        flags += ["--enable-logging=stderr", f"--user-data-dir={folder / 'profile'}", "--window-size=1000,900"]
        ran = subprocess.run([CHROMIUM, *flags, file.as_uri()], capture_output=True, text=True, timeout=180)
        assert "CONSOLE" not in ran.stderr, ran.stderr
        return Dom(ran.stdout)

    return browse


@pytest.mark.parametrize("topology", TOPOLOGIES[:3])
def test_a_browser_draws_every_token_and_every_map(
    topology: str, make_model: MakeModel, browsed: Callable[[str], Dom]
) -> None:
    look = looked(make_model(topology), target="xyz" if topology == "encoder-decoder" else None)
    dom = browsed(page_of(look, "a look", {"run": "here"}))
    assert dom.root["data-state"] == "drawn"
    assert "data-error" not in dom.root
    probe = json.loads(dom.texts["probe"])

    def spelling(side: str) -> list[str]:
        return [spelled(TOKENIZER, token) for token in look.texts[side].tokens]

    end = {"decoder": ["next?"], "encoder": []}.get(topology, ["<|endoftext|>"])
    assert dom.buttons["loss-tokens"] == spelling(look.predicted) + end
    assert dom.buttons["query-tokens"] == spelling(look.maps[0].queries)
    assert dom.buttons["key-tokens"] == spelling(look.maps[0].keys)
    for maps, drawn in zip(look.maps, probe["weights"], strict=True):
        torch.testing.assert_close(torch.tensor(drawn), maps.weights, rtol=0, atol=1 / 255)
    thumbnails = look.maps[0].weights.shape[0] * look.maps[0].weights.shape[1]
    assert len(probe["colours"]) == thumbnails + 1 + len(look.norms)
    assert min(probe["colours"]) > 3, "a canvas is blank"
    layers, heads = look.maps[0].weights.shape[:2]
    assert probe["title"] == f"{look.maps[0].title}: layer {layers - 1}, head {heads - 1}"
    assert f"{spelling(look.maps[0].queries)[1]} (1) attends to" in probe["reading"]
    assert probe["legend"].startswith("entropy, nats")
