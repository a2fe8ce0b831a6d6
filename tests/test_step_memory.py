"""The memory of a training step as it is predicted, beside what torch's allocator, and the system, say it takes."""

import gc
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from minitransformer.models.model import build_model
from minitransformer.preflight.candidate import Candidate, largest_batches
from minitransformer.preflight.rehearsal import rehearse
from minitransformer.training.config import RunConfig, with_vocabulary
from minitransformer.training.learner import Learner, build_learner
from minitransformer.training.loader import Loader
from minitransformer.training.machine import Machine
from minitransformer.training.presets import PRESETS
from minitransformer.training.ranks import joined_ranks
from tests.runs_for_tests import TEXT, configured, cpu

SHAPE = {"d_model": 64, "num_heads": 4, "context_length": 64, "batch_size": 8, "data": "my.txt", "vocab_size": None}
PAIRS = {"objective": "seq2seq", "data": "pairs.tsv", "batch_tokens": 1024}
KINDS = {
    "decoder": {},
    "muon": {"optimizer": "muon"},
    "bf16": {"precision": "bf16"},
    "fp16": {"precision": "fp16"},
    "fp8": {"precision": "fp8"},
    "dropout": {"dropout": 0.1},
    "accumulation": {"grad_accumulation": 3},
    "chunks of logits": {"vocab_size": 60_000, "batch_size": 16},
    "long": {"context_length": 256, "batch_size": 2},
    "experts": {"num_experts": 4},
    "post, swiglu, alibi": {"residual": "post", "feedforward": "swiglu", "positions": "alibi"},
    "masked": {"objective": "masked", "topology": "encoder"},
    "span-corruption": {"objective": "span-corruption", "topology": "encoder-decoder", "grad_accumulation": 2},
    "pairs": {**PAIRS, "topology": "encoder-decoder"},
    "recurrent": {**PAIRS, "topology": "rnn"},
}


@pytest.fixture
def texts(here):
    (here / "pairs.tsv").write_text("".join(f"{i} times {i % 7}\t{'and ' * (i % 9)}{i}\n" for i in range(400)))


def ready(**choices):
    """A configuration with known vocabulary, and its batches."""
    shape = {name: value for name, value in SHAPE.items() if name != "num_heads" or choices.get("topology") != "rnn"}
    config = configured(**{**shape, **choices})
    prepared = config.prepare()
    config = RunConfig(with_vocabulary(config.model, prepared), config.data, config.training)
    return config, Loader.of_run(config, prepared)


def allocated(config, loader, batches):
    """Most bytes that torch's allocator has given out at once, for a model and two steps."""
    gc.collect()  # what earlier tests have left would be freed while this counts
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        learner = Learner(config, build_model(config.model).train(), loader, cpu(config.training.precision))
        for _ in range(2):
            learner.step(batches)
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        most = max(most, live)
    return most


@pytest.mark.parametrize("kind", KINDS)
def test_a_rehearsal_counts_the_bytes_that_the_allocator_gives_out(texts, kind):
    config, loader = ready(**KINDS[kind])
    batches = largest_batches(loader)
    counted = rehearse(config, loader, cpu(config.training.precision), batches)
    # The load of experts is uneven, recurrent models are rehearsed without the copies that padding takes, and a CPU has
    # no products in FP8, but composes them.
    within = {"experts": 0.1, "recurrent": 0.15, "fp8": 0.1}.get(kind, 0.03)
    assert counted.total - counted.holes == pytest.approx(allocated(config, loader, batches), rel=within)


def test_the_parts_are_those_of_the_model_and_its_optimizer(texts):
    config, loader = ready(optimizer="adamw")
    memory = rehearse(config, loader, cpu("fp32"), loader.training_batches(0))
    weights = sum(weight.nbytes for weight in build_model(config.model).parameters())
    assert memory.parameters == pytest.approx(weights, rel=0.01)
    assert memory.gradients == weights
    assert memory.optimizer == pytest.approx(2 * weights, rel=0.01)
    assert memory.total == sum(vars(memory).values())


