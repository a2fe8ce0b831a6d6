"""`sample`: continue a prompt, fill in masks, translate or classify lines, whatever the model of a run does.

Standard output carries the text, standard error the notes.
"""

from __future__ import annotations

import io
import secrets
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import singledispatch
from pathlib import Path
from typing import Annotated, Any, cast

import torch
import tyro
from typing_extensions import Doc

from minitransformer.commands import DONE, given_flags, piped_text, utf8_text, with_exit_code
from minitransformer.commands.sampling_flags import check_flags, sampling_groups
from minitransformer.commands.settings_flags import parse_groups
from minitransformer.errors import UserError
from minitransformer.generation.classes import Classifier, ranked_classes
from minitransformer.generation.config import SamplingConfig
from minitransformer.generation.fast.rows import with_row_kernel
from minitransformer.generation.fill import MASK, encode_with_masks
from minitransformer.generation.published import published
from minitransformer.generation.samples import filled_text, translations
from minitransformer.generation.speculation import Draft
from minitransformer.generation.streaming import best_texts, stream_text, texts_in_batches
from minitransformer.generation.weights import StoredWeights
from minitransformer.generation.window import window_length
from minitransformer.models.decoder import DecoderClassifier, DecoderLM
from minitransformer.models.encoder import Encoder, EncoderClassifier, EncoderLM
from minitransformer.models.encoder_decoder import Seq2SeqLM
from minitransformer.models.model import Model
from minitransformer.runs import GENERATION, Run, latest_run
from minitransformer.text.tokenizers.framing import Framing
from minitransformer.training.machine import choose_device

SEPARATOR = "-" * 40
ABOUT = {
    "prog": "sample.py",
    "description": "Continue a prompt, fill in masks, translate or classify lines, with the model of a run. The "
    f"defaults of an imported checkpoint are those of its {GENERATION}, where it has one.",
    "title": "model and prompt",
}


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
    """number of lines to generate or translate at a time"""
    interactive: bool = False
    """read prompts from the terminal, a line each; Ctrl-D exits"""
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
        if self.batch_size < 1:
            raise UserError(f"batch_size is {self.batch_size}: it must be at least 1")
        StoredWeights.named(self.weights)


@with_exit_code
def main(arguments: Sequence[str]) -> int:
    """Sample; returns the exit code."""
    options, settings = parse_groups(Options, arguments, sampling_groups(), SamplingConfig().flat, **ABOUT)
    _check_together(options, SamplingConfig(**settings))
    path = options.run or latest_run()
    run = Run.open(path)
    sampling = _completed(options, settings, given_flags(arguments), run)
    prompt = "" if options.interactive else _prompt(options)
    # What cannot be encoded is said before a model is loaded.
    run.tokenizer.encode(MASK.sub("", run.cased(prompt)))
    draft_run = None if options.draft is None else _draft_run(options.draft, run)
    device = str(choose_device(options.device))
    weights = StoredWeights.named(options.weights)
    model = with_row_kernel(weights.applied(run.load_model(options.checkpoint, device=device)), _note)
    draft = None
    if draft_run is not None:
        draft = Draft(with_row_kernel(weights.applied(_decoder(draft_run, model, device))), options.draft_tokens)
    if options.run is None:
        _note(f"the model is that of {path}")
    seed = secrets.randbelow(2**31) if sampling.seed is None else sampling.seed
    if sampling.seed is None and _draws(sampling, model):
        _note(f"--seed {seed} gives this text again")
    generator = torch.Generator().manual_seed(seed)
    _tolerate_characters()
    session = Session(run, options, sampling, seed, generator, draft)
    if options.interactive:
        _converse(model, session)
    else:
        answer(model, prompt, session)
    if draft is not None and draft.proposed:
        share = draft.accepted / draft.proposed
        _note(f"of {draft.proposed} tokens proposed by the draft, {draft.accepted} were accepted ({share:.0%})")
    return DONE


def _check_together(options: Options, sampling: SamplingConfig) -> None:
    """Raises `UserError` for settings that contradict each other."""
    fewest, most = sampling.flat["min_new_tokens"], sampling.max_new_tokens
    if fewest > most:
        raise UserError(f"min_new_tokens {fewest} is more than max_new_tokens {most}: lower it")
    if options.lines and (sampling.num_samples > 1 or options.draft is not None or options.interactive):
        raise UserError("--lines writes one text for each line: leave --num-samples, --draft and --interactive out")


