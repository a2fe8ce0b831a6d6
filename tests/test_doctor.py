"""`doctor` as its users meet it: what it finds, that its remedies work, and that it leaves nothing behind."""

import errno
import json
import os
import tempfile
from importlib.metadata import version

import pytest
import torch

from minitransformer import toolchain
from minitransformer.commands import doctor, tokenize
from minitransformer.commands.train import main as train_main
from minitransformer.preflight import data_state, machine_checks, memory_checks
from minitransformer.preflight.check import PreflightCheck, split_remedy
from minitransformer.runs import only_writer
from minitransformer.training.precision import FP8
from tests.forked_for_tests import forked_commands
from tests.runs_for_tests import SMALL

FLAGS = ["--steps", "6", *SMALL]
RUN = [*FLAGS, "--data", "my.txt"]


def examined(capsys, *arguments, code):
    """The findings of `doctor`, by topic, which must end with `code`."""
    capsys.readouterr()
    assert doctor.main([*arguments, "--json"]) == code
    record = json.loads(capsys.readouterr().out)
    assert record["trains"] is (code == 0)
    return {finding["topic"]: finding for finding in record["findings"]}


def problem(capsys, topic, *arguments):
    """The one problem that is found, which must be of `topic`, as what is wrong and what to do."""
    found = examined(capsys, *arguments, code=1)
    assert [name for name, finding in found.items() if finding["status"] == "problem"] == [topic]
    assert found[topic]["remedy"]
    return found[topic]["text"], found[topic]["remedy"]


@pytest.fixture(autouse=True)
def no_measurement(monkeypatch):
    monkeypatch.setattr("minitransformer.preflight.time_checks.SECONDS", 0.01)


def test_where_nothing_is_wrong_every_check_has_a_line_of_80_columns_and_training_works(here, capsys):
    assert doctor.main(RUN) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines] == [["ok", topic] for topic in PreflightCheck.registry]
    assert max(map(len, lines)) <= 80
    assert not (here / "runs").exists()
    assert train_main(RUN) == 0


def test_every_flag_of_training_is_one_of_the_doctor(here, capsys):
    found = examined(capsys, "gpt-nano", *RUN, "--residual", "post", "--optimizer", "muon", "--out", "x", code=0)
    assert found["folder"]["text"] == "x can be written"
    assert found["start"]["text"] == "new weights, 6 steps to do"


@pytest.mark.parametrize(
    "arguments",
    [
        *(["gpt-mimi"], ["--xyzzy", "1"], ["--lr", "0"], ["--resume", "nowhere"], ["--init-from", "nowhere"]),
        *(["--resume", "a", "--init-from", "b"], ["--checkpoint", "best", "--data", "my.txt"], ["--precision", "fp4"]),
    ],
)
def test_a_mistake_in_the_flags_is_one_sentence_and_no_finding(here, capsys, arguments):
    assert doctor.main(arguments) == 2
    out, error = capsys.readouterr()
    assert error.startswith("error: ")
    assert not out


def test_data_that_is_missing(here, capsys):
    text, remedy = problem(capsys, "data", *FLAGS, "--data", "nowhere.txt")
    assert "nowhere.txt" in text
    assert "anything else must be a path" in remedy
    (here / "nowhere.txt").write_text((here / "my.txt").read_text())
    examined(capsys, *FLAGS, "--data", "nowhere.txt", code=0)


def test_data_that_cannot_be_read(here, capsys):
    content = (here / "my.txt").read_text() + "café"
    (here / "latin1.txt").write_bytes(content.encode("latin-1"))
    text, remedy = problem(capsys, "data", *FLAGS, "--data", "latin1.txt")
    assert "not UTF-8 at byte" in text
    assert "iconv -t UTF-8" in remedy
    (here / "latin1.txt").write_text(content)
    examined(capsys, *FLAGS, "--data", "latin1.txt", code=0)


def test_too_few_tokens_for_the_context(here, capsys):
    (here / "short.txt").write_text("too short, but not by much")
    text, remedy = problem(capsys, "data", *FLAGS, "--data", "short.txt")
    assert "too short" in text
    assert "--context-length" in remedy
    examined(capsys, *FLAGS, "--data", "short.txt", "--context-length", "1", code=0)


def test_a_vocabulary_that_is_too_small(here, capsys):
    text, remedy = problem(capsys, "data", *RUN, "--vocab-size", "100")
    assert "100" in text
    assert "257" in text + remedy
    found = examined(capsys, *RUN, "--vocab-size", "257", code=0)
    assert found["tokenizer"]["text"].startswith("bytes, 257 of 257 rows")


