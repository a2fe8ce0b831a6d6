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

import copy
import signal
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from minitransformer.architecture.attention import MultiHeadAttention
from minitransformer.models.joined import has_hooks, is_plain

SOON = 8
"""steps"""
FEW_PRODUCTS = 1 << 21
"""that one thread does about as fast as several (measured), and several times as fast if another process is at work"""
MANY_WEIGHTS = 1 << 17
"""of which a product with one row takes much longer than to call it"""
M = TypeVar("M", bound=nn.Module)
Step = Callable[..., Tensor]


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


class Recorded:
    """`step`, a function of tensors that does the same whatever they hold; recorded when shapes come again soon.

    What comes now and then, such as reading a window anew, is not worth a recording. One is made for each shape of the
    first tensor, and holds for any size of the others, unless `fixed`: then it is a CUDA graph. `products` counts what
    there is to do for such tensors; `onednn` says whether replays may use that library.
    """

    def __init__(
        self,
        step: Step,
        products: Callable[..., int] = lambda *tensors: 0,
        *,
        onednn: bool = True,
        fixed: bool = False,
    ) -> None:
        self.step, self.products, self.onednn, self.fixed = step, products, onednn, fixed
        self._recordings: dict[tuple[int, ...], Step] = {}
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

    def _replayed(self, replay: Step, tensors: Sequence[Tensor]) -> Tensor:
        # Each is a context manager of its own in torch; three of them would take longer than a matrix product.
        threads, onednn = torch.get_num_threads(), torch._C._get_mkldnn_enabled()
        optimizing = torch._C._get_graph_executor_optimize()
        torch.set_num_threads(1 if self.products(*tensors) < FEW_PRODUCTS else threads)
        torch._C._set_mkldnn_enabled(onednn and self.onednn)
        # To optimise a recording takes as long as hundreds of replays gain by it.
        torch._C._set_graph_executor_optimize(False)
        try:
            return replay(*tensors)
        finally:
            torch._C._set_graph_executor_optimize(optimizing)
            torch._C._set_mkldnn_enabled(onednn)
            torch.set_num_threads(threads)


def traced(step: Step, tensors: Sequence[Tensor]) -> Step:
    """`step` without Python, for as long as someone keeps it.

    As `torch.jit.trace`, which would put it, with the weights and the cache that are its constants, into a compilation
    unit of the whole process, for ever. A write to a tensor that nothing in the step reads is left out.
    """
    with warnings.catch_warnings():
        # Of sizes that become constants: here they are.
        warnings.simplefilter("ignore")
        graph, _ = torch._C._create_graph_by_tracing(step, tuple(tensors), lambda value: "", True, False)
    return torch._C.CompilationUnit().create_function("step", graph)


def captured(step: Step, tensors: Sequence[Tensor]) -> Step:
    """`step` as a CUDA graph, or as it is where it asks the device for what decides how it goes on."""
    inputs = [tensor.clone() for tensor in tensors]
    graph, aside = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        step(*inputs)  # what libraries do the first time cannot be captured
    torch.cuda.current_stream().wait_stream(aside)
    try:
        with torch.cuda.graph(graph):
            output = step(*inputs)
    except RuntimeError:
        return step

    def replay(*new: Tensor) -> Tensor:
        for tensor, value in zip(inputs, new, strict=True):
            tensor.copy_(value)
        graph.replay()
        return output.clone()

    return replay


def recorded(step: Step, model: nn.Module) -> Step:
    """`step`, to be replayed, unless a module of `model` has hooks, which a replay would not run.

    It takes tokens, their slots, a tensor whose last size is the number of visible slots, and others.
    """
    if any(map(has_hooks, model.modules())):
        return step
    linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
    weights = sum(linear.in_features * linear.out_features for linear in linears)
    scored = sum(2 * module.query.out_features for module in model.modules() if isinstance(module, MultiHeadAttention))

    def products(tokens: Tensor, slots: Tensor, visible: Tensor, *others: Tensor) -> int:
        return tokens.numel() * (weights + scored * visible.size(-1))

    # Measured: of what float32 models do for a token, oneDNN only does GELU, in several times the time of torch.
    onednn = not all(getattr(linear, "kernel", False) or _is_float32(linear) for linear in linears)
    return Recorded(step, products, onednn=onednn, fixed=has_fixed_shapes(next(model.parameters()).device))


