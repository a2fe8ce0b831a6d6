"""How texts begin and end for imported models: from text to tokens to text, as `transformers` does by its defaults."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minitransformer import pretrained
from minitransformer.commands import sample
from minitransformer.errors import UserError
from minitransformer.generation.config import SamplingConfig
from minitransformer.generation.decode import generate
from minitransformer.generation.fill import encode_with_masks, fill_masks
from minitransformer.generation.samples import sample_of, translations
from minitransformer.models.model import Model
from minitransformer.pretrained.tokenizer_files import save_tokenizer
from minitransformer.pretrained.tokenizers import load_tokenizer, template
from minitransformer.runs import Run
from minitransformer.text.tokenizers import Bytes, Framing, Tokenizer
from minitransformer.training.checkpoint import write_checkpoint
from minitransformer.training.config import DataConfig, RunConfig, TrainingConfig

library = pytest.importorskip("tokenizers", reason="the tokenizers package is not installed")
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers  # noqa: E402

TEXTS = ["the cat sat on the mat", "a dog and the cat", "quick brown foxes jump over the lazy dog"]
NEW_TOKENS = 8


@dataclass(frozen=True)
class Kind:
    """A tiny model with a tiny tokenizer of its kind: names as in `transformers`."""

    architecture: str
    special: tuple[str, ...]
    config: dict[str, Any]
    template: str = "$A"
    words: str = "bytes"
    names: dict[str, str] | None = None


STACK = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 4}
BART = {f"{side}_{name}": value for side in ("encoder", "decoder") for name, value in (("layers", 2), ("ffn_dim", 48))}
BART |= {"d_model": 32, "encoder_attention_heads": 4, "decoder_attention_heads": 4, "max_position_embeddings": 64}
ORDER = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")

DECODERS = {
    "gpt2": Kind(
        "GPT2LMHeadModel",
        ("<|endoftext|>",),
        {"n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "bos_token_id": 0, "eos_token_id": 0},
        names={"eos_token": "<|endoftext|>"},
    ),
    "llama": Kind(
        "LlamaForCausalLM",
        ("<unk>", "<s>", "</s>"),
        {**STACK, "max_position_embeddings": 64},
        "<s> $A",
        "fallback",
        {"bos_token": "<s>", "eos_token": "</s>"},
    ),
    "llama 3": Kind(
        "LlamaForCausalLM",
        ("<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"),
        {**STACK, "max_position_embeddings": 64, "bos_token_id": "<|begin_of_text|>"}
        | {"eos_token_id": ["<|end_of_text|>", "<|eot_id|>"]},
        "<|begin_of_text|> $A",
        "bytes last",
        {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"},
    ),
}
TRANSLATORS = {
    "t5": Kind(
        "T5ForConditionalGeneration",
        ("<pad>", "</s>", "<unk>"),
        {**T5, "decoder_start_token_id": 0},
        "$A </s>",
        "unigram",
        {"eos_token": "</s>", "pad_token": "<pad>"},
    ),
    "marian": Kind(
        "MarianMTModel",
        ("</s>", "<unk>", "<pad>"),
        {**BART, "pad_token_id": 2, "decoder_start_token_id": 2, "eos_token_id": 0, "forced_eos_token_id": 0},
        "$A </s>",
        "unigram",
        {"eos_token": "</s>", "pad_token": "<pad>"},
    ),
    "bart": Kind(
        "BartForConditionalGeneration",
        ORDER,
        {**BART, "forced_bos_token_id": 0},
        "<s> $A </s>",
        names={"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "mask_token": "<mask>"},
    ),
}
FILLERS = {
    "bert": Kind(
        "BertForMaskedLM",
        ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"),
        {**STACK, "max_position_embeddings": 64},
        "[CLS] $A [SEP]",
        "wordpiece",
        {"cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]", "mask_token": "[MASK]"},
    ),
    "roberta": Kind(
        "RobertaForMaskedLM",
        ORDER,
        {**STACK, "max_position_embeddings": 66, "type_vocab_size": 1, "layer_norm_eps": 1e-5},
        "<s> $A </s>",
        names={"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "mask_token": "<mask>"},
    ),
}
KINDS = {**DECODERS, **TRANSLATORS, **FILLERS}


def implementation_of(kind: Kind) -> Any:
    """A tokenizer fitted to TEXTS, by the package."""
    special = list(kind.special)
    options: dict[str, Any] = {"special_tokens": special, "show_progress": False}
    if kind.words == "wordpiece":
        made = library.Tokenizer(models.WordPiece(unk_token="[UNK]"))
        made.normalizer = normalizers.BertNormalizer(lowercase=True)
        made.pre_tokenizer, made.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
        trainer = trainers.WordPieceTrainer(vocab_size=90, **options)
    elif kind.words == "unigram":
        made = library.Tokenizer(models.Unigram())
        made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
        trainer = trainers.UnigramTrainer(vocab_size=90, unk_token="<unk>", **options)
    elif kind.words == "fallback":
        made = library.Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
        made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
        trainer = trainers.BpeTrainer(vocab_size=90, **options)
    else:
        made = library.Tokenizer(models.BPE())
        made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
        options |= {"initial_alphabet": pre_tokenizers.ByteLevel.alphabet()}
        options |= {"special_tokens": []} if kind.words == "bytes last" else {}
        trainer = trainers.BpeTrainer(vocab_size=290, **options)
    made.train_from_iterator(TEXTS * 4, trainer)
    made.add_special_tokens([AddedToken(name, lstrip=name == "<mask>", special=True) for name in special])
    ids = [(name, made.token_to_id(name)) for name in special if name in kind.template.split()]
    if ids:
        made.post_processor = processors.TemplateProcessing(single=kind.template, special_tokens=ids)
    return made


@dataclass(frozen=True)
class Pair:
    """The same checkpoint, opened by `transformers` and by us."""

    folder: Path
    reference: Any
    their_tokenizer: Any
    model: Model
    tokenizer: Tokenizer


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Pair]:
    transformers = pytest.importorskip("transformers", reason="the reference implementation is not installed")
    made: dict[str, Pair] = {}

    def of(name: str) -> Pair:
        if name in made:
            return made[name]
        kind, folder = KINDS[name], tmp_path_factory.mktemp("public")
        implementation = implementation_of(kind)
        choices = {"vocab_size": implementation.get_vocab_size(), **kind.config}
        for field in ("bos_token_id", "eos_token_id"):
            if isinstance(value := choices.get(field), str):
                choices[field] = implementation.token_to_id(value)
            elif isinstance(value, list):
                choices[field] = [implementation.token_to_id(name) for name in value]
        architecture = getattr(transformers, kind.architecture)
        torch.manual_seed(2)
        reference = architecture(architecture.config_class(**choices)).eval()
        with torch.no_grad():
            for parameter in reference.parameters():
                parameter.normal_(std=0.3)
        theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=implementation, **(kind.names or {}))
        reference.save_pretrained(folder)
        theirs.save_pretrained(folder)
        model, tokenizer = pretrained.load(folder)
        assert tokenizer is not None
        made[name] = Pair(folder, reference.double(), theirs, model.double(), tokenizer)
        return made[name]

    return of


def written_by(pair: Pair, text: str, **options: Any) -> list[int]:
    inputs = pair.their_tokenizer(text, return_tensors="pt")
    inputs.pop("token_type_ids", None)
    with torch.no_grad():
        [row] = pair.reference.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False, **options).tolist()
    return row[1:] if pair.model.config.topology == "encoder-decoder" else row[inputs["input_ids"].size(1) :]


def before(ends: tuple[int, ...], tokens: list[int]) -> list[int]:
    return tokens[: next((place for place, token in enumerate(tokens) if token in ends), len(tokens))]


GREEDY = SamplingConfig(temperature=0, max_new_tokens=NEW_TOKENS)


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("name", DECODERS)
def test_a_prompt_is_continued_as_by_the_reference(name: str, text: str, opened: Any) -> None:
    pair = opened(name)
    assert pair.tokenizer.encode_prompt(text) == pair.their_tokenizer(text)["input_ids"]
    steps = generate(pair.model, pair.tokenizer.encode_prompt(text), GREEDY, ends=pair.tokenizer.ends)
    ours = [token for [token] in steps]
    assert before(pair.tokenizer.ends, ours) == before(pair.tokenizer.ends, written_by(pair, text))


@pytest.mark.parametrize("num_beams", [1, 3])
@pytest.mark.parametrize("name", TRANSLATORS)
def test_a_source_becomes_the_target_of_the_reference(name: str, num_beams: int, opened: Any) -> None:
    pair = opened(name)
    sampling = SamplingConfig(temperature=0, max_new_tokens=NEW_TOKENS, num_beams=num_beams)
    for text in TEXTS:
        source = pair.tokenizer.pair_framing.around(pair.tokenizer.encode(text))
        assert source == pair.their_tokenizer(text)["input_ids"]
        [[ours]] = translations(pair.model, [source], sampling, pair.tokenizer)
        assert ours == before(pair.tokenizer.ends, written_by(pair, text, num_beams=num_beams))


@pytest.mark.parametrize("text", ["the {} sat on the mat", "{} dog", "a {} and the {}", "the cat {}"])
@pytest.mark.parametrize("name", FILLERS)
def test_masks_are_filled_as_by_the_pipeline(name: str, text: str, opened: Any) -> None:
    from transformers import pipeline

    pair = opened(name)
    text = text.replace("{}", pair.their_tokenizer.mask_token)
    found = pipeline("fill-mask", model=pair.reference, tokenizer=pair.their_tokenizer)(text)
    expected = [
        [(guess["token"], guess["score"]) for guess in mask] for mask in ([found] if "score" in found[0] else found)
    ]
    tokens = pair.tokenizer.masked_framing.around(encode_with_masks(pair.tokenizer, text))
    assert tokens == pair.their_tokenizer(text)["input_ids"]
    ours = fill_masks(pair.model, tokens, pair.tokenizer.mask)
    assert [[token for token, _ in mask] for mask in ours] == [[token for token, _ in mask] for mask in expected]
    for mask, reference in zip(ours, expected, strict=True):
        assert [p for _, p in mask] == pytest.approx([p for _, p in reference], rel=1e-5)


@pytest.mark.parametrize("name", KINDS)
def test_framing_travels_in_a_run_and_back_into_a_checkpoint(name: str, opened: Any, tmp_path: Path) -> None:
    tokenizer = opened(name).tokenizer
    tokenizer.save(tmp_path / "run.json")
    again = Tokenizer.load(tmp_path / "run.json")
    assert (again.framing, again.fingerprint) == (tokenizer.framing, tokenizer.fingerprint)
    run = Run.create(tmp_path / "run", config_of(opened(name).model), tokenizer, tokenizer)
    write_checkpoint(run.checkpoints, 0, opened(name).model.float(), {})
    from importlib import import_module

    assert import_module("minitransformer.commands.export").main([str(run.path), "--to", str(tmp_path / "out")]) == 0
    opened(name).model.double()
    _, back = pretrained.load(tmp_path / "out")
    assert back is not None
    assert (back.framing, back.ends, back.encode(TEXTS[0])) == (
        tokenizer.framing,
        tokenizer.ends,
        tokenizer.encode(TEXTS[0]),
    )


def config_of(model: Model) -> RunConfig:
    return RunConfig(model.config, DataConfig(), TrainingConfig(objective=OBJECTIVES[model.config.topology]))


OBJECTIVES = {"decoder": "causal", "encoder": "masked", "encoder-decoder": "seq2seq"}


@pytest.mark.parametrize("name", ["llama 3", "bart"])
def test_what_is_exported_the_library_frames_alike(name: str, opened: Any, tmp_path: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    pair = opened(name)
    save_tokenizer(pair.tokenizer, tmp_path)
    theirs = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    assert theirs(TEXTS[0])["input_ids"] == pair.their_tokenizer(TEXTS[0])["input_ids"]


def test_our_own_tokenizers_frame_texts_as_training_does() -> None:
    tokenizer = Bytes()
    end = tokenizer.end_of_text
    assert tokenizer.encode_prompt("a") == [97]
    assert tokenizer.encode_prompt("") == [end]
    assert tokenizer.masked_framing.around([97]) == [end, 97]
    assert tokenizer.pair_framing.around([97]) == [97, end]
    assert (tokenizer.separator, tokenizer.target_start, tokenizer.ends) == ([end], end, (end,))
    assert "framing" not in tokenizer.to_json(), "runs and prepared data from before keep their names"


ids = st.lists(st.integers(0, 255), max_size=3).map(tuple)
maybe = st.none() | st.integers(0, 255)


@given(framing=st.builds(Framing, ids, ids, maybe, maybe, maybe, ids, ids))
def test_any_framing_is_saved_and_restored(framing: Framing) -> None:
    framed = Bytes().framed(framing)
    again = Tokenizer.from_json(json.loads(json.dumps(framed.to_json())))
    assert again.framing == framing
    assert (framed.fingerprint == Bytes().fingerprint) == (framing == Framing())
    assert again.with_special_tokens(["<|more|>"]).framing == framing


def test_the_names_in_tokenizer_files_are_those_of_the_first_version() -> None:
    framing = Framing((1,), (2,), start=3, forced_bos=4, forced_eos=5, other_ends=(6,), suppressed=(7,))
    stored = {"before": (1,), "after": (2,), "start": 3, "first": 4, "last": 5, "other_ends": (6,), "never": (7,)}
    assert Bytes().framed(framing).to_json()["framing"] == stored
    assert Tokenizer.from_json({**Bytes().to_json(), "framing": stored}).framing == framing


@pytest.mark.parametrize("framing", [{"before": "ab"}, {"start": [1]}, {"ever": [1]}, {"after": [-1]}, {"start": 900}])
def test_damaged_framing_is_one_sentence(framing: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"not a tokenizer|framing uses token 900"):
        Tokenizer.from_json({**Bytes().to_json(), "framing": framing})


SEQUENCE = {"Sequence": {"id": "A", "type_id": 0}}
FIRST, LAST = ({"SpecialToken": {"id": name, "type_id": 0}} for name in "fl")
SPECIAL = {"f": {"id": "f", "ids": [4, 5], "tokens": []}, "l": {"id": "l", "ids": [6], "tokens": []}}


@pytest.mark.parametrize(
    ("processor", "expected"),
    [
        (None, ((), ())),
        ({"type": "ByteLevel"}, ((), ())),
        ({"type": "BertProcessing", "sep": ["[SEP]", 3], "cls": ["[CLS]", 2]}, ((2,), (3,))),
        ({"type": "RobertaProcessing", "sep": ["</s>", 2], "cls": ["<s>", 0]}, ((0,), (2,))),
        (
            {"type": "TemplateProcessing", "single": [FIRST, SEQUENCE, LAST], "special_tokens": SPECIAL},
            ((4, 5), (6,)),
        ),
        (
            {
                "type": "Sequence",
                "processors": [
                    {"type": "ByteLevel"},
                    {"type": "TemplateProcessing", "single": [SEQUENCE, LAST], "special_tokens": SPECIAL},
                ],
            },
            ((), (6,)),
        ),
    ],
)
def test_every_kind_of_post_processor_is_read(processor: dict[str, Any] | None, expected: Any) -> None:
    assert template(processor) == expected


def test_a_start_that_the_tokenizer_lacks_is_refused(opened: Any, tmp_path: Path) -> None:
    for file in opened("t5").folder.glob("token*.json"):
        (tmp_path / file.name).write_text(file.read_text())
    (tmp_path / "config.json").write_text('{"is_encoder_decoder": true, "decoder_start_token_id": 9999}')
    with pytest.raises(UserError, match=r"framing uses token 9999, but the tokenizer has"):
        load_tokenizer(tmp_path)


def test_a_text_ends_with_any_of_several_ends(opened: Any) -> None:
    pair = opened("llama 3")
    first, second = pair.tokenizer.ends
    names = pair.tokenizer.special_tokens
    assert {names["<|endoftext|>"], names["<|eot_id|>"]} == {first, second}
    prompt = pair.tokenizer.encode_prompt(TEXTS[0])
    [greedy] = zip(*generate(pair.model, prompt, GREEDY), strict=True)
    steps = [step for [step] in generate(pair.model, prompt, GREEDY, ends=(9999, greedy[2]))]
    assert steps == list(greedy[: greedy.index(greedy[2]) + 1])


def test_a_line_goes_through_the_command_framed(opened: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    pair = opened("bart")
    run = Run.create(tmp_path / "run", config_of(pair.model), pair.tokenizer, pair.tokenizer)
    write_checkpoint(run.checkpoints, 0, pair.model.float(), {})
    pair.model.double()
    arguments = ["--prompt", TEXTS[0], "--temperature", "0", "--max-new-tokens", str(NEW_TOKENS), "--device", "cpu"]
    assert sample.main([str(run.path), *arguments]) == 0
    expected = pair.their_tokenizer.decode(written_by(pair, TEXTS[0]), skip_special_tokens=True)
    assert capfd.readouterr().out == expected + "\n"


def test_the_sample_of_an_imported_decoder_begins_as_its_texts_do(opened: Any) -> None:
    pair = opened("llama")
    shown = sample_of(pair.model, pair.tokenizer, pair.tokenizer, [], 4)
    steps = generate(pair.model, [1], SamplingConfig(max_new_tokens=4, seed=0), ends=(2,))
    assert shown == pair.tokenizer.decode([token for [token] in steps])