def test_a_disk_without_room_for_checkpoints(here, capsys, monkeypatch):
    usage = type("Usage", (), {"free": 10_700_000})
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    text, remedy = problem(capsys, "checkpoints", *RUN, "--keep-last", "9")
    assert "10.7 MB free" in text
    assert "lower --keep-last" in remedy
    examined(capsys, *RUN, "--keep-last", "1", code=0)


def test_a_disk_without_room_for_prepared_data(here, capsys, monkeypatch):
    monkeypatch.setattr(data_state, "QUICK", 10)
    (here / "big.txt").write_bytes(b"x" * 30_000_000)
    usage = type("Usage", (), {"free": 50_000_000})
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    text, remedy = problem(capsys, "cache", *FLAGS, "--data", "big.txt")
    assert "60 MB" in text
    assert "MINITRANSFORMER_DATA" in remedy
    usage.free = 70_000_000
    examined(capsys, *FLAGS, "--data", "big.txt", code=0)


def test_data_that_takes_long_to_prepare_is_estimated_and_not_prepared(here, capsys, monkeypatch):
    monkeypatch.setattr(data_state, "QUICK", 10)
    found = examined(capsys, *RUN, code=0)
    assert found["data"]["status"] == "note"
    size = (here / "my.txt").stat().st_size
    assert found["data"]["figures"]["tokens"] == size  # of bytes
    assert not list((here / "work").rglob("*.bin"))
    assert train_main(RUN) == 0
    prepared = examined(capsys, *RUN, code=0)  # and now they are cached
    assert prepared["data"]["status"] == "ok"
    assert prepared["data"]["figures"]["tokens"] == pytest.approx(0.9 * size, rel=0.1)
    for figure in ("bytes", "activation_bytes"):
        assert found["memory"]["figures"][figure] == pytest.approx(prepared["memory"]["figures"][figure], rel=0.02)


def test_shards_of_tokens_are_counted_by_their_size_and_need_no_room_in_the_cache(here, capsys, monkeypatch):
    monkeypatch.setattr(data_state, "QUICK", 10)
    assert tokenize.main(["my.txt", "--out", "shards", "--tokenizer", "bytes", "--shard-size", "2000"]) == 0
    (here / "text.txt").write_text("some text " * 100)
    flags = [*FLAGS, "--data", "shards/index.json"]
    tokens = sum(path.stat().st_size for path in (here / "shards").glob("*.bin")) // 2
    found = examined(capsys, *flags, code=0)
    assert found["data"]["figures"]["tokens"] == tokens
    assert found["cache"]["figures"]["bytes"] == 0
    assert train_main(flags) == 0
    assert examined(capsys, *flags, code=0)["data"]["figures"]["tokens"] == pytest.approx(0.9 * tokens, rel=0.01)
    index = {"shards": ["shards/index.json", "text.txt"]}
    (here / "mixed.json").write_text(json.dumps(index))
    found = examined(capsys, *FLAGS, "--data", "mixed.json", code=0)
    assert found["data"]["figures"]["tokens"] == tokens + 1000
    assert found["cache"]["figures"]["bytes"] == 2 * 1000
    next((here / "shards").glob("*.bin")).unlink()
    text, _ = problem(capsys, "data", *flags)
    assert "No such file" in text


def test_a_recipe_that_is_not_made_yet_is_not_made(here, capsys):
    found = examined(capsys, *FLAGS, "--data", "shakespeare", code=0)
    assert found["data"]["status"] == "note"
    assert not (here / "work/shakespeare").exists()


def test_a_device_that_is_not_there(here, capsys):
    text, remedy = problem(capsys, "device", *RUN, "--device", "cuda:9")
    assert "cuda:9" in text
    assert "choose cpu" in remedy
    examined(capsys, *RUN, "--device", "cpu", code=0)


def test_a_precision_that_the_device_lacks(here, capsys, monkeypatch):
    monkeypatch.setattr(FP8, "why_not", classmethod(lambda cls, device: "it has no matrix units for 8 bits"))
    text, remedy = problem(capsys, "precision", *RUN, "--precision", "fp8")
    assert "no matrix units" in text
    assert "choose bf16" in remedy
    examined(capsys, *RUN, "--precision", "bf16", code=0)


