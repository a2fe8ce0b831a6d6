"""An index of shards as `--data`: what it may say, what is checked of its files, and that runs on it are runs."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from minitransformer.analysis.compare import compare
from minitransformer.commands import sweep, tokenize
from minitransformer.commands import train as train_command
from minitransformer.errors import UserError
from minitransformer.runs import Run
from minitransformer.text.batches import IGNORE
from minitransformer.text.corpora import open_corpus
from minitransformer.text.datasets import DataRequest, PlainText, PreparedData
from minitransformer.text.datasets.text import TextPreparation, TooShort
from minitransformer.text.mixture import Mixture
from minitransformer.text.shard_index import ShardIndex, is_index
from minitransformer.text.tokenizers import BPE, Bytes, Characters
from minitransformer.training.checkpoint import checkpoints_in
from minitransformer.training.learner import Learner
from minitransformer.training.loader import Loader
from tests.runs_for_tests import (
    SMALL,
    TEXT,
    assert_resumes_exactly,
    assert_same_weights,
    call_after_step,
    configured,
    learner_for,
    metrics,
    refused,
    saved_weights,
)

pytestmark = pytest.mark.unchecked_shapes

Write = Callable[..., str]


@pytest.fixture
def index(here: Path) -> Write:
    """Writes an index of three shards of tokens and one of text; entries of `shards` are replaced by path."""
    Bytes().save(here / "tokenizer.json")
    for number, name in enumerate(("a", "b", "val")):
        text = TEXT[number * 2000 : number * 2000 + 1500].encode()
        np.array([256, *text], "<u2").tofile(here / f"{name}.bin")
    (here / "c.txt").write_text(TEXT[6000:])

    def write(name: str = "index.json", **changes: Any) -> str:
        shards = [{"path": "a.bin", "weight": 3}, {"path": "b.bin", "weight": 2}, {"path": "c.txt", "weight": 1}]
        record = {"tokenizer": "tokenizer.json", "shards": shards, "validation": ["val.bin"], **changes}
        (here / name).write_text(json.dumps({key: value for key, value in record.items() if value is not None}))
        return name

    write()
    return write


def prepared(name: str = "index.json", **choices: Any) -> PreparedData:
    return PlainText.choose().make().prepare(DataRequest(name, Bytes.choose(), 16, **choices))


def train(*arguments: str, steps: int = 4, data: str = "index.json") -> int:
    return train_command.main([*arguments, "--data", data, "--steps", str(steps), *SMALL])


def test_tokens_bytes_and_documents_are_counted_as_of_plain_text(index: Write, here: Path) -> None:
    data, text = prepared(), TEXT[6000:].encode()
    assert data.num_tokens("train") == 2 * 1501 + len(text) + 1
    assert data.num_bytes("train") == 3000 + len(text)
    assert (data.num_tokens("validation"), data.num_bytes("validation")) == (1501, 1500)
    assert bytes(data.targets("validation")[1:].astype(np.uint8)) == TEXT[4000:5500].encode()
    assert data.summary().splitlines() == [
        "tokens     bytes tokenizer, 257 tokens",
        "shards     3: a.bin 50.0%, b.bin 33.3%, c.txt 16.7%",
        f"train      {3003 + len(text):,} tokens from {(3000 + len(text)) / 1000:.3g} kB, documents: 3",
        "validation 1,501 tokens from 1.5 kB, documents: 1",
    ]


def test_without_shards_for_validation_the_end_of_each_is_held_out(index: Write) -> None:
    index(validation=None)
    held, whole = prepared(validation_fraction=0.2), prepared(validation_fraction=0.0)
    assert whole.num_tokens("validation") == 0
    for count in (PreparedData.num_tokens.__name__, PreparedData.num_bytes.__name__):
        split = [getattr(held, count)(split) for split in ("train", "validation")]
        assert split[1] == pytest.approx(0.2 * sum(split), rel=0.02)
        # The text is cut in the middle of a document, which is one document more.
        assert sum(split) - getattr(whole, count)("train") in (0, 1)
    assert np.array_equal(held.targets("train")[1199:1201], whole.targets("train")[1199:1201])
    index()
    assert prepared(validation_fraction=0.0).num_tokens("validation") == 0, "0 is no validation, whatever is named"


def test_every_row_is_a_window_of_the_shard_that_the_mixture_says(index: Write) -> None:
    learner: Learner = learner_for(prepared(), configured(batch_size=5, grad_accumulation=2))  # type: ignore[arg-type]
    texts = [TEXT[:1500], TEXT[2000:3500], TEXT[6000:]]
    for step in (0, 1, 1000):
        rows = [row for batch in learner.loader.training_batches(step) for row in batch.inputs]
        shards, _ = Mixture((3, 2, 1)).places(step * 10 + np.arange(10))
        for row, shard in zip(rows, shards, strict=True):
            text = learner.loader.data.tokenizer.decode(row.tolist())
            assert text in texts[shard]


@pytest.mark.parametrize("objective", ["causal", "masked", "span-corruption"])
def test_every_objective_of_text_learns_from_shards(objective: str, index: Write) -> None:
    topology = {"causal": "decoder", "masked": "encoder", "span-corruption": "encoder-decoder"}[objective]
    pairs = {"next_sentence": True, "num_segments": 2} if objective == "masked" else {}
    config = configured(
        objective=objective, topology=topology, data="index.json", vocab_size=None, context_length=32, **pairs
    )
    data = config.prepare()
    learner = learner_for(data, configured(config, vocab_size=data.tokenizer.vocab_size))  # type: ignore[arg-type]
    result = learner.step(learner.next_batches())
    assert bool(result.finite)
    loader = Loader.of_run(learner.config, data)
    for batch in loader.validation_batches():
        assert (batch.targets != IGNORE).any()
    assert len(loader.examples(2)) == (0 if objective == "causal" else 2)


def test_resuming_at_any_step_goes_on_exactly(index: Write, here: Path) -> None:
    assert_resumes_exactly(here, prepared(), configured(dropout=0.1))  # type: ignore[arg-type]


def test_a_run_on_shards_resumes_by_command_and_says_which_data_it_read(
    index: Write, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for path, *steps in (("whole", 6), ("parts", 4, 6)):
        assert train("gpt-nano", "--out", path, steps=steps[0]) == 0
        for more in steps[1:]:
            assert train_command.main(["--resume", path, "--steps", str(more)]) == 0
    assert metrics(here / "parts")[-1]["bits_per_byte"] > 0
    record = json.loads((here / "whole/config.json").read_text())
    assert record["sources"].keys() == {"a.bin", "b.bin", "c.txt", "val.bin"}
    assert Run.open(here / "whole").sources == record["sources"]
    # Elsewhere, under other names, they are the same data.
    (here / "a.bin").rename(here / "moved.bin")
    index(shards=[{"path": "moved.bin", "weight": 6}, {"path": "b.bin", "weight": 4}, {"path": "c.txt", "weight": 2}])
    assert train_command.main(["--resume", "whole", "--steps", "7"]) == 0
    np.array([256, *b"other" * 300], "<u2").tofile(here / "b.bin")
    assert "shard b.bin of index.json is not the text that whole started with" in refused(
        capsys, "--resume", "whole", "--steps", "8"
    )
    index(shards=["c.txt"])
    assert "index.json is not the text that whole started with" in refused(capsys, "--resume", "whole", "--steps", "8")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shards": []}, 'index.json names no shards: list them under "shards"'),
        ({"shards": {}}, 'has "shards" {}: give a list'),
        ({"shards": [3]}, 'number 1 of "shards" in index.json is 3: give a path, or an object with one'),
        ({"shards": [{"path": "a.bin", "wieght": 1}]}, "has 'wieght': did you mean 'weight'?"),
        ({"shards": [{"path": "a.bin", "weight": "3"}]}, "has weight '3': it must be a number or null"),
        ({"shards": [{"path": "a.bin", "weight": 0}]}, "has weight 0.0: it must be between 1e-12 and 1e+15, or leave"),
        ({"shards": [{"path": "a.bin", "weight": 1}, "b.bin"]}, "weighs some of its shards only"),
        ({"shards": ["a.bin", "./a.bin"]}, "has ./a.bin twice"),
        ({"shards": [{"path": "a.bin", "tokens": 0}]}, "has tokens 0: it must be at least 1"),
        ({"shards": ["index.json"]}, "index.json is an index within itself"),
        ({"shards": [{"path": "part.json", "weight": 2}]}, "part.json is weighed as a whole, and has neither weight"),
        ({"shards": ["other.json", "a.bin"]}, "tokenizer.json and chars.json differ, and a mixture has one tokenizer"),
        ({"shards": [{"path": "c.txt", "tokens": 7}]}, "has tokens 7 and is text"),
        ({"validation": [{"path": "val.bin", "weight": 2}]}, "weighs val.bin, which is for validation"),
        ({"validation": ["a.bin"]}, "has a.bin twice"),
        ({"tokenizer": None}, "not the tokenizer that made them: name its tokenizer.json"),
        ({"tokenizer": 3}, "has tokenizer 3: give the path"),
        ({"tokenizer": "none.json"}, "none.json cannot be read"),
        ({"format": 2}, "has format 2, and this version reads 1: update"),
        ({"shard": []}, "has 'shard': did you mean 'shards'?"),
        ({"shards": ["none.bin"]}, "shard none.bin cannot be read (No such file or directory): restore it"),
        ({"shards": ["empty.bin"]}, "shard empty.bin is empty"),
        ({"shards": ["folder.bin"]}, "shard folder.bin is no file"),
        ({"shards": ["odd.bin"]}, "shard odd.bin has 3 bytes, not a multiple of the 2 of each token"),
        ({"shards": [{"path": "a.bin", "tokens": 1502}]}, "a.bin has 1,501 tokens, and index.json says 1,502"),
        ({"shards": [{"path": "a.bin", "sha256": "00"}]}, "shard a.bin has changed: its SHA-256 is "),
        ({"shards": [{"path": "c.txt", "sha256": "00"}]}, "shard c.txt has changed: its SHA-256 is "),
        ({"shards": ["big.bin"]}, "big.bin has the token 300, and the tokenizer of index.json has 257"),
        ({"shards": ["a.bin", "short.bin"]}, "shard short.bin has 9 tokens, too few for a window of 17"),
    ],
)
def test_a_mistake_is_one_sentence_that_names_the_shard(
    changes: dict[str, Any], message: str, index: Write, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (here / "folder.bin").mkdir()
    for name, content in (("empty", b""), ("odd", b"123"), ("big", b"\x2c\x01" * 99), ("short", b"c\0" * 9)):
        (here / f"{name}.bin").write_bytes(content)
    Characters("abc").save(here / "chars.json")
    index("part.json", shards=["b.bin"])
    index("other.json", shards=["b.bin"], tokenizer="chars.json", validation=None)
    index(**changes)
    assert train("gpt-nano") in (1, 2)
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (here / "runs").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--validation-data", "my.txt"), 'name those for validation in it, under "validation"'),
        (("--data", "my.txt"), "index.json is an index of shards and must be the only source"),
        (("--field", "body"), "--field is 'body', and index.json has no shard with fields"),
        (("--tokenizer", "chars"), "brings its bytes tokenizer, and --tokenizer is chars: give --tokenizer bytes"),
        (("--vocab-size", "100"), "vocabulary too small"),
    ],
)
def test_flags_that_contradict_an_index_are_refused(
    arguments: tuple[str, ...], message: str, index: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--data", "index.json", "--steps", "4", *SMALL, *arguments]
    assert message in refused(capsys, "gpt-nano", *flags)


def test_an_index_as_validation_data_is_refused(index: Write, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--data", "my.txt", "--validation-data", "index.json", *SMALL]
    assert "index.json is an index of shards, which --data takes" in refused(capsys, "gpt-nano", *flags)


def test_an_array_of_objects_is_still_text_and_not_an_index(here: Path) -> None:
    (here / "array.json").write_text('[{"text": "shards"}]')
    (here / "object.json").write_text('{"text": "shards"}')
    assert not is_index("array.json")
    assert not is_index("object.json")


@pytest.mark.parametrize("how", ["removed", "truncated", "changed"])
def test_a_shard_that_is_lost_in_training_ends_the_run_with_its_checkpoint_whole(
    how: str, index: Write, here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    content, path = (here / "a.bin").read_bytes(), here / "a.bin"

    def lose() -> None:
        path.unlink() if how == "removed" else path.write_bytes(content[:-2] if how == "truncated" else content + b"aa")

    build = train_command.build_trainer

    def build_and_lose(*arguments: Any, **named: Any) -> Any:
        trainer = build(*arguments, **named)
        call_after_step(trainer, 3, lose)
        return trainer

    with monkeypatch.context() as patch:
        patch.setattr(train_command, "build_trainer", build_and_lose)
        assert train("gpt-nano", "--out", "run", "--save-every", "2", steps=8) == 1
    error = capsys.readouterr().err
    assert "error: shard a.bin" in error
    assert error.count("\n") == 1
    assert [saved.name for saved in checkpoints_in(here / "run/checkpoints")] == ["step-000002"]
    path.write_bytes(content)
    assert train_command.main(["--resume", "run"]) == 0
    assert train("gpt-nano", "--out", "whole", "--save-every", "2", steps=8) == 0
    assert_same_weights(saved_weights(here / "run"), saved_weights(here / "whole"))


def test_text_shards_alone_have_a_tokenizer_fitted_to_all_of_them(here: Path) -> None:
    for name, text in (("a", "the cat sat on the mat. " * 200), ("b", "xyzzy plugh. " * 200)):
        (here / f"{name}.txt").write_text(text)
    (here / "index.json").write_text('{"shards": ["a.txt", "b.txt"]}')
    request = DataRequest("index.json", BPE.choose(), 16, vocab_size=270)
    data = PlainText.choose().make().prepare(request)
    assert len(data.tokenizer.encode("the cat")) < 7
    assert len(data.tokenizer.encode("xyzzy")) < 5
    # A fine-tune, or a resumed run, brings its own.
    again = PlainText.choose().make().prepare(replace(request, tokenizers=[data.tokenizer]))
    assert again.folder == data.folder


def test_a_run_that_brings_a_tokenizer_reads_only_tokens_of_it(index: Write) -> None:
    assert prepared(tokenizers=[Bytes()]).tokenizer.fingerprint == Bytes().fingerprint
    with pytest.raises(UserError, match=r"index\.json has another tokenizer than the run"):
        prepared(tokenizers=[BPE.train(iter([TEXT]), 300)])


def test_a_short_shard_says_the_longest_window_that_fits(index: Write) -> None:
    with pytest.raises(TooShort) as caught:
        PlainText.choose().make().prepare(DataRequest("index.json", Bytes.choose(), 2000))
    assert caught.value.longest == 1500


def test_an_index_of_indices_weighs_each_as_a_whole(index: Write, here: Path) -> None:
    for name in ("one", "two"):
        (here / name).mkdir()
    for name, path in (("a.bin", "one"), ("b.bin", "one"), ("val.bin", "one"), ("c.txt", "two")):
        (here / name).rename(here / path / name)
    tokens = [{"path": "a.bin", "tokens": 1501}, {"path": "b.bin", "tokens": 1501}]
    index("one/index.json", shards=tokens, tokenizer=str(here / "tokenizer.json"))
    index("two/index.json", shards=[{"path": "c.txt", "weight": 7}], tokenizer=None, validation=None)
    whole = [{"path": "one/index.json", "weight": 3}, {"path": "two/index.json", "weight": 1}]
    index(shards=whole, tokenizer=None, validation=None)
    data = prepared()
    assert list(data.sources) == ["one/a.bin", "one/b.bin", "two/c.txt", "one/val.bin"]
    assert data.weights == (3, 3, 2)  # type: ignore[attr-defined]
    assert train("gpt-nano", "--out", "run") == 0


def test_the_same_shards_are_the_same_data_and_other_weights_are_other_data(index: Write, here: Path) -> None:
    same, shards = prepared().folder, [{"path": "a.bin", "weight": 1.5}, {"path": "b.bin", "weight": 1}]
    third = {"path": "c.txt", "weight": 0.5}
    assert prepared(index("copy.json", shards=[*shards, third])).folder == same
    assert prepared(index("heavier.json", shards=[*shards, {**third, "weight": 9}])).folder != same
    assert prepared(index("fewer.json", validation=None)).folder != same


def test_runs_on_one_index_are_compared_by_loss_and_on_another_mixture_they_are_not(index: Write, here: Path) -> None:
    index("heavier.json", shards=["a.bin"])
    runs = {name: ["--seed", str(seed), "--lr", lr] for name, seed, lr in (("x", 0, "1e-3"), ("y", 0, "2e-3"))}
    for name, flags in runs.items():
        assert train("gpt-nano", "--out", name, *flags) == 0
    assert train("gpt-nano", "--out", "z", data="heavier.json") == 0
    assert compare([here / "x", here / "y"]).losses_comparable
    other = compare([here / "x", here / "z"])
    assert not other.losses_comparable
    assert any("different data" in remark for remark in other.remarks)


def test_a_sweep_trains_on_shards(index: Write, here: Path) -> None:
    flags = ["--data", "index.json", "--steps", "4", *SMALL]
    assert sweep.main(["gpt-nano", "--set", "lr=1e-3,1e-2", "--out", "swept", *flags]) == 0


def test_a_run_is_fine_tuned_on_shards_of_its_tokenizer(index: Write, here: Path) -> None:
    assert train("gpt-nano", "--out", "parent", data="my.txt") == 0
    flags = ["--data", "index.json", "--out", "child", "--steps", "2", "--compile", "off"]
    assert train_command.main(["--init-from", "parent", *flags]) == 0
    assert Run.open(here / "child").sources.keys() >= {"a.bin"}


# --- tokenize


def tokenized(*arguments: str, out: str = "shards") -> list[np.ndarray]:
    assert tokenize.main(["my.txt", "--out", out, *arguments]) == 0
    index = ShardIndex.read(Path(out) / "index.json")
    return [np.fromfile(index.place(shard), "<u2") for shard in index.shards]


@pytest.mark.parametrize("size", [1000, 1501, 5000, 10**8])
def test_shards_joined_are_the_tokens_of_the_text(size: int, here: Path) -> None:
    shards = tokenized("--shard-size", str(size), "--tokenizer", "bytes")
    whole = TextPreparation(
        open_corpus("my.txt"), Bytes(), context_length=1, validation_fraction=0.0, progress=False
    ).run()
    assert np.array_equal(np.concatenate(shards), whole.train)
    assert [len(shard) for shard in shards[:-1]] == [size] * (len(shards) - 1)
    assert len(shards) == 1 or len(shards[-1]) >= size / 2
    data = prepared("shards/index.json")
    assert data.num_bytes("train") + data.num_bytes("validation") == len(TEXT.encode())


def test_shards_of_a_fitted_tokenizer_train_and_others_are_made_with_it(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenized("--shard-size", "1000", "--vocab-size", "300")
    printed = capsys.readouterr().out
    assert "--data shards/index.json --tokenizer bpe" in printed
    tokenized("--tokenizer", "shards/tokenizer.json", out="more")
    assert (here / "more/tokenizer.json").read_bytes() == (here / "shards/tokenizer.json").read_bytes()
    flags = ["--data", "shards/index.json", *SMALL, "--tokenizer", "bpe", "--steps", "4", "--out", "run"]
    assert train_command.main(["gpt-nano", *flags]) == 0
    assert "brings its bpe tokenizer, and --tokenizer is with settings" in refused(
        capsys, "gpt-nano", *flags[:-1], "other", "--bpe-vocab-size", "300"
    )


def test_what_cannot_be_tokenized_leaves_nothing(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def error(*arguments: str) -> str:
        return refused(capsys, *arguments, main=tokenize.main)

    assert "--shard-size is 0: it must be at least 1" in error("my.txt", "--out", "shards", "--shard-size", "0")
    assert "my.txt already exists: choose another --out" in error("my.txt", "--out", "my.txt")
    assert "unknown tokenizer 'bpee': did you mean 'bpe'?" in error("my.txt", "--out", "shards", "--tokenizer", "bpee")
    assert "no file, folder or recipe 'none'" in error("none", "--out", "shards")
    assert not (here / "shards").exists()
