"""The options of `sample` besides those of sampling, and which of both contradict each other."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from typing_extensions import Doc

from minitransformer.errors import UserError
from minitransformer.generation.config import SamplingConfig
from minitransformer.generation.weights import StoredWeights


@dataclass(frozen=True)
class Options:
    """Which model continues which prompt, and how it is loaded."""

    run: tyro.conf.Positional[Path | None] = None
    """run folder; None uses the latest one in runs/"""
    prompt: str | None = None
    """text to continue, to fill in (with <mask> for each mask) or to translate; None reads standard input"""
    prompt_file: Path | None = None
    """file with that text, used unchanged"""
    lines: bool = False
    """continue each line of the prompt on its own; each result is printed in one line, with \\n for a line break"""
    batch_size: int = 32
    """number of lines or rows to generate or translate at a time"""
    interactive: bool = False
    """read prompts from the terminal, a line each, and remember none of them; Ctrl-D exits"""
    chat: bool = False
    """hold a conversation by the run's chat template: each line is a message, and is remembered; Ctrl-D ends it"""
    system: str | None = None
    """what the conversation begins with, such as how to answer"""
    special_tokens: bool = False
    """special tokens spelled out in the prompt, such as <|im_start|> or <extra_id_0>, are the tokens"""
    batch_file: Path | None = None
    """JSONL file whose rows are answered: their "prompt", or "messages" with --chat; killed, it goes on where it was"""
    out: Path | None = None
    """new JSONL file for the rows of --batch-file, each with the answer as its field output"""
    template: Path | None = None
    """file with a Jinja template that makes the prompt of a row from its fields: Translate: {{ text }}"""
    adapter: Path | None = None
    """run folder of an adapter that was trained on this model; --checkpoint is one of its checkpoints then"""
    checkpoint: str | None = None
    """checkpoint of the run, such as step-000500 or latest; None uses the best one, or else the latest"""
    draft: Path | None = None
    """run folder of a smaller model with the same tokenizer, the draft model of speculative decoding"""
    draft_tokens: int = 4
    """number of tokens that the draft model proposes at a time"""
    weights: Annotated[str, Doc(f"format of the weight matrices in memory: {', '.join(StoredWeights.registry)}")] = (
        "fp32"
    )
    device: str = "auto"
    """auto, cpu, cuda or mps"""

    def __post_init__(self) -> None:
        if self.prompt is not None and self.prompt_file is not None:
            raise UserError("there are two prompts, --prompt and --prompt-file: give one of them")
        if self.interactive and (self.prompt is not None or self.prompt_file is not None):
            raise UserError("--interactive asks for its prompts: leave --prompt and --prompt-file out")
        if self.batch_file is not None and (self.interactive or self.lines or self.names_prompt):
            raise UserError(
                "--batch-file holds the prompts: leave --prompt, --prompt-file, --interactive and --lines out"
            )
        if self.chat and (self.interactive or self.lines):
            other = "--interactive" if self.interactive else "--lines"
            raise UserError(f"--chat remembers what was said, and {other} takes each line on its own: give one of them")
        if self.batch_file is not None and self.out is None:
            raise UserError("--batch-file needs a file for the answers: name one with --out")
        if self.batch_size < 1:
            raise UserError(f"batch_size is {self.batch_size}: it must be at least 1")
        StoredWeights.named(self.weights)

    @property
    def names_prompt(self) -> bool:
        """Whether there is a prompt other than on standard input."""
        return self.prompt is not None or self.prompt_file is not None


def check_together(options: Options, sampling: SamplingConfig) -> None:
    """Raises `UserError` for settings that contradict each other."""
    fewest, most = sampling.flat["min_new_tokens"], sampling.max_new_tokens
    if fewest > most:
        raise UserError(f"min_new_tokens {fewest} is more than max_new_tokens {most}: lower it")
    if options.lines and (sampling.num_samples > 1 or options.draft is not None or options.interactive):
        raise UserError("--lines writes one text for each line: leave --num-samples, --draft and --interactive out")
    if options.batch_file is not None and (sampling.num_samples > 1 or options.draft is not None):
        raise UserError("--batch-file has one answer for each row: leave --num-samples and --draft out")
    if options.chat and options.batch_file is None and (sampling.num_samples > 1 or sampling.num_beams > 1):
        raise UserError("--chat gives one answer, as it is drawn: leave --num-samples and --num-beams out")
