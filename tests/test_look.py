"""`look`: what is measured equals what the model computes, and the page shows it in a real browser, from disk."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from minitransformer.analysis import look as looking
from minitransformer.analysis.look_record import Look, watched
from minitransformer.architecture.residual import Residual
from minitransformer.errors import UserError
from tests.looks_for_tests import END, PROMPT, TOKENIZER, TOPOLOGIES, MakeModel, looked
from tests.placements_for_tests import choosing


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
    assert "model's own output" in look.remarks[0]


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
        ("decoder", "x" * 33, {}, "the prompt has 33 tokens, and the model reads at most 32: .* --last 32"),
        ("encoder", "x" * 32, {}, "the prompt has 32 tokens, and the model reads at most 31: .* --last 31"),
        ("encoder-decoder", "x" * 32, {}, "the prompt has 32 tokens, and the model reads at most 31"),
        ("encoder-decoder", "x", {"target": "y" * 32}, "the target has 32 tokens, and the model generates at most 31"),
        ("encoder-decoder", "a\nb", {}, "one line, not 2"),
        ("encoder-decoder", "", {}, "one line, not 0"),
        ("decoder", "x", {"target": "y"}, "--target needs an encoder-decoder, not topology 'decod"),
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
