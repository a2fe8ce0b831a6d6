"""Tokenizers of public checkpoints against the `tokenizers` package: read through tiktoken, run, and written."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import pre_tokenizers

from minitransformer.errors import UserError
from minitransformer.generation.streaming import TextStream
from minitransformer.pretrained.tokenizer_files import described, save_tokenizer
from minitransformer.pretrained.tokenizers import PublicTokenizer, characters_of_bytes, load_tokenizer
from minitransformer.text.tokenizers import BPE, END_OF_TEXT, GPT4_SPLIT, Bytes, Tokenizer
from tests.prepared_for_tests import fitted
from tests.tokenizers_for_tests import (
    PROSE,
    byte_level,
    like_bert,
    like_gpt2,
    like_llama2,
    like_llama3,
    like_qwen2,
    like_t5,
)

library = pytest.importorskip("tokenizers")


GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


KINDS: dict[str, Callable[[], Any]] = {
    kind.__name__: kind for kind in (like_gpt2, like_llama3, like_qwen2, like_bert, like_t5, like_llama2)
}


ENDS = {"like_gpt2": "<|endoftext|>", "like_llama3": "<|end_of_text|>", "like_qwen2": "<|endoftext|>"}


ENDS |= {"like_bert": "[SEP]", "like_t5": "</s>", "like_llama2": "</s>"}


TEXTS = [*PROSE[:3], "", " ", "  \n\n \t x", "'S 'll 1234567", "unseen: ψ Ж 𝄞 é e\u0301", "<|other|> [MASK] </s> text"]


@pytest.fixture(scope="module")
def public() -> dict[str, Any]:
    return {name: make() for name, make in KINDS.items()}


def saved(implementation: Any, folder: Path, **settings: Any) -> Path:
    implementation.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture(scope="module")
def ours(public: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    loaded = {name: load_tokenizer(saved(one, tmp_path_factory.mktemp(name))) for name, one in public.items()}
    return {name: tokenizer for name, tokenizer in loaded.items() if tokenizer is not None}


def as_text(implementation: Any, text: str) -> list[int]:
    """What the package makes of a text without truncation, padding, and special tokens inside or around it."""
    plain = library.Tokenizer.from_str(implementation.to_str())
    plain.no_truncation()
    plain.no_padding()
    plain.encode_special_tokens = True
    ids: list[int] = plain.encode(text, add_special_tokens=False).ids
    return ids


# Enough repetition for merges, and every class of characters that splits tell apart.
CHARACTERS = st.sampled_from("abcdehinorst THE'lv 0123456789\n\r\t,.!é東🦊ſ<|>")


every_kind = pytest.mark.parametrize("kind", KINDS)


@pytest.mark.parametrize("text", TEXTS)
@every_kind
def test_text_is_encoded_as_by_the_package(
    kind: str, text: str, public: dict[str, Any], ours: dict[str, Tokenizer]
) -> None:
    assert ours[kind].encode(text) == as_text(public[kind], text)


@settings(max_examples=100)
@given(text=st.text(CHARACTERS, max_size=40))
def test_byte_level_bpe_is_the_packages(public: dict[str, Any], ours: dict[str, Tokenizer], text: str) -> None:
    for kind in ("like_gpt2", "like_llama3"):
        assert ours[kind].encode(text) == as_text(public[kind], text)
        assert ours[kind].decode(ours[kind].encode(text)) == text


def test_what_tiktoken_can_run_it_runs(ours: dict[str, Tokenizer]) -> None:
    assert {kind: type(tokenizer) for kind, tokenizer in ours.items()} == {
        "like_gpt2": BPE,
        "like_llama3": BPE,
        "like_qwen2": PublicTokenizer,
        "like_bert": PublicTokenizer,
        "like_t5": PublicTokenizer,
        "like_llama2": PublicTokenizer,
    }
    assert ours["like_llama3"].pattern == GPT4_SPLIT  # type: ignore[attr-defined]


def with_ids_shuffled(content: dict[str, Any]) -> None:
    tokens = sorted(content["model"]["vocab"])
    content["model"]["vocab"] = {token: number for number, token in enumerate(tokens)}


def without_a_merge(content: dict[str, Any]) -> None:
    del content["model"]["merges"][-1]


def with_a_prefix_space(content: dict[str, Any]) -> None:
    content["pre_tokenizer"]["add_prefix_space"] = True


def without_spaces(content: dict[str, Any]) -> None:
    split = {"type": "Split", "pattern": {"Regex": " "}, "behavior": "Removed", "invert": False}
    levels = {**content["pre_tokenizer"], "use_regex": False}
    content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, levels]}


def with_a_fixed_split(content: dict[str, Any]) -> None:
    without_spaces(content)
    content["pre_tokenizer"]["pretokenizers"][0] |= {"pattern": {"String": "."}, "behavior": "Isolated"}


def with_words_to_be_found(content: dict[str, Any]) -> None:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    content["added_tokens"] += [{"id": 602, "content": "  ", **flags}, {"id": 603, "content": "ick", **flags}]


@pytest.mark.parametrize(
    "change",
    [
        with_ids_shuffled,
        without_a_merge,
        with_a_prefix_space,
        without_spaces,
        with_a_fixed_split,
        with_words_to_be_found,
    ],
)
def test_what_tiktoken_would_encode_differently_the_package_runs(
    change: Callable[[dict[str, Any]], None], public: dict[str, Any], tmp_path: Path
) -> None:
    content = json.loads(public["like_gpt2"].to_str())
    change(content)
    changed = library.Tokenizer.from_str(json.dumps(content))
    tokenizer = load_tokenizer(saved(changed, tmp_path))
    assert isinstance(tokenizer, PublicTokenizer)
    assert [tokenizer.encode(text) for text in TEXTS] == [as_text(changed, text) for text in TEXTS]


def test_a_word_that_no_merge_makes_is_found_whole() -> None:
    tokenizer = BPE([*(bytes([value]) for value in range(256)), b"abc"])
    package = library.Tokenizer.from_str(json.dumps(described(tokenizer)))
    assert as_text(package, "abc") == tokenizer.encode("abc") == [256]


@every_kind
def test_the_end_of_a_text_is_known(kind: str, public: dict[str, Any], ours: dict[str, Tokenizer]) -> None:
    assert ours[kind].end_of_text == public[kind].token_to_id(ENDS[kind])
    assert ours[kind].vocab_size == public[kind].get_vocab_size()
    assert ours[kind].token_bytes(ours[kind].end_of_text) == b""


@every_kind
def test_a_tokenizer_travels_in_a_run(kind: str, ours: dict[str, Tokenizer], tmp_path: Path) -> None:
    ours[kind].save(tmp_path / "tokenizer.json")
    again = Tokenizer.load(tmp_path / "tokenizer.json")
    assert again.fingerprint == ours[kind].fingerprint
    assert [again.encode(text) for text in TEXTS] == [ours[kind].encode(text) for text in TEXTS]
    assert (again.end_of_text, again.special_tokens) == (ours[kind].end_of_text, ours[kind].special_tokens)


@every_kind
def test_the_stream_of_tokens_is_their_text(kind: str, ours: dict[str, Tokenizer]) -> None:
    text = "the lazy dog judge my vow then there"
    ids = ours[kind].encode(text)
    stream = TextStream()
    streamed = "".join(stream.feed(ours[kind].token_bytes(token)) for token in ids) + stream.finish()
    assert streamed.lstrip() == ours[kind].decode(ids) == text
    assert len(ours[kind].pieces) == ours[kind].vocab_size


def test_bytes_that_fall_back_are_bytes(ours: dict[str, Tokenizer]) -> None:
    tokenizer = ours["like_llama2"]
    assert tokenizer.decode_bytes(tokenizer.encode("ψ")) == " ψ".encode()


@every_kind
def test_special_tokens_can_be_added(kind: str, ours: dict[str, Tokenizer]) -> None:
    more = ours[kind].with_special_tokens(["<|new|>", ENDS[kind]])
    assert more.special_tokens["<|new|>"] == ours[kind].vocab_size
    again = Tokenizer.from_json(more.to_json())
    assert again.special_tokens == more.special_tokens
    assert again.vocab_size == more.vocab_size
    assert more.encode(PROSE[0]) == ours[kind].encode(PROSE[0])


@pytest.mark.parametrize("named", ["<|other|>", {"content": "<|other|>", "special": True}], ids=type)
def test_the_settings_say_what_ends_a_text(named: Any, public: dict[str, Any], tmp_path: Path) -> None:
    tokenizer = load_tokenizer(saved(public["like_gpt2"], tmp_path, eos_token=named))
    assert tokenizer is not None
    assert tokenizer.end_of_text == public["like_gpt2"].token_to_id("<|other|>")


def test_a_tokenizer_that_ends_no_text_is_refused(tmp_path: Path) -> None:
    implementation = byte_level(pre_tokenizers.ByteLevel(add_prefix_space=False), special="<|start|>")
    with pytest.raises(UserError, match=r"has no end-of-text token: give its eos_token in tokenizer_config"):
        load_tokenizer(saved(implementation, tmp_path))


def test_what_ends_a_text_is_special_even_where_the_file_does_not_say_so(
    public: dict[str, Any], tmp_path: Path
) -> None:
    content = json.loads(public["like_bert"].to_str())
    content["added_tokens"] = []
    tokenizer = load_tokenizer(saved(library.Tokenizer.from_str(json.dumps(content)), tmp_path, eos_token="[SEP]"))
    assert tokenizer is not None
    assert tokenizer.special_tokens == {"[SEP]": tokenizer.end_of_text}
    assert tokenizer.token_bytes(tokenizer.end_of_text) == b""
    (tmp_path / "written").mkdir()
    save_tokenizer(tokenizer, tmp_path / "written")
    assert json.loads((tmp_path / "written" / "tokenizer_config.json").read_text())["eos_token"] == "[SEP]"


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        "{}",
        '{"model": null}',
        '{"model": []}',
        '{"model": {"vocab": {"</s>": 0}}, "added_tokens": [{}]}',
        '{"model": {"vocab": {"</s>": 0}}, "added_tokens": 3}',
        '{"model": {"vocab": {"</s>": 0}}, "pre_tokenizer": {"type": "Sequence"}}',
        '{"model": {"type": "BPE", "vocab": {"</s>": "zero"}, "merges": []}}',
        '{"model": {"type": "unheard of", "vocab": {"</s>": 0}}}',
    ],
)
def test_a_damaged_file_is_one_sentence(content: str, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(UserError, match=r"tokenizer\.json .*: download it again$"):
        load_tokenizer(tmp_path)


def test_a_folder_without_a_tokenizer_has_none(tmp_path: Path) -> None:
    assert load_tokenizer(tmp_path) is None


def test_half_a_surrogate_pair_is_refused(ours: dict[str, Tokenizer]) -> None:
    with pytest.raises(UserError, match="half a surrogate pair"):
        ours["like_bert"].encode("a \ud800 b")


def test_a_public_tokenizer_takes_a_package(ours: dict[str, Tokenizer], monkeypatch: pytest.MonkeyPatch) -> None:
    content = ours["like_bert"].to_json()
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(UserError, match=r"needs the tokenizers package: pip install minitransformer\[hub\]"):
        Tokenizer.from_json(content)


def test_a_public_tokenizer_is_not_fitted() -> None:
    with pytest.raises(UserError, match="cannot be trained here: choose bpe, bytes or chars"):
        PublicTokenizer.fit(PublicTokenizer.Settings(), lambda: iter(PROSE))


def test_every_byte_has_a_character_of_its_own() -> None:
    assert sorted(characters_of_bytes().values()) == list(range(256))
    assert {byte: character for character, byte in characters_of_bytes().items()}[ord(" ")] == "Ġ"


OWN: dict[str, Callable[[], Tokenizer]] = {
    "bpe": lambda: BPE.train(iter(PROSE), 400),
    "gpt2's split": lambda: BPE(BPE.train(iter(PROSE), 400).ranks, pattern=GPT2),
    "bytes": Bytes,
    "chars": lambda: fitted("chars", *PROSE),
}


@pytest.mark.parametrize("name", OWN)
def test_what_is_written_encodes_alike_in_the_package_and_in_ours(name: str, tmp_path: Path) -> None:
    tokenizer = OWN[name]()
    save_tokenizer(tokenizer, tmp_path)
    package = library.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    again = load_tokenizer(tmp_path)
    assert again is not None
    assert (again.end_of_text, again.vocab_size) == (tokenizer.end_of_text, tokenizer.vocab_size)
    for text in PROSE if name == "chars" else TEXTS:
        ids = tokenizer.encode(text)
        assert as_text(package, text) == again.encode(text) == ids
        assert package.decode(ids) == again.decode(ids) == text


@pytest.fixture(scope="module")
def written() -> tuple[Tokenizer, Any]:
    tokenizer = OWN["bpe"]()
    return tokenizer, library.Tokenizer.from_str(json.dumps(described(tokenizer)))


@settings(max_examples=100)
@given(text=st.text(CHARACTERS, max_size=40))
def test_written_bpe_is_the_same_for_every_text(written: tuple[Tokenizer, Any], text: str) -> None:
    tokenizer, package = written
    assert as_text(package, text) == tokenizer.encode(text)


@pytest.mark.parametrize("kind", ["like_bert", "like_t5", "like_llama2"])
def test_a_public_tokenizer_is_written_as_it_came(kind: str, ours: dict[str, Tokenizer], tmp_path: Path) -> None:
    save_tokenizer(ours[kind], tmp_path)
    again = load_tokenizer(tmp_path)
    assert again is not None
    assert [again.encode(text) for text in TEXTS] == [ours[kind].encode(text) for text in TEXTS]
    assert again.end_of_text == ours[kind].end_of_text


@pytest.mark.slow
def test_transformers_opens_what_is_written(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer = OWN["bpe"]()
    save_tokenizer(tokenizer, tmp_path)
    opened = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert opened(PROSE[0])["input_ids"] == tokenizer.encode(PROSE[0])
    assert opened.eos_token == END_OF_TEXT
    assert opened.decode(tokenizer.encode(PROSE[1])) == PROSE[1]
