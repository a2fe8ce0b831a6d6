"""Configurations of public families: read in every spelling, written back, refused by the field that does not fit."""

from __future__ import annotations

import math
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from minitransformer import pretrained
from minitransformer.architecture.positions import Rotary
from minitransformer.architecture.rotary_scaling import LongRoPE
from minitransformer.errors import UserError
from minitransformer.models.config import PRESETS, ModelConfig
from minitransformer.models.model import build_model
from minitransformer.pretrained.families import Family, families_of
from minitransformer.settings import with_settings

GPT2 = {"vocab_size": 11, "n_positions": 16, "n_embd": 32, "n_layer": 2, "n_head": 4}
LLAMA = {
    "vocab_size": 11,
    "max_position_embeddings": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
}


FALCON = {"vocab_size": 11, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
DBRX = {"max_seq_len": 16, "d_model": 32, "n_layers": 2, "n_heads": 4, "rope_theta": 5.0}


def read(family: str, **hf: Any) -> ModelConfig:
    return Family.named(family).model_config(hf)


def test_an_unknown_family_is_answered_with_the_known_ones() -> None:
    with pytest.raises(UserError, match=r"unknown model_type 'lama': did you mean 'llama'\? known are bert, roberta, "):
        Family.named("lama")


@pytest.mark.parametrize("missing", GPT2)
def test_a_size_that_a_configuration_does_not_say_is_no_guess(missing: str) -> None:
    with pytest.raises(UserError, match=f"config.json has no {missing}, which a checkpoint of gpt2 needs"):
        read("gpt2", **{name: value for name, value in GPT2.items() if name != missing})


def test_a_field_that_only_some_families_read_is_asked_for_too() -> None:
    with pytest.raises(UserError, match="has no max_position_embeddings"):
        read("roberta", vocab_size=11, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)


def test_the_rotation_is_read_from_both_spellings() -> None:
    scaling = {"factor": 8.0, "low_freq_factor": 2.0, "high_freq_factor": 3.0, "original_max_position_embeddings": 99}
    expected = {
        "rotary_base": 500.0,
        "rotary_scaling": "llama3",
        "rotary_factor": 8.0,
        "rotary_low_freq_factor": 2.0,
        "rotary_high_freq_factor": 3.0,
        "rotary_original_length": 99,
    }
    new = read("llama", **LLAMA, rope_parameters={"rope_type": "llama3", "rope_theta": 500.0, **scaling})
    old = read("llama", **LLAMA, rope_theta=500.0, rope_scaling={"type": "llama3", **scaling})
    assert new == old == with_settings(read("llama", **LLAMA), expected)


@pytest.mark.parametrize(
    "spelling",
    [
        {"rotary_pct": 0.5, "rotary_emb_base": 123},
        {"partial_rotary_factor": 0.5, "rope_theta": 123},
        {"rope_parameters": {"partial_rotary_factor": 0.5, "rope_theta": 123, "rope_type": "default"}},
    ],
    ids=str,
)
def test_the_share_of_a_head_that_turns_is_read_from_all_spellings(spelling: dict[str, Any]) -> None:
    config = read("gpt_neox", **LLAMA, **spelling)
    assert config.positions == Rotary.choose(fraction=0.5, base=123.0)


def test_a_rotation_that_we_do_not_have_is_refused() -> None:
    with pytest.raises(UserError, match=r"rope_type is 'proportional' in config\.json: known are default, linear, "):
        read("llama", **LLAMA, rope_scaling={"rope_type": "proportional", "factor": 4.0})


def test_a_scaling_is_read_as_its_first_files_say_it() -> None:
    factors = {"short_factor": [1.0, 1.5, 2.0, 3.0], "long_factor": [1, 2, 4, 8]}
    phi = read("phi3", **LLAMA, rope_scaling={"type": "su", **factors}, original_max_position_embeddings=16)
    expected = {"short_factors": (1.0, 1.5, 2.0, 3.0), "long_factors": (1.0, 2.0, 4.0, 8.0), "original_length": 16}
    magnitude = math.sqrt(1 + math.log(64 / 16) / math.log(16))
    assert phi.positions == Rotary.choose(scaling=LongRoPE.choose(**expected, magnitude=magnitude))
    assert phi.context_length == 16  # for which the short factors serve
    deep = {"type": "yarn", "factor": 40, "original_max_position_embeddings": 32, "mscale": 2.0, "mscale_all_dim": 1.0}
    scaling = read("llama", **LLAMA, rope_scaling=deep).positions.settings.scaling
    assert scaling.settings.magnitude == (0.2 * math.log(40) + 1) / (0.1 * math.log(40) + 1)
    implied = {"type": "yarn", "factor": None, "original_max_position_embeddings": 16}
    assert read("llama", **LLAMA, rope_scaling=implied).positions.settings.scaling.settings.factor == 4.0


def test_the_rotation_of_layers_is_read_from_both_spellings() -> None:
    old = read("gemma3_text", **LLAMA, rope_theta=7.0, rope_local_base_freq=5.0, sliding_window_pattern=2)
    bases = {"sliding_attention": {"rope_theta": 5.0}, "full_attention": {"rope_theta": 7.0}}
    new = read("gemma3_text", **LLAMA, rope_parameters=bases, layer_types=["sliding_attention", "full_attention"])
    assert old == new
    assert old.positions == Rotary.choose(base=7.0, window_base=5.0)
    assert read("smollm3", **{**LLAMA, "num_hidden_layers": 4}).positions.settings.layers == (True, True, True, False)
    olmo = read("olmo3", **LLAMA, rope_theta=9.0, rope_scaling={"rope_type": "linear", "factor": 2.0})
    assert (olmo.positions.settings.window_base, olmo.positions.settings.scaling.name) == (9.0, "linear")


def test_dbrx_has_the_base_of_its_training() -> None:
    assert read("dbrx", vocab_size=11, **{**DBRX, "rope_theta": None}, attn_config={"rope_theta": 5e5}).positions == (
        Rotary.choose(base=5e5)
    )


def test_defaults_are_those_of_the_family() -> None:
    assert read("gpt_neox", **LLAMA).positions.settings.fraction == 0.25
    assert read("qwen3", **LLAMA).head_dim == 128
    assert read("gpt2", **GPT2).tied_embeddings
    assert not read("llama", **LLAMA).tied_embeddings
    assert read("bert", **LLAMA).norm.settings.eps == 1e-12


@pytest.mark.parametrize(
    ("family", "older", "newer"),
    [
        ("bloom", {"n_embed": 32, "num_attention_heads": 4, "n_layer": 2}, {"hidden_size": 32, "n_head": 4}),
        (
            "falcon",
            {"n_embed": 32, "n_layer": 2, "n_head": 4},
            {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4},
        ),
    ],
)
def test_older_names_of_fields_are_read(family: str, older: dict[str, int], newer: dict[str, int]) -> None:
    assert read(family, vocab_size=11, **older) == read(family, vocab_size=11, **{"n_layer": 2, **newer})


def test_the_fast_gelu_is_the_one_with_tanh() -> None:
    assert read("gpt_neox", **LLAMA, hidden_act="gelu_fast").feedforward.name == "gelu-tanh"


@pytest.mark.parametrize(
    ("family", "field", "value", "message"),
    [
        (
            "gpt2",
            "activation_function",
            "mish",
            "activation_function is 'mish' in config.json: known for gpt2 are 'relu'",
        ),
        ("gpt2", "scale_attn_by_inverse_layer_idx", True, "only False can be loaded for gpt2"),
        ("bert", "position_embedding_type", "relative_key", "only 'absolute' can be loaded for bert"),
        ("dbrx", "ffn_config", {"moe_normalize_expert_weights": 2.0}, "moe_normalize_expert_weights is 2.0 in"),
        ("dbrx", "attn_config", {"rope_theta": 7.0}, "rope_theta is 5.0 in config.json and 7.0 in its attn_config"),
        ("modernbert", "classifier_activation", "relu", "the head of masked tokens can only have the same one"),
        ("modernbert", "rope_scaling", {"rope_type": "yarn"}, "only 'default' can be loaded for modernbert"),
        ("gemma", "use_bidirectional_attention", True, "only causal members of this family can be loaded"),
        ("olmo3", "rope_parameters", {"rope_theta": 7.0}, "rope_parameters in config.json has no full_attention"),
        (
            "olmo3",
            "rope_parameters",
            {"sliding_attention": {"rope_type": "linear", "factor": 2.0}},
            "rope_type is 'linear' for sliding_attention in config.json",
        ),
    ],
)
def test_a_member_that_we_do_not_cover_is_refused_by_the_field(
    family: str, field: str, value: Any, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        read(family, **{**GPT2, **LLAMA, **DBRX, field: value})


# A valid configuration of families that read their fields in different ways.
BERT = {**LLAMA, "max_position_embeddings": 18}
T5 = {"vocab_size": 11, "d_model": 8, "d_kv": 4, "d_ff": 16, "num_layers": 1, "num_heads": 2}
WHOLE: dict[str, dict[str, Any]] = {
    "bert": {**BERT, "id2label": {"0": "a"}, "architectures": ["BertForSequenceClassification"]},
    "roberta": BERT,
    "t5": {**T5, "relative_attention_num_buckets": 8},
    "gpt2": {**GPT2, "layer_norm_epsilon": 1e-5},
    "gptj": {**GPT2, "rotary_dim": 4},
    "llama": {**LLAMA, "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}},
    "mixtral": {**LLAMA, "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2": {**LLAMA, "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1, "layer_types": None},
    "gemma2": {**LLAMA, "query_pre_attn_scalar": 12},
}
NONSENSE: list[Any] = [None, True, -1, 0, 1.5, "abc", "3", [], {}, [1]]


@pytest.mark.parametrize(("family", "field"), [(family, field) for family, hf in WHOLE.items() for field in hf])
def test_a_value_that_no_configuration_has_is_an_error_of_the_user(family: str, field: str) -> None:
    for value in NONSENSE:
        with suppress(UserError):  # and if it is accepted, a model can be made of it
            build_model(read(family, **{**WHOLE[family], field: value}))


def test_a_whole_number_is_a_number() -> None:
    config = read("gemma2", **LLAMA, attn_logit_softcapping=50, rms_norm_eps=1)
    assert (config.attention_softcap, config.norm.settings.eps) == (50.0, 1.0)
    assert isinstance(config.attention_softcap, float)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("hidden_size", "32", "hidden_size is '32' in config.json: it must be a whole number"),
        ("num_hidden_layers", 1.5, "num_hidden_layers is 1.5 in config.json: it must be a whole number"),
        ("intermediate_size", True, "intermediate_size is True in config.json: it must be a whole number or null"),
        ("rms_norm_eps", None, "rms_norm_eps is None in config.json: it must be a number"),
        ("tie_word_embeddings", 1, "tie_word_embeddings is 1 in config.json: it must be true or false"),
        ("mlp_bias", "no", "config.json is invalid for llama (bias becomes 'no'): download it again"),
        (
            "rope_scaling",
            "big",
            "config.json is invalid for llama ('str' object is not a mapping): download it again",
        ),
    ],
)
def test_a_value_of_another_kind_is_refused_by_the_field(field: str, value: Any, message: str) -> None:
    with pytest.raises(UserError) as caught:
        read("llama", **{**LLAMA, field: value})
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("family", "field"),
    [("bert", "type_vocab_size"), ("roberta", "type_vocab_size"), ("mixtral", "num_local_experts")],
)
def test_a_field_that_the_library_does_not_open_without_is_not_null(family: str, field: str) -> None:
    with pytest.raises(UserError, match=f"{field} is None in config.json: it must be a whole number"):
        read(family, **{**WHOLE[family], field: None})


def test_llama3_counts_from_the_context_where_its_original_length_is_not_said() -> None:
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    assert read("llama", **LLAMA, rope_parameters=scaling).positions.settings.scaling.settings.original_length == 64


def test_gptj_has_no_size_of_heads_of_its_own() -> None:
    config = replace(read("gptj", **GPT2, rotary_dim=8), head_dim=10)
    with pytest.raises(UserError, match="head_dim is 10, and gptj can only hold 8"):
        Family.named("gptj").hf_config(config)


@pytest.mark.parametrize("head_dim", [2, 44, 47, 49, 64, 98])
def test_gptj_turns_as_many_features_as_its_configuration_says(head_dim: int) -> None:
    for turned in range(2, head_dim + 1, 2):
        config = read("gptj", **{**GPT2, "n_embd": 2 * head_dim, "n_head": 2}, rotary_dim=turned)
        assert int(config.features_per_head * config.positions.settings.fraction) == turned
        assert Family.named("gptj").hf_config(config)["rotary_dim"] == turned


def test_classes_are_counted_by_their_names() -> None:
    hf = {**LLAMA, "architectures": ["BertForSequenceClassification"]}
    assert read("bert", **hf).num_classes == 2
    assert read("bert", **hf, id2label={"0": "a", "1": "b", "2": "c"}).num_classes == 3
    written = Family.named("bert").hf_config(read("bert", **hf, num_labels=4))
    assert written["id2label"] == {str(i): f"LABEL_{i}" for i in range(4)}
    assert written["architectures"] == ["BertForSequenceClassification"]


GPT2_CONFIG = replace(PRESETS["gpt2-124m"], d_model=32, num_heads=4, num_layers=2, vocab_size=11)
REFUSALS: list[tuple[str, dict[str, Any], str]] = [
    ("gpt2", {"residual": "post"}, "residual is 'post', and gpt2 can only hold 'pre'"),
    ("gpt2", {"positions": "rotary"}, "positions is 'rotary', and gpt2 can only hold 'learned'"),
    ("stablelm", {"bias": True}, "bias is True, and stablelm can only hold False"),
    ("gpt2", {"norm": "rms"}, "norm is 'rms', and gpt2 can only hold 'layer'"),
    ("gpt2", {"num_kv_heads": 2}, "num_kv_heads is 2, and gpt2 can only hold 4"),
    ("gpt2", {"head_dim": 10}, "head_dim is 10, and gpt2 can only hold 8"),
    ("gpt2", {"head_dim": 8, "num_heads": 3}, "d_model 32 is not divisible by num_heads 3"),
    ("gpt2", {"attention_softcap": 3.0}, "attention_softcap is 3.0, and gpt2 can only hold None"),
    ("gpt2", {"feedforward": "swiglu"}, "feedforward is 'swiglu', and gpt2 can only hold 'relu' or 'gelu'"),
    ("gpt2", {"qk_norm": "head"}, "qk_norm is 'head', and gpt2 can only hold 'none'"),
    ("gpt2", {"topology": "encoder"}, "topology is 'encoder', and gpt2 can only hold 'decoder'"),
    ("opt", {"norm_eps": 1e-6}, "norm_eps is 1e-06, and opt can only hold 1e-05"),
]


def test_every_setting_in_the_way_is_named() -> None:
    with pytest.raises(UserError) as caught:
        Family.named("gpt2").hf_config(replace(GPT2_CONFIG, residual="post", qk_norm="head", token_smear=True))
    assert str(caught.value) == (
        "residual is 'post', and gpt2 can only hold 'pre'; token_smear is True, and gpt2 can only hold False; "
        "qk_norm is 'head', and gpt2 can only hold 'none': choose another format"
    )


@pytest.mark.parametrize(
    ("family", "without"),
    [("gpt2", {"bias": False}), ("gpt2", {"qkv_bias": False}), ("stablelm", {"norm_bias": False})],
)
def test_a_bias_that_a_family_always_has_is_written_as_zeros(
    family: str, without: dict[str, Any], tmp_path: Path
) -> None:
    whole = GPT2_CONFIG if family == "gpt2" else read("stablelm", **LLAMA)
    model = build_model(with_settings(whole, {**without, "vocab_size": 11})).eval()
    pretrained.save(model, tmp_path / "copy", family)
    again, _ = pretrained.load(tmp_path / "copy")
    ours, theirs = (dict(each.named_parameters()) for each in (model, again))
    assert ours.keys() < theirs.keys()
    assert all(torch.equal(weight, ours.get(name, torch.zeros_like(weight))) for name, weight in theirs.items())
    tokens = torch.arange(11)[None]
    torch.testing.assert_close(again(tokens), model(tokens), rtol=0, atol=1e-6)


def test_a_family_that_adds_no_bias_comes_first() -> None:
    unbiased = read("falcon", **FALCON, multi_query=False, parallel_attn=False)
    assert Family.named("gpt_neox").compared(unbiased) == ([], {"bias": True})
    assert families_of(unbiased)[0] == "falcon"


def test_a_number_that_a_family_needs_is_no_guess() -> None:
    dense = replace(read("mixtral", **WHOLE["mixtral"]), num_experts=None)
    with pytest.raises(UserError, match="num_experts is None, and mixtral can only hold a number, such as 8"):
        Family.named("mixtral").hf_config(dense)
    without_segments = replace(read("bert", **BERT), num_segments=None)
    with pytest.raises(UserError, match="num_segments is None, and bert can only hold a number, such as 2"):
        Family.named("bert").hf_config(without_segments)


@pytest.mark.parametrize("family", Family.registry)
@pytest.mark.parametrize("preset", PRESETS)
def test_with_the_choices_in_place_of_the_obstacles_nothing_is_in_the_way(family: str, preset: str) -> None:
    config = replace(PRESETS[preset], vocab_size=11)
    if config.topology in Family.named(family).architectures:
        choices = {obstacle.setting: obstacle.choice for obstacle in Family.named(family).obstacles(config)}
        assert Family.named(family).hf_config(with_settings(config, choices))


@pytest.mark.parametrize(("family", "choices", "message"), REFUSALS, ids=[message for *_, message in REFUSALS])
def test_a_choice_that_a_family_cannot_hold_is_named(family: str, choices: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Family.named(family).hf_config(with_settings(GPT2_CONFIG, choices))


def test_what_makes_no_difference_is_no_hindrance() -> None:
    same = replace(GPT2_CONFIG, dropout=0.5, init="xavier", attention_kernel="by-hand", window_pattern=(True, False))
    assert Family.named("gpt2").hf_config(same) == Family.named("gpt2").hf_config(GPT2_CONFIG)


def test_the_scale_of_attention_survives_as_gemma_writes_it() -> None:
    gemma = read("gemma2", **LLAMA, query_pre_attn_scalar=12)
    assert gemma.attention_scale == 12**-0.5
    assert Family.named("gemma2").hf_config(gemma)["query_pre_attn_scalar"] == 12
    unset = replace(gemma, attention_scale=None)
    assert math.isclose(Family.named("gemma2").hf_config(unset)["query_pre_attn_scalar"], unset.features_per_head)


def test_sides_of_different_sizes_are_refused() -> None:
    bart = {"vocab_size": 11, "d_model": 8, "encoder_layers": 1, "decoder_layers": 1, "max_position_embeddings": 9}
    sizes = {"encoder_attention_heads": 2, "decoder_attention_heads": 4, "encoder_ffn_dim": 8}
    with pytest.raises(UserError, match="encoder_attention_heads is 2 and decoder_attention_heads 4"):
        read("bart", **bart, **sizes)
    with pytest.raises(UserError, match="has no decoder_attention_heads"):
        read("bart", **bart, encoder_attention_heads=2, encoder_ffn_dim=8)
