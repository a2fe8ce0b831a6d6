"""The model's steps, recorded once and replayed without Python.

For one token of a small model, walking through its modules takes longer than the arithmetic in them. All steps do the
same, once the caller chooses the slots of a cache that has room for all tokens to come (`KVCache.at`): so a step is
recorded, and the later ones replay its operations, with the slots that are in use by then. `torch.jit.trace` records
in milliseconds, where `torch.compile` takes longer than most texts take to decode. On CUDA, a graph replays all kernels
of a step by one call, for fixed shapes.
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
from minitransformer.models.joined import has_hooks

SOON = 8
"""steps"""
FEW_PRODUCTS = 1 << 21
"""that one thread does about as fast as several (measured), and several times as fast if another process is at work"""
FEW_SLOTS = 512
"""that it costs little to look at"""
StepFunction = Callable[..., Tensor]


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Ctrl-C waits until the end: torch can lose it while it records."""
    if threading.current_thread() is not threading.main_thread():  # where there are no signals
        yield
        return
    came: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: came.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if came:
        signal.raise_signal(signal.SIGINT)


def has_fixed_shapes(device: torch.device) -> bool:
    """Whether what is recorded there holds for the very shapes that it was recorded with."""
    return device.type == "cuda"


def slots_visible(length: int, most: int, fixed: bool) -> int:
    """How many of `most` slots attention looks at when `length` are in use: these, where recordings take any size.

    Where their shapes are `fixed`, up to a quarter more, or `FEW_SLOTS`: all would cost a short text as much as the
    longest.
    """
    if not fixed:
        return length
    step = max(FEW_SLOTS, (1 << length.bit_length()) // 8)
    return min(most, -(-length // step) * step)


class Recorded:
    """`step`, a function of tensors that does the same whatever they hold; recorded when shapes come again soon.

    What comes now and then, such as reading a window anew, is not worth a recording. One is made for each shape of the
    first tensor, and holds for any size of the others, unless `fixed`: then it is a CUDA graph. `products` counts what
    there is to do for such tensors.
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
        if shapes not in self._recordings:
            before, self._seen[shapes] = self._seen.get(shapes, -SOON), self._steps
            if self._steps - before > SOON:
                return self.step(*tensors)
            with uninterrupted():
                self._recordings[shapes] = (captured if self.fixed else traced)(self.step, tensors)
        return self._replayed(self._recordings[shapes], tensors)

    def _replayed(self, replay: StepFunction, tensors: Sequence[Tensor]) -> Tensor:
        optimizing = torch._C._get_graph_executor_optimize()
        # To optimise a recording takes as long as hundreds of replays gain by it. The switch is the thread's own.
        torch._C._set_graph_executor_optimize(False)
        try:
            few = self.products(*tensors) < FEW_PRODUCTS
            return run_with_one_thread(replay, *tensors) if few else replay(*tensors)
        finally:
            torch._C._set_graph_executor_optimize(optimizing)


def traced(step: StepFunction, tensors: Sequence[Tensor]) -> StepFunction:
    """`step` without Python, for as long as someone keeps it.

    As `torch.jit.trace`, which would put it, with the weights and the cache that are its constants, into a compilation
    unit of the whole process, for ever. A write to a tensor that nothing in the step reads is left out.
    """
    with warnings.catch_warnings():
        # Of sizes that become constants: here they are.
        warnings.simplefilter("ignore")
        graph, _ = torch._C._create_graph_by_tracing(step, tuple(tensors), lambda value: "", True, False)
    return torch._C.CompilationUnit().create_function("step", graph)


def captured(step: StepFunction, tensors: Sequence[Tensor]) -> StepFunction:
    """`step` as a CUDA graph, or as it is where it asks the device for what decides how it goes on."""
    inputs = [tensor.clone() for tensor in tensors]
    graph, aside = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        step(*inputs)  # what libraries do the first time cannot be captured
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


def recorded(step: StepFunction, model: nn.Module) -> StepFunction:
    """`step`, to be replayed, unless a module of `model` has hooks, which a replay would not run.

    It takes tokens, their slots, a tensor whose last size is the number of visible slots, and others.
    """
    if any(map(has_hooks, model.modules())):
        return step
    weights = count_matrix_weights(model)
    scored = sum(2 * module.query.out_features for module in model.modules() if isinstance(module, MultiHeadAttention))

    def products(tokens: Tensor, slots: Tensor, visible: Tensor, *others: Tensor) -> int:
        return tokens.numel() * (weights + scored * visible.size(-1))

    return Recorded(step, products, fixed=has_fixed_shapes(next(model.parameters()).device))
