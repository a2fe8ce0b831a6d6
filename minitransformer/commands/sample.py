"""`sample`: continue a prompt, converse, fill in masks, translate or classify lines, whatever a run's model does.

Standard output carries the text, standard error the notes.
"""

from __future__ import annotations

import io
import secrets
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial, singledispatch
from pathlib import Path
from typing import Any, cast

import torch

from minitransformer.commands import DONE, given_flags, note, piped_text, utf8_text, with_exit_code
from minitransformer.commands.batch_answers import RowPrompts, generate_answers, read_prompts, write_answers
from minitransformer.commands.chatting import chat_format, hold_conversation, system_messages
from minitransformer.commands.sample_options import Options, check_together
from minitransformer.commands.sampling_flags import check_flags, sampling_groups
from minitransformer.commands.settings_flags import parse_groups
from minitransformer.errors import UserError
from minitransformer.generation.classes import Classifier, name_classes, ranked_classes
from minitransformer.generation.config import SamplingConfig
from minitransformer.generation.conversation import ChatFormat, Conversation
from minitransformer.generation.fast.rows import with_row_kernel
from minitransformer.generation.fill import MASK, encode_with_masks
from minitransformer.generation.jsonl_answers import asked_before, check_new
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
from minitransformer.pretrained.chat import published_special_tokens
from minitransformer.runs import GENERATION, Run, latest_run
from minitransformer.text.tokenizers.framing import Framing
from minitransformer.text.tokenizers.spelled import encode_with_special_tokens
from minitransformer.training.machine import choose_device
from minitransformer.training.weights import weights_digest

SEPARATOR = "-" * 40
ABOUT = {
    "prog": "sample.py",
    "description": "Continue a prompt, converse, fill in masks, translate or classify lines, with a run's model. The "
    f"defaults of an imported checkpoint are those of its {GENERATION}, where it has one.",
    "title": "model and prompt",
}


@with_exit_code
def main(arguments: Sequence[str]) -> int:
    """Sample; returns the exit code."""
    options, settings = parse_groups(Options, arguments, sampling_groups(), SamplingConfig().flat, **ABOUT)
    check_together(options, SamplingConfig(**settings))
    path = options.run or latest_run()
    run = Run.open(path) if options.adapter is None else Run.open(path).with_adapter(options.adapter)
    sampling = _completed(options, settings, given_flags(arguments), run)
    # What cannot be encoded is said before a model is loaded.
    asked = _read_prompts(options, run)
    draft_run = None if options.draft is None else _draft_run(options.draft, run)
    device = str(choose_device(options.device))
    weights = StoredWeights.named(options.weights)
    model = with_row_kernel(weights.applied(run.load_model(options.checkpoint, device=device)), note)
    draft = None
    if draft_run is not None:
        draft = Draft(with_row_kernel(weights.applied(_decoder(draft_run, model, device))), options.draft_tokens)
    if options.run is None:
        note(f"the model is that of {path}")
    seed = _seed(options, sampling)
    if sampling.seed is None and _draws(sampling, model):
        note(f"--seed {seed} gives this text again")
    generator = torch.Generator().manual_seed(seed)
    _tolerate_characters()
    _respond(model, asked, Session(run, options, sampling, seed, generator, asked.encode, draft))
    if draft is not None and draft.proposed:
        share = draft.accepted / draft.proposed
        note(f"of {draft.proposed} tokens proposed by the draft, {draft.accepted} were accepted ({share:.0%})")
    return DONE


@dataclass(frozen=True)
class Asked:
    """What is asked of the model: a prompt or a file of them, by itself or in a conversation."""

    encode: Callable[[str], list[int]]
    prompt: str | None = None
    chat: ChatFormat | None = None
    rows: RowPrompts | None = None


def _read_prompts(options: Options, run: Run) -> Asked:
    """What is asked of `run`; raises `UserError` for what cannot be encoded."""
    encode = run.tokenizer.encode
    if options.special_tokens:
        encode = partial(encode_with_special_tokens, run.tokenizer, others=published_special_tokens(run.path))
    chat = chat_format(run, options.system) if options.chat else None
    if options.batch_file is not None and options.out is not None:
        check_new(options.out)
        classifies = run.config.model.num_classes is not None
        framed = _prompt_ids if run.config.model.topology == "decoder" else _text_of_class if classifies else _source
        system = system_messages(options.system)
        rows = read_prompts(options.batch_file, options.template, chat, system, lambda text: framed(run, text, encode))
        if chat is not None:
            rows.check_fit(run.config.model.text_length)
        return Asked(encode, chat=chat, rows=rows)
    if options.interactive or (options.chat and not options.names_prompt):
        return Asked(encode, chat=chat)
    prompt = _prompt(options)
    encode(MASK.sub("", run.cased(prompt)))
    return Asked(encode, prompt, chat)


def _prompt_ids(run: Run, prompt: str, encode: Callable[[str], list[int]]) -> list[int]:
    """The ids of a decoder's prompt: after the framing prefix, unless special tokens in it say the same."""
    prefix, ids = list(run.tokenizer.framing.prefix), encode(prompt)
    return (ids if ids[: len(prefix)] == prefix else [*prefix, *ids]) or [run.tokenizer.end_of_text]


