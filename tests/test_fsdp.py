"""Models divided over ranks: built in parts, reduced once a step, small on each rank, and saved for any number."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from minitransformer.architecture.block import Block
from minitransformer.architecture.init import Initialisation
from minitransformer.commands.train import main as train_main
from minitransformer.errors import UserError
from minitransformer.models.adapters import LoRA, SoftPrompt
from minitransformer.models.config import ModelConfig
from minitransformer.models.model import Model, build_in_parts, build_model
from minitransformer.runs.begin import check_possible
from minitransformer.training.learner import Learner
from minitransformer.training.parallel import FSDP
from minitransformer.training.ranks import ONE_PROCESS, Ranks
from minitransformer.training.tensor_parallel import divide
from tests.forked_for_tests import forked_commands
from tests.placements_for_tests import EVERY_PLACEMENT
from tests.ranks_for_tests import config_of, learner_of, on_ranks, write_texts
from tests.runs_for_tests import SMALL, metrics
from tests.shards_for_tests import one_rank
from tests.shared_for_tests import measured_once

pytestmark = pytest.mark.unchecked_shapes
SIZES: dict[str, Any] = {"d_model": 8, "num_layers": 2, "num_heads": 2, "context_length": 16, "vocab_size": 11}
KINDS: list[dict[str, Any]] = [
    *EVERY_PLACEMENT,
    *({"init": name} for name in Initialisation.registry),
    {"tied_embeddings": False, "positions": "learned", "bias": True, "num_experts": 3},
    {"positions": "alibi", "block": "parallel-two-norms", "norm": "rms", "token_smear": True},
    {"topology": "encoder", "num_segments": 2, "next_sentence": True, "head": "transformed"},
    {"topology": "encoder-decoder", "positions": "t5", "embedding_dim": 4},
    {"topology": "rnn", "target_vocab_size": 13},
    {"adapter": "lora", "bias": True},
    {"adapter": LoRA.choose(base_weights="int8")},
    {"adapter": SoftPrompt.choose(tokens=3), "positions": "learned"},
]


# --- built in parts


@pytest.mark.parametrize("choices", KINDS, ids=str)
def test_a_model_built_in_parts_has_the_weights_of_one_built_at_once(choices: dict[str, Any]) -> None:
    config = ModelConfig(**{**SIZES, **choices})
    states, numbers = [], []
    for build in (build_model, lambda config: build_in_parts(config, lambda module: None)):
        torch.manual_seed(3)
        model: Model = build(config)
        states.append([*model.named_parameters(), *model.named_buffers()])
        numbers.append(torch.rand(1))
    assert [name for name, _ in states[0]] == [name for name, _ in states[1]]
    assert all(torch.equal(one, other) for (_, one), (_, other) in zip(*states, strict=True))
    assert torch.equal(*numbers)


def test_at_most_one_block_of_a_model_that_is_built_in_parts_is_in_memory() -> None:
    """`complete` takes the weights of each block away, as a rank does that keeps a part of them."""
    held: list[list[bool]] = []

    def complete(module: nn.Module) -> None:
        if isinstance(module, Block):
            blocks.append(module)
            for part in module.modules():
                for name, weight in part.named_parameters(recurse=False):
                    setattr(part, name, nn.Parameter(weight.to("meta")))
        held.append([any(not weight.is_meta and weight.dim() > 1 for weight in block.parameters()) for block in blocks])

    blocks: list[nn.Module] = []
    model = build_in_parts(ModelConfig(**{**SIZES, "num_layers": 3}), complete)
    assert held == [[False], [False, False], [False] * 3, [False] * 3]
    assert not model.embedding.table.weight.is_meta  # type: ignore[operator, union-attr]


def test_a_block_has_no_storage_before_its_turn() -> None:
    turns: list[list[bool]] = []

    def complete(module: nn.Module) -> None:
        turns.append([linear.weight.is_meta for linear in linears])

    linears: list[nn.Linear] = []

    class Watched(nn.Linear):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            linears.append(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("minitransformer.architecture.feedforward.OutputProjection", Watched)
        build_in_parts(ModelConfig(**{**SIZES, "num_layers": 3}), complete)
    assert turns == [[False, True, True], [False, False, True], [False] * 3, [False] * 3]


# --- one rank, which keeps all rows


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: Any) -> Path:
    monkeypatch.setenv("MINITRANSFORMER_DATA", str(tmp_path / "prepared"))
    write_texts(tmp_path)
    return tmp_path


def fsdp_over(ranks: Ranks, chosen: Any) -> FSDP:
    """On a single rank too, for which `parallel_over` leaves it out."""
    return FSDP(chosen.settings if chosen.variant is FSDP else FSDP.Settings(), ranks)


@pytest.mark.parametrize("name", ["decoder", "muon", "experts", "recurrent", "recomputed"])
def test_steps_on_a_rank_that_holds_every_row_are_those_of_one_process(
    name: str, folder: Path, monkeypatch: Any
) -> None:
    plain = losses(learner_of(config_of(name, folder), ONE_PROCESS))
    with one_rank(folder):
        monkeypatch.setattr("minitransformer.training.learner.parallel_over", fsdp_over)
        learner = learner_of(config_of(name, folder), ONE_PROCESS)
        assert losses(learner) == pytest.approx(plain, rel=1e-6)
        whole = learner.parallel.whole(learner.model)
        weights = learner.model.state_dict()
        assert whole.state_dict().keys() == weights.keys()
        assert all(torch.equal(value, weights[name].full_tensor()) for name, value in whole.state_dict().items())
        del learner, weights


def losses(learner: Learner, steps: int = 3) -> list[float]:
    results = [learner.step(learner.next_batches()) for _ in range(steps)]
    return [value.item() for result in results for value in (result.loss, result.grad_norm)]


DIVIDED = {"tensor_parallel": 2, "dropout": 0.0}
IMPOSSIBLE: list[tuple[dict[str, Any], str]] = [
    ({"probe": ("gradient-norm",)}, "leave --probe out"),
    ({"residual": "admin"}, "residual 'admin' sets weights"),
    ({**DIVIDED, "tensor_parallel": 3}, "4 ranks are no multiple of 3"),
    ({**DIVIDED, "dropout": 0.1}, "set --dropout 0"),
    ({**DIVIDED, "optimizer": "muon"}, "choose --optimizer adamw"),
    ({**DIVIDED, "precision": "fp16"}, "impossible in fp16"),
    ({**DIVIDED, "num_heads": 1}, "2 ranks cannot share 1 heads"),
    ({**DIVIDED, "num_kv_heads": 1}, "2 ranks cannot share 1 heads"),
    ({**DIVIDED, "d_ff": 7}, "2 ranks cannot share 7 features"),
    ({**DIVIDED, "qk_norm": "full"}, "set --qk-norm head"),
    ({**DIVIDED, "num_experts": 4}, "cannot divide MixtureOfExperts"),
    ({**DIVIDED, "objective": "seq2seq", "data": "pairs.tsv", "topology": "rnn"}, "this model has none"),
]


@pytest.mark.parametrize(("choices", "sentence"), IMPOSSIBLE)
def test_what_fsdp_cannot_do_is_refused(choices: dict[str, Any], sentence: str, folder: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("minitransformer.training.learner.parallel_over", fsdp_over)
    ranks = Ranks()
    ranks.size = 4
    with pytest.raises(UserError, match=sentence):
        learner_of(config_of("decoder", folder, parallel="fsdp", **choices), ranks)


def test_a_rank_of_fsdp_cannot_repeat_a_pass(folder: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("minitransformer.training.learner.parallel_over", fsdp_over)
    with one_rank(folder), pytest.raises(UserError, match="--on-oom halve is not possible"):
        learner_of(config_of("decoder", folder, parallel="fsdp", on_oom="halve"), ONE_PROCESS)


@pytest.mark.parametrize("choices", [{"parallel": "fsdp"}, {"parallel": "ddp", "num_experts": 4}])
def test_halving_that_ranks_cannot_do_is_refused_before_a_run_begins(choices: dict[str, Any], folder: Path) -> None:
    ranks = Ranks()
    ranks.size = 2
    with pytest.raises(UserError, match="--on-oom halve is not possible"):
        check_possible(config_of("decoder", folder, on_oom="halve", **choices), None, ranks)


@pytest.mark.parametrize("choices", [{"positions": "alibi"}, {"positions": "t5"}, {"residual": "value-residual"}])
def test_what_all_heads_share_is_refused_when_ranks_share_the_heads(choices: dict[str, Any], tmp_path: Path) -> None:
    with one_rank(tmp_path):
        model: Any = build_model(ModelConfig(**{**SIZES, **choices}))
        mesh = init_device_mesh("cpu", (1,))
        for block in model.stack.blocks:
            divide(block, mesh)
        with pytest.raises(UserError, match="cannot divide biases of scores, or values of other layers"):
            model(torch.zeros(1, 4, dtype=torch.long))


# --- activation checkpointing


@pytest.mark.parametrize("name", ["decoder", "experts", "masked", "pairs", "bf16"])
def test_recomputed_activations_change_no_bit(name: str, folder: Path) -> None:
    runs = []
    for recompute in (False, True):
        learner = learner_of(config_of(name, folder, activation_checkpointing=recompute), ONE_PROCESS)
        runs.append((losses(learner), [weight.detach() for weight in learner.model.parameters()]))
    assert runs[0][0] == runs[1][0]
    assert all(torch.equal(one, other) for one, other in zip(runs[0][1], runs[1][1], strict=True))


def test_the_backward_pass_runs_each_block_again_and_keeps_less(folder: Path) -> None:
    calls, kept = [], []
    for recompute in (False, True):
        learner = learner_of(config_of("decoder", folder, activation_checkpointing=recompute), ONE_PROCESS)
        count = [0, 0]

        def called(*_: Any, count: list[int] = count) -> None:
            count[0] += 1

        def saved(tensor: torch.Tensor, count: list[int] = count) -> torch.Tensor:
            count[1] += tensor.nbytes
            return tensor

        for block in learner.model.stack.blocks:  # type: ignore[union-attr]
            block.feedforward.register_forward_pre_hook(called)
        with torch.autograd.graph.saved_tensors_hooks(saved, lambda tensor: tensor):
            loss = learner.objective.loss_sum(learner.fast_model, learner.next_batches()[0])
        loss.backward()
        calls.append(count[0])
        kept.append(count[1])
    assert calls == [2, 4]
    assert kept[1] < kept[0] / 2


def test_a_recurrent_model_has_no_blocks_to_recompute(folder: Path) -> None:
    with pytest.raises(UserError, match="topology 'rnn' has none"):
        config_of("recurrent", folder, activation_checkpointing=True)


# --- several ranks


@pytest.fixture(scope="module")
def collectives(tmp_path_factory: Any) -> dict[str, Any]:
    def measure(folder: Path) -> dict[str, Any]:
        write_texts(folder)
        counts = {"alone": 1, "ddp": 2, "fsdp": 2}
        module = "tests.collectives_for_tests"
        return {
            name: on_ranks(count, folder, parallel="ddp" if name == "alone" else name, module=module)
            for name, count in counts.items()
        }

    measured: dict[str, Any] = measured_once(tmp_path_factory, "collectives", measure)
    return measured


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_initial_weights_on_ranks_are_those_of_one_process_bit_for_bit(
    parallel: str, collectives: dict[str, Any]
) -> None:
    assert collectives[parallel]["weights"] == collectives["alone"]["weights"]


@pytest.mark.slow
def test_gradients_are_reduced_once_a_step_however_many_micro_batches_it_has(collectives: dict[str, Any]) -> None:
    for counted in (collectives["ddp"]["collectives"], collectives["fsdp"]["collectives"]):
        for operation in ("c10d::allreduce_", "c10d::_reduce_scatter_base_"):
            assert counted["1"].get(operation) == counted["2"].get(operation)
    # The gradients, in one bucket, and the loss.
    assert collectives["ddp"]["collectives"]["2"]["c10d::allreduce_"] == 2
    # Two blocks, and the rest; the loss, and the gradient norm.
    assert collectives["fsdp"]["collectives"]["2"]["c10d::_reduce_scatter_base_"] == 3
    assert collectives["fsdp"]["collectives"]["2"]["c10d::allreduce_"] == 2


@pytest.mark.slow
def test_two_ranks_of_fsdp_keep_half_each(collectives: dict[str, Any]) -> None:
    assert collectives["ddp"]["bytes"] == collectives["alone"]["bytes"]
    assert collectives["fsdp"]["bytes"] < 0.51 * collectives["ddp"]["bytes"]
    assert collectives["fsdp"]["peak"] < 0.75 * collectives["ddp"]["peak"]


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_each_rank_orthogonalises_its_share_of_whole_matrices(parallel: str, collectives: dict[str, Any]) -> None:
    [alone], ranks = collectives["alone"]["orthogonalised"], collectives[parallel]["orthogonalised"]
    assert len(ranks) == 2
    for shapes in zip(alone, *ranks, strict=True):
        whole, *parts = shapes
        assert all(part[1:] == whole[1:] for part in parts)
        assert [part[0] for part in parts] == [whole[0] / 2] * 2


@pytest.mark.slow
def test_a_run_of_two_ranks_goes_on_with_any_other_number(here: Path, capsys: Any) -> None:
    """Divided weights and optimizer states: saved by two ranks, and continued by one and by four."""
    flags = [
        "--data",
        "my.txt",
        "--schedule",
        "constant",
        "--dropout",
        "0",
        "--optimizer",
        "adamw",
        "--save-every",
        "4",
        *SMALL,
    ]
    assert train_main([*flags, "--steps", "8", "--out", "alone"]) == 0
    for count in (1, 4):
        out = f"then-{count}"
        tensor = ["--tensor-parallel", "2"] if count == 4 else []
        train_on(2, *flags, "--steps", "4", "--out", out, "--parallel", "fsdp", *tensor, "--sample-at-eval")
        assert list((here / out / "checkpoints/step-000004").glob("shard-00002-*"))
        train_on(count, "--resume", out, "--steps", "8")
        ours, expected = metrics(here / out)[-1], metrics(here / "alone")[-1]
        assert ours["validation_loss"] == pytest.approx(expected["validation_loss"], rel=1e-5)
        assert "--- step 8" in (here / out / "samples.txt").read_text()


def test_what_divides_a_run_is_refused_without_torchrun(here: Path, capsys: Any) -> None:
    assert train_main(["--data", "my.txt", "--steps", "1", "--out", "run", *SMALL]) == 0
    for flags in (["--parallel", "fsdp"], ["--resume", "run", "--tensor-parallel", "2"]):
        capsys.readouterr()
        assert train_main(flags) == 2
        said = "is for several processes, and this is one: start it with torchrun, or leave it out\n"
        assert capsys.readouterr().err.endswith(said)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("parallel", "flags"),
    [
        ("fsdp", []),
        ("ddp", ["--adapter", "lora"]),
        ("fsdp", ["--adapter", "lora"]),
        ("ddp", ["--adapter", "lora", "--lora-base-weights", "int8"]),
        ("fsdp", ["--adapter", "lora", "--lora-base-weights", "int8"]),
    ],
    ids=str,
)
def test_ranks_start_from_the_weights_of_another_run(here: Path, capsys: Any, parallel: str, flags: list[str]) -> None:
    assert train_main(["--data", "my.txt", "--steps", "4", "--out", "first", *SMALL]) == 0
    flags = [*flags, "--steps", "2", "--schedule", "constant"]
    train_on(2, "--init-from", "first", *flags, "--out", "tuned", "--parallel", parallel)
    train_on(2, "--resume", "tuned", "--steps", "4")
    assert train_main(["--init-from", "first", *flags, "--out", "alone"]) == 0
    assert train_main(["--resume", "alone", "--steps", "4"]) == 0
    ours, expected = metrics(here / "tuned")[-1], metrics(here / "alone")[-1]
    assert ours["validation_loss"] == pytest.approx(expected["validation_loss"], rel=1e-5)


def train_on(count: int, *flags: str) -> None:
    """`train.py` on `count` ranks."""
    ended = forked_commands()(Path.cwd(), "train", *flags, ranks=count, patience=300)
    assert ended.done, ended.output[-3000:]