def test_a_precision_that_is_only_emulated_is_noted(here, capsys):
    found = examined(capsys, *RUN, "--precision", "fp16", code=0)
    assert found["precision"]["status"] == "note"
    assert found["precision"]["remedy"] == "leave --precision out"


def test_a_compiler_that_does_not_work(here, capsys, monkeypatch):
    def fail(machine):
        raise RuntimeError("fatal error: omp.h: No such file\nand more")

    monkeypatch.setattr(machine_checks, "compile_small_network", fail)
    text, remedy = problem(capsys, "compile", *RUN, "--compile", "on")
    assert "omp.h" in text
    assert remedy == "give --compile off"
    examined(capsys, *RUN, "--compile", "off", code=0)


@pytest.mark.slow
def test_where_a_run_would_be_compiled_a_small_network_is(here, capsys):
    found = examined(capsys, *RUN, "--compile", "on", code=0)
    assert found["compile"]["text"].startswith("on (as asked); a small network took")


def test_a_folder_that_is_taken(here, capsys):
    (here / "taken").mkdir()
    (here / "taken/notes.txt").write_text("mine")
    text, remedy = problem(capsys, "folder", *RUN, "--out", "taken")
    assert "taken already exists" in text
    assert remedy == "choose another --out"
    examined(capsys, *RUN, "--out", "free", code=0)


def test_a_folder_that_cannot_be_written(here, capsys, monkeypatch):
    (here / "fixed").mkdir()
    make = tempfile.TemporaryFile

    def refuse(dir):
        if dir == here / "fixed" or str(dir) == "fixed":
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        return make(dir=dir)

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    text, remedy = problem(capsys, "folder", *RUN, "--out", "fixed/run")
    assert "fixed" in text
    assert "cannot be written (Read-only file system)" in text
    assert remedy == "choose an --out on another disk"
    examined(capsys, *RUN, "--out", "elsewhere/run", code=0)


