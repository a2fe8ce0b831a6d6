"""Public checkpoints give the logits of the reference implementation, and go back to it bit for bit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

pytest.importorskip("transformers", reason="the reference implementation is not installed")

from minitransformer import pretrained
from minitransformer.errors import UserError
from minitransformer.generation.decode import generate, translate
from minitransformer.generation.processors import SamplingConfig
from minitransformer.models.config import ModelConfig
from minitransformer.models.model import build_model
from minitransformer.pretrained.families import Family
from tests.hugging_face import VARIANTS, VOCAB, reference

BATCH, SOURCE, TARGET = 3, 11, 7
# Their position embeddings count padding too; they take no positions, so ours are told to do the same.
COUNT_PADDING = {"bert", "bert-classes", "distilbert", "distilbert-classes", "bart", "marian"}
TAKE_POSITIONS = {"gpt2", "gptj"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The folder of each variant's checkpoint, written by the reference implementation."""
    root = tmp_path_factory.mktemp("checkpoints")

    def folder(variant: str) -> Path:
        path = root / variant
        if not path.exists():
            reference(variant).save_pretrained(path)
        return path

    return folder


def padding(side: str, length: int) -> Tensor:
    """Where the real tokens are: rows of different lengths, padded on one side."""
    lengths = torch.tensor([length, length - 3, length - 5])[:, None]
    places = torch.arange(length)
    return places < lengths if side == "right" else places >= length - lengths


def differences(variant: str, ours: Any, theirs: Any, side: str) -> tuple[Tensor, Tensor]:
    """Logits of both at the real tokens."""
    torch.manual_seed(1)
    # Padding has a token id that stands for it in some families; the others have to ignore it by the mask.
    pad = theirs.config.pad_token_id if theirs.config.pad_token_id is not None else 0
    pad = pad if 0 <= pad < VOCAB else 0
    tokens, targets = (torch.randint(5, VOCAB - 5, (BATCH, length)) for length in (SOURCE, TARGET))
    if side == "none":
        with torch.no_grad():
            if theirs.config.is_encoder_decoder:
                expected = theirs(input_ids=tokens, decoder_input_ids=targets).logits
                return ours(tokens, targets).flatten(0, 1), expected.flatten(0, 1)
            return ours(tokens).flatten(0, -2), theirs(input_ids=tokens).logits.flatten(0, -2)
    is_token = padding(side, SOURCE)
    tokens = tokens.where(is_token, pad)
    positions = torch.arange(SOURCE)[None] if variant in COUNT_PADDING else None
    with torch.no_grad():
        if theirs.config.is_encoder_decoder:
            is_target = padding(side, TARGET)
            expected = theirs(
                input_ids=tokens,
                attention_mask=is_token.long(),
                decoder_input_ids=targets,
                decoder_attention_mask=is_target.long(),
            ).logits
            memory = ours.encode(tokens, is_token=is_token, positions=positions)
            target_positions = None if positions is None else torch.arange(TARGET)[None]
            hidden = ours.hidden_states(targets, memory, is_token=is_target, positions=target_positions)
            return ours.head(hidden)[is_target], expected[is_target]
        extra = {}
        if variant in TAKE_POSITIONS:
            extra["position_ids"] = (is_token.long().cumsum(-1) - 1).clamp(min=0)
        expected = theirs(input_ids=tokens, attention_mask=is_token.long(), **extra).logits
        actual = ours(tokens, is_token=is_token, positions=positions)
    return (actual, expected) if expected.dim() == 2 else (actual[is_token], expected[is_token])


def relative(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).abs().max() / b.double().std())


