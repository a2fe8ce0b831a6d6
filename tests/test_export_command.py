"""`export`: a run in the format of a public family, checked against the reference, or what is in the way of one."""

from __future__ import annotations

import json
import re
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from minitransformer import pretrained
from minitransformer.commands import export, train
from minitransformer.exporting import ExportFormat
from minitransformer.models.config import PRESETS
from minitransformer.models.model import Model
from minitransformer.pretrained.families import SIZES
from minitransformer.training.presets import PRESETS as PRESET_RUNS
from tests.runs_for_tests import Call, untrained_run

with suppress(ImportError):  # before a test captures the standard error that it keeps for its warnings
    import transformers  # noqa: F401


README = Path(__file__).parents[1] / "README.md"


GPT2 = {"positions": "learned", "bias": True}


LLAMA = {"norm": "rms", "feedforward": "swiglu"}


def test_a_run_is_exported_and_its_copy_checked(tmp_path: Path, call: Call, shake: Any) -> None:
    library = pytest.importorskip("transformers", reason="the reference implementation is not installed")
    model = untrained_run(tmp_path / "run", shake, "causal", **GPT2)
    code, out, err = call(export, str(tmp_path / "run"), "--to", str(tmp_path / "out"))
    assert (code, err) == (0, "")
    assert "family         gpt2" in out
    assert f"opened by      transformers {library.__version__}" in out
    [difference] = re.findall(r"logits         same: relative error of at most (\S+),", out)
    assert float(difference) < 1e-5
    copy, _ = pretrained.load(tmp_path / "out")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), copy.parameters(), strict=True))


def test_without_transformers_the_copy_is_opened_again_by_ours_and_that_is_said(
    tmp_path: Path, call: Call, shake: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    untrained_run(tmp_path / "run", shake, "causal", **GPT2)
    code, out, _ = call(export, str(tmp_path / "run"), "--to", str(tmp_path / "out"))
    assert code == 0
    assert "opened by      minitransformer alone, as transformers is not installed: not run elsewhere" in out
    assert "logits         same: relative error of at most 0.0e+00" in out
    assert (
        "No other program than the one that wrote it has opened this copy." in (tmp_path / "out/README.md").read_text()
    )


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            {"activation_function": "relu"},
            r"the copy, opened by transformers \S+, is not what was trained \(logits: relative error of at most",
        ),
        ({"n_head": None}, r"the copy cannot be opened by transformers \(Validation error for field 'n_head'"),
    ],
    ids=["another model", "cannot be opened"],
)
def test_a_copy_that_is_another_model_for_transformers_is_removed(
    damage: dict[str, Any], message: str, tmp_path: Path, call: Call, shake: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("transformers", reason="the reference implementation is not installed")
    write = pretrained.write_public

    def damaged(model: Model, folder: Path, *arguments: Any, **options: Any) -> None:
        write(model, folder, *arguments, **options)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | damage))

    monkeypatch.setattr(pretrained, "write_public", damaged)
    untrained_run(tmp_path / "run", shake, "causal", **GPT2)
    code, _, err = call(export, str(tmp_path / "run"), "--to", str(tmp_path / "out"))
    assert code == 1
    assert re.match(f"error: {message}.*: it was removed; choose another --format or --family\n$", err), err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("family", "choices"),
    [
        ("llama", LLAMA),
        ("mixtral", {**LLAMA, "num_experts": 2}),
        ("qwen3", {**LLAMA, "qk_norm": "head"}),
    ],
)
def test_the_first_family_that_holds_a_model_is_found(
    family: str, choices: dict[str, Any], tmp_path: Path, call: Call, shake: Any
) -> None:
    untrained_run(tmp_path / "run", shake, "causal", **choices)
    code, out, _ = call(export, str(tmp_path / "run"), "--to", str(tmp_path / "out"))
    assert code == 0
    assert f"family         {family}\n" in out


def test_a_family_whose_tokenizer_the_library_replaces_is_refused(tmp_path: Path, call: Call, shake: Any) -> None:
    pytest.importorskip("transformers", reason="the reference implementation is not installed")
    untrained_run(tmp_path / "run", shake, "causal", **LLAMA, qkv_bias=True)
    code, out, err = call(export, str(tmp_path / "run"), "--to", str(tmp_path / "out"))
    assert code == 1
    # Whatever its files say, a tokenizer beside a Qwen2 is split as Qwen2's, and normalised.
    assert (
        "is not what was trained (token ids: 'e\u0301 o\u0308 \u0301x n\u0303\u0303' has other ids, from token 0 on)"
        in err
    )
    assert "logits         same" in out


