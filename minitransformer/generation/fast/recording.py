"""Decode steps, recorded once and replayed without Python.

For one token of a small model, the Python of its modules takes longer than their arithmetic. All steps are the same
operations once the caller chooses the slots of a cache with room for all tokens to come (`KVCache.at`): so one step is
recorded, and later ones replay it with the slots and the cache then in use. `torch.jit.trace` records in milliseconds,
where `torch.compile` takes longer than most texts take to decode. On CUDA, a graph replays all kernels of a step by one
call, for fixed shapes.
"""

# `torch.jit.trace` is deprecated, in favour of `torch.export`, which takes seconds where tracing takes milliseconds.
# When a torch comes without `torch._C._create_graph_by_tracing`, which the upper bound of torch in pyproject.toml keeps
# out until then, an exported step, compiled once for a model and kept on disk, replaces `traced`; where there is none
# yet, steps run as they are. Nothing else knows of tracing.

from __future__ import annotations

import signal
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from minitransformer.architecture.attention import MultiHeadAttention
from minitransformer.generation.fast.rows import count_matrix_weights
from minitransformer.generation.fast.threads import run_with_one_thread

SOON = 8
"""steps"""
MOST = 16
"""recordings of a step"""
FEW_PRODUCTS = 1 << 21
"""that one thread computes about as fast as several (measured), and faster if other processes are busy"""
FEW_SLOTS = 512
"""whose attention costs little"""
StepFunction = Callable[..., Tensor]
RECORDING = threading.Lock()
"""held while a step is traced"""


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Delays Ctrl-C to the end of the block: torch can lose it while it records."""
    if threading.current_thread() is not threading.main_thread():  # where there are no signals
        yield
        return
    received: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: received.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if received:
        signal.raise_signal(signal.SIGINT)


def has_fixed_shapes(device: torch.device) -> bool:
    """Whether a recording on this device is valid only for the shapes that it was recorded with."""
    return device.type == "cuda"


def slots_visible(length: int, most: int, fixed: bool) -> int:
    """Number of the `most` slots that attention reads when `length` are in use: these, unless shapes are `fixed`.

    Then up to a quarter more, or `FEW_SLOTS`: all would make a short text as slow as the longest.
    """
    if not fixed:
        return length
    step = max(FEW_SLOTS, (1 << length.bit_length()) // 8)
    return min(most, -(-length // step) * step)


class Recorded:
    """`step`, a function of tensors whose operations do not depend on their values; recorded when shapes recur soon.

    A shape that recurs seldom is not worth a recording. One is made for each shape of the first tensor, and is valid
    for any size of the others, unless `fixed`: then it is a CUDA graph. `products` is the number of multiplications for
    such tensors.
    """

    def __init__(
        self,
        step: StepFunction,
        products: Callable[..., int] = lambda *tensors: 0,
        *,
        fixed: bool = False,
    ) -> None:
        self.step, self.products, self.fixed = step, products, fixed
        self._recordings: dict[tuple[int, ...], StepFunction] = {}
        self._steps = 0
        self._seen: dict[tuple[int, ...], int] = {}

    def __call__(self, *tensors: Tensor) -> Tensor:
        shapes = sum([tensor.shape for tensor in tensors], ()) if self.fixed else tensors[0].shape
        self._steps += 1
        recording = self._recordings.get(shapes)
        if recording is None:
            before, self._seen[shapes] = self._seen.get(shapes, -SOON), self._steps
            if self._steps - before > SOON:
                return self._run(self.step, tensors)
            if len(self._recordings) == MOST:
                self._recordings.clear()
            with uninterrupted():
                recording = (captured if self.fixed else traced)(self.step, tensors)
                self._recordings[shapes] = recording
        return self._run(recording, tensors)

    def _run(self, step: StepFunction, tensors: Sequence[Tensor]) -> Tensor:
        optimizing = torch._C._get_graph_executor_optimize()
        # Optimising a recording takes as long as hundreds of replays gain by it. The switch is thread-local.
        torch._C._set_graph_executor_optimize(False)
        try:
            few = self.products(*tensors) < FEW_PRODUCTS
            return run_with_one_thread(step, *tensors) if few else step(*tensors)
        finally:
            torch._C._set_graph_executor_optimize(optimizing)


def traced(step: StepFunction, tensors: Sequence[Tensor]) -> StepFunction:
    """`step` without Python, freed with its last reference.

    `torch.jit.trace` would keep it, with the weights and the cache that are its constants, in a compilation unit of the
    process, for ever. Writes to tensors that nothing in the step reads are left out.
    """
    # What warnings are shown is a matter of the process: two threads would undo each other's change.
    with RECORDING, warnings.catch_warnings():
        # That sizes become constants is intended.
        warnings.simplefilter("ignore")
        graph, _ = torch._C._create_graph_by_tracing(step, tuple(tensors), lambda value: "", True, False)
    return torch._C.CompilationUnit().create_function("step", graph)


def captured(step: StepFunction, tensors: Sequence[Tensor]) -> StepFunction:
    """`step` as a CUDA graph, or unchanged where its operations depend on values on the device."""
    inputs = [tensor.clone() for tensor in tensors]
    graph, aside = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        step(*inputs)  # a warm-up: the initialisation of libraries cannot be captured
    torch.cuda.current_stream().wait_stream(aside)
    try:
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            output = step(*inputs)
    except RuntimeError:
        return step

    def replay(*new: Tensor) -> Tensor:
        for tensor, value in zip(inputs, new, strict=True):
            tensor.copy_(value)
        graph.replay()
        return output.clone()

    return replay


def products_of(model: nn.Module) -> Callable[..., int]:
    """A function from the tensors of a step of `model` to its number of multiplications.

    It takes tokens, their slots, a tensor whose last size is the number of visible slots, and others.
    """
    weights = count_matrix_weights(model)
    scored = sum(2 * module.query.out_features for module in model.modules() if isinstance(module, MultiHeadAttention))

    def products(tokens: Tensor, slots: Tensor, visible: Tensor, *others: Tensor) -> int:
        return tokens.numel() * (weights + scored * visible.size(-1))

    return products
