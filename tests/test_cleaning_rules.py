"""What one document is judged and changed by: normalisations, personal data, quality rules, scripts."""

import json
import random
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minitransformer.errors import UserError
from minitransformer.plugins import load_plugin
from minitransformer.text.cleaning.measures import measure_texts
from minitransformer.text.cleaning.normalising import TextNormalisation
from minitransformer.text.cleaning.personal import PersonalData, find_personal_data, kinds_of_personal_data, masked
from minitransformer.text.cleaning.quality import Judged, QualityRule
from minitransformer.text.cleaning.scripts import SCRIPTS
from tests.dirty_for_tests import cleaned, read_texts, real_texts, write_jsonl

KINDS = kinds_of_personal_data()


@pytest.fixture(autouse=True)
def own_work_folder(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINITRANSFORMER_DATA", str(tmp_path_factory.mktemp("work")))


def normalised(name: str, text: str) -> str:
    if name == "mojibake":
        pytest.importorskip("ftfy", reason="mojibake is mended by ftfy (extra `data`)")
    return TextNormalisation.named(name)(None)(text)


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("nfc", "cafe\u0301 ﬁ²", "café ﬁ²"),
        ("nfkc", "cafe\u0301 ﬁ² Ａ", "café fi2 A"),
        ("control", "a\x00b\x07\tc\r\nd\x7f", "ab\tc\r\nd"),
        ("control", "\ufeffé\x85\x1b[0m", "é[0m"),
        ("lower", "ÄB c", "äb c"),
        ("punctuation", "“don’t” – wait…\u00a0now\u200b", '"don\'t" - wait... now'),
        ("mojibake", "âœ” FranÃ§ais", "✔ Français"),
        ("mojibake", "schön, naïve", "schön, naïve"),
    ],
)
def test_what_each_normalisation_does(name: str, text: str, expected: str) -> None:
    assert normalised(name, text) == expected


@pytest.mark.parametrize("name", sorted(TextNormalisation.registry))
@given(text=st.text(max_size=40))
def test_a_normalisation_changes_nothing_a_second_time(name: str, text: str) -> None:
    once = normalised(name, text)
    assert normalised(name, once) == once


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "ftfy", None)
    with pytest.raises(UserError, match=r"needs ftfy, which is not installed: pip install"):
        TextNormalisation.named("mojibake")(None)


# --- personal data

DRAW = random.Random(0)
ADDRESSES = [
    *(f"{DRAW.choice(['anna', 'j.doe', 'b+x'])}{i}@{DRAW.choice(['mail.', ''])}example.org" for i in range(60)),
    *("O'Neil@example.co.uk", "a@b.museum", "first-last@sub-domain.example.com"),
]
PHONES = [
    *("+49 30 901820", "+49 (30) 901820-0", "+1-212-555-0123", "+1 212 555 0123", "(212) 555-0123", "212-555-0123"),
    *("212.555.0123", "1-800-555-0199", "0049 30 901820", "030 90182000", "0171/2345678", "+4930901820"),
    *("+44 20 7946 0958", "020 7946 0958", "+33 1 23 45 67 89", "01 23 45 67 89", "+86 10 6552 9988"),
]
CARDS = ["4111 1111 1111 1111", "4111111111111111", "5500-0000-0000-0004", "340000000000009", "6011000000000004"]
KEYS = [
    "AKIAIOSFODNN7EXAMPLE",
    f"ghp_{'a1B2' * 9}",
    f"sk-{'Ab3dE' * 8}",
    f"AIza{'Sy0-_' * 7}",
    f"hf_{'abcDE' * 7}",
    "xoxb-123456789012-abcdefghij",
    "-----BEGIN RSA PRIVATE KEY-----\nMIIEow==\n-----END RSA PRIVATE KEY-----",
]
DECOYS = [
    *("2024-01-02", "01-02-2024", "3.14159265358979", "192.168.100.200", "1,234,567,890", "ISBN 978-3-16-148410-0"),
    *(
        "version 1.2.3",
        "1234567890123456",
        "a @ b",
        "@property",
        "user@localhost",
        "10 000 000",
        "12:30:45",
        "1939-1945",
    ),
    *("x = 4111111111111112", "sk-ip", "AKIA", "123-45", "pages 100-200", "0.123 456 789", "e4111111111111111e"),
    *("20240102123456789", "f(4, 5)", "(2012) 34-35", "int@32.5", "1 234 567 890", "00000000000000000000"),
]
PLANTED = [
    *(("email", each) for each in ADDRESSES),
    *(("phone", each) for each in PHONES),
    *(("card", each) for each in CARDS),
    *(("key", each) for each in KEYS),
]


