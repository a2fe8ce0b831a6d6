"""`look`: what is measured equals what the model computes, and the page shows it in a real browser, from disk."""

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
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from minitransformer.analysis import look as looking
from minitransformer.analysis.look import look_at
from minitransformer.analysis.look_record import AttentionMaps, Look, LookRequest, Text
from minitransformer.analysis.viewer import page_of, quantise_weights, restored, spelled, visible
from minitransformer.analysis.watched import watched
from minitransformer.architecture.residual import Residual
from minitransformer.commands import look as command
from minitransformer.errors import UserError
from minitransformer.models.config import ModelConfig
from minitransformer.models.model import Model, build_model
from minitransformer.runs import Run
from minitransformer.text.tokenizers import MASK, Bytes
from minitransformer.training.checkpoint import write_checkpoint
from minitransformer.training.config import DataConfig, RunConfig, TrainingConfig
from tests.placements_for_tests import choosing

TOKENIZER = Bytes().with_special_tokens([MASK])
END = TOKENIZER.end_of_text
PROMPT = "Naïve </script> a\tb"
TOPOLOGIES = ("decoder", "encoder", "encoder-decoder", "rnn")
MakeModel = Callable[..., Model]


@pytest.fixture(scope="session")
def make_model(shake: Callable[[Model], Model]) -> MakeModel:
    """Makes a model of the given topology and choices, small, in float64 and eval mode, with shaken weights."""

    def make(topology: str, **choices: Any) -> Model:
        sizes: dict[str, Any] = {"d_model": 16, "num_layers": 2, "num_heads": 2, "context_length": 32}
        torch.manual_seed(0)
        config = ModelConfig(topology=topology, vocab_size=TOKENIZER.vocab_size, **{**sizes, **choices})
        return shake(build_model(config)).double().eval()

    return make


def looked(model: Model, prompt: str = PROMPT, **choices: Any) -> Look:
    return look_at(model, LookRequest(prompt, **choices), TOKENIZER, TOKENIZER)


def losses_by_place(look: Look) -> dict[int, float]:
    return {prediction.place: prediction.loss for prediction in look.predictions if prediction.loss is not None}


@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_rows_of_every_map_sum_to_one_and_there_is_one_for_each_layer_and_head(
    topology: str, make_model: MakeModel
) -> None:
    look = looked(make_model(topology))
    for maps in look.maps:
        lengths = len(look.texts[maps.queries].tokens), len(look.texts[maps.keys].tokens)
        assert maps.weights.shape == ((1, 1) if topology == "rnn" else (2, 2)) + lengths
        torch.testing.assert_close(maps.weights.sum(-1), torch.ones(maps.weights.shape[:-1]))
    titles = {"encoder-decoder": ["Encoder", "Decoder", "Decoder to encoder"], "rnn": ["Alignment"]}
    assert [maps.title for maps in look.maps] == titles.get(topology, ["Self-attention"])


@pytest.mark.parametrize("topology", TOPOLOGIES[:3])
def test_a_causal_map_has_no_weight_on_the_future_and_every_other_has(topology: str, make_model: MakeModel) -> None:
    for maps in looked(make_model(topology)).maps:
        is_causal = topology == "decoder" or maps.title == "Decoder"
        assert bool((maps.weights.triu(1) == 0).all()) == is_causal, maps.title


def test_losses_of_a_decoder_are_the_cross_entropy_of_its_logits(make_model: MakeModel) -> None:
    model = make_model("decoder")
    tokens = torch.tensor([TOKENIZER.encode(PROMPT)])
    expected = F.cross_entropy(model(tokens)[0, :-1], tokens[0, 1:], reduction="none")
    look = looked(model)
    assert losses_by_place(look) == pytest.approx(dict(enumerate(expected.tolist(), start=1)), rel=1e-12)
    assert look.predictions[-1].place == tokens.size(1)
    assert look.predictions[-1].token is None


