"""A certificate notices whatever in a copy is not as it was trained, in every format."""

from __future__ import annotations

import json
import re
import shutil
from contextlib import suppress
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from minitransformer import pretrained
from minitransformer.commands import export, sample
from minitransformer.errors import UserError
from minitransformer.exporting import ExportFormat
from minitransformer.exporting.certificate import (
    compare_copy,
    compared_inputs,
    same_chat,
    same_ends,
    same_greedy_text,
    same_logits,
    same_token_ids,
    same_weights,
)
from minitransformer.exporting.copies import Copy
from minitransformer.exporting.exported import Exported
from minitransformer.exporting.formats import ExportChoices, certify, export_run
from minitransformer.exporting.hostile import PROMPTS, hostile_texts
from minitransformer.exporting.llama_cpp import (
    has_llama_cpp,
    near_weights,
    rounded_logits,
    tabled_gelu,
    unrounded_logits,
)
from minitransformer.models.config import ModelConfig
from minitransformer.pretrained import gguf_files
from minitransformer.pretrained.gguf_families import GGUFFamily
from minitransformer.pretrained.gguf_files import STORED
from minitransformer.pretrained.gguf_vocabularies import PATTERNS, PRE, gguf_vocabulary, tokenizer_of_gguf
from minitransformer.pretrained.tokenizer_files import described
from minitransformer.pretrained.tokenizers import FILE, SETTINGS, load_tokenizer
from minitransformer.runs import Run
from minitransformer.runs import importing as importing_room
from minitransformer.settings import with_settings
from minitransformer.text.tokenizers import BPE, END_OF_TEXT, GPT2_SPLIT, Bytes, Characters, GPT2Encoding
from minitransformer.text.tokenizers.published import O200KEncoding
from minitransformer.text.tokenizers.spelled import encode_with_special_tokens
from tests.exports_for_tests import (
    IN_A_FILE,
    IN_A_FOLDER,
    LLAMA,
    LLAMA3,
    MEMBERS_OF_LLAMA_CPP,
    SHAPE,
    run_that_leaves,
    tokenizer_of_conversations,
)
from tests.runs_for_tests import Call

with suppress(ImportError):  # before a test captures the standard error that it keeps for its warnings
    import transformers  # noqa: F401

importing = import_module("minitransformer.commands.import")
QUICK = (same_weights, same_token_ids, same_logits, same_chat, same_ends)


def written(run: Any, folder: Path, name: str, **choices: Any) -> ExportFormat:
    """A run's copy in `folder`, without a certificate."""
    made: ExportFormat = ExportFormat.named(name)(Exported.of(run), ExportChoices(**choices))
    folder.mkdir()
    made.write(folder)
    return made


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[ExportFormat, Path]:
    pytest.importorskip("transformers", reason="the reference implementation is not installed")
    path = tmp_path_factory.mktemp("llama")
    return written(run_that_leaves(path / "run", **LLAMA), path / "out", "hf"), path / "out"


@pytest.mark.parametrize("name", IN_A_FOLDER)
def test_a_fault_in_a_folder_is_noticed(name: str, llama: tuple[ExportFormat, Path], tmp_path: Path) -> None:
    made, whole = llama
    noticed_by, plant = IN_A_FOLDER[name]
    plant(Path(shutil.copytree(whole, tmp_path / "out")))
    found = compare_copy(made.exported, made.open(tmp_path / "out"), QUICK)
    assert noticed_by in {each.name for each in found if not each.agrees}


def test_a_copy_without_a_fault_agrees_in_everything(
    llama: tuple[ExportFormat, Path], tmp_path: Path, call: Call
) -> None:
    made, _ = llama
    code, out, err = call(export, str(made.exported.run.path), "--to", str(tmp_path / "out"), "--license", "mit")
    assert (code, err) == (0, "")
    for name in ("weights", "token ids", "logits", "greedy text", "chat template", "stop tokens"):
        assert f"{name:14} same: " in out
    certificate = json.loads((tmp_path / "out" / "certificate.json").read_text())
    assert certificate["agrees"] is certificate["is_foreign"] is True
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md"} <= certificate["sha256"].keys()
    card = (tmp_path / "out" / "README.md").read_text()
    assert card.startswith("---\nlicense: mit\npipeline_tag: text-generation\n")
    assert "| weights | 21 tensors, bit for bit |" in card


class Stubborn(Copy):
    """A copy that always writes the same tokens."""

    def __init__(self, written: list[list[int]]) -> None:
        self.written = iter(written)

    def greedy(self, prompt: list[int], count: int, ends: Any) -> list[int]:
        return next(self.written)


