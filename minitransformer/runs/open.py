"""A run folder as an object: created when a run starts, and opened by every other command."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from minitransformer import files
from minitransformer.errors import StorageError, UserError
from minitransformer.models.model import Model
from minitransformer.plugins import check_plugins, plugins_of
from minitransformer.pretrained.chat import chat_template_in
from minitransformer.pretrained.gguf_files import is_gguf
from minitransformer.pretrained.originals import class_names
from minitransformer.records import checked_value, read_json
from minitransformer.runs.layout import (
    CONFIG,
    GENERATION,
    REMEDY,
    TARGET_TOKENIZER,
    TOKENIZER,
    check_free,
    clear,
    provenance,
)
from minitransformer.text.chat_template import ChatTemplate
from minitransformer.text.tokenizers import Tokenizer
from minitransformer.training.checkpoint import (
    CHECKPOINTS,
    check_same_settings,
    checkpoints_in,
    choose_checkpoint,
    load_model,
    write_checkpoint,
)
from minitransformer.training.config import RunConfig
from minitransformer.training.machine import Resolved
from minitransformer.training.weights import Parent


@dataclass(frozen=True)
class Run:
    """A run folder: `config.json`, `tokenizer.json`, `metrics.jsonl`, `train.log`, `samples.txt` and `checkpoints/`.

    A run with two vocabularies has `target-tokenizer.json` too; an import may have `generation_config.json`;
    one that has learned conversations has `chat_template.jinja`.
    """

    path: Path
    config: RunConfig
    tokenizer: Tokenizer
    target_tokenizer: Tokenizer
    """tokenizer of the model's output: `tokenizer` itself, unless the target vocabulary is separate"""
    text: str
    """hash of its prepared data, which is checked before it is read again; "" for imports"""
    machine: Resolved | None = None
    """its device, precision and compilation; None for old runs, and for runs that train.py did not make"""
    parent: Parent | None = None
    """the checkpoint that it started from; None from scratch"""
    sources: Mapping[str, str] = field(default_factory=dict)
    """a digest of each shard of its data, by its path"""
    base: Path | None = None
    """the checkpoint of an adapter's base, if it is not looked for where it was"""

    @classmethod
    def create(
        cls,
        path: Path,
        config: RunConfig,
        tokenizer: Tokenizer,
        target_tokenizer: Tokenizer,
        text: str = "",
        machine: Resolved | None = None,
        parent: Parent | None = None,
        initial: Model | None = None,
        add_files: Callable[[Path], object] = lambda path: None,
        sources: Mapping[str, str] = MappingProxyType({}),
    ) -> Run:
        """Create a run folder; `config.json` is written last, and completes it.

        The weights in `initial`, if given, become the checkpoint of step 0; `add_files`
        adds an import's further files to the folder. Raises `UserError` if `path` already exists, and
        `StorageError` if it cannot be written.
        """
        check_free(path)
        run = cls(path, config, tokenizer, target_tokenizer, text, machine, parent, sources)
        with files.writing(path, REMEDY):
            files.make_folder(path)
            clear(path)
            files.make_folder(run.checkpoints)
            tokenizer.save(path / TOKENIZER)
            if target_tokenizer is not tokenizer:
                target_tokenizer.save(path / TARGET_TOKENIZER)
            if initial is not None:
                write_checkpoint(run.checkpoints, 0, initial, {}, config)
            add_files(path)
        return run.reconfigured(config)

    def reconfigured(self, config: RunConfig, machine: Resolved | None = None) -> Run:
        """This run with another configuration, which is saved with the provenance of the change.

        `machine` replaces its device, precision and compilation.
        """
        run = replace(self, config=config, machine=machine or self.machine)
        origins = {"machine": run.machine, "parent": run.parent}
        about: dict[str, Any] = {name: origin.to_json() for name, origin in origins.items() if origin is not None}
        if self.sources:
            about["sources"] = dict(self.sources)
        if plugins := [vars(plugin) for plugin in plugins_of(config)]:
            about["plugins"] = plugins
        record = {**config.to_json(), "text": self.text, **about, "provenance": provenance()}
        names = [TOKENIZER, TARGET_TOKENIZER][: len(self.tokenizers)]
        with files.writing(self.path, REMEDY):
            record["sha256"] = {name: files.sha256(self.path / name) for name in names}
            files.write_text(self.path / CONFIG, json.dumps(files.sealed(record), indent=2) + "\n")
        return run

    @classmethod
    def open(cls, path: Path) -> Run:
        """Open the run folder `path`; raises `UserError` if it is not a run, and `StorageError` if it is damaged."""
        if not (path / CONFIG).is_file() and not is_gguf(path):
            raise UserError(f"{path} is not a run folder (it has no {CONFIG}): give the output folder of train.py")
        sealed = {} if is_gguf(path) else read_json(path / CONFIG, "restore it, or train again")
        if is_gguf(path) or ("model_type" in sealed and "model" not in sealed):
            raise UserError(f"{path} is a public checkpoint, not a run: import it with `minitransformer import {path}`")
        try:
            record = files.unsealed(sealed)
        except ValueError as error:
            raise StorageError(
                f"{path / CONFIG} was changed after training ({error}): restore it, or, if the change is intended, "
                f'remove its "{files.CHECKSUM}"'
            ) from None
        check_plugins(record.get("plugins"), str(path / CONFIG))
        config = RunConfig.from_json(record, str(path / CONFIG))
        digests = record.get("sha256")
        for name in (TOKENIZER, TARGET_TOKENIZER):
            if isinstance(digests, dict) and name in digests and _digest(path / name) != digests[name]:
                raise StorageError(f"{path / name} was changed after training: restore it, or train again")
        tokenizer = Tokenizer.load(path / TOKENIZER)
        own = path / TARGET_TOKENIZER
        target_tokenizer = Tokenizer.load(own) if own.exists() else tokenizer
        machine = Resolved.from_json(record.get("machine"), str(path / CONFIG))
        parent = Parent.from_json(record.get("parent"), str(path / CONFIG))
        sources = checked_value(record.get("sources", {}), dict, "sources", str(path / CONFIG))
        return cls(path, config, tokenizer, target_tokenizer, str(record.get("text", "")), machine, parent, sources)

    @property
    def trains(self) -> bool:
        """Whether train.py made it, and may resume it: not an import, nor weights that were merged or compressed."""
        names = [path.name for path in checkpoints_in(self.checkpoints)]
        made_whole = self.machine is None and names == ["step-000000"]
        return bool(self.text) and not made_whole

    @property
    def tokenizers(self) -> list[Tokenizer]:
        """The tokenizer, and the target tokenizer if the target vocabulary is separate."""
        both = [self.tokenizer, self.target_tokenizer]
        return both if self.target_tokenizer is not self.tokenizer else both[:1]

    @property
    def generation_config(self) -> dict[str, Any] | None:
        """The generation settings published with an imported model, if any; raises `UserError` if damaged."""
        path = self.path / GENERATION
        return read_json(path, "restore it, or import the checkpoint again") if path.is_file() else None

    @property
    def chat_template(self) -> ChatTemplate | None:
        """What writes conversations as the model has learned them; None if it has learned none."""
        return chat_template_in(self.path, self.tokenizer)

    @property
    def class_names(self) -> list[str]:
        """The names of the classes: of its data, or of an import; numbers if these had no names."""
        trained = getattr(self.config.data.dataset.settings, "classes", ())
        return list(trained) or class_names(self.path, self.config.model.num_classes or 0)

    @property
    def checkpoints(self) -> Path:
        return self.path / CHECKPOINTS

    def cased(self, text: str) -> str:
        """`text`, lower-cased if the run's data is."""
        return self.config.data.dataset.make().cased(text)

    def encode_prompt(self, text: str) -> list[int]:
        """The ids of a prompt as the model has learned to see texts."""
        return self.tokenizer.encode_prompt(self.cased(text))

    def checkpoint(self, name: str | None = None) -> Path:
        """The checkpoint `name`, by default the best, or else the latest."""
        best = self.checkpoints / "best"
        return self.checkpoint_to_continue("best" if name is None and (best.exists() or best.is_symlink()) else name)

    def checkpoint_to_continue(self, name: str | None = None) -> Path:
        """The checkpoint `name`, by default the latest; raises `StorageError` for one of another run."""
        chosen = choose_checkpoint(self.checkpoints, name)
        check_same_settings(chosen, self.config)
        return chosen

    def load_model(self, checkpoint: str | None = None, device: str = "cpu") -> Model:
        """The model of this run in eval mode, from `checkpoint`, by default the best."""
        return load_model(self.checkpoint(checkpoint), self.config, device, self.base)

    def with_adapter(self, path: Path) -> Run:
        """The run of an adapter in the folder `path`, on the model of this run.

        Raises `UserError` if it has none, or one for another base.
        """
        adapter = Run.open(path)
        if adapter.config.model.adapter.name == "none" or adapter.parent is None:
            raise UserError(f"{path} has no adapter: name the folder of a run that has trained one")
        base = self.checkpoints / adapter.parent.checkpoint
        if not base.is_dir():
            raise UserError(
                f"the adapter {path} belongs to another base than {self.path}, which has no checkpoint {base.name}: "
                f"it was trained on {adapter.parent.path}"
            )
        return replace(adapter, base=base)


def _digest(path: Path) -> str | None:
    return files.sha256(path) if path.is_file() else None
