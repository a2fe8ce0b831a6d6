"""Soft prompts: virtual tokens before every text, never dropped from the window, and trained alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minitransformer.commands import embed, export, look, merge, sample
from minitransformer.commands.train import main
from minitransformer.errors import UserError
from minitransformer.generation.config import SamplingConfig
from minitransformer.generation.decode import generate, search_each
from minitransformer.generation.speculation import Draft, speculate
from minitransformer.models.config import ModelConfig
from minitransformer.models.model import build_model
from minitransformer.runs import Run
from minitransformer.settings import with_settings
from tests.runs_for_tests import SMALL, TEXT, assert_same_weights, refused, saved_weights

SIZES: dict[str, Any] = {"d_model": 16, "num_layers": 2, "num_heads": 4, "context_length": 16, "vocab_size": 11}
CHOICES = ({}, {"positions": "learned", "scaled_embeddings": True}, {"embedding_dim": 8, "positions": "alibi"})


def prompted(tokens: list[int], **choices: Any) -> tuple[Any, Any]:
    """A model, and the same with a soft prompt of the embeddings of `tokens`."""
    config = with_settings(
        ModelConfig(), {**SIZES, "adapter": "soft-prompt", "soft_prompt_tokens": len(tokens), **choices}
    )
    soft, plain = build_model(config).eval(), build_model(config.base).eval()
    with torch.no_grad():
        for parameter in soft.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
        plain.load_state_dict({name: t for name, t in soft.state_dict().items() if name != "embedding.prompt"})
        plain, soft = plain.double(), soft.double()
        soft.embedding.prompt.copy_(plain.embedding._look_up(torch.tensor([tokens]))[0])
    return plain, soft


some_tokens = st.lists(st.integers(0, 10), min_size=1, max_size=6)


@given(some_tokens, some_tokens, st.sampled_from(CHOICES))
def test_a_soft_prompt_of_the_embeddings_of_tokens_equals_those_tokens(
    prompt: list[int], text: list[int], choices: dict[str, Any]
) -> None:
    plain, soft = prompted(prompt, **choices)
    with torch.no_grad():
        expected = plain(torch.tensor([prompt + text]))[:, len(prompt) :]
        torch.testing.assert_close(soft(torch.tensor([text])), expected)


@given(some_tokens, some_tokens, st.integers(0, 3), st.sampled_from(("encoder", "encoder-classifier")))
def test_before_the_texts_of_encoders_it_equals_those_tokens_and_padding_changes_nothing(
    prompt: list[int], text: list[int], padding: int, topology: str
) -> None:
    choices = {"num_classes": 3, "pooled": "mean"} if topology == "encoder-classifier" else {}
    plain, soft = prompted(prompt, topology=topology, num_segments=2, positions="learned", **choices)
    padded = torch.tensor([text + [0] * padding])
    is_token = torch.arange(padded.size(1))[None] < len(text)
    with torch.no_grad():
        hidden = plain.hidden_states(torch.tensor([prompt + text]))[:, len(prompt) :]
        torch.testing.assert_close(soft(padded, is_token=is_token)[:, : len(text)], plain.head(hidden)[:, : len(text)])
        torch.testing.assert_close(soft.hidden_states(padded, is_token=is_token)[:, : len(text)], hidden)


@given(some_tokens, some_tokens, some_tokens, st.integers(0, 3))
def test_before_a_source_it_equals_those_tokens_and_padding_changes_nothing(
    prompt: list[int], source: list[int], target: list[int], padding: int
) -> None:
    plain, soft = prompted(prompt, topology="encoder-decoder")
    padded, inputs = torch.tensor([source + [0] * padding]), torch.tensor([target])
    is_token = torch.arange(padded.size(1))[None] < len(source)
    with torch.no_grad():
        expected = plain(torch.tensor([prompt + source]), inputs)
        torch.testing.assert_close(soft(padded, inputs, source_is_token=is_token), expected)


@given(some_tokens, st.lists(some_tokens, min_size=1, max_size=3), st.sampled_from(CHOICES))
def test_each_of_several_texts_in_a_row_sees_it_as_if_it_were_alone(
    prompt: list[int], texts: list[list[int]], choices: dict[str, Any]
) -> None:
    _, soft = prompted(prompt, context_length=32, **choices)
    documents = [number for number, text in enumerate(texts, start=1) for _ in text]
    with torch.no_grad():
        together = soft(
            torch.tensor([[token for text in texts for token in text]]), documents=torch.tensor([documents])
        )
        alone = [soft(torch.tensor([text])) for text in texts]
    torch.testing.assert_close(together, torch.cat(alone, dim=1))


@given(some_tokens, some_tokens)
def test_it_continues_a_text_as_those_tokens_before_it_would(prompt: list[int], text: list[int]) -> None:
    plain, soft = prompted(prompt)
    sampling = SamplingConfig(max_new_tokens=16 - len(prompt + text) + 1, temperature=0.0)
    assert list(generate(soft, text, sampling)) == list(generate(plain, prompt + text, sampling))


@pytest.mark.unchecked_shapes
@settings(max_examples=15)
@given(some_tokens, st.integers(17, 40), st.integers(0, 3))
def test_it_is_never_dropped_from_the_window(prompt: list[int], most: int, seed: int) -> None:
    """Past the context, every way to decode sees the prompt and the newest tokens after it."""
    torch.manual_seed(seed)
    _, soft = prompted(prompt)
    greedy = SamplingConfig(max_new_tokens=most, temperature=0.0)
    expected = [token for [token] in generate(soft, [1, 2], greedy, cached=False)]
    assert [token for [token] in generate(soft, [1, 2], greedy)] == expected
    [drafted] = speculate(soft, Draft(soft, 3), [1, 2], greedy)
    assert [token for some in drafted for token in some] == expected
    beams = SamplingConfig(max_new_tokens=most, num_beams=2)
    [cached], [uncached] = (list(search_each(soft, [[1, 2]], beams, cached=cached)) for cached in (True, False))
    assert cached == uncached


@pytest.mark.parametrize(
    ("choices", "words"),
    [
        ({"soft_prompt_tokens": 16}, ["16 virtual tokens", "context of 16", "no room"]),
        ({"topology": "rnn", "soft_prompt_tokens": 2}, ["adapter has no effect without topology"]),
    ],
)
def test_a_prompt_that_does_not_fit_is_refused_in_one_sentence(choices: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        build_model(with_settings(ModelConfig(), {**SIZES, "adapter": "soft-prompt", **choices}))
    assert all(word in str(caught.value) for word in words), str(caught.value)


# --- runs

FLAGS = ["--data", "my.txt", "--device", "cpu", "--compile", "off", "--precision", "fp32", "--save-every", "2"]
SOFT = ["--init-from", "base", "--adapter", "soft-prompt", "--soft-prompt-tokens", "3", *FLAGS]


@pytest.fixture
def base(here: Path, capsys: Any) -> Path:
    assert main(["gpt-nano", "--out", "base", "--data", "my.txt", "--steps", "4", *SMALL]) == 0
    (here / "my.txt").write_text(TEXT[2000:] * 2)
    capsys.readouterr()
    return here / "base"


@pytest.mark.unchecked_shapes
def test_a_run_saves_the_prompt_alone_and_resumes_bit_for_bit(base: Path, here: Path, capsys: Any) -> None:
    flags = [*SOFT, "--schedule", "constant"]
    assert main([*flags, "--out", "whole", "--steps", "4"]) == 0
    assert main([*flags, "--out", "parts", "--steps", "2"]) == 0
    assert main(["--resume", "parts", "--steps", "4"]) == 0
    stored = saved_weights(here / "whole")
    assert stored.keys() == {"embedding.prompt"}
    assert_same_weights(stored, saved_weights(here / "parts"))
    assert Run.open(here / "whole").config.sequence_length == 13
    model = Run.open(here / "whole").load_model("latest")
    theirs = Run.open(base).load_model().state_dict()
    assert_same_weights({**theirs, **stored}, model.state_dict())
    capsys.readouterr()
    assert sample.main(["whole", "--prompt", "Line", "--max-new-tokens", "30", "--seed", "1"]) == 0
    assert "the model sees 13 tokens" in capsys.readouterr().err


@pytest.mark.unchecked_shapes
def test_it_begins_with_the_embeddings_of_tokens(base: Path, here: Path) -> None:
    assert main([*SOFT, "--out", "soft", "--steps", "1"]) == 0
    table = Run.open(base).load_model().state_dict()["embedding.table.weight"]
    for row in saved_weights(here / "soft", "step-000000")["embedding.prompt"]:
        assert (table == row).all(dim=1).any()


@pytest.mark.unchecked_shapes
def test_what_would_lose_the_prompt_is_refused(base: Path, here: Path, capsys: Any) -> None:
    assert main([*SOFT, "--out", "soft", "--steps", "1"]) == 0
    for command, flags in (
        (merge.main, ["soft", "--out", "x"]),
        (export.main, ["soft", "--to", "x"]),
        (embed.main, ["soft", "--data", "my.txt", "--out", "x.jsonl"]),
        (look.main, ["soft", "--prompt", "Line"]),
        (main, ["--init-from", "soft", *FLAGS]),
    ):
        assert "soft has adapter 'soft-prompt'" in refused(capsys, *flags, main=command)
    assert "of which 3 tokens are the prompt's" in refused(capsys, *SOFT, "--sequence-length", "14")
