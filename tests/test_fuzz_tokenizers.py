"""Tokenizers from any file encode any text, or are refused in one sentence; none takes forever."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import strategies as st

from minitransformer.errors import UserError
from minitransformer.pretrained.tokenizers import FILE, PublicTokenizer, load_tokenizer
from minitransformer.text.tokenizers import BPE, Bytes, Characters, Tokenizer, native
from tests.fuzz_for_tests import any_texts, cases, for_cases, json_values, places_in, sentence_of, texts, with_value
from tests.hostile_for_tests import at_most
from tests.tokenizers_for_tests import like_bert, like_gpt2, like_llama2, like_llama3, like_qwen2, like_t5

BYTES = [bytes([value]) for value in range(256)]
PUBLIC: dict[str, Callable[[], Any]] = {
    make.__name__: make for make in (like_bert, like_gpt2, like_llama2, like_llama3, like_qwen2, like_t5)
}
ENDS = {"like_bert": "[SEP]", "like_llama2": "</s>", "like_t5": "</s>", "like_llama3": "<|end_of_text|>"}
PROSE = "the cat sat on the mat, doesn't it?  12345\r\n\n\t naïve 東京 🦊 e\u0301 aaaaaaaaaaaaaaaaaaaa <|endoftext|>"
LIMIT = 0.5


@pytest.fixture(scope="module")
def contents() -> dict[str, dict[str, Any]]:
    """The file of a tokenizer of every kind."""
    own = [BPE([*BYTES, b"th", b"the", b" a"]), Bytes(), Characters("".join(sorted(set(PROSE))))]
    public = {name: json.loads(make().to_str()) for name, make in PUBLIC.items()}
    return {tokenizer.name: tokenizer.to_json() for tokenizer in own} | public


def opened(folder: Path, name: str, content: Any) -> Tokenizer:
    """The tokenizer of one of our own files, or of the folder of a public checkpoint."""
    file = folder / FILE
    file.write_text(json.dumps(content))
    if name not in PUBLIC:
        return Tokenizer.load(file)
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": ENDS.get(name, "<|endoftext|>")}))
    tokenizer = load_tokenizer(folder)
    assert tokenizer is not None
    return tokenizer


def use(tokenizer: Tokenizer, text: str = PROSE) -> None:
    """What commands ask of a tokenizer, and that it can be saved as it is."""
    ids = tokenizer.encode_prompt(text)
    tokenizer.decode(ids, skip_special=False)
    tokenizer.decode_bytes(ids)
    assert Tokenizer.from_json(json.loads(json.dumps(tokenizer.to_json()))).fingerprint == tokenizer.fingerprint


@cases(60, 1000)
def test_any_value_in_any_place_of_a_file_is_taken_or_refused(
    tmp_path: Path, contents: dict[str, dict[str, Any]], count: int
) -> None:
    places = {name: list(places_in(content)) for name, content in contents.items()}
    # Most of them are entries of the vocabulary, which would hide all others.
    few = {
        name: [place for place in found if len(place) < 3 or place[-1] in range(3)] for name, found in places.items()
    }
    named = st.sampled_from(sorted(contents)).flatmap(
        lambda name: st.tuples(st.just(name), st.sampled_from(few[name]) | st.sampled_from(places[name]))
    )

    def check(named: tuple[str, tuple[Any, ...]], value: Any) -> None:
        name, place = named
        content = with_value(contents[name], place, value)
        sentence_of(lambda: use(opened(tmp_path, name, content)))

    for_cases(count, check, named, json_values)


@cases(30, 500)
def test_a_vocabulary_with_any_ids_and_merges_is_taken_or_refused(
    tmp_path: Path, contents: dict[str, dict[str, Any]], count: int
) -> None:
    names = [name for name in PUBLIC if "merges" in contents[name]["model"]]
    words = sorted(contents["like_gpt2"]["model"]["vocab"])[:40]
    merges = st.lists(st.tuples(st.sampled_from(words) | texts, st.sampled_from(words) | texts), max_size=4)
    ids = st.sampled_from([-1, 0, 1, 5, 255, 256, 599, 600, 601, 1 << 22, 1 << 31, 1 << 32, 1 << 63])
    vocabulary = st.dictionaries(st.sampled_from(words) | texts, ids, max_size=4)

    def check(name: str, merges: list[tuple[str, str]], vocabulary: dict[str, int], whole: bool) -> None:
        model = contents[name]["model"]
        changed = {
            **model,
            "merges": [*([] if whole else model["merges"]), *map(list, merges)],
            "vocab": {**({} if whole else model["vocab"]), **vocabulary},
        }
        sentence_of(lambda: use(opened(tmp_path, name, {**contents[name], "model": changed})))

    for_cases(count, check, st.sampled_from(names), merges, vocabulary, st.booleans())


@cases(20, 300)
def test_ranks_of_any_kind_are_taken_or_refused(tmp_path: Path, count: int) -> None:
    content = BPE([*BYTES, b"th", b"the"]).to_json()
    ranks = st.lists(st.sampled_from(content["ranks"]) | texts | json_values, max_size=4)

    def check(more: list[Any], dropped: int, special: dict[str, Any]) -> None:
        kept = content["ranks"][: len(content["ranks"]) - dropped]
        tokens = {**content["special_tokens"], **special}
        sentence_of(
            lambda: use(opened(tmp_path, "bpe", {**content, "ranks": [*kept, *more], "special_tokens": tokens}))
        )

    special = st.dictionaries(texts, st.integers(-2, 300) | json_values, max_size=2)
    for_cases(count, check, ranks, st.sampled_from([0, 0, 1, 2, 3]), special)


SPECIAL = ["(a+)+", "(a|a)*", "(?:a|aa)+$", "(?=", "(?!", "(?<=", "(?>", "(?i:", r"\1", "{1000}", "++", "*+", r"[\s\S]"]
USUAL = ["a", " ?", "|.", r"\s+", r"\p{L}+", r"\p{N}{1,3}", r"[^\s\p{L}\p{N}]+", r"(?!\S)", r"\s*[\r\n]+"]
ATOMS = st.sampled_from([*"ab.^$|()[]{}?*+\\", *SPECIAL, *USUAL])


def split(pattern: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


@cases(20, 200)
def test_any_pattern_is_taken_or_refused(
    tmp_path: Path, contents: dict[str, dict[str, Any]], monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    monkeypatch.setattr(native, "SECONDS", LIMIT)

    def check(atoms: list[str], everything: bool, text: str) -> None:
        pattern = "".join(atoms) + (r"|[\s\S]" if everything else "")
        sentence_of(lambda: use(opened(tmp_path, "bpe", {**contents["bpe"], "pattern": pattern}), text + "a" * 40))
        content = {**contents["like_t5"], "pre_tokenizer": split(pattern)}
        sentence_of(lambda: use(opened(tmp_path, "like_t5", content), text + "a" * 40))

    for_cases(count, check, st.lists(ATOMS, max_size=8), st.booleans(), texts)


@pytest.mark.parametrize("name", ["bpe", "pre_tokenizer", "normalizer"])
def test_a_pattern_that_never_ends_is_refused(
    contents: dict[str, dict[str, Any]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str
) -> None:
    monkeypatch.setattr(native, "SECONDS", LIMIT)
    # Of these, each match is within the limits of the libraries, and there is one for every character.
    if name == "bpe":
        tokenizer = opened(tmp_path, name, {**contents[name], "pattern": r"(?=(a|a){17}\1b)b|[\s\S]"})
    else:
        step = {"type": "Replace", "content": ""} if name == "normalizer" else split("")
        content = {**contents["like_t5"], name: {**step, "pattern": {"Regex": "(?:a|b|ab|ba){16}c"}}}
        tokenizer = opened(tmp_path, "like_t5", content)
    start = time.perf_counter()
    with pytest.raises(UserError, match="it takes more than"):
        tokenizer.encode(("a" if name == "bpe" else "ab") * 5000)
    assert time.perf_counter() - start < 10


def test_a_failing_pattern_of_a_public_tokenizer_is_refused(
    contents: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    split = {"type": "Split", "pattern": {"Regex": "(a+)+b"}, "behavior": "Isolated", "invert": False}
    tokenizer = opened(tmp_path, "like_t5", {**contents["like_t5"], "pre_tokenizer": split})
    with pytest.raises(UserError, match="cannot split this text"):
        tokenizer.encode("a" * 50)


@pytest.mark.parametrize("part", ["normalizer", "decoder"])
@pytest.mark.parametrize("pattern", [{"String": "a"}, {"Regex": "a"}, {"String": ""}])
def test_a_text_does_not_grow_without_bounds(
    contents: dict[str, dict[str, Any]], tmp_path: Path, part: str, pattern: dict[str, str]
) -> None:
    step = {"type": "Replace", "pattern": pattern, "content": "aa"}
    both = "normalizers" if part == "normalizer" else "decoders"
    content = {**contents["like_t5"], part: {"type": "Sequence", both: [step] * 40}}
    with pytest.raises(UserError, match="times as much"):
        opened(tmp_path, "like_t5", content)


@cases(30, 600)
def test_any_text_comes_back_or_is_refused(contents: dict[str, dict[str, Any]], tmp_path: Path, count: int) -> None:
    tokenizers = {name: opened(tmp_path, name, content) for name, content in contents.items()}
    exact = [name for name, each in tokenizers.items() if isinstance(each, BPE | Bytes)]
    assert {"bpe", "bytes", "like_gpt2", "like_llama3"} == set(exact)

    def check(text: str) -> None:
        is_text = not any("\ud800" <= character <= "\udfff" for character in text)
        for name, tokenizer in tokenizers.items():
            said = sentence_of(lambda tokenizer=tokenizer: tokenizer.decode(tokenizer.encode(text)))
            if name in exact:
                assert (said is None) == is_text
                assert not is_text or tokenizer.decode(tokenizer.encode(text)) == text

    for_cases(count, check, any_texts)


LONG = ["a", " ", "\0", "\ufeff", "\u0301", "🦊", "東", "\r\n"]


@pytest.mark.slow
@pytest.mark.parametrize("piece", LONG, ids=ascii)
def test_half_a_million_of_a_character_are_encoded_or_refused(
    contents: dict[str, dict[str, Any]], tmp_path: Path, piece: str
) -> None:
    for name, content in contents.items():
        tokenizer = opened(tmp_path, name, content)
        with at_most(60):
            said = sentence_of(lambda tokenizer=tokenizer: tokenizer.encode(piece * 500_000 + "x"))
        assert said is None or name == "chars" or "split this text" in said


def test_spaces_before_a_mask_are_read_once() -> None:
    content = json.loads(like_bert().to_str())
    for token in content["added_tokens"]:
        token["lstrip"] = token["content"] == "[MASK]"
    tokenizer = PublicTokenizer(content, end_of_text=3)
    assert tokenizer.mask_pattern.split("a  [MASK] b[MASK]c \n [MASK]") == ["a", " b", "c", ""]
    with at_most(10):
        assert len(tokenizer.mask_pattern.split(" " * 1_000_000 + "x")) == 1