def _completed(options: Options, settings: Mapping[str, Any], given: set[str], run: Run) -> SamplingConfig:
    """`settings`, and what the publisher of the run's model advises where no flag was given; refuses idle flags."""
    content, topology = run.generation_config, run.config.model.topology
    where = {}
    if content is not None and topology != "encoder":
        path = str(run.path / GENERATION)
        advice = published(content, path, two_sided=topology != "decoder")
        taken = {name: value for name, value in advice.settings.items() if name not in given}
        where = dict.fromkeys(taken, path)
        settings = {**settings, **taken}
        if taken:
            _note(f"by {path}, unless flags say otherwise: " + ", ".join(f"{name} {taken[name]}" for name in taken))
        if advice.not_followed:
            _note(f"{path} asks for {', '.join(advice.not_followed)}, which nothing here does")
    sampling = SamplingConfig(**settings)
    _check_together(options, sampling)
    check_flags(given, {**vars(options), **sampling.flat}, topology, where)
    # Without chance, several samples are one text several times.
    return replace(sampling, num_samples=1) if sampling.greedy and sampling.num_beams == 1 else sampling


def _draws(sampling: SamplingConfig, model: Model) -> bool:
    """Whether what is written depends on chance."""
    return sampling.num_beams == 1 and not sampling.greedy and not isinstance(model, Encoder | DecoderClassifier)


def _draft_run(path: Path, run: Run) -> Run:
    """The run in the folder `path`, which has the same tokenizer as `run`."""
    found = Run.open(path)
    if found.tokenizer.fingerprint != run.tokenizer.fingerprint:
        raise UserError(
            f"the draft {path} has another tokenizer than {run.path}: name a run that was trained with the same one"
        )
    return found


def _decoder(run: Run, beside: Model, device: str) -> DecoderLM:
    """The model of `run`, the draft of another: both are decoders."""
    model = run.load_model(device=device)
    for one in (beside, model):
        if not isinstance(one, DecoderLM):
            raise UserError(f"a draft is for decoders, which continue prompts, and not for topology {one.name!r}")
    return cast(DecoderLM, model)


@dataclass(frozen=True)
class Session:
    """What all answers of a call have in common."""

    run: Run
    options: Options
    sampling: SamplingConfig
    seed: int
    generator: torch.Generator
    draft: Draft | None = None


@singledispatch
def answer(model: Model, prompt: str, session: Session) -> None:
    """Print what `model` makes of `prompt`."""
    raise UserError(
        f"a model of topology {model.name!r} predicts nothing: turn texts into vectors with `minitransformer embed`"
    )


def _tolerate_characters() -> None:
    """Show a character that the terminal lacks as "?", and leave it to the tokenizer to refuse what is no text."""
    for stream, errors in ((sys.stdin, "surrogateescape"), (sys.stdout, "replace")):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=errors)


def _prompt(options: Options) -> str:
    if options.prompt is not None:
        return options.prompt
    if options.prompt_file is not None:
        try:
            return utf8_text(options.prompt_file.read_bytes(), str(options.prompt_file))
        except OSError as error:
            raise UserError(f"{options.prompt_file} cannot be read ({error.strerror}): give a text file") from None
    return piped_text()


@answer.register
def _continue(model: DecoderLM, prompt: str, session: Session) -> None:
    """Print the prompt and the first sample as it comes, then the others, with a line between them."""
    tokenizer, sampling = session.run.tokenizer, session.sampling
    if session.options.lines:
        _continue_lines(model, prompt.splitlines(), session)
        return
    prompt_ids = tokenizer.encode_prompt(prompt)
    _note_context(len(prompt_ids), sampling.max_new_tokens, model.config.context_length)
    if sampling.num_beams > 1:
        [found] = best_texts(model, tokenizer, [prompt_ids], sampling)
        for number, text in enumerate(found):
            _print(f"{SEPARATOR}\n{prompt}{text}" if number else prompt + text)
            _end_line(prompt + text)
        return
    texts = [prompt] * sampling.num_samples
    _print(prompt)
    for pieces in stream_text(model, tokenizer, prompt_ids, sampling, generator=session.generator, draft=session.draft):
        _print(pieces[0])
        texts = [text + piece for text, piece in zip(texts, pieces, strict=True)]
    _end_line(texts[0])
    for text in texts[1:]:
        _print(f"{SEPARATOR}\n{text}")
        _end_line(text)


