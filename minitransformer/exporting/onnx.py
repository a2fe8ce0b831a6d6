"""`--format onnx`: graphs for onnxruntime."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Mapping
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram

from minitransformer.errors import UserError
from minitransformer.exporting.copies import Copy, CopyError
from minitransformer.exporting.exported import Exported
from minitransformer.exporting.formats import ExportChoices
from minitransformer.exporting.graph_copies import Call, GraphCopy, GraphFormat
from minitransformer.exporting.graphs import Graph, past_names

OPSET = 20


class ONNX(GraphFormat, name="onnx"):
    """Graphs for onnxruntime and its kin, with the cache as inputs and outputs; an encoder-decoder is two."""

    suffix = ".onnx"

    def __init__(self, exported: Exported, choices: ExportChoices) -> None:
        if not all(map(find_spec, ("onnx", "onnxruntime", "onnxscript"))):
            raise UserError("--format onnx needs onnx and onnxruntime: pip install minitransformer[export]")
        super().__init__(exported, choices)

    def about(self) -> dict[str, Any]:
        return {"opset": OPSET}

    def write_graph(self, graph: Graph, program: ExportedProgram, path: Path) -> None:
        names: dict[str, Any] = {"input_names": graph.input_names, "output_names": graph.output_names}
        # torch says of each operator of torchvision that it is not installed.
        logging.getLogger("torch.onnx._internal.exporter._registration").setLevel(logging.ERROR)
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")  # of what torch will change in itself
            written = torch.onnx.export(
                program, kwargs=graph.inputs, dynamo=True, opset_version=OPSET, verbose=False, **names
            )
        assert written is not None
        written.save(path)

    def open(self, folder: Path) -> Copy:
        return ONNXCopy(folder, self.exported)


class ONNXCopy(GraphCopy):
    """Graphs opened by onnxruntime."""

    def __init__(self, folder: Path, exported: Exported) -> None:
        super().__init__(folder, exported)
        self.runtime = f"onnxruntime {version('onnxruntime')}"

    def open_graph(self, name: str) -> Call:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level, options.intra_op_num_threads = 3, torch.get_num_threads()
        try:
            session = onnxruntime.InferenceSession(
                self.folder / f"{name}.onnx", options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # of kinds that are its own
            reason = f"the copy cannot be opened by onnxruntime ({str(error).splitlines()[0]})"
            raise CopyError(f"{reason}: it was removed; choose another --format") from None
        known = {each.name for each in session.get_inputs()}

        def call(inputs: dict[str, Any]) -> list[Tensor]:
            past = inputs.pop("past", [])
            flat = {**inputs, **dict(zip(past_names(self.config, len(past) // 2), past, strict=True))}
            feed = {each: tensor.numpy() for each, tensor in flat.items() if each in known}
            return [torch.from_numpy(array) for array in session.run(None, feed)]

        return call

    def weights(self) -> Mapping[str, Tensor] | None:
        """The initialisers that are a weight of the run, as it is or transposed, by its name."""
        import onnx

        paths = [self.folder / f"{name}.onnx" for name in self.graphs]
        stored = [each for path in paths for each in onnx.load(str(path)).graph.initializer]
        arrays = [torch.from_numpy(onnx.numpy_helper.to_array(each).copy()) for each in stored]
        found = {}
        for name, weight in self.exported.model.named_parameters():
            same = (a for a in arrays if torch.equal(a, weight) or (weight.dim() == 2 and torch.equal(a, weight.mT)))
            if next(same, None) is not None:
                found[name] = weight
        return found
