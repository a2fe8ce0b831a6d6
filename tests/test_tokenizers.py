"""Tokenizers: what is encoded comes back, from memory and from disk, and mistakes are told in one sentence."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minitransformer.errors import UserError
from minitransformer.pretrained.marian import SentencePiece
from minitransformer.pretrained.tokenizers import PublicTokenizer
from minitransformer.text.corpora import cut
from minitransformer.text.tokenizers import BPE, END_OF_TEXT, GPT4_SPLIT, Characters, TiktokenEncoding, Tokenizer
from tests.prepared_for_tests import fitted

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared" / "data"
SAMPLE = (
    "The cat's hat, the dog's log; 1234 naïve façades — \n\n\tдом 東京 🙂!!\r\n  if x == 1:\n        return x\n" * 5
)
# What the split patterns treat differently, far more often than chance would bring it together.
TRICKY = st.text(st.sampled_from("ab1' \n\r\t\x0b\x1c\x85\u2003/!.,'sSlLéé\u0301東🙂ᾈ٣_²"), max_size=40)
TEXTS = st.one_of(TRICKY, st.text(max_size=60))
published = pytest.mark.skipif(not (SHARED / "tiktoken_cache").is_dir(), reason="needs the GPT-2 files of shared/data")


def is_fitted(kind: type[Tokenizer]) -> bool:
    """Whether it learns from a text, and does not come from a file as published."""
    return kind not in (PublicTokenizer, SentencePiece) and not issubclass(kind, TiktokenEncoding)


FITTED = [name for name, kind in Tokenizer.registry.items() if is_fitted(kind)]


@pytest.fixture(scope="module", params=[*FITTED, pytest.param("gpt2", marks=published)])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TIKTOKEN_CACHE_DIR", str(SHARED / "tiktoken_cache"))
        if request.param == "bpe":
            return fitted("bpe", SAMPLE, vocab_size=400)
        return fitted(request.param, SAMPLE + "".join(map(chr, range(0x3000))))


def accepted(tokenizer: Tokenizer, text: str) -> str:
    if isinstance(tokenizer, Characters):
        return "".join(character for character in text if character in tokenizer.characters)
    return text


@given(text=TEXTS)
def test_decoding_undoes_encoding(tokenizer: Tokenizer, text: str) -> None:
    text = accepted(tokenizer, text)
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert b"".join(map(tokenizer.token_bytes, ids)) == tokenizer.decode_bytes(ids) == text.encode()
    assert all(0 <= i < tokenizer.vocab_size for i in ids)
    assert tokenizer.encode_array(text).tolist() == ids
    assert tokenizer.encode_array(text).dtype == np.uint32


@settings(max_examples=5, deadline=None)
@given(text=TEXTS)
def test_a_tokenizer_survives_json(tokenizer: Tokenizer, text: str) -> None:
    twin = Tokenizer.from_json(json.loads(json.dumps(tokenizer.to_json())))
    text = accepted(tokenizer, text)
    assert type(twin) is type(tokenizer)
    assert twin.encode(text) == tokenizer.encode(text)


def test_a_tokenizer_survives_the_disk(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path / "tokenizer.json")
    twin = Tokenizer.load(tmp_path / "tokenizer.json")
    assert twin.fingerprint == tokenizer.fingerprint
    assert (twin.vocab_size, twin.special_tokens) == (tokenizer.vocab_size, tokenizer.special_tokens)
    assert [path.name for path in tmp_path.iterdir()] == ["tokenizer.json"]


def test_a_special_token_spelled_in_the_text_stays_text(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(f"a{END_OF_TEXT}b")
    assert not set(ids) & set(tokenizer.special_tokens.values())
    assert tokenizer.decode(ids) == f"a{END_OF_TEXT}b"


def test_special_tokens_are_skipped_or_spelled_and_have_no_bytes(tokenizer: Tokenizer) -> None:
    ids = [tokenizer.end_of_text, *tokenizer.encode("hat"), tokenizer.end_of_text]
    assert tokenizer.decode(ids) == "hat"
    assert tokenizer.decode(ids, skip_special=False) == f"{END_OF_TEXT}hat{END_OF_TEXT}"
    assert tokenizer.token_bytes(tokenizer.end_of_text) == b""
    assert tokenizer.decode_bytes(ids) == b"hat"


def test_every_id_decodes_and_no_other(tokenizer: Tokenizer) -> None:
    tokenizer.decode(range(tokenizer.vocab_size))
    for stranger in (-1, tokenizer.vocab_size):
        with pytest.raises(ValueError, match=f"token id {stranger} is outside"):
            tokenizer.decode([stranger])


def test_half_a_surrogate_pair_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(UserError, match=r"U\+D83D"):
        tokenizer.encode("hat \ud83d")


# At most eleven characters between two letters that a whitespace follows: every stretch of sixteen has a cut.
WORDS = st.lists(
    st.tuples(st.text("ab1' \n\r\t\x85/!.'sé\u0301東_", max_size=8), st.sampled_from(["a ", "b\n", "1\t"]))
)


@settings(max_examples=150)
@given(words=WORDS, size=st.integers(16, 40))
def test_encoding_the_pieces_is_encoding_the_whole(
    tokenizer: Tokenizer, words: list[tuple[str, str]], size: int
) -> None:
    text = accepted(tokenizer, "".join(tricky + word for tricky, word in words))
    pieces = list(cut([text], size))
    assert "".join(pieces) == text
    assert [i for piece in pieces for i in tokenizer.encode(piece)] == tokenizer.encode(text)


@settings(max_examples=500)
@given(text=TRICKY)
def test_every_cut_is_exact_for_every_published_pattern(text: str) -> None:
    """The split alone, for the patterns whose vocabularies may not be on this machine."""
    from tiktoken import Encoding

    for pattern in PATTERNS:
        if pattern not in SPLITTERS:
            SPLITTERS[pattern] = Encoding(
                "split", pat_str=pattern, mergeable_ranks=BIGRAMS, special_tokens={END_OF_TEXT: len(BIGRAMS)}
            )
        encode = SPLITTERS[pattern].encode_ordinary
        for place in range(1, len(text)):
            if text[place - 1].isalnum() and text[place].isspace():
                assert encode(text[:place]) + encode(text[place:]) == encode(text), (place, pattern)


O200K_SPLIT = "|".join(
    [
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    ]
)
GPT2_SPLIT = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
PATTERNS = (GPT4_SPLIT, O200K_SPLIT, GPT2_SPLIT)
SPLITTERS: dict[str, object] = {}
# Every pair of bytes merges, so any change of the split shows in the tokens.
BIGRAMS = {bytes([a]): a for a in range(256)} | {
    bytes([a, b]): 256 * (a + 1) + b for a in range(256) for b in range(256)
}


def test_training_bpe_is_deterministic_and_fills_the_vocabulary() -> None:
    first, second = (BPE.train(iter([SAMPLE[:300], SAMPLE[300:]]), 300) for _ in range(2))
    assert first.fingerprint == second.fingerprint
    assert first.vocab_size == 300 == first.end_of_text + 1


def test_text_with_few_pairs_makes_a_smaller_bpe() -> None:
    assert BPE.train(iter(["abab"]), 4096).vocab_size == 256 + 2 + 1
    assert BPE.train(iter([]), 4096).vocab_size == 256 + 1


def test_a_single_text_trains_bpe_as_one_document_and_not_as_characters() -> None:
    text = "the theory of the thing " * 50
    assert BPE.train(text, 280).fingerprint == BPE.train(iter([text]), 280).fingerprint
    assert BPE.train([text], 280).fingerprint == BPE.train(iter([text]), 280).fingerprint


@pytest.mark.parametrize("place", [0, 200])
def test_half_a_surrogate_pair_in_a_text_to_train_on_is_refused(place: int) -> None:
    texts = ["hat "] * place + ["hat \ud83d"]
    for kind in ("bpe", "chars"):
        with pytest.raises(UserError, match=r"U\+D83D"):
            fitted(kind, *texts, vocab_size=300)
    with pytest.raises(UserError, match=r"U\+D83D"):
        BPE.train(texts[-1], 300)


def test_bpe_merges_what_is_frequent() -> None:
    assert len(BPE.train(iter(["the theory of the thing " * 50]), 280).encode(" the")) == 1


def test_characters_are_sorted_and_the_specials_follow() -> None:
    tokenizer = fitted("chars", "ba", "cab\n")
    assert isinstance(tokenizer, Characters)
    assert tokenizer.characters == "\nabc"
    assert tokenizer.encode("cab\n") == [3, 1, 2, 0]
    assert (tokenizer.end_of_text, tokenizer.vocab_size) == (4, 5)


@pytest.mark.parametrize("stranger", ["z", "a\u0301", "🙂", "\0"])
def test_an_unknown_character_is_named(stranger: str) -> None:
    with pytest.raises(UserError, match=rf"U\+{ord(stranger[-1]):04X}\) is not among the 3 .*bpe or bytes"):
        Characters("abc").encode(f"abc{stranger}")


@pytest.mark.parametrize(("name", "size", "least"), [("bpe", 256, 257), ("bytes", 256, 257), ("chars", 4, 5)])
def test_a_vocabulary_that_is_too_small_is_refused_with_both_numbers(name: str, size: int, least: int) -> None:
    with pytest.raises(UserError, match=f"vocabulary too small: vocab_size is {size}, .* {least} "):
        fitted(name, "abca\n", vocab_size=size)


def test_a_larger_vocabulary_than_needed_is_no_mistake() -> None:
    assert fitted("bytes", vocab_size=512).vocab_size == 257


@pytest.mark.parametrize(
    ("own", "of_model", "size"), [(300, None, 300), (300, 400, 300), (None, 280, 280), (None, None, 4096)]
)
def test_a_bpe_has_its_own_size_or_the_models_or_the_usual_one(
    monkeypatch: pytest.MonkeyPatch, own: int | None, of_model: int | None, size: int
) -> None:
    wanted: list[int] = []
    train = BPE.train
    monkeypatch.setattr(BPE, "train", lambda texts, size: wanted.append(size) or train(texts, 260))
    fitted(BPE.choose(vocab_size=own), SAMPLE, vocab_size=of_model)
    assert wanted == [size]


def test_a_bpe_larger_than_its_model_is_refused_before_it_is_trained() -> None:
    message = r"^bpe_vocab_size is 300, but vocab_size leaves room for 299 trained tokens: lower it"
    with pytest.raises(UserError, match=message):
        fitted(BPE.choose(vocab_size=300), SAMPLE, vocab_size=299)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"type": "bpf"}, "did you mean 'bpe'"),
        ({"type": ["bpe"]}, "not a tokenizer"),
        ({"format": 99}, "format 99"),
        ({"ranks": None}, "'ranks' is not a list"),
        ({"ranks": ["a"]}, "256 single bytes"),
        ({"ranks": [7]}, "not a tokenizer"),
        ({"ranks": ["東"]}, "not a tokenizer"),
        ({"pattern": "("}, "not a tokenizer"),
        ({"special_tokens": {}}, "special tokens"),
        ({"special_tokens": {END_OF_TEXT: 3}}, "special tokens"),
        ({"special_tokens": {END_OF_TEXT: "3"}}, "not an integer"),
    ],
)
def test_malformed_json_is_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Tokenizer.from_json({**BPE.train(iter([SAMPLE]), 260).to_json(), **change})


@pytest.mark.parametrize("content", [None, 3, [], {}, "bpe", {"format": 1, "type": "chars", "special_tokens": {}}])
def test_what_is_no_tokenizer_is_refused(content: object) -> None:
    with pytest.raises(UserError):
        Tokenizer.from_json(content)


def test_a_file_that_is_missing_or_not_json_is_named(tmp_path: Path) -> None:
    (tmp_path / "broken.json").write_text("{")
    for name in ("missing.json", "broken.json"):
        with pytest.raises(UserError, match=name):
            Tokenizer.load(tmp_path / name)


def test_a_published_encoding_that_cannot_be_had_says_how_to_supply_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def no_network(*_: object, **__: object) -> None:
        raise OSError("no network")

    monkeypatch.setattr("urllib.request.urlopen", no_network)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    with pytest.raises(UserError) as caught:
        fitted("cl100k_base")
    for hint in (
        "no network",
        "cl100k_base.tiktoken as 9b5ad71b2ce5302211f9c61530b329a4922fc6a4",
        "TIKTOKEN_CACHE_DIR",
    ):
        assert hint in str(caught.value)


@published
def test_gpt2_is_gpt2(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(SHARED / "tiktoken_cache"))
    tokenizer = fitted("gpt2")
    assert tokenizer.encode("Hello, world!") == [15496, 11, 995, 0]
    assert (tokenizer.vocab_size, tokenizer.end_of_text) == (50257, 50256)
    with pytest.raises(UserError, match="50257"):
        fitted("gpt2", vocab_size=50256)


@published
def test_a_saved_published_encoding_needs_no_cache_and_no_network(tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TIKTOKEN_CACHE_DIR", str(SHARED / "tiktoken_cache"))
        fitted("gpt2").save(tmp_path / "tokenizer.json")
    code = (
        "import sys, socket; socket.socket = None\n"
        "from minitransformer.text.tokenizers import Tokenizer\n"
        "print(Tokenizer.load(sys.argv[1]).encode('Hello, world!'))"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TIKTOKEN_CACHE_DIR": str(tmp_path / "nothing")}
    answer = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "tokenizer.json")],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert answer.stdout == "[15496, 11, 995, 0]\n", answer.stderr


def test_no_tokenizer_needs_torch() -> None:
    code = (
        "import sys, minitransformer.text.datasets; print(sorted({'torch', 'tiktoken', 'requests'} & set(sys.modules)))"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    answer = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert answer.stdout == "[]\n"


@pytest.mark.parametrize("letter", ["a", " ", "\n", "!", "東", "1"])
def test_a_long_run_of_one_character_does_not_hang(letter: str) -> None:
    tokenizer = BPE.train(iter([letter * 100, SAMPLE]), 300)
    assert tokenizer.decode(tokenizer.encode(letter * 200_000)) == letter * 200_000