def _continue_lines(model: DecoderLM, prompts: Sequence[str], session: Session) -> None:
    """Print each prompt with what follows it, as `--prompt` would with the same seed, in one line."""
    tokenizer, sampling = session.run.tokenizer, replace(session.sampling, seed=session.seed)
    prompt_ids = [tokenizer.encode_prompt(prompt) for prompt in prompts]
    longest = max(map(len, prompt_ids), default=0)
    _note_context(longest, sampling.max_new_tokens, model.config.context_length)
    texts: Iterator[str]
    if sampling.num_beams > 1:
        texts = (best for best, *_ in best_texts(model, tokenizer, prompt_ids, sampling))
    else:
        texts = texts_in_batches(model, tokenizer, prompt_ids, sampling, session.options.batch_size)
    for prompt, text in zip(prompts, texts, strict=True):
        _print((prompt + text).replace("\\", r"\\").replace("\n", r"\n") + "\n")


@answer.register
def _fill(model: EncoderLM, prompt: str, session: Session) -> None:
    """Print each line with its masks numbered, and the likeliest tokens for each."""
    tokenizer = session.run.tokenizer
    for line in prompt.splitlines():
        if not MASK.search(line):
            raise UserError(f"there is no mask in {line!r}: write <mask> where a word is to be guessed")
        tokens = tokenizer.masked_framing.around(encode_with_masks(tokenizer, line))
        if len(tokens) > model.config.context_length:
            raise UserError(
                f"a line has {len(tokens)} tokens, and the model sees {model.config.context_length}: cut it"
            )
        _print(filled_text(model, tokenizer, tokens) + "\n")


@answer.register(EncoderClassifier)
@answer.register(DecoderClassifier)
def _classify(model: Classifier, prompt: str, session: Session) -> None:
    """Print the classes of each line with their probabilities, the likeliest first."""
    run, framing = session.run, session.run.tokenizer.label_framing
    for line in prompt.splitlines():
        _print(ranked_classes(model, run.class_names, _framed(model, run, line, framing)) + "\n")


@answer.register(Seq2SeqLM)
def _translate(model: Seq2SeqLM, prompt: str, session: Session) -> None:
    """Print what each line becomes: one line for each, or `num_samples` with their number before them."""
    run, options, sampling = session.run, session.options, session.sampling
    lines = prompt.splitlines()
    for begin in range(0, len(lines), options.batch_size):
        framing = run.tokenizer.pair_framing
        sources = [_framed(model, run, line, framing) for line in lines[begin : begin + options.batch_size]]
        for texts in translations(model, sources, sampling, run.target_tokenizer, session.generator):
            for number, tokens in enumerate(texts, start=1):
                before = f"{number}\t" if sampling.num_samples > 1 else ""
                _print(f"{before}{run.target_tokenizer.decode(tokens)}\n")


def _framed(model: Model, run: Run, line: str, framing: Framing) -> list[int]:
    """The tokens of a line, framed as the model has learned to see it."""
    tokens = run.tokenizer.encode(run.cased(line))
    room = model.config.context_length - framing.length
    if len(tokens) > room:
        length = len(tokens) + framing.length
        _note(f"a line of {length} tokens is cut to the {model.config.context_length} that the model sees")
    return framing.around(tokens[:room])


def _converse(model: Model, session: Session) -> None:
    """Answer each line that is typed, until Ctrl-D or Ctrl-C."""
    with suppress(ImportError):
        import readline  # noqa: F401  (importing it gives `input` editing and a history)
    at_terminal = sys.stdin.isatty() and sys.stdout.isatty()
    with suppress(EOFError, KeyboardInterrupt):
        while True:
            prompt = input("> " if at_terminal else "")
            try:
                answer(model, prompt, session)
            except UserError as error:
                print(f"error: {error}", file=sys.stderr)
    if at_terminal:
        print()


def _note_context(prompt: int, new: int, context_length: int) -> None:
    """Say what happens past the context, if it may come to that."""
    # The last token drawn is not read.
    if prompt + new - 1 <= context_length:
        return
    rule = "whenever it is full, the oldest half is dropped and the rest is read anew"
    cut = f"; of the prompt's {prompt} tokens, the last {window_length(prompt, context_length)} are read"
    _note(f"the model sees {context_length} tokens: {rule}{cut if prompt > context_length else ''}")


def _note(text: str) -> None:
    print(f"note: {text}", file=sys.stderr, flush=True)


def _print(text: str) -> None:
    if text:
        print(text, end="", flush=True)


def _end_line(text: str) -> None:
    if not text.endswith("\n"):
        _print("\n")
