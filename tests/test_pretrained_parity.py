"""Every public family against the `transformers` library, on tiny members with random weights: logits and files."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from minitransformer import pretrained, settings
from minitransformer.models.config import ModelConfig
from minitransformer.models.decoder import DecoderLM
from minitransformer.models.encoder import EncoderClassifier, EncoderLM
from minitransformer.models.encoder_decoder import EncoderDecoder
from minitransformer.models.model import Model, build_model
from minitransformer.pretrained.families import Family
from minitransformer.pretrained.shards import write_shards

VOCABULARY, LENGTH, TARGET_LENGTH, PADDING = 64, 12, 7, 1
# A wrong epsilon costs 8e-5 or more, of a class 2.8e-5, a wrong GELU 7e-4; what is right differs by rounding.
FLOAT32 = 2e-5
# The reference computes norms and rotations in float32, whatever the weights are.
FLOAT64 = 1e-5


@dataclass(frozen=True)
class Member:
    """A tiny model of a family: its class in `transformers`, and the configuration that it is made from."""

    architecture: str
    choices: dict[str, Any] = field(default_factory=dict)
    counts_tokens: bool = False
    """its positions count real tokens; those of others count places, padding included"""

    @property
    def texts(self) -> int:
        """How many are compared: one has far fewer logits of classes than of tokens."""
        return 48 if "Classification" in self.architecture else 3

    @property
    def two_sided(self) -> bool:
        return "Conditional" in self.architecture or "Marian" in self.architecture


BERT = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 16,
}
ROBERTA = {**BERT, "max_position_embeddings": 18, "type_vocab_size": 1, "pad_token_id": PADDING}
DISTILBERT = {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48, "max_position_embeddings": 16}
T5 = {"d_model": 32, "d_kv": 6, "d_ff": 48, "num_layers": 2, "num_decoder_layers": 3, "num_heads": 4}
BART = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 3,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 16,
}
MARIAN = {**BART, "pad_token_id": 63, "decoder_start_token_id": 63, "activation_function": "swish"}
GPT2 = {"n_positions": 16, "n_embd": 32, "n_layer": 2, "n_head": 4}
NEOX = {**BERT, "max_position_embeddings": 64}
LLAMA = {**NEOX, "num_key_value_heads": 2}
# A quarter of a head turns: with fewer heads, enough of it that the base of the rotation matters.
STABLELM = {**LLAMA, "num_attention_heads": 2, "num_key_value_heads": 1}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
OPT = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "ffn_dim": 48,
    "max_position_embeddings": 16,
    "word_embed_proj_dim": 32,
}
FALCON = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}

MEMBERS: dict[str, Member] = {
    "bert": Member("BertForMaskedLM", BERT),
    "bert with both heads": Member("BertForPreTraining", BERT),
    "bert classifier": Member("BertForSequenceClassification", {**BERT, "num_labels": 3}),
    "roberta": Member("RobertaForMaskedLM", ROBERTA, counts_tokens=True),
    "roberta classifier": Member("RobertaForSequenceClassification", {**ROBERTA, "num_labels": 3}, counts_tokens=True),
    "distilbert": Member("DistilBertForMaskedLM", DISTILBERT),
    "distilbert classifier": Member("DistilBertForSequenceClassification", {**DISTILBERT, "num_labels": 1}),
    "t5": Member(
        "T5ForConditionalGeneration",
        {**T5, "relative_attention_num_buckets": 8, "relative_attention_max_distance": 10},
    ),
    "t5 of equal sides": Member("T5ForConditionalGeneration", {**T5, "num_decoder_layers": 2}),
    "mt5": Member("MT5ForConditionalGeneration", T5),
    "t5 1.1": Member(
        "T5ForConditionalGeneration", {**T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
    ),
    "bart": Member("BartForConditionalGeneration", BART),
    "bart scaled": Member("BartForConditionalGeneration", {**BART, "scale_embedding": True}),
    "marian": Member("MarianMTModel", {**MARIAN, "scale_embedding": True}),
    "marian unscaled": Member("MarianMTModel", {**MARIAN, "activation_function": "relu"}),
    "gpt2": Member("GPT2LMHeadModel", GPT2),
    "gpt2 untied": Member("GPT2LMHeadModel", {**GPT2, "n_inner": 48, "tie_word_embeddings": False}),
    "gptj": Member("GPTJForCausalLM", {**GPT2, "rotary_dim": 6}),
    "gptj all turned": Member("GPTJForCausalLM", {**GPT2, "rotary_dim": 8}),
    "gpt-neox": Member("GPTNeoXForCausalLM", {**NEOX, "num_attention_heads": 2}),
    "gpt-neox sequential": Member("GPTNeoXForCausalLM", {**NEOX, "use_parallel_residual": False, "rotary_pct": 0.5}),
    "gpt-neox unbiased": Member("GPTNeoXForCausalLM", {**NEOX, "num_attention_heads": 2, "attention_bias": False}),
    "opt": Member("OPTForCausalLM", OPT, counts_tokens=True),
    "opt-350m": Member(
        "OPTForCausalLM", {**OPT, "word_embed_proj_dim": 16, "do_layer_norm_before": False}, counts_tokens=True
    ),
    "bloom": Member("BloomForCausalLM", {"hidden_size": 32, "n_layer": 2, "n_head": 4}, counts_tokens=True),
    "bloom of 6 heads": Member("BloomForCausalLM", {"hidden_size": 48, "n_layer": 2, "n_head": 6}, counts_tokens=True),
    "falcon-7b": Member("FalconForCausalLM", {**FALCON, "multi_query": True}),
    "falcon-40b": Member("FalconForCausalLM", {**FALCON, "new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon-11b": Member(
        "FalconForCausalLM",
        {**FALCON, "new_decoder_architecture": True, "num_kv_heads": 2, "num_ln_in_parallel_attn": 1},
    ),
    "falcon sequential": Member(
        "FalconForCausalLM", {**FALCON, "multi_query": False, "parallel_attn": False, "bias": True}
    ),
    "llama": Member("LlamaForCausalLM", LLAMA),
    "llama 3": Member(
        "LlamaForCausalLM", {**LLAMA, "head_dim": 10, "tie_word_embeddings": True, "rope_parameters": LLAMA3}
    ),
    "llama biased": Member(
        "LlamaForCausalLM",
        {
            **LLAMA,
            "attention_bias": True,
            "mlp_bias": True,
            "rope_parameters": {"rope_type": "linear", "rope_theta": 1000.0, "factor": 2.0},
        },
    ),
    "mistral": Member("MistralForCausalLM", {**LLAMA, "sliding_window": 5}),
    "mistral without window": Member("MistralForCausalLM", {**LLAMA, "sliding_window": None, "head_dim": 6}),
    "mixtral": Member("MixtralForCausalLM", {**LLAMA, "num_local_experts": 4, "experts_implementation": "eager"}),
    "qwen2": Member("Qwen2ForCausalLM", LLAMA),
    "qwen2 windowed": Member(
        "Qwen2ForCausalLM", {**LLAMA, "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}
    ),
    "qwen3": Member("Qwen3ForCausalLM", {**LLAMA, "head_dim": 10}),
    "qwen3 biased": Member("Qwen3ForCausalLM", {**LLAMA, "attention_bias": True, "tie_word_embeddings": True}),
    "olmo2": Member("Olmo2ForCausalLM", LLAMA),
    "gemma2": Member("Gemma2ForCausalLM", {**LLAMA, "head_dim": 10, "sliding_window": 5, "query_pre_attn_scalar": 12}),
    "gemma2 uncapped": Member(
        "Gemma2ForCausalLM",
        {**LLAMA, "head_dim": 8, "attn_logit_softcapping": None, "final_logit_softcapping": None},
    ),
    "stablelm": Member("StableLmForCausalLM", {**STABLELM, "use_qkv_bias": True}),
    "stablelm parallel": Member("StableLmForCausalLM", {**STABLELM, "use_parallel_residual": True}),
}
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


@cache
def public(name: str, folder: Path) -> tuple[nn.Module, Path]:
    """A member with random weights, and the folder that `transformers` keeps it in."""
    import transformers

    member = MEMBERS[name]
    model_class = getattr(transformers, member.architecture)
    config = model_class.config_class(vocab_size=VOCABULARY, attn_implementation="eager", **member.choices)
    # What a test draws next must not depend on whether the member was there already.
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = model_class(config).eval()
        if name in (
            "t5 1.1",
            "mt5",
        ):  # the library ties the head of every new T5, and unties it for files that have one
            model.lm_head.weight = nn.Parameter(torch.empty_like(model.lm_head.weight))
        _shake(model)
    model.save_pretrained(folder / name)
    return model, folder / name


@torch.no_grad()
def _shake(model: nn.Module) -> None:
    """Draw all weights, so that no gain is 1 and no bias is 0; sinusoids stay what they are."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    for name, tensor in tensors:
        if name == "final_logits_bias" or (tensor.requires_grad and "sinusoid" not in name):
            offset = tensor.mean() if tensor.dim() == 1 else 0.0
            tensor.normal_(std=0.2).add_(offset)


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
        return output.prediction_logits if "prediction_logits" in output else output.logits

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


GELUS = {"gelu": "gelu-tanh", "gelu-tanh": "gelu", "geglu-tanh": "geglu"}


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
        tmp_path / "saved", attn_implementation="eager", output_loading_info=True
    )
    # Marian's sinusoids are in no file.
    complaints = {kind: [n for n in names if "embed_positions" not in str(n)] for kind, names in report.items()}
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
    optional = {n for n in kept if n.startswith(("bert.pooler.", "cls.seq_relationship."))} - saved.keys()
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