def test_planted_personal_data_are_found_whole_and_decoys_are_not() -> None:
    texts = real_texts(len(PLANTED) + len(DECOYS), 40)
    found = [
        [(span.kind, text[span.start : span.end]) for span in find_personal_data(text, KINDS)]
        for text in (f"{text[:100]} {what}, {text[100:]}" for text, (_, what) in zip(texts, PLANTED, strict=False))
    ]
    missed = [planted for planted, spans in zip(PLANTED, found, strict=True) if planted not in spans]
    more = [span for planted, spans in zip(PLANTED, found, strict=True) for span in spans if span != planted]
    assert len(missed) <= 0.05 * len(PLANTED), missed
    assert more == []
    decoys = [(what, find_personal_data(f"({what})", KINDS)) for what in DECOYS]
    assert [what for what, spans in decoys if spans] == []
    assert [find_personal_data(text, KINDS) for text in texts] == [[]] * len(texts)


def test_only_the_kinds_that_are_asked_for_are_masked() -> None:
    text = "a@b.org, 4111 1111 1111 1111 and c@d.org"
    spans = find_personal_data(text, KINDS)
    assert masked(text, spans, ["email"]) == "<EMAIL>, 4111 1111 1111 1111 and <EMAIL>"
    assert masked(text, spans, ["card", "email"]) == "<EMAIL>, <CARD> and <EMAIL>"
    assert masked(text, spans, []) == text


