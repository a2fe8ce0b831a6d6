"""Checkpoint folders: whole, in shards, tied or damaged, and names on the hub."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from minitransformer import pretrained
from minitransformer.errors import UserError
from minitransformer.models.config import ModelConfig
from minitransformer.models.decoder import DecoderLM
from minitransformer.models.model import build_model
from minitransformer.pretrained.checkpoint import Undrawn
from minitransformer.pretrained.shards import Shards, write_shards
from minitransformer.text.tokenizers import Bytes

LLAMA = {"norm": "rms", "feedforward": "swiglu", "d_ff": 24, "tied_embeddings": False}
INDEX = "model.safetensors.index.json"


@pytest.fixture
def model(tiny_decoder: Callable[..., DecoderLM]) -> DecoderLM:
    return tiny_decoder(**LLAMA).float()


@pytest.fixture
def checkpoint(model: DecoderLM, tmp_path: Path) -> Path:
    pretrained.save(model, tmp_path / "checkpoint", "llama")
    return tmp_path / "checkpoint"


def same_weights(one: nn.Module, other: nn.Module) -> bool:
    others = other.state_dict()
    return all(torch.equal(others[name], weight) for name, weight in one.state_dict().items())


def rewrite(folder: Path, **changes: Tensor | None) -> None:
    """Replace tensors, add them, or with None remove them."""
    tensors = load_file(folder / "model.safetensors") | {n.replace("__", "."): t for n, t in changes.items()}
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, folder / "model.safetensors")


def test_a_saved_model_is_loaded_as_it_was(model: DecoderLM, checkpoint: Path) -> None:
    again, tokenizer = pretrained.load(str(checkpoint))
    assert same_weights(model, again)
    assert not again.training
    assert tokenizer is None


def test_a_folder_says_its_precision_and_what_else_it_is_given(model: DecoderLM, tmp_path: Path) -> None:
    pretrained.save(model.bfloat16(), tmp_path / "half", "llama", {"eos_token_id": 7})
    config = json.loads((tmp_path / "half" / "config.json").read_text())
    assert (config["dtype"], config["eos_token_id"], config["model_type"]) == ("bfloat16", 7, "llama")
    again, _ = pretrained.load(tmp_path / "half")
    assert same_weights(model.float(), again)


def test_shards_hold_what_one_file_holds(model: DecoderLM, checkpoint: Path) -> None:
    tensors = load_file(checkpoint / "model.safetensors")
    (checkpoint / "model.safetensors").unlink()
    write_shards(tensors, checkpoint, shard_bytes=2000)
    index = json.loads((checkpoint / INDEX).read_text())
    shards = sorted(set(index["weight_map"].values()))
    assert len(shards) > 3
    assert shards[0] == f"model-00001-of-{len(shards):05}.safetensors"
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    for shard in shards:
        held = load_file(checkpoint / shard)
        assert len(held) == 1 or sum(tensor.nbytes for tensor in held.values()) <= 2000
    assert same_weights(model, pretrained.load(checkpoint)[0])


def test_a_missing_shard_is_named(checkpoint: Path) -> None:
    tensors = load_file(checkpoint / "model.safetensors")
    (checkpoint / "model.safetensors").unlink()
    write_shards(tensors, checkpoint, shard_bytes=4000)
    lost = sorted(checkpoint.glob("model-00002*"))[0]
    lost.unlink()
    with pytest.raises(UserError, match=f"lacks {lost.name}, which {INDEX} names: download it again"):
        pretrained.load(checkpoint)


def test_a_shard_without_its_tensor_is_named(checkpoint: Path) -> None:
    places = dict.fromkeys(load_file(checkpoint / "model.safetensors"), "model.safetensors")
    (checkpoint / INDEX).write_text(json.dumps({"weight_map": {**places, "stray": "model.safetensors"}}))
    with pytest.raises(UserError, match=r"model\.safetensors lacks stray, which"):
        Shards(checkpoint)["stray"]


def test_the_first_names_of_norms_are_understood(tmp_path: Path, shake: Any) -> None:
    config = ModelConfig(
        topology="encoder-classifier",
        num_classes=2,
        d_model=8,
        num_layers=1,
        num_heads=2,
        vocab_size=11,
        num_segments=2,
        residual="post",
        positions="learned",
        feedforward="gelu",
        embedding_norm=True,
        bias=True,
    )
    model = shake(build_model(config))
    pretrained.save(model, tmp_path / "bert", "bert")
    tensors = load_file(tmp_path / "bert" / "model.safetensors")
    first = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    for new, old in first.items():
        tensors = {name.replace(new, old): tensor for name, tensor in tensors.items()}
    save_file(tensors, tmp_path / "bert" / "model.safetensors")
    assert same_weights(model, pretrained.load(tmp_path / "bert")[0])


def test_a_prefix_that_a_headless_file_leaves_out_is_added(tiny_decoder: Any, tmp_path: Path) -> None:
    model = tiny_decoder(**{**LLAMA, "tied_embeddings": True}).float()
    pretrained.save(model, tmp_path / "bare", "llama")
    tensors = load_file(tmp_path / "bare" / "model.safetensors")
    bare = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    save_file(bare, tmp_path / "bare" / "model.safetensors")
    assert same_weights(model, pretrained.load(tmp_path / "bare")[0])


def test_old_buffers_are_left_over_in_silence(checkpoint: Path, model: DecoderLM) -> None:
    rewrite(checkpoint, model__layers__0__self_attn__rotary_emb__inv_freq=torch.ones(2))
    assert same_weights(model, pretrained.load(checkpoint)[0])


def test_tensors_that_do_not_fit_are_all_named(checkpoint: Path) -> None:
    rewrite(checkpoint, model__norm__weight=None, extra=torch.ones(1))
    with pytest.raises(UserError, match=r"model\.norm\.weight is missing; extra is not expected"):
        pretrained.load(checkpoint)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_pickles_are_refused(checkpoint: Path, name: str) -> None:
    (checkpoint / "model.safetensors").rename(checkpoint / name)
    with pytest.raises(
        UserError, match=f"{name} is a pickle, which can execute arbitrary code .* convert it to safetensors"
    ):
        pretrained.load(checkpoint)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("config.json", "{", r"config\.json is damaged \(Expecting property name"),
        ("config.json", "[]", r"config\.json is damaged \(it holds no JSON object\)"),
        ("config.json", "{}", r"config\.json has no model_type: give the folder of a checkpoint"),
        ("config.json", '{"model_type": "moonshine"}', "unknown model_type 'moonshine': .*known are"),
        ("config.json", '{"model_type": null}', "has no model_type"),
        ("model.safetensors", "cut", r"model\.safetensors is not a complete safetensors file"),
        (INDEX, "cut", "is damaged"),
        (INDEX, '{"weight_map": {"a": "gone.safetensors"}}', r"lacks gone\.safetensors"),
    ],
)
def test_what_is_damaged_is_named(checkpoint: Path, file: str, content: str, message: str) -> None:
    (checkpoint / file).write_text(content)
    with pytest.raises(UserError, match=message):
        pretrained.load(checkpoint)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, r"is of a quantised \(gptq\) checkpoint: give"),
        ({"compression_config": {"format": "int8"}}, "is of a quantised checkpoint: give the one"),
        (
            {"architectures": ["LlamaForQuestionAnswering"]},
            r"describes a model with a question-answering head \(LlamaForQuestionAnswering\), which cannot",
        ),
        (
            {"architectures": ["LlamaForSequenceClassification"]},
            "describes a model with a sequence-classification head",
        ),
        (
            {"model_type": "deepseek_v3", "n_shared_experts": 1, "kv_lora_rank": 512},
            r"describes a mixture with shared experts \(deepseek_v3\), which cannot be loaded: known are bert, ",
        ),
        (
            {"model_type": "qwen2_moe", "shared_expert_intermediate_size": 64},
            r"describes a mixture with shared experts \(qwen2_moe",
        ),
        (
            {"model_type": "gemma3", "vision_config": {"hidden_size": 8}},
            r"describes a model with an image encoder \(gemma3\)",
        ),
        ({"model_type": "mamba", "state_size": 16}, r"describes a model with state-space layers \(mamba\)"),
    ],
    ids=str,
)
def test_what_cannot_be_read_is_refused_by_its_kind(checkpoint: Path, fields: dict[str, Any], message: str) -> None:
    path = checkpoint / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
    with pytest.raises(UserError, match=r"config\.json " + message):
        pretrained.load(checkpoint)


@pytest.mark.parametrize(
    ("missing", "message"),
    [("config.json", r"has no config\.json"), ("model.safetensors", r"has neither model\.safetensors nor")],
)
def test_a_folder_that_is_no_checkpoint_is_named(checkpoint: Path, missing: str, message: str) -> None:
    (checkpoint / missing).unlink()
    with pytest.raises(UserError, match=f"checkpoint {message}.*: give the folder of a checkpoint"):
        pretrained.load(checkpoint)


@pytest.mark.parametrize("name", ["./no/such", "/no/such", "a/b/c"])
def test_a_path_without_a_folder_is_no_name_on_the_hub(name: str) -> None:
    with pytest.raises(UserError, match=f"there is no folder {name}: give a checkpoint folder, or a name"):
        pretrained.load(name)


def test_a_name_on_the_hub_takes_a_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UserError, match=r"there is no folder gpt2, and .* `pip install minitransformer\[hub\]`"):
        pretrained.load("gpt2")


def test_a_name_that_the_hub_does_not_give_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    hub = pytest.importorskip("huggingface_hub")

    def offline(name: str, **options: Any) -> str:
        raise OSError("no route to host\nand much more")

    monkeypatch.setattr(hub, "snapshot_download", offline)
    with pytest.raises(UserError) as caught:
        pretrained.load("someone/something")
    assert str(caught.value) == (
        "someone/something is not a folder, and cannot be downloaded from the hub (no route to host): "
        "check name and network"
    )


def test_a_name_on_the_hub_is_fetched_without_other_formats(
    checkpoint: Path, model: DecoderLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = pytest.importorskip("huggingface_hub")
    asked: dict[str, Any] = {}

    def snapshot(name: str, **options: Any) -> str:
        asked.update(options, name=name)
        return str(checkpoint)

    monkeypatch.setattr(hub, "snapshot_download", snapshot)
    assert same_weights(model, pretrained.load("someone/something")[0])
    assert asked["name"] == "someone/something"
    files = ["config.json", "model-00002-of-00009.safetensors", INDEX, "tokenizer.json", "model.safetensors"]
    assert all(any(fnmatch(file, wanted) for wanted in asked["allow_patterns"]) for file in files)
    for file in ("consolidated.safetensors", "pytorch_model.bin", "original/model.safetensors", "README.md"):
        assert not any(fnmatch(file, wanted) for wanted in asked["allow_patterns"]), file


def test_what_a_family_cannot_hold_leaves_no_folder(tiny_decoder: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="residual is 'post', and llama can only hold 'pre'"):
        pretrained.save(tiny_decoder(**LLAMA, residual="post"), tmp_path / "none", "llama")
    assert not (tmp_path / "none").exists()


def test_a_folder_that_exists_is_not_written_over(model: DecoderLM, checkpoint: Path) -> None:
    with pytest.raises(UserError, match="checkpoint already exists: choose another folder"):
        pretrained.save(model, checkpoint, "llama")


def test_what_fails_halfway_leaves_nothing(model: DecoderLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("minitransformer.pretrained.checkpoint.write_shards", full)
    with pytest.raises(UserError, match="no space left while writing"):
        pretrained.save(model, tmp_path / "half", "llama")
    assert list(tmp_path.iterdir()) == []


def test_a_tokenizer_travels_with_its_model(model: DecoderLM, tmp_path: Path) -> None:
    pytest.importorskip("tokenizers")
    pretrained.save(model, tmp_path / "both", "llama", tokenizer=Bytes())
    _, tokenizer = pretrained.load(tmp_path / "both")
    assert tokenizer is not None
    assert tokenizer.encode("à la") == Bytes().encode("à la")


def test_weights_that_will_be_filled_are_not_drawn() -> None:
    before = torch.get_rng_state()
    with Undrawn():
        build_model(ModelConfig(d_model=16, num_layers=1, vocab_size=11))
    assert torch.equal(torch.get_rng_state(), before)