def test_greedy_text_differs_if_one_of_several_texts_does(llama: tuple[ExportFormat, Path]) -> None:
    exported = llama[0].exported
    right = [exported.greedy(exported.tokenizer.encode_prompt(text), 24) for text in PROMPTS]
    assert all(right)
    agreement = same_greedy_text(exported, Stubborn([list(text or []) for text in right]))
    assert agreement is not None
    assert agreement.agrees
    first, second, third = ([*text] for text in right if text)
    for wrong in ([[5, *first[1:]], second, third], [first[:-1], second, third], [first, second, [*third[:-1], 5]]):
        agreement = same_greedy_text(exported, Stubborn(wrong))
        assert agreement is not None
        assert not agreement.agrees


GRAPHS: dict[str, tuple[str, dict[str, Any]]] = {
    "decoder": ("causal", {"token_smear": True, "num_kv_heads": 1, "attention_window": 16, "qk_norm": "head"}),
    "encoder": ("masked", {"topology": "encoder", "head": "transformed"}),
    "encoder-decoder": ("seq2seq", {"topology": "encoder-decoder", "norm": "rms", "positions": "t5"}),
}


@pytest.mark.unchecked_shapes
@pytest.mark.slow
@pytest.mark.parametrize(("name", "topology"), [*(("onnx", each) for each in GRAPHS), ("torch", "encoder")])
def test_a_model_leaves_as_a_graph_with_its_cache(name: str, topology: str, tmp_path: Path) -> None:
    if name == "onnx":
        pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
        pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    objective, choices = GRAPHS[topology]
    run = run_that_leaves(tmp_path / "run", objective, num_layers=1, **choices)
    certificate = export_run(ExportFormat.named(name)(Exported.of(run), ExportChoices()), tmp_path / "out", None)
    found = {check.name: check for check in certificate.checks}
    assert certificate.is_foreign
    assert ("greedy text" in found) == (topology != "encoder")
    assert found["logits"].figures["largest_difference"] < 1e-5
    assert found["chat template"].agrees


@pytest.mark.slow
@pytest.mark.unchecked_shapes
def test_a_fault_in_a_graph_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = run_that_leaves(tmp_path / "run", num_layers=1)
    made = ExportFormat.named("torch")(Exported.of(run), ExportChoices())
    save = torch.export.save

    def rounded(program: Any, path: Any) -> None:
        for name, weight in program.state_dict.items():
            if "final_norm" in name:
                weight.data.copy_(weight.bfloat16())
        save(program, path)

    monkeypatch.setattr(torch.export, "save", rounded)
    intact = made.exported.model.state_dict()
    kept = {name: weight.clone() for name, weight in intact.items()}
    (tmp_path / "out").mkdir()
    made.write(tmp_path / "out")
    made.exported.model.load_state_dict(kept)
    found = {check.name: check for check in compare_copy(made.exported, made.open(tmp_path / "out"), made.comparisons)}
    assert not found["weights"].agrees
    assert "final_norm" in found["weights"].found
    assert not found["logits"].agrees


needs_gguf = pytest.mark.skipif(not find_spec("gguf"), reason="the package gguf is not installed")


MEMBERS = [pytest.param(name, marks=pytest.mark.slow if " " in name else ()) for name in MEMBERS_OF_LLAMA_CPP]
"""one of each architecture, and others, which are slower"""


@needs_gguf
@pytest.mark.parametrize("name", MEMBERS)
def test_a_gguf_file_comes_back_bit_for_bit_and_leaves_proven(name: str, tmp_path: Path) -> None:
    run = run_that_leaves(tmp_path / "run", **MEMBERS_OF_LLAMA_CPP[name])
    made = written(run, tmp_path / "out", "gguf", weights="f32")
    model, tokenizer = pretrained.load(tmp_path / "out" / "model.gguf")
    assert tokenizer is not None
    ours = dict(made.exported.model.named_parameters())
    for key, weight in model.named_parameters():
        torch.testing.assert_close(weight, ours[key], rtol=0, atol=1e-6 if "gemma" in name else 0)
    [tokens] = compared_inputs(made.exported)
    torch.testing.assert_close(model(tokens), made.exported.model(tokens), rtol=0, atol=1e-4)
    assert sorted(tokenizer.ends) == sorted(made.exported.ends)
    if has_llama_cpp():
        assert certify(made, tmp_path / "out").difference is None


@pytest.mark.parametrize("name", PATTERNS)
def test_a_text_is_split_in_a_gguf_file_as_its_name_says(name: str) -> None:
    whole = gguf_vocabulary(described(tokenizer_of_conversations()), 303)
    back = gguf_vocabulary(tokenizer_of_gguf({**whole, PRE: name}), 303)
    assert PATTERNS[back[PRE]] == PATTERNS[name]
    assert {**back, PRE: whole[PRE]} == whole


