"""The black box of a run that has diverged, and its replay from the box alone."""

import errno
import json
import math
from copy import deepcopy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minitransformer import files
from minitransformer.architecture.feedforward import TanhGELU
from minitransformer.commands import replay as command
from minitransformer.errors import StorageError
from minitransformer.training.black_box import BLACK_BOX, BlackBox, leave_black_box, packed, unpacked
from minitransformer.training.divergence import NonFiniteTraining
from minitransformer.training.objectives import Objective
from minitransformer.training.progress import StepFigures
from minitransformer.training.replay import replay
from minitransformer.training.tracing import Tracer
from tests.runs_for_tests import call_after_step, configured, cpu, refused, train, trainer_for, weights_after
from tests.test_topologies import PARTS, make, outputs

pytestmark = pytest.mark.unchecked_shapes
HUGE = 3e38


def boxed(path, text, spoil, **changes):
    """The trainer of a run that `spoil` makes diverge after its fourth step, and its black box."""
    config = configured(**{"steps": 100, "eval_every": 100, "max_skipped_steps": 3, "dropout": 0.2, **changes})
    trainer = trainer_for(path, text, config)
    call_after_step(trainer, 4, lambda: spoil(trainer))
    with pytest.raises(NonFiniteTraining, match=f"replay {path / BLACK_BOX}"):
        trainer.train()
    return trainer, path / BLACK_BOX


def fill(*names, value=HUGE):
    def spoil(trainer):
        weights = dict(trainer.learner.model.named_parameters())
        for name in names:
            weights[name].data.fill_(value)

    return spoil


def lose_the_loss(trainer):
    trainer.learner.objective.loss_sum = lambda model, batch: model(batch.inputs).sum() * math.nan


UP = "stack.blocks.1.feedforward.up"
ATTENTION = "stack.blocks.0.attention"


@pytest.mark.parametrize(
    ("weights", "value", "module"),
    [
        ([f"{UP}.weight"], HUGE, UP),
        (["embedding.table.weight"], HUGE, "stack.dropout"),
        # The scores are not a module: the attention around them is the first whose inputs are finite.
        ([f"{ATTENTION}.query.weight", f"{ATTENTION}.key.weight"], 1e25, ATTENTION),
    ],
)
def test_the_replay_names_the_module_whose_outputs_are_the_first_that_are_not_finite(
    text, tmp_path, weights, value, module
):
    trainer, path = boxed(tmp_path / "run", text, fill(*weights, value=value))
    assert trainer.progress.step == 7
    done = replay(BlackBox.open(path), cpu("fp32"))
    assert done.is_exact
    assert done.forward.module == module
    assert done.forward.inputs.is_finite
    assert done.forward.inputs.count
    assert not done.forward.results.is_finite


class InfiniteSlope(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.tanh()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * math.inf


def test_the_replay_names_the_module_whose_gradients_are_the_first_that_are_not_finite(text, tmp_path, monkeypatch):
    def spoil(trainer):
        monkeypatch.setattr(TanhGELU, "activation", staticmethod(InfiniteSlope.apply))

    done = replay(BlackBox.open(boxed(tmp_path / "run", text, spoil)[1]), cpu("fp32"))
    assert done.is_exact
    assert math.isfinite(done.loss)
    assert done.forward is None
    assert done.backward.module == "stack.blocks.1.feedforward"
    assert done.backward.gradients.is_finite
    assert not done.backward.results.is_finite


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16", "fp8"])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_the_box_alone_gives_the_loss_and_the_gradient_norm_of_the_step_bit_for_bit(
    text, tmp_path, precision, optimizer
):
    """Of a step that is finite too, whose numbers say more than NaN does."""
    config = configured(precision=precision, optimizer=optimizer, dropout=0.2, grad_accumulation=2, steps=4)
    trainer = trainer_for(tmp_path / "run", text, config)
    trainer.train()
    learner, weights = trainer.learner, weights_after(trainer)
    state, scale = deepcopy(learner.state_dict()), learner.precision.loss_scale().item()
    result = learner.step(learner.next_batches())
    learner.model.load_state_dict(weights)
    learner.load_state_dict({**state, "step": 5})
    figures = StepFigures(result.loss.item(), result.grad_norm.item(), False, scale, scale)
    leave_black_box(tmp_path / "run", learner, figures)
    done = replay(BlackBox.open(tmp_path / "run" / BLACK_BOX), cpu(precision))
    assert done.box.step == 5
    assert (done.loss, done.grad_norm) == (figures.loss, figures.grad_norm)
    assert done.is_exact
    assert (done.forward, done.backward) == (None, None)


