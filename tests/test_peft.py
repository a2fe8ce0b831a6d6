"""Adapters in folders of the peft library, both ways; the library itself, where it is installed, is the judge."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from minitransformer.commands import export, sample
from minitransformer.errors import UserError
from minitransformer.models.config import ModelConfig
from minitransformer.models.model import Model, build_model
from minitransformer.pretrained.checkpoint import load
from minitransformer.pretrained.peft_folders import fill_adapter, read_adapter, save_adapter
from minitransformer.runs import Run
from minitransformer.settings import with_settings
from minitransformer.training.checkpoint import load_unmerged
from minitransformer.training.weights import unique_tensors
from tests.members_for_tests import VOCABULARY, public
from tests.runs_for_tests import assert_same_weights, refused

importing = importlib.import_module("minitransformer.commands.import")
TOKENS = torch.randint(VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(0))
FAMILIES = {"gpt2": "gpt2", "gptj": "gptj", "gpt-neox": "gpt_neox", "llama": "llama", "qwen3": "qwen3"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: Any) -> Path:
    pytest.importorskip("transformers")
    return tmp_path_factory.mktemp("members")


def adapted(base: Model, **choices: Any) -> Model:
    """`base` with an adapter that matters."""
    torch.manual_seed(1)
    model = build_model(with_settings(base.config, choices)).eval()
    theirs = base.state_dict()
    with torch.no_grad():
        for name, tensor in unique_tensors(model).items():
            tensor.copy_(theirs[name]) if name in theirs else tensor.normal_(std=0.2)
    return model


def by_peft(model: Any, folder: Path) -> Any:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    return peft.PeftModel.from_pretrained(model, str(folder)).eval()


@pytest.mark.parametrize("pattern", [".*", ".*(query|value|down)"])
@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_written_is_read_again(name: str, pattern: str, folder: Path, tmp_path: Path) -> None:
    base, _ = load(public(name, folder)[1])
    model = adapted(base, adapter="lora", lora_pattern=pattern, lora_rank=3, lora_alpha=5.0)
    save_adapter(model, tmp_path / "peft", FAMILIES[name], "base")
    adapter, weights = read_adapter(tmp_path / "peft", base.config)
    again = adapted(base, adapter=adapter.name)
    again = build_model(ModelConfig(**{**vars(base.config), "adapter": adapter})).eval()
    again.load_state_dict(base.state_dict(), strict=False)
    fill_adapter(again, weights)
    with torch.no_grad():
        assert (model(TOKENS) - base(TOKENS)).abs().max() > 1e-2
        torch.testing.assert_close(again(TOKENS), model(TOKENS), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("pattern", [".*", ".*(query|value|down)"])
@pytest.mark.parametrize("name", FAMILIES)
def test_peft_opens_ours_and_gives_our_logits(name: str, pattern: str, folder: Path, tmp_path: Path) -> None:
    reference, path = public(name, folder)
    model = adapted(load(path)[0], adapter="lora", lora_pattern=pattern, lora_rank=3, lora_alpha=5.0)
    save_adapter(model, tmp_path / "peft", FAMILIES[name], str(path))
    theirs = by_peft(type(reference).from_pretrained(path), tmp_path / "peft")
    with torch.no_grad():
        torch.testing.assert_close(model(TOKENS), theirs(TOKENS).logits, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("rslora", [False, True])
def test_ours_opens_pefts_and_gives_its_logits(name: str, rslora: bool, folder: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    reference, path = public(name, folder)
    targets = {"gpt2": ["c_attn", "c_fc"], "gptj": ["q_proj", "fc_in"], "gpt-neox": ["query_key_value"]}
    wanted = peft.LoraConfig(
        r=2,
        lora_alpha=3,
        use_rslora=rslora,
        target_modules=targets.get(name, ["q_proj", "down_proj"]),
        task_type="CAUSAL_LM",
        init_lora_weights=False,
    )
    theirs = peft.get_peft_model(type(reference).from_pretrained(path), wanted).eval()
    theirs.save_pretrained(tmp_path / "peft")
    base, _ = load(path)
    adapter, weights = read_adapter(tmp_path / "peft", base.config)
    model = build_model(ModelConfig(**{**vars(base.config), "adapter": adapter})).eval()
    model.load_state_dict(base.state_dict(), strict=False)
    fill_adapter(model, weights)
    with torch.no_grad():
        assert (model(TOKENS) - base(TOKENS)).abs().max() > 1e-2
        torch.testing.assert_close(model(TOKENS), theirs(TOKENS).logits, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_peft_opens_our_soft_prompts(name: str, folder: Path, tmp_path: Path) -> None:
    reference, path = public(name, folder)
    model = adapted(load(path)[0], adapter="soft-prompt", soft_prompt_tokens=3)
    save_adapter(model, tmp_path / "peft", FAMILIES[name], str(path))
    assert json.loads((tmp_path / "peft/adapter_config.json").read_text())["num_virtual_tokens"] == 3
    adapter, weights = read_adapter(tmp_path / "peft", model.config.base)
    assert adapter == model.config.adapter
    assert_same_weights(weights, {"embedding.prompt": model.state_dict()["embedding.prompt"]})
    theirs = by_peft(type(reference).from_pretrained(path), tmp_path / "peft")
    with torch.no_grad():
        torch.testing.assert_close(model(TOKENS), theirs(TOKENS).logits[:, 3:], atol=2e-4, rtol=1e-4)


def test_commands_import_and_export_an_adapter_beside_its_base(
    folder: Path, here: Path, capsys: Any, monkeypatch: Any
) -> None:
    from tests.runs_for_tests import untrained_run

    base = untrained_run(here / "base", lambda model: model, "causal", positions="learned", bias=True)
    model = adapted(base, adapter="lora", lora_rank=2, lora_pattern=".*(output|up|down)")
    save_adapter(model, here / "theirs", "gpt2", "base")
    assert "--base" in refused(capsys, "theirs", "--out", "x", main=importing.main)
    assert importing.main(["theirs", "--base", "base", "--out", "ours"]) == 0
    run = Run.open(here / "ours")
    opened = load_unmerged(run.checkpoint(), run.config)
    tokens = TOKENS % 200
    with torch.no_grad():
        torch.testing.assert_close(opened.eval()(tokens), model(tokens))
    capsys.readouterr()
    assert sample.main(["ours", "--prompt", "Line", "--max-new-tokens", "3", "--seed", "1"]) == 0
    assert export.main(["ours", "--to", "again", "--adapter", "--family", "gpt2"]) == 0
    before, after = (load_file(here / name / "adapter_model.safetensors") for name in ("theirs", "again"))
    assert_same_weights(before, after)
    assert "no adapter" in refused(capsys, "base", "--to", "y", "--adapter", main=export.main)


@pytest.mark.parametrize("pattern", [".*", ".*(query|output)"])
def test_what_is_written_of_an_adapter_over_8_bits_is_the_adapter_alone(
    folder: Path, tmp_path: Path, pattern: str
) -> None:
    base = load(public("gpt2", folder)[1])[0]
    choices: dict[str, Any] = {"adapter": "lora", "lora_pattern": pattern, "lora_rank": 3}
    over_full, over_8_bits = adapted(base, **choices), adapted(base, **choices, lora_base_weights="int8")
    fill_adapter(over_8_bits, {n: weight for n, weight in over_full.state_dict().items() if ".lora." in n})
    for name, model in (("full", over_full), ("rounded", over_8_bits)):
        save_adapter(model, tmp_path / name, FAMILIES["gpt2"], "base")
    both = [load_file(tmp_path / name / "adapter_model.safetensors") for name in ("full", "rounded")]
    assert_same_weights(*both)


def test_what_ours_cannot_hold_is_refused_in_one_sentence(folder: Path, here: Path, capsys: Any) -> None:
    from tests.runs_for_tests import untrained_run

    base = untrained_run(here / "base", lambda model: model, "causal", positions="learned", bias=True)
    save_adapter(adapted(base, adapter="lora"), here / "theirs", "gpt2", "base")
    path = here / "theirs/adapter_config.json"
    record = json.loads(path.read_text())
    for change, word in (({"use_dora": True}, "use_dora"), ({"peft_type": "IA3"}, "IA3"), ({"bias": "all"}, "bias")):
        path.write_text(json.dumps({**record, **change}))
        assert word in refused(capsys, "theirs", "--base", "base", "--out", "x", main=importing.main)
    path.write_text(json.dumps(record))
    save_file({"base_model.model.other.lora_A.weight": torch.ones(1, 1)}, here / "theirs/adapter_model.safetensors")
    assert "no matrix of the base" in refused(capsys, "theirs", "--base", "base", "--out", "x", main=importing.main)
    assert not Path("x").exists()


@pytest.mark.parametrize(
    ("choices", "words"),
    [
        ({"topology": "encoder-classifier", "num_classes": 2, "adapter": "lora"}, "the head that was trained beside"),
        ({"topology": "encoder", "adapter": "soft-prompt"}, "soft prompt of topology 'encoder', only of a decoder"),
    ],
)
def test_what_a_folder_cannot_hold_is_refused(choices: dict[str, Any], words: str, tmp_path: Path) -> None:
    model = build_model(with_settings(ModelConfig(), {"d_model": 16, "num_layers": 1, "vocab_size": 11, **choices}))
    with pytest.raises(UserError, match=words):
        save_adapter(model, tmp_path / "out", "bert", "base")
    assert not (tmp_path / "out").exists()
