"""Every public family against the `transformers` library, on tiny members with random weights: logits and files."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from minitransformer import pretrained, settings
from minitransformer.exporting.library import OUTPUTS
from minitransformer.models.config import ModelConfig
from minitransformer.models.decoder import DecoderLM
from minitransformer.models.encoder import EncoderClassifier, EncoderLM
from minitransformer.models.encoder_decoder import EncoderDecoder
from minitransformer.models.model import Model, build_model
from minitransformer.pretrained.families import Family
from minitransformer.pretrained.shards import write_shards
from tests.members_for_tests import FLOAT32, LENGTH, MEMBERS, PADDING, TARGET_LENGTH, VOCABULARY, Member, public

# The reference computes norms and rotations in float32, whatever the weights are.
FLOAT64 = 1e-5


every_member = pytest.mark.parametrize("name", MEMBERS)


@pytest.fixture(scope="module", autouse=True)
def transformers() -> Any:
    library = pytest.importorskip("transformers")
    library.logging.set_verbosity_error()
    library.logging.disable_progress_bar()
    return library


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("public")


def padded(side: str, length: int, texts: int = 3) -> tuple[Tensor, Tensor]:
    """Random tokens for some texts, two of them padded on a side, and where the real ones are."""
    is_token = torch.ones(texts, length, dtype=torch.bool)
    for row, missing in ((0, 3), (2, 1)):
        if side == "left":
            is_token[row, :missing] = False
        elif side == "right":
            is_token[row, length - missing :] = False
    tokens = torch.randint(4, VOCABULARY - 1, (texts, length))
    return tokens.masked_fill(~is_token, PADDING), is_token


@dataclass(frozen=True)
class Inputs:
    """What both models read: tokens and where they are real, for an encoder-decoder of both sides."""

    tokens: Tensor
    is_token: Tensor
    targets: Tensor
    target_is_token: Tensor

    def of_reference(self, model: nn.Module, member: Member) -> Tensor:
        mine: dict[str, Tensor] = {"input_ids": self.tokens, "attention_mask": self.is_token.long()}
        if member.two_sided:
            mine |= {"decoder_input_ids": self.targets, "decoder_attention_mask": self.target_is_token.long()}
        output = model(**mine)
        return next(output[name] for name in OUTPUTS if name in output)

    def of_ours(self, model: Model, member: Member) -> Tensor:
        source, target = self._places(self.tokens, member), self._places(self.targets, member)
        if isinstance(model, EncoderDecoder):
            memory = model.encode(self.tokens, is_token=self.is_token, positions=source)
            hidden = model.hidden_states(self.targets, memory, is_token=self.target_is_token, positions=target)
            return model.head(hidden)
        read = model.token_logits if isinstance(model, EncoderLM) else model
        return read(self.tokens, is_token=self.is_token, positions=source)

    def _places(self, tokens: Tensor, member: Member) -> Tensor | None:
        return None if member.counts_tokens else torch.arange(tokens.size(1))[None]

    def where_tokens_are(self, logits: Tensor, model: Model) -> Tensor:
        if isinstance(model, EncoderClassifier):
            return logits
        return logits[self.target_is_token if isinstance(model, EncoderDecoder) else self.is_token]


def error(ours: Tensor, theirs: Tensor) -> float:
    return float((ours.double() - theirs.double()).abs().max() / theirs.double().std())


# The library has no other attention for these, and takes its softmax in float32, where doubles at padding become NaN.
BY_HAND_ALONE = ("bloom", "gemma2")


SIDES = {"none": ("none", "none"), "right": ("right", "right"), "left": ("left", "left"), "both": ("right", "left")}


def sides_of(member: Member) -> list[str]:
    if "Classification" in member.architecture:
        return ["none", "right"]  # with padding on the left, the reference classifies that
    return list(SIDES) if member.two_sided else ["none", "right", "left"]


@torch.inference_mode()
@pytest.mark.parametrize(
    ("name", "sides"), [(name, sides) for name, member in MEMBERS.items() for sides in sides_of(member)]
)
def test_logits_are_those_of_the_reference(name: str, sides: str, folder: Path) -> None:
    member = MEMBERS[name]
    theirs, path = public(name, folder)
    ours, _ = pretrained.load(path)
    source_side, target_side = SIDES[sides]
    inputs = Inputs(*padded(source_side, LENGTH, member.texts), *padded(target_side, TARGET_LENGTH))

    def logits(our_model: Model, their_model: nn.Module) -> tuple[Tensor, Tensor]:
        pair = inputs.of_ours(our_model, member), inputs.of_reference(their_model, member)
        return inputs.where_tokens_are(pair[0], our_model), inputs.where_tokens_are(pair[1], our_model)

    our_logits, their_logits = logits(ours, theirs)
    tolerance = FLOAT32
    if sides != "left" or not name.startswith(BY_HAND_ALONE):
        exact = copy.deepcopy(theirs).double()
        if not name.startswith(BY_HAND_ALONE):
            exact.set_attn_implementation("sdpa")
        exact_ours, exact_theirs = logits(ours.double(), exact)
        assert error(exact_ours, exact_theirs) <= FLOAT64
        tolerance = max(tolerance, 6 * error(their_logits, exact_theirs))
    assert error(our_logits, their_logits) <= tolerance


@torch.inference_mode()
@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_a_context_beyond_the_original_length_has_the_logits_of_a_text_that_fills_it(
    kind: str, folder: Path, transformers: Any, tmp_path: Path
) -> None:
    theirs = copy.deepcopy(public({"dynamic": "llama dynamic", "longrope": "phi3 longrope"}[kind], folder)[0])
    theirs.config.max_position_embeddings = theirs.config.original_max_position_embeddings = LENGTH // 2
    theirs.config.rope_parameters["original_max_position_embeddings"] = LENGTH // 2
    theirs.config.rope_parameters |= {"attention_factor": 1.2} if kind == "longrope" else {}
    theirs.save_pretrained(tmp_path)  # type: ignore[operator]
    reference = type(theirs).from_pretrained(tmp_path, attn_implementation="eager").eval()  # type: ignore[attr-defined]
    short, _ = pretrained.load(tmp_path)
    ours = build_model(settings.with_settings(short.config, {"context_length": LENGTH})).eval()
    ours.load_state_dict(short.state_dict())
    tokens = torch.randint(4, VOCABULARY, (2, LENGTH))
    assert error(ours(tokens), reference(input_ids=tokens).logits) <= FLOAT32
    assert error(short(tokens), reference(input_ids=tokens).logits) > 100 * FLOAT32


GELUS = {"gelu": "gelu-tanh", "gelu-tanh": "gelu", "geglu-tanh": "geglu"}


# Numbers that only some families have.
FACTORS = (
    "attention_scale",
    "embedding_scale",
    "logit_scale",
    "pre_scaled_multiplier",
    "qkv_clip",
    "rotary_magnitude",
    "rotary_window_base",
)


def subtle_mistakes(config: ModelConfig) -> Iterator[dict[str, Any]]:
    """What may be read wrongly without that texts look wrong."""
    yield {"norm_eps": max(10 * settings.flat(config)["norm_eps"], 1e-5)}
    if config.feedforward.name in GELUS:
        yield {"feedforward": GELUS[config.feedforward.name]}
    if config.positions.name == "rotary":
        yield {"rotary_base": 1.01 * settings.flat(config)["rotary_base"]}
    if config.attention_window is not None and config.attention_window < LENGTH:
        yield {"attention_window": config.attention_window + 1}
    if config.attention_softcap is not None:
        yield {"attention_softcap": 1.1 * config.attention_softcap}
    default, flat = settings.flat(ModelConfig()), settings.flat(config)
    for name in FACTORS:
        if flat.get(name) not in (None, default.get(name)):
            yield {name: 1.01 * flat[name]}


@torch.inference_mode()
@every_member
def test_the_tolerance_notices_subtle_mistakes(name: str, folder: Path) -> None:
    _, path = public(name, folder)
    right, _ = pretrained.load(path)
    inputs = Inputs(*padded("none", LENGTH, MEMBERS[name].texts), *padded("none", TARGET_LENGTH))
    expected = inputs.of_ours(right, MEMBERS[name])
    for mistake in subtle_mistakes(right.config):
        wrong = build_model(settings.with_settings(right.config, mistake)).eval()
        wrong.load_state_dict(right.state_dict())
        assert error(inputs.of_ours(wrong, MEMBERS[name]), expected) > FLOAT32, mistake


@torch.inference_mode()
@pytest.mark.parametrize("name", ["gpt2", "mixtral", "t5", "bert"])
def test_shards_are_exchanged_in_both_directions(name: str, folder: Path, tmp_path: Path, transformers: Any) -> None:
    theirs, path = public(name, folder)
    theirs.save_pretrained(tmp_path, max_shard_size="20KB")  # type: ignore[operator]
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    ours, whole = pretrained.load(tmp_path)[0], pretrained.load(path)[0]
    assert all(torch.equal(whole.state_dict()[key], weight) for key, weight in ours.state_dict().items())
    pretrained.save(ours, tmp_path / "saved", theirs.config.model_type)
    tensors = load_file(tmp_path / "saved" / "model.safetensors")
    (tmp_path / "saved" / "model.safetensors").unlink()
    write_shards(tensors, tmp_path / "saved", shard_bytes=20_000)
    reopened = getattr(transformers, MEMBERS[name].architecture).from_pretrained(tmp_path / "saved")
    expected = theirs.state_dict()
    assert all(torch.equal(expected[key], weight) for key, weight in reopened.state_dict().items() if key in tensors)


@torch.inference_mode()
@every_member
def test_what_is_saved_opens_as_the_reference_and_comes_back_bit_for_bit(
    name: str, folder: Path, tmp_path: Path, transformers: Any
) -> None:
    member = MEMBERS[name]
    theirs, path = public(name, folder)
    ours, _ = pretrained.load(path)
    pretrained.save(ours, tmp_path / "saved", theirs.config.model_type)
    model_class = getattr(transformers, member.architecture)
    reopened, report = model_class.from_pretrained(
        tmp_path / "saved", attn_implementation=member.attention, output_loading_info=True
    )
    # Marian's sinusoids are in no file, and the pooler of a headless encoder is left out.
    absent = ("embed_positions", "pooler.") if "headless" in name else ("embed_positions",)
    complaints = {kind: [n for n in names if not any(a in str(n) for a in absent)] for kind, names in report.items()}
    assert not any(complaints.values()), complaints
    inputs = Inputs(*padded("right", LENGTH), *padded("right", TARGET_LENGTH))
    before, after = (inputs.of_reference(model, member) for model in (theirs, reopened.eval()))
    assert error(inputs.where_tokens_are(after, ours), inputs.where_tokens_are(before, ours)) < 1e-6
    again, _ = pretrained.load(tmp_path / "saved")
    family = Family.named(theirs.config.model_type)
    assert family.hf_config(again.config) == family.hf_config(ours.config)
    assert all(torch.equal(again.state_dict()[key], weight) for key, weight in ours.state_dict().items())


@every_member
def test_a_saved_file_has_the_tensors_that_the_reference_keeps(name: str, folder: Path, tmp_path: Path) -> None:
    theirs, path = public(name, folder)
    ours, _ = pretrained.load(path)
    pretrained.save(ours, tmp_path / "saved", theirs.config.model_type)
    saved, kept = (load_file(at / "model.safetensors") for at in (tmp_path / "saved", path))
    unused = ("bert.pooler.", "cls.seq_relationship.", "pooler.", "model.encoder.embed_pos", "model.decoder.embed_pos")
    optional = {n for n in kept if n.startswith(unused)} - saved.keys()  # sinusoids are computed
    assert saved.keys() == kept.keys() - optional
    for key, tensor in saved.items():
        rows = slice(len(tensor) - ours.config.context_length, None) if "position" in key else slice(None)
        assert torch.equal(tensor[rows], kept[key][rows]), key


@torch.inference_mode()
def test_whether_a_sentence_follows_is_what_the_reference_says(folder: Path) -> None:
    theirs, path = public("bert with both heads", folder)
    ours, _ = pretrained.load(path)
    assert isinstance(ours, EncoderLM)
    assert ours.next_sentence is not None
    tokens, segments = torch.randint(4, VOCABULARY, (3, LENGTH)), torch.arange(LENGTH)[None].expand(3, -1) // 5 % 2
    expected = theirs(input_ids=tokens, token_type_ids=segments).seq_relationship_logits
    follows = ours.next_sentence(ours.hidden_states(tokens, segments=segments))[:, 1]
    assert error(follows, expected[:, 0]) <= FLOAT32  # their first class, our second


def test_every_family_has_a_member(transformers: Any) -> None:
    tested = {getattr(transformers, member.architecture).config_class.model_type for member in MEMBERS.values()}
    assert tested == Family.registry.keys()


def generations(reference: Any, prompt: Tensor, steps: int) -> Iterator[int]:
    tokens = prompt
    for _ in range(steps):
        likeliest = reference(input_ids=tokens).logits[:, -1].argmax(-1, keepdim=True)
        tokens = torch.cat([tokens, likeliest], dim=-1)
        yield int(likeliest)


@torch.inference_mode()
@pytest.mark.parametrize("name", [name for name, member in MEMBERS.items() if "CausalLM" in member.architecture])
def test_cached_decoding_continues_as_the_reference_does(name: str, folder: Path) -> None:
    theirs, path = public(name, folder)
    ours, _ = pretrained.load(path)
    assert isinstance(ours, DecoderLM)
    prompt = torch.randint(4, VOCABULARY, (1, 4))
    cache, tokens, continued = ours.new_cache(), prompt, []
    for _ in range(8):
        tokens = ours(tokens, cache=cache)[:, -1].argmax(-1, keepdim=True)
        continued.append(int(tokens))
    assert continued == list(generations(theirs, prompt, 8))