def test_the_box_holds_the_weights_before_the_step_its_text_and_its_norms(text, tmp_path):
    trainer, path = boxed(tmp_path / "run", text, fill(f"{UP}.weight"), grad_accumulation=2)
    record = json.loads((path / "box.json").read_text())
    for name, weight in trainer.learner.model.named_parameters():
        assert record["norms"]["weights"][name] == pytest.approx(weight.double().norm().item())
    assert record["norms"]["gradients"].keys() == record["norms"]["weights"].keys()
    norms = record["norms"]["activations"]
    assert norms["stack.blocks.0.feedforward.up"] > 0
    assert norms[UP] in ("inf", "nan")
    assert (record["seed"], record["step"], record["loss"]) == (0, 7, "nan")
    assert record["versions"]["torch"] == torch.__version__
    written = (path / "text.txt").read_text()
    assert [batch.inputs.shape for batch in BlackBox.open(path).batches] == [(2, 16), (2, 16)]
    for number, batch in enumerate(trainer.learner.loader.training_batches(6)):
        for row, ids in enumerate(batch.inputs.tolist()):
            assert f"--- micro-batch {number}, row {row}, inputs\n{text.tokenizer.decode(ids)}\n" in written


def test_a_box_without_a_skipped_step_is_of_the_next_one(text, tmp_path):
    spoil = fill("stack.final_norm.weight", value=math.nan)
    trainer, path = boxed(tmp_path / "run", text, spoil, save_every=4)
    assert trainer.progress.step == 4
    box = BlackBox.open(path)
    assert (box.step, box.loss) == (5, None)
    assert replay(box, cpu("fp32")).forward.module == "stack.final_norm"


# --- float16, whose loss scale is found by overflows


def test_overflows_that_find_the_loss_scale_of_float16_are_no_divergence(text, tmp_path):
    trainer = trainer_for(tmp_path / "run", text, configured(precision="fp16", steps=60, eval_every=60))
    trainer.learner.precision.set_loss_scale(2.0**50)
    trainer.train()
    records = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    skipped = [record["skipped_steps"] for record in records if "skipped_steps" in record]
    assert sum(skipped) > trainer.config.max_skipped_steps  # they are counted, and said
    assert trainer.progress.skipped_step == trainer.progress.steps_without_update == 0
    assert not (tmp_path / "run" / BLACK_BOX).exists()


def test_overflows_of_float16_that_never_end_are_a_divergence(text, tmp_path):
    def spoil(trainer):
        loss_sum = trainer.learner.objective.loss_sum
        trainer.learner.objective.loss_sum = lambda model, batch: loss_sum(model, batch) * 1e9

    trainer, path = boxed(tmp_path / "run", text, spoil, precision="fp16")
    # 65536 is 1 after 16 steps, and 3 more are too many.
    assert trainer.progress.step == 4 + 16 + 3
    assert BlackBox.open(path).state["precision"]["scale"] == 0.25


# --- the folder


def test_a_box_that_cannot_be_written_leaves_nothing_and_hides_nothing(text, tmp_path, monkeypatch):
    trainer = trainer_for(tmp_path / "run", text, configured(steps=100, save_every=100, eval_every=100))
    call_after_step(trainer, 1, lambda: lose_the_loss(trainer))

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files, "write_tensors", full)
    with pytest.raises(NonFiniteTraining, match=r"20 steps .*could not be written \(No space left on device\)"):
        trainer.train()
    assert not list((tmp_path / "run").glob(f"{BLACK_BOX}*"))