def test_entropy_and_guesses_are_those_of_the_predicted_distribution(make_model: MakeModel) -> None:
    model = make_model("decoder")
    logits = model(torch.tensor([TOKENIZER.encode(PROMPT)]))[0].detach()
    expected = torch.distributions.Categorical(logits=logits)
    for row, prediction in enumerate(looked(model).predictions):
        assert prediction.entropy == pytest.approx(float(expected.entropy()[row]))
        shares, ids = expected.probs[row].sort(descending=True)
        assert [token for token, _ in prediction.guesses] == ids[:5].tolist()
        assert [share for _, share in prediction.guesses] == pytest.approx(shares[:5].tolist())


def test_a_token_of_an_encoder_is_predicted_while_it_alone_is_masked(make_model: MakeModel) -> None:
    model = make_model("encoder")
    text = [END, *TOKENIZER.encode(PROMPT)]
    expected = {}
    for place in range(1, len(text)):
        hidden = torch.tensor([[*text[:place], TOKENIZER.mask, *text[place + 1 :]]])
        expected[place] = F.cross_entropy(model(hidden)[0, place], torch.tensor(text[place])).item()
    assert losses_by_place(looked(model)) == pytest.approx(expected, rel=1e-12)


def test_a_mask_in_the_text_is_guessed_and_has_no_loss(make_model: MakeModel) -> None:
    look = looked(make_model("encoder"), "ab<mask>c")
    assert list(look.texts["text"].tokens) == [END, 97, 98, TOKENIZER.mask, 99]
    assert [prediction.place for prediction in look.predictions] == [1, 2, 3, 4]
    assert sorted(losses_by_place(look)) == [1, 2, 4]
    assert len(look.predictions[2].guesses) == 5


def test_a_given_target_is_teacher_forced(make_model: MakeModel) -> None:
    model = make_model("encoder-decoder")
    source, target = [*TOKENIZER.encode("ab c"), END], [*TOKENIZER.encode("xyz"), END]
    logits = model(torch.tensor([source]), torch.tensor([[END, *target[:-1]]]))[0]
    expected = F.cross_entropy(logits, torch.tensor(target), reduction="none")
    look = looked(model, "ab c\n", target="xyz")
    assert losses_by_place(look) == pytest.approx(dict(enumerate(expected.tolist(), start=1)), rel=1e-12)
    assert "teacher forcing" in look.remarks[0]


@pytest.mark.parametrize("topology", ["encoder-decoder", "rnn"])
def test_without_a_target_it_is_what_the_model_itself_finds_likeliest(topology: str, make_model: MakeModel) -> None:
    look = looked(make_model(topology), "ab c")
    written = [prediction for prediction in look.predictions if prediction.token != END]
    assert written
    assert all(prediction.token == prediction.guesses[0][0] for prediction in written)
    assert "itself writes" in look.remarks[0]


def test_the_classes_of_a_classifier_are_said(make_model: MakeModel) -> None:
    look = looked(make_model("encoder-classifier", num_classes=3))
    assert look.predictions == []
    shares = [float(share) for share in re.findall(r"\d: ([\d.]+)%", look.remarks[0])]
    assert sum(shares) == pytest.approx(100, abs=0.2)
    assert len(shares) == 3


@pytest.mark.parametrize("topology", TOPOLOGIES[:3])
def test_norms_are_those_of_the_stream_before_the_first_block_and_after_each(
    topology: str, make_model: MakeModel
) -> None:
    # With Post-LN and rotary positions, the stream begins as the embeddings and ends as the output of the stack.
    model = make_model(topology, residual="post", positions="rotary")
    look = looked(model, target="xyz" if topology == "encoder-decoder" else None)
    tokens = {name: torch.tensor([text.tokens]) for name, text in look.texts.items()}
    for group in look.norms:
        assert group.norms.shape == (3, tokens[group.text].size(1))
        embedded = model.embedding(tokens[group.text])[0]
        torch.testing.assert_close(group.norms[0], embedded.norm(dim=-1).float())
    if topology == "encoder-decoder":
        memory = model.encode(tokens["source"])
        outputs = [memory.values, model.hidden_states(tokens["target"], memory)]
    else:
        outputs = [model.hidden_states(tokens["text"])]
    for group, output in zip(look.norms, outputs, strict=True):
        torch.testing.assert_close(group.norms[-1], output[0].norm(dim=-1).float())