def test_hostile_texts_have_the_same_ids_in_a_gguf_file(tmp_path: Path) -> None:
    tokenizer = tokenizer_of_conversations()
    for name, content in {
        FILE: tokenizer_of_gguf(gguf_vocabulary(described(tokenizer), 303)),
        SETTINGS: {"eos_token": END_OF_TEXT},
    }.items():
        (tmp_path / name).write_text(json.dumps(content))
    back = load_tokenizer(tmp_path)
    assert back is not None
    for text in filter(None, hostile_texts(tokenizer, tokenizer.special_tokens)):
        assert encode_with_special_tokens(back, text) == encode_with_special_tokens(tokenizer, text)


def test_the_tokenizers_that_llama_cpp_reads_are_those_that_say_so() -> None:
    ranks = [*(bytes([value]) for value in range(256)), b"th"]
    others = [GPT2Encoding(ranks, pattern=GPT2_SPLIT), O200KEncoding(ranks, pattern=r"\p{L}+|\P{L}+")]
    for tokenizer in [Bytes(), Characters("ab"), BPE(ranks), *others]:
        accepted = True
        try:
            gguf_vocabulary(described(tokenizer), tokenizer.vocab_size)
        except UserError:
            accepted = False
        assert tokenizer.in_gguf == accepted, tokenizer.name


@pytest.mark.parametrize(
    ("name", "choices", "obstacle"),
    [
        ("gemma3", {"rotary_scaling": "yarn", "rotary_magnitude": 1.4}, "rotary_magnitude is 1.4"),
        ("qwen2", LLAMA3, "rotary_scaling is 'llama3', and qwen2 can only hold 'none'"),
        ("falcon", {"positions": "alibi-falcon"}, "positions is 'alibi-falcon', and falcon can only hold 'rotary'"),
        ("command-r", {"qk_norm": "each-head"}, "qk_norm is 'each-head', and command-r can only hold 'none'"),
        ("smollm3", {"rotary_layers": (True, False)}, "rotary_layers is (True, False, True, False, True)"),
        ("phi3", {"attention_window": 8}, "attention_window is 8, and phi3 can only hold None"),
        ("llama", {"rotary_fraction": 0.5}, "rotary_fraction is 0.5, and llama can only hold 1.0"),
        ("dbrx", {"head_dim": 8}, "head_dim is 8, and dbrx can only hold 16"),
    ],
)
def test_what_llama_cpp_ignores_or_aborts_at_is_in_the_way(name: str, choices: dict[str, Any], obstacle: str) -> None:
    members = {"vocab_size": 300, **SHAPE, **MEMBERS_OF_LLAMA_CPP[name]}
    config = with_settings(ModelConfig(), members)
    assert GGUFFamily.named(name).obstacles(config) == []
    found = GGUFFamily.named(name).obstacles(with_settings(config, choices))
    assert any(str(each).startswith(obstacle) for each in found), list(map(str, found))


@needs_gguf
@pytest.mark.skipif(not has_llama_cpp(), reason="llama-cpp-python is not installed")
def test_what_the_rounding_of_gelu_hides_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = run_that_leaves(tmp_path / "run", **MEMBERS_OF_LLAMA_CPP["gpt2"])
    key, original = "gpt2.attention.layer_norm_epsilon", gguf_files._add
    monkeypatch.setattr(
        gguf_files, "_add", lambda writer, name, value: original(writer, name, 5e-5 if name == key else value)
    )
    made = written(run, tmp_path / "out", "gguf", weights="f32")
    found = compare_copy(made.exported, made.open(tmp_path / "out"), (unrounded_logits, tabled_gelu))
    assert [(each.name, each.agrees) for each in found] == [("logits", True), ("tabled GELU", False)]


@needs_gguf
@pytest.mark.parametrize("stored", STORED)
def test_weights_in_a_gguf_file_are_as_near_as_their_type(stored: str, tmp_path: Path, call: Call) -> None:
    run = run_that_leaves(tmp_path / "run", **LLAMA)
    flags = [str(run.path), "--to", str(tmp_path / "out"), "--format", "gguf", "--weights", stored]
    code, out, err = call(export, *flags)
    assert code == 0, err  # llama.cpp, where it is installed, notes there what it does with a short context
    assert re.search(rf"weights        same: 21 tensors as {stored}, off by at most", out)
    assert ("opened by      llama-cpp-python" in out) == has_llama_cpp()


