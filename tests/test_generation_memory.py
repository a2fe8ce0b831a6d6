"""A text leaves nothing behind: what was recorded for it, its cache and its copies of weights go when it ends."""

from __future__ import annotations

import gc
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain, islice
from typing import Any

import pytest
import torch
from torch import Tensor

from minitransformer.architecture import cache
from minitransformer.generation.config import SamplingConfig
from minitransformer.generation.decode import generate, generate_each
from minitransformer.generation.fast import recording
from minitransformer.generation.fast.rows import RowLinear
from minitransformer.generation.fast.steps import recorded_steps
from minitransformer.generation.speculation import Draft, speculate
from minitransformer.models.decoder import DecoderLM

MakeDecoder = Callable[..., DecoderLM]
SAMPLING = SamplingConfig(max_new_tokens=6, seed=0)
WAYS: dict[str, Callable[[DecoderLM], Iterator[Any]]] = {
    "generate": lambda model: generate(model, [1, 2], SAMPLING),
    "left early": lambda model: islice(generate(model, [1, 2], SAMPLING), 4),
    "past the context": lambda model: generate(model, [1, 2], SamplingConfig(max_new_tokens=40, seed=0)),
    "many at a time": lambda model: generate_each(model, [[1, 2], [3], [4, 5]], SAMPLING, batch_size=2),
    "speculative": lambda model: chain.from_iterable(
        speculate(model, Draft(model), [1, 2], SAMPLING, make_steps=recorded_steps)
    ),
}


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[weakref.ref[Any]]:
    """What was made to decode: buffers of caches, which a recording holds as constants, and maps for single rows."""
    found: list[weakref.ref[Any]] = []
    with_room, row_linear = cache._with_room, RowLinear.__init__

    def buffer(*arguments: Any) -> Tensor:
        room = with_room(*arguments)
        found.append(weakref.ref(room))
        return room

    def linear(self: RowLinear, *maps: torch.nn.Linear) -> None:
        row_linear(self, *maps)
        found.append(weakref.ref(self))

    monkeypatch.setattr(cache, "_with_room", buffer)
    monkeypatch.setattr(RowLinear, "__init__", linear)
    return found


@contextmanager
def without_collections() -> Iterator[None]:
    """What is in a circle stays: only what nobody knows any more goes."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


@pytest.mark.parametrize("way", WAYS)
def test_what_a_text_was_decoded_with_is_gone_when_it_ends(
    way: str, tiny_decoder: MakeDecoder, made: list[weakref.ref[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    recordings = []
    traced = recording.traced

    def remembered(step: Any, tensors: Any) -> Any:
        recordings.append(len(tensors))
        return traced(step, tensors)

    monkeypatch.setattr(recording, "traced", remembered)
    model = tiny_decoder(num_layers=1, context_length=16)
    with without_collections():
        for _ in WAYS[way](model):
            pass
        assert made
        assert recordings
        assert not [one for one in made if one() is not None]


MANY_TEXTS = """
import torch
from minitransformer.generation.decode import generate
from minitransformer.generation.config import SamplingConfig
from minitransformer.models.config import ModelConfig
from minitransformer.models.decoder import DecoderLM

def memory():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096 / 1e6

model = DecoderLM(ModelConfig(d_model=256, num_layers=2, num_heads=4, context_length=256, vocab_size=4000)).eval()
for number in range(24):
    for _ in generate(model, [1, 2, 3], SamplingConfig(max_new_tokens=5, seed=0)):
        pass
    if number == 8:
        before = memory()
print(memory() - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_many_texts_take_the_memory_of_one() -> None:
    """With a recording kept for each, fifteen texts of this model took 66 MB."""
    done = subprocess.run([sys.executable, "-c", MANY_TEXTS], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 25