@pytest.mark.parametrize("residual", sorted(Residual.registry))
def test_every_norm_placement_can_be_looked_at(residual: str, make_model: MakeModel) -> None:
    model = make_model("decoder", d_model=16, **{"num_layers": 2} | choosing(residual))
    [group] = looked(model).norms
    assert group.norms.shape == (model.config.num_layers + 1, len(TOKENIZER.encode(PROMPT)))
    assert (group.norms > 0).all()


def test_looking_changes_nothing_and_leaves_no_hook(make_model: MakeModel) -> None:
    model = make_model("encoder-decoder").train()
    tokens = torch.tensor([[1, 2, 3]])
    kernel = model.encoder.blocks[0].attention.kernel
    with watched(model):
        seen = model(tokens, tokens)
    assert model.training
    assert model.encoder.blocks[0].attention.kernel is kernel
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    torch.testing.assert_close(seen, model.eval()(tokens, tokens), rtol=0, atol=0)


def test_only_the_layers_that_are_asked_for_are_kept(make_model: MakeModel) -> None:
    model = make_model("encoder-decoder", num_layers=3, num_decoder_layers=2)
    everything, some = looked(model, "ab"), looked(model, "ab", layers=(2, 1))
    assert [maps.layers for maps in some.maps] == [[1, 2], [1], [1]]
    torch.testing.assert_close(some.maps[0].weights, everything.maps[0].weights[1:], rtol=0, atol=0)


def test_the_last_tokens_of_a_prompt_are_read_alone(make_model: MakeModel) -> None:
    model = make_model("decoder")
    assert looked(model, "x" * 100 + "abc", last=3).predictions == looked(model, "abc").predictions


@pytest.mark.parametrize(
    ("topology", "prompt", "choices", "message"),
    [
        ("decoder", "", {}, "the prompt is empty"),
        ("decoder", "x" * 33, {}, "the prompt has 33 tokens, and the model sees 32 .* --last 32"),
        ("encoder", "x" * 32, {}, "the prompt has 32 tokens, and the model sees 31 .* --last 31"),
        ("encoder-decoder", "x" * 32, {}, "the prompt has 32 tokens, and the model sees 31"),
        ("encoder-decoder", "x", {"target": "y" * 32}, "the target has 32 tokens, and the model writes 31"),
        ("encoder-decoder", "a\nb", {}, "one line, and this has 2"),
        ("encoder-decoder", "", {}, "one line, and this has 0"),
        ("decoder", "x", {"target": "y"}, "--target is for models that translate, and this one is of topology 'decod"),
        ("decoder", "x", {"layers": (0, 2)}, "there is no layer 2: the layers of this model are 0 to 1"),
        ("decoder", "x", {"last": 0}, "last is 0"),
    ],
)
def test_what_cannot_be_looked_at_is_one_sentence(
    topology: str, prompt: str, choices: dict[str, Any], message: str, make_model: MakeModel
) -> None:
    with pytest.raises(UserError, match=message):
        looked(make_model(topology), prompt, **choices)


def test_more_weights_than_a_page_holds_are_refused_before_they_are_computed(
    make_model: MakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model("decoder")
    monkeypatch.setattr(looking, "MAX_WEIGHTS", 2 * 10 * 10)
    assert looked(model, "x" * 10, layers=(1,)).maps
    with pytest.raises(UserError, match="choose layers with --layers, or fewer tokens with --last"):
        looked(model, "x" * 10)


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