def _is_float32(linear: nn.Linear) -> bool:
    weight = linear._parameters.get("weight")
    return weight is not None and weight.dtype == torch.float32


def for_single_rows(model: M) -> M:
    """A copy of `model`, with the same weights, whose linear maps are fast for one row; made for evaluation only."""
    return with_modules(model, _for_single_rows)


def _for_single_rows(module: nn.Module) -> nn.Module | None:
    if isinstance(module, nn.Linear) and is_plain(module):
        return RowLinear(module)
    if isinstance(module, MultiHeadAttention):
        maps = [module.query, module.key, module.value]
        if all(map(is_plain, maps)) and sum(linear.weight.numel() for linear in maps) <= MANY_WEIGHTS:
            attention = _with_parts(module, _for_single_rows)
            attention.project = RowProjection(maps)
            return attention
    return None


def with_modules(model: M, replace: Callable[[nn.Module], nn.Module | None]) -> M:
    """A copy of `model`, with the same weights as constants, in which some modules have a replacement."""
    replaced = replace(model)
    return _with_parts(model, replace) if replaced is None else replaced  # type: ignore[return-value]


def _with_parts(model: M, replace: Callable[[nn.Module], nn.Module | None]) -> M:
    clone = copy.copy(model)
    # What requires a gradient cannot be a constant of a recording.
    clone._parameters = {name: _constant(weight) for name, weight in model._parameters.items()}
    clone._modules = {name: child and with_modules(child, replace) for name, child in model._modules.items()}
    return clone


def _constant(weight: Tensor | None) -> nn.Parameter | None:
    return None if weight is None else nn.Parameter(weight.detach(), requires_grad=False)


class RowLinear(nn.Linear):
    """x Wᵀ + b, fast for a single row; the outputs of several maps one after another."""

    def __init__(self, *maps: nn.Linear) -> None:
        nn.Module.__init__(self)  # not nn.Linear's, which would draw weights
        weight, bias = maps[0].weight.detach(), _constant(maps[0].bias)
        if len(maps) > 1:
            weight = torch.cat([linear.weight.detach() for linear in maps])
            bias = None if bias is None else _constant(torch.cat([linear.bias for linear in maps]))
        self.out_features, self.in_features = weight.shape
        # Measured on CPUs: a row times a wide matrix is up to 1.8 times as fast if the matrix is stored by columns, and
        # large matrices are faster still with a vector.
        if weight.device.type == "cpu" and weight.size(0) > weight.size(1):
            weight = weight.t().contiguous().t()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.transposed = weight.t()
        self.register_parameter("bias", bias)
        self.large = weight.numel() > MANY_WEIGHTS

    def forward(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        if self.large and x.numel() == self.weight.size(1):
            product = torch.mv(self.weight, x.reshape(-1)).view(*x.shape[:-1], -1)
        else:
            product = x @ self.transposed
        return product if self.bias is None else product + self.bias


class RowProjection(nn.Module):
    """Queries, keys and values of `maps` by one product: for few features, calling it takes the longest."""

    def __init__(self, maps: Sequence[nn.Linear]) -> None:
        super().__init__()
        self.together, self.sizes = RowLinear(*maps), [linear.out_features for linear in maps]

    def forward(self, x: Float[Tensor, "*batch in"], *maps: nn.Linear) -> Sequence[Float[Tensor, "*batch _"]]:
        """As `project_each` of the `maps` that this was made from."""
        return self.together(x).split(self.sizes, dim=-1)
