"""What came beside the weights of an import: obeyed as transformers does, kept, and written out again unchanged."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

from minitransformer.commands import sample, train
from minitransformer.pretrained.originals import FOLDER, class_names
from minitransformer.pretrained.tokenizers import load_tokenizer
from minitransformer.runs import Run
from tests.tokenizers_for_tests import like_bert, like_gpt2, like_llama3

library = pytest.importorskip("transformers")
importing, export = (import_module(f"minitransformer.commands.{name}") for name in ("import", "export"))

SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
TEMPLATE = "{% for m in messages %}<|other|>{{ m['role'] }}: {{ m['content'] }}<|eot_id|>{% endfor %}"
TEXTS = ["The quick brown fox", "Größe, 東京 <|other|> [MASK] x"]
# The class of a model, its tokenizer, and what tokenizer_config.json says.
CHECKPOINTS: dict[str, tuple[str, Callable[[], Any], dict[str, Any]]] = {
    "llama 3": (
        "LlamaForCausalLM",
        like_llama3,
        {"bos_token": "<|other|>", "eos_token": "<|end_of_text|>", "chat_template": TEMPLATE, "model_max_length": 99},
    ),
    "bert": (
        "BertForMaskedLM",
        like_bert,
        {
            "tokenizer_class": "BertTokenizer",
            "do_lower_case": True,
            **{f"{name}_token": f"[{name.upper()}]" for name in ("unk", "cls", "sep", "pad", "mask")},
        },
    ),
    "bloom": (
        "BloomForCausalLM",
        like_gpt2,
        {
            "bos_token": "<s>",
            "eos_token": "</s>",
            "pad_token": "<pad>",
            "unk_token": "<unk>",
            "tokenizer_class": "PreTrainedTokenizerFast",
        },
    ),
    "gpt-neox": (
        "GPTNeoXForCausalLM",
        like_gpt2,
        {**dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>"), "pad_token": "<|padding|>"},
    ),
}


def checkpoint(name: str, folder: Path, **choices: Any) -> Path:
    """A folder as the library writes it, with a random model."""
    architecture, make, settings = CHECKPOINTS[name]
    tokenizer = make()
    tokenizer.add_special_tokens(
        [token for key, token in settings.items() if key.endswith("_token")] + ["<|eot_id|>", "<|reserved_0|>"]
    )
    model_class = getattr(library, choices.pop("architecture", architecture))
    sizes = {"hidden_size": 16, "n_layer": 1, "n_head": 2} if name == "bloom" else SIZES
    ids = {f"{key}_id": tokenizer.token_to_id(token) for key, token in settings.items() if key.endswith("_token")}
    config = model_class.config_class(**{**sizes, **ids, **choices}, vocab_size=tokenizer.get_vocab_size())
    torch.manual_seed(0)
    model_class(config).save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    special = {key: token for key, token in settings.items() if key.endswith("_token")}
    (folder / "special_tokens_map.json").write_text(json.dumps(special))
    if "chat_template" in settings:
        (folder / "chat_template.jinja").write_text(settings["chat_template"])
    return folder


def imported_and_exported(public: Path, tmp_path: Path) -> Path:
    assert importing.main([str(public), "--out", str(tmp_path / "run")]) == 0
    assert export.main([str(tmp_path / "run"), "--to", str(tmp_path / "out")]) == 0
    return tmp_path / "out"


def assert_same_tokenizer(folder: Path, public: Path) -> None:
    for file in public.glob("*"):
        if "token" in file.name or "chat" in file.name:
            assert (folder / file.name).read_bytes() == file.read_bytes(), file.name
    before, after = (library.AutoTokenizer.from_pretrained(at) for at in (public, folder))
    assert after.special_tokens_map == before.special_tokens_map
    assert after.chat_template == before.chat_template
    assert [after(text)["input_ids"] for text in TEXTS] == [before(text)["input_ids"] for text in TEXTS]
    configs = [json.loads((at / "config.json").read_text()) for at in (public, folder)]
    theirs, ours = ({key: hf[key] for key in hf if key.endswith("_token_id")} for hf in configs)
    assert {key: ours.get(key) for key in theirs} == theirs


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_tokenizer_goes_out_as_it_came_in(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    public = checkpoint(name, tmp_path / "public")
    out = imported_and_exported(public, tmp_path)
    assert "tokenizer      the files that were imported, unchanged" in capsys.readouterr().out
    assert_same_tokenizer(out, public)


def test_a_fine_tuned_import_has_the_tokenizer_of_the_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINITRANSFORMER_DATA", str(tmp_path / "data"))
    public = checkpoint("llama 3", tmp_path / "public", max_position_embeddings=16)
    assert importing.main([str(public), "--out", str(tmp_path / "run")]) == 0
    (tmp_path / "text.txt").write_text("the dog and the cat " * 200)
    flags = ["--data", str(tmp_path / "text.txt"), "--out", str(tmp_path / "tuned"), "--device", "cpu"]
    assert train.main(["--init-from", str(tmp_path / "run"), *flags, "--steps", "1", "--warmup-steps", "0"]) == 0
    assert export.main([str(tmp_path / "tuned"), "--to", str(tmp_path / "out")]) == 0
    assert_same_tokenizer(tmp_path / "out", public)


def test_a_tokenizer_that_is_no_longer_the_imports_is_written_anew(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    public = checkpoint("gpt-neox", tmp_path / "public")
    assert importing.main([str(public), "--out", str(tmp_path / "run")]) == 0
    kept = tmp_path / "run" / FOLDER / "tokenizer_config.json"
    kept.write_text(json.dumps({"eos_token": "<|reserved_0|>"}))
    assert export.main([str(tmp_path / "run"), "--to", str(tmp_path / "out")]) == 0
    assert "unchanged" not in capsys.readouterr().out
    kept.write_text("{")
    assert export.main([str(tmp_path / "run"), "--to", str(tmp_path / "more")]) == 2
    assert f"or remove {kept.parent}: the tokenizer is written anew then" in capsys.readouterr().err


@pytest.mark.parametrize("tokenizer_class", ["BertTokenizer", "PreTrainedTokenizerFast", None])
@pytest.mark.parametrize("lowercase", [True, False])
@pytest.mark.parametrize("setting", [True, False, None])
def test_lower_case_is_what_transformers_makes_of_both_files(
    tokenizer_class: str | None, lowercase: bool, setting: bool | None, tmp_path: Path
) -> None:
    tokenizer = like_bert()
    content = json.loads(tokenizer.to_str())
    content["normalizer"]["lowercase"] = lowercase
    content["truncation"] = content["padding"] = None
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    said = {"tokenizer_class": tokenizer_class, "do_lower_case": setting, "eos_token": "[SEP]"}
    settings = {name: value for name, value in said.items() if value is not None}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    ours, theirs = load_tokenizer(tmp_path), library.AutoTokenizer.from_pretrained(tmp_path)
    assert ours is not None
    for text in ("THE Quick brown FOX", "judge my vow", "Größe"):
        assert ours.encode(text) == theirs(text, add_special_tokens=False)["input_ids"], text


@pytest.fixture
def classifier(tmp_path: Path) -> Path:
    names = {0: "bad", 1: "good", 2: "so-so"}
    more = {"id2label": names, "label2id": {name: number for number, name in names.items()}, "initializer_range": 1.0}
    return checkpoint("bert", tmp_path / "public", architecture="BertForSequenceClassification", **more)


@torch.inference_mode()
def test_a_classifier_is_imported_names_its_classes_and_goes_back(
    classifier: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert_same_tokenizer(imported_and_exported(classifier, tmp_path), classifier)
    out = capsys.readouterr().out
    assert f"next       python sample.py {tmp_path / 'run'}, or python train.py --init-from" in out
    configs = [json.loads((at / "config.json").read_text()) for at in (classifier, tmp_path / "out")]
    assert configs[0]["id2label"] == configs[1]["id2label"]
    assert configs[0]["label2id"] == configs[1]["label2id"]
    text = "The lazy dog, doesn't it?"
    assert sample.main([str(tmp_path / "run"), "--prompt", text]) == 0
    reference = library.BertForSequenceClassification.from_pretrained(classifier).eval()
    inputs = library.AutoTokenizer.from_pretrained(classifier)(text, return_tensors="pt")
    probabilities = reference(**inputs).logits[0].softmax(-1).tolist()
    ranked = sorted(zip(("bad", "good", "so-so"), probabilities, strict=True), key=lambda entry: -entry[1])
    assert capsys.readouterr().out == ", ".join(f"{name} {p:.1%}" for name, p in ranked) + "\n"


def test_classes_whose_names_are_damaged_are_numbers(tmp_path: Path) -> None:
    (tmp_path / FOLDER).mkdir()
    (tmp_path / FOLDER / "config.json").write_text('{"id2label": ["bad", "good"]}')
    assert class_names(tmp_path, 2) == ["0", "1"]


def test_an_imported_classifier_learns_its_own_classes_and_no_others(
    classifier: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert importing.main([str(classifier), "--out", str(tmp_path / "run")]) == 0
    labels = tmp_path / "labels.tsv"
    start = ["--init-from", str(tmp_path / "run"), "--data", str(labels), "--steps", "2"]
    labels.write_text("text\tlabel\n" + "the lazy dog\tugly\nthe quick fox\tgood\n" * 3)
    assert train.main([*start, "--out", str(tmp_path / "tuned")]) == 2
    assert "has the unknown label 'ugly': the classes are bad, good, so-so" in capsys.readouterr().err
    rows = ((f"the {i} dogs", name) for i in range(20) for name in ("so-so", "good", "bad"))
    labels.write_text("text\tlabel\n" + "".join(f"{text} {name}\t{name}\n" for text, name in rows))
    assert train.main([*start, "--out", str(tmp_path / "tuned")]) == 0
    assert Run.open(tmp_path / "tuned").class_names == ["bad", "good", "so-so"]