@pytest.mark.parametrize("side", ["none", "right", "left"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_are_those_of_the_reference(variant: str, side: str, folders: Any) -> None:
    if side == "left" and variant.endswith("-classes"):
        pytest.skip("the reference reads the class from the first place, which is padding there")
    theirs, (ours, _) = reference(variant), pretrained.load(folders(variant))
    actual, expected = differences(variant, ours, theirs, side)
    exact_ours, exact = differences(variant, ours.double(), theirs.double(), side)
    assert relative(actual, expected) <= max(2e-5, 6 * relative(expected, exact))
    # Several references turn rotary positions, or sum RMS norms, in float32 whatever the model's type; those of Gemma-2
    # and Bloom make NaN of padding in float64.
    assert relative(exact_ours, exact) <= 1e-5 or (exact.isnan().any() and variant in ("gemma2", "bloom"))
    assert exact_ours.isfinite().all()


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_is_saved_opens_with_the_reference_and_comes_back_bit_for_bit(
    variant: str, folders: Any, tmp_path: Path
) -> None:
    theirs, (ours, _) = reference(variant), pretrained.load(folders(variant))
    family = theirs.config.model_type
    pretrained.save(ours, tmp_path / "out", family)
    opened = type(theirs).from_pretrained(tmp_path / "out").eval()
    if variant == "mixtral":
        opened.set_experts_implementation("eager")
    torch.manual_seed(2)
    tokens = torch.randint(5, VOCAB - 5, (2, 9))
    inputs = {"input_ids": tokens} | ({"decoder_input_ids": tokens} if theirs.config.is_encoder_decoder else {})
    with torch.no_grad():
        assert relative(opened(**inputs).logits, theirs(**inputs).logits) < 1e-6
    again, _ = pretrained.load(tmp_path / "out")
    assert Family.named(family).hf_config(again.config) == Family.named(family).hf_config(ours.config)
    for (name, left), (_, right) in zip(ours.named_parameters(), again.named_parameters(), strict=True):
        assert torch.equal(left, right), name


def test_every_family_has_a_variant_here() -> None:
    assert {reference(variant).config.model_type for variant in VARIANTS} == set(Family.registry)


# Decoding


GENERATION = [
    {"num_beams": 1},
    {"num_beams": 4},
    {"num_beams": 4, "length_penalty": 0.6},
    {"num_beams": 3, "length_penalty": 2.0, "no_repeat_ngram_size": 2},
    {"num_beams": 2, "min_new_tokens": 5, "repetition_penalty": 1.3},
    {"num_beams": 4, "num_return_sequences": 3},
]


def sampling(settings: dict[str, Any]) -> SamplingConfig:
    return SamplingConfig(
        temperature=0,
        max_new_tokens=10,
        num_beams=settings["num_beams"],
        num_samples=settings.get("num_return_sequences", 1),
        length_penalty=settings.get("length_penalty", 1.0),
        no_repeat_ngram=settings.get("no_repeat_ngram_size"),
        min_new_tokens=settings.get("min_new_tokens", 0),
        repetition_penalty=settings.get("repetition_penalty", 1.0),
    )


@pytest.mark.parametrize("settings", GENERATION, ids=str)
@pytest.mark.parametrize("variant", ["t5-1.1", "bart", "marian"])
def test_encoder_decoders_write_what_the_reference_writes(variant: str, settings: dict[str, Any], folders: Any) -> None:
    theirs, (ours, _) = reference(variant).double(), pretrained.load(folders(variant))
    start, end = 2, 7
    torch.manual_seed(3)
    source = torch.randint(8, VOCAB - 5, (2, 6))
    options = {
        "max_new_tokens": 10,
        "do_sample": False,
        "early_stopping": False,
        "eos_token_id": end,
        "pad_token_id": 0,
    }
    theirs.generation_config.forced_eos_token_id = theirs.generation_config.bad_words_ids = None
    theirs.generation_config.forced_bos_token_id = None
    found = theirs.generate(source, decoder_start_token_id=start, **options, **settings)
    expected = [row[1 : row.index(end)] if end in row else row[1:] for row in found.tolist()]
    texts = translate(ours.double(), source.tolist(), sampling(settings), start=start, end_of_text=end)
    longest = max(map(len, expected))
    actual = [tokens for text in texts for tokens in text]
    assert [tokens[:longest] for tokens in actual] == [
        unpadded(row, tokens) for row, tokens in zip(expected, actual, strict=True)
    ]


def unpadded(row: list[int], like: list[int]) -> list[int]:
    """`row` without the padding that the reference puts after texts that ended in no end token."""
    return row[: len(like)] if row[len(like) :] == [0] * (len(row) - len(like)) else row


@pytest.mark.parametrize("variant", ["gpt2", "llama"])
def test_decoders_write_what_the_reference_writes_greedily(variant: str, folders: Any) -> None:
    theirs, (ours, _) = reference(variant).double(), pretrained.load(folders(variant))
    prompt = [9, 8, 30, 12]
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": 63, "pad_token_id": 0}
    expected = theirs.generate(torch.tensor([prompt]), **options)[0, 4:].tolist()
    steps = generate(ours.double(), prompt, SamplingConfig(0, max_new_tokens=12), end_of_text=63)
    assert [token for [token] in steps] == expected


# What cannot be opened or held


def changed(folder: Path, to: Path, change: Any) -> Path:
    """A copy of a checkpoint whose tensors went through `change`."""
    shutil.copytree(folder, to)
    tensors = load_file(to / "model.safetensors")
    change(tensors)
    save_file(tensors, to / "model.safetensors")
    return to


def test_all_that_does_not_fit_is_reported_together(folders: Any, tmp_path: Path) -> None:
    def break_it(tensors: dict[str, Tensor]) -> None:
        del tensors["transformer.h.0.ln_1.weight"]
        tensors["transformer.h.1.mlp.c_fc.bias"] = torch.zeros(5)
        tensors["transformer.stranger"] = torch.zeros(1)

    folder = changed(folders("gpt2"), tmp_path / "broken", break_it)
    with pytest.raises(UserError) as caught:
        pretrained.load(folder)
    assert "transformer.h.0.ln_1.weight is missing" in str(caught.value)
    assert "transformer.h.1.mlp.c_fc.bias has the shape [5] where [128] is needed" in str(caught.value)
    assert "transformer.stranger is not expected" in str(caught.value)


def test_a_second_copy_of_a_tied_weight_must_be_the_same(folders: Any, tmp_path: Path) -> None:
    def copy(tensors: dict[str, Tensor]) -> None:
        tensors["lm_head.weight"] = tensors["transformer.wte.weight"].clone()

    def other(tensors: dict[str, Tensor]) -> None:
        tensors["lm_head.weight"] = tensors["transformer.wte.weight"] + 1

    pretrained.load(changed(folders("gpt2"), tmp_path / "copy", copy))
    with pytest.raises(UserError, match=r"lm_head\.weight is not"):
        pretrained.load(changed(folders("gpt2"), tmp_path / "other", other))


def test_shards_are_read_together_and_a_missing_one_is_named(folders: Any, tmp_path: Path) -> None:
    reference("gpt2").save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    shards = sorted((tmp_path / "sharded").glob("model-*.safetensors"))
    assert len(shards) > 2
    whole, _ = pretrained.load(folders("gpt2"))
    parts, _ = pretrained.load(tmp_path / "sharded")
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), parts.parameters(), strict=True))
    shards[1].unlink()
    with pytest.raises(UserError, match=f"lacks {shards[1].name}, which model.safetensors.index.json names"):
        pretrained.load(tmp_path / "sharded")


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("config.json", '{"model_type": "gpt5"}', "unknown model_type 'gpt5': .*known are .*gpt2.*llama"),
        ("config.json", "{", "config.json is damaged"),
        ("model.safetensors", "no tensors", "model.safetensors is no whole safetensors file"),
    ],
)
def test_a_folder_that_is_no_checkpoint_gets_one_sentence(
    name: str, content: str, sentence: str, folders: Any, tmp_path: Path
) -> None:
    shutil.copytree(folders("gpt2"), tmp_path / "bad")
    (tmp_path / "bad" / name).write_text(content)
    with pytest.raises(UserError, match=sentence):
        pretrained.load(tmp_path / "bad")


