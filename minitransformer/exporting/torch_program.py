"""`--format torch`: programs of torch.export."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram

from minitransformer.exporting.copies import Copy, CopyError
from minitransformer.exporting.exported import Exported
from minitransformer.exporting.graph_copies import Call, GraphCopy, GraphFormat
from minitransformer.exporting.graphs import Graph


class TorchProgram(GraphFormat, name="torch"):
    """Programs of torch.export (.pt2), which need torch alone, with the cache as inputs and outputs."""

    suffix = ".pt2"

    def write_graph(self, graph: Graph, program: ExportedProgram, path: Path) -> None:
        torch.export.save(program, path)

    def open(self, folder: Path) -> Copy:
        return TorchCopy(folder, self.exported)


class TorchCopy(GraphCopy):
    """Programs opened by torch, without the code of this package."""

    def __init__(self, folder: Path, exported: Exported) -> None:
        super().__init__(folder, exported)
        self.runtime = f"torch {torch.__version__}"

    def _program(self, name: str) -> ExportedProgram:
        try:
            return torch.export.load(self.folder / f"{name}.pt2")
        except Exception as error:  # of its reader, of zip files, of what a graph may hold
            reason = f"the copy cannot be opened by torch.export ({str(error).splitlines()[0]})"
            raise CopyError(f"{reason}: it was removed; choose another --format") from None

    def open_graph(self, name: str) -> Call:
        # Its guards take a mask of past and new tokens for one of 4 or more, which the graph itself does not need.
        module = self._program(name).module(check_guards=False)

        def call(inputs: dict[str, Any]) -> list[Tensor]:
            found = module(**inputs)
            return [found] if isinstance(found, Tensor) else [found[0], *found[1]]

        return call

    def weights(self) -> Mapping[str, Tensor] | None:
        found: dict[str, Tensor] = {}
        for name in self.graphs:
            found |= {key.removeprefix("model."): weight for key, weight in self._program(name).state_dict.items()}
        return found