@pytest.fixture(scope="module")
def box(text, tmp_path_factory):
    return boxed(tmp_path_factory.mktemp("boxes") / "run", text, fill(f"{UP}.weight"))[1]


def test_a_damaged_box_is_refused_in_a_sentence(box, tmp_path, capsys):
    for number, original in enumerate(sorted(box.iterdir())):
        for harm in ("torn", "missing", "flipped"):
            copied = tmp_path / f"{number}-{harm}"
            copied.mkdir()
            for path in box.iterdir():
                (copied / path.name).write_bytes(path.read_bytes())
            damaged, content = copied / original.name, original.read_bytes()
            if harm == "missing":
                damaged.unlink()
            else:
                middle = len(content) // 2
                flipped = content[:middle] + bytes([content[middle] ^ 4]) + content[middle + 1 :]
                damaged.write_bytes(content[:middle] if harm == "torn" else flipped)
            no_box = harm == "missing" and original.name == "box.json"
            error = refused(capsys, str(copied), main=command.main, code=2 if no_box else 1)
            assert ("is not a black box" if no_box else "damaged") in error


def resealed(box, folder, **changes):
    folder.mkdir()
    for path in box.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    record = files.unsealed(json.loads((box / "box.json").read_text()))
    (folder / "box.json").write_text(json.dumps(files.sealed({**record, **changes})))
    return folder


@pytest.mark.parametrize(
    "changes",
    [{"state": {"tensor": "none"}}, {"state": 3}, {"machine": {}}, {"config": []}, {"loss": "low"}, {"sha256": {}}],
)
def test_a_box_whose_record_makes_no_sense_is_refused(box, tmp_path, changes):
    with pytest.raises(StorageError, match=r"damaged|restore"):
        BlackBox.open(resealed(box, tmp_path / "box", **changes))


def test_a_step_that_is_not_as_recorded_is_said_and_fails(box, tmp_path, capsys):
    record = json.loads((box / "box.json").read_text())
    other = resealed(box, tmp_path / "box", loss=2.5, machine_in_words=record["machine_in_words"])
    assert command.main([str(other)]) == 1
    out = capsys.readouterr().out
    assert "loss       nan, recorded 2.5" in out
    assert "replayed   not" in out


def test_the_command_says_where_in_words_and_in_json(here, capsys):
    arguments = ["--out", "run", "--lr", "1e30", "--max-skipped-steps", "2"]
    assert train(*arguments, steps=40) == 3
    assert "`python -m minitransformer replay run/black-box` shows where" in capsys.readouterr().out
    assert command.main(["run/black-box"]) == 0
    words = capsys.readouterr().out
    assert "replayed   exactly, bit for bit" in words
    assert command.main(["run/black-box", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["is_exact"]
    assert f"forward    {found['forward']['module']} ({found['forward']['kind']}) in micro-batch 0" in words
    assert found["replayed"] == found["recorded"]
    assert "give the folder" in refused(capsys, "run", main=command.main)


@pytest.mark.parametrize("objective", sorted(Objective.registry))
def test_every_objective_says_the_type_of_its_batches(objective):
    kind = Objective.registry[objective]
    assert kind.batch_type.__name__ in ("Batch", "PairBatch", "MaskedBatch", "LabelBatch", "PackedBatch")


nested = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text() | st.just(torch.arange(3.0)),
    lambda inner: st.lists(inner) | st.dictionaries(st.integers() | st.text(), inner),
)


@given(nested)
def test_packing_loses_nothing(value):
    tensors = {}
    stored = json.loads(json.dumps(packed(value, "a", tensors)))
    assert repr(unpacked(stored, tensors)) == repr(value)


@pytest.mark.parametrize("topology", ["decoder", "encoder-decoder"])
@pytest.mark.parametrize("choices", PARTS, ids=str)
def test_no_part_of_a_model_that_works_is_suspected(topology, choices):
    model = make(topology, **choices)
    tracer = Tracer(model)
    with tracer.tracing():
        outputs(model).sum().backward()
    assert tracer.forward.origin is None
    assert tracer.backward.origin is None