@needs_gguf
@pytest.mark.parametrize("name", IN_A_FILE)
def test_a_fault_in_a_gguf_file_is_noticed(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    noticed_by, place, change = IN_A_FILE[name]
    run = run_that_leaves(tmp_path / "run", **LLAMA)
    original = getattr(gguf_files, place)
    monkeypatch.setattr(gguf_files, place, lambda *given: change(original(*given)))
    made = written(run, tmp_path / "out", "gguf", weights="f32")
    monkeypatch.setattr(gguf_files, place, original)
    comparisons = (near_weights, same_token_ids, unrounded_logits, rounded_logits, same_ends)
    found = compare_copy(made.exported, made.open(tmp_path / "out"), comparisons)
    assert noticed_by in {each.name for each in found if not each.agrees}


@needs_gguf
def test_a_gguf_file_is_imported_sampled_and_goes_back(tmp_path: Path, call: Call) -> None:
    run = run_that_leaves(tmp_path / "run", **LLAMA)
    written(run, tmp_path / "out", "gguf", weights="q8_0")
    code, out, err = call(importing, str(tmp_path / "out" / "model.gguf"), "--out", str(tmp_path / "back"))
    assert (code, err) == (0, "")
    assert "tokenizer  bpe, 303 tokens" in out
    code, out, _ = call(sample, str(tmp_path / "back"), "--prompt", "The quick", "--max-new-tokens", "3")
    assert code == 0
    assert out.startswith("The quick")
    assert Run.open(tmp_path / "back").chat_template is not None


def with_type(whole: bytes, number: int) -> bytes:
    """A GGUF file whose first tensor is said to be of the type with this number."""
    name = b"token_embd.weight"
    begin = whole.index(name) + len(name) + 4 + 2 * 8
    return whole[:begin] + number.to_bytes(4, "little") + whole[begin + 4 :]


@needs_gguf
def test_a_gguf_file_that_is_damaged_or_unknown_is_one_sentence(tmp_path: Path) -> None:
    run = run_that_leaves(tmp_path / "run", **LLAMA)
    written(run, tmp_path / "out", "gguf")
    path = tmp_path / "out" / "model.gguf"
    whole = path.read_bytes()
    for content, message in {
        whole[:-100]: "cut short|not a whole GGUF file",
        whole[:500]: "not a whole GGUF file",
        b"no model at all": "is no GGUF file",
        with_type(whole, 77): "stores weights in a way that is not known",
        with_type(whole, 24): "stores .* as I8, which is not known: use f16, q8_0, q4_0 or q4_k",
        whole.replace(b"llama", b"lamma"): "holds the architecture 'lamma': known are llama, qwen2",
        whole.replace(b"llama-bpe", b"lamma-bpe"): "splits texts as 'lamma-bpe': known are gpt-2",
    }.items():
        path.write_bytes(content)
        with pytest.raises(UserError, match=message):
            importing_room.import_checkpoint(str(path), tmp_path / "back")
        assert not (tmp_path / "back").exists()


@needs_gguf
def test_a_gguf_file_is_a_checkpoint_to_start_from_and_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = run_that_leaves(tmp_path / "run", **LLAMA)
    made = written(run, tmp_path / "out", "gguf")
    path = tmp_path / "out" / "model.gguf"
    imported = importing_room.as_run(str(path), tmp_path)
    assert importing_room.as_run(str(path), tmp_path) == imported
    assert Run.open(imported).config.model.num_kv_heads == 1
    with pytest.raises(UserError, match=r"model.gguf is a public checkpoint, not a run: import it with"):
        Run.open(path)
    with pytest.raises(UserError, match=r"there is no file .*none.gguf: give a checkpoint file"):
        importing_room.import_checkpoint(str(tmp_path / "none.gguf"), tmp_path / "back")
    about = type(made)._about
    monkeypatch.setattr(type(made), "_about", lambda self: {**about(self), "split.count": 2})
    written(run, tmp_path / "parts", "gguf")
    with pytest.raises(UserError, match="is one of 2 parts of a model: join them by llama-gguf-split --merge"):
        pretrained.load(tmp_path / "parts" / "model.gguf")


@needs_gguf
def test_what_llama_cpp_cannot_hold_is_refused_with_all_reasons(tmp_path: Path, call: Call) -> None:
    run = run_that_leaves(tmp_path / "run", feedforward="squared-relu", residual="peri")
    flags = [str(run.path), "--to", str(tmp_path / "out"), "--format"]
    code, _, err = call(export, *flags, "gguf")
    assert code == 2
    assert "residual is 'peri'" in err
    assert "feedforward is 'squared-relu'" in err
    assert "train a model with --" in err
    code, _, err = call(export, *flags, "onnx", "--weights", "f16")
    assert (code, "format 'onnx' cannot store weights as 'f16': leave it out" in err) == (2, True)
    code, _, err = call(export, *flags, "torch", "--family", "llama")
    assert (code, "format 'torch' has no families: leave --family llama out" in err) == (2, True)
    assert not (tmp_path / "out").exists()
