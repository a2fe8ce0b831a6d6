"""`sample.py --chat`: history, what is dropped of it, and how answers end."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

from minitransformer.commands import export, sample
from minitransformer.errors import UserError
from minitransformer.generation.config import SamplingConfig
from minitransformer.generation.conversation import ChatFormat, Conversation
from minitransformer.generation.streaming import stream_text
from minitransformer.models.config import ModelConfig
from minitransformer.models.decoder import DecoderLM
from minitransformer.models.model import build_model
from minitransformer.pretrained.chat import chat_template_in
from minitransformer.pretrained.originals import inherit_originals
from minitransformer.runs import Run
from minitransformer.text.chat_template import ChatTemplate, Message
from minitransformer.text.tokenizers import Bytes, Tokenizer
from tests.runs_for_tests import Call
from tests.test_sampling_command import SCRIPT, write_run

CHATML = ChatTemplate.named("chatml")
TOKENIZER = Bytes().with_special_tokens(CHATML.control_tokens)
CONTEXT = 160
MODEL = ModelConfig(d_model=16, num_layers=1, num_heads=2, context_length=CONTEXT, vocab_size=TOKENIZER.vocab_size)


class Parrot:
    """In place of `stream_text`: answers what it is told to, and keeps the prompts."""

    def __init__(self, *answers: str) -> None:
        self.answers, self.prompts, self.lengths, self.samplings = list(answers), [], [], []

    def __call__(self, model: Any, tokenizer: Tokenizer, prompt: Sequence[int], sampling: Any) -> Iterator[list[str]]:
        self.prompts.append(TOKENIZER.decode(prompt, skip_special=False))
        self.lengths.append(len(prompt))
        self.samplings.append((sampling, tokenizer.ends))
        for character in self.answers.pop(0):
            yield [character]


def conversation(parrot: Parrot, *before: Message, template: ChatTemplate = CHATML, **settings: Any) -> Conversation:
    sampling = SamplingConfig(**{"max_new_tokens": 20, **settings})
    chat = ChatFormat(template, TOKENIZER)
    return Conversation(build_model(MODEL), chat, sampling, parrot, notes.append, list(before))


notes: list[str] = []


@pytest.fixture(autouse=True)
def no_notes() -> None:
    notes.clear()


def test_a_prompt_holds_the_system_message_and_all_that_was_said() -> None:
    parrot = Parrot("hi", "ok")
    talk = conversation(parrot, Message("system", "Be kind."))
    assert ["".join(talk.answer(text)) for text in ("a", "b")] == ["hi", "ok"]
    roles = [("system", "Be kind."), ("user", "a"), ("assistant", "hi"), ("user", "b")]
    assert parrot.prompts[1] == CHATML.render([Message(*each) for each in roles], add_generation_prompt=True)
    assert notes == []


def test_an_answer_ends_with_the_end_of_a_turn_as_a_token_or_as_text() -> None:
    parrot = Parrot("x", "y")
    list(conversation(parrot).answer("a"))
    spelled = ChatTemplate(CHATML.source.replace("<|im_end|>", "</turn>"), "theirs")
    list(conversation(parrot, template=spelled, stop=("!",)).answer("a"))
    (token, ends), (text, usual) = parrot.samplings
    assert (token.stop, ends) == ((), (TOKENIZER.end_of_text, TOKENIZER.special_tokens["<|im_end|>"]))
    assert (text.stop, usual) == (("!", "</turn>"), TOKENIZER.ends)


def test_the_oldest_exchanges_are_dropped_where_the_context_is_full_and_the_system_message_never() -> None:
    parrot = Parrot("1" * 20, "2" * 20, "3" * 20, "4")
    talk = conversation(parrot, Message("system", "Rule"))
    for number in range(4):
        list(talk.answer(f"question {number}"))
        assert parrot.lengths[-1] + 20 <= CONTEXT + 1, "there is room for the answer"
    assert [message.content for message in talk.messages] == ["Rule", "question 2", "3" * 20, "question 3", "4"]
    assert all("Rule" in prompt for prompt in parrot.prompts)
    assert "question 1" not in parrot.prompts[-1]
    assert notes == [f"the model sees {CONTEXT} tokens: the oldest 2 messages are dropped from here on"] * 2


def test_a_message_that_does_not_fit_is_refused_and_forgotten() -> None:
    parrot = Parrot("x", "y")
    talk = conversation(parrot)
    list(talk.answer("a"))
    before = list(talk.messages)
    with pytest.raises(UserError, match=r"the message has \d+ tokens, and the model sees 160, its answer included"):
        list(talk.answer("b" * CONTEXT))
    assert talk.messages == before
    list(talk.answer("c"))
    assert parrot.prompts[-1].count("user") == 2


def test_an_answer_has_no_more_tokens_than_the_context_has_room_for() -> None:
    parrot = Parrot("x")
    list(conversation(parrot, max_new_tokens=1000).answer("a"))
    [(sampling, _)] = parrot.samplings
    assert sampling.max_new_tokens == CONTEXT + 1 - len(CHATML.encode_prompt([Message("user", "a")], TOKENIZER))


def test_an_answer_that_is_stopped_is_remembered_as_far_as_it_came() -> None:
    talk = conversation(Parrot("a long answer"))
    answer = talk.answer("a")
    assert next(answer) + next(answer) == "a "
    answer.close()
    assert talk.messages[-1] == Message("assistant", "a ")


@pytest.fixture(scope="module")
def chatty(tmp_path_factory: pytest.TempPathFactory, shake: Callable[[DecoderLM], DecoderLM]) -> Path:
    """A run with a chat template."""
    path = tmp_path_factory.mktemp("chat") / "run"
    torch.manual_seed(3)
    write_run(path, [shake(build_model(MODEL))], TOKENIZER)
    (path / "chat_template.jinja").write_text(CHATML.source)
    return path


@pytest.fixture
def command(chatty: Path, call: Call) -> Call:
    return partial(call, sample, str(chatty), "--device", "cpu", "--max-new-tokens", "12", "--temperature", "0")


def answers(run: Run, messages: Sequence[Message], *texts: str) -> list[str]:
    """What the model says, by hand."""
    said, talk = [], list(messages)
    chat = ChatFormat(CHATML, run.tokenizer)
    for text in texts:
        talk.append(Message("user", text))
        sampling = SamplingConfig(max_new_tokens=12, temperature=0)
        pieces = stream_text(run.load_model(), chat.ending_tokenizer, chat.encode(talk), sampling)
        said.append("".join(piece for [piece] in pieces))
        talk.append(Message("assistant", said[-1]))
    return said


def lines_of(said: Sequence[str]) -> str:
    return "".join(text if text.endswith("\n") else f"{text}\n" for text in said)


def test_lines_of_a_pipe_are_messages_of_one_conversation(command: Any, chatty: Path) -> None:
    said = answers(Run.open(chatty), [Message("system", "S")], "hello", "more")
    code, out, err = command("--chat", "--system", "S", piped=b"hello\n\nmore")
    assert (code, out) == (0, lines_of(said))
    assert err == f"note: a conversation by {chatty / 'chat_template.jinja'}: each message and answer is remembered\n"


def test_a_prompt_is_one_message(command: Any, chatty: Path) -> None:
    code, out, _ = command("--chat", "--prompt", "hello", piped=b"not read")
    assert (code, out) == (0, lines_of(answers(Run.open(chatty), [], "hello")))


def test_a_message_of_a_pipe_that_does_not_fit_ends_with_2(command: Any) -> None:
    code, _, err = command("--chat", piped=b"x" * 1000 + b"\nhello")
    assert code == 2
    assert "error: the message has" in err


def test_special_tokens_in_a_prompt_are_tokens_only_where_that_is_asked_for(command: Any, chatty: Path) -> None:
    run, text = Run.open(chatty), "<|im_start|>user\n?<|im_end|>\n<|im_start|>assistant\n"
    sampling = SamplingConfig(max_new_tokens=12, temperature=0)
    expected = []
    for ids in (run.tokenizer.encode(text), CHATML.encode_prompt([Message("user", "?")], run.tokenizer)):
        pieces = stream_text(run.load_model(), run.tokenizer, ids, sampling)
        expected.append(text + "".join(piece for [piece] in pieces))
    assert expected[0] != expected[1]
    for flags, whole in zip(([], ["--special-tokens"]), expected, strict=True):
        assert command("--prompt", text, *flags)[1] == lines_of([whole])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--chat --interactive", "--chat remembers what was said, and --interactive takes each line on its own"),
        ("--chat --lines", "--chat remembers what was said, and --lines takes each line on its own"),
        ("--chat --num-samples 2 --temperature 1", "--chat gives one answer, as it is drawn: leave --num-samples"),
        ("--chat --num-beams 2", "--chat gives one answer, as it is drawn: leave --num-samples and --num-beams out"),
        ("--chat --special-tokens", "--special-tokens is for prompts, and the template writes a conversation's"),
        ("--system X", "--system begins a conversation: give --chat as well"),
    ],
)
def test_a_flag_that_makes_no_sense_in_or_without_a_conversation_is_refused(
    command: Any, flags: str, message: str
) -> None:
    code, out, err = command(*flags.split())
    assert (code, out) == (2, "")
    assert f"error: {message}" in err


def test_a_run_without_a_template_is_told_the_way(command: Any, chatty: Path) -> None:
    template = chatty / "chat_template.jinja"
    template.rename(chatty / "away")
    try:
        code, _, err = command("--chat")
    finally:
        (chatty / "away").rename(template)
    assert code == 2
    assert "has no chat template, because it was not trained on conversations: give --interactive" in err


def test_a_template_that_leaves_its_sandbox_is_refused_before_a_model_is_loaded(
    command: Any, chatty: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    template = chatty / "chat_template.jinja"
    before = template.read_text()
    monkeypatch.setattr(Run, "load_model", None)
    template.write_text("{{ messages.__class__.__mro__ }}")
    try:
        code, _, err = command("--chat")
    finally:
        template.write_text(before)
    assert code == 2
    assert "chat_template.jinja fails (the attribute '__class__' of a list is out of bounds)" in err


def test_a_published_template_is_kept_and_used_with_the_names_of_its_publisher(tmp_path: Path, call: Call) -> None:
    from tests.test_pretrained_originals import checkpoint

    public = checkpoint("llama 3", tmp_path / "public", max_position_embeddings=64)
    settings = json.loads((public / "tokenizer_config.json").read_text())
    for away in (False, True):  # in a file of its own, or in tokenizer_config.json alone
        if away:
            (public / "chat_template.jinja").unlink()
        path = tmp_path / f"run-{away}"
        assert import_module("minitransformer.commands.import").main([str(public), "--out", str(path)]) == 0
        template = Run.open(path).chat_template
        assert template is not None
        assert (template.source, template.end_of_turn) == (settings["chat_template"], "<|eot_id|>")
        assert template.variables == {"bos_token": "<|other|>", "eos_token": "<|end_of_text|>"}
        end = Run.open(path).tokenizer.end_of_text
        assert template.special_tokens["<|end_of_text|>"] == end, "which is <|endoftext|> here"
        code, _, err = call(sample, str(path), "--device", "cpu", "--max-new-tokens", "3", "--chat", "--prompt", "the")
        assert (code, err.count("a conversation by")) == (0, 1)


def test_a_fine_tuned_run_inherits_the_template_and_an_export_has_the_run_s_own(tmp_path: Path) -> None:
    from tests.test_pretrained_originals import checkpoint

    public = checkpoint("llama 3", tmp_path / "public")
    assert import_module("minitransformer.commands.import").main([str(public), "--out", str(tmp_path / "run")]) == 0
    (tmp_path / "run" / "chat_template.jinja").write_text(CHATML.source)
    inherit_originals(tmp_path / "run", tmp_path / "tuned")
    for path in (tmp_path / "run", tmp_path / "tuned"):
        found = chat_template_in(path, TOKENIZER)
        assert found is not None
        assert (found.source, found.origin) == (CHATML.source, str(path / "chat_template.jinja"))
    assert export.main([str(tmp_path / "run"), "--to", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == CHATML.source


needs_terminal = pytest.mark.skipif(sys.platform == "win32", reason="terminals are POSIX")


class Terminal:
    """`sample.py --chat` at a terminal of its own."""

    def __init__(self, run: Path, *flags: str) -> None:
        self.ours, theirs = os.openpty()
        command = [sys.executable, str(SCRIPT), str(run), "--device", "cpu", "--chat", *flags]
        self.process = subprocess.Popen(
            command,
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            start_new_session=True,
            env={**os.environ, "TERM": "dumb"},
        )
        os.close(theirs)
        self.seen = ""

    def wait_for(self, text: str, count: int = 1) -> None:
        limit = time.monotonic() + 60
        while self.seen.count(text) < count:
            ready, _, _ = select.select([self.ours], [], [], limit - time.monotonic())
            assert ready, self.seen
            try:
                self.seen += os.read(self.ours, 4096).decode(errors="replace")
            except OSError:
                raise AssertionError(f"ended without {text!r}: {self.seen}") from None

    def type(self, text: str) -> None:
        os.write(self.ours, text.encode())


@needs_terminal
def test_at_a_terminal_ctrl_c_stops_an_answer_and_ctrl_d_ends_the_conversation(tmp_path: Path) -> None:
    model = build_model(replace(MODEL, context_length=200_000, tied_embeddings=False))
    torch.nn.init.zeros_(model.head.weight)  # the greedy choice is for ever the first byte
    write_run(tmp_path / "run", [model], TOKENIZER)
    (tmp_path / "run" / "chat_template.jinja").write_text(CHATML.source)
    terminal = Terminal(tmp_path / "run", "--max-new-tokens", "100000", "--temperature", "0")
    terminal.wait_for("> ")
    time.sleep(0.5)  # readline shows the prompt before it listens to signals
    terminal.process.send_signal(signal.SIGINT)  # nothing to stop: the way out is told
    terminal.wait_for("Ctrl-D ends the conversation", 2)
    terminal.wait_for("> ", 2)
    terminal.type("hello\n")
    terminal.wait_for("\0\0\0")
    terminal.process.send_signal(signal.SIGINT)
    terminal.wait_for("> ", 3)
    assert terminal.process.poll() is None
    terminal.type("\x04")
    assert terminal.process.wait(60) == 0
    assert "Traceback" not in terminal.seen