def test_memory_that_is_too_small_for_the_batch_but_not_for_a_smaller_one(here, capsys, monkeypatch):
    wide = [*RUN, "--batch-size", "64", "--d-model", "64"]
    needed = examined(capsys, *wide, code=0)["memory"]["figures"]["bytes"]
    monkeypatch.setattr(memory_checks, "available_memory", lambda device: needed // 2)
    text, remedy = problem(capsys, "memory", *wide)
    assert "free" in text
    flags = remedy.removeprefix("give ").partition(",")[0].split()
    assert flags[0] == "--batch-size"
    found = examined(capsys, *wide, *flags, code=0)
    assert found["memory"]["figures"]["bytes"] <= needed // 2
    assert int(flags[1]) * int(flags[3]) == 64  # tokens per step are unchanged


def test_memory_that_is_too_small_for_the_model(here, capsys, monkeypatch):
    monkeypatch.setattr(memory_checks, "available_memory", lambda device: 1000)
    _, remedy = problem(capsys, "memory", *RUN)
    assert "a smaller model" in remedy


def test_a_run_that_goes_on_and_one_that_starts_from_its_weights(run, capsys):
    found = examined(capsys, "--resume", "run", "--steps", "9", code=0)
    assert found["start"]["text"] == "step-000006, 3 steps to do"
    found = examined(capsys, "--init-from", "run", "--data", "my.txt", code=0)
    assert found["start"]["text"] == "step-000006 of run"
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*.safetensors")}
    assert before == {path: path.stat().st_mtime_ns for path in run.rglob("*.safetensors")}


def test_a_run_that_cannot_go_on(run, capsys):
    text, remedy = problem(capsys, "start", "--resume", "run", "--steps", "6")
    assert "has done its 6 steps" in text
    assert "larger --steps" in remedy
    (run / "checkpoints/step-000006/model.safetensors").write_bytes(b"damaged")
    text, remedy = problem(capsys, "start", "--resume", "run", "--steps", "9")
    assert "damaged" in text
    assert "--checkpoint step-000004" in remedy
    examined(capsys, "--resume", "run", "--steps", "9", "--checkpoint", "step-000004", code=0)


def test_a_text_that_is_not_the_one_that_a_run_started_with(run, capsys):
    original = (run.parent / "my.txt").read_text()
    (run.parent / "my.txt").write_text(original.replace("fox", "cat"))
    text, remedy = problem(capsys, "data", "--resume", "run", "--steps", "9")
    assert "is not the text" in text
    assert "restore it" in remedy
    (run.parent / "my.txt").write_text(original)
    examined(capsys, "--resume", "run", "--steps", "9", code=0)


def test_a_run_that_another_process_trains(run, capsys):
    with only_writer(run):
        text, remedy = problem(capsys, "folder", "--resume", "run", "--steps", "9")
    assert "another process is training" in text
    assert "wait until it ends" in remedy


def test_a_text_that_is_read_too_often_is_noted(here, capsys):
    found = examined(capsys, *RUN, "--steps", "100000", code=0)
    assert found["data"]["status"] == "note"
    assert found["data"]["figures"]["epochs"] > 100


def test_problems_and_their_remedies_fit_80_columns_too(here, capsys):
    assert doctor.main([*FLAGS, "--data", "nowhere.txt", "--device", "cuda:9"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    assert sum(line.startswith("problem") for line in lines) == 2  # what both stop is said once


@pytest.mark.parametrize(
    ("sentence", "parts"),
    [
        ("a is b: do c", ("a is b", "do c")),
        ("x (because: y) is z: do c", ("x (because: y) is z", "do c")),
        ("too small: a is 1, and b 2: raise a", ("too small: a is 1, and b 2", "raise a")),
        ("no file 'a: b': give one", ("no file 'a: b'", "give one")),
        ("the run's text is gone: restore it", ("the run's text is gone", "restore it")),
        ("nothing to do", ("nothing to do", "")),
    ],
)
def test_a_sentence_is_divided_into_what_is_wrong_and_what_to_do(sentence, parts):
    assert split_remedy(sentence) == parts


@pytest.mark.slow
def test_ranks_answer_and_share_the_rows(here, capsys):
    flags = [*RUN, "--batch-size", "32", "--d-model", "64", "--json"]
    ended = forked_commands()(here, "doctor", *flags, ranks=2)
    assert ended.done, ended.output[-3000:]
    found = {finding["topic"]: finding for finding in json.loads(ended.outputs[0])["findings"]}
    assert found["ranks"]["text"] == "2 of 2 ranks answer (ddp)"
    alone = examined(capsys, *flags[:-1], code=0)["memory"]["figures"]["activation_bytes"]
    assert found["memory"]["figures"]["activation_bytes"] == pytest.approx(alone / 2, rel=0.2)


def test_a_rank_of_a_plan_for_many_is_examined_on_one_machine(here, capsys):
    flags = [*RUN, "--parallel", "fsdp", "--batch-size", "16"]
    found = examined(capsys, *flags, "--ranks", "16", code=0)
    assert found["ranks"]["text"] == "a plan for 16 ranks (fsdp)"
    assert "a rank" in found["memory"]["text"]
    alone = examined(capsys, *flags, code=0)
    for topic, figure in (("parameters", "bytes"), ("parameters", "optimizer_bytes"), ("saving", "bytes")):
        assert found[topic]["figures"][figure] < alone[topic]["figures"][figure] / 8
    assert not torch.distributed.is_initialized()


def test_a_plan_that_ranks_cannot_follow(here, capsys):
    flags = [*RUN, "--parallel", "fsdp", "--tensor-parallel", "2", "--dropout", "0", "--optimizer", "adamw"]
    text, remedy = problem(capsys, "ranks", *flags, "--ranks", "3")
    assert text == "3 ranks are no multiple of 2"
    assert "choose another --tensor-parallel" in remedy
    examined(capsys, *flags, "--ranks", "4", code=0)
    assert doctor.main([*flags, "--ranks", "0"]) == 2


def test_a_host_without_room_for_the_copy_beside_a_step(here, capsys, monkeypatch):
    figures = examined(capsys, *RUN, code=0)
    step, copy = (figures[topic]["figures"]["bytes"] for topic in ("memory", "saving"))
    memory = figures["parameters"]["figures"]
    assert copy == memory["bytes"] + memory["optimizer_bytes"]
    monkeypatch.setattr(memory_checks, "available_memory", lambda device: step + copy - 1)
    problem(capsys, "memory", *RUN)  # a CPU has one memory for both
    monkeypatch.setattr(memory_checks, "available_memory", lambda device: step + copy)
    examined(capsys, *RUN, code=0)


def test_optional_packages_are_named_with_their_versions_or_as_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    said = ['numpy>=1; extra == "lab"', 'no-such>=2,<3 ; extra == "lab"', 'pytest>=8; extra == "test"', "torch>=2"]
    monkeypatch.setattr(toolchain, "requires", lambda name: said)
    assert toolchain.extras() == {"lab": {"numpy": version("numpy"), "no-such": None}}