def test_a_pickle_is_refused(folders: Any, tmp_path: Path) -> None:
    shutil.copytree(folders("gpt2"), tmp_path / "old")
    (tmp_path / "old" / "model.safetensors").rename(tmp_path / "old" / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"pytorch_model\.bin is a pickle, which may run any code"):
        pretrained.load(tmp_path / "old")


def test_a_name_without_a_network_gets_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def offline(*args: Any, **options: Any) -> None:
        raise ConnectionError("no route to host")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(UserError, match=r"the hub gives nothing \(no route to host\): check name and network"):
        pretrained.load("some-one/some-model")


@pytest.mark.parametrize(
    ("family", "changes", "sentence"),
    [
        ("gpt2", {"residual": "post"}, "residual is 'post', and gpt2 can only hold 'pre'"),
        ("gpt2", {"positions": "rotary"}, "positions is 'rotary', and gpt2 can only hold 'learned'"),
        ("gpt2", {"feedforward": "squared-relu"}, "feedforward is 'squared-relu', and gpt2 can only hold 'relu' or"),
        ("gpt2", {"num_kv_heads": 2}, "num_kv_heads is 2, and gpt2 can only hold 4"),
        ("bert", {}, "topology is 'decoder', and bert can only hold 'encoder' or 'encoder-classifier'"),
    ],
)
def test_a_family_refuses_what_it_cannot_hold_and_names_the_field(
    family: str, changes: dict[str, Any], sentence: str, tmp_path: Path
) -> None:
    shape = {"d_model": 32, "num_heads": 4, "num_layers": 1, "vocab_size": 20, "context_length": 8}
    config = ModelConfig(**{**shape, "positions": "learned", "bias": True, **changes})
    with pytest.raises(UserError) as caught:
        pretrained.save(build_model(config), tmp_path / "out", family)
    assert sentence in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_older_spellings_of_rotary_positions_mean_the_same() -> None:
    shape = {"vocab_size": 9, "max_position_embeddings": 8, "hidden_size": 32, "num_hidden_layers": 1}
    shape |= {"num_attention_heads": 4, "intermediate_size": 8, "model_type": "llama"}
    old = {**shape, "rope_theta": 500.0, "rope_scaling": {"type": "linear", "factor": 4.0}}
    new = {**shape, "rope_parameters": {"rope_type": "linear", "rope_theta": 500.0, "factor": 4.0}}
    llama, neox = Family.named("llama"), Family.named("gpt_neox")
    assert llama.model_config(old) == llama.model_config(new)
    assert llama.model_config(old).rotary_factor == 4.0
    assert neox.model_config({**shape, "rotary_pct": 0.5}).rotary_fraction == 0.5
    assert neox.model_config(shape).rotary_fraction == 0.25


def test_the_configuration_of_a_file_is_json_that_says_the_family(folders: Any, tmp_path: Path) -> None:
    model, _ = pretrained.load(folders("opt-350m"))
    pretrained.save(model, tmp_path / "out", "opt")
    content = json.loads((tmp_path / "out" / "config.json").read_text())
    assert content["model_type"] == "opt"
    assert content["do_layer_norm_before"] is False
    assert content["word_embed_proj_dim"] == 16