def test_more_micro_batches_take_no_more_memory(texts):
    few, many = (Candidate(configured(**SHAPE, grad_accumulation=count)).step_memory.total for count in (2, 16))
    assert few == pytest.approx(many, rel=0.01)


def test_a_rank_has_the_whole_model_and_its_share_of_the_rows(texts):
    one, four = (Candidate(configured(**SHAPE), ranks=ranks).step_memory for ranks in (1, 4))
    assert four.parameters == one.parameters
    assert four.activations == pytest.approx(one.activations / 4, rel=0.25)


FSDP: dict[str, object] = {"parallel": "fsdp", "optimizer": "adamw", "precision": "fp32", "num_layers": 2}


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_of_fsdp_divide_weights_gradients_and_optimizer_state(here, ranks):
    one, part = (Candidate(configured(**SHAPE, **FSDP), ranks=count).step_memory for count in (1, ranks))
    for name in ("parameters", "gradients", "optimizer", "copy"):
        assert getattr(part, name) == pytest.approx(getattr(one, name) / ranks, rel=0.02)


def test_a_rank_of_fsdp_gathers_no_more_than_two_blocks_and_what_is_outside_them(here):
    """The peak of a step is in the backward pass of the head, or of a block: it has no weights of all the others."""
    shape = {**SHAPE, "batch_size": 2, "context_length": 4, "d_model": 256}
    choices = [{**FSDP, "num_layers": layers} for layers in (3, 7)]
    few, many = (Candidate(configured(**{**shape, **each}), ranks=2) for each in choices)
    block = 4 * (many.parameters - few.parameters) // 4
    gathered = many.step_memory.activations - few.step_memory.activations
    assert gathered < block / 2  # rather than the weights of four blocks
    assert few.step_memory.activations > 2 * block


def test_a_micro_batch_that_is_not_the_last_leaves_whole_gradients_on_a_rank_of_fsdp(here):
    once, twice = (Candidate(configured(**SHAPE, **FSDP, grad_accumulation=n), ranks=4).step_memory for n in (1, 2))
    assert twice.activations - once.activations > 2 * once.gradients


def test_ranks_that_share_matrices_divide_them_too_and_read_the_same_rows(here):
    choices = {**SHAPE, **FSDP, "dropout": 0.0}
    four, pairs = (Candidate(configured(**choices, tensor_parallel=count), ranks=4).step_memory for count in (1, 2))
    assert pairs.parameters == pytest.approx(four.parameters, rel=0.2)  # what is outside blocks has half the readers
    assert pairs.activations > four.activations


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_recomputed_activations_are_counted_once(here, parallel):
    choices = {**SHAPE, **FSDP, "parallel": parallel, "num_layers": 4}
    kept, recomputed = (Candidate(configured(**choices, activation_checkpointing=c), ranks=2) for c in (False, True))
    assert recomputed.step_memory.activations < kept.step_memory.activations / 2


# --- beside the system

REAL = {
    "gpt-small": {"batch_size": 8, "precision": "fp32"},
    "gpt-mini": {"optimizer": "adamw", "precision": "bf16"},
    "shakespeare": {"batch_size": 32, "precision": "fp32", "context_length": 256},
    "bert-mini": {"batch_size": 48, "precision": "fp32", "grad_accumulation": 2},
    "t5-mini": {"batch_size": 48, "precision": "bf16"},
    "transformer-mini": {"batch_tokens": 8192, "precision": "fp32"},
    "rnn-attention": {"batch_tokens": 8192, "precision": "fp32", "d_model": 384},
    "experts": {"preset": "gpt-mini", "num_experts": 4, "precision": "fp32"},
}
STEPS_TO_PEAK = {"rnn-attention": 6}
"""2 for all others; of pairs, it depends on when prepared batches are freed"""


def of_preset(name):
    choices = dict((REAL | REAL_RANKS)[name])
    preset = choices.pop("preset", name)
    data = {} if "batch_tokens" in choices else {"data": "long.txt"}
    return configured(PRESETS[preset], **choices, **data)


