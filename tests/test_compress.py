"""Compression: a smaller run is a run like any other, and what it computes is what was promised."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from minitransformer import pretrained
from minitransformer.commands import compress, sample
from minitransformer.commands import train as train_command
from minitransformer.compression import measuring
from minitransformer.compression.calibration import Calibration
from minitransformer.compression.gptq import DAMPING, rounded_by_gptq
from minitransformer.compression.layers import DropLayers
from minitransformer.compression.pruning import Prune, most_important
from minitransformer.compression.quantising import stored_in
from minitransformer.errors import UserError
from minitransformer.generation.weights import BFloat16, Float32, Int4, Int8, StoredWeights
from minitransformer.models.formats import Int4Groups, Int8Rows
from minitransformer.models.int4 import group_scale, pack, round_to, unpack
from minitransformer.models.model import Model, build_in_parts, in_full_precision
from minitransformer.models.stored import StoredLinear, StoredTable
from minitransformer.reporting import figures
from minitransformer.reporting.figures import Point
from minitransformer.runs import Run
from minitransformer.text.tokenizers import Bytes
from minitransformer.training.objectives import Causal
from tests.runs_for_tests import SMALL, TINY, loader_of, refused, saved_weights

FORMATS = [Int8Rows.choose(), Int4Groups.choose()]
KINDS: list[dict[str, Any]] = [
    {"bias": True, "feedforward": "swiglu", "num_kv_heads": 2},
    {"tied_embeddings": False, "num_experts": 3},
    {"topology": "encoder", "head": "transformed"},
    {"topology": "encoder-decoder", "positions": "t5", "embedding_dim": 8},
]
MakeModel = Callable[..., Model]


def logits(model: Model) -> Tensor:
    tokens = torch.randint(11, (3, 9), generator=torch.Generator().manual_seed(0))
    inputs = (tokens, tokens) if model.config.topology == "encoder-decoder" else (tokens,)
    with torch.no_grad():
        return model(*inputs)


# --- formats


@given(st.integers(1, 4), st.integers(1, 3))
def test_what_is_packed_comes_back(out: int, blocks: int) -> None:
    integers = torch.randint(-8, 8, (out, 64 * blocks), dtype=torch.int8)
    packed = pack(integers)
    assert packed.shape == (out, 32 * blocks)
    assert torch.equal(unpack(packed), integers)


@pytest.mark.parametrize("chosen", FORMATS, ids=str)
@pytest.mark.parametrize("choices", KINDS, ids=str)
def test_a_stored_model_computes_what_its_matrices_in_full_do_and_is_loaded_as_it_was(
    tiny_model: MakeModel, choices: dict[str, Any], chosen: Any
) -> None:
    model = tiny_model(**{"topology": "decoder", **choices}).float()
    stored = stored_in(model, chosen, {})
    assert any(isinstance(part, StoredTable) for part in stored.modules())
    assert all(isinstance(part, chosen.make().stored(torch.nn.Linear(1, 1)).__class__) or "head" in name
               for name, part in stored.named_modules() if isinstance(part, StoredLinear))  # fmt: skip
    other = build_in_parts(stored.config).eval()
    other.load_state_dict(stored.state_dict())
    assert torch.equal(logits(other), logits(stored))
    assert other.num_parameters() >= model.num_parameters()
    plain = in_full_precision(other)
    assert plain.state_dict().keys() == model.state_dict().keys()
    assert plain.config == model.config
    torch.testing.assert_close(logits(plain), logits(stored), rtol=1e-4, atol=1e-4)
    if model.config.tied_embeddings and choices.get("topology") != "encoder":
        assert len({id(part) for part in plain.parameters()}) == len({id(part) for part in model.parameters()})


@pytest.mark.parametrize("chosen", FORMATS, ids=str)
def test_an_export_has_the_matrices_in_full(tiny_decoder: MakeModel, tmp_path: Path, chosen: Any) -> None:
    model = tiny_decoder(positions="learned", bias=True).float()
    stored = stored_in(model, chosen, {})
    pretrained.save(stored, tmp_path / "out", "gpt2")
    copy, _ = pretrained.load(tmp_path / "out")
    torch.testing.assert_close(logits(copy), logits(stored), rtol=1e-4, atol=1e-4)


def test_a_stored_model_decodes_by_the_kernel_as_it_does_without(tiny_decoder: MakeModel) -> None:
    model = tiny_decoder(d_model=24, d_ff=72).float()
    for chosen, kind in ((FORMATS[0], Int8), (FORMATS[1], Int4)):
        stored = stored_in(model, chosen, {})
        fast = Float32.applied(stored)
        assert {type(part) for part in fast.modules() if isinstance(part, StoredWeights)} == {Int8, kind}
        torch.testing.assert_close(logits(fast), logits(stored), rtol=0.05, atol=0.05)
        with pytest.raises(UserError, match=f"weights 'bf16' has no effect on a model compressed to {kind.name}"):
            BFloat16.applied(stored)


# --- GPTQ


def rounded_by_definition(weight: Tensor, hessian: Tensor, group_size: int) -> Tensor:
    """Equations 2 and 3 of the paper, with the inverse for the columns that are left computed anew for each."""
    weight, size = weight.clone(), len(hessian)
    hessian = hessian + DAMPING * hessian.diagonal().mean() * torch.eye(size, dtype=hessian.dtype)
    rounded = torch.zeros_like(weight)
    for i in range(size):
        if i % group_size == 0:
            scale = group_scale(weight[:, i : i + group_size])
        inverse = torch.linalg.inv(hessian[i:, i:])
        integers = round_to(weight[:, i], scale)
        rounded[:, i] = integers
        weight[:, i:] -= ((weight[:, i] - integers * scale) / inverse[0, 0])[:, None] * inverse[0]
    return rounded


@pytest.mark.parametrize("features", [64, 128])
def test_gptq_rounds_as_its_equations_do_and_keeps_more_of_the_product(features: int) -> None:
    mixed = torch.randn(features, features, dtype=torch.float64)
    x = torch.randn(500, features, dtype=torch.float64) @ mixed
    weight, hessian = torch.randn(5, features, dtype=torch.float64), 2 * x.t() @ x
    integers, scales = rounded_by_gptq(weight, hessian, 64)
    assert torch.equal(integers.double(), rounded_by_definition(weight, hessian, 64))

    def error(integers: Tensor, scales: Tensor) -> float:
        restored = (integers.view(5, -1, 64) * scales[..., None]).flatten(1)
        return float(((restored - weight) @ x.t()).square().sum())

    groups = weight.view(5, -1, 64)
    nearest = round_to(groups, group_scale(groups)[..., None]).flatten(1)
    assert error(integers, scales) < 0.5 * error(nearest, group_scale(groups))


def test_gptq_takes_inputs_that_were_always_0_and_rows_that_fill_no_group() -> None:
    hessian = torch.zeros(10, 10)
    weight = torch.randn(3, 10)
    integers, scales = rounded_by_gptq(weight, hessian, 64)
    assert integers.shape == (3, 64)
    assert torch.equal(integers[:, :10], round_to(weight, scales).to(torch.int8))


# --- fewer parts


def calibration_of(model: Model) -> Calibration:
    calibration = Calibration.__new__(Calibration)
    objective = Causal(Causal.Settings(), Bytes(), model.config, 8)
    tokens = torch.randint(11, (2, 9))
    calibration.loader = loader_of(objective, TINY)
    calibration.batches = [Causal.batch_type(tokens[:, :-1], tokens[:, 1:])]
    return calibration


@pytest.mark.parametrize("choices", [{"bias": True}, {"num_kv_heads": 2}, {"num_experts": 2}], ids=str)
def test_heads_and_units_without_effect_are_those_that_are_left_out(
    tiny_decoder: MakeModel, choices: dict[str, Any]
) -> None:
    model = tiny_decoder(**choices)
    with torch.no_grad():
        for block in model.stack.blocks:  # type: ignore[union-attr]
            first = 8 if choices.get("num_kv_heads") else 4
            block.attention.output.weight[:, first : first + 8] = 0
            for network in getattr(block.feedforward, "experts", [block.feedforward]):
                network.down.weight[:, ::4] = 0
    expected = logits(model)
    smaller = Prune(Prune.Settings(heads=2, units=0.25)).applied(model.float(), calibration_of(model))
    assert (smaller.config.num_heads, smaller.config.head_dim, smaller.config.d_ff) == (2, 4, 48)
    torch.testing.assert_close(logits(smaller).double(), expected, rtol=1e-4, atol=1e-4)


def test_the_most_important_stay_in_order() -> None:
    assert most_important(torch.tensor([3.0, 1.0, 4.0, 2.0]), 2).tolist() == [0, 2]


@pytest.mark.parametrize("topology", ["decoder", "encoder"])
def test_a_layer_that_does_nothing_is_the_one_that_is_dropped(tiny_model: MakeModel, topology: str) -> None:
    model = tiny_model(
        topology,
        num_layers=3,
        attention_window=4,
        window_pattern=(True, False, False),
        rotary_layers=(False, False, True),
    ).float()
    with torch.no_grad():
        for part in (model.stack.blocks[1].attention.output, model.stack.blocks[1].feedforward.down):  # type: ignore[union-attr]
            part.weight.zero_()
    expected, method = logits(model), DropLayers(DropLayers.Settings(count=1))
    smaller = method.applied(model, calibration_of(model))
    assert (smaller.config.num_layers, smaller.config.window_pattern) == (2, (True, False))
    torch.testing.assert_close(logits(smaller), expected)
    assert method.remarks[0].startswith("dropped    layer 2 of stack")


def test_without_the_first_layer_that_had_no_norm_the_next_one_keeps_its_own(tiny_model: MakeModel) -> None:
    model = tiny_model("encoder", num_layers=2, first_norm=False, embedding_norm=True).float()
    with torch.no_grad():
        for part in (model.stack.blocks[0].attention.output, model.stack.blocks[0].feedforward.down):  # type: ignore[union-attr]
            part.weight.zero_()
    smaller = DropLayers(DropLayers.Settings(count=1)).applied(model, calibration_of(model))
    assert (smaller.config.num_layers, smaller.config.first_norm) == (1, True)
    torch.testing.assert_close(logits(smaller), logits(model))


# --- the command, on a run


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of some steps, which must not be changed."""
    from tests.runs_for_tests import TEXT

    here = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(here)
        patch.setenv("MINITRANSFORMER_DATA", str(here / "work"))
        (here / "my.txt").write_text(TEXT)
        shape = ["--num-layers", "2", "--num-kv-heads", "1", "--data", "my.txt", "--steps", "40"]
        assert train_command.main(["--out", "run", *SMALL, *shape]) == 0
    return here