def _seed(options: Options, sampling: SamplingConfig) -> int:
    """The seed: the given one, that of the answers that an earlier process has begun to write, or a new one."""
    before = None if options.out is None else asked_before(options.out).get("seed")
    drawn = before if isinstance(before, int) else secrets.randbelow(2**31)
    return drawn if sampling.seed is None else sampling.seed


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
            note(f"by {path}, unless flags say otherwise: " + ", ".join(f"{name} {taken[name]}" for name in taken))
        if advice.not_followed:
            note(f"{path} asks for {', '.join(advice.not_followed)}, which nothing here does")
    sampling = SamplingConfig(**settings)
    check_together(options, sampling)
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
    encode: Callable[[str], list[int]]
    draft: Draft | None = None


def _respond(model: Model, asked: Asked, session: Session) -> None:
    """Answer what is asked, in the way that is asked for."""
    if asked.rows is not None:
        _answer_rows(model, asked.rows, asked.chat, session)
    elif asked.chat is not None:
        note(f"a conversation by {asked.chat.template.origin}: each message and answer is remembered")
        hold_conversation(_conversation(model, asked.chat, session), None if asked.prompt is None else [asked.prompt])
    elif asked.prompt is None:
        note("each line is a prompt of its own, and none is remembered: --chat is for conversations")
        _converse(model, session)
    else:
        answer(model, asked.prompt, session)


def _conversation(model: Model, chat: ChatFormat, session: Session) -> Conversation:
    stream = partial(stream_text, generator=session.generator, draft=session.draft)
    messages = system_messages(session.options.system)
    return Conversation(cast(DecoderLM, model), chat, session.sampling, stream, note, messages)


def _answer_rows(model: Model, rows: RowPrompts, chat: ChatFormat | None, session: Session) -> None:
    """Write the answers to the rows of the batch file, after those of an earlier process."""
    run, options = session.run, session.options
    sampling, tokenizer = replace(session.sampling, seed=session.seed), run.target_tokenizer
    context, most = model.config.text_length, max(map(len, rows.prompts))
    if chat is not None:
        sampling, tokenizer = chat.with_stops(sampling), chat.ending_tokenizer
    elif isinstance(model, DecoderLM):
        _note_context(most, sampling.max_new_tokens, context)
    digest = weights_digest(run.checkpoint(options.checkpoint))
    request = {"model": digest, "weights": options.weights, **sampling.flat}
    answers_to = partial(generate_answers, model, tokenizer, sampling, options.batch_size)
    if isinstance(model, Classifier):
        answers_to = partial(name_classes, model, run.class_names)
    assert options.out is not None
    before = write_answers(rows, options.out, request, options.batch_size, answers_to)
    begun = f", {before} of them by an earlier call" if before else ""
    note(f"{options.out} has the answers to {len(rows.rows)} rows{begun}")


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
    prompt_ids = _prompt_ids(session.run, prompt, session.encode)
    _note_context(len(prompt_ids), sampling.max_new_tokens, model.config.text_length)
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
    prompt_ids = [_prompt_ids(session.run, prompt, session.encode) for prompt in prompts]
    longest = max(map(len, prompt_ids), default=0)
    _note_context(longest, sampling.max_new_tokens, model.config.text_length)
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
    for line in prompt.splitlines():
        tokens = _text_of_class(session.run, line, session.encode)
        _print(ranked_classes(model, session.run.class_names, tokens) + "\n")


def _text_of_class(run: Run, text: str, encode: Callable[[str], list[int]]) -> list[int]:
    return _source(run, text, encode, run.tokenizer.label_framing)


@answer.register(Seq2SeqLM)
def _translate(model: Seq2SeqLM, prompt: str, session: Session) -> None:
    """Print what each line becomes: one line for each, or `num_samples` with their number before them."""
    run, options, sampling = session.run, session.options, session.sampling
    lines = prompt.splitlines()
    for begin in range(0, len(lines), options.batch_size):
        sources = [_source(run, line, session.encode) for line in lines[begin : begin + options.batch_size]]
        for texts in translations(model, sources, sampling, run.target_tokenizer, session.generator):
            for number, tokens in enumerate(texts, start=1):
                before = f"{number}\t" if sampling.num_samples > 1 else ""
                text = run.target_tokenizer.decode(tokens, skip_special=not options.special_tokens)
                _print(f"{before}{text}\n")


def _source(run: Run, line: str, encode: Callable[[str], list[int]], framing: Framing | None = None) -> list[int]:
    """The tokens of a line, framed as the model has learned to see it, by default as one of a pair."""
    framing, tokens = framing or run.tokenizer.pair_framing, encode(run.cased(line))
    context = run.config.model.text_length
    room = context - framing.length
    if len(tokens) > room:
        length = len(tokens) + framing.length
        note(f"a line of {length} tokens is cut to the {context} that the model sees")
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
    note(f"the model sees {context_length} tokens: {rule}{cut if prompt > context_length else ''}")


def _print(text: str) -> None:
    if text:
        print(text, end="", flush=True)


def _end_line(text: str) -> None:
    if not text.endswith("\n"):
        _print("\n")