def peak_of_this_process():
    """In bytes. Unlike getrusage's, this peak does not begin with that of the process that started this one."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def resident(name):
    """Peak memory of this process before a run, when all code is loaded, and after its first steps."""
    from minitransformer.training.machine import keep_freed_memory

    config = of_preset(name)
    prepared = config.prepare()
    config = replace(config, model=with_vocabulary(config.model, prepared))
    loader, precision = Loader.of_run(config, prepared), config.training.precision
    batches = largest_batches(loader)
    keep_freed_memory()
    small = {"d_model": 16} if config.model.topology == "rnn" else {"d_model": 32, "num_heads": 2, "num_layers": 1}
    peaks = []
    for run, count in ((configured(config, **small), 1), (config, STEPS_TO_PEAK.get(name, 2))):
        learner = Learner(run, build_model(run.model).train(), loader, cpu(precision))
        first = [batch.rows(0, 1) for batch in batches] if run is not config else batches
        for _ in range(count):
            learner.step(first)
        peaks.append(peak_of_this_process())
    return peaks


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("name", REAL)
def test_what_is_predicted_is_within_a_fifth_of_what_a_process_takes(here, name):
    (here / "long.txt").write_text("\n".join(f"{i} {TEXT}" for i in range(20)))
    of_preset(name).prepare()
    command = [sys.executable, "-m", "tests.test_step_memory", name]
    before, after = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    predicted = Candidate(of_preset(name)).step_memory.total
    assert predicted == pytest.approx(after - before, rel=0.2)


REAL_RANKS = {
    "fsdp": {
        **{"preset": "gpt-mini", "batch_size": 16, "precision": "fp32", "parallel": "fsdp", "optimizer": "adamw"},
        **{"d_model": 512, "num_layers": 6, "grad_accumulation": 2},
    },
}


def resident_rank(name):
    """`resident` of one of the ranks that torchrun has started; the others return nothing."""
    with joined_ranks() as ranks:
        config = of_preset(name)
        prepared = config.prepare()
        config = replace(config, model=with_vocabulary(config.model, prepared))
        small = configured(config, d_model=32, num_heads=2, num_layers=1)
        peaks = []
        for run, count in ((small, 1), (config, 2)):
            learner = build_learner(run, prepared, cpu("fp32"), ranks)
            for _ in range(count):
                learner.step(learner.next_batches())
            del learner
            peaks.append(peak_of_this_process())
        return peaks if ranks.is_main else None


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("name", REAL_RANKS)
def test_what_is_predicted_is_within_a_fifth_of_what_a_rank_takes(here, name):
    (here / "long.txt").write_text("\n".join(f"{i} {TEXT}" for i in range(20)))
    of_preset(name).prepare()
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [*torchrun, "-m", "tests.test_step_memory", name]
    before, after = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    predicted = Candidate(of_preset(name), ranks=2).step_memory.total
    assert predicted == pytest.approx(after - before, rel=0.2)


@pytest.mark.slow
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", ["gpt-small", "gpt-mini", "bert-mini", "t5-mini"])
def test_what_is_predicted_is_within_a_fifth_of_what_a_gpu_has_allocated(here, name):
    (here / "long.txt").write_text("\n".join(f"{i} {TEXT}" for i in range(20)))
    candidate = Candidate(configured(of_preset(name), device="cuda", compile="off"))
    config, loader = candidate.whole, candidate.loader(candidate.whole)
    predicted = candidate.step_memory.total
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    machine = Machine(candidate.machine.device, candidate.machine.precision, False, "")
    learner = Learner(config, build_model(config.model).to("cuda").train(), loader, machine)
    for _ in range(2):
        learner.step(largest_batches(loader))
    assert predicted == pytest.approx(torch.cuda.max_memory_allocated() - before, rel=0.2)


if __name__ == "__main__":
    torch.set_num_threads(1)
    peaks = (resident_rank if sys.argv[1] in REAL_RANKS else resident)(sys.argv[1])
    if peaks:
        print(json.dumps(peaks))