def test_everything_in_the_way_of_the_nearest_format_is_named_with_flags_that_go_round_it(
    tmp_path: Path, call: Call, shake: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MINITRANSFORMER_DATA", str(tmp_path / "data"))
    chosen = {"norm": "rms", "feedforward": "squared-relu", "qk_norm": "head", "token_smear": True}
    untrained_run(tmp_path / "run", shake, "causal", **chosen, tied_embeddings=False)
    code, _, err = call(export, str(tmp_path / "run"), "--to", str(tmp_path / "out"))
    assert code == 2
    assert err == (
        "error: no known family can represent this model; the nearest is qwen3: feedforward is 'squared-relu', and "
        "qwen3 can only hold 'swiglu' or 'geglu-tanh' or 'geglu' or 'reglu'; token_smear is True, and qwen3 can only "
        "hold False: train a model with --feedforward swiglu --no-token-smear, which qwen3 can represent\n"
    )
    (tmp_path / "text.txt").write_text("the dog and the cat " * 200)
    [flags] = re.findall("train a model with (.*), which", err)
    code, *_ = call(
        train,
        *("gpt-nano", "--data", str(tmp_path / "text.txt"), "--tokenizer", "bytes", "--out", str(tmp_path / "trained")),
        *("--d-model", "16", "--num-layers", "1", "--context-length", "16", "--norm", "rms", "--token-smear"),
        *(*flags.split(), "--steps", "1", "--warmup-steps", "0", "--device", "cpu"),
    )
    assert code == 0
    code, out, _ = call(export, str(tmp_path / "trained"), "--to", str(tmp_path / "out"))
    assert code == 0
    assert "family         qwen3\n" in out


def test_a_format_that_is_asked_for_says_all_that_is_in_its_way(tmp_path: Path, call: Call, shake: Any) -> None:
    untrained_run(
        tmp_path / "run", shake, "causal", **LLAMA, qk_norm="head", attention_window=3, window_pattern=(True,)
    )
    code, _, err = call(export, str(tmp_path / "run"), "--to", str(tmp_path / "out"), "--family", "llama")
    assert code == 2
    assert "cannot be exported as llama: qk_norm is 'head', and llama can only hold 'none'; attention_window" in err
    assert "train a model with --qk-norm none --attention-window None, which llama can represent" in err


def test_the_help_says_which_presets_can_be_exported(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        export.main(["--help"])
    assert "gpt2-124m, nanogpt-cpu (gpt2, opt)" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        train.main(["--help"])
    assert re.search("gpt2-124m +124.44M  gguf, hf, onnx, torch\n", capsys.readouterr().out)


@pytest.mark.parametrize("kind", ExportFormat.registry.values(), ids=list(ExportFormat.registry))
def test_the_readme_says_of_each_format_which_presets_it_holds(kind: type[ExportFormat]) -> None:
    [row] = re.findall(rf"^\| {kind.name} \|.*$", README.read_text(encoding="utf-8"), re.MULTILINE)
    assert row.endswith(f"| {export.presets_in(kind)} |")


# One of each kind of preset that hf holds, and the family that it leaves in.
LEAVING = {
    name: families[0] for name, config in PRESETS.items() if (families := ExportFormat.named("hf").holders(config))
}


@pytest.mark.parametrize("preset", {family: preset for preset, family in LEAVING.items()}.values())
def test_a_preset_leaves_as_the_help_says(preset: str, tmp_path: Path, call: Call, shake: Any) -> None:
    pytest.importorskip("transformers", reason="the reference implementation is not installed")
    kept = {name: value for name, value in vars(PRESETS[preset]).items() if name not in ("d_ff", *SIZES)}
    untrained_run(tmp_path / "run", shake, PRESET_RUNS[preset].training.objective.name, **kept)
    code, out, err = call(export, str(tmp_path / "run"), "--to", str(tmp_path / "out"))
    assert (code, err) == (0, "")
    assert f"family         {LEAVING[preset]}\n" in out
    assert "opened by      transformers" in out


def test_what_no_format_can_hold_is_refused_and_nothing_written(tmp_path: Path, call: Call, shake: Any) -> None:
    untrained_run(tmp_path / "run", shake, "causal", residual="residual")
    code, _, err = call(export, str(tmp_path / "run"), "--to", str(tmp_path / "out"))
    assert code == 2
    assert "residual is 'residual'" in err
    assert not (tmp_path / "out").exists()
    code, _, err = call(export, str(tmp_path / "run"), "--to", str(tmp_path / "out"), "--family", "lama")
    assert code == 2
    assert "did you mean 'llama'" in err


def test_a_folder_that_cannot_be_made_is_refused_before_the_work(tmp_path: Path, call: Call, shake: Any) -> None:
    untrained_run(tmp_path / "run", shake, "causal")
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    no_folder = f"cannot be written, as {tmp_path / 'file'} is no folder"
    for to, why in (("folder", "already exists"), ("file/out", no_folder)):
        code, out, err = call(export, str(tmp_path / "run"), "--to", str(tmp_path / to))
        assert (code, out, err) == (2, "", f"error: {tmp_path / to} {why}: choose another --to\n")
