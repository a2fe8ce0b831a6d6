"""Exports that are graphs: what ONNX and torch.export share, in writing them and in running them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.export import ExportedProgram

from minitransformer.errors import UserError
from minitransformer.exporting.copies import Copy
from minitransformer.exporting.exported import Exported
from minitransformer.exporting.formats import ExportChoices, ExportFormat
from minitransformer.exporting.graphs import MASK, SOURCE_MASK, STATES, TOKENS, Graph, empty_past, graphs_of
from minitransformer.exporting.library import opened_texts
from minitransformer.models.config import ModelConfig
from minitransformer.pretrained.checkpoint import write_text_files
from minitransformer.settings import to_json

CONFIG = "config.json"
Call = Callable[[dict[str, Any]], list[Tensor]]
"""runs one graph: from its inputs by name to its outputs"""


class GraphFormat(ExportFormat):
    """A format of graphs, each in a file of its own, beside the files of the tokenizer."""

    suffix: ClassVar[str]

    def __init__(self, exported: Exported, choices: ExportChoices) -> None:
        super().__init__(exported, choices)
        self.graphs()

    @classmethod
    def holders(cls, config: ModelConfig) -> list[str]:
        return [] if config.topology == "rnn" else [cls.name]

    def graphs(self) -> list[Graph]:
        """Raises `UserError` for a model that is no graph of tensors."""
        config = self.exported.model.config
        if config.topology == "rnn":
            raise UserError(f"--format {self.name} holds no recurrent model: its topology is 'rnn'")
        if config.target_vocab_size is not None or len(self.exported.run.tokenizers) > 1:
            raise UserError(
                f"--format {self.name} holds one tokenizer, and the run has two: train one vocabulary for both"
            )
        return graphs_of(self.exported.model)

    def write(self, folder: Path) -> None:
        exported = self.exported
        for graph in self.graphs():
            self.write_graph(graph, program_of(graph), folder / f"{graph.name}{self.suffix}")
        about = {**exported.fields(), "minitransformer": to_json(exported.model.config)}
        (folder / CONFIG).write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
        texts = (exported.tokenizer, exported.originals, exported.generation(), exported.template_source)
        write_text_files(folder, *texts)

    def write_graph(self, graph: Graph, program: ExportedProgram, path: Path) -> None:
        """Write one graph to `path`."""
        raise NotImplementedError


@torch.no_grad()
def program_of(graph: Graph) -> ExportedProgram:
    """The graph as torch traces it."""
    return torch.export.export(graph.module, (), graph.inputs, dynamic_shapes=graph.dynamic, strict=False)


class GraphCopy(Copy):
    """Graphs, opened by a runtime: `open_graph` gives what calls the one of that name."""

    def __init__(self, folder: Path, exported: Exported) -> None:
        self.folder, self.exported, self.config = folder, exported, exported.model.config
        self.texts = opened_texts(folder)

    def open_graph(self, name: str) -> Call:
        raise NotImplementedError

    @cached_property
    def graphs(self) -> dict[str, Call]:
        names = ["encoder_model", "decoder_model"] if self.exported.is_two_sided else ["model"]
        return {name: self.open_graph(name) for name in names}

    @torch.inference_mode()
    def outputs(self, *inputs: Tensor) -> Tensor:
        if not self.exported.writes:
            return self.graphs["model"]({TOKENS: inputs[0], MASK: torch.ones_like(inputs[0])})[0]
        return self._step(inputs[-1], inputs[-1].size(1), None, self._source(inputs[0]))[0]

    def _source(self, tokens: Tensor) -> dict[str, Tensor]:
        """What the decoder sees of a source; nothing without one."""
        if not self.exported.is_two_sided:
            return {}
        mask = torch.ones_like(tokens)
        return {STATES: self.graphs["encoder_model"]({TOKENS: tokens, MASK: mask})[0], SOURCE_MASK: mask}

    def _step(self, tokens: Tensor, total: int, past: list[Tensor] | None, source: dict[str, Tensor]) -> list[Tensor]:
        """Logits of new tokens, and the cache with them in it, of `total` tokens."""
        two_sided = self.exported.is_two_sided
        layers = self.config.decoder_layers if two_sided else self.config.num_layers
        past = empty_past(self.config, layers, len(tokens)) if past is None else past
        mask = torch.ones(len(tokens), total, dtype=torch.long)
        return self.graphs["decoder_model" if two_sided else "model"](
            {TOKENS: tokens, MASK: mask, **source, "past": past}
        )

    @torch.inference_mode()
    def greedy(self, prompt: list[int], count: int, ends: Sequence[int]) -> list[int] | None:
        """With its cache: the prompt at once, then a token at a time."""
        if not self.exported.writes:
            return None
        source = self._source(torch.tensor([prompt]))
        new = [self.exported.tokenizer.target_start] if self.exported.is_two_sided else prompt
        tokens: list[int] = []
        past: list[Tensor] | None = None
        total = 0
        while len(tokens) < count and not (tokens and tokens[-1] in ends):
            total += len(new)
            logits, *past = self._step(torch.tensor([new]), total, past, source)
            new = [int(logits[0, -1].argmax())]
            tokens += new
        return tokens

    def token_ids(self, text: str) -> list[int] | None:
        return self.texts.token_ids(text)

    def chat(self, messages: Sequence[Mapping[str, str]]) -> tuple[str, list[int]] | None:
        return self.texts.chat(messages)

    def ends(self) -> set[int] | None:
        """Graphs stop nowhere: the ids that their configuration names."""
        if not self.exported.writes:
            return None
        found = json.loads((self.folder / CONFIG).read_text(encoding="utf-8"))["eos_token_id"]
        return set(found if isinstance(found, list) else [found])