@pytest.mark.parametrize("kind", sorted(PersonalData.registry))
@pytest.mark.parametrize("filler", ["1", "1 ", "a", "@", "a@", "a.", "+1(", "0-", "-----BEGIN PRIVATE KEY-----", " "])
def test_long_monotonous_texts_are_searched_in_linear_time(kind: str, filler: str) -> None:
    [member] = kinds_of_personal_data([kind])
    assert len(list(member.spans(filler * (100_000 // len(filler))))) < 100_000  # quadratic time would be minutes


@given(st.text(st.sampled_from("a1@. +-(4\n"), max_size=60))
def test_masked_text_has_nothing_left_of_a_kind_and_keeps_the_rest(text: str) -> None:
    spans = find_personal_data(text, KINDS)
    assert all(first.end <= second.start for first, second in pairwise(spans))
    kept = masked(text, spans, list(PersonalData.registry))
    for span in spans:
        kept = kept.replace(PersonalData.registry[span.kind].mark, "", 1)
    assert len(kept) == len(text) - sum(span.end - span.start for span in spans)


# --- quality

PROSE = "The lease of the house ran out, and the family moved to a town by the sea where nobody knew them."


@pytest.mark.parametrize(
    ("name", "settings", "refused", "kept"),
    [
        ("length", {}, "Too short.", PROSE),
        ("length", {"most": 10}, PROSE, PROSE[:40]),
        ("repetition", {}, "Home\nAbout us\nHome\nHome\nNews", "Home\nAbout us\nNews\nHome"),
        ("repetition", {"words": 0.2}, "buy now " * 20, PROSE),
        ("symbols", {}, "{[()]} $$ == ## a b", "f(x) = x + 1, of course"),
        ("symbols", {"share": 0.05}, "f(x) = x + 1, of course", PROSE),
        ("script", {}, "Привет, мир, hi", PROSE),
        ("script", {"wanted": "cyrillic, greek"}, PROSE, "Привет, κόσμε"),
        ("script", {}, "全部中文", "12345 !!"),
    ],
)
def test_what_each_rule_refuses_and_keeps(name: str, settings: dict[str, object], refused: str, kept: str) -> None:
    rule = QualityRule.choose(name, **settings).make()
    assert rule.refuses(Judged(refused))
    assert not rule.refuses(Judged(kept))


def test_a_word_list_refuses_whole_words_in_any_case_and_its_content_counts(tmp_path: Path) -> None:
    words = tmp_path / "words.txt"
    words.write_text("sea\nLease\n")
    rule = QualityRule.choose("word-list", file=str(words)).make()
    assert rule.refuses(Judged("The SEA!"))
    assert not rule.refuses(Judged("a season, released"))
    assert not QualityRule.choose("word-list", file=str(words), allowed=2).make().refuses(Judged(PROSE))
    path = write_jsonl(tmp_path / "in.jsonl", [PROSE, "seal"])
    rules = (QualityRule.choose("word-list", file=str(words)),)
    assert cleaned(tmp_path / "out", path, rules=rules)["after"]["documents"] == 1
    words.write_text("seal\nsea\n")
    assert cleaned(tmp_path / "out2", path, rules=rules)["after"]["documents"] == 0


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (None, "cannot be read"),
        ("\n", "has no words"),
        ("two words\n", "not one word"),
        (b"\xff", "not UTF-8"),
    ],
)
def test_a_word_list_that_cannot_be_used_is_one_sentence(
    content: str | bytes | None, sentence: str, tmp_path: Path
) -> None:
    path = tmp_path / "words.txt"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=sentence):
        QualityRule.choose("word-list", file=str(path)).make()


def test_a_script_that_is_not_known_is_one_sentence() -> None:
    with pytest.raises(UserError, match="unknown script 'latn': did you mean 'latin'"):
        QualityRule.choose("script", wanted="latn").make()


PLUGIN = """
from minitransformer.text.cleaning.normalising import TextNormalisation
from minitransformer.text.cleaning.personal import PersonalData
from minitransformer.text.cleaning.quality import QualityRule

class NoShouting(QualityRule, name="no-shouting"):
    def refuses(self, document):
        return document.text.isupper()

class Tabs(TextNormalisation, name="tabs"):
    def __call__(self, text):
        return text.replace("\\t", " ")

class Badge(PersonalData, name="badge"):
    mark = "<BADGE>"
    def spans(self, text):
        place = text.find("B-17")
        if place >= 0:
            yield place, place + 4
"""


def test_a_file_adds_a_rule_a_normalisation_and_a_kind_of_personal_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for family in (QualityRule, TextNormalisation, PersonalData):
        monkeypatch.setattr(family, "registry", dict(family.registry))
    monkeypatch.setattr("minitransformer.plugins._loaded", {})
    (tmp_path / "mine.py").write_text(PLUGIN)
    load_plugin(tmp_path / "mine.py")
    path = write_jsonl(tmp_path / "in.jsonl", ["HELP ME", "I am\tB-17 now"])
    choices = {"rules": (QualityRule.choose("no-shouting"),), "normalise": ("tabs",), "mask": ("badge",)}
    for workers in (1, 2):  # processes load the plugin too
        summary = cleaned(tmp_path / f"out{workers}", path, workers=workers, **choices)
        assert read_texts(tmp_path / f"out{workers}/in.jsonl") == ["I am <BADGE> now"]
        assert json.loads(json.dumps(summary))["removed"] == [{"reason": "no-shouting", "documents": 1, "bytes": 7}]


# --- measures


@given(st.lists(st.text(max_size=30), max_size=8))
def test_measures_of_texts_are_those_of_each_alone(texts: list[str]) -> None:
    measures = measure_texts(texts)
    assert measures.words.tolist() == [len(text.split()) for text in texts]
    assert measures.scripts.sum(1).tolist() == [len(text) for text in texts]
    letters = [sum(letter.isalpha() for letter in text) for text in texts]
    assert measures.scripts[:, 1:].sum(1).tolist() == letters


def test_the_main_script_is_that_of_most_letters() -> None:
    texts = ["abc привет", "Ａｂｃ", "日本語 ab", "ひらがな漢字", "123", "ⲁⲃ"]
    names = [SCRIPTS[place] for place in measure_texts(texts).main_scripts]
    assert names == ["cyrillic", "latin", "cjk", "hiragana", "none", "other"]
    assert np.shape(measure_texts([]).scripts) == (0, len(SCRIPTS))