@pytest.fixture
def beside_run(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, with a link to the run."""
    monkeypatch.chdir(trained)
    monkeypatch.setenv("MINITRANSFORMER_DATA", str(trained / "work"))
    monkeypatch.setattr(measuring, "NEW_TOKENS", 2)
    return tmp_path


def tune(run: Path, out: Path, *flags: str) -> int:
    few = ["--steps", "3", "--warmup-steps", "1", "--compile", "off", "--precision", "fp32"]
    return train_command.main(["--init-from", str(run), "--out", str(out), *few, *flags])


METHODS = {
    "int8": [],
    "int4": ["--int4-rounding", "nearest"],
    "int4 ": ["--calibration-tokens", "64"],
    "prune": ["--prune-units", "0.5", "--prune-weights", "0.5", "--calibration-tokens", "64"],
    "drop-layers": ["--calibration-tokens", "64"],
}


@pytest.mark.unchecked_shapes
@pytest.mark.parametrize("method", METHODS)
def test_a_compressed_run_is_a_run_like_any_other(
    beside_run: Path, method: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out, before = beside_run / "small", saved_weights(Path("run"))
    flags = ["--method", method.strip(), *METHODS[method]]
    assert compress.main(["run", "--out", str(out), *flags]) == 0
    assert "bits per byte" in capsys.readouterr().out
    original, small = json.loads((out / "compression.json").read_text())["figures"].values()
    assert small["quality_low"] <= small["quality"] <= small["quality_high"]
    assert small["bytes"] < original["bytes"] or "--prune-weights" in flags
    assert all(torch.equal(weight, before[name]) for name, weight in saved_weights(Path("run")).items())
    assert sample.main([str(out), "--prompt", "Line", "--max-new-tokens", "4", "--seed", "0"]) == 0
    tuned = beside_run / "tuned"
    assert tune(out, tuned, "--adapter", "lora") == 0
    model, base = Run.open(tuned).load_model(), Run.open(out).load_model()
    assert not any(isinstance(part, StoredLinear) for part in model.modules())
    assert model.config == base.config.plain


def test_a_pruned_run_stays_pruned_while_all_of_its_weights_train(beside_run: Path) -> None:
    out, tuned = beside_run / "small", beside_run / "tuned"
    assert compress.main(["run", "--out", str(out), "--method", "prune", "--prune-weights", "0.75"]) == 0
    assert tune(out, tuned) == 0
    name = "stack.blocks.0.feedforward.up.weight"
    before, after = saved_weights(out)[name], saved_weights(tuned)[name]
    assert (before == 0).float().mean() == 0.75
    assert torch.equal(before == 0, after == 0)
    assert not torch.equal(before, after)


def test_a_compressed_run_is_fine_tuned_in_full(beside_run: Path) -> None:
    out, tuned = beside_run / "small", beside_run / "tuned"
    assert compress.main(["run", "--out", str(out)]) == 0
    assert tune(out, tuned) == 0
    assert Run.open(tuned).config.model.weight_format.name == "fp32"
    start = saved_weights(tuned, "step-000000") if (tuned / "checkpoints/step-000000").exists() else None
    assert start is None or start["embedding.table.weight"].dtype == torch.float32


def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Point]:
    """The points of every figure that is drawn from here on, which is still made."""
    points: list[Point] = []
    make = figures.named_points

    def keep(given: Sequence[Point], **labels: str) -> Any:
        points.extend(given)
        return make(given, **labels)

    monkeypatch.setattr(figures, "named_points", keep)
    return points


def test_a_plot_shows_all_that_was_made_from_a_run_before_and_after_fine_tuning_on_the_same_data(
    beside_run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    few = ["--method", "prune", "--prune-units", "0.5", "--calibration-tokens", "64"]
    assert compress.main(["run", "--out", str(beside_run / "small"), *few]) == 0
    assert tune(beside_run / "small", beside_run / "tuned", "--lr", "0.01") == 0
    assert compress.main([str(beside_run / "tuned"), "--out", str(beside_run / "tuned8")]) == 0
    student = ["--num-layers", "1", "--data", "my.txt", "--steps", "2", "--out", str(beside_run / "student")]
    assert train_command.main([*SMALL, *student, "--teacher", "run"]) == 0
    (beside_run / "damaged").mkdir()
    (beside_run / "damaged/config.json").write_text("{")
    capsys.readouterr()
    points, plot = drawn(monkeypatch), beside_run / "sizes.png"
    assert compress.main(["run", "--out", str(beside_run / "int8"), "--plot", str(plot)]) == 0
    out, err = capsys.readouterr()
    assert "damaged is left out" in err
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert [(each.name, each.curve) for each in points] == [
        ("run", "not compressed"),
        ("int8", "int8"),
        ("small", "prune units"),
        ("tuned", "prune units"),
        ("tuned8", "prune units, int8"),
        ("student", "distilled"),
    ]
    whole, int8, small, tuned, tuned8, taught = points
    assert tuned.origin == (small.x, small.y)
    assert whole.origin is int8.origin is tuned8.origin is None
    assert tuned8.x < int8.x < small.x == tuned.x < whole.x
    assert taught.x < whole.x
    assert tuned.y < small.y
    record = json.loads((beside_run / "small/compression.json").read_text())["figures"]["small"]
    assert small.y == pytest.approx(record["quality"])
    assert small.low == pytest.approx(whole.y * (1 + record["change_low"]))
    assert f"{tuned.y:.3f}" in out
    assert "prune units, fine-tuning" in out
    points.clear()
    assert compress.main([os.path.relpath(beside_run / "small"), "--plot", str(plot)]) == 0
    assert [each.name for each in points] == ["small", "tuned", "tuned8"]


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--method", "int4", "--calibration-tokens", "999999"], "calibration reads 999,999 tokens, and the training"),
        (["--method", "int4", "--int4-group-size", "100"], "int4_group_size is 100: give a multiple of 64"),
        (["--method", "prune"], "prune removes nothing: give --prune-heads"),
        (["--method", "prune", "--prune-heads", "1"], "2 heads share a key head: give a multiple of 2"),
        (["--method", "drop-layers", "--drop-layers-count", "2"], "and 1 can be left out: give fewer"),
        (["--method", "int8", "--prune-heads", "1"], "prune_heads belongs to method 'prune'"),
        (["--calibration-tokens", "64"], "calibration_tokens is 64, and int8 reads none: leave it out"),
        (["--method", "int4", "--data", "short.txt"], "short.txt is too short: its training and its validation part"),
        (["--plot", "x.pdf"], "x.pdf is no .png file"),
        (["--plot", "short.txt/x.png"], "short.txt/x.png cannot be written, as short.txt is no folder"),
    ],
)
def test_what_cannot_be_is_refused_in_one_sentence(
    beside_run: Path, capsys: pytest.CaptureFixture[str], flags: list[str], sentence: str
) -> None:
    Path("short.txt").write_text("Too short.\n")
    assert sentence in refused(capsys, "run", "--out", str(beside_run / "x"), *flags, main=compress.main)
    assert not (beside_run / "x").exists()


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ([], "nothing is asked for: give --out for the folder of the new run, or --plot"),
        (["--plot", "x.png", "--method", "int8"], "--method is for a new run: name its folder with --out"),
    ],
)
def test_what_needs_a_new_run_is_refused_without_one(
    beside_run: Path, capsys: pytest.CaptureFixture[str], flags: list[str], sentence: str
) -> None:
    assert sentence in refused(capsys, "run", *flags, main=compress.main)
    assert not Path("x.png").exists()
